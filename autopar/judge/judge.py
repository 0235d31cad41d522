"""The judge of a plan: prices it again from its placements alone, sharing no code with the search.

It reads what the plan says (placements of every op's tensors and their gradients, storage of parameters, meshes,
recompute, micro-batches) and what is given (graph, profiles, sharding rules, device and link curves). It composes these
by itself:

    block     `block`: kernels at local shapes, moves between placements, kept copies, parameters
    stage     sums over blocks + the loop's calls; step = reduction that the last backward does not hide + tied gradients +
              optimizer
    memory    state + micro-batches in flight * saved + what passes + what the allocator does not count, at the fullest
              moment of a backward (`peak`)
    step      the event simulation of the schedule

``judge`` returns what it found, ``differences`` names where a plan says otherwise.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import msgspec

from autopar.cluster.cluster import Cluster
from autopar.cluster.software import load_software
from autopar.core.errors import CheckError
from autopar.core.plan import (
    BlockProgram,
    BlockRef,
    Collective,
    MemoryParts,
    Plan,
    StagePlan,
    TimeItem,
    device_memory,
)
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.graph.op_profiles import profile_graph
from autopar.judge.block_price import BlockPrice, IssuedCollective, price_block
from autopar.judge.collective_list import list_collectives
from autopar.judge.context import BlockContext, ModelContext
from autopar.judge.judge_mesh import JudgeMesh
from autopar.judge.parameter_price import find_conflicting_axes
from autopar.judge.peak_memory import BlockMemory, PeakMoment, find_peak
from autopar.judge.redistribution_path import PricedCollective
from autopar.judge.step_items import step_items
from autopar.judge.tied_parameter_price import JudgedBlock, tied_gradient_transfers, tied_redistributions
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
    """One stage as the judge finds it; fields as in ``StagePlan``."""

    forward_s: float
    backward_s: float
    step_s: float
    transfer_forward_s: float
    transfer_backward_s: float
    in_flight: int
    memory: MemoryParts


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The whole plan as the judge finds it. ``collectives`` is what a runtime that executes the plan issues;
    ``items`` are what the step is made of."""

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
    """Price ``plan``; ``profile`` is that of ``graph``, made here when not given, as is the ``ground``. CheckError where
    its parts contradict each other. ``twin``: the plan is a shrunk one, whose tiny tensors move as large ones do.

    Worked example: a block of one (8, 4) x (4, 6) product in fp16, column parallel on 2 ranks, takes the matmul curve
    at (8, 3, 4) and, before it, an all_gather of 8 * 4 * 2 = 64 bytes when its input lies as ``S(0)``.
    """
    context = context or ModelContext.of(plan.execution, graph, blocks, profile or profile_graph(graph))
    meshes = [
        JudgeMesh(cluster, tuple(axis.size for axis in stage.axes), stage.first_device, prefers_all_to_all=shrunk)
        for stage in plan.stages
    ]
    prices = _StagePricer(plan, context, blocks)
    per_stage = [prices.price_stage(stage, mesh) for stage, mesh in zip(plan.stages, meshes, strict=True)]
    sent = stage_transfers(plan, graph, blocks, meshes, context.parameter_free)
    if _is_manual(plan):  # its transfers are Megatron's: a part from each rank, then a gather
        sent = [
            (replace(on, time_s=stage.transfer_forward_s), replace(back, time_s=stage.transfer_backward_s))
            for (on, back), stage in zip(sent, plan.stages, strict=True)
        ]
    exchanged = tied_gradient_transfers(plan, graph, blocks, meshes)
    tied_s = [sum(each.time_s for each in exchanged if each.target == at) for at in range(len(meshes))]
    held = in_flight_microbatches(plan)
    stages = tuple(
        _judge_stage(plan, priced, cluster, in_flight, sent_by, once_s)
        for priced, in_flight, sent_by, once_s in zip(per_stage, held, sent, tied_s, strict=True)
    )
    times = [StageTimes(**{name: getattr(stage, name) for name in TIME_FIELDS}) for stage in stages]
    runs: dict[int, list[StagePlan]] = {}
    for planned, judged in zip(plan.stages, stages, strict=True):
        runs.setdefault(planned.first_device, []).append(msgspec.structs.replace(planned, memory=judged.memory))
    step_time_s = simulate(plan.schedule, times, plan.microbatches, plan.num_chunks).step_time_s
    of_blocks = [priced.block_prices for priced in per_stage]
    return Judgement(
        stages=stages,
        step_time_s=step_time_s,
        peak_memory_bytes=max(device_memory(tuple(run)).total for run in runs.values()),
        collectives=list_collectives(plan, of_blocks, sent, exchanged),
        items=step_items(plan, of_blocks, times, tied_s, cluster, step_time_s),
    )


def _is_manual(plan: Plan) -> bool:
    """Whether the plan is a layout written by hand: Megatron's program."""
    return plan.search.status == "fixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class _PricedStage:
    """The blocks of a stage, and the fullest moment of its backward."""

    block_prices: list[BlockPrice]
    peak: PeakMoment


class _StagePricer:
    """Prices of a plan's stages; equal blocks in equal places are priced once."""

    def __init__(self, plan: Plan, context: ModelContext, blocks: tuple[Block, ...]) -> None:
        self._plan, self._context, self._blocks = plan, context, blocks
        self._price_cache: dict[tuple[object, ...], BlockPrice] = {}

    def price_stage(self, stage: StagePlan, mesh: JudgeMesh) -> _PricedStage:
        """All blocks of one stage."""
        plan, graph = self._plan, self._context.graph
        run = [self._block_and_program(ref) for ref in stage.blocks]
        tied = find_conflicting_axes(graph, run)
        seen: set[int] = set()
        once: dict[int, PricedCollective] = {}  # gathered in the forward alone so far
        found = []
        for position, (block, program, first) in enumerate(run):
            alike = dict(zip(block.parameters, first.parameters, strict=True))
            later = {value for other, _, _ in run[position + 1 :] for value in other.inputs}
            price = self._price_block(
                stage=stage,
                mesh=mesh,
                block=first,
                program=program,
                stored_earlier=frozenset(alike[value] for value in block.parameters if value in seen),
                conflicting_axes=frozenset((alike[value], axis) for value, axis in tied if value in alike),
                outputs_read_later=frozenset(
                    own for own, value in zip(first.outputs, block.outputs, strict=True) if value in later
                ),
            )
            seen.update(block.parameters)
            late = [once.pop(value) for value, own in alike.items() if own in price.read_in_backward and value in once]
            gathers = dict(price.gathered_in_forward_only)
            once.update((value, gathers[own]) for value, own in alike.items() if own in gathers)
            found.append(_with_collectives(price, late))
        uses = [
            JudgedBlock(block=block, program=program, first_of_kind=first, read_in_backward=price.read_in_backward)
            for (block, program, first), price in zip(run, found, strict=True)
        ]
        moved = tied_redistributions(graph, uses, tied, mesh) if tied else ((),) * len(found)
        passages = [
            BlockMemory(
                block=use.block,
                program=use.program,
                first_of_kind=use.first_of_kind,
                saved_bytes=price.saved_bytes,
                workspace_bytes=price.workspace_bytes,
            )
            for use, price in zip(uses, found, strict=True)
        ]
        return _PricedStage(
            block_prices=[_with_collectives(price, steps) for price, steps in zip(found, moved, strict=True)],
            peak=find_peak(graph, passages, mesh, plan.execution, accumulates_gradients=plan.microbatches > 1),
        )

    def _block_and_program(self, ref: BlockRef) -> tuple[Block, BlockProgram, Block]:
        """A block, its program, and the first block of its kind."""
        block, program = self._blocks[ref.index], self._plan.program(ref.program)
        if program.kind != block.kind:
            raise CheckError(
                f"block {block.name} is of kind {block.kind}, its program {ref.program!r} of {program.kind}"
            )
        return block, program, self._context.first_of_kind[block.kind]

    def _price_block(
        self,
        *,
        stage: StagePlan,
        mesh: JudgeMesh,
        block: Block,
        program: BlockProgram,
        stored_earlier: frozenset[int],
        conflicting_axes: frozenset[tuple[int, int]],
        outputs_read_later: frozenset[int],
    ) -> BlockPrice:
        """``block`` is the first of its kind; the rest as in `Case`."""
        plan, ground = self._plan, self._context
        if program.recompute == "none" or (program.recompute == "selective" and ground.selective is None):
            outputs_read_later = frozenset()  # no op but attention runs again, which needs no result of the block's end
        # links depend on where in a node the stage begins, not on which node
        place = mesh.first_device % mesh.cluster.devices_per_node
        key = (program.id, mesh.sizes, place, stored_earlier, conflicting_axes, outputs_read_later)
        if key not in self._price_cache:
            case = BlockContext(
                model=ground,
                block=block,
                program=program,
                mesh=mesh,
                micro_batch=plan.micro_batch_size,
                accumulates_gradients=plan.microbatches > 1,
                has_data_axis=len(stage.axes) > 1 and stage.axes[0].name == "dp",
                is_megatron=_is_manual(plan),
                stored_earlier=stored_earlier,
                conflicting_axes=conflicting_axes,
                outputs_read_later=outputs_read_later,
            )
            self._price_cache[key] = price_block(case)
        return self._price_cache[key]


def _with_collectives(price: BlockPrice, collectives: Iterable[PricedCollective]) -> BlockPrice:
    issues = tuple(
        IssuedCollective(collective=step, count=1, per="microbatch", of="parameters") for step in collectives
    )
    return replace(price, collectives=(*price.collectives, *issues))


def in_flight_microbatches(plan: Plan) -> tuple[int, ...]:
    """Micro-batches whose saved tensors each stage holds at its rank's peak, counted from the actions that run."""
    num_ranks = len(plan.stages) // plan.num_chunks
    found = [0] * len(plan.stages)
    for order in rank_actions(plan.schedule, num_ranks, plan.microbatches, plan.num_chunks):
        now: dict[int, int] = {}
        peak = 0
        for action in order:
            now[action.stage] = now.get(action.stage, 0) + (1 if action.kind == "F" else -1)
            if (total := sum(now.values())) > peak:
                peak = total
                for stage, count in now.items():
                    found[stage] = count
    return tuple(found)


def _judge_stage(
    plan: Plan,
    priced_stage: _PricedStage,
    cluster: Cluster,
    in_flight: int,
    transfers: tuple[StageTransfer, StageTransfer],
    tied_transfer_s: float,
) -> StageJudgement:
    found, moment = priced_stage.block_prices, priced_stage.peak
    backward_s = sum(price.backward_s for price in found)
    reduction_s = sum(price.reduction_s for price in found)
    contention = cluster.overlap_contention if plan.execution.overlap else 1.0
    exposed_s = max(reduction_s - backward_s, 0.0) + contention * min(reduction_s, backward_s)
    software, launch_s = load_software(plan.execution.fusion), cluster.device.launch_s
    saved = sum(price.saved_bytes for price in found)
    gradients = sum(price.gradients_bytes for price in found)
    told = saved + moment.workspace_bytes + (gradients if plan.microbatches == 1 else 0.0)
    more = moment.added_bytes - told
    loop_s = software.microbatch_calls * launch_s / 2
    return StageJudgement(
        forward_s=sum(price.forward_s for price in found) + loop_s,
        backward_s=backward_s + loop_s,
        step_s=exposed_s + tied_transfer_s + sum(price.optimizer_s for price in found) + software.step_calls * launch_s,
        transfer_forward_s=transfers[0].time_s,
        transfer_backward_s=transfers[1].time_s,
        in_flight=in_flight,
        memory=MemoryParts(
            parameters_bytes=round(sum(price.parameters_bytes for price in found)),
            gradients_bytes=round(gradients),
            optimizer_bytes=round(sum(price.optimizer_bytes for price in found)),
            saved_activations_bytes=round(in_flight * saved),
            workspace_bytes=round(moment.workspace_bytes + max(more, 0.0)),
            fixed_bytes=round(
                cluster.device.context_bytes + cluster.communication_buffer_bytes(2 if plan.gpus > 1 else 0)
            ),
            overlaid_bytes=round(max(-more, 0.0)),
        ),
    )


def differences(plan: Plan, judged: Judgement) -> Iterator[str]:
    """Where the plan's own figures are not the judge's: ``what: plan, judge``."""
    for position, (stage, found) in enumerate(zip(plan.stages, judged.stages, strict=True)):
        pairs = [(name, getattr(stage, name), getattr(found, name)) for name in (*TIME_FIELDS, "in_flight")]
        pairs += [(name, getattr(stage.memory, name), getattr(found.memory, name)) for name in MEMORY_FIELDS]
        for name, said, priced in pairs:
            if not _close(said, priced, slack=SCALAR_SLACK_BYTES if name in MEMORY_FIELDS else 1e-12):
                yield f"stage {position} {name}: the plan says {said}, its placements {priced}"
    if not _close(plan.estimate.step_time_s, judged.step_time_s, slack=1e-12):
        yield f"step_time_s: the plan says {plan.estimate.step_time_s}, its placements {judged.step_time_s}"
    if not _close(plan.estimate.peak_memory_bytes, judged.peak_memory_bytes, slack=8.0):
        yield f"peak_memory_bytes: the plan says {plan.estimate.peak_memory_bytes}, its placements {judged.peak_memory_bytes}"


def _close(planned: float, judged: float, slack: float) -> bool:
    return abs(planned - judged) <= max(slack, RELATIVE_TOLERANCE * max(abs(planned), abs(judged)))
