"""Rules for the first layer, where inputs are pixels or other raw features whose value is no measure of importance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from ..errors import InputError
from ..layers import Layer
from ..linear import LinearMap
from ._base import Arrays, LayerCall, Losses, Rule, at_least_zero, known, ratio, stabilise, total
from ._split import Share, SplitRule


class _WeightsAlone(SplitRule, kw_only=True):
    """Contributions do not depend on the input: ``x := 1``."""

    def shares(self, relevance: jax.Array, z: jax.Array) -> Sequence[Share]:
        """All of it, in proportion to all contributions."""
        return [(relevance, 1.0, 1.0)]


class WSquare(_WeightsAlone, kw_only=True):
    """LRP-w²: ``R_i = Σ_j w_ij² R_j / (Σ_i w_ij² + b_j²)``, for unbounded inputs (Montavon et al., 2017)."""

    def modify(self, linear: LinearMap) -> LinearMap:
        """``x := 1, w := w², b := b²``."""
        return dataclasses.replace(
            linear,
            inputs=tuple(map(jnp.ones_like, linear.inputs)),
            weights=tuple(map(jnp.square, linear.weights)),
            bias=None if linear.bias is None else jnp.square(linear.bias),
        )


class Flat(_WeightsAlone, kw_only=True):
    """LRP-flat: every input of an output gets the same, ``x := 1, w := 1, b := 0`` (Lapuschkin et al., 2019)."""

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """``R_i = Σ_j R_j / n_j``, with ``n_j`` inputs of output ``j``.

        A convolution needs one channel for that: all features of a place get the same.
        """
        spec = call.layer.linear
        small = None if spec is None else spec.one_channel()
        plain = not callable(self.epsilon) and jnp.ndim(self.epsilon) == 0
        if small is None or not plain or self.bias == "redistribute":
            return super().fold(call, *relevance)
        # a sum is fused with one operation before it, not with what a pool's transpose ends in, one for each place
        coming = jnp.sum(lax.optimization_barrier(relevance[0]), axis=small.feature_out, keepdims=True)
        one = [1 if i == small.batch else n for i, n in enumerate(small.shape)]
        counts = small.channels * small.apply(jnp.ones(one, coming.dtype))  # the same for every sample
        shared = ratio(coming, self._stab(counts, call.linear))
        # made of the input: a shape alone does not say how an array lies on the devices
        like = jnp.zeros_like(jnp.sum(call.linear.inputs[0], small.feature_in, keepdims=True), coming.dtype)
        (back,) = jax.linear_transpose(small.apply, like)(shared)
        return (jnp.broadcast_to(back, call.layer.inputs[0].shape),)

    def modify(self, linear: LinearMap) -> LinearMap:
        """``x := 1, w := 1, b := 0``."""
        return dataclasses.replace(
            linear,
            inputs=tuple(map(jnp.ones_like, linear.inputs)),
            weights=tuple(map(jnp.ones_like, linear.weights)),
            bias=None,
        )


class ZBox(Rule, kw_only=True):
    """LRP-z^B for inputs in a box ``[low, high]``, such as pixels (Montavon et al., 2017).

    ``R_i = Σ_j (x_i w_ij - l_i w⁺_ij - h_i w⁻_ij) R_j / Σ_i' (the same)``. The bias cancels. Computed as
    ``(x_i - l_i) w⁺_ij + (x_i - h_i) w⁻_ij``, where nothing cancels for inputs within the box.

    Attributes:
        low: smallest possible input, a number or an array that broadcasts to the layer's input.
        high: largest possible input.
        epsilon: stabiliser of the denominators.

    Example:
        >>> import jax.numpy as jnp, jaxlrp
        >>> rule = jaxlrp.ZBox(low=0.0, high=1.0)
        >>> explain = jaxlrp.lrp(lambda x, w: x @ w, jaxlrp.Composite.uniform(rule))
        >>> relevance = explain(jnp.array([0.5, 0.5]), jnp.array([[2.0], [-1.0]]))
        >>> [round(float(r), 3) for r in relevance]
        [0.333, 0.167]
    """

    low: Any = struct.field(kw_only=False)
    high: Any = struct.field(kw_only=False)
    epsilon: Any = 1e-6

    def __post_init__(self) -> None:
        low, high = known(self.low), known(self.high)
        at_least_zero(epsilon=self.epsilon)
        if low is not None and high is not None and not low <= high:
            raise ValueError(f"low must not exceed high, got low={self.low} and high={self.high}")

    def fold(self, call: LayerCall, *relevance: jax.Array) -> Arrays:
        """``(x - l) w⁺ + (x - h) w⁻``, normalised for every output."""
        sums, above, below, transpose = self._sums(call)
        to_above, to_below = transpose(ratio(relevance[0], stabilise(sums, self.epsilon)))
        return tuple(u * a + d * b for u, d, a, b in zip(above, below, to_above, to_below, strict=True))

    def losses(self, call: LayerCall, *relevance: jax.Array) -> Losses:
        """What the stabiliser takes."""
        sums, *_ = self._sums(call)
        kept = ratio(relevance[0], stabilise(sums, self.epsilon)) * sums
        empty = sums == 0
        missing = relevance[0] - kept
        return {
            "stabiliser": total(jnp.where(empty, 0.0, missing)),
            "dropped sign": total(jnp.where(empty, missing, 0.0)),
        }

    def check(self, layer: Layer, inputs: Arrays) -> None:
        """Inputs must lie in the box, but for rounding."""
        for x, low, high in zip(inputs, *self._box(layer, inputs), strict=True):
            room = 1e-5 * (high - low)
            outside = int(jnp.sum((x < low - room) | (x > high + room)))
            if outside:
                raise InputError(
                    f"layer '{layer.name}': {outside} of {x.size} inputs lie outside of {self}, they reach from "
                    f"{x.min():g} to {x.max():g}; low and high are those after preprocessing"
                )

    def _box(self, layer: Layer, inputs: Arrays) -> tuple[Arrays, Arrays]:
        def corner(bound: Any, name: str) -> Arrays:
            try:
                return tuple(jnp.broadcast_to(jnp.asarray(bound, x.dtype), x.shape) for x in inputs)
            except ValueError as error:
                shapes = ", ".join(str(x.shape) for x in inputs)
                raise ValueError(
                    f"ZBox: {name} of shape {jnp.shape(bound)} does not broadcast to the input {shapes} "
                    f"of layer '{layer.name}'"
                ) from error

        return corner(self.low, "low"), corner(self.high, "high")

    def _sums(self, call: LayerCall) -> tuple[jax.Array, Arrays, Arrays, Callable[[jax.Array], Any]]:
        linear = call.linear
        w, x = linear.weights, linear.inputs
        low, high = self._box(call.layer, x)
        up, down = tuple(jnp.maximum(a, 0.0) for a in w), tuple(jnp.minimum(a, 0.0) for a in w)
        above, below = (
            tuple(a - b for a, b in zip(x, low, strict=True)),
            tuple(a - b for a, b in zip(x, high, strict=True)),
        )
        sums = linear.apply_all([(above, up), (below, down)])
        return sums, above, below, functools.partial(linear.transpose_all, (up, down))
