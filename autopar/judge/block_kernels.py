"""The kernels of a block on one rank: the price of each op, its calls of the host, and the largest workspace."""

from collections.abc import Iterable
from dataclasses import dataclass

from autopar.graph.ir import Op
from autopar.judge.block_redistributions import BlockRedistributions
from autopar.judge.context import BlockContext
from autopar.judge.op_price import JudgedOpPrice, price_op
from autopar.judge.redistribution_path import PricedCollective
from autopar.judge.workspace_bytes import op_workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKernels:
    """The ops of a block that some ranks compute and others do not: the price of each, its calls of the host, and the
    most bytes of workspace that one of them needs."""

    prices: dict[int, JudgedOpPrice]
    forward_calls: dict[int, float]
    backward_calls: dict[int, float]
    attention_ops: frozenset[int]
    matmul_ops: frozenset[int]
    workspace_bytes: float

    @staticmethod
    def of(context: BlockContext, redistributions: BlockRedistributions) -> "BlockKernels":
        """Price each op; CheckError where the placements of one contradict each other."""
        profiles = context.model.profile.ops
        gathered_bytes: dict[int, float] = {}  # the largest input that an op regathers
        for op_id, size in redistributions.regathered_bytes:
            gathered_bytes[op_id] = max(size, gathered_bytes.get(op_id, 0.0))
        prices: dict[int, JudgedOpPrice] = {}
        calls: dict[int, tuple[float, float]] = {}
        attention_ops: set[int] = set()
        workspace_bytes = 0.0
        for op, planned in context.distributed_ops():
            price = prices[op.id] = price_op(context, op, planned)
            calls[op.id] = _host_calls(context, op)
            if op.is_attention:
                attention_ops.add(op.id)
            op_bytes = op_workspace_bytes(context, op, planned, price.num_shards) + gathered_bytes.get(op.id, 0.0)
            workspace_bytes = max(workspace_bytes, op_bytes)
        return BlockKernels(
            prices=prices,
            forward_calls={op: forward for op, (forward, _) in calls.items()},
            backward_calls={op: backward for op, (_, backward) in calls.items()},
            attention_ops=frozenset(attention_ops),
            matmul_ops=frozenset(op for op in prices if op not in attention_ops and profiles[op].forward_flops),
            workspace_bytes=workspace_bytes,
        )

    @property
    def forward_collectives(self) -> list[PricedCollective]:
        """Issued inside ops in the forward, in the order of ops."""
        return [step for price in self.prices.values() for step in price.forward_collectives]

    @property
    def backward_collectives(self) -> list[PricedCollective]:
        """Issued inside ops in the backward, in the order of ops."""
        return [step for price in self.prices.values() for step in price.backward_collectives]

    def linear_backward_s(self, op: int | None) -> tuple[float, float] | None:
        """The two backward products of a linear op; None for anything else."""
        return self.prices[op].linear_backward_s if op is not None and op in self.matmul_ops else None

    def forward_s(self, ops: Iterable[int]) -> float:
        """Seconds of the kernels of some ops, forward."""
        return sum(self.prices[op].forward_s for op in ops)

    def backward_s(self, ops: Iterable[int]) -> float:
        """Seconds of the kernels of some ops, backward."""
        return sum(self.prices[op].backward_s for op in ops)


def _host_calls(context: BlockContext, op: Op) -> tuple[float, float]:
    """An op's calls of the host, forward and backward."""
    profile, software = context.model.profile.ops[op.id], context.software
    if context.materialises_scores(op):
        return software.math_attention_forward_calls, software.math_attention_backward_calls
    return float(profile.forward_kernels or software.view_calls), float(profile.backward_kernels)
