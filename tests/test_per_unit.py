"""Relevance per unit of value, handed down beside relevance: the same numbers, without dividing between layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from jaxlrp.rules import Epsilon, EqualShare, HoldScale, Route, SignalTakeAll

Weights = dict[str, jax.Array]


def transformer(weights: Weights, x: jax.Array) -> jax.Array:
    """One block with everything that hands slopes on: biases, rotary scales, a mask, products, a gate, residuals."""

    def rms(x: jax.Array) -> jax.Array:
        return x * weights["norm"] / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def turned(x: jax.Array) -> jax.Array:
        return x * weights["cos"] + jnp.concatenate([-x[..., 2:], x[..., :2]], -1) * weights["sin"]

    q, k, v = (turned(rms(x) @ weights[n] + weights["b"]) for n in "qkv")
    scores = jnp.where(jnp.tri(len(x), dtype=bool), q @ k.T / 2.0, -jnp.inf)
    x = x + jax.nn.softmax(scores) @ v @ weights["o"]
    y = rms(x)
    x = x + (jax.nn.silu(y @ weights["gate"]) * (y @ weights["up"])) @ weights["down"]
    return rms(x)[-1] @ weights["head"]


@pytest.fixture
def given(x64: None, rng: np.random.Generator) -> tuple[Weights, jax.Array]:
    shapes = dict.fromkeys("qkvo", (4, 4)) | {"gate": (4, 6), "up": (4, 6), "down": (6, 4), "head": (4, 3), "b": (4,)}
    shapes |= {"norm": (4,), "cos": (5, 4), "sin": (5, 4)}
    weights = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    return weights, jnp.asarray(rng.normal(size=(5, 4)))


def dividing(rule: Any) -> Any:
    """The same rule with a `fold` of its own, which is all that a layer below then hears of."""

    class Dividing(type(rule)):
        def fold(self, call: Any, *relevance: jax.Array) -> tuple[jax.Array, ...]:
            return super().fold(call, *relevance)

    return Dividing(**vars(rule))


def composites(wrap: Callable[[Any], Any], epsilon: Any, **options: Any) -> jaxlrp.Composite:
    return jaxlrp.Composite(
        (jaxlrp.kind("linear"), wrap(Epsilon(epsilon, **options))),
        (jaxlrp.kind("scale"), wrap(Epsilon(epsilon, **options))),
        (jaxlrp.kind("sum"), wrap(Epsilon(epsilon))),
        (jaxlrp.kind("move"), wrap(Route())),
        (jaxlrp.kind("normalization"), wrap(HoldScale(epsilon=epsilon))),
        (jaxlrp.kind("softmax"), wrap(jaxlrp.Zero())),
        (jaxlrp.kind("product"), wrap(EqualShare(epsilon=epsilon))),
        (jaxlrp.kind("gate"), wrap(SignalTakeAll(epsilon=epsilon))),
    )


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip": True}, {"norm_scale": True}, {"bias": "ignore"}, {"bias": "redistribute"}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_it_is_what_dividing_gives(given: Any, epsilon: float, options: dict[str, Any]) -> None:
    weights, x = given
    found, expected = (
        jax.jit(jaxlrp.lrp(transformer, composites(wrap, epsilon, **options), argnums=1, target=1))(weights, x)
        for wrap in (lambda rule: rule, dividing)
    )
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())


def test_an_epsilon_that_is_traced_is_that_of_a_number(given: Any) -> None:
    weights, x = given

    def explain(epsilon: Any) -> jax.Array:
        return jaxlrp.lrp(transformer, jaxlrp.AttnLRP(epsilon), argnums=1, target=1)(weights, x)

    for epsilon in (0.0, 0.1):
        np.testing.assert_allclose(jax.jit(explain)(epsilon), explain(epsilon), rtol=1e-10, atol=1e-13)


def test_blocks_that_run_again_give_the_same(given: Any) -> None:
    weights, x = given
    plain, again = (
        jaxlrp.lrp(jax.checkpoint(transformer) if remat else transformer, jaxlrp.AttnLRP(0.0), argnums=1, remat=remat)(
            weights, x
        )
        for remat in (False, True)
    )
    np.testing.assert_allclose(again, plain, rtol=1e-10, atol=1e-13)


def divisions(function: Callable[..., Any], *args: Any) -> int:
    return len(re.findall(r" divide\(", jax.jit(function).lower(*args).compile().as_text()))


def test_a_run_of_layers_divides_once() -> None:
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        y = (x @ w).reshape(2, 2).T.reshape(4) @ w
        return (y * (y @ w) + x) @ w

    explain = jaxlrp.lrp(run, jaxlrp.AttnLRP(0.0), target=1)
    assert divisions(explain, jnp.ones(4), jnp.ones((4, 4))) == 1
    dividing_ = jaxlrp.lrp(run, composites(dividing, 0.0), target=1)
    assert divisions(dividing_, jnp.ones(4), jnp.ones((4, 4))) > 5


def test_contributions_that_cancel_exactly() -> None:
    """``z = 0`` made of 1 - 1: ``R_j / z_j`` is what it is for a ``z`` beside it; a stabiliser makes it 0."""
    x, w, v = jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]), jnp.array([[3.0], [1.0]])
    b = jnp.array([0.0, 0.5])

    def net(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        return (x @ w + b) @ v

    gradient_x_input = x * jax.grad(lambda x: net(x, w, v).sum())(x)
    assert gradient_x_input.tolist() == [4.0, -4.0, 2.0]
    for rule in (jaxlrp.Zero(), Epsilon(0.0), Epsilon(jnp.zeros(()))):
        assert jaxlrp.lrp(net, rule)(x, w, v).tolist() == gradient_x_input.tolist()
        jaxlrp.ledger(net, rule)(x, w, v).check()
    np.testing.assert_allclose(jaxlrp.lrp(net, Epsilon(1e-6))(x, w, v), [1.0, -1.0, 2.0], rtol=1e-5)


def test_the_ledger_closes_where_an_output_is_0() -> None:
    w, v, b = jnp.array([[1.0, 1.0]]), jnp.array([[3.0], [1.0]]), jnp.array([-2.0, 1.0])
    ledger = jaxlrp.ledger(lambda x: (x @ w + b) @ v, jaxlrp.Zero())(jnp.array([2.0]))
    assert float(ledger.check().end) == 8.0
    assert ledger.losses["bias"].sum() == -5.0


def test_a_constant_over_a_value_is_stabilised_with_its_sign() -> None:
    """``z = c / x`` counts as minus one factor: ``R_x = -z R / stab(-z)``."""
    composite = jaxlrp.Composite(
        (jaxlrp.kind("linear"), jaxlrp.Constant()), (jaxlrp.kind("product"), EqualShare(epsilon=0.5))
    )
    explain = jaxlrp.lrp(lambda x, w: (x @ w) / x, composite)
    np.testing.assert_allclose(explain(jnp.array([2.0]), jnp.array([[2.0]])), [2 * 2 / 2.5], rtol=1e-6)
    ledger = jaxlrp.ledger(lambda x, w: (x @ w) / x, composite)(jnp.array([2.0]), jnp.array([[2.0]])).check()
    np.testing.assert_allclose(ledger.end, 1.6, rtol=1e-6)


class Clip(Epsilon):
    def fold(self, call: Any, *relevance: jax.Array) -> tuple[jax.Array, ...]:
        return super().fold(call, *(jnp.maximum(r, 0.0) for r in relevance))


class Tenfold(jaxlrp.Rule):
    def fold(self, call: Any, *relevance: jax.Array) -> tuple[jax.Array, ...]:
        return Epsilon().fold(call, *(10 * r for r in relevance))


@pytest.mark.parametrize(("rule", "expected"), [(Epsilon(), [2, -1]), (Clip(), [1, 1]), (Tenfold(), [20, -10])])
def test_a_fold_that_changes_what_arrived_is_heard(rule: Any, expected: list[float]) -> None:
    x, w, v = jnp.array([1.0, 2.0]), jnp.array([[1.0, -1.0], [0.5, 1.0]]), jnp.array([[1.0], [-1.0]])
    composite = jaxlrp.Composite((jaxlrp.kind("linear"), Epsilon()), (jaxlrp.first("linear"), rule))
    np.testing.assert_allclose(jaxlrp.lrp(lambda x, w, v: x @ w @ v, composite)(x, w, v), expected, rtol=1e-5)


class Nothing(EqualShare):
    @property
    def proportional(self) -> bool:
        return True

    def fold(self, call: Any, *relevance: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(map(jnp.zeros_like, call.inputs))


def test_a_fold_of_ones_own_is_called_whatever_the_rule_says_of_itself() -> None:
    composite = jaxlrp.Composite((jaxlrp.kind("product"), Nothing()))
    assert not jaxlrp.lrp(lambda x: x[0] * x[1], composite)(jnp.array([2.0, 3.0])).any()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_a_mask_that_is_added_gets_nothing(traced: bool, epsilon: float, x64: None) -> None:
    x = jnp.arange(1.0, 7.0).reshape(3, 2) / 3

    def net(x: jax.Array, hide: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return (jax.nn.softmax(hide(x @ x.T) * 0.5) @ x).sum()

    def explain(epsilon: Any, hide: Any) -> jax.Array:
        return jaxlrp.lrp(lambda x: net(x, hide), jaxlrp.AttnLRP(epsilon))(x)

    def added(scores: jax.Array) -> jax.Array:
        return scores + jnp.where(jnp.tri(3, dtype=bool), 0.0, -jnp.inf)

    def selected(scores: jax.Array) -> jax.Array:
        return jnp.where(jnp.tri(3, dtype=bool), scores, -jnp.inf)

    found = jax.jit(lambda e: explain(e, added))(epsilon) if traced else explain(epsilon, added)
    np.testing.assert_allclose(found, explain(epsilon, selected), rtol=1e-5)
    assert np.isfinite(jax.grad(lambda e: explain(e, added).sum())(epsilon))


def test_nothing_comes_to_an_infinite_factor_that_gets_nothing() -> None:
    quotient = jaxlrp.lrp(lambda a, b: (a / b).sum(), jaxlrp.AttnLRP(), argnums=(0, 1))
    to_a, to_b = quotient(jnp.array([2.0, 3.0]), jnp.array([jnp.inf, 1.0]))
    assert to_a.tolist() == [0.0, 3.0]
    assert to_b.tolist() == [0.0, 0.0]


def test_a_product_of_nothing() -> None:
    explain = jaxlrp.lrp(lambda x: jnp.prod(x[:, :0], 1).sum() + x.sum(), jaxlrp.AttnLRP())
    assert explain(jnp.ones((1, 3))).tolist() == [[1.0, 1.0, 1.0]]


ABOVE = [jaxlrp.ZPlus(), jaxlrp.Gamma(0.5), jaxlrp.AlphaBeta(), jaxlrp.ZPlus(bias="redistribute")]


@pytest.mark.parametrize("above", ABOVE, ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_what_other_rules_hand_to_a_layer_below(above: Any, signed: bool, rng: np.random.Generator, x64: None) -> None:
    x, w, v = (jnp.asarray(rng.normal(size=(4, 4))) for _ in range(3))

    def net(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        y = (x if signed else jax.nn.relu(x)).T  # a move between two linear layers, and one behind a relu
        y = (jnp.abs(y @ w) if signed else jax.nn.relu(y @ w)).T
        return (y + y @ v) @ w

    def explain(wrap: Callable[[Any], Any]) -> jax.Array:
        rules = {jaxlrp.kind("linear"): above, jaxlrp.first("linear"): Epsilon(0.0), jaxlrp.last("linear"): above}
        return jaxlrp.lrp(net, jaxlrp.Composite(*((s, wrap(rule)) for s, rule in rules.items())))(x, w, v)

    np.testing.assert_allclose(explain(lambda rule: rule), explain(dividing), rtol=1e-9)


def test_a_rule_without_shares_is_named() -> None:
    class Without(jaxlrp.SplitRule):
        def shares(self, relevance: jax.Array, z: jax.Array) -> list[Any]:
            return []

    with pytest.raises(jaxlrp.RuleError, match=r"Without.shares must return a list .* not an empty one"):
        jaxlrp.lrp(lambda x, w: x @ w, Without())(jnp.ones(2), jnp.ones((2, 2)))
