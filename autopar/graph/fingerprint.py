"""A sha256 hash of a graph's structure, independent of the batch size at which it was traced."""

import hashlib
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from autopar.graph.ir import InputRef, Op, TracedBatch, Value


def fingerprint(values: Iterable[Value], ops: Iterable[Op], batch: TracedBatch) -> str:
    """Hexadecimal hash of values (kind, sizes, dtype, names of parameters) and ops (call, edges, literals, module).

    Sizes and literals proportional to the batch enter as their share per sample. Line numbers do not enter."""
    digest = hashlib.sha256()
    for value in values:
        shape = tuple(_per_sample(size, batch) for size in value.shape)
        name = value.name if value.kind != "activation" else ""
        digest.update(repr((value.kind, shape, value.dtype, value.requires_grad, name, value.qualified_names)).encode())
    for op in ops:
        literals = _per_sample((op.args, op.kwargs), batch)
        digest.update(repr((op.target, op.inputs, op.outputs, literals, op.module_path)).encode())
    return digest.hexdigest()


def _per_sample(literal: Any, batch: TracedBatch) -> Any:
    if isinstance(literal, tuple):
        return tuple(_per_sample(element, batch) for element in literal)
    if isinstance(literal, InputRef):
        return f"%{literal.index}"
    if type(literal) is int and batch.is_proportional(literal):
        return f"batch*{Fraction(literal, batch.traced_size)}"
    return literal
