"""Redistributes a local tensor from some placements on a mesh to others, and its gradient back.

One step changes one axis (an all-reduce, all axes that it concerns):

    P -> R  all_reduce     P -> S  reduce_scatter     S -> R  all_gather     S -> S'  all_to_all
    R -> S  a local slice  R -> P  zeros everywhere but on the first rank of the axis
    S -> P  the rank's part among zeros

Slices come first, gathers last, so that collectives move as little as they can. Where several axes shard alike (the
same dim and split factor), only the innermost may leave or join: the ones inside are gathered first and sliced again.
Functional collectives are called by the name of their group, so a trace of ``move`` holds them as nodes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import traceback

from autopar.core.local_shape import chunk_bounds, is_legal, local_shape, local_split_factor
from autopar.core.placement import PARTIAL, REPLICATE, Placement, Placements, Shard
from autopar.graph.fake_tensors import is_fake
from autopar.runtime.lower.rank_mesh import Mesh
from autopar.runtime.lower.shards import Shape


def move(local: Tensor, shape: Shape, source: Placements, target: Placements, mesh: Mesh) -> Tensor:
    """``local`` of a tensor of global ``shape`` in ``source``, redistributed to ``target``; contiguous unless nothing
    changes."""
    if source == target:
        return local
    mover = _Mover(local, shape, source, target, mesh)
    with moving():
        mover.run()
        moved = mover.local.contiguous()
    assert mover.now == list(target), (source, target, mover.now)
    return moved


def moving() -> AbstractContextManager[Any]:
    """Nodes traced inside bring a tensor to a collective or from it; what they are may differ from rank to rank."""
    return traceback.annotate({"moves": True}) if traceback.has_preserved_node_meta() else nullcontext()


class _Mover:
    def __init__(self, local: Tensor, shape: Shape, source: Placements, target: Placements, mesh: Mesh) -> None:
        self.local, self.shape, self.mesh = local, tuple(shape), mesh
        self.now: list[Placement] = list(source)
        self.target = target

    def run(self) -> None:
        axes = range(len(self.target))
        for axis in axes:
            if self.now[axis] == REPLICATE and self._may_join(axis) and self._stays(axis):
                self._slice(axis)
        for axis in axes:
            if self.now[axis] == PARTIAL and isinstance(self.target[axis], Shard) and self._may_join(axis):
                self._reduce_scatter(axis)
        summed = tuple(axis for axis in axes if self.now[axis] == PARTIAL and self.target[axis] != PARTIAL)
        if summed:
            self.local = all_reduce(self.local, self.mesh, summed)
            for axis in summed:
                self.now[axis] = REPLICATE
        for axis in reversed(axes):
            shard = self.now[axis]
            if isinstance(shard, Shard) and self.target[axis] == PARTIAL and not self._inside(axis, shard):
                self._widen(axis, shard)
        for axis in axes:
            if self._may_exchange(axis):
                self._exchange(axis)
        for axis in self._leaving():
            self._gather(axis)
        for axis in axes:
            if self.now[axis] != self.target[axis] and isinstance(self.target[axis], Shard):
                assert self._may_join(axis), (self.now, self.target)
                self._slice(axis)
        first = [axis for axis in axes if self.now[axis] == REPLICATE and self.target[axis] == PARTIAL]
        if any(self.mesh.coordinate[axis] for axis in first):
            self.local = torch.zeros_like(self.local)
        for axis in first:
            self.now[axis] = PARTIAL

    def _inside(self, axis: int, placement: Placement) -> list[int]:
        """Axes that shard just as ``placement`` does on ``axis``, inside it."""
        return [other for other in range(axis + 1, len(self.now)) if self.now[other] == placement]

    def _with(self, axis: int, placement: Placement) -> Placements:
        return tuple(placement if at == axis else old for at, old in enumerate(self.now))

    def _may_join(self, axis: int) -> bool:
        shard = self.target[axis]
        if not isinstance(shard, Shard) or self._inside(axis, shard):
            return False
        return is_legal(self.shape, self._with(axis, shard), self.mesh.sizes)

    def _stays(self, axis: int) -> bool:
        """Whether a shard of ``axis`` would stay: those of its dim that are there already do not leave."""
        dim = self.target[axis].shard_dim
        return not any(old.shard_dim == dim and old != new for old, new in zip(self.now, self.target, strict=True))

    def _may_exchange(self, axis: int) -> bool:
        """Whether one all_to_all may bring the axis from its shard to another."""
        old, new = self.now[axis], self.target[axis]
        if not (isinstance(old, Shard) and isinstance(new, Shard)) or old.dim == new.dim:
            return False
        return not self._inside(axis, old) and self._may_join(axis)

    def _leaving(self) -> list[int]:
        """Axes that must be gathered, in order: those whose shard changes, and those inside them."""
        leaving = {
            axis
            for axis, (old, new) in enumerate(zip(self.now, self.target, strict=True))
            if isinstance(old, Shard) and old != new
        }
        while True:
            joining = {axis for axis, new in enumerate(self.target) if isinstance(new, Shard)} - {
                axis for axis, old in enumerate(self.now) if old == self.target[axis] and axis not in leaving
            }
            more = {inner for axis in leaving for inner in self._inside(axis, self.now[axis])}
            more |= {inner for axis in joining for inner in self._inside(axis, self.target[axis])}
            for axis in joining:  # a shard that is not legal inside those that stay
                stays = tuple(REPLICATE if at in leaving else old for at, old in enumerate(self.now))
                joined = tuple(self.target[axis] if at == axis else old for at, old in enumerate(stays))
                if not is_legal(self.shape, joined, self.mesh.sizes):
                    dim = self.target[axis].shard_dim
                    more |= {at for at, old in enumerate(stays) if old.shard_dim == dim}
            if more <= leaving:
                break
            leaving |= more

        def inside(axis: int, other: int) -> bool:
            """Whether ``other`` shards the dim of ``axis`` further in."""
            mine, theirs = self.now[axis], self.now[other]
            assert isinstance(mine, Shard)
            assert isinstance(theirs, Shard)
            return mine.dim == theirs.dim and (mine.split_factor, axis) < (theirs.split_factor, other)

        left = [axis for axis in sorted(leaving) if isinstance(self.now[axis], Shard)]
        found = []
        while left:  # the outermost that may: its links are the slowest, and what it brings the least
            found.append(next(axis for axis in left if not any(inside(axis, other) for other in left)))
            left.remove(found[-1])
        return found

    def _slice(self, axis: int) -> None:
        shard = self.target[axis]
        assert isinstance(shard, Shard)
        pieces = local_split_factor(self._with(axis, shard), axis, self.mesh.sizes)
        split = _split(self.local, shard.dim, pieces)
        bounds = chunk_bounds(split.shape[shard.dim + 1], self.mesh.sizes[axis], self.mesh.coordinate[axis])
        self.local = split.narrow(shard.dim + 1, *bounds).flatten(shard.dim, shard.dim + 1)
        self.now[axis] = shard

    def _widen(self, axis: int, shard: Shard) -> None:
        """A sharded tensor is the sum of its parts, each among zeros."""
        pieces = local_split_factor(tuple(self.now), axis, self.mesh.sizes)
        extent = self._whole_extent(axis, shard, pieces)
        start, length = chunk_bounds(extent, self.mesh.sizes[axis], self.mesh.coordinate[axis])
        split = _split(self.local, shard.dim, pieces)
        sides = []
        for missing in (start, extent - start - length):
            shape = list(split.shape)
            shape[shard.dim + 1] = missing
            sides.append(split.new_zeros(shape))
        self.local = torch.cat((sides[0], split, sides[1]), shard.dim + 1).flatten(shard.dim, shard.dim + 1)
        self.now[axis] = PARTIAL

    def _whole_extent(self, axis: int, shard: Shard, pieces: int) -> int:
        """Elements of one local piece when ``axis`` does not shard it."""
        whole = local_shape(self.shape, self._with(axis, REPLICATE), self.mesh.sizes, self.mesh.coordinate)
        return whole[shard.dim] // pieces

    def _gather(self, axis: int) -> None:
        shard = self.now[axis]
        assert isinstance(shard, Shard)
        pieces = local_split_factor(tuple(self.now), axis, self.mesh.sizes)
        extent = self._whole_extent(axis, shard, pieces)
        self.local = gather_pieces(self.local, shard.dim, pieces, extent, self.mesh, (axis,))
        self.now[axis] = REPLICATE

    def _reduce_scatter(self, axis: int) -> None:
        shard = self.target[axis]
        assert isinstance(shard, Shard)
        pieces = local_split_factor(self._with(axis, shard), axis, self.mesh.sizes)
        self.local = scatter_pieces(self.local, shard.dim, pieces, self.mesh, (axis,))
        self.now[axis] = shard

    def _exchange(self, axis: int) -> None:
        old, new = self.now[axis], self.target[axis]
        assert isinstance(old, Shard)
        assert isinstance(new, Shard)
        degree = self.mesh.sizes[axis]
        new_pieces = local_split_factor(self._with(axis, new), axis, self.mesh.sizes)
        old_pieces = local_split_factor(tuple(self.now), axis, self.mesh.sizes)
        old_extent, new_extent = self._whole_extent(axis, old, old_pieces), self.local.shape[new.dim] // new_pieces
        old_chunk, new_chunk = (-(-extent // degree) for extent in (old_extent, new_extent))
        local = _padded(_split(self.local, old.dim, old_pieces), old.dim + 1, old_chunk).flatten(old.dim, old.dim + 1)
        parts = _padded(_split(local, new.dim, new_pieces), new.dim + 1, new_chunk * degree)
        parts = parts.unflatten(new.dim + 1, (degree, new_chunk)).movedim(new.dim + 1, 0)
        received = all_to_all(parts.flatten(new.dim + 1, new.dim + 2), self.mesh, (axis,))
        split = _split(received, old.dim + 1, old_pieces).movedim(0, old.dim + 1)  # (.., pieces, degree, chunk, ..)
        whole = split.flatten(old.dim + 1, old.dim + 2).narrow(old.dim + 1, 0, old_extent).flatten(old.dim, old.dim + 1)
        _, length = chunk_bounds(new_extent, degree, self.mesh.coordinate[axis])
        mine = _split(whole, new.dim, new_pieces).narrow(new.dim + 1, 0, length)
        self.local = mine.flatten(new.dim, new.dim + 1)
        self.now[axis] = new


def _split(tensor: Tensor, dim: int, pieces: int) -> Tensor:
    """``dim`` as (pieces, rest), also of an empty tensor."""
    shape = list(tensor.shape)
    return tensor.reshape(*shape[:dim], pieces, shape[dim] // pieces, *shape[dim + 1 :])


def gather_pieces(local: Tensor, dim: int, pieces: int, extent: int, mesh: Mesh, axes: Sequence[int]) -> Tensor:
    """All-gather chunks of ``pieces`` pieces of ``extent`` elements along ``dim`` over the flattened ``axes``."""
    degree = mesh.degree(axes)
    if degree == 1:
        return local
    chunk = -(-extent // degree)
    split = _padded(_split(local, dim, pieces), dim + 1, chunk)
    gathered = all_gather(split, mesh, axes).movedim(0, dim + 1).flatten(dim + 1, dim + 2)
    return gathered.narrow(dim + 1, 0, extent).flatten(dim, dim + 1)


def scatter_pieces(local: Tensor, dim: int, pieces: int, mesh: Mesh, axes: Sequence[int]) -> Tensor:
    """Reduce-scatter: the inverse of ``gather_pieces`` on sums."""
    degree = mesh.degree(axes)
    if degree == 1:
        return local
    split = _split(local, dim, pieces)
    extent = split.shape[dim + 1]
    chunk = -(-extent // degree)
    parts = _padded(split, dim + 1, chunk * degree).unflatten(dim + 1, (degree, chunk)).movedim(dim + 1, 0)
    _, length = chunk_bounds(extent, degree, mesh.index(axes))
    return reduce_scatter(parts, mesh, axes).narrow(dim + 1, 0, length).flatten(dim, dim + 1)


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """``tensor`` with zeros appended along ``dim`` up to ``size``."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


def all_reduce(local: Tensor, mesh: Mesh, axes: Sequence[int], reduction: str = "sum") -> Tensor:
    """Over the flattened group of ``axes``."""
    return _collective("all_reduce", local, reduction, mesh=mesh, axes=axes)


def all_gather(local: Tensor, mesh: Mesh, axes: Sequence[int]) -> Tensor:
    """(degree, *local.shape)."""
    degree = mesh.degree(axes)
    if degree == 1:
        return local.unsqueeze(0)
    flat = _collective("all_gather_into_tensor", local.reshape(-1), degree, mesh=mesh, axes=axes)
    return flat.view(degree, *local.shape)


def reduce_scatter(parts: Tensor, mesh: Mesh, axes: Sequence[int]) -> Tensor:
    """(degree, ...) -> what this rank keeps of the sum."""
    degree = mesh.degree(axes)
    flat = _collective("reduce_scatter_tensor", parts.reshape(-1), "sum", degree, mesh=mesh, axes=axes)
    return flat.view(parts.shape[1:])


def all_to_all(parts: Tensor, mesh: Mesh, axes: Sequence[int]) -> Tensor:
    """(degree, ...) -> (degree, ...): part k goes to rank k of the group, and comes from it."""
    flat = parts.reshape(parts.shape[0], -1)
    sizes = [1] * parts.shape[0]
    return _collective("all_to_all_single", flat, sizes, sizes, mesh=mesh, axes=axes).view(parts.shape)


def _collective(name: str, local: Tensor, *args: object, mesh: Mesh, axes: Sequence[int]) -> Tensor:
    real = tuple(axis for axis in axes if mesh.sizes[axis] > 1)
    if not real:
        return local
    functional, given, group = torch.ops._c10d_functional, local.contiguous(), mesh.groups[real]
    if name == "all_gather_into_tensor" and not is_fake(given):  # given its memory: see ``order.arranged``
        whole = given.new_empty(mesh.degree(axes) * given.shape[0])
        return functional.wait_tensor(functional.all_gather_into_tensor_out(given, *args, group, out=whole))
    return functional.wait_tensor(getattr(functional, name)(given, *args, group))


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How one reader takes a value: from ``source`` to ``target``, and the gradient from ``gradient_source`` (as the
    reader gives it) to ``gradient_target`` (as the maker wants it). ``shape`` is global."""

    shape: tuple[int, ...]
    source: Placements
    target: Placements
    gradient_source: Placements
    gradient_target: Placements

    @property
    def changes(self) -> bool:
        return self.source != self.target or self.gradient_source != self.gradient_target


def convert(local: Tensor, conversion: Conversion, mesh: Mesh) -> Tensor:
    """``local`` as the reader wants it, differentiable."""
    if not conversion.changes:
        return local
    if not (local.requires_grad and torch.is_grad_enabled()):
        return move(local, conversion.shape, conversion.source, conversion.target, mesh)
    return _Convert.apply(local, conversion, mesh)


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, conversion, mesh):  # type: ignore[no-untyped-def]
        ctx.conversion, ctx.mesh = conversion, mesh
        moved = move(local, conversion.shape, conversion.source, conversion.target, mesh)
        return moved.view_as(moved) if moved is local else moved

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        made: Conversion = ctx.conversion
        back = move(gradient, made.shape, made.gradient_source, made.gradient_target, ctx.mesh)
        return back, None, None
