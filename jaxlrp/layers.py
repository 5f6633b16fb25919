"""Step 2: from equations to layers.

A *layer* is a group of equations that a rule handles as one: a convolution with its bias and the BatchNorm behind it,
a GELU of nine operations, a LayerNorm of fifteen. Sequences of primitives are not matched (LayerNorm alone has six over
the frameworks). Instead every dependent value gets a tag of a small lattice:

* ``root``: the value it is an elementwise function of. Inputs and the outputs of real layers are their own roots.
* ``statistic``: whether it is a reduction of its root (mean, variance, maximum), not elementwise in it.

An elementwise operation whose operands all share a root stays at that root. A statistic that meets its own root again
is normalisation; one that ends up anywhere else was a pooling layer. Operands of different roots make a real layer: a
sum, a product or a pick. A moved value (reshape, transpose, ...) is its own root but remembers its *origin*, so that
the reshapes inside GroupNorm do not hide that mean and value belong together.

Whether a reduction is a statistic or a pooling layer, and which elementwise values end an activation, is known only
after its readers were seen; so the walk is repeated with what it learnt until nothing new is learnt (two or three
times).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from . import _primitives as P
from ._compat import primitives
from .errors import NotDeterministicError, UnknownPrimitiveError, UnsupportedError
from .graph import Equation, Program, Value
from .linear import LinearSpec, absorb_tail
from .registry import registered

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
)


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

    def __repr__(self) -> str:
        shapes = ", ".join(map(repr, self.inputs)) + " -> " + ", ".join(map(repr, self.outputs))
        return f"Layer({self.name!r}, {self.kind}/{self.op}, {shapes})"


def find_layers(program: Program, root_scope: str | None = None) -> list[Layer]:
    """Group the equations between the explained inputs and the outputs into layers, in execution order.

    Args:
        program: the traced model.
        root_scope: the outermost name of every path, dropped from the layers' names.

    Raises:
        UnknownPrimitiveError: an operation on the way has no known meaning.
        UnsupportedError: it is known but nothing sound is built in.
        NotDeterministicError: random bits meet a value on the way (dropout).
    """
    learnt = _Learnt()
    while True:
        ends, pools = len(learnt.ends), set(learnt.pools)
        walk = _Walk(program, learnt)
        walk.run()
        if len(learnt.ends) > ends:
            learnt.pools = pools  # judged on tags that are out of date now: judge again
        elif len(learnt.pools) == len(pools):
            break
    layers = walk.layers()
    _name_layers(layers, root_scope)
    return layers


@dataclasses.dataclass
class _Learnt:
    ends: set[Value] = dataclasses.field(default_factory=set)  # elementwise values that are read as such
    pools: set[Equation] = dataclasses.field(default_factory=set)  # reductions that are layers of their own


class _Walk:
    def __init__(self, program: Program, learnt: _Learnt):
        self.program = program
        self.learnt = learnt
        self.order = {e: i for i, e in enumerate(program.equations)}
        self.root: dict[Value, Value] = {v: v for v in program.inputs if v.depends}
        self.statistic: dict[Value, bool] = dict.fromkeys(self.root, False)
        self.origin: dict[Value, Value] = {}
        self.found: list[Layer] = []
        self.absorbed: set[Equation] = set()

    # -- the walk ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        for equation in self.program.equations:
            if equation.depends and equation not in self.absorbed:
                self.visit(equation)
        for value in self.program.outputs:
            if value.carries:
                self.end(value)

    def visit(self, eqn: Equation) -> None:
        prim, dependent = eqn.primitive, eqn.dependent
        taught = registered(prim)
        if eqn.custom is not None:
            self.layer("custom", eqn.custom[0], eqn, rule=eqn.custom[1])
        elif taught is not None:
            self.layer(taught[0], eqn.name, eqn, rule=taught[1])
        elif not any(v.depends for v in eqn.outputs):
            return
        elif any(jnp.issubdtype(v.dtype, jnp.complexfloating) for v in eqn.outputs):
            while eqn.primitive in P.CAST and (readers := self.program.consumers.get(eqn.outputs[0])):
                eqn = readers[0]  # numbers are made complex for somebody: name that
            raise _unknown(eqn, "works on complex numbers and")
        elif prim not in P.ELEMENTWISE and not any(v.carries for v in eqn.outputs):
            for value in eqn.outputs:  # routing decisions (an argmax, a mask) carry no relevance
                self.own_root(value)
        elif prim in P.DOT or prim in P.CONV:
            self.check_random(eqn, [v for v in eqn.inputs if not v.depends])
            if sum(v.depends for v in eqn.inputs) == 2:
                self.layer("product", "matmul" if prim in P.DOT else "conv", eqn)
            else:
                self.linear("linear", "dense" if prim in P.DOT else "conv", eqn)
        elif prim in P.ELEMENTWISE:
            self.elementwise(eqn)
        elif prim in P.REDUCTION and eqn not in self.learnt.pools:
            (value,) = dependent
            self.tag(eqn, self.root[value], True)
        elif prim in P.SUMMING:
            self.linear("sum", _sum_name(eqn), eqn)
        elif prim in P.SCATTER_ADD:
            self.linear("sum", "scatter_add", eqn)
        elif prim in P.PICKING or prim in P.SORTING:
            self.layer("pick", _PICK_NAMES.get(eqn.name, eqn.name), eqn)
        elif prim in P.MOVE:
            self.move(eqn)
        else:
            raise _unknown(eqn)

    def elementwise(self, eqn: Equation) -> None:
        dependent = eqn.dependent
        self.check_random(eqn, [v for v in eqn.inputs if not v.depends])
        roots = {self.root[v] for v in dependent}
        if len(roots) == 1:
            return self.tag(eqn, roots.pop(), all(self.statistic[v] for v in dependent))
        plain = {self.root[v] for v in dependent if not self.statistic[v]}
        sources = {self.source(r) for r in roots}
        if len(plain) <= 1 and len(sources) == 1:  # a value and its own statistics: normalisation
            return self.tag(eqn, sources.pop(), not plain)
        if not any(v.carries for v in eqn.outputs):  # a comparison of two values: a decision, not a quantity
            for value in eqn.outputs:
                self.own_root(value)
            return None
        prim = eqn.primitive
        if prim in P.ADD or prim in P.SUB:
            self.linear("sum", eqn.name, eqn)
        elif prim in P.MUL or prim in P.DIV:
            self.layer("product", eqn.name, eqn)
        elif prim in P.MAXMIN:
            self.layer("pick", eqn.name, eqn)
        elif prim in P.SELECT:
            self.layer("move", "where", eqn)
        else:
            raise _unknown(eqn, "of two different values")

    def move(self, eqn: Equation) -> None:
        (first, *rest) = eqn.dependent
        if not rest and self.statistic[first]:
            return self.tag(eqn, self.root[first], True)
        moved = [v for v in eqn.dependent if v.carries]
        self.layer("move", eqn.name, eqn)
        if len(moved) == 1 and len(eqn.outputs) == 1:
            self.origin[eqn.outputs[0]] = self.root[moved[0]]
        return None

    def source(self, root: Value) -> Value:
        """Follow moved values back to where they came from."""
        while root in self.origin:
            root = self.origin[root]
        return root

    def check_random(self, eqn: Equation, constants: Iterable[Value]) -> None:
        if any(v.random for v in constants):
            raise NotDeterministicError(
                f"random numbers meet the explained value: {eqn.describe()}. Relevance of a random model means little; "
                "call it with deterministic=True (dropout off), or draw the numbers outside and pass them in."
            )

    # -- tags ----------------------------------------------------------------------------------------------------

    def tag(self, eqn: Equation, root: Value, statistic: bool) -> None:
        for value in eqn.outputs:
            if value in self.learnt.ends:
                self.own_root(value)
            else:
                self.root[value], self.statistic[value] = root, statistic

    def own_root(self, value: Value) -> None:
        self.root[value], self.statistic[value] = value, False

    def end(self, value: Value) -> None:
        """Something other than its own region reads this value: the region must stop here."""
        if self.root[value] is value:
            return
        if self.statistic[value] and not _is_logsumexp(self.slice(value, self.root[value])):
            self.learnt.pools.update(self.reductions(value))
        else:
            self.learnt.ends.add(value)
        self.own_root(value)

    def reductions(self, statistic: Value) -> Iterable[Equation]:
        """The reductions that made a statistic, not those inside of what was reduced."""
        eqn = self.program.producer[statistic]
        if eqn.primitive in P.REDUCTION:
            yield eqn
        for value in eqn.dependent:
            if self.statistic[value] and self.root[value] is not value:
                yield from self.reductions(value)

    # -- real layers ------------------------------------------------------------------------------------------------

    def layer(self, kind: str, op: str, eqn: Equation, rule: Any = None) -> None:
        for value in eqn.dependent:
            self.end(value)
        for value in eqn.outputs:
            self.own_root(value)
        inputs = tuple(v for v in eqn.dependent if v.carries)
        outputs = tuple(v for v in eqn.outputs if v.carries)
        self.found.append(Layer("", kind, op, inputs, outputs, (eqn,), source=eqn.source, rule=rule))

    def linear(self, kind: str, op: str, eqn: Equation) -> None:
        for value in eqn.dependent:
            self.end(value)
        spec = absorb_tail(self.program, eqn)
        if any(e.primitive in P.DIV or e.primitive in P.MUL for e in spec.tail):
            op = {"sum": "mean", "sum_pool": "avg_pool"}.get(op, op)
        self.absorbed.update(spec.tail)
        self.own_root(spec.output)
        self.found.append(
            Layer("", kind, op, spec.inputs, (spec.output,), (eqn, *spec.tail), linear=spec, source=eqn.source)
        )

    # -- regions: what lies between a root and an elementwise value that somebody reads ----------------------------

    def slice(self, value: Value, root: Value) -> list[Equation]:
        """The equations that compute ``value`` from ``root``, in order."""
        found: set[Equation] = set()
        stack = [value]
        while stack:
            current = stack.pop()
            eqn = None if current is root else self.program.producer.get(current)
            if eqn is not None and eqn.depends and eqn not in found:
                found.add(eqn)
                stack.extend(eqn.dependent)
        return sorted(found, key=self.order.__getitem__)

    def layers(self) -> list[Layer]:
        made = {v: layer for layer in self.found for v in layer.outputs}
        for value in self.learnt.ends:
            if value not in made and value.carries:
                for layer in self.regions(value):
                    made.setdefault(layer.outputs[0], layer)
        layers = sorted(set(made.values()), key=lambda layer: self.position(layer))
        layers = _reachable(layers, self.program)
        _mark_final(layers, self.program)
        return layers

    def position(self, layer: Layer) -> int:
        return max(self.order[self.program.producer[v]] for v in layer.outputs)

    def region_root(self, value: Value) -> Value:
        # The tag of an end was overwritten by itself; its root is that of what it is computed from.
        operands = self.program.producer[value].dependent
        plain = [self.root[v] for v in operands if not self.statistic[v]]
        roots = {self.root[v] for v in operands}
        return roots.pop() if len(roots) == 1 else self.source(plain[0] if plain else roots.pop())

    def regions(self, value: Value) -> list[Layer]:
        root = self.region_root(value)
        equations = self.slice(value, root)
        if all(self.statistic[v] for v in equations[-1].dependent):  # no other statistic ends a region
            inputs = (root,) if root.carries else ()
            return [Layer("", "pick", "logsumexp", inputs, (value,), tuple(equations), source=equations[-1].source)]
        return [self.region(segment) for segment in _segments(self.program, equations, root, value, self.statistic)]

    def region(self, segment: _Segment) -> Layer:
        eqns = tuple(segment.equations)
        spec = LinearSpec(None, eqns, (segment.start,), segment.end) if segment.kind == "scale" else None
        inputs = (segment.start,) if segment.start.carries else ()
        op = segment.op or self.activation_name(segment)
        if op == "relu" != segment.op:  # a function of that name which is none
            op = "elementwise"
        return Layer("", segment.kind, op, inputs, (segment.end,), eqns, linear=spec, source=eqns[-1].source)

    def activation_name(self, segment: _Segment) -> str:
        """The function that was called, if all of the segment and nothing beside it stands in it (silu)."""
        common = functools.reduce(_common_start, (e.calls for e in segment.equations))
        while common and common[-1].startswith(("_", "<")):
            common = common[:-1]
        beside = [self.program.producer.get(segment.start), *self.program.consumers.get(segment.end, ())]
        if common and not any(e is not None and e.calls[: len(common)] == common for e in beside):
            return common[-1]
        return _name_by_operations(segment.equations)


def _common_start(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(x for x, y in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _is_logsumexp(equations: Sequence[Equation]) -> bool:
    """``log(sum(exp(x - m))) + m``, a soft maximum: its derivative is a softmax, which hands on all relevance."""
    used = [e.primitive for e in equations if e.primitive not in P.MOVE and e.primitive not in P.CAST]
    inner = {p for p in used if p not in _SMOOTH and p not in P.ADD and p not in P.SUB}
    shifts = [sum(p in some for p in used) for some in (P.ADD, P.SUB)]
    whole = all(any(p in some for p in used) for some in (P.EXP, P.LOG, P.SUMMING))
    # more additions, or a subtraction at the end, make it something else: max(x) - logsumexp(x), say
    return whole and inner <= P.EXP | P.LOG | P.SUMMING and max(shifts) <= 1 and used[-1] in P.ADD | P.LOG


_SMOOTH = (
    P.ADD | P.SUB | P.CAST | P.MOVE | P.SELECT | P.STOP_GRADIENT | P.PICKING | primitives("max", "abs", "is_finite")
)


def _mark_final(layers: list[Layer], program: Program) -> None:
    """Mark the layers whose output is the model's, perhaps moved on the way (masked, reshaped), and nobody else's."""
    final = {v for v in program.outputs if v.carries}
    read: set[Value] = set()
    for layer in reversed(layers):
        layer.final = any(v in final for v in layer.outputs) and not read.intersection(layer.outputs)
        if layer.final and layer.kind == "move":
            final.update(v for v in layer.inputs if v not in read)
        else:
            read.update(layer.inputs)


def _reachable(layers: list[Layer], program: Program) -> list[Layer]:
    """Keep the layers that relevance can reach from an output."""
    reached = {v for v in program.outputs if v.carries}
    kept = []
    for layer in reversed(layers):
        if reached.intersection(layer.outputs):
            kept.append(layer)
            reached.update(layer.inputs)
    return kept[::-1]


# -- segments: a region is cut where a single value carries everything -------------------------------------------------


@dataclasses.dataclass
class _Segment:
    start: Value
    end: Value
    equations: list[Equation]
    kind: str = "activation"
    op: str = ""


def _segments(
    program: Program, equations: list[Equation], root: Value, end: Value, statistic: dict[Value, bool]
) -> list[_Segment]:
    """Cut a region at its cut vertices, then join what belongs together.

    ``relu(gelu(x))`` is two activations, ``gelu(layer_norm(x))`` a normalisation and an activation; but the
    many branches inside one GELU have no value in between that carries everything, so it stays whole.
    """
    last_use: dict[Value, int] = {}
    for i, eqn in enumerate(equations):
        last_use.update(dict.fromkeys(eqn.dependent, i))
    pieces: list[_Segment] = []
    start, piece, open_until = root, [], last_use.get(root, 0)
    for i, eqn in enumerate(equations):
        piece.append(eqn)
        out = eqn.outputs[0]
        if out is end or (out.carries and open_until <= i):
            pieces.append(_Segment(start, out, piece))
            start, piece = out, []
        open_until = max(open_until, last_use.get(out, i + 1))
    for segment in pieces:
        segment.kind, segment.op = _classify(program, segment, statistic)
    return _join(pieces)


def _classify(program: Program, segment: _Segment, statistic: dict[Value, bool]) -> tuple[str, str]:
    eqns = segment.equations
    if any(e.primitive in P.REDUCTION for e in eqns):
        if any(e.primitive in P.EXP and not statistic.get(e.outputs[0], False) for e in eqns):
            return "softmax", "log_softmax" if any(e.primitive in P.LOG for e in eqns) else "softmax"
        return "normalization", "normalization"
    (first, *more) = eqns
    if not more and first.primitive in P.SELECT and not first.inputs[0].depends:
        return "move", "where"
    if not more and _is_affine(first):
        literal = all(v.literal for v in first.inputs if not v.depends)
        return ("affine", "") if literal else ("scale", "scale")
    return "activation", "relu" if _is_relu(program, eqns) else ""


def _join(pieces: list[_Segment]) -> list[_Segment]:
    joined: list[_Segment] = []
    for piece in _join_normalisations(pieces):
        previous = joined[-1] if joined else None
        if previous is not None and _belongs(previous, piece):
            previous.end = piece.end
            previous.equations = previous.equations + piece.equations
            if previous.op == "relu" and piece.kind == "activation":
                previous.op = ""  # max(x, 0) was the first half of a clamp
            elif previous.kind == "affine" and piece.kind != "affine":
                previous.kind, previous.op = piece.kind, piece.op
            elif previous.op == "log_softmax" and _is_exp(piece):
                previous.op = "softmax"
            elif previous.op == "softmax" and _is_log(piece):
                previous.op = "log_softmax"
        else:
            joined.append(piece)
    for segment in joined:
        if segment.kind == "affine":  # scaling by numbers in the code: an activation like any other
            segment.kind = "activation"
    return joined


def _join_normalisations(pieces: list[_Segment]) -> list[_Segment]:
    """Join the parts of one normalisation: ``x - max | exp | e / sum e`` and ``x - mean | c / sqrt(mean c^2)``."""
    joined: list[_Segment] = []
    for piece in pieces:
        while piece.kind in ("normalization", "softmax") and joined and _leads_into(joined):
            lead = joined.pop()
            is_softmax = "softmax" in (piece.kind, lead.kind) or _is_exp(lead)
            kind, op = ("softmax", "softmax") if is_softmax else (piece.kind, piece.op)
            op = "log_softmax" if "log_softmax" in (piece.op, lead.op) else op
            piece = _Segment(lead.start, piece.end, lead.equations + piece.equations, kind, op)
        joined.append(piece)
    return joined


def _leads_into(joined: list[_Segment]) -> bool:
    """Whether the last piece can only be the first part of the normalisation behind it."""
    *before, lead = joined
    if lead.op == "where":  # softmax(x, where=mask) masks between exp and sum
        return bool(before) and _is_exp(before[-1])
    return _is_exp(lead) or (lead.kind == "normalization" and lead.equations[-1].primitive in P.SUB)


def _belongs(previous: _Segment, piece: _Segment) -> bool:
    kinds = (previous.kind, piece.kind)
    if previous.kind == "softmax":  # log_softmax may be written as log(softmax), softmax as exp(log_softmax)
        log, exp = previous.op == "softmax" and _is_log(piece), previous.op == "log_softmax" and _is_exp(piece)
        return piece.kind == "affine" or log or exp
    if previous.kind == "normalization":
        return piece.kind in ("affine", "scale")
    if "move" in kinds:
        return False
    if previous.kind == "affine":
        return piece.kind != "normalization" and piece.op != "relu"
    if piece.kind == "affine":
        return previous.op != "relu" or all(e.primitive in P.CAST for e in piece.equations)
    if kinds == ("activation", "activation"):
        if previous.op == "relu" and len(piece.equations) == 1 and piece.equations[0].primitive in P.MIN:
            return True
        return "relu" not in (previous.op, piece.op) and previous.equations[-1].calls == piece.equations[0].calls
    return kinds == ("scale", "scale")


def _is_exp(piece: _Segment) -> bool:
    return piece.kind == "activation" and len(piece.equations) == 1 and piece.equations[0].primitive in P.EXP


def _is_log(piece: _Segment) -> bool:
    return len(piece.equations) == 1 and piece.equations[0].primitive in P.LOG


def _is_affine(eqn: Equation) -> bool:
    prim = eqn.primitive
    if not eqn.outputs[0].carries:  # a cast to integers is none
        return False
    if prim in P.DIV:
        return eqn.inputs[0].depends and not eqn.inputs[1].depends
    if prim in P.MUL or prim in P.ADD or prim in P.SUB:
        return sum(v.depends for v in eqn.inputs) == 1
    return prim in P.NEG or prim in P.CAST


def _name_by_operations(eqns: Sequence[Equation]) -> str:
    names = list(dict.fromkeys(e.name for e in eqns if not _is_affine(e)))
    if {"erf", "erfc"} & set(names) or {"tanh", "integer_pow"} <= set(names):
        return "gelu"
    return "_".join(names) if 0 < len(names) <= 3 else ("elementwise" if names else "identity")


def _is_relu(program: Program, eqns: Sequence[Equation]) -> bool:
    """Whether a piece is ``max(x, 0)``, ``where(x > 0, x, 0)``, or a call with a derivative of its own around these."""
    eqns = [e for e in eqns if e.primitive not in P.CAST]
    if len(eqns) == 1 and eqns[0].body is not None:
        return _is_relu(eqns[0].body, [e for e in eqns[0].body.equations if e.depends])
    if len(eqns) == 1 and eqns[0].primitive in P.MAX:
        return any(_is_zero(program, v) for v in eqns[0].inputs)
    if len(eqns) == 2 and eqns[0].primitive in P.GREATER and eqns[1].primitive in P.SELECT:
        (x, bound), (_, low, high) = eqns[0].inputs, eqns[1].inputs
        return x is high and _is_zero(program, bound) and _is_zero(program, low)
    return False


def _is_zero(program: Program, value: Value) -> bool:
    """Whether a value is the number 0 written in the code, perhaps cast or spread."""
    if value.constant is not None:
        return value.literal and not value.constant.any()
    eqn = program.producer.get(value)
    spread = eqn is not None and (eqn.primitive in P.CAST or eqn.primitive in P.BROADCAST)
    return spread and _is_zero(program, eqn.inputs[0])  # type: ignore[union-attr]


# -- names ------------------------------------------------------------------------------------------------------------

_PICK_NAMES = {
    "reduce_window_max": "max_pool",
    "reduce_window_min": "min_pool",
    "reduce_max": "max",
    "reduce_min": "min",
}
_LEAVES = {"kernel", "weight", "weights", "w", "W", "embedding", "scale", "bias", "b", "mean", "var", "value"}
_COLLECTIONS = {"params", "batch_stats"}


def _sum_name(eqn: Equation) -> str:
    return {"reduce_sum": "sum", "reduce_window_sum": "sum_pool"}.get(eqn.name, eqn.name)


def _module_of(path: str) -> str:
    """``params/Block_0/Conv_0/kernel`` -> ``Block_0/Conv_0``."""
    parts = [p for p in path.split("/") if p]
    if parts and parts[0] in _COLLECTIONS:
        parts = parts[1:]
    while len(parts) > 1 and parts[-1] in _LEAVES:
        parts = parts[:-1]
    return "/".join(parts)


def _name_layers(layers: Sequence[Layer], root_scope: str | None) -> None:
    scopes = [layer.equations[0].scope for layer in layers]
    outermost = {scope[0] if scope else None for scope in scopes}
    if root_scope is None and len(outermost) == 1 and any(len(scope) > 1 for scope in scopes):
        root_scope = outermost.pop()  # a function around a module: its name tells nothing apart
    used: dict[str, int] = {}
    for layer in layers:
        name = _layer_name(layer, root_scope, scopes)
        used[name] = used.get(name, 0) + 1
        layer.name = name if used[name] == 1 else f"{name}:{used[name]}"


def _layer_name(layer: Layer, root_scope: str | None, scopes: Sequence[tuple[str, ...]]) -> str:
    whole = scope = layer.equations[0].scope
    if root_scope is not None and scope[:1] == (root_scope,):
        scope = scope[1:]
    here = "/".join(scope)
    if layer.kind in ("linear", "normalization", "scale"):  # layers with parameters are called by their module
        modules = [_module_of(v.path) for e in layer.equations for v in e.inputs if not v.depends and v.path]
        if modules:
            return modules[0] if not here or here.endswith(modules[0]) else here
        if here and scopes.count(whole) == 1:
            return here
    return f"{here}/{layer.op}" if here else layer.op


# -- errors -----------------------------------------------------------------------------------------------------------

_ADVICE = {
    "while": "a loop with an end that depends on data cannot be folded back; unroll it as a Python loop",
    "custom_call": "opaque kernels cannot be looked into; switch to the plain implementation",
}


def _unknown(eqn: Equation, what: str = "") -> Exception:
    name = str(eqn.primitive)
    if name in ("while", "scan", "cond"):
        advice = _ADVICE.get(name, "control flow on the explained path is not supported yet; unroll it in the model")
        return UnsupportedError(f"{eqn.describe()}: {advice}.")
    how = f'jaxlrp.register_rule("{name}", kind=...) or wrap the function with jaxlrp.custom_layer(name, rule)'
    subject = f"{eqn.describe()} {what}".rstrip()
    return UnknownPrimitiveError(f"{subject} has no known meaning for relevance. Teach it: {how}.")
