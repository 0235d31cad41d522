"""What the lowering asks of nodes of an fx graph: their block, whether they start a collective or are views, and what they
are computed from."""

from collections.abc import Callable, Iterable

import torch
from torch import fx

ZERO3_GATHER = -2
"""The block of nodes that gather ZeRO-3 parameters."""
SEND_PREPARATION = -3
"""The block of nodes that redistribute activations to the placements in which they are sent."""
WAIT = torch.ops._c10d_functional.wait_tensor.default
"""Waits for a functional collective of torch."""


def starts_collective(node: fx.Node) -> bool:
    """Whether a node starts a collective of torch's functional ones; waiting for it is another node."""
    return node.op == "call_function" and "_c10d_functional" in str(node.target) and node.target is not WAIT


def block_and_recompute(node: fx.Node) -> tuple[int, bool]:
    """The block that a node was traced in (-1: none), and whether the backward recomputes it."""
    custom = node.meta.get("custom", {})
    return custom.get("block", -1), custom.get("recompute", False)


def is_view(node: fx.Node) -> bool:
    """Whether a node's result is a view of its input, by the schema of its op."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.returns:
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write


def ancestors_until(
    nodes: Iterable[fx.Node], ends: Iterable[fx.Node], follow: Callable[[fx.Node], bool] = lambda node: True
) -> set[fx.Node]:
    """These nodes and all that they are computed from, without ``ends`` and what only ``ends`` are computed from; only nodes
    that ``follow`` accepts."""
    stop, found, stack = set(ends), set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node not in stop and follow(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
