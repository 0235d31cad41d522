"""The table of rules: an op's target to the function that makes its rule.

Total: an op without an entry is pointwise where torch tags it so, otherwise replicated (``known`` False, and reported).
"""

from collections.abc import Callable, Sequence

from autopar.graph.ir import Op, Value
from autopar.rules import contractions, elementwise, lookups, recurrent, views, windows
from autopar.rules.op_sharding_rule import OpRule
from autopar.rules.rule_builder import replicated

Maker = Callable[[Op, Sequence[Value], Sequence[Value]], OpRule]

FOURIER = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
POOLS = ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
UPSAMPLES = (
    "nearest1d", "nearest2d", "nearest3d", "_nearest_exact1d", "_nearest_exact2d", "_nearest_exact3d", "linear1d",
    "bilinear2d", "bicubic2d", "trilinear3d",
)  # fmt: skip

MAKERS: dict[str, Maker] = {
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
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "to", "_to_copy", "type_as"), views.same),
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), views.expand),
    **dict.fromkeys(("repeat", "tile"), views.repeat),
    "diagonal": views.diagonal,
    "diag_embed": views.diag_embed,
    **dict.fromkeys(("split", "chunk", "tensor_split", "unbind", "split_with_sizes"), views.split),
    **dict.fromkeys(("slice", "select", "narrow", "pad", "constant_pad_nd"), views.slices),
    **dict.fromkeys(("cat", "stack"), views.concatenate),
    **dict.fromkeys(("layer_norm", "rms_norm", "_fused_rms_norm"), elementwise.norm),
    "group_norm": elementwise.group_norm,
    "batch_norm": elementwise.batch_norm,
    "instance_norm": windows.instance_norm,
    **dict.fromkeys(
        ("softmax", "_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk"),
        elementwise.along,
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
        elementwise.over,
    ),
    **dict.fromkeys((f"fft_{kind}{n}" for kind in FOURIER for n in ("", "2", "n")), elementwise.transformed),
    "cdist": elementwise.pairs,
    "cosine_similarity": elementwise.cosine,
    **dict.fromkeys(("view_as_complex", "view_as_real"), views.complex_view),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent.recurrent),
    "glu": elementwise.glu,
    "prelu": elementwise.prelu,
    **dict.fromkeys(("bucketize", "searchsorted"), elementwise.looked_up),
    **dict.fromkeys(("log_softmax", "_log_softmax"), elementwise.log_softmax),
    **dict.fromkeys(("nll_loss", "nll_loss_nd"), elementwise.nll_loss),
    **dict.fromkeys(("sum", "mean"), elementwise.reduce),
    **dict.fromkeys(("argmax", "argmin", "amax", "amin", "max", "min"), elementwise.extremum),
    "embedding": lookups.embedding,
    "cross_entropy_loss": elementwise.cross_entropy,
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
        elementwise.loss,
    ),
    **dict.fromkeys((f"{kind}_pool{n}d" for n in (1, 2, 3) for kind in POOLS), windows.pool),
    **dict.fromkeys((f"max_pool{n}d_with_indices" for n in (1, 2, 3)), windows.pool),
    **dict.fromkeys((f"upsample_{name}" for name in UPSAMPLES), windows.pool),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), windows.transposed),
    **dict.fromkeys(("im2col", "col2im", "pixel_shuffle", "pixel_unshuffle"), windows.unfold),
    "channel_shuffle": windows.channel_shuffle,
    "unfold": windows.sliding,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), windows.grid_sample),
    "index": lookups.index,
    "index_select": lookups.index_select,
    **dict.fromkeys(("slice_scatter", "select_scatter"), views.written),
    "index_add": lookups.index_add,
    "histc": lookups.histogram,
    **dict.fromkeys(("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce"), lookups.gather),
    "one_hot": lookups.one_hot,
    **dict.fromkeys(("flip", "roll", "tril", "triu", "repeat_interleave"), lookups.mirrored),
}
POINTWISE = frozenset({"dropout", "gelu", "silu", "relu", "tanh", "where", "masked_fill", "copy", "fill", "full_like"})
POINTWISE |= {"feature_dropout", "rand_like", "randn_like", "bernoulli"}
POINTWISE |= {
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
WHOLE = frozenset({"index_put", "index_put_"})  # known, and of no use in pieces: every rank does it all
NOTHING = frozenset(
    {"arange", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "new_empty", "empty", "scalar_tensor"}
)
NOTHING |= {"rand", "randn"}


def rule_of(op: Op, values: Sequence[Value]) -> OpRule:
    """The rule of an op; ``values`` are the graph's.

    >>> rule_of(linear, graph.values).roles  # x[b, s, k] w[n, k]  # doctest: +SKIP
    ((0, 'm'), (1, 'm'), (2, 'n'), (3, 'k'))
    """
    inputs, outputs = [values[value] for value in op.inputs], [values[value] for value in op.outputs]
    name = op.packet
    if not inputs or name in NOTHING or name in WHOLE:
        return replicated(op, inputs, outputs, known=True)
    if name in ("max", "min") and len(inputs) == 2:
        return elementwise.pointwise(op, inputs, outputs)
    if name in MAKERS:
        return MAKERS[name](op, inputs, outputs)
    if name in POINTWISE or _tagged_pointwise(op.target):
        return elementwise.pointwise(op, inputs, outputs)
    return replicated(op, inputs, outputs, known=False)


def _tagged_pointwise(target: str) -> bool:
    import torch

    from autopar.graph.op_arguments import resolve

    try:
        overload = resolve(target)
    except AttributeError:
        return False
    return torch.Tag.pointwise in getattr(overload, "tags", ())
