"""Transposes with weights that a rule's number is multiplied into, where that number is traced.

It may be one of several under `jax.vmap`, each with weights ``w + γ m`` of its own. Then there are two ways:

* *One by one*, in a loop. Products with several weights at once would be grouped convolutions, slow on a CPU.
* *Together*: what ``fᵀ`` makes of ``w`` and of ``m`` is put together afterwards. These are two products for each number
  and not one, but of full size, which keep an accelerator busy and can be spread over several. Where weights are
  multiplied with few numbers each, two products also take less time than making weights of its own for every γ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from .._compat import is_concrete
from ..bilinear import Arrays
from ..linear import LinearMap, transpose_all

_ROWS = 64  # numbers that a weight is multiplied with, from which on one by one takes less time on a CPU

Back = Callable[[Sequence[Arrays], jax.Array], list[Arrays]]  # fᵀ of one s with each of several weights


def transposes(linear: LinearMap, gamma: jax.Array, more: Sequence[Arrays], s: jax.Array) -> list[Arrays]:
    """``fᵀ`` of ``s`` with the weights ``w + γ m``, for the layer's own ``w`` and each of several ``m``."""
    # jax's own transposes read more than their arguments, which a function with a batching rule must not. Nor are they
    # fast in a loop. A gamma for each sample cannot be multiplied into weights.
    if not linear.rows or jnp.ndim(gamma):
        return _together(linear.transpose_all, gamma, linear.weights, more, s)
    back = functools.partial(transpose_all, linear.transpose, linear.stack)
    return _differentiable(back, linear.rows)(gamma, linear.weights, tuple(more), s)


def _together(back: Back, gamma: jax.Array, w: Arrays, more: Sequence[Arrays], s: jax.Array) -> list[Arrays]:
    (plain,) = back([w], s)
    return [_plus(plain, gamma, slopes) for slopes in back(more, s)]


def _differentiable(back: Back, rows: int) -> Callable[..., list[Arrays]]:
    """`_batchable` with derivatives, which `custom_vmap` has not backwards: those of `_together`."""

    @jax.custom_jvp
    def run(*operands: Any) -> list[Arrays]:
        return _batchable(back, rows)(*operands)

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def _(operands: Any, tangents: Any) -> tuple[list[Arrays], list[Arrays]]:
        directions = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
        moves = [not isinstance(t, SymbolicZero) for t in directions]
        moving, put = _some(operands, moves)
        along = [t for t in directions if not isinstance(t, SymbolicZero)]
        _, slopes = jax.jvp(lambda *moving: _together(back, *put(moving)), moving, along)
        return run(*operands), slopes

    return run


def _batchable(back: Back, rows: int) -> Callable[..., list[Arrays]]:
    """``fᵀ`` with the weights ``w + γ m``, with a rule for `jax.vmap`."""

    @custom_vmap
    def run(gamma: jax.Array, w: Arrays, more: Sequence[Arrays], s: jax.Array) -> list[Arrays]:
        return back([_plus(w, gamma, m) for m in more], s)

    @run.def_vmap
    def _(_: int, batched: Any, *operands: Any) -> tuple[list[Arrays], list[Arrays]]:
        axes = jax.tree.map(lambda many: 0 if many else None, tuple(batched))
        of_gamma, (of_w,), _, of_s = axes
        if of_gamma is None:  # of samples or weights: gamma may be one of several yet
            slopes = _batchable(jax.vmap(back, (of_w, of_s)), rows)(*operands)
        else:
            together = jax.vmap(functools.partial(_together, back), axes)
            eager = all(map(is_concrete, jax.tree.leaves(operands)))  # every call would compile its loop
            if rows < _ROWS or eager:
                slopes = together(*operands)
            else:
                one_by_one = functools.partial(_one_by_one, run, batched)
                slopes = lax.platform_dependent(*operands, cpu=one_by_one, default=together)
        return slopes, jax.tree.map(lambda _: True, slopes)

    return run


def _one_by_one(run: Callable[..., list[Arrays]], batched: Any, *operands: Any) -> list[Arrays]:
    """What `jax.vmap` gives, by a loop over the first axis of those operands that are batched."""
    many, put = _some(operands, jax.tree.leaves(batched))
    return lax.map(lambda each: run(*put(each)), many)


def _some(operands: Any, which: Sequence[bool]) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Any]]:
    """Some of the arrays in a pytree, and the pytree with others in their places."""
    leaves, tree = jax.tree.flatten(operands)

    def put(others: Sequence[jax.Array]) -> Any:
        rest = iter(others)
        return tree.unflatten([next(rest) if some else leaf for leaf, some in zip(leaves, which, strict=True)])

    return [leaf for leaf, some in zip(leaves, which, strict=True) if some], put


def _plus(w: Arrays, gamma: jax.Array, more: Arrays) -> Arrays:
    return tuple(a + gamma * b for a, b in zip(w, more, strict=True))
