"""Lowers a stage: traces its forward and backward into one joint graph of local ops, and partitions it into two.

    joint(arguments, tangents) = stage.backward(stage.forward(arguments), tangents)

The forward graph is what the outputs need. The backward graph is what the gradients need, back to forward results that
are saved: all are, except views, results of recomputed blocks (whose inputs are saved), and gathered ZeRO-3 parameters.
``schedule_nodes`` orders the nodes of the two: a recomputed one runs right before its first reader, so that one block at a
time is recomputed. Both graphs have functional collectives with the names of process groups: each rank lowers its own.
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

from autopar.runtime.lower.fx_nodes import (
    SEND_PREPARATION,
    ZERO3_GATHER,
    ancestors_until,
    block_and_recompute,
    is_view,
    starts_collective,
)
from autopar.runtime.lower.schedule_nodes import GraphPass, TakeGradient, schedule_pass
from autopar.runtime.lower.stage_function import StageFunction, StageOutputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoweredStage:
    """The forward and backward graph of a stage on one rank. Both empty the list of arguments they are given, so that a
    tensor lives until its last reader has run. ``saved_arguments`` are the positions, among the forward's arguments, of
    those that the backward reads too; ``hands_over_gradients``: some parameter is trained."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_outputs: int
    saved_arguments: tuple[int, ...]
    hands_over_gradients: bool

    def run_forward(self, arguments: list[Tensor]) -> list[Tensor]:
        """``num_outputs`` outputs (see ``flatten_outputs``), then the tensors to save for the backward."""
        return list(self.forward.forward(arguments))

    def run_backward(self, arguments: list[Any], take_gradient: TakeGradient) -> list[Tensor]:
        """The gradients of received activations; those of parameters are handed to ``take_gradient`` as they are computed.
        ``arguments`` are the saved arguments, the saved tensors, and the tangents, in this order."""
        if self.hands_over_gradients:
            arguments.append(take_gradient)
        return list(self.backward.forward(arguments))


def lower_stage(
    stage: StageFunction, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device
) -> LoweredStage:
    """Lower ``stage`` for arguments of these local shapes and dtypes; no kernel and no collective runs."""
    num_arguments = len(shapes)

    def joint(*inputs: Tensor) -> list[Tensor]:
        leaves = stage.make_leaves(inputs[:num_arguments])
        outputs = stage.forward(leaves)
        gradients = stage.backward(leaves, outputs, inputs[num_arguments:])
        return [*flatten_outputs(outputs), *gradients]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        outputs = stage.forward(stage.make_leaves(arguments))
        tangents = [torch.empty_like(outputs.sent[at]) for at in stage.sent_requiring_grad]
        tangents += [torch.empty_like(outputs.loss)] if outputs.loss is not None else []
        num_outputs = len(flatten_outputs(outputs))
        with traceback.preserve_node_meta():
            graph = make_fx(joint)(*arguments, *tangents)
            if any(_is_mutating(node) for node in graph.graph.nodes):  # the partition follows results, not writes
                functional = functionalize(fx.Interpreter(graph).run, remove="mutations")
                graph = make_fx(functional)(*arguments, *tangents)
    del mode
    assert not any(_is_mutating(node) for node in graph.graph.nodes), "a node of the lowered graph writes in place"
    _remove_redundant_views(graph.graph)
    for number, node in enumerate(node for node in graph.graph.nodes if starts_collective(node)):
        node.meta["collective"] = number  # the same on all ranks
    graph.graph.eliminate_dead_code()
    return partition_joint_graph(graph, num_arguments, num_outputs, stage.num_parameters)


def _is_mutating(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def flatten_outputs(outputs: StageOutputs) -> list[Tensor]:
    """The outputs of ``StageFunction.forward`` as a list: sent activations, the loss if there is one, buffers."""
    return [*outputs.sent, *([outputs.loss] if outputs.loss is not None else []), *outputs.buffers]


def _remove_redundant_views(graph: fx.Graph) -> None:
    """Remove views that change nothing where no autograd runs: ``detach``, and a transpose of a transpose."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, fx.Node):
            continue
        if node.target is aten.detach.default:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif node.target is aten.t.default and source.target is aten.t.default:
            node.replace_all_uses_with(source.args[0])
            graph.erase_node(node)


def partition_joint_graph(
    module: fx.GraphModule, num_arguments: int, num_outputs: int, num_parameters: int
) -> LoweredStage:
    """Partition a joint graph. Its placeholders are ``num_arguments`` arguments, then the tangents; its results are
    ``num_outputs`` outputs of the forward, then gradients, the first ``num_parameters`` of parameters."""
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    results = list(next(reversed(graph.nodes)).args[0])
    forward = ancestors_until((node for node in results[:num_outputs] if isinstance(node, fx.Node)), ())
    arguments = {node: at for at, node in enumerate(placeholders[:num_arguments])}
    saved: dict[fx.Node, None] = {}
    backward: set[fx.Node] = set()
    stack = [node for node in results[num_outputs:] if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in backward or node in saved:
            continue
        if node.target is operator.getitem and node.args[0] in forward:
            forward.add(node)
        if node.op == "placeholder" or (node in forward and not _is_recomputed(node, forward)):
            saved[node] = None
            continue
        backward.add(node)
        stack.extend(node.all_input_nodes)
    order = {node: at for at, node in enumerate(graph.nodes)}
    saved_arguments = sorted((node for node in saved if node in arguments), key=order.__getitem__)
    saved_results = sorted((node for node in saved if node.op != "placeholder"), key=order.__getitem__)
    forward_pass = GraphPass(
        inputs=list(arguments),
        results=[*results[:num_outputs], *saved_results],
        gradients={},
        recomputable=(),
        is_backward=False,
    )
    gradients = results[num_outputs:]
    backward_pass = GraphPass(
        inputs=[*saved_arguments, *saved_results, *placeholders[num_arguments:]],
        results=gradients[num_parameters:],
        gradients=dict(enumerate(gradients[:num_parameters])),
        recomputable=forward,
        is_backward=True,
    )
    return LoweredStage(
        forward=_boxed_module(module, forward_pass),
        backward=_boxed_module(module, backward_pass),
        num_outputs=num_outputs,
        saved_arguments=tuple(arguments[node] for node in saved_arguments),
        hands_over_gradients=num_parameters > 0,
    )


def _boxed_module(module: fx.GraphModule, graph_pass: GraphPass) -> fx.GraphModule:
    """The module of one pass, called with a list of arguments that it empties."""
    graph = schedule_pass(module.graph, graph_pass)
    graph.set_codegen(_BoxedCodeGen())
    return fx.GraphModule(module, graph)


def _is_recomputed(node: fx.Node, forward: set[fx.Node]) -> bool:
    """Whether the backward recomputes a forward node rather than read its saved result."""
    if node.op == "get_attr":
        return True
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _is_recomputed(node.args[0], forward)
    if is_view(node):
        return True
    block, recompute = block_and_recompute(node)
    if not recompute:
        return False
    return block == ZERO3_GATHER or not _leaves_block(node, block, forward)


def _leaves_block(node: fx.Node, block: int, forward: set[fx.Node]) -> bool:
    """Whether another block of the stage reads a node or a full view of it, which has the same memory. Sending it to another
    stage does not count: nothing is saved for that."""
    for user in node.users:
        reader = block_and_recompute(user)[0]
        if user not in forward or reader == SEND_PREPARATION:
            continue
        if reader != block or (_is_full_view(user, node) and _leaves_block(user, block, forward)):
            return True
    return False


def _is_full_view(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user is a view of all elements; a slice counts as a tensor of its own, whether or not it is one."""
    sizes = [found.numel() for each in (user, node) if isinstance(found := each.meta.get("val"), Tensor)]
    return is_view(user) and len(set(sizes)) == 1
