"""The order in which the nodes of a lowered graph run.

    as traced       all but what follows
    when read       views, waits for collectives, and what the backward recomputes: right before the first reader
    when ready      a collective starts, and a gradient is handed over, as soon as its inputs are computed
    with gradient   a regather for the backward of an op starts as soon as the gradient of the op's result is computed
    prefetch        the gathers of a block's ZeRO-3 parameters start when the block before it first waits for its own
    delayed wait    a gradient's reduce-scatter is waited for only after the next one has started

So at most two blocks' parameters are gathered at a time, and communication of gradients and of the next parameters overlaps
with compute. A gradient that is a sum is handed over addend by addend. The nodes that prepare a tensor for a collective
differ from rank to rank (padding, zeros): no rule depends on them, so that the collectives of all ranks match.
"""

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from autopar.runtime.lower.fx_nodes import (
    WAIT,
    ZERO3_GATHER,
    ancestors_until,
    block_and_recompute,
    is_view,
    starts_collective,
)
from autopar.runtime.lower.in_place import IN_PLACE_FORM, in_place_nodes
from autopar.runtime.lower.prefetch_gathers import prefetch_zero3_gathers

TakeGradient = Callable[[int, Tensor, bool, bool], None]
"""Called with (position of the gradient, an addend of it, whether its memory may be taken over, whether it is the last)."""

_ALL_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
_ALL_GATHER_OUT = torch.ops._c10d_functional.all_gather_into_tensor_out.default


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientHandOver:
    """Hands an addend of the gradient at a position over; ``owns_memory``: nothing else uses the addend's memory."""

    gradient: int
    addend: fx.Node
    owns_memory: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPass:
    """One pass over a joint graph: from ``inputs`` to ``results``, and to ``gradients`` (position -> node) that are handed
    over. ``recomputable`` are the nodes of the other pass that this one may recompute; ``is_backward``: it runs the last
    block first."""

    inputs: Sequence[fx.Node]
    results: Sequence[Any]
    gradients: Mapping[int, fx.Node]
    recomputable: Container[fx.Node]
    is_backward: bool


def schedule_pass(graph: fx.Graph, graph_pass: GraphPass) -> fx.Graph:
    """The graph of one pass of a joint graph. Where gradients are handed over, its last input is a ``TakeGradient``."""
    new_graph = fx.Graph()
    copies = {node: new_graph.placeholder(node.name) for node in graph_pass.inputs}
    for old, new in copies.items():
        new.meta = dict(old.meta)
    take = new_graph.placeholder("take") if graph_pass.gradients else None
    order = _NodeScheduler(graph, graph_pass).run()
    order = prefetch_zero3_gathers(order, graph_pass.inputs, is_backward=graph_pass.is_backward)
    last = {item.gradient: item for item in order if isinstance(item, GradientHandOver)}
    addends = [item.addend for item in order if isinstance(item, GradientHandOver)]
    in_place = in_place_nodes(
        [item for item in order if isinstance(item, fx.Node)], graph_pass.inputs, [*graph_pass.results, *addends]
    )
    for item in order:
        if isinstance(item, GradientHandOver):
            new_graph.call_function(
                hand_over_gradient,
                (take, item.gradient, copies[item.addend], item.owns_memory, last[item.gradient] is item),
            )
        else:
            copies[item] = _copy_node(new_graph, item, copies)
            if item in in_place:
                copies[item].target = IN_PLACE_FORM[item.target]
    new_graph.output([copies[node] if isinstance(node, fx.Node) else node for node in graph_pass.results])
    return new_graph


def _copy_node(new_graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A node copied to the new graph. An all-gather is given the memory of its result: without, it works on lists of
    tensors, and gloo then corrupts the heap (torch 2.13.0: ``allgather_into_tensor_coalesced``)."""
    if node.target is not _ALL_GATHER:
        return new_graph.node_copy(node, lambda old: copies[old])
    local = copies[node.all_input_nodes[0]]
    memory = new_graph.call_function(torch.ops.aten.new_empty.default, (local, list(_shape(node))))
    gather = new_graph.call_function(_ALL_GATHER_OUT, (local, *node.args[1:]), {"out": memory})
    memory.meta, gather.meta = {"val": node.meta["val"]}, dict(node.meta)
    return gather


def hand_over_gradient(take: TakeGradient, gradient: int, addend: Tensor, owns_memory: bool, last: bool) -> None:
    """The function that a scheduled graph calls to hand an addend of a gradient over."""
    take(gradient, addend, owns_memory, last)


class _NodeScheduler:
    """Finds the order of one pass. ``needed`` are its nodes; ``waiting`` maps a node to the items that run out of turn, as
    soon as it and their other prerequisites are scheduled; ``pending_hand_over`` is the one whose wait is delayed."""

    def __init__(self, graph: fx.Graph, graph_pass: GraphPass) -> None:
        self.graph, self.graph_pass = graph, graph_pass
        self.addends = [
            (position, addend)
            for position, node in graph_pass.gradients.items()
            for addend in _addends(node, graph_pass.inputs)
        ]
        self.needed = ancestors_until(
            [
                *(node for node in graph_pass.results if isinstance(node, fx.Node)),
                *(addend for _, addend in self.addends),
            ],
            graph_pass.inputs,
        )
        self.scheduled: set[fx.Node] = set(graph_pass.inputs)
        self.order: list[fx.Node | GradientHandOver] = []
        self.waiting: dict[fx.Node, list[_EarlyItem]] = {}
        self.pending_hand_over: GradientHandOver | None = None

    def run(self) -> list[fx.Node | GradientHandOver]:
        """The pass's nodes and hand-overs in the order in which they run."""
        ready = [item for item in self._early_items() if self._register(item)]
        for item in ready:
            self._run_ready(item)
        for node in self.graph.nodes:
            if node in self.needed and not self._runs_when_read(node):
                self._schedule_with_inputs(node)
        for node in self.graph_pass.results:
            if isinstance(node, fx.Node):
                self._schedule_with_inputs(node)
        self._flush_pending()
        handed_over = {(item.gradient, item.addend) for item in self.order if isinstance(item, GradientHandOver)}
        for position, addend in self.addends:  # those that depend on nodes which run when read
            if (position, addend) not in handed_over:
                self._append_hand_over(self._hand_over_of(position, addend))
        return self.order

    def _early_items(self) -> Iterable["_EarlyItem"]:
        """What runs out of turn: the collectives and hand-overs of the pass."""
        for node in self.graph.nodes:
            if node in self.needed and starts_collective(node):
                inputs: Iterable[fx.Node] = node.all_input_nodes
                if node in self.graph_pass.recomputable and node.meta.get("custom", {}).get("regather"):
                    inputs = self._other_inputs_of_reader(node)
                elif self._runs_when_read(node):
                    continue
                yield _EarlyItem(
                    node=node, hand_over=None, prerequisites=self._prerequisites(inputs, [])[0], awaits_collective=False
                )
        for position, addend in self.addends:
            prerequisites, collectives = self._prerequisites([addend], [])
            yield _EarlyItem(
                node=None,
                hand_over=self._hand_over_of(position, addend),
                prerequisites=prerequisites,
                awaits_collective=bool(collectives),
            )

    def _other_inputs_of_reader(self, start: fx.Node) -> list[fx.Node]:
        """The other inputs of the first op that reads the gather started by ``start``."""
        inside, stack = {start}, [start]
        while stack:
            for user in stack.pop().users:
                if user in self.needed and user not in inside:
                    if user not in self.graph_pass.recomputable and user.target is not WAIT and not is_view(user):
                        return [node for node in user.all_input_nodes if node not in inside]
                    inside.add(user)
                    stack.append(user)
        return start.all_input_nodes

    def _hand_over_of(self, gradient: int, addend: fx.Node) -> GradientHandOver:
        return GradientHandOver(gradient=gradient, addend=addend, owns_memory=self._owns_memory(addend))

    def _owns_memory(self, addend: fx.Node) -> bool:
        """Whether an addend's memory is its own: not an input's, read by no other node, and all of it the addend's."""
        outlives = [*(other for _, other in self.addends), *self.graph_pass.results, *self.graph_pass.inputs]
        node, num_users = addend, 0
        while is_view(node):
            if outlives.count(node) > (node is addend) or self._num_users(node) > num_users:
                return False
            node, num_users = node.all_input_nodes[0], 1
        if node.op != "call_function" or outlives.count(node) > (node is addend) or self._num_users(node) > num_users:
            return False
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and is_view(source):
            return False
        return prod(_shape(node)) == prod(_shape(addend))

    def _num_users(self, node: fx.Node) -> int:
        return sum(user in self.needed for user in node.users)

    def _prerequisites(
        self, nodes: Iterable[fx.Node], collectives: list[fx.Node]
    ) -> tuple[set[fx.Node], list[fx.Node]]:
        """The unscheduled nodes from which these can be computed by nothing but views, redistributions and waits; and
        ``collectives`` with those added that are waited for."""
        found: set[fx.Node] = set()
        for node in nodes:
            if node in self.scheduled:
                continue
            if node.target is WAIT:
                collectives += node.all_input_nodes
                found.update(node.all_input_nodes)
            elif is_view(node) or _is_redistribution(node):
                found |= self._prerequisites(node.all_input_nodes, collectives)[0]
            else:
                found.add(node)
        return found, collectives

    def _register(self, item: "_EarlyItem") -> bool:
        """Register an item under each of its prerequisites; returns whether it has none and can run now."""
        for prerequisite in item.prerequisites:
            self.waiting.setdefault(prerequisite, []).append(item)
        return not item.prerequisites

    def _runs_when_read(self, node: fx.Node) -> bool:
        return (
            node.target is WAIT
            or is_view(node)
            or block_and_recompute(node)[0] == ZERO3_GATHER
            or node in self.graph_pass.recomputable
        )

    def _schedule_with_inputs(self, target: fx.Node) -> None:
        """Schedule a node after those of its inputs, and of theirs, that are not scheduled yet."""
        stack = [target]
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
        for user in node.users:  # unpacked at once: a tuple would keep all its elements alive
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
        pending, self.pending_hand_over = self.pending_hand_over, None
        if pending is not None:
            self._append_hand_over(pending)

    def _append_hand_over(self, hand_over: GradientHandOver) -> None:
        self._schedule_with_inputs(hand_over.addend)
        self.order.append(hand_over)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _EarlyItem:
    """A collective (``node``) or a hand-over that runs as soon as its ``prerequisites``, those not yet scheduled, are
    empty. ``awaits_collective``: the hand-over waits for one, and is delayed."""

    node: fx.Node | None
    hand_over: GradientHandOver | None
    prerequisites: set[fx.Node]
    awaits_collective: bool


def _addends(gradient: fx.Node, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The addends of a gradient that is a sum which nothing else reads; else the gradient itself."""
    if (
        gradient.target is not torch.ops.aten.add.Tensor
        or len(gradient.users) > 1
        or gradient.kwargs
        or gradient in inputs
    ):
        return [gradient]
    operands = [operand for operand in gradient.args if isinstance(operand, fx.Node)]
    if len(operands) < 2 or any(_shape(operand) != _shape(gradient) for operand in operands):
        return [gradient]
    return [addend for operand in operands for addend in _addends(operand, inputs)]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _is_redistribution(node: fx.Node) -> bool:
    return bool(node.meta.get("custom", {}).get("redistribution")) and not starts_collective(node)
