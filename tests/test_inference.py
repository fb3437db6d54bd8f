"""--inference: forward passes only, in every file and on the screen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    MNK_INPUTS,
    PLAIN,
    generate,
    is_one_error_line,
    plan_of_table,
    run,
    settings,
    state,
    workload_of,
    write_table,
)
from runs import (
    TYPED,
    came_before,
    layers_csv_of,
    read_rows,
    run_inside,
    summary_row_of,
    trace_of,
)

NO_BACKWARD = "0\tNONE\t0\t0\tNONE\t0\t100"
DECODE = MNK_INPUTS / "gpt3_175b_decode.csv"
GPT3_WEIGHTS = 173_946_175_488

# On 16 NPUs in 2 packages. The array, 256 x 256 ws, is filled by no layer, so that a GEMM takes
# 2 x 256 + 256 + m' - 2 - 1 = 765 + m' cycles. m = 64: m' = 4, 64, 32 and 8. Where outputs are
# gathered, a share of them is 64 x 48 x 2 / 16 = 384 bytes.
TEXTS = {
    "DATA": f"DATA\n1\na\t-1\t769\tNONE\t0\t{NO_BACKWARD}\n",
    "MODEL": f"MODEL\n1\na\t-1\t829\tALLGATHER\t384\t{NO_BACKWARD}\n",
    "HYBRID_DATA_MODEL": f"HYBRID_DATA_MODEL\n1\na\t-1\t797\tALLGATHER\t384\t{NO_BACKWARD}\n",
    "HYBRID_MODEL_DATA": f"HYBRID_MODEL_DATA\n1\na\t-1\t773\tALLGATHER\t384\t{NO_BACKWARD}\n",
    "HYBRID_CUSTOMIZED": (
        f"HYBRID_CUSTOMIZED\n1\na\t-1\t829\tALLGATHER\t384\t{NO_BACKWARD}\tMODEL\n"
    ),
    # The embedding looks 64 x 48 / 16 x 2 elements up, 10 in a cycle.
    "HYBRID_DLRM": (
        "HYBRID_DLRM\t1\n3\n"
        f"e\t-1\t39\tALLTOALL\t384\t{NO_BACKWARD}\n"
        f"a\t-1\t769\tNONE\t0\t{NO_BACKWARD}\n"
        f"t\t-1\t769\tNONE\t0\t{NO_BACKWARD}\n"
    ),
}
DLRM_LINES = ("a,64,48,32,,,", "e,64,48,2,EMBEDDING,,", "t,64,48,32,,,")


def chosen(folder: Path, parallel: str) -> dict[str, Any]:
    """Return the settings of a small model."""
    lines = DLRM_LINES if parallel == "HYBRID_DLRM" else ("a,64,48,32,,,MODEL",)
    mnk = write_table(folder / "t.csv", *lines, header=TYPED)
    return {"mnk": mnk, "parallel": parallel, "inference": True}


@pytest.mark.parametrize("parallel", TEXTS)
def test_the_text_file_has_no_backward_passes(parallel: str, tmp_path: Path) -> None:
    assert generate(tmp_path, **chosen(tmp_path, parallel)) == TEXTS[parallel]


@pytest.mark.parametrize("parallel", TEXTS)
def test_the_run_folder_has_the_forward_pass_only(parallel: str, tmp_path: Path) -> None:
    rows = layers_csv_of(tmp_path, **chosen(tmp_path, parallel))
    layers = ["a", "e", "t"] if parallel == "HYBRID_DLRM" else ["a"]
    assert [(row["layer"], row["pass"]) for row in rows] == [(name, "forward") for name in layers]
    files = {path.name for path in (tmp_path / "outputs" / parallel / "run").iterdir()}
    assert files == {"layers.csv", "t_fwd_pass.csv", "scalesim.cfg", "cycle_model.txt"}


@pytest.mark.parametrize("parallel", TEXTS)
def test_the_printed_table_has_the_forward_pass_only(
    parallel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_inside(tmp_path, **chosen(tmp_path, parallel))
    out = capsys.readouterr().out
    assert "grad" not in out
    assert "step" not in out
    totals = out.partition("totals of a forward pass\n")[2].splitlines()
    cycles = [int(word) for word in re.findall(r"-1\t(\d+)", TEXTS[parallel])]
    first, second, *_ = totals
    assert first.split() == ["compute,", "forward", f"{sum(cycles):,}", "cycles"]
    assert not second.startswith("compute")


def test_traces_of_forward_passes_are_called_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace_of(tmp_path, **chosen(tmp_path, "DATA"), num_passes=3)
    assert "wrote 16 traces of 3 forward passes: " in capsys.readouterr().out


def test_the_summary_has_0_for_the_other_passes(tmp_path: Path) -> None:
    changes = chosen(tmp_path, "HYBRID_DATA_MODEL")
    row = summary_row_of(tmp_path, **changes)
    assert row["inference"] == "True"
    assert [row[f"compute_{name}"] for name in ("forward", "input_gradient")] == ["797", "0"]
    assert [row[f"compute_{name}"] for name in ("weight_gradient", "all")] == ["0", "797"]
    # 7 of the package's 8 NPUs get a share.
    sent = ["allgather_count", "allgather_bytes", "sent_within_package", "sent_between_packages"]
    assert [row[name] for name in sent] == ["1", "384", "2688", "0"]
    assert {row[f"{kind}_count"] for kind in ("reducescatter", "allreduce")} == {"0"}
    run_inside(tmp_path, **{**changes, "inference": False}, summary_csv=tmp_path / "s.csv")
    assert [row["inference"] for row in read_rows(tmp_path / "s.csv")] == ["True", "False"]


@pytest.mark.parametrize(
    ("lines", "changes", "of_gradients"),
    [
        pytest.param(
            ["a,1024,1,8,,,"],
            {"parallel": "MODEL", "num_npus": 8, "num_packages": 1, "shard_rounding": "up"},
            "",
            id="what is said forward too",
        ),
        pytest.param(
            ["a,64,64,64,COLUMN_PARALLEL,,", "b,64,64,64,COLUMN_PARALLEL,,"],
            {"parallel": "MODEL"},
            "b seems to read the input of a, and reduces its gradient again",
            id="siblings",
        ),
        pytest.param(
            ["a,64,64,64,ROW_PARALLEL,,", "b,64,64,64,,,"],
            {"parallel": "MODEL"},
            "a (ROW_PARALLEL) before b (GEMM) lacks a collective of the gradient",
            id="gradients that are split and wanted whole",
        ),
        pytest.param(
            ["a,64,64,64,,,MODEL", "b,64,64,64,,,DATA"],
            {"parallel": "HYBRID_CUSTOMIZED"},
            "a (MODEL) before b (DATA) lacks backward an ALLTOALL",
            id="backward resharding",
        ),
        pytest.param(
            ["a,64,1,2,,,"],
            {"parallel": "DATA", "datatype_size": 1},
            "the ALLREDUCE of the weight gradient pass of a is 2 bytes",
            id="a collective of 2 bytes",
        ),
        pytest.param(
            ["a,64,65536,65536,,,"],
            {"parallel": "DATA"},
            "ALLREDUCE of the weight gradient pass of a is 8,589,934,592 bytes, too large",
            id="a large collective",
        ),
        pytest.param(
            ["a,64,64,64,,,"],
            {"parallel": "HYBRID_DATA_MODEL", "num_packages": 1},
            "1 collective of one member",
            id="a collective of one member",
        ),
        pytest.param(
            ["a,3760,64,256,,,"],  # 1000 cycles forward, 1021 for the weight gradient
            {"time_unit": "us", "clock_mhz": 500.0},
            "moves the compute time of the weight gradient pass",
            id="rounding",
        ),
    ],
)
def test_no_warning_speaks_of_a_gradient(
    lines: list[str],
    changes: dict[str, Any],
    of_gradients: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mnk = write_table(tmp_path / "t.csv", *lines, header=TYPED)
    run_inside(tmp_path, mnk=mnk, **changes)
    training = capsys.readouterr().err
    assert of_gradients in training
    run_inside(tmp_path, mnk=mnk, inference=True, **changes)
    inference = capsys.readouterr().err
    if of_gradients:
        assert inference == ""
    else:
        assert inference == training != ""


def test_a_gradient_of_0_bytes_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 1 x 1 weights an NPU has an eighth of a byte."""
    mnk = write_table(tmp_path / "t.csv", "a,1024,1,1")
    changes: dict[str, Any] = {"mnk": mnk, "parallel": "HYBRID_DATA_MODEL", "datatype_size": 1}
    with pytest.raises(tool.UserError, match="ALLREDUCE of the weight gradient pass of a is 0"):
        run_inside(tmp_path, **changes)
    capsys.readouterr()
    run_inside(tmp_path, inference=True, **changes)
    warning = "warning: a: n = 1 is less than 8, so that some have none, one NPU is timed with 1\n"
    assert capsys.readouterr().err == warning
    write_table(tmp_path / "t.csv", "a,8,1,8")
    with pytest.raises(tool.UserError, match="ALLGATHER of the forward pass of a is 0 bytes"):
        run_inside(tmp_path, inference=True, **changes)


# --- Traces

COMPUTED = ["a forward", "b forward"]
GATHERED = ["a forward", "a forward ALLGATHER", "b forward", "b forward ALLGATHER"]
TRACED = {"DATA": COMPUTED, **dict.fromkeys(PLAIN[1:], GATHERED)}


@pytest.mark.parametrize("parallel", TRACED)
def test_each_forward_pass_begins_when_the_one_before_has_ended(
    parallel: str, tmp_path: Path
) -> None:
    mnk = write_table(tmp_path / "t.csv", "a,64,48,32", "b,64,32,48")
    nodes = trace_of(tmp_path, mnk=mnk, parallel=parallel, inference=True, num_passes=3)
    assert [node.name for node in nodes] == 3 * TRACED[parallel]
    # Nothing runs beside anything else.
    before = came_before(nodes)
    assert [before[node.id] for node in nodes] == [set(range(i)) for i in range(len(nodes))]


def test_an_embeddings_exchange_runs_beside_the_bottom_mlp(tmp_path: Path) -> None:
    changes = {**chosen(tmp_path, "HYBRID_DLRM"), "num_passes": 3}
    nodes = trace_of(tmp_path, **changes)
    names = ["e forward", "e forward ALLTOALL", "a forward", "t forward"]
    assert [node.name for node in nodes] == 3 * names
    before = came_before(nodes)
    for first in (0, 4, 8):
        ended = set(range(first))
        assert before[first] == ended
        assert before[first + 1] == {*ended, first}
        assert before[first + 2] == {*ended, first}, "it does not wait for the ALLTOALL"
        assert before[first + 3] == {*ended, first, first + 1, first + 2}


def test_experts_exchange_tokens_forward_only(tmp_path: Path) -> None:
    lines = ("u,64,48,32,EXPERT_UP,8,", "v,64,32,24,EXPERT_DOWN,8,")
    mnk = write_table(tmp_path / "t.csv", *lines, header=TYPED)
    nodes = trace_of(tmp_path, mnk=mnk, parallel="HYBRID_DATA_MODEL", inference=True)
    names = ["u forward ALLTOALL", "u forward", "v forward", "v forward ALLTOALL"]
    assert [node.name for node in nodes] == names


# --- Decoding


def test_decoding_with_gpt3(tmp_path: Path) -> None:
    """Each of 96 blocks reduces the outputs of its attention and of its MLP.

    An NPU has 1536 / 128 = 12 sequences; 12 x 12288 x 2 bytes are 294,912.
    """
    changes: dict[str, Any] = {"mnk": DECODE, "num_npus": 1024, "num_packages": 128}
    chosen = settings(tmp_path, **changes, parallel="HYBRID_DATA_MODEL", inference=True)
    plan = plan_of_table(chosen)
    workload_of(plan, chosen)  # which gives each GEMM its analytical cycles
    found = [(each.kind, each.bytes, each.members) for _, each in plan.collectives]
    assert found == 192 * [("ALLREDUCE", 294_912, 8)]
    assert plan.total_times(chosen.text_clock) == {"forward": 427_741_824}


def test_decoding_with_gpt3_has_the_weights_of_training_it() -> None:
    def weights(path: Path) -> dict[str, int]:
        rows = [row for row in read_rows(path) if row["Type"] != "BATCHED_GEMM"]
        return {row["Layer"]: int(row["n"]) * int(row["k"]) for row in rows}

    decoding = weights(DECODE)
    assert decoding == weights(MNK_INPUTS / "gpt3_175b.csv")
    assert sum(decoding.values()) == GPT3_WEIGHTS


@pytest.mark.parametrize("sharding", ["SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"])
def test_nothing_is_sharded(sharding: str, tmp_path: Path) -> None:
    flags = [f"--sharding_strategy={sharding}", "--chakra_et=x", "--clock_mhz=1"]
    before = state(tmp_path)
    result = run(tmp_path, "--inference", "--num_npus=4", "--num_packages=2", *flags)
    assert is_one_error_line(result)
    what = f"--sharding_strategy={sharding} is for training, expected no --inference"
    assert result.err == f"error: {what}\n"
    assert state(tmp_path) == before
