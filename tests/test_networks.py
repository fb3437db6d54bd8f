"""The tables of real networks: their published sizes, and that they run."""

from __future__ import annotations

from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import MNK_INPUTS, settings, shards_of

LLAMA_BLOCK = (
    2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
)  # q and output, k and v of 8 heads, gated MLP
WEIGHTS = {
    "resnet50": 25_502_912,
    "bert_large": 24 * 12 * 1024**2,
    "gpt3_175b": 96 * 12 * 12288**2,
    "llama3_70b": 80 * LLAMA_BLOCK + 128256 * 8192,
    "dlrm": 13 * 512 + 2 * 512 * 512 + 512 * 16 + 1040 * 512 + 2 * 512 * 512,
}


def layers_of(name: str) -> list[tool.Layer]:
    return tool.read_layers(MNK_INPUTS / f"{name}.csv", "DATA", 256 if name == "resnet50" else 1)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_as_published(name: str) -> None:
    assert sum(layer.n * layer.k for layer in layers_of(name)) == WEIGHTS[name]


def test_llama_is_the_published_model_with_its_embedding_and_normalisations() -> None:
    layers = layers_of("llama3_70b")
    weights = sum(layer.n * layer.k for layer in layers)
    output, blocks = layers[-1], len({layer.name.split("_")[0] for layer in layers[:-1]})
    assert weights + output.n * output.k + (2 * blocks + 1) * output.k == 70_553_706_496


def test_resnet_multiply_accumulates() -> None:
    """4.09 G an image, as torchvision states for its ResNet-50."""
    assert (
        sum(layer.m * layer.n * layer.k for layer in layers_of("resnet50")) // 256 == 4_089_184_256
    )


def test_every_layer_of_a_network_has_the_same_minibatch() -> None:
    assert {layer.m for layer in layers_of("bert_large")} == {32 * 512}
    assert {layer.m for layer in layers_of("gpt3_175b")} == {1536 * 2048}
    assert {layer.m for layer in layers_of("llama3_70b")} == {512 * 8192}
    assert {layer.m for layer in layers_of("dlrm")} == {16 * 128}


def test_dlrm_communicates_as_in_astrasims_own_file(tmp_path: Path) -> None:
    """DLRM_HybridParallel.txt of ASTRA-sim: the bytes of the weight gradients."""
    sizes = [shards_of(layer, settings(tmp_path))[2].bytes for layer in layers_of("dlrm")]
    assert sizes == [13312, 524288, 524288, 16384, 1064960, 524288, 524288]


@pytest.mark.parametrize("name", WEIGHTS)
def test_they_run_on_1024_npus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    minibatch = 256 if name == "resnet50" else 1
    mnk = MNK_INPUTS / f"{name}.csv"
    tool.generate(settings(tmp_path, mnk=mnk, num_npus=1024, num_packages=128, minibatch=minibatch))
    assert (tmp_path / "workload.txt").read_text().count("\n") == len(layers_of(name)) + 2
