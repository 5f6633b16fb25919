"""Convolutions that rules run themselves equal jax's own: forwards, and transposed against the dense Jacobian."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxlrp.convolutions import Convolution

LAYOUTS = [("NC{}", "OI{}", "NC{}"), ("N{}C", "{}IO", "N{}C"), ("{}NC", "I{}O", "N{}C")]


@st.composite
def convolutions(draw, depthwise=False, pointwise=False):
    rank = draw(st.integers(1, 2))
    each = lambda low, high: st.lists(st.integers(low, high), min_size=rank, max_size=rank)  # noqa: E731
    taps, strides, places = draw(each(1, 5)), draw(each(1, 4)), draw(each(5, 8))
    padding = draw(st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 2)), min_size=rank, max_size=rank))
    if pointwise:
        taps, strides, padding = [1] * rank, [1] * rank, [(0, 0)] * rank
    features, out = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    places_of = "HW"[:rank]
    layout = [spec.format(places_of) for spec in draw(st.sampled_from(LAYOUTS))]
    if depthwise:
        out = features
    sizes = {"N": 2, "C": features, "I": 1 if depthwise else features, "O": out}
    shape = lambda spec, of: [{**sizes, **dict(zip(places_of, of, strict=True))}[c] for c in spec]  # noqa: E731
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    x, w = (jnp.asarray(rng.normal(size=shape(s, of))) for s, of in zip(layout, (places, taps), strict=False))
    groups = features if depthwise else 1

    def run(x):
        return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, feature_group_count=groups)

    size = jax.eval_shape(run, x).shape
    assume(all(size))
    (equation,) = jax.make_jaxpr(run)(x).eqns
    return run, x, w, Convolution(equation.params, x.shape, w.shape), rng


def check_transpose(run, x, w, convolution, rng):
    assume(convolution.transposes)
    jacobian = jax.jacfwd(run)(x)
    coming = jnp.asarray(rng.normal(size=run(x).shape))
    want = jnp.tensordot(coming, jacobian, coming.ndim)
    np.testing.assert_allclose(convolution.transpose(w, coming), want, atol=1e-12)


@pytest.mark.usefixtures("x64")
@settings(deadline=None, max_examples=12)
@given(convolutions())
def test_transpose_by_phases(case):
    check_transpose(*case)


@pytest.mark.usefixtures("x64")
@settings(deadline=None, max_examples=12)
@given(convolutions(depthwise=True))
def test_depthwise(case):
    run, x, w, convolution, _ = case
    if convolution.features > 1:
        assert convolution.depthwise
        np.testing.assert_allclose(convolution.apply(x, w), run(x), atol=1e-12)
    check_transpose(*case)


@pytest.mark.usefixtures("x64")
@settings(deadline=None, max_examples=8)
@given(convolutions(pointwise=True))
def test_pointwise(case):
    run, x, w, convolution, _ = case
    assert convolution.applies
    np.testing.assert_allclose(convolution.apply(x, w), run(x), atol=1e-12)
    check_transpose(*case)
