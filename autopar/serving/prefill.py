"""The price of a prefill: the forward pass of the training layout, without loss."""

from autopar.graph.flops import flops_at_batch
from autopar.intra import op_metrics as om
from autopar.serving.decode_step import ServedModel, matmul_time
from autopar.serving.rank_op import RankOp
from autopar.serving.replica import Replica

PREFILL_PARTS = ("matmul", "attention", "other", "exchange", "launches")
"""The parts into which the seconds of a prefill are divided."""


def price_prefill(
    replica: Replica, served: ServedModel, *, batch: int, sequence: int
) -> tuple[tuple[tuple[str, float], ...], float]:
    """Seconds of a rank by part (``PREFILL_PARTS``), and the FLOPs of the unsharded model, for ``batch`` sequences of
    ``sequence`` tokens. Attention counts the whole square of tokens; the head runs for the last token only."""
    parts_s = dict.fromkeys(PREFILL_PARTS, 0.0)
    flops = 0.0
    for choice in replica.stage_at_batch(batch).block_choices():
        tables = choice.frontier.tables
        busy_s = 0.0
        after_head = set()
        for index, node in enumerate(tables.space.ops):
            if node.op.id > replica.head_op:
                after_head.add(2 + index)
                continue
            op = RankOp(replica=replica, choice=choice, index=index)
            seconds = float(op.metrics[om.FORWARD] + op.metrics[om.SELECTIVE_FORWARD])
            work = flops_at_batch(op.profile.forward_flops, replica.graph.batch, batch)
            if op.is_head and work:
                head = next(matmul for matmul in served.matmuls if matmul.last_token_only)
                seconds = matmul_time(head, batch, replica.pricer.cluster.device, served.dtype)[0]
                work //= sequence
            parts_s[node.rule.compute if node.rule.compute in ("matmul", "attention") else "other"] += seconds
            busy_s += seconds
            flops += work
        for source, target, forward_s, _ in tables.edges:
            if not after_head & {source, target}:
                pair = tuple(
                    int(choice.frontier.choices[node, choice.row, choice.boundary]) for node in (source, target)
                )
                parts_s["exchange"] += float(forward_s[pair])
                busy_s += float(forward_s[pair])
        parts_s["launches"] += max(tables.launch_s[0] - busy_s, 0.0)
    return tuple(parts_s.items()), flops
