"""Writes what the search found as a `Plan`: placements of every op and parameter, memory, times, estimate."""

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from autopar.cluster.cluster import Cluster
from autopar.core.dtypes import SHORT_NAMES
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
    recompute_summary,
)
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.attention import masked_calls
from autopar.graph.flops import num_parameters
from autopar.graph.ir import Graph
from autopar.inter.block_choice import Use, uses_of
from autopar.inter.block_pricer import Mesh
from autopar.inter.stage_choice import Finished
from autopar.inter.stage_costs import StageBook
from autopar.inter.stage_memory import memory_of
from autopar.inter.stage_transfers import first_devices
from autopar.intra.placement_text import Lying
from autopar.judge.context import Ground
from autopar.pipeline.simulate import StageTimes, simulate
from autopar.planner.judged_plan import judged
from autopar.planner.plan_estimate import alike_on_all_ranks, summarise, time_parts
from autopar.planner.plan_provenance import with_provenance
from autopar.rules.placement_pair import PlacementPair
from autopar.workload.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """What the search hands over: per stage its run, and its times with transfers. A layout's stages may have a book
    each (of one model and micro-batch) and, interleaved, come back to a run of devices; ``first_devices`` says
    where. ``ground``: what judging several plans of one model shares."""

    workload: Workload
    cluster: Cluster
    book: StageBook
    stages: tuple[tuple[int, int, int], ...]
    runs: tuple[Finished, ...]
    held: tuple[int, ...]
    schedule: Schedule
    gpus: int
    global_batch: int
    budget_bytes: int
    lower_bound_s: float
    seconds: float
    runner_up: str | None
    times: Sequence[StageTimes]
    fixed: bool = False
    books: tuple[StageBook, ...] = ()
    first_devices: tuple[int, ...] = ()
    num_chunks: int = 1
    ground: Ground | None = None


def build_plan(found: Found) -> Plan:
    """The plan, with an estimate from the same totals the search compared."""
    book, graph = found.book, found.book.blocks.graph
    writer = _Writer(found)
    stages = tuple(writer.stage(at) for at in range(len(found.stages)))
    simulation = simulate(
        found.schedule,
        found.times,
        book.num_microbatches,
        found.num_chunks,
        num_devices=[devices for _, _, devices in found.stages[: len(found.stages) // found.num_chunks]],
    )
    slowest = max(range(len(stages)), key=lambda at: stages[at].forward_s + stages[at].backward_s)
    estimate = summarise(
        book=book,
        cluster=found.cluster,
        gpus=found.gpus,
        global_batch=found.global_batch,
        budget_bytes=found.budget_bytes,
        stages=stages,
        step_time_s=simulation.step_time_s,
        bubble_fraction=simulation.bubble_fraction,
        parts=time_parts(writer.uses[slowest]),
    )
    bound_s = min(found.lower_bound_s, simulation.step_time_s)
    gap = 1 - bound_s / simulation.step_time_s
    programs = tuple(writer.programs.values())
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=ModelRef(
            path=str(found.workload.path) if found.workload.path is not None else None,
            settings=dict(found.workload.settings),
            source_hash=found.workload.source_hash,
            graph_fingerprint=graph.fingerprint,
            parameters=num_parameters(graph),
        ),
        cluster=ClusterRef(name=found.cluster.name, fingerprint=found.cluster.fingerprint, overrides={}),
        execution=execution_of(book.blocks.execution),
        gpus=found.gpus,
        global_batch=found.global_batch,
        microbatches=book.num_microbatches,
        micro_batch_size=book.micro_batch,
        schedule=found.schedule,
        num_chunks=found.num_chunks,
        recompute=recompute_summary(programs),
        programs=programs,
        stages=stages,
        estimate=estimate,
        search=SearchOutcome(
            seconds=found.seconds,
            status="fixed" if found.fixed else "optimal" if gap <= 1e-4 else "feasible",
            lower_bound_s=bound_s,
            gap=gap,
            runner_up=found.runner_up,
        ),
        notes=(*_unknown_ops(book), *_masked_attention(graph), *writer.alike),
        command="",
        versions={
            "autopar": _version("autopar"),
            "torch": _version("torch"),
            "python": platform.python_version(),
        },
    )
    plan = judged(plan, book.blocks, found.cluster, found.ground)
    return with_provenance(plan, slowest, writer.uses[slowest], book.blocks, found.cluster)


class _Writer:
    """Stages one after the other: the ``programs`` of their blocks, each once, how blocks were decided (``uses``, of
    each stage), and what is computed ``alike`` on several ranks."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.firsts = found.first_devices or first_devices(
            [devices for _, _, devices in found.stages], found.cluster.devices_per_node
        )
        self.programs: dict[tuple[object, ...], BlockProgram] = {}
        self.uses: list[list[Use]] = []
        self.alike: list[str] = []

    def stage(self, at: int) -> StagePlan:
        """The next stage, number ``at``."""
        found = self.found
        first, end, devices = found.stages[at]
        book = found.books[at] if found.books else found.book
        held, choice, times = found.held[at], found.runs[at].choice, found.times[at]
        uses = uses_of(book, choice, first, end)
        self.uses.append(uses)
        axes = _axes(book, choice.mesh, uses)
        refs = []
        for block, use in zip(book.blocks.blocks[first:end], uses, strict=True):
            key = (use.column, use.ref, choice.boundary, choice.mesh)
            if key not in self.programs:
                self.programs[key] = _program(book, use, f"p{len(self.programs)}")
            refs.append(BlockRef(index=block.index, name=block.name, program=self.programs[key].id))
        names = [axis.name for axis in axes][-len(choice.mesh.inner) :] if choice.mesh.inner else []
        for name, (share, attention) in alike_on_all_ranks(uses, book.blocks.profile, names).items():
            what = "attention among them, " if attention else ""
            self.alike.append(f"stage {at}: {share:.1%} of the FLOPs, {what}are computed alike on all ranks of {name}")
        return StagePlan(
            blocks=tuple(refs),
            first_device=self.firsts[at],
            num_devices=devices,
            axes=axes,
            chunk=at * found.num_chunks // len(found.stages),
            forward_s=times.forward_s,
            backward_s=times.backward_s,
            step_s=times.step_s,
            send_forward_s=times.send_forward_s,
            send_backward_s=times.send_backward_s,
            in_flight=held,
            memory=memory_of(book, uses, first, held),
        )


def _unknown_ops(book: StageBook) -> list[str]:
    """A note for every kind of op without a sharding rule, with where the model first calls it."""
    places: dict[str, str] = {}
    for kind, _ in book.columns:
        for node in book.blocks.space(kind).ops:
            if not node.rule.known:
                places.setdefault(node.op.target, f" at {node.op.source}" if node.op.source else "")
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


def execution_of(execution: ExecutionModel) -> Execution:
    """What a plan says of how it runs."""
    return Execution(
        dtype=SHORT_NAMES[execution.dtype],
        optimizer=execution.optimizer,
        attn=execution.attn,
        overlap=execution.overlap,
        fusion=execution.fusion,
        grads="fp32" if execution.fp32_grads else "same",
        launch="blocking" if execution.blocking else "async",
        checkpoint="whole" if execution.whole_checkpoint else "needed",
        selective=execution.selective,
        loss=execution.loss,
    )


def _program(book: StageBook, use: Use, name: str) -> BlockProgram:
    points = use.points
    tables, graph = points.tables, book.blocks.graph
    lie = Lying(graph, book.micro_batch, use.mesh.has_data_axis)
    placements: dict[int, OpPlan] = {}
    choices = points.choices[:, use.row, use.boundary]
    again = tables.copies.kept_as_cut(choices.tolist(), points.regathers(use.row, use.boundary))
    for at, node in enumerate(tables.space.ops):
        options = tables.strategies[at][use.strategy(at)]
        data = tables.space.data_axis.options[at]
        placements[node.op.id] = lie.op_plan(node.op, options, data, again.get(node.op.id, ()))
    for op in tables.space.data_ops:
        placements[op.id] = lie.data_op_plan(op, len(use.mesh.inner))
    kind, _ = book.columns[use.column]
    parameters = use.parameters(graph)
    return BlockProgram(
        id=name,
        kind=kind,
        recompute=points.rows[use.row].mode,  # type: ignore[arg-type]
        inputs=lie.at_boundary(tables, tables.space.block.inputs, use.boundary),
        outputs=lie.at_boundary(tables, tables.space.block.outputs, use.boundary),
        shared=lie.shared(tables, choices),
        ops=tuple(placements[op] for op in sorted(placements)),
        parameters=tuple(parameters[v] for v in book.blocks.kinds[kind].parameters if v in parameters),
    )


def _axes(book: StageBook, mesh: Mesh, uses: list[Use]) -> tuple[Axis, ...]:
    """The data axis, and the inner axis named after what most FLOPs are sharded by on it."""
    if not mesh.inner:
        return (Axis(name="dp", size=mesh.data),)
    if book.restriction is not None:
        inner = tuple(Axis(name=name, size=size) for name, size in zip(book.restriction.names, mesh.inner, strict=True))
        return (Axis(name="dp", size=mesh.data), *inner) if mesh.has_data_axis else inner
    weights: dict[str, float] = {}
    for use in uses:
        tables = use.points.tables
        for at, node in enumerate(tables.space.ops):
            flops = book.blocks.profile.ops[node.op.id].forward_flops
            option = tables.strategies[at][use.strategy(at)][0]
            if flops:
                weights[_axis_name(book, node.op.inputs, option.inputs)] = flops + weights.get(
                    _axis_name(book, node.op.inputs, option.inputs), 0.0
                )
    name = max(weights, key=lambda key: weights[key]) if weights else "tp"
    if not mesh.has_data_axis:
        return (Axis(name=name, size=mesh.inner[0]),)
    return (Axis(name="dp", size=mesh.data), Axis(name="dp_inner" if name == "dp" else name, size=mesh.inner[0]))


def _axis_name(book: StageBook, inputs: Sequence[int], pairs: Sequence[PlacementPair]) -> str:
    """What an op that reads ``inputs`` so uses the axis for."""
    graph = book.blocks.graph
    tensors = [(graph.values[value], pair.atom) for value, pair in zip(inputs, pairs, strict=True)]
    for value, atom in tensors:
        if value.kind == "parameter" and atom is not None:
            return "ep" if len(value.shape) == 3 and atom.dim == 0 else "tp"
    first = next((atom for value, atom in tensors if value.kind != "parameter"), None)
    if first is None:
        return "tp"
    if graph.batch.grows(first.size):
        return "dp"
    has_weight = any(value.kind == "parameter" for value, _ in tensors)
    return "tp" if first.dim == 1 and not has_weight else "cp"


@functools.cache
def _version(package: str) -> str:
    return metadata.version(package)
