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
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    from absl import flags
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f"error: no {missing.name} in {sys.executable}: pip install -r requirements.txt")


# --- Constants
Dimensions = tuple[int, ...]  # of the network: 0 is within a package, 1 between packages
STRATEGIES: dict[str, tuple[Dimensions, Dimensions]] = {  # that split a layer's m, and its n
    "DATA": ((0, 1), ()),
    "MODEL": ((), (0, 1)),
    "HYBRID_DATA_MODEL": ((1,), (0,)),
    "HYBRID_MODEL_DATA": ((0,), (1,)),
}
CUSTOMIZED = "HYBRID_CUSTOMIZED"
COMM_TYPES = {"ALLGATHER": 2, "REDUCESCATTER": 7, "ALLREDUCE": 0}  # their numbers in Chakra
PASSES = {"fwd_pass": "forward", "inp_grad": "input gradient", "weight_grad": "weight gradient"}


# --- Messages, numbers and files
class UserError(ValueError):
    """What the user can mend."""


def print_message(kind: str, message: str) -> None:
    """Print one line to stderr, if anybody can read it."""
    with suppress(OSError, ValueError):
        tqdm.write(f"{kind}: {' '.join(message.split())}", file=sys.stderr)


warn = partial(print_message, "warning")


def print_results(lines: Iterable[str]) -> None:
    """Print to stdout; who stops reading has seen enough."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def whole_number(text: str) -> int:
    """Return what up to 30 digits say, or -1; int() also takes signs and 1_000."""
    return int(text) if re.fullmatch("[0-9]{1,30}", text) else -1


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all; what is no regular file is written to as it is."""
    target = path.resolve()  # a link stays a link
    part = target.with_name(f".{os.urandom(8).hex()}.part")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(text.encode())
        else:
            part.write_bytes(text.encode())
            os.replace(part, target)
    except OSError as error:
        error.filename = path  # a full disk has none
        raise
    finally:
        with suppress(OSError):
            part.unlink()


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write texts by their names into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomic(folder / name, text)


# --- Flags
EXAMPLE = str(Path(__file__).resolve().parent / "mnk_inputs/example.csv")
CACHE = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gen_astrasim_workload_input"))
PARALLEL = [*STRATEGIES, CUSTOMIZED]
INT_MAX = (1 << 31) - 1
flags.DEFINE_string("mnk", EXAMPLE, "The table of layers, a CSV file.")
flags.DEFINE_enum("parallel", "DATA", PARALLEL, "How to partition layers across NPUs.", case_sensitive=False)
flags.DEFINE_integer("num_npus", 8, "NPUs in the whole system.", 1, INT_MAX)
flags.DEFINE_alias("num_npu", "num_npus")
flags.DEFINE_integer("num_packages", 1, "Packages that hold the NPUs.", 1)
flags.DEFINE_integer("datatype_size", 2, "Bytes per element.", 1, 1 << 20)
flags.DEFINE_integer("minibatch", 1, "Images, for a table of convolutions.", 1, INT_MAX)
flags.DEFINE_string("output_file", "workload.txt", "The workload file.")
flags.DEFINE_string("run_name", "", "Folder in outputs/<parallel>; else the table's name.")
flags.DEFINE_string("scalesim_path", "", "A SCALE-Sim folder; else the installed package.")
flags.DEFINE_string("scalesim_config", "", "A SCALE-Sim config; else a 256 x 256 array.")
flags.DEFINE_enum("cycle_model", "simulated", ["simulated", "analytical"], "Run SCALE-Sim, or take its formula.")
flags.DEFINE_integer("jobs", None, "SCALE-Sim processes at once; else the CPUs.", 1)
flags.DEFINE_string("cache_dir", CACHE, "Folder of finished simulations; empty: none.")
flags.DEFINE_enum("shard_rounding", "up", ["up", "down"], "For uneven sizes; up is the slowest NPU.")
flags.DEFINE_integer("update_time", 100, "Delay after a collective, in ASTRA-sim 1.0.", 0, INT_MAX)
flags.DEFINE_enum("time_unit", "cycles", ["cycles", "ns", "us"], "Of compute times; us for ASTRA-sim 2.x.")
flags.DEFINE_float("clock_mhz", None, "The accelerator's clock, for ns and us.", 1e-6, 1e9)
flags.DEFINE_string("chakra_et", "", "Prefix of traces for ASTRA-sim 2.x, <prefix>.<npu>.et.")
flags.DEFINE_integer("num_passes", 1, "Training steps in those traces.", 1, 1 << 20)
flags.DEFINE_string("summary_csv", "", "A CSV file that this run is appended to.")
flags.DEFINE_bool("dry_run", False, "Print the plan and its cost; write nothing.")
flags.DEFINE_string("dask_scheduler", "", "A Dask scheduler, to simulate there.")

PATHS = ("mnk", "output_file", "scalesim_path", "scalesim_config", "cache_dir", "chakra_et", "summary_csv")
for _name in ("mnk", "output_file"):
    flags.register_validator(_name, bool, "expected a path")
flags.register_validator("chakra_et", re.compile("(.*[^/.][^/]*)?$").match, "expected how file names begin")
flags.register_validator(
    "run_name", lambda name: name[:1] != "/" and not {".", ".."} & {*name.split("/")}, "expected a folder below outputs"
)
flags.register_multi_flags_validator(
    ["num_npus", "num_packages"], lambda of: of["num_npus"] % of["num_packages"] == 0, "packages must divide NPUs"
)
flags.register_multi_flags_validator(
    ["time_unit", "clock_mhz", "chakra_et"],
    lambda of: not (of["clock_mhz"] or of["chakra_et"]) if of["time_unit"] == "cycles" else (of["clock_mhz"] or 0) > 0,
    "expected ns or us with a clock, or cycles without a clock and without traces",
)


class Settings(NamedTuple):
    """The flags, with absolute paths."""

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
CONVOLUTION = ("ifmap height", "ifmap width", "filter height", "filter width", "channels", "num filter", "strides")
ALIASES = {"layer name": "layer", "channel": "channels", "num filters": "num filter"}
OWN_STRATEGY = "customizedparallelization"


class Layer(NamedTuple):
    """A line of the table: m (minibatch rows), n (outputs), k (inputs), strategy, elements of the inputs."""

    name: str
    m: int
    n: int
    k: int
    strategy: str
    inputs: int


def read_layers(path: Path, parallel: str, minibatch: int) -> list[Layer]:
    """Read a table of GEMMs, or of convolutions with `minibatch` images; UserError with file and line."""
    rows = _table_rows(path)
    where, header = next(rows, (f"{path}:1", []))
    while header and not header[-1]:
        header.pop()  # the trailing comma of SCALE-Sim's files
    columns = _columns(where, header, parallel)
    if minibatch > 1 and "m" in columns:
        raise UserError(f"{where}: --minibatch={minibatch} with GEMMs, whose m holds it, expected convolutions")
    layers, renamed = [], []
    for where, row in rows:
        if "strides" in columns and not any(row[1:]):
            warn(f"{where}: {row[0]!a:.60} is taken for a title")
            continue
        if len(row) <= max(columns.values()) or any(cell and cell[0] != "#" for cell in row[len(header) :]):
            raise UserError(f"{where}: {len(row)} columns, expected {len(header)} as in the header")
        layers.append(_layer(where, {name: row[place] for name, place in columns.items()}, parallel, minibatch))
        if layers[-1].name not in row:
            renamed.append(where)
    if not layers:
        raise UserError(f"{where}: no layers, expected one in each line below")
    if renamed:
        warn(f"{renamed[0]}: blanks in a name become _ ({len(renamed)} such in all)")
    return layers


def _columns(where: str, header: list[str], parallel: str) -> dict[str, int]:
    names = [ALIASES.get(name, name) for name in (" ".join(cell.lower().split()) for cell in header)]
    if names[1:3] == ["ifmap width", "ifmap width"]:
        names[1] = "ifmap height"  # as 14 of SCALE-Sim's files call it
    sizes = (*CONVOLUTION, "padding") if "strides" in names else ("m", "n", "k")
    columns = {name: place for place, name in enumerate(names) if name in ("layer", *sizes, OWN_STRATEGY)}
    others = [name for name in names if name and columns.get(name) != names.index(name)]  # unknown or twice
    if {"layer", *sizes[:7]} - columns.keys() or (others and "m" in sizes) or columns.keys() & {*others}:
        expected = f"expected layer,m,n,k or layer,{','.join(CONVOLUTION)}"
        raise UserError(f"{where}: header {','.join(names)!a:.60}, {expected}")
    if changes := {"sparsity", "batch size"} & {*others}:
        raise UserError(f"{where}: column {min(changes)}, expected a table without it")
    if parallel == CUSTOMIZED and OWN_STRATEGY not in columns:
        raise UserError(f"{where}: no column CustomizedParallelization, expected one for {CUSTOMIZED}")
    if others:
        warn(f"{where}: ignored columns: {', '.join(others)}")
    return columns


def _table_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield "file:line" and the cells of each line that is not blank."""
    text = io.StringIO(path.read_text("utf-8-sig", "surrogateescape"))
    reader = csv.reader(text, strict=True, skipinitialspace=True)
    try:
        for row in reader:
            if any(cells := [cell.strip() for cell in row]):
                yield f"{path}:{reader.line_num}", cells
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}, expected a CSV table") from None


def _layer(where: str, cells: dict[str, str], parallel: str, minibatch: int) -> Layer:
    name = "_".join(cells.pop("layer").split())
    own = cells.pop(OWN_STRATEGY, "").upper().replace("HYBRD", "HYBRID")  # as it was once spelt
    if not name or not name.isprintable():
        raise UserError(f"{where}: layer name {name!a:.60}, expected printable characters")
    strategy = own if parallel == CUSTOMIZED else parallel
    if strategy not in STRATEGIES:
        raise UserError(f"{where}: strategy {own!a:.60}, expected one of {', '.join(STRATEGIES)}")
    sizes = {column: whole_number(cell) for column, cell in cells.items()}
    for column, size in sizes.items():
        least = 0 if column == "padding" else 1
        if size < least:
            raise UserError(f"{where}: {column} is {cells[column]!a:.60}, expected a whole number >= {least}")
    if "m" in sizes:
        m, n, k = sizes["m"], sizes["n"], sizes["k"]
        return Layer(name, m, n, k, strategy, m * k)
    height, width, tall, wide, channels, n, stride = (sizes[column] for column in CONVOLUTION)
    m, k, inputs = minibatch, tall * wide * channels, minibatch * height * width * channels
    for ifmap, window in ((height, tall), (width, wide)):
        room = ifmap + 2 * sizes.get("padding", 0) - window
        if room < 0 or "DP" in name:
            raise UserError(f"{where}: depth-wise (DP), or a filter larger than its ifmap, expected neither")
        # Down as in PyTorch; without padding up, as in SCALE-Sim.
        m *= room // stride + 1 if "padding" in sizes else -(-(room + stride) // stride)
    return Layer(name, m, n, k, strategy, inputs)


# --- Strategies: what one NPU computes and communicates
class Gemm(NamedTuple):
    """A product of an M x K by a K x N matrix: rows, columns, reduction."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


class PassShard(NamedTuple):
    """One NPU's part of a pass; the collective that follows, its dimensions, members: mp, mp, dp."""

    pass_name: str
    gemm: Gemm
    collective: str
    bytes: int
    dimensions: Dimensions
    members: int


Plan = list[tuple[Layer, list[PassShard]]]  # each layer with its three passes
Times = dict[Gemm, int]  # in cycles, or in --time_unit


def shard(layer: Layer, network: Sequence[int], datatype_size: int, rounding: str) -> list[PassShard]:
    """Partition a layer across a network of (NPUs of a package, packages): one NPU's three passes.

    Outputs, m' x n', are gathered from the NPUs that split n; the inputs' gradient, m' x k, is reduced over those, the
    weights', k x n', over those that split m. ASTRA-sim counts one NPU's bytes in an ALLGATHER, else the buffer.
    """
    m, n, k = layer.m, layer.n, layer.k
    along_m, along_n = STRATEGIES[layer.strategy]
    dp, mp = (math.prod(network[dimension] for dimension in along) for along in (along_m, along_n))
    rows, columns = (-(-m // dp), -(-n // mp)) if rounding == "up" else (max(1, m // dp), max(1, n // mp))
    passes = [  # GEMM; collective, bytes, dimensions, members
        (Gemm(rows, columns, k), "ALLGATHER", m * n * datatype_size // (dp * mp), along_n, mp),
        (Gemm(rows, k, columns), "REDUCESCATTER", layer.inputs * datatype_size // dp, along_n, mp),
        (Gemm(k, columns, rows), "ALLREDUCE", n * k * datatype_size // mp, along_m, dp),
    ]
    return [
        PassShard(name, gemm, collective if along else "NONE", size if along else 0, along, members)
        for name, (gemm, collective, size, along, members) in zip(PASSES.values(), passes)
    ]


def check_plan(plan: Plan) -> None:
    """Warn of uneven sizes and odd collectives; refuse those of 0 bytes."""
    collectives = [(layer, each) for layer, shards in plan for each in shards if each.collective != "NONE"]
    if small := [(layer, each) for layer, each in collectives if each.bytes < 4]:
        layer, each = next((found for found in small if not found[1].bytes), small[0])
        what = f"layer {layer.name}: the {each.collective} of the {each.pass_name} pass comes to {each.bytes} bytes"
        if not each.bytes:
            raise UserError(f"{what}, where ASTRA-sim stops, expected more")
        warn(f"{what} ({len(small)} such in all), ASTRA-sim may never end, expected 4 or more")
    alone = sum(each.members == 1 for _, each in collectives)
    if 0 < alone < len(collectives):
        warn(f"{alone} collectives have one member: ASTRA-sim 1.0 skips them, Chakra's Text converter does not")
    uneven: dict[str, list[str]] = {}
    for layer, shards in plan:
        for what in uneven_sizes(layer, shards):
            uneven.setdefault(what, []).append(layer.name)
    for what, names in list(uneven.items())[:8]:
        warn(f"{names[0]}{f' and {len(names) - 1} more layers' if names[1:] else ''}: {what}")
    if len(uneven) > 8:
        warn(f"{len(uneven) - 8} more sizes do not divide")


def uneven_sizes(layer: Layer, shards: list[PassShard]) -> list[str]:
    """Return what does not divide: m by dp, n by mp."""
    (rows, columns, _), dp, mp = shards[0].gemm, shards[2].members, shards[0].members
    uneven = [each for each in (("m", layer.m, dp, rows), ("n", layer.n, mp, columns)) if each[1] % each[2]]
    return ["{} = {} does not divide by {}, one NPU is timed with {}".format(*each) for each in uneven]


# --- The accelerator: SCALE-Sim's config

# The accelerator of the published results, with every key that any SCALE-Sim reads.
BUILT_IN_CONFIG = """\
[general]
run_name = gemm
[architecture_presets]
ArrayHeight: 256, ArrayWidth: 256, Dataflow: ws, Bandwidth: 10, MemoryBanks: 1
IfmapSramSzkB: 6144, FilterSramSzkB: 6144, OfmapSramSzkB: 2048, ReadRequestBuffer: 512, WriteRequestBuffer: 512
IfmapSramSz: 8192, FilterSramSz: 8192, OfmapSramSz: 8192, IfmapOffset: 0, FilterOffset: 10000000, OfmapOffset: 20000000
[layout]
IfmapCustomLayout: False, IfmapSRAMBankBandwidth: 10, IfmapSRAMBankNum: 10, IfmapSRAMBankPort: 2
FilterCustomLayout: False, FilterSRAMBankBandwidth: 10, FilterSRAMBankNum: 10, FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
[run_presets]
InterfaceBandwidth: CALC, UseRamulatorTrace: False
""".replace(", ", "\n")


class Architecture(NamedTuple):
    """A SCALE-Sim config, as written and as SCALE-Sim gets it, the keys it lacked, its array."""

    text: str
    scalesim_text: str
    lacking: list[str]
    rows: int
    columns: int
    dataflow: str


def read_architecture(path: Path | None, cycle_model: str = "simulated") -> Architecture:
    """Read the config at `path`, or the built-in one; UserError where it does not serve."""
    source = str(path or "the built-in config")
    given, config = (configparser.ConfigParser(interpolation=None) for _ in range(2))
    try:
        text = path.read_bytes().decode("utf-8-sig") if path else BUILT_IN_CONFIG
        given.read_string(text, source)
    except (UnicodeDecodeError, configparser.Error) as error:
        raise UserError(f"{source}: {error}, expected a SCALE-Sim config") from None
    config.read_string(BUILT_IN_CONFIG)
    lacking = [key for section in config.sections() for key in config[section] if not given.has_option(section, key)]
    config.read_dict(given)
    config["general"] = {"run_name": "gemm"}  # it becomes part of a shell command
    config.remove_section("network_presets")  # SCALE-Sim 3.0.0 stops at it
    written = io.StringIO()
    config.write(written)
    keys = ("ArrayHeight", "ArrayWidth", "Dataflow")
    found = [given.get("architecture_presets", key, fallback="") for key in keys]
    rows, columns, dataflow = whole_number(found[0]), whole_number(found[1]), found[2]
    if min(rows, columns) < 1 or dataflow not in ("os", "ws", "is"):
        raise UserError(f"{source}: {', '.join(keys)} are {found!a:.60}, expected numbers >= 1, and os, ws or is")
    check_modes(source, config, cycle_model)
    return Architecture(text, written.getvalue(), lacking, rows, columns, dataflow)


def check_modes(source: str, config: configparser.ConfigParser, cycle_model: str) -> None:
    """Refuse modes that do not suit the table or the cycle model."""
    bandwidth, layout, sparsity = config["run_presets"]["InterfaceBandwidth"], config["layout"], config["sparsity"]
    if bandwidth not in ("CALC", "USER"):
        raise UserError(f"{source}: InterfaceBandwidth is {bandwidth!a:.60}, expected CALC or USER")
    if {layout["IfmapCustomLayout"].lower(), layout["FilterCustomLayout"].lower()} - {"false", "no", "off", "0"}:
        raise UserError(f"{source}: a custom layout is on, which is for one GEMM, expected none")
    optimized = cycle_model == "simulated" and sparsity.get("OptimizedMapping", "").lower() == "true"
    if sparsity["SparsitySupport"].lower() == "true" and not optimized:  # the table of layers has no ratios
        raise UserError(f"{source}: SparsitySupport is true, expected false, or SCALE-Sim and OptimizedMapping: true")
    if bandwidth == "USER" and cycle_model == "analytical":
        warn(f"{source}: InterfaceBandwidth is USER: without its stalls analytical cycles are a lower bound")


def estimated_cycles(gemm: Gemm, array: Architecture) -> int:
    """Return the stall-free cycles of a GEMM, as SCALE-Sim v2 and v3 count them.

    By Samajdar et al., "A Systematic Methodology for Characterizing Scalability of DNN Accelerators using SCALE-Sim"
    (ISPASS 2020): folds of the array's size are loaded, streamed through it, filled and drained.
    """
    m, n, k = gemm
    rows, columns = array.rows, array.columns
    along_rows, along_columns, streamed = {"os": (m, n, k), "ws": (k, n, m), "is": (k, m, n)}[array.dataflow]
    load = 0 if array.dataflow == "os" else rows  # of what stays in the array
    folds = -(-along_rows // rows) * -(-along_columns // columns)
    return max(1, folds * (load + rows + columns + streamed - 2) - 1)


def estimated_cost(gemm: Gemm, array: Architecture) -> tuple[int, float]:
    """Return the peak bytes of memory and the seconds of a simulation by SCALE-Sim v2 or v3.

    Fitted to runs on arrays from 4 x 4 to 256 x 256, for the operands and their addresses in each cycle: 61 runs took
    0.76 to 1 times these bytes, and 146 took 0.8 to 1.5 times these seconds.
    """
    m, n, k = gemm
    rows, columns, cycles = array.rows, array.columns, estimated_cycles(gemm, array)
    elements = m * k + k * n + m * n
    memory = 40_000_000 + cycles * (1130 + 17 * rows + 43 * columns) + 75 * elements
    return memory, 0.09 + 27e-6 * cycles + 7e-9 * math.pow(cycles * (rows + columns) / 2, 1.3) + 26e-8 * elements


# --- SCALE-Sim: one GEMM, one process, one folder

# By version of SCALE-Sim, the report with the cycles, and their column.
REPORTS = {1: ("gemm_cycles.csv", "Cycles"), **dict.fromkeys((2, 3), ("COMPUTE_REPORT.csv", "Total Cycles"))}
LAYOUT = f"{'-,' * 21}\ngemm,{'1,' * 20}\n"  # v3 reads one even when layouts are off
LOG = "scalesim.log"


def run_scalesim(version: str, folder: str) -> None:
    """Run the SCALE-Sim in `folder` on gemm.csv, in a process for that."""

    def follow_parent(here: Path) -> None:
        os.read(0, 1)  # until the parent closes this stdin, or is gone
        shutil.rmtree(here, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=follow_parent, args=[Path.cwd()], daemon=True).start()
    gc.disable()  # as much memory without, in less time
    sys.path.insert(0, folder)
    if version == "1":
        sys.argv = ["scale.py", "-arch_config=gemm.cfg", "-network=gemm.csv"]
        runpy.run_path(f"{folder}/scale.py", run_name="__main__")
        return
    import scalesim  # noqa: F401 - from `folder`, in which the imports below must not look

    sys.path.remove(folder)
    import numpy

    vars(numpy).setdefault("int", int)  # gone since 1.24, but used by SCALE-Sim up to 2.0.1
    from scalesim.scale_sim import scalesim as simulator

    wanted = {"config": "gemm.cfg", "topology": "gemm.csv", "layout": "layout.csv", "save_disk_space": True}
    known = inspect.signature(simulator).parameters
    simulator(**{name: wanted[name] for name in wanted if name in known}).run_scale(top_path=".")
    sys.stdout.flush()
    os._exit(0)  # its reports are closed; freeing its matrices takes time


SCALESIM_PROCESS = f"""import gc, inspect, os, runpy, shutil, sys, threading
from pathlib import Path
{inspect.getsource(run_scalesim)}
run_scalesim(*sys.argv[1:])"""  # as text, for machines that have no such script


class ScaleSim(NamedTuple):
    """A SCALE-Sim: version, folder, hash of its code and config, --scalesim_path, config."""

    version: int
    folder: str
    digest: str
    path: Path | None
    config: str


class Simulation(NamedTuple):
    """What a SCALE-Sim process left: exit status, seconds, reports and log by name."""

    status: int
    seconds: float
    files: dict[str, str]


def find_scalesim(path: Path | None, config: str, lacking: Sequence[str] = ()) -> ScaleSim:
    """Find the SCALE-Sim at `path`, or the installed one; warn of keys that it reads and the config lacked."""
    if path and (path / "scale.py").is_file() and (path / "run_nets.py").is_file():
        version, folder, files = 1, path, path.glob("*.py")
    else:
        spec = None if path else importlib.util.find_spec("scalesim")
        places = [path, path / "scalesim"] if path else map(Path, (spec and spec.submodule_search_locations) or [])
        package = next((each for each in places if each.name == "scalesim" and (each / "scale_sim.py").is_file()), None)
        if not package:
            raise UserError(f"no SCALE-Sim in {path or sys.prefix}, expected scale.py and run_nets.py, or scalesim/")
        version, folder = 3 if (package / "layout_utils.py").is_file() else 2, package.absolute().parent
        files = package.rglob("*.py")
    code = {str(file.relative_to(folder)): file.read_text("utf-8", "replace") for file in files}
    if read := [key for key in lacking if re.search(f"['\"]{key}['\"]", "".join(code.values()), re.IGNORECASE)]:
        warn(f"--scalesim_config lacks {', '.join(read)}, which this SCALE-Sim reads: taken from the built-in config")
    digest = hashlib.sha256(json.dumps([code, config], sort_keys=True).encode()).hexdigest()
    return ScaleSim(version, str(folder), digest[:32], path, config)


def topology(gemms: Iterable[tuple[str, Gemm]]) -> str:
    """Return GEMMs as convolutions, which every SCALE-Sim reads: ifmap M x K, N filters of 1 x K."""
    named = ((re.sub('[",]', "_", name), *gemm) for name, gemm in gemms)  # SCALE-Sim's reader knows no quotes
    rows = "".join(f"{name},{m},{k},1,{k},1,{n},1,\n" for name, m, n, k in named)
    return f"layer name,{','.join(CONVOLUTION)},\n{rows}"


def simulate(scalesim: ScaleSim, gemm: Gemm, lifeline: int = subprocess.PIPE) -> Simulation:
    """Run a GEMM through SCALE-Sim, here or on a Dask worker, until it or `lifeline`, a pipe, ends."""
    here = find_scalesim(scalesim.path, scalesim.config)
    if here.digest != scalesim.digest:
        raise UserError(f"the SCALE-Sim in {here.folder} is not the one that this run began with")
    command = [sys.executable, "-BXutf8", "-c", SCALESIM_PROCESS, str(here.version), here.folder]
    inputs = {"gemm.cfg": scalesim.config, "gemm.csv": topology([("gemm", gemm)]), "layout.csv": LAYOUT}
    with tempfile.TemporaryDirectory(prefix="gen_astrasim_", ignore_cleanup_errors=True) as name:
        folder, began = Path(name), time.monotonic()
        write_files(folder, inputs)
        with (folder / LOG).open("wb") as log:
            streams: dict[str, Any] = {"stdin": lifeline, "stdout": log, "stderr": subprocess.STDOUT}
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            # In a new session: a terminal's Ctrl-C is for this process, which ends the others.
            with subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **streams) as process:
                status = process.wait()
        seconds = round(time.monotonic() - began, 3)
        reports = [file for report in folder.rglob(REPORTS[here.version][0]) for file in report.parent.glob("*.csv")]
        written = [file for file in (*reports, folder / LOG) if file.is_file() and file.name not in inputs]
        return Simulation(status, seconds, {file.name: file.read_text("utf-8", "replace") for file in written})


def reported_cycles(files: dict[str, str], version: int) -> int | None:
    """Return the cycles in SCALE-Sim's report of one GEMM, if it is whole."""
    report, column = REPORTS[version]
    text = files.get(report, "")
    try:
        lines = ([cell.strip() for cell in line] for line in csv.reader(io.StringIO(text)))
        header, row = (line for line in lines if any(line))
        cycles = whole_number(row[header.index(column)].removesuffix(".0"))
    except (csv.Error, ValueError, IndexError):
        return None
    return cycles if cycles >= 1 and text.endswith("\n") else None


# --- Each distinct GEMM once: cached, and side by side
class Cache:
    """Finished simulations of one SCALE-Sim and config: <cache_dir>/<hash of both>/<M>x<N>x<K>.json."""

    def __init__(self, folder: Path | None, version: int) -> None:
        self.folder = folder  # None: nothing is cached
        self.version = version

    def load(self, gemm: Gemm) -> tuple[int, Simulation] | None:
        """Return a GEMM's cycles and simulation; None where there is none to trust."""
        try:
            entry = json.loads((self.folder / f"{gemm}.json").read_bytes()) if self.folder else {}
            seconds, files = float(entry["seconds"]), entry["files"]
            "".join(files.values()).encode()  # fails where it is no text
            safe = all(re.fullmatch(r"\w[\w.-]{0,99}", name) for name in files) and 0 < seconds < 1e9
            cycles = reported_cycles(files, self.version)
            return (cycles, Simulation(0, seconds, files)) if cycles and safe and entry["gemm"] == str(gemm) else None
        except Exception:  # it is simulated again, and replaced
            return None

    def store(self, gemm: Gemm, simulation: Simulation) -> None:
        """Publish a simulation; where that can't be done, warn and cache no more."""
        entry = {"gemm": str(gemm), "seconds": simulation.seconds, "files": simulation.files}
        try:
            if self.folder:
                write_files(self.folder, {f"{gemm}.json": json.dumps(entry)})
        except OSError as error:
            warn(f"can't cache in {self.folder}: {error.strerror}; going on without")
            self.folder = None

    def pace(self, array: Architecture) -> float:
        """Return cached simulations' seconds, divided by their estimates."""
        took = estimated = 0.0
        for file in itertools.islice(self.folder.glob("*.json") if self.folder else (), 100):
            sizes = file.stem.split("x")
            if len(sizes) == 3 and (found := self.load(gemm := Gemm(*map(whole_number, sizes)))):
                took += found[1].seconds
                estimated += estimated_cost(gemm, array)[1]
        return took / estimated if took else 1.0


class Job(NamedTuple):
    """A distinct GEMM, who uses it first, and its estimated cycles, bytes of memory and seconds."""

    gemm: Gemm
    first_use: str
    cycles: int
    memory: int
    seconds: float


def distinct_jobs(plan: Plan, array: Architecture, version: int) -> list[Job]:
    """Return each distinct GEMM of a plan, the longest first."""
    uses: dict[Gemm, str] = {}
    for layer, shards in plan:
        for shard in shards:
            uses.setdefault(shard.gemm, f"layer {layer.name}, {shard.pass_name} pass")
    jobs = []
    for gemm, first_use in uses.items():
        memory, seconds = estimated_cost(gemm, array)
        memory = 60_000_000 if version == 1 else memory  # v1 keeps its traces on disk
        jobs.append(Job(gemm, first_use, estimated_cycles(gemm, array), memory, seconds))
    return sorted(jobs, key=lambda job: -job.cycles)


CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def control_groups(*files: str) -> Iterator[list[str]]:
    """Yield these files' words, of each control group (version 2 or 1) of this process."""
    with suppress(OSError):  # no Linux
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            innermost = CGROUPS / controllers / group.strip("/")
            for folder in (innermost, *innermost.parents):
                with suppress(OSError):
                    yield [word for name in files for word in (folder / name).read_text().split()]


def available_cpus() -> int:
    """Return how many CPUs this process may keep busy."""
    quotas = (*control_groups("cpu.max"), *control_groups("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    cpus = (os.cpu_count() or 1) if sys.platform == "darwin" else len(os.sched_getaffinity(0))
    return max(1, min([cpus, *(-(-int(quota) // int(period)) for quota, period in quotas if quota.isdigit())]))


def available_memory() -> float:
    """Return how many bytes of memory new processes may fill."""
    available = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        words = Path("/proc/meminfo").read_text().split()
        available.append(int(words[words.index("MemAvailable:") + 1]) * 1024)
    for file, used in (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")):  # without what files cache
        groups = control_groups(file, "memory.stat")
        available += [int(limit) - int(stat[stat.index(used) + 1]) for limit, *stat in groups if limit != "max"]
    return max(0, min(available))


Tasks = dict[Job, Future[Simulation]]
Submit = Callable[[Job], Future[Simulation]]


@contextmanager
def local_pool(processes: int, scalesim: ScaleSim) -> Iterator[Submit]:
    """Give a function that simulates here; at the end, end what runs."""
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
    """Give a function that simulates on a Dask cluster."""
    logging.disable()
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import CommClosedError

        Client.__del__ = lambda _: None  # it tries for 40 s to end what never began
        client = Client(address, timeout=20, set_as_default=False)
    except Exception as error:  # there is no Dask, or whatever it makes of an address
        raise UserError(f"--dask_scheduler={address} can't be reached: {error}") from None
    with client:
        pool = client.get_executor(pure=False)
        if not client.nthreads():
            warn(f"the Dask scheduler at {address} has no workers yet: waiting for them")
        try:
            yield lambda job: pool.submit(simulate, scalesim, job.gemm, priority=min(job.cycles, 1 << 62))
        except (KilledWorker, CommClosedError, CancelledError) as error:
            raise UserError(f"--dask_scheduler={address} lost a simulation: {error!r}") from None
        finally:
            pool.shutdown(wait=False)


def run_side_by_side(submit: Submit, jobs: list[Job], slots: int, memory: float) -> Iterator[tuple[Tasks, Tasks]]:
    """Submit jobs as slots and memory allow; yield, each second, what runs and what has finished."""
    waiting, running, free = list(jobs), Tasks(), memory
    while waiting or running:
        fitting = (each for each in waiting if each.memory <= free)
        job = next(fitting, None if running else waiting[0])  # too large for all memory: alone
        if job and len(running) < slots:
            waiting.remove(job)
            running[job] = submit(job)
            free -= job.memory
            continue
        done = wait(running.values(), timeout=1, return_when=FIRST_COMPLETED).done
        finished = {job: running.pop(job) for job, future in list(running.items()) if future in done}
        free += sum(job.memory for job in finished)
        yield running, finished


def estimated_range(jobs: list[Job], pace: float, slots: int, memory: float) -> str:
    """Return how long simulations take, which slow each other."""
    slots = max(1, int(min(slots, memory // max([1, *(job.memory for job in jobs)]))))
    longest, shared = max([0.0, *(job.seconds for job in jobs)]), sum(job.seconds for job in jobs) / slots
    said = []
    for seconds in (0.6 * pace * max(longest, shared), 2.2 * pace * (longest + shared)):
        size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
        said.append(f"{seconds / size:,.0f} {unit}")
    return " to ".join(said)


def simulated_cycles(jobs: list[Job], scalesim: ScaleSim, cache: Cache, pace: float, settings: Settings) -> Times:
    """Simulate GEMMs, and return their cycles; UserError when SCALE-Sim fails."""
    pool, slots, memory = local_pool(settings.jobs, scalesim), settings.jobs, available_memory()
    if settings.dask_scheduler:  # whose workers know their own memory
        pool, slots, memory = dask_pool(settings.dask_scheduler, scalesim), len(jobs), math.inf
    gemm, first_use, _, needed, _ = max(jobs, key=lambda job: job.memory)
    if needed > memory:
        needs = f"needs about {needed / 1e9:,.1f} GB of memory, {memory / 1e9:,.1f} GB is free"
        warn(f"GEMM {gemm} ({first_use}) {needs}; it may be killed, try --cycle_model=analytical")
    estimate, total = estimated_range(jobs, pace, slots, memory), sum(job.seconds for job in jobs)
    layout = f"GEMM {{desc}} {{percentage:3.0f}}% |{{bar}}| {{elapsed}}<{{remaining}} of {estimate}{{postfix}}"
    bar = tqdm(desc=f"1/{len(jobs)}", total=total, bar_format=layout, smoothing=0, disable=None, leave=False)
    cycles: Times = {}
    try:
        with pool as submit, bar:
            for running, finished in run_side_by_side(submit, jobs, slots, memory):
                for job, future in finished.items():
                    simulation, folder = future.result(), settings.run_folder / f"gemm_{job.gemm}"
                    cycles[job.gemm] = checked_cycles(simulation, job, scalesim.version, folder)
                    cache.store(job.gemm, simulation)
                    write_files(folder, simulation.files)
                    bar.update(job.seconds)
                bar.set_description_str(f"{len(cycles) + len(running)}/{len(jobs)}")
                bar.set_postfix_str(next((f"{job.gemm}, {job.first_use}" for job in running), ""))
    except KeyboardInterrupt:
        kept = cache.folder or "no folder"
        print_message("interrupted", f"{len(cycles)} of {len(jobs)} GEMMs are finished, cached in {kept}")
        raise
    return cycles


def checked_cycles(simulation: Simulation, job: Job, version: int, folder: Path) -> int:
    """Return a simulation's cycles; UserError, with its log in `folder`."""
    status, _, files = simulation
    cycles = reported_cycles(files, version)
    if cycles and not status:
        return cycles
    problem = "no {} with one row and a number >= 1 as {}".format(*REPORTS[version])
    if status:
        problem = f"exit status {status}" if status > 0 else f"killed, {signal.strsignal(-status)}"
    last = " | ".join([line.strip()[:200] for line in files.get(LOG, "").splitlines() if line.strip()][-3:])
    if status == -signal.SIGKILL or "MemoryError" in last:
        problem += " (out of memory? fewer --jobs may help, or --cycle_model=analytical)"
    said = "".join(c for c in last if c.isprintable()) or "nothing"
    write_files(folder, files)
    where = f"GEMM {job.gemm} ({job.first_use})"
    raise UserError(f"SCALE-Sim failed on {where}: {problem}; it last said: {said}; log: {folder / LOG}")


# --- Compute times and totals
def _pass_totals(plan: Plan, times: Times) -> list[int]:
    return [sum(times[shards[index].gemm] for _, shards in plan) for index in range(len(PASSES))]


def collective_totals(plan: Plan) -> dict[str, tuple[int, int]]:
    """Return the number and bytes of each collective, without those of one member."""
    running = [shard for _, shards in plan for shard in shards if shard.members > 1]
    sizes = {name: [shard.bytes for shard in running if shard.collective == name] for name in COMM_TYPES}
    return {name: (len(each), sum(each)) for name, each in sizes.items()}


def compute_times(plan: Plan, cycles: Times, unit: str, clock_mhz: float | None) -> Times:
    """Return times in `unit`, to the nearest whole number >= 1; warn where that moves a total."""
    if unit == "cycles":
        return cycles
    cycle = (1000 if unit == "ns" else 1) / Fraction(str(clock_mhz))  # its length in that unit
    times = {gemm: max(1, round(count * cycle)) for gemm, count in cycles.items()}
    for name, written, exact in zip(PASSES.values(), _pass_totals(plan, times), _pass_totals(plan, cycles)):
        change = float(written / (exact * cycle) - 1)
        if abs(change) > 0.01:
            warn(f"--time_unit={unit}: rounding moves the compute time of the {name} pass by {change:+.1%}")
    return times


# --- The workload file and the run folder
def workload_text(plan: Plan, times: Times, parallel: str, update_time: int) -> str:
    """Return the workload file that ASTRA-sim reads; sizes are bytes."""
    lines = [parallel, str(len(plan))]
    for layer, shards in plan:
        passes = (f"{times[shard.gemm]}\t{shard.collective}\t{shard.bytes}" for shard in shards)
        words = [layer.name, "-1", *passes, str(update_time)]
        # ASTRA-sim 1.0 reads words, and elsewhere takes this one for the next layer.
        lines.append("\t".join([*words, layer.strategy] if parallel == CUSTOMIZED else words))
    return "\n".join(lines) + "\n"


def _csv_text(*rows: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _layers_table(plan: Plan, cycles: Times) -> str:
    rows = []
    for layer, shards in plan:
        whole = (layer.name, layer.strategy, shards[2].members, shards[0].members)
        for pass_name, gemm, collective, size, _, members in shards:
            rows.append((*whole, pass_name, *gemm, cycles[gemm], collective, size, members))
    return "layer,strategy,dp,mp,pass,M,N,K,cycles,collective,bytes,members\n" + _csv_text(*rows)


SUMMARY = (
    "mnk,parallel,num_npus,num_packages,datatype_size,minibatch,cycle_model,time_unit,clock_mhz,compute_forward,"
    "compute_input_gradient,compute_weight_gradient,compute_all,allgather_count,allgather_bytes,reducescatter_count,"
    "reducescatter_bytes,allreduce_count,allreduce_bytes,distinct_gemms,output_file\n"
)


def append_summary(path: Path, plan: Plan, times: Times, settings: Settings) -> None:
    """Append a row of this run, whole, also beside other runs."""
    values = {name: getattr(settings, name) for name in SUMMARY.split(",")[:9]}  # flags
    if settings.minibatch == 1 and all(layer.inputs == layer.m * layer.k for layer, _ in plan):
        values["minibatch"] = None  # as GEMMs are
    compute, collectives = _pass_totals(plan, times), itertools.chain(*collective_totals(plan).values())
    row = _csv_text([*values.values(), *compute, sum(compute), *collectives, len(times), settings.output_file])
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = file.read()
        start = SUMMARY if not before else "" if before.endswith(b"\n") else "\n"  # after a torn row
        file.write((start + row).encode("utf-8", "surrogateescape"))


def check_output(settings: Settings) -> None:
    """Make folders; refuse now what could not be written after hours."""
    prefix, summary = settings.chakra_et, settings.summary_csv
    traces = [Path(f"{prefix}.{npu}.et") for npu in range(settings.num_npus)] if prefix and chakra_messages() else []
    targets = [path.resolve() for path in (settings.output_file, summary, *traces) if path and not path.is_fifo()]
    given = [path.resolve() for path in (settings.mnk, settings.scalesim_config) if path and path.is_file()]
    folders = {settings.run_folder, *(target.parent for target in targets)}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for target in targets:
        if target.is_dir() or target in given:
            raise UserError(f"{target} is a folder or was given to read, expected another file to write")
    for needed in (*folders, *targets):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise UserError(f"{needed}: no permission to write")
    if summary and summary.is_file():
        header = summary.read_text("utf-8", "surrogateescape").partition("\n")[0].strip()
        if header not in ("", SUMMARY.strip()):
            raise UserError(f"{summary}:1: header {header!a:.60}, expected a summary's")


# --- Execution traces for ASTRA-sim 2.x
# What a trace uses of MLCommons Chakra's messages: field=number:type, * where repeated.
CHAKRA_MESSAGES = """\
GlobalMetadata version=1:string
BoolList values=1:bool*
AttributeProto name=1:string int64_val=9:int64 bool_val=27:bool bool_list=28:BoolList
Node id=1:uint64 name=2:string type=3:int32 data_deps=5:uint64* duration_micros=7:uint64 attr=10:AttributeProto*
"""


def chakra_messages() -> tuple[dict[str, Any], Callable[[Any, io.BytesIO], None]]:
    """Return Chakra's messages as classes, and what writes one; UserError without protobuf."""
    try:
        from google.protobuf import descriptor_pb2, message_factory
        from google.protobuf.proto import serialize_length_prefixed
    except ImportError:
        raise UserError("--chakra_et needs protobuf: pip install -r requirements.txt") from None

    # As in Chakra's oneof, proto2 writes a value that is set also where it is 0.
    file = descriptor_pb2.FileDescriptorProto(name="chakra.proto", syntax="proto2")
    for message in CHAKRA_MESSAGES.splitlines():
        declared = file.message_type.add(name=message.split()[0])
        for name, number, kind, repeated in re.findall(r"(\w+)=(\d+):(\w+)(\*?)", message):
            of: dict[str, Any] = {"type": f"TYPE_{kind.upper()}"} if kind.islower() else {"type_name": kind}
            declared.field.add(name=name, number=int(number), label=3 if repeated else 1, **of)
    return message_factory.GetMessages([file]), serialize_length_prefixed


def chakra_trace(plan: Plan, times: Times, network: Sequence[int], parallel: str, num_passes: int) -> bytes:
    """Return any NPU's execution trace, ASTRA-sim 1.0's training loop; ValueError beyond 64 bits."""
    (messages, write), trace, ids = chakra_messages(), io.BytesIO(), itertools.count()
    write(messages["GlobalMetadata"](version="0.0.4"), trace)

    def add(layer: Layer, shard: PassShard, after: list[int], collective: bool = False) -> list[int]:
        if collective and shard.members == 1:
            return after  # ASTRA-sim ends silently at a collective of one member
        node = messages["Node"](id=next(ids), name=f"{layer.name} {shard.pass_name}", data_deps=dict.fromkeys(after))
        node.attr.add(name="is_cpu_op", bool_val=False)
        if collective:
            node.name, node.type = f"{node.name} {shard.collective}", 7  # COMM_COLL_NODE
            node.attr.add(name="comm_type", int64_val=COMM_TYPES[shard.collective])
            node.attr.add(name="comm_size", int64_val=shard.bytes)
            involved = [dimension in shard.dimensions for dimension, size in enumerate(network) if size > 1]
            node.attr.add(name="involved_dim", bool_list={"values": involved})
        else:
            node.type, node.duration_micros = 4, times[shard.gemm]  # COMP_NODE
        write(node, trace)
        return [node.id]

    compute, communicate = add, partial(add, collective=True)
    updated: list[list[int]] = [[] for _ in plan]  # the nodes after which a layer has new weights
    for _ in range(num_passes):
        before: list[int] = []
        for index, (layer, (forward, _, _)) in enumerate(plan):
            before = communicate(layer, forward, compute(layer, forward, before + updated[index]))
        for index, (layer, (_, inputs, weights)) in reversed(list(enumerate(plan))):
            if parallel == "DATA":
                computed = compute(layer, weights, before)
                updated[index] = communicate(layer, weights, computed)
                before = compute(layer, inputs, computed) if index else computed
            else:
                gradient = compute(layer, inputs, before)
                reduced = communicate(layer, inputs, gradient) if index else gradient
                computed = compute(layer, weights, gradient)
                updated[index] = communicate(layer, weights, computed)
                before = reduced + computed
    return trace.getvalue()


@contextmanager
def staged_traces(prefix: Path, trace: bytes, npus: int) -> Iterator[None]:
    """Prepare all traces, on disk once if it can be; put them in place at the end."""
    with tempfile.TemporaryDirectory(prefix=".", dir=prefix.parent) as name:
        staged = [Path(name, str(npu)) for npu in range(npus)]
        staged[0].write_bytes(trace)
        for made, following in itertools.pairwise(staged):
            try:
                os.link(made, following)
            except OSError:  # no links here, or no more
                shutil.copyfile(made, following)
        yield
        for npu, file in enumerate(staged):
            os.replace(file, f"{prefix}.{npu}.et")


# --- What the user sees
def result_table(plan: Plan, times: Times, unit: str, customized: bool) -> list[str]:
    """Return what one NPU does in each layer, and in a training step."""
    rows, footnote = [("layer", "pass", "GEMM of one NPU", unit, "collective", "bytes")], []
    for same in merged_layers(plan):
        layer, shards = same[0]
        name = layer.name if len(same) == 1 else f"{len(same)} × {layer.name} ... {same[-1][0].name}"
        if uneven_sizes(layer, shards):
            name, footnote = f"{name} *", ["* a size that does not divide: NPUs have different shares"]
        for label, shard in zip((name, f"  {layer.strategy}" if customized else "", ""), shards):
            alone = " of 1" * (shard.collective != "NONE" and shard.members == 1)
            numbers = (f"{times[shard.gemm]:,}", shard.collective + alone, f"{shard.bytes:,}")
            rows.append((label, shard.pass_name, str(shard.gemm), *numbers))
    compute, collectives = _pass_totals(plan, times), collective_totals(plan).items()
    named = zip([*PASSES.values(), "all passes"], [*compute, sum(compute)])
    totals = [
        ("totals of a training step", "", ""),
        *((f"compute, {name}", f"{total:,}", unit) for name, total in named),
        *((f"{count:,} × {name}", f"{size:,}", "bytes") for name, (count, size) in collectives if count),
    ]
    return [*_aligned(rows, "<<>><>"), *footnote, *_aligned(totals, "<><")]


def merged_layers(plan: Plan) -> Iterator[Plan]:
    """Yield equal layers together: one place of a block, of up to 32 layers, that repeats."""
    kinds: dict[tuple[Any, ...], int] = {}  # a letter for each kind of layer
    text = "".join(chr(kinds.setdefault(layer[1:], len(kinds))) for layer, _ in plan)
    for block in re.finditer(r"(.{1,32}?)\1+|.", text, re.DOTALL):
        size = len(block[1] or block[0])
        yield from (plan[block.start() + place : block.end() : size] for place in range(size))


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:{side}{size}}" for cell, side, size in zip(row, sides, widths)).rstrip() for row in rows]


# --- The pipeline
def generate(settings: Settings) -> None:
    """Do the whole job, from the table to the files."""
    started = time.monotonic()
    network = (settings.num_npus // settings.num_packages, settings.num_packages)
    layers = read_layers(settings.mnk, settings.parallel, settings.minibatch)
    plan = [(layer, shard(layer, network, settings.datatype_size, settings.shard_rounding)) for layer in layers]
    check_plan(plan)
    array = read_architecture(settings.scalesim_config, settings.cycle_model)
    scalesim, cache = None, Cache(None, 0)
    if settings.cycle_model == "simulated":
        scalesim = find_scalesim(settings.scalesim_path, array.scalesim_text, array.lacking)
        cache = Cache(settings.cache_dir and settings.cache_dir / scalesim.digest, scalesim.version)
    jobs = distinct_jobs(plan, array, cache.version)
    cached = {job.gemm: found for job in jobs if (found := cache.load(job.gemm))}
    new = [job for job in jobs if job.gemm not in cached]
    if settings.dry_run:
        print_results(forecast(plan, jobs, new, cache.pace(array), settings))
        return
    check_output(settings)
    files = {"scalesim.cfg": array.text, "cycle_model.txt": f"{settings.cycle_model}\n"}
    for index, name in enumerate(PASSES):
        rows = ((layer.name, shards[index].gemm) for layer, shards in plan)
        files[f"{settings.mnk.stem}_{name}.csv"] = topology(rows)
    write_files(settings.run_folder, files)
    cycles, how = {job.gemm: job.cycles for job in jobs}, "analytical"
    if scalesim:
        cycles = {}
        for gemm, (count, simulation) in cached.items():
            cycles[gemm] = count
            write_files(settings.run_folder / f"gemm_{gemm}", simulation.files)
        cycles |= simulated_cycles(new, scalesim, cache, cache.pace(array), settings) if new else {}
        how = f"{len(new)} simulated, {len(cached)} from the cache"
    write_atomic(settings.run_folder / "layers.csv", _layers_table(plan, cycles))
    times = compute_times(plan, cycles, settings.time_unit, settings.clock_mhz)
    trace = chakra_trace(plan, times, network, settings.parallel, settings.num_passes) if settings.chakra_et else b""
    with staged_traces(settings.chakra_et, trace, settings.num_npus) if settings.chakra_et else nullcontext():
        write_atomic(settings.output_file, workload_text(plan, times, settings.parallel, settings.update_time))
        if settings.summary_csv:
            append_summary(settings.summary_csv, plan, times, settings)
    lines = result_table(plan, times, settings.time_unit, settings.parallel == CUSTOMIZED)
    done = f"{len(plan)} layers, {len(jobs)} distinct GEMMs ({how}), {time.monotonic() - started:.1f} s"
    print_results([*lines, f"wrote {settings.output_file}: {done}"])


def forecast(plan: Plan, jobs: list[Job], new: list[Job], pace: float, settings: Settings) -> Iterator[str]:
    """Yield what --dry_run shows."""
    times = compute_times(plan, {job.gemm: job.cycles for job in jobs}, settings.time_unit, settings.clock_mhz)
    yield from result_table(plan, times, f"estimated {settings.time_unit}", settings.parallel == CUSTOMIZED)
    yield f"dry run: {len(plan)} layers, {len(jobs)} distinct GEMMs of {3 * len(plan)}, nothing written"
    if settings.cycle_model == "simulated":
        total, most, free = sum(job.cycles for job in new), max([0, *(job.memory for job in new)]), available_memory()
        yield f"{len(jobs) - len(new)} in the cache, {len(new)} to simulate: {total:,} estimated cycles"
        yield f"largest simulation: {most / 1e9:,.1f} GB estimated, {free / 1e9:,.1f} GB free"
        yield f"time with --jobs={settings.jobs}: {estimated_range(new, pace, settings.jobs, free)} estimated"


def run(argv: Sequence[str]) -> int:
    """Run with this command line; return the exit status."""
    try:
        if {"--help", "-h"} & {*argv}:
            own = flags.FLAGS.get_flags_for_module(sys.modules[__name__])  # in order
            print_results([__doc__ or "", *(f"  --{flag.name}={flag.default}\n      {flag.help}" for flag in own)])
        elif rest := flags.FLAGS(list(argv))[1:]:
            raise UserError(f"unexpected argument {rest[0]!a:.60}, expected --name=value")
        else:
            generate(Settings.from_flags())
        return 0
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        message += "; fewer --jobs may help" if error.errno == errno.EMFILE else ""
    except (flags.Error, ValueError, RuntimeError) as error:
        message = str(error)
    print_message("error", message)
    return 1


def main() -> int:
    """Run with the command line; return the exit status, or end by the signal that came."""
    handled = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) != signal.SIG_IGN]

    def handle(handler: Any) -> None:
        for each in handled:
            signal.signal(each, handler)

    def interrupt(number: int, _: object) -> None:
        handle(signal.SIG_IGN)  # not to disturb the cleaning up
        raise KeyboardInterrupt(number)

    try:
        handle(interrupt)
        status = run(sys.argv)
        handle(signal.SIG_DFL)
        return status
    except KeyboardInterrupt as stop:
        handle(signal.SIG_DFL)
        signal.raise_signal(stop.args[0])  # a shell's loop goes on after a mere 130
        return 130  # of process 1, which survives this


if __name__ == "__main__":
    sys.exit(main())
