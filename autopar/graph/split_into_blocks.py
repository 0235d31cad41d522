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

from autopar.graph.balanced_split import narrow_cuts
from autopar.graph.block_kinds import Span, fold
from autopar.graph.ir import Block, Graph, Op
from autopar.graph.repeated_modules import units_of

_RANDOM = ("dropout", "rand", "bernoulli", "normal", "uniform", "multinomial", "exponential")


def cut_blocks(graph: Graph) -> tuple[Block, ...]:
    """All ops as consecutive blocks, ``blocks[i].index == i``; time is linear in the number of ops.

    >>> [block.name for block in cut_blocks(gpt)]  # two layers  # doctest: +SKIP
    ['embedding', 'layers.0', 'layers.1', 'head']
    """
    units = units_of(graph)
    if not units:
        cuts = narrow_cuts(graph)
        ends = [*cuts[1:], len(graph.ops)]
        spans = [
            Span(name=f"part.{i}", first_op=cut, end_op=end)
            for i, (cut, end) in enumerate(zip(cuts, ends, strict=True))
        ]
    else:
        spans = _spans(graph, units)
    return fold(graph, spans)


def order_for_blocks(graph: Graph) -> Graph:
    """The graph with light ops that carry no gradient moved out from between the layers, to the front of the first one.

    Ops are numbered anew and stay in a valid order; values, names and the fingerprint are as before."""
    units = units_of(graph)
    if not units:
        return graph
    first, last = min(units), max(units)
    early = {value.id for value in graph.values if value.kind != "activation"}
    early.update(value for op in graph.ops[:first] for value in op.outputs)
    moved = set()
    for op in graph.ops[first:last]:
        if op.id not in units and _may_move(graph, op) and early.issuperset(op.inputs):
            moved.add(op.id)
            early.update(op.outputs)
    if not moved:
        return graph
    rest = [op for op in graph.ops[first:] if op.id not in moved]
    order = [*graph.ops[:first], *(graph.ops[op] for op in sorted(moved)), *rest]
    return replace(graph, ops=tuple(replace(op, id=index) for index, op in enumerate(order)))


def _may_move(graph: Graph, op: Op) -> bool:
    outputs = [graph.values[value] for value in op.outputs]
    random = any(word in op.packet for word in _RANDOM)
    return not (op.is_in_place or random or op.is_matrix_op or any(value.requires_grad for value in outputs))


def _spans(graph: Graph, units: dict[int, str]) -> list[Span]:
    """Runs of ops of one unit, with what lies between them."""
    first, last = min(units), max(units)
    spans = [Span(name="embedding", first_op=0, end_op=first)] if first else []
    for name, begin, end, gap in _runs(graph, units, first, last):
        heavy_gap = any(op.is_matrix_op for op in graph.ops[end:gap])
        for start, stop in _calls(graph, begin, end):
            spans.append(Span(name=name, first_op=start, end_op=stop))
        if heavy_gap:
            spans.append(Span(name=f"after {name}", first_op=end, end_op=gap))
        else:
            spans[-1] = replace(spans[-1], end_op=gap)
    if last + 1 < len(graph.ops):
        spans.append(Span(name="head", first_op=last + 1, end_op=len(graph.ops)))
    return _unique(spans)


def _runs(graph: Graph, units: dict[int, str], first: int, last: int) -> list[tuple[str, int, int, int]]:
    """(unit, first op, end of its ops, first op of the next unit) of each run of ops of one unit; a residual addition
    in the parent lies between ``end`` and the next. Only between containers may the two differ by heavy ops: within one
    they stay in the run."""
    starts = [op for op in range(first, last + 1) if op in units]
    runs: list[tuple[str, int, int, int]] = []
    begin = end = first
    for op in starts[1:]:
        if units[op] != units[begin]:
            same_container = _container(units[op]) == _container(units[begin])
            runs.append((units[begin], begin, op if same_container else end + 1, op))
            begin = op
        end = op
    runs.append((units[begin], begin, last + 1, last + 1))
    return runs


def _container(unit: str) -> str:
    return unit.rpartition(".")[0]


def _calls(graph: Graph, begin: int, end: int) -> list[tuple[int, int]]:
    """Splits a run at the points where the unit is called again: where its first op with a parameter recurs."""
    anchors = [op for op in graph.ops[begin:end] if _reads_parameter(graph, op)]
    if not anchors:
        return [(begin, end)]
    lead = anchors[0].id - begin
    same = [op.id - lead for op in anchors if (op.target, op.module, op.inputs[1:]) == _first(anchors)]
    starts = [begin, *(start for start in same[1:] if _alike(graph, begin, start, lead))]
    return list(zip(starts, [*starts[1:], end], strict=True))


def _first(anchors: list[Op]) -> tuple[str, str, tuple[int, ...]]:
    return anchors[0].target, anchors[0].module, anchors[0].inputs[1:]


def _reads_parameter(graph: Graph, op: Op) -> bool:
    return any(graph.values[value].kind == "parameter" for value in op.inputs)


def _alike(graph: Graph, one: int, other: int, length: int) -> bool:
    """Whether the ops ahead of the anchor are the same, too."""
    ours, theirs = graph.ops[one : one + length], graph.ops[other : other + length]
    return [op.target for op in ours] == [op.target for op in theirs]


def _unique(spans: list[Span]) -> list[Span]:
    """Spans of one name get ``#2``, ``#3`` ... from the second on."""
    seen: Counter[str] = Counter()
    named = []
    for span in spans:
        seen[span.name] += 1
        number = seen[span.name]
        named.append(span if number == 1 else replace(span, name=f"{span.name}#{number}"))
    return named
