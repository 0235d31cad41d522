"""One op as a rank of a replica runs it: its local sizes, read off the op's strategy in the priced layout."""

from dataclasses import dataclass
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

from autopar.core.dtypes import ITEMSIZE
from autopar.core.request import StorageFormat
from autopar.cost.compute_time import label_sizes
from autopar.graph.attention import AttentionCall
from autopar.graph.flops import flops_at_batch
from autopar.graph.ir import OpProfile
from autopar.inter.block_choice import BlockChoice
from autopar.intra.block_space import OpNode
from autopar.rules.axis_options import AxisOption
from autopar.serving.decode_step import CachedAttention, DecodeMatmul, bytes_per_element
from autopar.serving.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankOp:
    """The op at position ``index`` of a block under the block's choice; sizes are at ``replica.min_batch`` samples."""

    replica: Replica
    choice: BlockChoice
    index: int

    @property
    def node(self) -> OpNode:
        """The op in its block's space."""
        return self.choice.frontier.tables.space.ops[self.index]

    @property
    def profile(self) -> OpProfile:
        """FLOPs, bytes and kernels of the unsharded op at the traced batch."""
        return self.replica.profile.ops[self.node.op.id]

    @property
    def is_head(self) -> bool:
        """Whether the op is the model's head (the logits)."""
        return self.node.op.id == self.replica.head_op

    @property
    def metrics(self) -> NDArray[np.float64]:
        """The metrics of a rank under the chosen strategy, at the positions of `intra.op_metrics`."""
        return self.choice.frontier.tables.node_metrics[2 + self.index][self.choice.strategy(self.index)]

    @property
    def shard_degrees(self) -> dict[int, int]:
        """Label of the op's rule -> number of its shards; labels that are not sharded are left out."""
        degrees: dict[int, int] = {}
        for option, size in zip(self._options, self.choice.mesh.inner_sizes, strict=True):
            for label in option.labels[:1]:
                degrees[label] = degrees.get(label, 1) * size
        return degrees

    @property
    def num_shards(self) -> int:
        """The number of ranks that share the work of the op."""
        return prod(self.shard_degrees.values())

    def matmul(self, tokens: int, weight_storage: StorageFormat) -> DecodeMatmul:
        """The op as a matmul of ``tokens`` tokens; one without roles in its rule is priced as m = n = k of
        equal FLOPs."""
        node, graph = self.node, self.replica.graph
        flops = float(flops_at_batch(self.profile.forward_flops, graph.batch, self.replica.min_batch))
        if not node.rule.roles:
            size = (flops / 2 / self.num_shards) ** (1 / 3)
            return DecodeMatmul(rows_per_token=size / tokens, n=size, k=size, num_matrices=1.0, weight_itemsize=0.0)
        weight = next((graph.values[node.op.inputs[i]] for i in node.parameter_inputs), None)
        itemsize = 0.0 if weight is None else self.replica.weight_bytes_per_element(weight, weight_storage)
        local = self._role_sizes(self.shard_degrees)
        scale = flops / (2.0 * prod(self._role_sizes({}).values()))
        rows = scale * local.get("b", 1.0) * local.get("m", 1.0)
        return DecodeMatmul(
            rows_per_token=rows / tokens,
            n=local.get("n", 1.0),
            k=local.get("k", 1.0),
            num_matrices=local.get("b", 1.0) if weight is not None else 1.0,
            weight_itemsize=itemsize,
            last_token_only=self.is_head,
        )

    def attention(self, call: AttentionCall, kv_cache_storage: StorageFormat) -> CachedAttention:
        """The op as an attention over the cache; key and value heads are sharded as query heads are."""
        local = self._role_sizes(self.shard_degrees).get("h", 1.0)
        unsharded = self._role_sizes({}).get("h", 1.0)
        elements = (call.key_elements_per_token + call.value_elements_per_token) * local / unsharded
        return CachedAttention(
            num_heads=call.heads * local / unsharded,
            head_dim=call.head_dim,
            cache_bytes_per_token=elements
            * bytes_per_element(kv_cache_storage, ITEMSIZE[self.replica.pricer.model.dtype]),
        )

    @property
    def _options(self) -> tuple[AxisOption, ...]:
        """The option of every inner axis."""
        return self.choice.frontier.tables.strategies[self.index][self.choice.strategy(self.index)]

    def _role_sizes(self, shard_degrees: dict[int, int]) -> dict[str, float]:
        """Role of the op's rule (b, m, n, k of a matmul, h of attention) -> product of the sizes of its labels, sharded
        by ``shard_degrees``. All labels of an option are sharded alike."""
        node = self.node
        degrees = {label: shard_degrees.get(option.labels[0], 1) for option in self._options for label in option.labels}
        sizes = label_sizes(self.replica.graph, node.op, node.rule, self.replica.min_batch)
        found: dict[str, float] = {}
        for label, role in node.rule.roles:
            found[role] = found.get(role, 1.0) * ceil(sizes.get(label, 1) / degrees.get(label, 1))
        return found
