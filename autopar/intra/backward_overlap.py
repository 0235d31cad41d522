"""What stays visible of a linear op's backward exchanges behind its own products.

    the gradient of its input travels (summed, or summed and scattered) beside the product for its weight's gradient
    an input that was gathered, kept as cut and gathered again travels beside the product for its input's gradient

    visible = max(c - p, 0) + contention * min(c, p)      of a collective of c seconds beside a product of p

Our runtime does both where it overlaps; Megatron-LM does both under sequence parallelism, always, and the first without
it unless told otherwise
(LinearWithGradAccumulationAndAsyncCommunication; Korthikanti et al., 2022, section 4.2.2 and table 4).
Several linear ops that read one gathered value are one product there: their seconds add up.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.cost.compute_time import exposed_s
from autopar.intra.block_space import BlockSpace, Flow
from autopar.rules.axis_options import Option
from autopar.rules.placement_pair import PlacementPair

Floats = NDArray[np.float64]


class Hiding:
    """Seconds of the backward products of one block's linear ops. ``everywhere``: all exchanges of input gradients are
    hidden; ``where_gathered``: those of inputs that were gathered are; gathers made again are with either."""

    def __init__(self, space: BlockSpace, contention: float, *, everywhere: bool, where_gathered: bool) -> None:
        self.contention, self.everywhere, self.where_gathered = contention, everywhere, where_gathered
        self._first_hub = 2 + len(space.ops)
        self._readers: dict[int, list[Flow]] = {}
        for flow in space.flows:
            if flow.source >= self._first_hub:
                self._readers.setdefault(flow.source, []).append(flow)
        self._chosen: dict[int, tuple[tuple[Option, ...], ...]] = {}
        self._products: dict[int, tuple[Floats, Floats]] = {}

    def add(self, node: int, chosen: tuple[tuple[Option, ...], ...], products: tuple[Floats, Floats] | None) -> None:
        """The products of an op (node) under each of its strategies, its input's gradient and its weight's."""
        if products is not None:
            self._chosen[node], self._products[node] = chosen, products

    def gradient_s(
        self, flow: Flow, targets: Sequence[tuple[PlacementPair, ...]], apart: NDArray[np.bool_], seconds: Floats
    ) -> Floats:
        """(sources, targets) seconds that a value's gradient costs on its way back; ``apart``: pairs that gather."""
        products = self._behind(flow, targets)
        if products is None or not (self.everywhere or self.where_gathered):
            return seconds
        hidden = exposed_s(seconds, np.broadcast_to(products[1], seconds.shape), self.contention)
        return np.where(apart | self.everywhere, hidden, seconds)

    def again_s(self, flow: Flow, targets: Sequence[tuple[PlacementPair, ...]], seconds: Floats) -> Floats:
        """(sources, targets) seconds that a value costs which is gathered again."""
        products = self._behind(flow, targets)
        if products is None or not (self.everywhere or self.where_gathered):
            return seconds
        return exposed_s(seconds, np.broadcast_to(products[0], seconds.shape), self.contention)

    def _behind(self, flow: Flow, targets: Sequence[tuple[PlacementPair, ...]]) -> tuple[Floats, Floats] | None:
        """Seconds of the products, per target state, that run once the flow's gradient is on its way."""
        if flow.target in self._products:
            return self._products[flow.target]
        readers = self._readers.get(flow.target, [])
        if not readers or any(reader.target not in self._products for reader in readers):
            return None
        sums = np.zeros((2, len(targets)))
        for reader in readers:
            assert reader.input is not None
            read = [tuple(option.inputs[reader.input] for option in options) for options in self._chosen[reader.target]]
            for at, target in enumerate(targets):
                same = [strategy for strategy, pairs in enumerate(read) if pairs == target]
                if same:
                    sums[:, at] += [product[same].min() for product in self._products[reader.target]]
        return sums[0], sums[1]
