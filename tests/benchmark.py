"""Measure this tool against the way the original works, as ratios within one run (not collected by pytest).

    python tests/benchmark.py                 the example and the sweep: about a quarter of an hour on 2 cores
    python tests/benchmark.py --example_only

"The original's way" is a SCALE-Sim process per layer and pass, one after another, with traces. Of each distinct GEMM it
is measured once and counted as often as it occurs. The limit is the distinct GEMMs' own time without traces, each
process alone, added up and divided by the jobs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags

import gen_astrasim_workload_input as tool
import helpers

EXAMPLE_ONLY = flags.DEFINE_bool("example_only", False, "Leave the sweep out.")
TRACED = tool.SCALESIM_PROCESS.replace("save_disk_space=True", "save_disk_space=False")

Point = tuple[int, int, str]  # NPUs, packages, strategy
EXAMPLE: list[Point] = [(16, 2, "DATA")]
SWEEP: list[Point] = [(n, min(n, 2), strategy) for n in (1, 2, 4, 8, 16, 32, 64) for strategy in helpers.PLAIN]


def gemms_of(points: list[Point]) -> Counter[tool.Gemm]:
    """Return how often each distinct GEMM occurs over all layers and passes of these points."""
    count: Counter[tool.Gemm] = Counter()
    for npus, packages, strategy in points:
        chosen = helpers.settings(Path("/"), num_npus=npus, num_packages=packages, parallel=strategy)
        layers = tool.read_layers(chosen.mnk, strategy)
        count.update(share.gemm for layer in layers for share in tool.shard(layer, chosen))
    return count


def alone(gemm: tool.Gemm, process: str) -> float:
    """Return the seconds that one simulation takes by itself."""
    tool.SCALESIM_PROCESS = process
    path = Path(flags.FLAGS.scalesim_path).absolute() if flags.FLAGS.scalesim_path else None
    scalesim = tool.find_scalesim(path)
    began = time.perf_counter()
    problem, files = tool.simulate(scalesim, path, tool.read_architecture(None).scalesim_text, gemm)
    seconds = time.perf_counter() - began
    assert not problem, (problem, files)
    return seconds


def run_all(points: list[Point], folder: Path, *more: str) -> tuple[float, float]:
    """Run the tool once per point; return the seconds of all, and the driver's peak memory in MB."""
    peak = 0
    began = time.perf_counter()
    for npus, packages, strategy in points:
        own = [f"--num_npus={npus}", f"--num_packages={packages}", f"--parallel={strategy}"]
        own += [f"--scalesim_path={flags.FLAGS.scalesim_path and Path(flags.FLAGS.scalesim_path).absolute()}"]
        command = [sys.executable, str(helpers.SCRIPT), *own, f"--cache_dir={folder}/cache", *more]
        running = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None:
            status = Path(f"/proc/{running.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
            time.sleep(0.02)
        assert running.returncode == 0
    return time.perf_counter() - began, peak / 1024


def bare_start() -> float:
    """Return the seconds of an interpreter that imports what the tool always needs."""
    command = [sys.executable, "-c", "import absl.app, absl.flags, tqdm"]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, check=True)
        times.append(time.perf_counter() - began)
    return min(times)


def measure(name: str, points: list[Point]) -> str:
    """Return a row of the table."""
    plain, jobs = tool.SCALESIM_PROCESS, 2
    count = gemms_of(points)
    original = sum(alone(gemm, TRACED) * times for gemm, times in count.items())
    limit = sum(alone(gemm, plain) for gemm in count) / jobs
    tool.SCALESIM_PROCESS = plain
    with tempfile.TemporaryDirectory() as folder:
        cold, cold_peak = run_all(points, Path(folder), f"--jobs={jobs}")
        warm, _ = run_all(points, Path(folder))
        analytical, _ = run_all(points, Path(folder), "--cycle_model=analytical")
    start = bare_start() * len(points)
    cells = [f"{count.total()} / {len(count)}", f"{original:.1f} s", f"{original / cold:.1f} x", f"{cold / limit:.2f}"]
    cells += [
        f"{original / warm:,.0f} x",
        f"{warm / start:.1f}",
        f"{original / analytical:,.0f} x",
        f"{cold_peak:.0f} MB",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main(_: list[str]) -> None:
    """Print the table, as Markdown."""
    titles = ["", "GEMMs / distinct", "original's way", "cold is faster by", "cold over its limit", "warm is faster by"]
    titles += ["warm over a bare start", "analytical is faster by", "driver's peak"]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    print(measure("example", EXAMPLE), flush=True)
    if not EXAMPLE_ONLY.value:
        print(measure(f"sweep of {len(SWEEP)} runs", SWEEP), flush=True)


if __name__ == "__main__":
    app.run(main)
