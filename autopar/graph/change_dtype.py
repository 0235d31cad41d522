"""A graph in another floating-point dtype: the same ops, so that a plan's placements still fit.

A new trace could have other ops: a cast of bf16 logits to fp32 is an op, one of fp32 logits is not.
"""

from dataclasses import replace
from typing import Any

from autopar.core.dtypes import TRAINING_DTYPES
from autopar.graph.ir import Graph


def with_dtype(graph: Graph, dtype: str) -> Graph:
    """``graph`` with every floating-point dtype, of values and among literals, replaced by ``dtype``."""

    def with_new_dtype(literal: Any) -> Any:
        if isinstance(literal, tuple):
            return tuple(with_new_dtype(element) for element in literal)
        return dtype if isinstance(literal, str) and literal in TRAINING_DTYPES else literal

    return replace(
        graph,
        values=tuple(
            replace(value, dtype=dtype) if value.dtype in TRAINING_DTYPES else value for value in graph.values
        ),
        ops=tuple(
            replace(
                op,
                args=with_new_dtype(op.args),
                kwargs=tuple((name, with_new_dtype(literal)) for name, literal in op.kwargs),
            )
            for op in graph.ops
        ),
    )
