"""Max pooling backwards, by comparison, against jax's own derivative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from jax import lax

import jaxlrp


def pool(x, window, strides, padding, dilation=None, reducer=lax.max, start=-jnp.inf):
    return lax.reduce_window(x, start, reducer, window, strides, padding, window_dilation=dilation)


def folded(run, x, r):
    return jaxlrp.lrp(run, jaxlrp.Composite(), target=lambda _: r)(x)


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(
    size=st.tuples(st.integers(6, 9), st.integers(6, 9)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.tuples(st.integers(0, 1), st.integers(0, 1))] * 2),
    seed=st.integers(0, 1000),
)
@example(size=(6, 9), window=(2, 3), strides=(2, 3), padding=((0, 0), (0, 0)), seed=0)  # tiles
@example(size=(7, 9), window=(2, 3), strides=(2, 3), padding=((0, 0), (0, 0)), seed=0)  # a row is left over
def test_it_equals_jax_with_ties(size, window, strides, padding, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.integers(0, 3, (2, *size, 2)), jnp.float32)  # many ties
    run = lambda x: pool(  # noqa: E731
        x, (1, *window, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0))
    )
    r = jnp.asarray(rng.normal(size=run(x).shape), jnp.float32)
    # a window that lies in the padding altogether has no winner
    r = jnp.where(jnp.isfinite(run(x)), r, 0.0)
    np.testing.assert_allclose(folded(run, x, r), jax.vjp(run, x)[1](r)[0], atol=1e-6)


@pytest.mark.parametrize(("reducer", "start"), [(lax.max, -jnp.inf), (lax.min, jnp.inf)])
def test_max_and_min(rng, reducer, start):
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    run = lambda x: pool(x, (1, 2), (1, 2), "VALID", reducer=reducer, start=start)  # noqa: E731
    r = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    np.testing.assert_allclose(folded(run, x, r), jax.vjp(run, x)[1](r)[0])


def test_a_dilated_window(rng):  # jax has no derivative for it
    x = jnp.asarray(rng.permutation(7).astype(np.float32))
    z = folded(lambda x: pool(x, (3,), (1,), "VALID", (2,)), x, jnp.array([1.0, 10.0, 100.0]))
    expected = np.zeros(7)
    for i, r in enumerate((1.0, 10.0, 100.0)):
        expected[i + 2 * int(np.argmax(x[i : i + 5 : 2]))] += r
    np.testing.assert_allclose(z, expected)


def test_no_scatter_is_left_in_the_program(rng):
    x = jnp.asarray(rng.normal(size=(1, 8, 8, 2)), jnp.float32)
    run = lambda x: pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")  # noqa: E731
    text = jax.jit(jaxlrp.lrp(run, jaxlrp.Composite())).lower(x).as_text()
    assert "select_and_scatter" not in text
    assert "select_and_scatter" in jax.jit(jax.grad(lambda x: run(x).sum())).lower(x).as_text()


ROUNDED = {  # XLA computes the pool's input again for the way back: of more bits than a bfloat16 has
    "tiles": lambda h: pool(h, (1, 2), (1, 2), "VALID"),
    "minimum": lambda h: pool(h, (1, 2), (1, 2), "VALID", reducer=lax.min, start=jnp.inf),
    "overlapping": lambda h: pool(h, (1, 3), (1, 2), "SAME"),
    "whole axis": lambda h: h.max(-1, keepdims=True),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_no_window_is_lost_to_rounding_in_bfloat16(rng, name):
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((64, 8), (8, 32)))
    account = jax.jit(jaxlrp.ledger(lambda x: ROUNDED[name](jnp.tanh(x @ w)), jaxlrp.Epsilon()))(x)
    row = next(k for k, layer in enumerate(account.layers) if layer.startswith(("max", "min")))
    np.testing.assert_allclose(account.handed[row], account.arrived[row], rtol=1e-3)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("last", ["pool", "maximum"])
def test_no_window_is_lost_where_xla_joins_products_and_sums(last, checkpoint):
    shape = (3, 66, 66, 7)  # not of whole vectors: the last ones of a row are computed otherwise
    keys = jax.random.split(jax.random.key(1), 4)
    x, a, b, w = map(jax.random.normal, keys, (shape, (7,), (7,), (3, 3, 7, 7)))
    names = ("NHWC", "HWIO", "NHWC")

    def block(x, a, b, w):
        h = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=names) * a + b
        return pool(h, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").sum((1, 2)) if last == "pool" else h.max((1, 2))

    explain = jaxlrp.lrp(jax.checkpoint(block) if checkpoint else block, jaxlrp.Composite.uniform(jaxlrp.Epsilon()))
    alone, compiled = explain(x, a, b, w), jax.jit(explain)(x, a, b, w)
    np.testing.assert_allclose(jnp.sum(compiled), jnp.sum(alone), rtol=1e-3)


def test_nan_and_infinities_have_a_winner_if_there_is_a_number():
    x = jnp.array([[jnp.nan, 2.0, -jnp.inf, -jnp.inf, jnp.nan, jnp.nan]])
    back = folded(lambda x: jnp.nan_to_num(pool(x, (1, 2), (1, 2), "VALID")) * 1.0, x, jnp.array([[1.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(back, [[0.0, 1.0, 2.0, 0.0, 0.0, 0.0]])
