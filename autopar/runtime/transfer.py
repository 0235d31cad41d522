"""Sends a tensor between ranks that store it differently: a sender and a receiver exchange the elements that the one
stores and the other needs.

What a rank stores is, per dim, a list of global indices; its elements are the product of these. Ranks with equal
indices are replicas; a receiver gets elements from one of them: the one at the receiver's position, modulo their
number. So unequal meshes, strided shards and ZeRO's shards are all one case.
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
"""Increasing indices of each dim."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransferMessage:
    """One message from rank ``source`` to rank ``target``, with the positions of its elements, per dim, in the local
    tensor of either."""

    source: int
    target: int
    source_positions: DimIndices
    target_positions: DimIndices


def indices_by_rank(shape: Shape, placements: Placements, mesh: RankMesh) -> list[tuple[int, DimIndices]]:
    """(rank, the global indices it stores) of all ranks of a mesh. A partial tensor has one more dim, in front, of its
    addends."""
    partial_axes = [axis for axis, placement in enumerate(placements) if placement == PARTIAL]
    by_rank = []
    for rank in range(mesh.first_rank, mesh.first_rank + mesh.num_ranks):
        coordinate = mesh.coordinate_of(rank)
        addend = 0
        for axis in partial_axes:
            addend = addend * mesh.sizes[axis] + coordinate[axis]
        indices = global_indices(shape, placements, mesh.sizes, coordinate)
        by_rank.append((rank, (torch.tensor([addend]), *indices) if partial_axes else indices))
    return by_rank


def messages_between(
    sources: Sequence[tuple[int, DimIndices]], targets: Sequence[tuple[int, DimIndices]], rank: int
) -> list[TransferMessage]:
    """The messages that ``rank`` sends or receives, in the same order on all ranks. ``sources`` are (rank, indices it
    stores), ``targets`` (rank, indices it needs)."""
    replicas: dict[tuple[tuple[int, ...], ...], list[tuple[int, DimIndices]]] = {}
    for source, stored in sources:
        replicas.setdefault(tuple(tuple(index.tolist()) for index in stored), []).append((source, stored))
    messages = []
    for number, (target, needed) in enumerate(targets):
        for same in replicas.values():
            source, stored = same[number % len(same)]
            if rank not in (source, target):
                continue
            positions = [_common_positions(*indices) for indices in zip(stored, needed, strict=True)]
            if all(len(in_source) for in_source, _ in positions):
                messages.append(
                    TransferMessage(
                        source=source,
                        target=target,
                        source_positions=tuple(in_source for in_source, _ in positions),
                        target_positions=tuple(in_target for _, in_target in positions),
                    )
                )
    return messages


def _common_positions(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The positions, in each of two lists of increasing indices, of the indices that are in both."""
    in_second = torch.isin(first, second)
    return in_second.nonzero().view(-1), torch.isin(second, first[in_second]).nonzero().view(-1)


def gather_positions(local: Tensor, positions: DimIndices) -> Tensor:
    """The elements at these positions of each dim, as a contiguous tensor, which may share memory with ``local``."""
    for dim, index in enumerate(positions):
        if len(index) != local.shape[dim]:
            start, length = int(index[0]), len(index)
            if int(index[-1]) - start + 1 == length:
                local = local.narrow(dim, start, length)
            else:
                local = local.index_select(dim, index.to(local.device))
    return local.contiguous()


def scatter_positions(local: Tensor, positions: DimIndices, values: Tensor) -> None:
    """Write ``values`` into ``local`` at these positions of each dim."""
    if not positions:
        local.copy_(values)
        return
    last = len(positions) - 1
    broadcast = [index.to(local.device).view(-1, *[1] * (last - dim)) for dim, index in enumerate(positions)]
    local[tuple(broadcast)] = values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DirectionGroups:
    """The process groups for messages to higher (``up``) and to lower ranks; None is the world's own.

    NCCL has no tags and runs the messages of two ranks in the order in which each posts them. That order differs
    between the two for messages of different kinds (activations, gradients) or directions, so each has its own
    group."""

    up: dist.ProcessGroup | None = None
    down: dist.ProcessGroup | None = None

    def group_of(self, message: TransferMessage) -> dist.ProcessGroup | None:
        """The group by which a message is sent."""
        return self.up if message.source < message.target else self.down


def make_direction_groups(device: torch.device) -> DirectionGroups:
    """Groups for one kind of message, of tensors on ``device``, where its backend needs them. Collective over the
    world."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))  # "cpu:gloo,cuda:nccl"
    if backends.get(device.type) != "nccl":
        return DirectionGroups()
    return DirectionGroups(up=dist.new_group(), down=dist.new_group())


class TransferChannel:
    """Sends one tensor, once per micro-batch or step, from the ranks that store it to those that need it.

    ``sources`` and ``targets`` are (rank, global indices) of either; ``tag`` tells the channel's messages from others;
    ``is_partial``: local tensors are addends, and stay so. Sends do not block: a ``Mailbox`` keeps their buffers alive
    until it is flushed."""

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
        messages = messages_between(sources, targets, rank)
        self.outgoing = [message for message in messages if message.source == rank]
        self.incoming = [message for message in messages if message.target == rank]
        needed = dict(targets).get(rank)
        self.target_shape = tuple(len(index) for index in needed) if needed is not None else None

    def send(self, local: Tensor, mailbox: "Mailbox") -> None:
        """Post this rank's messages, from its local tensor."""
        local = local.unsqueeze(0) if self.is_partial else local
        for message in self.outgoing:
            buffer = gather_positions(local, message.source_positions)
            if message.target == self.rank:
                mailbox.to_self.setdefault(self.tag, []).append(buffer)
            else:
                work = dist.isend(buffer, message.target, group=self.groups.group_of(message), tag=self.tag)
                assert work is not None
                mailbox.pending.append((work, buffer))

    def receive(self, dtype: torch.dtype, device: torch.device, mailbox: "Mailbox") -> Tensor:
        """Wait for the messages to this rank; returns its local tensor."""
        assert self.target_shape is not None
        local = torch.empty(self.target_shape, dtype=dtype, device=device)
        posted = []
        for message in self.incoming:
            if message.source == self.rank:
                scatter_positions(local, message.target_positions, mailbox.to_self[self.tag].pop(0))
                continue
            buffer = torch.empty([len(index) for index in message.target_positions], dtype=dtype, device=device)
            work = dist.irecv(buffer, message.source, group=self.groups.group_of(message), tag=self.tag)
            assert work is not None
            posted.append((work, buffer, message))
        for work, buffer, message in posted:
            work.wait()
            scatter_positions(local, message.target_positions, buffer)
        return local.squeeze(0) if self.is_partial else local


class Mailbox:
    """One rank's messages that are not done: posted sends with their buffers, and messages to itself, by tag."""

    def __init__(self) -> None:
        self.pending: list[tuple[dist.Work, Tensor]] = []
        self.to_self: dict[int, list[Tensor]] = {}

    def flush(self) -> None:
        """Wait until all posted sends are done."""
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()
