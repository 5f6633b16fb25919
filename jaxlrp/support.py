"""Where relevance can arrive at all, found before any number is known.

Most rules hand an input relevance in proportion to the input, so that what is 0 gets none. Behind a relu much is 0: if
such rules alone read what a relu hands on, relevance comes to its input only where that is positive, and a rule such as
gamma, which treats positive and negative outputs apart, needs half of its work.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from . import _primitives as P
from .composites import Assignment, Assignments
from .graph import Equation, Program, Value, wide_dtype
from .layers import forks
from .remat import Blocks
from .rules import AlphaBeta, Epsilon, Gamma, Norm, Pass, Route, Rule, Zero, ZPlus
from .rules._pool import is_window_pick, tiles


def positive_values(program: Program, assignments: Assignments) -> frozenset[Value]:
    """The values to which relevance comes only where they are positive, whatever the numbers are."""
    silent: dict[Value, bool] = dict.fromkeys(program.outputs, False)  # nothing comes where the value is 0
    positive: dict[Value, bool] = dict.fromkeys(program.outputs, False)
    for assignment in reversed(assignments):
        behind = all(silent.get(v, True) for v in assignment.layer.outputs)
        quiet, rectified = _hands_on(assignment, behind)
        for value in assignment.layer.inputs:
            silent[value] = silent.get(value, True) and quiet
            positive[value] = positive.get(value, True) and rectified
    return frozenset(v for v, yes in positive.items() if yes)


def rectified_values(
    program: Program, assignments: Assignments, positive: frozenset[Value], blocks: Blocks
) -> dict[Value, Value]:
    """For such values the relu of them that the model makes: the same number wherever relevance comes.

    It is kept in any case, being what the next layer reads, unless a block that runs again ends between the two.
    """
    found: dict[Value, Value] = {}
    for layer in (a.layer for a in assignments if a.layer.is_relu):
        (value,), (relu,) = layer.inputs, layer.outputs
        made_by = program.producer.get(value)
        if value in positive and made_by is not None and blocks.get(made_by) is blocks.get(layer.equations[-1]):
            found[value] = relu
    return found


def pooled_values(
    program: Program, assignments: Assignments, rectified: Mapping[Value, Value], blocks: Blocks
) -> dict[Value, Equation]:
    """Of such values those whose relu only a max pool reads, and the pool: relevance comes where the relu won.

    There the value is the pool's output. If its windows do not overlap, the relu, by far the larger, need not be kept.
    Nobody else may read the value either: it would hand relevance to other places.
    """
    pools = {a.layer.equations[0] for a in assignments if is_window_pick(a.layer) and type(a.rule) is Route}
    shared = forks(a.layer for a in assignments).union(program.outputs)
    found: dict[Value, Equation] = {}
    for value, relu in rectified.items():
        if value in shared or not _read_once(program, relu):
            continue
        (pool,) = program.consumers[relu]
        takes_all = pool in pools and pool.primitive in P.MAX_POOL
        here = blocks.get(program.producer[relu]) is blocks.get(pool)
        if takes_all and here and tiles(pool.params, relu.shape):
            found[value] = pool
    return found


def summands(
    program: Program, assignments: Assignments, rectified: Mapping[Value, Value], blocks: Blocks
) -> dict[Value, tuple[Value, Value]]:
    """For a value ``b`` that only a sum ``a + b`` reads: what gives it back wherever relevance comes, a sum and ``a``.

    Relevance comes to a sum behind a relu only where the relu hands it on, so that ``b = relu(a + b) - a`` there, up to
    rounding of the size of ``a``: ``b`` itself need not be kept. One summand of each sum, if possible such that the
    other is kept in any case.

    Rounding is harmless to the rules in `_NORMALISING` alone: what they hand out is as large as what they are handed.
    Others, told a relevance that is not quite 0 where ``b`` is, would divide it by that 0.
    """
    maker = {v: a for a in assignments for v in a.layer.outputs}
    found: dict[Value, tuple[Value, Value]] = {}
    for layer, rule in ((a.layer, a.rule) for a in assignments):
        whole = rectified.get(layer.outputs[0])
        if whole is None or layer.op != "add" or len(layer.inputs) != 2 or not _splits_by_value(rule):
            continue
        pairs = list(itertools.permutations(layer.inputs))
        for value, other in sorted(pairs, key=lambda pair: _read_once(program, pair[1])):  # True comes last
            made = maker.get(value)
            alike = value.shape == other.shape == whole.shape and value.dtype == other.dtype == whole.dtype
            if made is None or not alike or wide_dtype(value.dtype) != value.dtype or not _read_once(program, value):
                continue
            here = blocks.get(made.layer.equations[-1]) is blocks.get(layer.equations[-1])
            if here and made.layer.linear is not None and _normalises(made.rule):
                found[value] = whole, other
                break
    return found


def frugal_convolutions(program: Program, assignments: Assignments, positive: frozenset[Value]) -> frozenset[Equation]:
    """Convolutions of the model whose results may have errors relative to all that a filter sees.

    A result that is 0 may then be a small number of either sign. A relu makes no more of that than such a number; a
    root or a quotient would, so nothing but relus may read it. And relevance must come in proportion to it, to a rule
    that divides by nothing smaller.
    """
    relus = {e for a in assignments if a.layer.rectifies for e in a.layer.equations}
    found: set[Equation] = set()
    for layer, rule in ((a.layer, a.rule) for a in assignments):
        core = layer.linear.core if layer.linear is not None and layer.linear.convolves else None
        if core is None or not positive.issuperset(layer.outputs) or not _normalises(rule):
            continue
        made = {v for e in layer.equations for v in e.outputs}
        inside = {*layer.equations, *relus}
        if made.isdisjoint(program.outputs) and all(inside.issuperset(program.consumers.get(v, ())) for v in made):
            found.add(core)
    return frozenset(found)


def _read_once(program: Program, value: Value) -> bool:
    return len(program.consumers.get(value, ())) == 1 and value not in program.outputs


_NORMALISING = (Zero, Epsilon, Norm, ZPlus, AlphaBeta, Gamma)


def _normalises(rule: Rule) -> bool:
    """Whether a rule hands out relevance in shares that stay bounded, or reads R / z instead of dividing."""
    if not isinstance(rule, _NORMALISING) or type(rule) not in _NORMALISING:
        return False
    return rule.bias == "absorb" and not rule.norm_scale and not callable(rule.epsilon)


def _splits_by_value(rule: Rule) -> bool:
    """Whether it is the epsilon rule: a summand gets its value times what it has in common with the other."""
    return type(rule) in (Zero, Epsilon, Norm)


def _hands_on(assignment: Assignment, behind: bool) -> tuple[bool, bool]:
    """Whether a layer hands nothing to an input that is 0, and nothing to one that is not positive.

    ``behind`` says whether nothing comes to its outputs where they are 0.
    """
    layer, rule = assignment.layer, assignment.rule
    if type(rule) is Pass and layer.rectifies:
        return behind, behind
    if type(rule) is Route and (layer.kind == "move" or is_window_pick(layer)):
        return behind, False  # an input has the value of the outputs that it went to
    return rule.proportional, False
