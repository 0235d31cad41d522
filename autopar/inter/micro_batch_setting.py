"""What is fixed before the stages of one micro-batch size are priced."""

from dataclasses import dataclass

from autopar.inter.block_pricer import LayoutRestriction
from autopar.pipeline.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchSetting:
    """``micro_batch`` samples over all ranks of a stage, ``num_microbatches`` of them in a step; ``budget_bytes`` per
    device; ``recompute_modes`` that blocks may use; ``restriction``: what a manual layout fixes, None in a search.
    ``schedule`` is that of pipelines that are not interleaved."""

    micro_batch: int
    num_microbatches: int
    num_devices: int
    budget_bytes: float
    recompute_modes: tuple[str, ...]
    schedule: Schedule = "1f1b"
    restriction: LayoutRestriction | None = None
