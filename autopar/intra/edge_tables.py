"""The placements at both ends of a block's tensor edges, and what every pair of them costs.

On the data axis the placements are given (`data_axis`); on the inner axes they follow from the choices of the two nodes:
a strategy of an op, the placement of a shared value, or a boundary placement of the block.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.core.placement import REPLICATE
from autopar.cost.execution_model import ExecutionModel
from autopar.intra.block_mesh import BlockMesh
from autopar.intra.block_space import FIRST_OP_NODE, INPUT_NODE, OUTPUT_NODE, BlockSpace, TensorEdge
from autopar.rules.axis_options import AxisOption
from autopar.rules.dim_factors import without_size
from autopar.rules.placement_pair import PlacementPair

Floats = NDArray[np.float64]


class EdgeTable(NamedTuple):
    """Seconds to redistribute from node ``source`` to node ``target``, forward and backward, each (choices of source,
    choices of target); inf forbids a pair."""

    source: int
    target: int
    forward_s: Floats
    backward_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EdgeEnd:
    """The placements of an edge's value at one end: a pair per inner axis for each choice of the node there, and
    ``data``, the pair on the data axis. In the last ``num_regathered`` choices, those of a shared node, the consumers
    save the value as it is there and regather it in the backward."""

    placements: Sequence[tuple[PlacementPair, ...]]
    data: PlacementPair
    num_regathered: int = 0


def edge_ends(
    space: BlockSpace,
    strategies: Sequence[tuple[tuple[AxisOption, ...], ...]],
    shared_placements: Sequence[tuple[tuple[tuple[PlacementPair, ...], ...], int]],
    boundary_pairs: Mapping[int, Sequence[tuple[PlacementPair, ...]]],
) -> list[tuple[EdgeEnd, EdgeEnd]]:
    """The ends of every tensor edge, source and target. ``shared_placements`` gives each shared node's placements and
    how many of the last are regathered ones; ``boundary_pairs`` maps a block input or output (value id) to its placements.
    """

    def end(edge: TensorEdge, *, is_source: bool) -> EdgeEnd:
        node, position = (edge.source, edge.output_index) if is_source else (edge.target, edge.input_index)
        data = _data_pair(space, edge, is_source=is_source)
        if node in (INPUT_NODE, OUTPUT_NODE):
            return EdgeEnd(placements=boundary_pairs[edge.value], data=data)
        if node >= space.first_shared_node:
            placements, num_regathered = shared_placements[node - space.first_shared_node]
            return EdgeEnd(placements=placements, data=data, num_regathered=num_regathered)
        assert position is not None
        return EdgeEnd(
            placements=[
                tuple((option.outputs if is_source else option.inputs)[position] for option in options)
                for options in strategies[node - FIRST_OP_NODE]
            ],
            data=data,
        )

    return [(end(edge, is_source=True), end(edge, is_source=False)) for edge in space.tensor_edges]


def _data_pair(space: BlockSpace, edge: TensorEdge, *, is_source: bool) -> PlacementPair:
    """The data axis's pair of a value at one end of an edge."""
    node, position = (edge.source, edge.output_index) if is_source else (edge.target, edge.input_index)
    if node in (INPUT_NODE, OUTPUT_NODE):
        return space.data_axis.boundary_pairs[edge.value]
    if node >= space.first_shared_node:
        return space.data_axis.shared_pairs[node - space.first_shared_node]
    assert position is not None
    option = space.data_axis.op_options[node - FIRST_OP_NODE]
    return (option.outputs if is_source else option.inputs)[position]


def synchronisation_s(
    ends: Sequence[tuple[EdgeEnd, EdgeEnd]], mesh: BlockMesh, execution: ExecutionModel
) -> tuple[tuple[float, float], ...]:
    """Per tensor edge the seconds that ranks wait for the slowest host where its value is redistributed, forward and
    backward: all ranks of the mesh where the placement on the data axis changes, else those of the inner axes."""
    launch_s = execution.software.collective_calls * mesh.device.launch_s
    inner_ranks = math.prod(mesh.inner_sizes)

    def wait_s(*, spans_data_axis: bool) -> float:
        return launch_s * ((mesh.data_ranks if spans_data_axis else 1) * inner_ranks - 1)

    found = []
    for source, target in ends:
        forward, backward = (
            start != REPLICATE and without_size(start) != without_size(end)
            for start, end in (
                (source.data.forward, target.data.forward),
                (target.data.gradient, source.data.gradient),
            )
        )
        found.append((wait_s(spans_data_axis=forward), wait_s(spans_data_axis=backward)))
    return tuple(found)
