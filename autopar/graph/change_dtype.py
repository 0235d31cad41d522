"""A graph in another floating dtype: the same ops, so a plan's placements still fit.

Tracing anew would not do: a cast of bf16 logits to fp32 is an op, of fp32 logits none.
"""

from dataclasses import replace
from typing import Any

from autopar.core.dtypes import TRAINING_DTYPES
from autopar.graph.ir import Graph


def with_dtype(graph: Graph, dtype: str) -> Graph:
    """``graph`` with every floating dtype, of values and among literals, replaced by ``dtype``."""

    def changed(literal: Any) -> Any:
        if isinstance(literal, tuple):
            return tuple(changed(element) for element in literal)
        return dtype if isinstance(literal, str) and literal in TRAINING_DTYPES else literal

    return replace(
        graph,
        values=tuple(
            replace(value, dtype=dtype) if value.dtype in TRAINING_DTYPES else value for value in graph.values
        ),
        ops=tuple(
            replace(op, args=changed(op.args), kwargs=tuple((name, changed(value)) for name, value in op.kwargs))
            for op in graph.ops
        ),
    )
