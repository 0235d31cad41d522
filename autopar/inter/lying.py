"""How tensors lie on the mesh of a stage, written for the plan: the data axis in front, then the inner axes.

on the data axis   S(dim) along the dim that grows with the batch; a tensor without one is whole there, and its
                   gradient a sum of terms; a scalar that carries a gradient (the loss) is itself a sum of terms
on an inner axis   Atom: S or _S, and so is the gradient    "R": R, gradient R
                   "G": R, gradient P                       "P": P, gradient R
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autopar.graph.ir import Graph, Op, Value
from autopar.intra.tables import BlockTables
from autopar.plan.plan import OpPlan, ValuePlan
from autopar.rules.atoms import Atom
from autopar.rules.options import Option, Token


class Lying:
    """Writes the placements of one graph's values; ``micro_batch`` counts its samples, and ``data_axis``
    says whether the mesh names a data axis."""

    def __init__(self, graph: Graph, micro_batch: int, data_axis: bool = True) -> None:
        self.graph, self.micro_batch, self.data_axis = graph, micro_batch, data_axis

    def op_plan(self, op: Op, options: Sequence[Option]) -> OpPlan:
        """An op under one option per inner axis."""
        inputs = [(v, [option.inputs[i] for option in options]) for i, v in enumerate(op.inputs)]
        outputs = [(v, [option.outputs[i] for option in options]) for i, v in enumerate(op.outputs)]
        return OpPlan(
            name=op.name,
            inputs=tuple(self.forward(v, tokens) for v, tokens in inputs),
            outputs=tuple(self.forward(v, tokens) for v, tokens in outputs),
            input_gradients=tuple(self.gradient(v, tokens) for v, tokens in inputs),
            output_gradients=tuple(self.gradient(v, tokens) for v, tokens in outputs),
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
            self._value_plan(hub.value, states[int(choices[hub.node])])
            for hub, states in zip(tables.space.hubs, tables.hub_states, strict=True)
        )

    def _value_plan(self, value: int, tokens: Sequence[Token]) -> ValuePlan:
        return ValuePlan(
            name=self.graph.values[value].name,
            placement=self.forward(value, tokens),
            gradient=self.gradient(value, tokens),
        )

    def forward(self, value: int, tokens: Sequence[Token]) -> str:
        found = self.graph.values[value]
        data = self._data_dim(found)
        first = data or ("P" if not found.shape and found.requires_grad else "R")
        return (first if self.data_axis else "") + "".join(
            self._cut(t) if isinstance(t, Atom) else "R" if t == "G" else t for t in tokens
        )

    def gradient(self, value: int, tokens: Sequence[Token]) -> str:
        found = self.graph.values[value]
        if not found.requires_grad:
            return ""
        first = self._data_dim(found) or ("P" if found.shape else "R")
        conjugate = {"G": "P", "P": "R", "R": "R"}
        return (first if self.data_axis else "") + "".join(
            self._cut(t) if isinstance(t, Atom) else conjugate[t] for t in tokens
        )

    def _cut(self, atom: Atom) -> str:
        return replace(atom, repeats=self.graph.batch.scale(atom.repeats, self.micro_batch)).text

    def _data_dim(self, value: Value) -> str:
        grows = next((dim for dim, size in enumerate(value.shape) if self.graph.batch.grows(size)), None)
        return "" if grows is None else f"S({grows})"
