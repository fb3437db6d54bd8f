"""The README and the lists in the repository are as the script is; the README's commands run."""

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
from clusters import cluster
from helpers import (
    FAST,
    GOOD_REPORT,
    MNK_INPUTS,
    PLAIN,
    ROOT,
    SCRIPT,
    collective_of,
    collectives_of,
    fake_v2,
    layer_of,
    plan_of,
    plan_of_table,
    read_like_astrasim,
    read_like_chakra,
    settings,
    write_config,
)
from runs import run_inside

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# .ci/run runs these two, from nothing.
FRESH = [block for block in COMMANDS if "python3 -m venv" in block]
OTHERS = [block for block in COMMANDS if block not in FRESH]


def test_the_flags_of_the_readme_are_the_scripts_in_its_order_with_its_defaults() -> None:
    section = README.split("\n## Flags\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`--\w+`(?:, `--\w+`)*) \| (.*?) \| .* \|$", section, re.MULTILINE)
    names = [re.findall(r"--(\w+)", cell) for cell, _ in rows]
    defined = [flag.name for flag in flags.FLAGS.get_flags_for_module(tool)]
    in_order = [*tool.Settings._fields]
    in_order.insert(in_order.index("num_npus") + 1, "num_npu")
    assert sorted(defined) == sorted(in_order)
    assert [name for row in names for name in row] == in_order
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


def test_the_strategies_of_the_readme_are_the_scripts(tmp_path: Path) -> None:
    cell = r" (\S+) \|"
    rows = re.findall(rf"^\| `(\w+)`.*? \|{cell * 5}$", README, re.MULTILINE)
    assert [row[0] for row in rows] == list(PLAIN)
    chosen = settings(tmp_path, num_npus=24, num_packages=3)
    degrees = {"N": 24, "P": 3, "N/P": 8, "1": 1}
    for name, dp, mp, *collectives in rows:
        plan = plan_of(layer_of("a", 240, 240, 240, name), chosen)
        assert [kind for kind, _ in collectives_of(plan)] == collectives
        assert (plan.dp, plan.mp) == (degrees[dp], degrees[mp])
        groups = [plan.mp, plan.mp, plan.dp]
        for layer_pass, members, kind in zip(plan.passes.values(), groups, collectives):
            assert collective_of(layer_pass).members == (1 if kind == "NONE" else members)


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


def check_workload(text: str) -> None:
    """Read a workload file as ASTRA-sim does, and as Chakra's converter where that reads it."""
    first_line = text.split("\n")[0]
    parallel, *index = first_line.split("\t")
    if parallel == "HYBRID_DLRM":  # whose second word is the index of the last bottom layer
        _, layers = read_like_astrasim(text.replace(first_line, parallel, 1))
        assert len(index) == 1
        assert 0 < int(index[0]) < len(layers) - 1
        return
    read_like_astrasim(text)
    if parallel in PLAIN:
        read_like_chakra(text)


def run_block(block: str, folder: Path) -> None:
    """Run a command of the README, but with this Python and cycles that are soon known."""
    faster = FAST
    if "--dask_scheduler" in block:
        faster = f"--scalesim_path={fake_v2(folder / 'fake', GOOD_REPORT)}"
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@" {faster} --cache_dir=\n')
    python.chmod(0o755)
    for name in ("mnk_inputs", SCRIPT.name):
        (folder / name).symlink_to(ROOT / name)
    with ExitStack() as stack:
        if "--dask_scheduler" in block:
            address, _ = stack.enter_context(cluster(1, folder))
            block = block.replace("tcp://head-node:8786", address)
        done = subprocess.run(["bash", "-euc", block], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", OTHERS, ids=lambda block: block.split("--")[1].split()[0])
def test_the_commands_of_the_readme_run(block: str, tmp_path: Path) -> None:
    run_block(block, tmp_path)
    written = [*(tmp_path / "workloads").glob("*.txt"), *tmp_path.glob("workload.txt")]
    if "--sharding_strategy" in block:  # it writes traces only
        assert written == []
        assert len([*(tmp_path / "traces").glob("fsdp.*.et")]) == 16
        return
    assert written
    for file in written:
        check_workload(file.read_text())


def test_the_chart_of_the_readme_is_what_its_sweep_gives(tmp_path: Path) -> None:
    (block,) = [each for each in OTHERS if "--summary_csv=workloads/gpt3.csv" in each]
    run_block(block, tmp_path)
    with (tmp_path / "workloads/gpt3.csv").open(newline="") as table:
        runs = list(csv.DictReader(table))
    assert [run["num_npus"] for run in runs[::4]] == ["64", "256", "1024", "4096"]
    lines = []
    for parallel in PLAIN:
        times = [int(run["compute_all"]) for run in runs if run["parallel"] == parallel]
        lines.append([round(time / 1e9) for time in times])
    drawn = re.findall(r"^ +line \[(.*)\]$", README, re.MULTILINE)
    assert [list(map(int, line.split(", "))) for line in drawn] == lines


def test_the_output_that_the_readme_shows() -> None:
    """Its first table is what the golden files of the example say."""
    golden = ROOT / "tests/golden/example_DATA"
    _, layers = read_like_astrasim((golden / "workload.txt").read_text())
    shown = README.split("```text\n")[1].split("```")[0]
    printed = (golden / "printed.txt").read_text()
    printed = printed.replace("analytical", "SCALE-Sim v3", 1)
    *lines, _, _ = (line for line in shown.splitlines() if line != "...")
    assert [line for line in lines if line not in printed.splitlines()] == []
    cycles = [int(number.replace(",", "")) for number in re.findall(r"x\d+ +([\d,]+)  ", shown)]
    assert cycles == [time for i in (0, 1) for time, _, _ in layers[i].passes]
    assert f"{sum(time for layer in layers for time, _, _ in layer.passes):,}  cycles" in shown


def test_the_program_that_writes_a_transformer(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "my_transformer.csv" in block]
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    written = (tmp_path / "my_transformer.csv").read_bytes()
    assert written == (MNK_INPUTS / "llama3_70b.csv").read_bytes()


@pytest.mark.parametrize(
    ("bandwidth", "sentence"),
    [
        (None, "A forward pass takes 427,741,824 cycles, and has 192 ALLREDUCEs of 294,912 bytes."),
        (64, "a forward pass takes 510,575,616 cycles, of which the memory bounds 66.8 %."),
        (1063, "At 1063, 2 TB/s, it takes the analytical 427,741,824:"),
    ],
    ids=["analytical", "a slow memory", "a fast memory"],
)
def test_decoding_as_the_readme_has_it(
    bandwidth: int | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in " ".join(README.split())
    config = None
    if bandwidth:
        config = write_config(tmp_path / "c.cfg", 256, 256, "ws")
        config.write_text(f"{config.read_text()}Bandwidth: {bandwidth}\n")
    run_inside(
        tmp_path,
        mnk=MNK_INPUTS / "gpt3_175b_decode.csv",
        inference=True,
        parallel="HYBRID_DATA_MODEL",
        num_npus=1024,
        num_packages=128,
        scalesim_config=config,
        cycle_model="roofline" if bandwidth else "analytical",
    )
    printed = " ".join(capsys.readouterr().out.split())
    (cycles,) = re.findall(r"takes (?:the analytical )?([\d,]{9,})", sentence)
    assert f"compute, forward {cycles} cycles" in printed
    for part in re.findall(r"bounds ([\d.]+) %", sentence):
        assert f", {part}% of the compute time" in printed
    for number, size in re.findall(r"has (\d+) ALLREDUCEs of ([\d,]+) bytes", sentence):
        size_of_all = int(number) * int(size.replace(",", ""))
        assert f"{number} × ALLREDUCE {size_of_all:,} bytes" in printed


def test_mixtral_as_the_readme_has_it(tmp_path: Path) -> None:
    text = " ".join(README.split())
    found = re.search(r"(\d+) ALLTOALLs are of ([\d,]+) bytes each:", text)
    assert found
    mnk = MNK_INPUTS / "mixtral_8x7b.csv"
    system = {"num_npus": 64, "num_packages": 8, "parallel": "HYBRID_CUSTOMIZED"}
    plan = plan_of_table(settings(tmp_path, mnk=mnk, **system))
    sizes = [each.bytes for _, each in plan.collectives if each.kind == "ALLTOALL"]
    assert sizes == int(found[1]) * [int(found[2].replace(",", ""))]
