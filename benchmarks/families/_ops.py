"""What every family is written with: weights by name, and operations that come in a plain and a detached version.

A family is one function ``model(ops, weights, x)``. With `PLAIN` it is ordinary jnp code: the functions of ``ops`` only
forward, and nothing of them is left in the traced program. With `DETACHED` it computes the same numbers, but its
gradient times its input is the relevance that LRP-0 gives with the rules of AttnLRP. jaxlrp has no part in that: the
oracle is `jax.grad` of the same function.

===========  =====================  ================================================================================
operation    plain                  detached
===========  =====================  ================================================================================
``act``      ``f(x)``               ``x * sg(f(x) / x)``: an activation hands its relevance to its input
``hold``     ``s``                  ``sg(s)``: what scales in a normalisation and divides in a quotient gets nothing
``share``    ``p``                  ``p / n + sg(p - p / n)``: a product of ``n`` factors gives each of them one n-th
``gated``    ``signal * gate``      ``signal * sg(gate)``: a gate (of a sigmoid, softplus or exp) gets nothing
===========  =====================  ================================================================================

All else, linear layers with their biases, sums, moves, picks and the softmax, is the natural gradient in both.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Ops:
    """The four operations in whose derivative LRP differs from the gradient."""

    act: Callable[[Callable[[Array], Array], Array], Array]
    hold: Callable[[Array], Array]
    share: Callable[..., Array]
    gated: Callable[[Array, Array], Array]


def _detached_act(f: Callable[[Array], Array], x: Array) -> Array:
    y = f(x)
    zero = x == 0
    scale = stop_gradient(jnp.where(zero, 0.0, y / jnp.where(zero, 1.0, x)))
    return x * scale + stop_gradient(y - x * scale)


def _detached_share(product: Array, factors: int = 2) -> Array:
    part = product / factors
    return part + stop_gradient(product - part)


PLAIN = Ops(
    act=lambda f, x: f(x),
    hold=lambda scale: scale,
    share=lambda product, factors=2: product,
    gated=lambda signal, gate: signal * gate,
)
DETACHED = Ops(
    act=_detached_act,
    hold=stop_gradient,
    share=_detached_share,
    gated=lambda signal, gate: signal * stop_gradient(gate),
)


# -- weights -----------------------------------------------------------------------------------------------------------


class Weights:
    """Arrays by name, ``weights("conv/kernel", 3, 3, 8, 16)``; the shape is what they are made with at first.

    ``weights / "block"`` is the same with that name in front of every other.
    """

    def __init__(self, arrays: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None, scope: str = ""):
        self.arrays, self.shapes, self.scope = arrays, shapes, scope

    def __call__(self, name: str, *shape: int) -> Any:
        name = self.scope + name
        if self.shapes is not None:
            self.shapes[name] = shape
            return jnp.zeros(shape)
        return self.arrays[name]

    def __truediv__(self, scope: str) -> Weights:
        return Weights(self.arrays, self.shapes, f"{self.scope}{scope}/")


def random_weights(model: Callable[[Weights, Any], Any], x: Any, seed: str) -> dict[str, Array]:
    """Weights for all that the model asks for; each array depends on its own name alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    jax.eval_shape(lambda x: model(Weights({}, shapes), x), x)
    return {name: jnp.asarray(_random_weight(name, shape, seed)) for name, shape in shapes.items()}


def _random_weight(name: str, shape: Sequence[int], seed: str) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(f"{seed}/{name}".encode()))
    leaf = name.split("/")[-1]
    if leaf == "var":
        return rng.uniform(0.5, 1.5, shape)
    if leaf in ("bias", "mean", "offset"):
        return 0.1 * rng.normal(size=shape)
    if leaf == "scale":
        return 1.0 + 0.1 * rng.normal(size=shape)
    if leaf in ("embedding", "table"):
        return 0.5 * rng.normal(size=shape)
    # "kernels" are those of several layers or experts, one after the other
    fan_in = shape[-2] if leaf == "kernels" else int(np.prod(shape[:-1]))
    return rng.normal(size=shape) / np.sqrt(fan_in)


# -- families ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its numbers.

    Attributes:
        model: ``model(x, params)`` on a batch, ``x`` with a leading axis of samples in all its arrays.
        single: ``single(x, params)`` on one sample.
        detached: the model on a batch with the derivatives of the oracle.
        x: the input.
        params: the parameters.
    """

    model: Callable[[Any, Any], Any]
    single: Callable[[Any, Any], Any]
    detached: Callable[[Any, Any], Any]
    x: Any
    params: Any


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of network.

    Attributes:
        name: what it is called in the table.
        build: makes the model, given the operations of the oracle.
        library: the package that the network comes from, if it is not written out here.
        rounding: the largest difference between outputs, over the largest output.
        tolerance: the largest difference between relevances, over the largest relevance.
        note: why the tolerance is larger than usual.
    """

    name: str
    build: Callable[[Ops], Case]
    library: str = ""
    rounding: float = 1e-12
    tolerance: float = 1e-9
    note: str = ""


Model = Callable[[Ops, Weights, Any], Any]


def family(name: str, *shapes: tuple[int, ...], single: bool = False) -> Callable[[Model], Family]:
    """Turn a function ``model(ops, weights, x)`` into a `Family`.

    Args:
        name: what it is called in the table.
        *shapes: shape of the input; of several inputs, which the model gets as a tuple.
        single: the model is written for one sample and batched by `jax.vmap`; shapes have no axis of samples then.
    """

    def make(function: Model) -> Family:
        def build(detached: Ops) -> Case:
            sizes = [(2, *shape) for shape in shapes] if single else shapes
            xs = tuple(
                jnp.asarray(np.random.default_rng([zlib.crc32(name.encode()), i]).normal(size=size))
                for i, size in enumerate(sizes)
            )
            x = xs if len(xs) > 1 else xs[0]
            example = jax.tree.map(lambda a: a[0], x) if single else x
            params = random_weights(lambda weights, x: function(PLAIN, weights, x), example, name)

            def plain(x: Any, params: Any) -> Any:
                return function(PLAIN, Weights(params), x)

            def oracle(x: Any, params: Any) -> Any:
                return function(detached, Weights(params), x)

            if single:
                batched, one, detach = over_batch(plain), plain, over_batch(oracle)
            else:
                batched, one, detach = plain, of_one(plain), oracle
            return Case(batched, one, detach, x, params)

        return Family(name, build)

    return make


def over_batch(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model of one sample as a model of a batch."""
    return jax.vmap(model, in_axes=(0, None))


def of_one(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model of a batch as a model of one sample."""

    def one(x: Any, params: Any) -> Any:
        return jax.tree.map(lambda y: y[0], model(jax.tree.map(lambda a: a[None], x), params))

    return one
