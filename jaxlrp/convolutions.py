"""Convolutions that take a detour where it beats what XLA does with jax's own: those of rules, and some of the model's.

**Strides.** jax transposes a convolution of stride ``s`` into one that spreads its input with ``s - 1`` zeros between
neighbours and multiplies them all. Write ``p = s q + φ`` for the places of the padded input and ``t = s m + φ`` for the
taps of the kernel: taps reach only places of their own phase ``φ``, so that

    x̄[s q + φ] = Σ_m w[s m + φ] · z̄[q - m]

is one ordinary convolution without zeros, whose output features are the phases of all input features. Where kernels are
not larger than the stride (patches, strided 1 × 1) there is one ``m``: a matrix product. Where the stride is 1 there is
one phase, and the kernel merely runs backwards; written out so, it keeps XLA's fast kernels inside of loops too.

**Depthwise.** Each feature has a kernel of its own, so nothing is contracted and the sum over ``m`` is one of shifted
elementwise products. XLA's convolutions on a CPU take many times as long as that.

**Few features.** Several inputs with a kernel each, summed, are one convolution of all their features; one output
handed back through several kernels is one to all their features. Images have 3, too few to fill the registers of a CPU:
`stack` says along which axes to put inputs and kernels together.

**Three by three taps.** `winograd` takes fewer multiplications for large ones. This alone is for the model's own
forward pass as well, behind relus.

**One place each.** A 1 × 1 kernel without strides or padding is a matrix product over the features. XLA's convolutions
of few places and many features take up to half as long again.

`benchmarks/convolutions.py` measures them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _compat, winograd

# Input features up to which phases beat zeros although they pad the kernel to a multiple of the stride, and up to which
# several inputs are run together.
_FEW = 8
_MOST = 64  # taps of a depthwise kernel: each is a few operations to compile


def forward(primitive: Any, params: Mapping[str, Any], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution of the model, as it is or with fewer multiplications."""
    convolution = Convolution(params, x.shape, kernel.shape)
    if convolution.saves:
        return convolution.apply_frugally(x, kernel)
    return _compat.bind(primitive, params, x, kernel)[0]


class Convolution:
    """A convolution's parameters and shapes, in one layout: samples first, features last.

    Where it ``applies`` or ``transposes`` better than jax, it says so. Kernels may have more input features than the
    layer has, where several are put together.

    Args:
        params: as of ``lax.conv_general_dilated_p``.
        image: shape of the input.
        kernel: shape of the weights.
    """

    def __init__(self, params: Mapping[str, Any], image: tuple[int, ...], kernel: tuple[int, ...]):
        numbers = params["dimension_numbers"]
        self.numbers = numbers
        self.strides: tuple[int, ...] = params["window_strides"]
        self.padding: Sequence[tuple[int, int]] = params["padding"]
        self.places = [image[axis] for axis in numbers.lhs_spec[2:]]
        self.features = image[numbers.lhs_spec[1]]
        self.taps = [kernel[axis] for axis in numbers.rhs_spec[2:]]
        self.phases = [min(k, s) for k, s in zip(self.taps, self.strides, strict=True)]
        self.steps = [-(-k // n) for k, n in zip(self.taps, self.phases, strict=True)]  # taps of each phase, at most
        self.how = {k: params[k] for k in ("precision", "preferred_element_type")}
        plain = params["batch_group_count"] == 1 and {*params["lhs_dilation"], *params["rhs_dilation"]} <= {1}
        groups = params["feature_group_count"]
        out = kernel[numbers.rhs_spec[0]]
        single = groups == self.features == out
        self.depthwise = plain and single and math.prod(self.taps) <= _MOST
        # Not all phases may have as many: zeros in front of the kernel or behind it. In front, if that lets the first
        # phase begin where x does, so that nothing need be cut off. (Depthwise kernels are not filled up.)
        room = [m * n - k for m, n, k in zip(self.steps, self.phases, self.taps, strict=True)]
        ahead = [0 if self.depthwise else -low % s for (low, _), s in zip(self.padding, self.strides, strict=True)]
        self.fill = [(a, r - a) if a <= r else (0, r) for a, r in zip(ahead, room, strict=True)]
        self.low = [low + a for (low, _), (a, _) in zip(self.padding, self.fill, strict=True)]
        ungrouped = plain and groups == 1
        few = self.features <= _FEW
        small = few or max(self.steps, default=1) == 1
        dense = max(self.strides, default=1) == 1
        self.transposes = self.depthwise or (ungrouped and (small or dense))
        stacks = ungrouped and few and not self.depthwise
        self.stack = (numbers.lhs_spec[1], numbers.rhs_spec[1]) if stacks else None
        pointwise = {*self.taps, *self.strides} <= {1} and not any(itertools.chain(*self.padding))
        self.applies = self.depthwise or (ungrouped and pointwise)
        sizes = [n + low + high - k + 1 for n, (low, high), k in zip(self.places, self.padding, self.taps, strict=True)]
        kept = params["preferred_element_type"] is None or np.dtype(params["preferred_element_type"]) == np.float32
        self.saves = (
            (ungrouped and dense and kept)
            and winograd.allowed(params["precision"])
            and winograd.pays(image[numbers.lhs_spec[0]], sizes, self.taps, self.features, out)
        )

    @property
    def rank(self) -> int:
        """How many axes a place has."""
        return len(self.places)

    def apply(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """The convolution, where ``applies``."""
        numbers = self.numbers
        if self.depthwise:
            return self._apply_depthwise(x, weight)
        kernel = self._kernel(weight)
        kernel = kernel.reshape(kernel.shape[-2:])
        last = (((self.rank + 1,), (0,)), ((), ()))
        return _first(lax.dot_general(_last(x, numbers.lhs_spec), kernel, last, **self.how), numbers.out_spec)

    def apply_frugally(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """The convolution with fewer multiplications, where it ``saves`` some."""
        z = self._convolve(_last(x, self.numbers.lhs_spec), self._kernel(weight), self.padding, frugally=True)
        return _first(z, self.numbers.out_spec)

    def _apply_depthwise(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """``z[o] = Σ_t w[t] x[s o + t]``."""
        numbers = self.numbers
        padded = _pad(_last(x, numbers.lhs_spec), self.padding)
        ends = [n - k for n, k in zip(padded.shape[1:], self.taps, strict=False)]
        sizes = [end // s + 1 for end, s in zip(ends, self.strides, strict=True)]
        return _first(_shifted(padded, self._by_tap(weight).items(), sizes, self.strides), numbers.out_spec)

    def transpose(self, weight: jax.Array, coming: jax.Array, frugally: bool = False) -> jax.Array:
        """``x̄[s q + φ] = Σ_m w[s m + φ] · z̄[q - m]``, where ``transposes``.

        Where it ``saves`` multiplications, with fewer if ``frugally``.
        """
        coming = _last(coming, self.numbers.out_spec)
        start = [0] * self.rank  # the first q
        if self.depthwise:
            spread = self._spread_depthwise(coming, weight)
        elif max(self.steps, default=1) == 1:
            kernel = self._kernel(weight)
            flat = kernel.reshape(-1, kernel.shape[-1])  # of more axes XLA would make a transposed copy first
            last = (((coming.ndim - 1,), (1,)), ((), ()))
            spread = lax.dot_general(coming, flat, last, **self.how).reshape(*coming.shape[:-1], *kernel.shape[:-1])
        else:
            spread, start = self._spread_by_phases(coming, self._kernel(weight), frugally)
        whole = self._interleaved(spread)
        cut = [low - s * q for low, s, q in zip(self.low, self.strides, start, strict=True)]
        crop = [(-low, n + low - size) for low, n, size in zip(cut, self.places, whole.shape[1:-1], strict=True)]
        return _first(_pad(whole, crop), self.numbers.lhs_spec)

    def _kernel(self, weight: jax.Array) -> jax.Array:
        """As ``[taps, in, out]``."""
        out, features, *taps = self.numbers.rhs_spec
        return weight.transpose(*taps, features, out)

    def _by_tap(self, weight: jax.Array) -> dict[tuple[int, ...], jax.Array]:
        """Of a depthwise layer: ``[1, features]`` for every tap."""
        taps = list(itertools.product(*map(range, self.taps)))
        return dict(zip(taps, lax.split(self._kernel(weight).reshape(len(taps), -1), [1] * len(taps)), strict=True))

    def _layout(self) -> lax.ConvDimensionNumbers:
        images = (0, self.rank + 1, *range(1, self.rank + 1))
        return lax.ConvDimensionNumbers(images, (self.rank + 1, self.rank, *range(self.rank)), images)

    def _by_phases(self, weight: jax.Array) -> jax.Array:
        """From ``[taps, in, out]`` to a kernel ``[steps, out, phases and in]`` that runs backwards."""
        rank, features, out = self.rank, *weight.shape[-2:]
        if max(self.phases, default=1) == 1:
            # all taps along one axis, or XLA gives one core two of three rows of them and the other core one
            kernel = jnp.flip(weight.reshape(-1, features, out), 0).transpose(0, 2, 1)
            return lax.optimization_barrier(kernel).reshape(*self.steps, out, features)
        split = [size for pair in zip(self.steps, self.phases, strict=True) for size in pair]
        kernel = jnp.pad(weight, [*self.fill, (0, 0), (0, 0)]).reshape(*split, features, out)
        steps, phases = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
        kernel = jnp.flip(kernel, steps).transpose(*steps, 2 * rank + 1, *phases, 2 * rank)
        return kernel.reshape(*self.steps, out, math.prod(self.phases) * features)

    def _spread_by_phases(self, coming: jax.Array, weight: jax.Array, frugally: bool) -> tuple[jax.Array, list[int]]:
        """For those ``q`` alone that nothing cuts off, and the first of them."""
        start = [low // s for low, s in zip(self.low, self.strides, strict=True)]
        end = [(n + low - 1) // s + 1 for n, low, s in zip(self.places, self.low, self.strides, strict=True)]
        sides = zip(start, end, self.steps, coming.shape[1:-1], strict=True)
        coming, around = _with_room(coming, [(m - 1 - a, b - n) for a, b, m, n in sides], self.steps)
        spread = self._convolve(coming, self._by_phases(weight), around, frugally)
        if frugally:  # or it is put together once for each reader
            spread = lax.optimization_barrier(spread)
        return spread.reshape(*spread.shape[:-1], *self.phases, weight.shape[-2]), start

    def _convolve(
        self, x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]], frugally: bool
    ) -> jax.Array:
        """Without strides; samples first, features last."""
        how = {"dimension_numbers": self._layout(), **self.how}
        full = lambda x, w: lax.conv_general_dilated(x, w, [1] * self.rank, padding, **how)  # noqa: E731
        if not frugally or x.dtype != jnp.float32:
            return full(x, kernel)
        few = lambda x, w: winograd.convolve(x, w, padding, **self.how)  # noqa: E731
        return lax.platform_dependent(x, kernel, cpu=few, default=full)

    def _spread_depthwise(self, coming: jax.Array, weight: jax.Array) -> jax.Array:
        padded, by_tap = _pad(coming, [(m - 1, m - 1) for m in self.steps]), self._by_tap(weight)
        sizes = [n + m - 1 for n, m in zip(coming.shape[1:], self.steps, strict=False)]
        of_phase = []
        for phase in itertools.product(*map(range, self.phases)):
            taps = (range(a, k, s) for a, k, s in zip(phase, self.taps, self.strides, strict=True))
            pairs = (enumerate(t) for t in taps)
            shifts = []
            for along in itertools.product(*pairs):
                offset = tuple(last - 1 - m for last, (m, _) in zip(self.steps, along, strict=True))
                shifts.append((offset, by_tap[tuple(tap for _, tap in along)]))
            of_phase.append(_shifted(padded, shifts, sizes, [1] * self.rank))
        stacked = jnp.stack(of_phase, axis=-2)
        return stacked.reshape(*stacked.shape[:-2], *self.phases, self.features)

    def _interleaved(self, spread: jax.Array) -> jax.Array:
        """From ``[samples, q, φ, features]`` to ``[samples, s q + φ, features]``."""
        rank = self.rank
        samples, *places = spread.shape[: rank + 1]
        if max(self.strides, default=1) == 1:
            return spread.reshape(samples, *places, spread.shape[-1])
        unreached = [(0, s - n) for n, s in zip(self.phases, self.strides, strict=True)]
        spread = jnp.pad(spread, [*[(0, 0)] * (rank + 1), *unreached, (0, 0)])
        order = [axis for d in range(rank) for axis in (1 + d, 1 + rank + d)]
        spread = spread.transpose(0, *order, 2 * rank + 1)
        return spread.reshape(samples, *(q * s for q, s in zip(places, self.strides, strict=True)), spread.shape[-1])


def _last(x: jax.Array, spec: Sequence[int]) -> jax.Array:
    """Samples first, features last; ``spec`` is where they are."""
    samples, features, *places = spec
    return x.transpose(samples, *places, features)


def _first(x: jax.Array, spec: Sequence[int]) -> jax.Array:
    """The inverse of `_last`."""
    samples, features, *places = spec
    here = {axis: i for i, axis in enumerate((samples, *places, features))}
    return x.transpose([here[axis] for axis in range(x.ndim)])


def _pad(x: jax.Array, around: Sequence[tuple[int, int]]) -> jax.Array:
    """Zeros around the places; negative numbers cut off."""
    if not any(itertools.chain(*around)):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in around), (0, 0, 0)])


def _with_room(
    x: jax.Array, around: Sequence[tuple[int, int]], taps: Sequence[int]
) -> tuple[jax.Array, list[tuple[int, int]]]:
    """Padding of a convolution split in two: zeros around ``x``, and what is left to the convolution.

    XLA's fast convolution on a CPU takes no more padding than leaves the size as it is, ``taps - 1``.
    """
    more = [max(low + high - (m - 1), 0) for (low, high), m in zip(around, taps, strict=True)]
    if any(more):  # a barrier, or XLA puts the two together again
        x = lax.optimization_barrier(_pad(x, [(0, n) for n in more]))
    return x, [(low, high - n) for (low, high), n in zip(around, more, strict=True)]


def _shifted(
    x: jax.Array,
    shifts: Iterable[tuple[tuple[int, ...], jax.Array]],
    sizes: Sequence[int],
    strides: Sequence[int],
) -> jax.Array:
    """``Σ w x[offset + stride · place]`` over pairs of offset and ``w [1, features]``, for ``sizes`` places."""
    x = lax.optimization_barrier(x)  # XLA would compute all that comes before once for every shift
    shape = (x.shape[0], *sizes, x.shape[-1])
    terms = []  # in as few operations as can be: there are many, and each takes time to trace, lower and compile
    for offset, weight in shifts:
        end = [a + (n - 1) * s + 1 for a, n, s in zip(offset, sizes, strides, strict=True)]
        part = lax.slice(x, (0, *offset, 0), (x.shape[0], *end, x.shape[-1]), (1, *strides, 1))
        terms.append(lax.mul(part, lax.broadcast_in_dim(weight, shape, (0, len(shape) - 1))))
    return functools.reduce(lax.add, terms)
