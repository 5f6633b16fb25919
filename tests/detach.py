"""Transformers whose plain gradient times input is AttnLRP or CP-LRP: an oracle written from the published rules alone.

Nothing here knows how jaxlrp works, nor its models. A rule that hands relevance on in proportion to contributions is
gradient times input of a function with the same value and another derivative, which `jax.lax.stop_gradient` makes:

=============  ===============================================  ==========================================
step           published rule                                   the same function, another derivative
=============  ===============================================  ==========================================
activation     identity, ``R_x = R_f(x)``                       ``x * const(f(x) / x)``
normalisation  its scale is a constant                          ``(x - mean(x)) / const(std(x))``
product        equal shares, ``R_a = a b R / (2 a b)``          ``a b / 2 + const(a b / 2)``
softmax        AttnLRP: first-order Taylor; CP-LRP: a constant  ``softmax(x)``; ``const(softmax(x))``
gate           AttnLRP: a product; CP-LRP: a constant           ``const(gate) * signal``
=============  ===============================================  ==========================================

Linear layers, sums and moves need no change: LRP-0 through them is gradient times input, with the biases' shares lost.
Parameters are read by their Hugging Face names in PyTorch's layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]
const = jax.lax.stop_gradient

#: How steps other than linear layers hand relevance on.
METHODS = ("attnLRP", "cp_LRP", "gradient_x_input")


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a transformer, each with the derivative that the method asks for."""

    method: str

    def activation(self, f: Callable[[Array], Array], x: Array) -> Array:
        if self.method == "gradient_x_input":
            return f(x)
        safe = jnp.where(x == 0, 1.0, x)
        return x * const(f(safe) / safe)

    def product(self, multiply: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
        z = multiply(a, b)
        return z if self.method == "gradient_x_input" else 0.5 * z + const(0.5 * z)

    def gate(self, f: Callable[[Array], Array], x: Array, signal: Array) -> Array:
        if self.method == "cp_LRP":
            return const(f(x)) * signal
        return self.product(jnp.multiply, self.activation(f, x), signal)

    def scale(self, s: Array) -> Array:
        return s if self.method == "gradient_x_input" else const(s)

    def attention(self, q: Array, k: Array, v: Array, allowed: Array) -> Array:
        """One head: ``[tokens, features]`` each."""
        scores = self.product(jnp.matmul, q, k.T) / np.sqrt(q.shape[-1])
        scores = jnp.where(allowed, scores, -jnp.inf)
        weights = jnp.exp(scores - const(scores.max(-1, keepdims=True)))
        weights = weights / weights.sum(-1, keepdims=True)
        if self.method == "cp_LRP":
            return const(weights) @ v
        return self.product(jnp.matmul, weights, v)

    def layer_norm(self, p: Params, name: str, x: Array, eps: float) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = self.scale(jnp.sqrt((centred**2).mean(-1, keepdims=True) + eps))
        return centred / scale * p[f"{name}.weight"] + p[f"{name}.bias"]

    def rms_norm(self, p: Params, name: str, x: Array, eps: float) -> Array:
        return x / self.scale(jnp.sqrt((x**2).mean(-1, keepdims=True) + eps)) * p[f"{name}.weight"]


def linear(p: Params, name: str, x: Array) -> Array:
    """``[out, in]`` kernels, with or without a bias."""
    z = x @ p[f"{name}.weight"].T
    return z + p[f"{name}.bias"] if f"{name}.bias" in p else z


def conv1d(p: Params, name: str, x: Array) -> Array:
    """``[in, out]`` kernels."""
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu_erf(x: Array) -> Array:
    return x * 0.5 * (1 + jax.scipy.special.erf(x / np.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x: Array) -> Array:
    return x / (1 + jnp.exp(-x))


def past(tokens: int) -> Array:
    return jnp.arange(tokens)[:, None] >= jnp.arange(tokens)[None, :]


def by_head(x: Array, heads: int) -> list[Array]:
    return jnp.split(x, heads, axis=-1)


# -- one text at a time: embeddings [tokens, hidden] in, logits out ----------------------------------------------------


def bert(steps: Steps, p: Params, x: Array, *, layers: int, heads: int, eps: float = 1e-12) -> Array:
    """Logits ``[labels]`` of a BERT classifier."""
    tokens = len(x)
    allowed = jnp.ones((tokens, tokens), bool)
    embeddings = "bert.embeddings"
    x = x + p[f"{embeddings}.position_embeddings.weight"][:tokens] + p[f"{embeddings}.token_type_embeddings.weight"][0]
    x = steps.layer_norm(p, f"{embeddings}.LayerNorm", x, eps)
    for i in range(layers):
        at = f"bert.encoder.layer.{i}"
        q, k, v = (by_head(linear(p, f"{at}.attention.self.{n}", x), heads) for n in ("query", "key", "value"))
        mixed = jnp.concatenate([steps.attention(*qkv, allowed) for qkv in zip(q, k, v, strict=True)], -1)
        x = x + linear(p, f"{at}.attention.output.dense", mixed)
        x = steps.layer_norm(p, f"{at}.attention.output.LayerNorm", x, eps)
        y = steps.activation(gelu_erf, linear(p, f"{at}.intermediate.dense", x))
        x = steps.layer_norm(p, f"{at}.output.LayerNorm", x + linear(p, f"{at}.output.dense", y), eps)
    return linear(p, "classifier", steps.activation(jnp.tanh, linear(p, "bert.pooler.dense", x[0])))


def gpt2(steps: Steps, p: Params, x: Array, *, layers: int, heads: int, eps: float = 1e-5) -> Array:
    """Logits ``[vocab]`` of the token after the last."""
    tokens = len(x)
    x = x + p["transformer.wpe.weight"][:tokens]
    for i in range(layers):
        at = f"transformer.h.{i}"
        y = steps.layer_norm(p, f"{at}.ln_1", x, eps)
        q, k, v = (by_head(part, heads) for part in jnp.split(conv1d(p, f"{at}.attn.c_attn", y), 3, axis=-1))
        mixed = jnp.concatenate([steps.attention(*qkv, past(tokens)) for qkv in zip(q, k, v, strict=True)], -1)
        x = x + conv1d(p, f"{at}.attn.c_proj", mixed)
        y = steps.layer_norm(p, f"{at}.ln_2", x, eps)
        x = x + conv1d(p, f"{at}.mlp.c_proj", steps.activation(gelu_tanh, conv1d(p, f"{at}.mlp.c_fc", y)))
    return linear(p, "lm_head", steps.layer_norm(p, "transformer.ln_f", x[-1], eps))


def llama(
    steps: Steps, p: Params, x: Array, *, layers: int, heads: int, kv_heads: int, theta: float = 1e4, eps: float = 1e-6
) -> Array:
    """Logits ``[vocab]`` of the token after the last."""
    tokens = len(x)
    for i in range(layers):
        at = f"model.layers.{i}"
        y = steps.rms_norm(p, f"{at}.input_layernorm", x, eps)
        q = [turn(part, theta) for part in by_head(linear(p, f"{at}.self_attn.q_proj", y), heads)]
        k = [turn(part, theta) for part in by_head(linear(p, f"{at}.self_attn.k_proj", y), kv_heads)]
        v = by_head(linear(p, f"{at}.self_attn.v_proj", y), kv_heads)
        shared = [h * kv_heads // heads for h in range(heads)]
        mixed = [steps.attention(q[h], k[g], v[g], past(tokens)) for h, g in enumerate(shared)]
        x = x + linear(p, f"{at}.self_attn.o_proj", jnp.concatenate(mixed, -1))
        y = steps.rms_norm(p, f"{at}.post_attention_layernorm", x, eps)
        gated = steps.gate(silu, linear(p, f"{at}.mlp.gate_proj", y), linear(p, f"{at}.mlp.up_proj", y))
        x = x + linear(p, f"{at}.mlp.down_proj", gated)
    return linear(p, "lm_head", steps.rms_norm(p, "model.norm", x[-1], eps))


def vit(steps: Steps, p: Params, x: Array, *, layers: int, heads: int, patch: int, eps: float = 1e-6) -> Array:
    """Logits of a vision transformer for one image ``[H, W, C]``; parameters by their paths in Linen."""
    (height, width, channels), hidden = x.shape, p["patches/bias"].shape[0]
    x = x.reshape(height // patch, patch, width // patch, patch, channels).swapaxes(1, 2)
    x = x.reshape(-1, patch * patch * channels) @ p["patches/kernel"].reshape(-1, hidden) + p["patches/bias"]
    x = jnp.concatenate([p["class"][0], x]) + p["positions"][0]
    allowed = jnp.ones((len(x), len(x)), bool)

    def norm(name: str, x: Array) -> Array:
        return steps.layer_norm({f"{name}.weight": p[f"{name}/scale"], f"{name}.bias": p[f"{name}/bias"]}, name, x, eps)

    def dense(name: str, x: Array) -> Array:
        kernel, bias = p[f"{name}/kernel"], p[f"{name}/bias"]
        into = x.shape[-1]
        return x @ kernel.reshape(into, -1) + bias.reshape(-1)

    for i in range(layers):
        y = norm(f"norm1_{i}", x)
        q, k, v = (by_head(dense(f"attention_{i}/{n}", y), heads) for n in ("query", "key", "value"))
        mixed = jnp.concatenate([steps.attention(*qkv, allowed) for qkv in zip(q, k, v, strict=True)], -1)
        x = x + dense(f"attention_{i}/out", mixed)
        y = steps.activation(gelu_tanh, dense(f"up_{i}", norm(f"norm2_{i}", x)))
        x = x + dense(f"down_{i}", y)
    return dense("head", norm("norm", x)[0])


def turn(x: Array, theta: float) -> Array:
    """Rotary positions as complex numbers: pair ``(i, i + half)`` of token ``t`` turns by ``t theta^(-i / half)``."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return jnp.concatenate([pairs.real, pairs.imag], -1).astype(x.dtype)


# -- relevance --------------------------------------------------------------------------------------------------------


def relevance(model: Callable[..., Array], method: str, p: Params, x: Any, target: Any, **sizes: Any) -> Array:
    """Relevance ``[tokens, hidden]`` of the embeddings of one text for one logit, which starts with its own value."""
    assert method in METHODS
    x = jnp.asarray(x)
    gradient = jax.grad(lambda x: model(Steps(method), p, x, **sizes)[target])(x)
    return x * gradient


# -- random weights under Hugging Face names ---------------------------------------------------------------------------


def random_params(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: Any) -> dict[str, np.ndarray]:
    """Kernels that keep sizes about 1, and biases and norms that are not what modules start with."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape)
        is_norm = any(part in name for part in ("LayerNorm", "layernorm", "ln_", "model.norm"))
        if len(shape) == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            values = values / np.sqrt(shape[1])
        elif len(shape) == 1:
            values = 1 + 0.2 * values if is_norm and name.endswith("weight") else 0.2 * values
        params[name] = values.astype(dtype)
    return params


def bert_shapes(vocab: int, hidden: int, layers: int, inner: int, positions: int, labels: int) -> dict[str, tuple]:
    shapes: dict[str, tuple] = {
        "bert.embeddings.word_embeddings.weight": (vocab, hidden),
        "bert.embeddings.position_embeddings.weight": (positions, hidden),
        "bert.embeddings.token_type_embeddings.weight": (2, hidden),
        **_norm_shapes("bert.embeddings.LayerNorm", hidden),
        **_dense_shapes("bert.pooler.dense", hidden, hidden),
        **_dense_shapes("classifier", labels, hidden),
    }
    for i in range(layers):
        at = f"bert.encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _dense_shapes(f"{at}.attention.{part}", hidden, hidden)
        shapes |= _norm_shapes(f"{at}.attention.output.LayerNorm", hidden)
        shapes |= _dense_shapes(f"{at}.intermediate.dense", inner, hidden)
        shapes |= _dense_shapes(f"{at}.output.dense", hidden, inner)
        shapes |= _norm_shapes(f"{at}.output.LayerNorm", hidden)
    return shapes


def gpt2_shapes(vocab: int, hidden: int, layers: int, inner: int, positions: int) -> dict[str, tuple]:
    shapes: dict[str, tuple] = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.wpe.weight": (positions, hidden),
        **_norm_shapes("transformer.ln_f", hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(layers):
        at = f"transformer.h.{i}"
        sizes = {
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, inner),
            "mlp.c_proj": (inner, hidden),
        }
        for part, shape in sizes.items():
            shapes |= {f"{at}.{part}.weight": shape, f"{at}.{part}.bias": shape[1:]}
        shapes |= _norm_shapes(f"{at}.ln_1", hidden) | _norm_shapes(f"{at}.ln_2", hidden)
    return shapes


def llama_shapes(vocab: int, hidden: int, layers: int, inner: int, heads: int, kv_heads: int) -> dict[str, tuple]:
    narrow = hidden // heads * kv_heads
    shapes: dict[str, tuple] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (narrow, hidden),
            f"{at}.self_attn.v_proj.weight": (narrow, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def _dense_shapes(name: str, out: int, into: int) -> dict[str, tuple]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm_shapes(name: str, size: int) -> dict[str, tuple]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
