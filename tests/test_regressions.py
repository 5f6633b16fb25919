"""Wrong answers that were found by review, so that they stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxlrp
from jaxlrp import Composite, Epsilon, ZPlus, kind


def kinds(fun: Callable[..., Any], *args: Any) -> list[tuple[str, str]]:
    return [(layer.kind, layer.op) for layer in jaxlrp.trace(fun, *args)]


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(3, 4))


@pytest.mark.parametrize("equation", ["nd,md->nm", "nd,nd->n"])
def test_a_product_of_a_value_with_itself_conserves(x64: None, x: np.ndarray, equation: str) -> None:
    output, relevance = jaxlrp.value_and_lrp(lambda x: jnp.einsum(equation, x, x), Epsilon(1e-12))(x)
    np.testing.assert_allclose(relevance.sum(), output.sum(), rtol=1e-4)


@pytest.mark.parametrize("norm", [nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(2)], ids=["layer", "rms", "group"])
def test_derivatives_of_relevance_through_normalisation(x64: None, x: np.ndarray, norm: nn.Module) -> None:
    """The scale is held for the rule alone; relevance itself depends on it."""
    variables = norm.init(jax.random.key(0), x)
    weights = np.random.default_rng(1).normal(size=x.shape)
    seed = np.random.default_rng(2).normal(size=x.shape)

    def loss(x: Any) -> jax.Array:
        relevance = jaxlrp.lrp(norm, Epsilon(), target=lambda _: jnp.asarray(seed))(variables, x)
        return jnp.sum(weights * relevance)

    direction = np.random.default_rng(3).normal(size=x.shape)
    step = 1e-6
    numeric = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(jax.grad(loss)(x) * direction), numeric, rtol=1e-5, atol=1e-8)


def test_bias_and_scale_behind_a_transpose_belong_to_the_layer(x64: None, x: np.ndarray) -> None:
    rng = np.random.default_rng(4)
    w, s, b = rng.normal(size=(4, 5)), rng.normal(size=5), rng.normal(size=5)
    composite = Composite((kind("linear"), ZPlus()))
    plain = jaxlrp.lrp(lambda x: (x @ w) * s + b, composite)(x)
    moved = jaxlrp.lrp(lambda x: (x @ w).T * s[:, None] + b[:, None], composite)(x)
    np.testing.assert_allclose(moved, plain, rtol=1e-12)
    assert kinds(lambda x: (x @ w).T * s[:, None], x) == [("linear", "dense")]


def test_attention_weights_beside_the_output_are_not_a_final_softmax(x64: None, x: np.ndarray) -> None:
    w = np.random.default_rng(5).normal(size=(4, 6))

    def both(x: Any) -> Any:
        a = jax.nn.softmax(x @ x.T)
        return (a @ x) @ w, a

    def first(out: Any) -> Any:
        return out[0], jnp.zeros_like(out[1])

    np.testing.assert_allclose(jaxlrp.lrp(both, target=first)(x), jaxlrp.lrp(lambda x: both(x)[0])(x), rtol=1e-9)


def test_auxiliary_outputs_change_nothing(x64: None, x: np.ndarray) -> None:
    rng = np.random.default_rng(6)
    w, s = rng.normal(size=(4, 5)), rng.normal(size=5)

    def model(x: Any) -> Any:
        y = x @ w
        return y * s, (y.max(), jnp.abs(jnp.fft.fft(x)))

    relevance, _ = jaxlrp.lrp(model, ZPlus(), has_aux=True)(x)
    np.testing.assert_allclose(relevance, jaxlrp.lrp(lambda x: model(x)[0], ZPlus())(x), rtol=1e-12)


def test_a_maximum_less_a_logsumexp_is_no_soft_pool(x: np.ndarray) -> None:
    assert ("pick", "logsumexp") not in kinds(lambda x: x.max(-1) - jax.nn.logsumexp(x, -1), x)


def test_a_cast_to_integers_is_not_linear(x: np.ndarray) -> None:
    found = kinds(lambda x: (x @ np.ones((4, 2))).astype(bool).astype(jnp.float32), x.astype(np.float32))
    assert ("linear", "dense") not in found or len(found) > 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
def test_labels_in_few_bits(dtype: Any) -> None:
    x, w = np.ones((2, 3), np.float32), np.ones((3, 256), np.float32)
    labels = np.array([3, 100], dtype)
    relevance = jaxlrp.lrp(lambda x, w: x @ w)(x, w, target=labels)
    np.testing.assert_allclose(relevance, np.ones((2, 3)), rtol=1e-5)


def test_a_gather_may_fill_with_negative_numbers(x64: None) -> None:
    x, w = np.array([1.0, 2.0, 3.0]), np.random.default_rng(0).normal(size=(4, 2))
    indices = np.array([0, 1, 2, 9])

    def filled(x: Any) -> Any:
        return jax.nn.relu(x).at[indices].get(mode="fill", fill_value=-1.0) @ w

    def joined(x: Any) -> Any:
        return jnp.concatenate([jax.nn.relu(x), -jnp.ones(1)]) @ w

    np.testing.assert_allclose(jaxlrp.lrp(filled, ZPlus())(x), jaxlrp.lrp(joined, ZPlus())(x), rtol=1e-12)


def test_a_function_called_relu_need_not_be_one() -> None:
    @jax.jit
    def relu(x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, x, 0.1 * x)

    x = np.array([1.0, -1.0], np.float32)
    explain = jaxlrp.lrp(relu, jaxlrp.GradientComposite(), target=lambda out: jnp.ones_like(out))
    np.testing.assert_allclose(explain(x), [1.0, 0.1])


def test_a_rule_may_modify_weights(x64: None, x: np.ndarray) -> None:
    class Sizes(jaxlrp.SplitRule):
        def modify(self, linear: Any) -> Any:
            sizes = tuple(map(jnp.abs, linear.inputs)), tuple(map(jnp.abs, linear.weights))
            return linear.__class__(**{**vars(linear), "inputs": sizes[0], "weights": sizes[1]})

        def shares(self, relevance: Any, z: Any) -> Any:
            return [(relevance, 1.0, 1.0)]

    w = np.random.default_rng(7).normal(size=(4, 2))
    output, relevance = jaxlrp.value_and_lrp(lambda x: x @ w, Sizes())(x)
    np.testing.assert_allclose(relevance.sum(), output.sum(), rtol=1e-5)


def test_decisions_on_the_way_carry_no_relevance(x64: None) -> None:
    x, w = np.array([1.0, 3.0, 2.0]), np.eye(3)
    np.testing.assert_allclose(jaxlrp.lrp(lambda x: jnp.asarray(w)[jnp.argmax(x)] * x)(x), [0.0, 3.0, 0.0], rtol=1e-6)
    picked = jaxlrp.lrp(lambda x: jnp.take_along_axis(x, jnp.argmax(x, keepdims=True), 0))(x)
    np.testing.assert_allclose(picked, [0.0, 3.0, 0.0])


def test_a_step_written_with_where_is_one_activation() -> None:
    assert kinds(lambda x: jnp.where(x > 0, 1.0, 0.0), np.ones(3, np.float32))[0][0] == "activation"


def test_calls_with_their_own_derivative_in_16_bits() -> None:
    x = jnp.array([1.0, -1.0, 7.0], jnp.bfloat16)
    ones = {"target": lambda out: jnp.ones_like(out)}
    for activation in (jax.nn.softplus, jax.nn.relu6, jax.nn.log_sigmoid):
        gradient = jaxlrp.lrp(activation, jaxlrp.GradientComposite(), **ones)(x)
        want = jax.vmap(jax.grad(activation))(x.astype(jnp.float32))
        np.testing.assert_allclose(gradient, want, atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_output_rounded_to_16_bits_before_a_cast_is_no_sum(dtype: Any, rng: np.random.Generator) -> None:
    x, w = jnp.abs(jnp.asarray(rng.normal(size=(4, 64)), dtype)), jnp.asarray(rng.normal(size=(64, 32)), dtype)
    out = jnp.asarray(rng.normal(size=(32, 1)), jnp.float32)

    def hidden(x: Any) -> jax.Array:
        return jax.nn.relu((x @ w).astype(jnp.float32))

    composite = Composite.uniform(jaxlrp.AlphaBeta(2.0, 1.0)).extend((jaxlrp.last("linear"), jaxlrp.Zero()))
    relevance = jaxlrp.lrp(lambda x: hidden(x) @ out, composite)(x)
    parts = x.astype(jnp.float32)[:, :, None] * w.astype(jnp.float32)
    up, down = jnp.maximum(parts, 0.0), jnp.minimum(parts, 0.0)
    arrived = (hidden(x) * out[:, 0])[:, None]
    want = (2 * up * arrived / up.sum(1, keepdims=True) - down * arrived / down.sum(1, keepdims=True)).sum(2)
    np.testing.assert_allclose(relevance, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


def test_the_kernel_of_a_convolution_may_be_explained(x64: None) -> None:
    rng = np.random.default_rng(8)
    images, kernel, s = rng.normal(size=(2, 3, 5, 5)), rng.normal(size=(4, 3, 3, 3)), rng.normal(size=4)

    def model(kernel: Any) -> Any:
        return jax.lax.conv(images, kernel, (1, 1), "VALID") * s[:, None, None]

    composite = Composite((kind("linear"), Epsilon(1e-12)), (kind("scale"), Epsilon(1e-12)))
    want = kernel * jax.grad(lambda k: model(k).sum())(kernel)
    np.testing.assert_allclose(jaxlrp.lrp(model, composite)(kernel), want, rtol=1e-6)


def test_a_scaled_sum_with_kept_axes(x64: None, x: np.ndarray) -> None:
    relevance = jaxlrp.lrp(lambda x: x.sum(-1, keepdims=True) * jnp.full((3, 1), 0.5), Epsilon(1e-12))(x)
    np.testing.assert_allclose(relevance, 0.5 * x, rtol=1e-4)


def test_nan_in_one_sample_stays_there_wherever_the_axis_of_samples_is():
    layer = lambda x, w: jnp.einsum("fb,fo->ob", x, w)  # noqa: E731
    x = jnp.abs(jax.random.normal(jax.random.key(0), (4, 3))).at[0, 0].set(jnp.nan)
    relevance = jaxlrp.lrp(layer, jaxlrp.ZPlus())(x, jnp.ones((4, 2)))
    assert jnp.isfinite(relevance[:, 1:]).all()
    assert jnp.isnan(relevance[:, 0]).any()
