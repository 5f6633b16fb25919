"""Convolutions with half of the multiplications: what they compute, what they lose, and who gets them."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxlrp
from jaxlrp import convolutions, winograd

EPSILON = float(np.finfo(np.float32).eps)
LAYOUTS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}


def numbers(rank: int) -> Any:
    shape = (1,) * (rank + 2)
    return lax.conv_dimension_numbers(shape, shape, LAYOUTS[rank])


def convolved(x: Any, kernel: Any, padding: Any) -> tuple[np.ndarray, np.ndarray]:
    """With half of the multiplications in float32, and in full in float64."""
    rank = x.ndim - 2
    run = jax.jit(lambda x, k: winograd.convolve(x, k, padding, dimension_numbers=numbers(rank)))
    got = np.asarray(run(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)))
    with jax.enable_x64(True):
        want = lax.conv_general_dilated(
            jnp.asarray(x), jnp.asarray(kernel), (1,) * rank, padding, dimension_numbers=LAYOUTS[rank]
        )
    return got, np.asarray(want)


def test_four_results_of_six_products():
    a, g, b = winograd.matrices()
    rng = np.random.default_rng(0)
    inputs, taps = rng.normal(size=6), rng.normal(size=3)
    np.testing.assert_allclose(a @ ((g @ taps) * (b @ inputs)), np.convolve(inputs, taps[::-1], "valid"), rtol=1e-13)


@given(st.data())
def test_equals_a_plain_convolution(data):
    rank = data.draw(st.integers(1, 3))
    places = data.draw(st.lists(st.integers(3, 9), min_size=rank, max_size=rank))
    taps = [3, *data.draw(st.lists(st.integers(1, 3), min_size=rank - 1, max_size=rank - 1))]
    padding = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=rank, max_size=rank))
    padding[0] = data.draw(st.sampled_from([*padding[:1], (-1, 1), (1, -1), (-1, 0)]))
    if places[0] + sum(padding[0]) < 3:
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    x, kernel = rng.normal(size=(2, *places, 5)), rng.normal(size=(*taps, 5, 4))
    with jax.numpy_rank_promotion("raise"):
        got, want = convolved(x, kernel, padding)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=100 * EPSILON * np.abs(want).max())


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_one_sign_lose_little(sign):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(1, 22, 8, 64)), 0.0)
    got, want = convolved(x, sign * np.maximum(rng.normal(size=(3, 3, 64, 32)), 0.0), [(1, 1), (1, 1)])
    np.testing.assert_allclose(got, want, rtol=30 * EPSILON)


@pytest.mark.parametrize(
    ("samples", "places", "features", "out", "pays"),
    [
        (1, (224, 224), 64, 64, True),
        (1, (160, 160), 64, 64, False),  # too few multiplications
        (8, (160, 160), 63, 64, False),
        (8, (160, 160), 64, 63, False),
        (1, (22, 22), 1024, 1024, False),
        (2, (22, 22), 1024, 1024, True),
        (1, (22, 22, 22), 256, 256, True),
        (8, (1, 512), 1024, 1024, False),  # of each four results three would be of no use
        (32, (5, 5), 1024, 1024, False),
        (32, (7, 7), 1024, 1024, True),
    ],
)
def test_large_layers_with_many_places_pay(samples, places, features, out, pays):
    taps = [3, *(3 for _ in places[1:])]
    assert winograd.pays(samples, places, taps, features, out) is pays


def test_nan_stays():
    x = np.ones((1, 12, 4, 8))
    x[0, 6, 2, 3] = np.nan
    got, want = convolved(x, np.ones((3, 3, 8, 8)), [(1, 1), (1, 1)])
    assert np.isnan(got[np.isnan(want)]).all()


# -- who gets them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with few multiplications as well, or tests would take long."""
    monkeypatch.setattr(winograd, "_MULTIPLICATIONS", 0)


uses_small = pytest.mark.usefixtures("small_pays")


class Net(nn.Module):
    """Convolutions of which the second to last are large enough."""

    precision: Any = None
    activation: Any = nn.relu

    @nn.compact
    def __call__(self, x):
        for features in (64, 64, 96):
            x = self.activation(nn.Conv(features, (3, 3), precision=self.precision)(x))
        x = self.activation(nn.Conv(64, (3, 3), strides=2, precision=self.precision)(x))
        return nn.Dense(4)(nn.max_pool(x, (2, 2), (2, 2)).mean((1, 2)))


COMPOSITES = {
    "plus": jaxlrp.EpsilonPlusFlat(),
    "gamma": jaxlrp.EpsilonGammaBox(0.0, 1.0),
    "alpha-beta": jaxlrp.EpsilonAlpha2Beta1Flat(),
    "epsilon": jaxlrp.Composite.uniform(jaxlrp.Epsilon()),
    "without bias": jaxlrp.Composite.uniform(jaxlrp.Epsilon(bias="ignore")),
    "plus without bias": jaxlrp.EpsilonPlus(bias="ignore"),
}
every_composite = pytest.mark.parametrize("name", COMPOSITES)


def prepared(side: int = 34, dtype: Any = jnp.float32) -> tuple[Any, jax.Array]:
    x = jax.random.uniform(jax.random.key(1), (2, side, side, 3))
    params = jax.jit(Net().init)(jax.random.key(0), x)
    return jax.tree.map(lambda a: a.astype(dtype), (params, x))


def explainer(name: str, precision: Any = None) -> Any:
    return jaxlrp.lrp(Net(precision), COMPOSITES[name], target=1)


def count(explain: Any, *args: Any, platform: str = "cpu", precision: str | None = None) -> int:
    """How many, before XLA sees them."""
    with jax.default_matmul_precision(precision):
        text = jax.jit(explain).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(r"stablehlo\.convolution", text))


def in_double(explain: Any, *args: Any) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(jax.jit(explain)(*jax.tree.map(lambda a: a.astype(jnp.float64), args)))


@uses_small
@every_composite
def test_relevance_is_close(name):
    params, x = prepared()
    explain = explainer(name)
    with jax.default_matmul_precision("tensorfloat32"):
        got = np.asarray(jax.jit(explain)(params, x))
    want = in_double(explain, params, x)
    off, most = np.abs(got - want), np.abs(want).max()
    np.testing.assert_allclose(np.median(off), 0.0, atol=1e-6 * most)
    # Where a relu reads about zero, float32 may have another sign: which changes a few values on some processors.
    assert np.quantile(off, 0.999) <= 2e-4 * most
    tolerance = 1e-4 if name in ("epsilon", "without bias") else 3e-6  # they divide by what is close to zero
    assert np.linalg.norm(off) <= tolerance * np.linalg.norm(want)


@uses_small
@pytest.mark.parametrize(
    ("name", "runs"),
    [("plus", 3), ("gamma", 3), ("alpha-beta", 2), ("epsilon", 2), ("without bias", 0), ("plus without bias", 0)],
)
def test_six_convolutions_stand_for_one_where_that_is_allowed(name, runs):
    """Two layers have at least 64 features on both sides and no strides.

    The model runs each; rules run it once more for positive contributions, and back; for negative ones in full. Without
    the bias sums may be far smaller than outputs.
    """
    args = prepared()
    plain = count(explainer(name), *args)
    for precision in ("tensorfloat32", "high", "bfloat16", "default"):
        assert count(explainer(name), *args, precision=precision) == plain + 5 * 2 * runs
    assert count(explainer(name, jax.lax.Precision.HIGH), *args) == plain + 5 * 2 * runs
    for precision in ("highest", "float32"):
        assert count(explainer(name), *args, precision=precision) == plain


@uses_small
@every_composite
def test_all_stays_in_full_without_relus(name):
    """Relevance may come to any output then, however small."""
    args = prepared()
    explain = jaxlrp.lrp(Net(activation=nn.leaky_relu), COMPOSITES[name], target=1)
    assert count(explain, *args, precision="tensorfloat32") == count(explain, *args)


@uses_small
def test_the_model_stays_in_full_where_relevance_is_not_in_proportion():
    params, x = prepared()
    composite = jaxlrp.Composite.uniform(jaxlrp.Epsilon())

    def pulled(params, x):
        run = lambda x: nn.relu(nn.Conv(64, (3, 3)).apply(params, x))  # noqa: E731
        output, pull = jaxlrp.lrp_vjp(run, x, composite=composite)
        return pull(jnp.ones_like(output))

    params = {"params": params["params"]["Conv_1"]}
    x = jnp.repeat(x[..., :1], 64, -1)
    assert count(pulled, params, x, precision="tensorfloat32") == count(pulled, params, x)


@uses_small
@pytest.mark.parametrize(
    "reader",
    [
        jnp.sqrt,
        lambda z: jnp.where(z > 0, 1 / z, 0.0),
        lambda z: nn.relu(z).sum((1, 2, 3)) * (1.0 + (z < 0).sum()),  # no relevance comes by way of the count
    ],
)
def test_the_model_stays_in_full_where_others_than_relus_read_it(reader):
    """A sum of squares is never negative, and where nothing is added up it is 0."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 64, 64)) ** 2, jnp.float32)
    x = jnp.asarray(np.where(np.arange(33) % 11 < 5, 0.0, rng.normal(size=(2, 17, 64, 33))), jnp.float32)
    x = x.transpose(0, 3, 1, 2)

    def run(x):
        z = lax.conv_general_dilated(x**2, kernel, (1, 1), "SAME", dimension_numbers=LAYOUTS[2])
        return reader(z).reshape(len(z), -1).sum(1, keepdims=True)

    both = jaxlrp.value_and_lrp(run, jaxlrp.EpsilonPlus(), target=0)
    plain, _ = jax.jit(both)(x)
    with jax.default_matmul_precision("tensorfloat32"):
        coarse, _ = jax.jit(both)(x)
    np.testing.assert_allclose(coarse, plain, rtol=1e-5)


@uses_small
def test_the_model_stays_in_full_inside_of_a_scan():
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.maximum(rng.normal(size=(2, 16, 16, 64)), 0.0), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(3, 3, 3, 64, 64)) / 24, jnp.float32)

    def run(x):
        def step(x, kernel):
            return nn.relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUTS[2])), None

        return lax.scan(step, x, kernels)[0].mean((1, 2))

    both = jaxlrp.value_and_lrp(run, jaxlrp.Composite.uniform(jaxlrp.Epsilon()), target=1)
    plain, _ = jax.jit(both)(x)
    with jax.default_matmul_precision("tensorfloat32"):
        coarse, _ = jax.jit(both)(x)
    np.testing.assert_array_equal(coarse, plain)


def beside_bright_ones(dim: float, scale: float, seed: int = 0) -> tuple[Any, Any, Any]:
    """A convolution whose results are all added up, its input and its kernel.

    Some rows are darker than others and count for more, so that as much relevance comes to them.
    """
    rng = np.random.default_rng(seed)
    brightness = scale * np.where(np.arange(33) % 11 < 5, dim, 1.0)[:, None, None]
    x = jnp.asarray(brightness * np.maximum(rng.normal(size=(33, 17, 64)), 0.0), jnp.float32)[None]
    kernel = jnp.asarray(rng.normal(size=(3, 3, 64, 64)) / 24, jnp.float32)
    inner = np.isin(np.arange(33) % 11, (1, 2, 3))[:, None, None]  # a filter there sees no bright row
    head = np.broadcast_to(np.where(inner, 1 / (scale * dim), 1e-3 / scale), x.shape)

    def run(kernel, x):
        z = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUTS[2])
        return jnp.tensordot(nn.relu(z), jnp.asarray(head, z.dtype), 4)

    return run, kernel, x


def coarse_and_full(rule: Any, dim: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    run, *args = beside_bright_ones(dim, scale)
    explain = jaxlrp.lrp(run, jaxlrp.Composite((jaxlrp.kind("linear"), rule)), argnums=1)
    full = np.asarray(jax.jit(explain)(*args))
    with jax.default_matmul_precision("tensorfloat32"):
        coarse = np.asarray(jax.jit(explain)(*args))
    assert not np.array_equal(coarse, full)
    return coarse, full


@pytest.fixture
def model_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """To see what becomes of rules' own products alone."""
    full = lambda primitive, params, *values: primitive.bind(*values, **params)  # noqa: E731
    monkeypatch.setattr(convolutions, "forward", full)


RULES = (jaxlrp.ZPlus(), jaxlrp.Gamma(0.25), jaxlrp.AlphaBeta(2.0, 1.0), jaxlrp.Epsilon(1e-12))
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


@pytest.mark.usefixtures("small_pays", "model_in_full")
@pytest.mark.parametrize("scale", [1.0, 1e4])
@every_rule
def test_rules_hand_relevance_of_dim_places_back(rule, scale):
    """Sums for them drown in those of their neighbours, and something divides by them."""
    coarse, full = coarse_and_full(rule, 1e-4, scale)
    off, most = np.abs(coarse - full), np.abs(full).max()
    assert np.linalg.norm(off) < 3e-3 * np.linalg.norm(full)
    # Which value is the worst of 35904, and how far it is off, is a matter of the processor's order of adding up.
    assert np.quantile(off, 0.9999) < 5e-3 * most
    assert off.max() < 1e-2 * most
    np.testing.assert_allclose(coarse.sum(), full.sum(), rtol=1e-3)


@pytest.mark.usefixtures("small_pays", "model_in_full")
@pytest.mark.parametrize(("rule", "most"), [(jaxlrp.ZPlus(), 4.0), (jaxlrp.Gamma(0.25), 2.5)], ids=repr)
def test_relevance_does_not_explode_where_denominators_are_rounding(rule, most):
    """They are known to be at least the output, which is exact."""
    coarse, full = coarse_and_full(rule, 1e-7, 1e4)
    assert np.abs(coarse).sum() < most * np.abs(full).sum()


@uses_small
@every_rule
def test_relevance_does_not_explode_where_outputs_are_rounding(rule):
    """The model itself has noise there, whose relevance is in proportion to it."""
    for scale in (1.0, 1e4):
        coarse, full = coarse_and_full(rule, 1e-7, scale)
        assert np.abs(coarse).sum() < 5 * np.abs(full).sum()


def in_tf32(a: jax.Array) -> np.ndarray:
    """Rounded to 10 bits behind the point."""
    bits = np.asarray(a).view(np.uint32)
    return ((bits + np.uint32(0x0FFF) + ((bits >> 13) & np.uint32(1))) & ~np.uint32(0x1FFF)).view(np.float32)


@uses_small
@pytest.mark.parametrize(("dim", "seed"), [(1.0, 0), (1e-2, 0), (1e-2, 1), (1e-2, 2)])
@every_rule
def test_no_worse_than_in_tf32(rule, dim, seed):
    """What a user allows, in whole programs, while neighbours are not brighter than a hundred times."""
    run, *args = beside_bright_ones(dim, 1.0, seed)
    explain = jaxlrp.lrp(run, jaxlrp.Composite((jaxlrp.kind("linear"), rule)), argnums=1)
    with jax.default_matmul_precision("tensorfloat32"):
        coarse = np.asarray(jax.jit(explain)(*args))
    want, rounded = in_double(explain, *args), in_double(explain, *map(in_tf32, args))
    assert np.linalg.norm(coarse - want) < np.linalg.norm(rounded - want)


@uses_small
@every_composite
def test_other_devices_convolve_in_their_own_way(name):
    args = prepared()
    plain = count(explainer(name), *args)
    assert count(explainer(name), *args, platform="cuda", precision="tensorfloat32") == plain
    assert count(explainer(name), *args, platform="tpu", precision="tensorfloat32") == plain


@uses_small
def test_small_layers_and_double_precision_stay_as_they_are():
    small = prepared(side=8)
    assert count(explainer("plus"), *small, precision="high") == count(explainer("plus"), *small)
    with jax.enable_x64(True):
        double = prepared(dtype=jnp.float64)
        assert count(explainer("plus"), *double, precision="high") == count(explainer("plus"), *double)


@uses_small
def test_the_models_own_output_is_as_close_as_in_full():
    params, x = prepared()
    both = jaxlrp.value_and_lrp(Net(), COMPOSITES["plus"], target=1)
    with jax.default_matmul_precision("tensorfloat32"):
        coarse = np.asarray(jax.jit(both)(params, x)[0])
    want = in_double(lambda *args: both(*args)[0], params, x)
    assert not np.array_equal(coarse, np.asarray(jax.jit(both)(params, x)[0]))
    np.testing.assert_allclose(coarse, want, atol=20 * EPSILON * np.abs(want).max())


@uses_small
def test_in_16_bits_the_model_stays_as_it_is():
    params, x = prepared(dtype=jnp.bfloat16)
    both = jaxlrp.value_and_lrp(Net(), COMPOSITES["plus"], target=1)
    plain, _ = jax.jit(both)(params, x)
    with jax.default_matmul_precision("tensorfloat32"):
        coarse, _ = jax.jit(both)(params, x)
    np.testing.assert_array_equal(coarse, plain)


@uses_small
def test_composes_with_vmap_grad_and_scan():
    params, x = prepared()
    explain = explainer("gamma")
    with jax.default_matmul_precision("tensorfloat32"):
        want = jax.jit(explain)(params, x)
        each = jax.jit(jax.vmap(lambda x: explain(params, x[None])[0]))(x)
        streamed = jax.jit(jaxlrp.stream(explain, batch_size=1, argnums=1))(params, x)
        slope = jax.jit(jax.grad(lambda x: (explain(params, x) ** 2).sum()))(x)
    plain = jax.jit(jax.grad(lambda x: (explain(params, x) ** 2).sum()))(x)
    size = float(jnp.abs(want).max())
    np.testing.assert_allclose(each, want, atol=1e-5 * size)
    np.testing.assert_allclose(streamed, want, atol=1e-5 * size)
    np.testing.assert_allclose(slope, plain, atol=1e-3 * float(jnp.abs(plain).max()))
