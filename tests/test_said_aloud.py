"""What would mislead in silence: warnings and errors, word for word, and what people read."""

from __future__ import annotations

import io
import itertools
import re
import signal
import subprocess
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool
from helpers import (
    COLLECTIVES,
    FAST,
    MANY,
    MNK_INPUTS,
    PARALLEL,
    PLAIN,
    Run,
    fake_v2,
    generate,
    inside,
    is_flag_error,
    is_one_error_line,
    layers_of_table,
    plan_of_table,
    rows_of,
    run,
    seen_on_a_terminal,
    settings,
    state,
    table,
    tables,
    write_table,
)
from processes import (
    STUCK,
    base_flags,
    command_line,
    ended,
    entries,
    in_bash,
    start,
    start_command,
    wait_until_begun,
)

Capture = pytest.CaptureFixture[str]


def warnings_of(capture: Capture, folder: Path, **changes: Any) -> list[str]:
    """Generate in a folder with `settings`; return the lines on stderr."""
    generate(folder, **changes)
    return capture.readouterr().err.splitlines()


def refusal(mnk: Path, parallel: str = "DATA") -> str:
    """Return why a table is refused, without the folder's name."""
    with pytest.raises(tool.UserError) as error:
        layers_of_table(mnk, parallel)
    return str(error.value).replace(f"{mnk.parent}/", "")


# --- Resharding between GEMMs of different strategies

CUSTOMIZED = "Layer,m,n,k,CustomizedParallelization"


def two_layers(folder: Path, first: str, second: str) -> Path:
    """Write a table of two GEMMs with strategies; the second one reads 4096 x 96 elements."""
    rows = [f"a,4096,32,64,{first}", f"b,4096,128,96,{second}"]
    return write_table(folder / "t.csv", *rows, header=CUSTOMIZED)


def customized(folder: Path, mnk: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run with HYBRID_CUSTOMIZED."""
    return {"folder": folder, "mnk": mnk, "parallel": "HYBRID_CUSTOMIZED", **changes}


def test_resharding_names_the_first_pair_of_the_example(tmp_path: Path, capsys: Capture) -> None:
    mnk = MNK_INPUTS / "example_customized.csv"
    _, said = warnings_of(capsys, **customized(tmp_path, mnk))
    pair = "MLP_Bottom_0 (DATA) before MLP_Bottom_1 (MODEL)"
    lacks = "lacks forward an ALLGATHER of 65,536 bytes (and 3 more)"
    assert said == f"warning: {mnk}:3: {pair} {lacks}: no communication was added"


@pytest.mark.parametrize("parallel", PLAIN)
def test_no_resharding_where_all_layers_have_one_strategy(
    parallel: str, tmp_path: Path, capsys: Capture
) -> None:
    mnk = two_layers(tmp_path, "DATA", "MODEL")
    what = "column CustomizedParallelization is only read with --parallel=HYBRID_CUSTOMIZED"
    assert warnings_of(capsys, tmp_path, mnk=mnk, parallel=parallel) == [
        f"warning: {mnk}:1: {what}"
    ]


# --- Depth-wise convolutions by name

CONVOLUTION = (
    "Layer name,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Num Filter,Strides"
)
DEPTH_WISE = [
    *("DEPTHWISE_3", "block2_dw", "dw", "DW", "DP", "x.dp.1", "dp3", "3dw4", "conv dw"),
    *("Depth-wise", "depth_wise_1", "DepthWise2", "a-dw", "1DP"),
]
ORDINARY = [
    *("expand", "window", "dwell", "dpn92", "DPN", "updp", "depth", "wise", "depthwiser"),
    *("sandwich_1", "odw", "adp_2"),
]


@pytest.mark.parametrize("name", DEPTH_WISE)
@pytest.mark.parametrize("more", [("", ""), (",Groups", ",")], ids=["no column", "no cell"])
def test_a_depth_wise_name_needs_groups(name: str, more: tuple[str, str], tmp_path: Path) -> None:
    rows = ["a,56,56,1,1,16,64,1", f"{name},58,58,3,3,64,64,1"]
    lines = [row + more[1] for row in rows]
    mnk = write_table(tmp_path / "t.csv", *lines, header=CONVOLUTION + more[0])
    what = f"t.csv:3: {name.replace(' ', '_')} sounds depth-wise"
    expected = "expected Groups: as many as Channels (Num Filter then has those of all), or 1"
    assert refusal(mnk) == f"{what}, {expected}"


@pytest.mark.parametrize("name", DEPTH_WISE)
@pytest.mark.parametrize("groups", [1, 64])
def test_a_depth_wise_name_with_groups(name: str, groups: int, tmp_path: Path) -> None:
    row, header = f"{name},58,58,3,3,64,64,1,{groups}", f"{CONVOLUTION},Groups"
    (layer,) = layers_of_table(write_table(tmp_path / "t.csv", row, header=header))
    assert layer.groups == groups


@pytest.mark.parametrize("name", ORDINARY)
def test_other_names_of_convolutions_need_no_groups(name: str, tmp_path: Path) -> None:
    mnk = write_table(tmp_path / "t.csv", f"{name},58,58,3,3,64,64,1", header=CONVOLUTION)
    assert layers_of_table(mnk)[0].groups == 1


@pytest.mark.parametrize("name", DEPTH_WISE)
def test_a_gemm_may_have_any_name(name: str, tmp_path: Path) -> None:
    assert len(layers_of_table(write_table(tmp_path / "t.csv", f"{name},64,64,64"))) == 1


MOBILE = """\
Layer name,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Num Filter,Strides
expand,56,56,1,1,16,64,1
DEPTHWISE_1,58,58,3,3,64,1,1
project,56,56,1,1,64,16,1
"""
MOBILE_RIGHT = """\
Layer name,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Num Filter,Strides,Groups
expand,56,56,1,1,16,64,1,1
DEPTHWISE_1,58,58,3,3,64,64,1,64
project,56,56,1,1,64,16,1,1
"""


def test_what_a_depth_wise_table_comes_to_with_groups(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(MOBILE)
    assert refusal(tmp_path / "t.csv").startswith("t.csv:3: DEPTHWISE_1 sounds depth-wise, ")
    (tmp_path / "t.csv").write_text(MOBILE_RIGHT)
    summary = tmp_path / "s.csv"
    system = {"num_npus": 8, "num_packages": 1, "minibatch": 64}
    generate(tmp_path, mnk=tmp_path / "t.csv", summary_csv=summary, **system)
    (row,) = rows_of(summary, tool.Report.SUMMARY)
    assert row["compute_all"] == "8431306"


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_groups_that_are_as_many_as_the_npus_that_split_them_are_whole(
    groups: int, tmp_path: Path, capsys: Capture
) -> None:
    """Their input gradient is all on one NPU; that of fewer groups is scattered."""
    row = f"x,9,9,2,2,8,16,1,{groups}"
    mnk = write_table(tmp_path / "t.csv", row, header=f"{CONVOLUTION},Groups")
    system = {"parallel": "MODEL", "num_npus": 4, "num_packages": 1}
    said = warnings_of(capsys, tmp_path, mnk=mnk, **system)
    what = f"{groups} groups are fewer than the 4 NPUs that split the filters"
    warning = f"warning: x: {what}: cycles are approximate, collectives an upper bound"
    assert said == ([warning] if groups < 4 else [])
    (plan,) = plan_of_table(settings(tmp_path, mnk=mnk, **system)).layers
    assert bool(plan.passes["input gradient"].after) == (groups < 4)
    assert plan.passes["forward"].count == (2 if groups == 8 else 1)


# --- Attention in a table without types

ATTENTION = ["score", "attn_scores", "QK", "qkt_0", "l1.qktv", "context2", "layer 3 Context"]
NO_ATTENTION = ["qkv", "scored", "underscore", "contextual", "contexts", "aqk"]


@pytest.mark.parametrize("name", ATTENTION)
def test_a_name_of_attention_without_types(name: str, tmp_path: Path, capsys: Capture) -> None:
    mnk = write_table(tmp_path / "t.csv", "fc,64,64,64", f"{name},64,64,64", "score,64,64,64")
    *_, said = warnings_of(capsys, tmp_path, mnk=mnk)
    what = f"{mnk}:3: {name.replace(' ', '_')} sounds like attention (and 1 more)"
    advice = "products of activations have no weights: give them the Type BATCHED_GEMM"
    assert said == f"warning: {what}; {advice}"


def test_one_name_of_attention_has_no_others(tmp_path: Path, capsys: Capture) -> None:
    mnk = write_table(tmp_path / "t.csv", "score,64,64,64", "qkv,64,64,64")
    (said,) = warnings_of(capsys, tmp_path, mnk=mnk)
    assert said.startswith(f"warning: {mnk}:2: score sounds like attention; products of ")


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_names_that_are_not_of_attention(name: str, tmp_path: Path, capsys: Capture) -> None:
    mnk = write_table(tmp_path / "t.csv", f"{name},64,64,64")
    assert warnings_of(capsys, tmp_path, mnk=mnk) == []


@pytest.mark.parametrize("cell", ["", "GEMM", "COLUMN_PARALLEL"])
def test_attention_in_a_table_with_types(cell: str, tmp_path: Path, capsys: Capture) -> None:
    row = f"score,64,64,64,{cell}"
    mnk = write_table(tmp_path / "t.csv", row, header="Layer,m,n,k,Type")
    assert warnings_of(capsys, tmp_path, mnk=mnk) == []


def test_attention_as_the_name_of_a_convolution(tmp_path: Path, capsys: Capture) -> None:
    mnk = write_table(tmp_path / "t.csv", "context,58,58,3,3,64,64,1", header=CONVOLUTION)
    assert warnings_of(capsys, tmp_path, mnk=mnk, num_npus=1, num_packages=1) == []


# --- Siblings that may be one layer

QKV_APART = """\
Layer,m,n,k,Type
q,2048,4096,4096,COLUMN_PARALLEL
k,2048,4096,4096,COLUMN_PARALLEL
v,2048,4096,4096,COLUMN_PARALLEL
out,2048,4096,4096,ROW_PARALLEL
"""
QKV_FUSED = """\
Layer,m,n,k,Type
qkv,2048,12288,4096,COLUMN_PARALLEL
out,2048,4096,4096,ROW_PARALLEL
"""


@pytest.mark.parametrize(
    ("text", "size", "is_warned"),
    [
        pytest.param(QKV_APART, 67_108_864, True, id="apart"),
        pytest.param(QKV_FUSED, 33_554_432, False, id="fused"),
    ],
)
def test_siblings(text: str, size: int, is_warned: bool, tmp_path: Path, capsys: Capture) -> None:
    mnk, summary = tmp_path / "t.csv", tmp_path / "s.csv"
    mnk.write_text(text)
    said = warnings_of(capsys, tmp_path, mnk=mnk, parallel="MODEL", summary_csv=summary)
    (row,) = rows_of(summary, tool.Report.SUMMARY)
    assert row["allreduce_bytes"] == str(size)
    what = "k seems to read the input of q (and 1 more), and reduces its gradient again"
    warning = f"warning: {mnk}:3: {what}: give such layers as one if the model fuses them"
    assert said == ([warning] if is_warned else [])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"parallel": "DATA"}, id="DATA"),
        pytest.param({"parallel": "MODEL", "inference": True}, id="inference"),
        pytest.param({"parallel": "MODEL", "num_npus": 1, "num_packages": 1}, id="one NPU"),
    ],
)
def test_siblings_without_a_gradient_to_reduce(
    changes: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "t.csv").write_text(QKV_APART)
    assert warnings_of(capsys, tmp_path, mnk=tmp_path / "t.csv", **changes) == []


@pytest.mark.parametrize(
    "second",
    ["k,2048,4096,4097", "k,2049,4096,4096"],
    ids=["another k", "another m"],
)
def test_columns_of_other_sizes_are_no_siblings(
    second: str, tmp_path: Path, capsys: Capture
) -> None:
    rows = ["q,2048,4096,4096,COLUMN_PARALLEL", f"{second},COLUMN_PARALLEL"]
    mnk = write_table(tmp_path / "t.csv", *rows, header="Layer,m,n,k,Type")
    said = warnings_of(capsys, tmp_path, mnk=mnk, parallel="MODEL")
    assert not [line for line in said if "seems to read the input of" in line]


# --- Traces


def write_traces(capture: Capture, folder: Path, npus: int, prefix: str) -> list[str]:
    """Write traces of a small table; return the lines on stderr."""
    mnk = write_table(folder / "t.csv", "a,64,64,64")
    trace = {"chakra_et": folder / prefix, "clock_mhz": 1.0}
    return warnings_of(capture, folder, mnk=mnk, num_npus=npus, num_packages=1, **trace)


@pytest.mark.parametrize("prefix", ["et/x", "x", "a+b(1)[2].*", "x.0.et"])
def test_traces_of_a_larger_earlier_run(prefix: str, tmp_path: Path, capsys: Capture) -> None:
    assert write_traces(capsys, tmp_path, 32, prefix) == []
    assert write_traces(capsys, tmp_path, 32, prefix) == []
    what = f"24 traces of a larger system with this prefix, the first {tmp_path}/{prefix}.8.et"
    warning = f"warning: {what}: ASTRA-sim 2.x may read them too"
    assert write_traces(capsys, tmp_path, 8, prefix) == [warning]
    for npu in range(9, 32):
        (tmp_path / f"{prefix}.{npu}.et").unlink()
    (said,) = write_traces(capsys, tmp_path, 8, prefix)
    assert said.startswith("warning: 1 trace of a larger system with this prefix, the first ")
    (tmp_path / f"{prefix}.8.et").unlink()
    assert write_traces(capsys, tmp_path, 8, prefix) == []


def test_files_that_are_not_traces_of_this_prefix(tmp_path: Path, capsys: Capture) -> None:
    for name in ("y.9.et", "x.9.et.bak", "xx.9.et", "x.9.txt", "x.one.et", "axb.9.et", "x9.et"):
        (tmp_path / name).write_text("")
    assert write_traces(capsys, tmp_path, 8, "x") == []
    assert write_traces(capsys, tmp_path, 8, "a.b") == []
    assert write_traces(capsys, tmp_path, 8, "a?b") == []


def test_traces_for_one_npu(tmp_path: Path) -> None:
    result = run(tmp_path, FAST, "--num_npus=1", "--chakra_et=x", "--clock_mhz=1")
    warning = "warning: traces for 1 NPU: ASTRA-sim 2.x takes no network of one NPU\n"
    assert (result.status, result.err) == (0, warning)
    assert (tmp_path / "x.0.et").exists()


def test_too_many_traces_are_refused(tmp_path: Path) -> None:
    flags = [f"--num_npus={2**20 + 1}", "--chakra_et=x", "--clock_mhz=1000"]
    result = run(tmp_path, FAST, *flags, "--dry_run")
    assert is_flag_error(result), result
    expected = "that many traces are too many, expected at most 1048576"
    assert f"flags num_npus={2**20 + 1}, chakra_et=x: {expected}\n" in result.err


def test_without_traces_there_may_be_more_npus(tmp_path: Path) -> None:
    result = run(tmp_path, FAST, f"--num_npus={2**20 + 1}", "--parallel=DATA")
    assert result.status == 0, result


# --- What is no table

SHEET = io.BytesIO()
with zipfile.ZipFile(SHEET, "w") as sheet:
    sheet.writestr(zipfile.ZipInfo("xl/sheet1.xml"), "<a/>\n" * 9)
PLAIN_TABLE = "Layer,m,n,k\na,64,64,64\n"
NOT_UTF_8 = "perhaps UTF-16 or a spreadsheet, expected a CSV table in UTF-8"
COMMAS = "expected a header with commas between columns"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(
            b"64 32 147 1\n3136 64 64 3\n",
            f"t.csv:1: one column '64 32 147 1', {COMMAS}",
            id="blanks",
        ),
        pytest.param(
            b"\nLayer\tm\tn\tk\na\t1\t1\t1\n",
            f"t.csv:2: one column 'Layer\\tm\\tn\\tk', {COMMAS}",
            id="tabs",
        ),
        pytest.param(
            b"Layer;m;n;k\na;1;1;1\n", f"t.csv:1: one column 'Layer;m;n;k', {COMMAS}", id=";"
        ),
        pytest.param(
            b"conv,32,32,3,3,3,16,1\ngemm,64,10,128\nactivation,relu\n",
            "t.csv:1: no header but 'conv,32,32,3,3,3,16,1', expected one such as Layer,m,n,k",
            id="a layer",
        ),
        pytest.param(
            b"conv1,64,32,147\n",
            "t.csv:1: no header but 'conv1,64,32,147', expected one such as Layer,m,n,k",
            id="only a layer",
        ),
        pytest.param(
            PLAIN_TABLE.encode("utf-16"), f"t.csv:1: not UTF-8, {NOT_UTF_8}", id="UTF-16 with BOM"
        ),
        pytest.param(
            PLAIN_TABLE.encode("utf-16-le"),
            f"t.csv: a NUL character, perhaps of {NOT_UTF_8.removeprefix('perhaps ')}",
            id="UTF-16 without BOM",
        ),
        pytest.param(SHEET.getvalue(), f"t.csv:1: not UTF-8, {NOT_UTF_8}", id="xlsx"),
        pytest.param(
            f"{PLAIN_TABLE}b,64,64,64\nk\u00e4se,64,64,64\n".encode("latin-1"),
            f"t.csv:4: not UTF-8, {NOT_UTF_8}",
            id="latin-1",
        ),
        pytest.param(b"", "t.csv:1: no header, expected Layer,m,n,k", id="nothing"),
    ],
)
def test_what_is_no_table_is_said(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    assert refusal(tmp_path / "t.csv") == message


@pytest.mark.parametrize("name", ["name", "Name", "NAME", "Layer", "layer name"])
@pytest.mark.parametrize("size", ["64", "64.0"])
def test_a_table_as_pandas_writes_it(name: str, size: str, tmp_path: Path) -> None:
    header = f"{name},m,n,k,Type,Count"
    row = f"a,{size},{size},{size},BATCHED_GEMM,{size}"
    (layer,) = layers_of_table(write_table(tmp_path / "t.csv", row, header=header))
    assert (layer.name, layer.m, layer.n, layer.k, layer.products) == ("a", 64, 64, 64, 64)


@pytest.mark.parametrize("size", ["64.00", "64.5", "64.", ".0", "0.0", "6.4e1", "64.0.0", "-64.0"])
def test_other_fractions_are_refused(size: str, tmp_path: Path) -> None:
    mnk = write_table(tmp_path / "t.csv", f"a,1,{size},1")
    assert refusal(mnk) == f"t.csv:2: n is '{size}', expected a whole number >= 1"


# --- Messages

DIGITS = "1" * 31


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        pytest.param(
            "layer,M,N,K,TYPE",
            "a,1,1,1,ROWPARALLEL",
            "t.csv:2: unknown type 'ROWPARALLEL', did you mean ROW_PARALLEL?",
            id="a type",
        ),
        pytest.param(
            "layer,M,N,K,typ", "a,1,1,1,", "t.csv:1: unknown column 'typ', did you mean Type?",
            id="a column",
        ),
        pytest.param(
            "LAYER,M,N,K,COUNTS", "a,1,1,1,",
            "t.csv:1: unknown column 'COUNTS', did you mean Count?", id="another column",
        ),
        pytest.param(
            "layer,m,n,k,Sparsity", "a,1,1,1,",
            "t.csv:1: unknown column 'Sparsity', expected Layer, m, n, k, Type, Count,"
            " CustomizedParallelization", id="a column like none",
        ),
        pytest.param(
            "LAYER,M,N,K,type,TYPE", "a,1,1,1,,",
            "t.csv:1: two columns Type, expected one", id="a column twice",
        ),
        pytest.param(
            "name,m,n,k,layer", "a,1,1,1,b",
            "t.csv:1: two columns Layer, expected one", id="two names",
        ),
        pytest.param(
            "name,M,N", "a,1,1", "t.csv:1: no column k, expected Layer, m, n, k", id="no k"
        ),
        pytest.param(
            "LAYER,m,n,k,type,count", "a,1,1,1,,3",
            "t.csv:2: Count is '3', expected none with type GEMM", id="a count",
        ),
        pytest.param(
            "layer,m,n,k,type,count", "a,1,1,1,EXPERT_UP,",
            "t.csv:2: no Count, expected the number of experts", id="no count",
        ),
        pytest.param(
            CONVOLUTION.lower(), "a,4,4,1,1,1,x,1",
            "t.csv:2: Num Filter is 'x', expected a whole number >= 1", id="filters",
        ),
        pytest.param(
            f"{CONVOLUTION.upper()},GROUPS", "a,4,4,1,1,3,4,1,2",
            "t.csv:2: Channels is 3, expected a multiple of 2 groups", id="groups",
        ),
        pytest.param(
            CONVOLUTION.lower().replace("ifmap width", "padding"), "a,4,4,1,1,1,1,1",
            "t.csv:1: no column IFMAP Width, expected Layer, IFMAP Height, IFMAP Width,"
            " Filter Height, Filter Width, Channels, Num Filter, Strides", id="no width",
        ),
        pytest.param(
            "Layer,m,n,k", f"a,{DIGITS},1,1",
            f"t.csv:2: m is '{DIGITS}', expected at most 30 digits", id="31 digits",
        ),
        pytest.param(
            "Layer,m,n,k", f"a,{DIGITS}.0,1,1",
            f"t.csv:2: m is '{DIGITS}.0', expected at most 30 digits", id="31 digits and .0",
        ),
        pytest.param(
            "Layer,m,n,k,Type,Count", f"a,1,1,1,BATCHED_GEMM,{DIGITS}",
            f"t.csv:2: Count is '{DIGITS}', expected at most 30 digits,"
            " or samples x heads such as 1536x96", id="a count of 31 digits",
        ),
        pytest.param(
            "Layer,m,n,k", f"a,1,{'9' * 5000},1",
            f"t.csv:2: n is '{'9' * 60}'..., expected at most 30 digits", id="5000 digits",
        ),
    ],
)  # fmt: skip
def test_columns_are_spelled_as_people_write_them(
    header: str, row: str, message: str, tmp_path: Path
) -> None:
    assert refusal(write_table(tmp_path / "t.csv", row, header=header)) == message


def test_the_column_of_strategies_is_spelled_as_people_write_it(tmp_path: Path) -> None:
    mnk = write_table(tmp_path / "t.csv", "a,1,1,1")
    expected = "expected Layer, m, n, k, CustomizedParallelization"
    message = refusal(mnk, "HYBRID_CUSTOMIZED")
    assert message == f"t.csv:1: no column CustomizedParallelization, {expected}"


def test_30_digits_are_a_size(tmp_path: Path) -> None:
    (layer,) = layers_of_table(write_table(tmp_path / "t.csv", f"a,{'9' * 30},1,1"))
    assert layer.m == 10**30 - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("arrayheight: x\n", "ArrayHeight is 'x', expected a whole", id="height"),
        pytest.param("ARRAYWIDTH: 0\n", "ArrayWidth is '0', expected a whole", id="width"),
        pytest.param(
            f"ArrayHeight: {DIGITS}\n",
            f"ArrayHeight is '{DIGITS}', expected at most 30 digits",
            id="31 digits",
        ),
        pytest.param("DATAFLOW: x\n", "Dataflow is 'x', expected os, ws or is", id="dataflow"),
        pytest.param("bandwidth: x\n", "Bandwidth is 'x', expected a whole", id="bandwidth"),
    ],
)
def test_keys_are_spelled_as_people_write_them(text: str, message: str, tmp_path: Path) -> None:
    given = {"arrayheight": "8", "arraywidth": "8", "dataflow": "ws"}
    key, _, value = text.strip().partition(": ")
    given[key.lower()] = value
    lines = "".join(f"{key}: {value}\n" for key, value in given.items())
    (tmp_path / "c.cfg").write_text(f"[architecture_presets]\n{lines}")
    with pytest.raises(tool.UserError) as error:
        tool.Config.read(tmp_path / "c.cfg").accelerator()
    assert str(error.value).startswith(f"{tmp_path}/c.cfg: {message}")


def test_an_unknown_key_is_spelled_as_it_was_written(tmp_path: Path, capsys: Capture) -> None:
    lines = "ArrayHeight: 8\nArrayWidth: 8\nDataflow: ws\nTimeLinearModel: x\n"
    (tmp_path / "c.cfg").write_text(f"[architecture_presets]\n{lines}")
    tool.Config.read(tmp_path / "c.cfg")
    names = "[architecture_presets] TimeLinearModel; only cycles are read from its results"
    what = f"keys unknown here are passed on to SCALE-Sim: {names}"
    assert capsys.readouterr().err == f"warning: {tmp_path}/c.cfg: {what}\n"


# A folder whose name would colour a terminal, with two blanks; and how it is printed.
LOUD, QUIET = "a  b\x1b[31m\u202e\r", "a  b\\x1b[31m\\u202e\\r"


def unprintable(text: str) -> list[str]:
    """Return the characters of a text that a terminal might obey."""
    return [each for each in text if not each.isprintable() and each != "\n"]


@pytest.fixture
def loud(tmp_path: Path) -> Path:
    """Return a folder with such a name, and a table with one too."""
    folder = tmp_path / LOUD
    folder.mkdir()
    write_table(folder / f"{LOUD}.csv", "a b,66,64,64")
    return folder


def run_exactly(folder: Path, *flags: str) -> Run:
    """Run the script; a carriage return in what it prints stays one."""
    command = command_line(*flags, "--cache_dir=")
    done = subprocess.run(command, cwd=folder, capture_output=True, stdin=subprocess.DEVNULL)
    return Run(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_nothing_unprintable_is_printed_of_what_was_done(loud: Path) -> None:
    flags = [f"--mnk={LOUD}.csv", f"--output_file={LOUD}", f"--chakra_et=x{LOUD}"]
    files = [f"--summary_csv=s{LOUD}", "--clock_mhz=1000", "--num_npus=4"]
    result = run_exactly(loud, FAST, *flags, *files)
    assert result.status == 0, result
    assert unprintable(result.out + result.err) == []
    parent = f"{loud.parent}/{QUIET}"
    assert f"warning: {parent}/{QUIET}.csv:2: spaces in layer names become _\n" in result.err
    for line in (
        f"wrote {parent}/{QUIET}: ",
        f"wrote 4 traces of 1 training step: {parent}/x{QUIET}.<npu>.et\n",
        f"wrote a row in {parent}/s{QUIET}\n",
        f"wrote details in {parent}/outputs/DATA/{QUIET}\n",
    ):
        assert f"\n{line}" in result.out
    assert (loud / LOUD).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--mnk=none"], "none: No such file or directory", id="no table"),
        pytest.param([f"--mnk={LOUD}"], f"{QUIET}: No such file or directory", id="its name"),
        pytest.param(
            [f"--output_file=../{LOUD}"], f"{QUIET} is a folder, expected a file", id="a folder"
        ),
        pytest.param([f"--scalesim_config={LOUD}.csv"], f"{QUIET}.csv: ", id="no config"),
        pytest.param(
            [f"--output_file={LOUD}.csv/x"],
            f"{QUIET}.csv is a file, expected a folder",
            id="below a file",
        ),
        pytest.param([f"--summary_csv={LOUD}.csv"], f"{QUIET}.csv is --mnk and", id="twice"),
        pytest.param(
            [f"--gemm_cycles={LOUD}.csv"], f"{QUIET}.csv:1: no column cycles", id="cycles"
        ),
    ],
)
def test_nothing_unprintable_is_printed_of_what_is_wrong(
    flags: list[str], message: str, loud: Path
) -> None:
    result = run_exactly(loud, FAST, f"--mnk={LOUD}.csv", *flags)
    assert result.status == 1
    assert unprintable(result.out + result.err) == []
    assert f"{loud.parent}/{QUIET}" in result.err
    assert message in result.err.splitlines(keepends=True)[-1]


@pytest.mark.parametrize(
    "flag", ["--output_file={}/", "--run_name=/{}", "--parallel={}", "--num_npus={}", "--{}"]
)
def test_nothing_unprintable_of_a_wrong_flag_is_printed(flag: str, tmp_path: Path) -> None:
    result = run(tmp_path, FAST, flag.format("a\x1b[31mb"))
    assert is_flag_error(result), result
    assert "a\\x1b[31mb" in result.err
    assert result.err.replace("\n", "").isprintable()


@pytest.mark.parametrize("flag", ["--output_file", "--summary_csv", "--chakra_et"])
def test_an_output_below_a_file(flag: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    before = state(tmp_path)
    result = run(tmp_path, FAST, f"{flag}=f/d/x", "--time_unit=us", "--clock_mhz=1000")
    assert is_one_error_line(result), result
    assert result.err.endswith(f"error: {tmp_path}/f is a file, expected a folder\n")
    assert state(tmp_path) == before


@pytest.mark.parametrize("flag", ["--output_file=w", "--output_file=/dev/null"])
def test_a_deleted_current_folder(flag: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    program = 'cd gone; rmdir ../gone; exec "$@"'
    result = ended(start_command(tmp_path, in_bash(program, FAST, "--cache_dir=", flag)))
    assert is_one_error_line(result), result
    assert result.err == "error: the current folder has been deleted\n"


@pytest.mark.parametrize("has_cache", [True, False], ids=["cache", "no cache"])
def test_after_ctrl_c_it_says_how_to_go_on(has_cache: bool, tmp_path: Path) -> None:
    fake = fake_v2(tmp_path / "stuck", STUCK if has_cache else "time.sleep(600)")
    flags = [*base_flags(tmp_path, seconds=0), f"--scalesim_path={fake}", "--jobs=3"]
    running = start(tmp_path, *flags, *([] if has_cache else ["--cache_dir="]))
    wait_until_begun(running, 2 if has_cache else 0, tmp_path / "cache", fake)
    running.send_signal(signal.SIGINT)
    result = ended(running)
    assert (result.status, result.out) == (-signal.SIGINT, "")
    expected = "interrupted: 0 of 12 GEMMs finished\n"
    if has_cache:
        kept = len(entries(tmp_path / "cache"))
        (folder,) = (tmp_path / "cache").iterdir()
        done = f"{kept} of 12 GEMMs finished and cached in {folder}"
        expected = f"interrupted: {done}: run the same command to go on\n"
    assert result.err == expected


# --- The printed table


def printed_by(capture: Capture, folder: Path, **changes: Any) -> list[str]:
    """Return the lines that a dry run prints, but those about what it would do."""
    with inside(folder):
        tool.run(settings(folder, dry_run=True, **changes))
    lines = capture.readouterr().out.splitlines()
    return list(itertools.takewhile(lambda line: not line.startswith("dry run"), lines))


@pytest.mark.parametrize("parallel", PLAIN)
@pytest.mark.parametrize("name", ["example", "bert_large", "gpt3_175b", "gpt3_175b_decode"])
@pytest.mark.parametrize("network", [(16, 2), (1024, 128)], ids=["16 NPUs", "1024 NPUs"])
def test_the_printed_table_fits_80_columns(
    name: str, parallel: str, network: tuple[int, int], tmp_path: Path, capsys: Capture
) -> None:
    mnk = MNK_INPUTS / f"{name}.csv"
    system = {"parallel": parallel, "num_npus": network[0], "num_packages": network[1]}
    lines = printed_by(capsys, tmp_path, mnk=mnk, inference="decode" in name, **system)
    assert len(lines) > 10
    assert [line for line in lines if len(line) > 80] == []


def test_the_printed_table_of_own_strategies_fits_80_columns(
    tmp_path: Path, capsys: Capture
) -> None:
    mnk = MNK_INPUTS / "example_customized.csv"
    lines = printed_by(capsys, **customized(tmp_path, mnk))
    assert "MLP_Bottom_1 × 2, MODEL" in lines
    assert max(len(line) for line in lines) <= 80


def test_equal_layers_are_merged_wherever_they_stand(tmp_path: Path, capsys: Capture) -> None:
    rows = ["a,64,64,64", "b,64,64,32", "c,64,64,64", "d,32,64,64", "e,64,64,32", "f,64,64,64"]
    lines = printed_by(capsys, tmp_path, mnk=write_table(tmp_path / "t.csv", *rows))
    labels = [line for line in lines if re.match("[a-f]( ×|$)", line)]
    assert labels == ["a × 3", "b × 2", "d"]
    at = lines.index("a × 3")
    passes = [line[:14].rstrip() for line in lines[at + 1 : at + 4]]
    assert passes == ["  forward", "  input grad", "  weight grad"]


# --- Progress


def test_progress_fits_80_columns_and_its_time_moves(tmp_path: Path) -> None:
    """While the first two GEMMs run, and nothing is finished."""
    fake = fake_v2(tmp_path / "fake", "time.sleep(3.5)\nreport(HEADER + '0, 321, 0, 1.5,\\n')")
    rows = ["a,64,64,64", "b,64,64,64"]
    flags = [f"--mnk={write_table(tmp_path / 't.csv', *rows)}", f"--scalesim_path={fake}"]
    flags += ["--num_npus=2", "--jobs=2", "--cache_dir="]
    lines = re.split(r"[\r\n]+", seen_on_a_terminal(tmp_path, *flags, columns=80))
    assert [line for line in lines if len(line) > 80] == []
    assert lines[0].startswith("simulating: 2 GEMMs, ")
    waiting = [line for line in lines if line.startswith("0 of 2 GEMMs, 2 running |")]
    times = {re.findall(r"\| (\d\d:\d\d) of ", line)[0] for line in waiting}
    assert len(times - {"00:00"}) >= 2, times


# --- Bytes by network


def sent_by_table(kind: str, size: int, group: tuple[int, int]) -> tuple[Fraction, Fraction]:
    """Return what one NPU sends within its package and between packages, unrounded."""
    within, between = group
    members = within * between
    return {
        "ALLREDUCE": (
            Fraction(2 * size * (within - 1), within),
            Fraction(2 * size * (between - 1), members),
        ),
        "REDUCESCATTER": (
            Fraction(size * (within - 1), within),
            Fraction(size * (between - 1), members),
        ),
        "ALLGATHER": (
            Fraction(size * between * (within - 1)),
            Fraction(size * (between - 1)),
        ),
        "ALLTOALL": (
            Fraction(size * (within - 1), members),
            Fraction(size * (between - 1), between),
        ),
    }[kind]


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("group", [(8, 2), (4, 3), (8, 1), (1, 8), (3, 5), (1, 1)])
@pytest.mark.parametrize("size", [1, 5, 7, 480, 1001, 2**33 + 1])
def test_what_a_collective_sends_by_network(kind: str, group: tuple[int, int], size: int) -> None:
    collective = tool.Collective(kind, size, *group)
    within, between = sent_by_table(kind, size, group)
    assert collective.sent_bytes == int(within + between)
    assert collective.sent_between_packages == int(between)


def collectives_by_hand(
    parallel: str, m: int, n: int, k: int, network: tuple[int, int]
) -> list[tuple[str, int, tuple[int, int]]]:
    """Return the kinds, bytes and groups of a layer's collectives, of 2-byte elements."""
    within, between = network
    one, all_npus = (1, 1), network
    rows, columns = {
        "DATA": (all_npus, one),
        "MODEL": (one, all_npus),
        "HYBRID_DATA_MODEL": ((1, between), (within, 1)),
        "HYBRID_MODEL_DATA": ((within, 1), (1, between)),
    }[parallel]
    dp, mp = rows[0] * rows[1], columns[0] * columns[1]
    found = []
    if parallel != "DATA":
        found.append(("ALLGATHER", m * n * 2 // (dp * mp), columns))
        found.append(("REDUCESCATTER", m * k * 2 // dp, columns))
    if parallel != "MODEL":
        found.append(("ALLREDUCE", n * k * 2 // mp, rows))
    return found


@pytest.mark.parametrize("parallel", PLAIN)
@pytest.mark.parametrize("network", [(8, 2), (3, 4), (16, 1), (1, 16)])
def test_bytes_by_network_in_the_summary_and_in_the_totals(
    parallel: str, network: tuple[int, int], tmp_path: Path, capsys: Capture
) -> None:
    sizes = [(144, 96, 480), (50, 70, 90)]
    mnk = write_table(tmp_path / "t.csv", *(f"l,{m},{n},{k}" for m, n, k in sizes))
    system = {"num_npus": network[0] * network[1], "num_packages": network[1]}
    summary = tmp_path / "s.csv"
    generate(tmp_path, mnk=mnk, parallel=parallel, summary_csv=summary, **system)
    sent = between = 0
    for m, n, k in sizes:
        for kind, size, group in collectives_by_hand(parallel, m, n, k, network):
            parts = sent_by_table(kind, size, group)
            sent += int(sum(parts))
            between += int(parts[1])
    assert sent > 0
    (row,) = rows_of(summary, tool.Report.SUMMARY)
    found = [int(row[f"sent_{name}"]) for name in ("bytes", "within_package", "between_packages")]
    assert found == [sent, sent - between, between]
    out = capsys.readouterr().out
    assert re.search(rf"\nsent within its package +{sent - between:,}  bytes\n", out)
    assert re.search(rf"\nsent between packages +{between:,}  bytes\n", out)


@given(
    layers=tables(st.integers(1, 5000)),
    parallel=PARALLEL,
    within=st.integers(1, 9),
    between=st.integers(1, 9),
)
@MANY
def test_what_is_sent_within_and_between_packages_is_what_is_sent(
    layers: Any, parallel: str, within: int, between: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mnk = tmp_path_factory.getbasetemp() / "any.csv"
    mnk.write_bytes(table(layers))
    system = {"num_npus": within * between, "num_packages": between}
    plan = plan_of_table(settings(mnk.parent, mnk=mnk, parallel=parallel, **system))
    assert 0 <= plan.sent_between_packages <= plan.sent_bytes
    if between == 1:
        assert plan.sent_between_packages == 0
    if within == 1:
        assert plan.sent_between_packages == plan.sent_bytes


@pytest.mark.parametrize(
    ("parallel", "sharding", "within", "between"),
    [
        pytest.param("DATA", "HYBRID_SHARD", 913_217_421_312, 86_293_610_496, id="HYBRID_SHARD"),
        pytest.param("HYBRID_DATA_MODEL", "FULL_SHARD", None, 129_440_415_744, id="FULL_SHARD"),
    ],
)
def test_what_gpt_3_sends_between_packages(
    parallel: str, sharding: str, within: int | None, between: int, tmp_path: Path
) -> None:
    system = {"num_npus": 1024, "num_packages": 128, "parallel": parallel}
    shards = {"sharding_strategy": sharding, "chakra_et": tmp_path / "x", "output_file": None}
    plan = plan_of_table(settings(tmp_path, mnk=MNK_INPUTS / "gpt3_175b.csv", **system, **shards))
    assert plan.sent_between_packages == between
    if within:
        assert plan.sent_bytes - plan.sent_between_packages == within
