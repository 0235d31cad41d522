"""The tensors that an optimizer will keep for its parameters, before its first step has created them."""

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from autopar.core.errors import UsageError


def new_optimizer_state(optimizer: torch.optim.Optimizer, master: nn.Parameter) -> dict[str, Tensor]:
    """Tensors by key, of the shapes, dtypes and devices of the state that ``optimizer`` has of ``master`` after a step.
    Their values are arbitrary: they are to be loaded into. Neither the optimizer nor the master is changed.

    A copy of the optimizer takes a step, of learning rate 0, on zeros in the master's place.
    UsageError where that fails, as it may for optimizers that do not work element by element.

    >>> sorted(new_optimizer_state(torch.optim.AdamW([nn.Parameter(torch.ones(2))]), nn.Parameter(torch.ones(3))))
    ['exp_avg', 'exp_avg_sq', 'step']
    """
    stand_in = nn.Parameter(torch.zeros_like(master))
    stand_in.grad = torch.zeros_like(stand_in)
    groups = (group for group in optimizer.param_groups if any(each is master for each in group["params"]))
    group = next(groups, optimizer.param_groups[0])
    own_step: Any = object.__new__(type(optimizer))
    own_step.__dict__.update(optimizer.__dict__)
    own_step.__dict__.pop("step", None)  # learning-rate schedulers wrap the original's
    own_step.state = defaultdict(dict)
    own_step.param_groups = [{**group, "params": [stand_in], "lr": group.get("lr", 0.0) * 0.0}]
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(own_step, hooks, OrderedDict())
    try:
        type(optimizer).step(own_step)
    except Exception as error:
        raise UsageError(
            f"{type(optimizer).__name__} cannot tell its state before its first step ({type(error).__name__}: {error}); "
            "take a step first, or use Trainer.save and Trainer.load"
        ) from error
    return {key: entry.detach() for key, entry in own_step.state[stand_in].items() if isinstance(entry, Tensor)}
