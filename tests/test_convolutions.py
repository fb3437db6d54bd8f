"""SCALE-Sim's convolution topologies as the table: m, n, k, the bytes that really travel, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from scalesim.topology_utils import topologies

import gen_astrasim_workload_input as tool
from helpers import MNK_INPUTS, PLAIN, is_one_error_line, run, settings, shards_of, write_table

HEADER = "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter, Strides,"
ROWS = ("a, 11, 13, 3, 2, 5, 7, 2,", "b, 8, 8, 8, 8, 1, 1, 1,", "c, 30, 20, 1, 5, 4, 9, 3,")
# a: ceil((11 - 3 + 2) / 2) x ceil((13 - 2 + 2) / 2) = 5 x 7 outputs; c: ceil(32 / 3) x ceil(18 / 3) = 11 x 6
SIZES = [(35, 7, 30, 715), (1, 1, 64, 64), (66, 9, 20, 2400)]


def read(
    folder: Path, text: str, parallel: str = "DATA", minibatch: int = 1
) -> list[tuple[int, int, int, int]]:
    (folder / "t.csv").write_bytes(text.encode())
    layers = tool.read_layers(folder / "t.csv", parallel, minibatch)
    return [(layer.m, layer.n, layer.k, layer.inputs) for layer in layers]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\n".join([HEADER, *ROWS]), id="as SCALE-Sim's"),
        pytest.param(
            "\ufeff" + "\r\n".join([HEADER.upper(), *ROWS]), id="byte-order mark, CRLF, upper case"
        ),
        pytest.param(
            "\n".join([HEADER[:-1], *(row[:-1] for row in ROWS)]), id="without the last comma"
        ),
        pytest.param(
            "\n".join([HEADER, " ", ",,,,,,,,", *ROWS, ""]), id="blank rows and rows of commas"
        ),
        pytest.param(
            "\n".join([HEADER + ",,", *(row + ",," for row in ROWS)]), id="empty extra columns"
        ),
        pytest.param("\n".join([HEADER, *(row + "#dw" for row in ROWS)]), id="comments"),
        pytest.param(
            "\n".join(
                [
                    "Layer,Ifmap height,ifmap width,filter height,filter width,channel,num filters,strides",
                    *ROWS,
                ]
            ),
            id="other names",
        ),
        pytest.param(
            "\n".join([HEADER.replace("Height", "Width", 1), *ROWS]), id="IFMAP Width twice"
        ),
    ],
)
def test_the_same_convolutions_in_many_spellings(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(tmp_path, text) == SIZES
    assert read(tmp_path, text, minibatch=6) == [
        (6 * m, n, k, 6 * inputs) for m, n, k, inputs in SIZES
    ]
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # it leaves its file open
def test_as_scalesims_own_reader(tmp_path: Path) -> None:
    rows = [
        f"l{i},{20 + i},{31 - i},{1 + i % 5},{1 + i % 3},{i + 1},{2 * i + 1},{1 + i % 4},"
        for i in range(20)
    ]
    table = write_table(tmp_path / "t.csv", *rows, header=HEADER)
    theirs = topologies()
    theirs.load_arrays_conv(str(table))
    theirs.topo_calc_hyperparams()
    expected = [
        (height * width, entry[6], window)
        for entry, (height, width, _, window) in zip(
            theirs.topo_arrays, theirs.layers_calculated_hyperparams
        )
    ]
    assert [(layer.m, layer.n, layer.k) for layer in tool.read_layers(table, "DATA", 1)] == expected


def test_padding_as_pytorch_counts_it(tmp_path: Path) -> None:
    """ResNet's first layer: 224 x 224 to 112 x 112; and one that divides unevenly, floor((10 + 2 - 3) / 2) + 1 = 5."""
    text = (
        HEADER + "Padding\nconv1,224,224,7,7,3,64,2,3\nb,10,10,3,3,4,8,2,1\nc,10,10,3,3,4,8,2,0\n"
    )
    assert read(tmp_path, text.replace("\nPadding", "Padding")) == [
        (112 * 112, 64, 147, 224 * 224 * 3),
        (25, 8, 36, 400),
        (16, 8, 36, 400),
    ]


def test_ignored_columns_and_titles_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join([HEADER + ",,Eh,Ew", "AlexNet,", *(row + ",,5,5" for row in ROWS)])
    assert read(tmp_path, text) == SIZES
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/t.csv:1: ignored columns: eh, ew\n"
        f"warning: {tmp_path}/t.csv:2: 'AlexNet' is taken for a title\n"
    )


def test_each_layer_has_its_own_strategy(tmp_path: Path) -> None:
    rows = [row + strategy for row, strategy in zip(ROWS, PLAIN)]
    table = write_table(tmp_path / "t.csv", *rows, header=HEADER + "CustomizedParallelization")
    assert [layer.strategy for layer in tool.read_layers(table, "HYBRID_CUSTOMIZED", 1)] == list(
        PLAIN[:3]
    )


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            HEADER + "Sparsity\n" + ROWS[0] + "2:4\n",
            1,
            "column sparsity, expected a table without it",
        ),
        (HEADER + "Batch Size\n" + ROWS[0] + "4\n", 1, "column batch size, expected"),
        (HEADER.replace("Channels,", "") + "\n", 1, "header 'layer,ifmap height,"),
        (HEADER + "Strides\n", 1, "header 'layer,ifmap height,"),
        (
            HEADER + "\na,4,4,5,1,1,1,1,\n",
            2,
            "depth-wise (DP), or a filter larger than its ifmap, expected neither",
        ),
        (
            HEADER + "\nDP_1,4,4,1,1,1,1,1,\n",
            2,
            "depth-wise (DP), or a filter larger than its ifmap, expected neither",
        ),
        (HEADER + "\na,4,4,1,1,1,1,0,\n", 2, "strides is '0', expected a whole number >= 1"),
        (
            HEADER + "Padding\na,4,4,1,1,1,1,1,-1\n",
            2,
            "padding is '-1', expected a whole number >= 0",
        ),
        (HEADER + "\na,4,4,1,1,1,1\n", 2, "7 columns, expected 8 as in the header"),
        (HEADER + "\na,4,4,1,1,1,1,1,9\n", 2, "9 columns, expected 8 as in the header"),
        (HEADER + "\n", 1, "no layers, expected one in each line below"),
    ],
)
def test_refused(text: str, line: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(tool.UserError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/t.csv:{line}: {message}")


def test_a_minibatch_is_for_convolutions(tmp_path: Path) -> None:
    result = run(tmp_path, "--cycle_model=analytical", "--minibatch=2")
    assert is_one_error_line(result)
    assert "--minibatch=2 with GEMMs, whose m holds it, expected convolutions" in result.err


@pytest.mark.parametrize("parallel", PLAIN)
def test_the_bytes_of_resnet_are_those_of_its_activations(parallel: str, tmp_path: Path) -> None:
    """Minibatch 32, 16 NPUs in 2 packages, 2 bytes: activations by height x width x channels of the ifmap."""
    path = MNK_INPUTS / "resnet50.csv"
    rows = [list(map(int, row.split(",")[1:])) for row in path.read_text().splitlines()[1:]]
    dp = {"DATA": 16, "MODEL": 1, "HYBRID_DATA_MODEL": 2, "HYBRID_MODEL_DATA": 8}[parallel]
    chosen = settings(tmp_path, parallel=parallel, minibatch=32)
    for layer, (height, width, filter_height, filter_width, channels, filters, *_) in zip(
        tool.read_layers(path, parallel, 32), rows, strict=True
    ):
        _, inp_grad, weight_grad = shards_of(layer, chosen)
        if parallel != "DATA":
            assert inp_grad.bytes == 32 * height * width * channels * 2 // dp
        if parallel != "MODEL":
            assert weight_grad.bytes == filter_height * filter_width * channels * filters * 2 // (
                16 // dp
            )


def test_a_table_of_gemms_is_as_it_was() -> None:
    for layer in tool.read_layers(MNK_INPUTS / "example.csv", "DATA", 1):
        assert layer.inputs == layer.m * layer.k
