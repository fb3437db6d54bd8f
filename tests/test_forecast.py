"""How long a run will take, as a dry run and the bar of a terminal say it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    FAST,
    GOOD_REPORT,
    accelerator_of,
    fake_v2,
    inside,
    run,
    seen_on_a_terminal,
    settings,
    write_table,
)

TIME = re.compile(r"time with --jobs=\d+: ([\d,]+) (s|min|h) to ([\d,]+) (s|min|h) estimated")
SECONDS = {"s": 1, "min": 60, "h": 3600}
Dry = Callable[..., tuple[int, int]]


def run_here(folder: Path, **changes: Any) -> None:
    """Run in this process with the stand-in of `dry`, on one NPU, with a cache."""
    values = {"cycle_model": "simulated", "num_npus": 1, "num_packages": 1, "jobs": 1}
    values |= {"mnk": folder / "large.csv", "scalesim_path": folder / "fake"}
    values |= {"cache_dir": folder / "cache"}
    with inside(folder):
        tool.run(settings(folder, **{**values, **changes}))


@pytest.fixture
def dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Dry:
    """Return what does a dry run, of many small simulations, and gives its range of seconds."""
    fake_v2(tmp_path / "fake", f"print('done')\n{GOOD_REPORT}")
    write_table(tmp_path / "small.csv", "a,8,8,8")
    write_table(tmp_path / "large.csv", *(f"l{i},{300 + i},260,280" for i in range(400)))

    def seconds(**changes: Any) -> tuple[int, int]:
        capsys.readouterr()
        run_here(tmp_path, dry_run=True, **changes)
        last = capsys.readouterr().out.splitlines()[-1]
        said = TIME.fullmatch(last)
        assert said, last
        low, low_unit, high, high_unit = said.groups()
        low_seconds = int(low.replace(",", "")) * SECONDS[low_unit]
        return low_seconds, int(high.replace(",", "")) * SECONDS[high_unit]

    return seconds


def test_a_dry_run_says_a_range_of_time(dry: Dry) -> None:
    low, high = dry()
    assert 120 < low < high < 7200


def test_more_jobs_take_less_time(dry: Dry) -> None:
    (low, high), (shared_low, shared_high) = dry(jobs=1), dry(jobs=2)
    assert shared_low < low / 1.5
    assert shared_high < high / 1.5


def test_more_gemms_in_the_cache_leave_less_time(dry: Dry, tmp_path: Path) -> None:
    layers = [f"l{i},{30_000 + i},260,280" for i in range(8)]
    whole, half = tmp_path / "whole.csv", tmp_path / "half.csv"
    write_table(whole, *layers)
    write_table(half, *layers[:4])
    low, high = dry(mnk=whole)
    run_here(tmp_path, mnk=half, jobs=2)
    left_low, left_high = dry(mnk=whole)
    assert left_low < low / 1.5
    assert left_high < high / 1.5


def test_a_plan_that_is_all_in_the_cache_has_no_time_to_take(
    dry: Dry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(tmp_path, mnk=tmp_path / "small.csv")
    capsys.readouterr()
    run_here(tmp_path, mnk=tmp_path / "small.csv", dry_run=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "1 in the cache, 0 to simulate: 0 estimated cycles"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"scalesim_config": "c.cfg"}, id="another config"),
        pytest.param({"scalesim_path": "other"}, id="another SCALE-Sim"),
        pytest.param({"cache_dir": None}, id="no cache"),
    ],
)
def test_simulations_of_another_config_or_scalesim_do_not_count(
    changes: dict[str, str | None], dry: Dry, tmp_path: Path
) -> None:
    config = tool.BUILT_IN_CONFIG.replace("Bandwidth: 10", "Bandwidth: 20")
    (tmp_path / "c.cfg").write_text(config)
    fake_v2(tmp_path / "other", GOOD_REPORT)
    paths = {name: value and tmp_path / value for name, value in changes.items()}
    small = {"mnk": tmp_path / "small.csv"}
    before = dry(**small)
    run_here(tmp_path, **small)
    assert dry(**small, **paths) == before


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("[]", id="list"),
        pytest.param("{}", id="no entry"),
        pytest.param('"x"', id="text"),
        pytest.param('{"gemm": "8x8"}', id="no files"),
        pytest.param("\0", id="binary"),
    ],
)
def test_nonsense_for_an_entry_counts_as_none(text: str, dry: Dry, tmp_path: Path) -> None:
    small = {"mnk": tmp_path / "small.csv"}
    before = dry(**small)
    run_here(tmp_path, **small)
    next(tmp_path.glob("cache/*/8x8x8.json")).write_text(text)
    assert dry(**small) == before


def test_a_simulation_that_said_nothing_is_served_from_the_cache(tmp_path: Path) -> None:
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,8,4,4")
    flags = [f"--mnk={table}", f"--scalesim_path={fake}", f"--cache_dir={tmp_path}/cache"]
    assert run(tmp_path, *flags).status == 0
    assert "(0 simulated, " in run(tmp_path, *flags).out


# --- The estimates

DATAFLOWS = ["os", "ws", "is"]


def cost(gemm: tool.Gemm, **changes: Any) -> tuple[int, float]:
    """Return the cycles and seconds that a simulation is estimated to take."""
    task = tool.ScaleSim(None, accelerator_of()._replace(**changes)).task(gemm, "")
    return task.cycles, task.seconds


def are_growing(numbers: tuple[float, ...]) -> bool:
    return all(number < larger for number, larger in pairwise(numbers))


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_estimated_seconds_grow_with_the_cycles(dataflow: str) -> None:
    sides = [256 * 2**i for i in range(8)]
    costs = [cost(tool.Gemm(m=side, n=side, k=side), dataflow=dataflow) for side in sides]
    cycles, seconds = zip(*costs)
    assert are_growing(cycles)
    assert are_growing(seconds)


def test_estimated_seconds_grow_with_the_array() -> None:
    """Of GEMMs with as many cycles: one fold, of 3 sides of the array and m."""
    costs = []
    for side in (8, 16, 32, 64, 128, 256):
        gemm = tool.Gemm(m=10_000 - 3 * side, n=8, k=8)
        costs.append(cost(gemm, rows=side, columns=side))
    cycles, seconds = zip(*costs)
    assert len(set(cycles)) == 1
    assert are_growing(seconds)


@pytest.mark.parametrize("side", [1, 256, 10**29], ids=["1", "256", "10^29"])
@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_estimated_seconds_of_huge_gemms_are_finite(dataflow: str, side: int) -> None:
    huge = tool.Gemm(m=10**30, n=10**30, k=10**30)
    _, seconds = cost(huge, dataflow=dataflow, rows=side, columns=side)
    assert 0 < seconds < math.inf


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
    flags = [f"--mnk={table}", f"--scalesim_path={fake}", "--num_npus=1", "--cache_dir="]
    bars = seen_on_a_terminal(tmp_path, *flags, "--jobs=1").split("\r")
    first = next(bar for bar in bars if " of 3 GEMMs" in bar)
    assert re.match(r"0 of 3 GEMMs, 0 running \|.*\| 00:00 of \d+ s to \d+ s", first)
    later = r"[012] of 3 GEMMs, 1 running \|.*\| 00:0[1-9] of \d+ s to \d+ s"
    assert any(re.match(later, bar) for bar in bars)
    assert any(bar.startswith("3 of 3 GEMMs, 0 running |") for bar in bars)


@pytest.mark.parametrize(
    "flag", ["--scalesim_path=nowhere", "--dask_scheduler=tcp://nowhere:1", "--jobs=2"]
)
def test_flags_that_the_analytical_model_ignores(flag: str, tmp_path: Path) -> None:
    result = run(tmp_path, FAST, flag)
    name = flag.partition("=")[0]
    expected = f"warning: {name} has no effect with --cycle_model=analytical\n"
    assert (result.status, result.err) == (0, expected)
    assert (tmp_path / "workload.txt").read_text().startswith("DATA\n7\n")


# --- Where no terminal shows a bar


def test_a_run_says_what_it_simulates_also_where_nobody_watches(tmp_path: Path) -> None:
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,8,16,24")
    flags = [
        f"--mnk={table}",
        f"--scalesim_path={fake}",
        "--num_npus=1",
        f"--cache_dir={tmp_path}/c",
    ]
    line = r"simulating: 3 GEMMs, \d+ s to \d+ s, up to \d\.\d GB of memory each"
    assert re.fullmatch(line + "\n", run(tmp_path, *flags).err)
    assert run(tmp_path, *flags).err == "", "nothing is left to simulate"
    assert re.match(line, seen_on_a_terminal(tmp_path, *flags[:3], "--cache_dir="))


def test_a_line_a_minute_where_there_is_no_terminal(tmp_path: Path) -> None:
    """The script's clock runs 40 s in each second."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nreal = time.monotonic\ntime.monotonic = lambda: 40 * real()\n"
    )
    fake = fake_v2(tmp_path / "fake", f"time.sleep(1)\n{GOOD_REPORT}")
    table = write_table(tmp_path / "t.csv", "a,8,16,24", "b,32,40,48")
    flags = [f"--mnk={table}", f"--scalesim_path={fake}", "--num_npus=1", "--jobs=1"]
    result = run(tmp_path, *flags, env={"PYTHONPATH": str(tmp_path)})
    assert result.status == 0
    first, *later = result.err.splitlines()
    assert first.startswith("simulating: 6 GEMMs, ")
    assert len(later) >= 2
    for minute, line in enumerate(later, start=1):
        said = re.fullmatch(r"simulating: \d of 6 GEMMs, [01] running after (\d+) (s|min)", line)
        assert said, line
        assert int(said[1]) >= minute * (60 if said[2] == "s" else 1), "at most one a minute"


def test_a_dry_run_for_a_cluster_does_not_speak_of_this_machine(tmp_path: Path) -> None:
    result = run(tmp_path, "--dry_run", "--dask_scheduler=tcp://nowhere:1", "--num_npus=16")
    assert result.status == 0
    assert " free" not in result.out
    assert "time with a Dask worker for each GEMM: " in result.out
