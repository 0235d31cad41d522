"""What a rank keeps of the parameters between steps, and the step itself.

Per parameter: the *weight* its ops use, in the plan's dtype (cut by ZeRO-3), the *sum* of its gradient over
micro-batches (cut by ZeRO-2 and -3), and the *master*, an fp32 ``nn.Parameter`` cut by ZeRO-1 to -3, which the user's
optimizer steps.
Where weight and master would be equal they are one tensor. A step:

    reduce     once: reduce-scatter over the axes that ZeRO-1 cuts, all-reduce over the others that left terms; tied
               parameters exchange their sums between stages; all parameters of the same axes share one collective
    clip       by the norm over all parameters of all stages, each element counted once
    update     the optimizer, on the masters
    gather     the weights of ZeRO-1 and -2 from the masters
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.runtime.layout import Cut, held
from autopar.runtime.mesh import Mesh
from autopar.runtime.move import all_gather, all_reduce, reduce_scatter
from autopar.runtime.program import StageParameter, StageProgram
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
    indices = held(stored.shape, stored.compute, mesh.sizes, coordinate)
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
        if not stored.trained or (stored.zero in (0, 3) and precise == dtype):
            master = nn.Parameter(part, requires_grad=stored.trained)
            part = master.data
        else:
            cut = pick(whole, rest_held(stored, self.mesh, mine, cut=True)).to(device=self.device, dtype=precise)
            master = nn.Parameter(cut)
        alone = (
            axis
            for axis, token in enumerate(stored.compute)
            if axis not in stored.zero_axes and not isinstance(token, Cut)
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

    def add(self, value: int, gradient: Tensor) -> None:
        """Add one micro-batch's gradient."""
        parameter = self.parameters[value]
        if parameter.total is None:
            parameter.total = gradient.to(gradient.dtype if self.same_gradients else parameter.master.dtype)
            if parameter.total is gradient:
                parameter.total = gradient.clone()
        else:
            parameter.total.add_(gradient)

    def reduce(self) -> None:
        """Sums of gradients over micro-batches -> ``master.grad``, the whole gradient of what the master holds."""
        parts: dict[int, Tensor] = {}
        for parameter in self.trained():
            assert parameter.total is not None, parameter.names
            parts[parameter.stored.value] = parameter.total
            parameter.total = None
        cut = [parameter for parameter in self.trained() if parameter.stored.zero == 1]
        for axes, alike in _grouped((parameter.stored.zero_axes, parameter) for parameter in cut).items():
            tensors = [parts[parameter.stored.value] for parameter in alike]
            for parameter, part in zip(alike, scatter_all(tensors, self.mesh, axes), strict=True):
                parts[parameter.stored.value] = part
        rest = ((self._terms(parameter.stored), parameter) for parameter in self.trained())
        for axes, alike in _grouped((axes, parameter) for axes, parameter in rest if axes).items():
            flat = torch.cat([parts[parameter.stored.value].reshape(-1) for parameter in alike])
            total = all_reduce(flat, self.mesh, axes)
            sizes = [parts[parameter.stored.value].numel() for parameter in alike]
            for parameter, part in zip(alike, total.split(sizes), strict=True):
                parts[parameter.stored.value] = part.view_as(parts[parameter.stored.value])
        for parameter in self.trained():
            parameter.master.grad = parts[parameter.stored.value].view_as(parameter.master).to(parameter.master.dtype)

    def _terms(self, stored: StageParameter) -> tuple[int, ...]:
        """Axes over which the gradient is still a term when ZeRO has cut it."""
        return tuple(
            axis
            for axis, token in enumerate(stored.gradient)
            if token == "P" and axis not in stored.zero_axes and self.mesh.sizes[axis] > 1
        )

    def gather(self) -> None:
        """Masters -> weights."""
        split = [
            parameter for parameter in self.trained() if parameter.weight.data_ptr() != parameter.master.data_ptr()
        ]
        with torch.no_grad():
            for axes, alike in _grouped((self._gathered(parameter.stored), parameter) for parameter in split).items():
                parts = [parameter.master.detach().to(parameter.weight.dtype) for parameter in alike]
                if axes:
                    parts = gather_all(parts, [parameter.weight.shape[0] for parameter in alike], self.mesh, axes)
                for parameter, part in zip(alike, parts, strict=True):
                    parameter.weight.copy_(part)

    def _gathered(self, stored: StageParameter) -> tuple[int, ...]:
        return stored.zero_axes if stored.zero in (1, 2) else ()


def _grouped(pairs: Iterable[tuple[tuple[int, ...], StoredParameter]]) -> dict[tuple[int, ...], list[StoredParameter]]:
    """Parameters by the axes they share a collective over."""
    found: dict[tuple[int, ...], list[StoredParameter]] = {}
    for axes, parameter in pairs:
        found.setdefault(axes, []).append(parameter)
    return found


def scatter_all(tensors: Sequence[Tensor], mesh: Mesh, axes: Sequence[int]) -> list[Tensor]:
    """Reduce-scatter dim 0 of every tensor in one collective."""
    degree, place = mesh.degree(axes), mesh.index(axes)
    rows = []
    for tensor in tensors:
        chunk = -(-tensor.shape[0] // degree)
        missing = tensor.new_zeros((chunk * degree - tensor.shape[0], *tensor.shape[1:]))
        rows.append(torch.cat((tensor, missing)).view(degree, -1))
    mine = reduce_scatter(torch.cat(rows, dim=1), mesh, axes) if degree > 1 else torch.cat(rows, dim=1)[0]
    found = []
    for tensor, part in zip(tensors, mine.split([row.shape[1] for row in rows]), strict=True):
        chunk = -(-tensor.shape[0] // degree)
        length = max(0, min(chunk, tensor.shape[0] - place * chunk))
        found.append(part.view(chunk, *tensor.shape[1:])[:length])
    return found


def gather_all(parts: Sequence[Tensor], extents: Sequence[int], mesh: Mesh, axes: Sequence[int]) -> list[Tensor]:
    """All-gather dim 0 of every tensor (to ``extents`` rows) in one collective: the inverse of ``scatter_all``."""
    degree = mesh.degree(axes)
    rows = []
    for part, extent in zip(parts, extents, strict=True):
        chunk = -(-extent // degree)
        rows.append(torch.cat((part, part.new_zeros((chunk - part.shape[0], *part.shape[1:])))).reshape(-1))
    gathered = all_gather(torch.cat(rows), mesh, axes)
    columns = gathered.split([row.shape[0] for row in rows], dim=1)
    return [
        column.reshape(-1, *part.shape[1:])[:extent]
        for column, part, extent in zip(columns, parts, extents, strict=True)
    ]


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

    def exchange(self, device: torch.device) -> None:
        """Every copy's gradient becomes the sum over its stages, added in the order of stages on all of them."""
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
                found.setdefault((value, target), []).append((source, way.receive(dtype, device, mailbox)))
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
