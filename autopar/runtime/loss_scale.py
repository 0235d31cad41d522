"""Dynamic loss scaling for fp16 (Micikevicius et al., "Mixed precision training", 2018).

Gradients are those of ``factor`` times the loss. A step in which any gradient is not finite is skipped on every rank
and halves the factor; ``interval`` steps in a row without such a step double it.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn


class LossScale:
    """The factor, the same on every rank. ``good_steps`` counts those since the last overflow; ``overflowed`` says
    whether the last step is to be skipped."""

    def __init__(self, factor: float = 2.0**16, interval: int = 2000) -> None:
        self.factor, self.interval = factor, interval
        self.good_steps = 0
        self.overflowed = False

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint stores: ``factor`` and ``good_steps``."""
        return {"factor": self.factor, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The inverse of ``state_dict``; raises KeyError, TypeError or ValueError where ``state`` is not of it."""
        self.factor, self.good_steps = float(state["factor"]), int(state["good_steps"])

    def unscale(self, masters: Sequence[nn.Parameter], device: torch.device) -> None:
        """Divide the gradients by the factor, check on all ranks that they are finite, and set the next factor.
        Collective."""
        num_infinite = torch.zeros((), device=device)
        for master in masters:
            assert master.grad is not None
            master.grad.div_(self.factor)
            num_infinite += (~master.grad.isfinite()).any()
        dist.all_reduce(num_infinite)
        self.overflowed = bool(num_infinite)
        self.good_steps = 0 if self.overflowed else self.good_steps + 1
        if self.overflowed:
            self.factor = max(self.factor / 2, 1.0)
        elif self.good_steps % self.interval == 0:
            self.factor *= 2
