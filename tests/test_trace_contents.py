"""Execution traces have the compute times and collectives of the workload file, in microseconds."""

from __future__ import annotations

from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
import helpers
from chakra_reader import contents, expected_contents, generate
from helpers import MNK_INPUTS, PLAIN_AND_CUSTOMIZED, write_table

# How many nodes the 7 layers of a table have: 3 x 7 GEMMs, less the first input gradient under
# DATA; after them at most 7, 6 and 7 collectives.
COUNTS = [
    ("DATA", 16, 2, 20 + 7),
    ("DATA", 16, 1, 20 + 7),
    ("DATA", 16, 16, 20 + 7),
    ("DATA", 1, 1, 20),
    ("MODEL", 16, 2, 21 + 7 + 6),
    ("MODEL", 16, 1, 21 + 7 + 6),
    ("MODEL", 16, 16, 21 + 7 + 6),
    ("MODEL", 1, 1, 21),
    ("HYBRID_DATA_MODEL", 16, 2, 21 + 7 + 6 + 7),
    ("HYBRID_DATA_MODEL", 16, 1, 21 + 7 + 6),
    ("HYBRID_DATA_MODEL", 16, 16, 21 + 7),
    ("HYBRID_DATA_MODEL", 1, 1, 21),
    ("HYBRID_MODEL_DATA", 16, 2, 21 + 7 + 6 + 7),
    ("HYBRID_MODEL_DATA", 16, 1, 21 + 7),
    ("HYBRID_MODEL_DATA", 16, 16, 21 + 7 + 6),
    ("HYBRID_MODEL_DATA", 1, 1, 21),
    # DATA, MODEL, MODEL, HYBRID_DATA_MODEL, HYBRID_MODEL_DATA, DATA, DATA
    ("HYBRID_CUSTOMIZED", 16, 2, 21 + 4 + 4 + 5),
    ("HYBRID_CUSTOMIZED", 16, 1, 21 + 3 + 3 + 4),
    ("HYBRID_CUSTOMIZED", 16, 16, 21 + 3 + 3 + 4),
    ("HYBRID_CUSTOMIZED", 1, 1, 21),
]


@pytest.mark.parametrize("num_passes", [1, 2], ids=["one step", "two steps"])
@pytest.mark.parametrize(
    ("parallel", "npus", "packages", "count"),
    [pytest.param(*case, id=f"{case[0]}, {case[1]} NPUs in {case[2]}") for case in COUNTS],
)
def test_the_workload_files_times_and_collectives(
    parallel: str, npus: int, packages: int, count: int, num_passes: int, tmp_path: Path
) -> None:
    mnk = MNK_INPUTS / "example_customized.csv"
    system = {"num_npus": npus, "num_packages": packages}
    text, nodes = generate(tmp_path, mnk=mnk, parallel=parallel, num_passes=num_passes, **system)
    assert len(nodes) == count * num_passes
    assert contents(nodes) == expected_contents(text, npus, packages, num_passes)


def test_update_time_has_no_place_in_a_trace(tmp_path: Path) -> None:
    assert generate(tmp_path, update_time=7)[1] == generate(tmp_path, update_time=100)[1]


@pytest.mark.parametrize("parallel", PLAIN_AND_CUSTOMIZED)
def test_the_unit_of_the_text_file_does_not_change_a_byte_of_a_trace(
    parallel: str, tmp_path: Path
) -> None:
    traces = set()
    for unit in ("cycles", "ns", "us"):
        mnk = MNK_INPUTS / "example_customized.csv"
        prefix = tmp_path / unit
        chosen = {"mnk": mnk, "parallel": parallel, "time_unit": unit, "clock_mhz": 700.0}
        helpers.generate(tmp_path, chakra_et=prefix, **chosen)
        traces.add(Path(f"{prefix}.0.et").read_bytes())
    assert len(traces) == 1


@pytest.mark.parametrize("unit", ["cycles", "ns", "us"])
def test_times_are_microseconds(unit: str, tmp_path: Path) -> None:
    """1,659 cycles of 700 MHz are 2.37 us."""
    _, nodes = generate(tmp_path, time_unit=unit, clock_mhz=700.0)
    assert (nodes[0].name, nodes[0].duration) == ("MLP_Bottom_0 forward", 2)


@pytest.mark.parametrize(
    ("layer", "parallel", "pass_name"),
    [
        pytest.param("a,64,10000000000,10000000000", "DATA", "weight gradient", id="bytes"),
        pytest.param(f"a,{10**25},8,8", "DATA", "forward", id="time"),
        pytest.param(f"a,{10**29},8,8", "MODEL", "forward", id="both"),
    ],
)
def test_what_does_not_fit_into_64_bits_names_the_layer(
    layer: str, parallel: str, pass_name: str, tmp_path: Path
) -> None:
    mnk = write_table(tmp_path / "t.csv", "fits,64,64,64", layer)
    with pytest.raises(tool.UserError) as error:
        generate(tmp_path, mnk=mnk, parallel=parallel)
    expected = f"{mnk}:3: the {pass_name} pass of a in a trace: value exceeds 64 bits"
    assert str(error.value) == expected
    assert not (tmp_path / "workload.txt").exists()
    assert list(tmp_path.glob("et/*")) == []
