"""Batch norm whose samples are cut: statistics are those of all ranks' samples, and nothing but the input is kept.

    m = sum x / n      v = sum (x - m)^2 / n      r = (v + eps)^-1/2      y = (x - m) r w + b
    dx = r w (g - sum g / n - (x - m) r^2 sum g (x - m) / n)      dw = r sum g (x - m)      db = sum g

Sums over samples and positions are exchanged, each way two vectors of one number a channel; dw and db are this rank's
terms. Everything is in fp32 at least. Differences are made again for the backward; operations marked ``overwriting``
run in place in a lowered graph, so one tensor beside the result is alive at a time.
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
    """(y, m, v) of (n, c, ...) local samples of ``count`` numbers a channel on all ranks of ``axes``."""
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
        difference = _centered(x, mean, shape)
        with annotate_in_place():
            square = difference * difference
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
        difference = _centered(x, mean, shape)
        with annotate_in_place():
            product = difference * wide
        along, total = product.sum(dims), wide.sum(dims)
        weight_gradient = None if weight is None else (along * root).to(weight.dtype)
        bias_gradient = total.to(weight.dtype if weight is not None else x.dtype) if ctx.bias else None
        along_all, total_all = (all_reduce(each, ctx.mesh, ctx.axes) / ctx.count for each in (along, total))
        back = _centered(x, mean, shape)
        with annotate_in_place():
            back = back * (along_all * root * root).view(shape)
        with annotate_in_place():
            left = wide - total_all.view(shape)
        with annotate_in_place():
            left = left - back
        with annotate_in_place():
            left = left * (root if weight is None else root * weight.to(root.dtype)).view(shape)
        return left.to(x.dtype), weight_gradient, bias_gradient, None, None, None, None
