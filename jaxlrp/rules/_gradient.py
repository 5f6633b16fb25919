"""Rules that fold back derivatives instead of relevance: the gradient and its relatives, as composites of LRP."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ._base import Arrays, LayerCall, Losses, Rule, total


class Gradient(Rule):
    """The layer's own derivative, ``R_i = Σ_j ∂z_j/∂x_i R_j``; what it folds are gradients, not relevance."""

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """``J^T R``, with relu's derivative 0 at 0 as `jax.nn.relu` has it."""
        if call.layer.op == "relu":
            return (jnp.where(call.inputs[0] > 0, relevance[0], 0.0),)
        return call.vjp(*relevance)

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """A gradient is not conserved; the difference has this one name."""
        arrived = sum(map(total, relevance), jnp.zeros(()))
        return {"gradient": arrived - sum(map(total, self.fold(call, *relevance)), jnp.zeros(()))}


class GuidedReLU(Gradient):
    """Guided backpropagation at a relu: ``R_i = [x_i > 0] max(R_i, 0)`` (Springenberg et al., 2015)."""

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """Positive gradients of active units."""
        return super().fold(call, *(jnp.maximum(r, 0.0) for r in relevance))


class DeconvNetReLU(Gradient):
    """DeconvNet at a relu: ``R_i = max(R_i, 0)``, whether the unit was active or not (Zeiler & Fergus, 2014)."""

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """Positive gradients."""
        return tuple(jnp.maximum(r, 0.0) for r in relevance)
