"""Where the step goes on the busiest run of devices, as the judge prices it: what adds up to the step time.

B micro-batches; sums are over the blocks (and chunks) of the run:

    kernels, activations, launches    B * their seconds; nothing hides them
    parameters, gradients             per micro-batch: B * what a block's compute does not hide, shared out by duration
    gradients, once a step            max(r - b, 0) + contention * min(r, b) of reductions r behind the last backward b
    parameters, once a step           all of it
    optimizer                         the rest of the work once a step
    sends of tied gradients           once a step, all of it
    transfers                         T(with them) - T(without them), T the simulated step; at most the run's own
    bubble                            step - all of the above
"""

from collections import defaultdict
from dataclasses import replace

from autopar.cluster.cluster import Cluster
from autopar.cluster.software import load_software
from autopar.core.plan import ItemKind, Plan, TimeItem, TimeParts
from autopar.judge.block_price import BlockPrice, BlockSeconds
from autopar.pipeline.simulate import StageTimes, simulate

COMPUTE_KINDS: tuple[ItemKind, ...] = ("matmul", "attention", "memory_bound")


def step_items(
    plan: Plan,
    block_prices: list[list[BlockPrice]],
    stage_times: list[StageTimes],
    tied_transfer_s: list[float],
    cluster: Cluster,
    step_time_s: float,
) -> tuple[TimeItem, ...]:
    """The lines of the busiest run; ``prices`` are of each stage's blocks, ``times`` of each stage, ``tied_s`` of it
    those in which it gets the gradients of tied parameters."""
    B = plan.microbatches
    runs: dict[int, list[int]] = defaultdict(list)
    for position, stage in enumerate(plan.stages):
        runs[stage.first_device].append(position)

    def busy_s(stages: list[int]) -> float:
        return sum(
            B * (stage_times[at].forward_s + stage_times[at].backward_s) + stage_times[at].step_s for at in stages
        )

    run = max(runs.values(), key=busy_s)
    found = _compute_items(plan, [price.seconds for at in run for price in block_prices[at]], cluster, len(run))
    once_s = 0.0
    for at in run:
        items, optimizer_s = _collective_items(plan, at, block_prices[at], cluster)
        found += items
        once_s += optimizer_s
    found.append(TimeItem(kind="optimizer", total_s=once_s, exposed_s=once_s))
    idle_s = max(step_time_s - busy_s(run), 0.0)
    sent_s = B * sum(stage_times[at].transfer_forward_s + stage_times[at].transfer_backward_s for at in run)
    waited_s = min(_exposed_transfer_s(plan, stage_times, step_time_s), idle_s, sent_s)
    if once := sum(tied_transfer_s[at] for at in run):
        found.append(TimeItem(kind="send", of="gradients", total_s=once, exposed_s=once))
    if sent_s:
        found.append(TimeItem(kind="transfers", total_s=sent_s, exposed_s=waited_s))
    found.append(TimeItem(kind="bubble", total_s=idle_s - waited_s, exposed_s=idle_s - waited_s))
    return _merged(found)


def time_parts_of(items: tuple[TimeItem, ...]) -> TimeParts:
    """The same by kind: collectives by their kind, what is exposed of them together."""

    def exposed_s(kind: str) -> float:
        return sum(item.exposed_s for item in items if item.kind == kind)

    communication: dict[str, float] = defaultdict(float)
    for item in items:
        if item.of:
            communication[item.kind] += item.total_s
    return TimeParts(
        matmul_s=exposed_s("matmul"),
        attention_s=exposed_s("attention"),
        memory_bound_s=exposed_s("memory_bound"),
        launch_s=exposed_s("launches"),
        communication_s=dict(communication),
        exposed_communication_s=sum(item.exposed_s for item in items if item.of),
        optimizer_s=exposed_s("optimizer"),
        transfers_s=exposed_s("transfers"),
    )


def _compute_items(plan: Plan, block_seconds: list[BlockSeconds], cluster: Cluster, num_stages: int) -> list[TimeItem]:
    B, software, launch_s = plan.microbatches, load_software(plan.execution.fusion), cluster.device.launch_s
    launches_s = B * sum(block.launch_s for block in block_seconds)
    launches_s += num_stages * (B * software.microbatch_calls + software.step_calls) * launch_s
    seconds = {kind: B * sum(getattr(block, f"{kind}_s") for block in block_seconds) for kind in COMPUTE_KINDS}
    seconds["launches"] = launches_s
    return [TimeItem(kind=kind, total_s=time_s, exposed_s=time_s) for kind, time_s in seconds.items()]


def _collective_items(
    plan: Plan, at: int, block_prices: list[BlockPrice], cluster: Cluster
) -> tuple[list[TimeItem], float]:
    """The collectives of one stage, and the seconds of the optimizer."""
    B, axes = plan.microbatches, plan.stages[at].axes
    backward_s, reduction_s = (
        sum(getattr(price, name) for price in block_prices) for name in ("backward_s", "reduction_s")
    )
    contention = cluster.overlap_contention if plan.execution.overlap else 1.0
    visible_s = max(reduction_s - backward_s, 0.0) + contention * min(reduction_s, backward_s)
    exposed = {"gradients": visible_s / reduction_s if reduction_s else 0.0, "parameters": 1.0}
    found, gathers_s = [], 0.0
    for price in block_prices:
        stored_s = sum(
            one.count * one.collective.time_s for one in price.collectives if _is_of_parameters(one.of, one.per)
        )
        share = price.seconds.exposed_parameters_s / stored_s if stored_s else 0.0
        activations_s = sum(one.count * one.collective.time_s for one in price.collectives if one.of == "activations")
        visible = price.seconds.redistribution_s / activations_s if activations_s else 0.0
        for one in price.collectives:
            total_s = one.count * one.collective.time_s * (B if one.per == "microbatch" else 1)
            part = visible if one.of == "activations" else share if one.per == "microbatch" else exposed[one.of]
            names = tuple(axes[axis].name for axis in one.collective.axes)
            # what is charged may be more than what runs: backward gathers and moves again only what it reads
            taken_s = max(total_s, part * total_s)
            found.append(
                TimeItem(kind=one.collective.kind, axes=names, of=one.of, total_s=taken_s, exposed_s=part * total_s)
            )
            gathers_s += total_s if (one.per, one.of) == ("step", "parameters") else 0.0
    return found, max(sum(price.optimizer_s for price in block_prices) - gathers_s, 0.0)


def _is_of_parameters(of: str, per: str) -> bool:
    return of != "activations" and per == "microbatch"


def _exposed_transfer_s(plan: Plan, stage_times: list[StageTimes], step_time_s: float) -> float:
    """What transfers add to the step."""
    if not any(time.transfer_forward_s or time.transfer_backward_s for time in stage_times):
        return 0.0
    free = [replace(time, transfer_forward_s=0.0, transfer_backward_s=0.0) for time in stage_times]
    return max(step_time_s - simulate(plan.schedule, free, plan.microbatches, plan.num_chunks).step_time_s, 0.0)


def _merged(items: list[TimeItem]) -> tuple[TimeItem, ...]:
    """Equal kinds added up: compute first, then collectives by falling time, then the rest."""
    sums: dict[tuple[str, tuple[str, ...], str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for item in items:
        total = sums[item.kind, item.axes, item.of]
        total[0] += item.total_s
        total[1] += item.exposed_s
    joined = [
        TimeItem(kind=kind, axes=axes, of=of, total_s=total_s, exposed_s=exposed_s)  # type: ignore[arg-type]
        for (kind, axes, of), (total_s, exposed_s) in sums.items()
    ]
    order = ("matmul", "attention", "memory_bound", "launches", "", "transfers", "optimizer", "bubble")
    return tuple(
        sorted(joined, key=lambda one: (order.index("" if one.of else one.kind), -one.total_s, one.kind, one.axes))
    )
