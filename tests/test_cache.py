"""Each distinct GEMM once: side by side, remembered, resumed after any end, shared."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

import gen_astrasim_workload_input as tool
from helpers import GOOD_REPORT, SCRIPT, fake_v2, is_one_error_line, run, settings, write_table

# A stand-in whose cycles are M + 2 K + 3 N, after `seconds`.
SLOW = """\
m, k, one, k, one, n = map(int, open('gemm.csv').read().splitlines()[1].split(',')[1:7])
time.sleep({seconds})
print('ran', m, n, k)
report(HEADER + '0, %d, 0, 1.5,\\n' % (m + 2 * k + 3 * n))"""
ROWS = [f"l{i},{8 * i},{4 * i},{i}" for i in range(1, 5)]  # 4 layers, 12 distinct GEMMs on 2 NPUs


def simulated(out: str) -> int:
    return int(out.split("distinct GEMMs (")[1].split()[0])


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.json"))


def processes(folder: Path) -> list[str]:
    """Return the command lines of the SCALE-Sim processes that run the SCALE-Sim in `folder`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_text().split("\0")
        except OSError:
            continue
        if str(folder) in command and "-c" in command:
            found.append(" ".join(command))
    return found


def gone(folder: Path, within: float = 3) -> bool:
    end = time.monotonic() + within
    while processes(folder) and time.monotonic() < end:
        time.sleep(0.05)
    return not processes(folder)


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    table = write_table(tmp_path / "t.csv", *ROWS)
    fake = fake_v2(tmp_path / "fake", SLOW.format(seconds=0.1))
    return [f"--mnk={table}", f"--scalesim_path={fake}", "--num_npus=2", f"--cache_dir={tmp_path}/cache"]


def test_the_same_file_however_it_comes_about(tmp_path: Path, base: list[str]) -> None:
    """Cold, warm, half warm, with 1, 2 and 8 jobs, with the cache off: the same bytes, and only what is new is run."""
    cold = run(tmp_path, *base, "--jobs=8")
    expected = (tmp_path / "workload.txt").read_bytes()
    assert (cold.status, simulated(cold.out), len(entries(tmp_path / "cache"))) == (0, 12, 12)
    warm = run(tmp_path, *base, "--run_name=warm")
    assert simulated(warm.out) == 0
    for entry in entries(tmp_path / "cache")[::2]:
        entry.unlink()
    half = run(tmp_path, *base, "--jobs=1", "--output_file=half.txt")
    assert simulated(half.out) == 6
    off = run(tmp_path, *base[:-1], "--cache_dir=", "--jobs=2", "--output_file=off.txt")
    assert simulated(off.out) == 12
    assert {(tmp_path / name).read_bytes() for name in ("workload.txt", "half.txt", "off.txt")} == {expected}
    cold_files, warm_files = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "outputs/DATA/t", tmp_path / "outputs/DATA/warm")
    )
    assert cold_files == warm_files
    assert sum(name.endswith("COMPUTE_REPORT.csv") for name in warm_files) == 12


def test_1000_layers_of_4_shapes_cost_12_simulations(tmp_path: Path, base: list[str]) -> None:
    write_table(tmp_path / "t.csv", *(f"n{i},{ROWS[i % 4].partition(',')[2]}" for i in range(1000)))
    result = run(tmp_path, *base, "--jobs=8")
    assert (result.status, simulated(result.out)) == (0, 12)
    assert "250 × n0 ... n996" in result.out


def test_what_a_result_depends_on_is_in_the_key(tmp_path: Path, base: list[str]) -> None:
    assert simulated(run(tmp_path, *base).out) == 12
    config = tool.BUILT_IN_CONFIG
    (tmp_path / "same.cfg").write_text(f"# a comment\n{config}".replace("run_name = gemm", "run_name :  'other'"))
    assert simulated(run(tmp_path, *base, "--scalesim_config=same.cfg").out) == 0
    (tmp_path / "other.cfg").write_text(config.replace("IfmapSramSzkB: 6144", "IfmapSramSzkB: 6143"))
    assert simulated(run(tmp_path, *base, "--scalesim_config=other.cfg").out) == 12
    fake_v2(tmp_path / "more", SLOW.format(seconds=0))
    assert simulated(run(tmp_path, *base, f"--scalesim_path={tmp_path}/more").out) == 12
    assert simulated(run(tmp_path, *base, "--parallel=MODEL", "--datatype_size=4").out) == 12
    assert simulated(run(tmp_path, *base, "--output_file=again.txt").out) == 0


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\x00", id="binary"),
        pytest.param(b"[" * 100000, id="deep"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'{"COMPUTE_REPORT.csv": 5}', id="number"),
        pytest.param(b'{"COMPUTE_REPORT.csv": "LayerID, Total Cycles,\\n0, nan,\\n"}', id="nan"),
        pytest.param(b'{"COMPUTE_REPORT.csv": "LayerID, Total Cycles,\\n0, 5,\\n", "../x": "y"}', id="climbs out"),
        pytest.param(b'{"COMPUTE_REPORT.csv": "LayerID, Total Cycles,\\n0, 5,\\n", "x": 7}', id="no text"),
        pytest.param(b'{"COMPUTE_REPORT.csv": "LayerID, Total Cycles,\\n0, 5,\\n", "..": "y"}', id="the folder above"),
        pytest.param(b'{"COMPUTE_REPORT.csv": "LayerID, Total Cycles,\\n0, 5,\\n", "x\\u0000": "y"}', id="NUL"),
        pytest.param(b'{"COMPUTE_REPORT.csv": "LayerID, Total Cycles,\\n0, 5,\\n", "x": "\\ud800"}', id="surrogate"),
    ],
)
def test_an_unreadable_entry_is_simulated_again_and_replaced(damage: bytes, tmp_path: Path, base: list[str]) -> None:
    run(tmp_path, *base)
    expected = (tmp_path / "workload.txt").read_bytes()
    entry = entries(tmp_path / "cache")[3]
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    again = run(tmp_path, *base)
    assert (again.status, simulated(again.out)) == (0, 1)
    assert entry.read_bytes() == whole
    assert (tmp_path / "workload.txt").read_bytes() == expected
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize("kind", ["file", "no folder may be made"])
def test_without_a_usable_cache_it_goes_on_with_a_warning(kind: str, tmp_path: Path, base: list[str]) -> None:
    cache = tmp_path / "taken"
    cache.write_text("")
    target = cache if kind == "file" else cache / "deeper"
    result = run(tmp_path, *base[:-1], f"--cache_dir={target}")
    assert (result.status, simulated(result.out)) == (0, 12)
    assert result.err.startswith(f"warning: can't remember finished simulations in {target}/")
    assert len(result.err.splitlines()) == 1


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tool.default_cache_dir() == Path("/somewhere/gen_astrasim_workload_input")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative: to be ignored")
    monkeypatch.setenv("HOME", "/home/me")
    assert tool.default_cache_dir() == Path("/home/me/.cache/gen_astrasim_workload_input")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert tool.default_cache_dir() is None
    assert capsys.readouterr().err.startswith("warning: no home folder: finished simulations are not remembered")


def heed_ctrl_c() -> None:
    """Undo what a shell does for what it starts in the background: these tests may run there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def to_itself() -> None:
    """Begin a process group, whose members a Ctrl-C reaches together."""
    heed_ctrl_c()
    os.setpgrp()


def start(tmp_path: Path, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, **(env or {})},
        preexec_fn=heed_ctrl_c,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for(number: int, cache: Path, fake: Path) -> None:
    end = time.monotonic() + 60
    while len(entries(cache)) < number or not processes(fake):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(sent: signal.Signals, tmp_path: Path, base: list[str]) -> None:
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds="0.1 if n < 9 else 600"))
    (tmp_path / "workload.txt").write_text("mine")
    running = start(tmp_path, *base, f"--scalesim_path={fake}", "--jobs=3")
    wait_for(2, tmp_path / "cache", fake)
    began = time.monotonic()
    running.send_signal(sent)
    _, said = running.communicate()
    assert time.monotonic() - began < 2
    assert running.returncode == -sent, "a shell's loop would go on"
    assert processes(fake) == []
    kept = len(entries(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert said == f"interrupted: {kept} of 12 GEMMs are finished, kept in {folder}\n"
    assert (tmp_path / "workload.txt").read_text() == "mine"


def test_ctrl_c_ends_a_shells_loop(tmp_path: Path, base: list[str]) -> None:
    """Bash goes on with its loop after a mere status of 130: it looks for a death by the signal, as from a terminal."""
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds="0.1 if n < 9 else 600"))
    loop = 'for i in 1 2 3; do "$@"; echo "point $i: $?"; done'
    command = ["bash", "-c", loop, "bash", sys.executable, str(SCRIPT), *base, f"--scalesim_path={fake}", "--jobs=3"]
    pipe = subprocess.PIPE
    running = subprocess.Popen(command, cwd=tmp_path, preexec_fn=to_itself, stdout=pipe, stderr=pipe, text=True)
    wait_for(2, tmp_path / "cache", fake)
    os.killpg(running.pid, signal.SIGINT)
    out, said = running.communicate()
    assert (running.returncode, out) == (-signal.SIGINT, "")
    assert said.startswith("interrupted: ")
    assert gone(fake)


def test_a_failure_ends_the_others_at_once(tmp_path: Path, base: list[str]) -> None:
    fake = fake_v2(tmp_path / "slow", "time.sleep(0.5 if ',32,' in open('gemm.csv').read() else 600)\nsys.exit(1)")
    write_table(tmp_path / "t.csv", "bad,64,20,32", "b,64,22,30")
    began = time.monotonic()
    result = run(tmp_path, *base, f"--scalesim_path={fake}", "--jobs=6")
    assert is_one_error_line(result)
    assert time.monotonic() - began < 60
    assert processes(fake) == []


def test_killed_at_random_then_four_at_once(tmp_path: Path, base: list[str]) -> None:
    """SIGKILL leaves no process, nothing half-written, and what was finished; runs that share a cache all succeed."""
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds=0.3))
    flags = [*base, f"--scalesim_path={fake}", "--jobs=2"]
    chance = random.Random(0)
    for _ in range(8):
        running = start(tmp_path, *flags)
        time.sleep(chance.uniform(0.2, 1.2))
        running.kill()
        running.communicate()
        assert gone(fake)
    for entry in entries(tmp_path / "cache"):
        assert tool.reported_cycles(json.loads(entry.read_text()), 2) > 0
    four = [start(tmp_path, *flags, f"--output_file={i}.txt", "--run_name=same") for i in range(4)]
    assert [running.communicate()[1] for running in four] == [""] * 4
    assert [running.returncode for running in four] == [0] * 4
    assert len({(tmp_path / f"{i}.txt").read_bytes() for i in range(4)}) == 1
    assert len(entries(tmp_path / "cache")) == 12
    assert not list((tmp_path / "outputs").rglob("*.part"))
    assert gone(fake)


def test_no_simulation_outlives_a_killed_run(tmp_path: Path, base: list[str]) -> None:
    """Nobody is left to end them, so they end themselves, and take their temporary folders with them."""
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds=600))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    running = start(tmp_path, *base, f"--scalesim_path={fake}", "--jobs=2", env={"TMPDIR": str(temporary)})
    while len(processes(fake)) < 2:
        assert running.poll() is None
        time.sleep(0.02)
    assert len(list(temporary.iterdir())) == 2
    time.sleep(1)  # long enough to be in the middle of SCALE-Sim
    running.kill()
    running.communicate()
    assert gone(fake)
    assert list(temporary.iterdir()) == []


class Recorder(ThreadPoolExecutor):
    """An executor that notes what runs side by side."""

    def __init__(self) -> None:
        super().__init__(8)
        self.began: list[tool.Gemm] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.began.append(args[0])
        return super().submit(fn, *args, **kwargs)


def test_no_more_begins_than_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "available_memory", lambda: 100)
    work = {
        tool.Gemm(1, 1, size): tool.Work("layer x, forward pass", cycles, memory)
        for size, cycles, memory in ((1, 90, 500), (2, 80, 60), (3, 70, 60), (4, 60, 30), (5, 50, 30), (6, 40, 10))
    }
    now: list[int] = []
    most: list[int] = []

    def task(gemm: tool.Gemm) -> tool.Simulation:
        now.append(work[gemm].memory)
        most.append(sum(now))
        time.sleep(0.05)
        now.remove(work[gemm].memory)
        return "", {}

    with Recorder() as pool, tqdm(total=390, disable=True) as bar:
        finished = [gemm for gemm, _ in tool.run_side_by_side(pool, task, work, settings(tmp_path, jobs=8), bar)]
    assert sorted(finished) == sorted(work)
    assert [gemm.k for gemm in pool.began[:3]] == [2, 4, 6], "the longest, then what fits beside it"
    assert pool.began[-1].k == 1, "what never fits is tried last, and alone"
    assert most[-1] == 500
    assert max(most[:-1]) <= 100


def test_at_the_limit_of_ones_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no new thread")))
    work = {tool.Gemm(1, 2, 3): tool.Work("layer x, forward pass", 9, 9)}
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=9, disable=True) as bar,
        pytest.raises(tool.UserError, match=r"^can't begin GEMM 1x2x3: no new thread; fewer --jobs may help$"),
    ):
        next(tool.run_side_by_side(pool, lambda _: ("", {}), work, settings(tmp_path), bar))


def test_one_that_will_not_fit_is_warned_of_before(tmp_path: Path, base: list[str]) -> None:
    write_table(tmp_path / "t.csv", "huge,2000000000,2000000,1000000", "small,2,2,2")
    fake = fake_v2(tmp_path / "quick", GOOD_REPORT)
    result = run(tmp_path, *base, f"--scalesim_path={fake}")
    assert result.status == 0
    first, *_ = warnings = result.err.splitlines()
    assert len(warnings) == 3, "one a simulation that will not fit, not one of the small ones"
    assert first.startswith("warning: GEMM 1000000x2000000x1000000000 (layer huge, weight gradient pass) needs about ")
    assert first.endswith("it may be killed; --cycle_model=analytical gives its stall-free cycles at once")


def test_foretold_memory_is_what_was_measured() -> None:
    """Peak resident bytes of SCALE-Sim 3.0.0, measured once; foretold no less, and no more than a fifth above."""
    measured = {
        (256, "ws", tool.Gemm(128, 512, 512)): 119160832,
        (128, "ws", tool.Gemm(512, 512, 512)): 203546624,
        (128, "os", tool.Gemm(512, 512, 512)): 182009856,
        (128, "ws", tool.Gemm(1024, 1024, 1024)): 963645440,
    }
    for (size, dataflow, gemm), peak in measured.items():
        array = tool.Architecture("", "", size, size, dataflow)
        assert 1 <= tool.foretold_memory(gemm, array) / peak <= 1.2


def test_available_memory_heeds_the_machine() -> None:
    assert 0 < tool.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
