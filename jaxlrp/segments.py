"""Segments: where a region of elementwise operations is cut, and what each piece is.

A region lies between a value and another that is an elementwise function of it (and of its statistics). It is cut where
a single value carries everything: ``relu(gelu(x))`` is two activations, ``gelu(layer_norm(x))`` a normalisation and an
activation. What belongs together is joined again: ``x - mean | c / sqrt(mean c^2)``, ``exp | e / sum e``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from . import _primitives as P
from .graph import Equation, Program, Value


@dataclasses.dataclass
class Segment:
    """A piece of a region, from one value that carries everything to the next; what it is, and its finer name."""

    start: Value
    end: Value
    equations: list[Equation]
    kind: str = "activation"
    op: str = ""


def segments(
    program: Program, equations: list[Equation], root: Value, end: Value, statistic: dict[Value, bool]
) -> list[Segment]:
    """Cut a region at its cut vertices, then join what belongs together.

    ``relu(gelu(x))`` is two activations, ``gelu(layer_norm(x))`` a normalisation and an activation; but the
    many branches inside one GELU have no value in between that carries everything, so it stays whole.
    """
    last_use: dict[Value, int] = {}
    for i, eqn in enumerate(equations):
        last_use.update(dict.fromkeys(eqn.dependent, i))
    pieces: list[Segment] = []
    start, piece, open_until = root, [], last_use.get(root, 0)
    for i, eqn in enumerate(equations):
        piece.append(eqn)
        out = eqn.outputs[0]
        if out is end or (out.carries and open_until <= i):
            pieces.append(Segment(start, out, piece))
            start, piece = out, []
        open_until = max(open_until, last_use.get(out, i + 1))
    for segment in pieces:
        segment.kind, segment.op = _classify(program, segment, statistic)
    return _join(pieces)


def _classify(program: Program, segment: Segment, statistic: dict[Value, bool]) -> tuple[str, str]:
    eqns = segment.equations
    if any(e.primitive in P.STATISTIC for e in eqns):
        if any(e.primitive in P.EXP and not statistic.get(e.outputs[0], False) for e in eqns):
            return "softmax", "log_softmax" if any(e.primitive in P.LOG for e in eqns) else "softmax"
        return "normalization", "normalization"
    (first, *more) = eqns
    if not more and first.primitive in P.SELECT and not first.inputs[0].depends:
        return "move", "where"
    if not more and _is_affine(first):
        literal = all(v.literal for v in first.inputs if not v.depends)
        return ("affine", "") if literal else ("scale", "scale")
    return "activation", "relu" if _is_relu(program, eqns) else ""


def _join(pieces: list[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for piece in _join_normalisations(pieces):
        previous = joined[-1] if joined else None
        if previous is not None and _belongs(previous, piece):
            previous.end = piece.end
            previous.equations = previous.equations + piece.equations
            if previous.op == "relu" and piece.kind == "activation":
                previous.op = ""  # max(x, 0) was the first half of a clamp
            elif previous.kind == "affine" and piece.kind != "affine":
                previous.kind, previous.op = piece.kind, piece.op
            elif previous.op == "log_softmax" and _is_exp(piece):
                previous.op = "softmax"
            elif previous.op == "softmax" and _is_log(piece):
                previous.op = "log_softmax"
        else:
            joined.append(piece)
    for segment in joined:
        if segment.kind == "affine":  # scaling by numbers in the code: an activation like any other
            segment.kind = "activation"
    return joined


def _join_normalisations(pieces: list[Segment]) -> list[Segment]:
    """Join the parts of one normalisation: ``x - max | exp | e / sum e`` and ``x - mean | c / sqrt(mean c^2)``."""
    joined: list[Segment] = []
    for piece in pieces:
        while piece.kind in ("normalization", "softmax") and joined and _leads_into(joined, piece):
            lead = joined.pop()
            is_softmax = "softmax" in (piece.kind, lead.kind) or _is_exp(lead)
            kind, op = ("softmax", "softmax") if is_softmax else (piece.kind, piece.op)
            op = "log_softmax" if "log_softmax" in (piece.op, lead.op) else op
            piece = Segment(lead.start, piece.end, lead.equations + piece.equations, kind, op)
        joined.append(piece)
    return joined


def _leads_into(joined: list[Segment], piece: Segment) -> bool:
    """Whether the last piece can only be the first part of the normalisation behind it."""
    *before, lead = joined
    if lead.op in ("where", "scale"):  # softmax(x, where=mask) masks between exp and sum
        return bool(before) and _leads_to_sum(before[-1], piece)
    return _leads_to_sum(lead, piece) or (lead.kind == "normalization" and lead.equations[-1].primitive in P.SUB)


def _leads_to_sum(lead: Segment, piece: Segment) -> bool:
    """Whether ``e`` of ``e / sum e`` is an exponential, or a softmax that was masked and shall sum to one again."""
    return _is_exp(lead) or (lead.kind == "softmax" and all(e.primitive in _DIVIDE_BY_SUM for e in piece.equations))


_DIVIDE_BY_SUM = P.SUMMING | P.MOVE | P.CAST | P.DIV | P.ADD | P.MUL | P.SELECT


def _belongs(previous: Segment, piece: Segment) -> bool:
    kinds = (previous.kind, piece.kind)
    if previous.kind == "softmax":  # log_softmax may be written as log(softmax), softmax as exp(log_softmax)
        log, exp = previous.op == "softmax" and _is_log(piece), previous.op == "log_softmax" and _is_exp(piece)
        return piece.kind == "affine" or log or exp
    if previous.kind == "normalization":
        return piece.kind in ("affine", "scale")
    if "move" in kinds:
        return False
    if previous.kind == "affine":
        return piece.kind != "normalization" and piece.op != "relu"
    if piece.kind == "affine":
        return previous.op != "relu" or all(e.primitive in P.CAST for e in piece.equations)
    if kinds == ("activation", "activation"):
        if previous.op == "relu" and len(piece.equations) == 1 and piece.equations[0].primitive in P.MIN:
            return True
        return "relu" not in (previous.op, piece.op) and previous.equations[-1].calls == piece.equations[0].calls
    return kinds == ("scale", "scale")


def _is_exp(piece: Segment) -> bool:
    return piece.kind == "activation" and len(piece.equations) == 1 and piece.equations[0].primitive in P.EXP


def _is_log(piece: Segment) -> bool:
    return len(piece.equations) == 1 and piece.equations[0].primitive in P.LOG


def _is_affine(eqn: Equation) -> bool:
    prim = eqn.primitive
    if not eqn.outputs[0].carries:  # a cast to integers is none
        return False
    if prim in P.DIV:
        return eqn.inputs[0].depends and not eqn.inputs[1].depends
    if prim in P.MUL or prim in P.ADD or prim in P.SUB:
        return sum(v.depends for v in eqn.inputs) == 1
    return prim in P.NEG or prim in P.CAST


def name_by_operations(eqns: Sequence[Equation]) -> str:
    """A name for an activation that was not called by one: its few operations."""
    names = list(dict.fromkeys(e.name for e in eqns if not _is_affine(e)))
    if {"erf", "erfc"} & set(names) or {"tanh", "integer_pow"} <= set(names):
        return "gelu"
    return "_".join(names) if 0 < len(names) <= 3 else ("elementwise" if names else "identity")


def rectifies(program: Program, eqns: Sequence[Equation]) -> bool:
    """Whether an activation is 0 wherever its input is not positive: a relu, perhaps cut off above."""
    eqns = [e for e in eqns if e.primitive not in P.CAST]
    if len(eqns) == 1 and eqns[0].body is not None:
        return rectifies(eqns[0].body, [e for e in eqns[0].body.equations if e.depends])
    if len(eqns) == 1 and eqns[0].primitive in P.CLAMP:
        return _is_zero(program, eqns[0].inputs[0])
    while len(eqns) > 1 and eqns[-1].primitive in P.MIN and any(_is_positive(v) for v in eqns[-1].inputs):
        eqns = eqns[:-1]
    return _is_relu(program, eqns)


def is_exact_relu(program: Program, eqns: Sequence[Equation]) -> bool:
    """Whether an activation gives its input back wherever that is positive, to the last digit: no cast rounds it."""
    if any(e.primitive in P.CAST for e in eqns):
        return False
    if len(eqns) == 1 and eqns[0].body is not None:
        return is_exact_relu(eqns[0].body, [e for e in eqns[0].body.equations if e.depends])
    return _is_relu(program, eqns)


def _is_positive(value: Value) -> bool:
    return value.literal and value.constant is not None and bool((value.constant > 0).all())


def _is_relu(program: Program, eqns: Sequence[Equation]) -> bool:
    """Whether a piece is ``max(x, 0)``, ``where(x > 0, x, 0)``, or a call with a derivative of its own around these."""
    eqns = [e for e in eqns if e.primitive not in P.CAST]
    if len(eqns) == 1 and eqns[0].body is not None:
        return _is_relu(eqns[0].body, [e for e in eqns[0].body.equations if e.depends])
    if len(eqns) == 1 and eqns[0].primitive in P.MAX:
        return any(_is_zero(program, v) for v in eqns[0].inputs)
    if len(eqns) == 2 and eqns[0].primitive in P.GREATER and eqns[1].primitive in P.SELECT:
        (x, bound), (_, low, high) = eqns[0].inputs, eqns[1].inputs
        return x is high and _is_zero(program, bound) and _is_zero(program, low)
    return False


def _is_zero(program: Program, value: Value) -> bool:
    """Whether a value is the number 0 written in the code, perhaps cast or spread."""
    if value.constant is not None:
        return value.literal and not value.constant.any()
    eqn = program.producer.get(value)
    spread = eqn is not None and (eqn.primitive in P.CAST or eqn.primitive in P.BROADCAST)
    return spread and _is_zero(program, eqn.inputs[0])  # type: ignore[union-attr]
