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

from autopar.runtime.lower.in_place import IN_PLACE, overwrites

GATHER = -2  # the block of what gathers ZeRO-3 parameters
SENDS = -3  # the block of what brings activations to how they are sent

Take = Callable[[int, Tensor, bool, bool], None]
"""Takes (which gradient, a term of it, whether nobody else holds the term's memory, whether it is the last term)."""

_WAIT = torch.ops._c10d_functional.wait_tensor.default
_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
_GATHER_OUT = torch.ops._c10d_functional.all_gather_into_tensor_out.default


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """Gives a term of gradient ``at`` to who takes it; ``owned``: nobody else holds its memory."""

    at: int
    term: fx.Node
    owned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass over a joint graph: from ``inputs`` to ``results``, and gradients that are handed over (which ->
    result). ``again`` are nodes of the other pass that this one computes again; ``backwards``: it comes from the last
    block to the first."""

    inputs: Sequence[fx.Node]
    results: Sequence[Any]
    gradients: Mapping[int, fx.Node]
    again: Container[fx.Node]
    backwards: bool


def arranged(graph: fx.Graph, one: Pass) -> fx.Graph:
    """The graph of one pass. Where gradients are handed over, its last input is a ``Take``."""
    made = fx.Graph()
    copies = {node: made.placeholder(node.name) for node in one.inputs}
    for old, new in copies.items():
        new.meta = dict(old.meta)
    take = made.placeholder("take") if one.gradients else None
    order = _ahead(_Order(graph, one).run(), one)
    last = {item.at: item for item in order if isinstance(item, HandOver)}
    terms = [item.term for item in order if isinstance(item, HandOver)]
    in_place = overwrites([item for item in order if isinstance(item, fx.Node)], one.inputs, [*one.results, *terms])
    for item in order:
        if isinstance(item, HandOver):
            made.call_function(hand_over, (take, item.at, copies[item.term], item.owned, last[item.at] is item))
        else:
            copies[item] = _copied(made, item, copies)
            if item in in_place:
                copies[item].target = IN_PLACE[item.target]
    made.output([copies[node] if isinstance(node, fx.Node) else node for node in one.results])
    return made


def _copied(made: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A node in the graph that is made; a gather is given its result's memory. Without, it works on lists of tensors, and
    gloo then corrupts the heap (torch 2.13.0: ``allgather_into_tensor_coalesced``)."""
    if node.target is not _GATHER:
        return made.node_copy(node, lambda old: copies[old])
    local = copies[node.all_input_nodes[0]]
    memory = made.call_function(torch.ops.aten.new_empty.default, (local, list(_shape(node))))
    gather = made.call_function(_GATHER_OUT, (local, *node.args[1:]), {"out": memory})
    memory.meta, gather.meta = {"val": node.meta["val"]}, dict(node.meta)
    return gather


def hand_over(take: Take, at: int, term: Tensor, owned: bool, last: bool) -> None:
    """What a graph calls to give a gradient away."""
    take(at, term, owned, last)


class _Order:
    """Finds the order of one pass; ``early`` maps a node to what may run, when it and others are made, out of turn."""

    def __init__(self, graph: fx.Graph, one: Pass) -> None:
        self.graph, self.one = graph, one
        self.terms = [(at, term) for at, node in one.gradients.items() for term in _terms(node, one.inputs)]
        self.needed = _closure(
            [*(node for node in one.results if isinstance(node, fx.Node)), *(term for _, term in self.terms)],
            one.inputs,
        )
        self.done: set[fx.Node] = set(one.inputs)
        self.order: list[fx.Node | HandOver] = []
        self.early: dict[fx.Node, list[_Early]] = {}
        self.behind: HandOver | None = None

    def run(self) -> list[fx.Node | HandOver]:
        at_once = [item for item in self._out_of_turn() if self._lies_in_wait(item)]
        for item in at_once:
            self._run_early(item)
        for node in self.graph.nodes:
            if node in self.needed and not self._is_late(node):
                self._make(node)
        for node in self.one.results:
            if isinstance(node, fx.Node):
                self._make(node)
        self._catch_up()
        handed = {(item.at, item.term) for item in self.order if isinstance(item, HandOver)}
        for at, term in self.terms:  # what hangs on nodes that are made when read
            if (at, term) not in handed:
                self._hand_over(self._handing(at, term))
        return self.order

    def _out_of_turn(self) -> Iterable["_Early"]:
        for node in self.graph.nodes:
            if node in self.needed and is_start(node):
                before: Iterable[fx.Node] = node.all_input_nodes
                if node in self.one.again and node.meta.get("custom", {}).get("beside"):
                    before = self._beside(node)
                elif self._is_late(node):
                    continue
                yield _Early(node=node, over=None, anchors=self._anchors(before, [])[0], behind=False)
        for at, term in self.terms:
            anchors, starts = self._anchors([term], [])
            yield _Early(node=None, over=self._handing(at, term), anchors=anchors, behind=bool(starts))

    def _beside(self, start: fx.Node) -> list[fx.Node]:
        """What the first op that reads a gather reads besides."""
        inside, stack = {start}, [start]
        while stack:
            for user in stack.pop().users:
                if user in self.needed and user not in inside:
                    if user not in self.one.again and user.target is not _WAIT and not is_view(user):
                        return [node for node in user.all_input_nodes if node not in inside]
                    inside.add(user)
                    stack.append(user)
        return start.all_input_nodes

    def _handing(self, at: int, term: fx.Node) -> HandOver:
        return HandOver(at=at, term=term, owned=self._is_owned(term))

    def _is_owned(self, term: fx.Node) -> bool:
        """Whether the memory of a term is its own: of no input, read by no other node, and all of it the term's."""
        held = [*(other for _, other in self.terms), *self.one.results, *self.one.inputs]
        node, readers = term, 0
        while is_view(node):
            if held.count(node) > (node is term) or self._num_readers(node) > readers:
                return False
            node, readers = node.all_input_nodes[0], 1
        if node.op != "call_function" or held.count(node) > (node is term) or self._num_readers(node) > readers:
            return False
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and is_view(source):
            return False
        return prod(_shape(node)) == prod(_shape(term))

    def _num_readers(self, node: fx.Node) -> int:
        return sum(user in self.needed for user in node.users)

    def _anchors(self, nodes: Iterable[fx.Node], starts: list[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
        """What must be there before these can be made of it by views and what brings a tensor to a collective, and the
        collectives that are waited for on the way."""
        found: set[fx.Node] = set()
        for node in nodes:
            if node in self.done:
                continue
            if node.target is _WAIT:
                starts += node.all_input_nodes
                found.update(node.all_input_nodes)
            elif is_view(node) or _moves(node):
                found |= self._anchors(node.all_input_nodes, starts)[0]
            else:
                found.add(node)
        return found, starts

    def _lies_in_wait(self, item: "_Early") -> bool:
        """Whether an item has nothing to wait for; else it is filed under all that it waits for."""
        for anchor in item.anchors:
            self.early.setdefault(anchor, []).append(item)
        return not item.anchors

    def _is_late(self, node: fx.Node) -> bool:
        return node.target is _WAIT or is_view(node) or marked(node)[0] == GATHER or node in self.one.again

    def _make(self, wanted: fx.Node) -> None:
        stack = [wanted]
        while stack:
            node = stack[-1]
            missing = [source for source in node.all_input_nodes if source not in self.done]
            if node in self.done or not missing:
                stack.pop()
                if node not in self.done:
                    self._append(node)
            else:
                stack.extend(reversed(missing))

    def _append(self, node: fx.Node) -> None:
        self.done.add(node)
        self.order.append(node)
        for user in node.users:  # a tuple would keep all its parts
            if user.target is operator.getitem and user in self.needed:
                self._make(user)
        for item in self.early.pop(node, ()):
            item.anchors.discard(node)
            if not item.anchors:
                self._run_early(item)

    def _run_early(self, item: "_Early") -> None:
        if item.node is not None:
            self._make(item.node)
        elif item.behind:
            self._catch_up()
            self.behind = item.over
        elif item.over is not None:
            self._hand_over(item.over)

    def _catch_up(self) -> None:
        before, self.behind = self.behind, None
        if before is not None:
            self._hand_over(before)

    def _hand_over(self, over: HandOver) -> None:
        self._make(over.term)
        self.order.append(over)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Early:
    """A collective or a hand-over that runs when its ``anchors`` are there; ``behind``: it waits for a collective."""

    node: fx.Node | None
    over: HandOver | None
    anchors: set[fx.Node]
    behind: bool


def _ahead(order: list[fx.Node | HandOver], one: Pass) -> list[fx.Node | HandOver]:
    """The order with the gathers of each block's parameters where the block before it begins to wait for its own."""
    place = {item: at for at, item in enumerate(order) if isinstance(item, fx.Node)}
    starts = [item for item in order if isinstance(item, fx.Node) and is_start(item) and marked(item)[0] == GATHER]
    groups: dict[int, list[fx.Node]] = {}
    first: dict[int, int] = {}
    for start in starts:
        blocks = _readers(start)
        block = (max(blocks) if one.backwards else min(blocks)) if blocks else GATHER
        groups.setdefault(block, []).append(start)
        waits = [place[user] for user in start.users if user in place]
        first[block] = min([*waits, first.get(block, len(order))])
    moved: set[fx.Node] = set()
    inserted: dict[int, list[fx.Node]] = {}
    blocks_in_turn = sorted(groups, key=lambda block: first[block])
    for before, block in zip([blocks_in_turn[:1], *([b] for b in blocks_in_turn)], blocks_in_turn, strict=False):
        for start in groups[block]:
            there = first[before[0]]
            preparation = _closure([start], [*one.inputs, *moved], lambda node: marked(node)[0] == GATHER)
            preparation = {node for node in preparation if place[node] >= there}  # others may read what comes before
            if any(place[node] >= there for node in _sources(preparation) - moved if node in place):
                continue
            inserted.setdefault(there, []).extend(sorted(preparation, key=place.__getitem__))
            moved |= preparation
    found: list[fx.Node | HandOver] = []
    for at, item in enumerate(order):
        found += inserted.get(at, [])
        if not (isinstance(item, fx.Node) and item in moved):
            found.append(item)
    return found


def _sources(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What a set of nodes reads from outside."""
    inside = set(nodes)
    return {source for node in inside for source in node.all_input_nodes} - inside


def _readers(start: fx.Node) -> set[int]:
    """The blocks whose ops read what a gather brings."""
    found, stack, seen = set(), [start], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        block = marked(node)[0]
        if block == GATHER or node.target is _WAIT:
            stack.extend(node.users)
        elif block >= 0:
            found.add(block)
    return found


def _closure(
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


def _terms(gradient: fx.Node, inputs: Sequence[fx.Node]) -> list[fx.Node]:
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
    return [part for term in terms for part in _terms(term, inputs)]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def is_start(node: fx.Node) -> bool:
    """Whether a node starts a collective."""
    return node.op == "call_function" and "_c10d_functional" in str(node.target) and node.target is not _WAIT


def marked(node: fx.Node) -> tuple[int, bool]:
    """The block that a node was traced in (-1: none), and whether the backward is to compute it again."""
    custom = node.meta.get("custom", {})
    return custom.get("block", -1), custom.get("recompute", False)


def _moves(node: fx.Node) -> bool:
    return bool(node.meta.get("custom", {}).get("moves")) and not is_start(node)


def is_view(node: fx.Node) -> bool:
    """Whether a node's result is memory of its input."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.returns:
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write
