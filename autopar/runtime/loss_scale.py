"""Dynamic loss scaling for fp16 (Micikevicius et al., "Mixed precision training", 2018).

Gradients are those of ``factor`` times the loss. A step in which any is not finite is skipped on every rank and halves
the factor; ``interval`` steps without one double it.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn


class LossScale:
    """``overflowed`` tells of the last step; the same on every rank."""

    def __init__(self, factor: float = 2.0**16, interval: int = 2000) -> None:
        self.factor, self.interval = factor, interval
        self.good_steps = 0
        self.overflowed = False

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"factor": self.factor, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The inverse of ``state``."""
        self.factor, self.good_steps = float(state["factor"]), int(state["good_steps"])

    def unscale(self, masters: Sequence[nn.Parameter], device: torch.device) -> None:
        """Divide the gradients by the factor, look whether all are finite, and set the next factor; collective."""
        bad = torch.zeros((), device=device)
        for master in masters:
            assert master.grad is not None
            master.grad.div_(self.factor)
            bad += (~master.grad.isfinite()).any()
        dist.all_reduce(bad)
        self.overflowed = bool(bad)
        self.good_steps = 0 if self.overflowed else self.good_steps + 1
        if self.overflowed:
            self.factor = max(self.factor / 2, 1.0)
        elif self.good_steps % self.interval == 0:
            self.factor *= 2
