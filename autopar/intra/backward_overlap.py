"""What stays exposed of the collectives in a linear op's backward, behind the op's own gradient matmuls.

    the all-reduce or reduce-scatter of its input's gradient  overlaps with the matmul for its weight's gradient
    the regather of an input that is saved sharded            overlaps with the matmul for its input's gradient

    exposed = max(c - p, 0) + contention * min(c, p)      of a collective of c seconds and a matmul of p   (exposed_s)

Our runtime does both where it overlaps. Megatron-LM does both under sequence parallelism, always, and the first without
it unless told otherwise
(LinearWithGradAccumulationAndAsyncCommunication; Korthikanti et al., 2022, section 4.2.2 and table 4).
Several linear ops that read one gathered value count as one matmul: their seconds add up.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.cost.compute_time import exposed_s
from autopar.intra.block_space import FIRST_OP_NODE, BlockSpace, TensorEdge
from autopar.rules.axis_options import AxisOption
from autopar.rules.placement_pair import PlacementPair

Floats = NDArray[np.float64]


class BackwardOverlap:
    """Of one block. ``gradient_products_s`` maps the node of a linear op to the (strategies,) seconds of its two
    backward matmuls, for its input's gradient and its weight's.

    With ``all_input_gradients`` the collectives of all input gradients overlap, with ``gathered_inputs`` those of
    inputs that were gathered; regathers overlap with either.
    """

    def __init__(
        self,
        space: BlockSpace,
        strategies: Sequence[tuple[tuple[AxisOption, ...], ...]],
        gradient_products_s: Mapping[int, tuple[Floats, Floats]],
        *,
        overlap_contention: float,
        all_input_gradients: bool,
        gathered_inputs: bool,
    ) -> None:
        self.overlap_contention = overlap_contention
        self.all_input_gradients = all_input_gradients
        self.overlaps = all_input_gradients or gathered_inputs
        self._strategies, self._gradient_products_s = strategies, gradient_products_s
        self._consumers = space.shared_consumers()

    def exposed_gradient_s(
        self,
        edge: TensorEdge,
        target_placements: Sequence[tuple[PlacementPair, ...]],
        gathers: NDArray[np.bool_],
        seconds: Floats,
    ) -> Floats:
        """(sources, targets) exposed seconds of redistributing a value's gradient, which takes ``seconds``. ``gathers``:
        the pairs of placements whose forward redistribution is an all-gather."""
        products = self._overlapping_products_s(edge, target_placements)
        if products is None or not self.overlaps:
            return seconds
        overlapped = exposed_s(seconds, np.broadcast_to(products[1], seconds.shape), self.overlap_contention)
        return np.where(gathers | self.all_input_gradients, overlapped, seconds)

    def exposed_regather_s(
        self, edge: TensorEdge, target_placements: Sequence[tuple[PlacementPair, ...]], seconds: Floats
    ) -> Floats:
        """(sources, targets) exposed seconds of a regather that takes ``seconds``."""
        products = self._overlapping_products_s(edge, target_placements)
        if products is None or not self.overlaps:
            return seconds
        return exposed_s(seconds, np.broadcast_to(products[0], seconds.shape), self.overlap_contention)

    def _overlapping_products_s(
        self, edge: TensorEdge, target_placements: Sequence[tuple[PlacementPair, ...]]
    ) -> tuple[Floats, Floats] | None:
        """(targets,) seconds of the input-gradient and weight-gradient matmuls of the ops that consume an edge's value;
        None where one of them is not linear. Behind a shared node, each consumer counts its fastest strategy that takes
        the value as placed there."""
        if edge.target in self._gradient_products_s:
            return self._gradient_products_s[edge.target]
        consumers = self._consumers.get(edge.target, [])
        if not consumers or any(consumer.target not in self._gradient_products_s for consumer in consumers):
            return None
        sums = np.zeros((2, len(target_placements)))
        for consumer in consumers:
            assert consumer.input_index is not None
            taken = [
                tuple(option.inputs[consumer.input_index] for option in options)
                for options in self._strategies[consumer.target - FIRST_OP_NODE]
            ]
            for at, target in enumerate(target_placements):
                same = [strategy for strategy, pairs in enumerate(taken) if pairs == target]
                if same:
                    sums[:, at] += [product[same].min() for product in self._gradient_products_s[consumer.target]]
        return sums[0], sums[1]
