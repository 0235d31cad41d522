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
from autopar.intra.block_space import IN, BlockSpace
from autopar.rules.axis_options import Option
from autopar.rules.dim_factors import without_size
from autopar.rules.placement_pair import PlacementPair, forward_placements

Floats = NDArray[np.float64]
MeshPlacement = tuple[Placement, Placements]
"""Where a value is: on the data axis, and on the inner axes."""


class LocalSizes:
    """Bytes of a graph's values on the rank that stores most: ``data`` ranks shard the batch (or replicate it), inner
    axes of ``sizes`` the rest. ``local_batch`` are the samples of a data rank."""

    def __init__(self, space: BlockSpace, sizes: tuple[int, ...], local_batch: int, data: int = 1) -> None:
        self.graph, self.data = space.graph, data
        self.local_batch, self.micro_batch = local_batch, local_batch * data
        self.sizes = sizes
        self._known: dict[tuple[int, Placement, Placements], float] = {}

    def shape(self, value: int, data: Placement) -> tuple[int, ...]:
        """The shape on a data rank, unsharded on the inner axes."""
        batch = self.graph.batch
        return tuple(
            batch.scale(size, self.local_batch if dim == data.shard_dim else self.micro_batch)
            for dim, size in enumerate(self.graph.values[value].shape)
        )

    def num_bytes(self, value: int, placements: Placements, data: Placement) -> float:
        """Bytes of a value with these placements on the inner axes, at the traced batch, and on the data axis."""
        key = (value, data, placements)
        if key not in self._known:
            local = [self._on_data_rank(placement, data) for placement in placements]
            elements = local_size(self.shape(value, data), local, self.sizes)
            self._known[key] = float(elements * self.graph.values[value].itemsize)
        return self._known[key]

    def share(self, owner: int, value: int, placements: Placements, data: Placement) -> float:
        """Bytes of a memory of which a reader sees ``value`` placed so: as much of the whole as of the value; of a
        memory smaller than the value (it was expanded) what the reader sees, at most all."""
        memory, whole, part = self._whole(owner), self._whole(value), self.num_bytes(value, placements, data)
        if whole > memory:
            return min(memory, part)
        return memory * part / whole if whole else memory

    def _whole(self, value: int) -> float:
        found = self.graph.values[value]
        sizes = (self.graph.batch.scale(size, self.micro_batch) for size in found.shape)
        return float(prod(sizes) * found.itemsize)

    def _on_data_rank(self, placement: Placement, data: Placement) -> Placement:
        """An inner axis's placement of what is on a data rank: of a shard whose pieces are samples, those of the
        micro-batch, or as many as the rank stores."""
        batch = self.graph.batch
        if not isinstance(placement, Shard) or not batch.grows(placement.split_factor):
            return placement
        samples = self.local_batch if data.shard_dim == placement.dim else self.micro_batch
        return Shard(placement.dim, max(1, placement.split_factor * samples // batch.traced))


class CopyCounter:
    """Counts the kept bytes of solutions of one block's tables."""

    def __init__(
        self,
        space: BlockSpace,
        profile: GraphProfile,
        first_keeper: Mapping[int, int],
        core: frozenset[int],
        strategies: Sequence[Sequence[tuple[Option, ...]]],
        boundary_pairs: Mapping[int, Sequence[tuple[PlacementPair, ...]]],
        sizes: LocalSizes,
        regathering: Mapping[int, tuple[int, ...]],
        keeps_attention: bool = False,
        stays: frozenset[int] | None = None,
    ) -> None:
        """``first_keeper``: value whose memory is kept -> the first op of the graph that keeps it; ``core``:
        attentions; ``regathering``: flow (position) -> the nodes that keep what it gathers as it was cut, where it is
        gathered again; ``keeps_attention``: attention's result stays, too, where attention is computed again but others
        keep it. ``stays``: values whose memory selective recomputation keeps; None: all but what attention makes."""
        self._stays, self.keeps_attention = stays, keeps_attention
        self._ways, self._regathering = ways_of(space), regathering
        self._data = [forward_placements((*option.inputs, *option.outputs)) for option in space.data_axis.options]
        self.space, self.profile, self.first_keeper = space, profile, first_keeper
        self._core = core
        self._made_by_core = {v for node in space.ops if node.op.id in core for v in node.op.outputs}
        self._at_hand = {profile.owners[node.op.inputs[i]] for node in space.ops for i in node.free}
        self.strategies, self.boundary_pairs, self.sizes = strategies, boundary_pairs, sizes
        graph = space.graph
        self._counted: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, float]] = {}
        self._positions = []
        for node in space.ops:
            tensors = (*node.op.inputs, *node.op.outputs)
            kept = profile.ops[node.op.id]
            positions = (*kept.saved_inputs, *(len(node.op.inputs) + at for at in kept.saved_outputs))
            self._positions.append(
                tuple(
                    at
                    for at in positions
                    if graph.values[profile.owners[tensors[at]]].kind not in ("parameter", "buffer")
                )
            )

    def kept(self, choices: NDArray[np.integer], again: Mapping[int, NDArray[np.bool_]]) -> Floats:
        """(solutions, 2) bytes that selective recomputation keeps and those it frees; ``choices`` is (nodes,
        solutions). ``again`` says by flow (position) in which solutions (solutions,) readers keep what it gathers as it
        was cut."""
        counted = []
        regathered = [[flow for flow, flags in again.items() if flags[at]] for at in range(choices.shape[1])]
        for column, flows in zip(choices.T.tolist(), regathered, strict=True):
            key = (tuple(column), tuple(flows))
            if key not in self._counted:
                self._counted[key] = self._count(*key)
            counted.append(self._counted[key])
        return np.array(counted).reshape(-1, 2)

    def _count(self, column: Sequence[int], again: Sequence[int]) -> tuple[float, float]:
        owners, placed = self.profile.owners, self._placed(column)
        memory: dict[int, tuple[int, MeshPlacement | None]] = {}  # of a value as made: (owner, None) or of a moved copy
        bytes_of: dict[tuple[int, MeshPlacement | None], float] = {}
        outside: set[tuple[int, MeshPlacement | None]] = set()
        for at, node in enumerate(self.space.ops):
            op, options = node.op, self.strategies[at][column[node.node]]
            read: dict[int, tuple[int, MeshPlacement | None]] = {}
            for i, value in enumerate(op.inputs):
                wanted = self._read(at, i, column)
                moved = i not in node.free and value in placed and not self._same(placed[value], wanted)
                if moved and self._stays_cut(at, i, placed[value], wanted, again):
                    moved = False
                read[value] = (value, wanted) if moved else memory.get(value, (owners[value], None))
            made = {}
            for value in op.outputs:
                viewed = [v for v in op.inputs if owners[value] != value and owners[v] == owners[value]]
                memory[value] = made[value] = read[viewed[0]] if viewed else (value, None)
            tensors = (*op.inputs, *op.outputs)
            for position in self._positions[at]:
                value = tensors[position]
                copy = read[value] if position < len(op.inputs) else made[value]
                if self.keeps_attention and node.op.id not in self._core:
                    outside.add(copy)
                if copy not in bytes_of:
                    bytes_of[copy] = self._bytes(copy, node.op.id, at, position, value, options, placed)
        if self._stays is not None:
            freed = sum(held for copy, held in bytes_of.items() if copy[1] is not None or copy[0] not in self._stays)
            return sum(bytes_of.values()) - freed, freed
        made_by_core = {copy for copy in bytes_of if copy[1] is None and copy[0] in self._made_by_core}
        inside = sum(bytes_of[copy] for copy in made_by_core - outside)
        return sum(bytes_of.values()) - inside, inside

    def kept_as_cut(self, column: Sequence[int], again: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Ops -> input positions that a solution (``column``: a choice per node) keeps as cut and gathers again, with
        the flows (positions) ``again``. What an op takes cut in another way, though what brings it gathers it first, is
        kept as it is taken: it is no larger."""
        placed, found = self._placed(column), dict[int, tuple[int, ...]]()
        for at, position in self._ways:
            op = self.space.ops[at].op
            wanted, made = self._read(at, position, column), placed[op.inputs[position]]
            kept = position in self.profile.ops[op.id].saved_inputs and not self._same(made, wanted)
            if kept and self._stays_cut(at, position, made, wanted, again):
                found[op.id] = (*found.get(op.id, ()), position)
        return found

    def _placed(self, column: Sequence[int]) -> dict[int, MeshPlacement]:
        """How every value of the block is made."""
        ends = self.space.data_axis.ends
        placed: dict[int, MeshPlacement] = {
            value: (ends[value].forward, forward_placements(states[column[IN]]))
            for value, states in self.boundary_pairs.items()
        }
        for at, node in enumerate(self.space.ops):
            options, data = self.strategies[at][column[node.node]], self._data[at]
            for i, value in enumerate(node.op.outputs):
                placements = forward_placements(option.outputs[i] for option in options)
                placed[value] = (data[len(node.op.inputs) + i], placements)
        return placed

    def _read(self, at: int, position: int, column: Sequence[int]) -> MeshPlacement:
        """How an op takes an input."""
        options = self.strategies[at][column[2 + at]]
        return self._data[at][position], forward_placements(option.inputs[position] for option in options)

    def _stays_cut(
        self, at: int, position: int, made: MeshPlacement, read: MeshPlacement, again: Sequence[int]
    ) -> bool:
        """Whether what an op takes in another placement than it was made stays as it was made."""
        flows = (flow for flow in self._ways[at, position] if flow in again)
        is_regathered = any(2 + at in self._regathering[flow] for flow in flows)
        return is_regathered and _is_same(made[0], read[0]) and is_gathered(made[1], read[1])

    def _same(self, made: MeshPlacement, read: MeshPlacement) -> bool:
        """Whether nothing moves: on a data axis of one rank nothing ever does."""
        return made[1] == read[1] and (self.sizes.micro_batch == self.sizes.local_batch or _is_same(made[0], read[0]))

    def _bytes(
        self,
        copy: tuple[int, MeshPlacement | None],
        op: int,
        at: int,
        position: int,
        value: int,
        options: tuple[Option, ...],
        placed: Mapping[int, MeshPlacement],
    ) -> float:
        owner, moved = copy
        if moved is not None:
            return self.sizes.num_bytes(owner, moved[1], moved[0])
        first_op = self.space.block.first_op
        if self.first_keeper.get(owner, op) < first_op:
            return 0.0  # charged to the block that keeps it first
        if owner in placed and owner not in self._at_hand:
            return self.sizes.num_bytes(owner, placed[owner][1], placed[owner][0])
        placements = forward_placements((*option.inputs, *option.outputs)[position] for option in options)
        return self.sizes.share(owner, value, placements, self._data[at][position])


def ways_of(space: BlockSpace) -> dict[tuple[int, int], tuple[int, ...]]:
    """(op, input position) -> the flows (positions) by which it comes: one, or one to a hub and one from there."""
    to_hub = {flow.target: at for at, flow in enumerate(space.flows)}
    first_hub = 2 + len(space.ops)
    return {
        (flow.target - 2, flow.input): (to_hub[flow.source], at) if flow.source >= first_hub else (at,)
        for at, flow in enumerate(space.flows)
        if flow.input is not None
    }


def is_gathered(made: Placements, read: Placements) -> bool:
    """Whether a value is read as it was made but for axes that no longer shard it."""
    return all(
        one == other or (isinstance(one, Shard) and other == REPLICATE) for one, other in zip(made, read, strict=True)
    )


def _is_same(one: Placement, other: Placement) -> bool:
    return one == other or without_size(one) == without_size(other)
