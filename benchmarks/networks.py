"""The networks that speed is measured on: ordinary Flax modules with random weights."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class VGG16(nn.Module):
    """Simonyan & Zisserman (2015): images ``[N, 224, 224, 3]`` to logits ``[N, 1000]``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(4096)(x))
        return nn.Dense(1000)(x)


class Bottleneck(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = lambda: nn.BatchNorm(use_running_average=True)  # noqa: E731
        y = nn.relu(norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        y = nn.relu(norm()(nn.Conv(self.width, (3, 3), self.stride, padding=1, use_bias=False)(y)))
        y = norm()(nn.Conv(4 * self.width, (1, 1), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(4 * self.width, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """He et al. (2016), stride in the 3x3 convolutions: images ``[N, 224, 224, 3]`` to logits ``[N, 1000]``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (7, 7), 2, padding=3, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class Encoder(nn.Module):
    """One pre-norm transformer block over ``[N, T, D]``."""

    heads: int
    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(self.inner)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class ViT(nn.Module):
    """Dosovitskiy et al. (2021), B/16: images ``[N, 224, 224, 3]`` to logits ``[N, 1000]``."""

    layers: int = 12
    width: int = 768
    heads: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (16, 16), 16)(x).reshape(x.shape[0], -1, self.width)
        token = self.param("class", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        for _ in range(self.layers):
            x = Encoder(self.heads, 4 * self.width)(x)
        return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])


class ScannedEncoder(nn.Module):
    """``layers`` blocks as one scan, with or without rematerialisation, over ``[N, T, D]``."""

    layers: int
    heads: int = 12
    inner: int = 3072
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Encoder, prevent_cse=False) if self.remat else Encoder
        blocks = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = blocks(block(self.heads, self.inner), x, None)
        return nn.Dense(10)(x.mean(1))
