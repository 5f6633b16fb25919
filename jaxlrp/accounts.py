"""The ledger: where relevance went, layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from . import _compat
from ._pytree import PyTreeNode
from .composites import Assignment, Composite
from .errors import ConservationError, InputError
from .fold import Relevances, Step, at
from .graph import widen
from .rules import Rule, total
from .tables import table
from .targets import seed
from .transform import Forward, Setup


class Ledger(PyTreeNode):
    """Relevance in and out of every layer, from the output down to the input, and the names of what was lost.

    Every number is a sum over all positions (and over the batch; use `jax.vmap` for one ledger a sample). Prints as a
    table.

    Attributes:
        layers: names of the layers that relevance came through, in execution order.
        rules: their rules, printed.
        depths: 0 for the model's own layers, 1 for those inside of a recurrence (summed over its steps) or branch, ...
        arrived: ``[layers]`` relevance at each layer's outputs.
        handed: ``[layers]`` relevance that it gave to its inputs.
        losses: by name, ``[layers]``: ``"bias"``, ``"stabiliser"``, ``"dropped sign"`` (no contribution of the right
            sign to go to), ``"constant"`` (padding and other constants), ``"normalisation"``, ``"nonlinearity"``,
            ``"gradient"``, ``"decision"`` (numbers made of a comparison).
        size: ``[layers]`` sum of the absolute relevance at each layer's outputs; the scale for `check`.
        start: relevance of the output, summed (without outputs that do not depend on the input).
        end: relevance of the explained inputs, summed.
    """

    layers: tuple[str, ...] = struct.field(pytree_node=False)
    rules: tuple[str, ...] = struct.field(pytree_node=False)
    depths: tuple[int, ...] = struct.field(pytree_node=False)
    arrived: jax.Array
    handed: jax.Array
    losses: dict[str, jax.Array]
    size: jax.Array
    start: jax.Array
    end: jax.Array

    @property
    def unnamed(self) -> jax.Array:
        """``[layers]`` what arrived and was neither handed on nor lost by name: 0 up to rounding."""
        return self.arrived - self.handed - sum(self.losses.values(), jnp.zeros_like(self.arrived))

    @property
    def kept(self) -> jax.Array:
        """``[layers]`` share of the arrived relevance that was handed on."""
        return self.handed / jnp.where(self.arrived == 0, 1.0, self.arrived)

    def check(self, rtol: float = 1e-5) -> Ledger:
        """Raise unless every layer's account, and the whole, closes to ``rtol`` of the relevance that came through.

        Raises:
            ConservationError: names the layer with the largest hole.
            InputError: the ledger is being traced; check it outside `jax.jit`.
        """
        if not _compat.is_concrete(self.arrived):
            raise InputError("a ledger can be checked once its numbers are known: call check() outside jax.jit")
        if self.arrived.ndim != 1:
            raise InputError("check one ledger at a time: this one is a batch of them, made by jax.vmap")
        scale = np.maximum(np.asarray(self.size), float(abs(self.start)))
        holes = np.abs(np.asarray(self.unnamed))
        broken = ~(holes <= rtol * scale)  # NaN is broken too
        if broken.any():
            # NaN spreads towards the input: the layer nearest to the output made it
            bad = np.flatnonzero(~np.isfinite(holes))
            worst = int(bad[-1] if bad.size else np.argmax(np.where(broken, holes / scale, 0.0)))
            raise ConservationError(
                f"layer '{self.layers[worst]}' with rule {self.rules[worst]} received relevance "
                f"{self.arrived[worst]:.6g}, handed on {self.handed[worst]:.6g} and lost "
                f"{self.unnamed[worst]:.6g} without a name"
            )
        own = np.asarray(self.depths) == 0  # a recurrence's row holds what was lost inside
        lost = float(sum(np.sum(np.asarray(v)[own]) for v in self.losses.values()))
        hole = abs(float(self.start) - float(self.end) - lost)
        if not hole <= rtol * max(float(np.max(scale, initial=0.0)), 1e-30):
            raise ConservationError(f"{hole:.6g} of {float(self.start):.6g} went missing between layers")
        return self

    def __str__(self) -> str:
        if not _compat.is_concrete(self.arrived) or np.ndim(self.arrived) != 1:
            return f"Ledger of {len(self.layers)} layers, arrived={self.arrived}"
        names = [n for n, v in self.losses.items() if np.any(np.asarray(v) != 0)]
        head = ["layer", "rule", "in", "out", "kept", *names, "unnamed"]
        columns = [self.arrived, self.handed, self.kept, *(self.losses[n] for n in names), self.unnamed]
        numbers = [np.asarray(c) for c in columns]
        rows: list[Sequence[str]] = []
        for i in _downwards(self.depths):
            cells = [_share(c[i], self.arrived[i]) if k == 2 else _number(c[i]) for k, c in enumerate(numbers)]
            rows.append(["  " * self.depths[i] + self.layers[i], self.rules[i], *cells])
        own = np.asarray(self.depths) == 0
        sums = [_number(np.sum(np.asarray(self.losses[n])[own])) for n in names]
        share = 100 * float(self.end) / float(self.start) if float(self.start) else 0.0
        whole = [
            _number(self.start),
            _number(self.end),
            f"{share:.1f} %",
            *sums,
            _number(np.sum(numbers[-1][own])),
        ]
        return table(head, [*rows, ["output to input", "", *whole]], right=range(2, len(head)))


def _downwards(depths: Sequence[int], start: int = 0) -> Iterator[int]:
    """Rows from the output to the input, each recurrence before the layers inside of it."""
    if not depths:
        return
    heads = [i for i, depth in enumerate(depths) if depth == depths[0]]
    for head, end in reversed(list(itertools.pairwise([*heads, len(depths)]))):
        yield start + head
        yield from _downwards(depths[head + 1 : end], start + head + 1)


def _share(share: Any, arrived: Any) -> str:
    return "-" if arrived == 0 else f"{100 * share:.1f} %"


def _number(x: Any) -> str:
    x = float(x)
    return "0" if x == 0 else f"{x:.4g}"


def ledger(
    model: Any,
    composite: Composite | Rule | None = None,
    *,
    argnums: int | Sequence[int] | None = None,
    target: Any = None,
    has_aux: bool = False,
    check: bool = False,
    remat: bool = False,
) -> Callable[..., Ledger]:
    """As `lrp`, but the returned function gives a `Ledger`: where the relevance of each layer went.

    Example:
        >>> import jax.numpy as jnp, jaxlrp
        >>> account = jaxlrp.ledger(lambda x, w, b: x @ w + b, jaxlrp.Epsilon(0.0625))
        >>> print(account(jnp.array([1.0, 1.0]), jnp.array([[3.0], [1.0]]), jnp.array([4.0])))
        layer            rule                     in    out    kept   bias  stabiliser  unnamed
        ---------------  -----------------------  --  -----  ------  -----  ----------  -------
        dense            Epsilon(epsilon=0.0625)   8  3.969  49.6 %  3.969     0.06202        0
        output to input                            8  3.969  49.6 %  3.969     0.06202        0
    """
    default = target
    setup = Setup(model, composite, argnums, has_aux, check, remat)

    def account(*args: Any, target: Any = None, **kwargs: Any) -> Ledger:
        forward = setup.forward(args, kwargs)
        return balance(forward, seed(default if target is None else target, forward.output))[0]

    return account


class _Account(NamedTuple):
    """One layer's row."""

    arrived: jax.Array
    handed: jax.Array
    size: jax.Array
    losses: dict[str, jax.Array]


class _Bookkeeper:
    """Watches a fold and opens an account for every layer, that of a layer inside of a scan summed over the steps."""

    def see(self, assignment: Assignment, step: Step, relevance: Relevances) -> _Account:
        arrived, lost = _sum(step.arrived), _sum(step.lost)
        size = _sum(tuple(map(jnp.abs, step.arrived)))
        return _Account(arrived, _sum(step.handed) - lost, size, self._losses(assignment, step, arrived, lost))

    def join(self, seen: _Account) -> _Account:
        return jax.tree.map(lambda a: jnp.sum(a, axis=0), seen)

    @staticmethod
    def _losses(assignment: Assignment, step: Step, arrived: jax.Array, lost: jax.Array) -> dict[str, jax.Array]:
        if not assignment.layer.inputs:
            return {"decision": arrived}
        if not assignment.inside:
            losses = dict(assignment.rule.losses(step.call, *step.arrived))
        else:  # a recurrence loses what the layers inside lose, and what comes to constants: carries that start as such
            assert step.inner is not None
            losses = {"constant": step.inner.unplaced}
            within = [step.inner.seen.get(a.layer.name) for inner in assignment.inside for a in inner]
            for account in (a for a in within if a is not None):
                for name, loss in account.losses.items():
                    losses[name] = losses.get(name, 0.0) + loss
        if step.lost:
            losses["constant"] = losses.get("constant", 0.0) + lost
        return losses


def balance(forward: Forward, start: Any) -> tuple[Ledger, Relevances]:
    """The ledger of one fold, and the relevance of every value."""
    relevance, accounts, unplaced = forward.fold(start, _Bookkeeper())
    passed = [(a, depth) for a, depth in forward.assignments.every() if a.layer.name in accounts]
    rows = [accounts[a.layer.name] for a, _ in passed]
    names = list(dict.fromkeys(n for row in rows for n in row.losses))
    account = Ledger(
        layers=tuple(a.layer.name for a, _ in passed),
        rules=tuple(str(a.rule) for a, _ in passed),
        depths=tuple(depth for _, depth in passed),
        arrived=_stack([row.arrived for row in rows]),
        handed=_stack([row.handed for row in rows]),
        losses={n: _stack([row.losses.get(n, jnp.zeros(())) for row in rows]) for n in names},
        size=_stack([row.size for row in rows]),
        start=_sum(tuple(jax.tree.leaves(start))) - unplaced,
        end=_sum(tuple(at(relevance, v) for v in forward.traced.sources)),
    )
    return account, relevance


def _sum(parts: tuple[jax.Array, ...]) -> jax.Array:
    return sum((total(widen(p)) for p in parts), jnp.zeros(()))


def _stack(parts: list[jax.Array]) -> jax.Array:
    return jnp.stack(parts) if parts else jnp.zeros((0,))
