"""Turns a normalised torch.fx graph into our ``Graph``: numbered values and ops, literals without torch objects.

Values are numbered placeholders first, in the fx graph's order (``values[i]`` is its i-th tensor placeholder), then
the results of ops in execution order. A multi-output op lists all of its tensors; result i of op ``split`` is the value
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
from autopar.graph.gradient_flow import NodeResult, results_with_gradient
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
    loss_location: str,
) -> Graph:
    """The graph of a normalised module.

    ``program`` is the exported program whose signature describes the module's placeholders; ``all_names`` maps the path
    of a parameter or buffer to all paths of the same tensor; ``loss_location`` is where ``loss_fn`` is defined, whose
    own lines torch does not record. Raises ModelError for a result whose size depends on the data or whose dtype has no
    known size."""
    builder = _GraphBuilder(module.graph, program, all_names, loss_location)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            builder.add_placeholder(node)
        elif node.op == "call_function" and node.target is not operator.getitem:
            builder.add_op(node)
    return builder.build(next(reversed(module.graph.nodes)).args[0], batch)


class _GraphBuilder:
    """Collects the values and ops of a graph, node by node in execution order."""

    def __init__(
        self,
        graph: fx.Graph,
        program: ExportedProgram,
        all_names: Mapping[str, tuple[str, ...]],
        loss_location: str,
    ) -> None:
        specs = program.graph_signature.input_specs
        self._specs = {spec.arg.name: spec for spec in specs if hasattr(spec.arg, "name")}
        self._all_names = all_names
        self._loss_location = loss_location
        self._with_gradient = results_with_gradient(graph)
        self._ids: dict[NodeResult, int] = {}
        self._values: list[Value] = []
        self._ops: list[Op] = []

    def add_placeholder(self, node: fx.Node) -> None:
        """Appends the value of a parameter, buffer, constant or input; placeholders that are no tensors have none."""
        tensor = node.meta.get("val")
        spec = self._specs[node.name]
        if not isinstance(tensor, Tensor):
            return
        path = (spec.target or node.name).removeprefix(MODEL_PREFIX + ".")
        kind = _VALUE_KINDS[spec.kind]
        names = self._all_names[path] if kind in ("parameter", "buffer") else ()
        self._add_value((node, 0), tensor, name=names[0] if names else path, kind=kind, qualified_names=names)

    def add_op(self, node: fx.Node) -> None:
        """Appends the op of a call and the values that it returns."""
        inputs: list[int] = []
        args = tuple(_to_literal(argument, inputs, self._ids) for argument in node.args)
        kwargs = tuple((key, _to_literal(argument, inputs, self._ids)) for key, argument in node.kwargs.items())
        outputs: list[int] = []
        result = node.meta.get("val")
        for index, tensor in output_tensors(result):
            name = node.name if isinstance(result, Tensor) else f"{node.name}.{index}"
            outputs.append(self._add_value((node, index), tensor, name=name, kind="activation"))
        module_path = module_path_of(node, MODEL_PREFIX)
        self._ops.append(
            Op(
                id=len(self._ops),
                name=node.name,
                target=str(node.target),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                args=args,
                kwargs=kwargs,
                module_path=module_path,
                source_location=location_of_node(node) or ("" if module_path else self._loss_location),
            )
        )

    def build(self, loss: fx.Node, batch: TracedBatch) -> Graph:
        """The graph of all nodes added, whose one output is ``loss``."""
        return Graph(
            values=tuple(self._values),
            ops=tuple(self._ops),
            inputs=tuple(value.id for value in self._values if value.kind == "input"),
            outputs=(self._ids[_producer(loss)],),
            batch=batch,
            fingerprint=fingerprint(self._values, self._ops, batch),
        )

    def _add_value(
        self,
        result: NodeResult,
        tensor: Tensor,
        *,
        name: str,
        kind: ValueKind,
        qualified_names: tuple[str, ...] = (),
    ) -> int:
        """Appends the value of one result of a node and returns its id."""
        node = result[0]
        if not all(type(size) is int for size in tensor.shape):
            raise ModelError(
                f"the size of the result of {node.target}{location_of_node(node, ' at ')} depends on the data: "
                f"{tuple(str(size) for size in tensor.shape)}\n  use a mask or torch.where of a fixed size there"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in ITEMSIZE:
            raise ModelError(f"cannot plan tensors of dtype {dtype} ({node.target}{location_of_node(node, ' at ')})")
        self._ids[result] = len(self._values)
        self._values.append(
            Value(
                id=len(self._values),
                name=name,
                kind=kind,
                shape=tuple(tensor.shape),
                dtype=dtype,
                requires_grad=result in self._with_gradient,
                qualified_names=qualified_names,
            )
        )
        return self._ids[result]


def output_tensors(result: Any) -> Iterator[tuple[int, Tensor]]:
    """(position, tensor) of every tensor that a call returns."""
    results = (result,) if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else ()
    for index, tensor in enumerate(results):
        if isinstance(tensor, Tensor):
            yield index, tensor


def _producer(node: fx.Node) -> NodeResult:
    """The call whose result a node is, and the position of that result: getitem nodes are folded away."""
    if node.op == "call_function" and node.target is operator.getitem:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return node, 0


def _to_literal(argument: Any, inputs: list[int], ids: Mapping[NodeResult, int]) -> Any:
    """An argument as plain data: a tensor becomes an ``InputRef`` (its id is appended to ``inputs``), a list a tuple,
    a dtype, device, layout or memory format of torch its name."""
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
