"""Composites: which layer gets which rule.

A `Composite` is a list of entries ``(selector, rule)`` behind the defaults for every kind of layer; later entries
override earlier ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax

from .errors import NoRuleError, RuleError
from .layers import Layer, every_layer
from .rules import Constant, EqualShare, HoldScale, LayerByLayer, Norm, Pass, Route, Rule, SignalTakeAll, Zero
from .selectors import Selector, Where, kind
from .tables import table

#: What a layer gets that no entry speaks of. Linear layers have no default: which rule they get is what a composite
#: is for.
DEFAULTS: tuple[tuple[Selector, Rule], ...] = (
    (kind("activation"), Pass()),
    (kind("scale"), Pass()),
    (kind("sum"), Norm()),
    (kind("move"), Route()),
    (kind("pick"), Route()),
    (kind("product"), EqualShare()),
    (kind("gate"), SignalTakeAll()),
    (kind("normalization"), HoldScale()),
    (kind("softmax"), Zero()),
    (kind("recurrence"), LayerByLayer()),
    (kind("branch"), LayerByLayer()),
)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which rule a layer got, which entry of the composite gave it, and the same for layers inside of a recurrence."""

    layer: Layer
    rule: Rule
    reason: str
    inside: tuple[Assignments, ...] = ()


class Assignments(tuple[Assignment, ...]):
    """The rule of every layer; prints as a table."""

    def every(self, depth: int = 0) -> Iterator[tuple[Assignment, int]]:
        """Every assignment with its depth, those inside of a recurrence or branch after the one they are inside of."""
        for assignment in self:
            yield assignment, depth
            for inner in assignment.inside:
                yield from inner.every(depth + 1)

    def __str__(self) -> str:
        rows = [
            ("  " * depth + a.layer.name, f"{a.layer.kind}/{a.layer.op}", str(a.rule), a.reason)
            for a, depth in self.every()
        ]
        return table(("layer", "kind", "rule", "because of"), rows)


@jax.tree_util.register_pytree_node_class
class Composite:
    """Rules for a whole model: entries ``(selector, rule)``, later ones override earlier ones.

    A selector is `kind`, `name`, `first`, `last` or any function from a `Layer` to bool. Layers that no entry speaks
    of take their kind's default (relevance passes activations, follows moves, is shared by sums in proportion); a
    linear layer without an entry is an error. Composites are pytrees whose leaves are the numbers of their rules.

    Example:
        >>> import jaxlrp
        >>> composite = jaxlrp.Composite(
        ...     (jaxlrp.kind("linear"), jaxlrp.Epsilon()),
        ...     (jaxlrp.kind("conv"), jaxlrp.Gamma(0.25)),
        ... )
        >>> print(composite)
        Composite(
          kind("linear") => Epsilon()
          kind("conv")   => Gamma()
        )
    """

    def __init__(self, *entries: tuple[Selector | Callable[[Layer], bool], Rule]):
        self.entries: tuple[tuple[Selector, Rule], ...] = tuple(map(_entry, entries))

    @classmethod
    def uniform(cls, rule: Rule) -> Composite:
        """One rule for every layer with weights; all others take their defaults."""
        return cls((kind("scale"), rule), (kind("linear"), rule))

    def extend(self, *entries: tuple[Selector | Callable[[Layer], bool], Rule]) -> Composite:
        """This composite with more entries, which override it."""
        return Composite(*self.entries, *entries)

    def assign(self, layers: Sequence[Layer]) -> Assignments:
        """Find each layer's rule.

        Raises:
            UnknownLayerError: a name or kind matches nothing.
            NoRuleError: a layer is left without a rule.
        """
        every = [layer for layer, _ in every_layer(layers)]
        found: dict[Layer, tuple[Rule, str]] = {}
        for entries, default in ((DEFAULTS, True), (self.entries, False)):
            for selector, rule in entries:
                chosen = selector.select(every)
                found.update(
                    (layer, (rule, "default" if default else str(selector)))
                    for layer, yes in zip(every, chosen, strict=True)
                    if yes
                )
        return Assignments(_assignment(layer, found) for layer in layers)

    def __repr__(self) -> str:
        if not self.entries:
            return "Composite()"
        width = max(len(str(s)) for s, _ in self.entries)
        lines = [f"  {s!s:<{width}} => {r}" for s, r in self.entries]
        return "Composite(\n" + "\n".join(lines) + "\n)"

    def tree_flatten(self) -> tuple[Any, Any]:
        """Rules are children, selectors are static."""
        return tuple(r for _, r in self.entries), tuple(s for s, _ in self.entries)

    @classmethod
    def tree_unflatten(cls, selectors: Any, rules: Any) -> Composite:
        """The inverse of `tree_flatten`."""
        composite = object.__new__(cls)
        composite.entries = tuple(zip(selectors, rules, strict=True))
        return composite


def _assignment(layer: Layer, found: Mapping[Layer, tuple[Rule, str]]) -> Assignment:
    rule, reason = found.get(layer, (None, ""))
    if layer.rule is not None:
        rule, reason = layer.rule, "custom_layer" if layer.equations[0].custom else "register_rule"
    elif layer.op == "softmax" and layer.final and (reason == "default" or isinstance(rule, Constant)):
        # Relevance starts as the predicted probabilities and goes to the logits unchanged.
        rule, reason = Pass(), "final softmax"
    if rule is None:
        raise NoRuleError(
            f"no rule for layer '{layer.name}' ({layer.kind}/{layer.op}, {layer.source}); "
            f'add an entry such as (jaxlrp.kind("{layer.kind}"), jaxlrp.Epsilon())'
        )
    if isinstance(rule, LayerByLayer) and not layer.bodies:
        raise RuleError(
            f"LayerByLayer() is for recurrences and branches; layer '{layer.name}' ({layer.kind}/{layer.op}) has no "
            "layers inside"
        )
    bodies = layer.bodies if isinstance(rule, LayerByLayer) else ()
    inside = (Assignments(_assignment(inner, found) for inner in body.layers) for body in bodies)
    return Assignment(layer, rule, reason, tuple(inside))


def _entry(entry: Any) -> tuple[Selector, Rule]:
    if not (isinstance(entry, tuple) and len(entry) == 2):
        raise TypeError(f"a composite's entries are pairs (selector, rule), not {entry!r}")
    selector, rule = entry
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise TypeError(f"{rule.__name__} is a class; give an instance: {rule.__name__}(...)")
    if not isinstance(rule, Rule):
        raise TypeError(f"{rule!r} is no rule; give one such as jaxlrp.Epsilon()")
    if isinstance(selector, Selector):
        return selector, rule
    if callable(selector):
        return Where(cast(Callable[[Layer], bool], selector)), rule
    raise TypeError(f"{selector!r} selects no layers; use kind(...), name(...), first(...), last(...) or a function")
