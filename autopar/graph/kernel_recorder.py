"""FLOPs, bytes and launches of kernels: the recorder that profiles are made with.

Below autograd every aten call that is not a view launches kernels. ``KernelRecorder`` intercepts these calls on fake
tensors and adds up

    flops       of matmul-like calls (matmul, convolution, attention), by ``FLOP_FORMULAS`` and
                ``torch.utils.flop_counter``. A product with a vector (mv, dot) reads as many elements as it multiplies,
                so it is one of the other calls
    num_bytes   of all other calls: every tensor read once and every result written once. A broadcast dim (stride 0) is
                read once. Calls that touch only rows of a table (gathers, scatters) count those rows: see
                ``TRAFFIC_RULES``
    peak_bytes  the most bytes that are allocated inside and alive at once, results included
    kernels     launches of eager PyTorch on CUDA: one per call, or as in ``KERNELS_PER_CALL``; none for views and empty
                allocations

Example: ``y = x + 1`` with x of (4, 8) bfloat16 is 0 FLOPs, 64 + 64 bytes, 1 kernel.
"""

import weakref
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Tensors: TypeAlias = list[Tensor]
TrafficRule: TypeAlias = Callable[[Tensors, Tensors], int]  # (tensors read, tensors written) -> bytes

# Allocation and bookkeeping, which launch no kernel.
OPS_WITHOUT_KERNEL = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "detach"}
    | {"alias", "is_same_size", "_has_compatible_shallow_copy_type", "sym_size", "sym_stride", "sym_numel", "lift"}
)

# Launches per call on CUDA where there is more than one (aten/src/ATen/native/cuda of torch 2.13): gradients of weights
# take a kernel in addition to that for gradients of inputs (a convolution's output_mask says which are wanted), and
# gradients that touch only part of a tensor first fill it with zeros.
KERNELS_PER_CALL = {
    "native_layer_norm_backward": 2,
    "_fused_rms_norm_backward": 2,
    "native_group_norm": 2,
    "native_group_norm_backward": 3,
    "native_batch_norm_backward": 2,
    "nll_loss_backward": 2,
    "nll_loss2d_backward": 2,
    "slice_backward": 2,
    "select_backward": 2,
    "max_pool2d_with_indices_backward": 2,
    "embedding_dense_backward": 4,  # fill, sort the indices, count, add
    "index_put": 3,  # sort the indices, then add
    "_index_put_impl_": 3,
    "sort": 2,
    "topk": 2,
}

# Ops whose statistics CUDA stores in fp32 whatever the dtype of the activations; the CPU stores them in that dtype.
FP32_STATISTICS_OPS = frozenset({"layer_norm", "native_layer_norm", "group_norm", "batch_norm", "native_batch_norm"})


class KernelRecorder(TorchDispatchMode):
    """Adds up what runs inside its ``with`` block; on fake tensors, so that nothing is computed.

    >>> import torch
    >>> from torch._subclasses.fake_tensor import FakeTensorMode
    >>> with FakeTensorMode(), KernelRecorder() as recorder:
    ...     _ = torch.empty(4, 8) @ torch.empty(8, 2)
    >>> recorder.flops, recorder.num_bytes, recorder.kernels
    (128, 0, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.num_bytes = 0
        self.kernels = 0
        self.peak_bytes = 0
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

    def live_bytes(self) -> int:
        """Bytes of the storages that were allocated inside and are still alive."""
        self._live = {key: entry for key, entry in self._live.items() if entry[0]() is not None}
        return sum(num_bytes for _, num_bytes in self._live.values())

    def _record_allocations(self, read: Tensors, written: Tensors) -> None:
        known = {storage_key(tensor) for tensor in read}
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage_key(tensor) not in known:
                self._live[storage_key(tensor)] = (weakref.ref(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one aten call and records it; what torch calls for every op inside the ``with`` block."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        name = func._schema.name.split("::")[1]
        read, written = list(nested_tensors((args, kwargs))), list(nested_tensors(out))
        self._record_allocations(read, written)
        if name in OPS_WITHOUT_KERNEL or not written or _is_view(func, read, written):
            return out
        formula = _flop_formula(func)
        if formula is None:
            self.num_bytes += TRAFFIC_RULES.get(name, _all_bytes)(read, written)
        else:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        self.kernels += sum(args[-1][:2]) if name == "convolution_backward" else KERNELS_PER_CALL.get(name, 1)
        return out


def nested_tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts, in order of appearance."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from nested_tensors(item)
    elif isinstance(tree, dict):
        yield from nested_tensors(list(tree.values()))


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share their storage, while both are alive."""
    return int(tensor.untyped_storage()._cdata)


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: a broadcast dim (stride 0) counts once."""
    return _distinct_elements(tensor) * tensor.element_size()


def attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *, backward: bool = False
) -> int:
    """FLOPs of a flash attention kernel over the full (sq, skv) square; ``query`` is (b, h, sq, d), ``key`` (b, hk,
    skv, d), ``value`` (b, hk, skv, dv).

    The forward is two matmuls, 2 b h sq skv (d + dv); the backward five, 2 b h sq skv (3 d + 2 dv), as it recomputes the
    scores (Dao et al. 2022, section 3.1). A causal mask is not discounted.

    >>> attention_flops((1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4))
    2048
    """
    batch_heads, (length, width) = prod(query[:-2]), query[-2:]
    scores, sums = (3, 2) if backward else (1, 1)
    return 2 * batch_heads * length * key[-2] * (scores * width + sums * value[-1])


def grouped_matmul_flops(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """FLOPs of a matmul whose rows are split into groups, each with its own matrix (experts of an MoE layer).

    (t, k) x (g, k, n) and (g, m, k) x (k, t) with t split: every row is multiplied by one matrix. (m, t) x (t, n) with
    t split gives a matrix per group. (g, m, k) x (g, k, n) is a batched matmul. All are 2 x rows x contracted x columns.

    >>> grouped_matmul_flops((10, 4), (3, 4, 8))
    640
    """
    if len(left) == 3 and len(right) == 2:
        return 2 * left[1] * left[2] * right[1]
    return 2 * prod(left) * right[-1]


def _cpu_flash_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return attention_flops(tuple(query.shape), tuple(key.shape), tuple(value.shape))


def _cpu_flash_backward_flops(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    return attention_flops(tuple(query.shape), tuple(key.shape), tuple(value.shape), backward=True)


def _grouped_mm_flops(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return grouped_matmul_flops(tuple(left.shape), tuple(right.shape))


def _convolution_backward_flops(
    output_gradient: Tensor, hidden: Tensor, weight: Tensor, *settings: Any, out_val: Any = None
) -> int:
    """``settings``: bias sizes, stride, padding, dilation, transposed, output padding, groups, output mask. Each gradient
    takes the multiply-adds of the forward: every window (a position of the output, or of the input of a transposed
    convolution) reads every element of the weight, (c_out, c_in / groups, ...) or (c_in, c_out / groups, ...), once."""
    transposed, wanted = settings[4], settings[-1]
    windows = (hidden if transposed else output_gradient).shape[2:]
    return 2 * hidden.shape[0] * prod(windows) * prod(weight.shape) * sum(wanted[:2])


def _addbmm_flops(_: Tensor, left: Tensor, right: Tensor, *__: Any, **___: Any) -> int:
    return 2 * prod(left.shape) * right.shape[2]


def _trilinear_flops(first: Tensor, second: Tensor, third: Tensor, *settings: Any, **_: Any) -> int:
    """``settings`` are the dims along which each of the three is expanded, and those that are summed; one multiply-add per
    element of the product of all three."""
    expanded = []
    for tensor, dims in zip((first, second, third), settings, strict=False):
        shape = list(tensor.shape)
        for dim in sorted(dims):
            shape.insert(dim, 1)
        expanded.append(shape)
    return 2 * prod(max(sizes) for sizes in zip(*expanded, strict=True))


FLOP_FORMULAS: dict[str, Callable[..., int]] = {  # what torch.utils.flop_counter misses, or counts without its groups
    "aten::_scaled_dot_product_flash_attention_for_cpu": _cpu_flash_flops,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_flash_backward_flops,
    "aten::_grouped_mm": _grouped_mm_flops,
    "transformers::grouped_mm_fallback": _grouped_mm_flops,
    "aten::convolution_backward": _convolution_backward_flops,
    "aten::addbmm": _addbmm_flops,
    "aten::_trilinear": _trilinear_flops,
}


def _flop_formula(func: Any) -> Callable[..., int] | None:
    return FLOP_FORMULAS.get(func._schema.name) or flop_registry.get(func.overloadpacket)


def _is_view(func: Any, read: Tensors, written: Tensors) -> bool:
    if func._schema.is_mutable:
        return False
    owned = {storage_key(tensor) for tensor in read}
    return bool(owned) and all(storage_key(tensor) in owned for tensor in written)


def _all_bytes(read: Tensors, written: Tensors) -> int:
    distinct = {id(tensor): tensor for tensor in read}.values()
    return sum(map(touched_bytes, distinct)) + sum(map(touched_bytes, written))


def _written_bytes(read: Tensors, written: Tensors) -> int:
    """Fills: a tensor that is overwritten or only gives its shape is not read."""
    return sum(map(touched_bytes, written))


def _copy_bytes(read: Tensors, written: Tensors) -> int:
    return _written_bytes(read, written) + touched_bytes(read[-1])


def _index_bytes(read: Tensors) -> int:
    return sum(touched_bytes(tensor) for tensor in read if not tensor.is_floating_point())


def _gather_bytes(read: Tensors, written: Tensors) -> int:
    """Gathers: rows read, rows written, indices read."""
    return 2 * _written_bytes(read, written) + _index_bytes(read)


def _scatter_bytes(read: Tensors, written: Tensors) -> int:
    """Scatters in place: rows of the source read, rows of the destination read and written, indices read."""
    floating = [tensor for tensor in read if tensor.is_floating_point()]
    return 3 * (touched_bytes(floating[-1]) if len(floating) > 1 else 0) + _index_bytes(read)


def _scatter_copy_bytes(read: Tensors, written: Tensors) -> int:
    """Scatters out of place, which first copy the destination."""
    return _scatter_bytes(read, written) + 2 * _written_bytes(read, written)


def _embedding_backward_bytes(read: Tensors, written: Tensors) -> int:
    """Fills the table's gradient, then adds the rows."""
    return 3 * touched_bytes(read[0]) + _index_bytes(read) + _written_bytes(read, written)


def _nll_bytes(read: Tensors, written: Tensors) -> int:
    """Reads one log-probability per target, and the targets."""
    return 2 * _index_bytes(read)


def _nll_backward_bytes(read: Tensors, written: Tensors) -> int:
    return _written_bytes(read, written) + _index_bytes(read)


TRAFFIC_RULES: dict[str, TrafficRule] = {
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), _written_bytes),
    **dict.fromkeys(("rand_like", "randn_like", "fill_", "zero_", "uniform_", "normal_", "bernoulli_"), _written_bytes),
    **dict.fromkeys(("embedding", "index", "index_select", "gather", "take_along_dim"), _gather_bytes),
    # The backward of indexing writes in place on CUDA; with fake tensors its out-of-place variant is recorded.
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_", "scatter_", "scatter_add_"), _scatter_bytes),
    **dict.fromkeys(("index_add_", "index_copy_", "scatter_reduce_"), _scatter_bytes),
    **dict.fromkeys(("scatter", "scatter_add", "index_add", "index_copy", "scatter_reduce"), _scatter_copy_bytes),
    "copy_": _copy_bytes,
    "embedding_dense_backward": _embedding_backward_bytes,
    "nll_loss_forward": _nll_bytes,
    "nll_loss2d_forward": _nll_bytes,
    "nll_loss_backward": _nll_backward_bytes,
    "nll_loss2d_backward": _nll_backward_bytes,
}


def _distinct_elements(tensor: Tensor) -> int:
    return prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
