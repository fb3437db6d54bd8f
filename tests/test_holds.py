"""What a run holds out: odd cache entries, silent servers, stopped processes, mounted outputs."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gen_astrasim_workload_input as tool
from clusters import Cluster, cluster, start_worker
from helpers import (
    BOUND,
    FAST,
    ROOT,
    Run,
    accelerator_of,
    fake_v2,
    generate,
    is_one_error_line,
    rows_of,
    run,
    write_table,
)
from processes import (
    after,
    base_flags,
    command_line,
    ended,
    entries,
    simulated,
    start,
    start_command,
    until,
    wait_until_begun,
)


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    return base_flags(tmp_path, seconds=0.2)


def default_mode() -> int:
    """Return the permissions of a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


# --- Entries of the cache that are no regular files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose GEMMs are all in the cache."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder, *base_flags(folder, seconds=0)).status == 0
    return folder


def pipe(entry: Path, _: Path) -> None:
    os.mkfifo(entry)


def link_to_itself(entry: Path, _: Path) -> None:
    entry.symlink_to(entry.name)


def link_to_another_file(entry: Path, target: Path) -> None:
    target.write_text("mine")
    entry.symlink_to(target)


def link_to_a_whole_entry(entry: Path, target: Path) -> None:
    target.write_bytes(target.with_suffix(".whole").read_bytes())
    entry.symlink_to(target)


def link_to_nothing(entry: Path, target: Path) -> None:
    entry.symlink_to(target)


def link_to_a_device(entry: Path, _: Path) -> None:
    entry.symlink_to("/dev/zero")


def damaged_and_closed(entry: Path, _: Path) -> None:
    entry.write_text("{}")
    entry.chmod(0o600)


def again(tmp_path: Path, finished: Path, spoil: Callable[[Path, Path], None]) -> tuple[Run, Path]:
    """Spoil an entry of a copy of the cache, run again; return what came of it, and the entry."""
    shutil.copytree(finished / "cache", tmp_path / "cache")
    entry = entries(tmp_path / "cache")[3]
    entry.rename(tmp_path / "target.whole")
    spoil(entry, tmp_path / "target")
    flags = [f"--mnk={finished}/t.csv", f"--scalesim_path={finished}/fake", "--num_npus=2"]
    return ended(start(tmp_path, *flags, f"--cache_dir={tmp_path}/cache")), entry


@pytest.mark.parametrize(
    "spoil",
    [
        *(pipe, link_to_itself, link_to_another_file, link_to_a_whole_entry),
        *(link_to_nothing, link_to_a_device, damaged_and_closed),
    ],
)
def test_an_entry_that_is_no_whole_regular_file_is_simulated_again_and_replaced(
    spoil: Callable[[Path, Path], None], tmp_path: Path, finished: Path
) -> None:
    result, entry = again(tmp_path, finished, spoil)
    assert (result.status, result.err, simulated(result.out)) == (0, "", 1)
    whole, target = tmp_path / "target.whole", tmp_path / "target"
    assert stat.S_ISREG(entry.lstat().st_mode)
    assert stat.S_IMODE(entry.lstat().st_mode) == default_mode()
    assert entry.read_bytes() == whole.read_bytes()
    if spoil is link_to_another_file:
        assert target.read_text() == "mine"
    if spoil is link_to_nothing:
        assert not target.exists()
    assert (tmp_path / "workload.txt").read_bytes() == (finished / "workload.txt").read_bytes()


def test_a_folder_where_an_entry_should_be(tmp_path: Path, finished: Path) -> None:
    result, entry = again(tmp_path, finished, lambda entry, _: entry.mkdir())
    assert (result.status, simulated(result.out)) == (0, 1)
    why = "Is a directory; going on without"
    assert result.err == f"warning: can't cache in {entry.parent}: {why}\n"
    assert list(entry.iterdir()) == []
    assert not list(entry.parent.glob(".*"))


# --- Dask: what says nothing, or is gone

# The script's own clock, not Dask's, runs a minute in each second.
HASTY = """\
import sys, time
real = time.monotonic
def hasty():
    return real() * (60 if sys._getframe(1).f_globals["__name__"] == "__main__" else 1)
time.monotonic = hasty
"""
# And it waits for an answer not for a minute but for a second.
IMPATIENT = (
    HASTY
    + """\
from concurrent.futures import Future
wait = Future.result
def impatient(self, timeout=None):
    return wait(self, 1 if timeout == 60 else timeout)
Future.result = impatient
"""
)


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Return a cluster with a worker."""
    with cluster(1, tmp_path_factory.mktemp("cluster")) as one:
        yield one


def said(running: subprocess.Popen[str], kind: str) -> str:
    """Return the next line of a kind that a run says within a minute, without that word."""
    assert running.stderr
    patience = threading.Timer(60, running.kill)
    patience.start()
    try:
        for line in running.stderr:
            if line.startswith(f"{kind}: "):
                return line.removeprefix(f"{kind}: ")
        raise AssertionError(f"it ended without a line {kind}:")
    finally:
        patience.cancel()


def no_workers(address: str) -> str:
    """Return what is said each minute in which there are no workers."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"the Dask scheduler at {address} has no workers; they need Python {here}\n"


def test_a_server_that_accepts_and_never_answers(tmp_path: Path, base: list[str]) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import gen_astrasim_workload_input as tool\n"
        "assert tool.DaskPool.ANSWER_SECONDS == 60\n"
        "tool.DaskPool.ANSWER_SECONDS = 1\n"
        "tool.command_line()"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        flag = f"--dask_scheduler=tcp://127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-c", program, *base, flag]
        began = time.monotonic()
        result = ended(start_command(tmp_path, command))
        assert time.monotonic() - began < 15
    assert is_one_error_line(result), result
    assert result.err == f"error: {flag} can't be reached: no answer in 1 s\n"


def test_a_scheduler_that_is_stopped_is_waited_for_aloud_until_it_ends(
    tmp_path: Path, base: list[str]
) -> None:
    with cluster(0, tmp_path) as (address, (scheduler,)):
        flag = f"--dask_scheduler={address}"
        running = start_command(tmp_path, after(IMPATIENT, *base, flag))
        said(running, "waiting")
        scheduler.send_signal(signal.SIGSTOP)
        while (line := said(running, "waiting")) == no_workers(address):
            pass  # of looks before it was stopped
        assert line == f"{flag} does not answer: no answer in 60 s\n"
        scheduler.kill()
        result = ended(running)
    errors = [line for line in result.err.splitlines() if not line.startswith("waiting: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {flag} ")
    assert result.status == 1


def test_a_scheduler_that_is_killed_before_there_are_workers_is_an_error(
    tmp_path: Path, base: list[str]
) -> None:
    with cluster(0, tmp_path) as (address, (scheduler,)):
        flag = f"--dask_scheduler={address}"
        running = start(tmp_path, *base, flag)
        assert said(running, "waiting") == no_workers(address)
        scheduler.kill()
        began = time.monotonic()
        result = ended(running)
        assert time.monotonic() - began < 15
    assert (result.status, result.out) == (1, "")
    (error,) = result.err.splitlines()
    assert error.startswith(f"error: {flag} ")


@pytest.mark.parametrize("status", ["closed", "connecting", "closing"])
def test_a_client_that_is_no_longer_connected_is_an_error(status: str, tmp_path: Path) -> None:
    """Whatever Dask makes of the simulations that it had."""
    scalesim = tool.ScaleSim(fake_v2(tmp_path / "fake", "pass"), accelerator_of())
    pool = tool.DaskPool(scalesim, "tcp://x:1")
    pool.client = SimpleNamespace(status=status)
    with pytest.raises(tool.UserError) as error:
        pool.check()
    assert str(error.value) == "--dask_scheduler=tcp://x:1 has ended or lost the connection"


def test_a_worker_of_another_python_is_refused_by_name(
    tmp_path: Path, base: list[str], one_worker: Cluster
) -> None:
    address, _ = one_worker
    other = "import platform\nplatform.python_version_tuple = lambda: ('3', '99', '0')"
    command = after(other, *base, f"--dask_scheduler={address}")
    result = ended(start_command(tmp_path, command))
    assert is_one_error_line(result), result
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert result.err.startswith("error: Dask worker tcp://127.0.0.1:")
    assert f" has Python {here}." in result.err
    assert result.err.endswith(", expected 3.99 as here\n")
    assert not entries(tmp_path / "cache")


def test_when_all_workers_are_gone_it_says_so_each_minute(
    tmp_path: Path, base: list[str], one_worker: Cluster
) -> None:
    address, started = one_worker
    running = start_command(tmp_path, after(HASTY, *base, f"--dask_scheduler={address}"))
    wait_until_begun(running, 2, tmp_path / "cache", tmp_path / "fake")
    started[-1].kill()
    assert [said(running, "waiting") for _ in range(2)] == [no_workers(address)] * 2
    started.append(start_worker(tmp_path, address))
    result = ended(running)
    assert result.status == 0, result
    assert len(entries(tmp_path / "cache")) == 12


# --- SCALE-Sim processes that do not listen

BODIES = {
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "in a C call that keeps Python's lock": "import ctypes\nctypes.PyDLL(None).sleep(600)",
    "below a stopped one": (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "open(pids + str(child.pid), 'w').close()\n"
        "os.kill(os.getpid(), signal.SIGSTOP)"
    ),
}
# Before what a body does: one of the processes fails once there are two others.
FAILURE = """\
try:
    os.close(os.open(pids + 'failure', os.O_CREAT | os.O_EXCL))
except FileExistsError:
    pass
else:
    while len(os.listdir(pids)) < 3:
        time.sleep(0.01)
    sys.exit(4)
"""


def deaf(tmp_path: Path, body: str, before: str = "") -> tuple[list[str], Path]:
    """Make a stand-in whose processes tell their numbers; return flags, and where they tell."""
    pids = tmp_path / "pids"
    pids.mkdir()
    told = f"pids = {str(pids)!r} + '/'\n{before}open(pids + str(os.getpid()), 'w').close()\n"
    fake = fake_v2(tmp_path / "deaf", told + body)
    return [*base_flags(tmp_path, seconds=0), f"--scalesim_path={fake}", "--jobs=3"], pids


def alive(pids: Path) -> list[int]:
    """Return which processes of those that told their numbers run, or could."""
    found = []
    for path in pids.iterdir():
        stat_file = Path("/proc", path.name, "stat")
        try:
            state = stat_file.read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(int(path.name))
    return found


def end_all(pids: Path) -> None:
    """Kill what a failed test would leave."""
    for pid in alive(pids):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("body", list(BODIES.values()), ids=list(BODIES))
def test_ctrl_c_ends_processes_that_do_not_listen(body: str, tmp_path: Path) -> None:
    flags, pids = deaf(tmp_path, body)
    number = 6 if "child" in body else 3
    (tmp_path / "temporary").mkdir()
    running = start(tmp_path, *flags, env={"TMPDIR": f"{tmp_path}/temporary"})
    try:
        assert until(lambda: len(alive(pids)) == number)
        time.sleep(0.3)
        began = time.monotonic()
        running.send_signal(signal.SIGINT)
        result = ended(running)
        assert time.monotonic() - began < 5
        assert until(lambda: not alive(pids), within=3)
    finally:
        end_all(pids)
    assert (result.status, result.out) == (-signal.SIGINT, "")
    assert result.err.startswith("interrupted: 0 of 12 GEMMs finished")
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("body", list(BODIES.values()), ids=list(BODIES))
def test_an_error_in_another_gemm_ends_processes_that_do_not_listen(
    body: str, tmp_path: Path
) -> None:
    flags, pids = deaf(tmp_path, body, before=FAILURE)
    running = start(tmp_path, *flags)
    try:
        result = ended(running)
        assert until(lambda: not alive(pids), within=3)
    finally:
        end_all(pids)
    assert is_one_error_line(result), result
    assert "exit status 4" in result.err
    assert len(list(pids.iterdir())) >= 3, "others ran"


# --- Outputs that can't be replaced


def refuse_to_replace(file: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the replacing of a file fail."""
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == file:
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS])
def test_an_output_that_can_not_be_replaced_is_written_in_place(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(tmp_path)
    output = tmp_path / "workload.txt"
    output.write_text("longer than what is to be written" * 1000)
    output.chmod(0o640)
    before = output.stat()
    refuse_to_replace(output, number, monkeypatch)
    assert generate(tmp_path) == expected
    assert (output.stat().st_ino, output.stat().st_mode) == (before.st_ino, before.st_mode)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EBUSY])
def test_other_outputs_are_not_written_in_place(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With EBUSY there is no file yet, so that half of it might be left."""
    output = tmp_path / "workload.txt"
    if number != errno.EBUSY:
        output.write_text("mine")
    refuse_to_replace(output, number, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        generate(tmp_path)
    assert error.value.filename == output
    assert output.exists() == (number != errno.EBUSY)
    assert not output.exists() or output.read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def in_mounts(folder: Path, mounts: str, *flags: str) -> Run:
    """Run the script where `mounts` was done before; skip where nobody may mount."""
    unshare = ["unshare", "-m", "bash", "-ec"]
    if subprocess.run([*unshare, "mount --bind / /"], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    program = f'{mounts}; exec "$@"'
    command = [*unshare, program, "bash", *command_line(FAST, "--cache_dir=", *flags)]
    return ended(start_command(folder, command))


def test_outputs_that_are_mounted_on_their_own(tmp_path: Path) -> None:
    expected = generate(tmp_path / "expected")
    flags = ["--num_npus=16", "--num_packages=2", "--chakra_et=x", "--clock_mhz=1"]
    names = ("workload.txt", "x.0.et", "x.3.et", "s.csv")
    mounts = []
    for name in names:
        (tmp_path / f"there.{name}").write_text("" if name == "s.csv" else "longer" * 9999)
        (tmp_path / name).touch()
        mounts.append(f"mount --bind there.{name} {name}")
    result = in_mounts(tmp_path, "; ".join(mounts), *flags, "--summary_csv=s.csv")
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / "there.workload.txt").read_text() == expected
    trace = (tmp_path / "x.1.et").read_bytes()
    assert trace
    assert (tmp_path / "there.x.0.et").read_bytes() == trace
    assert (tmp_path / "there.x.3.et").read_bytes() == trace
    assert len(rows_of(tmp_path / "there.s.csv", tool.Report.SUMMARY)) == 1
    assert [(tmp_path / name).read_bytes() for name in names] == [b""] * 4, "below the mounts"
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_is_mounted_in_a_folder_that_is_read_only(tmp_path: Path) -> None:
    expected = generate(tmp_path / "expected")
    names = ["w.txt", *(f"x.{npu}.et" for npu in range(16))]
    mounts = "mount --bind here here; mount -o remount,ro,bind here"
    for folder in ("there", "here"):
        (tmp_path / folder).mkdir()
    for name in names:
        for folder in ("there", "here"):
            (tmp_path / folder / name).write_text("longer" * 9999)
        mounts += f"; mount --bind there/{name} here/{name}"
    flags = ["--num_npus=16", "--num_packages=2", "--output_file=here/w.txt"]
    result = in_mounts(tmp_path, mounts, *flags, "--chakra_et=here/x", "--clock_mhz=1")
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / "there/w.txt").read_text() == expected
    assert len({(tmp_path / "there" / name).read_bytes() for name in names[1:]}) == 1


@pytest.mark.parametrize("exists", [True, False])
def test_a_file_in_a_folder_that_is_not_to_be_written_to(exists: bool, tmp_path: Path) -> None:
    expected = generate(tmp_path / "expected")
    closed = tmp_path / "closed"
    closed.mkdir()
    if exists:
        (closed / "w.txt").write_text("longer" * 9999)
    closed.chmod(0o555)
    flags = ["--num_npus=16", "--num_packages=2", "--output_file=closed/w.txt", "--cache_dir="]
    result = ended(start_command(tmp_path, [*BOUND, *command_line(FAST, *flags)]))
    closed.chmod(0o755)
    if exists:
        assert (result.status, result.err) == (0, "")
        assert (closed / "w.txt").read_text() == expected
    else:
        assert is_one_error_line(result), result
        assert result.err == f"error: {closed}: no permission to write\n"
    assert not list(closed.glob(".*"))


# --- No traceback


def limited_to(size: int) -> Callable[[], None]:
    """Return a function that limits the memory of the process that calls it."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


def test_a_table_that_memory_has_no_room_for(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Layer,m,n,k\n" + "a,1,1,1\n" * 2_000_000)
    command = command_line(FAST, "--mnk=t.csv")
    result = ended(start_command(tmp_path, command, before=limited_to(200_000_000)))
    assert is_one_error_line(result), result
    assert result.err == "error: out of memory\n"
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv"}


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--mnk", "a CSV table"),
        ("--scalesim_config", "a SCALE-Sim config"),
        ("--gemm_cycles", "a CSV table"),
    ],
)
def test_an_input_without_an_end(flag: str, expected: str, tmp_path: Path) -> None:
    began = time.monotonic()
    command = command_line(FAST, f"{flag}=/dev/zero")
    result = ended(start_command(tmp_path, command, before=limited_to(600_000_000)))
    assert time.monotonic() - began < 15
    assert is_one_error_line(result), result
    assert result.err == f"error: /dev/zero: more than 64 MiB, expected {expected}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_threads_that_can_not_be_started(number: int, tmp_path: Path) -> None:
    """All are for simulations."""
    program = (
        "import itertools, threading\n"
        "start, numbers = threading.Thread.start, itertools.count()\n"
        "def start_or_not(self):\n"
        f"    if next(numbers) >= {number}:\n"
        '        raise RuntimeError("can\'t start new thread")\n'
        "    start(self)\n"
        "threading.Thread.start = start_or_not"
    )
    flags, pids = deaf(tmp_path, "time.sleep(600)")
    result = ended(start_command(tmp_path, after(program, *flags, "--jobs=5")))
    assert is_one_error_line(result), result
    assert result.err == "error: can't start new thread; fewer --jobs may help\n"
    assert until(lambda: not alive(pids), within=3)


def test_other_errors_of_python_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the script has to be seen."""
    monkeypatch.setattr(tool.Settings, "from_flags", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tool.main(["x"])

    def run_time_error() -> None:
        raise RuntimeError("another one")

    monkeypatch.setattr(tool.Settings, "from_flags", run_time_error)
    with pytest.raises(RuntimeError, match="another one"):
        tool.main(["x"])


# --- Each step of writing may fail


def results_below(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write_all(folder: Path, size: int) -> None:
    """Write all kinds of results, with a size of elements that makes them differ."""
    table = write_table(folder.parent / "t.csv", "a,64,64,64", "b,64,64,64")
    changes = {"chakra_et": folder / "x", "clock_mhz": 1.0, "summary_csv": folder / "s.csv"}
    generate(folder, mnk=table, num_npus=4, datatype_size=size, **changes)


STEPS = {"replace": os, "link": os, "copymode": shutil, "flock": fcntl}
RUNS = [
    *((step, "first run") for step in ("replace", "link", "flock")),
    *((step, "over an earlier run") for step in STEPS),
]


@pytest.mark.parametrize(("step", "which"), RUNS)
@pytest.mark.parametrize("end", [OSError(errno.EIO, "no luck"), KeyboardInterrupt()], ids=repr)
def test_an_end_in_any_step_leaves_only_whole_files_and_the_workload_file_last(
    step: str, which: str, end: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first call of a function, in the second one, until there is no further one."""
    real = getattr(STEPS[step], step)
    (tmp_path / "older").mkdir()
    if which != "first run":
        write_all(tmp_path / "older", size=1)
    older = results_below(tmp_path / "older")
    write_all(tmp_path / "newer", size=2)
    newer = results_below(tmp_path / "newer")
    for number in itertools.count():
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "older", folder)
        calls = itertools.count()

        def call_or_end(*values: Any) -> Any:
            if next(calls) == number:  # noqa: B023
                raise end
            return real(*values)

        has_ended = False
        with monkeypatch.context() as patched:
            patched.setattr(STEPS[step], step, call_or_end)
            try:
                write_all(folder, size=2)
            except (OSError, KeyboardInterrupt):
                has_ended = True
        found = results_below(folder)
        found.pop("s.csv", None)  # its rows have paths in them
        assert all(data in (older.get(path), newer[path]) for path, data in found.items()), number
        if has_ended:
            assert found.get("workload.txt") == older.get("workload.txt"), number
        if next(calls) <= number:
            break
    assert number >= 1
    assert not has_ended


def test_the_order_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Details, traces, the summary, and last the workload file."""
    order = []
    replace, append = os.replace, tool.Output.append_row

    def note_and_replace(source: Path, target: Path) -> None:
        order.append(target.name)
        replace(source, target)

    def note_and_append(output: tool.Output, path: Path) -> None:
        order.append(path.name)
        append(output, path)

    monkeypatch.setattr(os, "replace", note_and_replace)
    monkeypatch.setattr(tool.Output, "append_row", note_and_append)
    write_all(tmp_path / "new", size=2)
    assert order[:3] == ["scalesim.cfg", "cycle_model.txt", "t_fwd_pass.csv"]
    expected = ["layers.csv", "x.0.et", "x.1.et", "x.2.et", "x.3.et", "s.csv", "workload.txt"]
    assert order[-7:] == expected


@pytest.mark.parametrize("cut_off", [False, True], ids=["whole", "without its last newline"])
def test_a_summary_is_appended_to(cut_off: bool, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,64,64,64")
    summary = tmp_path / "new/s.csv"
    generate(tmp_path, mnk=table, summary_csv=summary)
    if cut_off:
        summary.write_bytes(summary.read_bytes()[:-1])
    for number in (2, 3):
        generate(tmp_path, mnk=table, summary_csv=summary, datatype_size=number)
    rows = rows_of(summary, tool.Report.SUMMARY)
    assert [row["datatype_size"] for row in rows] == ["2", "2", "3"]
