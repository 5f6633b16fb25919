"""Convolutions of three taps with half of the multiplications, for users who ask for speed before the last digits.

A result ``y_i = Σ_j g_j d_{i+j}`` of a convolution of three taps takes three multiplications. Four side by side can
be had for six instead of twelve (Winograd, 1980; Lavin and Gray, 2016):

    y = A [(G g) · (B d)]    of six inputs d and three taps g,

where, with points ``a_0 ... a_4`` and one at infinity, and ``M(t) = Π_k (t - a_k)``,

    A_ik = a_k^i,    G_kj = a_k^j / Π_{l≠k} (a_k - a_l),    B_k = the coefficients of M(t) / (t - a_k),

and at infinity ``A_i = [i = 3]``, ``G_j = [j = 2]``, ``B`` = the coefficients of ``M(t)``. Here this is done along one
axis of places: a convolution becomes six, each of a quarter of the places and a third of the taps. Along two axes there
would be more values in between and larger errors.

**What is lost.** Each result is a difference of sums over all six inputs, so its error is relative to the largest of
them. A result that in truth is far smaller than its neighbours drowns in it, and one that is 0 may become a number of
either sign. So this is done only where nothing depends on such results: in the model behind relus, see
`support.coarse_convolutions`, and in rules as `LinearMap.coarsely` says.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-1, 2))
TAPS = 3
RESULTS = len(POINTS) + 2 - TAPS  # at once
# On a CPU fewer features or places take less time in full, and to save fewer multiplications is not worth it to compile
# six convolutions for one.
_FEATURES, _PLACES, _MULTIPLICATIONS = 64, 512, 2**30


def asked(precision: Any) -> bool:
    """Whether products need be no better than in TF32, as somebody said; where nobody did, precision is None."""
    return isinstance(precision, tuple) and {*precision} <= {lax.Precision.DEFAULT, lax.Precision.HIGH}


def pays(samples: int, places: Sequence[int], taps: Sequence[int], features: int, out: int) -> bool:
    """Whether it takes less time, on a CPU, for so many places of the output."""
    whole = RESULTS * -(-places[0] // RESULTS) <= 1.2 * places[0]  # of four results some may be of no use
    count = samples * math.prod(places)
    enough = count >= _PLACES and count * math.prod(taps) * features * out >= _MULTIPLICATIONS
    return whole and enough and min(features, out) >= _FEATURES


@functools.cache
def matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``A``, ``G`` and ``B``."""
    last = len(POINTS)  # infinity
    a, g, b = np.zeros((RESULTS, last + 1)), np.zeros((last + 1, TAPS)), np.zeros((last + 1, last + 1))
    for k, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        a[:, k] = [point**i for i in range(RESULTS)]
        g[k] = [point**j / math.prod(point - other for other in others) for j in range(TAPS)]
        b[k, :last] = np.poly([float(other) for other in others])[::-1]
    a[-1, last] = g[last, -1] = 1.0
    b[last] = np.poly([float(point) for point in POINTS])[::-1]
    return a, g, b


def convolve(x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]], **how: Any) -> jax.Array:
    """A convolution without strides whose first axis of places has three taps.

    Args:
        x: ``[samples, places, features]``.
        kernel: ``[taps, features, output features]``.
        padding: zeros around the places.
        how: for ``lax.conv_general_dilated``, whose layouts are the same.
    """
    a, g, b = matrices()
    (low, high), *others = padding
    size = x.shape[1] + low + high - (TAPS - 1)
    tiles = -(-size // RESULTS)
    x = _with_zeros(x, 0, -x.shape[1] % RESULTS)
    x, kernel = lax.optimization_barrier((x, kernel))  # or all that comes before is computed for each of the six
    whole = x.reshape(x.shape[0], x.shape[1] // RESULTS, RESULTS, *x.shape[2:])
    rows = []
    for row in range(-low, len(b) - low):  # of each tile; those before it and behind are its neighbours'
        neighbour, k = divmod(row, RESULTS)
        rows.append(_with_zeros(whole[:, :, k], -neighbour, tiles - whole.shape[1] + neighbour))
    taps, ones = list(kernel), [1] * len(padding)
    products = []
    for of_taps, of_rows in zip(g, b, strict=True):
        image, filters = _combined(of_rows, rows), _combined(of_taps, taps)[None]
        products.append(lax.conv_general_dilated(image, filters, ones, [(0, 0), *others], **how))
    # by broadcasting, which XLA fuses with what reads the results; a stack it would write first
    factors = a.T.astype(x.dtype).reshape(len(products), 1, 1, RESULTS, *[1] * (x.ndim - 2))
    y = functools.reduce(operator.add, [f * product[:, :, None] for f, product in zip(factors, products, strict=True)])
    return y.reshape(y.shape[0], tiles * RESULTS, *y.shape[3:])[:, :size]


def _with_zeros(x: jax.Array, before: int, behind: int) -> jax.Array:
    """Around the first axis of places; negative numbers cut off."""
    around = [(0, 0, 0), (before, behind, 0), *[(0, 0, 0)] * (x.ndim - 2)]
    return lax.pad(x, jnp.zeros((), x.dtype), around) if before or behind else x


def _combined(factors: np.ndarray, arrays: Sequence[jax.Array]) -> jax.Array:
    """``Σ factor · array``."""
    return functools.reduce(operator.add, [f * array for f, array in zip(factors.tolist(), arrays, strict=True) if f])
