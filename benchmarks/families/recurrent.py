"""Recurrent networks and state-space models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ._layers import conv, dense, rms_norm
from ._ops import Array, Ops, Weights, family

SEQUENCE = (2, 5, 4)


def lstm_layer(ops: Ops, weights: Weights, x: Array, units: int = 8) -> Array:
    """Hidden states ``[samples, time, units]``."""
    kernel, recurrent = weights("kernel", x.shape[-1], 4 * units), weights("recurrent/kernel", units, 4 * units)
    bias = weights("bias", 4 * units)

    def step(carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        hidden, cell = carry
        i, f, g, o = jnp.split(x @ kernel + hidden @ recurrent + bias, 4, axis=-1)
        i, f, o = (ops.act(jax.nn.sigmoid, gate) for gate in (i, f, o))
        cell = ops.gated(cell, f) + ops.gated(ops.act(jnp.tanh, g), i)
        hidden = ops.gated(ops.act(jnp.tanh, cell), o)
        return (hidden, cell), hidden

    start = jnp.zeros((x.shape[0], units), x.dtype)
    _, states = lax.scan(step, (start, start), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(states, 0, 1)


@family("LSTM", SEQUENCE)
def lstm(ops: Ops, weights: Weights, x: Array) -> Array:
    x = lstm_layer(ops, weights / "lstm0", x)
    x = lstm_layer(ops, weights / "lstm1", x)
    return dense(weights, "head", x[:, -1], 3)


@family("GRU", SEQUENCE)
def gru(ops: Ops, weights: Weights, x: Array) -> Array:
    units = 8
    gates = weights("gates/kernel", x.shape[-1], 2 * units), weights("gates/recurrent/kernel", units, 2 * units)
    new = weights("new/kernel", x.shape[-1], units), weights("new/recurrent/kernel", units, units)
    biases = weights("gates/bias", 2 * units), weights("new/bias", units), weights("new/recurrent/bias", units)

    def step(hidden: Array, x: Array) -> tuple[Array, None]:
        r, z = jnp.split(ops.act(jax.nn.sigmoid, x @ gates[0] + hidden @ gates[1] + biases[0]), 2, axis=-1)
        n = x @ new[0] + biases[1] + ops.gated(hidden @ new[1] + biases[2], r)
        return ops.gated(ops.act(jnp.tanh, n), 1.0 - z) + ops.gated(hidden, z), None

    hidden, _ = lax.scan(step, jnp.zeros((x.shape[0], units), x.dtype), jnp.swapaxes(x, 0, 1))
    return dense(weights, "head", hidden, 3)


@family("Elman network", SEQUENCE)
def elman(ops: Ops, weights: Weights, x: Array) -> Array:
    kernel, recurrent, bias = weights("kernel", 4, 8), weights("recurrent/kernel", 8, 8), weights("bias", 8)

    def step(t: int, hidden: Array) -> Array:
        return ops.act(jnp.tanh, x[:, t] @ kernel + hidden @ recurrent + bias)

    hidden = lax.fori_loop(0, x.shape[1], step, jnp.zeros((x.shape[0], 8), x.dtype))
    return dense(weights, "head", hidden, 3)


@family("Bidirectional LSTM", SEQUENCE)
def bidirectional(ops: Ops, weights: Weights, x: Array) -> Array:
    there = lstm_layer(ops, weights / "forward", x, 4)
    back = jnp.flip(lstm_layer(ops, weights / "backward", jnp.flip(x, axis=1), 4), axis=1)
    return dense(weights, "head", jnp.concatenate([there, back], axis=-1), 3)


@family("Attention over an LSTM", SEQUENCE)
def attention_over_lstm(ops: Ops, weights: Weights, x: Array) -> Array:
    x = lstm_layer(ops, weights / "lstm", x)
    scores = dense(weights, "score1", ops.act(jnp.tanh, dense(weights, "score0", x, 8)), 1)
    context = ops.share(jax.nn.softmax(scores, axis=1) * x).sum(axis=1)
    return dense(weights, "head", context, 3)


def mamba_block(ops: Ops, weights: Weights, x: Array, associative: bool) -> Array:
    """A selective state space: step size, input and output matrix are made of the sequence itself."""
    width, state, rank = 8, 4, 2
    u, gate = jnp.split(dense(weights, "in", x, 2 * width, bias=False), 2, axis=-1)
    u = ops.act(jax.nn.silu, conv(weights, "conv", u, width, 3, groups=width, padding=[(2, 0)]))
    step, b, c = jnp.split(dense(weights, "x", u, rank + 2 * state, bias=False), (rank, rank + state), axis=-1)
    step = ops.act(jax.nn.softplus, dense(weights, "dt", step, width))
    a = -jnp.exp(weights("a/bias", width, state))
    decay = ops.act(jnp.exp, step[..., None] * a)  # [samples, time, width, state]
    drive = ops.share(ops.gated(u, step)[..., None] * b[:, :, None, :])
    if associative:

        def combine(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
            return first[0] * second[0], ops.gated(first[1], second[0]) + second[1]

        _, states = lax.associative_scan(combine, (decay, drive), axis=1)
        y = ops.share(jnp.einsum("nlds,nls->nld", states, c))
    else:

        def advance(h: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            decay, drive, c = inputs
            h = ops.gated(h, decay) + drive
            return h, ops.share(jnp.einsum("nds,ns->nd", h, c))

        start = jnp.zeros((x.shape[0], width, state), x.dtype)
        _, y = lax.scan(advance, start, jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (decay, drive, c)))
        y = jnp.swapaxes(y, 0, 1)
    y = y + u * weights("d/scale", width)
    return dense(weights, "out", ops.share(y * ops.act(jax.nn.silu, gate)), x.shape[-1], bias=False)


def mamba(ops: Ops, weights: Weights, x: Array, associative: bool) -> Array:
    x = x + mamba_block(ops, weights / "block", rms_norm(ops, weights, "norm0", x), associative)
    return dense(weights, "head", rms_norm(ops, weights, "norm", x), 5)


@family("Mamba (scan)", SEQUENCE)
def mamba_scan(ops: Ops, weights: Weights, x: Array) -> Array:
    return mamba(ops, weights, x, associative=False)


@family("Mamba (associative scan)", SEQUENCE)
def mamba_associative(ops: Ops, weights: Weights, x: Array) -> Array:
    return mamba(ops, weights, x, associative=True)


FAMILIES = [lstm, gru, elman, bidirectional, attention_over_lstm, mamba_scan, mamba_associative]
