"""The convolutions that rules run themselves, beside jax's own.

    python benchmarks/convolutions.py [--rounds N]

For layers of well-known networks: transposes of strided convolutions by phases, depthwise convolutions as shifted
products, 1 × 1 convolutions as matrix products and large ones of three by three taps with fewer multiplications,
forwards and transposed. Prints medians, and the largest difference relative to the largest value.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parent.parent))

from jaxlrp.convolutions import Convolution
from jaxlrp.tables import table

# what it is, batch, side, kernel, stride, input and output features, depthwise or not
LAYERS = [
    ("ResNet50, first", 8, 224, 7, 2, 3, 64, False),
    ("ResNet50, strided 1x1", 8, 56, 1, 2, 256, 512, False),
    ("ResNet50, 1x1", 8, 14, 1, 1, 1024, 256, False),
    ("ResNet50, 1x1", 8, 7, 1, 1, 512, 2048, False),
    ("ViT-B/16, patches", 4, 224, 16, 16, 3, 768, False),
    ("EfficientNet, depthwise", 8, 112, 3, 1, 32, 32, True),
    ("EfficientNet, depthwise", 8, 56, 5, 2, 144, 144, True),
    ("VGG16", 4, 112, 3, 1, 128, 128, False),
    ("VGG16", 4, 56, 3, 1, 256, 256, False),
    ("VGG16", 4, 28, 3, 1, 512, 512, False),
    ("VGG16", 4, 14, 3, 1, 512, 512, False),
    ("ResNet50", 16, 14, 3, 1, 256, 256, False),
]


def timed(functions: dict[str, Callable[..., Any]], rounds: int, *args: Any) -> tuple[dict[str, float], list[Any]]:
    """Median milliseconds of every function, in turn, and what each gives."""
    compiled = {name: jax.jit(f).lower(*args).compile() for name, f in functions.items()}
    results = [jax.block_until_ready(f(*args)) for f in compiled.values()]
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(s) for name, s in seconds.items()}, results


def rows(layer: tuple[Any, ...], rounds: int) -> list[list[str]]:
    """One row for each way of a layer."""
    name, batch, side, kernel, stride, features, out, depthwise = layer
    x = jax.random.normal(jax.random.key(0), (batch, side, side, features))
    w = jax.random.normal(jax.random.key(1), (kernel, kernel, 1 if depthwise else features, out))
    groups = features if depthwise else 1

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    (equation,) = jax.make_jaxpr(run)(x, w).eqns
    own = Convolution(equation.params, x.shape, w.shape)
    s = jax.random.normal(jax.random.key(2), jax.eval_shape(run, x, w).shape)
    apply = own.apply_frugally if own.saves else own.apply
    transpose = functools.partial(own.transpose, frugally=own.saves)
    ways = [("transposed", {"jax": lambda w, s: jax.vjp(lambda x: run(x, w), x)[1](s)[0], "own": transpose}, (w, s))]
    if own.applies or own.saves:
        ways.insert(0, ("forwards", {"jax": run, "own": apply}, (x, w)))
    found = []
    for way, functions, args in ways:
        times, (theirs, ours) = timed(functions, rounds, *args)
        error = float(jnp.abs(theirs - ours).max() / jnp.abs(theirs).max())
        cells = [
            f"{times['jax']:.1f} ms",
            f"{times['own']:.1f} ms",
            f"{times['jax'] / times['own']:.1f}x",
            f"{error:.0e}",
        ]
        found.append([name, f"{kernel}x{kernel}, stride {stride}, {features} to {out}", way, *cells])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    head = ["layer", "", "", "jax's own", "here", "faster", "difference"]
    print(table(head, [row for layer in LAYERS for row in rows(layer, rounds)], right=range(3, len(head))))
    print(f"\n{jax.devices()[0].platform}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
