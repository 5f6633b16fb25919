"""What reviews found wrong once: recurrences, branches, gates, token ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxlrp
from jaxlrp.layers import every_layer

pytestmark = pytest.mark.usefixtures("x64")


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(rng.normal(size=s)) for s in shapes]


@pytest.mark.parametrize("loop", ["map", "cond"])
def test_a_softmax_at_the_end_of_a_body_is_the_last(rng, loop):
    w, xs = arrays(rng, (4, 3), (2, 4))
    f = lambda x: jax.nn.softmax(x @ w)  # noqa: E731
    run = (lambda xs: lax.map(f, xs)) if loop == "map" else (lambda xs: lax.cond(w[0, 0] < 9, f, lambda z: z @ w, xs))
    np.testing.assert_allclose(jaxlrp.lrp(run)(xs), jaxlrp.lrp(jax.vmap(f))(xs), rtol=1e-10)


def test_a_softmax_that_is_carried_is_not_the_last(rng):
    w, xs = arrays(rng, (3, 3), (4, 3))

    def model(xs):
        return lax.scan(lambda h, x: ((s := jax.nn.softmax(x @ w + h)), s), jnp.zeros(3), xs)[1]

    (softmax,) = [layer for layer, _ in every_layer(jaxlrp.trace(model, xs)) if layer.kind == "softmax"]
    assert not softmax.final


class Norm(jaxlrp.HoldScale):
    def fold(self, call, *relevance):
        return relevance


class Halves(jaxlrp.Gamma):
    def shares(self, relevance, z):
        return [(0.5 * relevance, 1.0, 1.0), (0.5 * relevance, 1.0, 0.0)]


class PlainHalves(jaxlrp.SplitRule):
    def shares(self, relevance, z):
        return [(0.5 * relevance, 1.0, 1.0), (0.5 * relevance, 1.0, 0.0)]


def test_rules_derived_from_the_packages_own_are_not_trusted_beyond_what_they_keep(rng):
    x, w = arrays(rng, (4,), (4, 5))
    net = lambda x: (h := jax.nn.relu(x @ w)) / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-5)  # noqa: E731
    gamma = jaxlrp.Composite((jaxlrp.kind("linear"), jaxlrp.Gamma(0.5)), (jaxlrp.kind("normalization"), Norm()))
    account = jaxlrp.ledger(net, gamma, target=jnp.ones_like)(x)
    np.testing.assert_allclose(account.arrived[0], 5.0)
    assert float(account.losses["dropped sign"][0]) == 0

    v = arrays(rng, (5, 2))[0]
    two = lambda x: jax.nn.relu(x @ w) @ v  # noqa: E731
    got, want = (jaxlrp.lrp(two, jaxlrp.Composite.uniform(rule()))(x) for rule in (Halves, PlainHalves))
    np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("order", [1, -1])
def test_gates_of_a_branch_are_those_of_all_alternatives(rng, order):
    x = arrays(rng, (2, 3))[0]
    branches = (jax.nn.sigmoid, lambda v: v * x[1])[::order]
    model = lambda x: lax.switch(jnp.int32(x[1].sum() > 1e9), branches, x[0]) * x[1]  # noqa: E731
    product = [layer for layer, depth in every_layer(jaxlrp.trace(model, x)) if layer.kind == "product" and not depth]
    assert [layer.op for layer in product] == ["mul"]


def test_identity_on_a_transposed_normalisation_keeps_places(rng):
    x, g = arrays(rng, (3, 4), (4, 1))
    net = lambda x: ((x - x.mean()) / jnp.sqrt(x.var() + 1e-5)).T * g  # noqa: E731
    composite = jaxlrp.Composite((jaxlrp.kind("normalization"), jaxlrp.Pass()))
    seed = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_allclose(jaxlrp.lrp(net, composite, target=lambda _: seed)(x), seed.T)


POSITIONS = {
    "counted by comparison": lambda ids: jnp.cumsum((ids != jnp.zeros_like(ids)).astype(int), -1),
    "counted by sign": lambda ids: jnp.cumsum(jnp.sign(ids), -1),
    "of the largest": lambda ids: jnp.argmax(ids, -1, keepdims=True),
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS.keys())
def test_positions_made_from_ids_are_no_tokens(rng, positions):
    e, p, ids = *arrays(rng, (7, 4), (9, 4)), jnp.array([3, 1, 0, 6, 2])
    relevance = jaxlrp.lrp(lambda ids: e[ids] + p[positions(ids)], jaxlrp.Epsilon())(ids)
    assert relevance.shape == (5, 4)


def test_what_else_is_made_from_ids_is_no_token(rng):
    e, p, idf, ids = *arrays(rng, (7, 4), (5, 4), (7,)), jnp.array([3, 1, 0, 6, 2])
    same = lambda ids: e[ids] + (ids[:, None] == ids[None]).astype(e.dtype) @ p  # noqa: E731
    weighted = lambda ids: e[ids] * idf[ids][:, None]  # noqa: E731
    parts = lambda ids: jax.nn.one_hot(ids, 7, dtype=e.dtype)[jnp.array([0, 2])] @ e  # noqa: E731
    for model, shape in ((same, (5, 4)), (weighted, (5, 4)), (parts, (2, 4))):
        assert jaxlrp.lrp(model, jaxlrp.Epsilon())(ids).shape == shape


def test_embeddings_in_functions_with_derivatives_of_their_own(rng):
    e, ids = arrays(rng, (7, 4))[0], jnp.array([3, 1, 0])

    @jax.custom_vjp
    def embed(table, ids):
        return table[ids]

    embed.defvjp(lambda t, i: (t[i], (t, i)), lambda kept, g: (jnp.zeros_like(kept[0]).at[kept[1]].add(g), None))
    relevance = jaxlrp.lrp(lambda ids: embed(e, ids).sum(0), jaxlrp.Epsilon())(ids)
    np.testing.assert_allclose(relevance, e[ids], rtol=1e-4)
    chosen = lambda ids, flag: e[lax.cond(flag, lambda i: i, lambda i: i + 1, ids)]  # noqa: E731
    assert jaxlrp.lrp(chosen, jaxlrp.Epsilon())(ids, True).shape == (3, 4)


def test_random_masks_out_of_a_loop_are_noticed(rng):
    x, w = arrays(rng, (3, 4), (4, 4))
    keys = jax.random.split(jax.random.key(0), 3)
    model = lambda x: (x @ w) * lax.map(lambda k: jax.random.bernoulli(k, 0.5, (4,)), keys)  # noqa: E731
    with pytest.raises(jaxlrp.NotDeterministicError):
        jaxlrp.lrp(model)(x)


def test_first_and_last_follow_carries(rng):
    x, w, u, v = arrays(rng, (3, 4), (4, 5), (5, 5), (5, 2))
    model = lambda x: lax.scan(lambda c, t: (jnp.tanh(t @ w + c @ u), None), jnp.zeros(5), x)[0] @ v  # noqa: E731
    layers = jaxlrp.trace(model, x)
    composite = jaxlrp.Composite.uniform(jaxlrp.Epsilon()).extend(
        (jaxlrp.first("linear"), jaxlrp.Flat()), (jaxlrp.last("linear"), jaxlrp.Zero())
    )
    rules = [str(a.rule) for a, _ in composite.assign(layers).every() if a.layer.kind == "linear"]
    assert sorted(rules) == ["Epsilon()", "Flat()", "Zero()"]


def test_a_masked_log_softmax_closes(rng):
    x, w = arrays(rng, (3,), (3, 4))
    mask = jnp.array([True, True, False, True])
    model = lambda x: jnp.where(mask, jax.nn.log_softmax(jnp.where(mask, x @ w, -jnp.inf)), 0.0)  # noqa: E731
    jaxlrp.ledger(model, jaxlrp.AttnLRP())(x).check(1e-9)


def test_a_constant_divided_by_a_value(rng):
    x, y = arrays(rng, (3,), (3,))
    hold = jaxlrp.AttnLRP(0.0).extend((jaxlrp.kind("tanh"), jaxlrp.Constant()))
    model = lambda xy: jnp.tanh(xy[0]) / xy[1]  # noqa: E731
    to_x, to_y = jaxlrp.lrp(model, hold)((x, y))
    np.testing.assert_array_equal(to_x, 0)
    np.testing.assert_allclose(to_y, model((x, y)), rtol=1e-10)


def test_flat_takes_any_epsilon(rng):
    x, w = arrays(rng, (1, 5, 5, 2), (3, 3, 2, 4))
    conv = lambda x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    plain = jaxlrp.lrp(conv, jaxlrp.Flat(epsilon=0.5))(x)
    for epsilon in (jnp.full(4, 0.5), lambda z: 0.5 * jnp.ones_like(z)):
        np.testing.assert_allclose(jaxlrp.lrp(conv, jaxlrp.Flat(epsilon=epsilon))(x), plain, rtol=1e-10)


def test_rules_on_layers_they_are_not_for_say_so(rng):
    x, w = arrays(rng, (3, 4), (4, 4))
    loop = lambda x: lax.scan(lambda c, t: (c + t @ w, None), jnp.zeros(4), x)[0]  # noqa: E731
    with pytest.raises(jaxlrp.RuleError, match=r"LayerByLayer\(\)"):
        jaxlrp.lrp(loop, jaxlrp.EpsilonPlus().extend((jaxlrp.kind("recurrence"), jaxlrp.Gamma())))(x)
    split = lambda x: sum(jnp.split(x @ w, 2, -1))  # noqa: E731
    with pytest.raises(jaxlrp.RuleError, match="is for products"):
        jaxlrp.lrp(split, jaxlrp.EpsilonPlus().extend((jaxlrp.kind("move"), jaxlrp.EqualShare())))(x)
