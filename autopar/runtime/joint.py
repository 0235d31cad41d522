"""Lowers a stage: its forward and backward traced once into one graph of local ops, then cut in two.

    joint(arguments, tangents) = stage.backward(stage.forward(arguments), tangents)

The partition: the forward graph is what the outputs need. The backward needs what the gradients need, walking back
until a forward node that is kept: every forward node is, except views, nodes whose block recomputes (the values that
enter the block are kept), and gathered ZeRO-3 parameters. A recomputed node stands right before its first reader, so
one block at a time is computed again. Both graphs hold functional collectives by group name: each rank lowers its own.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import _BoxedCodeGen  # private; tried on torch 2.13.0

from autopar.runtime.stage import GATHER, StageFunction


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lowered:
    """``run_forward(arguments)`` returns ``num_outputs`` outputs, then the tensors saved for ``run_backward``, which
    takes the arguments ``kept_arguments``, those, and the tangents, and returns the gradients. Both empty the list they
    are given, so that a tensor lives until its last reader has run."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_outputs: int
    kept_arguments: tuple[int, ...]

    def run_forward(self, arguments: list[Tensor]) -> list[Tensor]:
        return list(self.forward.forward(arguments))

    def run_backward(self, arguments: list[Tensor]) -> list[Tensor]:
        return list(self.backward.forward(arguments))


def lower(stage: StageFunction, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> Lowered:
    """Trace ``stage`` for arguments of these local shapes and dtypes; runs nothing and communicates nothing."""
    num_arguments = len(shapes)

    def joint(*inputs: Tensor) -> list[Tensor]:
        leaves = stage.leaves(inputs[:num_arguments])
        outputs = stage.forward(leaves)
        gradients = stage.backward(leaves, outputs, inputs[num_arguments:])
        return [*flat(outputs), *gradients]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        outputs = stage.forward(stage.leaves(arguments))
        tangents = [torch.empty_like(outputs.sent[at]) for at in stage.sent_with_gradient]
        tangents += [torch.empty_like(outputs.loss)] if outputs.loss is not None else []
        num_outputs = len(flat(outputs))
        with traceback.preserve_node_meta():
            graph = make_fx(joint)(*arguments, *tangents)
            if any(_writes(node) for node in graph.graph.nodes):  # a write has no place among what others need
                written = functionalize(fx.Interpreter(graph).run, remove="mutations")
                graph = make_fx(written)(*arguments, *tangents)
    del mode
    assert not any(_writes(node) for node in graph.graph.nodes), "a node of the lowered graph writes in place"
    graph.graph.eliminate_dead_code()
    return partition(graph, num_arguments, num_outputs)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def flat(outputs: Any) -> list[Tensor]:
    """Sent activations, the loss, buffers."""
    return [*outputs.sent, *([outputs.loss] if outputs.loss is not None else []), *outputs.buffers]


def partition(module: fx.GraphModule, num_arguments: int, num_outputs: int) -> Lowered:
    """Cut a joint graph whose first ``num_outputs`` results are the forward's and the others gradients."""
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    results = list(next(reversed(graph.nodes)).args[0])
    forward = _ancestors(node for node in results[:num_outputs] if isinstance(node, fx.Node))
    arguments = {node: at for at, node in enumerate(placeholders[:num_arguments])}
    saved: dict[fx.Node, None] = {}
    wanted: set[fx.Node] = set()
    stack = [node for node in results[num_outputs:] if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in wanted or node in saved:
            continue
        if node.target is operator.getitem and node.args[0] in forward:
            forward.add(node)
        if node.op == "placeholder" or (node in forward and not _is_recomputed(node, forward)):
            saved[node] = None
            continue
        wanted.add(node)
        stack.extend(node.all_input_nodes)
    order = {node: at for at, node in enumerate(graph.nodes)}
    kept = sorted((node for node in saved if node in arguments), key=order.__getitem__)
    held = sorted((node for node in saved if node.op != "placeholder"), key=order.__getitem__)
    first = fx.Graph()
    first.set_codegen(_BoxedCodeGen())
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in forward or node in arguments:
            copies[node] = first.node_copy(node, lambda old: copies[old])
    first.output(
        [copies.get(node) if isinstance(node, fx.Node) else node for node in results[:num_outputs]]
        + [copies[node] for node in held]
    )
    return Lowered(
        forward=fx.GraphModule(module, first),
        backward=fx.GraphModule(
            module,
            _backward(graph, wanted, forward, [*kept, *held, *placeholders[num_arguments:]], results[num_outputs:]),
        ),
        num_outputs=num_outputs,
        kept_arguments=tuple(arguments[node] for node in kept),
    )


def _backward(
    graph: fx.Graph, wanted: set[fx.Node], forward: set[fx.Node], inputs: Sequence[fx.Node], gradients: Sequence[Any]
) -> fx.Graph:
    second = fx.Graph()
    second.set_codegen(_BoxedCodeGen())
    copies = {node: second.placeholder(node.name) for node in inputs}

    def emit(wanted_node: fx.Node) -> None:
        stack = [wanted_node]
        while stack:
            node = stack[-1]
            missing = [source for source in node.all_input_nodes if source not in copies]
            if node in copies or not missing:
                stack.pop()
                if node not in copies:
                    copies[node] = second.node_copy(node, lambda old: copies[old])
            else:
                stack.extend(reversed(missing))

    for node in graph.nodes:
        if node in wanted and node not in forward:
            emit(node)
    for node in gradients:
        if isinstance(node, fx.Node):
            emit(node)
    second.output([copies[node] if isinstance(node, fx.Node) else node for node in gradients])
    return second


def _ancestors(nodes: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _is_recomputed(node: fx.Node, forward: set[fx.Node]) -> bool:
    """Whether the backward computes a forward node again rather than find it saved."""
    if node.op == "get_attr":
        return True
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _is_recomputed(node.args[0], forward)
    if _is_view(node):
        return True
    block, recompute = _mark(node)
    if not recompute:
        return False
    return block == GATHER or not _leaves(node, block, forward)


def _leaves(node: fx.Node, block: int, forward: set[fx.Node]) -> bool:
    """Whether another block reads a node, or a view of all of it: views hold no memory of their own."""
    for user in node.users:
        if user in forward and (_mark(user)[0] != block or (_views_all(user, node) and _leaves(user, block, forward))):
            return True
    return False


def _views_all(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user is a view that shows every element; a slice counts as a copy whether or not it is one."""
    sizes = [found.numel() for each in (user, node) if isinstance(found := each.meta.get("val"), Tensor)]
    return _is_view(user) and len(set(sizes)) == 1


def _mark(node: fx.Node) -> tuple[int, bool]:
    custom = node.meta.get("custom", {})
    return custom.get("block", -1), custom.get("recompute", False)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.returns:
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write
