"""The same network in Flax Linen, Flax NNX and plain jax: one relevance, one layer table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jaxlrp

EPS = 1e-5  # of BatchNorm

# -- one network, three times ----------------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(6, (3, 3), name="conv")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=EPS, name="bn")(y))
        return nn.relu(x + nn.Conv(6, (3, 3), name="out")(y))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(6, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=EPS, name="bn")(x))
        x = LinenBlock(name="block")(nn.max_pool(x, (2, 2), (2, 2)))
        return nn.Dense(4, name="head")(x.reshape(x.shape[0], -1))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(6, 6, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(6, use_running_average=True, epsilon=EPS, rngs=rngs)
        self.out = nnx.Conv(6, 6, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(x + self.out(nnx.relu(self.bn(self.conv(x)))))


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(6, use_running_average=True, epsilon=EPS, rngs=rngs)
        self.block = NnxBlock(rngs)
        self.head = nnx.Linear(96, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.block(nnx.max_pool(nnx.relu(self.bn(self.stem(x))), (2, 2), (2, 2)))
        return self.head(x.reshape(x.shape[0], -1))


def conv(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    return x + p["bias"] if "bias" in p else x


def batch_norm(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    return (x - p["mean"]) / jnp.sqrt(p["var"] + EPS) * p["scale"] + p["bias"]


def plain_net(p: dict[str, Any], x: jax.Array) -> jax.Array:
    x = jax.nn.relu(batch_norm(conv(x, p["stem"]), p["bn"]))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    block = p["block"]
    y = jax.nn.relu(batch_norm(conv(x, block["conv"]), block["bn"]))
    x = jax.nn.relu(x + conv(y, block["out"]))
    return x.reshape(x.shape[0], -1) @ p["head"]["kernel"] + p["head"]["bias"]


class Case(NamedTuple):
    model: Any
    params: Any
    argnums: int


def weights(rng: np.random.Generator) -> dict[str, Any]:
    """Make every parameter different from its usual start: statistics too, and biases."""

    def normal(*shape: int) -> np.ndarray:
        return np.float32(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))

    def norm() -> dict[str, np.ndarray]:
        scale, var = (rng.uniform(0.5, 1.5, 6).astype(np.float32) for _ in range(2))
        return {"scale": scale, "bias": normal(6), "mean": normal(6), "var": var}

    def layer(*shape: int) -> dict[str, np.ndarray]:
        return {"kernel": normal(*shape), "bias": normal(shape[-1])}

    block = {"conv": layer(3, 3, 6, 6), "bn": norm(), "out": layer(3, 3, 6, 6)}
    stem = {"kernel": normal(3, 3, 3, 6)}
    return {"stem": stem, "bn": norm(), "block": block, "head": layer(96, 4)}


def collect(tree: dict[str, Any], statistics: bool) -> dict[str, Any]:
    """Split parameters from running statistics, as Linen keeps them."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            inner = collect(value, statistics)
            if inner:
                out[name] = inner
        elif (name in ("mean", "var")) == statistics:
            out[name] = value
    return out


def fill(state: Any, tree: dict[str, Any]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            fill(state[name], value)
        else:
            state[name][...] = jnp.asarray(value)


def nnx_net(tree: dict[str, Any]) -> NnxNet:
    model = NnxNet(nnx.Rngs(0))
    state = nnx.state(model)
    fill(state, tree)
    nnx.update(model, state)
    return model


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return weights(np.random.default_rng(1))


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope="module")
def cases(tree: dict[str, Any]) -> dict[str, Case]:
    linen = {"params": collect(tree, False), "batch_stats": collect(tree, True)}
    model = nnx_net(tree)
    return {
        "linen": Case(LinenNet(), linen, 1),
        "nnx": Case(model, nnx.state(model), 1),
        "plain": Case(plain_net, tree, 1),
    }


COMPOSITES: dict[str, jaxlrp.Composite] = {
    "epsilon_plus_flat": jaxlrp.EpsilonPlusFlat(),
    "epsilon_gamma_box": jaxlrp.EpsilonGammaBox(-3.0, 3.0),
    "alpha2_beta1": jaxlrp.EpsilonAlpha2Beta1(),
    "by_name": jaxlrp.EpsilonPlus().extend((jaxlrp.name("block/conv"), jaxlrp.Gamma(0.5))),
}
OTHERS = ["nnx", "plain"]


def close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    """Relative to the largest entry: single relevances may be differences of larger ones."""
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("other", OTHERS)
def test_same_forward(other: str, cases: dict[str, Case], x: jax.Array) -> None:
    linen = cases["linen"]
    want = linen.model.apply(linen.params, x)
    model, params, _ = cases[other]
    got = nnx.merge(nnx.graphdef(model), params)(x) if other == "nnx" else model(params, x)
    close(got, want)


@pytest.mark.parametrize("name", COMPOSITES)
def test_same_relevance(name: str, cases: dict[str, Case], x: jax.Array) -> None:
    maps = {}
    for framework, (model, params, argnums) in cases.items():
        explain = jaxlrp.lrp(model, COMPOSITES[name], argnums=argnums)
        maps[framework] = jax.jit(explain)(params, x, target=jnp.array([1, 3]))
    for other in OTHERS:
        close(maps[other], maps["linen"])


def rows(layers: jaxlrp.Layers) -> list[tuple[Any, ...]]:
    shape = lambda values: [(v.shape, str(v.dtype)) for v in values]  # noqa: E731
    return [(a.kind, a.op, shape(a.inputs), shape(a.outputs)) for a in layers]


def traced(case: Case, x: Any) -> jaxlrp.Layers:
    return jaxlrp.trace(case.model, case.params, x, argnums=case.argnums)


@pytest.mark.parametrize("other", OTHERS)
def test_same_layers(other: str, cases: dict[str, Case], x: jax.Array) -> None:
    assert rows(traced(cases[other], x)) == rows(traced(cases["linen"], x))


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", COMPOSITES)
def test_same_rules(other: str, name: str, cases: dict[str, Case], x: jax.Array) -> None:
    def rules(case: Case) -> list[tuple[str, str]]:
        return [(str(a.rule), a.reason) for a in COMPOSITES[name].assign(traced(case, x))]

    assert rules(cases[other]) == rules(cases["linen"])


@pytest.mark.parametrize("framework", ["linen", "nnx", "plain"])
def test_layers_with_weights_go_by_the_users_names(framework: str, cases: dict[str, Case], x: jax.Array) -> None:
    layers = traced(cases[framework], x)
    weighted = [layer.name for layer in layers if layer.kind == "linear"]
    assert weighted == ["stem", "block/conv", "block/out", "head"]
    assert len({layer.name for layer in layers}) == len(layers)


def test_weightless_layers_are_named_by_scope_where_there_is_one(cases: dict[str, Case], x: jax.Array) -> None:
    def others(framework: str) -> list[str]:
        return [a.name for a in traced(cases[framework], x) if a.kind != "linear"]

    block = ["block/relu", "block/add", "block/relu:2"]
    assert others("linen") == ["relu", "max_pool", *block, "reshape"]
    # NNX and plain functions leave no trace of modules around operations without weights
    assert others("nnx") == ["relu", "max_pool", "relu:2", "add", "relu:3", "reshape"]
    assert others("plain") == others("nnx")


def test_sources_are_the_users_lines(cases: dict[str, Case], x: jax.Array) -> None:
    for case in cases.values():
        for layer in traced(case, x):
            assert layer.source.startswith("test_frameworks.py:"), (layer.name, layer.source)


def test_printed_table_shows_names_kinds_and_shapes(cases: dict[str, Case], x: jax.Array) -> None:
    text = str(traced(cases["nnx"], x))
    head, _, *lines = text.splitlines()
    assert head.split() == ["layer", "kind", "input", "output", "source"]
    expected = ["stem", "linear/conv", "float32[2,", "8,", "8,", "3]", "float32[2,", "8,", "8,", "6]"]
    assert lines[0].split()[:10] == expected


def test_trace_takes_shapes_instead_of_arrays(cases: dict[str, Case], x: jax.Array) -> None:
    for case in cases.values():
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), case.params)
        spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
        layers = jaxlrp.trace(case.model, abstract, spec, argnums=case.argnums)
        assert rows(layers) == rows(traced(case, x))


# -- NNX: state or module --------------------------------------------------------------------------


def test_nnx_takes_state_or_module(cases: dict[str, Case], x: jax.Array) -> None:
    model, state, _ = cases["nnx"]
    explain = jaxlrp.lrp(model, jaxlrp.EpsilonPlusFlat())
    want = explain(state, x)
    calls: dict[str, Callable[[], Any]] = {
        "module": lambda: explain(model, x),
        "jit(state)": lambda: jax.jit(explain)(state, x),
        "jit(module)": lambda: jax.jit(explain)(model, x),
        "nnx.jit(module)": lambda: nnx.jit(explain)(model, x),
        "closed over": lambda: jax.jit(lambda x: explain(model, x))(x),
        "plain function": lambda: jaxlrp.lrp(model.__call__, jaxlrp.EpsilonPlusFlat())(x),
    }
    for call in calls.values():
        close(call(), want)


def test_nnx_weights_are_read_when_called_not_when_built(tree: dict[str, Any], x: jax.Array, no_compiling: Any) -> None:
    model = nnx_net(tree)
    explain = jax.jit(jaxlrp.lrp(model, jaxlrp.EpsilonPlus()))
    before = explain(nnx.state(model), x)
    model.head.kernel[...] = 2.0 * model.head.kernel[...]
    state = nnx.state(model)
    with no_compiling():
        after = explain(state, x)
    assert float(jnp.abs(after - before).max()) > 1e-3


def test_nnx_explanation_leaves_the_module_as_it_was(tree: dict[str, Any], x: jax.Array) -> None:
    model = nnx_net(tree)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    jaxlrp.lrp(model)(model, x)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.parametrize("layer", ["dropout", "batch_norm"])
def test_nnx_training_mode_is_refused(layer: str) -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense = nnx.Linear(3, 3, rngs=rngs)
            made = nnx.Dropout(0.5, rngs=rngs) if layer == "dropout" else nnx.BatchNorm(3, rngs=rngs)
            self.layer = made

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layer(self.dense(x))

    model = Net(nnx.Rngs(0))
    with pytest.raises(jaxlrp.NotDeterministicError, match=r"'layer'.*model\.eval\(\)"):
        jaxlrp.lrp(model)
    model.eval()
    assert jaxlrp.lrp(model, jaxlrp.Epsilon())(model, jnp.ones((2, 3))).shape == (2, 3)


# -- shared, nested and lifted modules -------------------------------------------------------------


class SharedLinen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(5)
        return dense(nn.relu(dense(nn.relu(dense(x)))))


class SharedNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(5, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(nnx.relu(self.dense(nnx.relu(self.dense(x)))))


def shared_plain(p: dict[str, Any], x: jax.Array) -> jax.Array:
    dense = lambda x: x @ p["dense"]["w"] + p["dense"]["b"]  # noqa: E731
    return dense(jax.nn.relu(dense(jax.nn.relu(dense(x)))))


def test_shared_modules_are_counted(key: jax.Array) -> None:
    x = jnp.ones((2, 5))
    linen = jaxlrp.trace(SharedLinen(), SharedLinen().init(key, x), x)
    assert [a.name for a in linen] == ["Dense_0", "relu", "Dense_0:2", "relu:2", "Dense_0:3"]
    params = {"dense": {"w": jnp.ones((5, 5)), "b": jnp.ones(5)}}
    want = ["dense", "relu", "dense:2", "relu:2", "dense:3"]
    assert [a.name for a in jaxlrp.trace(shared_plain, params, x, argnums=1)] == want
    model = SharedNnx(nnx.Rngs(0))
    assert [a.name for a in jaxlrp.trace(model, model, x)] == want


def test_the_second_use_of_a_shared_module_can_have_a_rule_of_its_own(key: jax.Array) -> None:
    x = jax.random.normal(key, (2, 5))
    composite = jaxlrp.Composite((jaxlrp.kind("linear"), jaxlrp.Epsilon()), (jaxlrp.name("Dense_0:2"), jaxlrp.ZPlus()))
    params = SharedLinen().init(key, x)
    assigned = composite.assign(jaxlrp.trace(SharedLinen(), params, x))
    rules = [str(a.rule) for a in assigned if a.layer.kind == "linear"]
    assert rules == ["Epsilon()", "ZPlus()", "Epsilon()"]


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(nn.Dense(4)(x))


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Inner(name="b")(Inner(name="a")(x))


class Deep(nn.Module):
    def setup(self) -> None:
        self.blocks = [Outer() for _ in range(2)]
        self.table = {"head": nn.Dense(2)}

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.table["head"](x)


def test_nested_modules_and_modules_in_lists_and_dicts(key: jax.Array) -> None:
    x = jnp.ones((2, 4))
    layers = jaxlrp.trace(Deep(), Deep().init(key, x), x)
    inner = [f"blocks_{i}/{b}/{leaf}" for i in "01" for b in "ab" for leaf in ("Dense_0", "relu")]
    assert [a.name for a in layers] == [*inner, "table_head"]


def test_nnx_nested_modules_and_modules_in_lists() -> None:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(self.dense(x))

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = block(x)
            return x

    model = Net(nnx.Rngs(0))
    names = [a.name for a in jaxlrp.trace(model, model, jnp.ones((2, 4)))]
    assert names == ["blocks/0/dense", "relu", "blocks/1/dense", "relu:2"]


def test_sequential(key: jax.Array) -> None:
    x = jnp.ones((2, 4))
    linen = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
    names = [a.name for a in jaxlrp.trace(linen, linen.init(key, x), x)]
    assert names == ["layers_0", "relu", "layers_2"]
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 2, rngs=rngs))
    names = [a.name for a in jaxlrp.trace(model, model, x)]
    assert names == ["layers/0", "relu", "layers/2"]


def test_a_named_or_bound_root_does_not_show_in_names(key: jax.Array) -> None:
    x = jnp.ones((2, 4))
    plain, named = Inner(), Inner(name="mine")
    params = plain.init(key, x)
    for model in (plain, named):
        assert [a.name for a in jaxlrp.trace(model, params, x)] == ["Dense_0", "relu"]


def test_batch_norm_that_no_convolution_absorbs_goes_by_its_own_name(key: jax.Array) -> None:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.relu(nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.dense = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(self.dense(self.norm(x)))

    x = jnp.ones((2, 4))
    linen, model = Linen(), Nnx(nnx.Rngs(0))
    assert [a.name for a in jaxlrp.trace(linen, linen.init(key, x), x)] == ["BatchNorm_0", "Dense_0", "relu"]
    assert [a.name for a in jaxlrp.trace(model, model, x)] == ["norm", "dense", "relu"]


class Vmapped(nn.Module):
    """One dense layer of its own for every row of the input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.relu(nn.vmap(Inner, **axes)(name="heads")(x))


def test_vmapped_linen_module_equals_its_rows_on_their_own(key: jax.Array) -> None:
    x = jax.random.normal(key, (3, 4))
    params = Vmapped().init(key, x)
    assert [a.name for a in jaxlrp.trace(Vmapped(), params, x)][:2] == ["heads/Dense_0", "heads/relu"]
    composite = jaxlrp.Composite.uniform(jaxlrp.Gamma(0.5))
    together = jaxlrp.lrp(Vmapped(), composite)(params, x)
    for i in range(3):
        row = jax.tree.map(lambda a, i=i: a[i], params["params"]["heads"])
        alone = jaxlrp.lrp(Inner(), composite)({"params": row}, x[i])
        close(together[i], alone)


def test_vmapped_nnx_module_equals_its_rows_on_their_own(key: jax.Array) -> None:
    class Heads(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs: nnx.Rngs) -> nnx.Linear:
                return nnx.Linear(4, 4, rngs=rngs)

            self.heads = make(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(nnx.vmap(lambda head, row: head(row))(self.heads, x))

    model, x = Heads(nnx.Rngs(0)), jax.random.normal(key, (3, 4))
    together = jaxlrp.lrp(model, jaxlrp.Gamma(0.5))(model, x)
    kernel, bias = model.heads.kernel[...], model.heads.bias[...]
    alone = jaxlrp.lrp(lambda x, w, b: jax.nn.relu(x @ w + b), jaxlrp.Gamma(0.5))
    for i in range(3):
        close(together[i], alone(x[i], kernel[i], bias[i]))


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"flax\.linen\.Module, a flax\.nnx\.Module or a function"):
        jaxlrp.lrp({"kernel": 1})


def test_the_bound_method_apply_is_taken_for_its_module() -> None:
    """Nobody means to explain the parameters."""
    model, x = nn.Dense(3), np.ones((2, 4), np.float32)
    params = model.init(jax.random.key(0), x)
    np.testing.assert_allclose(jaxlrp.lrp(model.apply)(params, x), jaxlrp.lrp(model)(params, x))
