"""The times of a layout's stages: compute as priced, transfers by scatter-gather, gradients of tied parameters."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.core.layout import Layout
from autopar.inter.tied_gradients import tied_gradient_s
from autopar.manual.priced_layout import PricedStage
from autopar.manual.scatter_gather import scatter_gather_s
from autopar.pipeline.simulate import StageTimes


def layout_stage_times(
    stages: Sequence[PricedStage],
    layout: Layout,
    *,
    cluster: Cluster,
    gpus: int,
    boundary_bytes_per_sample: NDArray[np.float64],
) -> tuple[StageTimes, ...]:
    """Times of all stages in model order, seconds per micro-batch (``step_s`` once per step); ``layout`` is resolved
    and ``boundary_bytes_per_sample`` (blocks + 1,) is what crosses the boundary before each block."""
    transfers = [
        _transfer_s(
            sender,
            receiver,
            float(boundary_bytes_per_sample[sender.layout_stage.end_block]) * layout.micro_batch_size,
            cluster=cluster,
            gpus=gpus,
        )
        for sender, receiver in itertools.pairwise(stages)
    ]
    tied = tied_gradient_s(
        [stage.stage_costs.tied_gradients for stage in stages],
        [stage.span for stage in stages],
        [stage.layout_stage.first_device for stage in stages],
        [stage.price.choice for stage in stages],
    )
    return tuple(
        StageTimes(
            forward_s=stage.price.forward_s,
            backward_s=stage.price.backward_s,
            step_s=stage.price.step_s + tied[index],
            transfer_forward_s=transfers[index] if index < len(transfers) else 0.0,
            transfer_backward_s=transfers[index - 1] if index else 0.0,
        )
        for index, stage in enumerate(stages)
    )


def _transfer_s(sender: PricedStage, receiver: PricedStage, num_bytes: float, *, cluster: Cluster, gpus: int) -> float:
    """Seconds of one micro-batch's ``num_bytes`` (unsharded) from a stage to the next."""
    first, following = sender.layout_stage.first_device, receiver.layout_stage.first_device
    choice, per_node = receiver.price.choice, cluster.devices_per_node
    wraps_around = following <= first  # an interleaved chunk: from the last submesh to the first
    return scatter_gather_s(
        cluster,
        num_bytes,
        choice.mesh.sizes,
        receiver.stage_costs.frontiers.boundary_roles(choice.boundary, choice.mesh),
        senders=min(sender.layout_stage.spec.num_gpus, per_node),
        same_node=gpus <= per_node if wraps_around else following % per_node != 0,
    )
