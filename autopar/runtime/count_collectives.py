"""Counts the collectives that a rank really runs in a step, stage by stage, and holds them against the plan's list.

What runs is counted where it is dispatched: functional collectives by the group they name, with the bytes of the whole
tensor as one group sees it (a gather's output, a reduce-scatter's input), and messages between stages by their
receiver.

For every stage, kind and set of axes, a step must move as many collectives of each size as the plan lists. What the
plan lists once per step, parameter by parameter, runs in a bucket that all share: of these the bytes must agree.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # private; tried on torch 2.13.0

from autopar.core.plan import Collective, CollectiveKind, Plan
from autopar.runtime.lower.rank_mesh import RankMesh

KINDS_BY_OP: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
CollectiveKey = tuple[int, CollectiveKind, tuple[str, ...]]
CollectiveCounts = Mapping[CollectiveKey, Counter[int]]
"""(stage, kind, axes) -> bytes -> how many in a step"""


class CollectiveCounter(TorchDispatchMode):
    """While entered, counts the functional collectives of this rank. ``stage`` names the stage that runs, ``meshes``
    are those of the rank's stages. ``widened``: fp64 stands for fp32, and its bytes are counted as those."""

    def __init__(self, meshes: Mapping[int, RankMesh], *, fp64_as_fp32: bool = False) -> None:
        super().__init__()
        self.fp64_as_fp32 = fp64_as_fp32
        self.meshes = dict(meshes)
        self.axes_of_group = {
            index: {name: axes for axes, name in mesh.group_names.items()} for index, mesh in self.meshes.items()
        }
        self.current_stage = -1
        self.counts: dict[CollectiveKey, Counter[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        kind = KINDS_BY_OP.get(name.split(".")[1]) if name.startswith("_c10d_functional.") else None
        if kind is not None:
            mesh, axes = self.meshes[self.current_stage], self.axes_of_group[self.current_stage][str(args[-1])]
            num_bytes = self._num_bytes(result) * (mesh.degree(axes) if kind == "reduce_scatter" else 1)
            self._add(self.current_stage, kind, tuple(mesh.names[axis] for axis in axes), num_bytes)
        return result

    def count_received(self, sender: int, tensor: Tensor) -> None:
        """Count what this rank received of a tensor that stage ``sender`` sent."""
        self._add(sender, "send", (), self._num_bytes(tensor))

    def _add(self, stage: int, kind: CollectiveKind, axes: tuple[str, ...], num_bytes: int) -> None:
        self.counts.setdefault((stage, kind, axes), Counter())[num_bytes] += 1

    def _num_bytes(self, tensor: Tensor) -> int:
        narrow = self.fp64_as_fp32 and tensor.dtype == torch.float64
        return tensor.numel() * (torch.float32.itemsize if narrow else tensor.element_size())


def counts_of_stages(counts_by_rank: Sequence[CollectiveCounts], plan: Plan) -> dict[CollectiveKey, Counter[int]]:
    """What the first rank of each stage, which holds the largest parts, ran; ``found`` is by rank."""
    joined: dict[CollectiveKey, Counter[int]] = {}
    for rank, counts in enumerate(counts_by_rank):
        here = [stage for stage in plan.stages if stage.first_device == rank]
        if not here:
            continue
        for (stage, kind, axes), sizes in counts.items():
            joined[stage, kind, axes] = joined.get((stage, kind, axes), Counter()) + sizes
    return joined


def collective_differences(ran: CollectiveCounts, plan: Plan, collectives: Iterable[Collective]) -> tuple[str, ...]:
    """Where what ran in a step is not what is listed: one line per stage, kind and axes."""
    exact: dict[CollectiveKey, Counter[int]] = {}
    bucketed: dict[CollectiveKey, int] = {}
    for each in collectives:
        key = (each.stage, each.kind, each.axes)
        if each.per == "microbatch":
            exact.setdefault(key, Counter())[each.num_bytes] += each.count * plan.microbatches
        else:
            bucketed[key] = bucketed.get(key, 0) + each.count * each.num_bytes
    lines = []
    for key in sorted({*exact, *bucketed, *ran}):
        wanted, sizes = exact.get(key, Counter()), ran.get(key, Counter())
        missing, rest = wanted - sizes, sizes - wanted
        beyond = sum(size * count for size, count in rest.items())
        if not missing and beyond == bucketed.get(key, 0):
            continue
        stage, kind, axes = key
        over = f" over {'*'.join(axes)}" if axes else ""
        listed = sum(size * count for size, count in wanted.items()) + bucketed.get(key, 0)
        moved = sum(size * count for size, count in sizes.items())
        lines.append(
            f"stage {stage}: {kind}{over}: the plan lists {listed} bytes a step, {moved} ran{_sizes_text(missing, rest)}"
        )
    return tuple(lines)


def _sizes_text(missing: Counter[int], extra: Counter[int]) -> str:
    parts = [
        f"{what} {', '.join(f'{count} of {size}' for size, count in sorted(sizes.items())[:4])}"
        for what, sizes in (("lacking", missing), ("beyond the listed per micro-batch", extra))
        if sizes
    ]
    return f" ({'; '.join(parts)})" if parts else ""
