"""Brute force for sharding options: run an op on every rank of an axis with plain tensors, put the results together, and
compare with the unsharded op, forward and backward, in fp64.

Shares nothing with planner or runtime: tensors are sharded and joined here by reshape and chunk, and ops whose local form is not
the op itself (a look-up in a part of the vocabulary, a mean over a part, statistics over ranks) are written out below over
the list of ranks, so that autograd sees the exchange.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.core.placement import PARTIAL
from autopar.graph.ir import Op, Value
from autopar.graph.op_arguments import call_arguments, resolve_overload
from autopar.rules.axis_options import AxisOption
from autopar.rules.dim_factors import DimFactor
from autopar.rules.op_sharding_rule import OpShardingRule
from autopar.rules.placement_pair import PARTIAL_VALUE, PlacementPair

RANDOM = frozenset({"dropout", "native_dropout"})
WIDE = torch.float64


def _blocks(tensor: Tensor, factor: DimFactor, ranks: int, rank: int) -> Tensor:
    """Rank's part of a full tensor: dim -> (pieces, size, rest), the middle split as DTensor splits (ceil)."""
    shape = tensor.shape
    split = tensor.reshape(*shape[: factor.dim], factor.split_factor, factor.size, -1, *shape[factor.dim + 1 :])
    step = -(-factor.size // ranks)
    part = split.narrow(factor.dim + 1, min(rank * step, factor.size), max(0, min(step, factor.size - rank * step)))
    return part.reshape(*shape[: factor.dim], -1, *shape[factor.dim + 1 :])


def shard(
    tensor: Tensor, pair: PlacementPair, ranks: int, generator: torch.Generator, *, gradient: bool
) -> list[Tensor]:
    """A tensor (or gradient) on every rank, as it is placed."""
    placement = pair.gradient if gradient else pair.forward
    if isinstance(placement, DimFactor):
        return [_blocks(tensor, placement, ranks, rank).clone() for rank in range(ranks)]
    if placement == PARTIAL:
        if not tensor.is_floating_point():
            parts = [torch.randint(-9, 9, tensor.shape, generator=generator) for _ in range(ranks - 1)]
        else:
            parts = [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for _ in range(ranks - 1)]
        return [*parts, tensor - sum(parts)]
    return [tensor.clone() for _ in range(ranks)]


def mismatch(parts: Sequence[Tensor], whole: Tensor, pair: PlacementPair, *, gradient: bool) -> str:
    """How the ranks' tensors differ from the full one, "" where they do not."""
    ranks = len(parts)
    placement = pair.gradient if gradient else pair.forward
    if isinstance(placement, DimFactor):
        wanted = [_blocks(whole, placement, ranks, rank) for rank in range(ranks)]
    elif placement == PARTIAL:
        parts, wanted = [torch.stack(list(parts)).sum(0)], [whole]
    else:
        wanted = [whole] * ranks
    for rank, (part, want) in enumerate(zip(parts, wanted, strict=True)):
        if part.shape != want.shape:
            return f"rank {rank} has shape {tuple(part.shape)}, not {tuple(want.shape)}"
        wide = torch.complex128 if want.is_complex() else WIDE
        if not torch.allclose(part.to(wide), want.to(wide), rtol=1e-7, atol=1e-9, equal_nan=True):
            return f"rank {rank} is off by {(part.to(WIDE) - want.to(WIDE)).abs().max():.3g}"
    return ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op with its values' nouns and its real inputs."""

    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    tensors: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return self.op.target.split(".")[1]

    def literal(self, position: int, name: str, default: Any) -> Any:
        return self.op.args[position] if position < len(self.op.args) else dict(self.op.kwargs).get(name, default)


def call(op: Op, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The op on real tensors, fp64 in place of other floats, nothing random, no input changed."""
    overload = resolve_overload(op.target)
    args, kwargs = call_arguments(op, [*tensors], overload._schema)
    args, kwargs = [_widened(a) for a in args], {name: _widened(a) for name, a in kwargs.items()}
    if op.target.split(".")[1] in RANDOM:
        args[1] = 0.0
    if op.target.startswith("aten.scaled_dot_product_attention") and len(args) > 4:
        args[4] = 0.0
    if op.target.startswith("aten.batch_norm"):
        args[3:5] = [None, None]
    if overload._schema.is_mutable:
        args[0] = args[0].clone()
    if "empty" in op.target:  # what is not initialised is zero here
        return (torch.zeros_like(tensors[0]),)
    result = overload(*args, **kwargs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _widened(argument: Any) -> Any:
    return WIDE if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


def check_option(case: Case, option: AxisOption, rule: OpShardingRule, ranks: int, seed: int = 0) -> str:
    """ "" where the option is right on ``ranks`` ranks, else what is wrong with it."""
    generator = torch.Generator().manual_seed(seed)
    whole = [
        tensor.detach().clone().requires_grad_(value.requires_grad)
        for tensor, value in zip(case.tensors, case.inputs, strict=True)
    ]
    results = call(case.op, whole)
    local: list[list[Tensor]] = [
        [part.requires_grad_(value.requires_grad) for part in shard(t.detach(), pair, ranks, generator, gradient=False)]
        for t, pair, value in zip(whole, option.inputs, case.inputs, strict=True)
    ]
    per_rank = [[parts[rank] for parts in local] for rank in range(ranks)]
    own = case.name in SIZED or not set(option.labels).isdisjoint(rule.local_form_labels)
    simulate = KERNELS[case.name] if own and case.name in KERNELS else _each
    try:
        outputs = simulate(case, option, per_rank)
    except (RuntimeError, IndexError, ValueError) as error:
        return f"cannot run: {str(error).splitlines()[0]}"
    for at, (result, pair) in enumerate(zip(results, option.outputs, strict=True)):
        if wrong := mismatch([rank[at].detach() for rank in outputs], result.detach(), pair, gradient=False):
            return f"output {at} as {pair}: {wrong}"
    wanted = [tensor for tensor in whole if tensor.requires_grad]
    carrying = [at for at, result in enumerate(results) if result.requires_grad]
    if not wanted or not carrying:
        return ""
    gradients = [torch.randn(results[at].shape, generator=generator, dtype=results[at].dtype) for at in carrying]
    whole_gradients = torch.autograd.grad([results[at] for at in carrying], wanted, gradients, allow_unused=True)
    ends, feeds = [], []
    for at, gradient in zip(carrying, gradients, strict=True):
        pair = option.outputs[at]
        parts = shard(gradient, pair, ranks, generator, gradient=True)
        if (
            option.runs_kernel_collectives and pair.factor is None
        ):  # autograd crosses ranks: the full loss is counted once
            parts = [parts[0], *(torch.zeros_like(part) for part in parts[1:])]
        ends += [outputs[rank][at] for rank in range(ranks)]
        feeds += parts
    leaves = [part for parts, tensor in zip(local, whole, strict=True) if tensor.requires_grad for part in parts]
    if not any(end.requires_grad for end in ends):
        return "no rank's output carries a gradient"
    live = [at for at, end in enumerate(ends) if end.requires_grad]
    found = torch.autograd.grad([ends[at] for at in live], leaves, [feeds[at] for at in live], allow_unused=True)
    local_gradients = [g if g is not None else torch.zeros_like(leaf) for g, leaf in zip(found, leaves, strict=True)]
    places = [at for at, tensor in enumerate(whole) if tensor.requires_grad]
    for number, (at, gradient) in enumerate(zip(places, whole_gradients, strict=True)):
        want = torch.zeros_like(whole[at]) if gradient is None else gradient
        parts = local_gradients[number * ranks : (number + 1) * ranks]
        if wrong := mismatch(parts, want, option.inputs[at], gradient=True):
            return f"gradient of input {at} as {option.inputs[at]}: {wrong}"
    return ""


Ranks = list[list[Tensor]]
Simulated = list[tuple[Tensor, ...]]


def _each(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    """The op itself on every rank."""
    return [call(case.op, tensors) for tensors in ranks]


def _local_shapes(case: Case, option: AxisOption, ranks: int, rank: int) -> list[tuple[int, ...]]:
    return [
        value.shape if pair.factor is None else tuple(_blocks(torch.empty(value.shape), pair.factor, ranks, rank).shape)
        for value, pair in zip(case.outputs, option.outputs, strict=True)
    ]


def _reshape(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    return [(t[0].reshape(_local_shapes(case, option, len(ranks), r)[0]),) for r, t in enumerate(ranks)]


def _expand(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    return [(t[0].expand(_local_shapes(case, option, len(ranks), r)[0]),) for r, t in enumerate(ranks)]


def _split(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    dim = case.literal(2, "dim", 0)
    return [
        tuple(t[0].split([shape[dim] for shape in _local_shapes(case, option, len(ranks), r)], dim))
        for r, t in enumerate(ranks)
    ]


def _bias_once(bias: int) -> Callable[[Case, AxisOption, Ranks], Simulated]:
    def simulate(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
        if option.outputs[0] == PARTIAL_VALUE and len(ranks[0]) > 2 and option.inputs[bias] != PARTIAL_VALUE:
            ranks = [[x * (r == 0) if at == bias else x for at, x in enumerate(t)] for r, t in enumerate(ranks)]
        return [call(_local_groups(case, tensors), tensors) for tensors in ranks]

    return simulate


def _local_groups(case: Case, tensors: list[Tensor]) -> Op:
    """A depthwise convolution on a rank has as many groups as channels there."""
    groups = case.literal(6, "groups", 1) if case.name.startswith("conv") else 1
    if groups == 1:
        return case.op
    return replace(case.op, args=(*case.op.args[:6], groups * tensors[1].shape[0] // case.tensors[1].shape[0]))


def _mean(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    """A partial mean is the rank's share of it: sums over its own elements, divided by the full count."""
    local = _each(case, option, ranks)
    if option.outputs[0] != PARTIAL_VALUE or not option.is_sharded:
        return local
    shares = [t[0].numel() / case.tensors[0].numel() for t in ranks]
    return [(result[0] * share,) for result, share in zip(local, shares, strict=True)]


def _starts(factor: DimFactor, ranks: int, rank: int, size: int) -> Tensor:
    return _blocks(
        torch.arange(size), DimFactor(dim=0, split_factor=factor.split_factor, size=factor.size), ranks, rank
    )


def _embedding(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    factor = option.inputs[0].factor
    if factor is None or factor.dim != 0:
        return _each(case, option, ranks)
    found = []
    for r, (weight, ids) in enumerate(ranks):
        rows = _starts(factor, len(ranks), r, case.inputs[0].shape[0])
        mine = ids.unsqueeze(-1) == rows
        hot = mine.to(WIDE)
        padding = case.literal(2, "padding_idx", -1)
        looked = hot @ weight
        found.append((torch.where((ids == padding).unsqueeze(-1), looked.detach(), looked),))
    return found


def _attention(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    position = len(case.inputs[0].shape) - 2
    factor = option.inputs[0].factor
    if not (factor is not None and factor.dim == position and case.literal(5, "is_causal", False)):
        return _each(case, option, ranks)
    found = []
    for r, tensors in enumerate(ranks):
        rows = _starts(factor, len(ranks), r, case.inputs[0].shape[position])
        mask = rows.unsqueeze(1) >= torch.arange(case.inputs[1].shape[position]).unsqueeze(0)
        kwargs = {k: v for k, v in case.op.kwargs if k in ("scale", "enable_gqa")}
        found.append((F.scaled_dot_product_attention(*tensors[:3], attn_mask=mask, **kwargs),))
    return found


def _cross_entropy(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    """Logits [.., v] in pieces of tokens or of the vocabulary; the mean is over all tokens that count."""
    if not option.is_sharded:
        return _each(case, option, ranks)
    reduction, ignored = case.literal(3, "reduction", 1), case.literal(4, "ignore_index", -100)
    smoothing = case.literal(5, "label_smoothing", 0.0)
    weights = case.tensors[2] if len(case.tensors) > 2 else torch.ones(case.inputs[0].shape[1], dtype=WIDE)
    of_target = weights[case.tensors[1].clamp(min=0)]
    count = torch.where(case.tensors[1] != ignored, of_target, 0.0).sum()
    factor = option.inputs[0].factor
    if option.runs_kernel_collectives:
        assert factor is not None
        size = case.inputs[0].shape[1]
        total = torch.stack([t[0].exp().sum(1) for t in ranks]).sum(0).log()
        rows = [_starts(factor, len(ranks), r, size) for r in range(len(ranks))]
        own = sum(((t[1].unsqueeze(1) == row) * t[0]).sum(1) for t, row in zip(ranks, rows, strict=True))
        uniform = sum(t[0].sum(1) for t in ranks) / size
        losses = (
            torch.where(ranks[0][1] == ignored, 0.0, total - (1 - smoothing) * own - smoothing * uniform) * of_target
        )
        result = losses if reduction == 0 else losses.sum() / (count if reduction == 1 else 1)
        return [(result,) for _ in ranks]
    losses = [F.cross_entropy(*t, reduction="none", ignore_index=ignored, label_smoothing=smoothing) for t in ranks]
    if reduction == 0:
        return [(loss,) for loss in losses]
    return [(loss.sum() / (count if reduction == 1 else 1),) for loss in losses]


def _nll_loss(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    """Log-probabilities [t, v] in pieces of tokens or of the vocabulary."""
    if not option.is_sharded:
        return _each(case, option, ranks)
    reduction, ignored = case.literal(3, "reduction", 1), case.literal(4, "ignore_index", -100)
    count = (case.tensors[1] != ignored).sum()
    factor = option.inputs[0].factor
    found = []
    for r, (logs, target) in enumerate(ranks):
        columns = torch.arange(case.inputs[0].shape[1])
        if factor is not None and factor.dim == 1:
            columns = _starts(factor, len(ranks), r, len(columns))
        own = -((target.unsqueeze(1) == columns.view(1, -1, *[1] * (target.dim() - 1))) * logs).sum(1)
        losses = torch.where(target == ignored, 0.0, own)
        found.append((losses if reduction == 0 else losses.sum() / (count if reduction == 1 else 1),))
    return found


def _loss(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    local = _each(case, option, ranks)
    position = {"binary_cross_entropy": 3, "binary_cross_entropy_with_logits": 4}.get(case.name, 2)
    if option.outputs[0] != PARTIAL_VALUE or case.literal(position, "reduction", 1) != 1:
        return local
    return [(out[0] * t[0].numel() / case.tensors[0].numel(),) for out, t in zip(local, ranks, strict=True)]


def _batch_norm(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    if not option.runs_kernel_collectives:
        return _each(case, option, ranks)
    places = [getattr(case.op.args[at], "index", None) for at in (1, 2)]
    dims = [0, *range(2, ranks[0][0].dim())]
    shape = [1, -1] + [1] * (ranks[0][0].dim() - 2)
    count = case.tensors[0].numel() / case.tensors[0].shape[1]
    mean = sum(t[0].sum(dims) for t in ranks) / count
    var = sum(((t[0] - mean.reshape(shape)) ** 2).sum(dims) for t in ranks) / count
    found = []
    for t in ranks:
        y = (t[0] - mean.reshape(shape)) / (var.reshape(shape) + case.op.args[7]).sqrt()
        weight, bias = (t[at] if at is not None else None for at in places)
        y = y * weight.reshape(shape) if weight is not None else y
        found.append((y + bias.reshape(shape) if bias is not None else y,))
    return found


def _softmax(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    """softmax or log_softmax with the dim itself sharded: the sum of exponentials is shared."""
    if not option.runs_kernel_collectives:
        return _each(case, option, ranks)
    dim = case.literal(1, "dim", -1)
    total = sum(t[0].to(WIDE).exp().sum(dim, keepdim=True) for t in ranks)
    if "log" in case.name:
        return [(t[0] - total.log(),) for t in ranks]
    return [(t[0].exp() / total,) for t in ranks]


def _index(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    """x[index]: where rows of x are sharded, a rank has zeros for the rows of others."""
    factor = option.inputs[0].factor
    if factor is None or factor.dim != 0:
        return _each(case, option, ranks)
    found = []
    for r, (x, index) in enumerate(ranks):
        rows = _starts(factor, len(ranks), r, case.inputs[0].shape[0]).tolist()
        where = {row: at for at, row in enumerate(rows)}
        mine = torch.tensor([where.get(i, -1) for i in index.flatten().tolist()]).reshape(index.shape)
        mask = (mine >= 0).reshape(*index.shape, *([1] * (x.dim() - 1)))
        found.append((torch.where(mask, x[mine.clamp(min=0)], 0.0),))
    return found


def _grouped_mm(case: Case, option: AxisOption, ranks: Ranks) -> Simulated:
    """Row t meets the matrix of the group that it belongs to; written as a loop over the local experts and rows."""
    num_experts, num_rows = case.inputs[1].shape[0], case.inputs[0].shape[0]
    ends = case.tensors[2].tolist()
    found = []
    for r, (x, w, *_) in enumerate(ranks):
        rows, experts = torch.arange(num_rows), torch.arange(num_experts)
        of_rows, of_experts = option.inputs[0].factor, option.inputs[1].factor
        if of_rows is not None and of_rows.dim == 0:
            rows = _starts(of_rows, len(ranks), r, num_rows)
        if of_experts is not None and of_experts.dim == 0:
            experts = _starts(of_experts, len(ranks), r, num_experts)
        result = torch.zeros(len(rows), w.shape[2], dtype=x.dtype)
        for at, expert in enumerate(experts.tolist()):
            start = ends[expert - 1] if expert else 0
            mine = ((rows >= start) & (rows < ends[expert])).unsqueeze(1)
            result = result + torch.where(mine, x @ w[at], 0.0)
        found.append((result,))
    return found


KERNELS: dict[str, Callable[[Case, AxisOption, Ranks], Simulated]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), _expand),
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), _split),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution"), _bias_once(2)),
    **dict.fromkeys(("addmm", "baddbmm"), _bias_once(0)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _bias_once(2)),
    "bilinear": _bias_once(3),
    "mean": _mean,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "cross_entropy_loss": _cross_entropy,
    "nll_loss_nd": _nll_loss,
    "nll_loss": _nll_loss,
    **dict.fromkeys(
        (
            "mse_loss",
            "l1_loss",
            "smooth_l1_loss",
            "huber_loss",
            "kl_div",
            "binary_cross_entropy",
            "binary_cross_entropy_with_logits",
            "soft_margin_loss",
        ),
        _loss,
    ),
    "batch_norm": _batch_norm,
    "index": _index,
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _grouped_mm),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _softmax),
}


# Ops with sizes among their literals: on a rank these follow from the shape of its part of the output.
SIZED = frozenset(name for name, kernel in KERNELS.items() if kernel in (_reshape, _expand, _split))


def ranks_to_try(option: AxisOption, rule: OpShardingRule) -> list[int]:
    """Axis sizes that split what the option shards into equal parts, and 3 where the search may shard unevenly."""
    if not option.is_sharded:
        return [2]
    plain = (
        len(option.labels) == 1
        and not rule.view_groups
        and rule.compute in ("matmul", "memory")
        and option.max_shards in (8, 16)
    )
    return [k for k in (2, 3, 4) if option.max_shards % k == 0 or (k == 3 and plain)]
