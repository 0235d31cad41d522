"""Cuts the graph into blocks, the units that stages are made of, and folds equal ones into kinds.

Ops inside one child of a repeated container are a block named after it. Of the others, those before the first layer are
the block ``embedding``, those after the last ``head`` (final norm, projection, loss), and those between two layers stay
with the layer before; between two containers they are a block of their own when they multiply matrices. A layer that is
called again begins a new block. Models without containers are cut at narrow points (``narrow``).

A light op between two layers that depends on nothing that carries a gradient (a mask, a table of angles) would make the
layer before it unlike its siblings: ``order_for_blocks`` moves such ops in front of the first layer.
"""

from collections import Counter
from dataclasses import replace

from autopar.graph.balanced_split import balanced_split_points
from autopar.graph.block_kinds import BlockSpan, blocks_of_spans
from autopar.graph.ir import Block, Graph, Op
from autopar.graph.repeated_modules import repeated_modules

_RANDOM_WORDS = ("dropout", "rand", "bernoulli", "normal", "uniform", "multinomial", "exponential")


def split_into_blocks(graph: Graph) -> tuple[Block, ...]:
    """All ops as consecutive blocks, ``blocks[i].index == i``; time is linear in the number of ops.

    >>> [block.name for block in cut_blocks(gpt)]  # two layers  # doctest: +SKIP
    ['embedding', 'layers.0', 'layers.1', 'head']
    """
    units = repeated_modules(graph)
    if not units:
        cuts = balanced_split_points(graph)
        ends = [*cuts[1:], len(graph.ops)]
        spans = [
            BlockSpan(name=f"part.{i}", first_op=cut, end_op=end)
            for i, (cut, end) in enumerate(zip(cuts, ends, strict=True))
        ]
    else:
        spans = _block_spans(graph, units)
    return blocks_of_spans(graph, spans)


def hoist_light_ops(graph: Graph) -> Graph:
    """The graph with light ops that carry no gradient moved out from between the layers, to the front of the first one.

    Ops are numbered anew and stay in a valid order; values, names and the fingerprint are as before."""
    units = repeated_modules(graph)
    if not units:
        return graph
    first, last = min(units), max(units)
    early = {value.id for value in graph.values if value.kind != "activation"}
    early.update(value for op in graph.ops[:first] for value in op.outputs)
    moved = set()
    for op in graph.ops[first:last]:
        if op.id not in units and _can_hoist(graph, op) and early.issuperset(op.inputs):
            moved.add(op.id)
            early.update(op.outputs)
    if not moved:
        return graph
    rest = [op for op in graph.ops[first:] if op.id not in moved]
    order = [*graph.ops[:first], *(graph.ops[op] for op in sorted(moved)), *rest]
    return replace(graph, ops=tuple(replace(op, id=index) for index, op in enumerate(order)))


def _can_hoist(graph: Graph, op: Op) -> bool:
    outputs = [graph.values[value] for value in op.outputs]
    random = any(word in op.packet for word in _RANDOM_WORDS)
    return not (op.is_in_place or random or op.is_matrix_op or any(value.requires_grad for value in outputs))


def _block_spans(graph: Graph, units: dict[int, str]) -> list[BlockSpan]:
    """Runs of ops of one unit, with what lies between them."""
    first, last = min(units), max(units)
    spans = [BlockSpan(name="embedding", first_op=0, end_op=first)] if first else []
    for name, begin, end, gap in _unit_segments(graph, units, first, last):
        heavy_gap = any(op.is_matrix_op for op in graph.ops[end:gap])
        for start, stop in _split_repeated_calls(graph, begin, end):
            spans.append(BlockSpan(name=name, first_op=start, end_op=stop))
        if heavy_gap:
            spans.append(BlockSpan(name=f"after {name}", first_op=end, end_op=gap))
        else:
            spans[-1] = replace(spans[-1], end_op=gap)
    if last + 1 < len(graph.ops):
        spans.append(BlockSpan(name="head", first_op=last + 1, end_op=len(graph.ops)))
    return _with_unique_names(spans)


def _unit_segments(graph: Graph, units: dict[int, str], first: int, last: int) -> list[tuple[str, int, int, int]]:
    """(unit, first op, end of its ops, first op of the next unit) of each run of ops of one unit; a residual addition
    in the parent lies between ``end`` and the next. Only between containers may the two differ by heavy ops: within one
    they stay in the run."""
    starts = [op for op in range(first, last + 1) if op in units]
    runs: list[tuple[str, int, int, int]] = []
    begin = end = first
    for op in starts[1:]:
        if units[op] != units[begin]:
            same_container = _container_of(units[op]) == _container_of(units[begin])
            runs.append((units[begin], begin, op if same_container else end + 1, op))
            begin = op
        end = op
    runs.append((units[begin], begin, last + 1, last + 1))
    return runs


def _container_of(unit: str) -> str:
    return unit.rpartition(".")[0]


def _split_repeated_calls(graph: Graph, begin: int, end: int) -> list[tuple[int, int]]:
    """Splits a run at the points where the unit is called again: where its first op with a parameter recurs."""
    anchors = [op for op in graph.ops[begin:end] if _reads_parameter(graph, op)]
    if not anchors:
        return [(begin, end)]
    lead = anchors[0].id - begin
    same = [op.id - lead for op in anchors if (op.target, op.module_path, op.inputs[1:]) == _anchor_key(anchors)]
    starts = [begin, *(start for start in same[1:] if _same_ops_before_anchor(graph, begin, start, lead))]
    return list(zip(starts, [*starts[1:], end], strict=True))


def _anchor_key(anchors: list[Op]) -> tuple[str, str, tuple[int, ...]]:
    return anchors[0].target, anchors[0].module_path, anchors[0].inputs[1:]


def _reads_parameter(graph: Graph, op: Op) -> bool:
    return any(graph.values[value].kind == "parameter" for value in op.inputs)


def _same_ops_before_anchor(graph: Graph, one: int, other: int, length: int) -> bool:
    """Whether the ops ahead of the anchor are the same, too."""
    ours, theirs = graph.ops[one : one + length], graph.ops[other : other + length]
    return [op.target for op in ours] == [op.target for op in theirs]


def _with_unique_names(spans: list[BlockSpan]) -> list[BlockSpan]:
    """Spans of one name get ``#2``, ``#3`` ... from the second on."""
    seen: Counter[str] = Counter()
    named = []
    for span in spans:
        seen[span.name] += 1
        number = seen[span.name]
        named.append(span if number == 1 else replace(span, name=f"{span.name}#{number}"))
    return named
