"""The collectives of a step's end: gradients are summed over ranks and cut, new weights are gathered.

Each begins when its tensors are there and is waited for at the end, so a gradient travels while the backward makes the
next one. A large tensor travels by itself and in place; small ones of the same axes share buckets of about
``BUCKET_BYTES``. Members of a group begin theirs in one order: that in which their backward makes the gradients.
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartedCollective:
    """A collective under way: ``use`` takes its result when it is there; ``held`` must live until then."""

    result: Tensor
    consume: Callable[[Tensor], None]
    keep_alive: tuple[Tensor, ...] = ()

    def wait(self) -> None:
        """Wait for it."""
        self.consume(torch.ops._c10d_functional.wait_tensor(self.result))


@dataclass(slots=True, kw_only=True, eq=False)
class _GradientBucket:
    """Gradients that wait for company."""

    gradients: list[tuple[ParameterSharding, Tensor]] = field(default_factory=list)
    num_bytes: int = 0


class GradientReduction:
    """One stage's reduction of a step, on one rank."""

    def __init__(self, mesh: RankMesh) -> None:
        self.mesh = mesh
        self._buckets: dict[tuple[bool, tuple[int, ...]], _GradientBucket] = {}
        self._started: list[StartedCollective] = []
        self._reduced: dict[int, Tensor] = {}

    def begin(self, sharding: ParameterSharding, gradient: Tensor) -> None:
        """Take a gradient, the sum over micro-batches of this rank's terms; its memory is given up."""
        if sharding.zero_stage == 1 and self.mesh.degree(sharding.zero_axes) > 1:
            self._add_to_bucket(True, sharding.zero_axes, sharding, gradient)
        else:
            self._begin_all_reduce(sharding, gradient)

    def finish(self) -> dict[int, Tensor]:
        """The reduced gradients of all parameters, by value."""
        for scatters in (True, False):  # what a scatter leaves may have to be summed over other axes
            for (scattered, axes), bucket in list(self._buckets.items()):
                if scattered == scatters:
                    self._launch(scattered, axes, bucket.gradients)
                    del self._buckets[scattered, axes]
            started, self._started = self._started, []
            for one in started:
                one.wait()
        found, self._reduced = self._reduced, {}
        return found

    def _begin_all_reduce(self, sharding: ParameterSharding, gradient: Tensor) -> None:
        """Sum over the axes on which the gradient is still a term when ZeRO has cut it."""
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
        self._started.append((self._reduce_scatter if scatters else self._all_reduce)(axes, gradients))

    def _all_reduce(
        self, axes: tuple[int, ...], gradients: Sequence[tuple[ParameterSharding, Tensor]]
    ) -> StartedCollective:
        shapes = [(stored.value, total.shape) for stored, total in gradients]
        flat = _concatenate([total.reshape(-1) for _, total in gradients])
        group = self.mesh.group_names[_axes_above_one(axes, self.mesh)]

        def use(result: Tensor) -> None:
            parts = result.view(-1).split([shape.numel() for _, shape in shapes])
            for (value, shape), part in zip(shapes, parts, strict=True):
                self._reduced[value] = part.view(shape)

        return StartedCollective(result=torch.ops._c10d_functional.all_reduce_(flat, "sum", group), consume=use)

    def _reduce_scatter(
        self, axes: tuple[int, ...], gradients: Sequence[tuple[ParameterSharding, Tensor]]
    ) -> StartedCollective:
        """Dim 0 of every tensor is cut into as many chunks as the group has ranks."""
        degree, place = self.mesh.degree(axes), self.mesh.rank_in_group(axes)
        rows = [_pad_rows(total, degree).view(degree, -1) for _, total in gradients]
        parameters = [(stored, total.shape) for stored, total in gradients]
        widths = [row.shape[1] for row in rows]
        flat = _concatenate(rows, 1).view(-1)
        group = self.mesh.group_names[_axes_above_one(axes, self.mesh)]

        def use(result: Tensor) -> None:
            for (stored, shape), part in zip(parameters, result.split(widths), strict=True):
                length = chunk_bounds(shape[0], degree, place)[1]
                self._begin_all_reduce(stored, part.view(-1, *shape[1:])[:length])

        result = torch.ops._c10d_functional.reduce_scatter_tensor(flat, "sum", degree, group)
        return StartedCollective(result=result, consume=use, keep_alive=(flat,))


def begin_weight_gathers(
    pairs: Sequence[tuple[Tensor, Tensor]], mesh: RankMesh, axes: tuple[int, ...]
) -> list[StartedCollective]:
    """Begin to gather weights from their cut masters, (weight, master) each: the inverse of ``_scatter``."""
    degree, found, small, size = mesh.degree(axes), list[StartedCollective](), list[tuple[Tensor, Tensor]](), 0
    real = _axes_above_one(axes, mesh)
    if not real:
        for weight, master in pairs:
            weight.copy_(master)
        return []
    group = mesh.group_names[real]
    for weight, master in pairs:
        num_bytes = weight.numel() * weight.element_size()
        if num_bytes >= GRADIENT_BUCKET_BYTES and not weight.shape[0] % degree:
            part = master.to(weight.dtype, copy=True)  # it may lie in the weight itself
            result = torch.ops._c10d_functional.all_gather_into_tensor_out(part, degree, group, out=weight)
            found.append(StartedCollective(result=result, consume=lambda whole: None, keep_alive=(part,)))
            continue
        small.append((weight, master))
        size += num_bytes
        if size >= GRADIENT_BUCKET_BYTES:
            found.append(_gather_bucket(small, degree, group))
            small, size = [], 0
    return found + ([_gather_bucket(small, degree, group)] if small else [])


def _gather_bucket(pairs: Sequence[tuple[Tensor, Tensor]], degree: int, group: str) -> StartedCollective:
    weights = [weight for weight, _ in pairs]
    rows = []
    for weight, master in pairs:
        chunk = -(-weight.shape[0] // degree)
        missing = master.new_zeros((chunk - master.shape[0], *master.shape[1:]), dtype=weight.dtype)
        rows.append(torch.cat((master.to(weight.dtype), missing)).view(-1))
    widths = [row.shape[0] for row in rows]
    flat = torch.cat(rows)

    def use(result: Tensor) -> None:
        for weight, column in zip(weights, result.view(degree, -1).split(widths, dim=1), strict=True):
            weight.copy_(column.reshape(-1, *weight.shape[1:])[: weight.shape[0]])

    whole = flat.new_empty(degree * flat.shape[0])  # given its memory: see ``order.arranged``
    result = torch.ops._c10d_functional.all_gather_into_tensor_out(flat, degree, group, out=whole)
    return StartedCollective(result=result, consume=use, keep_alive=(flat,))


def group_by_axes(pairs: Iterable[tuple[tuple[int, ...], T]]) -> dict[tuple[int, ...], list[T]]:
    """What shares a collective, by the axes that it runs over."""
    found: dict[tuple[int, ...], list[T]] = {}
    for axes, item in pairs:
        found.setdefault(axes, []).append(item)
    return found


def _pad_rows(tensor: Tensor, degree: int) -> Tensor:
    """With rows of zeros up to a multiple of ``degree``."""
    missing = -tensor.shape[0] % degree
    return torch.cat((tensor, tensor.new_zeros((missing, *tensor.shape[1:])))) if missing else tensor


def _concatenate(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _axes_above_one(axes: tuple[int, ...], mesh: RankMesh) -> tuple[int, ...]:
    return tuple(axis for axis in axes if mesh.sizes[axis] > 1)
