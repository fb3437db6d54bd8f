"""Each distinct GEMM once: side by side, cached, resumed after any end, shared."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import GOOD_REPORT, SCRIPT, fake_v2, is_one_error_line, run, write_table

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
    return [
        f"--mnk={table}",
        f"--scalesim_path={fake}",
        "--num_npus=2",
        f"--cache_dir={tmp_path}/cache",
    ]


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
    assert {(tmp_path / name).read_bytes() for name in ("workload.txt", "half.txt", "off.txt")} == {
        expected
    }
    cold_files, warm_files = (
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "outputs/DATA/t", tmp_path / "outputs/DATA/warm")
    )
    assert cold_files == warm_files
    assert sum(name.endswith("COMPUTE_REPORT.csv") for name in warm_files) == 12


def test_1000_layers_of_4_shapes_cost_12_simulations(tmp_path: Path, base: list[str]) -> None:
    write_table(tmp_path / "t.csv", *(f"n{i},{ROWS[i % 4].partition(',')[2]}" for i in range(1000)))
    result = run(tmp_path, *base, "--jobs=8")
    assert (result.status, simulated(result.out)) == (0, 12)
    assert [line.split("  ")[0] for line in result.out.splitlines()[1:13:3]] == [
        f"250 × n{i} ... n{996 + i}" for i in range(4)
    ]


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
    fake_v2(tmp_path / "more", SLOW.format(seconds=0))
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
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "x": 7}, id="no text"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "..": "y"}, id="the folder above"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "x\u0000": "y"}, id="NUL"),
        pytest.param({"COMPUTE_REPORT.csv": REPORT, "x": "\ud800"}, id="surrogate"),
    ],
)
def test_an_unreadable_entry_is_simulated_again_and_replaced(
    damage: bytes | dict[str, object], tmp_path: Path, base: list[str]
) -> None:
    run(tmp_path, *base)
    expected = (tmp_path / "workload.txt").read_bytes()
    entry = entries(tmp_path / "cache")[3]
    whole = json.loads(entry.read_bytes())
    entry.write_bytes(
        damage
        if isinstance(damage, bytes)
        else json.dumps({"gemm": entry.stem, "seconds": 1, "files": damage}).encode()
    )
    again = run(tmp_path, *base)
    assert (again.status, simulated(again.out)) == (0, 1)
    mended = json.loads(entry.read_bytes())
    assert {**mended, "seconds": 0} == {**whole, "seconds": 0}
    assert 0 < mended["seconds"] < 60
    assert (tmp_path / "workload.txt").read_bytes() == expected
    assert not list(tmp_path.rglob("x"))


def test_an_entry_is_believed_only_for_its_own_gemm(tmp_path: Path, base: list[str]) -> None:
    run(tmp_path, *base)
    expected = (tmp_path / "workload.txt").read_bytes()
    first, *others = entries(tmp_path / "cache")
    for other in others:
        other.write_bytes(first.read_bytes())
    again = run(tmp_path, *base)
    assert (again.status, simulated(again.out)) == (0, 11)
    assert (tmp_path / "workload.txt").read_bytes() == expected


@pytest.mark.parametrize("kind", ["file", "no folder may be made"])
def test_without_a_usable_cache_it_goes_on_with_a_warning(
    kind: str, tmp_path: Path, base: list[str]
) -> None:
    cache = tmp_path / "taken"
    cache.write_text("")
    target = cache if kind == "file" else cache / "deeper"
    result = run(tmp_path, *base[:-1], f"--cache_dir={target}")
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
    _, said = running.communicate(timeout=60)
    assert time.monotonic() - began < 2
    assert running.returncode == -sent, "a shell's loop would go on"
    assert processes(fake) == []
    kept = len(entries(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert said == f"interrupted: {kept} of 12 GEMMs are finished, cache: {folder}\n"
    assert (tmp_path / "workload.txt").read_text() == "mine"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("flag", ["--num_npus=2", "--mnk=missing.csv"])
def test_a_signal_after_the_end_is_not_swallowed(
    sent: signal.Signals, flag: str, tmp_path: Path
) -> None:
    """Neither after the work nor after an error: sent here when Python is being taken down."""
    program = "import atexit, os, runpy, sys; sys.argv.pop(0); sent = int(sys.argv.pop(0))\n"
    program += "atexit.register(lambda: os.kill(os.getpid(), sent)); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        program,
        str(int(sent)),
        str(SCRIPT),
        "--cycle_model=analytical",
        flag,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=heed_ctrl_c
    )
    assert done.returncode == -sent
    assert "Traceback" not in done.stderr
    assert (tmp_path / "workload.txt").exists() == (flag == "--num_npus=2")


def test_ctrl_c_ends_a_shells_loop(tmp_path: Path, base: list[str]) -> None:
    """Bash goes on with its loop after a mere status of 130: it looks for a death by the signal, as from a terminal."""
    fake = fake_v2(tmp_path / "slow", SLOW.format(seconds="0.1 if n < 9 else 600"))
    loop = 'for i in 1 2 3; do "$@"; echo "point $i: $?"; done'
    command = [
        "bash",
        "-c",
        loop,
        "bash",
        sys.executable,
        str(SCRIPT),
        *base,
        f"--scalesim_path={fake}",
        "--jobs=3",
    ]
    pipe = subprocess.PIPE
    running = subprocess.Popen(
        command, cwd=tmp_path, preexec_fn=to_itself, stdout=pipe, stderr=pipe, text=True
    )
    wait_for(2, tmp_path / "cache", fake)
    os.killpg(running.pid, signal.SIGINT)
    out, said = running.communicate(timeout=60)
    assert (running.returncode, out) == (-signal.SIGINT, "")
    assert said.startswith("interrupted: ")
    assert gone(fake)


def test_a_failure_ends_the_others_at_once(tmp_path: Path, base: list[str]) -> None:
    fake = fake_v2(
        tmp_path / "slow",
        "time.sleep(0.5 if ',32,' in open('gemm.csv').read() else 600)\nsys.exit(1)",
    )
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
        running.communicate(timeout=60)
        assert gone(fake)
    for entry in entries(tmp_path / "cache"):
        assert tool.reported_cycles(json.loads(entry.read_text())["files"], 2)
    four = [start(tmp_path, *flags, f"--output_file={i}.txt", "--run_name=same") for i in range(4)]
    assert [running.communicate(timeout=120)[1] for running in four] == [""] * 4
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
    running = start(
        tmp_path, *base, f"--scalesim_path={fake}", "--jobs=2", env={"TMPDIR": str(temporary)}
    )
    end = time.monotonic() + 60
    while len(processes(fake)) < 2:
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    assert len(list(temporary.iterdir())) == 2
    time.sleep(1)  # long enough to be in the middle of SCALE-Sim
    running.kill()
    running.communicate(timeout=60)
    assert gone(fake)
    assert list(temporary.iterdir()) == []


def test_no_more_begins_than_fits_in_memory() -> None:
    jobs = [
        tool.Job(tool.Gemm(1, 1, size), "layer x, forward pass", cycles, memory, 1.0)
        for size, cycles, memory in (
            (1, 90, 500),
            (2, 80, 60),
            (3, 70, 60),
            (4, 60, 30),
            (5, 50, 30),
            (6, 40, 10),
        )
    ]
    began: list[int] = []
    now: list[int] = []
    most: list[int] = []

    def task(job: tool.Job) -> tool.Simulation:
        now.append(job.memory)
        most.append(sum(now))
        time.sleep(0.05)
        now.remove(job.memory)
        return tool.Simulation(0, 0.1, {})

    with ThreadPoolExecutor(8) as pool:

        def submit(job: tool.Job) -> Future[tool.Simulation]:
            began.append(job.gemm.k)
            return pool.submit(task, job)

        finished = [job for _, done in tool.run_side_by_side(submit, jobs, 8, 100) for job in done]
    assert sorted(finished) == sorted(jobs)
    assert began[:3] == [2, 4, 6], "the longest, then what fits beside it"
    assert began[-1] == 1, "what never fits is tried last, and alone"
    assert most[-1] == 500
    assert max(most[:-1]) <= 100


def test_no_descriptors_left(tmp_path: Path, base: list[str]) -> None:
    command = [
        "bash",
        "-c",
        'ulimit -n 24 && exec "$@"',
        "bash",
        sys.executable,
        str(SCRIPT),
        *base,
        "--jobs=12",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert done.stderr.endswith("Too many open files; fewer --jobs may help\n")
    assert gone(tmp_path / "fake")


def test_those_that_will_not_fit_are_warned_of_before(tmp_path: Path, base: list[str]) -> None:
    write_table(tmp_path / "t.csv", "huge,2000000000,2000000,1000000", "small,2,2,2")
    fake = fake_v2(tmp_path / "quick", GOOD_REPORT)
    result = run(tmp_path, *base, f"--scalesim_path={fake}")
    assert result.status == 0
    (warning,) = result.err.splitlines()
    assert warning.startswith(
        "warning: GEMM 1000000x2000000x1000000000 (layer huge, weight gradient pass) needs about "
    )
    assert warning.endswith(" GB is free; it may be killed, try --cycle_model=analytical")


def test_estimated_memory_is_what_was_measured() -> None:
    """Peak resident bytes of SCALE-Sim 3.0.0, measured once; foretold no less, and no more than a fifth above."""
    measured = {
        (256, "ws", tool.Gemm(128, 512, 512)): 119160832,
        (128, "ws", tool.Gemm(512, 512, 512)): 203546624,
        (128, "os", tool.Gemm(512, 512, 512)): 182009856,
        (128, "ws", tool.Gemm(1024, 1024, 1024)): 963645440,
    }
    for (size, dataflow, gemm), peak in measured.items():
        array = tool.Architecture("", "", [], size, size, dataflow)
        assert 1 <= tool.estimated_cost(gemm, array)[0] / peak <= 1.2


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a tree of control groups whose membership is in the file `own`."""
    monkeypatch.setattr(tool, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(tool, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


STAT = {2: "anon 1000\nfile 5000\n", 1: "cache 5000\nrss 7\ntotal_cache 5000\ntotal_rss 1000\n"}


@pytest.mark.parametrize(
    ("own", "version", "limits", "expected"),
    [
        ("0::/a/b\n", 2, {"a/b": "9000"}, 8000),
        ("0::/a/b\n", 2, {"a/b": "max", "a": "9000"}, 8000),
        ("0::/a/b\n", 2, {"a": "9000"}, 8000),  # b has no memory.max: it hides nothing above it
        ("0::/a/b\n", 2, {"a/b": "9000", "a": "6000"}, 5000),
        ("0::/a\n", 2, {"a": "500"}, 0),
        (
            "4:cpu,cpuacct:/a\n9:memory:/a/b\n0::/\n",
            1,
            {"memory/a/b": "9223372036854771712", "memory/a": "9000"},
            8000,
        ),
        (
            "9:memory:/docker/x\n",
            1,
            {"memory": "9000"},
            8000,
        ),  # in a container, whose own group is its root
        ("9:memory:/a\n", 1, {}, None),
        ("0::/a/b\n", 2, {"a/b": "max"}, None),
    ],
)
def test_available_memory_heeds_every_control_group(
    own: str, version: int, limits: dict[str, str], expected: int | None, groups: Path
) -> None:
    write(groups / "own", own)
    unlimited = tool.available_memory()
    for folder, limit in limits.items():
        write(
            groups
            / "cgroup"
            / folder
            / ("memory.max" if version == 2 else "memory.limit_in_bytes"),
            limit + "\n",
        )
        write(groups / "cgroup" / folder / "memory.stat", STAT[version])
    if expected is None:
        assert tool.available_memory() > unlimited / 2 > 10**6
    else:
        assert tool.available_memory() == expected


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}, 1),
        ("0::/a\n", {"a/cpu.max": "20000 100000"}, 1),
        (
            "4:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "50000"},
            1,
        ),
        (
            "4:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "5"},
            None,
        ),
        ("0::/a\n", {"a/cpu.max": "max 100000"}, None),
        ("0::/a\n", {"a/cpu.max": "150000 100000"}, 2),
    ],
)
def test_jobs_heed_the_quota_of_a_control_group(
    own: str,
    files: dict[str, str],
    expected: int | None,
    groups: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    write(groups / "own", own)
    for name, text in files.items():
        write(groups / "cgroup" / name, text + "\n")
    assert tool.available_cpus() == (expected or 3)


def test_where_there_are_no_control_groups(groups: Path) -> None:
    assert tool.available_cpus() >= 1
    assert tool.available_memory() > 10**6
