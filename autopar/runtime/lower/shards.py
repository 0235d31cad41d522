"""Which elements of a tensor a rank stores: ``core.local_shape`` as indices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.core.local_shape import chunk_bounds, local_split_factor, nested_shards
from autopar.core.placement import Placements

Shape = Sequence[int]


def global_indices(
    shape: Shape, placements: Placements, sizes: Sequence[int], coordinate: Sequence[int]
) -> tuple[Tensor, ...]:
    """Per dim, the global indices that the rank at ``coordinate`` stores, in order (int64, on the CPU)."""
    indices = []
    for dim, size in enumerate(shape):
        index = torch.arange(size)
        for _, axis in nested_shards(placements, dim):
            pieces = index.view(local_split_factor(placements, axis, sizes), -1)
            index = pieces.narrow(1, *chunk_bounds(pieces.shape[1], sizes[axis], coordinate[axis])).reshape(-1)
        indices.append(index)
    return tuple(indices)


def local_shard(full: Tensor, placements: Placements, sizes: Sequence[int], coordinate: Sequence[int]) -> Tensor:
    """The shard of a full tensor that the rank at ``coordinate`` stores."""
    shard = full
    for dim, index in enumerate(global_indices(full.shape, placements, sizes, coordinate)):
        if len(index) != full.shape[dim]:
            shard = shard.index_select(dim, index.to(full.device))
    return shard
