"""Fixtures: the SCALE-Sim releases beside the installed one, and an end to what tests start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import processes


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """End what a test that fails has left running."""
    yield
    processes.end_started()


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a folder with that release of SCALE-Sim, as pip installs it."""
    folders: dict[str, Path] = {}

    def install(version: str) -> Path:
        if version not in folders:
            folder = tmp_path_factory.mktemp("scalesim") / version
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            command = [*pip, "--no-deps", "--target", str(folder), f"scalesim=={version}"]
            subprocess.run(command, check=True)
            folders[version] = folder
        return folders[version]

    return install
