"""Bytes of a graph's values on the rank that stores most, on the mesh of a block."""

from collections.abc import Iterable
from math import prod

from autopar.core.local_shape import local_size
from autopar.core.placement import Placement, Placements, Shard
from autopar.graph.ir import Graph
from autopar.intra.block_mesh import BlockMesh
from autopar.rules.placement_pair import PlacementPair, forward_placements


class LocalBytes:
    """The data axis shards the batch (or replicates it), the inner axes shard the rest."""

    def __init__(self, graph: Graph, mesh: BlockMesh) -> None:
        self.graph, self.inner_sizes = graph, mesh.inner_sizes
        self.local_batch, self.micro_batch = mesh.local_batch, mesh.micro_batch
        self._cache: dict[tuple[int, Placement, Placements], float] = {}

    def data_rank_shape(self, value: int, data_placement: Placement) -> tuple[int, ...]:
        """The shape of a value (id) on a data rank, unsharded on the inner axes."""
        batch = self.graph.batch
        return tuple(
            batch.scale(size, self.local_batch if dim == data_placement.shard_dim else self.micro_batch)
            for dim, size in enumerate(self.graph.values[value].shape)
        )

    def num_bytes(self, value: int, placements: Placements, data_placement: Placement) -> float:
        """Bytes of a value (id) with ``placements`` on the inner axes, whose split factors are those of the traced
        batch, and ``data_placement`` on the data axis."""
        key = (value, data_placement, placements)
        if key not in self._cache:
            local = [self._on_data_rank(placement, data_placement) for placement in placements]
            elements = local_size(self.data_rank_shape(value, data_placement), local, self.inner_sizes)
            self._cache[key] = float(elements * self.graph.values[value].itemsize)
        return self._cache[key]

    def pair_bytes(self, value: int, pairs: Iterable[PlacementPair], data_pair: PlacementPair) -> float:
        """``num_bytes`` of the forward placements of ``pairs``, one per inner axis."""
        return self.num_bytes(value, forward_placements(pairs), data_pair.forward)

    def owner_bytes(self, owner: int, value: int, placements: Placements, data_placement: Placement) -> float:
        """Local bytes of the memory of value ``owner`` where a view of it, ``value``, has these placements: the same
        share of the memory as of the view. Of a memory smaller than the view (it was expanded): the view's bytes, at
        most all of the memory."""
        memory, full, local = (
            self._full_bytes(owner),
            self._full_bytes(value),
            self.num_bytes(value, placements, data_placement),
        )
        if full > memory:
            return min(memory, local)
        return memory * local / full if full else memory

    def _full_bytes(self, value: int) -> float:
        """Bytes of a value of the micro-batch, unsharded."""
        found = self.graph.values[value]
        sizes = (self.graph.batch.scale(size, self.micro_batch) for size in found.shape)
        return float(prod(sizes) * found.itemsize)

    def _on_data_rank(self, placement: Placement, data: Placement) -> Placement:
        """A placement of the traced batch on an inner axis, as it is on a data rank: a split factor that counts samples
        counts those of the micro-batch, or of the rank where the data axis shards the same dim."""
        batch = self.graph.batch
        if not isinstance(placement, Shard) or not batch.is_proportional(placement.split_factor):
            return placement
        samples = self.local_batch if data.shard_dim == placement.dim else self.micro_batch
        return Shard(placement.dim, max(1, placement.split_factor * samples // batch.traced_size))
