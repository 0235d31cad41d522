"""What stages pay once per step for parameters that several of them hold (a tied embedding): each gets the others'
gradients, a rank its own part, which is the rows that ZeRO leaves it, in fp32. It takes as long as a transfer of such
parts (`transfers`), after the reduction and before the optimizer.
"""

from collections.abc import Sequence

from autopar.core.local_shape import local_size
from autopar.core.placement import parse_placements
from autopar.inter.block_choice import uses_of
from autopar.inter.stage_choice import StageChoice
from autopar.inter.stage_costs import StageBook
from autopar.inter.stage_transfers import Stage, in_one_node, slower_s

MASTER_BYTES = 4
"""An element of the optimizer's copy: fp32."""


def tied_seconds(
    books: Sequence[StageBook], stages: Sequence[Stage], firsts: Sequence[int], choices: Sequence[StageChoice]
) -> list[float]:
    """Per stage; ``books`` is of each stage, ``firsts`` its first device."""
    blocks = books[0].blocks
    found = [0.0] * len(stages)
    for value, users in blocks.tied.items():
        holding = {
            at: next(user for user in users if first <= user < end)
            for at, (first, end, _) in enumerate(stages)
            if any(first <= user < end for user in users)
        }
        for target, user in holding.items():
            part_bytes = _part_bytes(books[target], stages[target], choices[target], value, user)
            for source in holding:
                if source != target:
                    one_node = in_one_node(blocks.cluster, firsts, stages, (source, target))
                    senders, receivers = stages[source][2], stages[target][2]
                    found[target] += slower_s(blocks.cluster, part_bytes, senders, receivers, one_node=one_node)
    return found


def _part_bytes(book: StageBook, stage: Stage, choice: StageChoice, value: int, user: int) -> float:
    """Bytes of a gradient on the fullest rank of a stage, whose first block that uses it is ``user``."""
    key = (stage[0], value, choice)
    if key not in book.tied_bytes:
        graph, block = book.blocks.graph, book.blocks.blocks[user]
        own = dict(zip(block.parameters, book.blocks.kinds[block.kind].parameters, strict=True))[value]
        use = uses_of(book, choice, stage[0], stage[1])[user - stage[0]]
        planned, tensor = use.parameters(graph)[own], graph.values[own]
        elements = local_size(tensor.shape, parse_placements(planned.optimizer), choice.mesh.named)
        book.tied_bytes[key] = float(elements * max(tensor.itemsize, MASTER_BYTES))
    return book.tied_bytes[key]
