"""The parts of an estimate, with bars: the step time by kind of work, the memory of each submesh by part.

Where the step goes (devices of stage 0)      exposed            all of it
  matmul                                      612.3 ms  ##########..........  51.2 %
  all_gather over dp, parameters               12.0 ms  ....................   1.0 %  of 120.0 ms
"""

from rich.table import Table

from autopar.core.plan import MemoryParts, Plan, TimeItem, device_memory, stages_by_submesh
from autopar.core.units import GIB, bar_text, percent_text, ranges_text, seconds_text

TIME_BAR_WIDTH = 20
MIN_SHARE = 5e-4  # of the step: smaller lines are left out
MEMORY_BAR_WIDTH, MIN_BAR_WIDTH = 32, 16
NUMBERS_WIDTH = 80  # columns that the figures of a memory line take
KIND_NAMES = {
    "memory_bound": "memory-bound kernels",
    "transfers": "transfers between stages",
    "bubble": "idle (bubble)",
}
MEMORY_PARTS = (
    ("P", "params", "parameters_bytes"),
    ("G", "grads", "gradients_bytes"),
    ("O", "optim", "optimizer_bytes"),
    ("A", "saved", "saved_activations_bytes"),
    ("W", "work", "workspace_bytes"),
    ("F", "fixed", "fixed_bytes"),
)
GRADIENTS_COLUMN, SAVED_COLUMN = 1, 3  # their positions in MEMORY_PARTS


def item_text(item: TimeItem) -> str:
    """What an item is, in words.

    >>> item_text(TimeItem(kind="all_gather", total_s=1.0, exposed_s=0.5, axes=("dp",), of="parameters"))
    'all_gather over dp, parameters'
    """
    if item.of:
        return f"{item.kind} over {'*'.join(item.axes) or 'stages'}, {item.of}"
    return KIND_NAMES.get(item.kind, item.kind)


def time_table(plan: Plan, *, bars: bool) -> Table:
    """A line per kind of work: its exposed seconds, their share of the step, and its total where part of it overlaps with
    other work. Items below 0.05 % of the step are left out."""
    step_time_s = plan.estimate.step_time_s
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "right", *(["left"] if bars else []), "right", "left"):
        table.add_column(justify=justify, overflow="fold")  # type: ignore[arg-type]
    for item in plan.estimate.items:
        if item.total_s < MIN_SHARE * step_time_s:
            continue
        share = item.exposed_s / step_time_s
        overlaps = item.total_s - item.exposed_s > MIN_SHARE * step_time_s
        table.add_row(
            f"  {item_text(item)}",
            seconds_text(item.exposed_s),
            *([bar_text(min(share, 1.0), TIME_BAR_WIDTH)] if bars else []),
            percent_text(share),
            f"of {seconds_text(item.total_s)}, the rest overlapped" if overlaps else "",
        )
    return table


def memory_table(plan: Plan, *, width: int) -> Table:
    """A line per submesh, GiB of a device; equal submeshes share one line. The letters of the bar are those of the columns,
    dots are free memory, ``!`` exceeds the budget; there are no bars where ``width`` (characters) is too small.
    Gradients that replace saved tensors count as gradients, so that the columns add up to the total."""
    bar_width = min(width - NUMBERS_WIDTH, MEMORY_BAR_WIDTH)
    bars = bar_width >= MIN_BAR_WIDTH
    budget = plan.estimate.budget_bytes
    rows: dict[MemoryParts, list[int]] = {}
    for position, stages in enumerate(stages_by_submesh(plan)):
        rows.setdefault(device_memory(stages), []).append(position)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("  stages" if plan.num_chunks == 1 else "  ranks", no_wrap=True)
    for letter, name, _ in MEMORY_PARTS:
        table.add_column(f"{name} {letter}" if bars else name, justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    if bars:
        table.add_column("", no_wrap=True)
    for memory, positions in rows.items():
        sizes = [getattr(memory, key) for _, _, key in MEMORY_PARTS]
        freed = min(memory.overlaid_bytes, sizes[SAVED_COLUMN])  # by the peak; the rest are gradients not yet allocated
        sizes[SAVED_COLUMN] -= freed
        sizes[GRADIENTS_COLUMN] -= memory.overlaid_bytes - freed
        cells = [f"  {ranges_text(positions)}", *(f"{size / GIB:,.2f}" for size in (*sizes, memory.total))]
        table.add_row(*cells, *([stacked_bar(sizes, budget, bar_width)] if bars else []))
    return table


def stacked_bar(sizes_bytes: list[int], budget_bytes: int, width: int) -> str:
    """A bar of ``width`` characters for the budget, or for all parts where they exceed it: the letters of each part in
    proportion to its bytes, rounded by the largest remainder.

    >>> stacked_bar([4, 4, 8, 12, 2, 2], 64, 16), stacked_bar([8, 8, 16, 0, 0, 0], 16, 8)
    ('PGOOAAAW........', 'PPGG!!!!')
    """
    full_bytes = max(budget_bytes, sum(sizes_bytes))
    used = round(width * min(sum(sizes_bytes) / full_bytes, 1.0)) if full_bytes else 0
    exact = [used * size / max(sum(sizes_bytes), 1) for size in sizes_bytes]
    counts = [int(part) for part in exact]
    for part in sorted(range(len(exact)), key=lambda part: counts[part] - exact[part])[: used - sum(counts)]:
        counts[part] += 1
    bar = "".join(letter * count for (letter, _, _), count in zip(MEMORY_PARTS, counts, strict=True))
    if sum(sizes_bytes) > budget_bytes:
        inside = int(width * budget_bytes / full_bytes)
        return bar[: min(inside, width - 2)] + "!" * (width - min(inside, width - 2))
    return bar + "." * (width - len(bar))
