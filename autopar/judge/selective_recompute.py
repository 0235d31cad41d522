"""What selective recomputation by operation saves, as the judge reads it from the graph.

torchtitan wraps every transformer block in torch's selective checkpoint and saves the results of fused attentions and of
every second matrix product, beginning with the first (torchtitan/parallelisms/parallelize_llama.py@004b3148,
``_custom_policy``); the block's inputs are saved as in any checkpoint.
"""

from dataclasses import dataclass

from autopar.graph.ir import Block, Graph, GraphProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectivePolicy:
    """What torch's selective checkpoint saves under torchtitan's policy. ``saved_ops``: of every block the fused attentions
    and the first, third, ... product with a weight, whose results and internal tensors are saved; ``result_owners``: the
    values that own the memory of those results; ``block_input_owners``: those that own the memory of blocks' inputs."""

    saved_ops: frozenset[int]
    result_owners: frozenset[int]
    block_input_owners: frozenset[int]


def torchtitan_policy(
    graph: Graph, profile: GraphProfile, blocks: tuple[Block, ...], has_fused_attention: bool
) -> SelectivePolicy:
    """The policy for ``blocks``, each a checkpoint of its own. ``has_fused_attention``: else attention is not saved."""
    saved_ops: list[int] = []
    for block in blocks:
        ops = graph.ops[block.first_op : block.end_op]
        attentions = [op.id for op in ops if op.is_attention]
        products = [
            op.id
            for op in ops
            if op.id not in attentions
            and profile.ops[op.id].forward_flops
            and any(graph.values[value].kind == "parameter" for value in op.inputs)
        ]
        saved_ops += products[::2] + (attentions if has_fused_attention else [])
    return SelectivePolicy(
        saved_ops=frozenset(saved_ops),
        result_owners=frozenset(profile.storage_owner[value] for op in saved_ops for value in graph.ops[op].outputs),
        block_input_owners=frozenset(profile.storage_owner[value] for block in blocks for value in block.inputs),
    )
