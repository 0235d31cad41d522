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

from autopar.cost.compute import op_seconds
from autopar.cost.execution import ExecutionModel
from autopar.cost.redistribute import MeshLinks, Placement, redistribute_s
from autopar.graph.ir import Value
from autopar.graph.profile import GraphProfile
from autopar.intra.elimination import Eliminator
from autopar.intra.space import IN, OUT, BlockSpace, OpNode
from autopar.rules.atoms import Atom
from autopar.rules.options import Option, Token

Floats = NDArray[np.float64]
FORWARD, CORE_FORWARD, BACKWARD, SAVED, CORE_SAVED, BOUNDARY, WORKSPACE = range(7)
NUM_METRICS = 7
UNEVEN = 64  # a plain dim may be cut unevenly into k pieces when it has at least 64 k elements (1.6 % imbalance)
ROLES = ("B", "S", "R")  # named boundary placements of an axis: batch, second dim (sequence or channels), replicated

Allowed = Callable[[int, OpNode, Option], bool]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockTables:
    """``strategies[at]`` of ``space.ops[at]``: (options per inner axis). ``states[n]``: placements of boundary or hub node
    n's values. ``node_metrics[n]`` is (choices, metrics), ``edges`` are (node, node, (choices, choices) forward seconds,
    the same backward), ``eliminator`` is made for them. ``parameter_uses[at]`` lists, for op ``at``, (value, per strategy: local elements, axes with a
    partial gradient); axes count the data axis as 0, inner axes from 1."""

    space: BlockSpace
    local_batch: int
    strategies: tuple[tuple[tuple[Option, ...], ...], ...]
    boundaries: tuple[tuple[str, ...], ...]
    node_metrics: tuple[Floats, ...]
    edges: tuple[tuple[int, int, Floats, Floats], ...]
    parameter_uses: tuple[tuple[tuple[Value, tuple[tuple[int, tuple[int, ...]], ...]], ...], ...]
    hub_states: tuple[tuple[tuple[Token, ...], ...], ...]
    num_kernels: tuple[int, int]
    launch_s: float
    eliminator: Eliminator


def forward_placement(tokens: Sequence[Token]) -> Placement:
    """Where the value lies: "G" is replicated in the forward pass."""
    return tuple("R" if token == "G" else token for token in tokens)


def gradient_placement(tokens: Sequence[Token]) -> Placement:
    """Where the gradient lies: partial for "G", replicated for "P" and "R"."""
    return tuple("P" if token == "G" else "R" if token == "P" else token for token in tokens)


class TableBuilder:
    """Builds the tables of one block for one inner mesh and local batch; ``links`` are the inner axes' links."""

    def __init__(
        self,
        space: BlockSpace,
        profile: GraphProfile,
        savers: dict[int, tuple[tuple[int, bool], ...]],
        core: frozenset[int],
        local_batch: int,
        links: MeshLinks,
        execution: ExecutionModel,
        allowed: Allowed | None = None,
    ) -> None:
        self.space, self.profile, self.local_batch = space, profile, local_batch
        self.links, self.execution, self.allowed = links, execution, allowed
        self.graph, self.sizes = space.graph, links.sizes
        self.savers, self.core = savers, core
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
        forward_kernels = backward_kernels = 0
        for node, chosen in zip(self.space.ops, strategies, strict=True):
            metrics.append(self._op_metrics(node, chosen))
            profile = self.profile.ops[node.op.id]
            forward_kernels += profile.forward_kernels
            backward_kernels += profile.backward_kernels
        metrics += [np.zeros((len(states), NUM_METRICS)) for states in hub_states]
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
            num_kernels=(forward_kernels, backward_kernels),
            launch_s=self.links.cluster.device.launch_s,
            eliminator=Eliminator(
                tuple(len(choices) for choices in metrics),
                tuple((source, target) for source, target, _, _ in edges),
                keep=(IN, OUT),
            ),
        )

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
            plain = len(labels) == 1 and not grows and node.rule.compute in ("matmul", "memory")
            if whole % degree and not (plain and not node.rule.groups and whole >= UNEVEN * degree):
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
        """Bytes of a value on one rank at the local batch, per inner placement."""
        elements = math.prod(value.shape) * value.itemsize
        grows = any(self.graph.batch.grows(size) for size in value.shape)
        size = elements * (self.local_batch / self.graph.batch.traced if grows else 1.0)
        for token, degree in zip(tokens, self.sizes, strict=True):
            size /= degree if isinstance(token, Atom) else 1
        return size

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
        forward, backward = op_seconds(
            self.graph, op, node.rule, profile, self.local_batch, degrees, self.links.cluster.device, self.execution
        )
        is_core = op.id in self.core
        metrics[:, CORE_FORWARD if is_core else FORWARD] += forward
        metrics[:, BACKWARD] += backward
        self._add_inside(node, chosen, metrics)
        values = [self.graph.values[value] for value in (*op.inputs, *op.outputs)]
        for at, options in enumerate(chosen):
            tokens = [tuple(option.inputs[i] for option in options) for i in range(len(op.inputs))] + [
                tuple(option.outputs[i] for option in options) for i in range(len(op.outputs))
            ]
            share = math.prod(size for option, size in zip(options, self.sizes, strict=True) if option.sharded)
            for position, core in self.savers.get(op.id, ()):
                owner = self.graph.values[self.profile.owners[values[position].id]]
                held = self._local_bytes(owner, ()) if not self.sizes else self._owner_bytes(owner, tokens[position])
                metrics[at, CORE_SAVED if core else SAVED] += held
            internal = sum(math.prod(shape) * item for shape, item in profile.saved_internal)
            grows = any(self.graph.batch.grows(size) for shape, _ in profile.saved_internal for size in shape)
            scale = self.local_batch / self.graph.batch.traced if grows else 1.0
            metrics[at, CORE_SAVED if is_core else SAVED] += internal * scale / share
            metrics[at, WORKSPACE] = sum(
                self._local_bytes(value, token)
                for value, token in zip(values, tokens, strict=True)
                if value.kind == "activation"
            )
        return metrics

    def _owner_bytes(self, owner: Value, tokens: Sequence[Token]) -> float:
        size = self._local_bytes(owner, ("R",) * len(self.sizes))
        for token, degree in zip(tokens, self.sizes, strict=True):
            size /= degree if isinstance(token, Atom) else 1
        return size

    def _add_inside(self, node: OpNode, chosen: tuple[tuple[Option, ...], ...], metrics: Floats) -> None:
        inside = node.rule.inside
        if inside is None:
            return
        scale = self.local_batch / self.graph.batch.traced
        for at, options in enumerate(chosen):
            axes = tuple(axis for axis, option in enumerate(options) if option.inside)
            if axes:
                share = math.prod(
                    size
                    for option, size in zip(options, self.sizes, strict=True)
                    if option.sharded and not option.inside and set(option.labels) & set(inside.labels)
                )
                for metric, size in ((FORWARD, inside.forward_bytes), (BACKWARD, inside.backward_bytes)):
                    held = size * (scale if self.graph.batch.grows(size) else 1.0) / share
                    metrics[at, metric] += float(self.links.collective_s("all_reduce", held, axes))

    def _parameter_uses(
        self, node: OpNode, chosen: tuple[tuple[Option, ...], ...]
    ) -> tuple[tuple[Value, tuple[tuple[int, tuple[int, ...]], ...]], ...]:
        uses = []
        for position in node.parameters:
            value = self.graph.values[node.op.inputs[position]]
            per_strategy = []
            for options in chosen:
                tokens = [option.inputs[position] for option in options]
                elements = math.prod(value.shape)
                for token, size in zip(tokens, self.sizes, strict=True):
                    elements = -(-elements // size) if isinstance(token, Atom) else elements
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
