"""Simulations on a Dask cluster: a LocalCluster, and scheduler and worker processes on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import distributed
import pytest

import gen_astrasim_workload_input as tool
from helpers import GOOD_REPORT, fake_v2, is_one_error_line, run, write_table
from test_cache import ROWS, SLOW, entries, gone, simulated, start

ONE_THREAD = ("--nthreads", "1", "--no-nanny")


def dask(folder: Path, *words: str, **env: str) -> subprocess.Popen[bytes]:
    """Start a command of Dask's."""
    with (folder / "dask.log").open("ab") as log:
        command = [sys.executable, "-m", "dask", *words, "--no-dashboard"]
        return subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **env}
        )


@contextmanager
def cluster(
    workers: int, folder: Path, **env: str
) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Give the address of `dask scheduler` and the processes: it, then its workers, once all of them are there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    started = [dask(folder, "scheduler", "--host", address)]
    try:
        started += [dask(folder, "worker", address, *ONE_THREAD, **env) for _ in range(workers)]
        with distributed.Client(address, timeout=60, set_as_default=False) as client:
            if workers:
                client.wait_for_workers(workers, timeout=60)
        yield address, started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    table = write_table(tmp_path / "t.csv", *ROWS)
    fake = fake_v2(tmp_path / "fake", SLOW.format(seconds=0.3))
    return [
        f"--mnk={table}",
        f"--scalesim_path={fake}",
        "--num_npus=2",
        f"--cache_dir={tmp_path}/cache",
    ]


def begun(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    """Start the script and return when two of its simulations are finished."""
    running = start(tmp_path, *flags)
    end = time.monotonic() + 60
    while len(entries(tmp_path / "cache")) < 2:
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    return running


def test_the_same_file_from_a_local_cluster(tmp_path: Path) -> None:
    """Real SCALE-Sim; the workers get all they need by value, and the cache and run folder are filled as usual."""
    table = write_table(tmp_path / "t.csv", "a,16,8,4", "b,8,16,12")
    flags = [f"--mnk={table}", "--num_npus=2"]
    assert run(tmp_path, *flags, "--output_file=local.txt").status == 0
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=None,
        processes=True,
        local_directory=tmp_path,
    ) as local:
        address = f"--dask_scheduler={local.scheduler_address}"
        result = run(
            tmp_path,
            *flags,
            f"--cache_dir={tmp_path}/c",
            address,
            "--run_name=far",
            "--output_file=far.txt",
        )
    assert (result.status, result.err, simulated(result.out)) == (0, "", 6)
    assert (tmp_path / "far.txt").read_bytes() == (tmp_path / "local.txt").read_bytes()
    assert len(list((tmp_path / "outputs/DATA/far").glob("gemm_*/COMPUTE_REPORT.csv"))) == 6
    assert simulated(run(tmp_path, *flags, f"--cache_dir={tmp_path}/c").out) == 0


def test_workers_that_come_late_are_waited_for(tmp_path: Path, base: list[str]) -> None:
    with cluster(0, tmp_path) as (address, started):
        running = start(tmp_path, *base, f"--dask_scheduler={address}")
        assert running.stderr
        said = running.stderr.readline()
        started.append(dask(tmp_path, "worker", address, *ONE_THREAD))
        said += running.communicate(timeout=60)[1]
    assert (running.returncode, len(entries(tmp_path / "cache"))) == (0, 12)
    assert said == f"warning: the Dask scheduler at {address} has no workers yet\n"


def test_a_worker_killed_midway_costs_nothing_but_time(tmp_path: Path, base: list[str]) -> None:
    with cluster(2, tmp_path) as (address, (_, victim, _)):
        running = begun(tmp_path, *base, f"--dask_scheduler={address}")
        victim.kill()
        _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert len(entries(tmp_path / "cache")) == 12
    assert gone(tmp_path / "fake")


def test_a_lost_scheduler_is_one_line_and_what_was_finished_is_kept(
    tmp_path: Path, base: list[str]
) -> None:
    with cluster(1, tmp_path) as (address, (scheduler, _)):
        running = begun(tmp_path, *base, f"--dask_scheduler={address}")
        scheduler.kill()
        began = time.monotonic()
        _, said = running.communicate(timeout=60)
        assert time.monotonic() - began < 30
    lines = said.splitlines()
    assert running.returncode == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"error: --dask_scheduler={address} lost a simulation: ")
    cached = len(entries(tmp_path / "cache"))
    assert cached < 12
    assert simulated(run(tmp_path, *base).out) == 12 - cached


def test_ctrl_c_cancels_what_is_queued(tmp_path: Path, base: list[str]) -> None:
    with cluster(1, tmp_path) as (address, _):
        running = begun(tmp_path, *base, f"--dask_scheduler={address}")
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
        assert running.returncode == -signal.SIGINT
        assert said.splitlines()[-1].startswith("interrupted: ")
        assert gone(tmp_path / "fake", within=10), "the queue went on"


def test_what_goes_wrong_there_is_said_here(tmp_path: Path, base: list[str]) -> None:
    fake_v2(tmp_path / "bad", "print('no luck')\nsys.exit(4)")
    with cluster(1, tmp_path) as (address, _):
        result = run(
            tmp_path, *base, f"--scalesim_path={tmp_path}/bad", f"--dask_scheduler={address}"
        )
        assert result.status == 1
        error = result.err
        assert "exit status 4; it last said: no luck; log: " in error
        assert Path(error.rstrip().rpartition("log: ")[2]).read_text() == "no luck\n"


def test_workers_with_another_scalesim_are_refused(tmp_path: Path) -> None:
    """Told by the code that the workers would really run: here one that they import from their own PYTHONPATH."""
    fake_v2(tmp_path / "theirs", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,16,8,4")
    with cluster(1, tmp_path, PYTHONPATH=str(tmp_path / "theirs")) as (address, _):
        result = run(
            tmp_path, f"--mnk={table}", f"--dask_scheduler={address}", f"--cache_dir={tmp_path}/c"
        )
        assert is_one_error_line(result)
        assert (
            f"the SCALE-Sim in {tmp_path}/theirs is not the one that this run began with"
            in result.err
        )
        missing = run(
            tmp_path,
            f"--mnk={table}",
            f"--dask_scheduler={address}",
            f"--scalesim_path={tmp_path}/no",
        )
        assert missing.err == (
            f"error: no SCALE-Sim in {tmp_path}/no, expected scale.py and run_nets.py, or scalesim/\n"
        )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "127.0.0.1", "bogus://x", "tls://127.0.0.1:9"]
)
def test_no_scheduler_there(address: str, tmp_path: Path, base: list[str]) -> None:
    began = time.monotonic()
    result = run(tmp_path, *base, f"--dask_scheduler={address}")
    assert time.monotonic() - began < 30
    assert is_one_error_line(result)
    assert result.err.startswith(f"error: --dask_scheduler={address} can't be reached: ")


def test_a_silent_server_is_ended_by_ctrl_c(tmp_path: Path, base: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        running = start(tmp_path, *base, f"--dask_scheduler={address}")
        connection, _ = server.accept()
        with connection:
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGINT
    assert said.startswith("interrupted: 0 of 12 GEMMs are finished, ")


def test_a_local_mishap_is_not_blamed_on_the_cluster(tmp_path: Path, base: list[str]) -> None:
    running_there = tmp_path / "outputs/DATA/t"
    running_there.mkdir(parents=True)
    for gemm in ("4x4x1", "16x16x4"):
        (running_there / f"gemm_{gemm}").write_text("a file where a GEMM's folder should be")
    with cluster(1, tmp_path) as (address, _):
        result = run(tmp_path, *base, f"--dask_scheduler={address}")
    assert is_one_error_line(result)
    assert result.err == f"error: {running_there}/gemm_16x16x4: File exists\n"
    assert len(entries(tmp_path / "cache")) >= 1, "what was finished is cached before it is shown"


def test_dask_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    scalesim = tool.find_scalesim(None, "")
    with pytest.raises(tool.UserError) as error, tool.dask_pool("tcp://127.0.0.1:9", scalesim):
        pass
    assert str(error.value).startswith(
        "--dask_scheduler=tcp://127.0.0.1:9 can't be reached: import of distributed halt"
    )
