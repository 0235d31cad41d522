"""Derive the tables of ``cost_tables/`` from published measurements, and report how well they fit.

    python tests/benchmarks/fit_cost_tables.py [MEASUREMENTS_FOLDER] [--write]

Matmul: measured seconds on a grid of (m, n, k), smoothed until more work nowhere takes less time. Attention: median
efficiency over (sequence, batch * heads). Collectives: measured seconds; rates that fall at the largest messages
take the rate before them. Rows of the files that are no node of the grid are left out of the fit: their
error is that of the interpolation.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from autopar.cluster import load_cluster
from autopar.cluster.cost_tables import load_device
from autopar.cluster.device import Device

ROOT = Path(__file__).resolve().parents[2]
GIB, MIB = 2**30, 2**20
COLLECTED = "2026-11-21"  # the day the published figures were copied
AICONFIGURATOR = "ai-dynamo/aiconfigurator systems data @095f58a51 (Apache-2.0)"
LAYERS = "fit of this model to 328 published training runs (tests/benchmarks/left_out.py)"
WIDTHS = (256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 16384, 65536)
SEQUENCES = (1024, 2048, 4096, 8192, 16384)
BATCH_HEADS = (4, 16, 64, 256, 1024)
MATMUL_FILES = {"A100": "a100_sxm", "H100": "h100_sxm", "H200": "h200_sxm", "L40S": "l40s"}
MEASURED_DEVICES = ("A100-SXM-80GB", "H100-SXM-80GB", "H200-SXM-141GB", "L40S")
OPS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}

# name: (row of hardware.json, usable GiB, matmul sibling, attention sibling, sustained, flash speed, missing peaks)
DEVICES: dict[str, tuple[str, float | None, str, str, float, float, dict[str, float]]] = {
    "V100-SXM-16GB": ("V100-SXM2-16GB", None, "A100", "a100", 0.88, 0.70, {}),
    "V100-SXM-32GB": ("V100-SXM2-32GB", None, "A100", "a100", 0.88, 0.70, {}),
    "A100-SXM-40GB": ("A100-SXM4-40GB", None, "A100", "a100", 0.90, 0.57, {}),
    "A100-SXM-80GB": ("A100-SXM4-80GB", None, "A100", "a100", 0.925, 0.57, {}),
    "H100-SXM-80GB": ("H100-SXM5-80GB", None, "H100", "h100", 0.94, 0.365, {}),
    "H100-PCIe": ("H100-PCIe-80GB", 79.1, "H100", "h100", 0.85, 0.365, {"float32": 51.2}),
    "H200-SXM-141GB": ("H200-SXM-141GB", 139.8, "H200", "h100", 0.94, 0.365, {"float32": 67.0}),
    "B200-SXM-180GB": ("B200-SXM-180GB", 178.3, "H200", "h100", 0.94, 0.365, {"float32": 80.0}),
    "A40": ("A40-48GB", 44.4, "A100", "a100", 0.90, 0.57, {}),
    "L40S": ("L40S-48GB", 44.5, "L40S", "a100", 0.90, 0.57, {"float32": 91.6}),
    "T4": ("T4-16GB", 14.7, "A100", "a100", 0.60, 0.70, {}),
}

# name: (device, devices per node, Gbit/s per node, NICs, latency between nodes, p2p bytes/s in the node, curves)
CLUSTERS: dict[str, tuple[str, int, float, int, float, float, str]] = {
    "p3.16xlarge": ("V100-SXM-16GB", 8, 25, 1, 50e-6, 42.4e9, "v100"),
    "dgx-2": ("V100-SXM-32GB", 16, 800, 8, 15e-6, 120e9, "nvswitch2"),
    "dgx-a100": ("A100-SXM-80GB", 8, 1600, 8, 15e-6, 163.7e9, "a100"),
    "dgx-a100-40g": ("A100-SXM-40GB", 8, 1600, 8, 15e-6, 163.7e9, "a100"),
    "jean-zay-a100": ("A100-SXM-80GB", 8, 400, 4, 15e-6, 163.7e9, "a100"),
    "dgx-h100": ("H100-SXM-80GB", 8, 3200, 8, 15e-6, 280e9, "h100"),
    "dgx-h200": ("H200-SXM-141GB", 8, 3200, 8, 15e-6, 298e9, "h200"),
    "dgx-b200": ("B200-SXM-180GB", 8, 3200, 8, 15e-6, 331e9, "b200"),
    "a40": ("A40", 4, 100, 1, 25e-6, 20e9, "pcie4"),
    "t4": ("T4", 8, 50, 1, 50e-6, 10e9, "pcie3"),
    "cpu-gloo": ("CPU", 8, 10, 1, 50e-6, 2e9, "gloo"),
}
REACHED_GBITS_PER_S = {"jean-zay-a100": 135.0}
"""What a node's network was seen to carry, where that is published: its NICs promise 400."""
MODELLED = {
    "nvswitch2": (16, 122e9, 10e-6),
    "pcie4": (4, 24e9 * 0.7, 10e-6),
    "pcie3": (8, 24e9 * 0.7 / 2, 15e-6),
    "gloo": (8, 1e9, 100e-6),
}


def source(text: str, status: str) -> dict[str, str]:
    return {"source": text, "date": COLLECTED, "status": status}


def sibling_source(sibling: str, own: bool) -> dict[str, str]:
    if own:
        return source(AICONFIGURATOR, "measured")
    return source(f"{AICONFIGURATOR}; the curve of {sibling}, scaled by peak", "modelled")


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def more_work_takes_longer(log_s: np.ndarray) -> np.ndarray:
    """Midway between the running maximum from below and the running minimum from above, along each axis in turn."""
    for _ in range(4):
        for axis in range(log_s.ndim):
            rising = np.maximum.accumulate(log_s, axis)
            falling = np.flip(np.minimum.accumulate(np.flip(log_s, axis), axis), axis)
            log_s = (rising + falling) / 2
    for axis in range(log_s.ndim):
        log_s = np.maximum.accumulate(log_s, axis)
    return log_s


def matmul_table(rows: list[dict[str, str]], peak: float) -> dict[str, Any]:
    measured = {tuple(int(row[key]) for key in "mnk"): float(row["latency_us"]) * 1e-6 for row in rows}
    heights = tuple(sorted({m for m, _, _ in measured}))
    log_speed = np.full((len(heights), len(WIDTHS), len(WIDTHS)), np.nan)
    for i, m in enumerate(heights):
        for j, n in enumerate(WIDTHS):
            for o, k in enumerate(WIDTHS):
                if (m, n, k) in measured:
                    log_speed[i, j, o] = np.log(2.0 * m * n * k / measured[m, n, k])
    while np.isnan(log_speed).any():  # a hole gets the mean of its neighbours
        padded = np.pad(log_speed, 1, constant_values=np.nan)
        around = [np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for step in (1, -1)]
        known = ~np.isnan(around)
        mean = np.where(known, around, 0).sum(0) / np.maximum(known.sum(0), 1)
        log_speed = np.where(np.isnan(log_speed) & known.any(0), mean, log_speed)
    work = np.log(2.0 * np.array(heights)[:, None, None] * np.array(WIDTHS)[:, None] * np.array(WIDTHS))
    log_s = more_work_takes_longer(work - log_speed)
    efficiency = np.minimum(np.exp(work - log_s) / peak, 1.0)
    flat = [significant(value) for value in efficiency.ravel()]
    return {"m": heights, "n": WIDTHS, "k": WIDTHS, "efficiency": flat}


def causal_flops(row: dict[str, str]) -> float:
    return 2.0 * int(row["batch"]) * int(row["heads"]) * int(row["seq"]) ** 2 * 128


def attention_table(rows: list[dict[str, str]], peak: float) -> dict[str, Any]:
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        bucket = int(row["batch"]) * int(row["heads"])
        nearest = min(BATCH_HEADS, key=lambda node: abs(np.log(node / bucket)))
        if int(row["seq"]) in SEQUENCES and abs(np.log(nearest / bucket)) < 0.45:
            cells[int(row["seq"]), nearest].append(causal_flops(row) / float(row["latency_us"]) * 1e6 / peak)
    last = 0.0
    efficiency = []
    for seq in SEQUENCES:
        for node in BATCH_HEADS:
            last = float(np.median(cells[seq, node])) if cells[seq, node] else last
            efficiency.append(significant(last))
    return {"seq": SEQUENCES, "batch_heads": BATCH_HEADS, "efficiency": efficiency}


def device_document(name: str, folder: Path, hardware: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row_name, usable_gib, sibling, attention, sustained, flash_speed, extra = DEVICES[name]
    row = hardware[row_name]
    peaks = {"bfloat16": row["bf16_dense_tflops"], "float16": row["fp16_dense_tflops"], "float32": row["fp32_tflops"]}
    peaks = {dtype: (peak or extra.get(dtype, 0)) * 1e12 for dtype, peak in peaks.items()}
    own_gemm = name in MEASURED_DEVICES
    sustained_is_fitted = name.startswith(("A100", "V100", "H100-SXM"))
    own_attention = name in ("A100-SXM-80GB", "H100-SXM-80GB")
    tables = {
        sib: matmul_table(rows_of(folder / f"components/gemm_bf16_{MATMUL_FILES[sib]}.csv"), peak)
        for sib, peak in ((sibling, {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12}[sibling]),)
    }
    attention_rows = rows_of(folder / f"components/attn_causal_fwd_bf16_d128_{attention}_sxm.csv")
    sheet = source(f"hardware collection: {row['source']}", "published" if row["confidence"] == "exact" else "recalled")
    partly = source(sheet["source"] + "; float32 recalled from the data sheet", "recalled")
    return {
        "name": name,
        "memory_bytes": int((row["mem_usable_gib"] or usable_gib) * GIB),
        "peak_flops_per_s": {dtype: peak for dtype, peak in peaks.items() if peak},
        "memory_bytes_per_s": row["hbm_gbytes_s"] * 1e9,
        "memory_efficiency": 0.8,
        "launch_s": 38e-6,
        "kernel_latency_s": 2.5e-6,
        "context_bytes": 512 * MIB,
        "sustained_fraction": sustained,
        "unaligned_matmul_speed": 0.5,
        "matmul": tables[sibling],
        "flash_attention": attention_table(attention_rows, {"a100": 312e12, "h100": 989e12}[attention]),
        "flash_speed": flash_speed,
        "flash_backward_speed": 0.85,
        "flash_head_dim_exponent": 0.23,
        "math_forward_bytes_per_score": 8.0,
        "math_backward_bytes_per_score": 9.0,
        "provenance": {
            "memory_bytes": source("capacity in public PyTorch out-of-memory messages" if row["mem_usable_gib"] else
                                   "visible capacity as nvidia-smi reports it, less 1 %",
                                   "measured" if row["mem_usable_gib"] else "recalled"),
            "peak_flops_per_s": partly if extra or "fp32_tflops" in (row["recalled_fields"] or []) else sheet,
            "memory_bytes_per_s": sheet,
            "memory_efficiency": source(f"{AICONFIGURATOR}: memory-bound kernels; {LAYERS}", "measured"),
            "launch_s": source(f"PyTorch 2.0 eager, 35 ops x 30 us a layer; {LAYERS}", "measured"),
            "kernel_latency_s": source(f"shortest matmuls of {AICONFIGURATOR}", "measured"),
            "context_bytes": source("nvidia-smi shows 0.5-1.5 GB more than torch; low end", "assumed"),
            "sustained_fraction": source(LAYERS, "measured" if sustained_is_fitted else "assumed"),
            "unaligned_matmul_speed": source(
                "Megatron-DeepSpeed with an odd vocabulary of 50257 and tp=1: the head takes 2.1-2.5 times as long (vTrain "
                "single node); Karpathy, 2023: padding it makes nanoGPT 25 % faster", "measured"),
            "matmul": sibling_source(sibling, own_gemm),
            "flash_attention": sibling_source(attention.upper(), own_attention),
            "flash_speed": source(
                f"torch's kernels against the table's newest: 0.4-0.7 in 2023, 0.8-1 now; {LAYERS}", "assumed"),
            "flash_backward_speed": source(
                "Dao, FlashAttention-2, 2023, figures 4-6: 63 % against 73 % of peak", "published"),
            "flash_head_dim_exponent": source(
                "Dao, FlashAttention-2, 2023, figure 5: head_dim 64 about 0.85 of 128", "published"),
            "math_forward_bytes_per_score": source(
                "count: fused causal softmax reads half (1) and writes (2), dropout reads and writes (4) and its mask (1)",
                "published"),
            "math_backward_bytes_per_score": source(
                "count: dropout reads a gradient (2) and the mask (1), writes (2); softmax reads half of two (2), writes (2)",
                "published"),
        },
    }  # fmt: skip


def cpu_document() -> dict[str, Any]:
    """One rank of a developer's machine: round numbers, for tests that run without a GPU."""
    numbers = {"memory_bytes": 4 * GIB, "peak_flops_per_s": {"float32": 5e10}, "memory_bytes_per_s": 1e10,
               "memory_efficiency": 0.8, "launch_s": 5e-6, "kernel_latency_s": 5e-6, "context_bytes": 0,
               "sustained_fraction": 0.9, "unaligned_matmul_speed": 1.0, "matmul": {"m": [1], "n": [1], "k": [1], "efficiency": [0.8]},
               "flash_attention": {"seq": [128], "batch_heads": [1], "efficiency": [0.4]}, "flash_speed": 1.0,
               "flash_backward_speed": 0.85, "flash_head_dim_exponent": 0.0,
               "math_forward_bytes_per_score": 9.0, "math_backward_bytes_per_score": 11.0}  # fmt: skip
    provenance = {key: source("a core of a developer's machine, round numbers", "assumed") for key in numbers}
    return {"name": "CPU", **numbers, "provenance": provenance}


def monotone_rates(sizes: list[int], seconds: list[float]) -> list[float]:
    """More bytes take no less time, and beyond 16 MB no lower rate: NCCL's choice of algorithm steps back there."""
    monotone_s = [seconds[0]]
    for i in range(1, len(sizes)):
        time_s = max(seconds[i], monotone_s[-1])
        if sizes[i] > 16 * MIB:
            time_s = min(time_s, monotone_s[-1] * sizes[i] / sizes[i - 1])
        monotone_s.append(time_s)
    return [significant(time_s) for time_s in monotone_s]


def curve(kind: str, num_ranks: int, points: dict[int, float]) -> dict[str, Any]:
    sizes = sorted(points)
    return {
        "kind": kind,
        "num_ranks": num_ranks,
        "num_bytes": sizes,
        "time_s": monotone_rates(sizes, [points[s] for s in sizes]),
    }


def nvswitch_curves(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    points: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for row in rows:
        size = int(row["total_bytes"])
        if size == 512 * MIB or (size & (size - 1) == 0 and size.bit_length() % 2 == 0):
            points[OPS[row["op"]], int(row["gpus"])][size] = float(row["latency_us"]) * 1e-6
    return [curve(kind, ranks, found) for (kind, ranks), found in sorted(points.items())]


def cube_mesh_curves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """all_reduce measured for 2..8 ranks; the others take a half of it: one pass over the same rings."""
    curves = []
    for ranks in range(2, 9):
        points = {
            r["message_bytes"]: r["time_us"] * 1e-6
            for r in rows
            if r["system"] == "vTrain V100 node" and r["gpus"] == ranks
        }
        rate_s = points[max(points)] / max(points)
        points[1024] = max(points[MIB] - MIB * rate_s, 15e-6)
        curves.append(curve("all_reduce", ranks, points))
        for kind in ("all_gather", "reduce_scatter", "all_to_all"):
            curves.append(curve(kind, ranks, {size: time_s / 2 for size, time_s in points.items()}))
    return curves


def modelled_curves(largest: int, rate: float, latency_s: float) -> list[dict[str, Any]]:
    """alpha-beta: a latency per step and one bus bandwidth."""
    curves = []
    for ranks in sorted({2, 4, largest}):
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
            passes = (2 if kind == "all_reduce" else 1) * (ranks - 1)
            points = {size: passes * (latency_s + size / ranks / rate) for size in (2**i for i in range(10, 32, 3))}
            curves.append(curve(kind, ranks, points))
    return curves


def cluster_document(name: str, folder: Path, collectives: list[dict[str, Any]]) -> dict[str, Any]:
    device, per_node, gbits, nics, latency_s, link, curves = CLUSTERS[name]
    if curves == "v100":
        table = cube_mesh_curves(collectives)
        lookup = "VIA-Research/vTrain NCCL look-up table: all_reduce among 2..8 of a node; others take half of it"
        origin = source(lookup, "measured")
        p2p = source("microsoft/SuperScaler@fa80ad0, p2p in a V100 node", "measured")
    elif curves == "gloo":
        table, origin = modelled_curves(*MODELLED[curves]), source("alpha-beta over loopback, round numbers", "assumed")
        p2p = origin
    elif curves in MODELLED:
        table = modelled_curves(*MODELLED[curves])
        slide = "NVIDIA GTC24 slide in stas00/ml-engineering@744d01e: PCIe gen4 nodes 24 GB/s bus bandwidth"
        if curves == "nvswitch2":
            slide = "NVIDIA GTC24 slide in stas00/ml-engineering@744d01e: NVLink2 nodes 122 GB/s bus bandwidth"
        origin = source(
            f"alpha-beta; {slide}" + ("" if curves == "nvswitch2" else ", 0.7 of it, half on gen3"), "modelled"
        )
        p2p = origin
    else:
        table = nvswitch_curves(rows_of(folder / f"components/nccl_{curves}_sxm.csv"))
        origin = source(f"nccl-tests in {AICONFIGURATOR}", "measured")
        p2p = source(f"all_to_all among 2 ranks, {AICONFIGURATOR}", "measured")
        if curves == "a100":
            p2p = source("PKU-DAIR/Hetu-Galvatron@cea12ff, p2p in a node", "measured")
    gpu = device != "CPU"
    status = "measured" if gpu else "assumed"
    network = {
        "p3.16xlarge": ("AWS table (infoq.cn copy): 25 Gb/s, one ENA", "published"),
        "dgx-2": ("NVIDIA DGX-2 data sheet: 8x 100 Gb/s", "recalled"),
        "dgx-a100": ("Korthikanti et al. 2022: 8x HDR200", "published"),
        "dgx-a100-40g": ("Korthikanti et al. 2022: 8x HDR200", "published"),
        "jean-zay-a100": ("bigscience tr11-176B-ml/README.md: 4x Omni-Path 100 Gb/s", "published"),
        "dgx-h100": ("NVIDIA GTC24 slide; torchtitan 2024-12: 8x 400 Gb/s", "published"),
        "dgx-h200": ("as DGX H100: 8x 400 Gb/s", "recalled"),
        "dgx-b200": ("as DGX H100: 8x 400 Gb/s", "recalled"),
    }
    rate = source(*network.get(name, ("a usual network of such nodes", "assumed")))
    reached = REACHED_GBITS_PER_S.get(name)
    slower = "2 x 8 A100 at 400 Gb/s: 0.83, 4 x 8 B200 at 3200: 0.74 (aws-samples nccl-tests, ml-engineering)"
    chronicle = "bigscience tr11-176B-ml/chronicles-prequel.md: about 135 Gb/s a node in practice"
    measured = source(chronicle, "published") if reached else None
    return {
        "name": name,
        "device": device,
        "devices_per_node": per_node,
        "inter_node_gbits_per_s": float(gbits),
        "nics_per_node": nics,
        "inter_node_efficiency": reached / gbits if reached else 0.7,
        "inter_node_transfer_efficiency": min(0.43, reached / gbits) if reached else 0.43,
        "inter_node_ramp_bytes": 60.0 * MIB if gpu else 0.0,
        "inter_node_latency_s": latency_s,
        "link_bytes_per_s": link,
        "link_latency_s": 8e-6 if gpu else 50e-6,
        "training_slowdown": 1.17 if gpu else 1.0,
        "overlap_contention": 0.6 if gpu else 0.5,
        "first_communicator_bytes": 392 * MIB if gpu else 0,
        "next_communicator_bytes": 64 * MIB if gpu else 0,
        "collectives": table,
        "provenance": {
            "devices_per_node": rate,
            "inter_node_gbits_per_s": rate,
            "nics_per_node": rate,
            "inter_node_efficiency": measured or source(f"just below {slower}", "assumed"),
            "inter_node_transfer_efficiency": measured
            or source(
                "Aceso, two V100 nodes at 100 Gb/s: 5.4 GB/s point to point (Galvatron: 8 GB/s between A100 nodes)",
                status,
            ),
            "inter_node_ramp_bytes": source(
                "aws-samples nccl-tests, 16 ranks of 2 nodes: half of the rate at 40-90 MB on p4de and p5", status
            ),
            "inter_node_latency_s": source(
                "16 ranks of 2 nodes, small messages: 70 us on H100, 161 us on A100 with EFA; InfiniBand less",
                "assumed",
            ),
            "link_bytes_per_s": p2p,
            "link_latency_s": source("small messages among 2 ranks", status),
            "training_slowdown": source(f"vTrain: about 30 % slower inside training; {LAYERS}", status),
            "overlap_contention": source(f"FSDP on 8 A100 and H100; {LAYERS}", status),
            "first_communicator_bytes": source(f"{AICONFIGURATOR}: 342 MiB among 2, 392 among 4 and 8", status),
            "next_communicator_bytes": source("buffers NCCL allocates lazily, per further communicator", "assumed"),
            "collectives": origin,
        },
    }


def write(kind: str, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1)
    while (shorter := squeeze(text)) != text:
        text = shorter
    (ROOT / "cost_tables" / f"{kind}.{document['name']}.json").write_text(text + "\n")


def squeeze(text: str) -> str:
    """Lists of numbers on one line: a table stays readable, a diff short."""
    lines: list[str] = []
    for line in text.splitlines():
        body = line.strip()
        numeric = body.rstrip(",").replace(".", "").replace("e-", "").replace("-", "").isdigit()
        if (
            lines
            and (numeric or body in ("]", "],"))
            and lines[-1].count("[") > lines[-1].count("]")
            and len(lines[-1]) < 10**6
        ):
            lines[-1] += body if body.startswith("]") else (" " if lines[-1].endswith(",") else "") + body
        else:
            lines.append(line)
    return "\n".join(lines)


def errors(ratio: np.ndarray) -> str:
    error = np.abs(ratio - 1)
    p90, bias = np.quantile(error, 0.9), np.median(ratio) - 1
    return f"median {np.median(error):.1%}, p90 {p90:.1%}, bias {bias:+.1%}, n {len(error)}"


def matmul_ratios(device: Device, rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Predicted (without the sustained derate) over measured, and which rows are no nodes of the table."""
    m, n, k = (np.array([int(row[key]) for row in rows]) for key in "mnk")
    alone = msgspec.structs.replace(device, sustained_fraction=1.0)
    predicted = alone.matmul_s(m, n, k, dtype="bfloat16")
    outside = ~(np.isin(n, device.matmul.n) & np.isin(k, device.matmul.k))
    return predicted / np.array([float(row["latency_us"]) * 1e-6 for row in rows]), outside


def attention_ratios(device: Device, rows: list[dict[str, str]]) -> np.ndarray:
    b, h, g, s = (np.array([int(row[key]) for row in rows]) for key in ("batch", "heads", "kv_heads", "seq"))
    alone = msgspec.structs.replace(device, sustained_fraction=1.0, flash_speed=1.0)
    predicted = alone.attention_s(b, h, g, s, s, 128, causal=True, dtype="bfloat16", backward=False, flash=True)
    return predicted / np.array([float(row["latency_us"]) * 1e-6 for row in rows])


def collective_ratios(name: str, rows: list[dict[str, str]]) -> np.ndarray:
    cluster = load_cluster(name, training_slowdown=1.0)
    ratios = []
    for row in rows:
        ranks = int(row["gpus"])
        group = cluster.axis_group(ranks, (ranks,), (0,))
        predicted_s = float(cluster.collective_s(OPS[row["op"]], int(row["total_bytes"]), group))
        ratios.append(predicted_s / (float(row["latency_us"]) * 1e-6))
    return np.array(ratios)


def report(folder: Path) -> None:
    for name, file in (
        ("A100-SXM-80GB", "a100_sxm"),
        ("H100-SXM-80GB", "h100_sxm"),
        ("H200-SXM-141GB", "h200_sxm"),
        ("L40S", "l40s"),
    ):
        ratio, outside = matmul_ratios(load_device(name), rows_of(folder / f"components/gemm_bf16_{file}.csv"))
        print(f"matmul {name}: all {errors(ratio)}; held out {errors(ratio[outside])}")
    for name, file in (("A100-SXM-80GB", "a100"), ("H100-SXM-80GB", "h100")):
        rows = rows_of(folder / f"components/attn_causal_fwd_bf16_d128_{file}_sxm.csv")
        print(f"attention {name}: {errors(attention_ratios(load_device(name), rows))}")
    for gpu in ("a100", "h100", "h200", "b200"):
        ratio = collective_ratios(f"dgx-{gpu}", rows_of(folder / f"components/nccl_{gpu}_sxm.csv"))
        print(f"collectives dgx-{gpu}: {errors(ratio)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "../shared/measurements")
    parser.add_argument("--write", action="store_true", help="write cost_tables/ before the report")
    arguments = parser.parse_args()
    if arguments.write:
        hardware = {row["name"]: row for row in json.loads((arguments.folder / "hardware.json").read_text())}
        collectives = [json.loads(line) for line in (arguments.folder / "collectives.jsonl").read_text().splitlines()]
        for name in DEVICES:
            write("device", device_document(name, arguments.folder, hardware))
        write("device", cpu_document())
        for name in CLUSTERS:
            write("cluster", cluster_document(name, arguments.folder, collectives))
    report(arguments.folder)


if __name__ == "__main__":
    main()
