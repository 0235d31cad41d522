"""Seconds that a value takes from where one choice makes it to where another reads it, and its gradient back.

A state says both ways on each inner axis: "G" is whole forward and a sum of terms backward, "P" a sum forward and whole
backward, "R" whole both ways, an atom cut both ways. The data axis does what it is given (`data_axis`); only where it
changes does it move along with the inner axes.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.cost.redistribute import MeshLinks, Placement, redistribute_s
from autopar.graph.ir import Value
from autopar.intra.copies import LocalSizes
from autopar.intra.data_axis import text_of
from autopar.rules.options import Token, forward_placement, gradient_placement

Floats = NDArray[np.float64]


class Moves:
    """Of one block: ``links`` are those of the inner axes, ``whole`` those of all, the data axis of ``data`` ranks
    first; ``local`` knows the bytes of values on a rank."""

    def __init__(self, links: MeshLinks, whole: MeshLinks, data: int, local: LocalSizes) -> None:
        self.links, self.whole, self.data, self.local = links, whole, data, local
        self._known: dict[tuple[tuple[Placement, ...], tuple[float, ...]], Floats] = {}

    def seconds(
        self,
        value: Value,
        sources: Sequence[tuple[Token, ...]],
        targets: Sequence[tuple[Token, ...]],
        source_cut: Token,
        target_cut: Token,
    ) -> tuple[Floats, Floats]:
        """(sources, targets) seconds to move the value forward and its gradient back; the cuts are the data axis's."""
        forward = self._one_way(
            value,
            [forward_placement(tokens) for tokens in sources],
            [forward_placement(tokens) for tokens in targets],
            *forward_placement((source_cut, target_cut)),
        )
        if not value.requires_grad:
            return forward, np.zeros_like(forward)
        backward = self._one_way(
            value,
            [gradient_placement(tokens) for tokens in targets],
            [gradient_placement(tokens) for tokens in sources],
            *gradient_placement((target_cut, source_cut)),
        )
        return forward, backward.T

    def into_sums(
        self,
        value: Value,
        sides: Sequence[Sequence[tuple[Token, ...]]],
        cuts: tuple[Token, Token],
        forward: Floats,
    ) -> Floats:
        """``forward`` with the seconds to what is whole where a target is a sum and its source is none."""
        if not any("P" in tokens for tokens in sides[1]):
            return forward
        rows = []
        for made in sides[0]:
            whole = [
                tuple("R" if token == "P" != held else token for token, held in zip(tokens, made, strict=True))
                for tokens in sides[1]
            ]
            rows.append(self.seconds(value, [made], whole, *cuts)[0][0])
        return np.where(np.isfinite(forward), forward, np.stack(rows))

    def _one_way(
        self,
        value: Value,
        sources: Sequence[Placement],
        targets: Sequence[Placement],
        source_cut: Token,
        target_cut: Token,
    ) -> Floats:
        """(sources, targets) seconds. Where the data axis stays as it is, only inner axes move."""
        if self.data == 1 or text_of(source_cut) == text_of(target_cut):
            table, at = self._table(self.links, value, (*sources, *targets), source_cut)
            return table[np.ix_([at[one] for one in sources], [at[one] for one in targets])]
        if target_cut == "P":  # zeros on all ranks but the first: a whole tensor becomes a sum for nothing
            target_cut = "R"
        made, taken = [(source_cut, *one) for one in sources], [(target_cut, *one) for one in targets]
        table, at = self._table(self.whole, value, (*made, *taken), None)
        return table[np.ix_([at[one] for one in made], [at[one] for one in taken])]

    def _table(
        self, links: MeshLinks, value: Value, wanted: Sequence[Placement], cut: Token | None
    ) -> tuple[Floats, dict[Placement, int]]:
        """Seconds between every two placements on the axes of ``links``, and where each is in the table. ``cut`` is how
        the data axis cuts the value where it is none of the axes."""
        per_axis: list[dict[Token, None]] = [{} for _ in links.sizes]
        for placement in wanted:
            for axis, token in enumerate(placement):
                per_axis[axis][token] = None
        if cut is None:
            inner = dict.fromkeys(token for tokens in per_axis[1:] for token in tokens)
            per_axis = [per_axis[0] | {"R": None}, *(inner | {"R": None} for _ in per_axis[1:])]
        else:
            tokens = dict.fromkeys(token for tokens in per_axis for token in tokens)
            per_axis = [tokens for _ in per_axis]
        placements = tuple(dict.fromkeys((*wanted, *itertools.product(*per_axis))))
        held = tuple(
            self._bytes(value, placement, cut) if cut is not None else self._bytes(value, placement[1:], placement[0])
            for placement in placements
        )
        key = (placements, held)
        if key not in self._known:
            self._known[key] = redistribute_s(links, placements, np.array([held]))[0]
        return self._known[key], {placement: at for at, placement in enumerate(placements)}

    def _bytes(self, value: Value, tokens: Sequence[Token], data: Token) -> float:
        return self.local.num_bytes(value.id, forward_placement(tokens), data)
