#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["absl-py", "tqdm", "scalesim==3.0.0", "numpy<2.4"]
# ///
"""Turn a table of layers, each a GEMM of m, n, k, into the workload file that ASTRA-sim runs.

  python gen_astrasim_workload_input.py --num_npus=16 --num_packages=2
  python gen_astrasim_workload_input.py --mnk=my_layers.csv --parallel=MODEL --output_file=model.txt

mnk table -> layers -> per-NPU GEMMs, three a layer -> cycles, from SCALE-Sim -> workload file
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` can say what was kept, Ctrl-C just ends it

import configparser
import csv
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    from absl import app, flags
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f"error: no {missing.name} in {sys.executable}, expected one with: pip install -r requirements.txt")

# --- Constants
PASSES = {"fwd_pass": "forward", "inp_grad": "input gradient", "weight_grad": "weight gradient"}
CUSTOMIZED = "HYBRID_CUSTOMIZED"
NO_COMM = "NONE"


class Strategy(NamedTuple):
    """The collective after each pass, and `degrees(npus, packages)`: over how many NPUs (m, n) are split."""

    collectives: tuple[str, str, str]
    degrees: Callable[[int, int], tuple[int, int]]


HYBRID_COLLECTIVES = ("ALLGATHER", "REDUCESCATTER", "ALLREDUCE")
STRATEGIES = {
    "DATA": Strategy((NO_COMM, NO_COMM, "ALLREDUCE"), lambda npus, _: (npus, 1)),
    "MODEL": Strategy(("ALLGATHER", "REDUCESCATTER", NO_COMM), lambda npus, _: (1, npus)),
    "HYBRID_DATA_MODEL": Strategy(HYBRID_COLLECTIVES, lambda npus, packages: (packages, npus // packages)),
    "HYBRID_MODEL_DATA": Strategy(HYBRID_COLLECTIVES, lambda npus, packages: (npus // packages, packages)),
}
MISSPELT = {"HYBRD_DATA_MODEL": "HYBRID_DATA_MODEL"}  # as the format's original description has it


# --- Messages, numbers and files
class UserError(Exception):
    """Something the user can mend: shown as one line, exit status 1."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM came, in the middle of what `kept` says."""

    kept = "no simulation was running"


def say(kind: str, message: str) -> None:
    """Print one line to stderr, above the progress bar where there is one; when nobody can read it, go on."""
    with suppress(OSError, ValueError):
        tqdm.write(f"{kind}: {' '.join(message.split())}", file=sys.stderr)


def warn(message: str) -> None:
    """Print one warning line."""
    say("warning", message)


def fail(message: str) -> int:
    """Print the one error line; return the exit status."""
    say("error", message)
    return 1


def show(lines: Iterable[str]) -> None:
    """Print results; whoever stops reading them has seen enough."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(text: str) -> str:
    """Quote what was found, short and printable, for a message."""
    return ascii(text if len(text) <= 60 else f"{text[:60]}...")


def whole_number(text: str) -> int:
    """Return the whole number of at most 30 digits that the text is, or -1 (int() also takes signs and 1_000)."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 30 else -1


def stream_number(path: Path) -> int | None:
    """Return the number of the open stream that a path names, as /dev/stdout does."""
    named = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,6})", str(path))
    return int(named[1]) if named else {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all; a pipe, a device, a stream is written to as it is."""
    target = Path(os.path.realpath(path))  # a link stays a link
    part = target.with_name(f".{os.urandom(8).hex()}.part")
    stream = stream_number(path)
    try:
        if stream is not None:  # where it stands: opened by its name, a redirected one would begin anew
            with open(stream, "w", encoding="utf-8", closefd=False) as file:
                file.write(text)
        elif path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
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
        write_whole(folder / name, text)


# --- Flags
EXAMPLE = str(Path(__file__).resolve().parent / "mnk_inputs" / "example.csv")
MODELS, ROUNDINGS, UNITS = ["simulated", "analytical"], ["up", "down"], ["cycles", "ns", "us"]
flags.DEFINE_string("mnk", EXAMPLE, "The table of layers, a CSV file.")
flags.DEFINE_enum("parallel", "DATA", [*STRATEGIES, CUSTOMIZED], "How layers are cut over NPUs.", case_sensitive=False)
flags.DEFINE_integer("num_npus", 8, "NPUs in the whole system.", lower_bound=1)
flags.DEFINE_alias("num_npu", "num_npus")
flags.DEFINE_integer("num_packages", 1, "Packages that the NPUs sit in; must divide num_npus.", lower_bound=1)
flags.DEFINE_integer("datatype_size", 2, "Bytes per element.", lower_bound=1, upper_bound=1 << 20)
flags.DEFINE_string("output_file", "workload.txt", "The ASTRA-sim file; parent folders are made.")
flags.DEFINE_string("run_name", None, "Folder under outputs/<parallel>/ for what was generated; else the mnk's stem.")
flags.DEFINE_string("scalesim_path", "", "A SCALE-Sim folder, v1, v2 or v3; else the installed scalesim package.")
flags.DEFINE_string("scalesim_config", "", "A SCALE-Sim config file; else a 256 x 256 weight-stationary array.")
flags.DEFINE_enum("cycle_model", "simulated", MODELS, "Run SCALE-Sim, or take its analytical runtime (no stalls).")
flags.DEFINE_integer("jobs", None, "SCALE-Sim processes at once; else the CPUs, as memory allows.", lower_bound=1)
flags.DEFINE_string("cache_dir", None, "Folder of finished simulations; else one in the user's cache; empty: none.")
flags.DEFINE_enum("shard_rounding", "up", ROUNDINGS, "How a size that does not divide is cut: up is the slowest NPU.")
flags.DEFINE_integer(
    "update_time", 100, "Cycles that ASTRA-sim adds when a pass's collective has finished.", lower_bound=0
)
flags.DEFINE_enum("time_unit", "cycles", UNITS, "What compute times are written in: cycles, ns, us (ASTRA-sim 2.x).")
flags.DEFINE_float("clock_mhz", None, "The accelerator's clock in MHz, for --time_unit=ns and us.", lower_bound=1e-9)
flags.DEFINE_bool("dry_run", False, "Print the plan and what is in the cache; simulate nothing, write nothing.")
flags.DEFINE_string("dask_scheduler", "", "Address of a Dask scheduler, to simulate on its cluster.")


class Settings(NamedTuple):
    """The flags, by their names, checked, and where relative paths begin; nothing below `main` reads a flag."""

    mnk: Path
    parallel: str
    num_npus: int
    num_packages: int
    datatype_size: int
    output_file: Path
    run_name: str
    scalesim_path: Path | None
    scalesim_config: Path | None
    cycle_model: str
    jobs: int
    cache_dir: Path | None
    shard_rounding: str
    update_time: int
    time_unit: str
    clock_mhz: float | None
    dry_run: bool
    dask_scheduler: str
    current_folder: Path

    @classmethod
    def from_flags(cls) -> Settings:
        """Read the parsed flags; UserError where one has no meaning, or two do not go together."""
        values: dict[str, Any] = {name: flags.FLAGS[name].value for name in cls._fields if name in flags.FLAGS}
        values["current_folder"] = current_folder()
        cpus = os.cpu_count() if sys.platform == "darwin" else len(os.sched_getaffinity(0))
        values["jobs"] = values["jobs"] or cpus
        if values["cache_dir"] is None:
            values["cache_dir"] = default_cache_dir()
        for name in ("mnk", "output_file"):
            if not values[name]:
                raise UserError(f"--{name} is empty, expected a path")
        for name in ("mnk", "output_file", "scalesim_path", "scalesim_config", "cache_dir"):
            values[name] = Path(values[name]).absolute() if values[name] else None
        if values["run_name"] is None:
            values["run_name"] = values["mnk"].stem
        settings = cls(**values)
        if settings.num_npus % settings.num_packages:
            raise UserError(f"--num_packages={settings.num_packages} does not divide --num_npus={settings.num_npus}")
        if settings.time_unit != "cycles" and not 0 < (settings.clock_mhz or 0) < math.inf:
            raise UserError(f"--time_unit={settings.time_unit} needs --clock_mhz, expected a number above 0")
        if settings.time_unit == "cycles" and settings.clock_mhz:
            warn("--clock_mhz has no effect on times in cycles, expected --time_unit=ns or us with it")
        run_name = Path(settings.run_name)
        if run_name.is_absolute() or ".." in run_name.parts or not run_name.parts:
            raise UserError(f"--run_name={run_name}, expected the name of a folder in outputs/{settings.parallel}")
        return settings

    @property
    def run_folder(self) -> Path:
        """The folder that holds what was generated for this run."""
        return self.current_folder / "outputs" / self.parallel / self.run_name


def current_folder() -> Path:
    """Return the folder that relative paths begin at; UserError where it was taken away."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder is gone, expected one that is there") from None


def default_cache_dir() -> Path | None:
    """Return where the user's caches are, by the XDG rules; None, with a warning, where there is no home folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "gen_astrasim_workload_input"
    except RuntimeError:
        warn("no home folder: finished simulations are not remembered, expected --cache_dir")
        return None


# --- The mnk table
class Layer(NamedTuple):
    """One line of the table: m (minibatch rows) x n (output dimension) x k (input dimension), and its strategy."""

    where: str
    name: str
    m: int
    n: int
    k: int
    strategy: str


def read_layers(path: Path, parallel: str) -> list[Layer]:
    """Read the mnk table; `parallel` is every layer's strategy, or HYBRID_CUSTOMIZED for the fifth column's own.

    Raises UserError, naming file and line, for whatever is not a header and then layers of whole numbers >= 1.
    """
    rows = _table_rows(path)
    where, header = next(rows, (f"{path}:1", []))
    expected = ["layer", "m", "n", "k", "customizedparallelization"]
    columns = ["layer" if name.lower() == "layer name" else name.lower() for name in header]
    while columns and not columns[-1]:
        columns.pop()  # the trailing comma of SCALE-Sim's files
    if sorted(columns) not in (sorted(expected), sorted(expected[:4])):
        found = shown(",".join(header))
        raise UserError(f"{where}: header {found}, expected Layer,m,n,k or Layer,m,n,k,CustomizedParallelization")
    if parallel == CUSTOMIZED and len(columns) < len(expected):
        raise UserError(f"{where}: no column CustomizedParallelization, expected one under --parallel={CUSTOMIZED}")
    layers, renamed = [], []
    for where, row in rows:
        if len(row) < len(columns) or any(row[len(columns) :]):
            raise UserError(f"{where}: {len(row)} columns, expected {len(columns)} as in the header")
        cells = dict(zip(columns, row))
        layers.append(_layer(where, cells, parallel))
        if layers[-1].name != cells["layer"]:
            renamed.append(f"{where}: layer name {shown(cells['layer'])}")
    if not layers:
        raise UserError(f"{where}: no layers, expected one a line below the header")
    if renamed:
        warn(f"{renamed[0]}: blanks become _, as ASTRA-sim reads words ({len(renamed)} such in all)")
    return layers


def _table_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield ("file:line", stripped fields) of each line that is not blank."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text, expected a CSV table") from None
    reader = csv.reader(io.StringIO(text, newline=None), strict=True, skipinitialspace=True)
    try:
        for row in reader:
            stripped = [field.strip() for field in row]
            if any(stripped):
                yield f"{path}:{reader.line_num}", stripped
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}, expected a CSV table") from None


def _layer(where: str, row: dict[str, str], parallel: str) -> Layer:
    name = "_".join(row["layer"].split())
    if not name or not name.isprintable():
        raise UserError(f"{where}: layer name {shown(row['layer'])}, expected printable characters")
    sizes = {dimension: whole_number(row[dimension]) for dimension in "mnk"}
    for dimension, size in sizes.items():
        if size < 1:
            raise UserError(f"{where}: {dimension} is {shown(row[dimension])}, expected a whole number >= 1")
    strategy = parallel
    if parallel == CUSTOMIZED:
        written = row["customizedparallelization"]
        strategy = MISSPELT.get(written.upper(), written.upper())
        if strategy not in STRATEGIES:
            raise UserError(f"{where}: strategy {shown(written)}, expected one of {', '.join(STRATEGIES)}")
    return Layer(where, name, **sizes, strategy=strategy)


# --- Strategies: what one NPU computes and communicates
class Gemm(NamedTuple):
    """A product of an M x K by a K x N matrix: rows, columns, reduction."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


class Share(NamedTuple):
    """One NPU's part of a pass of a layer: its GEMM, and the collective that follows with its size in bytes."""

    pass_name: str
    gemm: Gemm
    collective: str
    bytes: int


Plan = list[tuple[Layer, list[Share]]]  # each layer with its three passes


def degrees(layer: Layer, settings: Settings) -> tuple[int, int]:
    """Return (dp, mp): over how many NPUs a layer's m and n are split."""
    return STRATEGIES[layer.strategy].degrees(settings.num_npus, settings.num_packages)


def npu_part(size: int, degree: int, rounding: str) -> int:
    """Return one NPU's part of a dimension that is split over `degree` NPUs, rounded up or down, never to 0."""
    return -(-size // degree) if rounding == "up" else max(1, size // degree)


def shard(layer: Layer, settings: Settings) -> list[Share]:
    """Cut a layer over the NPUs: one NPU's shares of the forward, input-gradient and weight-gradient passes.

    An NPU holds m' x k inputs and k x n' weights, m' and n' its parts of m and n. The outputs are m' x n', the
    input gradient is m' x k reduced over n', the weight gradient k x n' reduced over m'. Sizes in bytes come from the
    whole layer, exact and rounded down: one NPU's share of an ALLGATHER, the whole buffer of a REDUCESCATTER and an
    ALLREDUCE, as ASTRA-sim's ring counts them.
    """
    m, n, k = layer.m, layer.n, layer.k
    dp, mp = degrees(layer, settings)
    rows, columns = npu_part(m, dp, settings.shard_rounding), npu_part(n, mp, settings.shard_rounding)
    collectives = STRATEGIES[layer.strategy].collectives
    passes = [  # the GEMM, the elements of what is communicated, and over how many NPUs those are split
        (Gemm(rows, columns, k), m * n, dp * mp),
        (Gemm(rows, k, columns), m * k, dp),
        (Gemm(k, columns, rows), n * k, mp),
    ]
    return [
        Share(name, gemm, collective, 0 if collective == NO_COMM else elements * settings.datatype_size // split)
        for name, collective, (gemm, elements, split) in zip(PASSES.values(), collectives, passes)
    ]


def check_plan(plan: Plan, settings: Settings) -> None:
    """Warn of sizes that do not divide, and of collectives of 1 to 3 bytes; refuse those of 0 bytes.

    Both ASTRA-sims end silently at a collective of 0 bytes, and never at one smaller than preferred-dataset-splits.
    """
    uneven: dict[str, list[str]] = {}
    small = []
    for layer, shares in plan:
        dp, mp = degrees(layer, settings)
        rows, columns, _ = shares[0].gemm
        for dimension, size, degree, own in (("m", layer.m, dp, rows), ("n", layer.n, mp, columns)):
            if size % degree:
                what = f"{dimension} = {size} does not divide by {degree}, one NPU is timed with {own}"
                uneven.setdefault(what, []).append(layer.name)
        for pass_name, _, collective, size in shares:
            if collective != NO_COMM and size < 4:
                what = f"layer {layer.name}: the {collective} of the {pass_name} pass comes to {size} bytes"
                if not size:
                    raise UserError(f"{layer.where}: {what}, at which ASTRA-sim stops; expected a byte an NPU or more")
                small.append(what)
    for what, names in uneven.items():
        which = ", ".join(names[:8]) + (f" and {len(names) - 8} more layers" if len(names) > 8 else "")
        warn(f"{which}: {what}")
    if small:
        warn(f"{small[0]} ({len(small)} such in all): ASTRA-sim may never end at 1 to 3 bytes, try 4 or more")


# --- The accelerator: SCALE-Sim's config

# The TPU-like accelerator of the published results, with every key that any release of SCALE-Sim reads.
BUILT_IN_CONFIG = """\
[general]
run_name = gemm
[architecture_presets]
ArrayHeight: 256
ArrayWidth: 256
IfmapSramSzkB: 6144
FilterSramSzkB: 6144
OfmapSramSzkB: 2048
IfmapSramSz: 8192
FilterSramSz: 8192
OfmapSramSz: 8192
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Dataflow: ws
Bandwidth: 10
MemoryBanks: 1
ReadRequestBuffer: 512
WriteRequestBuffer: 512
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


class Architecture(NamedTuple):
    """A SCALE-Sim config: as written, as SCALE-Sim is given it (with a run_name of ours), its array and dataflow."""

    text: str
    scalesim_text: str
    rows: int
    columns: int
    dataflow: str


def read_architecture(path: Path | None, cycle_model: str = "simulated") -> Architecture:
    """Read the config at `path`, or the built-in one; UserError for what is none or does not suit the cycle model."""
    source = str(path or "the built-in config")
    config = configparser.ConfigParser(interpolation=None)
    written = io.StringIO()
    try:
        text = path.read_bytes().decode("utf-8-sig") if path else BUILT_IN_CONFIG
        config.read_string(text, source)
        config["general"] = {"run_name": "gemm"}  # it becomes part of a path, and with v1 of a shell command
        config.remove_section("network_presets")  # SCALE-Sim 3.0.0 stops at it; the topology is ours
        config.write(written)
    except (UnicodeDecodeError, configparser.Error) as error:
        raise UserError(f"{source}: {error}, expected a SCALE-Sim config: sections of keys and values") from None
    preset = partial(config.get, "architecture_presets", fallback="")
    # Of a range a,b SCALE-Sim v1 takes a; the others refuse it.
    rows, columns = (whole_number(preset(key).split(",")[0].strip()) for key in ("ArrayHeight", "ArrayWidth"))
    if rows < 1 or columns < 1:
        raise UserError(f"{source}: ArrayHeight or ArrayWidth is missing or wrong, expected whole numbers >= 1")
    dataflow = preset("Dataflow")
    if dataflow not in ("os", "ws", "is"):
        raise UserError(f"{source}: Dataflow is {shown(dataflow)}, expected os, ws or is")
    for key in ("IfmapCustomLayout", "FilterCustomLayout"):
        if config.get("layout", key, fallback="false").lower() not in ("false", "no", "off", "0"):
            raise UserError(f"{source}: {key} is on, expected False: a layout is for one GEMM, and there are many")
    if cycle_model == "analytical":
        check_analytical(source, config)
    return Architecture(text, written.getvalue(), rows, columns, dataflow)


def check_analytical(source: str, config: configparser.ConfigParser) -> None:
    """Refuse what the formula of `foretold_cycles` does not hold for, and warn where it is a bound."""
    for key in ("ArrayHeight", "ArrayWidth"):
        if "," in config["architecture_presets"][key]:
            raise UserError(f"{source}: {key} is a range, expected one whole number >= 1")
    if config.get("sparsity", "SparsitySupport", fallback="").lower() == "true":
        raise UserError(f"{source}: SparsitySupport is true, expected false: the formula knows no sparsity")
    if config.get("run_presets", "InterfaceBandwidth", fallback="") == "USER":
        warn(f"{source}: under InterfaceBandwidth USER analytical cycles leave out the stalls: they are a lower bound")


def foretold_cycles(gemm: Gemm, architecture: Architecture) -> int:
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
    return folds * (load + rows + columns + streamed - 2) - 1


# --- SCALE-Sim: one GEMM, one process, one folder

# Of each version of SCALE-Sim, the report with the cycles, and their column: by name, as v3 put another before it.
REPORTS = {1: ("gemm_cycles.csv", "Cycles"), **dict.fromkeys((2, 3), ("COMPUTE_REPORT.csv", "Total Cycles"))}
TOPOLOGY_HEADER = "Layer name,IFMAP height,IFMAP width,Filter height,Filter width,Channels,Num filter,Strides,\n"
LOG = "scalesim.log"
LOG_LIMIT = 1 << 20  # bytes: of a longer log the end is kept

# What each SCALE-Sim process runs, in a folder of its own. SCALE-Sim 1.0 and 2.0 build shell commands out of names, so
# they are given only names of ours that need no quoting, relative to that folder.
SCALESIM_PROCESS = """\
import gc, inspect, os, runpy, shutil, sys, threading
gc.disable()  # SCALE-Sim makes no cycles of objects: it needs as much memory without, and less time
def follow_parent(here):
    os.read(0, 1)  # nothing is ever written there: it returns when the parent is gone, killed or not
    for _ in range(9):  # SCALE-Sim goes on writing there meanwhile
        shutil.rmtree(here, ignore_errors=True)
    os._exit(1)
threading.Thread(target=follow_parent, args=[os.getcwd()], daemon=True).start()
version, folder = sys.argv[1:]
sys.path.insert(0, folder)
if version == "1":
    sys.argv = ["scale.py", "-arch_config=gemm.cfg", "-network=gemm.csv"]
    runpy.run_path(os.path.join(folder, "scale.py"), run_name="__main__")
else:
    import scalesim  # from that folder and no other, which must not stand before Python's own for the rest
    sys.path.remove(folder)
    import numpy
    vars(numpy).setdefault("int", int)  # 2.0, 2.0.1 and c28fd1b use this name, which numpy 1.24 took away
    from scalesim.scale_sim import scalesim
    wanted = dict(config="gemm.cfg", topology="gemm.csv", layout="layout.csv",
                  save_disk_space=True, verbose=True, input_type_gemm=False)
    known = inspect.signature(scalesim).parameters
    scalesim(**{name: value for name, value in wanted.items() if name in known}).run_scale(top_path=".")
    sys.stdout.flush()
    os._exit(0)  # its reports are closed, and taking its matrices down one by one takes time
"""


class ScaleSim(NamedTuple):
    """A SCALE-Sim on this machine: its version, the folder to import it from, a hash of its code."""

    version: int
    folder: str
    digest: str


RUNNING: set[subprocess.Popen[bytes]] = set()  # the SCALE-Sim processes of this one, which end with it
Simulation = tuple[str, dict[str, str]]  # a problem, empty where there was none; SCALE-Sim's reports and log, by name


def code_digest(folder: Path, files: Iterable[Path]) -> str:
    """Return a hash of source files, their names and what is in them."""
    code = {str(file.relative_to(folder)): file.read_text(encoding="utf-8", errors="replace") for file in files}
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()


def find_scalesim(path: Path | None) -> ScaleSim:
    """Find the SCALE-Sim at `path`, told apart by its files, or the installed one; UserError where there is none."""
    if path and (path / "scale.py").is_file() and (path / "run_nets.py").is_file():
        return ScaleSim(1, str(path), code_digest(path, path.glob("*.py")))
    if path:
        package = path if (path / "scale_sim.py").is_file() else path / "scalesim"
    else:
        spec = importlib.util.find_spec("scalesim")
        if not spec or not spec.submodule_search_locations:
            raise UserError("SCALE-Sim is not installed: pip install -r requirements.txt, or give --scalesim_path")
        package = Path(spec.submodule_search_locations[0])
    if package.name != "scalesim" or not (package / "scale_sim.py").is_file():
        raise UserError(f"{path or package}: no SCALE-Sim, expected scale.py and run_nets.py, or the package scalesim")
    version = 3 if (package / "layout_utils.py").is_file() else 2
    return ScaleSim(version, str(package.absolute().parent), code_digest(package, package.rglob("*.py")))


def topology_row(name: str, gemm: Gemm) -> str:
    """Return a GEMM as the convolution that every SCALE-Sim reads: ifmap M x K, N filters of 1 x K, one channel."""
    return f"{name},{gemm.m},{gemm.k},1,{gemm.k},1,{gemm.n},1,\n"


def simulate(scalesim: ScaleSim, path: Path | None, config: str, gemm: Gemm) -> Simulation:
    """Run one GEMM through the SCALE-Sim at `path`, in a process and a temporary folder of its own.

    Only values go in and come out, so this may run on another machine; there, too, the code must be that of `scalesim`.
    """
    try:
        here = find_scalesim(path)
    except UserError as error:
        return str(error), {}
    if here.digest != scalesim.digest:
        return f"the SCALE-Sim in {here.folder} is not the code that this run began with", {}
    command = [sys.executable, "-B", "-c", SCALESIM_PROCESS, str(here.version), here.folder]
    # SCALE-Sim multiplies no matrices: a pool of threads in each process would only be in the others' way.
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    search = [str(Path(each).absolute()) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    own = {**threads, "PYTHONPATH": os.pathsep.join(search), "PYTHONUTF8": "1"}
    inputs = {
        "gemm.cfg": config,
        "gemm.csv": TOPOLOGY_HEADER + topology_row("gemm", gemm),
        "layout.csv": f"{'-,' * 21}\ngemm,{'1,' * 20}\n",  # v3 reads one even when layouts are off
    }
    with tempfile.TemporaryDirectory(prefix="gen_astrasim_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_files(folder, inputs)
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **own},
                stdin=subprocess.PIPE,  # closes when we end, however we end, and the process ends with us
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for us, who know what to keep
            )
            RUNNING.add(process)
            with process:  # its end closes stdin
                process.wait()
            RUNNING.discard(process)
        return _collected(folder, here.version, process.returncode, inputs)


def _collected(folder: Path, version: int, status: int, inputs: Iterable[str]) -> Simulation:
    """Read the reports and the log that a SCALE-Sim process left in its folder."""
    report, _ = REPORTS[version]
    found = sorted(folder.rglob(report))
    written = found[0].parent.glob("*.csv") if found else ()
    reports = [file for file in written if file.is_file() and file.name not in inputs]
    files = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in reports}
    with (folder / LOG).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_LIMIT))
        files[LOG] = log.read().decode("utf-8", errors="replace")
    if status:
        return f"killed, {signal.strsignal(-status)}" if status < 0 else f"exit status {status}", files
    return "" if found else f"it wrote no {report}", files


def reported_cycles(files: dict[str, str], version: int) -> int:
    """Return the cycles of the one GEMM in SCALE-Sim's report; ValueError says why there are none to trust."""
    report, column = REPORTS[version]
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(files.get(report, "")))]
    except csv.Error as error:
        raise ValueError(f"its {report} is no CSV: {error}") from None
    header, *rows = [row for row in rows if any(row)] or [[]]
    if column not in header:
        raise ValueError(f"its {report} has no column {column}")
    whole = max(position for position, name in enumerate(header, 1) if name)  # both end lines with a comma, or not
    if len(rows) != 1 or len(rows[0]) < whole:
        raise ValueError(f"its {report} has not one whole row of {whole} values")
    text = rows[0][header.index(column)]
    cycles = whole_number(text.removesuffix(".0"))
    if cycles < 1:
        raise ValueError(f"its {report} says {column}: {shown(text)}, expected a whole number >= 1")
    return cycles


def checked_cycles(problem: str, files: dict[str, str], version: int, what: str, folder: Path) -> int:
    """Return a simulation's cycles, or leave its log in `folder` and raise the UserError that says what is wrong."""
    try:
        if not problem:
            return reported_cycles(files, version)
    except ValueError as error:
        problem = str(error)
    lines = [line.strip()[:200] for line in files.get(LOG, "").splitlines() if line.strip()][-3:]
    if f"killed, {signal.strsignal(signal.SIGKILL)}" in problem or "MemoryError" in "".join(lines):
        problem += " (out of memory? fewer --jobs may help, or --cycle_model=analytical)"
    said = "".join(c for c in " | ".join(lines) if c.isprintable()) or "nothing"
    write_files(folder, files)
    raise UserError(f"SCALE-Sim failed on GEMM {what}: {problem}; it last said: {said}; log: {folder / LOG}")


# --- Each distinct GEMM once: remembered, and side by side
class Simulator:
    """A SCALE-Sim and its config, with their finished simulations: <cache_dir>/<hash of both>/<M>x<N>x<K>.json."""

    def __init__(self, settings: Settings, architecture: Architecture) -> None:
        self.scalesim = find_scalesim(settings.scalesim_path)
        self.config = architecture.scalesim_text
        digest = hashlib.sha256((self.scalesim.digest + self.config).encode()).hexdigest()
        self.folder = settings.cache_dir / digest[:32] if settings.cache_dir else None

    def load(self, gemm: Gemm) -> tuple[int, dict[str, str]] | None:
        """Return a simulation's cycles, reports and log, or None where there are none that can be trusted."""
        if not self.folder:
            return None
        try:
            files = json.loads((self.folder / f"{gemm}.json").read_bytes())
            if all(re.fullmatch(r"\w[\w.-]{0,99}", name) and (name + text).encode() for name, text in files.items()):
                return reported_cycles(files, self.scalesim.version), files
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            pass  # simulated again, and replaced
        return None

    def store(self, gemm: Gemm, files: dict[str, str]) -> None:
        """Publish a finished simulation; where that can't be done, warn and remember no more."""
        try:
            if self.folder:
                write_files(self.folder, {f"{gemm}.json": json.dumps(files)})
        except OSError as error:
            warn(f"can't remember finished simulations in {self.folder}: {error.strerror}; going on without")
            self.folder = None


class Work(NamedTuple):
    """What a GEMM takes: the layer and pass that first ask for it, its foretold cycles and bytes of memory."""

    owner: str
    cycles: int
    memory: int


def distinct_gemms(plan: Plan, architecture: Architecture, simulator: Simulator | None) -> dict[Gemm, Work]:
    """Return each distinct GEMM of a plan, the longest first, so that none is left alone at the end."""
    work: dict[Gemm, Work] = {}
    on_disk = simulator and simulator.scalesim.version == 1  # where v1 keeps its traces
    for layer, shares in plan:
        for pass_name, gemm, _, _ in shares:
            if gemm not in work:
                memory = 60_000_000 if on_disk else foretold_memory(gemm, architecture)
                owner = f"layer {layer.name}, {pass_name} pass"
                work[gemm] = Work(owner, foretold_cycles(gemm, architecture), memory)
    return dict(sorted(work.items(), key=lambda item: item[1].cycles, reverse=True))


def foretold_memory(gemm: Gemm, architecture: Architecture) -> int:
    """Return the bytes of memory at the peak of a GEMM's simulation, rounded up by a tenth.

    SCALE-Sim v2 and v3 keep a row of addresses for each operand and cycle, and the operands. Fitted by least squares
    on the peak resident size of 61 runs of 2.0.2, 3.0.0 and c28fd1b without traces, arrays from 4 x 4 to 256 x 256, all
    dataflows: 36 MB + cycles x (1030 + 15.4 R + 38.7 C) + 68.5 for each element, within 10 %. Of 83 runs in all, up to
    200,000 cycles and under USER too, it is 0.84 to 1.10 times what was measured.
    """
    m, n, k = gemm
    cycle = 1130 + 17 * architecture.rows + 43 * architecture.columns
    return 40_000_000 + foretold_cycles(gemm, architecture) * cycle + 75 * (m * k + k * n + m * n)


def available_memory() -> int:
    """Return the bytes of memory that new processes may fill, by the machine and by this process's control groups."""
    available = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available.append(int(meminfo["MemAvailable"].split()[0]) * 1024)
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        innermost = Path("/sys/fs/cgroup") / own.strip("/")
        for group in (innermost, *innermost.parents):
            limit = (group / "memory.max").read_text().strip()
            anonymous = (group / "memory.stat").read_text().split()[1]  # what can't be dropped, as cached files can
            if limit != "max":
                available.append(int(limit) - int(anonymous))
    except (OSError, ValueError, KeyError, StopIteration):
        pass  # no Linux, or the top of the control groups
    return max(0, min(available))


@contextmanager
def local_pool(jobs: int) -> Iterator[Executor]:
    """Give an executor for simulations on this machine, whose end is the end of those that still run."""
    from concurrent.futures import ThreadPoolExecutor  # only now: it takes 5 ms

    pool = ThreadPoolExecutor(jobs, thread_name_prefix="simulation")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while any(thread.name.startswith("simulation") for thread in threading.enumerate()):
            for process in list(RUNNING):
                process.kill()
            time.sleep(0.01)


@contextmanager
def dask_pool(address: str) -> Iterator[Executor]:
    """Give an executor for simulations on the Dask cluster at `address`; UserError when it is not there."""
    try:
        import dask
        from distributed import Client, Security
        from distributed.comm import get_address_host_port
    except ImportError:
        raise UserError("--dask_scheduler needs Dask, expected: pip install 'dask[distributed]'") from None
    logging.disable()  # what goes wrong is said here, in one line
    dask.config.set({"distributed.comm.timeouts.tcp": "20s"})  # when a network is gone
    try:
        host_and_port = get_address_host_port(address, strict=True)  # ValueError now, where the client would go on
        if address.startswith("tls:") and not Security().get_connection_args("client")["ssl_context"]:
            raise ValueError("Dask's configuration names no certificates")
        if address.startswith("tcp:") or "://" not in address:
            # The client waits for ever for the first message of what may be a dashboard: its length, in 8 bytes.
            with socket.create_connection(host_and_port, timeout=20) as peek:
                if not 0 < int.from_bytes(peek.recv(8), "little") < 1 << 20:
                    raise ValueError("what listens there is no Dask scheduler")
        client = Client(address, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--dask_scheduler={address} can't be reached: {error}") from None
    with client:
        if not client.nthreads():
            warn(f"the Dask scheduler at {address} has no workers yet: waiting for them")
        pool = client.get_executor(pure=False)
        try:
            yield pool
        finally:
            pool.shutdown(wait=False)


def run_side_by_side(
    pool: Executor, task: Callable[[Gemm], Simulation], work: dict[Gemm, Work], settings: Settings, bar: tqdm[Any]
) -> Iterator[tuple[Gemm, Simulation]]:
    """Yield each GEMM with its simulation as it finishes; they begin in the order of `work`, as jobs, memory allow."""
    # A cluster's workers take one simulation a thread, on machines whose memory only they know.
    jobs, room = (len(work), math.inf) if settings.dask_scheduler else (settings.jobs, available_memory())
    waiting = list(work)
    running: dict[Future[Simulation], Gemm] = {}
    while waiting or running:
        free = room - sum(work[gemm].memory for gemm in running.values())
        fitting = (gemm for gemm in waiting if work[gemm].memory <= free)
        following = next(fitting, None if running else waiting[0])  # what never fits is tried last, alone
        if following and len(running) < jobs:
            owner, cycles, memory = work[following]
            if memory > free:
                warn(
                    f"GEMM {following} ({owner}) needs about {memory / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB "
                    "is free: it may be killed; --cycle_model=analytical gives its stall-free cycles at once"
                )
            waiting.remove(following)
            # Dask keeps no order among what is submitted at once, but the one that it is told, in 64 bits.
            order = {"priority": min(cycles, 1 << 62)} if settings.dask_scheduler else {}
            try:
                running[pool.submit(task, following, **order)] = following
            except RuntimeError as error:  # the limit of this user's processes
                raise UserError(f"can't begin GEMM {following}: {error}; fewer --jobs may help") from None
            continue
        longest = next(iter(running.values()))
        bar.set_postfix_str(f"{longest}, {work[longest].owner}")
        for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
            gemm = running.pop(future)
            try:
                simulation = future.result()
            except Exception as error:
                if not settings.dask_scheduler:
                    raise
                # What Dask raises when the scheduler is gone, or one GEMM after another took its worker down.
                raise UserError(f"--dask_scheduler={settings.dask_scheduler} lost GEMM {gemm}: {error!r}") from None
            bar.update(work[gemm].cycles)
            yield gemm, simulation


def simulated_cycles(work: dict[Gemm, Work], settings: Settings, simulator: Simulator) -> tuple[dict[Gemm, int], int]:
    """Return the cycles of each GEMM by SCALE-Sim, and for how many it was run.

    Raises UserError when SCALE-Sim fails, naming the GEMM, its layer, what SCALE-Sim said last and its log.
    """
    scalesim = simulator.scalesim
    cycles = {}
    for gemm in work:
        if found := simulator.load(gemm):
            cycles[gemm], files = found
            write_files(settings.run_folder / f"gemm_{gemm}", files)
    new = {gemm: each for gemm, each in work.items() if gemm not in cycles}
    if not new:
        return cycles, 0
    task = partial(simulate, scalesim, settings.scalesim_path, simulator.config)
    pool = dask_pool(settings.dask_scheduler) if settings.dask_scheduler else local_pool(settings.jobs)
    total = sum(each.cycles for each in new.values())
    tqdm.monitor_interval = 0  # it is kept moving here
    try:
        with pool as executor, tqdm(total=total, unit="cycle", unit_scale=True, disable=None, leave=False) as bar:
            for gemm, (problem, files) in run_side_by_side(executor, task, new, settings, bar):
                folder, what = settings.run_folder / f"gemm_{gemm}", f"{gemm} ({new[gemm].owner})"
                cycles[gemm] = checked_cycles(problem, files, scalesim.version, what, folder)
                simulator.store(gemm, files)
                write_files(folder, files)
    except Interrupted as stop:
        where = f"kept in {simulator.folder}" if simulator.folder else "kept nowhere: there is no cache"
        stop.kept = f"{len(cycles)} of {len(work)} GEMMs are finished, {where}"
        raise
    return cycles, len(new)


# --- Compute times
def pass_totals(plan: Plan, times: dict[Gemm, int]) -> list[int]:
    """Return the sum of each pass's compute times over all layers."""
    return [sum(times[shares[index].gemm] for _, shares in plan) for index in range(len(PASSES))]


def compute_times(plan: Plan, cycles: dict[Gemm, int], settings: Settings) -> dict[Gemm, int]:
    """Return each GEMM's compute time in --time_unit: exact, to the nearest whole number (halves to even), not 0.

    Warns when rounding moves the total of a pass by more than 1 %.
    """
    if settings.time_unit == "cycles":
        return cycles
    from fractions import Fraction

    unit = (1000 if settings.time_unit == "ns" else 1) / Fraction(str(settings.clock_mhz))  # a cycle's length
    times = {gemm: max(round(count * unit), min(count, 1)) for gemm, count in cycles.items()}
    moved = []
    for name, written, exact in zip(PASSES.values(), pass_totals(plan, times), pass_totals(plan, cycles)):
        change = (written - exact * unit) / (exact * unit or 1)
        if abs(change) * 100 > 1:
            moved.append(f"{name} pass by {float(change) * 100:+.1f} %")
    if moved:
        warn(f"--time_unit={settings.time_unit}: rounding moves the compute time of the {', of the '.join(moved)}")
    return times


# --- The workload file and the run folder
def workload_text(settings: Settings, plan: Plan, times: dict[Gemm, int]) -> str:
    """Return the workload file that ASTRA-sim reads, with each GEMM's compute time; sizes are bytes.

    ASTRA-sim 1.0 reads words, not lines: it takes a thirteenth, the layer's own strategy, under HYBRID_CUSTOMIZED and
    would otherwise take it for the next layer's name.
    """
    lines = [settings.parallel, str(len(plan))]
    for layer, shares in plan:
        passes = (f"{times[share.gemm]}\t{share.collective}\t{share.bytes}" for share in shares)
        own_strategy = [layer.strategy] if settings.parallel == CUSTOMIZED else []
        lines.append("\t".join([layer.name, "-1", *passes, str(settings.update_time), *own_strategy]))
    return "\n".join(lines) + "\n"


def run_files(settings: Settings, architecture: Architecture, plan: Plan, cycles: dict[Gemm, int]) -> dict[str, str]:
    """Return what the run folder holds: each pass as a SCALE-Sim topology and as a table of cycles, and the config."""
    files = {"scalesim.cfg": architecture.text, "cycle_model.txt": f"{settings.cycle_model}\n"}
    for index, name in enumerate(PASSES):
        gemms = [(layer.name.replace(",", "_"), shares[index].gemm) for layer, shares in plan]
        files[f"{settings.mnk.stem}_{name}.csv"] = TOPOLOGY_HEADER + "".join(topology_row(*named) for named in gemms)
        table = [f"{layer},{gemm.m},{gemm.n},{gemm.k},{cycles[gemm]}\n" for layer, gemm in gemms]
        files[f"{settings.mnk.stem}_{name}_cycles.csv"] = "layer,M,N,K,cycles\n" + "".join(table)
    return files


def check_output(settings: Settings) -> None:
    """Make the folders of the output file and the run, and refuse now what could not be written after hours."""
    path, stream = settings.output_file, stream_number(settings.output_file)
    folders = [settings.run_folder]
    if stream is None and (path.is_file() or not path.exists()):
        folders.append(Path(os.path.realpath(path)).parent)  # a link stays a link
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"--output_file={path} is a folder, expected a file")
    for given in (settings.mnk, settings.scalesim_config):
        if given and path.is_file() and path.samefile(given):
            raise UserError(f"--output_file={path} is what was given to read, expected another file")
    for needed in folders if stream is not None else (*folders, path):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise UserError(f"{needed} can't be written: no permission")
    if stream is not None:
        try:
            os.write(stream, b"")
        except OSError as error:
            raise UserError(f"--output_file={path}: {error.strerror}, expected a stream open to write") from None


# --- What the user sees
def result_table(settings: Settings, plan: Plan, times: dict[Gemm, int], unit: str) -> list[str]:
    """Return what one NPU does in each layer's passes, equal layers in a row, and what a training step costs it."""
    rows = [("layer (* uneven)", "pass", "GEMM of one NPU", unit, "collective", "bytes")]
    equal: dict[tuple[Any, ...], Plan] = {}
    for layer, shares in plan:
        equal.setdefault(layer[2:], []).append((layer, shares))
    for (layer, shares), *others in equal.values():
        name = f"{len(others) + 1} × {layer.name} ... {others[-1][0].name}" if others else layer.name
        dp, mp = degrees(layer, settings)
        mark = " *" if layer.m % dp or layer.n % mp else ""
        labels = (name + mark, f"  {layer.strategy}" if settings.parallel == CUSTOMIZED else "", "")
        for label, (pass_name, gemm, collective, size) in zip(labels, shares):
            rows.append((label, pass_name, str(gemm), f"{times[gemm]:,}", collective, f"{size:,}"))
    compute = pass_totals(plan, times)
    totals = [("totals of a training step", "", "")]
    for name, total in zip([*PASSES.values(), "all passes"], [*compute, sum(compute)]):
        totals.append((f"compute, {name}", f"{total:,}", unit))
    communicating = [share for _, shares in plan for share in shares if share.collective != NO_COMM]
    for collective in dict.fromkeys(share.collective for share in communicating):
        sizes = [share.bytes for share in communicating if share.collective == collective]
        totals.append((f"{len(sizes):,} × {collective}", f"{sum(sizes):,}", "bytes"))
    return [*aligned(rows, "<<>><>"), *aligned(totals, "<><")]


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Align columns to the left or right (< or >); the first is cut short where a line would pass 120 characters."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(sides))]
    widths[0] = max(16, min(widths[0], 120 - sum(widths[1:]) - 2 * len(widths[1:])))
    cut = ([f"{row[0][: widths[0] - 3]}..." if len(row[0]) > widths[0] else row[0], *row[1:]] for row in rows)
    return ["  ".join(f"{cell:{side}{size}}" for cell, side, size in zip(row, sides, widths)).rstrip() for row in cut]


# --- The pipeline
def generate(settings: Settings) -> None:
    """Do the whole job: read the table, cut the layers, time the GEMMs, write the workload file, show the result."""
    started = time.monotonic()
    plan = [(layer, shard(layer, settings)) for layer in read_layers(settings.mnk, settings.parallel)]
    check_plan(plan, settings)
    architecture = read_architecture(settings.scalesim_config, settings.cycle_model)
    simulator = Simulator(settings, architecture) if settings.cycle_model == "simulated" else None
    work = distinct_gemms(plan, architecture, simulator)
    if settings.dry_run:
        show(dry_run_report(settings, plan, work, simulator))
        return
    check_output(settings)
    if simulator:
        cycles, runs = simulated_cycles(work, settings, simulator)
        made = f"{runs} simulated, {len(work) - runs} from the cache"
    else:
        cycles = {gemm: each.cycles for gemm, each in work.items()}
        made = "by SCALE-Sim's analytical runtime"
    write_files(settings.run_folder, run_files(settings, architecture, plan, cycles))
    times = compute_times(plan, cycles, settings)
    write_whole(settings.output_file, workload_text(settings, plan, times))
    seconds = time.monotonic() - started
    last = f"wrote {settings.output_file}: {len(plan)} layers, {len(work)} distinct GEMMs ({made}), {seconds:.1f} s"
    show([*result_table(settings, plan, times, settings.time_unit), last])


def dry_run_report(settings: Settings, plan: Plan, work: dict[Gemm, Work], simulator: Simulator | None) -> list[str]:
    """Return what --dry_run shows: the plan with foretold cycles, and what a run would cost."""
    cycles = {gemm: each.cycles for gemm, each in work.items()}
    lines = result_table(settings, plan, compute_times(plan, cycles, settings), f"foretold {settings.time_unit}")
    lines.append(f"dry run: {len(plan)} layers, {len(work)} distinct GEMMs of {3 * len(plan)}, nothing written")
    if simulator:
        new = [each for gemm, each in work.items() if not simulator.load(gemm)]
        total, most = sum(each.cycles for each in new), max((each.memory for each in new), default=0)
        lines.append(f"{len(work) - len(new)} in the cache, {len(new)} to simulate: {total:,} foretold cycles")
        lines.append(f"largest simulation: {most / 1e9:,.1f} GB foretold, {available_memory() / 1e9:,.1f} GB free")
    return lines


def main(_: Sequence[str]) -> int:
    """Run with the parsed flags; return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        generate(Settings.from_flags())
    except UserError as error:
        return fail(str(error))
    except FileExistsError as error:
        return fail(f"{error.filename} is a file, expected a folder")
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Interrupted as stop:
        say("interrupted", stop.kept)
        signal.signal(stop.args[0], signal.SIG_DFL)
        signal.raise_signal(stop.args[0])  # a shell's loop goes on after a mere status of 130
        return 128 + int(stop.args[0])  # as process 1 of a container, which does not die of its own signal
    return 0


def interrupt(number: int, _: object) -> None:
    """Handle SIGINT and SIGTERM, once: the second must not disturb the cleaning up."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse the command line for absl: --help goes to stdout, a mistake is one error line."""
    try:
        if {"--help", "-help", "-h"} & set(argv):
            own = flags.FLAGS.get_flags_for_module(sys.modules[__name__])  # in the order in which they stand above
            defaults = {flag.name: "" if flag.default in (None, "") else f"={flag.default}" for flag in own}
            show([__doc__ or "", *(f"  --{flag.name}{defaults[flag.name]}\n      {flag.help}" for flag in own)])
            sys.exit(0)
        rest: list[str] = flags.FLAGS(list(argv))
    except (flags.Error, OSError, ValueError) as error:  # the latter two from absl's own --flagfile and the like
        sys.exit(fail(str(error)))
    if len(rest) > 1:
        sys.exit(fail(f"unexpected argument {shown(rest[1])}, expected only flags, as --name=value"))
    return rest


if __name__ == "__main__":
    for stream in ("stdout", "stderr"):  # closed by whoever started us
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: PTH123, SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app.run(main, flags_parser=parse_flags)
