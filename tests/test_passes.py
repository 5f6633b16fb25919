"""How often the compiled programs pass over memory: how many arrays of full size are written, layer by layer."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxlrp

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="XLA of old takes barriers away before it fuses operations"
)

SHAPE = (2, 16, 16, 8)
ALIASES = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}


class Chain(nn.Module):
    """Convolutions, each with a relu behind it."""

    layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        return x.mean((1, 2))


class Residual(nn.Module):
    """A stream to which every block adds something."""

    blocks: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (1, 1))(x))
        for _ in range(self.blocks):
            y = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.relu(x + nn.Conv(8, (3, 3))(y))
        return x.mean((1, 2))


def instructions(model: nn.Module, composite: Any) -> list[str]:
    """Those of the whole program that make an array of full size."""
    x = jax.random.normal(jax.random.key(0), SHAPE)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    program: Callable[..., Any] = jaxlrp.lrp(model, composite)
    text = jax.jit(program).lower(variables, x).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    found = []
    for line in entry.splitlines():
        step = re.match(r"\s+(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if step and step[2] not in ALIASES and math.prod(map(int, step[1].split(","))) >= math.prod(SHAPE):
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("rule", "each"),
    [
        (jaxlrp.Epsilon(), 4),  # two products, the relu, and the quotient
        (jaxlrp.ZPlus(), 5),  # and the product with positive weights: relevance itself is never written
        (jaxlrp.Gamma(0.25), 5),
        (jaxlrp.AlphaBeta(2.0, 1.0), 8),  # four products, the relu, relevance, and two quotients of it
    ],
    ids=str,
)
def test_what_a_layer_writes(rule, each):
    composite = jaxlrp.Composite.uniform(rule)
    three, five = (len(instructions(Chain(n), composite)) for n in (3, 5))
    assert five - three == 2 * each


@pytest.mark.parametrize("rule", [jaxlrp.Epsilon(), jaxlrp.ZPlus(), jaxlrp.Gamma(0.25)], ids=str)
def test_a_residual_stream_is_added_up_once(rule):
    composite = jaxlrp.Composite.uniform(jaxlrp.Epsilon()).extend((jaxlrp.kind("linear"), rule))

    def reads(blocks: int) -> int:
        lines = instructions(Residual(blocks), composite)
        full = set(re.findall(r"^\s+(?:ROOT )?%(\S+) =", "\n".join(lines), re.MULTILINE))
        operands = (name for line in lines for name in re.findall(r"%([\w.-]+)", line.split("(", 1)[1]))
        return sum(name in full for name in operands)

    four, five, six = map(reads, (4, 5, 6))
    assert six - five == five - four


def test_angles_of_rotary_positions_are_computed_once():
    """Not for every sample and head that they turn, in every layer, and on the way back again."""
    wavelengths = jnp.arange(1.0, 5.0)

    def turn(x, positions):
        angles = jnp.concatenate([positions[:, None] / wavelengths] * 2, -1)
        x = x.reshape(2, 16, 2, 8)
        turned = jnp.concatenate([-x[..., 4:], x[..., :4]], -1)
        return (x * jnp.cos(angles)[:, None] + turned * jnp.sin(angles)[:, None]).reshape(2, 16, 16)

    def model(kernels, x):
        for w in kernels:
            x = turn(x @ w, jnp.arange(16.0))
        return x.sum(1)

    kernels, x = jnp.ones((3, 16, 16)), jnp.ones((2, 16, 16))
    explain = jaxlrp.lrp(model, jaxlrp.Composite.uniform(jaxlrp.Epsilon()), argnums=1)
    text = jax.jit(explain).lower(kernels, x).compile().as_text()
    assert collections.Counter(re.findall(r" (cosine|sine)\(", text)) == {"cosine": 1, "sine": 1}


def test_what_is_not_repeated_is_not_kept():
    """Elementwise functions of an input that is not explained are fused into what reads them."""

    def model(x, y):
        for _ in range(4):
            x = x * jnp.tanh(y) / jnp.exp(0.5)
        return x.sum((1, 2, 3))

    x = jnp.ones(SHAPE)
    assert "optimization_barrier" not in jax.jit(jaxlrp.lrp(model)).lower(x, x).as_text()


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (1, 2), (2, 2)])
def test_kernels_of_a_matrix_product_are_not_turned_around(side, stride):
    """It reads them as they lie: nothing of their size is copied, not even where it is fused with what makes them."""
    model = nn.Conv(96, (side, side), (stride, stride))
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 64))
    variables = model.init(jax.random.key(1), x)
    explain = jaxlrp.lrp(model, jaxlrp.Composite.uniform(jaxlrp.Gamma(0.25)))
    text = jax.jit(explain).lower(variables, x).compile().as_text()
    copied = re.findall(r"\w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    size = math.prod(variables["params"]["kernel"].shape)
    assert size not in [math.prod(map(int, shape.split(","))) for shape in copied]


def test_what_a_pool_reads_is_not_kept():
    class Pools(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (8, 32, 128):  # relus of one size
                x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
            return x.mean((1, 2))

    model, x = Pools(), jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    explain = jaxlrp.lrp(model, jaxlrp.Composite.uniform(jaxlrp.Epsilon()))
    memory = jax.jit(explain).lower(variables, x).compile().memory_analysis()
    relu = 2 * 64 * 64 * 8 * 4
    kernels = sum(a.nbytes for a in jax.tree.leaves(variables))  # turned around
    assert memory.temp_size_in_bytes < 2.5 * relu + kernels  # of three
