"""Blocks of a model that are run again on the way back, so that their values need not be kept.

What is kept of a block is what it reads from outside. A model's own blocks are those that it wraps in `jax.checkpoint`
(``nn.remat``); others are cut here, where little is alive (Chen et al., 2016, "Training deep nets with sublinear memory
cost").
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .graph import Equation, Program, Value
from .layers import Layer

Blocks = Mapping[Equation, Program]  # equation -> the block that it belongs to

_MOST = 64  # blocks to try


def own_blocks(program: Program) -> Blocks:
    """The blocks that the model marked itself."""
    marked = [e for e in program.equations if e.block is not None]
    return _blocks([list(run) for _, run in itertools.groupby(marked, key=lambda e: e.block)])


def find_blocks(program: Program, layers: Sequence[Layer]) -> Blocks:
    """Cut a program into blocks such that what lies between them and the largest of them take little memory together.

    For every number of blocks, cuts are put where equally much is made between them, and moved to where least is alive.
    No layer is cut apart.
    """
    equations = program.equations
    made = [sum(_size(v) for v in e.outputs) for e in equations]
    until = list(itertools.accumulate(made))
    alive = _alive(program)
    place = {e: i for i, e in enumerate(equations)}
    whole = set[int]()  # no cut before these: a layer goes on
    for layer in layers:
        places = sorted(place[e] for e in layer.equations)
        whole.update(range(places[0] + 1, places[-1] + 1))
    allowed = [i for i in range(1, len(equations)) if i not in whole]

    def cut(n: int) -> list[int]:
        cuts = []
        for k in range(1, n):
            low, high = (bisect.bisect_left(until, (k + side) * until[-1] / n) for side in (-0.5, 0.5))
            near = allowed[bisect.bisect_left(allowed, low) : bisect.bisect_right(allowed, high)]
            if near:
                cuts.append(min(near, key=alive.__getitem__))
        return sorted(set(cuts))

    def memory(cuts: Sequence[int]) -> int:
        ends = [0, *cuts, len(equations)]
        return sum(alive[i] for i in cuts) + max(sum(made[a:b]) for a, b in itertools.pairwise(ends))

    if not allowed:
        return {}
    best = min((cut(n) for n in range(1, _MOST + 1)), key=memory)
    return _blocks([equations[a:b] for a, b in itertools.pairwise([0, *best, len(equations)])])


def _alive(program: Program) -> list[int]:
    """How many bytes that an equation made are still to be read, before every equation."""
    last = {v: i for i, e in enumerate(program.equations) for v in e.inputs}
    last.update(dict.fromkeys(program.outputs, len(program.equations)))
    change = [0] * (len(program.equations) + 2)
    for i, equation in enumerate(program.equations):
        for value in equation.outputs:
            change[i + 1] += _size(value)
            change[last.get(value, i) + 1] -= _size(value)
    return list(itertools.accumulate(change))


def _size(value: Value) -> int:
    """Bytes; what does not depend on the input is made of parameters and stays."""
    return math.prod(value.shape) * np.dtype(value.dtype).itemsize if value.depends else 0


def _blocks(runs: Sequence[list[Equation]]) -> Blocks:
    found: dict[Equation, Program] = {}
    for run in runs:
        made: set[Any] = {v for e in run for v in e.outputs}
        read = dict.fromkeys(v for e in run for v in e.inputs if v not in made and v.constant is None)
        found.update(dict.fromkeys(run, Program(run, tuple(read), ())))
    return found
