"""The mnk reader: what it takes as the same table, and what it refuses in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import layers_of_table

FIVE = "Layer,m,n,k,CustomizedParallelization"
NEEDED = "Layer, m, n, k"
KNOWN = f"{NEEDED}, Type, Count, CustomizedParallelization"
Cells = tuple[str, int, int, int, str]  # name, m, n, k, strategy


def read(folder: Path, data: bytes, parallel: str = "DATA") -> list[Cells]:
    path = folder / "table.csv"
    path.write_bytes(data)
    layers = layers_of_table(path, parallel)
    return [(layer.name, layer.m, layer.n, layer.k, layer.strategy) for layer in layers]


def refusal(folder: Path, data: bytes, parallel: str = "DATA") -> str:
    """Return how a table is refused."""
    with pytest.raises(tool.UserError) as error:
        read(folder, data, parallel)
    return str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"Layer,m,n,k\na,1,2,3\nb,4,5,6\n", id="plain"),
        pytest.param(b"\xef\xbb\xbfLayer,m,n,k\na,1,2,3\nb,4,5,6\n", id="byte-order mark"),
        pytest.param(b"Layer,m,n,k\r\na,1,2,3\r\nb,4,5,6\r\n", id="CRLF"),
        pytest.param(b"\n\nLayer,m,n,k\n\na,1,2,3\n  \n,,,\nb,4,5,6\n\n", id="blank lines"),
        pytest.param(b"Layer,m,n,k\na,1,2,3\nb,4,5,6", id="no newline at the end"),
        pytest.param(b" LAYER , M,N ,K\n a , 1, 2 ,3\nb,4,5,6\n", id="case and blanks"),
        pytest.param(b"Layer,M,N,K,\na,1,2,3,\nb,4,5,6,\n", id="SCALE-Sim's GEMM files"),
        pytest.param(
            b"Layer Name, M, N, K,\na, 1, 2, 3,\nb, 4, 5, 6,\n", id="SCALE-Sim's other header"
        ),
        pytest.param(b"Layer,m,n,k\na,1,2,3,\nb,4,5,6,,\n", id="trailing commas in rows"),
        pytest.param(b"k,n,m,Layer\n3,2,1,a\n6,5,4,b\n", id="columns by name"),
        pytest.param(b'"Layer","m","n","k"\n"a","1","2","3"\nb, "4",5,6\n', id="quoted"),
        pytest.param(
            b"Layer,m,n,k,CustomizedParallelization\na,1,2,3,MODEL\nb,4,5,6,nonsense\n",
            id="fifth ignored",
        ),
        pytest.param(
            b"Layer,m,n,k,customizedparallelization\na,1,2,3,\nb,4,5,6,\n", id="fifth empty"
        ),
    ],
)
def test_the_same_table_in_many_spellings(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, data) == [("a", 1, 2, 3, "DATA"), ("b", 4, 5, 6, "DATA")]


def test_each_layer_has_its_own_strategy_under_hybrid_customized(tmp_path: Path) -> None:
    rows = "a,1,2,3,DATA\nb,1,2,3,model\nc,1,2,3,Hybrid_Model_Data\nd,1,2,3,HYBRD_DATA_MODEL\n"
    layers = read(tmp_path, f"{FIVE}\n{rows}".encode(), "HYBRID_CUSTOMIZED")
    strategies = ["DATA", "MODEL", "HYBRID_MODEL_DATA", "HYBRID_DATA_MODEL"]
    assert [strategy for *_, strategy in layers] == strategies


def test_spaces_in_a_name_become_underscores_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = read(tmp_path, "Layer,m,n,k\na,1,2,3\n\u00e9 b\u00a0c,1,2,3\nd e,1,2,3\n".encode())
    assert [name for name, *_ in layers] == ["a", "\u00e9_b_c", "d_e"]
    expected = f"{tmp_path}/table.csv:3: spaces in layer names become _ (and 1 more)"
    assert capsys.readouterr().err == f"warning: {expected}\n"


WHOLE = "expected a whole number >= 1"
PRINTABLE = "expected printable characters"
OTHER_CODE = "perhaps UTF-16 or a spreadsheet, expected a CSV table"
NO_HEADER = "no header, expected Layer,m,n,k"


@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        pytest.param(b"", 1, NO_HEADER, id="empty"),
        pytest.param(b"\n \n", 1, NO_HEADER, id="blank"),
        pytest.param(
            b"a,1,2,3\nb,1,2,3\n",
            1,
            "no header but 'a,1,2,3', expected one such as Layer,m,n,k",
            id="no header",
        ),
        pytest.param(b"Layer,m,n\na,1,2\n", 1, f"no column k, expected {NEEDED}", id="no k"),
        pytest.param(b"m,n,k\n1,2,3\n", 1, f"no column Layer, expected {NEEDED}", id="no layer"),
        pytest.param(
            b"Layer,m,n,n\na,1,2,3\n", 1, "two columns n, expected one", id="column twice"
        ),
        pytest.param(
            b"\nLayer,m,n,k,x\n", 2, f"unknown column 'x', expected {KNOWN}", id="unknown column"
        ),
        pytest.param(
            b"Layer,m,n,k,Typ\n", 1, "unknown column 'Typ', did you mean Type?", id="near column"
        ),
        pytest.param(
            b"Layer,m,n,k,Customized Parallelisation\n",
            1,
            "unknown column 'Customized Parallelisation', did you mean CustomizedParallelization?",
            id="near fifth column",
        ),
        pytest.param(
            b"Layer,m,n,k,Padding\n",
            1,
            f"unknown column 'Padding', expected {KNOWN}",
            id="column of convolutions",
        ),
        pytest.param(
            b"Layer,m,n,k,Eh\n", 1, f"unknown column 'Eh', expected {KNOWN}", id="Eh of GEMMs"
        ),
        pytest.param(
            b"Layer,m,n,k\n", 1, "no layers, expected one in each line below", id="no layers"
        ),
        pytest.param(
            b"Layer,m,n,k\na,1,2,3\nb,1,2\n",
            3,
            "3 columns, expected 4 as in the header",
            id="too few",
        ),
        pytest.param(
            b"Layer,m,n,k\na,1,2,3,4\n",
            2,
            "'4' in column 5, expected 4 columns as in the header",
            id="too many",
        ),
        pytest.param(
            b"Layer,m,n,k,\na,1,2,3,4\n",
            2,
            "'4' in column 5, expected 4 columns as in the header",
            id="in a column without a name",
        ),
        pytest.param(b"Layer,m,n,k\n,1,2,3\n", 2, f"layer name '', {PRINTABLE}", id="nameless"),
        pytest.param(
            b"Layer,m,n,k\na\x07,1,2,3\n", 2, rf"layer name 'a\x07', {PRINTABLE}", id="bell"
        ),
        pytest.param(b"Layer,m,n,k\na,x,2,3\n", 2, f"m is 'x', {WHOLE}", id="word"),
        pytest.param(b"Layer,m,n,k\na,1,1.5,3\n", 2, f"n is '1.5', {WHOLE}", id="1.5"),
        pytest.param(b"Layer,m,n,k\na,1,2,0\n", 2, f"k is '0', {WHOLE}", id="0"),
        pytest.param(b"Layer,m,n,k\na,-4,2,3\n", 2, f"m is '-4', {WHOLE}", id="-4"),
        pytest.param(b"Layer,m,n,k\na,+4,2,3\n", 2, f"m is '+4', {WHOLE}", id="+4"),
        pytest.param(b"Layer,m,n,k\na,1_0,2,3\n", 2, f"m is '1_0', {WHOLE}", id="1_0"),
        pytest.param(b"Layer,m,n,k\na,,2,3\n", 2, f"m is '', {WHOLE}", id="empty size"),
        pytest.param(
            "Layer,m,n,k\na,\u0663,2,3\n".encode(),
            2,
            rf"m is '\u0663', {WHOLE}",
            id="other digits",
        ),
        pytest.param(
            b"Layer,m,n,k\n\xe9,1,2,3\n", 2, f"not UTF-8, {OTHER_CODE} in UTF-8", id="Latin-1"
        ),
        pytest.param(b"\x7fELF\x02\xff", 1, f"not UTF-8, {OTHER_CODE} in UTF-8", id="binary"),
        pytest.param(
            b'Layer,m,n,k\n"a,1,2,3\n',
            2,
            "unexpected end of data, expected a CSV table",
            id="quote without end",
        ),
    ],
)
def test_refused(tmp_path: Path, data: bytes, line: int, message: str) -> None:
    assert refusal(tmp_path, data) == f"{tmp_path}/table.csv:{line}: {message}"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"Layer,m,n,k\na,1,2,3,# 4\n", id="beyond the header"),
        pytest.param(b"Layer,m,n,k,\na,1,2,3,#4\n", id="in a column without a name"),
    ],
)
def test_a_comment_after_the_last_column(data: bytes, tmp_path: Path) -> None:
    assert read(tmp_path, data) == [("a", 1, 2, 3, "DATA")]


STRATEGIES = "DATA, MODEL, HYBRID_DATA_MODEL, HYBRID_MODEL_DATA"


@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        pytest.param(
            b"Layer,m,n,k\na,1,2,3\n",
            1,
            f"no column CustomizedParallelization, expected {NEEDED}, CustomizedParallelization",
            id="no fifth column",
        ),
        *(
            pytest.param(
                f"{FIVE}\na,1,2,3,{written}\n".encode(),
                2,
                f"strategy '{written}', expected one of {STRATEGIES}",
                id=written or "empty",
            )
            for written in ("", "PIPELINE", "HYBRID_CUSTOMIZED", "HYBRID_DLRM")
        ),
    ],
)
def test_refused_under_hybrid_customized(
    tmp_path: Path, data: bytes, line: int, message: str
) -> None:
    expected = f"{tmp_path}/table.csv:{line}: {message}"
    assert refusal(tmp_path, data, "HYBRID_CUSTOMIZED") == expected


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_than_commas(separator: str, tmp_path: Path) -> None:
    header = separator.join(["Layer", "m", "n", "k"])
    with pytest.raises(tool.UserError) as error:
        read(tmp_path, f"{header}\n".encode())
    where = f"{tmp_path}/table.csv:1"
    expected = f"one column {header!a}, expected a header with commas between columns"
    assert str(error.value) == f"{where}: {expected}"
