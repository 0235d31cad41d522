"""Structural equality of blocks: blocks of one kind differ in nothing but which values they read and write.

A block's key lists for each op its target, its literal arguments, where each input comes from and the type of each
output. An input is identified by

    made inside    (offset of its op in the block, position among that op's outputs)
    made outside   (position in the order of first use, among the block's parameters and buffers or among its other
                   external values), with shape, dtype, requires_grad and whether other blocks read it as well (a tied
                   weight, a skip connection, a mask for all layers)

Blocks with equal keys are of one kind. Linear in the number of ops.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from autopar.graph.ir import Block, Graph, Op, Value, hashable_literal


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpan:
    """Consecutive ops, ``first_op <= id < end_op``, that are to become the block ``name``."""

    name: str
    first_op: int
    end_op: int


def blocks_of_spans(graph: Graph, spans: list[BlockSpan]) -> tuple[Block, ...]:
    """The blocks of the spans, in order; kinds are numbered in the order in which they first occur.

    Example: GPT with 12 layers -> embedding (kind 0), 12 layers (kind 1), head (kind 2)."""
    readers: dict[int, set[int]] = defaultdict(set)
    for index, span in enumerate(spans):
        for op in graph.ops[span.first_op : span.end_op]:
            for value in op.inputs:
                readers[value].add(index)
    numbers: dict[Any, int] = {}
    blocks = []
    for index, span in enumerate(spans):
        key, inputs, outputs, parameters = _block_structure(graph, index, span, readers)
        blocks.append(
            Block(
                index=index,
                name=span.name,
                kind=numbers.setdefault(key, len(numbers)),
                first_op=span.first_op,
                end_op=span.end_op,
                inputs=inputs,
                outputs=outputs,
                parameters=parameters,
            )
        )
    return tuple(blocks)


def _block_structure(
    graph: Graph, index: int, span: BlockSpan, readers: dict[int, set[int]]
) -> tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The key of a block, and the ids of its inputs, its outputs and its parameters and buffers."""
    produced: dict[int, tuple[int, int]] = {}
    inputs: dict[int, int] = {}
    parameters: dict[int, int] = {}
    outputs: list[int] = []
    keys = []
    for offset, op in enumerate(graph.ops[span.first_op : span.end_op]):
        sources = tuple(
            _input_key(graph.values[value], produced, inputs, parameters, len(readers[value]) > 1)
            for value in op.inputs
        )
        results = []
        for position, value in enumerate(op.outputs):
            produced[value] = (offset, position)
            others = readers[value] - {index} if value in readers else set()
            leaves = bool(others) or value in graph.outputs
            if leaves:
                outputs.append(value)
            results.append((_type_key(graph.values[value]), leaves, len(others) > 1))
        keys.append((*_call_key(op), sources, tuple(results)))
    return tuple(keys), tuple(inputs), tuple(outputs), tuple(parameters)


def _call_key(op: Op) -> tuple[Any, ...]:
    return op.target, hashable_literal(op.args), hashable_literal(op.kwargs)


def _input_key(
    value: Value,
    produced: dict[int, tuple[int, int]],
    inputs: dict[int, int],
    parameters: dict[int, int],
    read_elsewhere: bool,
) -> tuple[Any, ...]:
    """The key of an op's input; a new external value is appended to ``inputs`` or ``parameters``."""
    if value.id in produced:
        return produced[value.id]
    is_parameter = value.kind in ("parameter", "buffer")
    positions = parameters if is_parameter else inputs
    position = positions.setdefault(value.id, len(positions))
    tied = read_elsewhere or len(value.qualified_names) > 1
    return ("parameter" if is_parameter else "input", position, value.kind, _type_key(value), tied)


def _type_key(value: Value) -> tuple[Any, ...]:
    return value.shape, value.dtype, value.requires_grad
