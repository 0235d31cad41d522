"""Splits a model without repeated modules into blocks of balanced FLOPs, at boundaries that few bytes cross.

With C(i) the FLOPs of the ops before i, C those of all ops and n blocks, the k-th of the n - 1 split points is the i
that the fewest bytes cross among those with |C(i) - k C / n| <= C / 2n and C(i) at least C / 4n above that of the
previous split point; of several, the one nearest to k C / n. Linear in the number of ops.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate
from math import prod

from autopar.graph.ir import Graph, GraphProfile

MAX_BLOCKS = 16


def balanced_split_points(graph: Graph, profile: GraphProfile) -> list[int]:
    """Ids of the ops that begin a block, op 0 included: at most ``MAX_BLOCKS``. A model without FLOPs is balanced by the
    bytes of its kernels.

    Example: 32 equal linear layers with a ReLU each are split before every second linear layer."""
    weights = [op_profile.forward_flops for op_profile in profile.ops]
    if not any(weights):
        weights = [op_profile.forward_bytes for op_profile in profile.ops]
    num_blocks = min(MAX_BLOCKS, max(1, sum(weight > 0 for weight in weights)))
    before = list(accumulate(weights, initial=0))  # before[i]: C(i)
    total = before[-1]
    crossing_bytes = _crossing_bytes(graph)
    points = [0]
    for k in range(1, num_blocks):
        ideal = k * total / num_blocks
        window = total / (2 * num_blocks)
        first = max(points[-1] + 1, bisect_left(before, max(ideal - window, before[points[-1]] + window / 2)))
        end = min(len(weights), bisect_right(before, ideal + window))
        if first < end:
            points.append(min(range(first, end), key=lambda i: (crossing_bytes[i], abs(before[i] - ideal), i)))
    return points


def _crossing_bytes(graph: Graph) -> list[int]:
    """For every i the bytes of the activations that ops < i produce and ops >= i read."""
    change = [0] * (len(graph.ops) + 1)
    last_reader = {value: op.id for op in graph.ops for value in op.inputs}
    for op in graph.ops:
        for value in op.outputs:
            if last_reader.get(value, -1) > op.id:
                size = prod(graph.values[value].shape) * graph.values[value].itemsize
                change[op.id + 1] += size
                change[last_reader[value] + 1] -= size
    return list(accumulate(change))
