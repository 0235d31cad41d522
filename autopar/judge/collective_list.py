"""The list of collectives of a plan: equal ones of a stage counted together, in a stable order.

Per micro-batch and stage: moves of activations forward (twice under full recomputation) and backward, exchanges inside
ops, gathers and scatters of parameters cut at rest, sends to the next and the previous stage. Per step: gradient
reductions, ZeRO-1/2's gathers, and sends of tied parameters' gradients between the stages that hold them. ``num_bytes``
is rounded to whole bytes.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from autopar.core.plan import Collective, CollectiveKind, Plan
from autopar.judge.block_price import BlockPrice
from autopar.judge.tied_parameter_price import TiedGradientTransfer
from autopar.judge.transfer_price import StageTransfer

CollectiveKey = tuple[int, Literal["microbatch", "step"], CollectiveKind, tuple[str, ...], int]


def list_collectives(
    plan: Plan,
    block_prices: list[list[BlockPrice]],
    transfers: list[tuple[StageTransfer, StageTransfer]],
    tied_transfers: Iterable[TiedGradientTransfer],
) -> tuple[Collective, ...]:
    """In order of stage; per micro-batch before per step; by kind, axes, and falling size."""
    counts: Counter[CollectiveKey] = Counter()
    for position, (stage, found) in enumerate(zip(plan.stages, block_prices, strict=True)):
        for price in found:
            for issue in price.collectives:
                axes = tuple(stage.axes[axis].name for axis in issue.collective.axes)
                counts[position, issue.per, issue.collective.kind, axes, round(issue.collective.num_bytes)] += (
                    issue.count
                )
        for send in transfers[position]:
            for size in send.sizes_bytes:
                counts[position, "microbatch", "send", (), size] += 1
    for each in tied_transfers:
        counts[each.source, "step", "send", (), each.num_bytes] += 1
    order = sorted(counts, key=lambda key: (key[0], key[1], key[2], key[3], -key[4]))
    return tuple(
        Collective(kind=kind, axes=axes, num_bytes=num_bytes, count=counts[key], per=per, stage=stage)
        for key in order
        for stage, per, kind, axes, num_bytes in (key,)
    )
