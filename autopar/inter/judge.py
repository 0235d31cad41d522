"""The judge of a plan: prices it again from its placements alone, sharing no code with the search.

It reads what the plan says (placements of every op's tensors and their gradients, storage of parameters, meshes,
recompute, micro-batches) and what is given (graph, profiles, sharding rules, device and link curves). It composes these
by itself:

    block     `judge_block`: kernels at local shapes, moves between placements, kept copies, parameters
    stage     sums over blocks + the loop's calls; step = reduction that the last backward does not hide + optimizer
    memory    state + micro-batches in flight * saved + what passes + what the allocator does not count, at the fullest
              moment of a backward (`judge_peak`)
    step      the event simulation of the schedule

``judge`` returns what it found, ``differences`` names where a plan says otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from autopar.cluster.cluster import Cluster
from autopar.cluster.software import load_software
from autopar.cost.fusion import Saving, savings, with_fused_loss
from autopar.graph.ir import Block, Graph
from autopar.graph.profile import GraphProfile, profile_graph
from autopar.inter.judge_block import BlockPrice, Issue, price_block
from autopar.inter.judge_collectives import listed
from autopar.inter.judge_flow import at_hand
from autopar.inter.judge_items import step_items
from autopar.inter.judge_parameters import disagreements
from autopar.inter.judge_peak import Moment, Passage, fullest_moment
from autopar.inter.judge_routes import Mesh, Step
from autopar.inter.judge_selected import Selected, selected_of
from autopar.inter.judge_tied import Use, exchanges, tied_moves
from autopar.inter.judge_transfers import Send, sends
from autopar.inter.judge_workspace import kept_anywhere
from autopar.inter.simulate import StageTimes, simulate
from autopar.plan.errors import CheckError
from autopar.plan.plan import Collective, Execution, MemoryParts, Plan, StagePlan, TimeItem, device_memory
from autopar.plan.schedule import actions

RELATIVE_TOLERANCE = 1e-5
SCALARS_BYTES = 16.0
"""A few scalars may be counted or not: torch's allocator rounds each up to 512 bytes."""
SECONDS = ("forward_s", "backward_s", "step_s", "send_forward_s", "send_backward_s")
BYTES = (
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
    send_forward_s: float
    send_backward_s: float
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


def _with(price: BlockPrice, steps: tuple[Step, ...]) -> BlockPrice:
    issues = tuple(Issue(step=step, count=1, per="microbatch", of="parameters") for step in steps)
    return replace(price, issues=(*price.issues, *issues))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ground:
    """What judging takes from the model alone, under one ``Execution``: its profile with what the program fuses, what of it
    is at hand anywhere (``free``) or kept by some op (``stays``), and one block of each kind."""

    profile: GraphProfile
    free: frozenset[int]
    stays: tuple[frozenset[int], frozenset[int]]
    fused: dict[int, Saving]
    selected: Selected | None
    kinds: dict[int, Block]

    @staticmethod
    def of(execution: Execution, graph: Graph, blocks: tuple[Block, ...], profile: GraphProfile) -> "Ground":
        """``profile`` is that of ``graph``."""
        fuses = load_software(execution.fusion).fuses
        if execution.loss != "torch":
            profile = with_fused_loss(graph, profile, fuses)
        by_op = execution.selective == "products"
        kinds: dict[int, Block] = {}
        for block in blocks:
            kinds.setdefault(block.kind, block)
        return Ground(
            profile=profile,
            free=at_hand(graph),
            stays=kept_anywhere(graph, profile),
            fused=savings(graph, profile, fuses),
            selected=selected_of(graph, profile, blocks, execution.attn == "flash") if by_op else None,
            kinds=kinds,
        )


def judge(
    plan: Plan,
    graph: Graph,
    blocks: tuple[Block, ...],
    cluster: Cluster,
    profile: GraphProfile | None = None,
    ground: Ground | None = None,
    *,
    twin: bool = False,
) -> Judgement:
    """Price ``plan``; ``profile`` is that of ``graph``, made here when not given, as is the ``ground``. CheckError where
    its parts contradict each other. ``twin``: the plan is a shrunk one, whose tiny tensors move as large ones do.

    Worked example: a block of one (8, 4) x (4, 6) product in fp16, column parallel on 2 ranks, takes the matmul curve
    at (8, 3, 4) and, before it, an all_gather of 8 * 4 * 2 = 64 bytes when its input lies as ``S(0)``.
    """
    ground = ground or Ground.of(plan.execution, graph, blocks, profile or profile_graph(graph))
    kinds = ground.kinds
    prices: dict[tuple[object, ...], BlockPrice] = {}
    meshes = [
        Mesh(cluster, tuple(axis.size for axis in stage.axes), stage.first_device, exchanges=twin)
        for stage in plan.stages
    ]
    per_stage: list[list[BlockPrice]] = []
    fullest: list[Moment] = []
    for stage, mesh in zip(plan.stages, meshes, strict=True):
        found = []
        seen: set[int] = set()
        once: dict[int, Step] = {}  # gathered in the forward alone so far
        run = [(blocks[ref.index], plan.program(ref.program), kinds[blocks[ref.index].kind]) for ref in stage.blocks]
        tied = disagreements(graph, run)
        for position, ref in enumerate(stage.blocks):
            block = blocks[ref.index]
            program = plan.program(ref.program)
            if program.kind != block.kind:
                raise CheckError(
                    f"block {block.name} is of kind {block.kind}, its program {ref.program!r} of {program.kind}"
                )
            first = kinds[block.kind]
            stored = frozenset(first.parameters[at] for at, value in enumerate(block.parameters) if value in seen)
            seen.update(block.parameters)
            alike = dict(zip(block.parameters, first.parameters, strict=True))
            here = frozenset((alike[value], axis) for value, axis in tied if value in alike)
            later = {value for other in stage.blocks[position + 1 :] for value in blocks[other.index].inputs}
            read_on = frozenset(own for own, value in zip(first.outputs, block.outputs, strict=True) if value in later)
            if program.recompute == "none" or (program.recompute == "selective" and ground.selected is None):
                read_on = frozenset()  # no op but attention runs again, which needs no result of the block's end
            # links depend on where in a node the stage begins, not on which node
            key = (ref.program, mesh.sizes, mesh.first_device % cluster.devices_per_node, stored, here, read_on)
            if key not in prices:
                prices[key] = price_block(
                    graph,
                    ground.profile,
                    first,
                    program,
                    mesh,
                    plan.micro_batch_size,
                    plan.execution,
                    ground.free,
                    stored,
                    ground.fused,
                    plan.microbatches > 1,
                    len(stage.axes) > 1 and stage.axes[0].name == "dp",
                    plan.search.status == "fixed",  # a manual layout is Megatron's program
                    ground.stays,
                    here,
                    read_on,
                    ground.selected,
                )
            price = prices[key]
            again = [once.pop(value) for value, own in alike.items() if own in price.read_again and value in once]
            issues = tuple(Issue(step=step, count=1, per="microbatch", of="parameters") for step in again)
            found.append(replace(price, issues=(*price.issues, *issues)))
            gathers = dict(price.gathered_once)
            once.update((value, gathers[own]) for value, own in alike.items() if own in gathers)
        uses = [
            Use(block=block, program=program, first=first, read_again=price.read_again)
            for (block, program, first), price in zip(run, found, strict=True)
        ]
        moved = tied_moves(graph, uses, tied, mesh) if tied else ((),) * len(found)
        per_stage.append([_with(price, steps) for price, steps in zip(found, moved, strict=True)])
        passages = [
            Passage(
                block=use.block,
                program=use.program,
                first=use.first,
                saved_bytes=price.saved_bytes,
                passing_bytes=price.passing_bytes,
            )
            for use, price in zip(uses, found, strict=True)
        ]
        fullest.append(fullest_moment(graph, passages, mesh, plan.execution, accumulates=plan.microbatches > 1))
    sent = sends(plan, graph, blocks, meshes, ground.free)
    if (
        plan.search.status == "fixed"
    ):  # a manual layout's transfers are Megatron's: a part from each rank, then a gather
        sent = [
            (replace(on, time_s=stage.send_forward_s), replace(back, time_s=stage.send_backward_s))
            for (on, back), stage in zip(sent, plan.stages, strict=True)
        ]
    held = held_microbatches(plan)
    stages = tuple(
        _stage(plan, found, moment, cluster, in_flight, sent_by)
        for found, moment, in_flight, sent_by in zip(per_stage, fullest, held, sent, strict=True)
    )
    times = [StageTimes(**{name: getattr(stage, name) for name in SECONDS}) for stage in stages]
    runs: dict[int, list[StagePlan]] = {}
    for planned, judged in zip(plan.stages, stages, strict=True):
        runs.setdefault(planned.first_device, []).append(msgspec.structs.replace(planned, memory=judged.memory))
    step_time_s = simulate(plan.schedule, times, plan.microbatches, plan.num_chunks).step_time_s
    return Judgement(
        stages=stages,
        step_time_s=step_time_s,
        peak_memory_bytes=max(device_memory(tuple(run)).total for run in runs.values()),
        collectives=listed(plan, per_stage, sent, exchanges(plan, graph, blocks, meshes)),
        items=step_items(plan, per_stage, times, cluster, step_time_s),
    )


def held_microbatches(plan: Plan) -> tuple[int, ...]:
    """Micro-batches whose saved tensors each stage holds at its rank's peak, counted from the actions that run."""
    num_ranks = len(plan.stages) // plan.num_chunks
    found = [0] * len(plan.stages)
    for order in actions(plan.schedule, num_ranks, plan.microbatches, plan.num_chunks):
        now: dict[int, int] = {}
        peak = 0
        for action in order:
            now[action.stage] = now.get(action.stage, 0) + (1 if action.kind == "F" else -1)
            if (total := sum(now.values())) > peak:
                peak = total
                for stage, count in now.items():
                    found[stage] = count
    return tuple(found)


def _stage(
    plan: Plan, found: list[BlockPrice], moment: Moment, cluster: Cluster, in_flight: int, sent: tuple[Send, Send]
) -> StageJudgement:
    backward_s = sum(price.backward_s for price in found)
    reduction_s = sum(price.reduction_s for price in found)
    contention = cluster.overlap_contention if plan.execution.overlap else 1.0
    exposed_s = max(reduction_s - backward_s, 0.0) + contention * min(reduction_s, backward_s)
    software, launch_s = load_software(plan.execution.fusion), cluster.device.launch_s
    saved = sum(price.saved_bytes for price in found)
    gradients = sum(price.gradients_bytes for price in found)
    told = saved + moment.passing_bytes + (gradients if plan.microbatches == 1 else 0.0)
    more = moment.bytes_beside - told
    loop_s = software.microbatch_calls * launch_s / 2
    return StageJudgement(
        forward_s=sum(price.forward_s for price in found) + loop_s,
        backward_s=backward_s + loop_s,
        step_s=exposed_s + sum(price.optimizer_s for price in found) + software.step_calls * launch_s,
        send_forward_s=sent[0].time_s,
        send_backward_s=sent[1].time_s,
        in_flight=in_flight,
        memory=MemoryParts(
            parameters_bytes=round(sum(price.parameters_bytes for price in found)),
            gradients_bytes=round(gradients),
            optimizer_bytes=round(sum(price.optimizer_bytes for price in found)),
            saved_activations_bytes=round(in_flight * saved),
            workspace_bytes=round(moment.passing_bytes + max(more, 0.0)),
            fixed_bytes=round(
                cluster.device.context_bytes + cluster.communication_buffer_bytes(2 if plan.gpus > 1 else 0)
            ),
            overlaid_bytes=round(max(-more, 0.0)),
        ),
    )


def differences(plan: Plan, judged: Judgement) -> Iterator[str]:
    """Where the plan's own figures are not the judge's: ``what: plan, judge``."""
    for position, (stage, found) in enumerate(zip(plan.stages, judged.stages, strict=True)):
        pairs = [(name, getattr(stage, name), getattr(found, name)) for name in (*SECONDS, "in_flight")]
        pairs += [(name, getattr(stage.memory, name), getattr(found.memory, name)) for name in BYTES]
        for name, said, priced in pairs:
            if not _close(said, priced, slack=SCALARS_BYTES if name in BYTES else 1e-12):
                yield f"stage {position} {name}: the plan says {said}, its placements {priced}"
    if not _close(plan.estimate.step_time_s, judged.step_time_s, slack=1e-12):
        yield f"step_time_s: the plan says {plan.estimate.step_time_s}, its placements {judged.step_time_s}"
    if not _close(plan.estimate.peak_memory_bytes, judged.peak_memory_bytes, slack=8.0):
        yield f"peak_memory_bytes: the plan says {plan.estimate.peak_memory_bytes}, its placements {judged.peak_memory_bytes}"


def _close(said: float, priced: float, slack: float) -> bool:
    return abs(said - priced) <= max(slack, RELATIVE_TOLERANCE * max(abs(said), abs(priced)))
