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
class Strategy(NamedTuple):
    """The dimensions of the network, 0 within a package and 1 between packages, that split a layer's m and its n."""

    m: tuple[int, ...]
    n: tuple[int, ...]


STRATEGIES = {
    "DATA": Strategy(m=(0, 1), n=()),
    "MODEL": Strategy(m=(), n=(0, 1)),
    "HYBRID_DATA_MODEL": Strategy(m=(1,), n=(0,)),
    "HYBRID_MODEL_DATA": Strategy(m=(0,), n=(1,)),
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
PARALLEL = [*STRATEGIES, CUSTOMIZED]
MODELS, ROUNDINGS, UNITS = ["simulated", "analytical"], ["up", "down"], ["cycles", "ns", "us"]
INT_MAX = (1 << 31) - 1  # what ASTRA-sim counts NPUs with
flags.DEFINE_string("mnk", EXAMPLE, "The table of layers, a CSV file.")
flags.DEFINE_enum("parallel", "DATA", PARALLEL, "How layers are partitioned across NPUs.", case_sensitive=False)
flags.DEFINE_integer("num_npus", 8, "NPUs in the whole system.", 1, INT_MAX)
flags.DEFINE_alias("num_npu", "num_npus")
flags.DEFINE_integer("num_packages", 1, "Packages that the NPUs sit in; must divide num_npus.", 1)
flags.DEFINE_integer("datatype_size", 2, "Bytes per element.", 1, 1 << 20)
flags.DEFINE_integer("minibatch", 1, "Images, for a table of convolutions.", 1, INT_MAX)
flags.DEFINE_string("output_file", "workload.txt", "The ASTRA-sim file; parent folders are made.")
flags.DEFINE_string("run_name", None, "Folder under outputs/<parallel>/ for what was generated; else the mnk's stem.")
flags.DEFINE_string("scalesim_path", "", "A SCALE-Sim folder, v1, v2 or v3; else the installed scalesim package.")
flags.DEFINE_string("scalesim_config", "", "A SCALE-Sim config file; else a 256 x 256 weight-stationary array.")
flags.DEFINE_enum("cycle_model", "simulated", MODELS, "Run SCALE-Sim, or take its analytical runtime (no stalls).")
flags.DEFINE_integer("jobs", None, "SCALE-Sim processes at once; else the CPUs, as memory allows.", 1)
flags.DEFINE_string("cache_dir", None, "Folder of finished simulations; else one in the user's cache; empty: none.")
flags.DEFINE_enum("shard_rounding", "up", ROUNDINGS, "How a size that does not divide is cut: up is the slowest NPU.")
flags.DEFINE_integer("update_time", 100, "Cycles that ASTRA-sim adds after a collective.", 0, INT_MAX)
flags.DEFINE_enum("time_unit", "cycles", UNITS, "What compute times are written in: cycles, ns, us (ASTRA-sim 2.x).")
flags.DEFINE_float("clock_mhz", None, "The accelerator's clock in MHz, for --time_unit=ns and us.")
flags.DEFINE_string("chakra_et", "", "Prefix of traces for ASTRA-sim 2.x: <prefix>.<npu>.et, one for each NPU.")
flags.DEFINE_integer("num_passes", 1, "Training steps in those traces.", 1, 1 << 20)
flags.DEFINE_string("summary_csv", "", "A CSV file that gets a row for this run, and a header if it is new.")
flags.DEFINE_bool("dry_run", False, "Print the plan and what is in the cache; simulate nothing, write nothing.")
flags.DEFINE_string("dask_scheduler", "", "Address of a Dask scheduler, to simulate on its cluster.")

PATHS = ("mnk", "output_file", "scalesim_path", "scalesim_config", "cache_dir", "chakra_et", "summary_csv")
for _name in (*PATHS, "run_name"):
    flags.register_validator(_name, lambda text: "\0" not in (text or ""), "a NUL character, expected none in a path")
for _name in ("mnk", "output_file"):
    flags.register_validator(_name, bool, "expected a path")
flags.register_validator(
    "chakra_et", lambda text: not text or Path(text).name not in ("", ".."), "expected how file names begin"
)
flags.register_validator(
    "run_name",
    lambda name: name is None or (Path(name).parts and not {"/", ".."} & set(Path(name).parts)),
    "expected the name of a folder in outputs/<parallel>",
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
        values: dict[str, Any] = {name: flags.FLAGS[name].value for name in cls._fields if name in flags.FLAGS}
        for name in PATHS:
            values[name] = Path(values[name]).absolute() if values[name] else None
        if values["cycle_model"] == "analytical":
            for name in ("scalesim_path", "dask_scheduler", "jobs"):
                if flags.FLAGS[name].present:
                    warn(f"--{name} has no effect with --cycle_model=analytical")
        if flags.FLAGS.cache_dir is None:
            values["cache_dir"] = default_cache_dir()
        run_name = flags.FLAGS.run_name or values["mnk"].stem
        run_folder = Path("outputs", values["parallel"], run_name).absolute()
        return cls(**{**values, "jobs": values["jobs"] or available_cpus(), "run_folder": run_folder})


def default_cache_dir() -> Path | None:
    """Return where the user's caches are, by the XDG rules; None, with a warning, where there is no home folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "gen_astrasim_workload_input"
    except RuntimeError:
        warn("no home folder: finished simulations are not cached, expected --cache_dir")
        return None


# --- The table of layers: GEMMs, or SCALE-Sim's convolutions
GEMM = ("m", "n", "k")
CONVOLUTION = ("ifmap height", "ifmap width", "filter height", "filter width", "channels", "num filter", "strides")
ALIASES = {"layer name": "layer", "channel": "channels", "num filters": "num filter"}
OWN_STRATEGY = "customizedparallelization"
HEADERS = (
    "Layer,m,n,k or Layer,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Num Filter,Strides, "
    "each perhaps with CustomizedParallelization"
)


class Layer(NamedTuple):
    """One line of the table: m (minibatch rows) x n (output dimension) x k (input dimension), and its strategy.

    `inputs` is of how many elements the input gradient is: m x k, or those of a convolution's ifmap.
    """

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
    names = [ALIASES.get(name, name) for name in (" ".join(name.lower().split()) for name in header)]
    while names and not names[-1]:
        names.pop()  # the trailing comma of SCALE-Sim's files
    sizes = CONVOLUTION if "strides" in names else GEMM
    columns = _columns(where, names, sizes, parallel)
    if minibatch > 1 and sizes == GEMM:
        raise UserError(f"{where}: --minibatch={minibatch} and GEMMs, whose m already holds it, expected convolutions")
    layers, renamed = [], []
    for where, row in rows:
        if sizes == CONVOLUTION and not any(row[1:]):
            warn(f"{where}: {quoted(row[0])} is taken for a title, as in SCALE-Sim's own files")
            continue
        if len(row) <= max(columns.values()) or any(cell and cell[0] != "#" for cell in row[len(names) :]):
            raise UserError(f"{where}: {len(row)} columns, expected {len(names)} as in the header")
        cells = {name: row[place] for name, place in columns.items()}
        layers.append(_layer(where, cells, sizes, parallel, minibatch))
        if layers[-1].name != cells["layer"]:
            renamed.append(f"{where}: layer name {quoted(cells['layer'])}")
    if not layers:
        raise UserError(f"{where}: no layers, expected one a line below the header")
    if renamed:
        warn(f"{renamed[0]}: blanks become _, as ASTRA-sim reads words ({len(renamed)} such in all)")
    return layers


def _columns(where: str, names: list[str], sizes: tuple[str, ...], parallel: str) -> dict[str, int]:
    """Return the place of each column that is read: the name, the sizes, and what may stand beside them."""
    if names[1:3] == ["ifmap width", "ifmap width"]:
        names[1] = "ifmap height"  # as 14 of SCALE-Sim's files call it
    read = ["layer", *sizes, OWN_STRATEGY, *(["padding"] if sizes == CONVOLUTION else [])]
    columns = {name: place for place, name in enumerate(names) if name in read}
    others = [name for name in names if name and columns.get(name) != names.index(name)]  # unknown, or there twice
    if {"layer", *sizes} - columns.keys() or (others and sizes == GEMM) or columns.keys() & {*others}:
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


def _layer(where: str, cells: dict[str, str], columns: Sequence[str], parallel: str, minibatch: int) -> Layer:
    name = "_".join(cells["layer"].split())
    if not name or not name.isprintable():
        raise UserError(f"{where}: layer name {quoted(cells['layer'])}, expected printable characters")
    sizes = {column: whole_number(cells[column]) for column in (*columns, "padding") if column in cells}
    for column, size in sizes.items():
        if size < (column != "padding"):
            expected = f"expected a whole number >= {int(column != 'padding')}"
            raise UserError(f"{where}: {column} is {quoted(cells[column])}, {expected}")
    if columns == CONVOLUTION:
        m, n, k, inputs = _convolution(where, name, sizes, minibatch)
    else:
        m, n, k = (sizes[column] for column in GEMM)
        inputs = m * k
    strategy = parallel
    if parallel == CUSTOMIZED:
        written = cells[OWN_STRATEGY]
        strategy = MISSPELT.get(written.upper(), written.upper())
        if strategy not in STRATEGIES:
            raise UserError(f"{where}: strategy {quoted(written)}, expected one of {', '.join(STRATEGIES)}")
    return Layer(where, name, m, n, k, strategy, inputs)


def _convolution(where: str, name: str, sizes: dict[str, int], minibatch: int) -> tuple[int, int, int, int]:
    """Return m, n, k of the im2col product, and the elements of the ifmap, which is less than m x k.

    Without padding outputs are counted as SCALE-Sim counts them, rounded up; with it as PyTorch does, rounded down.
    """
    height, width, filter_height, filter_width, channels, filters, stride = (sizes[column] for column in CONVOLUTION)
    pixels = 1
    for ifmap, window in ((height, filter_height), (width, filter_width)):
        room = ifmap + 2 * sizes.get("padding", 0) - window
        if room < 0 or "DP" in name:
            raise UserError(f"{where}: a filter larger than its ifmap, or depth-wise (DP), expected neither")
        pixels *= room // stride + 1 if "padding" in sizes else -(-(room + stride) // stride)
    k = filter_height * filter_width * channels
    return minibatch * pixels, filters, k, minibatch * height * width * channels


# --- Strategies: what one NPU computes and communicates
class Gemm(NamedTuple):
    """A product of an M x K by a K x N matrix: rows, columns, reduction."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


class PassShard(NamedTuple):
    """One NPU's part of a pass of a layer: its GEMM, and the collective that follows.

    That is: its size in bytes, in which dimensions of the network it runs, and over how many NPUs.
    """

    pass_name: str
    gemm: Gemm
    collective: str
    bytes: int
    dimensions: tuple[int, ...]
    members: int


Plan = list[tuple[Layer, list[PassShard]]]  # each layer with its three passes
Network = tuple[int, int]  # NPUs of a package, packages


def split_degrees(strategy: str, network: Network) -> tuple[int, int]:
    """Return (dp, mp): over how many NPUs a layer's m and n are split."""
    along = STRATEGIES[strategy]
    return math.prod(network[each] for each in along.m), math.prod(network[each] for each in along.n)


def shard_size(size: int, degree: int, rounding: str) -> int:
    """Return one NPU's part of a dimension that is split over `degree` NPUs, rounded up or down, never to 0."""
    return -(-size // degree) if rounding == "up" else max(1, size // degree)


def shard(layer: Layer, network: Network, datatype_size: int, rounding: str) -> list[PassShard]:
    """Partition a layer across the NPUs: one NPU's forward, input-gradient and weight-gradient passes.

    An NPU holds m' x k inputs and k x n' weights, m' and n' its parts of m and n. The outputs are m' x n', gathered
    from the NPUs that split n; the input gradient is m' x k, reduced over those; the weight gradient is k x n', reduced
    over the NPUs that split m. Sizes in bytes come from the whole layer, exact and rounded down: one NPU's share of an
    ALLGATHER, the whole buffer of a REDUCESCATTER and an ALLREDUCE, as ASTRA-sim's ring counts them.
    """
    m, n, k = layer.m, layer.n, layer.k
    along = STRATEGIES[layer.strategy]
    dp, mp = split_degrees(layer.strategy, network)
    rows, columns = shard_size(m, dp, rounding), shard_size(n, mp, rounding)
    passes = [  # the GEMM; the collective, in which dimensions, over how many NPUs; its elements, split over how many
        (Gemm(rows, columns, k), "ALLGATHER", along.n, mp, m * n, dp * mp),
        (Gemm(rows, k, columns), "REDUCESCATTER", along.n, mp, layer.inputs, dp),
        (Gemm(k, columns, rows), "ALLREDUCE", along.m, dp, n * k, mp),
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
    uneven: dict[str, list[str]] = {}
    small, alone = [], 0
    for layer, shards in plan:
        for dimension, size, degree, own in uneven_sizes(layer, shards):
            what = f"{dimension} = {size} does not divide by {degree}, one NPU is timed with {own}"
            uneven.setdefault(what, []).append(layer.name)
        split = any(each.members > 1 for each in shards)
        for each in shards:
            alone += each.collective != NO_COMM and each.members == 1 and split
            if each.collective != NO_COMM and each.bytes < 4:
                what = f"layer {layer.name}: the {each.collective} of the {each.pass_name} pass comes to {each.bytes}"
                if not each.bytes:
                    raise UserError(f"{layer.where}: {what} bytes, where ASTRA-sim stops; expected one an NPU or more")
                small.append(what)
    for what, names in list(uneven.items())[:8]:
        which = ", ".join(names[:8]) + (f" and {len(names) - 8} more layers" if len(names) > 8 else "")
        warn(f"{which}: {what}")
    if len(uneven) > 8:
        warn(f"{len(uneven) - 8} more sizes do not divide")
    if alone:
        warn(f"{alone} collectives have one member: ASTRA-sim 1.0 leaves them out, Chakra's Text converter does not")
    if small:
        warn(f"{small[0]} bytes ({len(small)} such in all): ASTRA-sim may never end at 1 to 3, try 4 or more")


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
    config.read_string(BUILT_IN_CONFIG)
    written = io.StringIO()
    try:
        text = path.read_bytes().decode("utf-8-sig") if path else BUILT_IN_CONFIG
        given.read_string(text, source)
        lacking = [
            key for section in config.sections() for key in config[section] if not given.has_option(section, key)
        ]
        config.read_dict(given)
        config["general"] = {"run_name": "gemm"}  # it becomes part of a path, and with v1 of a shell command
        config.remove_section("network_presets")  # SCALE-Sim 3.0.0 stops at it; the topology is ours
        config.write(written)
    except (UnicodeDecodeError, configparser.Error) as error:
        raise UserError(f"{source}: {error}, expected a SCALE-Sim config: sections of keys and values") from None
    preset = partial(given.get, "architecture_presets", fallback="")
    rows, columns, dataflow = (
        whole_number(preset("ArrayHeight")),
        whole_number(preset("ArrayWidth")),
        preset("Dataflow"),
    )
    if rows < 1 or columns < 1:
        raise UserError(f"{source}: ArrayHeight or ArrayWidth is missing or wrong, expected whole numbers >= 1")
    if dataflow not in ("os", "ws", "is"):
        raise UserError(f"{source}: Dataflow is {quoted(dataflow)}, expected os, ws or is")
    check_modes(source, config, cycle_model)
    return Architecture(text, written.getvalue(), lacking, rows, columns, dataflow)


def check_modes(source: str, config: configparser.ConfigParser, cycle_model: str) -> None:
    """Refuse the modes of SCALE-Sim that do not suit the table or the cycle model; warn where that is a bound."""
    bandwidth = config["run_presets"]["InterfaceBandwidth"]
    if bandwidth not in ("CALC", "USER"):
        raise UserError(f"{source}: InterfaceBandwidth is {quoted(bandwidth)}, expected CALC or USER")
    for key in ("IfmapCustomLayout", "FilterCustomLayout"):
        if config["layout"][key].lower() not in ("false", "no", "off", "0"):
            raise UserError(f"{source}: {key} is on, expected False: a layout is for one GEMM, and there are many")
    sparsity = config["sparsity"]
    optimized = sparsity.get("OptimizedMapping", "").lower() == "true"
    if sparsity["SparsitySupport"].lower() == "true" and (cycle_model == "analytical" or not optimized):
        raise UserError(
            f"{source}: SparsitySupport is true, expected false, or OptimizedMapping: true with it and SCALE-Sim: the "
            "analytical model knows no sparsity, and the table of layers has no ratios"
        )
    if bandwidth == "USER" and cycle_model == "analytical":
        warn(f"{source}: under InterfaceBandwidth USER analytical cycles leave out the stalls: they are a lower bound")


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
    """Return the bytes of memory at the peak of a GEMM's simulation, rounded up by a tenth.

    SCALE-Sim v2 and v3 keep a row of addresses for each operand and cycle, and the operands. Fitted by least squares
    on the peak resident size of 61 runs of 2.0.2, 3.0.0 and c28fd1b without traces, arrays from 4 x 4 to 256 x 256, all
    dataflows: 36 MB + cycles x (1030 + 15.4 R + 38.7 C) + 68.5 for each element, within 10 %. Of 83 runs in all, up to
    200,000 cycles and under USER too, it is 0.84 to 1.10 times what was measured.
    """
    m, n, k = gemm
    cycle = 1130 + 17 * architecture.rows + 43 * architecture.columns
    return 40_000_000 + estimated_cycles(gemm, architecture) * cycle + 75 * (m * k + k * n + m * n)


def estimated_seconds(gemm: Gemm, architecture: Architecture) -> float:
    """Return how long a GEMM's simulation takes by itself; what the cache knows of this machine scales it.

    Fitted like the memory, to 146 runs of 2.0.2 and 3.0.0 on arrays from 4 x 4 to 256 x 256, of up to 145,000 cycles:
    what was measured is 0.8 to 1.5 times this.
    """
    m, n, k = gemm
    cycles, side = estimated_cycles(gemm, architecture), (architecture.rows + architecture.columns) / 2
    return 0.09 + 27e-6 * cycles + 7e-9 * math.pow(cycles * side, 1.3) + 26e-8 * (m * k + k * n + m * n)


# --- SCALE-Sim: one GEMM, one process, one folder

# Of each version of SCALE-Sim, the report with the cycles, and their column: by name, as v3 put another before it.
REPORTS = {1: ("gemm_cycles.csv", "Cycles"), **dict.fromkeys((2, 3), ("COMPUTE_REPORT.csv", "Total Cycles"))}
TOPOLOGY_HEADER = "Layer name,IFMAP height,IFMAP width,Filter height,Filter width,Channels,Num filter,Strides,\n"
LOG = "scalesim.log"


def follow_parent(folder: str) -> None:
    """End this process, and its folder, when its stdin ends: when the parent closes it, or is gone."""
    os.read(0, 1)  # nothing is ever written there
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def run_scalesim(version: str, folder: str) -> None:
    """Run the SCALE-Sim in `folder` on gemm.csv in the current folder: the program of each SCALE-Sim process."""
    threading.Thread(target=follow_parent, args=[str(Path.cwd())], daemon=True).start()
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
{inspect.getsource(follow_parent)}
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
        version, folder, files = 1, path, [*path.glob("*.py")]
    else:
        spec = None if path else importlib.util.find_spec("scalesim")
        installed = spec and spec.submodule_search_locations
        if not path and not installed:
            raise UserError("SCALE-Sim is not installed: pip install -r requirements.txt, or give --scalesim_path")
        package = path or Path((installed or [""])[0])
        package = package if (package / "scale_sim.py").is_file() else package / "scalesim"
        if package.name != "scalesim" or not (package / "scale_sim.py").is_file():
            raise UserError(
                f"{path or package}: no SCALE-Sim, expected scale.py and run_nets.py, or the package scalesim"
            )
        version = 3 if (package / "layout_utils.py").is_file() else 2
        folder, files = package.absolute().parent, [*package.rglob("*.py")]
    code = {str(file.relative_to(folder)): file.read_text(encoding="utf-8", errors="replace") for file in files}
    source = "".join(code.values()) if lacking else ""
    if read := [key for key in lacking if re.search(f"['\"]{key}['\"]", source, re.IGNORECASE)]:
        warn(f"--scalesim_config lacks {', '.join(read)}, which this SCALE-Sim reads: taken from the built-in config")
    digest = hashlib.sha256(json.dumps([code, config], sort_keys=True).encode()).hexdigest()
    return ScaleSim(version, str(folder), digest[:32], path, config)


def topology_row(name: str, gemm: Gemm) -> str:
    """Return a GEMM as the convolution that every SCALE-Sim reads: ifmap M x K, N filters of 1 x K, one channel."""
    return f"{name},{gemm.m},{gemm.k},1,{gemm.k},1,{gemm.n},1,\n"


def simulate(scalesim: ScaleSim, gemm: Gemm, lifeline: int = subprocess.PIPE) -> Simulation:
    """Run one GEMM through SCALE-Sim, in a process and a temporary folder of its own.

    Only values go in and come out, so this may run on another machine, whose SCALE-Sim must be the same code; UserError
    where it is not. The process ends when `lifeline` does, a pipe's reading end: by default, with this process.
    """
    here = find_scalesim(scalesim.path, scalesim.config)
    if here.digest != scalesim.digest:
        raise UserError(f"the SCALE-Sim in {here.folder} is not the code that this run began with")
    # SCALE-Sim multiplies no matrices: a pool of threads in each process would only be in the others' way.
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    inputs = {
        "gemm.cfg": scalesim.config,
        "gemm.csv": TOPOLOGY_HEADER + topology_row("gemm", gemm),
        "layout.csv": f"{'-,' * 21}\ngemm,{'1,' * 20}\n",  # v3 reads one even when layouts are off
    }
    with tempfile.TemporaryDirectory(prefix="gen_astrasim_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_files(folder, inputs)
        began = time.monotonic()
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-B", "-c", SCALESIM_PROCESS, str(here.version), here.folder],
                cwd=folder,
                env={**os.environ, **threads, "PYTHONUTF8": "1"},
                stdin=lifeline,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which then ends the others
            )
            with process:
                process.wait()
        seconds = round(time.monotonic() - began, 3)
        reports = [file for report in folder.rglob(REPORTS[here.version][0]) for file in report.parent.glob("*.csv")]
        collected = [file for file in (*reports, folder / LOG) if file.is_file() and file.name not in inputs]
        files = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in collected}
        return Simulation(process.returncode, seconds, files)


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
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError)


class Cache:
    """Finished simulations of one SCALE-Sim and config: <cache_dir>/<hash of both>/<M>x<N>x<K>.json."""

    def __init__(self, folder: Path | None, version: int) -> None:
        self.folder = folder  # None: nothing is cached
        self.version = version

    def load(self, gemm: Gemm) -> tuple[int, dict[str, str]] | None:
        """Return a simulation's cycles, reports and log, or None where there are none that can be trusted."""
        if not self.folder:
            return None
        try:
            entry = json.loads((self.folder / f"{gemm}.json").read_bytes())
            files, cycles = entry["files"], reported_cycles(entry["files"], self.version)
            trusted = all(
                re.fullmatch(r"\w[\w.-]{0,99}", name) and isinstance(text.encode(), bytes)
                for name, text in files.items()
            )
            return (cycles, files) if cycles and trusted and entry["gemm"] == str(gemm) else None
        except UNREADABLE:
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
        for file in itertools.islice(self.folder.glob("*.json") if self.folder else (), 100):
            with suppress(*UNREADABLE):
                entry = json.loads(file.read_bytes())
                gemm, seconds = Gemm(*map(int, entry["gemm"].split("x"))), float(entry["seconds"])
                if 0 < seconds < 1e9:
                    took, estimated = took + seconds, estimated + estimated_seconds(gemm, architecture)
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
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import CommClosedError
    except ImportError:
        raise UserError("--dask_scheduler needs Dask, expected: pip install 'dask[distributed]'") from None
    logging.disable()  # what goes wrong is said here, in one line
    Client.__del__ = lambda _: None  # of one that could not begin: it would try to end for 40 s, and print a traceback
    try:
        client = Client(address, timeout=20, set_as_default=False)
    except Exception as error:  # whatever Dask makes of an address
        raise UserError(f"--dask_scheduler={address} can't be reached: {error}") from None
    with client:
        if not client.nthreads():
            warn(f"the Dask scheduler at {address} has no workers yet: waiting for them")
        pool = client.get_executor(pure=False)
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


def duration(seconds: float) -> str:
    """Return a length of time in seconds, minutes or hours, as it is said."""
    size, unit = next((each for each in ((3600, "h"), (60, "min")) if seconds >= 2 * each[0]), (1, "s"))
    return f"{seconds / size:,.0f} {unit}"


def estimated_range(jobs: list[Job], pace: float, slots: int) -> str:
    """Return between what times these simulations will take, so many at once; they slow each other."""
    longest = pace * max((job.seconds for job in jobs), default=0)
    shared = pace * sum(job.seconds for job in jobs) / slots
    return f"{duration(0.6 * max(longest, shared))} to {duration(2.2 * (longest + shared))}"


def simulated_cycles(
    jobs: list[Job], scalesim: ScaleSim, cache: Cache, architecture: Architecture, settings: Settings
) -> tuple[dict[Gemm, int], int]:
    """Return the cycles of each GEMM by SCALE-Sim, and for how many it was run.

    Raises UserError when SCALE-Sim fails, naming the GEMM, its layer, what SCALE-Sim said last and its log.
    """
    cycles, new = {}, []
    for job in jobs:
        if found := cache.load(job.gemm):
            cycles[job.gemm], files = found
            write_files(settings.run_folder / f"gemm_{job.gemm}", files)
        else:
            new.append(job)
    if not new:
        return cycles, 0
    pace = cache.pace(architecture)
    if settings.dask_scheduler:
        pool = dask_pool(settings.dask_scheduler, scalesim)
        slots, memory = len(new), math.inf  # workers take one simulation a thread, and know their own memory
    else:
        pool = local_pool(settings.jobs, scalesim)
        slots, memory = settings.jobs, available_memory()
    if too_large := [job for job in new if job.memory > memory]:
        gemm, first_use, _, needed, _ = too_large[0]
        warn(
            f"GEMM {gemm} ({first_use}) needs about {needed / 1e9:,.1f} GB of memory, {memory / 1e9:,.1f} GB is free "
            f"({len(too_large)} such in all): it may be killed; --cycle_model=analytical needs no simulation"
        )
    tqdm.monitor_interval = 0  # the bar is moved here, each second
    total, layout = sum(job.seconds for job in new), "GEMM {desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}"
    try:
        bar = tqdm(total=total, desc=f"1/{len(new)}", bar_format=layout, disable=None, leave=False)
        with pool as submit, bar:
            bar.set_postfix_str(f"estimated {estimated_range(new, pace, slots)}")
            for running, finished in run_side_by_side(submit, new, slots, memory):
                for job, future in finished.items():
                    simulation, folder = future.result(), settings.run_folder / f"gemm_{job.gemm}"
                    cycles[job.gemm] = checked_cycles(simulation, job, scalesim.version, folder)
                    cache.store(job.gemm, simulation)
                    write_files(folder, simulation.files)
                    bar.update(job.seconds)
                left = duration(pace * (total - bar.n) / min(slots, len(running) or 1))
                begun = len(new) - len(jobs) + len(cycles) + len(running)
                bar.set_description_str(f"{begun}/{len(new)}", refresh=False)
                bar.set_postfix_str(f"about {left} left, {running[0].gemm}, {running[0].first_use}" if running else "")
    except KeyboardInterrupt:
        where = f"cached in {cache.folder}" if cache.folder else "lost: there is no cache"
        print_message("interrupted", f"{len(cycles)} of {len(jobs)} GEMMs are finished, {where}")
        raise
    return cycles, len(new)


def checked_cycles(simulation: Simulation, job: Job, version: int, folder: Path) -> int:
    """Return a simulation's cycles, or leave its log in `folder` and raise the UserError that says what went wrong."""
    status, _, files = simulation
    cycles = reported_cycles(files, version)
    if cycles and status == 0:
        return cycles
    report, column = REPORTS[version]
    if status:
        problem = f"killed, {signal.strsignal(-status)}" if status < 0 else f"exit status {status}"
    elif report in files:
        problem = f"its {report} has not one whole row with a whole number >= 1 as {column}"
    else:
        problem = f"it wrote no {report}"
    lines = [line.strip()[:200] for line in files.get(LOG, "").splitlines() if line.strip()][-3:]
    if status == -signal.SIGKILL or "MemoryError" in "".join(lines):
        problem += " (out of memory? fewer --jobs may help, or --cycle_model=analytical)"
    said = "".join(c for c in " | ".join(lines) if c.isprintable()) or "nothing"
    write_files(folder, files)
    raise UserError(
        f"SCALE-Sim failed on GEMM {job.gemm} ({job.first_use}): {problem}; it last said: {said}; log: {folder / LOG}"
    )


# --- Compute times
def pass_totals(plan: Plan, times: dict[Gemm, int]) -> list[int]:
    """Return the sum of each pass's compute times over all layers."""
    return [sum(times[shards[index].gemm] for _, shards in plan) for index in range(len(PASSES))]


def collective_totals(plan: Plan) -> dict[str, tuple[int, int]]:
    """Return of each kind of collective how many there are, and their bytes; those of one member are none."""
    running = [shard for _, shards in plan for shard in shards if shard.members > 1]
    sizes = {name: [shard.bytes for shard in running if shard.collective == name] for name in COMM_TYPES}
    return {name: (len(each), sum(each)) for name, each in sizes.items()}


def compute_times(plan: Plan, cycles: dict[Gemm, int], unit: str, clock_mhz: float | None) -> dict[Gemm, int]:
    """Return each GEMM's compute time in `unit`: exact, to the nearest whole number (halves to even), not 0.

    Warns when rounding moves the total of a pass by more than 1 %.
    """
    if unit == "cycles":
        return cycles
    from fractions import Fraction

    cycle = (1000 if unit == "ns" else 1) / Fraction(str(clock_mhz))  # its length in that unit
    times = {gemm: max(round(count * cycle), min(count, 1)) for gemm, count in cycles.items()}
    totals = zip(PASSES.values(), pass_totals(plan, times), pass_totals(plan, cycles))
    changes = {name: float(written / (exact * cycle) - 1) * 100 for name, written, exact in totals if exact}
    if moved := [f"{name} pass by {change:+.1f} %" for name, change in changes.items() if abs(change) > 1]:
        warn(f"--time_unit={unit}: rounding moves the compute time of the {', of the '.join(moved)}")
    return times


# --- The workload file and the run folder
def workload_text(plan: Plan, times: dict[Gemm, int], parallel: str, update_time: int) -> str:
    """Return the workload file that ASTRA-sim reads, with each GEMM's compute time; sizes are bytes.

    ASTRA-sim 1.0 reads words, not lines: it takes a thirteenth, the layer's own strategy, under HYBRID_CUSTOMIZED and
    would otherwise take it for the next layer's name.
    """
    lines = [parallel, str(len(plan))]
    for layer, shards in plan:
        passes = (f"{times[shard.gemm]}\t{shard.collective}\t{shard.bytes}" for shard in shards)
        own_strategy = [layer.strategy] if parallel == CUSTOMIZED else []
        lines.append("\t".join([layer.name, "-1", *passes, str(update_time), *own_strategy]))
    return "\n".join(lines) + "\n"


def topologies(plan: Plan, stem: str) -> dict[str, str]:
    """Return each pass as a SCALE-Sim topology, by file name; SCALE-Sim's reader knows no quotes."""
    files = {}
    for index, name in enumerate(PASSES):
        rows = (topology_row(re.sub('[",]', "_", layer.name), shards[index].gemm) for layer, shards in plan)
        files[f"{stem}_{name}.csv"] = TOPOLOGY_HEADER + "".join(rows)
    return files


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


def append_summary(path: Path, plan: Plan, times: dict[Gemm, int], distinct_gemms: int, settings: Settings) -> None:
    """Append a row of this run to --summary_csv, whole, also beside others; compute is in --time_unit."""
    compute, collectives = pass_totals(plan, times), collective_totals(plan).values()
    values = [getattr(settings, name, None) for name in SUMMARY[:9]]
    if settings.minibatch == 1 and all(layer.inputs == layer.m * layer.k for layer, _ in plan):
        values[SUMMARY.index("minibatch")] = None  # a table of GEMMs
    values += [*compute, sum(compute), *itertools.chain(*collectives), distinct_gemms, settings.output_file]
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: who finds the file empty writes the header
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = "\n" if file.read(1) not in (b"", b"\n") else ""  # of a row that a full disk cut off, say
        header = [] if size else [SUMMARY]
        file.write((torn + csv_text(*header, values)).encode("utf-8", "surrogateescape"))


def check_summary(path: Path) -> None:
    """Refuse a summary that has another header."""
    if path.is_file():
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            header = file.readline().strip()
        if header not in ("", ",".join(SUMMARY)):
            raise UserError(f"{path}:1: header {quoted(header)}, expected a summary's, or no file")


def check_output(settings: Settings) -> None:
    """Make the folders of what will be written, and refuse now what could not be written after hours."""
    npus = settings.num_npus if settings.chakra_et and chakra_messages() else 0
    traces = [trace_path(settings.chakra_et, npu) for npu in range(npus) if settings.chakra_et]
    paths = [settings.output_file, *traces, *([settings.summary_csv] if settings.summary_csv else [])]
    targets = [Path(os.path.realpath(path)) for path in paths]  # a link stays a link
    folders = {settings.run_folder, *(target.parent for target in targets)}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    target, times = Counter(targets).most_common(1)[0]
    if times > 1:
        raise UserError(f"{target} is to be written twice, expected another file for each output")
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected a file to write")
        for given in (settings.mnk, settings.scalesim_config):
            if given and path.is_file() and path.samefile(given):
                raise UserError(f"{path} is what was given to read, expected another file to write")
    if settings.summary_csv:
        check_summary(settings.summary_csv)
    for needed in (*folders, *paths):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise UserError(f"{needed} can't be written: no permission")


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
    for message, *fields in map(str.split, CHAKRA_MESSAGES.splitlines()):
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in re.findall(r"(\w+)=(\d+):(\w+)(\*?)", " ".join(fields)):
            field = declared.field.add(name=name, number=int(number), label=3 if repeated else 1)
            if kind[0].isupper():
                field.type_name = kind
            else:
                field.type = descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClassesForFiles(["chakra.proto"], pool), serialize_length_prefixed


def chakra_trace(plan: Plan, times: dict[Gemm, int], network: Network, parallel: str, num_passes: int) -> bytes:
    """Return the execution trace of an NPU, all of which are equal: ASTRA-sim 1.0's training loop as a graph.

    A collective runs in its own dimensions of the network, of which those of size 1 are none; with one member it is
    left out, as ASTRA-sim ends silently at one. UserError where a time or a size does not fit into 64 bits.
    """
    (messages, write), trace, ids = chakra_messages(), io.BytesIO(), itertools.count()
    write(messages["GlobalMetadata"](version="0.0.4"), trace)

    def add(name: str, after: list[int], attributes: dict[str, Any], **fields: int) -> list[int]:
        attr = [{"name": key, **value} for key, value in {"is_cpu_op": {"bool_val": False}, **attributes}.items()]
        try:
            node = messages["Node"](id=next(ids), name=name, data_deps=dict.fromkeys(after), attr=attr, **fields)
        except ValueError:
            raise UserError(f"--chakra_et: the time or size of {name} is too large for 64 bits") from None
        write(node, trace)
        return [node.id]

    def compute(layer: Layer, shard: PassShard, after: list[int]) -> list[int]:
        name = f"{layer.name} {shard.pass_name}"
        return add(name, after, {}, type=COMP_NODE, duration_micros=times[shard.gemm])

    def communicate(layer: Layer, shard: PassShard, after: list[int]) -> list[int]:
        if shard.members == 1:
            return after
        involved = [dimension in shard.dimensions for dimension, size in enumerate(network) if size > 1]
        attributes = {
            "comm_type": {"int64_val": COMM_TYPES[shard.collective]},
            "comm_size": {"int64_val": shard.bytes},
            "involved_dim": {"bool_list": {"values": involved}},
        }
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


def trace_path(prefix: Path, npu: int) -> Path:
    """Return where ASTRA-sim looks for an NPU's trace."""
    return prefix.with_name(f"{prefix.name}.{npu}.et")


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
            os.replace(Path(name, str(npu)), trace_path(prefix, npu))


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
    made_before = {"scalesim.cfg": architecture.text, "cycle_model.txt": f"{settings.cycle_model}\n"}
    write_files(settings.run_folder, {**made_before, **topologies(plan, settings.mnk.stem)})
    if scalesim:
        cycles, runs = simulated_cycles(jobs, scalesim, cache, architecture, settings)
        made = f"{runs} simulated, {len(jobs) - runs} from the cache"
    else:
        cycles, made = {job.gemm: job.cycles for job in jobs}, "by SCALE-Sim's analytical runtime"
    write_files(settings.run_folder, {"layers.csv": layers_table(plan, cycles)})
    times = compute_times(plan, cycles, settings.time_unit, settings.clock_mhz)
    with ExitStack() as stack:  # the traces appear when all else is written
        if settings.chakra_et:
            trace = chakra_trace(plan, times, network, settings.parallel, settings.num_passes)
            stack.enter_context(staged_traces(settings.chakra_et, trace, settings.num_npus))
        write_atomic(settings.output_file, workload_text(plan, times, settings.parallel, settings.update_time))
        if settings.summary_csv:
            append_summary(settings.summary_csv, plan, times, len(jobs), settings)
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


def parse_flags(argv: Sequence[str]) -> Settings:
    """Parse the command line; UserError, or an error of absl's, for a mistake in it. --help is answered here."""
    if {"--help", "-help", "-h"} & set(argv):
        own = flags.FLAGS.get_flags_for_module(sys.modules[__name__])  # in the order in which they stand above
        defaults = {flag.name: "" if flag.default in (None, "") else f"={flag.default}" for flag in own}
        print_results([__doc__ or "", *(f"  --{flag.name}{defaults[flag.name]}\n      {flag.help}" for flag in own)])
        sys.exit(0)
    if rest := flags.FLAGS(list(argv))[1:]:
        raise UserError(f"unexpected argument {quoted(rest[0])}, expected only flags, as --name=value")
    return Settings.from_flags()


def run(argv: Sequence[str]) -> int:
    """Run with this command line; return the exit status, after one error line where it is 1."""
    try:
        generate(parse_flags(argv))
        return 0
    except (UserError, flags.Error, UnicodeDecodeError) as error:  # the last: absl's, of a --flagfile
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

    def interrupt(number: int, _: object) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)  # a second signal must not disturb the cleaning up
        raise KeyboardInterrupt(number)

    try:
        for each in handled:
            signal.signal(each, interrupt)
        status = run(sys.argv)
        for each in handled:
            signal.signal(each, signal.SIG_DFL)  # from now on a signal just ends the process
        return status
    except KeyboardInterrupt as stop:
        signal.signal(stop.args[0], signal.SIG_DFL)
        signal.raise_signal(stop.args[0])  # a shell's loop goes on after a mere status of 130
        return 128 + int(stop.args[0])  # process 1 of a container does not die of its own signal


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
