"""Which values of a traced program can never be negative.

After a relu, a softmax or a square, half of the sign split of the next layer's contributions is empty, and rules skip
it (`jaxlrp.rules.SplitRule`). What is found is a promise: a value is in the set only if no input and no parameter
could make it negative (NaN aside). Not being in the set promises nothing.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from . import _primitives as P
from ._compat import primitives
from .graph import Cond, Equation, Program, Scan, Value

_ALWAYS = primitives("exp", "exp2", "logistic", "abs", "square", "sqrt", "rsqrt", "cosh", "erfc", "acos", "iota")
# nonnegative if all operands are: sums and products of such, and everything monotone that is 0 at 0
_KEEPS = (
    P.MOVE
    | P.SUMMING
    | P.PICKING
    | P.SORTING
    | P.CAST
    | P.STOP_GRADIENT
    | P.SCATTER_ADD
    | P.ADD
    | P.MUL
    | P.DIV
    | P.DOT
    | P.CONV
    | primitives("min", "pow", "log1p", "expm1", "tanh", "erf", "sign", "ceil", "floor", "round", "cbrt")
    | primitives("sinh", "asinh", "atan", "reduce_prod", "cumprod", "sharding_constraint")
)
_ANY = primitives("max")
_INDEXED = primitives("gather", "scatter", "dynamic_slice", "dynamic_update_slice") | P.SCATTER_ADD
_CLAMP = primitives("clamp")
_POWER = primitives("integer_pow")


def nonnegative_values(program: Program) -> frozenset[Value]:
    """The values that are nonnegative whatever the inputs and parameters are."""
    known: set[Value] = set()
    _walk(program, known)
    return frozenset(known)


def _walk(program: Program, known: set[Value]) -> None:
    for equation in program.equations:
        if equation.body is not None:
            _walk(equation.body, known)
            found = [_is(v, known) for v in equation.body.outputs]
        elif isinstance(equation, Scan):
            found = _steps(equation, known)
        elif isinstance(equation, Cond):
            found = _branches(equation, known)
        else:
            found = [_result(equation, known)] * len(equation.outputs)
        known.update(v for v, yes in zip(equation.outputs, found, strict=True) if yes)


def _steps(scan: Scan, known: set[Value]) -> list[bool]:
    """A carry is nonnegative if it starts so and a step keeps it so."""
    signs = [_is(v, known) for v in scan.inputs]
    while True:
        inside = known | {v for v, yes in zip(scan.step.inputs, signs, strict=True) if yes}
        _walk(scan.step, inside)
        found = [_is(v, inside) for v in scan.step.outputs]
        carries = slice(scan.consts, scan.consts + scan.carries)
        kept = [a and b for a, b in zip(signs[carries], found, strict=False)]
        if kept == signs[carries]:
            known.update(inside)
            return [*kept, *found[scan.carries :]]
        signs[carries] = kept


def _branches(cond: Cond, known: set[Value]) -> list[bool]:
    found = [True] * len(cond.outputs)
    for branch in cond.branches:
        known.update(b for v, b in zip(cond.inputs[1:], branch.inputs, strict=True) if _is(v, known))
        _walk(branch, known)
        found = [a and _is(v, known) for a, v in zip(found, branch.outputs, strict=True)]
    return found


def _result(equation: Equation, known: set[Value]) -> bool:
    prim = equation.primitive
    signs = [_is(v, known) for v in equation.inputs]
    if prim in _ALWAYS:
        return True
    if prim in P.SELECT:
        return all(signs[1:])
    if prim in _ANY:
        return any(signs)
    if prim in _CLAMP:
        low, x, high = signs
        return high and (low or x)
    if prim in _POWER:
        return equation.params["y"] % 2 == 0 or signs[0]
    if prim in _KEEPS:
        if prim in P.GATHER and (equation.params.get("fill_value") or 0) < 0:
            return False
        if prim in P.CAST and _wraps(equation):
            return False
        moves = prim in _INDEXED
        return all(
            s or (moves and i > 0 and _is_index(v)) for i, (s, v) in enumerate(zip(signs, equation.inputs, strict=True))
        )
    return all(_unsigned(v) for v in equation.outputs)


def _is(value: Value, known: set[Value]) -> bool:
    if value in known or _unsigned(value):
        return True
    return value.literal and value.constant is not None and bool(np.all(np.asarray(value.constant) >= 0))


def _unsigned(value: Value) -> bool:
    return bool(jnp.issubdtype(value.dtype, np.bool_) or jnp.issubdtype(value.dtype, np.unsignedinteger))


def _wraps(equation: Equation) -> bool:
    """A cast between integers may wrap around."""
    return _is_index(equation.inputs[0]) and _is_index(equation.outputs[0])


def _is_index(value: Value) -> bool:
    """Indices of gathers and slices are no part of the result."""
    return bool(jnp.issubdtype(value.dtype, np.integer))
