"""The intra-op choices of one block, without a mesh: its ops, their options, and the tensors between them.

Nodes of the choice problem, in order:

    0            input: the boundary placement of every activation that enters the block
    1            output: the boundary placement of every activation that leaves it
    2 ..         an op node per op that depends on a parameter, then a shared node per value with several consumers: the
                 placement in which they are offered it, so that a collective they share is charged once

Values that depend on no parameter (masks, positions, targets) are unconstrained: every rank has or computes what it
needs of them, in any placement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.graph.ir import Block, Graph, Op, Value
from autopar.intra.data_axis import DataAxis, RuledOp, choose_data_axis
from autopar.rules.axis_options import AxisOption, axis_options
from autopar.rules.dim_factors import DimFactorization
from autopar.rules.local_forms import can_run_sharded
from autopar.rules.op_sharding_rule import OpShardingRule
from autopar.rules.placement_pair import PARTIAL_GRADIENT, PARTIAL_VALUE, REPLICATED, PlacementPair
from autopar.rules.registry import sharding_rule

INPUT_NODE, OUTPUT_NODE, FIRST_OP_NODE = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class OpNode:
    """An op with its sharding rule and its options on one axis. ``parameter_inputs`` are the positions of inputs that
    are parameters or buffers, ``unconstrained_inputs`` those that every rank has in any placement: these, and inputs
    that depend on no parameter."""

    index: int
    op: Op
    rule: OpShardingRule
    options: tuple[AxisOption, ...]
    parameter_inputs: tuple[int, ...]
    unconstrained_inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedNode:
    """The placement in which a value (id) with several consumers is offered to them; ``pairs`` are those that it may
    have on one axis."""

    index: int
    value: int
    pairs: tuple[PlacementPair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEdge:
    """A value (id) that node ``source`` makes and node ``target`` consumes: output ``output_index`` of the one op and
    input ``input_index`` of the other, None at a shared node or at the boundary of the block."""

    value: int
    source: int
    target: int
    output_index: int | None
    input_index: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockSpace:
    """The choice problem's structure (module docstring). ``parameter_free_ops`` touch only values that depend on no
    parameter and are not chosen for; ``pairs`` maps a value (id) to the placement pairs that it may have on one axis;
    ``data_axis`` says how each op is sharded on the data axis."""

    graph: Graph
    block: Block
    ops: tuple[OpNode, ...]
    shared_nodes: tuple[SharedNode, ...]
    tensor_edges: tuple[TensorEdge, ...]
    parameter_free_ops: tuple[Op, ...]
    pairs: dict[int, tuple[PlacementPair, ...]]
    data_axis: DataAxis

    @property
    def first_shared_node(self) -> int:
        """The node number of the first shared node, one above that of the last op."""
        return FIRST_OP_NODE + len(self.ops)

    def shared_consumers(self) -> dict[int, list[TensorEdge]]:
        """Shared node -> the edges to its consumers."""
        found: dict[int, list[TensorEdge]] = {}
        for edge in self.tensor_edges:
            if edge.source >= self.first_shared_node:
                found.setdefault(edge.source, []).append(edge)
        return found

    def op_node(self, node: int) -> OpNode | None:
        """The op at a node number, None for a shared node and the boundary."""
        return self.ops[node - FIRST_OP_NODE] if FIRST_OP_NODE <= node < self.first_shared_node else None


def build_block_space(graph: Graph, block: Block, parameter_free: frozenset[int]) -> BlockSpace:
    """The space of a block; ``parameter_free`` are the values (ids) that depend on no parameter."""
    all_ops = graph.ops[block.first_op : block.end_op]
    ops = [op for op in all_ops if not parameter_free.issuperset((*op.inputs, *op.outputs))]
    calls = [(sharding_rule(op, graph.values), op.inputs, op.outputs) for op in ops]
    shapes = {value: graph.values[value].shape for op in ops for value in (*op.inputs, *op.outputs)}
    factors = DimFactorization(shapes, calls)
    nodes = []
    for at, (op, (rule, inputs, outputs)) in enumerate(zip(ops, calls, strict=True)):
        values = [graph.values[value] for value in inputs]
        options = axis_options(op, rule, factors, at, values, [graph.values[value] for value in outputs])
        nodes.append(
            OpNode(
                index=FIRST_OP_NODE + at,
                op=op,
                rule=rule,
                options=tuple(option for option in options if can_run_sharded(op, rule, option.labels)),
                parameter_inputs=tuple(i for i, value in enumerate(values) if value.kind in ("parameter", "buffer")),
                unconstrained_inputs=tuple(
                    i for i, value in enumerate(values) if value.id in parameter_free or value.kind != "activation"
                ),
            )
        )
    pairs = _pairs(nodes, graph.values)
    shared, edges = _connect_nodes(nodes, block, pairs)
    data_axis = choose_data_axis(
        graph,
        block,
        [
            RuledOp(
                rule=node.rule,
                options=node.options,
                inputs=tuple(graph.values[value] for value in node.op.inputs),
                outputs=tuple(graph.values[value] for value in node.op.outputs),
            )
            for node in nodes
        ],
        [node.value for node in shared],
        [(edge.value, edge.source, edge.target, edge.output_index, edge.input_index) for edge in edges],
    )
    return BlockSpace(
        graph=graph,
        block=block,
        ops=tuple(nodes),
        shared_nodes=tuple(shared),
        tensor_edges=tuple(edges),
        parameter_free_ops=tuple(op for op in all_ops if parameter_free.issuperset((*op.inputs, *op.outputs))),
        pairs=pairs,
        data_axis=data_axis,
    )


def _pairs(nodes: Sequence[OpNode], values: Sequence[Value]) -> dict[int, tuple[PlacementPair, ...]]:
    """Value (id) -> the pairs that it may have on one axis: those of the options, and the unsharded ones."""
    found: dict[int, dict[PlacementPair, None]] = {}
    for node in nodes:
        for option in node.options:
            for value, pair in zip((*node.op.inputs, *node.op.outputs), (*option.inputs, *option.outputs), strict=True):
                partial = (PARTIAL_GRADIENT, PARTIAL_VALUE) if values[value].requires_grad else (PARTIAL_VALUE,)
                found.setdefault(value, dict.fromkeys((REPLICATED, *partial)))[pair] = None
    return {value: tuple(pairs) for value, pairs in found.items()}


def _connect_nodes(
    nodes: Sequence[OpNode], block: Block, pairs: dict[int, tuple[PlacementPair, ...]]
) -> tuple[list[SharedNode], list[TensorEdge]]:
    """The shared nodes, and the edges between all nodes. Values that no option places are left out."""
    sources: dict[int, tuple[int, int | None]] = dict.fromkeys(block.inputs, (INPUT_NODE, None))
    consumers: dict[int, list[tuple[int, int | None]]] = {}
    for node in nodes:
        for at, value in enumerate(node.op.inputs):
            if at not in node.unconstrained_inputs:
                consumers.setdefault(value, []).append((node.index, at))
        for number, value in enumerate(node.op.outputs):
            sources[value] = (node.index, number)
    for value in block.outputs:
        consumers.setdefault(value, []).append((OUTPUT_NODE, None))
    shared: list[SharedNode] = []
    edges: list[TensorEdge] = []
    for value, targets in consumers.items():
        if value not in sources or value not in pairs:
            continue
        source, output = sources[value]
        if len(targets) > 1:
            node_number = FIRST_OP_NODE + len(nodes) + len(shared)
            shared.append(SharedNode(index=node_number, value=value, pairs=pairs[value]))
            edges.append(
                TensorEdge(value=value, source=source, target=node_number, output_index=output, input_index=None)
            )
            source, output = node_number, None
        for target, position in targets:
            edges.append(
                TensorEdge(value=value, source=source, target=target, output_index=output, input_index=position)
            )
    return shared, edges
