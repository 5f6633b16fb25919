"""How many matrix products and convolutions the compiled programs hold: exact, so tested and not timed."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxlrp
from jaxlrp import winograd


class ReluNet(nn.Module):
    """Six linear layers over inputs that are never negative."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(x)
        for i, width in enumerate((8, 8, 16, 16)):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), (2, 2)) if i % 2 else x
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.relu(nn.Dense(10)(x))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


def products(function: Callable[..., Any], *args: Any) -> int:
    text = jax.jit(function).lower(*args).compile().as_text()
    operations = collections.Counter(re.findall(r"= \S+ ([\w-]+)\(", text))
    return operations["convolution"] + operations["dot"]


def prepared(model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, jax.Array]:
    x = jax.random.normal(jax.random.key(0), shape)
    return model.init(jax.random.key(1), x), x


def relevance(model: nn.Module, composite: Any) -> Callable[..., Any]:
    return lambda params, x: jaxlrp.lrp(model, composite)(params, x)


LAYERS = 6


@pytest.mark.parametrize(
    ("rule", "each"),
    [
        (jaxlrp.Zero(), 2),  # forward, transpose
        (jaxlrp.Epsilon(), 2),
        (jaxlrp.ZPlus(), 3),  # and once more forward, with positive weights
    ],
    ids=str,
)
def test_products_of_a_relu_net(rule, each):
    model = ReluNet()
    assert products(relevance(model, rule), *prepared(model, (2, 16, 16, 3))) == each * LAYERS


@pytest.mark.parametrize(("rule", "each"), [(jaxlrp.Epsilon(), 2), (jaxlrp.ZPlus(), 3)], ids=str)
def test_a_large_convolution_is_one_product_of_stacked_matrices(rule, each, monkeypatch):
    """And two by small constant matrices, before and behind, with fewer multiplications in all."""
    monkeypatch.setattr(winograd, "_FEATURES", 8)
    monkeypatch.setattr(winograd, "_MULTIPLICATIONS", 0)
    model = ReluNet()  # three of its convolutions have at least 8 features on both sides
    compiled = jax.jit(relevance(model, rule)).lower(*prepared(model, (2, 16, 16, 3))).compile().as_text()
    stacked = re.findall(r" dot\(.*lhs_batch_dims=\{0\}", compiled)
    assert len(stacked) == each * 3
    all_of_them = len(re.findall(r"= \S+ (?:convolution|dot)\(", compiled))
    assert all_of_them - 2 * len(stacked) == each * LAYERS


@pytest.mark.parametrize(
    ("rule", "each"),
    [
        (jaxlrp.Gamma(0.25), 3),  # the output and the sum of one sign give that of the other
        (jaxlrp.AlphaBeta(2.0, 1.0), 4),  # and there are two transposes
    ],
    ids=str,
)
def test_rules_of_both_signs_cost_one_product_less_where_a_relu_reads(rule, each):
    model = ReluNet()
    params, x = prepared(model, (2, 16, 16, 3))
    composite = jaxlrp.Composite.uniform(rule)
    last = jaxlrp.last("linear")
    assert products(relevance(model, composite.extend((last, jaxlrp.Epsilon()))), params, x) == each * (LAYERS - 1) + 2
    assert products(relevance(model, composite), params, x) == each * (LAYERS - 1) + each + 1


@pytest.mark.parametrize("rule", [jaxlrp.AlphaBeta(2.0, 1.0), jaxlrp.Gamma(0.25), jaxlrp.ZPlus()], ids=str)
def test_the_models_own_output_goes_on_to_the_last_digit(rule, rng):
    """Sums of one sign are no way to it: what cancels between them would make relus and pools decide otherwise."""
    weights = [jnp.asarray(rng.normal(size=(256, 256)), jnp.float32) for _ in range(4)]
    x = jnp.asarray(rng.uniform(size=(4, 256)), jnp.float32)

    def net(weights, x):
        for w in weights:
            x = jax.nn.relu(x @ w)
        return x

    value, _ = jax.jit(jaxlrp.value_and_lrp(net, rule, argnums=1, target=1))(weights, x)
    assert (value == jax.jit(net)(weights, x)).all()


def test_pools_and_batch_norms_cost_no_products_and_capture_costs_none():
    model = ReluNet()
    params, x = prepared(model, (2, 16, 16, 3))
    captured = lambda params, x: jaxlrp.layerwise_lrp(model, jaxlrp.Epsilon())(params, x)  # noqa: E731
    assert products(captured, params, x) == 2 * LAYERS


def test_many_targets_share_one_forward_pass():
    model = ReluNet()
    params, x = prepared(model, (1, 16, 16, 3))

    def every(params, x):
        output, pull = jaxlrp.lrp_vjp(model, params, x, composite=jaxlrp.Epsilon())
        return jax.vmap(pull)(jnp.eye(10)[:, None] * output)

    assert products(every, params, x) == 2 * LAYERS


@pytest.mark.parametrize("composite", [jaxlrp.AttnLRP(), jaxlrp.AttnLRP(epsilon=0.0)])
def test_attnlrp_costs_what_the_gradient_costs(composite):
    model = Transformer()
    params, x = prepared(model, (2, 7, 16))
    gradient = jax.value_and_grad(lambda x, params: model.apply(params, x)[:, 1].sum())
    found = products(relevance(model, composite), params, x)
    assert found == products(gradient, x, params)
    assert products(relevance(model, jaxlrp.CPLRP()), params, x) < found  # nothing passes to queries and keys


def test_a_sweep_of_gammas_shares_all_weights_but_those_of_convolutions_back():
    model = ReluNet()
    params, x = prepared(model, (2, 16, 16, 3))

    def explain(gamma, params, x):
        return jaxlrp.lrp(model, jaxlrp.Composite.uniform(jaxlrp.Gamma(gamma)))(params, x)

    sweep = jax.vmap(explain, (0, None, None))
    gammas = jnp.array([0.1, 0.25, 1.0])
    known = products(lambda *args: explain(0.25, *args), params, x)
    assert products(explain, gammas[1], params, x) == known
    # Of the dense layers, whose weights see two rows, one has relevance at outputs of one sign and one of both.
    assert products(sweep, gammas, params, x) == known + 3
    assert "feature_group_count" not in jax.jit(sweep).lower(gammas, params, x).compile().as_text()
    samples = jax.jit(jax.vmap(explain, (None, None, 0))).lower(gammas[1], params, x[:, None]).compile().as_text()
    assert " while(" not in samples  # weights of one gamma do for all of them
    one = jax.jit(lambda *args: explain(0.25, *args))(params, x)
    atol = 1e-6 * float(jnp.abs(one).max())
    assert jnp.allclose(jax.jit(sweep)(gammas, params, x)[1], one, rtol=1e-4, atol=10 * atol)


@pytest.mark.parametrize(
    ("rule", "few", "many"),
    [
        (jaxlrp.ZPlus(), 3, 5),  # forward; both parts of the input summed; both back
        (jaxlrp.ZBox(-3.0, 3.0), 3, 5),
        (jaxlrp.AlphaBeta(2.0, 1.0), 5, 9),
        (jaxlrp.Gamma(0.25), 4, 7),
    ],
    ids=str,
)
def test_both_signs_of_an_image_go_through_one_product(rule, few, many):
    for features, want in ((3, few), (16, many)):
        x = jax.random.normal(jax.random.key(0), (2, 9, 9, features))
        w = jax.random.normal(jax.random.key(1), (3, 3, features, 8))

        def conv(w, x):
            return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        assert products(jaxlrp.lrp(conv, jaxlrp.Composite.uniform(rule), argnums=1), w, x) == want
