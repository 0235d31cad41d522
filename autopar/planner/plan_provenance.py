"""How much of a plan's slowest stage stands on measured tables: its terms counted, and their seconds, by tag.

terms      an op's forward and backward in a block, a collective, a transfer, a block's optimizer step
seconds    per step on a device of the stage, hidden or not; recompute is in the backward that runs it
"""

from collections.abc import Sequence

import msgspec

from autopar.cluster.cluster import Cluster
from autopar.core.plan import Plan
from autopar.cost.compute_time import ShardedOp
from autopar.cost.provenance_tags import PROVENANCE_TAGS, ProvenanceTag, collective_tag, op_tags
from autopar.graph.ir import GraphProfile
from autopar.inter.block_choice import BlockChoice
from autopar.inter.block_pricer import BlockPricer
from autopar.intra import block_totals as tt
from autopar.intra import op_metrics as om


def with_provenance(
    plan: Plan, stage: int, block_choices: Sequence[BlockChoice], pricer: BlockPricer, cluster: Cluster
) -> Plan:
    """``plan`` with the tags of its stage number ``stage``, whose blocks are ``uses``."""
    counts: dict[str, int] = dict.fromkeys(PROVENANCE_TAGS, 0)
    seconds: dict[str, float] = dict.fromkeys(PROVENANCE_TAGS, 0.0)

    def add(tag: ProvenanceTag, time_s: float, count: int = 1) -> None:
        if time_s > 0:
            counts[tag] += count
            seconds[tag] += time_s

    kinds: dict[tuple[object, ...], list[tuple[ProvenanceTag, float]]] = {}
    for use in block_choices:
        key = (use.variant, use.frontier_ref, use.boundary, use.mesh)
        if key not in kinds:
            kinds[key] = _tagged_op_seconds(use, pricer, pricer.profile, cluster)
        for tag, time_s in kinds[key]:
            add(tag, plan.microbatches * time_s)
        add("modelled", float(use.totals[tt.STEP_EXPOSED]))
    found = plan.stages[stage]
    names, sizes = [axis.name for axis in found.axes], tuple(axis.size for axis in found.axes)
    for one in plan.estimate.collectives:
        if one.stage == stage and one.axes:
            axes = tuple(names.index(axis) for axis in one.axes)
            group = cluster.axis_group(found.num_devices, sizes, axes, found.first_device)
            kind = "all_gather" if one.kind == "ring" else one.kind
            each_s = float(cluster.collective_s(kind, one.num_bytes, group))
            times = one.count * (plan.microbatches if one.per == "microbatch" else 1)
            add(collective_tag(cluster, one.kind, one.num_bytes, group), times * each_s, one.count)
    for sent_s in (found.transfer_forward_s, found.transfer_backward_s):
        add("modelled", plan.microbatches * sent_s)
    estimate = msgspec.structs.replace(plan.estimate, provenance=counts, provenance_s=seconds)
    return msgspec.structs.replace(plan, estimate=estimate)


def _tagged_op_seconds(
    choice: BlockChoice, pricer: BlockPricer, profile: GraphProfile, cluster: Cluster
) -> list[tuple[ProvenanceTag, float]]:
    """(tag, seconds per micro-batch) of every op's forward and backward."""
    tables, mode = choice.frontier.tables, choice.frontier.objectives[choice.row].mode
    again, core_again = float(mode == "full"), float(mode == "selective")
    terms = []
    for at, node in enumerate(tables.space.ops):
        strategy = choice.strategy(at)
        row = tables.node_metrics[2 + at][strategy]
        sharded = ShardedOp(
            graph=pricer.graph,
            op=node.op,
            rule=node.rule,
            profile=profile.ops[node.op.id],
            local_batch=tables.local_batch * tables.data_ranks,
            degrees=om.label_degrees(
                node,
                (tables.strategies[at][strategy],),
                choice.mesh.inner_sizes,
                tables.space.data_axis.op_options[at],
                tables.data_ranks,
            ),
        )
        tags = op_tags(sharded, cluster.device, pricer.execution)
        inside = tables.internal_collective_s[at][strategy]  # exchanges, which the plan's collectives hold
        forward_s = float(row[om.FORWARD] + row[om.SELECTIVE_FORWARD] - inside[0])
        redone_s = again * max(float(row[om.FULL_RECOMPUTE] - inside[0]), 0.0) + core_again * float(
            row[om.SELECTIVE_FORWARD]
        )
        terms += list(zip(tags, (forward_s, float(row[om.BACKWARD] - inside[1]) + redone_s), strict=True))
    return terms
