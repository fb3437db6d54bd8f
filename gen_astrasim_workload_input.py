#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["absl-py", "tqdm", "scalesim==3.0.0", "numpy<2.4", "protobuf>=5.29"]
# ///
"""Turn a table of layers, each a GEMM of m, n, k, into the workload file that ASTRA-sim runs.

  python gen_astrasim_workload_input.py --num_npus=16 --num_packages=2
  python gen_astrasim_workload_input.py --mnk=my_layers.csv --parallel=MODEL --output_file=model.txt

mnk table -> layers -> per-NPU GEMMs, three a layer -> cycles, from SCALE-Sim -> workload file
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports just ends the script

import configparser
import csv
import errno
import fcntl
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    from absl import flags
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f"error: no {missing.name} in {sys.executable}, expected one with: pip install -r requirements.txt")


# --- Constants
Dimensions = tuple[int, ...]  # of the network: 0 within a package, 1 between packages
STRATEGIES: dict[str, tuple[Dimensions, Dimensions]] = {  # along which a layer's m is split, and along which its n
    "DATA": ((0, 1), ()),
    "MODEL": ((), (0, 1)),
    "HYBRID_DATA_MODEL": ((1,), (0,)),
    "HYBRID_MODEL_DATA": ((0,), (1,)),
}
CUSTOMIZED = "HYBRID_CUSTOMIZED"
MISSPELT = {"HYBRD_DATA_MODEL": "HYBRID_DATA_MODEL"}  # as the format's original description has it
NO_COMM = "NONE"
COMM_TYPES = {"ALLGATHER": 2, "REDUCESCATTER": 7, "ALLREDUCE": 0}  # as MLCommons Chakra numbers them
PASSES = {"fwd_pass": "forward", "inp_grad": "input gradient", "weight_grad": "weight gradient"}


# --- Messages, numbers and files
class UserError(Exception):
    """Something the user can mend: shown as one line, exit status 1."""


def print_message(kind: str, message: str) -> None:
    """Print one line to stderr, above the progress bar where there is one; when nobody can read it, go on."""
    with suppress(OSError, ValueError):
        tqdm.write(f"{kind}: {' '.join(message.split())}", file=sys.stderr)


warn = partial(print_message, "warning")


def print_results(lines: Iterable[str]) -> None:
    """Print results to stdout; whoever stops reading them, as head does, has seen enough."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quoted(text: str) -> str:
    """Quote what was found, short and printable, for a message."""
    return ascii(text if len(text) <= 60 else f"{text[:60]}...")


def whole_number(text: str) -> int:
    """Return the whole number of at most 30 digits that the text is, or -1 (int() also takes signs and 1_000)."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 30 else -1


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all; what is there and no regular file is written to as it is."""
    target = Path(os.path.realpath(path))  # a link stays a link
    part = target.with_name(f".{os.urandom(8).hex()}.part")
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8", newline="")
        else:
            part.write_text(text, encoding="utf-8", newline="")
            if target.exists():
                shutil.copymode(target, part)
            os.replace(part, target)
    except OSError as error:
        error.filename = path  # a full disk has none
        raise
    finally:
        with suppress(OSError):
            part.unlink()


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write each text into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomic(folder / name, text)


# --- Flags
EXAMPLE = str(Path(__file__).resolve().parent / "mnk_inputs" / "example.csv")
CACHE = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gen_astrasim_workload_input"))
PARALLEL = [*STRATEGIES, CUSTOMIZED]
INT_MAX = (1 << 31) - 1  # what ASTRA-sim counts NPUs with
flags.DEFINE_string("mnk", EXAMPLE, "The table of layers, a CSV file.")
flags.DEFINE_enum("parallel", "DATA", PARALLEL, "How layers are partitioned across NPUs.", case_sensitive=False)
flags.DEFINE_integer("num_npus", 8, "NPUs in the whole system.", 1, INT_MAX)
flags.DEFINE_alias("num_npu", "num_npus")
flags.DEFINE_integer("num_packages", 1, "Packages that the NPUs sit in; must divide num_npus.", 1)
flags.DEFINE_integer("datatype_size", 2, "Bytes per element.", 1, 1 << 20)
flags.DEFINE_integer("minibatch", 1, "Images, for a table of convolutions.", 1, INT_MAX)
flags.DEFINE_string("output_file", "workload.txt", "The ASTRA-sim file; parent folders are made.")
flags.DEFINE_string("run_name", "", "Folder under outputs/<parallel>/ for what was generated; else the mnk's stem.")
flags.DEFINE_string("scalesim_path", "", "A SCALE-Sim folder, v1, v2 or v3; else the installed scalesim package.")
flags.DEFINE_string("scalesim_config", "", "A SCALE-Sim config file; else a 256 x 256 weight-stationary array.")
flags.DEFINE_enum("cycle_model", "simulated", ["simulated", "analytical"], "Run SCALE-Sim, or take its formula.")
flags.DEFINE_integer("jobs", None, "SCALE-Sim processes at once; else the CPUs, as memory allows.", 1)
flags.DEFINE_string("cache_dir", CACHE, "Folder of finished simulations; empty: none.")
flags.DEFINE_enum("shard_rounding", "up", ["up", "down"], "How a size that does not divide is cut: up is the slowest.")
flags.DEFINE_integer("update_time", 100, "Cycles that ASTRA-sim adds after a collective.", 0, INT_MAX)
flags.DEFINE_enum("time_unit", "cycles", ["cycles", "ns", "us"], "The compute times' unit; us for ASTRA-sim 2.x.")
flags.DEFINE_float("clock_mhz", None, "The accelerator's clock in MHz, for --time_unit=ns and us.")
flags.DEFINE_string("chakra_et", "", "Prefix of traces for ASTRA-sim 2.x: <prefix>.<npu>.et, one for each NPU.")
flags.DEFINE_integer("num_passes", 1, "Training steps in those traces.", 1, 1 << 20)
flags.DEFINE_string("summary_csv", "", "A CSV file that gets a row for this run, and a header if it is new.")
flags.DEFINE_bool("dry_run", False, "Print the plan and what is in the cache; simulate nothing, write nothing.")
flags.DEFINE_string("dask_scheduler", "", "Address of a Dask scheduler, to simulate on its cluster.")

PATHS = ("mnk", "output_file", "scalesim_path", "scalesim_config", "cache_dir", "chakra_et", "summary_csv")
for _name in (*PATHS, "run_name"):
    flags.register_validator(_name, lambda text: "\0" not in text, "a NUL character, expected none in a path")
flags.register_validator("mnk", bool, "expected a path")
flags.register_validator("output_file", bool, "expected a path")
flags.register_validator("chakra_et", re.compile("(.*[^/.][^/]*)?$").match, "expected how file names begin")
flags.register_validator(
    "run_name", lambda name: not {"/", ".", ".."} & {*name.split("/"), name[:1]}, "expected a folder below outputs"
)
flags.register_multi_flags_validator(
    ["num_npus", "num_packages"], lambda flag: flag["num_npus"] % flag["num_packages"] == 0, "packages must divide NPUs"
)
flags.register_multi_flags_validator(
    ["time_unit", "clock_mhz", "chakra_et"],
    lambda flag: (
        not (flag["clock_mhz"] or flag["chakra_et"])
        if flag["time_unit"] == "cycles"
        else 0 < (flag["clock_mhz"] or 0) < math.inf
    ),
    "expected ns or us with a clock above 0, or cycles without a clock and without traces",
)


class Settings(NamedTuple):
    """The flags, by their names, with absolute paths; nothing below `main` reads a flag."""

    mnk: Path
    parallel: str
    num_npus: int
    num_packages: int
    datatype_size: int
    minibatch: int
    output_file: Path
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
    num_passes: int
    summary_csv: Path | None
    dry_run: bool
    dask_scheduler: str

    @classmethod
    def from_flags(cls) -> Settings:
        """Read the parsed flags."""
        given = flags.FLAGS
        values: dict[str, Any] = {name: given[name].value for name in cls._fields if name in given}
        for name in PATHS:
            values[name] = Path(values[name]).expanduser().absolute() if values[name] else None
        for name in ("scalesim_path", "dask_scheduler", "jobs"):
            if given.cycle_model == "analytical" and given[name].present:
                warn(f"--{name} has no effect with --cycle_model=analytical")
        values["jobs"] = given.jobs or available_cpus()
        values["run_folder"] = Path("outputs", given.parallel, given.run_name or values["mnk"].stem).absolute()
        return cls(**values)


# --- The table of layers: GEMMs, or SCALE-Sim's convolutions
GEMM = ("m", "n", "k")
CONVOLUTION = ("ifmap height", "ifmap width", "filter height", "filter width", "channels", "num filter", "strides")
ALIASES = {"layer name": "layer", "channel": "channels", "num filters": "num filter"}
OWN_STRATEGY = "customizedparallelization"
HEADERS = "Layer,m,n,k or Layer,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Num Filter,Strides"


class Layer(NamedTuple):
    """A line of the table: m (minibatch rows) x n (outputs) x k (inputs), the strategy, the elements of its inputs."""

    where: str
    name: str
    m: int
    n: int
    k: int
    strategy: str
    inputs: int


def read_layers(path: Path, parallel: str, minibatch: int) -> list[Layer]:
    """Read a table of GEMMs, or of convolutions with `minibatch` images.

    `parallel` is every layer's strategy, or HYBRID_CUSTOMIZED for the last column's own. Raises UserError, naming file
    and line, for whatever is not a header and then layers of whole numbers >= 1.
    """
    rows = _table_rows(path)
    where, header = next(rows, (f"{path}:1", []))
    while header and not header[-1]:
        header.pop()  # the trailing comma of SCALE-Sim's files
    columns = _columns(where, header, parallel)
    if minibatch > 1 and "m" in columns:
        raise UserError(f"{where}: --minibatch={minibatch} and GEMMs, whose m already holds it, expected convolutions")
    layers, renamed = [], []
    for where, row in rows:
        if "strides" in columns and not any(row[1:]):
            warn(f"{where}: {quoted(row[0])} is taken for a title, as in SCALE-Sim's own files")
            continue
        if len(row) <= max(columns.values()) or any(cell and cell[0] != "#" for cell in row[len(header) :]):
            raise UserError(f"{where}: {len(row)} columns, expected {len(header)} as in the header")
        layers.append(_layer(where, {name: row[place] for name, place in columns.items()}, parallel, minibatch))
        if layers[-1].name not in row:
            renamed.append(where)
    if not layers:
        raise UserError(f"{where}: no layers, expected one a line below the header")
    if renamed:
        warn(f"{renamed[0]}: blanks in a name become _, as ASTRA-sim reads words ({len(renamed)} such in all)")
    return layers


def _columns(where: str, header: list[str], parallel: str) -> dict[str, int]:
    """Return the place of each column that is read: the name, the sizes, and what may stand beside them."""
    names = [ALIASES.get(name, name) for name in (" ".join(cell.lower().split()) for cell in header)]
    if names[1:3] == ["ifmap width", "ifmap width"]:
        names[1] = "ifmap height"  # as 14 of SCALE-Sim's files call it
    sizes = (*CONVOLUTION, "padding") if "strides" in names else GEMM
    columns = {name: place for place, name in enumerate(names) if name in ("layer", *sizes, OWN_STRATEGY)}
    others = [name for name in names if name and columns.get(name) != names.index(name)]  # unknown, or there twice
    if {"layer", *sizes[:7]} - columns.keys() or (others and sizes == GEMM) or columns.keys() & {*others}:
        raise UserError(f"{where}: header {quoted(','.join(names))}, expected {HEADERS}")
    if changes := {"sparsity", "batch size"} & {*others}:
        raise UserError(f"{where}: column {min(changes)} changes the work, expected a table without it")
    if parallel == CUSTOMIZED and OWN_STRATEGY not in columns:
        raise UserError(f"{where}: no column CustomizedParallelization, expected one under --parallel={CUSTOMIZED}")
    if others:
        warn(f"{where}: ignored columns: {', '.join(others)}")
    return columns


def _table_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield ("file:line", stripped cells) of each line that is not blank; what is no UTF-8 becomes not printable."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
    try:
        for row in reader:
            if any(cells := [cell.strip() for cell in row]):
                yield f"{path}:{reader.line_num}", cells
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}, expected a CSV table") from None


def _layer(where: str, cells: dict[str, str], parallel: str, minibatch: int) -> Layer:
    name, own = "_".join(cells.pop("layer").split()), cells.pop(OWN_STRATEGY, "").upper()
    if not name or not name.isprintable():
        raise UserError(f"{where}: layer name {quoted(name)}, expected printable characters")
    strategy = MISSPELT.get(own, own) if parallel == CUSTOMIZED else parallel
    if strategy not in STRATEGIES:
        raise UserError(f"{where}: strategy {quoted(own)}, expected one of {', '.join(STRATEGIES)}")
    sizes = {column: whole_number(cell) for column, cell in cells.items()}
    for column, size in sizes.items():
        least = 0 if column == "padding" else 1
        if size < least:
            raise UserError(f"{where}: {column} is {quoted(cells[column])}, expected a whole number >= {least}")
    if "m" in sizes:
        m, n, k = (sizes[column] for column in GEMM)
        return Layer(where, name, m, n, k, strategy, m * k)
    # A convolution is the product of im2col, in which an element of the ifmap stands for each window that it is in.
    height, width, filter_height, filter_width, channels, n, stride = (sizes[column] for column in CONVOLUTION)
    m, k, inputs = minibatch, filter_height * filter_width * channels, minibatch * height * width * channels
    for ifmap, window in ((height, filter_height), (width, filter_width)):
        room = ifmap + 2 * sizes.get("padding", 0) - window
        if room < 0 or "DP" in name:
            raise UserError(f"{where}: a filter larger than its ifmap, or depth-wise (DP), expected neither")
        # Outputs are counted as PyTorch does it, rounded down; without padding as SCALE-Sim does, rounded up.
        m *= room // stride + 1 if "padding" in sizes else -(-(room + stride) // stride)
    return Layer(where, name, m, n, k, strategy, inputs)


# --- Strategies: what one NPU computes and communicates
class Gemm(NamedTuple):
    """A product of an M x K by a K x N matrix: rows, columns, reduction."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


class PassShard(NamedTuple):
    """One NPU's part of a pass, and the collective that follows: in which network dimensions, over how many NPUs."""

    pass_name: str
    gemm: Gemm
    collective: str
    bytes: int
    dimensions: Dimensions
    members: int


Plan = list[tuple[Layer, list[PassShard]]]  # each layer with its three passes
Network = tuple[int, int]  # NPUs of a package, packages


def shard_size(size: int, degree: int, rounding: str) -> int:
    """Return one NPU's part of a dimension that is split over `degree` NPUs, rounded up or down, never to 0."""
    return -(-size // degree) if rounding == "up" else max(1, size // degree)


def shard(layer: Layer, network: Network, datatype_size: int, rounding: str) -> list[PassShard]:
    """Partition a layer across the NPUs: one NPU's forward, input-gradient and weight-gradient passes.

    With m' and n' its parts of m and n, an NPU's outputs are m' x n', gathered from the NPUs that split n; its input
    gradient is m' x k, reduced over those; its weight gradient is k x n', reduced over the NPUs that split m. Bytes are
    exact and rounded down: one NPU's share of an ALLGATHER, the whole buffer of the others, as ASTRA-sim counts them.
    """
    m, n, k = layer.m, layer.n, layer.k
    along_m, along_n = STRATEGIES[layer.strategy]
    dp, mp = (math.prod(network[dimension] for dimension in along) for along in (along_m, along_n))
    rows, columns = shard_size(m, dp, rounding), shard_size(n, mp, rounding)
    passes = [  # the GEMM; the collective, in which dimensions, over how many NPUs; its elements, split over how many
        (Gemm(rows, columns, k), "ALLGATHER", along_n, mp, m * n, dp * mp),
        (Gemm(rows, k, columns), "REDUCESCATTER", along_n, mp, layer.inputs, dp),
        (Gemm(k, columns, rows), "ALLREDUCE", along_m, dp, n * k, mp),
    ]
    return [
        PassShard(name, gemm, collective, elements * datatype_size // split, dimensions, members)
        if dimensions
        else PassShard(name, gemm, NO_COMM, 0, (), 1)
        for name, (gemm, collective, dimensions, members, elements, split) in zip(PASSES.values(), passes)
    ]


def check_plan(plan: Plan) -> None:
    """Warn of sizes that do not divide, and of collectives of 1 to 3 bytes; refuse those of 0 bytes.

    Both ASTRA-sims end silently at a collective of 0 bytes, and never at one smaller than preferred-dataset-splits.
    """
    collectives = [(layer, each) for layer, shards in plan for each in shards if each.collective != NO_COMM]
    if small := [(layer, each) for layer, each in collectives if each.bytes < 4]:
        layer, each = min(small, key=lambda found: found[1].bytes)
        what = f"layer {layer.name}: the {each.collective} of the {each.pass_name} pass comes to {each.bytes} bytes"
        if not each.bytes:
            raise UserError(f"{layer.where}: {what}, where ASTRA-sim stops; expected one an NPU or more")
        warn(f"{what} ({len(small)} such in all): ASTRA-sim may never end at 1 to 3, try 4 or more")
    alone = sum(each.members == 1 for _, each in collectives)
    if 0 < alone < len(collectives):
        warn(f"{alone} collectives have one member: ASTRA-sim 1.0 leaves them out, Chakra's Text converter does not")
    uneven: dict[str, list[str]] = {}
    for layer, shards in plan:
        for dimension, size, degree, own in uneven_sizes(layer, shards):
            what = f"{dimension} = {size} does not divide by {degree}, one NPU is timed with {own}"
            uneven.setdefault(what, []).append(layer.name)
    for what, names in list(uneven.items())[:8]:
        more = f" and {len(names) - 8} more layers" if len(names) > 8 else ""
        warn(f"{', '.join(names[:8])}{more}: {what}")
    if len(uneven) > 8:
        warn(f"{len(uneven) - 8} more sizes do not divide")


def uneven_sizes(layer: Layer, shards: list[PassShard]) -> list[tuple[str, int, int, int]]:
    """Return dimension, size, degree of the split and one NPU's part of what does not divide: m by dp, n by mp."""
    rows, columns, _ = shards[0].gemm
    splits = [("m", layer.m, shards[2].members, rows), ("n", layer.n, shards[0].members, columns)]
    return [split for split in splits if split[1] % split[2]]


# --- The accelerator: SCALE-Sim's config

# The TPU-like accelerator of the published results, with every key that any release of SCALE-Sim reads.
BUILT_IN_CONFIG = """\
[general]
run_name = gemm
[architecture_presets]
ArrayHeight: 256, ArrayWidth: 256, Dataflow: ws
IfmapSramSzkB: 6144, FilterSramSzkB: 6144, OfmapSramSzkB: 2048
IfmapSramSz: 8192, FilterSramSz: 8192, OfmapSramSz: 8192
IfmapOffset: 0, FilterOffset: 10000000, OfmapOffset: 20000000
Bandwidth: 10, MemoryBanks: 1, ReadRequestBuffer: 512, WriteRequestBuffer: 512
[layout]
IfmapCustomLayout: False, IfmapSRAMBankBandwidth: 10, IfmapSRAMBankNum: 10, IfmapSRAMBankPort: 2
FilterCustomLayout: False, FilterSRAMBankBandwidth: 10, FilterSRAMBankNum: 10, FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
[run_presets]
InterfaceBandwidth: CALC, UseRamulatorTrace: False
""".replace(", ", "\n")


class Architecture(NamedTuple):
    """A SCALE-Sim config: as written, as SCALE-Sim gets it, the keys it lacks that are built in, array and dataflow."""

    text: str
    scalesim_text: str
    lacking: list[str]
    rows: int
    columns: int
    dataflow: str


def read_architecture(path: Path | None, cycle_model: str = "simulated") -> Architecture:
    """Read the config at `path`, or the built-in one; UserError for what is none or does not suit the cycle model."""
    source = str(path or "the built-in config")
    given, config = (configparser.ConfigParser(interpolation=None) for _ in range(2))
    try:
        text = path.read_bytes().decode("utf-8-sig") if path else BUILT_IN_CONFIG
        given.read_string(text, source)
    except (UnicodeDecodeError, configparser.Error) as error:
        raise UserError(f"{source}: {error}, expected a SCALE-Sim config: sections of keys and values") from None
    config.read_string(BUILT_IN_CONFIG)
    keys = [(section, key) for section in config.sections() for key in config[section]]
    lacking = [key for section, key in keys if not given.has_option(section, key)]
    config.read_dict(given)
    config["general"] = {"run_name": "gemm"}  # it becomes part of a path, and with v1 of a shell command
    config.remove_section("network_presets")  # SCALE-Sim 3.0.0 stops at it; the topology is ours
    written = io.StringIO()
    config.write(written)
    check_modes(source, config, cycle_model)
    preset = partial(given.get, "architecture_presets", fallback="")
    rows, columns = whole_number(preset("ArrayHeight")), whole_number(preset("ArrayWidth"))
    dataflow = preset("Dataflow")
    if rows < 1 or columns < 1:
        raise UserError(f"{source}: ArrayHeight or ArrayWidth is missing or wrong, expected whole numbers >= 1")
    if dataflow not in ("os", "ws", "is"):
        raise UserError(f"{source}: Dataflow is {quoted(dataflow)}, expected os, ws or is")
    return Architecture(text, written.getvalue(), lacking, rows, columns, dataflow)


def check_modes(source: str, config: configparser.ConfigParser, cycle_model: str) -> None:
    """Refuse the modes of SCALE-Sim that do not suit the table or the cycle model; warn where that is a bound."""
    bandwidth, layout, sparsity = config["run_presets"]["InterfaceBandwidth"], config["layout"], config["sparsity"]
    if bandwidth not in ("CALC", "USER"):
        raise UserError(f"{source}: InterfaceBandwidth is {quoted(bandwidth)}, expected CALC or USER")
    for key in ("IfmapCustomLayout", "FilterCustomLayout"):
        if layout[key].lower() not in ("false", "no", "off", "0"):
            raise UserError(f"{source}: {key} is on, expected False: a layout is for one GEMM, and there are many")
    simulated = cycle_model == "simulated" and sparsity.get("OptimizedMapping", "").lower() == "true"
    if sparsity["SparsitySupport"].lower() == "true" and not simulated:
        mapping = "OptimizedMapping: true with it, as the table has no ratios"
        raise UserError(f"{source}: SparsitySupport is true, expected false, or SCALE-Sim and {mapping}")
    if bandwidth == "USER" and cycle_model == "analytical":
        warn(f"{source}: InterfaceBandwidth is USER: analytical cycles leave out its stalls, and are a lower bound")


def estimated_cycles(gemm: Gemm, architecture: Architecture) -> int:
    """Return the stall-free cycles of a GEMM on an R x C systolic array, as SCALE-Sim v2 and v3 count them.

    The runtime model of Samajdar et al., "A Systematic Methodology for Characterizing Scalability of DNN Accelerators
    using SCALE-Sim" (ISPASS 2020): the operands are cut into folds of the array's size; each fold loads what stays in
    the array (R cycles; nothing stays under os), streams T vectors through it, and fills and drains it.
    """
    rows, columns = architecture.rows, architecture.columns
    m, n, k = gemm
    along_rows, along_columns, streamed = {"os": (m, n, k), "ws": (k, n, m), "is": (k, m, n)}[architecture.dataflow]
    load = 0 if architecture.dataflow == "os" else rows
    folds = -(-along_rows // rows) * -(-along_columns // columns)
    return max(1, folds * (load + rows + columns + streamed - 2) - 1)


def estimated_memory(gemm: Gemm, architecture: Architecture) -> int:
    """Return the bytes of memory at the peak of a GEMM's simulation by SCALE-Sim v2 or v3.

    They keep the operands, and a row of addresses for each operand and cycle. Fitted by least squares on 61 runs of
    2.0.2, 3.0.0 and c28fd1b, arrays from 4 x 4 to 256 x 256, plus a tenth: 83 runs took 0.84 to 1.10 times the fit.
    """
    m, n, k = gemm
    cycle = 1130 + 17 * architecture.rows + 43 * architecture.columns
    return 40_000_000 + estimated_cycles(gemm, architecture) * cycle + 75 * (m * k + k * n + m * n)


def estimated_seconds(gemm: Gemm, architecture: Architecture) -> float:
    """Return how long a GEMM's simulation takes by itself; what the cache knows of this machine scales it.

    Fitted like the memory, to 146 runs of 2.0.2 and 3.0.0: what was measured is 0.8 to 1.5 times this.
    """
    m, n, k = gemm
    cycles, side = estimated_cycles(gemm, architecture), (architecture.rows + architecture.columns) / 2
    return 0.09 + 27e-6 * cycles + 7e-9 * math.pow(cycles * side, 1.3) + 26e-8 * (m * k + k * n + m * n)


# --- SCALE-Sim: one GEMM, one process, one folder

# Of each version of SCALE-Sim, the report with the cycles, and their column: by name, as v3 put another before it.
REPORTS = {1: ("gemm_cycles.csv", "Cycles"), **dict.fromkeys((2, 3), ("COMPUTE_REPORT.csv", "Total Cycles"))}
TOPOLOGY_HEADER = "Layer name,IFMAP height,IFMAP width,Filter height,Filter width,Channels,Num filter,Strides,\n"
LOG = "scalesim.log"


def run_scalesim(version: str, folder: str) -> None:
    """Run the SCALE-Sim in `folder` on gemm.csv in the current folder: the program of each SCALE-Sim process."""

    def follow_parent(here: Path) -> None:
        os.read(0, 1)  # nothing is ever written to stdin; it ends when the parent closes it, or is gone
        shutil.rmtree(here, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=follow_parent, args=[Path.cwd()], daemon=True).start()
    gc.disable()  # SCALE-Sim makes no cycles of objects: it needs as much memory without, and less time
    sys.path.insert(0, folder)
    if version == "1":
        sys.argv = ["scale.py", "-arch_config=gemm.cfg", "-network=gemm.csv"]
        runpy.run_path(f"{folder}/scale.py", run_name="__main__")
        return
    import scalesim  # noqa: F401 - from that folder and no other, which must not stand before Python's own for the rest

    sys.path.remove(folder)
    import numpy

    vars(numpy).setdefault("int", int)  # 2.0, 2.0.1 and c28fd1b use this name, which numpy 1.24 took away
    from scalesim.scale_sim import scalesim as simulator

    wanted = {"config": "gemm.cfg", "topology": "gemm.csv", "layout": "layout.csv", "save_disk_space": True}
    known = inspect.signature(simulator).parameters
    simulator(**{name: value for name, value in wanted.items() if name in known}).run_scale(top_path=".")
    sys.stdout.flush()
    os._exit(0)  # its reports are closed, and taking its matrices down one by one takes time


# A SCALE-Sim process gets its program as text: it may run on a machine that has no such script.
SCALESIM_PROCESS = f"""\
import gc, inspect, os, runpy, shutil, sys, threading
from pathlib import Path
{inspect.getsource(run_scalesim)}
run_scalesim(*sys.argv[1:])
"""


class ScaleSim(NamedTuple):
    """A SCALE-Sim: version, folder to import it from, hash of its code and config, --scalesim_path, config."""

    version: int
    folder: str
    digest: str
    path: Path | None
    config: str


class Simulation(NamedTuple):
    """What came of a SCALE-Sim process: its exit status, the seconds it took, and its reports and log, by name."""

    status: int
    seconds: float
    files: dict[str, str]


def find_scalesim(path: Path | None, config: str, lacking: Sequence[str] = ()) -> ScaleSim:
    """Find the SCALE-Sim at `path`, told apart by its files, or the installed one; UserError where there is none.

    Warns of the keys that its config was lacking, of those that it reads.
    """
    if path and (path / "scale.py").is_file() and (path / "run_nets.py").is_file():
        version, folder, files = 1, path, path.glob("*.py")
    else:
        spec = None if path else importlib.util.find_spec("scalesim")
        places = [path, path / "scalesim"] if path else map(Path, (spec and spec.submodule_search_locations) or [])
        packages = [place for place in places if place.name == "scalesim" and (place / "scale_sim.py").is_file()]
        if not packages:
            expected = "expected scale.py and run_nets.py, or the package scalesim: pip install -r requirements.txt"
            raise UserError(f"no SCALE-Sim {f'in {path}' if path else 'is installed'}, {expected}")
        version = 3 if (packages[0] / "layout_utils.py").is_file() else 2
        folder, files = packages[0].absolute().parent, packages[0].rglob("*.py")
    code = {str(file.relative_to(folder)): file.read_text(encoding="utf-8", errors="replace") for file in files}
    source = "".join(code.values()).lower() if lacking else ""
    if read := [key for key in lacking if f"'{key}'" in source or f'"{key}"' in source]:
        warn(f"--scalesim_config lacks {', '.join(read)}, which this SCALE-Sim reads: taken from the built-in config")
    digest = hashlib.sha256(json.dumps([code, config], sort_keys=True).encode()).hexdigest()
    return ScaleSim(version, str(folder), digest[:32], path, config)


def topology(gemms: Iterable[tuple[str, Gemm]]) -> str:
    """Return named GEMMs as convolutions, which every SCALE-Sim reads: ifmap M x K, N filters of 1 x K, one channel."""
    named = ((re.sub('[",]', "_", name), *gemm) for name, gemm in gemms)  # SCALE-Sim's reader knows no quotes
    return TOPOLOGY_HEADER + "".join(f"{name},{m},{k},1,{k},1,{n},1,\n" for name, m, n, k in named)


def simulate(scalesim: ScaleSim, gemm: Gemm, lifeline: int = subprocess.PIPE) -> Simulation:
    """Run one GEMM through SCALE-Sim, in a process and a temporary folder of its own.

    Only values go in and come out, so this may run on another machine; UserError where that has other code. The process
    ends when `lifeline` does, a pipe's reading end: by default, with this process.
    """
    here = find_scalesim(scalesim.path, scalesim.config)
    if here.digest != scalesim.digest:
        raise UserError(f"the SCALE-Sim in {here.folder} is not the code that this run began with")
    inputs = {
        "gemm.cfg": scalesim.config,
        "gemm.csv": topology([("gemm", gemm)]),
        "layout.csv": f"{'-,' * 21}\ngemm,{'1,' * 20}\n",  # v3 reads one even when layouts are off
    }
    with tempfile.TemporaryDirectory(prefix="gen_astrasim_", ignore_cleanup_errors=True) as name:
        folder, began = Path(name), time.monotonic()
        write_files(folder, inputs)
        with (
            (folder / LOG).open("wb") as log,
            subprocess.Popen(
                [sys.executable, "-B", "-c", SCALESIM_PROCESS, str(here.version), here.folder],
                cwd=folder,
                env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
                stdin=lifeline,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which then ends the others
            ) as process,
        ):
            status = process.wait()
        seconds = round(time.monotonic() - began, 3)
        reports = [file for report in folder.rglob(REPORTS[here.version][0]) for file in report.parent.glob("*.csv")]
        collected = [file for file in (*reports, folder / LOG) if file.is_file() and file.name not in inputs]
        files = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in collected}
        return Simulation(status, seconds, files)


def reported_cycles(files: dict[str, str], version: int) -> int | None:
    """Return the cycles of the one GEMM in SCALE-Sim's report; None where there are none to trust."""
    report, column = REPORTS[version]
    try:
        lines = csv.reader(io.StringIO(files.get(report, "")))
        header, row = (line for line in ([cell.strip() for cell in line] for line in lines) if any(line))
        whole = max(position for position, name in enumerate(header, 1) if name)  # a comma ends both lines, or not
        cycles = whole_number(row[header.index(column)].removesuffix(".0"))
    except (csv.Error, ValueError, IndexError):
        return None
    return cycles if cycles >= 1 and len(row) >= whole else None


# --- Each distinct GEMM once: cached, and side by side
class Cache:
    """Finished simulations of one SCALE-Sim and config: <cache_dir>/<hash of both>/<M>x<N>x<K>.json."""

    def __init__(self, folder: Path | None, version: int) -> None:
        self.folder = folder  # None: nothing is cached
        self.version = version

    def load(self, gemm: Gemm) -> tuple[int, Simulation] | None:
        """Return a GEMM's cycles and simulation, or None where there is none that can be trusted."""
        try:
            entry = json.loads((self.folder / f"{gemm}.json").read_bytes()) if self.folder else {}
            seconds, files = float(entry["seconds"]), entry["files"]
            "".join(files.values()).encode()  # an error, where this is no text
            trusted = entry["gemm"] == str(gemm) and 0 < seconds < 1e9
            trusted = trusted and all(re.fullmatch(r"\w[\w.-]{0,99}", name) for name in files)
            cycles = reported_cycles(files, self.version)
            return (cycles, Simulation(0, seconds, files)) if cycles and trusted else None
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError):
            return None  # simulated again, and replaced

    def store(self, gemm: Gemm, simulation: Simulation) -> None:
        """Publish a finished simulation; where that can't be done, warn and cache no more."""
        entry = {"gemm": str(gemm), "seconds": simulation.seconds, "files": simulation.files}
        try:
            if self.folder:
                write_files(self.folder, {f"{gemm}.json": json.dumps(entry)})
        except OSError as error:
            warn(f"can't cache finished simulations in {self.folder}: {error.strerror}; going on without")
            self.folder = None

    def pace(self, architecture: Architecture) -> float:
        """Return how many times their estimated seconds up to 100 finished simulations took; 1 where there are none."""
        took = estimated = 0.0
        for file in itertools.islice(self.folder.glob("*x*x*.json") if self.folder else (), 100):
            with suppress(ValueError, TypeError):  # of another name
                gemm = Gemm(*map(int, file.stem.split("x")))
                if found := self.load(gemm):
                    took += found[1].seconds
                    estimated += estimated_seconds(gemm, architecture)
        return took / estimated if took else 1.0


class Job(NamedTuple):
    """A distinct GEMM to simulate: the layer and pass that use it first, its estimated cycles, bytes and seconds."""

    gemm: Gemm
    first_use: str
    cycles: int
    memory: int
    seconds: float


def distinct_jobs(plan: Plan, architecture: Architecture, version: int) -> list[Job]:
    """Return each distinct GEMM of a plan, the longest first, so that none is left alone at the end."""
    uses: dict[Gemm, str] = {}
    for layer, shards in plan:
        for shard in shards:
            uses.setdefault(shard.gemm, f"layer {layer.name}, {shard.pass_name} pass")
    jobs = []
    for gemm, first_use in uses.items():
        memory = 60_000_000 if version == 1 else estimated_memory(gemm, architecture)  # v1 keeps its traces on disk
        cycles, seconds = estimated_cycles(gemm, architecture), estimated_seconds(gemm, architecture)
        jobs.append(Job(gemm, first_use, cycles, memory, seconds))
    return sorted(jobs, key=lambda job: job.cycles, reverse=True)


CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def control_groups(*files: str) -> Iterator[list[str]]:
    """Yield the words of these files of each control group, version 2 or 1, that limits this process and has them."""
    with suppress(OSError):  # no Linux
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)  # version 2 names no controllers
            innermost = CGROUPS / controllers / group.strip("/")
            for folder in (innermost, *innermost.parents):
                with suppress(OSError):
                    yield [word for name in files for word in (folder / name).read_text().split()]


def available_cpus() -> int:
    """Return how many CPUs this process may keep busy, by its affinity and its control groups."""
    cpus = [(os.cpu_count() or 1) if sys.platform == "darwin" else len(os.sched_getaffinity(0))]
    for quota, period in (*control_groups("cpu.max"), *control_groups("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        if quota not in ("max", "-1"):
            cpus.append(-(-int(quota) // int(period)))
    return max(1, min(cpus))


def available_memory() -> int:
    """Return the bytes of memory that new processes may fill, by the machine and by this process's control groups."""
    available = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):  # no Linux
        words = Path("/proc/meminfo").read_text().split()
        available.append(int(words[words.index("MemAvailable:") + 1]) * 1024)
    for limit, used in (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")):  # without what files cache
        for words in control_groups(limit, "memory.stat"):
            if words[0] != "max":
                available.append(int(words[0]) - int(words[words.index(used) + 1]))
    return max(0, min(available))


Submit = Callable[[Job], "Future[Simulation]"]


@contextmanager
def local_pool(processes: int, scalesim: ScaleSim) -> Iterator[Submit]:
    """Give a function that simulates on this machine, so many at once; what still runs at the end is ended."""
    from concurrent.futures import ThreadPoolExecutor  # only now: it takes 5 ms

    lifeline, held = os.pipe()
    pool = ThreadPoolExecutor(processes)
    try:
        yield lambda job: pool.submit(simulate, scalesim, job.gemm, lifeline)
    finally:
        os.close(held)  # at which every SCALE-Sim process ends
        pool.shutdown(cancel_futures=True)
        os.close(lifeline)


@contextmanager
def dask_pool(address: str, scalesim: ScaleSim) -> Iterator[Submit]:
    """Give a function that simulates on the Dask cluster at `address`; UserError when it is not there."""
    logging.disable()  # what goes wrong is said here, in one line
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import CommClosedError

        Client.__del__ = lambda _: None  # it would try for 40 s to end what could not begin, and print a traceback
        client = Client(address, timeout=20, set_as_default=False)
    except ImportError:
        raise UserError("--dask_scheduler needs Dask, expected: pip install 'dask[distributed]'") from None
    except Exception as error:  # whatever Dask makes of an address
        raise UserError(f"--dask_scheduler={address} can't be reached: {error}") from None
    with client:
        pool = client.get_executor(pure=False)
        if not client.nthreads():
            warn(f"the Dask scheduler at {address} has no workers yet: waiting for them")
        try:
            # Dask keeps no order among what is submitted at once, but the one that it is told, in 64 bits.
            yield lambda job: pool.submit(simulate, scalesim, job.gemm, priority=min(job.cycles, 1 << 62))
        except (KilledWorker, CommClosedError, CancelledError) as error:
            raise UserError(f"--dask_scheduler={address} lost a simulation: {error!r}") from None
        finally:
            pool.shutdown(wait=False)


def run_side_by_side(
    submit: Submit, jobs: Sequence[Job], slots: int, memory: float
) -> Iterator[tuple[list[Job], dict[Job, Future[Simulation]]]]:
    """Submit jobs in their order, as slots and bytes of memory allow; one that never fits is submitted last, alone.

    Yields, at least once a second, the jobs that are running and those that have just finished.
    """
    waiting, running, free = list(jobs), dict[Job, "Future[Simulation]"](), memory
    while waiting or running:
        fitting = (job for job in waiting if job.memory <= free)
        following = next(fitting, None if running else waiting[0])
        if following and len(running) < slots:
            waiting.remove(following)
            running[following] = submit(following)
            free -= following.memory
            continue
        done = wait(running.values(), timeout=1, return_when=FIRST_COMPLETED).done
        finished = {job: running.pop(job) for job, future in list(running.items()) if future in done}
        free += sum(job.memory for job in finished)
        yield list(running), finished


def estimated_range(jobs: list[Job], pace: float, slots: int) -> str:
    """Return between what times these simulations will take, so many at once; they slow each other."""
    longest, all_in_all = (pace * each([0, *(job.seconds for job in jobs)]) for each in (max, sum))
    times = 0.6 * max(longest, all_in_all / slots), 2.2 * (longest + all_in_all / slots)
    said = []
    for seconds in times:
        size, unit = next((each for each in ((3600, "h"), (60, "min")) if seconds >= 2 * each[0]), (1, "s"))
        said.append(f"{seconds / size:,.0f} {unit}")
    return " to ".join(said)


def simulated_cycles(
    jobs: list[Job], scalesim: ScaleSim, cache: Cache, architecture: Architecture, settings: Settings
) -> tuple[dict[Gemm, int], int]:
    """Return the cycles of each GEMM by SCALE-Sim, and for how many it was run.

    Raises UserError when SCALE-Sim fails, naming the GEMM, its layer, what SCALE-Sim said last and its log.
    """
    cycles = {}
    for job in jobs:
        if found := cache.load(job.gemm):
            cycles[job.gemm] = found[0]
            write_files(settings.run_folder / f"gemm_{job.gemm}", found[1].files)
    new = [job for job in jobs if job.gemm not in cycles]
    if not new:
        return cycles, 0
    if settings.dask_scheduler:
        pool = dask_pool(settings.dask_scheduler, scalesim)
        slots, memory = len(new), math.inf  # workers take one simulation a thread, and know their own memory
    else:
        pool = local_pool(settings.jobs, scalesim)
        slots, memory = settings.jobs, available_memory()
    largest = max(new, key=lambda job: job.memory)
    if largest.memory > memory:
        needs = f"needs about {largest.memory / 1e9:,.1f} GB of memory, {memory / 1e9:,.1f} GB is free"
        warn(f"GEMM {largest.gemm} ({largest.first_use}) {needs}: it may be killed; try --cycle_model=analytical")
    tqdm.monitor_interval = 0  # the bar is moved here, each second
    estimate = estimated_range(new, cache.pace(architecture), slots)
    layout = f"GEMM {{desc}} {{percentage:3.0f}}% |{{bar}}| {{elapsed}} of {estimate}{{postfix}}"
    bar = tqdm(
        desc=f"1/{len(new)}", total=sum(job.seconds for job in new), bar_format=layout, disable=None, leave=False
    )
    try:
        with pool as submit, bar:
            for running, finished in run_side_by_side(submit, new, slots, memory):
                for job, future in finished.items():
                    simulation, folder = future.result(), settings.run_folder / f"gemm_{job.gemm}"
                    cycles[job.gemm] = checked_cycles(simulation, job, scalesim.version, folder)
                    cache.store(job.gemm, simulation)
                    write_files(folder, simulation.files)
                    bar.update(job.seconds)
                begun = len(new) - len(jobs) + len(cycles) + len(running)
                bar.set_description_str(f"{begun}/{len(new)}", refresh=False)
                bar.set_postfix_str(f"{running[0].gemm}, {running[0].first_use}" if running else "")
    except KeyboardInterrupt:
        where = f"cached in {cache.folder}" if cache.folder else "lost: there is no cache"
        print_message("interrupted", f"{len(cycles)} of {len(jobs)} GEMMs are finished, {where}")
        raise
    return cycles, len(new)


def checked_cycles(simulation: Simulation, job: Job, version: int, folder: Path) -> int:
    """Return a simulation's cycles, or leave its log in `folder` and raise the UserError that says what went wrong."""
    status, _, files = simulation
    cycles = reported_cycles(files, version)
    if cycles and not status:
        return cycles
    report, column = REPORTS[version]
    problem = f"exit status {status}" if status else f"no {report} with one whole row and a number >= 1 as {column}"
    if status < 0:
        problem = f"killed, {signal.strsignal(-status)}"
    lines = [line.strip()[:200] for line in files.get(LOG, "").splitlines() if line.strip()][-3:]
    if status == -signal.SIGKILL or "MemoryError" in "".join(lines):
        problem += " (out of memory? fewer --jobs may help, or --cycle_model=analytical)"
    said = "".join(c for c in " | ".join(lines) if c.isprintable()) or "nothing"
    write_files(folder, files)
    where = f"GEMM {job.gemm} ({job.first_use})"
    raise UserError(f"SCALE-Sim failed on {where}: {problem}; it last said: {said}; log: {folder / LOG}")


# --- Compute times and totals
def pass_totals(plan: Plan, times: dict[Gemm, int]) -> list[int]:
    """Return the sum of each pass's compute times over all layers."""
    return [sum(times[shards[index].gemm] for _, shards in plan) for index in range(len(PASSES))]


def collective_totals(plan: Plan) -> dict[str, tuple[int, int]]:
    """Return of each kind of collective how many there are, and their bytes; those of one member are none."""
    running = [shard for _, shards in plan for shard in shards if shard.members > 1]
    sizes = {name: [shard.bytes for shard in running if shard.collective == name] for name in COMM_TYPES}
    return {name: (len(each), sum(each)) for name, each in sizes.items()}


def compute_times(plan: Plan, cycles: dict[Gemm, int], unit: str, clock_mhz: float | None) -> dict[Gemm, int]:
    """Return each GEMM's compute time in `unit`: exact, to the nearest whole number >= 1 (halves to even).

    Warns when rounding moves the total of a pass by more than 1 %.
    """
    if unit == "cycles":
        return cycles
    from fractions import Fraction

    cycle = (1000 if unit == "ns" else 1) / Fraction(str(clock_mhz))  # its length in that unit
    times = {gemm: max(1, round(count * cycle)) for gemm, count in cycles.items()}
    totals = zip(PASSES.values(), pass_totals(plan, times), pass_totals(plan, cycles))
    changes = {name: float(written / (exact * cycle) - 1) * 100 for name, written, exact in totals if exact}
    if moved := [f"{name} pass by {change:+.1f} %" for name, change in changes.items() if abs(change) > 1]:
        warn(f"--time_unit={unit}: rounding moves the compute time of the {', of the '.join(moved)}")
    return times


# --- The workload file and the run folder
def workload_text(plan: Plan, times: dict[Gemm, int], parallel: str, update_time: int) -> str:
    """Return the workload file that ASTRA-sim reads, with each GEMM's compute time; sizes are bytes.

    ASTRA-sim 1.0 reads words, not lines: only under HYBRID_CUSTOMIZED does it take a thirteenth, the layer's strategy.
    """
    lines = [parallel, str(len(plan))]
    for layer, shards in plan:
        passes = (f"{times[shard.gemm]}\t{shard.collective}\t{shard.bytes}" for shard in shards)
        own_strategy = [layer.strategy] if parallel == CUSTOMIZED else []
        lines.append("\t".join([layer.name, "-1", *passes, str(update_time), *own_strategy]))
    return "\n".join(lines) + "\n"


def csv_text(*rows: Iterable[Any]) -> str:
    """Return rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


LAYERS = ("layer", "strategy", "dp", "mp", "pass", "M", "N", "K", "cycles", "collective", "bytes", "members")


def layers_table(plan: Plan, cycles: dict[Gemm, int]) -> str:
    """Return a table, as CSV, of what one NPU does in each pass of each layer."""
    rows: list[Iterable[Any]] = [LAYERS]
    for layer, shards in plan:
        whole = (layer.name, layer.strategy, shards[2].members, shards[0].members)
        for pass_name, gemm, collective, size, _, members in shards:
            rows.append((*whole, pass_name, *gemm, cycles[gemm], collective, size, members))
    return csv_text(*rows)


SUMMARY = [
    *("mnk", "parallel", "num_npus", "num_packages", "datatype_size", "minibatch", "cycle_model", "time_unit"),
    *("clock_mhz", "compute_forward", "compute_input_gradient", "compute_weight_gradient", "compute_all"),
    *(f"{name.lower()}_{what}" for name in COMM_TYPES for what in ("count", "bytes")),
    *("distinct_gemms", "output_file"),
]


def append_summary(path: Path, plan: Plan, times: dict[Gemm, int], settings: Settings) -> None:
    """Append a row of this run to --summary_csv, whole, also beside others; compute is in --time_unit."""
    compute, collectives = pass_totals(plan, times), collective_totals(plan).values()
    values = [getattr(settings, name, None) for name in SUMMARY[:9]]
    if settings.minibatch == 1 and all(layer.inputs == layer.m * layer.k for layer, _ in plan):
        values[SUMMARY.index("minibatch")] = None  # a table of GEMMs
    values += [*compute, sum(compute), *itertools.chain(*collectives), len(times), settings.output_file]
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: who finds the file empty writes the header
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = "\n" if file.read(1) not in (b"", b"\n") else ""  # of a row that a full disk cut off, say
        header = [] if size else [SUMMARY]
        file.write((torn + csv_text(*header, values)).encode("utf-8", "surrogateescape"))


def check_output(settings: Settings) -> None:
    """Make the folders of what will be written, and refuse now what could not be written after hours."""
    prefix, summary = settings.chakra_et, settings.summary_csv
    traces = [f"{prefix}.{npu}.et" for npu in range(settings.num_npus)] if prefix and chakra_messages() else []
    paths = [settings.output_file, *traces, *([summary] if summary else [])]
    targets = Counter(Path(os.path.realpath(path)) for path in paths)  # a link stays a link
    read = [Path(os.path.realpath(path)) for path in (settings.mnk, settings.scalesim_config) if path]
    folders = {settings.run_folder, *(target.parent for target in targets)}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for target, times in targets.items():
        if times > 1:
            raise UserError(f"{target} is to be written twice, expected another file for each output")
        if target.is_dir():
            raise UserError(f"{target} is a folder, expected a file to write")
        if target in read and target.is_file():
            raise UserError(f"{target} is what was given to read, expected another file to write")
    for needed in (*folders, *targets):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise UserError(f"{needed} can't be written: no permission")
    if summary and summary.is_file():
        with summary.open(encoding="utf-8", errors="surrogateescape") as file:
            header = file.readline().strip()
        if header not in ("", ",".join(SUMMARY)):
            raise UserError(f"{summary}:1: header {quoted(header)}, expected a summary's, or no file")


# --- Execution traces for ASTRA-sim 2.x
# The messages of MLCommons Chakra, as far as a trace uses them: field=number:type, and * where it is repeated.
CHAKRA_MESSAGES = """\
GlobalMetadata version=1:string
BoolList values=1:bool*
AttributeProto name=1:string int64_val=9:int64 bool_val=27:bool bool_list=28:BoolList
Node id=1:uint64 name=2:string type=3:int32 data_deps=5:uint64* duration_micros=7:uint64 attr=10:AttributeProto*
"""
COMP_NODE, COMM_COLL_NODE = 4, 7


def chakra_messages() -> tuple[dict[str, Any], Callable[[Any, io.BytesIO], None]]:
    """Return the class of each of Chakra's messages, and what writes one; UserError where there is no protobuf."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
        from google.protobuf.proto import serialize_length_prefixed
    except ImportError:
        raise UserError("--chakra_et needs protobuf, expected: pip install -r requirements.txt") from None

    # By proto2's rules a value that is set is written also where it is 0 or false, as in Chakra's oneof.
    file = descriptor_pb2.FileDescriptorProto(name="chakra.proto", syntax="proto2")
    for message, fields in (line.split(" ", 1) for line in CHAKRA_MESSAGES.splitlines()):
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in re.findall(r"(\w+)=(\d+):(\w+)(\*?)", fields):
            of: dict[str, Any] = {"type": f"TYPE_{kind.upper()}"} if kind.islower() else {"type_name": kind}
            declared.field.add(name=name, number=int(number), label=3 if repeated else 1, **of)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClassesForFiles(["chakra.proto"], pool), serialize_length_prefixed


def chakra_trace(plan: Plan, times: dict[Gemm, int], network: Network, parallel: str, num_passes: int) -> bytes:
    """Return the execution trace of an NPU, all of which are equal: ASTRA-sim 1.0's training loop as a graph.

    A collective runs in its own dimensions of the network, of which those of size 1 are none; with one member it is
    left out, as ASTRA-sim ends silently at one. UserError where a time or a size does not fit into 64 bits.
    """
    if max(*times.values(), *(shard.bytes for _, shards in plan for shard in shards)) >> 63:
        raise UserError("--chakra_et: a time or a size is too large for 64 bits")
    (messages, write), trace, ids = chakra_messages(), io.BytesIO(), itertools.count()
    write(messages["GlobalMetadata"](version="0.0.4"), trace)

    def add(name: str, after: list[int], attributes: Sequence[dict[str, Any]] = (), **fields: int) -> list[int]:
        attr = [{"name": "is_cpu_op", "bool_val": False}, *attributes]
        node = messages["Node"](id=next(ids), name=name, data_deps=dict.fromkeys(after), attr=attr, **fields)
        write(node, trace)
        return [node.id]

    def compute(layer: Layer, shard: PassShard, after: list[int]) -> list[int]:
        return add(f"{layer.name} {shard.pass_name}", after, type=COMP_NODE, duration_micros=times[shard.gemm])

    def communicate(layer: Layer, shard: PassShard, after: list[int]) -> list[int]:
        if shard.members == 1:
            return after
        involved = [dimension in shard.dimensions for dimension, size in enumerate(network) if size > 1]
        attributes: list[dict[str, Any]] = [
            {"name": "comm_type", "int64_val": COMM_TYPES[shard.collective]},
            {"name": "comm_size", "int64_val": shard.bytes},
            {"name": "involved_dim", "bool_list": {"values": involved}},
        ]
        return add(f"{layer.name} {shard.pass_name} {shard.collective}", after, attributes, type=COMM_COLL_NODE)

    updated: list[list[int]] = [[] for _ in plan]  # after which nodes each layer has its new weights
    for _ in range(num_passes):
        before: list[int] = []
        for index, (layer, (forward, _, _)) in enumerate(plan):
            before = communicate(layer, forward, compute(layer, forward, before + updated[index]))
        for index, (layer, (_, inp_grad, weight_grad)) in reversed(list(enumerate(plan))):
            if parallel == "DATA":
                computed = compute(layer, weight_grad, before)
                updated[index] = communicate(layer, weight_grad, computed)
                before = compute(layer, inp_grad, computed) if index else computed
            else:
                gradient = compute(layer, inp_grad, before)
                reduced = communicate(layer, inp_grad, gradient) if index else gradient
                computed = compute(layer, weight_grad, gradient)
                updated[index] = communicate(layer, weight_grad, computed)
                before = reduced + computed
    return trace.getvalue()


@contextmanager
def staged_traces(prefix: Path, trace: bytes, npus: int) -> Iterator[None]:
    """Prepare the same trace for every NPU, on disk once where links are possible; put all in place at the end."""
    with tempfile.TemporaryDirectory(prefix=".", dir=prefix.parent) as name:
        source, *others = (Path(name, str(npu)) for npu in range(npus))
        source.write_bytes(trace)
        for other in others:
            try:
                os.link(source, other)
            except OSError:  # no links here, or no more of this one
                source = Path(shutil.copyfile(source, other))
        yield
        for npu in range(npus):
            os.replace(Path(name, str(npu)), f"{prefix}.{npu}.et")


# --- What the user sees
def result_table(plan: Plan, times: dict[Gemm, int], unit: str, customized: bool) -> list[str]:
    """Return what one NPU does in each layer's passes, repeated blocks once, and what a training step costs it."""
    rows = [("layer", "pass", "GEMM of one NPU", unit, "collective", "bytes")]
    uneven = False
    for same_layers in merged_layers(plan):
        layer, shards = same_layers[0]
        name = layer.name
        if len(same_layers) > 1:
            name = f"{len(same_layers)} × {layer.name} ... {same_layers[-1][0].name}"
        if uneven_sizes(layer, shards):
            name, uneven = f"{name} *", True
        for label, shard in zip((name, f"  {layer.strategy}" if customized else "", ""), shards):
            collective = shard.collective + " of 1" * (shard.collective != NO_COMM and shard.members == 1)
            numbers = (f"{times[shard.gemm]:,}", collective, f"{shard.bytes:,}")
            rows.append((label, shard.pass_name, str(shard.gemm), *numbers))
    footnote = ["* a size that does not divide: not all NPUs have the same share"] if uneven else []
    compute = pass_totals(plan, times)
    totals = [("totals of a training step", "", "")]
    for name, total in zip([*PASSES.values(), "all passes"], [*compute, sum(compute)]):
        totals.append((f"compute, {name}", f"{total:,}", unit))
    for collective, (count, size) in collective_totals(plan).items():
        if count:
            totals.append((f"{count:,} × {collective}", f"{size:,}", "bytes"))
    return [*aligned(rows, "<<>><>"), *footnote, *aligned(totals, "<><")]


def merged_layers(plan: Plan) -> Iterator[Plan]:
    """Yield the layers in the network's order, those at one place of a block of up to 32 that repeats as one."""
    kinds: dict[tuple[Any, ...], int] = {}  # all that matters of a layer, as a letter of a text
    text = "".join(chr(kinds.setdefault(layer[2:], len(kinds))) for layer, _ in plan)
    for block in re.finditer(r"(.{1,32}?)\1+|.", text, re.DOTALL):
        size = len(block[1] or block[0])
        yield from (plan[block.start() + place : block.end() : size] for place in range(size))


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Align columns to the left or right (< or >)."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:{side}{size}}" for cell, side, size in zip(row, sides, widths)).rstrip() for row in rows]


# --- The pipeline
def generate(settings: Settings) -> None:
    """Do the whole job: read the table, partition the layers, time the GEMMs, write the files, show the result."""
    started = time.monotonic()
    network = (settings.num_npus // settings.num_packages, settings.num_packages)
    layers = read_layers(settings.mnk, settings.parallel, settings.minibatch)
    plan = [(layer, shard(layer, network, settings.datatype_size, settings.shard_rounding)) for layer in layers]
    check_plan(plan)
    architecture = read_architecture(settings.scalesim_config, settings.cycle_model)
    scalesim, cache = None, Cache(None, 0)
    if settings.cycle_model == "simulated":
        scalesim = find_scalesim(settings.scalesim_path, architecture.scalesim_text, architecture.lacking)
        cache = Cache(settings.cache_dir and settings.cache_dir / scalesim.digest, scalesim.version)
    jobs = distinct_jobs(plan, architecture, cache.version)
    if settings.dry_run:
        print_results(dry_run_report(plan, jobs, cache, architecture, settings))
        return
    check_output(settings)
    files = {"scalesim.cfg": architecture.text, "cycle_model.txt": f"{settings.cycle_model}\n"}
    for index, name in enumerate(PASSES):
        rows = ((layer.name, shards[index].gemm) for layer, shards in plan)
        files[f"{settings.mnk.stem}_{name}.csv"] = topology(rows)
    write_files(settings.run_folder, files)
    if scalesim:
        cycles, runs = simulated_cycles(jobs, scalesim, cache, architecture, settings)
        made = f"{runs} simulated, {len(jobs) - runs} from the cache"
    else:
        cycles, made = {job.gemm: job.cycles for job in jobs}, "by SCALE-Sim's analytical runtime"
    write_atomic(settings.run_folder / "layers.csv", layers_table(plan, cycles))
    times = compute_times(plan, cycles, settings.time_unit, settings.clock_mhz)
    with ExitStack() as stack:  # the traces appear when all else is written
        if settings.chakra_et:
            trace = chakra_trace(plan, times, network, settings.parallel, settings.num_passes)
            stack.enter_context(staged_traces(settings.chakra_et, trace, settings.num_npus))
        write_atomic(settings.output_file, workload_text(plan, times, settings.parallel, settings.update_time))
        if settings.summary_csv:
            append_summary(settings.summary_csv, plan, times, settings)
    seconds = time.monotonic() - started
    last = f"wrote {settings.output_file}: {len(plan)} layers, {len(jobs)} distinct GEMMs ({made}), {seconds:.1f} s"
    print_results([*result_table(plan, times, settings.time_unit, settings.parallel == CUSTOMIZED), last])


def dry_run_report(
    plan: Plan, jobs: list[Job], cache: Cache, architecture: Architecture, settings: Settings
) -> list[str]:
    """Return what --dry_run shows: the plan with estimated cycles, and what a run would cost."""
    times = compute_times(plan, {job.gemm: job.cycles for job in jobs}, settings.time_unit, settings.clock_mhz)
    lines = result_table(plan, times, f"estimated {settings.time_unit}", settings.parallel == CUSTOMIZED)
    lines.append(f"dry run: {len(plan)} layers, {len(jobs)} distinct GEMMs of {3 * len(plan)}, nothing written")
    if settings.cycle_model == "simulated":
        new = [job for job in jobs if not cache.load(job.gemm)]
        total, most = sum(job.cycles for job in new), max((job.memory for job in new), default=0)
        lines.append(f"{len(jobs) - len(new)} in the cache, {len(new)} to simulate: {total:,} estimated cycles")
        lines.append(f"largest simulation: {most / 1e9:,.1f} GB estimated, {available_memory() / 1e9:,.1f} GB free")
        slots = max(1, min(settings.jobs, available_memory() // max(most, 1)))
        took = estimated_range(new, cache.pace(architecture), slots)
        lines.append(f"time with --jobs={settings.jobs}: {took} estimated")
    return lines


def run(argv: Sequence[str]) -> int:
    """Run with this command line; return the exit status, after one error line where it is 1."""
    try:
        if {"--help", "-help", "-h"} & set(argv):
            own = flags.FLAGS.get_flags_for_module(sys.modules[__name__])  # in the order in which they stand above
            print_results([__doc__ or "", *(f"  --{flag.name}={flag.default}\n      {flag.help}" for flag in own)])
            return 0
        if rest := flags.FLAGS(list(argv))[1:]:
            raise UserError(f"unexpected argument {quoted(rest[0])}, expected only flags, as --name=value")
        generate(Settings.from_flags())
        return 0
    except (UserError, flags.Error, UnicodeDecodeError, RuntimeError) as error:  # of a --flagfile, of a ~ without home
        message = str(error)
    except FileExistsError as error:
        message = f"{error.filename} is a file, expected a folder"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        message += "; fewer --jobs may help" if error.errno == errno.EMFILE else ""
    print_message("error", message)
    return 1


def main() -> int:
    """Run with the command line; return the exit status, or end by the signal that came."""
    handled = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) != signal.SIG_IGN]

    def handle(handler: Any) -> None:
        for each in handled:
            signal.signal(each, handler)

    def interrupt(number: int, _: object) -> None:
        handle(signal.SIG_IGN)  # a second signal must not disturb the cleaning up
        raise KeyboardInterrupt(number)

    try:
        handle(interrupt)
        status = run(sys.argv)
        handle(signal.SIG_DFL)  # from now on a signal just ends the process
        return status
    except KeyboardInterrupt as stop:
        handle(signal.SIG_DFL)
        signal.raise_signal(stop.args[0])  # a shell's loop goes on after a mere status of 130
        return 128 + int(stop.args[0])  # process 1 of a container does not die of its own signal


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
