"""Relevance on this machine's accelerator: how exact, and how fast.

    python benchmarks/gpu.py [--small] [--rounds N]

Prints the device. Then, for two networks with random weights, how far logits, gradient and relevance on it are from
those of the CPU in float32, in jax's default precision (TF32 on recent NVIDIA GPUs) and in the highest: the largest
difference, divided by the largest value. Then the table of `benchmarks/speed.py`. On a machine without an accelerator
the CPU is compared with itself; ``--small`` makes that a matter of seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jaxlrp
from benchmarks import networks
from benchmarks.speed import HEAD, Case, attention, convolutional, measure, vision
from jaxlrp.tables import table

EXACT = {"ResNet50": "EpsilonPlusFlat", "ViT": "AttnLRP"}  # the composite that is compared with the CPU's


def cases(small: bool) -> dict[str, Case]:
    """The networks; small ones have fewer and smaller images, and the transformer fewer layers."""
    batch, size = (1, 64) if small else (8, 224)
    transformer = networks.ViT(2, 64, 4) if small else networks.ViT()
    return {
        "ResNet50": vision(networks.ResNet50(), batch, convolutional(), size),
        "ViT": vision(transformer, batch, attention(), size),
    }


def compared(case: Case, composite: str) -> dict[str, Callable[[Any, jax.Array], jax.Array]]:
    """What is computed on both devices, as functions of ``(params, x)``."""
    return {
        "logits": case.run,
        "gradient": lambda params, x: jax.grad(lambda x: case.run(params, x)[:, 1].sum())(x),
        composite: jaxlrp.lrp(case.run, case.composites[composite], argnums=1, target=1),
    }


def exactness(name: str, case: Case, device: Any, cpu: Any) -> list[list[str]]:
    """Largest difference to the CPU divided by the CPU's largest value, in default and in highest precision."""
    rows = []
    for what, function in compared(case, EXACT[name]).items():

        def on(where: Any, precision: str | None, function: Callable[..., jax.Array] = function) -> np.ndarray:
            with jax.default_matmul_precision(precision):
                return np.asarray(jax.jit(function)(*jax.device_put((case.params, case.x), where)))

        want = on(cpu, "highest")
        far = [np.abs(on(device, p) - want).max() / np.abs(want).max() for p in (None, "highest")]
        rows.append([name, what, *(f"{f:.1e}" for f in far)])
    return rows


def main() -> None:
    """Compare, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small networks, for a machine without an accelerator")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    print(f"{device.device_kind} ({device.platform}), {jax.device_count()} of them, jax {jax.__version__}")
    if device.platform == "cpu":
        print("No accelerator was found: the CPU is compared with itself.")
    found = cases(arguments.small)

    rows = [row for name, case in found.items() for row in exactness(name, case, device, cpu)]
    print("\n" + table(["difference to the CPU", "", "default", "highest"], rows, right=(2, 3)))

    # The count of products knows the CPU's names of operations alone.
    head = HEAD if device.platform == "cpu" else HEAD[:-1]
    # Compiled once: a second time would find what was tuned before.
    measured = {name: measure(case, arguments.rounds, compiled_times=1)[0] for name, case in found.items()}
    rows = [[name, *row][: len(head)] for name, rows in measured.items() for row in rows]
    print("\n" + table(head, rows, right=range(2, len(head))))


if __name__ == "__main__":
    main()
