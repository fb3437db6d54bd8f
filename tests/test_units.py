"""Compute times in cycles, ns and us."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool
from helpers import (
    FAST,
    folds_of_100,
    generate,
    is_flag_error,
    read_like_astrasim,
    read_like_chakra,
    run,
    write_table,
)

RANGE = "is not a number in the range [1e-06, 1000000000.0]"
CLOCK_ALONE = "--clock_mhz needs --time_unit=ns or us, or --chakra_et"


def time(cycles: int, unit: str, clock: float | None) -> int:
    return tool.Clock(unit, clock).time(cycles)


@pytest.mark.parametrize(
    ("cycles", "unit", "clock", "expected"),
    [
        pytest.param(1659, "cycles", None, 1659, id="cycles"),
        pytest.param(1659, "ns", 1000.0, 1659, id="1 GHz"),
        pytest.param(1659, "ns", 700.0, 2370, id="2370 exactly"),
        pytest.param(1660, "ns", 700.0, 2371, id="2371.43"),
        pytest.param(1659, "us", 700.0, 2, id="2.37"),
        pytest.param(1800, "us", 700.0, 3, id="2.57"),
        pytest.param(1750, "us", 700.0, 2, id="2.5 to even"),
        pytest.param(2450, "us", 700.0, 4, id="3.5 to even"),
        pytest.param(1, "us", 700.0, 1, id="us never to 0"),
        pytest.param(1, "ns", 2500.0, 1, id="ns never to 0"),
        pytest.param(10**20 + 1, "ns", 1000.0, 10**20 + 1, id="exact beyond floating point"),
        pytest.param(3, "us", 0.1, 30, id="0.1 as it is written"),
    ],
)
def test_by_hand(cycles: int, unit: str, clock: float | None, expected: int) -> None:
    assert time(cycles, unit, clock) == expected


@given(st.integers(1, 10**18), st.sampled_from(["ns", "us"]), st.integers(1, 10**7))
def test_round_trip_within_half_a_unit(cycles: int, unit: str, clock_hundredths: int) -> None:
    clock = Fraction(clock_hundredths, 100)
    written = time(cycles, unit, clock_hundredths / 100)
    exact = cycles / clock * (1000 if unit == "ns" else 1)
    assert written >= 1
    assert abs(written - exact) <= Fraction(1, 2) or (written == 1 and exact < 1)


def header_of(out: str) -> list[str]:
    """Return the header of the printed table."""
    (header,) = [line for line in out.splitlines() if line.startswith("layer ")]
    return re.split("  +", header)


@pytest.mark.parametrize("flag", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("unit", ["cycles", "ns", "us"])
def test_the_printed_table_has_cycles_and_the_unit(
    unit: str, flag: list[str], tmp_path: Path
) -> None:
    clock = [] if unit == "cycles" else ["--clock_mhz=700"]
    result = run(tmp_path, FAST, f"--time_unit={unit}", *clock, *flag)
    times = ["cycles"] if unit == "cycles" else ["cycles", unit]
    assert header_of(result.out) == [
        *("layer and pass", "GEMM of one NPU"),
        *times,
        *("collective", "bytes"),
    ]
    totals = [line for line in result.out.splitlines() if line.startswith("compute, ")]
    assert [line.split()[-1] for line in totals] == [unit] * 4


IN_A_CLOCK = [FAST, "--num_npus=16", "--num_packages=2", "--clock_mhz=700"]


def test_the_text_file_is_in_that_unit(tmp_path: Path) -> None:
    assert run(tmp_path, *IN_A_CLOCK, "--time_unit=us").status == 0
    text = (tmp_path / "workload.txt").read_text()
    read_like_chakra(text)
    _, layers = read_like_astrasim(text)
    times = [[time for time, _, _ in layer.passes] for layer in layers]
    assert times[3:5] == [[2, 2, 2], [9, 9, 7]]
    in_ns = run(tmp_path, *IN_A_CLOCK, "--time_unit=ns")
    assert (in_ns.status, in_ns.err) == (0, "")
    _, layers = read_like_astrasim((tmp_path / "workload.txt").read_text())
    assert layers[0].passes[0][0] == 2370


def changes(err: str) -> dict[str, str]:
    """Return by how much rounding moves the total of a pass, of those that are warned of."""
    found = {}
    for line in err.splitlines():
        warning = r"warning: .*moves the compute time of the (.*) pass by ([+-][\d.]+%)"
        said = re.fullmatch(warning, line)
        assert said, line
        assert "rounding to whole us" in line
        found[said[1]] = said[2]
    return found


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--time_unit=us"], id="text file"),
        pytest.param(["--time_unit=us", "--chakra_et=x"], id="text file and traces"),
        pytest.param(["--chakra_et=x"], id="traces alone"),
        pytest.param(["--time_unit=ns", "--chakra_et=x"], id="traces beside ns"),
    ],
)
def test_whole_microseconds_of_a_fast_clock_are_warned_of_once(
    flags: list[str], tmp_path: Path
) -> None:
    """Forward: 23233 cycles / 700 = 33.19 us, written 33; weight gradient: 25.96 us, written 27."""
    result = run(tmp_path, *IN_A_CLOCK, *flags)
    assert changes(result.err) == {"weight gradient": "+4.0%"}


@pytest.mark.parametrize(
    ("cycles", "change"),
    [
        pytest.param(107, {"forward": "+1.4%"}, id="30.57 us to 31"),
        pytest.param(110, {"forward": "-1.4%"}, id="31.43 us to 31"),
        pytest.param(111, {}, id="31.71 us to 32, +0.9 %"),
        pytest.param(106, {}, id="30.29 us to 30, -0.9 %"),
        pytest.param(105, {}, id="30 us exactly"),
    ],
)
def test_rounding_that_moves_a_pass_by_more_than_1_percent_is_warned_of(
    cycles: int, change: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The forward pass takes 100 + k cycles, the others 105, which are 30 us exactly."""
    config = folds_of_100(tmp_path / "c.cfg")
    mnk = write_table(tmp_path / "t.csv", f"a,5,5,{cycles - 100}")
    chosen = {"mnk": mnk, "scalesim_config": config, "num_npus": 1, "num_packages": 1}
    generate(tmp_path, **chosen, time_unit="us", clock_mhz=3.5)
    assert changes(capsys.readouterr().err) == change


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--clock_mhz=700"], f": {CLOCK_ALONE}", id="clock for cycles"),
        pytest.param(["--time_unit=us"], ": --time_unit=us needs --clock_mhz", id="us, no clock"),
        pytest.param(["--time_unit=ns"], ": --time_unit=ns needs --clock_mhz", id="ns, no clock"),
        pytest.param(["--time_unit=ns", "--clock_mhz=nan"], ": expected a number of MHz", id="nan"),
        pytest.param(
            ["--chakra_et=x", "--clock_mhz=nan"], ": expected a number of MHz", id="nan for traces"
        ),
        pytest.param(
            ["--time_unit=us", "--clock_mhz=inf"], f"flag --clock_mhz=inf: inf {RANGE}", id="inf"
        ),
        pytest.param(
            ["--time_unit=ns", "--clock_mhz=0"], f"flag --clock_mhz=0: 0.0 {RANGE}", id="0"
        ),
        pytest.param(
            ["--time_unit=ns", "--clock_mhz=-700"],
            f"flag --clock_mhz=-700: -700.0 {RANGE}",
            id="-700",
        ),
        pytest.param(["--time_unit=ns", "--clock_mhz=fast"], "flag --clock_mhz=fast: ", id="fast"),
        pytest.param(
            ["--time_unit=ms"],
            "flag --time_unit=ms: value should be one of <cycles|ns|us>",
            id="ms",
        ),
    ],
)
def test_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    result = run(tmp_path, FAST, *flags)
    assert is_flag_error(result), result
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        (["--time_unit=us"], "whole us"),
        (["--chakra_et=et/x"], "whole us, which are all that a trace holds,"),
        (["--chakra_et=et/x", "--time_unit=us"], "whole us, which are all that a trace holds,"),
        (["--chakra_et=et/x", "--time_unit=ns"], "whole us, which are all that a trace holds,"),
    ],
    ids=["text", "traces", "both in us", "text in ns"],
)
def test_rounding_is_warned_of_once_and_says_of_what(
    flags: list[str], precision: str, tmp_path: Path
) -> None:
    result = run(tmp_path, FAST, "--num_npus=16", "--num_packages=2", "--clock_mhz=700", *flags)
    assert result.err == (
        f"warning: rounding to {precision} moves the compute time of the weight gradient pass"
        " by +4.0%\n"
    )


def test_a_dry_run_warns_of_rounding_in_traces_too(tmp_path: Path) -> None:
    flags = [FAST, "--num_npus=16", "--num_packages=2", "--clock_mhz=700", "--chakra_et=et/x"]
    dry, real = run(tmp_path, *flags, "--dry_run"), run(tmp_path, *flags)
    assert "all that a trace holds" in dry.err
    assert dry.err == real.err
