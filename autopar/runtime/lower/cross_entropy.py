"""Cross entropy that works in the memory of its logits, the vocabulary cut or not.

    m = max_j x_j    p_j = exp(x_j - m) / s    s = sum_j exp(x_j - m)    loss = log s - (x_t - m)
    d loss / d x_j = p_j - [j = t]

Maximum and sums are exchanged where the vocabulary is cut (Shoeybi et al., "Megatron-LM", 2019, section 3). Label
smoothing e puts a weight of e / V on every class and 1 - e on the target's. Everything is in fp32 at least. Logits
become differences, exponentials, probabilities (kept for the backward) and the gradient; ``overwriting`` marks the
operations whose input is dead, so a lowered graph runs them in its place.
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
    """(n,) losses of (n, v) logits, v of the ``num_classes`` on this rank: ``rows`` are the targets' places among
    those, ``mine`` says which targets lie there; ``axes`` cut the vocabulary."""
    return _TokenLosses.apply(logits, local_targets, is_local, smoothing, num_classes, mesh, tuple(vocab_axes))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, local_targets, is_local, smoothing, num_classes, mesh, vocab_axes):  # type: ignore[no-untyped-def]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        highest = wide.amax(-1)
        highest = all_reduce(highest, mesh, vocab_axes, "max").unsqueeze(-1)
        with annotate_in_place():
            shifted = wide - highest
        own = torch.where(is_local, shifted.gather(-1, local_targets.unsqueeze(-1)).squeeze(-1), 0.0)
        terms = [own, shifted.sum(-1)] if smoothing else [own]
        with annotate_in_place():
            exponentials = shifted.exp()
        sums = all_reduce(torch.stack([exponentials.sum(-1), *terms]), mesh, vocab_axes)
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
        probabilities, rows, mine = ctx.saved_tensors
        gradient = gradient.to(probabilities.dtype)
        target = torch.where(mine, gradient * (ctx.smoothing - 1), 0.0).unsqueeze(-1)
        with annotate_in_place():
            back = probabilities * gradient.unsqueeze(-1)
        with annotate_in_place():
            back = back.scatter_add(-1, rows.unsqueeze(-1), target)
        if ctx.smoothing:
            with annotate_in_place():
                back = back - gradient.unsqueeze(-1) * (ctx.smoothing / ctx.num_classes)
        return back.to(ctx.dtype), None, None, None, None, None, None
