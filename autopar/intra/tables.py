"""Prices of a block on one mesh: seconds and bytes for every choice of every node and every pair, before any weighing.

The mesh is (data axis, inner axes ...). The data axis always shards the batch: it is priced from outside, through
``local_batch`` and the parameters. On each inner axis every op chooses an option freely; a *strategy* of an op is an option
per inner axis. Metrics per micro-batch and node, and what they mean:

    FORWARD, CORE_FORWARD    seconds; CORE is attention, which selective recomputation redoes
    BACKWARD                 seconds
    SAVED, CORE_SAVED        bytes kept for the backward by one micro-batch; CORE is what selective recomputation frees
    BOUNDARY                 bytes of the block's inputs, which is all that full recomputation keeps
    WORKSPACE                bytes an op holds while it runs (a maximum over ops, never a sum)
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost.compute import host_calls, op_seconds, weight_gradient_s
from autopar.cost.execution import ExecutionModel
from autopar.cost.redistribute import MeshLinks, Placement, redistribute_s
from autopar.graph.ir import Graph, Value
from autopar.graph.profile import GraphProfile
from autopar.intra.copies import CopyCounter, LocalSizes
from autopar.intra.elimination import Eliminator
from autopar.intra.space import IN, OUT, BlockSpace, OpNode
from autopar.rules.atoms import Atom
from autopar.rules.options import Option, Token
from autopar.rules.rule import NO_LABEL, OpRule

Floats = NDArray[np.float64]
FORWARD, CORE_FORWARD, BACKWARD, SAVED, CORE_SAVED, BOUNDARY, WORKSPACE = range(7)
NUM_METRICS = 7
UNEVEN = 64  # a plain dim may be cut unevenly into k pieces when it has at least 64 k elements (1.6 % imbalance)
ROLES = ("B", "S", "R")  # named boundary placements of an axis: batch, second dim (sequence or channels), replicated

Allowed = Callable[[int, OpNode, Option], bool]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockTables:
    """``strategies[at]`` of ``space.ops[at]``: (options per inner axis). ``states[n]``: placements of boundary or hub node
    n's values, and ``boundary_tokens`` those of a block input or output under each boundary placement. ``kept[at]``
    are the bytes of tensors that SAVED and CORE_SAVED price for op ``at``, (strategies, 2); ``copies`` counts what a solution
    really keeps instead. ``node_metrics[n]`` is (choices, metrics), ``edges`` are (node, node, (choices, choices) forward seconds,
    the same backward). ``parameter_uses[at]`` lists, for op ``at``, (value, per strategy: local elements, axes with a
    partial gradient); axes count the data axis as 0, inner axes from 1. ``host_s`` are the seconds that the host takes to
    launch the forward, attention's part of it (which selective recompute launches again), and the backward; every
    collective adds ``sync_s``, as ranks wait for the slowest host. Communication behind compute costs ``contention`` of the
    shorter of the two (1: nothing overlaps). ``eliminator`` is made for the edges."""

    space: BlockSpace
    local_batch: int
    strategies: tuple[tuple[tuple[Option, ...], ...], ...]
    boundaries: tuple[tuple[str, ...], ...]
    node_metrics: tuple[Floats, ...]
    edges: tuple[tuple[int, int, Floats, Floats], ...]
    parameter_uses: tuple[tuple[tuple[Value, tuple[tuple[int, tuple[int, ...]], ...]], ...], ...]
    hub_states: tuple[tuple[tuple[Token, ...], ...], ...]
    boundary_tokens: dict[int, tuple[tuple[Token, ...], ...]]
    kept: tuple[Floats, ...]
    copies: CopyCounter
    host_s: tuple[float, float, float]
    sync_s: float
    contention: float
    eliminator: Eliminator


def forward_placement(tokens: Sequence[Token]) -> Placement:
    """Where the value lies: "G" is replicated in the forward pass."""
    return tuple("R" if token == "G" else token for token in tokens)


def gradient_placement(tokens: Sequence[Token]) -> Placement:
    """Where the gradient lies: partial for "G", replicated for "P" and "R"."""
    return tuple("P" if token == "G" else "R" if token == "P" else token for token in tokens)


def _may_be_uneven(rule: OpRule, labels: tuple[int, ...]) -> bool:
    """Whether the labels are one dim of a matmul or an element-wise op, or a dim that a view leaves as it is: heads,
    and dims that a view merges or splits, have to be cut evenly."""
    if not rule.groups:
        return len(labels) == 1 and rule.compute in ("matmul", "memory")
    return any((*ins, *outs) == labels and len(ins) == len(outs) == 1 for ins, outs in rule.groups)


def exchanges_batch(node: OpNode, graph: Graph) -> bool:
    """Whether an op exchanges statistics over the batch (batch norm), and so over the data axis."""
    return node.rule.inside is not None and any(
        label != NO_LABEL and node.rule.kinds[label] == "inside" and graph.batch.grows(size)
        for value, labels in zip(node.op.inputs, node.rule.inputs, strict=True)
        for size, label in zip(graph.values[value].shape, labels, strict=True)
        if label < len(node.rule.kinds)
    )


class TableBuilder:
    """Builds the tables of one block for one inner mesh and local batch; ``links`` are the inner axes' links,
    ``whole`` those of all axes, the data axis first."""

    def __init__(
        self,
        space: BlockSpace,
        profile: GraphProfile,
        savers: dict[int, tuple[tuple[tuple[int, ...], bool], ...]],
        core: frozenset[int],
        local_batch: int,
        links: MeshLinks,
        execution: ExecutionModel,
        whole: MeshLinks,
        allowed: Allowed | None = None,
        fused: dict[int, tuple[float, float]] | None = None,
    ) -> None:
        self.fused = fused or {}
        self._hiding: dict[int, Floats] = {}
        self.space, self.profile, self.local_batch = space, profile, local_batch
        self.links, self.execution, self.allowed, self.whole = links, execution, allowed, whole
        self.graph, self.sizes = space.graph, links.sizes
        self.savers, self.core = savers, core
        self.local = LocalSizes(space, self.sizes, local_batch)
        self.kept: list[Floats] = []
        self.redistributions: dict[tuple[tuple[Placement, ...], float], Floats] = {}

    def build(self) -> BlockTables:
        strategies = tuple(self._strategies(node) for node in self.space.ops)
        hub_states = tuple(self._states(hub.tokens, self.graph.values[hub.value]) for hub in self.space.hubs)
        boundaries = tuple(itertools.product(ROLES, repeat=len(self.sizes)))
        metrics = [np.zeros((len(boundaries), NUM_METRICS)) for _ in (IN, OUT)]
        for flow_value in self.space.block.inputs:
            if flow_value in self.space.tokens:
                value = self.graph.values[flow_value]
                for at, roles in enumerate(boundaries):
                    metrics[IN][at, BOUNDARY] += self._local_bytes(value, self.role_tokens(value, roles))
        calls = np.zeros(3)
        for node, chosen in zip(self.space.ops, strategies, strict=True):
            metrics.append(self._op_metrics(node, chosen))
            is_core = node.op.id in self.core
            forward, backward = host_calls(node.op, self.profile.ops[node.op.id], self.execution, is_core)
            calls += forward, forward * is_core, backward
        calls[[0, 2]] += self.execution.software.fixed_calls
        metrics += [np.zeros((len(states), NUM_METRICS)) for states in hub_states]
        boundary_tokens = {
            value: tuple(self.role_tokens(self.graph.values[value], roles) for roles in boundaries)
            for value in (*self.space.block.inputs, *self.space.block.outputs)
        }
        edges = self._edges(strategies, hub_states, boundaries)
        return BlockTables(
            space=self.space,
            local_batch=self.local_batch,
            strategies=strategies,
            boundaries=boundaries,
            node_metrics=tuple(metrics),
            edges=edges,
            parameter_uses=tuple(
                self._parameter_uses(node, chosen) for node, chosen in zip(self.space.ops, strategies, strict=True)
            ),
            hub_states=hub_states,
            boundary_tokens=boundary_tokens,
            kept=tuple(self.kept),
            copies=CopyCounter(
                self.space, self.profile, self._first_keeper(), self.core, strategies, boundary_tokens, self.local
            ),
            host_s=tuple(float(count * self.links.cluster.device.launch_s) for count in calls),  # type: ignore[arg-type]
            sync_s=self.execution.software.collective_calls
            * self.links.cluster.device.launch_s
            * (math.prod(self.sizes) - 1),
            contention=self.links.cluster.overlap_contention if self.execution.overlap else 1.0,
            eliminator=Eliminator(
                tuple(len(choices) for choices in metrics),
                tuple((source, target) for source, target, _, _ in edges),
                keep=(IN, OUT),
            ),
        )

    def _first_keeper(self) -> dict[int, int]:
        """Value whose memory is kept -> the first op of the graph that keeps it."""
        return {
            self.profile.owners[(*(op := self.graph.ops[number]).inputs, *op.outputs)[positions[0]]]: number
            for number, memories in self.savers.items()
            for positions, _ in memories
        }

    def role_tokens(self, value: Value, roles: Sequence[str]) -> tuple[Token, ...]:
        """How ``value`` lies under a named boundary placement; a value without the dim is replicated (its gradient
        partial), a scalar partial."""
        tokens: list[Token] = []
        for role in roles:
            dim = {"B": 0, "S": 1}.get(role)
            token: Token = "R"
            if dim is not None:
                token = "G" if value.requires_grad else "R"
                if not value.shape:
                    token = "P"
                elif dim < len(value.shape) - (1 if dim else 0) and (dim or self.graph.batch.grows(value.shape[0])):
                    token = self._first_atom(value, dim) or token
            tokens.append(token)
        return tuple(tokens)

    def _first_atom(self, value: Value, dim: int) -> Atom | None:
        atoms = [
            t for t in self.space.tokens.get(value.id, ()) if isinstance(t, Atom) and (t.dim, t.repeats) == (dim, 1)
        ]
        return max(atoms, key=lambda atom: atom.size) if atoms else None

    def _strategies(self, node: OpNode) -> tuple[tuple[Option, ...], ...]:
        per_axis = []
        for axis in range(len(self.sizes)):
            options = [o for o in node.options if self.allowed is None or self.allowed(axis, node, o)]
            per_axis.append(options or list(node.options[:1]))
        found = [chosen for chosen in itertools.product(*per_axis) if self._divides(node, chosen)]
        return tuple(found) or ((node.options[0],) * len(self.sizes),)

    def _divides(self, node: OpNode, chosen: tuple[Option, ...]) -> bool:
        degrees: dict[tuple[tuple[int, ...], int], int] = {}
        for option, size in zip(chosen, self.sizes, strict=True):
            if option.sharded:
                key = (option.labels, option.size)
                degrees[key] = degrees.get(key, 1) * size
        for (labels, size), degree in degrees.items():
            grows = self.graph.batch.grows(size)
            if grows and (size * self.local_batch) % self.graph.batch.traced:
                return False
            whole = self.graph.batch.scale(size, self.local_batch)
            if whole % degree and (grows or whole < UNEVEN * degree or not _may_be_uneven(node.rule, labels)):
                return False
        return True

    def _states(self, tokens: Sequence[Token], value: Value) -> tuple[tuple[Token, ...], ...]:
        found = []
        for state in itertools.product(tokens, repeat=len(self.sizes)):
            degrees: dict[Atom, int] = {}
            for token, size in zip(state, self.sizes, strict=True):
                if isinstance(token, Atom):
                    degrees[token] = degrees.get(token, 1) * size
            if all(atom.size >= degree for atom, degree in degrees.items()):
                found.append(state)
        return tuple(found)

    def _local_bytes(self, value: Value, tokens: Sequence[Token]) -> float:
        """Bytes of a value on the fullest rank at the local batch, per inner placement."""
        return self.local.num_bytes(value.id, tuple("R" if token == "G" else token for token in tokens))

    def _op_metrics(self, node: OpNode, chosen: tuple[tuple[Option, ...], ...]) -> Floats:
        op, profile = node.op, self.profile.ops[node.op.id]
        metrics = np.zeros((len(chosen), NUM_METRICS))
        degrees: dict[int, Floats] = {}
        for at, options in enumerate(chosen):
            for option, size in zip(options, self.sizes, strict=True):
                for label in option.labels[:1]:
                    degrees.setdefault(label, np.ones(len(chosen)))[at] *= size
        twins = {label: option.labels for options in chosen for option in options for label in option.labels[:1]}
        for first, labels in twins.items():
            for label in labels[1:]:
                if any(label == known for known, _ in node.rule.roles):
                    degrees[label] = degrees[first]
        device = self.links.cluster.device
        forward, backward = op_seconds(
            self.graph,
            op,
            node.rule,
            profile,
            self.local_batch,
            degrees,
            device,
            self.execution,
            self.fused.get(op.id, (0.0, 0.0)),
        )
        if self.execution.software.tensor_overlap and self.sizes:
            self._hiding[node.node] = self.execution.software.tensor_overlap * weight_gradient_s(
                self.graph, op, node.rule, self.local_batch, degrees, device, len(chosen)
            )
        is_core = op.id in self.core
        metrics[:, CORE_FORWARD if is_core else FORWARD] += forward
        metrics[:, BACKWARD] += backward
        self._add_inside(node, chosen, metrics)
        values = [self.graph.values[value] for value in (*op.inputs, *op.outputs)]
        tensors = np.zeros((len(chosen), 2))
        for at, options in enumerate(chosen):
            tokens = [tuple(option.inputs[i] for option in options) for i in range(len(op.inputs))] + [
                tuple(option.outputs[i] for option in options) for i in range(len(op.outputs))
            ]
            share = math.prod(size for option, size in zip(options, self.sizes, strict=True) if option.sharded)
            for positions, core in self.savers.get(op.id, ()):
                # Views of one memory keep all of it, or their own part where they were moved: never less than this.
                owner = self.graph.values[self.profile.owners[values[positions[0]].id]]
                parts = sum(self._local_bytes(values[i], tokens[i]) for i in positions)
                tensors[at, int(core)] += min(self._owner_bytes(owner, tokens[positions[0]]), parts)
            internal = sum(math.prod(shape) * item for shape, item in profile.saved_internal)
            grows = any(self.graph.batch.grows(size) for shape, _ in profile.saved_internal for size in shape)
            scale = self.local_batch / self.graph.batch.traced if grows else 1.0
            if not grows:  # statistics over the batch are whole where the batch is cut
                share = math.prod(
                    size
                    for option, size in zip(options, self.sizes, strict=True)
                    if option.sharded and not self.graph.batch.grows(option.size)
                )
            metrics[at, CORE_SAVED if is_core else SAVED] += internal * scale / share
            metrics[at, WORKSPACE] = sum(
                self._local_bytes(value, token)
                for value, token in zip(values, tokens, strict=True)
                if value.kind == "activation"
            )
        metrics[:, [SAVED, CORE_SAVED]] += tensors
        self.kept.append(tensors)
        return metrics

    def _owner_bytes(self, owner: Value, tokens: Sequence[Token]) -> float:
        size = self._local_bytes(owner, ("R",) * len(self.sizes))
        for token, degree in zip(tokens, self.sizes, strict=True):
            size /= degree if isinstance(token, Atom) else 1
        return size

    def _add_inside(self, node: OpNode, chosen: tuple[tuple[Option, ...], ...], metrics: Floats) -> None:
        """What the op exchanges by itself, over the axes that cut its label; the data axis cuts the batch always."""
        inside = node.rule.inside
        if inside is None:
            return
        links, first = (self.whole, 1) if exchanges_batch(node, self.graph) else (self.links, 0)
        scale = self.local_batch / self.graph.batch.traced
        for at, options in enumerate(chosen):
            axes = (0,) * first + tuple(first + axis for axis, option in enumerate(options) if option.inside)
            axes = tuple(axis for axis in axes if links.sizes[axis] > 1)
            if axes:
                share = math.prod(
                    size
                    for option, size in zip(options, self.sizes, strict=True)
                    if option.sharded and not option.inside and set(option.labels) & set(inside.labels)
                )
                for metric, size in (
                    *((FORWARD, size) for size in inside.forward_bytes),
                    *((BACKWARD, size) for size in inside.backward_bytes),
                ):
                    held = size * (scale if self.graph.batch.grows(size) else 1.0) / share
                    metrics[at, metric] += float(links.collective_s("all_reduce", held, axes))

    def _parameter_uses(
        self, node: OpNode, chosen: tuple[tuple[Option, ...], ...]
    ) -> tuple[tuple[Value, tuple[tuple[int, tuple[int, ...]], ...]], ...]:
        uses = []
        for position in node.parameters:
            value = self.graph.values[node.op.inputs[position]]
            per_strategy = []
            for options in chosen:
                tokens = [option.inputs[position] for option in options]
                shape = list(value.shape)
                for token, size in zip(tokens, self.sizes, strict=True):
                    if isinstance(token, Atom):
                        shape[token.dim] = -(-shape[token.dim] // size)
                elements = math.prod(shape)
                per_strategy.append((elements, tuple(1 + axis for axis, token in enumerate(tokens) if token == "G")))
            uses.append((value, tuple(per_strategy)))
        return tuple(uses)

    def _edges(
        self,
        strategies: Sequence[tuple[tuple[Option, ...], ...]],
        hub_states: Sequence[tuple[tuple[Token, ...], ...]],
        boundaries: Sequence[tuple[str, ...]],
    ) -> tuple[tuple[int, int, Floats, Floats], ...]:
        first_hub = 2 + len(strategies)
        edges = []
        for flow in self.space.flows:
            value = self.graph.values[flow.value]
            sides = []
            for node, position, outgoing in (
                (flow.source, flow.output, True),
                (flow.target, flow.input, False),
            ):
                if node in (IN, OUT):
                    sides.append([self.role_tokens(value, roles) for roles in boundaries])
                elif node >= first_hub:
                    sides.append(list(hub_states[node - first_hub]))
                else:
                    assert position is not None
                    sides.append(
                        [
                            tuple((o.outputs if outgoing else o.inputs)[position] for o in options)
                            for options in strategies[node - 2]
                        ]
                    )
            forward, backward = self._conversion(value, sides[0], sides[1])
            if (
                flow.target in self._hiding
            ):  # the gradient of a linear op's input travels while its weight's is computed
                backward = np.maximum(backward - self._hiding[flow.target], 0.0)
            edges.append((flow.source, flow.target, forward, backward))
        return tuple(edges)

    def _conversion(
        self, value: Value, sources: Sequence[tuple[Token, ...]], targets: Sequence[tuple[Token, ...]]
    ) -> tuple[Floats, Floats]:
        """(sources, targets) seconds to move the value forward and its gradient back."""
        placements: dict[Placement, int] = {}
        for tokens in (*sources, *targets):
            for placement in (forward_placement(tokens), gradient_placement(tokens)):
                placements.setdefault(placement, len(placements))
        tokens_seen: dict[Token, None] = {}
        for placement in placements:
            tokens_seen.update(dict.fromkeys(placement))
        for placement in itertools.product(tokens_seen, repeat=len(self.sizes)):
            placements.setdefault(placement, len(placements))
        whole = np.array([self._owner_bytes(value, ("R",) * len(self.sizes))])
        key = (tuple(placements), float(whole[0]))
        if key not in self.redistributions:
            self.redistributions[key] = redistribute_s(self.links, list(placements), whole)[0]
        table = self.redistributions[key]
        at = {
            side: [placements[make(tokens)] for tokens in tokens_of]
            for side, tokens_of, make in (
                ("source", sources, forward_placement),
                ("target", targets, forward_placement),
                ("source_gradient", sources, gradient_placement),
                ("target_gradient", targets, gradient_placement),
            )
        }
        forward = table[np.ix_(at["source"], at["target"])]
        if not value.requires_grad:
            return forward, np.zeros_like(forward)
        return forward, table[np.ix_(at["target_gradient"], at["source_gradient"])].T
