"""What the prices of all blocks of a model depend on, whatever the mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from autopar.cost.execution_model import ExecutionModel
from autopar.cost.fusion import FusionSavings
from autopar.graph.ir import Graph, GraphProfile
from autopar.intra.recompute import SelectiveSaved

ChargedMemories: TypeAlias = Mapping[int, tuple[tuple[tuple[int, ...], bool], ...]]
"""Op id -> the memories of which the op is the first saver in the graph. Of each memory: the positions (inputs, then
outputs of the op) of the values that share it, and whether selective recomputation frees it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedModel:
    """How the ops of a graph run. ``fusion_savings`` is by op id. ``selective_saved`` is what selective recomputation
    saves by operation; None: everything but the internal and output tensors of attention."""

    profile: GraphProfile
    execution: ExecutionModel
    fusion_savings: Mapping[int, FusionSavings]
    charged_memories: ChargedMemories
    selective_saved: SelectiveSaved | None

    def first_savers(self, graph: Graph) -> dict[int, int]:
        """Storage owner (value id) of every saved memory -> id of the first op of the graph that saves it."""
        return {
            self.profile.storage_owner[(*(op := graph.ops[number]).inputs, *op.outputs)[positions[0]]]: number
            for number, memories in self.charged_memories.items()
            for positions, _ in memories
        }
