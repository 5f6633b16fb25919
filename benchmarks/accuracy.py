"""How far relevance is from what it should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def in_double(function: Callable[..., Any], *args: Any) -> np.ndarray:
    """What a function computes in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(function)(*jax.tree.map(lambda a: np.asarray(a, np.float64), args)))


def largest(found: Any, true: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float(np.abs(np.asarray(found) - true).max() / np.abs(true).max())


def in_norm(found: Any, true: np.ndarray) -> float:
    """``‖found - true‖ / ‖true‖``."""
    return float(np.linalg.norm(np.asarray(found) - true) / np.linalg.norm(true))
