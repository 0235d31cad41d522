"""Adds the judge's verdict to a plan: its collectives, and where the time of the step goes."""

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
    """``plan`` with the judge's collectives and time breakdown in its estimate. Where the judge's prices differ from the
    plan's, or the judge cannot price the placements (CheckError), a note says so and the plan is returned all the
    same."""
    try:
        verdict = judge(plan, pricer.graph, pricer.blocks, cluster, pricer.profile, judge_context)
    except CheckError as error:
        return msgspec.structs.replace(plan, notes=(*plan.notes, f"not judged: {error}"))
    notes = plan.notes
    if first := next(iter(differences(plan, verdict)), None):
        notes = (*notes, f"the judge's price of the placements differs: {first}")
    time = time_parts_of(verdict.items)
    estimate = msgspec.structs.replace(
        plan.estimate,
        collectives=verdict.collectives,
        items=verdict.items,
        time=time,
        exposed_communication_s=time.exposed_communication_s,
    )
    return msgspec.structs.replace(plan, estimate=estimate, notes=notes)
