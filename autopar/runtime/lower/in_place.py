"""Nodes that run in place.

A node traced under ``annotate_in_place`` does, if nothing reads its first input's memory afterwards, that memory was
allocated by this pass or saved for its backward alone, and its shape and dtype are the result's.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx import traceback

from autopar.runtime.lower.fx_nodes import is_view

_ATEN = torch.ops.aten
IN_PLACE_FORM: Mapping[Any, Any] = {
    _ATEN.add.Tensor: _ATEN.add_.Tensor,
    _ATEN.sub.Tensor: _ATEN.sub_.Tensor,
    _ATEN.mul.Tensor: _ATEN.mul_.Tensor,
    _ATEN.div.Tensor: _ATEN.div_.Tensor,
    _ATEN.exp.default: _ATEN.exp_.default,
    _ATEN.scatter_add.default: _ATEN.scatter_add_.default,
}
"""The in-place form of each op that is made to run in place."""


def annotate_in_place() -> AbstractContextManager[Any]:
    """Nodes traced inside may write their result into the memory of their first input, if nothing reads that later."""
    if not traceback.has_preserved_node_meta():
        return nullcontext()
    return traceback.annotate({"in_place": True})


def in_place_nodes(order: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[Any]) -> set[fx.Node]:
    """The nodes of a pass that run in place. ``order`` is that in which its nodes run, ``inputs`` and ``results`` are the
    pass's."""
    positions = {node: position for position, node in enumerate(order)}
    pass_results = {node for node in results if isinstance(node, fx.Node)}
    pass_inputs = set(inputs)
    return {
        node
        for node in order
        if node.meta.get("custom", {}).get("in_place")
        and node.target in IN_PLACE_FORM
        and _may_overwrite_input(node, positions, pass_inputs, pass_results)
    }


def _may_overwrite_input(
    node: fx.Node, positions: Mapping[fx.Node, int], pass_inputs: set[fx.Node], pass_results: set[fx.Node]
) -> bool:
    """Whether the memory of a node's first input may be overwritten when it runs."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    base = source
    while shares_input_memory(base):
        base = base.all_input_nodes[0]
    if base.op != "call_function":  # an argument of the stage, or a gradient received from another stage
        return False
    first, result = source.meta["val"], node.meta["val"]
    base_numel = prod(base.meta["val"].shape) if isinstance(base.meta["val"], torch.Tensor) else -1
    if (first.shape, first.dtype) != (result.shape, result.dtype) or base_numel != result.numel():
        return False
    sharing, stack = set[fx.Node](), [base]  # all nodes whose results are in this memory
    while stack:
        current = stack.pop()
        sharing.add(current)
        stack.extend(user for user in current.users if shares_input_memory(user) and user not in sharing)
    if sharing & pass_results or len(sharing & pass_inputs) > (base in pass_inputs):
        return False
    return all(positions.get(user, -1) <= positions[node] for each in sharing for user in each.users)


def shares_input_memory(node: fx.Node) -> bool:
    """Whether a node's result is in the memory of its input."""
    return is_view(node) or (node.op == "call_function" and node.target is _ATEN._unsafe_view.default)
