"""A plan's collectives in a few lines: each kind over each axis, summed over sizes, on the stage that moves most."""

from collections import defaultdict
from dataclasses import dataclass

from autopar.core.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTotal:
    """``count`` collectives of ``num_bytes`` together per micro-batch or step, on the busiest of the stages that have
    them (``stage``)."""

    kind: str
    axes: str
    per: str
    count: int
    num_bytes: int
    stage: int


def collective_totals(plan: Plan) -> tuple[CollectiveTotal, ...]:
    """Per micro-batch before per step, by falling bytes.

    >>> # two all_reduces of 8 MiB and one of 4 MiB over tp: one line of 3 collectives, 20 MiB
    """
    sums: dict[tuple[str, str, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for one in plan.estimate.collectives:
        found = sums[one.kind, "*".join(one.axes) or "stages", one.per][one.stage]
        found[0] += one.count
        found[1] += one.count * one.num_bytes
    lines = []
    for (kind, axes, per), stages in sums.items():
        stage = max(stages, key=lambda at: (stages[at][1], -at))
        count, num_bytes = stages[stage]
        lines.append(CollectiveTotal(kind=kind, axes=axes, per=per, count=count, num_bytes=num_bytes, stage=stage))
    return tuple(sorted(lines, key=lambda line: (line.per, -line.num_bytes, line.kind, line.axes)))
