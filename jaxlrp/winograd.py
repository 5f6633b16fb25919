"""Convolutions of three by three taps with 16 multiplications for every 36.

Of results ``y_i = Σ_j g_j d_{i+j}`` of three taps each, two that lie side by side take six multiplications, or four
(Winograd, 1980; Lavin and Gray, 2016):

    y = A [(G g) · (B d)]    of four inputs d and three taps g.

Along two axes the matrices are Kronecker products of these with themselves: two by two results of four by four
inputs. Over places and features, what is left to multiply is 16 matrix products of a quarter of the places each, which
XLA takes in one.

**What is lost.** Every result is made of the inputs in its own window, as in the plain sum, and all factors are 0, ±1,
±1/2 and ±1/4. Errors are those of float32: in norm one to three times those of XLA's own convolution. But they are
relative to all inputs in the window times all taps, also where an input meets a tap that is 0. So a result that in
truth is tiny though its window is not drowns in them, and one that is 0 may become a number of either sign. This is
done only where nothing depends on such results: in the model behind relus, see `support.frugal_convolutions`, and in
rules as `LinearMap.frugally` says. An infinity makes NaN of all results in its tile.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

A = np.array([[1, 1, 1, 0], [0, 1, -1, 1]])
G = np.array([[-1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
B = np.array([[-1, 0, 1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]])
RESULTS, TAPS = 2, 3

# On a CPU fewer features take less time in full, and to save fewer multiplications is not worth what it takes to
# compile.
_FEATURES, _MULTIPLICATIONS = 128, 2**28


def allowed(precision: Any) -> bool:
    """Unless somebody asked for the highest precision."""
    return precision is None or (isinstance(precision, tuple) and lax.Precision.HIGHEST not in precision)


def pays(samples: int, places: Sequence[int], taps: Sequence[int], features: int, out: int) -> bool:
    """Whether it takes less time, on a CPU, for so many places of the output."""
    if list(taps) != [TAPS, TAPS] or min(features, out) < _FEATURES:
        return False
    if not all(isinstance(n, int) for n in (samples, *places)):  # not known before the program is exported
        return False
    whole = all(-(-n // RESULTS) * RESULTS <= 1.2 * n for n in places)  # of two results one may be of no use
    return whole and samples * math.prod(places) * math.prod(taps) * features * out >= _MULTIPLICATIONS


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    padding: Sequence[tuple[int, int]],
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """A convolution without strides.

    Args:
        x: ``[samples, rows, columns, features]``.
        kernel: ``[3, 3, features, output features]``.
        padding: zeros around rows and columns; negative numbers cut off.
        precision: of products, as everywhere in jax.
        preferred_element_type: likewise.
    """
    a, g, b = (np.kron(matrix, matrix).astype(x.dtype) for matrix in (A, G, B))
    sizes = [n + low + high - (TAPS - 1) for n, (low, high) in zip(x.shape[1:3], padding, strict=True)]
    tiles = [-(-size // RESULTS) for size in sizes]
    ends = [RESULTS * tile + TAPS - 1 for tile in tiles]
    around = [(low, end - low - n, 0) for n, end, (low, _) in zip(x.shape[1:3], ends, padding, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    x, kernel = lax.optimization_barrier((x, kernel))  # or all that comes before is computed for every input of a tile
    inputs = []
    for row, column in itertools.product(range(RESULTS + TAPS - 1), repeat=2):
        last = [first + RESULTS * (tile - 1) for first, tile in zip((row, column), tiles, strict=True)]
        inputs.append(x[None, :, row : last[0] + 1 : RESULTS, column : last[1] + 1 : RESULTS])
    columns = b.T.reshape(*b.T.shape, *[1] * x.ndim)
    # all in one operation: each takes time to compile
    images = functools.reduce(operator.add, [factor * image for factor, image in zip(columns, inputs, strict=True)])
    filters = _applied(g, kernel.reshape(-1, *kernel.shape[2:]))
    over_features = (((4,), (1,)), ((0,), (0,)))
    products = lax.dot_general(
        images, filters, over_features, precision=precision, preferred_element_type=preferred_element_type
    )
    y = _applied(a, products).reshape(RESULTS, RESULTS, *products.shape[1:]).transpose(2, 3, 0, 4, 1, 5)
    for axis, tile in zip((1, 2), tiles, strict=True):  # one after the other, or meshes with explicit axes refuse
        y = y.reshape(*y.shape[:axis], RESULTS * tile, *y.shape[axis + 2 :])
    return y[:, : sizes[0], : sizes[1]]


def _applied(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """To the first axis of ``x``."""
    return lax.dot_general(jnp.asarray(matrix), x, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
