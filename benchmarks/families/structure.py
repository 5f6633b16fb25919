"""Networks whose structure is what makes them special: several inputs, shared parts, loops over layers, branches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ._layers import conv, dense
from ._ops import Array, Ops, Weights, family

relu = jax.nn.relu
PAIR = ((2, 8, 8, 2), (2, 8, 8, 2))


def encoder(ops: Ops, weights: Weights, x: Array) -> Array:
    x = ops.act(relu, conv(weights, "conv0", x, 4, 3, 2))
    x = ops.act(relu, conv(weights, "conv1", x, 8, 3, 2))
    return dense(weights, "out", x.reshape(x.shape[0], -1), 6)


def l2_normalise(ops: Ops, x: Array) -> Array:
    return x / ops.hold(jnp.linalg.norm(x, axis=-1, keepdims=True))


@family("Siamese pair", *PAIR)
def siamese(ops: Ops, weights: Weights, x: tuple[Array, Array]) -> Array:
    a, b = (encoder(ops, weights / "encoder", side) for side in x)
    return dense(weights, "head", ops.act(jnp.abs, a - b), 1)


@family("Contrastive pair", *PAIR)
def contrastive(ops: Ops, weights: Weights, x: tuple[Array, Array]) -> Array:
    a, b = (l2_normalise(ops, encoder(ops, weights / "encoder", side)) for side in x)
    return ops.share(jnp.sum(a * b, axis=-1)) / 0.07


@family("Image against captions", (2, 8, 8, 2), (2, 3, 5))
def clip(ops: Ops, weights: Weights, x: tuple[Array, Array]) -> Array:
    image, captions = x
    image = l2_normalise(ops, encoder(ops, weights / "image", image))
    hidden = ops.act(jax.nn.gelu, dense(weights, "text0", captions, 8))
    text = l2_normalise(ops, dense(weights, "text1", hidden, 6))
    return jnp.exp(weights("temperature/bias")) * ops.share(jnp.einsum("nd,nkd->nk", image, text))


@family("Two-stream fusion", (2, 6), (2, 4))
def two_stream(ops: Ops, weights: Weights, x: tuple[Array, Array]) -> Array:
    a = ops.act(jnp.tanh, dense(weights, "a", x[0], 8))
    b = ops.act(jnp.tanh, dense(weights, "b", x[1], 8))
    return dense(weights, "head", jnp.concatenate([ops.share(a * b), jnp.maximum(a, b), a + b], axis=-1), 3)


@family("Ensemble by vmap", (2, 6))
def ensemble(ops: Ops, weights: Weights, x: Array) -> Array:
    members = {
        "in": weights("in/kernels", 3, 6, 8),
        "bias": weights("in/bias", 3, 8),
        "out": weights("out/kernels", 3, 8, 4),
    }

    def member(p: dict[str, Array], x: Array) -> Array:
        return ops.act(relu, x @ p["in"] + p["bias"]) @ p["out"]

    return jax.vmap(member, in_axes=(0, None))(members, x).mean(axis=0)


def residual_block(ops: Ops, x: Array, up: Array, bias: Array, down: Array) -> Array:
    scale = ops.hold(lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6))
    return x + ops.act(jax.nn.gelu, (x * scale) @ up + bias) @ down


@family("Scan over layers", (2, 6))
def scan_over_layers(ops: Ops, weights: Weights, x: Array) -> Array:
    stack = weights("up/kernels", 3, 8, 12), weights("up/bias", 3, 12), weights("down/kernels", 3, 12, 8)
    x, _ = lax.scan(lambda x, p: (residual_block(ops, x, *p), None), dense(weights, "stem", x, 8), stack)
    return dense(weights, "head", x, 3)


@family("Scan over layers with remat", (2, 6))
def scan_with_remat(ops: Ops, weights: Weights, x: Array) -> Array:
    stack = weights("up/kernels", 3, 8, 12), weights("up/bias", 3, 12), weights("down/kernels", 3, 12, 8)

    @jax.checkpoint
    def layer(x: Array, p: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        y = residual_block(ops, x, *p)
        return y, y.mean(axis=-1)

    x, means = lax.scan(layer, dense(weights, "stem", x, 8), stack)
    return dense(weights, "head", jnp.concatenate([x, means.T], axis=-1), 3)


@family("Layers with remat", (2, 6))
def remat(ops: Ops, weights: Weights, x: Array) -> Array:
    block = jax.checkpoint(lambda x, *p: residual_block(ops, x, *p))
    x = dense(weights, "stem", x, 8)
    for i in range(2):
        w = weights / f"block{i}"
        x = block(x, w("up/kernel", 8, 12), w("up/bias", 12), w("down/kernel", 12, 8))
    return dense(weights, "head", x, 3)


@family("Branches by cond", (6,), single=True)
def branches(ops: Ops, weights: Weights, x: Array) -> Array:
    x = ops.act(relu, dense(weights, "stem", x, 8))
    kernel, bias = weights("deep/kernel", 8, 8), weights("deep/bias", 8)

    def deep(x: Array) -> Array:
        return x + ops.act(jnp.tanh, x @ kernel + bias)

    x = lax.cond(x[0] > 0.2, deep, lambda x: 2.0 * x, x)  # a layer that easy inputs skip
    return dense(weights, "head", x, 3)


@family("Highway network", (2, 6))
def highway(ops: Ops, weights: Weights, x: Array) -> Array:
    for i in range(2):
        carry = ops.act(jax.nn.sigmoid, dense(weights, f"transform{i}", x, 6))
        x = ops.gated(ops.act(relu, dense(weights, f"dense{i}", x, 6)), carry) + ops.gated(x, 1.0 - carry)
    return dense(weights, "head", x, 3)


@family("Neural ODE", (2, 6))
def neural_ode(ops: Ops, weights: Weights, x: Array) -> Array:
    kernel, bias = weights("kernel", 6, 6), weights("bias", 6)

    def euler(h: Array, t: Array) -> tuple[Array, None]:
        return h + 0.1 * ops.act(jnp.tanh, h @ kernel + t * bias), None

    h, _ = lax.scan(euler, x, jnp.linspace(0.0, 1.0, 5))
    return dense(weights, "head", h, 3)


@family("Normalising flow", (2, 6))
def flow(ops: Ops, weights: Weights, x: Array) -> Array:
    for i in range(2):
        a, b = jnp.split(x, 2, axis=-1)
        scale = ops.act(jnp.exp, ops.act(jnp.tanh, dense(weights, f"scale{i}", a, 3)))
        x = jnp.concatenate([ops.gated(b, scale) + dense(weights, f"shift{i}", a, 3), a], axis=-1)
    return x


@family("Radiance field", (2, 4, 3))
def radiance_field(ops: Ops, weights: Weights, x: Array) -> Array:
    angles = x[..., None] * 2.0 ** jnp.arange(4)
    waves = jnp.concatenate([ops.act(jnp.sin, angles), ops.act(jnp.cos, angles)], axis=-1)
    x = jnp.concatenate([x, waves.reshape(*x.shape[:-1], -1)], axis=-1)
    for i in range(2):
        x = ops.act(relu, dense(weights, f"dense{i}", x, 12))
    colour, density = dense(weights, "colour", x, 3), dense(weights, "density", x, 1)
    return jnp.concatenate([ops.act(jax.nn.sigmoid, colour), ops.act(jax.nn.softplus, density)], axis=-1)


FAMILIES = [
    siamese,
    contrastive,
    clip,
    two_stream,
    ensemble,
    scan_over_layers,
    scan_with_remat,
    remat,
    branches,
    highway,
    neural_ode,
    flow,
    radiance_field,
]
