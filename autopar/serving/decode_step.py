"""Serving a transformer on one tensor-parallel group of T ranks: what a rank holds and how long a token takes.

A decode step makes one token of each of b sequences that have C tokens in the cache. On a rank:

    matmul       t = max(T16(m, n, k) * min(1, max(r, a)), bytes / sustained bandwidth, kernel latency)
                 m rows for b tokens, T16 the device's table, r = stored bytes / 16-bit bytes of the weight,
                 a = (FLOPs / peak) / (16-bit bytes / bandwidth): below 1 the table's time is reading weights, which
                 smaller weights shorten, above it is computing, which they do not
    attention    t = max(b C cache bytes per token / sustained bandwidth, FLOPs / peak, kernel latency)
    any other    t = max(bytes / sustained bandwidth, kernel latency), per kernel of what is fused
    exchange     the cluster's collective, of b tokens' bytes
    launches     none where the step is replayed as one graph; else the step takes at least kernels * launch time

    batch that fits = floor((budget - weights - workspace - fixed) / (C * cache bytes per token))
    MBU = (weights read + b C cache bytes per token) / (t * peak bandwidth)

Weights are read whole in every step but for experts that no token chose and rows of look-up tables. Quantised weights
are int8 with a scale per column, or int4 with a 2-byte scale per group of 128 (the default of GPTQ and AWQ); arithmetic
stays in 16 bits. Bandwidth counted so is Model Bandwidth Utilisation (Databricks, "LLM Inference Performance
Engineering", 2023).
"""

from dataclasses import dataclass
from typing import Literal

from autopar.cluster.cluster import Cluster, MeasuredCollective, RankGroup
from autopar.cluster.device import Device
from autopar.core.dtypes import ITEMSIZE

StorageFormat = Literal["same", "int8", "int4"]
INT4_GROUP_SIZE, INT4_SCALE_BYTES = 128, 2


def bytes_per_element(storage_format: StorageFormat, itemsize: int) -> float:
    """Bytes an element of a weight or of the cache takes.

    >>> stored_bytes("same", 2), stored_bytes("int8", 2), stored_bytes("int4", 2)
    (2.0, 1.0, 0.515625)
    """
    return {"same": float(itemsize), "int8": 1.0, "int4": 0.5 + INT4_SCALE_BYTES / INT4_GROUP_SIZE}[storage_format]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeMatmul:
    """A matmul as a rank runs it: ``matrices`` of (rows, k) @ (k, n), ``rows_per_token`` of them all together.
    ``weight_bytes`` an element as stored, 0 where the second operand is no weight; a ``last`` one runs for a sequence's
    last token only."""

    rows_per_token: float
    n: float
    k: float
    num_matrices: float
    weight_itemsize: float
    last_token_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedAttention:
    """One attention of a rank: query heads, and the bytes its keys and values take in the cache per token."""

    num_heads: float
    head_dim: int
    cache_bytes_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCollective:
    """A collective on activations, bytes per token."""

    kind: MeasuredCollective
    bytes_per_token: float
    group: RankGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What one rank runs and holds. ``traffic`` are the bytes per token of each other kernel; ``num_kernels`` counts
    all launches of a program that fuses none; ``dtype`` is that of the arithmetic; ``workspace_bytes`` what passing
    tensors take."""

    matmuls: tuple[DecodeMatmul, ...]
    attentions: tuple[CachedAttention, ...]
    kernel_bytes_per_token: tuple[float, ...]
    collectives: tuple[DecodeCollective, ...]
    num_kernels: int
    dtype: str
    weights_bytes: float
    workspace_bytes: float
    fixed_bytes: float

    @property
    def cache_bytes_per_token(self) -> float:
        return sum(one.cache_bytes_per_token for one in self.attentions)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """Seconds of one decode step by what takes them (``launches_s``: by which launching is slower than running), the
    bytes it has to read, and its FLOPs."""

    matmul_s: float
    attention_s: float
    other_s: float
    exchange_s: float
    launches_s: float
    read_bytes: float
    flops: float

    @property
    def time_s(self) -> float:
        return self.matmul_s + self.attention_s + self.other_s + self.exchange_s + self.launches_s

    def mbu(self, device: Device) -> float:
        return self.read_bytes / (self.time_s * device.memory_bytes_per_s)

    def mfu(self, device: Device, dtype: str) -> float:
        return self.flops / (self.time_s * device.peak(dtype))


def matmul_time(matmul: DecodeMatmul, tokens: float, device: Device, dtype: str) -> tuple[float, float, float]:
    """Seconds, bytes of weights read and FLOPs of a matmul for ``tokens`` tokens."""
    itemsize = ITEMSIZE[dtype]
    rows = matmul.rows_per_token * tokens
    matrices = max(min(matmul.num_matrices, rows), 1.0) if matmul.weight_itemsize else matmul.num_matrices
    elements = matrices * matmul.n * matmul.k
    flops = 2.0 * rows * matmul.n * matmul.k
    weight_bytes = elements * (matmul.weight_itemsize or itemsize)
    moved = weight_bytes + itemsize * rows * (matmul.n + matmul.k)
    whole_s = float(device.matmul_s(rows / matrices, matmul.n, matmul.k, matrices, dtype=dtype))
    ratio = weight_bytes / (elements * itemsize)
    computing = (flops / device.peak(dtype)) / (elements * itemsize / device.memory_bytes_per_s)
    time_s = max(
        whole_s * min(1.0, max(ratio, computing)), float(device.memory_bound_s(moved)), device.kernel_latency_s
    )
    return time_s, weight_bytes if matmul.weight_itemsize else 0.0, flops


def price_decode_step(
    model: ServedModel, batch: int, context: int, cluster: Cluster, *, cuda_graph: bool = True
) -> DecodeStep:
    """One token of each of ``batch`` sequences with ``context`` tokens in the cache; ``replayed`` as one graph."""
    device = cluster.device
    found = [matmul_time(product, batch, device, model.dtype) for product in model.matmuls]
    flops = sum(one[2] for one in found)
    attention_s = cache_bytes = 0.0
    for attention in model.attentions:
        read = batch * context * attention.cache_bytes_per_token
        work = 4.0 * batch * attention.num_heads * context * attention.head_dim
        attention_s += max(float(device.memory_bound_s(read)), work / device.peak(model.dtype), device.kernel_latency_s)
        cache_bytes += read
        flops += work
    other_s = sum(
        max(float(device.memory_bound_s(size * batch)), device.kernel_latency_s)
        for size in model.kernel_bytes_per_token
    )
    exchange_s = sum(
        float(cluster.collective_s(one.kind, one.bytes_per_token * batch, one.group)) for one in model.collectives
    )
    busy_s = sum(one[0] for one in found) + attention_s + other_s + exchange_s
    launches_s = 0.0 if cuda_graph else max(model.num_kernels * device.launch_s - busy_s, 0.0)
    return DecodeStep(
        matmul_s=sum(one[0] for one in found),
        attention_s=attention_s,
        other_s=other_s,
        exchange_s=exchange_s,
        launches_s=launches_s,
        read_bytes=sum(one[1] for one in found) + cache_bytes,
        flops=flops,
    )


def largest_batch(budget_bytes: float, resident_bytes: float, cache_bytes_per_sequence: float) -> int:
    """Sequences whose cache fits beside ``held_bytes``.

    >>> batch_that_fits(128e9, 14e9, 0.939524096e9)
    121
    """
    return max(int((budget_bytes - resident_bytes) // cache_bytes_per_sequence), 0)
