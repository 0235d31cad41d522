"""Turns in-place ops into functional ones, so that every tensor of the graph is written once.

torch's own functionalisation re-runs the whole graph (seconds for a large model); this pass covers what models do in
practice (``relu_``, ``+=``, ``x[:, 1:] = y``) by redirecting uses, and returns False where that is not enough.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.core.errors import ModelError
from autopar.graph.aliasing import MAY_ALIAS_OPS, same_metadata
from autopar.graph.source_location import location_of_node

aten = torch.ops.aten
_SCATTER_OF_VIEW = {"aten.slice.Tensor": aten.slice_scatter.default, "aten.select.int": aten.select_scatter.default}

_WAY_OUT = "change parameters in the optimizer step, and register what the forward pass updates as a buffer"
_WAYS_OUT = {
    "aten.embedding_renorm_.default": "build the embedding without max_norm, which rescales rows of its weight in place, "
    "and limit the norm of the rows that it returns"
}


def functionalize_in_place_ops(graph: fx.Graph, buffers: frozenset[str], inputs: frozenset[Any]) -> bool:
    """Turns every in-place op into its functional variant, except on buffers, where it stays (running statistics).

    A write through ``x[..., 1:]`` or ``x[i]`` becomes a ``slice_scatter`` or ``select_scatter`` into ``x``. Returns
    False at the first write that is read later through another alias of the tensor: that needs torch's own
    functionalisation. Raises ModelError where the forward pass modifies a parameter or constant.

    ``buffers`` and ``inputs`` are names of placeholders."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    roots = _alias_roots(graph)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, root in roots.items():
        members.setdefault(root, []).append(node)
    for node in list(graph.nodes):
        written = mutated_input(node)
        if written is None:
            continue
        root = roots[written]
        if root.op == "placeholder" and root.name not in buffers | inputs:
            raise ModelError(
                f"{node.target}{location_of_node(node, ' at ')} modifies a parameter, or a tensor that is not a buffer, "
                f"in the forward pass\n  {_WAYS_OUT.get(str(node.target), _WAY_OUT)}"
            )
        if root.op == "placeholder" and root.name in buffers and written is not root:
            return False
        now = order[node]
        # Views taken after the write read it through the tensor that they are taken from.
        before = (alias for alias in members[roots[written]] if order[alias] <= now and alias is not node)
        later = {alias for alias in before if any(order[user] > now for user in alias.users)}
        base = written.all_input_nodes[0] if str(written.target) in _SCATTER_OF_VIEW else None
        if later - {written, base}:
            return False
        if written in later:
            _replace_later_uses(written, node, order, now)
        if written.op == "placeholder" and written.name in buffers:
            continue
        variant = _functional_variant(node)
        if variant is None:
            return False
        node.target = variant
        if base is not None and base in later:
            with graph.inserting_after(node):
                scatter = graph.call_function(_SCATTER_OF_VIEW[str(written.target)], (base, node, *written.args[1:]))
            scatter.meta = {**node.meta, "val": base.meta["val"]}
            order[scatter] = now
            roots[scatter] = roots[base]
            members[roots[base]].append(scatter)
            _replace_later_uses(base, scatter, order, now)
        if variant is aten.copy.default:
            _simplify_copy(node)
    return True


def _replace_later_uses(old: fx.Node, new: fx.Node, order: dict[fx.Node, int], now: int) -> None:
    """Makes the users of ``old`` that run after position ``now`` read ``new``."""
    for user in list(old.users):
        if order[user] > now:
            user.replace_input_with(old, new)


def _simplify_copy(node: fx.Node) -> None:
    """Replaces ``copy(written, source)`` by ``source`` where both have the same metadata."""
    destination, source = node.args[:2]
    assert isinstance(destination, fx.Node)
    if isinstance(source, fx.Node) and same_metadata(destination.meta["val"], source.meta["val"]):
        node.replace_all_uses_with(source)


def _alias_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node the first node whose storage it may share."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        base = node
        if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
            schema = getattr(node.target, "_schema", None)
            aliases = schema is not None and any(result.alias_info is not None for result in schema.returns)
            maybe = str(node.target) in MAY_ALIAS_OPS
            if aliases or maybe or (node.target is operator.getitem and roots[node.args[0]] is not node.args[0]):
                base = node.args[0]
        roots[node] = roots.get(base, base)
    return roots


def mutated_input(node: fx.Node) -> fx.Node | None:
    """The tensor that an in-place op writes (the first argument that its schema marks as written), or None for a
    functional op."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return None
    for parameter, argument in zip(schema.arguments, node.args, strict=False):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            return argument if isinstance(argument, fx.Node) else None
    return None


def _functional_variant(node: fx.Node) -> Callable[..., Any] | None:
    """``aten.add_.Tensor`` -> ``aten.add.Tensor``; None where aten has none."""
    namespace, name, overload = str(node.target).split(".")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, overload, None)
