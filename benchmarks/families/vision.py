"""Convolutional networks and MLP-Mixer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ._layers import attention, avg_pool, batch_norm, conv, dense, layer_norm, max_pool, mlp
from ._ops import Array, Ops, Weights, family

relu, relu6, swish = jax.nn.relu, jax.nn.relu6, jax.nn.swish
IMAGE = (2, 16, 16, 3)


def conv_bn(weights: Weights, name: str, x: Array, features: int, size: int = 3, stride: int = 1, **more) -> Array:
    x = conv(weights, name, x, features, size, stride, bias=False, **more)
    return batch_norm(weights, f"{name}/bn", x)


@family("VGG", IMAGE)
def vgg(ops: Ops, weights: Weights, x: Array) -> Array:
    for stage, features in enumerate((8, 16)):
        for i in range(2):
            x = ops.act(relu, conv(weights, f"conv{stage}_{i}", x, features))
        x = max_pool(x)
    x = x.reshape(x.shape[0], -1)
    for i in range(2):
        x = ops.act(relu, dense(weights, f"fc{i}", x, 16))
    return dense(weights, "head", x, 5)


@family("VGG with BatchNorm after ReLU", IMAGE)
def vgg_bn(ops: Ops, weights: Weights, x: Array) -> Array:
    for i, features in enumerate((8, 16)):
        x = ops.act(relu, conv(weights, f"conv{i}", x, features))
        x = avg_pool(batch_norm(weights, f"bn{i}", x))
    return dense(weights, "head", x.reshape(x.shape[0], -1), 5)


@family("ResNet v1", IMAGE)
def resnet_v1(ops: Ops, weights: Weights, x: Array) -> Array:
    x = max_pool(ops.act(relu, conv_bn(weights, "stem", x, 8)), 3, 2, "SAME")
    for i, (features, stride) in enumerate([(8, 1), (12, 2), (12, 1)]):
        w = weights / f"block{i}"
        y = ops.act(relu, conv_bn(w, "conv0", x, features // 2, 1))
        y = ops.act(relu, conv_bn(w, "conv1", y, features // 2, 3, stride))
        y = conv_bn(w, "conv2", y, features, 1)
        if x.shape != y.shape:
            x = conv_bn(w, "shortcut", x, features, 1, stride)
        x = ops.act(relu, x + y)
    return dense(weights, "head", x.mean((1, 2)), 5)


@family("ResNet v2", IMAGE)
def resnet_v2(ops: Ops, weights: Weights, x: Array) -> Array:
    x = conv(weights, "stem", x, 8)
    for i, (features, stride) in enumerate([(8, 1), (12, 2)]):
        w = weights / f"block{i}"
        y = ops.act(relu, batch_norm(w, "bn0", x))
        if x.shape[-1] != features:
            x = conv(w, "shortcut", y, features, 1, stride)
        y = conv(w, "conv0", y, features, 3, stride, bias=False)
        y = ops.act(relu, batch_norm(w, "bn1", y))
        x = x + conv(w, "conv1", y, features)
    x = ops.act(relu, batch_norm(weights, "bn", x))
    return dense(weights, "head", x.mean((1, 2)), 5)


@family("DenseNet", IMAGE)
def densenet(ops: Ops, weights: Weights, x: Array) -> Array:
    x = max_pool(ops.act(relu, conv_bn(weights, "stem", x, 8)))
    for block in range(2):
        for i in range(2):
            w = weights / f"block{block}_{i}"
            y = ops.act(relu, batch_norm(w, "bn0", x))
            y = conv(w, "conv0", y, 8, 1, bias=False)
            y = ops.act(relu, batch_norm(w, "bn1", y))
            x = jnp.concatenate([x, conv(w, "conv1", y, 4, bias=False)], axis=-1)
        if block == 0:
            x = ops.act(relu, batch_norm(weights, "transition/bn", x))
            x = avg_pool(conv(weights, "transition/conv", x, 8, 1))
    x = ops.act(relu, batch_norm(weights, "bn", x))
    return dense(weights, "head", x.mean((1, 2)), 5)


@family("Inception", IMAGE)
def inception(ops: Ops, weights: Weights, x: Array) -> Array:
    def unit(name: str, x: Array, features: int, size: int | tuple[int, int], stride: int = 1) -> Array:
        x = conv(weights, name, x, features, size, stride, bias=False)
        return ops.act(relu, batch_norm(weights, f"{name}/bn", x))

    x = unit("stem", x, 8, 3, 2)
    for i in range(2):
        one = unit(f"{i}/one", x, 4, 1)
        three = unit(f"{i}/three1", unit(f"{i}/three0", x, 4, 1), 4, 3)
        five = unit(f"{i}/five2", unit(f"{i}/five1", unit(f"{i}/five0", x, 4, 1), 4, (1, 5)), 4, (5, 1))
        pool = unit(f"{i}/pool", avg_pool(x, 3, 1, "SAME"), 4, 1)
        x = jnp.concatenate([one, three, five, pool], axis=-1)
    down = [unit("down/conv", x, 8, 3, 2), max_pool(x, 3, 2, "SAME")]
    return dense(weights, "head", jnp.concatenate(down, axis=-1).mean((1, 2)), 5)


@family("MobileNet v1", IMAGE)
def mobilenet_v1(ops: Ops, weights: Weights, x: Array) -> Array:
    x = ops.act(relu6, conv_bn(weights, "stem", x, 8, 3, 2))
    for i, (features, stride) in enumerate([(8, 1), (16, 2)]):
        x = ops.act(relu6, conv_bn(weights, f"depth{i}", x, x.shape[-1], 3, stride, groups=x.shape[-1]))
        x = ops.act(relu6, conv_bn(weights, f"point{i}", x, features, 1))
    return dense(weights, "head", x.mean((1, 2)), 5)


@family("MobileNet v2", IMAGE)
def mobilenet_v2(ops: Ops, weights: Weights, x: Array) -> Array:
    x = ops.act(relu6, conv_bn(weights, "stem", x, 8, 3, 2))
    for i, (features, stride) in enumerate([(8, 1), (12, 2), (12, 1)]):
        w, width = weights / f"block{i}", 2 * x.shape[-1]
        y = ops.act(relu6, conv_bn(w, "expand", x, width, 1))
        y = ops.act(relu6, conv_bn(w, "depth", y, width, 3, stride, groups=width))
        y = conv_bn(w, "project", y, features, 1)
        x = x + y if x.shape == y.shape else y
    x = ops.act(relu6, conv_bn(weights, "top", x, 16, 1))
    return dense(weights, "head", x.mean((1, 2)), 5)


def squeeze_excite(ops: Ops, weights: Weights, x: Array, act, sigmoid) -> Array:
    s = jnp.mean(x, axis=(1, 2), keepdims=True)
    s = ops.act(act, conv(weights, "reduce", s, 4, 1))
    return ops.gated(x, ops.act(sigmoid, conv(weights, "excite", s, x.shape[-1], 1)))


@family("MobileNet v3", IMAGE)
def mobilenet_v3(ops: Ops, weights: Weights, x: Array) -> Array:
    hard_swish = jax.nn.hard_swish
    x = ops.act(hard_swish, conv_bn(weights, "stem", x, 8, 3, 2))
    for i, (features, act, stride) in enumerate([(8, relu, 1), (12, hard_swish, 2), (12, hard_swish, 1)]):
        w, width = weights / f"block{i}", 2 * x.shape[-1]
        y = ops.act(act, conv_bn(w, "expand", x, width, 1))
        y = ops.act(act, conv_bn(w, "depth", y, width, 5, stride, groups=width))
        y = squeeze_excite(ops, w / "se", y, relu, jax.nn.hard_sigmoid)
        y = conv_bn(w, "project", y, features, 1)
        x = x + y if x.shape == y.shape else y
    x = ops.act(hard_swish, conv_bn(weights, "top", x, 16, 1)).mean((1, 2))
    x = ops.act(hard_swish, dense(weights, "pre_head", x, 16))
    return dense(weights, "head", x, 5)


@family("EfficientNet", IMAGE)
def efficientnet(ops: Ops, weights: Weights, x: Array) -> Array:
    x = ops.act(lambda v: 2.0 * v - 1.0, x)  # the network brings its own preprocessing
    x = ops.act(swish, conv_bn(weights, "stem", x, 8, 3, 2))
    for i, (features, size, stride) in enumerate([(8, 3, 1), (12, 5, 2), (12, 3, 1)]):
        w, width = weights / f"block{i}", 2 * x.shape[-1]
        y = ops.act(swish, conv_bn(w, "expand", x, width, 1))
        y = ops.act(swish, conv_bn(w, "depth", y, width, size, stride, groups=width))
        y = squeeze_excite(ops, w / "se", y, swish, jax.nn.sigmoid)
        y = conv_bn(w, "project", y, features, 1)
        x = x + y if x.shape == y.shape else y
    x = ops.act(swish, conv_bn(weights, "top", x, 16, 1))
    return dense(weights, "head", x.mean((1, 2)), 5)


@family("ConvNeXt", IMAGE)
def convnext(ops: Ops, weights: Weights, x: Array) -> Array:
    x = layer_norm(ops, weights, "stem/norm", conv(weights, "stem", x, 8, 2, 2))
    for i, features in enumerate((8, 8, 12)):
        w = weights / f"block{i}"
        if features != x.shape[-1]:
            x = conv(w, "down", layer_norm(ops, w, "down/norm", x), features, 2, 2)
        y = conv(w, "depth", x, features, 7, groups=features)
        y = mlp(ops, w, "mlp", layer_norm(ops, w, "norm", y), 2 * features)
        x = x + weights(f"block{i}/layer_scale", features) * y
    x = layer_norm(ops, weights, "norm", x.mean((1, 2)))
    return dense(weights, "head", x, 5)


@family("U-Net", IMAGE)
def unet(ops: Ops, weights: Weights, x: Array) -> Array:
    skips = []
    for i, features in enumerate((4, 8)):
        x = ops.act(relu, conv_bn(weights, f"down{i}", x, features))
        skips.append(x)
        x = max_pool(x)
    x = ops.act(relu, conv_bn(weights, "bottom", x, 12))
    kernel = weights("up/kernel", 2, 2, x.shape[-1], 8)
    x = lax.conv_transpose(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = ops.act(relu, conv_bn(weights, "up0", jnp.concatenate([x, skips.pop()], -1), 8))
    n, height, width, channels = x.shape
    x = jax.image.resize(x, (n, 2 * height, 2 * width, channels), "bilinear")
    x = ops.act(relu, conv_bn(weights, "up1", jnp.concatenate([x, skips.pop()], -1), 4))
    return conv(weights, "head", x, 2, 1)


@family("Attention U-Net of a diffusion model", (2, 8, 8, 3))
def diffusion_unet(ops: Ops, weights: Weights, x: Array) -> Array:
    def group_norm(name: str, x: Array, groups: int = 2) -> Array:
        grouped = x.reshape(*x.shape[:-1], groups, -1)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        var = grouped.var((1, 2, 4), keepdims=True)
        grouped = (grouped - mean) / ops.hold(jnp.sqrt(var + 1e-5))
        scale, offset = (weights(f"{name}/{leaf}", x.shape[-1]) for leaf in ("scale", "offset"))
        return grouped.reshape(x.shape) * scale + offset

    def residual(name: str, x: Array, features: int) -> Array:
        h = conv(weights, f"{name}/conv0", ops.act(swish, group_norm(f"{name}/norm0", x)), features)
        h = h + weights(f"{name}/time/bias", features)  # the embedding of a fixed time
        h = conv(weights, f"{name}/conv1", ops.act(swish, group_norm(f"{name}/norm1", h)), features)
        return h + (x if x.shape == h.shape else conv(weights, f"{name}/shortcut", x, features, 1))

    x = conv(weights, "stem", x, 8)
    skip = x = residual("down", x, 8)
    x = conv(weights, "downsample", x, 8, 3, 2)
    tokens = group_norm("attention/norm", x).reshape(x.shape[0], -1, 8)
    x = x + attention(ops, weights, "attention", tokens).reshape(x.shape)
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    x = residual("up", jnp.concatenate([x, skip], axis=-1), 8)
    return conv(weights, "head", ops.act(swish, group_norm("norm", x)), 3)


@family("Autoencoder", IMAGE)
def autoencoder(ops: Ops, weights: Weights, x: Array) -> Array:
    for i, features in enumerate((4, 8)):
        x = ops.act(jax.nn.leaky_relu, conv(weights, f"encoder{i}", x, features, 3, 2))
    code = dense(weights, "code", x.reshape(x.shape[0], -1), 6)
    x = ops.act(jax.nn.elu, dense(weights, "decode", code, x[0].size)).reshape(x.shape)
    for i, features in enumerate((4, 3)):
        kernel = weights(f"decoder{i}/kernel", 3, 3, x.shape[-1], features)
        x = lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = ops.act(jax.nn.sigmoid if i else relu, x + weights(f"decoder{i}/bias", features))
    return x


@family("3-D CNN", (2, 8, 8, 8, 2))
def cnn3d(ops: Ops, weights: Weights, x: Array) -> Array:
    x = max_pool(ops.act(relu, conv_bn(weights, "conv0", x, 4)))
    x = avg_pool(ops.act(relu, conv_bn(weights, "conv1", x, 8)))
    return dense(weights, "head", x.mean((1, 2, 3)), 5)


@family("WaveNet", (2, 24, 2))
def wavenet(ops: Ops, weights: Weights, x: Array) -> Array:
    def causal(name: str, x: Array, dilation: int) -> Array:
        return conv(weights, name, x, 8, 2, dilation=dilation, padding=[(dilation, 0)])

    x = conv(weights, "stem", x, 8, 1)
    skips = []
    for i, dilation in enumerate((1, 2, 4)):
        signal = ops.act(jnp.tanh, causal(f"signal{i}", x, dilation))
        y = ops.gated(signal, ops.act(jax.nn.sigmoid, causal(f"gate{i}", x, dilation)))
        skips.append(conv(weights, f"skip{i}", y, 8, 1))
        x = x + conv(weights, f"residual{i}", y, 8, 1)
    x = ops.act(relu, sum(skips[1:], skips[0]))
    x = ops.act(relu, conv(weights, "top", x, 8, 1))
    return conv(weights, "head", x, 4, 1)


@family("MLP-Mixer", IMAGE)
def mixer(ops: Ops, weights: Weights, x: Array) -> Array:
    x = conv(weights, "patches", x, 8, 4, 4).reshape(x.shape[0], -1, 8)
    for i in range(2):
        y = jnp.swapaxes(layer_norm(ops, weights, f"{i}/norm0", x), 1, 2)
        x = x + jnp.swapaxes(mlp(ops, weights, f"{i}/tokens", y, 8), 1, 2)
        x = x + mlp(ops, weights, f"{i}/channels", layer_norm(ops, weights, f"{i}/norm1", x), 16)
    return dense(weights, "head", layer_norm(ops, weights, "norm", x).mean(1), 5)


FAMILIES = [
    vgg,
    vgg_bn,
    resnet_v1,
    resnet_v2,
    densenet,
    inception,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    efficientnet,
    convnext,
    unet,
    diffusion_unet,
    autoencoder,
    cnn3d,
    wavenet,
    mixer,
]
