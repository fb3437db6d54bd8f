"""The one sharding rule, against numbers worked out by hand, and what is warned of or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    FAST,
    MNK_INPUTS,
    collectives_of,
    gemms_of,
    layer_of,
    plan_of,
    run,
    settings,
    write_table,
)

# A layer of m=100, n=50, k=30 in 4-byte elements on 12 NPUs in 3 packages: m x n is 20000 bytes,
# m x k 12000, n x k 6000. Each pass: M, N, K with sizes rounded up, the same rounded down,
# collective, bytes.
BY_HAND = {
    "DATA": [  # m / 12 is 9 or 8
        ((9, 50, 30), (8, 50, 30), "NONE", 0),
        ((9, 30, 50), (8, 30, 50), "NONE", 0),
        ((30, 50, 9), (30, 50, 8), "ALLREDUCE", 6000),
    ],
    "MODEL": [  # n / 12 is 5 or 4
        ((100, 5, 30), (100, 4, 30), "ALLGATHER", 1666),
        ((100, 30, 5), (100, 30, 4), "REDUCESCATTER", 12000),
        ((30, 5, 100), (30, 4, 100), "NONE", 0),
    ],
    "HYBRID_DATA_MODEL": [  # m / 3 is 34 or 33, n / 4 is 13 or 12
        ((34, 13, 30), (33, 12, 30), "ALLGATHER", 1666),
        ((34, 30, 13), (33, 30, 12), "REDUCESCATTER", 4000),
        ((30, 13, 34), (30, 12, 33), "ALLREDUCE", 1500),
    ],
    "HYBRID_MODEL_DATA": [  # m / 4 is 25, n / 3 is 17 or 16
        ((25, 17, 30), (25, 16, 30), "ALLGATHER", 1666),
        ((25, 30, 17), (25, 30, 16), "REDUCESCATTER", 3000),
        ((30, 17, 25), (30, 16, 25), "ALLREDUCE", 2000),
    ],
}


OF_12 = {"num_npus": 12, "num_packages": 3}


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize("strategy", BY_HAND)
def test_every_pass_of_every_strategy(tmp_path: Path, strategy: str, rounding: str) -> None:
    chosen = settings(tmp_path, datatype_size=4, shard_rounding=rounding, **OF_12)
    plan = plan_of(layer_of("a", 100, 50, 30, strategy), chosen)
    rounded_up, rounded_down, kinds, sizes = zip(*BY_HAND[strategy])
    assert gemms_of(plan) == list(rounded_up if rounding == "up" else rounded_down)
    assert collectives_of(plan) == list(zip(kinds, sizes))
    assert [each.count for each in plan.passes.values()] == [1, 1, 1]


def test_a_share_is_never_below_one(tmp_path: Path) -> None:
    chosen = settings(tmp_path, shard_rounding="down", **OF_12)
    plan = plan_of(layer_of("a", 3, 50, 30, "DATA"), chosen)
    assert gemms_of(plan) == [(1, 50, 30), (1, 30, 50), (30, 50, 1)]


def test_sizes_beyond_floating_point_are_exact(tmp_path: Path) -> None:
    m, n, k = 2**31 + 1, 2**33 + 3, 2**35 + 5
    layer = layer_of("a", m, n, k, "HYBRID_DATA_MODEL")
    plan = plan_of(layer, settings(tmp_path, datatype_size=4, **OF_12))
    sizes = [size for _, size in collectives_of(plan)]
    assert sizes == [m * n * 4 // 12, m * k * 4 // 3, n * k * 4 // 4]
    assert sizes[0] > 2**53


# 100 bytes on 12 NPUs in 3 packages; of an ALLREDUCE twice the bytes are sent, then rounded down.
@pytest.mark.parametrize(
    ("kind", "sent", "between"),
    [
        pytest.param("ALLGATHER", 11 * 100, 2 * 100, id="ALLGATHER"),
        pytest.param("REDUCESCATTER", 91, 16, id="REDUCESCATTER"),  # 91.67 and 16.67
        pytest.param("ALLREDUCE", 183, 33, id="ALLREDUCE"),  # 183.33 and 33.33
        pytest.param("ALLTOALL", 91, 66, id="ALLTOALL"),  # 91.67 and 66.67
        pytest.param("NONE", 0, 0, id="NONE"),
    ],
)
def test_what_an_npu_sends_of_a_collective(kind: str, sent: int, between: int) -> None:
    collective = tool.Collective(kind, 100, within=4, between=3)
    assert (collective.sent_bytes, collective.sent_between_packages) == (sent, between)


def check(tmp_path: Path, layers: list[tool.Layer], **changes: object) -> None:
    chosen = settings(tmp_path, **changes)
    tool.Plan(layers, chosen).check()


def test_a_size_that_is_not_divisible_is_warned_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = [layer_of(f"L{line}", 100, 50, 30, "HYBRID_DATA_MODEL") for line in range(2, 12)]
    check(tmp_path, [*layers, layer_of("even", 96, 48, 30, "DATA")], **OF_12)
    names = "L2 and 9 more layers"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {names}: m = 100 is not divisible by 3, one NPU is timed with 34",
        f"warning: {names}: n = 50 is not divisible by 4, one NPU is timed with 13",
        "warning: t.csv:2: L11 (HYBRID_DATA_MODEL) before even (DATA) lacks backward an ALLTOALL of"
        " 480 bytes: no communication was added",
    ]


def test_a_size_of_less_than_its_npus_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(tmp_path, [layer_of("a", 3, 64, 64, "DATA")], num_npus=12, num_packages=3)
    assert capsys.readouterr().err == (
        "warning: a: m = 3 is less than 12, so that some have none, one NPU is timed with 1\n"
    )


def test_a_collective_of_0_bytes_is_refused_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(tool.UserError) as error:
        check(tmp_path, [layer_of("tiny", 3, 2, 9, "MODEL", where="t.csv:7")], datatype_size=2)
    assert str(error.value) == (
        "t.csv:7: the ALLGATHER of the forward pass of tiny is 0 bytes; ASTRA-sim would stop"
        " without a message"
    )


def test_collectives_of_1_to_3_bytes_get_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = []
    for line, n in enumerate((4, 3, 2, 1), 2):
        layers.append(layer_of(f"small{n}", 16, n, 1, "DATA", where=f"t.csv:{line}"))
    check(tmp_path, layers, datatype_size=1)
    assert capsys.readouterr().err == (
        "warning: t.csv:3: the ALLREDUCE of the weight gradient pass of small3 is 3 bytes"
        " (and 2 more): with fewer than 4 ASTRA-sim may never end\n"
    )


# --- Collectives too large for ASTRA-sim 1.0


LIMIT = 1 << 33  # bytes: ASTRA-sim 1.0 counts a quarter of them in 31 bits


MODEL = "HYBRID_MODEL_DATA"  # over 8 NPUs in 2 packages: dp 4 within a package, mp 2 between


def large_warnings(folder: Path, line: str, parallel: str, npus: int, packages: int) -> list[str]:
    table = write_table(folder / "t.csv", line, header="Layer,m,n,k,Type")
    flags = [FAST, f"--mnk={table}", f"--parallel={parallel}", "--datatype_size=1"]
    result = run(folder, *flags, f"--num_npus={npus}", f"--num_packages={packages}")
    assert result.status == 0
    return [line for line in result.err.splitlines() if "too large" in line]


@pytest.mark.parametrize(
    ("line", "parallel", "packages", "large"),
    [
        pytest.param(f"a,8,{1 << 20},{1 << 13},", "DATA", 1, "ALLREDUCE", id="ALLREDUCE"),
        pytest.param(f"a,8,{(1 << 20) - 8},{1 << 13},", "DATA", 1, "", id="a smaller ALLREDUCE"),
        pytest.param(f"a,{1 << 22},8,{1 << 11},", "MODEL", 1, "REDUCESCATTER", id="REDUCESCATTER"),
        # m n / 8 are 2^32 bytes of one NPU: they count twice where 2 packages gather them too
        pytest.param(
            f"a,{1 << 23},{1 << 12},8,", "MODEL", 2, "ALLGATHER", id="ALLGATHER, 2 levels"
        ),
        pytest.param(f"a,{1 << 23},{1 << 12},8,", "MODEL", 1, "", id="ALLGATHER, 1 level"),
        pytest.param(f"a,{1 << 23},{1 << 12},8,", "MODEL", 8, "", id="ALLGATHER, between packages"),
        pytest.param(f"a,{1 << 23},{1 << 12},8,", MODEL, 2, "", id="ALLGATHER of a hybrid"),
        pytest.param(
            f"a,{1 << 24},{1 << 12},8,", MODEL, 2, "ALLGATHER", id="a hybrid's larger one"
        ),
        pytest.param(f"a,{1 << 24},8,{1 << 9},COLUMN_PARALLEL", "MODEL", 2, "ALLREDUCE", id="type"),
    ],
)
def test_collectives_that_astrasim_1_loses_count_of(
    line: str, parallel: str, packages: int, large: str, tmp_path: Path
) -> None:
    warnings = large_warnings(tmp_path, line, parallel, 8, packages)
    if not large:
        assert warnings == []
        return
    (warning,) = warnings
    assert warning.startswith(f"warning: {tmp_path}/t.csv:2: the {large} of the ")
    advice = "too large for ASTRA-sim 1.0; ASTRA-sim 2.x runs it"
    assert re.search(rf" pass of a is [\d,]+ bytes, {advice}$", warning)


def test_a_collective_of_one_member_is_never_too_large(tmp_path: Path) -> None:
    assert large_warnings(tmp_path, f"a,8,{LIMIT},8,", "DATA", 1, 1) == []


def test_gpt3_on_64_npus_has_large_collectives(tmp_path: Path) -> None:
    mnk = MNK_INPUTS / "gpt3_175b.csv"
    result = run(tmp_path, FAST, f"--mnk={mnk}", "--num_npus=64", "--parallel=MODEL", "--dry_run")
    (warning,) = [line for line in result.err.splitlines() if "too large" in line]
    what = "the ALLREDUCE of the input gradient pass of block0_qkv is 77,309,411,328 bytes"
    assert warning.startswith(f"warning: {mnk}:2: {what} (and 383 more), too large ")
