"""Tensors between layouts on different ranks: every pair of ranks exchanges what both hold.

A *layout* is, per rank, the global indices it holds of each dim (the product of these is its part). Ranks with equal
indices are replicas, of which one sends to a given receiver: the one at the receiver's place, modulo their number. So
unequal meshes, strided cuts and ZeRO's shards are all one case.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.core.placement import PARTIAL, Placements
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.shards import Shape, global_indices

DimIndices = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransferMessage:
    """One message: ``taken`` are the positions, per dim, of its elements in the sender's part, ``put`` in the
    receiver's."""

    source: int
    target: int
    source_positions: DimIndices
    target_positions: DimIndices


def indices_by_rank(shape: Shape, placements: Placements, mesh: RankMesh) -> list[tuple[int, DimIndices]]:
    """(rank, what it stores) of all ranks of a mesh. Partial sums have a dim more, in front, of their addends."""
    ranks = range(mesh.first_rank, mesh.first_rank + mesh.num_ranks)
    terms = [axis for axis, placement in enumerate(placements) if placement == PARTIAL]
    found = []
    for rank in ranks:
        coordinate = mesh.coordinate_of(rank)
        term = 0
        for axis in terms:
            term = term * mesh.sizes[axis] + coordinate[axis]
        indices = global_indices(shape, placements, mesh.sizes, coordinate)
        found.append((rank, (torch.tensor([term]), *indices) if terms else indices))
    return found


def messages_between(
    sources: Sequence[tuple[int, DimIndices]], targets: Sequence[tuple[int, DimIndices]], rank: int
) -> list[TransferMessage]:
    """The messages that ``rank`` sends or receives to bring a tensor from one layout to another, in one order for
    all."""
    replicas: dict[tuple[tuple[int, ...], ...], list[tuple[int, DimIndices]]] = {}
    for source, part in sources:
        replicas.setdefault(tuple(tuple(index.tolist()) for index in part), []).append((source, part))
    found = []
    for place, (target, wanted) in enumerate(targets):
        for alike in replicas.values():
            source, part = alike[place % len(alike)]
            if rank not in (source, target):
                continue
            pairs = [_common_positions(mine, theirs) for mine, theirs in zip(part, wanted, strict=True)]
            if all(len(taken) for taken, _ in pairs):
                found.append(
                    TransferMessage(
                        source=source,
                        target=target,
                        source_positions=tuple(p[0] for p in pairs),
                        target_positions=tuple(p[1] for p in pairs),
                    )
                )
    return found


def _common_positions(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The positions in two lists of increasing indices of the indices in both."""
    in_second = torch.isin(first, second)
    return in_second.nonzero().view(-1), torch.isin(second, first[in_second]).nonzero().view(-1)


def gather_positions(local: Tensor, positions: DimIndices) -> Tensor:
    """The elements at these positions of each dim."""
    for dim, index in enumerate(positions):
        if len(index) != local.shape[dim]:
            start, length = int(index[0]), len(index)
            if int(index[-1]) - start + 1 == length:
                local = local.narrow(dim, start, length)
            else:
                local = local.index_select(dim, index.to(local.device))
    return local.contiguous()


def scatter_positions(local: Tensor, positions: DimIndices, values: Tensor) -> None:
    """Write ``part`` at these positions of each dim."""
    if not positions:
        local.copy_(values)
        return
    shaped = [index.to(local.device).view(-1, *[1] * (len(positions) - 1 - dim)) for dim, index in enumerate(positions)]
    local[tuple(shaped)] = values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DirectionGroups:
    """The process groups that messages up and down the ranks go by; None is the world's own.

    NCCL knows no tags and runs the messages of a pair of ranks in the order posted, which differs at both ends between
    activations and gradients, and between the two directions: each then has a group of its own."""

    up: dist.ProcessGroup | None = None
    down: dist.ProcessGroup | None = None

    def group_of(self, message: TransferMessage) -> dist.ProcessGroup | None:
        return self.up if message.source < message.target else self.down


def make_direction_groups() -> DirectionGroups:
    """Lanes for one sort of message; collective over the world."""
    if dist.get_backend() != "nccl":
        return DirectionGroups()
    return DirectionGroups(up=dist.new_group(), down=dist.new_group())


class TransferChannel:
    """One tensor's way between two layouts, used again and again; ``tag`` tells its messages from others', ``of_terms``
    says that it moves partial sums.

    Sends do not block: ``sent`` holds their buffers until ``Mailbox.flush``."""

    def __init__(
        self,
        sources: Sequence[tuple[int, DimIndices]],
        targets: Sequence[tuple[int, DimIndices]],
        rank: int,
        tag: int,
        groups: DirectionGroups,
        *,
        is_partial: bool = False,
    ) -> None:
        self.rank, self.tag, self.groups, self.is_partial = rank, tag, groups, is_partial
        found = messages_between(sources, targets, rank)
        self.outgoing = [route for route in found if route.source == rank]
        self.incoming = [route for route in found if route.target == rank]
        mine = dict(targets).get(rank)
        self.target_shape = tuple(len(index) for index in mine) if mine is not None else None

    def send(self, local: Tensor, mailbox: "Mailbox") -> None:
        """Post this rank's messages."""
        local = local.unsqueeze(0) if self.is_partial else local
        for route in self.outgoing:
            message = gather_positions(local, route.source_positions)
            if route.target == self.rank:
                mailbox.to_self.setdefault(self.tag, []).append(message)
            else:
                work = dist.isend(message, route.target, group=self.groups.group_of(route), tag=self.tag)
                assert work is not None
                mailbox.pending.append((work, message))

    def receive(self, dtype: torch.dtype, device: torch.device, mailbox: "Mailbox") -> Tensor:
        """Wait for this rank's part."""
        assert self.target_shape is not None
        whole = torch.empty(self.target_shape, dtype=dtype, device=device)
        works = []
        for route in self.incoming:
            if route.source == self.rank:
                scatter_positions(whole, route.target_positions, mailbox.to_self[self.tag].pop(0))
                continue
            message = torch.empty([len(index) for index in route.target_positions], dtype=dtype, device=device)
            work = dist.irecv(message, route.source, group=self.groups.group_of(route), tag=self.tag)
            assert work is not None
            works.append((work, message, route))
        for work, message, route in works:
            work.wait()
            scatter_positions(whole, route.target_positions, message)
        return whole.squeeze(0) if self.is_partial else whole


class Mailbox:
    """Messages under way of one rank: posted sends with their buffers, and messages to itself."""

    def __init__(self) -> None:
        self.pending: list[tuple[dist.Work, Tensor]] = []
        self.to_self: dict[int, list[Tensor]] = {}

    def flush(self) -> None:
        """Wait until all posted messages have left."""
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()
