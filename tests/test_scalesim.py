"""SCALE-Sim: the real releases, a stand-in for v1, and stand-ins for whatever can go wrong."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import (
    FAST,
    GOOD_REPORT,
    MNK_INPUTS,
    SCRIPT,
    Run,
    accelerator_of,
    fake_v1,
    fake_v2,
    is_one_error_line,
    read_like_astrasim,
    run,
    write_config,
    write_table,
)
from processes import simulated, without_progress

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
    before = {}
    if version != "installed":
        folder = release(version)
        flags.append(f"--scalesim_path={folder}")
        before = files_of(folder)
    result = without_progress(run(tmp_path, *flags))
    assert (result.status, result.err, simulated(result.out)) == (0, "", 11)
    assert (tmp_path / "new/folders/w.txt").read_text() == CHECK_VALUE.replace(" ", "\t")
    assert "11 distinct GEMMs (11 simulated, 0 from the cache)" in result.out
    reports = list((tmp_path / "outputs/DATA/example").glob("gemm_*/COMPUTE_REPORT.csv"))
    assert len(reports) == 11
    assert "gemm_64x128x512" in {report.parent.name for report in reports}
    log = reports[0].with_name("scalesim.log").read_text()
    assert "SCALE SIM Run Complete" in log
    assert "Saving traces" not in log
    if version != "installed":
        assert files_of(folder) == before, "the SCALE-Sim folder was written to"


@pytest.mark.parametrize("version", ["2.0", "2.0.1", "2.0.2", "2.0.2/scalesim", "installed"])
@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_every_release_gives_the_analytical_cycles(
    version: str, dataflow: str, tmp_path: Path, release: Release
) -> None:
    table = write_table(tmp_path / "t.csv", *ROWS)
    (tmp_path / "small.cfg").write_text(
        SMALL_CONFIG.replace("Dataflow: ws", f"Dataflow: {dataflow}")
    )
    flags = [f"--mnk={table}", "--scalesim_config=small.cfg", "--num_npus=12", "--num_packages=3"]
    flags += ["--datatype_size=4", "--parallel=HYBRID_MODEL_DATA"]
    number, _, package = version.partition("/")
    path = [] if version == "installed" else [f"--scalesim_path={release(number) / package}"]
    assert run(tmp_path, *flags, *path, "--output_file=simulated.txt").status == 0
    assert run(tmp_path, *flags, FAST, "--output_file=analytical.txt").status == 0
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
    # M + 2 K + 3 N cycles for M x N x K of 64 x 128 x 512, 64 x 512 x 128 and 512 x 128 x 64
    assert [first[2], first[5], first[8]] == ["1472", "1856", "1024"]
    reports = tmp_path / f"outputs/{strategy}/example_customized/gemm_64x128x512"
    assert sorted(path.name for path in reports.iterdir()) == ["gemm_cycles.csv", "scalesim.log"]
    assert not list(tmp_path.rglob("pwned"))


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    """Its run_name, with a shell command and climbing out, and its topology are left out."""
    config = SMALL_CONFIG.replace(
        "run_name = gemm", 'run_name = "../../x; touch pwned"\n# 100 % mine'
    )
    config += "[network_presets]\nTopologyCsvLoc: missing\n"
    (tmp_path / "my own.cfg").write_text(config)
    table = write_table(tmp_path / "t.csv", "a,20,10,30")
    flags = [f"--mnk={table}", "--scalesim_config=my own.cfg", "--num_npus=1"]
    result = without_progress(run(tmp_path, *flags))
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / "outputs/DATA/t/scalesim.cfg").read_text() == config
    assert not list(tmp_path.rglob("pwned")) + list(tmp_path.rglob("x"))


def without(*keys: str) -> str:
    """Return the built-in config without lines that begin so."""
    lines = tool.BUILT_IN_CONFIG.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(keys))


def with_value(key: str, value: str) -> str:
    """Return the small config with another value of a key."""
    lines = SMALL_CONFIG.splitlines(keepends=True)
    replaced = [f"{key}: {value}\n" if line.startswith(f"{key}:") else line for line in lines]
    assert replaced != lines
    return "".join(replaced)


def with_line(section: str, line: str) -> str:
    """Return the small config with another line in a section, which may be new."""
    header = f"[{section}]\n"
    if header in SMALL_CONFIG:
        return SMALL_CONFIG.replace(header, f"{header}{line}\n")
    return f"{SMALL_CONFIG}{header}{line}\n"


BAD_CONFIGS = [
    pytest.param(
        "", "no ArrayHeight in [architecture_presets], expected one", id="an empty config"
    ),
    pytest.param(
        without("ArrayWidth"), "no ArrayWidth in [architecture_presets], expected", id="no width"
    ),
    pytest.param(
        without("Dataflow"), "no Dataflow in [architecture_presets], expected", id="no dataflow"
    ),
    pytest.param("ArrayHeight: 8\n", "File contains no section headers", id="no sections"),
    pytest.param("[a]\nb\n", "contains parsing errors", id="a key without a value"),
    pytest.param("\xff\x00", "not UTF-8, perhaps UTF-16 or a spreadsheet, ", id="a binary file"),
    pytest.param(
        with_value("ArrayWidth", "eight"),
        "ArrayWidth is 'eight', expected a whole number >= 1",
        id="a width that is a word",
    ),
    pytest.param(
        with_value("ArrayHeight", "8,64"),
        "ArrayHeight is '8,64', expected a whole number >= 1",
        id="a range of heights",
    ),
    pytest.param(
        with_value("ArrayWidth", "0"), "ArrayWidth is '0', expected a whole", id="no columns"
    ),
    pytest.param(
        with_value("Dataflow", "xs"),
        "Dataflow is 'xs', expected os, ws or is",
        id="an unknown dataflow",
    ),
    pytest.param(
        with_value("Bandwidth", "10,x"),
        "Bandwidth is '10,x', expected a whole number >= 1",
        id="a bandwidth that is a word",
    ),
    pytest.param(
        with_value("InterfaceBandwidth", "BOTH"),
        "InterfaceBandwidth is 'BOTH', expected CALC or USER",
        id="an unknown mode",
    ),
    pytest.param(
        with_value("IfmapCustomLayout", "True"),
        "IfmapCustomLayout is 'True', expected False: the layout is a file for one GEMM",
        id="a layout of ifmaps",
    ),
    pytest.param(
        with_value("FilterCustomLayout", "1"),
        "FilterCustomLayout is '1', expected False: the layout is a file for one GEMM",
        id="a layout of filters",
    ),
    pytest.param(
        with_value("UseRamulatorTrace", "True"),
        "UseRamulatorTrace is 'True', expected False: the traces are files for one GEMM",
        id="traces of Ramulator",
    ),
    pytest.param(
        with_value("UseRamulatorTrace", "maybe"),
        "UseRamulatorTrace is 'maybe', expected False",
        id="a switch that is a word",
    ),
    pytest.param(
        with_value("SparsitySupport", "true"),
        "SparsitySupport is 'true', expected False: it would prune gradients too, which are dense",
        id="sparsity",
    ),
    pytest.param(
        with_value("SparsitySupport", "true\nOptimizedMapping: true"),
        "SparsitySupport is 'true', expected False",
        id="sparsity of rows",
    ),
    pytest.param(
        with_value("MemoryBanks", "2"),
        "MemoryBanks is '2', expected 1: the memory map of others is a file for one GEMM",
        id="banks of the memory",
    ),
    pytest.param(
        with_line("run_presets", "Bandwidth: 3"),
        "Bandwidth belongs in [architecture_presets], not [run_presets]",
        id="a key in another section",
    ),
    pytest.param(
        with_line("run_preset", "InterfaceBandwidth: USER"),
        "InterfaceBandwidth belongs in [run_presets], not [run_preset]",
        id="a key in an unknown section",
    ),
    pytest.param(
        with_line("layout", "ARRAYHEIGHT: 8"),
        "ArrayHeight belongs in [architecture_presets], not [layout]",
        id="a key in another section, in another letter case",
    ),
    pytest.param(
        without("ArrayWidth").replace("ArrayHeight", "ArrayWdith: 8\nArrayHeight"),
        "no ArrayWidth in [architecture_presets], expected one, as it decides the cycles",
        id="a width with a slip",
    ),
]


def check_refusal(folder: Path, config: str, message: str, *flags: str) -> None:
    """Check that a config is refused in one line before anything is written."""
    path = folder / "c.cfg"
    path.write_text(config, encoding="latin-1")
    (folder / "workload.txt").write_text("mine")
    result = run(folder, f"--scalesim_config={path}", *flags)
    assert is_one_error_line(result), result
    error = result.err.splitlines()[-1]  # after a warning of keys that nobody knows
    where = f"{path}:1" if message.startswith("not UTF-8") else path
    assert error.startswith(f"error: {where}: ")
    assert message in error
    assert {each.name for each in folder.iterdir()} == {"c.cfg", "workload.txt"}
    assert (folder / "workload.txt").read_text() == "mine"


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_a_config_that_does_not_serve_is_refused_at_once(
    config: str, message: str, tmp_path: Path
) -> None:
    check_refusal(tmp_path, config, message)


@pytest.mark.parametrize("flag", [FAST, "--dry_run"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("IfmapCustomLayout", "True"),
        ("UseRamulatorTrace", "True"),
        ("SparsitySupport", "true"),
        ("MemoryBanks", "2"),
        ("ArrayHeight", "8,64"),
        ("ArrayWidth", "0"),
        ("Dataflow", "rs"),
    ],
)
def test_a_config_is_refused_also_where_scalesim_does_not_run(
    key: str, value: str, flag: str, tmp_path: Path
) -> None:
    check_refusal(tmp_path, with_value(key, value), f"{key} is '{value}', expected ", flag)


@pytest.mark.parametrize("key", ["Bandwidth", "IfmapSramSzkB", "FilterSramSzkB", "OfmapSramSzkB"])
@pytest.mark.parametrize("flags", [[], [FAST], ["--dry_run"]], ids=["simulated", "formula", "dry"])
def test_under_user_a_config_gives_the_bandwidth_and_the_srams(
    flags: list[str], key: str, tmp_path: Path
) -> None:
    """They decide how long the array waits for the memory."""
    lines = SMALL_CONFIG.replace("CALC", "USER").splitlines(keepends=True)
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    lacking = "".join(other for other in lines if other != line)
    missing = f"no {key} in [architecture_presets], expected one, as it decides the cycles"
    check_refusal(tmp_path, lacking, missing, *flags)
    for value in ("0", "x", "1.5", "-4"):
        (tmp_path / "c.cfg").write_text("".join(lines).replace(line, f"{key}: {value}\n"))
        with pytest.raises(tool.UserError) as error:
            accelerator_of(tmp_path / "c.cfg")
        expected = f"{key} is '{value}', expected a whole number >= 1"
        assert str(error.value) == f"{tmp_path}/c.cfg: {expected}"


@pytest.mark.parametrize("key", ["IfmapSramSzkB", "FilterSramSzkB", "OfmapSramSzkB"])
def test_without_waits_the_srams_are_let_be(key: str, tmp_path: Path) -> None:
    """They change no cycles then."""
    (tmp_path / "c.cfg").write_text(with_value(key, "x"))
    result = run(tmp_path, FAST, "--scalesim_config=c.cfg")
    assert (result.status, result.err) == (0, "")


def test_the_network_of_a_config_is_let_be(tmp_path: Path) -> None:
    """SCALE-Sim's own configs have it, and 3.0.0 stops at it."""
    (tmp_path / "c.cfg").write_text(with_line("network_presets", "TopologyCsvLoc: missing"))
    result = run(tmp_path, FAST, "--scalesim_config=c.cfg")
    assert (result.status, result.err) == (0, "")
    assert "network_presets" not in accelerator_of(tmp_path / "c.cfg").merged_config


def unknown_keys(config: Path, names: str) -> str:
    """Return the warning of keys that nobody knows here."""
    what = f"{config}: keys unknown here are passed on to SCALE-Sim: {names}"
    return f"warning: {what}; only cycles are read from its results\n"


@pytest.mark.parametrize("flag", [FAST, "--dry_run"])
@pytest.mark.parametrize(
    ("section", "lines", "names"),
    [
        pytest.param(
            "memory_map_files", "ifmap: x.csv", "[memory_map_files] ifmap", id="a memory map"
        ),
        pytest.param(
            "architecture_presets",
            "Bandwith: 3",
            "[architecture_presets] Bandwith (did you mean Bandwidth?)",
            id="a key with a slip",
        ),
        pytest.param(
            "run_presets",
            "bandwith: 5",
            "[run_presets] bandwith (did you mean Bandwidth?)",
            id="a key with a slip in another section",
        ),
        pytest.param("sparsity", "Colour: red", "[sparsity] Colour", id="an unknown key"),
        pytest.param("run_preset", "Colour: red", "[run_preset] Colour", id="an unknown section"),
        pytest.param("DEFAULT", "Colour: red", "[DEFAULT] Colour", id="DEFAULT"),
        pytest.param(
            "architecture_presets",
            "MemoryMap: none\nOnChipMemoryBanks: 4",
            "[architecture_presets] MemoryMap, [architecture_presets] OnChipMemoryBanks",
            id="two keys of other SCALE-Sims",
        ),
    ],
)
def test_keys_that_nobody_knows_get_one_warning(
    section: str, lines: str, names: str, flag: str, tmp_path: Path
) -> None:
    (tmp_path / "c.cfg").write_text(with_line(section, lines))
    result = run(tmp_path, flag, "--scalesim_config=c.cfg")
    assert (result.status, result.err) == (0, unknown_keys(tmp_path / "c.cfg", names))


TIME_MODEL = """\
[architecture_presets]
ArrayHeight: 128
ArrayWidth: 128
Dataflow: ws
Bandwidth: 1024
IfmapSramSzkB: 4096
FilterSramSzkB: 4096
OfmapSramSzkB: 8192
[run_presets]
InterfaceBandwidth: USER
TimeLinearModel: TPUv4
"""


def test_a_config_for_a_later_scalesim(tmp_path: Path) -> None:
    """Its key reaches whatever SCALE-Sim there is, which reads it or not, with one warning."""
    config = tmp_path / "time_model.cfg"
    config.write_text(TIME_MODEL)
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    flags = [f"--mnk={table}", f"--scalesim_config={config}", "--num_npus=1"]
    warning = unknown_keys(config, "[run_presets] TimeLinearModel")
    result = without_progress(run(tmp_path, *flags))
    assert (result.status, result.err) == (0, warning)
    _, (layer,) = read_like_astrasim((tmp_path / "workload.txt").read_text())
    assert layer.passes[0][0] == 3 * 128 + 8 - 2 - 1, "without stalls, as it all fits"
    reads = "word = [line for line in open('gemm.cfg') if line.startswith('timelinear')]"
    fake = fake_v2(tmp_path / "later", f"{reads}\nprint(word)\n{GOOD_REPORT}")
    result = without_progress(run(tmp_path, *flags, f"--scalesim_path={fake}"))
    assert (result.status, result.err) == (0, warning)
    log = tmp_path / "outputs/DATA/t/gemm_8x8x8/scalesim.log"
    assert log.read_text() == "['timelinearmodel = TPUv4\\n']\n"


@pytest.mark.parametrize(
    ("version", "config"),
    [
        ("installed", without("UseRamulatorTrace")),
        ("installed", without("IfmapSramSzkB", "SparsitySupport")),
        ("installed", without("IfmapSramSz:", "MemoryBanks")),
        ("installed", without("Bandwidth", "IfmapSramSzkB", "Filter", "IfmapOffset", "Interface")),
        ("2.0.2", without("UseRamulatorTrace", "MemoryBanks", "IfmapSRAMBank", "FilterC")),
        ("2.0.2", without("InterfaceBandwidth")),
        ("2.0", without("MemoryBanks")),
    ],
)
def test_what_a_config_lacks_comes_from_the_built_in_one(
    version: str, config: str, tmp_path: Path, release: Release
) -> None:
    (tmp_path / "c.cfg").write_text(config)
    table = write_table(tmp_path / "t.csv", "a,8,4,4")
    path = [] if version == "installed" else [f"--scalesim_path={release(version)}"]
    flags = [f"--mnk={table}", "--scalesim_config=c.cfg", "--num_npus=1", *path]
    result = without_progress(run(tmp_path, *flags))
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / "workload.txt").read_text().split("\n")[2].split("\t")[2] == "773"


def bound_by_memory(bandwidth: int) -> str:
    """Return a config of an 8 x 8 array with small SRAMs, whose cycles the bandwidth decides."""
    return f"""\
[architecture_presets]
ArrayHeight: 8
ArrayWidth: 8
Dataflow: ws
IfmapSramSzkB: 1
FilterSramSzkB: 1
OfmapSramSzkB: 1
Bandwidth: {bandwidth}
[run_presets]
InterfaceBandwidth: USER
"""


@pytest.mark.parametrize(
    ("version", "bandwidth", "cycles"),
    [
        ("2.0.2", 64, 5503),
        ("installed", 64, 5503),
        ("2.0.2", 1, 45688),
        ("installed", 1, 45949),
    ],
)
def test_under_user_each_release_reads_at_the_configs_own_bandwidth(
    version: str, bandwidth: int, cycles: int, tmp_path: Path, release: Release
) -> None:
    (tmp_path / "c.cfg").write_text(bound_by_memory(bandwidth))
    table = write_table(tmp_path / "t.csv", "a,64,64,64")
    path = [] if version == "installed" else [f"--scalesim_path={release(version)}"]
    flags = [f"--mnk={table}", "--scalesim_config=c.cfg", "--num_npus=1", *path]
    result = run(tmp_path, *flags)
    assert result.status == 0, result
    assert "BankBandwidth" not in result.err
    first = (tmp_path / "workload.txt").read_text().split("\n")[2].split("\t")
    assert first[2] == str(cycles)


def test_under_user_a_bandwidth_of_the_banks_is_kept(tmp_path: Path) -> None:
    given = bound_by_memory(64) + "[layout]\nFilterSRAMBankBandwidth: 8\nFilterSRAMBankNum: 2\n"
    (tmp_path / "c.cfg").write_text(given)
    text = accelerator_of(tmp_path / "c.cfg").merged_config
    for line in (
        "ifmapsrambankbandwidth = 64",
        "ifmapsrambanknum = 1",
        "filtersrambankbandwidth = 8",
        "filtersrambanknum = 2",
    ):
        assert f"\n{line}\n" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param("sys.exit(3)", "exit status 3; no output; log:", id="exits 1"),
        pytest.param(
            "print('Exiting'); sys.exit(0)", f"{NO_ROW}; its last output: Exiting", id="0"
        ),
        pytest.param(
            f"{GOOD_REPORT}\nraise ValueError('half\\nway')",
            "exit status 1; its last output: raise ValueError",
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
            "os.kill(os.getpid(), 11)", "killed, Segmentation fault; no", id="segmentation fault"
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
    result = without_progress(run(tmp_path, f"--scalesim_path={fake}", f"--mnk={table}"))
    assert is_one_error_line(result), result
    assert result.err.startswith("error: SCALE-Sim failed on GEMM ")
    assert re.search(r" \(the (forward|(input|weight) gradient) pass of deep\): ", result.err)
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
    """A package scalesim that only this script's path leads to is the one that runs."""
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
        tool.ScaleSim(None, accelerator_of())


def test_the_code_decides_which_scalesim_it_is(tmp_path: Path) -> None:
    array = accelerator_of()
    first = tool.ScaleSim(fake_v2(tmp_path / "a", GOOD_REPORT), array)
    same = tool.ScaleSim(fake_v2(tmp_path / "b", GOOD_REPORT), array)
    other = tool.ScaleSim(fake_v2(tmp_path / "c", f"{GOOD_REPORT}  # another"), array)
    assert first.digest == same.digest
    assert first.digest != other.digest


def test_the_code_in_its_subfolders_decides_which_scalesim_it_is(tmp_path: Path) -> None:
    """Most of SCALE-Sim's code stands in scalesim/compute and scalesim/memory."""
    folder = fake_v2(tmp_path / "a", GOOD_REPORT)
    array = accelerator_of()
    without_any = tool.ScaleSim(folder, array).digest
    code = folder / "scalesim/memory/buffers/buffer.py"
    code.parent.mkdir(parents=True)
    code.write_text("size = 1\n")
    first = tool.ScaleSim(folder, array).digest
    code.write_text("size = 2\n")
    second = tool.ScaleSim(folder, array).digest
    assert len({without_any, first, second}) == 3


def test_the_config_decides_which_scalesim_it_is(tmp_path: Path) -> None:
    folder = fake_v2(tmp_path / "a", GOOD_REPORT)
    digests = set()
    for height in (8, 16):
        array = accelerator_of(write_config(tmp_path / "c.cfg", height, 8, "os"))
        digests.add(tool.ScaleSim(folder, array).digest)
    assert len(digests) == 2


def test_a_scalesim_that_changes_during_a_run_is_refused(tmp_path: Path) -> None:
    first = tool.ScaleSim(fake_v2(tmp_path / "a", GOOD_REPORT), accelerator_of())
    assert first.version == "2"
    (tmp_path / "a/scalesim/layout_utils.py").write_text("")
    expected = f"the SCALE-Sim in {tmp_path}/a is not the one that this run began with"
    with pytest.raises(tool.UserError) as error:
        first.simulate(tool.Gemm(m=1, n=1, k=1))
    assert str(error.value) == expected
    assert tool.ScaleSim(tmp_path / "a", accelerator_of()).version == "3"


def test_names_of_the_user_never_reach_scalesim(tmp_path: Path) -> None:
    """It sees the same few names, however a table, a layer, a run or a folder is called."""
    fake = fake_v2(
        tmp_path / "a b'c;$(d)\u00e9",
        f"print(sorted(os.listdir('.')), self.topology)\n{GOOD_REPORT}",
    )
    odd = tmp_path / "x y;$(touch z)'\u00e9"
    odd.mkdir()
    table = write_table(odd / "t $(touch z).csv", "`touch z`;DP_sram,8,4,4")
    output = odd / "o $(touch z);'\u00e9.txt"
    flags = [f"--mnk={table}", f"--scalesim_path={fake}", f"--output_file={output}"]
    result = run(odd, *flags, "--run_name=r $(touch z)")
    assert result.status == 0, result
    logs = [path.read_text().strip() for path in odd.rglob("scalesim.log")]
    assert set(logs) == {"['gemm.cfg', 'gemm.csv', 'layout.csv', 'scalesim.log'] gemm.csv"}
    assert output.is_file()
    assert not os.path.lexists(odd / "z")


def test_under_user_a_bandwidth_of_banks_needs_no_number_of_them(tmp_path: Path) -> None:
    config = tmp_path / "c.cfg"
    config.write_text(bound_by_memory(64) + "[layout]\nIfmapSRAMBankBandwidth: 33\n")
    table = write_table(tmp_path / "t.csv", "a,8,8,8")
    flags = [f"--mnk={table}", f"--scalesim_config={config}", "--num_npus=1"]
    assert run(tmp_path, *flags).status == 0


# --- What counts as cycles in a report: a whole number >= 1


def run_with_report(folder: Path, cycles: str) -> Run:
    """Run a SCALE-Sim that reports these cycles."""
    fake = fake_v2(folder / "fake", f"report(HEADER + '0, {cycles}, 0, 1.5,\\n')")
    table = write_table(folder / "t.csv", "a,8,8,8")
    return run(folder, f"--mnk={table}", f"--scalesim_path={fake}", "--num_npus=1")


@pytest.mark.parametrize("cycles", ["321", "321.0", " 321.0 ", "1", "1.0"])
def test_whole_numbers_in_a_report(cycles: str, tmp_path: Path) -> None:
    assert run_with_report(tmp_path, cycles).status == 0
    _, (layer,) = read_like_astrasim((tmp_path / "workload.txt").read_text())
    assert {time for time, _, _ in layer.passes} == {round(float(cycles))}


@pytest.mark.parametrize("cycles", ["0", "0.0", "-1", "1.5", "321.00", "1e3", "nan", "", "x"])
def test_what_is_no_whole_number_from_one_on_is_refused(cycles: str, tmp_path: Path) -> None:
    result = run_with_report(tmp_path, cycles)
    lines = result.err.splitlines()
    assert (result.status, result.out) == (1, "")
    assert "no COMPUTE_REPORT.csv with one row and a number >= 1 as Total Cycles" in lines[-1]
    assert lines[-1].startswith("error: SCALE-Sim failed on GEMM 8x8x8 (the forward pass of a): ")
    assert not (tmp_path / "workload.txt").exists()
