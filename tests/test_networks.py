"""The tables of real networks: their published sizes, and that they run."""

from __future__ import annotations

from pathlib import Path

import pytest

import gen_astrasim_workload_input as tool
from helpers import MNK_INPUTS, collectives_of, generate, layers_of_table, plan_of, settings

# q and output, k and v of 8 heads, gated MLP
LLAMA_BLOCK = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
WEIGHTS = {
    "resnet50": 25_502_912,
    "bert_large": 24 * 12 * 1024**2,
    "gpt3_175b": 96 * 12 * 12288**2,
    "llama3_70b": 80 * LLAMA_BLOCK + 128256 * 8192,
    "dlrm": 13 * 512 + 2 * 512 * 512 + 512 * 16 + 1040 * 512 + 2 * 512 * 512,
}
# Samples, tokens of each, heads, and elements of a head.
ATTENTION = {
    "bert_large": (32, 512, 16, 64),
    "gpt3_175b": (1536, 2048, 96, 128),
    "llama3_70b": (512, 8192, 64, 128),
}
MINIBATCHES = {"resnet50": 256}


def parallel_of(name: str) -> str:
    return "HYBRID_DLRM" if name == "dlrm" else "DATA"


def layers_of(name: str) -> list[tool.Layer]:
    mnk = MNK_INPUTS / f"{name}.csv"
    return layers_of_table(mnk, parallel_of(name), MINIBATCHES.get(name, 1))


def with_weights(name: str) -> list[tool.Layer]:
    """Return the layers whose n x k are weights: no products of activations, no lookups."""
    return [each for each in layers_of(name) if each.type not in ("BATCHED_GEMM", "EMBEDDING")]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_as_published(name: str) -> None:
    assert sum(layer.n * layer.k for layer in with_weights(name)) == WEIGHTS[name]


def test_llama_is_the_published_model_with_its_embedding_and_normalisations() -> None:
    layers = with_weights("llama3_70b")
    weights = sum(layer.n * layer.k for layer in layers)
    output, blocks = layers[-1], len({layer.name.split("_")[0] for layer in layers[:-1]})
    assert weights + output.n * output.k + (2 * blocks + 1) * output.k == 70_553_706_496


def test_resnet_multiply_accumulates() -> None:
    """4.09 G an image, as torchvision states for its ResNet-50."""
    macs = sum(layer.m * layer.n * layer.k for layer in layers_of("resnet50"))
    assert macs // 256 == 4_089_184_256


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("bert_large", 32 * 512),
        ("gpt3_175b", 1536 * 2048),
        ("llama3_70b", 512 * 8192),
        ("dlrm", 16 * 128),
    ],
)
def test_every_layer_of_a_network_has_the_same_minibatch(name: str, rows: int) -> None:
    assert {layer.m for layer in with_weights(name)} == {rows}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_every_block(name: str) -> None:
    """Scores and context for each sample and head, of all its tokens."""
    samples, tokens, heads, size = ATTENTION[name]
    products = [layer for layer in layers_of(name) if layer.type == "BATCHED_GEMM"]
    outputs = [each for each in layers_of(name) if each.name.endswith("_attention_out")]
    assert {(layer.samples, layer.heads) for layer in products} == {(samples, heads)}
    shapes = [(layer.m, layer.n, layer.k) for layer in products]
    assert shapes == [(tokens, tokens, size), (tokens, size, tokens)] * len(outputs)
    assert {(layer.m, layer.k) for layer in outputs} == {(samples * tokens, heads * size)}


def test_dlrm_communicates_as_in_astrasims_own_file(tmp_path: Path) -> None:
    """DLRM_HybridParallel.txt of ASTRA-sim: the bytes of the weight gradients."""
    plans = [plan_of(layer, settings(tmp_path)) for layer in with_weights("dlrm")]
    weight_gradients = [collectives_of(plan)[2] for plan in plans]
    sizes = [13312, 524288, 524288, 16384, 1064960, 524288, 524288]
    assert weight_gradients == [("ALLREDUCE", size) for size in sizes]


@pytest.mark.parametrize("name", WEIGHTS)
def test_they_run_on_1024_npus(name: str, tmp_path: Path) -> None:
    system = {"num_npus": 1024, "num_packages": 128, "parallel": parallel_of(name)}
    mnk, minibatch = MNK_INPUTS / f"{name}.csv", MINIBATCHES.get(name, 1)
    text = generate(tmp_path, mnk=mnk, minibatch=minibatch, **system)
    assert text.count("\n") == len(layers_of(name)) + 2
