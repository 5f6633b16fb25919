"""Layers: the steps of a model that rules handle as a whole.

A *layer* is a group of equations: a convolution with its bias and the BatchNorm behind it, a GELU of nine operations, a
LayerNorm of fifteen. `jaxlrp.lattice` finds them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from .graph import Equation, Program, Value
from .linear import LinearSpec

KINDS = (
    "linear",
    "scale",
    "sum",
    "move",
    "pick",
    "activation",
    "normalization",
    "softmax",
    "product",
    "custom",
    "recurrence",
    "branch",
)


@dataclasses.dataclass(eq=False)
class Body:
    """What a recurrence or a branch runs inside: the layers of one step, or of one alternative.

    Attributes:
        program: its operations.
        layers: its layers, in execution order.
        outside: for its inputs and outputs, the value outside that they are part of.
    """

    program: Program
    layers: list[Layer]
    outside: dict[Value, Value]


@dataclasses.dataclass(eq=False)
class Layer:
    """One step of the model that a rule handles as a whole.

    Attributes:
        name: unique path, ``"Block_0/Conv_0"``; the second use of a shared module is ``"Block_0/Conv_0:2"``.
        kind: one of `KINDS`.
        op: the finer name: ``"conv"``, ``"dense"``, ``"relu"``, ``"add"``, ``"avg_pool"``, ``"matmul"``, ...
        inputs: the values that relevance flows to.
        outputs: the values that relevance comes from.
        equations: what the layer computes, in order.
        linear: how a linear layer is taken apart into inputs, weights and bias (None for other kinds).
        final: whether an output of the model is an output of this layer.
        source: the user's source line.
        rule: the rule that the model itself declared for this layer (`jaxlrp.custom_layer`).
        rectifies: whether an activation is 0 wherever its input is not positive (relu, relu6).
        is_relu: whether an activation gives its input back where that is positive, and else 0.
        gates: of a product, which inputs gate the others: those that come out of a squashing function.
        moves: of a normalisation, what rearranges its result before gain and shift.
        bodies: for a recurrence the layers of one step, for a branch those of every alternative.
    """

    name: str
    kind: str
    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    equations: tuple[Equation, ...]
    linear: LinearSpec | None = None
    final: bool = False
    source: str = ""
    rule: Any = None
    rectifies: bool = False
    is_relu: bool = False
    gates: tuple[int, ...] = ()
    moves: tuple[Equation, ...] = ()
    bodies: tuple[Body, ...] = ()

    def __repr__(self) -> str:
        shapes = ", ".join(map(repr, self.inputs)) + " -> " + ", ".join(map(repr, self.outputs))
        return f"Layer({self.name!r}, {self.kind}/{self.op}, {shapes})"


def every_layer(layers: Iterable[Layer], depth: int = 0) -> Iterator[tuple[Layer, int]]:
    """Every layer with its depth, those inside of recurrences and branches after the one they are inside of."""
    for layer in layers:
        yield layer, depth
        for body in layer.bodies:
            yield from every_layer(body.layers, depth + 1)


def forks(layers: Iterable[Layer]) -> frozenset[Value]:
    """The values that several of these layers read."""
    readers = collections.Counter(v for layer in layers for v in layer.inputs)
    return frozenset(v for v, n in readers.items() if n > 1)
