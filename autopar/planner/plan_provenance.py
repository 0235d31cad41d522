"""How much of a plan's slowest stage is priced from measured tables: its parts counted, and their seconds, by tag.

parts      an op's forward and backward in a block, a collective, a transfer, a block's optimizer step
seconds    per step on a device of the stage, overlapped or exposed; recomputation counts in the backward that runs it
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
    """``plan`` with the provenance of its stage number ``stage``, of blocks ``block_choices``, in its estimate."""
    counts: dict[str, int] = dict.fromkeys(PROVENANCE_TAGS, 0)
    seconds: dict[str, float] = dict.fromkeys(PROVENANCE_TAGS, 0.0)

    def add(tag: ProvenanceTag, time_s: float, count: int = 1) -> None:
        """Count ``count`` parts that take ``time_s`` together."""
        if time_s > 0:
            counts[tag] += count
            seconds[tag] += time_s

    seconds_of_choice: dict[tuple[object, ...], list[tuple[ProvenanceTag, float]]] = {}
    for choice in block_choices:
        key = (choice.variant, choice.frontier_ref, choice.boundary, choice.mesh)
        if key not in seconds_of_choice:
            seconds_of_choice[key] = _tagged_op_seconds(choice, pricer, pricer.profile, cluster)
        for tag, time_s in seconds_of_choice[key]:
            add(tag, plan.microbatches * time_s)
        add("modelled", float(choice.totals[tt.STEP_EXPOSED]))
    planned = plan.stages[stage]
    names, sizes = [axis.name for axis in planned.axes], tuple(axis.size for axis in planned.axes)
    for collective in plan.estimate.collectives:
        if collective.stage == stage and collective.axes:
            axes = tuple(names.index(axis) for axis in collective.axes)
            group = cluster.axis_group(planned.num_devices, sizes, axes, planned.first_device)
            kind = "all_gather" if collective.kind == "ring" else collective.kind
            each_s = float(cluster.collective_s(kind, collective.num_bytes, group))
            times = collective.count * (plan.microbatches if collective.per == "microbatch" else 1)
            tag = collective_tag(cluster, collective.kind, collective.num_bytes, group)
            add(tag, times * each_s, collective.count)
    for transfer_s in (planned.transfer_forward_s, planned.transfer_backward_s):
        add("modelled", plan.microbatches * transfer_s)
    estimate = msgspec.structs.replace(plan.estimate, provenance=counts, provenance_s=seconds)
    return msgspec.structs.replace(plan, estimate=estimate)


def _tagged_op_seconds(
    choice: BlockChoice, pricer: BlockPricer, profile: GraphProfile, cluster: Cluster
) -> list[tuple[ProvenanceTag, float]]:
    """(tag, seconds per micro-batch) of every op's forward and of its backward, without collectives inside the op."""
    tables, mode = choice.frontier.tables, choice.frontier.objectives[choice.row].mode
    is_full, is_selective = float(mode == "full"), float(mode == "selective")
    tagged = []
    for index, node in enumerate(tables.space.ops):
        strategy = choice.strategy(index)
        row = tables.node_metrics[2 + index][strategy]
        sharded = ShardedOp(
            graph=pricer.graph,
            op=node.op,
            rule=node.rule,
            profile=profile.ops[node.op.id],
            local_batch=tables.local_batch * tables.data_ranks,
            degrees=om.label_degrees(
                node,
                (tables.strategies[index][strategy],),
                choice.mesh.inner_sizes,
                tables.space.data_axis.op_options[index],
                tables.data_ranks,
            ),
        )
        tags = op_tags(sharded, cluster.device, pricer.execution)
        collective_s = tables.internal_collective_s[index][strategy]  # counted with the plan's collectives
        forward_s = float(row[om.FORWARD] + row[om.SELECTIVE_FORWARD] - collective_s[0])
        recompute_s = is_full * max(float(row[om.FULL_RECOMPUTE] - collective_s[0]), 0.0)
        recompute_s += is_selective * float(row[om.SELECTIVE_FORWARD])
        backward_s = float(row[om.BACKWARD] - collective_s[1]) + recompute_s
        tagged += list(zip(tags, (forward_s, backward_s), strict=True))
    return tagged
