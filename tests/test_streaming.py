"""Streamed explanations equal those of all samples at once, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxlrp
from jaxlrp import InputError, stream, targets
from jaxlrp.attributions import integrated_gradients


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (4, 8):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Scanned(nn.Module):
    """As many steps as the tests' batches have samples: layers inside of a scan have an axis of steps in front."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = nn.scan(
            lambda module, x, _: (jnp.tanh(module(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=4,
        )
        return nn.Dense(3)(blocks(nn.Dense(5), x, None)[0])


SAMPLES, SIZE = 10, 4
LABELS = jnp.arange(SAMPLES) % 3
MODEL = ConvNet()


@pytest.fixture(scope="module")
def case() -> tuple[Any, jax.Array]:
    x = jax.random.normal(jax.random.key(0), (SAMPLES, 8, 8, 2))
    return MODEL.init(jax.random.key(1), x), x


def agree(explain: Callable[..., Any], size: int, *args: Any, **kwargs: Any) -> None:
    """Streamed and at once."""
    found, want = (jax.jit(e)(*args, **kwargs) for e in (stream(explain, size, argnums=1), explain))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 5, 9, 10, 64])
def test_any_batch_size_gives_the_same(size: int, case: Any) -> None:
    agree(jaxlrp.lrp(MODEL, jaxlrp.EpsilonPlusFlat()), size, *case, target=LABELS)


@pytest.mark.parametrize(
    "target",
    [
        None,
        2,
        jnp.asarray(2),
        np.asarray(LABELS, np.uint8),
        list(map(int, LABELS)),
        targets.softmax(LABELS),
        targets.difference(LABELS, 1),
        targets.predicted(),
        targets.log_odds(0),
    ],
    ids=lambda target: type(target).__name__.strip("_"),
)
def test_targets_are_split_if_they_have_a_class_for_every_sample(target: Any, case: Any) -> None:
    run = jaxlrp.lrp(MODEL)
    found, want = (
        jax.jit(lambda params, x, e=e: e(params, x, target=target))(*case) for e in (stream(run, SIZE, argnums=1), run)
    )
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-6)


def test_other_functions_as_targets_stay_whole(case: Any) -> None:
    # One number for every class, and by chance as many classes as samples.
    explain = jaxlrp.lrp(lambda x, w: x.reshape(x.shape[0], -1) @ w, jaxlrp.Epsilon())
    x, w = case[1], jax.random.normal(jax.random.key(2), (128, SAMPLES))
    weights = jax.tree_util.Partial(jnp.multiply, jnp.arange(float(SAMPLES)))
    found = stream(explain, SIZE, argnums=0)(x, w, target=weights)
    chex.assert_trees_all_close(found, explain(x, w, target=weights), rtol=1e-5, atol=1e-6)


@pytest.mark.heavy
def test_values_auxiliary_outputs_and_captured_layers(case: Any) -> None:
    agree(jaxlrp.value_and_lrp(MODEL), SIZE, *case, target=LABELS)
    agree(jaxlrp.layerwise_lrp(MODEL), SIZE, *case, target=LABELS)
    agree(integrated_gradients(MODEL, steps=3), SIZE, *case, target=LABELS)
    with_aux = lambda params, x: (MODEL.apply(params, x), {"mean": x.mean((1, 2, 3))})  # noqa: E731
    agree(jaxlrp.value_and_lrp(with_aux, argnums=1, has_aux=True), SIZE, *case)


def test_the_axis_of_samples_need_not_be_the_first_of_a_result() -> None:
    model, x = Scanned(), jax.random.normal(jax.random.key(0), (SAMPLES, 5))
    explain = jaxlrp.layerwise_lrp(model, jaxlrp.AttnLRP())
    params = model.init(jax.random.key(1), x)
    assert any(r.shape[:2] == (4, SAMPLES) for r in jax.tree.leaves(explain(params, x)[1]))
    agree(explain, SIZE, params, x, target=LABELS)


def test_several_arguments_trees_and_keywords_are_split() -> None:
    def model(pair: dict[str, jax.Array], w: jax.Array, scale: jax.Array, *, mask: jax.Array) -> jax.Array:
        return (jnp.tanh(pair["a"] * mask + pair["b"]) * scale) @ w

    keys = jax.random.split(jax.random.key(0), 5)
    a, b, scale, mask = (jax.random.normal(k, (SAMPLES, 4)) for k in keys[:4])
    w = jax.random.normal(keys[4], (4, 3))
    explain = jaxlrp.lrp(model, jaxlrp.AttnLRP(), argnums=(0, 2))
    streamed = jax.jit(stream(explain, SIZE, argnums=(0, -1), argnames="mask"))
    arguments = {"a": a, "b": b}, w, scale
    found, want = streamed(*arguments, mask=mask), explain(*arguments, mask=mask)
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-6)


def test_every_sample_is_explained_in_a_batch_of_the_size_asked_for() -> None:
    # A model that mixes samples tells which came together: nothing is padded, and the last batch is a full one.
    explain = lambda x: x - x.mean()  # noqa: E731
    x = jnp.arange(10.0) ** 2
    last = x[6:] - x[6:].mean()
    want = jnp.concatenate([x[:4] - x[:4].mean(), x[4:8] - x[4:8].mean(), last[2:]])
    chex.assert_trees_all_close(stream(explain, 4, argnums=0)(x), want)


@pytest.mark.heavy
def test_gradients_and_vmap_pass_through(case: Any) -> None:
    params, x = case
    explain = jaxlrp.lrp(MODEL, jaxlrp.Epsilon(1e-2))
    size = lambda explain: lambda params: (explain(params, x, target=LABELS) ** 2).sum()  # noqa: E731
    found, want = (jax.jit(jax.grad(size(e)))(params) for e in (stream(explain, SIZE, argnums=1), explain))
    chex.assert_trees_all_close(found, want, rtol=1e-3, atol=1e-4)
    every = jax.jit(jax.vmap(lambda k: stream(explain, SIZE, argnums=1)(params, x, target=k)))(jnp.arange(3))
    chex.assert_trees_all_close(every[1], explain(params, x, target=1), rtol=1e-5, atol=1e-6)


def test_new_labels_do_not_recompile(case: Any) -> None:
    traced = []

    def model(params: Any, x: jax.Array) -> jax.Array:
        traced.append(x.shape[0])
        return MODEL.apply(params, x)

    streamed = jax.jit(stream(jaxlrp.lrp(model, argnums=1), SIZE, argnums=1))
    streamed(*case, target=LABELS)
    before = list(traced)
    streamed(*case, target=LABELS[::-1])
    assert traced == before
    assert set(traced) == {SAMPLES, SIZE}  # one look at the shapes of all, and one program for batches


def test_memory_is_that_of_one_batch() -> None:
    x = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), x)

    def temporary(explain: Callable[..., Any], samples: int) -> int:
        arguments = params, jax.ShapeDtypeStruct((samples, *x.shape[1:]), x.dtype)
        return jax.jit(explain).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    explain = jaxlrp.lrp(MODEL)
    streamed, one_batch, at_once = (
        temporary(stream(explain, 8, argnums=1), 64),
        temporary(explain, 8),
        temporary(explain, 64),
    )
    assert streamed < at_once / 3
    assert streamed < 1.5 * one_batch + 64 * 32 * 32 * 3 * 4  # and the result


def test_what_cannot_be_split_is_refused(case: Any) -> None:
    params, x = case
    explain = jaxlrp.lrp(MODEL)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        stream(explain, 0, argnums=1)
    with pytest.raises(TypeError):
        stream(explain, 2.5, argnums=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="argnums=2, but 2 positional"):
        stream(explain, 4, argnums=2)(params, x)
    with pytest.raises(InputError, match="argument 0 holds the parameters and argument 1 is the input"):
        stream(explain, 4, argnums=0)(params, x)
    with pytest.raises(InputError, match="a ledger sums over samples"):
        stream(jaxlrp.ledger(MODEL), 4, argnums=1)(params, x)
    with pytest.raises(InputError, match="argnames='mask', but no such"):
        stream(explain, 4, argnums=1, argnames="mask")(params, x)
    with pytest.raises(InputError, match="argument 0 holds a scalar"):
        stream(explain, 4, argnums=0)(jnp.ones(()), x)
    with pytest.raises(InputError, match="argument 0 holds no arrays"):
        stream(explain, 4, argnums=0)({}, x)
    with pytest.raises(InputError, match="nothing to split"):
        stream(explain, 4, argnums=())(params, x)
    with pytest.raises(InputError, match=r"equally many samples .*argument 1: 10; target: 9"):
        stream(explain, 4, argnums=1)(params, x, target=LABELS[:9])
    with pytest.raises(InputError, match="argument 0: 10; argument 1: 3"):
        stream(jnp.dot, 4, argnums=(0, 1))(jnp.ones((10, 2)), jnp.ones((3, 2)))


def test_a_result_without_an_axis_of_samples_is_refused() -> None:
    x = jnp.ones((10, 3))
    with pytest.raises(InputError, match=r"the result at \['sum'\] has shape \(3,\) for all .* \(3,\) for one batch"):
        stream(lambda x: {"all": x, "sum": x.sum(0)}, 4, argnums=0)(x)
    with pytest.raises(InputError, match=r"the result has shape \(10, 10\) for all .* \(4, 4\) for one"):
        stream(lambda x: x @ x.T, 4, argnums=0)(x)
