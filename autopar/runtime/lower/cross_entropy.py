"""Cross entropy that reuses the memory of its logits, with the vocabulary sharded or not.

    m = max_j x_j    p_j = exp(x_j - m) / s    s = sum_j exp(x_j - m)    loss = log s - (x_t - m)
    d loss / d x_j = p_j - [j = t]

Maximum and sums are all-reduced where the vocabulary is sharded (Shoeybi et al., "Megatron-LM", 2019, section 3). Label
smoothing e puts a weight of e / V on every class and 1 - e on the target's. Everything is computed in fp32 at least. The
logits become differences, exponentials, probabilities (saved for the backward) and the gradient, all in one memory:
operations under ``annotate_in_place`` run in place in a lowered graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.runtime.lower.in_place import annotate_in_place
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.redistribute_tensor import all_reduce


def token_losses(
    logits: Tensor,
    local_targets: Tensor,
    is_local: Tensor,
    *,
    smoothing: float,
    num_classes: int,
    mesh: RankMesh,
    vocab_axes: Sequence[int],
) -> Tensor:
    """The (n,) losses of (n, v) local logits, v of the ``num_classes`` being on this rank.

    ``vocab_axes`` shard the vocabulary. ``local_targets`` (n,) are the targets' indices among this rank's classes, any where
    ``is_local`` (n,) is False: there another rank has the target."""
    return _TokenLosses.apply(logits, local_targets, is_local, smoothing, num_classes, mesh, tuple(vocab_axes))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, local_targets, is_local, smoothing, num_classes, mesh, vocab_axes):  # type: ignore[no-untyped-def]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        highest = wide.amax(-1)
        highest = all_reduce(highest, mesh, vocab_axes, "max").unsqueeze(-1)
        with annotate_in_place():
            shifted = wide - highest
        at_target = torch.where(is_local, shifted.gather(-1, local_targets.unsqueeze(-1)).squeeze(-1), 0.0)
        addends = [at_target, shifted.sum(-1)] if smoothing else [at_target]
        with annotate_in_place():
            exponentials = shifted.exp()
        sums = all_reduce(torch.stack([exponentials.sum(-1), *addends]), mesh, vocab_axes)
        with annotate_in_place():
            probabilities = exponentials / sums[0].unsqueeze(-1)
        ctx.save_for_backward(probabilities, local_targets, is_local)
        ctx.smoothing, ctx.num_classes, ctx.dtype = smoothing, num_classes, logits.dtype
        log_total = sums[0].log()
        losses = log_total - sums[1]
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * (log_total - sums[2] / num_classes)
        return losses.to(logits.dtype)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        probabilities, local_targets, is_local = ctx.saved_tensors
        gradient = gradient.to(probabilities.dtype)
        at_target = torch.where(is_local, gradient * (ctx.smoothing - 1), 0.0).unsqueeze(-1)
        with annotate_in_place():
            logits_gradient = probabilities * gradient.unsqueeze(-1)
        with annotate_in_place():
            logits_gradient = logits_gradient.scatter_add(-1, local_targets.unsqueeze(-1), at_target)
        if ctx.smoothing:
            with annotate_in_place():
                logits_gradient = logits_gradient - gradient.unsqueeze(-1) * (ctx.smoothing / ctx.num_classes)
        return logits_gradient.to(ctx.dtype), None, None, None, None, None, None
