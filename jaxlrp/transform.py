"""The public transforms: `lrp` and its relatives, shaped like `jax.grad` and `jax.vjp`."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _compat
from ._adapters import Adapted, as_function
from .composites import Assignment, Assignments, Composite
from .errors import InputError
from .fold import Folded, Relevances, Step, Watch, at, constant_values, fold
from .graph import Env, Program, Value, read, trace_program
from .lattice import find_layers
from .layers import Layer, every_layer, forks
from .presets import as_composite
from .remat import Blocks, find_blocks, own_blocks
from .rules import Known, Rule
from .selectors import Name
from .signs import nonnegative_values
from .support import frugal_convolutions, pooled_values, positive_values, rectified_values, summands
from .tables import table
from .targets import check_shape, seed

Explain = Callable[..., Any]


def lrp(
    model: Any,
    composite: Composite | Rule | None = None,
    *,
    argnums: int | Sequence[int] | None = None,
    target: Any = None,
    has_aux: bool = False,
    check: bool = False,
    remat: bool = False,
) -> Explain:
    """Turn a model into a function that explains it by Layer-wise Relevance Propagation (Bach et al., 2015).

    The result is pure: it composes with `jax.jit`, `jax.vmap`, `jax.grad` and sharding. It works for single samples
    and batches.

    Args:
        model: a `flax.linen.Module`, a `flax.nnx.Module`, a Keras model, an Equinox module, a Haiku transform or any
            pure function of arrays.
        composite: which layer gets which rule; None is `EpsilonPlus`, a single rule is `Composite.uniform` of it.
        argnums: which positional arguments of ``explain`` are explained. By default the first input: argument 1 for
            modules (argument 0 holds their parameters), argument 0 for functions.
        target: the default target, see ``explain``.
        has_aux: the model returns ``(output, aux)``, and ``explain`` returns ``(relevance, aux)``.
        check: refuse NaN and infinity in arguments and parameters, and inputs that a rule is not made for. Needs
            concrete arrays, so call outside ``jit``.
        remat: run the model in blocks once more on the way back instead of keeping all its values: one more forward
            pass, and a fraction of the memory where many blocks are alike. Where to cut is found from the trace. Blocks
            that the model itself wraps in `jax.checkpoint` are respected always.

    Returns:
        ``explain(*args, target=None, **kwargs)``: relevance with the shape (and tree structure) of the explained
        argument, a tuple if ``argnums`` is a sequence, in at least float32. Explained integers are token ids: theirs is
        the relevance of the embeddings that they look up, with those' shape. For a Linen module the arguments are
        those of ``model.apply``; for an NNX module ``(nnx.state(model), *inputs)``, and the module itself is accepted
        as its state.
        ``target`` says what is explained: None starts every output with its own value, an integer (or one per sample;
        it may be traced) with that class's logit alone, and a function of the output (see `jaxlrp.targets`) with what
        it returns.

    Raises:
        UnknownPrimitiveError, UnsupportedError: the model does something that has no known meaning for relevance.
        NotDeterministicError: dropout or batch statistics are switched on.
        InputError: integer inputs, a class out of range; where ``check`` is set NaN, or pixels outside of a `ZBox`.
        NoRuleError, UnknownLayerError: the composite does not fit the model.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxlrp
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])
        >>> x = jnp.ones((2, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> explain = jax.jit(jaxlrp.lrp(model, jaxlrp.EpsilonPlus()))
        >>> explain(params, x, target=jnp.array([0, 2])).shape
        (2, 5)
    """
    run = value_and_lrp(model, composite, argnums=argnums, target=target, has_aux=has_aux, check=check, remat=remat)

    def explain(*args: Any, target: Any = None, **kwargs: Any) -> Any:
        output, relevance = run(*args, target=target, **kwargs)
        return (relevance, output[1]) if has_aux else relevance

    return explain


def value_and_lrp(
    model: Any,
    composite: Composite | Rule | None = None,
    *,
    argnums: int | Sequence[int] | None = None,
    target: Any = None,
    has_aux: bool = False,
    check: bool = False,
    remat: bool = False,
) -> Explain:
    """As `lrp`, but ``explain`` returns ``(output, relevance)``, or ``((output, aux), relevance)`` with ``has_aux``.

    Example:
        >>> import jax.numpy as jnp, jaxlrp
        >>> explain = jaxlrp.value_and_lrp(lambda x, w: x @ w, jaxlrp.Epsilon())
        >>> explain(jnp.array([1.0, 2.0]), jnp.array([[3.0], [1.0]]))[0]
        Array([5.], dtype=float32)
    """
    default = target
    setup = Setup(model, composite, argnums, has_aux, check, remat)

    def explain(*args: Any, target: Any = None, **kwargs: Any) -> Any:
        forward = setup.forward(args, kwargs)
        start = seed(default if target is None else target, forward.output)
        relevance = forward.gather(forward.fold(start).relevance)
        return ((forward.output, forward.aux) if has_aux else forward.output), relevance

    return explain


def lrp_vjp(
    model: Any,
    *args: Any,
    composite: Composite | Rule | None = None,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    check: bool = False,
    remat: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Run the model once; return its output and the linear map from the output's relevance to the input's.

    Args:
        model: as for `lrp`.
        *args: the arguments of ``explain``.
        composite: as for `lrp`.
        argnums: as for `lrp`.
        has_aux: as for `lrp`; returns ``(output, pull, aux)``.
        check: as for `lrp`.
        remat: as for `lrp`.
        **kwargs: keyword arguments of the model.

    Returns:
        ``(output, pull)``; ``pull(relevance_out)`` folds relevance of the output's shape back to the input, and
        ``jax.vmap(pull)`` explains many targets on one forward pass.

    Example:
        >>> import jax, jax.numpy as jnp, jaxlrp
        >>> output, pull = jaxlrp.lrp_vjp(lambda x, w: x @ w, jnp.ones(2), jnp.eye(2), composite=jaxlrp.Epsilon())
        >>> jax.vmap(pull)(jnp.eye(2) * output).round(3)
        Array([[1., 0.],
               [0., 1.]], dtype=float32)
    """
    if any(isinstance(argument, (Composite, Rule)) for argument in args):
        raise TypeError("lrp_vjp takes the composite by name: lrp_vjp(model, params, x, composite=...)")
    forward = Setup(model, composite, argnums, has_aux, check, remat).forward(args, kwargs)

    def pull(relevance: Any) -> Any:
        of_class = "for a class k it is jaxlrp.targets.logit(k)(output)"
        demand = f"the relevance to pull back ({of_class}) must have the output's own shape"
        check_shape(relevance, forward.output, demand)
        return forward.gather(forward.fold(relevance).relevance)

    return (forward.output, pull, forward.aux) if has_aux else (forward.output, pull)


def layerwise_lrp(
    model: Any,
    composite: Composite | Rule | None = None,
    capture: str | Sequence[str] = "**",
    *,
    argnums: int | Sequence[int] | None = None,
    target: Any = None,
    has_aux: bool = False,
    check: bool = False,
    remat: bool = False,
) -> Explain:
    """As `lrp`, but ``explain`` returns ``(relevance, {layer name: relevance at that layer's input})``.

    The relevance of a hidden value is all that arrives there, from every layer that reads it. A layer with several
    inputs (a residual sum, a product) gives a tuple. Layers come in the order in which the model runs them; out of
    `jax.jit` or `jax.vmap` by name, as jax sorts the keys of every dictionary. Layers that have the same relevance may
    share one array.

    Args:
        model: as for `lrp`.
        composite: as for `lrp`.
        capture: a glob of layer names, or several: ``"**"`` is every layer, ``"**/Conv_*"`` the convolutions.
        argnums: as for `lrp`.
        target: as for `lrp`.
        has_aux: as for `lrp`; returns ``(relevance, captured, aux)``.
        check: as for `lrp`.
        remat: as for `lrp`.

    Raises:
        UnknownLayerError: a glob that matches no layer.
    """
    default = target
    patterns = [capture] if isinstance(capture, str) else list(capture)
    setup = Setup(model, composite, argnums, has_aux, check, remat)

    def explain(*args: Any, target: Any = None, **kwargs: Any) -> Any:
        forward = setup.forward(args, kwargs)
        layers = [a.layer for a, _ in forward.assignments.every()]
        wanted = {
            layer.name for pattern in patterns for layer in itertools.compress(layers, Name(pattern).select(layers))
        }
        start = seed(default if target is None else target, forward.output)
        relevance, seen, _ = forward.fold(start, _Capture())
        captured = {}
        for assignment, depth in forward.assignments.every():
            name = assignment.layer.name
            if name in wanted and (name in seen or depth == 0):  # where none came, there is none
                nothing = tuple(at(relevance, v) for v in assignment.layer.inputs)
                parts = seen.get(name, nothing)
                captured[name] = parts[0] if len(parts) == 1 else parts
        result = (forward.gather(relevance), captured)
        return (*result, forward.aux) if has_aux else result

    return explain


class _Capture:
    """Watches a fold and keeps the relevance of every layer's inputs, one entry per step inside of a scan."""

    def see(self, assignment: Assignment, step: Step, relevance: Relevances) -> tuple[jax.Array, ...]:
        return tuple(at(relevance, v) for v in assignment.layer.inputs)

    def join(self, seen: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return seen


class Layers(tuple[Layer, ...]):
    """The layers of a model in execution order; prints as a table, the layers inside of a recurrence below it."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, those of layers inside of recurrences and branches too."""
        return tuple(layer.name for layer, _ in every_layer(self))

    def __str__(self) -> str:
        rows = [
            ("  " * depth + a.name, f"{a.kind}/{a.op}", _shapes(a.inputs), _shapes(a.outputs), a.source)
            for a, depth in every_layer(self)
        ]
        return table(("layer", "kind", "input", "output", "source"), rows)


def _shapes(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values))


def trace(model: Any, *args: Any, argnums: int | Sequence[int] | None = None, **kwargs: Any) -> Layers:
    """The layer list of a model: what it is taken apart into.

    Arguments are those of ``explain``; arrays may be replaced by `jax.ShapeDtypeStruct`. Print the result, or hand it
    to `Composite.assign` to see which rule each layer gets and why.

    Example:
        >>> import jax.numpy as jnp, jaxlrp
        >>> layers = jaxlrp.trace(lambda x, w: jnp.tanh(x @ w), jnp.ones(2), jnp.ones((2, 3)))
        >>> [(layer.kind, layer.op) for layer in layers]
        [('linear', 'dense'), ('activation', 'tanh')]
    """
    return Setup(model, None, argnums).traced(args, kwargs).layers


# -- what all of them share -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Traced:
    """A model taken apart for given arguments, before any number is known."""

    program: Program
    main: Program  # without what serves auxiliary outputs alone
    layers: Layers
    leaves: list[Any]
    explained: list[tuple[Any, list[int]]]  # for each explained argument: its tree and its places among the inputs
    single: bool
    trees: dict[str, Any]
    nonnegative: frozenset[Value]  # values known never to be negative

    @property
    def sources(self) -> tuple[Value, ...]:
        """Where relevance ends."""
        return self.main.sources


@dataclasses.dataclass
class Forward:
    """A model after one forward pass, ready to fold relevance back."""

    traced: Traced
    assignments: Assignments
    known: Known
    env: Env
    output: Any
    aux: Any
    blocks: Blocks

    def fold(self, start: Any, watch: Watch | None = None) -> Folded:
        """Relevance of every value, from that of the output (a tree like the output)."""
        seeds = jax.tree.leaves(start)
        return fold(self.traced.main, self.assignments, self.env, seeds, self.known, watch, self.blocks)

    def gather(self, relevance: Relevances) -> Any:
        """Relevance in the shape of the explained arguments."""
        inputs = self.traced.program.inputs

        def of(place: int) -> Any:
            found = [at(relevance, v) for v in self.traced.sources if inputs[place] in (v, v.token)]
            return found[0] if len(found) == 1 else tuple(found) or None  # integers that look nothing up: None

        parts = [jax.tree.unflatten(tree, [of(i) for i in places]) for tree, places in self.traced.explained]
        return parts[0] if self.traced.single else tuple(parts)


@dataclasses.dataclass
class Setup:
    """What `lrp` and its relatives were called with."""

    model: Any
    composite: Composite | Rule | None
    argnums: int | Sequence[int] | None
    has_aux: bool = False
    check: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        self.adapted: Adapted = as_function(self.model)
        self.composite = as_composite(self.composite)

    def traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
        """Trace the model and find its layers."""
        args = self.adapted.prepare(args)
        argnums = self.adapted.argnums if self.argnums is None else self.argnums
        single = not isinstance(argnums, (tuple, list))
        chosen = _positions((argnums,) if single else tuple(argnums), len(args))

        leaves, tree, paths, places = _flatten(args, kwargs)
        explained = []
        for k in chosen:
            mine = [i for i, path in enumerate(paths) if path[0] == k]
            _check_explained(args[k], k, mine, leaves)
            explained.append((jax.tree.structure(args[k]), mine))
        which = {i for _, mine in explained for i in mine}
        trees: dict[str, Any] = {}

        def flat(*arrays: Any) -> list[Any]:
            new_args, new_kwargs = tree(arrays)
            result = self.adapted.fun(*new_args, **new_kwargs)
            output, aux = result if self.has_aux else (result, None)
            out_leaves, trees["output"] = jax.tree.flatten(output)
            aux_leaves, trees["aux"] = jax.tree.flatten(aux)
            trees["live"] = len(out_leaves)
            return [*out_leaves, *aux_leaves]

        names = [path[1] for path in paths]
        dynamic = [i for i in range(len(leaves)) if i in places]
        arrays = [leaves[i] for i in dynamic]
        try:
            program = trace_program(flat, arrays, [i in which for i in dynamic], [names[i] for i in dynamic])
        except Exception as error:
            error.add_note(f"jaxlrp was tracing the model with {_describe(args, kwargs)}")
            if len(args) > max(chosen) + 1:
                error.add_note("what comes by position goes to the model; a target comes by name: target=labels")
            if isinstance(error, jax.errors.ConcretizationTypeError):
                error.add_note(
                    "flags such as train=False must stay Python values: name them in jax.jit's static_argnames"
                )
            raise
        position = {leaf: k for k, leaf in enumerate(dynamic)}
        explained = [(t, [position[i] for i in mine]) for t, mine in explained]
        main = program.serving(program.outputs[: trees["live"]])
        _check_lookups(main, explained, chosen, arrays)
        if not any(v.carries for v in main.outputs):
            raise InputError(
                "no output of the model depends on the explained input by way of real numbers; check argnums"
            )
        layers = Layers(find_layers(main, self.adapted.root))
        return Traced(program, main, layers, arrays, explained, single, trees, nonnegative_values(main))

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
        """Trace the model, give every layer its rule and run the model once."""
        traced = self.traced(args, kwargs)
        if self.check:
            _check_finite(self.adapted.prepare(args))
        assert isinstance(self.composite, Composite)
        assignments = self.composite.assign(traced.layers)
        blocks = find_blocks(traced.main, traced.layers) if self.remat else own_blocks(traced.main)
        positive = positive_values(traced.main, assignments)
        rectified = rectified_values(traced.main, assignments, positive, blocks)
        parts = summands(traced.main, assignments, rectified, blocks)
        pooled = pooled_values(traced.main, assignments, rectified, blocks)
        frugal = frugal_convolutions(traced.program, assignments, positive)
        known = Known(traced.nonnegative, positive, rectified, pooled, parts, frugal, constant_values(assignments))
        once = forks(traced.layers).union(rectified.values())
        env = traced.program.evaluate(traced.leaves, once=once, frugal=frugal)
        if self.check:
            for assignment in assignments:
                assignment.rule.check(assignment.layer, tuple(read(env, v) for v in assignment.layer.inputs))
        values = [read(env, v) for v in traced.program.outputs]
        live = traced.trees["live"]
        output = jax.tree.unflatten(traced.trees["output"], values[:live])
        aux = jax.tree.unflatten(traced.trees["aux"], values[live:])
        return Forward(traced, assignments, known, env, output, aux, blocks)


def _positions(argnums: Sequence[Any], count: int) -> tuple[int, ...]:
    for k in map(operator.index, argnums):
        if not -count <= k < count:
            raise InputError(
                f"argnums={k}, but explain() was given {count} positional arguments; "
                "a module takes its parameters first: explain(params, x)"
            )
    return tuple(operator.index(k) % count for k in argnums)


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any, list[tuple[Any, str]], set[int]]:
    """Leaves of all arguments, how to put them back, their names, and which of them are arrays.

    Flags such as ``train=False`` and strings are not arrays: the model may branch on them, so they stay as they are.
    """
    keyed, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
    leaves = [leaf for _, leaf in keyed]
    paths = []
    for path, _ in keyed:
        (which, place, *rest) = path
        argument = place.idx if which.idx == 0 else place.key
        paths.append((argument, jax.tree_util.keystr(tuple(rest), simple=True, separator="/")))
    arrays = {i for i, leaf in enumerate(leaves) if _is_array(leaf)}

    def rebuild(values: Sequence[Any]) -> Any:
        rest = iter(values)
        return jax.tree.unflatten(structure, [next(rest) if i in arrays else x for i, x in enumerate(leaves)])

    return leaves, rebuild, paths, arrays


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)) or (
        isinstance(leaf, (float, complex)) and not isinstance(leaf, bool)
    )


def _check_explained(argument: Any, k: int, places: Sequence[int], leaves: Sequence[Any]) -> None:
    if not places:
        raise InputError(f"argument {k} has nothing to explain: it holds no arrays")
    for i in places:
        leaf = leaves[i]
        if not _is_array(leaf) or not (
            jnp.issubdtype(jnp.result_type(leaf), np.floating) or jnp.issubdtype(jnp.result_type(leaf), np.integer)
        ):
            raise InputError(_not_real(k, jnp.result_type(leaf) if _is_array(leaf) else None, leaf))


def _check_lookups(
    main: Program, explained: Sequence[tuple[Any, Any]], chosen: Sequence[int], arrays: Sequence[Any]
) -> None:
    """Explained integers must be token ids: something must look embeddings up by them."""
    found = {v.token or v for v in main.sources}
    for k, (_, places) in zip(chosen, explained, strict=True):
        values = [main.inputs[i] for i in places]
        if not any(v.depends or v in found for v in values):
            raise InputError(_not_real(k, arrays[places[0]].dtype, None))


def _not_real(k: int, dtype: Any, leaf: Any) -> str:
    what = f"{np.dtype(dtype).name} array" if dtype is not None else type(leaf).__name__
    return (
        f"argument {k} holds a {what}: relevance needs real numbers, or token ids that the model looks embeddings up "
        "by. Convert images to float (x.astype(jnp.float32)), or choose another argument with argnums."
    )


def _check_finite(args: tuple[Any, ...]) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if not _is_array(leaf) or not jnp.issubdtype(jnp.result_type(leaf), np.inexact):
            continue
        if not _compat.is_concrete(leaf):
            raise InputError("check=True needs concrete arrays: call explain outside jax.jit, or check before")
        bad = int(jnp.sum(~jnp.isfinite(leaf)))
        if bad:
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            where = f"argument {path[0].idx}" + (f", '{name}'" if name else "")  # type: ignore[attr-defined]
            raise InputError(f"{where}: {bad} of {jnp.size(leaf)} numbers are NaN or infinite")


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def one(arg: Any) -> str:
        leaves = jax.tree.leaves(arg)
        if len(leaves) == 1 and hasattr(leaves[0], "shape"):
            return f"{leaves[0].dtype}{list(leaves[0].shape)}"
        return f"{type(arg).__name__} of {len(leaves)} arrays" if leaves else repr(arg)

    return "(" + ", ".join([*map(one, args), *(f"{k}={one(v)}" for k, v in kwargs.items())]) + ")"
