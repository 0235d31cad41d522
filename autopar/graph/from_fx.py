"""Turns a normalised torch.fx graph into our ``Graph``: numbered values and ops, literals without torch objects.

Values are numbered placeholders first, in the fx graph's order (``values[i]`` is its i-th placeholder), then the
results of ops in execution order. A multi-output op lists all of its tensors; result i of op ``split`` is the value
``split.i``.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from autopar.core.dtypes import ITEMSIZE
from autopar.core.errors import ModelError
from autopar.graph.fingerprint import fingerprint
from autopar.graph.gradient_flow import results_with_gradient
from autopar.graph.ir import Graph, InputRef, Op, TracedBatch, Value, ValueKind
from autopar.graph.source_location import location_of_node, module_path_of
from autopar.graph.torch_export import MODEL_PREFIX

_VALUE_KINDS: dict[InputKind, ValueKind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}


def graph_from_fx(
    module: fx.GraphModule,
    program: ExportedProgram,
    all_names: Mapping[str, tuple[str, ...]],
    batch: TracedBatch,
    loss_source: str,
) -> Graph:
    """The graph of a normalised module; ``names`` maps a parameter's or buffer's path to all of its paths,
    ``loss_source`` is the place of ``loss_fn``, whose own lines torch does not record.

    Raises ModelError for a result whose size depends on the data."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    values: list[Value] = []
    ops: list[Op] = []
    ids: dict[tuple[fx.Node, int], int] = {}
    grad = results_with_gradient(module.graph)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            tensor = node.meta.get("val")
            spec = specs[node.name]
            if not isinstance(tensor, Tensor):
                continue
            path = (spec.target or node.name).removeprefix(MODEL_PREFIX + ".")
            kind = _VALUE_KINDS[spec.kind]
            qualified_names = all_names[path] if kind in ("parameter", "buffer") else ()
            name = qualified_names[0] if qualified_names else path
            ids[node, 0] = len(values)
            values.append(_value(len(values), name, kind, tensor, (node, 0) in grad, node, qualified_names))
        elif node.op == "call_function" and node.target is not operator.getitem:
            ops.append(_op(node, len(ops), values, ids, grad, loss_source))
    loss = next(reversed(module.graph.nodes)).args[0]
    return Graph(
        values=tuple(values),
        ops=tuple(ops),
        inputs=tuple(value.id for value in values if value.kind == "input"),
        outputs=(ids[_producer(loss)],),
        batch=batch,
        fingerprint=fingerprint(values, ops, batch),
    )


def _op(
    node: fx.Node,
    op_id: int,
    values: list[Value],
    ids: dict[tuple[fx.Node, int], int],
    grad: set[tuple[fx.Node, int]],
    loss_source: str,
) -> Op:
    """The op of a node; its results are appended to ``values`` and entered in ``ids``."""
    inputs: list[int] = []
    args = tuple(_to_literal(argument, inputs, ids) for argument in node.args)
    kwargs = tuple((key, _to_literal(argument, inputs, ids)) for key, argument in node.kwargs.items())
    outputs: list[int] = []
    result = node.meta.get("val")
    for index, tensor in output_tensors(result):
        name = node.name if isinstance(result, Tensor) else f"{node.name}.{index}"
        ids[node, index] = len(values)
        outputs.append(len(values))
        values.append(_value(len(values), name, "activation", tensor, (node, index) in grad, node))
    module = module_path_of(node, MODEL_PREFIX)
    return Op(
        id=op_id,
        name=node.name,
        target=str(node.target),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        args=args,
        kwargs=kwargs,
        module_path=module,
        source_location=location_of_node(node) or ("" if module else loss_source),
    )


def output_tensors(result: Any) -> Iterator[tuple[int, Tensor]]:
    """Position and tensor of every tensor that a call returns."""
    results = (result,) if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else ()
    for index, tensor in enumerate(results):
        if isinstance(tensor, Tensor):
            yield index, tensor


def _value(
    value_id: int,
    name: str,
    kind: ValueKind,
    tensor: Tensor,
    grad: bool,
    node: fx.Node,
    names: tuple[str, ...] = (),
) -> Value:
    if not all(type(size) is int for size in tensor.shape):
        raise ModelError(
            f"the size of the result of {node.target}{location_of_node(node, ' at ')} depends on the data: "
            f"{tuple(str(size) for size in tensor.shape)}\n  use a mask or torch.where of fixed size there"
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise ModelError(f"cannot plan tensors of dtype {dtype} ({node.target}{location_of_node(node, ' at ')})")
    return Value(
        id=value_id,
        name=name,
        kind=kind,
        shape=tuple(tensor.shape),
        dtype=dtype,
        requires_grad=grad,
        qualified_names=names,
    )


def _producer(node: fx.Node) -> tuple[fx.Node, int]:
    """The op and the position among its results that a node stands for: getitem nodes are folded away."""
    if node.op == "call_function" and node.target is operator.getitem:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return node, 0


def _to_literal(argument: Any, inputs: list[int], ids: dict[tuple[fx.Node, int], int]) -> Any:
    """An argument as plain data: tensors become ``Ref``s (their ids are appended to ``inputs``), lists tuples, torch's
    dtypes, devices, layouts and memory formats their names."""
    if isinstance(argument, fx.Node):
        inputs.append(ids[_producer(argument)])
        return InputRef(len(inputs) - 1)
    if isinstance(argument, (tuple, list)):
        return tuple(_to_literal(element, inputs, ids) for element in argument)
    if isinstance(argument, slice):
        return (argument.start, argument.stop, argument.step)
    if argument is None or isinstance(argument, (bool, int, float, complex, str)):
        return argument
    if isinstance(argument, (torch.dtype, torch.layout, torch.memory_format)):
        return str(argument).removeprefix("torch.")
    return str(argument)
