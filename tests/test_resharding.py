"""What would have to travel between neighbours of different strategies, which a warning says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gen_astrasim_workload_input as tool
from helpers import PLAIN, plan_of_table, settings, write_table
from runs import TYPED, run_inside

DATA, MODEL, DM, MD = PLAIN
# 12 NPUs in 3 packages; the activations between two layers are 24 x 10 elements of two bytes.
SYSTEM: dict[str, Any] = {"num_npus": 12, "num_packages": 3, "parallel": "HYBRID_CUSTOMIZED"}
WITHIN, BETWEEN, BOTH = (4, 1), (1, 3), (4, 3)
ACTIVATIONS = 480
SHARE = 40  # of 12 NPUs

# Forward an ALLGATHER, backward an ALLTOALL: bytes, members in each package and packages.
Lacking = tuple[int, tuple[int, int]] | None
RESHARDED: dict[tuple[str, str], tuple[Lacking, Lacking]] = {
    (DATA, DM): ((SHARE, WITHIN), None),
    (DATA, MD): ((SHARE, BETWEEN), None),
    (DATA, MODEL): ((SHARE, BOTH), None),
    (DM, MODEL): ((ACTIVATIONS // 3, BETWEEN), None),
    (MD, MODEL): ((ACTIVATIONS // 4, WITHIN), None),
    (DM, DATA): (None, (SHARE, WITHIN)),
    (MD, DATA): (None, (SHARE, BETWEEN)),
    (MODEL, DATA): (None, (SHARE, BOTH)),
    (MODEL, DM): (None, (SHARE, BETWEEN)),
    (MODEL, MD): (None, (SHARE, WITHIN)),
    (DM, MD): ((SHARE, BETWEEN), (SHARE, WITHIN)),
    (MD, DM): ((SHARE, WITHIN), (SHARE, BETWEEN)),
}
PAIRS = [pytest.param(one, two, id=f"{one} before {two}") for one in PLAIN for two in PLAIN]


def pair(folder: Path, first: str, second: str, changes: dict[str, Any]) -> tool.Settings:
    """Return the settings of two layers."""
    lines = (f"a,24,10,24,,,{first}", f"b,24,12,10,,,{second}")
    mnk = write_table(folder / "t.csv", *lines, header=TYPED)
    return settings(folder, mnk=mnk, **{**SYSTEM, **changes})


def lacking(folder: Path, first: str, second: str, **changes: Any) -> dict[str, tool.Collective]:
    """Return what is missing between two layers, by kind."""
    chosen = pair(folder, first, second, changes)
    before, after = plan_of_table(chosen).layers
    return {each.kind: each for each in before.resharding_before(after, chosen).values()}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair(
    first: str, second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, backward = RESHARDED.get((first, second), (None, None))
    expected = {}
    parts = []
    for direction, kind, each in (
        ("forward", "ALLGATHER", forward),
        ("backward", "ALLTOALL", backward),
    ):
        if each:
            expected[kind] = (kind, each[0], *each[1])
            parts.append(f"{direction} an {kind} of {each[0]} bytes")
    found = lacking(tmp_path, first, second)
    assert {kind: tuple(each)[:4] for kind, each in found.items()} == expected
    run_inside(tmp_path, mnk=tmp_path / "t.csv", **SYSTEM)
    lacks = f"a ({first}) before b ({second}) lacks {' and '.join(parts)}"
    warning = f"warning: {tmp_path}/t.csv:3: {lacks}: no communication was added\n"
    err = capsys.readouterr().err
    assert [line for line in err.splitlines(keepends=True) if "lacks" in line] == (
        [warning] if parts else []
    )


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_forward_passes_lack_nothing_of_gradients(first: str, second: str, tmp_path: Path) -> None:
    forward, _ = RESHARDED.get((first, second), (None, None))
    assert [*lacking(tmp_path, first, second, inference=True)] == ["ALLGATHER"] * bool(forward)


@pytest.mark.parametrize(
    ("packages", "same"),
    [
        pytest.param(1, [(DATA, MD), (MODEL, DM)], id="one package"),
        pytest.param(12, [(DATA, DM), (MODEL, MD)], id="packages of one NPU"),
    ],
)
def test_dimensions_are_compared_and_not_names(
    packages: int, same: list[tuple[str, str]], tmp_path: Path
) -> None:
    for one in PLAIN:
        for two in PLAIN:
            split_alike = one == two or {(one, two), (two, one)} & {*same}
            assert bool(lacking(tmp_path, one, two, num_packages=packages)) != bool(split_alike)


def test_one_warning_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{name},24,12,12,,,{strategy}" for name, strategy in zip("abcd", (DM, DM, MD, DATA))]
    run_inside(tmp_path, mnk=write_table(tmp_path / "t.csv", *lines, header=TYPED), **SYSTEM)
    # 24 x 12 x 2 bytes over 12 NPUs
    share = "forward an ALLGATHER of 48 bytes and backward an ALLTOALL of 48 bytes"
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/t.csv:4: b ({DM}) before c ({MD}) lacks {share} (and 1 more):"
        " no communication was added\n"
    )


def test_sizes_that_differ_are_those_of_the_layer_behind(tmp_path: Path) -> None:
    lines = ["a,24,36,24,,,DATA", "b,24,12,12,,,MODEL"]
    chosen = settings(tmp_path, mnk=write_table(tmp_path / "t.csv", *lines, header=TYPED), **SYSTEM)
    before, after = plan_of_table(chosen).layers
    (gather,) = before.resharding_before(after, chosen).values()
    assert gather.bytes == 24 * 12 * 2 // 12


def test_other_types_have_their_own_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["a,24,12,12,,,DATA", f"b,24,12,12,COLUMN_PARALLEL,,{DM}"]
    run_inside(tmp_path, mnk=write_table(tmp_path / "t.csv", *lines, header=TYPED), **SYSTEM)
    what = "a (GEMM) before b (COLUMN_PARALLEL) of another strategy lacks a resharding"
    warning = f"warning: {tmp_path}/t.csv:3: {what}: no communication was added\n"
    assert capsys.readouterr().err == warning


# --- Whether that is what is missing, row by row

NPUS = [(within, between) for between in range(3) for within in range(4)]
ROWS = [(*npu, copy) for npu in NPUS for copy in range(2)]
ROW_BYTES = 20
Row = tuple[int, int, int]


def rows_of(npu: tuple[int, int], strategy: str) -> set[Row]:
    """Return the rows that an NPU computes, each named by an NPU that has it under DATA."""
    splits = {DATA: (True, True), MODEL: (False, False), DM: (False, True), MD: (True, False)}
    rows = set()
    for row in ROWS:
        if all(one == two or not split for one, two, split in zip(npu, row, splits[strategy])):
            rows.add(row)
    return rows


def members(npu: tuple[int, int], collective: tool.Collective) -> Iterator[tuple[int, int]]:
    """Return the NPUs of the group that communicates with one, and it."""
    for other in NPUS:
        is_near = (other[0] == npu[0] or collective.within > 1) and (
            other[1] == npu[1] or collective.between > 1
        )
        if is_near:
            yield other


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_each_npu_gets_the_rows_that_it_lacks(first: str, second: str, tmp_path: Path) -> None:
    """Forward rows of outputs, each NPU giving an equal share; backward rows of gradients."""
    found = lacking(tmp_path, first, second)
    for npu in NPUS:
        had, wanted = rows_of(npu, first), rows_of(npu, second)
        if gather := found.get("ALLGATHER"):
            assert not wanted <= had
            given = [rows_of(other, first) & wanted for other in members(npu, gather)]
            assert set().union(*given) == wanted
            assert sum(map(len, given)) == len(wanted), "none is given twice"
            assert {len(rows) * ROW_BYTES for rows in given} == {gather.bytes}
        else:
            assert wanted <= had
        # Backward what was wanted is had. A gradient is split over all: a share for each NPU.
        if exchange := found.get("ALLTOALL"):
            assert not had <= wanted
            given = [rows_of(other, second) & had for other in members(npu, exchange)]
            assert set().union(*given) == had
            assert all(given), "nobody takes part who gives nothing"
            assert exchange.bytes * len(NPUS) == len(ROWS) * ROW_BYTES
        else:
            assert had <= wanted
