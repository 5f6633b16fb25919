"""The transpose of max pooling: what arrives at a window goes to its winner.

jax's own derivative emits XLA's ``select_and_scatter``, which takes many times as long on a CPU as comparing each place
of the window with the maximum. Of several equal maxima the first takes all, as in jax's derivative.

Most pools tile their input: every place lies in one window. Then all that the way back needs of the input is a byte for
each window, the number of its winner: the input, by far the larger, need not be kept. What a winner was, the output
says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _primitives as P
from ..graph import Equation


def is_window_pick(equation: Equation) -> bool:
    """Whether this is a max or min pool (over an input that is not dilated itself)."""
    return equation.primitive in P.WINDOW_PICK and set(equation.params["base_dilation"]) == {1}


def tiles(params: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether every place of an input of this shape lies in one of the pool's windows, and only in one."""
    window = params["window_dimensions"]
    apart = window == params["window_strides"] and set(params["window_dilation"]) == {1}
    whole = not any(map(any, params["padding"])) and all(n % k == 0 for n, k in zip(shape, window, strict=True))
    return apart and whole and math.prod(window) <= np.iinfo(np.int8).max


def at_winners(z: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    """The input of a pool that ``tiles``, as it is at the winners, given the output ``z``."""
    window = params["window_dimensions"]
    return _joined(_in_windows(z, window), window)


def to_winners(x: jax.Array, z: jax.Array, coming: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    """What comes to the outputs ``z`` of a pool over ``x``, at the places of ``x`` that won.

    Args:
        x: ``[...]`` the input.
        z: ``[...]`` the output, one number per window.
        coming: cotangents or relevance, of the output's shape.
        params: the pool's windows, strides, padding and dilation, one entry per axis.
    """
    return (_to_tiles if tiles(params, x.shape) else _to_any)(x, z, coming, params)


def _to_tiles(x: jax.Array, z: jax.Array, coming: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    winner = jnp.full_like(z, -1, jnp.int8)  # sharded as it is
    for number, (_, part) in enumerate(_by_place(x, z.shape, params)):
        winner = jnp.where((winner < 0) & (part == z), np.int8(number), winner)
    winner = lax.optimization_barrier(winner)  # or XLA would compare, and keep x, only when relevance comes
    window = params["window_dimensions"]
    number = jnp.arange(math.prod(window), dtype=jnp.int8)
    mine = _in_windows(winner, window) == number.reshape([n for k in window for n in ((1, k) if k > 1 else (1,))])
    return _joined(jnp.where(mine, _in_windows(coming, window), 0.0), window)


def _to_any(x: jax.Array, z: jax.Array, coming: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    padding, strides = params["padding"], params["window_strides"]
    padded = lax.pad(x, jnp.asarray(jnp.nan, x.dtype), [(low, high, 0) for low, high in padding])  # wins nowhere
    taken = jnp.zeros(z.shape, bool)
    total = jnp.zeros(x.shape, coming.dtype)
    for start, part in _by_place(padded, z.shape, params):
        wins = (part == z) & ~taken
        taken = taken | wins
        back = [
            (a - low, n - (a - low) - (m - 1) * s - 1, s - 1)
            for a, (low, _), n, m, s in zip(start, padding, x.shape, z.shape, strides, strict=True)
        ]
        total = total + lax.pad(jnp.where(wins, coming, 0.0), jnp.zeros((), coming.dtype), back)
    return total


def _in_windows(z: jax.Array, window: Sequence[int]) -> jax.Array:
    """Along every axis of windows two: which window, and which place of it. The same at all places."""
    shape: list[int] = []
    axes = []
    for n, k in zip(z.shape, window, strict=True):
        axes.append(len(shape))
        shape += [n, k] if k > 1 else [n]
    return lax.broadcast_in_dim(z, shape, axes)


def _joined(split: jax.Array, window: Sequence[int]) -> jax.Array:
    """From two axes to one of places; axis by axis, as sharded arrays want it."""
    for axis, k in enumerate(window):
        split = lax.collapse(split, axis, axis + 2) if k > 1 else split
    return split


def _by_place(x: jax.Array, windows: Sequence[int], params: Mapping[str, Any]) -> Iterator[tuple[list[int], jax.Array]]:
    """For every place of a window: where it begins, and what all windows have there."""
    strides = params["window_strides"]
    for offset in itertools.product(*map(range, params["window_dimensions"])):
        start = [o * d for o, d in zip(offset, params["window_dilation"], strict=True)]
        end = [a + (n - 1) * s + 1 for a, n, s in zip(start, windows, strides, strict=True)]
        yield start, lax.slice(x, start, end, strides)
