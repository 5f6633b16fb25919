"""Relevance over several devices: sharded batches, sharded weights, `shard_map` and several processes."""

from __future__ import annotations

import functools
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlrp
from jaxlrp import winograd

ROOT = Path(__file__).parents[1]
BATCH = 8
LABELS = np.arange(BATCH) % 4
COMMUNICATION = re.compile(r"\b(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\b")

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


class ConvNet(nn.Module):
    precision: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(True)(nn.Conv(8, (3, 3), precision=self.precision)(x)))
        x = x + nn.relu(nn.Conv(8, (3, 3), precision=self.precision)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(4, precision=self.precision)(x)


class Transformer(nn.Module):
    precision: Any = None

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4, precision=self.precision)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(32, precision=self.precision)(nn.LayerNorm()(x)))
        x = x + nn.Dense(16, precision=self.precision)(y)
        return nn.Dense(4, precision=self.precision)(nn.LayerNorm()(x).mean(1))


class Reader(nn.Module):
    precision: Any = None

    @nn.compact
    def __call__(self, x):
        # made of the input: Flax's own start does not vary over devices, and shard_map asks that of a carry
        start = (jnp.zeros_like(x[:, 0]),) * 2
        x = nn.RNN(nn.OptimizedLSTMCell(x.shape[-1]))(x, initial_carry=start)
        return nn.Dense(4, precision=self.precision)(x[:, -1])


class Case(NamedTuple):
    model: type[nn.Module]
    shape: tuple[int, ...]
    composite: Any


CASES = {
    "flat": Case(ConvNet, (BATCH, 6, 6, 4), jaxlrp.EpsilonPlusFlat()),
    "gamma": Case(ConvNet, (BATCH, 6, 6, 4), jaxlrp.EpsilonGammaBox(-4.0, 4.0)),
    "alpha-beta": Case(ConvNet, (BATCH, 6, 6, 4), jaxlrp.EpsilonAlpha2Beta1()),
    "transformer": Case(Transformer, (BATCH, 6, 16), jaxlrp.AttnLRP()),
    "lstm": Case(Reader, (BATCH, 5, 16), jaxlrp.RecurrentLRP()),
}
every_case = pytest.mark.parametrize("name", CASES)


def explainer(case: Case, precision: Any = None) -> Callable[..., jax.Array]:
    explain = jaxlrp.lrp(case.model(precision), case.composite)
    return lambda params, x, labels: explain(params, x, target=labels)


@functools.cache
def alone(name: str) -> tuple[Any, jax.Array, np.ndarray]:
    """Parameters, input, and the relevance that one device finds."""
    case = CASES[name]
    x = jax.random.normal(jax.random.key(0), case.shape)
    params = jax.jit(case.model().init)(jax.random.key(1), x)
    return params, x, np.asarray(jax.jit(explainer(case))(params, x, LABELS))


def close(got: jax.Array, want: np.ndarray) -> None:
    assert np.abs(want).max() > 0
    assert np.abs(np.asarray(got) - want).max() <= 1e-5 * np.abs(want).max()


def grid(data: int, model: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(kind, kind))


def by_output(mesh: jax.sharding.Mesh, weight: jax.Array) -> NamedSharding:
    """Output channels and output features are the last axis of every Flax kernel, bias and statistic."""
    split = weight.ndim and weight.shape[-1] % mesh.shape["model"] == 0
    return NamedSharding(mesh, P(*[None] * (weight.ndim - 1), "model") if split else P())


# -- arrays that are sharded -----------------------------------------------------------------------------------------


@needs_eight
@every_case
@pytest.mark.parametrize(
    ("data", "model"),
    [
        pytest.param(8, 1, id="batch"),
        pytest.param(1, 8, id="weights", marks=pytest.mark.heavy),  # all of them: too slow for every day
        pytest.param(4, 2, id="both"),
    ],
)
def test_relevance_is_that_of_one_device(name: str, data: int, model: int) -> None:
    params, x, want = alone(name)
    mesh = grid(data, model)
    params = jax.device_put(params, jax.tree.map(functools.partial(by_output, mesh), params))
    x, labels = jax.device_put((x, LABELS), NamedSharding(mesh, P("data")))
    program = jax.jit(explainer(CASES[name])).lower(params, x, labels).compile()
    got = program(params, x, labels)
    close(got, want)
    assert got.sharding.shard_shape(got.shape)[0] == BATCH // data
    assert {s.device: s.index[0] for s in got.addressable_shards} == {
        s.device: s.index[0] for s in x.addressable_shards
    }
    # samples have nothing to tell each other; features have, or the weights were not spread at all
    assert bool(COMMUNICATION.search(program.as_text())) == (model > 1)


@needs_eight
def test_shardings_given_to_jit() -> None:
    params, x, want = alone("gamma")
    mesh = grid(8, 1)
    spread, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    shardings = {"in_shardings": (everywhere, spread, spread), "out_shardings": spread}
    got = jax.jit(explainer(CASES["gamma"]), **shardings)(params, x, LABELS)
    close(got, want)
    assert got.sharding.is_equivalent_to(spread, got.ndim)


@needs_eight
@pytest.mark.parametrize("name", ["flat", "transformer", "lstm"])
def test_an_explicit_mesh(name: str) -> None:
    params, x, want = alone(name)
    with jax.set_mesh(grid(8, 1, AxisType.Explicit)):
        spread = jax.device_put((x, LABELS), P("data"))
        got = jax.jit(explainer(CASES[name]))(jax.device_put(params, P()), *spread)
    close(got, want)
    assert jax.typeof(got).sharding.spec[0] == "data"


@needs_eight
def test_fewer_multiplications_on_an_explicit_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_FEATURES", 8)
    monkeypatch.setattr(winograd, "_MULTIPLICATIONS", 0)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.relu(nn.Conv(8, (3, 3))(x))
            return x.mean((1, 2))

    x = nn.relu(jax.random.normal(jax.random.key(0), (BATCH, 7, 8, 8)))
    params = Net().init(jax.random.key(1), x)
    explain = jax.jit(jaxlrp.lrp(Net(), jaxlrp.EpsilonPlus(), target=1))
    want = np.asarray(explain(params, x))
    with jax.set_mesh(grid(8, 1, AxisType.Explicit)):
        close(explain(jax.device_put(params, P()), jax.device_put(x, P("data"))), want)


@needs_eight
def test_a_model_that_says_where_its_values_lie() -> None:
    class Split(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = nn.initializers.lecun_normal()
            x = nn.Dense(16, kernel_init=nn.with_partitioning(kernel, (None, "model")))(x)
            x = jax.lax.with_sharding_constraint(nn.relu(x), P("data", "model"))
            return nn.Dense(4, kernel_init=nn.with_partitioning(kernel, ("model", None)))(x)

    mesh, x = grid(4, 2), jax.random.normal(jax.random.key(0), (BATCH, 8))
    explain = jax.jit(jaxlrp.lrp(Split(), jaxlrp.EpsilonPlusFlat()))
    with jax.set_mesh(mesh):
        params = jax.jit(Split().init)(jax.random.key(1), x)
        specs = nn.get_partition_spec(params)
        assert specs["params"]["Dense_1"]["kernel"] == P("model", None)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        got = explain(jax.device_put(params, shardings), jax.device_put(x, NamedSharding(mesh, P("data"))), target=1)

    def plain(first, second, x):
        return jax.nn.relu(x @ first) @ second

    kernels = [nn.unbox(params)["params"][name]["kernel"] for name in ("Dense_0", "Dense_1")]
    alone = jax.jit(jaxlrp.lrp(plain, jaxlrp.EpsilonPlusFlat(), argnums=2))(*jax.device_get(kernels), x, target=1)
    close(got, np.asarray(alone))


# -- one program per device ------------------------------------------------------------------------------------------


@needs_eight
@every_case
def test_shard_map(name: str) -> None:
    params, x, want = alone(name)
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P("data")}
    got = jax.jit(jax.shard_map(explainer(CASES[name]), mesh=grid(8, 1), **specs))(params, x, LABELS)
    close(got, want)


@needs_eight
def test_a_collective_inside_of_a_model_is_refused() -> None:
    mesh, weights = grid(4, 2), jnp.ones((4, 3))

    def model(x):
        specs = {"in_specs": (P("data", "model"), P("model")), "out_specs": P("data")}
        return jax.shard_map(lambda x, w: jax.lax.psum(x @ w, "model"), mesh=mesh, **specs)(x, weights)

    with pytest.raises(jaxlrp.UnknownPrimitiveError, match="shard_map"):
        jaxlrp.lrp(model)(jnp.ones((BATCH, 4)))


def _one_of_two_carries(w, x):  # relevance comes to the first of them alone
    step = lambda c, now: ((jnp.tanh(c[0] @ w + now), c[1] + now), None)  # noqa: E731
    return jax.lax.scan(step, (jnp.zeros_like(x[:, 0]),) * 2, x.swapaxes(0, 1))[0][0]


def _stacked_outputs(w, x):  # none comes to the last carry
    step = lambda c, now: (jnp.tanh(c @ w + now), jnp.tanh(c @ w))  # noqa: E731
    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def _constant_of_a_scan(w, x):  # it adds up over the steps, from none
    first = jnp.tanh(x[:, 0] @ w)
    step = lambda c, now: (jnp.tanh(c @ w + now + first), None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[0]


def _branches_of_different_operands(w, x):
    branches = (lambda a, b: a @ w, lambda a, b: jnp.tanh(b) @ w)
    return jax.lax.cond(w[0, 0] > 0, *branches, x[:, 0], x[:, 1])


def _a_constant_branch(w, x):
    return jax.lax.cond(w[0, 0] > 9, jnp.ones_like, lambda x: x @ w, x[:, 0])


@needs_eight
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["shard_map", "explicit"])
@pytest.mark.parametrize(
    "model",
    [
        _one_of_two_carries,
        _stacked_outputs,
        _constant_of_a_scan,
        _branches_of_different_operands,
        _a_constant_branch,
    ],
)
def test_values_without_relevance_lie_where_the_others_do(model: Callable[..., jax.Array], kind: AxisType) -> None:
    w, x = jax.random.normal(jax.random.key(0), (4, 4)), jax.random.normal(jax.random.key(1), (BATCH, 3, 4))
    explain = jaxlrp.lrp(model, jaxlrp.RecurrentLRP(), argnums=1)
    want = np.asarray(jax.jit(explain)(w, x))
    mesh = grid(8, 1, kind)
    if kind == AxisType.Auto:
        got = jax.jit(jax.shard_map(explain, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))(w, x)
    else:
        with jax.set_mesh(mesh):
            got = jax.jit(explain)(jax.device_put(w, P()), jax.device_put(x, P("data")))
    close(got, want)


# -- precision of products -------------------------------------------------------------------------------------------


def products(name: str, precision: Any = None) -> list[str]:
    """The matrix products and convolutions of an explanation, before XLA sees them."""
    params, x, _ = alone(name)
    text = jax.jit(explainer(CASES[name], precision)).lower(params, x, LABELS).as_text()
    return re.findall(r"^.*stablehlo\.(?:dot_general|convolution)\b.*$", text, re.MULTILINE)


@every_case
def test_precision_of_the_context_reaches_every_product(name: str) -> None:
    """A rule's own products too: on recent GPUs those would be computed in TF32 otherwise."""
    default = products(name)
    with jax.default_matmul_precision("highest"):
        highest = products(name)
    assert len(highest) == len(default) > 0
    assert not any("HIGHEST" in line for line in default)
    assert all(line.count("HIGHEST") == 2 for line in highest)  # of both operands


@pytest.mark.parametrize("name", ["flat", "gamma", "alpha-beta", "transformer"])
def test_precision_of_the_model_reaches_every_product(name: str) -> None:
    found = products(name, jax.lax.Precision.HIGHEST)
    assert found
    assert all(line.count("HIGHEST") == 2 for line in found)


# -- several processes -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.heavy
def test_two_processes(tmp_path: Path) -> None:
    names = ["flat", "transformer", "lstm"]
    command = [sys.executable, "-m", "tests.sharding_worker", f"127.0.0.1:{free_port()}"]
    # files, since nobody reads one process's pipe while waiting for the other
    logs = [tmp_path / f"{place}.txt" for place in range(2)]
    processes = []
    try:
        for place, log in enumerate(logs):
            with log.open("w") as out:
                started = subprocess.Popen([*command, str(place), *names], stdout=out, stderr=out, cwd=ROOT)
            processes.append(started)
        codes = [process.wait(timeout=120) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["one was not done after two minutes"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "\n\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], f"{codes}:\n{said}"
    found = [[json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")] for log in logs]
    for name, first, second in zip(names, *found, strict=True):
        assert (first["name"], second["name"]) == (name, name)
        assert (first["samples"], second["samples"]) == ([0, 1, 2, 3], [4, 5, 6, 7])
        for one in (first, second):
            assert one["error"] <= 1e-5 * one["largest"]
            assert one["total"] == pytest.approx(one["total alone"], rel=1e-5)
