"""The workload file as ASTRA-sim 1.0 and Chakra read it, and the run folder beside it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    MNK_INPUTS,
    PASS_NAMES,
    PLAIN,
    PLAIN_AND_CUSTOMIZED,
    generate,
    read_like_astrasim,
    read_like_chakra,
    write_table,
)

TOPOLOGY_HEADER = (
    "layer name,ifmap height,ifmap width,filter height,filter width,channels,num filter,strides,\n"
)


@pytest.mark.parametrize("parallel", PLAIN_AND_CUSTOMIZED)
@pytest.mark.parametrize("table", ["example_customized", "resnet50"])
def test_both_astrasims_read_all_of_it(table: str, parallel: str, tmp_path: Path) -> None:
    mnk = MNK_INPUTS / f"{table}.csv"
    if parallel == "HYBRID_CUSTOMIZED" and table == "resnet50":
        header, *layers = mnk.read_text().splitlines()
        rows = [f"{row},{PLAIN[i % 4]}" for i, row in enumerate(layers)]
        mnk = write_table(tmp_path / "t.csv", *rows, header=f"{header},CustomizedParallelization")
    minibatch = 256 if table == "resnet50" else 1
    text = generate(tmp_path, mnk=mnk, parallel=parallel, minibatch=minibatch)
    strategy, written = read_like_astrasim(text)
    assert strategy == parallel
    names = [row.split(",")[0] for row in mnk.read_text().splitlines()[1:]]
    assert [layer.name for layer in written] == names
    if parallel != "HYBRID_CUSTOMIZED":
        read_like_chakra(text)


def test_update_time_is_the_last_number_of_a_layer(tmp_path: Path) -> None:
    _, layers = read_like_astrasim(generate(tmp_path, update_time=7))
    assert {layer.update_time for layer in layers} == {7}


# --- The run folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Return the run folder of a layer whose name needs quotes."""
    mnk = write_table(tmp_path / "my.layers.csv", '"a,""b",64,20,30')
    generate(tmp_path, mnk=mnk, run_name="deep/er")
    return tmp_path / "outputs/DATA/deep/er"


def test_the_files_of_the_run_folder(run_folder: Path) -> None:
    topologies = {f"my.layers_{name}.csv" for name in ("fwd_pass", "inp_grad", "weight_grad")}
    others = {"layers.csv", "scalesim.cfg", "cycle_model.txt"}
    assert {file.name for file in run_folder.iterdir()} == topologies | others


@pytest.mark.parametrize(
    ("name", "gemm"),
    [
        pytest.param("fwd_pass", "4,30,1,30,1,20", id="forward"),
        pytest.param("inp_grad", "4,20,1,20,1,30", id="input gradient"),
        pytest.param("weight_grad", "30,4,1,4,1,20", id="weight gradient"),
    ],
)
def test_a_topology_has_the_gemms_of_a_pass(name: str, gemm: str, run_folder: Path) -> None:
    text = (run_folder / f"my.layers_{name}.csv").read_text()
    assert text == f"{TOPOLOGY_HEADER}a__b,{gemm},1,\n"


def test_layers_csv_has_names_as_they_are(run_folder: Path) -> None:
    """Of ws on 256 x 256 a fold takes 2 * 256 + 256 + 4 - 2 cycles, the last one less."""
    with (run_folder / "layers.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["pass"] for row in rows] == list(PASS_NAMES)
    expected = {"layer": 'a,"b', "strategy": "DATA", "dp": "16", "mp": "1"}
    expected |= {"pass": "input gradient", "M": "4", "N": "30", "K": "20", "cycles": "769"}
    expected |= {"collective": "NONE", "bytes": "0", "members": "1"}
    assert {name: rows[1][name] for name in expected} == expected


def test_the_config_and_the_cycle_model_are_kept(run_folder: Path) -> None:
    assert (run_folder / "scalesim.cfg").read_text() == tool.BUILT_IN_CONFIG
    assert (run_folder / "cycle_model.txt").read_text() == "analytical\n"
