"""Attention as the text models here share it: written out, so that every step is a layer of its own to relevance."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """``[..., tokens, features]`` to ``[..., heads, tokens, features / heads]``."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads), -2, -3)


def merge_heads(x: jax.Array) -> jax.Array:
    """``[..., heads, tokens, features]`` to ``[..., tokens, heads * features]``."""
    x = jnp.swapaxes(x, -2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def attend(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """Scaled dot-product attention, heads apart.

    Args:
        query: ``[..., heads, queries, features]``.
        key: ``[..., heads, keys, features]``.
        value: ``[..., heads, keys, features]``.
        allowed: which query may look at which key, broadcastable to ``[..., heads, queries, keys]``; None is all.

    Returns:
        ``[..., heads, queries, features]``.
    """
    scores = query @ jnp.swapaxes(key, -1, -2) / math.sqrt(query.shape[-1])
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1) @ value


def unmasked(mask: jax.Array | None) -> jax.Array | None:
    """A padding mask ``[..., tokens]``, 0 at padding, as `attend` wants it."""
    return None if mask is None else mask[..., None, None, :] != 0


def causal(tokens: int, mask: jax.Array | None) -> jax.Array:
    """Every token looks at itself and those before it, and never at padding."""
    past = jnp.tril(jnp.ones((tokens, tokens), bool))
    present = unmasked(mask)
    return past if present is None else past & present
