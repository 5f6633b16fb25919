"""Llama, a language model, as an ordinary ``flax.linen`` module.

Touvron et al. (2023, https://arxiv.org/abs/2302.13971): RMSNorm, rotary positions, gated feed-forward blocks, no
biases, and heads that share keys and values. `Llama.embed` looks the tokens up and `Llama.encode` does the rest,
because relevance stops at the embeddings: token ids are names, not quantities.

Example:
    >>> import jax, jax.numpy as jnp, jaxlrp
    >>> from jaxlrp.models.llama import Llama, LlamaConfig
    >>> sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
    >>> llama = Llama(LlamaConfig(vocab_size=50, **sizes))
    >>> ids = jnp.array([[2, 7, 9, 3]])
    >>> params = llama.init(jax.random.key(0), ids)
    >>> embeddings = llama.apply(params, ids, method="embed")
    >>> def next_token(params, embeddings):
    ...     return llama.apply(params, embeddings, method="encode")[:, -1]
    >>> explain = jaxlrp.lrp(next_token, jaxlrp.Composite.uniform(jaxlrp.Epsilon()), argnums=1)
    >>> explain(params, embeddings, target=7).sum(-1).shape  # why token 7 comes next: one number a token
    (1, 4)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ._attention import attend, causal, merge_heads, split_heads
from ._hf import ModelConfigError, Place, Settings, check_heads, dense, lay_out, norm


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: features of a token.
        num_layers: transformer layers.
        num_heads: attention heads; they share ``hidden_size`` evenly, an even number of features each.
        num_kv_heads: heads of the keys and values; as many neighbouring heads as it takes read the same one.
        intermediate_size: features inside of the feed-forward blocks.
        rope_theta: the base of the rotary positions' wavelengths.
        rms_norm_eps: added to the mean square in every RMSNorm.
        tied: whether the head reads the token embeddings instead of weights of its own.

    Raises:
        ModelConfigError: the sizes do not divide as they should.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tied: bool = False

    def __post_init__(self) -> None:
        check_heads("Llama", self.hidden_size, self.num_heads)
        if self.head_size % 2:
            raise ModelConfigError(f"Llama: rotary positions need an even number of features, not {self.head_size}.")
        if self.num_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"Llama: {self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly."
            )

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read the dictionary in a Hugging Face ``config.json``.

        Raises:
            ModelConfigError: a setting is missing, of the wrong type, or asks for what is not built in.

        Example:
            >>> from jaxlrp.models.llama import LlamaConfig
            >>> sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            >>> LlamaConfig.from_dict({"vocab_size": 100, "intermediate_size": 128, **sizes}).num_kv_heads
            4
        """
        settings = Settings(config, "Llama")
        settings.require("model_type", "llama")
        settings.require("hidden_act", "silu")
        settings.require("attention_bias", False)
        settings.require("mlp_bias", False)
        settings.require("rope_scaling", None)
        hidden, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
        check_heads("Llama", hidden, heads)
        settings.require("head_dim", None, hidden // heads)
        return cls(
            vocab_size=settings.size("vocab_size"),
            hidden_size=hidden,
            num_layers=settings.size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=settings.size("num_key_value_heads", heads),
            intermediate_size=settings.size("intermediate_size"),
            rope_theta=_rope_theta(settings),
            rms_norm_eps=settings.number("rms_norm_eps", 1e-6),
            tied=settings.flag("tie_word_embeddings", False),
        )


def _rope_theta(settings: Settings) -> float:
    """From ``rope_theta``, or from ``rope_parameters``, where newer files keep it."""
    nested = settings.config.get("rope_parameters")
    if nested is None:
        return settings.number("rope_theta", 10000.0)
    rope = Settings(nested, "Llama's 'rope_parameters'")
    rope.require("rope_type", "default")
    return rope.number("rope_theta", 10000.0)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: turn the feature pairs ``(i, i + half)`` by angles that grow with the position.

    Su et al. (2021, https://arxiv.org/abs/2104.09864). Scores of turned queries and keys depend on the distance of
    their positions alone.

    Args:
        x: ``[..., heads, tokens, features]``.
        positions: ``[..., tokens]``.
        theta: pair ``i`` of ``half`` turns by ``theta ** (-i / half)`` a position.

    Returns:
        As ``x``.
    """
    half = x.shape[-1] // 2
    angles = positions[..., None, :, None] * theta ** (-jnp.arange(half) / half)
    angles = jnp.concatenate([angles, angles], axis=-1)
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * jnp.cos(angles).astype(x.dtype) + turned * jnp.sin(angles).astype(x.dtype)


class GroupedAttention(nn.Module):
    """Causal attention with rotary positions, in which groups of heads share keys and values."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[..., tokens, hidden]`` to the same shape; no token looks where ``mask`` ``[..., tokens]`` is 0."""
        c = self.config

        def project(name: str, heads: int) -> jax.Array:
            return split_heads(nn.Dense(heads * c.head_size, use_bias=False, name=name)(x), heads)

        query = rotate(project("query", c.num_heads), positions, c.rope_theta)
        key = rotate(project("key", c.num_kv_heads), positions, c.rope_theta)
        value = project("value", c.num_kv_heads)
        if (group := c.num_heads // c.num_kv_heads) > 1:
            key, value = jnp.repeat(key, group, axis=-3), jnp.repeat(value, group, axis=-3)
        mixed = merge_heads(attend(query, key, value, causal(x.shape[-2], mask)))
        return nn.Dense(c.hidden_size, use_bias=False, name="output")(mixed)


class LlamaLayer(nn.Module):
    """Attention and a gated feed-forward block, each of the normalised input and added to it."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[..., tokens, hidden]`` to the same shape."""
        c = self.config
        y = nn.RMSNorm(epsilon=c.rms_norm_eps, name="attention_norm")(x)
        x = x + GroupedAttention(c, name="attention")(y, positions, mask)
        y = nn.RMSNorm(epsilon=c.rms_norm_eps, name="mlp_norm")(x)
        gate = nn.silu(nn.Dense(c.intermediate_size, use_bias=False, name="gate")(y))
        y = gate * nn.Dense(c.intermediate_size, use_bias=False, name="up")(y)
        return x + nn.Dense(c.hidden_size, use_bias=False, name="down")(y)


class Llama(nn.Module):
    """Llama with its head: token ids in, logits of every next token out."""

    config: LlamaConfig

    def setup(self) -> None:
        """Make the parts."""
        c = self.config
        self.token_embeddings = nn.Embed(c.vocab_size, c.hidden_size)
        self.layers = [LlamaLayer(c) for _ in range(c.num_layers)]
        self.norm = nn.RMSNorm(epsilon=c.rms_norm_eps)
        if not c.tied:
            self.head = nn.Dense(c.vocab_size, use_bias=False)

    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        logits_to_keep: int | None = None,
    ) -> jax.Array:
        """Return the logits of the next token at every token.

        Args:
            ids: token ids ``[..., tokens]``.
            mask: ``[..., tokens]``, 0 or False at padding; None where there is none.
            positions: ``[..., tokens]``, which place in the text each token has; None counts from 0.
            logits_to_keep: of how many tokens, from the last on, logits are made; None is all. To explain what comes
                next, 1 spares the head's product with all others, forwards and backwards.

        Returns:
            ``[..., tokens, vocab_size]``.
        """
        return self.encode(self.embed(ids), mask, positions, logits_to_keep)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Look the token embeddings ``[..., tokens, hidden]`` up, all that `encode` needs to know of the ids."""
        return self.token_embeddings(ids)

    def encode(
        self,
        embeddings: jax.Array,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        logits_to_keep: int | None = None,
    ) -> jax.Array:
        """Map token embeddings ``[..., tokens, hidden]`` to logits; see `__call__`."""
        if positions is None:
            positions = jnp.arange(embeddings.shape[-2])
        x = embeddings
        for layer in self.layers:
            x = layer(x, positions, mask)
        if logits_to_keep is not None:
            x = x[..., -logits_to_keep:, :]
        x = self.norm(x)
        return self.token_embeddings.attend(x) if self.config.tied else self.head(x)


def params_from_hf(tensors: Mapping[str, np.ndarray], config: LlamaConfig) -> dict[str, Any]:
    """Lay the tensors of a Hugging Face Llama out as the variables of `Llama`.

    Args:
        tensors: by their Hugging Face names, with or without the prefix ``"model."``, in PyTorch's layouts
            (kernels ``[out, in]``).
        config: the sizes.

    Returns:
        ``{"params": ...}``, what ``Llama(config).apply`` takes, in the types of the tensors.

    Raises:
        WeightFileError: a tensor is missing, misshapen, not made of real numbers, or belongs to a layer that the
            settings do not have; the message names it.
    """
    return lay_out(tensors, _places(config), Llama(config), prefix="model.", stack="layers.")


def _places(config: LlamaConfig) -> Iterator[Place]:
    yield Place("embed_tokens.weight", ("token_embeddings", "embedding"))
    for k in range(config.num_layers):
        torch, flax = f"layers.{k}", f"layers_{k}"
        yield from norm(f"{torch}.input_layernorm", flax, "attention_norm", bias=False)
        for short, part in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            yield from dense(f"{torch}.self_attn.{short}_proj", flax, "attention", part, bias=False)
        yield from norm(f"{torch}.post_attention_layernorm", flax, "mlp_norm", bias=False)
        for part in ("gate", "up", "down"):
            yield from dense(f"{torch}.mlp.{part}_proj", flax, part, bias=False)
    yield from norm("norm", "norm", bias=False)
    if not config.tied:
        yield from dense("lm_head", "head", bias=False)
