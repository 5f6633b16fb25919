"""Where relevance can arrive at all, found before any number is known.

Most rules hand an input relevance in proportion to the input, so that what is 0 gets none. Behind a relu much is 0: if
such rules alone read what a relu hands on, relevance comes to its input only where that is positive, and a rule such as
gamma, which treats positive and negative outputs apart, needs half of its work.
"""

from __future__ import annotations

from .composites import Assignment, Assignments
from .graph import Program, Value
from .remat import Blocks
from .rules import Pass, Route
from .rules._pool import is_window_pick


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


def _hands_on(assignment: Assignment, behind: bool) -> tuple[bool, bool]:
    """Whether a layer hands nothing to an input that is 0, and nothing to one that is not positive.

    ``behind`` says whether nothing comes to its outputs where they are 0.
    """
    layer, rule = assignment.layer, assignment.rule
    if type(rule) is Pass and layer.rectifies:
        return behind, behind
    if type(rule) is Route and (layer.kind == "move" or is_window_pick(layer.equations[0])):
        return behind, False  # an input has the value of the outputs that it went to
    return rule.proportional, False
