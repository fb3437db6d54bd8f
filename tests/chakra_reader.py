"""A reader of execution traces, by Chakra's own schema, and what a workload file says of them."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.proto import parse_length_prefixed
from google.protobuf.unknown_fields import UnknownFieldSet

import helpers
from helpers import read_like_astrasim

# From MLCommons Chakra's schema/protobuf/et_def.proto, word for word, without the other lists
# and Tensor.
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
COMM_TYPES = {"ALLREDUCE": 0, "ALLGATHER": 2, "ALLTOALL": 6, "REDUCESCATTER": 7}
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
    blocks = re.findall(r"(message|enum) (\w+) \{\n(.*?)\n\}", OFFICIAL, re.DOTALL)
    for keyword, name, body in blocks:
        if keyword == "enum":
            values = file.enum_type.add(name=name).value
            for value, number in re.findall(r"(\w+) = (\d+);", body):
                values.add(name=value, number=int(number))
            continue
        message = file.message_type.add(name=name)
        before_oneof, oneof, inside = body.partition("oneof value {")
        add_fields(message, before_oneof)
        if oneof:
            message.oneof_decl.add(name="value")
            add_fields(message, inside, oneof_index=0)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return dict(message_factory.GetMessageClassesForFiles([file.name], pool))


def add_fields(message: Any, lines: str, **place: int) -> None:
    """Declare the fields of a message."""
    scalars = dict(descriptor_pb2.FieldDescriptorProto.Type.items())
    fields = re.findall(r"(repeated )?(\w+) (\w+) = (\d+);", lines)
    for repeated, kind, name, number in fields:
        label = 3 if repeated else 1
        declared = message.field.add(name=name, number=int(number), label=label, **place)
        if f"TYPE_{kind.upper()}" in scalars:
            declared.type = scalars[f"TYPE_{kind.upper()}"]
        else:
            declared.type_name = kind


MESSAGES = official_messages()


class Collective(NamedTuple):
    """A collective as a trace has it."""

    comm_type: int
    comm_size: int
    involved_dim: tuple[bool, ...]


class Node(NamedTuple):
    """A node as a trace has it."""

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
    assert len(UnknownFieldSet(metadata)) == 0
    nodes: dict[int, Node] = {}
    for message in iter(partial(parse_length_prefixed, MESSAGES["Node"], trace), None):
        node = read_node(message)
        assert set(node.after) <= set(nodes), "a dependency points to an earlier node"
        assert len(set(node.after)) == len(node.after), "a dependency is listed once"
        assert node.id not in nodes
        nodes[node.id] = node
    return list(nodes.values())


def read_node(message: Any) -> Node:
    """Read a node, of which every attribute is known and has the type that ASTRA-sim wants."""
    for part in (message, *message.attr, *(each.bool_list for each in message.attr)):
        assert len(UnknownFieldSet(part)) == 0
    assert message.name
    assert list(message.ctrl_deps) == []
    assert message.start_time_micros == 0
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
    after, duration = list(message.data_deps), message.duration_micros
    return Node(message.id, message.name, after, duration, collective)


def generate(folder: Path, **changes: Any) -> tuple[str, list[Node]]:
    """Return the workload file and the trace of the first NPU, both in us, and one for a cycle."""
    in_us = {"time_unit": "us", "clock_mhz": 1.0, "chakra_et": folder / "et" / "x"}
    text = helpers.generate(folder, **{**in_us, **changes})
    return text, read_trace(folder / "et" / "x.0.et")


def graph_lines(nodes: list[Node]) -> list[str]:
    """Return each node by its name, and after which others it comes, by name."""
    names = {node.id: node.name for node in nodes}
    lines = []
    for node in nodes:
        before = sorted(names[number] for number in node.after)
        lines.append(f"{node.name}: {', '.join(before) or '-'}")
    return lines


def trace_names(count: int, prefix: str = "x") -> set[str]:
    """Return the names of the traces of so many NPUs."""
    return {f"{prefix}.{npu}.et" for npu in range(count)}


# --- Against the workload file

SPANS = {  # the dimensions of each pass's collective: 0 in a package, 1 between packages
    "DATA": ((), (), (0, 1)),
    "MODEL": ((0, 1), (0, 1), ()),
    "HYBRID_DATA_MODEL": ((0,), (0,), (1,)),
    "HYBRID_MODEL_DATA": ((1,), (1,), (0,)),
}
Contents = tuple[Counter[int], Counter[Collective]]


def contents(nodes: list[Node]) -> Contents:
    """Return how often each compute time and each collective is in a trace."""
    times = Counter(node.duration for node in nodes if not node.collective)
    return times, Counter(node.collective for node in nodes if node.collective)


def expected_contents(text: str, npus: int, packages: int, num_passes: int) -> Contents:
    """Return the contents of the trace that belongs to a workload file."""
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
            members = math.prod(network[dimension] for dimension in span)
            if members > 1 and not first_input_gradient:
                used = [dimension in span for dimension, size in enumerate(network) if size > 1]
                collectives[Collective(COMM_TYPES[kind], size, tuple(used))] += num_passes
    return times, collectives
