#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["absl-py", "tqdm", "scalesim==3.0.0", "numpy<2.4", "protobuf>=5.29"]
# ///
"""Turn a table of layers, each a GEMM of m, n, k, into the workload file that ASTRA-sim runs.

  python gen_astrasim_workload_input.py --num_npus=16 --num_packages=2
  python gen_astrasim_workload_input.py --mnk=my_layers.csv --parallel=MODEL --output_file=model.txt

mnk table -> plan: what one NPU computes and sends -> cycle model -> workload, traces, report
"""

from __future__ import annotations

import configparser
import copy
import csv
import difflib
import errno
import fcntl
import gc
import importlib.util
import inspect
import io
import logging
import math
import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

try:
    from absl import app, flags
except ImportError as missing:
    sys.exit(f"error: no {missing.name} in {sys.executable}: pip install -r requirements.txt")


# Everything is defined above its first use. `run`, near the end, tells the whole story. What only a
# simulation needs and what takes long to import is imported where it is used.

# --- Errors, messages, numbers and files


class UserError(Exception):
    """A problem that the user can fix, described in one line."""


def printable(text: str) -> str:
    """Return text with escapes for whatever a terminal might obey."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def say(kind: str, message: str) -> None:
    """Print one line to stderr, unless it is closed."""
    line = re.sub(r"\s*\n\s*", " ", message.strip())  # some libraries' errors have several
    line = f"{kind}: {printable(line)}"
    with suppress(OSError, ValueError):
        if "tqdm" in sys.modules:  # imported only where there may be a bar to print above
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)


def warn(message: str) -> None:
    """Print a warning."""
    say("warning", message)


def warn_of_first(cases: list[str], consequence: str) -> None:
    """Warn once for all cases: name the first, and count the others."""
    if cases:
        others = f" (and {len(cases) - 1} more)" if cases[1:] else ""
        warn(f"{cases[0]}{others}{consequence}")


def quoted(text: str) -> str:
    """Return user text, quoted: in ASCII, its first 60 characters."""
    if len(text) > 60:
        return f"{text[:60]!a}..."
    return ascii(text)


def plural(number: int, name: str) -> str:
    """Return "1 layer", "1,024 layers", "2 passes"."""
    if number == 1:
        return f"1 {name}"
    ending = "es" if name.endswith("s") else "s"
    return f"{number:,} {name}{ending}"


def expected_name(name: str, known: Sequence[str]) -> str:
    """Suggest the known name that is most like this one; if none is like it, list them all."""
    spellings = {spelling.lower(): spelling for spelling in known}
    near = difflib.get_close_matches(name.lower(), spellings, 1)
    if near:
        return f"did you mean {spellings[near[0]]}?"
    return f"expected {', '.join(known)}"


def whole_number(text: str) -> int | None:
    """Return the value of up to 30 digits, which no real size exceeds; None for any other text."""
    if re.fullmatch("[0-9]{1,30}", text):
        return int(text)
    return None


def expected_number(text: str, least: int) -> str:
    """Return what a message expects in place of a text that is not such a number."""
    if re.fullmatch(r"[0-9]{31,}(\.0)?", text):
        return "expected at most 30 digits"
    return f"expected a whole number >= {least}"


def divide_up(number: int, parts: int) -> int:
    """Divide, rounded up."""
    return -(-number // parts)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return rows of cells as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@contextmanager
def errors_name(path: Path | str) -> Iterator[None]:
    """Put this path into any OSError; that of a full disk names none, others a temporary file."""
    try:
        yield
    except OSError as error:
        error.filename = path
        raise


def absolute_path(text: str) -> Path | None:
    """Return the path that a flag gives, in which ~ is the home folder; None if it gives none."""
    if "\0" in text:
        raise UserError(f"path {quoted(text)}, expected no NUL character")
    if not text:
        return None
    return Path(os.path.expanduser(text)).absolute()


def read_text(path: Path, expected: str) -> str:
    """Return the text of an input, at most 64 MiB of UTF-8; else a UserError says what to give."""
    with path.open("rb") as file:
        data = file.read((1 << 26) + 1)
    if len(data) > 1 << 26:
        raise UserError(f"{path}: more than 64 MiB, expected {expected}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        what = f"{path}:{line}: not UTF-8, perhaps UTF-16 or a spreadsheet"
        raise UserError(f"{what}, expected {expected} in UTF-8") from None
    if "\0" in text:
        what = f"{path}: a NUL character, perhaps of UTF-16 or a spreadsheet"
        raise UserError(f"{what}, expected {expected} in UTF-8")
    return text


def csv_rows(path: Path) -> list[tuple[str, list[str]]]:
    """Return the rows of a CSV file that are not blank, each with "file:line"."""
    text = io.StringIO(read_text(path, "a CSV table"))
    reader = csv.reader(text, strict=True, skipinitialspace=True)
    rows = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((f"{path}:{reader.line_num}", cells))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}, expected a CSV table") from None
    if rows:
        where, header = rows[0]
        if len(header) == 1 and re.search(r"[;\t ]", header[0]):
            what = f"one column {quoted(header[0])}"
            raise UserError(f"{where}: {what}, expected a header with commas between columns")
    return rows


def is_device(path: Path) -> bool:
    """Tell whether a path is a pipe, a terminal or the like, which can't be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give the name of a file to make, which then takes the target's place, or is removed."""
    part = target.with_name(f".{os.urandom(8).hex()}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        with suppress(OSError):
            part.unlink()  # still there after an error, or where both were links to one file


def write_file(path: Path, data: bytes) -> None:
    """Write an output, whole or not at all; a link stays a link.

    A device, and a file that can't be replaced, is written to where it is. Containers have such
    files: mounted on their own, or in a folder that is not to be written to.
    """
    with errors_name(path):
        if path == Path("/dev/stdout"):  # perhaps a file, which the shell appends to
            sys.stdout.buffer.write(data)
            return
        if is_device(path):
            path.write_bytes(data)
            return
        target = path.resolve()
        exists = target.exists()
        try:
            with replacing(target) as part:
                part.write_bytes(data)
                if exists:
                    shutil.copymode(target, part)
        except OSError as error:
            can_not_replace = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)
            if not exists or error.errno not in can_not_replace:
                raise
            target.write_bytes(data)


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write texts, by file name, into a folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_file(folder / name, text.encode())


# --- Strategies, flags and settings


class Strategy(NamedTuple):
    """The dimensions of the network, 0 within and 1 between packages, over which a layer is split.

    The strategies of ASTRA-sim 1.0 (Rashidi et al., ISPASS 2020).
    """

    split_m: tuple[int, ...]  # data parallelism: the NPUs of a group have different rows
    split_n: tuple[int, ...]  # model parallelism: the NPUs of a group have different outputs

    def degrees(self, network: tuple[int, int]) -> tuple[int, int]:
        """Return dp and mp: over how many NPUs m and n are split."""
        dp = math.prod(network[dimension] for dimension in self.split_m)
        mp = math.prod(network[dimension] for dimension in self.split_n)
        return dp, mp


STRATEGIES = {
    "DATA": Strategy(split_m=(0, 1), split_n=()),
    "MODEL": Strategy(split_m=(), split_n=(0, 1)),
    "HYBRID_DATA_MODEL": Strategy(split_m=(1,), split_n=(0,)),
    "HYBRID_MODEL_DATA": Strategy(split_m=(0,), split_n=(1,)),
}
CUSTOMIZED = "HYBRID_CUSTOMIZED"  # each layer has a strategy of its own
DLRM = "HYBRID_DLRM"  # the embedding is split as by MODEL, all other layers as by DATA

INT_MAX = (1 << 31) - 1

flags.DEFINE_string(
    "mnk",
    str(Path(__file__).resolve().parent / "mnk_inputs/example.csv"),
    "The table of layers, a CSV file.",
)
flags.DEFINE_enum(
    "parallel",
    "DATA",
    [*STRATEGIES, CUSTOMIZED, DLRM],
    "How layers are partitioned across NPUs.",
    case_sensitive=False,
)
flags.DEFINE_bool("inference", False, "Forward passes only.")
flags.DEFINE_enum(
    "sharding_strategy",
    "NO_SHARD",
    ["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"],
    "FSDP: what data parallelism shards, named as in PyTorch; for traces only.",
    case_sensitive=False,
)
flags.DEFINE_integer("num_npus", 8, "NPUs in the whole system.", 1, INT_MAX)
flags.DEFINE_alias("num_npu", "num_npus")
flags.DEFINE_integer("num_packages", 1, "Packages that hold the NPUs.", 1)
flags.DEFINE_integer("datatype_size", 2, "Bytes per element.", 1, 1 << 20)
flags.DEFINE_integer("minibatch", 1, "Samples, in a table whose rows are of one.", 1, INT_MAX)
flags.DEFINE_string("output_file", "workload.txt", "The workload text file.")
flags.DEFINE_string("run_name", "", "Folder in outputs/<parallel>; by default the table's name.")
flags.DEFINE_string("scalesim_path", "", "A SCALE-Sim folder; by default the installed package.")
flags.DEFINE_string("scalesim_config", "", "A SCALE-Sim config; by default a 256 x 256 array.")
# --cycle_model is defined below the cycle models.
flags.DEFINE_string("gemm_cycles", "", "A CSV of GEMMs whose cycles were measured elsewhere.")
flags.DEFINE_integer("jobs", None, "SCALE-Sim processes at once; by default one for each CPU.", 1)
flags.DEFINE_string(
    "cache_dir",
    str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gen_astrasim_workload_input")),
    "Folder of finished simulations; empty for none.",
)
flags.DEFINE_enum(
    "shard_rounding",
    "up",
    ["up", "down"],
    "Rounding of a share; up models the slowest NPU.",
)
flags.DEFINE_integer("update_time", 100, "Delay after a collective in ASTRA-sim 1.0.", 0, INT_MAX)
flags.DEFINE_enum(
    "time_unit", "cycles", ["cycles", "ns", "us"], "Unit of compute times in the text file."
)
flags.DEFINE_float("clock_mhz", None, "The accelerator's clock, for ns, us and traces.", 1e-6, 1e9)
flags.DEFINE_string("chakra_et", "", "Prefix of traces for ASTRA-sim 2.x; needs --clock_mhz.")
flags.DEFINE_integer("num_passes", 1, "Training steps, or forward passes, in traces.", 1, 1 << 20)
flags.DEFINE_string("summary_csv", "", "A CSV file to which a row for this run is appended.")
flags.DEFINE_bool("dry_run", False, "Print the plan and its cost; write nothing.")
flags.DEFINE_string("dask_scheduler", "", "Address of a Dask scheduler, to simulate there.")


def is_file_or_empty(path: str) -> bool:
    """Tell whether a path ends in a file name, or was not given."""
    return not path or path.rpartition("/")[2] not in ("", ".", "..")


def is_below_outputs(run_name: str) -> bool:
    """Tell whether the folder of a run would lie below outputs/<parallel>."""
    parts = run_name.split("/")
    return "\0" not in run_name and not run_name.startswith("/") and not {".", ".."} & {*parts}


def check_clock(given: dict[str, Any]) -> bool:
    """Refuse a clock that is missing, or that nothing uses.

    Other flags without effect only give a warning, but with this one times would be in another unit
    than was meant.
    """
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
flags.register_validator("chakra_et", is_file_or_empty, "expected a prefix of file names")
flags.register_validator("run_name", is_below_outputs, "expected a folder below outputs")
flags.register_multi_flags_validator(
    ["num_npus", "num_packages"],
    lambda given: given["num_npus"] % given["num_packages"] == 0,
    "expected NPUs to be divisible by packages",
)
flags.register_multi_flags_validator(["time_unit", "clock_mhz", "chakra_et"], check_clock)
flags.register_multi_flags_validator(
    ["num_npus", "chakra_et"],
    lambda given: not given["chakra_et"] or given["num_npus"] <= 1 << 20,
    "that many traces are too many, expected at most 1048576",
)


class Clock(NamedTuple):
    """The unit in which a file has its compute times."""

    unit: str  # cycles, ns or us
    mhz: float | None

    @property
    def cycle_length(self) -> Fraction:
        """The length of a cycle in this unit."""
        if self.unit == "cycles":
            return Fraction(1)
        microseconds = 1 / Fraction(str(self.mhz))  # as it was typed: 0.1 is 1/10
        if self.unit == "us":
            return microseconds
        return 1000 * microseconds

    def time(self, cycles: int) -> int:
        """Return cycles in this unit, rounded to a whole number, but not to 0."""
        if cycles == 0:
            return 0
        return max(1, round(cycles * self.cycle_length))


PATH_FLAGS = (
    "mnk",
    "output_file",
    "scalesim_path",
    "scalesim_config",
    "gemm_cycles",
    "cache_dir",
    "chakra_et",
    "summary_csv",
)


class Settings(NamedTuple):
    """The flags, with absolute paths; None where a path was not given."""

    mnk: Path
    parallel: str
    inference: bool
    sharding_strategy: str
    num_npus: int
    num_packages: int
    datatype_size: int  # bytes
    minibatch: int
    output_file: Path | None  # None: the text format can't express the run
    run_name: str
    scalesim_path: Path | None
    scalesim_config: Path | None
    cycle_model: str
    gemm_cycles: Path | None
    jobs: int | None
    cache_dir: Path | None
    shard_rounding: str
    update_time: int
    time_unit: str
    clock_mhz: float | None
    chakra_et: Path | None
    num_passes: int  # training steps, or forward passes
    summary_csv: Path | None
    dry_run: bool
    dask_scheduler: str

    @classmethod
    def from_flags(cls) -> Settings:
        """Return the parsed flags; warn of those without effect."""
        given = flags.FLAGS
        values: dict[str, Any] = {name: given[name].value for name in cls._fields}
        try:
            Path.cwd()
        except FileNotFoundError:
            raise UserError("the current folder has been deleted") from None
        if os.path.expanduser(given.cache_dir).startswith("~"):
            warn("there is no home folder: simulations are not cached")
            values["cache_dir"] = ""
        for name in PATH_FLAGS:
            values[name] = absolute_path(values[name])
        values["run_name"] = given.run_name or values["mnk"].stem
        settings = cls(**values)
        settings.warn_of_flags()
        if settings.uses_fsdp:
            settings.check_sharding()
            return settings._replace(output_file=None)
        return settings

    def warn_of_flags(self) -> None:
        """Warn of flags that have no effect, and of traces that are of no use."""
        given = flags.FLAGS
        if given.cycle_model != "simulated":
            for name in ("scalesim_path", "dask_scheduler", "jobs"):
                if given[name].present:
                    warn(f"--{name} has no effect with --cycle_model={given.cycle_model}")
        elif given.dask_scheduler and given["jobs"].present:
            warn("--jobs has no effect with --dask_scheduler")
        if given["num_passes"].present and not given.chakra_et:
            warn("--num_passes has no effect without --chakra_et")
        if given.chakra_et and given.num_npus == 1:
            warn("traces for 1 NPU: ASTRA-sim 2.x takes no network of one NPU")

    @property
    def uses_fsdp(self) -> bool:
        """Whether data parallelism shards weights, gradients and optimizer states."""
        return self.sharding_strategy != "NO_SHARD"

    def check_sharding(self) -> None:
        """Refuse a sharding strategy with flags that it does not go with."""
        sharding = f"--sharding_strategy={self.sharding_strategy}"
        if self.inference:
            raise UserError(f"{sharding} is for training, expected no --inference")
        if self.parallel == DLRM:
            raise UserError(f"{sharding} with {DLRM}, expected another --parallel")
        if not self.chakra_et or flags.FLAGS["output_file"].present:
            expected = "expected --chakra_et and --clock_mhz, and no --output_file"
            raise UserError(f"{sharding} is for traces only, {expected}")
        if flags.FLAGS["update_time"].present:
            warn(f"--update_time has no effect with {sharding}")
        npus_in_package, packages = self.network
        has_both = npus_in_package > 1 and packages > 1
        if self.sharding_strategy == "HYBRID_SHARD" and not (self.parallel == "DATA" and has_both):
            what = "shards within packages, and replicates between them"
            expected = "expected --parallel=DATA and 1 < packages < NPUs"
            raise UserError(f"{sharding} {what}, {expected}")

    @property
    def run_folder(self) -> Path:
        """The folder of this run's details."""
        return Path("outputs", self.parallel, self.run_name).absolute()

    @property
    def network(self) -> tuple[int, int]:
        """NPUs in a package, and packages: the dimensions of ASTRA-sim's network."""
        return self.num_npus // self.num_packages, self.num_packages

    @property
    def backward_passes(self) -> list[str]:
        """The backward passes of a layer in the order of time, as in ASTRA-sim 1.0."""
        if self.inference:
            return []
        if self.parallel in ("DATA", DLRM):
            return ["weight gradient", "input gradient"]
        return ["input gradient", "weight gradient"]

    @property
    def step(self) -> str:
        """What is repeated: for messages."""
        return "forward pass" if self.inference else "training step"

    @property
    def text_clock(self) -> Clock:
        """The unit of the workload file."""
        return Clock(self.time_unit, self.clock_mhz)

    @property
    def trace_clock(self) -> Clock:
        """The unit of traces, which is always us."""
        return Clock("us", self.clock_mhz)

    @property
    def precisions(self) -> dict[Clock, str]:
        """What the written times are rounded to, for messages: once, if text and traces agree."""
        precisions = {self.text_clock: f"whole {self.time_unit}"}
        if self.chakra_et:
            precisions[self.trace_clock] = "whole us, which are all that a trace holds,"
        return precisions


# --- Layers, and the rules of their types


# The passes in the order of all files, each with the end of the name of the file of its GEMMs.
PASSES = {
    "forward": "fwd_pass",
    "input gradient": "inp_grad",
    "weight gradient": "weight_grad",
}


class Layer(NamedTuple):
    """A line of the table."""

    name: str
    where: str  # "file:line", for messages
    type: str  # one of LAYER_TYPES
    strategy: str  # one of STRATEGIES
    m: int  # rows of the outputs: samples, tokens or pixels, of all NPUs together
    n: int  # columns of the outputs
    k: int  # reduction: the length of the sum that an output is
    input_elements: int  # m x k; of a convolution its ifmaps, without im2col's copies
    images: int | None = None  # of a convolution
    groups: int = 1  # of a convolution
    products: int = 1  # equal and independent, of a BATCHED_GEMM whose count is a plain number
    samples: int = 1  # of a BATCHED_GEMM whose count is samples x heads
    heads: int | None = None  # products for each sample; None: the count is a plain number
    experts: int = 1  # of an EXPERT_UP or EXPERT_DOWN, on all NPUs together

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes and numbers by the names that rules and messages have for them."""
        return {
            "m": self.m,
            "n": self.n,
            "k": self.k,
            "n/g": self.n // self.groups,
            "groups": self.groups,
            "count": self.products,
            "samples": self.samples,
            "heads": self.heads or 1,
            "experts": self.experts,
        }


class Gemm(NamedTuple):
    """A product of an M x K by a K x N matrix."""

    m: int  # rows
    n: int  # columns
    k: int  # reduction

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def elements(self) -> int:
        """The elements of the three matrices."""
        return self.m * self.k + self.k * self.n + self.m * self.n


class Lookups(NamedTuple):
    """What an EMBEDDING does in place of a GEMM."""

    m: int  # samples
    n: int  # columns of the tables
    k: int  # lookups for each sample and column
    accesses: int  # how often each element is read or written

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} lookups"

    def cycles(self, bandwidth: int) -> int:
        """Return their cycles, with a memory of so many elements a cycle."""
        return divide_up(self.accesses * self.m * self.n * self.k, bandwidth)


COLLECTIVE_KINDS = {"ALLGATHER": 2, "REDUCESCATTER": 7, "ALLREDUCE": 0, "ALLTOALL": 6}  # in Chakra


class Collective(NamedTuple):
    """A communication of one NPU with its group."""

    kind: str  # one of COLLECTIVE_KINDS
    # As ASTRA-sim counts them: in an ALLGATHER an NPU's share of what all have in the end, in an
    # ALLTOALL all that an NPU has for the others and itself, in others the buffer that is reduced.
    bytes: int
    within: int  # NPUs of the group in each package
    between: int  # packages that the group spans
    is_prefetched: bool = False  # it does not wait for the layer before

    @classmethod
    def over(
        cls, kind: str, size: int, dimensions: Collection[int], network: tuple[int, int]
    ) -> Collective:
        """Return a collective over some dimensions of a network."""
        within = network[0] if 0 in dimensions else 1
        between = network[1] if 1 in dimensions else 1
        return cls(kind, size, within, between)

    @property
    def members(self) -> int:
        """NPUs in the group."""
        return self.within * self.between

    @property
    def is_alone(self) -> bool:
        """Whether its group is one NPU, so that nothing is sent."""
        return self.members == 1

    @property
    def sent_bytes(self) -> int:
        """The fewest bytes that an NPU has to send, rounded down."""
        others = self.members - 1
        return {
            "ALLGATHER": others * self.bytes,
            "REDUCESCATTER": others * self.bytes // self.members,
            "ALLREDUCE": 2 * others * self.bytes // self.members,  # it reduces, then gathers
            "ALLTOALL": others * self.bytes // self.members,
            "NONE": 0,
        }[self.kind]

    @property
    def sent_between_packages(self) -> int:
        """What of it leaves the package, rounded down.

        A hierarchical collective, such as ASTRA-sim's localBWAware, uses the package's network
        first, so that only a share of each buffer is left to travel between packages.
        """
        others = self.between - 1
        return {
            "ALLGATHER": others * self.bytes,
            "REDUCESCATTER": others * self.bytes // self.members,
            "ALLREDUCE": 2 * others * self.bytes // self.members,
            "ALLTOALL": others * self.bytes // self.between,
            "NONE": 0,
        }[self.kind]


NO_COLLECTIVE = Collective("NONE", bytes=0, within=1, between=1)  # how files write that


class CollectiveRule(NamedTuple):
    """How a collective follows from a layer, for all layers of a type."""

    kind: str  # one of COLLECTIVE_KINDS
    buffer: str  # what it communicates: outputs, inputs or weights
    group: str  # "mp", the NPUs that split n, or "dp", those that split m

    def collective(self, layer: Layer, settings: Settings) -> Collective | None:
        """Return the collective of a layer; None if its strategy has no such group.

        There are as many groups as the other degree says; each has an equal part of the buffer.
        Bytes are rounded down, as in ASTRA-sim's own workloads.
        """
        strategy = STRATEGIES[layer.strategy]
        dp, mp = strategy.degrees(settings.network)
        if self.group == "dp":
            dimensions, members, parts = strategy.split_m, dp, mp
        else:
            dimensions, members, parts = strategy.split_n, mp, dp
        if not dimensions:
            return None
        if self.kind in ("ALLGATHER", "ALLTOALL"):
            parts *= members
        elements = {
            "outputs": layer.m * layer.n,
            "inputs": layer.input_elements,
            "weights": layer.experts * layer.n * layer.k,
        }
        size = elements[self.buffer] * settings.datatype_size // parts
        return Collective.over(self.kind, size, dimensions, settings.network)


class PassRule(NamedTuple):
    """How a pass follows from a layer, for all layers of a type.

    The sizes of its GEMM are M, N and K, by these names:
        m, n, k  the layer's own
        m'       m/dp, one NPU's rows
        n', k'   n/mp and k/mp, one NPU's columns or reduction
        n/g      the columns of one of the groups of a convolution
        r        m/(dp experts), the rows of one expert
    """

    sizes: tuple[str, str, str]
    before: tuple[CollectiveRule, ...] = ()
    after: tuple[CollectiveRule, ...] = ()
    accesses: int | None = None  # how often lookups access an element; None: it is a GEMM

    def work(self, sizes: dict[str, int]) -> Gemm | Lookups:
        """Return what one NPU computes; sizes are a layer's, and the NPU's shares of them."""
        m, n, k = [sizes[size] for size in self.sizes]
        if self.accesses is None:
            return Gemm(m, n, k)
        return Lookups(m, n, k, self.accesses)


class ShareRule(NamedTuple):
    """Over which NPUs whole things, such as heads, are shared out."""

    name: str  # groups, count, samples, heads or experts
    over: str  # "dp", "mp" or "all"


class LayerType(NamedTuple):
    """What holds for all layers of a type.

    Each of the NPUs that split n has all columns of a matrix, "whole", or its share of "columns".
    """

    passes: dict[str, PassRule]  # by names in PASSES
    shares: tuple[ShareRule, ...] = ()
    counts: str = ""  # what the table's Count counts: products or experts
    inputs: str = "whole"  # that it needs
    outputs: str = "whole"  # that it leaves, once they are communicated
    output_gradient: str = "whole"  # that it needs
    input_gradient: str = "whole"  # that it leaves, once it is communicated


GATHER_OUTPUTS = CollectiveRule("ALLGATHER", "outputs", "mp")
EXCHANGE_OUTPUTS = CollectiveRule("ALLTOALL", "outputs", "mp")
EXCHANGE_INPUTS = CollectiveRule("ALLTOALL", "inputs", "mp")
REDUCE_OUTPUTS = CollectiveRule("ALLREDUCE", "outputs", "mp")
REDUCE_INPUTS = CollectiveRule("ALLREDUCE", "inputs", "mp")
SCATTER_INPUTS = CollectiveRule("REDUCESCATTER", "inputs", "mp")
REDUCE_WEIGHTS = CollectiveRule("ALLREDUCE", "weights", "dp")

LAYER_TYPES = {
    "GEMM": LayerType(
        passes={
            "forward": PassRule(("m'", "n'", "k"), after=(GATHER_OUTPUTS,)),
            "input gradient": PassRule(("m'", "k", "n'"), after=(SCATTER_INPUTS,)),
            "weight gradient": PassRule(("k", "n'", "m'"), after=(REDUCE_WEIGHTS,)),
        },
        output_gradient="columns",
        input_gradient="columns",
    ),
    # The halves of Megatron-LM's tensor parallelism (Shoeybi et al. 2019).
    "COLUMN_PARALLEL": LayerType(
        passes={
            "forward": PassRule(("m'", "n'", "k")),
            "input gradient": PassRule(("m'", "k", "n'"), after=(REDUCE_INPUTS,)),
            "weight gradient": PassRule(("k", "n'", "m'"), after=(REDUCE_WEIGHTS,)),
        },
        outputs="columns",
        output_gradient="columns",
    ),
    "ROW_PARALLEL": LayerType(
        passes={
            "forward": PassRule(("m'", "n", "k'"), after=(REDUCE_OUTPUTS,)),
            "input gradient": PassRule(("m'", "k'", "n")),
            "weight gradient": PassRule(("k'", "n", "m'"), after=(REDUCE_WEIGHTS,)),
        },
        inputs="columns",
        input_gradient="columns",
    ),
    # Products of activations, as in attention.
    "BATCHED_GEMM": LayerType(
        passes={
            "forward": PassRule(("m", "n", "k")),
            "input gradient": PassRule(("m", "k", "n")),
            "weight gradient": PassRule(("k", "n", "m")),
        },
        shares=(ShareRule("count", "all"),),
        counts="products",
        inputs="columns",
        outputs="columns",
        output_gradient="columns",
        input_gradient="columns",
    ),
    # The halves of the MLP of a mixture of experts (Fedus et al. 2021: Switch Transformer). Tokens
    # travel to the NPUs of their experts, and from there, over the NPUs that share the experts out.
    "EXPERT_UP": LayerType(
        passes={
            "forward": PassRule(("r", "n", "k"), before=(EXCHANGE_INPUTS,)),
            "input gradient": PassRule(("r", "k", "n"), after=(EXCHANGE_INPUTS,)),
            "weight gradient": PassRule(("k", "n", "r"), after=(REDUCE_WEIGHTS,)),
        },
        shares=(ShareRule("experts", "mp"),),
        counts="experts",
    ),
    "EXPERT_DOWN": LayerType(
        passes={
            "forward": PassRule(("r", "n", "k"), after=(EXCHANGE_OUTPUTS,)),
            "input gradient": PassRule(("r", "k", "n"), before=(EXCHANGE_OUTPUTS,)),
            "weight gradient": PassRule(("k", "n", "r"), after=(REDUCE_WEIGHTS,)),
        },
        shares=(ShareRule("experts", "mp"),),
        counts="experts",
    ),
    # Tables of embeddings, cut by columns; k lookups for each sample and column. Backward nothing
    # is computed but the update, which reads and writes what was looked up.
    "EMBEDDING": LayerType(
        passes={
            "forward": PassRule(("m", "n'", "k"), after=(EXCHANGE_OUTPUTS,), accesses=1),
            "input gradient": PassRule(("m", "n'", "k"), after=(EXCHANGE_OUTPUTS,), accesses=0),
            "weight gradient": PassRule(("m", "n'", "k"), accesses=2),
        },
    ),
}
BATCHED_BY_HEADS = LAYER_TYPES["BATCHED_GEMM"]._replace(
    shares=(ShareRule("samples", "dp"), ShareRule("heads", "mp"))
)
GEMM_BY_GROUPS = LayerType(  # a convolution; a group's input gradient is all on one NPU
    passes={
        "forward": PassRule(("m'", "n/g", "k"), after=(GATHER_OUTPUTS,)),
        "input gradient": PassRule(("m'", "k", "n/g")),
        "weight gradient": PassRule(("k", "n/g", "m'"), after=(REDUCE_WEIGHTS,)),
    },
    shares=(ShareRule("groups", "mp"),),
)


def rules_of(layer: Layer, mp: int) -> LayerType:
    """Return the rules of a layer, which may be those of a variant of its type."""
    if layer.heads:
        return BATCHED_BY_HEADS
    if layer.groups > 1 and layer.groups >= mp:
        return GEMM_BY_GROUPS
    return LAYER_TYPES[layer.type]


# --- The table of layers


class Columns:
    """The columns of tables, spelled as messages have them."""

    STRATEGY = "CustomizedParallelization"
    GEMM = ("Layer", "m", "n", "k")
    GEMM_OPTIONAL = ("Type", "Count", STRATEGY)
    CONVOLUTION = (
        "Layer",
        "IFMAP Height",
        "IFMAP Width",
        "Filter Height",
        "Filter Width",
        "Channels",
        "Num Filter",
    )
    STRIDES = ("Strides",)
    DIRECTED_STRIDES = ("Stride Height", "Stride Width")  # as SCALE-Sim's own writer has them
    DERIVED = ("Eh", "Ew", "e2")  # sizes of outputs, in SCALE-Sim's own files
    CONVOLUTION_OPTIONAL = ("Padding", "Groups", STRATEGY, *DERIVED)
    OTHER_NAMES: ClassVar = {
        "name": "Layer",
        "layer name": "Layer",
        "channel": "Channels",
        "num filters": "Num Filter",
    }


def has_word(name: str, words: str) -> bool:
    """Tell whether a layer's name has one of `words`, a regular expression, between non-letters."""
    return bool(re.search(rf"(?<![^\W\d_])({words})(?![^\W\d_])", name, re.IGNORECASE))


class TableLine(NamedTuple):
    """A line below the header; a cell that can't be read is a UserError."""

    where: str  # "file:line"
    cells: dict[str, str]  # by the name of the column

    def text(self, column: str) -> str:
        """Return a cell; empty if the table has no such column."""
        return self.cells.get(column, "")

    def size(self, column: str, least: int = 1) -> int:
        """Return the whole number in a column, also one that pandas wrote as 64.0."""
        cell = self.cells[column]
        number = whole_number(cell.removesuffix(".0"))
        if number is None or number < least:
            expected = expected_number(cell, least)
            raise UserError(f"{self.where}: {column} is {quoted(cell)}, {expected}")
        return number

    def layer(self, parallel: str, minibatch: int) -> Layer:
        """Return the layer of a line."""
        name = "_".join(self.text("Layer").split())
        if not name or not name.isprintable():
            what = f"layer name {quoted(name)}"
            raise UserError(f"{self.where}: {what}, expected printable characters")

        layer_type = self.layer_type()
        if layer_type == "EMBEDDING" and parallel != DLRM:
            raise UserError(f"{self.where}: type EMBEDDING needs --parallel={DLRM}")
        strategy = parallel
        if parallel == CUSTOMIZED:
            strategy = self.own_strategy()
        elif parallel == DLRM:
            strategy = "MODEL" if layer_type == "EMBEDDING" else "DATA"
        if "m" not in self.cells:
            return self.convolution(name, strategy, minibatch)
        counts = LAYER_TYPES[layer_type].counts
        m, n, k = self.size("m"), self.size("n"), self.size("k")
        if counts != "products":
            m *= minibatch
        layer = Layer(name, self.where, layer_type, strategy, m, n, k, input_elements=m * k)
        if counts == "products":
            return self.with_products(layer, minibatch)
        if counts == "experts":
            return layer._replace(experts=self.experts())
        if self.text("Count"):
            what = f"Count is {quoted(self.text('Count'))}"
            raise UserError(f"{self.where}: {what}, expected none with type {layer.type}")
        return layer

    def layer_type(self) -> str:
        """Return the layer's type, one of LAYER_TYPES."""
        cell = self.text("Type")
        layer_type = cell.upper() or "GEMM"
        if layer_type not in LAYER_TYPES:
            expected = expected_name(layer_type, [*LAYER_TYPES])
            raise UserError(f"{self.where}: unknown type {quoted(cell)}, {expected}")
        return layer_type

    def own_strategy(self) -> str:
        """Return the layer's own strategy, one of STRATEGIES."""
        cell = self.text(Columns.STRATEGY)
        strategy = cell.upper().replace("HYBRD", "HYBRID")  # a misspelling in an old description
        if strategy not in STRATEGIES:
            expected = f"expected one of {', '.join(STRATEGIES)}"
            raise UserError(f"{self.where}: strategy {quoted(cell)}, {expected}")
        return strategy

    def experts(self) -> int:
        """Return the number of experts, which must be given."""
        if not self.text("Count"):
            raise UserError(f"{self.where}: no Count, expected the number of experts")
        return self.size("Count")

    def with_products(self, layer: Layer, minibatch: int) -> Layer:
        """Return a layer with the number of its products, or with its samples and heads."""
        cell = self.text("Count") or "1"
        first, times, second = cell.lower().replace("×", "x").partition("x")
        number = whole_number(first.strip().removesuffix(".0"))
        heads = whole_number(second.strip())
        if not number or (times and not heads):
            expected = f"{expected_number(cell, 1)}, or samples x heads such as 1536x96"
            raise UserError(f"{self.where}: Count is {quoted(cell)}, {expected}")
        if times:
            return layer._replace(samples=number * minibatch, heads=heads)
        return layer._replace(products=number * minibatch)

    def convolution(self, name: str, strategy: str, minibatch: int) -> Layer:
        """Return a convolution's GEMM: a row for each output pixel, a column for each filter."""
        channels, filters = self.size("Channels"), self.size("Num Filter")
        groups = 1
        if self.text("Groups"):
            groups = self.size("Groups")
        elif has_word(name, "dw|dwconv|dp|depth[_-]?wise"):  # DP is SCALE-Sim's own mark
            expected = (
                "expected Groups: as many as Channels (Num Filter then has those of all), or 1"
            )
            raise UserError(f"{self.where}: {name} sounds depth-wise, {expected}")
        for column in ("Channels", "Num Filter"):
            size = self.size(column)
            if size % groups:
                what = f"{column} is {size}"
                raise UserError(f"{self.where}: {what}, expected a multiple of {groups} groups")

        output_pixels = self.outputs_along("Height") * self.outputs_along("Width")
        input_pixels = self.size("IFMAP Height") * self.size("IFMAP Width")
        window = self.size("Filter Height") * self.size("Filter Width")
        return Layer(
            name,
            self.where,
            "GEMM",
            strategy,
            m=minibatch * output_pixels,
            n=filters,
            k=window * channels // groups,
            input_elements=minibatch * input_pixels * channels,
            images=minibatch,
            groups=groups,
        )

    def outputs_along(self, direction: str) -> int:
        """Return a convolution's output Height or Width."""
        stride_column = f"Stride {direction}"
        if "Strides" in self.cells:
            stride_column = "Strides"
        stride = self.size(stride_column)
        room = self.size(f"IFMAP {direction}") - self.size(f"Filter {direction}")
        if "Padding" in self.cells:
            room += 2 * self.size("Padding", least=0)
        if room < 0:
            raise UserError(f"{self.where}: a filter larger than its ifmap, expected a smaller one")
        if "Padding" in self.cells:
            return room // stride + 1  # as PyTorch counts
        return divide_up(room + stride, stride)  # as SCALE-Sim counts


class Header(NamedTuple):
    """The header of a table."""

    where: str  # "file:line"
    names: list[str]  # of the columns, as Columns spells them; empty where it has no name

    @classmethod
    def read(cls, where: str, cells: list[str]) -> Header:
        """Return the columns that a header's cells name, in any letter case and spacing."""
        if any(whole_number(cell) is not None for cell in cells):
            what = f"no header but {quoted(','.join(cells))}"
            raise UserError(f"{where}: {what}, expected one such as {','.join(Columns.GEMM)}")
        spellings = {**Columns.OTHER_NAMES}
        for name in (*Columns.GEMM, *Columns.GEMM_OPTIONAL, *Columns.CONVOLUTION):
            spellings[name.lower()] = name
        for name in (*Columns.STRIDES, *Columns.DIRECTED_STRIDES, *Columns.CONVOLUTION_OPTIONAL):
            spellings[name.lower()] = name
        names = []
        for cell in cells:
            name = " ".join(cell.split())
            names.append(spellings.get(name.lower(), name))
        while not names[-1]:
            names.pop()  # the trailing comma of SCALE-Sim's files
        if names[1:3] == ["IFMAP Width", "IFMAP Width"]:
            names[1] = "IFMAP Height"  # as 28 of SCALE-Sim's own files call it
        return cls(where, names)

    @property
    def is_of_convolutions(self) -> bool:
        """Whether the table has convolutions; one of these two columns may be misspelled."""
        return "IFMAP Height" in self.names or "Filter Height" in self.names

    def needed_and_known(self, parallel: str) -> tuple[list[str], list[str]]:
        """Return the columns that there must be, and all that there may be."""
        needed = [*Columns.GEMM]
        known = [*Columns.GEMM, *Columns.GEMM_OPTIONAL]
        if self.is_of_convolutions:
            needed = [*Columns.CONVOLUTION, *Columns.STRIDES]
            if {*self.names} & {*Columns.DIRECTED_STRIDES}:
                needed = [*Columns.CONVOLUTION, *Columns.DIRECTED_STRIDES]
            known = [*Columns.CONVOLUTION, *Columns.STRIDES, *Columns.DIRECTED_STRIDES]
            known += Columns.CONVOLUTION_OPTIONAL
        if parallel == CUSTOMIZED:
            needed.append(Columns.STRATEGY)
        return needed, known

    def check(self, parallel: str) -> None:
        """Refuse columns that are unknown, missing or there twice."""
        columns = [name for name in self.names if name]
        needed, known = self.needed_and_known(parallel)
        where = self.where
        for name in columns:
            if name not in known:
                expected = expected_name(name, known)
                raise UserError(f"{where}: unknown column {quoted(name)}, {expected}")
            if columns.count(name) > 1:
                raise UserError(f"{where}: two columns {name}, expected one")
        for name in needed:
            if name not in columns:
                raise UserError(f"{where}: no column {name}, expected {', '.join(needed)}")
        if "Strides" in columns and "Strides" not in needed:
            raise UserError(f"{where}: give Strides, or Stride Height and Stride Width")
        derived = [name for name in Columns.DERIVED if name in columns]
        if derived:
            what = "ignored columns, which follow from the others"
            warn(f"{where}: {what}: {', '.join(derived)}")

    def lines(self, rows: list[tuple[str, list[str]]]) -> list[TableLine]:
        """Return the rows that are layers, each with a cell for each column."""
        lines = []
        number = len(self.names)
        for where, cells in rows:
            if self.is_of_convolutions and not any(cells[1:]):
                warn(f"{where}: {quoted(cells[0])} is skipped: it looks like a title")
                continue
            if len(cells) < number:
                what = f"{plural(len(cells), 'column')}, expected {number} as in the header"
                raise UserError(f"{where}: {what}")
            for index, cell in enumerate(cells):
                is_named = index < number and self.names[index]
                if cell and not is_named and not cell.startswith("#"):
                    what = f"{quoted(cell)} in column {index + 1}"
                    expected = f"expected {number} columns as in the header"
                    if index < number:
                        expected = "expected a name for this column in the header"
                    raise UserError(f"{where}: {what}, {expected}")
            named_cells = {name: cell for name, cell in zip(self.names, cells) if name}
            lines.append(TableLine(where, named_cells))
        return lines


class Table(NamedTuple):
    """The table of GEMMs or of convolutions; a line that can't be read is a UserError."""

    path: Path
    parallel: str
    minibatch: int
    lines: list[TableLine]

    @classmethod
    def read(cls, settings: Settings) -> Table:
        """Return the table that --mnk names."""
        path = settings.mnk
        rows = csv_rows(path)
        if not rows:
            raise UserError(f"{path}:1: no header, expected {','.join(Columns.GEMM)}")

        header = Header.read(*rows[0])
        header.check(settings.parallel)
        lines = header.lines(rows[1:])
        if not lines:
            raise UserError(f"{header.where}: no layers, expected one in each line below")
        has_strategies = any(line.text(Columns.STRATEGY) for line in lines)
        if has_strategies and settings.parallel != CUSTOMIZED:
            what = f"column {Columns.STRATEGY} is only read"
            warn(f"{header.where}: {what} with --parallel={CUSTOMIZED}")
        return cls(path, settings.parallel, settings.minibatch, lines)

    def layers(self) -> list[Layer]:
        """Return the layers in the order of the table."""
        layers = []
        renamed = []
        uncounted = []
        attention = []
        for line in self.lines:
            layer = line.layer(self.parallel, self.minibatch)
            layers.append(layer)
            if layer.name != line.text("Layer"):
                renamed.append(f"{line.where}: spaces in layer names become _")
            if LAYER_TYPES[layer.type].counts == "products" and not line.text("Count"):
                uncounted.append(f"{line.where}: a {layer.type} without a Count")
            is_typed = "Type" in line.cells or "m" not in line.cells
            if not is_typed and has_word(layer.name, "scores?|qk|qkt|qktv|context"):
                attention.append(f"{line.where}: {layer.name} sounds like attention")
        warn_of_first(renamed, "")
        warn_of_first(uncounted, ", each taken as one product")
        advice = "products of activations have no weights: give them the Type BATCHED_GEMM"
        warn_of_first(attention, f"; {advice}")
        if self.parallel == DLRM:
            self.check_embedding(layers)
        self.check_experts(layers)
        return layers

    def check_experts(self, layers: list[Layer]) -> None:
        """Refuse the first half of experts without the second."""
        for layer, below in zip(layers, [*layers[1:], None]):
            if layer.type != "EXPERT_UP":
                continue
            if below is None or below.type != "EXPERT_DOWN":
                what = f"{layer.name} is an EXPERT_UP"
                raise UserError(f"{layer.where}: {what}, expected an EXPERT_DOWN below it")
            if below.experts != layer.experts:
                what = f"Count is {below.experts} experts"
                raise UserError(f"{below.where}: {what}, expected {layer.experts} as above")

    def check_embedding(self, layers: list[Layer]) -> None:
        """Refuse a table for HYBRID_DLRM without one embedding between two MLPs."""
        embeddings = [layer for layer in layers if layer.type == "EMBEDDING"]
        if not embeddings:
            raise UserError(f"{self.path}:1: no layer of type EMBEDDING, expected one for {DLRM}")
        if len(embeddings) > 1:
            raise UserError(f"{embeddings[1].where}: only one EMBEDDING is allowed")
        if embeddings[0] in (layers[0], layers[-1]):
            what = "EMBEDDING at an end of the table"
            expected = "expected the bottom MLP above it and the top MLP below"
            raise UserError(f"{embeddings[0].where}: {what}, {expected}")


# --- The plan: what one NPU computes and communicates


@dataclass(eq=False)
class Pass:
    """One NPU's part of a pass of a layer: collectives, what it computes, more collectives."""

    layer: Layer
    name: str  # one of PASSES
    count: int  # of equal GEMMs
    work: Gemm | Lookups
    before: list[Collective]  # in the order of time
    after: list[Collective]
    cycles: int = field(init=False)  # there are none until a cycle model has run
    is_measured: bool = field(init=False, default=False)  # its cycles are from --gemm_cycles

    def __str__(self) -> str:
        return f"the {self.name} pass of {self.layer.name}"

    @property
    def collectives(self) -> list[Collective]:
        """All of them, in the order of time."""
        return [*self.before, *self.after]

    @property
    def lines(self) -> list[tuple[str, Collective]]:
        """Its lines in the printed table and layers.csv, in the order of time.

        Each has a name and a collective. The line of the pass itself, which has its name, has the
        first collective after it.
        """
        lines = []
        for collective in self.before:
            name = f"{self.name} exchange"
            if collective.is_prefetched:
                name = "forward weights" if self.name == "forward" else "backward weights"
            lines.append((name, collective))
        own, *others = self.after or [NO_COLLECTIVE]
        lines.append((self.name, own))
        for collective in others:
            lines.append((f"{self.name} replicas", collective))
        return lines

    def without_end(self) -> Pass:
        """Return a copy after which nothing is communicated."""
        shorter = copy.copy(self)
        shorter.after = []
        return shorter


class Share(NamedTuple):
    """What one NPU, or one expert on an NPU, has of a size or a number."""

    name: str
    total: int
    parts: int  # into which it is split: as many as there are NPUs, or experts in all replicas
    size: int

    @classmethod
    def of(cls, name: str, total: int, parts: int, rounding: str) -> Share:
        """Return a share that is rounded up or down, but at least 1."""
        size = divide_up(total, parts)
        if rounding == "down":
            size = max(1, total // parts)
        return cls(name, total, parts, size)


class Sharding(NamedTuple):
    """Fully sharded data parallelism: what takes the place of the ALLREDUCE of weights.

    ZeRO (Rajbhandari et al. 2020), as PyTorch has it (Zhao et al. 2023).
    """

    gathers_again: bool  # backward too, as weights are freed after forward
    is_within_packages: bool  # each of which has a copy of the weights

    def apply(self, passes: dict[str, Pass], first_backward: str) -> None:
        """Shard the weights of a layer, if it has any of which several NPUs have copies.

        Shares are rounded up, as PyTorch pads them.
        """
        weight_gradient = passes["weight gradient"]
        if not weight_gradient.after or weight_gradient.after[0].is_alone:
            return
        whole = weight_gradient.after[0]
        scatter = whole._replace(kind="REDUCESCATTER")
        if self.is_within_packages:
            scatter = scatter._replace(between=1)
        share = divide_up(whole.bytes, scatter.members)
        weight_gradient.after = [scatter]
        if self.is_within_packages:
            weight_gradient.after.append(whole._replace(bytes=share, within=1))
        gather = scatter._replace(kind="ALLGATHER", bytes=share, is_prefetched=True)
        passes["forward"].before.insert(0, gather)
        if self.gathers_again:
            passes[first_backward].before.insert(0, gather)


SHARDINGS = {
    "SHARD_GRAD_OP": Sharding(gathers_again=False, is_within_packages=False),
    "FULL_SHARD": Sharding(gathers_again=True, is_within_packages=False),
    "HYBRID_SHARD": Sharding(gathers_again=True, is_within_packages=True),
}


class LayerPlan(NamedTuple):
    """What one NPU does for a layer."""

    layer: Layer
    dp: int  # over how many NPUs m is split
    mp: int  # over how many NPUs n is split
    shares: list[Share]
    passes: dict[str, Pass]  # those that run, by name

    @classmethod
    def of(cls, layer: Layer, settings: Settings) -> LayerPlan:
        """Return the plan of a layer: its shares, then its passes by the rules of its type."""
        dp, mp = STRATEGIES[layer.strategy].degrees(settings.network)
        layer_type = rules_of(layer, mp)
        sizes = layer.sizes
        shares = []
        degrees = {"dp": dp, "mp": mp, "all": dp * mp}
        for name, over in layer_type.shares:
            # Whatever --shard_rounding says: things that are never cut have no smaller share.
            shares.append(Share.of(name, sizes[name], degrees[over], "up"))
        count = math.prod(share.size for share in shares)
        if layer_type.counts == "experts":
            if layer.experts % mp:
                what = f"Count is {layer.experts} experts"
                expected = f"expected a multiple of the {mp} NPUs that share them out"
                raise UserError(f"{layer.where}: {what}, {expected}")
            count = min(count, divide_up(layer.m, dp * mp))  # no more experts than rows
        cuts = {
            "m'": ("m", dp),
            "n'": ("n", mp),
            "k'": ("k", mp),
            "r": ("m", dp * layer.experts),
        }
        for share_name, (name, parts) in cuts.items():
            share = Share.of(name, sizes[name], parts, settings.shard_rounding)
            sizes[share_name] = share.size
            if share_name in layer_type.passes["forward"].sizes:  # all passes have the same shares
                shares.append(share)

        def collectives(rules: tuple[CollectiveRule, ...]) -> list[Collective]:
            possible = [rule.collective(layer, settings) for rule in rules]
            return [collective for collective in possible if collective]

        passes = {}
        for name, rule in layer_type.passes.items():
            if name == "forward" or name in settings.backward_passes:
                before, after = collectives(rule.before), collectives(rule.after)
                passes[name] = Pass(layer, name, count, rule.work(sizes), before, after)
        if settings.uses_fsdp:
            SHARDINGS[settings.sharding_strategy].apply(passes, settings.backward_passes[0])
        return cls(layer, dp, mp, shares, passes)

    @property
    def gathers_weights(self) -> bool:
        """Whether its weights are sharded, and gathered before they are used."""
        return any(collective.is_prefetched for collective in self.passes["forward"].before)

    @property
    def uneven_shares(self) -> list[Share]:
        """What is not divisible, so that NPUs have different shares."""
        return [share for share in self.shares if share.total % share.parts]

    def seems_sibling_of(self, before: LayerPlan) -> bool:
        """Tell whether this layer and the one before it may read the same input, as q, k and v."""
        first, second = before.layer, self.layer
        types = first.type, second.type
        same = first.strategy == second.strategy and (first.m, first.k) == (second.m, second.k)
        return types == ("COLUMN_PARALLEL", "COLUMN_PARALLEL") and same

    def mismatch_with(self, after: LayerPlan) -> str:
        """Return what is missing between this layer and the next; empty if they fit.

        The outputs of a layer have to be on the NPUs as the next one's inputs are, and gradients
        the other way round. A GEMM's collectives leave all that another GEMM needs.
        """
        first, second = self.layer, after.layer
        types = first.type, second.type
        pair = f"{first.name} ({first.type}) before {second.name} ({second.type})"
        if types == ("GEMM", "GEMM") or "EMBEDDING" in types:
            return ""
        if second.type == "EXPERT_DOWN" and first.type != "EXPERT_UP":
            return f"{pair} lacks an ALLTOALL"
        if first.type == "EXPERT_DOWN" or second.type == "EXPERT_UP":
            # Tokens come from, and go to, layers that split them over all NPUs.
            others = [plan for plan in (self, after) if not plan.layer.type.startswith("EXPERT")]
            if all(plan.mp == 1 for plan in others):
                return ""
            return f"{pair} lacks a resharding to tokens split over all NPUs, as by DATA"
        if first.strategy != second.strategy:
            return f"{pair} of another strategy lacks a resharding"
        if self.mp == 1 or types[0] == "EXPERT_UP" or after.seems_sibling_of(self):
            return ""
        first_type, second_type = LAYER_TYPES[first.type], LAYER_TYPES[second.type]
        if (first_type.outputs, second_type.inputs) == ("columns", "whole"):
            return f"{pair} lacks an ALLGATHER"
        is_trained = "input gradient" in self.passes
        gradients = (second_type.input_gradient, first_type.output_gradient)
        if is_trained and gradients == ("columns", "whole"):
            return f"{pair} lacks a collective of the gradient"
        return ""

    def resharding_before(self, after: LayerPlan, settings: Settings) -> dict[str, Collective]:
        """Return what is missing between two GEMMs of different strategies, forward and backward.

        The NPUs that split m of a layer have different rows of its outputs, and the others copies.
        So where the next layer splits m over fewer NPUs, rows have to be gathered. Backward an
        input gradient is reduced and scattered as the layer before wants it; but rows that are
        split already, where that layer wants columns, have to be exchanged.
        """
        first, second = self.layer, after.layer
        if (first.type, second.type) != ("GEMM", "GEMM"):
            return {}
        rows = {*STRATEGIES[first.strategy].split_m}
        next_rows = {*STRATEGIES[second.strategy].split_m}
        network = settings.network
        size = second.input_elements * settings.datatype_size
        parts = math.prod(network[dimension] for dimension in rows | next_rows)
        gather = Collective.over("ALLGATHER", size // parts, rows - next_rows, network)
        missing = {"forward": gather}
        if not settings.inference:
            share = size // settings.num_npus
            missing["backward"] = Collective.over("ALLTOALL", share, next_rows - rows, network)
        return {name: each for name, each in missing.items() if not each.is_alone}


class Plan:
    """What one NPU does in a training step: its layers, checks and totals."""

    ASTRASIM_1_LIMIT = 4 * 2**31  # bytes; a quarter of a collective has to fit into its 32-bit int

    def __init__(self, layers: list[Layer], settings: Settings) -> None:
        self.settings = settings
        self.layers = [LayerPlan.of(layer, settings) for layer in layers]

    @property
    def passes(self) -> list[Pass]:
        """The passes of all layers, in the order of layers.csv."""
        passes: list[Pass] = []
        for layer_plan in self.layers:
            passes += layer_plan.passes.values()
        return passes

    @property
    def collectives(self) -> list[tuple[Pass, Collective]]:
        """All collectives, each with its pass."""
        collectives = []
        for layer_pass in self.passes:
            for collective in layer_pass.collectives:
                collectives.append((layer_pass, collective))
        return collectives

    @property
    def gemms(self) -> dict[Gemm, Pass]:
        """The distinct GEMMs, each with the first pass that has it."""
        gemms: dict[Gemm, Pass] = {}
        for layer_pass in self.passes:
            if isinstance(layer_pass.work, Gemm):
                gemms.setdefault(layer_pass.work, layer_pass)
        return gemms

    @property
    def gemms_to_time(self) -> dict[Gemm, Pass]:
        """Those of passes whose cycles were not measured elsewhere."""
        to_time = {layer_pass.work for layer_pass in self.passes if not layer_pass.is_measured}
        return {gemm: layer_pass for gemm, layer_pass in self.gemms.items() if gemm in to_time}

    @property
    def embedding_position(self) -> int:
        """The number of layers above the embedding."""
        types = [layer_plan.layer.type for layer_plan in self.layers]
        return types.index("EMBEDDING")

    def check(self) -> None:
        """Warn of whatever may surprise; UserError for a collective that ASTRA-sim can't run."""
        if self.settings.uses_fsdp and not any(plan.gathers_weights for plan in self.layers):
            sharding = f"--sharding_strategy={self.settings.sharding_strategy}"
            expected = "expected --parallel=DATA or a hybrid"
            raise UserError(f"{sharding}: no data parallelism to shard over, {expected}")
        self.check_collectives()
        self.warn_of_shares()
        self.warn_of_convolutions()
        self.warn_of_neighbours()

    def warn_of_convolutions(self) -> None:
        """Warn of images, and of groups, that are split over NPUs."""
        for layer_plan in self.layers:
            layer, dp = layer_plan.layer, layer_plan.dp
            if layer.images is not None and layer.images < dp:
                what = f"{plural(layer.images, 'image')} over {dp} NPUs"
                advice = "--minibatch is the number of images of all NPUs"
                warn(f"{layer.name}: {what}, so that an image is split by pixels; {advice}")
                break
        for layer_plan in self.layers:
            layer, mp = layer_plan.layer, layer_plan.mp
            if 1 < layer.groups < mp:
                what = f"{layer.groups} groups are fewer than the {mp} NPUs that split the filters"
                advice = "cycles are approximate, collectives an upper bound"
                warn(f"{layer.name}: {what}: {advice}")
                break

    def warn_of_neighbours(self) -> None:
        """Warn of layers that do not fit together, and of siblings that may belong together."""
        unfitting = []
        resharded = []
        siblings = []
        for before, after in zip(self.layers, self.layers[1:]):
            first, second = before.layer, after.layer
            problem = before.mismatch_with(after)
            if problem:
                unfitting.append(f"{second.where}: {problem}")
            lacking = []
            for direction, collective in before.resharding_before(after, self.settings).items():
                lacking.append(f"{direction} an {collective.kind} of {collective.bytes:,} bytes")
            if lacking:
                pair = f"{first.name} ({first.strategy}) before {second.name} ({second.strategy})"
                resharded.append(f"{second.where}: {pair} lacks {' and '.join(lacking)}")
            is_trained = "input gradient" in after.passes
            if is_trained and after.mp > 1 and after.seems_sibling_of(before):
                pair = f"{second.name} seems to read the input of {first.name}"
                siblings.append(f"{second.where}: {pair}")
        warn_of_first(unfitting, ": no communication was added")
        warn_of_first(resharded, ": no communication was added")
        advice = "give such layers as one if the model fuses them"
        warn_of_first(siblings, f", and reduces its gradient again: {advice}")

    def check_collectives(self) -> None:
        """Refuse a collective of 0 bytes; warn of those that simulators treat differently."""
        small = []
        large = []
        for layer_pass, collective in self.collectives:
            name = f"{layer_pass.layer.where}: the {collective.kind} of {layer_pass}"
            if collective.bytes == 0:
                raise UserError(f"{name} is 0 bytes; ASTRA-sim would stop without a message")
            if collective.bytes < 4:
                small.append(f"{name} is {plural(collective.bytes, 'byte')}")
            counted = collective.bytes
            if collective.kind == "ALLGATHER" and collective.within > 1:
                counted *= collective.between  # as ASTRA-sim 1.0 was seen to do
            if counted >= self.ASTRASIM_1_LIMIT and not collective.is_alone:
                large.append(f"{name} is {collective.bytes:,} bytes")
        warn_of_first(small, ": with fewer than 4 ASTRA-sim may never end")
        if not self.settings.output_file:
            return  # what follows is about readers of the text file
        warn_of_first(large, ", too large for ASTRA-sim 1.0; ASTRA-sim 2.x runs it")
        alone = [collective for _, collective in self.collectives if collective.is_alone]
        if 0 < len(alone) < len(self.collectives):
            what = f"{plural(len(alone), 'collective')} of one member"
            warn(f"{what}: ASTRA-sim 1.0 skips such, Chakra's Text converter does not")

    def warn_of_shares(self) -> None:
        """Warn of sizes that are not divisible: one warning each, up to eight."""
        names_by_share: dict[Share, list[str]] = {}
        for layer_plan in self.layers:
            for share in layer_plan.uneven_shares:
                names_by_share.setdefault(share, []).append(layer_plan.layer.name)
        for share, names in list(names_by_share.items())[:8]:
            layers = names[0]
            if len(names) > 1:
                layers += f" and {plural(len(names) - 1, 'more layer')}"
            problem = f"is not divisible by {share.parts}"
            if share.total < share.parts:
                problem = f"is less than {share.parts}, so that some have none"
            timed = f"one NPU is timed with {share.size}"
            warn(f"{layers}: {share.name} = {share.total} {problem}, {timed}")
        if len(names_by_share) > 8:
            warn(f"{len(names_by_share) - 8} more sizes are not divisible")

    def set_cycles(self, gemm_cycles: dict[Gemm, int], bandwidth: int) -> None:
        """Give each pass that has none its cycles, from those of its GEMM."""
        for layer_pass in self.passes:
            if isinstance(layer_pass.work, Lookups):
                layer_pass.cycles = layer_pass.work.cycles(bandwidth)
            elif not layer_pass.is_measured:
                layer_pass.cycles = layer_pass.count * gemm_cycles[layer_pass.work]

    def warn_of_rounding(self, precisions: dict[Clock, str]) -> None:
        """Warn if rounding to whole ns or us moves the total of a pass by more than 1 %."""
        cycles = self.total_times(Clock("cycles", None))
        for clock, precision in precisions.items():
            for name, time_of_pass in self.total_times(clock).items():
                exact = cycles[name] * clock.cycle_length
                if exact and abs(time_of_pass / exact - 1) > 0.01:
                    change = float(time_of_pass / exact - 1)
                    what = f"moves the compute time of the {name} pass by {change:+.1%}"
                    warn(f"rounding to {precision} {what}")

    def total_times(self, clock: Clock) -> dict[str, int]:
        """Return the compute time of a training step, by pass."""
        totals: dict[str, int] = {}
        for layer_pass in self.passes:
            totals.setdefault(layer_pass.name, 0)
            totals[layer_pass.name] += clock.time(layer_pass.cycles)
        return totals

    def equal_layers(self) -> list[tuple[LayerPlan, int]]:
        """Return the first layer of each kind, and how many such layers there are anywhere."""
        alike: dict[Layer, list[LayerPlan]] = {}
        for layer_plan in self.layers:
            kind = layer_plan.layer._replace(name="", where="")
            alike.setdefault(kind, []).append(layer_plan)
        return [(layer_plans[0], len(layer_plans)) for layer_plans in alike.values()]

    @property
    def sent_bytes(self) -> int:
        """What one NPU sends in a training step."""
        return sum(collective.sent_bytes for _, collective in self.collectives)

    @property
    def sent_between_packages(self) -> int:
        """What of it leaves the package."""
        return sum(collective.sent_between_packages for _, collective in self.collectives)

    def total_collectives(self) -> list[tuple[str, int, int]]:
        """Return kind, number and bytes of all collectives, without those of one member."""
        sizes: dict[str, list[int]] = {kind: [] for kind in COLLECTIVE_KINDS}
        for _, collective in self.collectives:
            if not collective.is_alone:
                sizes[collective.kind].append(collective.bytes)
        return [(kind, len(each), sum(each)) for kind, each in sizes.items()]


# --- The accelerator: SCALE-Sim's config, and what follows from it

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


class Accelerator(NamedTuple):
    """A systolic array and its memory, as a SCALE-Sim config describes them."""

    rows: int
    columns: int
    dataflow: str  # os, ws or is
    bandwidth: int  # elements a cycle
    has_chosen_bandwidth: bool  # not that of the built-in config
    counts_stalls: bool
    config_source: str  # for messages
    given_config: str  # as the user wrote it
    merged_config: str  # as SCALE-Sim gets it

    def stall_free_cycles(self, gemm: Gemm) -> int:
        """Return the cycles of a GEMM, as SCALE-Sim v2 and v3 count them without stalls.

        By Samajdar et al., "A Systematic Methodology for Characterizing Scalability of DNN
        Accelerators using SCALE-Sim" (ISPASS 2020): folds of the array's size are loaded, streamed
        and drained. SCALE-Sim reports the number of the last cycle, counted from 0.
        """
        along_rows, along_columns, streamed, load = {
            "os": (gemm.m, gemm.n, gemm.k, 0),
            "ws": (gemm.k, gemm.n, gemm.m, self.rows),
            "is": (gemm.k, gemm.m, gemm.n, self.rows),
        }[self.dataflow]
        folds = divide_up(along_rows, self.rows) * divide_up(along_columns, self.columns)
        fold_cycles = load + self.rows + self.columns + streamed - 2
        return max(1, folds * fold_cycles - 1)

    def transfer_cycles(self, gemm: Gemm) -> int:
        """Return the cycles in which the memory moves each operand of a GEMM once."""
        return divide_up(gemm.elements, self.bandwidth)

    def warn_of_lookups(self, plan: Plan) -> None:
        """Warn of lookups at a bandwidth that nobody chose."""
        for layer_plan in plan.layers:
            if layer_plan.layer.type == "EMBEDDING" and not self.has_chosen_bandwidth:
                what = f"lookups are timed at {self.bandwidth} elements a cycle, the built-in"
                advice = "far below HBM; give Bandwidth in a --scalesim_config"
                warn(f"{layer_plan.layer.name}: {what} Bandwidth, {advice}")


class Config:
    """A SCALE-Sim config, merged over the built-in one."""

    # Switches that have to be off, and why.
    REFUSED_MODES = (
        ("sparsity", "SparsitySupport", "it would prune gradients too, which are dense"),
        ("layout", "IfmapCustomLayout", "the layout is a file for one GEMM"),
        ("layout", "FilterCustomLayout", "the layout is a file for one GEMM"),
        ("run_presets", "UseRamulatorTrace", "the traces are files for one GEMM"),
    )

    def __init__(self, source: str, text: str) -> None:
        self.source = source  # for messages
        self.text = text  # as the user wrote it
        self.spellings: dict[str, str] = {}  # of keys, which are in lower case elsewhere
        built_in = self.parsed(BUILT_IN_CONFIG)
        self.given = self.parsed(text)
        self.check_keys(built_in)
        self.merged = built_in
        self.merged.read_dict(self.given)
        self.merged["general"]["run_name"] = "gemm"  # SCALE-Sim passes it to a shell
        self.merged.remove_section("network_presets")  # SCALE-Sim 3.0.0 stops at it

    @classmethod
    def read(cls, path: Path | None) -> Config:
        """Return the config in a file; without a path, the built-in one."""
        if not path:
            return cls("the built-in config", BUILT_IN_CONFIG)
        return cls(str(path), read_text(path, "a SCALE-Sim config"))

    def parsed(self, text: str) -> configparser.ConfigParser:
        """Return the sections of a config, none of which is a default for the others."""

        def in_lower_case(key: str) -> str:
            return self.spellings.setdefault(key.lower(), key).lower()

        config = configparser.ConfigParser(interpolation=None, default_section="")
        config.optionxform = in_lower_case  # type: ignore[assignment,method-assign]
        try:
            config.read_string(text, self.source)
        except configparser.Error as error:
            raise UserError(f"{self.source}: {error}, expected a SCALE-Sim config") from None
        return config

    def check_keys(self, built_in: configparser.ConfigParser) -> None:
        """Refuse keys in the wrong section; warn of those that the built-in config lacks."""
        section_of = {}
        for section in built_in.sections():
            for key in built_in[section]:
                section_of[key] = section
        unknown = []
        for section in self.given.sections():
            for key in self.given[section]:
                name = self.spellings[key]
                if key in section_of and section_of[key] != section:
                    where = f"belongs in [{section_of[key]}], not [{section}]"
                    raise UserError(f"{self.source}: {name} {where}")
                if key in section_of or section == "network_presets":
                    continue
                near = difflib.get_close_matches(key, section_of, 1, cutoff=0.8)
                if near:
                    name += f" (did you mean {self.spellings[near[0]]}?)"
                unknown.append(f"[{section}] {name}")
        if unknown:
            what = f"keys unknown here are passed on to SCALE-Sim: {', '.join(unknown)}"
            warn(f"{self.source}: {what}; only cycles are read from its results")

    def accelerator(self) -> Accelerator:
        """Return the accelerator that it describes; UserError if it can't be used."""
        self.check_modes()
        self.check_presets()
        presets = self.merged["architecture_presets"]
        bandwidth = int(presets["Bandwidth"].partition(",")[0])
        is_given = self.given.has_option("architecture_presets", "Bandwidth")
        return Accelerator(
            rows=int(presets["ArrayHeight"]),
            columns=int(presets["ArrayWidth"]),
            dataflow=presets["Dataflow"],
            bandwidth=bandwidth,
            has_chosen_bandwidth=is_given and self.text != BUILT_IN_CONFIG,
            counts_stalls=self.counts_stalls,
            config_source=self.source,
            given_config=self.text,
            merged_config=self.merged_text(bandwidth),
        )

    @property
    def counts_stalls(self) -> bool:
        """Whether SCALE-Sim is to count how long the array waits for the memory."""
        return self.merged["run_presets"]["InterfaceBandwidth"] == "USER"

    def check_modes(self) -> None:
        """Refuse modes that prune, that need a file for each GEMM, or that do not exist."""
        for section, key, reason in self.REFUSED_MODES:
            value = self.merged[section][key]
            if value.lower() not in ("false", "no", "off", "0"):
                what = f"{key} is {quoted(value)}"
                raise UserError(f"{self.source}: {what}, expected False: {reason}")
        banks = self.merged["architecture_presets"]["MemoryBanks"]
        if banks != "1":
            what = f"MemoryBanks is {quoted(banks)}"
            reason = "the memory map of others is a file for one GEMM"
            raise UserError(f"{self.source}: {what}, expected 1: {reason}")
        mode = self.merged["run_presets"]["InterfaceBandwidth"]
        if mode not in ("CALC", "USER"):
            what = f"InterfaceBandwidth is {quoted(mode)}"
            raise UserError(f"{self.source}: {what}, expected CALC or USER")

    def check_presets(self) -> None:
        """Refuse a config in which what decides the cycles is missing or makes no sense."""
        presets = self.merged["architecture_presets"]
        sizes = ["ArrayHeight", "ArrayWidth"]
        if self.counts_stalls:
            sizes += ["Bandwidth", "IfmapSramSzkB", "FilterSramSzkB", "OfmapSramSzkB"]
        for key in (*sizes, "Dataflow"):
            if not self.given.has_option("architecture_presets", key):
                expected = "expected one, as it decides the cycles"
                raise UserError(f"{self.source}: no {key} in [architecture_presets], {expected}")
        for key in (*sizes, "Bandwidth"):  # with CALC that of lookups
            numbers = [presets[key]]
            if key == "Bandwidth":
                numbers = presets[key].split(",")  # SCALE-Sim reads one for each operand
            for number in numbers:
                if not whole_number(number.strip()):
                    what = f"{key} is {quoted(presets[key])}"
                    raise UserError(f"{self.source}: {what}, {expected_number(number.strip(), 1)}")
        if presets["Dataflow"] not in ("os", "ws", "is"):
            what = f"Dataflow is {quoted(presets['Dataflow'])}"
            raise UserError(f"{self.source}: {what}, expected os, ws or is")

    def merged_text(self, bandwidth: int) -> str:
        """Return the config as SCALE-Sim gets it, with banks that fit its bandwidth.

        With USER SCALE-Sim v3 reads operands at the bandwidth of the layout's banks, v2 at
        `Bandwidth`. So where no banks are given there is one, with all the bandwidth.
        """
        layout = self.merged["layout"]
        for operand in ("Ifmap", "Filter"):
            for key, value in (("Bandwidth", bandwidth), ("Num", 1)):
                bank_key = f"{operand}SRAMBank{key}"
                if self.counts_stalls and not self.given.has_option("layout", bank_key):
                    layout[bank_key] = str(value)
        text = io.StringIO()
        self.merged.write(text)
        return text.getvalue()


# --- Cycles measured elsewhere


class MeasuredCycles:
    """The table of --gemm_cycles: cycles of GEMMs, each of `count` of them."""

    NEEDED = ("M", "N", "K", "cycles")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cycles: dict[tuple[int, Gemm], int] = {}  # by how many GEMMs, and which
        (where, header), *rows = csv_rows(path) or [(f"{path}:1", [])]
        spellings = {name.lower(): name for name in (*self.NEEDED, "count", "type")}
        names = [spellings.get(cell.lower(), cell) for cell in header]
        for name in self.NEEDED:
            if name not in names:
                raise UserError(f"{where}: no column {name}, expected {','.join(self.NEEDED)}")
        for name in spellings.values():
            if names.count(name) > 1:
                raise UserError(f"{where}: two columns {name}, expected one")
        for where, cells in rows:
            if any(cells[len(names) :]):
                what = f"{len(cells)} columns, expected {len(names)} as in the header"
                raise UserError(f"{where}: {what}")
            self.read_line(TableLine(where, dict(zip(names, cells))))

    def read_line(self, line: TableLine) -> None:
        """Read a GEMM; skip the lines of layers.csv that are of no GEMM."""
        count = 1
        if line.text("count"):
            count = line.size("count", least=0)
        if count == 0 or line.text("type").upper() == "EMBEDDING":
            return
        for column in self.NEEDED:
            if not line.text(column):
                raise UserError(f"{line.where}: no {column}, expected {','.join(self.NEEDED)}")
        gemm = Gemm(line.size("M"), line.size("N"), line.size("K"))
        cycles = line.size("cycles")
        known = self.cycles.setdefault((count, gemm), cycles)
        if known != cycles:
            what = f"{cycles} cycles for {count} × {gemm}, and {known} above"
            raise UserError(f"{line.where}: {what}, expected one value")

    def apply_to(self, plan: Plan) -> str:
        """Give passes of a plan the cycles that the table has of them; return how many it had."""
        for layer_pass in plan.passes:
            work, count = layer_pass.work, layer_pass.count
            if not isinstance(work, Gemm):
                continue
            if (count, work) in self.cycles:
                layer_pass.cycles = self.cycles[count, work]
            elif (1, work) in self.cycles:
                layer_pass.cycles = count * self.cycles[1, work]
            else:
                continue
            layer_pass.is_measured = True
        found = len(plan.gemms) - len(plan.gemms_to_time)
        if not any(layer_pass.is_measured for layer_pass in plan.passes):
            warn(f"{self.path} has none of the GEMMs of this run")
        gemms = plural(len(plan.gemms), "distinct GEMM")
        return f"cycles of {found} of {gemms} are from {self.path}"


# --- Cycle models: from a plan's distinct GEMMs to their cycles


class Timing(NamedTuple):
    """The cycles of a plan's GEMMs, and what to say about them."""

    cycles: dict[Gemm, int]
    source: str  # where they come from
    cost: Sequence[str] = ()  # of a forecast: what it takes to get them, a line each


class CycleModel(ABC):
    """Gives each distinct GEMM its cycles; there is one model for each --cycle_model."""

    title: str  # for people
    version: str  # for the summary

    @abstractmethod
    def __init__(self, settings: Settings, accelerator: Accelerator) -> None: ...

    @abstractmethod
    def cycles(self, plan: Plan) -> Timing:
        """Return the cycles of each GEMM whose cycles were not measured."""

    def forecast(self, plan: Plan) -> Timing:
        """Return the same or, if it takes long, estimates and what it takes."""
        return self.cycles(plan)

    def notes(self, _: Plan) -> list[str]:
        """Return what to print below the totals of a plan that has its cycles."""
        return []


class AnalyticalModel(CycleModel):
    """Cycles by SCALE-Sim's formula, which cost nothing."""

    title = version = "analytical"

    def __init__(self, _: Settings, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        if accelerator.counts_stalls:
            what = f"{accelerator.config_source}: InterfaceBandwidth is USER"
            warn(f"{what}: without its stalls analytical cycles are a lower bound")

    def cycles(self, plan: Plan) -> Timing:
        """Return the cycles of each GEMM whose cycles were not measured."""
        cycles = {gemm: self.accelerator.stall_free_cycles(gemm) for gemm in plan.gemms_to_time}
        return Timing(cycles, self.title)


class RooflineModel(CycleModel):
    """Cycles by the array's formula or, if that takes longer, by the memory's bandwidth.

    By Williams et al., "Roofline: An Insightful Visual Performance Model" (2009). Each operand is
    moved once, at one bandwidth for all three.
    """

    title = version = "roofline"

    def __init__(self, _: Settings, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        if not accelerator.has_chosen_bandwidth:
            what = "--cycle_model=roofline needs the Bandwidth of the memory"
            expected = "expected a --scalesim_config with Bandwidth, in elements a cycle"
            raise UserError(f"{what}, {expected}")

    def cycles(self, plan: Plan) -> Timing:
        """Return the cycles of each GEMM whose cycles were not measured."""
        cycles = {}
        for gemm in plan.gemms_to_time:
            accelerator = self.accelerator
            cycles[gemm] = max(
                accelerator.stall_free_cycles(gemm), accelerator.transfer_cycles(gemm)
            )
        return Timing(cycles, self.title)

    def notes(self, plan: Plan) -> list[str]:
        """Return what part of a plan the memory bounds."""
        bound = [layer_pass for layer_pass in plan.passes if self.is_bound_by_memory(layer_pass)]
        cycles = sum(layer_pass.cycles for layer_pass in bound)
        part = cycles / sum(layer_pass.cycles for layer_pass in plan.passes)
        passes = f"{len(bound):,} of {plural(len(plan.passes), 'pass')}"
        return [f"the memory bounds {passes}, {part:.1%} of the compute time"]

    def is_bound_by_memory(self, layer_pass: Pass) -> bool:
        """Tell whether moving data takes longer than computing; lookups do nothing else."""
        if not isinstance(layer_pass.work, Gemm):
            return layer_pass.cycles > 0
        if layer_pass.is_measured:
            return False
        stall_free = self.accelerator.stall_free_cycles(layer_pass.work)
        return self.accelerator.transfer_cycles(layer_pass.work) > stall_free


# --- SCALE-Sim: one process for each GEMM; finished simulations; many at once


class Task(NamedTuple):
    """A distinct GEMM to simulate, with estimates."""

    gemm: Gemm
    first_use: str  # a pass, for messages
    cycles: int  # without stalls
    memory: int  # peak bytes
    seconds: float


class Simulation(NamedTuple):
    """What a SCALE-Sim process left, or what the cache has of it."""

    status: int  # its exit status
    files: dict[str, str]  # reports and log, by name
    cycles: int | None  # None: it failed


def run_scalesim(version: str, folder: str) -> None:
    """Run the SCALE-Sim in a folder on ./gemm.csv, in a process of its own.

    That process gets the source of this function, which is why it only uses what is imported in
    ScaleSim.program: a Dask worker does not have this script.
    """

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


def topology(gemms: Iterable[tuple[str, Gemm]]) -> str:
    """Return GEMMs as convolutions, which every SCALE-Sim reads: ifmap M x K, filters 1 x K."""
    columns = ",".join(Columns.CONVOLUTION[1:]).lower()
    lines = [f"layer name,{columns},strides,\n"]
    for name, (m, n, k) in gemms:
        plain_name = re.sub('[",]', "_", name)  # SCALE-Sim's reader knows no quotes
        lines.append(f"{plain_name},{m},{k},1,{k},1,{n},1,\n")
    return "".join(lines)


class ScaleSim:
    """A SCALE-Sim, v1, v2 or v3, with its config: simulates a GEMM, and reads its report."""

    LAYOUT = f"{'-,' * 21}\ngemm,{'1,' * 20}\n"  # v3 reads one even when layouts are off
    LOG = "scalesim.log"
    V1_MEMORY = 60_000_000  # bytes; v1 keeps its traces on disk

    def __init__(self, path: Path | None, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator
        self.program = (
            "import gc, inspect, os, runpy, shutil, sys, threading\n"
            "from pathlib import Path\n"
            "from typing import Any\n"
            f"{inspect.getsource(run_scalesim)}\n"
            "run_scalesim(*sys.argv[1:])"
        )
        self.version, _, self.digest = self.find()
        self.report_name, self.cycles_column = "COMPUTE_REPORT.csv", "Total Cycles"
        if self.version == "1":
            self.report_name, self.cycles_column = "gemm_cycles.csv", "Cycles"

    def find(self) -> tuple[str, Path, str]:
        """Return its version, the folder to import it from, and a digest of its code and config."""
        import hashlib
        import json

        path = self.path
        if path and (path / "scale.py").is_file() and (path / "run_nets.py").is_file():
            version, folder, files = "1", path, list(path.glob("*.py"))
        else:
            package = self.find_package()
            version = "3" if (package / "layout_utils.py").is_file() else "2"
            folder, files = package.parent, list(package.rglob("*.py"))
        code = {}
        for file in files:
            code[str(file.relative_to(folder))] = file.read_text("utf-8", "replace")
        results_depend_on = json.dumps([code, self.accelerator.merged_config], sort_keys=True)
        return version, folder, hashlib.sha256(results_depend_on.encode()).hexdigest()[:32]

    def find_package(self) -> Path:
        """Return the package's folder: at or in the path; without one, where Python finds it."""
        path = self.path
        places = []
        if path:
            places = [path, path / "scalesim"]
        elif spec := importlib.util.find_spec("scalesim"):
            places = [Path(place) for place in spec.submodule_search_locations or []]
        for place in places:
            # Its files are imported as scalesim.x.
            if place.name == "scalesim" and (place / "scale_sim.py").is_file():
                return place.absolute()
        expected = "expected scale.py and run_nets.py, or scalesim/"
        raise UserError(f"no SCALE-Sim in {path or sys.prefix}, {expected}")

    def task(self, gemm: Gemm, first_use: str) -> Task:
        """Return a GEMM with estimates of its simulation.

        Fitted to runs of v2 and v3 on arrays from 4 x 4 to 256 x 256. In 61 runs the memory was
        0.76 to 1 of its estimate, in 146 runs the time was 0.8 to 1.5 of its estimate.
        """
        rows, columns = self.accelerator.rows, self.accelerator.columns
        cycles = self.accelerator.stall_free_cycles(gemm)
        memory = 40_000_000 + cycles * (1130 + 17 * rows + 43 * columns) + 75 * gemm.elements
        if self.version == "1":
            memory = self.V1_MEMORY
        array_traffic = math.pow(cycles * (rows + columns) / 2, 1.3)
        seconds = 0.09 + 27e-6 * cycles + 7e-9 * array_traffic + 26e-8 * gemm.elements
        return Task(gemm, first_use, cycles, memory, seconds)

    def folder_here(self) -> Path:
        """Return the folder to import it from on this machine; UserError if its code is another.

        This machine may be a Dask worker's, and the code may have changed since the run began.
        """
        _, folder, digest = self.find()
        if digest != self.digest:
            what = f"the SCALE-Sim in {folder}"
            raise UserError(f"{what} is not the one that this run began with")
        return folder

    def simulate(
        self,
        gemm: Gemm,
        stdin: int = subprocess.PIPE,
        on_start: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
    ) -> Simulation:
        """Simulate a GEMM in a process group, which ends by itself once `stdin` is closed."""
        inputs = {
            "gemm.cfg": self.accelerator.merged_config,
            "gemm.csv": topology([("gemm", gemm)]),
            "layout.csv": self.LAYOUT,
        }
        python = [sys.executable, "-BXutf8", "-c", self.program]
        arguments = [self.version, str(self.folder_here())]
        with tempfile.TemporaryDirectory(
            prefix="gen_astrasim_", ignore_cleanup_errors=True
        ) as name:
            folder = Path(name)
            write_files(folder, inputs)
            with (
                (folder / self.LOG).open("wb") as log,
                subprocess.Popen(
                    [*python, *arguments],
                    cwd=folder,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdin=stdin,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C is for this process alone
                ) as process,
            ):
                on_start(process)
                status = process.wait()
            files = {}
            for report in folder.rglob(self.report_name):
                for file in report.parent.glob("*.csv"):
                    if file.is_file() and file.name not in inputs:
                        files[file.name] = file.read_text("utf-8", "replace")
            files[self.LOG] = (folder / self.LOG).read_text("utf-8", "replace")
        cycles = None
        if status == 0:
            cycles = self.reported_cycles(files)
        return Simulation(status, files, cycles)

    def reported_cycles(self, files: dict[str, str]) -> int | None:
        """Return the cycles in the report among these files; None if it is missing or cut off."""
        report = files.get(self.report_name, "")
        if not report.endswith("\n"):
            return None
        try:
            reader = csv.reader(io.StringIO(report), skipinitialspace=True)
            rows = [row for row in reader if any(row)]
            if len(rows) != 2:
                return None
            columns = [cell.strip() for cell in rows[0]]
            cycles = rows[1][columns.index(self.cycles_column)].strip()
        except (csv.Error, ValueError, IndexError):
            return None
        return whole_number(cycles.removesuffix(".0")) or None

    def failure(self, simulation: Simulation, task: Task, folder: Path) -> UserError:
        """Return the error for a simulation without cycles, whose log is in `folder`."""
        lines = []
        for line in simulation.files[self.LOG].splitlines():
            if line.strip():
                lines.append(line.strip()[:200])
        last_lines = " | ".join(lines[-3:])
        status = simulation.status
        if status < 0:
            problem = f"killed, {signal.strsignal(-status)}"
        elif status > 0:
            problem = f"exit status {status}"
        else:
            what = f"no {self.report_name} with one row"
            problem = f"{what} and a number >= 1 as {self.cycles_column}"
        if status == -signal.SIGKILL or "MemoryError" in last_lines:
            problem += " (out of memory? fewer --jobs may help, or --cycle_model=analytical)"
        what = f"SCALE-Sim failed on GEMM {task.gemm} ({task.first_use}): {problem}"
        said = "no output"
        if last_lines:
            said = f"its last output: {last_lines}"
        return UserError(f"{what}; {said}; log: {folder / self.LOG}")


class Cache:
    """Finished simulations, <folder>/<M>x<N>x<K>.json, of one SCALE-Sim and config."""

    def __init__(self, cache_dir: Path | None, scalesim: ScaleSim) -> None:
        self.scalesim = scalesim
        self.folder = None
        if cache_dir:
            self.folder = cache_dir / scalesim.digest

    def load(self, gemm: Gemm) -> Simulation | None:
        """Return a GEMM's simulation; None if there is none that can be trusted."""
        if not self.folder:
            return None
        import json

        try:
            path = self.folder / f"{gemm}.json"
            if not stat.S_ISREG(path.lstat().st_mode):
                return None  # reading a pipe would not end
            entry = json.loads(path.read_bytes())
            files = entry["files"]
            "".join(files.values()).encode()  # fails where it is no text
            if entry["gemm"] != str(gemm):
                return None
        except Exception:  # whatever an entry is, it is simulated again and replaced
            return None
        for name in files:
            if not re.fullmatch(r"\w[\w.-]{0,99}", name):
                return None  # it would be written outside the run folder
        cycles = self.scalesim.reported_cycles(files)
        if not cycles:
            return None
        return Simulation(0, files, cycles)

    def store(self, gemm: Gemm, simulation: Simulation) -> None:
        """Keep a simulation; if that fails, warn and cache no more."""
        if not self.folder or not simulation.cycles:
            return
        import json

        entry = json.dumps({"gemm": str(gemm), "files": simulation.files})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{gemm}.json") as part:
                part.write_bytes(entry.encode())
        except OSError as error:
            warn(f"can't cache in {self.folder}: {error.strerror}; going on without")
            self.folder = None


class Machine:
    """What this machine has for new processes, within its control groups (version 2)."""

    CONTROL_GROUPS = Path("/sys/fs/cgroup")
    OWN_CONTROL_GROUP = Path("/proc/self/cgroup")

    def __init__(self) -> None:
        self.groups: list[Path] = []  # the folders of those that hold this process
        with suppress(OSError):  # not Linux
            for line in self.OWN_CONTROL_GROUP.read_text().splitlines():
                if line.startswith("0::/"):
                    innermost = self.CONTROL_GROUPS / line.removeprefix("0::/")
                    self.groups = [innermost, *innermost.parents]

    def cpus(self) -> int:
        """Return how many CPUs new processes may keep busy."""
        cpus = os.cpu_count() or 1
        if sys.platform != "darwin":
            cpus = len(os.sched_getaffinity(0))
        for group in self.groups:
            with suppress(OSError):  # no limit there
                quota, period = (group / "cpu.max").read_text().split()
                if quota != "max":
                    cpus = min(cpus, divide_up(int(quota), int(period)))
        return max(1, cpus)

    def memory(self) -> float:
        """Return how many bytes of memory new processes may fill."""
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with suppress(OSError):
            words = Path("/proc/meminfo").read_text().split()
            available = min(available, int(words[words.index("MemAvailable:") + 1]) * 1024)
        for group in self.groups:
            with suppress(OSError):  # no limit there
                limit = (group / "memory.max").read_text().strip()
                words = (group / "memory.stat").read_text().split()
                if limit != "max":
                    used = int(words[words.index("anon") + 1])  # without what files cache
                    available = min(available, int(limit) - used)
        return max(0, available)


def gigabytes(size: float) -> str:
    """Return bytes for people."""
    return f"{size / 1e9:,.1f} GB"


def duration(seconds: float) -> str:
    """Return seconds for people, as s, min or h."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.0f} h"


Submit = Callable[[Task], "Future[Simulation]"]
Round = tuple[list[Task], dict[Task, Simulation]]  # what runs, and what has finished


class Pool(ABC):
    """Runs simulations side by side, as slots and memory allow."""

    def __init__(self, scalesim: ScaleSim, slots: int, memory: float, title: str) -> None:
        self.scalesim = scalesim
        self.slots = slots
        self.memory = memory  # bytes that simulations may fill; infinite where Dask limits it
        self.title = title

    @abstractmethod
    def started(self) -> AbstractContextManager[Submit]:
        """Give a function that starts a simulation; at the end stop those that still run."""

    @abstractmethod
    def check(self) -> None:
        """Raise UserError if simulations that run can't end any more; called each second."""

    def run(self, tasks: list[Task]) -> Generator[Round, None, None]:
        """Simulate tasks in their order, as memory allows.

        Yield at least once a second what runs and what has finished since the last time.
        """
        waiting = [*tasks]
        running: dict[Task, Future[Simulation]] = {}
        free = self.memory
        with self.started() as submit:
            while waiting or running:
                fitting = [task for task in waiting if task.memory <= free]
                if waiting and not running and not fitting:
                    fitting = waiting  # one that never fits has to run alone
                if fitting and len(running) < self.slots:
                    task = fitting[0]
                    waiting.remove(task)
                    running[task] = submit(task)
                    free -= task.memory
                    continue
                self.check()
                done = wait(running.values(), timeout=1, return_when=FIRST_COMPLETED).done
                finished = {}
                for task, future in list(running.items()):
                    if future in done:
                        finished[task] = future.result()
                        del running[task]
                        free += task.memory
                yield list(running), finished

    def check_memory(self, tasks: list[Task]) -> None:
        """Refuse a simulation that needs more memory than is free; with one slot only warn."""
        largest = max(tasks, key=lambda task: task.memory)
        if largest.memory <= self.memory:
            return
        what = f"GEMM {largest.gemm} ({largest.first_use}) needs about"
        problem = f"{what} {gigabytes(largest.memory)} of memory, {gigabytes(self.memory)} is free"
        if self.slots > 1:
            options = "--cycle_model=analytical needs none, --jobs=1 tries it all the same"
            raise UserError(f"{problem}; {options}")
        warn(f"{problem}; it may be killed, try --cycle_model=analytical")

    def time_range(self, tasks: list[Task]) -> str:
        """Return how long simulations take. They slow each other down, so it is a wide range."""
        slots = min(self.slots, len(tasks))
        if self.memory < math.inf:
            largest = max(task.memory for task in tasks)
            slots = max(1, min(slots, int(self.memory // largest)))
        longest = max(task.seconds for task in tasks)
        shared = sum(task.seconds for task in tasks) / slots
        # Wider than what single estimates were found to be off by, 0.8 to 1.5.
        least, most = 0.6 * max(longest, shared), 2.2 * (longest + shared)
        return f"{duration(least)} to {duration(most)}"

    def forecast(self, tasks: list[Task]) -> list[str]:
        """Return what memory and time simulations need."""
        largest = max(tasks, key=lambda task: task.memory)
        need = f"largest simulation: {gigabytes(largest.memory)} estimated"
        if self.memory < math.inf:
            need += f", {gigabytes(self.memory)} free"
        if largest.memory > self.memory:
            need += f": too much for GEMM {largest.gemm} ({largest.first_use})"
        return [need, f"time with {self.title}: {self.time_range(tasks)} estimated"]


class LocalPool(Pool):
    """A pool on this machine."""

    def __init__(self, scalesim: ScaleSim, jobs: int | None) -> None:
        machine = Machine()
        slots = jobs or machine.cpus()
        super().__init__(scalesim, slots, machine.memory(), f"--jobs={slots}")

    @contextmanager
    def started(self) -> Iterator[Submit]:
        """Give a function that starts a simulation here; at the end kill those that still run.

        A process is killed with its group, as it may have started others. It also ends by itself
        once its stdin is closed, but not while it runs no Python; that is for when this script is
        killed.
        """
        their_end, our_end = os.pipe()
        threads = ThreadPoolExecutor(self.slots)
        processes: list[subprocess.Popen[bytes]] = []
        lock = threading.Lock()
        is_over = False

        def kill(process: subprocess.Popen[bytes]) -> None:
            with suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

        def on_start(process: subprocess.Popen[bytes]) -> None:
            with lock:
                processes.append(process)
                if is_over:
                    kill(process)

        def simulate(task: Task) -> Simulation:
            return self.scalesim.simulate(task.gemm, their_end, on_start)

        try:
            yield lambda task: threads.submit(simulate, task)
        finally:
            with lock:
                is_over = True
                for process in processes:
                    kill(process)
            os.close(our_end)
            threads.shutdown(cancel_futures=True)
            os.close(their_end)

    def check(self) -> None:
        """Do nothing: the end of a process here is always seen."""


class DaskPool(Pool):
    """A pool on a Dask cluster, whose workers see to their own memory."""

    ANSWER_SECONDS = 60

    def __init__(self, scalesim: ScaleSim, address: str) -> None:
        super().__init__(scalesim, sys.maxsize, math.inf, "a Dask worker for each GEMM")
        self.address = address
        self.flag = f"--dask_scheduler={address}"
        self.client: Any = None  # distributed.Client
        self.next_look = 0.0  # at the workers, in monotonic seconds

    def bounded(self, call: Callable[[], Any], what: str) -> Any:
        """Return what a call to Dask returns; UserError if it fails, or does not return in time.

        Dask's own time-outs do not reach every wait for a server that says nothing.
        """
        answer: Future[Any] = Future()

        def answer_by_call() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:  # whatever Dask makes of an address
                answer.set_exception(error)

        threading.Thread(target=answer_by_call, daemon=True).start()
        try:
            return answer.result(self.ANSWER_SECONDS)
        except FutureTimeout:
            problem = f"no answer in {self.ANSWER_SECONDS} s"
        except Exception as error:
            problem = str(error) or type(error).__name__
        raise UserError(f"{self.flag} {what}: {problem}")

    @contextmanager
    def started(self) -> Iterator[Submit]:
        """Give a function that starts a simulation on a worker."""

        def on_worker(scalesim: ScaleSim, gemm: Gemm) -> Simulation:
            try:
                return scalesim.simulate(gemm)
            except UserError as error:
                raise UserError(f"Dask worker on {os.uname().nodename}: {error}") from None

        logging.disable()  # Dask's own tracebacks
        try:
            from distributed import Client, KilledWorker
            from distributed.comm import CommClosedError
        except ImportError as error:
            raise UserError(f"{self.flag} needs Dask: {error}") from None

        def connect() -> Any:
            return Client(self.address, timeout=20, set_as_default=False)

        Client.__del__ = lambda _: None  # it would try for 40 s to end what never began
        warnings.filterwarnings("ignore", module="distributed")
        self.client = self.bounded(connect, "can't be reached")
        self.check()
        workers = self.client.get_executor(pure=False)

        def submit(task: Task) -> Any:
            priority = min(task.cycles, 2**62)  # Dask sends 64 bits
            return workers.submit(on_worker, self.scalesim, task.gemm, priority=priority)

        try:
            yield submit
        except (KilledWorker, CommClosedError, CancelledError) as error:
            raise UserError(f"{self.flag} lost a simulation: {error!r}") from None
        finally:
            workers.shutdown(wait=False)
            with suppress(UserError):
                self.bounded(self.client.close, "can't be closed")

    def check(self) -> None:
        """Raise UserError if the scheduler is gone; each minute look whether there are workers.

        Those with another Python can't read what is sent, end, and perhaps come again.
        """
        if self.client.status != "running":
            raise UserError(f"{self.flag} has ended or lost the connection")
        if time.monotonic() < self.next_look:
            return
        import platform

        self.next_look = time.monotonic() + 60
        try:
            workers = self.bounded(self.client.get_versions, "does not answer")["workers"]
        except UserError as error:
            say("waiting", str(error))  # a machine may be suspended
            return
        here = platform.python_version_tuple()[:2]
        for worker, versions in workers.items():
            python = versions["host"]["python"]
            if tuple(python.split(".")[:2]) != here:
                expected = f"expected {'.'.join(here)} as here"
                raise UserError(f"Dask worker {worker} has Python {python}, {expected}")
        if not workers:
            what = f"the Dask scheduler at {self.address} has no workers"
            say("waiting", f"{what}; they need Python {'.'.join(here)}")


class Progress:
    """Says how far simulations are: in a line at the start, then in a bar or a line a minute."""

    def __init__(self, tasks: list[Task], time_range: str) -> None:
        try:
            from tqdm import tqdm  # takes a tenth of a warm run
        except ImportError:
            raise UserError("simulating needs tqdm: pip install -r requirements.txt") from None

        tqdm.get_lock()  # type: ignore[no-untyped-call] # a Ctrl-C while it is made would be lost
        tqdm.monitor_interval = 0  # no thread for it: `show` is called each second
        self.number = len(tasks)
        self.total = sum(task.seconds for task in tasks)
        self.finished = 0
        self.started = self.last_line = time.monotonic()
        memory = gigabytes(max(task.memory for task in tasks))
        what = f"{plural(self.number, 'GEMM')}, {time_range}"
        say("simulating", f"{what}, up to {memory} of memory each")
        self.bar = tqdm(
            desc=self.done(0),
            total=self.total,
            bar_format=f"{{desc}} |{{bar}}| {{elapsed}} of {time_range}",
            disable=None,  # where stderr is no terminal
            dynamic_ncols=True,
            leave=False,
        )

    def done(self, running: int) -> str:
        """Return how many GEMMs are finished, and how many run."""
        return f"{self.finished} of {plural(self.number, 'GEMM')}, {running} running"

    def show(self, running: list[Task], finished: Iterable[Task]) -> None:
        """Show what has finished since the last call, what runs, and the time."""
        for task in finished:
            self.finished += 1
            self.bar.update(min(task.seconds, self.total - self.bar.n))  # sums differ by rounding
        self.bar.set_description_str(self.done(len(running)))
        now = time.monotonic()
        if self.bar.disable and now > self.last_line + 60:
            self.last_line = now
            say("simulating", f"{self.done(len(running))} after {duration(now - self.started)}")


# --- The simulated model, and the table of models


class SimulatedModel(CycleModel):
    """Cycles by SCALE-Sim, which simulates what the cache does not hold."""

    def __init__(self, settings: Settings, accelerator: Accelerator) -> None:
        self.run_folder = settings.run_folder
        self.scalesim = ScaleSim(settings.scalesim_path, accelerator)
        self.cache = Cache(settings.cache_dir, self.scalesim)
        self.version = self.scalesim.version
        self.title = f"SCALE-Sim v{self.version}"
        self.pool: Pool
        if settings.dask_scheduler:
            self.pool = DaskPool(self.scalesim, settings.dask_scheduler)
        else:
            self.pool = LocalPool(self.scalesim, settings.jobs)

    def cycles(self, plan: Plan) -> Timing:
        """Return the cycles of each GEMM; UserError if SCALE-Sim fails."""
        cached, new = self.cached_and_new(self.tasks(plan))
        source = f"{len(new)} simulated, {len(cached)} from the cache"
        cycles = {}
        for task, simulation in cached.items():
            cycles[task.gemm] = self.save_reports(task, simulation)
        if new:
            cycles.update(self.simulated(new))
        return Timing(cycles, source)

    def forecast(self, plan: Plan) -> Timing:
        """Return cycles by the formula, and what the simulations take."""
        tasks = self.tasks(plan)
        cached, new = self.cached_and_new(tasks)
        cycles = sum(task.cycles for task in new)
        what = f"{len(cached)} in the cache, {len(new)} to simulate"
        lines = [f"{what}: {cycles:,} estimated cycles"]
        if new:
            lines += self.pool.forecast(new)
        return Timing({task.gemm: task.cycles for task in tasks}, "estimated", lines)

    def tasks(self, plan: Plan) -> list[Task]:
        """Return each distinct GEMM with estimates of its simulation, the longest first."""
        tasks = []
        for gemm, layer_pass in plan.gemms_to_time.items():
            tasks.append(self.scalesim.task(gemm, first_use=str(layer_pass)))
        return sorted(tasks, key=lambda task: -task.cycles)

    def cached_and_new(self, tasks: list[Task]) -> tuple[dict[Task, Simulation], list[Task]]:
        """Return what the cache holds, and what is left to simulate."""
        cached = {}
        new = []
        for task in tasks:
            simulation = self.cache.load(task.gemm)
            if simulation:
                cached[task] = simulation
            else:
                new.append(task)
        return cached, new

    def simulated(self, tasks: list[Task]) -> dict[Gemm, int]:
        """Simulate GEMMs and return their cycles; after a Ctrl-C what is finished stays cached."""
        self.pool.check_memory(tasks)
        progress = Progress(tasks, self.pool.time_range(tasks))
        cycles = {}
        try:
            with closing(self.pool.run(tasks)) as rounds, progress.bar:
                for running, finished in rounds:
                    for task, simulation in finished.items():
                        self.cache.store(task.gemm, simulation)
                        cycles[task.gemm] = self.save_reports(task, simulation)
                    progress.show(running, finished)
        except KeyboardInterrupt:
            done = f"{len(cycles)} of {plural(len(tasks), 'GEMM')} finished"
            if self.cache.folder:
                done += f" and cached in {self.cache.folder}: run the same command to go on"
            say("interrupted", done)
            raise
        return cycles

    def save_reports(self, task: Task, simulation: Simulation) -> int:
        """Write a simulation's reports, even of one that failed; return its cycles."""
        folder = self.run_folder / f"gemm_{task.gemm}"
        write_files(folder, simulation.files)
        if not simulation.cycles:
            raise self.scalesim.failure(simulation, task, folder)
        return simulation.cycles


MODELS: dict[str, type[CycleModel]] = {
    "simulated": SimulatedModel,
    "analytical": AnalyticalModel,
    "roofline": RooflineModel,
}
flags.DEFINE_enum(
    "cycle_model",
    "simulated",
    [*MODELS],
    "Cycles from SCALE-Sim, from its formula, or from that and the memory's bandwidth.",
)


# --- What ASTRA-sim reads: the workload file, and execution traces for 2.x


def workload_text(plan: Plan, settings: Settings) -> str:
    """Return the workload file: times in --time_unit, and collectives in bytes."""
    clock = settings.text_clock
    first_line = settings.parallel
    layers = plan.layers
    if settings.parallel == DLRM:
        position = plan.embedding_position
        layers = [layers[position], *layers[:position], *layers[position + 1 :]]
        first_line = f"{DLRM}\t{position}"  # the index of the last bottom layer
    lines = [first_line, str(len(layers))]
    for layer_plan in layers:
        words: list[object] = [layer_plan.layer.name, -1]  # a dependency: none
        for name in PASSES:
            compute_time, collective = 0, NO_COLLECTIVE
            if layer_pass := layer_plan.passes.get(name):
                compute_time = clock.time(layer_pass.cycles)
                # The text has one for each pass. Only experts have one before a pass, and then none
                # after it; FSDP, where there may be several, writes no text.
                collective = [*layer_pass.after, *layer_pass.before, NO_COLLECTIVE][0]
            words += [compute_time, collective.kind, collective.bytes]
        words.append(settings.update_time)
        if settings.parallel == CUSTOMIZED:  # otherwise ASTRA-sim 1.0 takes it for the next name
            words.append(layer_plan.layer.strategy)
        lines.append("\t".join(str(word) for word in words))
    return "\n".join(lines) + "\n"


Nodes = list[int]  # ids of nodes of a trace that a later one waits for


class Chakra:
    """The messages of MLCommons Chakra, as far as a trace uses them."""

    COMP_NODE, COMM_COLL_NODE = 4, 7  # types of nodes
    NOT_ON_CPU: ClassVar = {"name": "is_cpu_op", "bool_val": False}
    # Each message's fields: name, number, type and whether it is repeated.
    MESSAGES: ClassVar = {
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

    def __init__(self) -> None:
        try:
            from google.protobuf import descriptor_pb2, message_factory
            from google.protobuf.proto import serialize_length_prefixed
        except ImportError:
            raise UserError("--chakra_et needs protobuf: pip install -r requirements.txt") from None

        # Chakra's are proto3 with the values in a oneof, which is written even where it is 0. In
        # proto2 every value that is set is written.
        schema = descriptor_pb2.FileDescriptorProto(name="chakra.proto", syntax="proto2")
        for message, fields in self.MESSAGES.items():
            declared = schema.message_type.add(name=message)
            for name, number, kind, is_repeated in fields:
                member = declared.field.add(name=name, number=number)
                member.label = member.LABEL_REPEATED if is_repeated else member.LABEL_OPTIONAL
                if kind in self.MESSAGES:
                    member.type_name = kind
                else:
                    member.type = member.Type.Value(f"TYPE_{kind.upper()}")
        messages: dict[str, Any] = message_factory.GetMessages([schema])
        self.metadata = messages["GlobalMetadata"]
        self.node = messages["Node"]
        self.write = serialize_length_prefixed


class Trace:
    """The execution trace of any NPU: the training loop of ASTRA-sim 1.0, in us."""

    def __init__(self, settings: Settings, chakra: Chakra) -> None:
        self.settings = settings
        self.clock = settings.trace_clock
        self.chakra = chakra
        sharding = SHARDINGS.get(settings.sharding_strategy)
        self.frees_weights = sharding is not None and sharding.gathers_again
        self.stream = io.BytesIO()
        self.next_id = 0
        chakra.write(chakra.metadata(version="0.0.4"), self.stream)

    def contents(self, plan: Plan) -> bytes:
        """Return the trace of all training steps."""
        layers = plan.layers
        updated: list[Nodes] = [[] for _ in layers]  # what a layer's next step waits for
        for _ in range(self.settings.num_passes):
            if self.settings.parallel == DLRM:
                updated = self.dlrm_step(layers, updated, plan.embedding_position)
            else:
                updated = self.step(layers, updated)
        return self.stream.getvalue()

    def step(self, layers: list[LayerPlan], updated: list[Nodes]) -> list[Nodes]:
        """Add a training step; return what the next step's layers wait for."""
        computed, done = self.forward(layers, updated, [])
        if self.settings.inference:
            return [done for _ in layers]
        _, now_updated = self.backward(layers, done, first=layers[0], forward_computed=computed)
        return now_updated

    def dlrm_step(
        self, layers: list[LayerPlan], updated: list[Nodes], position: int
    ) -> list[Nodes]:
        """Add a training step of a DLRM; return what the next step's layers wait for.

        The embedding's ALLTOALLs run beside the bottom MLP, forward and backward. As in ASTRA-sim
        1.0 the first layer of the bottom MLP computes an input gradient too.
        """
        bottom, embedding, top = layers[:position], layers[position], layers[position + 1 :]
        looked_up, exchanged = self.add_pass(embedding.passes["forward"], updated[position])
        _, bottom_done = self.forward(bottom, updated[:position], looked_up)
        _, top_done = self.forward(top, updated[position + 1 :], bottom_done + exchanged)
        if self.settings.inference:
            return [top_done for _ in layers]

        top_back, top_updated = self.backward(top, top_done)
        _, returned = self.add_pass(embedding.passes["input gradient"], top_back)
        bottom_back, bottom_updated = self.backward(bottom, top_back)
        update = embedding.passes["weight gradient"]
        tables_updated, _ = self.add_pass(update, bottom_back + returned)
        return [*bottom_updated, tables_updated, *top_updated]

    def forward(
        self, layers: list[LayerPlan], updated: list[Nodes], waits_for: Nodes
    ) -> tuple[Nodes, Nodes]:
        """Add the forward pass of layers; return the nodes that end its computing, and all of it.

        Weights are gathered once all of them are updated and the layer before the one before has
        computed. PyTorch holds the weights of two layers, one in use and one prefetched.
        """
        computed: Nodes = []
        ends: list[Nodes] = [[], []]  # of sharded layers' computing; the first two have none before
        weights_updated: Nodes = []
        for layer_plan, layer_updated in zip(layers, updated):
            if layer_plan.gathers_weights:
                weights_updated += layer_updated
        for layer_plan, layer_updated in zip(layers, updated):
            layer_pass = layer_plan.passes["forward"]
            before = waits_for + layer_updated
            gathered_after = [*weights_updated]
            if self.frees_weights:
                gathered_after += ends[-2]
            computed, waits_for = self.add_pass(layer_pass, before, gathered_after)
            if layer_plan.gathers_weights:
                ends.append(computed)
        return computed, waits_for

    def backward(
        self,
        layers: list[LayerPlan],
        waits_for: Nodes,
        first: LayerPlan | None = None,
        forward_computed: Sequence[int] = (),
    ) -> tuple[Nodes, list[Nodes]]:
        """Add the backward pass of layers; return the nodes that end it and each layer's update.

        With DATA, and in a DLRM, the weight gradient comes first; its collective runs beside all
        that follows. Otherwise the input gradient comes first; its collective runs beside the
        weight gradient. As in ASTRA-sim 1.0 nothing follows the input gradient of the first layer
        of a network, and with DATA it is not computed either. Weights are gathered as in forward,
        those of the last two layers once its computing has ended.
        """
        updated: list[Nodes] = []
        ends = [[*forward_computed], [*forward_computed]]
        for layer_plan in reversed(layers):
            ended = {"input gradient": waits_for}  # with its collective, unlike what is computed
            computed = waits_for
            for name in self.settings.backward_passes:
                layer_pass = layer_plan.passes[name]
                if layer_plan is first and name == "input gradient":
                    if self.settings.parallel == "DATA":
                        continue
                    layer_pass = layer_pass.without_end()
                computed, ended[name] = self.add_pass(layer_pass, computed, ends[-2])
            if layer_plan.gathers_weights:
                ends.append(computed)
            updated.insert(0, ended["weight gradient"])
            waits_for = ended["input gradient"] + computed
        return waits_for, updated

    def add_pass(
        self, layer_pass: Pass, waits_for: Nodes, gathered_after: Sequence[int] = ()
    ) -> tuple[Nodes, Nodes]:
        """Add a pass; return the nodes that end its computing, and all of it.

        Weights are gathered after other nodes than those that all else waits for.
        """
        ready = waits_for
        gathered: Nodes = []
        for collective in layer_pass.before:
            if collective.is_prefetched:
                gathered = self.communicate(layer_pass, [collective], [*gathered_after])
            else:
                ready = self.communicate(layer_pass, [collective], ready)
        computed = self.compute(layer_pass, ready + gathered)
        return computed, self.communicate(layer_pass, layer_pass.after, computed)

    def compute(self, layer_pass: Pass, waits_for: Nodes) -> Nodes:
        """Add the computing of a pass, if it takes time; return the nodes that end with it."""
        if layer_pass.cycles == 0:
            return waits_for
        return self.add(
            layer_pass,
            f"{layer_pass.layer.name} {layer_pass.name}",
            waits_for,
            type=Chakra.COMP_NODE,
            duration_micros=self.clock.time(layer_pass.cycles),
            attr=[Chakra.NOT_ON_CPU],
        )

    def communicate(
        self, layer_pass: Pass, collectives: list[Collective], waits_for: Nodes
    ) -> Nodes:
        """Add collectives of a pass, one after the other; return the nodes that end with them."""
        ended = waits_for
        for collective in collectives:
            if collective.is_alone:
                continue  # ASTRA-sim ends silently at a collective of one member
            involved = []
            group = (collective.within, collective.between)
            for npus, members in zip(self.settings.network, group):
                if npus > 1:  # the network has no dimension of one
                    involved.append(members > 1)
            ended = self.add(
                layer_pass,
                f"{layer_pass.layer.name} {layer_pass.name} {collective.kind}",
                ended,
                type=Chakra.COMM_COLL_NODE,
                attr=[
                    Chakra.NOT_ON_CPU,
                    {"name": "comm_type", "int64_val": COLLECTIVE_KINDS[collective.kind]},
                    {"name": "comm_size", "int64_val": collective.bytes},
                    {"name": "involved_dim", "bool_list": {"values": involved}},
                ],
            )
        return ended

    def add(self, layer_pass: Pass, name: str, waits_for: Nodes, **fields: Any) -> Nodes:
        """Write a node that starts after others; return it, for later nodes to wait for."""
        dependencies = dict.fromkeys(waits_for)  # ASTRA-sim stops at one that is listed twice
        try:
            node = self.chakra.node(id=self.next_id, name=name, data_deps=dependencies, **fields)
        except ValueError:
            what = f"{layer_pass.layer.where}: {layer_pass} in a trace"
            raise UserError(f"{what}: value exceeds 64 bits") from None
        self.next_id += 1
        self.chakra.write(node, self.stream)
        return [node.id]


# --- What people read: the printed table, layers.csv, the summary


def aligned(lines: Sequence[Sequence[str]], sides: Sequence[str]) -> list[str]:
    """Return lines of cells as text, each column aligned to its side, < or >."""
    widths = [len(max(column, key=len)) for column in zip(*lines)]
    texts = []
    for line in lines:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)]
        texts.append("  ".join(cells).rstrip())
    return texts


class Report:
    """A plan for people: the printed table, the files of the run folder, the summary's row."""

    SUMMARY = (
        "mnk",
        "parallel",
        "num_npus",
        "num_packages",
        "datatype_size",
        "minibatch",
        "inference",
        "sharding_strategy",
        "cycle_model",
        "gemm_cycles",
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
        "sent_within_package",
        "sent_between_packages",
        "distinct_gemms",
        "output_file",
        "run_name",
        "shard_rounding",
        "scalesim_version",
        "array",
        "dataflow",
    )

    def __init__(
        self, settings: Settings, plan: Plan, accelerator: Accelerator, model: CycleModel
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.accelerator = accelerator
        self.model = model

    def title(self) -> list[str]:
        """Return a line about the system, and one about the accelerator."""
        settings, accelerator = self.settings, self.accelerator
        system = f"{settings.parallel} on {plural(settings.num_npus, 'NPU')}"
        system += f" in {plural(settings.num_packages, 'package')}"
        degrees = {(layer_plan.dp, layer_plan.mp) for layer_plan in self.plan.layers}
        if len(degrees) == 1:
            dp, mp = degrees.pop()
            system += f", dp {dp} x mp {mp}"
        if settings.minibatch > 1:
            system += f", minibatch {settings.minibatch:,}"
        array = f"{accelerator.rows} x {accelerator.columns} array, {accelerator.dataflow}"
        array += f", {self.model.title}"
        if settings.clock_mhz:
            array += f", {settings.clock_mhz:g} MHz"
        return [system, array]

    def printed(self) -> list[str]:
        """Return what one NPU does in each layer, and in a training step."""
        clock = self.settings.text_clock
        columns = [("layer and pass", "<"), ("GEMM of one NPU", ">"), ("cycles", ">")]
        if clock.unit != "cycles":
            columns.append((clock.unit, ">"))
        columns += [("collective", "<"), ("bytes", ">")]
        rows = [[title for title, _ in columns]]
        labels: dict[int, str] = {}  # of layers, above the rows with these indices
        for first, number in self.plan.equal_layers():
            label = first.layer.name
            if number > 1:
                label += f" × {number}"
            if first.uneven_shares:
                label += " *"
            if self.settings.parallel == CUSTOMIZED:
                label += f", {first.layer.strategy}"
            labels[len(rows)] = label
            for layer_pass in first.passes.values():
                rows += self.printed_pass(layer_pass)
        table = []
        for index, line in enumerate(aligned(rows, [side for _, side in columns])):
            if index in labels:
                table.append(labels[index])
            table.append(line)
        if any(layer_plan.uneven_shares for layer_plan in self.plan.layers):
            table.append("* a size is not divisible: NPUs have different shares")
        return [*self.title(), *table, *self.printed_totals(), *self.model.notes(self.plan)]

    def printed_pass(self, layer_pass: Pass) -> list[list[str]]:
        """Return the row of a pass, and those of its further collectives."""
        work = str(layer_pass.work)
        if layer_pass.count > 1:
            work = f"{layer_pass.count:,} × {work}"
        times = [work, f"{layer_pass.cycles:,}"]
        clock = self.settings.text_clock
        if clock.unit != "cycles":
            times.append(f"{clock.time(layer_pass.cycles):,}")
        rows = []
        for name, collective in layer_pass.lines:
            kind = collective.kind
            if collective.is_alone and collective != NO_COLLECTIVE:
                kind += " of 1"
            cells = [f"  {name.replace('gradient', 'grad')}", *[""] * len(times)]
            if name == layer_pass.name:
                cells[1:] = times
            rows.append([*cells, kind, f"{collective.bytes:,}"])
        return rows

    def printed_totals(self) -> list[str]:
        """Return the totals of a training step, or of a forward pass."""
        clock = self.settings.text_clock
        lines = [(f"totals of a {self.settings.step}", "", "")]
        times = self.plan.total_times(clock)
        for name, total_time in times.items():
            lines.append((f"compute, {name}", f"{total_time:,}", clock.unit))
        if len(times) > 1:
            lines.append(("compute, all passes", f"{sum(times.values()):,}", clock.unit))
        for kind, number, size in self.plan.total_collectives():
            if number:
                lines.append((f"{number:,} × {kind}", f"{size:,}", "bytes"))
        sent, sent_between = self.plan.sent_bytes, self.plan.sent_between_packages
        lines.append(("sent within its package", f"{sent - sent_between:,}", "bytes"))
        lines.append(("sent between packages", f"{sent_between:,}", "bytes"))
        return aligned(lines, "<><")

    def layers_csv(self) -> str:
        """Return layers.csv: a row for each pass, and for each further collective of it."""
        rows = []
        for layer_plan in self.plan.layers:
            layer = layer_plan.layer
            for layer_pass in layer_plan.passes.values():
                work = layer_pass.work
                for name, collective in layer_pass.lines:
                    is_own = name == layer_pass.name
                    row: dict[str, object] = {
                        "layer": layer.name,
                        "type": layer.type,
                        "strategy": layer.strategy,
                        "dp": layer_plan.dp,
                        "mp": layer_plan.mp,
                        "pass": name,
                        "count": layer_pass.count if is_own else 0,
                        "M": work.m,
                        "N": work.n,
                        "K": work.k,
                        "cycles": layer_pass.cycles if is_own else 0,
                        "collective": collective.kind,
                        "bytes": collective.bytes,
                        "members": collective.members,
                        "sent_bytes": collective.sent_bytes,
                    }
                    rows.append(row)
        return csv_text([rows[0].keys(), *[row.values() for row in rows]])

    def files_of_gemms(self) -> dict[str, str]:
        """Return the files of the run folder that say which GEMMs were timed on what, by name."""
        cycle_model = f"{self.settings.cycle_model}\n"
        if self.settings.gemm_cycles:
            cycle_model += f"gemm_cycles {self.settings.gemm_cycles}\n"
        files = {"scalesim.cfg": self.accelerator.given_config, "cycle_model.txt": cycle_model}
        for name, file_end in PASSES.items():
            passes = [layer_pass for layer_pass in self.plan.passes if layer_pass.name == name]
            gemms = []
            for layer_pass in passes:
                if isinstance(layer_pass.work, Gemm):
                    gemms.append((layer_pass.layer.name, layer_pass.work))
            if passes:
                files[f"{self.settings.mnk.stem}_{file_end}.csv"] = topology(gemms)
        return files

    def summary(self) -> list[object]:
        """Return this run's row of the summary: the settings and results that are columns of it."""
        plan = self.plan
        values = self.settings._asdict()
        values["scalesim_version"] = self.model.version
        values["array"] = f"{self.accelerator.rows}x{self.accelerator.columns}"
        values["dataflow"] = self.accelerator.dataflow
        values["distinct_gemms"] = len(plan.gemms)
        times = plan.total_times(self.settings.text_clock)
        for name in PASSES:
            values[f"compute_{name.replace(' ', '_')}"] = times.get(name, 0)
        values["compute_all"] = sum(times.values())
        for kind, number, size in plan.total_collectives():
            values[f"{kind.lower()}_count"] = number
            values[f"{kind.lower()}_bytes"] = size
        values["sent_bytes"] = plan.sent_bytes
        values["sent_within_package"] = plan.sent_bytes - plan.sent_between_packages
        values["sent_between_packages"] = plan.sent_between_packages
        return [values[column] for column in self.SUMMARY]


# --- Writing the results


class Output:
    """The files of a run, each written whole or not at all; none is an input or another output."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings = settings
        self.report = report
        self.run_files = report.files_of_gemms()
        self.traces: list[Path] = []
        if settings.chakra_et:
            folder, prefix = settings.chakra_et.parent, settings.chakra_et.name
            self.traces = [folder / f"{prefix}.{npu}.et" for npu in range(settings.num_npus)]

    def prepare(self) -> None:
        """Make folders; refuse now, not after hours, what can't be written or would harm a file."""
        targets = self.claimed_targets()
        for target in targets:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                above = [parent for parent in target.parents if parent.exists()]
                raise UserError(f"{above[0]} is a file, expected a folder") from None
        for target in targets:
            if target.is_dir():  # or has just become one, as the folder of another output
                raise UserError(f"{target} is a folder, expected a file to write")
            replaced = target if target.exists() else target.parent
            if not os.access(replaced, os.W_OK):
                raise UserError(f"{replaced}: no permission to write")
        self.check_summary()
        self.warn_of_other_traces()

    def warn_of_other_traces(self) -> None:
        """Warn of traces of an earlier, larger run, which ASTRA-sim may read as well."""
        if not self.traces:
            return
        name = re.escape(self.traces[0].name.removesuffix("0.et")) + r"([0-9]{1,30})\.et"
        others = []
        for path in self.traces[0].parent.resolve().iterdir():  # as `prepare` made it
            match = re.fullmatch(name, path.name)
            if match and int(match[1]) >= self.settings.num_npus:
                others.append((int(match[1]), path))
        if others:
            _, first = min(others)
            what = f"{plural(len(others), 'trace')} of a larger system with this prefix"
            warn(f"{what}, the first {first}: ASTRA-sim 2.x may read them too")

    def claimed_targets(self) -> list[Path]:
        """Return the outputs, links followed; UserError if one has another use already."""

        def resolved(path: Path) -> Path:
            with suppress(FileNotFoundError, NotADirectoryError):
                path.stat()  # finds links in a circle, for which resolve() has no proper error
            return path.resolve()

        settings = self.settings
        uses = {resolved(settings.mnk): "--mnk"}
        if settings.scalesim_config:
            uses[resolved(settings.scalesim_config)] = "--scalesim_config"
        own_layers = resolved(settings.run_folder / "layers.csv")
        if settings.gemm_cycles and resolved(settings.gemm_cycles) != own_layers:
            uses[resolved(settings.gemm_cycles)] = "--gemm_cycles"
        outputs = []
        if settings.output_file:
            outputs.append((settings.output_file, "--output_file"))
        if settings.summary_csv:
            outputs.append((settings.summary_csv, "--summary_csv"))
        outputs += [(path, "a trace") for path in self.traces]
        for name in ("layers.csv", *self.run_files):
            outputs.append((settings.run_folder / name, "a file of the run folder"))

        reports = str(resolved(settings.run_folder) / "gemm_")  # how their folders' names begin
        targets = []
        for path, use in outputs:
            target = resolved(path)
            if target in uses and not is_device(target):
                both = f"{uses[target]} and {use}"
                raise UserError(f"{path} is {both}, expected another file for each")
            if str(target).startswith(reports):
                raise UserError(f"{path} is among SCALE-Sim's reports, expected another place")
            uses[target] = use
            targets.append(target)
        return targets

    def check_summary(self) -> None:
        """Refuse a summary with other columns."""
        path = self.settings.summary_csv
        if not path or not path.exists():
            return
        if is_device(path):
            raise UserError(f"{path}: expected a regular file as --summary_csv")
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            header = file.readline(10_000)
        if header and header.rstrip("\n") != ",".join(Report.SUMMARY):
            expected = "expected the columns of a summary"
            advice = "give another file, or rename this one"
            what = f"header {quoted(header.rstrip())}"
            raise UserError(f"{path}:1: {what}, {expected}; {advice}")

    def write(self, text: str, trace: bytes) -> None:
        """Write the results, the workload file last."""
        files = {**self.run_files, "layers.csv": self.report.layers_csv()}
        write_files(self.settings.run_folder, files)
        if self.traces:
            self.write_traces(trace)
        if self.settings.summary_csv:
            self.append_row(self.settings.summary_csv.resolve())
        if self.settings.output_file:
            write_file(self.settings.output_file, text.encode())

    def write_traces(self, trace: bytes) -> None:
        """Write the same trace for each NPU; on disk only once, where there are hard links."""
        first, *others = self.traces
        write_file(first, trace)
        linked = first.resolve()
        for path in others:
            target = path.resolve()
            try:
                with replacing(target) as part:
                    os.link(linked, part)
            except OSError:  # no links on this file system, or too many to this file
                write_file(path, trace)
                linked = target

    def append_row(self, path: Path) -> None:
        """Append a row to a summary, to which other runs may append at the same time."""
        row = csv_text([self.report.summary()])
        with path.open("a+b", buffering=0) as file, errors_name(path):
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                row = csv_text([Report.SUMMARY]) + row
            else:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    row = "\n" + row  # the last line was cut off
            data = row.encode("utf-8", "surrogateescape")
            try:
                while data:
                    data = data[file.write(data) :]
            except BaseException:
                file.truncate(size)
                raise

    def printed(self, done: str) -> list[str]:
        """Return what was written."""
        settings = self.settings
        lines = [f"wrote no workload file, as only traces can hold this run: {done}"]
        if output := settings.output_file:
            if not is_device(output):
                output = output.resolve()
            lines = [f"wrote {output}: {done}"]
        if settings.chakra_et:
            traces = f"{settings.chakra_et.resolve()}.<npu>.et"
            steps = plural(settings.num_passes, settings.step)
            lines.append(f"wrote {plural(settings.num_npus, 'trace')} of {steps}: {traces}")
        if settings.summary_csv:
            lines.append(f"wrote a row in {settings.summary_csv.resolve()}")
        return [*lines, f"wrote details in {settings.run_folder.resolve()}"]


def print_results(lines: list[str]) -> None:
    """Print to stdout, in whatever encoding it has; a closed pipe is no error."""
    text = "\n".join(printable(line) for line in lines)
    try:
        text.encode(sys.stdout.encoding, sys.stdout.errors or "strict")
    except UnicodeEncodeError:
        text = text.replace("×", "x").encode("ascii", "backslashreplace").decode()
    try:
        with errors_name("standard output"):
            print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- The story


def run(settings: Settings) -> None:
    """Do the whole job, from the table to the files; in a dry run estimate, and write nothing."""
    started = time.monotonic()
    plan = Plan(Table.read(settings).layers(), settings)
    plan.check()
    accelerator = Config.read(settings.scalesim_config).accelerator()
    accelerator.warn_of_lookups(plan)
    measured = []
    if settings.gemm_cycles:
        measured.append(MeasuredCycles(settings.gemm_cycles).apply_to(plan))
    model = MODELS[settings.cycle_model](settings, accelerator)
    report = Report(settings, plan, accelerator, model)
    output = Output(settings, report)
    chakra = Chakra() if settings.chakra_et else None

    if settings.dry_run:
        output.claimed_targets()
        timing = model.forecast(plan)
    else:
        output.prepare()
        timing = model.cycles(plan)
    plan.set_cycles(timing.cycles, accelerator.bandwidth)
    plan.warn_of_rounding(settings.precisions)

    what = f"{plural(len(plan.layers), 'layer')}, {plural(len(plan.gemms), 'distinct GEMM')}"
    if settings.dry_run:
        done = [f"dry run with {timing.source} cycles: {what}, nothing written", *timing.cost]
    else:
        text = workload_text(plan, settings) if settings.output_file else ""
        trace = Trace(settings, chakra).contents(plan) if chakra else b""
        output.write(text, trace)
        seconds = time.monotonic() - started
        done = output.printed(f"{what} ({timing.source}), {seconds:.1f} s")
    print_results([*report.printed(), *measured, *done])


def main(argv: Sequence[str]) -> int:
    """Run with the parsed flags; return the exit status."""
    try:
        if argv[1:]:
            raise UserError(f"unexpected argument {quoted(argv[1])}, expected --name=value")
        run(Settings.from_flags())
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = str(error)
        if error.filename:
            message = f"{error.filename}: {error.strerror}"
        if error.errno == errno.EMFILE:
            message += "; fewer --jobs may help"
    except MemoryError:
        message = "out of memory"
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        message = f"{error}; fewer --jobs may help"
    say("error", message)
    return 1


def parse_flags(arguments: list[str]) -> list[str]:
    """Parse the command line; of a wrong flag absl's message, but nothing that a terminal obeys."""
    try:
        return list(flags.FLAGS(arguments))
    except flags.Error as error:
        app.parse_flags_with_usage([printable(argument) for argument in arguments])
        sys.exit(f"error: {printable(str(error))}")


def command_line() -> None:
    """Run; after Ctrl-C end by its signal, so that a shell's loop ends too."""
    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    try:
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        sys.exit(128 + signal.SIGINT)  # process 1 of a container survives its signals
    except UnicodeDecodeError as error:
        sys.exit(f"error: --flagfile: {error}")


if __name__ == "__main__":
    command_line()
