"""What jaxlrp refuses, and whether the message says where and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jaxlrp
from jaxlrp import registry

X = np.array([[1.0, -2.0, 3.0], [0.5, 1.5, -1.0]], np.float32)
W = np.array([[1.0, 2.0], [-1.0, 0.5], [0.3, 1.0]], np.float32)
SQUARE = np.eye(3, dtype=np.float32) + 0.1


def refused(error: type[Exception], *words: str) -> Any:
    """Expect an error of jaxlrp's own whose message holds all of these."""
    pattern = "(?s)" + "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(error, match=pattern)


def dense(x: Any, w: Any) -> Any:
    return x @ w


def mlp(*layers: Any) -> tuple[nn.Module, Any]:
    model = nn.Sequential(list(layers) or [nn.Dense(4), nn.relu, nn.Dense(2)])
    return model, model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)


# --- operations without a meaning ---------------------------------------------------------------

triple_p = Primitive("triple")
triple_p.def_impl(lambda x: 3 * x)
triple_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(triple_p, mlir.lower_fun(lambda x: 3 * x, multiple_results=False))


def triple(x: Any) -> Any:
    return triple_p.bind(x)


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test teaches is forgotten after it."""
    monkeypatch.setattr(registry, "_PRIMITIVES", dict(registry._PRIMITIVES))
    monkeypatch.setattr(registry, "_CUSTOM_LAYERS", dict(registry._CUSTOM_LAYERS))


UNKNOWN: dict[str, tuple[Callable[..., Any], str]] = {
    "triple": (triple, "triple"),
    "fft": (lambda x: jnp.fft.fft(x).real, "(fft|convert_element_type)"),
    "rfft": (lambda x: jnp.abs(jnp.fft.rfft(x)), "fft"),
    "inverse": (lambda x: jnp.linalg.inv(x[:, :2] @ x[:, :2].T), "(lu|triangular_solve|custom_lin)"),
    "cholesky": (lambda x: jnp.linalg.cholesky(x @ x.T + jnp.eye(2)), "cholesky"),
    "product": (lambda x: jnp.cumprod(x, -1) @ jnp.ones(3), "cumprod"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operation_is_named_with_its_place_and_what_to_do(name: str) -> None:
    fun, primitive = UNKNOWN[name]
    with refused(
        jaxlrp.UnknownPrimitiveError,
        f"primitive '{primitive}'",
        r"test_errors\.py:\d+",
        "jaxlrp.register_rule",
        "jaxlrp.custom_layer",
    ):
        jaxlrp.lrp(fun)(X)


def test_an_unknown_operation_in_a_module_names_the_module() -> None:
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return triple(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Odd(name="odd_one")(nn.Dense(2)(x))

    params = Net().init(jax.random.key(0), X)
    with refused(jaxlrp.UnknownPrimitiveError, "odd_one", "triple"):
        jaxlrp.lrp(Net())(params, X)


def test_an_unknown_operation_is_a_not_implemented_error_too() -> None:
    with pytest.raises(NotImplementedError):
        jaxlrp.lrp(triple)(X)


def test_it_is_found_by_trace_too() -> None:
    with refused(jaxlrp.UnknownPrimitiveError, "triple"):
        jaxlrp.trace(triple, X)


@pytest.mark.parametrize("fun", [jnp.linalg.inv, triple, lambda w: jnp.fft.fft(w).real])
def test_an_unknown_operation_on_the_weight_side_is_fine(fun: Callable[..., Any]) -> None:
    relevance = jaxlrp.lrp(lambda x, w: x @ fun(w))(X, SQUARE)
    np.testing.assert_allclose(relevance, jaxlrp.lrp(dense)(X, np.asarray(fun(SQUARE))), rtol=1e-5)


@pytest.mark.parametrize("primitive", [triple_p, "triple"])
def test_a_taught_operation_works(primitive: Any, clean_registry: None) -> None:
    jaxlrp.register_rule(primitive, kind="activation")
    relevance = jaxlrp.lrp(lambda x, w: triple(x) @ w)(X, W)
    np.testing.assert_allclose(relevance, jaxlrp.lrp(dense)(X, 3 * W), rtol=1e-5)


@pytest.mark.parametrize("kind", ["activation", "custom"])
def test_a_taught_operation_takes_the_rule_it_was_given(kind: str, clean_registry: None) -> None:
    jaxlrp.register_rule("triple", kind=kind, rule=jaxlrp.Pass())
    layers = jaxlrp.trace(triple, X)
    (assigned,) = jaxlrp.EpsilonPlus().assign(layers)
    assert (assigned.layer.kind, assigned.layer.op) == (kind, "triple")
    assert (assigned.rule, assigned.reason) == (jaxlrp.Pass(), "register_rule")


def test_the_registry_is_restored() -> None:
    assert registry.registered(triple_p) is None


def test_only_some_kinds_can_be_taught() -> None:
    with pytest.raises(ValueError, match=r"'linear'.*choose one of: activation, move"):
        jaxlrp.register_rule("triple", kind="linear")


def test_a_custom_layer_hides_what_is_inside(clean_registry: None) -> None:
    @jaxlrp.custom_layer("spectrum", jaxlrp.Pass())
    def spectrum(x: Any) -> Any:
        return jnp.abs(jnp.fft.fft(x))

    (layer,) = jaxlrp.trace(spectrum, X)
    assert (layer.kind, layer.op) == ("custom", "spectrum")
    np.testing.assert_allclose(jaxlrp.lrp(spectrum)(X), np.abs(np.fft.fft(X)), rtol=1e-5)


# --- control flow -----------------------------------------------------------------------------------


def by_while(x: Any) -> Any:
    return lax.while_loop(lambda c: jnp.sum(c) < 100, lambda c: 2 * jnp.abs(c), x)


def by_scan(x: Any) -> Any:
    return lax.scan(lambda c, _: (jnp.tanh(c), None), x, None, length=3)[0]


def by_cond(x: Any) -> Any:
    return lax.cond(x[0, 0] > 0, jnp.tanh, jnp.sin, x)


def test_a_loop_without_known_end_is_refused() -> None:
    with refused(jaxlrp.UnsupportedError, "primitive 'while'", r"test_errors\.py:\d+", "fori_loop"):
        jaxlrp.lrp(by_while)(X)


def test_opaque_kernels_are_refused_with_the_switch() -> None:
    pallas = pytest.importorskip("jax.experimental.pallas")

    def double(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = 2 * x_ref[...]

    kernel = lambda x: pallas.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)  # noqa: E731
    with refused(
        jaxlrp.UnsupportedError, "pallas_call", r"test_errors\.py:\d+", 'implementation="xla"', "custom_layer"
    ):
        jaxlrp.lrp(kernel)(X)
    callback = lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)  # noqa: E731
    with refused(jaxlrp.UnsupportedError, "pure_callback", r"test_errors\.py:\d+", "custom_layer"):
        jaxlrp.lrp(callback)(X)


def test_a_lookup_inside_of_a_scan_is_refused() -> None:
    def model(ids: Any, table: Any) -> Any:
        return lax.scan(lambda h, i: (h + table[i], None), jnp.zeros(3), ids)[0]

    with refused(jaxlrp.UnsupportedError, "embedding", r"test_errors\.py:\d+", "before it"):
        jaxlrp.lrp(model)(np.array([0, 1]), np.ones((2, 3), np.float32))


@pytest.mark.parametrize("fun", [by_while, by_scan, by_cond])
def test_control_flow_over_weights_is_fine(fun: Callable[..., Any]) -> None:
    assert np.isfinite(jaxlrp.lrp(lambda x, w: x @ fun(w))(X, SQUARE)).all()


# --- arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [np.ones((2, 3), int), np.ones((2, 3), np.uint8), np.ones((2, 3), bool)])
def test_what_is_no_real_number_is_refused(x: np.ndarray) -> None:
    with refused(jaxlrp.InputError, "argument 0", x.dtype.name, "astype", "argnums"):
        jaxlrp.lrp(dense)(x, W)


@pytest.mark.parametrize("x", [3, True, "text"])
def test_what_is_no_array_is_refused(x: Any) -> None:
    with refused(jaxlrp.InputError, "argument 0", type(x).__name__, "argnums"):
        jaxlrp.lrp(lambda x, w: w)(x, W)


def test_complex_input_is_refused() -> None:
    with refused(jaxlrp.InputError, "complex64", "real numbers"):
        jaxlrp.lrp(lambda x: jnp.abs(x))(X.astype(np.complex64))


def test_complex_numbers_on_the_way_are_refused() -> None:
    with refused(jaxlrp.LRPError, "complex"):
        jaxlrp.lrp(lambda x: jnp.abs(lax.complex(x, 2 * x)))(X)


def test_whole_numbers_that_look_nothing_up_are_refused() -> None:
    tokens = np.array([[0, 3]])
    with refused(jaxlrp.InputError, "argument 0", "int64|int32", "token ids that the model looks embeddings up by"):
        jaxlrp.lrp(lambda tokens, w: jnp.where(tokens > 0, 1.0, 2.0) @ w)(tokens, np.ones((2, 3), np.float32))


@pytest.mark.parametrize("argnums", [2, -3, (0, 5)])
def test_argnums_out_of_range(argnums: Any) -> None:
    with refused(jaxlrp.InputError, "argnums=", "2 positional arguments"):
        jaxlrp.lrp(dense, argnums=argnums)(X, W)


def test_a_model_called_without_its_input() -> None:
    model, params = mlp()
    with refused(jaxlrp.InputError, "argnums=1", "1 positional"):
        jaxlrp.lrp(model)(params)


def test_an_argument_that_holds_nothing() -> None:
    with refused(jaxlrp.InputError, "argument 0 has nothing to explain"):
        jaxlrp.lrp(lambda x, w: w)({}, W)


@pytest.mark.parametrize("fun", [lambda x, w: w, lambda x, w: jnp.argmax(x @ w, -1), lambda x, w: x > 0])
def test_an_output_that_does_not_depend_on_the_input(fun: Callable[..., Any]) -> None:
    with refused(jaxlrp.InputError, "no output", "depends", "argnums"):
        jaxlrp.lrp(fun)(X, W)


def test_an_integer_output_beside_the_logits_is_left_alone() -> None:
    (logits, choice), relevance = jaxlrp.value_and_lrp(lambda x, w: (x @ w, jnp.argmax(x @ w, -1)))(X, W)
    np.testing.assert_array_equal(choice, np.argmax(X @ W, -1))
    np.testing.assert_allclose(relevance.sum(), logits.sum(), rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finds_bad_numbers_in_the_input(bad: float) -> None:
    x = X.copy()
    x[0, 1] = bad
    with refused(jaxlrp.InputError, "argument 0", "1 of 6 numbers are NaN or infinite"):
        jaxlrp.lrp(dense, check=True)(x, W)


def test_check_names_the_parameter() -> None:
    model, params = mlp()
    params = jax.tree.map(np.array, params)
    params["params"]["layers_2"]["kernel"][0, 0] = np.nan
    with refused(jaxlrp.InputError, "params/layers_2/kernel", "1 of 8 numbers"):
        jaxlrp.lrp(model, check=True)(params, X)


def test_check_names_the_parameter_of_nnx() -> None:
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    model.layers[0].kernel[...] = jnp.full((3, 2), jnp.inf)
    with refused(jaxlrp.InputError, "layers/0/kernel", "6 of 6 numbers"):
        jaxlrp.lrp(model, check=True)(model, X)


def test_check_needs_numbers() -> None:
    with refused(jaxlrp.InputError, "check=True", "outside jax.jit"):
        jax.jit(jaxlrp.lrp(dense, check=True))(X, W)


@pytest.mark.parametrize("low", [0.0, np.array([0.0, -2.0, 0.0])])
def test_check_sees_inputs_outside_of_the_box(low: Any) -> None:
    rules = jaxlrp.Composite.uniform(jaxlrp.ZBox(low, 3.0))
    outside = 2 if np.ndim(low) == 0 else 1
    with refused(jaxlrp.InputError, f"{outside} of 6 inputs lie outside", r"ZBox\(", "from -2 to 3", "preprocessing"):
        jaxlrp.lrp(dense, rules, check=True)(X, W)
    assert jnp.isfinite(jaxlrp.lrp(dense, rules)(X, W)).all()
    misshapen = jaxlrp.Composite.uniform(jaxlrp.ZBox(np.zeros(5), 3.0))
    with refused(ValueError, r"low of shape \(5,\) does not broadcast"):
        jaxlrp.lrp(dense, misshapen, check=True)(X, W)
    pixels = X + np.float32(1e-6)  # as rounding in normalisation may leave them
    assert jaxlrp.lrp(dense, jaxlrp.Composite.uniform(jaxlrp.ZBox(-2.0, 3.0)), check=True)(pixels, W).shape == X.shape


def test_check_lets_good_numbers_through() -> None:
    model, params = mlp()
    assert jaxlrp.lrp(model, check=True)(params, X).shape == X.shape


# --- targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [2, -1, np.array([0, 2])])
def test_a_class_out_of_range(target: Any) -> None:
    with refused(jaxlrp.InputError, "class (2|-1) is out of range", "0 to 1"):
        jaxlrp.lrp(dense)(X, W, target=target)


def test_a_target_for_every_sample_but_one() -> None:
    with refused(jaxlrp.InputError, r"\(3,\)", r"\(2, 2\)", r"array of shape \(2,\)"):
        jaxlrp.lrp(dense)(X, W, target=np.array([0, 1, 1]))


def test_one_hot_labels_are_no_classes() -> None:
    with refused(jaxlrp.InputError, r"shape \(2, 2\) do not fit", r"argmax\(-1\)"):
        jaxlrp.lrp(dense)(X, W, target=np.array([[0, 1], [1, 0]]))


def test_a_target_that_was_not_called() -> None:
    with refused(jaxlrp.InputError, r"give targets.predicted\(\)"):
        jaxlrp.lrp(dense)(X, W, target=jaxlrp.targets.predicted)


def test_a_list_of_classes_may_be_traced() -> None:
    explain = jaxlrp.lrp(dense)
    traced = jax.jit(lambda labels: explain(X, W, target=labels))([0, 1])
    np.testing.assert_allclose(traced, explain(X, W, target=[0, 1]), rtol=1e-6)


def test_relevance_to_pull_back_of_the_wrong_shape() -> None:
    _, pull = jaxlrp.lrp_vjp(dense, X, W)
    with refused(jaxlrp.InputError, "pull back", r"own shape \(2, 2\), not \(\)"):
        pull(3)


def test_lrp_vjp_is_told_its_composite_by_name() -> None:
    with refused(TypeError, "composite=..."):
        jaxlrp.lrp_vjp(dense, jaxlrp.EpsilonPlus(), X, W)
    with refused(TypeError, "composite=..."):
        jaxlrp.lrp_vjp(dense, X, W, jaxlrp.EpsilonPlus())


@pytest.mark.parametrize("target", [1.0, "cat", True, np.array([0.0, 1.0])])
def test_a_target_of_the_wrong_type(target: Any) -> None:
    with refused(jaxlrp.InputError, "target must be None, class indices"):
        jaxlrp.lrp(dense)(X, W, target=target)


def test_weights_of_outputs_are_a_function() -> None:
    with refused(jaxlrp.InputError, "not float32", "weights of the outputs: target=lambda output"):
        jaxlrp.lrp(dense)(X, W, target=jnp.eye(2))


def test_a_boolean_array_is_no_target() -> None:
    with refused(jaxlrp.InputError, "target must be None, class indices"):
        jaxlrp.lrp(dense)(X, W, target=np.array([True, False]))


def test_something_that_is_no_array_is_no_target() -> None:
    with refused(jaxlrp.InputError, "target must be None, class indices"):
        jaxlrp.lrp(dense)(X, W, target={"class": 1})


def test_a_target_function_of_the_wrong_shape() -> None:
    with refused(jaxlrp.InputError, r"own shape \(2, 2\)", r"\(2,\)"):
        jaxlrp.lrp(dense)(X, W, target=lambda out: out[:, 0])


def test_a_class_of_several_outputs() -> None:
    with refused(jaxlrp.InputError, "one output array", "function of the output"):
        jaxlrp.lrp(lambda x, w: (x @ w, x))(X, W, target=0)


def test_a_class_of_a_scalar() -> None:
    with refused(jaxlrp.InputError, "one output array"):
        jaxlrp.lrp(lambda x: jnp.sum(x))(X, target=0)


# --- composites and rules --------------------------------------------------------------------------------------


def explained(*entries: Any) -> Any:
    model, params = mlp()
    return jaxlrp.lrp(model, jaxlrp.EpsilonPlus().extend(*entries))(params, X)


def test_an_unknown_layer_name_shows_near_ones() -> None:
    with refused(jaxlrp.UnknownLayerError, "'layer_0'", "did you mean", "'layers_0'"):
        explained((jaxlrp.name("layer_0"), jaxlrp.Zero()))


def test_a_glob_without_a_match() -> None:
    with refused(jaxlrp.UnknownLayerError, r"'\*\*/head'", "did you mean"):
        explained((jaxlrp.name("**/head"), jaxlrp.Zero()))


def test_the_name_of_a_module_that_another_absorbed() -> None:
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.relu, nn.Dense(2)])
    rules = jaxlrp.EpsilonPlus().extend((jaxlrp.name("layers_1"), jaxlrp.Zero()))
    with refused(jaxlrp.UnknownLayerError, "'layers_1'; what it names is part of 'layers_0'"):
        jaxlrp.lrp(model, rules)(model.init(jax.random.key(0), X), X)


def test_the_name_of_a_module_with_layers_of_its_own() -> None:
    model = nn.Sequential([nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4)]), nn.Dense(2)])
    variables = model.init(jax.random.key(0), X)
    for explain in (
        jaxlrp.lrp(model, jaxlrp.EpsilonPlus().extend((jaxlrp.name("layers_0"), jaxlrp.Zero()))),
        jaxlrp.layerwise_lrp(model, capture="layers_0"),
    ):
        with refused(jaxlrp.UnknownLayerError, r"'layers_0'; layers inside of .* 'layers_0/\*\*'"):
            explain(variables, X)


@pytest.mark.parametrize("select", [jaxlrp.kind, jaxlrp.first, jaxlrp.last])
def test_an_unknown_kind_shows_near_ones(select: Callable[..., Any]) -> None:
    with refused(jaxlrp.UnknownLayerError, "'liner'", "did you mean", "'linear'"):
        explained((select("liner"), jaxlrp.Zero()))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("BatchNorm_0", "scale"),
        ("LayerNorm", "normalization"),
        ("self_attention", "softmax"),
        ("LSTMCell", "recurrence"),
    ],
)
def test_the_name_of_a_kind_of_module_says_what_it_is_here(module: str, kind: str) -> None:
    with refused(jaxlrp.UnknownLayerError, repr(module), repr(kind)):
        explained((jaxlrp.kind(module), jaxlrp.Zero()))


@pytest.mark.parametrize("kind", ["conv", "linear/conv"])
def test_a_known_kind_that_the_model_lacks_is_fine(kind: str) -> None:
    assert explained((jaxlrp.kind(kind), jaxlrp.Zero())).shape == X.shape


def test_a_kind_as_tables_print_it() -> None:
    both = jaxlrp.EpsilonPlus().extend((jaxlrp.kind("linear/dense"), jaxlrp.Flat()))
    model, params = mlp()
    rules = {a.reason for a in both.assign(jaxlrp.trace(model, params, X)) if a.layer.kind == "linear"}
    assert rules == {'kind("linear/dense")'}
    with refused(jaxlrp.UnknownLayerError, "'linear/relu'"):
        explained((jaxlrp.kind("linear/relu"), jaxlrp.Zero()))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((jaxlrp.kind("linear"), jaxlrp.Epsilon), r"Epsilon is a class; give an instance: Epsilon\("),
        ((jaxlrp.kind("linear"), "epsilon"), "'epsilon' is no rule"),
        ((jaxlrp.kind("linear"), None), "None is no rule"),
        (jaxlrp.Epsilon(), "pairs"),
        ((jaxlrp.kind("linear"),), "pairs"),
        (("linear", jaxlrp.Epsilon()), r"'linear' selects no layers; use kind\(...\)"),
    ],
)
def test_an_entry_that_is_none(entry: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        jaxlrp.Composite(entry)


@pytest.mark.parametrize("composite", ["epsilon", jaxlrp.Epsilon, jaxlrp.EpsilonPlus, 0.1])
def test_a_composite_of_the_wrong_type(composite: Any) -> None:
    with pytest.raises(TypeError, match="composite must be a Composite, a Rule or None"):
        jaxlrp.lrp(dense, composite)


@pytest.mark.parametrize(
    "composite",
    [jaxlrp.Composite(), jaxlrp.Composite((jaxlrp.kind("conv"), jaxlrp.ZPlus()))],
)
def test_a_linear_layer_without_a_rule(composite: jaxlrp.Composite) -> None:
    model, params = mlp()
    with refused(jaxlrp.NoRuleError, "'layers_0'", "linear/dense", r'jaxlrp.kind\("linear"\)'):
        jaxlrp.lrp(model, composite)(params, X)


@pytest.mark.parametrize("rule", [jaxlrp.ZPlus(), jaxlrp.Gamma(), jaxlrp.ZBox(0.0, 1.0), jaxlrp.WSquare()])
def test_a_rule_for_linear_layers_on_an_activation(rule: jaxlrp.Rule) -> None:
    with refused(jaxlrp.RuleError, "relu", "not linear", "Pass"):
        explained((jaxlrp.kind("activation"), rule))


def test_pass_on_a_layer_that_mixes() -> None:
    with refused(jaxlrp.RuleError, "Pass", "'layers_2'"):
        explained((jaxlrp.name("layers_2"), jaxlrp.Pass()))


def test_pass_on_a_sum_of_two() -> None:
    composite = jaxlrp.EpsilonPlus().extend((jaxlrp.kind("add"), jaxlrp.Pass()))
    with refused(jaxlrp.RuleError, "'add'", "2 inputs"):
        jaxlrp.lrp(lambda x, w: x + x @ w, composite)(X, SQUARE)


def test_residual_on_a_dense_layer() -> None:
    with refused(jaxlrp.RuleError, "Residual", "'layers_0'", "Epsilon"):
        explained((jaxlrp.name("layers_0"), jaxlrp.Residual()))


class Transposed(jaxlrp.Rule):
    def fold(self, call: jaxlrp.LayerCall, *relevance: jax.Array) -> Any:
        return (relevance[0].T,)


class Bare(jaxlrp.Rule):
    def fold(self, call: jaxlrp.LayerCall, *relevance: jax.Array) -> Any:
        return jnp.zeros(call.inputs[0].shape)


class Twice(jaxlrp.Rule):
    def fold(self, call: jaxlrp.LayerCall, *relevance: jax.Array) -> Any:
        return relevance[0], relevance[0]


@pytest.mark.parametrize("rule", [Transposed(), Bare(), Twice()])
def test_a_rule_of_ones_own_that_returns_other_shapes(rule: jaxlrp.Rule) -> None:
    with refused(jaxlrp.RuleError, type(rule).__name__, "one array per input", r"\(2, 4\)"):
        explained((jaxlrp.kind("relu"), rule))


@pytest.mark.parametrize("capture", ["**/Conv_*", ["**", "nothing"]])
def test_capturing_what_is_not_there(capture: Any) -> None:
    model, params = mlp()
    with refused(jaxlrp.UnknownLayerError, "Conv_|nothing", "layers_0", "layers_2"):
        jaxlrp.layerwise_lrp(model, capture=capture)(params, X)


# --- training mode ------------------------------------------------------------------------------------------------


def test_dropout_left_on() -> None:
    model, params = mlp(nn.Dense(4), nn.Dropout(0.5, deterministic=False), nn.Dense(2))
    with refused(jaxlrp.NotDeterministicError, "layers_1", "deterministic=True"):
        jaxlrp.lrp(model)(params, X, rngs={"dropout": jax.random.key(0)})


def test_dropout_left_on_without_random_numbers() -> None:
    model, params = mlp(nn.Dense(4), nn.Dropout(0.5, deterministic=False), nn.Dense(2))
    with refused(jaxlrp.NotDeterministicError, "deterministic=True"):
        jaxlrp.lrp(model)(params, X)


def test_random_numbers_that_are_no_dropout_layer() -> None:
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(2)(x + jax.random.normal(self.make_rng("noise"), x.shape))

    model = Noisy()
    params = model.init({"params": jax.random.key(0), "noise": jax.random.key(1)}, X)
    with refused(jaxlrp.NotDeterministicError, "random numbers"):
        jaxlrp.lrp(model)(params, X)
    with refused(jaxlrp.NotDeterministicError, "random numbers", "deterministic=True"):
        jaxlrp.lrp(model)(params, X, rngs={"noise": jax.random.key(0)})


def test_dropout_of_rate_zero_is_fine() -> None:
    model, params = mlp(nn.Dense(4), nn.Dropout(0.0, deterministic=False), nn.Dense(2))
    assert jaxlrp.lrp(model)(params, X).shape == X.shape


@pytest.mark.parametrize(
    "part", [lambda model: nnx.state(model, nnx.Param), nnx.split], ids=["parameters alone", "graph and state"]
)
def test_a_part_of_an_nnx_state(part: Callable[..., Any]) -> None:
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    model.eval()
    explain = jaxlrp.lrp(model)
    np.testing.assert_array_equal(explain(nnx.state(model), X), explain(model, X))
    with refused(TypeError, "all of its state", r"nnx.state\(model\), x\), 6 arrays"):
        explain(part(model), X)


def test_parameters_without_their_collection() -> None:
    model, variables = mlp()
    with pytest.raises(flax.errors.FlaxError) as caught:
        jaxlrp.lrp(model)(variables["params"], X)
    assert any('explain({"params": params, ...}, x)' in note for note in caught.value.__notes__)


def test_a_target_by_position() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: Any = False) -> Any:
            return nn.Dense(2)(x) if train else nn.Dense(3)(x)

    model, labels = Net(), np.array([0, 1])
    with pytest.raises(ValueError, match="truth value") as caught:
        jaxlrp.lrp(model)(model.init(jax.random.key(0), X), X, labels)
    assert any("a target comes by name: target=labels" in note for note in caught.value.__notes__)


def test_dropout_left_on_in_nnx() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    with refused(jaxlrp.NotDeterministicError, "layers/1", r"model\.eval\(\)"):
        jaxlrp.lrp(model)(model, X)
    model.eval()
    assert jaxlrp.lrp(model)(model, X).shape == X.shape


def mask_by_mul(x: Any, key: Any) -> Any:
    return x * jax.random.bernoulli(key, 0.5, x.shape) / 0.5


def mask_by_where(x: Any, key: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0.0)


def noise(x: Any, key: Any) -> Any:
    return x + jax.random.normal(key, x.shape)


@pytest.mark.parametrize("fun", [mask_by_mul, mask_by_where, noise])
@pytest.mark.parametrize("new_style", [True, False])
@pytest.mark.parametrize("after", [False, True])
def test_a_random_mask_in_a_plain_function(fun: Callable[..., Any], new_style: bool, after: bool) -> None:
    key = jax.random.key(0) if new_style else jax.random.PRNGKey(0)
    model = (lambda x, w, k: fun(x @ w, k)) if after else (lambda x, w, k: fun(x, k) @ w)
    with refused(jaxlrp.NotDeterministicError, "random numbers", r"test_errors\.py:\d+", "deterministic=True"):
        jaxlrp.lrp(model)(X, W, key)


def test_a_key_among_the_arguments_is_fine() -> None:
    relevance = jaxlrp.lrp(lambda x, w, k: x @ w)(X, W, jax.random.key(0))
    np.testing.assert_allclose(relevance, jaxlrp.lrp(dense)(X, W))


def test_random_weights_of_a_matrix_product() -> None:
    with refused(jaxlrp.NotDeterministicError, "random numbers"):
        jaxlrp.lrp(lambda x, w, k: x @ (w * jax.random.bernoulli(k, 0.5, w.shape)))(X, W, jax.random.key(0))


def test_batch_statistics_left_on() -> None:
    model, params = mlp(nn.Dense(4), nn.BatchNorm(use_running_average=False))
    with refused(jaxlrp.NotDeterministicError, "layers_1", "use_running_average=True", "train=False"):
        jaxlrp.lrp(model, has_aux=True)(params, X, mutable=["batch_stats"])


def test_batch_statistics_left_on_by_an_argument() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            return nn.BatchNorm(name="stats")(x, not train)

    params = Net().init(jax.random.key(0), X, train=False)
    with refused(jaxlrp.NotDeterministicError, "stats", "train=False"):
        jaxlrp.lrp(Net())(params, X, train=True, mutable=["batch_stats"])
    assert jaxlrp.lrp(Net())(params, X, train=False).shape == X.shape


def test_batch_statistics_left_on_in_nnx() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    with refused(jaxlrp.NotDeterministicError, "layers/1", "statistics of the batch", r"model\.eval\(\)"):
        jaxlrp.lrp(model)(model, X)


def test_a_module_switched_back_to_training_after_lrp() -> None:
    # lrp() keeps what it saw of the module; a later train() must not slip dropout in unseen.
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    model.eval()
    explain = jaxlrp.lrp(model)
    first = explain(model, X)
    model.train()
    np.testing.assert_array_equal(explain(model, X), first)


# --- models --------------------------------------------------------------------------------------------------------


def test_the_models_own_error_says_what_jaxlrp_was_doing() -> None:
    model, params = mlp()
    with pytest.raises(Exception, match=r"kernel|shape") as caught:
        jaxlrp.lrp(model)(params, X[:, :2])
    assert not isinstance(caught.value, jaxlrp.LRPError)
    notes = "\n".join(caught.value.__notes__)
    assert "jaxlrp was tracing the model" in notes
    assert "float32[2, 2]" in notes


def test_a_bug_of_the_model_keeps_its_type() -> None:
    def broken(x: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        jaxlrp.lrp(broken)(X)
    assert "jaxlrp" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("model", [None, 3, "resnet", {"params": W}])
def test_a_model_of_the_wrong_type(model: Any) -> None:
    with pytest.raises(TypeError, match=rf"flax.linen.Module.*nnx.Module.*not {type(model).__name__}"):
        jaxlrp.lrp(model)


@pytest.mark.parametrize("model", [nn.Dense, nnx.Linear])
def test_a_module_class_instead_of_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"instance|class"):
        jaxlrp.lrp(model)


@pytest.mark.parametrize(
    "error", [e for e in vars(jaxlrp).values() if isinstance(e, type) and issubclass(e, Exception)]
)
def test_all_errors_have_one_base(error: type[Exception]) -> None:
    assert issubclass(error, jaxlrp.LRPError)
    assert error.__doc__
