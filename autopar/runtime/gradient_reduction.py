"""Collectives at the end of a step: gradients are all-reduced or reduce-scattered, updated weights all-gathered.

Each starts when its tensors exist and is waited for at the end, so it overlaps with the rest of the backward. A tensor
of at least ``GRADIENT_BUCKET_BYTES`` is sent alone and in place; smaller ones over the same axes share buckets of about
that size. The members of a group start theirs in the same order: that in which their backward produces the gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from autopar.core.local_shape import chunk_bounds
from autopar.core.placement import PARTIAL
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.stage_program import ParameterSharding

T = TypeVar("T")
GRADIENT_BUCKET_BYTES = 2**20
"""The size of a full bucket. The judge prices larger ones (``cost.parameter_storage``)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartedCollective:
    """A collective that was started: ``consume`` is called with its result; the tensors of ``keep_alive``, which it
    reads, must live until then."""

    result: Tensor
    consume: Callable[[Tensor], None]
    keep_alive: tuple[Tensor, ...] = ()

    def wait(self) -> None:
        """Wait for the result and consume it."""
        self.consume(torch.ops._c10d_functional.wait_tensor(self.result))


@dataclass(slots=True, kw_only=True, eq=False)
class _GradientBucket:
    """Gradients that wait to be reduced together."""

    gradients: list[tuple[ParameterSharding, Tensor]] = field(default_factory=list)
    num_bytes: int = 0


class GradientReduction:
    """The reduction of one stage's gradients in a step, on one rank."""

    def __init__(self, mesh: RankMesh) -> None:
        self.mesh = mesh
        self._buckets: dict[tuple[bool, tuple[int, ...]], _GradientBucket] = {}
        self._started: list[StartedCollective] = []
        self._reduced: dict[int, Tensor] = {}

    def begin(self, sharding: ParameterSharding, gradient: Tensor) -> None:
        """Start to reduce a gradient, this rank's sum over micro-batches, or add it to a bucket. Its memory may be
        reused."""
        if sharding.zero_stage == 1 and self.mesh.degree(sharding.zero_axes) > 1:
            self._add_to_bucket(True, sharding.zero_axes, sharding, gradient)
        else:
            self._begin_all_reduce(sharding, gradient)

    def finish(self) -> dict[int, Tensor]:
        """Start what waits in buckets and wait for all; returns the reduced gradients, by value."""
        for scatters in (True, False):  # a reduce-scattered gradient may have to be all-reduced over other axes
            for (scattered, axes), bucket in list(self._buckets.items()):
                if scattered == scatters:
                    self._launch(scattered, axes, bucket.gradients)
                    del self._buckets[scattered, axes]
            started, self._started = self._started, []
            for collective in started:
                collective.wait()
        reduced, self._reduced = self._reduced, {}
        return reduced

    def _begin_all_reduce(self, sharding: ParameterSharding, gradient: Tensor) -> None:
        """All-reduce over the axes on which the gradient is still partial after ZeRO's reduce-scatter."""
        axes = tuple(
            axis
            for axis, placement in enumerate(sharding.gradient_placements)
            if placement == PARTIAL and axis not in sharding.zero_axes and self.mesh.sizes[axis] > 1
        )
        if axes:
            self._add_to_bucket(False, axes, sharding, gradient)
        else:
            self._reduced[sharding.value] = gradient

    def _add_to_bucket(
        self, scatters: bool, axes: tuple[int, ...], sharding: ParameterSharding, gradient: Tensor
    ) -> None:
        """Reduce a large gradient at once; others when their bucket is full. ``scatters``: by reduce-scatter."""
        size = gradient.numel() * gradient.element_size()
        if size >= GRADIENT_BUCKET_BYTES:
            self._launch(scatters, axes, [(sharding, gradient)])
            return
        bucket = self._buckets.setdefault((scatters, axes), _GradientBucket())
        bucket.gradients.append((sharding, gradient))
        bucket.num_bytes += size
        if bucket.num_bytes >= GRADIENT_BUCKET_BYTES:
            self._launch(scatters, axes, self._buckets.pop((scatters, axes)).gradients)

    def _launch(
        self, scatters: bool, axes: tuple[int, ...], gradients: Sequence[tuple[ParameterSharding, Tensor]]
    ) -> None:
        """Start the reduction of these gradients in one message."""
        self._started.append((self._reduce_scatter if scatters else self._all_reduce)(axes, gradients))

    def _all_reduce(
        self, axes: tuple[int, ...], gradients: Sequence[tuple[ParameterSharding, Tensor]]
    ) -> StartedCollective:
        """Start to all-reduce these gradients in one message."""
        shapes = [(stored.value, total.shape) for stored, total in gradients]
        flat = _concatenate([total.reshape(-1) for _, total in gradients])
        group = self.mesh.group_names[_axes_above_one(axes, self.mesh)]

        def consume(result: Tensor) -> None:
            parts = result.view(-1).split([shape.numel() for _, shape in shapes])
            for (value, shape), part in zip(shapes, parts, strict=True):
                self._reduced[value] = part.view(shape)

        return StartedCollective(result=torch.ops._c10d_functional.all_reduce_(flat, "sum", group), consume=consume)

    def _reduce_scatter(
        self, axes: tuple[int, ...], gradients: Sequence[tuple[ParameterSharding, Tensor]]
    ) -> StartedCollective:
        """Start to reduce-scatter these gradients in one message: dim 0 of each is sharded over the group, padded to
        equal chunks."""
        degree, position = self.mesh.degree(axes), self.mesh.rank_in_group(axes)
        rows = [_pad_rows(total, degree).view(degree, -1) for _, total in gradients]
        parameters = [(stored, total.shape) for stored, total in gradients]
        widths = [row.shape[1] for row in rows]
        flat = _concatenate(rows, 1).view(-1)
        group = self.mesh.group_names[_axes_above_one(axes, self.mesh)]

        def consume(result: Tensor) -> None:
            for (stored, shape), part in zip(parameters, result.split(widths), strict=True):
                length = chunk_bounds(shape[0], degree, position)[1]
                self._begin_all_reduce(stored, part.view(-1, *shape[1:])[:length])

        result = torch.ops._c10d_functional.reduce_scatter_tensor(flat, "sum", degree, group)
        return StartedCollective(result=result, consume=consume, keep_alive=(flat,))


def begin_weight_gathers(
    pairs: Sequence[tuple[Tensor, Tensor]], mesh: RankMesh, axes: tuple[int, ...]
) -> list[StartedCollective]:
    """Start to gather weights over ``axes`` from their masters, whose dim 0 is sharded over them; ``pairs`` are
    (weight, master). The inverse of the gradients' reduce-scatter."""
    nontrivial_axes = _axes_above_one(axes, mesh)
    if not nontrivial_axes:
        for weight, master in pairs:
            weight.copy_(master)
        return []
    degree, group = mesh.degree(axes), mesh.group_names[nontrivial_axes]
    started: list[StartedCollective] = []
    bucket: list[tuple[Tensor, Tensor]] = []
    bucket_bytes = 0
    for weight, master in pairs:
        num_bytes = weight.numel() * weight.element_size()
        if num_bytes >= GRADIENT_BUCKET_BYTES and not weight.shape[0] % degree:
            rows = master.to(weight.dtype, copy=True)  # a copy, as the master may share the weight's memory
            result = torch.ops._c10d_functional.all_gather_into_tensor_out(rows, degree, group, out=weight)
            started.append(StartedCollective(result=result, consume=lambda _: None, keep_alive=(rows,)))
            continue
        bucket.append((weight, master))
        bucket_bytes += num_bytes
        if bucket_bytes >= GRADIENT_BUCKET_BYTES:
            started.append(_gather_bucket(bucket, degree, group))
            bucket, bucket_bytes = [], 0
    return started + ([_gather_bucket(bucket, degree, group)] if bucket else [])


def _gather_bucket(pairs: Sequence[tuple[Tensor, Tensor]], degree: int, group: str) -> StartedCollective:
    """One all-gather of several weights; rows are padded to equal chunks."""
    weights = [weight for weight, _ in pairs]
    rows = []
    for weight, master in pairs:
        chunk = -(-weight.shape[0] // degree)
        missing = master.new_zeros((chunk - master.shape[0], *master.shape[1:]), dtype=weight.dtype)
        rows.append(torch.cat((master.to(weight.dtype), missing)).view(-1))
    widths = [row.shape[0] for row in rows]
    flat = torch.cat(rows)

    def consume(result: Tensor) -> None:
        for weight, column in zip(weights, result.view(degree, -1).split(widths, dim=1), strict=True):
            weight.copy_(column.reshape(-1, *weight.shape[1:])[: weight.shape[0]])

    # without ``out`` it runs on lists of tensors, and gloo then corrupts the heap (see ``lower.schedule_nodes``)
    gathered = flat.new_empty(degree * flat.shape[0])
    result = torch.ops._c10d_functional.all_gather_into_tensor_out(flat, degree, group, out=gathered)
    return StartedCollective(result=result, consume=consume, keep_alive=(flat,))


def group_by_axes(pairs: Iterable[tuple[tuple[int, ...], T]]) -> dict[tuple[int, ...], list[T]]:
    """The items of ``pairs`` (axes, item) by axes: those that can share a collective."""
    groups: dict[tuple[int, ...], list[T]] = {}
    for axes, item in pairs:
        groups.setdefault(axes, []).append(item)
    return groups


def _pad_rows(tensor: Tensor, degree: int) -> Tensor:
    """The tensor with rows of zeros appended up to a multiple of ``degree``."""
    missing = -tensor.shape[0] % degree
    return torch.cat((tensor, tensor.new_zeros((missing, *tensor.shape[1:])))) if missing else tensor


def _concatenate(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors concatenated along a dim; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _axes_above_one(axes: tuple[int, ...], mesh: RankMesh) -> tuple[int, ...]:
    """Those of the axes that have several ranks: process groups are named by them."""
    return tuple(axis for axis in axes if mesh.sizes[axis] > 1)
