"""Targets: the relevance that an output starts with, against formulas written down in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxlrp
from jaxlrp import targets

Array = np.ndarray

LOGITS = np.array([[1.5, -0.5, 0.25, 3.0], [0.1, 0.2, -2.0, -0.3], [-1.0, -4.0, -0.5, -0.75]])
LABELS = np.array([2, 0, 3])


# -- the formulas, one row of logits f and one class k at a time -----------------------------------


def unit(k: int, n: int) -> Array:
    return np.eye(n)[k]


def np_softmax(f: Array) -> Array:
    e = np.exp(f - f.max())
    return e / e.sum()


def np_contrastive(f: Array, k: int) -> Array:
    out = np.full(len(f), -1.0 / (len(f) - 1))
    out[k] = 1.0
    return out


def np_log_odds(f: Array, k: int) -> Array:
    """R_kc = z_kc exp(-z_kc) / sum, each split over the two logits of its margin z_kc = f_k - f_c."""
    margins = {c: f[k] - f[c] for c in range(len(f)) if c != k}
    norm = sum(np.exp(-z) for z in margins.values())
    out = np.zeros(len(f))
    for c, z in margins.items():
        relevance = z * np.exp(-z) / norm
        out[k] += f[k] / z * relevance
        out[c] += -f[c] / z * relevance
    return out


FORMULAS = {
    "logit": (targets.logit, lambda f, k: f * unit(k, len(f))),
    "softmax": (targets.softmax, lambda f, k: np_softmax(f) * unit(k, len(f))),
    "one_hot": (targets.one_hot, lambda f, k: unit(k, len(f))),
    "contrastive": (targets.contrastive, np_contrastive),
    "log_odds": (targets.log_odds, np_log_odds),
    "difference": (
        lambda k: targets.difference(k, 1),
        lambda f, k: f * unit(k, len(f)) - f * unit(1, len(f)),
    ),
    "predicted": (lambda k: targets.predicted(), lambda f, k: f * unit(int(f.argmax()), len(f))),
}
every_target = pytest.mark.parametrize(("make", "formula"), FORMULAS.values(), ids=FORMULAS)


@every_target
def test_formulas_one_sample(make: Any, formula: Any, x64: None) -> None:
    for f, k in zip(LOGITS, LABELS, strict=True):
        np.testing.assert_allclose(make(int(k))(jnp.asarray(f)), formula(f, k), atol=1e-12)


@every_target
def test_formulas_batch_with_one_class_per_sample(make: Any, formula: Any, x64: None) -> None:
    want = np.stack([formula(f, k) for f, k in zip(LOGITS, LABELS, strict=True)])
    np.testing.assert_allclose(make(LABELS)(jnp.asarray(LOGITS)), want, atol=1e-12)


@every_target
def test_formulas_one_class_for_all_and_more_axes(make: Any, formula: Any, x64: None) -> None:
    want = np.stack([formula(f, 3) for f in LOGITS]).reshape(3, 1, 4)
    np.testing.assert_allclose(make(3)(jnp.asarray(LOGITS).reshape(3, 1, 4)), want, atol=1e-12)


@every_target
def test_traced_and_vmapped(make: Any, formula: Any, x64: None) -> None:
    logits, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    want = make(labels)(logits)
    seed = lambda k, f: make(k)(f)  # noqa: E731
    np.testing.assert_allclose(jax.jit(seed)(labels, logits), want, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(seed)(labels, logits), want, atol=1e-12)


@every_target
def test_targets_are_pytrees_that_cross_jit(make: Any, formula: Any, no_compiling: Any) -> None:
    run = jax.jit(lambda target, f: target(f))
    logits = jnp.asarray(LOGITS)
    one, other = make(np.full(3, 1)), make(np.full(3, 2))
    np.testing.assert_allclose(run(one, logits), one(logits), rtol=1e-5)
    want = other(logits)
    with no_compiling():
        found = run(other, logits)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_log_odds_does_not_blow_up_where_two_logits_tie() -> None:
    seed = targets.log_odds(0)(jnp.array([2.0, 2.0, -1.0]))
    assert bool(jnp.isfinite(seed).all())
    grads = jax.grad(lambda f: targets.log_odds(0)(f).sum())(jnp.array([2.0, 2.0, -1.0]))
    assert bool(jnp.isfinite(grads).all())


def test_contrastive_starts_from_nothing_in_sum() -> None:
    np.testing.assert_allclose(targets.contrastive(1)(jnp.ones(5)).sum(), 0.0, atol=1e-6)


# -- as `target` of an explanation -----------------------------------------------------------------


def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def setting(rng: np.random.Generator) -> tuple[Any, jax.Array, jax.Array]:
    explain = jaxlrp.lrp(linear, jaxlrp.Epsilon())
    return explain, jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.normal(size=(5, 4)))


@pytest.mark.parametrize(
    "target",
    [2, np.int64(2), np.uint8(2), jnp.int32(2), np.full(3, 2), jnp.full(3, 2, jnp.uint8)],
    ids=lambda t: f"{type(t).__name__}{np.shape(t)}",
)
def test_an_integer_means_that_logit(target: Any, rng: np.random.Generator) -> None:
    explain, x, w = setting(rng)
    want = explain(x, w, target=lambda out: jnp.zeros_like(out).at[:, 2].set(out[:, 2]))
    np.testing.assert_allclose(explain(x, w, target=target), want, rtol=1e-5)
    np.testing.assert_allclose(explain(x, w, target=targets.logit(target)), want, rtol=1e-5)


def test_no_target_means_every_output_with_its_own_value(rng: np.random.Generator) -> None:
    explain, x, w = setting(rng)
    np.testing.assert_allclose(explain(x, w), explain(x, w, target=lambda out: out))
    per_class = sum(explain(x, w, target=k) for k in range(4))
    np.testing.assert_allclose(explain(x, w), per_class, rtol=1e-4, atol=1e-5)


def test_default_target_and_its_override(rng: np.random.Generator) -> None:
    explain, x, w = setting(rng)
    fixed = jaxlrp.lrp(linear, jaxlrp.Epsilon(), target=1)
    np.testing.assert_allclose(fixed(x, w), explain(x, w, target=1))
    np.testing.assert_allclose(fixed(x, w, target=0), explain(x, w, target=0))


def test_a_function_of_several_outputs() -> None:
    explain = jaxlrp.lrp(lambda x: {"a": 2 * x, "b": x.sum()}, jaxlrp.Epsilon(0.0))
    only_a = explain(jnp.arange(3.0), target=lambda out: {"a": out["a"], "b": 0 * out["b"]})
    np.testing.assert_allclose(only_a, [0.0, 2.0, 4.0])


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [4, -1, np.array([0, 1, 7])], ids=["over", "under", "one of three"])
def test_a_class_out_of_range_is_named(bad: Any, rng: np.random.Generator) -> None:
    explain, x, w = setting(rng)
    worst = int(np.max(bad)) if np.ndim(bad) else bad
    with pytest.raises(jaxlrp.InputError, match=rf"class {worst} is out of range.* 0 to 3"):
        explain(x, w, target=bad)
    with pytest.raises(jaxlrp.InputError, match="out of range"):
        explain(x, w, target=targets.softmax(bad))


def test_a_concrete_class_out_of_range_is_found_under_jit_too(rng: np.random.Generator) -> None:
    explain, x, w = setting(rng)
    with pytest.raises(jaxlrp.InputError, match="out of range"):
        jax.jit(lambda x, w: explain(x, w, target=9))(x, w)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (3, 4)])
def test_indices_of_another_shape(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    explain, x, w = setting(rng)
    with pytest.raises(jaxlrp.InputError, match=r"give one integer, or an array of shape \(3,\)"):
        explain(x, w, target=np.zeros(shape, int))


def test_a_function_that_returns_another_shape(rng: np.random.Generator) -> None:
    explain, x, w = setting(rng)
    with pytest.raises(jaxlrp.InputError, match=r"own shape \(3, 4\), not \(3,\)"):
        explain(x, w, target=lambda out: out[:, 0])


@pytest.mark.parametrize("bad", [1.5, "cat", True, np.ones(3), np.array([True, False, True])])
def test_what_is_neither_index_nor_function(bad: Any, rng: np.random.Generator) -> None:
    explain, x, w = setting(rng)
    with pytest.raises(jaxlrp.InputError, match="target must be None, class indices"):
        explain(x, w, target=bad)


@pytest.mark.parametrize("model", [lambda x: (x, x * 2), lambda x: x.sum()], ids=["two", "scalar"])
def test_an_index_into_something_else_than_one_array(model: Any) -> None:
    explain = jaxlrp.lrp(model, jaxlrp.Epsilon())
    with pytest.raises(jaxlrp.InputError, match="picks a class along the last axis of one output"):
        explain(jnp.ones(3), target=1)


# -- models that end in softmax --------------------------------------------------------------------


class Classifier(nn.Module):
    """Logits, or probabilities."""

    softmax: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(4)(nn.relu(nn.Dense(8)(x)))
        return nn.softmax(x) if self.softmax else x


def classifier_case(key: jax.Array) -> tuple[Any, jax.Array]:
    x = jax.random.normal(key, (3, 5))
    return Classifier(False).init(key, x), x


@pytest.mark.parametrize("target", [None, 2, LABELS], ids=["None", "int", "array"])
def test_a_final_softmax_hands_the_probabilities_to_the_logits(target: Any, key: jax.Array) -> None:
    params, x = classifier_case(key)
    logits, pull = jaxlrp.lrp_vjp(Classifier(False), params, x, composite=jaxlrp.Epsilon())
    probabilities = jax.nn.softmax(logits)
    start = probabilities if target is None else targets.logit(target)(probabilities)
    got = jaxlrp.lrp(Classifier(True), jaxlrp.Epsilon())(params, x, target=target)
    np.testing.assert_allclose(got, pull(start), rtol=1e-5, atol=1e-7)


def test_a_final_softmax_is_a_pass_layer_unless_an_entry_says_otherwise(key: jax.Array) -> None:
    params, x = classifier_case(key)
    layers = jaxlrp.trace(Classifier(True), params, x)
    *_, last = jaxlrp.Composite.uniform(jaxlrp.Epsilon()).assign(layers)
    assert (last.layer.op, str(last.rule), last.reason) == ("softmax", "Pass()", "final softmax")
    own = (jaxlrp.kind("softmax"), jaxlrp.Zero())
    *_, last = jaxlrp.EpsilonPlus().extend(own).assign(layers)
    assert str(last.rule) == "Zero()"


def test_a_softmax_inside_of_the_model_is_no_pass_layer() -> None:
    model = lambda x, w: jax.nn.softmax(x @ w) @ w.T  # noqa: E731
    layers = jaxlrp.trace(model, jnp.ones((2, 3)), jnp.ones((3, 4)))
    rules = {a.layer.op: str(a.rule) for a in jaxlrp.EpsilonPlus().assign(layers)}
    assert rules["softmax"] == "Zero()"


def test_the_log_of_a_final_softmax_starts_as_usual(key: jax.Array) -> None:
    model = lambda x: jax.nn.log_softmax(x)  # noqa: E731
    (only,) = jaxlrp.trace(model, jnp.ones((2, 3)))
    assert (only.kind, only.op, only.final) == ("softmax", "log_softmax", True)


def test_a_list_of_classes_is_an_array_of_them() -> None:
    x, w = np.ones((2, 3), np.float32), np.arange(6, dtype=np.float32).reshape(3, 2)
    explain = jaxlrp.lrp(lambda x, w: x @ w)
    np.testing.assert_array_equal(explain(x, w, target=[0, 1]), explain(x, w, target=np.array([0, 1])))


def test_a_target_without_its_class_says_so() -> None:
    with pytest.raises(jaxlrp.InputError, match=r"targets\.logit\(k\)"):
        jaxlrp.lrp(lambda x: x, target=jaxlrp.targets.logit)(np.ones(3, np.float32))
