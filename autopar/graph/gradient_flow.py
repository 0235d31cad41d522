"""The tensors of a graph that get a gradient in the backward pass."""

import operator

from torch import Tensor, fx

# Ops with a floating-point result through which no gradient flows.
_GRADIENT_STOPPING_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "detach", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros",
        "new_ones", "new_full", "new_empty", "bernoulli", "sign", "one_hot",
    )
)  # fmt: skip
NodeResult = tuple[fx.Node, int]  # a node and the position of one of its results


def results_with_gradient(graph: fx.Graph) -> set[NodeResult]:
    """Every floating-point result of an op or placeholder on a path from a trainable parameter to the loss that no
    detach or ``no_grad`` region interrupts."""
    reached = _reached_from_parameters(graph)
    loss = next(reversed(graph.nodes)).args[0]
    used: set[fx.Node] = {loss}  # type: ignore[arg-type]
    for node in reversed(graph.nodes):
        # Nodes are in execution order, so in reverse all users of a node come before it.
        if node in used and node in reached and not _stops_gradient(node):
            used.update(source for source in node.all_input_nodes if source in reached)
    results: set[NodeResult] = set()
    for node in graph.nodes:
        if node not in used or node not in reached:
            continue
        value = node.meta.get("val")
        if node.target is operator.getitem:
            results.add((node.args[0], node.args[1]))  # type: ignore[arg-type]
        elif isinstance(value, Tensor):
            results.add((node, 0))
    return results


def _reached_from_parameters(graph: fx.Graph) -> set[fx.Node]:
    """Floating-point nodes that depend on a trainable parameter."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(value, Tensor) and value.requires_grad:
                reached.add(node)
        elif node.op == "call_function" and not _stops_gradient(node) and _is_floating(value):
            reached.update({node} if not reached.isdisjoint(node.all_input_nodes) else ())
    return reached


def _is_floating(value: object) -> bool:
    results = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()) for result in results)


def _stops_gradient(node: fx.Node) -> bool:
    return bool(node.meta.get("no_grad")) or str(node.target).rsplit(".", 1)[0] in _GRADIENT_STOPPING_OPS
