"""Models of Keras, Equinox and Haiku, taken as they are: the same explanations as elsewhere, good names, clear errors.

None of the three is needed by jaxlrp; a test whose library is not installed is skipped.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_frameworks import COMPOSITES, EPS, close, plain_net, weights

import jaxlrp

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported first
LIBRARIES = ["keras", "equinox", "haiku"]

# -- one residual network with BatchNorm in every library ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Network:
    """A model that holds given weights.

    Attributes:
        model: what ``jaxlrp.lrp`` is given.
        before: arguments of ``explain`` in front of the input, ``after``: those behind it.
        batched: whether the model takes a batch of images, channels last; one image, channels first, otherwise.
        stateful: whether it returns ``(output, state)``.
        call: the model's own output.
    """

    model: Any
    before: tuple[Any, ...]
    call: Callable[[Any], Any]
    after: tuple[Any, ...] = ()
    batched: bool = True
    stateful: bool = False

    def explain(self, composite: Any, x: Any, target: Any) -> tuple[Any, Any]:
        """Output and relevance for a batch of images, channels last."""
        run = jaxlrp.value_and_lrp(self.model, composite, has_aux=self.stateful)

        def one(x: Any, target: Any) -> tuple[Any, Any]:
            output, relevance = run(*self.before, x, *self.after, target=target)
            return (output[0] if self.stateful else output), relevance

        if self.batched:
            return jax.jit(one)(x, target)
        output, relevance = jax.jit(jax.vmap(one))(jnp.moveaxis(x, -1, 1), target)
        return output, jnp.moveaxis(relevance, 1, -1)

    def layers(self, x: Any) -> jaxlrp.Layers:
        return jaxlrp.trace(self.model, *self.before, x if self.batched else jnp.moveaxis(x[0], -1, 0), *self.after)


def keras_network(tree: dict[str, Any]) -> Network:
    keras = pytest.importorskip("keras")
    layers = keras.layers

    def conv(name: str, **kwargs: Any) -> Any:
        return layers.Conv2D(6, 3, padding="same", name=name, **kwargs)

    inside = keras.Input((4, 4, 6))
    y = conv("conv")(inside)
    y = layers.ReLU(name="relu")(layers.BatchNormalization(epsilon=EPS, name="bn")(y))
    y = layers.Add(name="add")([inside, conv("out")(y)])
    block = keras.Model(inside, layers.Activation("relu", name="relu2")(y), name="block")

    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(epsilon=EPS, name="bn")(conv("stem", use_bias=False)(inputs))
    x = block(layers.MaxPooling2D(name="pool")(layers.ReLU(name="relu")(x)))
    model = keras.Model(inputs, layers.Dense(4, name="head")(layers.Dropout(0.5)(layers.Flatten(name="flatten")(x))))

    def fill(layer: Any, p: dict[str, Any]) -> None:
        for keras_name, name in {
            "gamma": "scale",
            "beta": "bias",
            "moving_mean": "mean",
            "moving_variance": "var",
        }.items():
            if hasattr(layer, keras_name):
                getattr(layer, keras_name).assign(p[name])
        for name in ("kernel", "bias"):
            if getattr(layer, name, None) is not None:
                getattr(layer, name).assign(p[name])

    fill(model.get_layer("stem"), tree["stem"])
    fill(model.get_layer("bn"), tree["bn"])
    for name, p in tree["block"].items():
        fill(block.get_layer(name), p)
    fill(model.get_layer("head"), tree["head"])
    return Network(model, (model,), lambda x: model(x, training=False))


def equinox_network(tree: dict[str, Any]) -> Network:
    eqx = pytest.importorskip("equinox")
    key = jax.random.key(0)

    def conv(p: dict[str, Any]) -> Any:
        made = eqx.nn.Conv2d(p["kernel"].shape[2], 6, 3, padding=1, use_bias="bias" in p, key=key)
        made = eqx.tree_at(lambda m: m.weight, made, jnp.asarray(p["kernel"].transpose(3, 2, 0, 1)))
        return eqx.tree_at(lambda m: m.bias, made, jnp.asarray(p["bias"])[:, None, None]) if "bias" in p else made

    def norm(p: dict[str, Any]) -> Any:
        made = eqx.nn.BatchNorm(6, axis_name="batch", eps=EPS, mode="ema", inference=True)
        return eqx.tree_at(lambda m: (m.weight, m.bias), made, (jnp.asarray(p["scale"]), jnp.asarray(p["bias"])))

    class Block(eqx.Module):
        conv: Any
        bn: Any
        out: Any

        def __call__(self, x: jax.Array, state: Any) -> Any:
            y, state = self.bn(self.conv(x), state)
            return jax.nn.relu(x + self.out(jax.nn.relu(y))), state

    class Net(eqx.Module):
        stem: Any
        bn: Any
        pool: Any
        block: Block
        head: Any

        def __init__(self) -> None:
            self.stem, self.bn, self.pool = conv(tree["stem"]), norm(tree["bn"]), eqx.nn.MaxPool2d(2, 2)
            p = tree["block"]
            self.block = Block(conv(p["conv"]), norm(p["bn"]), conv(p["out"]))
            w, b = jnp.asarray(tree["head"]["kernel"].T), jnp.asarray(tree["head"]["bias"])
            self.head = eqx.tree_at(lambda m: (m.weight, m.bias), eqx.nn.Linear(96, 4, key=key), (w, b))

        def __call__(self, x: jax.Array, state: Any) -> Any:
            x, state = self.bn(self.stem(x), state)
            x, state = self.block(self.pool(jax.nn.relu(x)), state)
            return self.head(jnp.moveaxis(x, 0, -1).reshape(-1)), state

    model, state = eqx.nn.make_with_state(Net)()
    for layer, p in ((model.bn, tree["bn"]), (model.block.bn, tree["block"]["bn"])):
        state = state.set(layer.ema_state_index, (jnp.asarray(p["mean"]), jnp.asarray(p["var"])))
    call = jax.vmap(lambda x: model(jnp.moveaxis(x, -1, 0), state)[0])
    return Network(model, (model,), call, after=(state,), batched=False, stateful=True)


def haiku_network(tree: dict[str, Any]) -> Network:
    hk = pytest.importorskip("haiku")

    def norm(x: jax.Array, is_training: bool) -> jax.Array:
        return hk.BatchNorm(True, True, 0.9, eps=EPS, name="bn")(x, is_training)

    class Block(hk.Module):
        def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
            y = jax.nn.relu(norm(hk.Conv2D(6, 3, name="conv")(x), is_training))
            return jax.nn.relu(x + hk.Conv2D(6, 3, name="out")(y))

    def net(x: jax.Array, is_training: bool = False) -> jax.Array:
        x = norm(hk.Conv2D(6, 3, with_bias=False, name="stem")(x), is_training)
        x = hk.max_pool(jax.nn.relu(x), (2, 2, 1), (2, 2, 1), "VALID")
        x = hk.Flatten()(Block(name="block")(x, is_training))
        if is_training:
            x = hk.dropout(hk.next_rng_key(), 0.5, x)
        return hk.Linear(4, name="head")(x)

    params, state = {}, {}

    def fill(tree: dict[str, Any], path: str) -> None:
        for name, p in tree.items():
            if "kernel" in p:
                params[path + name] = {"w": p["kernel"], **({"b": p["bias"]} if "bias" in p else {})}
            elif "mean" in p:
                spread = {k: v.reshape(1, 1, 1, 6) for k, v in p.items()}
                params[path + name] = {"scale": spread["scale"], "offset": spread["bias"]}
                for which in ("mean", "var"):
                    state[f"{path}{name}/~/{which}_ema"] = {
                        "average": spread[which],
                        "hidden": spread[which],
                        "counter": 1,
                    }
            else:
                fill(p, f"{path}{name}/")

    fill(tree, "")
    model = hk.transform_with_state(net)
    return Network(model, (params, state), lambda x: model.apply(params, state, None, x)[0], stateful=True)


BUILDERS = {"keras": keras_network, "equinox": equinox_network, "haiku": haiku_network}


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return weights(np.random.default_rng(1))


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope="module")
def network(request: pytest.FixtureRequest, tree: dict[str, Any]) -> Network:
    return BUILDERS[request.param](tree)


each = pytest.mark.parametrize("network", LIBRARIES, indirect=True)


@each
@pytest.mark.parametrize("name", ["epsilon_gamma_box", "by_name"])
def test_the_same_network_gets_the_same_relevance(network: Network, name: str, tree: dict[str, Any], x: Any) -> None:
    target = jnp.array([1, 3])
    output, relevance = network.explain(COMPOSITES[name], x, target)
    close(output, plain_net(tree, x))
    close(relevance, jaxlrp.lrp(plain_net, COMPOSITES[name], argnums=1)(tree, x, target=target))


@each
def test_lrp_0_of_a_relu_network_is_gradient_times_input(network: Network, x: Any) -> None:
    zero = jaxlrp.Composite.uniform(jaxlrp.Zero()).extend((jaxlrp.kind("add"), jaxlrp.Zero()))
    _, relevance = network.explain(zero, x, jnp.array([1, 3]))
    gradient = jax.grad(lambda x: network.call(x)[jnp.arange(2), jnp.array([1, 3])].sum())(x)
    close(relevance, x * gradient, 2e-5)


@each
def test_layers_go_by_the_users_names(network: Network, x: Any) -> None:
    layers = network.layers(x)
    assert [a.name for a in layers if a.kind == "linear"] == ["stem", "block/conv", "block/out", "head"]
    assert len({a.name for a in layers}) == len(layers)
    kinds = [f"{a.kind}/{a.op}" for a in layers if a.kind != "move"]
    assert kinds == [
        "linear/conv",
        "activation/relu",
        "pick/max_pool",
        "linear/conv",
        "activation/relu",
        "linear/conv",
        "sum/add",
        "activation/relu",
        "linear/dense",
    ]


@pytest.mark.parametrize("network", ["equinox", "haiku"], indirect=True)  # a functional model of Keras has no lines
def test_sources_are_the_users_lines(network: Network, x: Any) -> None:
    assert {layer.source.split(":")[0] for layer in network.layers(x)} == {"test_libraries.py"}


def names(model: Any, *args: Any, **kwargs: Any) -> list[str]:
    return [layer.name for layer in jaxlrp.trace(model, *args, **kwargs)]


X = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(2, 6)


# -- Keras -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keras() -> Any:
    module = pytest.importorskip("keras")
    module.utils.set_random_seed(0)
    return module


def mlp(keras: Any, *last: Any) -> Any:
    layers = [keras.layers.Dense(4, activation="relu", name="one"), *last, keras.layers.Dense(3, name="two")]
    return keras.Sequential([keras.Input((6,)), *layers])


def test_keras_takes_the_model_its_variables_or_their_values(keras: Any) -> None:
    model = mlp(keras, keras.layers.BatchNormalization(), keras.layers.Dropout(0.5))
    explain = jaxlrp.lrp(model)
    variables = (model.trainable_variables, model.non_trainable_variables)
    values = jax.tree.map(lambda v: v.value, variables)
    expected = explain(model, X)
    assert np.abs(expected).max() > 0
    for given in (variables, values, jax.tree.map(np.asarray, values)):
        np.testing.assert_array_equal(explain(given, X), expected)
    np.testing.assert_allclose(jax.jit(explain)(values, X), expected, rtol=1e-5, atol=1e-6)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), values)
    assert names(model, shapes, jax.ShapeDtypeStruct(X.shape, X.dtype)) == names(model, model, X)


def test_keras_values_of_another_type_are_cast_as_keras_does(keras: Any) -> None:
    model = mlp(keras, keras.layers.BatchNormalization())
    rounded = jax.tree.map(
        lambda v: v.value.astype(jnp.bfloat16), (model.trainable_variables, model.non_trainable_variables)
    )
    close(jaxlrp.lrp(model)(rounded, X), jaxlrp.lrp(model)(jax.tree.map(lambda a: a.astype(jnp.float32), rounded), X))


def test_keras_weights_are_read_when_called(keras: Any) -> None:
    model = mlp(keras)
    explain = jaxlrp.lrp(model, jaxlrp.Zero())
    before = explain(model, X)
    model.get_layer("two").kernel.assign(2.0 * model.get_layer("two").kernel)
    close(explain(model, X), 2.0 * before)


def test_keras_names_of_nested_and_subclassed_models(keras: Any) -> None:
    layers = keras.layers

    class Block(layers.Layer):
        def __init__(self, **kwargs: Any):
            super().__init__(**kwargs)
            self.norm = layers.LayerNormalization(name="norm")
            self.attend = layers.MultiHeadAttention(2, 2, name="attend")
            self.drop = layers.Dropout(0.5)

        def call(self, x: Any, training: bool | None = None) -> Any:
            y = self.norm(x)
            return x + self.drop(self.attend(y, y), training=training)

    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.embed = layers.Dense(4, name="embed")
            self.blocks = [Block(name=f"block_{i}") for i in range(2)]
            self.place = self.add_weight(shape=(3, 4), name="place")
            self.mlp = keras.Sequential([layers.Dense(5, activation="gelu", name="up")], name="mlp")

        def call(self, x: Any) -> Any:
            x = self.embed(x) * 1.0
            x = x * self.place
            for block in self.blocks:
                x = block(x)
            return self.mlp(x)

    model, x = Net(), np.ones((2, 3, 6), np.float32)
    model(x)
    found = [layer for layer in jaxlrp.trace(model, model, x) if layer.kind != "move"]
    weighted = ["linear", "normalization", "scale"]
    attention = ["query", "key", "value", "attention_output"]
    block = ["norm", *(f"attend/{name}" for name in attention)]
    expected = ["embed", "net/place", *(f"block_{i}/{name}" for i in range(2) for name in block), "mlp/up"]
    assert [layer.name for layer in found if layer.kind in weighted] == expected
    assert {layer.source.split(":")[0] for layer in found} == {"test_libraries.py"}
    others = [layer.name for layer in found if layer.kind not in (*weighted, "activation")]
    block = ["attend/matmul", "attend/softmax", "attend/matmul:2", "add"]
    assert others == [f"block_{i}/{name}" for i in range(2) for name in block]
    assert found[-1].name == "mlp/up/gelu"


def test_keras_models_inside_functional_models(keras: Any) -> None:
    dense, inner, outer = keras.layers.Dense, keras.Input((6,)), keras.Input((6,))
    one = dense(4, activation="relu", name="one")(inner)
    inside = keras.Model(inner, dense(3, name="two")(one), name="inside")
    shared = dense(3, name="shared")
    model = keras.Model(outer, shared(keras.ops.relu(shared(inside(outer)))))
    inner_names = ["inside/one", "inside/one/relu", "inside/two"]
    assert names(model, model, X) == [*inner_names, "shared", "relu", "shared:2"]


def test_keras_single_layers_are_models_too(keras: Any) -> None:
    layer = keras.layers.Dense(3, activation="relu", name="lone")
    layer.build((2, 6))
    assert names(layer, layer, X) == ["lone", "relu"]


def test_keras_several_inputs(keras: Any) -> None:
    one, two = keras.layers.Dense(3), keras.layers.Dense(3)
    left, right = keras.Input((6,)), keras.Input((6,))
    model = keras.Model([left, right], keras.layers.Add()([one(left), two(right)]))
    a, b = jaxlrp.lrp(model, jaxlrp.AttnLRP(epsilon=0.0))(model, [X, 2 * X])
    close(a, X * one.kernel.value.sum(1))
    close(b, 2 * X * two.kernel.value.sum(1))


def test_keras_model_without_a_training_argument(keras: Any) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.drop = keras.layers.Dense(3, name="dense"), keras.layers.Dropout(0.5)

        def call(self, x: Any) -> Any:
            return self.drop(self.dense(x))

    model = Net()
    model(X)
    assert names(model, model, X) == ["dense"]


def test_keras_model_that_trains_unless_told_otherwise(keras: Any) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.drop = keras.layers.Dense(3, name="dense"), keras.layers.Dropout(0.5)

        def call(self, x: Any, training: bool = True) -> Any:
            return self.drop(self.dense(x), training=training)

    model = Net()
    model(X)
    assert names(model, model, X) == ["dense"]


def test_keras_variables_of_one_name_are_kept_apart(keras: Any) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.one, self.two = keras.layers.Dense(6, name="same"), keras.layers.Dense(6, name="same")

        def call(self, x: Any) -> Any:
            return self.two(keras.ops.relu(self.one(x)))

    model = Net()
    expected = model(X)
    output, _ = jaxlrp.value_and_lrp(model)(model, X)
    np.testing.assert_allclose(output, expected, rtol=1e-5)
    assert names(model, model, X) == ["same", "relu", "same:2"]


@pytest.mark.parametrize("layer", ["dropout", "norm"])
@pytest.mark.parametrize("how", ["argument", "inside"])
def test_keras_training_mode_is_refused(keras: Any, layer: str, how: str) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.dense = keras.layers.Dense(3)
            dropout = layer == "dropout"
            self.layer = keras.layers.Dropout(0.5) if dropout else keras.layers.BatchNormalization(name="norm")

        def call(self, x: Any, training: bool = False) -> Any:
            return self.layer(self.dense(x), training=True if how == "inside" else training)

    model = Net()
    model(X)
    kwargs = {"training": True} if how == "argument" else {}
    what = "random numbers" if layer == "dropout" else "layer 'net/norm' normalises with the statistics of the batch"
    with pytest.raises(jaxlrp.NotDeterministicError, match=f"{what}.*training=False"):
        jaxlrp.lrp(model)(model, X, **kwargs)


def test_keras_training_flag_alone_is_no_error(keras: Any) -> None:
    model = mlp(keras)
    close(jaxlrp.lrp(model)(model, X, training=True), jaxlrp.lrp(model)(model, X))


@pytest.mark.parametrize("given", [X, {"kernel": X}, ([X], []), [X, X]], ids=["array", "dict", "too few", "list"])
def test_keras_wrong_variables_are_an_error(keras: Any, given: Any) -> None:
    with pytest.raises(TypeError, match=r"a Keras model itself first.*4 of model\.trainable_variables"):
        jaxlrp.lrp(mlp(keras))(given, X)


def test_keras_bad_numbers_are_named(keras: Any) -> None:
    model = mlp(keras)
    model.get_layer("two").bias.assign(np.full(3, np.nan))
    with pytest.raises(jaxlrp.InputError, match="two/bias': 3 of 3 numbers are NaN"):
        jaxlrp.lrp(model, check=True)(model, X)


def test_keras_class_instead_of_a_layer(keras: Any) -> None:
    with pytest.raises(TypeError, match=r"Dense is a class.*Dense\(\.\.\.\)"):
        jaxlrp.lrp(keras.layers.Dense)


def test_keras_model_that_was_never_built(keras: Any) -> None:
    model = keras.Sequential([keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="must be built"):
        jaxlrp.lrp(model)(model, X)


def test_keras_on_another_backend_is_an_error(keras: Any) -> None:
    code = (
        "import keras, jaxlrp\n"
        "try:\n"
        "    jaxlrp.lrp(keras.Sequential([keras.layers.Dense(3)]))\n"
        "except TypeError as error:\n"
        "    print(error)\n"
    )
    env = {**os.environ, "KERAS_BACKEND": "numpy"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "its numpy backend" in run.stdout
    assert "KERAS_BACKEND=jax" in run.stdout


# -- Equinox ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def eqx() -> Any:
    return pytest.importorskip("equinox")


def test_equinox_takes_the_module_or_its_arrays(eqx: Any, key: jax.Array) -> None:
    model = eqx.nn.MLP(6, 3, 4, 1, key=key)  # its activation is a leaf that is no array
    explain = jaxlrp.lrp(model)
    arrays = eqx.filter(model, eqx.is_array)
    expected = jnp.stack([explain(model, x) for x in X])
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(explain(arrays, X[0]), expected[0])
    close(jax.jit(explain)(arrays, X[0]), expected[0])
    close(eqx.filter_jit(explain)(model, X[0]), expected[0])
    close(jax.vmap(explain, in_axes=(None, 0))(model, X), expected)
    close(jaxlrp.lrp(lambda m, x: jax.vmap(m)(x), argnums=1)(model, X), expected)
    shapes = eqx.filter_eval_shape(lambda: model)
    assert names(model, shapes, jax.ShapeDtypeStruct((6,), X.dtype)) == names(model, model, X[0])


def test_equinox_names(eqx: Any, key: jax.Array) -> None:
    class Block(eqx.Module):
        norm: Any
        attend: Any
        mlp: Any
        drop: Any

        def __init__(self) -> None:
            self.norm, self.attend = eqx.nn.LayerNorm(6), eqx.nn.MultiheadAttention(2, 6, key=key)
            up, down = eqx.nn.Linear(6, 4, key=key), eqx.nn.Linear(4, 6, key=key)
            self.mlp = eqx.nn.Sequential([up, eqx.nn.Lambda(jax.nn.gelu), down])
            self.drop = eqx.nn.Dropout(0.5)

        def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
            y = jax.vmap(self.norm)(x)
            return x + jax.vmap(self.mlp)(self.drop(self.attend(y, y, y), key=key))

    class Net(eqx.Module):
        blocks: list[Block]
        head: Any

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(0))

    model = eqx.nn.inference_mode(Net([Block(), Block()], eqx.nn.Linear(6, 2, key=key)))
    layers = jaxlrp.trace(model, model, X)
    block = ["norm", *(f"attend/{n}_proj" for n in ("key", "value", "query", "output")), "mlp/layers/0", "mlp/layers/2"]
    weighted = [layer.name for layer in layers if layer.kind in ("linear", "normalization")]
    assert sorted(weighted) == sorted([*(f"blocks/{i}/{name}" for i in range(2) for name in block), "head"])
    others = [layer.name for layer in layers if layer.kind not in ("linear", "normalization", "move")]
    assert others[:5] == ["matmul", "softmax", "matmul:2", "gelu", "add"]


def test_equinox_numbers_that_are_no_arrays_stay_python_numbers(eqx: Any, key: jax.Array) -> None:
    class Net(eqx.Module):
        dense: Any
        slope: float
        steps: int

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.dense(x)
            for _ in range(self.steps):
                x = jnp.where(x > 0, x, self.slope * x) if self.slope < 1 else x
            return x

    model = Net(eqx.nn.Linear(6, 3, key=key), 0.5, 2)
    kinds = [(layer.kind, layer.name) for layer in jaxlrp.trace(model, model, X[0])]
    assert kinds[0] == ("linear", "dense")
    assert {kind for kind, _ in kinds[1:]} == {"activation"}
    assert names(Net(model.dense, 1.0, 2), Net(model.dense, 1.0, 2), X[0]) == ["dense"]


class TestEquinoxTraining:
    @staticmethod
    def dropout(eqx: Any, key: jax.Array) -> Any:
        class Net(eqx.Module):
            dense: Any
            drop: Any

            def __call__(self, x: jax.Array, key: Any = None, on: bool | None = None) -> jax.Array:
                return self.drop(self.dense(x), key=key, inference=None if on is None else not on)

        return Net(eqx.nn.Linear(6, 3, key=key), eqx.nn.Dropout(0.5))

    def test_dropout_is_refused(self, eqx: Any, key: jax.Array) -> None:
        model = self.dropout(eqx, key)
        with pytest.raises(jaxlrp.NotDeterministicError, match=r"layer 'drop'.*eqx\.nn\.inference_mode\(model\)"):
            jaxlrp.lrp(model)(model, X[0])

    def test_dropout_with_a_key_is_refused(self, eqx: Any, key: jax.Array) -> None:
        model = self.dropout(eqx, key)
        with pytest.raises(jaxlrp.NotDeterministicError, match=r"random numbers"):
            jaxlrp.lrp(model)(model, X[0], key=key)

    def test_dropout_that_is_off_is_fine(self, eqx: Any, key: jax.Array) -> None:
        model = self.dropout(eqx, key)
        inference = eqx.nn.inference_mode(model)
        expected = jaxlrp.lrp(model.dense)(model.dense, X[0])
        close(jaxlrp.lrp(model)(model, X[0], on=False), expected)  # by the call
        close(jaxlrp.lrp(model)(inference, X[0], key=key), expected)  # by the module that explain is given
        close(jaxlrp.lrp(inference)(eqx.filter(inference, eqx.is_array), X[0]), expected)  # by that of lrp

    def test_batch_statistics_are_refused(self, eqx: Any, key: jax.Array) -> None:
        class Net(eqx.Module):
            dense: Any
            norm: Any

            def __init__(self) -> None:
                self.dense = eqx.nn.Linear(6, 3, key=key)
                self.norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="batch")

            def __call__(self, x: jax.Array, state: Any) -> Any:
                return self.norm(self.dense(x), state)

        model, state = eqx.nn.make_with_state(Net)()
        explain = jax.vmap(
            jaxlrp.lrp(model, has_aux=True), in_axes=(None, 0, None), out_axes=(0, None), axis_name="batch"
        )
        with pytest.raises(jaxlrp.NotDeterministicError, match=r"layer 'norm'.*eqx\.nn\.inference_mode\(model\)"):
            explain(model, X, state)
        relevance, after = explain(eqx.nn.inference_mode(model), X, state)
        assert relevance.shape == X.shape
        assert jax.tree.structure(after) == jax.tree.structure(state)

    def test_errors_of_the_model_itself_stay_what_they_are(self, eqx: Any, key: jax.Array) -> None:
        class Net(eqx.Module):
            drop: Any

            def __call__(self, x: jax.Array) -> jax.Array:
                raise RuntimeError("out of order")

        model = Net(eqx.nn.Dropout(0.5))
        with pytest.raises(RuntimeError, match="out of order"):
            jaxlrp.lrp(model)(model, X[0])


def test_equinox_wrong_modules_are_an_error(eqx: Any, key: jax.Array) -> None:
    model = eqx.nn.MLP(6, 3, 4, 1, key=key)
    for args in ((X[0], model), (X[0],), ({"weight": X}, X[0])):
        with pytest.raises(TypeError, match=r"an Equinox module itself first.*it needs a MLP, not"):
            jaxlrp.lrp(model)(*args)
    with pytest.raises(TypeError, match=r"MLP is a class.*MLP\(\.\.\.\)"):
        jaxlrp.lrp(eqx.nn.MLP)


# -- Haiku -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hk() -> Any:
    return pytest.importorskip("haiku")


def test_haiku_with_and_without_random_numbers_and_state(hk: Any, key: jax.Array) -> None:
    def net(x: jax.Array) -> jax.Array:
        return hk.nets.MLP([4, 3], name="mlp")(x)

    model = hk.transform(net)
    params = model.init(key, X)
    expected = jaxlrp.lrp(hk.without_apply_rng(model))(params, X)
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(jaxlrp.lrp(model)(params, X), expected)
    close(jax.jit(jaxlrp.lrp(model))(params, X), expected)
    for stateful in (hk.with_empty_state(model), hk.without_apply_rng(hk.transform_with_state(net))):
        relevance, state = jaxlrp.lrp(stateful, has_aux=True)(params, {}, X)
        np.testing.assert_array_equal(relevance, expected)
        assert not state
    assert names(model, params, X) == ["linear_0", "relu", "linear_1"]


def test_haiku_argument_of_the_models_own_called_rng(hk: Any, key: jax.Array) -> None:
    model = hk.without_apply_rng(hk.transform(lambda x, rng: hk.Linear(3)(x) + rng))
    params = model.init(key, X, 1.0)
    assert jaxlrp.lrp(model)(params, X, 1.0).shape == X.shape


def test_haiku_names(hk: Any, key: jax.Array) -> None:
    class Block(hk.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            y = hk.LayerNorm(-1, True, True, name="norm")(x)
            y = hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling(), name="attend")(y, y, y)
            return x + hk.Linear(6, name="mlp")(jax.nn.gelu(y))

    def net(x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = Block(name="block")(x)
        return hk.Linear(2, name="head")(x)

    model = hk.transform(net)
    layers = [a for a in jaxlrp.trace(model, model.init(key, X), X) if a.kind != "move"]
    attention = ["query", "key", "value", "matmul", "softmax", "matmul:2", "linear"]
    block = ["norm", *(f"attend/{name}" for name in attention), "gelu", "mlp", "add"]
    found = [a.name for a in layers if a.op != "identity"]
    assert found == [*(f"{b}/{name}" for b in ("block", "block_1") for name in block), "head"]


class TestHaikuTraining:
    @staticmethod
    def net(hk: Any) -> Any:
        def net(x: jax.Array, is_training: bool, local: bool = False) -> jax.Array:
            x = hk.BatchNorm(True, True, 0.9, name="norm")(hk.Linear(4)(x), is_training, test_local_stats=local)
            return hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x

        return hk.transform_with_state(net)

    @pytest.mark.parametrize(("flags", "flag"), [((True,), "is_training"), ((False, True), "test_local_stats")])
    def test_batch_statistics_are_refused(self, hk: Any, key: jax.Array, flags: tuple[bool, ...], flag: str) -> None:
        model = self.net(hk)
        params, state = model.init(key, X, True)
        explain = jaxlrp.lrp(model, has_aux=True)
        with pytest.raises(jaxlrp.NotDeterministicError, match=f"layer 'norm'.*{flag}=False"):
            explain(params, state, X, *flags)
        with pytest.raises(jaxlrp.NotDeterministicError, match=f"layer 'norm'.*{flag}=False"):
            explain(params, state, X, **dict(zip(("is_training", "local"), flags, strict=False)))
        relevance, _ = explain(params, state, X, False)
        assert relevance.shape == X.shape

    def test_dropout_is_refused(self, hk: Any, key: jax.Array) -> None:
        model = hk.transform(lambda x: hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(3)(x)))
        with pytest.raises(jaxlrp.NotDeterministicError, match=r"asks for random numbers.*dropout off"):
            jaxlrp.lrp(model)(model.init(key, X), X)

    def test_errors_of_the_model_itself_stay_what_they_are(self, hk: Any) -> None:
        def net(x: jax.Array) -> jax.Array:
            raise ValueError("out of order")

        with pytest.raises(ValueError, match="out of order") as caught:
            jaxlrp.lrp(hk.transform(net))({}, X)
        assert not isinstance(caught.value, jaxlrp.NotDeterministicError)


def test_haiku_wrong_arguments_are_an_error(hk: Any, key: jax.Array) -> None:
    model = hk.transform(lambda x: hk.Linear(3)(x))
    params = model.init(key, X)
    with pytest.raises(jaxlrp.InputError, match=r"explain\(params, x\)"):
        jaxlrp.lrp(model)(X)
    with pytest.raises(TypeError, match="params argument does not appear valid"):
        jaxlrp.lrp(model)(X, params)
    with pytest.raises(TypeError, match=r"Linear is a class.*hk\.transform\(lambda x: Linear\(\.\.\.\)\(x\)\)"):
        jaxlrp.lrp(hk.Linear)
    with pytest.raises(TypeError, match=r"a Haiku transform\), not MultiTransformed"):
        jaxlrp.lrp(hk.multi_transform(lambda: (lambda x: x, {"f": lambda x: x})))


# -- none of them ----------------------------------------------------------------------------------------------------


def test_none_of_the_libraries_is_imported() -> None:
    code = "import sys, jaxlrp; print([n for n in ('keras', 'equinox', 'haiku') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# -- the page in the documentation -----------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "frameworks.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_page_shows_what_happens(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block of code is run behind those before it; a block of text is what the code before it prints."""
    pytest.importorskip(library)
    (section,) = re.findall(rf"^## {library}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.I | re.M | re.S)
    names: dict[str, Any] = {}
    for language, text in BLOCK.findall(section):
        if language == "python":
            exec(compile(text, PAGE.name, "exec"), names)
        else:
            assert capsys.readouterr().out == text
    assert "relevance" in names
    assert capsys.readouterr().out == ""
