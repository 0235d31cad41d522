"""Factors of a dim (Shardy's word): what can be sharded through a view without communication.

A view may merge dims (batch and sequence into tokens) or split one (3 x heads x head_dim). A shard of the merged dim is
local only along a factor that both sides have, so each dim is divided into *factors*, and a sharding names a factor:

    x[B, S, 3h] -> view [B, S, 3, heads, d]      the last dim of x has the factors (3, heads, d)
    _S(2,3): shard the second factor, `heads`, which repeats 3 times: torch's ``_StridedShard(2, split_factor=3)``

Split points (prefix products inside a dim) are propagated over all ops of a block until nothing changes: the weight of a
fused projection gets the factors of its output, so its shard is strided too, and no gather is needed.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from autopar.core.placement import Placement, Shard
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule


class DimFactor(Shard, frozen=True, cache_hash=True, kw_only=True):
    """The shard of a factor: a dim is ``split_factor`` equal parts, each of ``size`` slices at the traced batch, and every
    rank has an equal share of the slices of every part. Factors of different sizes are unequal; ``without_size`` gives
    their placements.

    >>> str(DimFactor(dim=2, split_factor=3, size=16)), str(DimFactor(dim=0, size=8))
    ('_S(2,3)', 'S(0)')
    """

    size: int

    @property
    def shard(self) -> Shard:
        """The placement, without the size."""
        return Shard(self.dim, self.split_factor)


def without_size(placement: Placement) -> Placement:
    """A placement as it is, that of a factor without its size.

    >>> without_size(DimFactor(dim=0, size=8)) == Shard(0)
    True
    """
    return placement.shard if isinstance(placement, DimFactor) else placement


class DimFactorization:
    """The factors of the dims of a set of values, from the rules of the ops between them.

    ``shapes``: value id -> shape; ``calls``: (rule, input value ids, output value ids) of each op. Sizes are at the
    traced batch. Dims that share a label have the same factors (union-find over ``(value, dim)`` and ``(-1 - index of
    the call, label)``).
    """

    def __init__(
        self, shapes: Mapping[int, Sequence[int]], calls: Iterable[tuple[OpShardingRule, Sequence[int], Sequence[int]]]
    ) -> None:
        self._parent: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._size: dict[tuple[int, ...], int] = {}
        groups = []
        for call_index, (rule, inputs, outputs) in enumerate(calls):
            call = -1 - call_index
            for label, size in rule.hidden_label_sizes:
                self._size[self._root((call, label))] = size
            for tensors, labels in ((inputs, rule.input_labels), (outputs, rule.output_labels)):
                for value, dims in zip(tensors, labels, strict=True):
                    for dim, label in enumerate(dims):
                        if label != NO_LABEL:
                            self._size[self._union((value, dim), (call, label))] = shapes[value][dim]
            groups += [tuple(tuple((call, label) for label in side) for side in group) for group in rule.view_groups]
        self._split_points: dict[tuple[int, ...], set[int]] = {}
        self._propagate(groups)

    def factors_of_dim(self, value: int, dim: int, size: int) -> tuple[tuple[int, int], ...]:
        """The factors of a value's dim of ``size`` as (split factor, size), outermost first; the dim itself where it has
        one factor."""
        points = [1, *sorted(self._split_points.get(self._root((value, dim)), ())), size]
        return tuple((start, end // start) for start, end in itertools.pairwise(points))

    def factors_of_label(self, call_index: int, label: int) -> tuple[tuple[int, int], ...]:
        """The factors of a label of call ``call_index``, as ``factors_of_dim`` gives them."""
        return self.factors_of_dim(-1 - call_index, label, self._size[self._root((-1 - call_index, label))])

    def _root(self, key: tuple[int, ...]) -> tuple[int, ...]:
        """The representative of a key's set, with path compression."""
        root = key
        while (parent := self._parent.get(root, root)) != root:
            root = parent
        while (parent := self._parent.get(key, key)) != root:
            self._parent[key] = root
            key = parent
        return root

    def _union(self, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
        """Joins the sets of two keys and returns its representative."""
        a, b = self._root(first), self._root(second)
        self._parent[a] = b
        return b

    def _propagate(self, groups: Sequence[tuple[tuple[tuple[int, ...], ...], ...]]) -> None:
        """Gives both sides of every view group the split points of either, until nothing changes."""
        changed = True
        while changed:
            changed = False
            for group in groups:
                group_points = self._group_split_points(group)
                for side in group:
                    start = 1
                    for key in side:
                        root = self._root(key)
                        size = self._size[root]
                        inner = {p // start for p in group_points if start < p < start * size and p % start == 0}
                        inner = _divisor_chain(inner | self._split_points.get(root, set()), size)
                        if inner != self._split_points.get(root, set()):
                            self._split_points[root] = inner
                            changed = True
                        start *= size

    def _group_split_points(self, group: tuple[tuple[tuple[int, ...], ...], ...]) -> set[int]:
        """The split points of both sides of a view group, as prefix products over the dims of a side."""
        group_points: set[int] = set()
        for side in group:
            start = 1
            for key in side:
                root = self._root(key)
                group_points |= {start} | {start * point for point in self._split_points.get(root, ())}
                start *= self._size[root]
        return group_points


def _divisor_chain(split_points: set[int], size: int) -> set[int]:
    """The split points that form a chain, chosen smallest first: each divides the next, and the last divides ``size``.

    >>> sorted(_divisor_chain({3, 5, 6}, 12))
    [3, 6]
    """
    chain: list[int] = []
    last = 1
    for point in sorted(split_points):
        if 1 < point < size and size % point == 0 and point % last == 0:
            chain.append(point)
            last = point
    return set(chain)


def shared_factors(
    factorization: DimFactorization, call_index: int, rule: OpShardingRule
) -> list[tuple[dict[int, int], dict[int, int], int]]:
    """For each factor that both sides of a view group have: (input label -> split factor, output label -> split factor,
    size).

    >>> # [B * S, h] -> [B, S, h]: both sides have the factors B and S
    """
    shared = []
    for group in rule.view_groups:
        sides: list[dict[tuple[int, int], tuple[int, int]]] = []
        for side in group:
            spans: dict[tuple[int, int], tuple[int, int]] = {}
            start = 1
            for label in side:
                factors = factorization.factors_of_label(call_index, label)
                for split_factor, size in factors:
                    if size > 1:
                        spans[(start * split_factor, size)] = (label, split_factor)
                last_split_factor, last_size = factors[-1]
                start *= last_split_factor * last_size
            sides.append(spans)
        for span in sides[0].keys() & sides[1].keys():
            (input_label, input_split_factor), (output_label, output_split_factor) = sides[0][span], sides[1][span]
            shared.append(({input_label: input_split_factor}, {output_label: output_split_factor}, span[1]))
    return shared
