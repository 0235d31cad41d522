"""Seconds that a value takes to be redistributed from where one choice makes it to where another reads it, and its
gradient back.

A state is a placement pair per inner axis. The data axis does what it is given (`data_axis`); only where its placement
changes is it redistributed along with the inner axes.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.core.placement import PARTIAL, REPLICATE, Placement, Placements
from autopar.cost.redistribution_time import MeshLinks, redistribute_s
from autopar.graph.ir import Value
from autopar.intra.saved_memory import LocalBytes
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
    """Of one block: ``links`` are those of the inner axes, ``whole`` those of all, the data axis of ``data`` ranks
    first; ``local`` knows the bytes of values on a rank."""

    def __init__(self, inner_links: MeshLinks, mesh_links: MeshLinks, data_ranks: int, local_bytes: LocalBytes) -> None:
        self.inner_links, self.mesh_links, self.data_ranks, self.local_bytes = (
            inner_links,
            mesh_links,
            data_ranks,
            local_bytes,
        )
        self._cache: dict[tuple[tuple[Placements, ...], tuple[float, ...]], Floats] = {}

    def forward_backward_s(
        self,
        value: Value,
        sources: Sequence[tuple[PlacementPair, ...]],
        targets: Sequence[tuple[PlacementPair, ...]],
        source_data: PlacementPair,
        target_data: PlacementPair,
    ) -> tuple[Floats, Floats]:
        """(sources, targets) seconds to redistribute the value forward and its gradient back; ``source_data`` and
        ``target_data`` are the data axis's pairs."""
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
        """``forward`` with the seconds to what is replicated where a target is partial and its source is not."""
        if not any(PARTIAL_VALUE in pairs for pairs in end_placements[1]):
            return forward_s
        rows = []
        for made in end_placements[0]:
            replicated = [
                tuple(
                    REPLICATED if pair == PARTIAL_VALUE != source else pair
                    for pair, source in zip(pairs, made, strict=True)
                )
                for pairs in end_placements[1]
            ]
            rows.append(self.forward_backward_s(value, [made], replicated, *data)[0][0])
        return np.where(np.isfinite(forward_s), forward_s, np.stack(rows))

    def _single_direction_s(
        self,
        value: Value,
        sources: Sequence[Placements],
        targets: Sequence[Placements],
        source_data: Placement,
        target_data: Placement,
    ) -> Floats:
        """(sources, targets) seconds. Where the data axis stays as it is, only inner axes change."""
        if self.data_ranks == 1 or without_size(source_data) == without_size(target_data):
            table, at = self._all_pairs_s(self.inner_links, value, (*sources, *targets), source_data)
            return table[np.ix_([at[one] for one in sources], [at[one] for one in targets])]
        if target_data == PARTIAL:  # zeros on all ranks but the first: a replicated tensor becomes a sum for nothing
            target_data = REPLICATE
        made, taken = [(source_data, *one) for one in sources], [(target_data, *one) for one in targets]
        table, at = self._all_pairs_s(self.mesh_links, value, (*made, *taken), None)
        return table[np.ix_([at[one] for one in made], [at[one] for one in taken])]

    def _all_pairs_s(
        self, links: MeshLinks, value: Value, needed_placements: Sequence[Placements], data: Placement | None
    ) -> tuple[Floats, dict[Placements, int]]:
        """Seconds between every two placements on the axes of ``links``, and where each is in the table. ``data`` is
        the placement on the data axis where it is none of the axes."""
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
