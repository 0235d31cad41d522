"""Writes what the search found as a `Plan`: placements of every op and parameter, memory, times, estimate."""

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from autopar.cluster.cluster import Cluster
from autopar.cluster.cluster_reference import cluster_reference
from autopar.core.dtypes import SHORT_NAMES
from autopar.core.invariants import recompute_summary
from autopar.core.mesh_axis import Axis
from autopar.core.plan import (
    FORMAT_VERSION,
    BlockProgram,
    BlockRef,
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
from autopar.inter.stage_span import DeviceStage
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
    """The pipeline to write as a plan: for each stage its blocks and devices, price, micro-batches in flight and times
    with transfers.

    The stages of a layout may each have costs of their own (``stage_costs_of``, of one model and micro-batch size).
    ``first_devices`` are given where they are not one after the other (interleaved chunks return to a submesh);
    ``judge_context`` is what judging several plans of one model shares.
    """

    workload: Workload
    cluster: Cluster
    stage_costs: StageCosts
    stages: tuple[DeviceStage, ...]
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
    """The plan, judged, with an estimate from the same totals that the search compared."""
    costs, graph = chosen.stage_costs, chosen.stage_costs.pricer.graph
    writer = _StageWriter(chosen)
    stages = tuple(writer.write_stage(index) for index in range(len(chosen.stages)))
    simulation = simulate(
        chosen.schedule,
        chosen.stage_times,
        costs.num_microbatches,
        chosen.num_chunks,
        num_devices=[devices for _, _, devices in chosen.stages[: len(chosen.stages) // chosen.num_chunks]],
    )
    slowest = max(range(len(stages)), key=lambda index: stages[index].forward_s + stages[index].backward_s)
    estimate = make_estimate(
        stage_costs=costs,
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
        cluster=cluster_reference(chosen.cluster),
        execution=plan_execution(costs.pricer.execution),
        gpus=chosen.gpus,
        global_batch=chosen.global_batch,
        microbatches=costs.num_microbatches,
        micro_batch_size=costs.micro_batch,
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
        notes=(*_unknown_op_notes(costs), *_masked_attention_notes(graph), *writer.redundancy_notes),
        command="",
        versions={
            "autopar": _package_version("autopar"),
            "torch": _package_version("torch"),
            "python": platform.python_version(),
        },
    )
    plan = with_judgement(plan, costs.pricer, chosen.cluster, chosen.judge_context)
    return with_provenance(plan, slowest, writer.block_choices[slowest], costs.pricer, chosen.cluster)


class _StageWriter:
    """Writes stages one after the other, and collects the programs of their blocks (each once), the block choices of
    each stage, and notes on redundant compute."""

    def __init__(self, chosen: ChosenPipeline) -> None:
        self.chosen = chosen
        self.first_devices = chosen.first_devices or first_devices(
            [devices for _, _, devices in chosen.stages], chosen.cluster.devices_per_node
        )
        self.programs: dict[tuple[object, ...], BlockProgram] = {}
        self.block_choices: list[list[BlockChoice]] = []
        self.redundancy_notes: list[str] = []

    def write_stage(self, index: int) -> StagePlan:
        """The stage number ``index``; stages are written in order."""
        chosen = self.chosen
        first, end, devices = chosen.stages[index]
        costs = chosen.stage_costs_of[index] if chosen.stage_costs_of else chosen.stage_costs
        in_flight, choice, times = chosen.in_flight[index], chosen.prices[index].choice, chosen.stage_times[index]
        of_blocks = block_choices(costs.frontiers, choice, first, end)
        self.block_choices.append(of_blocks)
        axes = _named_axes(costs, choice.mesh, of_blocks)
        refs = []
        for block, of_block in zip(costs.pricer.blocks[first:end], of_blocks, strict=True):
            # a boundary and a frontier point are numbers among those that the stage's restriction leaves
            key = (of_block.variant, of_block.frontier_ref, choice.boundary, choice.mesh, costs.restriction)
            if key not in self.programs:
                self.programs[key] = _block_program(costs, of_block, f"p{len(self.programs)}")
            refs.append(BlockRef(index=block.index, name=block.name, program=self.programs[key].id))
        names = [axis.name for axis in axes][-len(choice.mesh.inner_sizes) :] if choice.mesh.inner_sizes else []
        for name, (share, attention) in redundant_flops_shares(of_blocks, costs.pricer.profile, names).items():
            which = ", attention included," if attention else ""
            self.redundancy_notes.append(
                f"stage {index}: {share:.1%} of the FLOPs{which} are computed redundantly on every rank of {name}"
            )
        return StagePlan(
            blocks=tuple(refs),
            first_device=self.first_devices[index],
            num_devices=devices,
            axes=axes,
            chunk=index * chosen.num_chunks // len(chosen.stages),
            forward_s=times.forward_s,
            backward_s=times.backward_s,
            step_s=times.step_s,
            transfer_forward_s=times.transfer_forward_s,
            transfer_backward_s=times.transfer_backward_s,
            in_flight=in_flight,
            memory=costs.memory.peak_of_blocks(of_blocks, first, in_flight),
        )


def _unknown_op_notes(stage_costs: StageCosts) -> list[str]:
    """A note for every kind of op without a sharding rule, with where the model first calls it."""
    places: dict[str, str] = {}
    for kind, _ in stage_costs.variants:
        for node in stage_costs.pricer.block_space(kind).ops:
            if not node.rule.is_known:
                places.setdefault(node.op.target, f" at {node.op.source_location}" if node.op.source_location else "")
    return [
        f"{target}{place} has no sharding rule: it is replicated, and its inputs are gathered first"
        for target, place in sorted(places.items())
    ]


def _masked_attention_notes(graph: Graph) -> list[str]:
    """A note for every kind of attention under a mask that is a tensor, which is priced as full attention."""
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
    """The execution model in a plan's words."""
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
    """The placements of a block's ops, boundary values and parameters under its choice."""
    frontier = choice.frontier
    tables, graph = frontier.tables, stage_costs.pricer.graph
    writer = PlacementWriter(graph, stage_costs.micro_batch, choice.mesh.has_data_axis)
    placements: dict[int, OpPlan] = {}
    choices = frontier.choices[:, choice.row, choice.boundary]
    saved_sharded = tables.saved_memory.saved_sharded_inputs(
        choices.tolist(), frontier.regathered_edges(choice.row, choice.boundary)
    )
    for index, node in enumerate(tables.space.ops):
        options = tables.strategies[index][choice.strategy(index)]
        data = tables.space.data_axis.op_options[index]
        placements[node.op.id] = writer.op_plan(node.op, options, data, saved_sharded.get(node.op.id, ()))
    for op in tables.space.parameter_free_ops:
        placements[op.id] = writer.parameter_free_op_plan(op, len(choice.mesh.inner_sizes))
    kind, _ = stage_costs.variants[choice.variant]
    parameters = choice.parameter_plans(graph)
    return BlockProgram(
        id=name,
        kind=kind,
        recompute=frontier.objectives[choice.row].mode,  # type: ignore[arg-type]
        inputs=writer.boundary_value_plans(tables, tables.space.block.inputs, choice.boundary),
        outputs=writer.boundary_value_plans(tables, tables.space.block.outputs, choice.boundary),
        shared=writer.shared_value_plans(tables, choices),
        ops=tuple(placements[op] for op in sorted(placements)),
        parameters=tuple(parameters[v] for v in stage_costs.pricer.first_of_kind[kind].parameters if v in parameters),
    )


def _named_axes(stage_costs: StageCosts, mesh: StageMesh, choices: list[BlockChoice]) -> tuple[Axis, ...]:
    """The data axis, and the inner axes: with the names of a layout, else named after what most FLOPs are sharded by."""
    if not mesh.inner_sizes:
        return (Axis(name="dp", size=mesh.data_size),)
    if stage_costs.restriction is not None:
        inner = tuple(
            Axis(name=name, size=size)
            for name, size in zip(stage_costs.restriction.axis_names, mesh.inner_sizes, strict=True)
        )
        return (Axis(name="dp", size=mesh.data_size), *inner) if mesh.has_data_axis else inner
    flops_by_name: dict[str, float] = {}
    for choice in choices:
        tables = choice.frontier.tables
        for index, node in enumerate(tables.space.ops):
            flops = stage_costs.pricer.profile.ops[node.op.id].forward_flops
            option = tables.strategies[index][choice.strategy(index)][0]
            if flops:
                name = _axis_name(stage_costs, node.op.inputs, option.inputs)
                flops_by_name[name] = flops + flops_by_name.get(name, 0.0)
    name = max(flops_by_name, key=lambda key: flops_by_name[key]) if flops_by_name else "tp"
    if not mesh.has_data_axis:
        return (Axis(name=name, size=mesh.inner_sizes[0]),)
    return (
        Axis(name="dp", size=mesh.data_size),
        Axis(name="dp_inner" if name == "dp" else name, size=mesh.inner_sizes[0]),
    )


def _axis_name(stage_costs: StageCosts, inputs: Sequence[int], pairs: Sequence[PlacementPair]) -> str:
    """What an op uses an axis for, by the placement pairs of its inputs: "ep", "tp", "dp" or "cp"."""
    graph = stage_costs.pricer.graph
    tensors = [(graph.values[value], pair.factor) for value, pair in zip(inputs, pairs, strict=True)]
    for value, factor in tensors:
        if value.kind == "parameter" and factor is not None:
            return "ep" if len(value.shape) == 3 and factor.dim == 0 else "tp"
    first = next((factor for value, factor in tensors if value.kind != "parameter"), None)
    if first is None:
        return "tp"
    if graph.batch.is_proportional(first.size):
        return "dp"
    has_weight = any(value.kind == "parameter" for value, _ in tensors)
    return "tp" if first.dim == 1 and not has_weight else "cp"


@functools.cache
def _package_version(package: str) -> str:
    """The installed version of a package."""
    return metadata.version(package)
