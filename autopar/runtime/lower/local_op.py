"""An op on what one rank holds: its parts of tensors and of their indices, and the op called on them."""

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
    """What a kernel may ask for: ``whole(at)`` is input ``at`` replicated, ``key`` the number that random ops start
    from (of this step and micro-batch, int64)."""

    full_input: Callable[[int], Tensor]
    random_key: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultAndBuffers:
    """A result beside new values of buffers that the op writes, by position among its inputs."""

    result: Any
    new_buffers: dict[int, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalOp:
    """An op on one rank; ``input_shapes`` and ``output_shapes`` are global, literals are those of the micro-batch."""

    op: Op
    sharding: OpSharding
    mesh: RankMesh
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    device: torch.device

    @property
    def packet(self) -> str:
        return self.op.packet

    def local_output_shape(self, position: int = 0) -> tuple[int, ...]:
        """The shape of the rank's part of output ``at``."""
        return local_shape(
            self.output_shapes[position], self.sharding.outputs[position], self.mesh.sizes, self.mesh.coordinate
        )

    def call(self, tensors: Sequence[Tensor], **overrides: Any) -> Any:
        """The op itself on local tensors, some arguments (by name) changed."""
        overload = resolve_overload(self.op.target)
        schema = overload._schema
        args, kwargs = call_arguments(self.op, list(tensors), schema)
        if "device" in kwargs:
            kwargs["device"] = self.device
        if overrides:
            names = [given.name for given in schema.arguments]
            for name, value in overrides.items():
                if names.index(name) < len(args):
                    args[names.index(name)] = value
                else:
                    kwargs[name] = value
        return overload(*args, **kwargs)

    def to_local_index(self, index: Tensor, position: int, dim: int) -> tuple[Tensor, Tensor]:
        """Where global indices of a dim of input ``at`` are on this rank (0 where they are not), and whether they are."""
        placements, size = self.sharding.inputs[position], self.input_shapes[position][dim]
        mine = torch.ones_like(index, dtype=torch.bool)
        for extent, start, length in self._shard_chunks(placements, dim, size):
            within = index % extent - start
            here = (within >= 0) & (within < length)
            index = torch.where(here, index // extent * length + within, 0)
            mine = mine & here
        return index, mine

    def global_indices(self, position: int, dim: int) -> Tensor:
        """The global indices of a dim of input ``at`` that this rank stores, in order."""
        placements, size = self.sharding.inputs[position], self.input_shapes[position][dim]
        shards = _shards_of(placements, dim)
        stored = local_shape((size,) * (dim + 1), shards, self.mesh.sizes, self.mesh.coordinate)[dim]
        index = torch.arange(stored, device=self.device)
        for extent, start, length in reversed(self._shard_chunks(placements, dim, size)):
            index = index // length * extent + start + index % length
        return index

    def _shard_chunks(self, placements: Placements, dim: int, size: int) -> list[tuple[int, int, int]]:
        """(elements of a piece, start, length) of each shard of a dim, outermost first."""
        found, local = [], size
        for _, axis in nested_shards(placements, dim):
            pieces = local_split_factor(placements, axis, self.mesh.sizes)
            extent = local // pieces
            start, length = chunk_bounds(extent, self.mesh.sizes[axis], self.mesh.coordinate[axis])
            found.append((extent, start, length))
            local = pieces * length
        return found

    def zero_except_first(self, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        """``tensor`` on the first rank of each axis, zeros on the others: a term of a sum that is to count once. All
        ranks record the same operation, so that collectives of the backward pair."""
        return tensor * (0.0 if any(self.mesh.coordinate[axis] for axis in axes) else 1.0) if axes else tensor


def _shards_of(placements: Placements, dim: int) -> Placements:
    """``placements`` with the shards of one dim alone."""
    return tuple(placement if placement.shard_dim == dim else REPLICATE for placement in placements)


def scale_to_micro_batch(op: Op, batch: TracedBatch, micro_batch: int) -> Op:
    """The op with the sizes among its literals scaled from the traced batch."""

    def scaled(literal: Any) -> Any:
        if isinstance(literal, tuple):
            return tuple(scaled(element) for element in literal)
        return batch.scale(literal, micro_batch) if type(literal) is int else literal

    return replace(op, args=scaled(op.args), kwargs=tuple((name, scaled(value)) for name, value in op.kwargs))
