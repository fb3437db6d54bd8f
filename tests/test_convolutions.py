"""SCALE-Sim's convolution topologies as the table: m, n, k, the bytes that travel, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from scalesim.topology_utils import topologies

import gen_astrasim_workload_input as tool
from helpers import (
    MNK_INPUTS,
    PLAIN,
    collective_of,
    generate,
    layers_of_table,
    plan_of,
    read_like_astrasim,
    settings,
    write_table,
)

NEEDED = "Layer, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter"
HEADER = (
    "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter,"
    " Strides,"
)
DIRECTED = HEADER.replace("Strides,", "Stride Height, Stride Width,")
OTHER_NAMES = (
    "Layer,Ifmap height,ifmap width,filter height,filter width,channel,num filters,strides"
)
ROWS = ("a, 11, 13, 3, 2, 5, 7, 2,", "b, 8, 8, 8, 8, 1, 1, 1,", "c, 30, 20, 1, 5, 4, 9, 3,")
# a: ceil((11 - 3 + 2) / 2) x ceil((13 - 2 + 2) / 2) = 5 x 7 outputs
# c: ceil(32 / 3) x ceil(18 / 3) = 11 x 6
SIZES = [(35, 7, 30, 715), (1, 1, 64, 64), (66, 9, 20, 2400)]
Sizes = tuple[int, int, int, int]  # m, n, k, elements of the ifmaps


def read(folder: Path, text: str, parallel: str = "DATA", minibatch: int = 1) -> list[Sizes]:
    (folder / "t.csv").write_bytes(text.encode())
    layers = layers_of_table(folder / "t.csv", parallel, minibatch)
    return [(layer.m, layer.n, layer.k, layer.input_elements) for layer in layers]


def lines(*lines: str) -> str:
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(lines(HEADER, *ROWS), id="as SCALE-Sim's"),
        pytest.param(
            "\ufeff" + lines(HEADER.upper(), *ROWS).replace("\n", "\r\n"),
            id="byte-order mark, CRLF, upper case",
        ),
        pytest.param(lines(HEADER[:-1], *(row[:-1] for row in ROWS)), id="without the last comma"),
        pytest.param(lines(HEADER, " ", ",,,,,,,,", *ROWS, ""), id="blank rows and rows of commas"),
        pytest.param(lines(HEADER + ",,", *(row + ",," for row in ROWS)), id="empty extra columns"),
        pytest.param(lines(HEADER, *(row + "#dw" for row in ROWS)), id="comments"),
        pytest.param(lines(OTHER_NAMES, *ROWS), id="other names"),
        pytest.param(lines(HEADER.replace("Height", "Width", 1), *ROWS), id="IFMAP Width twice"),
        pytest.param(
            lines(DIRECTED, *(f"{row}{row.split(',')[7]}," for row in ROWS)),
            id="strides by direction",
        ),
    ],
)
def test_the_same_convolutions_in_many_spellings(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(tmp_path, text) == SIZES
    of_six = [(6 * m, n, k, 6 * elements) for m, n, k, elements in SIZES]
    assert read(tmp_path, text, minibatch=6) == of_six
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("sizes", "outputs"),
    [
        pytest.param("41,80,3,3,4,8,2,1", 20 * 78, id="41 x 80, 2 down"),
        pytest.param("41,90,3,3,4,8,2,1", 20 * 88, id="41 x 90, 2 down"),
        pytest.param("41,90,3,3,4,8,1,2", 39 * 45, id="41 x 90, 2 across"),
        pytest.param("41,90,3,3,4,8,2,2", 20 * 45, id="41 x 90, 2 both"),
        pytest.param("41,41,5,3,4,8,3,1", 13 * 39, id="5 x 3, 3 down"),
    ],
)
def test_strides_are_used_each_in_its_direction(sizes: str, outputs: int, tmp_path: Path) -> None:
    """41 high, 3 x 3: 39 places, of which with stride 2 every other is used, 20."""
    (layer,) = read(tmp_path, lines(DIRECTED, f"a,{sizes}"))
    assert layer[0] == outputs


def test_strides_are_used_each_in_its_direction_with_padding(tmp_path: Path) -> None:
    text = lines(DIRECTED + "Padding", "a,41,80,3,3,4,8,2,1,1")
    assert read(tmp_path, text) == [(21 * 80, 8, 36, 41 * 80 * 4)]


# It leaves its file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_as_scalesims_own_reader(tmp_path: Path) -> None:
    rows = []
    for i in range(20):
        filters = f"{1 + i % 5},{1 + i % 3},{i + 1},{2 * i + 1},{1 + i % 4}"
        rows.append(f"l{i},{20 + i},{31 - i},{filters},")
    table = write_table(tmp_path / "t.csv", *rows, header=HEADER)
    theirs = topologies()
    theirs.load_arrays_conv(str(table))
    theirs.topo_calc_hyperparams()
    expected = []
    for entry, sizes in zip(theirs.topo_arrays, theirs.layers_calculated_hyperparams):
        height, width, _, window = sizes
        expected.append((height * width, entry[6], window))
    layers = layers_of_table(table)
    assert [(layer.m, layer.n, layer.k) for layer in layers] == expected


def test_padding_as_pytorch_counts_it(tmp_path: Path) -> None:
    """ResNet's first layer: 224 x 224 to 112 x 112.

    And one that divides unevenly: floor((10 + 2 - 3) / 2) + 1 = 5.
    """
    rows = ["conv1,224,224,7,7,3,64,2,3", "b,10,10,3,3,4,8,2,1", "c,10,10,3,3,4,8,2,0"]
    assert read(tmp_path, lines(HEADER + "Padding", *rows)) == [
        (112 * 112, 64, 147, 224 * 224 * 3),
        (25, 8, 36, 400),
        (16, 8, 36, 400),
    ]


@pytest.mark.parametrize(
    ("columns", "named"), [("Eh,Ew", "Eh, Ew"), ("E2", "e2"), ("e2,eH", "Eh, e2")]
)
def test_sizes_of_outputs_are_ignored_with_a_warning(
    columns: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ",5" * len(columns.split(","))
    text = lines(f"{HEADER},{columns}", *(row + cells for row in ROWS))
    assert read(tmp_path, text) == SIZES
    expected = f"ignored columns, which follow from the others: {named}"
    assert capsys.readouterr().err == f"warning: {tmp_path}/t.csv:1: {expected}\n"


def test_titles_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(tmp_path, lines(HEADER, "AlexNet,", *ROWS)) == SIZES
    expected = f"warning: {tmp_path}/t.csv:2: 'AlexNet' is skipped: it looks like a title\n"
    assert capsys.readouterr().err == expected


def test_each_layer_has_its_own_strategy(tmp_path: Path) -> None:
    rows = [row + strategy for row, strategy in zip(ROWS, PLAIN)]
    table = write_table(tmp_path / "t.csv", *rows, header=HEADER + "CustomizedParallelization")
    layers = layers_of_table(table, "HYBRID_CUSTOMIZED")
    assert [layer.strategy for layer in layers] == [*PLAIN[:3]]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        pytest.param(
            lines(HEADER + "Sparsity", ROWS[0] + "2:4"),
            1,
            f"unknown column 'Sparsity', expected {NEEDED}, Strides, ",
            id="Sparsity",
        ),
        pytest.param(
            lines(HEADER + "Batch Size", ROWS[0] + "4"),
            1,
            f"unknown column 'Batch Size', expected {NEEDED}, Strides, ",
            id="Batch Size",
        ),
        pytest.param(
            lines(HEADER + "Paddings", ROWS[0] + "4"),
            1,
            "unknown column 'Paddings', did you mean Padding?",
            id="near column",
        ),
        pytest.param(
            lines(HEADER.replace("Channels,", "")),
            1,
            f"no column Channels, expected {NEEDED}, Strides",
            id="no Channels",
        ),
        pytest.param(
            lines(HEADER.replace("Strides,", "")),
            1,
            f"no column Strides, expected {NEEDED}, Strides",
            id="no Strides",
        ),
        pytest.param(
            lines(HEADER.replace("Strides", "Stride Height")),
            1,
            f"no column Stride Width, expected {NEEDED}, Stride Height, Stride Width",
            id="no Stride Width",
        ),
        pytest.param(
            lines(HEADER.replace("Strides", "Stride Width")),
            1,
            f"no column Stride Height, expected {NEEDED}, Stride Height, Stride Width",
            id="no Stride Height",
        ),
        pytest.param(
            lines(DIRECTED + "Strides"),
            1,
            "give Strides, or Stride Height and Stride Width",
            id="both strides",
        ),
        pytest.param(
            lines(HEADER + "Strides"), 1, "two columns Strides, expected one", id="column twice"
        ),
        pytest.param(
            lines(HEADER, "a,4,4,5,1,1,1,1,"),
            2,
            "a filter larger than its ifmap, expected a smaller one",
            id="filter higher than its ifmap",
        ),
        pytest.param(
            lines(HEADER, "a,4,4,1,5,1,1,1,"),
            2,
            "a filter larger than its ifmap, expected a smaller one",
            id="filter wider than its ifmap",
        ),
        pytest.param(
            lines(HEADER, "DP_1,4,4,1,1,1,1,1,"),
            2,
            "DP_1 sounds depth-wise, expected Groups: as many as Channels ",
            id="depth-wise by its name",
        ),
        pytest.param(
            lines(HEADER, "a,4,4,1,1,1,1,0,"),
            2,
            "Strides is '0', expected a whole number >= 1",
            id="stride of 0",
        ),
        pytest.param(
            lines(DIRECTED, "a,4,4,1,1,1,1,1,0,"),
            2,
            "Stride Width is '0', expected a whole number >= 1",
            id="stride width of 0",
        ),
        pytest.param(
            lines(HEADER + "Padding", "a,4,4,1,1,1,1,1,-1"),
            2,
            "Padding is '-1', expected a whole number >= 0",
            id="padding of -1",
        ),
        pytest.param(
            lines(HEADER, "a,4,4,1,1,1,1"),
            2,
            "7 columns, expected 8 as in the header",
            id="too few",
        ),
        pytest.param(
            lines(HEADER, "a,4,4,1,1,1,1,1,9"),
            2,
            "'9' in column 9, expected 8 columns as in the header",
            id="too many",
        ),
        pytest.param(
            lines(HEADER), 1, "no layers, expected one in each line below", id="no layers"
        ),
    ],
)
def test_refused(text: str, line: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(tool.UserError) as error:
        read(tmp_path, text + "\n")
    assert str(error.value).startswith(f"{tmp_path}/t.csv:{line}: {message}")


def test_a_minibatch_of_gemms_multiplies_m(tmp_path: Path) -> None:
    """So that a table of one sample is one of as many as --minibatch says."""
    header = "Layer,m,n,k,Type,Count"
    one = ["a,4,8,6,,", "b,4,4,2,BATCHED_GEMM,3x5", "c,4,4,2,BATCHED_GEMM,7", "d,4,8,6,,"]
    of_6 = ["a,24,8,6,,", "b,4,4,2,BATCHED_GEMM,18x5", "c,4,4,2,BATCHED_GEMM,42", "d,24,8,6,,"]
    table = write_table(tmp_path / "one.csv", *one, header=header)
    text = generate(tmp_path, mnk=table, minibatch=6, num_npus=4)
    assert text == generate(tmp_path, mnk=write_table(table, *of_6, header=header), num_npus=4)
    assert text != generate(tmp_path, mnk=write_table(table, *one, header=header), num_npus=4)


@pytest.mark.parametrize("parallel", PLAIN)
def test_the_bytes_of_resnet_are_those_of_its_activations(parallel: str, tmp_path: Path) -> None:
    """Minibatch 32, 16 NPUs in 2 packages, 2 bytes: height x width x channels of the ifmaps."""
    path = MNK_INPUTS / "resnet50.csv"
    rows = [list(map(int, row.split(",")[1:])) for row in path.read_text().splitlines()[1:]]
    dp = {"DATA": 16, "MODEL": 1, "HYBRID_DATA_MODEL": 2, "HYBRID_MODEL_DATA": 8}[parallel]
    chosen = settings(tmp_path, parallel=parallel, minibatch=32)
    layers = layers_of_table(path, parallel, 32)
    for layer, row in zip(layers, rows, strict=True):
        height, width, filter_height, filter_width, channels, filters, *_ = row
        plan = plan_of(layer, chosen)
        gradient = collective_of(plan.passes["input gradient"])
        weights = collective_of(plan.passes["weight gradient"])
        assert (gradient.kind == "NONE") == (parallel == "DATA")
        if gradient.kind != "NONE":
            assert gradient.bytes == 32 * height * width * channels * 2 // dp
        assert (weights.kind == "NONE") == (parallel == "MODEL")
        if weights.kind != "NONE":
            elements = filter_height * filter_width * channels * filters
            assert weights.bytes == elements * 2 // (16 // dp)


def test_a_table_of_gemms_is_as_it_was() -> None:
    for layer in layers_of_table(MNK_INPUTS / "example.csv"):
        assert layer.input_elements == layer.m * layer.k
        assert layer.images is None


def test_the_columns_of_outputs_do_not_change_the_workload_file(tmp_path: Path) -> None:
    plain = write_table(tmp_path / "plain.csv", *ROWS, header=HEADER)
    rows = [row + "1,1," for row in ROWS]
    with_outputs = write_table(tmp_path / "with.csv", *rows, header=HEADER + "Eh,Ew,")
    text = generate(tmp_path, mnk=plain, minibatch=64)
    assert generate(tmp_path, mnk=with_outputs, minibatch=64) == text
    assert len(read_like_astrasim(text)[1]) == 3
