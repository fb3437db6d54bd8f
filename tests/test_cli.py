"""The command line: flags, outputs, the look before the run, statuses, and mishaps around files."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    BOUND,
    FAST,
    GOOD_REPORT,
    MNK_INPUTS,
    SCRIPT,
    accelerator_of,
    fake_v2,
    is_flag_error,
    is_one_error_line,
    limited,
    read_like_astrasim,
    run,
    seen_on_a_terminal,
    write_table,
)
from processes import closed_pipe, command_line, in_bash


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
            "flags num_npus=16, num_packages=3: expected NPUs to be divisible by packages",
        ),
        (["--num_npus=0"], "flag --num_npus=0: 0 is not an integer in the range [1, 2147483647]"),
        (["--num_npu=-4"], "-4 is not an integer in the range [1, 2147483647]"),
        (["--num_npus=" + "9" * 30], "is not an integer in the range [1, 2147483647]"),
        (["--update_time=" + "9" * 30], "is not an integer in the range [0, 2147483647]"),
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
        (["--output_file=."], "flag --output_file=.: expected a file, not a folder"),
        (["--output_file=a/"], "flag --output_file=a/: expected a file, not a folder"),
        (["--summary_csv=.."], "flag --summary_csv=..: expected a file, not a folder"),
        (
            ["--chakra_et=/", "--time_unit=us", "--clock_mhz=1"],
            "flag --chakra_et=/: expected a prefix of file names",
        ),
        (
            ["--chakra_et=a/", "--time_unit=us", "--clock_mhz=1"],
            "flag --chakra_et=a/: expected a prefix of file names",
        ),
        (
            ["--chakra_et=..", "--time_unit=us", "--clock_mhz=1"],
            "flag --chakra_et=..: expected a prefix of file names",
        ),
    ],
)
def test_a_bad_flag_is_told_by_absl_with_status_1(
    flags: list[str], message: str, tmp_path: Path
) -> None:
    result = run(tmp_path, FAST, *flags)
    assert is_flag_error(result), result
    assert message in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--flagfile=nul"], "error: path 'a\\x00b', expected no NUL character"),
        (["example.csv"], "unexpected argument 'example.csv', expected --name=value"),
        (["--mnk=~nobody_here/t.csv"], "/~nobody_here/t.csv: No such file or directory"),
        (["--mnk=missing.csv"], "/missing.csv: No such file or directory"),
        (["--mnk=."], ": Is a directory"),
        (["--scalesim_config=missing.cfg"], "/missing.cfg: No such file or directory"),
        (
            ["--summary_csv=s.txt", "--output_file=s.txt"],
            "/s.txt is --output_file and --summary_csv, expected another file for each",
        ),
        (
            ["--chakra_et=et/x", "--output_file=et/x.2.et", "--time_unit=us", "--clock_mhz=1"],
            "/et/x.2.et is --output_file and a trace, expected another file for each",
        ),
        (
            ["--output_file=outputs/DATA/example/layers.csv"],
            "/layers.csv is --output_file and a file of the run folder, expected another file",
        ),
        (["--output_file=there"], "/there is a folder, expected a file to write"),
        (["--output_file=outputs/DATA"], "/outputs/DATA is a folder, expected a file to write"),
        (
            ["--output_file=workload.txt/x"],
            "/workload.txt is a file, expected a folder",
        ),
        (["--output_file=" + "x" * 300], ": File name too long"),
        ([f"--flagfile={sys.executable}"], "codec can't decode"),
    ],
)
def test_bad_input_is_one_line_and_status_1(flags: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "workload.txt").write_text("mine")
    (tmp_path / "nul").write_bytes(b"--mnk=a\0b\n")
    (tmp_path / "there").mkdir()
    result = run(tmp_path, FAST, *flags)
    assert is_one_error_line(result), result
    assert message in result.err
    assert (tmp_path / "workload.txt").read_text() == "mine"
    assert not list(tmp_path.rglob("*.part"))


def test_help_lists_every_flag_on_stdout(tmp_path: Path) -> None:
    result = run(tmp_path, "--help")
    assert result.err == ""
    assert result.out.startswith("Turn a table of layers")
    listed = re.findall(r"^  --(?:\[no\])?(\w+):", result.out, re.MULTILINE)
    assert set(listed) == {*tool.Settings._fields, "num_npu"}


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--num_passes=2"], "--num_passes has no effect without --chakra_et"),
        (["--jobs=2"], "--jobs has no effect with --cycle_model=analytical"),
    ],
)
def test_a_flag_without_effect_is_warned_of(flags: list[str], warning: str, tmp_path: Path) -> None:
    result = run(tmp_path, FAST, *flags)
    assert (result.status, result.err) == (0, f"warning: {warning}\n")


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    command = in_bash('rmdir "$PWD" && exec "$@"', FAST)
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the current folder has been deleted\n"


def test_a_python_without_the_packages() -> None:
    def without_packages(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True)

    itself = without_packages("-c", "import sys; print(sys.executable)").stdout.strip()
    done = without_packages(str(SCRIPT), "--help")
    expected = f"error: no absl in {itself}: pip install -r requirements.txt\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_flags_may_be_lower_case_and_the_alias_works(tmp_path: Path) -> None:
    assert run(tmp_path, FAST, "--parallel=model", "--num_npu=4").status == 0
    assert (tmp_path / "workload.txt").read_text().startswith("MODEL\n")
    topology = tmp_path / "outputs/MODEL/example/example_fwd_pass.csv"
    first = topology.read_text().splitlines()[1]
    assert first.split(",")[6] == "32", "a quarter of the columns"


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    assert run(tmp_path, FAST, "--output_file=link.txt").status == 0
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text().startswith("DATA\n7\n")


def test_the_output_keeps_its_mode_and_a_new_one_has_the_umasks(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "shared.txt").touch()
    (tmp_path / "shared.txt").chmod(0o664)
    assert run(tmp_path, FAST, "--output_file=new.txt").status == 0
    assert run(tmp_path, FAST, "--output_file=shared.txt").status == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.txt")}
    umask = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert modes == {"new.txt": umask, "shared.txt": 0o664}


EXAMPLE_TEXT = (MNK_INPUTS / "example.csv").read_text()


def test_a_table_on_stdin(tmp_path: Path) -> None:
    command = command_line(FAST, "--mnk=/dev/stdin")
    done = subprocess.run(command, input=EXAMPLE_TEXT, cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "outputs/DATA/stdin/stdin_fwd_pass.csv").is_file()


def test_a_table_in_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    writer = threading.Thread(target=(tmp_path / "pipe.csv").write_text, args=(EXAMPLE_TEXT,))
    writer.start()
    assert run(tmp_path, FAST, "--mnk=pipe.csv").status == 0
    writer.join()
    assert (tmp_path / "outputs/DATA/pipe/scalesim.cfg").is_file()


def test_an_output_that_is_a_device_is_not_replaced(tmp_path: Path) -> None:
    result = run(tmp_path, FAST, "--output_file=/dev/null")
    assert (result.status, result.err) == (0, "")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_the_output_on_stdout(tmp_path: Path) -> None:
    assert run(tmp_path, FAST).status == 0
    out = run(tmp_path, FAST, "--output_file=/dev/stdout").out
    assert out.startswith((tmp_path / "workload.txt").read_text())
    assert "\nwrote /dev/stdout: 7 layers, " in out


@pytest.mark.parametrize(
    ("flags", "status"), [(["--num_npus=3"], 0), (["--num_npus=3", "--mnk=missing.csv"], 1)]
)
def test_messages_that_nobody_reads_end_nothing(
    flags: list[str], status: int, tmp_path: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        command = command_line(FAST, *flags)
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == status
    assert ("\nwrote " in done.stdout) == (status == 0)


def test_whoever_stops_reading_the_table_has_the_file(tmp_path: Path) -> None:
    flags = [FAST, f"--mnk={MNK_INPUTS}/resnet50.csv", "--num_npus=4", "--minibatch=4"]
    with closed_pipe() as writer:
        done = subprocess.run(
            command_line(*flags), cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "workload.txt").read_text().startswith("DATA\n54\n")


def test_a_disk_that_is_full_in_the_middle_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "workload.txt").write_text("mine")
    table = write_table(tmp_path / "t.csv", *(f"layer{i},64,8,8" for i in range(99)))
    config = "[architecture_presets]\nArrayHeight: 16\nArrayWidth: 8\nDataflow: os\n"
    (tmp_path / "c.cfg").write_text(config)
    result = limited(tmp_path, 5000, FAST, f"--mnk={table}", "--scalesim_config=c.cfg")
    assert is_one_error_line(result), result
    assert "/outputs/DATA/t/layers.csv: File too large" in result.err
    assert (tmp_path / "workload.txt").read_text() == "mine"
    assert not list(tmp_path.rglob("*.part"))


def test_a_device_that_is_full(tmp_path: Path) -> None:
    result = run(tmp_path, FAST, "--output_file=/dev/full")
    assert is_one_error_line(result)
    assert result.err == "error: /dev/full: No space left on device\n"


def run_in_a_closed_place(folder: Path, closed: Path) -> subprocess.CompletedProcess[str]:
    """Run the script with a stand-in where `closed`, a file or folder, is not to be written."""
    fake = fake_v2(folder / "fake", GOOD_REPORT)
    table = write_table(folder / "t.csv", "a,64,8,8")
    flags = [f"--mnk={table}", f"--scalesim_path={fake}", "--output_file=output/w.txt"]
    closed.chmod(0o444 if closed.is_file() else 0o555)
    try:
        command = [*BOUND, *command_line(*flags, f"--cache_dir={folder}/cache")]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)
    finally:
        closed.chmod(0o755)


@pytest.mark.parametrize("what", ["output", "output/w.txt", "run folder", "outputs/DATA/t"])
def test_a_folder_that_is_not_to_be_written_is_noticed_before_the_run(
    what: str, tmp_path: Path
) -> None:
    for name in ("output", "cache", *(["outputs/DATA/t"] if what == "outputs/DATA/t" else [])):
        (tmp_path / name).mkdir(parents=True)
    if what != "output":  # in a closed folder a file that is there is written in place
        (tmp_path / "output" / "w.txt").write_text("mine")
    closed = tmp_path if what == "run folder" else tmp_path / what
    done = run_in_a_closed_place(tmp_path, closed)
    assert (done.returncode, done.stdout) == (1, "")
    where = f"{what}: no permission to write"
    if what == "run folder":
        where = "outputs: Permission denied"
    assert done.stderr == f"error: {tmp_path}/{where}\n"
    assert list((tmp_path / "cache").iterdir()) == []
    if what == "output":
        assert list((tmp_path / "output").iterdir()) == []
    else:
        assert (tmp_path / "output" / "w.txt").read_text() == "mine"


def test_a_file_in_a_folder_that_is_not_to_be_written_is_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "w.txt").write_text("mine")
    before = (tmp_path / "output" / "w.txt").stat().st_ino
    done = run_in_a_closed_place(tmp_path, tmp_path / "output")
    assert done.returncode == 0, done.stderr
    assert [each.name for each in (tmp_path / "output").iterdir()] == ["w.txt"]
    assert (tmp_path / "output" / "w.txt").stat().st_ino == before
    assert (tmp_path / "output" / "w.txt").read_text().startswith("DATA\n1\na\t")


def test_a_cache_that_is_not_to_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    done = run_in_a_closed_place(tmp_path, tmp_path / "cache")
    assert done.returncode == 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: can't cache in {tmp_path}/cache/")
    assert warnings[0].endswith("Permission denied; going on without")


@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_stream(stream: int, tmp_path: Path) -> None:
    command = in_bash(f'exec "$@" {stream}>&-', FAST, "--num_npus=3")
    done = subprocess.run(command, cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "workload.txt").read_text().startswith("DATA\n7\n")


@pytest.mark.parametrize(
    ("stem", "flags", "message"),
    [
        ("t" * 240, [], "_weight_grad.csv: File name too long"),
        ("t", ["--output_file=outputs/DATA"], "/outputs/DATA is a folder, expected a file"),
        (
            "t",
            ["--summary_csv=outputs/DATA/t/layers.csv/s.csv"],
            "/outputs/DATA/t/layers.csv is a folder, expected a file",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_simulated(
    stem: str, flags: list[str], message: str, tmp_path: Path
) -> None:
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / f"{stem}.csv", "a,64,8,8")
    flags = [*flags, f"--mnk={table}", f"--scalesim_path={fake}", f"--cache_dir={tmp_path}/cache"]
    result = run(tmp_path, *flags)
    assert is_one_error_line(result), result
    assert message in result.err
    assert not (tmp_path / "cache").exists()


def test_at_most_eight_warnings_of_sizes_that_are_not_divisible(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", *(f"l{m},{m},16,16" for m in range(17, 31)))
    result = run(tmp_path, FAST, f"--mnk={table}", "--num_npus=16")
    warnings = result.err.splitlines()
    assert (result.status, len(warnings)) == (0, 9)
    assert warnings[0] == "warning: l17: m = 17 is not divisible by 16, one NPU is timed with 2"
    assert warnings[-1] == "warning: 6 more sizes are not divisible"


@pytest.mark.parametrize(("given", "name"), [("mnk", "t.csv"), ("scalesim_config", "c.cfg")])
def test_what_was_given_to_read_is_not_overwritten(given: str, name: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    (tmp_path / "c.cfg").write_text(tool.BUILT_IN_CONFIG)
    before = (tmp_path / name).read_text()
    (tmp_path / "link").symlink_to(name)
    flags = [f"--mnk={table}", "--scalesim_config=c.cfg", "--output_file=link"]
    result = run(tmp_path, FAST, *flags)
    uses = f"--{given} and --output_file"
    assert result.err == f"error: {tmp_path}/link is {uses}, expected another file for each\n"
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


DRY_RUN = ["--num_npus=48", "--num_packages=4", "--parallel=HYBRID_DATA_MODEL", "--dry_run"]


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, *DRY_RUN, f"--cache_dir={tmp_path}/c", "--output_file=deep/w.txt")
    assert (result.status, list(tmp_path.iterdir())) == (0, [])


def test_dry_run_shows_the_plan_and_its_cost(tmp_path: Path) -> None:
    lines = run(tmp_path, *DRY_RUN).out.splitlines()
    header = "layer and pass GEMM of one NPU cycles collective bytes"
    assert lines[2].split() == header.split()
    assert lines[3] == "MLP_Bottom_0 *"
    assert lines[4].split()[:2] == ["forward", "256x11x512"]
    done = "7 layers, 12 distinct GEMMs, nothing written"
    assert lines[-4] == f"dry run with estimated cycles: {done}"
    gemms = set(re.findall(r"(\d+)x(\d+)x(\d+)", "\n".join(lines[3:])))
    assert len(gemms) == 12
    built_in = accelerator_of()
    total = sum(
        built_in.stall_free_cycles(tool.Gemm(m=int(m), n=int(n), k=int(k))) for m, n, k in gemms
    )
    assert lines[-3] == f"0 in the cache, 12 to simulate: {total:,} estimated cycles"
    assert re.fullmatch(r"largest simulation: \d\.\d GB estimated, \d+\.\d GB free", lines[-2])
    assert re.fullmatch(r"time with --jobs=\d+: \d+ s to \d+ s estimated", lines[-1])


def test_dry_run_of_the_analytical_model(tmp_path: Path) -> None:
    last = run(tmp_path, FAST, "--dry_run").out.splitlines()[-1]
    done = "7 layers, 11 distinct GEMMs, nothing written"
    assert last == f"dry run with analytical cycles: {done}"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def two_gemms(tmp_path: Path) -> list[str]:
    """Return the flags for two GEMMs, of which one takes so long that the bar shows it."""
    body = f"time.sleep(1.5 if ',16,4,' in open('gemm.csv').read() else 0)\n{GOOD_REPORT}"
    table = write_table(tmp_path / "t.csv", "a,16,4,4")
    fake = fake_v2(tmp_path / "fake", body)
    return [f"--mnk={table}", f"--scalesim_path={fake}", "--num_npus=1", "--cache_dir="]


def test_a_terminal_has_a_bar_that_says_what_runs(tmp_path: Path, two_gemms: list[str]) -> None:
    seen = seen_on_a_terminal(tmp_path, *two_gemms, "--jobs=2")
    assert re.search(r"\r0 of 2 GEMMs, 0 running \|.*\| 00:00 of \d+ s to \d+ s", seen)
    assert re.search(r"\r1 of 2 GEMMs, 1 running \|.*\| 00:0[1-9] of \d+ s to \d+ s", seen)


def test_without_a_terminal_there_is_one_line_in_place_of_the_bar(
    tmp_path: Path, two_gemms: list[str]
) -> None:
    said = run(tmp_path, *two_gemms).err
    expected = r"simulating: 2 GEMMs, \d+ s to \d+ s, up to \d\.\d GB of memory each\n"
    assert re.fullmatch(expected, said)


def test_without_a_terminal_a_line_each_minute_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([1000, 1059, 1061, 1120, 1180])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    tasks = [
        tool.Task(
            gemm=tool.Gemm(m=size, n=1, k=1), first_use="", cycles=9, memory=10**9, seconds=900
        )
        for size in (1, 2, 3)
    ]
    progress = tool.Progress(tasks, "10 min to 20 min")
    for finished, running in ((0, 2), (1, 2), (0, 2), (1, 1)):
        progress.show(tasks[:running], tasks[:finished])
    assert capsys.readouterr().err.splitlines() == [
        "simulating: 3 GEMMs, 10 min to 20 min, up to 1.0 GB of memory each",
        "simulating: 1 of 3 GEMMs, 2 running after 61 s",
        "simulating: 2 of 3 GEMMs, 1 running after 3 min",
    ]
