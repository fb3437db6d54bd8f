"""The README and the lists in the repository cannot drift from the script; the README's commands run."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from absl import flags

import gen_astrasim_workload_input as tool
from helpers import (
    GOOD_REPORT,
    PLAIN,
    ROOT,
    SCRIPT,
    fake_v2,
    layer_of,
    read_like_astrasim,
    read_like_chakra,
)
from test_dask import cluster

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
FRESH = [
    block for block in COMMANDS if "python3 -m venv" in block
]  # .ci/run runs these two, from nothing
OTHERS = [block for block in COMMANDS if block not in FRESH]


def test_the_flags_of_the_readme_are_the_scripts_in_its_order_with_its_defaults() -> None:
    rows = re.findall(r"^\| (`--\w+`(?:, `--\w+`)*) \| (.*?) \| .* \|$", README, re.MULTILINE)
    names = [re.findall(r"--(\w+)", cell) for cell, _ in rows]
    defined = [flag.name for flag in flags.FLAGS.get_flags_for_module(tool)]
    assert [name for row in names for name in row] == defined
    for (name, *_), (_, shown) in zip(names, rows):
        default = flags.FLAGS[name].default
        if name == "cache_dir":  # in XDG_CACHE_HOME, where it is set
            default = f"~/.cache/{Path(str(default)).name}"
        if isinstance(default, bool):
            assert shown == str(default).lower()
        elif default and name != "mnk":
            assert shown in (str(default), f"`{default}`")
        elif name != "mnk":
            assert not re.fullmatch(r"\d+", shown)


def test_the_strategies_of_the_readme_are_the_scripts() -> None:
    rows = re.findall(
        r"^\| `(\w+)`.*? \| (\S+) \| (\S+) \| (\w+) \| (\w+) \| (\w+) \|$", README, re.MULTILINE
    )
    assert [row[0] for row in rows] == list(PLAIN)
    for name, dp, mp, *collectives in rows:
        shards = tool.shard(layer_of("a", 240, 240, 240, name), (8, 3), 2, "up")
        assert [shard.collective for shard in shards] == collectives
        known = {"N": 24, "P": 3, "N/P": 8, "1": 1}
        assert (shards[2].members, shards[0].members) == (known[dp], known[mp])


def test_the_script_carries_requirements_txt() -> None:
    block = re.search(r"^# dependencies = \[(.*)\]$", SCRIPT.read_text(), re.MULTILINE)
    assert block
    assert re.findall(r'"(.*?)"', block[1]) == (ROOT / "requirements.txt").read_text().split()
    assert 'requires-python = ">=3.10"' in SCRIPT.read_text()


def test_two_commands_for_a_fresh_machine() -> None:
    assert len(FRESH) == 2
    assert all(
        len(block.splitlines()) == 1 and ".venv/bin/pip install -r requirements.txt" in block
        for block in FRESH
    )


def test_the_repository_has_the_agreed_shape() -> None:
    made_by_running = {"outputs", "workloads", "workload.txt", "__pycache__"}
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - made_by_running
    assert top == {
        "README.md",
        "gen_astrasim_workload_input.py",
        "mnk_inputs",
        "requirements.txt",
        "tests",
    }


@pytest.mark.parametrize("block", OTHERS, ids=lambda block: block.split("--")[1].split()[0])
def test_the_commands_of_the_readme_run(block: str, tmp_path: Path) -> None:
    """As they stand, but with this Python, a cluster that is there, and cycles that are soon known."""
    faster = "--cycle_model=analytical"
    if "--dask_scheduler" in block:
        faster = f"--scalesim_path={fake_v2(tmp_path / 'fake', GOOD_REPORT)}"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "$@" {faster} --cache_dir=\n'
    )
    (tmp_path / ".venv/bin/python").chmod(0o755)
    for name in ("mnk_inputs", SCRIPT.name):
        (tmp_path / name).symlink_to(ROOT / name)
    with ExitStack() as stack:
        if "--dask_scheduler" in block:
            address, _ = stack.enter_context(cluster(1, tmp_path))
            block = block.replace("tcp://head-node:8786", address)
        done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [*(tmp_path / "workloads").glob("*.txt"), *tmp_path.glob("workload.txt")]
    assert written
    for file in written:
        text = file.read_text()
        read_like_astrasim(text)
        if not text.startswith("HYBRID_CUSTOMIZED"):
            read_like_chakra(text)
    if "gpt3" in block:
        with (tmp_path / "workloads/gpt3.csv").open(newline="") as table:
            runs = list(csv.DictReader(table))
        assert [run["num_npus"] for run in runs[::4]] == ["64", "256", "1024", "4096"]
        lines = [
            [round(int(run["compute_all"]) / 1e9) for run in runs if run["parallel"] == parallel]
            for parallel in PLAIN
        ]
        drawn = re.findall(r"^ +line \[(.*)\]$", README, re.MULTILINE)
        assert [list(map(int, line.split(", "))) for line in drawn] == lines, (
            "the chart shows another result"
        )


def test_the_output_that_the_readme_shows() -> None:
    """Its first table is what the golden file of the example says."""
    golden = (ROOT / "tests/golden/example.DATA.txt").read_text()
    _, layers = read_like_astrasim(golden)
    shown = README.split("```text\n")[1].split("```")[0]
    cycles = [int(number.replace(",", "")) for number in re.findall(r"x\d+ +([\d,]+)  ", shown)]
    assert cycles == [time for i in (0, 1) for time, _, _ in layers[i].passes]
    assert f"{sum(time for layer in layers for time, _, _ in layer.passes):,}  cycles" in shown
