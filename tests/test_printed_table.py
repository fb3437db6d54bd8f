"""The printed table: right numbers, uneven layers marked, equal layers shown once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import generate, read_like_astrasim, write_table

FOOTNOTE = "* a size is not divisible: NPUs have different shares"
PASS_NAMES_PRINTED = ["forward", "input grad", "weight grad"]
CONVOLUTIONS = (
    "Layer,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Num Filter,Strides"
)

Labels = list[str]


def table_lines(out: str) -> list[str]:
    """Return the lines between the header and the totals or the footnote."""
    lines = out.splitlines()
    (first,) = [index for index, line in enumerate(lines) if line.startswith("layer ")]
    ends = (FOOTNOTE, "totals of a training step")
    end = min(index for index, line in enumerate(lines) if line in ends)
    return lines[first + 1 : end]


def labels_of(out: str) -> list[str]:
    """Return how the layers are called, each in a line above those of its three passes."""
    lines = table_lines(out)
    assert len(lines) % 4 == 0
    assert [line.startswith("  ") for line in lines] == [False, True, True, True] * (
        len(lines) // 4
    )
    return lines[::4]


def labels(folder: Path, capsys: pytest.CaptureFixture[str], *rows: str, **changes: Any) -> Labels:
    """Return how the layers of a table are called."""
    header = changes.pop("header", "Layer,m,n,k")
    capsys.readouterr()
    generate(folder, mnk=write_table(folder / "t.csv", *rows, header=header), **changes)
    return labels_of(capsys.readouterr().out)


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what is printed of 97 layers, of which 95 are alike."""
    alike = [f"same{i},1024,512,512" for i in range(95)]
    rows = ["first,100,512,512", *alike, "n,1024,10000000,1"]
    generate(tmp_path, mnk=write_table(tmp_path / "t.csv", *rows), parallel="HYBRID_DATA_MODEL")
    return capsys.readouterr().out.splitlines()


def test_equal_layers_stand_in_one_line(printed: list[str]) -> None:
    assert labels_of("\n".join(printed)) == ["first", "same0 × 95", "n"]


def test_the_totals_are_those_of_the_text_file(printed: list[str], tmp_path: Path) -> None:
    ends = (" bytes", " cycles")
    totals = {line.split("  ")[0]: line.split()[-2] for line in printed if line.endswith(ends)}
    _, layers = read_like_astrasim((tmp_path / "workload.txt").read_text())
    passes = [each for layer in layers for each in layer.passes]
    assert totals["compute, all passes"] == f"{sum(time for time, _, _ in passes):,}"
    for kind in ("ALLGATHER", "REDUCESCATTER", "ALLREDUCE"):
        size = sum(size for _, collective, size in passes if collective == kind)
        assert totals[f"97 × {kind}"] == f"{size:,}"
    assert totals["97 × ALLREDUCE"] == f"{96 * 512 * 512 * 2 // 8 + 10000000 * 2 // 8:,}"


def test_the_output_is_named(printed: list[str], tmp_path: Path) -> None:
    wrote = f"wrote {tmp_path}/workload.txt: 97 layers, "
    assert [line for line in printed if line.startswith(wrote)]


def test_columns_are_wide_enough(printed: list[str]) -> None:
    """Cells are two blanks apart, so that every line has as many as the header."""
    (header,) = [line for line in printed if line.startswith("layer ")]
    end = header.index("cycles") + len("cycles")
    lines = [line for line in table_lines("\n".join(printed)) if line.startswith("  ")]
    assert len(lines) == 9
    assert {line[end - 1].isdigit() and line[end : end + 2] for line in lines} == {"  "}


def test_uneven_layers_are_marked_and_explained_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["odd,100,50,30", "even,160,50,30", "odd_too,100,60,30"]
    generate(tmp_path, mnk=write_table(tmp_path / "t.csv", *rows))
    out = capsys.readouterr().out
    assert labels_of(out) == ["odd *", "even", "odd_too *"]
    assert out.splitlines().count(FOOTNOTE) == 1


def test_even_layers_need_no_explanation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert labels(tmp_path, capsys, "even,160,50,30") == ["even"]
    generate(tmp_path, mnk=tmp_path / "t.csv")
    assert "*" not in capsys.readouterr().out


# --- Equal layers


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        pytest.param("aaa", ["0 × 3"], id="one kind"),
        pytest.param("aabaaa", ["0 × 5", "2"], id="with another one between"),
        pytest.param("abcbcbcd", ["0", "1 × 3", "2 × 3", "7"], id="in turn"),
        pytest.param("abc", ["0", "1", "2"], id="none"),
    ],
)
def test_equal_layers_are_shown_once_where_the_first_of_them_stands(
    kinds: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{index},{16 * ord(kind)},16,16" for index, kind in enumerate(kinds)]
    assert labels(tmp_path, capsys, *rows) == expected


def test_layers_of_a_long_block_are_merged_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{index},{16 + 16 * (index % 100)},16,16" for index in range(200)]
    expected = [f"{index} × 2" for index in range(100)]
    assert labels(tmp_path, capsys, *rows) == expected


def test_equal_layers_whose_sizes_are_uneven_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert labels(tmp_path, capsys, "a,100,50,30", "b,100,50,30") == ["a × 2 *"]


def test_passes_have_short_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path, mnk=write_table(tmp_path / "t.csv", "even,160,50,30"))
    _, *lines = table_lines(capsys.readouterr().out)
    assert [line.strip().split("  ")[0] for line in lines] == PASS_NAMES_PRINTED


@pytest.mark.parametrize("parallel", ["DATA", "MODEL"])
def test_layers_with_other_ifmaps_are_not_merged(
    parallel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As GEMMs they are alike, 4 x 4 outputs; the REDUCESCATTERs under MODEL are not."""
    rows = ["a,4,4,1,1,64,64,1", "b,7,7,1,1,64,64,2"]
    names = labels(tmp_path, capsys, *rows, header=CONVOLUTIONS, parallel=parallel, minibatch=16)
    assert names == ["a", "b"]


@pytest.mark.parametrize("npus", [1, 16], ids=["1 NPU", "16 NPUs"])
def test_layers_of_another_strategy_are_not_merged(
    npus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one package both do the same, and of one NPU all do."""
    header = "Layer,m,n,k,CustomizedParallelization"
    rows = ["a,64,64,64,MODEL", "b,64,64,64,HYBRID_DATA_MODEL"]
    chosen = {"parallel": "HYBRID_CUSTOMIZED", "num_npus": npus, "num_packages": 1}
    expected = ["a, MODEL", "b, HYBRID_DATA_MODEL"]
    assert labels(tmp_path, capsys, *rows, header=header, **chosen) == expected
