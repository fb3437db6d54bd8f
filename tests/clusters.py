"""Dask clusters: a scheduler and workers as processes on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import distributed

ONE_THREAD = ("--nthreads", "1", "--no-nanny")


def dask(folder: Path, *words: str, **env: str) -> subprocess.Popen[bytes]:
    """Start a command of Dask's."""
    command = [sys.executable, "-m", "dask", *words, "--no-dashboard"]
    with (folder / "dask.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **env}
        )


def start_worker(folder: Path, address: str, **env: str) -> subprocess.Popen[bytes]:
    """Start a worker that runs one simulation at a time."""
    return dask(folder, "worker", address, *ONE_THREAD, **env)


Cluster = tuple[str, list[subprocess.Popen[bytes]]]


@contextmanager
def cluster(workers: int, folder: Path, **env: str) -> Iterator[Cluster]:
    """Give the scheduler's address and the processes, it first, once all workers are there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    started = [dask(folder, "scheduler", "--host", address)]
    try:
        started += [start_worker(folder, address, **env) for _ in range(workers)]
        with distributed.Client(address, timeout=60, set_as_default=False) as client:
            if workers:
                client.wait_for_workers(workers, timeout=60)
        yield address, started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
