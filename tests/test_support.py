"""Where relevance can arrive: sound for random networks, and the same results without it."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from jaxlrp.rules import Known
from jaxlrp.rules._pool import at_winners
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
    params = {**params, "batch_stats": jax.tree.map(jnp.abs, params.get("batch_stats", {}))}
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


class Pooled(nn.Module):
    """A convolution, a relu and a max pool, and perhaps another reader of the relu."""

    window: int = 2
    stride: int = 2
    read_twice: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.max_pool(x, (self.window,) * 2, (self.stride,) * 2).reshape(x.shape[0], -1), x.mean((1, 2))
        return nn.Dense(3)(jnp.concatenate(x, -1) if self.read_twice else x[0])


def test_behind_a_pool_its_output_is_read():
    ahead = forward(Pooled(), GAMMA)
    ((z, pool),) = ahead.known.pooled.items()
    relu = ahead.known.rectified[z]
    relevance = np.asarray(ahead.fold(ahead.output).relevance[z])
    spread = np.asarray(at_winners(ahead.env[pool.outputs[0]], pool.params))
    came = relevance != 0
    assert came.any()
    np.testing.assert_array_equal(np.asarray(ahead.env[relu])[came], spread[came])


@pytest.mark.parametrize(
    ("model", "composite"),
    [
        (Pooled(window=3), GAMMA),  # places that lie in several windows
        (Pooled(window=2, stride=3), GAMMA),  # and in none
        (Pooled(read_twice=True), GAMMA),
        (Pooled(), GAMMA.extend((jaxlrp.kind("pick"), jaxlrp.Gradient()))),
    ],
)
def test_where_others_than_winners_may_get_relevance_the_relu_is_read(model, composite):
    assert not forward(model, composite).known.pooled


@pytest.mark.parametrize("other", [jax.nn.relu, jax.nn.relu6, lambda z: pool_of(jax.nn.relu(z), 4)])
@pytest.mark.parametrize("last", [True, False])
def test_two_activations_of_one_value(other, last):
    def model(x, w):
        z = x @ w
        parts = [other(z).sum(), pool_of(jax.nn.relu(z), 2).sum()]
        return sum(parts if last else parts[::-1])

    x, w = jnp.array([[1.0]]), jnp.array([[3.0, 1.0, 0.5, 2.0]])
    relevance = jaxlrp.lrp(model, jaxlrp.Composite.uniform(jaxlrp.Zero()))(x, w)
    np.testing.assert_allclose(relevance, [[model(x, w)]], rtol=1e-6)  # no bias: nothing is lost


def pool_of(x, window):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, window), (1, window), "VALID")


@pytest.mark.parametrize("rule", [jaxlrp.Gamma(0.5), jaxlrp.ZPlus(), jaxlrp.AlphaBeta(2.0, 1.0), jaxlrp.Epsilon()])
def test_reading_the_pool_changes_nothing(rule):
    ahead = forward(Pooled(), jaxlrp.Composite.uniform(rule))
    assert ahead.known.pooled
    blind = functools.partial(jaxlrp.fold.fold, ahead.traced.main, ahead.assignments, ahead.env, [ahead.output])
    plain = dataclasses.replace(ahead.known, pooled={})
    with_it, without = (blind(k).relevance for k in (ahead.known, plain))
    for source in ahead.traced.sources:
        np.testing.assert_array_equal(with_it[source], without[source])


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


class SmoothGamma(jaxlrp.Gamma):
    def fold(self, call, *relevance):
        return super().fold(call, smooth(relevance[0]))


class ShiftedGamma(jaxlrp.Gamma):
    def modify(self, linear):
        return dataclasses.replace(linear, output=linear.output - 1.0)


@pytest.mark.parametrize("rule", [SmoothShares(), SmoothFold(), SmoothGamma(0.5), ShiftedGamma(0.5)])
def test_a_rule_of_a_user_may_spread_relevance_to_where_none_came(rule):
    ahead = forward(Net(), GAMMA.extend((jaxlrp.name("b"), rule)))
    (source,) = ahead.traced.sources
    blind = jaxlrp.fold.fold(ahead.traced.main, ahead.assignments, ahead.env, [ahead.output], Known())
    np.testing.assert_allclose(
        ahead.fold(ahead.output).relevance[source], blind.relevance[source], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("rule", [jaxlrp.Epsilon(), jaxlrp.Gamma(0.5)])
def test_a_pool_inside_of_another_layer_is_no_pool(rule):
    class Likely(nn.Module):  # the pool is the first operation of the layer, which gives relevance to zeros too
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(6)(x)).reshape(-1, 1, 6)
            return nn.Dense(1)(jax.nn.logsumexp(nn.max_pool(h, (1,), (1,)), axis=-1))

    ahead = forward(Likely(), jaxlrp.Composite.uniform(jaxlrp.Epsilon()).extend((jaxlrp.kind("linear"), rule)))
    (source,) = ahead.traced.sources
    blind = jaxlrp.fold.fold(ahead.traced.main, ahead.assignments, ahead.env, [ahead.output], Known())
    np.testing.assert_allclose(
        ahead.fold(ahead.output).relevance[source], blind.relevance[source], rtol=1e-4, atol=1e-6
    )


def summands(ahead):
    layers = {v: a.layer.name for a in ahead.assignments for v in a.layer.outputs}
    return {layers[v]: tuple(layers[u] for u in pair) for v, pair in ahead.known.summands.items()}


@pytest.mark.parametrize("rule", [jaxlrp.Epsilon(), jaxlrp.ZPlus(), jaxlrp.Gamma(0.5), jaxlrp.Norm()])
def test_a_summand_behind_a_relu_need_not_be_kept(rule):
    ahead = forward(Net(True), jaxlrp.Composite.uniform(jaxlrp.Epsilon()).extend((jaxlrp.kind("linear"), rule)))
    relevance = ahead.fold(ahead.output).relevance
    assert list(summands(ahead)) == ["b"]  # its other summand is what b itself reads
    for value, (whole, other) in ahead.known.summands.items():
        comes = np.asarray(relevance[value]) != 0
        assert comes.any()
        difference = np.asarray(ahead.env[whole] - ahead.env[other])
        np.testing.assert_allclose(difference[comes], np.asarray(ahead.env[value])[comes], atol=1e-5)


class Sums(nn.Module):
    """A sum behind a relu, and sums whose summands have to be kept."""

    why: str = ""

    @nn.compact
    def __call__(self, x):
        a, b = (nn.Conv(6, (3, 3), name=name)(x) for name in "ab")
        if self.why == "read again":
            return nn.Dense(3, name="head")(nn.relu(a + b)) + nn.Dense(3)(a) + nn.Dense(3)(b)
        if self.why == "no relu":
            return nn.Dense(3, name="head")(nn.gelu(a + b))
        if self.why == "repeated":
            a, b = a.mean(-1, keepdims=True), b.mean(-1)[..., None]
            return nn.Dense(3, name="head")(nn.relu(a + jnp.tile(b, 6)))
        return nn.Dense(3, name="head")(nn.relu(a + b))


def test_a_sum_in_16_bits_gives_nothing_back():
    def model(x, w):
        return jax.nn.relu(x @ w + jnp.sin(x) @ w) @ w

    w = jax.random.normal(jax.random.key(0), (4, 4))
    epsilon = jaxlrp.Composite.uniform(jaxlrp.Epsilon())
    for dtype, found in ((jnp.float32, 1), (jnp.bfloat16, 0)):
        args = jnp.ones((2, 4), dtype), w.astype(dtype)
        assert len(Setup(model, epsilon, None).forward(args, {}).known.summands) == found


def test_a_block_does_not_keep_a_sum_for_another_one():
    cut = jax.checkpoint(lambda x, w: x @ w)
    epsilon = jaxlrp.Composite.uniform(jaxlrp.Epsilon())
    args = jnp.ones((2, 4)), jax.random.normal(jax.random.key(0), (4, 4))
    for first, found in ((lambda x, w: x @ w, 1), (cut, 0)):
        model = lambda x, w, first=first: jax.nn.relu(x + first(x, w)) @ jnp.ones((4, 2))  # noqa: E731
        assert len(Setup(model, epsilon, None).forward(args, {}).known.summands) == found


@pytest.mark.parametrize("rule", [jaxlrp.Epsilon(), jaxlrp.ZPlus(), jaxlrp.AlphaBeta(2.0, 1.0)], ids=str)
def test_of_a_residual_block_two_arrays_are_kept(rule):
    if jax.__version_info__ < (0, 12) and not isinstance(rule, jaxlrp.Epsilon):
        pytest.skip("XLA of old takes barriers away, and keeps what only these rules need")

    def temporary(blocks):
        def model(x, weights):
            for a, b in weights:
                x = jax.nn.relu(x + jax.nn.relu(x @ a) @ b)
            return x

        composite = jaxlrp.Composite.uniform(jaxlrp.Epsilon()).extend((jaxlrp.kind("linear"), rule))
        keys = jax.random.split(jax.random.key(0), 2 * blocks)
        weights = [tuple(jax.random.normal(k, (16, 16)) for k in keys[i : i + 2]) for i in range(0, 2 * blocks, 2)]
        x = jnp.ones((4096, 16))
        program = jax.jit(jaxlrp.lrp(model, composite, argnums=0)).lower(x, weights).compile()
        return program.memory_analysis().temp_size_in_bytes / x.nbytes

    assert round(temporary(9) - temporary(5), 1) == 8.0  # the relu inside, and that of the sum


@pytest.mark.parametrize("why", ["read again", "no relu", "repeated"])
def test_a_summand_is_kept_if_nothing_gives_it_back(why):
    assert not summands(forward(Sums(why), GAMMA.extend((jaxlrp.kind("sum"), jaxlrp.Epsilon()))))


@pytest.mark.parametrize("rule", [SmoothShares(), SmoothFold(), jaxlrp.Residual("abs"), jaxlrp.Gamma(0.5)])
def test_a_summand_is_kept_if_a_rule_reads_it_elsewhere(rule):
    epsilon = jaxlrp.Composite.uniform(jaxlrp.Epsilon())
    assert len(summands(forward(Sums(), epsilon))) == 1
    assert not summands(forward(Sums(), epsilon.extend((jaxlrp.kind("sum"), rule))))


@pytest.mark.parametrize("rule", [jaxlrp.Epsilon(), jaxlrp.Zero()], ids=str)
@pytest.mark.parametrize("act", [jax.nn.relu, jnp.tanh, jax.nn.silu])
def test_what_is_no_linear_layer_gets_no_rounding_of_a_summand_for_relevance(rule, act, rng):
    def model(x, y, w):
        return jax.nn.relu(act(y @ w) + x * 3.1).sum(-1, keepdims=True)

    x, y, w = (rng.normal(size=shape) * scale for shape, scale in (((64, 64), 10), ((64, 64), 1), ((64, 64), 0.1)))
    explain = jax.jit(jaxlrp.lrp(model, jaxlrp.Composite.uniform(rule), argnums=(0, 1)))
    single = explain(*(jnp.asarray(a, jnp.float32) for a in (x, y, w)))
    with jax.enable_x64(True):
        double = [np.asarray(r) for r in explain(*map(jnp.asarray, (x, y, w)))]
    for a, b in zip(single, double, strict=True):
        assert np.abs(np.asarray(a) - b).max() < 1e-5 * np.abs(b).max()


class Half(jaxlrp.SplitRule):
    def shares(self, relevance, z):
        return [(0.5 * relevance, 1.0, 1.0), (0.5 * relevance, 1.0, 0.0)]


@pytest.mark.parametrize(
    "rule",
    [
        Half(),
        jaxlrp.Flat(),
        jaxlrp.Epsilon(norm_scale=True),
        jaxlrp.Epsilon(lambda z: 0.1 * jnp.abs(z)),
        jaxlrp.Epsilon(bias="ignore"),
    ],
)
def test_a_summand_is_kept_if_rounding_could_hurt_its_rule(rule):
    epsilon = jaxlrp.Composite.uniform(jaxlrp.Epsilon())
    assert not summands(forward(Sums(), epsilon.extend((jaxlrp.kind("linear"), rule))))
