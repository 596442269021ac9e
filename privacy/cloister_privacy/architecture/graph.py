"""Who reads whom: the layers of a spec as the nodes of a graph without cycles. Knows names; no shapes and no torch."""

from __future__ import annotations

from dataclasses import dataclass

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.layers import Layer
from cloister_privacy.errors import ArchitectureRefused

__all__ = ["MASKED", "Node", "nodes_of"]

MASKED = (wire.MultiheadAttention, wire.TransformerLayer, wire.SequencePool)
"""Layers that may read tokens beside their input."""

_READS_LIMIT = 2**16
"""The most reads of all layers together."""


@dataclass(frozen=True, slots=True)
class Node:
    """A layer in its place."""

    layer: Layer
    key: str
    """Its own name, or one that nobody can give."""
    reads: tuple[str, ...]
    """Keys of earlier nodes, and names of columns."""
    where: str
    """How an error speaks of it."""


def nodes_of(architecture: Architecture) -> tuple[Node, ...]:
    """The layers in order. Raises ArchitectureRefused where one reads what is not there yet, or a name comes twice."""
    known, nodes, count = set(architecture.inputs), list[Node](), 0
    later = {layer.name for layer in architecture.layers}
    for position, layer in enumerate(architecture.layers):
        where = f"layer {position} ({layer.type})" if layer.name is None else f"layer {layer.name!r} ({layer.type})"
        reads = layer.reads if layer.reads is not None else _default(architecture, layer, nodes, where)
        count += len(reads)
        if count > _READS_LIMIT:
            raise ArchitectureRefused(
                f"the layers up to {where} read {count} times; read what they share once, and join it"
            )
        for name in reads:
            if name not in known:
                why = (
                    "which comes later or is itself; a layer reads only what is before it"
                    if name in later
                    else "which is not there"
                )
                raise ArchitectureRefused(f"{where} reads {name!r}, {why}")
        _require_count(layer, len(reads), where)
        if isinstance(layer, wire.Encode) and any(name not in architecture.inputs for name in reads):
            raise ArchitectureRefused(f"{where} joins columns, and reads a layer; use concatenate for layers")
        key = layer.name if layer.name is not None else f"#{position}"
        if key in known or key == architecture.target:
            raise ArchitectureRefused(
                f"{where}: the name {key!r} comes twice; give each layer, each column and the target its own"
            )
        known.add(key)
        nodes.append(Node(layer, key, tuple(reads), where))
    _require_all_used(architecture, nodes)
    return tuple(nodes)


def _default(architecture: Architecture, layer: Layer, before: list[Node], where: str) -> tuple[str, ...]:
    if isinstance(layer, wire.Encode):
        return tuple(architecture.inputs)
    if before:
        return (before[-1].key,)
    if len(architecture.inputs) > 1:
        raise ArchitectureRefused(
            f"{where} is first and there are {len(architecture.inputs)} inputs; put encode first to join them, or name in reads the "
            "one that it reads"
        )
    return tuple(architecture.inputs)


def _require_count(layer: Layer, count: int, where: str) -> None:
    match layer:
        case wire.Encode():
            return
        case wire.Add() | wire.Multiply() | wire.Concatenate():
            least, most = 2, 64
        case _ if isinstance(layer, MASKED):
            least, most = 1, 2
        case _:
            least, most = 1, 1
    if not least <= count <= most:
        told = str(least) if least == most else f"{least} to {most}"
        raise ArchitectureRefused(f"{where} reads {count} layers or columns, and takes {told}; name them in reads")


def _require_all_used(architecture: Architecture, nodes: list[Node]) -> None:
    read = {name for node in nodes for name in node.reads}
    unread = [name for name in (*architecture.inputs, *(node.key for node in nodes[:-1])) if name not in read]
    if unread:
        where = next((node.where for node in nodes if node.key == unread[0]), f"input {unread[0]!r}")
        raise ArchitectureRefused(
            f"nothing reads {where}; leave it out, or name it in reads of the layer that needs it"
        )
