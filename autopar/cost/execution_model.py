"""How the training software (Megatron-LM, torchtitan, our runtime) runs a plan, as far as prices depend on it."""

from dataclasses import dataclass
from typing import Literal

from autopar.cluster.software import FusedChain, Software, load_software
from autopar.core.dtypes import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionModel:
    """``accumulates_gradients``: gradients are summed over several micro-batches; ``fp32_grads``: they are stored in fp32,
    else in the parameter's dtype.

    ``balances_causal_context``: ranks that share a sequence take equal parts of the work under a causal mask (Megatron-LM's
    context parallelism); without it a rank computes its queries against all keys under a mask, as our runtime does.

    ``overlap``: reductions of gradients overlap with the backward, gathers of parameters with the compute of a block,
    collectives on a linear op's input gradient with the matmul that computes its weight gradient.

    ``recomputes_whole_block``: full recomputation computes the whole block a second time (Megatron-LM's and DeepSpeed's
    checkpoint); without it only what the backward reads, as torch's does, which stops at the last tensor that was saved,
    and ours.

    ``selective_policy``: what selective recomputation saves. "attention": all but attention's internal tensors, which it
    recomputes (Korthikanti et al., 2022, section 5; our runtime). "products": a block's inputs, fused attention's results,
    and those of every second matmul with a weight, beginning with the first; the rest is recomputed as far as the
    backward reads it (torchtitan's ``selective_ac_option="op"`` on torch's create_selective_checkpoint_contexts:
    torchtitan/parallelisms/parallelize_llama.py@004b3148).

    ``loss_kernels``: which cross entropy runs. "program": the software's fused kernel; over a sharded vocabulary the
    chain of kernels between its collectives. "chain": that chain always (Megatron-LM calls vocab_parallel_cross_entropy whatever tp
    is). "torch": PyTorch's own (torchtitan: ``F.cross_entropy`` of fp32 logits), which saves log-probabilities and
    allocates two gradients of that size.

    ``blocking_launches``: the host waits for every kernel before it launches the next (CUDA_LAUNCH_BLOCKING=1), so that
    launches and kernels add up instead of overlapping.

    State per parameter in bytes (Rajbhandari et al., "ZeRO", 2020, section 3.1): half precision 2 + gradient 2 or 4 +
    12 (fp32 master, two Adam moments); fp32 4 + 4 + 8. Plain SGD stores only the fp32 master of a half precision weight.
    """

    dtype: Dtype
    optimizer: Literal["adamw", "sgd"] = "adamw"
    attn: Literal["flash", "math"] = "flash"
    overlap: bool = True
    fusion: Literal["none", "megatron", "compiler"] = "megatron"
    fp32_grads: bool = True
    accumulates_gradients: bool = False
    balances_causal_context: bool = False
    blocking_launches: bool = False
    recomputes_whole_block: bool = False
    selective_policy: Literal["attention", "products"] = "attention"
    loss_kernels: Literal["program", "chain", "torch"] = "program"

    @property
    def software(self) -> Software:
        """The table of the training software that ``fusion`` names."""
        return load_software(self.fusion)

    @property
    def fused_chains(self) -> tuple[FusedChain, ...]:
        """The kinds of ops that the software fuses with their neighbours."""
        return tuple(chain for chain in self.software.fuses if chain != "loss" or self.loss_kernels != "torch")

    @property
    def backward_allocates_gradients(self) -> bool:
        """Whether gradients allocated during the backward add to its peak memory: with one micro-batch none exists at its
        start; without overlap, unreduced ones stay until its end."""
        return not (self.accumulates_gradients and self.overlap)

    def gradient_itemsize(self, itemsize: int) -> int:
        """Bytes per element of the stored gradient of a parameter of ``itemsize`` bytes."""
        return 4 if self.fp32_grads else itemsize

    def reduced_gradient_itemsize(self, itemsize: int) -> int:
        """Bytes per gradient element that ranks communicate: fp16 programs reduce in fp16 (Megatron-LM's and DeepSpeed's
        default), the others as they store it."""
        return itemsize if self.dtype == "float16" else self.gradient_itemsize(itemsize)

    def optimizer_state_itemsize(self, itemsize: int) -> int:
        """Bytes of optimizer state per element of a parameter of ``itemsize`` bytes: master copy and moments."""
        master = 4 if itemsize < 4 else 0
        return master + (8 if self.optimizer == "adamw" else 0)
