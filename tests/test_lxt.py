"""The transformers that LXT 2.1 explained (see test_goldens.py for its relevance), and an oracle of stop-gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import detach
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from jaxlrp.models import bert, gpt2, llama

GOLDEN = 1e-5  # LXT divides activations by x + 1e-10 and turns rotary positions in float32
FLOAT32, FLOAT64 = 1e-5, 1e-9  # of the largest relevance

COMPOSITES = {"attnLRP": jaxlrp.AttnLRP, "cp_LRP": jaxlrp.CPLRP}


@dataclasses.dataclass(frozen=True)
class Case:
    """One family: a module with weights from Hugging Face names, and the oracle of the same sizes."""

    module: nn.Module
    variables: Any
    oracle: Callable[..., jax.Array]
    sizes: Mapping[str, int]

    def logits(self, variables: Any, embeddings: Any, **kwargs: Any) -> jax.Array:
        """Those that are explained: of the text, or of the token after its last."""
        logits = self.module.apply(variables, embeddings, method="encode", **kwargs)
        assert isinstance(logits, jax.Array)
        return logits if isinstance(self.module, bert.BertClassifier) else logits[..., -1, :]

    def explain(self, composite: jaxlrp.Composite) -> Callable[..., Any]:
        return jax.jit(jaxlrp.lrp(self.logits, composite, argnums=1))


def bert_case(tensors: Mapping[str, np.ndarray], *, vocab: int, hidden: int, layers: int, inner: int) -> Case:
    config = bert.BertConfig(vocab, hidden, layers, 4, inner, max_positions=64)
    module, variables = bert.classifier_from_hf(tensors, config)
    return Case(module, variables, detach.bert, {"layers": layers, "heads": 4})


def gpt2_case(tensors: Mapping[str, np.ndarray], *, vocab: int, hidden: int, layers: int, inner: int) -> Case:
    tied = np.array_equal(tensors["transformer.wte.weight"], tensors["lm_head.weight"])
    config = gpt2.GPT2Config(vocab, hidden, layers, 4, inner, max_positions=64, tied=tied)
    variables = gpt2.params_from_hf(tensors, config)
    return Case(gpt2.GPT2(config), variables, detach.gpt2, {"layers": layers, "heads": 4})


def llama_case(tensors: Mapping[str, np.ndarray], *, vocab: int, hidden: int, layers: int, inner: int) -> Case:
    config = llama.LlamaConfig(vocab, hidden, layers, 4, 2, inner)
    variables = llama.params_from_hf(tensors, config)
    return Case(llama.Llama(config), variables, detach.llama, {"layers": layers, "heads": 4, "kv_heads": 2})


CASES = {"bert": bert_case, "gpt2": gpt2_case, "llama": llama_case}
FAMILIES = list(CASES)


def off(found: Any, wanted: Any) -> float:
    """The largest difference, as a share of the largest number wanted; NaN if there is one."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# -- LXT --------------------------------------------------------------------------------------------------------------


def golden(folder: Path, family: str) -> tuple[Case, Mapping[str, np.ndarray], dict[str, np.ndarray]]:
    """The rebuilt model, all that was recorded, and the tensors by their Hugging Face names."""
    data = dict(np.load(folder / f"lxt_{family}.npz"))
    tensors = {name.removeprefix("params/"): values for name, values in data.items() if name.startswith("params/")}
    inner = 128 if family == "gpt2" else 48
    return CASES[family](tensors, vocab=97, hidden=32, layers=3, inner=inner), data, tensors


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_what_hugging_face_computes(goldens: Path, family: str) -> None:
    case, data, _ = golden(goldens, family)
    embeddings = case.module.apply(case.variables, data["ids"], method="embed")
    np.testing.assert_array_equal(embeddings, data["embeddings"])
    logits = case.module.apply(case.variables, data["embeddings"], method="encode")
    # rotary positions were turned in float32 there
    assert off(logits, data["logits"]) < (1e-6 if family == "llama" else 1e-14)
    np.testing.assert_array_equal(case.module.apply(case.variables, data["ids"]), logits)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_x_input_is_that_of_lxt(goldens: Path, family: str) -> None:
    case, data, _ = golden(goldens, family)
    explain = jax.jit(jaxlrp.attributions.gradient_x_input(case.logits, argnums=1))
    found = explain(case.variables, jnp.asarray(data["embeddings"]), target=int(data["target"]))[0]
    assert off(found, data["relevance/gradient_x_input"]) < GOLDEN


@pytest.mark.usefixtures("x64")
def test_cp_lrp_conserves_the_logit_where_there_are_no_biases(goldens: Path) -> None:
    case, data, _ = golden(goldens, "llama")
    explain = case.explain(jaxlrp.CPLRP(epsilon=0.0))
    relevance = explain(case.variables, data["embeddings"], target=int(data["target"]))[0]
    assert float(relevance.sum()) == pytest.approx(data["logits"][0, -1, data["target"]], rel=1e-6)


# -- the oracle -------------------------------------------------------------------------------------------------------


SMALL = {"vocab": 23, "hidden": 16, "inner": 20}
TOKENS = 7


def shapes(family: str, layers: int) -> dict[str, tuple[int, ...]]:
    if family == "bert":
        return detach.bert_shapes(**SMALL, layers=layers, positions=64, labels=5)
    if family == "gpt2":
        return detach.gpt2_shapes(**SMALL, layers=layers, positions=64)
    return detach.llama_shapes(**SMALL, layers=layers, heads=4, kv_heads=2)


def small(family: str, layers: int, seed: int, dtype: Any) -> tuple[Case, dict[str, np.ndarray], np.ndarray]:
    """A model with random weights, these weights, and the embeddings of a batch of two texts."""
    tensors = detach.random_params(shapes(family, layers), seed, dtype)
    texts = np.random.default_rng(100 + seed).normal(size=(2, TOKENS, SMALL["hidden"])).astype(dtype)
    return CASES[family](tensors, **SMALL, layers=layers), tensors, texts


@functools.cache
def explainer(family: str, layers: int, method: str) -> Callable[..., Any]:
    """One program for all seeds: weights are arguments."""
    return small(family, layers, 0, np.float32)[0].explain(COMPOSITES[method](epsilon=0.0))


@functools.cache
def oracle(case_of: Callable[..., jax.Array], method: str, **sizes: int) -> Callable[..., Any]:
    def relevance(*args: Any, **kwargs: Any) -> Any:
        return detach.relevance(case_of, method, *args, **kwargs, **sizes)

    return jax.jit(relevance)


@pytest.mark.heavy
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_agrees_with_lxt(goldens: Path, family: str) -> None:
    case, data, tensors = golden(goldens, family)
    for method in detach.METHODS:
        if (name := f"relevance/{method}") in data:
            run = oracle(case.oracle, method, **case.sizes)
            assert off(run(tensors, data["embeddings"][0], int(data["target"])), data[name]) < GOLDEN


@pytest.mark.parametrize("method", COMPOSITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_and_rules_agree_in_float32(family: str, method: str) -> None:
    for seed in range(4):
        case, tensors, (x, _) = small(family, 2, seed, np.float32)
        found = explainer(family, 2, method)(case.variables, x, target=seed)
        assert found.dtype == jnp.float32
        assert off(found, oracle(case.oracle, method, **case.sizes)(tensors, x, seed)) < FLOAT32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", COMPOSITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_and_rules_agree_in_float64_on_a_batch(family: str, method: str) -> None:
    for seed in range(3):
        case, tensors, texts = small(family, 1, seed, np.float64)
        targets = np.array([1, seed])
        found = explainer(family, 1, method)(case.variables, texts, target=targets)
        for relevance, x, target in zip(found, texts, targets, strict=True):
            assert off(relevance, oracle(case.oracle, method, **case.sizes)(tensors, x, target)) < FLOAT64


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", COMPOSITES)
def test_padding_gets_nothing_and_changes_nothing(method: str) -> None:
    case, tensors, (x, _) = small("bert", 1, 0, np.float64)
    mask = np.array([1] * (TOKENS - 2) + [0, 0])
    found = np.asarray(explainer("bert", 1, method)(case.variables, x, mask=mask, target=3))
    assert not np.any(found[-2:])
    assert off(found[:-2], oracle(case.oracle, method, **case.sizes)(tensors, x[:-2], 3)) < FLOAT64


class ViT(nn.Module):
    """A vision transformer as people write them in Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        make = {"param_dtype": x.dtype}
        x = nn.Conv(16, (4, 4), strides=4, name="patches", **make)(x).reshape(x.shape[0], -1, 16)
        start = nn.initializers.normal(1.0)
        token = jnp.tile(self.param("class", start, (1, 1, 16), x.dtype), (x.shape[0], 1, 1))
        x = jnp.concatenate([token, x], axis=1)
        x = x + self.param("positions", start, (1, x.shape[1], 16), x.dtype)
        for i in range(2):
            y = nn.LayerNorm(name=f"norm1_{i}", **make)(x)
            x = x + nn.MultiHeadDotProductAttention(4, name=f"attention_{i}", **make)(y)
            y = nn.gelu(nn.Dense(20, name=f"up_{i}", **make)(nn.LayerNorm(name=f"norm2_{i}", **make)(x)))
            x = x + nn.Dense(16, name=f"down_{i}", **make)(y)
        return nn.Dense(5, name="head", **make)(nn.LayerNorm(name="norm", **make)(x)[:, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", COMPOSITES)
def test_oracle_and_rules_agree_on_a_vision_transformer(method: str, dtype: Any) -> None:
    with jax.enable_x64(dtype == np.float64):
        rng = np.random.default_rng(0)
        images = rng.normal(size=(2, 8, 12, 3)).astype(dtype)
        variables = ViT().init(jax.random.key(0), images)
        noise = lambda a: a + 0.2 * rng.normal(size=a.shape).astype(dtype)  # noqa: E731
        variables = jax.tree.map(noise, variables)
        found = jax.jit(jaxlrp.lrp(ViT(), COMPOSITES[method](epsilon=0.0)))(variables, images, target=np.array([1, 4]))
        flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
        for relevance, x, target in zip(found, images, (1, 4), strict=True):
            wanted = detach.relevance(detach.vit, method, flat, x, target, layers=2, heads=4, patch=4)
            assert off(relevance, wanted) < (FLOAT64 if dtype == np.float64 else FLOAT32)


WRONG = {
    "softmax": jaxlrp.Constant(),
    "normalization": jaxlrp.Zero(),  # the scale not held
    "product": jaxlrp.Zero(),  # both factors get all
    "activation": jaxlrp.Zero(),  # the derivative instead of identity
    "sum": jaxlrp.Residual("equal"),
    "add": jaxlrp.Residual("branch"),  # position embeddings without a share of their own, for one
    "linear": jaxlrp.Zero(bias="redistribute"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_rule_is_caught(kind: str) -> None:
    case, tensors, (x, _) = small("gpt2", 1, 0, np.float64)
    composite = jaxlrp.AttnLRP(epsilon=0.0).extend((jaxlrp.kind(kind), WRONG[kind]))
    found = case.explain(composite)(case.variables, x, target=1)
    assert not off(found, oracle(case.oracle, "attnLRP", **case.sizes)(tensors, x, 1)) < 1e-2
