"""What a rank stores of the parameters between steps, and the end of a step.

Per parameter: the *weight* its ops use, in the plan's dtype (sharded by ZeRO-3); the *gradient sum* over micro-batches
(sharded by ZeRO-2 and -3); and the *master*, an fp32 ``nn.Parameter`` (sharded by ZeRO-1 to -3) that the user's
optimizer steps. Where weight and master have one dtype they share memory: the master is the rank's rows of the weight.
A step ends with:

    reduce     started while the last backward runs (``gradient_reduction``): reduce-scatter over the axes that ZeRO-1
               shards over, all-reduce over the other axes on which gradients are partial; stages with a tied parameter
               exchange their sums (``tied_parameters``)
    clip       by the norm over all parameters of all stages, each element counted once
    update     the optimizer, on the masters
    gather     the weights of ZeRO-1 and -2 from the masters
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopar.core.local_shape import chunk_bounds
from autopar.core.placement import Shard
from autopar.runtime.gradient_reduction import GradientReduction, StartedCollective, begin_weight_gathers, group_by_axes
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.shards import global_indices
from autopar.runtime.lower.stage_program import ParameterSharding, StageProgram
from autopar.runtime.transfer import DimIndices

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(slots=True, kw_only=True, eq=False)
class StoredParameter:
    """One parameter of one stage on one rank; ``names`` are the model's names of it, several where it is tied inside
    the stage. ``counts_in_norm``: this rank is the first of the replicas, whose elements enter the gradient norm."""

    sharding: ParameterSharding
    names: tuple[str, ...]
    weight: Tensor
    master: nn.Parameter
    gradient_sum: Tensor | None
    counts_in_norm: bool


def stored_indices(
    sharding: ParameterSharding, mesh: RankMesh, coordinate: Sequence[int], *, zero_sharded: bool
) -> DimIndices:
    """The global indices of each dim of a parameter that the rank at ``coordinate`` stores: of its local shard as ops
    compute with it, or, ``zero_sharded``, of the rows of that shard which ZeRO assigns to the rank."""
    indices = global_indices(sharding.shape, sharding.compute_placements, mesh.sizes, coordinate)
    if not zero_sharded or not sharding.zero_axes:
        return indices
    position = 0
    for axis in sharding.zero_axes:
        position = position * mesh.sizes[axis] + coordinate[axis]
    chunk = -(-len(indices[0]) // mesh.degree(sharding.zero_axes))
    return (indices[0][position * chunk : (position + 1) * chunk], *indices[1:])


def select_indices(full: Tensor, indices: DimIndices) -> Tensor:
    """The elements of a full tensor at these indices of each dim, as a contiguous copy."""
    for dim, index in enumerate(indices):
        if len(index) != full.shape[dim]:
            full = full.index_select(dim, index.to(full.device))
    return full.clone(memory_format=torch.contiguous_format)


class StageParameters:
    """The parameters and buffers of one stage on one rank, by value.

    Built from the model's initial tensors: ``full_tensor_of(value)`` is the full tensor of a parameter or buffer,
    ``names`` and ``dtypes`` its names in the model and its dtype in the plan. ``sums_in_weight_dtype``: gradients are
    summed over micro-batches in the weights' dtype rather than in the masters'."""

    def __init__(
        self,
        program: StageProgram,
        mesh: RankMesh,
        *,
        names: Mapping[int, tuple[str, ...]],
        full_tensor_of: Callable[[int], Tensor],
        dtypes: Mapping[int, torch.dtype],
        device: torch.device,
        sums_in_weight_dtype: bool,
    ) -> None:
        self.mesh, self.device, self.sums_in_weight_dtype = mesh, device, sums_in_weight_dtype
        self.parameters: dict[int, StoredParameter] = {}
        self.buffers: dict[int, Tensor] = {}
        self.buffer_shardings = program.buffers
        self.reduction = GradientReduction(mesh)
        for sharding in program.buffers:
            indices = stored_indices(sharding, mesh, mesh.coordinate, zero_sharded=False)
            local = select_indices(full_tensor_of(sharding.value), indices)
            self.buffers[sharding.value] = local.to(device=device, dtype=dtypes[sharding.value])
        for sharding in program.parameters:
            value = sharding.value
            self.parameters[value] = self._store(sharding, names[value], full_tensor_of(value), dtypes[value])

    def _store(
        self, sharding: ParameterSharding, names: tuple[str, ...], full: Tensor, dtype: torch.dtype
    ) -> StoredParameter:
        """This rank's weight and master of a parameter, from its full initial value; ``dtype`` is the weight's."""
        weight = self._local(full, sharding, dtype, zero_sharded=sharding.zero_stage == 3)
        master_dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        if not sharding.trained or master_dtype == dtype:
            rows = weight
            if sharding.zero_stage in (1, 2):  # of the weight's rows, those that this rank steps
                degree, position = self.mesh.degree(sharding.zero_axes), self.mesh.rank_in_group(sharding.zero_axes)
                rows = weight.narrow(0, *chunk_bounds(weight.shape[0], degree, position))
            master = nn.Parameter(rows, requires_grad=sharding.trained)
        else:
            master = nn.Parameter(self._local(full, sharding, master_dtype, zero_sharded=True))
        replicated_axes = (
            axis
            for axis, placement in enumerate(sharding.compute_placements)
            if axis not in sharding.zero_axes and not isinstance(placement, Shard)
        )
        return StoredParameter(
            sharding=sharding,
            names=names,
            weight=weight,
            master=master,
            gradient_sum=None,
            counts_in_norm=all(self.mesh.coordinate[axis] == 0 for axis in replicated_axes),
        )

    def _local(self, full: Tensor, sharding: ParameterSharding, dtype: torch.dtype, *, zero_sharded: bool) -> Tensor:
        """This rank's part of a full parameter, copied to the device."""
        indices = stored_indices(sharding, self.mesh, self.mesh.coordinate, zero_sharded=zero_sharded)
        return select_indices(full, indices).to(device=self.device, dtype=dtype)

    def trained(self) -> list[StoredParameter]:
        """The parameters that the optimizer steps, in order."""
        return [parameter for parameter in self.parameters.values() if parameter.sharding.trained]

    def add_gradient(self, value: int, gradient: Tensor, *, owns_memory: bool, complete: bool) -> None:
        """Add one addend of a parameter's gradient to the sum over micro-batches. ``owns_memory``: nobody else uses the
        addend's memory, which may become the sum's. ``complete``: it is the step's last addend, and the reduction of
        the sum starts."""
        parameter = self.parameters[value]
        if parameter.gradient_sum is None:
            dtype = gradient.dtype if self.sums_in_weight_dtype else parameter.master.dtype
            if owns_memory and gradient.dtype == dtype and gradient.is_contiguous():
                parameter.gradient_sum = gradient
            else:
                parameter.gradient_sum = gradient.to(dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            parameter.gradient_sum.add_(gradient)
        if complete:
            total, parameter.gradient_sum = parameter.gradient_sum, None
            if parameter.weight.dtype == torch.float16:  # fp16 training sums over ranks in fp16, under its loss scale
                total = total.to(torch.float16)
            self.reduction.begin(parameter.sharding, total)

    def finish_reduction(self) -> None:
        """Wait until all gradients are reduced; then ``master.grad`` is the full gradient of the master's elements."""
        for value, total in self.reduction.finish().items():
            master = self.parameters[value].master
            master.grad = total.view_as(master).to(master.dtype)

    def update_weights(self) -> None:
        """Write the masters into the weights: gathered under ZeRO-1 and -2, else copied where they do not share
        memory."""
        outdated = [  # every rank of a group gathers, also one whose rows are all of the weight
            parameter
            for parameter in self.trained()
            if _weight_gather_axes(parameter.sharding) or parameter.weight.data_ptr() != parameter.master.data_ptr()
        ]
        gathers: list[StartedCollective] = []
        with torch.no_grad():
            by_axes = group_by_axes((_weight_gather_axes(parameter.sharding), parameter) for parameter in outdated)
            for axes, parameters in by_axes.items():
                if axes:
                    pairs = [(parameter.weight, parameter.master.detach()) for parameter in parameters]
                    gathers += begin_weight_gathers(pairs, self.mesh, axes)
                else:
                    for parameter in parameters:
                        parameter.weight.copy_(parameter.master)
            for gather in gathers:
                gather.wait()


def _weight_gather_axes(sharding: ParameterSharding) -> tuple[int, ...]:
    """The axes over which a weight is gathered after the optimizer's step; ZeRO-3 gathers it when it is used."""
    return sharding.zero_axes if sharding.zero_stage in (1, 2) else ()
