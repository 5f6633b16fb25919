"""Where relevance can arrive: sound for random networks, and the same results without it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from jaxlrp.rules import Known
from jaxlrp.support import positive_values
from jaxlrp.transform import Setup

GAMMA = jaxlrp.Composite.uniform(jaxlrp.Gamma(0.5))


class Net(nn.Module):
    """Convolutions with relus, pools, a residual sum and a normalisation."""

    residual: bool = False
    activation: str = "relu"

    @nn.compact
    def __call__(self, x):
        act = getattr(nn, self.activation)
        x = act(nn.Conv(6, (3, 3), name="a")(x))
        y = nn.Conv(6, (3, 3), name="b")(x)
        x = act(x + y if self.residual else y)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = act(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), name="c")(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(x)


def forward(model, composite, seed=0):
    x = jax.random.normal(jax.random.key(seed), (2, 8, 8, 3))
    params = model.init(jax.random.key(seed + 1), x)
    params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(seed + 2), a.shape), params)
    params = {**params, "batch_stats": jax.tree.map(jnp.abs, params["batch_stats"])}
    return Setup(model, composite, None, False, False).forward((params, x), {})


def names(ahead):
    found = positive_values(ahead.traced.main, ahead.assignments)
    return {a.layer.name for a in ahead.assignments if a.layer.kind == "linear" and found.issuperset(a.layer.outputs)}


def test_what_relus_alone_read():
    assert names(forward(Net(), GAMMA)) == {"a", "b", "c"}
    assert names(forward(Net(activation="relu6"), GAMMA)) == {"a", "b", "c"}
    assert names(forward(Net(activation="gelu"), GAMMA)) == set()
    assert names(forward(Net(residual=True), GAMMA)) == {"a", "c"}  # b may be negative where the sum is not


@pytest.mark.parametrize(
    ("rule", "where"),
    [(jaxlrp.Flat(), "c"), (jaxlrp.WSquare(), "c"), (jaxlrp.ZBox(-1.0, 1.0), "c"), (jaxlrp.Gradient(), "c")],
)
def test_rules_that_give_to_zeros_are_respected(rule, where):
    composite = GAMMA.extend((jaxlrp.name(where), rule))
    assert names(forward(Net(), composite)) == {"a", "c"}  # what c hands back reaches b at its zeros too


def test_a_rule_of_a_user_is_not_trusted_beyond_its_shares():
    class Spread(jaxlrp.Epsilon):
        def fold(self, call, *relevance):
            return (jnp.full(call.inputs[0].shape, relevance[0].mean()),)

    assert names(forward(Net(), GAMMA.extend((jaxlrp.name("c"), Spread())))) == {"a", "c"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("residual", [False, True])
def test_a_value_claimed_positive_never_gets_relevance_where_it_is_not(seed, residual):
    ahead = forward(Net(residual), GAMMA, 10 * seed)
    relevance = ahead.fold(ahead.output).relevance
    for value in positive_values(ahead.traced.main, ahead.assignments):
        if value in relevance:
            assert not np.any(np.asarray(relevance[value])[np.asarray(ahead.env[value]) <= 0])


@pytest.mark.parametrize("rule", [jaxlrp.Gamma(0.5), jaxlrp.ZPlus(), jaxlrp.AlphaBeta(2.0, 1.0), jaxlrp.Epsilon()])
def test_without_it_results_are_the_same(rule):
    ahead = forward(Net(True), jaxlrp.Composite.uniform(rule))
    blind = functools.partial(jaxlrp.fold.fold, ahead.traced.main, ahead.assignments, ahead.env, [ahead.output])
    known, unknown = (blind(k).relevance for k in (ahead.known, Known()))
    for source in ahead.traced.sources:
        np.testing.assert_allclose(known[source], unknown[source], rtol=2e-4, atol=1e-5)


def rectified(ahead):
    layers = {v: a.layer.name for a in ahead.assignments for v in a.layer.outputs}
    return {layers[z] for z in ahead.known.rectified}


def test_behind_a_relu_its_output_is_read():
    ahead = forward(Net(True), GAMMA)
    assert rectified(ahead) == {"a", "c", "add"}
    for z, relu in ahead.known.rectified.items():
        np.testing.assert_array_equal(np.maximum(ahead.env[z], 0.0), ahead.env[relu])


def test_no_other_activation_is_taken_for_a_relu():
    assert rectified(forward(Net(activation="relu6"), GAMMA)) == set()  # cut off above

    def rounding(x, w):
        return jax.nn.relu((x @ w).astype(jnp.bfloat16)).astype(jnp.float32) @ jnp.ones((3, 2))

    args = jnp.ones((2, 4)), jax.random.normal(jax.random.key(0), (4, 3))
    assert rectified(Setup(rounding, GAMMA, None).forward(args, {})) == set()


def test_a_block_does_not_keep_what_another_one_makes():
    cut = jax.checkpoint(lambda x, w: x @ w)

    def model(x, w):
        return jax.nn.relu(cut(x, w)) @ jnp.ones((3, 2))

    args = jnp.ones((2, 4)), jax.random.normal(jax.random.key(0), (4, 3))
    assert rectified(Setup(model, GAMMA, None).forward(args, {})) == set()


@pytest.mark.parametrize("epsilon", [0.3, lambda z: 0.1 * jnp.abs(z).mean()], ids=["number", "of all outputs"])
@pytest.mark.parametrize("norm_scale", [False, True])
def test_stabilisers_see_what_is_below_zero(epsilon, norm_scale):
    rule = jaxlrp.Epsilon(epsilon, norm_scale=norm_scale)
    ahead = forward(Net(), jaxlrp.Composite.uniform(rule))
    (source,) = ahead.traced.sources
    blind = jaxlrp.fold.fold(ahead.traced.main, ahead.assignments, ahead.env, [ahead.output], Known())
    np.testing.assert_allclose(
        ahead.fold(ahead.output).relevance[source], blind.relevance[source], rtol=1e-4, atol=1e-6
    )


def smooth(relevance):
    return 0.5 * (relevance + jnp.roll(relevance, 1, -1))


class SmoothShares(jaxlrp.SplitRule):
    def shares(self, relevance, z):
        return [(smooth(relevance), 1.0, 1.0)]


class SmoothFold(jaxlrp.Epsilon):
    def fold(self, call, *relevance):
        return super().fold(call, smooth(relevance[0]))


@pytest.mark.parametrize("rule", [SmoothShares(), SmoothFold()])
def test_a_rule_of_a_user_may_spread_relevance_to_where_none_came(rule):
    ahead = forward(Net(), GAMMA.extend((jaxlrp.name("b"), rule)))
    (source,) = ahead.traced.sources
    blind = jaxlrp.fold.fold(ahead.traced.main, ahead.assignments, ahead.env, [ahead.output], Known())
    np.testing.assert_allclose(
        ahead.fold(ahead.output).relevance[source], blind.relevance[source], rtol=1e-4, atol=1e-6
    )
