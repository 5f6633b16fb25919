"""Attributions that are not LRP: their formulas, their axioms, and that they transform like LRP."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlrp.attributions import (
    gradient,
    gradient_x_input,
    integrated_gradients,
    occlusion,
    smoothgrad,
)
from jaxlrp.errors import InputError

KEY = jax.random.key(7)


def seeded(model, **settings):
    """Make SmoothGrad take the same noise at every call, so that it fits into the table below."""
    explain = smoothgrad(model, noise=0.1, samples=5, **settings)
    return lambda *args, **kwargs: explain(*args, key=KEY, **kwargs)


METHODS = {
    "gradient": gradient,
    "gradient_x_input": gradient_x_input,
    "smoothgrad": seeded,
    "integrated_gradients": integrated_gradients,
    "occlusion": lambda model, **settings: occlusion(model, window=2, **settings),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def weights(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) / shape[0] ** 0.5 for shape in itertools.pairwise(sizes)]


def network(activation):
    """Make a bias-free network `(params, x) -> logits` for one example or a batch of them."""

    def model(params, x):
        *hidden, last = params
        for w in hidden:
            x = activation(x @ w)
        return x @ last

    return model


relu_network, smooth_network = network(jax.nn.relu), network(jnp.tanh)


def lrp0(params, x, relevance):
    """LRP-0 written out: R_i = sum_j x_i w_ij / z_j R_j, layer by layer."""
    inputs = [x]
    for w in params[:-1]:
        inputs.append(np.maximum(inputs[-1] @ w, 0))
    for a, w in zip(reversed(inputs), reversed(params), strict=True):
        z = a @ w
        share = np.divide(relevance, z, out=np.zeros_like(z), where=z != 0)
        relevance = a * (share @ w.T)
    return relevance


# Formulas


@pytest.mark.parametrize(
    ("target", "relevance"),
    [
        (None, lambda out: out),
        (1, lambda out: out * (np.arange(3) == 1)),
        (np.array([0, 2, 1, 1]), lambda out: out * np.eye(3)[[0, 2, 1, 1]]),
        (lambda out: out**2, lambda out: out**2),
        (lambda out: jnp.array([1.0, -1.0, 0.0]) * out, lambda out: out * [1, -1, 0]),
        (lambda out: jnp.ones_like(out), lambda out: np.ones_like(out)),
    ],
    ids=["every output", "class", "classes", "squared", "difference", "constant"],
)
def test_gradient_x_input_is_lrp0_without_biases(x64, rng, target, relevance):
    params, x = weights(6, 8, 8, 3), rng.normal(size=(4, 6))
    result = gradient_x_input(relu_network, argnums=1)(params, x, target=target)
    expected = lrp0(params, x, relevance(np.asarray(relu_network(params, x))))
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 2**32 - 1), hidden=st.integers(1, 9), label=st.integers(0, 2))
def test_gradient_x_input_conserves_the_logit(x64, seed, hidden, label):
    params = weights(4, hidden, 3, seed=seed)
    x = np.random.default_rng(seed).normal(size=4)
    result = gradient_x_input(relu_network, argnums=1, target=label)(params, x)
    logit = relu_network(params, x)[label]
    np.testing.assert_allclose(result.sum(), logit, rtol=1e-9, atol=1e-12)


def test_outputs_of_zero():
    x = jnp.array([0.0, 1.0])
    explain = gradient(lambda x: 2 * x)
    np.testing.assert_array_equal(explain(x), [2.0, 2.0])
    np.testing.assert_array_equal(explain(x, target=0), [2.0, 0.0])
    np.testing.assert_array_equal(explain(x, target=lambda output: output + 3), [0.0, 5.0])


def test_gradient_is_jax_grad(x64, rng):
    params, x = weights(6, 8, 3), rng.normal(size=(4, 6))
    labels = np.array([0, 2, 1, 0])
    result = gradient(smooth_network, argnums=1)(params, x, target=labels)
    expected = jax.grad(lambda x: jnp.take_along_axis(smooth_network(params, x), labels[:, None], 1).sum())(x)
    np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("seed", ["onehot", "logit"])
def test_gradient_agrees_with_zennit(x64, goldens, seed):
    data = np.load(goldens / "zennit_nets.npz")

    def model(params, x):
        for n, activation in ((0, jax.nn.relu), (2, jnp.tanh), (4, lambda z: z)):
            x = activation(x @ params[f"mlp/params/{n}.weight"] + params[f"mlp/params/{n}.bias"])
        return x

    params = {name: data[name] for name in data if name.startswith("mlp/params")}
    label = data["mlp/label"]
    scale = {"onehot": 1.0, "logit": np.take_along_axis(data["mlp/logits"], label[:, None], 1)}
    result = scale[seed] * gradient(model, argnums=1)(params, data["mlp/x"], target=label)
    np.testing.assert_allclose(result, data[f"mlp/{seed}/gradient"], rtol=1e-9, atol=1e-15)


def test_smoothgrad_without_noise_is_the_gradient(x64, rng, key):
    params, x = weights(6, 8, 3), rng.normal(size=(4, 6))
    result = smoothgrad(smooth_network, noise=0.0, argnums=1)(params, x, key=key, target=2)
    expected = gradient(smooth_network, argnums=1)(params, x, target=2)
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_smoothgrad_takes_the_mean_over_normal_noise(key):
    x, noise = jnp.array([-1.0, 0.0, 0.2, 2.0]), jnp.array([0.5, 1.0, 0.1, 2.0])
    explain = smoothgrad(lambda x: jnp.abs(x), noise=noise, samples=20_000)
    expected = jax.lax.erf(x / noise / 2**0.5)  # E sign(x + noise e)
    np.testing.assert_allclose(jax.jit(explain)(x, key=key), expected, atol=0.03)


def test_smoothgrad_depends_on_its_key_alone(key):
    explain = jax.jit(smoothgrad(lambda x: x**3, noise=1.0, samples=3))
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(explain(x, key=key), explain(x, key=key))
    assert not np.allclose(explain(x, key=key), explain(x, key=jax.random.key(1)))


def test_smoothgrad_draws_new_noise_for_every_feature_argument_and_sample(key):
    seen = []

    def model(x, y):
        jax.debug.callback(lambda *values: seen.append(np.stack(values)), x, y)
        return x + y

    explain = smoothgrad(model, noise=1.0, samples=4, argnums=(0, 1))
    jax.block_until_ready(explain(jnp.zeros(3), jnp.zeros(3), key=key))
    jax.effects_barrier()
    noisy = [values for values in seen if values.any()]
    assert len(noisy) == 4
    assert len(np.unique(noisy)) == 4 * 2 * 3


@pytest.mark.parametrize(
    ("target", "c"),
    [
        (None, lambda out: 1),
        (1, lambda out: np.eye(3)[1]),
        (np.array([0, 2, 1, 1]), lambda out: np.eye(3)[[0, 2, 1, 1]]),
        (jnp.square, lambda out: out),
    ],
    ids=["every output", "class", "classes", "squared"],
)
def test_integrated_gradients_are_complete(x64, rng, target, c):
    params, x, baseline = weights(6, 8, 3), rng.normal(size=(4, 6)), rng.normal(size=6)
    explain = integrated_gradients(smooth_network, baseline=baseline, argnums=1)
    result = explain(params, x, target=target)
    output = np.asarray(smooth_network(params, x))
    change = output - np.asarray(smooth_network(params, baseline))
    np.testing.assert_allclose(result.sum(1), (c(output) * change).sum(1), rtol=1e-10)


def test_integrated_gradients_against_a_fine_sum(x64, rng):
    params, x = weights(5, 8, 8, 3), rng.normal(size=5)
    n = 4000
    points = (np.arange(n)[:, None] + 0.5) / n * x
    slopes = jax.vmap(jax.grad(lambda x: smooth_network(params, x)[0]))(points)
    result = integrated_gradients(smooth_network, argnums=1, target=0)(params, x)
    np.testing.assert_allclose(result, x * slopes.mean(0), rtol=1e-5)


def test_integrated_gradients_move_all_arguments_together(x64):
    explain = integrated_gradients(
        lambda x, y: (x * y).sum(), argnums=(0, 1), baseline=(1.0, np.array([0.0, 2.0])), steps=1
    )
    x, y = explain(np.array([3.0, 5.0]), np.array([4.0, 6.0]))
    np.testing.assert_allclose(x, [2 * 2.0, 4 * 4.0])
    np.testing.assert_allclose(y, [4 * 2.0, 4 * 3.0])


def test_weights_stay_where_they_were_chosen(x64):
    """The predicted class is the one predicted at x, not at each point on the path."""

    def predicted(output):
        return output * (jnp.arange(2) == output.argmax())

    def model(x):  # class 1 wins at x = 1, class 0 near the baseline
        return jnp.stack([1 - x[0] ** 2, 3 * x[0]])

    result = integrated_gradients(model, target=predicted)(jnp.ones(1))
    np.testing.assert_allclose(result, [3.0])


# Occlusion


def naive_occlusion(score, x, window, stride, fill):
    """Cover one example's windows one by one."""
    total, count = np.zeros(x.shape), np.zeros(x.shape)
    starts = [
        itertools.takewhile(lambda s, n=n, w=w, step=step: s == 0 or s - step + w < n, itertools.count(0, step))
        for n, w, step in zip(x.shape, window, stride, strict=True)
    ]
    for corner in itertools.product(*starts):
        where = tuple(slice(s, s + w) for s, w in zip(corner, window, strict=True))
        covered = x.copy()
        covered[where] = np.broadcast_to(fill, x.shape)[where]
        total[where] += score(x) - score(covered)
        count[where] += 1
    return total / count


@pytest.mark.parametrize(
    ("window", "stride", "fill", "full_window", "full_stride"),
    [
        ((2, 2, None), None, 0.0, (2, 2, 3), (2, 2, 3)),
        ((3, 2, None), (2, 1, None), np.arange(60).reshape(5, 4, 3), (3, 2, 3), (2, 1, 3)),
        ((3, 3, 1), 1, np.arange(3), (3, 3, 1), (1, 1, 1)),
        ((None, 9, 2), (None, 1, 2), 0.5, (5, 9, 2), (5, 1, 2)),
    ],
    ids=["tiles", "overlapping", "one channel", "larger than the input"],
)
def test_occlusion_against_a_loop(x64, rng, window, stride, fill, full_window, full_stride):
    x, w = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(60, 7))
    labels = np.array([3, 6])

    def model(x):
        return jnp.tanh(x.reshape(*x.shape[:-3], 60) @ w)

    explain = occlusion(model, window, stride=stride, fill=fill)
    result = explain(x, target=labels)
    for n, label in enumerate(labels):
        expected = naive_occlusion(
            lambda x, label=label: np.asarray(model(x))[label], x[n], full_window, full_stride, fill
        )
        np.testing.assert_allclose(result[n], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(explain(x[n], target=label), result[n], rtol=1e-9, atol=1e-12)


def test_occlusion_covers_one_argument_at_a_time():
    explain = occlusion(lambda x, y: x.sum() * y.sum(), 1, argnums=(0, 1), fill=(0.0, 1.0))
    x, y = explain(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(x, [7.0, 14.0])
    np.testing.assert_allclose(y, [6.0, 9.0])


# One interface


@every_method
def test_jit_vmap_and_batch_agree(x64, rng, method):
    params, x = weights(6, 8, 3), rng.normal(size=(4, 6))
    labels = np.array([0, 2, 1, 0])
    explain = method(smooth_network, argnums=1)
    batch = explain(params, x, target=labels)
    assert batch.shape == x.shape
    jitted = jax.jit(explain)(params, x, target=labels)
    np.testing.assert_allclose(jitted, batch, rtol=1e-10, atol=1e-13)
    if method is not seeded:  # which gives every example of a batch noise of its own
        one = jax.vmap(lambda x, label: explain(params, x, target=label))(x, labels)
        np.testing.assert_allclose(one, batch, rtol=1e-10, atol=1e-13)


@every_method
def test_a_new_label_does_not_recompile(method, no_compiling):
    explain = jax.jit(method(smooth_network, argnums=1))
    params, x = weights(6, 3), jnp.ones((2, 6))
    explain(params, x, target=0)
    explain(params, x, target=np.array([0, 0]))
    with no_compiling():
        explain(params, x, target=1)
        explain(params, x, target=np.array([2, 0]))


@every_method
def test_the_call_has_the_last_word_on_the_target(method, rng):
    params, x = weights(6, 8, 3), rng.normal(size=(2, 6))
    bound = method(smooth_network, argnums=1, target=2)
    free = method(smooth_network, argnums=1)
    np.testing.assert_array_equal(bound(params, x), free(params, x, target=2))
    np.testing.assert_array_equal(bound(params, x, target=0), free(params, x, target=0))


@every_method
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_result_has_the_dtype_of_the_input(method, dtype):
    params = [jnp.asarray(w, dtype) for w in weights(6, 8, 3)]
    x = jnp.linspace(-1, 1, 6).astype(dtype)
    with jax.numpy_dtype_promotion("strict"):
        result = method(smooth_network, argnums=1)(params, x, target=1)
    assert result.dtype == dtype
    exact = method(smooth_network, argnums=1)([w.astype(jnp.float32) for w in params], x.astype(jnp.float32), target=1)
    if method is not seeded:  # whose noise differs between dtypes
        np.testing.assert_allclose(result.astype(jnp.float32), exact, atol=0.05)


def test_sums_of_many_gradients_do_not_stall_in_bfloat16(key):
    # A running sum in bfloat16 stops growing at 256 terms.
    explain = smoothgrad(lambda x: x, noise=0.0, samples=4096)
    np.testing.assert_array_equal(jax.jit(explain)(jnp.ones(2, jnp.bfloat16), key=key), [1.0, 1.0])


@every_method
@pytest.mark.parametrize("target", [None, 1, lambda out: jax.tree.map(jnp.square, out)])
def test_trees_of_inputs_and_outputs(method, target):
    def model(inputs, *, scale):
        return {"logits": scale * (inputs["a"][:2] * inputs["b"])}

    inputs = {"a": jnp.arange(1.0, 5.0), "b": jnp.ones(2)}
    result = method(model)(inputs, target=target, scale=2.0)
    assert jax.tree.map(jnp.shape, result) == {"a": (4,), "b": (2,)}

    def plain(a, b):
        return 2.0 * (a[:2] * b)

    if callable(target):
        target = jnp.square
    a, b = method(plain, argnums=(0, 1))(*inputs.values(), target=target)
    np.testing.assert_allclose(result["a"], a, rtol=1e-6)
    np.testing.assert_allclose(result["b"], b, rtol=1e-6)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, scale=1.0):
        return nn.Dense(3)(nn.tanh(nn.Dense(8)(x))) * scale


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, *, scale=1.0):
        return self.last(nnx.tanh(self.first(x))) * scale


@every_method
def test_flax_modules(method, key):
    x = jnp.linspace(-1, 1, 12).reshape(2, 6)
    linen, net = LinenNet(), NNXNet(nnx.Rngs(0))
    params = linen.init(key, x)
    graph, state = nnx.split(net)
    for model, first, function in [
        (linen, params, linen.apply),
        (net, state, lambda state, x, **kwargs: nnx.merge(graph, state)(x, **kwargs)),
        (net, net, lambda net, x, **kwargs: net(x, **kwargs)),
    ]:
        result = method(model)(first, x, target=1, scale=2.0)
        expected = method(function, argnums=1)(first, x, target=1, scale=2.0)
        assert result.shape == x.shape
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-7)


@every_method
def test_explain_can_be_differentiated(x64, rng, method):
    params, x = weights(4, 6, 3), rng.normal(size=4)
    explain = jax.jit(method(smooth_network, argnums=1, target=1))

    def loss(x):
        return (explain(params, x) ** 2).sum()

    direction, h = rng.normal(size=4), 1e-5
    slope = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    np.testing.assert_allclose(jax.grad(loss)(x) @ direction, slope, rtol=1e-6)


@every_method
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_stays_sharded(x64, rng, method, kind):
    devices = jax.device_count()
    if devices < 2:
        pytest.skip("needs several devices")
    params, x = weights(6, 8, 3), rng.normal(size=(2 * devices, 6))
    explain = jax.jit(method(smooth_network, argnums=1, target=1))
    expected = explain(params, x)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        result = explain(replicated, jax.device_put(x, sharding))
    assert result.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "method",
    [
        lambda model, n: lambda x: smoothgrad(model, noise=1.0, samples=n)(x, key=KEY),
        lambda model, n: integrated_gradients(model, steps=n),
        lambda model, n: lambda x: occlusion(model, 4, stride=1)(jnp.tile(x, n)),
    ],
    ids=["smoothgrad", "integrated_gradients", "occlusion"],
)
def test_loops_are_traced_once(method):
    """The program does not grow with the number of samples."""

    def size(n):
        explain = method(lambda x: jnp.tanh(x).sum(), n)
        return len(jax.make_jaxpr(explain)(jnp.ones(4)).jaxpr.eqns)

    assert size(2) == size(200)


# Errors


@every_method
@pytest.mark.parametrize(
    ("target", "message"),
    [(3, "out of range"), (1.5, "class indices"), (np.zeros(3, int), r"shape \(3,\) do not fit")],
)
def test_a_target_that_does_not_fit(method, target, message):
    with pytest.raises(InputError, match=message):
        method(smooth_network, argnums=1)(weights(6, 3), jnp.ones((2, 6)), target=target)


@every_method
def test_integers_cannot_be_explained(method):
    with pytest.raises(InputError, match=r"argument 0 holds int\d+\[3\].*embeddings"):
        method(lambda x: x * 1.0)(jnp.arange(3))


def test_occlusion_says_what_its_window_needs():
    with pytest.raises(ValueError, match=r"leaves batch axes \(2, 4\).*every feature axis"):
        occlusion(lambda x: x.sum((1, 2)), 2)(jnp.ones((2, 4, 4)))
    with pytest.raises(ValueError, match="more axes than the input"):
        occlusion(jnp.sum, (2, 2))(jnp.ones(4))
    with pytest.raises(ValueError, match="leaves gaps"):
        occlusion(jnp.sum, 2, stride=3)(jnp.ones(4))
    with pytest.raises(ValueError, match="differ in length"):
        occlusion(jnp.sum, (2, 2), stride=(1,))


def test_nothing_to_average():
    with pytest.raises(ValueError, match="at least one sample"):
        smoothgrad(jnp.sum, noise=1.0, samples=0)
    with pytest.raises(ValueError, match="at least one step"):
        integrated_gradients(jnp.sum, steps=0)
