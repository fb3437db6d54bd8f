"""Execution traces in the order of ASTRA-sim 1.0's training loop, played by a toy ASTRA-sim."""

from __future__ import annotations

import heapq
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chakra_reader import Node, contents, expected_contents, generate, graph_lines
from helpers import MANY, PARALLEL, ROUNDINGS, LayerCells, folds_of_100, table, tables, write_table

NETWORK = (2, 4)  # 2 NPUs in each of 4 packages
TALL, WIDE = "40,24,8", "40,48,24"  # m, n, k


def write_layers(folder: Path, *layers: str) -> dict[str, Any]:
    """Write a table and a config; return the settings.

    A GEMM takes 100 + its reduction: forward 100 + k, input gradient 100 + n / mp, weight
    gradient 100 + m / dp.
    """
    config = folds_of_100(folder / "c.cfg")
    mnk = write_table(folder / "t.csv", *layers, header="Layer,m,n,k,CustomizedParallelization")
    system = {"num_npus": 8, "num_packages": 4, "datatype_size": 1}
    return {"mnk": mnk, "scalesim_config": config, **system}


# Each node, and after which it comes.
DATA_GRAPH = """
a forward: -
b forward: a forward
b weight gradient: b forward
b weight gradient ALLREDUCE: b weight gradient
b input gradient: b weight gradient
a weight gradient: b input gradient
a weight gradient ALLREDUCE: a weight gradient
a forward: a weight gradient ALLREDUCE
b forward: a forward, b weight gradient ALLREDUCE
"""
MODEL_GRAPH = """
a forward: -
a forward ALLGATHER: a forward
b forward: a forward ALLGATHER
b forward ALLGATHER: b forward
b input gradient: b forward ALLGATHER
b input gradient REDUCESCATTER: b input gradient
b weight gradient: b input gradient
a input gradient: b input gradient REDUCESCATTER, b weight gradient
a weight gradient: a input gradient
a forward: a weight gradient
a forward ALLGATHER: a forward
b forward: a forward ALLGATHER, b weight gradient
"""
HYBRID_GRAPH = """
a forward: -
a forward ALLGATHER: a forward
b forward: a forward ALLGATHER
b forward ALLGATHER: b forward
b input gradient: b forward ALLGATHER
b input gradient REDUCESCATTER: b input gradient
b weight gradient: b input gradient
b weight gradient ALLREDUCE: b weight gradient
a input gradient: b input gradient REDUCESCATTER, b weight gradient
a weight gradient: a input gradient
a weight gradient ALLREDUCE: a weight gradient
a forward: a weight gradient ALLREDUCE
a forward ALLGATHER: a forward
b forward: a forward ALLGATHER, b weight gradient ALLREDUCE
"""
CUSTOMIZED_GRAPH = """
a forward: -
a forward ALLGATHER: a forward
b forward: a forward ALLGATHER
b input gradient: b forward
b weight gradient: b input gradient
b weight gradient ALLREDUCE: b weight gradient
a input gradient: b input gradient, b weight gradient
a weight gradient: a input gradient
a forward: a weight gradient
a forward ALLGATHER: a forward
b forward: a forward ALLGATHER, b weight gradient ALLREDUCE
"""


@pytest.mark.parametrize(
    ("parallel", "graph"),
    [
        pytest.param("DATA", DATA_GRAPH, id="DATA"),
        pytest.param("MODEL", MODEL_GRAPH, id="MODEL"),
        pytest.param("HYBRID_DATA_MODEL", HYBRID_GRAPH, id="HYBRID_DATA_MODEL"),
        pytest.param("HYBRID_MODEL_DATA", HYBRID_GRAPH, id="HYBRID_MODEL_DATA"),
        pytest.param("HYBRID_CUSTOMIZED", CUSTOMIZED_GRAPH, id="HYBRID_CUSTOMIZED"),
    ],
)
def test_one_step_and_the_next_ones_forward_pass(parallel: str, graph: str, tmp_path: Path) -> None:
    layers = write_layers(tmp_path, f"a,{TALL},MODEL", f"b,{WIDE},DATA")
    _, nodes = generate(tmp_path, **layers, parallel=parallel, num_passes=2)
    expected = graph.strip().splitlines()
    assert graph_lines(nodes)[: len(expected)] == expected


def play(nodes: list[Node], network: tuple[int, int]) -> int:
    """Run a trace; return when it ends.

    Computing nodes run one at a time, by id where several are ready; each collective by itself.
    """
    waiting = {node.id: node for node in nodes}
    running: list[tuple[int, int]] = []  # (its end, id)
    now, computing, finished = 0, -1, set[int]()
    while waiting or running:
        for node in sorted(node for node in waiting.values() if finished.issuperset(node.after)):
            if node.collective:
                takes = node.collective.comm_size + 10 * members(node, network)
                heapq.heappush(running, (now + takes, node.id))
            elif computing < 0:
                computing = node.id
                heapq.heappush(running, (now + node.duration, node.id))
            else:
                continue
            del waiting[node.id]
        now = running[0][0]
        while running and running[0][0] == now:
            done = heapq.heappop(running)[1]
            finished.add(done)
            computing = -1 if done == computing else computing
    return now


def members(node: Node, network: tuple[int, int]) -> int:
    """Return how many NPUs take part in a collective; the network has no dimension of one."""
    assert node.collective
    sizes = [size for size in network if size > 1]
    involved = node.collective.involved_dim
    assert len(involved) == len(sizes)
    return math.prod(size for size, used in zip(sizes, involved) if used)


# Two layers, by hand. A collective takes its bytes + 10 x its members:
# ALLGATHER m n / 8, REDUCESCATTER m k / dp (not for the first layer), ALLREDUCE n k / mp.
BY_HAND = [
    # dp, mp = 8, 1; all collectives over 8
    #     forward  input gradient  weight gradient  ALLREDUCE
    # a   108      -               105              192 + 80 = 272
    # b   124      148             105              1152 + 80 = 1232
    # forward a 108, b 232; backward b 337, its ALLREDUCE 337 + 1232 = 1569; b 485, a 590, its
    # ALLREDUCE 862
    # second step: a 970, b waits for 1569: 1693; backward b 1798, its ALLREDUCE 3030; the rest is
    # over by then
    pytest.param("DATA", [f"a,{TALL},DATA", f"b,{WIDE},DATA"], 1569, 3030, id="DATA"),
    # dp, mp = 1, 8; all collectives over 8
    #     forward  ALLGATHER       input gradient  REDUCESCATTER      weight gradient
    # a   108      120 + 80 = 200  103             -                  140
    # b   124      240 + 80 = 320  106             960 + 80 = 1040    140
    # forward a 108, 308, b 432, 752; backward b 858, its REDUCESCATTER 1898, beside it 998;
    # a 2001, 2141
    # second step: all of it again, 2 x 2141
    pytest.param("MODEL", [f"a,{TALL},DATA", f"b,{WIDE},DATA"], 2141, 4282, id="MODEL"),
    # dp, mp = 4, 2; ALLGATHER and REDUCESCATTER over 2, ALLREDUCE over 4
    #     forward  ALLGATHER       input gradient  REDUCESCATTER   weight gradient  ALLREDUCE
    # a   108      120 + 20 = 140  112             -               110              96 + 40 = 136
    # b   124      240 + 20 = 260  124             240 + 20 = 260  110              576 + 40 = 616
    # forward a 108, 248, b 372, 632; backward b 756, its REDUCESCATTER 1016, beside it 866, its
    # ALLREDUCE 1482; a 1128, 1238, its ALLREDUCE 1374
    # second step: from 1374 on; b, at 1374 + 248, has no need to wait for 1482; 1374 + 1482
    pytest.param(
        "HYBRID_DATA_MODEL",
        [f"a,{TALL},DATA", f"b,{WIDE},DATA"],
        1482,
        2856,
        id="HYBRID_DATA_MODEL",
    ),
    # dp, mp = 2, 4; ALLGATHER and REDUCESCATTER over 4, ALLREDUCE over 2
    #     forward  ALLGATHER       input gradient  REDUCESCATTER   weight gradient  ALLREDUCE
    # a   108      120 + 40 = 160  106             -               120              48 + 20 = 68
    # b   124      240 + 40 = 280  112             480 + 40 = 520  120              288 + 20 = 308
    # forward a 108, 268, b 392, 672; backward b 784, its REDUCESCATTER 1304, beside it 904, its
    # ALLREDUCE 1212; a 1410, 1530, its ALLREDUCE 1598
    # second step: from 1598 on, 2 x 1598
    pytest.param(
        "HYBRID_MODEL_DATA",
        [f"a,{TALL},DATA", f"b,{WIDE},DATA"],
        1598,
        3196,
        id="HYBRID_MODEL_DATA",
    ),
    # dp, mp = 4, 2 with the layers' sizes swapped: REDUCESCATTER of b is 80 + 20 = 100, less than
    # its weight gradient
    # forward a 124, 384, b 492, 632; backward b 744, its REDUCESCATTER 844, beside it 854, its
    # ALLREDUCE 990; a 978, 1088, its ALLREDUCE 1704
    # second step: from 1704 on, 2 x 1704
    pytest.param(
        "HYBRID_DATA_MODEL",
        [f"a,{WIDE},DATA", f"b,{TALL},DATA"],
        1704,
        3408,
        id="short REDUCESCATTER",
    ),
    # a as under MODEL, b as under DATA, but its input gradient before its weight gradient
    # forward a 108, 308, b 432; backward b 580, 685, its ALLREDUCE 685 + 1232 = 1917; a 788, 928
    # second step, from 928 on: a 1036, 1236, b waits for 1917: 2041; backward b 2189, 2294, its
    # ALLREDUCE 3526
    pytest.param(
        "HYBRID_CUSTOMIZED", [f"a,{TALL},MODEL", f"b,{WIDE},DATA"], 1917, 3526, id="MODEL, DATA"
    ),
    # a as under HYBRID_MODEL_DATA, b as under HYBRID_DATA_MODEL
    # forward a 108, 268, b 392, 652; backward b 776, its REDUCESCATTER 1036, beside it 886, its
    # ALLREDUCE 1502; a 1142, 1262, its ALLREDUCE 1330
    # second step: from 1330 on; b, at 1330 + 268, has no need to wait for 1502; 1330 + 1502
    pytest.param(
        "HYBRID_CUSTOMIZED",
        [f"a,{TALL},HYBRID_MODEL_DATA", f"b,{WIDE},HYBRID_DATA_MODEL"],
        1502,
        2832,
        id="HYBRID_MODEL_DATA, HYBRID_DATA_MODEL",
    ),
]


@pytest.mark.parametrize(("parallel", "layers", "one_step", "two_steps"), BY_HAND)
def test_played_by_hand(
    parallel: str, layers: list[str], one_step: int, two_steps: int, tmp_path: Path
) -> None:
    chosen = {**write_layers(tmp_path, *layers), "parallel": parallel}
    ends = []
    for num_passes in (1, 2):
        _, nodes = generate(tmp_path, **chosen, num_passes=num_passes)
        ends.append(play(nodes, NETWORK))
    assert ends == [one_step, two_steps]


# Sizes at which no collective comes to 0 bytes on up to 64 NPUs, and all fits into 64 bits.
SIZES = st.integers(8, 5000) | st.integers(8, 10**7)
NETWORKS = st.tuples(st.integers(1, 8), st.integers(1, 8))


@MANY
@given(tables(SIZES), PARALLEL, NETWORKS, st.integers(1, 3), ROUNDINGS)
def test_any_table_gives_a_trace_that_runs_to_its_end(
    layers: list[LayerCells],
    parallel: str,
    network: tuple[int, int],
    num_passes: int,
    rounding: str,
) -> None:
    npus, packages = math.prod(network), network[1]
    chosen = {"num_npus": npus, "num_packages": packages, "shard_rounding": rounding}
    chosen |= {"parallel": parallel, "num_passes": num_passes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "t.csv").write_bytes(table(layers))
        text, nodes = generate(folder, mnk=folder / "t.csv", **chosen)
    assert contents(nodes) == expected_contents(text, npus, packages, num_passes)
    assert all(members(node, network) > 1 for node in nodes if node.collective)
    assert play(nodes, network) >= sum(node.duration for node in nodes)
