"""One decode step of a transformer on a tensor-parallel group: what a rank stores and how long a token takes.

A decode step generates one token for each of b sequences that have C tokens in the cache. On a rank:

    matmul       t = max(T16(m, n, k) * min(1, max(r, a)), bytes / sustained bandwidth, kernel latency)
                 m rows for b tokens, T16 the device's table, r = stored bytes / 16-bit bytes of the weight,
                 a = (FLOPs / peak) / (16-bit bytes / bandwidth): below 1 the table's time goes to reading weights,
                 which smaller weights shorten; above 1 to computing, which they do not shorten
    attention    t = max(b C cache bytes per token / sustained bandwidth, FLOPs / peak, kernel latency)
    any other    t = max(bytes / sustained bandwidth, kernel latency), per fused kernel
    exchange     the cluster's collective, of b tokens' bytes
    launches     none where the step is replayed as one CUDA graph; else the step takes at least kernels * launch time

    batch that fits = floor((budget - weights - workspace - fixed) / (C * cache bytes per token))
    MBU = (weights read + b C cache bytes per token) / (t * peak bandwidth)

All weights are read in every step but experts that no token chose and rows of look-up tables. Quantised weights are int8
with a scale per column, or int4 with a 2-byte scale per group of 128 (the default of GPTQ and AWQ); arithmetic stays in
16 bits. MBU is Model Bandwidth Utilisation (Databricks, "LLM Inference Performance
Engineering", 2023).
"""

from dataclasses import dataclass

from autopar.cluster.cluster import Cluster, MeasuredCollective, RankGroup
from autopar.cluster.device import Device
from autopar.core.dtypes import ITEMSIZE
from autopar.core.request import StorageFormat

INT4_GROUP_SIZE, INT4_SCALE_BYTES = 128, 2


def bytes_per_element(storage_format: StorageFormat, itemsize: int) -> float:
    """Bytes that an element of a weight or of the cache takes; ``itemsize`` is that of the model's dtype.

    >>> bytes_per_element("same", 2), bytes_per_element("int8", 2), bytes_per_element("int4", 2)
    (2.0, 1.0, 0.515625)
    """
    return {"same": float(itemsize), "int8": 1.0, "int4": 0.5 + INT4_SCALE_BYTES / INT4_GROUP_SIZE}[storage_format]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeMatmul:
    """A matmul as a rank runs it: ``num_matrices`` products (rows, k) @ (k, n), with ``rows_per_token`` rows in all.
    ``weight_itemsize`` is the bytes of a stored element, 0 where the second operand is not a weight;
    ``last_token_only``: in a prefill it runs for the last token of a sequence only."""

    rows_per_token: float
    n: float
    k: float
    num_matrices: float
    weight_itemsize: float
    last_token_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedAttention:
    """One attention of a rank: its query heads, and the bytes of its keys and values in the cache per token."""

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
    """What one rank runs and stores. ``kernel_bytes_per_token`` are the bytes that each kernel but matmuls and
    attentions reads and writes; ``num_kernels`` counts the launches of a program that fuses none; ``dtype`` is that of
    the arithmetic; ``workspace_bytes`` the most that temporaries take while one op runs."""

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
        """Bytes in the cache per token of a sequence, of all attentions."""
        return sum(attention.cache_bytes_per_token for attention in self.attentions)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """Seconds of one decode step by part (``launches_s``: how much longer the host takes to launch the kernels than
    they run), the bytes of weights and cache that it reads, and its FLOPs."""

    matmul_s: float
    attention_s: float
    other_s: float
    exchange_s: float
    launches_s: float
    read_bytes: float
    flops: float

    @property
    def time_s(self) -> float:
        """Seconds of the step."""
        return self.matmul_s + self.attention_s + self.other_s + self.exchange_s + self.launches_s

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """(part, seconds), which add up to ``time_s``."""
        return (
            ("matmul", self.matmul_s),
            ("attention", self.attention_s),
            ("other", self.other_s),
            ("exchange", self.exchange_s),
            ("launches", self.launches_s),
        )

    def mbu(self, device: Device) -> float:
        """Model Bandwidth Utilisation: bytes read per second over the device's peak bandwidth."""
        return self.read_bytes / (self.time_s * device.memory_bytes_per_s)

    def mfu(self, device: Device, dtype: str) -> float:
        """Model FLOPs Utilisation: FLOPs per second over the device's peak at ``dtype``."""
        return self.flops / (self.time_s * device.peak(dtype))


def matmul_time(matmul: DecodeMatmul, tokens: float, device: Device, dtype: str) -> tuple[float, float, float]:
    """(seconds, bytes of weights read, FLOPs) of a matmul for ``tokens`` tokens, by the module's docstring."""
    itemsize = ITEMSIZE[dtype]
    rows = matmul.rows_per_token * tokens
    matrices = max(min(matmul.num_matrices, rows), 1.0) if matmul.weight_itemsize else matmul.num_matrices
    elements = matrices * matmul.n * matmul.k
    flops = 2.0 * rows * matmul.n * matmul.k
    weight_bytes = elements * (matmul.weight_itemsize or itemsize)
    num_bytes = weight_bytes + itemsize * rows * (matmul.n + matmul.k)
    table_s = float(device.matmul_s(rows / matrices, matmul.n, matmul.k, matrices, dtype=dtype))
    ratio = weight_bytes / (elements * itemsize)
    computing = (flops / device.peak(dtype)) / (elements * itemsize / device.memory_bytes_per_s)
    time_s = max(
        table_s * min(1.0, max(ratio, computing)), float(device.memory_bound_s(num_bytes)), device.kernel_latency_s
    )
    return time_s, weight_bytes if matmul.weight_itemsize else 0.0, flops


def price_decode_step(
    model: ServedModel, batch: int, context: int, cluster: Cluster, *, cuda_graph: bool = True
) -> DecodeStep:
    """One token of each of ``batch`` sequences with ``context`` tokens in the cache; with ``cuda_graph`` the step is
    replayed as one graph and launches cost nothing."""
    device = cluster.device
    matmuls = [matmul_time(matmul, batch, device, model.dtype) for matmul in model.matmuls]
    flops = sum(matmul_flops for _, _, matmul_flops in matmuls)
    matmul_s = sum(time_s for time_s, _, _ in matmuls)
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
        float(cluster.collective_s(collective.kind, collective.bytes_per_token * batch, collective.group))
        for collective in model.collectives
    )
    busy_s = matmul_s + attention_s + other_s + exchange_s
    launches_s = 0.0 if cuda_graph else max(model.num_kernels * device.launch_s - busy_s, 0.0)
    return DecodeStep(
        matmul_s=matmul_s,
        attention_s=attention_s,
        other_s=other_s,
        exchange_s=exchange_s,
        launches_s=launches_s,
        read_bytes=sum(weight_bytes for _, weight_bytes, _ in matmuls) + cache_bytes,
        flops=flops,
    )


def largest_batch(budget_bytes: float, resident_bytes: float, cache_bytes_per_sequence: float) -> int:
    """Sequences whose cache fits into what ``resident_bytes`` leave of the budget.

    >>> largest_batch(128e9, 14e9, 0.939524096e9)
    121
    """
    return max(int((budget_bytes - resident_bytes) // cache_bytes_per_sequence), 0)
