"""Dense float64 oracles of the rules for linear layers, written from the published formulas alone.

Nothing here knows how jaxlrp works. A layer is a function; its Jacobian is the matrix ``W``, its value at zero is
``b``, and every rule is a formula over the full matrix of contributions ``c_ij = x_i w_ij`` (axis 0: outputs ``j``,
axis 1: inputs ``i``).
That costs memory and time that no real model could afford, and leaves little room for mistakes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Affine:
    """One layer at one input: ``z = w @ x + b`` with everything flattened (whole batches are one long vector)."""

    x: Array  # [I]
    w: Array  # [J, I]
    b: Array  # [J]
    shape: tuple[int, ...]  # of the output, for stabilisers that look at one sample
    connects: Array  # [J, I], whether input i is wired to output j, whatever its weight

    @property
    def z(self) -> Array:
        return self.w @ self.x + self.b


def linearise(layer: Callable[[Any], Any], x: Any, connects: Array | None = None) -> Affine:
    """Take any affine function of one array (or a tree of arrays) apart at ``x``; needs double precision."""
    flat, unravel = ravel_pytree(x)
    assert flat.dtype == np.float64, "oracles need jax_enable_x64"

    def run(vector: Any) -> Any:
        return ravel_pytree(layer(unravel(vector)))[0]

    w, b, z = np.asarray(jax.jacfwd(run)(flat)), np.asarray(run(flat * 0)), np.asarray(run(flat))
    shape = tuple(jax.tree.leaves(jax.eval_shape(layer, x))[0].shape)
    affine = Affine(np.asarray(flat), w, b, shape, w != 0 if connects is None else connects)
    np.testing.assert_allclose(affine.z, z, rtol=1e-9, atol=1e-9, err_msg="not an affine layer")
    return affine


# -- denominators ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stabiliser:
    """How denominators are kept away from zero; ``features`` are the output axes of one sample."""

    epsilon: Any = 1e-6
    clip: bool = False
    norm_scale: bool = False
    features: Sequence[int] = (-1,)

    def __call__(self, z: Array, shape: tuple[int, ...]) -> Array:
        z = z.reshape(shape)
        epsilon = self.epsilon(z) if callable(self.epsilon) else self.epsilon
        if self.norm_scale:
            epsilon = epsilon * np.sqrt((z**2).mean(axis=tuple(self.features), keepdims=True))
        sign = np.where(z >= 0, 1.0, -1.0)
        stable = sign * np.maximum(np.abs(z), epsilon) if self.clip else z + sign * epsilon
        return np.broadcast_to(stable, shape).ravel()


DEFAULT = Stabiliser()


def over(a: Array, b: Array) -> Array:
    """``a / b`` with 0 where ``b`` is 0."""
    return np.where(b == 0, 0.0, a / np.where(b == 0, 1.0, b))


# -- messages: what output j sends to input i, a matrix [J, I] -------------------------------------

Message = Callable[[Affine, Array, str, Stabiliser], Array]


def proportional(c: Array, b: Array, r: Array, shape: tuple[int, ...], bias: str, stab: Stabiliser) -> Array:
    """Share ``r`` in proportion to ``c``; the bias's part of the denominator is lost, or left out."""
    z = c.sum(1) + (0.0 if bias == "ignore" else b)
    return c * over(r, stab(z, shape))[:, None]


def spread(messages: Array, r: Array) -> Array:
    """Hand what is missing from ``r`` to the inputs, in proportion to the size of their messages."""
    size = np.abs(messages)
    return messages + size * over(r - messages.sum(1), size.sum(1))[:, None]


def plus(a: Array) -> Array:
    return np.where(a > 0, a, 0.0)


def minus(a: Array) -> Array:
    return np.where(a < 0, a, 0.0)


def epsilon(layer: Affine, r: Array, bias: str, stab: Stabiliser) -> Array:
    """LRP-0 and LRP-epsilon."""
    return proportional(layer.w * layer.x, layer.b, r, layer.shape, bias, stab)


def zplus(layer: Affine, r: Array, bias: str, stab: Stabiliser) -> Array:
    return proportional(plus(layer.w * layer.x), plus(layer.b), r, layer.shape, bias, stab)


def alpha_beta(alpha: float, beta: float) -> Message:
    def messages(layer: Affine, r: Array, bias: str, stab: Stabiliser) -> Array:
        c = layer.w * layer.x
        positive = proportional(plus(c), plus(layer.b), r, layer.shape, bias, stab)
        negative = proportional(minus(c), minus(layer.b), r, layer.shape, bias, stab)
        return alpha * positive - beta * negative

    return messages


def gamma(gamma: float) -> Message:
    """The generalised form: positive outputs favour positive contributions, negative ones negative ones."""

    def messages(layer: Affine, r: Array, bias: str, stab: Stabiliser) -> Array:
        c, z = layer.w * layer.x, layer.z
        up = proportional(c + gamma * plus(c), layer.b + gamma * plus(layer.b), r, layer.shape, bias, stab)
        down = proportional(c + gamma * minus(c), layer.b + gamma * minus(layer.b), r, layer.shape, bias, stab)
        return np.where(z[:, None] > 0, up, np.where(z[:, None] < 0, down, 0.0))

    return messages


def wsquare(layer: Affine, r: Array, bias: str, stab: Stabiliser) -> Array:
    return proportional(layer.w**2, layer.b**2, r, layer.shape, bias, stab)


def flat(layer: Affine, r: Array, bias: str, stab: Stabiliser) -> Array:
    return proportional(layer.connects.astype(float), 0 * layer.b, r, layer.shape, bias, stab)


def zbox(low: Any, high: Any) -> Message:
    """Inputs in a box; ``low`` and ``high`` are numbers or as long as the flattened input."""

    def messages(layer: Affine, r: Array, bias: str, stab: Stabiliser) -> Array:
        c = layer.w * layer.x - plus(layer.w) * low - minus(layer.w) * high
        return proportional(c, 0 * layer.b, r, layer.shape, bias, stab)

    return messages


def relevance(messages: Message, layer: Affine, r: Any, *, bias: str = "absorb", stab: Stabiliser = DEFAULT) -> Array:
    """Relevance of the flattened input, given that of the output."""
    r = np.asarray(r).ravel()
    sent = messages(layer, r, bias, stab)
    return (spread(sent, r) if bias == "redistribute" else sent).sum(0)


# -- sums of two branches --------------------------------------------------------------------------


def residual(
    policy: str, a: Array, b: Array, r: Array, *, branch: int = 0, epsilon: float = 1e-6
) -> tuple[Array, Array]:
    """What the two summands of ``a + b`` get of ``r``."""
    if policy == "equal":
        return r / 2, r / 2
    if policy == "branch":
        return (r, 0 * r) if branch == 0 else (0 * r, r)
    if policy == "abs":
        a, b = np.abs(a), np.abs(b)
    total = a + b
    total = total + np.where(total >= 0, epsilon, -epsilon)
    return a * r / total, b * r / total
