"""Step 1: from a function to one flat list of equations.

`trace_program` runs ``jax.make_jaxpr`` and writes every inner call (``jit``, ``remat``, custom derivatives) inline,
so that later steps see one list of primitive operations in execution order. It also marks which values depend
on the explained inputs. Everything else, parameters and what is computed from them, is a constant as far as relevance
is concerned and is simply evaluated: BatchNorm statistics, weight normalisation, LoRA sums and casts all fold for free.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _compat, _primitives, convolutions, registry
from .errors import UnsupportedError

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
    token: Value | None = None  # the explained token ids that it selects by: ids, moved or shifted, or one-hot rows
    counting: bool = False  # 0, 1, 2, ... along an axis

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
    block: object | None = None  # the jax.checkpoint around it

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
class Scan(Equation):
    """A scan on the explained path, with one step written out.

    The operands are ``consts``, initial carries and stacked inputs; the step's inputs are the same for one step. The
    results are the last carries and stacked outputs, and beyond what jax gives, ``starts``: the carries that every
    step began with, which the way back needs.
    """

    step: Program = dataclasses.field(kw_only=True)
    consts: int = dataclasses.field(kw_only=True)
    carries: int = dataclasses.field(kw_only=True)
    starts: tuple[Value, ...] = dataclasses.field(kw_only=True)

    def split(self, operands: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Constants, carries and stacked inputs, of anything that comes one per operand."""
        carries, stacked = self.consts, self.consts + self.carries
        return tuple(operands[:carries]), tuple(operands[carries:stacked]), tuple(operands[stacked:])

    def run(self, env: MutableMapping[Value, Any], wide: bool = False) -> None:
        """Run all steps; keep the carries that each began with."""
        values = [jnp.asarray(read(env, v), v.dtype) for v in self.inputs]
        consts, init, stacked = self.split([widen(v) for v in values] if wide else values)

        def step(carry: Any, x: Any) -> Any:
            inner = self.step.evaluate((*consts, *carry, *x), wide)
            results = [read(inner, v) for v in self.step.outputs]
            after = tuple(jnp.asarray(r, c.dtype) for r, c in zip(results[: self.carries], carry, strict=True))
            return after, (tuple(results[self.carries :]), carry)

        params = {k: self.params[k] for k in ("length", "reverse", "unroll")}
        last, (outputs, starts) = jax.lax.scan(step, init, stacked, **params)
        env.update(zip((*self.outputs, *self.starts), (*last, *outputs, *starts), strict=True))


@dataclasses.dataclass(eq=False)
class Cond(Equation):
    """A ``cond`` or ``switch`` on the explained path: the first operand is the branch's number, the rest are theirs."""

    branches: tuple[Program, ...] = dataclasses.field(kw_only=True)

    def run(self, env: MutableMapping[Value, Any], wide: bool = False) -> None:
        """Run the branch that was chosen."""
        index, *operands = (read(env, v) for v in self.inputs)
        operands = [jnp.asarray(x, v.dtype) for x, v in zip(operands, self.inputs[1:], strict=True)]
        if wide:
            operands = [widen(x) for x in operands]

        def runner(branch: Program) -> Callable[..., Any]:
            def run(*operands: Any) -> Any:
                inner = branch.evaluate(operands, wide)
                dtypes = [wide_dtype(o.dtype) if wide else o.dtype for o in self.outputs]
                return [jnp.asarray(read(inner, v), d) for v, d in zip(branch.outputs, dtypes, strict=True)]

            return run

        env.update(zip(self.outputs, jax.lax.switch(index, list(map(runner, self.branches)), *operands), strict=True))


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

    def fix(self, constants: Iterable[Value]) -> None:
        """Let these values, and what is made of them alone, count as constants."""
        for value in constants:
            value.depends = False
        for equation in self.equations:
            if not equation.depends and not any(v.token for v in equation.outputs):
                for value in equation.outputs:
                    value.depends = False

    @property
    def sources(self) -> tuple[Value, ...]:
        """Where relevance ends: the explained inputs, and the embeddings that explained token ids look up."""
        looked_up = (v for e in self.equations for v in e.outputs if v.depends and not e.depends)
        return (*(v for v in self.inputs if v.depends), *looked_up)

    def serving(self, outputs: Sequence[Value]) -> Program:
        """The part of the program that these outputs need (not running averages that the caller throws away)."""
        return Program(_live(self.equations, outputs), self.inputs, tuple(outputs))

    def evaluate(
        self,
        args: Sequence[Any],
        wide: bool = False,
        once: Collection[Value] = (),
        frugal: Collection[Equation] = (),
    ) -> Env:
        """Run the program and keep every value. XLA drops those that nobody reads.

        Those in ``once`` XLA is to compute once. It fuses sums into all that reads them, so that a residual stream
        would be added up from its beginning by each of its readers. The same goes for what `spread` finds. Convolutions
        in ``frugal`` may be computed with fewer multiplications, and errors relative to all that a filter sees.
        """
        once = self.spread().union(once)
        env: Env = dict(zip(self.inputs, args, strict=True))
        for equation in self.equations:
            if equation in frugal:
                values = (read(env, v) for v in equation.inputs)
                env[equation.outputs[0]] = convolutions.forward(equation.primitive, equation.params, *values)
            else:
                equation.run(env, wide)
            env.update({v: jax.lax.optimization_barrier(env[v]) for v in equation.outputs if v in once})
        return env

    def spread(self) -> set[Value]:
        """Results of costly functions, the same for every input, that are repeated along axes by what reads them.

        XLA computes them again for each place that they come to: the sine of a rotary position for every head of every
        sample, forwards and backwards.
        """
        repeats = _primitives.ELEMENTWISE | _primitives.BROADCAST
        repeated: set[Value] = set()
        found = set()
        for equation in reversed(self.equations):
            prim, out = equation.primitive, equation.outputs[0]
            if prim in _primitives.COSTLY and not equation.depends:
                found.update(repeated.intersection(equation.outputs))
            for value in equation.inputs:
                grows = prim in repeats and _long(value.shape) != _long(out.shape)
                through = prim in _primitives.ELEMENTWISE | _primitives.MOVE and out in repeated
                if (grows or through) and not value.depends and _long(value.shape):
                    repeated.add(value)
        return found


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
    inputs = tuple(map(_input, jaxpr.invars, explained, paths))
    equations: list[Equation] = []
    outputs = _inline(jaxpr, consts, inputs, _Place(), equations)
    program = Program(equations, inputs, outputs).serving(outputs)
    _squeeze_lookups(program)
    return program


def _squeeze_lookups(program: Program) -> None:
    """A lookup under vmap leaves an axis of size 1, which is squeezed right away: relevance ends behind that."""
    for value in program.sources:
        while len(readers := program.consumers.get(value, [])) == 1 and value not in program.inputs:
            (reader,) = readers
            squeezed = _long(reader.outputs[0].shape) == _long(value.shape)
            if reader.primitive not in _primitives.RESHAPE - _primitives.TRANSPOSE or not squeezed:
                break
            if len(reader.outputs[0].shape) >= len(value.shape):
                break
            value.depends, reader.outputs[0].token = False, value.token
            value = reader.outputs[0]


def _long(shape: tuple[int, ...]) -> list[int]:
    """Without axes of size 1."""
    return [n for n in shape if n != 1]


def _input(var: Any, explained: bool, path: str) -> Value:
    if not explained:
        return Value(var.aval.shape, var.aval.dtype, path=path)
    value = Value(var.aval.shape, var.aval.dtype)
    value.depends = bool(jnp.issubdtype(value.dtype, np.floating))
    value.token = None if value.depends else value
    return value


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the model an equation stands: module path, functions it was inlined from, source line."""

    scope: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    source: str = "an unknown line"
    block: object | None = None  # the outermost jax.checkpoint

    def enter(self, eqn: Any) -> _Place:
        # Name stacks inside of a call are relative to it.
        frames = _compat.user_frames(eqn)
        # jax traces a library function such as jnp.where once: the lines inside are those of its first caller.
        # They are worth more than the call's own line only if they lie inside of the called function.
        inside = not self.calls or any(function.split(".")[-1] == self.calls[-1] for _, function in frames)
        source = f"{frames[0][0]} ({frames[0][1]})" if frames and inside else self.source
        block = object() if self.block is None and eqn.primitive in _compat.REMAT else self.block
        return _Place(self.scope + _compat.scope(eqn), self.calls, source, block)

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
        taught = registry.registered(eqn.primitive) is not None
        if eqn.primitive in _primitives.BARRIER:  # hands every operand on as it is
            known.update(zip(eqn.outvars, operands, strict=True))
            continue
        explained = any(v.depends or v.token for v in operands)
        if eqn.primitive in _compat.SCAN | _compat.COND and explained and not taught:
            control = _scan if eqn.primitive in _compat.SCAN else _cond
            into.append(control(eqn, operands, here))
            known.update(zip(eqn.outvars, into[-1].outputs, strict=True))
            continue
        if inner is not None and not whole:
            results = _inline(*inner, operands, here.named(name), into)
            known.update(zip(eqn.outvars, results, strict=True))
            continue
        if inner is not None:
            name = name or next(_call_names(inner[0]), None)
        outputs = tuple(_result(var.aval, eqn, operands) for var in eqn.outvars)
        known.update(zip(eqn.outvars, outputs, strict=True))
        if inner is not None:
            here = here.named(name)
        body = None
        if inner is not None:
            inside: list[Equation] = []
            body = Program(inside, operands, _inline(*inner, operands, here, inside))
        what = (eqn.primitive, eqn.params, operands, outputs)
        into.append(Equation(*what, here.scope, here.calls, here.source, marked, body, here.block))
    return tuple(lookup(a) for a in jaxpr.outvars)


def _scan(eqn: Any, operands: tuple[Value, ...], place: _Place) -> Scan:
    (jaxpr, closed), consts, carries = _compat.scan_parts(eqn)
    stacked = consts + carries
    depends = [v.depends for v in operands]
    while True:  # a carry depends if its start or what a step makes of it does
        inputs = tuple(
            dataclasses.replace(v, shape=var.aval.shape, depends=d, constant=None, literal=False)
            for v, d, var in zip(operands, depends, jaxpr.invars, strict=True)
        )
        equations: list[Equation] = []
        step = Program(equations, inputs, _inline(jaxpr, closed, inputs, place, equations))
        after = [a or b.depends for a, b in zip(depends[consts:stacked], step.outputs, strict=False)]
        if after == depends[consts:stacked]:
            break
        depends[consts:stacked] = after
    _refuse_lookups(step, place)
    # the step again as the program that its results need: Program links readers and makers
    step = step.serving(step.outputs)
    flags = [*after, *(v.depends for v in step.outputs[carries:])]
    made = list(zip(flags, step.outputs, strict=True))
    outputs = tuple(_outcome(v.aval, d, [o]) for v, (d, o) in zip(eqn.outvars, made, strict=True))
    length = (eqn.params["length"],)
    starts = tuple(Value(length + v.shape, v.dtype, depends=v.depends) for v in inputs[consts:stacked])
    return Scan(
        *(eqn.primitive, eqn.params, operands, outputs, place.scope, place.calls, place.source),
        block=place.block,
        step=step,
        consts=consts,
        carries=carries,
        starts=starts,
    )


def _outcome(aval: Any, depends: bool, inner: Sequence[Value]) -> Value:
    """The value outside of a body for those inside."""
    token = None if depends else next((v.token for v in inner if v.token), None)
    return Value(aval.shape, aval.dtype, depends=depends, random=any(v.random for v in inner), token=token)


def _refuse_lookups(body: Program, place: _Place) -> None:
    if body.sources != tuple(v for v in body.inputs if v.depends):
        raise UnsupportedError(
            f"an embedding is looked up inside of a scan or cond, at {place.source}; look all embeddings up before it, "
            "or explain the embeddings instead of the token ids"
        )


def _cond(eqn: Any, operands: tuple[Value, ...], place: _Place) -> Cond:
    branches = []
    for jaxpr, closed in _compat.cond_branches(eqn):
        inputs = tuple(dataclasses.replace(v, constant=None, literal=False) for v in operands[1:])
        equations: list[Equation] = []
        outputs = _inline(jaxpr, closed, inputs, place, equations)
        branches.append(Program(equations, inputs, outputs).serving(outputs))
        _refuse_lookups(branches[-1], place)
    flags = [any(branch.outputs[i].depends for branch in branches) for i in range(len(eqn.outvars))]
    made = zip(*(branch.outputs for branch in branches), strict=True)
    outputs = tuple(_outcome(v.aval, d, o) for v, d, o in zip(eqn.outvars, flags, made, strict=True))
    place_of = (place.scope, place.calls, place.source)
    what = (eqn.primitive, eqn.params, operands, outputs)
    return Cond(*what, *place_of, block=place.block, branches=tuple(branches))


def _literal(atom: Any) -> Value:
    return Value(atom.aval.shape, atom.aval.dtype, constant=np.asarray(atom.val, atom.aval.dtype), literal=True)


def _result(aval: Any, eqn: Any, operands: Sequence[Value]) -> Value:
    prim, params = eqn.primitive, eqn.params
    constant = prim in _primitives.SHAPE_ONLY or prim in _primitives.DECIDING
    # whole numbers made of real ones (an argmax, the indices of a top-k) are decisions
    constant = constant or jnp.issubdtype(getattr(aval, "dtype", bool), np.integer)
    depends = any(v.depends for v in operands) and not constant
    token = None if depends else _token(prim, aval, operands)
    if token and _looks_up(prim, params, aval, operands):
        depends = True  # an embedding, by its index or by a one-hot row: relevance ends here
    return Value(
        getattr(aval, "shape", ()),
        getattr(aval, "dtype", np.dtype(bool)),
        depends=depends,
        literal=all(v.literal for v in operands),
        random=_draws(eqn) or any(v.random for v in operands if not v.depends),
        path="" if depends else next((v.path for v in operands if v.path), ""),
        token=token,
        counting=prim in _primitives.IOTA or (prim in _KEEPS_ORDER and any(v.counting for v in operands)),
    )


_KEEPS_ORDER = _primitives.MOVE | _primitives.CAST | _primitives.ADD
# What token ids may go through and still be token ids: ids[:, ::2], ids + offset, where(ids < 0, ids + n, ids)
_KEEPS_TOKENS = (
    (_primitives.MOVE - _primitives.LOOKUP)
    | _primitives.CAST
    | _primitives.ADD
    | _primitives.SUB
    | _primitives.SELECT
    | _primitives.CLAMP
    | _primitives.MAXMIN
)


def _token(prim: Any, aval: Any, operands: Sequence[Value]) -> Value | None:
    """The token ids that a result selects by, if it is made of some and of nothing that hides them.

    Not so masks (``ids != 0``), positions counted from masks, the place of the largest id, whole pixels made real.
    """
    if prim in _primitives.LOOKUP:  # by its indices, not by what it takes them from
        return next((v.token for v in operands[1:] if v.token), operands[0].token)
    token = next((v.token for v in operands if v.token), None)
    if prim in _primitives.EQUAL:  # ids == arange(n): one-hot rows
        return token if any(v.counting for v in operands) else None
    whole = any(v.token and jnp.issubdtype(v.dtype, np.integer) for v in operands)
    if prim in _primitives.DOT:
        return None if whole else token
    real = jnp.issubdtype(aval.dtype, np.floating)
    return token if prim in _KEEPS_TOKENS and not (whole and real) else None


def _looks_up(prim: Any, params: Mapping[str, Any], aval: Any, operands: Sequence[Value]) -> bool:
    if not jnp.issubdtype(aval.dtype, np.floating):
        return False
    if prim in _primitives.LOOKUP:  # more than a number for each token: a row of a table
        return operands[0].token is None and math.prod(params["slice_sizes"]) > 1
    return prim in _primitives.DOT


def _draws(eqn: Any) -> bool:
    """Whether an operation, or any inside of it, draws random bits."""
    if eqn.primitive in _primitives.RANDOM:
        return True
    return any(_draws(inner) for body in _compat.bodies(eqn) for inner in body.eqns)


def _stays_whole(eqn: Any, operands: Sequence[Value]) -> bool:
    """A call with its own derivative stays one equation if it is elementwise, or constant for relevance."""
    depends = sum(v.depends for v in operands)
    if depends == 0:
        return not any(v.token for v in operands)  # an embedding may be looked up inside
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
