"""Every option of ops that the models lack, or have in one form only, against the unsharded op (see ``rule_oracle``)."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.graph.trace import TracedGraph, trace
from autopar.rules.registry import sharding_rule
from autopar.workload import Workload
from tests.unit.option_faults import wrong_options

torch.set_num_threads(1)
Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """``forward(a linear of x, labels, w, b)``; w and b are parameters, so gradients of all float inputs are checked."""

    def __init__(self, forward: Forward, x: int, w: tuple[int, ...], b: int) -> None:
        super().__init__()
        self.project = nn.Linear(x, x)
        self.w, self.b = nn.Parameter(torch.empty(w)), nn.Parameter(torch.empty(b))
        self.function = forward

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.function(self.project(x), labels, self.w, self.b)
        return y if y.dim() == 0 else y.sum()


def traced(forward: Forward, x: tuple[int, ...], w: tuple[int, ...], b: int) -> TracedGraph:
    load = Workload(
        build_model=lambda: Model(forward, x[-1], w, b),
        example_inputs=lambda batch_size: {
            "x": torch.empty(batch_size, *x),
            "labels": torch.empty(batch_size, dtype=torch.long),
        },
    )
    return trace(load, dtype="float32")


CASES: dict[str, tuple[Forward, tuple[int, ...], tuple[int, ...], int]] = {
    "cross_entropy_ignored": (lambda x, t, w, b: F.cross_entropy(x * b, t, ignore_index=1), (12,), (1,), 12),
    "cross_entropy_smooth": (lambda x, t, w, b: F.cross_entropy(x * b, t, label_smoothing=0.1), (12,), (1,), 12),
    "cross_entropy_sum": (lambda x, t, w, b: F.cross_entropy(x, t, ignore_index=0, reduction="sum"), (8,), (1,), 1),
    "cross_entropy_none": (lambda x, t, w, b: F.cross_entropy(x, t, ignore_index=0, reduction="none"), (8,), (1,), 1),
    "cross_entropy_weighted": (lambda x, t, w, b: F.cross_entropy(x, t, weight=b.detach()), (12,), (1,), 12),
    "cross_entropy_weighted_smooth": (
        lambda x, t, w, b: F.cross_entropy(x, t, weight=b.detach(), ignore_index=1, label_smoothing=0.1), (12,), (1,), 12,
    ),
    "nll_ignored": (lambda x, t, w, b: F.nll_loss(F.log_softmax(x, 1), t, ignore_index=1), (12,), (1,), 1),
    "nll_sum": (lambda x, t, w, b: F.nll_loss(F.log_softmax(x, -1), t, reduction="sum"), (8,), (1,), 1),
    "log_softmax_inner": (lambda x, t, w, b: F.log_softmax(x, 1) * b, (4, 8), (1,), 8),
    "mse": (lambda x, t, w, b: F.mse_loss(x * b, (x * b).detach() + 1), (4, 8), (1,), 8),
    "mean": (lambda x, t, w, b: (x * b).mean((1, 2)), (4, 8), (1,), 8),
    "mean_all": (lambda x, t, w, b: (x * b).mean(), (4, 8), (1,), 8),
    "mean_of_no_dim": (lambda x, t, w, b: x.mean(dim=()) * b, (4, 8), (1,), 8),
    "sum_of_no_dim": (lambda x, t, w, b: x.sum(dim=()) * b + x.sum(dim=(), keepdim=True), (4, 8), (1,), 8),
    "mean_keep": (lambda x, t, w, b: x * x.mean(-1, keepdim=True), (4, 8), (1,), 8),
    "amax": (lambda x, t, w, b: x.amax(1) * b, (4, 8), (1,), 8),
    "bias": (lambda x, t, w, b: F.linear(x, w, b), (4, 8), (12, 8), 12),
    "vector_weight": (lambda x, t, w, b: F.linear(x, b) * F.linear(x, b, w[0, 0]), (4, 8), (8, 8), 8),
    "broadcast_bias": (lambda x, t, w, b: F.linear(x, w, b) + F.linear(x, w, w[0, 0]), (4, 8), (12, 8), 1),
    "matmul": (lambda x, t, w, b: x @ w, (4, 8), (8, 12), 1),
    "matmul_batched": (lambda x, t, w, b: (x @ x.transpose(-1, -2)).softmax(-1) @ x, (2, 4, 8), (1,), 1),
    "einsum": (lambda x, t, w, b: torch.einsum("bsk,ksn->bn", x, w), (4, 8), (8, 4, 12), 1),
    "conv": (lambda x, t, w, b: F.conv2d(x, w, b, stride=2, padding=1), (4, 6, 6), (8, 4, 3, 3), 8),
    "depthwise": (lambda x, t, w, b: F.conv2d(x, w, b, groups=8), (8, 6, 6), (8, 1, 3, 3), 8),
    "depthwise_double": (lambda x, t, w, b: F.conv2d(x, w, b, groups=4), (4, 6, 6), (8, 1, 3, 3), 8),
    "grouped_conv": (lambda x, t, w, b: F.conv2d(x, w, b, groups=2), (4, 6, 6), (8, 2, 3, 3), 8),
    "conv1d": (lambda x, t, w, b: F.conv1d(x, w, b), (4, 9), (8, 4, 3), 8),
    "group_norm": (lambda x, t, w, b: F.group_norm(x, 2, b, b), (8, 6), (1,), 8),
    "batch_norm": (lambda x, t, w, b: F.batch_norm(x, None, None, b, b, training=True), (8, 3, 3), (1,), 8),
    "batch_norm_flat": (lambda x, t, w, b: F.batch_norm(x, None, None, b, b, training=True), (8,), (1,), 8),
    "layer_norm_two": (lambda x, t, w, b: F.layer_norm(x, (4, 8), w, w), (2, 4, 8), (4, 8), 1),
    "rms_norm": (lambda x, t, w, b: F.rms_norm(x, (8,), b), (4, 8), (1,), 8),
    "max_pool": (lambda x, t, w, b: F.max_pool2d(x * w, 2), (8, 6, 6), (6,), 1),
    "avg_pool": (lambda x, t, w, b: F.adaptive_avg_pool2d(x * w, 1), (8, 6, 6), (6,), 1),
    "split_equal": (lambda x, t, w, b: torch.stack([p * b for p in x.chunk(3, -1)]), (4, 24), (1,), 8),
    "split_unequal": (lambda x, t, w, b: torch.cat([p * 2 for p in x.split([8, 4, 4], -1)], -1), (4, 16), (1,), 1),
    "unbind": (lambda x, t, w, b: x.unbind(1)[0] * x.unbind(1)[1], (2, 8), (1,), 1),
    "stack_last": (lambda x, t, w, b: torch.stack([x, x * b], -1), (4, 8), (1,), 8),
    "fused_qkv": (
        lambda x, t, w, b: F.scaled_dot_product_attention(
            *F.linear(x, w).view(-1, 8, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0), is_causal=True
        ),
        (8, 12), (48, 12), 1,
    ),
    "fused_qkv_split": (
        lambda x, t, w, b: F.scaled_dot_product_attention(
            *(p.view(-1, 8, 4, 4).transpose(1, 2) for p in F.linear(x, w).split(16, -1))
        ).transpose(1, 2).reshape(-1, 8, 16),
        (8, 12), (48, 12), 1,
    ),
    "attention_without_batch": (lambda x, t, w, b: F.scaled_dot_product_attention(w, w, w).sum() * x, (8,), (6, 8), 1),
    "attention_without_batch_masked": (
        lambda x, t, w, b: F.scaled_dot_product_attention(w, w * 2, w, attn_mask=w @ w.T).sum() * x, (8,), (6, 8), 1,
    ),
    "attention_without_heads": (lambda x, t, w, b: F.scaled_dot_product_attention(x, x, x * b), (6, 8), (1,), 8),
    "attention_of_more_dims": (
        lambda x, t, w, b: F.scaled_dot_product_attention(x[:, None], x[:, None] * b, x[:, None], is_causal=True),
        (4, 6, 8), (1,), 8,
    ),
    "attention_to_shared_keys": (
        lambda x, t, w, b: F.scaled_dot_product_attention(
            x.unflatten(-1, (4, 4)).transpose(1, 2), w[None, None], w[None, None] * b
        ),
        (8, 16), (6, 4), 4,
    ),
    "attention_of_shared_queries": (
        lambda x, t, w, b: F.scaled_dot_product_attention(
            w[None, None], *(x.unflatten(-1, (4, 4)).transpose(1, 2) * scale for scale in (2, b))
        ),
        (8, 16), (6, 4), 4,
    ),
    "slice": (lambda x, t, w, b: x[:, 1:5] * b, (8, 8), (1,), 8),
    "slice_to_one": (lambda x, t, w, b: x[:, :1] + x, (8, 8), (1,), 8),
    "select": (lambda x, t, w, b: x[:, 0] * b, (8, 8), (1,), 8),
    "pad": (lambda x, t, w, b: F.pad(x, (0, 0, 1, 1)) * b, (8, 8), (1,), 8),
    "pad_moves": (lambda x, t, w, b: F.pad(x, (0, 0, 1, -1)) * b, (8, 8), (1,), 8),
    "pad_with_a_value": (lambda x, t, w, b: F.pad(x, (0, 0, 1, 1), value=2.0) * b, (8, 8), (1,), 8),
    "pad_with_a_value_at_last": (lambda x, t, w, b: F.pad(x, (1, -1), value=-1.0) * b, (8, 8), (1,), 8),
    "pad_reflected": (lambda x, t, w, b: F.pad(x, (1, 1, 2, 1), mode="reflect") * b, (4, 8, 8), (1,), 10),
    "pad_replicated": (lambda x, t, w, b: F.pad(x, (1, -1), mode="replicate") * b, (8, 8), (1,), 8),
    "pad_circular": (lambda x, t, w, b: F.pad(x, (2, -2), mode="circular") * b, (8, 8), (1,), 8),
    "expand": (lambda x, t, w, b: x.unsqueeze(1).expand(-1, 4, -1, -1) * b, (2, 8), (1,), 8),
    "cumsum": (lambda x, t, w, b: x.cumsum(1) * b, (4, 8), (1,), 8),
    "topk": (lambda x, t, w, b: x.topk(2, -1)[0] * x.sort(-1)[0][..., :2], (4, 8), (1,), 8),
    "flatten": (lambda x, t, w, b: x.flatten(1) * b, (4, 8), (1,), 32),
    "squeeze": (lambda x, t, w, b: x.mean(1, keepdim=True).squeeze(1) * b, (4, 8), (1,), 8),
    "rows": (lambda x, t, w, b: x * w[t], (8,), (8, 8), 1),
    "padded_embedding": (lambda x, t, w, b: x * F.embedding(t, w, padding_idx=1), (8,), (8, 8), 1),
    "embedding_by_frequency": (lambda x, t, w, b: x * F.embedding(t, w, scale_grad_by_freq=True), (8,), (8, 8), 1),
    "one_hot": (lambda x, t, w, b: x * F.one_hot(t, 8), (8,), (1,), 1),
    "gather": (lambda x, t, w, b: x.gather(1, t.unsqueeze(1)), (8,), (1,), 1),
    "scatter": (lambda x, t, w, b: torch.zeros_like(x).scatter(2, x.argmax(-1, True), 1.0) * b + x, (4, 8), (1,), 8),
    "scatter_add": (lambda x, t, w, b: (x * b).scatter_add(1, x.argsort(1), x), (4, 8), (1,), 8),
    "gather_inner": (lambda x, t, w, b: x.gather(1, x.argsort(1)) * b, (4, 8), (1,), 8),
    "roll": (lambda x, t, w, b: x.roll(1, 1) * b, (4, 8), (1,), 8),
    "masked": (lambda x, t, w, b: torch.where(x > 0, x, b) + x.masked_fill(x < 0, 0.0), (4, 8), (1,), 8),
    "flip": (lambda x, t, w, b: x.flip(1) * b, (4, 8), (1,), 8),
    "repeat": (lambda x, t, w, b: x.repeat_interleave(2, dim=1) * b, (4, 8), (1,), 8),
    "repeat_by_counts": (
        lambda x, t, w, b: x.repeat_interleave(torch.tensor([1, 2, 1, 1]), dim=1, output_size=5) * b, (4, 8), (1,), 8,
    ),
    "triangle": (lambda x, t, w, b: x.tril() * b, (8, 8), (1,), 8),
    "logsumexp": (lambda x, t, w, b: x.logsumexp(-1) * b, (4, 8), (1,), 4),
    "logsumexp_two": (lambda x, t, w, b: x - x.logsumexp((1, 2), keepdim=True), (4, 8), (1,), 1),
    "spread": (lambda x, t, w, b: x.std(-1, keepdim=True) * x * b + x.var(1, keepdim=True), (4, 8), (1,), 8),
    "vector_norm": (lambda x, t, w, b: F.normalize(x, dim=-1) * b / x.norm(), (4, 8), (1,), 8),
    "cumulative": (lambda x, t, w, b: x.cumprod(1) * b + x.cummax(1)[0] + x.logcumsumexp(2), (4, 8), (1,), 8),
    "order": (lambda x, t, w, b: (x.kthvalue(2, 1)[0] + x.median(1)[0]) * b, (4, 8), (1,), 8),
    "any": (lambda x, t, w, b: x * (x > 0).any(-1, keepdim=True) * b * x.prod(1, keepdim=True), (4, 8), (1,), 8),
    "einsum_three": (lambda x, t, w, b: torch.einsum("bsk,kn,n->bsn", x, w, b), (4, 8), (8, 12), 12),
    "einsum_dots": (lambda x, t, w, b: torch.einsum("...k,kn->...n", x, w), (4, 8), (8, 12), 1),
    "einsum_implicit": (lambda x, t, w, b: torch.einsum("bsk,kn", x, w), (4, 8), (8, 12), 1),
    "einsum_diagonal": (lambda x, t, w, b: torch.einsum("bss->bs", x), (8, 8), (1,), 1),
    "vector": (lambda x, t, w, b: x @ b, (4, 8), (1,), 8),
    "outer": (lambda x, t, w, b: x.unsqueeze(-1) * torch.outer(b, b), (4, 8), (1,), 8),
    "bilinear": (lambda x, t, w, b: F.bilinear(x, x, w, b), (4, 8), (6, 8, 8), 6),
    "addmm": (lambda x, t, w, b: torch.addmm(x @ w, torch.addmm(b, x, w), w, beta=0.5), (8,), (8, 8), 8),
    "baddbmm": (lambda x, t, w, b: torch.baddbmm(x, x, x.transpose(1, 2)), (8, 8), (1,), 1),
    "swaps": (lambda x, t, w, b: x.movedim(1, 2) * b + x.swapaxes(1, 2) + x.mT, (4, 8), (1,), 4),
    "repeats": (lambda x, t, w, b: x.repeat(1, 2, 1) * b + x.tile((1, 2, 1)), (4, 8), (1,), 8),
    "diagonal": (lambda x, t, w, b: torch.diag_embed(x.diagonal(dim1=1, dim2=2)) * b, (8, 8), (1,), 8),
    "windows": (lambda x, t, w, b: x.unfold(1, 3, 1) * b, (8, 8), (1,), 3),
    "columns": (lambda x, t, w, b: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2) * b, (4, 6, 6), (1,), 6),
    "upsample": (
        lambda x, t, w, b: F.interpolate(x, scale_factor=2) * b + F.interpolate(x, size=(12, 12), mode="bilinear"),
        (4, 6, 6), (1,), 12,
    ),
    "pixel_shuffle": (lambda x, t, w, b: F.channel_shuffle(F.pixel_shuffle(x, 2), 2) * b, (8, 6, 6), (1,), 12),
    "pools": (lambda x, t, w, b: F.adaptive_max_pool2d(x, 2) * b + F.lp_pool2d(x, 2, 4), (4, 8, 8), (1,), 2),
    "pool_indices": (lambda x, t, w, b: F.max_pool2d(x, 2, return_indices=True)[0] * b, (4, 8, 8), (1,), 4),
    "pool_space": (lambda x, t, w, b: F.max_pool3d(x, 2) * b + F.avg_pool3d(x, 2), (4, 4, 4, 4), (1,), 2),
    "transposed": (lambda x, t, w, b: F.conv_transpose2d(x, w, b, stride=2), (4, 6, 6), (4, 8, 3, 3), 8),
    "transposed_groups": (lambda x, t, w, b: F.conv_transpose2d(x, w, b, groups=2), (4, 6, 6), (4, 4, 3, 3), 8),
    "conv_space": (lambda x, t, w, b: F.conv3d(x, w, b), (4, 4, 4, 4), (8, 4, 3, 3, 3), 8),
    "conv_of_no_sample": (lambda x, t, w, b: F.conv1d(w, w.view(8, 4, 1), b).sum() * x, (8,), (4, 8), 8),
    "depthwise_of_no_sample": (lambda x, t, w, b: F.conv1d(w, w[:, None, :3], groups=4).sum() * x, (8,), (4, 8), 1),
    "transposed_of_no_sample": (lambda x, t, w, b: F.conv_transpose1d(w, w.view(4, 8, 1), b).sum() * x, (8,), (4, 8), 8),
    "pools_of_no_sample": (lambda x, t, w, b: F.max_pool1d(w, 2).sum() * F.adaptive_avg_pool1d(w, 2).sum() * x, (8,), (4, 8), 1),
    "instance_norm": (lambda x, t, w, b: F.instance_norm(x, weight=b, bias=b), (8, 6), (1,), 8),
    "grid_sample": (
        lambda x, t, w, b: F.grid_sample(x, x[:, :2, :3, :3].permute(0, 2, 3, 1).tanh(), align_corners=False) * b,
        (4, 6, 6), (1,), 3,
    ),
    "glu": (lambda x, t, w, b: F.glu(F.prelu(x, b), -1) + F.hardswish(x[..., :4]), (4, 8), (1,), 4),
    "buckets": (
        lambda x, t, w, b: x * torch.bucketize(x.detach(), torch.linspace(-1, 1, 5)) * b
        + torch.searchsorted(torch.linspace(-1, 1, 5), x.detach()),
        (4, 8), (1,), 8,
    ),
    "index_select": (lambda x, t, w, b: x.index_select(1, torch.tensor([0, 2, 1])) * w[t][:, None], (4, 8), (8, 8), 1),
    "take_along": (lambda x, t, w, b: torch.take_along_dim(x, x.argsort(1), 1) * b, (4, 8), (1,), 8),
    "index_add": (lambda x, t, w, b: x.index_add(1, torch.tensor([0, 2, 1, 1]), x) * b, (4, 8), (1,), 8),
    "index_pairs": (lambda x, t, w, b: x[torch.arange(x.shape[0]), t] * x[:, [0, 2, 3]][:, 0] * b, (8, 8), (1,), 8),
    "cross_entropy_rows": (lambda x, t, w, b: F.cross_entropy(x, t[:, None].expand(-1, 8), ignore_index=1), (4, 8), (1,), 1),
    "nll_rows": (lambda x, t, w, b: F.nll_loss(F.log_softmax(x, 1), t[:, None].expand(-1, 8)), (4, 8), (1,), 1),
    "kl": (lambda x, t, w, b: F.kl_div(x, x.detach().exp(), reduction="sum") + F.kl_div(x, x.detach().exp()), (8,), (1,), 8),
    "huber": (lambda x, t, w, b: F.huber_loss(x * b, x.detach() + 1), (8,), (1,), 8),
    "bce": (
        lambda x, t, w, b: F.binary_cross_entropy(x.sigmoid(), (x > 0).to(x.dtype))
        + F.binary_cross_entropy_with_logits(x * b, (x > 0).to(x.dtype)),
        (8,), (1,), 8,
    ),
    "cosine": (lambda x, t, w, b: F.cosine_similarity(x, x * b, dim=-1), (4, 8), (1,), 8),
    "distances": (lambda x, t, w, b: torch.cdist(x, x * b), (4, 8), (1,), 8),
    "fourier": (lambda x, t, w, b: torch.fft.rfft(x, dim=-1).abs() * b, (4, 8), (1,), 5),
    "complex": (
        lambda x, t, w, b: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)))).flatten(-2) * b,
        (4, 8), (1,), 8,
    ),
    "written": (
        lambda x, t, w, b: x.slice_scatter(x[:, :2] * b, 1, 0, 2) + x.select_scatter(x[:, 1] * b, 1, 0), (4, 8), (1,), 8,
    ),
    "scaled": (lambda x, t, w, b: -(x * 2.0) * b + torch.true_divide(x, 3.0), (4, 8), (1,), 8),
    "division_down": (lambda x, t, w, b: torch.div(x, 3.0, rounding_mode="floor") * b + x, (4, 8), (1,), 8),
    "division_to_zero": (lambda x, t, w, b: torch.div(x, 0.3, rounding_mode="trunc") * b + x, (4, 8), (1,), 8),
    "divided_by_floor": (lambda x, t, w, b: (x.detach() // 0.3) * b + x, (4, 8), (1,), 8),
    "remainders": (lambda x, t, w, b: (x % 0.3) * b + x.fmod(0.3), (4, 8), (1,), 8),
    "to_integer": (lambda x, t, w, b: x.to(torch.int32) * b + x, (4, 8), (1,), 8),
    "to_truth": (lambda x, t, w, b: x.to(torch.bool).to(x.dtype) * b + x, (4, 8), (1,), 8),
    "logical": (lambda x, t, w, b: x * ((x > 0) & (x < 1) | x.isnan()).to(x.dtype) * b, (4, 8), (1,), 8),
}  # fmt: skip


class Recurrent(nn.Module):
    """An LSTM and a GRU of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.second = nn.GRU(8, 8, bidirectional=True)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden: Tensor = self.first(x)[0]
        out: Tensor = self.second(hidden.transpose(0, 1))[0]
        return out.sum()


def test_every_option_of_recurrent_layers() -> None:
    load = Workload(
        build_model=Recurrent,
        example_inputs=lambda batch_size: {
            "x": torch.empty(batch_size, 4, 8),
            "labels": torch.empty(batch_size, dtype=torch.long),
        },
    )
    faults, unknown, tried = wrong_options(trace(load, dtype="float32"))
    assert tried > 5
    assert not faults, "\n".join(faults[:6])
    assert not unknown


@pytest.mark.parametrize("name", CASES)
def test_every_option_of_the_op(name: str) -> None:
    faults, unknown, tried = wrong_options(traced(*CASES[name]))
    assert tried > 5
    assert not faults, "\n".join(faults[:6])
    assert not unknown


def test_a_shuffle_of_one_channel_shards_all_of_space() -> None:
    graph = traced(lambda x, t, w, b: F.channel_shuffle(x[:, :1], 1) * b, (4, 6, 6), (1,), 6).graph
    (op,) = [op for op in graph.ops if op.packet == "channel_shuffle"]
    rule = sharding_rule(op, graph.values)
    batch, _, *space = rule.output_labels[0]
    assert [rule.label_kinds[label] for label in (batch, *space)] == ["parallel"] * 3
