"""The transpose of max pooling: what arrives at a window goes to its winner.

jax's own derivative emits XLA's ``select_and_scatter``, which takes many times as long on a CPU as comparing the places
of a window. Of several equal maxima the first takes all, as in jax's derivative.

All that the way back needs of the input is a byte for each window, the number of its winner: the input need not be
kept. Most pools tile their input, so that every place lies in one window. Then rules need not keep it either: what a
winner was, the output says.
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
from ..layers import Layer


def is_window_pick(layer: Layer) -> bool:
    """Whether this is a max or min pool and no more (over an input that is not dilated itself)."""
    (equation, *more) = layer.equations
    return not more and equation.primitive in P.WINDOW_PICK and set(equation.params["base_dilation"]) == {1}


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


def to_winners(x: jax.Array, coming: jax.Array, pool: Equation) -> jax.Array:
    """What comes to the outputs of a pool over ``x``, at the places of ``x`` that won.

    Args:
        x: ``[...]`` the input.
        coming: cotangents or relevance, one number per window.
        pool: the equation.
    """
    params = pool.params
    winner = _winner(x, coming.shape, pool)
    if not tiles(params, x.shape):
        return _to_any(winner, x.shape, coming, params)
    window = params["window_dimensions"]
    number = jnp.arange(math.prod(window), dtype=winner.dtype)
    mine = _in_windows(winner, window) == number.reshape([n for k in window for n in ((1, k) if k > 1 else (1,))])
    return _joined(jnp.where(mine, _in_windows(coming, window), 0.0), window)


def _winner(x: jax.Array, windows: Sequence[int], pool: Equation) -> jax.Array:
    """Which place of each window won, by its number; -1 where a window lies in the padding altogether.

    Places are compared with one another, not with the pool's output: XLA may compute ``x`` once more for this and round
    it otherwise (multiplications and additions joined in one, or more bits than a bfloat16 has), and then none would
    be equal to the output.
    """
    padded = lax.pad(x, jnp.asarray(jnp.nan, x.dtype), [(low, high, 0) for low, high in pool.params["padding"]])
    beats = lax.gt if pool.primitive in P.MAX_POOL else lax.lt
    places = _by_place(padded, windows, pool.params)
    number = np.int8 if math.prod(pool.params["window_dimensions"]) <= np.iinfo(np.int8).max else np.int32
    best = next(places)
    winner = jnp.where(jnp.isnan(best), number(-1), number(0))  # nan is padding, which wins nowhere
    for k, part in enumerate(places, start=1):
        wins = beats(part, best) | (jnp.isnan(best) & ~jnp.isnan(part))
        winner, best = jnp.where(wins, number(k), winner), jnp.where(wins, part, best)
    return lax.optimization_barrier(winner)  # or XLA would compare, and keep x, only when relevance comes


def _to_any(winner: jax.Array, shape: Sequence[int], coming: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    total = jnp.zeros(shape, coming.dtype)
    zero = jnp.zeros((), coming.dtype)
    for k, start in enumerate(_starts(params)):
        back = [
            (a - low, n - (a - low) - (m - 1) * s - 1, s - 1)
            for a, (low, _), n, m, s in zip(
                start, params["padding"], shape, winner.shape, params["window_strides"], strict=True
            )
        ]
        total = total + lax.pad(jnp.where(winner == k, coming, zero), zero, back)
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


def _by_place(x: jax.Array, windows: Sequence[int], params: Mapping[str, Any]) -> Iterator[jax.Array]:
    """For every place of a window: what all windows have there."""
    strides = params["window_strides"]
    for start in _starts(params):
        end = [a + (n - 1) * s + 1 for a, n, s in zip(start, windows, strides, strict=True)]
        yield lax.slice(x, start, end, strides)


def _starts(params: Mapping[str, Any]) -> Iterator[list[int]]:
    """For every place of a window: where the first window has it."""
    for offset in itertools.product(*map(range, params["window_dimensions"])):
        yield [o * d for o, d in zip(offset, params["window_dilation"], strict=True)]
