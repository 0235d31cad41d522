"""A plan as text: what `autopar show` and the end of `autopar plan` print."""

from io import StringIO

from rich.console import Console, RenderableType
from rich.table import Table

from autopar.core.mesh_axis import axes_text
from autopar.core.plan import Plan, StagePlan
from autopar.core.units import bar_text, count_text, flops_text, gib_text, percent_text, ranges_text, seconds_text
from autopar.report.breakdown import memory_table, time_table
from autopar.report.collective_totals import collective_totals
from autopar.report.sharding import sharding_lines

BAR_WIDTH = 10
WIDE_COLUMNS = 100


def plan_text(plan: Plan, *, width: int = 120, verbose: bool = False) -> str:
    """The full report in lines of at most ``width`` characters; ``verbose`` lists every collective."""
    parts: list[RenderableType] = [_header(plan), "", _stage_table(plan, width), "", _figures(plan)]
    if plan.estimate.items:
        where = " on the devices of the busiest stage" if len(plan.stages) > 1 else ""
        parts += ["", f"Where the step goes{where}", time_table(plan, bars=width >= WIDE_COLUMNS)]
    parts += ["", f"Memory of a device in GiB, of {gib_text(plan.estimate.budget_bytes)}"]
    parts.append(memory_table(plan, width=width))
    if verbose:
        if plan.estimate.collectives:
            parts += ["", "Collectives", _collective_table(plan)]
    elif plan.estimate.collectives:
        parts += ["", "Collectives", _totals_table(plan)]
    if lines := sharding_lines(plan):
        parts += ["", "Parameters"]
        grid = _grid(2 if not any(line.stages for line in lines) else 3)
        for line in lines:
            cells = [f"  {line.pattern}", line.text, f"stage {line.stages}" if line.stages else ""]
            grid.add_row(*cells[: len(grid.columns)])
        parts.append(grid)
    if plan.notes:
        parts += ["", "Notes", *(f"  - {note}" for note in plan.notes)]
    return render(*parts, width=width)


def render(*parts: RenderableType, width: int) -> str:
    """Plain text of rich renderables, without colours or trailing blanks, the same on a terminal and in a pipe."""
    stream = StringIO()
    console = Console(
        file=stream, width=width, color_system=None, force_terminal=False, highlight=False, markup=False, emoji=False
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def batch_text(plan: Plan) -> str:
    """How the global batch is split into micro-batches."""
    noun = "micro-batch" if plan.microbatches == 1 else "micro-batches"
    return f"{plan.microbatches} {noun} of {plan.micro_batch_size} samples"


def _header(plan: Plan) -> Table:
    """What the plan is for: model, cluster, software."""
    settings = " ".join(f"{key}={value}" for key, value in plan.model.settings.items())
    overrides = " ".join(f"{key}={value}" for key, value in plan.cluster.overrides.items())
    execution = plan.execution
    grid = _grid(2)
    grid.add_row("model", " ".join(filter(None, (plan.model.path or "(built in Python)", settings))))
    grid.add_row("parameters", count_text(plan.model.num_parameters))
    grid.add_row("cluster", " ".join(filter(None, (f"{plan.gpus} GPUs of {plan.cluster.name}", overrides))))
    grid.add_row(
        "software",
        f"{execution.dtype}, {execution.optimizer}, {execution.attn} attention, fusion {execution.fusion}, "
        f"gradients {execution.grads}, overlap {'on' if execution.overlap else 'off'}",
    )
    return grid


def _stage_table(plan: Plan, width: int) -> Table:
    """One row per stage; bars and seconds per step only where there is room, so that no figure is ever truncated."""
    roomy = width >= WIDE_COLUMNS
    chunked = roomy and plan.num_chunks > 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stage", justify="right", no_wrap=True)
    if chunked:
        table.add_column("chunk", justify="right")
    table.add_column("blocks", overflow="fold", ratio=1, min_width=16 if roomy else 8)
    for name in ("GPUs", "axes"):
        table.add_column(name, no_wrap=roomy, overflow="fold")
    for name in ("forward", "backward", *(["per step"] if roomy else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("in flight", justify="right")
    table.add_column("memory", no_wrap=True)
    budget = plan.estimate.budget_bytes
    for position, stage in enumerate(plan.stages):
        used = stage.memory.total
        cells = [
            str(position),
            _blocks_text(stage),
            ranges_text(list(range(stage.first_device, stage.first_device + stage.num_devices))),
            axes_text(stage.axes),
            seconds_text(stage.forward_s),
            seconds_text(stage.backward_s),
            *([seconds_text(stage.step_s)] if roomy else []),
            str(stage.in_flight),
            f"{bar_text(used / budget, BAR_WIDTH)} {gib_text(used)}" if budget and roomy else gib_text(used),
        ]
        if chunked:
            cells.insert(1, str(stage.chunk))
        table.add_row(*cells)
    return table


def _blocks_text(stage: StagePlan) -> str:
    """``embedding, layers.0 .. layers.11``: of consecutive blocks whose names differ in a number, the first and last."""
    groups: list[list[str]] = []
    for block in stage.blocks:
        stem = block.name.rstrip("0123456789")
        if groups and stem != block.name and groups[-1][0].rstrip("0123456789") == stem:
            groups[-1].append(block.name)
        else:
            groups.append([block.name])
    return ", ".join(names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}" for names in groups)


def _figures(plan: Plan) -> Table:
    """Batch, schedule, times, memory and how the plan was found."""
    estimate, search = plan.estimate, plan.search
    recompute = {"none": "nothing recomputed", "mixed": "recompute differs by block"}
    verdict = "fits" if estimate.fits else "DOES NOT FIT"
    grid = _grid(2)
    chunks = f", {plan.num_chunks} chunks a device" if plan.num_chunks > 1 else ""
    regathers = any(op.regathered for program in plan.programs if program.recompute != "full" for op in program.ops)
    regather = ", gathered inputs are saved sharded and regathered in the backward" if regathers else ""
    grid.add_row("batch", f"{plan.global_batch} samples in {batch_text(plan)}")
    grid.add_row(
        "schedule",
        f"{plan.schedule}{chunks}, {recompute.get(plan.recompute, f'{plan.recompute} recompute')}{regather}",
    )
    grid.add_row("step time", f"{seconds_text(estimate.step_time_s)}, {estimate.tokens_per_s:,.0f} tokens/s")
    if estimate.step_time_high_s:
        ends = (seconds_text(estimate.step_time_low_s), seconds_text(estimate.step_time_high_s))
        memory = (gib_text(estimate.memory_low_bytes), gib_text(estimate.memory_high_bytes))
        grid.add_row("90 % interval", f"step {ends[0]} to {ends[1]}, memory {memory[0]} to {memory[1]}")
    kinds = ", ".join(
        f"{kind} {percent_text(flops / max(estimate.flops_per_step, 1))}"
        for kind, flops in sorted(estimate.flops_by_kind.items(), key=lambda part: -part[1])
    )
    grid.add_row("model FLOPs", f"{flops_text(estimate.flops_per_step)} a step" + (f": {kinds}" if kinds else ""))
    grid.add_row("MFU", percent_text(estimate.mfu))
    grid.add_row("bubble", percent_text(estimate.bubble_fraction))
    grid.add_row("exposed communication", seconds_text(estimate.exposed_communication_s))
    grid.add_row(
        "memory",
        f"{gib_text(estimate.peak_memory_bytes)} of {gib_text(estimate.budget_bytes)}, {verdict} "
        f"(tensors {gib_text(estimate.peak_tensor_bytes)})",
    )
    if basis := _provenance_text(plan):
        grid.add_row("cost basis", basis)
    grid.add_row("search", _search_text(plan))
    if search.runner_up:
        grid.add_row("runner-up", search.runner_up)
    return grid


def _provenance_text(plan: Plan) -> str:
    """``62.0 % of the priced time measured (40 prices), 38.0 % modelled (17)``."""
    seconds, counts = plan.estimate.provenance_s, plan.estimate.provenance
    total_s = sum(seconds.values())
    if not total_s:
        return ""
    first, *rest = (
        f"{percent_text(time_s / total_s)} {{}}{tag} ({counts.get(tag, 0):,}{{}})"
        for tag, time_s in seconds.items()
        if time_s
    )
    return ", ".join([first.format("of the priced time ", " prices"), *(text.format("", "") for text in rest)])


def _search_text(plan: Plan) -> str:
    """Whether the plan is proved optimal, its gap, and the seconds of the search."""
    search = plan.search
    if search.status == "fixed":
        return "none, a manual layout"
    return (
        f"{search.status}, gap {percent_text(search.gap)} "
        f"(bound {seconds_text(search.lower_bound_s)}), {search.seconds:.1f} s"
    )


def _collective_table(plan: Plan) -> Table:
    """Every collective of every stage."""
    grid = _grid(5)
    for collective in plan.estimate.collectives:
        grid.add_row(
            f"  stage {collective.stage}",
            collective.kind,
            "*".join(collective.axes) or "-",
            f"{collective.count} per {'micro-batch' if collective.per == 'microbatch' else 'step'}",
            f"{collective.num_bytes / 2**20:,.2f} MiB",
        )
    return grid


def _totals_table(plan: Plan) -> Table:
    """The totals of ``collective_totals``."""
    grid = _grid(4)
    for line in collective_totals(plan):
        per = "micro-batch" if line.per == "microbatch" else "step"
        where = f", stage {line.stage}" if len(plan.stages) > 1 else ""
        times = f"{line.count} per {per}{where}"
        grid.add_row(f"  {line.kind}", f"over {line.axes}", times, f"{line.num_bytes / 2**20:,.2f} MiB")
    return grid


def _grid(columns: int) -> Table:
    """A table without heading or lines."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(columns):
        grid.add_column(overflow="fold")
    return grid
