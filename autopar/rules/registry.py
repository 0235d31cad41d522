"""The table of rules: from the name of an op to its rule function.

A rule function takes (op, its input values, its output values) and returns the op's rule. An op without an entry is
pointwise if torch tags it so; any other is replicated (``OpShardingRule.is_known`` is False), and the report says so.
"""

from collections.abc import Callable, Sequence

from autopar.graph.ir import Op, Value
from autopar.rules import contractions, elementwise, lookups, losses, recurrent, reductions, views, windows
from autopar.rules.op_sharding_rule import OpShardingRule
from autopar.rules.rule_builder import replicated_rule

RuleFunction = Callable[[Op, Sequence[Value], Sequence[Value]], OpShardingRule]

FFT_TRANSFORMS = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
POOLS = ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
UPSAMPLES = (
    "nearest1d", "nearest2d", "nearest3d", "_nearest_exact1d", "_nearest_exact2d", "_nearest_exact3d", "linear1d",
    "bilinear2d", "bicubic2d", "trilinear3d",
)  # fmt: skip

RULES: dict[str, RuleFunction] = {
    **dict.fromkeys(("linear",), contractions.linear),
    **dict.fromkeys(("addmm",), contractions.addmm),
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "dot"), contractions.matmul),
    "baddbmm": contractions.baddbmm,
    **dict.fromkeys(("outer", "ger"), contractions.outer),
    "bilinear": contractions.bilinear,
    "einsum": contractions.einsum,
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), contractions.grouped_mm),
    "scaled_dot_product_attention": contractions.attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), contractions.convolution),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), views.reshape),
    **dict.fromkeys(
        ("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "mH", "numpy_T", "adjoint"),
        views.permute,
    ),
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "to", "_to_copy", "type_as"), views.copy_or_cast),
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), views.expand),
    **dict.fromkeys(("repeat", "tile"), views.repeat),
    "diagonal": views.diagonal,
    "diag_embed": views.diag_embed,
    **dict.fromkeys(("split", "chunk", "tensor_split", "unbind", "split_with_sizes"), views.split),
    **dict.fromkeys(("slice", "select", "narrow"), views.slice_or_select),
    **dict.fromkeys(("pad", "constant_pad_nd"), views.pad),
    **dict.fromkeys(("cat", "stack"), views.cat_or_stack),
    **dict.fromkeys(("layer_norm", "rms_norm", "_fused_rms_norm"), reductions.normalization),
    "group_norm": reductions.group_norm,
    "batch_norm": reductions.batch_norm,
    "instance_norm": windows.instance_norm,
    **dict.fromkeys(
        ("softmax", "_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk"),
        reductions.along_one_dim,
    ),
    **dict.fromkeys(
        (
            "logsumexp",
            "std",
            "var",
            "std_mean",
            "var_mean",
            "linalg_vector_norm",
            "norm",
            "prod",
            "any",
            "all",
            "median",
            "nanmedian",
            "mode",
            "kthvalue",
            "count_nonzero",
            "aminmax",
        ),
        reductions.over_replicated_dims,
    ),
    **dict.fromkeys((f"fft_{kind}{n}" for kind in FFT_TRANSFORMS for n in ("", "2", "n")), reductions.fft),
    "cdist": reductions.cdist,
    "cosine_similarity": reductions.cosine_similarity,
    **dict.fromkeys(("view_as_complex", "view_as_real"), views.complex_view),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent.recurrent),
    "glu": reductions.glu,
    "prelu": elementwise.prelu,
    **dict.fromkeys(("bucketize", "searchsorted"), elementwise.bucketize),
    **dict.fromkeys(("log_softmax", "_log_softmax"), reductions.log_softmax),
    **dict.fromkeys(("nll_loss", "nll_loss_nd"), losses.nll_loss),
    **dict.fromkeys(("sum", "mean"), reductions.sum_or_mean),
    **dict.fromkeys(("argmax", "argmin", "amax", "amin", "max", "min"), reductions.max_or_argmax),
    "embedding": lookups.embedding,
    "cross_entropy_loss": losses.cross_entropy,
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
        losses.elementwise_loss,
    ),
    **dict.fromkeys((f"{kind}_pool{n}d" for n in (1, 2, 3) for kind in POOLS), windows.pool),
    **dict.fromkeys((f"max_pool{n}d_with_indices" for n in (1, 2, 3)), windows.pool),
    **dict.fromkeys((f"upsample_{name}" for name in UPSAMPLES), windows.pool),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), windows.conv_transpose),
    **dict.fromkeys(("im2col", "col2im", "pixel_shuffle", "pixel_unshuffle"), windows.im2col_or_shuffle),
    "channel_shuffle": windows.channel_shuffle,
    "unfold": windows.unfold,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), windows.grid_sample),
    "index": lookups.index,
    "index_select": lookups.index_select,
    **dict.fromkeys(("slice_scatter", "select_scatter"), views.slice_scatter),
    "index_add": lookups.index_add,
    "histc": lookups.histc,
    **dict.fromkeys(("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce"), lookups.gather),
    "one_hot": lookups.one_hot,
    **dict.fromkeys(("flip", "roll", "tril", "triu", "repeat_interleave"), lookups.flip_roll_or_tril),
}
POINTWISE_OPS = frozenset(
    {"dropout", "gelu", "silu", "relu", "tanh", "where", "masked_fill", "copy", "fill", "full_like"}
)
POINTWISE_OPS |= {"feature_dropout", "rand_like", "randn_like", "bernoulli"}
POINTWISE_OPS |= {
    "zeros_like",
    "ones_like",
    "empty_like",
    "copy_",
    "add_",
    "mul_",
    "relu_",
    "silu_",
    "floor_divide",
    "broadcast_tensors",
    "hardswish",
    "log_sigmoid",
    "__and__",
    "__or__",
    "__xor__",
    "polar",
}
REPLICATED_OPS = frozenset({"index_put", "index_put_"})  # known, but never worth sharding: every rank runs it in full
FACTORY_OPS = frozenset(
    {"arange", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "new_empty", "empty", "scalar_tensor"}
)
FACTORY_OPS |= {"rand", "randn"}


def sharding_rule(op: Op, values: Sequence[Value]) -> OpShardingRule:
    """The rule of an op; ``values`` are those of its graph.

    >>> sharding_rule(linear, graph.values).roles  # x[b, s, k] w[n, k]  # doctest: +SKIP
    ((0, 'm'), (1, 'm'), (2, 'n'), (3, 'k'))
    """
    inputs, outputs = [values[value] for value in op.inputs], [values[value] for value in op.outputs]
    name = op.packet
    if not inputs or name in FACTORY_OPS or name in REPLICATED_OPS:
        return replicated_rule(op, inputs, outputs, known=True)
    if name in ("max", "min") and len(inputs) == 2:
        return elementwise.pointwise(op, inputs, outputs)
    if name in RULES:
        return RULES[name](op, inputs, outputs)
    if name in POINTWISE_OPS or _is_tagged_pointwise(op.target):
        return elementwise.pointwise(op, inputs, outputs)
    return replicated_rule(op, inputs, outputs, known=False)


def _is_tagged_pointwise(target: str) -> bool:
    """Whether torch tags an op as pointwise; torch is imported only for an op that has no entry."""
    import torch

    from autopar.graph.op_arguments import resolve_overload

    try:
        overload = resolve_overload(target)
    except AttributeError:
        return False
    return torch.Tag.pointwise in getattr(overload, "tags", ())
