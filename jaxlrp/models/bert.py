"""BERT, the text encoder, as an ordinary ``flax.linen`` module.

Devlin et al. (2019, https://arxiv.org/abs/1810.04805). `Bert.embed` looks the tokens up and `Bert.encode` does the
rest, because relevance stops at the embeddings: token ids are names, not quantities.

Example:
    >>> import jax, jax.numpy as jnp, jaxlrp
    >>> from jaxlrp.models.bert import Bert, BertConfig
    >>> bert = Bert(BertConfig(vocab_size=50, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16))
    >>> ids = jnp.array([[2, 7, 9, 3]])
    >>> params = bert.init(jax.random.key(0), ids)
    >>> embeddings = bert.apply(params, ids, method="embed")
    >>> explain = jaxlrp.lrp(bert, jaxlrp.Composite.uniform(jaxlrp.Epsilon()))
    >>> explain(params, embeddings, method="encode").sum(-1).shape  # one number a token
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

from ._attention import attend, merge_heads, split_heads, unmasked
from ._hf import ModelConfigError as ModelConfigError
from ._hf import Place, Settings, check_heads, dense, lay_out, norm


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: features of a token.
        num_layers: transformer layers.
        num_heads: attention heads; they share ``hidden_size`` evenly.
        intermediate_size: features inside of the feed-forward blocks.
        max_positions: the longest text in tokens.
        type_vocab_size: number of text types (first and second sentence).
        layer_norm_eps: added to the variance in every LayerNorm.

    Raises:
        ModelConfigError: ``hidden_size`` is no multiple of ``num_heads``.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        check_heads("BERT", self.hidden_size, self.num_heads)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BertConfig:
        """Read the dictionary in a Hugging Face ``config.json``.

        Raises:
            ModelConfigError: a setting is missing, of the wrong type, or asks for what is not built in.

        Example:
            >>> from jaxlrp.models.bert import BertConfig
            >>> sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
            >>> BertConfig.from_dict({"vocab_size": 30522, "intermediate_size": 1536, **sizes}).num_layers
            6
        """
        settings = Settings(config, "BERT")
        settings.require("model_type", "bert")
        settings.require("hidden_act", "gelu")
        settings.require("position_embedding_type", "absolute")
        settings.require("is_decoder", False)
        return cls(
            vocab_size=settings.size("vocab_size"),
            hidden_size=settings.size("hidden_size"),
            num_layers=settings.size("num_hidden_layers"),
            num_heads=settings.size("num_attention_heads"),
            intermediate_size=settings.size("intermediate_size"),
            max_positions=settings.size("max_position_embeddings", 512),
            type_vocab_size=settings.size("type_vocab_size", 2),
            layer_norm_eps=settings.number("layer_norm_eps", 1e-12),
        )


class SelfAttention(nn.Module):
    """Multi-head attention of a text to itself."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[..., tokens, hidden]`` to the same shape; no token looks where ``mask`` ``[..., tokens]`` is 0."""
        features = x.shape[-1]
        query, key, value = (
            split_heads(nn.Dense(features, name=name)(x), self.num_heads) for name in ("query", "key", "value")
        )
        mixed = merge_heads(attend(query, key, value, unmasked(mask)))
        return nn.Dense(features, name="output")(mixed)


class BertLayer(nn.Module):
    """Attention and a feed-forward block, each added to its input and normalised afterwards."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[..., tokens, hidden]`` to the same shape."""
        c = self.config
        attended = SelfAttention(c.num_heads, name="attention")(x, mask)
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, name="attention_norm")(x + attended)
        y = nn.gelu(nn.Dense(c.intermediate_size, name="intermediate")(x), approximate=False)
        y = nn.Dense(c.hidden_size, name="output")(y)
        return nn.LayerNorm(epsilon=c.layer_norm_eps, name="output_norm")(x + y)


class Bert(nn.Module):
    """BERT without a head: token ids in, one vector a token out."""

    config: BertConfig

    def setup(self) -> None:
        """Make the parts."""
        c = self.config
        self.word_embeddings = nn.Embed(c.vocab_size, c.hidden_size)
        self.position_embeddings = nn.Embed(c.max_positions, c.hidden_size)
        self.type_embeddings = nn.Embed(c.type_vocab_size, c.hidden_size)
        self.embedding_norm = nn.LayerNorm(epsilon=c.layer_norm_eps)
        self.layers = [BertLayer(c) for _ in range(c.num_layers)]

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None, type_ids: jax.Array | None = None) -> jax.Array:
        """Return the last hidden states.

        Args:
            ids: token ids ``[..., tokens]``.
            mask: ``[..., tokens]``, 0 or False at padding; None where there is none.
            type_ids: text types ``[..., tokens]``; None is 0 everywhere.

        Returns:
            ``[..., tokens, hidden]``.

        Raises:
            ValueError: the text is longer than the model's positions.
        """
        return self.encode(self.embed(ids), mask, type_ids)

    def embed(self, ids: jax.Array, type_ids: jax.Array | None = None) -> jax.Array:
        """Look the word embeddings ``[..., tokens, hidden]`` up, all that `encode` needs to know of the ids.

        Args:
            ids: token ids ``[..., tokens]``.
            type_ids: taken so that one call fits all, but not needed: `encode` adds the types.
        """
        return self.word_embeddings(ids)

    def encode(
        self, embeddings: jax.Array, mask: jax.Array | None = None, type_ids: jax.Array | None = None
    ) -> jax.Array:
        """Map word embeddings ``[..., tokens, hidden]`` to the last hidden states; see `__call__`."""
        tokens = embeddings.shape[-2]
        if tokens > self.config.max_positions:
            raise ValueError(f"{tokens} tokens are more than the model's {self.config.max_positions} positions")
        if type_ids is None:
            type_ids = jnp.zeros(tokens, jnp.int32)
        x = embeddings + self.position_embeddings(jnp.arange(tokens)) + self.type_embeddings(type_ids)
        x = self.embedding_norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class BertClassifier(nn.Module):
    """BERT with a head that classifies texts by their first token."""

    config: BertConfig
    num_labels: int

    def setup(self) -> None:
        """Make the parts."""
        self.bert = Bert(self.config)
        self.pooler = nn.Dense(self.config.hidden_size)
        self.classifier = nn.Dense(self.num_labels)

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None, type_ids: jax.Array | None = None) -> jax.Array:
        """Return logits ``[..., num_labels]``; for the arguments see `Bert.__call__`."""
        return self.encode(self.embed(ids), mask, type_ids)

    def embed(self, ids: jax.Array, type_ids: jax.Array | None = None) -> jax.Array:
        """Look the word embeddings ``[..., tokens, hidden]`` up."""
        return self.bert.embed(ids, type_ids)

    def encode(
        self, embeddings: jax.Array, mask: jax.Array | None = None, type_ids: jax.Array | None = None
    ) -> jax.Array:
        """Map word embeddings ``[..., tokens, hidden]`` to logits ``[..., num_labels]``."""
        first = self.bert.encode(embeddings, mask, type_ids)[..., 0, :]
        return self.classifier(jnp.tanh(self.pooler(first)))


def params_from_hf(tensors: Mapping[str, np.ndarray], config: BertConfig) -> dict[str, Any]:
    """Lay the tensors of a Hugging Face BERT out as the variables of `Bert`.

    Args:
        tensors: by their Hugging Face names, with or without the prefix ``"bert."``, in PyTorch's layouts
            (kernels ``[out, in]``). Those of heads are left alone.
        config: the sizes.

    Returns:
        ``{"params": ...}``, what ``Bert(config).apply`` takes, in the types of the tensors.

    Raises:
        WeightFileError: a tensor is missing, misshapen, not made of real numbers, or belongs to a layer that the
            settings do not have; the message names it.
    """
    return lay_out(_modern(tensors), _places(config), Bert(config), prefix="bert.", stack="encoder.layer.")


def classifier_from_hf(tensors: Mapping[str, np.ndarray], config: BertConfig) -> tuple[BertClassifier, dict[str, Any]]:
    """As `params_from_hf`, for a BERT with a classifying head; the number of labels is read off its weights.

    Returns:
        ``(module, variables)``.

    Raises:
        WeightFileError: as for `params_from_hf`.
    """
    tensors = _modern(tensors)
    labels = len(tensors["classifier.weight"]) if np.ndim(tensors.get("classifier.weight", 0)) else 1
    module = BertClassifier(config, labels)
    places = [
        *(Place(name, ("bert", *path), transpose) for name, path, transpose in _places(config)),
        *dense("pooler.dense", "pooler"),
        *dense("classifier", "classifier"),
    ]
    return module, lay_out(tensors, places, module, prefix="bert.", stack="encoder.layer.")


def _modern(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The oldest checkpoints call the parameters of a LayerNorm gamma and beta."""
    renamed = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    modern = {}
    for name, tensor in tensors.items():
        for old, new in renamed.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        modern[name] = tensor
    return modern


def _places(config: BertConfig) -> Iterator[Place]:
    for kind, flax in (("word", "word"), ("position", "position"), ("token_type", "type")):
        yield Place(f"embeddings.{kind}_embeddings.weight", (f"{flax}_embeddings", "embedding"))
    yield from norm("embeddings.LayerNorm", "embedding_norm")
    for k in range(config.num_layers):
        torch, flax = f"encoder.layer.{k}", f"layers_{k}"
        for part in ("query", "key", "value"):
            yield from dense(f"{torch}.attention.self.{part}", flax, "attention", part)
        yield from dense(f"{torch}.attention.output.dense", flax, "attention", "output")
        yield from norm(f"{torch}.attention.output.LayerNorm", flax, "attention_norm")
        yield from dense(f"{torch}.intermediate.dense", flax, "intermediate")
        yield from dense(f"{torch}.output.dense", flax, "output")
        yield from norm(f"{torch}.output.LayerNorm", flax, "output_norm")
