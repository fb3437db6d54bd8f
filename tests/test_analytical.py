"""The analytical runtime equals real SCALE-Sim's; where it does not hold it is refused or warned of."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool
from helpers import SCRIPT, is_one_error_line, run, write_table

SIZES = st.integers(1, 40)
ARRAYS = st.sampled_from([(4, 4), (16, 8), (8, 16), (2, 32), (5, 3), (32, 32)])
EXAMPLES = int(os.environ.get("SIMULATED_EXAMPLES", "12"))


def architecture(
    folder: Path, array: tuple[int, int], dataflow: str, mode: str
) -> tool.Architecture:
    text = tool.BUILT_IN_CONFIG.replace("Height: 256", f"Height: {array[0]}").replace(
        "Width: 256", f"Width: {array[1]}"
    )
    path = folder / "c.cfg"
    path.write_text(text.replace("Dataflow: ws", f"Dataflow: {dataflow}").replace("CALC", mode))
    return tool.read_architecture(path)


@pytest.mark.parametrize("mode", ["CALC", "USER"])
@pytest.mark.parametrize("version", ["installed", "2.0.2"])
def test_equal_to_scalesim(mode: str, version: str, release: Callable[[str], Path]) -> None:
    """Total Cycles under CALC, Total Cycles less Stall Cycles under USER, whatever the shape, array and dataflow."""
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
            chosen = architecture(Path(folder), array, dataflow, mode)
        scalesim = tool.find_scalesim(path, chosen.scalesim_text)
        status, _, files = tool.simulate(scalesim, gemm)
        assert status == 0, files
        header, row, *_ = csv.reader(
            io.StringIO(files["COMPUTE_REPORT.csv"]), skipinitialspace=True
        )
        stalls = int(float(row[header.index("Stall Cycles")])) if mode == "USER" else 0
        assert (
            tool.reported_cycles(files, scalesim.version)
            == tool.estimated_cycles(gemm, chosen) + stalls
        )

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
    chosen = architecture(tmp_path, array, dataflow, "CALC")
    assert tool.estimated_cycles(tool.Gemm(20, 30, 40), chosen) == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param(
            "Height: 256", "Height: 8,64", "are ['8,64', '256', 'ws'], expected", id="range"
        ),
        pytest.param("Width: 256", "Width: 0", "are ['256', '0', 'ws'], expected", id="no columns"),
        pytest.param(
            "Support: false",
            "Support: True",
            "SparsitySupport is true, expected false, or",
            id="sparsity",
        ),
        pytest.param(
            "Dataflow: ws", "Dataflow: rs", "are ['256', '256', 'rs'], expected", id="dataflow"
        ),
    ],
)
def test_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.cfg").write_text(tool.BUILT_IN_CONFIG.replace(old, new))
    for more in ([], ["--dry_run"]):
        result = run(tmp_path, "--cycle_model=analytical", "--scalesim_config=c.cfg", *more)
        assert is_one_error_line(result)
        assert message in result.err


def test_a_lower_bound_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "c.cfg").write_text(tool.BUILT_IN_CONFIG.replace("CALC", "USER"))
    result = run(tmp_path, "--cycle_model=analytical", "--scalesim_config=c.cfg")
    assert result.status == 0
    assert result.err == (
        f"warning: {tmp_path}/c.cfg: InterfaceBandwidth is USER: without its stalls analytical cycles "
        "are a lower bound\n"
    )


def test_it_needs_only_the_array_and_no_scalesim(tmp_path: Path) -> None:
    """Python itself is told that there is no scalesim, numpy, pandas or Dask."""
    (tmp_path / "c.cfg").write_text(
        "[architecture_presets]\nArrayHeight: 16\nArrayWidth: 8\nDataflow: os\n"
    )
    table = write_table(tmp_path / "t.csv", "a,20,30,40")
    hidden = "import sys, runpy; sys.modules.update(dict.fromkeys(['scalesim', 'numpy', 'pandas', 'distributed']));"
    hidden += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = [
        f"--mnk={table}",
        "--cycle_model=analytical",
        "--scalesim_config=c.cfg",
        "--num_npus=1",
    ]
    subprocess.run(
        [sys.executable, "-c", hidden, str(SCRIPT), *flags],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "workload.txt").read_text().split("\n")[2].split("\t")[2] == "495"
    assert (tmp_path / "outputs/DATA/t/cycle_model.txt").read_text() == "analytical\n"
