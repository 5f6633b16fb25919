"""The other side of peers.py: one network and one method of one torch library, driven by JSON lines.

peers.py starts this with the Python where torch is installed. It answers a first line about itself when it is ready,
then one line to every command: ``{"do": "run", "setting": ...}`` with the seconds of one explanation, ``{"do": "save",
"path": ...}`` after it has written the relevance as .npy. It ends when its input does.

A library is given its best settings: hooks are registered and BatchNorm is merged once, outside of what is timed;
parameters need no gradient, so that no graph is kept for them; denormal numbers are flushed to zero, as XLA does.
Images may lie in either memory layout, and torch may be allowed products in bfloat16, where that changes relevance by
less than 1e-4: whatever takes at most a tenth longer than the fastest is offered. Settings of malloc come with the
environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Explain = Callable[[], Tensor]
TARGET = 1
SAME = 1e-4  # relevance to which a setting may change it, in norm
NEAR = 1.1  # times the fastest


def import_torchvision() -> Any:
    """Torchvision, whose own operators are not needed.

    Its wheels are built for a CUDA torch; beside a torch for CPUs their operators do not load, and its import fails
    because these have no declaration.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import torchvision
    return torchvision


# -- networks ----------------------------------------------------------------------------------------------------------


def build(network: str, sizes: dict[str, int]) -> nn.Module:
    """The twin of a Flax network, its weights still to be loaded."""
    models = import_torchvision().models  # transformers would import it too
    if network == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**sizes))
    if network == "vgg16":
        return models.vgg16(init_weights=False)
    if network == "resnet50":
        return models.resnet50()
    module = models.VisionTransformer(224, 16, mlp_dim=4 * sizes["hidden_dim"], **sizes)
    for inner in module.modules():
        if isinstance(inner, nn.GELU):
            inner.approximate = "tanh"  # Flax's default
    return module


def load(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The twin with the weights of the Flax network, and the input."""
    with np.load(arguments.weights, allow_pickle=False) as file:
        tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    if arguments.double:
        tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    x = tensors.pop("input")
    module = build(arguments.network, json.loads(arguments.sizes))
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False), x


def logits(module: nn.Module, x: Tensor) -> Tensor:
    """``[batch, classes]``; for a language model those of the token after the last."""
    if hasattr(module, "lm_head"):
        return module(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[:, -1]
    return module(x)


# -- methods -----------------------------------------------------------------------------------------------------------


def gradient(module: nn.Module, x: Tensor, network: str, method: str) -> Explain:
    """The gradient of the target's logit, without any library."""
    del network, method

    def explain() -> Tensor:
        leaf = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(logits(module, leaf)[:, TARGET].sum(), leaf)
        return found

    return explain


def zennit(module: nn.Module, x: Tensor, network: str, method: str) -> Explain:
    """A composite with the canonizer that zennit has for this network."""
    from zennit import composites
    from zennit.attribution import Gradient
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    canonizers = [ResNetCanonizer() if network == "resnet50" else VGGCanonizer()]
    bounds = {"low": 0.0, "high": 1.0} if method == "EpsilonGammaBox" else {}
    composite = getattr(composites, method)(canonizers=canonizers, **bounds)
    composite.register(module)
    attributor = Gradient(module, composite)

    def seed(output: Tensor) -> Tensor:
        return output.detach() * nn.functional.one_hot(torch.tensor(TARGET), output.shape[-1])

    return lambda: attributor(x, seed)[1]


def captum(module: nn.Module, x: Tensor, network: str, method: str) -> Explain:
    """The epsilon rule everywhere, or the gamma rule at convolutions."""
    del network
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule

    for inner in module.modules():
        if isinstance(inner, nn.ReLU):
            inner.inplace = False  # captum's hooks cannot do with it

    def explain() -> Tensor:
        for inner in module.modules():  # captum takes the rules away after every call
            if isinstance(inner, nn.Conv2d) and method == "Gamma":
                inner.rule = GammaRule(gamma=0.25, set_bias_to_zero=True)
            elif isinstance(inner, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
                inner.rule = EpsilonRule(1e-20)  # a pick needs no stabiliser, and jaxlrp has none there
        return LRP(module).attribute(x, target=TARGET)

    return explain


def lxt(module: nn.Module, x: Tensor, network: str, method: str) -> Explain:
    """LXT's efficient mode: gradient times input of the patched modules."""
    from lxt.efficient import monkey_patch
    from lxt.efficient.models import llama, vit_torch

    if network == "llama":
        monkey_patch(llama.modeling_llama, {"AttnLRP": llama.attnLRP, "CPLRP": llama.cp_LRP}[method])
    else:
        monkey_patch(vit_torch.vision_transformer, {"CPLRP": vit_torch.cp_LRP}[method])
    explain = gradient(module, x, network, method)
    return lambda: x * explain()


def output(module: nn.Module, x: Tensor, network: str, method: str) -> Explain:
    """No explanation at all: the logits, to see that this is the same network."""
    del network, method
    return torch.no_grad()(lambda: logits(module, x))


METHODS = {"output": output, "gradient": gradient, "zennit": zennit, "captum": captum, "lxt": lxt}


# -- measuring ---------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A way to run a method."""

    explain: Explain
    precision: str  # of products in float32

    def run(self) -> Tensor:
        """Explain."""
        for products in (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul):
            products.fp32_precision = self.precision
        return self.explain()

    def seconds(self) -> float:
        """Of one explanation."""
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


def prepare(arguments: argparse.Namespace) -> dict[str, Setting]:
    """The method, warm, in the settings that may be the fastest; the plain one alone if nothing is timed."""
    formats = {"contiguous": torch.contiguous_format}
    if arguments.network in ("vgg16", "resnet50") and arguments.timed:
        formats["channels last"] = torch.channels_last
    settings: dict[str, Setting] = {}
    for name, memory_format in formats.items():
        module, x = load(arguments)
        module, x = module.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
        explain = METHODS[arguments.peer](module, x, arguments.network, arguments.method)
        settings[name] = plain = Setting(explain, "none")
        if arguments.timed:
            coarse, relevance = Setting(explain, "bf16"), plain.run()
            if 0 < (coarse.run() - relevance).norm() < SAME * relevance.norm():  # 0 where it multiplies as before
                settings[f"{name}, bfloat16"] = coarse
    if not arguments.timed:
        return settings
    tried: dict[str, list[float]] = {name: [] for name in settings}
    for round_ in range(4):  # in turn; the first warms up
        for name, setting in settings.items():
            found = setting.seconds()
            if round_:
                tried[name].append(found)
    took = {name: statistics.median(found) for name, found in tried.items()}
    return {name: setting for name, setting in settings.items() if took[name] <= NEAR * min(took.values())}


def main() -> None:
    """Answer on what was the standard output; whatever the libraries print goes to the standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True, help=".npz of tensors by their torch names, and the input")
    parser.add_argument("--sizes", default="{}", help="JSON, for networks that come in sizes")
    parser.add_argument("--peer", required=True, choices=METHODS)
    parser.add_argument("--method", default="")
    parser.add_argument("--timed", action="store_true", help="warm up, and find the fastest settings")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr
    warnings.simplefilter("ignore")

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    torch.set_flush_denormal(True)
    torch.set_num_threads(arguments.threads)
    try:
        settings = prepare(arguments)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    libraries = {"torch", "transformers" if arguments.network == "llama" else "torchvision"}
    libraries |= {arguments.peer} - {"output", "gradient"}
    answer(settings=list(settings), versions={name: importlib.metadata.version(name) for name in sorted(libraries)})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "save":
            plain = Setting(next(iter(settings.values())).explain, "none")
            np.save(command["path"], plain.run().detach().contiguous().numpy())
            answer(saved=command["path"])
        else:
            answer(seconds=settings[command["setting"]].seconds())


if __name__ == "__main__":
    main()
