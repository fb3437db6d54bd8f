"""What several tests share: running the script, readers written like ASTRA-sim's and Chakra's, SCALE-Sim stand-ins."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

import gen_astrasim_workload_input as tool

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "gen_astrasim_workload_input.py"
MNK_INPUTS = ROOT / "mnk_inputs"
PLAIN = ("DATA", "MODEL", "HYBRID_DATA_MODEL", "HYBRID_MODEL_DATA")


class Run(NamedTuple):
    """What came of running the script."""

    status: int
    out: str
    err: str


def run(folder: Path, *flags: str, env: dict[str, str] | None = None, cache: bool = False) -> Run:
    """Run the script in `folder` as a user does, without the user's cache unless the flags or `cache` ask for one."""
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
    )
    return Run(done.returncode, done.stdout, done.stderr)


def layer_of(name: str, m: int, n: int, k: int, strategy: str) -> tool.Layer:
    """Return a layer that is a GEMM."""
    return tool.Layer(name, "t.csv:2", strategy, m, n, k, input_elements=m * k, minibatch=None)


def seen_on_a_terminal(folder: Path, *flags: str) -> str:
    """Run the script with stderr on a terminal; return what is written there."""
    main_end, terminal = pty.openpty()
    fcntl.ioctl(
        terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0)
    )  # tqdm shows none on 0 columns
    command = [sys.executable, str(SCRIPT), *flags]
    seen = b""
    with subprocess.Popen(
        command, cwd=folder, stderr=terminal, stdout=subprocess.DEVNULL
    ) as running:
        os.close(terminal)
        with suppress(OSError):  # the terminal's end
            while chunk := os.read(main_end, 1000):
                seen += chunk
    os.close(main_end)
    assert running.returncode == 0
    return seen.decode()


def settings(folder: Path, **changes: Any) -> tool.Settings:
    """Return settings as the flags' defaults give them, but analytical, without a cache, of 16 NPUs in 2 packages."""
    values: dict[str, Any] = {}
    for name in tool.Settings._fields:
        if name in flags.FLAGS:
            values[name] = flags.FLAGS[name].default
            if name in tool.PATH_FLAGS:
                values[name] = tool.absolute_path(values[name])
    values |= {
        "num_npus": 16,
        "num_packages": 2,
        "cycle_model": "analytical",
        "jobs": 2,
        "cache_dir": None,
        "output_file": folder / "workload.txt",
        "run_folder": folder / "outputs" / "run",
    }
    return tool.Settings(**{**values, **changes})


def is_one_error_line(result: Run) -> bool:
    """Say whether a run ended as bad input must end: status 1, nothing on stdout, one error line after any warnings."""
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    return (
        result.status == 1 and len(lines) == 1 and lines[0].startswith("error: ") and not result.out
    )


class AstraLayer(NamedTuple):
    """A layer as ASTRA-sim 1.0 holds it: per pass (compute time, collective, bytes)."""

    name: str
    passes: list[tuple[int, str, int]]
    update_time: int
    strategy: str | None


def read_like_astrasim(text: str) -> tuple[str, list[AstraLayer]]:
    """Read a workload as ASTRA-sim 1.0 does (Workload.cc): words; the thirteenth only under HYBRID_CUSTOMIZED.

    Fails unless the file is consumed to its last word.
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
    """Read a workload by the rules of Chakra's Text converter (text_converter.py): a line a layer, none blank."""
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


def fake_v2(folder: Path, body: str) -> Path:
    """Make a SCALE-Sim v2 whose run does `body` (it sees `top_path`, `os`, `sys` and `report(text)`)."""
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
    """Make a stand-in with SCALE-Sim v1's command line, files and shell commands; its cycles are M + 2 K + 3 N."""
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
        "    os.system('mkdir ' + path + '/layer_wise; mv ' + path + '/*sram* ' + path + '/layer_wise')\n"
        "if __name__ == '__main__':\n"
        "    app.run(main)\n"
    )
    return folder
