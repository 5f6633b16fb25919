"""More samples than memory holds at once: a few at a time, inside of one compiled program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .accounts import Ledger
from .errors import InputError
from .targets import ClassTarget

Explain = Callable[..., Any]
Given = tuple[dict[int, Any], dict[str, Any]]  # the arguments that are split, by position and by name


def stream(
    explain: Explain, batch_size: int, *, argnums: int | Sequence[int], argnames: str | Sequence[str] = ()
) -> Explain:
    """The same explanation, ``batch_size`` samples at a time, with the working memory of so many.

    Results equal those of ``explain`` up to rounding, as long as the model treats samples independently. A model that
    mixes them (batch statistics, attention from sample to sample) sees only those of one batch. The loop is a
    `jax.lax.map`, so the whole composes with `jax.jit`, `jax.vmap` and `jax.grad`; call it under `jax.jit`, as
    ``explain`` itself.

    All batches have one size, so that ``explain`` is compiled once: if the number of samples is no multiple of it,
    the last batch reaches back over samples that were explained before, and only its new ones are kept. Nothing is
    padded.

    Args:
        explain: what `lrp`, `value_and_lrp`, `layerwise_lrp` or a method of `jaxlrp.attributions` returned, or any
            function whose results have one entry per sample along one axis.
        batch_size: how many samples at a time, at least 1.
        argnums: the positional arguments with one entry per sample along the leading axis of every array: the
            explained input, and others that come with it (a mask, a second input). All else, such as parameters, goes
            to every batch whole.
        argnames: keyword arguments of that kind. ``target`` needs no mention: class indices with a leading axis, also
            inside of one of `jaxlrp.targets`, are split, one integer is not. Other target functions stay whole.

    Returns:
        ``streamed(*args, **kwargs)`` with the arguments and results of ``explain``.

    Raises:
        ValueError: a ``batch_size`` below 1.
        InputError: an argument that is not there, a split argument without arrays or with a scalar, different numbers
            of samples, or a result without exactly one axis of samples.

    Example:
        >>> import jax, jax.numpy as jnp, jaxlrp
        >>> explain = jaxlrp.lrp(lambda x, w: jnp.tanh(x @ w), jaxlrp.Epsilon())
        >>> streamed = jax.jit(jaxlrp.stream(explain, batch_size=4, argnums=0))
        >>> x, w = jax.random.normal(jax.random.key(0), (10, 3)), jnp.ones((3, 2))
        >>> labels = jnp.arange(10) % 2
        >>> relevance = streamed(x, w, target=labels)
        >>> relevance.shape, bool(jnp.allclose(relevance, explain(x, w, target=labels), atol=1e-6))
        ((10, 3), True)
    """
    size = operator.index(batch_size)
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, not {size}")
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    names = (argnames,) if isinstance(argnames, str) else tuple(argnames)

    def streamed(*args: Any, **kwargs: Any) -> Any:
        given, count = _split(args, kwargs, places, names)
        if count <= size:
            return explain(*args, **kwargs)

        def run(given: Given) -> Any:
            by_place, by_name = given
            return explain(*(by_place.get(k, a) for k, a in enumerate(args)), **{**kwargs, **by_name})

        def batch(start: jax.Array) -> Any:
            part = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size) if jnp.ndim(a) else a  # noqa: E731
            return run(jax.tree.map(part, given))

        starts = np.minimum(np.arange(0, count, size), count - size)
        whole = jax.eval_shape(run, given)
        if isinstance(whole, Ledger):
            raise InputError("a ledger sums over samples, so it cannot be put together sample by sample: give it fewer")
        found = jax.lax.map(batch, starts)
        join = lambda path, want, parts: _joined(path, want.shape, parts, count)  # noqa: E731
        return jax.tree_util.tree_map_with_path(join, whole, found)

    return streamed


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any], places: Sequence[int], names: Sequence[str]
) -> tuple[Given, int]:
    """The arguments that are split, and the number of samples in them."""
    for k in places:
        if not -len(args) <= k < len(args):
            raise InputError(f"argnums={k}, but {len(args)} positional arguments were given")
    for name in names:
        if name not in kwargs:
            raise InputError(f"argnames={name!r}, but no such keyword argument was given")
    by_place = {k % len(args): args[k % len(args)] for k in places}
    by_name = {name: kwargs[name] for name in names}
    sizes = {f"argument {k}": _sizes(f"argument {k}", a) for k, a in by_place.items()}
    sizes |= {name: _sizes(name, a) for name, a in by_name.items()}
    if not sizes:
        raise InputError("nothing to split: argnums and argnames are empty")
    target = kwargs.get("target")
    if "target" not in by_name and _has_classes(target):
        by_name["target"] = np.asarray(target) if isinstance(target, (list, tuple)) else target
        sizes["target"] = [np.shape(k)[0] for k in jax.tree.leaves(by_name["target"]) if np.ndim(k)]
    if len({n for found in sizes.values() for n in found}) > 1:
        each = "; ".join(f"{name}: {', '.join(map(str, found))}" for name, found in sizes.items())
        parameters = 0 in by_place and len(sizes["argument 0"]) > 1
        hint = "; of a module, argument 0 holds the parameters and argument 1 is the input" if parameters else ""
        raise InputError(
            f"arguments that are split must have equally many samples along their leading axis, not {each}{hint}"
        )
    return (by_place, by_name), next(iter(sizes.values()))[0]


def _sizes(name: str, argument: Any) -> list[int]:
    leaves = jax.tree.leaves(argument)
    if not leaves or not all(map(np.ndim, leaves)):
        what = "a scalar" if leaves else "no arrays"
        raise InputError(f"{name} holds {what}: an argument that is split has a leading axis of samples")
    return [np.shape(leaf)[0] for leaf in leaves]


def _has_classes(target: Any) -> bool:
    """Whether a target holds classes for every sample."""
    if callable(target):
        return isinstance(target, ClassTarget) and any(map(np.ndim, jax.tree.leaves(target)))
    return np.ndim(target) > 0


def _joined(path: Any, want: tuple[int, ...], parts: jax.Array, count: int) -> jax.Array:
    """Batches ``[batch, ..., sample, ...]`` as one array ``[..., sample, ...]`` of the shape ``want``."""
    batches, *each = parts.shape
    axes = [i for i, sizes in enumerate(zip(want, each, strict=True)) if sizes[0] != sizes[1]]
    if len(axes) != 1 or want[axes[0]] != count:
        name = jax.tree_util.keystr(path)
        raise InputError(
            f"the result{name and ' at ' + name} has shape {want} for all samples and {tuple(each)} for one batch: "
            "each sample must have its own entry along one axis"
        )
    (axis,) = axes
    size = each[axis]
    rows = jnp.moveaxis(parts, 0, axis).reshape(*each[:axis], batches * size, *each[axis + 1 :])
    again = batches * size - count  # how far the last batch reached back
    if not again:
        return rows
    before, last = jnp.split(rows, [(batches - 1) * size], axis)
    return jnp.concatenate([before, jax.lax.slice_in_dim(last, again, size, axis=axis)], axis)
