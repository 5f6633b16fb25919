"""What every rule is, and what it is given to work with."""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _primitives as P
from .._pytree import PyTreeNode
from ..errors import RuleError
from ..graph import Equation, Value, read, widen
from ..layers import Layer
from ..linear import LinearMap
from ._pool import at_winners, is_window_pick, to_winners

Arrays = tuple[jax.Array, ...]
PerUnit = tuple[jax.Array | None, ...]  # R / x of every value, or None where nobody knows it without dividing
Losses = dict[str, jax.Array]


class Handed(NamedTuple):
    """What a rule hands to the inputs of a layer.

    Attributes:
        relevance: one array per input.
        per_unit: the same over the input's value, None where that is not known without dividing; empty if it is known
            of none.
        product: a convolution or matrix product that the relevance was made of, if there was one.
    """

    relevance: Arrays
    per_unit: PerUnit = ()
    product: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a model's values before any number is: found once, read by rules.

    Attributes:
        nonnegative: values that are never negative: half of a sign split is empty.
        positive: values to which relevance comes only where they are positive: a rule need not think of the rest.
        rectified: for some of them the relu of it: the same number wherever relevance comes.
        pooled: for some of these the max pool that alone reads the relu: relevance comes only where the relu won.
        summands: for some values a sum and its other summand: the difference is the same number wherever relevance
            comes, up to rounding of the size of the other.
        frugal: convolutions whose results may have errors relative to all that a filter sees.
        constant: values that are made only of what a `Constant` rule declared constant.
    """

    nonnegative: frozenset[Value] = frozenset()
    positive: frozenset[Value] = frozenset()
    rectified: Mapping[Value, Value] = dataclasses.field(default_factory=dict)
    pooled: Mapping[Value, Equation] = dataclasses.field(default_factory=dict)
    summands: Mapping[Value, tuple[Value, Value]] = dataclasses.field(default_factory=dict)
    frugal: frozenset[Equation] = frozenset()
    constant: frozenset[Value] = frozenset()


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A layer at the numbers of one forward pass: all that a rule may read.

    Attributes:
        layer: the layer; its kind, op and name are static.
        env: every value of the forward pass.
        known: what is known of values whatever the numbers are.
        arrived: relevance at every output.
        per_unit: the same over the output's value, ``R / z``, or None where that is not known without dividing.
        since: the convolution or matrix product that the relevance was made of last, if that is not far away.
    """

    layer: Layer
    env: Mapping[Value, Any]
    known: Known = Known()
    arrived: Arrays = ()
    per_unit: PerUnit = ()
    since: jax.Array | None = None

    def slope(self, relevance: jax.Array, z: jax.Array, stabilised: jax.Array, output: int = 0) -> jax.Array:
        """``R / stab(z)`` for an output, from ``R / z`` where that is known.

        That is what the layers above handed down, and so known where ``z`` is 0 too. It belongs to the relevance that
        arrived: a rule that puts another in its place gets the quotient.

        Args:
            relevance: ``R``.
            z: the output.
            stabilised: ``stab(z)``, which is ``z`` itself if nothing stabilises.
            output: which output.
        """
        unit = self.per_unit[output] if self.arrived and relevance is self.arrived[output] else None
        if unit is None:
            return ratio(relevance, stabilised)
        if stabilised is z:
            return unit
        plain = (stabilised == 0) | ~jnp.isfinite(z)  # 0 / 0, and the -inf of a mask
        return unit * (jnp.where(plain, 1.0, z) / jnp.where(plain, 1.0, stabilised))

    @property
    def nonnegative(self) -> bool:
        """Whether the layer's inputs are known never to be negative."""
        return self.known.nonnegative.issuperset(self.layer.inputs)

    @functools.cached_property
    def inputs(self) -> Arrays:
        """The layer's inputs, in at least 32 bits."""
        return tuple(widen(read(self.env, v)) for v in self.layer.inputs)

    @functools.cached_property
    def outputs(self) -> Arrays:
        """The layer's outputs, in at least 32 bits."""
        return tuple(widen(read(self.env, v)) for v in self.layer.outputs)

    @functools.cached_property
    def linear(self) -> LinearMap:
        """The layer as ``z = f(x, w) + b``; raises RuleError if it is not linear."""
        if self.layer.linear is None:
            fitting = "LayerByLayer()" if self.layer.bodies else "for example Pass() or Epsilon()"
            raise RuleError(
                f"layer '{self.layer.name}' ({self.layer.kind}/{self.layer.op}, {self.layer.source}) is not linear; "
                f"give it a rule for {self.layer.kind} layers, {fitting}"
            )
        positive = self.known.positive.issuperset(self.layer.outputs)
        return self.layer.linear.bind(self.env, self.nonnegative, positive, self._stand_in)

    @property
    def _stand_in(self) -> jax.Array | None:
        """The output as it is wherever relevance comes, made of values that others read too."""
        value = self.layer.outputs[0]
        if value in self.known.pooled:
            pool = self.known.pooled[value]
            return at_winners(widen(read(self.env, pool.outputs[0])), pool.params)
        if value in self.known.rectified:
            return widen(read(self.env, self.known.rectified[value]))
        # A quotient of relevance and a difference that is rounded otherwise would be far off near 0.
        exact = bool(self.per_unit) and self.per_unit[0] is not None
        return self._difference(value) if exact and value in self.known.summands else None

    def _difference(self, summand: Value) -> jax.Array:
        whole, other = (widen(read(self.env, v)) for v in self.known.summands[summand])
        return whole - other

    @property
    def input_stand_ins(self) -> Arrays:
        """The inputs, those of a sum as they are wherever relevance comes (see `Known`)."""
        pairs = zip(self.layer.inputs, self.inputs, strict=True)
        return tuple(self._difference(v) if v in self.known.summands else x for v, x in pairs)

    def late(self, relevance: jax.Array, *, inputs: bool = True) -> tuple[jax.Array, LayerCall]:
        """The relevance that arrived, and this call with inputs and weights that are at hand only then (see `when`).

        Args:
            relevance: what arrived.
            inputs: whether inputs wait too, or weights alone.
        """
        core = self.layer.linear and self.layer.linear.core  # scales and shifts behind it are small
        weights = [v for v in (core.inputs if core else ()) if v in self.env and not v.depends]
        values = list(dict.fromkeys([*(self.layer.inputs if inputs else ()), *weights]))
        own = bool(self.arrived) and relevance is self.arrived[0]  # or what a rule put in its place
        unit = self.per_unit[0] if own else None
        (relevance, unit), given = when((relevance, unit), [self.env[v] for v in values], self.since)
        env = ChainMap(dict(zip(values, given, strict=True)), self.env)  # type: ignore[arg-type]
        return relevance, dataclasses.replace(self, env=env, arrived=(relevance,) if own else (), per_unit=(unit,))

    def apply(self, *inputs: jax.Array, hold_scale: bool = False) -> Arrays:
        """Run the layer again on other inputs.

        With ``hold_scale``, statistics that multiply or divide the value they were taken from (the standard deviation
        of a LayerNorm) count as constants for derivatives; statistics that are subtracted (its mean) do not.
        """
        env = ChainMap(dict(zip(self.layer.inputs, inputs, strict=True)), self.env)  # type: ignore[arg-type]
        scales = _Scales(self.layer.inputs)
        for equation in self.layer.equations:
            held = scales.held(equation) if hold_scale else []
            # Held at the forward pass's value, which this layer's derivative does not see but an outer one,
            # through the relevance, does: stop_gradient would make that one wrong.
            here = ChainMap({v: widen(read(self.env, v)) for v in held}, env)
            equation.run(here, wide=True)
            env.update({v: here[v] for v in equation.outputs})
        return tuple(env[v] for v in self.layer.outputs)

    def vjp(self, *cotangents: jax.Array, hold_scale: bool = False) -> Arrays:
        """The layer's own derivative, transposed: ``J^T c`` at its inputs."""
        if is_window_pick(self.layer):
            return (to_winners(self.inputs[0], cotangents[0], self.layer.equations[0]),)
        inputs = self.inputs
        if self.layer.kind == "pick":  # jax compares them with the maximum: XLA must not round the two otherwise
            inputs = lax.optimization_barrier(inputs)
        _, pull = jax.vjp(functools.partial(self.apply, hold_scale=hold_scale), *inputs)
        return pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, self.outputs, strict=True)))


def when(relevance: Any, values: Any, since: jax.Array | None = None) -> tuple[Any, Any]:
    """The same relevance (one or several arrays of one shape) and arrays, the arrays at hand only once it has arrived.

    What only rules need (the layer's run with positive weights) would else be computed along with the forward pass, for
    all layers, and be kept until their turn comes.

    Args:
        relevance: what arrives.
        values: what is to wait.
        since: what to wait for instead: what relevance was made of, such as the last product on its way. That lies in
            memory anyway, while relevance itself may never, being fused with what reads it.
    """
    first: jax.Array = jax.tree.leaves(relevance)[0]
    near = since is not None and since.shape[:1] == first.shape[:1]  # samples, or what passes for them: it adds 0
    awaited: jax.Array = since if near else _corner(first)  # type: ignore[assignment]
    # XLA drops a barrier for what nobody reads, so it is read: as a zero, in a way that XLA does not see through.
    values, awaited = lax.optimization_barrier((values, lax.stop_gradient(awaited)))
    nothing = _corner(awaited) > jnp.inf  # what no number is, and no NaN
    nothing = nothing.reshape([*first.shape[:1], *[1] * (first.ndim - 1)])
    return jax.tree.map(lambda r: r + nothing.astype(r.dtype), relevance), values


def _corner(x: jax.Array) -> jax.Array:
    """One place of each sample, which stands for all: so what makes the rest is still fused with what reads it."""
    return lax.slice(x, [0] * x.ndim, [*x.shape[:1], *(min(n, 1) for n in x.shape[1:])])


class _Scales:
    """Finds, operation by operation, the statistics that scale a value; they are to count as constants."""

    def __init__(self, inputs: tuple[Value, ...]):
        self.linear: set[Value] = set(inputs)  # values that are linear in the layer's input, scales being constant
        self.statistics: set[Value] = set()

    def held(self, equation: Equation) -> list[Value]:
        """The operands to hold in this operation."""
        prim, dependent = equation.primitive, equation.dependent
        known = [v for v in dependent if v in self.statistics]
        held: list[Value] = []
        if prim in P.MUL or prim in P.DIV:
            # a value times a statistic, or (mean times standard deviation) a linear statistic times another
            held = known if len(known) < len(dependent) else [v for v in known if v not in self.linear]
            held = held if len(held) < len(dependent) else []
        if prim in P.STATISTIC or len(known) == len(dependent):
            self.statistics.update(equation.outputs)
        free = [v for v in equation.inputs if v.depends and v not in held]
        scaled = len(free) == 1 and (prim in P.MUL or (prim in P.DIV and equation.inputs[0] is free[0]))
        if (scaled or prim in _LINEAR) and self.linear.issuperset(free):
            self.linear.update(equation.outputs)
        return held


_LINEAR = P.ADD | P.SUB | P.NEG | P.CAST | P.MOVE | P.SUMMING


class Rule(PyTreeNode):
    """How a layer hands the relevance of its outputs to its inputs.

    A rule is a frozen dataclass and a pytree: its numbers are leaves, so that `jax.jit` does not compile anew for
    another gamma and `jax.vmap` can sweep over it. Write your own by overriding `fold`, or, for linear layers, by
    subclassing `SplitRule`, where a rule is one line.
    """

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """Relevance at the layer's inputs, one array per input, given that at its outputs, one per output."""
        raise NotImplementedError

    def hand(self, call: LayerCall, *relevance: jax.Array) -> Handed:
        """What `fold` gives, and what else is known of it."""
        return Handed(self.fold(call, *relevance))

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """Relevance that is lost in this layer on purpose, by name and summed: bias, stabiliser, ..."""
        return {}

    def check(self, layer: Layer, inputs: Arrays) -> None:
        """Raise `InputError` if these inputs are none that the rule is made for; asked where ``check=True``."""

    @property
    def proportional(self) -> bool:
        """Whether what an input gets is proportional to the input, so that where it is 0 it gets nothing."""
        return False

    def __str__(self) -> str:
        """The rule as a person would write it, without what is left at its default."""
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default
            same = value is default or (isinstance(value, (int, float, str)) and value == default)
            if not same:
                shown.append(f"{field.name}={_short(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


class TimesInput(Rule):
    """Base of rules that hand every input its value times a slope.

    ``R_i = x_i g_i`` with ``g_i = Σ_j ∂z_j/∂x_i R_j / stab(z_j)``, where the derivative is the layer's own or that of a
    simpler one. The layer below, whose output ``x`` is, divides ``R`` by ``x`` again: along a run of such layers the
    slopes alone are handed down, as in the gradient. That saves the time of a product and a quotient a layer, and the
    digits that they lose where a value is near 0.
    """

    def slopes(self, call: LayerCall, *relevance: jax.Array) -> PerUnit:
        """``g``, one array per input, None for an input that gets nothing whatever its value."""
        raise NotImplementedError

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """Input times slope."""
        return self._handed(call, relevance).relevance

    def hand(self, call: LayerCall, *relevance: jax.Array) -> Handed:
        """Input times slope, and the slope alone."""
        if type(self).fold is not TimesInput.fold:
            return super().hand(call, *relevance)
        return self._handed(call, relevance)

    def _handed(self, call: LayerCall, relevance: Arrays) -> Handed:
        pairs = list(zip(call.inputs, self.slopes(call, *relevance), strict=True))
        handed = tuple(jnp.zeros_like(x) if g is None else x * g for x, g in pairs)  # no infinity times 0
        return Handed(handed, tuple(jnp.zeros_like(x) if g is None else g for x, g in pairs))

    @property
    def proportional(self) -> bool:
        """As long as a subclass keeps ``fold``."""
        return type(self).fold is TimesInput.fold


def times(x: Arrays, y: Arrays) -> Arrays:
    """Products, one by one."""
    return tuple(a * b for a, b in zip(x, y, strict=True))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if hasattr(value, "shape") and getattr(value, "ndim", 0) > 0:
        return f"array{list(value.shape)}"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value) if isinstance(value, str) else str(value)


def known(value: Any) -> float | None:
    """A number that a person wrote into a rule, or None.

    Arrays are not judged: a rule is a pytree, and its gradient is a rule whose gamma may well be negative.
    """
    return float(value) if isinstance(value, (int, float, np.generic)) else None


def at_least_zero(**fields: Any) -> None:
    """Raise ValueError for a field that is negative or NaN."""
    for name, value in fields.items():
        number = known(value)
        if number is not None and not number >= 0:
            raise ValueError(f"{name} must be at least 0, not {value}")


Stabiliser = float | jax.Array | Callable[[jax.Array], jax.Array]


def stabilise(
    z: jax.Array,
    epsilon: Any,
    *,
    clip: bool = False,
    norm_scale: bool = False,
    features: tuple[int, ...] = (),
) -> jax.Array:
    """Push ``z`` away from 0, keeping its sign: ``z + epsilon * sign(z)`` with ``sign(0) = +1``.

    Args:
        z: denominators.
        epsilon: a number >= 0, an array that broadcasts to ``z``, or a function of ``z`` that returns one.
        clip: use ``sign(z) * max(|z|, epsilon)`` instead.
        norm_scale: multiply epsilon by the root mean square of ``z`` over ``features``.
        features: the axes of ``z`` that belong to one sample.

    Returns:
        The stabilised denominators; ``z`` itself for the number 0.
    """
    if isinstance(epsilon, (int, float)) and epsilon == 0:
        return z
    if callable(epsilon):
        epsilon = epsilon(z)
    if norm_scale:
        epsilon = epsilon * jnp.sqrt(jnp.mean(jnp.square(z), axis=features, keepdims=True))
    epsilon = jnp.asarray(epsilon, z.dtype)
    if clip:
        return jnp.where(z >= 0, jnp.maximum(z, epsilon), jnp.minimum(z, -epsilon))
    return z + jnp.where(z >= 0, epsilon, -epsilon)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator`` with 0 where the denominator is 0, in derivatives too."""
    # The quotient comes last: XLA computes it once for all that read it, but what is done to it once for each.
    return numerator / jnp.where(denominator == 0, jnp.inf, denominator)


def total(x: jax.Array) -> jax.Array:
    """Sum of all entries."""
    return jnp.sum(x)


def unbroadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum over the axes along which an array of this shape was repeated."""
    if x.shape == shape:
        return x
    extra = x.ndim - len(shape)
    x = jnp.sum(x, axis=tuple(range(extra)))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return jnp.sum(x, axis=axes, keepdims=True)
