"""The sum that a kernel exchanges by itself, differentiable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.runtime.mesh import Mesh
from autopar.runtime.move import all_reduce


def sum_over(local: Tensor, mesh: Mesh, axes: Sequence[int], *, partial_gradient: bool) -> Tensor:
    """The sum over the ranks of ``axes``, on each of them. ``partial_gradient``: what is made of the sum differs from
    rank to rank, so the gradient that comes back is one rank's term (and is summed, too)."""
    return _Sum.apply(local, mesh, tuple(axes), partial_gradient)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, mesh, axes, partial_gradient):  # type: ignore[no-untyped-def]
        ctx.mesh, ctx.axes, ctx.partial = mesh, axes, partial_gradient
        return all_reduce(local, mesh, axes)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        back = all_reduce(gradient, ctx.mesh, ctx.axes) if ctx.partial else gradient
        return back, None, None, None
