"""The scripts that measure, on networks small enough for a test: that they run and print a row of everything."""

from __future__ import annotations

import jax
import pytest

import jaxlrp
from benchmarks import gpu, networks, scaling
from benchmarks.speed import Case


@pytest.fixture
def case() -> Case:
    module = scaling.ConvNet(4)
    x = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    return Case(module.apply, module.init(jax.random.key(0), x), x, {"EpsilonPlusFlat": jaxlrp.EpsilonPlusFlat()})


def test_the_script_for_accelerators_prints_a_row_for_every_program(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "cases", lambda small: {"ResNet50": case})
    monkeypatch.setattr("sys.argv", ["gpu.py", "--small", "--rounds", "1"])
    gpu.main()
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("ResNet50")]
    compared = [["ResNet50", name] for name in ("logits", "gradient", "EpsilonPlusFlat")]
    assert rows == [*compared, *compared[1:]]


@pytest.mark.parametrize("steps", [0, 3])
def test_capture_stands_beside_programs_that_write_as_many_results(case: Case, steps: int) -> None:
    composite = jaxlrp.EpsilonPlusFlat()
    if steps:
        module, x = networks.ScannedEncoder(steps, 2, 8), jax.random.normal(jax.random.key(1), (2, 5, 4))
        case, composite = Case(module.apply, module.init(jax.random.key(0), x), x, {}), jaxlrp.AttnLRP()
    rows = scaling._captured_of("net", case, composite, 1, steps)
    programs = ["input", "all layers", "none, results written", "none, results formed"]
    assert [row[:2] for row in rows] == [["net", name] for name in programs]
    products = [int(row[-1]) for row in rows]
    assert products[0] == products[1] > 0  # capture multiplies nothing
    assert products[2:] == [0, 0]
