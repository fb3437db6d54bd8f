"""The workload file as ASTRA-sim 1.0 and Chakra read it, and the run folder beside it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    MNK_INPUTS,
    PLAIN,
    layer_of,
    read_like_astrasim,
    read_like_chakra,
    settings,
    shards_of,
    write_table,
)

TOPOLOGY_HEADER = (
    "layer name,ifmap height,ifmap width,filter height,filter width,channels,num filter,strides,\n"
)
FOOTNOTE = "* a size that does not divide: NPUs have different shares"
GOLDEN = Path(__file__).parent / "golden"


def generate(folder: Path, **changes: object) -> str:
    chosen = settings(folder, **changes)
    tool.generate(chosen)
    return chosen.output_file.read_text()


@pytest.mark.parametrize("case", sorted(GOLDEN.glob("*.txt")), ids=lambda case: case.stem)
def test_golden(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new case is a new file, <mnk table>.<strategy>.txt: 16 NPUs, 2 packages, size 2, the built-in config."""
    monkeypatch.chdir(tmp_path)
    table, parallel = case.stem.split(".")
    assert (
        generate(tmp_path, mnk=MNK_INPUTS / f"{table}.csv", parallel=parallel) == case.read_text()
    )


@pytest.mark.parametrize("parallel", [*PLAIN, "HYBRID_CUSTOMIZED"])
@pytest.mark.parametrize("table", ["example_customized", "resnet50"])
def test_both_astrasims_read_all_of_it(
    table: str, parallel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mnk = MNK_INPUTS / f"{table}.csv"
    if parallel == "HYBRID_CUSTOMIZED" and table == "resnet50":
        header, *layers = mnk.read_text().splitlines()
        rows = [f"{row},{PLAIN[i % 4]}" for i, row in enumerate(layers)]
        mnk = write_table(tmp_path / "t.csv", *rows, header=f"{header},CustomizedParallelization")
    text = generate(
        tmp_path, mnk=mnk, parallel=parallel, minibatch=256 if table == "resnet50" else 1
    )
    strategy, written = read_like_astrasim(text)
    assert strategy == parallel
    assert [layer.name for layer in written] == [
        row.split(",")[0] for row in mnk.read_text().splitlines()[1:]
    ]
    if parallel != "HYBRID_CUSTOMIZED":
        read_like_chakra(text)


def test_update_time_is_the_last_number_of_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, layers = read_like_astrasim(generate(tmp_path, update_time=7))
    assert {layer.update_time for layer in layers} == {7}


def test_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mnk = write_table(tmp_path / "my.layers.csv", '"a,""b",64,20,30')
    folder = tmp_path / "deep" / "er"
    generate(tmp_path, mnk=mnk, run_folder=folder)
    names = {f"my.layers_{name}.csv" for name in tool.PASSES}
    assert {file.name for file in folder.iterdir()} == {
        *names,
        "layers.csv",
        "scalesim.cfg",
        "cycle_model.txt",
    }
    assert (
        folder / "my.layers_inp_grad.csv"
    ).read_text() == TOPOLOGY_HEADER + "a__b,4,20,1,20,1,30,1,\n"
    with (folder / "layers.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["pass"] for row in rows] == list(tool.PASSES.values())
    # ws on 256 x 256: one fold of 2 * 256 + 256 + 4 - 2 cycles, less one
    assert list(rows[1].values()) == [
        'a,"b',
        *"DATA 16 1".split(),
        "input gradient",
        *"4 30 20 769 NONE 0 1".split(),
    ]
    assert (folder / "scalesim.cfg").read_text() == tool.BUILT_IN_CONFIG
    assert (folder / "cycle_model.txt").read_text() == "analytical\n"


def test_the_table_and_totals_are_right_and_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["first,100,512,512", *(f"same{i},1024,512,512" for i in range(95)), "n,1024,10000000,1"]
    generate(tmp_path, mnk=write_table(tmp_path / "t.csv", *rows), parallel="HYBRID_DATA_MODEL")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "layer pass GEMM of one NPU cycles collective bytes".split()
    assert lines[4].split()[:6] == ["95", "×", "same0", "...", "same94", "forward"]
    assert not any(line.startswith("first *") for line in lines)  # 100 divides by 2, 512 by 8
    totals = {
        line.split("  ")[0]: line.split()[-2]
        for line in lines
        if line.endswith((" bytes", " cycles"))
    }
    assert totals["97 × ALLREDUCE"] == f"{96 * 512 * 512 * 2 // 8 + 10000000 * 2 // 8:,}"
    _, layers = read_like_astrasim((tmp_path / "workload.txt").read_text())
    assert (
        totals["compute, all passes"]
        == f"{sum(time for layer in layers for time, _, _ in layer.passes):,}"
    )
    assert lines[-1].startswith(f"wrote {tmp_path}/workload.txt: 97 layers, ")


def test_uneven_layers_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    generate(tmp_path, mnk=write_table(tmp_path / "t.csv", "odd,100,50,30", "even,160,50,30"))
    labels = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert "odd *" in labels
    assert "even" in labels
    assert labels.count(FOOTNOTE) == 1
    generate(tmp_path, mnk=write_table(tmp_path / "t.csv", "even,160,50,30"))
    assert "*" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaa", ["3 × 0 ... 2"]),
        ("aabaaa", ["2 × 0 ... 1", "2", "3 × 3 ... 5"]),
        ("abcbcbcd", ["0", "3 × 1 ... 5", "3 × 2 ... 6", "7"]),
        ("abc", ["0", "1", "2"]),
    ],
)
def test_repeated_blocks_are_shown_once_in_the_networks_order(
    kinds: str, expected: list[str], tmp_path: Path
) -> None:
    layers = [layer_of(str(i), 16 * ord(kind), 16, 16, "DATA") for i, kind in enumerate(kinds)]
    plan = [(layer, shards_of(layer, settings(tmp_path))) for layer in layers]
    times = {shard.gemm: 1 for _, shards in plan for shard in shards}
    lines = tool.result_table(plan, times, "us", customized=False)
    assert [line.split("  ")[0] for line in lines[1 : 1 + 3 * len(expected) : 3]] == expected
