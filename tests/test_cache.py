"""Each distinct GEMM once: side by side, cached, resumed after any end, shared."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gen_astrasim_workload_input as tool
from helpers import FAST, GOOD_REPORT, accelerator_of, fake_v2, is_one_error_line, run, write_table
from processes import (
    ROWS,
    SLOW,
    STUCK,
    after,
    base_flags,
    command_line,
    ended,
    entries,
    gone,
    in_bash,
    lead_a_group,
    patience,
    processes,
    simulated,
    start,
    start_command,
    until,
    wait_until_begun,
    without_progress,
)


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    return base_flags(tmp_path, seconds=0)


class Finished(NamedTuple):
    """A run whose GEMMs are all in the cache."""

    flags: list[str]
    output: bytes


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose GEMMs are all in the cache."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder, *base_flags(folder, seconds=0)).status == 0
    return folder


@pytest.fixture
def finished(tmp_path: Path, finished_once: Path) -> Finished:
    """Return a run whose GEMMs are all in the cache, which is a copy."""
    shutil.copytree(finished_once / "cache", tmp_path / "cache")
    flags = [f"--mnk={finished_once}/t.csv", f"--scalesim_path={finished_once}/fake"]
    flags += ["--num_npus=2", f"--cache_dir={tmp_path}/cache"]
    return Finished(flags, (finished_once / "workload.txt").read_bytes())


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_file_from_an_empty_a_full_a_partial_and_no_cache(
    tmp_path: Path, base: list[str]
) -> None:
    cold = run(tmp_path, *base, "--jobs=8")
    assert (cold.status, simulated(cold.out), len(entries(tmp_path / "cache"))) == (0, 12, 12)
    warm = run(tmp_path, *base, "--output_file=warm.txt")
    assert simulated(warm.out) == 0
    for entry in entries(tmp_path / "cache")[::2]:
        entry.unlink()
    half = run(tmp_path, *base, "--jobs=1", "--output_file=half.txt")
    assert simulated(half.out) == 6
    off = run(tmp_path, *base[:-1], "--cache_dir=", "--jobs=2", "--output_file=off.txt")
    assert simulated(off.out) == 12
    outputs = ("workload.txt", "warm.txt", "half.txt", "off.txt")
    assert len({(tmp_path / name).read_bytes() for name in outputs}) == 1


def test_the_run_folder_from_the_cache_is_as_from_simulations(
    tmp_path: Path, base: list[str]
) -> None:
    run(tmp_path, *base)
    assert simulated(run(tmp_path, *base, "--run_name=warm").out) == 0
    warm = files_below(tmp_path / "outputs/DATA/warm")
    assert warm == files_below(tmp_path / "outputs/DATA/t")
    assert sum(name.endswith("COMPUTE_REPORT.csv") for name in warm) == 12


def test_1000_layers_of_4_shapes_cost_12_simulations(tmp_path: Path, base: list[str]) -> None:
    write_table(tmp_path / "t.csv", *(f"n{i},{ROWS[i % 4].partition(',')[2]}" for i in range(1000)))
    result = run(tmp_path, *base, "--jobs=8")
    assert (result.status, simulated(result.out)) == (0, 12)
    for i in range(4):
        assert f"\nn{i} × 250\n" in result.out


def test_what_a_result_depends_on_is_in_the_key(tmp_path: Path, base: list[str]) -> None:
    assert simulated(run(tmp_path, *base).out) == 12
    config = tool.BUILT_IN_CONFIG
    (tmp_path / "same.cfg").write_text(
        f"# a comment\n{config}".replace("run_name = gemm", "run_name :  'other'")
    )
    assert simulated(run(tmp_path, *base, "--scalesim_config=same.cfg").out) == 0
    (tmp_path / "other.cfg").write_text(
        config.replace("IfmapSramSzkB: 6144", "IfmapSramSzkB: 6143")
    )
    assert simulated(run(tmp_path, *base, "--scalesim_config=other.cfg").out) == 12
    fake_v2(tmp_path / "more", SLOW.format(seconds=0.01))
    assert simulated(run(tmp_path, *base, f"--scalesim_path={tmp_path}/more").out) == 12
    assert simulated(run(tmp_path, *base, "--parallel=MODEL", "--datatype_size=4").out) == 12
    assert simulated(run(tmp_path, *base, "--output_file=again.txt").out) == 0


REPORT = "LayerID, Total Cycles,\n0, 5,\n"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\x00", id="binary"),
        pytest.param(b"[" * 100000, id="deep"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"{}", id="no files"),
        pytest.param(b'{"gemm": "G", "files": []}', id="files in a list"),
        pytest.param({"COMPUTE_REPORT.csv": 5}, id="number"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT.replace("5", "nan")}, id="nan"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "../x": "y"}, id="climbs out"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "a/../../x": "y"}, id="climbs out below"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "x": 7}, id="no text"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "..": "y"}, id="the folder above"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "x\u0000": "y"}, id="NUL"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "x": "\ud800"}, id="surrogate"),
    ],
)
def test_an_unreadable_entry_is_simulated_again_and_replaced(
    damage: bytes | dict[str, object], tmp_path: Path, finished: Finished
) -> None:
    entry = entries(tmp_path / "cache")[3]
    whole = json.loads(entry.read_bytes())
    if isinstance(damage, dict):
        damage = json.dumps({"gemm": entry.stem, "files": damage}).encode()
    entry.write_bytes(damage)
    again = run(tmp_path, *finished.flags)
    assert (again.status, simulated(again.out)) == (0, 1)
    assert json.loads(entry.read_bytes()) == whole
    assert (tmp_path / "workload.txt").read_bytes() == finished.output
    assert not list(tmp_path.rglob("x"))


def test_an_entry_is_believed_only_for_its_own_gemm(tmp_path: Path, finished: Finished) -> None:
    first, *others = entries(tmp_path / "cache")
    for other in others:
        other.write_bytes(first.read_bytes())
    again = run(tmp_path, *finished.flags)
    assert (again.status, simulated(again.out)) == (0, 11)
    assert (tmp_path / "workload.txt").read_bytes() == finished.output


@pytest.mark.parametrize("kind", ["file", "no folder may be made"])
def test_without_a_usable_cache_it_goes_on_with_a_warning(
    kind: str, tmp_path: Path, base: list[str]
) -> None:
    cache = tmp_path / "taken"
    cache.write_text("")
    target = cache if kind == "file" else cache / "deeper"
    result = without_progress(run(tmp_path, *base[:-1], f"--cache_dir={target}"))
    assert (result.status, simulated(result.out)) == (0, 12)
    assert result.err.startswith(f"warning: can't cache in {target}/")
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("env", "flags", "where"),
    [
        ({"XDG_CACHE_HOME": "{}/xdg"}, [], "xdg/gen_astrasim_workload_input"),
        ({"XDG_CACHE_HOME": "", "HOME": "{}/home"}, [], "home/.cache/gen_astrasim_workload_input"),
        ({"HOME": "{}/home"}, ["--cache_dir=~/mine"], "home/mine"),
    ],
)
def test_where_the_cache_is(
    env: dict[str, str], flags: list[str], where: str, tmp_path: Path, base: list[str]
) -> None:
    env = {name: value.format(tmp_path) for name, value in env.items()}
    assert run(tmp_path, *base[:-1], *flags, env=env, cache=True).status == 0
    assert len(entries(tmp_path / where)) == 12


@pytest.fixture
def stuck(tmp_path: Path, base: list[str]) -> subprocess.Popen[str]:
    """Return a run of which some GEMMs are finished and others never end, over an older output."""
    fake = fake_v2(tmp_path / "slow", STUCK)
    (tmp_path / "workload.txt").write_text("mine")
    (tmp_path / "temporary").mkdir()
    flags = [*base, f"--scalesim_path={fake}", "--jobs=3"]
    running = start(tmp_path, *flags, env={"TMPDIR": f"{tmp_path}/temporary"})
    wait_until_begun(running, 2, tmp_path / "cache", fake)
    return running


def test_interrupted(tmp_path: Path, stuck: subprocess.Popen[str]) -> None:
    """It waits for its SCALE-Sim processes to end, cleans up, and what is finished is kept."""
    began, limit = time.monotonic(), patience(2)
    stuck.send_signal(signal.SIGINT)
    result = ended(stuck)
    assert time.monotonic() - began < limit
    assert processes(tmp_path / "slow") == []
    assert list((tmp_path / "temporary").iterdir()) == []
    assert (result.status, result.out) == (-signal.SIGINT, ""), "a shell's loop would go on"
    kept = len(entries(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    finished = f"{kept} of 12 GEMMs finished and cached in {folder}"
    assert result.err == f"interrupted: {finished}: run the same command to go on\n"
    assert (tmp_path / "workload.txt").read_text() == "mine"
    for name in ("layers.csv", "scalesim.cfg", "t_fwd_pass.csv"):
        assert not (tmp_path / "outputs/DATA/t" / name).exists(), "results come together"


def test_terminated(tmp_path: Path, stuck: subprocess.Popen[str]) -> None:
    """It ends at once; its SCALE-Sim processes notice, and end and clean up by themselves.

    Only the folder of one that was just over, or yet to begin, may be left.
    """
    began, limit = time.monotonic(), patience(2)
    stuck.terminate()
    result = ended(stuck)
    assert time.monotonic() - began < limit
    assert (result.status, result.out, result.err) == (-signal.SIGTERM, "", "")
    assert gone(tmp_path / "slow")
    for folder in (tmp_path / "temporary").iterdir():
        assert [*folder.rglob("COMPUTE_REPORT.csv")] or not (folder / "scalesim.log").exists()
    assert len(entries(tmp_path / "cache")) >= 2
    assert (tmp_path / "workload.txt").read_text() == "mine"


def test_after_ctrl_c_only_what_was_not_finished_is_simulated(
    tmp_path: Path, base: list[str]
) -> None:
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds=0.3))
    flags = [*base, f"--scalesim_path={fake}", "--jobs=2"]
    running = start(tmp_path, *flags)
    wait_until_begun(running, 2, tmp_path / "cache", fake)
    running.send_signal(signal.SIGINT)
    assert ended(running).status == -signal.SIGINT
    kept = len(entries(tmp_path / "cache"))
    assert 2 <= kept < 12
    assert simulated(run(tmp_path, *flags).out) == 12 - kept


def test_interrupted_without_a_cache(tmp_path: Path, base: list[str]) -> None:
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds=600))
    running = start(tmp_path, *base, f"--scalesim_path={fake}", "--cache_dir=")
    assert until(lambda: bool(processes(fake)))
    running.send_signal(signal.SIGINT)
    result = ended(running)
    assert result.status == -signal.SIGINT
    assert result.err == "interrupted: 0 of 12 GEMMs finished\n"


# Bash goes on with a loop after a mere status of 130: it looks for a death by the signal.
LOOP = 'for i in 1 2 3; do "$@"; echo "point $i: $?"; done'


def test_ctrl_c_ends_a_shells_loop(tmp_path: Path, base: list[str]) -> None:
    fake = fake_v2(tmp_path / "slow", STUCK)
    command = in_bash(LOOP, *base, f"--scalesim_path={fake}", "--jobs=3")
    running = start_command(tmp_path, command, before=lead_a_group)
    wait_until_begun(running, 2, tmp_path / "cache", fake)
    os.killpg(running.pid, signal.SIGINT)
    result = ended(running)
    assert (result.status, result.out) == (-signal.SIGINT, "")
    assert result.err.startswith("interrupted: ")
    assert gone(fake)


def is_imported(module: str, said: Path) -> bool:
    """Say whether a Python that tells of its imports has this one."""
    return bool(re.search(rf"^import time:.*\| +{module}$", said.read_text(), re.MULTILINE))


def test_ctrl_c_ends_a_shells_loop_whenever_it_comes(tmp_path: Path) -> None:
    """From the script's first import to the end of a run, with a warning between.

    Before that Python may end with a mere status, and in imports it prints a traceback. A run that
    simulates imports tqdm, late.
    """
    said = tmp_path / "said"
    analytical = [FAST, "--num_npus=3"]
    simulated = [*base_flags(tmp_path, seconds=0), "--num_npus=3"]
    moments = [
        ("__future__", 0.1, analytical),
        ("absl.app", 0.05, analytical),
        ("tqdm", 0.05, simulated),
    ]
    chance = random.Random(0)
    for module, seconds, flags in moments:
        ended_by_it = 0
        for _ in range(60):  # tries, as a run may be over before it is interrupted
            python, *script = command_line(*flags)
            command = [
                "bash",
                "-c",
                f"exec 2>said; {LOOP}",
                "bash",
                python,
                "-Ximporttime",
                *script,
            ]
            said.write_text("")
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            running = start_command(tmp_path, command, before=lead_a_group)
            assert until(partial(is_imported, module, said))
            time.sleep(chance.uniform(0, seconds))
            os.killpg(running.pid, signal.SIGINT)
            result = ended(running)
            text = said.read_text()
            if "point 1: 0\n" in result.out:
                continue
            assert result.status == -signal.SIGINT, (result.out, text)
            assert "in command_line" not in text, text
            assert "AttributeError" not in text, text
            ended_by_it += not result.out
            if ended_by_it == 3:
                break
        assert ended_by_it == 3, module


def test_ctrl_c_at_the_making_of_tqdms_lock_ends_the_run(tmp_path: Path, base: list[str]) -> None:
    """There tqdm swallowed it and left half a lock, at which the first message stopped.

    The script is yet to import tqdm, whose lock is another one here.
    """
    program = (
        "import os, signal, tqdm.std\n"
        "class Lock:\n"
        "    def __init__(self):\n"
        "        print('a lock is made')\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "tqdm.std.TqdmDefaultWriteLock = Lock\n"
        "del sys.modules['tqdm']"
    )
    result = ended(start_command(tmp_path, after(program, *base, "--num_npus=3")))
    assert (result.status, result.out) == (-signal.SIGINT, "a lock is made\n")
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert result.err.splitlines() == warnings != []


def test_a_failure_ends_the_others_at_once(tmp_path: Path, base: list[str]) -> None:
    sleeps = "time.sleep(0.5 if ',32,' in open('gemm.csv').read() else 600)"
    fake = fake_v2(tmp_path / "slow", f"{sleeps}\nsys.exit(1)")
    write_table(tmp_path / "t.csv", "bad,64,20,32", "b,64,22,30")
    began = time.monotonic()
    result = run(tmp_path, *base, f"--scalesim_path={fake}", "--jobs=6")
    assert time.monotonic() - began < 60
    assert processes(fake) == []
    assert is_one_error_line(without_progress(result)), result


@pytest.fixture
def killed_at_random(tmp_path: Path, base: list[str]) -> list[str]:
    """Kill runs with a cache again and again; return their flags.

    At random moments from the first simulation on, or in turn from when it has been cached.
    """
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds=0.3))
    flags = [*base, f"--scalesim_path={fake}", "--jobs=2"]
    chance = random.Random(0)

    def has_come_far(running: subprocess.Popen[str], cached: int) -> bool:
        is_at_work = len(entries(tmp_path / "cache")) >= cached and bool(processes(fake))
        return is_at_work or running.poll() is not None

    for more in [0, 1] * 4:
        cached = len(entries(tmp_path / "cache")) + more
        running = start(tmp_path, *flags)
        assert until(partial(has_come_far, running, cached))
        time.sleep(chance.uniform(0, 0.3))
        running.kill()
        running.communicate(timeout=60)
        assert gone(fake)
    return flags


def test_sigkill_leaves_only_whole_entries(tmp_path: Path, killed_at_random: list[str]) -> None:
    found = entries(tmp_path / "cache")
    assert found
    scalesim = tool.ScaleSim(tmp_path / "slow", accelerator_of())
    for entry in found:
        assert scalesim.reported_cycles(json.loads(entry.read_text())["files"])
    result = run(tmp_path, *killed_at_random)
    assert (result.status, simulated(result.out)) == (0, 12 - len(found))


def test_a_process_that_ends_as_it_is_to_be_killed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Popen.poll() knows nothing while another thread is about to note its end."""
    killed = []

    def killpg(group: int, sent: int) -> None:
        killed.append((group, sent))
        raise ProcessLookupError

    class Ended:
        pid = 12345

        def poll(self) -> None: ...

    def simulate(_: tool.Gemm, __: int, on_start: Callable[[Any], None]) -> tool.Simulation:
        on_start(Ended())
        return tool.Simulation(status=1, files={}, cycles=None)

    scalesim = tool.ScaleSim(None, accelerator_of())
    monkeypatch.setattr(scalesim, "simulate", simulate)
    monkeypatch.setattr(os, "killpg", killpg)
    with tool.LocalPool(scalesim, 1).started() as submit:
        assert submit(task_of(1, 1, 1)).result().status == 1
    assert killed == [(12345, signal.SIGKILL)]


def test_runs_that_share_a_cache_and_a_run_folder_all_succeed(
    tmp_path: Path, base: list[str]
) -> None:
    flags = [*base, "--jobs=2", "--run_name=same"]
    four = [start(tmp_path, *flags, f"--output_file={i}.txt") for i in range(4)]
    results = [ended(running) for running in four]
    assert [(result.status, result.err) for result in results] == [(0, "")] * 4
    assert len({(tmp_path / f"{i}.txt").read_bytes() for i in range(4)}) == 1
    assert len(entries(tmp_path / "cache")) == 12
    assert not list((tmp_path / "outputs").rglob("*.part"))
    assert gone(tmp_path / "fake")


def test_no_simulation_outlives_a_killed_run(tmp_path: Path, base: list[str]) -> None:
    """Nobody is left to end them: they end themselves, and take their temporary folders along."""
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds=600))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    flags = [*base, f"--scalesim_path={fake}", "--jobs=2"]
    running = start(tmp_path, *flags, env={"TMPDIR": str(temporary)})
    assert until(lambda: len(processes(fake)) == 2)
    assert len(list(temporary.iterdir())) == 2
    time.sleep(1)  # long enough to be in the middle of SCALE-Sim
    running.kill()
    running.communicate(timeout=60)
    assert gone(fake)
    assert list(temporary.iterdir()) == []


def test_the_longest_simulation_is_begun_first(tmp_path: Path, base: list[str]) -> None:
    """So that it does not run alone in the end."""
    began = tmp_path / "began"
    notes = f"open({str(began)!r}, 'a').write(open('gemm.csv').read().splitlines()[1] + '\\n')"
    fake = fake_v2(tmp_path / "quick", f"{notes}\n{GOOD_REPORT}")
    write_table(tmp_path / "t.csv", "short,8,4,2", "long,4096,1024,512", "middle,512,256,128")
    assert run(tmp_path, *base, f"--scalesim_path={fake}", "--jobs=1").status == 0
    built_in = accelerator_of()
    cycles = []
    for line in began.read_text().splitlines():
        _, m, k, _, _, _, n, *_ = line.split(",")
        gemm = tool.Gemm(m=int(m), n=int(n), k=int(k))
        cycles.append(built_in.stall_free_cycles(gemm))
    assert len(cycles) == 9
    assert cycles == sorted(cycles, reverse=True)
    assert cycles[0] > cycles[-1]


def task_of(k: int, cycles: int, memory: int) -> tool.Task:
    """Return a simulation with such costs."""
    gemm = tool.Gemm(m=1, n=1, k=k)
    first_use = "the forward pass of x"
    return tool.Task(gemm=gemm, first_use=first_use, cycles=cycles, memory=memory, seconds=1.0)


class ToyPool(tool.Pool):
    """A pool of 8 slots and 100 bytes, which notes what begins, and what runs side by side."""

    def __init__(self) -> None:
        super().__init__(tool.ScaleSim(None, accelerator_of()), 8, 100, "a toy")
        self.began: list[int] = []
        self.now: list[int] = []
        self.most: list[int] = []

    @contextmanager
    def started(self) -> Iterator[tool.Submit]:
        """Give a function that only waits."""

        def simulate(task: tool.Task) -> tool.Simulation:
            self.now.append(task.memory)
            self.most.append(sum(self.now))
            time.sleep(0.05)
            self.now.remove(task.memory)
            return tool.Simulation(status=0, files={}, cycles=1)

        def submit(task: tool.Task) -> Future[tool.Simulation]:
            self.began.append(task.gemm.k)
            return threads.submit(simulate, task)

        with ThreadPoolExecutor(8) as threads:
            yield submit

    def check(self) -> None:
        """Do nothing: what waits does end."""


def test_no_more_begins_than_fits_in_memory() -> None:
    costs = [(90, 500), (80, 60), (70, 60), (60, 30), (50, 30), (40, 10)]
    tasks = [task_of(number, *cost) for number, cost in enumerate(costs, start=1)]
    pool = ToyPool()
    finished = [task for _, done in pool.run(tasks) for task in done]
    assert sorted(finished) == sorted(tasks)
    assert pool.began[:3] == [2, 4, 6], "the longest, then what fits beside it"
    assert pool.began[-1] == 1, "what never fits is tried last, and alone"
    assert pool.most[-1] == 500
    assert max(pool.most[:-1]) <= 100


def test_no_descriptors_left(tmp_path: Path, base: list[str]) -> None:
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds=600))
    flags = [*base, f"--scalesim_path={fake}", "--jobs=12"]
    command = in_bash('ulimit -n 16 && exec "$@"', *flags)
    result = ended(start_command(tmp_path, command))
    assert is_one_error_line(result), result
    assert result.err.endswith("Too many open files; fewer --jobs may help\n")
    assert gone(fake)


@pytest.fixture
def too_large(tmp_path: Path, base: list[str]) -> list[str]:
    """Return the flags for a table with a GEMM that fits into no memory."""
    write_table(tmp_path / "t.csv", "huge,2000000000,2000,1000", "small,2,3,4")
    return [*base, f"--scalesim_path={fake_v2(tmp_path / 'quick', GOOD_REPORT)}"]


HUGE = "GEMM 1000x2000x1000000000 (the weight gradient pass of huge)"


def test_what_does_not_fit_into_memory_is_refused_before_anything_is_simulated(
    tmp_path: Path, too_large: list[str]
) -> None:
    result = run(tmp_path, *too_large, "--jobs=2")
    assert is_one_error_line(result), result
    assert result.err.startswith(f"error: {HUGE} needs about ")
    assert result.err.endswith(
        " GB is free; --cycle_model=analytical needs none, --jobs=1 tries it all the same\n"
    )
    assert not (tmp_path / "cache").exists()


def test_what_does_not_fit_into_memory_is_tried_with_one_job(
    tmp_path: Path, too_large: list[str]
) -> None:
    result = without_progress(run(tmp_path, *too_large, "--jobs=1"))
    assert (result.status, simulated(result.out)) == (0, 6)
    (warning,) = result.err.splitlines()
    assert warning.startswith(f"warning: {HUGE} needs about ")
    assert warning.endswith(" GB is free; it may be killed, try --cycle_model=analytical")


def test_a_dry_run_says_what_would_not_fit_into_memory(
    tmp_path: Path, too_large: list[str]
) -> None:
    result = run(tmp_path, *too_large, "--dry_run")
    assert result.status == 0
    assert f" GB free: too much for {HUGE}\n" in result.out


def test_estimated_memory_is_what_was_measured() -> None:
    """Peak resident bytes of SCALE-Sim 3.0.0, measured once; foretold no less, nor a fifth more."""
    measured = {
        (256, "ws", 128, 512, 512): 119160832,
        (128, "ws", 512, 512, 512): 203546624,
        (128, "os", 512, 512, 512): 182009856,
        (128, "ws", 1024, 1024, 1024): 963645440,
    }
    built_in = accelerator_of()
    for (size, dataflow, m, n, k), peak in measured.items():
        array = built_in._replace(rows=size, columns=size, dataflow=dataflow)
        task = tool.ScaleSim(None, array).task(tool.Gemm(m=m, n=n, k=k), "")
        assert 1 <= task.memory / peak <= 1.2


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a tree of control groups whose membership is in the file `own`."""
    monkeypatch.setattr(tool.Machine, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(tool.Machine, "OWN_CONTROL_GROUP", tmp_path / "own")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b": "9000"}, 8000),
        ("0::/a/b\n", {"a/b": "max", "a": "9000"}, 8000),
        ("0::/a/b\n", {"a": "9000"}, 8000),  # b has no memory.max: it hides nothing above it
        ("0::/a/b\n", {"a/b": "9000", "a": "6000"}, 5000),
        ("0::/a\n", {"a": "500"}, 0),
        ("4:cpu:/x\n0::/a/b\n", {"a/b": "9000", "x": "5000"}, 8000),  # 4 is of version 1
        ("0::/docker/x\n", {"": "9000"}, 8000),  # in a container, whose own group is its root
    ],
)
def test_available_memory_is_what_the_tightest_control_group_leaves(
    own: str, limits: dict[str, str], expected: int, groups: Path
) -> None:
    """What is used there counts without what files cache."""
    write(groups / "own", own)
    for folder, limit in limits.items():
        write(groups / "cgroup" / folder / "memory.max", f"{limit}\n")
        write(groups / "cgroup" / folder / "memory.stat", "file 5000\nanon 1000\nkernel 70\n")
    assert tool.Machine().memory() == expected


@pytest.mark.parametrize("own", ["0::/a/b\n", "9:memory:/a\n", ""])
def test_available_memory_without_a_limit_is_the_machines(own: str, groups: Path) -> None:
    unlimited = tool.Machine().memory()
    write(groups / "own", own)
    write(groups / "cgroup/a/b/memory.max", "max\n")
    write(groups / "cgroup/a/b/memory.stat", "anon 1000\n")
    assert tool.Machine().memory() > unlimited / 2 > 10**6


@pytest.mark.parametrize(
    ("own", "quotas", "expected"),
    [
        ("0::/a/b\n", {"a/b": "max 100000", "a": "100000 100000"}, 1),
        ("0::/a\n", {"a": "20000 100000"}, 1),
        ("0::/a\n", {"a": "50000 100000"}, 1),
        ("0::/a\n", {"a": "50000 50000"}, 1),
        ("0::/a\n", {"a": "150000 100000"}, 2),
        ("0::/a\n", {"a": "200000 100000"}, 2),
        ("0::/a\n", {"a": "900000 100000"}, 3),
        ("0::/a\n", {"a": "max 100000"}, 3),
        ("4:cpu,cpuacct:/a\n", {"a": "50000 100000"}, 3),  # of version 1
    ],
)
def test_cpus_are_a_control_groups_quota_rounded_up(
    own: str,
    quotas: dict[str, str],
    expected: int,
    groups: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    write(groups / "own", own)
    for folder, quota in quotas.items():
        write(groups / "cgroup" / folder / "cpu.max", f"{quota}\n")
    assert tool.Machine().cpus() == expected


def test_where_there_are_no_control_groups(groups: Path) -> None:
    assert tool.Machine().cpus() >= 1
    assert tool.Machine().memory() > 10**6


@pytest.mark.parametrize("more", [[], [FAST], ["--dry_run"]], ids=["simulated", "formula", "dry"])
def test_no_home_is_no_error(more: list[str], tmp_path: Path) -> None:
    """A user whom the system does not know, as in some containers, has none."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nos.path.expanduser = lambda path: path  # as it is where there is no home\n"
    )
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    flags = [f"--mnk={table}", *([] if more == [FAST] else [f"--scalesim_path={fake}"])]
    env = {"XDG_CACHE_HOME": "", "PYTHONPATH": str(tmp_path)}
    result = run(tmp_path, *flags, *more, env=env, cache=True)
    assert result.status == 0
    assert "Traceback" not in result.err
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: there is no home folder: simulations are not cached"]
    assert not (tmp_path / "~").exists()
