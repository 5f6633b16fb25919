"""Cost of relevance beside the network's own input gradient.

    python benchmarks/speed.py [--network NAME ...] [--rounds N]

For every network: the jitted gradient of a logit with respect to the input, and every composite, run in turn so that
all see the same machine, in float32. Prints medians, ratios to the gradient, compile time (the median of three, in turn
as well), the compiled program's temporary memory and how many convolutions and matrix products it holds. In rows called
in full, the highest precision is asked for, which leaves out Winograd's convolutions (`jaxlrp/winograd.py`; elsewhere
three products stand for each of those). How far both are from relevance in float64 is said in a second table. (Where it
changes nothing there is no such row.)
"""

from __future__ import annotations

import argparse
import collections
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jaxlrp
from benchmarks import accuracy, networks
from jaxlrp.models import bert, get_model
from jaxlrp.tables import table

IN_FULL = "highest"  # a precision of jax.default_matmul_precision
# Options of XLA by which YNNPACK has nothing but dots, and no convolutions on CPUs: docs/devices.md.
OWN_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
HEAD = ["network", "", "time", "of gradient", "compile", "of gradient's", "temporary", "of gradient's", "products"]
OFF = ["off float64", "", "in norm", "in full", "at most", "in full"]


class Case(NamedTuple):
    """A network as a function of ``(params, x)``, and the composites that matter for it."""

    run: Callable[..., jax.Array]
    params: Any
    x: jax.Array
    composites: dict[str, Any]


class Measured(NamedTuple):
    """One program."""

    compile_s: float  # from the function to the program, as found when it was compiled first
    temporary_mb: float
    products: int
    call: Callable[[], Any]
    compile_again: Callable[[], float]  # seconds


def vision(module: Any, batch: int, composites: dict[str, Any], size: int = 224) -> Case:
    """A network of square images with random weights."""
    x = jax.random.uniform(jax.random.key(1), (batch, size, size, 3))
    params = jax.jit(module.init)(jax.random.key(0), x[:1])
    return Case(module.apply, params, x, composites)


def convolutional() -> dict[str, Any]:
    return {
        "Epsilon": jaxlrp.Composite.uniform(jaxlrp.Epsilon()),
        "EpsilonPlus": jaxlrp.EpsilonPlus(),
        "EpsilonPlusFlat": jaxlrp.EpsilonPlusFlat(),
        "EpsilonGammaBox": jaxlrp.EpsilonGammaBox(0.0, 1.0),
        "EpsilonAlpha2Beta1": jaxlrp.EpsilonAlpha2Beta1(),
    }


def attention() -> dict[str, Any]:
    return {"AttnLRP": jaxlrp.AttnLRP(), "CPLRP": jaxlrp.CPLRP()}


def _efficientnet(batch: int) -> Case:
    module, variables = get_model("efficientnet-lite0").load()
    x = jax.random.uniform(jax.random.key(1), (batch, 224, 224, 3), minval=-1.0)
    return Case(module.apply, variables, x, {"EpsilonPlusFlat": jaxlrp.EpsilonPlusFlat()})


def large_bert(batch: int) -> Case:
    config = bert.BertConfig(30522, 768, 12, 12, 3072, max_positions=512)
    module = bert.BertClassifier(config, 2)
    ids = jnp.ones((1, 128), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), ids)
    x = jax.random.normal(jax.random.key(1), (batch, 128, 768))
    return Case(lambda p, x: module.apply(p, x, method="encode"), params, x, attention())


NETWORKS: dict[str, Callable[[], Case]] = {
    "VGG16, batch 4": lambda: vision(networks.VGG16(), 4, convolutional()),
    "ResNet50, batch 8": lambda: vision(networks.ResNet50(), 8, convolutional()),
    "EfficientNet-Lite0, batch 8": lambda: _efficientnet(8),
    "ViT-B/16, batch 4": lambda: vision(networks.ViT(), 4, attention()),
    "BERT, 12 layers, batch 4": lambda: large_bert(4),
}


def compiled(
    function: Callable[..., Any], *args: Any, precision: str | None = None, options: dict[str, str] | None = None
) -> Measured:
    """Compile a function for its arguments, with options of XLA, and ask the program about itself."""

    def build() -> tuple[Any, float]:
        start = time.perf_counter()
        with jax.default_matmul_precision(precision):
            anew = jax.jit(lambda *args: function(*args))  # jax would remember what it traced of the same function
            program = anew.lower(*args).compile(compiler_options=options)
        return program, time.perf_counter() - start

    program, seconds = build()
    operations = collections.Counter(re.findall(r"= \S+ ([\w-]+)\(", program.as_text()))
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    products = operations["convolution"] + operations["dot"]
    return Measured(seconds, memory, products, lambda: program(*args), lambda: build()[1])


def compile_times(programs: Mapping[str, Measured], count: int = 3) -> dict[str, float]:
    """Median seconds of so many times that every program is compiled, in turn."""
    found = {name: [program.compile_s] for name, program in programs.items()}
    for _ in range(count - 1):
        for name, program in programs.items():
            found[name].append(program.compile_again())
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def interleaved(programs: Mapping[str, Measured], rounds: int) -> dict[str, float]:
    """Median seconds of every program, run in turn so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(rounds + 1):  # the first warms up
        for name, program in programs.items():
            start = time.perf_counter()
            result = jax.block_until_ready(program.call())
            if round_:
                seconds[name].append(time.perf_counter() - start)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result)), name
            del result  # or the next program's time would have the release of this one's memory in it
    return {name: statistics.median(found) for name, found in seconds.items()}


def by_default_and_in_full(function: Callable[..., Any], *args: Any) -> list[Measured]:
    """Two programs, or one where the highest precision changes nothing."""
    programs = [compiled(function, *args, precision=precision) for precision in (None, IN_FULL)]
    return programs if programs[0].products != programs[1].products else programs[:1]


def measure(case: Case, rounds: int, compiled_times: int = 3) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the table for one network, the gradient first, and of that on how far relevance is from float64."""

    def gradient(params: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: case.run(params, x)[:, 1].sum())(x)

    programs, distances = {"gradient": compiled(gradient, case.params, case.x)}, []
    for name, composite in case.composites.items():
        explain = jaxlrp.lrp(case.run, composite, argnums=1, target=1)
        found = by_default_and_in_full(explain, case.params, case.x)
        programs |= dict(zip((name, f"{name}, in full"), found, strict=False))
        if len(found) > 1:
            true = accuracy.in_double(explain, case.params, case.x)
            off = [how(p.call(), true) for how in (accuracy.in_norm, accuracy.largest) for p in found]
            distances.append([name, *(f"{value:.0e}" for value in off)])
    seconds, to_compile = interleaved(programs, rounds), compile_times(programs, compiled_times)
    base, own = seconds["gradient"], programs["gradient"]
    rows = []
    for name, program in programs.items():
        time_ = seconds[name]
        rows.append(
            [
                name,
                f"{1e3 * time_:.0f} ms",
                f"{time_ / base:.2f}x",
                f"{to_compile[name]:.1f} s",
                f"{to_compile[name] / to_compile['gradient']:.1f}x",
                f"{program.temporary_mb:.0f} MB",
                f"{program.temporary_mb / own.temporary_mb:.2f}x",
                str(program.products),
            ]
        )
    return rows, distances


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="*", default=[], help=f"any of: {'; '.join(NETWORKS)}")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # it would be timed instead of the compiler
    chosen = {
        n: make for n, make in NETWORKS.items() if not arguments.network or n.startswith(tuple(arguments.network))
    }
    rows, distances = [], []
    for name, make in chosen.items():
        found, off = measure(make(), arguments.rounds)
        rows += [[name, *row] for row in found]
        distances += [[name, *row] for row in off]
    print(table(HEAD, rows, right=range(2, len(HEAD))))
    print(f"\n{platform.processor() or platform.machine()}, {jax.device_count()} device, jax {jax.__version__}")
    if distances:
        print("\n" + table(OFF, distances, right=range(2, len(OFF))))


if __name__ == "__main__":
    main()
