"""Where the ops of a block read parameters and buffers, and what a rank stores of them under each strategy."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from autopar.graph.ir import Value
from autopar.intra.block_space import BlockSpace, OpNode
from autopar.intra.edge_tables import EdgeTable
from autopar.intra.local_bytes import LocalBytes
from autopar.rules.axis_options import AxisOption
from autopar.rules.placement_pair import PARTIAL_GRADIENT, REPLICATED


class LocalParameter(NamedTuple):
    """A parameter on the rank that stores most: its ``elements``, and the axes over which its gradient is partial (the
    data axis is 0, inner axes count from 1)."""

    elements: int
    gradient_axes: tuple[int, ...]


class ParameterUse(NamedTuple):
    """A parameter or buffer that an op reads, under each strategy of the op."""

    value: Value
    per_strategy: tuple[LocalParameter, ...]


class _RepeatedUse(NamedTuple):
    """Use ``number`` of op ``op`` (positions) of a parameter that the block has used before, in ``first_op``."""

    first_op: int
    first_number: int
    op: int
    number: int


def parameter_uses(
    space: BlockSpace, node: OpNode, strategies: Sequence[tuple[AxisOption, ...]], local_bytes: LocalBytes
) -> tuple[ParameterUse, ...]:
    """A use per parameter input of an op."""
    uses = []
    for position in node.parameter_inputs:
        value = space.graph.values[node.op.inputs[position]]
        is_partial = value.id in space.data_axis.partial_gradient_parameters
        data = PARTIAL_GRADIENT if is_partial else REPLICATED
        per_strategy = []
        for options in strategies:
            pairs = [option.inputs[position] for option in options]
            elements = round(local_bytes.pair_bytes(value.id, pairs, REPLICATED) / value.itemsize)
            axes = tuple(axis for axis, pair in enumerate((data, *pairs)) if pair == PARTIAL_GRADIENT)
            per_strategy.append(LocalParameter(elements, axes))
        uses.append(ParameterUse(value, tuple(per_strategy)))
    return tuple(uses)


def repeated_parameter_uses(space: BlockSpace) -> frozenset[tuple[int, int]]:
    """(op, number of its use) of every parameter that an earlier op or use of the block stores already."""
    return frozenset((use.op, use.number) for use in _repeated_uses(space))


def same_placement_edges(
    space: BlockSpace, strategies: Sequence[tuple[tuple[AxisOption, ...], ...]]
) -> tuple[EdgeTable, ...]:
    """Edges between ops that use the same parameter: 0 seconds where both take it in one placement, else inf."""
    edges = []
    for use in _repeated_uses(space):
        if use.first_op == use.op:
            continue
        first, second = (
            [
                tuple(option.inputs[space.ops[op].parameter_inputs[number]] for option in options)
                for options in strategies[op]
            ]
            for op, number in ((use.first_op, use.first_number), (use.op, use.number))
        )
        forbidden = np.array([[0.0 if one == other else np.inf for other in second] for one in first])
        if forbidden.any():
            nodes = (space.ops[use.first_op].index, space.ops[use.op].index)
            edges.append(EdgeTable(*nodes, forbidden, np.zeros_like(forbidden)))
    return tuple(edges)


def _repeated_uses(space: BlockSpace) -> Iterator[_RepeatedUse]:
    """Every use of a parameter but the first in the block."""
    first: dict[int, tuple[int, int]] = {}
    for op, node in enumerate(space.ops):
        for number, position in enumerate(node.parameter_inputs):
            value = node.op.inputs[position]
            if value in first:
                yield _RepeatedUse(*first[value], op, number)
            else:
                first[value] = (op, number)
