"""How a parameter, its gradient and its optimizer state are stored: the choices that ZeRO offers, and their prices.

A parameter is replicated, for its op, over the data axes and over every axis that shards the op but not the weight; on
these axes its gradient is partial. Any subset G of them may shard what is stored (Rajbhandari et al., "ZeRO", 2020):

    stage 0  nothing sharded     per step: all_reduce of gradients
    stage 1  optimizer over G    per step: reduce_scatter of gradients, all_gather of parameters
    stage 2  + gradients         per micro-batch: reduce_scatter;          per step: all_gather of parameters
    stage 3  + parameters        per micro-batch: two all_gathers and a reduce_scatter
    with an all_reduce of the shards over the axes outside G, once per step (G inside a node: hybrid sharding).
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost.execution_model import ExecutionModel
from autopar.cost.redistribution_time import MeshLinks

Floats = NDArray[np.float64]
(
    GATHER_FORWARD_S,
    GATHER_BACKWARD_S,
    STEP_OVERLAPPABLE_S,
    STEP_EXPOSED_S,
    STATE_BYTES,
    GATHERED_BYTES,
    ACCUMULATE_S,
    NEW_GRADIENT_BYTES,
) = range(8)
NUM_PARAMETER_METRICS = 8
BUCKET_BYTES = 128 * 2**20
"""Programs join the tensors of a block or more into one collective, whose rate is that of so many bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterStorage:
    """One choice: ZeRO ``stage`` (0 to 3) over mesh ``axes`` (positions in the mesh; () for stage 0)."""

    stage: int
    axes: tuple[int, ...]


def storage_choices(axes: tuple[int, ...]) -> tuple[ParameterStorage, ...]:
    """All choices for a parameter replicated over ``axes``."""
    found = [ParameterStorage(stage=0, axes=())]
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            found += [ParameterStorage(stage=stage, axes=chosen) for stage in (1, 2, 3)]
    return tuple(found)


def storage_metrics(
    storage: ParameterStorage,
    axes: tuple[int, ...],
    elements: int,
    itemsize: int,
    links: MeshLinks,
    execution: ExecutionModel,
) -> Floats:
    """The eight metrics above of ``elements`` trainable elements, which is what a rank's op uses of the parameter; its
    gradient is partial over ``axes``.

    Per micro-batch: seconds of gathers before the forward, of gathers and scatters in the backward, of accumulating
    gradients. Per step: seconds that the backward can overlap, and exposed seconds. Bytes: stored (``state_bytes``),
    of the gathered parameter, of gradients that a backward allocates (``new_gradient_bytes``)."""
    shards = int(np.prod([links.sizes[axis] for axis in storage.axes], dtype=int))
    rest = tuple(axis for axis in axes if axis not in storage.axes)
    parameter, sent = float(elements * itemsize), float(elements * execution.reduced_gradient_itemsize(itemsize))
    metrics = np.zeros(NUM_PARAMETER_METRICS)
    if storage.axes:
        gather = bucketed_collective_s(links, "all_gather", parameter, storage.axes)
        scatter = bucketed_collective_s(links, "reduce_scatter", sent, storage.axes)
        if storage.stage == 3:
            metrics[GATHER_FORWARD_S] = gather
            metrics[GATHER_BACKWARD_S] = gather + scatter
            metrics[GATHERED_BYTES] = parameter if shards > 1 else 0.0  # in addition to the shard
        else:
            metrics[STEP_EXPOSED_S] += gather
            metrics[GATHER_BACKWARD_S if storage.stage == 2 else STEP_OVERLAPPABLE_S] += scatter
    if rest:
        metrics[STEP_OVERLAPPABLE_S] += bucketed_collective_s(links, "all_reduce", sent / shards, rest)
    metrics[STEP_EXPOSED_S] += float(
        links.cluster.device.memory_bound_s(elements / shards * _optimizer_step_bytes(execution, itemsize))
    )
    if execution.accumulates_gradients:  # the new gradient is read and added to the sum, every micro-batch
        added = float(elements * (itemsize + 2 * execution.gradient_itemsize(itemsize)))
        metrics[ACCUMULATE_S] = float(
            links.cluster.device.memory_bound_s(added / (shards if storage.stage >= 2 else 1))
        )
    parameters, gradients, optimizer = state_bytes(storage, shards, elements, itemsize, execution)
    metrics[STATE_BYTES] = parameters + optimizer + (gradients if execution.accumulates_gradients else 0.0)
    metrics[NEW_GRADIENT_BYTES] = new_gradient_bytes(storage, gradients, elements, itemsize, execution)
    return metrics


def new_gradient_bytes(
    storage: ParameterStorage, stored_bytes: float, elements: int, itemsize: int, execution: ExecutionModel
) -> float:
    """Bytes of gradients that a backward allocates while it frees saved tensors; ``stored_bytes`` are of the stored
    gradient. Where gradients are sharded but nothing is reduced before the backward's end, they are unsharded until then:
    Alpa's peaks of ZeRO-2 and 3 on two to eight V100."""
    if storage.stage >= 2 and not execution.overlap:
        return float(elements * itemsize)
    return 0.0 if execution.accumulates_gradients else stored_bytes


def bucketed_collective_s(links: MeshLinks, kind: str, num_bytes: float, axes: tuple[int, ...]) -> float:
    """Seconds of a parameter's share of the collective of its bucket (``BUCKET_BYTES``)."""
    return float(links.collective_s(kind, BUCKET_BYTES, axes)) * num_bytes / BUCKET_BYTES


def _optimizer_step_bytes(execution: ExecutionModel, itemsize: int) -> float:
    """Bytes that the optimizer step reads and writes per element; plain SGD has no moments."""
    software = execution.software
    num_bytes = software.optimizer_bytes_half if itemsize < 4 else software.optimizer_bytes_full
    return num_bytes - (16.0 if execution.optimizer == "sgd" else 0.0)


def state_bytes(
    storage: ParameterStorage, num_shards: int, elements: int, itemsize: int, execution: ExecutionModel
) -> tuple[float, float, float]:
    """Stored bytes of parameter, gradient and optimizer state, sharded into ``num_shards`` as the ZeRO stage says."""
    return (
        elements * itemsize / (num_shards if storage.stage == 3 else 1),
        elements * execution.gradient_itemsize(itemsize) / (num_shards if storage.stage >= 2 else 1),
        elements * execution.optimizer_state_itemsize(itemsize) / (num_shards if storage.stage >= 1 else 1),
    )
