"""What each rank of a replica runs and stores per token of a decode, read off the priced layout."""

from collections import defaultdict

from autopar.core.request import StorageFormat
from autopar.cost.fusion import NO_SAVINGS, fused_kernel_of
from autopar.graph.attention import AttentionCall
from autopar.intra import op_metrics as om
from autopar.judge.block_redistributions import find_redistributions
from autopar.judge.judge_mesh import JudgeMesh
from autopar.serving.decode_step import CachedAttention, DecodeCollective, DecodeMatmul, ServedModel
from autopar.serving.rank_op import RankOp
from autopar.serving.replica import Replica


def served_model(
    replica: Replica,
    calls: tuple[AttentionCall, ...],
    *,
    sequence: int,
    weight_storage: StorageFormat,
    kv_cache_storage: StorageFormat,
) -> ServedModel:
    """The matmuls, attentions, other kernels and collectives of a rank per token, and its bytes. ``calls`` are the
    model's attentions and ``sequence`` their traced length; repeating keys for query heads, dropout and what follows
    the head do not run."""
    call_of = {call.op_id: call for call in calls}
    skipped = {op for call in calls for op in call.repeat_ops}
    pricer = replica.stage.stage_costs.pricer
    kernel_of = fused_kernel_of(replica.graph, pricer.execution.software.fuses)
    tokens = replica.min_batch * sequence
    matmuls: list[DecodeMatmul] = []
    attentions: list[CachedAttention] = []
    kernel_bytes: list[float] = []
    num_kernels, workspace = 0, 0.0
    for choice in replica.stage.block_choices():
        bytes_of_kernel: dict[int, float] = defaultdict(float)
        for index, node in enumerate(choice.frontier.tables.space.ops):
            op, rank_op = node.op, RankOp(replica=replica, choice=choice, index=index)
            if op.id > replica.head_op or op.id in skipped or "dropout" in op.target:
                continue
            profile = rank_op.profile
            num_kernels += profile.forward_kernels
            if not rank_op.is_head:
                workspace = max(workspace, float(rank_op.metrics[om.WORKSPACE]))
            if op.id in call_of:
                attentions.append(rank_op.attention(call_of[op.id], kv_cache_storage))
            elif profile.forward_flops:
                matmuls.append(rank_op.matmul(tokens, weight_storage))
            else:
                saved = pricer.fusion_savings.get(op.id, NO_SAVINGS).forward_bytes
                num_bytes = max(profile.forward_bytes - saved, 0.0)
                num_bytes /= rank_op.num_shards * replica.graph.batch.traced_size * sequence
                bytes_of_kernel[kernel_of.get(op.id, op.id)] += num_bytes
        kernel_bytes += [num_bytes for num_bytes in bytes_of_kernel.values() if num_bytes]
    return ServedModel(
        matmuls=tuple(matmuls),
        attentions=tuple(attentions),
        kernel_bytes_per_token=tuple(kernel_bytes),
        collectives=_collectives(replica, tokens),
        num_kernels=num_kernels,
        dtype=replica.pricer.model.dtype,
        weights_bytes=_weights_bytes(replica, weight_storage),
        workspace_bytes=workspace,
        fixed_bytes=replica.stage.stage_costs.pricing.fixed_bytes,
    )


def _collectives(replica: Replica, tokens: int) -> tuple[DecodeCollective, ...]:
    """The collectives of a forward pass of ``tokens`` tokens, block by block."""
    graph, stage = replica.graph, replica.plan.stages[0]
    parameter_free = graph.parameter_free()
    mesh = JudgeMesh(replica.pricer.cluster, tuple(axis.size for axis in stage.axes), stage.first_device)
    first_of_kind = replica.stage.stage_costs.pricer.first_of_kind
    by_program: dict[str, tuple[DecodeCollective, ...]] = {}
    collectives: list[DecodeCollective] = []
    for ref in stage.blocks:
        if ref.program not in by_program:
            program = replica.plan.program(ref.program)
            redistributions = find_redistributions(
                graph, first_of_kind[program.kind], program, mesh, replica.min_batch, parameter_free
            )
            by_program[ref.program] = tuple(
                DecodeCollective(kind=step.kind, bytes_per_token=step.num_bytes / tokens, group=mesh.group(step.axes))
                for path in redistributions.forward_paths
                for step in path.collectives
                if step.kind != "ring" and step.kind != "send"
            )
        collectives += by_program[ref.program]
    return tuple(collectives)


def _weights_bytes(replica: Replica, weight_storage: StorageFormat) -> float:
    """Bytes of the weights that a rank stores; a tied weight counts in the first block that uses it."""
    stage_costs, total = replica.stage.stage_costs, 0.0
    for choice in replica.stage.block_choices():
        seen = set(stage_costs.variants[choice.variant][1])
        for index, weights in enumerate(choice.frontier.tables.parameter_uses):
            for value, elements_per_strategy in weights:
                if value.id not in seen:
                    seen.add(value.id)
                    elements = elements_per_strategy[choice.strategy(index)][0]
                    total += elements * replica.weight_bytes_per_element(value, weight_storage)
    return total
