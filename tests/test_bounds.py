"""Intervals of activations: certain, by probing; tight enough to know a gate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp.bounds import bounds
from jaxlrp.transform import Setup

FUNCTIONS = {
    "sigmoid": (jax.nn.sigmoid, (0, 1)),
    "by hand": (lambda x: 1 / (1 + jnp.exp(-x)), (0, 1)),
    "hard": (jax.nn.hard_sigmoid, (0, 1)),
    "tanh": (jnp.tanh, (-1, 1)),
    "relu6": (jax.nn.relu6, (0, 6)),
    "relu": (jax.nn.relu, (0, np.inf)),
    "clamp": (lambda x: jax.lax.clamp(-2.0, x, 3.0), (-2, 3)),
    "one minus": (lambda x: 1 - jax.nn.sigmoid(x), (0, 1)),
    "negative square": (lambda x: -jnp.square(x) * 2, (-np.inf, 0)),
    "silu": (jax.nn.silu, (-np.inf, np.inf)),
    "gelu": (jax.nn.gelu, (-np.inf, np.inf)),
    "gauss": (lambda x: jnp.exp(-jnp.square(x)), (0, 1)),
    "quotient": (lambda x: jnp.abs(x) / (1 + jnp.abs(x)), (0, np.inf)),
    "mish": (lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))), (-np.inf, np.inf)),
}


@pytest.mark.parametrize(("function", "expected"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_intervals(function, expected):
    x = jnp.concatenate([jnp.linspace(-50.0, 50.0, 401), jnp.array([0.0, -1e30, 1e30])])
    traced = Setup(function, None, None, False, False).traced((x,), {})
    (layer,) = traced.layers
    low, high = bounds(traced.main, layer.equations)[layer.outputs[0]]
    assert (low, high) == pytest.approx(expected)
    y = np.asarray(function(x))
    y = y[np.isfinite(y)]
    assert y.min() >= low
    assert y.max() <= high
