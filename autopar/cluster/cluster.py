"""Nodes of equal devices and the links between them: groups of ranks, and seconds of their collectives and transfers.

    inside a node   t = table(kind, ranks, bytes), interpolated in log-log over bytes; between measured group sizes
                    t / factor(ranks) is interpolated, factor = (r-1)/r, for all_reduce 2(r-1)/r
    across N nodes  t = max(inside, factor(N) * bytes / rate * ramp) + hops * inter_node_latency_s
                    ramp = 1 + (inter_node_ramp_bytes / bytes)^RAMP_EXPONENT: rings across nodes fill slowly
                    rate = min(node's NICs / groups_per_node, ranks_per_node * one NIC) * inter_node_efficiency
                    (NCCL pipelines its chunks through both levels, so the slower one counts; all_to_all crosses with
                    (n - ranks_per_node)/n of what each of a node's ranks stores)
    in training     * training_slowdown
    overlapped      max(compute, t) + overlap_contention * min(compute, t): they share the device's memory and cores

Checked against 2 x 8 A100 at 400 Gb/s, 2 x 8 H100 at 3200 and 4 x 8 B200 at 3200 (nccl-tests, see provenance).
"""

import hashlib
import itertools
from functools import cached_property
from typing import Literal, get_args

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from autopar.cluster.device import Device
from autopar.cluster.interpolate import Floats
from autopar.cluster.number_source import (
    NumberSource,
    require_fraction,
    require_non_negative,
    require_positive,
    require_sources,
)
from autopar.core.notebook_text import short_repr

MeasuredCollective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
MEASURED_COLLECTIVES: tuple[str, ...] = get_args(MeasuredCollective)
RAMP_EXPONENT = 0.9  # of 2 x 8 H100 from 64 MiB to 16 GiB: 43 %, 70 %, 90 % of the rate of the largest
RAMP_LIMIT_S = 1e-3  # what filling adds at most


class RankGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks of one collective: how many there are, at most on one node, on how many nodes, and how many such groups that
    cross nodes share the NICs of one node."""

    num_ranks: int
    ranks_per_node: int
    num_nodes: int
    groups_per_node: int


class CollectiveCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured seconds of one collective among ``num_ranks`` of a node by bytes: of the tensor of all_reduce, of the output
    of all_gather, of the input of reduce_scatter, of what a rank stores before all_to_all."""

    kind: MeasuredCollective
    num_ranks: int
    num_bytes: tuple[int, ...]
    time_s: tuple[float, ...]

    def __post_init__(self) -> None:
        what = f"curve of {self.kind} among {self.num_ranks}"
        if self.num_ranks < 2 or len(self.num_bytes) != len(self.time_s) or len(self.time_s) < 2:
            raise ValueError(f"{what}: needs 2 ranks, and 2 sizes with a time each")
        if self.num_bytes[0] < 1 or any(a >= b for a, b in itertools.pairwise(self.num_bytes)):
            raise ValueError(f"{what}: num_bytes must be positive and grow strictly")
        if self.time_s[0] <= 0 or any(a > b for a, b in itertools.pairwise(self.time_s)):
            raise ValueError(f"{what}: more bytes take less time")


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Devices fill nodes one after the other; the last node may be partial.

    ``inter_node_gbits_per_s`` is all NICs of a node together, one direction.

    >>> from autopar.cluster import load_cluster
    >>> load_cluster("dgx-h100").axis_group(16, (2, 8), (0,))
    RankGroup(num_ranks=2, ranks_per_node=1, num_nodes=2, groups_per_node=8)
    """

    name: str
    device: Device
    devices_per_node: int
    inter_node_gbits_per_s: float
    nics_per_node: int
    inter_node_efficiency: float
    inter_node_transfer_efficiency: float
    inter_node_latency_s: float
    inter_node_ramp_bytes: float
    link_bytes_per_s: float
    link_latency_s: float
    training_slowdown: float
    overlap_contention: float
    first_communicator_bytes: int
    next_communicator_bytes: int
    collectives: tuple[CollectiveCurve, ...]
    provenance: dict[str, NumberSource]

    def __post_init__(self) -> None:
        for key in ("devices_per_node", "inter_node_gbits_per_s", "nics_per_node", "link_bytes_per_s"):
            require_positive(key, getattr(self, key))
        for key in ("inter_node_efficiency", "inter_node_transfer_efficiency", "overlap_contention"):
            require_fraction(key, getattr(self, key))
        for key in (
            "inter_node_latency_s",
            "inter_node_ramp_bytes",
            "link_latency_s",
            "first_communicator_bytes",
            "next_communicator_bytes",
        ):
            require_non_negative(key, getattr(self, key))
        if not self.training_slowdown >= 1:
            raise ValueError(f"training_slowdown = {self.training_slowdown} is below 1")
        names = [(curve.kind, curve.num_ranks) for curve in self.collectives]
        missing = sorted(set(MEASURED_COLLECTIVES) - {kind for kind, _ in names})
        if missing or len(set(names)) < len(names):
            raise ValueError(f"{self.name}: no curve for {missing}, or two for one kind and number of ranks")
        require_sources(self, self.provenance, ("device",))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return short_repr(
            "Cluster",
            name=self.name,
            device=self.device.name,
            devices_per_node=self.devices_per_node,
            inter_node_gbits_per_s=self.inter_node_gbits_per_s,
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all numbers of the cluster and its device, as hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    @property
    def nics_bytes_per_s(self) -> float:
        """Bandwidth that all NICs of a node together sustain, one direction."""
        return self.inter_node_gbits_per_s * 1e9 / 8 * self.inter_node_efficiency

    def inter_node_bytes_per_s(self, ranks_per_node: int, groups_per_node: int) -> float:
        """Bandwidth of a node's NICs that the ranks of one group get: their share, and at most one NIC each."""
        share = self.nics_bytes_per_s / groups_per_node
        return min(share, self.nics_bytes_per_s / self.nics_per_node * ranks_per_node)

    def axis_group(
        self, num_devices: int, axis_sizes: tuple[int, ...], axes: tuple[int, ...], first_device: int = 0
    ) -> RankGroup:
        """The slowest of the groups over ``axes`` of a row-major mesh on consecutive devices from ``first_device``."""
        assert int(np.prod(axis_sizes)) == num_devices, f"mesh {axis_sizes} is not {num_devices} devices"
        num_ranks = int(np.prod([axis_sizes[axis] for axis in axes]))
        if num_ranks == 1:
            return RankGroup(num_ranks=1, ranks_per_node=1, num_nodes=1, groups_per_node=1)
        node = (np.arange(first_device, first_device + num_devices) // self.devices_per_node).reshape(axis_sizes)
        rest = [axis for axis in range(len(axis_sizes)) if axis not in axes]
        node = node.transpose(*rest, *axes).reshape(-1, num_ranks)
        node = node - first_device // self.devices_per_node
        ranks_on = np.zeros((len(node), int(node.max()) + 1), np.int64)  # of each group on each node
        np.add.at(ranks_on, (np.repeat(np.arange(len(node)), num_ranks), node.ravel()), 1)
        touches = ranks_on > 0
        num_nodes = touches.sum(axis=1)
        ranks_per_node = ranks_on.max(axis=1)
        crossing = touches[num_nodes > 1].sum(axis=0)
        sharing = (
            np.maximum(np.where(touches, crossing, 0).max(axis=1), 1) if len(crossing) else np.ones_like(num_nodes)
        )
        share = np.minimum(1.0 / sharing, ranks_per_node / self.nics_per_node)
        worst = int(np.lexsort((ranks_per_node, num_nodes, (num_nodes - 1) / num_nodes / share))[-1])
        return RankGroup(
            num_ranks=num_ranks,
            ranks_per_node=int(ranks_per_node[worst]),
            num_nodes=int(num_nodes[worst]),
            groups_per_node=int(sharing[worst]) if num_nodes[worst] > 1 else 1,
        )

    def collective_s(self, kind: str, num_bytes: ArrayLike, group: RankGroup) -> Floats:
        """Seconds of one collective; 0 for one rank or no bytes. Bytes mean what ``CollectiveCurve`` says."""
        assert kind in MEASURED_COLLECTIVES, kind
        size = np.asarray(num_bytes, float)
        if group.num_ranks == 1:
            return np.zeros_like(size)
        n, local, nodes = group.num_ranks, group.ranks_per_node, group.num_nodes
        inside = self._intra_node_s(kind, size * (local / n if kind == "all_to_all" else 1.0), local)
        if nodes > 1:
            rate = self.inter_node_bytes_per_s(local, group.groups_per_node)
            crossing = size * local * (n - local) / n if kind == "all_to_all" else size * _traffic_factor(kind, nodes)
            # all_reduce goes up and down a tree; the others go round a ring of all nodes
            hops = 2 * np.ceil(np.log2(nodes)) if kind == "all_reduce" else nodes - 1
            ramp = 1 + (self.inter_node_ramp_bytes / np.maximum(size, 1.0)) ** RAMP_EXPONENT
            inside = (
                np.maximum(inside, np.minimum(crossing / rate * ramp, crossing / rate + RAMP_LIMIT_S))
                + hops * self.inter_node_latency_s
            )
        return np.asarray(np.where(size > 0, inside * self.training_slowdown, 0.0), float)

    def transfer_s(self, num_bytes: ArrayLike, *, same_node: bool, num_senders: int = 1) -> Floats:
        """Seconds from one device to another; ``num_senders`` devices of the node send at once over its NICs."""
        size = np.asarray(num_bytes, float)
        ratio = self.inter_node_transfer_efficiency / self.inter_node_efficiency
        rate = self.link_bytes_per_s if same_node else ratio * self.inter_node_bytes_per_s(1, num_senders)
        latency_s = self.link_latency_s if same_node else self.inter_node_latency_s
        return np.asarray(np.where(size > 0, (latency_s + size / rate) * self.training_slowdown, 0.0), float)

    def communication_buffer_bytes(self, num_groups: int) -> int:
        """Bytes that the communication library allocates on a device that belongs to ``num_groups`` groups."""
        return self.first_communicator_bytes + (num_groups - 1) * self.next_communicator_bytes if num_groups else 0

    @cached_property
    def _curves(self) -> dict[str, tuple[tuple[int, Floats, Floats], ...]]:
        """kind -> (ranks, log bytes, log seconds) by ranks."""
        found: dict[str, list[tuple[int, Floats, Floats]]] = {kind: [] for kind in MEASURED_COLLECTIVES}
        for curve in sorted(self.collectives, key=lambda curve: curve.num_ranks):
            found[curve.kind].append((curve.num_ranks, np.log(curve.num_bytes), np.log(curve.time_s)))
        return {kind: tuple(curves) for kind, curves in found.items()}

    def _intra_node_s(self, kind: str, size: Floats, num_ranks: int) -> Floats:
        """Seconds of a collective of ``size`` bytes inside a node, without ``training_slowdown``."""
        if num_ranks == 1:
            return np.zeros_like(size)
        curves = self._curves[kind]
        above = next((i for i, curve in enumerate(curves) if curve[0] >= num_ranks), len(curves) - 1)
        high = curves[above]
        low = curves[above - 1] if above and high[0] > num_ranks else high
        weight = (num_ranks - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 1.0
        low_s, high_s = (_curve_s(curve, size) / _traffic_factor(kind, curve[0]) for curve in (low, high))
        return np.asarray(((1 - weight) * low_s + weight * high_s) * _traffic_factor(kind, num_ranks), float)


def _traffic_factor(kind: str, num_parts: int) -> float:
    """Bytes over each of ``num_parts`` links per byte of the collective, in the algorithm of least traffic."""
    return (2.0 if kind == "all_reduce" else 1.0) * (num_parts - 1) / num_parts


def _curve_s(curve: tuple[int, Floats, Floats], size: Floats) -> Floats:
    """Seconds at ``size`` bytes: the shortest time below the curve's sizes, the rate of its largest beyond them."""
    _, log_bytes, log_s = curve
    point = np.log(np.maximum(size, 1.0))
    return np.asarray(np.exp(np.interp(point, log_bytes, log_s) + np.maximum(point - log_bytes[-1], 0.0)), float)
