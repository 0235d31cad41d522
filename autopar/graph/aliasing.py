"""Ops whose result may share the storage of their input, and tensors with equal metadata."""

import math
from typing import Any

from torch import Tensor

RESHAPE_OPS = frozenset(("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"))
COPY_OPS = frozenset(("aten.clone.default", "aten._to_copy.default", "aten.lift_fresh_copy.default"))
# Ops that return their first argument itself, or a view of it, where shape, strides and dtype allow it.
MAY_ALIAS_OPS = RESHAPE_OPS | frozenset(
    f"aten.{name}"
    for name in (
        "alias.default", "lift_fresh.default", "contiguous.default", "detach.default", "to.dtype", "to.dtype_layout",
        "to.device", "to.other", "type_as.default", "expand.default", "expand_as.default", "view_as.default",
        "flatten.using_ints", "slice.Tensor", "narrow.default", "squeeze.dim", "squeeze.default", "permute.default",
        "positive.default", "broadcast_to.default",
    )
)  # fmt: skip


def same_metadata(one: Any, other: Any) -> bool:
    """Whether both are tensors of the same shape, dtype, device and strides (those of a single element do not matter)."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and (one.stride() == other.stride() or math.prod(one.shape) <= 1)
