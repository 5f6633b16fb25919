"""Flax weights for the torch networks of benchmarks/peers.py; what torch makes of them, the script itself compares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks, peers_weights
from jaxlrp.models.llama import Llama, LlamaConfig, params_from_hf


def zeros(module: Any, x: jax.Array) -> Any:
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)


def test_all_of_resnet50_is_moved():
    tensors = peers_weights.resnet50(zeros(networks.ResNet50(), jnp.zeros((1, 224, 224, 3))))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    learned = {name: a for name, a in tensors.items() if not name.endswith(statistics)}
    assert sum(a.size for a in learned.values()) == 25_557_032  # as torchvision documents
    assert tensors["conv1.weight"].shape == (64, 3, 7, 7)
    assert tensors["layer2.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert tensors["layer4.2.bn3.running_var"].shape == (2048,)


def test_all_of_a_vision_transformer_is_moved():
    variables = zeros(networks.ViT(layers=1, width=24, heads=3), jnp.zeros((1, 224, 224, 3)))
    tensors = peers_weights.vit(variables)
    assert sum(a.size for a in tensors.values()) == sum(a.size for a in jax.tree.leaves(variables))
    assert tensors["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"].shape == (72, 24)


def test_llama_comes_back():
    config = LlamaConfig(11, 8, 2, 2, 1, 12)
    rng = np.random.default_rng(0)
    blank = zeros(Llama(config), jnp.zeros((1, 3), jnp.int32))
    variables = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), blank)
    again = params_from_hf(peers_weights.llama(variables), config)
    jax.tree.map(np.testing.assert_array_equal, again, dict(variables))


def test_dense_layer_reads_what_it_read_with_channels_first():
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(2, 3, 4)), rng.normal(size=(24, 5))
    moved = peers_weights.channels_first(kernel, 2, 3)
    np.testing.assert_allclose(image.transpose(2, 0, 1).ravel() @ moved, image.ravel() @ kernel, rtol=1e-12)


def test_nothing_trivial_is_left():
    ones, none = jnp.ones(50), jnp.zeros(50)
    variables = {"params": {"scale": ones, "bias": none}, "batch_stats": {"mean": none, "var": ones}}
    found = peers_weights.randomised(variables, 1.0)
    for leaf in jax.tree.leaves(found):
        assert len(np.unique(leaf)) == 50
    assert float(found["batch_stats"]["var"].min()) > 0
    jax.tree.map(np.testing.assert_array_equal, found, peers_weights.randomised(variables, 1.0))
