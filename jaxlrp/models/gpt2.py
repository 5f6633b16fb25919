"""GPT-2, a language model, as an ordinary ``flax.linen`` module.

Radford et al. (2019, "Language models are unsupervised multitask learners"). `GPT2.embed` looks the tokens up and
`GPT2.encode` does the rest, because relevance stops at the embeddings: token ids are names, not quantities.

Example:
    >>> import jax, jax.numpy as jnp, jaxlrp
    >>> from jaxlrp.models.gpt2 import GPT2, GPT2Config
    >>> gpt2 = GPT2(GPT2Config(vocab_size=50, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16))
    >>> ids = jnp.array([[2, 7, 9, 3]])
    >>> params = gpt2.init(jax.random.key(0), ids)
    >>> embeddings = gpt2.apply(params, ids, method="embed")
    >>> def next_token(params, embeddings):
    ...     return gpt2.apply(params, embeddings, method="encode")[:, -1]
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
from ._hf import Place, Settings, check_heads, dense, lay_out, norm


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: features of a token.
        num_layers: transformer layers.
        num_heads: attention heads; they share ``hidden_size`` evenly.
        intermediate_size: features inside of the feed-forward blocks.
        max_positions: the longest text in tokens.
        layer_norm_eps: added to the variance in every LayerNorm.
        tied: whether the head reads the token embeddings instead of weights of its own.

    Raises:
        ModelConfigError: ``hidden_size`` is no multiple of ``num_heads``.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 1024
    layer_norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        check_heads("GPT-2", self.hidden_size, self.num_heads)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> GPT2Config:
        """Read the dictionary in a Hugging Face ``config.json``.

        Raises:
            ModelConfigError: a setting is missing, of the wrong type, or asks for what is not built in.

        Example:
            >>> from jaxlrp.models.gpt2 import GPT2Config
            >>> GPT2Config.from_dict(
            ...     {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
            ... ).intermediate_size
            3072
        """
        settings = Settings(config, "GPT-2")
        settings.require("model_type", "gpt2")
        settings.require("activation_function", "gelu_new", "gelu_pytorch_tanh")
        settings.require("scale_attn_weights", True)
        settings.require("scale_attn_by_inverse_layer_idx", False)
        settings.require("add_cross_attention", False)
        hidden = settings.size("n_embd")
        return cls(
            vocab_size=settings.size("vocab_size"),
            hidden_size=hidden,
            num_layers=settings.size("n_layer"),
            num_heads=settings.size("n_head"),
            intermediate_size=settings.size("n_inner", 4 * hidden),
            max_positions=settings.size("n_positions", 1024),
            layer_norm_eps=settings.number("layer_norm_epsilon", 1e-5),
            tied=settings.flag("tie_word_embeddings", True),
        )


class CausalSelfAttention(nn.Module):
    """Multi-head attention of every token to itself and those before it."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[..., tokens, hidden]`` to the same shape; no token looks where ``mask`` ``[..., tokens]`` is 0."""
        tokens, features = x.shape[-2:]
        parts = jnp.split(nn.Dense(3 * features, name="query_key_value")(x), 3, axis=-1)
        query, key, value = (split_heads(part, self.num_heads) for part in parts)
        mixed = merge_heads(attend(query, key, value, causal(tokens, mask)))
        return nn.Dense(features, name="output")(mixed)


class GPT2Layer(nn.Module):
    """Attention and a feed-forward block, each of the normalised input and added to it."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[..., tokens, hidden]`` to the same shape."""
        c = self.config
        y = nn.LayerNorm(epsilon=c.layer_norm_eps, name="attention_norm")(x)
        x = x + CausalSelfAttention(c.num_heads, name="attention")(y, mask)
        y = nn.LayerNorm(epsilon=c.layer_norm_eps, name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(c.intermediate_size, name="intermediate")(y), approximate=True)
        return x + nn.Dense(c.hidden_size, name="output")(y)


class GPT2(nn.Module):
    """GPT-2 with its head: token ids in, logits of every next token out."""

    config: GPT2Config

    def setup(self) -> None:
        """Make the parts."""
        c = self.config
        self.token_embeddings = nn.Embed(c.vocab_size, c.hidden_size)
        self.position_embeddings = nn.Embed(c.max_positions, c.hidden_size)
        self.layers = [GPT2Layer(c) for _ in range(c.num_layers)]
        self.norm = nn.LayerNorm(epsilon=c.layer_norm_eps)
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

        Raises:
            ValueError: the text is longer than the model's positions.
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
        tokens = embeddings.shape[-2]
        if tokens > self.config.max_positions:
            raise ValueError(f"{tokens} tokens are more than the model's {self.config.max_positions} positions")
        if positions is None:
            positions = jnp.arange(tokens)
        x = embeddings + self.position_embeddings(positions)
        for layer in self.layers:
            x = layer(x, mask)
        if logits_to_keep is not None:
            x = x[..., -logits_to_keep:, :]
        x = self.norm(x)
        return self.token_embeddings.attend(x) if self.config.tied else self.head(x)


def params_from_hf(tensors: Mapping[str, np.ndarray], config: GPT2Config) -> dict[str, Any]:
    """Lay the tensors of a Hugging Face GPT-2 out as the variables of `GPT2`.

    Args:
        tensors: by their Hugging Face names, with or without the prefix ``"transformer."``. GPT-2 keeps its kernels
            as ``[in, out]``, but for the head.
        config: the sizes.

    Returns:
        ``{"params": ...}``, what ``GPT2(config).apply`` takes, in the types of the tensors.

    Raises:
        WeightFileError: a tensor is missing, misshapen, not made of real numbers, or belongs to a layer that the
            settings do not have; the message names it.
    """
    return lay_out(tensors, _places(config), GPT2(config), prefix="transformer.", stack="h.")


def _places(config: GPT2Config) -> Iterator[Place]:
    yield Place("wte.weight", ("token_embeddings", "embedding"))
    yield Place("wpe.weight", ("position_embeddings", "embedding"))
    for k in range(config.num_layers):
        torch, flax = f"h.{k}", f"layers_{k}"
        yield from norm(f"{torch}.ln_1", flax, "attention_norm")
        yield from dense(f"{torch}.attn.c_attn", flax, "attention", "query_key_value", transpose=False)
        yield from dense(f"{torch}.attn.c_proj", flax, "attention", "output", transpose=False)
        yield from norm(f"{torch}.ln_2", flax, "mlp_norm")
        yield from dense(f"{torch}.mlp.c_fc", flax, "intermediate", transpose=False)
        yield from dense(f"{torch}.mlp.c_proj", flax, "output", transpose=False)
    yield from norm("ln_f", "norm")
    if not config.tied:
        yield from dense("lm_head", "head", bias=False)
