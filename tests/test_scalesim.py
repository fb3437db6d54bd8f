"""SCALE-Sim: the real releases, a stand-in for v1's command line, and stand-ins for whatever can go wrong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    GOOD_REPORT,
    MNK_INPUTS,
    SCRIPT,
    fake_v1,
    fake_v2,
    is_one_error_line,
    run,
    write_table,
)

# Public, astra-sim issue 45: example.csv, DATA, 16 NPUs in 2 packages, size 2.
CHECK_VALUE = """\
DATA
7
MLP_Bottom_0 -1 1659 NONE 0 1659 NONE 0 1277 ALLREDUCE 131072 100
MLP_Bottom_1 -1 3319 NONE 0 3319 NONE 0 2555 ALLREDUCE 524288 100
MLP_Bottom_2 -1 3319 NONE 0 3319 NONE 0 2555 ALLREDUCE 524288 100
MLP_Bottom_3 -1 1659 NONE 0 1659 NONE 0 1563 ALLREDUCE 16384 100
MLP_Top_0 -1 6639 NONE 0 6639 NONE 0 5111 ALLREDUCE 1048576 100
MLP_Top_1 -1 3319 NONE 0 3319 NONE 0 2555 ALLREDUCE 524288 100
MLP_Top_2 -1 3319 NONE 0 3319 NONE 0 2555 ALLREDUCE 524288 100
"""
SMALL_CONFIG = tool.BUILT_IN_CONFIG.replace("Height: 256", "Height: 16").replace(
    "Width: 256", "Width: 8"
)
ROWS = ("a,20,10,30", "b,9,33,8")
NO_ROW = "no COMPUTE_REPORT.csv with one row and a number >= 1 as Total Cycles"
Release = Callable[[str], Path]


def files_of(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("version", ["installed", "2.0.2"])
def test_the_published_check_value(version: str, tmp_path: Path, release: Release) -> None:
    flags = ["--num_npus=16", "--num_packages=2", "--output_file=new/folders/w.txt"]
    if version != "installed":
        folder = release(version)
        flags.append(f"--scalesim_path={folder}")
        before = files_of(folder)
    result = run(tmp_path, *flags)
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / "new/folders/w.txt").read_text() == CHECK_VALUE.replace(" ", "\t")
    assert "11 distinct GEMMs (11 simulated, 0 from the cache)" in result.out
    reports = {
        path.parent.name
        for path in (tmp_path / "outputs/DATA/example").glob("gemm_*/COMPUTE_REPORT.csv")
    }
    assert len(reports) == 11
    assert "gemm_64x128x512" in reports
    logs = list((tmp_path / "outputs/DATA/example").glob("gemm_*/scalesim.log"))
    assert "SCALE SIM Run Complete" in logs[0].read_text()
    assert "Saving traces" not in logs[0].read_text()
    if version != "installed":
        assert files_of(folder) == before, "the SCALE-Sim folder was written to"


@pytest.mark.parametrize("version", ["2.0", "2.0.1", "2.0.2", "2.0.2/scalesim", "installed"])
@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_every_release_gives_the_analytical_cycles(
    version: str, dataflow: str, tmp_path: Path, release: Release
) -> None:
    """Every token of the file: releases and the formula agree where there are no stalls."""
    table = write_table(tmp_path / "t.csv", *ROWS)
    (tmp_path / "small.cfg").write_text(
        SMALL_CONFIG.replace("Dataflow: ws", f"Dataflow: {dataflow}")
    )
    flags = [f"--mnk={table}", "--scalesim_config=small.cfg", "--num_npus=12", "--num_packages=3"]
    flags += ["--datatype_size=4", "--parallel=HYBRID_MODEL_DATA"]
    number, _, package = version.partition("/")
    path = [] if version == "installed" else [f"--scalesim_path={release(number) / package}"]
    assert run(tmp_path, *flags, *path, "--output_file=simulated.txt").status == 0
    assert (
        run(tmp_path, *flags, "--cycle_model=analytical", "--output_file=analytical.txt").status
        == 0
    )
    assert (tmp_path / "simulated.txt").read_bytes() == (tmp_path / "analytical.txt").read_bytes()


@pytest.mark.parametrize("strategy", ["DATA", "HYBRID_CUSTOMIZED"])
def test_v1_by_its_command_line(strategy: str, tmp_path: Path) -> None:
    folder = fake_v1(tmp_path / "SCALE Sim; $(touch pwned)")
    before = files_of(folder)
    flags = [
        f"--scalesim_path={folder}",
        f"--mnk={MNK_INPUTS}/example_customized.csv",
        f"--parallel={strategy}",
    ]
    result = run(tmp_path, *flags, "--num_npus=16", "--num_packages=2", "--shard_rounding=down")
    assert (result.status, files_of(folder)) == (0, before)
    first = (tmp_path / "workload.txt").read_text().split("\n")[2].split("\t")
    # M x N x K is 64 x 128 x 512, 64 x 512 x 128 and 512 x 128 x 64, M + 2 K + 3 N the stand-in's cycles
    assert [first[2], first[5], first[8]] == ["1472", "1856", "1024"]
    reports = tmp_path / f"outputs/{strategy}/example_customized/gemm_64x128x512"
    assert sorted(path.name for path in reports.iterdir()) == ["gemm_cycles.csv", "scalesim.log"]
    assert not list(tmp_path.rglob("pwned"))


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    """Its run_name (quoted, with a shell command, climbing out) and its topology section have no effect."""
    config = SMALL_CONFIG.replace(
        "run_name = gemm", 'run_name = "../../x; touch pwned"\n# 100 % mine'
    )
    config += "[network_presets]\nTopologyCsvLoc: missing\n"
    (tmp_path / "my own.cfg").write_text(config)
    table = write_table(tmp_path / "t.csv", "a,20,10,30")
    result = run(tmp_path, f"--mnk={table}", "--scalesim_config=my own.cfg", "--num_npus=1")
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / "outputs/DATA/t/scalesim.cfg").read_text() == config
    assert not list(tmp_path.rglob("pwned")) + list(tmp_path.rglob("x"))


def without(key: str) -> str:
    return "".join(
        line for line in tool.BUILT_IN_CONFIG.splitlines(True) if not line.startswith(key)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(
            "",
            "ArrayHeight, ArrayWidth, Dataflow are ['', '', ''], expected numbers >= 1, and os, ws or is",
            id="empty",
        ),
        pytest.param(without("ArrayHeight"), "are ['', '256', 'ws'], expected", id="no height"),
        pytest.param(
            SMALL_CONFIG.replace("8", "eight"), "are ['16', 'eight', 'ws'], expected", id="word"
        ),
        pytest.param(
            SMALL_CONFIG.replace("ws", "xs"), "are ['16', '8', 'xs'], expected", id="dataflow"
        ),
        pytest.param("ArrayHeight: 8\n", "File contains no section headers", id="no sections"),
        pytest.param("[a]\nb\n", "contains parsing errors", id="no value"),
        pytest.param("\xff\x00", ", expected a SCALE-Sim config", id="binary"),
        pytest.param(
            SMALL_CONFIG.replace("IfmapCustomLayout: False", "IfmapCustomLayout: True"),
            "a custom layout is on, which is for one GEMM, expected none",
            id="layout on",
        ),
        pytest.param(
            SMALL_CONFIG.replace("Kb: 6144", "kB: x").replace("6144", "x"),
            "invalid literal",
            id="no number",
        ),
        pytest.param(
            SMALL_CONFIG.replace("CALC", "BOTH"),
            "InterfaceBandwidth is 'BOTH', expected CALC or USER",
            id="bandwidth",
        ),
        pytest.param(
            SMALL_CONFIG.replace("Height: 16", "Height: 8,64"),
            "are ['8,64', '8', 'ws']",
            id="range",
        ),
        pytest.param(
            SMALL_CONFIG.replace("Support: false", "Support: true\nOptimizedMapping: false"),
            "SparsitySupport is true, expected false, or SCALE-Sim and OptimizedMapping: true",
            id="sparsity",
        ),
    ],
)
def test_a_config_that_does_not_serve(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.cfg").write_text(config, encoding="latin-1")
    (tmp_path / "workload.txt").write_text("mine")
    result = run(tmp_path, "--scalesim_config=c.cfg", "--jobs=1")
    assert is_one_error_line(result), result
    assert message in result.err
    assert (tmp_path / "workload.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("version", "config", "lacking"),
    [
        ("installed", without("UseRamulatorTrace"), "useramulatortrace"),
        (
            "installed",
            without("IfmapSramSzkB").replace("SparsitySupport: false\n", ""),
            "ifmapsramszkb, sparsitysupport",
        ),
        ("installed", without("IfmapSramSz:").replace("MemoryBanks: 1\n", ""), ""),
        (
            "2.0.2",
            without("UseRamulatorTrace")
            .replace("[layout]", "[other]")
            .replace("MemoryBanks: 1\n", ""),
            "",
        ),
        ("2.0.2", without("InterfaceBandwidth"), "interfacebandwidth"),
        ("2.0", without("MemoryBanks"), "memorybanks"),
    ],
)
def test_what_a_config_lacks_comes_from_the_built_in_one(
    version: str, config: str, lacking: str, tmp_path: Path, release: Release
) -> None:
    (tmp_path / "c.cfg").write_text(config)
    table = write_table(tmp_path / "t.csv", "a,8,4,4")
    path = [] if version == "installed" else [f"--scalesim_path={release(version)}"]
    result = run(tmp_path, f"--mnk={table}", "--scalesim_config=c.cfg", "--num_npus=1", *path)
    warning = f"warning: --scalesim_config lacks {lacking}, which this SCALE-Sim reads: taken from the built-in config\n"
    assert (result.status, result.err) == (0, warning if lacking else "")
    assert (tmp_path / "workload.txt").read_text().split("\n")[2].split("\t")[2] == "773"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param("sys.exit(3)", "exit status 3; it last said: nothing; log:", id="exits 1"),
        pytest.param("print('Exiting'); sys.exit(0)", f"{NO_ROW}; it last said: Exiting", id="0"),
        pytest.param(
            f"{GOOD_REPORT}\nraise ValueError('half\\nway')",
            "exit status 1; it last said: raise ValueError",
            id="late",
        ),
        pytest.param("raise MemoryError('x')", "MemoryError: x; log:", id="memory"),
        pytest.param(
            "raise MemoryError('x')",
            "(out of memory? fewer --jobs may help, or --cycle",
            id="memory hint",
        ),
        pytest.param("os.kill(os.getpid(), 9)", "killed, Killed (out of memory?", id="killed"),
        pytest.param(
            "os.kill(os.getpid(), 11)", "killed, Segmentation fault; it", id="segmentation fault"
        ),
        pytest.param("report('')", NO_ROW, id="empty"),
        pytest.param("report('LayerID, Cycles,\\n0, 5,\\n')", NO_ROW, id="other columns"),
        pytest.param("report(HEADER)", NO_ROW, id="no rows"),
        pytest.param("report(HEADER + '0, 32')", NO_ROW, id="half a line"),
        pytest.param("report(HEADER + '0, 3, 0, 1,\\n1, 3, 0, 1,\\n')", NO_ROW, id="two rows"),
        pytest.param("report(HEADER + '0, nan, 0, 1,\\n')", NO_ROW, id="nan"),
        pytest.param("report(HEADER + '0, -7, 0, 1,\\n')", NO_ROW, id="negative"),
        pytest.param("report(HEADER + '0, 0, 0, 1,\\n')", NO_ROW, id="zero"),
        pytest.param("report(HEADER + '0, 7.5, 0, 1,\\n')", NO_ROW, id="7.5"),
        pytest.param("report('\"a\\x00,')", NO_ROW, id="binary"),
    ],
)
def test_a_scalesim_that_fails(body: str, message: str, tmp_path: Path) -> None:
    fake = fake_v2(tmp_path / "fake", body)
    (tmp_path / "workload.txt").write_text("mine")
    table = write_table(tmp_path / "t.csv", "deep,64,32,16")
    result = run(tmp_path, f"--scalesim_path={fake}", f"--mnk={table}")
    assert is_one_error_line(result), result
    assert result.err.startswith("error: SCALE-Sim failed on GEMM ")
    assert "(layer deep, " in result.err
    assert message in result.err
    log = result.err.rstrip().rpartition("log: ")[2]
    assert Path(log).is_file()
    assert log.startswith(f"{tmp_path}/outputs/DATA/t/gemm_")
    assert (tmp_path / "workload.txt").read_text() == "mine"


def test_only_files_are_collected(tmp_path: Path) -> None:
    """A named pipe among the reports would be waited at for ever."""
    fake = fake_v2(tmp_path / "fake", f"{GOOD_REPORT}\nos.mkfifo(top_path + '/gemm/PIPE.csv')")
    table = write_table(tmp_path / "t.csv", "a,8,4,4")
    assert run(tmp_path, f"--scalesim_path={fake}", f"--mnk={table}").status == 0


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_scalesim_folder_that_is_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "there"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    result = run(tmp_path, f"--scalesim_path={path}")
    expected = "expected scale.py and run_nets.py, or scalesim/"
    assert (result.status, result.err) == (1, f"error: no SCALE-Sim in {path}, {expected}\n")


def test_what_runs_is_what_was_found(tmp_path: Path) -> None:
    """A package scalesim that only this script's path leads to is the one that runs, under its own cache key."""
    fake = fake_v2(tmp_path / "here", GOOD_REPORT)
    script = tmp_path / "here" / "script.py"
    script.write_text(SCRIPT.read_text())
    table = write_table(tmp_path / "t.csv", "a,8,4,4")
    command = [sys.executable, str(script), f"--mnk={table}", "--cache_dir="]
    subprocess.run(command, cwd=fake, check=True, capture_output=True)
    assert (fake / "workload.txt").read_text().split("\n")[2].split("\t")[2] == "321"


def test_scalesim_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tool.UserError, match=r"^no SCALE-Sim in /.*, expected scale.py and"):
        tool.find_scalesim(None, "")


def test_the_code_decides_which_scalesim_it_is(tmp_path: Path) -> None:
    first = tool.find_scalesim(fake_v2(tmp_path / "a", GOOD_REPORT), "")
    same = tool.find_scalesim(fake_v2(tmp_path / "b", GOOD_REPORT), "")
    other = tool.find_scalesim(fake_v2(tmp_path / "c", GOOD_REPORT + "  # another"), "")
    assert (first.version, first.digest == same.digest, first.digest == other.digest) == (
        2,
        True,
        False,
    )
    (tmp_path / "a" / "scalesim" / "layout_utils.py").write_text("")
    with pytest.raises(
        tool.UserError, match=f"^the SCALE-Sim in {tmp_path}/a is not the one that this run began"
    ):
        tool.simulate(first, tool.Gemm(1, 1, 1))
    assert tool.find_scalesim(tmp_path / "a", "").version == 3


def test_names_of_the_user_never_reach_scalesim(tmp_path: Path) -> None:
    """SCALE-Sim sees the same few names in its folder, however a table, a layer, a run or a folder is called."""
    fake = fake_v2(
        tmp_path / "a b'c;$(d)\u00e9",
        f"print(sorted(os.listdir('.')), self.topology)\n{GOOD_REPORT}",
    )
    odd = tmp_path / "x y;$(touch z)'\u00e9"
    odd.mkdir()
    table = write_table(odd / "t $(touch z).csv", "`touch z`;DP_sram,8,4,4")
    output = odd / "o $(touch z);'\u00e9.txt"
    result = run(
        odd,
        f"--mnk={table}",
        f"--scalesim_path={fake}",
        f"--output_file={output}",
        "--run_name=r $(touch z)",
    )
    assert result.status == 0, result
    logs = [path.read_text().strip() for path in odd.rglob("scalesim.log")]
    assert set(logs) == {"['gemm.cfg', 'gemm.csv', 'layout.csv', 'scalesim.log'] gemm.csv"}
    assert output.is_file()
    assert not os.path.lexists(odd / "z")
