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
from autopar.runtime.gradient_reduction import Reduction, Started, gather_begun, grouped
from autopar.runtime.lower.rank_mesh import Mesh
from autopar.runtime.lower.shards import global_indices
from autopar.runtime.lower.stage_program import StageParameter, StageProgram
from autopar.runtime.transfer import Channel, Held, Mailbox, make_lanes

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(slots=True, kw_only=True, eq=False)
class StoredParameter:
    """One parameter of one stage on one rank; ``names`` are the model's. ``counted``: this rank's elements count in
    norms (others hold replicas)."""

    stored: StageParameter
    names: tuple[str, ...]
    weight: Tensor
    master: nn.Parameter
    total: Tensor | None
    counted: bool


def rest_held(stored: StageParameter, mesh: Mesh, coordinate: Sequence[int], *, cut: bool) -> Held:
    """The global indices per dim that a rank holds of a parameter; ``cut``: of what ZeRO leaves it."""
    indices = global_indices(stored.shape, stored.compute, mesh.sizes, coordinate)
    if not cut or not stored.zero_axes:
        return indices
    place = 0
    for axis in stored.zero_axes:
        place = place * mesh.sizes[axis] + coordinate[axis]
    chunk = -(-len(indices[0]) // mesh.degree(stored.zero_axes))
    return (indices[0][place * chunk : (place + 1) * chunk], *indices[1:])


def pick(whole: Tensor, indices: Held) -> Tensor:
    """The elements of a whole tensor at these indices of each dim, copied."""
    for dim, index in enumerate(indices):
        if len(index) != whole.shape[dim]:
            whole = whole.index_select(dim, index.to(whole.device))
    return whole.clone(memory_format=torch.contiguous_format)


class StageParameters:
    """The parameters and buffers of one stage on one rank. ``source(value)`` is a whole tensor of the model;
    ``same_gradients``: sums of gradients are kept in the weights' dtype rather than the masters'."""

    def __init__(
        self,
        program: StageProgram,
        mesh: Mesh,
        names: Mapping[int, tuple[str, ...]],
        source: Callable[[int], Tensor],
        dtypes: Mapping[int, torch.dtype],
        device: torch.device,
        *,
        same_gradients: bool,
    ) -> None:
        self.mesh, self.device, self.same_gradients = mesh, device, same_gradients
        self.parameters: dict[int, StoredParameter] = {}
        self.buffers: dict[int, Tensor] = {}
        self.reduction = Reduction(mesh)
        for stored in program.buffers:
            part = pick(source(stored.value), rest_held(stored, mesh, mesh.coordinate, cut=False))
            self.buffers[stored.value] = part.to(device=device, dtype=dtypes[stored.value])
        for stored in program.parameters:
            self.parameters[stored.value] = self._store(stored, names[stored.value], source, dtypes[stored.value])

    def _store(
        self, stored: StageParameter, names: tuple[str, ...], source: Callable[[int], Tensor], dtype: torch.dtype
    ) -> StoredParameter:
        whole = source(stored.value)
        mine = self.mesh.coordinate
        part = pick(whole, rest_held(stored, self.mesh, mine, cut=stored.zero == 3)).to(device=self.device, dtype=dtype)
        precise = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        if not stored.trained or precise == dtype:
            rows = part
            if stored.zero in (1, 2):  # the rows that the rank steps, among those it uses
                rows = part.narrow(
                    0,
                    *chunk_bounds(part.shape[0], self.mesh.degree(stored.zero_axes), self.mesh.index(stored.zero_axes)),
                )
            master = nn.Parameter(rows, requires_grad=stored.trained)
        else:
            cut = pick(whole, rest_held(stored, self.mesh, mine, cut=True)).to(device=self.device, dtype=precise)
            master = nn.Parameter(cut)
        alone = (
            axis
            for axis, placement in enumerate(stored.compute)
            if axis not in stored.zero_axes and not isinstance(placement, Shard)
        )
        return StoredParameter(
            stored=stored,
            names=names,
            weight=part,
            master=master,
            total=None,
            counted=all(self.mesh.coordinate[axis] == 0 for axis in alone),
        )

    def trained(self) -> list[StoredParameter]:
        """Those that the optimizer steps, in order."""
        return [parameter for parameter in self.parameters.values() if parameter.stored.trained]

    def add(self, value: int, term: Tensor, *, owned: bool, complete: bool) -> None:
        """Add a term of a micro-batch's gradient; ``owned``: its memory may be kept. A gradient that is ``complete``
        for this step begins to be reduced."""
        parameter = self.parameters[value]
        if parameter.total is None:
            dtype = term.dtype if self.same_gradients else parameter.master.dtype
            if owned and term.dtype == dtype and term.is_contiguous():
                parameter.total = term
            else:
                parameter.total = term.to(dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            parameter.total.add_(term)
        if complete:
            total, parameter.total = parameter.total, None
            if parameter.weight.dtype == torch.float16:  # fp16 training sums over ranks in fp16, under its loss scale
                total = total.to(torch.float16)
            self.reduction.begin(parameter.stored, total)

    def reduce(self) -> None:
        """Wait until all gradients are reduced: ``master.grad`` is the whole gradient of what the master holds."""
        for value, total in self.reduction.finish().items():
            master = self.parameters[value].master
            master.grad = total.view_as(master).to(master.dtype)

    def gather(self) -> None:
        """Masters -> weights."""
        apart = [  # what is gathered is so by all ranks, also by one whose rows are the whole weight
            parameter
            for parameter in self.trained()
            if _gathered(parameter.stored) or parameter.weight.data_ptr() != parameter.master.data_ptr()
        ]
        begun: list[Started] = []
        with torch.no_grad():
            for axes, alike in grouped((_gathered(parameter.stored), parameter) for parameter in apart).items():
                if axes:
                    pairs = [(parameter.weight, parameter.master.detach()) for parameter in alike]
                    begun += gather_begun(pairs, self.mesh, axes)
                else:
                    for parameter in alike:
                        parameter.weight.copy_(parameter.master)
            for started in begun:
                started.finish()


def _gathered(stored: StageParameter) -> tuple[int, ...]:
    return stored.zero_axes if stored.zero in (1, 2) else ()


def tie(
    stages: Mapping[int, StageParameters], programs: Sequence[StageProgram], meshes: Sequence[Mesh], rank: int
) -> "Ties":
    """The exchanges of gradients of parameters that several stages hold."""
    holders: dict[int, list[StageProgram]] = {}
    for program in programs:
        for stored in program.parameters:
            if stored.trained:
                holders.setdefault(stored.value, []).append(program)
    lanes = make_lanes()
    ties = []
    for value, holding in sorted(holders.items()):
        layouts = {}
        for program in holding if len(holding) > 1 else ():
            stored = next(found for found in program.parameters if found.value == value)
            mesh = meshes[program.index]
            ranks = range(mesh.first_rank, mesh.first_rank + mesh.num_ranks)
            layouts[program.index] = [(r, rest_held(stored, mesh, mesh.coordinate_of(r), cut=True)) for r in ranks]
        for source in layouts:
            for target in layouts:
                if source != target:
                    ties.append((value, source, target, Channel(layouts[source], layouts[target], rank, 0, lanes)))
    return Ties(ties=ties, stages=dict(stages))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ties:
    """(value, from stage, to stage, way) of every exchange of a tied parameter's gradient."""

    ties: list[tuple[int, int, int, Channel]]
    stages: dict[int, StageParameters]

    def exchange(self, device: torch.device, received: Callable[[int, Tensor], None]) -> None:
        """Every copy's gradient becomes the sum over its stages, added in the order of stages on all of them.
        ``received`` is told of each part that came: (from which stage, the part)."""
        mailbox = Mailbox()
        for value, source, _, way in self.ties:
            if source in self.stages:
                gradient = self.stages[source].parameters[value].master.grad
                assert gradient is not None
                way.send(gradient, mailbox)
        found: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for value, source, target, way in self.ties:
            if target in self.stages:
                dtype = self.stages[target].parameters[value].master.dtype
                part = way.receive(dtype, device, mailbox)
                received(source, part)
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

    def is_first(self, value: int, stage: int) -> bool:
        """Whether a stage is the first of those that hold a parameter, whose copy counts."""
        return all(stage <= source for found, source, _, _ in self.ties if found == value)


def global_norm(stages: Mapping[int, StageParameters], ties: Ties, device: torch.device) -> Tensor:
    """The 2-norm of the gradient of the whole model, the same on every rank; collective over the world."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    for index, stage in stages.items():
        for parameter in stage.trained():
            if parameter.counted and ties.is_first(parameter.stored.value, index):
                assert parameter.master.grad is not None
                square += parameter.master.grad.double().square().sum()
    dist.all_reduce(square)
    return square.sqrt()
