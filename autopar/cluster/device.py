"""One GPU (or CPU rank): its memory, its peaks, and seconds of kernels on it.

matmul     t = max(T(m, n, k) / sustained_fraction, bytes / bandwidth, kernel_latency_s)    T / unaligned_matmul_speed for odd rows
           T: measured, interpolated in log time over log (m, n, k); beyond the table at the efficiency of its edge
flash      t = FLOPs / (peak * E(seq, batch * heads) * sustained_fraction * relative speeds)   (causal counts half)
math       t = products * max(FLOPs / (peak * best of table * sustained_fraction), bytes / sustained bandwidth)
               + scores * bytes per score / sustained bandwidth + 2 kernel_latency_s    2 products forward, 4 backward
any other  t = bytes / (memory_bytes_per_s * memory_efficiency) + kernel_latency_s
"""

import itertools
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from autopar.cluster.interpolate import Floats, multilinear
from autopar.cluster.number_source import (
    NumberSource,
    require_fraction,
    require_non_negative,
    require_positive,
    require_sources,
)
from autopar.core.dtypes import ITEMSIZE, TRAINING_DTYPES
from autopar.core.errors import UsageError

REFERENCE_HEAD_DIM = 128  # of the attention tables
NARROW_MATMUL_EXPONENT = 0.5  # seconds below the table fall with the root of the width: tiles stay half empty
BATCHED_MATMUL_MIN_ROWS = 64  # that a batched kernel computes per matrix, at least


class MatmulTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured fractions of the default dtype's peak: ``efficiency`` is row-major over the nodes (m, n, k) of products
    (m, k) @ (k, n)."""

    m: tuple[int, ...]
    n: tuple[int, ...]
    k: tuple[int, ...]
    efficiency: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_grid("matmul", (self.m, self.n, self.k), self.efficiency)


class AttentionTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured fractions of the peak of causal forward attention at head_dim 128: ``efficiency`` is row-major over the nodes
    (seq, batch_heads), the latter being batch * heads."""

    seq: tuple[int, ...]
    batch_heads: tuple[int, ...]
    efficiency: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_grid("attention", (self.seq, self.batch_heads), self.efficiency)


def _check_grid(name: str, axes: tuple[tuple[int, ...], ...], efficiency: tuple[float, ...]) -> None:
    """ValueError unless the nodes of each axis grow and there is an efficiency in (0, 1] for each grid point."""
    for line in axes:
        if not line or line[0] < 1 or any(a >= b for a, b in itertools.pairwise(line)):
            raise ValueError(f"{name}: nodes must be positive and grow strictly, not {list(line)}")
    wanted = int(np.prod([len(line) for line in axes]))
    if len(efficiency) != wanted:
        raise ValueError(f"{name}: {len(efficiency)} efficiencies for a grid of {wanted}")
    for value in efficiency:
        require_fraction(f"{name} efficiency", value)


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The numbers of a device, and seconds of kernels on it; these broadcast over arrays of sizes.

    ``memory_bytes``: what a program can use; ``peak_flops_per_s``: dtype -> dense peak, float32 as torch multiplies by
    default (no TF32).

    >>> from autopar.cluster import load_cluster
    >>> load_cluster("dgx-a100").device.default_dtype
    'bfloat16'
    """

    name: str
    memory_bytes: int
    peak_flops_per_s: dict[str, float]
    memory_bytes_per_s: float
    memory_efficiency: float
    launch_s: float
    kernel_latency_s: float
    context_bytes: int
    sustained_fraction: float
    unaligned_matmul_speed: float
    matmul: MatmulTable
    flash_attention: AttentionTable
    flash_speed: float
    flash_backward_speed: float
    flash_head_dim_exponent: float
    math_forward_bytes_per_score: float
    math_backward_bytes_per_score: float
    provenance: dict[str, NumberSource]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.peak_flops_per_s) - set(TRAINING_DTYPES))
        if unknown or not self.peak_flops_per_s:
            raise ValueError(
                f"{self.name}: peak_flops_per_s needs some of {sorted(TRAINING_DTYPES)} and nothing else, not {unknown}"
            )
        for dtype, peak in self.peak_flops_per_s.items():
            require_positive(f"peak_flops_per_s[{dtype}]", peak)
        for key in ("memory_efficiency", "sustained_fraction", "flash_speed", "flash_backward_speed"):
            require_fraction(key, getattr(self, key))
        require_fraction("unaligned_matmul_speed", self.unaligned_matmul_speed)
        for key in ("memory_bytes", "memory_bytes_per_s"):
            require_positive(key, getattr(self, key))
        for key in ("launch_s", "kernel_latency_s", "context_bytes", "flash_head_dim_exponent"):
            require_non_negative(key, getattr(self, key))
        for key in ("math_forward_bytes_per_score", "math_backward_bytes_per_score"):
            require_non_negative(key, getattr(self, key))
        require_sources(self, self.provenance, ())

    @property
    def default_dtype(self) -> str:
        """The half precision this device trains in: bfloat16, else float16, else float32."""
        return next(dtype for dtype in TRAINING_DTYPES if dtype in self.peak_flops_per_s)

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s at ``dtype``; UsageError where the device does not have it."""
        if dtype not in self.peak_flops_per_s:
            known = ", ".join(self.peak_flops_per_s)
            raise UsageError(f"{self.name} has no {dtype} matmul; it has {known}: choose one with --dtype")
        return self.peak_flops_per_s[dtype]

    def memory_bound_s(self, num_bytes: ArrayLike) -> Floats:
        """Seconds of a kernel that reads and writes ``num_bytes`` of the device's memory and does little else."""
        return np.asarray(num_bytes, float) / (self.memory_bytes_per_s * self.memory_efficiency)

    def matmul_s(
        self,
        m: ArrayLike,
        n: ArrayLike,
        k: ArrayLike,
        batch: ArrayLike = 1,
        *,
        dtype: str,
        aligned: ArrayLike = True,
    ) -> Floats:
        """Seconds of ``batch`` products (m, k) @ (k, n). A batch of matrices fills the device like one tall matrix.

        ``aligned``: every row begins at a multiple of 16 bytes, as vector loads need. UsageError for a ``dtype`` without a
        peak."""
        peak = self.peak(dtype)
        m_, n_, k_, b_ = np.broadcast_arrays(*(np.maximum(np.asarray(x, float), 1.0) for x in (m, n, k, batch)))
        rows = np.where(b_ > 1, b_ * np.maximum(m_, BATCHED_MATMUL_MIN_ROWS), m_)
        table_s = self._table_s(rows, n_, k_)
        flops = 2.0 * b_ * m_ * n_ * k_
        if peak < self.peak(self.default_dtype):
            table_s = np.maximum(table_s, flops / (peak * max(self.matmul.efficiency)))
        num_bytes = ITEMSIZE[dtype] * b_ * (m_ * k_ + k_ * n_ + m_ * n_)
        floor_s = np.maximum(num_bytes / self.memory_bytes_per_s, self.kernel_latency_s)
        table_s = np.where(aligned, table_s, table_s / self.unaligned_matmul_speed)
        return np.asarray(np.maximum(table_s / self.sustained_fraction, floor_s), float)

    def attention_s(
        self,
        batch: ArrayLike,
        heads: ArrayLike,
        kv_heads: ArrayLike,
        q_len: ArrayLike,
        kv_len: ArrayLike,
        head_dim: ArrayLike,
        *,
        causal: bool,
        dtype: str,
        backward: bool,
        flash: bool,
    ) -> Floats:
        """Seconds of scaled dot product attention, forward or ``backward`` (not both). ``flash``: as one fused kernel, else
        with its scores in memory. UsageError for a ``dtype`` without a peak."""
        b, h, g, q, s, d = np.broadcast_arrays(
            *(np.maximum(np.asarray(x, float), 1.0) for x in (batch, heads, kv_heads, q_len, kv_len, head_dim))
        )
        peak = self.peak(dtype)
        if not flash:
            # all scores are computed and then masked: causal saves nothing; the bytes per score are those of half precision
            per_score = self.math_backward_bytes_per_score if backward else self.math_forward_bytes_per_score
            traffic = b * h * q * s * per_score * ITEMSIZE[dtype] / 2
            size_bytes = ITEMSIZE[dtype] * b * h * (q * s + q * d + s * d)  # a product reads or writes the scores once
            rate = peak * max(self.matmul.efficiency) * self.sustained_fraction
            product_s = np.maximum(2.0 * b * h * q * s * d / rate, self.memory_bound_s(size_bytes))
            product_s = np.maximum(product_s, self.kernel_latency_s)
            between_s = self.memory_bound_s(traffic) + 2 * self.kernel_latency_s  # softmax and dropout
            return np.asarray((4.0 if backward else 2.0) * product_s + between_s, float)
        flops = 4.0 * b * h * q * s * d * (0.5 if causal else 1.0) * (2.5 if backward else 1.0)
        speed = self._flash_efficiency(np.sqrt(q * s) * (1.0 if causal else 2.0), b * h)
        speed = speed * np.minimum(1.0, (d / REFERENCE_HEAD_DIM) ** self.flash_head_dim_exponent)
        speed = speed * self.flash_speed * self.sustained_fraction * (self.flash_backward_speed if backward else 1.0)
        num_bytes = ITEMSIZE[dtype] * b * d * (2 * h * q + 2 * g * s) * (2.0 if backward else 1.0)
        floor_s = np.maximum(self.memory_bound_s(num_bytes), self.kernel_latency_s)
        return np.asarray(np.maximum(flops / (peak * speed), floor_s), float)

    @cached_property
    def _log_grid(self) -> tuple[tuple[Floats, ...], Floats]:
        """Log of the matmul table's nodes, and log seconds at them."""
        nodes = tuple(np.asarray(line, float) for line in (self.matmul.m, self.matmul.n, self.matmul.k))
        flops = 2.0 * nodes[0][:, None, None] * nodes[1][None, :, None] * nodes[2][None, None, :]
        efficiency = np.asarray(self.matmul.efficiency).reshape(flops.shape)
        return tuple(np.log(line) for line in nodes), np.log(flops / (efficiency * self.peak(self.default_dtype)))

    def _table_s(self, m: Floats, n: Floats, k: Floats) -> Floats:
        """Seconds by the table. A product taller than the table is also looked up transposed, as (n, k) @ (k, m), and takes
        the shorter time, but no less than the tallest product of the table."""
        time_s = self._interpolated_s(m, n, k)
        tallest = float(self.matmul.m[-1])
        is_taller = (m > tallest) & (n < m)
        if not is_taller.any():
            return time_s
        transposed_s = np.maximum(self._interpolated_s(n, m, k), self._interpolated_s(np.full_like(m, tallest), n, k))
        return np.where(is_taller, np.minimum(transposed_s, time_s), time_s)

    def _interpolated_s(self, m: Floats, n: Floats, k: Floats) -> Floats:
        """Seconds between the table's nodes; beyond its largest sizes in proportion to the work, below its narrowest by
        ``NARROW_MATMUL_EXPONENT`` (n and k alone)."""
        nodes, log_s = self._log_grid
        sizes = (m, n, k)
        interpolated = multilinear(nodes, log_s, tuple(np.log(x) for x in sizes))
        for axis, (line, size) in enumerate(zip(nodes, sizes, strict=True)):
            beyond = np.maximum(np.log(size) - line[-1], 0.0)
            short = np.minimum(np.log(size) - line[0], 0.0) * (0.0 if axis == 0 else NARROW_MATMUL_EXPONENT)
            interpolated = interpolated + beyond + short
        return np.exp(interpolated)

    @cached_property
    def _log_flash(self) -> tuple[tuple[Floats, ...], Floats]:
        """Log of the attention table's nodes, and log efficiencies at them."""
        nodes = tuple(
            np.log(np.asarray(line, float)) for line in (self.flash_attention.seq, self.flash_attention.batch_heads)
        )
        return nodes, np.log(np.asarray(self.flash_attention.efficiency)).reshape(len(nodes[0]), len(nodes[1]))

    def _flash_efficiency(self, seq: Floats, batch_heads: Floats) -> Floats:
        """Fraction of the peak. Below the table's shortest sequence it falls as it does between the two shortest."""
        nodes, log_e = self._log_flash
        points = (np.log(seq), np.log(batch_heads))
        log_speed = multilinear(nodes, log_e, points)
        if len(nodes[0]) > 1:
            slope = (log_e[1, -1] - log_e[0, -1]) / (nodes[0][1] - nodes[0][0])
            log_speed = log_speed + slope * np.minimum(points[0] - nodes[0][0], 0.0)
        if len(nodes[1]) > 1:
            log_speed = log_speed + np.minimum(points[1] - nodes[1][0], 0.0)  # fewer heads leave as many SMs idle
        return np.exp(log_speed)
