"""Ops that CUDA runs as one fused kernel and the CPU does not: handwritten profiles, with their sources.

``HANDWRITTEN_PROFILES`` maps an op to a function of (op, inputs, outputs) that returns its profile and the strides of
its outputs; ``CUDA_SUBSTITUTES`` maps an op to the call that eager CUDA makes for it, which is then profiled like any
other.
"""

from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from autopar.graph.ir import Op, OpProfile, Value
from autopar.graph.kernel_recorder import attention_flops

HandwrittenProfile: TypeAlias = tuple[OpProfile, tuple[tuple[int, ...], ...]]  # with the strides of each output

ATTENTION_KERNELS = (1, 2)  # flash attention: forward one; backward the row sums of out * grad, then the gradients
NORM_KERNELS = (1, 2)  # _fused_rms_norm: backward is one kernel for the input and one for the weight


def flash_attention_profile(op: Op, inputs: list[Value], outputs: list[Value]) -> HandwrittenProfile:
    """Scaled dot product attention as flash attention, whatever the CPU would run (Dao et al. 2022, algorithms 1, 4).

    q (b, h, sq, d), k and v (b, hk, skv, d), with any number of leading dims, are saved, with the result and the fp32 log-sum-exp (b, h, sq). The
    kernel's own memory traffic is not counted, as matmul-like kernels are priced by their FLOPs; that of a mask tensor
    is: read in each pass and, if it has a gradient, written. Dropout inside saves two numbers (seed and offset) instead
    of a mask. The result is laid out as (b, sq, h, d), so its transpose back is a view.

    Example: b=1, h=2, s=8, d=4 gives 2,048 FLOPs forward and 5,120 backward, and saves 64 bytes of log-sum-exp.
    """
    query, key, value = (tensor.shape for tensor in inputs[:3])
    query = (*outputs[0].shape[:-1], query[-1])  # with the leading dims that it broadcasts to
    mask = inputs[3] if len(inputs) > 3 else None
    grad = outputs[0].requires_grad
    mask_bytes = prod(mask.shape) * mask.itemsize if mask is not None else 0
    profile = OpProfile(
        forward_flops=attention_flops(query, key, value),
        backward_flops=attention_flops(query, key, value, backward=True) if grad else 0,
        forward_bytes=mask_bytes,
        backward_bytes=mask_bytes * (2 if mask is not None and mask.requires_grad else 1) if grad else 0,
        forward_kernels=ATTENTION_KERNELS[0],
        backward_kernels=ATTENTION_KERNELS[1] if grad else 0,
        saved_inputs=tuple(range(len(inputs))) if grad else (),
        saved_outputs=(0,) if grad else (),
        saved_internal_tensors=((query[:-1], 4),) if grad else (),
    )
    *lead, length, width = outputs[0].shape
    *batch, heads = lead or [1]
    inner = (width, heads * width, 1)  # heads, length, width
    steps = [prod(batch[i + 1 :]) * heads * length * width for i in range(len(batch))]
    return profile, ((*steps, *inner)[-len(outputs[0].shape) :],)


def rms_norm_profile(op: Op, inputs: list[Value], outputs: list[Value]) -> HandwrittenProfile:
    """``aten.rms_norm`` as ``aten._fused_rms_norm``: saves its input, its weight and one fp32 number per row.

    The backward reads the gradient, the input and the weight, and writes the gradients of both."""
    hidden = inputs[0]
    sizes = [prod(value.shape) * value.itemsize for value in inputs]
    row_dims = len(op.args[1])
    rows = hidden.shape[: len(hidden.shape) - row_dims] + (1,) * row_dims
    grad = outputs[0].requires_grad
    written = sum(size for value, size in zip(inputs, sizes, strict=True) if value.requires_grad)
    profile = OpProfile(
        forward_flops=0,
        backward_flops=0,
        forward_bytes=sizes[0] + sum(sizes) + 4 * prod(rows),
        backward_bytes=sizes[0] + sum(sizes) + 4 * prod(rows) + written if grad else 0,
        forward_kernels=NORM_KERNELS[0],
        backward_kernels=min(NORM_KERNELS[1], sum(value.requires_grad for value in inputs)) if grad else 0,
        saved_inputs=tuple(range(len(inputs))) if grad else (),
        saved_outputs=(),
        saved_internal_tensors=((rows, 4),) if grad else (),
    )
    return profile, (tuple(prod(hidden.shape[i + 1 :]) for i in range(len(hidden.shape))),)


def native_dropout(hidden: Tensor, probability: float, train: bool) -> Any:
    """Dropout as CUDA runs it: one kernel that saves a mask of one byte per element
    (aten/src/ATen/native/Dropout.cpp)."""
    if not train or probability == 0:
        return hidden
    return torch.ops.aten.native_dropout.default(hidden, probability, train)[0]


HANDWRITTEN_PROFILES: dict[str, Callable[[Op, list[Value], list[Value]], HandwrittenProfile]] = {
    "aten.scaled_dot_product_attention": flash_attention_profile,
    "aten.rms_norm": rms_norm_profile,
}
CUDA_SUBSTITUTES: dict[str, Callable[..., Any]] = {"aten.dropout.default": native_dropout}
