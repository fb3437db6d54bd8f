"""The analytical cycles equal real SCALE-Sim's; where they do not, that is warned of."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool
from helpers import FAST, accelerator_of, run, write_table
from processes import after, ended, start_command

SIZES = st.integers(1, 40)
ARRAYS = st.sampled_from([(4, 4), (16, 8), (8, 16), (2, 32), (5, 3), (32, 32)])
EXAMPLES = int(os.environ.get("SIMULATED_EXAMPLES", "12"))


def accelerator(folder: Path, array: tuple[int, int], dataflow: str, mode: str) -> tool.Accelerator:
    """Return the built-in config with another array, dataflow and InterfaceBandwidth."""
    rows, columns = array
    text = tool.BUILT_IN_CONFIG
    for old, new in (
        ("ArrayHeight: 256", f"ArrayHeight: {rows}"),
        ("ArrayWidth: 256", f"ArrayWidth: {columns}"),
        ("Dataflow: ws", f"Dataflow: {dataflow}"),
        ("InterfaceBandwidth: CALC", f"InterfaceBandwidth: {mode}"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = folder / "c.cfg"
    path.write_text(text)
    return accelerator_of(path)


@pytest.mark.parametrize("mode", ["CALC", "USER"])
@pytest.mark.parametrize("version", ["installed", "2.0.2"])
def test_equal_to_scalesim(mode: str, version: str, release: Callable[[str], Path]) -> None:
    """To Total Cycles, under USER less Stall Cycles, whatever the shape, array and dataflow."""
    path = None if version == "installed" else release(version)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.builds(tool.Gemm, SIZES, SIZES, SIZES), ARRAYS, st.sampled_from(["os", "ws", "is"]))
    def check(gemm: tool.Gemm, array: tuple[int, int], dataflow: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            chosen = accelerator(Path(folder), array, dataflow, mode)
        simulation = tool.ScaleSim(path, chosen).simulate(gemm)
        assert simulation.status == 0, simulation.files
        report = io.StringIO(simulation.files["COMPUTE_REPORT.csv"])
        header, row, *_ = csv.reader(report, skipinitialspace=True)
        stalls = int(float(row[header.index("Stall Cycles")])) if mode == "USER" else 0
        assert simulation.cycles == chosen.stall_free_cycles(gemm) + stalls

    check()


@pytest.mark.parametrize(
    ("array", "dataflow", "expected"),
    [  # by hand, for M, N, K = 20, 30, 40
        ((16, 8), "os", 2 * 4 * (16 + 8 + 40 - 2) - 1),
        ((16, 8), "ws", 3 * 4 * (2 * 16 + 8 + 20 - 2) - 1),
        ((16, 8), "is", 3 * 3 * (2 * 16 + 8 + 30 - 2) - 1),
    ],
)
def test_by_hand(array: tuple[int, int], dataflow: str, expected: int, tmp_path: Path) -> None:
    chosen = accelerator(tmp_path, array, dataflow, "CALC")
    assert chosen.stall_free_cycles(tool.Gemm(m=20, n=30, k=40)) == expected


def test_a_lower_bound_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "c.cfg").write_text(tool.BUILT_IN_CONFIG.replace("CALC", "USER"))
    result = run(tmp_path, FAST, "--scalesim_config=c.cfg")
    what = f"{tmp_path}/c.cfg: InterfaceBandwidth is USER"
    warning = f"warning: {what}: without its stalls analytical cycles are a lower bound\n"
    assert (result.status, result.err) == (0, warning)


ARRAY_ONLY = "[architecture_presets]\nArrayHeight: 16\nArrayWidth: 8\nDataflow: os\n"


def test_it_needs_only_the_array_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "c.cfg").write_text(ARRAY_ONLY)
    table = write_table(tmp_path / "t.csv", "a,20,30,40")
    result = run(tmp_path, FAST, f"--mnk={table}", "--scalesim_config=c.cfg", "--num_npus=1")
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / "workload.txt").read_text().split("\n")[2].split("\t")[2] == "495"
    assert (tmp_path / "outputs/DATA/t/cycle_model.txt").read_text() == "analytical\n"


def test_it_needs_no_scalesim(tmp_path: Path) -> None:
    """Python itself is told that there is no scalesim, numpy, pandas or Dask."""
    hidden = ["scalesim", "numpy", "pandas", "distributed"]
    program = f"sys.modules.update(dict.fromkeys({hidden}))"
    result = ended(start_command(tmp_path, after(program, FAST, "--num_npus=1")))
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / "workload.txt").is_file()


def test_the_formula_counts_at_least_one_cycle() -> None:
    """One element on an array of one: a fold of 1 + 1 + 1 - 2 cycles, less one."""
    array = accelerator_of()._replace(rows=1, columns=1, dataflow="os")
    assert array.stall_free_cycles(tool.Gemm(m=1, n=1, k=1)) == 1
    assert array.stall_free_cycles(tool.Gemm(m=1, n=1, k=2)) == 1
    assert array.stall_free_cycles(tool.Gemm(m=1, n=1, k=3)) == 2
