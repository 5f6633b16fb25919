"""Every rule on every type of linear layer against dense oracles, and what rules promise: sums, signs, errors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import Stabiliser, linearise

import jaxlrp
from jaxlrp import AlphaBeta, Composite, Epsilon, Flat, Gamma, Norm, Pass, WSquare, ZBox, Zero, ZPlus, kind

pytestmark = pytest.mark.usefixtures("x64")

TOLERANCE = 1e-10


def everywhere(rule: jaxlrp.Rule) -> Composite:
    """One rule for all layers that are linear: with weights, without, or nothing but a scale."""
    return Composite((kind("linear"), rule), (kind("sum"), rule), (kind("scale"), rule))


def flatten(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


def off(ours: Any, expected: Any) -> float:
    """Largest absolute difference over largest absolute reference, which may be 0 throughout."""
    ours, expected = flatten(ours), flatten(expected)
    assert ours.shape == expected.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - expected).max() / (np.abs(expected).max() or 1.0))


def explain(rule: jaxlrp.Rule, fun: Callable[..., Any], x: Any, *args: Any, seed: Any = None) -> Any:
    """Relevance of ``x`` from that of the output (by default the output itself)."""
    z, pull = jaxlrp.lrp_vjp(fun, x, *args, composite=everywhere(rule))
    return pull(z if seed is None else jnp.asarray(seed))


# -- the layers ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer ``fun(x, params)``.

    ``stages`` are the layers it consists of where these are several, ``features`` the output axes of one sample.
    """

    fun: Callable[[Any, Any], Any]
    params: Any
    x: Any
    stages: Sequence[Callable[[Any], Any]] = ()
    features: Sequence[int] = (-1,)


CASES: dict[str, Callable[[np.random.Generator], Case]] = {}


def case(name: str) -> Callable[[Any], Any]:
    def add(make: Callable[[np.random.Generator], Case]) -> Any:
        CASES[name] = make
        return make

    return add


def linen(name: str, module: nn.Module, shape: tuple[int, ...], features: Sequence[int] = (-1,)) -> None:
    """Register a Flax module with random variables: BatchNorm gets scales of both signs and positive variances."""

    @case(name)
    def make(rng: np.random.Generator) -> Case:
        x = rng.normal(size=shape)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)

        def draw(path: Any, leaf: Any) -> np.ndarray:
            values = rng.normal(size=leaf.shape)
            return values**2 + 0.1 if path[-1].key == "var" else values

        variables = jax.tree_util.tree_map_with_path(draw, variables)
        return Case(lambda x, v: module.apply(v, x), variables, x, features=features)


def function(
    name: str,
    fun: Callable[..., Any],
    shape: tuple[int, ...],
    *params: tuple[int, ...],
    features: Sequence[int] = (-1,),
) -> None:
    """Register a plain function of the input and of parameters of these shapes."""

    @case(name)
    def make(rng: np.random.Generator) -> Case:
        arrays = tuple(rng.normal(size=s) for s in params)
        return Case(lambda x, p: fun(x, *p), arrays, rng.normal(size=shape), features=features)


def sized(module: Any, *args: Any, **kwargs: Any) -> nn.Module:
    return module(*args, **kwargs, param_dtype=jnp.float64)


class ThenBatchNorm(nn.Module):
    """A layer and a BatchNorm in inference, which the layer absorbs."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=True, param_dtype=jnp.float64)(self.layer(x))


PLANE, VOLUME = (-3, -2, -1), (-4, -3, -2, -1)

linen("dense", sized(nn.Dense, 4), (3, 6))
linen("dense_nobias", sized(nn.Dense, 4, use_bias=False), (3, 6))
linen("dense_one_sample", sized(nn.Dense, 4), (6,))
linen("dense_tokens", sized(nn.Dense, 4), (2, 3, 5))
linen("dense_general_axes", sized(nn.DenseGeneral, 5, axis=(-2, -1)), (2, 3, 4))
linen("dense_general_heads", sized(nn.DenseGeneral, (3, 2), axis=(-1, 1)), (2, 3, 4), (-2, -1))
linen("dense_general_batch", sized(nn.DenseGeneral, 3, axis=-1, batch_dims=(0,)), (2, 3, 4))
linen("dense_batchnorm", ThenBatchNorm(sized(nn.Dense, 4)), (3, 5))
linen("conv1d", sized(nn.Conv, 3, (3,), strides=2, padding="VALID"), (2, 8, 2), (-2, -1))
linen("conv2d_same", sized(nn.Conv, 3, (3, 3)), (2, 4, 4, 2), PLANE)
linen("conv2d_nobias", sized(nn.Conv, 3, (3, 3), use_bias=False), (1, 4, 4, 2), PLANE)
linen("conv2d_one_image", sized(nn.Conv, 3, (3, 3)), (4, 4, 2), PLANE)
linen("conv2d_valid_strided", sized(nn.Conv, 3, (2, 3), strides=(2, 1), padding="VALID"), (2, 5, 5, 2), PLANE)
linen("conv2d_explicit_padding", sized(nn.Conv, 2, (3, 3), padding=((2, 1), (0, 1))), (1, 4, 4, 2), PLANE)
linen("conv2d_circular", sized(nn.Conv, 2, (3, 3), padding="CIRCULAR"), (1, 4, 4, 2), PLANE)
linen("conv2d_dilated", sized(nn.Conv, 2, (2, 2), kernel_dilation=2, padding="VALID"), (1, 5, 5, 2), PLANE)
linen("conv2d_grouped", sized(nn.Conv, 4, (3, 3), feature_group_count=2), (1, 4, 4, 4), PLANE)
linen("conv2d_depthwise", sized(nn.Conv, 6, (3, 3), feature_group_count=3), (1, 4, 4, 3), PLANE)
linen("conv3d", sized(nn.Conv, 2, (2, 2, 2)), (1, 3, 3, 3, 2), VOLUME)
linen("conv_transpose", sized(nn.ConvTranspose, 2, (3, 3), strides=(2, 2)), (1, 3, 3, 2), PLANE)
linen("conv_transpose_valid", sized(nn.ConvTranspose, 3, (2,), strides=(2,), padding="VALID"), (2, 4, 2), (-2, -1))
linen("conv_transpose_kernel", sized(nn.ConvTranspose, 2, (3,), (2,), transpose_kernel=True), (1, 4, 2), (-2, -1))
linen("conv2d_batchnorm", ThenBatchNorm(sized(nn.Conv, 3, (3, 3))), (2, 4, 4, 2), PLANE)
linen("conv_transpose_batchnorm", ThenBatchNorm(sized(nn.ConvTranspose, 2, (2,), (2,))), (1, 4, 2), (-2, -1))
linen("heads_batchnorm", ThenBatchNorm(sized(nn.DenseGeneral, (3, 2), axis=(-1, 1))), (2, 3, 4), (-2, -1))
linen("einsum_module", sized(nn.Einsum, (3, 4), "bi,io->bo"), (2, 3))
linen("batchnorm_alone", nn.BatchNorm(use_running_average=True, param_dtype=jnp.float64), (2, 3, 4))

function("einsum_batched", lambda x, w: jnp.einsum("bhi,hio->bho", x, w), (2, 3, 4), (3, 4, 2))
function("einsum_weight_first", lambda x, w: jnp.einsum("oi,bi->bo", w, x), (2, 4), (3, 4))
function("matrix_times_vector", lambda x, w: w @ x, (4,), (3, 4))
function("matrix_times_columns", lambda x, w, b: w @ x + b[:, None], (4, 2), (3, 4), (3,), features=(0,))
function("dense_scaled", lambda x, w, s, b: (x @ w) * s + b, (2, 4), (4, 3), (3,), (3,))
function("dense_divided", lambda x, w, b: (x @ w + b) / 3.0, (2, 4), (4, 3), (3,))
function("dense_negated", lambda x, w, b: -(x @ w + b), (2, 4), (4, 3), (3,))
function("dense_subtracted", lambda x, w, b: b - x @ w, (2, 4), (4, 3), (3,))
function("dense_split_heads", lambda x, w, b: (x @ w).reshape(2, 3, 2) + b, (2, 4), (4, 6), (3, 2), features=(1, 2))
function(
    "columns_scaled", lambda x, w, s, b: (w @ x + b[:, None]) * s[:, None], (4, 2), (3, 4), (3,), (3,), features=(0,)
)
function("einsum_scaled", lambda x, w, s: s * jnp.einsum("bi,oi->bo", x, w), (2, 4), (3, 4), (3,))
function("batched_scaled", lambda x, w, s: s * (x @ w), (3, 2, 4), (3, 4, 5), (3, 1, 5))
function("scale_and_shift", lambda x, s, b: x * s + b, (2, 4), (4,), (4,))
function("shift", lambda x, b: x + b, (2, 4), (4,))
function("sum", lambda x: x.sum(1), (2, 4, 3))
function("global_mean", lambda x: x.mean((1, 2)), (2, 3, 3, 2))
function("global_mean_keepdims", lambda x: x.mean((1, 2), keepdims=True), (2, 3, 3, 2), features=PLANE)
function("cumsum", lambda x: jnp.cumsum(x, axis=1), (2, 5))
function("cumsum_reversed", lambda x: jax.lax.cumsum(x, axis=0, reverse=True), (5, 2), features=(0,))
function("segment_sum", lambda x: jax.ops.segment_sum(x, jnp.array([0, 1, 0, 2]), num_segments=3), (4, 2))
function("avg_pool", lambda x: nn.avg_pool(x, (2, 2), (2, 2)), (2, 4, 4, 2), features=PLANE)
function("avg_pool_padded", lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME"), (1, 4, 4, 2), features=PLANE)
function(
    "avg_pool_padding_not_counted",
    lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False),
    (1, 4, 4, 2),
    features=PLANE,
)


@case("conv2d_channels_first")
def _channels_first(rng: np.random.Generator) -> Case:
    def conv(x: Any, p: Any) -> Any:
        kernel, scale, shift = p
        z = jax.lax.conv_general_dilated(x, kernel, (1, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return z * scale[:, None, None] + shift[:, None, None]

    params = tuple(rng.normal(size=s) for s in ((3, 2, 2, 3), (3,), (3,)))
    return Case(conv, params, rng.normal(size=(2, 2, 4, 4)), features=PLANE)


@case("dense_scaled_per_sample")
def _scaled_per_sample(rng: np.random.Generator) -> Case:
    # No weight can hold a scale that differs between samples, so that it is a layer of its own.
    w, s = rng.normal(size=(4, 3)), rng.normal(size=(2, 1))
    return Case(lambda x, p: (x @ p[0]) * p[1], (w, s), rng.normal(size=(2, 4)), [lambda x: x @ w, lambda z: z * s])


@case("einsum_transposed_then_scaled")
def _einsum_transposed_then_scaled(rng: np.random.Generator) -> Case:
    # The product comes out as [h, b, o]; the scale behind the transpose belongs to it all the same.
    w, s = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 2))
    stages = [lambda x: s * jnp.einsum("bhi,hio->bho", x, w)]
    return Case(lambda x, p: p[1] * jnp.einsum("bhi,hio->bho", x, p[0]), (w, s), rng.normal(size=(2, 3, 4)), stages)


@case("residual_sum")
def _residual_sum(rng: np.random.Generator) -> Case:
    return Case(lambda ab, _: ab[0] + ab[1], (), (rng.normal(size=(2, 5)), rng.normal(size=(2, 5))))


@case("residual_difference")
def _residual_difference(rng: np.random.Generator) -> Case:
    return Case(lambda ab, _: ab[0] - ab[1], (), (rng.normal(size=(2, 5)), rng.normal(size=(2, 5))))


@case("residual_broadcast")
def _residual_broadcast(rng: np.random.Generator) -> Case:
    # Repeating the vector is a move in front of the sum; its transpose adds up, as the oracle's sum over outputs does.
    return Case(lambda ab, _: ab[0] + ab[1], (), (rng.normal(size=(2, 5)), rng.normal(size=5)))


@case("bilinear_resize")
def _bilinear_resize(rng: np.random.Generator) -> Case:
    # JAX resizes one axis after the other, so that these are two layers.
    def resize(*shape: int) -> Callable[[Any], Any]:
        return lambda x: jax.image.resize(x, shape, "bilinear")

    x = rng.normal(size=(1, 3, 3, 2))
    stages = [resize(1, 5, 3, 2), resize(1, 5, 5, 2)]
    return Case(lambda x, _: resize(1, 5, 5, 2)(x), (), x, stages)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case at fixed numbers, with its stages as the oracle wants them and a random relevance of the output."""

    fun: Callable[[Any, Any], Any]
    params: Any
    x: Any
    layers: list[oracles.Affine]
    r: np.ndarray
    features: Sequence[int]


@functools.cache
def prepare(name: str, sign: str) -> Prepared:
    """Draw numbers and take Jacobians once for all rules; everything kept is NumPy's."""
    rng = np.random.default_rng(sum(map(ord, name)))
    made = CASES[name](rng)
    fun, x = made.fun, made.x
    layer_input = jax.tree.map(plus, x) if sign == "behind relu" else x
    layers = []
    value = layer_input
    for stage in made.stages or [lambda x: made.fun(x, made.params)]:
        layers.append(linearise(stage, value))
        value = np.asarray(stage(value))
    if sign == "behind relu":  # lets the library know that inputs are not negative

        def fun(x: Any, params: Any) -> Any:
            return made.fun(jax.tree.map(jax.nn.relu, x), params)

    return Prepared(fun, made.params, x, layers, rng.normal(size=value.shape), made.features)


def plus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


# -- the rules -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """A rule and the oracle's messages, bias option and stabiliser for it."""

    rule: jaxlrp.Rule
    messages: oracles.Message
    bias: str = "absorb"
    stab: Stabiliser = oracles.DEFAULT


def proportion_of_size(z: Any) -> Any:
    """Serve as a stabiliser of the user's own."""
    return 0.01 + 0.1 * abs(z)


SETTINGS = {
    "zero": Setting(Zero(), oracles.epsilon, stab=Stabiliser(0.0)),
    "zero_ignore": Setting(Zero(bias="ignore"), oracles.epsilon, "ignore", Stabiliser(0.0)),
    "zero_redistribute": Setting(Zero(bias="redistribute"), oracles.epsilon, "redistribute", Stabiliser(0.0)),
    "epsilon": Setting(Epsilon(), oracles.epsilon),
    "epsilon_0.25": Setting(Epsilon(0.25), oracles.epsilon, stab=Stabiliser(0.25)),
    "epsilon_clip": Setting(Epsilon(0.5, clip=True), oracles.epsilon, stab=Stabiliser(0.5, clip=True)),
    "epsilon_callable": Setting(Epsilon(proportion_of_size), oracles.epsilon, stab=Stabiliser(proportion_of_size)),
    "epsilon_ignore": Setting(Epsilon(0.1, bias="ignore"), oracles.epsilon, "ignore", Stabiliser(0.1)),
    "epsilon_redistribute": Setting(
        Epsilon(0.1, bias="redistribute"), oracles.epsilon, "redistribute", Stabiliser(0.1)
    ),
    "norm": Setting(Norm(), oracles.epsilon),
    "zplus": Setting(ZPlus(), oracles.zplus),
    "zplus_0.25": Setting(ZPlus(epsilon=0.25), oracles.zplus, stab=Stabiliser(0.25)),
    "zplus_clip": Setting(ZPlus(epsilon=0.5, clip=True), oracles.zplus, stab=Stabiliser(0.5, clip=True)),
    "zplus_ignore": Setting(ZPlus(bias="ignore"), oracles.zplus, "ignore"),
    "zplus_redistribute": Setting(ZPlus(bias="redistribute"), oracles.zplus, "redistribute"),
    "alpha1beta0": Setting(AlphaBeta(1.0, 0.0), oracles.alpha_beta(1, 0)),
    "alpha2beta1": Setting(AlphaBeta(2.0, 1.0), oracles.alpha_beta(2, 1)),
    "alpha1.5beta0.5": Setting(AlphaBeta(1.5, 0.5, epsilon=0.1), oracles.alpha_beta(1.5, 0.5), stab=Stabiliser(0.1)),
    "alpha2beta1_ignore": Setting(AlphaBeta(bias="ignore"), oracles.alpha_beta(2, 1), "ignore"),
    "alpha2beta1_redistribute": Setting(AlphaBeta(bias="redistribute"), oracles.alpha_beta(2, 1), "redistribute"),
    "gamma_0": Setting(Gamma(0.0), oracles.gamma(0)),
    "gamma_0.25": Setting(Gamma(0.25), oracles.gamma(0.25)),
    "gamma_10": Setting(Gamma(10.0, epsilon=0.1), oracles.gamma(10), stab=Stabiliser(0.1)),
    "gamma_ignore": Setting(Gamma(0.25, bias="ignore"), oracles.gamma(0.25), "ignore"),
    "gamma_redistribute": Setting(Gamma(0.25, bias="redistribute"), oracles.gamma(0.25), "redistribute"),
    "wsquare": Setting(WSquare(), oracles.wsquare),
    "wsquare_ignore": Setting(WSquare(bias="ignore"), oracles.wsquare, "ignore"),
    "wsquare_redistribute": Setting(WSquare(bias="redistribute"), oracles.wsquare, "redistribute"),
    "flat": Setting(Flat(), oracles.flat),
    "flat_redistribute": Setting(Flat(epsilon=0.5, bias="redistribute"), oracles.flat, "redistribute", Stabiliser(0.5)),
    "zbox": Setting(ZBox(-3.0, 3.0), oracles.zbox(-3, 3)),
    "zbox_one_sided": Setting(ZBox(0.0, 4.0, epsilon=0.1), oracles.zbox(0, 4), stab=Stabiliser(0.1)),
}

# "Behind relu": nonnegative with some exact zeros, in a way that an analysis of signs can see.
SIGNS = ("mixed", "behind relu")


# Every case with every setting takes minutes: one case in four runs by default, all of them in CI.
NAMES = [pytest.param(name, marks=[pytest.mark.heavy] if i % 4 else []) for i, name in enumerate(CASES)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_rule_equals_its_dense_formula(name: str, setting: str) -> None:
    chosen = SETTINGS[setting]
    if name == "bilinear_resize" and setting.startswith("flat"):
        pytest.skip("w := 1 also wires up what the interpolation matrix holds zeros for")
    for sign in SIGNS:
        made = prepare(name, sign)
        expected = made.r
        for layer in reversed(made.layers):
            expected = oracles.relevance(chosen.messages, layer, expected, bias=chosen.bias, stab=chosen.stab)
        ours = explain(chosen.rule, made.fun, made.x, made.params, seed=made.r)
        assert jax.tree.structure(ours) == jax.tree.structure(made.x)
        assert off(ours, expected) < TOLERANCE, sign


def test_relevance_behind_a_layer_that_looks_at_weights_alone() -> None:
    """Flat and w² send relevance to units that a relu has switched off; gamma below must still share it there."""
    rng = np.random.default_rng(1)
    w, v, b = rng.normal(size=(5, 6)), rng.normal(size=(6, 3)), rng.normal(size=6)
    x, r = np.abs(rng.normal(size=(4, 5))), rng.normal(size=(4, 3))
    lower = linearise(lambda x: x @ w + b, x)
    assert (lower.z < 0).any()
    upper = linearise(lambda y: y @ v, plus(lower.z.reshape(4, 6)))
    for above in ("epsilon", "flat", "wsquare", "zbox"):
        for below in ("gamma_0.25", "alpha2beta1", "gamma_redistribute"):
            composite = Composite((kind("linear"), SETTINGS[below].rule), (jaxlrp.last("linear"), SETTINGS[above].rule))
            _, pull = jaxlrp.lrp_vjp(
                lambda x, w, b, v: jax.nn.relu(jax.nn.relu(x) @ w + b) @ v, x, w, b, v, composite=composite
            )
            expected = oracles.relevance(SETTINGS[above].messages, upper, r)
            expected = oracles.relevance(SETTINGS[below].messages, lower, expected, bias=SETTINGS[below].bias)
            assert off(pull(r), expected) < TOLERANCE, (above, below)


def test_one_branch_alone_that_is_known_to_be_nonnegative() -> None:
    rng = np.random.default_rng(6)
    a, b, r = rng.normal(size=(3, 2, 5))
    layer = linearise(lambda ab: ab[0] - ab[1], (plus(a), b))
    for setting in ("zplus", "alpha2beta1", "gamma_0.25"):
        ours = explain(SETTINGS[setting].rule, lambda ab: jax.nn.relu(ab[0]) - ab[1], (a, b), seed=r)
        assert off(ours, oracles.relevance(SETTINGS[setting].messages, layer, r)) < TOLERANCE, setting


@pytest.mark.parametrize("combine", [jnp.add, jnp.multiply], ids=["add", "multiply"])
def test_negative_integers_leave_inputs_of_unknown_sign(combine: Callable[..., Any]) -> None:
    """An offset that is cast from integers can be negative like any other; a relu in front of it proves nothing."""
    rng = np.random.default_rng(7)
    x, w, r = rng.normal(size=(2, 4)), rng.normal(size=(4, 3)), rng.normal(size=(2, 3))
    shift = np.array([-3, 1, -1, 2])
    layer = linearise(lambda y: y @ w, combine(plus(x), shift))
    composite = Composite((kind("linear"), ZPlus()), (kind("add"), Pass()))  # scales let relevance pass anyway

    def model(x: Any, shift: Any, w: Any) -> Any:
        return combine(jax.nn.relu(x), shift) @ w

    _, pull = jaxlrp.lrp_vjp(model, x, shift, w, composite=composite)
    assert off(pull(r), oracles.relevance(oracles.zplus, layer, r)) < TOLERANCE


def test_repeated_padding_is_a_move_of_its_own() -> None:
    """Edge padding repeats pixels: an input may reach an output by several paths, each with its own sign."""
    rng = np.random.default_rng(2)
    x, kernel, r = rng.normal(size=(1, 4, 1)), rng.normal(size=(3, 1, 2)), rng.normal(size=(1, 4, 2))
    pad = ((0, 0), (1, 1), (0, 0))

    def conv(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    layer = linearise(lambda x: conv(x, kernel), np.pad(x, pad, mode="edge"))
    repeat = linearise(lambda x: jnp.pad(x, pad, mode="edge"), x)
    for setting in ("epsilon", "zplus", "alpha2beta1", "gamma_0.25", "wsquare", "flat", "zbox"):
        chosen = SETTINGS[setting]
        ours = explain(chosen.rule, lambda x, k: conv(jnp.pad(x, pad, mode="edge"), k), x, kernel, seed=r)
        expected = repeat.w.T @ oracles.relevance(chosen.messages, layer, r)
        assert off(ours, expected) < TOLERANCE, setting


# -- stabilisers -----------------------------------------------------------------------------------

NORM_SCALED = ("dense", "dense_one_sample", "conv2d_same", "conv2d_one_image", "conv_transpose", "conv2d_batchnorm")


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", NORM_SCALED)
def test_stabiliser_relative_to_the_size_of_one_sample(name: str, clip: bool) -> None:
    made = prepare(name, "mixed")
    stab = Stabiliser(0.25, clip=clip, norm_scale=True, features=made.features)
    for rule, messages in ((Epsilon, oracles.epsilon), (ZPlus, oracles.zplus)):
        ours = explain(rule(epsilon=0.25, clip=clip, norm_scale=True), made.fun, made.x, made.params, seed=made.r)
        assert off(ours, oracles.relevance(messages, made.layers[0], made.r, stab=stab)) < TOLERANCE


@pytest.mark.parametrize("scope", ["channel", "position", "everywhere"])
def test_stabiliser_may_be_an_array(scope: str) -> None:
    made = prepare("conv2d_same", "mixed")
    shape = {"channel": (3,), "position": (4, 4, 1), "everywhere": (2, 4, 4, 3)}[scope]
    epsilon = np.random.default_rng(3).uniform(0.0, 1.0, shape)
    stab = Stabiliser(epsilon)
    for rule, messages in (
        (Epsilon(jnp.asarray(epsilon)), oracles.epsilon),
        (Gamma(0.5, epsilon=epsilon), oracles.gamma(0.5)),
        (ZBox(-3.0, 3.0, epsilon=epsilon), oracles.zbox(-3, 3)),
    ):
        ours = explain(rule, made.fun, made.x, made.params, seed=made.r)
        assert off(ours, oracles.relevance(messages, made.layers[0], made.r, stab=stab)) < TOLERANCE


def test_callable_stabiliser_crosses_jit_as_a_partial() -> None:
    made = prepare("dense", "mixed")
    rule = Epsilon(jax.tree_util.Partial(proportion_of_size))
    run = jax.jit(lambda rule, x, r: explain(rule, made.fun, x, made.params, seed=r))
    stab = Stabiliser(proportion_of_size)
    assert off(run(rule, made.x, made.r), oracles.relevance(oracles.epsilon, made.layers[0], made.r, stab=stab)) < 1e-10


W_CANCELS = np.array([[1.0], [1.0]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Zero(), [0.0, 0.0]),  # 0/0 is 0 by contract
        (Epsilon(0.5), [4.0, -4.0]),  # sign(0) = +1
        (Epsilon(0.5, clip=True), [4.0, -4.0]),
        (Epsilon(0.0), [0.0, 0.0]),
        (Gamma(0.25), [0.0, 0.0]),  # neither sign of output is favoured
        (ZPlus(epsilon=0.0), [1.0, 0.0]),
        (AlphaBeta(2.0, 1.0, epsilon=0.0), [2.0, -1.0]),
    ],
    ids=str,
)
def test_output_of_exactly_zero(rule: jaxlrp.Rule, expected: list[float]) -> None:
    x = np.array([2.0, -2.0])
    assert explain(rule, lambda x, w: x @ w, x, W_CANCELS, seed=[1.0]).tolist() == expected


def test_derivatives_at_an_output_of_exactly_zero() -> None:
    """Nothing is handed on there, whatever arrives; a quotient that is only hidden would leave NaN behind."""

    def handed(x: jax.Array, arrives: jax.Array) -> jax.Array:
        weight = jnp.array([[1.0, 2.0], [-1.0, 3.0]])  # [1, 1] gives 0 and 5
        _, pull = jaxlrp.lrp_vjp(lambda x: x @ weight, x, composite=Zero(bias="ignore"))
        return (pull(arrives) ** 2).sum()

    at = jnp.array([1.0, 1.0]), jnp.array([7.0, 5.0])
    np.testing.assert_allclose(handed(*at), 2.0**2 + 3.0**2, rtol=1e-12)
    for derivative in jax.tree.leaves([jax.grad(handed, (0, 1))(*at), jax.hessian(handed, (0, 1))(*at)]):
        assert np.isfinite(derivative).all()
    assert float(jax.grad(handed, 1)(*at)[0]) == 0.0


@pytest.mark.parametrize("rule", [Epsilon(0.5), Epsilon(0.5, clip=True), ZPlus(epsilon=0.5)], ids=str)
def test_stabiliser_keeps_the_sign_of_negative_outputs(rule: jaxlrp.Rule) -> None:
    w = np.array([[1.0], [-1.0]])
    below, above = explain(rule, lambda x, w: x @ w, np.array([[1.0, 3.0], [3.0, 1.0]]), w, seed=[[-1.0], [1.0]])
    if isinstance(rule, Epsilon):  # the mirror image
        np.testing.assert_allclose(below[::-1], -above)
    else:  # always relative to the positive part, 1 and 3
        np.testing.assert_allclose([below[0], above[0]], [-1 / 1.5, 3 / 3.5])


# -- worked by hand --------------------------------------------------------------------------------


def two_by_two(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    return w @ x + b


HAND = (np.array([1.0, 2.0]), np.array([[3.0, 4.0], [5.0, 6.0]]), np.array([7.0, 8.0]))
ONE = (np.array([1.0, 1.0]), np.array([[1.0, -1.0]]), np.array([-1.0]))


def test_zero_by_hand() -> None:
    relevance = explain(Zero(), two_by_two, *HAND, seed=[1 / 3, 2 / 3])
    np.testing.assert_allclose(relevance, [17 / 90, 316 / 675], rtol=1e-15)


def test_epsilon_by_hand() -> None:
    """The default stabiliser shifts the fractions of LRP-0 in the seventh digit, by as much as its formula says."""
    relevance = explain(Epsilon(), two_by_two, *HAND, seed=[1 / 3, 2 / 3])
    a, b = (1 / 3) / (18 + 1e-6), (2 / 3) / (25 + 1e-6)
    np.testing.assert_allclose(relevance, [3 * a + 5 * b, 8 * a + 12 * b], rtol=1e-14)
    assert 1e-9 < off(relevance, [17 / 90, 316 / 675]) < 1e-6


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (AlphaBeta(1.0, 0.0, epsilon=0.0), [-1.0, 0.0]),
        (AlphaBeta(2.0, 1.0, epsilon=0.0), [-2.0, 0.5]),
        (ZPlus(epsilon=0.0), [-1.0, 0.0]),
        (AlphaBeta(2.0, 1.0, epsilon=0.0, bias="ignore"), [-2.0, 1.0]),
        (AlphaBeta(2.0, 1.0, epsilon=0.0, bias="redistribute"), [-1.6, 0.6]),  # 0.5 missing, spread 4 : 1
        (Gamma(1.0, epsilon=0.0), [1 / 3, -2 / 3]),  # z = -1 < 0: (1, -2) over -1 - 2
        (Zero(), [1.0, -1.0]),
        (WSquare(epsilon=0.0), [-1 / 3, -1 / 3]),
        (Flat(epsilon=0.0), [-0.5, -0.5]),
        (ZBox(0.0, 2.0, epsilon=0.0), [-0.5, -0.5]),  # (1 - 0, -1 + 2) over 2
    ],
    ids=str,
)
def test_signs_by_hand(rule: jaxlrp.Rule, expected: list[float]) -> None:
    relevance = explain(rule, two_by_two, *ONE, seed=[-1.0])
    np.testing.assert_allclose(relevance, expected, rtol=1e-15, atol=1e-15)


# -- residual sums ---------------------------------------------------------------------------------

RESIDUALS = [
    jaxlrp.Residual(),
    jaxlrp.Residual("ratio", epsilon=0.5),
    jaxlrp.Residual("abs"),
    jaxlrp.Residual("equal"),
    jaxlrp.Residual("branch"),
    jaxlrp.Residual("branch", branch=1),
]


@pytest.mark.parametrize("rule", RESIDUALS, ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["add", "sub"])
def test_residual_policies(rule: jaxlrp.Residual, sign: int) -> None:
    rng = np.random.default_rng(4)
    a, b, r = rng.normal(size=(3, 2, 5))

    def add(ab: Any) -> Any:
        return ab[0] + ab[1] if sign == 1 else ab[0] - ab[1]

    ours = explain(rule, add, (a, b), seed=r)
    expected = oracles.residual(rule.policy, a, sign * b, r, branch=rule.branch, epsilon=rule.epsilon)
    assert off(ours, expected) < TOLERANCE
    if rule.policy != "ratio":  # shares between 0 and 1 that make up the whole
        assert all((share >= 0).all() and (share <= 1).all() for share in (o / r for o in ours))
        np.testing.assert_allclose(ours[0] + ours[1], r, rtol=1e-4)


def test_residual_of_a_repeated_summand() -> None:
    rng = np.random.default_rng(5)
    a, b, r = rng.normal(size=(2, 5)), rng.normal(size=5), rng.normal(size=(2, 5))
    ours = explain(jaxlrp.Residual("abs"), lambda ab: ab[0] + ab[1], (a, b), seed=r)
    one, other = oracles.residual("abs", a, np.broadcast_to(b, a.shape), r)
    assert off(ours, (one, other.sum(0))) < TOLERANCE


def test_absolute_shares_do_not_blow_up_where_branches_cancel() -> None:
    pair = (np.array([1.0]), np.array([-1.0 + 1e-9]))
    ratio, absolute = (
        explain(jaxlrp.Residual(policy), lambda ab: ab[0] + ab[1], pair, seed=[1.0]) for policy in ("ratio", "abs")
    )
    assert abs(ratio[0][0]) > 1e5
    np.testing.assert_allclose(flatten(absolute), [0.5, 0.5], rtol=1e-5)


# -- errors, each with a message that says what to do ----------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlphaBeta(2.0, 2.0), r"alpha and beta must be at least 0 and alpha - beta 1, not 2\.0, 2\.0"),
        (lambda: AlphaBeta(0.0, -1.0), r"beta must be at least 0, not -1"),
        (lambda: Gamma(-0.5), r"gamma must be at least 0, not -0\.5"),
        (lambda: Gamma(math.nan), r"gamma must be at least 0, not nan"),
        (lambda: Epsilon(-1e-6), r"epsilon must be at least 0, not -1e-06"),
        (lambda: Epsilon(math.nan), r"epsilon must be at least 0, not nan"),
        (lambda: ZPlus(epsilon=-1), r"epsilon must be at least 0, not -1"),
        (lambda: Flat(epsilon=-1), r"epsilon must be at least 0, not -1"),
        (lambda: Zero(bias="drop"), r"bias must be \"absorb\", \"ignore\" or \"redistribute\", not 'drop'"),
        (lambda: ZBox(1.0, 0.0), r"low must not exceed high, got low=1\.0 and high=0\.0"),
        (lambda: jaxlrp.Residual("half"), r"policy must be \"ratio\", \"abs\", \"equal\" or \"branch\", not 'half'"),
    ],
)
def test_rules_refuse_wrong_numbers(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


@pytest.mark.parametrize(
    ("rule", "bound", "shape"),
    [
        (ZBox(np.zeros(2), 1.0), "low", r"\(2,\)"),
        (ZBox(0.0, np.ones((5, 2, 3))), "high", r"\(5, 2, 3\)"),
    ],
)
def test_box_that_does_not_fit_the_input(rule: ZBox, bound: str, shape: str) -> None:
    message = rf"ZBox: {bound} of shape {shape} does not broadcast to the input \(2, 3\) of layer 'dense'"
    with pytest.raises(ValueError, match=message):
        explain(rule, dense, np.ones((2, 3)), np.ones((3, 4)))


@pytest.mark.parametrize(
    ("rule", "fun", "message"),
    [
        (jaxlrp.Pass(), lambda x: x.sum(1), r"Pass\(\) needs .* 'sum' \(sum/sum\) maps \(2, 3\) to \(2,\)"),
        (jaxlrp.Pass(), lambda x: x + x[::-1], r"Pass\(\) .* layer 'add' \(sum/add\) has 2 inputs and 1 outputs"),
        (jaxlrp.Residual(), lambda x: x.sum(1), r"Residual\(\) is for sums of two values, not for layer 'sum'"),
        (jaxlrp.Residual("branch", branch=2), lambda x: x + x[::-1], r"'add' has 2 summands and no branch 2"),
        (jaxlrp.Residual("branch", branch=-1), lambda x: x + x[::-1], r"'add' has 2 summands and no branch -1"),
    ],
)
def test_rules_refuse_layers_they_are_not_for(rule: jaxlrp.Rule, fun: Callable[..., Any], message: str) -> None:
    with pytest.raises(jaxlrp.RuleError, match=message):
        explain(rule, fun, np.ones((2, 3)))


def test_pass_refuses_a_layer_of_another_width() -> None:
    with pytest.raises(jaxlrp.RuleError, match=r"Pass\(\).*'dense'"):
        explain(jaxlrp.Pass(), dense, np.ones((2, 3)), np.ones((3, 4)))


@pytest.mark.parametrize("rule", [Gamma(), ZPlus(), AlphaBeta(), Flat(), WSquare(), ZBox(0.0, 1.0)], ids=str)
def test_rules_for_linear_layers_refuse_others(rule: jaxlrp.Rule) -> None:
    composite = Composite((kind("activation"), rule))
    with pytest.raises(jaxlrp.RuleError, match=r"layer 'tanh' .* is not linear; give it a rule for activation layers"):
        jaxlrp.lrp(jnp.tanh, composite)(np.ones(3))


def test_rule_that_returns_the_wrong_shape_is_named() -> None:
    class Wrong(jaxlrp.Rule):
        def fold(self, call: jaxlrp.LayerCall, *relevance: jax.Array) -> Any:
            return relevance

    with pytest.raises(jaxlrp.RuleError, match=r"Wrong\(\) of layer 'dense' must return one array per input"):
        explain(Wrong(), dense, np.ones((2, 3)), np.ones((3, 4)))


# -- rules of one's own, and rules as values -------------------------------------------------------


class Damped(jaxlrp.SplitRule):
    def shares(self, relevance: jax.Array, z: jax.Array) -> Any:
        return [(relevance, 1.0, 0.5)]


def damped(layer: oracles.Affine, r: np.ndarray, bias: str, stab: Stabiliser) -> np.ndarray:
    def halve(a: np.ndarray) -> np.ndarray:
        return np.where(a < 0, a / 2, a)

    return oracles.proportional(halve(layer.w * layer.x), halve(layer.b), r, layer.shape, bias, stab)


@pytest.mark.parametrize("bias", ["absorb", "ignore", "redistribute"])
@pytest.mark.parametrize("name", ["dense", "conv2d_same", "conv2d_batchnorm", "residual_difference", "avg_pool"])
def test_rule_of_ones_own_in_one_line(name: str, bias: Any) -> None:
    for sign in SIGNS:
        made = prepare(name, sign)
        ours = explain(Damped(bias=bias), made.fun, made.x, made.params, seed=made.r)
        assert off(ours, oracles.relevance(damped, made.layers[0], made.r, bias=bias)) < TOLERANCE


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Epsilon(), "Epsilon()"),
        (Epsilon(0.25, norm_scale=True), "Epsilon(epsilon=0.25, norm_scale=True)"),
        (Gamma(10.0), "Gamma(gamma=10)"),
        (AlphaBeta(1.0, 0.0), "AlphaBeta(alpha=1, beta=0)"),
        (ZBox(np.zeros(3), 1.0), "ZBox(low=array[3], high=1)"),
        (jaxlrp.Pass(), "Pass()"),
        (Damped(), "Damped()"),
    ],
)
def test_rules_print_what_is_not_default(rule: jaxlrp.Rule, text: str) -> None:
    assert str(rule) == text


def test_repr_of_a_rule_shows_every_number() -> None:
    text = repr(Gamma(0.5))
    assert text.startswith("Gamma(")
    assert "gamma=0.5" in text
    assert "epsilon=1e-06" in text


def test_numbers_of_rules_are_leaves_and_options_are_not() -> None:
    assert sorted(jax.tree.leaves(Gamma(0.5, epsilon=0.1, clip=True))) == [0.1, 0.5]
    assert jax.tree.structure(Gamma(0.5)) == jax.tree.structure(Gamma(2.0))
    assert jax.tree.structure(Gamma(0.5)) != jax.tree.structure(Gamma(0.5, bias="ignore"))


@pytest.mark.parametrize(
    "setting", ["epsilon_0.25", "zplus_0.25", "alpha2beta1", "alpha1beta0", "gamma_0.25", "gamma_redistribute", "zbox"]
)
def test_rules_cross_jit_as_arguments(setting: str) -> None:
    """Their numbers are traced then: what is decided by looking at them must come out the same."""
    made = prepare("conv2d_same", "mixed")
    rule = SETTINGS[setting].rule
    run = jax.jit(lambda rule, x, params, r: explain(rule, made.fun, x, params, seed=r))
    outside = explain(rule, made.fun, made.x, made.params, seed=made.r)
    assert off(run(rule, made.x, made.params, made.r), outside) < TOLERANCE


GAMMAS = np.array([0.0, 0.25, 10.0])
SWEPT = (
    *("dense", "dense_tokens", "dense_general_batch", "einsum_weight_first", "conv1d", "conv2d_same", "avg_pool"),
    *("conv2d_valid_strided", "conv2d_dilated", "conv2d_grouped", "conv2d_depthwise", "conv_transpose"),
    *("conv2d_batchnorm", "conv3d"),
)


@pytest.mark.parametrize("rows", [1, 10**9], ids=["one by one", "together"])
@pytest.mark.parametrize("sign", ["mixed", "behind relu"])
@pytest.mark.parametrize("name", SWEPT)
def test_a_sweep_over_gamma_is_a_vmap(name: str, sign: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlrp.rules._sweep._ROWS", rows)
    made = prepare(name, sign)
    apart = [explain(Gamma(float(g)), made.fun, made.x, made.params, seed=made.r) for g in GAMMAS]
    with jax.checking_leaks():
        swept = jax.jit(jax.vmap(lambda g: explain(Gamma(g), made.fun, made.x, made.params, seed=made.r)))(GAMMAS)
    assert off(swept, jnp.stack(apart)) < 1e-12
    if len(made.layers) == 1:
        for gamma, relevance in zip(GAMMAS, swept, strict=True):
            assert off(relevance, oracles.relevance(oracles.gamma(gamma), made.layers[0], made.r)) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 10**9], ids=["one by one", "together"])
@pytest.mark.parametrize("name", ["dense", "conv2d_same", "conv2d_valid_strided", "conv2d_depthwise"])
def test_sweeps_over_gamma_of_samples_and_of_weights(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlrp.rules._sweep._ROWS", rows)
    made = prepare(name, "mixed")
    of = jax.jit(lambda gamma, x, params: explain(Gamma(gamma), made.fun, x, params, seed=made.r))
    x = made.x * np.array([1.0, -0.5]).reshape(2, *[1] * made.x.ndim)
    params = jax.tree.map(lambda a: np.stack([a, -2 * a]), made.params)
    pick = lambda i: jax.tree.map(lambda a: a[i], params)  # noqa: E731
    want = np.array([[[of(g, a, pick(i)) for a in x] for g in GAMMAS] for i in range(2)])
    over = {"params": (None, None, 0), "gamma": (0, None, None), "x": (None, 0, None)}
    for order in ("params", "gamma", "x"), ("x", "gamma", "params"), ("gamma", "x", "params"):
        run: Any = of
        for each in reversed(order):
            run = jax.vmap(run, over[each])
        axes = [list(over).index(each) for each in order]
        assert off(run(GAMMAS, x, params), want.transpose(*axes, *range(3, want.ndim))) < 1e-12
    zipped = jax.vmap(of)(GAMMAS[:2], x, params)
    assert off(zipped, want[[0, 1], [0, 1], [0, 1]]) < 1e-12


def test_every_sample_may_have_a_gamma_of_its_own() -> None:
    made = prepare("dense", "mixed")
    gammas = np.array([[0.0], [0.25], [10.0]])
    each = [explain(Gamma(float(g)), made.fun, made.x, made.params, seed=made.r)[i] for i, g in enumerate(gammas[:, 0])]
    assert off(explain(Gamma(gammas), made.fun, made.x, made.params, seed=made.r), jnp.stack(each)) < 1e-12


@pytest.mark.parametrize("name", ["dense", "conv2d_same", "conv2d_valid_strided", "conv2d_depthwise"])
def test_relevance_has_derivatives_by_gamma(name: str) -> None:
    made = prepare(name, "mixed")
    of = jax.jit(lambda g, x=made.x: explain(Gamma(g), made.fun, x, made.params, seed=made.r))
    step = 1e-5
    slope = (of(0.25 + step) - of(0.25 - step)) / (2 * step)
    assert off(jax.jacfwd(of)(0.25), slope) < 1e-7
    assert off(jax.jacrev(of)(0.25), slope) < 1e-7
    assert off(jax.vmap(jax.jacrev(of))(GAMMAS)[1], slope) < 1e-7
    assert off(jax.jacrev(jax.vmap(of))(GAMMAS)[1, ..., 1], slope) < 1e-7
    # by what is explained: as with a gamma that the compiler knows
    squares = lambda x, g: (explain(Gamma(g), made.fun, x, made.params, seed=made.r) ** 2).sum()  # noqa: E731
    assert off(jax.jit(jax.grad(squares))(made.x, 0.25), jax.jit(lambda x: jax.grad(squares)(x, 0.25))(made.x)) < 1e-12


def test_single_precision_in_single_precision_out() -> None:
    made = prepare("conv2d_same", "mixed")
    x, params, r = jax.tree.map(lambda a: np.asarray(a, np.float32), (made.x, made.params, made.r))
    for setting in ("zero_ignore", "zplus", "gamma_0.25", "zbox"):
        chosen = SETTINGS[setting]
        ours = explain(chosen.rule, made.fun, x, params, seed=r)
        expected = oracles.relevance(chosen.messages, made.layers[0], made.r, bias=chosen.bias, stab=chosen.stab)
        assert ours.dtype == jnp.float32
        assert off(ours, expected) < 1e-3


# -- what rules promise, on random layers ----------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)


def random_layer(seed: int, nonnegative: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw input, weights, bias and relevance of a small dense layer; shapes are fixed so that nothing recompiles."""
    rng = np.random.default_rng(seed)
    x, w, b, r = rng.normal(size=(2, 4)), rng.normal(size=(4, 3)), rng.normal(size=3), rng.normal(size=(2, 3))
    return (np.abs(x) if nonnegative else x), w, b, r


def biased(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w + b


# Rules are arguments of the compiled function, so that all examples share one program.
compiled = jax.jit(explain, static_argnums=1)


@given(seed=seeds, epsilon=st.floats(1e-9, 1.0))
def test_without_bias_only_the_stabiliser_takes(seed: int, epsilon: float) -> None:
    """Of every output's relevance at most the fraction ``epsilon / (|z| + epsilon)`` is lost."""
    x, w, _, r = random_layer(seed)
    relevance = compiled(Epsilon(epsilon), dense, x, w, seed=r)
    size = np.abs(x @ w)
    bound = (np.abs(r) * epsilon / (size + epsilon)).sum(1)
    missing = np.abs(r.sum(1) - relevance.sum(1))
    scale = (np.abs(r) * (np.abs(x) @ np.abs(w)) / (size + epsilon)).sum(1)  # what cancels in the sums above
    assert (missing <= bound + 1e-13 * scale).all()


REDISTRIBUTING = [
    Zero(bias="redistribute"),
    Epsilon(0.5, bias="redistribute"),
    Epsilon(0.1, norm_scale=True, bias="redistribute"),
    AlphaBeta(epsilon=0.1, bias="redistribute"),
    Gamma(0.25, epsilon=0.5, bias="redistribute"),
    WSquare(bias="redistribute"),
    Flat(epsilon=0.5, bias="redistribute"),
    Damped(epsilon=0.1, bias="redistribute"),
    ZPlus(epsilon=0.1, bias="redistribute"),
]


@pytest.mark.parametrize("rule", REDISTRIBUTING, ids=str)
@given(seed=seeds)
def test_redistribution_conserves_every_sample(rule: jaxlrp.SplitRule, seed: int) -> None:
    x, w, b, r = random_layer(seed)
    c = x[:, :, None] * w
    # z+ has nothing to go by where no contribution is positive; then relevance is dropped by contract
    assume((c > 0).any(1).all())
    relevance = compiled(rule, biased, x, w, b, seed=r)
    size = np.abs(relevance).sum(1) + np.abs(r).sum(1)
    # cancellation: a near-zero denominator makes huge messages of both signs
    size += (np.abs(r) * np.abs(c).sum(1) / np.abs(x @ w + b)).sum(1)
    assert (np.abs(relevance.sum(1) - r.sum(1)) <= 1e-12 * size).all()


def test_redistribution_drops_what_has_no_contribution_of_its_sign() -> None:
    x, w = np.array([1.0, 2.0]), np.array([[-1.0], [-2.0]])
    assert not compiled(ZPlus(bias="redistribute"), biased, x, w, np.array([7.0]), seed=[1.0]).any()


SPREAD = Epsilon(0.1, bias="redistribute")
LINEAR_IN_R = [Epsilon(0.1), SPREAD, ZPlus(), AlphaBeta(), Gamma(), WSquare(), Flat(), ZBox(-4.0, 4.0)]


@pytest.mark.parametrize("rule", LINEAR_IN_R, ids=str)
@given(seed=seeds, factor=st.floats(-10, 10))
def test_relevance_is_linear_in_the_seed(rule: jaxlrp.Rule, seed: int, factor: float) -> None:
    x, w, b, r = random_layer(seed)
    other = np.roll(r, 1)

    def pull(r: np.ndarray) -> jax.Array:
        return compiled(rule, biased, x, w, b, seed=r)

    together, apart = pull(r + factor * other), pull(r) + factor * pull(other)
    scale = np.abs(pull(r)).max() + abs(factor) * np.abs(pull(other)).max()
    assert np.abs(together - apart).max() <= 1e-11 * scale


POSITIVE = [ZPlus(), ZPlus(bias="ignore"), ZPlus(bias="redistribute"), WSquare(), Flat()]


@pytest.mark.parametrize("rule", POSITIVE, ids=str)
@given(seed=seeds)
def test_positive_relevance_stays_positive(rule: jaxlrp.Rule, seed: int) -> None:
    x, w, b, r = random_layer(seed)
    assert (compiled(rule, biased, x, w, b, seed=np.abs(r)) >= 0).all()


@given(seed=seeds)
def test_box_keeps_relevance_of_inputs_inside_positive(seed: int) -> None:
    x, w, b, r = random_layer(seed)
    # At the box's faces relevance is 0 up to rounding, of either sign: leave a margin.
    box = ZBox(x.min(0) - 0.5, x.max(0) + 0.5)
    assert (compiled(box, biased, x, w, b, seed=np.abs(r)) > 0).all()


@given(seed=seeds)
def test_gamma_of_zero_is_epsilon(seed: int) -> None:
    x, w, b, r = random_layer(seed)
    plain, gamma = (compiled(rule, biased, x, w, b, seed=r) for rule in (Epsilon(), Gamma(0.0)))
    assert off(gamma, plain) < 1e-12


@given(seed=seeds)
def test_alpha_1_beta_0_is_zplus(seed: int) -> None:
    x, w, b, r = random_layer(seed)
    zplus, alpha = (compiled(rule, biased, x, w, b, seed=r) for rule in (ZPlus(), AlphaBeta(1.0, 0.0)))
    assert off(alpha, zplus) < 1e-14


@given(seed=seeds)
def test_large_gamma_is_zplus_where_outputs_are_positive(seed: int) -> None:
    x, w, b, r = random_layer(seed)
    r = np.where(x @ w + b > 0, r, 0.0)
    assume(r.any())
    zplus, gamma = (compiled(rule, biased, x, w, b, seed=r) for rule in (ZPlus(epsilon=0.0), Gamma(1e9, epsilon=0.0)))
    assert off(gamma, zplus) < 1e-6


@given(seed=seeds)
def test_rules_agree_where_nothing_is_negative(seed: int) -> None:
    x, w, b, r = random_layer(seed, nonnegative=True)
    w, b = np.abs(w), np.abs(b)
    plain = compiled(Zero(), biased, x, w, b, seed=r)
    for rule in (ZPlus(epsilon=0.0), Gamma(3.0, epsilon=0.0), AlphaBeta(1.0, 0.0, epsilon=0.0)):
        assert off(compiled(rule, biased, x, w, b, seed=r), plain) < 1e-12


@given(seed=seeds)
def test_a_box_with_arrays_at_its_corners(seed: int) -> None:
    """Corners per feature and per entry equal the dense formula, bias or none."""
    x, w, b, r = random_layer(seed)
    rng = np.random.default_rng(seed)
    layer = linearise(lambda x: x @ w + b, x)
    for shape in ((4,), (2, 4)):
        low, high = -rng.uniform(0, 3, shape), rng.uniform(0, 3, shape)
        corners = (np.broadcast_to(a, x.shape).ravel() for a in (low, high))
        ours = compiled(ZBox(low, high), biased, x, w, b, seed=r)
        assert off(ours, oracles.relevance(oracles.zbox(*corners), layer, r)) < 1e-9


@pytest.mark.parametrize("returned", [np.ones(3), [np.ones(3)], [(np.ones(3), 1.0)]])
def test_shares_of_the_wrong_form_are_refused(returned: Any) -> None:
    class Bad(jaxlrp.SplitRule):
        def shares(self, relevance: Any, z: Any) -> Any:
            return returned

    with pytest.raises(jaxlrp.RuleError, match=r"Bad\.shares must return a list"):
        jaxlrp.lrp(lambda x, w: x @ w, Bad())(np.ones((2, 3)), np.ones((3, 3)))
