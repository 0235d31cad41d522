"""Batch norm over sharded samples (SyncBatchNorm): the statistics are those of all ranks' samples, and no activation but
the input is saved for the backward.

    m = sum x / n      v = sum (x - m)^2 / n      r = (v + eps)^-1/2      y = (x - m) r w + b
    dx = r w (g - sum g / n - (x - m) r^2 sum g (x - m) / n)      dw = r sum g (x - m)      db = sum g

Sums over samples and positions are all-reduced, two vectors of one number per channel in each of forward and backward; dw
and db are this rank's addends. Everything is computed in fp32 at least. x - m is recomputed wherever it is needed;
operations under ``annotate_in_place`` run in place in a lowered graph, so that one tensor besides the result is alive at a
time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.runtime.lower.in_place import annotate_in_place
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.redistribute_tensor import all_reduce


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    count: int,
    mesh: RankMesh,
    axes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, m, v) of (n, c, ...) local samples, sharded over ``axes``; ``count`` is the number of elements per channel on all
    ranks of ``axes``, n in the formulas. m and v are (c,)."""
    y, mean, var = _SyncBatchNorm.apply(x, weight, bias, eps, count, mesh, tuple(axes))
    return y, mean, var


def _centered(x: Tensor, mean: Tensor, shape: Sequence[int]) -> Tensor:
    with annotate_in_place():
        return x.to(mean.dtype) - mean.view(shape)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, count, mesh, axes):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(x.dtype, torch.float32)
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        mean = all_reduce(x.to(wide).sum(dims), mesh, axes) / count
        centered = _centered(x, mean, shape)
        with annotate_in_place():
            square = centered * centered
        var = all_reduce(square.sum(dims), mesh, axes) / count
        root = torch.rsqrt(var + eps)
        y = _centered(x, mean, shape)
        with annotate_in_place():
            y = y * (root if weight is None else root * weight.to(wide)).view(shape)
        if bias is not None:
            with annotate_in_place():
                y = y + bias.to(wide).view(shape)
        ctx.save_for_backward(x, weight, mean, root)
        ctx.count, ctx.mesh, ctx.axes, ctx.bias = count, mesh, axes, bias is not None
        ctx.mark_non_differentiable(mean, var)
        return y.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx, gradient, *_):  # type: ignore[no-untyped-def]
        x, weight, mean, root = ctx.saved_tensors
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        wide = gradient.to(mean.dtype)
        centered = _centered(x, mean, shape)
        with annotate_in_place():
            product = centered * wide
        product_sum, gradient_sum = product.sum(dims), wide.sum(dims)
        weight_gradient = None if weight is None else (product_sum * root).to(weight.dtype)
        bias_gradient = gradient_sum.to(weight.dtype if weight is not None else x.dtype) if ctx.bias else None
        product_mean, gradient_mean = (
            all_reduce(each, ctx.mesh, ctx.axes) / ctx.count for each in (product_sum, gradient_sum)
        )
        correction = _centered(x, mean, shape)
        with annotate_in_place():
            correction = correction * (product_mean * root * root).view(shape)
        with annotate_in_place():
            x_gradient = wide - gradient_mean.view(shape)
        with annotate_in_place():
            x_gradient = x_gradient - correction
        with annotate_in_place():
            x_gradient = x_gradient * (root if weight is None else root * weight.to(root.dtype)).view(shape)
        return x_gradient.to(x.dtype), weight_gradient, bias_gradient, None, None, None, None
