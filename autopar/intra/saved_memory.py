"""The memory that a solved block saves for its backward, counted copy by copy.

Elimination prices saved tensors op by op: the first op that saves a tensor is charged for it, in the placement in which
it reads it. That is never more than what is saved, and less where a tensor is saved in two placements (sharded and
gathered). So what a solution really saves is counted here. A *copy* is a tensor as its op made it (views share the memory
of what they view) or as a redistribution left it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.core.placement import REPLICATE, Placement, Placements, Shard
from autopar.intra.block_space import FIRST_OP_NODE, INPUT_NODE, BlockSpace, OpNode
from autopar.intra.local_bytes import LocalBytes
from autopar.intra.priced_model import PricedModel
from autopar.rules.axis_options import AxisOption
from autopar.rules.dim_factors import without_size
from autopar.rules.placement_pair import PlacementPair, forward_placements

Floats = NDArray[np.float64]
MeshPlacement = tuple[Placement, Placements]
"""A value's placement on the data axis, and its placements on the inner axes."""


class _Copy(NamedTuple):
    """A memory: that of value ``owner`` as made (``placement`` None), or what a redistribution to ``placement`` left."""

    owner: int
    placement: MeshPlacement | None


class _Reading(NamedTuple):
    """A tensor that an op saves: op number ``op_index`` of the block and its ``position`` among inputs, then outputs."""

    op: OpNode
    op_index: int
    position: int
    options: tuple[AxisOption, ...]


class SavedMemoryCounter:
    """Counts the saved bytes of solutions of one block's tables."""

    def __init__(
        self,
        space: BlockSpace,
        model: PricedModel,
        strategies: Sequence[Sequence[tuple[AxisOption, ...]]],
        boundary_pairs: Mapping[int, Sequence[tuple[PlacementPair, ...]]],
        local_bytes: LocalBytes,
        *,
        first_savers: Mapping[int, int],
        regather_consumers: Mapping[int, tuple[int, ...]],
        saves_attention_output: bool,
    ) -> None:
        """``first_savers``: storage owner (value id) -> the first op (id) of the graph that saves it;
        ``regather_consumers``: tensor edge (index) -> the consumers (nodes) that save its source placement where it is
        regathered; ``saves_attention_output``: the output of an attention that is recomputed stays saved where another
        op saves it."""
        self.space, self.profile, self.local_bytes = space, model.profile, local_bytes
        self.strategies, self.boundary_pairs = strategies, boundary_pairs
        self.saves_attention_output = saves_attention_output
        self._first_savers, self._regather_consumers = first_savers, regather_consumers
        self._selective_saved_owners = None if model.selective_saved is None else model.selective_saved.saved_owners
        self._edges_by_input = edges_by_input(space)
        self._data_placements = [
            forward_placements((*option.inputs, *option.outputs)) for option in space.data_axis.op_options
        ]
        owners = model.profile.storage_owner
        self._attention_outputs = {value for node in space.ops if node.op.is_attention for value in node.op.outputs}
        self._unconstrained_owners = {
            owners[node.op.inputs[position]] for node in space.ops for position in node.unconstrained_inputs
        }
        self._cache: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, float]] = {}
        self._saved_positions = [self._positions_of(node) for node in space.ops]

    def _positions_of(self, node: OpNode) -> tuple[int, ...]:
        """The positions (inputs, then outputs) of the activations that an op saves."""
        values, saved = (*node.op.inputs, *node.op.outputs), self.profile.ops[node.op.id]
        positions = (*saved.saved_inputs, *(len(node.op.inputs) + at for at in saved.saved_outputs))
        return tuple(
            position
            for position in positions
            if self.space.graph.values[self.profile.storage_owner[values[position]]].kind not in ("parameter", "buffer")
        )

    def saved_and_freed_bytes(
        self, choices: NDArray[np.integer], regathered: Mapping[int, NDArray[np.bool_]]
    ) -> Floats:
        """(solutions, 2) bytes that selective recomputation saves, and those that it frees. ``choices`` is (nodes,
        solutions); ``regathered`` maps a tensor edge (index) to (solutions,) whether consumers save its source
        placement and regather it."""
        counted = []
        edges = [[edge for edge, flags in regathered.items() if flags[at]] for at in range(choices.shape[1])]
        for node_choices, regathered_edges in zip(choices.T.tolist(), edges, strict=True):
            key = (tuple(node_choices), tuple(regathered_edges))
            if key not in self._cache:
                self._cache[key] = self._count_bytes(*key)
            counted.append(self._cache[key])
        return np.array(counted).reshape(-1, 2)

    def _count_bytes(self, node_choices: Sequence[int], regathered_edges: Sequence[int]) -> tuple[float, float]:
        """Bytes that one solution saves and frees under selective recomputation."""
        owners, placed = self.profile.storage_owner, self._placed(node_choices)
        copy_of: dict[int, _Copy] = {}  # of a value as made
        bytes_of: dict[_Copy, float] = {}
        saved_by_others: set[_Copy] = set()  # by other ops than attention
        for at, node in enumerate(self.space.ops):
            op, options = node.op, self.strategies[at][node_choices[node.index]]
            read: dict[int, _Copy] = {}
            for position, value in enumerate(op.inputs):
                target = self._input_placement(at, position, node_choices)
                redistributed = (
                    position not in node.unconstrained_inputs
                    and value in placed
                    and not self._is_same_placement(placed[value], target)
                    and not self._is_saved_sharded(at, position, placed[value], target, regathered_edges)
                )
                read[value] = _Copy(value, target) if redistributed else copy_of.get(value, _Copy(owners[value], None))
            for value in op.outputs:
                viewed = [v for v in op.inputs if owners[value] != value and owners[v] == owners[value]]
                copy_of[value] = read[viewed[0]] if viewed else _Copy(value, None)
            for position in self._saved_positions[at]:
                is_input = position < len(op.inputs)
                copy = read[op.inputs[position]] if is_input else copy_of[op.outputs[position - len(op.inputs)]]
                if self.saves_attention_output and not op.is_attention:
                    saved_by_others.add(copy)
                if copy not in bytes_of:
                    bytes_of[copy] = self._copy_bytes(copy, _Reading(node, at, position, options), placed)
        if self._selective_saved_owners is not None:
            freed = sum(
                size
                for copy, size in bytes_of.items()
                if copy.placement is not None or copy.owner not in self._selective_saved_owners
            )
            return sum(bytes_of.values()) - freed, freed
        of_attention = {copy for copy in bytes_of if copy.placement is None and copy.owner in self._attention_outputs}
        freed = sum(bytes_of[copy] for copy in of_attention - saved_by_others)
        return sum(bytes_of.values()) - freed, freed

    def saved_sharded_inputs(
        self, node_choices: Sequence[int], regathered_edges: Sequence[int]
    ) -> dict[int, tuple[int, ...]]:
        """Op id -> the input positions that a solution saves sharded and regathers; ``node_choices`` has a choice per
        node, ``regathered_edges`` are tensor edges (indices).

        An input that its op takes in another sharding than its producer's, although a shared node gathers it on the
        way, is saved as the op takes it: that is no larger.
        """
        placed, found = self._placed(node_choices), dict[int, tuple[int, ...]]()
        for at, position in self._edges_by_input:
            op = self.space.ops[at].op
            target, source = self._input_placement(at, position, node_choices), placed[op.inputs[position]]
            is_saved = position in self.profile.ops[op.id].saved_inputs
            if (
                is_saved
                and not self._is_same_placement(source, target)
                and self._is_saved_sharded(at, position, source, target, regathered_edges)
            ):
                found[op.id] = (*found.get(op.id, ()), position)
        return found

    def _placed(self, node_choices: Sequence[int]) -> dict[int, MeshPlacement]:
        """The placement in which every value of the block is made or enters it."""
        boundary = self.space.data_axis.boundary_pairs
        placed: dict[int, MeshPlacement] = {
            value: (boundary[value].forward, forward_placements(placements[node_choices[INPUT_NODE]]))
            for value, placements in self.boundary_pairs.items()
        }
        for at, node in enumerate(self.space.ops):
            options, data = self.strategies[at][node_choices[node.index]], self._data_placements[at]
            for number, value in enumerate(node.op.outputs):
                placements = forward_placements(option.outputs[number] for option in options)
                placed[value] = (data[len(node.op.inputs) + number], placements)
        return placed

    def _input_placement(self, op_index: int, position: int, node_choices: Sequence[int]) -> MeshPlacement:
        """The placement in which an op takes an input."""
        options = self.strategies[op_index][node_choices[FIRST_OP_NODE + op_index]]
        return self._data_placements[op_index][position], forward_placements(
            option.inputs[position] for option in options
        )

    def _is_saved_sharded(
        self,
        op_index: int,
        position: int,
        source: MeshPlacement,
        target: MeshPlacement,
        regathered_edges: Sequence[int],
    ) -> bool:
        """Whether an op saves an input in its source placement and regathers it to the target placement."""
        edges = (edge for edge in self._edges_by_input[op_index, position] if edge in regathered_edges)
        is_regathered = any(FIRST_OP_NODE + op_index in self._regather_consumers[edge] for edge in edges)
        return is_regathered and _is_same(source[0], target[0]) and is_gathered(source[1], target[1])

    def _is_same_placement(self, source: MeshPlacement, target: MeshPlacement) -> bool:
        """Whether nothing is redistributed; over a data axis of one rank nothing ever is."""
        return source[1] == target[1] and (
            self.local_bytes.micro_batch == self.local_bytes.local_batch or _is_same(source[0], target[0])
        )

    def _copy_bytes(self, copy: _Copy, reading: _Reading, placed: Mapping[int, MeshPlacement]) -> float:
        """Local bytes of a copy that ``reading`` saves first in this block; 0 where an earlier block saves it, which is
        charged for it."""
        owner, redistributed = copy
        if redistributed is not None:
            return self.local_bytes.num_bytes(owner, redistributed[1], redistributed[0])
        op, position = reading.op.op, reading.position
        if self._first_savers.get(owner, op.id) < self.space.block.first_op:
            return 0.0
        if owner in placed and owner not in self._unconstrained_owners:
            return self.local_bytes.num_bytes(owner, placed[owner][1], placed[owner][0])
        placements = forward_placements((*option.inputs, *option.outputs)[position] for option in reading.options)
        value, data = (*op.inputs, *op.outputs)[position], self._data_placements[reading.op_index][position]
        return self.local_bytes.owner_bytes(owner, value, placements, data)


def edges_by_input(space: BlockSpace) -> dict[tuple[int, int], tuple[int, ...]]:
    """(op index, input position) -> the tensor edges (indices) from its producer: one, or one to a shared node and one
    from there."""
    to_shared = {edge.target: at for at, edge in enumerate(space.tensor_edges)}
    return {
        (edge.target - FIRST_OP_NODE, edge.input_index): (
            (to_shared[edge.source], at) if edge.source >= space.first_shared_node else (at,)
        )
        for at, edge in enumerate(space.tensor_edges)
        if edge.input_index is not None
    }


def is_gathered(source: Placements, target: Placements) -> bool:
    """Whether ``target`` is ``source`` but for axes that no longer shard: Shard to Replicate, an all-gather."""
    return all(
        before == after or (isinstance(before, Shard) and after == REPLICATE)
        for before, after in zip(source, target, strict=True)
    )


def _is_same(one: Placement, other: Placement) -> bool:
    """Whether two placements are equal whatever the size of the factors that they shard."""
    return one == other or without_size(one) == without_size(other)
