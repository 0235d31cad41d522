"""What the data axis does to each op of a block: it cuts the batch wherever an op can be cut along it.

Most ops can: their rule has the batch among its labels, and every tensor that grows with the batch lies as ``S(0)``
from op to op. Some cannot (a sort of all tokens, an op without a rule): they run whole on every data rank, and what
they read is gathered first. Some can in more than one way (the logits between all pairs of samples have the batch
twice). Which option each op takes is the same for every mesh: that of the least

    sum over values  bytes that collectives move on the way from maker to reader, and their gradients back
    + sum over ops that run whole though they grow with the batch   bytes / MEMORY + FLOPs / MATMUL

found exactly by elimination, over the options of the op's rule and two that every op has: to run whole with whole
gradients ("R"), and to run whole while gradients that are terms of a sum pass through ("G": a backward is linear in the
gradient). At the ends of a block a value lies along the first dim that grows with the batch; one that does not grow is
whole and its gradient a sum of terms; a scalar that carries a gradient (a loss) is itself a sum of terms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from autopar.graph.ir import Block, Graph, Value
from autopar.intra.mini_buckets import eliminator
from autopar.rules.atoms import Atom
from autopar.rules.options import Option, Token
from autopar.rules.rule import OpRule

MEMORY = 8.0
"""Bytes of memory traffic that take as long as one byte between GPUs of a node (3.3 TB/s against 0.4 TB/s)."""
MATMUL = 1500.0
"""FLOPs that take as long as one byte between GPUs of a node (600 TFLOP/s against 0.4 TB/s)."""
SLICE = 1e-6
"""What a local slice counts for, in bytes per byte: nothing, but that of two equal ways the one that cuts nothing
wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataAxis:
    """``options`` has one option per op node, ``hubs`` one token per hub, ``ends`` one per block input and output.
    ``summed`` are the parameters of which some use leaves a term of the gradient on every data rank.
    ``plain``: every tensor that grows with the batch stays cut along it, and nothing is exchanged over the axis, so
    that a rank's prices follow from its share of the batch alone."""

    options: tuple[Option, ...]
    hubs: tuple[Token, ...]
    ends: Mapping[int, Token]
    plain: bool
    summed: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """An op as this file sees it: its rule, the options that can run, and its tensors."""

    rule: OpRule
    options: tuple[Option, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


Link = tuple[int, int, int, int | None, int | None]
"""(value, source, target, output of the source, input of the target): nodes 0 and 1 are the block's ends, then the
calls, then the hubs; positions are None for ends and hubs."""


def end_token(graph: Graph, value: int) -> Token:
    """How a value lies on the data axis where blocks meet."""
    found = graph.values[value]
    for dim, size in enumerate(found.shape):
        if graph.batch.grows(size):
            return Atom(dim=dim, repeats=1, size=size)
    return "R" if not found.requires_grad else "G" if found.shape else "P"


def data_axis(
    graph: Graph, block: Block, calls: Sequence[Call], hubs: Sequence[int], links: Sequence[Link]
) -> DataAxis:
    """The options of all calls of a block; ``hubs`` are the values of its hubs."""
    ends = {value: end_token(graph, value) for value in (*block.inputs, *block.outputs)}
    options = [_options(graph, call) for call in calls]
    tokens = [_hub_tokens(graph, value, calls, options, ends) for value in hubs]
    first_hub = 2 + len(calls)

    def lies(node: int, value: int, output: int | None, position: int | None) -> list[Token]:
        """What each choice of a node makes of a value it gives (``output``) or takes (``position``)."""
        if node < 2:
            return [ends[value]]
        if node >= first_hub:
            return list(tokens[node - first_hub])
        if output is not None:
            return [option.outputs[output] for option in options[node - 2]]
        assert position is not None
        return [option.inputs[position] for option in options[node - 2]]

    sides = [
        (lies(source, value, out, None), lies(target, value, None, at)) for value, source, target, out, at in links
    ]
    counts = (1, 1, *(len(chosen) for chosen in options), *(len(chosen) for chosen in tokens))
    node_costs = [np.zeros((1, count)) for count in counts]
    for at, (call, chosen) in enumerate(zip(calls, options, strict=True)):
        node_costs[2 + at][0] = [0.0 if option.sharded else _alike(graph, call) for option in chosen]
    edge_costs = [
        np.array([[[_move(graph.values[link[0]], a, b) for b in taken] for a in made]])
        for link, (made, taken) in zip(links, sides, strict=True)
    ]
    edges = tuple((link[1], link[2]) for link in links)
    choices = eliminator(counts, edges).solve(node_costs, edge_costs).backtrack_all()[:, 0]
    picked = tuple(chosen[choices[2 + at]] for at, chosen in enumerate(options))
    still = all(
        text_of(made[choices[link[1]]]) == text_of(taken[choices[link[2]]])
        for link, (made, taken) in zip(links, sides, strict=True)
    )
    cut = all(
        isinstance(token, Atom)
        for call, option in zip(calls, picked, strict=True)
        for value, token in zip((*call.inputs, *call.outputs), (*option.inputs, *option.outputs), strict=True)
        if any(graph.batch.grows(size) for size in value.shape)
    )
    return DataAxis(
        options=picked,
        hubs=tuple(chosen[choices[first_hub + at]] for at, chosen in enumerate(tokens)),
        ends=ends,
        plain=still and cut and not any(option.inside for option in picked),
        summed=frozenset(
            value.id
            for call, option in zip(calls, picked, strict=True)
            for value, token in zip(call.inputs, option.inputs, strict=True)
            if value.kind == "parameter" and token == "G"
        ),
    )


def text_of(token: Token) -> str:
    """The token as placements write it, repeats at the traced batch; "G" stays itself."""
    return token.text if isinstance(token, Atom) else token


def _options(graph: Graph, call: Call) -> tuple[Option, ...]:
    """Cuts of the batch first, so that of equal ways they win; then partial gradients, whole, and partial sums."""
    found = [option for option in call.options if option.sharded and graph.batch.grows(option.size)]
    passing = Option(
        inputs=tuple("G" if value.requires_grad else "R" for value in call.inputs),
        outputs=tuple("G" if value.requires_grad else "R" for value in call.outputs),
    )
    found += [passing, *(option for option in call.options if not option.sharded)]
    return tuple(dict.fromkeys(found))


def _hub_tokens(
    graph: Graph,
    value: int,
    calls: Sequence[Call],
    options: Sequence[tuple[Option, ...]],
    ends: Mapping[int, Token],
) -> tuple[Token, ...]:
    found: dict[str, Token] = {}
    if value in ends:
        found[text_of(ends[value])] = ends[value]
    for call, chosen in zip(calls, options, strict=True):
        for option in chosen:
            tensors = zip((*call.inputs, *call.outputs), (*option.inputs, *option.outputs), strict=True)
            for tensor, token in tensors:
                if tensor.id == value:
                    found.setdefault(text_of(token), token)
    always: tuple[Token, ...] = ("G", "R") if graph.values[value].requires_grad else ("R",)
    for token in always:
        found.setdefault(text_of(token), token)
    return tuple(found.values())


def _alike(graph: Graph, call: Call) -> float:
    """What it counts for that all data ranks run an op on the whole micro-batch."""
    tensors = (*call.inputs, *call.outputs)
    if call.rule.compute == "free" or not any(graph.batch.grows(size) for value in tensors for size in value.shape):
        return 0.0
    sizes = dict(call.rule.sizes)
    for value, dims in zip(tensors, (*call.rule.inputs, *call.rule.outputs), strict=True):
        sizes.update(zip(dims, value.shape, strict=True))
    multiplied = {label for label, role in call.rule.roles if role in "bhmnkqd"}
    flops = 2.0 * prod(sizes.get(label, 1) for label in multiplied) if multiplied else 0.0
    return sum(prod(value.shape) * value.itemsize for value in tensors) / MEMORY + flops / MATMUL


def _move(value: Value, made: Token, taken: Token) -> float:
    """Bytes that collectives move forward and back, in units of the whole tensor's bytes."""
    forward = _step("R" if made == "G" else made, "R" if taken == "G" else taken)
    backward = _step(_gradient(taken), _gradient(made)) if value.requires_grad else 0.0
    return (forward + backward) * prod(value.shape) * value.itemsize


def _gradient(token: Token) -> Token:
    return "P" if token == "G" else "R" if token == "P" else token


def _step(source: Token, target: Token) -> float:
    if text_of(source) == text_of(target):
        return 0.0
    if source == "R":
        return SLICE
    if source == "P":
        return 2.0 if target == "R" else 1.0
    return 1.0 if isinstance(target, str) else 0.5
