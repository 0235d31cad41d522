"""What to say where no plan fits: what the leanest needs, what fills it, and the way out."""

import math

from autopar.core.units import GIB
from autopar.inter.stage_costs import StageCosts
from autopar.planner.smallest_budget import MemoryBottleneck, smallest_budget


def infeasible_message(
    stage_costs_by_size: list[StageCosts],
    submesh_sizes: tuple[int, ...],
    budget_bytes: float,
    gpus: int,
    *,
    has_pins: bool,
) -> str:
    """The message, from the leanest pipeline of all micro-batch sizes with stages of ``sizes`` devices."""
    found = (
        smallest_budget(book, tuple(size for size in submesh_sizes if book.frontiers.meshes(size)))
        for book in stage_costs_by_size
    )
    leanest = min((one for one in found if one is not None), key=lambda one: one.num_bytes, default=None)
    if leanest is None:
        pins = " with these pins; a mesh has one or two axes" if has_pins else ""
        return f"no pipeline of this model can be laid out on {gpus} GPUs{pins}; try another --gpus or --global-batch"
    first, end, size = leanest.stage
    blocks = leanest.stage_costs.pricer.blocks
    return (
        f"no plan fits {budget_bytes / GIB:.2f} GiB per device on {gpus} GPUs: the leanest found needs "
        f"{math.ceil(leanest.num_bytes / GIB * 100) / 100:.2f} GiB (micro-batch {leanest.stage_costs.micro_batch}, "
        f"{blocks[first].name} to {blocks[end - 1].name} on {size} GPUs; GiB: {_memory_text(leanest)}); raise --memory to "
        "that, or use more GPUs, a smaller global batch or --optimizer sgd"
    )


def _memory_text(bottleneck: MemoryBottleneck) -> str:
    parts = bottleneck.memory
    named = {
        "parameters": parts.parameters_bytes,
        "gradients": parts.gradients_bytes,
        "optimizer": parts.optimizer_bytes,
        "saved activations": parts.saved_activations_bytes,
        "workspace": parts.workspace_bytes,
        "context and buffers": parts.fixed_bytes,
    }
    return ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in named.items())
