"""A plan as it is handed out: judged, and with the judge's collectives and parts of the step in its estimate."""

import msgspec

from autopar.cluster.cluster import Cluster
from autopar.core.errors import CheckError
from autopar.core.plan import Plan
from autopar.inter.block_pricer import BlockPricer
from autopar.judge.context import ModelContext
from autopar.judge.judge import differences, judge
from autopar.judge.step_items import time_parts_of


def with_judgement(
    plan: Plan, pricer: BlockPricer, cluster: Cluster, judge_context: ModelContext | None = None
) -> Plan:
    """``plan`` with its collectives and what its step is made of. A plan whose figures are not those of its placements,
    or whose placements the judge cannot follow, says so in its notes: what it cannot vouch for it does not hide, and
    does not withhold."""
    try:
        verdict = judge(plan, pricer.graph, pricer.blocks, cluster, pricer.profile, judge_context)
    except CheckError as error:
        return msgspec.structs.replace(plan, notes=(*plan.notes, f"not judged from its placements: {error}"))
    found = list(differences(plan, verdict))
    notes = plan.notes
    if found:
        notes = (*notes, f"priced from its placements the plan differs: {found[0]}")
    time = time_parts_of(verdict.items)
    estimate = msgspec.structs.replace(
        plan.estimate,
        collectives=verdict.collectives,
        items=verdict.items,
        time=time,
        exposed_communication_s=time.exposed_communication_s,
    )
    return msgspec.structs.replace(plan, estimate=estimate, notes=notes)
