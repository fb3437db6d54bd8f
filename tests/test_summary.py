"""--summary_csv, which sweeps are plotted from: a row for each run, whole, also beside others."""

from __future__ import annotations

import csv
import fcntl
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import (
    COLLECTIVES,
    FAST,
    GOOD_REPORT,
    HYBRID_OF_12,
    MNK_INPUTS,
    PLAIN,
    PLAIN_AND_CUSTOMIZED,
    SCRIPT,
    SUMMARY_HEADER,
    fake_v2,
    generate,
    is_one_error_line,
    rows_of,
    run,
    summary_of,
    sums_of_text,
    write_config,
    write_table,
)


def test_a_whole_row_by_hand(tmp_path: Path) -> None:
    """Two equal layers on an array of 256 x 256.

    The GEMMs of one NPU, 8x10x16, 8x16x10 and 16x10x8, are one fold each: 765 cycles and one for
    each row. An NPU sends 3 ALLGATHERs of 160 bytes, 3/4 of a REDUCESCATTER of 256 bytes and
    2 x 2/3 of an ALLREDUCE of 320 bytes, of each layer; the last between packages.
    """
    table = write_table(tmp_path / "t.csv", "a,24,40,16", "b,24,40,16")
    assert summary_of(tmp_path, mnk=table, run_name="r", **HYBRID_OF_12) == {
        "mnk": str(table),
        "parallel": "HYBRID_DATA_MODEL",
        "num_npus": "12",
        "num_packages": "3",
        "datatype_size": "2",
        "minibatch": "1",
        "inference": "False",
        "sharding_strategy": "NO_SHARD",
        "cycle_model": "analytical",
        "gemm_cycles": "",
        "time_unit": "cycles",
        "clock_mhz": "",
        "compute_forward": "1546",
        "compute_input_gradient": "1546",
        "compute_weight_gradient": "1562",
        "compute_all": "4654",
        "allgather_count": "2",
        "allgather_bytes": "320",
        "reducescatter_count": "2",
        "reducescatter_bytes": "512",
        "allreduce_count": "2",
        "allreduce_bytes": "640",
        "alltoall_count": "0",
        "alltoall_bytes": "0",
        "sent_bytes": str(2 * (480 + 192 + 426)),
        "sent_within_package": str(2 * (480 + 192)),
        "sent_between_packages": str(2 * 426),
        "distinct_gemms": "3",
        "output_file": f"{tmp_path}/workload.txt",
        "run_name": "r",
        "shard_rounding": "up",
        "scalesim_version": "analytical",
        "array": "256x256",
        "dataflow": "ws",
    }


@pytest.mark.parametrize(("unit", "clock"), [("cycles", None), ("us", 7.5)], ids=["cycles", "us"])
@pytest.mark.parametrize("parallel", PLAIN_AND_CUSTOMIZED)
def test_a_row_says_what_the_text_file_says(
    parallel: str, unit: str, clock: float | None, tmp_path: Path
) -> None:
    """On an array that is not square, so that no two passes take as long."""
    config = write_config(tmp_path / "c.cfg", 100, 256, "ws")
    mnk = MNK_INPUTS / "example_customized.csv"
    chosen = {"parallel": parallel, "time_unit": unit, "clock_mhz": clock}
    row = summary_of(tmp_path, mnk=mnk, scalesim_config=config, **chosen)
    said = sums_of_text(tmp_path / "workload.txt")
    assert {name: row[name] for name in said} == said
    times = {row[f"compute_{name}"] for name in ("forward", "input_gradient", "weight_gradient")}
    assert len(times) == 3
    assert row["parallel"] == parallel
    assert (row["time_unit"], row["clock_mhz"]) == (unit, "" if clock is None else "7.5")
    assert row["array"] == "100x256"


@pytest.mark.parametrize(
    ("parallel", "collectives"),
    [
        pytest.param("DATA", ["0", "0", "7", "0"], id="DATA"),
        pytest.param("MODEL", ["7", "7", "0", "0"], id="MODEL"),
        pytest.param("HYBRID_DATA_MODEL", ["7", "7", "7", "0"], id="HYBRID_DATA_MODEL"),
        pytest.param("HYBRID_MODEL_DATA", ["7", "7", "7", "0"], id="HYBRID_MODEL_DATA"),
    ],
)
def test_how_many_of_each_collective(parallel: str, collectives: list[str], tmp_path: Path) -> None:
    row = summary_of(tmp_path, parallel=parallel)
    assert [row[f"{kind.lower()}_count"] for kind in COLLECTIVES] == collectives


@pytest.mark.parametrize(
    ("table", "minibatch"),
    [
        pytest.param("example", 1, id="GEMMs of all samples"),
        pytest.param("example", 3, id="GEMMs of one of 3 samples"),
        pytest.param("resnet50", 32, id="convolutions, 32 images"),
        pytest.param("resnet50", 1, id="convolutions, 1 image"),
    ],
)
def test_the_minibatch(table: str, minibatch: int, tmp_path: Path) -> None:
    row = summary_of(tmp_path, mnk=MNK_INPUTS / f"{table}.csv", num_npus=4, minibatch=minibatch)
    assert row["minibatch"] == str(minibatch)


@pytest.mark.parametrize("minibatch", [1, 2], ids=["1 image", "2 images"])
def test_the_minibatch_of_convolutions_of_1_x_1(minibatch: int, tmp_path: Path) -> None:
    """Their ifmaps have as many elements as their GEMMs, m x k."""
    header = "Layer,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Num Filter,Strides"
    table = write_table(tmp_path / "t.csv", "a,8,8,1,1,16,16,1", "b,8,8,1,1,16,16,1", header=header)
    row = summary_of(tmp_path, mnk=table, num_npus=4, minibatch=minibatch)
    assert row["minibatch"] == str(minibatch)


def test_flags_come_back_as_they_were_given(tmp_path: Path) -> None:
    flags = ["--parallel=model", "--num_npu=4", "--datatype_size=4", "--shard_rounding=down"]
    flags += ["--time_unit=ns", "--clock_mhz=700", "--run_name=a/b", "--output_file=w.txt"]
    assert run(tmp_path, FAST, *flags, "--summary_csv=new/s.csv").status == 0
    (row,) = rows_of(tmp_path / "new" / "s.csv", SUMMARY_HEADER)
    expected = {
        "mnk": f"{MNK_INPUTS}/example.csv",
        "parallel": "MODEL",
        "num_npus": "4",
        "num_packages": "1",
        "datatype_size": "4",
        "minibatch": "1",
        "cycle_model": "analytical",
        "time_unit": "ns",
        "clock_mhz": "700.0",
        "output_file": f"{tmp_path}/w.txt",
        "run_name": "a/b",
        "shard_rounding": "down",
    }
    assert {name: row[name] for name in expected} == expected


def test_rows_are_appended(tmp_path: Path) -> None:
    summary, texts = tmp_path / "s.csv", [""]
    for npus in (4, 8, 16):
        generate(tmp_path, num_npus=npus, summary_csv=summary)
        texts.append(summary.read_text())
        assert texts[-1].startswith(texts[-2])
    assert [row["num_npus"] for row in rows_of(summary, SUMMARY_HEADER)] == ["4", "8", "16"]


def test_an_empty_file_gets_a_header(tmp_path: Path) -> None:
    (tmp_path / "s.csv").touch()
    assert summary_of(tmp_path)["num_npus"] == "16"


def test_a_torn_last_line_is_ended_first(tmp_path: Path) -> None:
    assert run(tmp_path, FAST, "--summary_csv=s.csv").status == 0
    whole = (tmp_path / "s.csv").read_text()
    (tmp_path / "s.csv").write_text(whole[:-9])
    assert run(tmp_path, FAST, "--summary_csv=s.csv").status == 0
    assert (tmp_path / "s.csv").read_text() == whole[:-9] + "\n" + whole.splitlines()[1] + "\n"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param('a,"b', id="comma and quote"),
        pytest.param("two\nlines", id="two lines"),
        pytest.param(os.fsdecode(b"\xff\xfe"), id="no UTF-8"),
    ],
)
def test_paths_of_any_name(name: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / f"{name}.csv", "a,64,64,64")
    output = tmp_path / name / "w.txt"
    for _ in range(2):
        generate(tmp_path, mnk=table, output_file=output, summary_csv=tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mnk"], row["output_file"]) for row in rows] == [(str(table), str(output))] * 2


FIFTY_RUNS = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import helpers
for number in range(1, 51):
    if not os.fork():
        folder = Path(sys.argv[1], str(number))
        helpers.generate(folder, num_npus=2 * number, summary_csv=folder.parent / "s.csv")
        os._exit(0)
for _ in range(50):
    assert os.wait()[1] == 0
"""


def test_fifty_runs_at_once(tmp_path: Path) -> None:
    """All come to a file that is still empty while another run, which is this test, has its lock.

    A run has written the files of its run folder before it waits for the lock.
    """
    summary, tests = tmp_path / "s.csv", Path(__file__).parent
    with summary.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, "-c", FIFTY_RUNS, str(tmp_path), str(SCRIPT.parent), str(tests)]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while (
            running.poll() is None
            and len(list(tmp_path.glob("*/outputs/DATA/run/layers.csv"))) < 50
        ):
            time.sleep(0.02)
        time.sleep(0.2)
        assert summary.read_text() == ""
        assert running.poll() is None
    assert running.wait() == 0
    rows = rows_of(summary, SUMMARY_HEADER)
    assert sorted(int(row["num_npus"]) for row in rows) == list(range(2, 101, 2))
    for row in rows:
        said = sums_of_text(Path(row["output_file"]))
        assert {name: row[name] for name in said} == said


def test_a_sweep_of_sixteen_runs_four_at_a_time(tmp_path: Path) -> None:
    sweep = [(parallel, npus) for npus in (4, 8, 16, 32) for parallel in PLAIN]

    def one(parallel: str, npus: int) -> int:
        flags = [f"--parallel={parallel}", f"--num_npus={npus}", "--num_packages=2"]
        flags += [f"--run_name={npus}", f"--output_file={parallel}.{npus}.txt"]
        return run(tmp_path, FAST, *flags, "--summary_csv=s.csv").status

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(one, *zip(*sweep))) == {0}
    rows = rows_of(tmp_path / "s.csv", SUMMARY_HEADER)
    assert sorted((row["parallel"], int(row["num_npus"])) for row in rows) == sorted(sweep)
    for row in rows:
        said = sums_of_text(tmp_path / f"{row['parallel']}.{row['num_npus']}.txt")
        assert {name: row[name] for name in said} == said


OLDER = [name for name in SUMMARY_HEADER if name != "minibatch"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\nx\n", id="blank line"),
        pytest.param("Layer,m,n,k\na,1,1,1\n", id="table of layers"),
        pytest.param(",".join(OLDER) + "\n", id="a column less"),
        pytest.param("\0\xff", id="binary"),
    ],
)
def test_another_header_is_refused_before_anything_is_simulated(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_bytes(text.encode("latin-1"))
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    cache = tmp_path / "cache"
    cache.mkdir()
    flags = [f"--mnk={table}", f"--scalesim_path={fake}", f"--cache_dir={cache}", "--num_npus=1"]
    result = run(tmp_path, *flags, "--summary_csv=s.csv")
    assert is_one_error_line(result), result
    assert result.err.startswith(f"error: {tmp_path}/s.csv:1: header ")
    assert (tmp_path / "s.csv").read_bytes() == text.encode("latin-1")
    assert list(cache.iterdir()) == []
    assert not (tmp_path / "workload.txt").exists()


@pytest.mark.parametrize("what", ["pipe", "/dev/null", "/dev/full"])
def test_a_summary_that_cannot_be_appended_to_is_refused(what: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = run(tmp_path, FAST, f"--summary_csv={what}")
    assert is_one_error_line(result), result
    assert f"{what}: expected a regular file as --summary_csv" in result.err
    assert not (tmp_path / "workload.txt").exists()


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        pytest.param(["--scalesim_path=fake"], 1, id="SCALE-Sim fails"),
        pytest.param([FAST, "--dry_run"], 0, id="dry run"),
    ],
)
def test_a_run_without_results_leaves_no_row(flags: list[str], status: int, tmp_path: Path) -> None:
    fake_v2(tmp_path / "fake", "sys.exit(3)")
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    summary_of(tmp_path)
    before = (tmp_path / "s.csv").read_text()
    result = run(tmp_path, f"--mnk={table}", "--num_npus=1", "--summary_csv=s.csv", *flags)
    assert result.status == status
    assert (tmp_path / "s.csv").read_text() == before


def test_a_dry_run_makes_no_summary(tmp_path: Path) -> None:
    assert run(tmp_path, FAST, "--dry_run", "--summary_csv=s.csv").status == 0
    assert list(tmp_path.iterdir()) == []


# --- Collectives of one member: in the text file, shown as such, not counted, and warned of


ACTIVATIONS, WEIGHTS = {"ALLGATHER", "REDUCESCATTER"}, {"ALLREDUCE"}


EVERY = ACTIVATIONS | WEIGHTS


@pytest.mark.parametrize(
    ("parallel", "npus", "packages", "alone"),
    [
        pytest.param("HYBRID_DATA_MODEL", 8, 1, WEIGHTS, id="HYBRID_DATA_MODEL, 1 package"),
        pytest.param("HYBRID_DATA_MODEL", 8, 8, ACTIVATIONS, id="HYBRID_DATA_MODEL, 8 packages"),
        pytest.param("HYBRID_MODEL_DATA", 8, 1, ACTIVATIONS, id="HYBRID_MODEL_DATA, 1 package"),
        pytest.param("HYBRID_MODEL_DATA", 8, 8, WEIGHTS, id="HYBRID_MODEL_DATA, 8 packages"),
        pytest.param("HYBRID_DATA_MODEL", 1, 1, EVERY, id="HYBRID_DATA_MODEL, 1 NPU"),
        pytest.param("HYBRID_MODEL_DATA", 1, 1, EVERY, id="HYBRID_MODEL_DATA, 1 NPU"),
    ],
)
def test_collectives_of_one_member_are_shown_and_not_counted(
    parallel: str,
    npus: int,
    packages: int,
    alone: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = summary_of(tmp_path, parallel=parallel, num_npus=npus, num_packages=packages)
    out, err = capsys.readouterr()
    assert set(re.findall(r"  ([A-Z]+) of 1 ", out)) == alone
    assert set(re.findall(r"^7 × ([A-Z]+) ", out, re.MULTILINE)) == EVERY - alone
    assert {name for name in EVERY if row[f"{name.lower()}_count"] == "7"} == EVERY - alone
    assert {name for name in EVERY if row[f"{name.lower()}_bytes"] != "0"} == EVERY - alone
    if npus == 1:
        assert err == "", "who has one NPU has no other over which a collective could run"
    else:
        assert re.fullmatch(f"warning: {7 * len(alone)} collectives of one member: .*\n", err)
    said = sums_of_text(tmp_path / "workload.txt")
    counts = [said[f"{name.lower()}_count"] for name in EVERY]
    assert counts == ["7"] * 3, "the text file has them all the same"


@pytest.mark.parametrize(
    ("npus", "packages"),
    [
        pytest.param(8, 1, id="8 NPUs in 1"),
        pytest.param(8, 2, id="8 NPUs in 2"),
        pytest.param(8, 8, id="8 NPUs in 8"),
        pytest.param(1, 1, id="1 NPU"),
    ],
)
@pytest.mark.parametrize("parallel", ["DATA", "MODEL"])
def test_no_warning_of_one_member_where_all_npus_take_part(
    parallel: str, npus: int, packages: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tmp_path, parallel=parallel, num_npus=npus, num_packages=packages)
    out, err = capsys.readouterr()
    assert err == ""
    assert (" of 1 " in out) == (npus == 1)
