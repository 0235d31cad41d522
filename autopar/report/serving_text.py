"""The price of inference as text and as a JSON document.

autopar estimate llama.py --gpus 8 --layout tp=8 --mode decode
"""

from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from autopar.core.units import bar_text, count_text, gib_text, percent_text, seconds_text
from autopar.report.plan_text import render
from autopar.serving.serve import ServingEstimate

SERVING_FORMAT_VERSION = "1.0"
BAR_WIDTH = 20
DECODE_NAMES = {
    "other": "memory-bound kernels",
    "exchange": "exchange between ranks",
    "matmul": "matmul (reading weights)",
    "attention": "attention (reading the cache)",
}
PREFILL_NAMES = {"other": "memory-bound kernels", "exchange": "exchange between ranks"}


def serving_text(serving: ServingEstimate, *, model: str, width: int = 120) -> str:
    """The figures, the parts of the time, memory, and for decode the figures at other batch sizes."""
    decode = serving.mode == "decode"
    parts: list[RenderableType] = [_header(serving, model), "", _figures(serving)]
    parts += ["", "Where the step goes" if decode else "Where the prefill goes", _time_table(serving)]
    parts += ["", "Memory of a device", _memory_table(serving)]
    if serving.curve:
        parts += ["", "Other batches", _curve_table(serving)]
    return render(*parts, width=width)


def serving_document(serving: ServingEstimate, *, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What `estimate --mode prefill|decode --json` prints; its keys must not change."""
    figures = asdict(serving)
    figures["parts"] = {f"{name}_s": seconds for name, seconds in serving.parts}
    figures["curve"] = [asdict(point) for point in serving.curve]
    figures["kv_heads"] = list(serving.kv_heads)
    for key in ("mode", "parameters", "cluster", "gpus"):
        figures.pop(key)
    return {
        "format_version": SERVING_FORMAT_VERSION,
        "mode": serving.mode,
        "model": {"path": model, "settings": settings, "parameters": serving.parameters},
        "cluster": {"name": serving.cluster, "gpus": serving.gpus},
        "serving": {**figures, "peak_memory_bytes": serving.peak_memory_bytes, "fits": serving.fits},
    }


def _grid(*justify: str) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for side in justify:
        grid.add_column(justify=side, overflow="fold")  # type: ignore[arg-type]
    return grid


def _header(serving: ServingEstimate, model: str) -> Table:
    grid = _grid("left", "left")
    grid.add_row("model", model)
    grid.add_row("parameters", count_text(serving.parameters))
    grid.add_row("cluster", f"{serving.gpus} GPUs of {serving.cluster}")
    replicas = f"{serving.replicas} replica{'s' if serving.replicas > 1 else ''} of {serving.tp} GPU"
    grid.add_row("layout", replicas + ("s" if serving.tp > 1 else ""))
    heads = ", ".join(map(str, serving.kv_heads))
    grid.add_row("precision", f"weights {serving.weights}, cache {serving.kv_cache} of {heads} key/value heads")
    return grid


def _figures(serving: ServingEstimate) -> Table:
    grid = _grid("left", "left")
    budget = f"{gib_text(serving.peak_memory_bytes)} of {gib_text(serving.budget_bytes)}"
    verdict = "fits" if serving.fits else "DOES NOT FIT"
    if serving.mode == "decode":
        grid.add_row("batch", f"{serving.batch:,} sequences a replica, {serving.context:,} tokens in the cache of each")
        grid.add_row("time per token", seconds_text(serving.time_s))
        per_user = f"{1 / serving.time_s:,.1f} a sequence"
        grid.add_row("tokens/s", f"{serving.tokens_per_s:,.0f}, {per_user}")
        grid.add_row("MBU", f"{percent_text(serving.mbu)} (MFU {percent_text(serving.mfu)})")
    else:
        grid.add_row("batch", f"{serving.batch:,} sequences a replica of {serving.context:,} tokens")
        grid.add_row("prefill time", seconds_text(serving.time_s))
        grid.add_row("tokens/s", f"{serving.tokens_per_s:,.0f}")
        grid.add_row("MFU", percent_text(serving.mfu))
    grid.add_row("memory", f"{budget}, {verdict}")
    grid.add_row("largest batch", f"{serving.largest_batch:,} sequences a replica fit")
    return grid


def _time_table(serving: ServingEstimate) -> Table:
    words = DECODE_NAMES if serving.mode == "decode" else PREFILL_NAMES
    grid = _grid("left", "right", "left", "right")
    for name, seconds in serving.parts:
        share = seconds / serving.time_s
        if share >= 5e-4:
            grid.add_row(
                f"  {words.get(name, name)}", seconds_text(seconds), bar_text(share, BAR_WIDTH), percent_text(share)
            )
    return grid


def _memory_table(serving: ServingEstimate) -> Table:
    grid = _grid("left", "right", "left")
    sizes = (
        ("weights", serving.weights_bytes),
        ("keys and values", serving.cache_bytes),
        ("workspace", serving.workspace_bytes),
        ("context, buffers", serving.fixed_bytes),
    )
    for name, size in sizes:
        grid.add_row(f"  {name}", gib_text(size), bar_text(size / serving.budget_bytes, BAR_WIDTH))
    return grid


def _curve_table(serving: ServingEstimate) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("  batch", "time per token", "tokens/s", "MBU"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in serving.curve:
        rate = f"{point.tokens_per_s:,.0f}"
        table.add_row(f"{point.batch:,}", seconds_text(point.time_s), rate, percent_text(point.mbu))
    return table
