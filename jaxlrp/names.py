"""Names of layers: Flax's module path, the path of the parameter they use, or their operation."""

from __future__ import annotations

from collections.abc import Sequence

from .layers import Layer

_LEAVES = {"kernel", "weight", "weights", "w", "W", "embedding", "scale", "bias", "b", "mean", "var", "value"}
_COLLECTIONS = {"params", "batch_stats"}


def _module_of(path: str) -> str:
    """``params/Block_0/Conv_0/kernel`` -> ``Block_0/Conv_0``."""
    parts = [p for p in path.split("/") if p]
    if parts and parts[0] in _COLLECTIONS:
        parts = parts[1:]
    if parts[-1:] == ["value"] and parts[-2:-1] and parts[-2] in _LEAVES:
        parts = parts[:-1]  # NNX calls what is in a variable so: Conv_0/kernel/value
    if len(parts) > 1 and parts[-1] in _LEAVES:  # once: modules are called "value" or "scale" too
        parts = parts[:-1]
    return "/".join(parts)


def name_layers(layers: Sequence[Layer], root_scope: str | None) -> None:
    """Give every layer a name of its own; a second layer of a name is ``"name:2"``."""
    scopes = [layer.equations[0].scope for layer in layers]
    outermost = {scope[0] if scope else None for scope in scopes}
    if root_scope is None and len(outermost) == 1 and any(len(scope) > 1 for scope in scopes):
        root_scope = outermost.pop()  # a function around a module: its name tells nothing apart
    used: dict[str, int] = {}
    for layer in layers:
        name = _layer_name(layer, root_scope, scopes)
        used[name] = used.get(name, 0) + 1
        layer.name = name if used[name] == 1 else f"{name}:{used[name]}"


def _layer_name(layer: Layer, root_scope: str | None, scopes: Sequence[tuple[str, ...]]) -> str:
    whole = scope = layer.equations[0].scope
    if root_scope is not None and scope[:1] == (root_scope,):
        scope = scope[1:]
    here = "/".join(scope)
    alone = layer.linear is not None and layer.linear.core is None
    if layer.kind in ("linear", "normalization") or alone:  # layers with parameters are called by their module
        modules = [_module_of(v.path) for e in layer.equations for v in e.inputs if not v.depends and v.path]
        if modules:
            return modules[0] if not here or here.endswith(modules[0]) else here
        if here and scopes.count(whole) == 1:
            return here
    return f"{here}/{layer.op}" if here else layer.op
