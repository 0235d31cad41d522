"""A rank's part of a tensor, for torch.distributed.checkpoint: the boxes of the whole that it consists of."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from autopar.runtime.transfer import DimIndices

Box = tuple[tuple[slice, ...], ChunkStorageMetadata]


class CheckpointShard(Tensor):
    """What a rank holds of a tensor of global ``shape``, for torch.distributed.checkpoint: a wrapper without data of
    its own. ``writes``: whether this rank's replica is the one that is stored."""

    local: Tensor
    boxes: list[Box]
    is_writer: bool

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], indices: DimIndices, is_writer: bool) -> "CheckpointShard":
        made: CheckpointShard = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=local.dtype, device=local.device
        )
        made.local, made.is_writer = local.detach(), is_writer
        made.boxes = list(_boxes(indices))
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a part of a checkpoint: use torch.distributed.checkpoint")

    def __create_write_items__(self, fqn: str, part: Any) -> list[WriteItem]:
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
        for where, chunk in self.boxes:
            if index.offset is None or chunk.offsets == index.offset:
                return self.local[where] if where else self.local
        raise ValueError(f"this rank holds no box of {index.fqn} at {index.offset}")


def _boxes(indices: DimIndices) -> Iterator[Box]:
    """The rectangles that the product of these indices consists of: where in the part, and where in the whole."""
    runs = [list(_intervals(index.tolist())) for index in indices]
    for chosen in itertools.product(*runs):
        offsets = torch.Size([first for _, first, _ in chosen])
        sizes = torch.Size([length for _, _, length in chosen])
        yield (
            tuple(slice(at, at + length) for at, _, length in chosen),
            ChunkStorageMetadata(offsets=offsets, sizes=sizes),
        )


def _intervals(indices: list[int]) -> Iterator[tuple[int, int, int]]:
    """(position, first index, length) of each run of consecutive indices."""
    start = 0
    for at in range(1, len(indices) + 1):
        if at == len(indices) or indices[at] != indices[at - 1] + 1:
            yield start, indices[start], at - start
            start = at
