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
from autopar.runtime.lower.rank_mesh import Mesh

KINDS: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
Key = tuple[int, CollectiveKind, tuple[str, ...]]
Counts = Mapping[Key, Counter[int]]
"""(stage, kind, axes) -> bytes -> how many in a step"""


class Tally(TorchDispatchMode):
    """While entered, counts the functional collectives of this rank. ``stage`` names the stage that runs, ``meshes``
    are those of the rank's stages. ``widened``: fp64 stands for fp32, and its bytes are counted as those."""

    def __init__(self, meshes: Mapping[int, Mesh], *, widened: bool = False) -> None:
        super().__init__()
        self.widened = widened
        self.meshes = dict(meshes)
        self.axes_of = {
            index: {name: axes for axes, name in mesh.groups.items()} for index, mesh in self.meshes.items()
        }
        self.stage = -1
        self.found: dict[Key, Counter[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        kind = KINDS.get(name.split(".")[1]) if name.startswith("_c10d_functional.") else None
        if kind is not None:
            mesh, axes = self.meshes[self.stage], self.axes_of[self.stage][str(args[-1])]
            num_bytes = self._bytes(result) * (mesh.degree(axes) if kind == "reduce_scatter" else 1)
            self._add(self.stage, kind, tuple(mesh.names[axis] for axis in axes), num_bytes)
        return result

    def received(self, sender: int, part: Tensor) -> None:
        """Count what this rank received of a tensor that stage ``sender`` sent."""
        self._add(sender, "send", (), self._bytes(part))

    def _add(self, stage: int, kind: CollectiveKind, axes: tuple[str, ...], num_bytes: int) -> None:
        self.found.setdefault((stage, kind, axes), Counter())[num_bytes] += 1

    def _bytes(self, tensor: Tensor) -> int:
        narrow = self.widened and tensor.dtype == torch.float64
        return tensor.numel() * (torch.float32.itemsize if narrow else tensor.element_size())


def of_all_ranks(found: Sequence[Counts], plan: Plan) -> dict[Key, Counter[int]]:
    """What the first rank of each stage, which holds the largest parts, ran; ``found`` is by rank."""
    joined: dict[Key, Counter[int]] = {}
    for rank, counts in enumerate(found):
        here = [stage for stage in plan.stages if stage.first_device == rank]
        if not here:
            continue
        for (stage, kind, axes), sizes in counts.items():
            joined[stage, kind, axes] = joined.get((stage, kind, axes), Counter()) + sizes
    return joined


def differences(ran: Counts, plan: Plan, collectives: Iterable[Collective]) -> tuple[str, ...]:
    """Where what ran in a step is not what is listed: one line per stage, kind and axes."""
    exact: dict[Key, Counter[int]] = {}
    bucketed: dict[Key, int] = {}
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
            f"stage {stage}: {kind}{over}: the plan lists {listed} bytes a step, {moved} ran{_sizes(missing, rest)}"
        )
    return tuple(lines)


def _sizes(missing: Counter[int], rest: Counter[int]) -> str:
    parts = [
        f"{what} {', '.join(f'{count} of {size}' for size, count in sorted(sizes.items())[:4])}"
        for what, sizes in (("lacking", missing), ("beyond the listed per micro-batch", rest))
        if sizes
    ]
    return f" ({'; '.join(parts)})" if parts else ""
