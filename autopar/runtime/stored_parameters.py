"""What a rank keeps of the parameters between steps, and the step itself.

Per parameter: the *weight* its ops use, in the plan's dtype (cut by ZeRO-3), the *sum* of its gradient over
micro-batches (cut by ZeRO-2 and -3), and the *master*, an fp32 ``nn.Parameter`` cut by ZeRO-1 to -3, which the user's
optimizer steps.
Where weight and master have one dtype, the master is the rank's rows of the weight itself. A step:

    reduce     once, begun while the last backward goes on (``reduction``): reduce-scatter over the axes that ZeRO-1
               cuts, all-reduce over the others that left terms; tied parameters exchange their sums between stages
    clip       by the norm over all parameters of all stages, each element counted once
    update     the optimizer, on the masters
    gather     the weights of ZeRO-1 and -2 from the masters
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.core.local_shape import chunk_bounds
from autopar.core.placement import Shard
from autopar.runtime.gradient_reduction import GradientReduction, StartedCollective, begin_weight_gathers, group_by_axes
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.shards import global_indices
from autopar.runtime.lower.stage_program import ParameterSharding, StageProgram
from autopar.runtime.transfer import DimIndices, Mailbox, TransferChannel, make_direction_groups

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(slots=True, kw_only=True, eq=False)
class StoredParameter:
    """One parameter of one stage on one rank; ``names`` are the model's. ``counted``: this rank's elements count in
    norms (others hold replicas)."""

    sharding: ParameterSharding
    names: tuple[str, ...]
    weight: Tensor
    master: nn.Parameter
    gradient_sum: Tensor | None
    counts_in_norm: bool


def stored_indices(
    sharding: ParameterSharding, mesh: RankMesh, coordinate: Sequence[int], *, zero_sharded: bool
) -> DimIndices:
    """The global indices per dim that a rank holds of a parameter; ``cut``: of what ZeRO leaves it."""
    indices = global_indices(sharding.shape, sharding.compute_placements, mesh.sizes, coordinate)
    if not zero_sharded or not sharding.zero_axes:
        return indices
    place = 0
    for axis in sharding.zero_axes:
        place = place * mesh.sizes[axis] + coordinate[axis]
    chunk = -(-len(indices[0]) // mesh.degree(sharding.zero_axes))
    return (indices[0][place * chunk : (place + 1) * chunk], *indices[1:])


def select_indices(full: Tensor, indices: DimIndices) -> Tensor:
    """The elements of a whole tensor at these indices of each dim, copied."""
    for dim, index in enumerate(indices):
        if len(index) != full.shape[dim]:
            full = full.index_select(dim, index.to(full.device))
    return full.clone(memory_format=torch.contiguous_format)


class StageParameters:
    """The parameters and buffers of one stage on one rank. ``source(value)`` is a whole tensor of the model;
    ``same_gradients``: sums of gradients are kept in the weights' dtype rather than the masters'."""

    def __init__(
        self,
        program: StageProgram,
        mesh: RankMesh,
        names: Mapping[int, tuple[str, ...]],
        full_tensor_of: Callable[[int], Tensor],
        dtypes: Mapping[int, torch.dtype],
        device: torch.device,
        *,
        sums_in_weight_dtype: bool,
    ) -> None:
        self.mesh, self.device, self.sums_in_weight_dtype = mesh, device, sums_in_weight_dtype
        self.parameters: dict[int, StoredParameter] = {}
        self.buffers: dict[int, Tensor] = {}
        self.reduction = GradientReduction(mesh)
        for stored in program.buffers:
            part = select_indices(
                full_tensor_of(stored.value), stored_indices(stored, mesh, mesh.coordinate, zero_sharded=False)
            )
            self.buffers[stored.value] = part.to(device=device, dtype=dtypes[stored.value])
        for stored in program.parameters:
            self.parameters[stored.value] = self._store(
                stored, names[stored.value], full_tensor_of, dtypes[stored.value]
            )

    def _store(
        self,
        sharding: ParameterSharding,
        names: tuple[str, ...],
        full_tensor_of: Callable[[int], Tensor],
        dtype: torch.dtype,
    ) -> StoredParameter:
        whole = full_tensor_of(sharding.value)
        mine = self.mesh.coordinate
        part = select_indices(
            whole, stored_indices(sharding, self.mesh, mine, zero_sharded=sharding.zero_stage == 3)
        ).to(device=self.device, dtype=dtype)
        precise = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        if not sharding.trained or precise == dtype:
            rows = part
            if sharding.zero_stage in (1, 2):  # the rows that the rank steps, among those it uses
                rows = part.narrow(
                    0,
                    *chunk_bounds(
                        part.shape[0], self.mesh.degree(sharding.zero_axes), self.mesh.rank_in_group(sharding.zero_axes)
                    ),
                )
            master = nn.Parameter(rows, requires_grad=sharding.trained)
        else:
            cut = select_indices(whole, stored_indices(sharding, self.mesh, mine, zero_sharded=True)).to(
                device=self.device, dtype=precise
            )
            master = nn.Parameter(cut)
        alone = (
            axis
            for axis, placement in enumerate(sharding.compute_placements)
            if axis not in sharding.zero_axes and not isinstance(placement, Shard)
        )
        return StoredParameter(
            sharding=sharding,
            names=names,
            weight=part,
            master=master,
            gradient_sum=None,
            counts_in_norm=all(self.mesh.coordinate[axis] == 0 for axis in alone),
        )

    def trained(self) -> list[StoredParameter]:
        """Those that the optimizer steps, in order."""
        return [parameter for parameter in self.parameters.values() if parameter.sharding.trained]

    def add_gradient(self, value: int, gradient: Tensor, *, owns_memory: bool, complete: bool) -> None:
        """Add a term of a micro-batch's gradient; ``owned``: its memory may be kept. A gradient that is ``complete``
        for this step begins to be reduced."""
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
        """Wait until all gradients are reduced: ``master.grad`` is the whole gradient of what the master holds."""
        for value, total in self.reduction.finish().items():
            master = self.parameters[value].master
            master.grad = total.view_as(master).to(master.dtype)

    def update_weights(self) -> None:
        """Masters -> weights."""
        apart = [  # what is gathered is so by all ranks, also by one whose rows are the whole weight
            parameter
            for parameter in self.trained()
            if _weight_gather_axes(parameter.sharding) or parameter.weight.data_ptr() != parameter.master.data_ptr()
        ]
        begun: list[StartedCollective] = []
        with torch.no_grad():
            for axes, alike in group_by_axes(
                (_weight_gather_axes(parameter.sharding), parameter) for parameter in apart
            ).items():
                if axes:
                    pairs = [(parameter.weight, parameter.master.detach()) for parameter in alike]
                    begun += begin_weight_gathers(pairs, self.mesh, axes)
                else:
                    for parameter in alike:
                        parameter.weight.copy_(parameter.master)
            for started in begun:
                started.wait()


def _weight_gather_axes(sharding: ParameterSharding) -> tuple[int, ...]:
    return sharding.zero_axes if sharding.zero_stage in (1, 2) else ()


def connect_tied_parameters(
    stages: Mapping[int, StageParameters], programs: Sequence[StageProgram], meshes: Sequence[RankMesh], rank: int
) -> "TiedParameters":
    """The exchanges of gradients of parameters that several stages hold."""
    holders: dict[int, list[StageProgram]] = {}
    for program in programs:
        for stored in program.parameters:
            if stored.trained:
                holders.setdefault(stored.value, []).append(program)
    lanes = make_direction_groups()
    ties = []
    for value, holding in sorted(holders.items()):
        layouts = {}
        for program in holding if len(holding) > 1 else ():
            stored = next(found for found in program.parameters if found.value == value)
            mesh = meshes[program.index]
            ranks = range(mesh.first_rank, mesh.first_rank + mesh.num_ranks)
            layouts[program.index] = [
                (r, stored_indices(stored, mesh, mesh.coordinate_of(r), zero_sharded=True)) for r in ranks
            ]
        for source in layouts:
            for target in layouts:
                if source != target:
                    ties.append(
                        (value, source, target, TransferChannel(layouts[source], layouts[target], rank, 0, lanes))
                    )
    return TiedParameters(exchanges=ties, stages=dict(stages))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TiedParameters:
    """(value, from stage, to stage, way) of every exchange of a tied parameter's gradient."""

    exchanges: list[tuple[int, int, int, TransferChannel]]
    stages: dict[int, StageParameters]

    def sum_gradients(self, device: torch.device, on_received: Callable[[int, Tensor], None]) -> None:
        """Every copy's gradient becomes the sum over its stages, added in the order of stages on all of them.
        ``received`` is told of each part that came: (from which stage, the part)."""
        mailbox = Mailbox()
        for value, source, _, way in self.exchanges:
            if source in self.stages:
                gradient = self.stages[source].parameters[value].master.grad
                assert gradient is not None
                way.send(gradient, mailbox)
        found: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for value, source, target, way in self.exchanges:
            if target in self.stages:
                dtype = self.stages[target].parameters[value].master.dtype
                part = way.receive(dtype, device, mailbox)
                on_received(source, part)
                found.setdefault((value, target), []).append((source, part))
        mailbox.flush()
        for (value, target), parts in found.items():
            master = self.stages[target].parameters[value].master
            assert master.grad is not None
            terms = sorted([(target, master.grad), *parts], key=lambda part: part[0])
            total = terms[0][1].clone()
            for _, term in terms[1:]:
                total += term
            master.grad = total

    def is_first_stage(self, value: int, stage: int) -> bool:
        """Whether a stage is the first of those that hold a parameter, whose copy counts."""
        return all(stage <= source for found, source, _, _ in self.exchanges if found == value)


def global_gradient_norm(
    stages: Mapping[int, StageParameters], tied_parameters: TiedParameters, device: torch.device
) -> Tensor:
    """The 2-norm of the gradient of the whole model, the same on every rank; collective over the world."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    for index, stage in stages.items():
        for parameter in stage.trained():
            if parameter.counts_in_norm and tied_parameters.is_first_stage(parameter.sharding.value, index):
                assert parameter.master.grad is not None
                square += parameter.master.grad.double().square().sum()
    dist.all_reduce(square)
    return square.sqrt()
