"""Layer types and grouped convolutions: what one NPU computes and what travels, by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import gen_astrasim_workload_input as tool
from chakra_reader import generate as generate_trace
from helpers import (
    FAST,
    MNK_INPUTS,
    PASS_NAMES,
    PLAIN,
    accelerator_of,
    collective_of,
    gemms_of,
    generate,
    is_one_error_line,
    plan_of_table,
    read_like_astrasim,
    read_like_chakra,
    run,
    settings,
    write_table,
)

HEADER = "Layer,m,n,k,Type,Count,CustomizedParallelization"
CONVOLUTIONS = (
    "Layer,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Num Filter,Strides,Groups"
)
# 12 NPUs in 3 packages; elements of one byte.
SYSTEM: dict[str, Any] = {"num_npus": 12, "num_packages": 3, "datatype_size": 1}

# Count, GEMM and collective of each pass; of the collective its kind, bytes, NPUs in each package
# and packages.
Planned = list[tuple[int, Any, Any]]


def planned(folder: Path, header: str, line: str, **changes: Any) -> Planned:
    """Return count, GEMM and collective of each pass of the one layer of a table."""
    chosen = settings(
        folder, mnk=write_table(folder / "t.csv", line, header=header), **{**SYSTEM, **changes}
    )
    (plan,) = plan_of_table(chosen).layers
    assert list(plan.passes) == list(PASS_NAMES)
    found: Planned = []
    for layer_pass, gemm in zip(plan.passes.values(), gemms_of(plan), strict=True):
        kind, size, within, between, is_prefetched = collective_of(layer_pass)
        assert not is_prefetched
        known = (kind, size, within, between) if kind != "NONE" else None
        found.append((layer_pass.count, gemm, known))
    return found


PLAIN_LAYER: Planned = [
    (1, (2, 40, 36), None),
    (1, (2, 36, 40), None),
    (1, (36, 40, 2), ("ALLREDUCE", 1440, 4, 3)),
]


# m = 24 rows are split over dp, n = 40 and k = 36 over mp; m n = 960, m k = 864, n k = 1440.
@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        pytest.param("DATA", PLAIN_LAYER, id="DATA: a plain layer"),
        pytest.param(
            "MODEL",
            [
                (1, (24, 4, 36), None),
                (1, (24, 36, 4), ("ALLREDUCE", 864, 4, 3)),
                (1, (36, 4, 24), None),
            ],
            id="MODEL",
        ),
        pytest.param(
            "HYBRID_DATA_MODEL",
            [
                (1, (8, 10, 36), None),
                (1, (8, 36, 10), ("ALLREDUCE", 288, 4, 1)),
                (1, (36, 10, 8), ("ALLREDUCE", 360, 1, 3)),
            ],
            id="HYBRID_DATA_MODEL",
        ),
        pytest.param(
            "HYBRID_MODEL_DATA",
            [
                (1, (6, 14, 36), None),
                (1, (6, 36, 14), ("ALLREDUCE", 216, 1, 3)),
                (1, (36, 14, 6), ("ALLREDUCE", 480, 4, 1)),
            ],
            id="HYBRID_MODEL_DATA",
        ),
    ],
)
def test_column_parallel(parallel: str, expected: Planned, tmp_path: Path) -> None:
    line = f"a,24,40,36,COLUMN_PARALLEL,,{parallel}"
    assert planned(tmp_path, HEADER, line, parallel=parallel) == expected
    assert planned(tmp_path, HEADER, line, parallel="HYBRID_CUSTOMIZED") == expected


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        pytest.param("DATA", PLAIN_LAYER, id="DATA: a plain layer"),
        pytest.param(
            "MODEL",
            [
                (1, (24, 40, 3), ("ALLREDUCE", 960, 4, 3)),
                (1, (24, 3, 40), None),
                (1, (3, 40, 24), None),
            ],
            id="MODEL",
        ),
        pytest.param(
            "HYBRID_DATA_MODEL",
            [
                (1, (8, 40, 9), ("ALLREDUCE", 320, 4, 1)),
                (1, (8, 9, 40), None),
                (1, (9, 40, 8), ("ALLREDUCE", 360, 1, 3)),
            ],
            id="HYBRID_DATA_MODEL",
        ),
        pytest.param(
            "HYBRID_MODEL_DATA",
            [
                (1, (6, 40, 12), ("ALLREDUCE", 240, 1, 3)),
                (1, (6, 12, 40), None),
                (1, (12, 40, 6), ("ALLREDUCE", 480, 4, 1)),
            ],
            id="HYBRID_MODEL_DATA",
        ),
    ],
)
def test_row_parallel(parallel: str, expected: Planned, tmp_path: Path) -> None:
    line = f"a,24,40,36,ROW_PARALLEL,,{parallel}"
    assert planned(tmp_path, HEADER, line, parallel=parallel) == expected
    assert planned(tmp_path, HEADER, line, parallel="HYBRID_CUSTOMIZED") == expected


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize(
    ("count", "parallel", "repeats"),
    [
        pytest.param("30x9", "DATA", 3 * 9, id="samples over 12 NPUs"),
        pytest.param("30x9", "MODEL", 30 * 1, id="fewer heads than NPUs"),
        pytest.param("30 x 9", "HYBRID_DATA_MODEL", 10 * 3, id="samples over 3, heads over 4"),
        pytest.param("30X9", "HYBRID_MODEL_DATA", 8 * 3, id="samples over 4, heads over 3"),
        pytest.param("30", "HYBRID_MODEL_DATA", 3, id="a plain number over all 12"),
        pytest.param("30", "DATA", 3, id="a plain number over dp"),
        pytest.param("", "DATA", 1, id="none"),
    ],
)
def test_batched_gemm(
    count: str, parallel: str, repeats: int, rounding: str, tmp_path: Path
) -> None:
    """Whole products, of which the NPU that is timed has the most, whatever the rounding."""
    line = f"a,24,40,36,BATCHED_GEMM,{count},"
    assert planned(tmp_path, HEADER, line, parallel=parallel, shard_rounding=rounding) == [
        (repeats, (24, 40, 36), None),
        (repeats, (24, 36, 40), None),
        (repeats, (36, 40, 24), None),
    ]


@pytest.mark.parametrize("name", ["", "GEMM", "gemm"])
def test_a_gemm_is_a_layer_of_a_table_without_types(name: str, tmp_path: Path) -> None:
    typed = planned(tmp_path, HEADER, f"a,25,41,37,{name},,", parallel="HYBRID_DATA_MODEL")
    plain = planned(tmp_path, "Layer,m,n,k", "a,25,41,37", parallel="HYBRID_DATA_MODEL")
    assert typed == plain


# A 9 x 9 ifmap with 24 channels, 3 x 3 filters, 48 of them: m = 49, ifmap 1944.
@pytest.mark.parametrize(
    ("groups", "parallel", "expected"),
    [
        pytest.param(
            6,
            "HYBRID_DATA_MODEL",
            [
                (2, (17, 8, 36), ("ALLGATHER", 196, 4, 1)),
                (2, (17, 36, 8), None),
                (2, (36, 8, 17), ("ALLREDUCE", 432, 1, 3)),
            ],
            id="6 groups over 4 NPUs: 2 of them whole",
        ),
        pytest.param(
            4,
            "HYBRID_DATA_MODEL",
            [
                (1, (17, 12, 54), ("ALLGATHER", 196, 4, 1)),
                (1, (17, 54, 12), None),
                (1, (54, 12, 17), ("ALLREDUCE", 648, 1, 3)),
            ],
            id="4 groups over 4 NPUs: each has a whole one",
        ),
        pytest.param(
            24,
            "DATA",
            [
                (24, (5, 2, 9), None),
                (24, (5, 9, 2), None),
                (24, (9, 2, 5), ("ALLREDUCE", 432, 4, 3)),
            ],
            id="depth-wise",
        ),
        pytest.param(
            6,
            "MODEL",
            [
                (1, (49, 4, 36), ("ALLGATHER", 196, 4, 3)),
                (1, (49, 36, 4), ("REDUCESCATTER", 1944, 4, 3)),
                (1, (36, 4, 49), None),
            ],
            id="6 groups over 12 NPUs",
        ),
    ],
)
def test_groups(groups: int, parallel: str, expected: Planned, tmp_path: Path) -> None:
    line = f"a,9,9,3,3,24,48,1,{groups}"
    assert planned(tmp_path, CONVOLUTIONS, line, parallel=parallel) == expected


def test_one_group_is_a_convolution_without_groups(tmp_path: Path) -> None:
    grouped = planned(tmp_path, CONVOLUTIONS, "a,9,9,3,3,24,48,1,1", parallel="MODEL")
    plain = planned(
        tmp_path, CONVOLUTIONS.removesuffix(",Groups"), "a,9,9,3,3,24,48,1", parallel="MODEL"
    )
    assert grouped == plain


def test_a_pass_takes_its_gemms_cycles_times_its_count(tmp_path: Path) -> None:
    """SCALE-Sim simulates the GEMM once; ns are those of the pass, not of the rounded GEMM."""
    table = write_table(
        tmp_path / "t.csv", "a,8,4,6,BATCHED_GEMM,5", header="Layer,m,n,k,Type,Count"
    )
    flags = [
        f"--mnk={table}",
        "--num_npus=1",
        "--cache_dir=c",
        "--time_unit=us",
        "--clock_mhz=1000",
    ]
    result = run(tmp_path, *flags)
    assert result.status == 0
    assert len(list((tmp_path / "c").rglob("*.json"))) == 3
    folder = tmp_path / "outputs/DATA/t"
    assert (folder / "t_fwd_pass.csv").read_text().splitlines()[1:] == ["a,8,6,1,6,1,4,1,"]
    cycles = accelerator_of().stall_free_cycles(tool.Gemm(8, 4, 6))
    rows = (folder / "layers.csv").read_text().splitlines()
    assert rows[1] == f"a,BATCHED_GEMM,DATA,1,1,forward,5,8,4,6,{5 * cycles},NONE,0,1,0"
    _, (layer,) = read_like_astrasim((tmp_path / "workload.txt").read_text())
    assert layer.passes[0][0] == round(5 * cycles / 1000) != 5 * max(1, round(cycles / 1000))
    assert re.search(rf" 5 × 8x4x6 +{5 * cycles:,} ", result.out)
    (entry,) = (tmp_path / "c").rglob("8x4x6.json")
    assert json.loads(entry.read_text())["gemm"] == "8x4x6"


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        pytest.param(
            "Layer,m,n,k,Type",
            "a,8,8,8,COLUM_PARALLEL",
            "unknown type 'COLUM_PARALLEL', did you mean COLUMN_PARALLEL?",
            id="misspelt type",
        ),
        pytest.param(
            "Layer,m,n,k,Type",
            "a,8,8,8,GROUPED",
            "unknown type 'GROUPED', expected GEMM, COLUMN_",
            id="no type of a table",
        ),
        pytest.param(
            "Layer,m,n,k,Type",
            "a,8,8,8,EMBEDDING",
            "type EMBEDDING needs --parallel=HYBRID_DLRM",
            id="embedding elsewhere",
        ),
        pytest.param(
            "Layer,m,n,k,Count",
            "a,8,8,8,4",
            "Count is '4', expected none with type GEMM",
            id="count",
        ),
        *[
            pytest.param(
                "Layer,m,n,k,Type,Count",
                f"a,8,8,8,BATCHED_GEMM,{count}",
                f"Count is '{count}', expected a whole number >= 1, or samples x heads",
                id=f"count {count}",
            )
            for count in ("0", "x", "8x", "x8", "8x0", "1x2x3", "-1", "2.5", "many")
        ],
        pytest.param(
            f"{CONVOLUTIONS},Type",
            "a,9,9,3,3,8,8,1,1,GEMM",
            "unknown column 'Type', expected",
            id="type of a convolution",
        ),
        pytest.param(
            CONVOLUTIONS,
            "a,9,9,3,3,9,8,1,2",
            "Channels is 9, expected a multiple of 2 groups",
            id="channels",
        ),
        pytest.param(
            CONVOLUTIONS,
            "a,9,9,3,3,8,9,1,2",
            "Num Filter is 9, expected a multiple of 2 groups",
            id="filters",
        ),
        pytest.param(CONVOLUTIONS, "a,9,9,3,3,8,8,1,0", "Groups is '0', expected", id="no group"),
        pytest.param(
            CONVOLUTIONS,
            "conv_DP,9,9,3,3,8,8,1,",
            "conv_DP sounds depth-wise, expected Groups: as many as Channels (Num Filter then has",
            id="depth-wise by its name",
        ),
        pytest.param(
            "Layer,m,n,k,Tpye", "a,8,8,8,", "'Tpye', did you mean Type?", id="misspelt column"
        ),
    ],
)
def test_refused(header: str, line: str, message: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", line, header=header)
    result = run(tmp_path, FAST, f"--mnk={table}", "--num_npus=1")
    assert is_one_error_line(result), result
    where = 1 if "did you mean Type" in message or "unknown column" in message else 2
    assert result.err.startswith(f"error: {table}:{where}: ")
    assert message in result.err


@pytest.mark.parametrize("line", ["DPN_conv,9,9,3,3,8,8,1,", "DP_1,9,9,3,3,8,8,1,8"])
def test_a_name_that_only_looks_depth_wise_or_has_groups(line: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", line, header=CONVOLUTIONS)
    assert run(tmp_path, FAST, f"--mnk={table}", "--num_npus=1").status == 0


TYPES = ("GEMM", "COLUMN_PARALLEL", "ROW_PARALLEL", "BATCHED_GEMM")
FITTING = {
    *(("GEMM", name) for name in TYPES),
    ("COLUMN_PARALLEL", "ROW_PARALLEL"),
    ("COLUMN_PARALLEL", "BATCHED_GEMM"),
    ("BATCHED_GEMM", "BATCHED_GEMM"),
    ("BATCHED_GEMM", "ROW_PARALLEL"),
    ("ROW_PARALLEL", "COLUMN_PARALLEL"),
    ("COLUMN_PARALLEL", "COLUMN_PARALLEL"),
}


def warnings_of(folder: Path, *lines: str, parallel: str, npus: int = 4) -> list[str]:
    table = write_table(folder / "t.csv", *lines, header=HEADER)
    result = run(folder, FAST, f"--mnk={table}", f"--parallel={parallel}", f"--num_npus={npus}")
    assert result.status == 0
    return result.err.splitlines()


@pytest.mark.parametrize("first", TYPES)
@pytest.mark.parametrize("second", TYPES)
def test_neighbours_that_do_not_fit_are_warned_of(first: str, second: str, tmp_path: Path) -> None:
    counts = ["4x4" if name == "BATCHED_GEMM" else "" for name in (first, second)]
    lines = [f"a,64,64,64,{first},{counts[0]},", f"b,64,64,64,{second},{counts[1]},"]
    warnings = warnings_of(tmp_path, *lines, parallel="MODEL")
    if (first, second) == ("COLUMN_PARALLEL", "COLUMN_PARALLEL"):
        assert warnings == [
            f"warning: {tmp_path}/t.csv:3: b seems to read the input of a, and reduces its gradient"
            " again: give such layers as one if the model fuses them"
        ]
    elif (first, second) in FITTING:
        assert warnings == []
    else:
        lacking = "a collective of the gradient" if first == "ROW_PARALLEL" else "an ALLGATHER"
        assert warnings == [
            f"warning: {tmp_path}/t.csv:3: a ({first}) before b ({second}) lacks {lacking}"
            ": no communication was added"
        ]
    assert warnings_of(tmp_path, *lines, parallel="DATA") == [], "nothing is split"


def test_columns_that_read_other_inputs_are_no_siblings(tmp_path: Path) -> None:
    lines = ["a,64,64,64,COLUMN_PARALLEL,,", "b,64,64,32,COLUMN_PARALLEL,,"]
    (warning,) = warnings_of(tmp_path, *lines, parallel="MODEL")
    assert "lacks an ALLGATHER" in warning
    lines[1] = "b,32,64,64,COLUMN_PARALLEL,,"
    (warning,) = warnings_of(tmp_path, *lines, parallel="MODEL")
    assert "lacks an ALLGATHER" in warning


def test_neighbours_of_different_strategies(tmp_path: Path) -> None:
    lines = ["a,64,64,64,,,DATA", "b,64,64,64,COLUMN_PARALLEL,,MODEL"]
    (warning,) = warnings_of(tmp_path, *lines, parallel="HYBRID_CUSTOMIZED")
    assert "a (GEMM) before b (COLUMN_PARALLEL) of another strategy lacks a resharding" in warning


@pytest.mark.parametrize(
    ("line", "parallel", "warning"),
    [
        pytest.param(
            "a,64,64,64,BATCHED_GEMM,,",
            "DATA",
            "t.csv:2: a BATCHED_GEMM without a Count, each taken as one product",
            id="no count",
        ),
        pytest.param(
            "a,64,64,64,BATCHED_GEMM,6x8,",
            "DATA",
            "a: samples = 6 is not divisible by 4, one NPU is timed with 2",
            id="samples",
        ),
        pytest.param(
            "a,64,64,64,BATCHED_GEMM,8x3,",
            "MODEL",
            "a: heads = 3 is less than 4, so that some have none, one NPU is timed with 1",
            id="heads",
        ),
        pytest.param(
            "a,64,64,64,BATCHED_GEMM,9,",
            "MODEL",
            "a: count = 9 is not divisible by 4, one NPU is timed with 3",
            id="count",
        ),
        pytest.param(
            "a,64,64,66,ROW_PARALLEL,,",
            "MODEL",
            "a: k = 66 is not divisible by 4, one NPU is timed with 17",
            id="k of rows",
        ),
    ],
)
def test_what_is_not_divisible(line: str, parallel: str, warning: str, tmp_path: Path) -> None:
    (written, *more) = warnings_of(tmp_path, line, parallel=parallel)
    assert written.endswith(warning)
    if warning.endswith("one product"):
        assert more == [
            "warning: a: count = 1 is less than 4, so that some have none, one NPU is timed with 1"
        ]
    else:
        assert more == []


def test_fewer_groups_than_npus(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,9,9,3,3,8,8,1,2", header=CONVOLUTIONS)
    result = run(tmp_path, FAST, f"--mnk={table}", "--num_npus=4", "--parallel=MODEL")
    assert result.err == (
        "warning: a: 2 groups are fewer than the 4 NPUs that split the filters: cycles are"
        " approximate, collectives an upper bound\n"
    )


def test_fewer_images_than_npus(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,9,9,2,2,8,8,1,1", header=CONVOLUTIONS)
    flags = [FAST, f"--mnk={table}", "--num_npus=4"]
    assert run(tmp_path, *flags, "--minibatch=3").err == (
        "warning: a: 3 images over 4 NPUs, so that an image is split by pixels;"
        " --minibatch is the number of images of all NPUs\n"
    )
    assert run(tmp_path, *flags, "--minibatch=4").err == ""
    assert run(tmp_path, *flags, "--parallel=MODEL").err == ""


# --- Transformers


def test_megatrons_allreduces_of_a_block_of_gpt3(tmp_path: Path) -> None:
    """Two forward, two backward, of an NPU's tokens x 12288 x 2 bytes, each within the package."""
    mnk = MNK_INPUTS / "gpt3_175b.csv"
    system = {"num_npus": 64, "num_packages": 8, "parallel": "HYBRID_DATA_MODEL"}
    text, nodes = generate_trace(tmp_path, mnk=mnk, **system)
    read_like_chakra(text)
    _, layers = read_like_astrasim(text)
    size = 1536 * 2048 // 8 * 12288 * 2
    for block in range(96):
        passes = [layer.passes for layer in layers[6 * block : 6 * block + 6]]
        forward = [step[0][1:] for step in passes if step[0][1] != "NONE"]
        backward = [step[1][1:] for step in passes if step[1][1] != "NONE"]
        assert forward == backward == [("ALLREDUCE", size)] * 2
    within = [
        node.collective for node in nodes if node.collective and node.collective.comm_size == size
    ]
    assert len(within) == 96 * 4 - 1, "the table's first layer has none in a trace"
    assert {collective.involved_dim for collective in within} == {(True, False)}


@pytest.mark.parametrize("parallel", PLAIN)
def test_a_block_is_shown_once(
    parallel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(
        tmp_path, mnk=MNK_INPUTS / "llama3_70b.csv", parallel=parallel, num_npus=8, num_packages=2
    )
    out, err = capsys.readouterr()
    assert len(re.findall(r"^block0_\w+ × 80$", out, re.MULTILINE)) == 6
    assert "lacks" not in err
