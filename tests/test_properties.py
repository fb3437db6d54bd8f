"""Hypothesis: any valid table gives a right file, and any bytes at all end in a file or one error line."""

from __future__ import annotations

import os
import tempfile
from fractions import Fraction
from pathlib import Path

from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool
from helpers import PLAIN, read_like_astrasim, settings, shards_of

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "1000"))
MANY = examples(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
SIZES = st.one_of(st.integers(1, 5000), st.integers(1, 10**30 - 1))
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
LAYERS = st.lists(
    st.tuples(NAMES, SIZES, SIZES, SIZES, st.sampled_from(PLAIN)), min_size=1, max_size=6
)
PARALLEL = st.sampled_from([*PLAIN, "HYBRID_CUSTOMIZED"])
SYSTEMS = st.tuples(st.integers(1, 64), st.integers(1, 64)).map(
    lambda pair: (pair[0] * pair[1], pair[1])
)


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def table(layers: list[tuple[str, int, int, int, str]], spelling: str) -> bytes:
    header = "Layer,m,n,k,CustomizedParallelization"
    rows = [f"{quoted(name)},{m},{n},{k},{strategy}" for name, m, n, k, strategy in layers]
    lines = [header.upper() if spelling == "upper" else header, *rows]
    text = (",\n" if spelling == "comma" else "\n\n \n" if spelling == "blank" else "\n").join(
        lines
    ) + "\n"
    text = text.replace("\n", "\r\n") if spelling == "CRLF" else text
    return text.encode("utf-8-sig" if spelling == "BOM" else "utf-8")


@MANY
@given(LAYERS, PARALLEL, SYSTEMS, st.integers(1, 16), st.sampled_from(["up", "down"]))
def test_any_table_gives_a_right_file(
    layers: list[tuple[str, int, int, int, str]],
    parallel: str,
    system: tuple[int, int],
    size: int,
    rounding: str,
) -> None:
    """Shards that cover the layer, exact sizes, every word consumed; the same for each spelling of the table."""
    npus, packages = system
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = settings(
            folder,
            mnk=folder / "t.csv",
            parallel=parallel,
            num_npus=npus,
            num_packages=packages,
            datatype_size=size,
            shard_rounding=rounding,
        )
        texts = set()
        for spelling in ("plain", "upper", "BOM", "CRLF", "blank", "comma"):
            chosen.mnk.write_bytes(table(layers, spelling))
            plan = [
                (layer, shards_of(layer, chosen))
                for layer in tool.read_layers(chosen.mnk, parallel, 1)
            ]
            gemms = [shard.gemm for _, shards in plan for shard in shards]
            array = tool.read_architecture(None)
            cycles = {gemm: tool.estimated_cycles(gemm, array) for gemm in gemms}
            texts.add(tool.workload_text(plan, cycles, parallel, 100))
    assert len(texts) == 1
    strategy, read = read_like_astrasim(texts.pop())
    assert (strategy, [layer.name for layer in read]) == (parallel, [name for name, *_ in layers])
    dp_of = {
        "DATA": npus,
        "MODEL": 1,
        "HYBRID_DATA_MODEL": packages,
        "HYBRID_MODEL_DATA": npus // packages,
    }
    for (_, m, n, k, own), (_, shards), seen in zip(layers, plan, read):
        used = own if parallel == "HYBRID_CUSTOMIZED" else parallel
        assert seen.strategy == (own if parallel == "HYBRID_CUSTOMIZED" else None)
        dp, mp = dp_of[used], npus // dp_of[used]
        forward = shards[0].gemm
        assert forward.k == k
        if rounding == "up":
            assert forward.m * dp >= m > (forward.m - 1) * dp
            assert forward.n * mp >= n > (forward.n - 1) * mp
        else:
            assert forward.m == max(1, m // dp)
            assert forward.n == max(1, n // mp)
        exact = (
            Fraction(m * n * size, dp * mp),
            Fraction(m * k * size, dp),
            Fraction(n * k * size, mp),
        )
        for (_, collective, written), value in zip(seen.passes, exact):
            assert written == (0 if collective == "NONE" else value.numerator // value.denominator)


def works_or_one_line(**files: bytes) -> None:
    """Run the whole pipeline on these bytes; UserError is the one line, anything else a traceback."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        config = folder / "config" if "config" in files else None
        mnk = folder / "table" if "table" in files else settings(folder).mnk
        try:
            assert "run_name = gemm" in tool.read_architecture(config).scalesim_text
            tool.generate(
                settings(
                    folder,
                    mnk=mnk,
                    scalesim_config=config,
                    num_npus=1,
                    num_packages=1,
                    dry_run=True,
                )
            )
        except tool.UserError as error:
            assert str(error)


CONFIG_LINES = [
    "[architecture_presets]\n",
    "ArrayHeight: 8\n",
    "ArrayWidth = 8\n",
    "Dataflow: ws\n",
    "%(x)s",
]
TABLE_LINES = ["Layer,m,n,k\n", "x,1,2,3\n", "Layer,"]
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


REPORT = st.lists(
    st.sampled_from(
        [
            "LayerID",
            " Total Cycles",
            "Total Cycles",
            ",",
            "\n",
            "0",
            "12",
            "3.0",
            "nan",
            "-1",
            '"',
            "\0",
            " ",
        ]
    )
).map("".join)


@MANY
@given(st.one_of(st.text(max_size=80), REPORT))
def test_any_text_as_a_report(text: str) -> None:
    cycles = tool.reported_cycles({"COMPUTE_REPORT.csv": text}, 3)
    assert cycles is None or cycles >= 1
