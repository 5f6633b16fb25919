"""Recurrences and branches: folded through the layers inside, step by step."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxlrp

EPSILON = jaxlrp.Composite.uniform(jaxlrp.Epsilon())
pytestmark = pytest.mark.usefixtures("x64")


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(rng.normal(size=s)) for s in shapes]


def cell(h, x, w, u):
    return jnp.tanh(x @ w + h @ u)


def scanned(x, w, u, reverse=False):
    def step(h, x):
        h = cell(h, x, w, u)
        return h, h * x

    last, outputs = lax.scan(step, x[0], x, reverse=reverse)  # a constant start would be no layer when unrolled
    return last @ w + outputs.sum(0) @ u


def unrolled(x, w, u, reverse=False):
    h, outputs = x[0], []
    for row in x[::-1] if reverse else x:
        h = cell(h, row, w, u)
        outputs.append(h * row)
    return h @ w + jnp.stack(outputs).sum(0) @ u


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "composite",
    [
        EPSILON,
        jaxlrp.EpsilonPlus(),
        jaxlrp.Composite.uniform(jaxlrp.Gamma(0.5)),
        jaxlrp.CPLRP(),
        jaxlrp.GradientComposite(),
    ],
)
def test_a_scan_is_folded_as_its_unrolled_loop(rng, composite, reverse):
    x, w, u = arrays(rng, (4, 3), (3, 3), (3, 3))
    explain = jaxlrp.lrp(functools.partial(scanned, reverse=reverse), composite)
    expected = jaxlrp.lrp(functools.partial(unrolled, reverse=reverse), composite)(x, w, u)
    np.testing.assert_allclose(jax.jit(explain)(x, w, u), expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(explain(x, w, u), expected, rtol=1e-12, atol=1e-14)


def test_gradient_folded_through_a_scan_is_the_gradient(rng):
    x, w, u = arrays(rng, (4, 3), (3, 3), (3, 3))
    folded = jaxlrp.lrp(scanned, jaxlrp.GradientComposite(), target=jaxlrp.targets.one_hot(1))(x, w, u)
    np.testing.assert_allclose(folded, jax.grad(lambda x: scanned(x, w, u)[1])(x), rtol=1e-12)


def test_initial_carry_and_constants_of_a_scan_can_be_explained(rng):
    x, w, h0, c = arrays(rng, (4, 3), (3, 3), (3,), (3,))

    def scan(args, w):
        h0, c, x = args
        return lax.scan(lambda h, x: (jnp.tanh(h @ w + x + c), None), h0, x)[0]

    def loop(args, w):
        h, c, x = args
        for row in x:
            h = jnp.tanh(h @ w + row + c)
        return h

    got, want = (jaxlrp.lrp(f, EPSILON)((h0, c, x), w, target=0) for f in (scan, loop))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_carry_that_starts_constant_is_found_to_depend(rng):
    # Nothing depends on x before the second step: the dependence of the carries needs more than one look.
    (x,) = arrays(rng, (3,))

    def delay(x):
        return lax.scan(lambda c, _: ((x, c[0], c[1]), None), (jnp.zeros(3),) * 3, None, length=3)[0][2]

    np.testing.assert_array_equal(jaxlrp.lrp(delay, EPSILON)(x), x)


def test_relevance_that_reaches_a_constant_start_is_named(rng):
    x, w = arrays(rng, (3,), (3, 3))

    def model(x, w):
        return lax.scan(lambda h, _: (h + jnp.tanh(x @ w), None), jnp.array([5.0, -2.0, 1.0]), None, length=2)[0]

    account = jaxlrp.ledger(model, EPSILON)(x, w).check(1e-12)
    row = account.layers.index("scan")
    z = np.asarray(model(x, w))
    start = np.array([5.0, -2.0, 1.0])
    # each step hands the part h / (h + f) of the relevance on to h; what is left in the end belongs to the start
    np.testing.assert_allclose(account.losses["constant"][row], start.sum(), rtol=1e-5)
    assert account.depths[row] == 0
    np.testing.assert_allclose(account.start, z.sum(), rtol=1e-12)


def test_the_ledger_of_a_scan_closes_inside_and_outside(rng):
    x, w, u = arrays(rng, (4, 3), (3, 3), (3, 3))
    account = jaxlrp.ledger(scanned, jaxlrp.EpsilonPlus())(x, w, u, target=1)
    account.check(1e-12)
    assert 1 in account.depths
    text = str(account).splitlines()
    scan = next(i for i, line in enumerate(text) if line.startswith("scan"))
    assert text[scan + 1].startswith("  ")  # what is inside stands below, indented


def test_capture_inside_of_a_scan_is_per_step(rng):
    x, w, u = arrays(rng, (4, 3), (3, 3), (3, 3))
    _, captured = jaxlrp.layerwise_lrp(scanned, EPSILON, "**")(x, w, u)
    _, loop = jaxlrp.layerwise_lrp(unrolled, EPSILON, "tanh*")(x, w, u)
    expected = [loop[name] for name in ("tanh", "tanh:2", "tanh:3", "tanh:4")]
    np.testing.assert_allclose(captured["tanh"], np.stack(expected), rtol=1e-12)


def test_relevance_that_layers_inside_of_a_scan_share_is_stacked_once(rng):
    start, x, a, b = arrays(rng, (3,), (4, 3), (3, 3), (3, 3))

    def gated(h, row, a, b):
        return h + (row @ a) * jax.nn.relu(row @ b)

    def scan(h, x, a, b):
        return lax.scan(lambda h, row: (gated(h, row, a, b), None), h, x)[0]

    def loop(h, x, a, b):
        return functools.reduce(lambda h, row: gated(h, row, a, b), x, h)

    explain, by_step = (jaxlrp.layerwise_lrp(f, EPSILON, argnums=(0, 1)) for f in (scan, loop))
    ((_, relevance), captured), (_, one_by_one) = explain(start, x, a, b), by_step(start, x, a, b)
    assert captured["dense"] is captured["dense:2"]  # both read the row
    assert captured["relu"] is captured["mul"][1]  # a relu hands on what comes to it
    assert captured["mul"][0] is not captured["mul"][1]
    assert captured["dense"] is relevance
    for name, part in (("relu", lambda r: r), ("mul", lambda r: r[0])):
        steps = [part(one_by_one[n]) for n in (name, f"{name}:2", f"{name}:3", f"{name}:4")]
        np.testing.assert_allclose(part(captured[name]), np.stack(steps), rtol=1e-12)


def test_remat_and_nested_scans(rng):
    x, w = arrays(rng, (2, 3, 4), (4, 4))

    def rows(h, rows, w):
        return lax.scan(jax.checkpoint(lambda h, row: (jnp.tanh(h @ w + row), None)), h, rows)[0]

    def nested(x, w):
        return lax.scan(lambda h, block: (rows(h, block, w), None), jnp.zeros(4), x)[0]

    def loops(x, w):
        h = jnp.zeros(4)
        for block in x:
            for row in block:
                h = jnp.tanh(h @ w + row)
        return h

    np.testing.assert_allclose(jaxlrp.lrp(nested, EPSILON)(x, w), jaxlrp.lrp(loops, EPSILON)(x, w), rtol=1e-12)
    jaxlrp.ledger(nested, EPSILON)(x, w).check(1e-12)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_switch_is_folded_through_the_branch_taken(rng, index):
    x, w = arrays(rng, (3,), (3, 3))
    branches = [lambda x: x @ w, lambda x: jnp.tanh(x @ w) @ w, lambda x: jax.nn.sigmoid(x @ w) * x]
    explain = jaxlrp.lrp(lambda x, i: lax.switch(i, branches, x), jaxlrp.AttnLRP())
    expected = jaxlrp.lrp(branches[index], jaxlrp.AttnLRP())(x)
    np.testing.assert_allclose(jax.jit(explain)(x, index), expected, rtol=1e-12)
    # under vmap a switch computes all branches and selects
    many = jax.vmap(explain, in_axes=(0, 0))(jnp.stack([x, 2 * x]), jnp.array([index, 0]))
    np.testing.assert_allclose(many[0], expected, rtol=1e-12)
    jaxlrp.ledger(lambda x, i: lax.switch(i, branches, x), jaxlrp.AttnLRP())(x, index).check(1e-12)


def test_cond_on_a_value_of_the_model(rng):
    x, w = arrays(rng, (3,), (3, 3))

    def model(x, w):
        z = x @ w
        return lax.cond(z.sum() > 0, lambda z: jnp.tanh(z) @ w, lambda z: z, z)

    for sign in (1.0, -1.0):
        taken = (lambda x, w: jnp.tanh(x @ w) @ w) if (sign * x @ w).sum() > 0 else (lambda x, w: x @ w)
        got = jaxlrp.lrp(model, EPSILON)(sign * x, w)
        np.testing.assert_allclose(got, jaxlrp.lrp(taken, EPSILON)(sign * x, w), rtol=1e-12)


def test_fori_loop_with_known_bounds(rng):
    x, w = arrays(rng, (3,), (3, 3))
    model = lambda x, w: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w) * (i + 1), x)  # noqa: E731

    def loop(x, w):
        for i in range(3):
            x = jnp.tanh(x @ w) * (i + 1)
        return x

    got, want = (jaxlrp.lrp(f)(x, w) for f in (model, loop))  # the default lets scales pass
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_loop_without_known_end_says_what_to_do():
    model = lambda x: lax.while_loop(lambda h: h.sum() < 10.0, lambda h: 2 * h, x)  # noqa: E731
    with pytest.raises(jaxlrp.UnsupportedError, match=r"while.*test_control\.py.*lax\.scan"):
        jaxlrp.lrp(model)(jnp.ones(3))


def test_a_loop_over_weights_alone_is_evaluated(rng):
    x, w = arrays(rng, (3,), (3, 3))

    def normalised(w):  # a power iteration, as in spectral normalisation
        v = lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] @ w / jnp.linalg.norm(c[1])), (0, jnp.ones(3)))
        return w / jnp.linalg.norm(v[1])

    got = jaxlrp.lrp(lambda x, w: x @ normalised(w), EPSILON)(x, w)
    np.testing.assert_allclose(got, jaxlrp.lrp(lambda x, w: x @ w, EPSILON)(x, normalised(w)), rtol=1e-12)


def test_associative_scan_equals_scan(rng):
    # a linear recurrence h = a h + x, whose decay depends on parameters only
    x, a = arrays(rng, (6, 3), (6, 3))

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    fast = lambda x, a: lax.associative_scan(combine, (a, x))[1][-1]  # noqa: E731
    slow = lambda x, a: lax.scan(lambda h, ax: (h * ax[0] + ax[1], None), jnp.zeros(3), (a, x))[0]  # noqa: E731
    zero = jaxlrp.Composite(
        (jaxlrp.kind("*"), jaxlrp.Zero()),
        (jaxlrp.kind("move"), jaxlrp.Route()),
        (jaxlrp.kind("recurrence"), jaxlrp.LayerByLayer()),
    )
    got, want = jaxlrp.lrp(fast, zero)(x, a), jaxlrp.lrp(slow, zero)(x, a)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    np.testing.assert_allclose(got, x * jax.grad(lambda x: slow(x, a).sum())(x), rtol=1e-10)


# -- selectors and names ---------------------------------------------------------------------------------------------


class Stack(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        if not self.scan:
            for i in range(3):
                x = Block(name=f"block_{i}")(x, None)[0]
            return nn.Dense(2, name="head", param_dtype=x.dtype)(x)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(2, name="head", param_dtype=x.dtype)(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(param_dtype=x.dtype)(x)
        y = nn.gelu(nn.Dense(6, name="up", param_dtype=x.dtype)(y))
        return x + nn.Dense(x.shape[-1], name="down", param_dtype=x.dtype)(y), None


def test_scanned_layers_equal_unrolled_layers_exactly(rng, key):
    (x,) = arrays(rng, (5, 4))
    stacked = Stack(scan=True)
    params = stacked.init(key, x)
    blocks = params["params"]["blocks"]
    single = {f"block_{i}": jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(3)}
    flat = {"params": {**single, "head": params["params"]["head"]}}
    for composite in (None, jaxlrp.AttnLRP(), EPSILON):
        got = jaxlrp.lrp(stacked, composite)(params, x, target=1)
        want = jaxlrp.lrp(Stack(scan=False), composite)(flat, x, target=1)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    names = [a.layer.name for a, _ in jaxlrp.AttnLRP().assign(jaxlrp.trace(stacked, params, x)).every()]
    assert {"blocks/up", "blocks/down", "blocks/LayerNorm_0", "head"} <= set(names)


def test_entries_reach_layers_inside(rng, key):
    (x,) = arrays(rng, (5, 4))
    model = Stack(scan=True)
    params = model.init(key, x)
    composite = EPSILON.extend(
        (jaxlrp.first("linear"), jaxlrp.Flat()),
        (jaxlrp.last("linear"), jaxlrp.Zero()),
        (jaxlrp.name("**/down"), jaxlrp.Gamma(0.5)),
    )
    rules = {a.layer.name: str(a.rule) for a, _ in composite.assign(jaxlrp.trace(model, params, x)).every()}
    assert rules["blocks/up"] == "Flat()"
    assert rules["head"] == "Zero()"
    assert rules["blocks/down"].startswith("Gamma")


def test_a_recurrence_can_be_one_layer(rng):
    x, w, u = arrays(rng, (4, 3), (3, 3), (3, 3))
    whole = EPSILON.extend((jaxlrp.kind("recurrence"), jaxlrp.Gradient()))
    assigned = whole.assign(jaxlrp.trace(scanned, x, w, u))
    assert not next(a for a in assigned if a.layer.kind == "recurrence").inside


def test_layer_by_layer_is_refused_elsewhere(rng):
    x, w, u = arrays(rng, (4, 3), (3, 3), (3, 3))
    with pytest.raises(jaxlrp.RuleError, match="recurrences and branches"):
        jaxlrp.lrp(unrolled, EPSILON.extend((jaxlrp.kind("tanh"), jaxlrp.LayerByLayer())))(x, w, u)


# -- transforms ------------------------------------------------------------------------------------------------------


def test_transforms_of_a_scan(rng):
    x, w, u = arrays(rng, (2, 4, 3), (3, 3), (3, 3))
    explain = jaxlrp.lrp(scanned, EPSILON)
    one_by_one = jnp.stack([explain(row, w, u, target=1) for row in x])
    batch = jax.vmap(functools.partial(explain, target=1), in_axes=(0, None, None))(x, w, u)
    np.testing.assert_allclose(batch, one_by_one, rtol=1e-12)

    output, pull = jaxlrp.lrp_vjp(scanned, x[0], w, u, composite=EPSILON)
    every = jax.vmap(pull)(jnp.eye(3) * output)
    np.testing.assert_allclose(every[1], one_by_one[0], rtol=1e-10)

    loss = lambda w: jnp.sum(explain(x[0], w, u, target=1)[0] ** 2)  # noqa: E731
    h = 1e-6
    direction = jnp.asarray(rng.normal(size=w.shape))
    numeric = (loss(w + h * direction) - loss(w - h * direction)) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(w), direction), numeric, rtol=1e-6)


def test_size_of_the_compiled_program_does_not_grow_with_the_steps(rng):
    w, u = arrays(rng, (3, 3), (3, 3))

    def lines(steps):
        return len(jax.jit(jaxlrp.lrp(scanned, EPSILON)).lower(jnp.ones((steps, 3)), w, u).as_text().splitlines())

    assert lines(4) == lines(40)


def test_half_precision_is_accumulated_in_float32(rng):
    x, w, u = (a.astype(jnp.bfloat16) for a in arrays(rng, (4, 3), (3, 3), (3, 3)))
    relevance = jaxlrp.lrp(scanned, EPSILON)(x, w, u, target=0)
    assert relevance.dtype == jnp.float32
    wide = jaxlrp.lrp(scanned, EPSILON)(*(a.astype(jnp.float64) for a in (x, w, u)), target=0)
    np.testing.assert_allclose(relevance, wide, atol=0.1 * float(jnp.abs(wide).max()))
