"""layers.csv: what one NPU computes and communicates in each pass of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import (
    HYBRID_OF_12,
    MNK_INPUTS,
    PASS_NAMES,
    generate,
    read_like_astrasim,
    rows_of,
    write_table,
)

HEADER = (
    *("layer", "type", "strategy", "dp", "mp", "pass", "count", "M", "N", "K", "cycles"),
    *("collective", "bytes", "members", "sent_bytes"),
)


def layers_of(folder: Path, **changes: Any) -> list[dict[str, str]]:
    """Return the rows of layers.csv that these settings give."""
    generate(folder, **changes)
    parallel = changes.get("parallel", "DATA")
    return rows_of(folder / "outputs" / parallel / "run" / "layers.csv", HEADER)


def test_a_hybrid_layer_by_hand(tmp_path: Path) -> None:
    """12 NPUs in 3 packages: m is split over the packages, n over the 4 NPUs of one."""
    rows = layers_of(tmp_path, mnk=write_table(tmp_path / "t.csv", "a,24,40,16"), **HYBRID_OF_12)
    layer = "a,GEMM,HYBRID_DATA_MODEL,3,4"
    assert [",".join(row.values()) for row in rows] == [
        f"{layer},forward,1,8,10,16,773,ALLGATHER,160,4,480",
        f"{layer},input gradient,1,8,16,10,773,REDUCESCATTER,256,4,192",
        f"{layer},weight gradient,1,16,10,8,781,ALLREDUCE,320,3,426",
    ]


@pytest.mark.parametrize(
    ("parallel", "degrees", "members"),
    [
        pytest.param("DATA", ("12", "1"), ["1", "1", "12"], id="DATA"),
        pytest.param("MODEL", ("1", "12"), ["12", "12", "1"], id="MODEL"),
        pytest.param("HYBRID_DATA_MODEL", ("3", "4"), ["4", "4", "3"], id="HYBRID_DATA_MODEL"),
        pytest.param("HYBRID_MODEL_DATA", ("4", "3"), ["3", "3", "4"], id="HYBRID_MODEL_DATA"),
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
    mnk = MNK_INPUTS / "example_customized.csv"
    rows = layers_of(tmp_path, mnk=mnk, parallel="HYBRID_CUSTOMIZED")
    _, layers = read_like_astrasim((tmp_path / "workload.txt").read_text())
    expected = []
    for layer in layers:
        for pass_name, (cycles, collective, size) in zip(PASS_NAMES, layer.passes):
            numbers = (str(cycles), collective, str(size))
            expected.append((layer.name, layer.strategy, pass_name, *numbers))
    columns = ("layer", "strategy", "pass", "cycles", "collective", "bytes")
    assert [tuple(row[column] for column in columns) for row in rows] == expected


def test_layers_are_in_cycles_whatever_the_unit(tmp_path: Path) -> None:
    in_cycles = layers_of(tmp_path / "cycles")
    assert layers_of(tmp_path / "us", time_unit="us", clock_mhz=700.0) == in_cycles
