"""What a sweep is plotted from, --summary_csv and layers.csv; collectives of one member; how long a run will take."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    GOOD_REPORT,
    MNK_INPUTS,
    PLAIN,
    SCRIPT,
    fake_v2,
    is_one_error_line,
    read_like_astrasim,
    run,
    seen_on_a_terminal,
    settings,
    write_table,
)

FAST = "--cycle_model=analytical"
HYBRID_OF_12 = {"parallel": "HYBRID_DATA_MODEL", "num_npus": 12, "num_packages": 3}
SUMMARY_HEADER = (
    "mnk,parallel,num_npus,num_packages,datatype_size,minibatch,cycle_model,time_unit,clock_mhz,"
    "compute_forward,compute_input_gradient,compute_weight_gradient,compute_all,"
    "allgather_count,allgather_bytes,reducescatter_count,reducescatter_bytes,allreduce_count,allreduce_bytes,"
    "distinct_gemms,output_file"
)
LAYERS_HEADER = "layer,strategy,dp,mp,pass,M,N,K,cycles,collective,bytes,members"


def rows_of(path: Path, header: str = SUMMARY_HEADER) -> list[dict[str, str]]:
    """Read a table that must be one header and whole rows, to the last newline."""
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    found, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert ",".join(found) == header
    assert text.endswith("\n")
    assert all(len(row) == len(found) for row in rows)
    return [dict(zip(found, row)) for row in rows]


def sums_of_text(path: Path) -> dict[str, str]:
    """Return the summary's columns that a text file for ASTRA-sim can say, summed from it."""
    _, layers = read_like_astrasim(path.read_text())
    forward, input_gradient, weight_gradient = (
        sum(layer.passes[index][0] for layer in layers) for index in range(3)
    )
    sums = {
        "compute_forward": forward,
        "compute_input_gradient": input_gradient,
        "compute_weight_gradient": weight_gradient,
        "compute_all": forward + input_gradient + weight_gradient,
    }
    for name in ("ALLGATHER", "REDUCESCATTER", "ALLREDUCE"):
        sizes = [
            size for layer in layers for _, collective, size in layer.passes if collective == name
        ]
        sums |= {f"{name.lower()}_count": len(sizes), f"{name.lower()}_bytes": sum(sizes)}
    return {name: str(value) for name, value in sums.items()}


def summary_of(folder: Path, **changes: Any) -> dict[str, str]:
    """Return the row that these settings give in a new file."""
    tool.generate(settings(folder, summary_csv=folder / "s.csv", **changes))
    (row,) = rows_of(folder / "s.csv")
    return row


# --- --summary_csv


def test_a_whole_row_by_hand(tmp_path: Path) -> None:
    """Two equal layers, of one NPU 8x10x16, 8x16x10 and 16x10x8, each one fold: 765 cycles and one for each row."""
    table = write_table(tmp_path / "t.csv", "a,24,40,16", "b,24,40,16")
    row = summary_of(tmp_path, mnk=table, **HYBRID_OF_12)
    assert list(row.values()) == [
        *(str(table), "HYBRID_DATA_MODEL", "12", "3", "2", "", "analytical", "cycles", ""),
        *("1546", "1546", "1562", "4654"),
        *("2", "320", "2", "512", "2", "640"),
        *("3", f"{tmp_path}/workload.txt"),
    ]


@pytest.mark.parametrize(("unit", "clock"), [("cycles", None), ("us", 7.5)])
@pytest.mark.parametrize("parallel", tool.PARALLEL)
def test_a_row_says_what_the_text_file_says(
    parallel: str, unit: str, clock: float | None, tmp_path: Path
) -> None:
    """On an array that is not square, so that no two passes take as long."""
    config = tmp_path / "c.cfg"
    config.write_text(tool.BUILT_IN_CONFIG.replace("ArrayHeight: 256", "ArrayHeight: 100"))
    chosen = {
        "parallel": parallel,
        "time_unit": unit,
        "clock_mhz": clock,
        "scalesim_config": config,
    }
    row = summary_of(tmp_path, mnk=MNK_INPUTS / "example_customized.csv", **chosen)
    said = sums_of_text(tmp_path / "workload.txt")
    assert {name: row[name] for name in said} == said
    assert (
        len({row[f"compute_{name}"] for name in ("forward", "input_gradient", "weight_gradient")})
        == 3
    )
    assert (row["parallel"], row["time_unit"], row["clock_mhz"]) == (
        parallel,
        unit,
        "" if clock is None else "7.5",
    )


@pytest.mark.parametrize(
    ("parallel", "collectives"),
    [
        ("DATA", ["0", "0", "7"]),
        ("MODEL", ["7", "7", "0"]),
        ("HYBRID_DATA_MODEL", ["7", "7", "7"]),
        ("HYBRID_MODEL_DATA", ["7", "7", "7"]),
    ],
)
def test_how_many_of_each_collective(parallel: str, collectives: list[str], tmp_path: Path) -> None:
    row = summary_of(tmp_path, parallel=parallel)
    assert [
        row[f"{name}_count"] for name in ("allgather", "reducescatter", "allreduce")
    ] == collectives


@pytest.mark.parametrize(
    ("table", "minibatch", "column"),
    [("example", 1, ""), ("resnet50", 32, "32"), ("resnet50", 1, "1")],
)
def test_the_minibatch_of_convolutions_only(
    table: str, minibatch: int, column: str, tmp_path: Path
) -> None:
    row = summary_of(tmp_path, mnk=MNK_INPUTS / f"{table}.csv", num_npus=4, minibatch=minibatch)
    assert row["minibatch"] == column


def test_flags_come_back_as_they_were_given(tmp_path: Path) -> None:
    flags = [
        FAST,
        "--parallel=model",
        "--num_npu=4",
        "--datatype_size=4",
        "--time_unit=ns",
        "--clock_mhz=700",
    ]
    assert run(tmp_path, *flags, "--summary_csv=new/s.csv", "--output_file=w.txt").status == 0
    (row,) = rows_of(tmp_path / "new" / "s.csv")
    assert list(row.values())[1:9] == ["MODEL", "4", "1", "4", "", "analytical", "ns", "700.0"]
    assert (row["mnk"], row["output_file"]) == (f"{MNK_INPUTS}/example.csv", f"{tmp_path}/w.txt")


def test_rows_are_appended(tmp_path: Path) -> None:
    summary, texts = tmp_path / "s.csv", [""]
    for npus in (4, 8, 16):
        tool.generate(settings(tmp_path, num_npus=npus, summary_csv=summary))
        texts.append(summary.read_text())
        assert texts[-1].startswith(texts[-2])
    assert [row["num_npus"] for row in rows_of(summary)] == ["4", "8", "16"]


def test_an_empty_file_gets_a_header(tmp_path: Path) -> None:
    (tmp_path / "s.csv").touch()
    assert summary_of(tmp_path)["num_npus"] == "16"


@pytest.mark.parametrize("name", ['a,"b', "two\nlines", os.fsdecode(b"\xff\xfe")])
def test_paths_of_any_name(name: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / f"{name}.csv", "a,64,64,64")
    output = tmp_path / name / "w.txt"
    for _ in range(2):
        tool.generate(
            settings(tmp_path, mnk=table, output_file=output, summary_csv=tmp_path / "s.csv")
        )
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mnk"], row["output_file"]) for row in rows] == [(str(table), str(output))] * 2


FIFTY_RUNS = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from helpers import settings, tool
for number in range(1, 51):
    if not os.fork():
        folder = Path(sys.argv[1], str(number))
        tool.generate(settings(folder, num_npus=2 * number, summary_csv=folder.parent / "s.csv"))
        os._exit(0)
for _ in range(50):
    assert os.wait()[1] == 0
"""


def test_fifty_runs_at_once(tmp_path: Path) -> None:
    """All of them come to a file that is still empty while another run, which is this test, has its lock."""
    summary = tmp_path / "s.csv"
    with summary.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [
            sys.executable,
            "-c",
            FIFTY_RUNS,
            str(tmp_path),
            str(SCRIPT.parent),
            str(SCRIPT.parent / "tests"),
        ]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None and len(list(tmp_path.glob("*/workload.txt"))) < 50:
            time.sleep(0.02)
        time.sleep(0.2)
        assert summary.read_text() == ""
    assert running.wait() == 0
    rows = rows_of(summary)
    assert sorted(int(row["num_npus"]) for row in rows) == list(range(2, 101, 2))
    for row in rows:
        said = sums_of_text(Path(row["output_file"]))
        assert {name: row[name] for name in said} == said


def test_a_sweep_of_sixteen_runs_four_at_a_time(tmp_path: Path) -> None:
    sweep = [(parallel, npus) for npus in (4, 8, 16, 32) for parallel in PLAIN]

    def one(parallel: str, npus: int) -> int:
        flags = [
            f"--parallel={parallel}",
            f"--num_npus={npus}",
            "--num_packages=2",
            f"--run_name={npus}",
        ]
        return run(
            tmp_path, FAST, *flags, f"--output_file={parallel}.{npus}.txt", "--summary_csv=s.csv"
        ).status

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(one, *zip(*sweep))) == {0}
    rows = rows_of(tmp_path / "s.csv")
    assert sorted((row["parallel"], int(row["num_npus"])) for row in rows) == sorted(sweep)
    for row in rows:
        said = sums_of_text(tmp_path / f"{row['parallel']}.{row['num_npus']}.txt")
        assert {name: row[name] for name in said} == said


@pytest.mark.parametrize(
    "text",
    ["\nx\n", "Layer,m,n,k\na,1,1,1\n", SUMMARY_HEADER.replace(",minibatch", "") + "\n", "\0\xff"],
)
def test_another_header_is_refused_before_anything_is_simulated(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_bytes(text.encode("latin-1"))
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    (tmp_path / "cache").mkdir()
    flags = [
        f"--mnk={table}",
        f"--scalesim_path={fake}",
        f"--cache_dir={tmp_path}/cache",
        "--num_npus=1",
    ]
    result = run(tmp_path, *flags, "--summary_csv=s.csv")
    assert is_one_error_line(result), result
    assert result.err.startswith(f"error: {tmp_path}/s.csv:1: header ")
    assert (tmp_path / "s.csv").read_bytes() == text.encode("latin-1")
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "workload.txt").exists()


@pytest.mark.parametrize("what", ["pipe", "/dev/null", "/dev/full"])
def test_a_summary_that_cannot_be_appended_to_is_refused(what: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = run(tmp_path, FAST, f"--summary_csv={what}")
    assert is_one_error_line(result), result
    assert f"{what}:1: header 'no file', expected a summary's" in result.err
    assert not (tmp_path / "workload.txt").exists()


def test_a_link_to_another_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("w.txt")
    result = run(tmp_path, FAST, "--output_file=w.txt", "--summary_csv=link")
    assert is_one_error_line(result)
    assert "two outputs are one file" in result.err


@pytest.mark.parametrize("what", ["t.csv", "c.cfg", "link", "folder"])
def test_a_summary_that_is_an_input_or_a_folder_is_refused(what: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    (tmp_path / "c.cfg").write_text(tool.BUILT_IN_CONFIG)
    (tmp_path / "link").symlink_to("t.csv")
    (tmp_path / "folder").mkdir()
    result = run(
        tmp_path, FAST, f"--mnk={table}", "--scalesim_config=c.cfg", f"--summary_csv={what}"
    )
    assert is_one_error_line(result), result
    assert f"{tmp_path}/{'t.csv' if what == 'link' else what} is " in result.err
    assert table.read_text() == "Layer,m,n,k\na,8,8,8\n"
    assert (tmp_path / "c.cfg").read_text() == tool.BUILT_IN_CONFIG
    assert not (tmp_path / "workload.txt").exists()


@pytest.mark.parametrize("output", ["w.txt", "/dev/full"])
def test_a_failed_run_leaves_no_row(output: str, tmp_path: Path) -> None:
    """SCALE-Sim fails; or all is well up to the text file."""
    fake = fake_v2(tmp_path / "fake", "sys.exit(3)")
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    summary_of(tmp_path)
    before = (tmp_path / "s.csv").read_text()
    how = [FAST] if output == "/dev/full" else [f"--scalesim_path={fake}"]
    result = run(
        tmp_path,
        f"--mnk={table}",
        "--num_npus=1",
        "--summary_csv=s.csv",
        f"--output_file={output}",
        *how,
    )
    assert result.status == 1
    assert (tmp_path / "s.csv").read_text() == before


def test_a_dry_run_writes_no_row(tmp_path: Path) -> None:
    assert run(tmp_path, FAST, "--dry_run", "--summary_csv=s.csv").status == 0
    assert list(tmp_path.iterdir()) == []


# --- layers.csv


def layers_of(folder: Path, **changes: Any) -> list[dict[str, str]]:
    """Return the rows of layers.csv that these settings give."""
    tool.generate(settings(folder, **changes))
    return rows_of(folder / "outputs" / "run" / "layers.csv", LAYERS_HEADER)


def test_a_hybrid_layer_by_hand(tmp_path: Path) -> None:
    """12 NPUs in 3 packages: m is split over the packages, n over the 4 NPUs of one."""
    rows = layers_of(tmp_path, mnk=write_table(tmp_path / "t.csv", "a,24,40,16"), **HYBRID_OF_12)
    assert [",".join(row.values()) for row in rows] == [
        "a,HYBRID_DATA_MODEL,3,4,forward,8,10,16,773,ALLGATHER,160,4",
        "a,HYBRID_DATA_MODEL,3,4,input gradient,8,16,10,773,REDUCESCATTER,256,4",
        "a,HYBRID_DATA_MODEL,3,4,weight gradient,16,10,8,781,ALLREDUCE,320,3",
    ]


@pytest.mark.parametrize(
    ("parallel", "degrees", "members"),
    [
        ("DATA", ("12", "1"), ["1", "1", "12"]),
        ("MODEL", ("1", "12"), ["12", "12", "1"]),
        ("HYBRID_DATA_MODEL", ("3", "4"), ["4", "4", "3"]),
        ("HYBRID_MODEL_DATA", ("4", "3"), ["3", "3", "4"]),
    ],
)
def test_degrees_and_members(
    parallel: str, degrees: tuple[str, str], members: list[str], tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t.csv", "a,120,240,360")
    rows = layers_of(tmp_path, mnk=table, **{**HYBRID_OF_12, "parallel": parallel})
    assert [row["members"] for row in rows] == members
    assert {(row["dp"], row["mp"]) for row in rows} == {degrees}


def test_three_rows_a_layer_in_order_as_the_text_file_has_them(tmp_path: Path) -> None:
    rows = layers_of(
        tmp_path, mnk=MNK_INPUTS / "example_customized.csv", parallel="HYBRID_CUSTOMIZED"
    )
    _, layers = read_like_astrasim((tmp_path / "workload.txt").read_text())
    columns = ("layer", "strategy", "pass", "cycles", "collective", "bytes")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        (layer.name, layer.strategy, pass_name, str(cycles), collective, str(size))
        for layer in layers
        for pass_name, (cycles, collective, size) in zip(tool.PASSES.values(), layer.passes)
    ]


def test_layers_are_in_cycles_whatever_the_unit(tmp_path: Path) -> None:
    assert layers_of(tmp_path / "us", time_unit="us", clock_mhz=700.0) == layers_of(
        tmp_path / "cycles"
    )


# --- Collectives of one member

ACTIVATIONS, WEIGHTS = {"ALLGATHER", "REDUCESCATTER"}, {"ALLREDUCE"}
EVERY = ACTIVATIONS | WEIGHTS


@pytest.mark.parametrize(
    ("parallel", "npus", "packages", "alone"),
    [
        ("HYBRID_DATA_MODEL", 8, 1, WEIGHTS),
        ("HYBRID_DATA_MODEL", 8, 8, ACTIVATIONS),
        ("HYBRID_MODEL_DATA", 8, 1, ACTIVATIONS),
        ("HYBRID_MODEL_DATA", 8, 8, WEIGHTS),
        ("HYBRID_DATA_MODEL", 1, 1, EVERY),
        ("HYBRID_MODEL_DATA", 1, 1, EVERY),
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
        assert re.fullmatch(f"warning: {7 * len(alone)} collectives have one member: .*\n", err)
    said = sums_of_text(tmp_path / "workload.txt")
    assert [said[f"{name.lower()}_count"] for name in EVERY] == ["7"] * 3, (
        "the text file has them all the same"
    )


@pytest.mark.parametrize(("npus", "packages"), [(8, 1), (8, 2), (8, 8), (1, 1)])
@pytest.mark.parametrize("parallel", ["DATA", "MODEL"])
def test_no_warning_of_one_member_where_all_npus_take_part(
    parallel: str, npus: int, packages: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.generate(settings(tmp_path, parallel=parallel, num_npus=npus, num_packages=packages))
    out, err = capsys.readouterr()
    assert err == ""
    assert (" of 1 " in out) == (npus == 1)


# --- How long a run will take

Dry = Callable[..., tuple[float, float]]


@pytest.fixture
def dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Dry:
    """Return a function that does a dry run, of many small simulations, and gives its range of time in seconds."""
    fake_v2(tmp_path / "fake", f"print('done')\n{GOOD_REPORT}")
    write_table(tmp_path / "small.csv", "a,8,8,8")
    write_table(tmp_path / "large.csv", *(f"l{i},{300 + i},260,280" for i in range(400)))

    def expected(**changes: Any) -> tuple[float, float]:
        capsys.readouterr()
        tool.generate(simulated(tmp_path, dry_run=True, **changes))
        last = capsys.readouterr().out.splitlines()[-1]
        said = re.fullmatch(
            r"time with --jobs=\d+: ([\d,]+) (s|min|h) to ([\d,]+) (s|min|h) estimated", last
        )
        assert said, last
        low, low_unit, high, high_unit = said.groups()
        size = {"s": 1, "min": 60, "h": 3600}
        return int(low.replace(",", "")) * size[low_unit], int(high.replace(",", "")) * size[
            high_unit
        ]

    return expected


def simulated(folder: Path, **changes: Any) -> tool.Settings:
    """Return settings for the stand-in of `dry`, on one NPU, with a cache."""
    values = {
        "mnk": folder / "large.csv",
        "scalesim_path": folder / "fake",
        "cache_dir": folder / "cache",
        "jobs": 1,
    }
    one_npu = {"cycle_model": "simulated", "num_npus": 1, "num_packages": 1}
    return settings(folder, **{**values, **one_npu, **changes})


def finish_one(folder: Path, seconds: str) -> None:
    """Simulate a small GEMM, and have its entry in the cache say how long that took."""
    tool.generate(simulated(folder, mnk=folder / "small.csv"))
    (entry,) = folder.glob("cache/*/8x8x8.json")
    values = json.loads(entry.read_text())
    assert 0 < values["seconds"] < 60
    entry.write_text(json.dumps({**values, "seconds": "HERE"}).replace('"HERE"', seconds))


def test_a_dry_run_says_a_range_of_time(dry: Dry) -> None:
    low, high = dry()
    assert 120 < low < high < 7200


def test_more_jobs_take_less_time(dry: Dry) -> None:
    (low, high), (shared_low, shared_high) = dry(jobs=1), dry(jobs=2)
    assert shared_low < low / 1.5
    assert shared_high < high / 1.5


def test_what_finished_simulations_took_scales_the_time(dry: Dry, tmp_path: Path) -> None:
    low, high = dry()
    finish_one(tmp_path, "20")  # instead of 0.1 s
    slow_low, slow_high = dry()
    assert slow_low > 20 * low
    assert slow_high > 20 * high


def test_simulations_that_were_fast_make_it_shorter(dry: Dry, tmp_path: Path) -> None:
    low, high = dry()
    finish_one(tmp_path, "0.01")
    quick_low, quick_high = dry()
    assert quick_low < low / 3
    assert quick_high < high / 3


def test_simulations_of_another_config_or_scalesim_do_not_count(dry: Dry, tmp_path: Path) -> None:
    before = dry()
    finish_one(tmp_path, "20")
    config = tmp_path / "c.cfg"
    config.write_text(tool.BUILT_IN_CONFIG.replace("Bandwidth: 10", "Bandwidth: 20"))
    assert dry(scalesim_config=config) == before
    assert dry(scalesim_path=fake_v2(tmp_path / "other", GOOD_REPORT)) == before
    assert dry(cache_dir=None) == before
    assert dry() > before


@pytest.mark.parametrize("seconds", ['"x"', "null", "-1", "1e999", "NaN", "[]", "{}"])
def test_nonsense_for_seconds_does_no_harm(seconds: str, dry: Dry, tmp_path: Path) -> None:
    before = dry()
    finish_one(tmp_path, seconds)
    assert dry() == before
    tool.generate(simulated(tmp_path, mnk=tmp_path / "small.csv"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '"x"', '{"gemm": "8x8", "seconds": 9}', '{"seconds": 9}', "\0"]
)
def test_nonsense_for_an_entry_does_no_harm(text: str, dry: Dry, tmp_path: Path) -> None:
    before = dry()
    finish_one(tmp_path, "1")
    next(tmp_path.glob("cache/*/8x8x8.json")).write_text(text)
    assert dry() == before


def test_a_plan_that_is_all_in_the_cache_takes_no_time(dry: Dry, tmp_path: Path) -> None:
    finish_one(tmp_path, "20")
    assert dry(mnk=tmp_path / "small.csv") == (0, 0)


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_estimated_seconds_grow_with_the_cycles(dataflow: str) -> None:
    architecture = tool.read_architecture(None)._replace(dataflow=dataflow)
    gemms = [tool.Gemm(256 * 2**i, 256 * 2**i, 256 * 2**i) for i in range(8)]
    cycles = [tool.estimated_cycles(gemm, architecture) for gemm in gemms]
    seconds = [tool.estimated_cost(gemm, architecture)[1] for gemm in gemms]
    assert sorted(set(cycles)) == cycles
    assert sorted(set(seconds)) == seconds


def test_estimated_seconds_grow_with_the_array() -> None:
    """Of GEMMs with as many cycles: one fold, of 3 sides of the array and m."""
    cycles, seconds = [], []
    for side in (8, 16, 32, 64, 128, 256):
        architecture = tool.read_architecture(None)._replace(rows=side, columns=side)
        gemm = tool.Gemm(10_000 - 3 * side, 8, 8)
        cycles.append(tool.estimated_cycles(gemm, architecture))
        seconds.append(tool.estimated_cost(gemm, architecture)[1])
    assert len(set(cycles)) == 1
    assert sorted(set(seconds)) == seconds


@pytest.mark.parametrize("side", [1, 256, 10**29])
@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_estimated_seconds_of_huge_gemms_are_finite(dataflow: str, side: int) -> None:
    architecture = tool.read_architecture(None)._replace(rows=side, columns=side, dataflow=dataflow)
    assert 0 < tool.estimated_cost(tool.Gemm(10**30, 10**30, 10**30), architecture)[1] < math.inf


def test_a_dry_run_of_huge_gemms(dry: Dry, tmp_path: Path) -> None:
    write_table(tmp_path / "large.csv", ",".join(["a", *3 * ["9" * 30]]))
    low, high = dry()
    assert 10**30 < low < high


# --- On a terminal, and flags without effect


def test_the_bar_counts_gemms_and_says_how_long_from_the_start(tmp_path: Path) -> None:
    """Of three GEMMs one takes long enough to be seen running, which is looked at once a second."""
    slow = "if ',8,16,' in open(self.topology).read():\n    time.sleep(1.3)\n"
    fake = fake_v2(tmp_path / "fake", slow + GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,8,8,16")
    flags = [
        f"--mnk={table}",
        f"--scalesim_path={fake}",
        "--num_npus=1",
        "--cache_dir=",
        "--jobs=1",
    ]
    seen = seen_on_a_terminal(tmp_path, *flags)
    bars = seen.split("\r")
    first = next(bar for bar in bars if bar.startswith("GEMM"))
    assert re.match(r"GEMM 1/3 .* 00:00<\? of \d+ s to \d+ s", first)
    assert any(
        re.match(r"GEMM [123]/3 .* 00:01<\S+ of \d+ s to \d+ s, 8x8x16, layer a, forward", bar)
        for bar in bars
    )
    assert any(bar.startswith("GEMM 3/3 ") for bar in bars)


@pytest.mark.parametrize(
    "flag", ["--scalesim_path=nowhere", "--dask_scheduler=tcp://nowhere:1", "--jobs=2"]
)
def test_flags_that_the_analytical_model_ignores(flag: str, tmp_path: Path) -> None:
    result = run(tmp_path, FAST, flag)
    name = flag.partition("=")[0]
    assert (result.status, result.err) == (
        0,
        f"warning: {name} has no effect with --cycle_model=analytical\n",
    )
    assert (tmp_path / "workload.txt").read_text().startswith("DATA\n7\n")


# --- What is already there


def test_a_torn_last_line_of_a_summary_is_ended_first(tmp_path: Path) -> None:
    assert run(tmp_path, FAST, "--summary_csv=s.csv").status == 0
    whole = (tmp_path / "s.csv").read_text()
    (tmp_path / "s.csv").write_text(whole[:-9])
    assert run(tmp_path, FAST, "--summary_csv=s.csv").status == 0
    assert (tmp_path / "s.csv").read_text() == whole[:-9] + "\n" + whole.splitlines()[1] + "\n"


def test_one_entry_with_nonsense_seconds_does_not_hide_the_others(tmp_path: Path) -> None:
    architecture, gemm = tool.read_architecture(None), tool.Gemm(8, 8, 8)
    cache = tool.Cache(tmp_path, 3)
    took = 5 * tool.estimated_cost(gemm, architecture)[1]
    report = {"COMPUTE_REPORT.csv": "LayerID, Total Cycles,\n0, 5,\n"}
    cache.store(gemm, tool.Simulation(0, took, report))
    for m, seconds in enumerate((math.inf, math.nan, -1.0, 1e308), 9):
        cache.store(tool.Gemm(m, 8, 8), tool.Simulation(0, seconds, report))
    (tmp_path / "1x2.json").write_text("{}")
    (tmp_path / "1x2x3x4.json").write_text("{}")
    (tmp_path / "axbxc.json").write_text("{}")
    assert round(cache.pace(architecture), 6) == 5


def test_a_simulation_that_said_nothing_is_served_from_the_cache(tmp_path: Path) -> None:
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,8,4,4")
    flags = [f"--mnk={table}", f"--scalesim_path={fake}", f"--cache_dir={tmp_path}/cache"]
    assert run(tmp_path, *flags).status == 0
    assert "(0 simulated, " in run(tmp_path, *flags).out
