"""Placements of tensors on the mesh of a stage as a plan has them: on the data axis, then on the inner axes.

The placement on the data axis is that of `data_axis`; where none is given, that of a block's boundary (``end_pair``).
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
    """Writes the placements of one graph's values at ``micro_batch`` samples; ``names_data_axis``: the plan's mesh has
    a data axis."""

    def __init__(self, graph: Graph, micro_batch: int, names_data_axis: bool = True) -> None:
        self.graph, self.micro_batch, self.names_data_axis = graph, micro_batch, names_data_axis

    def op_plan(
        self, op: Op, options: Sequence[AxisOption], data_option: AxisOption, regathered: tuple[int, ...] = ()
    ) -> OpPlan:
        """An op under an option per inner axis and one on the data axis; ``regathered`` are the input positions that it
        saves sharded."""
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
        """An op that depends on no parameter: every rank runs it on its part of the batch, and its tensors are replicated
        on the ``num_inner`` inner axes."""
        replicated = [REPLICATED] * num_inner
        return OpPlan(
            name=op.name,
            inputs=tuple(format_placements(self.placement_text(value, replicated)) for value in op.inputs),
            outputs=tuple(format_placements(self.placement_text(value, replicated)) for value in op.outputs),
            input_gradients=("",) * len(op.inputs),
            output_gradients=("",) * len(op.outputs),
        )

    def boundary_value_plans(self, tables: BlockTables, values: Sequence[int], boundary: int) -> tuple[ValuePlan, ...]:
        """Block inputs or outputs (value ids) under boundary placement number ``boundary``."""
        return tuple(self._value_plan(value, tables.boundary_pairs[value][boundary]) for value in values)

    def shared_value_plans(self, tables: BlockTables, choices: NDArray[np.integer]) -> tuple[ValuePlan, ...]:
        """Values with several consumers; ``choices`` is one choice per node."""
        return tuple(
            self._value_plan(node.value, placements[int(choices[node.index])], data)
            for node, placements, data in zip(
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
        """The placements of a value (id) with ``pairs`` on the inner axes and ``data_pair`` on the data axis."""
        every = forward_placements(self._on_all_axes(value, pairs, data_pair))
        return tuple(self._at_micro_batch(placement) for placement in every)

    def gradient_text(
        self, value: int, pairs: Sequence[PlacementPair], data_pair: PlacementPair | None = None
    ) -> Placements:
        """The placements of its gradient, () where it has none."""
        if not self.graph.values[value].requires_grad:
            return ()
        every = gradient_placements(self._on_all_axes(value, pairs, data_pair))
        return tuple(self._at_micro_batch(placement) for placement in every)

    def _on_all_axes(
        self, value: int, pairs: Sequence[PlacementPair], data: PlacementPair | None
    ) -> Sequence[PlacementPair]:
        """The pairs on the axes that the plan names."""
        if not self.names_data_axis:
            return pairs
        return (end_pair(self.graph, value) if data is None else data, *pairs)

    def _at_micro_batch(self, placement: Placement) -> Placement:
        """A placement of the traced batch, whose split factor may count samples, at the micro-batch."""
        if not isinstance(placement, Shard):
            return placement
        return Shard(placement.dim, self.graph.batch.scale(placement.split_factor, self.micro_batch))
