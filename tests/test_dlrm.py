"""HYBRID_DLRM: the embedding's lookups and ALLTOALLs, in the text file and in traces."""

from __future__ import annotations

from pathlib import Path

import pytest

import chakra_reader
from helpers import FAST, MNK_INPUTS, generate, is_one_error_line, run, summary_of, write_table

HEADER = "Layer,m,n,k,Type,Count"
DLRM = {"mnk": MNK_INPUTS / "dlrm.csv", "parallel": "HYBRID_DLRM"}
# ASTRA-sim's own inputs/workload/DLRM_HybridParallel.txt, without its times.
PUBLIC = """\
HYBRID_DLRM 4
8
Embedding -1 ALLTOALL 98304 ALLTOALL 98304 NONE 0
MLP_Bottom_0 -1 NONE 0 NONE 0 ALLREDUCE 13312
MLP_Bottom_1 -1 NONE 0 NONE 0 ALLREDUCE 524288
MLP_Bottom_2 -1 NONE 0 NONE 0 ALLREDUCE 524288
MLP_Bottom_3 -1 NONE 0 NONE 0 ALLREDUCE 16384
MLP_Top_0 -1 NONE 0 NONE 0 ALLREDUCE 1064960
MLP_Top_1 -1 NONE 0 NONE 0 ALLREDUCE 524288
MLP_Top_2 -1 NONE 0 NONE 0 ALLREDUCE 524288
"""


def test_every_collective_of_the_public_file(tmp_path: Path) -> None:
    first, count, *layers = generate(tmp_path, **DLRM).splitlines()
    written = [first.replace("\t", " "), count]
    for layer in layers:
        words = layer.split("\t")
        assert len(words) == 12
        written.append(" ".join([*words[:2], *words[3:5], *words[6:8], *words[9:11]]))
    assert "\n".join(written) + "\n" == PUBLIC


@pytest.mark.parametrize(
    ("bandwidth", "times"),
    [
        # 2048 samples x 24 columns of an NPU x 1 look-up, and twice that for the update
        pytest.param("10", (4916, 0, 9831), id="10 elements a cycle"),
        pytest.param("7,100", (7022, 0, 14044), id="the first of several"),
        pytest.param("49152", (1, 0, 2), id="1 cycle"),
        pytest.param("98305", (1, 0, 1), id="never 0 cycles for what is looked up"),
    ],
)
def test_lookups_are_bound_by_the_bandwidth(
    bandwidth: str, times: tuple[int, int, int], tmp_path: Path
) -> None:
    config = tmp_path / "c.cfg"
    array = "ArrayHeight: 8\nArrayWidth: 8\nDataflow: os\n"
    config.write_text(f"[architecture_presets]\n{array}Bandwidth: {bandwidth}\n")
    words = generate(tmp_path, **DLRM, scalesim_config=config).splitlines()[2].split("\t")
    assert (words[0], *map(int, words[2::3][:3])) == ("Embedding", *times)


def test_a_bandwidth_that_nobody_chose_is_warned_of_once(tmp_path: Path) -> None:
    flags = [FAST, f"--mnk={DLRM['mnk']}", "--parallel=hybrid_dlrm", "--num_npus=16"]
    warning = (
        "warning: Embedding: lookups are timed at 10 elements a cycle, the built-in Bandwidth,"
        " far below HBM; give Bandwidth in a --scalesim_config\n"
    )
    assert run(tmp_path, *flags).err == warning
    config = "[architecture_presets]\nArrayHeight: 8\nArrayWidth: 8\nDataflow: os\n"
    (tmp_path / "c.cfg").write_text(config)
    assert run(tmp_path, *flags, "--scalesim_config=c.cfg").err == warning
    (tmp_path / "c.cfg").write_text(f"{config}Bandwidth: 10\n")
    assert run(tmp_path, *flags, "--scalesim_config=c.cfg").err == ""


def test_lookups_are_not_simulated_and_keep_the_tables_order(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "t.csv",
        *("bottom,16,8,8,,", "emb,16,32,3,EMBEDDING,", "mix,9,9,8,BATCHED_GEMM,16", "top,16,8,8,,"),
        header=HEADER,
    )
    flags = [f"--mnk={table}", "--parallel=HYBRID_DLRM", "--num_npus=4", "--cache_dir=c"]
    result = run(tmp_path, *flags)
    assert result.status == 0
    gemms = {path.stem for path in (tmp_path / "c").rglob("*.json")}
    assert gemms == {"4x8x8", "8x8x4", "9x9x8", "9x8x9", "8x9x9"}
    folder = tmp_path / "outputs/HYBRID_DLRM/t"
    for name in ("fwd_pass", "inp_grad", "weight_grad"):
        names = [row.split(",")[0] for row in (folder / f"t_{name}.csv").read_text().splitlines()]
        assert names == ["layer name", "bottom", "mix", "top"]
    rows = (folder / "layers.csv").read_text().splitlines()[4:7]
    assert rows == [
        "emb,EMBEDDING,MODEL,1,4,forward,1,16,8,3,39,ALLTOALL,256,4,192",
        "emb,EMBEDDING,MODEL,1,4,input gradient,1,16,8,3,0,ALLTOALL,256,4,192",
        "emb,EMBEDDING,MODEL,1,4,weight gradient,1,16,8,3,77,NONE,0,1,0",
    ]
    labels = result.out.splitlines()[3:15:4]
    assert labels == ["bottom × 2", "emb", "mix"]
    assert "16x8x3 lookups" in result.out
    lines = (tmp_path / "workload.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        *("HYBRID_DLRM", "4", "emb", "bottom", "mix", "top")
    ]
    assert lines[0] == "HYBRID_DLRM\t1"


def test_a_summary_counts_the_alltoalls(tmp_path: Path) -> None:
    row = summary_of(tmp_path, **DLRM)
    assert (row["alltoall_count"], row["alltoall_bytes"]) == ("2", "196608")
    assert (row["allreduce_count"], row["distinct_gemms"]) == ("7", "11")
    reduced = [13312, 524288, 524288, 16384, 1064960, 524288, 524288]
    sent = 2 * (98304 * 15 // 16) + sum(2 * size * 15 // 16 for size in reduced)
    assert row["sent_bytes"] == str(sent)


# Each node, and after which it comes: a bottom layer, the embedding, two top layers.
GRAPH = """
e forward: -
e forward ALLTOALL: e forward
b forward: e forward
t forward: b forward, e forward ALLTOALL
u forward: t forward
u weight gradient: u forward
u weight gradient ALLREDUCE: u weight gradient
u input gradient: u weight gradient
t weight gradient: u input gradient
t weight gradient ALLREDUCE: t weight gradient
t input gradient: t weight gradient
e input gradient ALLTOALL: t input gradient
b weight gradient: t input gradient
b weight gradient ALLREDUCE: b weight gradient
b input gradient: b weight gradient
e weight gradient: b input gradient, e input gradient ALLTOALL
e forward: e weight gradient
e forward ALLTOALL: e forward
b forward: b weight gradient ALLREDUCE, e forward
t forward: b forward, e forward ALLTOALL, t weight gradient ALLREDUCE
u forward: t forward, u weight gradient ALLREDUCE
"""


def test_one_step_and_the_next_ones_forward_pass(tmp_path: Path) -> None:
    rows = ("b,64,64,64,,", "e,64,64,1,EMBEDDING,", "t,64,64,64,,", "u,64,64,64,,")
    table = write_table(tmp_path / "t.csv", *rows, header=HEADER)
    text, nodes = chakra_reader.generate(tmp_path, mnk=table, parallel="HYBRID_DLRM", num_passes=2)
    expected = GRAPH.strip().splitlines()
    assert chakra_reader.graph_lines(nodes)[: len(expected)] == expected
    exchanges = [node.collective for node in nodes if "ALLTOALL" in node.name]
    assert exchanges == [chakra_reader.Collective(6, 512, (True, True))] * 4
    assert text.startswith("HYBRID_DLRM\t1\n4\ne\t-1\t")


@pytest.mark.parametrize(("npus", "packages"), [(16, 1), (16, 16), (1, 1)])
def test_other_networks(npus: int, packages: int, tmp_path: Path) -> None:
    system = {"num_npus": npus, "num_packages": packages}
    text, nodes = chakra_reader.generate(tmp_path, **DLRM, **system)
    assert text.startswith("HYBRID_DLRM\t4\n8\nEmbedding\t")
    collectives = [node.collective for node in nodes if node.collective]
    assert len(collectives) == (0 if npus == 1 else 9)
    assert {collective.involved_dim for collective in collectives} <= {(True,)}


def test_parallel_layers_are_plain_layers_there(tmp_path: Path) -> None:
    rows = "b,64,64,64,{},|e,64,64,1,EMBEDDING,|t,64,64,64,{},"
    written = set()
    for first, second in (("", ""), ("COLUMN_PARALLEL", "ROW_PARALLEL")):
        table = write_table(
            tmp_path / "t.csv", *rows.format(first, second).split("|"), header=HEADER
        )
        written.add(generate(tmp_path, mnk=table, parallel="HYBRID_DLRM"))
    assert len(written) == 1


MLP, EMBEDDING = "a,64,64,64,,", "e,64,64,1,EMBEDDING,"


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        pytest.param(
            [MLP], 1, "no layer of type EMBEDDING, expected one for HYBRID_DLRM", id="none"
        ),
        pytest.param(
            [MLP, EMBEDDING, MLP, EMBEDDING, MLP], 5, "only one EMBEDDING is allowed", id="two"
        ),
        pytest.param([EMBEDDING, MLP], 2, "EMBEDDING at an end of the table, expected", id="first"),
        pytest.param([MLP, EMBEDDING], 3, "EMBEDDING at an end of the table, expected", id="last"),
        pytest.param([EMBEDDING], 2, "EMBEDDING at an end of the table, expected", id="alone"),
        pytest.param(
            [MLP, "e,1,7,1,EMBEDDING,", MLP],
            3,
            "the ALLTOALL of the forward pass of e is 0 bytes; ASTRA-sim would stop without",
            id="fewer bytes than NPUs",
        ),
    ],
)
def test_refused(rows: list[str], line: int, message: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", *rows, header=HEADER)
    flags = [FAST, f"--mnk={table}", "--parallel=HYBRID_DLRM", "--num_npus=16"]
    result = run(tmp_path, *flags, "--datatype_size=1")
    assert is_one_error_line(result), result
    assert f"error: {table}:{line}: {message}" in result.err


@pytest.mark.parametrize("parallel", ["DATA", "MODEL", "HYBRID_MODEL_DATA", "HYBRID_CUSTOMIZED"])
def test_an_embedding_under_another_strategy_is_refused(parallel: str, tmp_path: Path) -> None:
    rows = ("a,64,64,64,,DATA", "e,64,64,1,EMBEDDING,DATA", "b,64,64,64,,DATA")
    header = "Layer,m,n,k,Type,CustomizedParallelization"
    table = write_table(tmp_path / "t.csv", *rows, header=header)
    result = run(tmp_path, FAST, f"--mnk={table}", f"--parallel={parallel}")
    assert is_one_error_line(result), result
    assert result.err.endswith(f"error: {table}:3: type EMBEDDING needs --parallel=HYBRID_DLRM\n")


def test_a_layer_has_no_strategy_hybrid_dlrm(tmp_path: Path) -> None:
    header = "Layer,m,n,k,CustomizedParallelization"
    table = write_table(tmp_path / "t.csv", "a,64,64,64,HYBRID_DLRM", header=header)
    result = run(tmp_path, FAST, f"--mnk={table}", "--parallel=HYBRID_CUSTOMIZED")
    assert is_one_error_line(result)
    assert f"error: {table}:2: strategy 'HYBRID_DLRM', expected one of DATA, MODEL," in result.err


def test_fewer_outputs_than_npus(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", MLP, "e,64,8,1,EMBEDDING,", MLP, header=HEADER)
    result = run(tmp_path, FAST, f"--mnk={table}", "--parallel=HYBRID_DLRM", "--num_npus=16")
    assert result.status == 0
    assert (
        "warning: e: n = 8 is less than 16, so that some have none, one NPU is timed with 1\n"
        in result.err
    )
