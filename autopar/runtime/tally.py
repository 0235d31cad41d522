"""Counts the collectives that a rank really runs in a step, stage by stage, and holds them against the plan's list.

What runs is counted where it is dispatched: functional collectives by the group they name, with the bytes of the whole
tensor as one group sees it (a gather's output, a reduce-scatter's input), and messages between stages by their receiver.

Two lists agree when, for every stage, kind and set of axes, a step moves the same bytes in as many collectives: parameters'
collectives, which the plan lists one by one, may share a bucket, so of these only the bytes must agree.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # private; tried on torch 2.13.0

from autopar.plan.plan import Collective, CollectiveKind, Plan
from autopar.runtime.mesh import Mesh

KINDS: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
Key = tuple[int, CollectiveKind, tuple[str, ...]]
Counts = Mapping[Key, Counter[int]]
"""(stage, kind, axes) -> bytes -> how many in a step"""


class Tally(TorchDispatchMode):
    """While entered, counts the functional collectives of this rank. ``stage`` names the stage that runs."""

    def __init__(self, meshes: Mapping[int, Mesh]) -> None:
        super().__init__()
        self.meshes = dict(meshes)
        self.axes_of = {
            index: {name: axes for axes, name in mesh.groups.items()} for index, mesh in self.meshes.items()
        }
        self.stage = -1
        self.found: dict[Key, Counter[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("_c10d_functional.") and name.split(".")[1] in KINDS:
            self._count(KINDS[name.split(".")[1]], str(args[-1]), result)
        return result

    def _count(self, kind: CollectiveKind, group: str, result: Tensor) -> None:
        mesh = self.meshes[self.stage]
        axes = self.axes_of[self.stage][group]
        num_bytes = result.numel() * result.element_size() * (mesh.degree(axes) if kind == "reduce_scatter" else 1)
        self.add(self.stage, kind, tuple(mesh.names[axis] for axis in axes), num_bytes)

    def add(self, stage: int, kind: CollectiveKind, axes: tuple[str, ...], num_bytes: int) -> None:
        self.found.setdefault((stage, kind, axes), Counter())[num_bytes] += 1


def planned_counts(plan: Plan, collectives: Iterable[Collective]) -> dict[Key, Counter[int]]:
    """The plan's list, per step."""
    found: dict[Key, Counter[int]] = {}
    for each in collectives:
        times = each.count * (plan.microbatches if each.per == "microbatch" else 1)
        found.setdefault((each.stage, each.kind, each.axes), Counter())[each.num_bytes] += times
    return found
