"""A plan side by side with the best manual layout: figures, their ratio, and where the difference comes from."""

from rich.console import RenderableType
from rich.table import Table

from autopar.core.comparison import Comparison
from autopar.core.mesh_axis import axes_text
from autopar.core.plan import Plan, TimeParts
from autopar.core.units import gib_text, percent_text, ranges_text, seconds_text
from autopar.report.plan_text import render


def comparison_text(comparison: Comparison, *, width: int = 120) -> str:
    """The table of figures and the reasons, in lines of at most ``width`` characters."""
    parts: list[RenderableType] = [_counts_text(comparison), ""]
    best = comparison.best
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("plan", overflow="fold")
    if best is not None:
        table.add_column(comparison.layout, overflow="fold")
    for name, value in _figures_by_name(comparison.plan).items():
        cells = [name, value] if best is None else [name, value, _figures_by_name(best)[name]]
        table.add_row(*cells)
    parts.append(table)
    if best is not None:
        parts += ["", *reasons(comparison.plan, best)]
    return render(*parts, width=width)


def _counts_text(comparison: Comparison) -> str:
    """How many layouts were priced, and how many fit."""
    layouts = f"{comparison.num_layouts} layout{'s' if comparison.num_layouts != 1 else ''}"
    counts = f"{layouts} priced, {comparison.num_fit} of them fit in memory"
    return counts if comparison.best is not None else f"{counts}: nothing to compare with"


def _figures_by_name(plan: Plan) -> dict[str, str]:
    """The rows of the table: figure -> its value in words."""
    estimate = plan.estimate
    return {
        "step time": seconds_text(estimate.step_time_s),
        "tokens/s": f"{estimate.tokens_per_s:,.0f}",
        "MFU": percent_text(estimate.mfu),
        "exposed communication": seconds_text(estimate.exposed_communication_s),
        "bubble": percent_text(estimate.bubble_fraction),
        "memory": gib_text(estimate.peak_memory_bytes) + ("" if estimate.fits else " (does not fit)"),
        "stages": str(len(plan.stages)),
        "axes": plan_axes_text(plan),
        "micro-batches": f"{plan.microbatches} of {plan.micro_batch_size}",
        "schedule": plan.schedule + (f", {plan.num_chunks} chunks" if plan.num_chunks > 1 else ""),
        "recompute": plan.recompute,
    }


def plan_axes_text(plan: Plan) -> str:
    """The axes of all stages, equal ones once.

    Two stages of ``dp 2`` before one of ``dp 4`` are ``dp 2 (stage 0-1), dp 4 (stage 2)``."""
    groups: dict[str, list[int]] = {}
    for position, stage in enumerate(plan.stages):
        groups.setdefault(axes_text(stage.axes), []).append(position)
    if len(groups) == 1:
        return next(iter(groups))
    return ", ".join(f"{text} (stage {ranges_text(positions)})" for text, positions in groups.items())


def reasons(plan: Plan, other: Plan) -> list[str]:
    """The ratio of the step times, and the three parts of the step that differ most (seconds of work of the slowest stage,
    and its idle seconds)."""
    ours, theirs = plan.estimate, other.estimate
    ratio = theirs.step_time_s / ours.step_time_s
    word = "faster" if ratio >= 1 else "slower"
    line = f"The plan is {max(ratio, 1 / ratio):.3f}x {word} than the layout."
    if not theirs.fits:
        line += f" The layout needs {gib_text(theirs.peak_memory_bytes)} of {gib_text(theirs.budget_bytes)}."
    plan_s, other_s = _seconds_by_part(plan), _seconds_by_part(other)
    changes = sorted(((plan_s[name] - other_s[name], name) for name in plan_s), key=lambda change: -abs(change[0]))
    least_s = 0.001 * max(ours.step_time_s, theirs.step_time_s)
    words = [
        f"{name} {'+' if change > 0 else '-'}{seconds_text(abs(change))}"
        for change, name in changes[:3]
        if abs(change) > least_s
    ]
    return [line, *([f"Of a step: {', '.join(words)}."] if words else [])]


def _seconds_by_part(plan: Plan) -> dict[str, float]:
    """Seconds per step of each part that ``reasons`` compares."""
    time: TimeParts = plan.estimate.time
    return {
        "matmul": time.matmul_s,
        "attention": time.attention_s,
        "memory-bound kernels": time.memory_bound_s,
        "launches": time.launch_s,
        "exposed communication": time.exposed_communication_s,
        "optimizer": time.optimizer_s,
        "transfers": time.transfers_s,
        "bubble": plan.estimate.bubble_fraction * plan.estimate.step_time_s,
    }
