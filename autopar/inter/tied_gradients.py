"""Seconds per step for parameters that several stages store (a tied embedding): every stage gets the gradients of the
others. A rank gets its own part, the rows that ZeRO leaves it, in fp32. That takes as long as a transfer of such parts
(`stage_transfers`), after the reduction and before the optimizer.
"""

from collections.abc import Sequence

from autopar.core.local_shape import local_size
from autopar.core.placement import parse_placements
from autopar.inter.block_choice import block_choices
from autopar.inter.frontier_cache import FrontierCache
from autopar.inter.stage_choice import StageChoice
from autopar.inter.stage_span import DeviceStage
from autopar.inter.stage_transfers import are_in_one_node, part_transfer_s

MASTER_BYTES = 4
"""Bytes of an element of the optimizer's fp32 copy."""


class TiedGradients:
    """Bytes of the gradients of tied parameters; equal ones are computed once."""

    def __init__(self, frontiers: FrontierCache) -> None:
        self.pricer, self._frontiers = frontiers.pricer, frontiers
        self._bytes: dict[tuple[int, int, StageChoice], float] = {}

    def release(self) -> None:
        """Free what was computed."""
        self._bytes.clear()

    def gradient_bytes(self, stage: DeviceStage, choice: StageChoice, value: int, using_block: int) -> float:
        """Bytes of the gradient of parameter ``value`` on the rank of a stage that has most of it; ``using_block`` is
        the first block of the stage that uses it."""
        first_block, end_block, _ = stage
        key = (first_block, value, choice)
        if key not in self._bytes:
            graph, block = self.pricer.graph, self.pricer.blocks[using_block]
            in_first_of_kind = dict(
                zip(block.parameters, self.pricer.first_of_kind[block.kind].parameters, strict=True)
            )[value]
            block_choice = block_choices(self._frontiers, choice, first_block, end_block)[using_block - first_block]
            plan, tensor = block_choice.parameter_plans(graph)[in_first_of_kind], graph.values[in_first_of_kind]
            elements = local_size(tensor.shape, parse_placements(plan.optimizer), choice.mesh.named_sizes)
            self._bytes[key] = float(elements * max(tensor.itemsize, MASTER_BYTES))
        return self._bytes[key]


def tied_gradient_s(
    tied_gradients: Sequence[TiedGradients],
    stages: Sequence[DeviceStage],
    first_devices: Sequence[int],
    choices: Sequence[StageChoice],
) -> list[float]:
    """Seconds per step of each stage; all arguments have an item per stage."""
    pricer = tied_gradients[0].pricer
    times_s = [0.0] * len(stages)
    for value, users in pricer.tied_users.items():
        first_user = {
            index: next(user for user in users if first <= user < end)
            for index, (first, end, _) in enumerate(stages)
            if any(first <= user < end for user in users)
        }
        for target, user in first_user.items():
            part_bytes = tied_gradients[target].gradient_bytes(stages[target], choices[target], value, user)
            for source in first_user:
                if source != target:
                    times_s[target] += part_transfer_s(
                        pricer.cluster,
                        part_bytes,
                        stages[source][2],
                        stages[target][2],
                        same_node=are_in_one_node(pricer.cluster, first_devices, stages, (source, target)),
                    )
    return times_s
