"""Measure this tool against the way the original works, as ratios within one run.

    python tests/benchmark.py                 the example and the sweep: a quarter of an hour
    python tests/benchmark.py --example_only

First comes a line with what a run costs that simulates nothing: the example with analytical cycles
and everything that it reads in the page cache, over `python -c "from absl import app"`. The two
take turns, and the line has the median of their ratios, which another load hardly moves.

Then comes the table. "The original's way" is what the original tool ran: SCALE-Sim's own scale.py,
once for each pass, on a topology of all layers. The limit is the distinct GEMMs' own time, each
process alone, added up and divided by the jobs. pytest does not collect this file.
"""

from __future__ import annotations

import os
import shutil
import statistics
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

Point = tuple[int, int, str]  # NPUs, packages, strategy
EXAMPLE: list[Point] = [(16, 2, "DATA")]
SWEEP: list[Point] = []
for npus in (1, 2, 4, 8, 16, 32, 64):
    SWEEP += [(npus, min(npus, 2), strategy) for strategy in helpers.PLAIN]
JOBS = 2


def plan_of(point: Point) -> tool.Plan:
    """Return the plan of the example at a point."""
    npus, packages, strategy = point
    chosen = helpers.settings(Path("/"), num_npus=npus, num_packages=packages, parallel=strategy)
    return helpers.plan_of_table(chosen)


def gemms_of(points: list[Point]) -> Counter[tool.Gemm]:
    """Return how often each distinct GEMM occurs over all layers and passes of these points."""
    count: Counter[tool.Gemm] = Counter()
    for point in points:
        for each in plan_of(point).passes:
            assert isinstance(each.work, tool.Gemm)
            count[each.work] += each.count
    return count


def scalesim_path() -> Path | None:
    """Return the folder of the SCALE-Sim to measure; None for the installed one."""
    path = flags.FLAGS.scalesim_path
    return Path(path).absolute() if path else None


def scalesim() -> tool.ScaleSim:
    """Return the SCALE-Sim to measure."""
    return tool.ScaleSim(scalesim_path(), helpers.accelerator_of())


def original(points: list[Point], folder: Path) -> float:
    """Return the seconds of SCALE-Sim's own command line for each pass of each point."""
    found = scalesim()
    code = found.folder_here()
    (folder / "gemm.cfg").write_text(found.accelerator.merged_config)
    environment = {**os.environ, "PYTHONPATH": str(code)}
    scale = [sys.executable, f"{code}/scalesim/scale.py", "-c", f"{folder}/gemm.cfg"]
    scale += ["-p", f"{folder}/out", "-t", f"{folder}/topology.csv"]
    if found.version == "3":
        scale += ["-l", f"{folder}/layout.csv"]
    seconds = 0.0
    for point in points:
        plans = plan_of(point).layers
        layouts = "".join(f"{plan.layer.name},{'1,' * 20}\n" for plan in plans)
        (folder / "layout.csv").write_text(f"{'-,' * 21}\n{layouts}")
        for name in tool.PASSES:
            gemms = []
            for plan in plans:
                gemm = plan.passes[name].work
                assert isinstance(gemm, tool.Gemm)
                gemms.append((plan.layer.name, gemm))
            (folder / "topology.csv").write_text(tool.topology(gemms))
            began = time.perf_counter()
            subprocess.run(scale, cwd=folder, env=environment, check=True, capture_output=True)
            seconds += time.perf_counter() - began
            (report,) = (folder / "out").rglob("COMPUTE_REPORT.csv")
            assert report.read_text().count("\n") == len(plans) + 1
            shutil.rmtree(folder / "out")
    return seconds


def alone(gemm: tool.Gemm) -> float:
    """Return the seconds that one simulation takes by itself."""
    found = scalesim()
    began = time.perf_counter()
    simulation = found.simulate(gemm)
    seconds = time.perf_counter() - began
    assert simulation.cycles
    return seconds


def peak_memory(process: int) -> int:
    """Return the peak resident kB of a process so far; 0 where it is over."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    return 0


def run_all(points: list[Point], folder: Path, *more: str) -> tuple[float, float]:
    """Run the tool once per point; return the seconds of all, and its own peak memory in MB."""
    peak = 0
    began = time.perf_counter()
    for npus, packages, strategy in points:
        own = [f"--num_npus={npus}", f"--num_packages={packages}", f"--parallel={strategy}"]
        own += [f"--scalesim_path={scalesim_path() or ''}", f"--cache_dir={folder}/cache"]
        command = [sys.executable, str(helpers.SCRIPT), *own, *more]
        quiet = subprocess.DEVNULL
        running = subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet)
        while running.poll() is None:
            peak = max(peak, peak_memory(running.pid))
            time.sleep(0.02)
        assert running.returncode == 0
    return time.perf_counter() - began, peak / 1024


def seconds_of(command: list[str], folder: Path) -> float:
    """Return the seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


BARE = [sys.executable, "-c", "from absl import app"]  # what the tool always imports


def bare_start(folder: Path) -> float:
    """Return the seconds of an interpreter that imports what the tool always needs."""
    return min(seconds_of(BARE, folder) for _ in range(5))


def over_bare_start(pairs: int = 25) -> str:
    """Return a line: a warm run that simulates nothing, over a bare start."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        warm = [sys.executable, str(helpers.SCRIPT), helpers.FAST]
        for command in (warm, BARE):
            seconds_of(command, Path(folder))
        for _ in range(pairs):
            ratios.append(seconds_of(warm, Path(folder)) / seconds_of(BARE, Path(folder)))
    ratio = f"{statistics.median(ratios):.2f} x `python -c {BARE[-1]!r}`"
    return f"a warm run, example, analytical: {ratio}, median of {pairs} in turn"


def measure(name: str, points: list[Point]) -> str:
    """Return a row of the table."""
    count = gemms_of(points)
    with tempfile.TemporaryDirectory() as folder:
        before = original(points, Path(folder))
        limit = sum(map(alone, count)) / JOBS
        cold, cold_peak = run_all(points, Path(folder), f"--jobs={JOBS}")
        warm, _ = run_all(points, Path(folder))
        analytical, _ = run_all(points, Path(folder), helpers.FAST)
        start = bare_start(Path(folder)) * len(points)
    cells = [
        name,
        f"{count.total()} / {len(count)}",
        f"{before:.1f} s",
        f"{before / cold:.1f} x",
        f"{cold / limit:.2f}",
        f"{before / warm:,.0f} x",
        f"{warm / start:.1f}",
        f"{before / analytical:,.0f} x",
        f"{cold_peak:.0f} MB",
    ]
    return f"| {' | '.join(cells)} |"


TITLES = (
    "",
    "GEMMs / distinct",
    "original's way",
    "cold is faster by",
    "cold over its limit",
    "warm is faster by",
    "warm over a bare start",
    "analytical is faster by",
    "driver's peak",
)


def main(_: list[str]) -> None:
    """Print the line, and the table as Markdown."""
    print(f"{over_bare_start()}\n", flush=True)
    print(f"| {' | '.join(TITLES)} |\n|{' --- |' * len(TITLES)}")
    print(measure("example", EXAMPLE), flush=True)
    if not EXAMPLE_ONLY.value:
        print(measure(f"sweep of {len(SWEEP)} runs", SWEEP), flush=True)


if __name__ == "__main__":
    app.run(main)
