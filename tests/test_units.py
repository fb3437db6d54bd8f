"""Compute times in cycles, ns and us."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool
from helpers import is_one_error_line, layer_of, read_like_astrasim, read_like_chakra, run

GEMM = tool.Gemm(1, 1, 1)
CLOCK = "expected ns or us with a clock, or cycles without clock and traces"
RANGE = "is not a number in the range [1e-06, 1000000000.0]"


def times(cycles: int, unit: str, clock: float | None) -> int:
    shard = tool.PassShard("forward", GEMM, "NONE", 0, (), 1)
    plan = [(layer_of("a", 1, 1, 1, "DATA"), [shard] * 3)]
    return tool.compute_times(plan, {GEMM: cycles}, unit, clock)[GEMM]


@pytest.mark.parametrize(
    ("cycles", "unit", "clock", "expected"),
    [
        (1659, "cycles", None, 1659),
        (1659, "ns", 1000.0, 1659),
        (1659, "ns", 700.0, 2370),  # 2370 exactly
        (1660, "ns", 700.0, 2371),  # 2371.43
        (1659, "us", 700.0, 2),  # 2.37
        (1800, "us", 700.0, 3),  # 2.57
        (1750, "us", 700.0, 2),  # 2.5, to even
        (2450, "us", 700.0, 4),  # 3.5, to even
        (1, "us", 700.0, 1),  # never to 0
        (1, "ns", 2500.0, 1),  # 0.4
        (10**20 + 1, "ns", 1000.0, 10**20 + 1),  # exact beyond floating point
        (3, "us", 0.1, 30),  # 0.1 as it is written, not as floating point has it
    ],
)
def test_by_hand(cycles: int, unit: str, clock: float | None, expected: int) -> None:
    assert times(cycles, unit, clock) == expected


@given(st.integers(1, 10**18), st.sampled_from(["ns", "us"]), st.integers(1, 10**7))
def test_round_trip_within_half_a_unit(cycles: int, unit: str, clock_hundredths: int) -> None:
    clock = Fraction(clock_hundredths, 100)
    written = times(cycles, unit, clock_hundredths / 100)
    exact = cycles / clock * (1000 if unit == "ns" else 1)
    assert written >= 1
    assert abs(written - exact) <= Fraction(1, 2) or (written == 1 and exact < 1)


def test_a_dry_run_is_in_that_unit(tmp_path: Path) -> None:
    flags = ["--cycle_model=analytical", "--clock_mhz=700", "--dry_run"]
    in_us = run(tmp_path, *flags, "--time_unit=us")
    assert in_us.out.splitlines()[0].split()[-4:] == ["estimated", "us", "collective", "bytes"]


def test_the_file_and_the_table_are_in_that_unit(tmp_path: Path) -> None:
    flags = ["--cycle_model=analytical", "--num_npus=16", "--num_packages=2", "--clock_mhz=700"]
    in_us = run(tmp_path, *flags, "--time_unit=us")
    assert in_us.status == 0
    text = (tmp_path / "workload.txt").read_text()
    read_like_chakra(text)
    _, layers = read_like_astrasim(text)
    assert [[time for time, _, _ in layer.passes] for layer in layers[3:5]] == [
        [2, 2, 2],
        [9, 9, 7],
    ]
    assert "GEMM of one NPU  us  collective" in in_us.out.splitlines()[0]
    # exact: forward 23233 / 700 = 33.19, written 2 + 3 * 5 + ... = 33 (-0.6 %); weight gradient 25.96, written 27
    assert (
        in_us.err
        == "warning: --time_unit=us: rounding moves the compute time of the weight gradient pass by +4.0%\n"
    )
    in_ns = run(tmp_path, *flags, "--time_unit=ns")
    assert (in_ns.status, in_ns.err) == (0, "")
    assert (tmp_path / "workload.txt").read_text().split("\n")[2].split("\t")[2] == "2370"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clock_mhz=700"], f"flags time_unit=cycles, clock_mhz=700.0, chakra_et=: {CLOCK}"),
        (["--time_unit=us"], f"flags time_unit=us, clock_mhz=None, chakra_et=: {CLOCK}"),
        (["--time_unit=ns", "--clock_mhz=nan"], f"clock_mhz=nan, chakra_et=: {CLOCK}"),
        (["--time_unit=us", "--clock_mhz=inf"], f"flag --clock_mhz=inf: inf {RANGE}"),
        (["--time_unit=ns", "--clock_mhz=0"], f"flag --clock_mhz=0: 0.0 {RANGE}"),
        (["--time_unit=ns", "--clock_mhz=-700"], f"flag --clock_mhz=-700: -700.0 {RANGE}"),
        (["--time_unit=ns", "--clock_mhz=fast"], "flag --clock_mhz=fast: "),
        (["--time_unit=ms"], "flag --time_unit=ms: value should be one of <cycles|ns|us>"),
    ],
)
def test_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    result = run(tmp_path, "--cycle_model=analytical", *flags)
    assert is_one_error_line(result)
    assert message in result.err
