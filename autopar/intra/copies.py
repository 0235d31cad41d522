"""The memory that a solved block keeps for its backward pass, counted copy by copy.

Elimination prices what is kept op by op: the first op that keeps a tensor is charged for it, in the placement it reads,
which is never more than what is kept. It is less where a tensor is kept in two placements (a gathered and a sharded copy),
so what solutions really keep is counted here: a *copy* is a result (views share the memory of what they view) or what a redistribution left.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.graph.profile import GraphProfile
from autopar.intra.space import IN, BlockSpace
from autopar.plan.mesh import Axis, local_size
from autopar.rules.atoms import Atom
from autopar.rules.options import Option, Token

Floats = NDArray[np.float64]
Placement = tuple[Token, ...]


class LocalSizes:
    """Bytes of a graph's values on the fullest rank of an inner mesh, at one local batch."""

    def __init__(self, space: BlockSpace, sizes: tuple[int, ...], local_batch: int) -> None:
        self.graph, self.local_batch = space.graph, local_batch
        self.axes = tuple(Axis(name=f"axis{at}", size=size) for at, size in enumerate(sizes))
        self._known: dict[tuple[int, Placement], float] = {}

    def num_bytes(self, value: int, tokens: Placement) -> float:
        key = (value, tokens)
        if key not in self._known:
            found, batch = self.graph.values[value], self.graph.batch
            shape = tuple(
                size * self.local_batch // batch.traced if batch.grows(size) else size for size in found.shape
            )
            text = "".join(
                Atom(dim=t.dim, repeats=max(1, self._repeats(t)), size=t.size).text if isinstance(t, Atom) else "R"
                for t in tokens
            )
            self._known[key] = float(local_size(shape, text, self.axes) * found.itemsize)
        return self._known[key]

    def _repeats(self, atom: Atom) -> int:
        batch = self.graph.batch
        return atom.repeats * self.local_batch // batch.traced if batch.grows(atom.repeats) else atom.repeats


class CopyCounter:
    """Counts the kept bytes of solutions of one block's tables."""

    def __init__(
        self,
        space: BlockSpace,
        profile: GraphProfile,
        first_keeper: Mapping[int, int],
        core: frozenset[int],
        strategies: Sequence[Sequence[tuple[Option, ...]]],
        boundary_tokens: Mapping[int, Sequence[Placement]],
        sizes: LocalSizes,
    ) -> None:
        """``first_keeper``: value whose memory is kept -> the first op of the graph that keeps it; ``core``: attentions."""
        self.space, self.profile, self.first_keeper = space, profile, first_keeper
        self._made_by_core = {v for node in space.ops if node.op.id in core for v in node.op.outputs}
        self._at_hand = {profile.owners[node.op.inputs[i]] for node in space.ops for i in node.free}
        self.strategies, self.boundary_tokens, self.sizes = strategies, boundary_tokens, sizes
        graph = space.graph
        self._positions = []
        for node in space.ops:
            tensors = (*node.op.inputs, *node.op.outputs)
            kept = profile.ops[node.op.id]
            positions = (*kept.saved_inputs, *(len(node.op.inputs) + at for at in kept.saved_outputs))
            self._positions.append(
                tuple(
                    at
                    for at in positions
                    if graph.values[profile.owners[tensors[at]]].kind not in ("parameter", "buffer")
                )
            )

    def kept(self, choices: NDArray[np.integer]) -> Floats:
        """(solutions, 2) bytes outside and inside attention; ``choices`` is (nodes, solutions)."""
        columns, back = np.unique(choices, axis=1, return_inverse=True)
        counted = np.array([self._count(columns[:, at]) for at in range(columns.shape[1])])
        return np.asarray(counted[np.asarray(back).ravel()])

    def _count(self, column: NDArray[np.integer]) -> tuple[float, float]:
        owners = self.profile.owners
        lies: dict[int, Placement] = {
            value: _whole(states[int(column[IN])]) for value, states in self.boundary_tokens.items()
        }
        memory: dict[int, tuple[int, Placement | None]] = {}  # of a value as made: (owner, None) or of a moved copy
        bytes_of: dict[tuple[int, Placement | None], float] = {}
        for at, node in enumerate(self.space.ops):
            op, options = node.op, self.strategies[at][int(column[node.node])]
            read: dict[int, tuple[int, Placement | None]] = {}
            for i, value in enumerate(op.inputs):
                lie = _whole(tuple(option.inputs[i] for option in options))
                moved = i not in node.free and value in lies and lies[value] != lie
                read[value] = (value, lie) if moved else memory.get(value, (owners[value], None))
            made = {}
            for i, value in enumerate(op.outputs):
                lies[value] = _whole(tuple(option.outputs[i] for option in options))
                viewed = [v for v in op.inputs if owners[value] != value and owners[v] == owners[value]]
                memory[value] = made[value] = read[viewed[0]] if viewed else (value, None)
            tensors = (*op.inputs, *op.outputs)
            for position in self._positions[at]:
                value = tensors[position]
                copy = read[value] if position < len(op.inputs) else made[value]
                if copy not in bytes_of:
                    bytes_of[copy] = self._bytes(copy, node.op.id, position, value, options, lies)
        inside = sum(size for (owner, moved), size in bytes_of.items() if moved is None and owner in self._made_by_core)
        return sum(bytes_of.values()) - inside, inside

    def _bytes(
        self,
        copy: tuple[int, Placement | None],
        op: int,
        position: int,
        value: int,
        options: tuple[Option, ...],
        lies: Mapping[int, Placement],
    ) -> float:
        owner, moved = copy
        if moved is not None:
            return self.sizes.num_bytes(owner, moved)
        first_op = self.space.block.first_op
        if self.first_keeper.get(owner, op) < first_op:
            return 0.0  # charged to the block that keeps it first
        if owner in lies and owner not in self._at_hand:
            return self.sizes.num_bytes(owner, lies[owner])
        tokens = tuple((*option.inputs, *option.outputs)[position] for option in options)
        whole = ("R",) * len(tokens)
        seen = self.sizes.num_bytes(value, whole)
        share = self.sizes.num_bytes(value, _whole(tokens)) / seen if seen else 1.0
        return self.sizes.num_bytes(owner, whole) * share


def _whole(tokens: Sequence[Token]) -> Placement:
    return tuple("R" if token == "G" else token for token in tokens)
