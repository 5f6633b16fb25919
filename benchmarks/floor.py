"""Where the time of relevance goes: how much of it is convolutions and matrix products.

    python benchmarks/floor.py [--network NAME ...] [--composite NAME ...] [--rounds N] [--top N]

For every network of speed.py, the gradient and every composite run under jax's profiler, in turn. Printed are the
milliseconds of one run by kind of operation, and what the products alone are of the gradient's whole time: the ratio
that would be left if all else cost nothing. `one by one` is what the same products take when each is a program of its
own, with nothing beside it, and is run by the faster of YNNPACK and XLA's own kernel, as a matrix product where it can
be one: about the least that a choice among these leaves, where the program has just the products that jax wrote.
Operations per second stand beside those of large square matrix products in the same run, which is about the most that
the processor can do. (XLA counts elementwise operations too; they are many where depthwise layers are sums of shifts,
as on EfficientNet.) All run on one core, so that no two operations run at the same time and their sum is the whole, and
keep temporary memory between calls (malloc.py). In rows called in full the highest precision leaves out Winograd's
convolutions (speed.py), whose inputs are prepared by what counts as other. With --top, the slowest operations that are
no products are listed as well.
"""

from __future__ import annotations

import argparse
import collections
import glob
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jaxlrp
from benchmarks.malloc import keep_memory
from benchmarks.speed import IN_FULL, NETWORKS, OWN_CONVOLUTIONS, Case
from jaxlrp import _compat
from jaxlrp import _primitives as P
from jaxlrp.convolutions import Convolution
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
    products: int  # convolutions and matrix products


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


def compiled(function: Callable[..., Any], *args: Any, **options: str) -> Program:
    """Compile for arguments, with options of XLA."""
    program = jax.jit(function).lower(*args).compile(compiler_options=options)
    counted: Any = program.cost_analysis()  # declared as anything
    text = program.as_text()
    products = len(re.findall(r"= \S+ (?:convolution|dot)\(", text))
    return Program(lambda: program(*args), *kinds_of(text), counted["flops"], products)


# -- products one by one ----------------------------------------------------------------------------------------------


def traced_products(function: Callable[..., Any], *args: Any) -> list[Equation]:
    """Those that the result needs."""
    leaves, tree = jax.tree.flatten(args)
    flat = lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))  # noqa: E731
    program = trace_program(flat, leaves, [True] * len(leaves), [""] * len(leaves))
    return [e for e in program.equations if e.primitive in P.CONV | P.DOT]


def ways(product: Equation) -> list[Callable[..., jax.Array]]:
    """Functions that compute a product."""
    params = product.params
    found = [lambda x, w: _compat.bind(product.primitive, params, x, w)[0]]
    if product.primitive in P.CONV and {*params["lhs_dilation"]} == {1} and not any(map(any, params["padding"])):
        image, kernel = (v.shape for v in product.inputs)
        strides = [1] * len(image)
        for axis, stride in zip(params["dimension_numbers"].lhs_spec[2:], params["window_strides"], strict=True):
            strides[axis] = stride
        sliced = tuple(-(-n // s) for n, s in zip(image, strides, strict=True))
        dense = Convolution({**params, "window_strides": (1,) * (len(image) - 2)}, sliced, kernel)
        if dense.applies and not dense.depthwise:
            found.append(lambda x, w: dense.apply(lax.slice(x, (0,) * x.ndim, x.shape, strides), w))
    return found


def alone(product: Equation, rounds: int) -> float:
    """Seconds of a product that is a program of its own, in the fastest way."""
    values = [jax.random.normal(jax.random.key(i), v.shape) for i, v in enumerate(product.inputs)]
    kernels = ({}, OWN_CONVOLUTIONS) if product.primitive in P.CONV else ({},)
    programs = [compiled(way, *values, **options) for way in ways(product) for options in kernels]
    first, *others = (program.call() for program in programs)  # and warm
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-4 * float(abs(first).max()))
    seconds = []
    for program in programs:
        runs = [by_kind(program, profiled(program))["products"] for _ in range(rounds)]
        seconds.append(statistics.median(runs))
    return min(seconds)


def one_by_one(products: list[Equation], rounds: int, known: dict[str, float]) -> float:
    """Seconds of all of them; those of equal ones are measured once."""
    names = [f"{p.primitive} {[v.shape for v in p.inputs]} {p.params}" for p in products]
    for name, product in dict(zip(names, products, strict=True)).items():
        if name not in known:
            known[name] = alone(product, rounds)
    return sum(known[name] for name in names)


def in_full(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in the highest precision."""

    def run(*args: Any) -> Any:
        with jax.default_matmul_precision(IN_FULL):
            return function(*args)

    return run


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


def by_kind(program: Program, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every kind of operation, given those of every operation."""
    return {kind: sum(t for op, t in seconds.items() if program.kinds[op] == kind) for kind in KINDS}


def measure(name: str, case: Case, wanted: list[str], rounds: int, top: int) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the table, and rows on the slowest operations."""

    def gradient(params: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: case.run(params, x)[:, 1].sum())(x)

    functions: dict[str, Callable[..., Any]] = {"gradient": gradient}
    for method, composite in case.composites.items():
        if not wanted or method in wanted:
            functions[method] = jaxlrp.lrp(case.run, composite, argnums=1, target=1)
    programs = {}
    for method in list(functions):
        programs[method] = compiled(functions[method], case.params, case.x)
        full = in_full(functions[method])
        program = compiled(full, case.params, case.x)
        if program.products != programs[method].products:
            functions[f"{method}, in full"], programs[f"{method}, in full"] = full, program
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
        spent = by_kind(program, each)
        time_ = statistics.median(whole[method])
        cells = [name, method, f"{1e3 * time_:.0f} ms", f"{time_ / base:.2f}x"]
        cells += [f"{1e3 * spent[kind]:.0f} ms" for kind in KINDS]
        traced = traced_products(functions[method], case.params, case.x)
        merged = len(traced) != program.products  # by XLA: then it is not known which
        cells.append("-" if merged else f"{1e3 * one_by_one(traced, rounds, known):.0f} ms")
        rate = program.flops / spent["products"]
        cells += [f"{spent['products'] / base:.2f}x", f"{1e-9 * program.flops:.0f}"]
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
        *KINDS,
        "one by one",
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
