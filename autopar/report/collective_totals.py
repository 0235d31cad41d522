"""A plan's collectives in a few lines: each kind over each axis, summed over sizes, of the stage with the most bytes."""

from collections import defaultdict
from dataclasses import dataclass

from autopar.core.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTotal:
    """``count`` collectives with ``num_bytes`` in total ``per`` micro-batch or step, of ``stage``: among the stages that
    have such collectives, the one with the most bytes."""

    kind: str
    axes: str
    per: str
    count: int
    num_bytes: int
    stage: int


def collective_totals(plan: Plan) -> tuple[CollectiveTotal, ...]:
    """The totals of each kind, axes and period, those per micro-batch first, the most bytes first.

    Two all_reduces of 8 MiB and one of 4 MiB over tp are one total of 3 collectives and 20 MiB."""
    sums: dict[tuple[str, str, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for collective in plan.estimate.collectives:
        axes_text = "*".join(collective.axes) or "stages"
        total = sums[collective.kind, axes_text, collective.per][collective.stage]
        total[0] += collective.count
        total[1] += collective.count * collective.num_bytes
    totals = []
    for (kind, axes, per), stages in sums.items():
        stage = max(stages, key=lambda position: (stages[position][1], -position))
        count, num_bytes = stages[stage]
        totals.append(CollectiveTotal(kind=kind, axes=axes, per=per, count=count, num_bytes=num_bytes, stage=stage))
    return tuple(sorted(totals, key=lambda total: (total.per, -total.num_bytes, total.kind, total.axes)))
