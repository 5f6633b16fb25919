"""Transformers: for images, for text, with experts, with linear attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._layers import attend, attention, conv, dense, layer_norm, merge_heads, mlp, rms_norm, split_heads
from ._ops import Array, Ops, Weights, family

IMAGE = (2, 16, 16, 3)
TOKENS = (2, 6, 8)  # embedded: relevance is that of the embeddings


def rotary(x: Array, positions: np.ndarray) -> Array:
    """Turn pairs of features, half a head apart, by angles that grow with the position."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / 10000.0 ** (np.arange(half) / half)
    cos, sin = jnp.cos(jnp.asarray(angles)), jnp.sin(jnp.asarray(angles))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def encoder_block(ops: Ops, weights: Weights, x: Array, mask: Array | None = None) -> Array:
    """Pre-norm: attention and MLP beside a residual stream."""
    x = x + attention(ops, weights, "attention", layer_norm(ops, weights, "norm0", x), mask=mask)
    return x + mlp(ops, weights, "mlp", layer_norm(ops, weights, "norm1", x), 16)


# -- images ------------------------------------------------------------------------------------------------------------


def patches(weights: Weights, x: Array, features: int = 8) -> Array:
    return conv(weights, "patches", x, features, 4, 4, padding="VALID").reshape(x.shape[0], -1, features)


@family("ViT", IMAGE)
def vit(ops: Ops, weights: Weights, x: Array) -> Array:
    x = patches(weights, x)
    token = jnp.broadcast_to(weights("class/embedding", 1, 1, 8), (x.shape[0], 1, 8))
    x = jnp.concatenate([token, x], axis=1)
    x = x + weights("position/embedding", 1, x.shape[1], 8)
    for i in range(2):
        x = encoder_block(ops, weights / f"block{i}", x)
    return dense(weights, "head", layer_norm(ops, weights, "norm", x)[:, 0], 5)


@family("ViT with registers", IMAGE)
def vit_registers(ops: Ops, weights: Weights, x: Array) -> Array:
    x = patches(weights, x) + weights("position/embedding", 1, 16, 8)
    registers = jnp.broadcast_to(weights("registers/embedding", 3, 8), (x.shape[0], 3, 8))
    x = jnp.concatenate([registers, x], axis=1)
    for i in range(2):
        x = encoder_block(ops, weights / f"block{i}", x)
    x = x[:, 3:].mean(axis=1)
    return dense(weights, "head", layer_norm(ops, weights, "norm", x), 5)


@family("ViT with rotary positions", IMAGE)
def vit_rotary(ops: Ops, weights: Weights, x: Array) -> Array:
    def axial(x: Array) -> Array:  # half of the features turn with the row, half with the column
        rows, columns = np.divmod(np.arange(16), 4)
        half = x.shape[-1] // 2
        return jnp.concatenate([rotary(x[..., :half], rows), rotary(x[..., half:], columns)], axis=-1)

    x = patches(weights, x)
    for i in range(2):
        w = weights / f"block{i}"
        q, k, v = jnp.split(dense(w, "qkv", layer_norm(ops, w, "norm0", x), 24), 3, axis=-1)
        q, k, v = (split_heads(part, 2) for part in (q, k, v))
        x = x + dense(w, "out", merge_heads(attend(ops, axial(q), axial(k), v)), 8)
        x = x + mlp(ops, w, "mlp", layer_norm(ops, w, "norm1", x), 16)
    return dense(weights, "head", layer_norm(ops, weights, "norm", x).mean(axis=1), 5)


@family("Swin", IMAGE)
def swin(ops: Ops, weights: Weights, x: Array) -> Array:
    window, heads = 2, 2

    def to_windows(x: Array) -> Array:
        n, height, width, features = x.shape
        x = x.reshape(n, height // window, window, width // window, window, features)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, window**2, features)

    def from_windows(x: Array, shape: tuple[int, ...]) -> Array:
        n, height, width, features = shape
        x = x.reshape(n, height // window, width // window, window, window, features)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)

    def shift_mask(size: int) -> Array:
        """Which tokens of a window were neighbours before the image was rolled."""
        region = (np.arange(size) >= size - window).astype(int) + (np.arange(size) >= size - window // 2)
        image = jnp.asarray((region[:, None] * 3 + region)[None, :, :, None])
        ids = to_windows(image)[0, :, :, 0]
        return ids[:, None, :, None] == ids[:, None, None, :]

    def relative_bias(w: Weights) -> Array:
        table = w("position/table", (2 * window - 1) ** 2, heads)
        place = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"), -1).reshape(-1, 2)
        offset = place[:, None] - place[None, :] + window - 1
        return table[offset[..., 0] * (2 * window - 1) + offset[..., 1]].transpose(2, 0, 1)

    def block(w: Weights, x: Array, shift: int) -> Array:
        y = layer_norm(ops, w, "norm0", x)
        y = jnp.roll(y, (-shift, -shift), axis=(1, 2)) if shift else y
        mask = shift_mask(x.shape[1]) if shift else None
        y = attention(ops, w, "attention", to_windows(y), heads, bias=relative_bias(w), mask=mask)
        y = from_windows(y, x.shape)
        x = x + (jnp.roll(y, (shift, shift), axis=(1, 2)) if shift else y)
        return x + mlp(ops, w, "mlp", layer_norm(ops, w, "norm1", x), 16)

    x = layer_norm(ops, weights, "stem/norm", conv(weights, "stem", x, 8, 4, 4))
    for i, shift in enumerate((0, window // 2)):
        x = block(weights / f"block{i}", x, shift)
    quarters = [x[:, i::2, j::2] for j in range(2) for i in range(2)]  # patch merging
    x = layer_norm(ops, weights, "merge/norm", jnp.concatenate(quarters, axis=-1))
    x = dense(weights, "merge", x, 12, bias=False)
    x = layer_norm(ops, weights, "norm", block(weights / "block2", x, 0))
    return dense(weights, "head", x.mean((1, 2)), 5)


@family("DETR", IMAGE)
def detr(ops: Ops, weights: Weights, x: Array) -> tuple[Array, Array]:
    x = ops.act(jax.nn.relu, conv(weights, "backbone", x, 8, 3, 4))
    memory = x.reshape(x.shape[0], -1, 8)
    where = weights("position/embedding", memory.shape[1], 8)

    def multi_head(w: Weights, q: Array, k: Array, v: Array, dependent: bool = True) -> Array:
        q, k, v = (split_heads(dense(w, n, a, 8), 2) for n, a in (("q", q), ("k", k), ("v", v)))
        if dependent:
            y = attend(ops, q, k, v)
        else:  # constant queries: their product with the keys is a linear layer
            scores = q @ jnp.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
            y = ops.share(jax.nn.softmax(scores, axis=-1) @ v)
        return dense(w, "out", merge_heads(y), 8)

    place = memory + where
    memory = layer_norm(ops, weights, "encoder/norm0", memory + multi_head(weights / "encoder", place, place, memory))
    memory = layer_norm(ops, weights, "encoder/norm1", memory + mlp(ops, weights, "encoder/mlp", memory, 16))
    queries = weights("queries/embedding", 1, 4, 8)
    h = layer_norm(ops, weights, "decoder0/norm0", queries)
    for i in range(2):
        w = weights / f"decoder{i}"
        if i:  # the first layer's self-attention sees nothing of the image yet
            h = layer_norm(ops, w, "norm0", h + multi_head(w / "self", h + queries, h + queries, h))
        y = multi_head(w / "cross", h + queries, memory + where, memory, dependent=i > 0)
        h = layer_norm(ops, w, "norm1", h + y)
        h = layer_norm(ops, w, "norm2", h + mlp(ops, w, "mlp", h, 16))
    boxes = dense(weights, "box1", ops.act(jax.nn.relu, dense(weights, "box0", h, 8)), 4)
    return dense(weights, "classes", h, 5), ops.act(jax.nn.sigmoid, boxes)


# -- text --------------------------------------------------------------------------------------------------------------


@family("BERT", TOKENS)
def bert(ops: Ops, weights: Weights, x: Array) -> Array:
    exact_gelu = lambda v: jax.nn.gelu(v, approximate=False)  # noqa: E731
    x = x + weights("position/embedding", 6, 8) + weights("type/embedding", 8)
    x = layer_norm(ops, weights, "norm", x, 1e-12)
    padding = jnp.where(jnp.arange(6) < 5, 0.0, jnp.finfo(x.dtype).min)
    for i in range(2):
        w = weights / f"layer{i}"
        x = layer_norm(ops, w, "norm0", x + attention(ops, w, "attention", x, bias=padding), 1e-12)
        y = dense(w, "down", ops.act(exact_gelu, dense(w, "up", x, 16)), 8)
        x = layer_norm(ops, w, "norm1", x + y, 1e-12)
    pooled = ops.act(jnp.tanh, dense(weights, "pooler", x[:, 0], 8))
    return dense(weights, "classifier", pooled, 3)


@family("GPT-2", TOKENS)
def gpt2(ops: Ops, weights: Weights, x: Array) -> Array:
    x = x + weights("position/embedding", 6, 8)
    causal = jnp.tril(jnp.ones((6, 6), bool))
    for i in range(2):
        w = weights / f"h{i}"
        q, k, v = jnp.split(dense(w, "c_attn", layer_norm(ops, w, "ln_1", x), 24), 3, axis=-1)
        y = merge_heads(attend(ops, *(split_heads(part, 2) for part in (q, k, v)), mask=causal))
        x = x + dense(w, "c_proj", y, 8)
        x = x + mlp(ops, w, "mlp", layer_norm(ops, w, "ln_2", x), 32)
    return layer_norm(ops, weights, "ln_f", x) @ weights("tokens/embedding", 11, 8).T


def llama_attention(ops: Ops, w: Weights, x: Array, heads: int = 4, groups: int = 2) -> Array:
    """Rotary positions; every key and value serves several queries."""
    length, features = x.shape[1], 4
    q = split_heads(dense(w, "q", x, heads * features, bias=False), heads)
    k = split_heads(dense(w, "k", x, groups * features, bias=False), groups)
    v = split_heads(dense(w, "v", x, groups * features, bias=False), groups)
    q, k = rotary(q, np.arange(length)), rotary(k, np.arange(length))
    k, v = jnp.repeat(k, heads // groups, axis=1), jnp.repeat(v, heads // groups, axis=1)
    y = attend(ops, q, k, v, mask=jnp.tril(jnp.ones((length, length), bool)))
    return dense(w, "o", merge_heads(y), x.shape[-1], bias=False)


def swiglu(ops: Ops, w: Weights, x: Array, hidden: int = 12) -> Array:
    gate = ops.act(jax.nn.silu, dense(w, "gate", x, hidden, bias=False))
    return dense(w, "down", ops.share(gate * dense(w, "up", x, hidden, bias=False)), x.shape[-1], bias=False)


@family("Llama", TOKENS)
def llama(ops: Ops, weights: Weights, x: Array) -> Array:
    for i in range(2):
        w = weights / f"layer{i}"
        x = x + llama_attention(ops, w / "attention", rms_norm(ops, w, "norm0", x))
        x = x + swiglu(ops, w / "mlp", rms_norm(ops, w, "norm1", x))
    return dense(weights, "head", rms_norm(ops, weights, "norm", x), 11, bias=False)


@family("Mixture of experts", TOKENS)
def mixture_of_experts(ops: Ops, weights: Weights, x: Array) -> Array:
    experts, chosen = 4, 2
    for i in range(2):
        w = weights / f"layer{i}"
        x = x + llama_attention(ops, w / "attention", rms_norm(ops, w, "norm0", x))
        h = rms_norm(ops, w, "norm1", x)
        values, indices = lax.top_k(dense(w, "router", h, experts, bias=False), chosen)
        gates = jax.nn.softmax(values, axis=-1)
        dispatch = jax.nn.one_hot(indices, experts, dtype=x.dtype)  # a decision: the gates are all that is weighed
        combine = (gates[..., None] * dispatch).sum(axis=-2)
        up = jnp.einsum("nld,edh->nleh", h, w("up/kernels", experts, 8, 12))
        gate = ops.act(jax.nn.silu, jnp.einsum("nld,edh->nleh", h, w("gate/kernels", experts, 8, 12)))
        y = jnp.einsum("nleh,ehd->nled", ops.share(gate * up), w("down/kernels", experts, 12, 8))
        x = x + ops.share(jnp.einsum("nle,nled->nld", combine, y))
    return dense(weights, "head", rms_norm(ops, weights, "norm", x), 11, bias=False)


@family("T5", (2, 6, 8), (2, 4, 8))
def t5(ops: Ops, weights: Weights, x: tuple[Array, Array]) -> Array:
    source, target = x

    def relative_bias(name: str, queries: int, keys: int, both: bool) -> Array:
        """Few buckets for all distances, more than 3 in one of them."""
        distance = np.arange(keys)[None, :] - np.arange(queries)[:, None]
        bucket = np.minimum(np.abs(distance), 3) + (4 * (distance > 0) if both else 0)
        return weights(f"{name}/table", 8, 2)[bucket].transpose(2, 0, 1)

    def multi_head(w: Weights, x: Array, memory: Array, bias: Array | None = None, mask: Array | None = None) -> Array:
        """No biases, and scores that are not divided by the root of their size."""
        names = (("q", x), ("k", memory), ("v", memory))
        q, k, v = (split_heads(dense(w, n, a, 8, bias=False), 2) for n, a in names)
        scores = ops.share(jnp.einsum("nhqd,nhkd->nhqk", q, k))
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else jnp.where(mask, scores, -1e9)
        y = ops.share(jnp.einsum("nhqk,nhkd->nhqd", jax.nn.softmax(scores), v))
        return dense(w, "o", merge_heads(y), 8, bias=False)

    def feed_forward(w: Weights, x: Array) -> Array:
        gate = ops.act(jax.nn.gelu, dense(w, "wi_0", x, 12, bias=False))
        return dense(w, "wo", ops.share(gate * dense(w, "wi_1", x, 12, bias=False)), 8, bias=False)

    bias = relative_bias("encoder", 6, 6, True)
    for i in range(2):
        w = weights / f"encoder{i}"
        h = rms_norm(ops, w, "norm0", source)
        source = source + multi_head(w / "self", h, h, bias)
        source = source + feed_forward(w, rms_norm(ops, w, "norm1", source))
    source = rms_norm(ops, weights, "encoder/norm", source)
    bias, mask = relative_bias("decoder", 4, 4, False), jnp.tril(jnp.ones((4, 4), bool))
    for i in range(2):
        w = weights / f"decoder{i}"
        h = rms_norm(ops, w, "norm0", target)
        target = target + multi_head(w / "self", h, h, bias, mask)
        target = target + multi_head(w / "cross", rms_norm(ops, w, "norm1", target), source)
        target = target + feed_forward(w, rms_norm(ops, w, "norm2", target))
    return dense(weights, "head", rms_norm(ops, weights, "norm", target) / math.sqrt(8), 11, bias=False)


@family("Linear attention", TOKENS)
def linear_attention(ops: Ops, weights: Weights, x: Array) -> Array:
    feature = lambda v: jax.nn.elu(v) + 1.0  # noqa: E731
    for i in range(2):
        w = weights / f"layer{i}"
        h = layer_norm(ops, w, "norm", x)
        q, k = (ops.act(feature, dense(w, name, h, 8)) for name in "qk")
        state = jnp.cumsum(ops.share(jnp.einsum("nld,nle->nlde", k, dense(w, "v", h, 8))), axis=1)
        total = ops.share(jnp.einsum("nld,nld->nl", q, jnp.cumsum(k, axis=1)))
        y = ops.share(jnp.einsum("nld,nlde->nle", q, state)) / ops.hold(total)[..., None]
        x = x + dense(w, "out", y, 8)
    return dense(weights, "head", x.mean(axis=1), 5)


FAMILIES = [
    vit,
    vit_registers,
    vit_rotary,
    swin,
    detr,
    bert,
    gpt2,
    llama,
    mixture_of_experts,
    t5,
    linear_attention,
]
