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

import jax
import jax.core
from jax import lax
from jax._src.custom_batching import custom_vmap_p  # nowhere public
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
    custom_vmap_p: "call",
}
REMAT = primitives("remat")
SCATTER_ADD = primitives("scatter_add")
SCAN = primitives("scan")
COND = primitives("cond")

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


def scan_parts(equation: Any) -> tuple[tuple[Any, Sequence[Any]], int, int]:
    """Of a scan: the open jaxpr of its step with constants, and how many operands are constants and carries."""
    params = equation.params
    if "num_consts" in params:
        consts, carries = params["num_consts"], params["num_carry"]
    else:  # since jax 0.11 operands are described by a tree
        consts, carries, _ = map(len, params["ft_in"].unpack())
    return _open(params["jaxpr"]), consts, carries


def cond_branches(equation: Any) -> list[tuple[Any, Sequence[Any]]]:
    """The open jaxpr and constants of every branch of a ``cond`` or ``switch``."""
    return [_open(branch) for branch in equation.params["branches"]]


def bodies(equation: Any) -> list[Any]:
    """The open jaxprs that an equation runs, whatever kind of call or loop it is."""
    found = [v for value in equation.params.values() for v in (value if isinstance(value, (tuple, list)) else [value])]
    return [opened for v in found if hasattr(opened := getattr(v, "jaxpr", v), "eqns")]


def call_name(equation: Any) -> str | None:
    """The name of the Python function behind a call equation, if jax recorded one."""
    name = equation.params.get("name")
    return name if isinstance(name, str) else None


def bind(prim: Primitive, params: Mapping[str, Any], *values: Any) -> list[Any]:
    """Run one equation again on other values; always returns a list of outputs."""
    if prim in SCATTER_ADD:
        # Its combiner was traced for one dtype; the public function makes one that fits these values.
        keys = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
        return [lax.scatter_add(*values, **{k: params[k] for k in keys})]
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
    parts = (part for part in text.split("/") if part and not _IS_NO_MODULE.match(part))
    return tuple(_METHOD.sub("", part) for part in parts)


_METHOD = re.compile(r"\.[a-z_]\w*$")  # Linen writes Bert.encode for a method that is not __call__
# einsum leaves its equation ("ij,jk->ik") in the name stack, Equinox its layers' classes ("eqx.nn.Linear"), which say
# less than the parameters' paths.
_IS_NO_MODULE = re.compile(r"[\w.]*,[\w.,]*(->.*)?$|[\w.]*->|eqx\.nn\.")


_PACKAGE = __name__.rpartition(".")[0]
_MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models") + os.sep


def _folders(*packages: str) -> tuple[str, ...]:
    """Where those of these packages that are loaded lie."""
    files = (getattr(sys.modules.get(name), "__file__", None) for name in packages)
    return tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in files if file)


def user_frames(equation: Any) -> list[tuple[str, str]]:
    """Where the model's own code made an equation, innermost first: pairs of ``"file.py:12"`` and function name.

    Frames of jax, jaxlrp and the framework are left out: the reader wants the line of the model. A framework's own line
    is given where there is none.
    """
    frames = getattr(getattr(equation.source_info, "traceback", None), "frames", ())
    for libraries in (_folders("jax", _PACKAGE, "flax", "keras", "equinox", "haiku"), _folders("jax", _PACKAGE)):
        found = [
            (f"{os.path.basename(frame.file_name)}:{frame.line_num}", frame.function_name)
            for frame in frames
            if frame.file_name.startswith(_MODELS) or not frame.file_name.startswith(libraries)
        ]
        if found:
            return found
    return []


def is_concrete(value: Any) -> bool:
    """Whether the numbers of an array are known now, i.e. it is not traced."""
    return not isinstance(value, jax.core.Tracer)
