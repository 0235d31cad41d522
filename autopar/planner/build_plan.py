"""Writes what the search found as a `Plan`: placements of every op and parameter, memory, times, estimate."""

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from autopar.cluster.cluster import Cluster
from autopar.core.dtypes import SHORT_NAMES
from autopar.core.invariants import recompute_summary
from autopar.core.mesh_axis import Axis
from autopar.core.plan import (
    FORMAT_VERSION,
    BlockProgram,
    BlockRef,
    ClusterRef,
    Execution,
    ModelRef,
    OpPlan,
    Plan,
    Schedule,
    SearchOutcome,
    StagePlan,
)
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.attention import masked_calls
from autopar.graph.flops import num_parameters
from autopar.graph.ir import Graph
from autopar.inter.block_choice import BlockChoice, block_choices
from autopar.inter.block_pricer import StageMesh
from autopar.inter.stage_choice import StagePrice
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_memory import memory_of_choices
from autopar.inter.stage_transfers import first_devices
from autopar.intra.placement_text import PlacementWriter
from autopar.judge.context import ModelContext
from autopar.pipeline.simulate import StageTimes, simulate
from autopar.planner.judged_plan import with_judgement
from autopar.planner.plan_estimate import make_estimate, redundant_flops_shares, stage_time_parts
from autopar.planner.plan_provenance import with_provenance
from autopar.rules.placement_pair import PlacementPair
from autopar.workload.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChosenPipeline:
    """What the search hands over: per stage its run, and its times with transfers. A layout's stages may have a book
    each (of one model and micro-batch) and, interleaved, come back to a run of devices; ``first_devices`` says
    where. ``ground``: what judging several plans of one model shares."""

    workload: Workload
    cluster: Cluster
    stage_costs: StageCosts
    stages: tuple[tuple[int, int, int], ...]
    prices: tuple[StagePrice, ...]
    in_flight: tuple[int, ...]
    schedule: Schedule
    gpus: int
    global_batch: int
    budget_bytes: int
    lower_bound_s: float
    search_s: float
    runner_up: str | None
    stage_times: Sequence[StageTimes]
    is_manual: bool = False
    stage_costs_of: tuple[StageCosts, ...] = ()
    first_devices: tuple[int, ...] = ()
    num_chunks: int = 1
    judge_context: ModelContext | None = None


def build_plan(chosen: ChosenPipeline) -> Plan:
    """The plan, with an estimate from the same totals the search compared."""
    book, graph = chosen.stage_costs, chosen.stage_costs.pricer.graph
    writer = _StageWriter(chosen)
    stages = tuple(writer.write_stage(at) for at in range(len(chosen.stages)))
    simulation = simulate(
        chosen.schedule,
        chosen.stage_times,
        book.num_microbatches,
        chosen.num_chunks,
        num_devices=[devices for _, _, devices in chosen.stages[: len(chosen.stages) // chosen.num_chunks]],
    )
    slowest = max(range(len(stages)), key=lambda at: stages[at].forward_s + stages[at].backward_s)
    estimate = make_estimate(
        stage_costs=book,
        cluster=chosen.cluster,
        gpus=chosen.gpus,
        global_batch=chosen.global_batch,
        budget_bytes=chosen.budget_bytes,
        stages=stages,
        step_time_s=simulation.step_time_s,
        bubble_fraction=simulation.bubble_fraction,
        parts=stage_time_parts(writer.block_choices[slowest]),
    )
    bound_s = min(chosen.lower_bound_s, simulation.step_time_s)
    gap = 1 - bound_s / simulation.step_time_s
    programs = tuple(writer.programs.values())
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=ModelRef(
            path=str(chosen.workload.path) if chosen.workload.path is not None else None,
            settings=dict(chosen.workload.settings),
            source_hash=chosen.workload.source_hash,
            graph_fingerprint=graph.fingerprint,
            num_parameters=num_parameters(graph),
        ),
        cluster=ClusterRef(name=chosen.cluster.name, fingerprint=chosen.cluster.fingerprint, overrides={}),
        execution=plan_execution(book.pricer.execution),
        gpus=chosen.gpus,
        global_batch=chosen.global_batch,
        microbatches=book.num_microbatches,
        micro_batch_size=book.micro_batch,
        schedule=chosen.schedule,
        num_chunks=chosen.num_chunks,
        recompute=recompute_summary(programs),
        programs=programs,
        stages=stages,
        estimate=estimate,
        search=SearchOutcome(
            seconds=chosen.search_s,
            status="fixed" if chosen.is_manual else "optimal" if gap <= 1e-4 else "feasible",
            lower_bound_s=bound_s,
            gap=gap,
            runner_up=chosen.runner_up,
        ),
        notes=(*_unknown_op_notes(book), *_masked_attention(graph), *writer.redundancy_notes),
        command="",
        versions={
            "autopar": _package_version("autopar"),
            "torch": _package_version("torch"),
            "python": platform.python_version(),
        },
    )
    plan = with_judgement(plan, book.pricer, chosen.cluster, chosen.judge_context)
    return with_provenance(plan, slowest, writer.block_choices[slowest], book.pricer, chosen.cluster)


class _StageWriter:
    """Stages one after the other: the ``programs`` of their blocks, each once, how blocks were decided (``uses``, of
    each stage), and what is computed ``alike`` on several ranks."""

    def __init__(self, chosen: ChosenPipeline) -> None:
        self.chosen = chosen
        self.first_devices = chosen.first_devices or first_devices(
            [devices for _, _, devices in chosen.stages], chosen.cluster.devices_per_node
        )
        self.programs: dict[tuple[object, ...], BlockProgram] = {}
        self.block_choices: list[list[BlockChoice]] = []
        self.redundancy_notes: list[str] = []

    def write_stage(self, index: int) -> StagePlan:
        """The next stage, number ``at``."""
        found = self.chosen
        first, end, devices = found.stages[index]
        book = found.stage_costs_of[index] if found.stage_costs_of else found.stage_costs
        held, choice, times = found.in_flight[index], found.prices[index].choice, found.stage_times[index]
        uses = block_choices(book, choice, first, end)
        self.block_choices.append(uses)
        axes = _named_axes(book, choice.mesh, uses)
        refs = []
        for block, use in zip(book.pricer.blocks[first:end], uses, strict=True):
            key = (use.variant, use.frontier_ref, choice.boundary, choice.mesh)
            if key not in self.programs:
                self.programs[key] = _block_program(book, use, f"p{len(self.programs)}")
            refs.append(BlockRef(index=block.index, name=block.name, program=self.programs[key].id))
        names = [axis.name for axis in axes][-len(choice.mesh.inner_sizes) :] if choice.mesh.inner_sizes else []
        for name, (share, attention) in redundant_flops_shares(uses, book.pricer.profile, names).items():
            what = "attention among them, " if attention else ""
            self.redundancy_notes.append(
                f"stage {index}: {share:.1%} of the FLOPs, {what}are computed alike on all ranks of {name}"
            )
        return StagePlan(
            blocks=tuple(refs),
            first_device=self.first_devices[index],
            num_devices=devices,
            axes=axes,
            chunk=index * found.num_chunks // len(found.stages),
            forward_s=times.forward_s,
            backward_s=times.backward_s,
            step_s=times.step_s,
            transfer_forward_s=times.transfer_forward_s,
            transfer_backward_s=times.transfer_backward_s,
            in_flight=held,
            memory=memory_of_choices(book, uses, first, held),
        )


def _unknown_op_notes(stage_costs: StageCosts) -> list[str]:
    """A note for every kind of op without a sharding rule, with where the model first calls it."""
    places: dict[str, str] = {}
    for kind, _ in stage_costs.variants:
        for node in stage_costs.pricer.block_space(kind).ops:
            if not node.rule.is_known:
                places.setdefault(node.op.target, f" at {node.op.source_location}" if node.op.source_location else "")
    return [
        f"{target}{place} has no sharding rule: every rank runs it whole, and what it reads is gathered first"
        for target, place in sorted(places.items())
    ]


def _masked_attention(graph: Graph) -> list[str]:
    """A note for every kind of attention under a mask that is a tensor: what the mask hides makes it no cheaper."""
    notes = []
    for calls in masked_calls(graph):
        place = (f" of {calls.module}" if calls.module else "") + (f" at {calls.source}" if calls.source else "")
        more = f" and {calls.count - 1} more like it" if calls.count > 1 else ""
        made = f", made at {calls.mask_source}," if calls.mask_source else ""
        names = ", ".join(calls.names[:3]) + (f" and {len(calls.names) - 3} more" if len(calls.names) > 3 else "")
        origin = f"is computed from the {calls.origin}{'s' if len(calls.names) > 1 else ''} {names}"
        mask = origin if calls.origin else "is recognised neither as causal nor as all ones"
        notes.append(f"attention{place}{more} is priced as full attention: its mask{made} {mask}")
    return notes


def plan_execution(execution: ExecutionModel) -> Execution:
    """What a plan says of how it runs."""
    return Execution(
        dtype=SHORT_NAMES[execution.dtype],
        optimizer=execution.optimizer,
        attn=execution.attn,
        overlap=execution.overlap,
        fusion=execution.fusion,
        grads="fp32" if execution.fp32_grads else "same",
        launch="blocking" if execution.blocking_launches else "async",
        checkpoint="whole" if execution.recomputes_whole_block else "needed",
        selective=execution.selective_policy,
        loss=execution.loss_kernels,
    )


def _block_program(stage_costs: StageCosts, choice: BlockChoice, name: str) -> BlockProgram:
    points = choice.frontier
    tables, graph = points.tables, stage_costs.pricer.graph
    lie = PlacementWriter(graph, stage_costs.micro_batch, choice.mesh.has_data_axis)
    placements: dict[int, OpPlan] = {}
    choices = points.choices[:, choice.row, choice.boundary]
    again = tables.saved_memory.saved_sharded_inputs(
        choices.tolist(), points.regathered_edges(choice.row, choice.boundary)
    )
    for at, node in enumerate(tables.space.ops):
        options = tables.strategies[at][choice.strategy(at)]
        data = tables.space.data_axis.op_options[at]
        placements[node.op.id] = lie.op_plan(node.op, options, data, again.get(node.op.id, ()))
    for op in tables.space.parameter_free_ops:
        placements[op.id] = lie.parameter_free_op_plan(op, len(choice.mesh.inner_sizes))
    kind, _ = stage_costs.variants[choice.variant]
    parameters = choice.parameter_plans(graph)
    return BlockProgram(
        id=name,
        kind=kind,
        recompute=points.objectives[choice.row].mode,  # type: ignore[arg-type]
        inputs=lie.boundary_value_plans(tables, tables.space.block.inputs, choice.boundary),
        outputs=lie.boundary_value_plans(tables, tables.space.block.outputs, choice.boundary),
        shared=lie.shared_value_plans(tables, choices),
        ops=tuple(placements[op] for op in sorted(placements)),
        parameters=tuple(parameters[v] for v in stage_costs.pricer.first_of_kind[kind].parameters if v in parameters),
    )


def _named_axes(stage_costs: StageCosts, mesh: StageMesh, choices: list[BlockChoice]) -> tuple[Axis, ...]:
    """The data axis, and the inner axis named after what most FLOPs are sharded by on it."""
    if not mesh.inner_sizes:
        return (Axis(name="dp", size=mesh.data_size),)
    if stage_costs.restriction is not None:
        inner = tuple(
            Axis(name=name, size=size)
            for name, size in zip(stage_costs.restriction.axis_names, mesh.inner_sizes, strict=True)
        )
        return (Axis(name="dp", size=mesh.data_size), *inner) if mesh.has_data_axis else inner
    weights: dict[str, float] = {}
    for use in choices:
        tables = use.frontier.tables
        for at, node in enumerate(tables.space.ops):
            flops = stage_costs.pricer.profile.ops[node.op.id].forward_flops
            option = tables.strategies[at][use.strategy(at)][0]
            if flops:
                weights[_axis_name(stage_costs, node.op.inputs, option.inputs)] = flops + weights.get(
                    _axis_name(stage_costs, node.op.inputs, option.inputs), 0.0
                )
    name = max(weights, key=lambda key: weights[key]) if weights else "tp"
    if not mesh.has_data_axis:
        return (Axis(name=name, size=mesh.inner_sizes[0]),)
    return (
        Axis(name="dp", size=mesh.data_size),
        Axis(name="dp_inner" if name == "dp" else name, size=mesh.inner_sizes[0]),
    )


def _axis_name(stage_costs: StageCosts, inputs: Sequence[int], pairs: Sequence[PlacementPair]) -> str:
    """What an op that reads ``inputs`` so uses the axis for."""
    graph = stage_costs.pricer.graph
    tensors = [(graph.values[value], pair.atom) for value, pair in zip(inputs, pairs, strict=True)]
    for value, atom in tensors:
        if value.kind == "parameter" and atom is not None:
            return "ep" if len(value.shape) == 3 and atom.dim == 0 else "tp"
    first = next((atom for value, atom in tensors if value.kind != "parameter"), None)
    if first is None:
        return "tp"
    if graph.batch.is_proportional(first.size):
        return "dp"
    has_weight = any(value.kind == "parameter" for value, _ in tensors)
    return "tp" if first.dim == 1 and not has_weight else "cp"


@functools.cache
def _package_version(package: str) -> str:
    return metadata.version(package)
