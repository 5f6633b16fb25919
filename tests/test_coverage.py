"""The table of network families: a few of its rows, and that every one of its checks can fail."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxlrp
from benchmarks import coverage
from benchmarks.families import DETACHED, FAMILIES, PLAIN, Family, Ops, Weights, family
from benchmarks.families._layers import dense

pytestmark = pytest.mark.usefixtures("x64")


def named(name: str) -> Family:
    (found,) = [f for f in FAMILIES if f.name == name]
    return found


@pytest.mark.parametrize("name", ["Two-stream fusion", "Contrastive pair", "DeepSets", "Elman network"])
def test_family(name):
    row = coverage.examine(named(name))
    assert row.green, coverage.report([row])


@pytest.mark.heavy
@pytest.mark.skipif(sys.version_info < (3, 13), reason="minutes: on the newest Python alone; the script runs on all")
def test_all_families_of_our_own(capsys):
    assert coverage.main(["--skip-libraries", "--jobs", "1"]) == 0, capsys.readouterr().out


# -- every check can fail ----------------------------------------------------------------------------------------------


def thirds(product: jax.Array, factors: int = 2) -> jax.Array:
    return DETACHED.share(product, factors + 1)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("Two-stream fusion", {"share": thirds}),
        ("Two-stream fusion", {"act": PLAIN.act}),
        ("Contrastive pair", {"hold": PLAIN.hold}),
        ("GRU", {"gated": PLAIN.gated}),
    ],
)
def test_oracle_that_disagrees_is_red(name, wrong):
    row = coverage.examine(named(name), detached=dataclasses.replace(DETACHED, **wrong))
    assert row.oracle is not None
    assert row.oracle > 1e-3
    assert not row.green
    assert dataclasses.replace(row, oracle=0.0).green


def test_oracle_of_another_network_is_red():
    doubled = dataclasses.replace(DETACHED, share=lambda product, factors=2: 2.0 * product)
    row = coverage.examine(named("Two-stream fusion"), detached=doubled)
    assert row.forward is not None
    assert row.forward > 1e-3
    assert not dataclasses.replace(row, oracle=0.0).green


class Leaky(jaxlrp.Zero):
    """Keeps a part of the relevance to itself and gives it no name."""

    def fold(self, call: jaxlrp.LayerCall, *relevance: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(0.9 * r for r in super().fold(call, *relevance))


def test_ledger_that_does_not_close_is_red():
    row = coverage.examine(named("DeepSets"), coverage.COMPOSITE.extend((jaxlrp.name("rho0"), Leaky())))
    assert "'rho0' with rule Leaky()" in row.ledger
    assert not dataclasses.replace(row, oracle=0.0).green
    assert "rho0" in coverage.report([row])


def test_samples_that_explain_each_other_are_red():
    @family("centred", (2, 3))
    def centred(ops: Ops, weights: Weights, x: Any) -> Any:
        return dense(weights, "head", jnp.tanh(x.mean(axis=0)) + x, 2)

    row = coverage.examine(centred)
    assert row.batch is not None
    assert row.batch > 1e-3
    assert not dataclasses.replace(row, oracle=0.0).green


def test_unknown_operation_is_red():
    @family("eigenvalues", (2, 3, 3))
    def eigenvalues(ops: Ops, weights: Weights, x: Any) -> Any:
        return jnp.linalg.eigvalsh(x)

    row = coverage.examine(eigenvalues)
    assert not row.green
    assert row.cells()[:4] == ["eigenvalues", "no", "-", "-"]
    assert "eigenvalues: UnknownPrimitiveError: primitive 'eigh'" in coverage.report([row])


def test_value_that_no_layer_makes_is_counted():
    case = named("Layers with remat").build(DETACHED)
    layers = jaxlrp.trace(case.model, case.x, case.params)
    assert coverage.unclassified(layers, 1) == 0
    for i in range(1, len(layers) - 1):  # without the first, its output might be the input
        assert coverage.unclassified(layers[:i] + layers[i + 1 :], 1) == 1


def test_value_that_no_layer_of_a_loop_makes_is_counted():
    case = named("Elman network").build(DETACHED)
    layers = jaxlrp.trace(case.model, case.x, case.params)
    (body,) = [body for layer in layers for body in layer.bodies]
    assert coverage.unclassified(layers, 1) == 0
    body.layers.pop(-2)
    assert coverage.unclassified(layers, 1) == 1


# -- the operations that families are written with ---------------------------------------------------------------------


def test_plain_operations_leave_nothing_in_the_program():
    def with_operations(x):
        y = PLAIN.gated(x, PLAIN.act(jax.nn.sigmoid, x))
        return PLAIN.share(y * PLAIN.hold(jnp.sum(x)))

    def without(x):
        return x * jax.nn.sigmoid(x) * jnp.sum(x)

    x = jnp.ones(3)
    assert str(jax.make_jaxpr(with_operations)(x)) == str(jax.make_jaxpr(without)(x))


def test_detached_operations_by_hand():
    x, y = jnp.array([0.0, 2.0, -1.0]), jnp.array([3.0, 5.0, 7.0])

    def relevance(f):  # gradient times input of both factors
        return tuple(a * g for a, g in zip((x, y), jax.grad(lambda x, y: f(x, y).sum(), (0, 1))(x, y), strict=True))

    square = relevance(lambda x, y: DETACHED.act(jnp.square, x) + 0 * y)[0]
    assert square.tolist() == [0.0, 4.0, 1.0]
    half = relevance(lambda x, y: DETACHED.share(x * y))
    assert [r.tolist() for r in half] == [[0.0, 5.0, -3.5], [0.0, 5.0, -3.5]]
    gated = relevance(DETACHED.gated)
    assert [r.tolist() for r in gated] == [[0.0, 10.0, -7.0], [0.0, 0.0, 0.0]]
    quotient = relevance(lambda x, y: x / DETACHED.hold(y))
    assert [r.tolist() for r in quotient] == [[0.0, 0.4, -1.0 / 7.0], [0.0, 0.0, 0.0]]
    assert DETACHED.act(jnp.cos, x).tolist() == jnp.cos(x).tolist()


# -- the command -------------------------------------------------------------------------------------------------------


def test_command_prints_a_table_and_says_whether_it_is_green(capsys):
    assert coverage.main(["--family", "two-stream"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("family             traced  layers")
    assert "1 of 1 families green" in printed
    assert coverage.main(["--family", "two-stream", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| family | layers |")


def test_command_fails_if_a_row_is_red(monkeypatch, capsys):
    red = coverage.Row("DeepSets", error="NotImplementedError: no")
    monkeypatch.setattr(coverage, "examine", lambda family: red)
    assert coverage.main(["--family", "DeepSets"]) == 1
    assert "RED" in capsys.readouterr().out


def test_command_refuses_an_unknown_family(capsys):
    with pytest.raises(SystemExit):
        coverage.main(["--family", "no such network"])
    assert "no family" in capsys.readouterr().err


def test_the_readme_lists_every_family():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- coverage: begin -->")[2].partition("<!-- coverage: end -->")[0]
    rows = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    assert rows == [f.name for f in FAMILIES]
