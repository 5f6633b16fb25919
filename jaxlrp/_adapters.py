"""Models as pure functions: modules of Flax Linen and NNX, Keras, Equinox and Haiku, and plain functions.

Keras, Equinox and Haiku are optional and never imported here: whoever has a model of theirs has loaded them already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from .errors import NotDeterministicError


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model as a pure function.

    Attributes:
        fun: the function of all arguments, parameters first where the model has any.
        argnums: the argument that is explained unless the user says otherwise.
        root: the outermost name in the model's name stack, dropped from layer names.
        prepare: turns the arguments a user gives into those that ``fun`` takes (an NNX module into its state).
    """

    fun: Callable[..., Any]
    argnums: int
    root: str | None = None
    prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda args: args


def as_function(model: Any) -> Adapted:
    """A module of any of the known libraries, or a pure function, as a pure function.

    * Linen: ``fun(variables, *inputs, **kwargs)`` is ``model.apply``; the first input is explained. The bound method
      ``model.apply`` itself is taken for its module.
    * NNX: ``fun(state, *inputs, **kwargs)`` merges the state into the module; the first input is explained.
    * Keras: ``fun(variables, *inputs, **kwargs)`` is the output of ``model.stateless_call`` in inference, with the
      variables by name; the first input is explained.
    * Equinox: ``fun(module, *inputs, **kwargs)`` calls the module; the first input is explained.
    * Haiku: ``fun(params, *inputs, **kwargs)`` or ``fun(params, state, *inputs, **kwargs)`` is ``model.apply`` without
      random numbers; the first input is explained.
    * A function is taken as it is; its first argument is explained, as `jax.grad` would differentiate it.

    Raises:
        TypeError: the model is none of these.
    """
    if isinstance(model, nn.Module):
        return _linen(model)
    if isinstance(model, nnx.Module):
        return _nnx(model)
    if _of_library(model, "keras", "Layer"):
        return _keras(model)
    if _of_library(model, "haiku", "Transformed") or _of_library(model, "haiku", "TransformedWithState"):
        return _haiku(model)
    if isinstance(model, type):
        made = f"{model.__name__}(...)"
        if issubclass(model, getattr(sys.modules.get("haiku"), "Module", ())):
            made = f"hk.transform(lambda x: {made}(x))"
        raise TypeError(f"{model.__name__} is a class; give an instance of it as model: {made}")
    if _of_library(model, "equinox", "Module") and callable(model):
        return _equinox(model)
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(model, "__name__", "") == "apply":
        return _linen(owner)  # nobody means to explain the parameters
    if callable(model):
        return Adapted(model, 0)
    raise TypeError(
        "model must be a flax.linen.Module, a flax.nnx.Module or a function of arrays (or a Keras model, an Equinox "
        f"module, a Haiku transform), not {type(model).__name__}"
    )


def _of_library(model: Any, library: str, name: str) -> bool:
    """Whether a model is an instance of a class of a library that may not be installed."""
    return isinstance(model, getattr(sys.modules.get(library), name, ()))


# -- Linen -----------------------------------------------------------------------------------------------------------


def _linen(model: nn.Module) -> Adapted:
    def fun(variables: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(variables, Mapping):
            raise TypeError(
                f"explain() of {type(model).__name__} takes its variables first, as model.apply does: "
                f"explain(params, x), not {_describe(variables)}"
            )
        try:
            with _training_mode_is_an_error(), nn.intercept_methods(_refuse_training):
                return model.apply(variables, *args, **kwargs)
        except flax.errors.FlaxError as error:
            if variables and "params" not in variables:
                error.add_note('variables come by collection: explain({"params": params, ...}, x), as in model.apply')
            raise

    return Adapted(fun, 1, model.name or type(model).__name__)


def _refuse_training(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Flax shows every module's call to this function; dropout and batch statistics must be switched off."""
    module = context.module
    path = "/".join(module.path) or type(module).__name__
    if context.method_name == "__call__" and isinstance(module, nn.Dropout):
        deterministic = kwargs.get("deterministic", args[1] if len(args) > 1 else None)
        deterministic = module.deterministic if deterministic is None else deterministic
        if deterministic is False and module.rate > 0:
            raise NotDeterministicError(_dropout_is_on(path))
    if context.method_name == "__call__" and isinstance(module, nn.BatchNorm):
        running = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
        running = module.use_running_average if running is None else running
        if running is False:
            raise NotDeterministicError(_batch_statistics_are_on(path))
    return call(*args, **kwargs)


@contextlib.contextmanager
def _training_mode_is_an_error() -> Iterator[None]:
    try:
        yield
    except flax.errors.InvalidRngError as error:
        raise NotDeterministicError(
            f"the model asks for random numbers: {error} Call it with deterministic=True (or train=False)."
        ) from error


def _dropout_is_on(path: str, what_to_do: str = "") -> str:
    what_to_do = what_to_do or (
        "Call it with deterministic=True (or whatever argument your model uses for that, such as train=False)."
    )
    return f"dropout is on in layer '{path}': relevance of a random model means little. {what_to_do}"


def _batch_statistics_are_on(path: str, what_to_do: str = "") -> str:
    what_to_do = what_to_do or (
        "Call it with use_running_average=True (or whatever argument your model uses for that, such as train=False)."
    )
    return (
        f"layer '{path}' normalises with the statistics of the batch, so that the images of a batch would explain each "
        f"other. {what_to_do}"
    )


# -- NNX -------------------------------------------------------------------------------------------------------------


def _nnx(model: nnx.Module) -> Adapted:
    for path, module in nnx.iter_graph(model):
        name = "/".join(map(str, path)) or type(module).__name__
        if isinstance(module, nnx.Dropout) and not module.deterministic and module.rate > 0:
            raise NotDeterministicError(_dropout_is_on(name, "Call model.eval() before jaxlrp.lrp(model)."))
        if isinstance(module, nnx.BatchNorm) and not module.use_running_average:
            raise NotDeterministicError(_batch_statistics_are_on(name, "Call model.eval() before jaxlrp.lrp(model)."))
    graph, whole = nnx.split(model)
    size = len(jax.tree.leaves(whole))

    def fun(state: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(state, Mapping) or len(jax.tree.leaves(state)) != size:
            raise TypeError(
                f"explain() of {type(model).__name__} takes the module itself first or all of its state, statistics "
                f"and random keys too: explain(nnx.state(model), x), {size} arrays; not {_describe(state)} of "
                f"{len(jax.tree.leaves(state))}"
            )
        return nnx.merge(graph, state)(*args, **kwargs)

    def prepare(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args and isinstance(args[0], nnx.Module):
            return (nnx.state(args[0]), *args[1:])
        return args

    return Adapted(fun, 1, prepare=prepare)


# -- Keras -----------------------------------------------------------------------------------------------------------


def _keras(model: Any) -> Adapted:
    keras: Any = sys.modules["keras"]
    if (backend := keras.config.backend()) != "jax":
        raise TypeError(
            f"Keras runs on its {backend} backend, but jaxlrp can only look into models that compute with jax: "
            "set the environment variable KERAS_BACKEND=jax before keras is imported"
        )
    inference = {"training": False} if "training" in inspect.signature(model.call).parameters else {}

    def fun(named: Any, *args: Any, **kwargs: Any) -> Any:
        trainable, fixed = model.trainable_variables, model.non_trainable_variables
        # Cast as Keras would, so that what comes back unchanged is the very same array.
        variables = zip((*trainable, *fixed), _keras_names(model), strict=True)
        values = [jnp.asarray(named[name], variable.dtype) for variable, name in variables]
        before = values[len(trainable) :]
        output, after = model.stateless_call(values[: len(trainable)], before, *args, **{**inference, **kwargs})
        for variable, old, new in zip(fixed, before, after, strict=True):
            if new is not old:
                _refuse_keras_training(variable)
        return output

    def prepare(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            return args
        given, *rest = args
        if isinstance(given, keras.Layer):
            given = (given.trainable_variables, given.non_trainable_variables)
        expected = [len(model.trainable_variables), len(model.non_trainable_variables)]
        if not isinstance(given, (tuple, list)) or [len(v) for v in given if isinstance(v, (tuple, list))] != expected:
            raise TypeError(
                "explain takes a Keras model itself first, or (under jax.jit) the values of its variables, a pair of "
                f"lists: {expected[0]} of model.trainable_variables, {expected[1]} of model.non_trainable_variables; "
                f"not {_describe(given)}"
            )
        values = [v.value if isinstance(v, keras.Variable) else v for v in (*given[0], *given[1])]
        return (dict(zip(_keras_names(model), values, strict=True)), *rest)

    return Adapted(fun, 1, prepare=prepare)


def _keras_names(model: Any) -> list[str]:
    """A name for each variable of a model, starting with the model's own: ``"net/dense/kernel"``."""
    names: list[str] = []
    for variable in (*model.trainable_variables, *model.non_trainable_variables):
        name = variable.path if variable.path.startswith(f"{model.name}/") else f"{model.name}/{variable.path}"
        names.append(f"{name}:{len(names)}" if name in names else name)
    return names


def _refuse_keras_training(changed: Any) -> None:
    """The variables that a call changes tell what is switched on: running averages, the state of random numbers."""
    advice = "Call it with training=False, as explain does unless told otherwise."
    if changed.name == "seed_generator_state":
        raise NotDeterministicError(
            f"the model draws random numbers (dropout is on): relevance of a random model means little. {advice}"
        )
    if changed.name in ("moving_mean", "moving_variance"):
        raise NotDeterministicError(_batch_statistics_are_on(changed.path.rpartition("/")[0], advice))


# -- Equinox ---------------------------------------------------------------------------------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A number in a module that is no array: the module may branch on it, so it must not be traced."""

    value: float


def _wrap(leaf: Any) -> Any:
    return _Static(leaf) if isinstance(leaf, float) else leaf


def _unwrap(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, _Static) else leaf


def _equinox(model: Any) -> Adapted:
    eqx: Any = sys.modules["equinox"]
    rest = eqx.filter(model, eqx.is_array, inverse=True)
    advice = "Give explain the model in inference: eqx.nn.inference_mode(model)."

    def fun(module: Any, *args: Any, **kwargs: Any) -> Any:
        module = jax.tree.map(_unwrap, module, is_leaf=lambda leaf: isinstance(leaf, _Static))
        for name, _ in _training(module, eqx.nn.BatchNorm):
            raise NotDeterministicError(_batch_statistics_are_on(name, advice))
        try:
            return module(*args, **kwargs)
        except RuntimeError as error:  # a call may also switch dropout off itself, so it must be tried
            for name, layer in _training(module, eqx.nn.Dropout):
                if layer.p > 0 and "key" in str(error):
                    raise NotDeterministicError(_dropout_is_on(name, advice)) from error
            raise

    def prepare(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            return args
        given, *inputs = args
        if not isinstance(given, type(model)):
            raise TypeError(
                "explain takes an Equinox module itself first (or its arrays, eqx.filter(model, eqx.is_array)), then "
                f"its inputs: it needs a {type(model).__name__}, not {_describe(given)}"
            )
        return (jax.tree.map(_wrap, eqx.combine(given, rest)), *inputs)

    return Adapted(fun, 1, prepare=prepare)


def _training(module: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """The parts of an Equinox module that are of a kind and in training mode, by name."""
    for path, part in jax.tree_util.tree_leaves_with_path(module, is_leaf=lambda part: isinstance(part, kind)):
        if isinstance(part, kind) and not part.inference:  # type: ignore[attr-defined]
            yield jax.tree_util.keystr(path, simple=True, separator="/") or kind.__name__, part


# -- Haiku -----------------------------------------------------------------------------------------------------------


def _haiku(model: Any) -> Adapted:
    hk: Any = sys.modules["haiku"]
    first = 2 if isinstance(model, hk.TransformedWithState) else 1  # params, perhaps state, then the inputs
    takes_rng = "rng" in inspect.signature(model.apply).parameters

    def refuse_training(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Haiku shows every module's call to this function, as Flax does."""
        if context.method_name == "__call__" and isinstance(context.module, hk.BatchNorm):
            for place, flag in ((1, "is_training"), (2, "test_local_stats")):
                if kwargs.get(flag, args[place] if len(args) > place else False):
                    advice = f"Call it with {flag}=False (or whatever argument your model uses for that)."
                    raise NotDeterministicError(_batch_statistics_are_on(context.module.module_name, advice))
        return call(*args, **kwargs)

    def fun(*args: Any, **kwargs: Any) -> Any:
        rng = [None] if takes_rng else []
        try:
            with hk.intercept_methods(refuse_training):
                return model.apply(*args[:first], *rng, *args[first:], **kwargs)
        except ValueError as error:
            if type(error).__name__ != "MissingRNGError":  # Haiku does not export it
                raise
            raise NotDeterministicError(
                f"the model asks for random numbers: {error} Call it with dropout off (is_training=False, or whatever "
                "argument your model uses for that)."
            ) from error

    return Adapted(fun, first)


def _describe(given: Any) -> str:
    shape = getattr(given, "shape", None)
    return f"a {type(given).__name__}" if shape is None else f"an array of shape {tuple(shape)}"
