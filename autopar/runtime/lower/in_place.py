"""Operations that write their result where their input lies.

A node that was traced as one that may (``overwriting``) does, if nobody reads the memory of its first
input afterwards, that memory was made by this pass or for its backward alone, and it has the result's shape and type.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx import traceback

_ATEN = torch.ops.aten
IN_PLACE_FORM: Mapping[Any, Any] = {
    _ATEN.add.Tensor: _ATEN.add_.Tensor,
    _ATEN.sub.Tensor: _ATEN.sub_.Tensor,
    _ATEN.mul.Tensor: _ATEN.mul_.Tensor,
    _ATEN.div.Tensor: _ATEN.div_.Tensor,
    _ATEN.exp.default: _ATEN.exp_.default,
    _ATEN.scatter_add.default: _ATEN.scatter_add_.default,
}


def annotate_in_place() -> AbstractContextManager[Any]:
    """Nodes traced inside may write their result where their first input lies, if nobody reads that later."""
    if not traceback.has_preserved_node_meta():
        return nullcontext()
    return traceback.annotate({"in_place": True})


def in_place_nodes(order: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[Any]) -> set[fx.Node]:
    """Which nodes of a pass run in place; ``order`` is that in which they run, ``inputs`` are there before."""
    place = {node: at for at, node in enumerate(order)}
    staying = {node for node in results if isinstance(node, fx.Node)}
    given = set(inputs)
    return {
        node
        for node in order
        if node.meta.get("custom", {}).get("in_place")
        and node.target in IN_PLACE_FORM
        and _may_overwrite_input(node, place, given, staying)
    }


def _may_overwrite_input(
    node: fx.Node, position: Mapping[fx.Node, int], pass_inputs: set[fx.Node], pass_results: set[fx.Node]
) -> bool:
    """Whether the memory of a node's first input may be overwritten when it runs."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    base = source
    while shares_input_memory(base):
        base = base.all_input_nodes[0]
    if base.op != "call_function":  # an argument of the stage, or a gradient that another stage gave
        return False
    first, result = source.meta["val"], node.meta["val"]
    whole = prod(base.meta["val"].shape) if isinstance(base.meta["val"], torch.Tensor) else -1
    if (first.shape, first.dtype) != (result.shape, result.dtype) or whole != result.numel():
        return False
    alike, stack = set[fx.Node](), [base]
    while stack:
        one = stack.pop()
        alike.add(one)
        stack.extend(user for user in one.users if shares_input_memory(user) and user not in alike)
    if alike & pass_results or len(alike & pass_inputs) > (base in pass_inputs):
        return False
    return all(position.get(user, -1) <= position[node] for one in alike for user in one.users)


def shares_input_memory(node: fx.Node) -> bool:
    """Whether a node's result lies in the memory of its input."""
    if node.op == "call_function" and node.target is _ATEN._unsafe_view.default:
        return True
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.returns:
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write
