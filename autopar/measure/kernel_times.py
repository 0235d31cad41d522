"""Seconds of kernels on the device of this process, from which `profile` makes a device's table.

A time is the median of repeated calls, after one to warm up, until there are at least ``repeats`` calls and
``min_total_s`` seconds have passed. On a GPU calls are timed by events on its stream, so host time that overlaps with
the device's does not count, as in training.

    matmul       (m, k) @ (k, n)                            2 m n k FLOPs
    attention    (1, h, s, d), causal, forward              2 h s^2 d FLOPs (half of the square), backward 2.5 times
    stream       c = a + b over large tensors               3 tensors of traffic
    launch       a kernel on a few elements                 host seconds until the call returns
    latency      the same kernel, seconds on the device     per kernel of a CUDA graph of many, on a GPU
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TINY_NUMEL = 16  # elements of a kernel whose time is its latency
GRAPH_KERNELS = 64
FUSED_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopwatch:
    """Times work on ``device`` ("cpu" or "cuda"), by the median described above."""

    device: str
    repeats: int
    min_total_s: float

    def median_s(self, work: Callable[[], object]) -> float:
        """Median seconds of one call."""
        work()
        self.synchronize()
        times_s: list[float] = []
        started = time.perf_counter()
        while len(times_s) < self.repeats or time.perf_counter() - started < self.min_total_s:
            times_s.append(self._once_s(work))
        return statistics.median(times_s)

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _once_s(self, work: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self.device != "cuda":
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def matmul_s(watch: Stopwatch, m: int, n: int, k: int, dtype: torch.dtype) -> float:
    """Seconds of (m, k) @ (k, n), the second operand stored as the weight of ``linear``, (n, k)."""
    x, weight = _random(watch, (m, k), dtype), _random(watch, (n, k), dtype)
    return watch.median_s(lambda: F.linear(x, weight))


def attention_s(watch: Stopwatch, seq: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[float, float]:
    """Forward and backward seconds of causal attention with a fused kernel of the device; tensors are (1, heads, seq,
    head_dim)."""
    with sdpa_kernel(FUSED_BACKENDS):
        return _forward_backward(
            watch,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            (1, heads, seq, head_dim),
            dtype,
        )


def materialised_attention_s(
    watch: Stopwatch, seq: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Forward and backward seconds of attention that materialises its scores: two products, a mask and a softmax."""
    mask = torch.full((seq, seq), -torch.inf, device=watch.device, dtype=dtype).triu(1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.softmax(query @ key.transpose(-1, -2) * head_dim**-0.5 + mask, dim=-1) @ value

    return _forward_backward(watch, attend, (1, heads, seq, head_dim), dtype)


def stream_bytes_per_s(watch: Stopwatch, num_bytes: int) -> tuple[float, float]:
    """Memory traffic in bytes per second over tensors of ``num_bytes``: (the fastest of copying, filling and adding,
    that of adding two)."""
    first, second = (torch.ones(num_bytes // 4, device=watch.device) for _ in range(2))
    out = torch.empty_like(first)
    copied = 2 * num_bytes / watch.median_s(lambda: out.copy_(first))
    filled = num_bytes / watch.median_s(lambda: out.fill_(1.0))
    added = 3 * num_bytes / watch.median_s(lambda: torch.add(first, second, out=out))
    return max(copied, filled, added), added


def launch_s(watch: Stopwatch, count: int) -> float:
    """Host seconds of one call of an op on a few elements that autograd records: the mean of ``count`` in a row."""
    x = torch.ones(TINY_NUMEL, device=watch.device, requires_grad=True)
    x.mul(1.0)
    watch.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        x.mul(1.0)
    elapsed = time.perf_counter() - started
    watch.synchronize()
    return elapsed / count


def latency_s(watch: Stopwatch) -> float:
    """Device seconds of a kernel on a few elements."""
    x = torch.ones(TINY_NUMEL, device=watch.device)
    if watch.device != "cuda":
        return watch.median_s(lambda: x.mul_(1.0))
    x.mul_(1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_KERNELS):
            x.mul_(1.0)
    return watch.median_s(graph.replay) / GRAPH_KERNELS


def sustained_fraction(watch: Stopwatch, size: int, dtype: torch.dtype, seconds: float) -> float:
    """The rate of a square matmul after ``seconds`` of them, relative to its rate at first, at most 1: clocks fall as a
    device warms up."""
    x, weight = (_random(watch, (size, size), dtype) for _ in range(2))
    cool_s = watch.median_s(lambda: F.linear(x, weight))
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        F.linear(x, weight)
        watch.synchronize()
    warm_s = watch.median_s(lambda: F.linear(x, weight))
    return min(cool_s / warm_s, 1.0)


def _forward_backward(
    watch: Stopwatch, attend: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[float, float]:
    """Forward and backward seconds of an attention function, on random query, key and value of this shape."""
    leaves = tuple(_random(watch, shape, dtype).requires_grad_() for _ in range(3))
    with torch.no_grad():
        forward_s = watch.median_s(lambda: attend(*leaves))
    result = attend(*leaves)
    gradient = torch.ones_like(result)
    backward_s = watch.median_s(lambda: torch.autograd.grad(result, leaves, gradient, retain_graph=True))
    return forward_s, backward_s


def _random(watch: Stopwatch, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of numbers from N(0, 1) on the device."""
    return torch.randn(shape, device=watch.device, dtype=torch.float32).to(dtype)
