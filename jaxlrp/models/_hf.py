"""Models from Hugging Face: their settings, and their tensors as parameters of Flax modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ._torchfile import WeightFileError


class ModelConfigError(ValueError):
    """The settings of a model are incomplete or ask for something that is not built in; the message says what."""


class Settings:
    """The dictionary in a ``config.json``, read key by key with errors that name the key."""

    def __init__(self, config: Mapping[str, Any], model: str):
        if not isinstance(config, Mapping):
            raise ModelConfigError(f"The settings of {model} are a dictionary, not {type(config).__name__}.")
        self.config = config
        self.model = model

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; a missing or null one is the default, if there is one."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelConfigError(f"{key!r} of {self.model} must be a whole number of at least 1, not {value!r}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ModelConfigError(f"{key!r} of {self.model} must be a positive number, not {value!r}.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ModelConfigError(f"{key!r} of {self.model} must be true or false, not {value!r}.")
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse what is not built in; a missing key means the first of the allowed values."""
        value = self.config.get(key, allowed[0])
        if value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ModelConfigError(f"{key!r} of {self.model} must be {known}; {value!r} is not built in.")

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        if value is None and default is None:
            raise ModelConfigError(f"The settings of {self.model} have no {key!r}.")
        return default if value is None else value


def check_heads(model: str, width: int, heads: int) -> None:
    """The width of a model is shared out to its heads without remainder."""
    if width % heads:
        raise ModelConfigError(f"{model}: {heads} heads cannot share {width} features evenly.")


class Place(NamedTuple):
    """Where a tensor belongs: its Hugging Face name and its path among the Flax parameters."""

    name: str
    path: tuple[str, ...]
    transpose: bool = False  # PyTorch's linear layers keep [out, in], Flax's [in, out]


def dense(name: str, *path: str, bias: bool = True, transpose: bool = True) -> Iterable[Place]:
    """The tensors of a linear layer."""
    yield Place(f"{name}.weight", (*path, "kernel"), transpose)
    if bias:
        yield Place(f"{name}.bias", (*path, "bias"))


def norm(name: str, *path: str, bias: bool = True) -> Iterable[Place]:
    """The tensors of a LayerNorm, or of an RMSNorm, which has no bias."""
    yield Place(f"{name}.weight", (*path, "scale"))
    if bias:
        yield Place(f"{name}.bias", (*path, "bias"))


def lay_out(
    tensors: Mapping[str, np.ndarray], places: Iterable[Place], module: nn.Module, *, prefix: str, stack: str
) -> dict[str, Any]:
    """Lay tensors out as the variables of a Flax module.

    Args:
        tensors: by their Hugging Face names; those of heads that the module does not have are left alone.
        places: where each of them belongs.
        module: the module, called with token ids ``[tokens]``.
        prefix: what the names may or may not start with (``"bert."``).
        stack: how the names of the repeated layers start: one without a place means more layers than the settings say.

    Returns:
        ``{"params": ...}``, in the types of the tensors.

    Raises:
        WeightFileError: a tensor is missing, left over, misshapen or not made of real numbers; the message names it.
    """
    model = type(module).__name__
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1,), jnp.int32))
    expected = cast("dict[tuple[str, ...], jax.ShapeDtypeStruct]", flatten_dict(shapes["params"]))
    given = {name.removeprefix(prefix): (name, tensor) for name, tensor in tensors.items()}
    leaves: dict[tuple[str, ...], jax.Array] = {}
    for name, path, transpose in places:
        if name not in given:
            raise WeightFileError(f"The tensor {name!r} of {model} is missing.")
        full_name, tensor = given.pop(name)
        wanted = expected[path].shape
        wanted = wanted[::-1] if transpose else wanted
        if tensor.shape != wanted or not jnp.issubdtype(tensor.dtype, np.floating):
            raise WeightFileError(
                f"The tensor {full_name!r} has shape {tensor.shape} and type {tensor.dtype}; "
                f"{model} with these settings needs real numbers of shape {wanted}."
            )
        leaves[path] = jnp.asarray(tensor.T if transpose else tensor)
    left = [full_name for name, (full_name, _) in given.items() if name.startswith(stack)]
    left = [name for name in left if not name.endswith(_BUFFERS)]
    if left:
        raise WeightFileError(f"{model} with these settings has no place for the tensor {min(left)!r}.")
    assert leaves.keys() == expected.keys(), "a parameter without a tensor"
    return {"params": unflatten_dict(leaves)}


# Constants that old checkpoints store: causal masks and the frequencies of rotary positions.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
