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
from autopar.intra.block_space import BlockSpace, TensorEdge
from autopar.rules.axis_options import AxisOption
from autopar.rules.placement_pair import PlacementPair

Floats = NDArray[np.float64]


class BackwardOverlap:
    """Seconds of the backward products of one block's linear ops. ``everywhere``: all exchanges of input gradients are
    hidden; ``where_gathered``: those of inputs that were gathered are; gathers made again are with either."""

    def __init__(
        self, space: BlockSpace, overlap_contention: float, *, all_input_gradients: bool, gathered_inputs: bool
    ) -> None:
        self.overlap_contention, self.all_input_gradients, self.gathered_inputs = (
            overlap_contention,
            all_input_gradients,
            gathered_inputs,
        )
        self._first_shared = 2 + len(space.ops)
        self._consumers: dict[int, list[TensorEdge]] = {}
        for flow in space.tensor_edges:
            if flow.source >= self._first_shared:
                self._consumers.setdefault(flow.source, []).append(flow)
        self._strategies: dict[int, tuple[tuple[AxisOption, ...], ...]] = {}
        self._gradient_products_s: dict[int, tuple[Floats, Floats]] = {}

    def add_products(
        self,
        node: int,
        strategies: tuple[tuple[AxisOption, ...], ...],
        gradient_products_s: tuple[Floats, Floats] | None,
    ) -> None:
        """The products of an op (node) under each of its strategies, its input's gradient and its weight's."""
        if gradient_products_s is not None:
            self._strategies[node], self._gradient_products_s[node] = strategies, gradient_products_s

    def exposed_gradient_s(
        self,
        edge: TensorEdge,
        target_placements: Sequence[tuple[PlacementPair, ...]],
        gathers: NDArray[np.bool_],
        seconds: Floats,
    ) -> Floats:
        """(sources, targets) seconds that a value's gradient costs on its way back; ``apart``: pairs that gather."""
        products = self._overlapping_products_s(edge, target_placements)
        if products is None or not (self.all_input_gradients or self.gathered_inputs):
            return seconds
        hidden = exposed_s(seconds, np.broadcast_to(products[1], seconds.shape), self.overlap_contention)
        return np.where(gathers | self.all_input_gradients, hidden, seconds)

    def exposed_regather_s(
        self, edge: TensorEdge, target_placements: Sequence[tuple[PlacementPair, ...]], seconds: Floats
    ) -> Floats:
        """(sources, targets) seconds that a value costs which is gathered again."""
        products = self._overlapping_products_s(edge, target_placements)
        if products is None or not (self.all_input_gradients or self.gathered_inputs):
            return seconds
        return exposed_s(seconds, np.broadcast_to(products[0], seconds.shape), self.overlap_contention)

    def _overlapping_products_s(
        self, edge: TensorEdge, target_placements: Sequence[tuple[PlacementPair, ...]]
    ) -> tuple[Floats, Floats] | None:
        """Seconds of the products, per target state, that run once the flow's gradient is on its way."""
        if edge.target in self._gradient_products_s:
            return self._gradient_products_s[edge.target]
        readers = self._consumers.get(edge.target, [])
        if not readers or any(reader.target not in self._gradient_products_s for reader in readers):
            return None
        sums = np.zeros((2, len(target_placements)))
        for reader in readers:
            assert reader.input_index is not None
            read = [
                tuple(option.inputs[reader.input_index] for option in options)
                for options in self._strategies[reader.target]
            ]
            for at, target in enumerate(target_placements):
                same = [strategy for strategy, pairs in enumerate(read) if pairs == target]
                if same:
                    sums[:, at] += [product[same].min() for product in self._gradient_products_s[reader.target]]
        return sums[0], sums[1]
