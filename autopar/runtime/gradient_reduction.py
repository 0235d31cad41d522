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
from autopar.runtime.lower.rank_mesh import Mesh
from autopar.runtime.lower.stage_program import StageParameter

T = TypeVar("T")
BUCKET_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Started:
    """A collective under way: ``use`` takes its result when it is there; ``held`` must live until then."""

    result: Tensor
    use: Callable[[Tensor], None]
    held: tuple[Tensor, ...] = ()

    def finish(self) -> None:
        """Wait for it."""
        self.use(torch.ops._c10d_functional.wait_tensor(self.result))


@dataclass(slots=True, kw_only=True, eq=False)
class _Bucket:
    """Gradients that wait for company."""

    gradients: list[tuple[StageParameter, Tensor]] = field(default_factory=list)
    num_bytes: int = 0


class Reduction:
    """One stage's reduction of a step, on one rank."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._buckets: dict[tuple[bool, tuple[int, ...]], _Bucket] = {}
        self._started: list[Started] = []
        self._found: dict[int, Tensor] = {}

    def begin(self, stored: StageParameter, total: Tensor) -> None:
        """Take a gradient, the sum over micro-batches of this rank's terms; its memory is given up."""
        if stored.zero == 1 and self.mesh.degree(stored.zero_axes) > 1:
            self._add(True, stored.zero_axes, stored, total)
        else:
            self._begin_sum(stored, total)

    def finish(self) -> dict[int, Tensor]:
        """The reduced gradients of all parameters, by value."""
        for scatters in (True, False):  # what a scatter leaves may have to be summed over other axes
            for (scattered, axes), bucket in list(self._buckets.items()):
                if scattered == scatters:
                    self._launch(scattered, axes, bucket.gradients)
                    del self._buckets[scattered, axes]
            started, self._started = self._started, []
            for one in started:
                one.finish()
        found, self._found = self._found, {}
        return found

    def _begin_sum(self, stored: StageParameter, total: Tensor) -> None:
        """Sum over the axes on which the gradient is still a term when ZeRO has cut it."""
        axes = tuple(
            axis
            for axis, placement in enumerate(stored.gradient)
            if placement == PARTIAL and axis not in stored.zero_axes and self.mesh.sizes[axis] > 1
        )
        if axes:
            self._add(False, axes, stored, total)
        else:
            self._found[stored.value] = total

    def _add(self, scatters: bool, axes: tuple[int, ...], stored: StageParameter, total: Tensor) -> None:
        size = total.numel() * total.element_size()
        if size >= BUCKET_BYTES:
            self._launch(scatters, axes, [(stored, total)])
            return
        bucket = self._buckets.setdefault((scatters, axes), _Bucket())
        bucket.gradients.append((stored, total))
        bucket.num_bytes += size
        if bucket.num_bytes >= BUCKET_BYTES:
            self._launch(scatters, axes, self._buckets.pop((scatters, axes)).gradients)

    def _launch(self, scatters: bool, axes: tuple[int, ...], alike: Sequence[tuple[StageParameter, Tensor]]) -> None:
        self._started.append((self._scatter if scatters else self._sum)(axes, alike))

    def _sum(self, axes: tuple[int, ...], alike: Sequence[tuple[StageParameter, Tensor]]) -> Started:
        shapes = [(stored.value, total.shape) for stored, total in alike]
        flat = _joined([total.reshape(-1) for _, total in alike])
        group = self.mesh.groups[_real(axes, self.mesh)]

        def use(result: Tensor) -> None:
            parts = result.view(-1).split([shape.numel() for _, shape in shapes])
            for (value, shape), part in zip(shapes, parts, strict=True):
                self._found[value] = part.view(shape)

        return Started(result=torch.ops._c10d_functional.all_reduce_(flat, "sum", group), use=use)

    def _scatter(self, axes: tuple[int, ...], alike: Sequence[tuple[StageParameter, Tensor]]) -> Started:
        """Dim 0 of every tensor is cut into as many chunks as the group has ranks."""
        degree, place = self.mesh.degree(axes), self.mesh.index(axes)
        rows = [_padded(total, degree).view(degree, -1) for _, total in alike]
        parameters = [(stored, total.shape) for stored, total in alike]
        widths = [row.shape[1] for row in rows]
        flat = _joined(rows, 1).view(-1)
        group = self.mesh.groups[_real(axes, self.mesh)]

        def use(result: Tensor) -> None:
            for (stored, shape), part in zip(parameters, result.split(widths), strict=True):
                length = chunk_bounds(shape[0], degree, place)[1]
                self._begin_sum(stored, part.view(-1, *shape[1:])[:length])

        result = torch.ops._c10d_functional.reduce_scatter_tensor(flat, "sum", degree, group)
        return Started(result=result, use=use, held=(flat,))


def gather_begun(pairs: Sequence[tuple[Tensor, Tensor]], mesh: Mesh, axes: tuple[int, ...]) -> list[Started]:
    """Begin to gather weights from their cut masters, (weight, master) each: the inverse of ``_scatter``."""
    degree, found, small, size = mesh.degree(axes), list[Started](), list[tuple[Tensor, Tensor]](), 0
    real = _real(axes, mesh)
    if not real:
        for weight, master in pairs:
            weight.copy_(master)
        return []
    group = mesh.groups[real]
    for weight, master in pairs:
        num_bytes = weight.numel() * weight.element_size()
        if num_bytes >= BUCKET_BYTES and not weight.shape[0] % degree:
            part = master.to(weight.dtype, copy=True)  # it may lie in the weight itself
            result = torch.ops._c10d_functional.all_gather_into_tensor_out(part, degree, group, out=weight)
            found.append(Started(result=result, use=lambda whole: None, held=(part,)))
            continue
        small.append((weight, master))
        size += num_bytes
        if size >= BUCKET_BYTES:
            found.append(_gather_bucket(small, degree, group))
            small, size = [], 0
    return found + ([_gather_bucket(small, degree, group)] if small else [])


def _gather_bucket(pairs: Sequence[tuple[Tensor, Tensor]], degree: int, group: str) -> Started:
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
    return Started(result=result, use=use, held=(flat,))


def grouped(pairs: Iterable[tuple[tuple[int, ...], T]]) -> dict[tuple[int, ...], list[T]]:
    """What shares a collective, by the axes that it runs over."""
    found: dict[tuple[int, ...], list[T]] = {}
    for axes, item in pairs:
        found.setdefault(axes, []).append(item)
    return found


def _padded(tensor: Tensor, degree: int) -> Tensor:
    """With rows of zeros up to a multiple of ``degree``."""
    missing = -tensor.shape[0] % degree
    return torch.cat((tensor, tensor.new_zeros((missing, *tensor.shape[1:])))) if missing else tensor


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _real(axes: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    return tuple(axis for axis in axes if mesh.sizes[axis] > 1)
