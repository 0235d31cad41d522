"""What crosses from block to block."""

from collections import defaultdict

from autopar.graph.ir import Block, Graph


def boundary_values(graph: Graph, blocks: tuple[Block, ...]) -> tuple[tuple[int, ...], ...]:
    """For each boundary i | i + 1 the ids of the activations made in blocks <= i that blocks > i read, in order of id.

    >>> crossing(gpt, cut_blocks(gpt))[0]  # the result of the embedding  # doctest: +SKIP
    (585,)
    """
    made = {
        value: block.index
        for block in blocks
        for op in graph.ops[block.first_op : block.end_op]
        for value in op.outputs
    }
    last = {value: block.index for block in blocks for value in block.inputs}
    cuts: dict[int, list[int]] = defaultdict(list)
    for value, reader in sorted(last.items()):
        for boundary in range(made.get(value, reader), reader):
            cuts[boundary].append(value)
    return tuple(tuple(cuts[boundary]) for boundary in range(len(blocks) - 1))
