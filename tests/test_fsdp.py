"""--sharding_strategy: what is gathered and scattered in place of the ALLREDUCE of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gen_astrasim_workload_input as tool
from chakra_reader import COMM_TYPES, Node
from helpers import (
    FAST,
    MNK_INPUTS,
    is_one_error_line,
    plan_of_table,
    run,
    settings,
    state,
    write_table,
)
from runs import TYPED, layers_csv_of, run_inside, summary_row_of, trace_of, traces

SHARDINGS = ("SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD")
# 12 NPUs in 3 packages; elements of one byte.
SYSTEM: dict[str, Any] = {"num_npus": 12, "num_packages": 3, "datatype_size": 1}
GPT3: dict[str, Any] = {
    "mnk": MNK_INPUTS / "gpt3_175b.csv",
    "num_npus": 1024,
    "num_packages": 128,
}
EXAMPLE = {"mnk": MNK_INPUTS / "example.csv"}  # on 16 NPUs in 2 packages

# The name of its line, kind, bytes, members in each package, packages.
Line = tuple[str, str, int, int, int]


def sharded(folder: Path, sharding: str, **changes: Any) -> tool.Settings:
    """Return settings with a sharding strategy."""
    return settings(folder, sharding_strategy=sharding, output_file=None, **changes)


def lines_of(layer_plan: tool.LayerPlan) -> list[Line]:
    """Return the collectives of a layer."""
    lines = []
    for layer_pass in layer_plan.passes.values():
        for name, each in layer_pass.lines:
            if each.kind != "NONE":
                lines.append((name, each.kind, each.bytes, each.within, each.between))
    return lines


def planned(folder: Path, sharding: str, *lines: str, **changes: Any) -> list[list[Line]]:
    """Return the collectives of the layers of a table."""
    mnk = write_table(folder / "t.csv", *lines, header=TYPED)
    plan = plan_of_table(sharded(folder, sharding, mnk=mnk, **{**SYSTEM, **changes}))
    plan.check()
    return [lines_of(layer_plan) for layer_plan in plan.layers]


def weights(*lines: Line) -> list[Line]:
    """Return the lines that have to do with weights."""
    return [line for line in lines if line[0].split()[-1] in ("weights", "replicas")] + [
        line for line in lines if line[0] == "weight gradient"
    ]


# --- Bytes


# n k = 40 x 36 = 1440 bytes, of which an NPU without shards has all, a quarter, a third.
@pytest.mark.parametrize(
    ("parallel", "sharding", "expected"),
    [
        pytest.param(
            "DATA",
            "NO_SHARD",
            [("weight gradient", "ALLREDUCE", 1440, 4, 3)],
            id="DATA, NO_SHARD",
        ),
        pytest.param(
            "DATA",
            "SHARD_GRAD_OP",
            [
                ("forward weights", "ALLGATHER", 120, 4, 3),
                ("weight gradient", "REDUCESCATTER", 1440, 4, 3),
            ],
            id="DATA, SHARD_GRAD_OP",
        ),
        pytest.param(
            "DATA",
            "FULL_SHARD",
            [
                ("forward weights", "ALLGATHER", 120, 4, 3),
                ("backward weights", "ALLGATHER", 120, 4, 3),
                ("weight gradient", "REDUCESCATTER", 1440, 4, 3),
            ],
            id="DATA, FULL_SHARD",
        ),
        pytest.param(
            "DATA",
            "HYBRID_SHARD",
            [
                ("forward weights", "ALLGATHER", 360, 4, 1),
                ("backward weights", "ALLGATHER", 360, 4, 1),
                ("weight gradient", "REDUCESCATTER", 1440, 4, 1),
                ("weight gradient replicas", "ALLREDUCE", 360, 1, 3),
            ],
            id="DATA, HYBRID_SHARD",
        ),
        # m n = 960, an NPU's share 80; m k = 864 over dp
        pytest.param(
            "HYBRID_DATA_MODEL",
            "SHARD_GRAD_OP",
            [
                ("forward weights", "ALLGATHER", 120, 1, 3),
                ("forward", "ALLGATHER", 80, 4, 1),
                ("input gradient", "REDUCESCATTER", 288, 4, 1),
                ("weight gradient", "REDUCESCATTER", 360, 1, 3),
            ],
            id="HYBRID_DATA_MODEL, SHARD_GRAD_OP",
        ),
        pytest.param(
            "HYBRID_DATA_MODEL",
            "FULL_SHARD",
            [
                ("forward weights", "ALLGATHER", 120, 1, 3),
                ("forward", "ALLGATHER", 80, 4, 1),
                ("backward weights", "ALLGATHER", 120, 1, 3),
                ("input gradient", "REDUCESCATTER", 288, 4, 1),
                ("weight gradient", "REDUCESCATTER", 360, 1, 3),
            ],
            id="HYBRID_DATA_MODEL, FULL_SHARD",
        ),
        pytest.param(
            "HYBRID_MODEL_DATA",
            "FULL_SHARD",
            [
                ("forward weights", "ALLGATHER", 120, 4, 1),
                ("forward", "ALLGATHER", 80, 1, 3),
                ("backward weights", "ALLGATHER", 120, 4, 1),
                ("input gradient", "REDUCESCATTER", 216, 1, 3),
                ("weight gradient", "REDUCESCATTER", 480, 4, 1),
            ],
            id="HYBRID_MODEL_DATA, FULL_SHARD",
        ),
    ],
)
def test_a_layer(parallel: str, sharding: str, expected: list[Line], tmp_path: Path) -> None:
    (lines,) = planned(tmp_path, sharding, "a,24,40,36,,,", parallel=parallel)
    assert lines == expected


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize(
    ("parallel", "sharding", "expected"),
    [
        # 7 x 9 = 63 bytes over 12, and over the 4 of a package
        pytest.param("DATA", "FULL_SHARD", [6, 6, 63], id="over all"),
        pytest.param("DATA", "HYBRID_SHARD", [16, 16, 16, 63], id="over a package"),
        # a quarter of 63 is 15, as a whole buffer is rounded down
        pytest.param("HYBRID_DATA_MODEL", "FULL_SHARD", [5, 5, 15], id="between packages"),
        pytest.param("HYBRID_MODEL_DATA", "FULL_SHARD", [6, 6, 21], id="in a package"),
    ],
)
def test_shares_are_rounded_up(
    parallel: str, sharding: str, rounding: str, expected: list[int], tmp_path: Path
) -> None:
    (lines,) = planned(
        tmp_path, sharding, "a,24,7,9,,,", parallel=parallel, shard_rounding=rounding
    )
    assert [size for _, _, size, _, _ in weights(*lines)] == expected


# Of example.csv the weights are these bytes, all of which are multiples of 16 x 16.
WEIGHTS = [131072, 524288, 524288, 16384, 1048576, 524288, 524288]


@pytest.mark.parametrize(
    ("parallel", "members", "parts"), [("DATA", 16, 1), ("HYBRID_MODEL_DATA", 8, 2)]
)
@pytest.mark.parametrize(
    ("sharding", "times"), [("NO_SHARD", 2), ("SHARD_GRAD_OP", 2), ("FULL_SHARD", 3)]
)
def test_full_shard_sends_half_as_much_again(
    parallel: str, members: int, parts: int, sharding: str, times: int, tmp_path: Path
) -> None:
    plan = plan_of_table(sharded(tmp_path, sharding, parallel=parallel, **EXAMPLE))
    sent = 0
    for _, each in plan.collectives:
        if each.members == members:  # those of activations have others
            sent += each.sent_bytes
    assert sent == times * sum(WEIGHTS) // parts * (members - 1) // members


@pytest.mark.parametrize(
    ("sharding", "parallel", "counts", "within", "between"),
    [
        # All weights are 2 x 173,946,175,488 bytes.
        pytest.param(
            "FULL_SHARD",
            "DATA",
            {"ALLGATHER": 768, "REDUCESCATTER": 384},
            1_042_657_837_056 - 129_440_415_744,
            129_440_415_744,
            id="FULL_SHARD",
        ),
        pytest.param(
            "HYBRID_SHARD",
            "DATA",
            {"ALLGATHER": 768, "REDUCESCATTER": 384, "ALLREDUCE": 384},
            913_217_421_312,
            86_293_610_496,
            id="HYBRID_SHARD",
        ),
        pytest.param(
            "FULL_SHARD",
            "HYBRID_DATA_MODEL",
            {"ALLGATHER": 768, "REDUCESCATTER": 384, "ALLREDUCE": 384},
            384 * 2 * 7 * 603_979_776 // 8,
            129_440_415_744,
            id="HYBRID_DATA_MODEL",
        ),
    ],
)
def test_gpt3_on_1024_npus(
    sharding: str,
    parallel: str,
    counts: dict[str, int],
    within: int,
    between: int,
    tmp_path: Path,
) -> None:
    plan = plan_of_table(sharded(tmp_path, sharding, parallel=parallel, **GPT3))
    assert {kind: number for kind, number, _ in plan.total_collectives() if number} == counts
    assert plan.sent_between_packages == between
    assert plan.sent_bytes - between == within


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        pytest.param(
            "FULL_SHARD",
            [
                ("forward weights", "ALLGATHER", 884_736, 8, 128),
                ("backward weights", "ALLGATHER", 884_736, 8, 128),
                ("weight gradient", "REDUCESCATTER", 905_969_664, 8, 128),
            ],
            id="FULL_SHARD",
        ),
        pytest.param(
            "HYBRID_SHARD",
            [
                ("forward weights", "ALLGATHER", 113_246_208, 8, 1),
                ("backward weights", "ALLGATHER", 113_246_208, 8, 1),
                ("weight gradient", "REDUCESCATTER", 905_969_664, 8, 1),
                ("weight gradient replicas", "ALLREDUCE", 113_246_208, 1, 128),
            ],
            id="HYBRID_SHARD",
        ),
    ],
)
def test_queries_keys_and_values_of_gpt3(
    sharding: str, expected: list[Line], tmp_path: Path
) -> None:
    plan = plan_of_table(sharded(tmp_path, sharding, parallel="DATA", **GPT3))
    qkv = [layer_plan for layer_plan in plan.layers if layer_plan.layer.name.endswith("_qkv")]
    assert [lines_of(layer_plan) for layer_plan in qkv] == 96 * [expected]


# --- Which layers


def test_layers_without_weights_or_without_data_parallelism_are_not_sharded(
    tmp_path: Path,
) -> None:
    layers = planned(
        tmp_path,
        "FULL_SHARD",
        *("m,24,48,36,,,MODEL", "b,24,40,36,BATCHED_GEMM,12,DATA", "d,24,40,36,,,DATA"),
        parallel="HYBRID_CUSTOMIZED",
    )
    assert layers == [
        [("forward", "ALLGATHER", 96, 4, 3), ("input gradient", "REDUCESCATTER", 864, 4, 3)],
        [],
        [
            ("forward weights", "ALLGATHER", 120, 4, 3),
            ("backward weights", "ALLGATHER", 120, 4, 3),
            ("weight gradient", "REDUCESCATTER", 1440, 4, 3),
        ],
    ]


def test_experts_are_sharded_over_their_replicas(tmp_path: Path) -> None:
    """An NPU has 2 of 8 experts, with 40 x 36 and 36 x 20 weights; 96 x 36 tokens in all."""
    layers = planned(
        tmp_path,
        "FULL_SHARD",
        *("u,96,40,36,EXPERT_UP,8,", "v,96,36,20,EXPERT_DOWN,8,"),
        parallel="HYBRID_DATA_MODEL",
    )
    assert layers == [
        [
            ("forward weights", "ALLGATHER", 960, 1, 3),
            ("forward exchange", "ALLTOALL", 288, 4, 1),
            ("backward weights", "ALLGATHER", 960, 1, 3),
            ("input gradient", "ALLTOALL", 288, 4, 1),
            ("weight gradient", "REDUCESCATTER", 2880, 1, 3),
        ],
        [
            ("forward weights", "ALLGATHER", 480, 1, 3),
            ("forward", "ALLTOALL", 288, 4, 1),
            ("backward weights", "ALLGATHER", 480, 1, 3),
            ("input gradient exchange", "ALLTOALL", 288, 4, 1),
            ("weight gradient", "REDUCESCATTER", 1440, 1, 3),
        ],
    ]


# --- What people read

# The array, 256 x 256 ws, is not filled: 765 + M cycles.
LAYERS_CSV = """\
forward weights,0,2,40,36,0,ALLGATHER,360,4,1080
forward,1,2,40,36,767,NONE,0,1,0
input gradient,1,2,36,40,767,NONE,0,1,0
backward weights,0,36,40,2,0,ALLGATHER,360,4,1080
weight gradient,1,36,40,2,801,REDUCESCATTER,1440,4,1080
weight gradient replicas,0,36,40,2,0,ALLREDUCE,360,3,480
"""
PRINTED = """\
layer and pass          GEMM of one NPU  cycles  collective     bytes
a
  forward weights                                ALLGATHER        360
  forward                       2x40x36     767  NONE               0
  input grad                    2x36x40     767  NONE               0
  backward weights                               ALLGATHER        360
  weight grad                   36x40x2     801  REDUCESCATTER  1,440
  weight grad replicas                           ALLREDUCE        360
totals of a training step
compute, forward             767  cycles
compute, input gradient      767  cycles
compute, weight gradient     801  cycles
compute, all passes        2,335  cycles
2 × ALLGATHER                720  bytes
1 × REDUCESCATTER          1,440  bytes
1 × ALLREDUCE                360  bytes
sent within its package    3,240  bytes
sent between packages        480  bytes
wrote no workload file, as only traces can hold this run: 1 layer, 3 distinct GEMMs (analytical)
"""


def one_layer(folder: Path, sharding: str) -> dict[str, Any]:
    """Return the settings of a run of one layer."""
    mnk = write_table(folder / "t.csv", "a,24,40,36")
    return {
        **{"mnk": mnk, "sharding_strategy": sharding, "output_file": None},
        **SYSTEM,
        **traces(folder),
    }


def test_layers_csv(tmp_path: Path) -> None:
    rows = layers_csv_of(tmp_path, **one_layer(tmp_path, "HYBRID_SHARD"))
    lines = [",".join(list(row.values())[5:]) for row in rows]
    assert lines == LAYERS_CSV.splitlines()
    assert {tuple(row.values())[:5] for row in rows} == {("a", "GEMM", "DATA", "12", "1")}


def test_the_printed_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_inside(tmp_path, **one_layer(tmp_path, "HYBRID_SHARD"))
    out = capsys.readouterr().out
    table = "layer and pass" + out.partition("layer and pass")[2].rpartition("(analytical)")[0]
    assert f"{table}(analytical)\n" == PRINTED


def test_the_summary(tmp_path: Path) -> None:
    row = summary_row_of(tmp_path, **one_layer(tmp_path, "FULL_SHARD"))
    assert {name: row[name] for name in row if name.startswith(("all", "red", "sent", "sh"))} == {
        **{"sharding_strategy": "FULL_SHARD", "shard_rounding": "up"},
        **{"allgather_count": "2", "allgather_bytes": "240"},
        **{"reducescatter_count": "1", "reducescatter_bytes": "1440"},
        **{"allreduce_count": "0", "allreduce_bytes": "0"},
        **{"alltoall_count": "0", "alltoall_bytes": "0"},
        # gathers 2 x 120 x (3 x 3, 2), the scatter 1440 x (3/4, 2/12)
        **{"sent_bytes": "3960", "sent_within_package": "3240", "sent_between_packages": "720"},
    }
    assert [row[name] for name in ("parallel", "inference", "output_file")] == ["DATA", "False", ""]


# --- Traces

# Each node of two training steps of the layers a, b, c, d, and after which others it comes. Weights
# are gathered, and their gradients reduced; AG and RS are the collectives of activations.

DATA_FULL_FIRST = """
1a fwd gather: -
1a fwd: 1a fwd gather
1b fwd gather: -
1b fwd: 1a fwd, 1b fwd gather
1c fwd gather: 1a fwd
1c fwd: 1b fwd, 1c fwd gather
1d fwd gather: 1b fwd
1d fwd: 1c fwd, 1d fwd gather
"""
DATA_FULL_BACKWARD = """
1d wg gather: 1d fwd
1d wg: 1d fwd, 1d wg gather
1d wg reduce: 1d wg
1d ig: 1d wg
1c wg gather: 1d fwd
1c wg: 1c wg gather, 1d ig
1c wg reduce: 1c wg
1c ig: 1c wg
1b wg gather: 1d ig
1b wg: 1b wg gather, 1c ig
1b wg reduce: 1b wg
1b ig: 1b wg
1a wg gather: 1c ig
1a wg: 1a wg gather, 1b ig
1a wg reduce: 1a wg
"""
DATA_FULL_SECOND = """
2a fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2a fwd: 1a wg reduce, 2a fwd gather
2b fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2b fwd: 1b wg reduce, 2a fwd, 2b fwd gather
2c fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce, 2a fwd
2c fwd: 1c wg reduce, 2b fwd, 2c fwd gather
2d fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce, 2b fwd
2d fwd: 1d wg reduce, 2c fwd, 2d fwd gather
"""
DATA_GRAD_FIRST = """
1a fwd gather: -
1a fwd: 1a fwd gather
1b fwd gather: -
1b fwd: 1a fwd, 1b fwd gather
1c fwd gather: -
1c fwd: 1b fwd, 1c fwd gather
1d fwd gather: -
1d fwd: 1c fwd, 1d fwd gather
"""
DATA_GRAD_BACKWARD = """
1d wg: 1d fwd
1d wg reduce: 1d wg
1d ig: 1d wg
1c wg: 1d ig
1c wg reduce: 1c wg
1c ig: 1c wg
1b wg: 1c ig
1b wg reduce: 1b wg
1b ig: 1b wg
1a wg: 1b ig
1a wg reduce: 1a wg
"""
DATA_GRAD_SECOND = """
2a fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2a fwd: 1a wg reduce, 2a fwd gather
2b fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2b fwd: 1b wg reduce, 2a fwd, 2b fwd gather
2c fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2c fwd: 1c wg reduce, 2b fwd, 2c fwd gather
2d fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2d fwd: 1d wg reduce, 2c fwd, 2d fwd gather
"""
HYBRID_FULL_FIRST = """
1a fwd gather: -
1a fwd: 1a fwd gather
1a fwd AG: 1a fwd
1b fwd gather: -
1b fwd: 1a fwd AG, 1b fwd gather
1b fwd AG: 1b fwd
1c fwd gather: 1a fwd
1c fwd: 1b fwd AG, 1c fwd gather
1c fwd AG: 1c fwd
1d fwd gather: 1b fwd
1d fwd: 1c fwd AG, 1d fwd gather
1d fwd AG: 1d fwd
"""
HYBRID_FULL_BACKWARD = """
1d ig gather: 1d fwd
1d ig: 1d fwd AG, 1d ig gather
1d ig RS: 1d ig
1d wg: 1d ig
1d wg reduce: 1d wg
1c ig gather: 1d fwd
1c ig: 1c ig gather, 1d ig RS, 1d wg
1c ig RS: 1c ig
1c wg: 1c ig
1c wg reduce: 1c wg
1b ig gather: 1d wg
1b ig: 1b ig gather, 1c ig RS, 1c wg
1b ig RS: 1b ig
1b wg: 1b ig
1b wg reduce: 1b wg
1a ig gather: 1c wg
1a ig: 1a ig gather, 1b ig RS, 1b wg
1a wg: 1a ig
1a wg reduce: 1a wg
"""
HYBRID_FULL_SECOND = """
2a fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2a fwd: 1a wg reduce, 2a fwd gather
2a fwd AG: 2a fwd
2b fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2b fwd: 1b wg reduce, 2a fwd AG, 2b fwd gather
2b fwd AG: 2b fwd
2c fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce, 2a fwd
2c fwd: 1c wg reduce, 2b fwd AG, 2c fwd gather
2c fwd AG: 2c fwd
2d fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce, 2b fwd
2d fwd: 1d wg reduce, 2c fwd AG, 2d fwd gather
2d fwd AG: 2d fwd
"""
HYBRID_GRAD_FIRST = """
1a fwd gather: -
1a fwd: 1a fwd gather
1a fwd AG: 1a fwd
1b fwd gather: -
1b fwd: 1a fwd AG, 1b fwd gather
1b fwd AG: 1b fwd
1c fwd gather: -
1c fwd: 1b fwd AG, 1c fwd gather
1c fwd AG: 1c fwd
1d fwd gather: -
1d fwd: 1c fwd AG, 1d fwd gather
1d fwd AG: 1d fwd
"""
HYBRID_GRAD_BACKWARD = """
1d ig: 1d fwd AG
1d ig RS: 1d ig
1d wg: 1d ig
1d wg reduce: 1d wg
1c ig: 1d ig RS, 1d wg
1c ig RS: 1c ig
1c wg: 1c ig
1c wg reduce: 1c wg
1b ig: 1c ig RS, 1c wg
1b ig RS: 1b ig
1b wg: 1b ig
1b wg reduce: 1b wg
1a ig: 1b ig RS, 1b wg
1a wg: 1a ig
1a wg reduce: 1a wg
"""
HYBRID_GRAD_SECOND = """
2a fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2a fwd: 1a wg reduce, 2a fwd gather
2a fwd AG: 2a fwd
2b fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2b fwd: 1b wg reduce, 2a fwd AG, 2b fwd gather
2b fwd AG: 2b fwd
2c fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2c fwd: 1c wg reduce, 2b fwd AG, 2c fwd gather
2c fwd AG: 2c fwd
2d fwd gather: 1a wg reduce, 1b wg reduce, 1c wg reduce, 1d wg reduce
2d fwd: 1d wg reduce, 2c fwd AG, 2d fwd gather
2d fwd AG: 2d fwd
"""

GRAPHS = {
    "DATA, FULL_SHARD": (DATA_FULL_FIRST, DATA_FULL_BACKWARD, DATA_FULL_SECOND),
    "DATA, SHARD_GRAD_OP": (DATA_GRAD_FIRST, DATA_GRAD_BACKWARD, DATA_GRAD_SECOND),
    "HYBRID_DATA_MODEL, FULL_SHARD": (HYBRID_FULL_FIRST, HYBRID_FULL_BACKWARD, HYBRID_FULL_SECOND),
    "HYBRID_DATA_MODEL, SHARD_GRAD_OP": (
        *(HYBRID_GRAD_FIRST, HYBRID_GRAD_BACKWARD, HYBRID_GRAD_SECOND),
    ),
}
SHORT = {"forward": "fwd", "input gradient": "ig", "weight gradient": "wg"}
FOUR = [f"{name},64,64,64" for name in "abcd"]


def short_names(nodes: list[Node]) -> list[str]:
    """Return the nodes' names as the graphs have them, on 8 NPUs in 4 packages."""
    short: list[str] = []
    for node in nodes:
        words = node.name.split()
        kind = f" {words.pop()}" if node.collective else ""
        name = f"{words[0]} {SHORT[' '.join(words[1:])]}"
        if node.collective:
            assert node.collective.comm_type == COMM_TYPES[kind.strip()]
            is_of_activations = node.collective.involved_dim == (True, False)
            kinds = {" ALLGATHER": "AG", " REDUCESCATTER": "RS", " ALLREDUCE": "replicas"}
            if not is_of_activations:
                kinds |= {" ALLGATHER": "gather", " REDUCESCATTER": "reduce"}
            name += f" {kinds[kind]}"
        short.append(f"2{name}" if f"1{name}" in short else f"1{name}")
    assert len({*short}) == len(short)
    return short


def graph_of(nodes: list[Node]) -> list[str]:
    """Return each node and after which others it comes."""
    names = dict(zip([node.id for node in nodes], short_names(nodes)))
    lines = []
    for node in nodes:
        before = sorted(names[number] for number in node.after)
        lines.append(f"{names[node.id]}: {', '.join(before) or '-'}")
    return lines


def sharded_trace(folder: Path, sharding: str, *lines: str, **changes: Any) -> list[Node]:
    """Return the nodes of a trace for 8 NPUs in 4 packages."""
    header = TYPED if lines[0].count(",") > 3 else "Layer,m,n,k"
    system = {"num_npus": 8, "num_packages": 4, "output_file": None, **changes}
    mnk = write_table(folder / "t.csv", *lines, header=header)
    return trace_of(folder, mnk=mnk, sharding_strategy=sharding, **system)


@pytest.mark.parametrize("name", GRAPHS)
def test_when_a_node_starts(name: str, tmp_path: Path) -> None:
    """Written in the order of the training loop, each gather just before what it serves."""
    parallel, _, sharding = name.partition(", ")
    first, backward, second = GRAPHS[name]
    graph = [first, backward, second, backward.replace("1", "2")]
    nodes = sharded_trace(tmp_path, sharding, *FOUR, parallel=parallel, num_passes=2)
    assert graph_of(nodes) == [line for part in graph for line in part.strip().splitlines()]


def test_bytes_in_a_trace(tmp_path: Path) -> None:
    """64 x 64 x 2 bytes of weights: over 8, or over 2 and then over 4."""
    for sharding, share in (("FULL_SHARD", 1024), ("HYBRID_SHARD", 4096)):
        nodes = sharded_trace(tmp_path, sharding, *FOUR, parallel="DATA")
        for node in nodes:
            if node.collective:
                is_whole = node.name.endswith("REDUCESCATTER")
                assert node.collective.comm_size == (8192 if is_whole else share)


def test_hybrid_shard_reduces_replicas_after_it_scatters(tmp_path: Path) -> None:
    nodes = sharded_trace(tmp_path, "HYBRID_SHARD", *FOUR, num_passes=2)
    involved = {"ALLGATHER": (True, False), "REDUCESCATTER": (True, False)}
    involved["ALLREDUCE"] = (False, True)
    names = {node.id: node.name for node in nodes}
    reduced = []
    for node in nodes:
        if not node.collective:
            continue
        name, _, kind = node.name.rpartition(" ")
        assert node.collective.involved_dim == involved[kind]
        if kind == "ALLREDUCE":
            assert [names[number] for number in node.after] == [f"{name} REDUCESCATTER"]
            assert node.after == [node.id - 1]
            reduced.append(node.id)
    # The next step gathers weights when all four have been reduced.
    (first,) = [node for node in nodes if node.name == "a forward ALLGATHER" and node.after]
    assert sorted(first.after) == reduced[:4]


def test_layers_that_are_not_sharded_do_not_count(tmp_path: Path) -> None:
    """Between a and b stand two products, which hold no weights."""
    product = "64,64,64,BATCHED_GEMM,8,"
    lines = ["a,64,64,64,,,", f"x,{product}", f"y,{product}", "b,64,64,64,,,", "c,64,64,64,,,"]
    graph = graph_of(sharded_trace(tmp_path, "FULL_SHARD", *lines))
    forward = ["1a fwd gather: -", "1b fwd gather: -", "1c fwd gather: 1a fwd"]
    backward = ["1c wg gather: 1c fwd", "1b wg gather: 1c fwd", "1a wg gather: 1c ig"]
    assert [line for line in graph if " gather: " in line] == forward + backward
    assert "1b fwd: 1b fwd gather, 1y fwd" in graph
    assert "1x fwd: 1a fwd" in graph


def test_layers_of_model_parallelism_are_as_ever(tmp_path: Path) -> None:
    lines = ["a,64,64,64,,,DATA", "m,64,64,64,,,MODEL", "b,64,64,64,,,DATA"]
    customized = {"parallel": "HYBRID_CUSTOMIZED", "num_passes": 2}
    graph = graph_of(sharded_trace(tmp_path, "FULL_SHARD", *lines, **customized))
    gathers = [line for line in graph if line[:7] in ("1a fwd ", "1b fwd ", "2b fwd ")]
    assert gathers == [
        *("1a fwd gather: -", "1b fwd gather: -"),
        "2b fwd gather: 1a wg reduce, 1b wg reduce",
    ]
    assert "2m fwd: 1m wg, 2a fwd" in graph, "what it waited for without shards"


# --- Refused

HYBRID_SHARD = "shards within packages, and replicates between them"
HYBRID_EXPECTED = "expected --parallel=DATA and 1 < packages < NPUs"
NO_DATA = "no data parallelism to shard over, expected --parallel=DATA or a hybrid"
TRACES = ("--chakra_et=x", "--clock_mhz=1")


@pytest.mark.parametrize(
    ("sharding", "flags", "error"),
    [
        pytest.param(
            "SHARD_GRAD_OP",
            [],
            " is for traces only, expected --chakra_et and --clock_mhz, and no --output_file",
            id="no traces",
        ),
        pytest.param(
            "FULL_SHARD",
            [*TRACES, "--output_file=w.txt"],
            " is for traces only, expected --chakra_et and --clock_mhz, and no --output_file",
            id="a text file",
        ),
        pytest.param(
            "FULL_SHARD",
            [*TRACES, "--output_file=workload.txt"],
            " is for traces only, expected --chakra_et and --clock_mhz, and no --output_file",
            id="the default text file, but given",
        ),
        pytest.param(
            "FULL_SHARD",
            [*TRACES, "--inference"],
            " is for training, expected no --inference",
            id="inference",
        ),
        pytest.param(
            "FULL_SHARD",
            [*TRACES, f"--mnk={MNK_INPUTS}/dlrm.csv", "--parallel=HYBRID_DLRM"],
            " with HYBRID_DLRM, expected another --parallel",
            id="DLRM",
        ),
        pytest.param("FULL_SHARD", [*TRACES, "--parallel=MODEL"], f": {NO_DATA}", id="MODEL"),
        pytest.param(
            "SHARD_GRAD_OP",
            [*TRACES, "--parallel=HYBRID_DATA_MODEL", "--num_packages=1"],
            f": {NO_DATA}",
            id="one package, data parallelism between packages",
        ),
        pytest.param(
            "FULL_SHARD",
            [*TRACES, "--parallel=HYBRID_MODEL_DATA", "--num_packages=8"],
            f": {NO_DATA}",
            id="packages of one NPU, data parallelism within",
        ),
        pytest.param("FULL_SHARD", [*TRACES, "--num_npus=1"], f": {NO_DATA}", id="one NPU"),
        *[
            pytest.param(
                "HYBRID_SHARD",
                [*TRACES, "--num_packages=2", f"--parallel={parallel}"],
                f" {HYBRID_SHARD}, {HYBRID_EXPECTED}",
                id=f"HYBRID_SHARD of {parallel}",
            )
            for parallel in ("MODEL", "HYBRID_DATA_MODEL", "HYBRID_MODEL_DATA", "HYBRID_CUSTOMIZED")
        ],
        *[
            pytest.param(
                "HYBRID_SHARD",
                [*TRACES, f"--num_packages={packages}"],
                f" {HYBRID_SHARD}, {HYBRID_EXPECTED}",
                id=f"HYBRID_SHARD of 8 NPUs, packages: {packages}",
            )
            for packages in (1, 8)
        ],
    ],
)
def test_refused(sharding: str, flags: list[str], error: str, tmp_path: Path) -> None:
    before = state(tmp_path)
    result = run(tmp_path, FAST, f"--sharding_strategy={sharding}", *flags)
    assert is_one_error_line(result), result
    assert result.err.splitlines()[-1] == f"error: --sharding_strategy={sharding}{error}"
    assert state(tmp_path) == before


def test_nothing_to_shard_in_a_table(tmp_path: Path) -> None:
    for line in ("a,64,64,64,BATCHED_GEMM,64,DATA", "a,64,64,64,,,MODEL"):
        with pytest.raises(tool.UserError, match=NO_DATA):
            planned(tmp_path, "FULL_SHARD", line, parallel="HYBRID_CUSTOMIZED")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_traces_but_no_text_file(sharding: str, tmp_path: Path) -> None:
    """A text file of an earlier run stays as it was."""
    (tmp_path / "workload.txt").write_text("of an earlier run")
    flags = [f"--sharding_strategy={sharding.lower()}", "--num_npus=4", "--num_packages=2"]
    result = run(tmp_path, FAST, *flags, *TRACES)
    assert (result.status, result.err) == (0, "")
    assert "wrote no workload file, as only traces can hold this run: 7 layers" in result.out
    assert (tmp_path / "workload.txt").read_text() == "of an earlier run"
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"workload.txt", "outputs", "x.0.et", "x.1.et", "x.2.et", "x.3.et"}
