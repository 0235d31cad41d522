"""Atoms: the pieces of a dim that can be sharded without moving data across a view.

A view may merge dims (batch and sequence into tokens) or split one (3 x heads x head_dim). A shard of the merged dim is
local only along a piece that both sides know, so each dim is refined into *atoms*, and a sharding names an atom:

    x[B, S, 3h] -> view [B, S, 3, heads, d]      the last dim of x has atoms (3, heads, d)
    _S(2,3): shard the second atom, `heads`, which repeats 3 times: torch's ``_StridedShard(2, split_factor=3)``

Cuts (prefix products inside a dim) spread over every op of a block until nothing changes: the weight of a fused
projection is cut where its output is, so its shard is strided too, and nothing has to be gathered.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from autopar.core.placement import Placement, Shard
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule


class DimFactor(Shard, frozen=True, cache_hash=True, kw_only=True):
    """A shard of an atom, at the traced batch: of each of the ``split_factor`` pieces of a dim, ``size`` parts are
    there to share. Atoms of different sizes are different; ``without_size`` is what they are as placements.

    >>> str(Atom(dim=2, split_factor=3, size=16)), str(Atom(dim=0, size=8))
    ('_S(2,3)', 'S(0)')
    """

    size: int

    @property
    def shard(self) -> Shard:
        """The placement alone."""
        return Shard(self.dim, self.split_factor)


def without_size(placement: Placement) -> Placement:
    """The placement alone, of an atom without its size.

    >>> without_size(Atom(dim=0, size=8)) == Shard(0)
    True
    """
    return placement.shard if isinstance(placement, DimFactor) else placement


class DimFactorization:
    """Refines the dims of a set of values by the rules of the ops between them.

    ``shapes``: value id -> shape; ``calls``: (rule, input value ids, output value ids). Sizes are at the traced batch.
    """

    def __init__(
        self, shapes: Mapping[int, Sequence[int]], calls: Iterable[tuple[OpShardingRule, Sequence[int], Sequence[int]]]
    ) -> None:
        self._parent: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._size: dict[tuple[int, ...], int] = {}
        groups = []
        for number, (rule, inputs, outputs) in enumerate(calls):
            for label, size in rule.hidden_label_sizes:
                self._size[self._root((-1 - number, label))] = size
            for tensors, labels in ((inputs, rule.input_labels), (outputs, rule.output_labels)):
                for value, dims in zip(tensors, labels, strict=True):
                    for dim, label in enumerate(dims):
                        if label != NO_LABEL:
                            self._size[self._union((value, dim), (-1 - number, label))] = shapes[value][dim]
            groups += [
                tuple(tuple((-1 - number, label) for label in side) for side in group) for group in rule.view_groups
            ]
        self._split_points: dict[tuple[int, ...], set[int]] = {}
        self._propagate(groups)

    def factors_of_dim(self, value: int, dim: int, size: int) -> tuple[tuple[int, int], ...]:
        """The atoms of a dim as (repeats, size), outermost first; the whole dim where nothing cuts it."""
        cuts = [1, *sorted(self._split_points.get(self._root((value, dim)), ())), size]
        return tuple((start, end // start) for start, end in itertools.pairwise(cuts))

    def factors_of_label(self, call_index: int, label: int) -> tuple[tuple[int, int], ...]:
        """The atoms of a label of call ``number``, as ``of``."""
        return self.factors_of_dim(-1 - call_index, label, self._size[self._root((-1 - call_index, label))])

    def _root(self, key: tuple[int, ...]) -> tuple[int, ...]:
        root = key
        while (parent := self._parent.get(root, root)) != root:
            root = parent
        while (parent := self._parent.get(key, key)) != root:
            self._parent[key] = root
            key = parent
        return root

    def _union(self, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
        a, b = self._root(first), self._root(second)
        self._parent[a] = b
        return b

    def _propagate(self, groups: Sequence[tuple[tuple[tuple[int, ...], ...], ...]]) -> None:
        changed = True
        while changed:
            changed = False
            for group in groups:
                positions = self._group_split_points(group)
                for side in group:
                    start = 1
                    for key in side:
                        root = self._root(key)
                        size = self._size[root]
                        inner = {p // start for p in positions if start < p < start * size and p % start == 0}
                        inner = _divisor_chain(inner | self._split_points.get(root, set()), size)
                        if inner != self._split_points.get(root, set()):
                            self._split_points[root] = inner
                            changed = True
                        start *= size

    def _group_split_points(self, group: tuple[tuple[tuple[int, ...], ...], ...]) -> set[int]:
        positions: set[int] = set()
        for side in group:
            start = 1
            for key in side:
                root = self._root(key)
                positions |= {start} | {start * cut for cut in self._split_points.get(root, ())}
                start *= self._size[root]
        return positions


def _divisor_chain(split_points: set[int], size: int) -> set[int]:
    """The largest-first thinning of cuts to a chain in which each divides the next and the last divides size."""
    chain: list[int] = []
    last = 1
    for cut in sorted(split_points):
        if cut > 1 and cut < size and size % cut == 0 and cut % last == 0:
            chain.append(cut)
            last = cut
    return set(chain)


def shared_factors(
    factorization: DimFactorization, call_index: int, rule: OpShardingRule
) -> list[tuple[dict[int, int], dict[int, int], int]]:
    """For each atom that both sides of a view's groups know: (input label -> repeats, output label -> repeats, size).

    >>> # [B*S, h] -> [B, S, h]: the atoms B and S exist on both sides
    """
    found = []
    for group in rule.view_groups:
        sides: list[dict[tuple[int, int], tuple[int, int]]] = []
        for side in group:
            spans: dict[tuple[int, int], tuple[int, int]] = {}
            start = 1
            for label in side:
                for repeats, size in factorization.factors_of_label(call_index, label):
                    if size > 1:
                        spans[(start * repeats, size)] = (label, repeats)
                total = factorization.factors_of_label(call_index, label)
                start *= total[-1][0] * total[-1][1]
            sides.append(spans)
        for span in sides[0].keys() & sides[1].keys():
            (in_label, in_repeats), (out_label, out_repeats) = sides[0][span], sides[1][span]
            found.append(({in_label: in_repeats}, {out_label: out_repeats}, span[1]))
    return found
