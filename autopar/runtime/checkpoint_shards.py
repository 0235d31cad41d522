"""A rank's part of a tensor, for torch.distributed.checkpoint: the boxes of the full tensor that it consists of."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from autopar.runtime.transfer import DimIndices

Box = tuple[tuple[slice, ...], ChunkStorageMetadata]
"""A box: its slices of the local tensor, and its offsets and sizes in the full one."""


class CheckpointShard(Tensor):
    """This rank's part of a tensor of global ``shape``: a wrapper of ``local`` without data of its own, which
    torch.distributed.checkpoint saves and loads in place. ``indices`` are the global indices of each dim that ``local``
    has. ``is_writer``: this rank's replica is the one that is saved; ``is_new``: only this shard uses the memory of
    ``local``."""

    local: Tensor
    is_new: bool
    boxes: list[Box]
    is_writer: bool

    @staticmethod
    def __new__(
        cls, local: Tensor, shape: Sequence[int], indices: DimIndices, is_writer: bool, *, is_new: bool = False
    ) -> "CheckpointShard":
        shard: CheckpointShard = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=local.dtype, device=local.device
        )
        shard.local, shard.is_writer, shard.is_new = local.detach(), is_writer, is_new
        shard.boxes = list(_boxes(indices))
        return shard

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a CheckpointShard supports torch.distributed.checkpoint only, not {func}")

    def __create_write_items__(self, fqn: str, shard: Any) -> list[WriteItem]:
        if not self.is_writer:
            return []
        properties = TensorProperties(dtype=self.local.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for _, chunk in self.boxes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for _, chunk in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for slices, chunk in self.boxes:
            if index.offset is None or chunk.offsets == index.offset:
                return self.local[slices] if slices else self.local
        raise ValueError(f"this rank stores no box of {index.fqn} at {index.offset}")


def _boxes(indices: DimIndices) -> Iterator[Box]:
    """The boxes of which the product of these indices consists."""
    intervals = [list(_intervals(index.tolist())) for index in indices]
    for box in itertools.product(*intervals):
        offsets = torch.Size([first for _, first, _ in box])
        sizes = torch.Size([length for _, _, length in box])
        yield (
            tuple(slice(position, position + length) for position, _, length in box),
            ChunkStorageMetadata(offsets=offsets, sizes=sizes),
        )


def _intervals(indices: list[int]) -> Iterator[tuple[int, int, int]]:
    """(position, first index, length) of each interval of consecutive indices in an increasing list."""
    start = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            yield start, indices[start], end - start
            start = end
