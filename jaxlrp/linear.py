"""Linear layers: what belongs to one, and how it is taken apart into inputs, weights and bias.

Every linear layer, dense, convolution, average pool, residual sum or a lone BatchNorm, becomes a `LinearMap`

    z = f(x, w) + b,    f bilinear in x and w,

so that each rule is written once, in terms of ``f`` with other inputs or weights (``f(x, w⁺)``, ``f(1, w²)``, ...).
A constant per-channel scale behind the operation (BatchNorm in inference) is multiplied into ``w``, a constant shift is
added to ``b``. Weightless sums have ``w`` equal to their constant factor: 1, or 1/n for a mean.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _compat
from . import _primitives as P
from .bilinear import Apply, Arrays, Bilinear, Transpose, bilinear, elementwise
from .graph import Equation, Program, Value, read, wide_dtype, widen


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A linear layer at the numbers of one forward pass: ``z = f(x, w) + b``.

    Attributes:
        inputs: ``x``, one array per operand (two for a residual sum).
        weights: ``w``; only its signs and sizes matter to rules, its layout is the operation's own.
        bias: ``b``, broadcastable to the output, or None.
        output: ``z`` as the model computed it.
        apply: ``f(x, w)``.
        transpose: ``(w, s) -> fᵀ``: what ``f(·, w)``, transposed, hands back to every input.
        features: the axes of the output over which one sample's ``z`` is spread (for stabilisers relative to its rms).
        exact: whether ``output`` is ``f(x, w) + b``; not so once a rule has replaced inputs or weights.
        nonnegative: whether the inputs are known never to be negative (they come out of a relu, a softmax, ...).
        positive: whether relevance is known to come only where the output is positive (a relu alone reads it).
        stand_in: ``output`` as it is wherever relevance comes, made of what others read too (behind a relu
            ``max(z, 0)``); or None.
        stack: the axes along which several ``x`` and ``w`` may be put together, where that is faster; or None.
        product: whether ``f`` is run as a convolution or matrix product, not as something that is fused with others.
        rows: of such a product that is not transposed by jax, how many numbers every weight is multiplied with; else 0.
        frugal: ``apply`` and ``transpose`` with fewer multiplications, where that is faster and allowed; or None.
    """

    inputs: Arrays
    weights: Arrays
    bias: jax.Array | None
    output: jax.Array
    apply: Apply
    transpose: Transpose
    features: tuple[int, ...]
    nonnegative: bool = False
    positive: bool = False
    stand_in: jax.Array | None = None
    stack: tuple[int, int] | None = None
    product: bool = False
    rows: int = 0
    frugal: tuple[Apply, Transpose] | None = None
    exact: bool = True

    def frugally(self) -> LinearMap:
        """With fewer multiplications, where that is faster and allowed.

        Errors are then relative to all that a filter sees, not to the result. As denominators and for what is handed
        back such results will do where the denominator is known to be at least as large as ``z``: relevance of which
        ``c`` came down per unit of ``z`` is then handed back as at most ``c`` per unit of contributions.
        """
        if self.frugal is None:
            return self
        apply, transpose = self.frugal
        return dataclasses.replace(self, apply=apply, transpose=transpose, frugal=None)

    def apply_all(self, parts: Sequence[tuple[Arrays, Arrays]]) -> jax.Array:
        """``Σ f(x, w)`` over pairs of inputs and weights."""
        if self.stack is None or len(parts) == 1:
            return functools.reduce(operator.add, [self.apply(x, w) for x, w in parts])
        of_x, of_w = self.stack
        x = jnp.concatenate([x for (x,), _ in parts], of_x)
        w = jnp.concatenate([w for _, (w,) in parts], of_w)
        return self.apply((x,), (w,))

    def transpose_all(self, weights: Sequence[Arrays], s: jax.Array) -> list[Arrays]:
        """``fᵀ`` of one ``s`` with each of several weights."""
        return transpose_all(self.transpose, self.stack, weights, s)


def transpose_all(
    transpose: Transpose, stack: tuple[int, int] | None, weights: Sequence[Arrays], s: jax.Array
) -> list[Arrays]:
    """What `LinearMap.transpose_all` does, for those who must not hold its numbers."""
    if stack is None or len(weights) == 1:
        return [transpose(w, s) for w in weights]
    of_x, of_w = stack
    (back,) = transpose((jnp.concatenate([w for (w,) in weights], of_w),), s)
    return [(part,) for part in jnp.split(back, len(weights), of_x)]


class OneChannel(NamedTuple):
    """A convolution of one feature whose weights are 1."""

    apply: Callable[[jax.Array], jax.Array]
    shape: tuple[int, ...]  # of its input
    batch: int  # axis of the samples
    feature_in: int  # axis of the features in the input
    feature_out: int  # and in the output
    channels: int  # features of the layer's own input


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSpec:
    """The static part of a linear layer: its operation and the constant scales and shifts behind it.

    ``core`` is None for a layer that consists of scales and shifts alone.
    """

    core: Equation | None
    tail: tuple[Equation, ...]
    inputs: tuple[Value, ...]
    output: Value

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution, whose transpose makes a kernel of its own."""
        return self.core is not None and self.core.primitive in P.CONV

    def bind(
        self,
        env: Mapping[Value, Any],
        nonnegative: bool = False,
        positive: bool = False,
        stand_in: jax.Array | None = None,
    ) -> LinearMap:
        """Take the layer apart at the values of one forward pass, in at least 32 bits."""
        inputs = tuple(widen(read(env, v)) for v in self.inputs)
        output = widen(read(env, self.output))
        scale, shift = self._tail(env)
        if self.core is None:
            core = Bilinear((scale,), elementwise(output.shape))
            weights, apply = core.weights, core.apply
        else:
            core = bilinear(self.core, env)
            if core.constant is not None:
                shift = core.constant * scale + shift
            weights = tuple(_scaled(self.core, w, scale) for w in core.weights)
            apply = self._with_tail(core.apply, output.dtype)

        def jaxs_own(w: Arrays, s: jax.Array) -> Arrays:
            return jax.vjp(lambda x: apply(x, w), inputs)[1](s)[0]

        def tailed(transpose: Transpose) -> Transpose:
            return lambda w, s: transpose(w, self._before_tail(s))

        frugal = None
        if core.frugal is not None:
            frugal = self._with_tail(core.frugal[0], output.dtype), tailed(core.frugal[1])
        bias = None if isinstance(shift, float) else widen(jnp.asarray(shift))
        features = _features(self.core, self.tail, output.ndim)
        return LinearMap(
            inputs=inputs,
            weights=weights,
            bias=bias,
            output=output,
            apply=apply,
            transpose=jaxs_own if core.transpose is None else tailed(core.transpose),
            features=features,
            nonnegative=nonnegative,
            positive=positive,
            stand_in=stand_in,
            stack=core.stack,
            product=core.product,
            rows=core.rows if core.product and core.transpose is not None else 0,
            frugal=frugal,
        )

    def one_channel(self) -> OneChannel | None:
        """The layer with one input and one output feature, all weights 1; None where features cannot be told apart.

        With all weights equal, a convolution of many channels is that of their sum.
        """
        core = self.core
        if core is None or core.primitive not in P.CONV or core.inputs[1].depends:
            return None
        params = dict(core.params)
        moved = any(e.primitive in P.RESHAPE for e in self.tail)
        if moved or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            return None
        numbers = params["dimension_numbers"]
        x, w = (list(v.shape) for v in core.inputs)
        channels, feature_in, feature_out = x[numbers.lhs_spec[1]], numbers.lhs_spec[1], numbers.out_spec[1]
        x[feature_in] = w[numbers.rhs_spec[0]] = w[numbers.rhs_spec[1]] = 1
        if params.get("preferred_element_type") is not None:
            params["preferred_element_type"] = np.dtype(wide_dtype(self.output.dtype))
        dtype = wide_dtype(self.output.dtype)
        apply = lambda x: _compat.bind(core.primitive, params, x, jnp.ones_like(x, dtype, w))[0]  # noqa: E731
        return OneChannel(apply, tuple(x), numbers.lhs_spec[0], feature_in, feature_out, channels)

    def _tail(self, env: Mapping[Value, Any]) -> tuple[Any, Any]:
        """The tail as ``z -> scale * z + shift``: ``scale`` fits the core's output, ``shift`` the layer's."""
        scale: Any = 1.0
        shift: Any = 0.0
        for eqn in self.tail:
            prim = eqn.primitive
            if prim in P.RESHAPE:
                shift = shift if isinstance(shift, float) else _moved(eqn, shift)
                continue
            if prim in P.CAST:
                continue
            if prim in P.NEG:
                scale, shift = -scale, -shift
                continue
            constant = widen(read(env, next(v for v in eqn.inputs if not v.depends)))
            if prim in P.ADD:
                shift = shift + constant
            elif prim in P.SUB:
                if eqn.inputs[0].depends:
                    shift = shift - constant
                else:
                    scale, shift = -scale, constant - shift
            else:
                factor = 1.0 / constant if prim in P.DIV else constant
                aligned = factor if self.core is None else _align(self.core, self.tail, eqn, factor)
                scale, shift = scale * aligned, shift * factor
        return jnp.asarray(scale), shift

    def _with_tail(self, apply: Apply, dtype: Any) -> Apply:
        moves = [e for e in self.tail if e.primitive in P.RESHAPE]

        def moved(x: Arrays, w: Arrays) -> jax.Array:
            z = apply(x, w)
            for eqn in moves:
                (z,) = _compat.bind(eqn.primitive, eqn.params, z)
            return z.astype(dtype)  # the tail may cast to more bits

        return moved

    def _before_tail(self, s: jax.Array) -> jax.Array:
        """From the layer's output back to that of its core: through the reshapes in between."""
        for eqn in reversed(self.tail):
            if eqn.primitive in P.RESHAPE:
                before = jax.ShapeDtypeStruct(eqn.inputs[0].shape, s.dtype)
                (s,) = jax.linear_transpose(lambda x, e=eqn: _compat.bind(e.primitive, e.params, x)[0], before)(s)
        return s


# -- what a linear layer absorbs ----------------------------------------------------------------------------------


def absorb_tail(program: Program, core: Equation) -> LinearSpec:
    """Follow the only reader of a linear operation's output as long as it scales, shifts or reshapes it by constants.

    A scale is taken in if it can be multiplied into the weights: it may vary over the output features of a convolution
    or matrix product only. A shift by a number written in the code belongs to an activation (``relu6(z + 3)``) and
    ends the layer; so does a weightless sum's shift, which is no bias of its own.
    """
    inputs = tuple(v for v in core.dependent if v.carries)
    value, tail = core.outputs[0], []
    weighted = core.primitive in P.DOT or core.primitive in P.CONV
    multi = len(inputs) > 1 or core.primitive in P.ADD or core.primitive in P.SUB
    while not multi and value not in program.outputs:
        readers = program.consumers.get(value, [])
        if len(readers) != 1 or not _absorbs(program, core, tail, readers[0], weighted):
            break
        tail.append(readers[0])
        value = readers[0].outputs[0]
    while tail and tail[-1].primitive in P.RESHAPE:  # a trailing reshape is nothing of the layer's own
        tail.pop()
    return LinearSpec(core, tuple(tail), inputs, tail[-1].outputs[0] if tail else core.outputs[0])


def _absorbs(program: Program, core: Equation, tail: Sequence[Equation], eqn: Equation, weighted: bool) -> bool:
    prim = eqn.primitive
    value = tail[-1].outputs[0] if tail else core.outputs[0]
    out, *others = eqn.outputs
    if others or not out.carries:  # a cast to integers is not linear
        return False
    if prim in P.CAST or prim in P.NEG:
        return True
    if prim in P.RESHAPE:
        if weighted:
            return prim not in P.BROADCAST
        return math.prod(eqn.outputs[0].shape) == math.prod(value.shape)  # keepdims
    if prim not in P.ADD | P.SUB | P.MUL | P.DIV or sum(v.depends for v in eqn.inputs) != 1:
        return False
    if eqn.outputs[0].shape != value.shape:
        return False
    constant = next(v for v in eqn.inputs if not v.depends)
    if constant.random:
        return False
    if prim in P.MUL or (prim in P.DIV and eqn.inputs[0] is value):
        axes = _varying(program, constant)
        if not weighted:
            return not axes or not any(e.primitive in P.RESHAPE for e in tail)
        back = _axes_in_core(core, [*tail, eqn], axes)
        return back is not None and back <= _weight_axes(core)
    return weighted and (prim in P.ADD or prim in P.SUB) and not constant.literal


def _varying(program: Program, value: Value) -> frozenset[int]:
    """Axes along which a constant may take different values."""
    axes = frozenset(i for i, n in enumerate(value.shape) if n > 1)
    eqn = program.producer.get(value)
    if eqn is None or not axes:
        return axes
    if eqn.primitive in P.BROADCAST:
        dims = eqn.params["broadcast_dimensions"]
        (operand,) = eqn.inputs[:1]
        return frozenset(dims[i] for i in _varying(program, operand))
    if eqn.primitive in P.ELEMENTWISE:
        operands = [v for v in eqn.inputs if len(v.shape) == len(value.shape)]
        return axes & frozenset().union(*(_varying(program, v) for v in operands))
    return axes


def _axes_in_core(core: Equation, tail: Sequence[Equation], axes: frozenset[int]) -> frozenset[int] | None:
    """Map axes of a tail value back to axes of the core's output, through the reshapes in between."""
    for eqn in reversed(tail):
        if eqn.primitive in P.TRANSPOSE:
            axes = frozenset(eqn.params["permutation"][i] for i in axes)
        elif eqn.primitive in P.RESHAPE:
            before, after = eqn.inputs[0].shape, eqn.outputs[0].shape
            mapped = {_same_axis(before, after, i) for i in axes}
            if None in mapped:
                return None
            axes = frozenset(i for i in mapped if i is not None)
    return axes


def _same_axis(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """The axis that a reshape leaves as it is: same size, same number of elements behind it."""
    behind = math.prod(after[axis + 1 :])
    for i, size in enumerate(before):
        if size == after[axis] and math.prod(before[i + 1 :]) == behind:
            return i
    return None


def _weight_axes(core: Equation) -> frozenset[int]:
    """Axes of the output that are axes of the weight too."""
    if core.primitive in P.CONV:
        if core.inputs[1].depends:  # the kernel is what is explained: the images are its weights
            return frozenset()
        return frozenset({core.params["dimension_numbers"].out_spec[1]})
    return frozenset(_dot_axes(core))


def _dot_axes(core: Equation) -> dict[int, int]:
    """For a matrix product: output axis -> weight axis."""
    (contract, batch) = core.params["dimension_numbers"]
    side = 1 if core.inputs[0].depends else 0
    left, right = (len(v.shape) for v in core.inputs[:2])
    free = [[i for i in range(n) if i not in contract[k] and i not in batch[k]] for k, n in enumerate((left, right))]
    start = len(batch[0]) + (len(free[0]) if side == 1 else 0)
    axes = dict(enumerate(batch[side]))
    axes.update({start + k: axis for k, axis in enumerate(free[side])})
    return axes


def _align(core: Equation, tail: Sequence[Equation], eqn: Equation, factor: jax.Array) -> jax.Array:
    """Bring a scale from the shape it has in the tail to one that broadcasts against the core's output."""
    shape, here = core.outputs[0].shape, eqn.outputs[0].shape
    behind = [e for e in tail[: list(tail).index(eqn)] if e.primitive in P.RESHAPE]
    if not (core.primitive in P.DOT or core.primitive in P.CONV):
        return factor.ravel()[0] if behind else factor  # behind a reshape only one number is absorbed
    if factor.ndim == 0:
        return factor
    allowed = _weight_axes(core)
    # Only axes of the weights vary (absorb_tail saw to it): take one representative along all others.
    keep = {}
    for axis, size in enumerate(factor.shape):
        back = _axes_in_core(core, behind, frozenset({axis})) if size > 1 else None
        if back is not None and back <= allowed:
            keep[axis] = next(iter(back))
    index = tuple(slice(None) if i in keep else slice(0, 1) for i in range(factor.ndim))
    target = [1] * len(shape)
    for axis, back in keep.items():
        target[back] = here[axis]
    kept = sorted(keep)
    in_core_order = sorted(range(len(kept)), key=lambda k: keep[kept[k]])
    values = factor[index].reshape([here[axis] for axis in kept])
    return values.transpose(in_core_order).reshape(target)


def _scaled(core: Equation, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply an output scale into the weights."""
    if scale.ndim == 0 or not (core.primitive in P.DOT or core.primitive in P.CONV):
        return weight * scale
    if core.primitive in P.CONV:
        numbers = core.params["dimension_numbers"]
        shape = [1] * weight.ndim
        shape[numbers.rhs_spec[0]] = scale.shape[numbers.out_spec[1]]
        return weight * scale.reshape(shape)
    axes = _dot_axes(core)
    order = sorted(axes, key=axes.__getitem__)  # output axes in the order of the weight's axes
    others = [i for i in range(scale.ndim) if i not in axes]
    flat = jnp.squeeze(jnp.transpose(scale, (*order, *others)), tuple(range(len(order), scale.ndim)))
    shape = [1] * weight.ndim
    for k, out in enumerate(order):
        shape[axes[out]] = flat.shape[k]
    return weight * flat.reshape(shape)


def _moved(eqn: Equation, shift: jax.Array) -> jax.Array:
    full = jnp.broadcast_to(shift, eqn.inputs[0].shape)
    return _compat.bind(eqn.primitive, eqn.params, full)[0]


def _features(core: Equation | None, tail: Sequence[Equation], ndim: int) -> tuple[int, ...]:
    """Output axes that belong to one sample, where the operation tells; else the last axis alone."""
    if core is not None and core.primitive in P.CONV:
        batch = frozenset({core.params["dimension_numbers"].out_spec[0]})
        return tuple(i for i in range(ndim) if _axes_in_core(core, tail, frozenset({i})) != batch)
    if core is not None and core.primitive in P.DOT:
        batch_axes = len(core.params["dimension_numbers"][1][0])
        free = {frozenset({i}) for i in _dot_axes(core) if i >= batch_axes}  # axes of the weight
        return tuple(i for i in range(ndim) if _axes_in_core(core, tail, frozenset({i})) in free)
    if core is not None and core.primitive in P.WINDOW_SUM:
        first = next((i for i, n in enumerate(core.params["window_dimensions"]) if n > 1), ndim - 1)
        return tuple(range(first, ndim))
    if core is not None and core.primitive in P.SUMMING and ndim == 1:
        return ()  # the only axis left is that of the samples, or there are none
    return (ndim - 1,) if ndim else ()
