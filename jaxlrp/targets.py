"""Targets: what relevance the output starts with.

A target is any function from the model's output to the relevance of that output, of the same shape. Those here act
along the last axis, are pytrees (their class indices may be traced, a new class never recompiles) and work for one
sample or a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _compat
from ._pytree import PyTreeNode
from .errors import InputError

Target = Callable[[Any], Any]


class ClassTarget(PyTreeNode):
    """A target made of class indices, each one integer or one per sample."""

    def __call__(self, output: jax.Array) -> jax.Array:
        """Relevance of the output."""
        raise NotImplementedError


class _Logit(ClassTarget):
    index: Any

    def __call__(self, output: jax.Array) -> jax.Array:
        return output * _mask(output, self.index)


class _Softmax(ClassTarget):
    index: Any

    def __call__(self, output: jax.Array) -> jax.Array:
        return jax.nn.softmax(output, axis=-1) * _mask(output, self.index)


class _Predicted(ClassTarget):
    def __call__(self, output: jax.Array) -> jax.Array:
        return output * _mask(output, jnp.argmax(output, axis=-1))


class _OneHot(ClassTarget):
    index: Any

    def __call__(self, output: jax.Array) -> jax.Array:
        return _mask(output, self.index)


class _Difference(ClassTarget):
    plus: Any
    minus: Any

    def __call__(self, output: jax.Array) -> jax.Array:
        return output * (_mask(output, self.plus) - _mask(output, self.minus))


class _Contrastive(ClassTarget):
    index: Any

    def __call__(self, output: jax.Array) -> jax.Array:
        mask = _mask(output, self.index)
        return mask - (1.0 - mask) / (output.shape[-1] - 1)


class _LogOdds(ClassTarget):
    index: Any

    def __call__(self, output: jax.Array) -> jax.Array:
        mask = _mask(output, self.index)
        own = jnp.sum(output * mask, axis=-1, keepdims=True)
        closeness = jax.nn.softmax(jnp.where(mask > 0, -jnp.inf, output - own), axis=-1)
        # margin z_kc = f_k - f_c gets R_kc = z_kc closeness_c, and hands it to its two logits in proportion
        # to f_k and -f_c: the margin itself cancels, and closeness sums to one.
        return own * mask - output * closeness


def logit(k: Any) -> Target:
    """The logit of class ``k``: ``R_k = f_k(x)``, 0 elsewhere. The meaning of an integer target.

    Example:
        >>> import jax.numpy as jnp, jaxlrp
        >>> jaxlrp.targets.logit(1)(jnp.array([3.0, 2.0]))
        Array([0., 2.], dtype=float32)
    """
    return _Logit(k)


def softmax(k: Any) -> Target:
    """The probability of class ``k`` under a softmax over the last axis: ``R_k = p_k``."""
    return _Softmax(k)


def predicted() -> Target:
    """The logit of the class with the largest output."""
    return _Predicted()


def one_hot(k: Any) -> Target:
    """``R_k = 1``: relevance in units of the logit, comparable across images."""
    return _OneHot(k)


def difference(a: Any, b: Any) -> Target:
    """Why ``a`` and not ``b``: ``R_a = f_a(x)``, ``R_b = -f_b(x)``."""
    return _Difference(a, b)


def contrastive(k: Any) -> Target:
    """1 at class ``k``, ``-1/(n-1)`` at the ``n - 1`` others, so that evidence common to all classes cancels.

    Relevance is in units of the logit: at a class with a negative logit the sign of its evidence turns with it. Where
    logits of both signs matter, `log_odds` and `difference` start with the logits themselves.
    """
    return _Contrastive(k)


def log_odds(k: Any) -> Target:
    """The evidence for ``k`` against every other class, weighed by how close the contest is (Montavon et al., 2019).

    With margins ``z_kc = f_k - f_c``, ``R_kc = z_kc e^(-z_kc) / Σ_c' e^(-z_kc')``, which goes to the two logits of
    each margin in proportion to their parts ``f_k`` and ``-f_c``.
    """
    return _LogOdds(k)


def seed(target: Any, output: Any) -> Any:
    """Relevance of the output: itself for None, a class index or array of them, or a function's value.

    Raises:
        InputError: an integer target for an output that is no single array, an index out of range or of the wrong
            shape, or a function that returns another shape than the output's.
    """
    if target is None:
        return output
    if isinstance(target, (list, tuple)) and target and all(map(_is_index, target)):
        target = (np if all(map(_compat.is_concrete, target)) else jnp).asarray(target)
    if isinstance(target, (bool, str)) or (callable(target) is False and not _is_index(target)):
        array = getattr(target, "dtype", None)
        weights = " (for weights of the outputs: target=lambda output: weights * output)" if array else ""
        raise InputError(
            "target must be None, class indices (integers) or a function of the output, "
            f"not {array or repr(target)}{weights}"
        )
    if target is predicted:
        raise InputError("targets.predicted makes a target and takes no classes: give targets.predicted()")
    if callable(target):
        relevance = target(output)
        _check_seed(relevance, output)
        return relevance
    return logit(target)(_single(output))


def _is_index(target: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.result_type(target), np.integer))
    except TypeError:
        return False


def _single(output: Any) -> jax.Array:
    leaves = jax.tree.leaves(output)
    if len(leaves) != 1 or jnp.ndim(leaves[0]) == 0:
        shapes = ", ".join(str(jnp.shape(leaf)) for leaf in leaves)
        raise InputError(
            f"an integer target picks a class along the last axis of one output array, but the output is {shapes}; "
            "give a function of the output as target, or has_aux=True if the model returns (output, aux)"
        )
    return leaves[0]


def _check_seed(relevance: Any, output: Any) -> None:
    if isinstance(relevance, ClassTarget):
        raise InputError("targets take their classes first: targets.logit(k), not targets.logit")
    check_shape(relevance, output, "a target must return relevance of the output's own shape")


def check_shape(relevance: Any, output: Any, demand: str) -> None:
    """Relevance of the output must have its structure and shapes."""
    got, want = jax.tree.map(jnp.shape, relevance), jax.tree.map(jnp.shape, output)
    if got != want:
        raise InputError(f"{demand} {want}, not {got}")


def _mask(output: jax.Array, index: Any) -> jax.Array:
    """One-hot rows for the class indices; ``index`` is one integer or one per row."""
    classes = output.shape[-1]
    if np.ndim(index) and np.shape(index) != output.shape[:-1]:
        one_hot = "; of one-hot rows that is their argmax(-1)" if np.shape(index) == output.shape else ""
        raise InputError(
            f"targets of shape {np.shape(index)} do not fit an output of shape {output.shape}: "
            f"give one integer, or an array of shape {output.shape[:-1]}{one_hot}"
        )
    if _compat.is_concrete(index):
        known = np.ravel(np.asarray(index))
        bad = known[(known < 0) | (known >= classes)]
        if bad.size:
            raise InputError(f"class {bad[0]} is out of range: the model has classes 0 to {classes - 1}")
    index = jnp.asarray(index).astype(jnp.int32)[..., None]  # labels in 8 bits cannot count to 256 classes
    # a traced class out of range cannot raise: NaN is louder than a map of zeros
    mask = jnp.where((index >= 0) & (index < classes), (index == jnp.arange(classes)).astype(output.dtype), jnp.nan)
    return jnp.broadcast_to(mask, output.shape)
