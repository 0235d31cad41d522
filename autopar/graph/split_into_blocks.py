"""Splits the graph into blocks, the units that stages are made of, and numbers structurally equal blocks as one kind.

The ops of one repeated module (a layer) are a block named after it. Of the other ops, those before the first layer are
the block ``embedding``, those after the last layer the block ``head`` (final norm, projection, loss), and those between
two layers belong to the block of the first of the two; between two containers of layers they are a block of their own
if they have matrix ops. Every further call of a layer is a block of its own. Models without repeated modules are split
where few bytes cross (``balanced_split``).

A light op between two layers that depends on nothing with a gradient (a mask, a table of angles) would make the block
before it unlike those of other layers: ``hoist_light_ops`` moves such ops to before the first layer.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from autopar.graph.balanced_split import balanced_split_points
from autopar.graph.block_kinds import BlockSpan, blocks_of_spans
from autopar.graph.ir import Block, Graph, GraphProfile, Op
from autopar.graph.op_profiles import profile_graph
from autopar.graph.repeated_modules import repeated_modules

_RANDOM_WORDS = ("dropout", "rand", "bernoulli", "normal", "uniform", "multinomial", "exponential")


def split_into_blocks(graph: Graph, profile: Callable[[], GraphProfile] | None = None) -> tuple[Block, ...]:
    """All ops as consecutive blocks, ``blocks[i].index == i``. Linear in the number of ops.

    ``profile`` gives the profile of the graph, by default a new one; only a model without repeated modules needs it.

    >>> [block.name for block in split_into_blocks(gpt)]  # two layers  # doctest: +SKIP
    ['embedding', 'layers.0', 'layers.1', 'head']
    """
    units = repeated_modules(graph)
    if not units:
        starts = balanced_split_points(graph, profile() if profile is not None else profile_graph(graph))
        ends = [*starts[1:], len(graph.ops)]
        spans = [
            BlockSpan(name=f"part.{i}", first_op=start, end_op=end)
            for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
    else:
        spans = _block_spans(graph, units)
    return blocks_of_spans(graph, spans)


def hoist_light_ops(graph: Graph) -> Graph:
    """The graph with light ops without a gradient moved from between the layers to before the first one.

    Ops are renumbered and stay in a valid order; values, names and the fingerprint are unchanged."""
    units = repeated_modules(graph)
    if not units:
        return graph
    first, last = min(units), max(units)
    available = {value.id for value in graph.values if value.kind != "activation"}
    available.update(value for op in graph.ops[:first] for value in op.outputs)
    hoisted = set()
    for op in graph.ops[first:last]:
        if op.id not in units and _can_hoist(graph, op) and available.issuperset(op.inputs):
            hoisted.add(op.id)
            available.update(op.outputs)
    if not hoisted:
        return graph
    remaining = [op for op in graph.ops[first:] if op.id not in hoisted]
    order = [*graph.ops[:first], *(graph.ops[op] for op in sorted(hoisted)), *remaining]
    return replace(graph, ops=tuple(replace(op, id=index) for index, op in enumerate(order)))


def _can_hoist(graph: Graph, op: Op) -> bool:
    outputs = [graph.values[value] for value in op.outputs]
    random = any(word in op.packet for word in _RANDOM_WORDS)
    return not (op.is_in_place or random or op.is_matrix_op or any(value.requires_grad for value in outputs))


def _block_spans(graph: Graph, units: dict[int, str]) -> list[BlockSpan]:
    """Segments of consecutive ops of one unit, and the ops between them."""
    first, last = min(units), max(units)
    spans = [BlockSpan(name="embedding", first_op=0, end_op=first)] if first else []
    for name, begin, end, next_begin in _unit_segments(graph, units, first, last):
        for start, stop in _split_repeated_calls(graph, begin, end):
            spans.append(BlockSpan(name=name, first_op=start, end_op=stop))
        if any(op.is_matrix_op for op in graph.ops[end:next_begin]):
            spans.append(BlockSpan(name=f"after {name}", first_op=end, end_op=next_begin))
        else:
            spans[-1] = replace(spans[-1], end_op=next_begin)
    if last + 1 < len(graph.ops):
        spans.append(BlockSpan(name="head", first_op=last + 1, end_op=len(graph.ops)))
    return _with_unique_names(spans)


def _unit_segments(graph: Graph, units: dict[int, str], first: int, last: int) -> list[tuple[str, int, int, int]]:
    """(unit, first op, end, first op of the next segment) of each segment of consecutive ops of one unit. Between two
    children of one container a segment ends where the next begins, so it has the ops between them (a residual addition
    in the parent); between two containers it ends after the unit's last op."""
    in_units = [op for op in range(first, last + 1) if op in units]
    segments: list[tuple[str, int, int, int]] = []
    begin = end = first
    for op in in_units[1:]:
        if units[op] != units[begin]:
            same_container = _container_of(units[op]) == _container_of(units[begin])
            segments.append((units[begin], begin, op if same_container else end + 1, op))
            begin = op
        end = op
    segments.append((units[begin], begin, last + 1, last + 1))
    return segments


def _container_of(unit: str) -> str:
    return unit.rpartition(".")[0]


def _split_repeated_calls(graph: Graph, begin: int, end: int) -> list[tuple[int, int]]:
    """(first op, end) of each call of the unit in a segment: a call begins where the unit's first op with a parameter,
    its anchor, occurs another time after the same ops."""
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
    """Whether two calls, which begin at ops ``one`` and ``other``, run the same ``length`` ops before the anchor."""
    first, second = graph.ops[one : one + length], graph.ops[other : other + length]
    return [op.target for op in first] == [op.target for op in second]


def _with_unique_names(spans: list[BlockSpan]) -> list[BlockSpan]:
    """Appends ``#2``, ``#3`` ... to the names of the second, third ... span of one name."""
    seen: Counter[str] = Counter()
    named = []
    for span in spans:
        seen[span.name] += 1
        number = seen[span.name]
        named.append(span if number == 1 else replace(span, name=f"{span.name}#{number}"))
    return named
