"""Where the time of relevance goes: how much is convolutions and matrix products, which no rearranging makes fewer.

    python benchmarks/floor.py [--network NAME ...] [--composite NAME ...] [--rounds N] [--top N]

For every network of speed.py, the gradient and every composite run under jax's profiler, in turn. Printed are the
milliseconds of one run by kind of operation, and what the products alone are of the gradient's whole time: the ratio
that would be left if all else cost nothing. `one by one` is what the same products take when each is a program of its
own, its operands still in the caches, run by the fastest of XLA's kernels for it: no choice among these kernels brings
the whole below. Operations per second stand beside those of large square matrix products in the same run, which is
about the most that the processor can do. (XLA counts elementwise operations too; they are many where depthwise layers
are sums of shifts, as on EfficientNet.) All run on one core, so that no two operations run at the same time and their
sum is the whole, and keep temporary memory between calls (malloc.py). With --top, the slowest operations that are no
products are listed as well.
"""

from __future__ import annotations

import argparse
import collections
import functools
import glob
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import lax

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jaxlrp
from benchmarks.malloc import keep_memory
from benchmarks.speed import NETWORKS, Case
from jaxlrp import _compat
from jaxlrp import _primitives as P
from jaxlrp.graph import Equation, trace_program
from jaxlrp.tables import table

PRODUCTS = {"convolution", "dot"}
POOLS = {"reduce-window", "select-and-scatter"}
MOVES = {"copy", "transpose", "concatenate", "slice", "pad", "reshape", "bitcast", "broadcast", "reverse", "parameter"}
KINDS = ("products", "pools", "moves", "other")
SQUARE = 2048  # rows and columns of the matrices whose product the others are compared with
TIMES = 16  # how often, so that a core that slows down under load does so there as well


class Program(NamedTuple):
    """A compiled program, and of which kind each of its operations is."""

    call: Callable[[], Any]
    kinds: Mapping[str, str]
    names: Mapping[str, str]  # what an operation came from
    flops: float  # floating point operations of one run, nearly all of them of products
    products: list[Equation]  # convolutions and matrix products, as traced


def kinds_of(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Of every instruction of an optimised module: its kind, and the jax operation that it came from."""
    inside: dict[str, set[str]] = collections.defaultdict(set)
    found: list[tuple[str, str, list[str], str]] = []
    body = ""
    for line in text.splitlines():
        if opens := re.match(r"(?:ENTRY )?%([\w.-]+) .*\{$", line):
            body = opens.group(1)
        elif step := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(", line):
            name, op = step.groups()
            called = re.findall(r"(?:calls|to_apply)=%([\w.-]+)", line)
            source = re.search(r'op_name="([^"]*)"', line)
            inside[body].add(op)
            found.append((name, op, called, source.group(1) if source else ""))
    kinds = {}
    for name, op, called, _ in found:
        ops = {op}.union(*(inside[c] for c in called)) - {"fusion", "call", "constant"}
        kinds[name] = "products" if ops & PRODUCTS else "pools" if ops & POOLS else "moves" if ops <= MOVES else "other"
    return kinds, {name: source for name, _, _, source in found}


def compiled(function: Callable[..., Any], case: Case) -> Program:
    """Compile for a case's arguments."""
    program = jax.jit(function).lower(case.params, case.x).compile()
    counted: Any = program.cost_analysis()  # declared as anything
    text = program.as_text()
    products = traced_products(function, case)
    left = len(re.findall(r"= \S+ (?:convolution|dot)\(", text))
    assert len(products) == left, f"{len(products)} products are traced, {left} are in the program"
    return Program(lambda: program(case.params, case.x), *kinds_of(text), counted["flops"], products)


# -- products one by one ----------------------------------------------------------------------------------------------


def traced_products(function: Callable[..., Any], case: Case) -> list[Equation]:
    """Those that the result needs."""
    leaves, tree = jax.tree.flatten((case.params, case.x))
    flat = lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))  # noqa: E731
    program = trace_program(flat, leaves, [True] * len(leaves), [""] * len(leaves))
    return [e for e in program.equations if e.primitive in P.CONV | P.DOT]


def kernels(product: Equation) -> list[Callable[..., Any]]:
    """The ways to have XLA run a product by different kernels."""
    primitive, params = product.primitive, dict(product.params)
    ways = [functools.partial(_compat.bind, primitive, params)]
    if primitive not in P.CONV or len(params["window_strides"]) != 2:
        return ways
    numbers = params["dimension_numbers"]
    # YNNPACK takes no convolution whose axes of places come in the other order; then it is XLA's own kernel.
    turned = lax.ConvDimensionNumbers(*((*spec[:2], spec[3], spec[2]) for spec in numbers))
    sides = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    other = params | {"dimension_numbers": turned} | {side: tuple(params[side])[::-1] for side in sides}
    ways.append(functools.partial(_compat.bind, primitive, other))
    image, kernel = (v.shape for v in product.inputs)
    plain = numbers == lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    if plain and kernel[:3] == (1, 1, image[3]) and not any(map(any, params["padding"])):
        down, right = params["window_strides"]
        ways.append(lambda x, w: [x[:, ::down, ::right] @ w[0, 0]])
    return ways


def one_by_one(products: list[Equation], rounds: int, known: dict[str, float]) -> float:
    """Seconds of all products, each a program of its own and in its fastest kernel."""
    total = 0.0
    for product in products:
        shapes = [v.shape for v in product.inputs]
        name = f"{product.primitive} {shapes} {product.params}"
        if name not in known:
            values = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
            known[name] = min(seconds_of(way, values, rounds) for way in kernels(product))
        total += known[name]
    return total


def seconds_of(function: Callable[..., Any], values: Sequence[jax.Array], rounds: int) -> float:
    """Median time of a function's runs."""
    program = jax.jit(function).lower(*values).compile()
    found = []
    for _ in range(1 + 2 * rounds):  # the first warms up
        start = time.perf_counter()
        jax.block_until_ready(program(*values))
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


# -- the whole --------------------------------------------------------------------------------------------------------


def square_products() -> Callable[[], Any]:
    """A run of some large matrix products."""
    x = jax.random.normal(jax.random.key(0), (SQUARE, SQUARE))
    program = jax.jit(lambda x: x @ x).lower(x).compile()
    return lambda: [program(x) for _ in range(TIMES)]


def profiled(program: Program) -> dict[str, float]:
    """Seconds of every operation in one run, under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program.call())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        seconds: dict[str, float] = collections.defaultdict(float)
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in program.kinds:
                        seconds[event.name] += event.duration_ns * 1e-9
    return seconds


def measure(name: str, case: Case, wanted: list[str], rounds: int, top: int) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the table, and rows on the slowest operations."""

    def gradient(params: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: case.run(params, x)[:, 1].sum())(x)

    programs = {"gradient": compiled(gradient, case)}
    for method, composite in case.composites.items():
        if not wanted or method in wanted:
            programs[method] = compiled(jaxlrp.lrp(case.run, composite, argnums=1, target=1), case)
    whole: dict[str, list[float]] = collections.defaultdict(list)
    parts: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    squares, of_squares = square_products(), []  # seconds
    for round_ in range(rounds + 1):  # the first warms up
        for method, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(squares())
            between = time.perf_counter()
            jax.block_until_ready(program.call())
            if round_:
                of_squares.append(between - start)
                whole[method].append(time.perf_counter() - between)
                parts[method].append(profiled(program))
    base = statistics.median(whole["gradient"])
    best = TIMES * 2 * SQUARE**3 / statistics.median(of_squares)
    rows, slowest = [], []
    known: dict[str, float] = {}
    for method, program in programs.items():
        each = {op: statistics.median([p.get(op, 0.0) for p in parts[method]]) for op in program.kinds}
        by_kind = {kind: sum(each[op] for op in each if program.kinds[op] == kind) for kind in KINDS}
        time_ = statistics.median(whole[method])
        cells = [name, method, f"{1e3 * time_:.0f} ms", f"{time_ / base:.2f}x"]
        cells += [f"{1e3 * by_kind[kind]:.0f} ms" for kind in KINDS]
        cells.insert(5, f"{1e3 * one_by_one(program.products, rounds, known):.0f} ms")
        rate = program.flops / by_kind["products"]
        cells += [f"{by_kind['products'] / base:.2f}x", f"{1e-9 * program.flops:.0f}"]
        rows.append([*cells, f"{1e-9 * rate:.0f}", f"{rate / best:.2f}x"])
        ordered = sorted((op for op in each if program.kinds[op] != "products"), key=each.__getitem__, reverse=True)
        slowest += [[name, method, f"{1e3 * each[op]:.1f} ms", op, program.names[op]] for op in ordered[:top]]
    return rows, slowest


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="*", default=[], help=f"any of: {'; '.join(NETWORKS)}")
    parser.add_argument(
        "--composite", nargs="*", default=[], help="Epsilon, EpsilonPlusFlat, ...; all if none is named"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top", type=int, default=0)
    arguments = parser.parse_args()
    keep_memory()
    if hasattr(os, "sched_setaffinity"):  # before XLA makes a thread for every core
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows, slowest = [], []
    for name, make in NETWORKS.items():
        if not arguments.network or name.startswith(tuple(arguments.network)):
            found = measure(name, make(), arguments.composite, arguments.rounds, arguments.top)
            rows += found[0]
            slowest += found[1]
    head = (
        "network",
        "",
        "time",
        "of gradient",
        KINDS[0],
        "one by one",
        *KINDS[1:],
        "products alone",
        "Gflop",
        "Gflop/s",
        "of squares",
    )
    print(table(head, rows, right=range(2, len(head))))
    if slowest:
        print("\n" + table(("network", "", "time", "operation", "came from"), slowest, right=[2]))


if __name__ == "__main__":
    main()
