"""Hypothesis: any valid table gives a right file, any bytes at all a file or one error line."""

from __future__ import annotations

import math
import tempfile
from fractions import Fraction
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool
from helpers import (
    MANY,
    MNK_INPUTS,
    PARALLEL,
    ROUNDINGS,
    LayerCells,
    accelerator_of,
    gemms_of,
    plan_of_table,
    read_like_astrasim,
    settings,
    table,
    tables,
    workload_of,
)

EXAMPLE = MNK_INPUTS / "example.csv"
SIZES = st.one_of(st.integers(1, 5000), st.integers(1, 10**30 - 1))
SYSTEMS = st.tuples(st.integers(1, 64), st.integers(1, 64))  # packages, NPUs in each
SPELLINGS = ("plain", "upper", "BOM", "CRLF", "blank", "comma")


@MANY
@given(tables(SIZES), PARALLEL, SYSTEMS, st.integers(1, 16), ROUNDINGS)
def test_any_table_gives_a_right_file(
    layers: list[LayerCells],
    parallel: str,
    system: tuple[int, int],
    datatype_size: int,
    rounding: str,
) -> None:
    """Shards that cover the layer, exact sizes, every word consumed; the same in any spelling."""
    packages, in_each = system
    npus = packages * in_each
    chosen = {"parallel": parallel, "num_npus": npus, "num_packages": packages}
    chosen |= {"datatype_size": datatype_size, "shard_rounding": rounding}
    texts = set()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "t.csv")
        for spelling in SPELLINGS:
            path.write_bytes(table(layers, spelling))
            given_flags = settings(Path(name), mnk=path, **chosen)
            plan = plan_of_table(given_flags)
            texts.add(workload_of(plan, given_flags))
    assert len(texts) == 1
    strategy, read = read_like_astrasim(texts.pop())
    assert (strategy, [layer.name for layer in read]) == (parallel, [name for name, *_ in layers])
    dp_of = {"DATA": npus, "MODEL": 1, "HYBRID_DATA_MODEL": packages, "HYBRID_MODEL_DATA": in_each}
    for (_, m, n, k, own), layer_plan, seen in zip(layers, plan.layers, read, strict=True):
        used = own if parallel == "HYBRID_CUSTOMIZED" else parallel
        assert seen.strategy == (own if parallel == "HYBRID_CUSTOMIZED" else None)
        dp, mp = dp_of[used], npus // dp_of[used]
        share_m, share_n, whole_k = gemms_of(layer_plan)[0]
        assert whole_k == k
        for share, size, parts in ((share_m, m, dp), (share_n, n, mp)):
            if rounding == "up":
                assert share * parts >= size > (share - 1) * parts
            else:
                assert share == max(1, size // parts)
        exact = (Fraction(m * n, dp * mp), Fraction(m * k, dp), Fraction(n * k, mp))
        for (_, kind, written), elements in zip(seen.passes, exact, strict=True):
            expected = math.floor(elements * datatype_size)
            assert written == (0 if kind == "NONE" else expected)


def works_or_one_line(**files: bytes) -> None:
    """Run the pipeline on these bytes; UserError is the one line, anything else a traceback."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        mnk = folder / "table" if "table" in files else EXAMPLE
        config = folder / "config" if "config" in files else None
        one_npu = {"num_npus": 1, "num_packages": 1}
        try:
            assert "run_name = gemm" in accelerator_of(config).merged_config
            chosen = settings(folder, mnk=mnk, scalesim_config=config, **one_npu)
            tool.run(chosen._replace(dry_run=True))
        except tool.UserError as error:
            assert str(error)


CONFIG_LINES = [
    *("[architecture_presets]\n", "ArrayHeight: 8\n", "ArrayWidth = 8\n", "Dataflow: ws\n"),
    "%(x)s",
]
TABLE_LINES = ["Layer,m,n,k\n", "x,1,2,3\n", "Layer,", "Type,", "Count,", "BATCHED_GEMM"]
FRAGMENTS = st.sampled_from([*'\n\r\t\0\ufeff ",[]=:mnka17', *CONFIG_LINES, *TABLE_LINES])
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(FRAGMENTS, max_size=25).map(lambda parts: "".join(parts).encode()),
)


@MANY
@given(BYTES)
def test_any_bytes_as_a_table(data: bytes) -> None:
    works_or_one_line(table=data)


@MANY
@given(BYTES)
def test_any_bytes_as_a_config(data: bytes) -> None:
    works_or_one_line(config=data)


REPORT_WORDS = [
    *("LayerID", " Total Cycles", "Total Cycles", ",", "\n", '"', "\0", " "),
    *("0", "12", "3.0", "nan", "-1"),
]
REPORTS = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(REPORT_WORDS)).map("".join))
SCALESIM = tool.ScaleSim(None, accelerator_of())


@MANY
@given(REPORTS)
def test_any_text_as_a_report(text: str) -> None:
    cycles = SCALESIM.reported_cycles({SCALESIM.report_name: text})
    assert cycles is None or cycles >= 1
