"""The transpose of max pooling: what arrives at a window goes to its winner.

jax's own derivative emits XLA's ``select_and_scatter``, which takes many times as long on a CPU as comparing each place
of the window with the maximum. Of several equal maxima the first takes all, as in jax's derivative.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import _primitives as P
from ..graph import Equation


def is_window_pick(equation: Equation) -> bool:
    """Whether this is a max or min pool (over an input that is not dilated itself)."""
    return equation.primitive in P.WINDOW_PICK and set(equation.params["base_dilation"]) == {1}


def to_winners(x: jax.Array, z: jax.Array, coming: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    """What comes to the outputs ``z`` of a pool over ``x``, at the places of ``x`` that won.

    Args:
        x: ``[...]`` the input.
        z: ``[...]`` the output, one number per window.
        coming: cotangents or relevance, of the output's shape.
        params: the pool's windows, strides, padding and dilation, one entry per axis.
    """
    padding, strides = params["padding"], params["window_strides"]
    padded = lax.pad(x, jnp.asarray(jnp.nan, x.dtype), [(low, high, 0) for low, high in padding])  # wins nowhere
    taken = jnp.zeros(z.shape, bool)
    total = jnp.zeros(x.shape, coming.dtype)
    for offset in itertools.product(*map(range, params["window_dimensions"])):
        start = [o * d for o, d in zip(offset, params["window_dilation"], strict=True)]
        end = [a + (n - 1) * s + 1 for a, n, s in zip(start, z.shape, strides, strict=True)]
        wins = (lax.slice(padded, start, end, strides) == z) & ~taken
        taken = taken | wins
        back = [
            (a - low, n - (a - low) - (m - 1) * s - 1, s - 1)
            for a, (low, _), n, m, s in zip(start, padding, x.shape, z.shape, strides, strict=True)
        ]
        total = total + lax.pad(jnp.where(wins, coming, 0.0), jnp.zeros((), coming.dtype), back)
    return total
