"""Execution traces: read by Chakra's own schema, held against the workload file, and played by a toy ASTRA-sim."""

from __future__ import annotations

import errno
import heapq
import io
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.proto import parse_length_prefixed
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import given
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool
from helpers import (
    GOOD_REPORT,
    MNK_INPUTS,
    PLAIN,
    SCRIPT,
    fake_v2,
    is_one_error_line,
    read_like_astrasim,
    run,
    settings,
    write_table,
)
from test_cli import BOUND
from test_properties import MANY, NAMES, PARALLEL, table

# From MLCommons Chakra's schema/protobuf/et_def.proto, word for word; the other lists, and Tensor, are left out.
OFFICIAL = """
message AttributeProto {
  string name = 1;
  string doc_string = 2;

  oneof value {
    double double_val = 3;
    float float_val = 5;
    int32 int32_val = 7;
    int64 int64_val = 9;
    uint32 uint32_val = 11;
    uint64 uint64_val = 13;
    sint32 sint32_val = 15;
    sint64 sint64_val = 17;
    fixed32 fixed32_val = 19;
    fixed64 fixed64_val = 21;
    sfixed32 sfixed32_val = 23;
    sfixed64 sfixed64_val = 25;
    bool bool_val = 27;
    BoolList bool_list = 28;
    string string_val = 29;
    bytes bytes_val = 31;
  }
}

message BoolList {
  repeated bool values = 1;
}

message GlobalMetadata {
  string version = 1;
  repeated AttributeProto attr = 2;
}

enum NodeType {
  INVALID_NODE = 0;
  METADATA_NODE = 1;
  MEM_LOAD_NODE = 2;
  MEM_STORE_NODE = 3;
  COMP_NODE = 4;
  COMM_SEND_NODE = 5;
  COMM_RECV_NODE = 6;
  COMM_COLL_NODE = 7;
}

message Node {
  uint64 id = 1;
  string name = 2;
  NodeType type = 3;

  // Control and data dependencies
  repeated uint64 ctrl_deps = 4;
  repeated uint64 data_deps = 5;

  // Timing information
  uint64 start_time_micros = 6;
  uint64 duration_micros = 7;

  IOInfo inputs = 8;
  IOInfo outputs = 9;
  repeated AttributeProto attr = 10;
}

message IOInfo {
  string values = 1;
  string shapes = 2;
  string types = 3;
}
"""
COMP_NODE, COMM_COLL_NODE = 4, 7
COMM_TYPES = {"ALLREDUCE": 0, "ALLGATHER": 2, "REDUCESCATTER": 7}
CPU_OP = {"is_cpu_op": "bool_val"}
COLLECTIVE = {
    **CPU_OP,
    "comm_type": "int64_val",
    "comm_size": "int64_val",
    "involved_dim": "bool_list",
}


def official_messages() -> dict[str, Any]:
    """Return the classes of the official messages, by proto3's rules."""
    file = descriptor_pb2.FileDescriptorProto(name="et_def.proto", syntax="proto3")
    scalars = dict(descriptor_pb2.FieldDescriptorProto.Type.items())
    for keyword, name, body in re.findall(
        r"(message|enum) (\w+) \{\n(.*?)\n\}", OFFICIAL, re.DOTALL
    ):
        if keyword == "enum":
            values = file.enum_type.add(name=name).value
            for value, number in re.findall(r"(\w+) = (\d+);", body):
                values.add(name=value, number=int(number))
            continue
        message = file.message_type.add(name=name)
        before_oneof, oneof, inside = body.partition("oneof value {")
        if oneof:
            message.oneof_decl.add(name="value")
        for lines, place in ((before_oneof, {}), (inside, {"oneof_index": 0})):
            for repeated, kind, field, number in re.findall(
                r"(repeated )?(\w+) (\w+) = (\d+);", lines
            ):
                declared = message.field.add(
                    name=field, number=int(number), label=3 if repeated else 1, **place
                )
                if f"TYPE_{kind.upper()}" in scalars:
                    declared.type = scalars[f"TYPE_{kind.upper()}"]
                else:
                    declared.type_name = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return dict(message_factory.GetMessageClassesForFiles([file.name], pool))


MESSAGES = official_messages()


class Collective(NamedTuple):
    comm_type: int
    comm_size: int
    involved_dim: tuple[bool, ...]


class Node(NamedTuple):
    id: int
    name: str
    after: list[int]
    duration: int
    collective: Collective | None


def read_trace(path: Path) -> list[Node]:
    """Read a trace: metadata first, then nodes, each with what ASTRA-sim wants and nothing else."""
    trace = io.BytesIO(path.read_bytes())
    metadata = parse_length_prefixed(MESSAGES["GlobalMetadata"], trace)
    assert metadata.version
    nodes: dict[int, Node] = {}
    for message in iter(partial(parse_length_prefixed, MESSAGES["Node"], trace), None):
        for part in (metadata, message, *message.attr, *(each.bool_list for each in message.attr)):
            assert len(UnknownFieldSet(part)) == 0
        assert (bool(message.name), list(message.ctrl_deps), message.start_time_micros) == (
            True,
            [],
            0,
        )
        kinds = {each.name: each.WhichOneof("value") for each in message.attr}
        values = {each.name: getattr(each, kinds[each.name]) for each in message.attr}
        assert len(values) == len(message.attr)
        assert not values["is_cpu_op"]
        if message.type == COMM_COLL_NODE:
            assert (kinds, message.duration_micros) == (COLLECTIVE, 0)
            involved = tuple(values["involved_dim"].values)
            collective = Collective(values["comm_type"], values["comm_size"], involved)
        else:
            assert (message.type, kinds) == (COMP_NODE, CPU_OP)
            collective = None
        after = list(message.data_deps)
        assert set(after) <= set(nodes), "a dependency points to an earlier node"
        assert len(set(after)) == len(after), "a dependency is listed once"
        assert message.id not in nodes
        nodes[message.id] = Node(
            message.id, message.name, after, message.duration_micros, collective
        )
    return list(nodes.values())


def generate(folder: Path, **changes: Any) -> tuple[str, list[Node]]:
    """Return the workload file, in ns of 1 GHz, and the trace of the first NPU."""
    in_ns = {"time_unit": "ns", "clock_mhz": 1000.0}
    chosen = settings(folder, chakra_et=folder / "et" / "x", **{**in_ns, **changes})
    tool.generate(chosen)
    return chosen.output_file.read_text(), read_trace(folder / "et" / "x.0.et")


# --- Against the workload file
SPANS = {  # the dimensions of forward, input-gradient and weight-gradient collectives: 0 in a package, 1 between them
    "DATA": ((), (), (0, 1)),
    "MODEL": ((0, 1), (0, 1), ()),
    "HYBRID_DATA_MODEL": ((0,), (0,), (1,)),
    "HYBRID_MODEL_DATA": ((1,), (1,), (0,)),
}


def contents(nodes: list[Node]) -> tuple[Counter[int], Counter[Collective]]:
    times = Counter(node.duration for node in nodes if not node.collective)
    return times, Counter(node.collective for node in nodes if node.collective)


def expected_contents(
    text: str, npus: int, packages: int, num_passes: int
) -> tuple[Counter[int], Counter[Collective]]:
    """Return how often each compute time and each collective of a workload file is in its trace."""
    network = (npus // packages, packages)
    times: Counter[int] = Counter()
    collectives: Counter[Collective] = Counter()
    parallel, layers = read_like_astrasim(text)
    for index, layer in enumerate(layers):
        spans = SPANS[layer.strategy or parallel]
        for pass_index, ((time, kind, size), span) in enumerate(zip(layer.passes, spans)):
            first_input_gradient = (index, pass_index) == (0, 1)
            if not (first_input_gradient and parallel == "DATA"):
                times[time] += num_passes
            if math.prod(network[dimension] for dimension in span) > 1 and not first_input_gradient:
                involved = tuple(
                    dimension in span for dimension, members in enumerate(network) if members > 1
                )
                collectives[Collective(COMM_TYPES[kind], size, involved)] += num_passes
    return times, collectives


@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize(
    ("parallel", "npus", "packages", "count"),
    [  # 7 layers: 3 x 7 GEMMs, less the first input gradient under DATA; at most 7, 6 and 7 collectives of the passes
        ("DATA", 16, 2, 20 + 7),
        ("DATA", 16, 1, 20 + 7),
        ("DATA", 16, 16, 20 + 7),
        ("DATA", 1, 1, 20),
        ("MODEL", 16, 2, 21 + 7 + 6),
        ("MODEL", 16, 1, 21 + 7 + 6),
        ("MODEL", 16, 16, 21 + 7 + 6),
        ("MODEL", 1, 1, 21),
        ("HYBRID_DATA_MODEL", 16, 2, 21 + 7 + 6 + 7),
        ("HYBRID_DATA_MODEL", 16, 1, 21 + 7 + 6),
        ("HYBRID_DATA_MODEL", 16, 16, 21 + 7),
        ("HYBRID_DATA_MODEL", 1, 1, 21),
        ("HYBRID_MODEL_DATA", 16, 2, 21 + 7 + 6 + 7),
        ("HYBRID_MODEL_DATA", 16, 1, 21 + 7),
        ("HYBRID_MODEL_DATA", 16, 16, 21 + 7 + 6),
        ("HYBRID_MODEL_DATA", 1, 1, 21),
        # DATA, MODEL, MODEL, HYBRID_DATA_MODEL, HYBRID_MODEL_DATA, DATA, DATA
        ("HYBRID_CUSTOMIZED", 16, 2, 21 + 4 + 4 + 5),
        ("HYBRID_CUSTOMIZED", 16, 1, 21 + 3 + 3 + 4),
        ("HYBRID_CUSTOMIZED", 16, 16, 21 + 3 + 3 + 4),
        ("HYBRID_CUSTOMIZED", 1, 1, 21),
    ],
)
def test_the_workload_files_times_and_collectives(
    parallel: str, npus: int, packages: int, count: int, num_passes: int, tmp_path: Path
) -> None:
    mnk = MNK_INPUTS / "example_customized.csv"
    system = {"num_npus": npus, "num_packages": packages}
    text, nodes = generate(tmp_path, mnk=mnk, parallel=parallel, num_passes=num_passes, **system)
    assert len(nodes) == count * num_passes
    assert contents(nodes) == expected_contents(text, npus, packages, num_passes)


def test_update_time_has_no_place_in_a_trace(tmp_path: Path) -> None:
    assert generate(tmp_path, update_time=7)[1] == generate(tmp_path, update_time=100)[1]


# --- The order of it
NETWORK = (2, 4)  # 2 NPUs in each of 4 packages
TALL, WIDE = "40,24,8", "40,48,24"  # m, n, k


def write_layers(folder: Path, *layers: str) -> dict[str, Any]:
    """Write a table and a config under which a GEMM of up to 50 x 50 takes 100 + its reduction; return the settings.

    Hence forward 100 + k, input gradient 100 + n / mp, weight gradient 100 + m / dp.
    """
    config = folder / "c.cfg"
    config.write_text("[architecture_presets]\nArrayHeight: 50\nArrayWidth: 53\nDataflow: os\n")
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
        ("DATA", DATA_GRAPH),
        ("MODEL", MODEL_GRAPH),
        ("HYBRID_DATA_MODEL", HYBRID_GRAPH),
        ("HYBRID_MODEL_DATA", HYBRID_GRAPH),
        ("HYBRID_CUSTOMIZED", CUSTOMIZED_GRAPH),
    ],
)
def test_one_step_and_the_next_ones_forward_pass(parallel: str, graph: str, tmp_path: Path) -> None:
    layers = write_layers(tmp_path, f"a,{TALL},MODEL", f"b,{WIDE},DATA")
    _, nodes = generate(tmp_path, **layers, parallel=parallel, num_passes=2)
    names = {node.id: node.name for node in nodes}
    lines = [
        f"{node.name}: {', '.join(sorted(names[id] for id in node.after)) or '-'}" for node in nodes
    ]
    expected = graph.strip().splitlines()
    assert lines[: len(expected)] == expected


def play(nodes: list[Node], network: tuple[int, int]) -> int:
    """Run a trace: computing nodes one at a time, by id where several are ready; each collective by itself."""
    sizes = [size for size in network if size > 1]
    waiting = {node.id: node for node in nodes}
    running: list[tuple[int, int]] = []  # (its end, id)
    now, computing, finished = 0, -1, set[int]()
    while waiting or running:
        for node in sorted(node for node in waiting.values() if finished.issuperset(node.after)):
            if node.collective:
                members = math.prod(
                    size for size, involved in zip(sizes, node.collective.involved_dim) if involved
                )
                heapq.heappush(running, (now + node.collective.comm_size + 10 * members, node.id))
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


# Two layers, by hand. A collective takes its bytes + 10 x its members:
# ALLGATHER m n / 8, REDUCESCATTER m k / dp (not for the first layer), ALLREDUCE n k / mp.
BY_HAND = [
    # dp, mp = 8, 1; all collectives over 8
    #     forward  input gradient  weight gradient  ALLREDUCE
    # a   108      -               105              192 + 80 = 272
    # b   124      148             105              1152 + 80 = 1232
    # forward a 108, b 232; backward b 337, its ALLREDUCE 337 + 1232 = 1569; b 485, a 590, its ALLREDUCE 862
    # second step: a 970, b waits for 1569: 1693; backward b 1798, its ALLREDUCE 3030; the rest is over by then
    pytest.param("DATA", [f"a,{TALL},DATA", f"b,{WIDE},DATA"], 1569, 3030, id="DATA"),
    # dp, mp = 1, 8; all collectives over 8
    #     forward  ALLGATHER       input gradient  REDUCESCATTER      weight gradient
    # a   108      120 + 80 = 200  103             -                  140
    # b   124      240 + 80 = 320  106             960 + 80 = 1040    140
    # forward a 108, 308, b 432, 752; backward b 858, its REDUCESCATTER 1898, beside it 998; a 2001, 2141
    # second step: all of it again, 2 x 2141
    pytest.param("MODEL", [f"a,{TALL},DATA", f"b,{WIDE},DATA"], 2141, 4282, id="MODEL"),
    # dp, mp = 4, 2; ALLGATHER and REDUCESCATTER over 2, ALLREDUCE over 4
    #     forward  ALLGATHER       input gradient  REDUCESCATTER   weight gradient  ALLREDUCE
    # a   108      120 + 20 = 140  112             -               110              96 + 40 = 136
    # b   124      240 + 20 = 260  124             240 + 20 = 260  110              576 + 40 = 616
    # forward a 108, 248, b 372, 632; backward b 756, its REDUCESCATTER 1016, beside it 866, its ALLREDUCE 1482;
    # a 1128, 1238, its ALLREDUCE 1374
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
    # forward a 108, 268, b 392, 672; backward b 784, its REDUCESCATTER 1304, beside it 904, its ALLREDUCE 1212;
    # a 1410, 1530, its ALLREDUCE 1598
    # second step: from 1598 on, 2 x 1598
    pytest.param(
        "HYBRID_MODEL_DATA",
        [f"a,{TALL},DATA", f"b,{WIDE},DATA"],
        1598,
        3196,
        id="HYBRID_MODEL_DATA",
    ),
    # dp, mp = 4, 2 with the layers' sizes swapped: REDUCESCATTER of b is 80 + 20 = 100, less than its weight gradient
    # forward a 124, 384, b 492, 632; backward b 744, its REDUCESCATTER 844, beside it 854, its ALLREDUCE 990;
    # a 978, 1088, its ALLREDUCE 1704
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
    # second step, from 928 on: a 1036, 1236, b waits for 1917: 2041; backward b 2189, 2294, its ALLREDUCE 3526
    pytest.param(
        "HYBRID_CUSTOMIZED", [f"a,{TALL},MODEL", f"b,{WIDE},DATA"], 1917, 3526, id="MODEL, DATA"
    ),
    # a as under HYBRID_MODEL_DATA, b as under HYBRID_DATA_MODEL
    # forward a 108, 268, b 392, 652; backward b 776, its REDUCESCATTER 1036, beside it 886, its ALLREDUCE 1502;
    # a 1142, 1262, its ALLREDUCE 1330
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
    ends = [
        play(generate(tmp_path, **chosen, num_passes=num_passes)[1], NETWORK)
        for num_passes in (1, 2)
    ]
    assert ends == [one_step, two_steps]


# Sizes at which no collective comes to 0 bytes on up to 64 NPUs, and every time and size fits into 64 bits.
SIZES = st.integers(8, 5000) | st.integers(8, 10**7)
LAYERS = st.lists(
    st.tuples(NAMES, SIZES, SIZES, SIZES, st.sampled_from(PLAIN)), min_size=1, max_size=6
)
NETWORKS = st.tuples(st.integers(1, 8), st.integers(1, 8))


@MANY
@given(LAYERS, PARALLEL, NETWORKS, st.integers(1, 3), st.sampled_from(["up", "down"]))
def test_any_table_gives_a_trace_that_runs_to_its_end(
    layers: list[tuple[str, int, int, int, str]],
    parallel: str,
    network: tuple[int, int],
    steps: int,
    rounding: str,
) -> None:
    npus, packages = math.prod(network), network[1]
    system = {"num_npus": npus, "num_packages": packages, "shard_rounding": rounding}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "t.csv").write_bytes(table(layers, "plain"))
        text, nodes = generate(
            folder, mnk=folder / "t.csv", parallel=parallel, num_passes=steps, **system
        )
    assert contents(nodes) == expected_contents(text, npus, packages, steps)
    for node in nodes:
        if node.collective:
            involved = node.collective.involved_dim
            sizes = [size for size in network if size > 1]
            assert len(involved) == len(sizes)
            assert math.prod(size for size, used in zip(sizes, involved) if used) > 1
    assert play(nodes, network) >= sum(node.duration for node in nodes)


# --- The files
def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return inode and bytes of what is here and below."""
    everything = (folder, *folder.rglob("*"))
    return {
        str(path): (path.stat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in everything
    }


def names(count: int, prefix: str = "x") -> set[str]:
    return {f"{prefix}.{npu}.et" for npu in range(count)}


def in_et(folder: Path) -> list[Path]:
    return sorted((folder / "et").iterdir())


def test_the_command_line(tmp_path: Path) -> None:
    """In microseconds, relative to the current folder, parent folders made, links of one file as readable as any."""
    flags = [
        "--time_unit=us",
        "--clock_mhz=700",
        "--num_passes=2",
        "--num_npus=16",
        "--num_packages=2",
    ]
    result = run(
        tmp_path,
        "--cycle_model=analytical",
        "--chakra_et=deep/et/v1.2",
        "--parallel=HYBRID_DATA_MODEL",
        *flags,
    )
    assert result.status == 0
    text, nodes = (
        (tmp_path / "workload.txt").read_text(),
        read_trace(tmp_path / "deep/et/v1.2.3.et"),
    )
    assert contents(nodes) == expected_contents(text, 16, 2, 2)
    files = list((tmp_path / "deep/et").iterdir())
    assert {path.name for path in files} == names(16, "v1.2")
    assert len({path.stat().st_ino for path in files}) == 1
    assert {path.stat().st_mode for path in files} == {(tmp_path / "workload.txt").stat().st_mode}


def test_gpt3_on_4096_npus_is_on_disk_once(tmp_path: Path) -> None:
    system = {"num_npus": 4096, "num_packages": 512, "parallel": "HYBRID_DATA_MODEL"}
    _, nodes = generate(tmp_path, mnk=MNK_INPUTS / "gpt3_175b.csv", **system)
    assert len(nodes) == 3 * 384 + 384 + 383 + 384
    assert {path.name for path in in_et(tmp_path)} == names(4096)
    assert len({path.stat().st_ino for path in in_et(tmp_path)}) == 1


@pytest.mark.parametrize(("names_of_one", "inodes"), [(1, 16), (5, 4)])
def test_copies_where_there_are_no_more_links(
    names_of_one: int, inodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_or_refuse(source: Path, target: Path) -> None:
        if source.stat().st_nlink == names_of_one:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK), str(source))
        link(source, target)

    monkeypatch.setattr(os, "link", link_or_refuse)
    generate(tmp_path)
    assert {path.name for path in in_et(tmp_path)} == names(16)
    assert len({path.stat().st_ino for path in in_et(tmp_path)}) == inodes
    assert len({path.read_bytes() for path in in_et(tmp_path)}) == 1


def test_older_traces_are_replaced(tmp_path: Path) -> None:
    _, longer = generate(tmp_path, num_passes=3)
    _, shorter = generate(tmp_path, num_npus=8)
    assert len(longer) == 3 * len(shorter)
    assert all(read_trace(tmp_path / "et" / name) == shorter for name in names(8))
    assert not [path for path in in_et(tmp_path) if path.name not in names(16)]


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_can_not_write_its_workload_file(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves no trace, or those of the run before, and nothing half made."""
    if again:
        generate(tmp_path)
    else:
        (tmp_path / "et").mkdir()
    before = state(tmp_path / "et")
    replace = os.replace

    def no_space_for_output(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "workload.txt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", no_space_for_output)
    with pytest.raises(OSError, match="No space left"):
        generate(tmp_path, num_passes=2)
    assert state(tmp_path / "et") == before


def test_a_signal_while_results_are_put_in_place_is_heeded_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mixture of old and new traces, and no text file without them."""
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        replace(source, target)

    chosen = settings(tmp_path, chakra_et=tmp_path / "et/x", time_unit="us", clock_mhz=700.0)
    tool.generate(chosen)
    before = in_et(tmp_path)[0].stat().st_ino
    written = tool.write_atomic

    def write_then_interrupt(path: Path, text: str) -> None:
        written(path, text)
        if path == chosen.output_file:
            monkeypatch.setattr(os, "replace", interrupted)

    monkeypatch.setattr(tool, "write_atomic", write_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        tool.generate(chosen)
    assert {path.name for path in in_et(tmp_path)} == names(16)
    assert before not in {path.stat().st_ino for path in in_et(tmp_path)}


FOLDER = " is a folder or was given to read, expected another file to write"


@pytest.mark.parametrize(
    ("folder", "file", "closed", "message"),
    [
        pytest.param("w.txt", "et/x.3.et", None, f"w.txt{FOLDER}", id="output"),
        pytest.param("et/x.0.et", "et/x.3.et", None, f"et/x.0.et{FOLDER}", id="first"),
        pytest.param("et/x.7.et", "et/x.3.et", None, f"et/x.7.et{FOLDER}", id="last"),
        pytest.param("other", "et", None, "et: File exists", id="file as folder"),
        pytest.param("other", "et/x.3.et", "et", "et: no permission to write", id="closed folder"),
        pytest.param(
            "other", "et/x.0.et", "et/x.0.et", "et/x.0.et: no permission to write", id="closed file"
        ),
    ],
)
def test_refused_before_anything_is_simulated(
    folder: str, file: str, closed: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    before = state(tmp_path / "et")
    fake = fake_v2(
        tmp_path / "fake", f"open({str(tmp_path / 'simulated')!r}, 'w').close()\n{GOOD_REPORT}"
    )
    flags = [
        "--chakra_et=et/x",
        "--time_unit=ns",
        "--clock_mhz=1000",
        "--output_file=w.txt",
        "--cache_dir=",
    ]
    command = [*BOUND, sys.executable, str(SCRIPT), f"--scalesim_path={fake}", *flags]
    if closed:
        (tmp_path / closed).chmod(0o444 if closed == file else 0o555)
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    finally:
        if closed:
            (tmp_path / closed).chmod(0o755)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {tmp_path}/{message}\n")
    assert not (tmp_path / "simulated").exists()
    assert not (tmp_path / "w.txt").is_file()
    assert state(tmp_path / "et") == before


def test_a_dry_run_writes_none(tmp_path: Path) -> None:
    flags = ["--chakra_et=et/x", "--time_unit=us", "--clock_mhz=700", "--dry_run"]
    assert run(tmp_path, "--cycle_model=analytical", *flags).status == 0
    assert list(tmp_path.iterdir()) == []


# --- What a trace can't hold
@pytest.mark.parametrize(
    ("layer", "parallel"),
    [
        pytest.param("a,64,10000000000,10000000000", "DATA", id="size"),  # 2 x 10^20 bytes
        pytest.param(f"a,{10**25},8,8", "DATA", id="time"),
        pytest.param(f"a,{10**29},8,8", "MODEL", id="both"),
    ],
)
def test_what_does_not_fit_into_64_bits(layer: str, parallel: str, tmp_path: Path) -> None:
    mnk = write_table(tmp_path / "t.csv", "fits,64,64,64", layer)
    with pytest.raises(ValueError, match="out of range"):
        generate(tmp_path, mnk=mnk, parallel=parallel)
    assert not (tmp_path / "workload.txt").exists()
    assert list(tmp_path.glob("et/*")) == []


@pytest.mark.parametrize("flags", [[], ["--time_unit=cycles"]])
def test_cycles_are_refused(flags: list[str], tmp_path: Path) -> None:
    result = run(tmp_path, "--cycle_model=analytical", "--chakra_et=x", *flags)
    assert is_one_error_line(result)
    assert "chakra_et" in result.err
    assert "expected ns or us" in result.err
    assert list(tmp_path.iterdir()) == []


def test_protobuf_is_for_traces_only(tmp_path: Path) -> None:
    """Python itself is told that there is none."""
    hidden = "import sys, runpy; sys.modules['google.protobuf'] = None;"
    hidden += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        hidden,
        str(SCRIPT),
        "--cycle_model=analytical",
        "--cache_dir=",
    ]
    traces = ["--chakra_et=et/x", "--time_unit=ns", "--clock_mhz=1000"]
    done = subprocess.run([*command, *traces], cwd=tmp_path, capture_output=True, text=True)
    message = "error: --chakra_et needs protobuf: pip install -r requirements.txt\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert list(tmp_path.iterdir()) == []
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "workload.txt").read_text().startswith("DATA\n7\n")
