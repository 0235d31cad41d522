"""What to tell the user where no plan fits: the smallest budget found, what fills it, and the way out."""

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
    """The message for the smallest budget of all micro-batch sizes, with stages of ``submesh_sizes`` devices."""
    bottlenecks = (
        smallest_budget(costs, tuple(size for size in submesh_sizes if costs.frontiers.meshes(size)))
        for costs in stage_costs_by_size
    )
    leanest = min(
        (found for found in bottlenecks if found is not None), key=lambda found: found.num_bytes, default=None
    )
    if leanest is None:
        pins = " under these pins: a mesh has one or two axes" if has_pins else ""
        return f"no pipeline of this model can be placed on {gpus} GPUs{pins}; try another --gpus or --global-batch"
    first, end, size = leanest.stage
    blocks = leanest.stage_costs.pricer.blocks
    return (
        f"no plan fits {budget_bytes / GIB:.2f} GiB per device on {gpus} GPUs: the smallest plan found needs "
        f"{math.ceil(leanest.num_bytes / GIB * 100) / 100:.2f} GiB (micro-batch {leanest.stage_costs.micro_batch}, "
        f"{blocks[first].name} to {blocks[end - 1].name} on {size} GPUs; in GiB: {_memory_text(leanest)}); raise --memory to "
        "that, or use more GPUs, a smaller global batch or --optimizer sgd"
    )


def interleaved_infeasible_message(budget_bytes: float, gpus: int, num_blocks: int) -> str:
    """The message where only interleaved pipelines were asked for."""
    return (
        f"no interleaved pipeline fits {budget_bytes / GIB:.2f} GiB per device on {gpus} GPUs: interleaving needs stages "
        f"of equally many devices, at least two of the {num_blocks} blocks per stage, and a number of micro-batches that "
        "is a multiple of the number of stages; use --schedule auto, more --memory, or another --micro-batch"
    )


def _memory_text(bottleneck: MemoryBottleneck) -> str:
    """The parts of a stage's memory, in GiB."""
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
