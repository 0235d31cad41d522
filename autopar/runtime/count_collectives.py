"""Counts the collectives that a rank runs in a step, stage by stage, and compares them with the plan's list.

Functional collectives are counted where they are dispatched, by the group they name, with the bytes of the group's full
tensor (an all-gather's output, a reduce-scatter's input); tensors sent between stages are counted by their receiver.

For every stage, kind and set of axes, a step must run as many collectives of each size as the plan lists per
micro-batch. What the plan lists once per step, parameter by parameter, runs in shared buckets: of it the total bytes
must agree.
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
"""(stage, kind, axes) -> bytes -> number per step"""


class CollectiveCounter(TorchDispatchMode):
    """While entered, counts the functional collectives of this rank as those of ``current_stage``, which its user sets.

    ``meshes`` are those of the rank's stages, by index. ``fp64_as_fp32``: fp64 tensors are counted with the bytes of
    fp32. The result is in ``counts``."""

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
        """Count this rank's part of a tensor that it received from stage ``sender``."""
        self._add(sender, "send", (), self._num_bytes(tensor))

    def _add(self, stage: int, kind: CollectiveKind, axes: tuple[str, ...], num_bytes: int) -> None:
        self.counts.setdefault((stage, kind, axes), Counter())[num_bytes] += 1

    def _num_bytes(self, tensor: Tensor) -> int:
        as_fp32 = self.fp64_as_fp32 and tensor.dtype == torch.float64
        return tensor.numel() * (torch.float32.itemsize if as_fp32 else tensor.element_size())


def counts_of_stages(counts_by_rank: Sequence[CollectiveCounts], plan: Plan) -> dict[CollectiveKey, Counter[int]]:
    """What the first rank of each stage ran, whose shards are the largest."""
    joined: dict[CollectiveKey, Counter[int]] = {}
    for rank, counts in enumerate(counts_by_rank):
        if not any(stage.first_device == rank for stage in plan.stages):
            continue
        for (stage, kind, axes), sizes in counts.items():
            joined[stage, kind, axes] = joined.get((stage, kind, axes), Counter()) + sizes
    return joined


def collective_differences(ran: CollectiveCounts, plan: Plan, collectives: Iterable[Collective]) -> tuple[str, ...]:
    """Where the collectives that ran in a step are not those listed: one line per stage, kind and axes."""
    listed: dict[CollectiveKey, Counter[int]] = {}
    bucketed_bytes: dict[CollectiveKey, int] = {}
    for each in collectives:
        key = (each.stage, each.kind, each.axes)
        if each.per == "microbatch":
            listed.setdefault(key, Counter())[each.num_bytes] += each.count * plan.microbatches
        else:
            bucketed_bytes[key] = bucketed_bytes.get(key, 0) + each.count * each.num_bytes
    lines = []
    for key in sorted({*listed, *bucketed_bytes, *ran}):
        listed_sizes, ran_sizes = listed.get(key, Counter()), ran.get(key, Counter())
        missing, extra = listed_sizes - ran_sizes, ran_sizes - listed_sizes
        if not missing and _total_bytes(extra) == bucketed_bytes.get(key, 0):
            continue
        stage, kind, axes = key
        over = f" over {'*'.join(axes)}" if axes else ""
        lines.append(
            f"stage {stage}: {kind}{over}: the plan lists {_total_bytes(listed_sizes) + bucketed_bytes.get(key, 0)} "
            f"bytes per step, {_total_bytes(ran_sizes)} were communicated{_sizes_text(missing, extra)}"
        )
    return tuple(lines)


def _total_bytes(sizes: Counter[int]) -> int:
    return sum(num_bytes * count for num_bytes, count in sizes.items())


def _sizes_text(missing: Counter[int], extra: Counter[int]) -> str:
    """The first sizes that did not run, and those that ran but are not listed per micro-batch, in brackets."""
    parts = [
        f"{what}: {', '.join(f'{count} of {size}' for size, count in sorted(sizes.items())[:4])}"
        for what, sizes in (("missing", missing), ("not listed per micro-batch", extra))
        if sizes
    ]
    return f" ({'; '.join(parts)})" if parts else ""
