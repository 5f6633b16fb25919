"""Convolutions with fewer multiplications: what they compute, what they lose, and who gets them."""

from __future__ import annotations

import functools
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
IN_FULL = "highest"
LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolved(x: Any, kernel: Any, padding: Any) -> np.ndarray:
    """With fewer multiplications, in float32."""
    run = jax.jit(lambda x, k: winograd.convolve(x, k, padding))
    return np.asarray(run(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)))


def plain(x: Any, kernel: Any, padding: Any, dtype: Any = np.float64) -> np.ndarray:
    """By XLA."""
    with jax.enable_x64(True):
        run = jax.jit(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), padding, dimension_numbers=LAYOUT))
        return np.asarray(run(jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)))


def test_two_results_of_four_products():
    rng = np.random.default_rng(0)
    inputs, taps = rng.normal(size=4), rng.normal(size=3)
    found = winograd.A @ ((winograd.G @ taps) * (winograd.B @ inputs))
    np.testing.assert_allclose(found, np.convolve(inputs, taps[::-1], "valid"), rtol=1e-13)


@given(st.data())
def test_equals_a_plain_convolution(data):
    places = data.draw(st.lists(st.integers(3, 9), min_size=2, max_size=2))
    padding = data.draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=2, max_size=2))
    if any(n + sum(around) < 3 for n, around in zip(places, padding, strict=True)):
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    x, kernel = rng.normal(size=(2, *places, 5)), rng.normal(size=(3, 3, 5, 4))
    with jax.numpy_rank_promotion("raise"):
        got, want = convolved(x, kernel, padding), plain(x, kernel, padding)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=30 * EPSILON * np.abs(want).max())


@pytest.mark.parametrize("signs", ["all", "of a relu", "one"])
@pytest.mark.parametrize("features", [16, 256])
def test_errors_are_as_those_of_xla(signs, features):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 20, 20, features)), rng.normal(size=(3, 3, features, 32)) / 48
    x = x if signs == "all" else np.maximum(x, 0.0)
    kernel = np.maximum(kernel, 0.0) if signs == "one" else kernel
    x, kernel, around = np.float32(x), np.float32(kernel), [(1, 1), (1, 1)]
    want = plain(x, kernel, around)
    off = [np.abs(found - want) for found in (convolved(x, kernel, around), plain(x, kernel, around, np.float32))]
    ours, theirs = (np.linalg.norm(each) for each in off)
    assert ours < 3 * theirs
    assert off[0].max() < 5 * off[1].max()


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_one_sign_lose_little(sign):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(1, 22, 8, 64)), 0.0)
    kernel, around = sign * np.maximum(rng.normal(size=(3, 3, 64, 32)), 0.0), [(1, 1), (1, 1)]
    np.testing.assert_allclose(convolved(x, kernel, around), plain(x, kernel, around), rtol=30 * EPSILON)


def test_results_are_made_of_their_own_window():
    """To the last bit: not of what else is in their tile."""
    rng = np.random.default_rng(0)
    x, kernel, around = rng.normal(size=(1, 9, 9, 8)), rng.normal(size=(3, 3, 8, 8)), [(1, 1), (1, 1)]
    dim = convolved(x, kernel, around)
    for row in range(9):
        for column in range(9):
            x_bright = x.copy()
            x_bright[:, row, column] = 1e20
            bright = convolved(x_bright, kernel, around)
            far = np.ones((9, 9), bool)
            far[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = False
            np.testing.assert_array_equal(bright[:, far], dim[:, far])


@pytest.mark.parametrize(
    ("samples", "places", "features", "out", "pays"),
    [
        (1, (56, 56), 128, 128, True),
        (1, (28, 28), 128, 128, False),  # too few multiplications
        (8, (56, 56), 127, 128, False),
        (8, (56, 56), 128, 127, False),
        (1, (7, 7), 512, 512, False),
        (3, (7, 7), 512, 512, True),
        (99, (3, 56), 512, 512, False),  # of the results in a tile too many would be of no use
        (99, (56, 3), 512, 512, False),
        (99, (5, 5), 512, 512, True),
    ],
)
def test_large_layers_pay(samples, places, features, out, pays):
    assert winograd.pays(samples, places, [3, 3], features, out) is pays
    for taps in ([3], [3, 1], [5, 3], [3, 3, 3]):
        assert not winograd.pays(samples, places, taps, features, out)


def test_nan_stays():
    x = np.ones((1, 12, 4, 8))
    x[0, 6, 2, 3] = np.nan
    got, want = (f(x, np.ones((3, 3, 8, 8)), [(1, 1), (1, 1)]) for f in (convolved, plain))
    assert np.isnan(got[np.isnan(want)]).all()


# -- who gets them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with few multiplications or features as well, or tests would take long."""
    monkeypatch.setattr(winograd, "_MULTIPLICATIONS", 0)
    monkeypatch.setattr(winograd, "_FEATURES", 64)


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
RULES = (jaxlrp.ZPlus(), jaxlrp.Gamma(0.25), jaxlrp.AlphaBeta(2.0, 1.0), jaxlrp.Epsilon(1e-12))
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def prepared(side: int = 34, dtype: Any = jnp.float32) -> tuple[Any, jax.Array]:
    x = jax.random.uniform(jax.random.key(1), (2, side, side, 3))
    params = jax.jit(Net().init)(jax.random.key(0), x)
    return jax.tree.map(lambda a: a.astype(dtype), (params, x))


def explainer(name: str, precision: Any = None) -> Any:
    return jaxlrp.lrp(Net(precision), COMPOSITES[name], target=1)


def count(explain: Any, *args: Any, platform: str = "cpu", precision: str | None = None) -> int:
    """How many convolutions there are before XLA sees them."""
    with jax.default_matmul_precision(precision):
        text = jax.jit(explain).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(r"stablehlo\.convolution", text))


def in_full(explain: Any, *args: Any) -> np.ndarray:
    with jax.default_matmul_precision(IN_FULL):
        return np.asarray(jax.jit(explain)(*args))


def in_double(explain: Any, *args: Any) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(jax.jit(explain)(*jax.tree.map(lambda a: a.astype(jnp.float64), args)))


@uses_small
@every_composite
def test_relevance_is_close(name):
    params, x = prepared()
    explain = explainer(name)
    got, want = np.asarray(jax.jit(explain)(params, x)), in_double(explain, params, x)
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
def test_matrix_products_stand_for_convolutions_where_that_is_allowed(name, runs):
    """Two layers have at least 64 features on both sides and no strides.

    The model runs each; rules run it once more for positive contributions, and back; for negative ones in full. Without
    the bias sums may be far smaller than outputs.
    """
    args = prepared()
    full = count(explainer(name), *args, precision=IN_FULL)
    for precision in (None, "tensorfloat32", "high", "bfloat16", "default"):
        assert count(explainer(name), *args, precision=precision) == full - 2 * runs
    assert count(explainer(name), *args, precision="float32") == full
    assert count(explainer(name, jax.lax.Precision.HIGHEST), *args) == full
    assert count(explainer(name, jax.lax.Precision.HIGH), *args) == full - 2 * runs


@uses_small
@every_composite
def test_all_stays_in_full_without_relus(name):
    """Relevance may come to any output then, however small."""
    args = prepared()
    explain = jaxlrp.lrp(Net(activation=nn.leaky_relu), COMPOSITES[name], target=1)
    assert count(explain, *args) == count(explain, *args, precision=IN_FULL)


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
    assert count(pulled, params, x) == count(pulled, params, x, precision=IN_FULL)


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
    kernel = np.asarray(rng.normal(size=(3, 3, 64, 64)) ** 2, np.float32)
    kernel[2] = 0.0  # with fewer multiplications such inputs would leave a rounding error where nothing is
    x = jnp.asarray(np.where(np.arange(33) % 11 < 5, 0.0, rng.normal(size=(2, 17, 64, 33))), jnp.float32)
    x = x.transpose(0, 3, 1, 2)

    def run(x):
        z = lax.conv_general_dilated(x**2, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
        return reader(z).reshape(len(z), -1).sum(1, keepdims=True)

    both = jaxlrp.value_and_lrp(run, jaxlrp.EpsilonPlus(), target=0)
    np.testing.assert_allclose(jax.jit(both)(x)[0], in_full(lambda x: both(x)[0], x), rtol=1e-5)


@uses_small
def test_the_model_stays_in_full_inside_of_a_scan():
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.maximum(rng.normal(size=(2, 16, 16, 64)), 0.0), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(3, 3, 3, 64, 64)) / 24, jnp.float32)

    def run(x):
        def step(x, kernel):
            return nn.relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)), None

        return lax.scan(step, x, kernels)[0].mean((1, 2))

    both = jaxlrp.value_and_lrp(run, jaxlrp.Composite.uniform(jaxlrp.Epsilon()), target=1)
    np.testing.assert_array_equal(jax.jit(both)(x)[0], in_full(lambda x: both(x)[0], x))


@uses_small
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-6])
def test_a_rule_of_a_users_own_that_moves_relevance_divides_by_exact_sums(epsilon):
    """It may come to be where the layer's output, and the sum of positive contributions, is 0."""

    class Spread(jaxlrp.SplitRule):
        def shares(self, relevance, z):
            return [(jnp.full_like(relevance, relevance.mean()), 1.0, 0.0)]

    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 64, 64)) / 24
    kernel[:, :, :, 32:] = 0.0
    kernel[0, 0, 0, 32:] = 1.0  # whose filters see nothing in the dark half, and next to it bright inputs by taps of 0
    x = np.maximum(rng.normal(size=(1, 18, 18, 64)), 0.0) * (np.arange(18) >= 9)[:, None, None]

    def run(kernel, x):
        z = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
        return nn.relu(z).sum((1, 2, 3))[:, None]

    composite = jaxlrp.Composite((jaxlrp.kind("linear"), Spread(epsilon=epsilon)))
    explain = jaxlrp.lrp(run, composite, argnums=1, target=0)
    args = jnp.asarray(kernel, jnp.float32), jnp.asarray(x, jnp.float32)
    want = in_double(explain, *args)
    assert np.linalg.norm(jax.jit(explain)(*args) - want) < 1e-5 * np.linalg.norm(want)


@uses_small
@every_rule
def test_derivatives_of_relevance_where_nothing_contributes_negatively(rule):
    """The sum of positive contributions is the output there, and rounding decides which is larger."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.5, 1.0, size=(1, 12, 12, 64))
    x[..., 32:] = 0.0
    kernel = rng.uniform(0.5, 1.0, size=(3, 3, 64, 64)) * np.where(np.arange(64) < 32, 1.0, -1.0)[:, None]
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def run(kernel, x):
        z = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
        return nn.relu(z).sum((1, 2, 3))[:, None]

    explain = jaxlrp.lrp(run, jaxlrp.Composite((jaxlrp.kind("linear"), rule)), argnums=1, target=0)
    slope = jax.grad(lambda kernel, x: (explain(kernel, x) * weights).sum(), argnums=1)
    args = jnp.asarray(kernel, jnp.float32), jnp.asarray(x, jnp.float32)
    full = in_full(slope, *args)
    assert np.linalg.norm(jax.jit(slope)(*args) - full) < 1e-4 * np.linalg.norm(full)


@uses_small
def test_channels_first_is_the_same():
    params, x = prepared()
    kernel = params["params"]["Conv_1"]["kernel"].transpose(3, 2, 0, 1)

    def run(kernel, x):
        return nn.relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME")).sum((1, 2, 3))[:, None]

    x = nn.relu(jax.random.normal(jax.random.key(2), (2, 64, 17, 20)))
    explain = jaxlrp.lrp(run, jaxlrp.EpsilonPlus(), argnums=1, target=0)
    assert count(explain, kernel, x) == 0
    want = in_double(explain, kernel, x)
    assert np.linalg.norm(jax.jit(explain)(kernel, x) - want) < 3e-6 * np.linalg.norm(want)


def test_the_number_of_samples_need_not_be_known():
    """Here in small; where it is not known, it is not known to be large either."""
    run = lambda kernel, x: nn.relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT))  # noqa: E731
    explain = jaxlrp.lrp(lambda *args: run(*args).sum((1, 2)), jaxlrp.EpsilonPlus(), argnums=1, target=0)
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 128, 128))
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (kernel.shape, jax.export.symbolic_shape("b, 9, 9, 128"))]
    exported = jax.export.export(jax.jit(explain))(*shapes)
    x = nn.relu(jax.random.normal(jax.random.key(1), (2, 9, 9, 128)))
    np.testing.assert_allclose(exported.call(kernel, x), jax.jit(explain)(kernel, x), rtol=1e-5, atol=1e-6)


@uses_small
def test_sums_that_a_layer_asks_for_in_double_precision_stay_in_full():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (1, 8, 8, 64), jnp.float32)
        kernel = jax.random.normal(jax.random.key(1), (3, 3, 64, 64), jnp.float32)
        for wide, saves in ((None, True), (jnp.float32, True), (jnp.float64, False)):
            how = {"dimension_numbers": LAYOUT, "preferred_element_type": wide}
            run = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", **how)
            (equation,) = jax.make_jaxpr(run)(x, kernel).eqns
            assert convolutions.Convolution(equation.params, x.shape, kernel.shape).saves is saves


def beside_bright_ones(dim: float, scale: float, sees: bool, seed: int = 0) -> tuple[Any, Any, Any]:
    """A convolution whose results are all added up, its input and its kernel.

    Some rows are darker than others, and results that are made of dark ones alone count for more, so that as much
    relevance comes to them. If ``sees``, some have bright ones in their window too, but taps there that are 0.
    """
    rng = np.random.default_rng(seed)
    brightness = scale * np.where(np.arange(33) % 11 < 5, dim, 1.0)[:, None, None]
    x = jnp.asarray(brightness * np.maximum(rng.normal(size=(33, 17, 64)), 0.0), jnp.float32)[None]
    kernel = rng.normal(size=(3, 3, 64, 64)) / 24
    if sees:
        kernel[2] = 0.0
    inner = np.isin(np.arange(33) % 11, (1, 2, 3, 4) if sees else (1, 2, 3))[:, None, None]
    head = np.broadcast_to(np.where(inner, 1 / (scale * dim), 1e-3 / scale), x.shape)

    def run(kernel, x):
        z = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
        return jnp.tensordot(nn.relu(z), jnp.asarray(head, z.dtype), 4)

    return run, jnp.asarray(kernel, jnp.float32), x


def few_and_full(rule: Any, dim: float, scale: float, sees: bool) -> tuple[np.ndarray, np.ndarray]:
    """Relevance with fewer multiplications and with all."""
    run, *args = beside_bright_ones(dim, scale, sees)
    explain = jaxlrp.lrp(run, jaxlrp.Composite((jaxlrp.kind("linear"), rule)), argnums=1)
    few, full = np.asarray(jax.jit(explain)(*args)), in_full(explain, *args)
    assert not np.array_equal(few, full)
    return few, full


@pytest.fixture
def model_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """To see what becomes of rules' own products alone."""
    full = lambda primitive, params, *values: primitive.bind(*values, **params)  # noqa: E731
    monkeypatch.setattr(convolutions, "forward", full)


@uses_small
@pytest.mark.parametrize("dim", [1.0, 1e-2, 1e-4, 1e-7])
@every_rule
def test_dim_places_lose_nothing_to_bright_ones_near_them(rule, dim):
    """In whole programs, as long as no filter sees both."""
    run, *args = beside_bright_ones(dim, 1.0, sees=False)
    explain = jaxlrp.lrp(run, jaxlrp.Composite((jaxlrp.kind("linear"), rule)), argnums=1)
    want = in_double(explain, *args)
    off = np.abs(np.asarray(jax.jit(explain)(*args)) - want)
    assert np.linalg.norm(off) < 1e-5 * np.linalg.norm(want)


@pytest.mark.usefixtures("small_pays", "model_in_full")
@pytest.mark.parametrize("scale", [1.0, 1e4])
@every_rule
def test_rules_hand_relevance_of_dim_places_back(rule, scale):
    """Sums for them drown in what else their filters see, and something divides by them."""
    few, full = few_and_full(rule, 1e-4, scale, sees=True)
    off, most = np.abs(few - full), np.abs(full).max()
    assert np.linalg.norm(off) < 3e-3 * np.linalg.norm(full)
    # Which value is the worst of 35904, and how far it is off, is a matter of the processor's order of adding up.
    assert np.quantile(off, 0.9999) < 5e-3 * most
    assert off.max() < 1e-2 * most
    np.testing.assert_allclose(few.sum(), full.sum(), rtol=1e-3)


@pytest.mark.usefixtures("small_pays", "model_in_full")
@pytest.mark.parametrize(
    ("rule", "most"), [(jaxlrp.ZPlus(), 4.0), (jaxlrp.Gamma(0.25), 2.5), (jaxlrp.Gamma(1e3), 4.0)], ids=repr
)
def test_relevance_does_not_explode_where_denominators_are_rounding(rule, most):
    """They are known to be at least the output, which is exact."""
    few, full = few_and_full(rule, 1e-7, 1e4, sees=True)
    assert np.abs(few).sum() < most * np.abs(full).sum()


@uses_small
@every_rule
def test_relevance_does_not_explode_where_outputs_are_rounding(rule):
    """The model itself has noise there, whose relevance is in proportion to it."""
    for scale in (1.0, 1e4):
        few, full = few_and_full(rule, 1e-7, scale, sees=True)
        assert np.abs(few).sum() < 5 * np.abs(full).sum()


@uses_small
@every_composite
def test_other_devices_convolve_in_their_own_way(name):
    args = prepared()
    full = count(explainer(name), *args, precision=IN_FULL)
    for platform in ("cuda", "tpu"):
        assert count(explainer(name), *args, platform=platform) == full


@uses_small
def test_double_precision_stays_as_it_is():
    with jax.enable_x64(True):
        double = prepared(dtype=jnp.float64)
        assert count(explainer("plus"), *double) == count(explainer("plus"), *double, precision=IN_FULL)


def test_small_layers_stay_as_they_are():
    args = prepared()
    assert count(explainer("plus"), *args) == count(explainer("plus"), *args, precision=IN_FULL)


@uses_small
def test_the_models_own_output_is_as_close_as_in_full():
    params, x = prepared()
    value = lambda *args: jaxlrp.value_and_lrp(Net(), COMPOSITES["plus"], target=1)(*args)[0]  # noqa: E731
    few, full, want = np.asarray(jax.jit(value)(params, x)), in_full(value, params, x), in_double(value, params, x)
    assert not np.array_equal(few, full)
    np.testing.assert_allclose(few, want, atol=10 * EPSILON * np.abs(want).max())


@uses_small
def test_in_16_bits_the_model_stays_as_it_is():
    params, x = prepared(dtype=jnp.bfloat16)
    value = lambda *args: jaxlrp.value_and_lrp(Net(), COMPOSITES["plus"], target=1)(*args)[0]  # noqa: E731
    np.testing.assert_array_equal(jax.jit(value)(params, x), in_full(value, params, x))


@uses_small
def test_composes_with_vmap_grad_and_scan():
    params, x = prepared()
    explain = explainer("gamma")
    want = jax.jit(explain)(params, x)
    each = jax.jit(jax.vmap(lambda x: explain(params, x[None])[0]))(x)
    streamed = jax.jit(jaxlrp.stream(explain, batch_size=1, argnums=1))(params, x)
    slope = jax.jit(jax.grad(lambda x: (explain(params, x) ** 2).sum()))(x)
    plain = in_full(jax.grad(lambda x: (explain(params, x) ** 2).sum()), x)
    size = float(jnp.abs(want).max())
    np.testing.assert_allclose(each, want, atol=1e-5 * size)
    np.testing.assert_allclose(streamed, want, atol=1e-5 * size)
    np.testing.assert_allclose(slope, plain, atol=1e-3 * float(jnp.abs(plain).max()))
