"""What several tests share: running the script, readers of its files, stand-ins for SCALE-Sim."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import pty
import resource
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from hypothesis import HealthCheck
from hypothesis import settings as examples
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "gen_astrasim_workload_input.py"
MNK_INPUTS = ROOT / "mnk_inputs"
PLAIN = ("DATA", "MODEL", "HYBRID_DATA_MODEL", "HYBRID_MODEL_DATA")
PLAIN_AND_CUSTOMIZED = (*PLAIN, "HYBRID_CUSTOMIZED")
COLLECTIVES = ("ALLGATHER", "REDUCESCATTER", "ALLREDUCE", "ALLTOALL")
PASS_NAMES = ("forward", "input gradient", "weight gradient")
FAST = "--cycle_model=analytical"
PATH_FLAGS = (
    *("mnk", "output_file", "scalesim_path", "scalesim_config"),
    *("gemm_cycles", "cache_dir", "chakra_et", "summary_csv"),
)

# Permissions do not bind root, in whose name CI may run, unless it gives up what overrides them.
BOUND = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    if os.geteuid() == 0
    else []
)


class Run(NamedTuple):
    """What came of running the script."""

    status: int
    out: str
    err: str


def run(folder: Path, *flags: str, env: dict[str, str] | None = None, cache: bool = False) -> Run:
    """Run the script in `folder` as a user does, without the user's cache unless asked for one."""
    if not cache and not any(flag.startswith("--cache_dir") for flag in flags):
        flags = (*flags, "--cache_dir=")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags],
        cwd=folder,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def limited(folder: Path, size: int, *flags: str) -> Run:
    """Run the script where no file may grow beyond `size` bytes, as on a disk that gets full."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, str(SCRIPT), *flags]
    done = subprocess.run(command, cwd=folder, preexec_fn=limit, capture_output=True, text=True)
    return Run(done.returncode, done.stdout, done.stderr)


def layer_of(name: str, m: int, n: int, k: int, strategy: str, **changes: Any) -> tool.Layer:
    """Return a layer that is a GEMM."""
    values = {"name": name, "m": m, "n": n, "k": k, "strategy": strategy}
    values |= {"where": "t.csv:2", "type": "GEMM", "input_elements": m * k}
    return tool.Layer(**{**values, **changes})


def plan_of(layer: tool.Layer, chosen: tool.Settings) -> tool.LayerPlan:
    """Return what one NPU does for a layer."""
    return tool.LayerPlan.of(layer, chosen)


def layers_of_table(mnk: Path, parallel: str = "DATA", minibatch: int = 1) -> list[tool.Layer]:
    """Return the layers of a table."""
    chosen = settings(mnk.parent, mnk=mnk, parallel=parallel, minibatch=minibatch)
    return tool.Table.read(chosen).layers()


def plan_of_table(chosen: tool.Settings) -> tool.Plan:
    """Return what one NPU does for the settings' table."""
    return tool.Plan(tool.Table.read(chosen).layers(), chosen)


def gemms_of(plan: tool.LayerPlan) -> list[tuple[int, int, int]]:
    """Return m, n and k of what a layer's three passes compute."""
    return [(each.work.m, each.work.n, each.work.k) for each in plan.passes.values()]


def collective_of(layer_pass: tool.Pass) -> tool.Collective:
    """Return the one collective of a pass, which comes after it, or the one that stands for none.

    A workload file has room for just one.
    """
    assert not layer_pass.before
    (collective,) = layer_pass.after or [tool.NO_COLLECTIVE]
    return collective


def collectives_of(plan: tool.LayerPlan) -> list[tuple[str, int]]:
    """Return the kind and bytes of the collectives after a layer's three passes."""
    collectives = [collective_of(each) for each in plan.passes.values()]
    return [(each.kind, each.bytes) for each in collectives]


def accelerator_of(config: Path | None = None) -> tool.Accelerator:
    """Return the accelerator of a config; without one, the built-in one."""
    return tool.Config.read(config).accelerator()


def workload_of(plan: tool.Plan, chosen: tool.Settings) -> str:
    """Return the workload file of a plan, unchecked, each GEMM in its analytical cycles."""
    accelerator = accelerator_of()
    cycles = tool.AnalyticalModel(chosen, accelerator).cycles(plan).cycles
    plan.set_cycles(cycles, accelerator.bandwidth)
    return tool.workload_text(plan, chosen)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make this the current folder, below which a run has its run folder."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def generate(folder: Path, **changes: Any) -> str:
    """Generate in a folder with `settings`; return the workload file."""
    chosen = settings(folder, **changes)
    with inside(folder):
        tool.run(chosen)
    assert chosen.output_file
    return chosen.output_file.read_text()


def seen_on_a_terminal(folder: Path, *flags: str, columns: int = 160) -> str:
    """Run the script with stderr on a terminal; return what is written there."""
    main_end, terminal = pty.openpty()
    size = struct.pack("HHHH", 24, columns, 0, 0)  # tqdm shows none on 0 columns
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    command = [sys.executable, str(SCRIPT), *flags]
    seen = b""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=folder, stderr=terminal, stdout=quiet) as running:
        os.close(terminal)
        with suppress(OSError):  # the terminal's end
            while chunk := os.read(main_end, 1000):
                seen += chunk
    os.close(main_end)
    assert running.returncode == 0
    return seen.decode()


def settings(folder: Path, **changes: Any) -> tool.Settings:
    """Return the flags' defaults, but analytical, without a cache, of 16 NPUs in 2 packages."""
    values: dict[str, Any] = {}
    for name in tool.Settings._fields:
        values[name] = flags.FLAGS[name].default
    for name in PATH_FLAGS:
        values[name] = tool.absolute_path(values[name])
    values |= {
        "num_npus": 16,
        "num_packages": 2,
        "cycle_model": "analytical",
        "jobs": 2,
        "cache_dir": None,
        "output_file": folder / "workload.txt",
        "run_name": "run",
    }
    return tool.Settings(**{**values, **changes})


def is_one_error_line(result: Run) -> bool:
    """Say whether a run ended as bad input must end: one error line after any warnings."""
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    is_error = len(lines) == 1 and lines[0].startswith("error: ")
    return result.status == 1 and is_error and not result.out


def is_flag_error(result: Run) -> bool:
    """Say whether a run ended as absl ends one with a flag that it refuses."""
    first = result.err.partition("\n")[0]
    return (result.status, result.out) == (1, "") and first.startswith(
        "FATAL Flags parsing error: "
    )


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return inode and bytes of what is here and below."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        found[str(path)] = (path.lstat().st_ino, path.read_bytes() if path.is_file() else b"")
    return found


def rows_of(path: Path, header: Sequence[str]) -> list[dict[str, str]]:
    """Read a table that must be one header and whole rows, to the last newline."""
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    found, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert found == [*header]
    assert text.endswith("\n")
    assert all(len(row) == len(found) for row in rows)
    return [dict(zip(found, row)) for row in rows]


HYBRID_OF_12 = {"parallel": "HYBRID_DATA_MODEL", "num_npus": 12, "num_packages": 3}
SUMMARY_HEADER = (
    *("mnk", "parallel", "num_npus", "num_packages", "datatype_size", "minibatch"),
    *("inference", "sharding_strategy", "cycle_model", "gemm_cycles", "time_unit", "clock_mhz"),
    *("compute_forward", "compute_input_gradient", "compute_weight_gradient", "compute_all"),
    *("allgather_count", "allgather_bytes", "reducescatter_count", "reducescatter_bytes"),
    *("allreduce_count", "allreduce_bytes", "alltoall_count", "alltoall_bytes"),
    *("sent_bytes", "sent_within_package", "sent_between_packages"),
    *("distinct_gemms", "output_file", "run_name", "shard_rounding"),
    *("scalesim_version", "array", "dataflow"),
)


def summary_of(folder: Path, **changes: Any) -> dict[str, str]:
    """Return the row that these settings give in a new file."""
    generate(folder, summary_csv=folder / "s.csv", **changes)
    (row,) = rows_of(folder / "s.csv", SUMMARY_HEADER)
    return row


def sums_of_text(path: Path) -> dict[str, str]:
    """Return the summary's columns that a text file for ASTRA-sim can say, summed from it."""
    _, layers = read_like_astrasim(path.read_text())
    sums = {"compute_all": 0}
    for index, name in enumerate(PASS_NAMES):
        total = sum(layer.passes[index][0] for layer in layers)
        sums[f"compute_{name.replace(' ', '_')}"] = total
        sums["compute_all"] += total
    passes = [each for layer in layers for each in layer.passes]
    for kind in COLLECTIVES:
        sizes = [size for _, collective, size in passes if collective == kind]
        sums |= {f"{kind.lower()}_count": len(sizes), f"{kind.lower()}_bytes": sum(sizes)}
    return {name: str(value) for name, value in sums.items()}


class AstraLayer(NamedTuple):
    """A layer as ASTRA-sim 1.0 holds it: per pass (compute time, collective, bytes)."""

    name: str
    passes: list[tuple[int, str, int]]
    update_time: int
    strategy: str | None


def read_like_astrasim(text: str) -> tuple[str, list[AstraLayer]]:
    """Read a workload as ASTRA-sim 1.0 does (Workload.cc): words, to the file's last one.

    Of the words of a layer the thirteenth is read under HYBRID_CUSTOMIZED only.
    """
    words = iter(text.split())
    strategy, count = next(words), int(next(words))
    layers = []
    for _ in range(count):
        name, reserved = next(words), int(next(words))
        assert reserved == -1
        passes = [(int(next(words)), next(words), int(next(words))) for _ in range(3)]
        update_time = int(next(words))
        own = next(words) if strategy == "HYBRID_CUSTOMIZED" else None
        assert own is None or own in PLAIN
        layers.append(AstraLayer(name, passes, update_time, own))
    assert next(words, None) is None, "ASTRA-sim would not have read the whole file"
    return strategy, layers


def read_like_chakra(text: str) -> None:
    """Read a workload by the rules of Chakra's Text converter (text_converter.py)."""
    lines = text.split("\n")
    assert lines.pop() == "", "one newline ends the file"
    strategy, count, *layers = lines
    assert strategy in PLAIN
    assert int(count.strip()) == len(layers)
    for line in layers:
        columns = line.strip().split()
        assert len(columns) == 12
        for time, collective, size in (columns[2:5], columns[5:8], columns[8:11]):
            assert int(time) >= 0
            assert collective in ("NONE", "ALLREDUCE", "ALLGATHER", "REDUCESCATTER", "ALLTOALL")
            assert int(size) >= 0


def write_table(path: Path, *rows: str, header: str = "Layer,m,n,k") -> Path:
    """Write an mnk table."""
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def write_config(path: Path, height: int, width: int, dataflow: str) -> Path:
    """Write a SCALE-Sim config with what it must have, the array."""
    array = f"ArrayHeight: {height}\nArrayWidth: {width}\nDataflow: {dataflow}\n"
    path.write_text(f"[architecture_presets]\n{array}")
    return path


def folds_of_100(path: Path) -> Path:
    """Write a config under which a GEMM of up to 50 x 50 takes 100 cycles and its reduction."""
    return write_config(path, 50, 53, "os")


# --- Any table at all, for Hypothesis

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "200"))
MANY = examples(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
STRATEGIES = st.sampled_from(PLAIN)
PARALLEL = st.sampled_from(PLAIN_AND_CUSTOMIZED)
ROUNDINGS = st.sampled_from(["up", "down"])
LayerCells = tuple[str, int, int, int, str]  # name, m, n, k, strategy


def tables(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[list[LayerCells]]:
    """Return the layers of tables with such sizes."""
    return st.lists(st.tuples(NAMES, sizes, sizes, sizes, STRATEGIES), min_size=1, max_size=6)


def table(layers: list[LayerCells], spelling: str = "plain") -> bytes:
    """Return a table in one of the spellings in which it is the same."""
    header = "Layer,m,n,k,CustomizedParallelization"
    rows = []
    for name, m, n, k, strategy in layers:
        quoted = name.replace('"', '""')
        rows.append(f'"{quoted}",{m},{n},{k},{strategy}')
    lines = [header.upper() if spelling == "upper" else header, *rows]
    end = {"comma": ",\n", "blank": "\n\n \n", "CRLF": "\r\n"}.get(spelling, "\n")
    text = "".join(line + end for line in lines)
    return text.encode("utf-8-sig" if spelling == "BOM" else "utf-8")


# --- Stand-ins for SCALE-Sim


def fake_v2(folder: Path, body: str) -> Path:
    """Make a SCALE-Sim v2 whose run does `body`, which sees `top_path` and `report(text)`."""
    package = folder / "scalesim"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    indented = "\n".join(f"        {line}" for line in body.splitlines())
    (package / "scale_sim.py").write_text(
        "import os, signal, sys, time\n"
        "HEADER = 'LayerID, Total Cycles, Stall Cycles, Overall Util %,\\n'\n"
        "class scalesim:\n"
        "    def __init__(self, save_disk_space=False, verbose=True, config='', topology=''):\n"
        "        self.topology = topology\n"
        "    def run_scale(self, top_path='.'):\n"
        "        def report(text):\n"
        "            os.makedirs(top_path + '/gemm', exist_ok=True)\n"
        "            open(top_path + '/gemm/COMPUTE_REPORT.csv', 'w').write(text)\n"
        + indented
        + "\n"
    )
    return folder


GOOD_REPORT = "report(HEADER + '0, 321, 0, 1.5,\\n')"


def fake_v1(folder: Path) -> Path:
    """Make one with SCALE-Sim v1's command line, files and shell; its cycles are M + 2 K + 3 N."""
    folder.mkdir(parents=True)
    (folder / "run_nets.py").write_text(
        "def row(path):\n    return open(path).read().splitlines()[1].split(',')\n"
    )
    (folder / "scale.py").write_text(
        "import configparser, os, sys\n"
        "import run_nets\n"
        "from absl import app, flags\n"
        "flags.DEFINE_string('arch_config', './configs/scale.cfg', 'x')\n"
        "flags.DEFINE_string('network', './topologies/alexnet.csv', 'x')\n"
        "def main(argv):\n"
        "    config = configparser.ConfigParser()\n"
        "    config.read(flags.FLAGS.arch_config)\n"
        "    assert config.get('architecture_presets', 'IfmapSramSz')\n"
        "    name, m, k, one, k2, one2, n, stride, empty = run_nets.row(flags.FLAGS.network)\n"
        "    assert k == k2 and (one, one2, stride, empty) == ('1', '1', '1', '')\n"
        "    net = flags.FLAGS.network.split('/')[-1].split('.')[0]\n"
        "    open(net + '_' + name + '_sram_read.csv', 'w').write('trace')\n"
        "    cycles = int(m) + 2 * int(k) + 3 * int(n)\n"
        "    text = 'Layer,\\tCycles,\\t%% Utilization,\\n%s,\\t%d,\\t9.5,\\n' % (name, cycles)\n"
        "    open(net + '_cycles.csv', 'w').write(text)\n"
        "    path = './outputs/' + config.get('general', 'run_name')\n"
        "    os.system('mkdir ./outputs; mkdir ' + path + '; mv *.csv ' + path)\n"
        "    wise = path + '/layer_wise'\n"
        "    os.system('mkdir ' + wise + '; mv ' + path + '/*sram* ' + wise)\n"
        "if __name__ == '__main__':\n"
        "    app.run(main)\n"
    )
    return folder
