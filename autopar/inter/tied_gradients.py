"""What stages pay once per step for parameters that several of them hold (a tied embedding): each gets the others'
gradients, a rank its own part, which is the rows that ZeRO leaves it, in fp32. It takes as long as a transfer of such
parts (`transfers`), after the reduction and before the optimizer.
"""

from collections.abc import Sequence

from autopar.core.local_shape import local_size
from autopar.core.placement import parse_placements
from autopar.inter.block_choice import block_choices
from autopar.inter.stage_choice import StageChoice
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_transfers import DeviceStage, are_in_one_node, part_transfer_s

MASTER_BYTES = 4
"""An element of the optimizer's copy: fp32."""


def tied_gradient_s(
    stage_costs: Sequence[StageCosts],
    stages: Sequence[DeviceStage],
    first_devices: Sequence[int],
    choices: Sequence[StageChoice],
) -> list[float]:
    """Per stage; ``books`` is of each stage, ``firsts`` its first device."""
    blocks = stage_costs[0].pricer
    found = [0.0] * len(stages)
    for value, users in blocks.tied_users.items():
        holding = {
            at: next(user for user in users if first <= user < end)
            for at, (first, end, _) in enumerate(stages)
            if any(first <= user < end for user in users)
        }
        for target, user in holding.items():
            part_bytes = _gradient_bytes(stage_costs[target], stages[target], choices[target], value, user)
            for source in holding:
                if source != target:
                    one_node = are_in_one_node(blocks.cluster, first_devices, stages, (source, target))
                    senders, receivers = stages[source][2], stages[target][2]
                    found[target] += part_transfer_s(blocks.cluster, part_bytes, senders, receivers, same_node=one_node)
    return found


def _gradient_bytes(
    stage_costs: StageCosts, stage: DeviceStage, choice: StageChoice, value: int, using_block: int
) -> float:
    """Bytes of a gradient on the fullest rank of a stage, whose first block that uses it is ``user``."""
    key = (stage[0], value, choice)
    if key not in stage_costs.tied_bytes:
        graph, block = stage_costs.pricer.graph, stage_costs.pricer.blocks[using_block]
        own = dict(zip(block.parameters, stage_costs.pricer.first_of_kind[block.kind].parameters, strict=True))[value]
        use = block_choices(stage_costs, choice, stage[0], stage[1])[using_block - stage[0]]
        planned, tensor = use.parameter_plans(graph)[own], graph.values[own]
        elements = local_size(tensor.shape, parse_placements(planned.optimizer), choice.mesh.named_sizes)
        stage_costs.tied_bytes[key] = float(elements * max(tensor.itemsize, MASTER_BYTES))
    return stage_costs.tied_bytes[key]
