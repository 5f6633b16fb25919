"""What layers are to each other: factors of one product, gate and gated, the last of the model, reachable."""

from __future__ import annotations

from collections.abc import Iterable

from . import _primitives as P
from .bounds import bounds
from .graph import Program, Scan, Value
from .layers import Layer


def join_products(layers: list[Layer], program: Program) -> list[Layer]:
    """``a * b * c`` is one product of three factors: a product that is read by another alone is part of it."""
    joined: dict[Value, Layer] = {}
    for layer in layers:
        if layer.kind != "product" or layer.op != "mul":
            continue
        for value in layer.inputs:
            inner = joined.get(value)
            if inner is not None and program.consumers[value] == list(layer.equations[-1:]):
                layer.equations = inner.equations + layer.equations
                rest = (v for v in layer.inputs if v is not value)
                layer.inputs = tuple(dict.fromkeys((*inner.inputs, *rest)))
                del joined[value]
        if layer.outputs[0] not in program.outputs:
            joined[layer.outputs[0]] = layer
    used = {v for layer in layers for v in layer.inputs} | set(program.outputs)
    return [layer for layer in layers if used.intersection(layer.outputs)]


def join_normalisations(layers: list[Layer], program: Program) -> list[Layer]:
    """Gain and shift of a GroupNorm stand behind the reshape that undoes its groups: they are part of it too."""
    maker = {v: layer for layer in layers for v in layer.outputs}
    gone: set[Layer] = set()

    def alone(value: Value) -> bool:
        return value not in program.outputs and len(program.consumers.get(value, ())) == 1

    for layer in layers:
        if layer.kind != "scale":
            continue
        value, between = layer.inputs[0], []
        while alone(value) and (before := maker.get(value)) and before.kind == "move" and before.op in _REARRANGING:
            between.insert(0, before)
            value = before.inputs[0]
        before = maker.get(value)
        if between and before and before.kind == "normalization" and alone(value):
            gone.update((before, *between))
            layer.kind, layer.op, layer.linear = before.kind, before.op, None
            layer.moves = sum((m.equations for m in between), ())
            layer.equations = before.equations + layer.moves + layer.equations
            layer.inputs = before.inputs
    return [layer for layer in layers if layer not in gone]


_REARRANGING = ("reshape", "transpose", "squeeze", "expand_dims")


def mark_gates(layers: list[Layer], program: Program, ranks: dict[Value, int] | None = None) -> None:
    """Find the factors of each product that gate the others: ``σ(a) b``, ``softmax(a) b``, ``silu(a) b``."""
    ranks = {} if ranks is None else ranks
    for layer in layers:
        for body in layer.bodies:  # a gate may be made outside of the recurrence that it is used in
            ranks.update((v, ranks.get(body.outside[v], 0)) for v in body.program.inputs)
            if isinstance(scan := layer.equations[0], Scan):
                ranks.update(dict.fromkeys(scan.split(scan.step.inputs)[1], 0))  # what is carried changes
            mark_gates(body.layers, body.program, ranks)
        given = [ranks.get(v, 0) for v in layer.inputs]
        ranks.update(dict.fromkeys(layer.outputs, _rank(layer, program, given)))
        if layer.bodies:  # what any branch makes of it may be no gate
            made = zip(*(body.program.outputs for body in layer.bodies), strict=True)
            least = [min(ranks.get(v, 0) for v in alternatives) for alternatives in made]
            ranks.update(zip(layer.equations[0].outputs, least, strict=True))
        if layer.kind == "product":
            layer.gates = tuple(i for i, rank in enumerate(given) if rank > min(given))
            if layer.op == "mul" and layer.gates and max(given) == 3:
                layer.op = "gate"


def _rank(layer: Layer, program: Program, given: list[int]) -> int:
    """How much a value looks like a gate: 3 from a sigmoid, 2 from a softmax, 1 from others but tanh, else 0."""
    if layer.kind == "softmax":
        return 2
    if layer.kind == "activation" and layer.op != "identity":
        return 3 if _squashes(layer, program) else int(layer.op != "tanh")
    least = min(given, default=0)
    if layer.kind in ("move", "pick", "activation"):
        return least
    return least if layer.kind in ("product", "sum") and least == 3 else 0  # a product or a sum of gates is one


_ULPS = 1e-6  # 6 * float32(1 / 6) is more than 1


def _squashes(layer: Layer, program: Program) -> bool:
    """Whether an activation lies between 0 and 1 (a sigmoid in any spelling), or is a softplus or an exponential."""
    low, high = bounds(program, layer.equations)[layer.outputs[0]]
    if low >= -_ULPS and high <= 1 + _ULPS:
        return True
    both = any(all(v.depends for v in e.inputs) for e in layer.equations if e.primitive in P.MUL | P.DIV)
    return not both and bool({"softplus", "exp"}.intersection(layer.op.split("_")))


def mark_final(layers: list[Layer], program: Program, outputs: Iterable[Value] | None = None) -> None:
    """Mark the layers whose output is the model's, perhaps moved on the way (masked, reshaped), and nobody else's.

    ``outputs`` are those of the program's outputs that are the model's: of a scan what it stacks, not what it carries.
    """
    final = {v for v in (program.outputs if outputs is None else outputs) if v.carries}
    read: set[Value] = set(program.outputs) - final
    for layer in reversed(layers):
        layer.final = any(v in final for v in layer.outputs) and not read.intersection(layer.outputs)
        for body in layer.bodies if layer.final else ():
            equation = layer.equations[0]
            carried = body.program.outputs[: equation.carries] if isinstance(equation, Scan) else ()
            pairs = zip(body.program.outputs, equation.outputs, strict=True)
            mark_final(body.layers, body.program, [v for v, outer in pairs if outer in final and v not in carried])
        if layer.final and layer.kind == "move":
            final.update(v for v in layer.inputs if v not in read)
        else:
            read.update(layer.inputs)


def reachable(layers: list[Layer], program: Program) -> list[Layer]:
    """Keep the layers that relevance can reach from an output."""
    reached = {v for v in program.outputs if v.carries}
    kept = []
    for layer in reversed(layers):
        if reached.intersection(layer.outputs):
            kept.append(layer)
            reached.update(layer.inputs)
    return kept[::-1]
