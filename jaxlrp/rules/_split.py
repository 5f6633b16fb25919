"""What rules have in common that split a linear layer's contributions by sign.

Write ``c_ij = x_i w_ij`` for what input ``i`` contributes to output ``j``, ``c⁺ = max(c, 0)``, ``c⁻ = min(c, 0)``, and
``P_j = Σ_i c⁺_ij + b⁺_j``, ``N_j = Σ_i c⁻_ij + b⁻_j``, so that ``z = P + N``. Every such rule is a short list of
*shares* ``(ρ, p, n)``: a part ``ρ_j`` of the relevance that is handed out in proportion to ``p c⁺ + n c⁻``:

    R_i = Σ_shares Σ_j (p c⁺_ij + n c⁻_ij) ρ_j / stab(p P_j + n N_j)

The split of the contributions is never formed: with ``x⁺, x⁻, w⁺, w⁻`` the sums over ``c⁺`` and ``c⁻`` are
``f(x⁺, w⁺) + f(x⁻, w⁻)`` and ``f(x⁺, w⁻) + f(x⁻, w⁺)``, so one share costs one or two runs of the layer and their
transposes, one where the inputs are known to be nonnegative.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ..errors import RuleError
from ..linear import LinearMap
from ._base import (
    Arrays,
    Handed,
    LayerCall,
    Losses,
    Rule,
    at_least_zero,
    ratio,
    stabilise,
    times,
    total,
)

Factor = float | jax.Array
Share = tuple[jax.Array, Factor, Factor]
Term = tuple[Arrays, Arrays]  # inputs and their slopes
Bias = Literal["absorb", "ignore", "redistribute"]


class SplitRule(Rule, kw_only=True):
    """Base of all rules that hand out relevance in proportion to signed contributions.

    A rule of your own is one line:

        >>> import jax.numpy as jnp, jaxlrp
        >>> class Damped(jaxlrp.SplitRule):  # negative contributions count half
        ...     def shares(self, relevance, z):
        ...         return [(relevance, 1.0, 0.5)]
        >>> layer = lambda x, w: x @ w
        >>> explain = jaxlrp.lrp(layer, jaxlrp.Composite.uniform(Damped()))
        >>> relevance = explain(jnp.array([1.0, 1.0]), jnp.array([[3.0], [-2.0]]))
        >>> [round(float(r), 3) for r in relevance]
        [1.5, -0.5]

    Attributes:
        epsilon: stabiliser added to denominators with their sign: a number >= 0, an array that broadcasts to the
            layer's output, or a function of the denominators (a `jax.tree_util.Partial` if the rule is to cross
            `jax.jit`).
        clip: let denominators have at least the size epsilon instead of adding it.
        norm_scale: epsilon is relative to the root mean square of the denominators over one sample.
        bias: what becomes of the share that the bias would get. ``"absorb"``: it is lost there, the textbook's way.
            ``"ignore"``: the bias is left out of the denominators. ``"redistribute"``: its share and the stabiliser's
            are spread over the inputs in proportion to the size of their contributions, so that the sum is conserved
            (but for outputs to which no input contributes with a sign that the rule counts).
    """

    epsilon: Any = 1e-6
    clip: bool = struct.field(pytree_node=False, default=False)
    norm_scale: bool = struct.field(pytree_node=False, default=False)
    bias: Bias = struct.field(pytree_node=False, default="absorb")

    def __post_init__(self) -> None:
        if self.bias not in ("absorb", "ignore", "redistribute"):
            raise ValueError(f'bias must be "absorb", "ignore" or "redistribute", not {self.bias!r}')
        at_least_zero(epsilon=self.epsilon)

    def shares(self, relevance: jax.Array, z: jax.Array) -> Sequence[Share]:
        """The rule itself: which parts of the relevance go where.

        Args:
            relevance: relevance at the layer's output.
            z: the output.

        Returns:
            A list of ``(ρ, p, n)``: the part ``ρ`` of the relevance, of the output's shape, is handed out in
            proportion to ``p c⁺ + n c⁻`` of the contributions. Dividing by their sum is not the rule's business:
            return relevance, not ``relevance / z``. Several parts add up.
        """
        raise NotImplementedError

    @property
    def proportional(self) -> bool:
        """As long as a subclass changes the shares alone."""
        return type(self).modify is SplitRule.modify and type(self).fold is SplitRule.fold

    def _shares(self, relevance: jax.Array, linear: LinearMap) -> Sequence[Share]:
        shares = self.shares(relevance, linear.output)
        triples = isinstance(shares, (list, tuple)) and all(isinstance(s, tuple) and len(s) == 3 for s in shares)
        if not triples or not shares:
            found = "an empty one" if triples else type(shares).__name__
            raise RuleError(
                f"{type(self).__name__}.shares must return a list of (part of the relevance, weight of positive "
                f"contributions, weight of negative ones), not {found}"
            )
        return shares

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """``R_i = Σ (p c⁺ + n c⁻) ρ / stab(p P + n N)``."""
        return self._handed(call, relevance[0]).relevance

    def hand(self, call: LayerCall, *relevance: jax.Array) -> Handed:
        """The same, and per unit of input if that is what is multiplied by weights."""
        if type(self).fold is not SplitRule.fold:
            return super().hand(call, *relevance)
        return self._handed(call, relevance[0])

    def _handed(self, call: LayerCall, relevance: jax.Array) -> Handed:
        if self._again(call):
            relevance, call = call.late(relevance)
        elif call.layer.linear is not None and call.layer.linear.convolves:  # kernels are turned around only then
            relevance, call = call.late(relevance, inputs=False)
        own = self._told(call, relevance)
        linear = self._modified(own)
        if self.bias == "redistribute":
            terms = self._redistributed(linear, relevance)
        else:
            terms = []
            for flow in self._flows(call, linear, relevance):
                terms += self._hand(linear.frugally() if flow.at_least_z else linear, flow)
        product = terms[0][1][0] if own.product else None  # the first transpose
        if all(x is own.inputs for x, _ in terms):
            slopes = _added([g for _, g in terms])
            return Handed(times(call.input_stand_ins, slopes), slopes, product)
        return Handed(_added([times(x, g) for x, g in terms]), (), product)

    def _again(self, call: LayerCall) -> bool:
        """Whether the layer has to run once more for the sums of the shares."""
        return True

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """Bias, stabiliser, and what had no contribution of the right sign to go to."""
        (arrived,) = relevance
        linear = self._modified(self._told(call, arrived))
        if self.bias == "redistribute":
            kept = self._redistributed_share(linear, arrived)
            return {"dropped sign": total(arrived - kept)}
        zero = jnp.zeros((), arrived.dtype)
        losses = {"bias": zero, "stabiliser": zero, "dropped sign": zero}
        handed = jnp.zeros_like(arrived)
        for flow in self._flows(call, linear, arrived):
            missing = flow.share - flow.coefficient * flow.denominator
            empty = flow.denominator == 0
            losses["bias"] += total(flow.coefficient * flow.bias)
            losses["stabiliser"] += total(jnp.where(empty, 0.0, missing))
            losses["dropped sign"] += total(jnp.where(empty, missing, 0.0))
            handed += flow.share
        losses["dropped sign"] += total(arrived - handed)
        return losses

    def _told(self, call: LayerCall, relevance: jax.Array) -> LinearMap:
        """The layer; what a rule of a user's own made of the relevance may lie where none came."""
        arrived = bool(call.arrived) and relevance is call.arrived[0]
        return call.linear if arrived else dataclasses.replace(call.linear, positive=False, stand_in=None)

    def _modified(self, own: LinearMap) -> LinearMap:
        new = self.modify(own)
        if new is own:
            return own
        same = new.inputs is own.inputs
        runs_as_before = (new.apply, new.transpose) == (own.apply, own.transpose)
        stack, rows = (own.stack, own.rows) if runs_as_before else (None, 0)
        positive = own.positive and new.output is own.output
        return dataclasses.replace(
            new, exact=False, nonnegative=own.nonnegative and same, positive=positive, stack=stack, rows=rows
        )

    def modify(self, linear: LinearMap) -> LinearMap:
        """Other inputs, weights or bias to compute contributions from; the layer's own by default."""
        return linear

    # -- one share at a time -------------------------------------------------------------------------------------

    def _flows(self, call: LayerCall, linear: LinearMap, relevance: jax.Array) -> Iterator[Flow]:
        for share, p, n in self._shares(relevance, linear):
            z = self._where_it_comes(call, linear, share).output
            exactly = linear.exact and self.bias == "absorb"
            positive = linear.positive and share is relevance  # another share may lie where none came
            at_least_z = exactly and positive and is_one(p) and isinstance(n, (int, float)) and 0 <= n <= 1
            sums = sums_of(linear.frugally() if at_least_z else linear, p, n)
            bias = jnp.zeros_like(sums)
            if linear.bias is not None and self.bias == "absorb":
                bias = jnp.broadcast_to(_mix(p, linear.bias, n), sums.shape)
                # z is known from the forward pass; XLA then drops the second run of the layer
                sums = z if linear.exact and is_one(p) and is_one(n) else sums + bias
            elif linear.bias is None and linear.exact and is_one(p) and is_one(n):
                sums = z
            if at_least_z and sums is not z and linear.frugal is not None:
                sums = at_least(sums, z)
            stabilised = self._stab(sums, linear)
            whole = share is relevance and sums is z
            coefficient = call.slope(share, sums, stabilised) if whole else ratio(share, stabilised)
            yield Flow(share, p, n, coefficient, sums, bias, at_least_z or (sums is z and positive))

    def _where_it_comes(self, call: LayerCall, linear: LinearMap, relevance: jax.Array) -> LinearMap:
        """With ``z`` as it is where relevance comes, unless a denominator depends on ``z`` at other places too.

        For the relevance that arrived alone: what a rule of a user's own made of it may lie where none came.
        """
        if linear.stand_in is None or self.norm_scale or callable(self.epsilon):
            return linear
        arrived = bool(call.arrived) and relevance is call.arrived[0]
        return dataclasses.replace(linear, output=linear.stand_in) if arrived else linear

    def _over(
        self, linear: LinearMap, relevance: jax.Array, *denominators: jax.Array, at_least_z: bool
    ) -> Iterator[Flow]:
        """Every share over its own sum, bias included; a rule may have fewer shares than sums.

        Args:
            linear: the layer.
            relevance: at its output.
            denominators: the sums.
            at_least_z: whether the first of them is at least ``z`` wherever relevance comes.
        """
        bias = bias_of(linear)
        for (share, p, n), sums in zip(self._shares(relevance, linear), denominators, strict=False):
            coefficient = ratio(share, self._stab(sums, linear))
            yield Flow(share, p, n, coefficient, sums, jnp.broadcast_to(_mix(p, bias, n), sums.shape), at_least_z)
            at_least_z = False

    def _hand(self, linear: LinearMap, flow: Flow) -> list[Term]:
        return pulled(linear, flow.p, flow.n, flow.coefficient)

    def _stab(self, z: jax.Array, linear: LinearMap) -> jax.Array:
        return stabilise(z, self.epsilon, clip=self.clip, norm_scale=self.norm_scale, features=linear.features)

    # -- conserving the sum exactly ----------------------------------------------------------------------------------

    def _redistribution(self, linear: LinearMap, relevance: jax.Array) -> Arrays:
        positive, negative = sums_of(linear, 1.0, 0.0), sums_of(linear, 0.0, 1.0)
        bias = 0.0 if linear.bias is None else linear.bias
        plus = minus = jnp.zeros_like(relevance)
        for share, p, n in self._shares(relevance, linear):
            sums = p * (positive + jnp.maximum(bias, 0.0)) + n * (negative + jnp.minimum(bias, 0.0))
            coefficient = ratio(share, self._stab(sums, linear))
            plus, minus = plus + p * coefficient, minus + n * coefficient
        missing = relevance - plus * positive - minus * negative
        size = jnp.abs(plus) * positive - jnp.abs(minus) * negative
        spread = ratio(missing, size)
        plus, minus = plus + jnp.abs(plus) * spread, minus - jnp.abs(minus) * spread
        return positive, negative, plus, minus

    def _redistributed(self, linear: LinearMap, relevance: jax.Array) -> list[Term]:
        _, _, plus, minus = self._redistribution(linear, relevance)
        return pulled(linear, 1.0, 0.0, plus) + pulled(linear, 0.0, 1.0, minus)

    def _redistributed_share(self, linear: LinearMap, relevance: jax.Array) -> jax.Array:
        positive, negative, plus, minus = self._redistribution(linear, relevance)
        return plus * positive + minus * negative


class Flow(NamedTuple):
    share: jax.Array  # ρ
    p: Factor
    n: Factor
    coefficient: jax.Array  # ρ / stab(p P + n N)
    denominator: jax.Array  # p P + n N
    bias: jax.Array  # the bias's part of the denominator
    at_least_z: bool  # whether the denominator is known to have at least the size of z, where relevance comes


def bias_of(linear: LinearMap) -> jax.Array:
    return jnp.zeros(()) if linear.bias is None else linear.bias


def at_least(sums: jax.Array, z: jax.Array) -> jax.Array:
    """The larger one; where rounding decides that, its derivative is nevertheless that of the sums."""
    return sums + jax.lax.stop_gradient(jnp.maximum(z - sums, 0.0))


def sums_of(linear: LinearMap, p: Factor, n: Factor) -> jax.Array:
    """``Σ_i p c⁺ + n c⁻`` for every output."""
    return linear.apply_all(parts(linear, p, n))


def pulled(linear: LinearMap, p: Factor, n: Factor, s: jax.Array) -> list[Term]:
    """``Σ_j (p c⁺_ij + n c⁻_ij) s_j`` for every input, as products of inputs and slopes that are to be added up."""
    inputs, weights = zip(*parts(linear, p, n), strict=True)
    return list(zip(inputs, linear.transpose_all(weights, s), strict=True))


def _added(terms: Sequence[Arrays]) -> Arrays:
    return tuple(functools.reduce(operator.add, each) for each in zip(*terms, strict=True))


def parts(linear: LinearMap, p: Factor, n: Factor) -> list[tuple[Arrays, Arrays]]:
    """Inputs and weights whose contributions add up to ``p c⁺ + n c⁻``."""
    x, w = linear.inputs, linear.weights
    if p is n or (is_static(p) and is_static(n) and p == n):
        return [(x, w if is_one(p) else tuple(p * a for a in w))]
    own = tuple(_mix(p, a, n) for a in w)
    if linear.nonnegative:
        return [(x, own)]
    up, down = tuple(jnp.maximum(a, 0.0) for a in x), tuple(jnp.minimum(a, 0.0) for a in x)
    return [(up, own), (down, tuple(_mix(n, a, p) for a in w))]


def _mix(p: Factor, w: jax.Array, n: Factor) -> jax.Array:
    """``p w⁺ + n w⁻``."""
    parts = []
    if not is_zero(p):
        parts.append(jnp.maximum(w, 0.0) if is_one(p) else p * jnp.maximum(w, 0.0))
    if not is_zero(n):
        parts.append(jnp.minimum(w, 0.0) if is_one(n) else n * jnp.minimum(w, 0.0))
    return sum(parts[1:], parts[0]) if parts else jnp.zeros_like(w)


def is_static(factor: Any) -> bool:
    return isinstance(factor, (int, float))


def is_zero(factor: Any) -> bool:
    return is_static(factor) and factor == 0


def is_one(factor: Any) -> bool:
    return is_static(factor) and factor == 1
