"""From signed relevance to pictures, with numpy and pillow alone.

Each function is one step, and the steps follow each other in this order::

    relevance [H, W, C]  --pool_channels-->  [H, W]
                         --normalise----->   [H, W] in [-1, 1], 0 stays 0
                         --upscale------->   the size of the photo (hidden layers only)
                         --diverging----->   uint8 [H, W, 3], a colour for every value
                    or   --overlay------->   uint8 [H, W, 3], the same over the grey photo
                         --save_png------>   a file

The sign is the message of a relevance map, so nothing here may move its zero: scaling is symmetric
about 0, and a relevance of 0 always gets exactly the neutral colour.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Each arm runs from the neutral colour outwards in equal steps. The two arms of a map have the
# same CIE lightness at every step (to within 4 of 100), and it changes in one direction only:
# equal amounts for and against then look equally strong, in greyscale print too.
_ARMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name: (neutral to negative, neutral to positive)
    "bwr": (
        ("#FFFFFF", "#BAD0F4", "#76A0E8", "#3068D8", "#143CB4"),
        ("#FFFFFF", "#F8C4B6", "#EC7F66", "#D2362C", "#A00C1E"),
    ),
    "seismic": (
        ("#FFFFFF", "#A9C2F0", "#557CDB", "#2342B0", "#0C1A5C"),
        ("#FFFFFF", "#F4B3A2", "#DA5640", "#9C1B22", "#560812"),
    ),
    "coldnhot": (
        ("#000000", "#14299F", "#2F66F7", "#35B4FF", "#C2F8FF"),
        ("#000000", "#7E0C20", "#DE2826", "#FF921E", "#FFF08C"),
    ),
}

COLOUR_MAPS: tuple[str, ...] = tuple(_ARMS)
"""Names that `diverging` and `overlay` know; the first is their default."""

_STEPS = 255  # table entries on either side of the neutral one
_ROUNDING = 1e-6  # how far outside [-1, 1] float32 arithmetic may leave a scaled map


def pool_channels(relevance: ArrayLike) -> NDArray[np.float64]:
    """Sum relevance over the colour channels, so that the total is conserved.

    Args:
        relevance: `[H, W, C]` or `[H, W]`, any real dtype, finite.

    Returns:
        `[H, W]`, float64; a copy where there was no channel axis.

    Raises:
        ValueError: for another number of axes, an empty array, complex numbers, NaN or infinity.
    """
    values = _finite(relevance, "relevance")
    if values.ndim not in (2, 3):
        raise ValueError(
            f"relevance must be one image, [H, W, C] or [H, W], but its shape is {values.shape}; "
            "take one image out of a batch first, as in relevance[0]"
        )
    return values.sum(axis=-1) if values.ndim == 3 else values.copy()


def limit_of(relevance: ArrayLike, percentile: float | None = None) -> float:
    """The |relevance| that `normalise` gives full colour when no limit is named.

    To compare several maps on one scale, pass `max(limit_of(m) for m in maps)` to each of them.

    Args:
        relevance: `[H, W]`, finite.
        percentile: in (0, 100]; the limit is this percentile of |relevance|, so that a few extreme
            pixels do not leave the rest pale. None takes the largest. Where the percentile itself
            is 0 (a sparse map), the largest is taken as well, rather than dividing by 0.

    Returns:
        A number >= 0; it is 0 only for a map that is 0 everywhere.

    Raises:
        ValueError: for a map that is not finite and `[H, W]`, or a percentile outside (0, 100].
    """
    size = np.abs(_plane(relevance, "relevance"))
    if percentile is None:
        return float(size.max())
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, not {percentile}")
    return float(np.percentile(size, percentile)) or float(size.max())


def normalise(
    relevance: ArrayLike, limit: float | None = None, *, percentile: float | None = None
) -> NDArray[np.float64]:
    """Scale a map to [-1, 1] by one positive factor: signs stay, and 0 stays exactly 0.

    Args:
        relevance: `[H, W]`, finite.
        limit: the |relevance| that becomes 1; larger values are clipped. None takes `limit_of`.
        percentile: see `limit_of`; only without `limit`.

    Returns:
        `[H, W]`, float64, in [-1, 1]. A map that is 0 everywhere stays 0.

    Raises:
        ValueError: for a map that is not finite and `[H, W]`, for a limit that is not positive and
            finite, or when both `limit` and `percentile` are given.
    """
    values = _plane(relevance, "relevance")
    if limit is None:
        limit = limit_of(values, percentile)
        if limit == 0:
            return np.zeros_like(values)
    elif percentile is not None:
        raise ValueError("give either limit or percentile, not both")
    elif not (limit > 0 and np.isfinite(limit)):
        raise ValueError(f"limit must be a positive, finite number, not {limit}")
    # Clipping comes before dividing, which could overflow; adding 0 turns -0.0 into 0.0.
    return np.clip(values, -limit, limit) / limit + 0.0


def box_smooth(relevance: ArrayLike, radius: int = 1) -> NDArray[np.float64]:
    """Replace each value by the mean of the square around it. For display only.

    Smoothing makes the speckle of a pixel-wise map readable from a distance. It moves relevance
    between pixels, so never compute a score or a sum from the result.

    Args:
        relevance: `[H, W]`, finite.
        radius: the square has `2 * radius + 1` pixels a side and is cut off at the edges of the
            map; 0 changes nothing.

    Returns:
        `[H, W]`, float64, within the range of the input.

    Raises:
        ValueError: for a map that is not finite and `[H, W]`, or a negative radius.
    """
    values = _plane(relevance, "relevance")
    if radius < 0:
        raise ValueError(f"radius must be 0 or more, not {radius}")
    bounds = values.min(), values.max()
    for axis in (0, 1):
        values = _window_mean(values, radius, axis)
    return np.clip(values, *bounds)


def upscale(
    heat: ArrayLike, size: tuple[int, int], method: Literal["linear", "nearest"] = "linear"
) -> NDArray[np.float64]:
    """Enlarge the small map of a hidden layer to the size of the photo.

    Args:
        heat: `[h, w]`, finite.
        size: `(H, W)`, at least `(h, w)`; for a photo this is `photo.shape[:2]`.
        method: "linear" blends neighbours; "nearest" shows the cells of the layer as they are.

    Returns:
        `[H, W]`, float64, within the range of the input.

    Raises:
        ValueError: for a map that is not finite and `[h, w]`, a size that is too small, or an
            unknown method.
    """
    values = _plane(heat, "heat")
    if size[0] < values.shape[0] or size[1] < values.shape[1]:
        raise ValueError(f"cannot upscale a map of shape {values.shape} to the smaller {size}")
    if method not in ("linear", "nearest"):
        raise ValueError(f'method must be "linear" or "nearest", not {method!r}')
    bounds = values.min(), values.max()
    for axis, length in enumerate(size):
        values = _stretch(values, length, axis, blend=method == "linear")
    return np.clip(values, *bounds)


def diverging(heat: ArrayLike, cmap: str = COLOUR_MAPS[0]) -> NDArray[np.uint8]:
    """Colour a map: red for positive, blue for negative, a neutral colour at exactly 0.

    Args:
        heat: `[H, W]` in [-1, 1], as `normalise` returns it.
        cmap: "bwr" (white centre), "seismic" (white centre, darker ends) or "coldnhot" (black
            centre, ends in light cyan and light yellow); see `COLOUR_MAPS`.

    Returns:
        `[H, W, 3]`, uint8, RGB.

    Raises:
        ValueError: for a map that is not finite, `[H, W]` and in [-1, 1], or an unknown `cmap`.
    """
    # rint rounds halves to even, hence alike on both sides of 0: the two arms stay symmetric.
    index = np.rint(_scaled(heat) * _STEPS).astype(np.intp) + _STEPS
    return _table(cmap)[index]


def overlay(photo: ArrayLike, heat: ArrayLike, alpha: float = 0.9, cmap: str = COLOUR_MAPS[0]) -> NDArray[np.uint8]:
    """Lay a map over a grey version of its photo, so that one sees what it lies on.

    The photo loses its colours, which would mix with those of the map, and is faded half-way to
    the neutral colour. Opacity carries the amount of relevance and the colour its sign: where
    there is none, only grey is left.

    Args:
        photo: `[H, W, 3]`, uint8, RGB.
        heat: `[H, W]` in [-1, 1]; see `upscale` for maps of another size.
        alpha: opacity where |heat| is 1, in [0, 1]; it falls linearly to 0 with |heat|.
        cmap: a name in `COLOUR_MAPS`.

    Returns:
        `[H, W, 3]`, uint8, RGB.

    Raises:
        ValueError: if photo or map is not as described, their sizes differ, alpha lies outside
            [0, 1], or `cmap` is unknown.
    """
    picture = as_rgb(photo, "photo")
    values = _scaled(heat)
    if values.shape != picture.shape[:2]:
        raise ValueError(
            f"the map has shape {values.shape} but the photo {picture.shape[:2]}; "
            "bring the map to the photo's size with upscale(heat, photo.shape[:2])"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, not {alpha}")
    table = _table(cmap).astype(np.float64)

    luma = picture @ np.array([0.299, 0.587, 0.114])
    grey = ((luma + table[_STEPS, 0]) / 2)[..., np.newaxis]  # the neutral colours are all greys
    # Only the outer half of each arm is used: faint relevance is then little of a clear colour,
    # not little of a pale one, which would be lost on the photo.
    strength = np.abs(values)
    index = np.rint(np.sign(values) * (1 + strength) / 2 * _STEPS).astype(np.intp) + _STEPS
    opacity = (alpha * strength)[..., np.newaxis]
    return np.rint(grey + opacity * (table[index] - grey)).astype(np.uint8)


def save_png(path: str | os.PathLike[str], rgb: ArrayLike) -> None:
    """Write a picture as PNG; the file appears complete or not at all.

    An existing file is replaced in one step, and stays as it was if anything goes wrong.

    Args:
        path: where to write; must end in `.png`, in a folder that exists.
        rgb: `[H, W, 3]`, uint8.

    Raises:
        ValueError: if the name does not end in `.png` or the picture is not as described.
        FileNotFoundError: if the folder does not exist.
        OSError: if writing fails, as on a full disk.
        ModuleNotFoundError: if pillow is not installed.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"{target}: save_png writes PNG, so the name must end in .png")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.parent} does not exist")
    picture = as_rgb(rgb, "picture")
    with demo_extra("pillow"):
        from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, format="PNG")
    # The temporary file must share the folder: os.replace is atomic on one file system only. It
    # is opened by name, not made by tempfile, which would leave the picture private to its owner.
    temporary = target.parent / f".jaxlrp-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(encoded.getbuffer())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def as_rgb(array: ArrayLike, what: str) -> NDArray[np.uint8]:
    """Check that a picture is contiguous bytes in RGB, and make it so where only the order differs.

    Args:
        array: the picture.
        what: how to call it in the error.

    Returns:
        `[H, W, 3]`, uint8, not empty.

    Raises:
        ValueError: for another dtype or shape.
    """
    picture = np.asarray(array)
    if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise ValueError(f"{what} must be uint8 of shape [H, W, 3], but it is {picture.dtype} of shape {picture.shape}")
    return np.ascontiguousarray(picture)


@contextmanager
def demo_extra(package: str) -> Iterator[None]:
    """Turn a failed import into advice, for what only the `demo` extra installs.

    Used as `with demo_extra("pillow"): from PIL import Image`.

    Args:
        package: the name to report, as pip knows it.

    Raises:
        ModuleNotFoundError: when the import inside fails for want of a module.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"jaxlrp.plot needs {package} for this, which is not installed: pip install 'jaxlrp[demo]'",
            name=error.name,
        ) from error


@cache
def _table(cmap: str) -> NDArray[np.uint8]:
    """The colours of a map, `[2 * _STEPS + 1, 3]`; the neutral one stands exactly in the middle."""
    if cmap not in _ARMS:
        raise ValueError(f"unknown colour map {cmap!r}; known are {', '.join(COLOUR_MAPS)}")
    negative, positive = (_arm(colours) for colours in _ARMS[cmap])
    table = np.concatenate([negative[:0:-1], positive])
    table.flags.writeable = False  # it is cached and shared
    return table


def _arm(colours: tuple[str, ...]) -> NDArray[np.uint8]:
    """Interpolate evenly spaced hex colours, neutral first, to `[_STEPS + 1, 3]`."""
    rgb = np.array([list(bytes.fromhex(colour[1:])) for colour in colours])
    knots = np.linspace(0, _STEPS, len(rgb))
    channels = [np.interp(np.arange(_STEPS + 1), knots, channel) for channel in rgb.T]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _window_mean(values: NDArray[np.float64], radius: int, axis: int) -> NDArray[np.float64]:
    """Mean over the window of `radius` entries either way along one axis, cut off at the ends."""
    length = values.shape[axis]
    radius = min(radius, length - 1)  # a wider window holds nothing more
    pad = [(radius, radius) if a == axis else (0, 0) for a in range(values.ndim)]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, pad), 2 * radius + 1, axis=axis)
    place = np.arange(length)
    count = np.minimum(place, radius) + np.minimum(place[::-1], radius) + 1
    return windows.sum(axis=-1) / np.expand_dims(count, 1 - axis)


def _stretch(values: NDArray[np.float64], length: int, axis: int, *, blend: bool) -> NDArray[np.float64]:
    """Resample one axis to `length`, cells taken at their centres and held beyond the outermost."""
    cells = values.shape[axis]
    centre = (np.arange(length) + 0.5) * cells / length  # in cells of the input, from its edge
    if not blend:
        return np.take(values, centre.astype(np.intp), axis=axis)
    place = np.clip(centre - 0.5, 0, cells - 1)
    lower = place.astype(np.intp)
    upper = np.minimum(lower + 1, cells - 1)
    weight = np.expand_dims(place - lower, 1 - axis)
    below, above = np.take(values, lower, axis=axis), np.take(values, upper, axis=axis)
    return below * (1 - weight) + above * weight


def _finite(array: ArrayLike, what: str) -> NDArray[np.float64]:
    """A float64 view or copy of a non-empty array of finite real numbers."""
    values = np.asarray(array)
    if np.iscomplexobj(values):
        raise ValueError(f"{what} must be real, but its dtype is {values.dtype}")
    values = values.astype(np.float64, copy=False)
    if values.size == 0:
        raise ValueError(f"{what} is empty: its shape is {values.shape}")
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise ValueError(
            f"{what} has {bad} of {values.size} values that are NaN or infinite, and no colour can stand for those"
        )
    return values


def _plane(array: ArrayLike, what: str) -> NDArray[np.float64]:
    """A finite `[H, W]` map."""
    values = _finite(array, what)
    if values.ndim != 2:
        raise ValueError(
            f"{what} must be [H, W], but its shape is {values.shape}; pool_channels sums [H, W, C] over its channels"
        )
    return values


def _scaled(heat: ArrayLike) -> NDArray[np.float64]:
    """A finite `[H, W]` map in [-1, 1]."""
    values = _plane(heat, "heat")
    largest = np.abs(values).max()
    if largest > 1 + _ROUNDING:
        raise ValueError(
            f"heat must lie in [-1, 1], but its largest size is {largest:.6g}; scale it with normalise first"
        )
    return np.clip(values, -1, 1)
