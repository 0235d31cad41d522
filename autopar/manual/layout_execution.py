"""How the program of a layout runs its ops: the execution model that a layout's keys describe."""

from typing import Literal

from autopar.core.dtypes import Dtype
from autopar.core.layout import Layout
from autopar.cost.execution_model import ExecutionModel


def layout_execution(layout: Layout, *, dtype: Dtype, optimizer: str) -> ExecutionModel:
    """The execution model of a resolved layout.

    ZeRO-3 with overlap gathers parameters ahead of their use, as PyTorch's FSDP does: its activation checkpointing stops
    recomputing early and selects by op. The program with selective recomputation is torchtitan, whose loss is
    PyTorch's; llm-foundry's, the other, is fused.
    """
    is_fsdp = layout.zero == 3 and layout.overlap
    return ExecutionModel(
        dtype=dtype,
        optimizer=optimizer,  # type: ignore[arg-type]
        attn=layout.attn,
        overlap=layout.overlap,
        fusion=layout.fusion,
        fp32_grads=layout.grads == "fp32",
        accumulates_gradients=layout.num_microbatches > 1,
        balances_causal_context=True,
        blocking_launches=layout.launch == "blocking",
        recomputes_whole_block=not is_fsdp,
        selective_policy="products" if is_fsdp else "attention",
        loss_kernels=_loss_kernels(layout, is_fsdp=is_fsdp),
    )


def _loss_kernels(layout: Layout, *, is_fsdp: bool) -> Literal["program", "chain", "torch"]:
    """Which cross entropy the layout's program runs (``ExecutionModel.loss_kernels``)."""
    if is_fsdp:
        return "torch" if layout.recompute == "selective" else "program"
    return "chain" if layout.fusion == "megatron" else "program"
