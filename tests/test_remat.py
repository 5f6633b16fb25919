"""Blocks that are run again: the same relevance in a fraction of the memory."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from jaxlrp.remat import find_blocks, own_blocks
from jaxlrp.transform import Setup


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        for i in range(6):
            x = block(name=f"block{i}")(x)
        return nn.Dense(3)(x.mean(1))


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        for _ in range(4):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
            x = nn.relu(x + nn.Conv(8, (3, 3), feature_group_count=8)(y))
        return nn.Dense(3)(nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))


def prepared(model, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    return model.init(jax.random.key(1), x), x


def temporary(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


barriers = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="XLA of old takes barriers away before it fuses operations"
)

CASES = {
    "transformer": (Transformer(), (4, 32, 16), jaxlrp.AttnLRP()),
    "z+": (Convolutional(), (2, 16, 16, 3), jaxlrp.EpsilonPlusFlat()),
    "alpha-beta": (Convolutional(), (2, 16, 16, 3), jaxlrp.EpsilonAlpha2Beta1()),
    "gamma": (Convolutional(), (2, 16, 16, 3), jaxlrp.EpsilonGammaBox(-3.0, 3.0)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_relevance_is_the_same(case):
    model, shape, composite = case
    params, x = prepared(model, shape)
    kept = jax.jit(jaxlrp.lrp(model, composite, target=1))(params, x)
    again = jax.jit(jaxlrp.lrp(model, composite, target=1, remat=True))(params, x)
    np.testing.assert_allclose(again, kept, atol=1e-5 * float(jnp.abs(kept).max()))
    assert len({*find_blocks(*_traced(model, params, x)).values()}) > 1


def _traced(model, params, x):
    traced = Setup(model, None, None).traced((params, x), {})
    return traced.main, traced.layers


@pytest.mark.heavy
@pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="XLA of jax 0.10 merges both runs of a block on the CPU, those of jax.grad with nn.remat as well",
)
def test_memory_is_a_fraction():
    params, x = prepared(Transformer(), (8, 64, 16))
    composite = jaxlrp.AttnLRP()
    kept = temporary(jaxlrp.lrp(Transformer(), composite), params, x)
    assert temporary(jaxlrp.lrp(Transformer(), composite, remat=True), params, x) < 0.5 * kept
    assert temporary(jaxlrp.lrp(Transformer(remat=True), composite), params, x) < 0.5 * kept


def test_the_models_own_checkpoints_are_respected():
    params, x = prepared(Transformer(), (2, 8, 16))
    composite = jaxlrp.AttnLRP()
    want = jaxlrp.lrp(Transformer(), composite)(params, x)
    np.testing.assert_allclose(jaxlrp.lrp(Transformer(remat=True), composite)(params, x), want, atol=1e-5)


def test_no_layer_is_cut_apart_and_nothing_is_in_two_blocks():
    params, x = prepared(Transformer(), (2, 8, 16))
    main, layers = _traced(Transformer(), params, x)
    blocks = find_blocks(main, layers)
    assert all(len({blocks[e] for e in layer.equations}) == 1 for layer in layers)
    assert [e for block in dict.fromkeys(blocks.values()) for e in block.equations] == list(main.equations)
    assert not own_blocks(main)
    marked, _ = _traced(Transformer(remat=True), params, x)
    assert len({*own_blocks(marked).values()}) == 6


@pytest.mark.heavy
def test_many_targets_ledger_capture_and_derivatives():
    model = Convolutional()
    params, x = prepared(model, (1, 8, 8, 3))
    composite = jaxlrp.EpsilonPlus()

    def every(remat):
        output, pull = jaxlrp.lrp_vjp(model, params, x, composite=composite, remat=remat)
        return jax.vmap(pull)(jnp.eye(3)[:, None] * output)

    np.testing.assert_allclose(every(True), every(False), atol=1e-5)
    account = jaxlrp.ledger(model, composite, remat=True)(params, x)
    account.check(rtol=1e-4)
    _, captured = jaxlrp.layerwise_lrp(model, composite, remat=True)(params, x)
    _, want = jaxlrp.layerwise_lrp(model, composite)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), captured, want)
    slope = lambda remat: jax.grad(lambda x: jnp.square(jaxlrp.lrp(model, composite, remat=remat)(params, x)).sum())(x)  # noqa: E731
    np.testing.assert_allclose(slope(True), slope(False), rtol=1e-3, atol=1e-4 * float(jnp.abs(slope(False)).max()))


class Depthwise(nn.Module):
    """No convolution here is one that XLA runs as such: what waits must not wait for the head alone."""

    blocks: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.blocks):
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def attention(x, w):
    for _ in range(16):
        x = x + jax.nn.softmax(x @ x.swapaxes(1, 2) / 6) @ jnp.tanh(x)
    return x.mean(1) @ w


@barriers
def test_blocks_without_weights_wait_for_their_turn():
    x, w = jax.random.normal(jax.random.key(0), (2, 64, 32)), jnp.ones((32, 3))
    plain, again = (temporary(jaxlrp.lrp(attention, jaxlrp.Epsilon(), remat=r), x, w) for r in (False, True))
    assert again < 0.4 * plain


@barriers
def test_runs_for_rules_wait_for_relevance_where_no_product_is_near():
    params, x = prepared(Depthwise(12), (2, 32, 32, 8))
    needed = temporary(jaxlrp.lrp(Depthwise(12), jaxlrp.ZPlus()), params, x)
    kept = 12 * x.size * 4  # what the layers read
    assert needed < 1.5 * kept
