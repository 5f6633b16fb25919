"""Rules for all that is not a weighted sum: activations, moves, picks, residual sums, products, normalisations."""

from __future__ import annotations

import math
from collections import ChainMap
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from .. import _compat
from ..errors import RuleError
from ..graph import Equation, read, widen
from ._base import (
    Arrays,
    Handed,
    LayerCall,
    Losses,
    PerUnit,
    Rule,
    TimesInput,
    at_least_zero,
    ratio,
    stabilise,
    total,
    unbroadcast,
)


class Pass(Rule):
    """``R_in = R_out``: the output is caused by that one input alone (activations, lone BatchNorms)."""

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """The same relevance, summed where the operation repeated its input."""
        if len(call.layer.inputs) != 1 or len(relevance) != 1:
            raise RuleError(
                f"Pass() hands relevance from one output to one input, but layer '{call.layer.name}' "
                f"({call.layer.kind}/{call.layer.op}) has {len(call.layer.inputs)} inputs and {len(relevance)} outputs"
            )
        (out,), (value,) = relevance, call.layer.inputs
        for move in reversed(call.layer.moves):
            out = _moved_back(move, out)
        repeated = _fits(out, value.shape)
        opaque = call.layer.kind == "custom"  # nobody knows which place went where
        if not repeated and (opaque or out.size != math.prod(value.shape)):
            raise RuleError(
                f"Pass() needs an output of its input's shape, but layer '{call.layer.name}' "
                f"({call.layer.kind}/{call.layer.op}) maps {value.shape} to {out.shape}"
            )
        return (unbroadcast(out, value.shape) if repeated else out.reshape(value.shape),)


def _moved_back(move: Equation, out: jax.Array) -> jax.Array:
    before = jax.ShapeDtypeStruct(move.inputs[0].shape, out.dtype)
    return jax.linear_transpose(lambda x: _compat.bind(move.primitive, move.params, x)[0], before)(out)[0]


def _fits(out: jax.Array, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be repeated to that of ``out``."""
    pairs = zip(reversed(out.shape), reversed(shape), strict=False)
    return len(shape) <= out.ndim and all(n in (1, m) for m, n in pairs)


class Route(Rule):
    """Relevance follows its value: along the transpose of a move, or to the winner of a pick.

    Ties of a maximum are split the way the operation's own derivative splits them. What comes from a
    constant (padding, a masked entry) is lost, and named.
    """

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """``J^T R``, where every entry of ``J`` is 0 or 1 (or a share of a tie)."""
        return call.vjp(*relevance)

    def hand(self, call: LayerCall, *relevance: jax.Array) -> Handed:
        """A move takes relevance per unit along, as it takes relevance."""
        units = [u for u in call.per_unit if u is not None]
        if call.layer.kind != "move" or type(self).fold is not Route.fold or len(units) < len(relevance):
            return super().hand(call, *relevance)
        return Handed(self.fold(call, *relevance), self.fold(call, *units))

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """What went to constants (padding, the other side of a mask), found by folding to them too."""
        equation, *more = call.layer.equations
        if more:  # a logsumexp: its derivative is a softmax, which sums to one
            return {}
        constants = [v for v in equation.inputs if not v.depends and jnp.issubdtype(v.dtype, jnp.floating)]
        if not constants:
            return {}

        def run(constant: Arrays, inputs: Arrays) -> Arrays:
            given = dict(zip((*constants, *call.layer.inputs), (*constant, *inputs), strict=True))
            env = ChainMap(given, call.env)  # type: ignore[arg-type]
            equation.run(env, wide=True)
            return tuple(env[v] for v in call.layer.outputs)

        _, pull = jax.vjp(run, tuple(widen(read(call.env, v)) for v in constants), call.inputs)
        to_constants, _ = pull(tuple(r.astype(z.dtype) for r, z in zip(relevance, call.outputs, strict=True)))
        return {"constant": sum(map(total, to_constants), jnp.zeros(()))}


class Residual(Rule, kw_only=True):
    """A sum of two branches ``a + b`` shared by a policy of your choice.

    ============  ======================================================
    policy        share of ``a``
    ============  ======================================================
    ``ratio``     ``a / (a + b)``, signed (the epsilon rule; the default everywhere)
    ``abs``       ``|a| / (|a| + |b|)``: never negative or larger than 1, cures blow-ups where branches cancel
    ``equal``     ``1/2``
    ``branch``    all to one side: ``branch=0`` is the first summand
    ============  ======================================================

    Where a constant is added (position embeddings), it has a share by ``ratio`` and ``abs``, which is lost there.

    Example:
        >>> import jax.numpy as jnp, jaxlrp
        >>> composite = jaxlrp.Composite((jaxlrp.kind("add"), jaxlrp.Residual("abs")))
        >>> jaxlrp.lrp(lambda ab: ab[0] + ab[1], composite)((jnp.array(3.0), jnp.array(-1.0)))
        (Array(1.5, dtype=float32), Array(0.5, dtype=float32))
    """

    policy: Literal["ratio", "abs", "equal", "branch"] = struct.field(pytree_node=False, default="ratio", kw_only=False)
    branch: int = struct.field(pytree_node=False, default=0)
    epsilon: Any = 1e-6

    def __post_init__(self) -> None:
        at_least_zero(epsilon=self.epsilon)
        if self.policy not in ("ratio", "abs", "equal", "branch"):
            raise ValueError(f'policy must be "ratio", "abs", "equal" or "branch", not {self.policy!r}')

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """Share the relevance of the sum among its summands."""
        (out,) = relevance
        parts = self._parts(call)[: len(call.inputs)]
        return tuple(unbroadcast(out * part, x.shape) for part, x in zip(parts, call.inputs, strict=True))

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """What a constant summand (position embeddings) and the stabiliser take."""
        parts = self._parts(call)
        constant = sum(parts[len(call.inputs) :], jnp.zeros(()))
        rest = 1.0 - sum(parts, jnp.zeros(()))
        return {"bias": total(relevance[0] * constant), "stabiliser": total(relevance[0] * rest)}

    def _parts(self, call: LayerCall) -> Arrays:
        """The share of every summand; that of a constant comes last, and only where shares go by size."""
        if call.layer.op not in ("add", "sub", "add_any"):
            raise RuleError(
                f"Residual() is for sums of two values, not for layer '{call.layer.name}' "
                f"({call.layer.kind}/{call.layer.op}); use Epsilon() there"
            )
        linear = call.linear
        terms = [x * w for x, w in zip(linear.inputs, linear.weights, strict=True)]
        if self.policy == "branch" and not 0 <= self.branch < len(terms) and len(terms) > 1:
            raise RuleError(f"layer '{call.layer.name}' has {len(terms)} summands and no branch {self.branch}")
        shape = linear.output.shape
        if self.policy == "equal":
            return tuple(jnp.full(shape, 1.0 / len(terms)) for _ in terms)
        if self.policy == "branch":
            return tuple(jnp.full(shape, float(i == self.branch or len(terms) == 1)) for i in range(len(terms)))
        if linear.bias is not None:
            terms.append(linear.bias)
        sizes = [jnp.abs(t) if self.policy == "abs" else t for t in terms]
        denominator = stabilise(sum(sizes[1:], sizes[0]), self.epsilon)
        return tuple(jnp.broadcast_to(ratio(s, denominator), shape) for s in sizes)


class EqualShare(TimesInput, kw_only=True):
    """Equal shares for the factors of a product: ``R_a = a ∂(ab)/∂a R / stab(2 ab)`` (Achtibat et al., 2024).

    For ``n`` factors each gets one n-th: half to the gate and half to the gated value, half to the attention
    weights and half to the values. The numerator of a quotient gets all, its denominator nothing. A factor that counts
    as a constant (`Constant`) is none: the others get its share.
    """

    epsilon: Any = 1e-6

    def __post_init__(self) -> None:
        at_least_zero(epsilon=self.epsilon)

    def slopes(self, call: LayerCall, *relevance: jax.Array) -> PerUnit:
        """The derivative, divided among the factors."""
        if len(relevance) != 1:
            raise RuleError(
                f"{type(self).__name__}() is for products, not for layer '{call.layer.name}' "
                f"({call.layer.kind}/{call.layer.op}), which has {len(relevance)} outputs"
            )
        back = call.vjp(self._slope(call, relevance[0]))
        return tuple(g if n else None for n, g in zip(self._factors(call), back, strict=True))

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """What the stabiliser takes."""
        shares = sum(self._factors(call)) * call.outputs[0]
        return {"stabiliser": total(relevance[0] - shares * self._slope(call, relevance[0]))}

    def _slope(self, call: LayerCall, relevance: jax.Array) -> jax.Array:
        """``R / stab(n z)`` for ``n`` factors."""
        n, z = sum(self._factors(call)) or 1, call.outputs[0]  # the product of an empty axis has no factors
        epsilon: Any = self.epsilon(n * z) if callable(self.epsilon) else self.epsilon
        return call.slope(relevance, z, stabilise(z, epsilon / abs(n))) / n

    def _factors(self, call: LayerCall) -> list[int]:
        """How many factors of the product each input is: ``x @ x.T`` has one input and two factors."""
        inputs = call.layer.inputs
        if call.layer.op == "div" and len(inputs) == 2:  # a constant over x: the share of x is that of 1 / x
            return [0, -1] if inputs[0] in call.known.constant else [1, 0]
        if call.layer.op == "prod":
            return [math.prod(inputs[0].shape) // max(math.prod(call.layer.outputs[0].shape), 1)]
        counts = [sum(v is u for e in call.layer.equations for u in e.inputs) for v in inputs]
        live = [0 if v in call.known.constant else n for v, n in zip(inputs, counts, strict=True)]
        return live if any(live) else counts


class SignalTakeAll(EqualShare, kw_only=True):
    """A gated value gets all relevance of the product, its gate nothing (Arras et al., 2017).

    The gate is the factor that comes out of a squashing function: a sigmoid or softmax rather than any other
    activation, and any activation rather than tanh or none. Where no factor is more of a gate than the others, shares
    are equal.
    """

    def _factors(self, call: LayerCall) -> list[int]:
        factors = super()._factors(call)
        signal = [0 if i in call.layer.gates else n for i, n in enumerate(factors)]
        return signal if any(signal) else factors


class Constant(Rule):
    """The layer's output counts as a constant, like a weight: no relevance flows into it.

    What is made of it alone is constant too, and products with it hand all relevance to their other factors: attention
    weights in CP-LRP, the step size of a state-space model. Relevance that a sum shares out to a constant is lost like
    that of a bias.
    """

    @property
    def proportional(self) -> bool:
        """As long as a subclass keeps ``fold``."""
        return type(self).fold is Constant.fold

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """Nothing."""
        return tuple(map(jnp.zeros_like, call.inputs))

    def hand(self, call: LayerCall, *relevance: jax.Array) -> Handed:
        """Nothing, per unit of input too."""
        handed = self.fold(call, *relevance)
        return Handed(handed, handed if type(self).fold is Constant.fold else ())

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """All of it."""
        return {"constant": sum(map(total, relevance), jnp.zeros(()))}


class LayerByLayer(Rule):
    """A recurrence or a branch is folded through the layers inside, each by its own rule.

    The steps of a scan are replayed backwards: relevance of a carry goes to the step before.
    """


class HoldScale(TimesInput, kw_only=True):
    """Normalisation with its scale held constant: ``R_i = x_i Σ_j ∂z_j/∂x_i R_j / stab(z_j)`` (Ali et al., 2022).

    The statistic that divides (standard deviation, root mean square, norm) counts as a constant, the one
    that is subtracted (mean) does not, so that the layer is linear and relevance does not vanish in it.
    """

    epsilon: Any = 1e-6

    def __post_init__(self) -> None:
        at_least_zero(epsilon=self.epsilon)

    def slopes(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """The derivative of the detached layer."""
        return call.vjp(*self._output_slopes(call, relevance), hold_scale=True)

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """What the shift and the stabiliser take: with its scale held the layer is affine, or this does not add up."""
        shifts = call.apply(*map(jnp.zeros_like, call.inputs), hold_scale=True)
        zero = jnp.zeros(())
        losses = {"bias": zero, "stabiliser": zero}
        for r, s, b, z in zip(relevance, self._output_slopes(call, relevance), shifts, call.outputs, strict=True):
            losses["bias"] += total(s * b)
            losses["stabiliser"] += total(r - s * z)
        return losses

    def _output_slopes(self, call: LayerCall, relevance: Arrays) -> Arrays:
        outputs = enumerate(zip(relevance, call.outputs, strict=True))
        return tuple(call.slope(r, z, stabilise(z, self.epsilon), i) for i, (r, z) in outputs)
