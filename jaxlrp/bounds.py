"""Between which numbers the result of a few elementwise operations lies: a gate is what lies between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import _primitives as P
from ._compat import primitives
from .graph import Equation, Program, Value

Interval = tuple[float, float]
ANYTHING: Interval = (-math.inf, math.inf)


def bounds(
    program: Program, equations: Sequence[Equation], known: Mapping[Value, Interval] | None = None
) -> dict[Value, Interval]:
    """An interval for the result of every equation, whatever the values are that come from outside.

    Interval arithmetic: every operand may be anywhere in its own interval, so what is found is certain but not tight
    (``x - x`` may be anything).
    """
    found = dict(known or {})

    def of(value: Value) -> Interval:
        if value.literal and value.constant is not None and np.size(value.constant):
            return float(np.min(value.constant)), float(np.max(value.constant))
        maker = program.producer.get(value) if value.literal else None
        if maker is not None and maker.primitive in P.CAST | P.BROADCAST:  # a number that was cast or spread
            return of(maker.inputs[0])
        return found.get(value, ANYTHING)

    for eqn in equations:
        given = [of(v) for v in eqn.inputs]
        if eqn.body is not None:
            inside = bounds(eqn.body, eqn.body.equations, dict(zip(eqn.body.inputs, given, strict=True)))
            found.update((o, inside.get(v, ANYTHING)) for o, v in zip(eqn.outputs, eqn.body.outputs, strict=True))
            continue
        rule = next((rule for some, rule in _RULES if eqn.primitive in some), None)
        low, high = rule(*given) if rule else ANYTHING
        found[eqn.outputs[0]] = ANYTHING if math.isnan(low) or math.isnan(high) else (low, high)
    return found


def _corners(operation: Callable[[float, float], float]) -> Callable[[Interval, Interval], Interval]:
    def rule(a: Interval, b: Interval) -> Interval:
        values = [operation(x, y) for x in a for y in b]
        return min(values), max(values)

    return rule


def _times(x: float, y: float) -> float:
    return 0.0 if x == 0 or y == 0 else x * y


def _divide(a: Interval, b: Interval) -> Interval:
    if b[0] <= 0 <= b[1]:
        return ANYTHING
    inverse = (1 / b[1], 1 / b[0])
    return _corners(_times)(a, inverse)


def _absolute(a: Interval) -> Interval:
    low, high = sorted(map(abs, a))
    return (0.0 if a[0] <= 0 <= a[1] else low), high


def _exponential(x: float) -> float:
    return math.exp(min(x, 700.0)) if x < 700.0 else math.inf


_RULES: list[tuple[Any, Callable[..., Interval]]] = [
    (primitives("logistic"), lambda a: (0.0, 1.0)),
    (primitives("tanh", "erf", "sin", "cos"), lambda a: (-1.0, 1.0)),
    (primitives("exp"), lambda a: (_exponential(a[0]), _exponential(a[1]))),
    (primitives("abs"), _absolute),
    (primitives("square"), lambda a: _corners(_times)(_absolute(a), _absolute(a))),
    (P.NEG, lambda a: (-a[1], -a[0])),
    (P.ADD, lambda a, b: (a[0] + b[0], a[1] + b[1])),
    (P.SUB, lambda a, b: (a[0] - b[1], a[1] - b[0])),
    (P.MUL, _corners(_times)),
    (P.DIV, _divide),
    (P.MAX, lambda a, b: (max(a[0], b[0]), max(a[1], b[1]))),
    (P.MIN, lambda a, b: (min(a[0], b[0]), min(a[1], b[1]))),
    (P.CLAMP, lambda low, a, high: (min(max(a[0], low[0]), high[0]), min(max(a[1], low[1]), high[1]))),
    (P.SELECT, lambda which, *cases: (min(c[0] for c in cases), max(c[1] for c in cases))),
    (P.CAST | P.BROADCAST | P.STOP_GRADIENT, lambda a, *_: a),
]
