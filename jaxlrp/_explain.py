"""What ``jaxlrp explain`` and ``jaxlrp layers`` do: read photos, explain them in batches, print and write."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from . import attributions, plot, targets
from .accounts import Ledger, balance
from .composites import Composite
from .errors import UnknownLayerError
from .fold import at
from .models import PretrainedImageModel, get_model
from .presets import PRESETS, EpsilonGammaBox
from .selectors import match_names
from .tables import table
from .transform import Setup, trace

EVENLY = "evenly spread"
_HIDDEN = 6  # heat maps of hidden layers when no pattern is given
_BLOWN_UP = 10.0  # relevance that grew by more than this on its way is reported
_PERCENTILE = 99.5  # the |relevance| that gets full colour: a single hot pixel must not pale the rest

_NOISE = 0.15  # of SmoothGrad, as a share of the input's range

COMPARED = ("gradient", "gradient x input", "integrated gradients", "SmoothGrad")


def _attribution(name: str, module: nn.Module, model: PretrainedImageModel) -> Callable[..., Any]:
    if name == "SmoothGrad":
        explain = attributions.smoothgrad(module, noise=_NOISE * (model.high - model.low))
        return functools.partial(explain, key=jax.random.key(0))
    make = {
        "gradient": attributions.gradient,
        "gradient x input": attributions.gradient_x_input,
        "integrated gradients": attributions.integrated_gradients,
    }
    return make[name](module)


class CommandError(Exception):
    """Nothing can be done; the message says why and what to do."""


@dataclass
class Photo:
    """One photo on its way through the command."""

    name: str
    image: np.ndarray  # what the model sees, uint8 [H, W, 3]
    x: np.ndarray  # the model's input, float32 [H, W, 3]
    target: int = 0
    probabilities: np.ndarray = field(default_factory=lambda: np.zeros(0))
    relevance: np.ndarray = field(default_factory=lambda: np.zeros(0))
    hidden: dict[str, np.ndarray] = field(default_factory=dict)
    compared: dict[str, np.ndarray] = field(default_factory=dict)


def layers(arguments: argparse.Namespace) -> int:
    """Print the layer and rule table of a model."""
    model = get_model(arguments.model)
    module, variables = model.load()
    found = trace(module, variables, jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32))
    print(_composite(arguments, model).assign(found))
    print(f"\n{len(found)} layers")
    return 0


def explain(arguments: argparse.Namespace) -> int:
    """Explain photos and write what was found."""
    model = get_model(arguments.model)
    target = None if arguments.target is None else model.find_class(arguments.target)
    with _output_folder(arguments.out) as out, _Progress() as progress:
        photos, skipped = _read(arguments.photos, model, progress)
        if not photos:
            raise CommandError("none of the photos could be read")
        module, variables = model.load()
        composite = _composite(arguments, model)
        hidden = _hidden_layers(arguments.layers, module, variables, model)
        ledger, seconds = _run(module, variables, composite, photos, target, hidden, arguments.batch, progress)
        if arguments.compare:
            _compare(module, variables, model, photos, arguments.batch, progress)
        _write(out, photos, model, arguments, progress)
    _report(photos, model, ledger, seconds)
    print(f"\nwrote {out / 'contact_sheet.png'} and a folder for each of {len(photos)} photos")
    if skipped:
        print(f"skipped {len(skipped)} of {len(skipped) + len(photos)} photos", file=sys.stderr)
    return 1 if skipped else 0


# -- before -----------------------------------------------------------------------------------------------------------


_WITHOUT_BIAS = ("guided_backprop", "deconvnet", "gradient")  # gradients know no share of a bias


def _composite(arguments: argparse.Namespace, model: PretrainedImageModel) -> Composite:
    name, bias = arguments.composite, arguments.bias
    if name == "epsilon_gamma_box":
        return EpsilonGammaBox(model.low, model.high, bias=bias)
    if name in _WITHOUT_BIAS:
        if bias != "absorb":
            raise CommandError(f"--bias={bias} means nothing to {name}: it folds gradients, not relevance")
        return PRESETS[name]()
    return PRESETS[name](bias=bias)


@contextmanager
def _output_folder(folder: str) -> Iterator[Path]:
    """The output folder, tried before any work is done, and gone again if it was made for nothing."""
    path, made = Path(folder), not Path(folder).exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CommandError(f"cannot write to the output folder {folder}: {error.strerror or error}") from error
    try:
        yield path
    except BaseException:
        if made:
            with suppress(OSError):  # not empty: an earlier photo was written whole
                path.rmdir()
        raise


def _read(paths: Sequence[str], model: PretrainedImageModel, progress: _Progress) -> tuple[list[Photo], list[str]]:
    """The readable photos; the others are named on standard error."""
    photos: list[Photo] = []
    skipped: list[str] = []
    names: set[str] = set()
    sources = [(Path(p).stem, p) for p in paths] or [(name, name) for name in plot.sample_photos()]
    samples = {} if paths else plot.sample_photos()
    for stem, path in progress.each("reading photos", sources):
        try:
            image = plot.load_photo(path) if paths else samples[path]
        except plot.PhotoError as error:
            progress.print(f"jaxlrp: skipped {error}")
            skipped.append(path)
            continue
        name = _unique(re.sub(r"[^\w.-]+", "_", stem) or "photo", names)
        x = model.preprocess(image)
        seen = np.clip(np.rint((x - model.low) / (model.high - model.low) * 255), 0, 255).astype(np.uint8)
        photos.append(Photo(name, seen, np.asarray(x, np.float32)))
    return photos, skipped


def _unique(name: str, taken: set[str]) -> str:
    candidate, k = name, 2
    while candidate in taken:
        candidate, k = f"{name}-{k}", k + 1
    taken.add(candidate)
    return candidate


def _hidden_layers(
    pattern: str | None, module: nn.Module, variables: Any, model: PretrainedImageModel
) -> tuple[str, ...]:
    """Names of the hidden layers at whose inputs heat maps are wanted: those with an image-shaped input."""
    if pattern is None:
        return ()
    found = trace(module, variables, jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32))
    spatial = [layer.name for layer in found if _is_map(layer.inputs)]
    if pattern == EVENLY:
        convs = [layer.name for layer in found if layer.op == "conv" and _is_map(layer.inputs)][1:]
        places = np.linspace(0, len(convs) - 1, min(_HIDDEN, len(convs))).round().astype(int)
        return tuple(convs[i] for i in places)
    chosen = tuple(n for n, yes in zip(spatial, match_names(pattern, spatial), strict=True) if yes)
    if not chosen:
        hint = " (write --layers=GLOB, or put photos before --layers)" if Path(pattern).exists() else ""
        raise UnknownLayerError(
            f"no layer with an image as input is called {pattern!r}{hint}; 'jaxlrp layers' lists all names"
        )
    return chosen


def _is_map(values: Sequence[Any]) -> bool:
    return len(values) == 1 and len(values[0].shape) == 4 and values[0].shape[1] > 1


# -- the work ---------------------------------------------------------------------------------------------------------


@dataclass
class Seconds:
    """Wall-clock time of the parts."""

    compile: float = 0.0
    batches: list[tuple[int, float]] = field(default_factory=list)

    @property
    def per_photo(self) -> float:
        """Mean time for one photo, compilation apart."""
        return sum(t for _, t in self.batches) / max(1, sum(n for n, _ in self.batches))


def _batches(photos: Sequence[Photo], size: int) -> Iterator[tuple[list[Photo], jax.Array]]:
    """Batches of one size: the last is filled up with copies, so that one program serves all."""
    size = min(size, len(photos))
    for start in range(0, len(photos), size):
        some = list(photos[start : start + size])
        rows = [p.x for p in some] + [some[-1].x] * (size - len(some))
        yield some, jnp.asarray(np.stack(rows))


def _run(
    module: nn.Module,
    variables: Any,
    composite: Composite,
    photos: Sequence[Photo],
    target: int | None,
    hidden: Sequence[str],
    batch: int,
    progress: _Progress,
) -> tuple[Ledger, Seconds]:
    setup = Setup(module, composite, None)

    def one(variables: Any, x: jax.Array) -> Any:
        """Forward pass, fold and ledger of one photo; vmapped, so that every photo has a ledger of its own."""
        forward = setup.forward((variables, x[None]), {})
        logits = forward.output
        chosen = jnp.argmax(logits, axis=-1) if target is None else jnp.full(logits.shape[:-1], target)
        ledger, relevance = balance(forward, targets.logit(chosen)(logits))
        by_name = {a.layer.name: a.layer.inputs[0] for a in forward.assignments if a.layer.name in hidden}
        maps = {name: at(relevance, value)[0].sum(-1) for name, value in by_name.items()}
        return jax.nn.softmax(logits[0]), forward.gather(relevance)[0], chosen[0], maps, ledger

    seconds, ledgers, program = Seconds(), [], None
    batches = list(_batches(photos, batch))
    with progress.task("compiling"):
        start = time.perf_counter()
        program = jax.jit(jax.vmap(one, in_axes=(None, 0))).lower(variables, batches[0][1]).compile()
        seconds.compile = time.perf_counter() - start
    for some, x in progress.each("explaining", batches):
        start = time.perf_counter()
        results = jax.block_until_ready(program(variables, x))
        seconds.batches.append((len(some), time.perf_counter() - start))
        live = functools.partial(_first, len(some))
        probabilities, relevance, chosen, maps, ledger = jax.tree.map(live, results)
        for i, photo in enumerate(some):
            photo.probabilities, photo.relevance, photo.target = (
                probabilities[i],
                relevance[i],
                int(chosen[i]),
            )
            photo.hidden = {name: maps[name][i] for name in hidden}
        ledgers.append(ledger)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *ledgers), seconds


def _first(count: int, rows: Any) -> np.ndarray:
    return np.asarray(rows)[:count]


def _compare(
    module: nn.Module,
    variables: Any,
    model: PretrainedImageModel,
    photos: Sequence[Photo],
    batch: int,
    progress: _Progress,
) -> None:
    """Other attributions of the same class, batch by batch."""
    work = [(name, *b) for name in COMPARED for b in _batches(photos, batch)]
    programs = {name: jax.jit(_attribution(name, module, model)) for name in COMPARED}
    for name, some, x in progress.each("comparing", work):
        chosen = [p.target for p in some] + [some[-1].target] * (len(x) - len(some))
        result = np.asarray(programs[name](variables, x, target=jnp.asarray(chosen)))
        for photo, values in zip(some, result, strict=False):
            photo.compared[name] = values


# -- after ------------------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    photos: Sequence[Photo],
    model: PretrainedImageModel,
    arguments: argparse.Namespace,
    progress: _Progress,
) -> None:
    names, cmap = model.class_names(), arguments.cmap
    rows, titles = [], []
    for photo in progress.each("writing", photos):
        folder = out / photo.name
        folder.mkdir(exist_ok=True)
        heat = plot.normalise(plot.pool_channels(photo.relevance), percentile=_PERCENTILE)
        overlay = plot.overlay(photo.image, heat, cmap=cmap)
        plot.save_png(folder / "overlay.png", overlay)
        plot.save_png(folder / "heatmap.png", plot.diverging(heat, cmap))
        _save_array(folder / "relevance.npy", photo.relevance.astype(np.float32))
        row = [photo.image, overlay, plot.diverging(heat, cmap)]
        others = {**photo.compared, **photo.hidden}
        for name, values in others.items():
            flat = plot.pool_channels(values)
            picture = plot.diverging(_display(flat, photo.image.shape[:2]), cmap)
            plot.save_png(folder / f"{_file_name(name)}.png", picture)
            row.append(picture)
        rows.append(row)
        titles.append(f"{names[photo.target]}\n{photo.probabilities[photo.target]:.2f}")
    columns = ["photo", arguments.composite, "relevance", *photos[0].compared, *photos[0].hidden]
    caption = f"{model.name}; colours reach full strength at the {_PERCENTILE}th percentile of each map"
    sheet = plot.contact_sheet(rows, columns, titles, title="Layer-wise relevance", caption=caption, cmap=cmap)
    plot.save_png(out / "contact_sheet.png", sheet)


def _display(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    scaled = plot.normalise(heat, percentile=_PERCENTILE)
    return scaled if scaled.shape == size else plot.upscale(scaled, size, method="nearest")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _save_array(path: Path, values: np.ndarray) -> None:
    """Write an array beside its place and move it there, so that no half of it is ever seen."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getvalue())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _report(photos: Sequence[Photo], model: PretrainedImageModel, ledger: Ledger, seconds: Seconds) -> None:
    names = model.class_names()
    rows = []
    for photo in photos:
        best = np.argsort(photo.probabilities)[::-1][:5]
        for k, i in enumerate(best):
            mark = "*" if i == photo.target else ""
            rows.append([photo.name if k == 0 else "", names[i], f"{photo.probabilities[i]:.3f}", mark])
        if photo.target not in best:
            rows.append(["", names[photo.target], f"{photo.probabilities[photo.target]:.3f}", "*"])
    print(table(("photo", "class", "probability", "explained"), rows, right=[2]))
    print()
    print(_kept(ledger))
    for photo, start, end in zip(photos, np.ravel(ledger.start), np.ravel(ledger.end), strict=True):
        if abs(end) > _BLOWN_UP * abs(start):
            print(
                f"warning: relevance of {photo.name} grew from {start:.4g} to {end:.4g}: positive and negative parts "
                "cancel in a denominator, so its map means little; try --composite=epsilon_plus_flat or --bias=absorb"
            )
    print(f"\ncompiled in {seconds.compile:.1f} s, {seconds.per_photo:.3f} s per photo")


def _percent(share: float) -> str:
    return f"{share:.1f} %" if abs(share) < 1e5 else f"{share:.1g} %"


def _kept(ledger: Ledger) -> str:
    """Of every layer: how much relevance came in, was handed on, and what it lost the rest to; means over photos.

    Layers that keep everything are counted, not listed.
    """
    arrived, handed = (np.mean(np.asarray(a), axis=0) for a in (ledger.arrived, ledger.handed))
    losses = {name: np.mean(np.asarray(a), axis=0) for name, a in ledger.losses.items()}
    scale = max(abs(float(np.mean(ledger.start))), 1e-30)
    rows, whole = [], 0
    for i in reversed(range(len(ledger.layers))):
        lost = {n: float(v[i]) for n, v in losses.items() if abs(v[i]) > 5e-4 * scale}
        if not lost and abs(arrived[i] - handed[i]) <= 5e-4 * scale:
            whole += 1
            continue
        share = 100 * handed[i] / arrived[i] if arrived[i] else 0.0
        why = ", ".join(f"{n} {v:+.4g}" for n, v in lost.items())
        rows.append(
            [
                ledger.layers[i],
                ledger.rules[i],
                f"{arrived[i]:.4g}",
                f"{handed[i]:.4g}",
                _percent(share),
                why,
            ]
        )
    start, end = float(np.mean(ledger.start)), float(np.mean(ledger.end))
    share = 100 * end / start if start else 0.0
    rows.append(["output to input", "", f"{start:.4g}", f"{end:.4g}", _percent(share), ""])
    text = table(("layer", "rule", "relevance in", "out", "kept", "lost to"), rows, right=[2, 3, 4])
    return f"{text}\n{whole} further layers kept all of it"


# -- progress --------------------------------------------------------------------------------------------------------


class _Progress:
    """A progress bar on standard error while it is a terminal; nothing in a pipe or log."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def print(self, text: str) -> None:
        """A line on standard error that does not tear the bar."""
        if self.bar.disable:
            print(text, file=sys.stderr)
        else:
            self.bar.console.print(text, markup=False, highlight=False)

    def each(self, title: str, items: Sequence[Any]) -> Iterator[Any]:
        """Go through items with a bar."""
        yield from self.bar.track(items, description=title)

    @contextmanager
    def task(self, title: str) -> Iterator[None]:
        """A bar without an end for work that cannot be counted."""
        task = self.bar.add_task(title, total=None)
        yield
        self.bar.update(task, total=1, completed=1)
