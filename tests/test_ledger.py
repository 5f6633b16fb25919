"""The ledger: every layer's account closes, and what is lost has the right name and size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxlrp
from benchmarks.goldens import COMPOSITES, golden_nets
from jaxlrp import Composite, ConservationError, Epsilon, InputError

NETS = golden_nets()
every_net = pytest.mark.parametrize("net", NETS)
every_composite = pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)


def account(net: str, composite: Any, dtype: Any, target: Any = None) -> jaxlrp.Ledger:
    module, variables, data = NETS[net]
    variables, x = jax.tree.map(lambda a: jnp.asarray(a, dtype), (variables, data["x"][:2]))
    return jaxlrp.ledger(module, composite)(variables, x, target=target)


# -- it closes -------------------------------------------------------------------------------------


@every_net
@every_composite
def test_closes_in_double_precision(net: str, composite: Composite, x64: None) -> None:
    module, variables, data = NETS[net]
    book = account(net, composite, jnp.float64, data["label"][:2]).check(1e-9)
    whole = account(net, composite, jnp.float64).check(1e-9)
    x = data["x"][:2]
    relevance = jaxlrp.lrp(module, composite)(variables, x)
    np.testing.assert_allclose(whole.end, relevance.sum(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(whole.start, module.apply(variables, x).sum(), rtol=1e-9)
    for ledger in (book, whole):
        named = sum(np.asarray(v) for v in ledger.losses.values())
        hole = np.abs(ledger.arrived - (ledger.handed + named))
        assert np.all(hole <= 1e-6 * abs(float(ledger.start)))
        losses = sum(float(v.sum()) for v in ledger.losses.values())
        np.testing.assert_allclose(ledger.start, ledger.end + losses, atol=1e-9 * ledger.size.max())


@every_net
@every_composite
def test_closes_in_single_precision(net: str, composite: Composite) -> None:
    account(net, composite, jnp.float32, 1).check(1e-5)


def test_what_one_layer_hands_on_arrives_at_the_next(x64: None) -> None:
    book = account("mlp", jaxlrp.EpsilonPlus(), jnp.float64)  # a chain: nothing meets or parts
    np.testing.assert_allclose(book.handed[1:], book.arrived[:-1])
    np.testing.assert_allclose((book.start, book.end), (book.arrived[-1], book.handed[0]))
    assert book.layers == ("Dense_0", "relu", "Dense_1", "tanh", "Dense_2")
    assert book.rules == ("Epsilon()", "Pass()", "Epsilon()", "Pass()", "Epsilon()")


def test_only_layers_that_relevance_came_through_are_listed() -> None:
    model = lambda x, w: (jnp.tanh(x) @ w, jnp.exp(x))  # noqa: E731
    only_first = lambda out: (out[0], jnp.zeros_like(out[1]))  # noqa: E731
    book = jaxlrp.ledger(model, Epsilon())(jnp.ones(2), jnp.ones((2, 3)), target=only_first)
    assert book.arrived[book.layers.index("exp")] == 0.0
    book.check(1e-5)


# -- it does not close by itself -------------------------------------------------------------------


class Leaky(jaxlrp.Rule):
    """Keep a share for itself and say nothing."""

    share: Any = 0.1

    def fold(self, call: Any, *relevance: jax.Array) -> Any:
        return tuple((1.0 - self.share) * r for r in relevance)


class Boastful(jaxlrp.Pass):
    """Hand all of it on and name a loss that never was."""

    def losses(self, call: Any, *relevance: jax.Array) -> Any:
        return {"imagined": 0.1 * jnp.sum(relevance[0])}


class LeakyLinear(jaxlrp.ZPlus):
    """The z+ rule, but a twentieth too much goes to the inputs."""

    def fold(self, call: Any, *relevance: jax.Array) -> Any:
        return tuple(1.05 * r for r in super().fold(call, *relevance))


class Broken(jaxlrp.Rule):
    """Divide by zero."""

    def fold(self, call: Any, *relevance: jax.Array) -> Any:
        return tuple(r * jnp.nan for r in relevance)


@pytest.mark.parametrize(
    ("layer", "rule"),
    [("relu", Leaky()), ("tanh", Leaky()), ("tanh", Boastful()), ("Dense_1", LeakyLinear())],
    ids=lambda p: p if isinstance(p, str) else type(p).__name__,
)
def test_an_unnamed_loss_is_caught_at_its_layer(layer: str, rule: Any, x64: None) -> None:
    composite = jaxlrp.EpsilonPlus().extend((jaxlrp.name(layer), rule))
    book = account("mlp", composite, jnp.float64, 1)
    with pytest.raises(ConservationError, match=rf"layer '{layer}' with rule {type(rule).__name__}\("):
        book.check(1e-9)


def test_nan_is_blamed_on_the_layer_that_made_it(x64: None) -> None:
    composite = jaxlrp.EpsilonPlus().extend((jaxlrp.name("relu"), Broken()))
    book = account("mlp", composite, jnp.float64, 1)
    with pytest.raises(ConservationError, match=r"layer 'relu' with rule Broken\("):
        book.check(1e-9)


def test_the_worst_of_several_leaks_is_named(x64: None) -> None:
    small = (jaxlrp.kind("relu"), Leaky(0.01))
    large = (jaxlrp.kind("tanh"), Leaky(0.2))
    book = account("mlp", jaxlrp.EpsilonPlus().extend(small, large), jnp.float64, 1)
    with pytest.raises(ConservationError, match="'tanh'"):
        book.check()
    assert {n for n, hole in zip(book.layers, book.unnamed, strict=True) if abs(hole) > 1e-9} == {"relu", "tanh"}


def test_leaks_show_in_the_printed_table() -> None:
    model = lambda x: jnp.tanh(x)  # noqa: E731
    composite = Composite((jaxlrp.kind("activation"), Leaky(0.25)))
    text = str(jaxlrp.ledger(model, composite, target=jnp.ones_like)(jnp.ones(4)))
    assert text.splitlines()[2].split() == ["tanh", "Leaky(share=0.25)", "4", "3", "75.0", "%", "1"]


# -- the numbers, by hand --------------------------------------------------------------------------


def dense(x: jax.Array, w: jax.Array, b: jax.Array | None = None) -> jax.Array:
    return x @ w if b is None else x @ w + b


def one_layer(rule: jaxlrp.Rule, x: Any, w: Any, b: Any, start: Any) -> dict[str, float]:
    args = [jnp.asarray(a, jnp.float64) for a in (x, w, b) if a is not None]
    seed = lambda out: jnp.asarray(start, out.dtype)  # noqa: E731
    book = jaxlrp.ledger(dense, rule)(*args, target=seed).check(1e-9)
    found = {k: float(v[0]) for k, v in book.losses.items() if abs(float(v[0])) > 1e-12}
    return {"handed": float(book.handed[0]), **found}


W = [[3.0], [-1.0]]
# x w = (3, -2), b = 2: z = 3, P = 5, N = -2
CASES: dict[str, tuple[Any, dict[str, float]]] = {
    # 3 / 3.5 a unit of z: 1 to the inputs, 2 to the bias, 0.5 to the stabiliser
    "epsilon": (Epsilon(0.5), {"handed": 6 / 7, "bias": 12 / 7, "stabiliser": 3 / 7}),
    "zero": (jaxlrp.Zero(), {"handed": 1.0, "bias": 2.0}),
    # without the bias z = 1: 3 / 1.5 a unit
    "epsilon ignore": (Epsilon(0.5, bias="ignore"), {"handed": 2.0, "stabiliser": 1.0}),
    "epsilon redistribute": (Epsilon(0.5, bias="redistribute"), {"handed": 3.0}),
    "zplus": (jaxlrp.ZPlus(epsilon=0.0), {"handed": 9 / 5, "bias": 6 / 5}),
    "zplus stabilised": (jaxlrp.ZPlus(epsilon=1.0), {"handed": 3 / 2, "bias": 1.0, "stabiliser": 0.5}),
    # 6 over P = 5: 18/5 and 12/5 to the bias; -3 over N = -2, all to the second input
    "alpha2beta1": (jaxlrp.AlphaBeta(2.0, 1.0, epsilon=0.0), {"handed": 3 / 5, "bias": 12 / 5}),
    # gamma 1: contributions (6, -2), bias 4, sum 8
    "gamma": (jaxlrp.Gamma(1.0, epsilon=0.0), {"handed": 3 / 2, "bias": 3 / 2}),
    # weights 9 and 1, bias 4
    "wsquare": (jaxlrp.WSquare(epsilon=0.0), {"handed": 30 / 14, "bias": 12 / 14}),
    "flat": (jaxlrp.Flat(epsilon=0.0), {"handed": 3.0}),
    "flat stabilised": (jaxlrp.Flat(epsilon=1.0), {"handed": 2.0, "stabiliser": 1.0}),
    # box [-1, 3]: 3 + 3 = 6 and -2 + 3 = 1, no bias
    "zbox": (jaxlrp.ZBox(-1.0, 3.0, epsilon=1.0), {"handed": 21 / 8, "stabiliser": 3 / 8}),
}


@pytest.mark.parametrize(("rule", "want"), CASES.values(), ids=CASES)
def test_losses_of_one_layer(rule: jaxlrp.Rule, want: dict[str, float], x64: None) -> None:
    got = one_layer(rule, [1.0, 2.0], W, [2.0], [3.0])
    assert got == pytest.approx(want, abs=1e-12)


def test_dropped_sign_where_no_contribution_is_positive(x64: None) -> None:
    got = one_layer(jaxlrp.ZPlus(), [1.0, 1.0], [[-1.0, 1.0], [-2.0, 1.0]], None, [-3.0, 2.0])
    assert got["dropped sign"] == pytest.approx(-3.0)
    assert got["handed"] == pytest.approx(2.0, rel=1e-5)


def test_dropped_sign_of_alpha_beta_takes_the_share_of_the_missing_side(x64: None) -> None:
    # only positive contributions: 2 R goes to them, and the -R for negative ones finds nobody
    got = one_layer(jaxlrp.AlphaBeta(2.0, 1.0, epsilon=0.0), [1.0, 1.0], [[1.0], [3.0]], None, [5.0])
    assert got == pytest.approx({"handed": 10.0, "dropped sign": -5.0})


def test_dropped_where_contributions_cancel(x64: None) -> None:
    for rule in (jaxlrp.Zero(), jaxlrp.Gamma(0.25)):
        got = one_layer(rule, [1.0, 1.0], [[1.0], [-1.0]], None, [4.0])
        assert got == pytest.approx({"handed": 0.0, "dropped sign": 4.0})


def test_bias_of_the_example_in_the_rules(x64: None) -> None:
    # W = (1, -1), b = -1, x = (1, 1), R = -1: relevance (-2, 0.5), so half a unit went to the bias
    got = one_layer(jaxlrp.AlphaBeta(2.0, 1.0, epsilon=0.0), [1.0, 1.0], [[1.0], [-1.0]], [-1.0], [-1.0])
    assert got == pytest.approx({"handed": -1.5, "bias": 0.5})


def test_losses_add_up_over_outputs_and_batch(x64: None) -> None:
    one = one_layer(Epsilon(0.5), [1.0, 2.0], W, [2.0], [3.0])
    two = one_layer(Epsilon(0.5), [[1.0, 2.0]] * 2, np.tile(W, 2), [2.0, 2.0], [[3.0, 3.0]] * 2)
    assert two == pytest.approx({k: 4 * v for k, v in one.items()})


def test_batch_norm_shift_counts_as_bias(x64: None) -> None:
    model = lambda x, w, scale, shift: (x @ w) * scale + shift  # noqa: E731
    args = [jnp.asarray(a) for a in ([1.0, 2.0], W, [2.0], [5.0])]  # z = 2 * (3 - 2) + 5
    book = jaxlrp.ledger(model, jaxlrp.Zero())(*args).check(1e-9)
    assert (float(book.start), float(book.handed[0]), float(book.losses["bias"][0])) == (7.0, 2.0, 5.0)


def test_residual_sum_loses_to_its_stabiliser_only(x64: None) -> None:
    composite = Composite((jaxlrp.kind("sum"), Epsilon(1.0)))
    book = jaxlrp.ledger(lambda x: x["a"] + x["b"], composite)({"a": jnp.array(1.0), "b": jnp.array(2.0)})
    book.check(1e-9)
    assert float(book.handed[0]) == pytest.approx(9 / 4)
    assert float(book.losses["stabiliser"][0]) == pytest.approx(3 / 4)


# -- constants -------------------------------------------------------------------------------------


def lost_to_constants(model: Any, x: Any, start: Any = None) -> float:
    book = jaxlrp.ledger(model, Epsilon(0.0), target=start)(jnp.asarray(x)).check(1e-9)
    assert abs(float(book.start - book.end) - sum(float(v.sum()) for v in book.losses.values())) < 1e-9
    return float(book.losses.get("constant", jnp.zeros(())).sum())


def test_padding_with_a_constant_is_named(x64: None) -> None:
    ones = lambda out: jnp.ones_like(out)  # noqa: E731
    assert lost_to_constants(lambda x: jnp.pad(x, 2, constant_values=5.0), [1.0, 2.0], ones) == 4.0
    assert lost_to_constants(lambda x: jnp.pad(x, 2, constant_values=5.0), [1.0, 2.0]) == 20.0


def test_padding_with_zeros_loses_nothing_to_speak_of(x64: None) -> None:
    w = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    assert lost_to_constants(lambda x: jnp.pad(x, 1) @ w, [1.0, 2.0]) == 0.0


def test_a_constant_token_beside_the_inputs_is_named(x64: None) -> None:
    token = jnp.full((1, 2), 3.0)
    assert lost_to_constants(lambda x: jnp.concatenate([token, x]), [[1.0, 2.0]]) == 6.0


def test_a_masked_entry_is_named(x64: None) -> None:
    keep = np.array([True, False, True])
    assert lost_to_constants(lambda x: jnp.where(keep, x, 7.0), [1.0, 2.0, 3.0]) == 7.0


def test_a_maximum_that_a_constant_wins_is_named(x64: None) -> None:
    book = jaxlrp.ledger(lambda x: jnp.maximum(x, jnp.asarray([2.0, 0.0])), Epsilon(0.0))(jnp.array([1.0, 3.0]))
    book.check(1e-9)


# -- under transforms ------------------------------------------------------------------------------


def small() -> tuple[Any, Any, jax.Array]:
    module, variables, data = NETS["mlp"]
    variables, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (variables, data["x"][:3]))
    return jaxlrp.ledger(module, jaxlrp.EpsilonPlusFlat()), variables, x


def test_jit() -> None:
    explain, variables, x = small()
    eager, jitted = explain(variables, x, target=1), jax.jit(explain)(variables, x, target=1)
    assert (eager.layers, eager.rules) == (jitted.layers, jitted.rules)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eager, jitted)
    assert str(jitted.check()).splitlines()[0] == str(eager).splitlines()[0]


def test_vmap_gives_one_ledger_a_sample() -> None:
    explain, variables, x = small()
    per_sample = jax.vmap(explain, in_axes=(None, 0))(variables, x)
    whole = explain(variables, x)
    assert per_sample.arrived.shape == (3, len(whole.layers))
    sums = jax.tree.map(lambda a: a.sum(0), per_sample)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), sums, whole)
    for i in range(3):
        jax.tree.map(lambda a, i=i: a[i], per_sample).check()
    with pytest.raises(InputError, match="one ledger at a time"):
        per_sample.check()


def test_check_inside_of_jit_says_what_to_do() -> None:
    explain, variables, x = small()
    with pytest.raises(InputError, match=r"call check\(\) outside jax\.jit"):
        jax.jit(lambda v, x: explain(v, x).check().end)(variables, x)


def test_gradient_of_a_loss_by_name() -> None:
    # lost to the stabiliser: R eps / (z + eps) with R = z = 3, derivative 3 * 3 / 3.5^2 along eps
    def lost(epsilon: Any) -> jax.Array:
        book = jaxlrp.ledger(dense, Epsilon(epsilon))(jnp.array([1.0, 2.0]), jnp.array(W), jnp.array([2.0]))
        return book.losses["stabiliser"].sum()

    np.testing.assert_allclose(jax.grad(lost)(0.5), 9 / 3.5**2, rtol=1e-5)


def test_has_aux_argnums_and_kwargs() -> None:
    def model(w: jax.Array, x: jax.Array, scale: float = 1.0) -> Any:
        return scale * (x @ w), {"seen": x}

    book = jaxlrp.ledger(model, Epsilon(0.0), argnums=1, has_aux=True)(jnp.eye(2), jnp.ones(2), scale=2.0)
    np.testing.assert_allclose((book.start, book.end), 4.0)


def test_a_model_without_layers() -> None:
    book = jaxlrp.ledger(lambda x: x, Epsilon())(jnp.arange(3.0)).check()
    assert book.layers == ()
    assert str(book).splitlines()[-1].split() == ["output", "to", "input", "3", "3", "100.0", "%", "0"]


# -- printing --------------------------------------------------------------------------------------


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(2)(x))
        return nn.Dense(1)(x)


def test_printed_table(x64: None) -> None:
    first = {"kernel": jnp.array([[2.0, -1.0], [1.0, 0.0]]), "bias": jnp.array([1.0, 0.0])}
    second = {"kernel": jnp.array([[1.0], [1.0]]), "bias": jnp.array([5.0])}
    composite = Composite((jaxlrp.kind("linear"), Epsilon(0.0)))
    # hidden (2 + 1 + 1, -1), output 4 + 5: the last bias takes 5 of 9, the first one quarter of 4
    book = jaxlrp.ledger(Tiny(), composite)({"params": {"Dense_0": first, "Dense_1": second}}, jnp.array([1.0, 1.0]))
    want = """
layer            rule                in  out    kept  bias  unnamed
---------------  ------------------  --  ---  ------  ----  -------
Dense_1          Epsilon(epsilon=0)   9    4  44.4 %     5        0
relu             Pass()               4    4 100.0 %     0        0
Dense_0          Epsilon(epsilon=0)   4    3  75.0 %     1        0
output to input                       9    3  33.3 %     6        0
"""
    squeeze = lambda text: [line.split() for line in text.strip().splitlines() if "--" not in line]  # noqa: E731
    assert squeeze(str(book)) == squeeze(want)
    widths = {len(line) for line in str(book).splitlines()}
    assert len(widths) == 1  # columns line up
