"""Composites: which layer gets which rule.

A `Composite` is a list of entries ``(selector, rule)`` behind the defaults for every kind of layer; later entries
override earlier ones. The presets at the end are nothing but such lists.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax

from .errors import NoRuleError, RuleError, UnknownLayerError
from .graph import Scan, Value
from .layers import KINDS, Layer, every_layer
from .rules import (
    AlphaBeta,
    Constant,
    DeconvNetReLU,
    Epsilon,
    EqualShare,
    Flat,
    Gamma,
    Gradient,
    GuidedReLU,
    HoldScale,
    LayerByLayer,
    Norm,
    Pass,
    Route,
    Rule,
    SignalTakeAll,
    ZBox,
    Zero,
    ZPlus,
)
from .rules._split import Bias
from .tables import table

# -- selectors ---------------------------------------------------------------------------------------------------------

#: Finer names that `kind` understands beside the kinds themselves; activations go by their function's name too.
OPS = (
    *(
        "conv",
        "dense",
        "add",
        "sub",
        "sum",
        "mean",
        "avg_pool",
        "sum_pool",
        "cumsum",
        "scatter_add",
        "max_pool",
    ),
    *(
        "min_pool",
        "max",
        "min",
        "sort",
        "top_k",
        "relu",
        "gelu",
        "matmul",
        "mul",
        "div",
        "gate",
        "prod",
        "scan",
        "cond",
        "softmax",
        "log_softmax",
    ),
)


class Selector:
    """Chooses layers; everything in `Composite` that is not a plain predicate is one of these."""

    def select(self, layers: Sequence[Layer]) -> list[bool]:
        """For each layer, whether it is chosen."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Kind(Selector):
    """Layers of a kind or operation; see `kind`."""

    kind: str

    def select(self, layers: Sequence[Layer]) -> list[bool]:
        """By kind or op."""
        found = [self.kind in ("*", layer.kind, layer.op) for layer in layers]
        known = {*KINDS, *OPS}
        if self.kind not in known and not any(found) and self.kind != "*":
            here = {layer.op for layer in layers}
            raise UnknownLayerError(f"no kind or operation {self.kind!r}{_closest(self.kind, known | here)}")
        return found

    def __str__(self) -> str:
        return f'kind("{self.kind}")'


@dataclasses.dataclass(frozen=True)
class Name(Selector):
    """Layers by the glob of their name; see `name`."""

    pattern: str

    def select(self, layers: Sequence[Layer]) -> list[bool]:
        """By name; no match at all is an error."""
        found = match_names(self.pattern, [layer.name for layer in layers])
        if not any(found):
            names = [layer.name for layer in layers]
            hint = _within(self.pattern, names) or _absorbed(self.pattern, layers) or _closest(self.pattern, names)
            raise UnknownLayerError(f"no layer is called {self.pattern!r}{hint}")
        return found

    def __str__(self) -> str:
        return f'name("{self.pattern}")'


@dataclasses.dataclass(frozen=True)
class Extreme(Selector):
    """Layers nearest to the input or output among their kind; see `first` and `last`."""

    kind: str
    end: str

    def select(self, layers: Sequence[Layer]) -> list[bool]:
        """Those that no other layer of the kind lies before (or behind) in data flow."""
        chosen = Kind(self.kind).select(layers)
        backwards = self.end == "last"
        order = [i for i, layer in enumerate(layers) if not layer.bodies]  # the layers inside stand for these
        outside, carried = _flow_of_bodies(layers)
        behind: set[Value] = set()  # values on the far side of a layer of this kind
        while True:
            known = len(behind)
            found = [False] * len(layers)
            for i in reversed(order) if backwards else order:
                near, far = ({_outermost(v, outside) for v in vs} for vs in (layers[i].inputs, layers[i].outputs))
                near, far = (far, near) if backwards else (near, far)
                hidden = not behind.isdisjoint(near)
                found[i] = chosen[i] and not hidden
                if chosen[i] or hidden:
                    behind.update(far)
            if not backwards:
                behind.update(after for before, after in carried if before in behind)  # in the next step
            if len(behind) == known:
                return found

    def __str__(self) -> str:
        return f'{self.end}("{self.kind}")'


def _flow_of_bodies(layers: Sequence[Layer]) -> tuple[dict[Value, Value], list[tuple[Value, Value]]]:
    """Which values inside of recurrences and branches are which outside, and from where to where carries go."""
    outside: dict[Value, Value] = {}
    carried: list[tuple[Value, Value]] = []
    for layer in layers:
        for body in layer.bodies:
            outside.update(body.outside)
            if isinstance(scan := layer.equations[0], Scan):
                # a carry comes from outside in the first step, and from the step before where it starts as a constant
                for start, end in zip(scan.split(scan.step.inputs)[1], scan.step.outputs, strict=False):
                    if not outside[start].carries:
                        del outside[start]
                        carried.append((end, start))
    return outside, [(_outermost(before, outside), after) for before, after in carried]


def _outermost(value: Value, outside: Mapping[Value, Value]) -> Value:
    while value in outside:
        value = outside[value]
    return value


@dataclasses.dataclass(frozen=True)
class Where(Selector):
    """Layers for which a function is true."""

    predicate: Callable[[Layer], bool]

    def select(self, layers: Sequence[Layer]) -> list[bool]:
        """By asking the function."""
        return [bool(self.predicate(layer)) for layer in layers]

    def __str__(self) -> str:
        return getattr(self.predicate, "__name__", str(self.predicate))


def kind(name: str) -> Selector:
    """Layers of a kind (``"linear"``, ``"sum"``, ...) or operation (``"conv"``, ``"relu"``, ...); ``"*"`` is all."""
    return Kind(name)


def name(pattern: str) -> Selector:
    """Layers whose name matches: ``*`` within a path component, ``**`` across, ``"**/head"`` also matches ``"head"``.

    A pattern that matches no layer of the model is an error that shows the nearest names.
    """
    return Name(pattern)


def first(kind: str) -> Selector:
    """The layers of a kind that are nearest to the input in data flow: no other of the kind lies before them."""
    return Extreme(kind, "first")


def last(kind: str) -> Selector:
    """The layers of a kind that are nearest to the output in data flow."""
    return Extreme(kind, "last")


def match_names(pattern: str, names: Iterable[str]) -> list[bool]:
    """Glob matching of slash-separated names."""
    expression = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        expression += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
    compiled = re.compile(expression)
    return [compiled.fullmatch(n) is not None for n in names]


def _within(pattern: str, names: Sequence[str]) -> str:
    """What to write for the layers of a module that has several."""
    inside = f"{pattern}/**"
    return f"; layers inside of what it names are called {inside!r}" if any(match_names(inside, names)) else ""


def _absorbed(pattern: str, layers: Sequence[Layer]) -> str:
    """Whose part a module is that makes no layer of its own, as a BatchNorm behind a convolution."""
    equations = ((eqn, layer) for layer in layers for eqn in layer.equations)
    scopes = {"/".join(eqn.scope[k:]): layer.name for eqn, layer in equations for k in (0, 1)}  # with the root's or not
    owners = dict.fromkeys(itertools.compress(scopes.values(), match_names(pattern, scopes)))
    return f"; what it names is part of {', '.join(map(repr, owners))}" if owners else ""


def _closest(wanted: str, known: Iterable[str]) -> str:
    known = sorted(set(known))
    near = difflib.get_close_matches(wanted.split("/")[-1], known, n=4, cutoff=0.4) or difflib.get_close_matches(
        wanted, known, n=4, cutoff=0.0
    )
    more = "" if len(known) <= 4 else " jaxlrp.trace(model, ...) prints all layers."
    return f"; did you mean {', '.join(map(repr, near))}?{more}" if near else ""


# -- composites --------------------------------------------------------------------------------------------------------

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
    of take
    their kind's default (relevance passes activations, follows moves, is shared by sums in proportion); a linear
    layer without an entry is an error. Composites are pytrees whose leaves are the numbers of their rules.

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


def as_composite(composite: Composite | Rule | None) -> Composite:
    """The composite to use: None is `EpsilonPlus`, a single rule is `Composite.uniform` of it."""
    if composite is None:
        return EpsilonPlus()
    if isinstance(composite, Rule):
        return Composite.uniform(composite)
    if not isinstance(composite, Composite):
        what = getattr(composite, "__name__", repr(composite))
        hint = f"; call it: {what}()" if callable(composite) else ""
        raise TypeError(f"composite must be a Composite, a Rule or None, not {what}{hint}")
    return composite


# -- presets -----------------------------------------------------------------------------------------------------------


# ``bias`` is that of every rule in the preset, see `SplitRule`: "absorb", "ignore" or "redistribute".


def EpsilonPlus(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """z+ for convolutions, epsilon for dense layers: the default."""
    return Composite((kind("linear"), Epsilon(epsilon, bias=bias)), (kind("conv"), ZPlus(bias=bias)))


def EpsilonPlusFlat(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """`EpsilonPlus` with the flat rule at the first layer: smooth maps that say where, not which pixel."""
    return EpsilonPlus(epsilon, bias=bias).extend((first("linear"), Flat()))


def EpsilonGammaBox(low: Any, high: Any, epsilon: Any = 1e-6, gamma: Any = 0.25, *, bias: Bias = "absorb") -> Composite:
    """z^B for the first convolution, gamma for the others, epsilon for dense layers (Montavon et al., 2019).

    ``low`` and ``high`` are the smallest and largest possible inputs *after* preprocessing, numbers or arrays that
    broadcast.
    """
    return Composite(
        (kind("linear"), Epsilon(epsilon, bias=bias)),
        (kind("conv"), Gamma(gamma, bias=bias)),
        (first("conv"), ZBox(low, high)),
    )


def EpsilonAlpha2Beta1(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """Alpha 2, beta 1 for convolutions, epsilon for dense layers."""
    return Composite((kind("linear"), Epsilon(epsilon, bias=bias)), (kind("conv"), AlphaBeta(2.0, 1.0, bias=bias)))


def EpsilonAlpha2Beta1Flat(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """`EpsilonAlpha2Beta1` with the flat rule at the first layer (Kohlbrenner et al., 2020)."""
    return EpsilonAlpha2Beta1(epsilon, bias=bias).extend((first("linear"), Flat()))


def ExcitationBackprop(*, bias: Bias = "absorb") -> Composite:
    """z+ for every linear layer, derivatives of activations (Zhang et al., 2016)."""
    return Composite((kind("linear"), ZPlus(bias=bias)), (kind("activation"), Gradient()))


def AttnLRP(epsilon: Any = 0.0, *, bias: Bias = "absorb") -> Composite:
    """The rules of AttnLRP for transformers (Achtibat et al., 2024).

    Epsilon for linear layers, scales and sums, the scale of normalisations held constant, the first-order Taylor term
    for softmax, equal shares for the factors of products (attention scores, attention times values, SwiGLU), identity
    for activations. Gates made by a sigmoid get nothing.

    With ``epsilon`` the number 0 relevance is divided by outputs at activations alone: elsewhere it goes down per unit
    of value, as the gradient does. Any other ``epsilon``, or a traced one, costs a division a layer.
    """
    return Composite(
        (kind("linear"), Epsilon(epsilon, bias=bias)),
        (kind("scale"), Epsilon(epsilon, bias=bias)),
        (kind("sum"), Norm(epsilon)),
        (kind("normalization"), HoldScale(epsilon=epsilon)),
        (kind("softmax"), Zero()),
        (kind("product"), EqualShare(epsilon=epsilon)),
        (kind("gate"), SignalTakeAll(epsilon=epsilon)),
    )


def CPLRP(epsilon: Any = 0.0, *, bias: Bias = "absorb") -> Composite:
    """The conservative rules for transformers (Ali et al., 2022): attention weights and gates count as constants.

    As `AttnLRP`, but nothing passes a softmax, so that values get all relevance of attention, and what an activation
    multiplies (the linear half of SwiGLU) gets all of a product.
    """
    return AttnLRP(epsilon, bias=bias).extend(
        (kind("softmax"), Constant()), (kind("product"), SignalTakeAll(epsilon=epsilon))
    )


def RecurrentLRP(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """The rules for LSTM and GRU (Arras et al., 2017): epsilon throughout, and gates get nothing."""
    return AttnLRP(epsilon, bias=bias).extend((kind("product"), SignalTakeAll(epsilon=epsilon)))


def MambaLRP(constant: str | Sequence[str] = "**/x_proj", epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """The rules for selective state-space models (Jafari et al., 2024): the recurrence is linear in its input.

    What the layers named by ``constant`` compute counts as constant: the projection that makes step size, B and C
    (A is a parameter). Activations pass relevance, and the output gate shares it equally.

    Args:
        constant: globs of the names of these layers.
        epsilon: the stabiliser of linear layers, sums and products.
        bias: what becomes of the share of biases.
    """
    patterns = [constant] if isinstance(constant, str) else list(constant)
    return AttnLRP(epsilon, bias=bias).extend(*((name(pattern), Constant()) for pattern in patterns))


def GradientComposite() -> Composite:
    """The plain gradient, folded layer by layer: for comparison, and to capture gradients at hidden layers."""
    inside = LayerByLayer()
    return Composite((kind("*"), Gradient()), (kind("recurrence"), inside), (kind("branch"), inside))


def GuidedBackprop() -> Composite:
    """The gradient, with only positive gradients passing active relus (Springenberg et al., 2015)."""
    return GradientComposite().extend((kind("relu"), GuidedReLU()))


def DeconvNet() -> Composite:
    """The gradient, with only positive gradients passing relus, active or not (Zeiler & Fergus, 2014)."""
    return GradientComposite().extend((kind("relu"), DeconvNetReLU()))


def _epsilon(*, bias: Bias = "absorb") -> Composite:
    return Composite.uniform(Epsilon(bias=bias))


#: Every preset that needs no arguments, by the name it goes by on the command line.
PRESETS: dict[str, Callable[..., Composite]] = {
    "epsilon": _epsilon,
    "epsilon_plus": EpsilonPlus,
    "epsilon_plus_flat": EpsilonPlusFlat,
    "epsilon_alpha2_beta1": EpsilonAlpha2Beta1,
    "epsilon_alpha2_beta1_flat": EpsilonAlpha2Beta1Flat,
    "excitation_backprop": ExcitationBackprop,
    "attnlrp": AttnLRP,
    "cplrp": CPLRP,
    "recurrent_lrp": RecurrentLRP,
    "guided_backprop": GuidedBackprop,
    "deconvnet": DeconvNet,
    "gradient": GradientComposite,
}
