"""Cuts a model without repeated containers: balanced FLOPs, at points where few bytes cross.

With C(i) the FLOPs of the ops before i and n blocks, the k-th of n - 1 cuts is the i with the fewest bytes crossing
among those with |C(i) - k C / n| <= C / 2n that are at least C / 4n behind the cut before; of several, the one nearest
the middle. Linear in the number of ops.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate
from math import prod

from autopar.graph.ir import Graph
from autopar.graph.op_profiles import profile_graph

MAX_BLOCKS = 16


def balanced_split_points(graph: Graph) -> list[int]:
    """Ids of the ops that begin a block, the first (0) included, at most ``MAX_BLOCKS``.

    Example: 32 equal linear layers with a ReLU each are cut in front of every second linear layer."""
    profiles = profile_graph(graph).ops
    weights = [profile.forward_flops for profile in profiles]
    if not any(weights):
        weights = [profile.forward_bytes for profile in profiles]
    num_blocks = min(MAX_BLOCKS, max(1, sum(weight > 0 for weight in weights)))
    before = list(accumulate(weights, initial=0))  # before[i]: work of ops < i
    total = before[-1]
    live = _crossing_bytes(graph)
    cuts = [0]
    for k in range(1, num_blocks):
        ideal = k * total / num_blocks
        window = total / (2 * num_blocks)
        first = max(cuts[-1] + 1, bisect_left(before, max(ideal - window, before[cuts[-1]] + window / 2)))
        end = min(len(weights), bisect_right(before, ideal + window))
        if first < end:
            cuts.append(min(range(first, end), key=lambda i: (live[i], abs(before[i] - ideal), i)))
    return cuts


def _crossing_bytes(graph: Graph) -> list[int]:
    """Bytes of activations made by ops < i and read by ops >= i, for every i."""
    change = [0] * (len(graph.ops) + 1)
    last_reader = {value: op.id for op in graph.ops for value in op.inputs}
    for op in graph.ops:
        for value in op.outputs:
            if last_reader.get(value, -1) > op.id:
                size = prod(graph.values[value].shape) * graph.values[value].itemsize
                change[op.id + 1] += size
                change[last_reader[value] + 1] -= size
    return list(accumulate(change))
