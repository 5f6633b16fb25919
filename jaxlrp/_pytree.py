"""Pytrees of our own: frozen dataclasses that jax tells apart, and trees that have every array once."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, dataclass_transform

import jax
from flax import struct


@dataclass_transform(field_specifiers=(struct.field,), frozen_default=True)
class PyTreeNode:
    """Subclasses are frozen dataclasses and pytrees; ``struct.field(pytree_node=False)`` is structure, all else leaves.

    What `flax.struct.PyTreeNode` is, but for one thing. flax registers classes with `jax.tree_util.register_dataclass`,
    and the structures of two such classes compare equal if their static fields do, whatever the classes: ``Epsilon()``
    and ``Flat()``. Only their hashes differ. `jax.jit` looks programs up by a few bits of the hash, then by equality,
    so that now and then it would run the one rule's program for the other. A node that is flattened by functions of its
    own is compared by its class too.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True, **kwargs)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        leaves = [f.name for f in fields if f.metadata.get("pytree_node", True)]
        static = [f.name for f in fields if not f.metadata.get("pytree_node", True)]

        def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(node, name) for name in leaves], tuple(getattr(node, name) for name in static)

        def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
            children, structure = flatten(node)
            return list(zip(map(jax.tree_util.GetAttrKey, leaves), children, strict=True)), structure

        def unflatten(structure: tuple[Any, ...], children: Any) -> Any:
            return cls(**dict(zip(static, structure, strict=True)), **dict(zip(leaves, children, strict=True)))

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)

    def replace(self, **updates: Any) -> Self:
        """The same with other values for some fields."""
        return dataclasses.replace(self, **updates)  # type: ignore[type-var]


@jax.tree_util.register_pytree_node_class
class Distinct:
    """A tree in which an array may stand many times, as a pytree that has it once.

    jax stacks, copies and returns every leaf of a tree by itself. What leaves a scan as this is stacked once, and then
    stands again wherever it stood before.
    """

    def __init__(self, tree: Any):
        leaves, structure = jax.tree.flatten(tree)
        first: dict[int, int] = {}
        self._places = tuple(first.setdefault(id(leaf), len(first)) for leaf in leaves)
        self._leaves = list({id(leaf): leaf for leaf in leaves}.values())
        self._structure = structure

    @property
    def tree(self) -> Any:
        """As it was given."""
        return jax.tree.unflatten(self._structure, [self._leaves[place] for place in self._places])

    def tree_flatten(self) -> tuple[list[Any], Any]:
        """For jax: the leaves, and where each of them stands."""
        return self._leaves, (self._structure, self._places)

    @classmethod
    def tree_unflatten(cls, structure: Any, leaves: Any) -> Self:
        """For jax: the same with other leaves."""
        new = object.__new__(cls)
        new._structure, new._places = structure
        new._leaves = list(leaves)
        return new
