"""Step 1: from a function to one flat list of equations.

`trace_program` runs ``jax.make_jaxpr`` and writes every inner call (``jit``, ``remat``, custom derivatives) inline,
so that later steps see one list of primitive operations in execution order. It also marks which values depend
on the explained inputs. Everything else, parameters and what is computed from them, is a constant as far as relevance
is concerned and is simply evaluated: BatchNorm statistics, weight normalisation, LoRA sums and casts all fold for free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import _compat, _primitives, registry

Env = dict["Value", Any]


@dataclasses.dataclass(eq=False)
class Value:
    """One array of the traced program: an input, a constant or the result of an equation."""

    shape: tuple[int, ...]
    dtype: Any
    depends: bool = False  # on an explained input
    constant: Any = None  # the array itself, for literals and closed-over arrays
    literal: bool = False  # made of numbers written in the code, not of parameters
    random: bool = False  # made from random bits
    path: str = ""  # the parameter it comes from: "params/Dense_0/kernel"

    @property
    def carries(self) -> bool:
        """Whether relevance can live on this value: it depends on the input and is a real number."""
        return self.depends and bool(jnp.issubdtype(self.dtype, np.floating))

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(eq=False)
class Equation:
    """One primitive operation, ready to be run again."""

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    scope: tuple[str, ...]  # Flax's module path
    calls: tuple[str, ...]  # names of the functions it was inlined from, outermost first
    source: str
    custom: tuple[str, Any] | None = None  # name and rule of a function marked with custom_layer
    body: Program | None = None  # what a call that was kept whole computes

    @property
    def name(self) -> str:
        """The primitive's name, or the function's where a call was kept whole."""
        if self.primitive in _primitives.CUSTOM_CALLS and self.calls:
            return self.calls[-1]
        return str(self.primitive)

    @property
    def depends(self) -> bool:
        """Whether any operand depends on the explained input."""
        return any(v.depends for v in self.inputs)

    @property
    def dependent(self) -> tuple[Value, ...]:
        """The operands that depend on the explained input, each once."""
        return tuple(dict.fromkeys(v for v in self.inputs if v.depends))

    def run(self, env: MutableMapping[Value, Any], wide: bool = False) -> None:
        """Evaluate on the values in ``env`` and store the results there.

        With ``wide``, 16-bit floats are computed in 32 bits: relevance is never accumulated in less.
        """
        params = self.params
        values = [read(env, v) for v in self.inputs]
        if wide and self.body is not None and any(wide_dtype(v.dtype) != v.dtype for v in self.inputs):
            for equation in self.body.equations:  # the call itself is made for its own dtype
                equation.run(env, wide)
            env.update({o: read(env, v) for o, v in zip(self.outputs, self.body.outputs, strict=True)})
            return
        if wide:
            values, params = _widened(values, params)
        env.update(zip(self.outputs, _compat.bind(self.primitive, params, *values), strict=True))

    def describe(self) -> str:
        """Primitive, layer and source line, for error messages."""
        where = "/".join(self.scope) or "the model"
        return f"primitive '{self.name}' in layer '{where}' at {self.source}"


@dataclasses.dataclass(eq=False)
class Program:
    """A traced function: its equations in order, its flat inputs and outputs."""

    equations: list[Equation]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    consumers: dict[Value, list[Equation]] = dataclasses.field(default_factory=dict, init=False)
    producer: dict[Value, Equation] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for equation in self.equations:
            for value in dict.fromkeys(equation.inputs):
                self.consumers.setdefault(value, []).append(equation)
            self.producer.update(dict.fromkeys(equation.outputs, equation))

    def serving(self, outputs: Sequence[Value]) -> Program:
        """The part of the program that these outputs need (not running averages that the caller throws away)."""
        return Program(_live(self.equations, outputs), self.inputs, tuple(outputs))

    def evaluate(self, args: Sequence[Any]) -> Env:
        """Run the program and keep every value. XLA drops those that nobody reads."""
        env: Env = dict(zip(self.inputs, args, strict=True))
        for equation in self.equations:
            equation.run(env)
        return env


def read(env: Mapping[Value, Any], value: Value) -> Any:
    """The array behind a value: from the environment, or its own constant."""
    return env[value] if value.constant is None or value in env else value.constant


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which relevance of such a value is accumulated: at least 32 bits."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, np.floating) else dtype


def widen(value: Any) -> Any:
    """Cast 16-bit floats to float32; leave everything else alone."""
    value = jnp.asarray(value)
    return value.astype(wide_dtype(value.dtype))


def _widened(values: list[Any], params: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    values = [widen(v) if jnp.issubdtype(jnp.result_type(v), np.floating) else v for v in values]
    params = dict(params)
    for key in ("new_dtype", "preferred_element_type"):
        if params.get(key) is not None:
            params[key] = np.dtype(wide_dtype(params[key]))
    return values, params


def trace_program(
    fun: Callable[..., Any],
    args: Sequence[Any],
    explained: Sequence[bool],
    paths: Sequence[str],
) -> Program:
    """Trace ``fun(*args)``, whose arguments and results are flat arrays.

    Args:
        fun: a pure function from arrays to a sequence of arrays.
        args: the arrays (or their shapes and dtypes).
        explained: for each argument, whether relevance is wanted at it.
        paths: for each argument, its name ("params/Dense_0/kernel").
    """
    jaxpr, consts = _compat.trace(fun, *args)
    inputs = tuple(
        Value(v.aval.shape, v.aval.dtype, depends=e, path="" if e else p)
        for v, e, p in zip(jaxpr.invars, explained, paths, strict=True)
    )
    equations: list[Equation] = []
    outputs = _inline(jaxpr, consts, inputs, _Place(), equations)
    return Program(equations, inputs, outputs).serving(outputs)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the model an equation stands: module path, functions it was inlined from, source line."""

    scope: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    source: str = "an unknown line"

    def enter(self, eqn: Any) -> _Place:
        # Name stacks inside of a call are relative to it.
        frames = _compat.user_frames(eqn)
        # jax traces a library function such as jnp.where once: the lines inside are those of its first caller.
        # They are worth more than the call's own line only if they lie inside of the called function.
        inside = not self.calls or any(function.split(".")[-1] == self.calls[-1] for _, function in frames)
        source = f"{frames[0][0]} ({frames[0][1]})" if frames and inside else self.source
        return _Place(self.scope + _compat.scope(eqn), self.calls, source)

    def named(self, call: str | None) -> _Place:
        return dataclasses.replace(self, calls=(*self.calls, call)) if call else self


def _inline(
    jaxpr: Any,
    consts: Sequence[Any],
    inputs: Sequence[Value],
    place: _Place,
    into: list[Equation],
) -> tuple[Value, ...]:
    # An inner jaxpr is shared between its calls, so every visit makes new values for its variables.
    known: dict[Any, Value] = {}
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        known[var] = Value(np.shape(const), jnp.result_type(const), constant=const)
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def lookup(atom: Any) -> Value:
        if isinstance(atom, _compat.Literal):
            return _literal(atom)
        return known[atom]

    for eqn in jaxpr.eqns:
        operands = tuple(lookup(a) for a in eqn.invars)
        here = place.enter(eqn)
        name = _compat.call_name(eqn)
        inner = _compat.inner_jaxpr(eqn)
        marked = registry.custom(name) if any(v.depends for v in operands) else None
        whole = marked is not None or (_compat.is_custom_call(eqn) and _stays_whole(eqn, operands))
        if inner is not None and not whole:
            results = _inline(*inner, operands, here.named(name), into)
            known.update(zip(eqn.outvars, results, strict=True))
            continue
        if inner is not None:
            name = name or next(_call_names(inner[0]), None)
        outputs = tuple(_result(var.aval, eqn.primitive, operands) for var in eqn.outvars)
        known.update(zip(eqn.outvars, outputs, strict=True))
        if inner is not None:
            here = here.named(name)
        body = None
        if inner is not None:
            inside: list[Equation] = []
            body = Program(inside, operands, _inline(*inner, operands, here, inside))
        into.append(
            Equation(eqn.primitive, eqn.params, operands, outputs, here.scope, here.calls, here.source, marked, body)
        )
    return tuple(lookup(a) for a in jaxpr.outvars)


def _literal(atom: Any) -> Value:
    return Value(atom.aval.shape, atom.aval.dtype, constant=np.asarray(atom.val, atom.aval.dtype), literal=True)


def _result(aval: Any, prim: Any, operands: Sequence[Value]) -> Value:
    constant = prim in _primitives.SHAPE_ONLY or prim in _primitives.DECIDING
    depends = any(v.depends for v in operands) and not constant
    return Value(
        getattr(aval, "shape", ()),
        getattr(aval, "dtype", np.dtype(bool)),
        depends=depends,
        literal=all(v.literal for v in operands),
        random=prim in _primitives.RANDOM or any(v.random for v in operands if not v.depends),
        path="" if depends else next((v.path for v in operands if v.path), ""),
    )


def _stays_whole(eqn: Any, operands: Sequence[Value]) -> bool:
    """A call with its own derivative stays one equation if it is elementwise, or constant for relevance."""
    depends = sum(v.depends for v in operands)
    if depends == 0:
        return True
    shapes = {var.aval.shape for var in eqn.outvars}
    return depends == 1 and len(shapes) == 1 and _is_elementwise(_compat.inner_jaxpr(eqn)[0], shapes.pop())  # type: ignore[index]


def _is_elementwise(jaxpr: Any, shape: tuple[int, ...]) -> bool:
    for eqn in jaxpr.eqns:
        inner = _compat.inner_jaxpr(eqn)
        if inner is not None:
            if not _is_elementwise(inner[0], shape):
                return False
        elif eqn.primitive not in _primitives.ELEMENTWISE and not _spreads_a_scalar(eqn):
            return False
    return all(getattr(a.aval, "shape", ()) in ((), shape) for a in jaxpr.outvars)


def _spreads_a_scalar(eqn: Any) -> bool:
    return eqn.primitive in _primitives.BROADCAST and eqn.invars[0].aval.shape == ()


def _call_names(jaxpr: Any) -> Iterator[str]:
    """Names of the functions called inside, outermost first: ``custom_jvp(relu)`` calls ``jit(relu)``."""
    for eqn in jaxpr.eqns:
        if name := _compat.call_name(eqn):
            yield name
        if inner := _compat.inner_jaxpr(eqn):
            yield from _call_names(inner[0])


def _live(equations: list[Equation], outputs: Sequence[Value]) -> list[Equation]:
    """Drop equations whose results reach no output (running averages that the caller throws away)."""
    needed = set(outputs)
    kept = []
    for equation in reversed(equations):
        if needed.intersection(equation.outputs):
            kept.append(equation)
            needed.update(equation.inputs)
    return kept[::-1]
