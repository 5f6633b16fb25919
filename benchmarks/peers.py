"""Jaxlrp beside other LRP libraries, on the same weights: first whether relevance agrees, then time.

    python benchmarks/peers.py [--peer-python PATH] [--network NAME ...] [--peer NAME ...] [--composite NAME ...]
        [--rounds N]

Relevance is compared first: in float32 the largest difference as a share of the largest relevance, and the norm of the
difference as a share of the norm; the largest in float64; and how far float32 is from float64 in each library alone, in
norm. Two results that are each so far from the exact one cannot be nearer to one another than by chance: relevance
jumps where rounding takes a relu across 0 or makes a max pool pick another of two nearly equal values. Where float64
differs by 1e-4 or more, or relevance in float32 is off it by 1e-4 in norm and twice as far as with all multiplications
(`jax.default_matmul_precision("highest")`), nothing is timed, and the exit status is 1.

Then all programs run in turn, so that they see the same machine: jax's own input gradient, jaxlrp, torch's own input
gradient, the peer. Only one computes at a time and has all cores. On both sides temporary memory is kept between calls
(malloc.py), which made both faster. Printed are medians of time, in float32.

Which setting is the fastest depends on the network and the processor, so some are tried on both sides, for gradients
too. Those that take at most a tenth longer than the fastest are run, and the fastest of them counts. In jax these are
XLA's default and YNNPACK for nothing but dots ("Convolutions on CPUs" in docs/devices.md). In torch they are the two
memory layouts, with and without products in bfloat16 if relevance is the same to 1e-4 in norm with them
(peers_torch.py); torch.compile is not tried.

The peers are torch libraries. They run in a Python of their own if need be (peers_torch.py, started with
--peer-python), where

    pip install torch==2.13.0 torchvision==0.28.0 captum==0.9.0 lxt==2.1 transformers==4.57.3
    pip install --no-deps --ignore-requires-python zennit==1.0.0

installs all of them; a peer that is missing is left out, with the reason below the table. LXT 2.1 does not import with
transformers 5, which took away a module that it needs.

Tried, and not here: autoLRP 0.2.0 leaves to a bias b the share |b| / (|z| + |b|), with z computed without it, a rule
that jaxlrp does not have; iNNvestigate 2.1.2 installs with TensorFlow 2.14, but would need a third interpreter and a
twin in Keras, and was not run; HiLRP 0.2.0 asks for Python 3.11.11, newer than the 3.11.7 that this was made with;
lrp-pf-auc 0.1.6 has zennit's core inside, and was not run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jaxlrp
from benchmarks import networks, peers_weights
from benchmarks.accuracy import in_double, in_norm, largest
from benchmarks.malloc import keep_memory
from benchmarks.peers_process import Peer, PeerError
from benchmarks.speed import IN_FULL, OWN_CONVOLUTIONS, Measured, compiled
from jaxlrp.models.llama import Llama, LlamaConfig
from jaxlrp.tables import table

TOLERANCE = 1e-4  # of the largest relevance
TARGET = 1
NEAR = 1.1  # times the fastest, as in peers_torch.py
SETTINGS: dict[str, dict[str, str]] = {"default": {}, "YNNPACK for dots alone": OWN_CONVOLUTIONS}

Key = tuple[str, str]  # what is run: "own", "torch", "peer" or "jaxlrp"; and its setting


class Case(NamedTuple):
    """A network as a function of ``(params, x)``, its twin's name, sizes and weights, and what is compared."""

    run: Callable[..., jax.Array]
    params: Any
    x: jax.Array
    twin: str
    sizes: dict[str, Any]
    tensors: peers_weights.Tensors
    composites: dict[tuple[str, str], jaxlrp.Composite]  # by peer and method


def _images(module: Any, batch: int, twin: str, composites: dict[tuple[str, str], Any], gain: float = 2**0.5) -> Case:
    x = jax.random.uniform(jax.random.key(1), (batch, 224, 224, 3))
    params = peers_weights.randomised(jax.jit(module.init)(jax.random.key(0), x[:1]), gain)
    sizes = {}
    if twin == "vit":
        sizes = {"num_layers": module.layers, "num_heads": module.heads, "hidden_dim": module.width}
    return Case(module.apply, params, x, twin, sizes, getattr(peers_weights, twin)(params), composites)


def _llama(batch: int, tokens: int) -> Case:
    config = LlamaConfig(8000, 512, 8, 8, 4, 1408)
    module = Llama(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, tokens), jnp.int32))
    params = peers_weights.randomised(params, 1.0)
    x = jax.random.normal(jax.random.key(1), (batch, tokens, config.hidden_size))
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
    }

    def run(params: Any, x: jax.Array) -> jax.Array:
        return module.apply(params, x, logits_to_keep=1, method="encode")[:, -1]

    composites = {("lxt", "AttnLRP"): jaxlrp.AttnLRP(0.0), ("lxt", "CPLRP"): jaxlrp.CPLRP(0.0)}
    return Case(run, params, x, "llama", sizes, peers_weights.llama(params), composites)


ZENNIT = {
    ("zennit", "EpsilonPlusFlat"): jaxlrp.EpsilonPlusFlat(),
    ("zennit", "EpsilonGammaBox"): jaxlrp.EpsilonGammaBox(0.0, 1.0),
    ("zennit", "EpsilonAlpha2Beta1"): jaxlrp.EpsilonAlpha2Beta1(),
}
# captum's stabiliser is 1e-9; its gamma leaves the bias as it is, which agrees with nobody's, so it is left out there
CAPTUM = {
    ("captum", "Epsilon"): jaxlrp.Composite.uniform(jaxlrp.Epsilon(1e-9)),
    ("captum", "Gamma"): jaxlrp.Composite(
        (jaxlrp.kind("linear"), jaxlrp.Epsilon(1e-9)),
        (jaxlrp.kind("conv"), jaxlrp.Gamma(0.25, epsilon=1e-9, bias="ignore")),
    ),
}

NETWORKS: dict[str, Callable[[], Case]] = {
    "VGG16, batch 4": lambda: _images(networks.VGG16(), 4, "vgg16", ZENNIT | CAPTUM),
    "ResNet50, batch 8": lambda: _images(networks.ResNet50(), 8, "resnet50", ZENNIT),
    # LXT patches torchvision's transformer for CP-LRP alone
    "ViT-B/16, batch 4": lambda: _images(networks.ViT(), 4, "vit", {("lxt", "CPLRP"): jaxlrp.CPLRP(0.0)}, 1.0),
    "Llama, 8 layers, 2 x 128 tokens": lambda: _llama(2, 128),
}


# -- measuring --------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def medians(calls: dict[Key, Callable[[], float]], rounds: int) -> dict[Key, float]:
    """Of all calls' seconds, which take turns; the first round warms up."""
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for round_ in range(rounds + 1):
        for key, run in calls.items():
            found = run()
            if round_:
                seconds[key].append(found)
    return {key: statistics.median(values) for key, values in seconds.items()}


def fastest(seconds: dict[Key, float], called: str) -> tuple[float, str]:
    """The least seconds of a program, and its setting."""
    return min((found, setting) for (name, setting), found in seconds.items() if name == called)


def near_fastest(programs: dict[Key, Measured]) -> dict[Key, Callable[[], float]]:
    """Timed calls, in those settings that may be the fastest."""
    calls = {key: functools.partial(timed, program.call) for key, program in programs.items()}
    took = medians(calls, 3)
    return {key: run for key, run in calls.items() if took[key] <= NEAR * fastest(took, key[0])[0]}


def compare(single: Any, theirs: np.ndarray, double: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """How far two relevances are apart in float32 and in float64, and each from its own in float64."""
    found = largest(single, theirs), in_norm(single, theirs), largest(*double)
    return [f"{value:.0e}" for value in (*found, in_norm(single, double[0]), in_norm(theirs, double[1]))]


def agree(ours: dict[Key, np.ndarray], in_full: np.ndarray, double: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether relevance is the same in float64, and in float32 about as near to it as with all multiplications."""
    most = max(TOLERANCE, 2 * in_norm(in_full, double[0]))
    near = all(in_norm(single, double[0]) < most for single in ours.values())  # not if it is NaN
    return largest(*double) < TOLERANCE and near


def timing(t: dict[Key, float]) -> list[str]:
    """Times, ratios and settings, given medians."""
    ms = lambda seconds: f"{1e3 * seconds:.0f} ms"  # noqa: E731
    (own, _), (ours, setting) = fastest(t, "own"), fastest(t, "jaxlrp")
    (torch, _), (peer, theirs) = fastest(t, "torch"), fastest(t, "peer")
    left = [ms(own), ms(ours), f"{ours / own:.2f}x"]
    right = [ms(torch), ms(peer), f"{peer / torch:.2f}x", f"{peer / ours:.2f}x"]
    return [*left, *right, setting, theirs]


class Row(NamedTuple):
    """What was found: the cells of the table, and everything said below it."""

    cells: list[str]
    agrees: bool
    versions: dict[str, str]


def measure(
    name: str, case: Case, peers: Sequence[str], methods: Sequence[str], python: str, rounds: int
) -> Iterator[Row | str]:
    """The rows of one network for these peers and methods (all if none is named), or why a peer does not run."""

    def gradient(params: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: case.run(params, x)[:, TARGET].sum())(x)

    x = case.x.transpose(0, 3, 1, 2) if case.x.ndim == 4 else case.x
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez(folder / "weights.npz", input=np.asarray(x), **case.tensors)
        case.tensors.clear()
        gradients: dict[Key, Measured] = {}
        if rounds:
            for setting, options in SETTINGS.items():
                gradients["own", setting] = compiled(gradient, case.params, case.x, options=options)
        own = near_fastest(gradients)
        start = functools.partial(Peer, python, case.twin, case.sizes, folder)
        with start("output") as twin:
            # not the gradient, which jumps where a relu is near 0
            if not (off := largest(jax.jit(case.run)(case.params, case.x), twin.array())) < TOLERANCE:
                raise PeerError(f"{name}: its twin is another network, their outputs are {off:.0e} off")
        with start("gradient", timed=bool(rounds)) as torch_own:
            for (library, method), composite in case.composites.items():
                if not (library in (peers or [library]) and method in (methods or [method])):
                    continue
                explain = jaxlrp.lrp(case.run, composite, argnums=1, target=TARGET)
                try:
                    with start(library, method, double=True) as peer:
                        double = in_double(explain, case.params, case.x), peer.array()
                    with start(library, method, timed=bool(rounds)) as peer:
                        theirs = peer.array()
                        programs = functools.partial(compiled, explain, case.params, case.x)
                        ours = {("jaxlrp", name): programs(options=options) for name, options in SETTINGS.items()}
                        single = {key: np.asarray(program.call()) for key, program in ours.items()}
                        agrees = agree(single, np.asarray(programs(precision=IN_FULL).call()), double)
                        t: dict[Key, float] = {}
                        if agrees and rounds:
                            calls = own | near_fastest(ours)
                            for called, process in (("torch", torch_own), ("peer", peer)):
                                for setting in process.settings:
                                    calls[called, setting] = functools.partial(process.seconds, setting)
                            t = medians(calls, rounds)
                        setting = fastest(t, "jaxlrp")[1] if t else next(iter(SETTINGS))
                        cells = compare(single["jaxlrp", setting], theirs, double)
                        cells += timing(t) if t else ["-"] * (len(HEAD) - 3 - len(cells))
                        yield Row([name, library, method, *cells], agrees, peer.versions)
                except PeerError as error:
                    yield f"{name}: {library} {method} is left out: {error}"


HEAD = ["network", "peer", "composite", "difference", "in norm", "in float64", "jaxlrp's rounding", "peer's rounding"]
HEAD += [
    "jax gradient",
    "jaxlrp",
    "of gradient",
    "torch gradient",
    "peer",
    "of gradient",
    "peer/jaxlrp",
    "jaxlrp's setting",
    "peer's setting",
]


def machine() -> str:
    """The processor's name where the system tells it, and whether it has AVX-512, on which ratios depend."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores, with{'' if ' avx512f' in info else 'out'} AVX-512"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that the peers are installed in")
    parser.add_argument("--network", nargs="*", default=[], help=f"any of: {'; '.join(NETWORKS)}")
    parser.add_argument("--peer", nargs="*", default=[], help="zennit, captum, lxt; all if none is named")
    parser.add_argument("--composite", nargs="*", default=[], help="EpsilonPlusFlat, ...; all if none is named")
    parser.add_argument("--rounds", type=int, default=7, help="0 compares relevance and times nothing")
    arguments = parser.parse_args()
    keep_memory()
    rows: list[Row] = []
    notes: list[str] = []
    for name, make in NETWORKS.items():
        if arguments.network and not name.startswith(tuple(arguments.network)):
            continue
        for found in measure(
            name, make(), arguments.peer, arguments.composite, arguments.peer_python, arguments.rounds
        ):
            if isinstance(found, Row):
                print("  ".join(found.cells), file=sys.stderr, flush=True)  # the table takes long to be whole
                rows.append(found)
            else:
                notes.append(found)
    print(table(HEAD, [row.cells for row in rows], right=range(3, len(HEAD) - 2)) + "\n")
    versions = {"jax": jax.__version__} | {name: v for row in rows for name, v in row.versions.items()}
    print(f"{machine()}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print("\n".join(notes), end="\n" if notes else "")
    return int(not all(row.agrees for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
