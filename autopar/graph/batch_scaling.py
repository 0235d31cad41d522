"""Checks that exactly the sizes divisible by the prime are proportional to the batch.

``may_break_batch_scaling`` finds sizes in one graph for which that is not certain; ``check_batch_scaling`` then compares
two traces.
"""

import math
from collections import Counter
from collections.abc import Iterator

from autopar.core.errors import ModelError
from autopar.graph.ir import Graph, Op, TracedBatch, Value


def may_break_batch_scaling(graph: Graph) -> bool:
    """Whether the rule may fail for some size: one of a result that is neither near nor a divisor of a size known to be
    independent of the batch, one that is divisible by the prime but not by the batch though no size of its op's inputs
    is, a literal that may be a multiple of the batch, or a number that is divisible by the prime: of equal calls (a
    Python loop over the samples), of the tensors that a call reads or returns, or of elements of a literal list.

    Example: a capacity of ceil(2 * 808 * 1024 / 60) = 27580 slots grows with the batch, yet 101 does not divide it."""
    batch = graph.batch
    calls = Counter((op.target, op.module_path, op.source_location) for op in graph.ops)
    if any(batch.is_proportional(count) for count in calls.values()):
        return True  # a Python loop over the samples
    known = {
        size
        for value in graph.values
        if value.kind != "activation"
        for size in value.shape
        if not batch.is_proportional(size)
    }
    for op in graph.ops:
        inputs = [graph.values[value] for value in op.inputs]
        outputs = [graph.values[value] for value in op.outputs]
        fixed = {size for value in inputs for size in value.shape if not batch.is_proportional(size)}
        products = {math.prod(size for size in value.shape if not batch.is_proportional(size)) for value in inputs}
        reads_batch = any(batch.is_proportional(size) for value in inputs for size in value.shape)
        for value in outputs:
            for size in value.shape:
                if batch.is_proportional(size):
                    if not reads_batch and size % batch.traced_size:
                        return True
                elif (
                    size > 1
                    and not _is_near_fixed_size(size, fixed)
                    and not any(other % size == 0 for other in products | known)
                ):
                    return True
        if any(map(batch.is_proportional, (len(inputs), len(outputs), *_lengths_in((op.args, op.kwargs))))):
            return True
        if any(_may_be_batch_literal(literal, batch) for literal in _numbers_in((op.args, op.kwargs))):
            return True
    return False


def _is_near_fixed_size(size: int, fixed: set[int]) -> bool:
    """Whether a size is a fixed one of the inputs, or differs from it by a few rows of slicing or padding."""
    return any(abs(size - other) <= 8 for other in fixed)


def _may_be_batch_literal(number: float, batch: TracedBatch) -> bool:
    """Whether a float is a multiple of the prime, or one over it: a mean over the batch written by hand."""
    if not isinstance(number, float) or not math.isfinite(number) or number == 0:
        return False
    size = max(abs(number), 1 / abs(number))
    return batch.prime <= size < 2**53 and abs(size - round(size)) < 1e-6 * size and batch.is_proportional(round(size))


def _numbers_in(literal: object) -> Iterator[float]:
    if isinstance(literal, tuple):
        for element in literal:
            yield from _numbers_in(element)
    elif type(literal) in (int, float):
        yield literal  # type: ignore[misc]


def _lengths_in(literal: object) -> Iterator[int]:
    """Lengths of all nested tuples."""
    if isinstance(literal, tuple):
        yield len(literal)
        for element in literal:
            yield from _lengths_in(element)


def check_batch_scaling(graph: Graph, retraced: Graph) -> None:
    """Raises ModelError unless ``retraced``, traced at another batch, is ``graph`` scaled to that batch."""
    for op, retraced_op in zip(graph.ops, retraced.ops, strict=False):
        if (op.target, op.source_location) != (retraced_op.target, retraced_op.source_location):
            raise _different_ops_error(op, graph, retraced)
    if len(graph.ops) != len(retraced.ops):
        raise _different_ops_error(graph.ops[-1], graph, retraced)
    for op, retraced_op in zip(graph.ops, retraced.ops, strict=True):
        _check_same_lengths(op, retraced_op, graph, retraced)
        for value, other in zip(_outputs_of(graph, op), _outputs_of(retraced, retraced_op), strict=True):
            if tuple(_scaled(size, graph.batch, retraced.batch) for size in value.shape) != other.shape:
                at = f"at batch {graph.batch.traced_size} and {other.shape} at batch {retraced.batch.traced_size}"
                raise _not_proportional_error(op, f"its result is {value.shape} {at}")
        numbers, other_numbers = (list(_numbers_in((call.args, call.kwargs))) for call in (op, retraced_op))
        if len(numbers) != len(other_numbers):
            raise _different_ops_error(op, graph, retraced)
        for number, other_number in zip(numbers, other_numbers, strict=True):
            expected = _scaled(number, graph.batch, retraced.batch) if type(number) is int else number
            if expected != other_number:
                at = f"at batch {graph.batch.traced_size} and {other_number} at batch {retraced.batch.traced_size}"
                raise _not_proportional_error(op, f"its literal argument is {number} {at}")


def _check_same_lengths(op: Op, retraced_op: Op, graph: Graph, retraced: Graph) -> None:
    """Raises ModelError unless an op reads and returns as many tensors in both traces, and its literal lists are as
    long."""
    at, retraced_at = (f"at batch {traced.batch.traced_size}" for traced in (graph, retraced))
    for what, here, there in (
        ("reads", len(op.inputs), len(retraced_op.inputs)),
        ("returns", len(op.outputs), len(retraced_op.outputs)),
    ):
        if here != there:
            raise _per_sample_error(op, f"{what} {here} tensors {at} and {there} {retraced_at}")
    lengths = [tuple(_lengths_in((call.args, call.kwargs))) for call in (op, retraced_op)]
    if lengths[0] != lengths[1]:
        here, there = (max(found, default=0) for found in lengths)
        raise _per_sample_error(op, f"has a list of {here} elements {at} and of {there} {retraced_at}")


def _outputs_of(graph: Graph, op: Op) -> list[Value]:
    return [graph.values[value] for value in op.outputs]


def _scaled(size: float, batch: TracedBatch, other: TracedBatch) -> float:
    return batch.scale(size, other.traced_size) if type(size) is int else size


def _different_ops_error(op: Op, graph: Graph, retraced: Graph) -> ModelError:
    return ModelError(
        f"the model runs {len(graph.ops)} operations at batch {graph.batch.traced_size} and {len(retraced.ops)} at batch "
        f"{retraced.batch.traced_size}; they first differ at {op.source_location or op.target}\n"
        "  replace a Python loop over the samples by one operation on the batch"
    )


def _not_proportional_error(op: Op, what: str) -> ModelError:
    place = f" at {op.source_location}" if op.source_location else ""
    return ModelError(
        f"cannot plan {op.target}{place}: {what}, which does not scale with the batch\n"
        "  make this size independent of the batch (for example per group or per sample), or proportional to it"
    )


def _per_sample_error(op: Op, what: str) -> ModelError:
    place = f" at {op.source_location}" if op.source_location else ""
    return ModelError(
        f"cannot plan {op.target}{place}: it {what}\n  replace a list with an entry per sample by one tensor of the batch"
    )
