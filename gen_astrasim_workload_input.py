#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["absl-py", "tqdm", "scalesim==3.0.0", "numpy<2.4", "protobuf>=5.29"]
# ///
"""Turn a table of layers, each a GEMM of m, n, k, into the workload file that ASTRA-sim runs.

  python gen_astrasim_workload_input.py --num_npus=16 --num_packages=2
  python gen_astrasim_workload_input.py --mnk=my_layers.csv --parallel=MODEL --output_file=model.txt

mnk table -> layers -> one NPU's GEMMs, three for each layer -> cycles from SCALE-Sim -> workload
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported, Ctrl-C ends it silently

import configparser
import csv
import difflib
import errno
import fcntl
import gc
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    from absl import app, flags
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f"error: no {missing.name} in {sys.executable}: pip install -r requirements.txt")

# tqdm makes its lock at its first use, and a Ctrl-C in that moment would be lost.
tqdm.get_lock()  # type: ignore[no-untyped-call]


# --- What stands in tables and files

Dimensions = tuple[int, ...]  # of the network: 0 is within a package, 1 is between packages
Network = tuple[int, int]  # NPUs in a package, packages


class Strategy(NamedTuple):
    """The dimensions of the network over which a layer's sizes are split."""

    split_m: Dimensions  # data parallelism: the NPUs of a group have different rows
    split_n: Dimensions  # model parallelism: the NPUs of a group have different outputs


STRATEGIES = {
    "DATA": Strategy(split_m=(0, 1), split_n=()),
    "MODEL": Strategy(split_m=(), split_n=(0, 1)),
    "HYBRID_DATA_MODEL": Strategy(split_m=(1,), split_n=(0,)),
    "HYBRID_MODEL_DATA": Strategy(split_m=(0,), split_n=(1,)),
}
CUSTOMIZED = "HYBRID_CUSTOMIZED"  # each layer has a strategy of its own
DLRM = "HYBRID_DLRM"  # the embedding is split as by MODEL, all other layers as by DATA

# By their numbers in Chakra.
COLLECTIVE_TYPES = {"ALLGATHER": 2, "REDUCESCATTER": 7, "ALLREDUCE": 0, "ALLTOALL": 6}
PASS_NAMES = ("forward", "input gradient", "weight gradient")

# --- Flags

EXAMPLE = Path(__file__).resolve().parent / "mnk_inputs/example.csv"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gen_astrasim_workload_input")
INT_MAX = (1 << 31) - 1

flags.DEFINE_string("mnk", str(EXAMPLE), "The table of layers, a CSV file.")
flags.DEFINE_enum(
    "parallel",
    "DATA",
    [*STRATEGIES, CUSTOMIZED, DLRM],
    "How layers are partitioned across NPUs.",
    case_sensitive=False,
)
flags.DEFINE_integer("num_npus", 8, "NPUs in the whole system.", 1, INT_MAX)
flags.DEFINE_alias("num_npu", "num_npus")
flags.DEFINE_integer("num_packages", 1, "Packages that hold the NPUs.", 1)
flags.DEFINE_integer("datatype_size", 2, "Bytes per element.", 1, 1 << 20)
flags.DEFINE_integer("minibatch", 1, "Images, for a table of convolutions.", 1, INT_MAX)
flags.DEFINE_string("output_file", "workload.txt", "The workload text file.")
flags.DEFINE_string("run_name", "", "Folder in outputs/<parallel>; by default the table's name.")
flags.DEFINE_string("scalesim_path", "", "A SCALE-Sim folder; by default the installed package.")
flags.DEFINE_string("scalesim_config", "", "A SCALE-Sim config; by default a 256 x 256 array.")
flags.DEFINE_enum(
    "cycle_model",
    "simulated",
    ["simulated", "analytical"],
    "Cycles from SCALE-Sim, or from its formula.",
)
flags.DEFINE_integer("jobs", None, "SCALE-Sim processes at once; by default one for each CPU.", 1)
flags.DEFINE_string("cache_dir", str(CACHE), "Folder of finished simulations; empty for none.")
flags.DEFINE_enum(
    "shard_rounding",
    "up",
    ["up", "down"],
    "How a size that does not divide is cut; up times the slowest NPU.",
)
flags.DEFINE_integer("update_time", 100, "Delay after a collective in ASTRA-sim 1.0.", 0, INT_MAX)
flags.DEFINE_enum(
    "time_unit", "cycles", ["cycles", "ns", "us"], "Unit of compute times in the text file."
)
flags.DEFINE_float("clock_mhz", None, "The accelerator's clock, for ns, us and traces.", 1e-6, 1e9)
flags.DEFINE_string("chakra_et", "", "Prefix of traces for ASTRA-sim 2.x; needs --clock_mhz.")
flags.DEFINE_integer("num_passes", 1, "Training steps in these traces.", 1, 1 << 20)
flags.DEFINE_string("summary_csv", "", "A CSV file to which a row for this run is appended.")
flags.DEFINE_bool("dry_run", False, "Print the plan and its cost; write nothing.")
flags.DEFINE_string("dask_scheduler", "", "Address of a Dask scheduler, to simulate there.")


def is_file_or_empty(path: str) -> bool:
    """Say whether a path ends in a file's name, or is not given."""
    return not path or path.rpartition("/")[2] not in ("", ".", "..")


def is_below_outputs(run_name: str) -> bool:
    """Say whether a run's name stays below outputs/<parallel>."""
    parts = run_name.split("/")
    if "." in parts or ".." in parts or "\0" in run_name:
        return False
    return not run_name.startswith("/")


def packages_divide_npus(given: dict[str, int]) -> bool:
    """Say whether all packages have as many NPUs."""
    return given["num_npus"] % given["num_packages"] == 0


def check_clock(given: dict[str, Any]) -> bool:
    """Refuse a clock that is missing, or that nothing uses."""
    unit, clock, traces = given["time_unit"], given["clock_mhz"], given["chakra_et"]
    if unit != "cycles" and clock is None:
        raise flags.ValidationError(f"--time_unit={unit} needs --clock_mhz")
    if traces and clock is None:
        raise flags.ValidationError("--chakra_et needs --clock_mhz, as traces hold microseconds")
    if clock is not None and unit == "cycles" and not traces:
        raise flags.ValidationError("--clock_mhz needs --time_unit=ns or us, or --chakra_et")
    if clock is not None and math.isnan(clock):
        raise flags.ValidationError("expected a number of MHz")
    return True


flags.register_validator("mnk", bool, "expected a path")
flags.register_validator("output_file", bool, "expected a path")
flags.register_validator("output_file", is_file_or_empty, "expected a file, not a folder")
flags.register_validator("summary_csv", is_file_or_empty, "expected a file, not a folder")
flags.register_validator("chakra_et", is_file_or_empty, "expected how file names begin")
flags.register_validator("run_name", is_below_outputs, "expected a folder below outputs")
flags.register_multi_flags_validator(
    ["num_npus", "num_packages"], packages_divide_npus, "packages must divide NPUs"
)
flags.register_multi_flags_validator(["time_unit", "clock_mhz", "chakra_et"], check_clock)


class Settings(NamedTuple):
    """The flags, with absolute paths; None where a path was not given."""

    mnk: Path
    parallel: str
    num_npus: int
    num_packages: int
    datatype_size: int
    minibatch: int
    output_file: Path
    run_name: str
    run_folder: Path
    scalesim_path: Path | None
    scalesim_config: Path | None
    cycle_model: str
    jobs: int
    cache_dir: Path | None
    shard_rounding: str
    update_time: int
    time_unit: str
    clock_mhz: float | None
    chakra_et: Path | None
    num_passes: int  # training steps
    summary_csv: Path | None
    dry_run: bool
    dask_scheduler: str

    @property
    def network(self) -> Network:
        """The network that ASTRA-sim must have for the traces."""
        return self.num_npus // self.num_packages, self.num_packages


# --- Types: a layer's way from the table to the files


class Batch(NamedTuple):
    """How many equal, independent products a BATCHED_GEMM consists of: samples x heads."""

    samples: int
    heads: int | None  # None: a plain number of products


class Layer(NamedTuple):
    """A line of the table."""

    name: str
    where: str  # "file:line", for messages
    type: str  # one of LAYER_TYPES
    strategy: str  # one of STRATEGIES
    m: int  # rows of the outputs: samples, tokens or pixels, of all NPUs together
    n: int  # columns of the outputs
    k: int  # reduction: how many inputs an output is made of
    input_elements: int  # m x k, but of a convolution its ifmaps, without im2col's repeats
    minibatch: int | None = None  # images of a convolution
    groups: int = 1  # of a convolution
    batch: Batch | None = None  # of a BATCHED_GEMM


class Gemm(NamedTuple):
    """A product of an M x K by a K x N matrix."""

    m: int  # rows
    n: int  # columns
    k: int  # reduction

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


class Collective(NamedTuple):
    """A communication of one NPU with its group, after a pass."""

    kind: str  # one of COLLECTIVE_TYPES
    bytes: int  # as ASTRA-sim counts it
    dimensions: Dimensions  # that the group spans
    members: int  # NPUs in the group


class Pass(NamedTuple):
    """One NPU's part of a pass of a layer."""

    name: str  # forward, input gradient or weight gradient
    repeats: int  # equal GEMMs that it consists of
    gemm: Gemm  # of an EMBEDDING: samples, columns and look-ups, which are no GEMM
    accesses: int | None  # elements that an EMBEDDING reads and writes; None: it is GEMMs
    collective: Collective | None  # that follows


class Split(NamedTuple):
    """A size or a number that is split over NPUs."""

    name: str
    size: int
    parts: int
    share: int  # of the NPU that is timed


class LayerPlan(NamedTuple):
    """What one NPU does for a layer."""

    layer: Layer
    dp: int  # over how many NPUs m is split
    mp: int  # over how many NPUs n is split
    splits: list[Split]
    forward: Pass
    input_gradient: Pass
    weight_gradient: Pass

    @property
    def passes(self) -> tuple[Pass, Pass, Pass]:
        """The passes in the order of the workload file."""
        return self.forward, self.input_gradient, self.weight_gradient

    @property
    def uneven_splits(self) -> list[Split]:
        """Sizes that do not divide, so that NPUs have different shares."""
        return [cut for cut in self.splits if cut.size % cut.parts]


class Row(NamedTuple):
    """A pass of a layer with its times: a line of layers.csv."""

    plan: LayerPlan
    layer_pass: Pass
    cycles: int
    time: int  # in the unit of the file that it is for


class TimedLayer(NamedTuple):
    """The rows of a layer."""

    forward: Row
    input_gradient: Row
    weight_gradient: Row

    @property
    def plan(self) -> LayerPlan:
        """The plan that they are the passes of."""
        return self.forward.plan

    @property
    def rows(self) -> tuple[Row, Row, Row]:
        """The rows in the order of the workload file."""
        return self.forward, self.input_gradient, self.weight_gradient


# --- The table of layers

GEMM_COLUMNS = ("layer", "m", "n", "k")
CONVOLUTION_COLUMNS = (
    "layer",
    "ifmap height",
    "ifmap width",
    "filter height",
    "filter width",
    "channels",
    "num filter",
)
DIRECTED_STRIDES = ("stride height", "stride width")  # of SCALE-Sim's writer, not "strides"
PADDING = "padding"
TYPE, COUNT, GROUPS = "type", "count", "groups"
STRATEGY_COLUMN = "customizedparallelization"
DERIVED_COLUMNS = ("eh", "ew", "e2")  # sizes of outputs, in SCALE-Sim's own files
ALIASES = {"layer name": "layer", "channel": "channels", "num filters": "num filter"}


class TableLine(NamedTuple):
    """A line below the header."""

    where: str  # "file:line"
    cells: dict[str, str]  # by the name of the column

    def size(self, column: str, least: int = 1) -> int:
        """Return the whole number in a column; UserError where it is another text or too small."""
        number = whole_number(self.cells[column])
        if number is None or number < least:
            cell = shown(self.cells[column])
            raise UserError(f"{self.where}: {column} is {cell}, expected a whole number >= {least}")
        return number


def read_layers(path: Path, parallel: str, minibatch: int) -> list[Layer]:
    """Read a table of GEMMs, or of convolutions with `minibatch` images.

    UserError, with file and line, for whatever is not understood.
    """
    lines = read_lines(path, parallel)
    if minibatch > 1 and "m" in lines[0].cells:
        what = f"--minibatch={minibatch} with GEMMs, whose m counts the samples"
        raise UserError(f"{lines[0].where}: {what}, expected convolutions")
    layers = [read_layer(line, parallel, minibatch) for line in lines]
    renamed = []
    uncounted = []
    for line, layer in zip(lines, layers):
        if layer.name != line.cells["layer"]:
            renamed.append(f"{line.where}: blanks in a name become _")
        if layer.batch and not line.cells.get(COUNT):
            uncounted.append(f"{line.where}: a BATCHED_GEMM without a count")
    warn_of_first(renamed, "")
    warn_of_first(uncounted, ", each taken as one product")
    if parallel == DLRM:
        check_embedding(path, layers)
    return layers


def read_lines(path: Path, parallel: str) -> list[TableLine]:
    """Return the lines below the header that are layers; UserError where there are none."""
    numbered_lines = table_lines(path)
    header_where, header = next(numbered_lines, (f"{path}:1", []))
    while header and not header[-1]:
        header.pop()  # the trailing comma of SCALE-Sim's files
    columns = read_header(header_where, header, parallel)
    lines = []
    for where, cells in numbered_lines:
        if "m" not in columns and not any(cells[1:]):
            warn(f"{where}: {shown(cells[0])} is taken for a title")
            continue
        check_cells(where, cells, header, columns)
        lines.append(TableLine(where, {name: cells[index] for name, index in columns.items()}))
    if not lines:
        raise UserError(f"{header_where}: no layers, expected one in each line below")
    return lines


def table_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield "file:line" and the cells of each line that is not blank; UserError for no CSV."""
    text = io.StringIO(path.read_text("utf-8-sig", "surrogateescape"))
    reader = csv.reader(text, strict=True, skipinitialspace=True)
    try:
        for line in reader:
            cells = [cell.strip() for cell in line]
            if any(cells):
                yield f"{path}:{reader.line_num}", cells
    except csv.Error as error:
        where = f"{path}:{reader.line_num}"
        raise UserError(f"{where}: {error}, expected a CSV table") from None


def read_header(where: str, header: list[str], parallel: str) -> dict[str, int]:
    """Return the index of each column by its name; UserError for an unknown or missing one."""
    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise UserError(f"{where}: one column {shown(header[0])}, expected commas between columns")
    names = column_names(header)
    needed, known = table_format(names)
    columns = index_columns(where, names, known)
    for name in needed:
        if name not in columns:
            raise UserError(f"{where}: no column {name}, expected {', '.join(needed)}")
    if "strides" in columns and "strides" not in needed:
        raise UserError(f"{where}: strides beside stride height and width, expected one kind")
    if parallel == CUSTOMIZED and STRATEGY_COLUMN not in columns:
        expected = f"expected one for {CUSTOMIZED}"
        raise UserError(f"{where}: no column CustomizedParallelization, {expected}")
    derived = [name for name in DERIVED_COLUMNS if columns.pop(name, None) is not None]
    if derived:
        warn(f"{where}: ignored columns, which follow from the others: {', '.join(derived)}")
    return columns


def index_columns(where: str, names: list[str], known: list[str]) -> dict[str, int]:
    """Return the index of each column by its name; UserError for an unknown one, or two."""
    columns: dict[str, int] = {}
    for index, name in enumerate(names):
        if name in columns:
            raise UserError(f"{where}: two columns {name}, expected one")
        if name and name not in known:
            expected = expected_name(name, known)
            raise UserError(f"{where}: unknown column {shown(name)}, {expected}")
        if name:
            columns[name] = index
    return columns


def column_names(header: list[str]) -> list[str]:
    """Return the header's cells in one spelling."""
    names = []
    for cell in header:
        name = " ".join(cell.lower().split())
        names.append(ALIASES.get(name, name))
    if names[1:3] == ["ifmap width", "ifmap width"]:
        names[1] = "ifmap height"  # as 28 of SCALE-Sim's own files call it
    return names


def table_format(names: list[str]) -> tuple[list[str], list[str]]:
    """Return the columns that a table with these must have, and all that it may have."""
    if "ifmap height" not in names and "filter height" not in names:  # either may be misspelt
        return [*GEMM_COLUMNS], [*GEMM_COLUMNS, TYPE, COUNT, STRATEGY_COLUMN]
    strides = ["strides"]
    if any(name in names for name in DIRECTED_STRIDES):
        strides = [*DIRECTED_STRIDES]
    optional = ["strides", *DIRECTED_STRIDES, PADDING, GROUPS, STRATEGY_COLUMN, *DERIVED_COLUMNS]
    return [*CONVOLUTION_COLUMNS, *strides], [*CONVOLUTION_COLUMNS, *optional]


def check_cells(where: str, cells: list[str], header: list[str], columns: dict[str, int]) -> None:
    """Refuse a line without a cell for each column, or with a cell that no column names."""
    if len(cells) <= max(columns.values()):
        raise UserError(f"{where}: {len(cells)} columns, expected {len(header)} as in the header")
    for index, cell in enumerate(cells):
        named = index < len(header) and header[index]
        if cell and not named and not cell.startswith("#"):
            raise UserError(
                f"{where}: {shown(cell)} in column {index + 1}, expected {len(header)} columns"
                " as in the header"
            )


def read_layer(line: TableLine, parallel: str, minibatch: int) -> Layer:
    """Return the layer of a line; UserError where a cell is not understood."""
    name = "_".join(line.cells["layer"].split())
    if not name or not name.isprintable():
        raise UserError(f"{line.where}: layer name {shown(name)}, expected printable characters")
    layer_type = read_type(line, parallel)
    strategy = parallel
    if parallel == CUSTOMIZED:
        strategy = read_strategy(line)
    elif parallel == DLRM:
        strategy = "MODEL" if layer_type == "EMBEDDING" else "DATA"
    if "m" not in line.cells:
        return convolution_layer(name, strategy, line, minibatch)
    m, n, k = line.size("m"), line.size("n"), line.size("k")
    batch = read_batch(line, layer_type)
    return Layer(name, line.where, layer_type, strategy, m, n, k, input_elements=m * k, batch=batch)


def check_embedding(path: Path, layers: list[Layer]) -> None:
    """Refuse a table for HYBRID_DLRM without one embedding between two MLPs."""
    embeddings = [layer for layer in layers if layer.type == "EMBEDDING"]
    if not embeddings:
        raise UserError(f"{path}:1: no layer of type EMBEDDING, expected one for {DLRM}")
    if len(embeddings) > 1:
        raise UserError(f"{embeddings[1].where}: another EMBEDDING, expected one for {DLRM}")
    if embeddings[0] in (layers[0], layers[-1]):
        where = embeddings[0].where
        expected = "expected the bottom MLP above it and the top MLP below"
        raise UserError(f"{where}: EMBEDDING at an end of the table, {expected}")


def read_type(line: TableLine, parallel: str) -> str:
    """Return a layer's type."""
    cell = line.cells.get(TYPE, "")
    layer_type = cell.upper() or "GEMM"
    if layer_type not in TABLE_TYPES:
        expected = expected_name(layer_type, TABLE_TYPES)
        raise UserError(f"{line.where}: unknown type {shown(cell)}, {expected}")
    if layer_type == "EMBEDDING" and parallel != DLRM:
        raise UserError(f"{line.where}: type EMBEDDING, expected --parallel={DLRM}")
    return layer_type


def read_strategy(line: TableLine) -> str:
    """Return a layer's own strategy."""
    cell = line.cells[STRATEGY_COLUMN]
    strategy = cell.upper().replace("HYBRD", "HYBRID")  # as the format was once described
    if strategy not in STRATEGIES:
        expected = ", ".join(STRATEGIES)
        raise UserError(f"{line.where}: strategy {shown(cell)}, expected one of {expected}")
    return strategy


def read_batch(line: TableLine, layer_type: str) -> Batch | None:
    """Return the count of a BATCHED_GEMM: 1 where there is none."""
    cell = line.cells.get(COUNT, "")
    if layer_type != "BATCHED_GEMM":
        if cell:
            raise UserError(f"{line.where}: count {shown(cell)} of a {layer_type}, expected none")
        return None
    if not cell:
        return Batch(samples=1, heads=None)
    expected = "expected a whole number >= 1, or samples x heads such as 1536x96"
    first, times, second = cell.lower().replace("×", "x").partition("x")
    samples, heads = whole_number(first.strip()), whole_number(second.strip())
    if not samples or (times and not heads):
        raise UserError(f"{line.where}: count is {shown(cell)}, {expected}")
    return Batch(samples, heads)


def convolution_layer(name: str, strategy: str, line: TableLine, minibatch: int) -> Layer:
    """Return the GEMM of a convolution: a row for each output pixel, a column for each filter."""
    height, width = line.size("ifmap height"), line.size("ifmap width")
    filter_height, filter_width = line.size("filter height"), line.size("filter width")
    channels, filters = line.size("channels"), line.size("num filter")
    if "strides" in line.cells:
        stride_height = stride_width = line.size("strides")
    else:
        stride_height, stride_width = line.size("stride height"), line.size("stride width")
    output_height = output_size(line, height, filter_height, stride_height)
    output_width = output_size(line, width, filter_width, stride_width)
    groups = read_groups(name, line)
    for column, size in (("channels", channels), ("num filter", filters)):
        if size % groups:
            raise UserError(
                f"{line.where}: {column} is {size}, expected a multiple of {groups} groups"
            )
    return Layer(
        name,
        line.where,
        "GEMM",
        strategy,
        m=minibatch * output_height * output_width,
        n=filters,
        k=filter_height * filter_width * channels // groups,
        input_elements=minibatch * height * width * channels,
        minibatch=minibatch,
        groups=groups,
    )


def read_groups(name: str, line: TableLine) -> int:
    """Return the groups of a convolution; UserError where its name alone says depth-wise."""
    if line.cells.get(GROUPS):
        return line.size(GROUPS)
    if re.search("(?<![A-Z])DP(?![A-Za-z])", name):
        what = f"{name}: DP marks a depth-wise layer for SCALE-Sim"
        raise UserError(f"{line.where}: {what}, expected its channels in a column Groups")
    return 1


def output_size(line: TableLine, ifmap: int, window: int, stride: int) -> int:
    """Return the height or width of a convolution's output; UserError where no window fits."""
    padding = line.size(PADDING, least=0) if PADDING in line.cells else 0
    room = ifmap + 2 * padding - window
    if room < 0:
        raise UserError(f"{line.where}: a filter larger than its ifmap, expected a smaller one")
    if PADDING in line.cells:
        return room // stride + 1  # as PyTorch counts
    return -(-(room + stride) // stride)  # rounded up, as SCALE-Sim counts


# --- Strategies: what one NPU computes and communicates


class Transfer(NamedTuple):
    """The collective after a pass, for any layer."""

    kind: str  # one of COLLECTIVE_TYPES
    buffer: str  # which elements of the layer: outputs, inputs or weights
    group: str  # "mp", the NPUs that split n, or "dp", those that split m


class PassRule(NamedTuple):
    """A pass of a layer; of its GEMM's sizes m is the layer's, m' one NPU's share of it."""

    rows: str
    columns: str
    reduction: str
    transfer: Transfer | None
    accesses: int | None = None  # how often look-ups access an element; None: it is a GEMM

    @property
    def sizes(self) -> tuple[str, str, str]:
        """The names of the GEMM's sizes."""
        return self.rows, self.columns, self.reduction


class LayerRule(NamedTuple):
    """The passes of a layer."""

    forward: PassRule
    input_gradient: PassRule
    weight_gradient: PassRule


REDUCE_WEIGHTS = Transfer("ALLREDUCE", "weights", "dp")
EXCHANGE_OUTPUTS = Transfer("ALLTOALL", "outputs", "mp")

LAYER_TYPES = {
    "GEMM": LayerRule(
        forward=PassRule("m'", "n'", "k", Transfer("ALLGATHER", "outputs", "mp")),
        input_gradient=PassRule("m'", "k", "n'", Transfer("REDUCESCATTER", "inputs", "mp")),
        weight_gradient=PassRule("k", "n'", "m'", REDUCE_WEIGHTS),
    ),
    # The halves of Megatron-LM's tensor parallelism (Shoeybi et al. 2019).
    "COLUMN_PARALLEL": LayerRule(
        forward=PassRule("m'", "n'", "k", None),
        input_gradient=PassRule("m'", "k", "n'", Transfer("ALLREDUCE", "inputs", "mp")),
        weight_gradient=PassRule("k", "n'", "m'", REDUCE_WEIGHTS),
    ),
    "ROW_PARALLEL": LayerRule(
        forward=PassRule("m'", "n", "k'", Transfer("ALLREDUCE", "outputs", "mp")),
        input_gradient=PassRule("m'", "k'", "n", None),
        weight_gradient=PassRule("k'", "n", "m'", REDUCE_WEIGHTS),
    ),
    # Products of activations, as in attention: each NPU has some of them whole.
    "BATCHED_GEMM": LayerRule(
        forward=PassRule("m", "n", "k", None),
        input_gradient=PassRule("m", "k", "n", None),
        weight_gradient=PassRule("k", "n", "m", None),
    ),
    # A convolution of which each NPU has some groups whole.
    "GROUPED": LayerRule(
        forward=PassRule("m'", "n/g", "k", Transfer("ALLGATHER", "outputs", "mp")),
        input_gradient=PassRule("m'", "k", "n/g", None),
        weight_gradient=PassRule("k", "n/g", "m'", REDUCE_WEIGHTS),
    ),
    # Tables of embeddings, cut by columns; k look-ups for each sample and column. An update reads
    # and writes what was looked up.
    "EMBEDDING": LayerRule(
        forward=PassRule("m", "n'", "k", EXCHANGE_OUTPUTS, accesses=1),
        input_gradient=PassRule("m", "n'", "k", EXCHANGE_OUTPUTS, accesses=0),
        weight_gradient=PassRule("m", "n'", "k", None, accesses=2),
    ),
}
TABLE_TYPES = [name for name in LAYER_TYPES if name != "GROUPED"]  # which is a matter of groups


def plan_layer(layer: Layer, settings: Settings) -> LayerPlan:
    """Return what one NPU does for a layer: its share of the sizes, its GEMMs and collectives."""
    strategy = STRATEGIES[layer.strategy]
    dp = group_size(strategy.split_m, settings.network)
    mp = group_size(strategy.split_n, settings.network)
    has_whole_groups = layer.groups > 1 and layer.groups >= mp
    rule = LAYER_TYPES["GROUPED" if has_whole_groups else layer.type]
    sizes = {"m": layer.m, "n": layer.n, "k": layer.k, "n/g": layer.n // layer.groups}
    splits = split_counts(layer, dp, mp, has_whole_groups)
    repeats = math.prod(count.share for count in splits)
    for name, parts in (("m", dp), ("n", mp), ("k", mp)):
        size_split = split(name, sizes[name], parts, settings.shard_rounding)
        sizes[f"{name}'"] = size_split.share
        if f"{name}'" in rule.forward.sizes:
            splits.append(size_split)

    def plan_pass(name: str, pass_rule: PassRule) -> Pass:
        gemm = Gemm(*[sizes[size] for size in pass_rule.sizes])
        accesses = None
        if pass_rule.accesses is not None:
            accesses = pass_rule.accesses * math.prod(gemm)
        collective = plan_collective(pass_rule.transfer, layer, dp, mp, settings.datatype_size)
        return Pass(name, repeats, gemm, accesses, collective)

    return LayerPlan(
        layer,
        dp,
        mp,
        splits,
        forward=plan_pass("forward", rule.forward),
        input_gradient=plan_pass("input gradient", rule.input_gradient),
        weight_gradient=plan_pass("weight gradient", rule.weight_gradient),
    )


def split_counts(layer: Layer, dp: int, mp: int, has_whole_groups: bool) -> list[Split]:
    """Return how the products of a layer that consists of several are split over NPUs.

    The NPU that is timed has the most of them, whatever the rounding of sizes.
    """
    if has_whole_groups:
        return [split("groups", layer.groups, mp, "up")]
    if not layer.batch:
        return []
    samples, heads = layer.batch
    if heads is None:
        return [split("count", samples, dp * mp, "up")]
    return [split("samples", samples, dp, "up"), split("heads", heads, mp, "up")]


def plan_collective(
    transfer: Transfer | None, layer: Layer, dp: int, mp: int, datatype_size: int
) -> Collective | None:
    """Return the collective after a pass; None where the strategy has no such group.

    The other degree splits the buffer between groups. Of a group's part ASTRA-sim counts one NPU's
    share in an ALLGATHER or ALLTOALL, and the whole in an ALLREDUCE or REDUCESCATTER.
    """
    if not transfer:
        return None
    strategy = STRATEGIES[layer.strategy]
    if transfer.group == "mp":
        dimensions, members, other_degree = strategy.split_n, mp, dp
    else:
        dimensions, members, other_degree = strategy.split_m, dp, mp
    if not dimensions:
        return None
    elements = {
        "outputs": layer.m * layer.n,
        "inputs": layer.input_elements,
        "weights": layer.n * layer.k,
    }
    parts = other_degree
    if transfer.kind in ("ALLGATHER", "ALLTOALL"):
        parts *= members
    size = elements[transfer.buffer] * datatype_size // parts
    return Collective(transfer.kind, size, dimensions, members)


def group_size(dimensions: Dimensions, network: Network) -> int:
    """Return how many NPUs there are along these dimensions of the network."""
    return math.prod(network[dimension] for dimension in dimensions)


def split(name: str, size: int, parts: int, rounding: str) -> Split:
    """Split a size over NPUs, each of which has at least 1."""
    share = -(-size // parts)
    if rounding == "down":
        share = max(1, size // parts)
    return Split(name, size, parts, share)


def check_plans(plans: list[LayerPlan], packages: int) -> None:
    """Warn of what may surprise; UserError for a collective that ASTRA-sim can't run."""
    collectives = described_collectives(plans)
    check_small_collectives(collectives)
    check_large_collectives(collectives, packages)
    check_lone_collectives(collectives)
    check_uneven_sizes(plans)
    check_images(plans)
    check_groups(plans)
    check_neighbours(plans)


def described_collectives(plans: list[LayerPlan]) -> list[tuple[str, Collective]]:
    """Return all collectives, each with the words by which messages name it."""
    described = []
    for plan in plans:
        for layer_pass in plan.passes:
            collective = layer_pass.collective
            if collective:
                name = f"the {collective.kind} of {plan.layer.name}, {layer_pass.name} pass"
                described.append((f"{plan.layer.where}: {name}", collective))
    return described


def check_small_collectives(collectives: list[tuple[str, Collective]]) -> None:
    """Refuse a collective of 0 bytes, where ASTRA-sim stops; warn of 1 to 3, where it may hang."""
    small = []
    for name, collective in collectives:
        if collective.bytes == 0:
            raise UserError(f"{name}, comes to 0 bytes, where ASTRA-sim stops, expected more")
        if collective.bytes < 4:
            small.append(f"{name}, comes to {collective.bytes} bytes")
    warn_of_first(small, ", ASTRA-sim may never end, expected 4 or more")


ASTRASIM_1_LIMIT = 4 << 31  # bytes; it counts a quarter of a collective in 31 bits


def check_large_collectives(collectives: list[tuple[str, Collective]], packages: int) -> None:
    """Warn of collectives too large for ASTRA-sim 1.0.

    Measured: an ALLGATHER that spans both dimensions counts as its share times the packages.
    """
    large = []
    for name, collective in collectives:
        counted = collective.bytes
        spans_both = packages < collective.members and len(collective.dimensions) == 2
        if collective.kind == "ALLGATHER" and spans_both:
            counted *= packages
        if counted >= ASTRASIM_1_LIMIT and collective.members > 1:
            large.append(f"{name}, is of {collective.bytes:,} bytes")
    warn_of_first(large, ", too large for ASTRA-sim 1.0; ASTRA-sim 2.x runs it")


def check_lone_collectives(collectives: list[tuple[str, Collective]]) -> None:
    """Warn of collectives of one member, which readers of the text file treat differently."""
    alone = sum(collective.members == 1 for _, collective in collectives)
    if 0 < alone < len(collectives):
        what = f"{alone} collectives have one member"
        warn(f"{what}: ASTRA-sim 1.0 skips them, Chakra's Text converter does not")


def check_uneven_sizes(plans: list[LayerPlan]) -> None:
    """Warn of sizes that do not divide: a warning each, up to eight."""
    layers_by_split: dict[Split, list[str]] = {}
    for plan in plans:
        for uneven in plan.uneven_splits:
            layers_by_split.setdefault(uneven, []).append(plan.layer.name)
    for uneven, names in list(layers_by_split.items())[:8]:
        layers = names[0]
        if len(names) > 1:
            layers += f" and {plural(len(names) - 1, 'more layer')}"
        problem = f"does not divide by {uneven.parts}"
        if uneven.size < uneven.parts:
            problem = f"is less than {uneven.parts} NPUs, some of which have none"
        timed = f"one NPU is timed with {uneven.share}"
        warn(f"{layers}: {uneven.name} = {uneven.size} {problem}, {timed}")
    if len(layers_by_split) > 8:
        warn(f"{len(layers_by_split) - 8} more sizes do not divide")


def check_images(plans: list[LayerPlan]) -> None:
    """Warn of convolutions of which an NPU has less than an image."""
    for plan in plans:
        images = plan.layer.minibatch
        if images is not None and images < plan.dp:
            what = f"{plural(images, 'image')} over {plan.dp} NPUs, so that pixels of an image are"
            warn(f"{plan.layer.name}: {what} split; --minibatch gives the images of all NPUs")
            return


def check_groups(plans: list[LayerPlan]) -> None:
    """Warn of convolutions with fewer groups than NPUs that split their filters."""
    for plan in plans:
        groups = plan.layer.groups
        if 1 < groups < plan.mp:
            what = f"{groups} groups are fewer than the {plan.mp} NPUs that split the filters"
            warn(f"{plan.layer.name}: {what}: cycles are approximate, collectives an upper bound")
            return


# What a layer leaves on its NPU is what the next one takes, and the other way round for gradients.
FITTING_TYPES = [
    ("COLUMN_PARALLEL", "ROW_PARALLEL"),
    ("COLUMN_PARALLEL", "BATCHED_GEMM"),
    ("BATCHED_GEMM", "BATCHED_GEMM"),
    ("BATCHED_GEMM", "ROW_PARALLEL"),
    ("ROW_PARALLEL", "COLUMN_PARALLEL"),
]


def check_neighbours(plans: list[LayerPlan]) -> None:
    """Warn of neighbours between which a collective is missing, which no type stands for."""
    unfitting = []
    for index in range(1, len(plans)):
        problem = missing_collective(plans[index - 1], plans[index])
        if problem:
            unfitting.append(f"{plans[index].layer.where}: {problem}")
    warn_of_first(unfitting, ", for which nothing is written")


def missing_collective(before: LayerPlan, after: LayerPlan) -> str:
    """Return what two neighbours lack; empty where they fit, or where nothing is split."""
    first, second = before.layer, after.layer
    types = first.type, second.type
    pair = f"{first.name} ({first.type}) before {second.name} ({second.type})"
    if types == ("GEMM", "GEMM") or "EMBEDDING" in types:
        return ""
    if first.strategy != second.strategy:
        return f"{pair} of another strategy lacks a resharding"
    siblings = types == ("COLUMN_PARALLEL", "COLUMN_PARALLEL")
    siblings = siblings and (first.m, first.k) == (second.m, second.k)
    if before.mp == 1 or first.type == "GEMM" or types in FITTING_TYPES or siblings:
        return ""
    if first.type == "ROW_PARALLEL":
        return f"{pair} lacks a collective of the gradient"
    return f"{pair} lacks an ALLGATHER"


# --- The accelerator: SCALE-Sim's config

# The accelerator of the published results, with every key that any SCALE-Sim reads.
BUILT_IN_CONFIG = """\
[general]
run_name = gemm
[architecture_presets]
ArrayHeight: 256
ArrayWidth: 256
Dataflow: ws
Bandwidth: 10
MemoryBanks: 1
IfmapSramSzkB: 6144
FilterSramSzkB: 6144
OfmapSramSzkB: 2048
ReadRequestBuffer: 512
WriteRequestBuffer: 512
IfmapSramSz: 8192
FilterSramSz: 8192
OfmapSramSz: 8192
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""


# Keys of other SCALE-Sims' configs and of their own writers, which change no cycles here.
HARMLESS_KEYS = {
    "architecture_presets": ["memorymap", "onchipmemorybanks", "onchipmemorybankports"],
    "network_presets": ["topologycsvloc"],
    "sparsity": [
        "sparserep",
        "optimizedmapping",
        "blocksize",
        "nonzeroelems",
        "randomnumbergeneratorseed",
    ],
}
# Switches that have to be off, and why.
REFUSED_MODES = {
    "sparsitysupport": "it would prune the output gradient as well, which is dense",
    "ifmapcustomlayout": "the layout is a file for one GEMM",
    "filtercustomlayout": "the layout is a file for one GEMM",
    "useramulatortrace": "the traces are files for one GEMM",
}
# Keys as people write them, those that can change cycles first.
SPELLINGS = {
    key.lower(): key
    for key in ["InterfaceBandwidth", *re.findall(r"^(\w+)[ :]", BUILT_IN_CONFIG, re.MULTILINE)]
}


class Architecture(NamedTuple):
    """A SCALE-Sim config."""

    text: str  # as it was written
    scalesim_text: str  # as SCALE-Sim gets it
    lacking: list[str]  # keys that were taken from the built-in config
    unknown: dict[str, str]  # keys that only a changed SCALE-Sim may read, and the error else
    rows: int  # of the systolic array
    columns: int
    dataflow: str  # os, ws or is
    bandwidth_mode: str  # CALC, or USER: SCALE-Sim then counts waits for the memory
    bandwidth: int  # of the memory, elements a cycle


def read_architecture(path: Path | None) -> Architecture:
    """Read the config at `path`, or the built-in one; UserError where it does not serve."""
    source = str(path or "the built-in config")
    text = BUILT_IN_CONFIG
    built_in = new_config()
    built_in.read_string(BUILT_IN_CONFIG)
    given = new_config()
    try:
        if path:
            text = path.read_bytes().decode("utf-8-sig")
        given.read_string(text, source)
    except (UnicodeDecodeError, configparser.Error) as error:
        raise UserError(f"{source}: {error}, expected a SCALE-Sim config") from None
    unknown = check_keys(source, given, built_in)
    config = new_config()
    config.read_dict(built_in)
    config.read_dict(given)
    config["general"] = {"run_name": "gemm"}  # it becomes part of a shell command
    config.remove_section("network_presets")  # SCALE-Sim 3.0.0 stops at it
    check_values(source, config, built_in)
    lacking = []
    for section in built_in.sections():
        for key in built_in[section]:
            if key != "run_name" and not given.has_option(section, key):
                lacking.append(key)
    if config["run_presets"]["InterfaceBandwidth"] == "USER":
        lacking = fill_in_banks(source, config, lacking)
    written = io.StringIO()
    config.write(written)
    presets = config["architecture_presets"]
    return Architecture(
        text,
        written.getvalue(),
        lacking,
        unknown,
        rows=int(presets["ArrayHeight"]),
        columns=int(presets["ArrayWidth"]),
        dataflow=presets["Dataflow"],
        bandwidth_mode=config["run_presets"]["InterfaceBandwidth"],
        bandwidth=int(presets["Bandwidth"].partition(",")[0]),
    )


def new_config() -> configparser.ConfigParser:
    """Return a reader of configs, in which no section stands for all others."""
    return configparser.ConfigParser(interpolation=None, default_section="")


def check_keys(
    source: str, given: configparser.ConfigParser, built_in: configparser.ConfigParser
) -> dict[str, str]:
    """Return unknown keys, each with an error; UserError for a misplaced or missing one."""
    known = {section: [*built_in[section]] for section in built_in.sections()}
    for section, keys in HARMLESS_KEYS.items():
        known.setdefault(section, []).extend(keys)
    unknown = {}
    for section in given.sections():
        for key in given[section]:
            check_section(source, section, key, known)
            if section not in known:
                problem = f"unknown section [{section}], {expected_name(section, [*known])}"
                unknown[key] = f"{source}: {problem}"
            elif key not in known[section]:
                problem = f"unknown key {shown(key)} in [{section}]"
                unknown[key] = f"{source}: {problem}, {expected_key(key, section, known)}"
    for key in ("ArrayHeight", "ArrayWidth", "Dataflow"):
        if not given.has_option("architecture_presets", key):
            missing = f"{source}: no {key} in [architecture_presets], expected one"
            problems = [*unknown.values(), missing]  # it may just be misspelt
            raise UserError(problems[0])
    return unknown


def expected_key(key: str, section: str, known: dict[str, list[str]]) -> str:
    """Return which key may have been meant, and where; all of the section where none is near."""
    sections = {}
    for known_section, keys in known.items():
        sections.update(dict.fromkeys(keys, known_section))
    near = difflib.get_close_matches(key, sections, 1)
    if near and sections[near[0]] != section:
        return f"did you mean {near[0]} in [{sections[near[0]]}]?"
    return expected_name(key, known[section])


def check_section(source: str, section: str, key: str, known: dict[str, list[str]]) -> None:
    """Refuse a key that stands in another section than its own."""
    for right_section, keys in known.items():
        if key in keys and section != right_section:
            name = SPELLINGS.get(key, key)
            problem = f"{name} stands in [{section}], expected in [{right_section}]"
            raise UserError(f"{source}: {problem}")


def check_values(
    source: str, config: configparser.ConfigParser, built_in: configparser.ConfigParser
) -> None:
    """Refuse values that SCALE-Sim would stop at, and modes that serve one GEMM only."""
    for section in built_in.sections():
        for key, usual in built_in[section].items():
            if usual.isdigit():  # the built-in value tells of which kind a key is
                check_number(source, key, config[section][key])
            elif usual.lower() == "false" and not is_off(config[section][key]):
                what = f"{SPELLINGS[key]} is {shown(config[section][key])}"
                raise UserError(f"{source}: {what}, expected False: {REFUSED_MODES[key]}")
    banks = config["architecture_presets"]["MemoryBanks"]
    if banks != "1":
        reason = "the memory map of others is a file for one GEMM"
        raise UserError(f"{source}: MemoryBanks is {shown(banks)}, expected 1: {reason}")
    dataflow = config["architecture_presets"]["Dataflow"]
    if dataflow not in ("os", "ws", "is"):
        raise UserError(f"{source}: Dataflow is {shown(dataflow)}, expected os, ws or is")
    mode = config["run_presets"]["InterfaceBandwidth"]
    if mode not in ("CALC", "USER"):
        raise UserError(f"{source}: InterfaceBandwidth is {shown(mode)}, expected CALC or USER")


def check_number(source: str, key: str, value: str) -> None:
    """Refuse what is no whole number; a bandwidth may be several."""
    least = 0 if key.endswith("offset") else 1
    texts = [value]
    if key == "bandwidth":
        texts = value.split(",")
    for text in texts:
        number = whole_number(text.strip())
        if number is None or number < least:
            expected = f"expected a whole number >= {least}"
            raise UserError(f"{source}: {SPELLINGS[key]} is {shown(value)}, {expected}")


def is_off(value: str) -> bool:
    """Say whether a switch is off."""
    return value.lower() in ("false", "no", "off", "0")


def fill_in_banks(source: str, config: configparser.ConfigParser, lacking: list[str]) -> list[str]:
    """Complete the layout for USER; return what is lacking still.

    SCALE-Sim v3 reads operands at the bandwidth of the layout's banks, v2 at `Bandwidth`.
    UserError for a bandwidth that does not divide by the banks, where v3 stops.
    """
    layout = config["layout"]
    bandwidth = config["architecture_presets"]["Bandwidth"].partition(",")[0]
    filled = []
    for operand in ("Ifmap", "Filter"):
        bank_bandwidth, banks = f"{operand}SRAMBankBandwidth", f"{operand}SRAMBankNum"
        for key, value in ((bank_bandwidth, bandwidth), (banks, "1")):
            if key.lower() in lacking:
                layout[key] = value
                filled.append(key.lower())
        if int(layout[bank_bandwidth]) % int(layout[banks]):
            expected = f"expected a multiple of {banks}, {layout[banks]}"
            raise UserError(f"{source}: {bank_bandwidth} is {layout[bank_bandwidth]}, {expected}")
    return [key for key in lacking if key not in filled]


# --- Cycle models


class Job(NamedTuple):
    """A distinct GEMM, with estimates for SCALE-Sim."""

    gemm: Gemm
    first_use: str  # for messages
    cycles: int
    memory: int  # peak bytes
    seconds: float


Cycles = dict[Gemm, int]


def distinct_jobs(plans: list[LayerPlan], architecture: Architecture) -> list[Job]:
    """Return each distinct GEMM of the plans, the longest first."""
    jobs: dict[Gemm, Job] = {}
    for plan in plans:
        for layer_pass in plan.passes:
            gemm = layer_pass.gemm
            if gemm not in jobs and layer_pass.accesses is None:
                first_use = f"layer {plan.layer.name}, {layer_pass.name} pass"
                cycles = analytical_cycles(gemm, architecture)
                memory = estimated_memory(gemm, architecture)
                jobs[gemm] = Job(
                    gemm, first_use, cycles, memory, estimated_seconds(gemm, architecture)
                )
    return sorted(jobs.values(), key=lambda job: -job.cycles)


def analytical_cycles(gemm: Gemm, architecture: Architecture) -> int:
    """Return the stall-free cycles of a GEMM, as SCALE-Sim v2 and v3 count them.

    By Samajdar et al., "A Systematic Methodology for Characterizing Scalability of DNN Accelerators
    using SCALE-Sim" (ISPASS 2020): folds of the array's size are loaded, streamed and drained.
    """
    along_rows, along_columns, streamed, load = {
        "os": (gemm.m, gemm.n, gemm.k, 0),
        "ws": (gemm.k, gemm.n, gemm.m, architecture.rows),
        "is": (gemm.k, gemm.m, gemm.n, architecture.rows),
    }[architecture.dataflow]
    folds = -(-along_rows // architecture.rows) * -(-along_columns // architecture.columns)
    fold_cycles = load + architecture.rows + architecture.columns + streamed - 2
    return max(1, folds * fold_cycles - 1)


def estimated_memory(gemm: Gemm, architecture: Architecture) -> int:
    """Return the peak bytes of a simulation by SCALE-Sim v2 or v3.

    Fitted to runs on arrays from 4 x 4 to 256 x 256: 61 took 0.76 to 1 times these bytes.
    """
    cycles = analytical_cycles(gemm, architecture)
    bytes_per_cycle = 1130 + 17 * architecture.rows + 43 * architecture.columns
    return 40_000_000 + cycles * bytes_per_cycle + 75 * operand_elements(gemm)


def estimated_seconds(gemm: Gemm, architecture: Architecture) -> float:
    """Return the seconds of a simulation by SCALE-Sim v2 or v3.

    Fitted to runs on arrays from 4 x 4 to 256 x 256: 146 took 0.8 to 1.5 times these seconds.
    """
    cycles = analytical_cycles(gemm, architecture)
    array_traffic = math.pow(cycles * (architecture.rows + architecture.columns) / 2, 1.3)
    return 0.09 + 27e-6 * cycles + 7e-9 * array_traffic + 26e-8 * operand_elements(gemm)


def operand_elements(gemm: Gemm) -> int:
    """Return the elements of a GEMM's three matrices."""
    return gemm.m * gemm.k + gemm.k * gemm.n + gemm.m * gemm.n


class AnalyticalModel:
    """Cycles by SCALE-Sim's formula."""

    version = title = "analytical"

    def forecast(self, _: list[Job]) -> list[str]:
        """Return what a dry run adds of the cost: nothing, as there is none."""
        return []

    def run(self, jobs: list[Job]) -> tuple[Cycles, str]:
        """Return each GEMM's cycles, and where they come from."""
        return {job.gemm: job.cycles for job in jobs}, "analytical"


V1_MEMORY = 60_000_000  # bytes; SCALE-Sim v1 keeps its traces on disk


class SimulatedModel:
    """Cycles by SCALE-Sim, which simulates what the cache does not hold."""

    def __init__(self, settings: Settings, architecture: Architecture) -> None:
        self.settings = settings
        self.scalesim = find_scalesim(settings.scalesim_path, architecture.scalesim_text)
        check_read_keys(self.scalesim, architecture)
        self.cache = Cache(settings.cache_dir, self.scalesim)
        self.version = str(self.scalesim.version)
        self.title = f"SCALE-Sim v{self.version}"

    def forecast(self, jobs: list[Job]) -> list[str]:
        """Return what a dry run says of the cost."""
        cached, new = self.cached_and_new(jobs)
        cycles = sum(job.cycles for job in new)
        lines = [f"{len(cached)} in the cache, {len(new)} to simulate: {cycles:,} estimated cycles"]
        if not new:
            return lines
        slots, memory = self.limits(new)
        largest = max(new, key=lambda job: job.memory)
        need = f"largest simulation: {gigabytes(largest.memory)} estimated"
        if memory < math.inf:
            need += f", {gigabytes(memory)} free"
        if largest.memory > memory:
            need += f": GEMM {largest.gemm} ({largest.first_use}) would be killed"
        time_range = f"{estimated_range(new, slots, memory)} estimated"
        place = f"--jobs={slots}"
        if self.settings.dask_scheduler:
            place = f"a Dask worker for each of {slots} GEMMs"
        return [*lines, need, f"time with {place}: {time_range}"]

    def run(self, jobs: list[Job]) -> tuple[Cycles, str]:
        """Return each GEMM's cycles, and where they come from; UserError when SCALE-Sim fails."""
        cached, new = self.cached_and_new(jobs)
        cycles = {}
        for job, simulation in cached.items():
            cycles[job.gemm] = simulation.cycles
            write_files(self.report_folder(job), simulation.files)
        if new:
            cycles |= self.simulate_missing(new)
        return cycles, f"{len(new)} simulated, {len(cached)} from the cache"

    def cached_and_new(self, jobs: list[Job]) -> tuple[dict[Job, Cached], list[Job]]:
        """Return what the cache holds, and what has to be simulated."""
        cached = {}
        new = []
        for job in jobs:
            simulation = self.cache.load(job.gemm)
            if simulation:
                cached[job] = simulation
            elif self.scalesim.version == 1:
                new.append(job._replace(memory=V1_MEMORY))
            else:
                new.append(job)
        return cached, new

    def limits(self, jobs: list[Job]) -> tuple[int, float]:
        """Return how many simulations may run at once, and in how many bytes of memory."""
        if self.settings.dask_scheduler:
            return len(jobs), math.inf  # the workers know their own
        return self.settings.jobs, available_memory()

    def report_folder(self, job: Job) -> Path:
        """Return the folder for a GEMM's reports."""
        return self.settings.run_folder / f"gemm_{job.gemm}"

    def simulate_missing(self, jobs: list[Job]) -> Cycles:
        """Simulate GEMMs side by side, each published as soon as it is finished."""
        slots, memory = self.limits(jobs)
        check_memory(jobs, memory, slots)
        if self.settings.dask_scheduler:
            pool = dask_pool(self.scalesim, self.settings.dask_scheduler)
        else:
            pool = local_pool(self.scalesim, slots)
        cycles: Cycles = {}
        progress = Progress(jobs, estimated_range(jobs, slots, memory))
        try:
            with pool as submit, progress.bar:
                for running, finished in run_side_by_side(submit, jobs, slots, memory):
                    for job, future in finished.items():
                        simulation = future.result()
                        folder = self.report_folder(job)
                        cycles[job.gemm] = checked_cycles(simulation, job, self.scalesim, folder)
                        self.cache.store(job.gemm, simulation.files)
                        write_files(folder, simulation.files)
                    progress.show(list(finished), list(running))
        except KeyboardInterrupt:
            place = f"cached in {self.cache.folder}" if self.cache.folder else "not cached"
            done = f"{len(cycles)} of {len(jobs)} GEMMs are finished"
            print_message("interrupted", f"{done}, {place}")
            raise
        return cycles


CycleModel = AnalyticalModel | SimulatedModel


def cycle_model(settings: Settings, architecture: Architecture) -> CycleModel:
    """Return what turns GEMMs into cycles; UserError where there is no SCALE-Sim."""
    if settings.cycle_model == "simulated":
        return SimulatedModel(settings, architecture)
    if architecture.unknown:
        problems = [*architecture.unknown.values()]
        raise UserError(problems[0])
    if architecture.bandwidth_mode == "USER":
        what = f"{settings.scalesim_config}: InterfaceBandwidth is USER"
        warn(f"{what}: without its stalls analytical cycles are a lower bound")
    return AnalyticalModel()


# --- SCALE-Sim: one GEMM, one process

LAYOUT = f"{'-,' * 21}\ngemm,{'1,' * 20}\n"  # SCALE-Sim v3 reads one even when layouts are off
LOG = "scalesim.log"


class ScaleSim(NamedTuple):
    """A SCALE-Sim with its config."""

    version: int  # 1, 2 or 3
    folder: Path  # that Python imports it from
    digest: str  # hash of its code and config, on which its results depend
    path: Path | None  # as --scalesim_path gives it
    config: str

    @property
    def report_name(self) -> str:
        """The report that has the cycles."""
        return "gemm_cycles.csv" if self.version == 1 else "COMPUTE_REPORT.csv"

    @property
    def cycles_column(self) -> str:
        """The column of the cycles in that report."""
        return "Cycles" if self.version == 1 else "Total Cycles"


class Simulation(NamedTuple):
    """What a SCALE-Sim process left."""

    status: int  # its exit status
    files: dict[str, str]  # reports and log, by name


def find_scalesim(path: Path | None, config: str) -> ScaleSim:
    """Return the SCALE-Sim at `path`, or the installed one; UserError where there is none."""
    if path and (path / "scale.py").is_file() and (path / "run_nets.py").is_file():
        version, folder = 1, path
    else:
        package = find_package(path)
        version = 3 if (package / "layout_utils.py").is_file() else 2
        folder = package.parent
    code = {}
    for file in code_files(version, folder):
        code[str(file.relative_to(folder))] = file.read_text("utf-8", "replace")
    digest = hashlib.sha256(json.dumps([code, config], sort_keys=True).encode()).hexdigest()
    return ScaleSim(version, folder, digest[:32], path, config)


def find_package(path: Path | None) -> Path:
    """Return the folder of the package scalesim: at or in `path`, or where Python finds it."""
    places = []
    if path:
        places = [path, path / "scalesim"]
    elif spec := importlib.util.find_spec("scalesim"):
        places = [Path(place) for place in spec.submodule_search_locations or []]
    for place in places:
        if place.name == "scalesim" and (place / "scale_sim.py").is_file():
            return place.absolute()
    expected = "expected scale.py and run_nets.py, or scalesim/"
    raise UserError(f"no SCALE-Sim in {path or sys.prefix}, {expected}")


def code_files(version: int, folder: Path) -> list[Path]:
    """Return the files whose code decides what a SCALE-Sim reports."""
    if version == 1:
        return list(folder.glob("*.py"))
    return list((folder / "scalesim").rglob("*.py"))


def check_read_keys(scalesim: ScaleSim, architecture: Architecture) -> None:
    """Refuse unknown keys that this SCALE-Sim does not read; warn of lacking ones that it reads."""
    if not architecture.lacking and not architecture.unknown:
        return
    files = code_files(scalesim.version, scalesim.folder)
    code = "".join(file.read_text("utf-8", "replace") for file in files)

    def is_read(key: str) -> bool:
        reading = rf"(get\w*\([^()]*|\[)['\"]{re.escape(key)}['\"]"  # get(section, 'Key')
        return bool(re.search(reading, code, re.IGNORECASE))

    for key, problem in architecture.unknown.items():
        if not is_read(key):
            raise UserError(problem)
    used = []
    for key, spelling in SPELLINGS.items():
        if key in architecture.lacking and is_read(key):
            used.append(spelling)
    if used:
        names = ", ".join(used[:5])
        if used[5:]:
            names += f" and {len(used) - 5} more keys"
        what = f"--scalesim_config lacks {names}, which this SCALE-Sim reads"
        warn(f"{what}: taken from the built-in config")


def run_scalesim(version: str, folder: str) -> None:
    """Run the SCALE-Sim in `folder` on gemm.csv, in a process for that."""

    def follow_parent(work_folder: Path) -> None:
        os.read(0, 1)  # returns when the parent closes this stdin, or is gone
        shutil.rmtree(work_folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=follow_parent, args=[Path.cwd()], daemon=True).start()
    gc.disable()  # SCALE-Sim is faster without, and needs no more memory
    sys.path.insert(0, folder)
    if version == "1":
        sys.argv = ["scale.py", "-arch_config=gemm.cfg", "-network=gemm.csv"]
        runpy.run_path(f"{folder}/scale.py", run_name="__main__")
        return
    import scalesim  # noqa: F401 - from `folder`, unlike the imports below

    sys.path.remove(folder)
    import numpy

    vars(numpy).setdefault("int", int)  # gone since 1.24, but used by SCALE-Sim up to 2.0.1
    from scalesim.scale_sim import scalesim as simulator

    arguments: dict[str, Any] = {"config": "gemm.cfg", "topology": "gemm.csv"}
    if "layout" in inspect.signature(simulator).parameters:
        arguments["layout"] = "layout.csv"
    simulator(**arguments, save_disk_space=True).run_scale(top_path=".")
    sys.stdout.flush()
    os._exit(0)  # its reports are closed; freeing its matrices takes time


# As text, since a Dask worker does not have this script.
SCALESIM_PROCESS = f"""import gc, inspect, os, runpy, shutil, sys, threading
from pathlib import Path
from typing import Any
{inspect.getsource(run_scalesim)}
run_scalesim(*sys.argv[1:])"""


def simulate(scalesim: ScaleSim, gemm: Gemm, lifeline: int = subprocess.PIPE) -> Simulation:
    """Run SCALE-Sim on a GEMM, here or on a Dask worker, until it or `lifeline`, a pipe, ends."""
    here = find_scalesim(scalesim.path, scalesim.config)  # a worker's, or changed meanwhile
    if here.digest != scalesim.digest:
        raise UserError(f"the SCALE-Sim in {here.folder} is not the one that this run began with")
    inputs = {
        "gemm.cfg": scalesim.config,
        "gemm.csv": topology([("gemm", gemm)]),
        "layout.csv": LAYOUT,
    }
    python = [sys.executable, "-BXutf8", "-c", SCALESIM_PROCESS]
    command = [*python, str(here.version), str(here.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="gen_astrasim_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_files(folder, inputs)
        with (
            (folder / LOG).open("wb") as log,
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=lifeline,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for this process alone
            ) as process,
        ):
            status = process.wait()
        files = {}
        for report in folder.rglob(here.report_name):
            for file in report.parent.glob("*.csv"):
                if file.is_file() and file.name not in inputs:
                    files[file.name] = file.read_text("utf-8", "replace")
        files[LOG] = (folder / LOG).read_text("utf-8", "replace")
    return Simulation(status, files)


def topology(gemms: Iterable[tuple[str, Gemm]]) -> str:
    """Return GEMMs as convolutions, which every SCALE-Sim reads: ifmap M x K, filters 1 x K."""
    lines = [f"layer name,{','.join(CONVOLUTION_COLUMNS[1:])},strides,\n"]
    for name, (m, n, k) in gemms:
        plain_name = re.sub('[",]', "_", name)  # SCALE-Sim's reader knows no quotes
        lines.append(f"{plain_name},{m},{k},1,{k},1,{n},1,\n")
    return "".join(lines)


def checked_cycles(simulation: Simulation, job: Job, scalesim: ScaleSim, folder: Path) -> int:
    """Return a simulation's cycles; UserError where it failed, with its log in `folder`."""
    cycles = reported_cycles(simulation.files, scalesim)
    if cycles and simulation.status == 0:
        return cycles
    write_files(folder, simulation.files)
    log_lines = [line.strip()[:200] for line in simulation.files[LOG].splitlines() if line.strip()]
    last_lines = " | ".join(log_lines[-3:])
    printable = "".join(character for character in last_lines if character.isprintable())
    status = simulation.status
    if status < 0:
        problem = f"killed, {signal.strsignal(-status)}"
    elif status > 0:
        problem = f"exit status {status}"
    else:
        column = scalesim.cycles_column
        problem = f"no {scalesim.report_name} with one row and a number >= 1 as {column}"
    if status == -signal.SIGKILL or "MemoryError" in last_lines:
        problem += " (out of memory? fewer --jobs may help, or --cycle_model=analytical)"
    raise UserError(
        f"SCALE-Sim failed on GEMM {job.gemm} ({job.first_use}): {problem};"
        f" it last said: {printable or 'nothing'}; log: {folder / LOG}"
    )


def reported_cycles(files: dict[str, str], scalesim: ScaleSim) -> int | None:
    """Return the cycles in SCALE-Sim's report of one GEMM; None where it is not whole."""
    report = files.get(scalesim.report_name, "")
    if not report.endswith("\n"):
        return None
    try:
        rows = [row for row in csv.reader(io.StringIO(report), skipinitialspace=True) if any(row)]
        if len(rows) != 2:
            return None
        columns = [cell.strip() for cell in rows[0]]
        cycles = rows[1][columns.index(scalesim.cycles_column)].strip()
    except (csv.Error, ValueError, IndexError):
        return None
    return whole_number(cycles.removesuffix(".0")) or None


# --- Many GEMMs at once: the cache, the limits of this machine, the pools


class Cached(NamedTuple):
    """A finished simulation."""

    cycles: int
    files: dict[str, str]  # reports and log, by name


class Cache:
    """Finished simulations, <folder>/<M>x<N>x<K>.json, of one SCALE-Sim and config."""

    def __init__(self, cache_dir: Path | None, scalesim: ScaleSim) -> None:
        self.scalesim = scalesim
        self.folder = cache_dir / scalesim.digest if cache_dir else None  # None: no cache

    def load(self, gemm: Gemm) -> Cached | None:
        """Return a GEMM's simulation; None where there is none that can be trusted."""
        if not self.folder:
            return None
        try:
            entry = json.loads((self.folder / f"{gemm}.json").read_bytes())
            files = entry["files"]
            "".join(files.values()).encode()  # fails where it is no text
            if entry["gemm"] != str(gemm):
                return None
        except Exception:  # whatever an entry is, it is simulated again and replaced
            return None
        for name in files:
            if not re.fullmatch(r"\w[\w.-]{0,99}", name):
                return None  # it would be written elsewhere
        cycles = reported_cycles(files, self.scalesim)
        return Cached(cycles, files) if cycles else None

    def store(self, gemm: Gemm, files: dict[str, str]) -> None:
        """Publish a simulation; where that can't be done, warn and cache no more."""
        if not self.folder:
            return
        entry = json.dumps({"gemm": str(gemm), "files": files})
        try:
            write_files(self.folder, {f"{gemm}.json": entry})
        except OSError as error:
            warn(f"can't cache in {self.folder}: {error.strerror}; going on without")
            self.folder = None


CGROUP_ROOT, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def control_groups() -> list[Path]:
    """Return the folders of the control groups (version 2) that hold this process."""
    with suppress(OSError):  # not Linux
        for line in OWN_CGROUP.read_text().splitlines():
            if line.startswith("0::/"):
                innermost = CGROUP_ROOT / line.removeprefix("0::/")
                return [innermost, *innermost.parents]
    return []


def available_cpus() -> int:
    """Return how many CPUs this process may keep busy."""
    cpus = os.cpu_count() or 1
    if sys.platform != "darwin":
        cpus = len(os.sched_getaffinity(0))
    for group in control_groups():
        with suppress(OSError):  # no limit there
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                cpus = min(cpus, -(-int(quota) // int(period)))
    return max(1, cpus)


def available_memory() -> float:
    """Return how many bytes of memory new processes may fill."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        words = Path("/proc/meminfo").read_text().split()
        available = min(available, int(words[words.index("MemAvailable:") + 1]) * 1024)
    for group in control_groups():
        with suppress(OSError):  # no limit there
            limit = (group / "memory.max").read_text().strip()
            words = (group / "memory.stat").read_text().split()
            if limit != "max":
                used = int(words[words.index("anon") + 1])  # without what files cache
                available = min(available, int(limit) - used)
    return max(0, available)


def check_memory(jobs: list[Job], memory: float, slots: int) -> None:
    """Refuse a simulation that needs more memory than there is; one at a time, only warn."""
    largest = max(jobs, key=lambda job: job.memory)
    if largest.memory <= memory:
        return
    needs = f"needs about {gigabytes(largest.memory)} of memory, {gigabytes(memory)} is free"
    problem = f"GEMM {largest.gemm} ({largest.first_use}) {needs}"
    if slots > 1:
        options = "--cycle_model=analytical needs none, --jobs=1 tries it all the same"
        raise UserError(f"{problem}; {options}")
    warn(f"{problem}; it may be killed, try --cycle_model=analytical")


def gigabytes(size: float) -> str:
    """Return bytes for people."""
    return f"{size / 1e9:,.1f} GB"


def estimated_range(jobs: list[Job], slots: int, memory: float) -> str:
    """Return how long simulations take that slow each other, with so many slots and bytes."""
    if memory < math.inf:
        largest = max(job.memory for job in jobs)
        slots = max(1, min(slots, int(memory // largest)))
    longest = max(job.seconds for job in jobs)
    shared = sum(job.seconds for job in jobs) / slots
    return f"{duration(0.6 * max(longest, shared))} to {duration(2.2 * (longest + shared))}"


def duration(seconds: float) -> str:
    """Return seconds in a unit that people read."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.0f} h"


Submit = Callable[[Job], "Future[Simulation]"]
Tasks = dict[Job, "Future[Simulation]"]


@contextmanager
def local_pool(scalesim: ScaleSim, processes: int) -> Iterator[Submit]:
    """Give a function that simulates on this machine; at the end, end what still runs."""
    lifeline, our_end = os.pipe()
    pool = ThreadPoolExecutor(processes)
    try:
        yield lambda job: pool.submit(simulate, scalesim, job.gemm, lifeline)
    finally:
        os.close(our_end)  # at which every SCALE-Sim process ends
        pool.shutdown(cancel_futures=True)
        os.close(lifeline)


@contextmanager
def dask_pool(scalesim: ScaleSim, address: str) -> Iterator[Submit]:
    """Give a function that simulates on a Dask cluster."""
    logging.disable()  # Dask's own tracebacks
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import CommClosedError

        Client.__del__ = lambda _: None  # it would try for 40 s to end what never began
        client = Client(address, timeout=20, set_as_default=False)
    except Exception as error:  # no Dask, or whatever it makes of an address
        raise UserError(f"--dask_scheduler={address} can't be reached: {error}") from None
    with client:
        pool = client.get_executor(pure=False)
        if not client.nthreads():
            warn(f"the Dask scheduler at {address} has no workers yet")

        def submit(job: Job) -> Any:
            priority = min(job.cycles, 1 << 62)
            return pool.submit(simulate_on_worker, scalesim, job.gemm, priority=priority)

        try:
            yield submit
        except (KilledWorker, CommClosedError, CancelledError) as error:
            raise UserError(f"--dask_scheduler={address} lost a simulation: {error!r}") from None
        finally:
            pool.shutdown(wait=False)


def simulate_on_worker(scalesim: ScaleSim, gemm: Gemm) -> Simulation:
    """Simulate on a Dask worker, whose errors name it."""
    try:
        return simulate(scalesim, gemm)
    except UserError as error:
        raise UserError(f"Dask worker on {os.uname().nodename}: {error}") from None


def run_side_by_side(
    submit: Submit, jobs: list[Job], slots: int, memory: float
) -> Iterator[tuple[Tasks, Tasks]]:
    """Submit jobs as slots and memory allow; yield, each second, what runs and what finished."""
    waiting = list(jobs)
    running: Tasks = {}
    free = memory
    while waiting or running:
        job = next_job(waiting, free, alone=not running)
        if job and len(running) < slots:
            waiting.remove(job)
            with signals_held():  # else a pool may not know of a thread that has begun
                running[job] = submit(job)
            free -= job.memory
            continue
        done = wait(running.values(), timeout=1, return_when=FIRST_COMPLETED).done
        finished = {job: future for job, future in running.items() if future in done}
        for job in finished:
            del running[job]
            free += job.memory
        yield running, finished


def next_job(waiting: list[Job], free: float, alone: bool) -> Job | None:
    """Return the first job that fits into memory; one that never fits has to run alone."""
    for job in waiting:
        if job.memory <= free:
            return job
    return waiting[0] if waiting and alone else None


class Progress:
    """Says how far simulations are: in a line at the start, and in a bar or a line a minute."""

    def __init__(self, jobs: list[Job], time_range: str) -> None:
        self.number = len(jobs)
        self.finished = 0
        self.started = self.last_line = time.monotonic()
        memory = gigabytes(max(job.memory for job in jobs))
        what = f"{plural(self.number, 'GEMM')}, {time_range}, up to {memory} of memory each"
        print_message("simulating", what)
        layout = "GEMM {desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
        self.bar = tqdm(
            desc=f"1/{self.number}",
            total=sum(job.seconds for job in jobs),
            bar_format=f"{layout} of {time_range}{{postfix}}",
            smoothing=0,
            disable=None,  # where stderr is no terminal
            leave=False,
        )

    def show(self, finished: list[Job], running: list[Job]) -> None:
        """Say what has finished since the last call, and what runs."""
        self.finished += len(finished)
        self.bar.update(sum(job.seconds for job in finished))
        self.bar.set_description_str(f"{self.finished + len(running)}/{self.number}")
        longest = f"{running[0].gemm}, {running[0].first_use}" if running else ""
        self.bar.set_postfix_str(longest)
        now = time.monotonic()
        if self.bar.disable and now > self.last_line + 60:
            self.last_line = now
            done = f"{self.finished} of {self.number} GEMMs are finished"
            print_message("simulating", f"{done} after {duration(now - self.started)}")


# --- Times and totals


class Clock(NamedTuple):
    """In which unit a file has its compute times."""

    unit: str  # cycles, ns or us
    mhz: float | None

    @property
    def cycle_length(self) -> Fraction:
        """How long a cycle is in this unit."""
        if self.unit == "cycles":
            return Fraction(1)
        microseconds = 1 / Fraction(str(self.mhz))
        return microseconds if self.unit == "us" else 1000 * microseconds

    def time(self, cycles: int) -> int:
        """Return cycles in this unit, to the nearest whole number, but not to 0."""
        if cycles == 0:
            return 0
        return max(1, round(cycles * self.cycle_length))


def timed_layers(
    plans: list[LayerPlan], gemm_cycles: Cycles, bandwidth: int, clock: Clock
) -> list[TimedLayer]:
    """Return each layer with the cycles and times of its passes.

    A look-up is bound by the memory: an embedding moves `bandwidth` elements in a cycle.
    """

    def timed(plan: LayerPlan, layer_pass: Pass) -> Row:
        if layer_pass.accesses is None:
            cycles = layer_pass.repeats * gemm_cycles[layer_pass.gemm]
        else:
            cycles = -(-layer_pass.accesses // bandwidth)
        return Row(plan, layer_pass, cycles, clock.time(cycles))

    layers = []
    for plan in plans:
        forward = timed(plan, plan.forward)
        input_gradient = timed(plan, plan.input_gradient)
        weight_gradient = timed(plan, plan.weight_gradient)
        layers.append(TimedLayer(forward, input_gradient, weight_gradient))
    return layers


def all_rows(layers: list[TimedLayer]) -> list[Row]:
    """Return the passes of all layers, in the order of layers.csv."""
    return [row for layer in layers for row in layer.rows]


def warn_of_rounding(rows: list[Row], clock: Clock, precision: str) -> None:
    """Warn where rounding to whole ns or us moves the total of a pass by more than 1 %."""
    for name in PASS_NAMES:
        cycles = sum(row.cycles for row in rows if row.layer_pass.name == name)
        written = sum(row.time for row in rows if row.layer_pass.name == name)
        if cycles:
            change = float(written / (cycles * clock.cycle_length) - 1)
            if abs(change) > 0.01:
                what = f"moves the compute time of the {name} pass by {change:+.1%}"
                warn(f"rounding to {precision} {what}")


def total_times(rows: list[Row]) -> dict[str, int]:
    """Return the compute time of a training step by pass, and of all passes."""
    totals = dict.fromkeys([*PASS_NAMES, "all passes"], 0)
    for row in rows:
        totals[row.layer_pass.name] += row.time
        totals["all passes"] += row.time
    return totals


class CollectiveTotal(NamedTuple):
    """Collectives of one kind in a training step."""

    number: int
    bytes: int


def sent_bytes(collective: Collective | None) -> int:
    """Return what an NPU of a group of g sends, rounded down, where each NPU sends the least.

    To all others its share of an ALLGATHER; of a buffer the parts of the g - 1 others, in an
    ALLREDUCE, which reduces and then gathers, twice.
    """
    if not collective:
        return 0
    others = collective.members - 1
    if collective.kind == "ALLGATHER":
        return others * collective.bytes
    rounds = 2 if collective.kind == "ALLREDUCE" else 1
    return rounds * others * collective.bytes // collective.members


def total_collectives(rows: list[Row]) -> dict[str, CollectiveTotal]:
    """Return the number and bytes of each kind of collective, without those of one member."""
    totals = {kind: CollectiveTotal(0, 0) for kind in COLLECTIVE_TYPES}
    for row in rows:
        collective = row.layer_pass.collective
        if collective and collective.members > 1:
            number, size = totals[collective.kind]
            totals[collective.kind] = CollectiveTotal(number + 1, size + collective.bytes)
    return totals


# --- What ASTRA-sim reads: the workload file, and execution traces for 2.x


def workload_text(layers: list[TimedLayer], parallel: str, update_time: int) -> str:
    """Return the workload file: compute times, and collectives in bytes."""
    first_line = parallel
    if parallel == DLRM:
        position = embedding_position(layers)
        layers = [layers[position], *layers[:position], *layers[position + 1 :]]
        first_line = f"{DLRM}\t{position}"  # the index of the last bottom layer
    lines = [first_line, str(len(layers))]
    for layer in layers:
        words: list[object] = [layer.plan.layer.name, -1]
        for row in layer.rows:
            words += [row.time, *written_collective(row.layer_pass.collective)]
        words.append(update_time)
        if parallel == CUSTOMIZED:  # elsewhere ASTRA-sim 1.0 takes this word for the next layer
            words.append(layer.plan.layer.strategy)
        lines.append("\t".join(str(word) for word in words))
    return "\n".join(lines) + "\n"


def embedding_position(layers: list[TimedLayer]) -> int:
    """Return how many layers stand above the embedding."""
    types = [layer.plan.layer.type for layer in layers]
    return types.index("EMBEDDING")


def written_collective(collective: Collective | None) -> tuple[str, int]:
    """Return the kind and bytes of a collective, as text files have them."""
    if not collective:
        return "NONE", 0
    return collective.kind, collective.bytes


Nodes = list[int]  # ids of nodes of a trace, after which another one starts


def chakra_trace(
    layers: list[TimedLayer], network: Network, parallel: str, num_passes: int
) -> bytes:
    """Return the execution trace of any NPU, ASTRA-sim 1.0's training loop; times are us."""
    trace = TraceWriter(network)
    add_step = {"DATA": data_step, DLRM: dlrm_step}.get(parallel, model_step)
    updated: list[Nodes] = [[] for _ in layers]  # what a layer's next step waits for
    for _ in range(num_passes):
        updated = add_step(trace, layers, updated)
    return trace.stream.getvalue()


def data_step(trace: TraceWriter, layers: list[TimedLayer], updated: list[Nodes]) -> list[Nodes]:
    """Add a training step of DATA; return what the next step's layers wait for."""
    before = add_forward(trace, layers, updated, [])
    first, *others = layers
    before, others_updated = add_data_backward(trace, others, before)
    computed = trace.compute(first.weight_gradient, before)  # as ASTRA-sim 1.0, no input gradient
    return [trace.communicate(first.weight_gradient, computed), *others_updated]


def model_step(trace: TraceWriter, layers: list[TimedLayer], updated: list[Nodes]) -> list[Nodes]:
    """Add a training step of the other strategies; return what the next step's layers wait for.

    Backward the input gradient comes first; its collective runs beside the weight gradient.
    """
    before = add_forward(trace, layers, updated, [])
    next_updated: list[Nodes] = []
    for layer in reversed(layers):
        gradient = trace.compute(layer.input_gradient, before)
        reduced = gradient
        if layer is not layers[0]:  # whose collective ASTRA-sim 1.0 leaves out
            reduced = trace.communicate(layer.input_gradient, gradient)
        computed = trace.compute(layer.weight_gradient, gradient)
        next_updated.insert(0, trace.communicate(layer.weight_gradient, computed))
        before = reduced + computed
    return next_updated


def dlrm_step(trace: TraceWriter, layers: list[TimedLayer], updated: list[Nodes]) -> list[Nodes]:
    """Add a training step of a DLRM; return what the next step's layers wait for.

    The embedding's ALLTOALLs run beside the bottom MLP, forward and backward. As in ASTRA-sim 1.0
    the first layer computes an input gradient too.
    """
    position = embedding_position(layers)
    bottom, embedding, top = layers[:position], layers[position], layers[position + 1 :]
    looked_up = trace.compute(embedding.forward, updated[position])
    exchanged = trace.communicate(embedding.forward, looked_up)
    before = add_forward(trace, bottom, updated[:position], looked_up)
    before = add_forward(trace, top, updated[position + 1 :], before + exchanged)
    before, top_updated = add_data_backward(trace, top, before)
    exchanged = trace.communicate(embedding.input_gradient, before)
    before, bottom_updated = add_data_backward(trace, bottom, before)
    embedding_updated = trace.compute(embedding.weight_gradient, before + exchanged)
    return [*bottom_updated, embedding_updated, *top_updated]


def add_forward(
    trace: TraceWriter, layers: list[TimedLayer], updated: list[Nodes], before: Nodes
) -> Nodes:
    """Add the forward pass of layers; return the nodes that end it."""
    for layer, layer_updated in zip(layers, updated):
        computed = trace.compute(layer.forward, before + layer_updated)
        before = trace.communicate(layer.forward, computed)
    return before


def add_data_backward(
    trace: TraceWriter, layers: list[TimedLayer], before: Nodes
) -> tuple[Nodes, list[Nodes]]:
    """Add DATA's backward pass of layers; return the nodes that end it and each layer's update.

    The weight gradient comes first; its collective runs beside all that follows.
    """
    updated: list[Nodes] = []
    for layer in reversed(layers):
        computed = trace.compute(layer.weight_gradient, before)
        updated.insert(0, trace.communicate(layer.weight_gradient, computed))
        before = trace.compute(layer.input_gradient, computed)
    return before, updated


COMP_NODE, COMM_COLL_NODE = 4, 7  # Chakra's node types


class TraceWriter:
    """Writes nodes, each with those after which it starts."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.stream = io.BytesIO()
        self.messages, self.write = chakra_messages()
        self.next_id = 0
        self.write(self.messages["GlobalMetadata"](version="0.0.4"), self.stream)

    def compute(self, row: Row, after: Nodes) -> Nodes:
        """Add the computing of a pass, if it takes time; return the nodes that end with it."""
        if row.time == 0:
            return after
        node = self.new_node(row, after)
        node.type = COMP_NODE
        with fits_into_64_bits(row):
            node.duration_micros = row.time
        return self.add(node)

    def communicate(self, row: Row, after: Nodes) -> Nodes:
        """Add the collective after a pass, if there is one; return the nodes that end with it."""
        collective = row.layer_pass.collective
        if not collective or collective.members == 1:
            return after  # ASTRA-sim ends silently at a collective of one member
        node = self.new_node(row, after)
        node.name += f" {collective.kind}"
        node.type = COMM_COLL_NODE
        node.attr.add(name="comm_type", int64_val=COLLECTIVE_TYPES[collective.kind])
        with fits_into_64_bits(row):
            node.attr.add(name="comm_size", int64_val=collective.bytes)
        involved = []
        for dimension, size in enumerate(self.network):
            if size > 1:  # the network has no dimension of one
                involved.append(dimension in collective.dimensions)
        node.attr.add(name="involved_dim", bool_list={"values": involved})
        return self.add(node)

    def new_node(self, row: Row, after: Nodes) -> Any:
        """Return a node without a type."""
        dependencies = dict.fromkeys(after)  # ASTRA-sim stops at one that is listed twice
        name = f"{row.plan.layer.name} {row.layer_pass.name}"
        node = self.messages["Node"](id=self.next_id, name=name, data_deps=dependencies)
        node.attr.add(name="is_cpu_op", bool_val=False)
        self.next_id += 1
        return node

    def add(self, node: Any) -> Nodes:
        """Write a node; return it as what later nodes wait for."""
        self.write(node, self.stream)
        return [node.id]


@contextmanager
def fits_into_64_bits(row: Row) -> Iterator[None]:
    """Turn protobuf's error for a number too large into one that names the layer."""
    try:
        yield
    except ValueError:
        layer = row.plan.layer
        what = f"{layer.where}: {layer.name}, {row.layer_pass.name} pass"
        raise UserError(f"{what}: a number beyond the 64 bits of a trace") from None


# What a trace uses of MLCommons Chakra's messages: name, number, type and whether it is repeated.
CHAKRA_MESSAGES = {
    "GlobalMetadata": [("version", 1, "string", False)],
    "BoolList": [("values", 1, "bool", True)],
    "AttributeProto": [
        ("name", 1, "string", False),
        ("int64_val", 9, "int64", False),
        ("bool_val", 27, "bool", False),
        ("bool_list", 28, "BoolList", False),
    ],
    "Node": [
        ("id", 1, "uint64", False),
        ("name", 2, "string", False),
        ("type", 3, "int32", False),
        ("data_deps", 5, "uint64", True),
        ("duration_micros", 7, "uint64", False),
        ("attr", 10, "AttributeProto", True),
    ],
}


def chakra_messages() -> tuple[dict[str, Any], Callable[[Any, io.BytesIO], None]]:
    """Return Chakra's messages as classes, and what writes one; UserError without protobuf."""
    try:
        from google.protobuf import descriptor_pb2, message_factory
        from google.protobuf.proto import serialize_length_prefixed
    except ImportError:
        raise UserError("--chakra_et needs protobuf: pip install -r requirements.txt") from None

    # Chakra's are proto3; proto2 writes a value that is set also where it is 0, as in their oneof.
    schema = descriptor_pb2.FileDescriptorProto(name="chakra.proto", syntax="proto2")
    for message, fields in CHAKRA_MESSAGES.items():
        declared = schema.message_type.add(name=message)
        for name, number, kind, is_repeated in fields:
            field = declared.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if is_repeated else field.LABEL_OPTIONAL
            if kind in CHAKRA_MESSAGES:
                field.type_name = kind
            else:
                field.type = field.Type.Value(f"TYPE_{kind.upper()}")
    return message_factory.GetMessages([schema]), serialize_length_prefixed


# --- What people read: layers.csv, the summary, the printed table

LAYERS_HEADER = (
    "layer,type,strategy,dp,mp,pass,count,M,N,K,cycles,collective,bytes,members,sent_bytes\n"
)


def layers_table(rows: list[Row]) -> str:
    """Return layers.csv: a line for each pass of each layer."""
    lines = []
    for row in rows:
        plan, layer_pass = row.plan, row.layer_pass
        layer, collective = plan.layer, layer_pass.collective
        line: list[object] = [layer.name, layer.type, layer.strategy, plan.dp, plan.mp]
        line += [layer_pass.name, layer_pass.repeats, *layer_pass.gemm, row.cycles]
        line += written_collective(collective)
        line += [collective.members if collective else 1, sent_bytes(collective)]
        lines.append(line)
    return LAYERS_HEADER + csv_text(lines)


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """Return lines of cells as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


SUMMARY_COLUMNS = (
    "mnk",
    "parallel",
    "num_npus",
    "num_packages",
    "datatype_size",
    "minibatch",
    "cycle_model",
    "time_unit",
    "clock_mhz",
    "compute_forward",
    "compute_input_gradient",
    "compute_weight_gradient",
    "compute_all",
    "allgather_count",
    "allgather_bytes",
    "reducescatter_count",
    "reducescatter_bytes",
    "allreduce_count",
    "allreduce_bytes",
    "alltoall_count",
    "alltoall_bytes",
    "sent_bytes",
    "distinct_gemms",
    "output_file",
    "run_name",
    "shard_rounding",
    "scalesim_version",
    "array",
    "dataflow",
)


def summary_line(
    rows: list[Row], settings: Settings, architecture: Architecture, model: CycleModel
) -> str:
    """Return this run's line of the summary: what of its settings and results is a column."""
    values = settings._asdict()
    if rows[0].plan.layer.minibatch is None:
        values["minibatch"] = None  # a table of GEMMs
    values["scalesim_version"] = model.version
    values["array"] = f"{architecture.rows}x{architecture.columns}"
    values["dataflow"] = architecture.dataflow
    totals = total_times(rows)
    values["compute_forward"] = totals["forward"]
    values["compute_input_gradient"] = totals["input gradient"]
    values["compute_weight_gradient"] = totals["weight gradient"]
    values["compute_all"] = totals["all passes"]
    for kind, total in total_collectives(rows).items():
        values[f"{kind.lower()}_count"] = total.number
        values[f"{kind.lower()}_bytes"] = total.bytes
    values["sent_bytes"] = sum(sent_bytes(row.layer_pass.collective) for row in rows)
    gemms = {row.layer_pass.gemm for row in rows if row.layer_pass.accesses is None}
    values["distinct_gemms"] = len(gemms)
    return csv_text([[values[name] for name in SUMMARY_COLUMNS]])


def run_title(
    settings: Settings, plans: list[LayerPlan], architecture: Architecture, model: CycleModel
) -> str:
    """Return in a line what a run is about: the system, and the accelerator."""
    system = f"{settings.parallel} on {plural(settings.num_npus, 'NPU')}"
    system += f" in {plural(settings.num_packages, 'package')}"
    degrees = {(plan.dp, plan.mp) for plan in plans}
    if len(degrees) == 1:
        dp, mp = degrees.pop()
        system += f", dp {dp} x mp {mp}"
    accelerator = f"{architecture.rows} x {architecture.columns} array, {architecture.dataflow}"
    accelerator += f", {model.title}"
    if settings.clock_mhz:
        accelerator += f", {settings.clock_mhz:g} MHz"
    return f"{system}; {accelerator}"


def result_table(layers: list[TimedLayer], settings: Settings) -> list[str]:
    """Return what one NPU does in each layer, and in a training step."""
    unit = settings.time_unit
    times = ["cycles"]
    if unit != "cycles":
        times.append(unit)
    lines = [["layer", "pass", "GEMM of one NPU", *times, "collective", "bytes"]]
    for alike in merged_layers(layers):
        for label, row in zip(layer_labels(alike, settings), alike[0].rows):
            kind, size = written_collective(row.layer_pass.collective)
            if row.layer_pass.collective and row.layer_pass.collective.members == 1:
                kind += " of 1"
            numbers = [f"{row.cycles:,}"]
            if unit != "cycles":
                numbers.append(f"{row.time:,}")
            gemm = written_gemm(row.layer_pass)
            lines.append([label, row.layer_pass.name, gemm, *numbers, kind, f"{size:,}"])
    table = aligned(lines, "<<>" + ">" * len(times) + "<>")
    if any(layer.plan.uneven_splits for layer in layers):
        table.append("* a size that does not divide: NPUs have different shares")
    return table + aligned(total_lines(all_rows(layers), unit), "<><")


def layer_labels(alike: list[TimedLayer], settings: Settings) -> tuple[str, str, str]:
    """Return the first cells of a layer's three lines: its name, its strategy or type."""
    plan = alike[0].plan
    name = plan.layer.name
    if len(alike) > 1:
        name = f"{len(alike)} × {name} ... {alike[-1].plan.layer.name}"
    if plan.uneven_splits:
        name += " *"
    strategy = f"  {plan.layer.strategy}" if settings.parallel == CUSTOMIZED else ""
    return name, strategy, ""


def written_gemm(layer_pass: Pass) -> str:
    """Return one NPU's GEMMs in a pass, for people."""
    if layer_pass.accesses is not None:
        return f"{layer_pass.gemm} look-ups"
    if layer_pass.repeats > 1:
        return f"{layer_pass.repeats:,} × {layer_pass.gemm}"
    return str(layer_pass.gemm)


def total_lines(rows: list[Row], unit: str) -> list[tuple[str, str, str]]:
    """Return the totals of a training step."""
    lines = [("totals of a training step", "", "")]
    for name, total_time in total_times(rows).items():
        lines.append((f"compute, {name}", f"{total_time:,}", unit))
    for kind, total in total_collectives(rows).items():
        if total.number:
            lines.append((f"{total.number:,} × {kind}", f"{total.bytes:,}", "bytes"))
    return lines


def merged_layers(layers: list[TimedLayer]) -> Iterator[list[TimedLayer]]:
    """Yield equal layers together: one position of a block, of up to 32 layers, that repeats."""
    kinds = [layer.plan.layer._replace(name="", where="") for layer in layers]
    start = 0
    while start < len(layers):
        size, repeats = repeated_block(kinds, start)
        end = start + size * repeats
        for position in range(start, start + size):
            yield layers[position:end:size]
        start = end


def repeated_block(kinds: list[Layer], start: int) -> tuple[int, int]:
    """Return the size of the smallest block at `start` that repeats, and how often it is there."""
    for size in range(1, 33):
        repeats = block_repeats(kinds, start, size)
        if repeats > 1:
            return size, repeats
    return 1, 1


def block_repeats(kinds: list[Layer], start: int, size: int) -> int:
    """Return how often the block of `size` layers at `start` stands there in a row."""
    block = kinds[start : start + size]
    repeats = 1
    end = start + size
    while kinds[end : end + size] == block:
        repeats += 1
        end += size
    return repeats


def aligned(lines: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Return lines of cells as text, each column to its side, < or >."""
    widths = [len(max(column, key=len)) for column in zip(*lines)]
    texts = []
    for line in lines:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)]
        texts.append("  ".join(cells).rstrip())
    return texts


# --- The pipeline


def generate(settings: Settings) -> None:
    """Do the whole job, from the table to the files."""
    started = time.monotonic()
    layers = read_layers(settings.mnk, settings.parallel, settings.minibatch)
    plans = [plan_layer(layer, settings) for layer in layers]
    check_plans(plans, settings.num_packages)
    architecture = read_architecture(settings.scalesim_config)
    warn_of_bandwidth(plans, architecture, settings)
    model = cycle_model(settings, architecture)
    jobs = distinct_jobs(plans, architecture)
    title = run_title(settings, plans, architecture, model)
    if settings.dry_run:
        print_results([title, *forecast(plans, jobs, model, architecture, settings)])
        return
    run_files = {**topologies(plans, settings.mnk.stem), "scalesim.cfg": architecture.text}
    run_files["cycle_model.txt"] = f"{settings.cycle_model}\n"
    check_outputs(settings, [*run_files, "layers.csv"])
    write_files(settings.run_folder, run_files)
    cycles, source = model.run(jobs)
    timed = timed_for_text(plans, cycles, architecture, settings)
    rows = all_rows(timed)
    write_files(settings.run_folder, {"layers.csv": layers_table(rows)})
    publish(
        settings,
        text=workload_text(timed, settings.parallel, settings.update_time),
        trace=trace_of(plans, cycles, architecture, settings),
        summary=summary_line(rows, settings, architecture, model),
    )
    done = f"{plural(len(layers), 'layer')}, {plural(len(jobs), 'distinct GEMM')} ({source})"
    done += f", {time.monotonic() - started:.1f} s"
    print_results([title, *result_table(timed, settings), *written_lines(settings, done)])


def timed_for_text(
    plans: list[LayerPlan], cycles: Cycles, architecture: Architecture, settings: Settings
) -> list[TimedLayer]:
    """Return the layers with times for the workload file."""
    clock = Clock(settings.time_unit, settings.clock_mhz)
    timed = timed_layers(plans, cycles, architecture.bandwidth, clock)
    if not (clock.unit == "us" and settings.chakra_et):  # the traces' warning says the same
        warn_of_rounding(all_rows(timed), clock, f"whole {clock.unit}")
    return timed


def timed_for_traces(
    plans: list[LayerPlan], cycles: Cycles, architecture: Architecture, settings: Settings
) -> list[TimedLayer]:
    """Return the layers with times for traces, which are always in us."""
    clock = Clock("us", settings.clock_mhz)
    timed = timed_layers(plans, cycles, architecture.bandwidth, clock)
    warn_of_rounding(all_rows(timed), clock, "whole us, which are all that a trace holds,")
    return timed


def trace_of(
    plans: list[LayerPlan], cycles: Cycles, architecture: Architecture, settings: Settings
) -> bytes:
    """Return the trace that --chakra_et asks for; empty where it does not."""
    if not settings.chakra_et:
        return b""
    timed = timed_for_traces(plans, cycles, architecture, settings)
    return chakra_trace(timed, settings.network, settings.parallel, settings.num_passes)


def written_lines(settings: Settings, done: str) -> list[str]:
    """Return what was written."""
    output = settings.output_file
    lines = [f"wrote {output if is_device(output) else output.resolve()}: {done}"]
    if settings.chakra_et:
        traces = f"{settings.chakra_et.resolve()}.<npu>.et"
        steps = plural(settings.num_passes, "training step")
        lines.append(f"wrote {plural(settings.num_npus, 'trace')} of {steps}: {traces}")
    if settings.summary_csv:
        lines.append(f"wrote a row in {settings.summary_csv.resolve()}")
    return [*lines, f"wrote details in {settings.run_folder.resolve()}"]


def warn_of_bandwidth(
    plans: list[LayerPlan], architecture: Architecture, settings: Settings
) -> None:
    """Warn of look-ups at a bandwidth that nobody chose."""
    if settings.scalesim_config and "bandwidth" not in architecture.lacking:
        return
    for plan in plans:
        if plan.layer.type == "EMBEDDING":
            bandwidth = f"{architecture.bandwidth} elements a cycle"
            origin = "Bandwidth of the built-in config; --scalesim_config gives another"
            warn(f"{plan.layer.name}: look-ups are timed with {bandwidth}, {origin}")


def topologies(plans: list[LayerPlan], stem: str) -> dict[str, str]:
    """Return the GEMMs of each pass as a topology of SCALE-Sim, by file name."""
    files = {}
    for pass_name, file_name in zip(PASS_NAMES, ("fwd_pass", "inp_grad", "weight_grad")):
        gemms = []
        for plan in plans:
            for layer_pass in plan.passes:
                if layer_pass.name == pass_name and layer_pass.accesses is None:
                    gemms.append((plan.layer.name, layer_pass.gemm))
        files[f"{stem}_{file_name}.csv"] = topology(gemms)
    return files


def forecast(
    plans: list[LayerPlan],
    jobs: list[Job],
    model: CycleModel,
    architecture: Architecture,
    settings: Settings,
) -> list[str]:
    """Return what a dry run shows."""
    estimates = {job.gemm: job.cycles for job in jobs}
    timed = timed_for_text(plans, estimates, architecture, settings)
    if settings.chakra_et:
        timed_for_traces(plans, estimates, architecture, settings)  # for its warning
    lines = result_table(timed, settings)
    done = f"{plural(len(plans), 'layer')}, {plural(len(jobs), 'distinct GEMM')}"
    lines.append(f"dry run with estimated cycles: {done}, nothing written")
    return lines + model.forecast(jobs)


# --- Writing files: none harms another, all results appear together


def check_outputs(settings: Settings, run_files: Iterable[str]) -> None:
    """Make folders; refuse now what could not be written after hours, or would harm another file.

    UserError for an output that is a folder, an input, another output or a file of the run folder.
    """
    if settings.chakra_et:
        chakra_messages()  # fails now where protobuf is missing
    outputs = [(settings.run_folder / name, "a file of the run folder") for name in run_files]
    outputs.append((settings.output_file, "--output_file"))
    if settings.summary_csv:
        outputs.append((settings.summary_csv, "--summary_csv"))
    outputs += [(path, "a trace") for path in trace_files(settings)]
    targets = claimed_targets(settings, outputs)
    folders = {target.parent for target in targets}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for path in (*folders, *targets):
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{path}: no permission to write")
    for target in targets:
        if target.is_dir():  # or has just become one, as the folder of another output
            raise UserError(f"{target} is a folder, expected a file to write")
    if settings.summary_csv:
        check_summary(settings.summary_csv)


def claimed_targets(settings: Settings, outputs: list[tuple[Path, str]]) -> list[Path]:
    """Return the files that outputs really are; UserError where one has another use already."""
    uses = {settings.mnk.resolve(): "--mnk"}
    if settings.scalesim_config:
        uses[settings.scalesim_config.resolve()] = "--scalesim_config"
    reports = str(resolved(settings.run_folder) / "gemm_")  # how their folders begin
    targets = []
    for path, use in outputs:
        target = resolved(path)
        if target in uses and not is_device(target):
            raise UserError(f"{path} is {uses[target]} and {use}, expected another file for each")
        if str(target).startswith(reports):
            raise UserError(f"{path} is among SCALE-Sim's reports, expected another place")
        uses[target] = use
        targets.append(target)
    return targets


def resolved(path: Path) -> Path:
    """Return the file that a path leads to; OSError where links lead in a circle."""
    with suppress(FileNotFoundError, NotADirectoryError):
        path.stat()  # resolve() may not see the circle, or fails in its own way
    return path.resolve()


def check_summary(path: Path) -> None:
    """Refuse a summary with other columns."""
    if not path.exists():
        return
    if is_device(path):
        raise UserError(f"{path}: expected a regular file as --summary_csv")
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        header = file.readline(10_000)
    if header and header.rstrip("\n") != ",".join(SUMMARY_COLUMNS):
        raise UserError(
            f"{path}:1: header {shown(header)}, expected the columns of a summary;"
            " give another file, or rename this one"
        )


def is_device(path: Path) -> bool:
    """Say whether a path is a pipe, a terminal or the like, which is written to where it is."""
    return path.exists() and not path.is_file() and not path.is_dir()


def trace_files(settings: Settings) -> list[Path]:
    """Return the traces that this run writes."""
    prefix = settings.chakra_et
    if not prefix:
        return []
    folder = resolved(prefix.parent)
    return [folder / f"{prefix.name}.{npu}.et" for npu in range(settings.num_npus)]


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def publish(settings: Settings, text: str, trace: bytes, summary: str) -> None:
    """Put the results in place, the workload file last; after an error all is as it was."""
    with (
        staged_traces(trace_files(settings), trace) as traces,
        staged_file(settings.output_file, text) as workload,
        locked(settings.summary_csv) as summary_file,
        signals_held(),
        appended(summary_file, csv_text([SUMMARY_COLUMNS]), summary),
    ):
        replace_files(traces)
        replace_files(workload)


@contextmanager
def staged_traces(targets: list[Path], trace: bytes) -> Iterator[dict[Path, Path]]:
    """Give the finished files to put in the traces' places; on disk once, where that can be."""
    if not targets:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix=".", dir=targets[0].parent) as name:
        staged = {target: Path(name, target.name) for target in targets}
        linked = staged[targets[0]]
        with names_file(targets[0]):
            linked.write_bytes(trace)
        for target in targets[1:]:
            try:
                os.link(linked, staged[target])
            except OSError:  # no links here, or no more of this file
                with names_file(target):
                    shutil.copyfile(linked, staged[target])
                linked = staged[target]
        yield staged


@contextmanager
def locked(path: Path | None) -> Iterator[io.FileIO | None]:
    """Open a file to which several runs may append, one after the other."""
    if not path:
        yield None
        return
    with path.open("a+b", buffering=0) as file:
        with names_file(path):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextmanager
def appended(file: io.FileIO | None, header: str, line: str) -> Iterator[None]:
    """Append a line to a file; after an error the file is as it was."""
    if not file:
        yield
        return
    size = file.seek(0, os.SEEK_END)
    text = line if size else header + line
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            text = "\n" + text  # someone's last line is not ended
    data = text.encode("utf-8", "surrogateescape")
    try:
        with names_file(Path(os.fsdecode(file.name))):
            while data:
                data = data[file.write(data) :]
        yield
    except BaseException:
        file.truncate(size)
        raise


@contextmanager
def signals_held() -> Iterator[None]:
    """Heed Ctrl-C and SIGTERM at the end only, so that results are replaced all or not at all."""
    came: list[int] = []
    handlers = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            handlers[number] = signal.signal(number, lambda sent, _: came.append(sent))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write texts into a folder, which is made; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with staged_file(folder / name, text) as staged:
            replace_files(staged)


@contextmanager
def staged_file(path: Path, text: str) -> Iterator[dict[Path, Path]]:
    """Give the finished file to put in a path's place; a device is written to at once."""
    if is_device(path):
        with names_file(path):
            path.write_bytes(text.encode())
        yield {}
        return
    target = path.resolve()  # a link stays a link
    part = target.with_name(f".{os.urandom(8).hex()}.part")
    try:
        with names_file(path):
            part.write_bytes(text.encode())
            if target.exists():
                shutil.copymode(target, part)
        yield {target: part}
    finally:
        part.unlink(missing_ok=True)


def replace_files(staged: dict[Path, Path]) -> None:
    """Put finished files into their places."""
    for target, file in staged.items():
        with names_file(target):
            os.replace(file, target)


@contextmanager
def names_file(path: Path | str) -> Iterator[None]:
    """Have an error name this file: a full disk's names none, others a temporary one."""
    try:
        yield
    except OSError as error:
        error.filename = path
        raise


# --- The command line

PATH_FLAGS = (
    "mnk",
    "output_file",
    "scalesim_path",
    "scalesim_config",
    "cache_dir",
    "chakra_et",
    "summary_csv",
)


def read_flags() -> Settings:
    """Return the parsed flags; warn of those without effect."""
    given = flags.FLAGS
    values: dict[str, Any] = {}
    for name in Settings._fields:
        if name in given:
            values[name] = given[name].value
    for name in PATH_FLAGS:
        values[name] = absolute_path(values[name])
    if os.path.expanduser(given.cache_dir).startswith("~"):
        warn("there is no home folder: simulations are not cached")
        values["cache_dir"] = None
    if given.cycle_model == "analytical":
        for name in ("scalesim_path", "dask_scheduler", "jobs"):
            if given[name].present:
                warn(f"--{name} has no effect with --cycle_model=analytical")
    if given["num_passes"].present and not given.chakra_et:
        warn("--num_passes has no effect without --chakra_et")
    values["jobs"] = given.jobs or available_cpus()
    values["run_name"] = given.run_name or values["mnk"].stem
    values["run_folder"] = Path("outputs", given.parallel, values["run_name"]).absolute()
    return Settings(**values)


def absolute_path(text: str) -> Path | None:
    """Return a path that may begin with ~; None where there is none."""
    if "\0" in text:
        raise UserError(f"path {shown(text)}, expected one without a NUL character")
    return Path(os.path.expanduser(text)).absolute() if text else None


def main(argv: Sequence[str]) -> int:
    """Run with the parsed flags; return the exit status."""
    try:
        if argv[1:]:
            raise UserError(f"unexpected argument {shown(argv[1])}, expected --name=value")
        generate(read_flags())
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.errno == errno.EMFILE:
            message += "; fewer --jobs may help"
    else:
        return 0
    print_message("error", message)
    return 1


def command_line() -> None:
    """Run, and end by the signal that stopped it: a shell's loop goes on after a mere status."""
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]

    def handle(handler: Any) -> None:
        for number in handled:
            signal.signal(number, handler)

    def interrupt(number: int, _: object) -> None:
        handle(signal.SIG_IGN)  # a second one must not disturb the cleaning up
        raise KeyboardInterrupt(number)

    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    handle(interrupt)
    try:
        app.run(main)
    except KeyboardInterrupt as interrupted:
        handle(signal.SIG_DFL)
        signal.raise_signal(interrupted.args[0])
        sys.exit(128 + interrupted.args[0])  # process 1 survives its signals
    except UnicodeDecodeError as error:
        sys.exit(f"error: --flagfile: {error}")
    finally:
        handle(signal.SIG_DFL)


# --- Helpers: messages, names and numbers


class UserError(Exception):
    """What the user can mend, in one line."""


def print_message(kind: str, message: str) -> None:
    """Print one line to stderr, if anybody can read it."""
    with suppress(OSError, ValueError), signals_held():  # tqdm's lock does not survive one
        tqdm.write(f"{kind}: {' '.join(message.split())}", file=sys.stderr)


warn = partial(print_message, "warning")


def warn_of_first(cases: list[str], consequence: str) -> None:
    """Warn of the first of several cases; of none, do not."""
    if cases:
        warn(f"{cases[0]} ({len(cases)} such in all){consequence}")


def print_results(lines: Iterable[str]) -> None:
    """Print to stdout; a closed pipe is no error."""
    text = "\n".join(lines)
    try:
        text.encode(sys.stdout.encoding, sys.stdout.errors or "strict")
    except UnicodeEncodeError:
        text = text.replace("×", "x").encode("ascii", "backslashreplace").decode()
    try:
        with names_file("standard output"):
            print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(text: str) -> str:
    """Return a text of the user's for a message: quoted, in ASCII, its first 60 characters."""
    return ascii(text) if len(text) <= 60 else f"{text[:60]!a}..."


def plural(number: int, name: str) -> str:
    """Return a number of things, as people say it."""
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def expected_name(name: str, known: Sequence[str]) -> str:
    """Return what may have been meant; all that is known where nothing is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"


def whole_number(text: str) -> int | None:
    """Return what up to 30 digits say; None for any other text."""
    return int(text) if re.fullmatch("[0-9]{1,30}", text) else None


if __name__ == "__main__":
    command_line()
