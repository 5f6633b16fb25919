"""Many ways to write the same operation, in every library and by hand, with the function whose derivative is its LRP.

A `Group` is one operation. Its ``spellings`` compute the same numbers, and so does ``lrp``, but with the derivative
that makes gradient x input LRP: the scale of a normalisation is held constant (``const``), an activation hands
relevance through, the two factors of a product get half each. Nothing here knows how jaxlrp works.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

Array = jax.Array
Function = Callable[[Array, dict[str, Array]], Array]
const = lax.stop_gradient
EPS = 1e-3  # of every normalisation: large enough to show if it stood in the wrong place


@dataclasses.dataclass(frozen=True)
class Group:
    """One operation in many spellings, each a function of its input and a dict of parameters.

    Attributes:
        shape: of the input, with a batch axis.
        lrp: the operation, with the derivative that gradient x input needs to be LRP.
        layers: the kinds of layers that it is made of, moves left out.
        params: shapes of the parameters.
        single: spellings that compute in single precision inside.
    """

    shape: tuple[int, ...]
    lrp: Function
    layers: str
    spellings: dict[str, Function]
    params: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    single: tuple[str, ...] = ()


# -- libraries: modules made inside of the function, holding the parameters that it is given -------------------------


def linen(module: nn.Module, path: str = "", **names: str) -> Function:
    """A Linen module; ``names`` are its parameters and the group's."""

    def call(x: Array, p: dict[str, Array], **kwargs: Any) -> Array:
        params = {theirs: p[ours] for theirs, ours in names.items()}
        return module.apply({"params": {path: params} if path else params}, x, **kwargs)

    return call


def in_nnx(make: Callable[[], nnx.Module], **names: str) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        module = make()
        for theirs, ours in names.items():
            getattr(module, theirs)[...] = p[ours]
        return module(x)

    return call


def keras(make: Callable[[Any], Any], *names: str, **kwargs: Any) -> Function:
    """A Keras layer; ``names`` are the group's parameters in the order of the layer's."""

    def call(x: Array, p: dict[str, Array]) -> Array:
        with jax.ensure_compile_time_eval():
            layer = make(pytest.importorskip("keras").layers)
            layer.build(x.shape)
        state = [v.value for v in layer.non_trainable_variables]
        return layer.stateless_call([p[name] for name in names], state, x, **kwargs)[0]

    return call


def keras_function(name: str, **kwargs: Any) -> Function:
    return lambda x, p: getattr(pytest.importorskip("keras").activations, name)(x, **kwargs)


def equinox(make: Callable[[Any], Any], channels_first: bool = False, **names: str) -> Function:
    """An Equinox module for one sample."""

    def call(x: Array, p: dict[str, Array]) -> Array:
        eqx = pytest.importorskip("equinox")
        module = make(eqx.nn)
        for theirs, ours in names.items():
            module = eqx.tree_at(lambda m, name=theirs: getattr(m, name), module, p[ours])
        if channels_first:
            return jnp.moveaxis(jax.vmap(module)(jnp.moveaxis(x, -1, 1)), 1, -1)
        return jax.vmap(module)(x)

    return call


def haiku(make: Callable[[Any], Any], name: str, **names: str) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        hk = pytest.importorskip("haiku")
        params = {theirs: p[ours] for theirs, ours in names.items()}
        return hk.without_apply_rng(hk.transform(lambda x: make(hk)(x))).apply({name: params}, x)

    return call


def by_hand(function: Callable[[Array], Array]) -> Function:
    return lambda x, p: function(x)


# -- LayerNorm -------------------------------------------------------------------------------------------------------


def mean(x: Array, axis: Any = -1, where: Any = None) -> Array:
    return jnp.mean(x, axis, keepdims=True, where=where)


def var(x: Array, axis: Any = -1) -> Array:
    return jnp.var(x, axis, keepdims=True)


def held(axis: Any = -1, where: Any = None) -> Function:
    """LayerNorm with its standard deviation held constant."""

    def call(x: Array, p: dict[str, Array]) -> Array:
        centred = x - mean(x, axis, where)
        return centred / const(jnp.sqrt(mean(centred**2, axis, where) + EPS)) * p["g"] + p["b"]

    return call


def fast_layer_norm(x: Array, p: dict[str, Array]) -> Array:
    m = x.mean(-1, keepdims=True)
    return (x - m) / jnp.sqrt((x * x).mean(-1, keepdims=True) - m * m + EPS) * p["g"] + p["b"]


def layer_norm_by_sums(x: Array, p: dict[str, Array]) -> Array:
    n = x.shape[-1]
    m = x.sum(-1) / n
    v = (x**2).sum(-1) / n - m**2
    return (x - m[..., None]) * (p["g"] / jnp.sqrt(v + EPS)[..., None]) + p["b"]


def layer_norm_guarded(x: Array, p: dict[str, Array]) -> Array:
    m = mean(x)
    v = jnp.maximum(mean(jnp.square(x)) - jnp.square(m), 0.0)
    return p["g"] * (x - m) * lax.rsqrt(v + EPS) + p["b"]


def layer_norm_shift_form(x: Array, p: dict[str, Array]) -> Array:
    scale = p["g"] * lax.rsqrt(var(x) + EPS)
    return x * scale + (p["b"] - mean(x) * scale)


def layer_norm_by_power(x: Array, p: dict[str, Array]) -> Array:
    centred = x - mean(x)
    return p["g"] * centred * (jnp.mean(centred * centred, -1, keepdims=True) + EPS) ** -0.5 + p["b"]


def layer_norm_by_einsum(x: Array, p: dict[str, Array]) -> Array:
    centred = x - mean(x)
    v = jnp.einsum("...i,...i->...", centred, centred) / x.shape[-1]
    return p["g"] * centred / jnp.sqrt(v + EPS)[..., None] + p["b"]


AFFINE = {"g": (6,), "b": (6,)}
HAIKU_AFFINE = {"scale": "g", "offset": "b"}
LAYER_NORM = Group(
    (3, 6),
    held(),
    "normalization",
    {
        "linen": linen(nn.LayerNorm(epsilon=EPS), scale="g", bias="b"),
        "linen, slow variance": linen(nn.LayerNorm(epsilon=EPS, use_fast_variance=False), scale="g", bias="b"),
        "nnx": in_nnx(
            lambda: nnx.LayerNorm(6, epsilon=EPS, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), scale="g", bias="b"
        ),
        "keras": keras(lambda k: k.LayerNormalization(epsilon=EPS, dtype="float64"), "g", "b"),
        "equinox": equinox(lambda eqx: eqx.LayerNorm(6, eps=EPS), weight="g", bias="b"),
        "haiku": haiku(lambda hk: hk.LayerNorm(-1, True, True, eps=EPS), "layer_norm", **HAIKU_AFFINE),
        "jnp.var": lambda x, p: (x - mean(x)) / jnp.sqrt(var(x) + EPS) * p["g"] + p["b"],
        "rsqrt": lambda x, p: (x - mean(x)) * lax.rsqrt(var(x) + EPS) * p["g"] + p["b"],
        "gain and rsqrt first": lambda x, p: (x - mean(x)) * (p["g"] * lax.rsqrt(var(x) + EPS)) + p["b"],
        "centred once": lambda x, p: (c := x - mean(x)) / jnp.sqrt(mean(c**2) + EPS) * p["g"] + p["b"],
        "mean of squares minus square of mean": fast_layer_norm,
        "the same, guarded": layer_norm_guarded,
        "sums": layer_norm_by_sums,
        "shift form": layer_norm_shift_form,
        "power": layer_norm_by_power,
        "jax.nn.standardize": lambda x, p: jax.nn.standardize(x, epsilon=EPS) * p["g"] + p["b"],
        "einsum": layer_norm_by_einsum,
        "jit": jax.jit(fast_layer_norm),
        "vmap": lambda x, p: jax.vmap(lambda row: fast_layer_norm(row, p))(x),
    },
    AFFINE,
    single=("keras",),  # computes normalisations in float32 whatever it is given
)

SPREAD = {"g": (4, 6), "b": (4, 6)}
SEVERAL_AXES = Group(
    (2, 4, 6),
    held((-2, -1)),
    "normalization",
    {
        "linen": linen(nn.LayerNorm(epsilon=EPS, reduction_axes=(-2, -1), feature_axes=(-2, -1)), scale="g", bias="b"),
        "keras": keras(lambda k: k.LayerNormalization(axis=[-2, -1], epsilon=EPS, dtype="float64"), "g", "b"),
        "equinox": equinox(lambda eqx: eqx.LayerNorm((4, 6), eps=EPS), weight="g", bias="b"),
        "haiku": lambda x, p: haiku(
            lambda hk: hk.LayerNorm((-2, -1), True, True, eps=EPS, param_axis=(-2, -1)), "layer_norm", **HAIKU_AFFINE
        )(x, {name: p[name][None] for name in "gb"}),
        "jnp.var": lambda x, p: (x - mean(x, (1, 2))) * lax.rsqrt(var(x, (1, 2)) + EPS) * p["g"] + p["b"],
        "one axis after the other": lambda x, p: (
            (c := x - mean(mean(x, 1), 2)) / jnp.sqrt(mean(mean(c * c, 1), 2) + EPS) * p["g"] + p["b"]
        ),
        "flattened": lambda x, p: LAYER_NORM.spellings["rsqrt"](
            x.reshape(2, 24), {name: p[name].reshape(24) for name in "gb"}
        ).reshape(2, 4, 6),
    },
    SPREAD,
    single=("keras",),
)

MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1]], bool)


def masked_by_product(x: Array, p: dict[str, Array]) -> Array:
    n = MASK.sum(-1, keepdims=True)
    m = (x * MASK).sum(-1, keepdims=True) / n
    v = ((x - m) ** 2 * MASK).sum(-1, keepdims=True) / n
    return (x - m) / jnp.sqrt(v + EPS) * p["g"] + p["b"]


def masked_by_where(x: Array, p: dict[str, Array]) -> Array:
    total = lambda a: jnp.where(MASK, a, 0.0).sum(-1, keepdims=True) / MASK.sum(-1, keepdims=True)  # noqa: E731
    m = total(x)
    return (x - m) * lax.rsqrt(total(jnp.square(x - m)) + EPS) * p["g"] + p["b"]


MASKED = Group(
    (3, 6),
    held(where=MASK),
    "normalization",
    {
        "linen": lambda x, p: nn.LayerNorm(epsilon=EPS).apply(
            {"params": {"scale": p["g"], "bias": p["b"]}}, x, mask=MASK
        ),
        "linen, slow variance": lambda x, p: nn.LayerNorm(epsilon=EPS, use_fast_variance=False).apply(
            {"params": {"scale": p["g"], "bias": p["b"]}}, x, mask=MASK
        ),
        "jnp.mean and jnp.var": lambda x, p: (
            (x - mean(x, where=MASK)) / jnp.sqrt(jnp.var(x, -1, keepdims=True, where=MASK) + EPS) * p["g"] + p["b"]
        ),
        "product with the mask": masked_by_product,
        "where": masked_by_where,
    },
    AFFINE,
)

# -- RMSNorm, GroupNorm, InstanceNorm, l2 ----------------------------------------------------------------------------


@jax.custom_vjp
def own_rms(x: Array) -> Array:
    return x * lax.rsqrt(mean(x * x) + EPS)


own_rms.defvjp(lambda x: (own_rms(x), x), lambda x, g: jax.vjp(lambda x: x / jnp.sqrt(mean(x**2) + EPS), x)[1](g))

RMS_NORM = Group(
    (3, 6),
    lambda x, p: x / const(jnp.sqrt(mean(x**2) + EPS)) * p["g"],
    "normalization",
    {
        "linen": linen(nn.RMSNorm(epsilon=EPS), scale="g"),
        "nnx": in_nnx(lambda: nnx.RMSNorm(6, epsilon=EPS, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), scale="g"),
        "keras": keras(lambda k: k.RMSNormalization(epsilon=EPS, dtype="float64"), "g"),
        "equinox": equinox(lambda eqx: eqx.RMSNorm(6, eps=EPS, use_bias=False), weight="g"),
        "haiku": haiku(lambda hk: hk.RMSNorm(-1, eps=EPS), "rms_norm", scale="g"),
        "rsqrt": lambda x, p: x * lax.rsqrt(mean(x * x) + EPS) * p["g"],
        "sqrt": lambda x, p: x / jnp.sqrt(mean(jnp.square(x)) + EPS) * p["g"],
        "gain first": lambda x, p: p["g"] * (x * lax.rsqrt(jnp.mean(x**2, -1)[..., None] + EPS)),
        "cast and back": lambda x, p: (
            p["g"] * ((h := x.astype("float64")) * lax.rsqrt(mean(h**2) + EPS)).astype(x.dtype)
        ),
        "einsum": lambda x, p: x / jnp.sqrt(jnp.einsum("bi,bi->b", x, x)[:, None] / 6 + EPS) * p["g"],
        "power": lambda x, p: x * (mean(x * x) + EPS) ** -0.5 * p["g"],
        "own derivative": lambda x, p: own_rms(x) * p["g"],
        "checkpoint": lambda x, p: jax.checkpoint(lambda x: x * lax.rsqrt(mean(x * x) + EPS))(x) * p["g"],
        "one plus gain": lambda x, p: x * lax.rsqrt(mean(x**2) + EPS) * (1 + (p["g"] - 1)),
    },
    {"g": (6,)},
    single=("keras",),
)


def grouped(x: Array, axes: tuple[int, ...] = (1, 2, 4), hold: Callable[[Array], Array] = lambda s: s) -> Array:
    """Standardise two groups of channels."""
    h = x.reshape(*x.shape[:-1], 2, -1)
    centred = h - h.mean(axes, keepdims=True)
    return (centred / hold(jnp.sqrt((centred**2).mean(axes, keepdims=True) + EPS))).reshape(x.shape)


def grouped_by_transpose(x: Array, p: dict[str, Array]) -> Array:
    n, h, w, c = x.shape
    g = x.transpose(0, 3, 1, 2).reshape(n, 2, -1)
    g = (g - mean(g)) * lax.rsqrt(var(g) + EPS)
    return g.reshape(n, c, h, w).transpose(0, 2, 3, 1) * p["g"] + p["b"]


IMAGE = (2, 3, 2, 6)
GROUP_NORM = Group(
    IMAGE,
    lambda x, p: grouped(x, hold=const) * p["g"] + p["b"],
    "normalization",
    {
        "linen": linen(nn.GroupNorm(2, epsilon=EPS), scale="g", bias="b"),
        "linen, slow variance": linen(nn.GroupNorm(2, epsilon=EPS, use_fast_variance=False), scale="g", bias="b"),
        "nnx": in_nnx(
            lambda: nnx.GroupNorm(6, 2, epsilon=EPS, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), scale="g", bias="b"
        ),
        "keras": keras(lambda k: k.GroupNormalization(2, epsilon=EPS, dtype="float64"), "g", "b"),
        "equinox": equinox(lambda eqx: eqx.GroupNorm(2, 6, eps=EPS), channels_first=True, weight="g", bias="b"),
        "haiku": haiku(lambda hk: hk.GroupNorm(2, eps=EPS), "group_norm", **HAIKU_AFFINE),
        "reshape": lambda x, p: grouped(x) * p["g"] + p["b"],
        "reshape and transpose": grouped_by_transpose,
    },
    AFFINE,
    single=("keras",),
)

INSTANCE_NORM = Group(
    IMAGE,
    held((1, 2)),
    "normalization",
    {
        "linen": linen(nn.InstanceNorm(epsilon=EPS), scale="g", bias="b"),
        "nnx": in_nnx(
            lambda: nnx.InstanceNorm(6, epsilon=EPS, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), scale="g", bias="b"
        ),
        "keras": keras(lambda k: k.GroupNormalization(-1, epsilon=EPS, dtype="float64"), "g", "b"),
        "equinox": equinox(lambda eqx: eqx.GroupNorm(6, 6, eps=EPS), channels_first=True, weight="g", bias="b"),
        "haiku": haiku(lambda hk: hk.InstanceNorm(True, True, eps=EPS), "instance_norm", **HAIKU_AFFINE),
        "jnp.var": lambda x, p: (x - mean(x, (1, 2))) / jnp.sqrt(var(x, (1, 2)) + EPS) * p["g"] + p["b"],
    },
    AFFINE,
    single=("keras",),
)

L2 = Group(
    (3, 6),
    lambda x, p: x / const(jnp.sqrt((x**2).sum(-1, keepdims=True))),
    "normalization",
    {
        "jnp.linalg.norm": by_hand(lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)),
        "sqrt": by_hand(lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True))),
        "rsqrt": by_hand(lambda x: x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True))),
        "floor": by_hand(lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)),
        "floor of the square": by_hand(lambda x: x * lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))),
        "einsum": by_hand(lambda x: x / jnp.sqrt(jnp.einsum("bi,bi->b", x, x))[:, None]),
        "vmap": by_hand(jax.vmap(lambda row: row / jnp.sqrt(row @ row))),
        "keras": keras(lambda k: k.UnitNormalization(dtype="float64")),
    },
)

# -- activations -----------------------------------------------------------------------------------------------------


def handed_through(f: Callable[[Array], Array]) -> Function:
    """An activation through which relevance goes unchanged."""
    return lambda x, p: x * const(f(x) / x)


def activation(f: Callable[[Array], Array], **spellings: Callable[[Array], Array]) -> Group:
    made = {name.replace("_", " "): by_hand(g) for name, g in spellings.items()}
    return Group((3, 6), handed_through(f), "activation", made)


def with_keras(group: Group, name: str, **kwargs: Any) -> Group:
    return dataclasses.replace(group, spellings={**group.spellings, "keras": keras_function(name, **kwargs)})


ROOT = math.sqrt(2.0 / math.pi)
GELU = with_keras(
    activation(
        lambda x: x * jax.scipy.stats.norm.cdf(x),
        jax_nn=lambda x: jax.nn.gelu(x, approximate=False),
        flax=lambda x: nn.gelu(x, approximate=False),
        erf=lambda x: 0.5 * x * (1.0 + lax.erf(x / math.sqrt(2.0))),
        erf_last=lambda x: x * 0.5 * (1.0 + jax.scipy.special.erf(x * math.sqrt(0.5))),
        erfc=lambda x: x * 0.5 * lax.erfc(-x * math.sqrt(0.5)),
        normal_cdf=lambda x: x * jax.scipy.stats.norm.cdf(x),
        halves=lambda x: 0.5 * x + 0.5 * x * lax.erf(x / math.sqrt(2.0)),
    ),
    "gelu",
    approximate=False,
)
GELU_TANH = with_keras(
    activation(
        lambda x: 0.5 * x * (1.0 + jnp.tanh(ROOT * (x + 0.044715 * x**3))),
        jax_nn=jax.nn.gelu,
        flax=nn.gelu,
        power=lambda x: 0.5 * x * (1.0 + jnp.tanh(ROOT * (x + 0.044715 * x**3))),
        product=lambda x: x * 0.5 * (jnp.tanh((x + 0.044715 * x * x * x) * ROOT) + 1.0),
        jnp_power=lambda x: 0.5 * x * (1.0 + jnp.tanh(ROOT * (x + 0.044715 * jnp.power(x, 3.0)))),
        factored=lambda x: 0.5 * x * (1.0 + jnp.tanh(x * ROOT * (1.0 + 0.044715 * x**2))),
        sigmoid=lambda x: x * jax.nn.sigmoid(2.0 * ROOT * (x + 0.044715 * x**3)),
    ),
    "gelu",
    approximate=True,
)
QUICK_GELU = activation(
    lambda x: x / (1.0 + jnp.exp(-1.702 * x)),
    sigmoid=lambda x: x * jax.nn.sigmoid(1.702 * x),
    logistic=lambda x: lax.logistic(1.702 * x) * x,
    exp=lambda x: x / (1.0 + jnp.exp(-1.702 * x)),
    tanh=lambda x: 0.5 * x * (1.0 + jnp.tanh(0.851 * x)),
    silu=lambda x: jax.nn.silu(1.702 * x) / 1.702,
)
SILU = with_keras(
    activation(
        lambda x: x / (1.0 + jnp.exp(-x)),
        jax_nn=jax.nn.silu,
        flax=nn.swish,
        sigmoid=lambda x: x * jax.nn.sigmoid(x),
        exp=lambda x: x / (1.0 + jnp.exp(-x)),
        tanh=lambda x: x * (0.5 + 0.5 * jnp.tanh(0.5 * x)),
    ),
    "silu",
)
SOFTPLUS = with_keras(
    activation(
        lambda x: jnp.log1p(jnp.exp(x)),
        jax_nn=jax.nn.softplus,
        log=lambda x: jnp.log(1.0 + jnp.exp(x)),
        log1p=lambda x: jnp.log1p(jnp.exp(x)),
        logaddexp=lambda x: jnp.logaddexp(x, 0.0),
        stable=lambda x: jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x))),
        log_sigmoid=lambda x: -jax.nn.log_sigmoid(-x),
    ),
    "softplus",
)
MISH = with_keras(
    activation(
        lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))),
        jax_nn=jax.nn.mish,
        softplus=lambda x: x * jnp.tanh(jax.nn.softplus(x)),
        log1p=lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))),
        exp=lambda x: x * ((n := jnp.exp(x) ** 2 + 2.0 * jnp.exp(x)) / (n + 2.0)),
    ),
    "mish",
)
LEAKY_RELU = with_keras(
    activation(
        lambda x: jnp.where(x > 0, x, 0.1 * x),
        jax_nn=lambda x: jax.nn.leaky_relu(x, 0.1),
        flax=lambda x: nn.leaky_relu(x, 0.1),
        where=lambda x: jnp.where(x > 0, x, 0.1 * x),
        where_scale=lambda x: x * jnp.where(x > 0, 1.0, 0.1),
        maximum=lambda x: jnp.maximum(x, 0.1 * x),
        two_relus=lambda x: jax.nn.relu(x) - 0.1 * jax.nn.relu(-x),
        relu_and_line=lambda x: 0.1 * x + 0.9 * jax.nn.relu(x),
    ),
    "leaky_relu",
    negative_slope=0.1,
)
HARD_SWISH = with_keras(
    activation(
        lambda x: x * jnp.clip(x + 3.0, 0.0, 6.0) / 6.0,
        jax_nn=jax.nn.hard_swish,
        flax=nn.hard_silu,
        relu6=lambda x: x * jax.nn.relu6(x + 3.0) / 6.0,
        clip=lambda x: x * jnp.clip(x + 3.0, 0.0, 6.0) / 6.0,
        minimum=lambda x: x * jnp.minimum(jnp.maximum(x / 6.0 + 0.5, 0.0), 1.0),
        where=lambda x: jnp.where(x > 3.0, x, jnp.where(x < -3.0, 0.0, x * (x + 3.0) / 6.0)),
    ),
    "hard_swish",
)

RELU = with_keras(
    activation(
        lambda x: jnp.where(x > 0, x, 0.0),
        jax_nn=jax.nn.relu,
        maximum=lambda x: jnp.maximum(x, 0.0),
        where=lambda x: jnp.where(x > 0, x, 0.0),
        where_the_other_way=lambda x: jnp.where(x <= 0, 0.0, x),
        clip=lambda x: jnp.clip(x, 0.0),
        mask=lambda x: x * (x > 0),
        absolute=lambda x: 0.5 * (x + jnp.abs(x)),
    ),
    "relu",
)
SIGMOID = with_keras(
    activation(
        lambda x: 1.0 / (1.0 + jnp.exp(-x)),
        jax_nn=jax.nn.sigmoid,
        exp=lambda x: 1.0 / (1.0 + jnp.exp(-x)),
        quotient=lambda x: jnp.exp(x) / (1.0 + jnp.exp(x)),
        tanh=lambda x: 0.5 * (1.0 + jnp.tanh(0.5 * x)),
    ),
    "sigmoid",
)

# -- gates -----------------------------------------------------------------------------------------------------------


def gated(f: Callable[[Array, Array], Array]) -> Function:
    return lambda x, p: f(x @ p["w"], x @ p["v"])


def gate(f: Callable[[Array], Array]) -> Function:
    return gated(lambda a, b: f(a) * b)


GATES = {"w": (6, 6), "v": (6, 6)}
SIGMOID_GATE = Group(
    (3, 6),
    gate(lambda x: const(jax.nn.sigmoid(x))),  # the gate gets nothing
    "linear linear activation product",
    {
        "jax.nn": gate(jax.nn.sigmoid),
        "logistic": gate(lax.logistic),
        "exp": gate(lambda x: 1.0 / (1.0 + jnp.exp(-x))),
        "reciprocal": gate(lambda x: jnp.reciprocal(1.0 + jnp.exp(-x))),
        "gate last": gated(lambda a, b: b * jax.nn.sigmoid(a)),
        "quotient": gated(lambda a, b: b / (1.0 + jnp.exp(-a))),
    },
    GATES,
)
SWIGLU = Group(
    (3, 6),
    gated(lambda a, b: half(a * const(jax.nn.silu(a) / a) * b)),
    "linear linear activation product",
    {
        "jax.nn": gate(jax.nn.silu),
        "flax": gate(nn.silu),
        "sigmoid": gate(lambda x: x * jax.nn.sigmoid(x)),
        "exp": gate(lambda x: x / (1.0 + jnp.exp(-x))),
        "gate last": gated(lambda a, b: b * (a * jax.nn.sigmoid(a))),
        "product of three": gated(lambda a, b: a * (jax.nn.sigmoid(a) * b)),
    },
    GATES,
)

# -- softmax ---------------------------------------------------------------------------------------------------------


def shifted_softmax(x: Array) -> Array:
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def stopped_softmax(x: Array) -> Array:
    e = jnp.exp(x - const(x.max(-1, keepdims=True)))
    return e / e.sum(-1, keepdims=True)


SOFTMAX = Group(
    (3, 6),
    lambda x, p: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True),
    "softmax",
    {
        "jax.nn": by_hand(jax.nn.softmax),
        "flax": by_hand(nn.softmax),
        "keras": keras_function("softmax"),
        "keras layer": keras(lambda k: k.Softmax(dtype="float64")),
        "no shift": by_hand(lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)),
        "one exp": by_hand(lambda x: (e := jnp.exp(x)) / e.sum(-1, keepdims=True)),
        "shift": by_hand(shifted_softmax),
        "shift without gradient": by_hand(stopped_softmax),
        "exp of log": by_hand(lambda x: jnp.exp(jax.nn.log_softmax(x))),
        "logsumexp": by_hand(lambda x: jnp.exp(x - jax.nn.logsumexp(x, -1, keepdims=True))),
        "new axis": by_hand(lambda x: (e := jnp.exp(x)) / e.sum(-1)[:, None]),
        "reciprocal": by_hand(lambda x: (e := jnp.exp(x)) * (1.0 / e.sum(-1, keepdims=True))),
        "floor": by_hand(lambda x: (e := jnp.exp(x)) / (e.sum(-1, keepdims=True) + 1e-300)),
        "checkpoint": by_hand(jax.checkpoint(jax.nn.softmax)),
        "two axes": by_hand(lambda x: jax.nn.softmax(x.reshape(3, 2, 3), axis=(1, 2)).reshape(3, 6)),
        "other axis": by_hand(lambda x: jax.nn.softmax(x.T, axis=0).T),
        "vmap": by_hand(jax.vmap(stopped_softmax)),
    },
)
LOG_SOFTMAX = Group(
    (3, 6),
    lambda x, p: x - jnp.log(jnp.exp(x).sum(-1, keepdims=True)),
    "softmax",
    {
        "jax.nn": by_hand(jax.nn.log_softmax),
        "flax": by_hand(nn.log_softmax),
        "keras": keras_function("log_softmax"),
        "logsumexp": by_hand(lambda x: x - jax.nn.logsumexp(x, -1, keepdims=True)),
        "scipy": by_hand(lambda x: x - jax.scipy.special.logsumexp(x, axis=-1)[:, None]),
        "no shift": by_hand(lambda x: x - jnp.log(jnp.exp(x).sum(-1, keepdims=True))),
        "log of softmax": by_hand(lambda x: jnp.log(jax.nn.softmax(x))),
        "shift": by_hand(lambda x: (s := x - x.max(-1, keepdims=True)) - jnp.log(jnp.exp(s).sum(-1, keepdims=True))),
    },
)
MASKED_SOFTMAX = Group(
    (3, 6),
    lambda x, p: (e := jnp.exp(x) * MASK) / e.sum(-1, keepdims=True),
    "softmax",
    {
        "jax.nn, where": by_hand(lambda x: jax.nn.softmax(x, where=MASK)),
        "flax, where": by_hand(lambda x: nn.softmax(x, where=MASK)),
        "minus infinity": by_hand(lambda x: jax.nn.softmax(jnp.where(MASK, x, -jnp.inf))),
        "large negative": by_hand(lambda x: jax.nn.softmax(jnp.where(MASK, x, -1e30))),
        "added bias": by_hand(lambda x: jax.nn.softmax(x + np.where(MASK, 0.0, -1e30))),
        "product with the mask": by_hand(lambda x: (e := jnp.exp(x) * MASK) / e.sum(-1, keepdims=True)),
        "product, shifted": by_hand(lambda x: (e := jnp.exp(x - x.max(-1, keepdims=True)) * MASK) / e.sum(-1)[:, None]),
        "product, with a floor": by_hand(lambda x: (e := jnp.exp(x) * MASK) / (e.sum(-1, keepdims=True) + 1e-300)),
        "renormalised": by_hand(lambda x: (s := jax.nn.softmax(x) * MASK) / s.sum(-1, keepdims=True)),
        "zeroed": by_hand(lambda x: jnp.where(MASK, jax.nn.softmax(jnp.where(MASK, x, -jnp.inf)), 0.0)),
        "masked sum": by_hand(
            lambda x: (e := jnp.where(MASK, jnp.exp(x - x.max(-1, keepdims=True)), 0.0)) / e.sum(-1, keepdims=True)
        ),
        "keras layer": keras(lambda k: k.Softmax(dtype="float64"), mask=MASK),
    },
)

# -- weight norm: made of parameters alone ---------------------------------------------------------------------------


def normed_weight(p: dict[str, Array]) -> Array:
    return p["g"] * p["v"] / jnp.sqrt((p["v"] ** 2).sum(0))


def linen_weight_norm(x: Array, p: dict[str, Array]) -> Array:
    params = {"layer_instance": {"kernel": p["v"], "bias": p["b"]}, "layer_instance/kernel/scale": p["g"]}
    return nn.WeightNorm(nn.Dense(6), epsilon=0.0).apply({"params": params}, x)


def nnx_weight_norm(x: Array, p: dict[str, Array]) -> Array:
    dense = nnx.Linear(6, 6, kernel_init=jax.nn.initializers.zeros, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    dense.kernel[...], dense.bias[...] = p["v"], p["b"]
    scale = lambda key, shape: p["g"]  # noqa: E731
    module = nnx.WeightNorm(dense, epsilon=0.0, scale_init=scale, rngs=nnx.Rngs(0))
    return module(x)


def equinox_weight_norm(x: Array, p: dict[str, Array]) -> Array:
    eqx = pytest.importorskip("equinox")
    dense = eqx.nn.Linear(6, 6, key=jax.random.key(0))
    dense = eqx.tree_at(lambda m: (m.weight, m.bias), dense, (p["v"].T, p["b"]))
    module = eqx.tree_at(lambda m: m.g, eqx.nn.WeightNorm(dense, "weight"), p["g"][:, None])
    return jax.vmap(module)(x)


WEIGHT_NORM = Group(
    (3, 6),
    lambda x, p: x @ normed_weight(p) + p["b"],
    "linear",
    {
        "linen": linen_weight_norm,
        "nnx": nnx_weight_norm,
        "equinox": equinox_weight_norm,
        "weight first": lambda x, p: x @ normed_weight(p) + p["b"],
        "jnp.linalg.norm": lambda x, p: x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True) * p["g"]) + p["b"],
        "scale behind": lambda x, p: x @ p["v"] * (p["g"] * lax.rsqrt((p["v"] ** 2).sum(0))) + p["b"],
    },
    {"v": (6, 6), **AFFINE},
)

# -- attention: two heads of three features --------------------------------------------------------------------------

CAUSAL = np.tri(4, dtype=bool)


def half(z: Array) -> Array:
    """A product of which each factor gets half."""
    return 0.5 * z + const(0.5 * z)


def attention(mask: Any = None, product: Callable[[Array], Array] = lambda z: z) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in "qkv")
        k, v = (jnp.repeat(a, 2 // a.shape[2], axis=2) for a in (k, v))
        scores = product(jnp.einsum("bqhe,bkhe->bhqk", q, k)) / math.sqrt(3.0)
        scores = scores if mask is None else jnp.where(mask, scores, -1e30)
        mixed = product(jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores), v))
        return jnp.einsum("bqhe,hed->bqd", mixed, p["o"])

    return call


def by_matmul(mask: Any = None) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        heads = lambda w: (x @ w.reshape(6, -1)).reshape(2, 4, -1, 3).swapaxes(1, 2)  # noqa: E731
        q, k, v = (heads(p[name]) for name in "qkv")
        scores = q @ k.swapaxes(-1, -2) * 3.0**-0.5
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        mixed = stopped_softmax(scores) @ v
        return mixed.swapaxes(1, 2).reshape(2, 4, 6) @ p["o"].reshape(6, 6)

    return call


def by_jax(mask: Any = None, **kwargs: Any) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in "qkv")
        mixed = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else jnp.asarray(mask), **kwargs)
        return jnp.einsum("bqhe,hed->bqd", mixed, p["o"])

    return call


def by_vmap(x: Array, p: dict[str, Array]) -> Array:
    """One head of one sample at a time."""

    def head(x: Array, q: Array, k: Array, v: Array) -> Array:
        q, k, v = x @ q, x @ k, x @ v
        return jax.nn.softmax(q @ k.T / math.sqrt(3.0)) @ v

    heads = jax.vmap(head, in_axes=(None, 1, 1, 1), out_axes=1)
    mixed = jax.vmap(heads, in_axes=(0, None, None, None))(x, p["q"], p["k"], p["v"])
    return jnp.einsum("bqhe,hed->bqd", mixed, p["o"])


def linen_attention(mask: Any = None) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        module = nn.MultiHeadDotProductAttention(2, qkv_features=6, use_bias=False)
        names = {"query": "q", "key": "k", "value": "v", "out": "o"}
        return module.apply(
            {"params": {theirs: {"kernel": p[ours]} for theirs, ours in names.items()}}, x, x, mask=mask
        )

    return call


def nnx_attention(mask: Any = None) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        module = nnx.MultiHeadAttention(
            2,
            6,
            use_bias=False,
            decode=False,
            kernel_init=jax.nn.initializers.zeros,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        for theirs, ours in {"query": "q", "key": "k", "value": "v", "out": "o"}.items():
            getattr(module, theirs).kernel[...] = p[ours]
        return module(x, mask=mask)

    return call


def keras_attention(name: str, *args: int, **kwargs: Any) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        with jax.ensure_compile_time_eval():
            layer = getattr(pytest.importorskip("keras").layers, name)(*args, use_bias=False, dtype="float64")
            layer.build(x.shape, x.shape)
        return layer.stateless_call([p[name] for name in "qkvo"], [], x, x, **kwargs)[0]

    return call


def equinox_attention(mask: Any = None) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        eqx = pytest.importorskip("equinox")
        module = eqx.nn.MultiheadAttention(2, 6, inference=True, key=jax.random.key(0))
        where = lambda m: [getattr(m, f"{n}_proj").weight for n in ("query", "key", "value", "output")]  # noqa: E731
        module = eqx.tree_at(where, module, [p[name].reshape(6, 6).T for name in "qkvo"])
        return jax.vmap(lambda row: module(row, row, row, mask=mask))(x)

    return call


def haiku_attention(mask: Any = None) -> Function:
    def call(x: Array, p: dict[str, Array]) -> Array:
        hk = pytest.importorskip("haiku")
        model = hk.without_apply_rng(
            hk.transform(lambda x: hk.MultiHeadAttention(2, 3, w_init=jnp.zeros, with_bias=False)(x, x, x, mask))
        )
        names = {"query": "q", "key": "k", "value": "v", "linear": "o"}
        params = {f"multi_head_attention/{n}": {"w": p[ours].reshape(6, 6)} for n, ours in names.items()}
        return model.apply(params, x)

    return call


HEADS = {"q": (6, 2, 3), "k": (6, 2, 3), "v": (6, 2, 3), "o": (2, 3, 6)}
STEPS = "linear linear linear product softmax product linear"
ATTENTION = Group(
    (2, 4, 6),
    attention(product=half),
    STEPS,
    {
        "linen": linen_attention(),
        "nnx": nnx_attention(),
        "keras": keras_attention("MultiHeadAttention", 2, 3),
        "equinox": equinox_attention(),
        "haiku": haiku_attention(),
        "jax.nn": by_jax(),
        "einsum": attention(),
        "matmul": by_matmul(),
        "vmap": by_vmap,
    },
    HEADS,
    single=("jax.nn", "keras", "nnx"),
)
CAUSAL_ATTENTION = Group(
    (2, 4, 6),
    attention(CAUSAL, half),
    STEPS,
    {
        "linen": linen_attention(CAUSAL),
        "nnx": nnx_attention(CAUSAL),
        "keras": keras_attention("MultiHeadAttention", 2, 3, use_causal_mask=True),
        "keras, mask": keras_attention("MultiHeadAttention", 2, 3, attention_mask=CAUSAL[None]),
        "equinox": equinox_attention(CAUSAL),
        "haiku": haiku_attention(CAUSAL[None, None]),
        "jax.nn": by_jax(is_causal=True),
        "jax.nn, mask": by_jax(CAUSAL[None, None]),
        "einsum": attention(CAUSAL),
        "matmul": by_matmul(CAUSAL),
    },
    HEADS,
    single=("jax.nn", "jax.nn, mask", "keras", "keras, mask", "nnx"),
)


def grouped_einsum(x: Array, p: dict[str, Array]) -> Array:
    q = jnp.einsum("btd,dhe->bthe", x, p["q"])[:, :, None]  # groups, and heads in a group
    k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in "kv")
    scores = jnp.einsum("bqghe,bkge->bghqk", q, k) / math.sqrt(3.0)
    mixed = jnp.einsum("bghqk,bkge->bqghe", jax.nn.softmax(scores), v)
    return jnp.einsum("bqhe,hed->bqd", mixed.reshape(2, 4, 2, 3), p["o"])


def grouped_broadcast(x: Array, p: dict[str, Array]) -> Array:
    q, k, v = (jnp.einsum("btd,dhe->bhte", x, p[name]) for name in "qkv")
    k, v = (jnp.broadcast_to(a, q.shape) for a in (k, v))
    mixed = jax.nn.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(3.0)) @ v
    return jnp.einsum("bhqe,hed->bqd", mixed, p["o"])


GROUPED_ATTENTION = Group(
    (2, 4, 6),
    attention(product=half),
    STEPS,
    {
        "keras": keras_attention("GroupQueryAttention", 3, 2, 1),
        "jax.nn": by_jax(),
        "repeat": attention(),
        "einsum": grouped_einsum,
        "broadcast": grouped_broadcast,
        "matmul": by_matmul(),
    },
    {**HEADS, "k": (6, 1, 3), "v": (6, 1, 3)},
    single=("jax.nn", "keras", "nnx"),
)

GROUPS = {
    "layer norm": LAYER_NORM,
    "layer norm over several axes": SEVERAL_AXES,
    "masked layer norm": MASKED,
    "rms norm": RMS_NORM,
    "group norm": GROUP_NORM,
    "instance norm": INSTANCE_NORM,
    "l2": L2,
    "gelu": GELU,
    "gelu tanh": GELU_TANH,
    "quick gelu": QUICK_GELU,
    "silu": SILU,
    "softplus": SOFTPLUS,
    "mish": MISH,
    "leaky relu": LEAKY_RELU,
    "hard swish": HARD_SWISH,
    "relu": RELU,
    "sigmoid": SIGMOID,
    "sigmoid gate": SIGMOID_GATE,
    "swiglu": SWIGLU,
    "softmax": SOFTMAX,
    "log softmax": LOG_SOFTMAX,
    "masked softmax": MASKED_SOFTMAX,
    "weight norm": WEIGHT_NORM,
    "attention": ATTENTION,
    "causal attention": CAUSAL_ATTENTION,
    "grouped-query attention": GROUPED_ATTENTION,
}
