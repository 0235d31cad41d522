"""How an op runs on one rank's shards, so that its result is placed as its sharding says.

Most ops are called on the local tensors as they are. ``LOCAL_KERNELS`` lists the others: those with sizes among their
literals, those that average, and those that must know which part of a dim the rank has or must communicate along it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.core.local_shape import nested_shards
from autopar.graph.op_arguments import resolve_overload
from autopar.runtime.lower.batch_norm import sync_batch_norm
from autopar.runtime.lower.cross_entropy import token_losses
from autopar.runtime.lower.local_op import KernelContext, LocalOp, ResultAndBuffers
from autopar.runtime.lower.randomness import apply_dropout, normal, uniform

REDUCE_NONE, REDUCE_MEAN, REDUCE_SUM = 0, 1, 2  # torch's reductions


def run_op(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Any:
    """The op's local result: a tensor, a tuple of tensors, or ``ResultAndBuffers``."""
    kernel = LOCAL_KERNELS.get(local.packet)
    if kernel is not None:
        return kernel(local, tensors, context)
    if resolve_overload(local.op.target)._schema.is_mutable:
        return _run_in_place_op(local, tensors)
    return local.call(tensors)


def _run_in_place_op(local: LocalOp, tensors: Sequence[Tensor]) -> ResultAndBuffers:
    """An in-place op on a buffer, by its functional form; ``copy_`` converts its source to the buffer's dtype."""
    if local.packet == "copy_":
        result = tensors[1].to(tensors[0].dtype).expand_as(tensors[0])
    else:
        namespace, name, overload = local.op.target.split(".")
        functional = replace(local.op, target=f"{namespace}.{name.removesuffix('_')}.{overload}")
        result = replace(local, op=functional).call(tensors).to(tensors[0].dtype)
    return ResultAndBuffers(result=result, new_buffers={0: result})


def _reshape(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    return tensors[0].reshape(local.local_output_shape())


def _expand(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    return tensors[0].expand(local.local_output_shape())


def _copy(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """The second tensor with shape and dtype of the first; torch's own op has no derivative."""
    return tensors[1].to(tensors[0].dtype).expand(local.local_output_shape())


def _split(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> tuple[Tensor, ...]:
    dim = local.op.argument(2, "dim", 0)
    sizes = [local.local_output_shape(at)[dim] for at in range(len(local.output_shapes))]
    return tensors[0].split(sizes, dim)


def _linear(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    if len(tensors) > 2:
        return F.linear(tensors[0], tensors[1], local.zero_except_first(tensors[2], local.sharding.partial_axes()))
    return F.linear(tensors[0], tensors[1])


def _add_bias_once(bias_position: int) -> "LocalKernel":
    """A kernel that adds the bias, the input at ``bias_position``, on the first rank of those whose results are summed."""

    def run(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Any:
        inputs = list(tensors)
        if bias_position < len(inputs):
            inputs[bias_position] = local.zero_except_first(inputs[bias_position], local.sharding.partial_axes())
        return local.call(inputs)

    return run


def _convolution(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Any:
    groups = local.op.argument(6, "groups", 1)
    if len(tensors) > 2:
        tensors = (*tensors[:2], local.zero_except_first(tensors[2], local.sharding.partial_axes()))
    if groups > 1:  # depthwise: as many groups as this rank has channels
        return local.call(tensors, groups=groups * local.local_output_shape()[1] // local.output_shapes[0][1])
    return local.call(tensors)


def _mean(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """Over a sharded dim, this rank's addend: its mean, weighted by its share of the elements."""
    result = local.call(tensors)
    if not local.sharding.partial_axes():
        return result
    local_count = tensors[0].numel() / max(result.numel(), 1)
    count = prod(local.input_shapes[0]) / prod(local.output_shapes[0])
    return result * (local_count / count)


def _elementwise_loss(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """Of sharded elements, this rank's addend: a mean is weighted by its share of the elements."""
    result = local.call(tensors)
    reduction = local.op.argument(_REDUCTION_POSITION.get(local.packet, 2), "reduction", REDUCE_MEAN)
    if reduction != REDUCE_MEAN or not local.sharding.partial_axes():
        return result
    return result * (tensors[0].numel() / prod(local.input_shapes[0]))


_REDUCTION_POSITION = {"binary_cross_entropy": 3, "binary_cross_entropy_with_logits": 4}


def _embedding(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """With the vocabulary sharded, this rank's addend: the rows that it has, zeros for the others."""
    weight, ids = tensors
    padding = local.op.argument(2, "padding_idx", -1)
    if not nested_shards(local.sharding.inputs[0], 0):
        return local.call(tensors)
    local_ids, is_local = local.to_local_index(ids, 0, 0)
    if padding >= 0:  # the row of the padding gets no gradient
        is_trained = is_local & (ids != padding)
        rows = F.embedding(local_ids, weight)
        rows = torch.where(is_trained.unsqueeze(-1), rows, rows.detach())
    else:
        rows = F.embedding(local_ids, weight)
    return torch.where(is_local.unsqueeze(-1), rows, 0.0)


def _grouped_mm(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """torch's kernel has no fp64: there every expert multiplies all rows, and each row's own expert is selected."""
    rows, weights, *offsets = tensors
    if rows.dtype != torch.float64 or len(offsets) != 1 or rows.dim() != 2 or weights.dim() != 3:
        return local.call(tensors)
    (ends,) = offsets
    expert = torch.searchsorted(ends, torch.arange(len(rows), device=local.device, dtype=ends.dtype), right=True)
    is_own = expert.unsqueeze(0) == torch.arange(len(weights), device=local.device).unsqueeze(1)
    return (torch.matmul(rows, weights) * is_own.unsqueeze(-1).to(rows.dtype)).sum(0)


def _attention(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """With the queries sharded, the causal mask has the global positions of this rank's queries."""
    dropout = local.op.argument(4, "dropout_p", 0.0)
    if dropout > 0.0:
        return _attention_with_dropout(local, tensors, context, dropout)
    positions = len(local.input_shapes[0]) - 2
    if not (nested_shards(local.sharding.inputs[0], positions) and local.op.argument(5, "is_causal", False)):
        return local.call(tensors)
    rows = local.global_indices(0, positions)
    keys = torch.arange(local.input_shapes[1][positions], device=local.device)
    return local.call(tensors, attn_mask=rows.unsqueeze(1) >= keys.unsqueeze(0), is_causal=False)


def _attention_with_dropout(
    local: LocalOp, tensors: Sequence[Tensor], context: KernelContext, probability: float
) -> Tensor:
    """Attention written out, because its weights are dropped by their global index (sample, head, query, key)."""
    query, key, value = tensors[:3]
    heads, positions = query.dim() - 3, query.dim() - 2
    if key.shape[heads] != query.shape[heads]:
        repeats = query.shape[heads] // key.shape[heads]
        key, value = (tensor.repeat_interleave(repeats, heads) for tensor in (key, value))
    scale = local.op.argument(6, "scale")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    scores = (query @ key.transpose(-1, -2)) * scale
    rows = local.global_indices(0, positions)
    columns = torch.arange(key.shape[positions], device=local.device)
    if local.op.argument(5, "is_causal", False):
        scores = scores.masked_fill(rows.unsqueeze(1) < columns.unsqueeze(0), -torch.inf)
    for mask in tensors[3:]:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    indices = [*(local.global_indices(0, dim) for dim in range(positions)), rows, columns]
    sizes = (*local.input_shapes[0][:-1], local.input_shapes[1][positions])
    weights = apply_dropout(scores.softmax(-1), indices, sizes, probability, context.random_key, local.op.id)
    return weights @ value


def _dropout(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    probability, training = local.op.args[1], local.op.args[2]
    if not training or probability == 0.0:
        return tensors[0]
    shape = local.input_shapes[0]
    indices = [local.global_indices(0, dim) for dim in range(len(shape))]
    return apply_dropout(tensors[0], indices, shape, probability, context.random_key, local.op.id)


def _feature_dropout(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """Dropout of all elements of a channel (n, c) together."""
    probability, training = local.op.args[1], local.op.args[2]
    if not training or probability == 0.0:
        return tensors[0]
    shape = local.input_shapes[0][:2]
    indices = [local.global_indices(0, dim) for dim in range(len(shape))]
    return apply_dropout(tensors[0], indices, shape, probability, context.random_key, local.op.id)


def _random_tensor(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """rand, randn, their ``_like`` forms, and bernoulli of a tensor of probabilities."""
    shape = local.output_shapes[0]
    if tensors:
        indices = [local.global_indices(0, dim) for dim in range(len(shape))]
    else:
        indices = [torch.arange(size, device=local.device) for size in shape]
    if local.packet.startswith("randn"):
        drawn = normal(indices, shape, context.random_key, local.op.id)
    else:
        drawn = uniform(indices, shape, context.random_key, local.op.id)
    if local.packet == "bernoulli":
        return (drawn < tensors[0].detach()).to(tensors[0].dtype)
    dtype = dict(local.op.kwargs).get("dtype")
    return drawn.to(getattr(torch, dtype) if dtype else tensors[0].dtype if tensors else torch.get_default_dtype())


def _cross_entropy(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """Tokens may be sharded, and the vocabulary (see ``cross_entropy``). With sharded tokens, this rank's addend: its losses
    over the number of all ranks' tokens that are not ignored, or over the sum of their classes' weights."""
    logits, target, *weights = tensors
    reduction = local.op.argument(3, "reduction", REDUCE_MEAN)
    ignored = local.op.argument(4, "ignore_index", -100)
    vocabulary = local.sharding.axes_sharding(local.sharding.rule.input_labels[0][1]) if logits.dim() == 2 else ()
    tokens = local.sharding.partial_axes()
    smoothing = local.op.argument(5, "label_smoothing", 0.0)
    if logits.dim() == 2 and not (weights and smoothing) and not target.is_floating_point():
        local_targets, is_local = local.to_local_index(target.clamp(min=0), 0, 1)
        losses = token_losses(
            logits,
            local_targets,
            is_local,
            smoothing=smoothing,
            num_classes=local.input_shapes[0][1],
            mesh=local.mesh,
            vocab_axes=vocabulary,
        )
        losses = torch.where(target == ignored, 0.0, losses)
        for weight in weights:
            losses = losses * weight[target.clamp(min=0)]
        if reduction == REDUCE_NONE:
            return losses
        total = losses.sum()
    elif not vocabulary and not tokens:
        return local.call(tensors)
    else:
        total = local.call(tensors, reduction=REDUCE_SUM)
    if reduction == REDUCE_SUM:
        return total
    targets = context.full_input(1) if tokens else target
    weight_of_token: Tensor = targets != ignored
    for weight in weights:
        weight_of_token = torch.where(weight_of_token, weight[targets.clamp(min=0)], 0.0)
    return total / weight_of_token.sum().to(total.dtype)


def _nll_loss(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Tensor:
    """With tokens or classes sharded, this rank's addend: the losses of its tokens whose targets are among its classes."""
    log_probabilities, target = tensors[:2]
    reduction = local.op.argument(3, "reduction", REDUCE_MEAN)
    ignored = local.op.argument(4, "ignore_index", -100)
    if reduction == REDUCE_NONE or not local.sharding.partial_axes():
        return local.call(tensors)
    if nested_shards(local.sharding.inputs[0], 1):
        local_targets, is_local = local.to_local_index(target.clamp(min=0), 0, 1)
        at_target = log_probabilities.gather(1, local_targets.unsqueeze(1)).squeeze(1)
        total = -torch.where(is_local & (target != ignored), at_target, 0.0).sum()
    else:
        total = local.call(tensors, reduction=REDUCE_SUM)
    if reduction == REDUCE_SUM:
        return total
    return total / (context.full_input(1) != ignored).sum().to(total.dtype)


def _batch_norm(local: LocalOp, tensors: Sequence[Tensor], context: KernelContext) -> Any:
    """Statistics are those of all samples of the micro-batch: with samples sharded, ``sync_batch_norm`` all-reduces sums."""
    op = local.op
    training, momentum, eps = op.args[5], op.args[6], op.args[7]
    positions = {name: op.args[at].index for at, name in _BATCH_NORM_TENSORS if op.args[at] is not None}
    if not training:
        return local.call(tensors)
    axes = local.sharding.axes_sharding(local.sharding.rule.input_labels[0][0])
    running = {name: tensors[positions[name]] for name in ("mean", "var") if name in positions}
    if not axes:
        written = [positions[name] for name in running]
        copies = [tensor.clone() if at in written else tensor for at, tensor in enumerate(tensors)]
        result = local.call(copies)
        return ResultAndBuffers(result=result, new_buffers={at: copies[at] for at in written})
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    count = prod(size for dim, size in enumerate(local.input_shapes[0]) if dim != 1)
    weight, bias = (tensors[positions[name]] if name in positions else None for name in ("weight", "bias"))
    result, mean, var = sync_batch_norm(tensors[0], weight, bias, eps=eps, count=count, mesh=local.mesh, axes=axes)
    latest = {"mean": mean, "var": var * (count / max(count - 1, 1))}
    return ResultAndBuffers(
        result=result,
        new_buffers={
            positions[name]: torch.lerp(old.to(wide), latest[name], momentum).to(old.dtype)
            for name, old in running.items()
        },
    )


_BATCH_NORM_TENSORS = ((1, "weight"), (2, "bias"), (3, "mean"), (4, "var"))

LocalKernel = Callable[[LocalOp, Sequence[Tensor], KernelContext], Any]
"""(op, its local input tensors, context) -> what ``run_op`` returns."""

LOCAL_KERNELS: dict[str, LocalKernel] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), _expand),
    "copy": _copy,
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), _split),
    "linear": _linear,
    **dict.fromkeys(("addmm", "baddbmm"), _add_bias_once(0)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _add_bias_once(2)),
    "bilinear": _add_bias_once(3),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    "mean": _mean,
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
        _elementwise_loss,
    ),
    "embedding": _embedding,
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), _grouped_mm),
    "scaled_dot_product_attention": _attention,
    "cross_entropy_loss": _cross_entropy,
    **dict.fromkeys(("nll_loss", "nll_loss_nd"), _nll_loss),
    "batch_norm": _batch_norm,
    "dropout": _dropout,
    "feature_dropout": _feature_dropout,
    **dict.fromkeys(("rand", "rand_like", "randn", "randn_like", "bernoulli"), _random_tensor),
}
"""By the op's name without namespace and overload."""
