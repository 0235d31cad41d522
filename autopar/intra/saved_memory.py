"""The memory that a solved block keeps for its backward pass, counted copy by copy.

Elimination prices what is kept op by op: the first op that keeps a tensor is charged for it, in the placement it reads,
which is never more than what is kept. It is less where a tensor is kept in two placements (a gathered and a sharded
copy), so what solutions really keep is counted here: a *copy* is a result (views share the memory of what they view) or
what a redistribution left.
"""

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from autopar.core.local_shape import local_size
from autopar.core.placement import REPLICATE, Placement, Placements, Shard
from autopar.graph.ir import GraphProfile
from autopar.intra.block_space import INPUT_NODE, BlockSpace
from autopar.rules.axis_options import AxisOption
from autopar.rules.dim_factors import without_size
from autopar.rules.placement_pair import PlacementPair, forward_placements

Floats = NDArray[np.float64]
MeshPlacement = tuple[Placement, Placements]
"""Where a value is: on the data axis, and on the inner axes."""


class LocalBytes:
    """Bytes of a graph's values on the rank that stores most: ``data`` ranks shard the batch (or replicate it), inner
    axes of ``sizes`` the rest. ``local_batch`` are the samples of a data rank."""

    def __init__(self, space: BlockSpace, inner_sizes: tuple[int, ...], local_batch: int, data_ranks: int = 1) -> None:
        self.graph, self.data_ranks = space.graph, data_ranks
        self.local_batch, self.micro_batch = local_batch, local_batch * data_ranks
        self.sizes = inner_sizes
        self._cache: dict[tuple[int, Placement, Placements], float] = {}

    def data_rank_shape(self, value: int, data_placement: Placement) -> tuple[int, ...]:
        """The shape on a data rank, unsharded on the inner axes."""
        batch = self.graph.batch
        return tuple(
            batch.scale(size, self.local_batch if dim == data_placement.shard_dim else self.micro_batch)
            for dim, size in enumerate(self.graph.values[value].shape)
        )

    def num_bytes(self, value: int, placements: Placements, data_placement: Placement) -> float:
        """Bytes of a value with these placements on the inner axes, at the traced batch, and on the data axis."""
        key = (value, data_placement, placements)
        if key not in self._cache:
            local = [self._on_data_rank(placement, data_placement) for placement in placements]
            elements = local_size(self.data_rank_shape(value, data_placement), local, self.sizes)
            self._cache[key] = float(elements * self.graph.values[value].itemsize)
        return self._cache[key]

    def owner_bytes(self, owner: int, value: int, placements: Placements, data_placement: Placement) -> float:
        """Bytes of a memory of which a reader sees ``value`` placed so: as much of the whole as of the value; of a
        memory smaller than the value (it was expanded) what the reader sees, at most all."""
        memory, whole, part = (
            self._full_bytes(owner),
            self._full_bytes(value),
            self.num_bytes(value, placements, data_placement),
        )
        if whole > memory:
            return min(memory, part)
        return memory * part / whole if whole else memory

    def _full_bytes(self, value: int) -> float:
        found = self.graph.values[value]
        sizes = (self.graph.batch.scale(size, self.micro_batch) for size in found.shape)
        return float(prod(sizes) * found.itemsize)

    def _on_data_rank(self, placement: Placement, data: Placement) -> Placement:
        """An inner axis's placement of what is on a data rank: of a shard whose pieces are samples, those of the
        micro-batch, or as many as the rank stores."""
        batch = self.graph.batch
        if not isinstance(placement, Shard) or not batch.is_proportional(placement.split_factor):
            return placement
        samples = self.local_batch if data.shard_dim == placement.dim else self.micro_batch
        return Shard(placement.dim, max(1, placement.split_factor * samples // batch.traced_size))


class SavedMemoryCounter:
    """Counts the kept bytes of solutions of one block's tables."""

    def __init__(
        self,
        space: BlockSpace,
        profile: GraphProfile,
        first_saver: Mapping[int, int],
        attention_ops: frozenset[int],
        strategies: Sequence[Sequence[tuple[AxisOption, ...]]],
        boundary_pairs: Mapping[int, Sequence[tuple[PlacementPair, ...]]],
        local_bytes: LocalBytes,
        regather_consumers: Mapping[int, tuple[int, ...]],
        saves_attention_output: bool = False,
        selective_saved_owners: frozenset[int] | None = None,
    ) -> None:
        """``first_keeper``: value whose memory is kept -> the first op of the graph that keeps it; ``core``:
        attentions; ``regathering``: flow (position) -> the nodes that keep what it gathers as it was cut, where it is
        gathered again; ``keeps_attention``: attention's result stays, too, where attention is computed again but others
        keep it. ``stays``: values whose memory selective recomputation keeps; None: all but what attention makes."""
        self._selective_saved_owners, self.saves_attention_output = selective_saved_owners, saves_attention_output
        self._edges_by_input, self._regather_consumers = edges_by_input(space), regather_consumers
        self._data_placements = [
            forward_placements((*option.inputs, *option.outputs)) for option in space.data_axis.op_options
        ]
        self.space, self.profile, self.first_saver = space, profile, first_saver
        self._attention_ops = attention_ops
        self._attention_outputs = {v for node in space.ops if node.op.id in attention_ops for v in node.op.outputs}
        self._unconstrained_owners = {
            profile.storage_owner[node.op.inputs[i]] for node in space.ops for i in node.unconstrained_inputs
        }
        self.strategies, self.boundary_pairs, self.local_bytes = strategies, boundary_pairs, local_bytes
        graph = space.graph
        self._cache: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, float]] = {}
        self._saved_positions = []
        for node in space.ops:
            tensors = (*node.op.inputs, *node.op.outputs)
            kept = profile.ops[node.op.id]
            positions = (*kept.saved_inputs, *(len(node.op.inputs) + at for at in kept.saved_outputs))
            self._saved_positions.append(
                tuple(
                    at
                    for at in positions
                    if graph.values[profile.storage_owner[tensors[at]]].kind not in ("parameter", "buffer")
                )
            )

    def saved_and_freed_bytes(
        self, choices: NDArray[np.integer], regathered: Mapping[int, NDArray[np.bool_]]
    ) -> Floats:
        """(solutions, 2) bytes that selective recomputation keeps and those it frees; ``choices`` is (nodes,
        solutions). ``again`` says by flow (position) in which solutions (solutions,) readers keep what it gathers as it
        was cut."""
        counted = []
        edges = [[edge for edge, flags in regathered.items() if flags[at]] for at in range(choices.shape[1])]
        for node_choices, regathered_edges in zip(choices.T.tolist(), edges, strict=True):
            key = (tuple(node_choices), tuple(regathered_edges))
            if key not in self._cache:
                self._cache[key] = self._count_bytes(*key)
            counted.append(self._cache[key])
        return np.array(counted).reshape(-1, 2)

    def _count_bytes(self, node_choices: Sequence[int], regathered_edges: Sequence[int]) -> tuple[float, float]:
        owners, placed = self.profile.storage_owner, self._placed(node_choices)
        memory: dict[int, tuple[int, MeshPlacement | None]] = {}  # of a value as made: (owner, None) or of a moved copy
        bytes_of: dict[tuple[int, MeshPlacement | None], float] = {}
        outside: set[tuple[int, MeshPlacement | None]] = set()
        for at, node in enumerate(self.space.ops):
            op, options = node.op, self.strategies[at][node_choices[node.index]]
            read: dict[int, tuple[int, MeshPlacement | None]] = {}
            for i, value in enumerate(op.inputs):
                wanted = self._input_placement(at, i, node_choices)
                moved = (
                    i not in node.unconstrained_inputs
                    and value in placed
                    and not self._is_same_placement(placed[value], wanted)
                )
                if moved and self._is_saved_sharded(at, i, placed[value], wanted, regathered_edges):
                    moved = False
                read[value] = (value, wanted) if moved else memory.get(value, (owners[value], None))
            made = {}
            for value in op.outputs:
                viewed = [v for v in op.inputs if owners[value] != value and owners[v] == owners[value]]
                memory[value] = made[value] = read[viewed[0]] if viewed else (value, None)
            tensors = (*op.inputs, *op.outputs)
            for position in self._saved_positions[at]:
                value = tensors[position]
                copy = read[value] if position < len(op.inputs) else made[value]
                if self.saves_attention_output and node.op.id not in self._attention_ops:
                    outside.add(copy)
                if copy not in bytes_of:
                    bytes_of[copy] = self._copy_bytes(copy, node.op.id, at, position, value, options, placed)
        if self._selective_saved_owners is not None:
            freed = sum(
                held
                for copy, held in bytes_of.items()
                if copy[1] is not None or copy[0] not in self._selective_saved_owners
            )
            return sum(bytes_of.values()) - freed, freed
        made_by_core = {copy for copy in bytes_of if copy[1] is None and copy[0] in self._attention_outputs}
        inside = sum(bytes_of[copy] for copy in made_by_core - outside)
        return sum(bytes_of.values()) - inside, inside

    def saved_sharded_inputs(
        self, node_choices: Sequence[int], regathered_edges: Sequence[int]
    ) -> dict[int, tuple[int, ...]]:
        """Ops -> input positions that a solution (``column``: a choice per node) keeps as cut and gathers again, with
        the flows (positions) ``again``. What an op takes cut in another way, though what brings it gathers it first, is
        kept as it is taken: it is no larger."""
        placed, found = self._placed(node_choices), dict[int, tuple[int, ...]]()
        for at, position in self._edges_by_input:
            op = self.space.ops[at].op
            wanted, made = self._input_placement(at, position, node_choices), placed[op.inputs[position]]
            kept = position in self.profile.ops[op.id].saved_inputs and not self._is_same_placement(made, wanted)
            if kept and self._is_saved_sharded(at, position, made, wanted, regathered_edges):
                found[op.id] = (*found.get(op.id, ()), position)
        return found

    def _placed(self, column: Sequence[int]) -> dict[int, MeshPlacement]:
        """How every value of the block is made."""
        ends = self.space.data_axis.boundary_pairs
        placed: dict[int, MeshPlacement] = {
            value: (ends[value].forward, forward_placements(states[column[INPUT_NODE]]))
            for value, states in self.boundary_pairs.items()
        }
        for at, node in enumerate(self.space.ops):
            options, data = self.strategies[at][column[node.index]], self._data_placements[at]
            for i, value in enumerate(node.op.outputs):
                placements = forward_placements(option.outputs[i] for option in options)
                placed[value] = (data[len(node.op.inputs) + i], placements)
        return placed

    def _input_placement(self, op_index: int, position: int, node_choices: Sequence[int]) -> MeshPlacement:
        """How an op takes an input."""
        options = self.strategies[op_index][node_choices[2 + op_index]]
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
        """Whether what an op takes in another placement than it was made stays as it was made."""
        flows = (flow for flow in self._edges_by_input[op_index, position] if flow in regathered_edges)
        is_regathered = any(2 + op_index in self._regather_consumers[flow] for flow in flows)
        return is_regathered and _is_same(source[0], target[0]) and is_gathered(source[1], target[1])

    def _is_same_placement(self, source: MeshPlacement, target: MeshPlacement) -> bool:
        """Whether nothing moves: on a data axis of one rank nothing ever does."""
        return source[1] == target[1] and (
            self.local_bytes.micro_batch == self.local_bytes.local_batch or _is_same(source[0], target[0])
        )

    def _copy_bytes(
        self,
        copy: tuple[int, MeshPlacement | None],
        op: int,
        op_index: int,
        position: int,
        value: int,
        options: tuple[AxisOption, ...],
        placed: Mapping[int, MeshPlacement],
    ) -> float:
        owner, moved = copy
        if moved is not None:
            return self.local_bytes.num_bytes(owner, moved[1], moved[0])
        first_op = self.space.block.first_op
        if self.first_saver.get(owner, op) < first_op:
            return 0.0  # charged to the block that keeps it first
        if owner in placed and owner not in self._unconstrained_owners:
            return self.local_bytes.num_bytes(owner, placed[owner][1], placed[owner][0])
        placements = forward_placements((*option.inputs, *option.outputs)[position] for option in options)
        return self.local_bytes.owner_bytes(owner, value, placements, self._data_placements[op_index][position])


def edges_by_input(space: BlockSpace) -> dict[tuple[int, int], tuple[int, ...]]:
    """(op, input position) -> the flows (positions) by which it comes: one, or one to a hub and one from there."""
    to_hub = {flow.target: at for at, flow in enumerate(space.tensor_edges)}
    first_hub = 2 + len(space.ops)
    return {
        (flow.target - 2, flow.input_index): (to_hub[flow.source], at) if flow.source >= first_hub else (at,)
        for at, flow in enumerate(space.tensor_edges)
        if flow.input_index is not None
    }


def is_gathered(made: Placements, read: Placements) -> bool:
    """Whether a value is read as it was made but for axes that no longer shard it."""
    return all(
        one == other or (isinstance(one, Shard) and other == REPLICATE) for one, other in zip(made, read, strict=True)
    )


def _is_same(one: Placement, other: Placement) -> bool:
    return one == other or without_size(one) == without_size(other)
