"""How the cost of relevance grows: with the batch, depth, blocks run again, width, targets, gammas, captured layers,
chunks and devices, and what a setting of the system's malloc spares.

    python benchmarks/scaling.py [--section NAME ...] [--rounds N]

Each section prints one table. Its programs are compiled first and then run in turn, so that all see the same machine;
times are medians. "of gradient" is the ratio to the jitted input gradient of the same network at the same size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jaxlrp
from benchmarks import networks
from benchmarks.malloc import environment
from benchmarks.speed import Case, Measured, compile_times, compiled, interleaved, large_bert
from jaxlrp._pytree import Distinct
from jaxlrp.tables import table


class ConvNet(nn.Module):
    """Eight convolutions in four stages, with BatchNorm: images ``[N, H, W, 3]`` to logits ``[N, 100]``."""

    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage in range(4):
            for _ in range(2):
                x = nn.Conv(self.width * 2**stage, (3, 3))(x)
                x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(100)(x.mean((1, 2)))


class Unrolled(nn.Module):
    """`networks.ScannedEncoder` with its layers one after the other."""

    layers: int
    heads: int
    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = networks.Encoder(self.heads, self.inner)(x)
        return nn.Dense(10)(x.mean(1))


def _case(module: nn.Module, *shape: int) -> Case:
    x = jax.random.uniform(jax.random.key(1), shape)
    return Case(module.apply, jax.jit(module.init)(jax.random.key(0), x[:1]), x, {})


def _gradient(case: Case) -> Measured:
    return compiled(lambda p, x: jax.grad(lambda x: case.run(p, x)[:, 1].sum())(x), case.params, case.x)


def _relevance(case: Case, composite: Any) -> Measured:
    return compiled(jaxlrp.lrp(case.run, composite, argnums=1, target=1), case.params, case.x)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"


def _mb(program: Measured) -> str:
    return f"{program.temporary_mb:.1f} MB"


def _beside_gradient(sizes: dict[str, Case], composite: Any, rounds: int) -> list[list[str]]:
    """For every size: time, compile time and memory, each with its ratio to the gradient's."""
    rows = []
    pairs = {size: {"gradient": _gradient(c), "lrp": _relevance(c, composite)} for size, c in sizes.items()}
    programs = {f"{size} {name}": program for size, pair in pairs.items() for name, program in pair.items()}
    seconds, to_compile = interleaved(programs, rounds), compile_times(programs)
    for size, pair in pairs.items():
        own, base = pair["lrp"], pair["gradient"]
        time, of = seconds[f"{size} lrp"], seconds[f"{size} gradient"]
        anew = to_compile[f"{size} lrp"]
        rows.append(
            [
                size,
                *(_ms(time), f"{time / of:.2f}x"),
                *(f"{anew:.1f} s", f"{anew / to_compile[f'{size} gradient']:.1f}x"),
                *(_mb(own), f"{own.temporary_mb / base.temporary_mb:.2f}x"),
                *(str(own.products), str(base.products)),
            ]
        )
    return rows


_BESIDE = (
    *("time", "of gradient", "compile", "of gradient's"),
    *("temporary", "of gradient's", "products", "gradient's"),
)


def _beside_one(programs: dict[str, Measured], rounds: int) -> list[list[str]]:
    """Every program's time and memory, and the ratio to the first one."""
    seconds = interleaved(programs, rounds)
    first = next(iter(programs))
    return [
        [
            name,
            *(_ms(seconds[name]), f"{seconds[name] / seconds[first]:.2f}x"),
            *(f"{p.compile_s:.1f} s", f"{p.compile_s / programs[first].compile_s:.2f}x"),
            *(_mb(p), f"{p.temporary_mb / programs[first].temporary_mb:.2f}x", str(p.products)),
        ]
        for name, p in programs.items()
    ]


_OF_FIRST = ("time", "of first", "compile", "of first", "temporary", "of first", "products")


class Table(NamedTuple):
    head: tuple[str, ...]
    rows: list[list[str]]


# -- sections ---------------------------------------------------------------------------------------------------------


def batch(rounds: int) -> Table:
    """Batches on a convolutional net of 8 layers, 64 x 64 pixels, EpsilonPlusFlat."""
    sizes = {str(n): _case(ConvNet(), n, 64, 64, 3) for n in (1, 2, 4, 8, 16)}
    return Table(("batch", *_BESIDE), _beside_gradient(sizes, jaxlrp.EpsilonPlusFlat(), rounds))


def depth(rounds: int) -> Table:
    """Transformer blocks of width 128, 64 tokens, batch 2, AttnLRP: one after the other, and as one scan."""
    sizes = {}
    for layers in (4, 12, 24, 48):
        sizes[f"{layers} unrolled"] = _case(Unrolled(layers, 4, 512), 2, 64, 128)
        sizes[f"{layers} scanned"] = _case(networks.ScannedEncoder(layers, 4, 512), 2, 64, 128)
    sizes["48 scanned, remat"] = _case(networks.ScannedEncoder(48, 4, 512, remat=True), 2, 64, 128)
    return Table(("blocks", *_BESIDE), _beside_gradient(sizes, jaxlrp.AttnLRP(), rounds))


def remat(rounds: int) -> Table:
    """24 transformer blocks of width 256, 128 tokens, batch 4, AttnLRP, run again on the way back."""
    case = _case(Unrolled(24, 4, 1024), 4, 128, 256)
    again = jaxlrp.lrp(case.run, jaxlrp.AttnLRP(), argnums=1, target=1, remat=True)
    programs = {
        "gradient": _gradient(case),
        "lrp": _relevance(case, jaxlrp.AttnLRP()),
        "lrp, remat": compiled(again, case.params, case.x),
    }
    return Table(("program", *_OF_FIRST), _beside_one(programs, rounds))


def width(rounds: int) -> Table:
    """Features of the first stage of the same convolutional net, batch 2, EpsilonPlusFlat."""
    sizes = {str(n): _case(ConvNet(n), 2, 64, 64, 3) for n in (8, 16, 32, 64)}
    return Table(("width", *_BESIDE), _beside_gradient(sizes, jaxlrp.EpsilonPlusFlat(), rounds))


def targets(rounds: int) -> Table:
    """Classes of one image by `lrp_vjp` and `vmap`, EpsilonPlusFlat, beside one class by `lrp`."""
    rows = []
    for name, module in (("VGG16", networks.VGG16()), ("ResNet50", networks.ResNet50())):
        case = _case(module, 1, 224, 224, 3)
        programs = {"one": _relevance(case, jaxlrp.EpsilonPlusFlat())}
        for count in (2, 5, 10):

            def many(params: Any, x: jax.Array, run: Any = case.run, count: int = count) -> jax.Array:
                rules = jaxlrp.EpsilonPlusFlat()
                output, pull = jaxlrp.lrp_vjp(run, params, x, composite=rules, argnums=1)
                return jax.vmap(pull)(jnp.eye(count, 1000)[:, None] * output)

            programs[str(count)] = compiled(many, case.params, case.x)
        rows += [[name, *row] for row in _beside_one(programs, rounds)]
    return Table(("network", "targets", *_OF_FIRST), rows)


def gammas(rounds: int) -> Table:
    """Gammas of EpsilonGammaBox by `vmap` on VGG16, one image, beside one call with one gamma."""
    case = _case(networks.VGG16(), 1, 224, 224, 3)

    def sweep(params: Any, x: jax.Array, gammas: jax.Array) -> jax.Array:
        def of(gamma: jax.Array) -> jax.Array:
            rules = jaxlrp.EpsilonGammaBox(0.0, 1.0, gamma=gamma)
            return jaxlrp.lrp(case.run, rules, argnums=1, target=1)(params, x)

        return jax.vmap(of)(gammas)

    programs = {"one": _relevance(case, jaxlrp.EpsilonGammaBox(0.0, 1.0))}
    for count in (1, 2, 4, 8):
        programs[str(count)] = compiled(sweep, case.params, case.x, jnp.linspace(0.1, 1.0, count))
    return Table(("gammas", *_OF_FIRST), _beside_one(programs, rounds))


def capture(rounds: int) -> Table:
    """Relevance at all layers, which are results and no temporaries, beside that of the input alone; memory is kept."""
    call = [sys.executable, __file__, "--captured", "--rounds", str(rounds)]
    done = subprocess.run(call, env=environment(keeping=True), stdout=subprocess.PIPE, text=True, check=True)
    return Table(("network", "relevance of", *_OF_FIRST), json.loads(done.stdout))


def _captured(rounds: int) -> list[list[str]]:
    """Rows of `capture`, in a process that keeps memory: fresh pages for results would hide what is asked here."""
    convolutional, attention = jaxlrp.EpsilonPlusFlat(), jaxlrp.AttnLRP()
    rows = _captured_of("VGG16, batch 2", _case(networks.VGG16(), 2, 224, 224, 3), convolutional, 4 * rounds)
    rows += _captured_of("ResNet50, batch 2", _case(networks.ResNet50(), 2, 224, 224, 3), convolutional, 4 * rounds)
    rows += _captured_of("ViT-B/16, batch 2", _case(networks.ViT(), 2, 224, 224, 3), attention, 4 * rounds)
    rows += _captured_of("BERT, batch 2", large_bert(2), attention, 4 * rounds)
    # they take but milliseconds
    rows += _captured_of("12 blocks, batch 2", _case(Unrolled(12, 4, 512), 2, 64, 128), attention, 16 * rounds)
    scanned = _case(networks.ScannedEncoder(12, 4, 512), 2, 64, 128)
    return rows + _captured_of("12 blocks scanned, batch 2", scanned, attention, 16 * rounds, steps=12)


def _captured_of(name: str, case: Case, composite: Any, rounds: int, steps: int = 0) -> list[list[str]]:
    """Of one network, which is a scan of so many steps or none."""
    inside = jaxlrp.layerwise_lrp(case.run, composite, argnums=1, target=1)
    found = jax.eval_shape(lambda params, x: Distinct(inside(params, x)), case.params, case.x)
    shapes = [r.shape for r in jax.tree.leaves(found)]
    stacked = [i for i, shape in enumerate(shapes) if steps and shape[0] == steps]

    def results(make: Callable[[int, Any], jax.Array], given: list[Any]) -> Any:
        """As many results as are captured, each made of what is given for it: at once or step by step, in a scan."""

        def step(_: None, now: list[Any]) -> tuple[None, list[jax.Array]]:
            return None, [make(i, part) for i, part in zip(stacked, now, strict=True)]

        made = {i: make(i, part) for i, part in enumerate(given) if i not in stacked}
        if stacked:
            _, of_steps = jax.lax.scan(step, None, [given[i] for i in stacked])
            made |= dict(zip(stacked, of_steps, strict=True))
        different = [made[i] for i in range(len(shapes))]
        return jax.tree.unflatten(jax.tree.structure(found), different).tree  # some of them many times

    def write(number: jax.Array) -> Any:
        """Results that need nothing: with other numbers each, or XLA would write one and copy it."""
        numbers = [number + i + (jnp.arange(steps) if i in stacked else 0) for i in range(len(shapes))]
        return results(lambda i, number: jnp.full(shapes[i][1:] if i in stacked else shapes[i], number), numbers)

    def form(values: list[jax.Array], slopes: list[jax.Array]) -> Any:
        """What relevance is where rules do not divide: the value times a slope, both of which lie in memory."""
        return results(lambda _, both: both[0] * both[1], [*zip(values, slopes, strict=True)])

    arrays = [[jax.random.uniform(jax.random.key(k), shape) for shape in shapes] for k in (2, 3)]
    programs = {
        "input": _relevance(case, composite),
        "all layers": compiled(inside, case.params, case.x),
        "none, results written": compiled(write, jnp.ones(())),
        "none, results formed": compiled(form, *arrays),
    }
    return [[name, *row] for row in _beside_one(programs, rounds)]


def stream(rounds: int) -> Table:
    """A batch of 32 on the convolutional net, at once and in chunks by `jaxlrp.stream`."""
    case = _case(ConvNet(), 32, 64, 64, 3)
    explain = jaxlrp.lrp(case.run, jaxlrp.EpsilonPlusFlat(), argnums=1, target=1)
    programs = {"at once": compiled(explain, case.params, case.x)}
    for size in (16, 12, 4):  # 12 is no divisor of 32
        programs[str(size)] = compiled(jaxlrp.stream(explain, size, argnums=1), case.params, case.x)
    return Table(("chunks of", *_OF_FIRST), _beside_one(programs, rounds))


def devices(rounds: int) -> Table:
    """A batch of 16 over virtual devices of one CPU: that results agree, not that it gets faster."""
    rows = []
    for count in (1, 2, 4, 8):
        call = [sys.executable, __file__, "--on-devices", str(count), "--rounds", str(rounds)]
        settings = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
        done = subprocess.run(call, env=settings, stdout=subprocess.PIPE, text=True, check=True)
        rows.append([str(count), *done.stdout.strip().split("|")])
    return Table(("devices", "time", "samples on each", "collectives", "difference to one device"), rows)


def _on_devices(count: int, rounds: int) -> str:
    """One row of `devices`, in a process that has so many."""
    case = _case(ConvNet(), 16, 64, 64, 3)
    explain = jaxlrp.lrp(case.run, jaxlrp.EpsilonPlusFlat(), argnums=1, target=1)
    mesh = jax.make_mesh((count,), ("batch",))
    spread = jax.device_put(case.x, jax.NamedSharding(mesh, jax.P("batch")))
    params = jax.device_put(case.params, jax.NamedSharding(mesh, jax.P()))
    program = jax.jit(explain).lower(params, spread).compile()
    measured = Measured(0.0, 0.0, 0, lambda: program(params, spread), lambda: 0.0)
    result, alone = measured.call(), jax.jit(explain)(case.params, case.x)
    text = program.as_text()
    collectives = sum(
        text.count(f" {name}(") for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    )
    seconds = interleaved({"": measured}, rounds)[""]
    local = result.addressable_shards[0].data.shape[0]
    difference = jnp.abs(jax.device_get(result) - alone).max() / jnp.abs(alone).max()
    return f"{_ms(seconds)}|{local}|{collectives}|{difference:.0e}"


def malloc(rounds: int) -> Table:
    """On Linux: temporary memory given back to the system after every call, and kept (docs/devices.md)."""
    found: dict[str, list[dict[str, list[float]]]] = {"given back": [], "kept": []}
    for _ in range(2):  # in turn, as far as processes can be
        for name in found:
            call = [sys.executable, __file__, "--faults", "--rounds", str(rounds)]
            settings = environment(keeping=name == "kept")
            done = subprocess.run(call, env=settings, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(done.stdout))
    rows = []
    for program in found["kept"][0]:
        seconds = {name: statistics.mean(run[program][0] for run in runs) for name, runs in found.items()}
        for name, runs in found.items():
            faults = statistics.mean(run[program][1] for run in runs)
            rows.append(
                [program, name, f"{faults:.0f}", _ms(seconds[name]), f"{seconds[name] / seconds['given back']:.2f}x"]
            )
    return Table(("ResNet50, batch 8", "memory", "page faults", "time", "of given back"), rows)


def _faults(rounds: int) -> dict[str, list[float]]:
    """Seconds and page faults of a call, by program, in a process with settings of its own."""
    import resource  # not on Windows

    def page_faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    case = _case(networks.ResNet50(), 8, 224, 224, 3)
    programs = {
        "gradient": _gradient(case),
        "Epsilon": _relevance(case, jaxlrp.Composite.uniform(jaxlrp.Epsilon())),
    }
    seconds = interleaved(programs, rounds)
    found = {}
    for name, program in programs.items():
        jax.block_until_ready(program.call())
        before = page_faults()
        jax.block_until_ready(program.call())
        found[name] = [seconds[name], page_faults() - before]
    return found


SECTIONS: dict[str, Callable[[int], Table]] = {
    section.__name__: section
    for section in (batch, depth, remat, width, targets, gammas, capture, stream, devices, malloc)
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--on-devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--faults", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--captured", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.faults:
        print(json.dumps(_faults(arguments.rounds)))
        return
    if arguments.captured:
        print(json.dumps(_captured(arguments.rounds)))
        return
    if arguments.on_devices:
        print(_on_devices(arguments.on_devices, arguments.rounds))
        return
    for name in arguments.section:
        found = SECTIONS[name](arguments.rounds)
        print(f"{name}: {SECTIONS[name].__doc__}\n")
        print(table(found.head, found.rows, right=range(len(found.head))), end="\n\n", flush=True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")


if __name__ == "__main__":
    main()
