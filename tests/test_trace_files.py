"""The files of execution traces: one for each NPU, each of them whole, refused before the run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chakra_reader import contents, expected_contents, generate, read_trace, trace_names
from helpers import (
    BOUND,
    FAST,
    GOOD_REPORT,
    MNK_INPUTS,
    SCRIPT,
    fake_v2,
    is_flag_error,
    run,
    state,
)
from processes import ended, start_command


def in_et(folder: Path) -> list[Path]:
    return sorted((folder / "et").iterdir())


def test_the_command_line(tmp_path: Path) -> None:
    """Relative to the current folder, parent folders made, links of a file as readable as any."""
    flags = ["--time_unit=us", "--clock_mhz=700", "--num_passes=2", "--chakra_et=deep/et/v1.2"]
    flags += ["--parallel=HYBRID_DATA_MODEL", "--num_npus=16", "--num_packages=2"]
    assert run(tmp_path, FAST, *flags).status == 0
    text = (tmp_path / "workload.txt").read_text()
    nodes = read_trace(tmp_path / "deep/et/v1.2.3.et")
    assert contents(nodes) == expected_contents(text, 16, 2, 2)
    files = list((tmp_path / "deep/et").iterdir())
    assert {path.name for path in files} == trace_names(16, "v1.2")
    assert len({path.stat().st_ino for path in files}) == 1
    assert {path.stat().st_mode for path in files} == {(tmp_path / "workload.txt").stat().st_mode}


def test_a_clock_is_all_that_traces_need(tmp_path: Path) -> None:
    result = run(tmp_path, FAST, "--chakra_et=x", "--clock_mhz=700", "--num_npus=4")
    assert result.status == 0
    text = (tmp_path / "workload.txt").read_text().split()
    assert text[4] == "2043", "the text file has cycles, of a GEMM of 256 x 128 x 512"
    assert read_trace(tmp_path / "x.0.et")[0].duration == round(2043 / 700)


def test_gpt3_on_4096_npus_is_on_disk_once(tmp_path: Path) -> None:
    system = {"num_npus": 4096, "num_packages": 512, "parallel": "HYBRID_DATA_MODEL"}
    _, nodes = generate(tmp_path, mnk=MNK_INPUTS / "gpt3_175b.csv", **system)
    layers, blocks = 576, 96
    collectives = 2 * blocks + (2 * blocks - 1) + 4 * blocks  # the first layer has none backward
    assert len(nodes) == 3 * layers + collectives
    assert {path.name for path in in_et(tmp_path)} == trace_names(4096)
    assert len({path.stat().st_ino for path in in_et(tmp_path)}) == 1


@pytest.mark.parametrize(
    ("names_of_one", "inodes"),
    [pytest.param(1, 16, id="no links"), pytest.param(5, 4, id="at most five names")],
)
def test_copies_where_there_are_no_more_links(
    names_of_one: int, inodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_or_refuse(source: Path, target: Path) -> None:
        if source.stat().st_nlink == names_of_one:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK), str(source))
        link(source, target)

    monkeypatch.setattr(os, "link", link_or_refuse)
    generate(tmp_path)
    assert {path.name for path in in_et(tmp_path)} == trace_names(16)
    assert len({path.stat().st_ino for path in in_et(tmp_path)}) == inodes
    assert len({path.read_bytes() for path in in_et(tmp_path)}) == 1


def test_older_traces_are_replaced(tmp_path: Path) -> None:
    _, longer = generate(tmp_path, num_passes=3)
    _, shorter = generate(tmp_path, num_npus=8)
    assert len(longer) == 3 * len(shorter)
    assert all(read_trace(tmp_path / "et" / name) == shorter for name in trace_names(8))
    assert not [path for path in in_et(tmp_path) if path.name not in trace_names(16)]


# The script, which gets a Ctrl-C when it puts its fourth trace in place.
INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import gen_astrasim_workload_input as tool
replace = os.replace
def interrupted(source, target):
    if str(target).endswith(".3.et"):
        signal.raise_signal(signal.SIGINT)
    replace(source, target)
os.replace = interrupted
tool.command_line()
"""


def test_ctrl_c_while_traces_are_put_in_place_leaves_whole_ones_and_no_workload_file(
    tmp_path: Path,
) -> None:
    flags = [FAST, "--cache_dir=", "--chakra_et=et/x", "--clock_mhz=1", "--num_npus=16"]
    command = [sys.executable, "-c", INTERRUPTED, str(SCRIPT.parent), *flags]
    running = start_command(tmp_path, command)
    result = ended(running)
    assert (result.status, result.out, result.err) == (-signal.SIGINT, "", "")
    assert [path.name for path in in_et(tmp_path)] == ["x.0.et", "x.1.et", "x.2.et"]
    assert len(read_trace(tmp_path / "et/x.2.et")) == 20 + 7
    assert not (tmp_path / "workload.txt").exists()


FOLDER = " is a folder, expected a file to write"


@pytest.mark.parametrize(
    ("folder", "file", "closed", "message"),
    [
        pytest.param("w.txt", "et/x.3.et", None, f"w.txt{FOLDER}", id="output"),
        pytest.param("et/x.0.et", "et/x.3.et", None, f"et/x.0.et{FOLDER}", id="first"),
        pytest.param("et/x.7.et", "et/x.3.et", None, f"et/x.7.et{FOLDER}", id="last"),
        pytest.param(
            "other",
            "et",
            None,
            "et is a file, expected a folder",
            id="file as folder",
        ),
        pytest.param("other", "et/x.3.et", "et", "et: no permission to write", id="closed folder"),
        pytest.param(
            "other", "et/x.0.et", "et/x.0.et", "et/x.0.et: no permission to write", id="closed file"
        ),
    ],
)
def test_refused_before_anything_is_simulated(
    folder: str, file: str, closed: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    before = state(tmp_path / "et")
    marks = f"open({str(tmp_path / 'simulated')!r}, 'w').close()"
    fake = fake_v2(tmp_path / "fake", f"{marks}\n{GOOD_REPORT}")
    flags = ["--chakra_et=et/x", "--clock_mhz=1000", "--output_file=w.txt", "--cache_dir="]
    command = [*BOUND, sys.executable, str(SCRIPT), f"--scalesim_path={fake}", *flags]
    if closed:
        (tmp_path / closed).chmod(0o444 if closed == file else 0o555)
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    finally:
        if closed:
            (tmp_path / closed).chmod(0o755)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {tmp_path}/{message}\n")
    assert not (tmp_path / "simulated").exists()
    assert not (tmp_path / "w.txt").is_file()
    assert state(tmp_path / "et") == before


def test_a_dry_run_writes_none(tmp_path: Path) -> None:
    flags = ["--chakra_et=et/x", "--clock_mhz=700", "--dry_run"]
    assert run(tmp_path, FAST, *flags).status == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unit", ["cycles", "ns", "us"])
def test_traces_without_a_clock_are_refused(unit: str, tmp_path: Path) -> None:
    result = run(tmp_path, FAST, "--chakra_et=x", f"--time_unit={unit}")
    assert is_flag_error(result), result
    needs = f"--time_unit={unit}" if unit != "cycles" else "--chakra_et"
    assert f"{needs} needs --clock_mhz" in result.err
    assert list(tmp_path.iterdir()) == []


# Python itself is told that there is no protobuf.
HIDDEN = """
import runpy, sys
sys.modules["google.protobuf"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_protobuf(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDDEN, str(SCRIPT), FAST, "--cache_dir=", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_traces_need_protobuf(tmp_path: Path) -> None:
    done = without_protobuf(tmp_path, "--chakra_et=et/x", "--clock_mhz=1000")
    message = "error: --chakra_et needs protobuf: pip install -r requirements.txt\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert list(tmp_path.iterdir()) == []


def test_a_text_file_needs_no_protobuf(tmp_path: Path) -> None:
    done = without_protobuf(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "workload.txt").read_text().startswith("DATA\n7\n")
