"""What the training program adds to its kernels: fusion, launches, waits, and the traffic of its loss and optimizer.

Three programs ship, named as a layout's ``fusion=`` names them: "none" (eager PyTorch), "megatron" (Megatron-LM's fused
kernels around eager PyTorch) and "compiler" (torch.compile, XLA). A block takes max(GPU time, host calls * launch
time).
"""

import functools
from typing import Literal

import msgspec

from autopar.cluster.cost_tables import software_document
from autopar.cluster.number_source import NumberSource, require_non_negative, require_sources

FusedChain = Literal["pointwise", "norm", "loss"]


class Software(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table of one training program. ``fuses``: the kinds of ops that it fuses with their neighbours.

    Host calls are counted in kernel launches. A view, which costs only Python and the dispatcher, counts ``view_calls``;
    materialised attention counts ``math_attention_*_calls`` and saves ``math_attention_bytes_per_score``. Further calls
    are ``fixed_calls`` per block and pass (hooks, checkpoints, Python between modules), ``collective_calls`` per collective
    and further rank, as ranks wait for the slowest host, ``microbatch_calls`` per micro-batch on every stage and
    ``step_calls`` per step (data, loss, synchronisation); the last two are always exposed.

    ``loss_*_bytes_per_logit``: traffic of the cross entropy alone, logits in fp32. ``optimizer_bytes_*``: traffic per
    element of the optimizer step, clipping and loss scaling included, of a half precision weight and of an fp32 one."""

    name: str
    fuses: tuple[FusedChain, ...]
    view_calls: float
    fixed_calls: float
    collective_calls: float
    microbatch_calls: float
    step_calls: float
    math_attention_forward_calls: float
    math_attention_backward_calls: float
    math_attention_bytes_per_score: float
    loss_forward_bytes_per_logit: float
    loss_backward_bytes_per_logit: float
    optimizer_bytes_half: float
    optimizer_bytes_full: float
    provenance: dict[str, NumberSource]

    def __post_init__(self) -> None:
        for key in self.__struct_fields__:
            if isinstance(getattr(self, key), float):
                require_non_negative(key, getattr(self, key))
        require_sources(self, self.provenance, ())


@functools.cache
def load_software(name: str) -> Software:
    """The shipped table of a program: "none", "megatron" or "compiler"; PlanFileError for any other name."""
    return msgspec.convert(software_document(name), Software)
