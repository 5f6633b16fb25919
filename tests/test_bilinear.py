"""Matrix products of few rows are transposed with the matrix as it lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxlrp


@st.composite
def products(draw):
    """A matrix product of any axes, its two operands, and which of them is the input."""
    shared, of_x, of_w = (draw(st.integers(low, 2)) for low in (1, 0, 0))
    sizes = draw(st.lists(st.integers(1, 4), min_size=shared + of_x + of_w, max_size=shared + of_x + of_w))
    names = "abcdef"[: len(sizes)]
    size = dict(zip(names, sizes, strict=True))
    x = draw(st.permutations(names[: shared + of_x]))
    w = draw(st.permutations(names[:shared] + names[shared + of_x :]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    arrays = [jnp.asarray(rng.normal(size=[size[name] for name in axes])) for axes in (x, w)]
    over = [[axes.index(name) for name in names[:shared]] for axes in (x, w)]
    side = draw(st.integers(0, 1))

    def run(x, w):
        operands, axes = ((x, w), over) if side == 0 else ((w, x), over[::-1])
        return lax.dot_general(*operands, (axes, ((), ())))

    return run, *arrays


@pytest.mark.usefixtures("x64")
@given(products())
def test_equals_gradient_x_input(case):
    run, x, w = case
    explain = jaxlrp.lrp(run, jaxlrp.Composite.uniform(jaxlrp.Epsilon(1e-300)))
    want = x * jax.grad(lambda x: run(x, w).sum())(x)
    np.testing.assert_allclose(explain(x, w), want, atol=1e-9 * float(jnp.abs(x).max() * jnp.abs(w).sum()))


@pytest.mark.parametrize(("rows", "left"), [((), True), ((4,), True), ((8, 8), True), ((65,), False), ((9, 8), False)])
def test_the_matrix_is_the_left_operand_where_rows_are_few(rows, left):
    x, w = jnp.ones((*rows, 32)), jnp.ones((32, 16))
    explain = jaxlrp.lrp(lambda x, w: x @ w, jaxlrp.Composite.uniform(jaxlrp.ZPlus()))
    on_the_left = [
        e.invars[0].aval.shape == w.shape
        for e in jax.make_jaxpr(explain)(x, w).eqns
        if e.primitive is lax.dot_general_p and e.outvars[0].aval.size == x.size  # it yields what the input gets
    ]
    assert {*on_the_left} == {left}
