"""Measure this tool against the way the original works, as ratios within one run (not collected by pytest).

    python tests/benchmark.py                 the example and the sweep: about a quarter of an hour on 2 cores
    python tests/benchmark.py --example_only

"The original's way" is what the original tool ran: SCALE-Sim's own scale.py, once for each pass, on a topology of all
layers. The limit is the distinct GEMMs' own time, each process alone, added up and divided by the jobs.
"""

from __future__ import annotations

import os
import shutil
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
SWEEP: list[Point] = [
    (n, min(n, 2), strategy) for n in (1, 2, 4, 8, 16, 32, 64) for strategy in helpers.PLAIN
]


def plan_of(point: Point) -> tool.Plan:
    """Return the plan of the example at a point."""
    npus, packages, strategy = point
    chosen = helpers.settings(Path("/"), num_npus=npus, num_packages=packages, parallel=strategy)
    return [
        (layer, helpers.shards_of(layer, chosen))
        for layer in tool.read_layers(chosen.mnk, strategy, 1)
    ]


def gemms_of(points: list[Point]) -> Counter[tool.Gemm]:
    """Return how often each distinct GEMM occurs over all layers and passes of these points."""
    return Counter(
        shard.gemm for point in points for _, shards in plan_of(point) for shard in shards
    )


def scalesim() -> tool.ScaleSim:
    """Return the SCALE-Sim to measure."""
    path = Path(flags.FLAGS.scalesim_path).absolute() if flags.FLAGS.scalesim_path else None
    return tool.find_scalesim(path, tool.read_architecture(None).scalesim_text)


def original(points: list[Point], folder: Path) -> float:
    """Return the seconds of SCALE-Sim's own command line, as the original ran it for each pass of each point."""
    found = scalesim()
    (folder / "gemm.cfg").write_text(found.config)
    seconds = 0.0
    for point in points:
        plan = plan_of(point)
        layouts = "".join(f"{layer.name},{'1,' * 20}\n" for layer, _ in plan)
        (folder / "layout.csv").write_text(f"{'-,' * 21}\n{layouts}")
        for index, name in enumerate(("fwd_pass.csv", "inp_grad.csv", "weight_grad.csv")):
            rows = [(layer.name, shards[index].gemm) for layer, shards in plan]
            (folder / name).write_text(tool.topology(rows))
            command = [
                sys.executable,
                f"{found.folder}/scalesim/scale.py",
                "-c",
                f"{folder}/gemm.cfg",
            ]
            command += ["-t", f"{folder}/{name}", "-p", f"{folder}/out"]
            command += ["-l", f"{folder}/layout.csv"] if found.version == 3 else []
            began = time.perf_counter()
            subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": found.folder},
                check=True,
                capture_output=True,
            )
            seconds += time.perf_counter() - began
            (report,) = (folder / "out").rglob("COMPUTE_REPORT.csv")
            assert report.read_text().count("\n") == len(plan) + 1
            shutil.rmtree(folder / "out")
    return seconds


def alone(gemm: tool.Gemm) -> float:
    """Return the seconds that one simulation takes by itself."""
    found = scalesim()
    began = time.perf_counter()
    simulation = tool.simulate(found, gemm)
    seconds = time.perf_counter() - began
    assert tool.reported_cycles(simulation.files, found.version)
    return seconds


def run_all(points: list[Point], folder: Path, *more: str) -> tuple[float, float]:
    """Run the tool once per point; return the seconds of all, and the driver's peak memory in MB."""
    peak = 0
    began = time.perf_counter()
    for npus, packages, strategy in points:
        own = [f"--num_npus={npus}", f"--num_packages={packages}", f"--parallel={strategy}"]
        own += [
            f"--scalesim_path={flags.FLAGS.scalesim_path and Path(flags.FLAGS.scalesim_path).absolute()}"
        ]
        command = [sys.executable, str(helpers.SCRIPT), *own, f"--cache_dir={folder}/cache", *more]
        running = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while running.poll() is None:
            status = Path(f"/proc/{running.pid}/status").read_text()
            peak = max(
                [
                    peak,
                    *(
                        int(line.split()[1])
                        for line in status.splitlines()
                        if line.startswith("VmHWM")
                    ),
                ]
            )
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
    jobs, count = 2, gemms_of(points)
    with tempfile.TemporaryDirectory() as folder:
        before = original(points, Path(folder))
        limit = sum(map(alone, count)) / jobs
        cold, cold_peak = run_all(points, Path(folder), f"--jobs={jobs}")
        warm, _ = run_all(points, Path(folder))
        analytical, _ = run_all(points, Path(folder), "--cycle_model=analytical")
    start = bare_start() * len(points)
    cells = [
        f"{count.total()} / {len(count)}",
        f"{before:.1f} s",
        f"{before / cold:.1f} x",
        f"{cold / limit:.2f}",
    ]
    cells += [
        f"{before / warm:,.0f} x",
        f"{warm / start:.1f}",
        f"{before / analytical:,.0f} x",
        f"{cold_peak:.0f} MB",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main(_: list[str]) -> None:
    """Print the table, as Markdown."""
    titles = [
        "",
        "GEMMs / distinct",
        "original's way",
        "cold is faster by",
        "cold over its limit",
        "warm is faster by",
    ]
    titles += ["warm over a bare start", "analytical is faster by", "driver's peak"]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    print(measure("example", EXAMPLE), flush=True)
    if not EXAMPLE_ONLY.value:
        print(measure(f"sweep of {len(SWEEP)} runs", SWEEP), flush=True)


if __name__ == "__main__":
    app.run(main)
