"""Photos to explain: from a file, or from those that ship with scikit-image."""

from __future__ import annotations

import importlib.util
import os
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .heatmap import demo_extra

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485
"""Largest photo that `load_photo` decodes: 256 MiB of RGB, the size at which pillow warns."""

# Formats that photos come in. Pillow knows more, but some of those run other programs (EPS starts
# Ghostscript), which opening a picture from a stranger must not do. MPO is JPEG from some cameras.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")

_ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held

_SAMPLES = {
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "camera": "camera.png",
    "astronaut": "astronaut.png",
}


class PhotoError(ValueError):
    """A file that cannot be shown as a photo; the message names the file and what is wrong."""


def load_photo(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read a photo as a person would see it.

    The orientation that the camera noted (EXIF) is applied; grey, palette and CMYK become RGB;
    16 bits are scaled to 8; what is transparent is laid over white. Of an animation or a file of
    several pages the first is taken. Colour profiles are not applied.

    Args:
        path: a PNG, JPEG, WebP, AVIF, JPEG 2000, GIF, BMP, TIFF or PPM file; the content counts,
            not the ending of the name.

    Returns:
        `[H, W, 3]`, uint8, RGB, in memory of its own.

    Raises:
        PhotoError: if the file is missing, a folder, empty, no image, cut short, damaged, larger
            than `MAX_PIXELS`, of floating-point pixels, or may not be read.
        ModuleNotFoundError: if pillow is not installed.
    """
    with demo_extra("pillow"):
        from PIL import Image

    path = Path(path)
    _check_file(path)
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    # Damaged metadata makes pillow warn while the pixels are fine, which concerns nobody here.
    # A picture large enough to exhaust the memory is also but a warning, up to twice that size.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise PhotoError(f"{path}: {_too_large(image.size)}")
                image.load()
                return _upright_rgb(image)
        except PhotoError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise PhotoError(f"{path}: {_too_large()}") from error
        except Image.UnidentifiedImageError as error:
            raise PhotoError(
                f"{path}: not an image, or damaged from its first bytes on; the formats read are {', '.join(formats)}"
            ) from error
        except MemoryError as error:
            raise PhotoError(f"{path}: too large for the memory of this machine") from error
        except PermissionError as error:
            raise PhotoError(f"{path}: no permission to read it") from error
        except Exception as error:
            # Decoders meet damaged data with nearly any exception (OSError, SyntaxError,
            # ValueError, struct.error, zlib.error, ...): all of them mean the same to the caller.
            raise PhotoError(f"{path}: {_damage(error)}") from error


def sample_photos() -> dict[str, NDArray[np.uint8]]:
    """The photos that scikit-image carries in its own package; nothing is downloaded.

    Returns:
        Name to `[H, W, 3]`, uint8, RGB: chelsea (a cat, 300 x 451), coffee (400 x 600), rocket
        (427 x 640), camera (a man with a camera, grey, 512 x 512) and astronaut (512 x 512), as
        far as the installed release carries them, in this order.

    Raises:
        ModuleNotFoundError: if scikit-image or pillow is not installed.
        PhotoError: if the installed scikit-image carries none of them.
    """
    folder = _skimage_folder() / "data"
    # Reading the files beats skimage.data.chelsea(), which downloads what the package lacks.
    found = {name: folder / file for name, file in _SAMPLES.items() if (folder / file).is_file()}
    if not found:
        raise PhotoError(f"{folder}: this scikit-image carries none of {', '.join(_SAMPLES)}")
    return {name: load_photo(path) for name, path in found.items()}


def _skimage_folder() -> Path:
    """Where scikit-image is installed; it is not imported, which would take long."""
    with demo_extra("scikit-image"):
        spec = importlib.util.find_spec("skimage")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
    return Path(spec.submodule_search_locations[0])


def _check_file(path: Path) -> None:
    """Raise PhotoError for everything that is wrong with a path before it is opened."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise PhotoError(f"{path}: no such file") from error
    except PermissionError as error:
        raise PhotoError(f"{path}: no permission to read it") from error
    except (OSError, ValueError) as error:  # a loop of links, a name too long or with a NUL in it
        raise PhotoError(f"{path}: not a usable file name ({error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise PhotoError(f"{path}: this is a folder, not a photo")
    if not stat.S_ISREG(status.st_mode):  # a pipe or device could block or never end
        raise PhotoError(f"{path}: this is not a regular file")
    if status.st_size == 0:
        raise PhotoError(f"{path}: the file is empty")


def _too_large(size: tuple[int, int] | None = None) -> str:
    """What to say of a picture with too many pixels."""
    found = "" if size is None else f" ({size[0]} x {size[1]} pixels)"
    return f"too large{found}: at most {MAX_PIXELS:,} pixels are read; scale it down first"


def _damage(error: Exception) -> str:
    """What to say of a picture that a decoder gave up on."""
    detail = str(error) or type(error).__name__
    if isinstance(error, EOFError) or "truncated" in detail.lower():
        return f"the image is cut short, as by an interrupted copy ({detail})"
    return f"the image is damaged or of an unsupported kind ({detail})"


def _upright_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any decoded image as upright `[H, W, 3]` bytes; ValueError if its white is unknown."""
    from PIL import Image

    # EXIF 2 to 8, each as the turn or flip that undoes it; 1 is upright.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turn = undo.get(_orientation(image))

    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    return np.array(image if turn is None else image.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to refuse the pixels; viewers do the same
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits, as 8: 65535 becomes 255."""
    from PIL import Image

    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("pixels beyond 16 bits, whose white is unknown; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
