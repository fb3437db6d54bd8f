"""Collectives of one member: in the text file, shown as such, not counted, and warned of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import generate, summary_of, sums_of_text

ACTIVATIONS, WEIGHTS = {"ALLGATHER", "REDUCESCATTER"}, {"ALLREDUCE"}
EVERY = ACTIVATIONS | WEIGHTS


@pytest.mark.parametrize(
    ("parallel", "npus", "packages", "alone"),
    [
        pytest.param("HYBRID_DATA_MODEL", 8, 1, WEIGHTS, id="HYBRID_DATA_MODEL, 1 package"),
        pytest.param("HYBRID_DATA_MODEL", 8, 8, ACTIVATIONS, id="HYBRID_DATA_MODEL, 8 packages"),
        pytest.param("HYBRID_MODEL_DATA", 8, 1, ACTIVATIONS, id="HYBRID_MODEL_DATA, 1 package"),
        pytest.param("HYBRID_MODEL_DATA", 8, 8, WEIGHTS, id="HYBRID_MODEL_DATA, 8 packages"),
        pytest.param("HYBRID_DATA_MODEL", 1, 1, EVERY, id="HYBRID_DATA_MODEL, 1 NPU"),
        pytest.param("HYBRID_MODEL_DATA", 1, 1, EVERY, id="HYBRID_MODEL_DATA, 1 NPU"),
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
    counts = [said[f"{name.lower()}_count"] for name in EVERY]
    assert counts == ["7"] * 3, "the text file has them all the same"


@pytest.mark.parametrize(
    ("npus", "packages"),
    [
        pytest.param(8, 1, id="8 NPUs in 1"),
        pytest.param(8, 2, id="8 NPUs in 2"),
        pytest.param(8, 8, id="8 NPUs in 8"),
        pytest.param(1, 1, id="1 NPU"),
    ],
)
@pytest.mark.parametrize("parallel", ["DATA", "MODEL"])
def test_no_warning_of_one_member_where_all_npus_take_part(
    parallel: str, npus: int, packages: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tmp_path, parallel=parallel, num_npus=npus, num_packages=packages)
    out, err = capsys.readouterr()
    assert err == ""
    assert (" of 1 " in out) == (npus == 1)
