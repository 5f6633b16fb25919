"""Selectors: which layers an entry of a composite speaks of."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from .errors import UnknownLayerError
from .graph import Scan, Value
from .layers import KINDS, Layer

#: Finer names that `kind` understands beside the kinds themselves; activations go by their function's name too.
OPS: dict[str, tuple[str, ...]] = {
    "linear": ("conv", "dense"),
    "sum": ("add", "sub", "sum", "mean", "avg_pool", "sum_pool", "cumsum", "scatter_add"),
    "pick": ("max_pool", "min_pool", "max", "min", "sort", "top_k"),
    "activation": ("relu", "gelu"),
    "softmax": ("softmax", "log_softmax"),
    "product": ("matmul", "mul", "div", "gate", "prod"),
    "recurrence": ("scan",),
    "branch": ("cond",),
}

#: What modules are here whose names people look for, without digits and underscores.
_ELSEWHERE = {
    "a BatchNorm is part of the linear layer beside it, or else of kind 'scale'": ("batchnorm", "bn"),
    "normalisations are of kind 'normalization'": ("norm", "layernorm", "rmsnorm", "groupnorm", "instancenorm"),
    "attention is made of layers of kinds 'linear', 'softmax' and 'product'": (
        *("attention", "selfattention", "crossattention", "multiheadattention", "multiheaddotproductattention"),
    ),
    "what only moves values is of kind 'move'": ("flatten",),
    "dropout does nothing in inference, and makes no layer": ("dropout",),
    "relevance of token ids ends at their embeddings, which make no layer": ("embed", "embedding"),
    "a residual sum is 'add'": ("residual", "skip"),
    "a scan over time is of kind 'recurrence'": ("rnn", "lstm", "gru", "lstmcell", "grucell"),
}


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
        found = [self.kind in ("*", layer.kind, layer.op, f"{layer.kind}/{layer.op}") for layer in layers]
        known = {*KINDS, *itertools.chain(*OPS.values()), *(f"{kind}/{op}" for kind, ops in OPS.items() for op in ops)}
        if self.kind not in known and not any(found) and self.kind != "*":
            module = re.sub(r"[\W\d_]", "", self.kind.lower())
            elsewhere = next((f"; {what}" for what, names in _ELSEWHERE.items() if module in names), None)
            hint = elsewhere or _closest(self.kind, known | {layer.op for layer in layers})
            raise UnknownLayerError(f"no kind or operation {self.kind!r}{hint}")
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
    """Layers of a kind (``"linear"``, ...), operation (``"conv"``, ...) or both (``"linear/conv"``); ``"*"`` is all."""
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
