"""The command line: flags, outputs, the look before the run, statuses, and ordinary mishaps around files."""

from __future__ import annotations

import os
import re
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    GOOD_REPORT,
    MNK_INPUTS,
    SCRIPT,
    fake_v2,
    is_one_error_line,
    read_like_astrasim,
    run,
    seen_on_a_terminal,
    write_table,
)

FAST = "--cycle_model=analytical"


@pytest.mark.parametrize(
    ("parallel", "table"),
    [
        ("DATA", "example"),
        ("HYBRID_CUSTOMIZED", "example_customized"),
        ("DATA", "example_customized"),
    ],
)
def test_the_original_tools_command_lines(parallel: str, table: str, tmp_path: Path) -> None:
    flags = (
        f"--datatype_size=2 --num_npus=16 --num_packages=2 --parallel={parallel} --run_name=example"
    )
    result = run(
        tmp_path, *flags.split(), f"--mnk={MNK_INPUTS}/{table}.csv", "--output_file=a/b.txt", FAST
    )
    assert result.status == 0
    assert read_like_astrasim((tmp_path / "a/b.txt").read_text())[0] == parallel
    assert (tmp_path / f"outputs/{parallel}/example/{table}_fwd_pass.csv").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--num_npus=16", "--num_packages=3"],
            "flags num_npus=16, num_packages=3: packages must divide NPUs",
        ),
        (["--num_npus=0"], "flag --num_npus=0: 0 is not an integer in the range [1, 2147483647]"),
        (["--num_npu=-4"], "-4 is not an integer in the range [1, 2147483647]"),
        (["--num_npus=" + "9" * 30], "is not an integer in the range [1, 2147483647]"),
        (["--update_time=" + "9" * 30], "is not an integer in the range [0, 2147483647]"),
        (["--flagfile=nul"], "error: embedded null byte"),
        (["--num_npus=1.5"], "flag --num_npus=1.5: "),
        (
            ["--datatype_size=0"],
            "flag --datatype_size=0: 0 is not an integer in the range [1, 1048576]",
        ),
        (
            ["--parallel=PIPELINE"],
            "value should be one of <DATA|MODEL|HYBRID_DATA_MODEL|HYBRID_MODEL_DATA|HYBRID_",
        ),
        (["--colour=red"], "Unknown command line flag 'colour'"),
        (["example.csv"], "unexpected argument 'example.csv', expected --name=value"),
        (["--jobs=0"], "flag --jobs=0: 0 is not a positive integer"),
        (["--update_time=-1"], "flag --update_time=-1: -1 is not an integer in the range [0, "),
        (["--run_name=../../x"], "flag --run_name=../../x: expected a folder below outputs"),
        (
            ["--run_name=a/../../../x"],
            "flag --run_name=a/../../../x: expected a folder below outputs",
        ),
        (["--run_name=/tmp/x"], "flag --run_name=/tmp/x: expected a folder below outputs"),
        (["--run_name=."], "flag --run_name=.: expected a folder below outputs"),
        (["--mnk="], "flag --mnk=: expected a path"),
        (["--output_file="], "flag --output_file=: expected a path"),
        (["--mnk=~nobody_here/t.csv"], "/~nobody_here/t.csv: No such file or directory"),
        (["--mnk=missing.csv"], "/missing.csv: No such file or directory"),
        (["--mnk=."], ": Is a directory"),
        (["--scalesim_config=missing.cfg"], "/missing.cfg: No such file or directory"),
        (["--output_file=."], " is a folder or was given to read, expected another file"),
        (
            ["--chakra_et=/", "--time_unit=us", "--clock_mhz=1"],
            "flag --chakra_et=/: expected how file names begin",
        ),
        (
            ["--chakra_et=a/", "--time_unit=us", "--clock_mhz=1"],
            "flag --chakra_et=a/: expected how file names begin",
        ),
        (
            ["--chakra_et=..", "--time_unit=us", "--clock_mhz=1"],
            "flag --chakra_et=..: expected how file names begin",
        ),
        (
            ["--summary_csv=s.txt", "--output_file=s.txt"],
            "two outputs are one file, expected another for each",
        ),
        (
            ["--chakra_et=et/x", "--output_file=et/x.2.et", "--time_unit=us", "--clock_mhz=1"],
            "two outputs are one",
        ),
        (["--output_file=outputs/DATA"], "outputs/DATA is a folder or was given to read, expected"),
        (["--output_file=workload.txt/x"], "/workload.txt: File exists"),
        (["--output_file=" + "x" * 300], ": File name too long"),
        ([f"--flagfile={sys.executable}"], "codec can't decode"),
    ],
)
def test_bad_input_is_one_line_and_status_1(flags: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "workload.txt").write_text("mine")
    (tmp_path / "nul").write_bytes(b"--mnk=a\0b\n")
    result = run(tmp_path, FAST, *flags)
    assert is_one_error_line(result), result
    assert message in result.err
    assert (tmp_path / "workload.txt").read_text() == "mine"
    assert not list(tmp_path.rglob("*.part"))


def test_help_lists_the_flags_in_order_on_stdout(tmp_path: Path) -> None:
    result = run(tmp_path, "--help")
    assert (result.status, result.err) == (0, "")
    listed = re.findall(r"^  --(\w+)", result.out, re.MULTILINE)
    assert re.findall(r"^  --(?:jobs|num_npus|dry_run).*", result.out, re.MULTILINE) == [
        "  --num_npus=8",
        "  --jobs=None",
        "  --dry_run=False",
    ]
    assert listed[:6] == ["mnk", "parallel", "num_npus", "num_npu", "num_packages", "datatype_size"]
    assert set(listed) == {*tool.Settings._fields, "num_npu", "run_name"} - {"run_folder"}
    assert max(map(len, result.out.splitlines())) <= 120


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    command = ["bash", "-c", 'rmdir "$PWD" && exec "$@"', "bash", sys.executable, str(SCRIPT), FAST]
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "No such file or directory" in done.stderr


def test_a_python_without_the_packages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(SCRIPT), "--help"], capture_output=True, text=True
    )
    expected = f"error: no absl in {sys.executable}: pip install -r requirements.txt\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_flags_may_be_lower_case_and_the_alias_works(tmp_path: Path) -> None:
    assert run(tmp_path, FAST, "--parallel=model", "--num_npu=4").status == 0
    assert (tmp_path / "workload.txt").read_text().startswith("MODEL\n")
    assert (tmp_path / "outputs/MODEL/example/example_fwd_pass.csv").read_text().split("\n")[
        1
    ].split(",")[6] == "32"


def test_the_output_keeps_to_the_umask_and_to_links(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    assert run(tmp_path, FAST, "--output_file=link.txt").status == 0
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text().startswith("DATA\n7\n")
    (tmp_path / "plain").touch()
    (tmp_path / "shared.txt").touch(0o664)
    (tmp_path / "shared.txt").chmod(0o664)
    assert run(tmp_path, FAST, "--output_file=new.txt").status == 0
    assert run(tmp_path, FAST, "--output_file=shared.txt").status == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.txt")}
    umask = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert modes == {"link.txt": umask, "real.txt": umask, "new.txt": umask, "shared.txt": 0o664}


def test_pipes_in_and_out(tmp_path: Path) -> None:
    """A table on stdin, a table in a named pipe, an output that is a device: none is replaced by a file."""
    table = (MNK_INPUTS / "example.csv").read_text()
    command = [sys.executable, str(SCRIPT), FAST, "--mnk=/dev/stdin", "--output_file=/dev/null"]
    done = subprocess.run(command, input=table, cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert (tmp_path / "outputs/DATA/stdin/stdin_fwd_pass.csv").is_file()
    os.mkfifo(tmp_path / "pipe.csv")
    writer = threading.Thread(target=(tmp_path / "pipe.csv").write_text, args=(table,))
    writer.start()
    assert run(tmp_path, FAST, "--mnk=pipe.csv").status == 0
    writer.join()
    assert (tmp_path / "outputs/DATA/pipe/scalesim.cfg").is_file()
    out = run(tmp_path, FAST, "--output_file=/dev/stdout").out
    assert out.startswith((tmp_path / "workload.txt").read_text())
    assert "\nwrote /dev/stdout: 7 layers, " in out


def test_warnings_that_nobody_reads_end_nothing(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, str(SCRIPT), FAST, "--num_npus=3"]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=full, text=True)
        failed = subprocess.run(
            [*command, "--mnk=missing.csv"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=full
        )
    assert (done.returncode, failed.returncode) == (0, 1)
    assert "\nwrote " in done.stdout
    with Path("/dev/full").open("w") as full:
        helped = subprocess.run(
            [*command, "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (helped.returncode, helped.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_whoever_stops_reading_the_table_has_the_file(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        FAST,
        f"--mnk={MNK_INPUTS}/resnet50.csv",
        "--num_npus=4",
        "--minibatch=4",
    ]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "workload.txt").read_text().startswith("DATA\n54\n")


def limited(folder: Path, size: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the script where no file may grow beyond `size` bytes, as on a disk that is full in the middle of a file."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, cwd=folder, preexec_fn=limit, capture_output=True, text=True)


def test_a_disk_that_is_full_in_the_middle_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "workload.txt").write_text("mine")
    table = write_table(tmp_path / "t.csv", *(f"layer{i},64,8,8" for i in range(99)))
    config = "[architecture_presets]\nArrayHeight: 16\nArrayWidth: 8\nDataflow: os\n"
    (tmp_path / "c.cfg").write_text(config)
    done = limited(tmp_path, 5000, FAST, f"--mnk={table}", "--scalesim_config=c.cfg")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "/outputs/DATA/t/layers.csv: File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "workload.txt").read_text() == "mine"
    assert not list(tmp_path.rglob("*.part"))


def test_a_device_that_is_full(tmp_path: Path) -> None:
    result = run(tmp_path, FAST, "--output_file=/dev/full")
    assert is_one_error_line(result)
    assert result.err == "error: /dev/full: No space left on device\n"


# Permissions do not bind root, in whose name CI may run, unless it gives up the capability to override them.
BOUND = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    if os.geteuid() == 0
    else []
)


@pytest.mark.parametrize(
    "what", ["output", "output/w.txt", "run folder", "outputs/DATA/t", "cache"]
)
def test_a_folder_that_is_not_to_be_written(what: str, tmp_path: Path) -> None:
    for name in ("output", "cache", *(["outputs/DATA/t"] if what == "outputs/DATA/t" else [])):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "output" / "w.txt").write_text("mine")
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,64,8,8")
    flags = [
        f"--mnk={table}",
        f"--scalesim_path={fake}",
        "--output_file=output/w.txt",
        f"--cache_dir={tmp_path}/cache",
    ]
    closed = tmp_path if what == "run folder" else tmp_path / what
    closed.chmod(0o444 if closed.is_file() else 0o555)
    try:
        command = [*BOUND, sys.executable, str(SCRIPT), *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    finally:
        closed.chmod(0o755)
    if what == "cache":
        assert done.returncode == 0
        assert done.stderr.startswith(f"warning: can't cache in {tmp_path}/cache/")
        assert "Permission denied; going on without" in done.stderr
        return
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    where = (
        "outputs: Permission denied" if what == "run folder" else f"{what}: no permission to write"
    )
    assert done.stderr == f"error: {tmp_path}/{where}\n"
    assert list((tmp_path / "cache").iterdir()) == [], "noticed before anything was simulated"
    assert (tmp_path / "output" / "w.txt").read_text() == "mine"


@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_stream(stream: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'exec "$@" {stream}>&-',
            "bash",
            sys.executable,
            str(SCRIPT),
            FAST,
            "--num_npus=3",
        ],
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert (tmp_path / "workload.txt").read_text().startswith("DATA\n7\n")


def test_help_that_nobody_reads(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    helped = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (helped.returncode, helped.stderr) == (0, "")


def test_what_cannot_be_written_is_refused_before_anything_is_simulated(tmp_path: Path) -> None:
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / ("t" * 240 + ".csv"), "a,64,8,8")
    result = run(
        tmp_path, f"--mnk={table}", f"--scalesim_path={fake}", f"--cache_dir={tmp_path}/cache"
    )
    assert is_one_error_line(result)
    assert result.err.endswith("_weight_grad.csv: File name too long\n")
    assert not (tmp_path / "cache").exists()


def test_at_most_eight_warnings_of_sizes_that_do_not_divide(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", *(f"l{m},{m},16,16" for m in range(17, 31)))
    result = run(tmp_path, FAST, f"--mnk={table}", "--num_npus=16")
    warnings = result.err.splitlines()
    assert (result.status, len(warnings)) == (0, 9)
    assert warnings[0] == "warning: l17: m = 17 does not divide by 16, one NPU is timed with 2"
    assert warnings[-1] == "warning: 6 more sizes do not divide"


@pytest.mark.parametrize("given", ["mnk", "scalesim_config"])
def test_what_was_given_to_read_is_not_overwritten(given: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    (tmp_path / "c.cfg").write_text(tool.BUILT_IN_CONFIG)
    name = "t.csv" if given == "mnk" else "c.cfg"
    before = (tmp_path / name).read_text()
    (tmp_path / "link").symlink_to(name)
    result = run(tmp_path, FAST, f"--mnk={table}", "--scalesim_config=c.cfg", "--output_file=link")
    assert (
        result.err
        == f"error: {tmp_path}/{name} is a folder or was given to read, expected another file to write\n"
    )
    assert (tmp_path / name).read_text() == before


def test_a_link_to_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("yet/to/come.txt")
    assert run(tmp_path, FAST, "--output_file=link.txt").status == 0
    assert (tmp_path / "yet/to/come.txt").read_text().startswith("DATA\n")


def test_names_that_no_terminal_can_show(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe t.csv")
    write_table(tmp_path / name, "a,64,8,8", "b,3,8,8")
    result = run(
        tmp_path,
        FAST,
        f"--mnk={name}",
        "--output_file=" + os.fsdecode(b"\xff.txt"),
        env={"LC_ALL": "C"},
    )
    assert result.status == 0, result
    result = run(tmp_path, FAST, f"--mnk={name}x", env={"PYTHONIOENCODING": "ascii"})
    assert is_one_error_line(result)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    flags = [
        "--num_npus=48",
        "--num_packages=4",
        "--parallel=HYBRID_DATA_MODEL",
        f"--cache_dir={tmp_path}/c",
    ]
    result = run(tmp_path, *flags, "--dry_run", "--output_file=deep/w.txt")
    assert result.status == 0
    assert list(tmp_path.iterdir()) == []
    lines = result.out.splitlines()
    assert (
        lines[0].split() == "layer pass GEMM of one NPU estimated cycles collective bytes".split()
    )
    assert lines[1].split()[:4] == ["MLP_Bottom_0", "*", "forward", "256x11x512"]
    assert lines[-4] == "dry run: 7 layers, 12 distinct GEMMs, nothing written"
    total = sum(
        tool.estimated_cycles(tool.Gemm(*map(int, gemm.split("x"))), tool.read_architecture(None))
        for gemm in set(re.findall(r"\d+x\d+x\d+", result.out))
    )
    assert lines[-3] == f"0 in the cache, 12 to simulate: {total:,} estimated cycles"
    assert re.fullmatch(r"largest simulation: \d\.\d GB estimated, \d+\.\d GB free", lines[-2])
    assert re.fullmatch(r"time with --jobs=\d+: \d+ s to \d+ s estimated", lines[-1])


def test_dry_run_of_the_analytical_model(tmp_path: Path) -> None:
    result = run(tmp_path, FAST, "--dry_run")
    assert result.out.splitlines()[-1] == "dry run: 7 layers, 11 distinct GEMMs, nothing written"
    assert list(tmp_path.iterdir()) == []


def test_the_bar_is_for_terminals_only(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,16,4,4")
    flags = [f"--mnk={table}", "--num_npus=1", "--cache_dir="]
    assert run(tmp_path, *flags).err == ""
    seen = seen_on_a_terminal(tmp_path, *flags)
    assert "GEMM 1/" in seen
    assert re.search(r"00:0\d<\S+ of \d+ s to \d+ s, ", seen)
    assert ", layer a, " in seen
