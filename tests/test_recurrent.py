"""LSTM, GRU and Mamba against the formulas that were published for them."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.nn import sigmoid

import jaxlrp

pytestmark = pytest.mark.usefixtures("x64")
TINY = 1e-12  # the published formulas stabilise pre-activations as a whole, layers stabilise their own outputs


def over(a: jax.Array, b: jax.Array) -> jax.Array:
    return a / (b + TINY * jnp.where(b >= 0, 1.0, -1.0))


def sequence(rng: np.random.Generator, steps: int = 5, features: int = 3) -> jax.Array:
    return jnp.asarray(rng.normal(size=(steps, features)))


# -- LSTM (Arras et al., 2017) ---------------------------------------------------------------------------------------


def lstm_relevance(p: dict, x: jax.Array, relevance: jax.Array) -> jax.Array:
    """Relevance of every step's input given that of the last hidden state; ``p`` as Flax's `LSTMCell` has it."""

    def gate(name, x, h):
        return x @ p["i" + name]["kernel"] + h @ p["h" + name]["kernel"] + p["h" + name]["bias"]

    h = c = jnp.zeros(p["hi"]["kernel"].shape[0])
    kept = []
    for row in x:
        i, f, o = (sigmoid(gate(n, row, h)) for n in "ifo")
        a = gate("g", row, h)
        new = f * c + i * jnp.tanh(a)
        kept.append((row, h, c, i, f, a, new))
        c, h = new, o * jnp.tanh(new)
    to_h, to_c, result = relevance, jnp.zeros_like(c), []
    for row, h, c, i, f, a, new in reversed(kept):
        to_c = to_c + to_h  # the output gate gets nothing
        to_g = over(i * jnp.tanh(a) * to_c, new)
        to_c = over(f * c * to_c, new)
        s = over(to_g, a)
        result.append(row * (p["ig"]["kernel"] @ s))
        to_h = h * (p["hg"]["kernel"] @ s)
    return jnp.stack(result[::-1])


def test_lstm_equals_the_published_formulas(rng, key):
    x = sequence(rng)
    model = nn.RNN(nn.LSTMCell(4, param_dtype=jnp.float64), return_carry=True)
    params = model.init(key, x)
    params = jax.tree.map(lambda a: a + 0.3 * jnp.asarray(rng.normal(size=a.shape)), params)  # biases start at 0
    apply = lambda params, x: model.apply(params, x)[0][1]  # noqa: E731
    cell = next(iter(params["params"].values()))
    h = apply(params, x)
    got = jaxlrp.lrp(apply, jaxlrp.RecurrentLRP(TINY), argnums=1)(params, x)
    np.testing.assert_allclose(got, lstm_relevance(cell, x, h), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell])
def test_gates_of_an_lstm_are_recognised(rng, key, cell):
    x = sequence(rng)
    model = nn.RNN(cell(4, param_dtype=jnp.float64))
    params = model.init(key, x)
    layers = [layer for layer, _ in jaxlrp.layers.every_layer(jaxlrp.trace(model, params, x))]
    gates = [layer for layer in layers if layer.op == "gate"]
    assert len(gates) == 3  # forget, input, output
    account = jaxlrp.ledger(model, jaxlrp.RecurrentLRP())(params, x, target=lambda y: y.at[:-1].set(0.0))
    account.check(1e-10)


def test_the_default_treats_gates_as_published(rng, key):
    x = sequence(rng)
    model = nn.RNN(nn.LSTMCell(4, param_dtype=jnp.float64))
    params = model.init(key, x)
    default, preset = (jaxlrp.lrp(model, c)(params, x) for c in (None, jaxlrp.RecurrentLRP()))
    np.testing.assert_allclose(default, preset, rtol=1e-12)


# -- GRU -------------------------------------------------------------------------------------------------------------


def gru_relevance(p: dict, x: jax.Array, relevance: jax.Array) -> jax.Array:
    h = jnp.zeros(p["hr"]["kernel"].shape[0])
    kept = []
    for row in x:
        r, z = (sigmoid(row @ p["i" + n]["kernel"] + p["i" + n]["bias"] + h @ p["h" + n]["kernel"]) for n in "rz")
        own = row @ p["in"]["kernel"] + p["in"]["bias"]
        back = h @ p["hn"]["kernel"] + p["hn"]["bias"]
        a = own + r * back
        new = (1 - z) * jnp.tanh(a) + z * h
        kept.append((row, h, r, z, back, a, new))
        h = new
    to_h, result = relevance, []
    for row, h, r, z, back, a, new in reversed(kept):
        to_n = over((1 - z) * jnp.tanh(a) * to_h, new)
        to_h = over(z * h * to_h, new)
        s = over(to_n, a)
        result.append(row * (p["in"]["kernel"] @ s))
        to_back = r * back * s  # the reset gate gets nothing
        to_h = to_h + h * (p["hn"]["kernel"] @ over(to_back, back))
    return jnp.stack(result[::-1])


def test_gru_equals_the_published_formulas(rng, key):
    x = sequence(rng)
    model = nn.RNN(nn.GRUCell(4, param_dtype=jnp.float64), return_carry=True)
    params = model.init(key, x)
    params = jax.tree.map(lambda a: a + 0.3 * jnp.asarray(rng.normal(size=a.shape)), params)
    apply = lambda params, x: model.apply(params, x)[0]  # noqa: E731
    cell = next(iter(params["params"].values()))
    got = jaxlrp.lrp(apply, jaxlrp.RecurrentLRP(TINY), argnums=1)(params, x)
    np.testing.assert_allclose(got, gru_relevance(cell, x, apply(params, x)), rtol=1e-8, atol=1e-10)


def test_nnx_cells_equal_linen_cells(rng):
    x = sequence(rng)
    cell = nnx.GRUCell(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    model = nnx.RNN(cell)
    relevance = jaxlrp.lrp(model, jaxlrp.RecurrentLRP(TINY))(nnx.state(model), x)
    names = ("ir", "iz", "in", "hr", "hz", "hn")
    assert relevance.shape == x.shape
    layers = [layer.name for layer, _ in jaxlrp.layers.every_layer(jaxlrp.trace(model, nnx.state(model), x))]
    assert any("cell" in name for name in layers), (layers, names)


# -- Mamba (Jafari et al., 2024) -------------------------------------------------------------------------------------


def mamba(p: dict, x: jax.Array, *, detached: bool, parallel: bool = False) -> jax.Array:
    """One selective state-space block over ``[steps, features]``; ``detached`` is the published explanation."""
    hold = lax.stop_gradient if detached else (lambda a: a)

    def silu(a):
        return a * lax.stop_gradient(sigmoid(a)) if detached else jax.nn.silu(a)

    u, z = jnp.split(x @ p["in_proj"]["kernel"], 2, axis=-1)
    padded = jnp.pad(u, ((2, 0), (0, 0)))
    u = silu(sum(padded[i : i + len(x)] * p["conv"]["kernel"][i] for i in range(3)))
    dt, b, c = jnp.split(u @ p["x_proj"]["kernel"], [2, 6], axis=-1)
    delta = hold(jax.nn.softplus(dt @ p["dt_proj"]["kernel"]))
    b, c = hold(b), hold(c)
    decay = jnp.exp(delta[..., None] * -jnp.exp(p["a_log"]))  # [steps, inner, state]
    drive = delta[..., None] * b[:, None, :] * u[..., None]
    if parallel:
        _, states = lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, drive))
    else:
        step = lambda h, ab: (ab[0] * h + ab[1],) * 2  # noqa: E731
        _, states = lax.scan(step, jnp.zeros(decay.shape[1:]), (decay, drive))
    y = jnp.einsum("tis,ts->ti", states, c) + u * p["skip"]
    gated = y * silu(z)
    if detached:
        gated = 0.5 * gated + lax.stop_gradient(0.5 * gated)
    return gated @ p["out_proj"]["kernel"]


def mamba_params(rng: np.random.Generator) -> dict:
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    return {
        "in_proj": {"kernel": normal(3, 10)},
        "conv": {"kernel": normal(3, 5)},
        "x_proj": {"kernel": normal(5, 10)},
        "dt_proj": {"kernel": normal(2, 5)},
        "a_log": normal(5, 4),
        "skip": normal(5),
        "out_proj": {"kernel": normal(5, 2)},
    }


@pytest.mark.parametrize("parallel", [False, True], ids=["scan", "associative_scan"])
def test_mamba_equals_the_detached_scan(rng, parallel):
    p, x = mamba_params(rng), sequence(rng, 6)
    model = lambda p, x: mamba(p, x, detached=False, parallel=parallel)[-1]  # noqa: E731
    explain = jaxlrp.lrp(model, jaxlrp.MambaLRP(epsilon=0.0), argnums=1)
    oracle = lambda x: mamba(p, x, detached=True)[-1, 1]  # noqa: E731
    np.testing.assert_allclose(model(p, x)[1], oracle(x), rtol=1e-10)
    np.testing.assert_allclose(explain(p, x, target=1), x * jax.grad(oracle)(x), rtol=1e-8, atol=1e-12)
    jaxlrp.ledger(model, jaxlrp.MambaLRP(epsilon=0.0), argnums=1)(p, x, target=1).check(1e-9)


def test_the_state_space_preset_names_a_pattern_that_matches_nothing(rng):
    p, x = mamba_params(rng), sequence(rng, 6)
    with pytest.raises(jaxlrp.UnknownLayerError, match="xproj"):
        jaxlrp.lrp(lambda p, x: mamba(p, x, detached=False), jaxlrp.MambaLRP("**/xproj"), argnums=1)(p, x)
