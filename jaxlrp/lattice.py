"""Step 2: from equations to layers, by a small dataflow lattice.

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
from .graph import Cond, Equation, Program, Scan, Value
from .layers import Body, Layer, every_layer
from .linear import LinearSpec, absorb_tail
from .names import name_layers
from .registry import registered
from .relations import join_normalisations, join_products, mark_final, mark_gates, reachable
from .segments import Segment, is_exact_relu, name_by_operations, rectifies, segments


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
    layers = _find(program)
    mark_final(layers, program)
    mark_gates(layers, program)
    name_layers([layer for layer, _ in every_layer(layers)], root_scope)
    return layers


def _find(program: Program) -> list[Layer]:
    learnt = _Learnt()
    while True:
        ends, pools = len(learnt.ends), set(learnt.pools)
        walk = _Walk(program, learnt)
        walk.run()
        if walk.decisions:
            program.fix(walk.decisions)
            learnt = _Learnt()
        elif len(learnt.ends) > ends:
            learnt.pools = pools  # judged on tags that are out of date now: judge again
        elif len(learnt.pools) == len(pools):
            break
    return walk.layers()


@dataclasses.dataclass
class _Learnt:
    ends: set[Value] = dataclasses.field(default_factory=set)  # elementwise values that are read as such
    pools: set[Equation] = dataclasses.field(default_factory=set)  # reductions that are layers of their own


class _Walk:
    def __init__(self, program: Program, learnt: _Learnt):
        self.program = program
        self.learnt = learnt
        self.order = {e: i for i, e in enumerate(program.equations)}
        self.root: dict[Value, Value] = {v: v for v in program.sources}
        self.statistic: dict[Value, bool] = dict.fromkeys(self.root, False)
        self.origin: dict[Value, Value] = {}
        self.found: list[Layer] = []
        self.absorbed: set[Equation] = set()
        self.decisions: set[Value] = set()

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
        elif isinstance(eqn, Scan):
            self.layer("recurrence", "scan", eqn)
        elif isinstance(eqn, Cond):
            self.layer("branch", "cond", eqn)
        elif any(jnp.issubdtype(v.dtype, jnp.complexfloating) for v in eqn.outputs):
            while eqn.primitive in P.CAST and (readers := self.program.consumers.get(eqn.outputs[0])):
                eqn = readers[0]  # numbers are made complex for somebody: name that
            raise _unknown(eqn, "works on complex numbers and")
        elif prim not in P.ELEMENTWISE and not any(v.carries for v in eqn.outputs):
            self.decide(eqn)  # a mask that is moved, say
        elif prim in P.DOT or prim in P.CONV:
            self.check_random(eqn, [v for v in eqn.inputs if not v.depends])
            if sum(v.depends for v in eqn.inputs) == 1:
                self.linear("linear", "dense" if prim in P.DOT else "conv", eqn)
            elif self.sums_squares(eqn) and eqn not in self.learnt.pools:
                self.tag(eqn, self.root[eqn.inputs[0]], True)
            else:
                self.layer("product", _product_name(eqn), eqn)
        elif prim in P.ELEMENTWISE:
            self.elementwise(eqn)
        elif prim in P.REDUCTION and len(dependent) == 1 and eqn not in self.learnt.pools:
            (value,) = dependent
            self.tag(eqn, self.root[value], True)
        elif prim in P.SUMMING:
            self.linear("sum", _sum_name(eqn), eqn)
        elif prim in P.SCATTER_ADD:
            self.linear("sum", "scatter_add", eqn)
        elif prim in P.PROD:
            self.layer("product", "prod", eqn)
        elif prim in P.PICKING or prim in P.SORTING or prim in P.SCATTER_PICK:
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
            return self.decide(eqn)
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

    def sums_squares(self, eqn: Equation) -> bool:
        """Whether a product is that of every row with itself (``einsum("bi,bi->b", c, c)``): a statistic like a sum."""
        left, right = eqn.inputs
        roots = {self.root[left], self.root[right]}
        if eqn.primitive not in P.DOT or len(roots) > 1 or self.statistic[left] or self.statistic[right]:
            return False
        (contract_left, contract_right), (batch_left, batch_right) = eqn.params["dimension_numbers"]
        sides = (*contract_left, *batch_left), (*contract_right, *batch_right)
        return sides[0] == sides[1] and len(sides[0]) == len(left.shape)

    def source(self, root: Value) -> Value:
        """Follow moved values back to where they came from."""
        while root in self.origin:
            root = self.origin[root]
        return root

    def check_random(self, eqn: Equation, constants: Iterable[Value]) -> None:
        if any(v.random for v in constants):
            raise NotDeterministicError(
                f"random numbers meet the explained value: {eqn.describe()}. Relevance of a random model means little; "
                "call it with deterministic=True (dropout off; Equinox: eqx.nn.inference_mode(model)), or draw the "
                "numbers outside and pass them in."
            )

    # -- tags ----------------------------------------------------------------------------------------------------

    def tag(self, eqn: Equation, root: Value, statistic: bool) -> None:
        for value in eqn.outputs:
            if value in self.learnt.ends:
                self.own_root(value)
            else:
                self.root[value], self.statistic[value] = root, statistic

    def decide(self, eqn: Equation) -> None:
        """What is made of a decision alone is constant: a mask by which something else is multiplied."""
        for value in eqn.outputs:
            self.own_root(value)
            self.decisions.add(value)

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
        """The first reductions on the way to a statistic, not those inside of what was reduced.

        Those behind them may be statistics of what the first make: a LayerNorm of pooled features.
        """
        eqn = self.program.producer[statistic]
        inner = [v for v in eqn.dependent if self.statistic[v] and self.root[v] is not v]
        if eqn.primitive in P.STATISTIC and not inner:
            yield eqn
        for value in inner:
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
        layers = reachable(layers, self.program)
        for layer in layers:
            layer.bodies = _bodies(layer.equations[0]) if layer.kind in ("recurrence", "branch") else ()
        layers = join_normalisations(join_products(layers, self.program), self.program)
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
        return [self.region(segment) for segment in segments(self.program, equations, root, value, self.statistic)]

    def region(self, segment: Segment) -> Layer:
        eqns = tuple(segment.equations)
        spec = LinearSpec(None, eqns, (segment.start,), segment.end) if segment.kind == "scale" else None
        inputs = (segment.start,) if segment.start.carries else ()
        op = segment.op or self.activation_name(segment)
        if op == "relu" != segment.op:  # a function of that name which is none
            op = "elementwise"
        kind = segment.kind
        if spec and not any(e.primitive in P.MUL or e.primitive in P.DIV for e in eqns):
            kind, op = "sum", "add"  # a parameter added to a value (position embeddings) has its own share
        layer = Layer("", kind, op, inputs, (segment.end,), eqns, spec, source=eqns[-1].source)
        if kind == "activation":
            layer.rectifies, layer.is_relu = rectifies(self.program, eqns), is_exact_relu(self.program, eqns)
        return layer

    def activation_name(self, segment: Segment) -> str:
        """The function that was called, if all of the segment and nothing beside it stands in it (silu)."""
        common = functools.reduce(_common_start, (e.calls for e in segment.equations))
        while common and common[-1].startswith(("_", "<")):
            common = common[:-1]
        beside = [self.program.producer.get(segment.start), *self.program.consumers.get(segment.end, ())]
        if common and not any(e is not None and e.calls[: len(common)] == common for e in beside):
            return common[-1]
        return name_by_operations(segment.equations)


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


def _bodies(eqn: Equation) -> tuple[Body, ...]:
    if isinstance(eqn, Scan):
        programs, operands = (eqn.step,), eqn.inputs
    else:
        assert isinstance(eqn, Cond)
        programs, operands = eqn.branches, eqn.inputs[1:]
    found = []
    for program in programs:
        outside = dict(zip(program.outputs, eqn.outputs, strict=True))
        outside.update(zip(program.inputs, operands, strict=True))
        found.append(Body(program, _find(program), outside))
    return tuple(found)


_PICK_NAMES = {
    "reduce_window_max": "max_pool",
    "reduce_window_min": "min_pool",
    "reduce_max": "max",
    "reduce_min": "min",
}


def _product_name(eqn: Equation) -> str:
    if eqn.primitive in P.CONV:
        return "conv"
    contracted = eqn.params["dimension_numbers"][0][0]
    return "matmul" if contracted else "mul"  # an einsum that sums over nothing multiplies elements


def _sum_name(eqn: Equation) -> str:
    return {"reduce_sum": "sum", "reduce_window_sum": "sum_pool"}.get(eqn.name, eqn.name)


_OPAQUE = ("custom_call", "ffi_call", "pallas_call", "triton_kernel_call", "pure_callback", "io_callback", "cudnn")


def _unknown(eqn: Equation, what: str = "") -> Exception:
    name = str(eqn.primitive)
    if name == "while":
        return UnsupportedError(
            f"{eqn.describe()}: a loop whose number of steps is not known when the model is traced cannot be folded "
            "back; use jax.lax.scan, jax.lax.fori_loop with Python integers as bounds, or a Python loop."
        )
    if any(opaque in name for opaque in (*_OPAQUE, "dot_product_attention")):
        return UnsupportedError(
            f"{eqn.describe()}: opaque kernels cannot be looked into; switch to the plain implementation "
            '(implementation="xla" of jax.nn.dot_product_attention), or wrap the call with '
            "jaxlrp.custom_layer(name, rule)."
        )
    how = f'jaxlrp.register_rule("{name}", kind=...) or wrap the function with jaxlrp.custom_layer(name, rule)'
    subject = f"{eqn.describe()} {what}".rstrip()
    return UnknownPrimitiveError(f"{subject} has no known meaning for relevance. Teach it: {how}.")
