"""The order in which the nodes of a lowered graph run.

    as traced      all but what follows
    when read      views, waits for collectives, and what the backward computes again: right before the first reader
    when made      a collective starts, and a gradient is handed over, as soon as what it takes is there
    beside         what the backward gathers again for an op starts as soon as the op's gradient is there
    one ahead      gathers of a block's ZeRO-3 parameters start where the block before begins to read its own
    one behind     a gradient's reduce-scatter is waited for where the next one has started

So a rank holds the gathered parameters of two blocks at most, and computes while its gradients and its next parameters
are on their way. A gradient that is a sum is handed over term by term. What brings a tensor to a collective differs
from rank to rank (padding, zeros): no rule looks at it, so that the collectives of all ranks pair.
"""

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from autopar.runtime.lower.in_place import IN_PLACE_FORM, in_place_nodes

ZERO3_GATHER = -2  # the block of what gathers ZeRO-3 parameters
SEND_PREPARATION = -3  # the block of what brings activations to how they are sent

TakeGradient = Callable[[int, Tensor, bool, bool], None]
"""Takes (which gradient, a term of it, whether nobody else holds the term's memory, whether it is the last term)."""

_WAIT = torch.ops._c10d_functional.wait_tensor.default
_ALL_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
_ALL_GATHER_OUT = torch.ops._c10d_functional.all_gather_into_tensor_out.default


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientHandOver:
    """Gives a term of gradient ``at`` to who takes it; ``owned``: nobody else holds its memory."""

    gradient: int
    addend: fx.Node
    owns_memory: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPass:
    """One pass over a joint graph: from ``inputs`` to ``results``, and gradients that are handed over (which ->
    result). ``again`` are nodes of the other pass that this one computes again; ``backwards``: it comes from the last
    block to the first."""

    inputs: Sequence[fx.Node]
    results: Sequence[Any]
    gradients: Mapping[int, fx.Node]
    recomputable: Container[fx.Node]
    is_backward: bool


def schedule_pass(graph: fx.Graph, graph_pass: GraphPass) -> fx.Graph:
    """The graph of one pass. Where gradients are handed over, its last input is a ``Take``."""
    made = fx.Graph()
    copies = {node: made.placeholder(node.name) for node in graph_pass.inputs}
    for old, new in copies.items():
        new.meta = dict(old.meta)
    take = made.placeholder("take") if graph_pass.gradients else None
    order = _prefetch_zero3_gathers(_NodeScheduler(graph, graph_pass).run(), graph_pass)
    last = {item.gradient: item for item in order if isinstance(item, GradientHandOver)}
    terms = [item.addend for item in order if isinstance(item, GradientHandOver)]
    in_place = in_place_nodes(
        [item for item in order if isinstance(item, fx.Node)], graph_pass.inputs, [*graph_pass.results, *terms]
    )
    for item in order:
        if isinstance(item, GradientHandOver):
            made.call_function(
                hand_over_gradient,
                (take, item.gradient, copies[item.addend], item.owns_memory, last[item.gradient] is item),
            )
        else:
            copies[item] = _copy_node(made, item, copies)
            if item in in_place:
                copies[item].target = IN_PLACE_FORM[item.target]
    made.output([copies[node] if isinstance(node, fx.Node) else node for node in graph_pass.results])
    return made


def _copy_node(new_graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A node in the graph that is made; a gather is given its result's memory. Without, it works on lists of tensors, and
    gloo then corrupts the heap (torch 2.13.0: ``allgather_into_tensor_coalesced``)."""
    if node.target is not _ALL_GATHER:
        return new_graph.node_copy(node, lambda old: copies[old])
    local = copies[node.all_input_nodes[0]]
    memory = new_graph.call_function(torch.ops.aten.new_empty.default, (local, list(_shape(node))))
    gather = new_graph.call_function(_ALL_GATHER_OUT, (local, *node.args[1:]), {"out": memory})
    memory.meta, gather.meta = {"val": node.meta["val"]}, dict(node.meta)
    return gather


def hand_over_gradient(take: TakeGradient, gradient: int, addend: Tensor, owns_memory: bool, last: bool) -> None:
    """What a graph calls to give a gradient away."""
    take(gradient, addend, owns_memory, last)


class _NodeScheduler:
    """Finds the order of one pass; ``early`` maps a node to what may run, when it and others are made, out of turn."""

    def __init__(self, graph: fx.Graph, graph_pass: GraphPass) -> None:
        self.graph, self.graph_pass = graph, graph_pass
        self.addends = [
            (at, term) for at, node in graph_pass.gradients.items() for term in _addends(node, graph_pass.inputs)
        ]
        self.needed = _ancestors_until(
            [*(node for node in graph_pass.results if isinstance(node, fx.Node)), *(term for _, term in self.addends)],
            graph_pass.inputs,
        )
        self.scheduled: set[fx.Node] = set(graph_pass.inputs)
        self.order: list[fx.Node | GradientHandOver] = []
        self.waiting: dict[fx.Node, list[_EarlyItem]] = {}
        self.pending_hand_over: GradientHandOver | None = None

    def run(self) -> list[fx.Node | GradientHandOver]:
        at_once = [item for item in self._early_items() if self._register(item)]
        for item in at_once:
            self._run_ready(item)
        for node in self.graph.nodes:
            if node in self.needed and not self._runs_when_read(node):
                self._schedule_with_inputs(node)
        for node in self.graph_pass.results:
            if isinstance(node, fx.Node):
                self._schedule_with_inputs(node)
        self._flush_pending()
        handed = {(item.gradient, item.addend) for item in self.order if isinstance(item, GradientHandOver)}
        for at, term in self.addends:  # what hangs on nodes that are made when read
            if (at, term) not in handed:
                self._append_hand_over(self._hand_over_of(at, term))
        return self.order

    def _early_items(self) -> Iterable["_EarlyItem"]:
        for node in self.graph.nodes:
            if node in self.needed and starts_collective(node):
                before: Iterable[fx.Node] = node.all_input_nodes
                if node in self.graph_pass.recomputable and node.meta.get("custom", {}).get("regather"):
                    before = self._other_inputs_of_reader(node)
                elif self._runs_when_read(node):
                    continue
                yield _EarlyItem(
                    node=node, hand_over=None, prerequisites=self._prerequisites(before, [])[0], awaits_collective=False
                )
        for at, term in self.addends:
            anchors, starts = self._prerequisites([term], [])
            yield _EarlyItem(
                node=None, hand_over=self._hand_over_of(at, term), prerequisites=anchors, awaits_collective=bool(starts)
            )

    def _other_inputs_of_reader(self, start: fx.Node) -> list[fx.Node]:
        """What the first op that reads a gather reads besides."""
        inside, stack = {start}, [start]
        while stack:
            for user in stack.pop().users:
                if user in self.needed and user not in inside:
                    if user not in self.graph_pass.recomputable and user.target is not _WAIT and not is_view(user):
                        return [node for node in user.all_input_nodes if node not in inside]
                    inside.add(user)
                    stack.append(user)
        return start.all_input_nodes

    def _hand_over_of(self, gradient: int, addend: fx.Node) -> GradientHandOver:
        return GradientHandOver(gradient=gradient, addend=addend, owns_memory=self._owns_memory(addend))

    def _owns_memory(self, addend: fx.Node) -> bool:
        """Whether the memory of a term is its own: of no input, read by no other node, and all of it the term's."""
        held = [*(other for _, other in self.addends), *self.graph_pass.results, *self.graph_pass.inputs]
        node, readers = addend, 0
        while is_view(node):
            if held.count(node) > (node is addend) or self._num_users(node) > readers:
                return False
            node, readers = node.all_input_nodes[0], 1
        if node.op != "call_function" or held.count(node) > (node is addend) or self._num_users(node) > readers:
            return False
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and is_view(source):
            return False
        return prod(_shape(node)) == prod(_shape(addend))

    def _num_users(self, node: fx.Node) -> int:
        return sum(user in self.needed for user in node.users)

    def _prerequisites(self, nodes: Iterable[fx.Node], starts: list[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
        """What must be there before these can be made of it by views and what brings a tensor to a collective, and the
        collectives that are waited for on the way."""
        found: set[fx.Node] = set()
        for node in nodes:
            if node in self.scheduled:
                continue
            if node.target is _WAIT:
                starts += node.all_input_nodes
                found.update(node.all_input_nodes)
            elif is_view(node) or _is_redistribution(node):
                found |= self._prerequisites(node.all_input_nodes, starts)[0]
            else:
                found.add(node)
        return found, starts

    def _register(self, item: "_EarlyItem") -> bool:
        """Whether an item has nothing to wait for; else it is filed under all that it waits for."""
        for anchor in item.prerequisites:
            self.waiting.setdefault(anchor, []).append(item)
        return not item.prerequisites

    def _runs_when_read(self, node: fx.Node) -> bool:
        return (
            node.target is _WAIT
            or is_view(node)
            or block_and_recompute(node)[0] == ZERO3_GATHER
            or node in self.graph_pass.recomputable
        )

    def _schedule_with_inputs(self, wanted: fx.Node) -> None:
        stack = [wanted]
        while stack:
            node = stack[-1]
            missing = [source for source in node.all_input_nodes if source not in self.scheduled]
            if node in self.scheduled or not missing:
                stack.pop()
                if node not in self.scheduled:
                    self._schedule(node)
            else:
                stack.extend(reversed(missing))

    def _schedule(self, node: fx.Node) -> None:
        self.scheduled.add(node)
        self.order.append(node)
        for user in node.users:  # a tuple would keep all its parts
            if user.target is operator.getitem and user in self.needed:
                self._schedule_with_inputs(user)
        for item in self.waiting.pop(node, ()):
            item.prerequisites.discard(node)
            if not item.prerequisites:
                self._run_ready(item)

    def _run_ready(self, item: "_EarlyItem") -> None:
        if item.node is not None:
            self._schedule_with_inputs(item.node)
        elif item.awaits_collective:
            self._flush_pending()
            self.pending_hand_over = item.hand_over
        elif item.hand_over is not None:
            self._append_hand_over(item.hand_over)

    def _flush_pending(self) -> None:
        before, self.pending_hand_over = self.pending_hand_over, None
        if before is not None:
            self._append_hand_over(before)

    def _append_hand_over(self, hand_over: GradientHandOver) -> None:
        self._schedule_with_inputs(hand_over.addend)
        self.order.append(hand_over)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _EarlyItem:
    """A collective or a hand-over that runs when its ``anchors`` are there; ``behind``: it waits for a collective."""

    node: fx.Node | None
    hand_over: GradientHandOver | None
    prerequisites: set[fx.Node]
    awaits_collective: bool


def _prefetch_zero3_gathers(
    order: list[fx.Node | GradientHandOver], graph_pass: GraphPass
) -> list[fx.Node | GradientHandOver]:
    """The order with the gathers of each block's parameters where the block before it begins to wait for its own."""
    place = {item: at for at, item in enumerate(order) if isinstance(item, fx.Node)}
    starts = [
        item
        for item in order
        if isinstance(item, fx.Node) and starts_collective(item) and block_and_recompute(item)[0] == ZERO3_GATHER
    ]
    groups: dict[int, list[fx.Node]] = {}
    first: dict[int, int] = {}
    for start in starts:
        blocks = _reading_blocks(start)
        block = (max(blocks) if graph_pass.is_backward else min(blocks)) if blocks else ZERO3_GATHER
        groups.setdefault(block, []).append(start)
        waits = [place[user] for user in start.users if user in place]
        first[block] = min([*waits, first.get(block, len(order))])
    moved: set[fx.Node] = set()
    inserted: dict[int, list[fx.Node]] = {}
    blocks_in_turn = sorted(groups, key=lambda block: first[block])
    for before, block in zip([blocks_in_turn[:1], *([b] for b in blocks_in_turn)], blocks_in_turn, strict=False):
        for start in groups[block]:
            there = first[before[0]]
            preparation = _ancestors_until(
                [start], [*graph_pass.inputs, *moved], lambda node: block_and_recompute(node)[0] == ZERO3_GATHER
            )
            preparation = {node for node in preparation if place[node] >= there}  # others may read what comes before
            if any(place[node] >= there for node in _outside_inputs(preparation) - moved if node in place):
                continue
            inserted.setdefault(there, []).extend(sorted(preparation, key=place.__getitem__))
            moved |= preparation
    found: list[fx.Node | GradientHandOver] = []
    for at, item in enumerate(order):
        found += inserted.get(at, [])
        if not (isinstance(item, fx.Node) and item in moved):
            found.append(item)
    return found


def _outside_inputs(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What a set of nodes reads from outside."""
    inside = set(nodes)
    return {source for node in inside for source in node.all_input_nodes} - inside


def _reading_blocks(start: fx.Node) -> set[int]:
    """The blocks whose ops read what a gather brings."""
    found, stack, seen = set(), [start], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        block = block_and_recompute(node)[0]
        if block == ZERO3_GATHER or node.target is _WAIT:
            stack.extend(node.users)
        elif block >= 0:
            found.add(block)
    return found


def _ancestors_until(
    nodes: Iterable[fx.Node], ends: Iterable[fx.Node], follow: Callable[[fx.Node], bool] = lambda node: True
) -> set[fx.Node]:
    """These and all that they are made of, as far as ``ends``."""
    stop, found, stack = set(ends), set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node not in stop and follow(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _addends(gradient: fx.Node, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The terms of a gradient that is a sum nobody else reads."""
    if (
        gradient.target is not torch.ops.aten.add.Tensor
        or len(gradient.users) > 1
        or gradient.kwargs
        or gradient in inputs
    ):
        return [gradient]
    terms = [term for term in gradient.args if isinstance(term, fx.Node)]
    if len(terms) < 2 or any(_shape(term) != _shape(gradient) for term in terms):
        return [gradient]
    return [part for term in terms for part in _addends(term, inputs)]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def starts_collective(node: fx.Node) -> bool:
    """Whether a node starts a collective."""
    return node.op == "call_function" and "_c10d_functional" in str(node.target) and node.target is not _WAIT


def block_and_recompute(node: fx.Node) -> tuple[int, bool]:
    """The block that a node was traced in (-1: none), and whether the backward is to compute it again."""
    custom = node.meta.get("custom", {})
    return custom.get("block", -1), custom.get("recompute", False)


def _is_redistribution(node: fx.Node) -> bool:
    return bool(node.meta.get("custom", {}).get("redistribution")) and not starts_collective(node)


def is_view(node: fx.Node) -> bool:
    """Whether a node's result is memory of its input."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.returns:
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write
