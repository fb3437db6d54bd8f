"""What counts as cycles: at least one by the formula, and a whole number >= 1 in a report."""

from __future__ import annotations

from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import Run, fake_v2, read_like_astrasim, run, write_table


def test_the_formula_counts_at_least_one_cycle() -> None:
    """One element on an array of one: a fold of 1 + 1 + 1 - 2 cycles, less one."""
    array = tool.read_architecture(None)._replace(rows=1, columns=1, dataflow="os")
    assert tool.analytical_cycles(tool.Gemm(m=1, n=1, k=1), array) == 1
    assert tool.analytical_cycles(tool.Gemm(m=1, n=1, k=2), array) == 1
    assert tool.analytical_cycles(tool.Gemm(m=1, n=1, k=3), array) == 2


def run_with_report(folder: Path, cycles: str) -> Run:
    """Run a SCALE-Sim that reports these cycles."""
    fake = fake_v2(folder / "fake", f"report(HEADER + '0, {cycles}, 0, 1.5,\\n')")
    table = write_table(folder / "t.csv", "a,8,8,8")
    return run(folder, f"--mnk={table}", f"--scalesim_path={fake}", "--num_npus=1")


@pytest.mark.parametrize("cycles", ["321", "321.0", " 321.0 ", "1", "1.0"])
def test_whole_numbers_in_a_report(cycles: str, tmp_path: Path) -> None:
    assert run_with_report(tmp_path, cycles).status == 0
    _, (layer,) = read_like_astrasim((tmp_path / "workload.txt").read_text())
    assert {time for time, _, _ in layer.passes} == {round(float(cycles))}


@pytest.mark.parametrize("cycles", ["0", "0.0", "-1", "1.5", "321.00", "1e3", "nan", "", "x"])
def test_what_is_no_whole_number_from_one_on_is_refused(cycles: str, tmp_path: Path) -> None:
    result = run_with_report(tmp_path, cycles)
    lines = result.err.splitlines()
    assert (result.status, result.out) == (1, "")
    assert "no COMPUTE_REPORT.csv with one row and a number >= 1 as Total Cycles" in lines[-1]
    assert lines[-1].startswith("error: SCALE-Sim failed on GEMM 8x8x8 (layer a, forward pass): ")
    assert not (tmp_path / "workload.txt").exists()
