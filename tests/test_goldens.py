"""Agreement with zennit 1.0.0 and LXT 2.1 on everything that was recorded with it; see tests/goldens/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from benchmarks import goldens as benchmark

pytestmark = pytest.mark.usefixtures("x64")

LAYERS = ("dense", "dense_nobias", "conv2d", "conv2d_stride2", "conv2d_depthwise", "conv2d_dilated", "conv1d")
CASES = [f"{layer}/{sign}" for layer in LAYERS for sign in ("mixed", "nonneg")]
NETS = ("vgg_bn", "resnet_bn", "mlp")


def disagreements(rows: list[benchmark.Row]) -> list[benchmark.Row]:
    """Rows that are off, with NaN counting as off."""
    return [row for row in rows if not row.difference < row.tolerance]


def test_every_rule_on_every_layer(goldens: Path) -> None:
    rows = list(benchmark.compare_rules())
    assert not disagreements(rows)
    compared = {(row.case, row.setting) for row in rows if row.setting != "forward"}
    # One by one and not only by number, so that a comparison made twice cannot hide one that was skipped.
    names = set(np.load(goldens / "zennit_rules.npz"))
    expected = {(case, setting) for case in CASES for setting in benchmark.RULES if f"{case}/{setting}" in names}
    assert compared == expected
    leaves = {name.split("/")[-1] for name in names} - {"x", "kernel", "bias", "z", "r_out"}
    assert leaves == set(benchmark.RULES)
    assert len(compared) == len(CASES) * len(benchmark.RULES) == 182
    assert len(rows) == len(compared) + len(CASES)


def test_every_composite_on_every_net(goldens: Path) -> None:
    rows = list(benchmark.compare_nets())
    assert not disagreements(rows)
    compared = [f"{row.case}/{row.setting}" for row in rows if row.setting != "forward"]
    assert len(compared) == len(set(compared)) == len(NETS) * len(benchmark.COMPOSITES) * len(benchmark.SEEDS) == 54
    names = [name for name in np.load(goldens / "zennit_nets.npz") if "/onehot/" in name or "/logit/" in name]
    assert set(compared) == set(names)
    assert {row.case for row in rows if row.setting == "forward"} == set(NETS)


def test_the_transformers(goldens: Path) -> None:
    rows = list(benchmark.compare_transformers())
    assert not disagreements(rows)
    recorded = {
        (path.stem, name.removeprefix("relevance/"))
        for path in goldens.glob("lxt_*.npz")
        for name in np.load(path)
        if name.startswith("relevance/") and "gradient" not in name
    }
    assert {(row.case, row.setting) for row in rows} == recorded


def test_tables_hold_all_settings_that_were_recorded(goldens: Path) -> None:
    described = json.loads((goldens / "zennit.json").read_text())
    assert set(described["rules"]) == set(benchmark.RULES)
    assert [case["key"] for case in described["rule_cases"]] == CASES


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [
        ("epsilon_1e-6", jaxlrp.Epsilon(1.1e-6)),
        ("epsilon_nobias", jaxlrp.Epsilon(1e-6)),
        ("zplus", jaxlrp.ZPlus(bias="ignore")),
        ("alpha2beta1", jaxlrp.AlphaBeta(2.0001, 1.0001)),
        ("gamma_0.25", jaxlrp.Gamma(0.2501)),
        ("flat", jaxlrp.WSquare()),
        ("zbox_-3_3", jaxlrp.ZBox(-3.0, 3.0001)),
    ],
)
def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch, setting: str, wrong: jaxlrp.Rule) -> None:
    module, variables, data = benchmark.rule_cases()["conv2d/mixed"]
    monkeypatch.setattr(benchmark, "rule_cases", lambda: {"conv2d/mixed": (module, variables, data)})
    monkeypatch.setattr(benchmark, "RULES", {setting: wrong})
    assert [row.setting for row in disagreements(list(benchmark.compare_rules()))] == [setting]


def test_a_wrong_composite_and_nan_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = benchmark.golden_nets()["mlp"]
    monkeypatch.setattr(benchmark, "golden_nets", lambda: {"mlp": mlp})
    monkeypatch.setattr(benchmark, "COMPOSITES", {"epsilon_plus": jaxlrp.EpsilonPlus(1e-4)})
    assert len(disagreements(list(benchmark.compare_nets()))) == len(benchmark.SEEDS)
    assert disagreements([benchmark.Row("mlp", "nan", benchmark.relative(jnp.array([jnp.nan]), np.ones(1)))])
