"""The list of collectives of a plan: equal ones of a stage counted together, in a stable order.

Per micro-batch and stage: redistributions of activations forward and backward (those that ``recomputed_ops`` names twice),
collectives inside ops, ZeRO's gathers and scatters, sends to the next and the previous stage. Per step: gradient
reductions, ZeRO-1/2's gathers, and sends of tied parameters' gradients between the stages that store them. ``num_bytes``
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
"""(stage, per, kind, names of the axes, bytes)."""


def list_collectives(
    plan: Plan,
    block_prices: list[list[BlockPrice]],
    transfers: list[tuple[StageTransfer, StageTransfer]],
    tied_transfers: Iterable[TiedGradientTransfer],
) -> tuple[Collective, ...]:
    """All collectives of a step: by stage, per micro-batch before per step, by kind, axes, and falling size."""
    counts: Counter[CollectiveKey] = Counter()
    for position, (stage, prices) in enumerate(zip(plan.stages, block_prices, strict=True)):
        for price in prices:
            for issue in price.collectives:
                axes = tuple(stage.axes[axis].name for axis in issue.collective.axes)
                counts[position, issue.per, issue.collective.kind, axes, round(issue.collective.num_bytes)] += (
                    issue.count
                )
        for transfer in transfers[position]:
            for size in transfer.sizes_bytes:
                counts[position, "microbatch", "send", (), size] += 1
    for tied in tied_transfers:
        counts[tied.source, "step", "send", (), tied.num_bytes] += 1
    order = sorted(counts, key=lambda key: (key[0], key[1], key[2], key[3], -key[4]))
    return tuple(
        Collective(kind=kind, axes=axes, num_bytes=num_bytes, count=counts[key], per=per, stage=stage)
        for key in order
        for stage, per, kind, axes, num_bytes in (key,)
    )
