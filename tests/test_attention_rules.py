"""Gates, constants, embeddings and normalisations: what transformers need beyond linear layers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from jaxlrp.layers import every_layer

pytestmark = pytest.mark.usefixtures("x64")


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(rng.normal(size=s)) for s in shapes]


def uniform(*entries):
    return jaxlrp.Composite((jaxlrp.kind("linear"), jaxlrp.Zero()), (jaxlrp.kind("sum"), jaxlrp.Zero()), *entries)


# -- gates -----------------------------------------------------------------------------------------------------------

GATED = {
    "sigmoid": jax.nn.sigmoid,
    "hand-written sigmoid": lambda a: 1 / (1 + jnp.exp(-a)),
    "hard sigmoid": jax.nn.hard_sigmoid,
    "one minus sigmoid": lambda a: 1.0 - jax.nn.sigmoid(a),
    "shifted tanh": lambda a: 0.5 * (1 + jnp.tanh(a / 2)),
    "stable sigmoid": lambda a: jnp.where(
        a >= 0, 1 / (1 + jnp.exp(-jnp.abs(a))), jnp.exp(-jnp.abs(a)) / (1 + jnp.exp(-jnp.abs(a)))
    ),
    "relu6 / 6": lambda a: jax.nn.relu6(a + 3.0) * (1.0 / 6.0),
    "clipped": lambda a: jnp.clip(0.2 * a + 0.5, 0.0, 1.0),
}


@pytest.mark.parametrize("gate", GATED.values(), ids=GATED.keys())
@pytest.mark.parametrize("composite", [None, jaxlrp.AttnLRP(), jaxlrp.CPLRP(), jaxlrp.RecurrentLRP()])
def test_a_sigmoid_gate_gets_nothing(rng, gate, composite):
    x, y, w = arrays(rng, (3,), (4,), (4, 3))
    to_x, to_y = jaxlrp.lrp(lambda xy, w: xy[0] * gate(xy[1] @ w), composite)((x, y), w)
    np.testing.assert_allclose(to_x, x * gate(y @ w), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(to_y, 0)


def test_swiglu_is_shared_in_attnlrp_and_not_in_cplrp(rng):
    x, w, v = arrays(rng, (3,), (3, 4), (3, 4))
    model = lambda ab, w, v: jax.nn.silu(ab[0] @ w) * (ab[1] @ v)  # noqa: E731
    z = model((x, x), w, v)
    to_gate, to_value = jaxlrp.lrp(model, jaxlrp.AttnLRP(epsilon=0.0))((x, x), w, v)
    np.testing.assert_allclose([to_gate.sum(), to_value.sum()], [z.sum() / 2] * 2, rtol=1e-12)
    to_gate, to_value = jaxlrp.lrp(model, jaxlrp.CPLRP(epsilon=0.0))((x, x), w, v)
    np.testing.assert_allclose([to_gate.sum(), to_value.sum()], [0.0, z.sum()], rtol=1e-12)


def test_equal_gates_share(rng):
    x, y = arrays(rng, (3,), (3,))
    both = lambda xy: jax.nn.sigmoid(xy[0]) * jax.nn.sigmoid(xy[1])  # noqa: E731
    parts = jaxlrp.lrp(both, uniform((jaxlrp.kind("product"), jaxlrp.SignalTakeAll(epsilon=0.0))))((x, y))
    for part in parts:
        np.testing.assert_allclose(part, both((x, y)) / 2, rtol=1e-12)


def test_squeeze_and_excitation_takes_the_default(rng):
    x, w = arrays(rng, (4, 4, 3), (3, 3))
    model = lambda x, w: x * jax.nn.sigmoid(x.mean((0, 1)) @ w)  # noqa: E731
    np.testing.assert_allclose(jaxlrp.lrp(model)(x, w), model(x, w), rtol=1e-4, atol=1e-6)


# -- constants -------------------------------------------------------------------------------------------------------


def test_products_hand_all_to_what_is_no_constant(rng):
    x, y, w = arrays(rng, (3,), (4,), (4, 3))
    hold = uniform((jaxlrp.kind("tanh"), jaxlrp.Constant()), (jaxlrp.kind("product"), jaxlrp.EqualShare(epsilon=0.0)))
    model = lambda xy, w: xy[0] * jnp.tanh(xy[1] @ w)  # noqa: E731
    to_x, to_y = jaxlrp.lrp(model, hold)((x, y), w)
    np.testing.assert_allclose(to_x, model((x, y), w), rtol=1e-12)
    np.testing.assert_array_equal(to_y, 0)
    jaxlrp.ledger(model, hold)((x, y), w).check(1e-12)


def test_what_is_made_of_constants_is_constant(rng):
    x, y, w = arrays(rng, (3,), (4,), (4, 3))
    hold = uniform((jaxlrp.kind("tanh"), jaxlrp.Constant()), (jaxlrp.kind("product"), jaxlrp.EqualShare(epsilon=0.0)))
    model = lambda xy, w: xy[0] * (jax.nn.relu(jnp.tanh(xy[1] @ w) @ jnp.eye(3)) + jnp.tanh(xy[1] @ w))  # noqa: E731
    to_x, to_y = jaxlrp.lrp(model, hold)((x, y), w)
    np.testing.assert_allclose(to_x, model((x, y), w), rtol=1e-12)
    np.testing.assert_array_equal(to_y, 0)


def test_the_share_of_a_constant_in_a_sum_is_lost_by_name(rng):
    x, y, w = arrays(rng, (3,), (4,), (4, 3))
    hold = uniform((jaxlrp.kind("tanh"), jaxlrp.Constant()))
    model = lambda xy, w: xy[0] + jnp.tanh(xy[1] @ w)  # noqa: E731
    to_x, to_y = jaxlrp.lrp(model, hold)((x, y), w)
    np.testing.assert_allclose(to_x, x, rtol=1e-12)
    np.testing.assert_array_equal(to_y, 0)
    account = jaxlrp.ledger(model, hold)((x, y), w).check(1e-12)
    np.testing.assert_allclose(account.losses["constant"].sum(), jnp.tanh(y @ w).sum(), rtol=1e-12)


def test_a_final_softmax_passes_under_cplrp(rng):
    x, w = arrays(rng, (3,), (3, 4))
    explain = jaxlrp.lrp(lambda x, w: jax.nn.softmax(x @ w), jaxlrp.CPLRP(epsilon=0.0))
    np.testing.assert_allclose(explain(x, w, target=2).sum(), jax.nn.softmax(x @ w)[2], rtol=1e-10)


# -- softmax and products: the formulas of rules.md ------------------------------------------------------------------


def test_softmax_of_attnlrp(rng):
    x, r = arrays(rng, (2, 5), (2, 5))
    x = x.at[0, 3].set(-jnp.inf)
    r = r.at[0, 3].set(0.0)  # nothing comes to a probability of 0
    s = jax.nn.softmax(x)
    expected = jnp.where(jnp.isfinite(x), x, 0.0) * (r - s * r.sum(-1, keepdims=True))
    composite = uniform((jaxlrp.kind("softmax"), jaxlrp.Zero()))
    # a product by 1 behind it: the last softmax of a model passes relevance unchanged
    got = jaxlrp.lrp(lambda x: jax.nn.softmax(x) @ jnp.eye(5), composite, target=lambda _: r)(x)
    mask = jnp.isfinite(x)
    np.testing.assert_allclose(got[mask], expected[mask], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("einsum", ["ij,jk->ik", "bij,bjk->bik", "bihd,bjhd->bhij"])
def test_matrix_products_share_equally(rng, einsum):
    sizes = dict(zip("bihdjk", (2, 3, 2, 4, 5, 3), strict=True))
    left, right = (tuple(sizes[c] for c in term) for term in einsum.split("->")[0].split(","))
    a, v = arrays(rng, left, right)
    run = lambda av: jnp.einsum(einsum, *av)  # noqa: E731
    (r,) = arrays(rng, run((a, v)).shape)
    n = r / (2 * run((a, v)))
    _, pull = jax.vjp(run, (a, v))
    expected = jax.tree.map(jnp.multiply, (a, v), pull(n)[0])
    composite = uniform((jaxlrp.kind("product"), jaxlrp.EqualShare(epsilon=0.0)))
    got = jaxlrp.lrp(run, composite, target=lambda _: r)((a, v))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)


def test_products_of_three_factors(rng):
    factors = arrays(rng, (3,), (3,), (3,))
    for run in (lambda f: f[0] * f[1] * f[2], lambda f: jnp.einsum("i,i,i->i", *f)):
        parts = jaxlrp.lrp(run, uniform((jaxlrp.kind("product"), jaxlrp.EqualShare(epsilon=0.0))))(tuple(factors))
        z = run(factors)
        for part in parts:
            np.testing.assert_allclose(part, z / 3, rtol=1e-10)


def test_a_product_over_an_axis(rng):
    (x,) = arrays(rng, (3, 4))
    got = jaxlrp.lrp(lambda x: jnp.prod(x, axis=1), jaxlrp.AttnLRP(0.0))(x)
    np.testing.assert_allclose(got, jnp.broadcast_to(jnp.prod(x, 1, keepdims=True) / 4, x.shape), rtol=1e-12)


def test_an_optimization_barrier_hands_on_each_operand(rng):
    (x,) = arrays(rng, (3,))
    np.testing.assert_allclose(jaxlrp.lrp(lambda x: jax.lax.optimization_barrier((x, 2 * x))[1])(x), 2 * x, rtol=1e-12)


# -- normalisation ---------------------------------------------------------------------------------------------------


def test_layernorm_equals_its_closed_form(rng):
    x, r, gain = arrays(rng, (6,), (6,), (6,))
    model = lambda x, gain: (x - x.mean()) / jnp.sqrt(x.var() + 1e-5) * gain  # noqa: E731
    n = x.size
    weights = jnp.eye(n) - 1 / n
    expected = sum(x * weights[j] / (weights[j] @ x) * r[j] for j in range(n))
    composite = uniform((jaxlrp.kind("normalization"), jaxlrp.HoldScale(epsilon=0.0)))
    np.testing.assert_allclose(jaxlrp.lrp(model, composite, target=lambda _: r)(x, gain), expected, rtol=1e-10)


def test_rmsnorm_passes_relevance(rng):
    x, r = arrays(rng, (2, 6), (2, 6))
    model = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)  # noqa: E731
    composite = uniform((jaxlrp.kind("normalization"), jaxlrp.HoldScale(epsilon=0.0)))
    np.testing.assert_allclose(jaxlrp.lrp(model, composite, target=lambda _: r)(x), r, rtol=1e-10)


def test_the_ledger_catches_a_layernorm_whose_scale_is_not_held(rng, monkeypatch):
    x, w = arrays(rng, (4, 6), (6, 3))
    params = {"params": {"scale": jnp.ones(6), "bias": jnp.full(6, 0.1)}}
    model = lambda x, w: nn.LayerNorm(param_dtype=jnp.float64).apply(params, x) @ w  # noqa: E731
    account = jaxlrp.ledger(model, jaxlrp.AttnLRP(epsilon=0.0))
    account(x, w).check(1e-10)
    monkeypatch.setattr("jaxlrp.rules._base._Scales.held", lambda self, equation: [])
    broken = account(x, w)
    norm = next(i for i, name in enumerate(broken.layers) if "norm" in name.lower() or "scale" in name.lower())
    # gradient x input through a LayerNorm sums to exactly 0: plausible to look at, and wrong
    np.testing.assert_allclose(broken.handed[norm], 0.0, atol=1e-4)
    with pytest.raises(jaxlrp.ConservationError):
        broken.check(1e-3)


def test_the_ledger_catches_a_layernorm_that_is_not_recognised(rng, monkeypatch):
    x, w, v = arrays(rng, (4, 6), (6, 6), (6, 3))

    def model(x, w, v):
        h = x @ w
        centred = h - h.mean(-1, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) @ v

    kept = jaxlrp.ledger(model, jaxlrp.AttnLRP(epsilon=0.0))(x, w, v).check(1e-9)
    np.testing.assert_allclose(kept.end, kept.start, rtol=1e-9)

    monkeypatch.setattr("jaxlrp.segments._classify", lambda *_: ("activation", "wrong"))
    monkeypatch.setattr("jaxlrp.composites.DEFAULTS", ((jaxlrp.kind("activation"), jaxlrp.Zero()),))
    broken = jaxlrp.ledger(model, jaxlrp.AttnLRP(epsilon=0.0))(x, w, v)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(broken.end, broken.start, rtol=0.5)
    lost = sum(float(v.sum()) for v in broken.losses.values())
    np.testing.assert_allclose(lost, broken.start - broken.end, rtol=1e-6)


# -- embeddings ------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 4, param_dtype=jnp.float64)(ids)
        x = x + self.param("positions", nn.initializers.normal(), (ids.shape[-1], 4), jnp.float64)
        x = jnp.where((ids != 0)[..., None], x, 0.0)
        return nn.Dense(3, param_dtype=jnp.float64)(x.mean(-2))


def test_relevance_of_token_ids_is_that_of_their_embeddings(rng, key):
    model, ids = Bag(), jnp.array([[1, 2, 0], [3, 3, 6]])
    params = model.init(key, ids)
    relevance = jax.jit(jaxlrp.lrp(model, jaxlrp.AttnLRP()))(params, ids, target=jnp.array([0, 2]))
    assert relevance.shape == (2, 3, 4)
    np.testing.assert_array_equal(relevance[0, 2], 0)  # padding

    table = params["params"]["Embed_0"]["embedding"]
    rest = lambda x: _from(params, ids, x)  # noqa: E731
    expected = jaxlrp.lrp(rest, jaxlrp.AttnLRP())(table[ids], target=jnp.array([0, 2]))
    np.testing.assert_allclose(relevance, expected, rtol=1e-12)


def _from(params, ids, x):
    p = params["params"]
    x = jnp.where((ids != 0)[..., None], x + p["positions"], 0.0)
    return x.mean(-2) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]


@pytest.mark.parametrize(
    "lookup", [lambda t, i: jnp.take(t, i, axis=0), lambda t, i: t[i], lambda t, i: jax.nn.one_hot(i, 7) @ t]
)
def test_every_spelling_of_a_lookup(rng, lookup):
    table, w = arrays(rng, (7, 4), (4, 3))
    ids = jnp.array([[1, 2, 0], [3, 3, 6]])
    got = jaxlrp.lrp(lambda ids, t, w: lookup(t, ids) @ w, jaxlrp.Epsilon())(ids, table, w)
    want = jaxlrp.lrp(lambda x, w: x @ w, jaxlrp.Epsilon())(table[ids], w)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_several_lookups_give_several_relevances(rng):
    table, other = arrays(rng, (7, 4), (7, 4))
    ids = jnp.array([1, 2, 0])
    a, b = jaxlrp.lrp(lambda i, s, t: s[i] + t[i], jaxlrp.AttnLRP(0.0))(ids, table, other)
    np.testing.assert_allclose(a, table[ids], rtol=1e-12)
    np.testing.assert_allclose(b, other[ids], rtol=1e-12)


def test_token_ids_beside_other_arrays(rng):
    table, w = arrays(rng, (7, 4), (4, 3))
    ids, mask = jnp.array([1, 2, 0]), jnp.array([1, 1, 0])
    model = lambda batch, t, w: (t[batch["ids"]] * batch["mask"][:, None]).sum(0) @ w  # noqa: E731
    relevance = jaxlrp.lrp(model, jaxlrp.Epsilon())({"ids": ids, "mask": mask}, table, w)
    assert relevance["ids"].shape == (3, 4)
    assert relevance["mask"] is None


def test_the_ledger_ends_at_the_embeddings(rng, key):
    model, ids = Bag(), jnp.array([[1, 2, 0], [3, 3, 6]])
    params = model.init(key, ids)
    account = jaxlrp.ledger(model, jaxlrp.AttnLRP())(params, ids, target=1).check(1e-10)
    np.testing.assert_allclose(
        account.end, jaxlrp.lrp(model, jaxlrp.AttnLRP())(params, ids, target=1).sum(), rtol=1e-10
    )


@pytest.mark.parametrize("fill", [-1e9, float(np.finfo(np.float32).min), -np.inf])
def test_rows_that_are_masked_altogether(rng, fill):
    scores = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    mask = jnp.array([[True, True, False], [True, False, False], [not np.isfinite(fill), False, False]])
    model = lambda x: jax.nn.softmax(jnp.where(mask, x, fill)) @ jnp.arange(3.0, dtype=jnp.float32)  # noqa: E731
    relevance = jaxlrp.lrp(model, jaxlrp.AttnLRP())(scores)
    assert np.isfinite(relevance).all()
    np.testing.assert_array_equal(relevance[~mask], 0)
    jaxlrp.ledger(model, jaxlrp.AttnLRP())(scores).check(1e-4)


def test_a_lookup_of_single_tokens_under_vmap(rng):
    table, w = arrays(rng, (7, 4), (4, 3))
    ids = jnp.array([[1, 2, 0], [3, 3, 6]])
    each = jax.vmap(jax.vmap(lambda i, t: t[i], (0, None)), (0, None))
    got = jaxlrp.lrp(lambda ids, t, w: each(ids, t) @ w, jaxlrp.Epsilon())(ids, table, w)
    want = jaxlrp.lrp(lambda x, w: x @ w, jaxlrp.Epsilon())(table[ids], w)
    np.testing.assert_allclose(got, want, rtol=1e-12)


# -- decisions and segments ------------------------------------------------------------------------------------------


def test_routing_by_top_k_loses_nothing(rng):
    (x,) = arrays(rng, (4, 5))

    def route(x):
        values, indices = jax.lax.top_k(x, 2)
        return (values[..., None] * jax.nn.one_hot(indices, 5, dtype=x.dtype)).sum(-2)

    expected = jnp.where(x >= jax.lax.top_k(x, 2)[0][:, -1:], x, 0.0)
    np.testing.assert_allclose(jaxlrp.lrp(route, jaxlrp.AttnLRP(0.0))(x), expected, rtol=1e-12)


def test_a_mask_by_comparison_of_two_values_is_constant(rng):
    x, y = arrays(rng, (5,), (5,))
    model = lambda xy: xy[0] * (jnp.tanh(xy[0]) > xy[1])  # noqa: E731
    to_x, to_y = jaxlrp.lrp(model, jaxlrp.AttnLRP(0.0))((x, y))
    np.testing.assert_allclose(to_x, model((x, y)), rtol=1e-12)
    np.testing.assert_array_equal(to_y, 0)


IDS = np.array([0, 0, 1, 2, 2, 2])


def test_segment_sums_means_maxima_and_softmax(rng):
    x, w = arrays(rng, (6, 2), (2, 2))
    ops = jax.ops
    total = lambda x: ops.segment_sum(x, IDS, 3)  # noqa: E731
    mean = lambda x: ops.segment_sum(x, IDS, 3) / ops.segment_sum(jnp.ones(6), IDS, 3)[:, None]  # noqa: E731
    for model in (total, mean, lambda x: ops.segment_max(x, IDS, 3)):
        got = jaxlrp.lrp(model, uniform())(x)
        np.testing.assert_allclose(got, x * jax.grad(lambda x, f=model: f(x).sum())(x), rtol=1e-10)

    def softmax(x):
        e = jnp.exp(x - ops.segment_max(x, IDS, 3)[IDS])
        return e / ops.segment_sum(e, IDS, 3)[IDS]

    layers = [layer.kind for layer, _ in every_layer(jaxlrp.trace(lambda x, w: softmax(x) @ w, x, w))]
    assert layers == ["softmax", "linear"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_segment_sums_in_half_precision(rng, dtype):
    x = arrays(rng, (6, 2))[0].astype(dtype)
    got = jaxlrp.lrp(lambda x: jax.ops.segment_sum(x, IDS, 3), jaxlrp.Epsilon())(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x.astype(jnp.float32), rtol=0.05, atol=0.05)
