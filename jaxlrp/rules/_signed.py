"""Rules by sign: which share of the relevance goes to which contributions (`_split` has the formula).

=============  ==========================================
rule           shares
=============  ==========================================
0, epsilon     (R, 1, 1)
z+             (R, 1, 0)
alpha-beta     (αR, 1, 0) and (-βR, 0, 1)
gamma          (R [z > 0], 1+γ, 1) and (R [z < 0], 1, 1+γ)
=============  ==========================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from ..graph import wide_dtype
from ..linear import LinearMap
from ._base import Arrays, Handed, LayerCall, Losses, at_least_zero, known, stabilise, times, total
from ._split import Flow, Share, SplitRule, Term, at_least, bias_of, is_one, is_static, is_zero, parts, sums_of
from ._sweep import transposes


class Zero(SplitRule, kw_only=True):
    """LRP-0: ``R_i = Σ_j c_ij R_j / z_j`` (Bach et al., 2015).

    Where ``z_j`` is 0, ``R_j / z_j`` is what the layers above handed down per unit of ``z_j``, as in gradient x input,
    or 0 if they have a rule that does not say.

    On layers that are not linear it is the first-order Taylor term: ``x_i`` times the derivative of the output along
    it.

    Example:
            >>> import jax.numpy as jnp, jaxlrp
            >>> explain = jaxlrp.lrp(lambda x, w: x @ w, jaxlrp.Composite.uniform(jaxlrp.Zero()))
            >>> explain(jnp.array([1.0, 2.0]), jnp.array([[3.0], [1.0]]))
            Array([3., 2.], dtype=float32)
    """

    epsilon: Any = struct.field(pytree_node=False, default=0.0)

    def shares(self, relevance: jax.Array, z: jax.Array) -> Sequence[Share]:
        """All of it, in proportion to all contributions."""
        return [(relevance, 1.0, 1.0)]

    @property
    def proportional(self) -> bool:
        """As long as a subclass changes the shares alone."""
        return type(self).modify is SplitRule.modify and type(self).fold is Zero.fold

    def _again(self, call: LayerCall) -> bool:
        """Not for the sum of all contributions, which is known from the forward pass."""
        return type(self).shares is not Zero.shares or self.bias != "absorb"

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """As for every split rule; a Taylor term where the layer is not linear."""
        if call.layer.linear is not None:
            return super().fold(call, *relevance)
        return self._taylor(call, relevance).relevance

    def hand(self, call: LayerCall, *relevance: jax.Array) -> Handed:
        """The same, and per unit of input."""
        if type(self).fold is not Zero.fold:
            return super().hand(call, *relevance)
        return self._taylor(call, relevance) if call.layer.linear is None else self._handed(call, *relevance)

    def _taylor(self, call: LayerCall, relevance: Arrays) -> Handed:
        back = call.vjp(*self._seeds(call, relevance))
        # nothing to a mask, and no -inf times 0
        slopes = tuple(jnp.where(_masked(x), 0.0, g) for x, g in zip(call.inputs, back, strict=True))
        return Handed(times(_unmasked(call.inputs), slopes), slopes)

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """Named losses of a linear layer; of others, what the Taylor term leaves out."""
        if call.layer.linear is not None:
            return super().losses(call, *relevance)
        _, linear = jax.jvp(call.apply, call.inputs, _unmasked(call.inputs))
        zero = jnp.zeros(())
        losses = {"nonlinearity": zero, "stabiliser": zero}
        for r, c, z, t in zip(relevance, self._seeds(call, relevance), call.outputs, linear, strict=True):
            z, t = (jnp.where(jnp.isfinite(z), a, 0.0) for a in (z, t))  # a masked output (log 0) gets nothing
            losses["nonlinearity"] += total(c * (z - t))
            losses["stabiliser"] += total(r - c * z)
        return losses

    def _seeds(self, call: LayerCall, relevance: Arrays) -> list[jax.Array]:
        outputs = enumerate(zip(relevance, call.outputs, strict=True))
        return [call.slope(r, z, self._stab_plain(z), i) for i, (r, z) in outputs]

    def _stab_plain(self, z: jax.Array) -> jax.Array:
        features = tuple(range(max(z.ndim - 1, 0), z.ndim))
        return stabilise(z, self.epsilon, clip=self.clip, norm_scale=self.norm_scale, features=features)


_FILL = 1e8  # masks are filled with -inf, -1e9 or the most negative number; no score comes near these


def _unmasked(x: Arrays) -> Arrays:
    """Inputs with 0 where a mask stands, which contributes nothing (to a softmax)."""
    return tuple(jnp.where(_masked(a), 0.0, a) for a in x)


def _masked(x: jax.Array) -> jax.Array:
    return jnp.abs(x) >= _FILL


class Epsilon(Zero):
    """LRP-epsilon: ``R_i = Σ_j c_ij R_j / (z_j + ε sign z_j)`` (Bach et al., 2015).

    Example:
        >>> import jaxlrp
        >>> print(jaxlrp.Epsilon(0.25, norm_scale=True))
        Epsilon(epsilon=0.25, norm_scale=True)
    """

    epsilon: Any = struct.field(default=1e-6, kw_only=False)


class Norm(Epsilon):
    """The epsilon rule under the name it has for weightless sums and average pools (zennit's Norm)."""


class ZPlus(SplitRule, kw_only=True):
    """LRP-z+: positive contributions alone, ``R_i = Σ_j c⁺_ij R_j / P_j`` (Montavon et al., 2017).

    The same as alpha 1, beta 0: negative inputs with negative weights contribute positively.
    """

    def shares(self, relevance: jax.Array, z: jax.Array) -> Sequence[Share]:
        """All of it to positive contributions."""
        return [(relevance, 1.0, 0.0)]


class AlphaBeta(SplitRule, kw_only=True):
    """LRP-αβ: ``R_i = Σ_j (α c⁺_ij / P_j - β c⁻_ij / N_j) R_j`` with ``α - β = 1`` (Bach et al., 2015).

    Raises:
        ValueError: alpha or beta is negative, or ``alpha - beta`` is not 1.
    """

    alpha: Any = struct.field(default=2.0, kw_only=False)
    beta: Any = struct.field(default=1.0, kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha, beta = known(self.alpha), known(self.beta)
        at_least_zero(alpha=self.alpha, beta=self.beta)
        if alpha is not None and beta is not None and abs(alpha - beta - 1) > 1e-6:
            raise ValueError(f"alpha and beta must be at least 0 and alpha - beta 1, not {self.alpha}, {self.beta}")

    def shares(self, relevance: jax.Array, z: jax.Array) -> Sequence[Share]:
        """Alpha to positive contributions, minus beta to negative ones."""
        shares: list[Share] = [(self.alpha * relevance, 1.0, 0.0)]
        if not is_zero(self.beta):
            shares.append((-self.beta * relevance, 0.0, 1.0))
        return shares

    def _flows(self, call: LayerCall, linear: LinearMap, relevance: jax.Array) -> Iterator[Flow]:
        """Behind a relu one run of the layer for both sums, ``N``: where ``z > 0``, ``P = z - N`` cancels nothing."""
        behind = self._where_it_comes(call, linear, relevance)
        own = type(self).shares is AlphaBeta.shares
        if own and not is_zero(self.beta):
            relevance = lax.optimization_barrier(relevance)  # XLA would compute it once for each share
        plain = linear.exact and linear.positive and self.bias == "absorb" and not is_zero(self.beta)
        made = [v.dtype for eqn in call.layer.equations for v in eqn.outputs]
        rounded = any(wide_dtype(dtype) != dtype for dtype in made)  # such a z is not the sum of P and N
        if not plain or rounded or not own:
            yield from super()._flows(call, linear, relevance)
            return
        negative = sums_of(linear, 0.0, 1.0) + jnp.minimum(bias_of(linear), 0.0)
        positive = jnp.maximum(behind.output - negative, 0.0)
        yield from self._over(linear, relevance, positive, negative, at_least_z=True)


class Gamma(SplitRule, kw_only=True):
    """LRP-γ: contributions of the output's own sign count ``1 + γ`` times (Montavon et al., 2019).

    In the generalised form of Andéol et al. (2021), which is right for negative inputs and outputs too:
    ``R_i = Σ_{z_j>0} (c_ij + γ c⁺_ij) R_j / (z_j + γ P_j) + Σ_{z_j<0} (c_ij + γ c⁻_ij) R_j / (z_j + γ N_j)``.
    """

    gamma: Any = struct.field(default=0.25, kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(gamma=self.gamma)

    def shares(self, relevance: jax.Array, z: jax.Array) -> Sequence[Share]:
        """Positive outputs favour positive contributions, negative outputs negative ones."""
        more = 1.0 + self.gamma
        return [(jnp.where(z > 0, relevance, 0.0), more, 1.0), (jnp.where(z < 0, relevance, 0.0), 1.0, more)]

    def _shares(self, relevance: jax.Array, linear: LinearMap) -> Sequence[Share]:
        shares = super()._shares(relevance, linear)
        # nothing comes to negative outputs: one share less to pay for
        return shares[:1] if linear.positive and type(self).shares is Gamma.shares else shares

    def _flows(self, call: LayerCall, linear: LinearMap, relevance: jax.Array) -> Iterator[Flow]:
        """One run of the layer for all shares, ``P``: where ``z < 0``, ``N = z - P`` cancels nothing."""
        plain = linear.exact and self.bias == "absorb" and not self.norm_scale and not callable(self.epsilon)
        if not plain or type(self).shares is not Gamma.shares:
            yield from super()._flows(call, linear, relevance)
            return
        linear = self._where_it_comes(call, linear, relevance)
        run = linear.frugally() if linear.positive else linear
        z, positive = linear.output, sums_of(run, 1.0, 0.0) + jnp.maximum(bias_of(linear), 0.0)
        if run is not linear:
            positive = at_least(positive, z)
        negative = jnp.where(z < 0, z + self.gamma * (z - positive), 0.0)
        yield from self._over(linear, relevance, z + self.gamma * positive, negative, at_least_z=linear.positive)

    def _hand(self, linear: LinearMap, flow: Flow) -> list[Term]:
        if is_static(self.gamma) or type(self).shares is not Gamma.shares:
            return super()._hand(linear, flow)
        signs = (1.0, 0.0) if is_one(flow.n) else (0.0, 1.0)
        inputs, more = zip(*parts(linear, *signs), strict=True)
        return list(zip(inputs, transposes(linear, self.gamma, more, flow.coefficient), strict=True))
