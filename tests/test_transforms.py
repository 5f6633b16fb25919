"""Explanations under `jit`, `vmap`, `grad` and sharding, and what the transforms take and return."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlrp
from jaxlrp import Composite, Epsilon, Gamma, InputError, Zero, ZPlus

KEY = jax.random.key(3)

COMPOSITES: dict[str, Composite] = {
    "epsilon": Composite.uniform(Epsilon(1e-2)),
    "epsilon_plus_flat": jaxlrp.EpsilonPlusFlat(),
    "epsilon_gamma_box": jaxlrp.EpsilonGammaBox(-3.0, 3.0),
    "alpha2_beta1": jaxlrp.EpsilonAlpha2Beta1(),
    "redistribute": Composite.uniform(ZPlus(bias="redistribute")),
    "guided_backprop": jaxlrp.GuidedBackprop(),
}
every_composite = pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)


class ConvNet(nn.Module):
    """BatchNorm, a residual block, both kinds of pooling; images with or without a batch axis."""

    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool | None = None) -> jax.Array:
        def block(x: jax.Array) -> jax.Array:
            x = nn.Conv(4, (3, 3), param_dtype=self.dtype)(x)
            return nn.BatchNorm(not (train or self.train), param_dtype=self.dtype)(x)

        x = nn.max_pool(nn.relu(block(x)), (2, 2), (2, 2))
        x = nn.relu(x + block(nn.relu(block(x))))
        x = nn.avg_pool(x, (3, 3), (1, 1))
        return nn.Dense(3, param_dtype=self.dtype)(x.mean((-3, -2)))

    @property
    def dtype(self) -> Any:
        return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


def perturbed(tree: Any, seed: int = 0) -> Any:
    """Move every parameter and statistic from where `init` puts it: zeros and ones hide mistakes."""
    rng = np.random.default_rng(seed)

    def move(a: jax.Array) -> jax.Array:
        # running statistics are float32 whatever the rest is: here they follow the precision of the test
        return jnp.asarray(np.asarray(a, np.float64) + rng.uniform(0.05, 0.4, a.shape), float)

    return jax.tree.map(move, tree)


def conv_case(batch: int = 3) -> tuple[ConvNet, Any, jax.Array]:
    x = jax.random.normal(KEY, (batch, 6, 6, 2))
    return ConvNet(), perturbed(ConvNet().init(KEY, x)), x


def mlp(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    *hidden, (w, b) = params
    for v, c in hidden:
        x = jax.nn.relu(x @ v + c)
    return x @ w + b


def mlp_case(rng: np.random.Generator, bias: float = 0.3) -> tuple[Any, jax.Array]:
    sizes = (5, 7, 6, 3)
    params = [
        (jnp.asarray(rng.normal(size=(m, n)) / m**0.5), jnp.asarray(bias * rng.normal(size=n)))
        for m, n in itertools.pairwise(sizes)
    ]
    return params, jnp.asarray(rng.normal(size=(4, 5)))


def close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    """Relative to the largest entry, leaf by leaf."""

    def check(a: Any, b: Any) -> None:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-30))

    jax.tree.map(check, got, want)


# -- jit and vmap ----------------------------------------------------------------------------------


@every_composite
def test_jit_vmap_batch_and_one_by_one_agree(composite: Composite, x64: None) -> None:
    model, variables, x = conv_case()
    labels = jnp.array([0, 2, 1])
    explain = jax.jit(jaxlrp.lrp(model, composite))
    batched = explain(variables, x, target=labels)
    assert batched.shape == x.shape
    one = lambda x, k: explain(variables, x, target=k)  # noqa: E731
    close(jax.vmap(one)(x, labels), batched, 1e-9)
    for i in range(len(x)):
        close(one(x[i], labels[i]), batched[i], 1e-9)  # no batch axis at all


def test_a_relative_stabiliser_measures_one_sample_with_and_without_batch_axis(x64: None) -> None:
    model, variables, x = conv_case()
    explain = jax.jit(jaxlrp.lrp(model, Composite.uniform(Epsilon(0.1, norm_scale=True))))
    one = lambda x: explain(variables, x, target=1)  # noqa: E731
    close(jax.vmap(one)(x), one(x), 1e-9)


def test_jit_equals_eager() -> None:
    model, variables, x = conv_case(2)
    explain = jaxlrp.lrp(model, jaxlrp.EpsilonPlusFlat())
    close(jax.jit(explain)(variables, x, target=1), explain(variables, x, target=1))


class TestVariants(chex.TestCase):
    """With and without jit, arguments on the device or on the host."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_mlp(self) -> None:
        params, x = mlp_case(np.random.default_rng(5))
        explain = jaxlrp.lrp(mlp, jaxlrp.EpsilonPlus(), argnums=1)
        got = self.variant(lambda p, x: explain(p, x, target=2))(params, x)
        close(got, explain(params, x, target=2))

    @chex.variants(with_jit=True, without_jit=True)
    def test_value_and_lrp(self) -> None:
        params, x = mlp_case(np.random.default_rng(5))
        explain = jaxlrp.value_and_lrp(mlp, Epsilon(), argnums=1)
        output, relevance = self.variant(explain)(params, x)
        close(output, mlp(params, x))
        chex.assert_equal_shape([relevance, x])


def test_vmap_of_pull_equals_one_call_per_class(x64: None) -> None:
    model, variables, x = conv_case(2)
    composite = jaxlrp.EpsilonPlusFlat()

    @jax.jit
    def all_classes(variables: Any, x: jax.Array) -> jax.Array:
        logits, pull = jaxlrp.lrp_vjp(model, variables, x, composite=composite)
        return jax.vmap(pull)(jax.vmap(lambda k: jaxlrp.targets.logit(k)(logits))(jnp.arange(3)))

    explain = jax.jit(jaxlrp.lrp(model, composite))
    maps = all_classes(variables, x)
    for k in range(3):
        close(maps[k], explain(variables, x, target=k), 1e-9)


def test_pull_is_linear(rng: np.random.Generator, x64: None) -> None:
    params, x = mlp_case(rng)
    output, eager_pull = jaxlrp.lrp_vjp(mlp, params, x, composite=jaxlrp.AlphaBeta(), argnums=1)
    pull = jax.jit(eager_pull)
    close(output, mlp(params, x), 1e-12)
    a, b = (jnp.asarray(rng.normal(size=output.shape)) for _ in range(2))
    close(pull(2.0 * a - 3.0 * b), 2.0 * pull(a) - 3.0 * pull(b), 1e-12)
    close(pull(jnp.zeros_like(a)), jnp.zeros_like(x))
    matrix = jax.vmap(pull)(jnp.eye(a.size).reshape(a.size, *a.shape))
    close(jnp.tensordot(a.ravel(), matrix, 1), pull(a), 1e-12)


def test_pull_refuses_another_shape(rng: np.random.Generator) -> None:
    params, x = mlp_case(rng)
    _, pull = jaxlrp.lrp_vjp(mlp, params, x, argnums=1)
    with pytest.raises(InputError, match=r"own shape \(4, 3\), not \(3,\)"):
        pull(jnp.ones(3))


def test_vmap_over_gammas_by_closure_and_through_the_composite(rng: np.random.Generator, x64: None) -> None:
    params, x = mlp_case(rng)
    gammas = jnp.array([0.0, 0.25, 1.0, 10.0])
    explain = jax.jit(lambda composite: jaxlrp.lrp(mlp, composite, argnums=1)(params, x))
    want = jnp.stack([explain(Composite.uniform(Gamma(float(g)))) for g in gammas])
    close(jax.vmap(lambda g: explain(Composite.uniform(Gamma(g))))(gammas), want, 1e-12)
    composites = [Composite.uniform(Gamma(g)) for g in gammas]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(v) for v in leaves]), *composites)
    close(jax.vmap(explain)(stacked), want, 1e-12)
    axes = jax.tree.map(lambda v: 0 if jnp.ndim(v) else None, Composite.uniform(Gamma(gammas)))
    close(jax.vmap(explain, (axes,))(Composite.uniform(Gamma(gammas))), want, 1e-12)


def test_vmap_over_parameters_is_an_ensemble(rng: np.random.Generator, x64: None) -> None:
    params, x = mlp_case(rng)
    several = jax.tree.map(lambda a: jnp.stack([a, -a, 2 * a]), params)
    explain = jax.jit(jaxlrp.lrp(mlp, jaxlrp.AlphaBeta(), argnums=1))
    maps = jax.vmap(explain, (0, None))(several, x)
    for i in range(3):
        close(maps[i], explain(jax.tree.map(lambda a, i=i: a[i], several), x), 1e-12)


def test_scan_and_map_over_images(rng: np.random.Generator) -> None:
    params, x = mlp_case(rng)
    explain = jaxlrp.lrp(mlp, jaxlrp.EpsilonPlus(), argnums=1)
    close(jax.lax.map(lambda x: explain(params, x), x), explain(params, x))


# -- nothing compiles twice ------------------------------------------------------------------------


def test_a_new_target_does_not_recompile(rng: np.random.Generator, no_compiling: Any) -> None:
    params, x = mlp_case(rng)
    explain = jax.jit(jaxlrp.lrp(mlp, jaxlrp.EpsilonPlus(), argnums=1))
    maps = [explain(params, x, target=0)]
    with no_compiling():
        maps += [explain(params, x, target=k) for k in (1, 2)]
    assert not np.allclose(maps[0], maps[1])
    assert not np.allclose(maps[1], maps[2])
    explain(params, x, target=np.array([0, 1, 2, 0]))  # one per sample: another shape
    with no_compiling():
        explain(params, x, target=np.array([2, 1, 0, 1]))


@pytest.mark.parametrize(
    "make",
    [
        lambda v: Composite.uniform(Gamma(v)),
        lambda v: Composite.uniform(Epsilon(v)),
        lambda v: jaxlrp.EpsilonPlus(v).extend((jaxlrp.name("**0*"), jaxlrp.ZBox(-v, v))),
        lambda v: Gamma(v),
    ],
    ids=["gamma", "epsilon", "box", "bare rule"],
)
def test_a_new_number_in_a_rule_does_not_recompile(make: Any, rng: np.random.Generator, no_compiling: Any) -> None:
    params, x = mlp_case(rng)
    run = jax.jit(lambda composite, p, x: jaxlrp.lrp(mlp, composite, argnums=1)(p, x))
    first = run(make(0.25), params, x)
    with no_compiling():
        second = run(make(1.5), params, x)
    assert not np.allclose(first, second)
    close(second, jaxlrp.lrp(mlp, make(1.5), argnums=1)(params, x))


def test_jit_tells_rules_and_targets_apart() -> None:
    """Not by their hash alone: of two structures that are equal `jit` may take either one's program."""

    class Mine(Epsilon):
        pass

    rules: list[Any] = [Epsilon(), Mine(), ZPlus(), jaxlrp.Flat(), jaxlrp.WSquare(), jaxlrp.Pass(), jaxlrp.Route()]
    rules += [jaxlrp.EqualShare(), jaxlrp.HoldScale(), jaxlrp.Gradient(), jaxlrp.GuidedReLU(), jaxlrp.DeconvNetReLU()]
    targets = [make(1) for make in (jaxlrp.targets.logit, jaxlrp.targets.softmax, jaxlrp.targets.one_hot)]
    for one, other in itertools.combinations([*rules, *map(Composite.uniform, rules), *targets], 2):
        assert jax.tree.structure(one) != jax.tree.structure(other), f"{one} and {other}"
    assert jax.tree.structure(Epsilon(0.1)) == jax.tree.structure(Epsilon(0.2))
    assert jax.tree.structure(Epsilon(clip=True)) != jax.tree.structure(Epsilon())


def test_new_parameters_do_not_recompile(rng: np.random.Generator, no_compiling: Any) -> None:
    params, x = mlp_case(rng)
    explain = jax.jit(jaxlrp.lrp(mlp, Epsilon(), argnums=1))
    explain(params, x)
    others = jax.tree.map(lambda a: 2.0 * a, params), 3.0 * x
    with no_compiling():
        explain(*others)


# -- derivatives of relevance ----------------------------------------------------------------------


def check_derivative(fun: Callable[[Any], jax.Array], at: Any, rng: np.random.Generator) -> None:
    """Reverse and forward mode along a random direction against the central difference."""
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=jnp.shape(a))), at)
    along = jax.jit(lambda h: fun(jax.tree.map(lambda a, d: a + h * d, at, direction)))
    h = 3e-6  # error of fourth order in h, so that rounding is what is left
    near, far = (along(k * h) - along(-k * h) for k in (1, 2))
    want = (8 * near - far) / (12 * h)
    assert abs(float(want)) > 1e-6
    gradient = jax.jit(jax.grad(fun))(at)
    parts = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(parts)), want, rtol=1e-6)
    _, forward = jax.jit(lambda a, d: jax.jvp(fun, (a,), (d,)))(at, direction)
    np.testing.assert_allclose(forward, want, rtol=1e-6)


SMOOTH: dict[str, Composite] = {
    "epsilon": Composite.uniform(Epsilon(0.1)),
    "zplus": Composite.uniform(ZPlus(epsilon=0.1)),
    "alpha2_beta1": Composite.uniform(jaxlrp.AlphaBeta(2.0, 1.0, epsilon=0.1)),
    "gamma": Composite.uniform(Gamma(0.25, epsilon=0.1)),
    "redistribute": Composite.uniform(Gamma(0.25, epsilon=0.1, bias="redistribute")),
    "box": jaxlrp.EpsilonPlus(0.1).extend((jaxlrp.first("linear"), jaxlrp.ZBox(-4.0, 4.0))),
    "wsquare": jaxlrp.EpsilonPlus(0.1).extend((jaxlrp.first("linear"), jaxlrp.WSquare())),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_along_parameters_and_input(name: str, rng: np.random.Generator, x64: None) -> None:
    params, x = mlp_case(rng)
    explain = jaxlrp.lrp(mlp, SMOOTH[name], argnums=1)
    probe = jnp.asarray(rng.normal(size=x.shape))
    check_derivative(lambda at: jnp.sum(probe * explain(*at, target=1)), (params, x), rng)


@pytest.mark.parametrize("name", ["epsilon", "gamma", "alpha2_beta1", "redistribute"])
def test_derivatives_along_the_numbers_of_a_composite(name: str, rng: np.random.Generator, x64: None) -> None:
    params, x = mlp_case(rng)
    probe = jnp.asarray(rng.normal(size=x.shape))
    composite = jax.tree.map(jnp.asarray, SMOOTH[name])
    # one leaf a number: nothing else of a composite is traced
    assert all(leaf.ndim == 0 for leaf in jax.tree.leaves(composite))

    def value(composite: Composite) -> jax.Array:
        return jnp.sum(probe * jaxlrp.lrp(mlp, composite, argnums=1)(params, x))

    check_derivative(value, composite, rng)


def test_derivatives_through_a_convolutional_net(rng: np.random.Generator, x64: None) -> None:
    model, variables, x = conv_case(2)
    explain = jaxlrp.lrp(model, jaxlrp.EpsilonPlus(0.1).extend((jaxlrp.kind("conv"), Gamma(0.25, epsilon=0.1))))
    probe = jnp.asarray(rng.normal(size=x.shape))
    check_derivative(lambda args: jnp.sum(probe * explain(*args, target=1)), (variables, x), rng)


def test_second_derivatives_of_relevance(rng: np.random.Generator, x64: None) -> None:
    params, x = mlp_case(rng)
    explain = jaxlrp.lrp(mlp, Epsilon(0.1), argnums=1)
    value = lambda x: jnp.sum(explain(params, x, target=0)[:, 0] ** 2)  # noqa: E731
    along = jnp.asarray(rng.normal(size=x.shape))
    slope = lambda x: jnp.sum(along * jax.grad(value)(x))  # noqa: E731
    check_derivative(slope, x, rng)


def test_a_loss_on_the_explanation_is_lowered_by_training(rng: np.random.Generator) -> None:
    params, x = mlp_case(rng)
    explain = jaxlrp.lrp(mlp, jaxlrp.EpsilonPlus(0.1), argnums=1)
    outside = jnp.array([0.0, 0.0, 1.0, 1.0, 1.0])  # features that should not matter
    optimizer = optax.adam(1e-2)

    def loss(params: Any) -> jax.Array:
        return jnp.mean((outside * explain(params, x, target=0)) ** 2)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(10):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_relevance_of_a_function_that_itself_explains(rng: np.random.Generator) -> None:
    """Explaining inside of an explained function is differentiable code like any other."""
    params, x = mlp_case(rng)
    inner = jaxlrp.lrp(mlp, Zero(), argnums=1)
    outer = lambda x: jnp.concatenate([x, jax.lax.stop_gradient(inner(params, x))], -1)  # noqa: E731
    weights = jnp.ones((10, 2))
    assert jax.jit(lambda x: outer(x) @ weights)(x).shape == (4, 2)


# -- sharding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_batches(devices: int, axis: AxisType) -> None:
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    params, x = mlp_case(np.random.default_rng(1))
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(axis,), devices=jax.devices()[:devices])
    explain = jax.jit(jaxlrp.lrp(mlp, jaxlrp.EpsilonPlusFlat(), argnums=1))
    want = explain(params, x, target=1)
    spread = NamedSharding(mesh, PartitionSpec("batch"))
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    got = explain(everywhere, jax.device_put(x, spread), target=1)
    close(got, want)
    assert got.sharding.is_equivalent_to(spread, got.ndim)


def test_sharded_images() -> None:
    model, variables, x = conv_case(2)
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    explain = jax.jit(jaxlrp.lrp(model, jaxlrp.EpsilonPlus()))
    images = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    close(explain(variables, images), explain(variables, x))


# -- what goes in and comes out --------------------------------------------------------------------


def test_value_and_lrp_returns_the_models_own_output(rng: np.random.Generator) -> None:
    params, x = mlp_case(rng)
    output, relevance = jaxlrp.value_and_lrp(mlp, Epsilon(), argnums=1)(params, x, target=1)
    close(output, mlp(params, x))
    close(relevance, jaxlrp.lrp(mlp, Epsilon(), argnums=1)(params, x, target=1))


def test_has_aux(rng: np.random.Generator) -> None:
    params, x = mlp_case(rng)
    model = lambda p, x: (mlp(p, x), {"hidden": x @ p[0][0], "note": 3})  # noqa: E731
    settings: dict[str, Any] = {"composite": Epsilon(), "argnums": 1, "has_aux": True}
    want = jaxlrp.lrp(mlp, Epsilon(), argnums=1)(params, x)
    relevance, aux = jax.jit(jaxlrp.lrp(model, **settings))(params, x)
    close(relevance, want)
    close(aux, {"hidden": x @ params[0][0], "note": 3})
    (output, aux), relevance = jaxlrp.value_and_lrp(model, **settings)(params, x)
    close((output, relevance), (mlp(params, x), want))
    output, pull, aux = jaxlrp.lrp_vjp(model, params, x, **settings)
    close(pull(output), want)
    assert set(aux) == {"hidden", "note"}
    relevance, captured, aux = jaxlrp.layerwise_lrp(model, **settings)(params, x)
    close((relevance, aux["hidden"]), (want, x @ params[0][0]))
    # the branch that only aux uses is no layer of the model
    assert len(captured) == 5


def test_batch_stats_as_aux() -> None:
    model, variables, x = conv_case(2)
    want = jaxlrp.lrp(model, jaxlrp.EpsilonPlus())(variables, x)
    explain = jaxlrp.lrp(model, jaxlrp.EpsilonPlus(), has_aux=True)
    relevance, state = explain(variables, x, mutable=["batch_stats"])
    close(relevance, want)
    close(state["batch_stats"], variables["batch_stats"])


def test_argnums(rng: np.random.Generator, x64: None) -> None:
    x, y, w = (jnp.asarray(rng.normal(size=s)) for s in ((2, 3), (2, 3), (3, 4)))
    model = lambda x, y, w: (x + 2 * y) @ w  # noqa: E731
    explain = lambda argnums: jaxlrp.lrp(model, Epsilon(), argnums=argnums)(x, y, w)  # noqa: E731
    both = explain((0, 1))
    assert isinstance(both, tuple)
    assert [r.shape for r in both] == [(2, 3), (2, 3)]
    close(explain(-2), explain(1), 1e-12)
    close(explain((-3,)), (explain(0),), 1e-12)
    close(explain((1, 0)), both[::-1], 1e-12)
    close(explain([0, 1]), both, 1e-12)
    # two inputs of one sum share what the sum gets; explained alone, the other one is a bias
    total = jaxlrp.lrp(lambda s, w: s @ w, Epsilon())(x + 2 * y, w)
    close(both[0] + both[1], total, 1e-4)
    # explaining weights too makes a product of the matrix multiplication: order of argnums is no matter
    close(explain((2, 1, 0)), explain((0, 1, 2))[::-1], 1e-12)


@pytest.mark.parametrize("argnums", [2, -3, (0, 5)])
def test_argnums_out_of_range(argnums: Any, rng: np.random.Generator) -> None:
    params, x = mlp_case(rng)
    with pytest.raises(InputError, match=r"argnums=.* was given 2 positional arguments"):
        jaxlrp.lrp(mlp, argnums=argnums)(params, x)


def test_relevance_of_the_parameters_themselves(rng: np.random.Generator) -> None:
    x, w = (jnp.asarray(rng.normal(size=s)) for s in ((3,), (3, 2)))
    relevance = jaxlrp.lrp(lambda x, w: x @ w, Zero(), argnums=1)(x, w)
    close(relevance, x[:, None] * w)


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, image: jax.Array, meta: dict[str, jax.Array], *, scale: float = 1.0) -> jax.Array:
        x = nn.relu(nn.Dense(4)(image)) + scale * nn.Dense(4)(meta["age"])
        return nn.Dense(3)(jnp.concatenate([x, meta["place"]], -1))


def test_several_inputs_pytrees_and_keywords() -> None:
    image, meta = jnp.ones((2, 5)), {"age": jnp.ones((2, 1)), "place": 2 * jnp.ones((2, 2))}
    model = TwoInputs()
    params = perturbed(model.init(KEY, image, meta))
    first = jaxlrp.lrp(model, Epsilon())(params, image, meta)
    assert first.shape == image.shape
    both = jax.jit(jaxlrp.lrp(model, Epsilon(), argnums=(1, 2)))(params, image, meta, scale=2.0)
    chex.assert_trees_all_equal_shapes(both, (image, meta))
    w = params["params"]["Dense_2"]["kernel"]
    logits = model.apply(params, image, meta, scale=2.0)
    # "place" is read by the last layer alone: its relevance is that layer's epsilon rule
    share = (logits / (logits + 1e-6 * jnp.sign(logits))) @ w[4:].T
    close(both[1]["place"], meta["place"] * share, 1e-4)
    by_keyword = jaxlrp.lrp(model, Epsilon())(params, image, meta=meta)
    close(by_keyword, first)


class Pair(NamedTuple):
    left: Any
    right: Any


def test_relevance_has_the_tree_of_the_input() -> None:
    tree = {"a": [jnp.ones(2), jnp.ones(3)], "b": Pair(jnp.ones(1), (jnp.ones(2),))}
    model = lambda t: jnp.concatenate([*t["a"], t["b"].left, *t["b"].right])  # noqa: E731
    chex.assert_trees_all_equal(jaxlrp.lrp(model, Epsilon())(tree), tree)


def test_a_static_flag_as_keyword() -> None:
    model, variables, x = conv_case(2)
    explain = jaxlrp.lrp(model, jaxlrp.EpsilonPlus())
    want = explain(variables, x)
    close(explain(variables, x, train=False), want)
    close(jax.jit(lambda v, x: explain(v, x, train=False))(variables, x), want)
    with pytest.raises(jaxlrp.NotDeterministicError, match=r"BatchNorm_0.*train=False"):
        explain(variables, x, train=True, mutable=["batch_stats"])


def test_parameters_may_be_closed_over(rng: np.random.Generator) -> None:
    params, x = mlp_case(rng)
    want = jaxlrp.lrp(mlp, jaxlrp.EpsilonPlus(), argnums=1)(params, x)
    closed = jaxlrp.lrp(lambda x: mlp(params, x), jaxlrp.EpsilonPlus())
    close(closed(x), want)
    close(jax.jit(closed)(x), want)

    def norm(params: Any) -> jax.Array:  # traced values may be closed over too
        return jnp.sum(jaxlrp.lrp(lambda x: mlp(params, x), Epsilon(0.1))(x) ** 2)

    gradient = jax.jit(jax.grad(norm))(params)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("input_dtype", ["same", "float32"])
def test_half_precision_models_have_relevance_in_float32(dtype: Any, input_dtype: str) -> None:
    model, variables, x = conv_case(2)
    half = jax.tree.map(lambda a: a.astype(dtype), variables)
    explain = jax.jit(jaxlrp.lrp(model, jaxlrp.EpsilonPlus()))
    got = explain(half, x.astype(dtype) if input_dtype == "same" else x, target=1)
    want = explain(variables, x, target=1)
    assert got.dtype == jnp.float32
    cosine = jnp.vdot(got, want) / jnp.linalg.norm(got) / jnp.linalg.norm(want)
    assert float(cosine) > 0.99


# -- relevance of hidden layers --------------------------------------------------------------------


def test_layerwise_names_and_shapes() -> None:
    model, variables, x = conv_case(2)
    relevance, hidden = jax.jit(jaxlrp.layerwise_lrp(model, jaxlrp.EpsilonPlus()))(variables, x, target=1)
    close(relevance, jaxlrp.lrp(model, jaxlrp.EpsilonPlus())(variables, x, target=1), 1e-4)
    layers = jaxlrp.trace(model, variables, x)
    assert set(hidden) == {layer.name for layer in layers}
    for layer in layers:
        shapes = [v.shape for v in layer.inputs]
        got = hidden[layer.name]
        assert [r.shape for r in (got if isinstance(got, tuple) else (got,))] == shapes
    close(hidden["Conv_0"], relevance)


@pytest.mark.parametrize(
    ("capture", "want"),
    [
        ("**/Conv_*", {"Conv_0", "Conv_1", "Conv_2"}),
        ("Conv_1", {"Conv_1"}),
        (["Dense_0", "*pool"], {"Dense_0", "max_pool", "avg_pool"}),
        (("add",), {"add"}),
    ],
)
def test_layerwise_globs(capture: Any, want: set[str]) -> None:
    model, variables, x = conv_case(2)
    _, hidden = jax.jit(jaxlrp.layerwise_lrp(model, jaxlrp.EpsilonPlus(), capture))(variables, x)
    assert set(hidden) == want


def test_layerwise_unknown_glob() -> None:
    model, variables, x = conv_case(2)
    explain = jaxlrp.layerwise_lrp(model, jaxlrp.EpsilonPlus(), ["Conv_0", "Convolution_*"])
    with pytest.raises(jaxlrp.UnknownLayerError, match=r"'Convolution_\*'.*Conv_0"):
        explain(variables, x)


def test_a_sum_captures_one_part_per_branch(x64: None) -> None:
    model, variables, x = conv_case(2)
    _, hidden = jax.jit(jaxlrp.layerwise_lrp(model, jaxlrp.EpsilonPlus()))(variables, x)
    parts = hidden["add"]
    assert isinstance(parts, tuple)
    assert len(parts) == 2
    # the skipped branch is also read by the next convolution: all that arrives there is shown
    close(parts[0], hidden["Conv_1"], 1e-12)


def test_relevance_is_conserved_at_every_bottleneck(rng: np.random.Generator, x64: None) -> None:
    params, x = mlp_case(rng, bias=0.0)
    epsilon = 1e-9
    explain = jaxlrp.layerwise_lrp(mlp, Epsilon(epsilon), argnums=1)
    relevance, hidden = explain(params, x, target=1)
    start = float(mlp(params, x)[:, 1].sum())
    for part in (relevance, *hidden.values()):
        np.testing.assert_allclose(part.sum(), start, rtol=1e-5)


# -- identities ------------------------------------------------------------------------------------


def test_a_bias_free_relu_net_conserves_up_to_epsilon(rng: np.random.Generator, x64: None) -> None:
    params, x = mlp_case(rng, bias=0.0)
    explain = jax.jit(lambda eps, p, x: jaxlrp.lrp(mlp, Epsilon(eps), argnums=1)(p, x))
    for epsilon in (1e-9, 1e-6, 1e-3):
        relevance = explain(epsilon, params, x)
        # a layer loses at most eps |R_j / (z_j + eps)| at output j: summed over all layers
        _, hidden = jaxlrp.layerwise_lrp(mlp, Epsilon(epsilon), argnums=1)(params, x)
        bound, value = 0.0, x
        names = [n for n in hidden if "relu" not in n]
        arrived = [*(hidden[n] for n in hidden if "relu" in n), mlp(params, x)]
        assert len(names) == len(arrived) == len(params)
        for (w, _), r in zip(params, arrived, strict=True):
            z = value @ w
            bound += float(jnp.sum(epsilon * jnp.abs(r) / (jnp.abs(z) + epsilon)))
            value = jax.nn.relu(z)
        lost = abs(float(relevance.sum() - mlp(params, x).sum()))
        assert lost <= bound + 1e-12


def conv2d(x: jax.Array, w: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


def norm(x: jax.Array, p: Any) -> jax.Array:
    mean, var, scale, shift = p
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + shift


def relu_nets() -> dict[str, Callable[[Any, jax.Array], jax.Array]]:
    relu = jax.nn.relu

    def head(p: Any, x: jax.Array) -> jax.Array:
        return x.mean((1, 2)) @ p["head"] + p["shift"]

    return {
        "biases": lambda p, x: head(p, relu(conv2d(x, p["a"]) + p["bias"])),
        "norm after conv": lambda p, x: head(p, relu(norm(conv2d(x, p["a"]), p["norm"]))),
        "norm after relu": lambda p, x: head(p, norm(relu(conv2d(x, p["a"])), p["norm"])),
        "norm before conv": lambda p, x: head(p, relu(conv2d(norm(x, p["in"]), p["a"]))),
        "max pool": lambda p, x: head(p, nn.max_pool(relu(conv2d(x, p["a"])), (2, 2), (2, 2))),
        "padded max pool": lambda p, x: head(p, nn.max_pool(conv2d(x, p["a"]), (3, 3), (2, 2), "SAME")),
        "average pool": lambda p, x: head(p, nn.avg_pool(relu(conv2d(x, p["a"])), (2, 2), (1, 1))),
        "padded average pool": lambda p, x: head(p, nn.avg_pool(relu(conv2d(x, p["a"])), (3, 3), (2, 2), "SAME")),
        "residual": lambda p, x: head(p, relu(conv2d(x, p["a"]) + conv2d(relu(conv2d(x, p["a"])), p["b"]))),
        "difference": lambda p, x: head(p, relu(conv2d(x, p["a"]) - relu(conv2d(x, p["c"])))),
        "concatenation": lambda p, x: head(p, relu(conv2d(jnp.concatenate([x, relu(conv2d(x, p["d"]))], -1), p["e"]))),
        "moves": lambda p, x: head(p, relu(conv2d(jnp.flip(x[:, 1:], 2).transpose(0, 2, 1, 3), p["a"]))),
    }


@pytest.mark.parametrize("name", relu_nets())
@pytest.mark.parametrize("target", [None, 1])
def test_lrp_0_is_gradient_times_input(name: str, target: Any, rng: np.random.Generator, x64: None) -> None:
    net = relu_nets()[name]

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape))

    stats = lambda n: (draw(n), jnp.abs(draw(n)) + 0.5, draw(n), draw(n))  # noqa: E731
    params = {
        **{k: draw(3, 3, m, n) for k, m, n in (("a", 2, 4), ("b", 4, 4), ("c", 2, 4), ("d", 2, 3), ("e", 5, 4))},
        **{"bias": draw(4), "norm": stats(4), "in": stats(2), "head": draw(4, 3), "shift": draw(3)},
    }
    x = draw(2, 6, 6, 2)
    # sums and pools have a stabiliser of their own by default, which is no part of LRP-0
    composite = Composite.uniform(Zero()).extend((jaxlrp.kind("sum"), Zero()))
    seed = lambda out: out if target is None else out[:, target]  # noqa: E731
    want = x * jax.jit(jax.grad(lambda x: jnp.sum(seed(net(params, x)))))(x)
    got = jax.jit(lambda p, x: jaxlrp.lrp(net, composite, argnums=1)(p, x, target=target))(params, x)
    close(got, want, 1e-9)


def test_lrp_0_is_gradient_times_input_on_a_flax_net(x64: None) -> None:
    model, variables, x = conv_case(2)
    composite = Composite.uniform(Zero()).extend((jaxlrp.kind("sum"), Zero()))
    got = jax.jit(jaxlrp.lrp(model, composite))(variables, x)
    want = x * jax.jit(jax.grad(lambda x: model.apply(variables, x).sum()))(x)
    close(got, want, 1e-9)


def test_gradient_composite_is_the_gradient(x64: None) -> None:
    model, variables, x = conv_case(2)
    explain = jax.jit(jaxlrp.lrp(model, jaxlrp.GradientComposite()))
    got = explain(variables, x, target=jnp.array([1, 2]))
    want = jax.grad(lambda x: 0.5 * jnp.sum(model.apply(variables, x)[jnp.arange(2), jnp.array([1, 2])] ** 2))(x)
    close(got, want, 1e-9)


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [jnp.arange(3), np.ones(3, bool), 3], ids=["ints", "bools", "int"])
def test_integer_inputs_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="relevance needs real numbers"):
        jaxlrp.lrp(lambda x: x * 1.0, Epsilon())(bad)


def test_nan_is_refused_on_request(rng: np.random.Generator) -> None:
    params, x = mlp_case(rng)
    explain = jaxlrp.lrp(mlp, Epsilon(), argnums=1, check=True)
    explain(params, x)
    with pytest.raises(InputError, match=r"argument 1: 1 of 20 numbers are NaN or infinite"):
        explain(params, x.at[0, 0].set(jnp.nan))
    with pytest.raises(InputError, match=r"argument 0, '0/1': 7 of 7"):
        explain([(params[0][0], params[0][1] * jnp.inf), *params[1:]], x)
    with pytest.raises(InputError, match=r"outside jax\.jit"):
        jax.jit(explain)(params, x)


def test_an_output_that_does_not_depend_on_the_input(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="check argnums"):
        jaxlrp.lrp(lambda x, y: y * 2.0, Epsilon())(jnp.ones(2), jnp.ones(2))


def test_what_is_no_composite() -> None:
    for bad in ("epsilon_plus", 0.25, [Epsilon()]):
        with pytest.raises(TypeError, match="composite must be a Composite, a Rule or None"):
            jaxlrp.lrp(mlp, bad)


def test_a_function_with_its_own_batching_rule_is_looked_into(rng: np.random.Generator, x64: None) -> None:
    params, x = mlp_case(rng)

    @jax.custom_batching.sequential_vmap
    def inside(x: jax.Array) -> jax.Array:
        return mlp(params, x)

    explain = jaxlrp.lrp(inside, jaxlrp.EpsilonPlus())
    close(explain(x), jaxlrp.lrp(mlp, jaxlrp.EpsilonPlus(), argnums=1)(params, x), 1e-12)
    # so relevance itself may be explained, and has one where gamma is traced
    relevance = jaxlrp.lrp(lambda x, gamma: jaxlrp.lrp(mlp, jaxlrp.Gamma(gamma), argnums=1)(params, x))
    assert np.isfinite(relevance(x, jnp.asarray(0.25))).all()
