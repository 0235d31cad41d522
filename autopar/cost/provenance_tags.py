"""Where each priced time comes from: a measured table, a model, or an extrapolation.

    measured      looked up between the nodes of a table that was measured on this device or this kind of node
    modelled      a formula (bandwidth, alpha-beta, launches), or the table of a sibling scaled by peak
    extrapolated  a shape, a size or a number of ranks outside the nodes of its table

An op's forward and its backward have a tag each; a backward is as certain as the least certain of its matmuls.
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np

from autopar.cluster.cluster import Cluster, RankGroup
from autopar.cluster.device import REFERENCE_HEAD_DIM, Device
from autopar.cost.compute_time import ShardedOp, wanted_gradients
from autopar.cost.execution_model import ExecutionModel

ProvenanceTag = Literal["measured", "modelled", "extrapolated"]
PROVENANCE_TAGS: tuple[ProvenanceTag, ...] = ("measured", "modelled", "extrapolated")


def least_certain(tags: Iterable[ProvenanceTag]) -> ProvenanceTag:
    """The last of ``PROVENANCE_TAGS`` that occurs.

    >>> least_certain(["measured", "extrapolated", "modelled"])
    'extrapolated'
    """
    return max(tags, key=PROVENANCE_TAGS.index)


def matmul_tag(device: Device, m: float, n: float, k: float, batch: float = 1.0) -> ProvenanceTag:
    """Of ``batch`` products (m, k) @ (k, n); one too tall for the table is looked up transposed, as (n, k) @ (k, m)."""
    table = device.matmul
    is_inside = all(
        line[0] <= size <= line[-1] for line, size in ((table.n, n), (table.k, k), (table.m, m)) if len(line) > 1
    )
    is_inside_transposed = n <= table.m[-1] and table.n[0] <= m <= table.n[-1] and table.k[0] <= k <= table.k[-1]
    if not (is_inside or is_inside_transposed):
        return "extrapolated"
    return "measured" if batch == 1 and device.provenance["matmul"].status == "measured" else "modelled"


def attention_tag(device: Device, seq: float, batch_heads: float, head_dim: float, *, backward: bool) -> ProvenanceTag:
    """Of flash attention; the tables have causal forward passes of head_dim 128."""
    table = device.flash_attention
    if not (table.seq[0] <= seq <= table.seq[-1] and table.batch_heads[0] <= batch_heads <= table.batch_heads[-1]):
        return "extrapolated"
    is_measured = device.provenance["flash_attention"].status == "measured"
    return "measured" if is_measured and head_dim == REFERENCE_HEAD_DIM and not backward else "modelled"


def op_tags(sharded: ShardedOp, device: Device, execution: ExecutionModel) -> tuple[ProvenanceTag, ProvenanceTag]:
    """(forward, backward) of an op under a single strategy."""
    rule = sharded.rule
    if not sharded.profile.forward_flops or not rule.roles:
        return "modelled", "modelled"
    one = np.ones(1)
    roles = sharded.local_role_sizes(one)
    b, h, m, n, k, q, d = (float(roles.get(role, one)[0]) for role in "bhmnkqd")
    if rule.compute == "attention":
        if execution.attn == "math":
            return "modelled", "modelled"
        return attention_tag(device, q, b * h, d, backward=False), attention_tag(device, q, b * h, d, backward=True)
    wanted = wanted_gradients(sharded)
    shapes = [shape for shape, want in zip(((m, k, n), (n, k, m)), wanted, strict=False) if want] or [(m, n, k)]
    return matmul_tag(device, m, n, k, b), least_certain(matmul_tag(device, *shape, b) for shape in shapes)


def collective_tag(cluster: Cluster, kind: str, num_bytes: float, group: RankGroup) -> ProvenanceTag:
    """Of a collective as ``Cluster.collective_s`` prices it: across nodes by a formula, inside by a table."""
    curves = {curve.num_ranks: curve for curve in cluster.collectives if curve.kind == kind}
    if not curves or group.num_nodes > 1:
        return "modelled"
    ranks = sorted(curves)
    curve = curves[min(ranks, key=lambda count: abs(count - group.num_ranks))]
    if not (ranks[0] <= group.num_ranks <= ranks[-1] and curve.num_bytes[0] <= num_bytes <= curve.num_bytes[-1]):
        return "extrapolated"
    is_measured = cluster.provenance["collectives"].status == "measured"
    return "measured" if is_measured and group.num_ranks in curves else "modelled"
