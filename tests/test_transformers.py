"""The text models: facts that any such model must obey, and what jaxlrp makes of them."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import detach
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import jaxlrp
from jaxlrp.models import WeightFileError, bert, gpt2, llama

VOCAB, HIDDEN, INNER, TOKENS = 23, 16, 20, 7
CONFIGS = {
    "bert": bert.BertConfig(VOCAB, HIDDEN, 2, 4, INNER, max_positions=16),
    "gpt2": gpt2.GPT2Config(VOCAB, HIDDEN, 2, 4, INNER, max_positions=16),
    "llama": llama.LlamaConfig(VOCAB, HIDDEN, 2, 4, 2, INNER),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: bert.BertClassifier(CONFIGS["bert"], 5),
    "gpt2": lambda: gpt2.GPT2(CONFIGS["gpt2"]),
    "llama": lambda: llama.Llama(CONFIGS["llama"]),
}
FAMILIES = list(MODULES)
CAUSAL = ["gpt2", "llama"]


def tensors_of(family: str, layers: int = 2, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names."""
    sizes = {"vocab": VOCAB, "hidden": HIDDEN, "inner": INNER, "layers": layers}
    if family == "bert":
        shapes = detach.bert_shapes(**sizes, positions=16, labels=5)
    elif family == "gpt2":
        shapes = detach.gpt2_shapes(**sizes, positions=16)
    else:
        shapes = detach.llama_shapes(**sizes, heads=4, kv_heads=2)
    return detach.random_params(shapes, 0, dtype)


@functools.cache
def model(family: str) -> tuple[nn.Module, Any]:
    """A module with random weights: those that modules start with hide too much (no biases, equal scales)."""
    tensors = tensors_of(family)
    if family == "bert":
        return bert.classifier_from_hf(tensors, CONFIGS["bert"])
    from_hf = {"gpt2": gpt2, "llama": llama}[family].params_from_hf
    return MODULES[family](), from_hf(tensors, CONFIGS[family])


def explained(family: str) -> Callable[..., jax.Array]:
    """The logits of a text, or of the token after its last, from its embeddings."""

    def logits(variables: Any, embeddings: jax.Array, **kwargs: Any) -> jax.Array:
        out = model(family)[0].apply(variables, embeddings, method="encode", **kwargs)
        assert isinstance(out, jax.Array)
        return out if family == "bert" else out[..., -1, :]

    return logits


def some_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


# -- facts about the models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_texts(family: str) -> None:
    module, variables = model(family)
    run = jax.jit(module.apply)
    ids = some_ids(3, TOKENS)
    assert close(run(variables, ids), np.stack([run(variables, text) for text in ids]))


@pytest.mark.parametrize("family", CAUSAL)
def test_a_later_token_changes_no_earlier_logit(family: str) -> None:
    module, variables = model(family)
    ids = some_ids(TOKENS)
    other = ids.copy()
    other[4] = (ids[4] + 1) % VOCAB
    before, after = (np.asarray(module.apply(variables, x)) for x in (ids, other))
    np.testing.assert_array_equal(before[:4], after[:4])
    assert np.all(np.abs(before[4:] - after[4:]).max(-1) > 1e-3)


def test_bert_looks_both_ways() -> None:
    module, variables = bert.Bert(CONFIGS["bert"]), bert.params_from_hf(tensors_of("bert"), CONFIGS["bert"])
    ids = some_ids(TOKENS)
    other = ids.copy()
    other[4] = (ids[4] + 1) % VOCAB
    before, after = (np.asarray(module.apply(variables, x)) for x in (ids, other))
    assert np.all(np.abs(before - after).max(-1) > 1e-3)


@pytest.mark.usefixtures("x64")
def test_rotary_positions_matter_by_their_distance_alone() -> None:
    module, variables = model("llama")
    ids, positions = some_ids(2, TOKENS), np.arange(TOKENS)
    run = functools.partial(module.apply, jax.tree.map(lambda x: x.astype(np.float64), variables), ids)
    assert close(run(positions=positions + 100), run(), 1e-10)
    assert close(run(positions=np.stack([positions, positions + 7])), run(), 1e-10)
    assert not close(run(positions=2 * positions), run(), 1e-2)


def test_grouped_heads_are_full_attention_with_repeated_ones() -> None:
    module, variables = model("llama")
    full = llama.Llama(llama.LlamaConfig(VOCAB, HIDDEN, 2, 4, 4, INNER))

    def repeat(path: Any, x: jax.Array) -> jax.Array:
        if not {"key", "value"} & {part.key for part in path}:
            return x
        return jnp.repeat(x.reshape(HIDDEN, 2, HIDDEN // 4), 2, axis=1).reshape(HIDDEN, HIDDEN)

    repeated = jax.tree_util.tree_map_with_path(repeat, variables)
    ids = some_ids(2, TOKENS)
    assert close(full.apply(repeated, ids), module.apply(variables, ids))


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_of_the_last_token_alone_have_the_same_relevance(family: str) -> None:
    module, variables = model(family)
    ids = some_ids(2, TOKENS)

    def last(variables: Any, embeddings: Any, keep: int | None) -> Any:
        return module.apply(variables, embeddings, logits_to_keep=keep, method="encode")[:, -1]

    embeddings = module.apply(variables, ids, method="embed")
    assert module.apply(variables, ids, logits_to_keep=1).shape == (2, 1, VOCAB)
    one, every = (
        jaxlrp.lrp(functools.partial(last, keep=keep), jaxlrp.AttnLRP(), argnums=1, target=1)(variables, embeddings)
        for keep in (1, None)
    )
    assert close(one, every)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_tied_head_reads_the_embeddings(family: str) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": 2, "num_heads": 4, "intermediate_size": INNER}
    more = {"num_kv_heads": 2} if family == "llama" else {"max_positions": 16}
    kind, make = {"gpt2": (gpt2.GPT2Config, gpt2.GPT2), "llama": (llama.LlamaConfig, llama.Llama)}[family]
    tensors = tensors_of(family)
    embeddings = next(v for k, v in tensors.items() if "wte" in k or "embed_tokens" in k)
    outputs = []
    for tied in (True, False):
        config = kind(**sizes, **more, tied=tied)
        given = {k: v for k, v in tensors.items() if k != "lm_head.weight"} | (
            {} if tied else {"lm_head.weight": embeddings}
        )
        from_hf = {"gpt2": gpt2, "llama": llama}[family].params_from_hf
        outputs.append(make(config).apply(from_hf(given, config), some_ids(2, TOKENS)))
    assert close(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    module, variables = model(family)
    ids = some_ids(TOKENS)
    alone = module.apply(variables, ids)
    left = family != "bert"  # texts to be continued are padded on the left
    pads = [some_ids(3, seed=seed) for seed in (1, 2)]
    padded = np.stack([np.concatenate([pad, ids] if left else [ids, pad]) for pad in pads])
    mask = np.stack([np.concatenate([np.zeros(3, int), np.ones(TOKENS, int)][:: 1 if left else -1])] * 2)
    if left:
        found = module.apply(variables, padded, mask, np.maximum(np.cumsum(mask, -1) - 1, 0))[:, 3:]
    else:
        found = module.apply(variables, padded, mask)
    assert close(found, np.stack([alone] * 2))
    assert close(found, module.apply(variables, padded, mask != 0, *([np.cumsum(mask, -1) - 1] * left))[:, 3 * left :])
    assert not close(module.apply(variables, padded)[:, 3 * left :], found, 1e-2)


def test_types_of_text() -> None:
    module, variables = model("bert")
    ids, types = some_ids(2, TOKENS), np.array([0] * 4 + [1] * 3)
    assert close(module.apply(variables, ids, None, 0 * types), module.apply(variables, ids))
    typed = module.apply(variables, ids, type_ids=types)
    assert not close(typed, module.apply(variables, ids), 1e-2)
    assert close(module.apply(variables, ids, None, np.stack([types] * 2)), typed)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_text_that_is_too_long(family: str) -> None:
    module, variables = model(family)
    with pytest.raises(ValueError, match="17 tokens are more than the model's 16 positions"):
        module.apply(variables, some_ids(17))


# -- settings and weights ---------------------------------------------------------------------------------------------

BERT = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": INNER,
    "max_position_embeddings": 16,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_inner": INNER, "n_positions": 16}
LLAMA = {k: v for k, v in BERT.items() if k not in ("model_type", "hidden_act")} | {"num_key_value_heads": 2}


def test_settings_are_read() -> None:
    assert bert.BertConfig.from_dict(BERT) == CONFIGS["bert"]
    assert gpt2.GPT2Config.from_dict(GPT2) == CONFIGS["gpt2"]
    assert llama.LlamaConfig.from_dict(LLAMA) == CONFIGS["llama"]
    assert gpt2.GPT2Config.from_dict(GPT2 | {"n_inner": None}).intermediate_size == 4 * HIDDEN
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert llama.LlamaConfig.from_dict(LLAMA | newer).rope_theta == 5e5
    assert llama.LlamaConfig.from_dict(LLAMA | {"rope_theta": 5e5, "head_dim": 4}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (bert.BertConfig, {"vocab_size": None}, "settings of BERT have no 'vocab_size'"),
        (bert.BertConfig, {"num_attention_heads": 3}, "3 heads cannot share 16 features evenly"),
        (
            bert.BertConfig,
            {"hidden_size": "16"},
            "'hidden_size' of BERT must be a whole number of at least 1, not '16'",
        ),
        (bert.BertConfig, {"num_hidden_layers": 0}, "must be a whole number of at least 1, not 0"),
        (bert.BertConfig, {"hidden_act": "relu"}, "'hidden_act' of BERT must be 'gelu'; 'relu' is not built in"),
        (bert.BertConfig, {"position_embedding_type": "relative_key"}, "must be 'absolute'"),
        (bert.BertConfig, {"layer_norm_eps": -1.0}, "'layer_norm_eps' of BERT must be a positive number, not -1.0"),
        (bert.BertConfig, {"model_type": "roberta"}, "'roberta' is not built in"),
        (gpt2.GPT2Config, {"activation_function": "relu"}, "'gelu_new' or 'gelu_pytorch_tanh'"),
        (gpt2.GPT2Config, {"tie_word_embeddings": "yes"}, "must be true or false, not 'yes'"),
        (llama.LlamaConfig, {"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads evenly"),
        (llama.LlamaConfig, {"hidden_size": 12}, "even number of features, not 3"),
        (llama.LlamaConfig, {"rope_scaling": {"factor": 8.0}}, "'rope_scaling' of Llama must be None"),
        (llama.LlamaConfig, {"rope_parameters": {"rope_type": "yarn"}}, "must be 'default'; 'yarn'"),
        (llama.LlamaConfig, {"attention_bias": True}, "'attention_bias' of Llama must be False"),
        (llama.LlamaConfig, {"head_dim": 5}, "'head_dim' of Llama must be None or 4"),
    ],
)
def test_settings_that_are_wrong_or_not_built_in(read: Any, config: dict[str, Any], message: str) -> None:
    base = {bert.BertConfig: BERT, gpt2.GPT2Config: GPT2, llama.LlamaConfig: LLAMA}[read]
    with pytest.raises(bert.ModelConfigError, match=message):
        read.from_dict(base | config)


def test_settings_that_are_no_dictionary() -> None:
    with pytest.raises(bert.ModelConfigError, match="settings of BERT are a dictionary, not list"):
        bert.BertConfig.from_dict([])  # type: ignore[arg-type]


def load(family: str, tensors: dict[str, np.ndarray]) -> Any:
    return {"bert": bert, "gpt2": gpt2, "llama": llama}[family].params_from_hf(tensors, CONFIGS[family])


PREFIX = {"bert": "bert.", "gpt2": "transformer.", "llama": "model."}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_may_come_with_or_without_their_prefix(family: str) -> None:
    tensors = tensors_of(family)
    short = {name.removeprefix(PREFIX[family]): values for name, values in tensors.items()}
    assert short.keys() != tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, load(family, tensors), load(family, short))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_weights_keep_their_type(dtype: Any) -> None:
    leaves = jax.tree.leaves(load("bert", {k: v.astype(dtype) for k, v in tensors_of("bert").items()}))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(dtype)}


def test_old_names_and_buffers() -> None:
    tensors = tensors_of("bert")
    old = {}
    for name, values in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[name] = values
    assert any("gamma" in name for name in old)
    jax.tree.map(np.testing.assert_array_equal, load("bert", old), load("bert", tensors))
    load("gpt2", tensors_of("gpt2") | {"h.0.attn.bias": np.tril(np.ones((1, 1, 16, 16)))})
    load("bert", tensors | {"cls.predictions.bias": np.zeros(VOCAB), "bert.embeddings.position_ids": np.arange(16)})


MIDDLE = {
    "bert": "bert.encoder.layer.1.attention.self.key.weight",
    "gpt2": "transformer.h.1.attn.c_proj.bias",
    "llama": "model.layers.1.mlp.gate_proj.weight",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_that_do_not_fit(family: str) -> None:
    tensors, name = tensors_of(family), MIDDLE[family]
    good = tensors[name]
    with pytest.raises(WeightFileError, match=rf"'{name.removeprefix(PREFIX[family])}' of \w+ is missing"):
        load(family, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(WeightFileError, match=rf"'{name}' has shape \(3,\) .* needs real numbers of shape \("):
        load(family, tensors | {name: np.zeros(3, np.float32)})
    with pytest.raises(WeightFileError, match=rf"'{name}' .* type int8"):
        load(family, tensors | {name: good.astype(np.int8)})
    with pytest.raises(WeightFileError, match=r"no place for the tensor '.*\.2\..*'"):
        load(family, tensors_of(family, layers=3))


def test_a_kernel_that_is_not_transposed_does_not_fit() -> None:
    tensors = tensors_of("llama")
    name = MIDDLE["llama"]
    with pytest.raises(WeightFileError, match=r"has shape \(16, 20\) .* of shape \(20, 16\)"):
        load("llama", tensors | {name: tensors[name].T})


def test_a_classifier_without_a_head() -> None:
    tensors = {k: v for k, v in tensors_of("bert").items() if not k.startswith("classifier")}
    with pytest.raises(WeightFileError, match=r"'classifier.weight' of BertClassifier is missing"):
        bert.classifier_from_hf(tensors, CONFIGS["bert"])


# -- layers -----------------------------------------------------------------------------------------------------------

EXPECTED = {  # of two layers each; a rotary position adds to queries and to keys
    "bert": {"linear/dense": 6 * 2 + 2, "product/matmul": 4, "activation/gelu": 2, "activation/tanh": 1, "sum/add": 4},
    "gpt2": {"linear/dense": 4 * 2 + 1, "product/matmul": 4, "activation/gelu": 2, "sum/add": 4},
    "llama": {
        "linear/dense": 7 * 2 + 1,
        "product/matmul": 4,
        "product/mul": 2,
        "activation/silu": 2,
        "sum/add": 4 + 4,
    },
}


@functools.cache
def layers_of(family: str) -> jaxlrp.Layers:
    module, variables = model(family)
    return jaxlrp.trace(module, variables, jnp.zeros((2, TOKENS, HIDDEN)), method="encode")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found(family: str) -> None:
    found = Counter(f"{layer.kind}/{layer.op}" for layer in layers_of(family) if layer.kind != "move")
    del found["activation/identity"]  # scaled scores and rotary cosines: multiplied by numbers in the code
    wanted = EXPECTED[family] | {"normalization/normalization": 2 * 2 + 1, "softmax/softmax": 2}
    if family != "llama":  # positions and types are added to the embeddings
        wanted["sum/add"] += 1  # position embeddings
    assert found == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_called_by_their_modules(family: str) -> None:
    _, variables = model(family)
    names = [layer.name for layer in layers_of(family)]
    assert len(set(names)) == len(names)
    assert not [name for name in names if re.search(r"[^\w./:]", name)]
    modules = {"/".join(path[:-1]) for path in flatten_dict(variables["params"]) if path[-1] in ("kernel", "scale")}
    attention = {f"{module.removesuffix('query')}softmax" for module in modules if module.endswith("attention/query")}
    plain = [re.sub(r"\.\w+", "", name) for name in names]  # without the methods on the way, Bert.encode
    for wanted in modules | attention:
        assert sum(name == wanted or name.endswith(f"/{wanted}") for name in plain) == 1, wanted


# -- relevance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family: str) -> None:
    _, variables = model(family)
    texts = jnp.asarray(np.random.default_rng(3).normal(size=(2, TOKENS, HIDDEN)), jnp.float32)
    explain = jax.jit(jaxlrp.lrp(explained(family), jaxlrp.AttnLRP(), argnums=1))
    wanted = np.asarray(explain(variables, texts, target=1))
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), variables)
        found = explain(half, texts.astype(dtype), target=1)
        assert found.dtype == jnp.float32
        for one, other in zip(np.asarray(found), wanted, strict=True):
            cosine = np.vdot(one, other) / np.linalg.norm(one) / np.linalg.norm(other)
            assert cosine >= 0.98  # and not NaN


@pytest.mark.parametrize("family", CAUSAL)
def test_left_padding_gets_no_relevance(family: str) -> None:
    _, variables = model(family)
    text, pad = (np.random.default_rng(s).normal(size=(n, HIDDEN)).astype(np.float32) for s, n in ((0, TOKENS), (1, 2)))
    mask = np.array([0] * 2 + [1] * TOKENS)
    explain = jax.jit(jaxlrp.lrp(explained(family), jaxlrp.AttnLRP(), argnums=1))
    positions = np.array([0, 0, *range(TOKENS)])
    found = explain(variables, np.concatenate([pad, text]), mask=mask, positions=positions, target=2)
    assert not np.any(np.asarray(found)[:2])
    assert close(found[2:], explain(variables, text, target=2))


CONTEXT = 24


@pytest.fixture(scope="module")
def reader() -> tuple[nn.Module, Any, np.ndarray, float]:
    """A small Llama that learnt to spell the licence text, with test texts that it did not see, and its accuracy."""
    text = " ".join((Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").lower().split())
    letters = sorted(set(text))
    ids = np.array([letters.index(letter) for letter in text])
    texts = np.lib.stride_tricks.sliding_window_view(ids, CONTEXT + 1)
    cut = len(texts) * 9 // 10
    train, test = texts[: cut - CONTEXT], texts[cut:]  # no letter is in both
    module = llama.Llama(llama.LlamaConfig(len(letters), 48, 2, 4, 2, 96))
    params = module.init(jax.random.key(0), jnp.zeros((1, CONTEXT), int))
    optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, 400))
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, texts: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = module.apply(params, texts[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    for _ in range(400):
        params, state = step(params, state, jnp.asarray(train[rng.integers(0, len(train), 32)]))
    predicted = np.asarray(module.apply(params, test[:, :-1]))[:, -1].argmax(-1)
    accuracy = float((predicted == test[:, -1]).mean())
    chance = np.bincount(ids).max() / len(ids)
    assert accuracy > 2.5 * chance
    return module, params, test[::50][:4], accuracy


@pytest.mark.heavy
def test_a_trained_reader_is_explained(reader: Any) -> None:
    module, params, texts, _ = reader
    embeddings = module.apply(params, texts[:, :-1], method="embed")
    labels = texts[:, -1]

    def next_letter(params: Any, embeddings: jax.Array) -> jax.Array:
        return module.apply(params, embeddings, method="encode")[..., -1, :]

    explain = jax.jit(jaxlrp.lrp(next_letter, jaxlrp.AttnLRP(), argnums=1))
    together = explain(params, embeddings, target=labels)
    assert together.shape == embeddings.shape
    assert np.all(np.isfinite(together))
    one_by_one = [explain(params, x, target=k) for x, k in zip(embeddings, labels, strict=True)]
    mapped = jax.vmap(lambda x, k: explain(params, x, target=k))(embeddings, labels)
    for found in (np.stack(one_by_one), mapped):
        for a, b in zip(np.asarray(found), np.asarray(together), strict=True):
            assert close(a, b)

    ledger = jax.jit(jaxlrp.ledger(next_letter, jaxlrp.AttnLRP(), argnums=1))(params, embeddings, target=labels)
    ledger.check(rtol=1e-5)
    assert float(ledger.end) == pytest.approx(float(together.sum()), rel=1e-5)
    logits = next_letter(params, embeddings)
    chosen = np.asarray(logits)[np.arange(len(labels)), labels]
    assert float(ledger.start) == pytest.approx(float(chosen.sum()), rel=1e-5)
    # There are no biases: nothing but what the Taylor term of a softmax leaves out is lost.
    lossy = np.abs(np.asarray(ledger.arrived - ledger.handed)) > 1e-5 * np.asarray(ledger.size)
    assert [name.split("/")[-1] for name, yes in zip(ledger.layers, lossy, strict=True) if yes] == ["softmax"] * 2

    conserved = jax.jit(jaxlrp.lrp(next_letter, jaxlrp.CPLRP(epsilon=0.0), argnums=1))
    sums = conserved(params, embeddings, target=labels).sum((-1, -2))
    np.testing.assert_allclose(sums, chosen, rtol=1e-5)  # no biases, and no softmax that it passes
