"""Step 4: replay the forward pass, then walk the layers backwards and fold relevance through their rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .composites import Assignments
from .errors import RuleError
from .graph import Env, Program, Value, wide_dtype, widen
from .rules import LayerCall

Relevances = dict[Value, jax.Array]


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer's part in a fold, as the ledger wants to see it."""

    arrived: tuple[jax.Array, ...]  # relevance at the layer's outputs
    handed: tuple[jax.Array, ...]  # relevance that its rule gave to its inputs
    call: LayerCall


def fold(
    program: Program,
    assignments: Assignments,
    env: Env,
    seeds: Sequence[jax.Array],
    nonnegative: frozenset[Value] = frozenset(),
    steps: dict[str, Step] | None = None,
) -> Relevances:
    """Relevance of every value that relevance reaches, given that of the program's outputs.

    Relevance adds up where a value has several readers: when a layer's turn comes, all its readers had theirs.

    Args:
        program: the traced model.
        assignments: its layers in execution order, with their rules.
        env: the values of one forward pass.
        seeds: relevance of the outputs, one array for each of ``program.outputs``.
        nonnegative: values that are known never to be negative, which saves rules half of their work.
        steps: if given, filled with what happened at each layer, by name.
    """
    relevance: Relevances = {}
    for value, start in zip(program.outputs, seeds, strict=True):
        if value.carries:
            _add(relevance, value, widen(start))
    for layer, rule in ((a.layer, a.rule) for a in reversed(assignments)):
        if not any(v in relevance for v in layer.outputs):
            continue
        arrived = tuple(relevance.get(v, _zeros(v)) for v in layer.outputs)
        call = LayerCall(layer, env, nonnegative.issuperset(layer.inputs))
        # a number made of a comparison has no input that carries relevance: it ends here
        handed = rule.fold(call, *arrived) if layer.inputs else ()
        _check(layer.name, str(rule), layer.inputs, handed)
        for value, part in zip(layer.inputs, handed, strict=True):
            _add(relevance, value, part)
        if steps is not None:
            steps[layer.name] = Step(arrived, tuple(handed), call)
    return relevance


def at(relevance: Mapping[Value, jax.Array], value: Value) -> jax.Array:
    """Relevance of a value: zero where none arrived."""
    return relevance.get(value, _zeros(value))


def _zeros(value: Value) -> jax.Array:
    return jnp.zeros(value.shape, wide_dtype(value.dtype))


def _add(relevance: Relevances, value: Value, part: jax.Array) -> None:
    part = part.astype(wide_dtype(value.dtype))
    relevance[value] = relevance[value] + part if value in relevance else part


def _check(layer: str, rule: str, inputs: Sequence[Value], handed: Any) -> None:
    got = [jnp.shape(r) for r in handed] if isinstance(handed, (tuple, list)) else jnp.shape(handed)
    want = [v.shape for v in inputs]
    if got != want:
        raise RuleError(f"rule {rule} of layer '{layer}' must return one array per input, of shapes {want}, not {got}")
