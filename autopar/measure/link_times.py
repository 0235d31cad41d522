"""Seconds of collectives among the ranks of the process group, and of sends between two: a cluster's curves.

Under ``torchrun`` every rank calls these in the same order; ranks outside the group that talks wait. A time is the
slowest rank's median. Bytes mean what ``CollectiveCurve`` says: the tensor of all_reduce, the output of all_gather, the
input of reduce_scatter, what a rank holds before all_to_all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.cluster.cluster import MEASURED_COLLECTIVES, CollectiveCurve, MeasuredCollective
from autopar.measure.kernel_times import Stopwatch

LinkProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLinks:
    """Curves inside a node, and of one message between two ranks: bytes per second, and seconds of next to no bytes.
    ``between`` is (bytes per second of a node, seconds a hop) of an all_reduce over several nodes, None on one node."""

    curves: tuple[CollectiveCurve, ...]
    link_bytes_per_s: float
    link_latency_s: float
    inter_node: tuple[float, float] | None


def measure_links(
    watch: Stopwatch, sizes_bytes: tuple[int, ...], ranks_per_node: int, progress: LinkProgress
) -> MeasuredLinks:
    """Collectives among 2, 4, ... ranks of the first node, and between nodes where there are several."""
    world = dist.get_world_size()
    counts = sorted(
        {*(2**at for at in range(1, ranks_per_node.bit_length()) if 2**at <= ranks_per_node), ranks_per_node}
    )
    curves = []
    for count in counts:
        if count < 2:
            continue
        group = dist.new_group(list(range(count)))
        for kind in MEASURED_COLLECTIVES:
            progress(f"{kind} among {count} ranks")
            times = [_collective_s(watch, kind, size, count, group) for size in sizes_bytes]
            curves.append(_monotone_curve(kind, count, sizes_bytes, times))  # type: ignore[arg-type]
    progress("sends between two ranks")
    small, large = (_send_s(watch, size) for size in (sizes_bytes[0], sizes_bytes[-1]))
    rate = (sizes_bytes[-1] - sizes_bytes[0]) / max(large - small, 1e-9)
    between = None
    if world > ranks_per_node:
        progress("all_reduce between nodes")
        nodes = world // ranks_per_node
        low, high = (
            _collective_s(watch, "all_reduce", size, world, dist.group.WORLD)
            for size in (sizes_bytes[0], sizes_bytes[-1])
        )
        factor = 2 * (nodes - 1) / nodes
        hops = 2 * max((nodes - 1).bit_length(), 1)
        between = (factor * sizes_bytes[-1] / max(high - low, 1e-9), low / hops)
    return MeasuredLinks(
        curves=tuple(curves), link_bytes_per_s=rate, link_latency_s=min(small, large), inter_node=between
    )


def _monotone_curve(
    kind: MeasuredCollective, num_ranks: int, sizes_bytes: tuple[int, ...], times_s: list[float]
) -> CollectiveCurve:
    """A noisy machine may take longer for fewer bytes: times are made to grow by taking the largest so far."""
    grown = [max(times_s[: at + 1]) for at in range(len(times_s))]
    return CollectiveCurve(kind=kind, num_ranks=num_ranks, num_bytes=sizes_bytes, time_s=tuple(grown))


def _collective_s(watch: Stopwatch, kind: str, num_bytes: int, num_ranks: int, group: ProcessGroup | None) -> float:
    """Seconds of one collective, on all ranks of the world (those outside the group get the others' time)."""
    seconds = torch.zeros(1, device=watch.device)
    if dist.get_rank() < num_ranks:
        whole = max(num_bytes // 4 // num_ranks, 1) * num_ranks
        full = torch.ones(whole, device=watch.device)
        part = torch.zeros(whole // num_ranks, device=watch.device)
        other = torch.empty_like(full)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(full, group=group),
            "all_gather": lambda: dist.all_gather_single(full, part, group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_single(part, full, group=group),
            "all_to_all": lambda: dist.all_to_all_single(other, full, group=group),
        }
        seconds[0] = _equal_count_s(watch, calls[kind], group)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def _equal_count_s(watch: Stopwatch, work: Callable[[], object], group: ProcessGroup | None) -> float:
    """Median of as many runs on every rank of the group: a watch that stops by the clock would stop them apart."""
    fixed = Stopwatch(device=watch.device, repeats=watch.repeats, min_total_s=0.0)
    dist.barrier(group=group)
    return fixed.median_s(work)


def _send_s(watch: Stopwatch, num_bytes: int) -> float:
    """Seconds from rank 0 to rank 1: half of the way there and back."""
    seconds = torch.zeros(1, device=watch.device)
    rank = dist.get_rank()
    if rank < 2:
        data: Tensor = torch.ones(max(num_bytes // 4, 1), device=watch.device)

        def there_and_back() -> None:
            if rank == 0:
                dist.send(data, 1)
                dist.recv(data, 1)
            else:
                dist.recv(data, 0)
                dist.send(data, 0)

        fixed = Stopwatch(device=watch.device, repeats=watch.repeats, min_total_s=0.0)
        seconds[0] = fixed.median_s(there_and_back) / 2
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)
