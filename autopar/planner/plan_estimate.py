"""The estimate of a plan, and where the time of its slowest stage goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.cluster.cluster import Cluster
from autopar.cluster.uncertainty import load_uncertainty
from autopar.core.plan import Estimate, StagePlan, TimeParts, device_memory
from autopar.graph.flops import model_flops
from autopar.graph.ir import Graph, GraphProfile
from autopar.inter.block_choice import BlockChoice
from autopar.inter.stage_costs import StageCosts
from autopar.intra import block_totals as tt
from autopar.intra import op_metrics as om


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimeParts:
    """Seconds of a stage. Per micro-batch: compute by kind of op (recomputation included), ``launch_s`` by which the
    host takes longer to launch than the device to compute, ``activations_s`` in collectives on activations. Once per
    step: ``reduction_s`` in gradient reductions, overlapped or exposed, and ``optimizer_s``."""

    matmul_s: float = 0.0
    attention_s: float = 0.0
    memory_bound_s: float = 0.0
    launch_s: float = 0.0
    activations_s: float = 0.0
    reduction_s: float = 0.0
    optimizer_s: float = 0.0


def stage_time_parts(choices: Sequence[BlockChoice]) -> StageTimeParts:
    """The parts of a stage of these blocks, from the cost tables of the search."""
    kinds = dict.fromkeys(("matmul", "attention", "memory"), 0.0)
    launch = activations = reduction = optimizer = 0.0
    for choice in choices:
        tables, mode = choice.frontier.tables, choice.frontier.objectives[choice.row].mode
        full, selective = float(mode == "full"), float(mode == "selective")
        computing = 0.0
        for index, node in enumerate(tables.space.ops):
            row = tables.node_metrics[2 + index][choice.strategy(index)]
            forward_s = row[om.FORWARD] + (1.0 + selective) * row[om.SELECTIVE_FORWARD]
            seconds = float(forward_s + full * row[om.FULL_RECOMPUTE] + row[om.BACKWARD])
            kinds[node.rule.compute if node.rule.compute in kinds else "memory"] += seconds
            computing += seconds
        for (source, target, forward, backward), by_full, by_selective in zip(
            tables.edges, tables.repeated_by_full, tables.repeated_by_selective, strict=True
        ):
            pair = tuple(int(choice.frontier.choices[node, choice.row, choice.boundary]) for node in (source, target))
            times = 1.0 + full * by_full + selective * by_selective
            activations += float(times * forward[pair] + backward[pair])
        host = tables.launch_s[0] + tables.launch_s[2] + selective * tables.launch_s[1] + full * tables.launch_s[3]
        launch += host if tables.blocking_launches else max(host - computing, 0.0)
        reduction += float(choice.totals[tt.STEP_OVERLAPPABLE])
        optimizer += float(choice.totals[tt.STEP_EXPOSED])
    return StageTimeParts(
        matmul_s=kinds["matmul"],
        attention_s=kinds["attention"],
        memory_bound_s=kinds["memory"],
        launch_s=launch,
        activations_s=activations,
        reduction_s=reduction,
        optimizer_s=optimizer,
    )


def redundant_flops_shares(
    choices: Sequence[BlockChoice], profile: GraphProfile, axis_names: Sequence[str]
) -> dict[str, tuple[float, bool]]:
    """Inner axis of a stage (``axis_names``, in order) -> (the share of the forward FLOPs that every rank of the axis
    computes redundantly, whether attention is part of it); axes without redundant work are left out."""
    shares: dict[str, tuple[float, bool]] = {}
    for axis, name in enumerate(axis_names):
        total = redundant = 0.0
        has_attention = False
        for choice in choices:
            for index, node in enumerate(choice.frontier.tables.space.ops):
                flops = float(profile.ops[node.op.id].forward_flops)
                total += flops
                if flops and not choice.frontier.tables.strategies[index][choice.strategy(index)][axis].is_sharded:
                    redundant += flops
                    has_attention = has_attention or node.rule.compute == "attention"
        if redundant:
            shares[name] = (redundant / total, has_attention)
    return shares


def make_estimate(
    *,
    stage_costs: StageCosts,
    cluster: Cluster,
    gpus: int,
    global_batch: int,
    budget_bytes: int,
    stages: Sequence[StagePlan],
    step_time_s: float,
    bubble_fraction: float,
    parts: StageTimeParts,
) -> Estimate:
    """The estimate of a plan with these stages; ``parts`` are those of its slowest stage."""
    graph = stage_costs.pricer.graph
    count = stage_costs.num_microbatches
    model = model_flops(graph, global_batch, stage_costs.pricer.profile.ops)
    flops = model.total
    tokens = _tokens_per_sample(graph)
    exposed = count * parts.activations_s + max(0.0, parts.reduction_s - max(stage.backward_s for stage in stages))
    stages_by_submesh: dict[int, list[StagePlan]] = {}
    for stage in stages:
        stages_by_submesh.setdefault(stage.first_device, []).append(stage)
    memory = [device_memory(tuple(chunks)) for chunks in stages_by_submesh.values()]
    peak = max(parts_of_memory.total for parts_of_memory in memory)
    uncertainty = load_uncertainty()
    nodes = -(-gpus // cluster.devices_per_node)
    low, high = uncertainty.step_time_factors(cluster.device.name, nodes, stage_costs.pricer.execution.attn)
    return Estimate(
        step_time_s=step_time_s,
        step_time_low_s=low * step_time_s,
        step_time_high_s=high * step_time_s,
        memory_low_bytes=round(uncertainty.memory_low * peak),
        memory_high_bytes=round(uncertainty.memory_high * peak),
        tokens_per_s=tokens * global_batch / step_time_s,
        samples_per_s=global_batch / step_time_s,
        mfu=flops / (step_time_s * gpus * cluster.device.peak(stage_costs.pricer.execution.dtype)),
        flops_per_step=flops,
        flops_by_kind=dict(model.by_kind),
        peak_memory_bytes=peak,
        peak_tensor_bytes=max(parts_of_memory.tensor_bytes for parts_of_memory in memory),
        budget_bytes=budget_bytes,
        fits=peak <= budget_bytes,
        bubble_fraction=bubble_fraction,
        exposed_communication_s=exposed,
        time=TimeParts(
            matmul_s=count * parts.matmul_s,
            attention_s=count * parts.attention_s,
            memory_bound_s=count * parts.memory_bound_s,
            launch_s=count * parts.launch_s,
            communication_s={"activations": count * parts.activations_s, "gradients": parts.reduction_s},
            exposed_communication_s=exposed,
            optimizer_s=parts.optimizer_s,
            transfers_s=sum(stage.transfer_forward_s + stage.transfer_backward_s for stage in stages),
        ),
        collectives=(),
    )


def _tokens_per_sample(graph: Graph) -> float:
    """Elements per sample of the largest int64 input of shape (batch, length), which is the sequence length; 1 for models
    without one."""
    sizes = [
        int(np.prod(value.shape)) / graph.batch.traced_size
        for value in (graph.values[v] for v in graph.inputs)
        if value.dtype == "int64" and len(value.shape) == 2 and graph.batch.is_proportional(value.shape[0])
    ]
    return max(sizes, default=1.0)
