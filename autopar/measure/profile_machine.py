"""`autopar profile`: measures this machine into a cost table that ``--cluster`` takes.

In one process it measures the device; under ``torchrun`` also collectives over its ranks (gloo on CPUs, NCCL on GPUs).
What it does not measure is copied, with its source, from a *base*: the shipped cluster most like the machine. A device
of a shipped cluster has the peaks of its data sheet; another's peak is the fastest rate measured, so that utilisation
is relative to it.

    efficiency (m, n, k)   2 m n k / (t * peak)                                           (``_measure_device``)
    efficiency (s, h)      FLOPs of the causal half / (t * peak)                          (``_attention_fields``)
    head_dim exponent      log(rate at half the head_dim / rate) / log(1 / 2)             (``_attention_fields``)
    math attention         bytes per score = (t - products as the device prices them) * bandwidth / scores
                                                                                          (``_math_attention_fields``)
"""

import datetime
import itertools
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from autopar.cluster.cluster import Cluster
from autopar.cluster.cost_tables import PROFILE_NAME_PREFIX, cluster_names, load_cluster
from autopar.cluster.device import REFERENCE_HEAD_DIM, AttentionTable, Device, MatmulTable
from autopar.cluster.number_source import NumberSource
from autopar.core.dtypes import ITEMSIZE
from autopar.core.errors import UsageError
from autopar.measure.kernel_times import (
    Stopwatch,
    attention_s,
    latency_s,
    launch_s,
    materialised_attention_s,
    matmul_s,
    stream_bytes_per_s,
    sustained_fraction,
)
from autopar.measure.link_times import MeasuredLinks, measure_links

Progress = Callable[[str, str, float | None, float | None], None]
"""Called with (stage, detail, None, None) before each measurement."""
MAX_MATH_SEQ, MAX_MATH_HEADS = 2048, 64  # of materialised attention: half a GiB of scores
USABLE_MEMORY_FRACTION = 0.97  # of a GPU's memory: what is left to programs by the shipped tables' sources


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementSizes:
    """The grids of the tables that are measured, sizes of streams and messages, and how often and how long."""

    m: tuple[int, ...]
    nk: tuple[int, ...]
    seq: tuple[int, ...]
    heads: tuple[int, ...]
    stream_bytes: int
    message_bytes: tuple[int, ...]
    repeats: int
    min_total_s: float
    warm_s: float


MEASUREMENT_SIZES = {
    ("cpu", True): MeasurementSizes(
        m=(64, 512), nk=(256, 1024), seq=(128, 512), heads=(1, 4), stream_bytes=2**25,
        message_bytes=(2**10, 2**16, 2**22), repeats=3, min_total_s=0.005, warm_s=0.2,
    ),
    ("cpu", False): MeasurementSizes(
        m=(64, 256, 1024, 4096), nk=(256, 512, 1024, 2048), seq=(128, 256, 512, 1024), heads=(1, 4, 16),
        stream_bytes=2**28, message_bytes=tuple(2**at for at in range(10, 27, 2)), repeats=5, min_total_s=0.05, warm_s=5.0,
    ),
    ("cuda", True): MeasurementSizes(
        m=(64, 512, 4096), nk=(512, 2048, 8192), seq=(512, 2048), heads=(8, 64), stream_bytes=2**28,
        message_bytes=(2**12, 2**18, 2**24, 2**28), repeats=5, min_total_s=0.01, warm_s=1.0,
    ),
    ("cuda", False): MeasurementSizes(
        m=(64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        nk=(256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
        seq=(512, 1024, 2048, 4096, 8192, 16384), heads=(4, 16, 64, 256), stream_bytes=2**30,
        message_bytes=tuple(2**at for at in range(12, 31, 2)), repeats=7, min_total_s=0.03, warm_s=20.0,
    ),
}  # fmt: skip
"""By (device, quick)."""


def profile_machine(
    *, device: str | None, quick: bool, base: str | None, progress: Progress, sizes: MeasurementSizes | None = None
) -> Cluster | None:
    """Measure this machine; returns the table on the first rank, None on others. Collective under torchrun.

    ``device`` is "cpu" or "cuda", by default the GPU where there is one; ``quick`` takes small grids; ``base`` names
    the cluster from which to copy what is not measured, by default the shipped one most like this machine; ``sizes``
    replaces ``MEASUREMENT_SIZES``. UsageError where there is no such device."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no GPU; use --device cpu to profile the CPU")
    with _process_group(chosen) as ranks_per_node:
        if chosen == "cpu":  # a rank is a thread, as under torchrun, unless the environment says otherwise
            torch.set_num_threads(max(int(os.environ.get("OMP_NUM_THREADS") or "1"), 1))
        first = not dist.is_initialized() or dist.get_rank() == 0
        name = _device_name(chosen)
        base_cluster = load_cluster(base) if base is not None else _closest_cluster(chosen, name)
        chosen_sizes = sizes or MEASUREMENT_SIZES[chosen, quick]
        watch = Stopwatch(device=chosen, repeats=chosen_sizes.repeats, min_total_s=chosen_sizes.min_total_s)

        def tell(stage: str, detail: str) -> None:
            if first:
                progress(stage, detail, None, None)

        per_node = ranks_per_node or base_cluster.devices_per_node
        measured = _measure_device(watch, chosen_sizes, name, base_cluster.device, per_node, tell)
        links = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            links = measure_links(watch, chosen_sizes.message_bytes, ranks_per_node, lambda what: tell("links", what))
        return _measured_cluster(base_cluster, measured, links, name, ranks_per_node) if first else None


@contextmanager
def _process_group(device: str) -> Iterator[int]:
    """The process group of ``torchrun`` while it is entered. Yields ranks per node; without torchrun, the GPUs that
    this machine has, 0 for a CPU."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield torch.cuda.device_count() if device == "cuda" else 0
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    finally:
        dist.destroy_process_group()


def _device_name(device: str) -> str:
    """The model name of the GPU or processor; a table has no host name."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine() or "CPU"


def _closest_cluster(device: str, name: str) -> Cluster:
    """The shipped cluster most like this machine: with the same chip and about the same memory, else ``dgx-h100``."""
    if device == "cpu":
        return load_cluster("cpu-gloo")
    memory = torch.cuda.get_device_properties(0).total_memory
    similar = [
        cluster
        for cluster in map(load_cluster, cluster_names())
        if cluster.device.name.split("-")[0] in name and 0.8 < cluster.device.memory_bytes / memory < 1.1
    ]
    return similar[0] if similar else load_cluster("dgx-h100")


def _measure_device(
    watch: Stopwatch,
    sizes: MeasurementSizes,
    name: str,
    base: Device,
    devices_per_node: int,
    report: Callable[[str, str], None],
) -> Device:
    """The table of this device; what is not measured is ``base``'s."""
    on_gpu = watch.device == "cuda"
    default = torch.float32
    if on_gpu:
        default = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    report("device", f"{name}: memory bandwidth and kernel launch")
    fastest, added = stream_bytes_per_s(watch, sizes.stream_bytes)
    call_s, kernel_s = launch_s(watch, 2000), latency_s(watch)
    report("device", "matmul by shape")
    times = _matmul_times(watch, sizes, default, report)
    width = sizes.nk[-1]
    dtypes = (default, torch.float32) if on_gpu and default != torch.float32 else (default,)
    rates = {dtype: 2 * width**3 / matmul_s(watch, width, width, width, dtype) for dtype in dtypes}
    rates[default] = max(rates[default], *(2 * math.prod(shape) / time for shape, time in times.items()))
    known = base if base.name.split("-")[0] in name else None
    data_sheet = known.peak_flops_per_s if known else {}
    peaks = {_dtype_name(dtype): max(rate, data_sheet.get(_dtype_name(dtype), 0.0)) for dtype, rate in rates.items()}
    peak = peaks[_dtype_name(default)]
    bandwidth = max(fastest, known.memory_bytes_per_s if known else 0.0)
    report("device", "matmul of unaligned width and under sustained load")
    unaligned_s = matmul_s(watch, sizes.m[-1], width + 1, width, default)
    aligned_s = matmul_s(watch, sizes.m[-1], width, width, default)
    sustained = sustained_fraction(watch, width, default, sizes.warm_s)
    report("device", "attention by sequence length and heads")
    attention = _attention_fields(watch, sizes, default, peak)
    fields: dict[str, Any] = {
        "memory_bytes": _memory_bytes(watch.device, devices_per_node),
        "peak_flops_per_s": peaks,
        "memory_bytes_per_s": bandwidth,
        "memory_efficiency": min(added / bandwidth, 1.0),
        "launch_s": call_s,
        "kernel_latency_s": kernel_s,
        "sustained_fraction": sustained,
        "unaligned_matmul_speed": min(aligned_s / unaligned_s, 1.0),
        "matmul": MatmulTable(
            m=sizes.m,
            n=sizes.nk,
            k=sizes.nk,
            efficiency=tuple(
                min(2 * math.prod(shape) / (times[shape] * peak), 1.0)
                for shape in itertools.product(sizes.m, sizes.nk, sizes.nk)
            ),
        ),
        **attention,
    }
    fields |= _math_attention_fields(watch, sizes, default, peak, fields)
    if on_gpu:
        fields["context_bytes"] = _context_bytes()
    return _measured_table(base, name, fields)


def _matmul_times(
    watch: Stopwatch, sizes: MeasurementSizes, dtype: torch.dtype, report: Callable[[str, str], None]
) -> dict[tuple[int, int, int], float]:
    """Seconds of each matmul of the grid, by (m, n, k)."""
    times = {}
    for m in sizes.m:
        report("device", f"matmul with {m} rows")
        for n, k in itertools.product(sizes.nk, sizes.nk):
            times[m, n, k] = matmul_s(watch, m, n, k, dtype)
    return times


def _attention_fields(watch: Stopwatch, sizes: MeasurementSizes, dtype: torch.dtype, peak: float) -> dict[str, Any]:
    """Fields of a device: the table of fused attention, the speed of its backward, and the exponent of its rate in the
    head dim. The table is of measured kernels, so ``flash_speed`` is 1."""
    efficiency = []
    for seq, heads in itertools.product(sizes.seq, sizes.heads):
        forward_s, backward_s = attention_s(watch, seq, heads, REFERENCE_HEAD_DIM, dtype)
        efficiency.append(min(2 * heads * seq**2 * REFERENCE_HEAD_DIM / (forward_s * peak), 1.0))
    half_s, _ = attention_s(watch, sizes.seq[-1], sizes.heads[-1], REFERENCE_HEAD_DIM // 2, dtype)
    ratio = forward_s / (2 * half_s)  # of rates; ``forward_s`` is that of the largest sizes, the loop's last
    return {
        "flash_attention": AttentionTable(seq=sizes.seq, batch_heads=sizes.heads, efficiency=tuple(efficiency)),
        "flash_speed": 1.0,
        "flash_backward_speed": min(2.5 * forward_s / backward_s, 1.0),
        "flash_head_dim_exponent": max(math.log(ratio) / math.log(0.5), 0.0),
    }


def _math_attention_fields(
    watch: Stopwatch, sizes: MeasurementSizes, dtype: torch.dtype, peak: float, fields: dict[str, Any]
) -> dict[str, float]:
    """Fields of a device: the memory traffic of mask and softmax in materialised attention, from the seconds beyond its
    two products (four in the backward), as a device with these ``fields`` prices them."""
    seq, heads, d = min(sizes.seq[-1], MAX_MATH_SEQ), min(sizes.heads[-1], MAX_MATH_HEADS), REFERENCE_HEAD_DIM
    forward_s, backward_s = materialised_attention_s(watch, seq, heads, d, dtype)
    itemsize = ITEMSIZE[_dtype_name(dtype)]
    bytes_per_s = fields["memory_bytes_per_s"] * fields["memory_efficiency"]
    rate = peak * max(fields["matmul"].efficiency) * fields["sustained_fraction"]
    traffic_s = itemsize * heads * (seq**2 + 2 * seq * d) / bytes_per_s
    product_s = max(2 * heads * seq**2 * d / rate, traffic_s, fields["kernel_latency_s"])
    per_score = bytes_per_s / (heads * seq**2) * 2 / itemsize
    return {
        "math_forward_bytes_per_score": max(forward_s - 2 * product_s, 0.0) * per_score,
        "math_backward_bytes_per_score": max(backward_s - 4 * product_s, 0.0) * per_score,
    }


def _memory_bytes(device: str, devices_per_node: int) -> int:
    """The bytes that one rank can use: of the GPU, or its share of the machine's memory."""
    if device == "cuda":
        return int(USABLE_MEMORY_FRACTION * torch.cuda.get_device_properties(0).total_memory)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices_per_node)


def _context_bytes() -> int:
    """The bytes that the driver takes, outside torch's allocator; an upper bound where other programs use the GPU."""
    free, total = torch.cuda.mem_get_info()
    return max(int(total - free - torch.cuda.memory_reserved()), 0)


def _measured_table(base: Device, name: str, fields: dict[str, Any]) -> Device:
    """``base`` with the measured fields, each number with its source."""
    table = msgspec.structs.replace(base, name=name)
    provenance = {key: _copied_source(source, base.name) for key, source in base.provenance.items()}
    provenance |= dict.fromkeys(fields, measured_source(name))
    return msgspec.structs.replace(table, **fields, provenance=provenance)


def _measured_cluster(
    base: Cluster, device: Device, links: MeasuredLinks | None, name: str, ranks_per_node: int
) -> Cluster:
    """``base`` with the measured device and links, each number with its source."""
    fields: dict[str, Any] = {}
    if ranks_per_node:
        fields["devices_per_node"] = ranks_per_node
    if links is not None:
        fields["link_bytes_per_s"] = links.link_bytes_per_s
        fields["link_latency_s"] = links.link_latency_s
        if links.curves:
            fields["collectives"] = links.curves
        if links.inter_node is not None:
            rate, latency = links.inter_node
            fields["inter_node_gbits_per_s"] = rate * 8 / 1e9
            fields["inter_node_efficiency"] = 1.0
            fields["inter_node_latency_s"] = latency
            fields["inter_node_ramp_bytes"] = 0.0
    provenance = {key: _copied_source(source, base.name) for key, source in base.provenance.items()}
    provenance |= dict.fromkeys(fields, measured_source(name))
    return msgspec.structs.replace(
        base, name=f"{PROFILE_NAME_PREFIX}{name}", device=device, **fields, provenance=provenance
    )


def measured_source(name: str) -> NumberSource:
    """The source of a number measured now: machine, software and date."""
    cores = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return NumberSource(
        source=f"autopar profile on {name} ({cores}), torch {torch.__version__}{cuda}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        status="measured",
    )


def _copied_source(source: NumberSource, base: str) -> NumberSource:
    """The source of a number copied from ``base``: not measured here, even where it was there."""
    return NumberSource(source=f"copied from {base}: {source.source}", date=source.date, status="modelled")


def _dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
