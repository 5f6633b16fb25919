"""Step 4: walk the layers backwards and fold relevance through their rules."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ._pytree import Distinct
from .composites import Assignment, Assignments
from .errors import RuleError
from .graph import Cond, Program, Scan, Value, read, wide_dtype, widen
from .layers import Layer, forks
from .remat import Blocks
from .rules import Constant, Known, LayerByLayer, LayerCall
from .rules._base import when

_FAR = 1  # layers without a product of their own that may lie between a product and what waits for it

Relevances = dict[Value, jax.Array]
Seen = dict[str, Any]  # what a `Watch` saw, by layer name


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer's part in a fold, as a `Watch` wants to see it."""

    arrived: tuple[jax.Array, ...]  # relevance at the layer's outputs
    handed: tuple[jax.Array, ...]  # relevance that its rule gave to its inputs
    lost: tuple[jax.Array, ...]  # what of it went to inputs that count as constants
    call: LayerCall
    inner: Folded | None = None  # what happened inside of a recurrence or branch


class Folded(NamedTuple):
    """What a fold gives."""

    relevance: Relevances  # of every value that it reached
    seen: Seen  # what the `Watch` kept of each layer
    unplaced: jax.Array  # relevance of outputs that are constants, summed: it has nowhere to go


class _Since(NamedTuple):
    """The last product that relevance came through, for what has to wait for relevance."""

    product: jax.Array | None
    layers: int  # how many without a product of their own came after it

    def behind(self, layer: Layer, product: jax.Array | None) -> _Since:
        """As the layers below it see it."""
        if product is not None:
            return _Since(product, 0)
        layers = self.layers + (layer.kind not in ("activation", "move", "pick"))
        return _Since(self.product if layers <= _FAR else None, layers)


class Watch(Protocol):
    """Looks on while relevance is folded, and keeps what it wants of every layer."""

    def see(self, assignment: Assignment, step: Step, relevance: Relevances) -> Any:
        """What to keep of a layer (a pytree of arrays), once all relevance has come to its inputs."""

    def join(self, seen: Any) -> Any:
        """What to keep of a layer inside of a scan, given what was kept of every step, stacked."""


def fold(
    program: Program,
    assignments: Assignments,
    env: Mapping[Value, Any],
    seeds: Sequence[Any],
    known: Known,
    watch: Watch | None = None,
    blocks: Blocks | None = None,
) -> Folded:
    """Relevance of every value that relevance reaches, given that of the program's outputs.

    Relevance adds up where a value has several readers: when a layer's turn comes, all its readers had theirs.

    Args:
        program: the traced model.
        assignments: its layers in execution order, with their rules.
        env: the values of one forward pass.
        seeds: relevance of the outputs, one array for each of ``program.outputs``.
        known: what rules may rely on.
        watch: sees every layer that relevance came through.
        blocks: what is to be run again when relevance comes to it.

    """
    relevance: Relevances = {}
    per_unit: dict[Value, jax.Array | None] = {}  # relevance over value, where rules know that without dividing
    since: dict[Value, _Since] = {}
    shared = forks(a.layer for a in assignments) if blocks else frozenset()
    unplaced = jnp.zeros(())
    for value, start in zip(program.outputs, seeds, strict=True):
        placed = value.carries and value not in known.constant
        if placed:
            _add(relevance, value, widen(start))
        if start is not None:  # a sum in any case, so that branches that place different outputs give the same type
            unplaced += jnp.sum(jnp.zeros_like(widen(start)) if placed else widen(start))
    steps: list[tuple[Assignment, Step]] = []
    kept, inside = env, None
    for assignment in reversed(assignments):
        layer = assignment.layer
        if not any(v in relevance for v in layer.outputs):
            continue
        arrived = tuple(relevance.get(v, _nothing(env, v)) for v in layer.outputs)
        units = tuple(per_unit.get(v) if v in relevance else r for v, r in zip(layer.outputs, arrived, strict=True))
        after = next((since[v] for v in layer.outputs if v in since), _Since(None, 0))
        block = (blocks or {}).get(layer.equations[-1])
        if block is not inside:
            inside, env = block, kept
            if block is not None:
                first = arrived[0], units[0]  # a rule may read either
                (arrived_0, unit_0), given = when(first, [kept[v] for v in block.inputs])
                arrived, units = (arrived_0, *arrived[1:]), (unit_0, *units[1:])
                env = ChainMap(block.evaluate(given, once=shared, frugal=known.frugal), kept)  # type: ignore[arg-type]
        call = LayerCall(layer, env, known, arrived, units, after.product)
        inner, handed_per = None, ()
        if not layer.inputs:  # a number made of a comparison has no input that carries relevance: it ends here
            handed = ()
        elif isinstance(assignment.rule, LayerByLayer):
            handed, inner = _fold_inside(assignment, env, arrived, known, watch)
            after = _Since(None, 0)
        else:
            handed, handed_per, product = assignment.rule.hand(call, *arrived)
            after = after.behind(layer, product)
        _check(layer.name, str(assignment.rule), layer.inputs, handed)
        lost = []
        for value, part, per in zip(layer.inputs, handed, handed_per or (None,) * len(handed), strict=True):
            if value in known.constant:
                lost.append(part)
                continue
            before = per_unit.get(value)
            if value not in relevance:
                per_unit[value] = per
            else:  # known as long as it is known of all
                per_unit[value] = None if before is None or per is None else before + per
            since[value] = after
            _add(relevance, value, part)
        steps.append((assignment, Step(arrived, tuple(handed), tuple(lost), call, inner)))
    seen: Seen = {}
    if watch is not None:
        for assignment, step in steps:
            seen[assignment.layer.name] = watch.see(assignment, step, relevance)
            seen.update(step.inner.seen if step.inner else {})
    return Folded(relevance, seen, unplaced)


# -- recurrences and branches -----------------------------------------------------------------------------------------


def _fold_inside(
    assignment: Assignment, env: Mapping[Value, Any], arrived: tuple[jax.Array, ...], known: Known, watch: Watch | None
) -> tuple[tuple[jax.Array, ...], Folded]:
    layer = assignment.layer
    (equation,) = layer.equations
    given = dict(zip(layer.outputs, arrived, strict=True))
    through = _fold_scan if isinstance(equation, Scan) else _fold_cond
    handed, seen, unplaced = through(equation, assignment.inside, env, given, known, watch)  # type: ignore[arg-type]
    relevance: Relevances = {}
    for value, part in zip(equation.inputs, handed, strict=True):  # an operand may be given twice
        if value.carries:
            _add(relevance, value, part)
        elif part is not None:  # a carry that starts as a constant
            unplaced += jnp.sum(part)
    return tuple(relevance[v] for v in layer.inputs), Folded(relevance, seen, unplaced)


def _fold_scan(
    scan: Scan,
    inside: Sequence[Assignments],
    env: Mapping[Value, Any],
    arrived: Relevances,
    known: Known,
    watch: Watch | None,
) -> tuple[list[Any], Seen, jax.Array]:
    """Steps backwards: each is replayed from the carries that it began with, and folded by its own layers.

    Relevance of a carry goes to the step before, that of a constant adds up over the steps.
    """
    step = scan.step
    consts, carries, stacked = scan.split(step.inputs)
    values, _, given = scan.split([jnp.asarray(read(env, v), v.dtype) for v in scan.inputs])
    starts = tuple(env[v] for v in scan.starts)
    outputs = _at_all(arrived, scan.outputs, env)
    once = forks(a.layer for a in inside[0])

    def back(after: Any, now: Any) -> Any:
        (to_carries, to_consts), (start, x, to_outputs) = after, now
        inner = step.evaluate((*values, *start, *x), once=once)
        relevance, seen, unplaced = fold(step, inside[0], inner, (*to_carries, *to_outputs), known, watch)
        added = (None if r is None else r + at(relevance, v) for r, v in zip(to_consts, consts, strict=True))
        to_stacked = _at_all(relevance, stacked, inner)
        # many layers read one value, or hand on what came to them: that is stacked once
        return (_at_all(relevance, carries, inner), tuple(added)), (Distinct((to_stacked, seen)), unplaced)

    first = (outputs[: scan.carries], _at_all({}, consts, dict(zip(consts, values, strict=True))))
    over = (starts, given, outputs[scan.carries :])
    (to_init, to_consts), (kept, unplaced) = jax.lax.scan(
        back, first, over, length=scan.params["length"], reverse=not scan.params["reverse"]
    )
    to_stacked, seen = kept.tree
    joined = {name: watch.join(s) for name, s in seen.items()} if watch is not None else {}
    return [*to_consts, *to_init, *to_stacked], joined, jnp.sum(unplaced)


def _fold_cond(
    cond: Cond,
    inside: Sequence[Assignments],
    env: Mapping[Value, Any],
    arrived: Relevances,
    known: Known,
    watch: Watch | None,
) -> tuple[list[Any], Seen, jax.Array]:
    """The branch that was taken is replayed and folded by its own layers; at those of the others nothing arrives."""
    index, *operands = (read(env, v) for v in cond.inputs)
    operands = [jnp.asarray(x, v.dtype) for x, v in zip(operands, cond.inputs[1:], strict=True)]
    seeds = _at_all(arrived, cond.outputs, env)

    def folder(branch: Program, assignments: Assignments) -> Callable[..., Any]:
        once = forks(a.layer for a in assignments)

        def back(operands: Any, seeds: Any) -> Any:
            inner = branch.evaluate(operands, once=once)
            relevance, seen, unplaced = fold(branch, assignments, inner, seeds, known, watch)
            return _at_all(relevance, branch.inputs, inner), seen, unplaced

        return back

    folders = [folder(b, a) for b, a in zip(cond.branches, inside, strict=True)]
    kept = [jax.eval_shape(back, operands, seeds)[1] for back in folders]
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), {k: v for seen in kept for k, v in seen.items()})

    def filled(back: Callable[..., Any]) -> Callable[..., Any]:
        def run(operands: Any, seeds: Any) -> Any:
            handed, seen, unplaced = back(operands, seeds)
            return handed, {**nothing, **seen}, unplaced

        return run

    handed, seen, unplaced = jax.lax.switch(index, [filled(back) for back in folders], operands, seeds)
    return [None, *handed], seen, unplaced


# -- values that count as constants -----------------------------------------------------------------------------------


def constant_values(assignments: Assignments, given: frozenset[Value] = frozenset()) -> frozenset[Value]:
    """The values that are made only of what `Constant` rules declared constant (and of true constants)."""
    constant = set(given)
    for assignment in assignments:
        layer = assignment.layer
        if isinstance(assignment.rule, Constant):
            constant.update(layer.outputs)
        elif isinstance(assignment.rule, LayerByLayer):
            inside = _constant_in_scan if isinstance(layer.equations[0], Scan) else _constant_in_cond
            constant.update(inside(layer.equations[0], assignment.inside, constant))  # type: ignore[arg-type]
        elif layer.inputs and constant.issuperset(layer.inputs):
            constant.update(layer.outputs)
    return frozenset(constant)


def _constant_in_scan(scan: Scan, inside: Sequence[Assignments], constant: set[Value]) -> set[Value]:
    stay = [not v.carries or v in constant for v in scan.inputs]
    while True:  # a carry is constant if it starts so and a step keeps it so
        given = frozenset(v for v, yes in zip(scan.step.inputs, stay, strict=True) if yes and v.carries)
        found = constant_values(inside[0], given)
        after = [not v.carries or v in found for v in scan.step.outputs]
        carries = slice(scan.consts, scan.consts + scan.carries)
        kept = [a and b for a, b in zip(stay[carries], after, strict=False)]
        if kept == stay[carries]:
            ends = [*kept, *after[scan.carries :]]
            return {*found, *(v for v, yes in zip(scan.outputs, ends, strict=True) if yes and v.carries)}
        stay[carries] = kept


def _constant_in_cond(cond: Cond, inside: Sequence[Assignments], constant: set[Value]) -> set[Value]:
    found: set[Value] = set()
    ends = [True] * len(cond.outputs)
    for branch, assignments in zip(cond.branches, inside, strict=True):
        pairs = zip(cond.inputs[1:], branch.inputs, strict=True)
        found |= constant_values(assignments, frozenset(b for v, b in pairs if v in constant))
        ends = [e and (not v.carries or v in found) for e, v in zip(ends, branch.outputs, strict=True)]
    return {*found, *(v for v, yes in zip(cond.outputs, ends, strict=True) if yes and v.carries)}


# -- small things -----------------------------------------------------------------------------------------------------


def at(relevance: Mapping[Value, jax.Array], value: Value) -> jax.Array:
    """Relevance of a value: zero where none arrived."""
    return relevance.get(value, jnp.zeros(value.shape, wide_dtype(value.dtype)))


def _at_all(relevance: Relevances, values: Sequence[Value], env: Mapping[Value, Any]) -> tuple[jax.Array | None, ...]:
    """Relevance of each value that can carry any; None, which takes no memory, in the place of weights and masks."""
    return tuple(relevance.get(v, _nothing(env, v)) if v.carries else None for v in values)


def _nothing(env: Mapping[Value, Any], value: Value) -> jax.Array:
    """Zeros made from the value itself: scans and branches ask that they are sharded over devices as it is."""
    return jnp.zeros_like(read(env, value), wide_dtype(value.dtype))


def _add(relevance: Relevances, value: Value, part: jax.Array) -> None:
    part = part.astype(wide_dtype(value.dtype))
    relevance[value] = relevance[value] + part if value in relevance else part


def _check(layer: str, rule: str, inputs: Sequence[Value], handed: Any) -> None:
    got = [jnp.shape(r) for r in handed] if isinstance(handed, (tuple, list)) else jnp.shape(handed)
    want = [v.shape for v in inputs]
    if got != want:
        raise RuleError(f"rule {rule} of layer '{layer}' must return one array per input, of shapes {want}, not {got}")
