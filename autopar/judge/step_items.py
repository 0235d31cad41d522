"""Where the step goes on the busiest submesh, as the judge prices it: items that add up to the step time.

B micro-batches; sums are over the blocks (and chunks) of the submesh:

    kernels, activations, launches    B * their seconds, all exposed
    parameters, gradients             per micro-batch: B * what a block's compute does not overlap, shared out by duration
    gradients, once per step          max(r - b, 0) + contention * min(r, b) of reductions r behind the last backward b
    parameters, once per step         all of it
    optimizer                         the rest of the work once per step
    sends of tied gradients           once per step, all of it
    transfers                         T(with them) - T(without them), T the simulated step; at most the submesh's own
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
    """The items of the busiest submesh. Per stage: ``block_prices`` of its blocks, ``stage_times``, and ``tied_transfer_s``,
    the seconds in which it receives the gradients of tied parameters."""
    B = plan.microbatches
    stages_by_device: dict[int, list[int]] = defaultdict(list)
    for index, planned in enumerate(plan.stages):
        stages_by_device[planned.first_device].append(index)

    def busy_s(stages: list[int]) -> float:
        """Seconds that a submesh works in a step."""
        times = [stage_times[stage] for stage in stages]
        return sum(B * (time.forward_s + time.backward_s) + time.step_s for time in times)

    busiest = max(stages_by_device.values(), key=busy_s)
    block_seconds = [price.seconds for stage in busiest for price in block_prices[stage]]
    items = _compute_items(plan, block_seconds, cluster, len(busiest))
    optimizer_s = 0.0
    for stage in busiest:
        collective_items, optimizer_of_stage_s = _collective_items(plan, stage, block_prices[stage], cluster)
        items += collective_items
        optimizer_s += optimizer_of_stage_s
    items.append(TimeItem(kind="optimizer", total_s=optimizer_s, exposed_s=optimizer_s))
    idle_s = max(step_time_s - busy_s(busiest), 0.0)
    transfers_s = B * sum(
        stage_times[stage].transfer_forward_s + stage_times[stage].transfer_backward_s for stage in busiest
    )
    exposed_s = min(_exposed_transfer_s(plan, stage_times, step_time_s), idle_s, transfers_s)
    if tied_s := sum(tied_transfer_s[stage] for stage in busiest):
        items.append(TimeItem(kind="send", of="gradients", total_s=tied_s, exposed_s=tied_s))
    if transfers_s:
        items.append(TimeItem(kind="transfers", total_s=transfers_s, exposed_s=exposed_s))
    items.append(TimeItem(kind="bubble", total_s=idle_s - exposed_s, exposed_s=idle_s - exposed_s))
    return _merged(items)


def time_parts_of(items: tuple[TimeItem, ...]) -> TimeParts:
    """The items by kind: seconds of collectives by their kind, and what is exposed of all of them."""

    def exposed_s(kind: str) -> float:
        """Of all items of a kind."""
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
    """Kernels and launches of the blocks of ``num_stages`` stages."""
    B, software, launch_s = plan.microbatches, load_software(plan.execution.fusion), cluster.device.launch_s
    launches_s = B * sum(block.launch_s for block in block_seconds)
    launches_s += num_stages * (B * software.microbatch_calls + software.step_calls) * launch_s
    seconds = {kind: B * sum(getattr(block, f"{kind}_s") for block in block_seconds) for kind in COMPUTE_KINDS}
    seconds["launches"] = launches_s
    return [TimeItem(kind=kind, total_s=time_s, exposed_s=time_s) for kind, time_s in seconds.items()]


def _collective_items(
    plan: Plan, stage: int, block_prices: list[BlockPrice], cluster: Cluster
) -> tuple[list[TimeItem], float]:
    """The collectives of one stage, and the seconds of its optimizer without the gathers of parameters."""
    B, axes = plan.microbatches, plan.stages[stage].axes
    backward_s, reduction_s = (
        sum(getattr(price, name) for price in block_prices) for name in ("backward_s", "reduction_s")
    )
    contention = cluster.overlap_contention if plan.execution.overlap else 1.0
    exposed_s = max(reduction_s - backward_s, 0.0) + contention * min(reduction_s, backward_s)
    exposed_per_step = {"gradients": exposed_s / reduction_s if reduction_s else 0.0, "parameters": 1.0}
    items, gathers_s = [], 0.0
    for price in block_prices:
        stored_s = sum(
            issued.count * issued.collective.time_s
            for issued in price.collectives
            if issued.of != "activations" and issued.per == "microbatch"
        )
        activations_s = sum(
            issued.count * issued.collective.time_s for issued in price.collectives if issued.of == "activations"
        )
        exposed_of_stored = price.seconds.exposed_parameters_s / stored_s if stored_s else 0.0
        exposed_of_activations = price.seconds.redistribution_s / activations_s if activations_s else 0.0
        for issued in price.collectives:
            total_s = issued.count * issued.collective.time_s * (B if issued.per == "microbatch" else 1)
            if issued.of == "activations":
                share = exposed_of_activations
            else:
                share = exposed_of_stored if issued.per == "microbatch" else exposed_per_step[issued.of]
            names = tuple(axes[axis].name for axis in issued.collective.axes)
            # a block may be charged for more than it issues: the backward regathers and recomputes only what it reads
            charged_s = max(total_s, share * total_s)
            items.append(
                TimeItem(
                    kind=issued.collective.kind,
                    axes=names,
                    of=issued.of,
                    total_s=charged_s,
                    exposed_s=share * total_s,
                )
            )
            gathers_s += total_s if (issued.per, issued.of) == ("step", "parameters") else 0.0
    return items, max(sum(price.optimizer_s for price in block_prices) - gathers_s, 0.0)


def _exposed_transfer_s(plan: Plan, stage_times: list[StageTimes], step_time_s: float) -> float:
    """Seconds that transfers add to the step."""
    if not any(time.transfer_forward_s or time.transfer_backward_s for time in stage_times):
        return 0.0
    free = [replace(time, transfer_forward_s=0.0, transfer_backward_s=0.0) for time in stage_times]
    return max(step_time_s - simulate(plan.schedule, free, plan.microbatches, plan.num_chunks).step_time_s, 0.0)


def _merged(items: list[TimeItem]) -> tuple[TimeItem, ...]:
    """Items of equal kind, axes and subject added up: compute first, then collectives by falling time, then the rest."""
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
        sorted(
            joined, key=lambda item: (order.index("" if item.of else item.kind), -item.total_s, item.kind, item.axes)
        )
    )
