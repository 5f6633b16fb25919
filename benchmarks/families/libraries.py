"""Networks as other libraries ship them: Keras' applications, Equinox, Haiku, Flax.

Their oracles are made by the library's own means: Keras' models are cloned with other activations, normalisations and
gates, Equinox' modules are swapped in the tree, Haiku's and Flax' networks are built from other parts. Networks of
relus, BatchNorm, sums and pools need no other parts: for them the oracle is gradient times input itself.

Attention of these libraries cannot be looked into, but it does not need to be: with a query, key and value projection
whose gradients are divided by 4, 4 and 2, the halves of both matrix products are in.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._ops import Array, Case, Family, Ops, of_one, over_batch


def random_input(name: str, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape))


def layer_norm(ops: Ops, x: Array, scale: Array, offset: Array, epsilon: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return centred / ops.hold(deviation) * scale + offset


def random_parameters(shapes: Any, seed: int = 0) -> Any:
    """Parameters as after some training: scales near 1, shifts near 0, variances positive.

    The libraries' own initialisers would be compiled anew for every shape, which takes longer than all that follows.
    """
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> Array:
        name, shape = jax.tree_util.keystr(path).lower(), leaf.shape
        if not jnp.issubdtype(leaf.dtype, np.floating):
            return jnp.zeros(shape, leaf.dtype)
        if "var" in name:  # of BatchNorm
            return jnp.asarray(rng.uniform(0.5, 1.5, shape))
        if any(word in name for word in ("gamma", "scale")):
            return jnp.asarray(1.0 + 0.1 * rng.normal(size=shape))
        if any(word in name for word in ("beta", "offset", "bias", "mean", "'b'")):
            return jnp.asarray(0.1 * rng.normal(size=shape))
        fan_in = np.prod(shape[:2] if "depthwise" in name else shape[:-1])
        return jnp.asarray(rng.normal(size=shape) * np.sqrt(2.0 / fan_in))

    return jax.tree_util.tree_map_with_path(one, shapes)


# -- Keras -------------------------------------------------------------------------------------------------------------


def keras_application(name: str, size: int) -> Family:
    """One of `keras.applications` with random weights, at the smallest input it takes."""

    def build(ops: Ops) -> Case:
        os.environ.setdefault("KERAS_BACKEND", "jax")
        import keras

        def construct() -> None:
            make = getattr(keras.applications, name)
            nets.append(make(weights=None, input_shape=shape, classes=10, classifier_activation=None))
            nets.append(_detached_clone(nets[0], ops))

        nets: list[Any] = []
        shape, precision = (size, size, 3), keras.config.floatx()
        keras.config.set_floatx("float64")
        try:
            jax.eval_shape(construct)  # initial weights stay abstract: all come from outside
        finally:
            keras.config.set_floatx(precision)
        for layer in (layer for net in nets for layer in net.layers):
            if isinstance(layer, keras.layers.Normalization):  # holds numbers of its own
                layer.mean, layer.variance = np.full((1, 1, 1, 3), 0.4), np.full((1, 1, 1, 3), 0.05)
        net, twin = nets
        params = [_keras_weights(v) for v in (net.trainable_variables, net.non_trainable_variables)]

        def of(model: Any) -> Callable[[Array, Any], Array]:
            return lambda x, params: model.stateless_call(*params, x, training=False)[0]

        x = random_input(name, 2, *shape)
        return Case(of(net), of_one(of(net)), of(twin), x, params)

    return Family(
        f"Keras {name}",
        build,
        library="keras",
        rounding=1e-5,
        tolerance=1e-4,
        note="Keras computes means in float32, whatever the network's precision",
    )


def _keras_weights(variables: Any) -> list[Array]:
    arrays = random_parameters({v.path: jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables})
    return [arrays[v.path] for v in variables]


def _detached_clone(net: Any, ops: Ops) -> Any:
    """The same network, in the same order of weights, with the derivatives of the oracle."""
    import keras

    class LayerNormalization(keras.layers.LayerNormalization):
        def call(self, inputs: Array) -> Array:
            return layer_norm(ops, inputs, self.gamma.value, self.beta.value, self.epsilon)

    class Gate(keras.layers.Layer):
        """Squeeze-and-excitation: the second factor is made by a sigmoid."""

        def call(self, inputs: list[Array]) -> Array:
            return ops.gated(*inputs)

        def compute_output_shape(self, shapes: Any) -> Any:
            return shapes[0]

    relu_like = (keras.activations.relu, keras.activations.linear)  # gradient times input already

    def clone(layer: Any) -> Any:
        if not isinstance(layer, keras.layers.Layer):
            return layer  # an operation such as `x + 3.0`
        if isinstance(layer, keras.layers.LayerNormalization):
            return LayerNormalization.from_config(layer.get_config())
        if isinstance(layer, keras.layers.Multiply):
            return Gate(name=layer.name)
        if isinstance(layer, keras.layers.ReLU) and layer.max_value is not None:
            return keras.layers.Activation(lambda x: ops.act(jax.nn.relu6, x), name=layer.name)
        if isinstance(layer, keras.layers.Rescaling) and np.any(layer.offset):
            rescale = lambda x: x * layer.scale + layer.offset  # noqa: E731
            return keras.layers.Activation(lambda x: ops.act(rescale, x), name=layer.name)
        config = layer.get_config()
        function = getattr(layer, "activation", None)
        if function is not None and function not in relu_like:
            config["activation"] = lambda x: ops.act(function, x)
        return type(layer).from_config(config)

    return keras.models.clone_model(net, clone_function=clone, recursive=True)


KERAS = [
    keras_application(name, size)
    for name, size in [
        ("VGG16", 32),
        ("ResNet50", 32),
        ("ResNet50V2", 32),
        ("DenseNet121", 32),
        ("InceptionV3", 75),
        ("Xception", 71),
        ("MobileNet", 32),
        ("MobileNetV2", 32),
        ("MobileNetV3Small", 32),
        ("EfficientNetB0", 32),
        ("EfficientNetV2B0", 32),
        ("NASNetMobile", 32),
        ("ConvNeXtTiny", 32),
    ]
]

# -- Equinox -----------------------------------------------------------------------------------------------------------


def equinox_family(name: str, make: Callable[[], Any], swap: Callable[[Any, Ops], Any], *shape: int) -> Family:
    """A module of Equinox, written for one sample; ``swap`` puts detached modules in their places."""

    def build(ops: Ops) -> Case:
        import equinox as eqx

        arrays, static = eqx.partition(make(), eqx.is_inexact_array)

        def single(x: Array, arrays: Any) -> Array:
            return eqx.combine(arrays, static)(x)

        def detached(x: Array, arrays: Any) -> Array:
            return swap(eqx.combine(arrays, static), ops)(x)

        x = random_input(name, 2, *shape)
        return Case(over_batch(single), single, over_batch(detached), x, arrays)

    return Family(f"Equinox {name}", build, library="equinox")


def _equinox_mlp() -> Any:
    import equinox as eqx

    return eqx.nn.MLP(6, 3, 8, 2, activation=jax.nn.gelu, key=jax.random.key(0))


def _swap_mlp(net: Any, ops: Ops) -> Any:
    import equinox as eqx

    function = net.activation
    return eqx.tree_at(lambda m: m.activation, net, lambda x: ops.act(function, x))


def _equinox_cnn() -> Any:
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
            eqx.nn.GroupNorm(2, 8),
            eqx.nn.Lambda(jax.nn.silu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(8, 8, 3, stride=2, groups=2, key=keys[1]),
            eqx.nn.Lambda(jax.nn.silu),
            eqx.nn.AdaptiveAvgPool2d(1),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(8, 5, key=keys[2]),
        ]
    )


def _swap_cnn(net: Any, ops: Ops) -> Any:
    import equinox as eqx

    norm, act = net[1], eqx.nn.Lambda(lambda x, **_: ops.act(jax.nn.silu, x))

    def group_norm(x: Array) -> Array:
        groups = x.reshape(norm.groups, -1)
        centred = groups - groups.mean(axis=1, keepdims=True)
        deviation = jnp.sqrt(jnp.square(centred).mean(axis=1, keepdims=True) + norm.eps)
        y = (centred / ops.hold(deviation)).reshape(x.shape)
        return y * norm.weight[:, None, None] + norm.bias[:, None, None]

    where = lambda m: (m[1], m[2], m[5])  # noqa: E731
    return eqx.tree_at(where, net, (eqx.nn.Lambda(group_norm), act, act))


def _equinox_transformer() -> Any:
    import equinox as eqx

    class Block(eqx.Module):
        norm0: eqx.nn.LayerNorm
        norm1: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __init__(self, key: Array):
            keys = jax.random.split(key)
            self.norm0, self.norm1 = eqx.nn.LayerNorm(8), eqx.nn.LayerNorm(8)
            self.attention = eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, use_output_bias=True, key=keys[0])
            self.mlp = eqx.nn.MLP(8, 8, 16, 1, activation=jax.nn.gelu, key=keys[1])

        def __call__(self, x: Array) -> Array:
            y = jax.vmap(self.norm0)(x)
            x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
            return x + jax.vmap(self.mlp)(jax.vmap(self.norm1)(x))

    return eqx.nn.Sequential([eqx.nn.Lambda(Block(key)) for key in jax.random.split(jax.random.key(0))])


def _swap_transformer(net: Any, ops: Ops) -> Any:
    import equinox as eqx

    def norm(m: Any) -> Any:
        return lambda x: layer_norm(ops, x, m.weight, m.bias, m.eps)

    def scaled(m: Any, factors: int) -> Any:  # ops.share is linear: in n factors it divides the gradient by n
        return lambda x: ops.share(m(x), factors)

    def block(b: Any) -> Any:
        attention = eqx.tree_at(
            lambda m: (m.query_proj, m.key_proj, m.value_proj),
            b.attention,
            (scaled(b.attention.query_proj, 4), scaled(b.attention.key_proj, 4), scaled(b.attention.value_proj, 2)),
        )
        where = lambda m: (m.norm0, m.norm1, m.attention, m.mlp)  # noqa: E731
        return eqx.tree_at(where, b, (norm(b.norm0), norm(b.norm1), attention, _swap_mlp(b.mlp, ops)))

    return eqx.nn.Sequential([eqx.nn.Lambda(block(lay.fn)) for lay in net.layers])


def _equinox_lstm() -> Any:
    import equinox as eqx

    class Reader(eqx.Module):
        cell: eqx.nn.LSTMCell
        head: eqx.nn.Linear

        def __init__(self, key: Array):
            keys = jax.random.split(key)
            self.cell, self.head = eqx.nn.LSTMCell(4, 8, key=keys[0]), eqx.nn.Linear(8, 3, key=keys[1])

        def __call__(self, x: Array) -> Array:
            start = jnp.zeros(8), jnp.zeros(8)
            (hidden, _), _ = jax.lax.scan(lambda state, x: (self.cell(x, state), None), start, x)
            return self.head(hidden)

    return Reader(jax.random.key(0))


def _swap_lstm(net: Any, ops: Ops) -> Any:
    import equinox as eqx

    cell = net.cell

    def detached(x: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return lstm_step(ops, jnp.split(cell.weight_ih @ x + cell.weight_hh @ state[0] + cell.bias, 4), state[1])

    return eqx.tree_at(lambda m: m.cell, net, detached)


def lstm_step(ops: Ops, parts: Any, memory: Array) -> tuple[Array, Array]:
    """Hidden state and memory, given what input, forget, candidate and output are made of."""
    i, f, g, o = parts
    i, f, o = (ops.act(jax.nn.sigmoid, gate) for gate in (i, f, o))
    memory = ops.gated(memory, f) + ops.gated(ops.act(jnp.tanh, g), i)
    return ops.gated(ops.act(jnp.tanh, memory), o), memory


EQUINOX = [
    equinox_family("MLP", _equinox_mlp, _swap_mlp, 6),
    equinox_family("CNN with GroupNorm", _equinox_cnn, _swap_cnn, 3, 12, 12),
    equinox_family("transformer", _equinox_transformer, _swap_transformer, 5, 8),
    equinox_family("LSTM", _equinox_lstm, _swap_lstm, 5, 4),
]


# -- Haiku -------------------------------------------------------------------------------------------------------------


def haiku_family(name: str, net: Callable[[Ops | None], Callable[[Array], Array]], *shape: int) -> Family:
    """A network of Haiku: ``net(None)`` is the library's own, ``net(ops)`` the same with the oracle's derivatives."""

    def build(ops: Ops) -> Case:
        import haiku as hk

        x = random_input(name, 2, *shape)
        plain, detached = (hk.transform_with_state(lambda x, o=o: net(o)(x)) for o in (None, ops))
        params = random_parameters(jax.eval_shape(plain.init, jax.random.key(0), x))

        def of(transformed: Any) -> Callable[[Array, Any], Array]:
            return lambda x, params: transformed.apply(*params, None, x)[0]

        return Case(of(plain), of_one(of(plain)), of(detached), x, params)

    return Family(f"Haiku {name}", build, library="haiku")


def _haiku_resnet(ops: Ops | None) -> Callable[[Array], Array]:
    import haiku as hk

    net = hk.nets.ResNet18(5, resnet_v2=False)
    return lambda x: net(x, is_training=hk.running_init())


def _haiku_mobilenet(ops: Ops | None) -> Callable[[Array], Array]:
    import haiku as hk

    net = hk.nets.MobileNetV1(strides=(1, 2, 1), channels=(8, 16, 16), num_classes=5)
    return lambda x: net(x, is_training=hk.running_init())


def _haiku_transformer(ops: Ops | None) -> Callable[[Array], Array]:
    import haiku as hk

    class Attention(hk.MultiHeadAttention):
        """The oracle's: gradients of projections are divided."""

        @hk.transparent
        def _linear_projection(self, x: Array, head_size: int, name: str | None = None) -> Array:
            assert ops is not None
            factors = {"query": 4, "key": 4, "value": 2}[str(name)]
            return ops.share(super()._linear_projection(x, head_size, name), factors)

    class Norm(hk.Module):
        """The oracle's, with the parameters of `haiku.LayerNorm`."""

        def __call__(self, x: Array) -> Array:
            assert ops is not None
            scale = hk.get_parameter("scale", x.shape[-1:], init=jnp.ones)
            offset = hk.get_parameter("offset", x.shape[-1:], init=jnp.zeros)
            return layer_norm(ops, x, scale, offset, 1e-5)

    def attention() -> Any:
        kind = hk.MultiHeadAttention if ops is None else Attention
        return kind(2, 4, w_init=hk.initializers.VarianceScaling(1.0), name="attention")

    def norm() -> Any:
        return hk.LayerNorm(-1, True, True, name="norm") if ops is None else Norm(name="norm")

    def activation(x: Array) -> Array:
        return jax.nn.gelu(x) if ops is None else ops.act(jax.nn.gelu, x)

    def net(x: Array) -> Array:
        for _ in range(2):
            y = norm()(x)
            x = x + attention()(y, y, y)
            x = x + hk.nets.MLP([16, 8], activation=activation, name="mlp")(norm()(x))
        return hk.Linear(3)(x.mean(axis=-2))

    return net


def _haiku_lstm(ops: Ops | None) -> Callable[[Array], Array]:
    import haiku as hk

    class Cell(hk.LSTM):
        """The oracle's: gates get nothing."""

        def __call__(self, inputs: Array, prev_state: Any) -> Any:
            assert ops is not None
            both = jnp.concatenate([inputs, prev_state.hidden], axis=-1)
            i, g, f, o = jnp.split(hk.Linear(4 * self.hidden_size)(both), 4, axis=-1)
            hidden, cell = lstm_step(ops, (i, f + 1, g, o), prev_state.cell)
            return hidden, hk.LSTMState(hidden, cell)

    def net(x: Array) -> Array:
        core = (hk.LSTM if ops is None else Cell)(8, name="lstm")
        states, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return hk.Linear(3)(states[:, -1])

    return net


HAIKU = [
    haiku_family("ResNet18", _haiku_resnet, 32, 32, 3),
    haiku_family("MobileNetV1", _haiku_mobilenet, 16, 16, 3),
    haiku_family("transformer", _haiku_transformer, 5, 8),
    haiku_family("LSTM", _haiku_lstm, 5, 4),
]


# -- Flax --------------------------------------------------------------------------------------------------------------


def linen_family(name: str, net: Callable[[Ops | None], Any], *shape: int) -> Family:
    """A network of Flax Linen: ``net(None)`` is the library's own, ``net(ops)`` has the oracle's derivatives."""

    def build(ops: Ops) -> Case:
        x = random_input(name, 2, *shape)
        plain, detached = net(None), net(ops)
        params = random_parameters(jax.eval_shape(plain.init, jax.random.key(0), x))

        def of(module: Any) -> Callable[[Array, Any], Array]:
            return lambda x, params: module.apply(params, x)

        return Case(of(plain), of_one(of(plain)), of(detached), x, params)

    return Family(f"Linen {name}", build, library="flax")


def _linen_recurrent(cell: str) -> Callable[[Ops | None], Any]:
    def net(ops: Ops | None) -> Any:
        import flax.linen as nn

        functions: dict[str, Any] = {"param_dtype": jnp.result_type(float)}
        if ops is not None:
            functions["gate_fn"] = lambda x: ops.hold(nn.sigmoid(x))
            functions["activation_fn"] = lambda x: ops.act(jnp.tanh, x)
        return nn.Sequential([nn.RNN(getattr(nn, cell)(8, **functions)), nn.Dense(3)])

    return net


def _linen_transformer(ops: Ops | None) -> Any:
    import flax.linen as nn

    class Norm(nn.Module):
        """The oracle's, with the parameters of `flax.linen.LayerNorm`."""

        @nn.compact
        def __call__(self, x: Array) -> Array:
            assert ops is not None
            scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
            offset = self.param("bias", nn.initializers.zeros, x.shape[-1:])
            return layer_norm(ops, x, scale, offset, 1e-6)

    def attend(query: Array, key: Array, value: Array, mask: Array | None = None, **_: Any) -> Array:
        """The oracle's attention; axes are samples, tokens, heads, features."""
        assert ops is not None
        scores = ops.share(jnp.einsum("nqhd,nkhd->nhqk", query, key)) / np.sqrt(query.shape[-1])
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        return ops.share(jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), value))

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            norm = nn.LayerNorm if ops is None else Norm
            attention = {} if ops is None else {"attention_fn": attend}
            gelu = nn.gelu if ops is None else lambda x: ops.act(nn.gelu, x)
            mask = nn.make_causal_mask(x[..., 0])
            for i in range(2):
                y = norm(name=f"norm0_{i}")(x)
                x = x + nn.MultiHeadDotProductAttention(2, name=f"attention_{i}", **attention)(y, mask=mask)
                y = gelu(nn.Dense(16, name=f"up_{i}")(norm(name=f"norm1_{i}")(x)))
                x = x + nn.Dense(8, name=f"down_{i}")(y)
            return nn.Dense(3, name="head")(x.mean(axis=1))

    return Encoder()


FLAX = [
    linen_family("LSTM", _linen_recurrent("OptimizedLSTMCell"), 5, 4),
    linen_family("GRU", _linen_recurrent("GRUCell"), 5, 4),
    linen_family("transformer", _linen_transformer, 5, 8),
]

FAMILIES = [*KERAS, *EQUINOX, *HAIKU, *FLAX]
