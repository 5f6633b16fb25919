"""The operations of linear layers as bilinear maps ``f(x, w) + constant``, and how they are transposed.

A matrix product of few rows is transposed with the matrix on the left, as it lies. XLA would take it as the right
operand and have it packed into panels first, which for a few rows takes longer than the product.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _compat
from . import _primitives as P
from .convolutions import Convolution
from .graph import Equation, Value, read, wide_dtype, widen

Arrays = tuple[jax.Array, ...]
_FEW_ROWS = 64  # from some hundred on, XLA's own order is the faster one


Apply = Callable[[Arrays, Arrays], jax.Array]  # (x, w) -> f(x, w)
Transpose = Callable[[Arrays, jax.Array], Arrays]  # (w, s) -> fᵀ


class Bilinear(NamedTuple):
    """An operation ``f(x, w) + constant``."""

    weights: Arrays
    apply: Apply
    constant: jax.Array | None = None
    transpose: Transpose | None = None  # where jax's own is not the best
    frugal: tuple[Apply, Transpose] | None = None  # both with fewer multiplications, where that is allowed
    stack: tuple[int, int] | None = None  # see `LinearMap`
    product: bool = False
    rows: int = 0  # how many numbers every weight is multiplied with


def bilinear(eqn: Equation, env: Mapping[Value, Any]) -> Bilinear:
    """What a linear operation is at the values of one forward pass."""
    return _MAPS[eqn.primitive](eqn, env)


def _product(eqn: Equation, env: Mapping[Value, Any]) -> Bilinear:
    """Matrix products and convolutions: one operand is the input, the other the weight."""
    side = 0 if eqn.inputs[0].depends else 1
    weight = widen(read(env, eqn.inputs[1 - side]))
    params = dict(eqn.params)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = np.dtype(wide_dtype(eqn.outputs[0].dtype))

    def apply(x: Arrays, w: Arrays) -> jax.Array:
        operands = (x[0], w[0]) if side == 0 else (w[0], x[0])
        operands = _promoted(*operands)
        return _compat.bind(eqn.primitive, params, *operands)[0]

    if eqn.primitive in P.DOT:
        return Bilinear(
            (weight,), apply, transpose=_of_few_rows(eqn, params, side), product=True, rows=_rows(eqn, side)
        )
    if side == 1:
        return Bilinear((weight,), apply, product=True)
    convolution = Convolution(params, eqn.inputs[0].shape, eqn.inputs[1].shape)
    frugal = (
        lambda x, w: convolution.apply_frugally(*_promoted(x[0], w[0])),
        lambda w, s: (convolution.transpose(*_promoted(w[0], s), frugally=True),),
    )
    return Bilinear(
        (weight,),
        (lambda x, w: convolution.apply(*_promoted(x[0], w[0]))) if convolution.applies else apply,
        transpose=(lambda w, s: (convolution.transpose(*_promoted(w[0], s)),)) if convolution.transposes else None,
        frugal=frugal if convolution.saves else None,
        stack=convolution.stack,
        product=not convolution.depthwise,
        rows=_rows(eqn, side),
    )


def _rows(eqn: Equation, side: int) -> int:
    """How many numbers of the input (operand number ``side``) every weight is multiplied with."""
    (out,), weight = eqn.outputs, eqn.inputs[1 - side].shape
    if eqn.primitive in P.DOT:
        contracted = eqn.params["dimension_numbers"][0][1 - side]
        columns = math.prod(n for axis, n in enumerate(weight) if axis not in contracted)
    else:
        columns = weight[eqn.params["dimension_numbers"].rhs_spec[0]]
    rows = math.prod(out.shape) // max(columns, 1)
    return rows if isinstance(rows, int) else sys.maxsize  # of an exported program, for any number of samples


def _of_few_rows(eqn: Equation, params: Mapping[str, Any], side: int) -> Transpose | None:
    """The transpose of a matrix product, where its input ``x`` (operand number ``side``) has few rows."""
    contracting, batch = params["dimension_numbers"]
    x, w = eqn.inputs[side].shape, eqn.inputs[1 - side].shape
    of_x, of_w = contracting[side], contracting[1 - side]
    rows = [axis for axis in range(len(x)) if axis not in of_x]
    if batch[0] or math.prod(x[axis] for axis in rows) > _FEW_ROWS:
        return None
    columns = [axis for axis in range(len(w)) if axis not in of_w]
    start = len(rows) if side == 0 else 0  # of the columns in the output
    how = {k: params[k] for k in ("precision", "preferred_element_type")}
    # The product has the contracted axes in the order in which w has them, then the rows.
    there = [*(of_x[of_w.index(axis)] for axis in sorted(of_w)), *rows]
    back = [there.index(axis) for axis in range(len(x))]

    def transpose(w: Arrays, s: jax.Array) -> Arrays:
        over = (tuple(columns), tuple(range(start, start + len(columns))))
        product = lax.dot_general(*_promoted(w[0], s), (over, ((), ())), **how)
        return (lax.optimization_barrier(product).transpose(back),)  # without, XLA swaps the operands again

    return transpose


def _promoted(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return a.astype(dtype), b.astype(dtype)


def _addition(eqn: Equation, env: Mapping[Value, Any]) -> Bilinear:
    """``a + b`` and ``a - b``: weights 1 and -1."""
    sign = -1.0 if eqn.primitive in P.SUB else 1.0
    signs = [1.0, sign]
    dtype = wide_dtype(eqn.outputs[0].dtype)
    weights = tuple(jnp.asarray(s, dtype) for v, s in zip(eqn.inputs, signs, strict=True) if v.carries)
    shape = eqn.outputs[0].shape

    def apply(x: Arrays, w: Arrays) -> jax.Array:
        return sum((jnp.broadcast_to(a * c, shape) for a, c in zip(x, w, strict=True)), jnp.zeros((), dtype))

    constants = [widen(read(env, v)) * s for v, s in zip(eqn.inputs, signs, strict=True) if not v.carries]
    return Bilinear(weights, apply, constants[0] if constants else None)


def _summing(eqn: Equation, env: Mapping[Value, Any]) -> Bilinear:
    """Sums over axes or windows, cumulative sums: one weight for all."""
    dtype = wide_dtype(eqn.outputs[0].dtype)

    def apply(x: Arrays, w: Arrays) -> jax.Array:
        return _compat.bind(eqn.primitive, eqn.params, x[0])[0] * w[0]

    return Bilinear((jnp.ones((), dtype),), apply)


def _scatter_add(eqn: Equation, env: Mapping[Value, Any]) -> Bilinear:
    """``operand`` plus ``updates`` added at ``indices`` (segment sums): linear in both."""
    operand, indices, updates = eqn.inputs
    index = read(env, indices)
    dtype = wide_dtype(eqn.outputs[0].dtype)
    live = list(dict.fromkeys(v for v in (operand, updates) if v.carries))

    def run(values: Mapping[Value, Any]) -> jax.Array:
        zero = lambda v: jnp.zeros(v.shape, dtype)  # noqa: E731
        a, u = (values.get(v, None) for v in (operand, updates))
        a = zero(operand) if a is None else a
        u = zero(updates) if u is None else u
        return _compat.bind(eqn.primitive, eqn.params, a, index, u)[0]

    def apply(x: Arrays, w: Arrays) -> jax.Array:
        return run(dict(zip(live, x, strict=True))) * w[0]

    fixed = {v: widen(read(env, v)) for v in (operand, updates) if not v.carries}
    return Bilinear((jnp.ones((), dtype),), apply, run(fixed) if fixed else None)


def elementwise(shape: tuple[int, ...]) -> Apply:
    """``x w``, each broadcast to a shape."""
    return lambda x, w: jnp.broadcast_to(x[0] * w[0], shape)


_MAPS: dict[Any, Callable[[Equation, Mapping[Value, Any]], Bilinear]] = {
    **dict.fromkeys(P.DOT | P.CONV, _product),
    **dict.fromkeys(P.ADD | P.SUB, _addition),
    **dict.fromkeys(P.SUMMING, _summing),
    **dict.fromkeys(P.SCATTER_ADD, _scatter_add),
}
