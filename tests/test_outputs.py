"""Outputs: none harms another file, each is whole after an error, the workload file comes last."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    FAST,
    SCRIPT,
    SUMMARY_HEADER,
    generate,
    is_flag_error,
    is_one_error_line,
    limited,
    rows_of,
    run,
    state,
    write_table,
)

IN_RUN_FOLDER = "outputs/DATA/t/layers.csv"
TRACES = ["--chakra_et=x", "--clock_mhz=700"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with inputs, links to them, and the outputs of an earlier run."""
    write_table(tmp_path / "t.csv", "a,64,64,64", "b,64,64,64")
    write_table(tmp_path / "in.0.et", "a,64,64,64")
    (tmp_path / "c.cfg").write_text(tool.BUILT_IN_CONFIG)
    (tmp_path / "link.csv").symlink_to("t.csv")
    (tmp_path / "also_w.csv").symlink_to("w.csv")
    (tmp_path / "also_x.csv").symlink_to("x.3.et")
    result = run(tmp_path, FAST, "--mnk=t.csv", "--summary_csv=s.csv", *TRACES)
    assert result.status == 0
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        pytest.param(["--output_file=w.csv", "--summary_csv=w.csv"], "w.csv", id="text, summary"),
        pytest.param(
            ["--output_file=w.csv", "--summary_csv=also_w.csv"],
            "also_w.csv",
            id="text, a link to it",
        ),
        pytest.param(["--output_file=x.0.et", *TRACES], "x.0.et", id="text, first trace"),
        pytest.param(["--output_file=x.7.et", *TRACES], "x.7.et", id="text, last trace"),
        pytest.param(["--summary_csv=x.3.et", *TRACES], "x.3.et", id="summary, trace"),
        pytest.param(
            ["--output_file=also_x.csv", *TRACES], "x.3.et", id="a link to a trace, trace"
        ),
        pytest.param([f"--output_file={IN_RUN_FOLDER}"], IN_RUN_FOLDER, id="text, layers.csv"),
        pytest.param([f"--summary_csv={IN_RUN_FOLDER}"], IN_RUN_FOLDER, id="summary, layers.csv"),
        pytest.param(
            ["--output_file=outputs/DATA/t/scalesim.cfg"],
            "outputs/DATA/t/scalesim.cfg",
            id="text, scalesim.cfg",
        ),
        pytest.param(
            ["--output_file=outputs/DATA/t/t_fwd_pass.csv"],
            "outputs/DATA/t/t_fwd_pass.csv",
            id="text, topology",
        ),
        pytest.param(
            ["--output_file=outputs/DATA/t/cycle_model.txt"],
            "outputs/DATA/t/cycle_model.txt",
            id="text, cycle_model.txt",
        ),
        pytest.param(["--output_file=t.csv"], "t.csv", id="table, text"),
        pytest.param(["--output_file=link.csv"], "link.csv", id="table, a link to it"),
        pytest.param(["--summary_csv=t.csv"], "t.csv", id="table, summary"),
        pytest.param(["--summary_csv=link.csv"], "link.csv", id="table, a link to it as summary"),
        pytest.param(
            ["--mnk=in.0.et", "--chakra_et=in", "--clock_mhz=700"], "in.0.et", id="table, trace"
        ),
        pytest.param(
            [f"--mnk={IN_RUN_FOLDER}", "--run_name=t"], IN_RUN_FOLDER, id="table, layers.csv"
        ),
        pytest.param(
            ["--scalesim_config=c.cfg", "--output_file=c.cfg"], "c.cfg", id="config, text"
        ),
        pytest.param(
            ["--scalesim_config=c.cfg", "--summary_csv=c.cfg"], "c.cfg", id="config, summary"
        ),
        pytest.param(
            ["--scalesim_config=outputs/DATA/t/scalesim.cfg"],
            "outputs/DATA/t/scalesim.cfg",
            id="config, scalesim.cfg",
        ),
    ],
)
def test_a_file_in_two_places_is_refused_before_anything_is_written(
    flags: list[str], where: str, folder: Path
) -> None:
    if flags[0].startswith("--mnk=outputs"):
        write_table(folder / IN_RUN_FOLDER, "a,64,64,64")
    before = state(folder)
    result = run(folder, FAST, "--mnk=t.csv", *flags)
    assert is_one_error_line(result), result
    assert f"{folder}/{where} is " in result.err
    assert state(folder) == before


@pytest.mark.parametrize("what", ["--output_file=d", "--summary_csv=d", "--chakra_et=d/x"])
def test_an_output_that_is_a_folder_is_refused_before_anything_is_written(
    what: str, folder: Path
) -> None:
    (folder / "d/x.2.et").mkdir(parents=True)
    before = state(folder)
    result = run(folder, FAST, "--mnk=t.csv", what, "--clock_mhz=700", "--time_unit=us")
    assert is_one_error_line(result), result
    path = f"{folder}/d/x.2.et" if "chakra" in what else f"{folder}/d"
    assert f"error: {path} is a folder, expected a file to write\n" in result.err
    assert state(folder) == before


@pytest.mark.parametrize("flag", ["output_file", "summary_csv"])
@pytest.mark.parametrize("path", ["new/", "d/", "d/.", "d/.."])
def test_a_path_that_only_a_folder_can_have_is_refused(
    flag: str, path: str, tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    before = state(tmp_path)
    result = run(tmp_path, FAST, f"--{flag}={path}")
    assert is_flag_error(result), result
    assert f"flag --{flag}={path}: expected a file, not a folder" in result.err
    assert state(tmp_path) == before


# --- A disk that gets full in the middle of a summary's row


@pytest.fixture
def nearly_full(folder: Path) -> tuple[Path, int]:
    """Return a folder with a summary of many rows, and a size that its next row goes beyond."""
    header, row = (folder / "s.csv").read_text().splitlines()
    (folder / "s.csv").write_text("\n".join([header, *[row] * 100]) + "\n")
    size = (folder / "s.csv").stat().st_size
    assert size > 10_000, "no other file comes near"
    return folder, size + len(row) // 2


def test_no_room_for_a_row_leaves_the_summary_and_the_workload_file_as_they_were(
    nearly_full: tuple[Path, int],
) -> None:
    folder, size = nearly_full
    results = ["s.csv", "workload.txt"]
    before = [(folder / name).read_bytes() for name in results]
    flags = ["--mnk=t.csv", "--summary_csv=s.csv", "--num_npus=8", "--datatype_size=4"]
    flags += ["--chakra_et=x", "--clock_mhz=1"]
    result = limited(folder, size, FAST, *flags)
    assert is_one_error_line(result), result
    assert result.err == f"error: {folder}/s.csv: File too large\n"
    assert [(folder / name).read_bytes() for name in results] == before
    assert not list(folder.glob(".*")), "nothing half made is left"


def test_no_room_for_a_trace_leaves_all_results_as_they_were(folder: Path) -> None:
    results = ["s.csv", "workload.txt", *(f"x.{npu}.et" for npu in range(8))]
    before = [(folder / name).read_bytes() for name in results]
    flags = ["--mnk=t.csv", "--summary_csv=s.csv", "--num_npus=8", "--chakra_et=x"]
    flags += ["--clock_mhz=1", "--num_passes=1000", "--datatype_size=4"]
    result = limited(folder, 50_000, FAST, *flags)
    assert is_one_error_line(result), result
    assert result.err == f"error: {folder}/x.0.et: File too large\n"
    assert [(folder / name).read_bytes() for name in results] == before
    assert not list(folder.glob(".*")), "nothing half made is left"


def test_a_row_that_has_room_is_written_whole(nearly_full: tuple[Path, int]) -> None:
    """The same but for the room, so that the test above is one of room."""
    folder, size = nearly_full
    flags = ["--mnk=t.csv", "--summary_csv=s.csv", "--num_npus=8", *TRACES]
    assert limited(folder, size + 1000, FAST, *flags).status == 0
    assert len(rows_of(folder / "s.csv", SUMMARY_HEADER)) == 101


def test_a_first_row_without_room_leaves_no_header_either(folder: Path) -> None:
    """A long path makes the summary the largest file; the next run writes the header."""
    (folder / "s.csv").unlink()
    output = "/".join(["n" * 100] * 12)
    flags = ["--mnk=t.csv", f"--output_file={output}", "--summary_csv=s.csv"]
    assert run(folder, FAST, *flags).status == 0
    size = (folder / "s.csv").stat().st_size
    others = (folder / "outputs/DATA/t").iterdir()
    assert size - 100 > max(path.stat().st_size for path in others)
    (folder / "s.csv").unlink()
    result = limited(folder, size - 50, FAST, *flags)
    assert is_one_error_line(result), result
    assert not (folder / "s.csv").exists() or (folder / "s.csv").read_text() == ""
    assert run(folder, FAST, *flags).status == 0
    assert len(rows_of(folder / "s.csv", SUMMARY_HEADER)) == 1


def test_a_summary_that_can_not_be_locked_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems; it and the workload file stay as they were."""
    generate(tmp_path, summary_csv=tmp_path / "s.csv")
    before = {name: (tmp_path / name).read_bytes() for name in ("s.csv", "workload.txt")}

    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(OSError, match=os.strerror(errno.ENOLCK)) as error:
        generate(tmp_path, summary_csv=tmp_path / "s.csv", num_npus=4)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert error.value.filename == tmp_path / "s.csv"


# --- Each file whole or not at all, the workload file last


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("again", [False, True], ids=["first run", "over an earlier run"])
def test_a_disk_that_gets_full_in_any_file_leaves_all_of_them_whole(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first file that a run writes, then in the second one, until there is no further one.

    Each file is the older or the newer one, none is half made, and without an error from the
    others there is no new workload file.
    """
    table = write_table(tmp_path / "t.csv", "a,64,64,64", "b,64,64,64")

    def write(folder: Path, **changes: Any) -> dict[str, bytes]:
        traces = {"chakra_et": folder / "et/x", "clock_mhz": 1.0, "num_npus": 4}
        generate(folder, mnk=table, **traces, **changes)
        return files_below(folder)

    older = write(tmp_path / "older", datatype_size=1) if again else {}
    newer = write(tmp_path / "newer", datatype_size=2)
    assert len(newer) == 6 + 4 + 1, "of the run folder, traces, the workload file"
    write_bytes = Path.write_bytes
    for number in range(8):
        folder = tmp_path / str(number)
        if again:
            shutil.copytree(tmp_path / "older", folder)
        writes = itertools.count()

        def write_or_fill_up(path: Path, data: bytes) -> int:
            if next(writes) == number:  # noqa: B023
                write_bytes(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(path, data)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", write_or_fill_up)
            with pytest.raises(OSError, match="No space left") as error:
                write(folder, datatype_size=2)
        found = files_below(folder)
        assert str(Path(error.value.filename).relative_to(folder)) in newer, "it names the file"
        assert all(data in (older.get(name), newer[name]) for name, data in found.items())
        assert found.get("workload.txt") == older.get("workload.txt")
    assert str(error.value.filename) == f"{folder}/workload.txt", "the last one"


def test_the_workload_file_is_put_in_place_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it finds the other results."""
    replace = os.replace
    seen: list[dict[str, bytes]] = []

    def look_and_replace(source: Path, target: Path) -> None:
        if target == tmp_path / "workload.txt":
            seen.append(files_below(tmp_path))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    generate(tmp_path, chakra_et=tmp_path / "x", clock_mhz=1.0, summary_csv=tmp_path / "s.csv")
    (before,) = seen
    after = files_below(tmp_path)
    text = after.pop("workload.txt")
    (part,) = set(before) - set(after)
    assert (before.pop(part), part.endswith(".part")) == (text, True)
    assert before == after


# --- What is printed


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_table_for_a_terminal_of_any_encoding(encoding: str, tmp_path: Path) -> None:
    result = run(tmp_path, FAST, env={"PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"})
    times = {"ascii": "x", "latin-1": os.fsdecode("×".encode("latin-1")), "utf-8": "×"}[encoding]
    assert (result.status, result.err) == (0, "")
    assert f"\nMLP_Bottom_1 {times} 4\n" in result.out
    assert f"\n7 {times} ALLREDUCE" in result.out


def test_a_name_that_the_terminal_can_not_show_is_escaped(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "caf\u00e9,64,64,64")
    result = run(tmp_path, FAST, f"--mnk={table}", env={"PYTHONIOENCODING": "ascii"})
    assert (result.status, result.err) == (0, "")
    assert "\ncaf\\xe9\n" in result.out


@pytest.mark.parametrize("flag", ["--output_file", "--summary_csv"])
@pytest.mark.parametrize("name", ["gemm_8x8x8", "gemm_8x8x8/COMPUTE_REPORT.csv", "gemm_1x1x1/x"])
def test_an_output_among_scalesims_reports_is_refused(flag: str, name: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    path = f"outputs/DATA/t/{name}"
    result = run(tmp_path, FAST, f"--mnk={table}", "--num_npus=1", f"{flag}={path}")
    expected = "is among SCALE-Sim's reports, expected another place"
    assert result.err == f"error: {tmp_path}/{path} {expected}\n"
    assert not (tmp_path / "outputs").exists()


def test_traces_behind_a_link_that_leads_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    result = run(tmp_path, FAST, "--chakra_et=circle/x", "--clock_mhz=700")
    assert is_one_error_line(result), result


def test_results_that_the_terminals_disk_has_no_room_for(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), FAST]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "error: standard output: No space left on device\n",
    )


def test_an_output_that_is_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert is_one_error_line(run(tmp_path, FAST, "--output_file=a"))
    assert is_one_error_line(run(tmp_path, FAST, "--summary_csv=b"))


def test_the_last_lines_say_all_that_was_written(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    (tmp_path / "link.txt").symlink_to("real.txt")
    flags = [f"--mnk={table}", "--num_npus=2", "--clock_mhz=1", "--chakra_et=deep/../et/x"]
    flags += ["--num_passes=3", "--summary_csv=x/../s.csv", "--output_file=link.txt"]
    lines = run(tmp_path, FAST, *flags).out.splitlines()
    assert lines[:2] == [
        "DATA on 2 NPUs in 1 package, dp 2 x mp 1",
        "256 x 256 array, ws, analytical, 1 MHz",
    ]
    written, *others = lines[-4:]
    expected = f"wrote {tmp_path}/real.txt: 1 layer, 2 distinct GEMMs (analytical), "
    assert re.fullmatch(re.escape(expected) + r"\d+\.\d s", written)
    assert others == [
        f"wrote 2 traces of 3 training steps: {tmp_path}/et/x.<npu>.et",
        f"wrote a row in {tmp_path}/s.csv",
        f"wrote details in {tmp_path}/outputs/DATA/t",
    ]
