"""Flax weights under the names and in the layouts of torch, and random numbers for all that is trivial after `init`.

Functions of numpy arrays alone, so that nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Tensors = dict[str, np.ndarray]

LAYOUTS = {4: (3, 2, 0, 1), 2: (1, 0)}  # [height, width, in, out] -> [out, in, height, width]; [in, out] -> [out, in]
NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var", "embedding": "weight"}


def randomised(variables: Any, gain: float) -> Any:
    """Kernels times ``gain``; biases, scales, statistics and positions that are neither 0 nor 1."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(2), hash_of(jax.tree_util.keystr(path)))
        match path[-1].key:
            case "kernel" | "embedding":
                return gain * leaf
            case "scale" | "var":
                return jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
            case _:
                return leaf + 0.2 * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(one, variables)


def hash_of(name: str) -> int:
    """The same in every run, which Python's own hash of a string is not."""
    return int.from_bytes(name.encode(), "little") % (2**31 - 1)


def layer(name: str, *parts: Mapping[str, Any]) -> Tensors:
    """One layer's tensors: kernels moved to torch's layout, everything else as it is."""
    tensors = {}
    for leaf, values in ((leaf, np.asarray(values)) for part in parts for leaf, values in part.items()):
        moved = values.transpose(LAYOUTS[values.ndim]) if leaf == "kernel" else values
        tensors[f"{name}.{NAMES.get(leaf, leaf)}"] = np.ascontiguousarray(moved)
    if "mean" in parts[-1]:
        tensors[f"{name}.num_batches_tracked"] = np.zeros((), np.int64)
    return tensors


def channels_first(kernel: Any, height: int, width: int) -> np.ndarray:
    """The kernel of the first dense layer behind a flatten ``[height, width, channels]``, for ``[channels, ...]``."""
    inputs, outputs = kernel.shape
    moved = np.reshape(kernel, (height, width, inputs // (height * width), outputs)).transpose(2, 0, 1, 3)
    return moved.reshape(inputs, outputs)


def vgg16(variables: Any) -> Tensors:
    """`networks.VGG16` as torchvision's ``vgg16``."""
    params = variables["params"]
    tensors: Tensors = {}
    for i, place in enumerate((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)):
        tensors |= layer(f"features.{place}", params[f"Conv_{i}"])
    first = params["Dense_0"]
    tensors |= layer("classifier.0", {**first, "kernel": channels_first(first["kernel"], 7, 7)})
    return tensors | layer("classifier.3", params["Dense_1"]) | layer("classifier.6", params["Dense_2"])


def resnet50(variables: Any) -> Tensors:
    """`networks.ResNet50` as torchvision's ``resnet50``."""
    params, stats = variables["params"], variables["batch_stats"]
    tensors = layer("conv1", params["Conv_0"]) | layer("bn1", params["BatchNorm_0"], stats["BatchNorm_0"])
    blocks = [f"layer{stage}.{block}" for stage, count in enumerate((3, 4, 6, 3), 1) for block in range(count)]
    for k, block in enumerate(blocks):
        own, own_stats = params[f"Bottleneck_{k}"], stats[f"Bottleneck_{k}"]
        for i in range(len(own_stats)):
            conv, norm = (f"conv{i + 1}", f"bn{i + 1}") if i < 3 else ("downsample.0", "downsample.1")
            tensors |= layer(f"{block}.{conv}", own[f"Conv_{i}"])
            tensors |= layer(f"{block}.{norm}", own[f"BatchNorm_{i}"], own_stats[f"BatchNorm_{i}"])
    return tensors | layer("fc", params["Dense_0"])


def vit(variables: Any) -> Tensors:
    """`networks.ViT` as torchvision's ``VisionTransformer``."""
    params = variables["params"]
    width = params["class"].shape[-1]
    tensors = {"class_token": np.asarray(params["class"]), "encoder.pos_embedding": np.asarray(params["positions"])}
    tensors |= layer("conv_proj", params["Conv_0"])
    for k in range(sum(name.startswith("Encoder_") for name in params)):
        name, own = f"encoder.layers.encoder_layer_{k}", params[f"Encoder_{k}"]
        attention = own["MultiHeadDotProductAttention_0"]
        kernels = [np.reshape(attention[part]["kernel"], (width, width)).T for part in ("query", "key", "value")]
        biases = [np.reshape(attention[part]["bias"], width) for part in ("query", "key", "value")]
        tensors[f"{name}.self_attention.in_proj_weight"] = np.concatenate(kernels)
        tensors[f"{name}.self_attention.in_proj_bias"] = np.concatenate(biases)
        out = {**attention["out"], "kernel": np.reshape(attention["out"]["kernel"], (width, width))}
        tensors |= layer(f"{name}.self_attention.out_proj", out)
        tensors |= layer(f"{name}.ln_1", own["LayerNorm_0"]) | layer(f"{name}.ln_2", own["LayerNorm_1"])
        tensors |= layer(f"{name}.mlp.0", own["Dense_0"]) | layer(f"{name}.mlp.3", own["Dense_1"])
    return tensors | layer("encoder.ln", params["LayerNorm_0"]) | layer("heads.head", params["Dense_0"])


def llama(variables: Any) -> Tensors:
    """`jaxlrp.models.llama.Llama` as Hugging Face's ``LlamaForCausalLM``."""
    params = variables["params"]
    tensors = layer("model.embed_tokens", params["token_embeddings"])
    for k in range(sum(name.startswith("layers_") for name in params)):
        name, own = f"model.layers.{k}", params[f"layers_{k}"]
        for short, part in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            tensors |= layer(f"{name}.self_attn.{short}_proj", own["attention"][part])
        for part in ("gate", "up", "down"):
            tensors |= layer(f"{name}.mlp.{part}_proj", own[part])
        tensors |= layer(f"{name}.input_layernorm", own["attention_norm"])
        tensors |= layer(f"{name}.post_attention_layernorm", own["mlp_norm"])
    return tensors | layer("model.norm", params["norm"]) | layer("lm_head", params["head"])
