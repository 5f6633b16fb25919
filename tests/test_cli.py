"""The command line: what it prints, what it writes, and what it says to bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxlrp import _explain, plot
from jaxlrp.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line; returns its exit status, output and errors."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse's own errors
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return command


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two real photos, and files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("chelsea", "coffee"):
        Image.fromarray(plot.sample_photos()[name]).save(folder / f"{name}.png")
    whole = (folder / "coffee.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 3])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.heavy
def test_explains_photos_and_skips_what_is_none(run: Run, photos: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = [photos["truncated"], photos["empty"], photos["text"], tmp_path / "missing.png"]
    status, said, errors = run("explain", photos["chelsea"], *bad, photos["coffee"], "--out", out, "--batch", "1")
    assert status == 1
    for path in bad:
        assert f"skipped {path}" in errors
    assert "skipped 4 of 6 photos" in errors
    assert "tiger cat" in said
    assert "espresso" in said
    assert "compiled in" in said
    assert "output to input" in said
    assert sorted(p.name for p in out.iterdir()) == ["chelsea", "coffee", "contact_sheet.png"]
    for name in ("chelsea", "coffee"):
        files = sorted(p.name for p in (out / name).iterdir())
        assert files == ["heatmap.png", "overlay.png", "relevance.npy"]
        relevance = np.load(out / name / "relevance.npy", allow_pickle=False)
        assert relevance.shape == (224, 224, 3)
        assert relevance.dtype == np.float32
        assert np.isfinite(relevance).all()
        assert relevance.max() > 0
    # The cup, not the table, carries the relevance of espresso: the middle third holds more than its area.
    coffee = np.load(out / "coffee" / "relevance.npy").sum(-1)
    assert coffee[56:168, 56:168].sum() > 1.2 * coffee.sum() / 4


@pytest.mark.heavy
def test_one_batch_equals_one_by_one(run: Run, photos: dict[str, Path], tmp_path: Path) -> None:
    both = [photos["chelsea"], photos["coffee"]]
    for size in ("1", "2"):
        assert run("explain", *both, "--out", tmp_path / size, "--batch", size, "--target", "espresso")[0] == 0
    for name in ("chelsea", "coffee"):
        one, two = (np.load(tmp_path / size / name / "relevance.npy") for size in ("1", "2"))
        np.testing.assert_allclose(one, two, atol=1e-4 * np.abs(two).max())


@pytest.mark.heavy
def test_compares_and_shows_hidden_layers(
    run: Run, photos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_explain, "COMPARED", ("gradient", "gradient x input"))  # the others take minutes
    status, said, _ = run(
        "explain", photos["chelsea"], "--out", tmp_path, "--compare", "--layers=blocks_6_0/*/conv", "--target", "282"
    )
    assert status == 0
    assert "tiger cat" in said
    files = {p.name for p in (tmp_path / "chelsea").iterdir()}
    assert {"gradient.png", "gradient_x_input.png", "blocks_6_0_depthwise_conv.png"} <= files


def test_layers_prints_every_layer_with_its_rule(run: Run) -> None:
    status, said, _ = run("layers", "--composite", "epsilon-gamma-box", "--bias", "ignore")
    assert status == 0
    assert "stem/conv" in said
    assert "ZBox(low=-0.992188, high=1)" in said
    assert "Gamma(bias='ignore')" in said
    assert "classifier" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "efficientnet-lite"], "Did you mean 'efficientnet-lite0'"),
        (["--composite", "epsilon_pluss"], "did you mean epsilon_plus"),
        (["--target", "tabby dog"], "Did you mean"),
        (["--target", "1000"], "0 to 999"),
        (["--layers=blocks_99"], "no layer with an image as input is called 'blocks_99'"),
        (["--batch", "0"], "at least 1"),
        (["--composite", "gradient", "--bias", "ignore"], "folds gradients"),
    ],
)
def test_bad_options_say_what_to_do(
    run: Run, photos: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    status, _, errors = run("explain", photos["chelsea"], "--out", out, *arguments)
    assert status == 2
    assert message in errors
    assert not out.exists(), "nothing half written"


def test_no_readable_photo(run: Run, photos: dict[str, Path], tmp_path: Path) -> None:
    status, _, errors = run("explain", photos["text"], "--out", tmp_path / "out")
    assert status == 2
    assert str(photos["text"]) in errors
    assert "none of the photos could be read" in errors
    assert not (tmp_path / "out").exists()


def test_output_folder_that_is_a_file(run: Run, photos: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    status, _, errors = run("explain", photos["chelsea"], "--out", tmp_path / "taken")
    assert status == 2
    assert f"cannot write to the output folder {tmp_path / 'taken'}" in errors


def test_output_folder_that_cannot_be_written(run: Run, photos: dict[str, Path]) -> None:
    status, _, errors = run("explain", photos["chelsea"], "--out", "/proc/jaxlrp")
    assert status == 2
    assert "cannot write to the output folder /proc/jaxlrp" in errors


def test_pattern_that_is_a_photo(run: Run, photos: dict[str, Path], tmp_path: Path) -> None:
    status, _, errors = run("explain", photos["chelsea"], "--out", tmp_path / "out", "--layers", photos["coffee"])
    assert status == 2
    assert "put photos before --layers" in errors


def test_damaged_weights(run: Run, photos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxlrp import models

    def damaged() -> None:
        raise models.WeightFileError(f"{tmp_path}/weights.pth: truncated")

    model = models.get_model("efficientnet-lite0")
    broken = {model.name: type(model)(**{**vars(model), "load": damaged})}
    monkeypatch.setattr(models, "MODELS", broken)
    status, _, errors = run("explain", photos["chelsea"], "--out", tmp_path / "out")
    assert status == 2
    assert "weights.pth: truncated" in errors
