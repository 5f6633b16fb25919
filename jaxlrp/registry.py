"""What users teach jaxlrp: the meaning of primitives it does not know, and functions to be treated as one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

#: The kinds that a primitive can be given by `register_rule`.
TEACHABLE = ("activation", "move", "pick", "product", "custom")

F = TypeVar("F", bound=Callable[..., Any])

# Declarations, like class definitions: made once at import, looked up by key, never changed by an explanation.
_PRIMITIVES: dict[str, tuple[str, Any]] = {}
_CUSTOM_LAYERS: dict[str, tuple[str, Any]] = {}


def register_rule(primitive: Any, *, kind: str = "activation", rule: Any = None) -> None:
    """Teach jaxlrp a primitive that it does not know.

    Args:
        primitive: the jax primitive, or its name as error messages print it.
        kind: what it is to relevance, one of `TEACHABLE`: ``"activation"`` passes relevance through,
            ``"move"`` and ``"pick"`` send it along the operation's own derivative, ``"product"`` shares it among the
            operands.
        rule: a rule for these layers; by default the composite's rule for that kind is used.

    Example:
        >>> import jaxlrp
        >>> jaxlrp.register_rule("random_gamma_grad", kind="activation")
    """
    if kind not in TEACHABLE:
        raise ValueError(f"kind {kind!r} cannot be given to a primitive; choose one of: {', '.join(TEACHABLE)}")
    _PRIMITIVES[str(primitive)] = (kind, rule)


def custom_layer(name: str, rule: Any) -> Callable[[F], F]:
    """Mark a function as one layer with a rule of its own, whatever is inside.

    Relevance that arrives at the function's output is handed to ``rule`` with the whole function as its layer.

    Example:
        >>> import jax.numpy as jnp, jaxlrp
        >>> @jaxlrp.custom_layer("swap", jaxlrp.Pass())
        ... def swap(x):
        ...     return jnp.sort(x) * jnp.tanh(jnp.mean(x))
        >>> jaxlrp.lrp(swap)(jnp.array([1.0, 2.0])).shape
        (2,)
    """

    def decorate(function: F) -> F:
        key = f"jaxlrp_custom_layer_{len(_CUSTOM_LAYERS)}_{name}"
        _CUSTOM_LAYERS[key] = (name, rule)

        def marked(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        marked.__name__ = marked.__qualname__ = key  # jit records the name in the trace
        marked.__doc__ = function.__doc__
        return jax.jit(marked)  # type: ignore[return-value]

    return decorate


def registered(primitive: Any) -> tuple[str, Any] | None:
    """Kind and rule that a user registered for a primitive."""
    return _PRIMITIVES.get(str(primitive))


def custom(name: str | None) -> tuple[str, Any] | None:
    """Layer name and rule of a function marked with `custom_layer`, by the name that the trace shows."""
    return _CUSTOM_LAYERS.get(name or "")
