"""Rewrites an exported graph in place into the form that is planned: aten calls only, no no-ops, no in-place ops.

Passes, each linear in the number of nodes: inline the submodules of ``no_grad`` and ``autocast`` regions, make in-place
ops functional, return the loss alone, merge tied placeholders, turn device copies into casts, drop ops that change
nothing, write out ``-1`` sizes, replace constant masks, remove dead ops.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from autopar.core.errors import ModelError
from autopar.graph.aliasing import COPY_OPS, MAY_ALIAS_OPS, RESHAPE_OPS, same_metadata
from autopar.graph.fold_masks import fold_masks
from autopar.graph.functionalize import functionalize_in_place_ops, mutated_input
from autopar.graph.ir import TracedBatch
from autopar.graph.source_location import location_of_node
from autopar.graph.torch_export import functionalized_by_torch

aten = torch.ops.aten
_WRAPPERS = {  # higher-order ops whose submodule may be inlined: position of the submodule among the arguments
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
    "tag_activation_checkpoint": 0,
    "wrap_activation_checkpoint": 0,
}
_NEUTRAL_ELEMENTS = {"aten.add.Tensor": 0, "aten.sub.Tensor": 0, "aten.mul.Tensor": 1, "aten.div.Tensor": 1}
_DROPOUTS = ("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")


def normalise(
    program: ExportedProgram, tied: Mapping[str, str], batch: TracedBatch
) -> tuple[ExportedProgram, fx.GraphModule]:
    """The normalised module (placeholders of parameters, buffers, constants and inputs; aten calls; the loss as output)
    and the exported program whose signature describes its placeholders.

    ``tied`` maps every path of a parameter or buffer to the first path of the same tensor, whose placeholder stands for
    all of them. Raises ModelError for a higher-order op that cannot be inlined."""
    module = program.graph_module
    inline_regions(module)
    signature = program.graph_signature
    if not functionalize_in_place_ops(
        module.graph, frozenset(signature.inputs_to_buffers), frozenset(signature.user_inputs)
    ):
        program = functionalized_by_torch(program)
        module = program.graph_module
        inline_regions(module)
    return_only_loss(program, module.graph)
    merge_tied_placeholders(program, module.graph, tied)
    device_moves_to_casts(module.graph)
    drop_identities(module.graph)
    resolve_sizes(module.graph)
    fold_masks(module.graph, batch)
    eliminate_dead_ops(module.graph, frozenset(program.graph_signature.inputs_to_lifted_tensor_constants))
    module.graph.lint()
    module.recompile()
    return program, module


def inline_regions(module: fx.GraphModule) -> None:
    """Replaces calls of wrapper ops by the nodes of their submodules; nodes of ``no_grad`` regions get
    meta["no_grad"]. Raises ModelError for any other higher-order op."""
    graph = module.graph
    for node in list(graph.nodes):
        # An op has a schema and a Python function like getitem has no `name`: all others are higher-order ops.
        if node.op != "call_function" or hasattr(node.target, "_schema") or not hasattr(node.target, "name"):
            continue
        name = str(node.target)
        position = _WRAPPERS.get(name)
        if position is None:
            raise ModelError(
                f"cannot plan the higher-order operation {name}{location_of_node(node, ' at ')}: "
                "replace it with ordinary tensor operations"
            )
        reference = node.args[position]
        submodule = getattr(module, str(reference.target))
        inline_regions(submodule)
        no_grad = name == "wrap_with_set_grad_enabled" and not node.args[0]
        _inline_call(graph, node, submodule, list(node.args[position + 1 :]), no_grad or bool(node.meta.get("no_grad")))
        graph.erase_node(node)
        if not reference.users:
            graph.erase_node(reference)


def _inline_call(graph: fx.Graph, call: fx.Node, submodule: fx.GraphModule, args: list[Any], no_grad: bool) -> None:
    """Copies the submodule's nodes to before ``call`` and replaces uses of the call by what the submodule returns."""
    copies: dict[fx.Node, Any] = {}
    inputs = iter(args)
    for node in submodule.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(inputs)
        elif node.op == "output":
            returned = fx.node.map_arg(node.args[0], lambda inner: copies[inner])
            single = not isinstance(returned, (tuple, list))
            for user in list(call.users):
                if single:
                    break
                assert user.target is operator.getitem
                user.replace_all_uses_with(returned[user.args[1]])
                graph.erase_node(user)
            if single:
                call.replace_all_uses_with(returned)
        else:
            with graph.inserting_before(call):
                copies[node] = graph.node_copy(node, lambda inner: copies[inner])
            if no_grad:
                copies[node].meta["no_grad"] = True


def merge_tied_placeholders(program: ExportedProgram, graph: fx.Graph, tied: Mapping[str, str]) -> None:
    """Replaces the placeholders of a tensor's other paths by that of its first path."""
    signature = program.graph_signature
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in paths:
            first_placeholder = first.setdefault(tied[paths[node.name]], node)
            if first_placeholder is not node:
                node.replace_all_uses_with(first_placeholder)
                graph.erase_node(node)


def device_moves_to_casts(graph: fx.Graph) -> None:
    """Turns copies to the (fake CPU) device into casts: the plan decides where a tensor is placed."""
    for node in graph.nodes:
        if str(node.target) == "aten.to.device":
            node.target = aten.to.dtype
            node.args = (node.args[0], node.args[2])
            node.kwargs = {}


def drop_identities(graph: fx.Graph) -> None:
    """Removes ops that return their input unchanged: same shape, strides and dtype."""
    grad = _may_carry_gradient(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source, target = node.args[0], str(node.target)
        if target in _DROPOUTS:
            identity = node.args[1] == 0.0 or not node.args[2]
        else:
            identity = target in MAY_ALIAS_OPS | COPY_OPS and same_metadata(
                node.meta.get("val"), source.meta.get("val")
            )
            identity = identity or _adds_zero_or_multiplies_by_one(node, source)
            # A detach stops the gradient: it changes nothing only where none flows.
            identity = identity and not (grad[source] and (target == "aten.detach.default" or node.meta.get("no_grad")))
        if identity:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _adds_zero_or_multiplies_by_one(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is ``x + 0``, ``x - 0``, ``x * 1`` or ``x / 1`` of the dtype of ``x``."""
    neutral = _NEUTRAL_ELEMENTS.get(str(node.target))
    plain = neutral is not None and len(node.args) == 2 and not node.kwargs
    return plain and node.args[1] == neutral and same_metadata(node.meta.get("val"), source.meta.get("val"))


def _may_carry_gradient(graph: fx.Graph) -> dict[fx.Node, bool]:
    """For every node whether its result may carry a gradient; True also for integers that depend on a parameter."""
    may_carry: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            may_carry[node] = isinstance(value, Tensor) and value.requires_grad
        else:
            stops = node.meta.get("no_grad") or str(node.target) == "aten.detach.default"
            may_carry[node] = not stops and any(may_carry[source] for source in node.all_input_nodes)
    return may_carry


def resolve_sizes(graph: fx.Graph) -> None:
    """Writes the size in place of ``-1`` in reshapes and of an open slice end, so that literals scale with the
    batch."""
    for node in graph.nodes:
        target = str(node.target)
        if target in RESHAPE_OPS:
            node.update_arg(1, list(node.meta["val"].shape))
        elif target == "aten.slice.Tensor" and len(node.args) > 3 and isinstance(node.args[3], int):
            dim = node.args[1]
            node.update_arg(3, min(node.args[3], node.args[0].meta["val"].shape[dim]))


def eliminate_dead_ops(graph: fx.Graph, constants: frozenset[str]) -> None:
    """Removes ops without users, except those that write a buffer, and placeholders of ``constants`` without users."""
    for node in reversed(list(graph.nodes)):
        droppable = node.op in ("call_function", "get_attr") or (node.op == "placeholder" and node.name in constants)
        if droppable and not node.users and mutated_input(node) is None:
            graph.erase_node(node)


def return_only_loss(program: ExportedProgram, graph: fx.Graph) -> None:
    """Makes the loss the only output; buffers that torch's functionalisation returns as well are written in place."""
    output = next(reversed(graph.nodes))
    signature = program.graph_signature
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    of_path = {path: placeholders[name] for name, path in signature.inputs_to_buffers.items()}
    losses = []
    for node, spec in zip(output.args[0], signature.output_specs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            losses.append(node)
        elif spec.kind is OutputKind.BUFFER_MUTATION and spec.target is not None:
            buffer = of_path[spec.target]
            with graph.inserting_before(output):
                write = graph.call_function(aten.copy_.default, (buffer, node))
            write.meta = {**node.meta, "val": buffer.meta["val"]}
    assert len(losses) == 1, signature.output_specs
    output.args = (losses[0],)
