"""How tensors lie on the mesh of a stage, written for the plan: the data axis in front, then the inner axes.

on the data axis   what `intra.data_axis` says; where blocks meet (the default) S(dim) along the first dim that grows with
                   the batch; a tensor without one is whole there, and its gradient a sum of terms; a scalar that
                   carries a gradient (the loss) is itself a sum of terms
on every axis      Atom: S or _S, and so is the gradient    "R": R, gradient R
                   "G": R, gradient P                       "P": P, gradient R
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autopar.graph.ir import Graph, Op
from autopar.intra.data_axis import end_token
from autopar.intra.tables import BlockTables
from autopar.plan.plan import OpPlan, ValuePlan
from autopar.rules.atoms import Atom
from autopar.rules.options import Option, Token


class Lying:
    """Writes the placements of one graph's values; ``micro_batch`` counts its samples, and ``data_axis``
    says whether the mesh names a data axis."""

    def __init__(self, graph: Graph, micro_batch: int, data_axis: bool = True) -> None:
        self.graph, self.micro_batch, self.data_axis = graph, micro_batch, data_axis

    def op_plan(self, op: Op, options: Sequence[Option], data: Option, gathers_again: tuple[int, ...] = ()) -> OpPlan:
        """An op under one option per inner axis, and what the data axis does to it."""
        inputs = [(v, [option.inputs[i] for option in options], data.inputs[i]) for i, v in enumerate(op.inputs)]
        outputs = [(v, [option.outputs[i] for option in options], data.outputs[i]) for i, v in enumerate(op.outputs)]
        return OpPlan(
            name=op.name,
            inputs=tuple(self.forward(*lie) for lie in inputs),
            outputs=tuple(self.forward(*lie) for lie in outputs),
            input_gradients=tuple(self.gradient(*lie) for lie in inputs),
            output_gradients=tuple(self.gradient(*lie) for lie in outputs),
            gathers_again=gathers_again,
        )

    def data_op_plan(self, op: Op, num_inner: int) -> OpPlan:
        """An op that no parameter reaches: every rank runs it on its part of the batch."""
        whole = ["R"] * num_inner
        return OpPlan(
            name=op.name,
            inputs=tuple(self.forward(value, whole) for value in op.inputs),
            outputs=tuple(self.forward(value, whole) for value in op.outputs),
            input_gradients=("",) * len(op.inputs),
            output_gradients=("",) * len(op.outputs),
        )

    def at_boundary(self, tables: BlockTables, values: Sequence[int], boundary: int) -> tuple[ValuePlan, ...]:
        """Block inputs or outputs under one of the named boundary placements."""
        return tuple(self._value_plan(value, tables.boundary_tokens[value][boundary]) for value in values)

    def shared(self, tables: BlockTables, choices: NDArray[np.integer]) -> tuple[ValuePlan, ...]:
        """Values with several readers; ``choices`` is one choice per node."""
        return tuple(
            self._value_plan(hub.value, states[int(choices[hub.node])], cut)
            for hub, states, cut in zip(tables.space.hubs, tables.hub_states, tables.space.data_axis.hubs, strict=True)
        )

    def _value_plan(self, value: int, tokens: Sequence[Token], data: Token | None = None) -> ValuePlan:
        return ValuePlan(
            name=self.graph.values[value].name,
            placement=self.forward(value, tokens, data),
            gradient=self.gradient(value, tokens, data),
        )

    def forward(self, value: int, tokens: Sequence[Token], data: Token | None = None) -> str:
        return self._text(value, tokens, data, {"G": "R", "P": "P", "R": "R"})

    def gradient(self, value: int, tokens: Sequence[Token], data: Token | None = None) -> str:
        if not self.graph.values[value].requires_grad:
            return ""
        return self._text(value, tokens, data, {"G": "P", "P": "R", "R": "R"})

    def _text(self, value: int, tokens: Sequence[Token], data: Token | None, written: dict[str, str]) -> str:
        first = end_token(self.graph, value) if data is None else data
        every = (first, *tokens) if self.data_axis else tokens
        return "".join(self._cut(token) if isinstance(token, Atom) else written[token] for token in every)

    def _cut(self, atom: Atom) -> str:
        return replace(atom, repeats=self.graph.batch.scale(atom.repeats, self.micro_batch)).text
