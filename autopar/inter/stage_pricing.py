"""Seconds and bytes of a stage from the totals of its blocks, with overlap applied once for the whole stage."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import BlockPricer
from autopar.inter.micro_batch_setting import MicroBatchSetting
from autopar.intra import block_totals as tt

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePricing:
    """``overlap_contention``: the fraction of the shorter of compute and communication that stays exposed when the two
    overlap (1: nothing overlaps). ``microbatch_loop_s`` and ``step_loop_s``: host seconds of the training loop outside
    the ops of a stage, per micro-batch and per step. ``budget_bytes`` per device, of which ``fixed_bytes`` are not
    tensors."""

    num_microbatches: int
    overlap_contention: float
    microbatch_loop_s: float
    step_loop_s: float
    budget_bytes: float
    fixed_bytes: float

    @staticmethod
    def of(pricer: BlockPricer, setting: MicroBatchSetting) -> "StagePricing":
        """The pricing of stages of ``pricer``'s model on its cluster. Fixed bytes are the device's context and, with
        more than one device, the buffers of two communicators, which PyTorch's allocator does not count."""
        device, software = pricer.cluster.device, pricer.execution.software
        communicators = 2 if setting.num_devices > 1 else 0
        return StagePricing(
            num_microbatches=setting.num_microbatches,
            overlap_contention=pricer.cluster.overlap_contention if pricer.execution.overlap else 1.0,
            microbatch_loop_s=software.microbatch_calls * device.launch_s,
            step_loop_s=software.step_calls * device.launch_s,
            budget_bytes=setting.budget_bytes,
            fixed_bytes=float(device.context_bytes + pricer.cluster.communication_buffer_bytes(communicators)),
        )

    @property
    def tensor_budget_bytes(self) -> float:
        """Bytes of a device's budget that tensors may use."""
        return self.budget_bytes - self.fixed_bytes

    def times_s(self, totals: Floats) -> tuple[Floats, Floats, Floats]:
        """Forward and backward seconds per micro-batch and exposed seconds per step of stage totals (..., totals).
        Gradient reductions overlap with the backward of the last micro-batch."""
        backward, reduction = totals[..., tt.BACKWARD], totals[..., tt.STEP_OVERLAPPABLE]
        exposed = np.maximum(reduction - backward, 0.0) + self.overlap_contention * np.minimum(reduction, backward)
        step = exposed + totals[..., tt.STEP_EXPOSED] + self.step_loop_s
        loop_s = self.microbatch_loop_s / 2
        return totals[..., tt.FORWARD] + loop_s, backward + loop_s, step

    def amortised_s(self, totals: Floats) -> Floats:
        """Seconds per micro-batch with its share of the step."""
        forward, backward, step = self.times_s(totals)
        return forward + backward + step / self.num_microbatches
