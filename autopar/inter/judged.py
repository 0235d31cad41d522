"""A plan as it is handed out: judged, and with the judge's list of collectives in its estimate."""

import msgspec

from autopar.cluster.cluster import Cluster
from autopar.inter.blocks import Blocks
from autopar.inter.judge import differences, judge
from autopar.plan.errors import CheckError
from autopar.plan.plan import Plan


def judged(plan: Plan, blocks: Blocks, cluster: Cluster) -> Plan:
    """``plan`` with its collectives. CheckError where a searched plan's figures are not those of its placements, which is
    a bug of the planner; a manual layout that no search made says so in its notes."""
    verdict = judge(plan, blocks.graph, blocks.blocks, cluster, blocks.profile)
    found = list(differences(plan, verdict))
    notes = plan.notes
    if found and plan.search.status == "fixed":
        notes = (*notes, f"priced from its placements the layout differs: {found[0]}")
    elif found:
        raise CheckError(
            "the plan's figures are not those of its placements (a bug of autopar):\n  " + "\n  ".join(found)
        )
    estimate = msgspec.structs.replace(plan.estimate, collectives=verdict.collectives)
    return msgspec.structs.replace(plan, estimate=estimate, notes=notes)
