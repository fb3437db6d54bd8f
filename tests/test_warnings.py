"""What is warned of before it surprises: sizes beyond a reader, times beyond a unit, no home."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import (
    FAST,
    GOOD_REPORT,
    MNK_INPUTS,
    fake_v2,
    is_one_error_line,
    run,
    seen_on_a_terminal,
    write_table,
)

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
    assert warning.startswith(f"warning: {tmp_path}/t.csv:2: the {large} of a, ")
    assert warning.endswith(
        " bytes (1 such in all), too large for ASTRA-sim 1.0; ASTRA-sim 2.x runs it"
    )


def test_a_collective_of_one_member_is_never_too_large(tmp_path: Path) -> None:
    assert large_warnings(tmp_path, f"a,8,{LIMIT},8,", "DATA", 1, 1) == []


def test_gpt3_on_64_npus_has_large_collectives(tmp_path: Path) -> None:
    mnk = MNK_INPUTS / "gpt3_175b.csv"
    result = run(tmp_path, FAST, f"--mnk={mnk}", "--num_npus=64", "--parallel=MODEL", "--dry_run")
    (warning,) = [line for line in result.err.splitlines() if "too large" in line]
    assert warning.startswith(f"warning: {mnk}:2: the ALLREDUCE of block0_qkv, input gradient pass")
    assert "(384 such in all)" in warning


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        (["--time_unit=us"], "whole us"),
        (["--chakra_et=et/x"], "whole us, which are all that a trace holds,"),
        (["--chakra_et=et/x", "--time_unit=us"], "whole us, which are all that a trace holds,"),
        (["--chakra_et=et/x", "--time_unit=ns"], "whole us, which are all that a trace holds,"),
    ],
    ids=["text", "traces", "both in us", "text in ns"],
)
def test_rounding_is_warned_of_once_and_says_of_what(
    flags: list[str], precision: str, tmp_path: Path
) -> None:
    result = run(tmp_path, FAST, "--num_npus=16", "--num_packages=2", "--clock_mhz=700", *flags)
    assert result.err == (
        f"warning: rounding to {precision} moves the compute time of the weight gradient pass"
        " by +4.0%\n"
    )


@pytest.mark.parametrize("more", [[], [FAST], ["--dry_run"]], ids=["simulated", "formula", "dry"])
def test_no_home_is_no_error(more: list[str], tmp_path: Path) -> None:
    """A user whom the system does not know, as in some containers, has none."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nos.path.expanduser = lambda path: path  # as it is where there is no home\n"
    )
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    flags = [f"--mnk={table}", *([] if more == [FAST] else [f"--scalesim_path={fake}"])]
    env = {"XDG_CACHE_HOME": "", "PYTHONPATH": str(tmp_path)}
    result = run(tmp_path, *flags, *more, env=env, cache=True)
    assert result.status == 0
    assert "Traceback" not in result.err
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: there is no home folder: simulations are not cached"]
    assert not (tmp_path / "~").exists()


def test_an_output_that_is_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert is_one_error_line(run(tmp_path, FAST, "--output_file=a"))
    assert is_one_error_line(run(tmp_path, FAST, "--summary_csv=b"))


def test_a_run_says_what_it_simulates_also_where_nobody_watches(tmp_path: Path) -> None:
    fake = fake_v2(tmp_path / "fake", GOOD_REPORT)
    table = write_table(tmp_path / "t.csv", "a,8,16,24")
    flags = [
        f"--mnk={table}",
        f"--scalesim_path={fake}",
        "--num_npus=1",
        f"--cache_dir={tmp_path}/c",
    ]
    line = r"simulating: 3 GEMMs, \d+ s to \d+ s, up to \d\.\d GB of memory each"
    assert re.fullmatch(line + "\n", run(tmp_path, *flags).err)
    assert run(tmp_path, *flags).err == "", "nothing is left to simulate"
    assert re.match(line, seen_on_a_terminal(tmp_path, *flags[:3], "--cache_dir="))


def test_a_line_a_minute_where_there_is_no_terminal(tmp_path: Path) -> None:
    """The script's clock runs 40 s in each second."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nreal = time.monotonic\ntime.monotonic = lambda: 40 * real()\n"
    )
    fake = fake_v2(tmp_path / "fake", f"time.sleep(1)\n{GOOD_REPORT}")
    table = write_table(tmp_path / "t.csv", "a,8,16,24", "b,32,40,48")
    flags = [f"--mnk={table}", f"--scalesim_path={fake}", "--num_npus=1", "--jobs=1"]
    result = run(tmp_path, *flags, env={"PYTHONPATH": str(tmp_path)})
    assert result.status == 0
    first, *later = result.err.splitlines()
    assert first.startswith("simulating: 6 GEMMs, ")
    assert 2 <= len(later) <= 5
    for line in later:
        assert re.fullmatch(r"simulating: \d of 6 GEMMs are finished after \d+ (s|min)", line)


def test_a_dry_run_for_a_cluster_does_not_speak_of_this_machine(tmp_path: Path) -> None:
    result = run(tmp_path, "--dry_run", "--dask_scheduler=tcp://nowhere:1", "--num_npus=16")
    assert result.status == 0
    assert " free" not in result.out
    assert "time with a Dask worker for each of 11 GEMMs: " in result.out


def test_the_last_lines_say_all_that_was_written(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    (tmp_path / "link.txt").symlink_to("real.txt")
    flags = [f"--mnk={table}", "--num_npus=2", "--clock_mhz=1", "--chakra_et=deep/../et/x"]
    flags += ["--num_passes=3", "--summary_csv=s.csv", "--output_file=link.txt"]
    lines = run(tmp_path, FAST, *flags).out.splitlines()
    assert lines[0] == (
        "DATA on 2 NPUs in 1 package, dp 2 x mp 1; 256 x 256 array, ws, analytical, 1 MHz"
    )
    written, *others = lines[-4:]
    expected = f"wrote {tmp_path}/real.txt: 1 layer, 2 distinct GEMMs (analytical), "
    assert re.fullmatch(re.escape(expected) + r"\d+\.\d s", written)
    assert others == [
        f"wrote 2 traces of 3 training steps: {tmp_path}/et/x.<npu>.et",
        f"wrote a row in {tmp_path}/s.csv",
        f"wrote details in {tmp_path}/outputs/DATA/t",
    ]


def test_a_dry_run_warns_of_rounding_in_traces_too(tmp_path: Path) -> None:
    flags = [FAST, "--num_npus=16", "--num_packages=2", "--clock_mhz=700", "--chakra_et=et/x"]
    dry, real = run(tmp_path, *flags, "--dry_run"), run(tmp_path, *flags)
    assert "all that a trace holds" in dry.err
    assert dry.err == real.err
