"""Models as pure functions: Flax Linen modules, Flax NNX modules and plain functions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.errors
import flax.linen as nn
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
    """A Linen module, an NNX module or a pure function as a pure function.

    * Linen: ``fun(variables, *inputs, **kwargs)`` is ``model.apply``; the first input is explained. The bound method
      ``model.apply`` itself is taken for its module.
    * NNX: ``fun(state, *inputs, **kwargs)`` merges the state into the module; the first input is explained.
    * A function is taken as it is; its first argument is explained, as `jax.grad` would differentiate it.

    Raises:
        TypeError: the model is none of these.
    """
    if isinstance(model, nn.Module):
        return _linen(model)
    if isinstance(model, nnx.Module):
        return _nnx(model)
    if isinstance(model, type):
        raise TypeError(f"{model.__name__} is a class; give an instance of it as model: {model.__name__}(...)")
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(model, "__name__", "") == "apply":
        return _linen(owner)  # nobody means to explain the parameters
    if callable(model):
        return Adapted(model, 0)
    raise TypeError(
        f"model must be a flax.linen.Module, a flax.nnx.Module or a function of arrays, not {type(model).__name__}"
    )


# -- Linen -----------------------------------------------------------------------------------------------------------


def _linen(model: nn.Module) -> Adapted:
    def fun(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with _training_mode_is_an_error(), nn.intercept_methods(_refuse_training):
            return model.apply(variables, *args, **kwargs)

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


def _dropout_is_on(path: str) -> str:
    return (
        f"dropout is on in layer '{path}': relevance of a random model means little. "
        "Call it with deterministic=True (or whatever argument your model uses for that, such as train=False)."
    )


def _batch_statistics_are_on(path: str) -> str:
    return (
        f"layer '{path}' normalises with the statistics of the batch, so that the images of a batch would explain each "
        "other. Call it with use_running_average=True (or whatever argument your model uses for that, such as "
        "train=False)."
    )


# -- NNX -------------------------------------------------------------------------------------------------------------


def _nnx(model: nnx.Module) -> Adapted:
    for path, module in nnx.iter_graph(model):
        name = "/".join(map(str, path)) or type(module).__name__
        if isinstance(module, nnx.Dropout) and not module.deterministic and module.rate > 0:
            raise NotDeterministicError(_dropout_is_on(name) + " For NNX: model.eval().")
        if isinstance(module, nnx.BatchNorm) and not module.use_running_average:
            raise NotDeterministicError(_batch_statistics_are_on(name) + " For NNX: model.eval().")
    graph = nnx.graphdef(model)

    def fun(state: Any, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graph, state)(*args, **kwargs)

    def prepare(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args and isinstance(args[0], nnx.Module):
            return (nnx.state(args[0]), *args[1:])
        return args

    return Adapted(fun, 1, prepare=prepare)
