"""Writes what the search found as a `Plan`: placements of every op and parameter, memory, times, estimate."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from autopar.cluster.cluster import Cluster
from autopar.cluster.uncertainty import load_uncertainty
from autopar.cost import parameters as pm
from autopar.cost.compute import op_seconds
from autopar.graph.flops import model_flops, num_parameters
from autopar.inter.blocks import Mesh
from autopar.inter.finish import Finished, PointRef, StageChoice
from autopar.inter.judged import judged
from autopar.inter.lying import Lying
from autopar.inter.simulate import StageTimes, simulate
from autopar.inter.stages import StageBook
from autopar.inter.transfers import first_devices
from autopar.intra import frontier as fr
from autopar.intra.frontier import BlockPoints
from autopar.plan.mesh import Axis
from autopar.plan.plan import (
    FORMAT_VERSION,
    BlockProgram,
    BlockRef,
    ClusterRef,
    Estimate,
    Execution,
    MemoryParts,
    ModelRef,
    OpPlan,
    ParameterPlan,
    Plan,
    Schedule,
    SearchOutcome,
    StagePlan,
    TimeParts,
    device_memory,
    recompute_summary,
)
from autopar.rules.atoms import Atom
from autopar.rules.options import Token
from autopar.workload.workload import Workload

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """What the search hands over: per stage its run, and its times with transfers. A layout's stages may have a book each
    (of one model and micro-batch) and, interleaved, come back to a run of devices; ``first_devices`` says where."""

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


def build_plan(found: Found) -> Plan:
    """The plan, with an estimate from the same totals the search compared."""
    book, graph = found.book, found.book.blocks.graph
    programs: dict[tuple[object, ...], BlockProgram] = {}
    stages = []
    firsts = found.first_devices or first_devices(
        [devices for _, _, devices in found.stages], found.cluster.devices_per_node
    )
    totals_of_slowest: tuple[float, dict[str, float]] = (-1.0, {})
    for at, (first, end, devices) in enumerate(found.stages):
        if found.books:
            book = found.books[at]
        held, choice = found.held[at], found.runs[at].choice
        uses = _uses(book, choice, first, end)
        axes = _axes(book, choice.mesh, uses)
        refs = []
        for block, use in zip(book.blocks.blocks[first:end], uses, strict=True):
            key = (use.column, use.ref, choice.boundary, choice.mesh)
            if key not in programs:
                programs[key] = _program(book, use, f"p{len(programs)}")
            refs.append(BlockRef(index=block.index, name=block.name, program=programs[key].id))
        parts = _time_parts(book, uses)
        busy = found.times[at].forward_s + found.times[at].backward_s
        if busy > totals_of_slowest[0]:
            totals_of_slowest = (busy, parts)
        stages.append(
            StagePlan(
                blocks=tuple(refs),
                first_device=firsts[at],
                num_devices=devices,
                axes=axes,
                chunk=at * found.num_chunks // len(found.stages),
                forward_s=found.times[at].forward_s,
                backward_s=found.times[at].backward_s,
                step_s=found.times[at].step_s,
                send_forward_s=found.times[at].send_forward_s,
                send_backward_s=found.times[at].send_backward_s,
                in_flight=held,
                memory=_memory(book, uses, held),
            )
        )
    simulation = simulate(
        found.schedule,
        found.times,
        book.num_microbatches,
        found.num_chunks,
        num_devices=[devices for _, _, devices in found.stages[: len(found.stages) // found.num_chunks]],
    )
    estimate = _estimate(found, stages, simulation.step_time_s, simulation.bubble_fraction, totals_of_slowest[1])
    bound_s = min(found.lower_bound_s, simulation.step_time_s)
    gap = 1 - bound_s / simulation.step_time_s
    unknown = sorted(
        {
            node.op.target
            for column in range(len(book.columns))
            for node in book.blocks.space(book.columns[column][0]).ops
            if not node.rule.known
        }
    )
    listed = tuple(programs.values())
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
        execution=Execution(
            dtype=SHORT[book.blocks.execution.dtype],  # type: ignore[arg-type]
            optimizer=book.blocks.execution.optimizer,
            attn=book.blocks.execution.attn,
            overlap=book.blocks.execution.overlap,
            fusion=book.blocks.execution.fusion,
            grads="fp32" if book.blocks.execution.fp32_grads else "same",
        ),
        gpus=found.gpus,
        global_batch=found.global_batch,
        microbatches=book.num_microbatches,
        micro_batch_size=book.micro_batch,
        schedule=found.schedule,
        num_chunks=found.num_chunks,
        recompute=recompute_summary(listed),
        programs=listed,
        stages=tuple(stages),
        estimate=estimate,
        search=SearchOutcome(
            seconds=found.seconds,
            status="fixed" if found.fixed else "optimal" if gap <= 1e-4 else "feasible",
            lower_bound_s=bound_s,
            gap=gap,
            runner_up=found.runner_up,
        ),
        notes=tuple(f"{target} has no sharding rule: replicated" for target in unknown),
        command="",
        versions={
            "autopar": metadata.version("autopar"),
            "torch": metadata.version("torch"),
            "python": platform.python_version(),
        },
    )
    return judged(plan, book.blocks, found.cluster)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Use:
    """A block of a stage: its column, and the point of its frontier that it takes."""

    column: int
    ref: PointRef
    points: BlockPoints
    boundary: int
    mesh: Mesh

    @property
    def row(self) -> int:
        return self.ref[1]

    def strategy(self, at: int) -> int:
        """The strategy of the block's op ``at``."""
        return int(self.points.choices[2 + at, self.row, self.boundary])

    @property
    def totals(self) -> np.ndarray:  # type: ignore[type-arg]
        return self.points.totals[self.row, self.boundary]


def stage_memory(book: StageBook, choice: StageChoice, first: int, end: int, in_flight: int) -> MemoryParts:
    """What a stage holds on its fullest device."""
    return _memory(book, _uses(book, choice, first, end), in_flight)


def _uses(book: StageBook, choice: StageChoice, first: int, end: int) -> list[_Use]:
    columns = book.columns_of(first, end)
    return [
        _Use(
            column=column,
            ref=ref,
            points=book.points(column, choice.mesh, ref[0]),
            boundary=choice.boundary,
            mesh=choice.mesh,
        )
        for column, ref in zip(columns, choice.per_block(columns), strict=True)
    ]


def _program(book: StageBook, use: _Use, name: str) -> BlockProgram:
    points = use.points
    tables, graph = points.tables, book.blocks.graph
    lie = Lying(graph, book.micro_batch, use.mesh.has_data_axis)
    placements: dict[int, OpPlan] = {}
    parameters: dict[int, ParameterPlan] = {}
    for at, node in enumerate(tables.space.ops):
        strategy = use.strategy(at)
        options = tables.strategies[at][strategy]
        placements[node.op.id] = lie.op_plan(node.op, options)
        names, chosen = points.storages[at]
        for number, position in enumerate(node.parameters):
            value = graph.values[node.op.inputs[position]]
            storage = names[number * len(tables.strategies[at]) + strategy][int(chosen[number][use.row, strategy])]
            tokens = [option.inputs[position] for option in options]
            parameters.setdefault(value.id, _parameter(value.names or (value.name,), tokens, storage, use.mesh))
    for op in tables.space.data_ops:
        placements[op.id] = lie.data_op_plan(op, len(use.mesh.inner))
    kind, _ = book.columns[use.column]
    return BlockProgram(
        id=name,
        kind=kind,
        recompute=points.rows[use.row].mode,  # type: ignore[arg-type]
        inputs=lie.at_boundary(tables, tables.space.block.inputs, use.boundary),
        outputs=lie.at_boundary(tables, tables.space.block.outputs, use.boundary),
        shared=lie.shared(tables, points.choices[:, use.row, use.boundary]),
        ops=tuple(placements[op] for op in sorted(placements)),
        parameters=tuple(parameters[v] for v in book.blocks.kinds[kind].parameters if v in parameters),
    )


def _parameter(names: Sequence[str], tokens: Sequence[Token], storage: pm.Storage, mesh: Mesh) -> ParameterPlan:
    """ZeRO cuts dim 0 of what the op's own cuts leave to a rank, so its pieces are those that they make."""
    compute = ["R", *(token.text if isinstance(token, Atom) else "R" for token in tokens)]
    pieces = 1
    for token, size in zip(tokens, mesh.sizes[1:], strict=True):
        if isinstance(token, Atom) and token.dim == 0:
            pieces = max(pieces, token.repeats * size)
    shard = "S(0)" if pieces == 1 else f"_S(0,{pieces})"
    cut = [shard if axis in storage.axes else token for axis, token in enumerate(compute)]
    gradient = [
        "P" if token == "R" and (axis == 0 or tokens[axis - 1] == "G") else token
        for axis, token in enumerate(cut if storage.stage >= 2 else compute)
    ]
    first = 0 if mesh.has_data_axis else 1
    return ParameterPlan(
        name=names[0],
        compute="".join(compute[first:]),
        parameter="".join((cut if storage.stage == 3 else compute)[first:]),
        gradient="".join(gradient[first:]),
        optimizer="".join((cut if storage.stage >= 1 else compute)[first:]),
    )


def _axes(book: StageBook, mesh: Mesh, uses: list[_Use]) -> tuple[Axis, ...]:
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


def _axis_name(book: StageBook, inputs: Sequence[int], tokens: Sequence[Token]) -> str:
    graph = book.blocks.graph
    weight = next((t for v, t in zip(inputs, tokens, strict=True) if graph.values[v].kind == "parameter"), None)
    if isinstance(weight, Atom):
        value = next(v for v in inputs if graph.values[v].kind == "parameter")
        return "ep" if len(graph.values[value].shape) == 3 and weight.dim == 0 else "tp"
    first = tokens[0] if tokens else "R"
    if isinstance(first, Atom):
        return "dp" if graph.batch.grows(first.size) else "tp" if weight is None and first.dim == 1 else "cp"
    return "tp"


def _memory(book: StageBook, uses: list[_Use], in_flight: int) -> MemoryParts:
    sums = np.zeros(3)
    saved = workspace = 0.0
    execution = book.blocks.execution
    for use in uses:
        saved += use.totals[fr.SAVED]
        workspace = max(workspace, float(use.totals[fr.WORKSPACE]))
        held = book.columns[use.column][1]
        for at, of_op in enumerate(use.points.tables.parameter_uses):
            strategy = use.strategy(at)
            names, chosen = use.points.storages[at]
            for number, (value, per_strategy) in enumerate(of_op):
                if value.id in held:
                    continue
                elements = per_strategy[strategy][0]
                if value.kind == "buffer" or not value.requires_grad:
                    sums[0] += elements * value.itemsize
                    continue
                storage = names[number * len(per_strategy) + strategy][int(chosen[number][use.row, strategy])]
                shards = int(np.prod([use.mesh.sizes[axis] for axis in storage.axes], dtype=int))
                sums += pm.state_bytes(storage, shards, elements, value.itemsize, execution)
    return MemoryParts(
        parameters_bytes=round(sums[0]),
        gradients_bytes=round(sums[1]),
        optimizer_bytes=round(sums[2]),
        saved_activations_bytes=round(in_flight * saved),
        workspace_bytes=round(workspace),
        fixed_bytes=round(book.fixed_bytes()),
    )


def _time_parts(book: StageBook, uses: list[_Use]) -> dict[str, float]:
    """Seconds per micro-batch of a stage by what computes, and by what communicates; ``step`` parts once per step."""
    parts = dict.fromkeys(("matmul", "attention", "memory", "activations", "gathers", "reduction", "optimizer"), 0.0)
    graph, device = book.blocks.graph, book.blocks.cluster.device
    for use in uses:
        tables = use.points.tables
        for at, node in enumerate(tables.space.ops):
            strategy = use.strategy(at)
            degrees: dict[int, np.ndarray] = {}  # type: ignore[type-arg]
            for option, size in zip(tables.strategies[at][strategy], use.mesh.inner, strict=True):
                for label in option.labels:
                    degrees[label] = degrees.get(label, np.ones(1)) * size
            forward, backward = op_seconds(
                graph,
                node.op,
                node.rule,
                book.blocks.profile.ops[node.op.id],
                tables.local_batch,
                {
                    label: degree
                    for label, degree in degrees.items()
                    if label in dict(node.rule.roles) or not node.rule.roles
                },
                device,
                book.blocks.execution,
            )
            name = {"matmul": "matmul", "attention": "attention"}.get(node.rule.compute, "memory")
            parts[name] += float(forward[0] + backward[0])
        for source, target, forward, backward in tables.edges:
            pair = tuple(int(use.points.choices[node, use.row, use.boundary]) for node in (source, target))
            parts["activations"] += float(forward[pair] + backward[pair])
        parts["reduction"] += float(use.totals[fr.STEP])
        parts["optimizer"] += float(use.totals[fr.STEP_EXPOSED])
    return parts


def _estimate(
    found: Found, stages: list[StagePlan], step_time_s: float, bubble: float, parts: dict[str, float]
) -> Estimate:
    book, graph = found.book, found.book.blocks.graph
    count = book.num_microbatches
    flops = model_flops(graph, found.global_batch).total
    tokens = _tokens_per_sample(found)
    exposed = count * parts["activations"] + max(0.0, parts["reduction"] - max(stage.backward_s for stage in stages))
    runs: dict[int, list[StagePlan]] = {}
    for stage in stages:
        runs.setdefault(stage.first_device, []).append(stage)
    memory = [device_memory(tuple(run)) for run in runs.values()]
    peak = max(one.total for one in memory)
    uncertainty = load_uncertainty()
    nodes = -(-found.gpus // found.cluster.devices_per_node)
    low, high = uncertainty.step_time_factors(found.cluster.device.name, nodes, book.blocks.execution.attn)
    return Estimate(
        step_time_s=step_time_s,
        step_time_low_s=low * step_time_s,
        step_time_high_s=high * step_time_s,
        memory_low_bytes=round(uncertainty.memory_low * peak),
        memory_high_bytes=round(uncertainty.memory_high * peak),
        tokens_per_s=tokens * found.global_batch / step_time_s,
        samples_per_s=found.global_batch / step_time_s,
        mfu=flops / (step_time_s * found.gpus * found.cluster.device.peak(book.blocks.execution.dtype)),
        flops_per_step=flops,
        peak_memory_bytes=peak,
        peak_tensor_bytes=max(one.tensor_bytes for one in memory),
        budget_bytes=found.budget_bytes,
        fits=peak <= found.budget_bytes,
        bubble_fraction=bubble,
        exposed_communication_s=exposed,
        time=TimeParts(
            matmul_s=count * parts["matmul"],
            attention_s=count * parts["attention"],
            memory_bound_s=count * parts["memory"],
            launch_s=0.0,
            communication_s={"activations": count * parts["activations"], "gradients": parts["reduction"]},
            exposed_communication_s=exposed,
            optimizer_s=parts["optimizer"],
            transfers_s=sum(stage.send_forward_s + stage.send_backward_s for stage in stages),
        ),
        collectives=(),
    )


def _tokens_per_sample(found: Found) -> float:
    """Integers a sample's largest integer input holds (its sequence length), 1 for models without one."""
    graph = found.book.blocks.graph
    sizes = [
        int(np.prod(value.shape)) / graph.batch.traced
        for value in (graph.values[v] for v in graph.inputs)
        if value.dtype == "int64" and len(value.shape) == 2 and graph.batch.grows(value.shape[0])
    ]
    return max(sizes, default=1.0)
