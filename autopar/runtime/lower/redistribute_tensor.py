"""Redistributes a tensor inside a mesh: from this rank's shard in one placement to its shard in another, differentiable.

One step changes one axis (an all-reduce all partial axes at once):

    P -> R  all_reduce     P -> S  reduce_scatter     S -> R  all_gather     S -> S'  all_to_all
    R -> S  a local slice  R -> P  zeros everywhere but on the first rank of the axis
    S -> P  the rank's shard, padded with zeros to the full extent

Slices come first and gathers last, so that collectives communicate as little as possible. Of several axes with the same
shard (dim and split factor) only the innermost can be changed; to change another, those inside it are gathered first and
sliced anew afterwards. Functional collectives are called with the name of their process group, so that a trace of
``redistribute`` has them as nodes.
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
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.shards import Shape


def redistribute(local: Tensor, shape: Shape, source: Placements, target: Placements, mesh: RankMesh) -> Tensor:
    """This rank's shard of a tensor of global ``shape``, redistributed from ``source`` to ``target``. Contiguous; ``local``
    itself where the two are equal."""
    if source == target:
        return local
    redistributor = _Redistributor(local, shape, source, target, mesh)
    with annotate_redistribution():
        redistributor.run()
        redistributed = redistributor.local.contiguous()
    assert redistributor.current == list(target), (source, target, redistributor.current)
    return redistributed


def annotate_redistribution() -> AbstractContextManager[Any]:
    """Nodes traced inside prepare a tensor for a collective or take one from it; they may differ from rank to rank."""
    return traceback.annotate({"redistribution": True}) if traceback.has_preserved_node_meta() else nullcontext()


class _Redistributor:
    """One redistribution under way: ``local`` is placed as ``current``, which ``run`` changes step by step to ``target``."""

    def __init__(self, local: Tensor, shape: Shape, source: Placements, target: Placements, mesh: RankMesh) -> None:
        self.local, self.shape, self.mesh = local, tuple(shape), mesh
        self.current: list[Placement] = list(source)
        self.target = target

    def run(self) -> None:
        """Change every axis to its target."""
        axes = range(len(self.target))
        for axis in axes:
            if self.current[axis] == REPLICATE and self._can_shard(axis) and self._would_stay_sharded(axis):
                self._slice(axis)
        for axis in axes:
            if self.current[axis] == PARTIAL and isinstance(self.target[axis], Shard) and self._can_shard(axis):
                self._reduce_scatter(axis)
        reduced = tuple(axis for axis in axes if self.current[axis] == PARTIAL and self.target[axis] != PARTIAL)
        if reduced:
            self.local = all_reduce(self.local, self.mesh, reduced)
            for axis in reduced:
                self.current[axis] = REPLICATE
        for axis in reversed(axes):
            shard = self.current[axis]
            if isinstance(shard, Shard) and self.target[axis] == PARTIAL and not self._inner_axes(axis, shard):
                self._shard_to_partial(axis, shard)
        for axis in axes:
            if self._can_all_to_all(axis):
                self._all_to_all(axis)
        for axis in self._axes_to_gather():
            self._all_gather(axis)
        for axis in axes:
            if self.current[axis] != self.target[axis] and isinstance(self.target[axis], Shard):
                assert self._can_shard(axis), (self.current, self.target)
                self._slice(axis)
        made_partial = [axis for axis in axes if self.current[axis] == REPLICATE and self.target[axis] == PARTIAL]
        if any(self.mesh.coordinate[axis] for axis in made_partial):
            self.local = torch.zeros_like(self.local)
        for axis in made_partial:
            self.current[axis] = PARTIAL

    def _inner_axes(self, axis: int, placement: Placement) -> list[int]:
        """The axes inside ``axis`` whose placement is the same shard, ``placement``."""
        return [other for other in range(axis + 1, len(self.current)) if self.current[other] == placement]

    def _with_placement(self, axis: int, placement: Placement) -> Placements:
        return tuple(placement if at == axis else old for at, old in enumerate(self.current))

    def _can_shard(self, axis: int) -> bool:
        """Whether ``axis`` can take its target shard now: legal, and no axis inside has the same shard already."""
        shard = self.target[axis]
        if not isinstance(shard, Shard) or self._inner_axes(axis, shard):
            return False
        return is_legal(self.shape, self._with_placement(axis, shard), self.mesh.sizes)

    def _would_stay_sharded(self, axis: int) -> bool:
        """Whether the target shard of ``axis``, once made, need not be gathered: no other shard of its dim changes."""
        dim = self.target[axis].shard_dim
        return not any(old.shard_dim == dim and old != new for old, new in zip(self.current, self.target, strict=True))

    def _can_all_to_all(self, axis: int) -> bool:
        """Whether one all_to_all can change ``axis`` from its shard to the target's, of another dim."""
        old, new = self.current[axis], self.target[axis]
        if not (isinstance(old, Shard) and isinstance(new, Shard)) or old.dim == new.dim:
            return False
        return not self._inner_axes(axis, old) and self._can_shard(axis)

    def _axes_to_gather(self) -> list[int]:
        """The axes that must be gathered, in order: those whose shard changes, those inside them with the same shard, and
        those that no new shard of their dim can nest with."""
        leaving = {
            axis
            for axis, (old, new) in enumerate(zip(self.current, self.target, strict=True))
            if isinstance(old, Shard) and old != new
        }
        while True:
            joining = {axis for axis, new in enumerate(self.target) if isinstance(new, Shard)} - {
                axis for axis, old in enumerate(self.current) if old == self.target[axis] and axis not in leaving
            }
            more = {inner for axis in leaving for inner in self._inner_axes(axis, self.current[axis])}
            more |= {inner for axis in joining for inner in self._inner_axes(axis, self.target[axis])}
            for axis in joining:  # a shard that is not legal inside those that stay
                staying = tuple(REPLICATE if other in leaving else old for other, old in enumerate(self.current))
                joined = (*staying[:axis], self.target[axis], *staying[axis + 1 :])
                if not is_legal(self.shape, joined, self.mesh.sizes):
                    dim = self.target[axis].shard_dim
                    more |= {other for other, old in enumerate(staying) if old.shard_dim == dim}
            if more <= leaving:
                break
            leaving |= more

        def is_inside(other: int, axis: int) -> bool:
            """Whether the shard of ``other`` nests inside the one of ``axis``."""
            outer, inner = self.current[axis], self.current[other]
            assert isinstance(outer, Shard)
            assert isinstance(inner, Shard)
            return outer.dim == inner.dim and (outer.split_factor, axis) < (inner.split_factor, other)

        remaining = [axis for axis in sorted(leaving) if isinstance(self.current[axis], Shard)]
        order = []
        while (
            remaining
        ):  # first the outermost axis that can: its links are the slowest, and the first gather the smallest
            order.append(next(axis for axis in remaining if not any(is_inside(other, axis) for other in remaining)))
            remaining.remove(order[-1])
        return order

    def _slice(self, axis: int) -> None:
        shard = self.target[axis]
        assert isinstance(shard, Shard)
        pieces = local_split_factor(self._with_placement(axis, shard), axis, self.mesh.sizes)
        split = _split_pieces(self.local, shard.dim, pieces)
        bounds = chunk_bounds(split.shape[shard.dim + 1], self.mesh.sizes[axis], self.mesh.coordinate[axis])
        self.local = split.narrow(shard.dim + 1, *bounds).flatten(shard.dim, shard.dim + 1)
        self.current[axis] = shard

    def _shard_to_partial(self, axis: int, shard: Shard) -> None:
        """A sharded tensor is the sum of its shards, each padded with zeros to the full extent."""
        pieces = local_split_factor(tuple(self.current), axis, self.mesh.sizes)
        extent = self._unsharded_extent(axis, shard, pieces)
        start, length = chunk_bounds(extent, self.mesh.sizes[axis], self.mesh.coordinate[axis])
        split = _split_pieces(self.local, shard.dim, pieces)
        sides = []
        for missing in (start, extent - start - length):
            shape = list(split.shape)
            shape[shard.dim + 1] = missing
            sides.append(split.new_zeros(shape))
        self.local = torch.cat((sides[0], split, sides[1]), shard.dim + 1).flatten(shard.dim, shard.dim + 1)
        self.current[axis] = PARTIAL

    def _unsharded_extent(self, axis: int, shard: Shard, split_factor: int) -> int:
        """Elements of one local piece (of ``split_factor``) of the shard's dim when ``axis`` does not shard it."""
        gathered = local_shape(self.shape, self._with_placement(axis, REPLICATE), self.mesh.sizes, self.mesh.coordinate)
        return gathered[shard.dim] // split_factor

    def _all_gather(self, axis: int) -> None:
        shard = self.current[axis]
        assert isinstance(shard, Shard)
        pieces = local_split_factor(tuple(self.current), axis, self.mesh.sizes)
        extent = self._unsharded_extent(axis, shard, pieces)
        self.local = all_gather_shards(self.local, shard.dim, pieces, extent, self.mesh, (axis,))
        self.current[axis] = REPLICATE

    def _reduce_scatter(self, axis: int) -> None:
        shard = self.target[axis]
        assert isinstance(shard, Shard)
        pieces = local_split_factor(self._with_placement(axis, shard), axis, self.mesh.sizes)
        self.local = reduce_scatter_shards(self.local, shard.dim, pieces, self.mesh, (axis,))
        self.current[axis] = shard

    def _all_to_all(self, axis: int) -> None:
        old, new = self.current[axis], self.target[axis]
        assert isinstance(old, Shard)
        assert isinstance(new, Shard)
        degree = self.mesh.sizes[axis]
        new_pieces = local_split_factor(self._with_placement(axis, new), axis, self.mesh.sizes)
        old_pieces = local_split_factor(tuple(self.current), axis, self.mesh.sizes)
        old_extent, new_extent = self._unsharded_extent(axis, old, old_pieces), self.local.shape[new.dim] // new_pieces
        old_chunk, new_chunk = (-(-extent // degree) for extent in (old_extent, new_extent))
        local = _pad_end(_split_pieces(self.local, old.dim, old_pieces), old.dim + 1, old_chunk).flatten(
            old.dim, old.dim + 1
        )
        parts = _pad_end(_split_pieces(local, new.dim, new_pieces), new.dim + 1, new_chunk * degree)
        parts = parts.unflatten(new.dim + 1, (degree, new_chunk)).movedim(new.dim + 1, 0)
        received = all_to_all(parts.flatten(new.dim + 1, new.dim + 2), self.mesh, (axis,))
        split = _split_pieces(received, old.dim + 1, old_pieces).movedim(
            0, old.dim + 1
        )  # (.., pieces, degree, chunk, ..)
        gathered = split.flatten(old.dim + 1, old.dim + 2).narrow(old.dim + 1, 0, old_extent)
        gathered = gathered.flatten(old.dim, old.dim + 1)
        _, length = chunk_bounds(new_extent, degree, self.mesh.coordinate[axis])
        own = _split_pieces(gathered, new.dim, new_pieces).narrow(new.dim + 1, 0, length)
        self.local = own.flatten(new.dim, new.dim + 1)
        self.current[axis] = new


def _split_pieces(tensor: Tensor, dim: int, split_factor: int) -> Tensor:
    """``dim`` unflattened to two dims, (pieces, elements of a piece); also of an empty tensor."""
    shape = list(tensor.shape)
    return tensor.reshape(*shape[:dim], split_factor, shape[dim] // split_factor, *shape[dim + 1 :])


def all_gather_shards(
    local: Tensor, dim: int, split_factor: int, extent: int, mesh: RankMesh, axes: Sequence[int]
) -> Tensor:
    """All-gather along ``dim`` over the flattened ``axes``: the dim is ``split_factor`` pieces of ``extent`` elements, and
    ``local`` has this rank's chunk of each."""
    degree = mesh.degree(axes)
    if degree == 1:
        return local
    chunk = -(-extent // degree)
    split = _pad_end(_split_pieces(local, dim, split_factor), dim + 1, chunk)
    gathered = all_gather(split, mesh, axes).movedim(0, dim + 1).flatten(dim + 1, dim + 2)
    return gathered.narrow(dim + 1, 0, extent).flatten(dim, dim + 1)


def reduce_scatter_shards(local: Tensor, dim: int, split_factor: int, mesh: RankMesh, axes: Sequence[int]) -> Tensor:
    """Reduce-scatter along ``dim``: this rank's chunk of each of ``split_factor`` pieces of the sum over the flattened
    ``axes``; placed as ``all_gather_shards`` takes it."""
    degree = mesh.degree(axes)
    if degree == 1:
        return local
    split = _split_pieces(local, dim, split_factor)
    extent = split.shape[dim + 1]
    chunk = -(-extent // degree)
    parts = _pad_end(split, dim + 1, chunk * degree).unflatten(dim + 1, (degree, chunk)).movedim(dim + 1, 0)
    _, length = chunk_bounds(extent, degree, mesh.rank_in_group(axes))
    return reduce_scatter(parts, mesh, axes).narrow(dim + 1, 0, length).flatten(dim, dim + 1)


def _pad_end(tensor: Tensor, dim: int, size: int) -> Tensor:
    """``tensor`` with zeros appended along ``dim`` up to ``size``."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


def all_reduce(local: Tensor, mesh: RankMesh, axes: Sequence[int], reduction: str = "sum") -> Tensor:
    """The sum (or other ``reduction``, as torch names it) over the flattened group of ``axes``."""
    return _run_collective("all_reduce", local, reduction, mesh=mesh, axes=axes)


def all_gather(local: Tensor, mesh: RankMesh, axes: Sequence[int]) -> Tensor:
    """The local tensors of the flattened group of ``axes``, stacked by rank: (degree, *local.shape)."""
    degree = mesh.degree(axes)
    if degree == 1:
        return local.unsqueeze(0)
    flat = _run_collective("all_gather_into_tensor", local.reshape(-1), degree, mesh=mesh, axes=axes)
    return flat.view(degree, *local.shape)


def reduce_scatter(parts: Tensor, mesh: RankMesh, axes: Sequence[int]) -> Tensor:
    """(degree, ...) -> (...): part k of the sum over the flattened group of ``axes`` for its rank k."""
    degree = mesh.degree(axes)
    flat = _run_collective("reduce_scatter_tensor", parts.reshape(-1), "sum", degree, mesh=mesh, axes=axes)
    return flat.view(parts.shape[1:])


def all_to_all(parts: Tensor, mesh: RankMesh, axes: Sequence[int]) -> Tensor:
    """(degree, ...) -> (degree, ...): part k is sent to rank k of the flattened group of ``axes``, and received from it."""
    flat = parts.reshape(parts.shape[0], -1)
    sizes = [1] * parts.shape[0]
    return _run_collective("all_to_all_single", flat, sizes, sizes, mesh=mesh, axes=axes).view(parts.shape)


def _run_collective(name: str, local: Tensor, *args: object, mesh: RankMesh, axes: Sequence[int]) -> Tensor:
    """Run a functional collective of torch and wait for it; axes of one rank do not take part."""
    axes_above_one = tuple(axis for axis in axes if mesh.sizes[axis] > 1)
    if not axes_above_one:
        return local
    functional, contiguous, group = torch.ops._c10d_functional, local.contiguous(), mesh.group_names[axes_above_one]
    if name == "all_gather_into_tensor" and not is_fake(contiguous):  # see ``schedule_nodes._copy_node``
        gathered = contiguous.new_empty(mesh.degree(axes) * contiguous.shape[0])
        return functional.wait_tensor(functional.all_gather_into_tensor_out(contiguous, *args, group, out=gathered))
    return functional.wait_tensor(getattr(functional, name)(contiguous, *args, group))


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeRedistribution:
    """The redistribution of a value of global ``shape`` on the edge from its producer to one reader: from ``source`` to
    ``target``, and its gradient's from ``gradient_source``, as the reader's backward leaves it, to ``gradient_target``, as
    the producer's takes it; () where it has no gradient."""

    shape: tuple[int, ...]
    source: Placements
    target: Placements
    gradient_source: Placements
    gradient_target: Placements

    @property
    def is_needed(self) -> bool:
        """Whether the value or its gradient changes its placements."""
        return self.source != self.target or self.gradient_source != self.gradient_target


def redistribute_with_gradient(local: Tensor, edge: EdgeRedistribution, mesh: RankMesh) -> Tensor:
    """``local`` redistributed for the reader of an edge, so that autograd redistributes the gradient back."""
    if not edge.is_needed:
        return local
    if not (local.requires_grad and torch.is_grad_enabled()):
        return redistribute(local, edge.shape, edge.source, edge.target, mesh)
    return _RedistributeWithGradient.apply(local, edge, mesh)


class _RedistributeWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, edge, mesh):  # type: ignore[no-untyped-def]
        ctx.edge, ctx.mesh = edge, mesh
        redistributed = redistribute(local, edge.shape, edge.source, edge.target, mesh)
        return redistributed.view_as(redistributed) if redistributed is local else redistributed

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        edge: EdgeRedistribution = ctx.edge
        redistributed = redistribute(gradient, edge.shape, edge.gradient_source, edge.gradient_target, ctx.mesh)
        return redistributed, None, None
