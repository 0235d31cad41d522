"""Seconds of collectives over the ranks of the process group, and of messages between two: a cluster's curves.

Under ``torchrun`` every rank calls these in the same order; ranks outside the measured group wait. A time is the
slowest rank's median. Bytes are those of ``CollectiveCurve``: the tensor of all_reduce, the output of all_gather, the
input of reduce_scatter, a rank's input of all_to_all.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.cluster.cluster import MEASURED_COLLECTIVES, CollectiveCurve, MeasuredCollective
from autopar.measure.kernel_times import Stopwatch

LinkProgress = Callable[[str], None]
"""Called with what is measured next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLinks:
    """Curves of collectives inside a node; bytes per second of a message between two ranks, and seconds of a small one.
    ``inter_node`` is (bytes per second of a node, seconds per hop) of an all_reduce over several nodes, None on
    one node."""

    curves: tuple[CollectiveCurve, ...]
    link_bytes_per_s: float
    link_latency_s: float
    inter_node: tuple[float, float] | None


def measure_links(
    watch: Stopwatch, sizes_bytes: tuple[int, ...], ranks_per_node: int, progress: LinkProgress
) -> MeasuredLinks:
    """Measure collectives over 2, 4, ... and all ranks of the first node, a message between two ranks, and an
    all_reduce between nodes where there are several. ``sizes_bytes`` increase. Collective over the world."""
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
            progress(f"{kind} over {count} ranks")
            times = [_collective_s(watch, kind, size, count, group) for size in sizes_bytes]
            curves.append(_monotone_curve(kind, count, sizes_bytes, times))  # type: ignore[arg-type]
    progress("point-to-point between two ranks")
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
    """The curve through these times, each replaced by the largest so far: a noisy machine may take longer for fewer
    bytes."""
    increasing = tuple(itertools.accumulate(times_s, max))
    return CollectiveCurve(kind=kind, num_ranks=num_ranks, num_bytes=sizes_bytes, time_s=increasing)


def _collective_s(watch: Stopwatch, kind: str, num_bytes: int, num_ranks: int, group: ProcessGroup | None) -> float:
    """Seconds of one collective over the first ``num_ranks`` ranks, returned on all ranks of the world."""
    seconds = torch.zeros(1, device=watch.device)
    if dist.get_rank() < num_ranks:
        numel = max(num_bytes // 4 // num_ranks, 1) * num_ranks
        full = torch.ones(numel, device=watch.device)
        part = torch.zeros(numel // num_ranks, device=watch.device)
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
    """Median seconds of a call, after the same number of calls on every rank of the group: a stopwatch that stops by
    the clock would stop ranks at different calls."""
    fixed = Stopwatch(device=watch.device, repeats=watch.repeats, min_total_s=0.0)
    dist.barrier(group=group)
    return fixed.median_s(work)


def _send_s(watch: Stopwatch, num_bytes: int) -> float:
    """Seconds of a message from rank 0 to rank 1, half of a round trip, returned on all ranks of the world."""
    seconds = torch.zeros(1, device=watch.device)
    rank = dist.get_rank()
    if rank < 2:
        data: Tensor = torch.ones(max(num_bytes // 4, 1), device=watch.device)

        def round_trip() -> None:
            if rank == 0:
                dist.send(data, 1)
                dist.recv(data, 1)
            else:
                dist.recv(data, 0)
                dist.send(data, 0)

        fixed = Stopwatch(device=watch.device, repeats=watch.repeats, min_total_s=0.0)
        seconds[0] = fixed.median_s(round_trip) / 2
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)
