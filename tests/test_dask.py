"""Simulations on a Dask cluster: a LocalCluster, and scheduler and worker processes on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed
import pytest

import gen_astrasim_workload_input as tool
from clusters import cluster, start_worker
from helpers import GOOD_REPORT, accelerator_of, fake_v2, is_one_error_line, run, write_table
from processes import (
    after,
    base_flags,
    ended,
    entries,
    gone,
    patience,
    simulated,
    start,
    start_command,
    wait_until_begun,
    without_progress,
)


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    return base_flags(tmp_path, seconds=0.3)


def begun(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    """Start the script and return when two of its simulations are finished."""
    running = start(tmp_path, *flags)
    wait_until_begun(running, 2, tmp_path / "cache", tmp_path / "fake")
    return running


def first_warning(running: subprocess.Popen[str]) -> str:
    """Wait for what the script says first, after how much it simulates."""
    assert running.stderr
    said = running.stderr.readline()
    while said.startswith("simulating: "):
        said = running.stderr.readline()
    return said


def test_the_same_file_from_a_local_cluster(tmp_path: Path) -> None:
    """Real SCALE-Sim; the workers get all they need by value."""
    table = write_table(tmp_path / "t.csv", "a,16,8,4", "b,8,16,12")
    flags = [f"--mnk={table}", "--num_npus=2"]
    assert run(tmp_path, *flags, "--output_file=local.txt").status == 0
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=":0",
        processes=True,
        local_directory=tmp_path,
    ) as local:
        there = [f"--dask_scheduler={local.scheduler_address}", f"--cache_dir={tmp_path}/c"]
        far = run(tmp_path, *flags, *there, "--run_name=far", "--output_file=far.txt")
    result = without_progress(far)
    assert (result.status, result.err, simulated(result.out)) == (0, "", 6)
    assert (tmp_path / "far.txt").read_bytes() == (tmp_path / "local.txt").read_bytes()
    assert len(list((tmp_path / "outputs/DATA/far").glob("gemm_*/COMPUTE_REPORT.csv"))) == 6
    assert simulated(run(tmp_path, *flags, f"--cache_dir={tmp_path}/c").out) == 0


def test_workers_that_come_late_are_waited_for(tmp_path: Path, base: list[str]) -> None:
    with cluster(0, tmp_path) as (address, started):
        running = start(tmp_path, *base, f"--dask_scheduler={address}")
        said = first_warning(running)
        started.append(start_worker(tmp_path, address))
        result = ended(running)
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    what = f"the Dask scheduler at {address} has no workers; they need Python {here}"
    assert said == f"waiting: {what}\n"
    assert (result.status, result.err) == (0, "")
    assert len(entries(tmp_path / "cache")) == 12


def test_a_worker_killed_midway_costs_nothing_but_time(tmp_path: Path, base: list[str]) -> None:
    with cluster(2, tmp_path) as (address, (_, victim, _)):
        running = begun(tmp_path, *base, f"--dask_scheduler={address}")
        victim.kill()
        result = ended(running)
    assert result.status == 0, result
    assert len(entries(tmp_path / "cache")) == 12
    assert gone(tmp_path / "fake")


def test_a_lost_scheduler_is_one_line_and_what_was_finished_is_kept(
    tmp_path: Path, base: list[str]
) -> None:
    with cluster(1, tmp_path) as (address, (scheduler, _)):
        running = begun(tmp_path, *base, f"--dask_scheduler={address}")
        scheduler.kill()
        began, limit = time.monotonic(), patience(30)
        result = ended(running)
        assert time.monotonic() - began < limit
    assert is_one_error_line(result), result
    assert result.err.startswith(f"error: --dask_scheduler={address} lost a simulation: ")
    cached = len(entries(tmp_path / "cache"))
    assert 2 <= cached < 12
    assert simulated(run(tmp_path, *base).out) == 12 - cached


def test_ctrl_c_cancels_what_is_queued(tmp_path: Path, base: list[str]) -> None:
    with cluster(1, tmp_path) as (address, _):
        running = begun(tmp_path, *base, f"--dask_scheduler={address}")
        running.send_signal(signal.SIGINT)
        result = ended(running)
        assert result.status == -signal.SIGINT
        assert result.err.splitlines()[-1].startswith("interrupted: ")
        assert gone(tmp_path / "fake", within=10), "the queue went on"


def test_a_simulation_that_fails_there_has_its_log_here(tmp_path: Path, base: list[str]) -> None:
    fake_v2(tmp_path / "bad", "print('no luck')\nsys.exit(4)")
    with cluster(1, tmp_path) as (address, _):
        there = [f"--scalesim_path={tmp_path}/bad", f"--dask_scheduler={address}"]
        result = without_progress(run(tmp_path, *base, *there))
    assert is_one_error_line(result), result
    assert "exit status 4; its last output: no luck; log: " in result.err
    assert Path(result.err.rstrip().rpartition("log: ")[2]).read_text() == "no luck\n"


def test_workers_with_another_scalesim_are_refused(tmp_path: Path) -> None:
    """Told by the code that they would really run: here one from their own PYTHONPATH."""
    fake_v2(tmp_path / "theirs", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,16,8,4")
    with cluster(1, tmp_path, PYTHONPATH=str(tmp_path / "theirs")) as (address, _):
        there = [f"--dask_scheduler={address}", f"--cache_dir={tmp_path}/c"]
        result = without_progress(run(tmp_path, f"--mnk={table}", *there))
    assert is_one_error_line(result), result
    assert result.err == (
        f"error: Dask worker on {os.uname().nodename}: the SCALE-Sim in {tmp_path}/theirs"
        " is not the one that this run began with\n"
    )
    assert not (tmp_path / "c").exists()


def test_a_worker_without_the_scalesim_folder_says_where(tmp_path: Path, base: list[str]) -> None:
    with cluster(0, tmp_path) as (address, started):
        running = start(tmp_path, *base, f"--dask_scheduler={address}")
        first_warning(running)
        (tmp_path / "fake").rename(tmp_path / "away")
        started.append(start_worker(tmp_path, address))
        result = ended(running)
    assert is_one_error_line(result), result
    assert result.err == (
        f"error: Dask worker on {os.uname().nodename}: no SCALE-Sim in {tmp_path}/fake,"
        " expected scale.py and run_nets.py, or scalesim/\n"
    )


# The script, with a twentieth of its patience: connecting is tried again until a time-out.
IMPATIENT = """\
import distributed
class Impatient(distributed.Client):
    def __init__(self, address, timeout, **more):
        assert timeout == 20
        super().__init__(address, timeout=timeout / 20, **more)
distributed.Client = Impatient"""


def start_impatient(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    """Start the script, which soon gives up a scheduler."""
    return start_command(tmp_path, after(IMPATIENT, *flags))


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "127.0.0.1", "bogus://x", "tls://127.0.0.1:9"]
)
def test_no_scheduler_there(address: str, tmp_path: Path, base: list[str]) -> None:
    began, limit = time.monotonic(), patience(10)
    result = ended(start_impatient(tmp_path, *base, f"--dask_scheduler={address}"))
    assert time.monotonic() - began < limit
    assert is_one_error_line(result), result
    assert result.err.startswith(f"error: --dask_scheduler={address} can't be reached: ")


def test_a_silent_server_is_ended_by_ctrl_c(tmp_path: Path, base: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        running = start(tmp_path, *base, f"--dask_scheduler={address}")
        connection, _ = server.accept()
        with connection:
            running.send_signal(signal.SIGINT)
            result = ended(running)
    assert result.status == -signal.SIGINT
    assert result.err.startswith("interrupted: 0 of 12 GEMMs finished and cached in ")


def test_a_local_mishap_is_not_blamed_on_the_cluster(tmp_path: Path, base: list[str]) -> None:
    run_folder = tmp_path / "outputs/DATA/t"
    run_folder.mkdir(parents=True)
    for gemm in ("4x4x1", "16x16x4"):
        (run_folder / f"gemm_{gemm}").write_text("a file where a GEMM's folder should be")
    with cluster(1, tmp_path) as (address, _):
        result = without_progress(run(tmp_path, *base, f"--dask_scheduler={address}"))
    assert is_one_error_line(result), result
    assert result.err == f"error: {run_folder}/gemm_16x16x4: File exists\n"
    assert len(entries(tmp_path / "cache")) >= 1, "what was finished is cached before it is shown"


def test_dask_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    scalesim = tool.ScaleSim(fake_v2(tmp_path / "fake", GOOD_REPORT), accelerator_of())
    pool = tool.DaskPool(scalesim, "tcp://127.0.0.1:9")
    with pytest.raises(tool.UserError) as error, pool.started():
        pass
    assert str(error.value).startswith(
        "--dask_scheduler=tcp://127.0.0.1:9 needs Dask: import of distributed halted"
    )
