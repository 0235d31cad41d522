"""Seconds to redistribute a tensor from its producer's placement to its consumer's, and its gradient back, for every
pair of choices.

A choice places the tensor and its gradient by a placement pair per inner axis. The pair on the data axis is given
(`data_axis`): where producer and consumer differ on it, the redistribution spans the whole mesh, elsewhere the inner
axes only.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.core.placement import PARTIAL, REPLICATE, Placement, Placements
from autopar.cost.redistribution_time import MeshLinks, redistribute_s
from autopar.graph.ir import Value
from autopar.intra.block_mesh import BlockMesh
from autopar.intra.local_bytes import LocalBytes
from autopar.rules.dim_factors import without_size
from autopar.rules.placement_pair import (
    PARTIAL_VALUE,
    REPLICATED,
    PlacementPair,
    forward_placements,
    gradient_placements,
)

Floats = NDArray[np.float64]


class RedistributionTables:
    """Of one mesh; ``local_bytes`` knows the bytes of values on its ranks."""

    def __init__(self, mesh: BlockMesh, local_bytes: LocalBytes) -> None:
        self.mesh, self.local_bytes = mesh, local_bytes
        self._cache: dict[tuple[tuple[Placements, ...], tuple[float, ...]], Floats] = {}

    def forward_backward_s(
        self,
        value: Value,
        sources: Sequence[tuple[PlacementPair, ...]],
        targets: Sequence[tuple[PlacementPair, ...]],
        source_data: PlacementPair,
        target_data: PlacementPair,
    ) -> tuple[Floats, Floats]:
        """(sources, targets) seconds to redistribute a value forward and its gradient back; ``source_data`` and
        ``target_data`` are the pairs on the data axis."""
        forward = self._single_direction_s(
            value,
            [forward_placements(pairs) for pairs in sources],
            [forward_placements(pairs) for pairs in targets],
            source_data.forward,
            target_data.forward,
        )
        if not value.requires_grad:
            return forward, np.zeros_like(forward)
        backward = self._single_direction_s(
            value,
            [gradient_placements(pairs) for pairs in targets],
            [gradient_placements(pairs) for pairs in sources],
            target_data.gradient,
            source_data.gradient,
        )
        return forward, backward.T

    def into_partial_s(
        self,
        value: Value,
        end_placements: Sequence[Sequence[tuple[PlacementPair, ...]]],
        data: tuple[PlacementPair, PlacementPair],
        forward_s: Floats,
    ) -> Floats:
        """``forward_s`` (sources, targets), where a target is Partial on an axis and its source is not, with the
        seconds to Replicate: from there Partial is free, as all ranks but the first take zeros.

        ``end_placements`` are those of the sources and of the targets, ``data`` their pairs on the data axis.
        """
        sources, targets = end_placements
        if not any(PARTIAL_VALUE in pairs for pairs in targets):
            return forward_s
        rows = []
        for source in sources:
            replicated = [
                tuple(
                    REPLICATED if pair == PARTIAL_VALUE != source_pair else pair
                    for pair, source_pair in zip(target, source, strict=True)
                )
                for target in targets
            ]
            rows.append(self.forward_backward_s(value, [source], replicated, *data)[0][0])
        return np.where(np.isfinite(forward_s), forward_s, np.stack(rows))

    def _single_direction_s(
        self,
        value: Value,
        sources: Sequence[Placements],
        targets: Sequence[Placements],
        source_data: Placement,
        target_data: Placement,
    ) -> Floats:
        """(sources, targets) seconds of the forward or of the backward; over the inner axes alone where the placement on
        the data axis does not change."""
        if self.mesh.data_ranks == 1 or without_size(source_data) == without_size(target_data):
            table, index = self._all_pairs_s(self.mesh.inner_links, value, (*sources, *targets), source_data)
            return table[np.ix_([index[entry] for entry in sources], [index[entry] for entry in targets])]
        if target_data == PARTIAL:  # free from Replicate: all ranks but the first take zeros
            target_data = REPLICATE
        made, taken = [(source_data, *entry) for entry in sources], [(target_data, *entry) for entry in targets]
        table, index = self._all_pairs_s(self.mesh.mesh_links, value, (*made, *taken), None)
        return table[np.ix_([index[entry] for entry in made], [index[entry] for entry in taken])]

    def _all_pairs_s(
        self, links: MeshLinks, value: Value, needed_placements: Sequence[Placements], data: Placement | None
    ) -> tuple[Floats, dict[Placements, int]]:
        """Seconds between every two placements on the axes of ``links``, those needed and all that a redistribution path
        may pass through, and each one's index in the table. ``data`` is the placement on the data axis where that is
        none of the axes, else None."""
        per_axis: list[dict[Placement, None]] = [{} for _ in links.sizes]
        for placements in needed_placements:
            for axis, placement in enumerate(placements):
                per_axis[axis][placement] = None
        if data is None:
            inner = dict.fromkeys(placement for each in per_axis[1:] for placement in each)
            per_axis = [per_axis[0] | {REPLICATE: None}, *(inner | {REPLICATE: None} for _ in per_axis[1:])]
        else:
            every = dict.fromkeys(placement for each in per_axis for placement in each)
            per_axis = [every for _ in per_axis]
        entries = tuple(dict.fromkeys((*needed_placements, *itertools.product(*per_axis))))
        sizes = tuple(
            self.local_bytes.num_bytes(value.id, *((entry, data) if data is not None else (entry[1:], entry[0])))
            for entry in entries
        )
        key = (entries, sizes)
        if key not in self._cache:
            self._cache[key] = redistribute_s(links, entries, np.array([sizes]))[0]
        return self._cache[key], {entry: at for at, entry in enumerate(entries)}
