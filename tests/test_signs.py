"""The sign analysis: what it claims holds for every input and parameter, and it changes no relevance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from benchmarks.goldens import COMPOSITES, golden_nets
from jaxlrp import signs, transform
from jaxlrp.graph import Value, read, trace_program


def claims(fun: Callable[..., Any], *args: np.ndarray) -> list[tuple[Value, np.ndarray]]:
    """The values of a function that are claimed nonnegative, with their numbers."""
    program = trace_program(lambda *a: [fun(*a)], args, [True] * len(args), [""] * len(args))
    env = program.evaluate(args)
    return [(v, np.asarray(read(env, v))) for v in signs.nonnegative_values(program) if v in env]


FUNCTIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "relu": lambda x, w: jax.nn.relu(x) @ w,
    "relu6": lambda x, w: jax.nn.relu6(x @ w) + 1.0,
    "softmax": lambda x, w: jax.nn.softmax(x @ w) @ w.T,
    "sigmoid gate": lambda x, w: jax.nn.sigmoid(x) * jax.nn.relu(-x),
    "squares": lambda x, w: jnp.sqrt(jnp.mean(x**2, -1)) + jnp.abs(w).sum(),
    "pools": lambda x, w: nn.max_pool(jax.nn.relu(x)[None, :, :, None], (2, 2)) - 0.5,
    "moves": lambda x, w: jnp.concatenate([jax.nn.relu(x), x]).reshape(-1)[::2],
    "integers": lambda x, w: jax.nn.relu(x) + jnp.arange(-1, x.shape[-1] - 1).astype(x.dtype),
    "where": lambda x, w: jnp.where(x > 0, x, jnp.exp(x)) - jnp.where(w > 0, w, 0).sum(),
    "odd functions": lambda x, w: jnp.tanh(jax.nn.relu(x)) + jnp.sinh(x) * jnp.cbrt(w.sum()),
    "powers": lambda x, w: x**3 + x**4 + jax.nn.relu(x) ** 1.5,
    "clamp": lambda x, w: jnp.clip(x, 0.0, 1.0) + jax.lax.clamp(-1.0, x, 2.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_claimed_nonnegative_never_is_negative(name: str) -> None:
    rng = np.random.default_rng(0)
    claimed = 0
    for _ in range(10):
        found = claims(FUNCTIONS[name], rng.normal(size=(4, 4)).astype("f4"), rng.normal(size=(4, 4)).astype("f4"))
        claimed += len(found)
        for value, numbers in found:
            assert (numbers.astype(float) >= 0).all(), value
    assert claimed, "an analysis that claims nothing proves nothing"


def test_a_relu_is_known_to_be_nonnegative_through_pools_and_sums() -> None:
    def net(x: jax.Array) -> jax.Array:
        x = nn.avg_pool(nn.max_pool(jax.nn.relu(x), (2, 2)), (2, 2))
        return (x + jax.nn.relu6(x)).mean((1, 2))

    program = trace_program(lambda x: [net(x)], [np.zeros((1, 8, 8, 3), np.float32)], [True], [""])
    assert program.outputs[0] in signs.nonnegative_values(program)


def test_the_analysis_changes_no_relevance(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, variables, data = golden_nets()["vgg_bn"]
    for name, composite in COMPOSITES.items():
        explain = jax.jit(jaxlrp.lrp(module, composite))
        with_signs = explain(variables, data["x"], target=data["label"])
        with monkeypatch.context() as patch:
            patch.setattr(transform, "nonnegative_values", lambda program: frozenset())
            without = jax.jit(jaxlrp.lrp(module, composite))(variables, data["x"], target=data["label"])
        np.testing.assert_allclose(with_signs, without, atol=1e-12 * np.abs(without).max(), err_msg=name)
