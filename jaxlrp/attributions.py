"""Attributions that are not LRP, in one interface with it, for comparison.

Each takes a model and returns `explain(*args, target=None, **kwargs)`, a pure function that gives
arrays shaped like the explained input, as `jaxlrp.lrp` does. All of them attribute one number,

    F(x) = sum_j c_j f_j(x),

and the target chooses the weights `c` so that gradient x input equals LRP-0 where it should, on
ReLU networks without biases. LRP-0 there is `R_i = x_i sum_j (df_j/dx_i) R_j / f_j`, hence

    c_j = R_j / f_j(x):

the relevance that LRP starts with, divided by the output.

| target | LRP starts with | weights |
| --- | --- | --- |
| None | every output's own value | 1 for every output |
| int or int array | the logit of that class | 1 for that class along the last axis, else 0 |
| callable | `target(output)` | `target(output) / output`, 0 where the output is 0 |

The weights belong to the explained input and are held there while a method looks elsewhere: if the
target asks for the predicted class, it is the class predicted at `x`, all along the path of
integrated gradients. In a batch, each example's output must depend on that example alone, as always
when one gradient is taken for many examples.

`explain` loops inside of JAX, in constant memory. Wrap it in `jax.jit`: unwrapped, every call
compiles its loop anew. Guided backpropagation, DeconvNet and excitation backpropagation are not
here, since they are composites of `jaxlrp.lrp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ._adapters import as_function
from .errors import InputError
from .targets import Target, seed

TargetLike = Target | ArrayLike | None
Argnums = int | Sequence[int] | None
Explain = Callable[..., Any]


def gradient(model: Any, *, argnums: Argnums = None, target: TargetLike = None) -> Explain:
    """The gradient `R_i = dF/dx_i`, with its sign.

    Simonyan et al. 2014, "Deep inside convolutional networks: visualising image classification
    models and saliency maps".

    Args:
        model: a `flax.linen.Module`, a `flax.nnx.Module` or a pure function.
        argnums: which arguments to explain, like `jax.grad`; left out, the model's first input.
        target: what to explain, unless the call says so; see the module's table.

    Returns:
        `explain(*args, target=None, **kwargs)`, which gives an array of the explained argument's
        shape (a tuple of them if `argnums` is one).

    Examples:
        >>> explain = gradient(lambda x: jnp.stack([x @ x, x.sum()]))
        >>> explain(jnp.array([1.0, 2.0]), target=0)
        Array([2., 4.], dtype=float32)
    """
    bind = _binder(model, argnums, target)

    def explain(*args: Any, target: TargetLike = None, **kwargs: Any) -> PyTree[Array]:
        score = bind(args, kwargs, target)
        return score.gradient(score.inputs)

    return explain


def gradient_x_input(model: Any, *, argnums: Argnums = None, target: TargetLike = None) -> Explain:
    """Gradient x input, `R_i = x_i dF/dx_i`.

    On a ReLU network without biases it equals LRP-0, and `sum_i R_i = F(x)`.

    Shrikumar et al. 2016, "Not just a black box: learning important features through propagating
    activation differences".

    Args:
        model: a `flax.linen.Module`, a `flax.nnx.Module` or a pure function.
        argnums: which arguments to explain, like `jax.grad`; left out, the model's first input.
        target: what to explain, unless the call says so; see the module's table.

    Returns:
        `explain(*args, target=None, **kwargs)`, which gives an array of the explained argument's
        shape (a tuple of them if `argnums` is one).

    Examples:
        >>> explain = gradient_x_input(lambda w, x: jax.nn.relu(w @ x), argnums=1)
        >>> explain(jnp.array([[3.0, 1.0], [-1.0, 0.0]]), jnp.array([1.0, 2.0]))
        Array([3., 2.], dtype=float32)
    """
    bind = _binder(model, argnums, target)

    def explain(*args: Any, target: TargetLike = None, **kwargs: Any) -> PyTree[Array]:
        score = bind(args, kwargs, target)
        return jax.tree.map(jnp.multiply, score.inputs, score.gradient(score.inputs))

    return explain


def smoothgrad(
    model: Any,
    *,
    noise: PyTree[ArrayLike],
    samples: int = 32,
    argnums: Argnums = None,
    target: TargetLike = None,
) -> Explain:
    """SmoothGrad, the gradient averaged over noisy copies of the input.

    `R_i = 1/n sum_k dF/dx_i (x + noise e_k)` with `e_k ~ N(0, 1)`.

    Smilkov et al. 2017, "SmoothGrad: removing noise by adding noise", which takes 10 to 20 % of the
    input's range as noise.

    Args:
        model: a `flax.linen.Module`, a `flax.nnx.Module` or a pure function.
        noise: the standard deviation, in units of the input; a scalar, or anything that broadcasts
            to the input.
        samples: how many noisy copies, `n`.
        argnums: which arguments to explain, like `jax.grad`; left out, the model's first input.
        target: what to explain, unless the call says so; see the module's table.

    Returns:
        `explain(*args, key, target=None, **kwargs)`, which gives an array of the explained
        argument's shape (a tuple of them if `argnums` is one). The noise depends on `key` alone.

    Examples:
        >>> explain = smoothgrad(lambda x: jnp.abs(x).sum(), noise=1.0, samples=1000)
        >>> r = jax.jit(explain)(jnp.array([-9.0, 0.0, 9.0]), key=jax.random.key(0))
        >>> abs(r - jnp.array([-1.0, 0.0, 1.0])).max() < 0.1
        Array(True, dtype=bool)
    """
    if samples < 1:
        raise ValueError(f"smoothgrad averages over at least one sample, not {samples}")
    bind = _binder(model, argnums, target)

    def explain(*args: Any, key: Array, target: TargetLike = None, **kwargs: Any) -> PyTree[Array]:
        score = bind(args, kwargs, target)
        scale = score.spread(noise)

        def at(key: Array) -> PyTree[Array]:
            leaves, tree = jax.tree.flatten(score.inputs)
            keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))
            return jax.tree.map(
                lambda x, s, k: x + s * jax.random.normal(k, x.shape, x.dtype),
                score.inputs,
                scale,
                keys,
            )

        weights = np.full(samples, 1 / samples)
        return score.mean_gradient(at, weights, jax.random.split(key, samples))

    return explain


def integrated_gradients(
    model: Any,
    *,
    baseline: PyTree[ArrayLike] = 0.0,
    steps: int = 32,
    argnums: Argnums = None,
    target: TargetLike = None,
) -> Explain:
    """Integrated gradients, the gradient averaged on the way from a baseline to the input.

    `R_i = (x_i - b_i) int_0^1 dF/dx_i (b + t (x - b)) dt`, which is complete: `sum_i R_i` is
    `F(x) - F(b)`, up to the error of the quadrature (Gauss-Legendre, exact where the gradient is a
    polynomial of degree below `2 steps` along the path).

    Sundararajan et al. 2017, "Axiomatic attribution for deep networks".

    Args:
        model: a `flax.linen.Module`, a `flax.nnx.Module` or a pure function.
        baseline: the input `b` that stands for the absence of features; a scalar, or anything that
            broadcasts to the input.
        steps: how many gradients are taken.
        argnums: which arguments to explain, like `jax.grad`; left out, the model's first input.
            Several of them move together.
        target: what to explain, unless the call says so; see the module's table.

    Returns:
        `explain(*args, target=None, **kwargs)`, which gives an array of the explained argument's
        shape (a tuple of them if `argnums` is one).

    Examples:
        >>> explain = integrated_gradients(lambda x: x[0] ** 2 * x[1], steps=2)
        >>> explain(jnp.array([3.0, 2.0]))  # sums to 18
        Array([12.,  6.], dtype=float32)
    """
    if steps < 1:
        raise ValueError(f"integrated_gradients takes at least one step, not {steps}")
    bind = _binder(model, argnums, target)
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1], the weights sum to 2

    def explain(*args: Any, target: TargetLike = None, **kwargs: Any) -> PyTree[Array]:
        score = bind(args, kwargs, target)
        start = score.spread(baseline)
        way = jax.tree.map(jnp.subtract, score.inputs, start)

        def at(t: Array) -> PyTree[Array]:
            return jax.tree.map(lambda b, d: b + t.astype(d.dtype) * d, start, way)

        mean = score.mean_gradient(at, weights / 2, jnp.asarray((1 + nodes) / 2))
        return jax.tree.map(jnp.multiply, way, mean)

    return explain


def occlusion(
    model: Any,
    window: int | Sequence[int | None],
    *,
    stride: int | Sequence[int | None] | None = None,
    fill: PyTree[ArrayLike] = 0.0,
    argnums: Argnums = None,
    target: TargetLike = None,
) -> Explain:
    """Occlusion, how much the output drops when a window of the input is covered.

    `R_i = mean_w [F(x) - F(x with w filled)]` over all windows `w` that cover feature `i`.

    Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks".

    Args:
        model: a `flax.linen.Module`, a `flax.nnx.Module` or a pure function.
        window: the window's size along the input's last axes, which are the features; None is the
            whole axis. Axes before them are batch axes, and the output has to start with the same:
            `(8, 8, None)` covers squares in all channels of a channels-last image, or of each in a
            batch.
        stride: how far apart windows start, at most their size; left out, they do not overlap. The
            last window along an axis may reach over its edge.
        fill: what a covered feature becomes; a scalar, or anything that broadcasts to the input.
        argnums: which arguments to explain, like `jax.grad`; left out, the model's first input. If
            several, they are covered one at a time.
        target: what to explain, unless the call says so; see the module's table.

    Returns:
        `explain(*args, target=None, **kwargs)`, which gives an array of the explained argument's
        shape (a tuple of them if `argnums` is one).

    Examples:
        >>> explain = occlusion(lambda x: x @ jnp.array([1.0, 2.0, 3.0, 4.0]), window=2)
        >>> explain(jnp.ones(4))
        Array([3., 3., 7., 7.], dtype=float32)
    """
    window = (window,) if isinstance(window, int) else tuple(window)
    if stride is None or isinstance(stride, int):
        stride = (stride,) * len(window)
    stride = tuple(stride)
    if len(stride) != len(window):
        raise ValueError(f"stride {stride} and window {window} differ in length")
    bind = _binder(model, argnums, target)

    def explain(*args: Any, target: TargetLike = None, **kwargs: Any) -> PyTree[Array]:
        score = bind(args, kwargs, target)
        leaves, tree = jax.tree.flatten(score.inputs)
        fills = jax.tree.leaves(score.spread(fill))

        def occlude(n: int) -> Array:
            x, batch = leaves[n], leaves[n].ndim - len(window)
            if batch < 0:
                raise ValueError(f"window {window} has more axes than the input {x.shape}")
            covers = list(map(_covers, x.shape[batch:], window, stride))
            whole = score.per_example(score.inputs, x.shape[:batch])

            def drop(position: Array) -> Array:
                covered = jnp.ones((), bool)
                for cover, p in zip(covers, position, strict=True):
                    covered = covered[..., None] & jnp.asarray(cover)[p]
                occluded = [*leaves[:n], jnp.where(covered, fills[n], x), *leaves[n + 1 :]]
                return whole - score.per_example(tree.unflatten(occluded), x.shape[:batch])

            grid = tuple(len(cover) for cover in covers)
            positions = np.indices(grid).reshape(len(grid), -1).T
            drops = jax.lax.map(drop, positions).reshape(grid + x.shape[:batch])
            # Which windows cover a feature is a product over axes, and so is how many: the mean is
            # one small matrix per axis, which takes the first axis away and appends its features.
            for cover in covers:
                mean = (cover / cover.sum(0)).astype(drops.dtype)
                drops = jnp.tensordot(drops, mean, (0, 0), precision=jax.lax.Precision.HIGHEST)
            return drops.astype(x.dtype)

        return tree.unflatten([occlude(n) for n in range(len(leaves))])

    return explain


def _covers(size: int, width: int | None, step: int | None) -> np.ndarray:
    """Tell for each window along an axis which of its `size` features the window covers."""
    width = size if width is None else width
    step = width if step is None else step
    if not 1 <= step <= width:
        raise ValueError(f"a stride of {step} leaves gaps between windows of {width}")
    starts = np.arange(0, max(size - width, 0) + step, step)[:, None]
    features = np.arange(size)
    return (starts <= features) & (features < starts + width)


@dataclass(frozen=True)
class _Score:
    """The number `F` that is attributed, as a function of the explained inputs alone."""

    function: Callable[[PyTree[Array]], Any]
    inputs: PyTree[Array]
    weights: PyTree[Array]

    def gradient(self, inputs: PyTree[Array]) -> PyTree[Array]:
        _, pull = jax.vjp(self.function, inputs)
        (result,) = pull(self.weights)
        return result

    def mean_gradient(self, at: Callable[[Any], PyTree[Array]], weights: np.ndarray, points: Array) -> PyTree[Array]:
        """Average the gradient over `at(point)`, summing in float32 or wider."""

        def add(total: PyTree[Array], weight_and_point: tuple[Array, Array]) -> tuple[Any, None]:
            weight, point = weight_and_point
            new = self.gradient(at(point))
            return jax.tree.map(lambda t, g: t + weight.astype(t.dtype) * g.astype(t.dtype), total, new), None

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, _wide(x)), self.inputs)
        total, _ = jax.lax.scan(add, zeros, (jnp.asarray(weights), points))
        return jax.tree.map(lambda t, x: t.astype(x.dtype), total, self.inputs)

    def per_example(self, inputs: PyTree[Array], batch: tuple[int, ...]) -> Array:
        """Evaluate `F` once for every index of the batch axes."""

        def total(weight: Array, output: Array) -> Array:
            if output.shape[: len(batch)] != batch:
                raise InputError(
                    f"the window leaves batch axes {batch}, but an output is {list(output.shape)}: "
                    "give it a size for every feature axis of the input, None for whole axes"
                )
            terms = weight.astype(_wide(output)) * output.astype(_wide(output))
            return terms.sum(tuple(range(len(batch), output.ndim)))

        totals = jax.tree.map(total, self.weights, self.function(inputs))
        return jax.tree.reduce(jnp.add, totals)

    def spread(self, value: PyTree[ArrayLike]) -> PyTree[Array]:
        """Broadcast a setting, or one for each explained input, to arrays like the inputs."""
        values = jax.tree.broadcast(value, self.inputs)
        return jax.tree.map(lambda v, x: jnp.broadcast_to(jnp.asarray(v, x.dtype), x.shape), values, self.inputs)


def _binder(model: Any, argnums: Argnums, target: TargetLike) -> Callable[[tuple, dict, TargetLike], _Score]:
    """Make the function that turns one call's arguments into the score to attribute."""
    adapted = as_function(model)
    chosen = adapted.argnums if argnums is None else argnums
    default = target

    def bind(args: tuple, kwargs: dict, target: TargetLike) -> _Score:
        args = adapted.prepare(args)

        def function(inputs: PyTree[Array]) -> Any:
            full = list(args)
            if isinstance(chosen, int):
                full[chosen] = inputs
            else:
                for n, value in zip(chosen, inputs, strict=True):
                    full[n] = value
            return adapted.fun(*full, **kwargs)

        picked = args[chosen] if isinstance(chosen, int) else tuple(args[n] for n in chosen)
        inputs = jax.tree.map(jnp.asarray, picked)
        for x in jax.tree.leaves(inputs):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise InputError(
                    f"argument {chosen} holds {x.dtype}{list(x.shape)}, and only floating-point "
                    "inputs can be explained: for token ids explain their embeddings, cast images"
                )
        weights = _weights(function(inputs), default if target is None else target)
        return _Score(function, inputs, weights)

    return bind


def _weights(output: PyTree[Array], target: TargetLike) -> PyTree[Array]:
    """Divide the relevance that LRP would start with by the output."""
    if not callable(target):  # the quotient is known, even where the output is 0
        ones = jax.tree.map(jnp.ones_like, output)
        return jax.tree.unflatten(jax.tree.structure(output), jax.tree.leaves(seed(target, ones)))
    return jax.tree.map(
        lambda r, f: jnp.where(f == 0, 0, r / jnp.where(f == 0, 1, f)).astype(f.dtype),
        seed(target, output),
        output,
    )


def _wide(x: Array) -> Any:
    return x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
