"""Cycles from the memory's bandwidth and from elsewhere, and rows that are those of one sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gen_astrasim_workload_input as tool
from helpers import (
    FAST,
    MANY,
    MNK_INPUTS,
    PLAIN,
    accelerator_of,
    fake_v2,
    generate,
    is_one_error_line,
    layer_of,
    layers_of_table,
    plan_of_table,
    read_like_astrasim,
    run,
    settings,
    state,
    workload_of,
    write_config,
    write_table,
)
from processes import SLOW, simulated, without_progress
from runs import TYPED, layers_csv_of, read_rows, run_inside, traces

ALONE = {"num_npus": 1, "num_packages": 1}


def config_of(folder: Path, dataflow: str = "os", bandwidth: int | None = None) -> Path:
    """Write a config of an array of 8 x 4."""
    path = write_config(folder / "c.cfg", 8, 4, dataflow)
    if bandwidth:
        path.write_text(f"{path.read_text()}Bandwidth: {bandwidth}\n")
    return path


def times_of(text: str) -> list[list[int]]:
    """Return the compute times of the passes of the layers of a workload file."""
    _, layers = read_like_astrasim(text)
    return [[time for time, _, _ in layer.passes] for layer in layers]


# --- Roofline


# On 8 x 4, M x N x K of 20 x 10 x 30: os ceil(20/8) ceil(10/4) (8 + 4 + 30 - 2) - 1 = 359,
# ws ceil(30/8) ceil(10/4) (16 + 4 + 20 - 2) - 1 = 455, is ceil(30/8) ceil(20/4) (16 + 4 + 10 - 2)
# - 1 = 559. The elements of its matrices: 600 + 300 + 200 = 1100.
@pytest.mark.parametrize(
    ("gemm", "dataflow", "bandwidth", "cycles"),
    [
        pytest.param("20,10,30", "os", 1, 1100, id="os, the memory"),
        pytest.param("20,10,30", "os", 3, 367, id="os, the memory, rounded up"),
        pytest.param("20,10,30", "os", 4, 359, id="os, the array"),
        pytest.param("20,10,30", "ws", 2, 550, id="ws, the memory"),
        pytest.param("20,10,30", "ws", 3, 455, id="ws, the array"),
        pytest.param("20,10,30", "is", 1, 1100, id="is, the memory"),
        pytest.param("20,10,30", "is", 2, 559, id="is, the array"),
        # ws: 8 x 16 x (16 + 4 + 1 - 2) - 1 = 2431; elements 64 + 4096 + 64
        pytest.param("1,64,64", "ws", 1, 4224, id="a row, the memory"),
        pytest.param("1,64,64", "ws", 2, 2431, id="a row, the array"),
        pytest.param("1,1,1", "os", 1, 10, id="a number"),
        pytest.param("1,1,1", "os", 1 << 40, 10, id="a number, any memory"),
    ],
)
def test_the_array_or_the_memory(
    gemm: str, dataflow: str, bandwidth: int, cycles: int, tmp_path: Path
) -> None:
    mnk = write_table(tmp_path / "t.csv", f"a,{gemm}")
    config = config_of(tmp_path, dataflow, bandwidth)
    changes = {"mnk": mnk, "scalesim_config": config, **ALONE}
    ((forward, _, _),) = times_of(generate(tmp_path, **changes, cycle_model="roofline"))
    assert forward == cycles


SIZES = st.integers(1, 5000) | st.integers(1, 10**9)
ARRAYS = st.tuples(st.integers(1, 300), st.integers(1, 300))
DATAFLOWS = st.sampled_from(["os", "ws", "is"])


def formula(m: int, n: int, k: int, array: tuple[int, int], dataflow: str) -> int:
    """Return the analytical cycles, as the README has them."""
    rows, columns = array
    along_rows, along_columns, fold = {
        "os": (m, n, rows + columns + k - 2),
        "ws": (k, n, 2 * rows + columns + m - 2),
        "is": (k, m, 2 * rows + columns + n - 2),
    }[dataflow]
    return max(1, -(-along_rows // rows) * -(-along_columns // columns) * fold - 1)


@MANY
@given(st.tuples(SIZES, SIZES, SIZES), ARRAYS, DATAFLOWS, st.integers(1, 5000) | SIZES)
def test_never_less_than_the_array_or_the_memory_takes(
    gemm: tuple[int, int, int], array: tuple[int, int], dataflow: str, bandwidth: int
) -> None:
    chosen = settings(Path("/"), **ALONE)
    plan = tool.Plan([layer_of("a", *gemm, "DATA")], chosen)
    accelerator = accelerator_of()._replace(
        rows=array[0], columns=array[1], dataflow=dataflow, has_chosen_bandwidth=True
    )

    def cycles(of_bandwidth: int) -> int:
        model = tool.RooflineModel(chosen, accelerator._replace(bandwidth=of_bandwidth))
        return model.cycles(plan).cycles[tool.Gemm(*gemm)]

    m, n, k = gemm
    elements = m * k + k * n + m * n
    analytical = formula(m, n, k, array, dataflow)
    assert cycles(bandwidth) == max(analytical, -(-elements // bandwidth))
    assert cycles(elements) == analytical, "all of it in a cycle"


@pytest.mark.parametrize("flags", [[], ["--scalesim_config=c.cfg"], ["--dry_run"]])
def test_roofline_needs_a_bandwidth(flags: list[str], tmp_path: Path) -> None:
    config_of(tmp_path)
    before = state(tmp_path)
    result = run(tmp_path, "--cycle_model=roofline", *flags)
    assert is_one_error_line(result)
    assert result.err == (
        "error: --cycle_model=roofline needs the Bandwidth of the memory, expected"
        " a --scalesim_config with Bandwidth, in elements a cycle\n"
    )
    assert state(tmp_path) == before


# 20 x 10 x 30 as above takes 367 cycles, bound by the memory; 20 x 30 x 10 takes
# 3 x 8 x (8 + 4 + 10 - 2) - 1 = 479, and 30 x 10 x 20 takes 4 x 3 x 30 - 1 = 359, so 367.
TWO_OF_THREE = ["a,20,10,30,,,"]


@pytest.mark.parametrize(
    ("lines", "changes", "bound"),
    [
        pytest.param(TWO_OF_THREE, {}, (2, "3 passes", 734, 1213), id="a layer"),
        pytest.param(TWO_OF_THREE, {"inference": True}, (1, "1 pass", 367, 367), id="a pass"),
        pytest.param(
            ["a,20,10,30,BATCHED_GEMM,5,"], {}, (2, "3 passes", 3670, 6065), id="five products"
        ),
        # 20 x 10 x 3 lookups take 200 cycles, their update 400, and between them is no computing.
        pytest.param(
            [*TWO_OF_THREE, "e,20,10,3,EMBEDDING,,", *TWO_OF_THREE],
            {"parallel": "HYBRID_DLRM"},
            (6, "9 passes", 2068, 3026),
            id="lookups",
        ),
    ],
)
def test_what_the_memory_bounds_is_printed(
    lines: list[str],
    changes: dict[str, Any],
    bound: tuple[int, str, int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mnk = write_table(tmp_path / "t.csv", *lines, header=TYPED)
    config = config_of(tmp_path, "os", 3)
    changes = {"scalesim_config": config, "cycle_model": "roofline", **ALONE, **changes}
    run_inside(tmp_path, mnk=mnk, **changes)
    number, passes, cycles, total = bound
    printed = capsys.readouterr().out.splitlines()
    part = f"{100 * cycles / total:.1f}%"
    note = f"the memory bounds {number} of {passes}, {part} of the compute time"
    assert [line for line in printed if line.startswith("the memory")] == [note]
    kinds = ("compute, all passes", "compute, forward")
    (line,) = [line for line in printed if line.startswith(kinds[len(passes) == len("1 pass")])]
    assert line.split()[-2:] == [f"{total:,}", "cycles"]


# --- Cycles from a file


def write_cycles(folder: Path, *rows: str, header: str = "count,M,N,K,cycles") -> Path:
    """Write a table of measured cycles."""
    return write_table(folder / "measured.csv", *rows, header=header)


def fed_back(folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> None:
    """Check that a run's own layers.csv gives its workload file, on whatever array."""
    first = generate(folder, **changes)
    layers = folder / "outputs" / changes["parallel"] / "run" / "layers.csv"
    measured = layers.rename(folder / "measured.csv")
    capsys.readouterr()
    changes |= {"gemm_cycles": measured, "scalesim_config": config_of(folder)}
    assert generate(folder, **changes) == first
    number = len(plan_of_table(settings(folder, **changes)).gemms)
    line = f"cycles of {number} of {number} distinct GEMMs are from {measured}"
    assert line in capsys.readouterr().out.splitlines()


TRAINED = ("example", "bert_large", "gpt3_175b", "llama3_70b", "mixtral_8x7b")


@pytest.mark.parametrize(
    ("name", "parallel", "changes"),
    [
        *[(name, parallel, {}) for name, parallel in zip(TRAINED, (*PLAIN, "HYBRID_DATA_MODEL"))],
        *[("example", parallel, {}) for parallel in PLAIN[1:]],
        *[("resnet50", parallel, {"minibatch": 16}) for parallel in PLAIN],
        *[("gpt3_175b_decode", parallel, {"inference": True}) for parallel in PLAIN[2:]],
        ("example_customized", "HYBRID_CUSTOMIZED", {}),
        ("mixtral_8x7b", "HYBRID_CUSTOMIZED", {}),
        ("dlrm", "HYBRID_DLRM", {}),  # whose lookups the built-in Bandwidth times, on any array
    ],
)
def test_a_runs_own_cycles_give_its_workload(
    name: str,
    parallel: str,
    changes: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    system = {"num_npus": 8, "num_packages": 2, "parallel": parallel}
    fed_back(tmp_path, capsys, mnk=MNK_INPUTS / f"{name}.csv", **system, **changes)


def test_the_lines_of_fsdp_are_fed_back(tmp_path: Path) -> None:
    """In them are gathers, with count 0 and 0 cycles."""
    changes = {"sharding_strategy": "HYBRID_SHARD", "output_file": None, **traces(tmp_path)}
    rows = layers_csv_of(tmp_path, **changes)
    assert "0" in {row["cycles"] for row in rows}
    own = tmp_path / "outputs/DATA/run/layers.csv"
    changes |= {"gemm_cycles": own, "scalesim_config": config_of(tmp_path)}
    assert layers_csv_of(tmp_path, **changes) == rows, "and read before it is overwritten"


def forward_cycles(folder: Path, measured: Path, *lines: str, **changes: Any) -> list[int]:
    """Return the forward passes' cycles of a table, with those of a file."""
    mnk = write_table(folder / "t.csv", *lines, header=TYPED)
    changes = {"inference": True, **ALONE, **changes}
    text = generate(folder, mnk=mnk, gemm_cycles=measured, **changes)
    return [forward for forward, _, _ in times_of(text)]


def test_a_pass_takes_the_row_of_its_count_or_that_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = write_cycles(
        tmp_path,
        *("6,8,4,6,1000", "1,8,4,6,10", ",16,4,6,70", "6,16,4,6,900", "6,32,4,6,5000"),
        *("0,24,4,6,0", "1,24,4,6,33"),
    )
    product = "4,6,BATCHED_GEMM"
    lines = [
        *(f"a,8,{product},6,", f"b,8,{product},5,", f"c,16,{product},3,", "d,16,4,6,,,"),
        *("e,24,4,6,,,", f"f,32,{product},6,", f"g,32,{product},2,"),
    ]
    # Of g, 2 products of 32 rows, the file has neither 2 nor 1: 765 + 32 cycles on 256 x 256 ws.
    expected = [1000, 50, 210, 70, 33, 5000, 2 * 797]
    assert forward_cycles(tmp_path, measured, *lines) == expected
    line = f"cycles of 3 of 4 distinct GEMMs are from {measured}"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("model", "other"), [("analytical", 479), ("roofline", 550)])
def test_what_the_file_lacks_is_from_the_cycle_model(
    model: str, other: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mnk = write_table(tmp_path / "t.csv", "a,20,10,30")
    measured = write_cycles(tmp_path, "20,10,30,7", "30,10,20,1", header="M,N,K,cycles")
    changes = {"cycle_model": model, "scalesim_config": config_of(tmp_path, "os", 2), **ALONE}
    text = generate(tmp_path, mnk=mnk, gemm_cycles=measured, **changes)
    assert times_of(text) == [[7, other, 1]]
    out = capsys.readouterr().out.splitlines()
    assert f"cycles of 2 of 3 distinct GEMMs are from {measured}" in out
    bound = "the memory bounds 1 of 3 passes, 98.6% of the compute time"
    assert (bound in out) == (model == "roofline")


def test_nothing_is_simulated_that_the_file_has(tmp_path: Path) -> None:
    """The stand-in takes M + 2 K + 3 N cycles."""
    mnk = write_table(tmp_path / "t.csv", "a,8,4,6", "b,8,4,6")
    fake = fake_v2(tmp_path / "fake", SLOW.format(seconds=0))
    write_cycles(tmp_path, "8,4,6,77", "6,4,8,99", header="M,N,K,cycles")
    flags = [f"--mnk={mnk}", f"--scalesim_path={fake}", "--num_npus=1"]
    result = without_progress(run(tmp_path, *flags, "--gemm_cycles=measured.csv"))
    assert (result.status, result.err) == (0, "")
    times = times_of((tmp_path / "workload.txt").read_text())
    assert times == [[77, 8 + 2 * 4 + 3 * 6, 99]] * 2
    assert "(1 simulated, 0 from the cache)" in result.out
    assert f"cycles of 2 of 3 distinct GEMMs are from {tmp_path}/measured.csv" in result.out
    reports = [path.name for path in (tmp_path / "outputs/DATA/t").glob("gemm_*")]
    assert reports == ["gemm_8x6x4"]
    write_cycles(tmp_path, "8,4,6,77", "6,4,8,99", "8,6,4,55", header="M,N,K,cycles")
    all_measured = run(tmp_path, *flags, "--gemm_cycles=measured.csv")
    assert (all_measured.status, all_measured.err, simulated(all_measured.out)) == (0, "", 0)


@pytest.mark.parametrize(
    "header",
    [
        "M,N,K,cycles",
        "m,n,k,Cycles",
        " K , cycles,M,N,",
        "layer,M,N,K,cycles,microseconds",
        "Type,K,N,M,cycles,count",
    ],
)
def test_columns_in_any_order_and_letter_case(header: str, tmp_path: Path) -> None:
    values = {"m": "8", "n": "4", "k": "6", "cycles": "77.0"}
    row = ",".join(values.get(name.strip().lower(), "") for name in header.split(","))
    measured = write_cycles(tmp_path, row, header=header)
    assert forward_cycles(tmp_path, measured, "a,8,4,6,,,") == [77]


def test_rows_that_are_no_gemms_are_skipped(tmp_path: Path) -> None:
    measured = write_cycles(
        tmp_path,
        *("GEMM,0,8,4,6,0", "GEMM,0,,,,", "EMBEDDING,1,16,4,6,5", "embedding,1,8,8,8,0"),
        "GEMM,1,8,4,6,77",
        header="type,count,M,N,K,cycles",
    )
    assert forward_cycles(tmp_path, measured, "a,8,4,6,,,", "b,16,4,6,,,") == [77, 765 + 16]


@pytest.mark.parametrize(
    ("rows", "header", "line", "error"),
    [
        *[
            pytest.param(
                ["8,4,6,5", f"8,4,7,{cycles}"],
                "M,N,K,cycles",
                3,
                f"cycles is '{cycles}', expected a whole number >= 1",
                id=f"{cycles} cycles",
            )
            for cycles in ("0", "-5", "2.5", "1e3", "many")
        ],
        *[
            pytest.param(
                [row],
                "M,N,K,cycles",
                2,
                f"{column} is '0', expected a whole number >= 1",
                id=f"no {column}",
            )
            for column, row in (("M", "0,4,6,5"), ("N", "8,0,6,5"), ("K", "8,4,0,5"))
        ],
        pytest.param(
            ["8,4,6,-1,5"],
            "M,N,K,count,cycles",
            2,
            "count is '-1', expected a whole number >= 0",
            id="a count of -1",
        ),
        pytest.param(
            ["8,4,6"],
            "M,N,K,cycles",
            2,
            "no cycles, expected M,N,K,cycles",
            id="a row that is too short",
        ),
        *[
            pytest.param(
                ["8,4,6,5"],
                "M,N,K,cycles".replace(column, "x"),
                1,
                f"no column {column}, expected M,N,K,cycles",
                id=f"no column {column}",
            )
            for column in ("M", "N", "K", "cycles")
        ],
        pytest.param(
            ["8,4,6,5,5"],
            "M,N,K,cycles,Cycles",
            1,
            "two columns cycles, expected one",
            id="two columns",
        ),
        pytest.param(
            ["8,4,6,5", "8,4,7,5", "8,4,6,5", "8,4,6,7"],
            "M,N,K,cycles",
            5,
            "7 cycles for 1 × 8x4x6, and 5 above, expected one value",
            id="two values",
        ),
        pytest.param(
            ["8,4,6,1,5", "8,4,6,3,15", "8,4,6,3,14"],
            "M,N,K,count,cycles",
            4,
            "14 cycles for 3 × 8x4x6, and 15 above, expected one value",
            id="two values of three GEMMs",
        ),
        pytest.param([], "", 1, "no column M, expected M,N,K,cycles", id="an empty file"),
    ],
)
def test_refused(rows: list[str], header: str, line: int, error: str, tmp_path: Path) -> None:
    measured = write_cycles(tmp_path, *rows, header=header)
    with pytest.raises(tool.UserError) as caught:
        tool.MeasuredCycles(measured)
    assert str(caught.value) == f"{measured}:{line}: {error}"


def test_an_error_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    measured = write_cycles(tmp_path, "8,4,6,0", header="M,N,K,cycles")
    before = state(tmp_path)
    result = run(tmp_path, FAST, f"--gemm_cycles={measured}")
    assert is_one_error_line(result)
    expected = "expected a whole number >= 1"
    assert result.err == f"error: {measured}:2: cycles is '0', {expected}\n"
    result = run(tmp_path, FAST, "--gemm_cycles=missing.csv")
    assert is_one_error_line(result)
    assert result.err == f"error: {tmp_path}/missing.csv: No such file or directory\n"
    assert state(tmp_path) == before


def test_a_file_that_has_none_of_the_gemms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = write_cycles(tmp_path, "6,8,4,6,5")
    assert forward_cycles(tmp_path, measured, "a,8,4,6,,,") == [765 + 8]
    out, err = capsys.readouterr()
    assert err == f"warning: {measured} has none of the GEMMs of this run\n"
    assert f"cycles of 0 of 1 distinct GEMM are from {measured}" in out.splitlines()


@pytest.mark.parametrize(
    "use", ["--output_file", "--summary_csv", "a file of the run folder", "a trace"]
)
def test_measured_cycles_are_not_overwritten(use: str, tmp_path: Path) -> None:
    (tmp_path / "outputs/DATA/run").mkdir(parents=True)
    name = "outputs/DATA/run/scalesim.cfg" if "run folder" in use else "x.1.et"
    measured = write_cycles(tmp_path, "1,8,4,6,5").rename(tmp_path / name)
    flags: dict[str, dict[str, Any]] = {
        "--output_file": {"output_file": measured},
        "--summary_csv": {"summary_csv": measured},
        "a file of the run folder": {},
        "a trace": {"chakra_et": tmp_path / "x", "clock_mhz": 1.0},
    }
    before = state(tmp_path)
    with pytest.raises(tool.UserError) as caught:
        run_inside(tmp_path, gemm_cycles=measured, **flags[use])
    expected = "expected another file for each"
    assert str(caught.value) == f"{measured} is --gemm_cycles and {use}, {expected}"
    assert state(tmp_path) == before


def test_this_runs_layers_csv_is_read_then_overwritten(tmp_path: Path) -> None:
    own = tmp_path / "outputs/DATA/run/layers.csv"
    own.parent.mkdir(parents=True)
    write_cycles(tmp_path, "1,8,4,6,55").rename(own)
    assert forward_cycles(tmp_path, own, "a,8,4,6,,,") == [55]
    (row,) = read_rows(own)
    assert (row["layer"], row["cycles"]) == ("a", "55")
    other = own.rename(tmp_path / "other.csv")
    (own.parent.parent / "link").symlink_to(own.parent)
    other.rename(own)
    through_link = own.parent.parent / "link/layers.csv"
    assert forward_cycles(tmp_path, through_link, "a,8,4,6,,,") == [55]


def test_the_summary_names_the_file(tmp_path: Path) -> None:
    measured = write_cycles(tmp_path, "1,8,4,6,55")
    forward_cycles(tmp_path, measured, "a,8,4,6,,,", summary_csv=tmp_path / "s.csv")
    (row,) = read_rows(tmp_path / "s.csv")
    assert (row["gemm_cycles"], row["cycle_model"]) == (str(measured), "analytical")
    assert row["compute_all"] == "55"


# --- Tables of one sample


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        pytest.param("a,8,4,6,,,", {"m": 40}, id="GEMM"),
        pytest.param("a,8,4,6,COLUMN_PARALLEL,,", {"m": 40}, id="COLUMN_PARALLEL"),
        pytest.param("a,8,4,6,ROW_PARALLEL,,", {"m": 40}, id="ROW_PARALLEL"),
        pytest.param(
            "a,8,4,6,BATCHED_GEMM,3x7,", {"samples": 15, "heads": 7}, id="samples x heads"
        ),
        pytest.param("a,8,4,6,BATCHED_GEMM,3,", {"products": 15}, id="a plain number"),
        pytest.param("a,8,4,6,BATCHED_GEMM,,", {"products": 5}, id="no number"),
        pytest.param("a,8,4,6,EXPERT_DOWN,3,", {"m": 40, "experts": 3}, id="experts"),
    ],
)
def test_a_minibatch_multiplies_what_is_of_one_sample(
    line: str, changed: dict[str, int], tmp_path: Path
) -> None:
    mnk = write_table(tmp_path / "t.csv", line, header=TYPED)
    (layer,) = layers_of_table(mnk, minibatch=5)
    found = layer._asdict()
    known = {"m": 8, "n": 4, "k": 6, "products": 1, "samples": 1, "heads": None, "experts": 1}
    known |= changed
    assert {name: found[name] for name in known} == known
    assert layer.input_elements == known["m"] * 6  # type: ignore[operator]
    assert layer.images is None


def test_a_minibatch_of_lookups_and_of_images(tmp_path: Path) -> None:
    lines = ["a,8,4,6,,,", "e,8,4,2,EMBEDDING,,", "t,8,4,6,,,"]
    mnk = write_table(tmp_path / "t.csv", *lines, header=TYPED)
    layers = layers_of_table(mnk, "HYBRID_DLRM", minibatch=5)
    assert [(layer.m, layer.n, layer.k) for layer in layers] == [(40, 4, 6), (40, 4, 2), (40, 4, 6)]
    header = "Layer,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Num Filter,Strides"
    write_table(tmp_path / "t.csv", "c,9,7,3,3,4,16,1", header=header)
    (layer,) = layers_of_table(mnk, minibatch=5)
    assert (layer.images, layer.m, layer.input_elements) == (5, 5 * 7 * 5, 5 * 9 * 7 * 4)


@pytest.mark.parametrize(
    ("minibatch", "title"),
    [
        (1, "DATA on 8 NPUs in 2 packages, dp 8 x mp 1"),
        (4096, "DATA on 8 NPUs in 2 packages, dp 8 x mp 1, minibatch 4,096"),
    ],
)
def test_the_title_says_the_minibatch(
    minibatch: int, title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_inside(tmp_path, num_npus=8, minibatch=minibatch)
    assert capsys.readouterr().out.splitlines()[0] == title


# One sample of 16 tokens, 4 heads; experts; 765 + M cycles on an array that is not filled.
SAMPLE = [
    *("qkv,16,48,16,COLUMN_PARALLEL,,", "scores,16,16,4,BATCHED_GEMM,1x4,"),
    *("out,16,16,16,ROW_PARALLEL,,", "u,32,32,16,EXPERT_UP,8,", "v,32,16,32,EXPERT_DOWN,8,"),
]


@pytest.mark.parametrize(
    ("parallel", "forward"),
    [
        # 4 samples on an NPU: m' = 64, 4 x 4 scores, 8 experts of 4 x 32 / 8 rows
        pytest.param("DATA", 2 * (765 + 64) + 16 * (765 + 16) + 2 * 8 * (765 + 16), id="DATA"),
        # 32 samples in a package: m' = 512, 32 scores, an expert of 32 x 32 / 8 rows
        pytest.param(
            "HYBRID_DATA_MODEL",
            2 * (765 + 512) + 32 * (765 + 16) + 2 * (765 + 128),
            id="HYBRID_DATA_MODEL",
        ),
    ],
)
@pytest.mark.parametrize("npus", [8, 32, 128])
def test_weak_scaling(parallel: str, forward: int, npus: int, tmp_path: Path) -> None:
    """Packages of 8 NPUs, 4 samples for each NPU: it computes the same in systems of any size."""
    mnk = write_table(tmp_path / "t.csv", *SAMPLE, header=TYPED)
    changes = {"num_npus": npus, "num_packages": npus // 8, "minibatch": 4 * npus}
    chosen = settings(tmp_path, mnk=mnk, parallel=parallel, **changes)
    plan = plan_of_table(chosen)
    workload_of(plan, chosen)  # which gives each GEMM its analytical cycles
    assert plan.total_times(chosen.text_clock)["forward"] == forward
