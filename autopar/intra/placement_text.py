"""How tensors are placed on the mesh of a stage, for the plan: on the data axis, then on the inner axes.

On the data axis it is what `intra.data_axis` says, and where blocks meet (the default) its ``end_pair``.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.core.placement import Placement, Placements, Shard, format_placements
from autopar.core.plan import OpPlan, ValuePlan
from autopar.graph.ir import Graph, Op
from autopar.intra.block_tables import BlockTables
from autopar.intra.data_axis import end_pair
from autopar.rules.axis_options import AxisOption
from autopar.rules.placement_pair import REPLICATED, PlacementPair, forward_placements, gradient_placements


class PlacementWriter:
    """The placements of one graph's values; ``micro_batch`` counts its samples, and ``data_axis`` says whether the
    mesh names a data axis."""

    def __init__(self, graph: Graph, micro_batch: int, names_data_axis: bool = True) -> None:
        self.graph, self.micro_batch, self.names_data_axis = graph, micro_batch, names_data_axis

    def op_plan(
        self, op: Op, options: Sequence[AxisOption], data_option: AxisOption, regathered: tuple[int, ...] = ()
    ) -> OpPlan:
        """An op under one option per inner axis, and what the data axis does to it."""
        inputs = [(v, [option.inputs[i] for option in options], data_option.inputs[i]) for i, v in enumerate(op.inputs)]
        outputs = [
            (v, [option.outputs[i] for option in options], data_option.outputs[i]) for i, v in enumerate(op.outputs)
        ]
        return OpPlan(
            name=op.name,
            inputs=tuple(format_placements(self.placement_text(*placed)) for placed in inputs),
            outputs=tuple(format_placements(self.placement_text(*placed)) for placed in outputs),
            input_gradients=tuple(format_placements(self.gradient_text(*placed)) for placed in inputs),
            output_gradients=tuple(format_placements(self.gradient_text(*placed)) for placed in outputs),
            regathered=regathered,
        )

    def parameter_free_op_plan(self, op: Op, num_inner: int) -> OpPlan:
        """An op that no parameter reaches: every rank runs it on its part of the batch."""
        replicated = [REPLICATED] * num_inner
        return OpPlan(
            name=op.name,
            inputs=tuple(format_placements(self.placement_text(value, replicated)) for value in op.inputs),
            outputs=tuple(format_placements(self.placement_text(value, replicated)) for value in op.outputs),
            input_gradients=("",) * len(op.inputs),
            output_gradients=("",) * len(op.outputs),
        )

    def boundary_value_plans(self, tables: BlockTables, values: Sequence[int], boundary: int) -> tuple[ValuePlan, ...]:
        """Block inputs or outputs under one of the named boundary placements."""
        return tuple(self._value_plan(value, tables.boundary_pairs[value][boundary]) for value in values)

    def shared_value_plans(self, tables: BlockTables, choices: NDArray[np.integer]) -> tuple[ValuePlan, ...]:
        """Values with several readers; ``choices`` is one choice per node."""
        return tuple(
            self._value_plan(hub.value, states[int(choices[hub.index])], data)
            for hub, states, data in zip(
                tables.space.shared_nodes, tables.shared_placements, tables.space.data_axis.shared_pairs, strict=True
            )
        )

    def _value_plan(
        self, value: int, pairs: Sequence[PlacementPair], data_pair: PlacementPair | None = None
    ) -> ValuePlan:
        return ValuePlan(
            name=self.graph.values[value].name,
            placement=format_placements(self.placement_text(value, pairs, data_pair)),
            gradient=format_placements(self.gradient_text(value, pairs, data_pair)),
        )

    def placement_text(
        self, value: int, pairs: Sequence[PlacementPair], data_pair: PlacementPair | None = None
    ) -> Placements:
        """A value's placements, of ``pairs`` on the inner axes and ``data`` on the data axis."""
        every = forward_placements(self._on_all_axes(value, pairs, data_pair))
        return tuple(self._at_micro_batch(placement) for placement in every)

    def gradient_text(
        self, value: int, pairs: Sequence[PlacementPair], data_pair: PlacementPair | None = None
    ) -> Placements:
        """Its gradient's, () where it has none."""
        if not self.graph.values[value].requires_grad:
            return ()
        every = gradient_placements(self._on_all_axes(value, pairs, data_pair))
        return tuple(self._at_micro_batch(placement) for placement in every)

    def _on_all_axes(
        self, value: int, pairs: Sequence[PlacementPair], data: PlacementPair | None
    ) -> Sequence[PlacementPair]:
        if not self.names_data_axis:
            return pairs
        return (end_pair(self.graph, value) if data is None else data, *pairs)

    def _at_micro_batch(self, placement: Placement) -> Placement:
        """A placement at the traced batch, whose pieces may be samples, at the micro-batch."""
        if not isinstance(placement, Shard):
            return placement
        return Shard(placement.dim, self.graph.batch.scale(placement.split_factor, self.micro_batch))
