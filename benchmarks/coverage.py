"""Explain networks of every family and hold each against an oracle.

    python benchmarks/coverage.py                   # all
    python benchmarks/coverage.py --family LSTM     # those whose name contains it
    python benchmarks/coverage.py --markdown        # the table for the README

Random weights, double precision, LRP-0 with the rules of AttnLRP. The columns of the table:

* ``layers``: what the network was taken apart into, inside of loops and branches too;
* ``unclassified``: values that relevance flows to and that no layer makes (an unknown operation is an error: "not
  traced");
* ``forward``: largest difference of the replayed output, and of the oracle's, to the network's own, over the largest
  output;
* ``ledger``: whether all relevance of every layer is accounted for by name;
* ``oracle``: largest difference to gradient times input of the same network with stop-gradients and factors
  (`families/_ops.py`), over the largest relevance;
* ``batch``: largest difference of relevance between a batch, `jax.vmap` over its samples, and one sample after the
  other, likewise;
* ``compile``: seconds that tracing and compiling the explanation took.

The exit status is 1 if a row is not green. Families are examined in as many processes as there are cores; with
``--jobs 1`` the seconds are those of an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jaxlrp
from benchmarks.families import DETACHED, FAMILIES, Case, Family, Ops
from jaxlrp.tables import table

#: LRP-0 with the rules of AttnLRP: what the oracles of the families compute.
COMPOSITE = jaxlrp.AttnLRP(epsilon=0.0)

_SHORT = {"normalization": "norm", "activation": "act"}
_ORDER = ("linear", "scale", "normalization", "softmax", "product", "sum", "pick", "activation", "move")


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found about one family; numbers are None where there was an error."""

    family: str
    error: str = ""  # why the network could not be explained
    layers: str = ""
    unclassified: int | None = None
    forward: float | None = None
    ledger: str = ""  # what is wrong with it; "ok" if nothing is
    oracle: float | None = None
    batch: float | None = None
    seconds: float | None = None
    rounding: float = 1e-12  # what is allowed for `forward`
    tolerance: float = 1e-9  # what is allowed for `oracle` and `batch`
    note: str = ""  # why that is more than usual

    @property
    def green(self) -> bool:
        """Whether all is as it should be."""
        allowed = ((self.forward, self.rounding), (self.oracle, self.tolerance), (self.batch, self.tolerance))
        agrees = all(found is not None and found <= most for found, most in allowed)
        return not self.error and self.unclassified == 0 and self.ledger == "ok" and agrees

    def cells(self) -> list[str]:
        """The row as text."""
        number = lambda x: "-" if x is None else f"{x:.0e}"  # noqa: E731
        return [
            self.family,
            "no" if self.error else "yes",
            self.layers or "-",
            "-" if self.unclassified is None else str(self.unclassified),
            number(self.forward),
            "-" if not self.ledger else ("ok" if self.ledger == "ok" else "NO"),
            number(self.oracle),
            number(self.batch),
            "-" if self.seconds is None else f"{self.seconds:.1f}",
            "ok" if self.green else "RED",
        ]


HEAD = ("family", "traced", "layers", "unclassified", "forward", "ledger", "oracle", "batch", "compile s", "")


# -- the checks --------------------------------------------------------------------------------------------------------


def examine(family: Family, composite: jaxlrp.Composite = COMPOSITE, detached: Ops = DETACHED) -> Row:
    """Make every check on one family."""
    row = Row(family.name, rounding=family.rounding, tolerance=family.tolerance, note=family.note)
    case = family.build(detached)
    try:
        return _examine(row, case, composite)
    except Exception as error:  # whatever it is, the other families are still of interest
        return dataclasses.replace(row, error=f"{type(error).__name__}: {error}")


def _examine(row: Row, case: Case, composite: jaxlrp.Composite) -> Row:
    layers = jaxlrp.trace(case.model, case.x, case.params)
    explain, explain_one = jaxlrp.value_and_lrp(case.model, composite), jaxlrp.lrp(case.single, composite)
    samples = [take(case.x, i) for i in range(len(jax.tree.leaves(case.x)[0]))]

    start = time.perf_counter()
    compiled = jax.jit(explain).lower(case.x, case.params).compile()
    seconds = time.perf_counter() - start
    output, relevance = compiled(case.x, case.params)

    model, account, oracle, mapped, one = compile_all(
        case.params,
        (case.model, case.x),
        (jaxlrp.ledger(case.model, composite), case.x),
        (functools.partial(gradient_x_input, case.detached), case.x),
        (jax.vmap(explain_one, in_axes=(0, None)), case.x),
        (explain_one, samples[0]),
    )
    own, (theirs, expected) = model(case.x), oracle(case.x)
    singly = jax.tree.map(lambda *parts: jnp.stack(parts), *map(one, samples))
    ledger = "ok"
    try:
        account(case.x).check(row.tolerance)
    except jaxlrp.ConservationError as error:
        ledger = str(error)
    return dataclasses.replace(
        row,
        layers=count(layers),
        unclassified=unclassified(layers, len(jax.tree.leaves(case.x))),
        forward=max(difference(output, own), difference(theirs, own)),
        ledger=ledger,
        oracle=difference(relevance, expected),
        batch=max(difference(relevance, mapped(case.x)), difference(relevance, singly)),
        seconds=seconds,
    )


def gradient_x_input(model: Callable[..., Any], x: Any, params: Any) -> Any:
    """Output and relevance of the sum of all outputs, by differentiating the detached model."""

    def total(x: Any) -> tuple[jax.Array, Any]:
        output = model(x, params)
        return sum(map(jnp.sum, jax.tree.leaves(output)), jnp.zeros(())), output

    gradient, output = jax.grad(total, has_aux=True)(x)
    return output, jax.tree.map(jnp.multiply, x, gradient)


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the largest absolute value of ``theirs``; infinite for NaN."""
    pairs = [tuple(map(np.asarray, p)) for p in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)]
    off = np.max([np.max(np.abs(a - b)) for a, b in pairs])
    size = np.max([np.max(np.abs(b)) for _, b in pairs])
    return float(off / size) if np.isfinite(off) and size > 0 else float("inf")


def take(x: Any, i: int) -> Any:
    """One sample of a batch."""
    return jax.tree.map(lambda a: a[i], x)


def compile_all(params: Any, *pairs: tuple[Callable[..., Any], Any]) -> list[Callable[[Any], Any]]:
    """Compile functions of ``(x, params)``, each for its ``x``; not optimised, for all of them run once."""
    lowered = [jax.jit(function).lower(x, params) for function, x in pairs]
    options: Any = {"xla_backend_optimization_level": 0}
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda program: program.compile(options), lowered))
    return [lambda x, run=run: run(x, params) for run in compiled]


def count(layers: Sequence[jaxlrp.Layer]) -> str:
    """How many layers there are of each kind, inside of loops and branches too: ``"22 linear 7 norm 3 softmax"``."""
    found = Counter(layer.kind for layer in every(layers))
    kinds = sorted(found, key=lambda kind: _ORDER.index(kind) if kind in _ORDER else len(_ORDER))
    return " ".join(f"{found[kind]} {_SHORT.get(kind, kind)}" for kind in kinds)


def every(layers: Sequence[jaxlrp.Layer]) -> Iterator[jaxlrp.Layer]:
    """All layers, each followed by those inside of it."""
    for layer in layers:
        yield layer
        for body in layer.bodies:
            yield from every(body.layers)


def unclassified(layers: Sequence[jaxlrp.Layer], inputs: int) -> int:
    """How many values some layer reads, but none makes, beyond the inputs of the model."""
    found = max(0, len(unmade(layers)) - inputs)
    bodies = [body for layer in every(layers) for body in layer.bodies]
    return found + sum(len(unmade(body.layers) - set(body.program.inputs)) for body in bodies)


def unmade(layers: Sequence[jaxlrp.Layer]) -> set[Any]:
    """The values that one of the layers reads and none makes."""
    made = {value for layer in layers for value in layer.outputs}
    return {value for layer in layers for value in layer.inputs} - made


# -- the table ---------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row]) -> str:
    """The table, then what went wrong and why some rows are held to less."""
    lines = [table(HEAD, [row.cells() for row in rows], right=(3, 4, 6, 7, 8))]
    lines += [f"\n{row.family}: {row.error}" for row in rows if row.error]
    lines += [f"\n{row.family}: {row.ledger}" for row in rows if row.ledger not in ("", "ok")]
    for note in dict.fromkeys(row.note for row in rows if row.note):
        (first, *others) = [row for row in rows if row.note == note]
        which = f"{first.family} to {others[-1].family}" if others else first.family
        lines.append(f"\nheld to {first.tolerance:.0e} only, {which}: {note}")
    green = sum(row.green for row in rows)
    strict = [row.oracle for row in rows if row.oracle is not None and not row.note]
    worst = f", largest difference to an oracle {max(strict):.0e} in double precision" if strict else ""
    lines.append(f"\n{green} of {len(rows)} families green{worst}")
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The table for the README: what a reader wants to know of each family."""
    lines = ["| family | layers | to the oracle | compile |", "| --- | --- | --- | --- |"]
    for row in rows:
        oracle = "-" if row.oracle is None else f"{row.oracle:.0e}"
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f} s"
        lines.append(f"| {row.family} | {row.layers or row.error} | {oracle} | {seconds} |")
    return "\n".join(lines)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of what was done; shows a bar on a terminal."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


def examine_all(families: Sequence[Family], jobs: int) -> Iterator[Row]:
    """The rows of all families, in order."""
    if min(jobs, len(families)) <= 1:
        yield from map(examine, families)
        return
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    with ProcessPoolExecutor(jobs, context, _double_precision) as pool:
        yield from pool.map(_examine_by_name, [family.name for family in families])


def _double_precision() -> None:
    jax.config.update("jax_enable_x64", True)


def _examine_by_name(name: str) -> Row:
    row = examine(next(family for family in FAMILIES if family.name == name))
    jax.clear_caches()  # compiled programs of large networks add up to gigabytes
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit status says whether all rows are green."""
    parser = argparse.ArgumentParser(description="Explain networks of every family and hold each against an oracle.")
    parser.add_argument("--family", nargs="+", default=[], metavar="NAME", help="only those whose name contains NAME")
    parser.add_argument("--skip-libraries", action="store_true", help="leave out networks of other packages")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    options = parser.parse_args(argv)
    wanted = [name.lower() for name in options.family]
    families = [
        family
        for family in FAMILIES
        if not (options.skip_libraries and family.library)
        and (not wanted or any(name in family.name.lower() for name in wanted))
    ]
    missing = {f.library for f in families if f.library and importlib.util.find_spec(f.library) is None}
    families = [family for family in families if family.library not in missing]
    if not families:
        parser.error(f"no family to examine{': not installed: ' + ', '.join(missing) if missing else ''}")
    rows = []
    with progress(len(families)) as step:
        for row in examine_all(families, options.jobs):
            rows.append(row)
            step(row.family)
    print(markdown(rows) if options.markdown else report(rows))
    for library in sorted(missing):
        print(f"left out: networks of {library}, which is not installed")
    return int(not all(row.green for row in rows))


if __name__ == "__main__":
    _double_precision()
    raise SystemExit(main())
