"""Layers that several families share, in plain jnp and lax."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ._ops import Array, Ops, Weights


def dense(weights: Weights, name: str, x: Array, features: int, bias: bool = True) -> Array:
    y = x @ weights(f"{name}/kernel", x.shape[-1], features)
    return y + weights(f"{name}/bias", features) if bias else y


def conv(
    weights: Weights,
    name: str,
    x: Array,
    features: int,
    size: int | Sequence[int] = 3,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    bias: bool = True,
) -> Array:
    """A convolution over all axes between the first (samples) and the last (channels)."""
    n = x.ndim - 2
    sizes = (size,) * n if isinstance(size, int) else tuple(size)
    space = "DHW"[3 - n :]
    kernel = weights(f"{name}/kernel", *sizes, x.shape[-1] // groups, features)
    y = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,) * n,
        padding=padding,
        rhs_dilation=(dilation,) * n,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=groups,
    )
    return y + weights(f"{name}/bias", features) if bias else y


def batch_norm(weights: Weights, name: str, x: Array, epsilon: float = 1e-3) -> Array:
    """BatchNorm in inference."""
    n = x.shape[-1]
    scale, offset = weights(f"{name}/scale", n), weights(f"{name}/offset", n)
    mean, var = weights(f"{name}/mean", n), weights(f"{name}/var", n)
    return (x - mean) * lax.rsqrt(var + epsilon) * scale + offset


def max_pool(x: Array, size: int = 2, stride: int = 2, padding: str = "VALID") -> Array:
    n = x.ndim - 2
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *(size,) * n, 1), (1, *(stride,) * n, 1), padding)


def avg_pool(x: Array, size: int = 2, stride: int = 2, padding: str = "VALID") -> Array:
    """Padding is not counted."""
    n = x.ndim - 2

    def window_sum(a: Array) -> Array:
        return lax.reduce_window(a, 0.0, lax.add, (1, *(size,) * n, 1), (1, *(stride,) * n, 1), padding)

    return window_sum(x) / (window_sum(jnp.ones_like(x)) if padding == "SAME" else size**n)


def layer_norm(ops: Ops, weights: Weights, name: str, x: Array, epsilon: float = 1e-6) -> Array:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    y = (x - mean) * ops.hold(lax.rsqrt(var + epsilon))
    return y * weights(f"{name}/scale", x.shape[-1]) + weights(f"{name}/offset", x.shape[-1])


def rms_norm(ops: Ops, weights: Weights, name: str, x: Array, epsilon: float = 1e-6) -> Array:
    scale = ops.hold(lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon))
    return x * scale * weights(f"{name}/scale", x.shape[-1])


def split_heads(x: Array, heads: int) -> Array:
    """``[..., tokens, heads * features]`` to ``[..., heads, tokens, features]``."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], heads, -1), -2, -3)


def merge_heads(x: Array) -> Array:
    x = jnp.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


def attend(ops: Ops, q: Array, k: Array, v: Array, bias: Array | None = None, mask: Array | None = None) -> Array:
    """Softmax attention over ``[..., tokens, features]`` of which all depend on the input."""
    scores = ops.share(q @ jnp.swapaxes(k, -1, -2)) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return ops.share(jax.nn.softmax(scores, axis=-1) @ v)


def attention(
    ops: Ops,
    weights: Weights,
    name: str,
    x: Array,
    heads: int = 2,
    memory: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Multi-head attention of ``x`` to itself, or to a memory."""
    memory, width = x if memory is None else memory, x.shape[-1]
    q = split_heads(dense(weights, f"{name}/q", x, width), heads)
    k = split_heads(dense(weights, f"{name}/k", memory, width), heads)
    v = split_heads(dense(weights, f"{name}/v", memory, width), heads)
    return dense(weights, f"{name}/out", merge_heads(attend(ops, q, k, v, bias, mask)), width)


def mlp(ops: Ops, weights: Weights, name: str, x: Array, hidden: int, out: int | None = None) -> Array:
    h = ops.act(jax.nn.gelu, dense(weights, f"{name}/up", x, hidden))
    return dense(weights, f"{name}/down", h, out or x.shape[-1])
