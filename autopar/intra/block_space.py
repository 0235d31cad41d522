"""The intra-op choices of one block, without a mesh: its ops, their options, and how tensors connect them.

Nodes of the choice problem, in order:

    0            "in": how every activation that enters the block lies (a named boundary placement)
    1            "out": the same for those that leave
    2 ..         one per op that touches a value worth placing; a hub per value that several nodes read, so that a
                 gather or a gradient reduction they share is charged once

Values computed from inputs and constants alone, without gradient (masks, positions, targets), are at hand in any
placement.
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

INPUT_NODE, OUTPUT_NODE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OpNode:
    """An op and its options. ``parameters`` are positions of inputs that are parameters which receive a gradient or
    must be stored; ``free`` are positions of inputs that are at hand in any placement."""

    index: int
    op: Op
    rule: OpShardingRule
    options: tuple[AxisOption, ...]
    parameter_inputs: tuple[int, ...]
    unconstrained_inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedNode:
    """Where a value is for those of its readers that agree; ``pairs`` are what it may have on one axis."""

    index: int
    value: int
    pairs: tuple[PlacementPair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEdge:
    """A value on its way from node ``source`` to node ``target``; the positions say which output and which input of an
    op it is (None for hubs and boundaries)."""

    value: int
    source: int
    target: int
    output_index: int | None
    input_index: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockSpace:
    """See the module's docstring. ``data_ops`` touch only values that are at hand anywhere; ``pairs`` maps a value
    that flows to those that it may have on one axis; ``data_axis`` says what the data axis does to each op."""

    graph: Graph
    block: Block
    ops: tuple[OpNode, ...]
    shared_nodes: tuple[SharedNode, ...]
    tensor_edges: tuple[TensorEdge, ...]
    parameter_free_ops: tuple[Op, ...]
    pairs: dict[int, tuple[PlacementPair, ...]]
    data_axis: DataAxis

    @property
    def num_nodes(self) -> int:
        return 2 + len(self.ops) + len(self.shared_nodes)


def build_block_space(graph: Graph, block: Block, parameter_free: frozenset[int]) -> BlockSpace:
    """Build the space of a block; ``data`` are the graph's ``parameter_free`` values."""
    all_ops = graph.ops[block.first_op : block.end_op]
    ops = [op for op in all_ops if not parameter_free.issuperset((*op.inputs, *op.outputs))]
    calls = [(sharding_rule(op, graph.values), op.inputs, op.outputs) for op in ops]
    shapes = {value: graph.values[value].shape for op in ops for value in (*op.inputs, *op.outputs)}
    cuts = DimFactorization(shapes, calls)
    nodes = []
    for at, (op, (rule, inputs, outputs)) in enumerate(zip(ops, calls, strict=True)):
        values = [graph.values[value] for value in inputs]
        options = axis_options(op, rule, cuts, at, values, [graph.values[value] for value in outputs])
        nodes.append(
            OpNode(
                index=2 + at,
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
    hubs, flows = _connect_nodes(nodes, block, pairs)
    made = choose_data_axis(
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
        [hub.value for hub in hubs],
        [(flow.value, flow.source, flow.target, flow.output_index, flow.input_index) for flow in flows],
    )
    return BlockSpace(
        graph=graph,
        block=block,
        ops=tuple(nodes),
        shared_nodes=tuple(hubs),
        tensor_edges=tuple(flows),
        parameter_free_ops=tuple(op for op in all_ops if parameter_free.issuperset((*op.inputs, *op.outputs))),
        pairs=pairs,
        data_axis=made,
    )


def _pairs(nodes: Sequence[OpNode], values: Sequence[Value]) -> dict[int, tuple[PlacementPair, ...]]:
    """Value -> what it may have on one axis: some option's pair, and those that are always possible."""
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
    sources: dict[int, tuple[int, int | None]] = dict.fromkeys(block.inputs, (INPUT_NODE, None))
    readers: dict[int, list[tuple[int, int | None]]] = {}
    for node in nodes:
        for at, value in enumerate(node.op.inputs):
            if at not in node.unconstrained_inputs:
                readers.setdefault(value, []).append((node.index, at))
        for number, value in enumerate(node.op.outputs):
            sources[value] = (node.index, number)
    for value in block.outputs:
        readers.setdefault(value, []).append((OUTPUT_NODE, None))
    hubs: list[SharedNode] = []
    flows: list[TensorEdge] = []
    for value, found in readers.items():
        if value not in sources or value not in pairs:
            continue
        source, output = sources[value]
        if len(found) > 1:
            hub = SharedNode(index=2 + len(nodes) + len(hubs), value=value, pairs=pairs[value])
            hubs.append(hub)
            flows.append(
                TensorEdge(value=value, source=source, target=hub.index, output_index=output, input_index=None)
            )
            source, output = hub.index, None
        for target, position in found:
            flows.append(
                TensorEdge(value=value, source=source, target=target, output_index=output, input_index=position)
            )
    return hubs, flows
