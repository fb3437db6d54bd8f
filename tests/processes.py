"""Runs of the script that are started and ended by the tests, and the SCALE-Sim processes below."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers import SCRIPT, Run, fake_v2, write_table

# A stand-in whose cycles are M + 2 K + 3 N, after `seconds`.
SLOW = """\
m, k, one, k, one, n = map(int, open('gemm.csv').read().splitlines()[1].split(',')[1:7])
time.sleep({seconds})
print('ran', m, n, k)
report(HEADER + '0, %d, 0, 1.5,\\n' % (m + 2 * k + 3 * n))"""
# A stand-in of whose GEMMs some are finished soon and the others never, so that a run can be ended.
STUCK = SLOW.format(seconds="0.1 if n < 9 else 600")
ROWS = [f"l{i},{8 * i},{4 * i},{i}" for i in range(1, 5)]  # 4 layers, 12 distinct GEMMs on 2 NPUs


def base_flags(folder: Path, seconds: float) -> list[str]:
    """Make a table of ROWS and a stand-in that takes `seconds`; return the flags for them."""
    table = write_table(folder / "t.csv", *ROWS)
    fake = fake_v2(folder / "fake", SLOW.format(seconds=seconds))
    cache = f"--cache_dir={folder}/cache"
    return [f"--mnk={table}", f"--scalesim_path={fake}", "--num_npus=2", cache]


def simulated(out: str) -> int:
    """Return how many GEMMs a run says that it simulated."""
    return int(out.split(" (")[-1].split(" simulated, ")[0])


def without_progress(result: Run) -> Run:
    """Return what came of a run, without the lines that say how far its simulations are."""
    lines = result.err.splitlines(keepends=True)
    return result._replace(err="".join(x for x in lines if not x.startswith("simulating: ")))


def entries(cache: Path) -> list[Path]:
    """Return the entries of a cache."""
    return sorted(cache.rglob("*.json"))


def until(condition: Callable[[], bool], within: float = 60) -> bool:
    """Wait until a condition holds; say whether it did in time."""
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def processes(folder: Path) -> list[str]:
    """Return the command lines of the processes that run the SCALE-Sim in `folder`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = os.fsdecode(file.read_bytes()).split("\0")
        except OSError:
            continue
        if str(folder) in command and "-c" in command:
            found.append(" ".join(command))
    return found


def patience(seconds: float) -> float:
    """Return how long something takes now that takes so long where nothing else runs."""
    running, _, _ = Path("/proc/loadavg").read_text().split()[3].partition("/")
    return seconds * max(1, int(running) / len(os.sched_getaffinity(0)), *os.getloadavg()[:1])


def gone(folder: Path, within: float = 3) -> bool:
    """Say whether all processes that run the SCALE-Sim in `folder` end in time."""
    return until(lambda: not processes(folder), patience(within))


def command_line(*flags: str) -> list[str]:
    """Return the command that runs the script."""
    return [sys.executable, str(SCRIPT), *flags]


def in_bash(program: str, *flags: str) -> list[str]:
    """Return the command of a shell whose program runs the script, there "$@"."""
    return ["bash", "-c", program, "bash", *command_line(*flags)]


def after(program: str, *flags: str) -> list[str]:
    """Return the command that runs the script after a program, in the same Python."""
    start = f"import runpy, sys\nsys.argv.pop(0)\n{program}\n"
    run_script = "runpy.run_path(sys.argv[0], run_name='__main__')"
    python, *script = command_line(*flags)
    return [python, "-c", start + run_script, *script]


def heed_ctrl_c() -> None:
    """Undo what a shell does for what it starts in the background: these tests may run there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lead_a_group() -> None:
    """Begin a process group, whose members a Ctrl-C reaches together, as at a terminal."""
    heed_ctrl_c()
    os.setpgrp()


STARTED: list[subprocess.Popen[str]] = []  # ended after each test, however that ends


def start_command(
    folder: Path,
    command: list[str],
    env: dict[str, str] | None = None,
    before: Callable[[], None] = heed_ctrl_c,
) -> subprocess.Popen[str]:
    """Start a command that heeds Ctrl-C."""
    running = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **(env or {})},
        preexec_fn=before,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(running)
    return running


def start(folder: Path, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start the script."""
    return start_command(folder, command_line(*flags), env)


def ended(running: subprocess.Popen[str]) -> Run:
    """Wait for the end of what was started; return what came of it, as of any run."""
    out, err = running.communicate(timeout=60)
    return without_progress(Run(running.returncode, out, err))


def wait_until_begun(running: subprocess.Popen[str], number: int, cache: Path, fake: Path) -> None:
    """Return when `number` simulations are finished and another one runs."""

    def has_begun() -> bool:
        assert running.poll() is None, running.communicate()
        return len(entries(cache)) >= number and bool(processes(fake))

    assert until(has_begun)


@contextmanager
def closed_pipe() -> Iterator[int]:
    """Give a pipe to write to whose reader has gone away."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def end_started() -> None:
    """Kill what a test has left running, each with its group if it leads one."""
    while STARTED:
        running = STARTED.pop()
        if running.poll() is None:
            if os.getpgid(running.pid) == running.pid:
                os.killpg(running.pid, signal.SIGKILL)
            running.kill()
            running.wait()
        for stream in (running.stdout, running.stderr):
            if stream:
                stream.close()
