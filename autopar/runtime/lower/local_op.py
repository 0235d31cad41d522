"""An op on one rank: its local shapes and indices, and the op called on local tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autopar.core.local_shape import chunk_bounds, local_shape, local_split_factor, nested_shards
from autopar.core.placement import REPLICATE, Placements
from autopar.graph.ir import Op, TracedBatch
from autopar.graph.op_arguments import call_arguments, resolve_overload
from autopar.runtime.lower.op_sharding import OpSharding
from autopar.runtime.lower.rank_mesh import RankMesh


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelContext:
    """What a kernel may ask for besides its local inputs: ``full_input(position)``, an input replicated, and ``random_key``,
    the key of the micro-batch (an int64 scalar, see ``randomness``)."""

    full_input: Callable[[int], Tensor]
    random_key: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultAndBuffers:
    """An op's result, and the new values of the buffers that it writes, by position among its inputs."""

    result: Any
    new_buffers: dict[int, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalOp:
    """An op on one rank; ``input_shapes`` and ``output_shapes`` are global, shapes and the op's literals are at the
    micro-batch's size."""

    op: Op
    sharding: OpSharding
    mesh: RankMesh
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    device: torch.device

    @property
    def packet(self) -> str:
        """The op's name without namespace and overload: "linear"."""
        return self.op.packet

    def local_output_shape(self, position: int = 0) -> tuple[int, ...]:
        """The shape of the rank's shard of the output at ``position``."""
        return local_shape(
            self.output_shapes[position], self.sharding.outputs[position], self.mesh.sizes, self.mesh.coordinate
        )

    def call(self, tensors: Sequence[Tensor], **overrides: Any) -> Any:
        """The op itself on local tensors; ``overrides`` replace literal arguments by name."""
        overload = resolve_overload(self.op.target)
        schema = overload._schema
        args, kwargs = call_arguments(self.op, list(tensors), schema)
        if "device" in kwargs:
            kwargs["device"] = self.device
        if overrides:
            names = [argument.name for argument in schema.arguments]
            for name, value in overrides.items():
                if names.index(name) < len(args):
                    args[names.index(name)] = value
                else:
                    kwargs[name] = value
        return overload(*args, **kwargs)

    def to_local_index(self, index: Tensor, position: int, dim: int) -> tuple[Tensor, Tensor]:
        """Global indices along a dim of the input at ``position`` as local ones (0 where another rank has them), and whether
        this rank has them."""
        placements, size = self.sharding.inputs[position], self.input_shapes[position][dim]
        is_local = torch.ones_like(index, dtype=torch.bool)
        for extent, start, length in self._shard_chunks(placements, dim, size):
            in_chunk = index % extent - start
            is_in_chunk = (in_chunk >= 0) & (in_chunk < length)
            index = torch.where(is_in_chunk, index // extent * length + in_chunk, 0)
            is_local = is_local & is_in_chunk
        return index, is_local

    def global_indices(self, position: int, dim: int) -> Tensor:
        """The global indices along a dim of the input at ``position`` that this rank stores, in order."""
        placements, size = self.sharding.inputs[position], self.input_shapes[position][dim]
        shards = _shards_of(placements, dim)
        stored = local_shape((size,) * (dim + 1), shards, self.mesh.sizes, self.mesh.coordinate)[dim]
        index = torch.arange(stored, device=self.device)
        for extent, start, length in reversed(self._shard_chunks(placements, dim, size)):
            index = index // length * extent + start + index % length
        return index

    def _shard_chunks(self, placements: Placements, dim: int, size: int) -> list[tuple[int, int, int]]:
        """Per shard of a dim of global ``size``, outermost first: the elements of a piece, and start and length of this
        rank's chunk of each piece."""
        chunks, local_size = [], size
        for _, axis in nested_shards(placements, dim):
            pieces = local_split_factor(placements, axis, self.mesh.sizes)
            extent = local_size // pieces
            start, length = chunk_bounds(extent, self.mesh.sizes[axis], self.mesh.coordinate[axis])
            chunks.append((extent, start, length))
            local_size = pieces * length
        return chunks

    def zero_except_first(self, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        """``tensor`` on the first rank of each of ``axes``, zeros on the others: an addend that must count once in a sum
        over them. All ranks record the same operation, so that the collectives of the backward match."""
        return tensor * (0.0 if any(self.mesh.coordinate[axis] for axis in axes) else 1.0) if axes else tensor


def _shards_of(placements: Placements, dim: int) -> Placements:
    """``placements`` with only the shards of one dim, replicated elsewhere."""
    return tuple(placement if placement.shard_dim == dim else REPLICATE for placement in placements)


def scale_to_micro_batch(op: Op, batch: TracedBatch, micro_batch: int) -> Op:
    """The op with the sizes among its literals scaled from the traced batch to ``micro_batch`` samples."""

    def scaled(literal: Any) -> Any:
        if isinstance(literal, tuple):
            return tuple(scaled(element) for element in literal)
        return batch.scale(literal, micro_batch) if type(literal) is int else literal

    return replace(op, args=scaled(op.args), kwargs=tuple((name, scaled(value)) for name, value in op.kwargs))
