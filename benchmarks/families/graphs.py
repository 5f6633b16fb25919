"""Networks on graphs and sets. The graph is the same for all samples; its nodes' features are explained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ._layers import dense
from ._ops import Array, Ops, Weights, family

NODES = (6, 4)
SENDERS = np.array([0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0, 0, 3])
RECEIVERS = np.array([1, 0, 2, 1, 3, 2, 4, 3, 5, 4, 0, 5, 3, 0])
EDGES = len(SENDERS)

relu = jax.nn.relu


def sum_at(edges: Array, receivers: np.ndarray, nodes: int) -> Array:
    return jax.ops.segment_sum(edges, receivers, nodes)


@family("GCN", NODES, single=True)
def gcn(ops: Ops, weights: Weights, x: Array) -> Array:
    nodes = x.shape[0]
    senders, receivers = np.r_[SENDERS, np.arange(nodes)], np.r_[RECEIVERS, np.arange(nodes)]
    degree = sum_at(jnp.ones(len(receivers), x.dtype), receivers, nodes)
    for i in range(2):
        h = dense(weights, f"dense{i}", x, 8, bias=False) * jax.lax.rsqrt(degree)[:, None]
        h = sum_at(h[senders], receivers, nodes) * jax.lax.rsqrt(degree)[:, None]
        x = ops.act(relu, h + weights(f"dense{i}/bias", 8))
    return dense(weights, "head", x.mean(axis=0), 3)


@family("GAT", NODES, single=True)
def gat(ops: Ops, weights: Weights, x: Array) -> Array:
    for i in range(2):
        w, heads = weights / f"layer{i}", 2
        h = dense(w, "dense", x, 8, bias=False).reshape(-1, heads, 4)
        logits = (h @ w("sender/kernel", 4, 1))[SENDERS] + (h @ w("receiver/kernel", 4, 1))[RECEIVERS]
        logits = ops.act(jax.nn.leaky_relu, logits)
        top = jax.ops.segment_max(logits, RECEIVERS, x.shape[0])
        score = jnp.exp(logits - top[RECEIVERS])
        weight = score / sum_at(score, RECEIVERS, x.shape[0])[RECEIVERS]  # a softmax at every node
        h = sum_at(ops.share(weight * h[SENDERS]), RECEIVERS, x.shape[0]).reshape(-1, 8)
        x = ops.act(jax.nn.elu, h + w("bias", 8))
    return dense(weights, "head", x, 3)


@family("Message passing", NODES, (EDGES, 2), single=True)
def message_passing(ops: Ops, weights: Weights, x: tuple[Array, Array]) -> Array:
    nodes, edges = x
    nodes = dense(weights, "encode", nodes, 8)
    for i in range(2):
        w = weights / f"step{i}"
        messages = jnp.concatenate([nodes[SENDERS], nodes[RECEIVERS], edges], axis=-1)
        edges = ops.act(relu, dense(w, "edge1", ops.act(relu, dense(w, "edge0", messages, 8)), 8))
        total = sum_at(edges, RECEIVERS, nodes.shape[0])
        mean = total / jnp.maximum(sum_at(jnp.ones((EDGES, 1), total.dtype), RECEIVERS, nodes.shape[0]), 1.0)
        update = dense(w, "node0", jnp.concatenate([nodes, total, mean], axis=-1), 8)
        nodes = nodes + dense(w, "node1", ops.act(relu, update), 8)
    return dense(weights, "head", jnp.concatenate([nodes.sum(0), nodes.max(0)]), 3)


@family("Message passing, maximum at nodes", NODES, single=True)
def message_passing_max(ops: Ops, weights: Weights, x: Array) -> Array:
    for i in range(2):
        messages = ops.act(relu, dense(weights, f"edge{i}", x[SENDERS] - x[RECEIVERS], 8))
        x = ops.act(relu, dense(weights, f"node{i}", jax.ops.segment_max(messages, RECEIVERS, x.shape[0]), 8))
    return dense(weights, "head", x.mean(axis=0), 3)


@family("DeepSets", (2, 5, 4))
def deep_sets(ops: Ops, weights: Weights, x: Array) -> Array:
    present = jnp.asarray([1.0, 1.0, 1.0, 0.5, 0.0], x.dtype)
    x = ops.act(relu, dense(weights, "phi1", ops.act(relu, dense(weights, "phi0", x, 8)), 8))
    x = (x * present[:, None]).sum(axis=1)
    return dense(weights, "rho1", ops.act(relu, dense(weights, "rho0", x, 8)), 3)


FAMILIES = [gcn, gat, message_passing, message_passing_max, deep_sets]
