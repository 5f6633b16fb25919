"""However an operation is written, it is the same layers and gets the same relevance: see the table in spellings.py."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spellings import GROUPS, LAYER_NORM, Function, Group

import jaxlrp

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported first
pytestmark = pytest.mark.usefixtures("x64")

# The compiled code runs once, so XLA need not take pains with it.
HASTY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
RULES = jaxlrp.AttnLRP(epsilon=0.0)  # without stabilisers LRP is gradient times input of another function


def cases(sample: bool = False) -> list[Any]:
    """Every spelling of every group. Of a sample one in three runs by default, all of them in CI."""
    every = [(name, spelling) for name, group in GROUPS.items() for spelling in group.spellings]
    return [pytest.param(*case, marks=[pytest.mark.heavy] * (sample and i % 3 > 0)) for i, case in enumerate(every)]


def numbers(name: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(f"{name}{shape}".encode())).normal(size=shape)


def arguments(group: Group) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An input of five features and parameters, for a network with the operation between two dense layers."""
    width = group.shape[-1]
    shapes = {**group.params, "before": (5, width), "shift": (width,), "after": (width, 3)}
    params = {name: numbers(name, *shape) for name, shape in shapes.items()}
    return numbers("x", *group.shape[:-1], 5), params


def network(operation: Function) -> Callable[[Any, Any], Any]:
    def net(x: Any, p: dict[str, Any]) -> Any:
        return operation(x @ p["before"] + p["shift"], p) @ p["after"]

    return net


def close(got: Any, want: Any, tolerance: float) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def gradient_times_input(fun: Callable[[Any], Any], x: Any, relevance: Any) -> Any:
    """LRP of a function whose derivative is made for it, from relevance at its output."""
    output, pull = jax.vjp(fun, x)
    return x * pull(relevance / output)[0]


def kinds(name: str, spelling: str, dtype: Any) -> str:
    """The kinds of layers that a network is made of, without moves and casts."""
    group = GROUPS[name]
    x, params = jax.tree.map(lambda a: jnp.asarray(a, dtype), arguments(group))
    layers = jaxlrp.trace(network(group.spellings[spelling]), x, params)
    return " ".join(layer.kind for layer in layers if layer.kind != "move" and layer.op != "identity")


@pytest.mark.parametrize(("name", "spelling"), cases())
def test_layers(name: str, spelling: str) -> None:
    assert kinds(name, spelling, jnp.float64) == f"linear {GROUPS[name].layers} linear"


@pytest.mark.parametrize(("name", "spelling"), cases(sample=True))
def test_layers_in_half_precision(name: str, spelling: str) -> None:
    if spelling == "normal cdf":
        pytest.skip("has no half precision")
    assert kinds(name, spelling, jnp.bfloat16) == f"linear {GROUPS[name].layers} linear"


@pytest.mark.parametrize(("name", "spelling"), cases(sample=True))
def test_relevance(name: str, spelling: str) -> None:
    group = GROUPS[name]
    x, params = arguments(group)
    wanted = network(group.lrp)
    relevance = numbers("relevance", *group.shape[:-1], 3)
    explain = jaxlrp.value_and_lrp(network(group.spellings[spelling]), RULES, target=lambda _: relevance)
    output, found = jax.jit(explain, compiler_options=HASTY)(x, params)
    tolerance = 1e-5 if spelling in group.single else 1e-10
    close(output, wanted(x, params), tolerance)
    close(found, gradient_times_input(lambda x: wanted(x, params), x, relevance), tolerance)


@pytest.mark.parametrize("spelling", LAYER_NORM.spellings)
def test_layer_norm_has_its_closed_form(spelling: str) -> None:
    """``R_i = sum_j x_i (d_ij - 1/N) R_j / sum_l x_l (d_lj - 1/N)``, without a shift (Ali et al., 2022)."""
    x, relevance = numbers("layer norm", 3, 6), numbers("relevance", 3, 6)
    params = {"g": numbers("g", 6), "b": np.zeros(6)}
    contributions = x[:, :, None] * (np.eye(6) - 1 / 6)  # of input i to output j, up to a factor that cancels
    expected = (contributions / contributions.sum(1, keepdims=True) * relevance[:, None, :]).sum(2)
    explain = jaxlrp.lrp(LAYER_NORM.spellings[spelling], RULES, target=lambda _: relevance)
    close(explain(x, params), expected, 1e-5 if spelling in LAYER_NORM.single else 1e-10)
