"""The one module that touches jax's internals, and only to read them.

Everything that may change between jax releases is kept here: how a jaxpr is opened, which primitive
carries an inner jaxpr and where, how an equation is run again, and what its name stack and source line are.
No jaxpr is ever constructed, and primitives are compared as objects, never by name, since names have changed
before (``pjit`` became ``jit``).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.core
from jax import lax
from jax.extend import core as _core
from jax.extend.core import primitives as _primitives

Primitive = _core.Primitive
Literal = _core.Literal


def primitive(name: str) -> Primitive | None:
    """The primitive object called ``name`` (``"add_p"``), or None where this jax release has none."""
    return getattr(_primitives, name, None) or getattr(lax, name, None)


def primitives(*names: str) -> frozenset[Primitive]:
    """The primitives of these names (without ``_p``) that exist in this jax release."""
    return frozenset(p for n in names if (p := primitive(n + "_p")) is not None)


# Calls whose body is traced as if written inline. What is lost is only the call: jit compiles the whole anyway.
_INLINED = {
    primitive("jit_p"): "jaxpr",
    primitive("closed_call_p"): "call_jaxpr",
    primitive("call_p"): "call_jaxpr",
    primitive("remat_p"): "jaxpr",
}
# Calls with a derivative of their own: kept whole while their body is elementwise, so that derivatives of
# relevance use the derivative that the author of the function wrote (relu at 0, logaddexp at infinity).
_CUSTOM = {
    primitive("custom_jvp_call_p"): "call_jaxpr",
    primitive("custom_vjp_call_p"): "call_jaxpr",
}


def trace(fun: Callable, *args: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr of ``fun(*args)`` and the values of its constants."""
    return _open(jax.make_jaxpr(fun)(*args))


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    # Closed and open jaxprs are two classes up to jax 0.10 and one class since 0.11.
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def inner_jaxpr(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The open jaxpr and constants that a call equation runs, or None for an ordinary equation."""
    for table in (_INLINED, _CUSTOM):
        if (key := table.get(equation.primitive)) is not None:
            return _open(equation.params[key])
    return None


def is_custom_call(equation: Any) -> bool:
    """Whether the equation is a ``custom_jvp`` or ``custom_vjp`` function."""
    return equation.primitive in _CUSTOM


def call_name(equation: Any) -> str | None:
    """The name of the Python function behind a call equation, if jax recorded one."""
    name = equation.params.get("name")
    return name if isinstance(name, str) else None


def bind(prim: Primitive, params: Mapping[str, Any], *values: Any) -> list[Any]:
    """Run one equation again on other values; always returns a list of outputs."""
    bound = prim.get_bind_params(dict(params))
    if isinstance(bound, tuple):  # up to jax 0.10 some primitives give (subfuns, params)
        subfuns, bound = bound
        out = prim.bind(*subfuns, *values, **bound)
    else:
        out = prim.bind(*values, **bound)
    return list(out) if prim.multiple_results else [out]


_TRANSFORM = re.compile(r"\w+\(([^()]*)\)")


def scope(equation: Any) -> tuple[str, ...]:
    """The name stack of an equation, as Flax and ``jax.named_scope`` leave it: ``("Net", "Conv_0")``."""
    text = str(equation.source_info.name_stack)
    while (plain := _TRANSFORM.sub(r"\1", text)) != text:  # vmap(Net)/Conv_0 is still Net/Conv_0
        text = plain
    return tuple(part for part in text.split("/") if part)


_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(module.__file__ or "")) + os.sep
    for module in (jax, flax, sys.modules[__name__.rpartition(".")[0]])
)


def user_frames(equation: Any) -> list[tuple[str, str]]:
    """Where the model's own code made an equation, innermost first: pairs of ``"file.py:12"`` and function name.

    Frames of jax, Flax and jaxlrp are left out: the reader wants the line of the model.
    """
    traceback = getattr(equation.source_info, "traceback", None)
    return [
        (f"{os.path.basename(frame.file_name)}:{frame.line_num}", frame.function_name)
        for frame in getattr(traceback, "frames", ())
        if not frame.file_name.startswith(_LIBRARIES)
    ]


def is_concrete(value: Any) -> bool:
    """Whether the numbers of an array are known now, i.e. it is not traced."""
    return not isinstance(value, jax.core.Tracer)
