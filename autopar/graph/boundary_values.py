"""The boundary values: what later blocks read of earlier ones."""

from collections import defaultdict

from autopar.graph.ir import Block, Graph


def boundary_values(graph: Graph, blocks: tuple[Block, ...]) -> tuple[tuple[int, ...], ...]:
    """For each boundary between blocks i and i + 1 the ids of the activations that blocks <= i produce and blocks > i
    read, in ascending order.

    >>> boundary_values(gpt, split_into_blocks(gpt))[0]  # the result of the embedding  # doctest: +SKIP
    (585,)
    """
    producer = {
        value: block.index
        for block in blocks
        for op in graph.ops[block.first_op : block.end_op]
        for value in op.outputs
    }
    last_reader = {value: block.index for block in blocks for value in block.inputs}
    crossing: dict[int, list[int]] = defaultdict(list)
    for value, reader in sorted(last_reader.items()):
        for boundary in range(producer.get(value, reader), reader):
            crossing[boundary].append(value)
    return tuple(tuple(crossing[boundary]) for boundary in range(len(blocks) - 1))
