"""Compare jaxlrp with reference relevances computed by zennit 1.0.0 and LXT 2.1, in float64.

    python benchmarks/goldens.py

prints one row per layer, input sign and net: the largest relative difference (largest absolute difference over largest
absolute reference) over all rules or composites, and over everything at the end. Every model here is an ordinary Flax
module: networks with unfused BatchNorm against zennit, transformers against LXT.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxlrp
from jaxlrp.models import bert, gpt2, llama
from jaxlrp.tables import table

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
TOLERANCE = 1e-9
LXT_TOLERANCE = 1e-5  # LXT divides activations by x + 1e-10, and turns rotary positions in float32

RULES = {
    "epsilon_1e-6": jaxlrp.Epsilon(1e-6),
    "epsilon_0.25": jaxlrp.Epsilon(0.25),
    "epsilon_nobias": jaxlrp.Epsilon(1e-6, bias="ignore"),
    "zplus": jaxlrp.ZPlus(),
    "zplus_nobias": jaxlrp.ZPlus(bias="ignore"),
    "alpha2beta1": jaxlrp.AlphaBeta(2.0, 1.0),
    "alpha1beta0": jaxlrp.AlphaBeta(1.0, 0.0),
    "gamma_0.25": jaxlrp.Gamma(0.25),
    "gamma_10": jaxlrp.Gamma(10.0),
    "gamma_0.25_nobias": jaxlrp.Gamma(0.25, bias="ignore"),
    "wsquare": jaxlrp.WSquare(),
    "flat": jaxlrp.Flat(),
    "zbox_-3_3": jaxlrp.ZBox(-3.0, 3.0),
}
COMPOSITES = {
    "epsilon_plus": jaxlrp.EpsilonPlus(),
    "epsilon_plus_flat": jaxlrp.EpsilonPlusFlat(),
    "epsilon_gamma_box": jaxlrp.EpsilonGammaBox(-3.0, 3.0),
    "epsilon_alpha2_beta1": jaxlrp.EpsilonAlpha2Beta1(),
    "epsilon_alpha2_beta1_flat": jaxlrp.EpsilonAlpha2Beta1Flat(),
    "excitation_backprop": jaxlrp.ExcitationBackprop(),
    "guided_backprop": jaxlrp.GuidedBackprop(),
    "deconvnet": jaxlrp.DeconvNet(),
    "gradient": jaxlrp.GradientComposite(),
}
TRANSFORMER_RULES = {"attnLRP": jaxlrp.AttnLRP(epsilon=0.0), "cp_LRP": jaxlrp.CPLRP(epsilon=0.0)}
SEEDS = {"onehot": jaxlrp.targets.one_hot, "logit": jaxlrp.targets.logit}


class Row(NamedTuple):
    """One comparison: what, with which setting, and how far off."""

    case: str
    setting: str
    difference: float
    tolerance: float = TOLERANCE


def relative(ours: Any, golden: np.ndarray) -> float:
    """Largest absolute difference over largest absolute reference."""
    return float(np.max(np.abs(np.asarray(ours) - golden)) / np.max(np.abs(golden)))


# -- single layers
# ----------------------------------------------------------------------------------------------------------


def rule_cases() -> dict[str, tuple[nn.Module, dict[str, Any], dict[str, np.ndarray]]]:
    """For every layer and input sign: a Flax module, its variables and the reference arrays."""
    arrays = np.load(GOLDENS / "zennit_rules.npz")
    cases = {}
    for case in json.loads((GOLDENS / "zennit.json").read_text())["rule_cases"]:
        key = case["key"]
        data = {k.removeprefix(key + "/"): arrays[k] for k in arrays if k.startswith(key + "/")}
        bias, features = "bias" in data, data["kernel"].shape[-1]
        if data["kernel"].ndim == 2:
            module: nn.Module = nn.Dense(features, use_bias=bias, param_dtype=jnp.float64)
        else:
            module = nn.Conv(
                features,
                data["kernel"].shape[:-2],
                strides=case["strides"],
                padding=case["padding"],
                kernel_dilation=case.get("kernel_dilation", 1),
                feature_group_count=case.get("feature_group_count", 1),
                use_bias=bias,
                param_dtype=jnp.float64,
            )
        params = {k: data[k] for k in ("kernel", "bias") if k in data}
        cases[key] = (module, {"params": params}, data)
    return cases


def compare_rules() -> Iterator[Row]:
    """Every rule setting on every single layer."""
    for key, (module, variables, data) in rule_cases().items():
        yield Row(key, "forward", relative(module.apply(variables, data["x"]), data["z"]))
        for setting, rule in RULES.items():
            if setting in data:
                _, pull = jaxlrp.lrp_vjp(module, variables, data["x"], composite=rule)
                yield Row(key, setting, relative(pull(data["r_out"]), data[setting]))


# -- nets
# ---------------------------------------------------------------------------------------------------------------------


class VggBN(nn.Module):
    """Two convolutions with BatchNorm, a max pool, an average pool and two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``[N, 16, 16, 3]`` to logits ``[N, 10]``."""
        for features, pool in ((8, nn.max_pool), (12, nn.avg_pool)):
            x = nn.Conv(features, (3, 3), padding=1, param_dtype=x.dtype)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, param_dtype=x.dtype)(x))
            x = pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(20, param_dtype=x.dtype)(x))
        return nn.Dense(10, param_dtype=x.dtype)(x)


class Bottleneck(nn.Module):
    """A ResNet block: three convolutions beside a projection, then their sum."""

    inner: int
    outer: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """One block."""

        def conv_bn(x: jax.Array, features: int, size: int, stride: int) -> jax.Array:
            pad = (size - 1) // 2
            x = nn.Conv(features, (size, size), stride, padding=pad, use_bias=False, param_dtype=x.dtype)(x)
            return nn.BatchNorm(use_running_average=True, epsilon=1e-5, param_dtype=x.dtype)(x)

        y = nn.relu(conv_bn(x, self.inner, 1, 1))
        y = nn.relu(conv_bn(y, self.inner, 3, self.stride))
        return nn.relu(conv_bn(y, self.outer, 1, 1) + conv_bn(x, self.outer, 1, self.stride))


class ResNetBN(nn.Module):
    """A stem, two bottleneck blocks, global average pooling and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``[N, 24, 24, 3]`` to logits ``[N, 10]``."""
        x = nn.Conv(8, (3, 3), 2, padding=1, use_bias=False, param_dtype=x.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, param_dtype=x.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        x = Bottleneck(6, 12, 1)(x)
        x = Bottleneck(8, 16, 2)(x)
        return nn.Dense(10, param_dtype=x.dtype)(x.mean((1, 2)))


class MLP(nn.Module):
    """Dense layers with a relu and a tanh."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Features ``[N, 12]`` to logits ``[N, 4]``."""
        x = nn.relu(nn.Dense(16, param_dtype=x.dtype)(x))
        x = jnp.tanh(nn.Dense(16, param_dtype=x.dtype)(x))
        return nn.Dense(4, param_dtype=x.dtype)(x)


# PyTorch's positions in the reference nets, in the order in which Flax numbers its modules of that type.
_ORDER = {
    "vgg_bn": (VggBN(), {"Conv": ["0", "4"], "BatchNorm": ["1", "5"], "Dense": ["9", "11"]}, {}),
    "mlp": (MLP(), {"Dense": ["0", "2", "4"]}, {}),
    "resnet_bn": (
        ResNetBN(),
        {"Conv": ["0"], "BatchNorm": ["1"], "Dense": ["8"]},
        {
            f"Bottleneck_{i}": {
                "Conv": [f"{p}.body.0", f"{p}.body.3", f"{p}.body.6", f"{p}.proj.0"],
                "BatchNorm": [f"{p}.body.1", f"{p}.body.4", f"{p}.body.7", f"{p}.proj.1"],
            }
            for i, p in enumerate("45")
        },
    ),
}


def golden_nets() -> dict[str, tuple[nn.Module, dict[str, Any], dict[str, np.ndarray]]]:
    """For every net: the Flax module, its variables and the reference arrays."""
    arrays = np.load(GOLDENS / "zennit_nets.npz")
    nets = {}
    for net, (module, order, blocks) in _ORDER.items():
        data = {k.removeprefix(net + "/"): arrays[k] for k in arrays if k.startswith(net + "/")}
        params, stats = _module_variables(order, data)
        for block, inner in blocks.items():
            params[block], stats[block] = _module_variables(inner, data)
        if net == "vgg_bn":  # the reference flattens channels first
            kernel = params["Dense_0"]["kernel"].reshape(12, 4, 4, -1)
            params["Dense_0"]["kernel"] = kernel.transpose(1, 2, 0, 3).reshape(192, -1)
        nets[net] = (module, {"params": params, "batch_stats": stats} if stats else {"params": params}, data)
    return nets


def _module_variables(order: dict[str, list[str]], data: dict[str, np.ndarray]) -> tuple[Any, Any]:
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    for kind, places in order.items():
        for i, place in enumerate(places):
            name, found = f"{kind}_{i}", lambda leaf, place=place: data.get(f"params/{place}.{leaf}")
            if kind == "BatchNorm":
                params[name] = {"scale": found("weight"), "bias": found("bias")}
                stats[name] = {"mean": found("running_mean"), "var": found("running_var")}
            else:
                params[name] = {"kernel": found("weight")}
                if found("bias") is not None:
                    params[name]["bias"] = found("bias")
    return params, stats


def compare_nets() -> Iterator[Row]:
    """Every composite and seed on every net."""
    for net, (module, variables, data) in golden_nets().items():
        yield Row(net, "forward", relative(module.apply(variables, data["x"]), data["logits"]))
        for setting, composite in COMPOSITES.items():
            output, pull = jaxlrp.lrp_vjp(module, variables, data["x"], composite=composite)
            for seed, target in SEEDS.items():
                relevance = pull(target(data["label"])(output))
                yield Row(net, f"{seed}/{setting}", relative(relevance, data[f"{seed}/{setting}"]))


def golden_transformers() -> dict[str, tuple[Callable[..., jax.Array], Any, dict[str, np.ndarray]]]:
    """For every transformer: the logits that LXT explained as a function, its variables and the reference arrays."""
    found = {}
    for family in ("bert", "gpt2", "llama"):
        data = dict(np.load(GOLDENS / f"lxt_{family}.npz"))
        tensors = {k.removeprefix("params/"): v for k, v in data.items() if k.startswith("params/")}
        if family == "bert":
            module, variables = bert.classifier_from_hf(tensors, bert.BertConfig(97, 32, 3, 4, 48, max_positions=64))
        elif family == "gpt2":
            tied = np.array_equal(tensors["transformer.wte.weight"], tensors["lm_head.weight"])
            config = gpt2.GPT2Config(97, 32, 3, 4, 128, max_positions=64, tied=tied)
            module, variables = gpt2.GPT2(config), gpt2.params_from_hf(tensors, config)
        else:
            config = llama.LlamaConfig(97, 32, 3, 4, 2, 48)
            module, variables = llama.Llama(config), llama.params_from_hf(tensors, config)

        def logits(variables: Any, embeddings: Any, module: nn.Module = module) -> Any:
            found = module.apply(variables, embeddings, method="encode")
            return found if found.ndim == 2 else found[:, -1]  # of the text, or of the token after its last

        found[f"lxt_{family}"] = (logits, variables, data)
    return found


def compare_transformers() -> Iterator[Row]:
    """AttnLRP and CP-LRP on every transformer."""
    for case, (logits, variables, data) in golden_transformers().items():
        for setting, composite in TRANSFORMER_RULES.items():
            if (name := f"relevance/{setting}") in data:
                explain = jaxlrp.lrp(logits, composite, argnums=1)
                relevance = explain(variables, data["embeddings"], target=int(data["target"]))
                yield Row(case, setting, relative(relevance[0], data[name]), LXT_TOLERANCE)


def main() -> int:
    """Print the table; the exit status says whether everything agrees."""
    groups = {"zennit 1.0.0": [*compare_rules(), *compare_nets()], "LXT 2.1": list(compare_transformers())}
    rows = [row for group in groups.values() for row in group]
    shown = [(r.case, r.setting, f"{r.difference:.1e}", "ok" if r.difference < r.tolerance else "OFF") for r in rows]
    print(table(("case", "setting", "difference", ""), shown, right=[2]) + "\n")
    for name, group in groups.items():
        worst = max(group, key=lambda r: r.difference)
        where = f"({worst.case}, {worst.setting})"
        print(f"{name}: {len(group)} comparisons, largest difference {worst.difference:.1e} {where}")
    return int(not all(r.difference < r.tolerance for r in rows))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    raise SystemExit(main())
