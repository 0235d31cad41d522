"""The judge of a plan: prices it from its placements alone, sharing no code with the search.

It reads the plan (placements of every op's tensors and of their gradients, storage of parameters, meshes, recomputation,
micro-batches), the graph with its profiles, the sharding rules, and the device and link curves. From these it adds up:

    block     `block_price`: kernels at local shapes, redistributions, saved tensors, parameters
    stage     sums over blocks + host calls of the micro-batch loop; per step: reductions that the last backward does not
              overlap + gradients of tied parameters + optimizer
    memory    state + micro-batches in flight * saved + workspace + what the allocator does not count, at the peak of a
              backward (`peak_memory`)
    step      the event simulation of the schedule

``judge`` returns the prices, ``differences`` names where the plan's own figures differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from autopar.cluster.cluster import Cluster
from autopar.cluster.software import load_software
from autopar.core.plan import Collective, MemoryParts, Plan, StagePlan, TimeItem, device_memory
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.graph.op_profiles import profile_graph
from autopar.judge.block_price import BlockPrice
from autopar.judge.collective_list import list_collectives
from autopar.judge.context import ModelContext, judged_blocks
from autopar.judge.judge_mesh import JudgeMesh
from autopar.judge.peak_memory import PeakMoment
from autopar.judge.stage_price import JudgedStage, JudgedStagePricer, is_manual
from autopar.judge.step_items import step_items
from autopar.judge.tied_parameter_price import tied_gradient_transfers
from autopar.judge.transfer_price import StageTransfer, stage_transfers
from autopar.pipeline.schedule import rank_actions
from autopar.pipeline.simulate import StageTimes, simulate

RELATIVE_TOLERANCE = 1e-5
SCALAR_SLACK_BYTES = 16.0
"""A few scalars may be counted or not: torch's allocator rounds each up to 512 bytes."""
TIME_FIELDS = ("forward_s", "backward_s", "step_s", "transfer_forward_s", "transfer_backward_s")
MEMORY_FIELDS = (
    "parameters_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "saved_activations_bytes",
    "workspace_bytes",
    "fixed_bytes",
    "overlaid_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJudgement:
    """The judge's price of one stage; fields as in ``StagePlan``."""

    forward_s: float
    backward_s: float
    step_s: float
    transfer_forward_s: float
    transfer_backward_s: float
    in_flight: int
    memory: MemoryParts


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The judge's price of a plan. ``collectives``: what a runtime that executes the plan issues; ``items``: what the step
    time adds up from."""

    stages: tuple[StageJudgement, ...]
    step_time_s: float
    peak_memory_bytes: int
    collectives: tuple[Collective, ...]
    items: tuple[TimeItem, ...]


def judge(
    plan: Plan,
    graph: Graph,
    blocks: tuple[Block, ...],
    cluster: Cluster,
    profile: GraphProfile | None = None,
    context: ModelContext | None = None,
    *,
    shrunk: bool = False,
) -> Judgement:
    """Price ``plan``, which was made for ``graph`` and its ``blocks``. CheckError where its parts contradict each other.

    ``profile`` is that of ``graph``, ``context`` what the judge reads from it; both are made when not given. ``shrunk``:
    the plan is a shrunk copy, whose tiny tensors are redistributed as large ones are.

    Worked example: a block of one (8, 4) x (4, 6) product in fp16, column parallel on 2 ranks, takes the matmul curve
    at (8, 3, 4) and, before it, an all_gather of 8 * 4 * 2 = 64 bytes when its input is placed as ``S(0)``.
    """
    context = context or ModelContext.of(plan.execution, graph, blocks, profile or profile_graph(graph))
    meshes = [
        JudgeMesh(cluster, tuple(axis.size for axis in stage.axes), stage.first_device, prefers_all_to_all=shrunk)
        for stage in plan.stages
    ]
    blocks_of_stages = [judged_blocks(plan, stage, blocks, context.first_of_kind) for stage in plan.stages]
    pricer = JudgedStagePricer(plan, context)
    priced_stages = list(map(pricer.price_stage, plan.stages, blocks_of_stages, meshes))
    transfers = stage_transfers(plan, graph, blocks, meshes, context.parameter_free)
    if is_manual(plan):  # its transfers are Megatron's: a shard from each rank, then a gather
        transfers = [
            (replace(forward, time_s=stage.transfer_forward_s), replace(backward, time_s=stage.transfer_backward_s))
            for (forward, backward), stage in zip(transfers, plan.stages, strict=True)
        ]
    tied = tied_gradient_transfers(graph, blocks_of_stages, meshes)
    tied_s = [sum(transfer.time_s for transfer in tied if transfer.target == stage) for stage in range(len(meshes))]
    stages = tuple(
        _judge_stage(plan, priced, cluster, in_flight, transfers_of_stage, tied_transfer_s)
        for priced, in_flight, transfers_of_stage, tied_transfer_s in zip(
            priced_stages, in_flight_microbatches(plan), transfers, tied_s, strict=True
        )
    )
    times = [StageTimes(**{name: getattr(stage, name) for name in TIME_FIELDS}) for stage in stages]
    step_time_s = simulate(plan.schedule, times, plan.microbatches, plan.num_chunks).step_time_s
    block_prices = [priced.block_prices for priced in priced_stages]
    return Judgement(
        stages=stages,
        step_time_s=step_time_s,
        peak_memory_bytes=_peak_memory_bytes(plan, stages),
        collectives=list_collectives(plan, block_prices, transfers, tied),
        items=step_items(plan, block_prices, times, tied_s, cluster, step_time_s),
    )


def _peak_memory_bytes(plan: Plan, stages: tuple[StageJudgement, ...]) -> int:
    """Of the fullest device; stages of an interleaved schedule share a submesh."""
    stages_by_device: dict[int, list[StagePlan]] = {}
    for planned, judged in zip(plan.stages, stages, strict=True):
        stage = msgspec.structs.replace(planned, memory=judged.memory)
        stages_by_device.setdefault(planned.first_device, []).append(stage)
    return max(device_memory(tuple(sharing)).total for sharing in stages_by_device.values())


def in_flight_microbatches(plan: Plan) -> tuple[int, ...]:
    """Per stage, the micro-batches in flight at the peak of its rank, counted from the actions of the schedule."""
    num_ranks = len(plan.stages) // plan.num_chunks
    in_flight = [0] * len(plan.stages)
    for actions in rank_actions(plan.schedule, num_ranks, plan.microbatches, plan.num_chunks):
        now: dict[int, int] = {}
        peak = 0
        for action in actions:
            now[action.stage] = now.get(action.stage, 0) + (1 if action.kind == "F" else -1)
            if (total := sum(now.values())) > peak:
                peak = total
                for stage, count in now.items():
                    in_flight[stage] = count
    return tuple(in_flight)


def _judge_stage(
    plan: Plan,
    priced_stage: JudgedStage,
    cluster: Cluster,
    in_flight: int,
    transfers: tuple[StageTransfer, StageTransfer],
    tied_transfer_s: float,
) -> StageJudgement:
    """The sums over a stage's blocks. ``transfers``: to the next and to the previous stage; ``tied_transfer_s``: of the
    gradients that it receives once per step."""
    prices, peak = priced_stage.block_prices, priced_stage.peak
    backward_s = sum(price.backward_s for price in prices)
    reduction_s = sum(price.reduction_s for price in prices)
    contention = cluster.overlap_contention if plan.execution.overlap else 1.0
    exposed_s = max(reduction_s - backward_s, 0.0) + contention * min(reduction_s, backward_s)
    software, launch_s = load_software(plan.execution.fusion), cluster.device.launch_s
    optimizer_s = sum(price.optimizer_s for price in prices)
    loop_s = software.microbatch_calls * launch_s / 2
    return StageJudgement(
        forward_s=sum(price.forward_s for price in prices) + loop_s,
        backward_s=backward_s + loop_s,
        step_s=exposed_s + tied_transfer_s + optimizer_s + software.step_calls * launch_s,
        transfer_forward_s=transfers[0].time_s,
        transfer_backward_s=transfers[1].time_s,
        in_flight=in_flight,
        memory=_stage_memory(plan, prices, peak, cluster, in_flight),
    )


def _stage_memory(
    plan: Plan, prices: list[BlockPrice], peak: PeakMoment, cluster: Cluster, in_flight: int
) -> MemoryParts:
    """The parts add up to the peak: what the sum over blocks counts too little is workspace, what it counts too much
    is overlaid."""
    saved_bytes = sum(price.saved_bytes for price in prices)
    gradients_bytes = sum(price.gradients_bytes for price in prices)
    counted_bytes = saved_bytes + peak.workspace_bytes + (gradients_bytes if plan.microbatches == 1 else 0.0)
    missing_bytes = peak.added_bytes - counted_bytes
    return MemoryParts(
        parameters_bytes=round(sum(price.parameters_bytes for price in prices)),
        gradients_bytes=round(gradients_bytes),
        optimizer_bytes=round(sum(price.optimizer_bytes for price in prices)),
        saved_activations_bytes=round(in_flight * saved_bytes),
        workspace_bytes=round(peak.workspace_bytes + max(missing_bytes, 0.0)),
        fixed_bytes=round(cluster.device.context_bytes + cluster.communication_buffer_bytes(2 if plan.gpus > 1 else 0)),
        overlaid_bytes=round(max(-missing_bytes, 0.0)),
    )


def differences(plan: Plan, judged: Judgement) -> Iterator[str]:
    """Where the plan's own figures differ from the judge's: one text per figure, with both numbers."""
    for position, (stage, priced_stage) in enumerate(zip(plan.stages, judged.stages, strict=True)):
        figures = [(name, getattr(stage, name), getattr(priced_stage, name)) for name in (*TIME_FIELDS, "in_flight")]
        figures += [(name, getattr(stage.memory, name), getattr(priced_stage.memory, name)) for name in MEMORY_FIELDS]
        for name, planned, priced in figures:
            if not _is_close(planned, priced, slack=SCALAR_SLACK_BYTES if name in MEMORY_FIELDS else 1e-12):
                yield f"stage {position} {name}: the plan says {planned}, its placements give {priced}"
    for name, slack in (("step_time_s", 1e-12), ("peak_memory_bytes", 8.0)):
        planned, priced = getattr(plan.estimate, name), getattr(judged, name)
        if not _is_close(planned, priced, slack=slack):
            yield f"{name}: the plan says {planned}, its placements give {priced}"


def _is_close(planned: float, priced: float, *, slack: float) -> bool:
    """Equal up to ``slack`` or the relative tolerance, whichever is larger."""
    return abs(planned - priced) <= max(slack, RELATIVE_TOLERANCE * max(abs(planned), abs(priced)))
