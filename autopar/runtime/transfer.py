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
from autopar.runtime.lower.rank_mesh import Mesh
from autopar.runtime.lower.shards import Shape, global_indices

Held = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Route:
    """One message: ``taken`` are the positions, per dim, of its elements in the sender's part, ``put`` in the
    receiver's."""

    source: int
    target: int
    taken: Held
    put: Held


def mesh_layout(shape: Shape, placements: Placements, mesh: Mesh) -> list[tuple[int, Held]]:
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


def routes(sources: Sequence[tuple[int, Held]], targets: Sequence[tuple[int, Held]], rank: int) -> list[Route]:
    """The messages that ``rank`` sends or receives to bring a tensor from one layout to another, in one order for
    all."""
    replicas: dict[tuple[tuple[int, ...], ...], list[tuple[int, Held]]] = {}
    for source, part in sources:
        replicas.setdefault(tuple(tuple(index.tolist()) for index in part), []).append((source, part))
    found = []
    for place, (target, wanted) in enumerate(targets):
        for alike in replicas.values():
            source, part = alike[place % len(alike)]
            if rank not in (source, target):
                continue
            pairs = [_common(mine, theirs) for mine, theirs in zip(part, wanted, strict=True)]
            if all(len(taken) for taken, _ in pairs):
                found.append(
                    Route(
                        source=source, target=target, taken=tuple(p[0] for p in pairs), put=tuple(p[1] for p in pairs)
                    )
                )
    return found


def _common(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The positions in two lists of increasing indices of the indices in both."""
    in_second = torch.isin(first, second)
    return in_second.nonzero().view(-1), torch.isin(second, first[in_second]).nonzero().view(-1)


def take(part: Tensor, positions: Held) -> Tensor:
    """The elements at these positions of each dim."""
    for dim, index in enumerate(positions):
        if len(index) != part.shape[dim]:
            start, length = int(index[0]), len(index)
            if int(index[-1]) - start + 1 == length:
                part = part.narrow(dim, start, length)
            else:
                part = part.index_select(dim, index.to(part.device))
    return part.contiguous()


def put(whole: Tensor, positions: Held, part: Tensor) -> None:
    """Write ``part`` at these positions of each dim."""
    if not positions:
        whole.copy_(part)
        return
    shaped = [index.to(whole.device).view(-1, *[1] * (len(positions) - 1 - dim)) for dim, index in enumerate(positions)]
    whole[tuple(shaped)] = part


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lanes:
    """The process groups that messages up and down the ranks go by; None is the world's own.

    NCCL knows no tags and runs the messages of a pair of ranks in the order posted, which differs at both ends between
    activations and gradients, and between the two directions: each then has a group of its own."""

    up: dist.ProcessGroup | None = None
    down: dist.ProcessGroup | None = None

    def of(self, route: Route) -> dist.ProcessGroup | None:
        return self.up if route.source < route.target else self.down


def make_lanes() -> Lanes:
    """Lanes for one sort of message; collective over the world."""
    if dist.get_backend() != "nccl":
        return Lanes()
    return Lanes(up=dist.new_group(), down=dist.new_group())


class Channel:
    """One tensor's way between two layouts, used again and again; ``tag`` tells its messages from others', ``of_terms``
    says that it moves partial sums.

    Sends do not block: ``sent`` holds their buffers until ``Mailbox.flush``."""

    def __init__(
        self,
        sources: Sequence[tuple[int, Held]],
        targets: Sequence[tuple[int, Held]],
        rank: int,
        tag: int,
        lanes: Lanes,
        *,
        of_terms: bool = False,
    ) -> None:
        self.rank, self.tag, self.lanes, self.of_terms = rank, tag, lanes, of_terms
        found = routes(sources, targets, rank)
        self.outgoing = [route for route in found if route.source == rank]
        self.incoming = [route for route in found if route.target == rank]
        mine = dict(targets).get(rank)
        self.target_shape = tuple(len(index) for index in mine) if mine is not None else None

    def send(self, part: Tensor, mailbox: "Mailbox") -> None:
        """Post this rank's messages."""
        part = part.unsqueeze(0) if self.of_terms else part
        for route in self.outgoing:
            message = take(part, route.taken)
            if route.target == self.rank:
                mailbox.own.setdefault(self.tag, []).append(message)
            else:
                work = dist.isend(message, route.target, group=self.lanes.of(route), tag=self.tag)
                assert work is not None
                mailbox.pending.append((work, message))

    def receive(self, dtype: torch.dtype, device: torch.device, mailbox: "Mailbox") -> Tensor:
        """Wait for this rank's part."""
        assert self.target_shape is not None
        whole = torch.empty(self.target_shape, dtype=dtype, device=device)
        works = []
        for route in self.incoming:
            if route.source == self.rank:
                put(whole, route.put, mailbox.own[self.tag].pop(0))
                continue
            message = torch.empty([len(index) for index in route.put], dtype=dtype, device=device)
            work = dist.irecv(message, route.source, group=self.lanes.of(route), tag=self.tag)
            assert work is not None
            works.append((work, message, route))
        for work, message, route in works:
            work.wait()
            put(whole, route.put, message)
        return whole.squeeze(0) if self.of_terms else whole


class Mailbox:
    """Messages under way of one rank: posted sends with their buffers, and messages to itself."""

    def __init__(self) -> None:
        self.pending: list[tuple[dist.Work, Tensor]] = []
        self.own: dict[int, list[Tensor]] = {}

    def flush(self) -> None:
        """Wait until all posted messages have left."""
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()
