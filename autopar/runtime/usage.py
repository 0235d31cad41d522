"""What an op's planned placements mean by its sharding rule, axis by axis.

On each axis an op does one of three things, and the placements of all its tensors and their gradients follow:

    sharded      along labels of its rule: inputs with a label are cut, those without replicated with a partial gradient;
                 outputs with a label are cut, those without partial (or replicated, where the kernel exchanges by
                 itself)
    passing      linear in its inputs: partial sums in, partial sums out
    replicated   every rank computes the same; where everything behind it is replicated too, up to parameters whose
                 gradient may be partial, a partial gradient goes through it (a backward is linear in the gradient)

The candidate that agrees with most planned placements is taken. So an op never runs on placements under which its local
result would be wrong, whatever a plan says: what differs from the plan is converted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from autopar.graph.ir import Graph, Op, Value
from autopar.rules.local_forms import can_run
from autopar.rules.registry import rule_of
from autopar.rules.rule import NO_LABEL, OpRule
from autopar.runtime.layout import Cut, Placement, Token, is_legal

_LINEAR_IN_ALL = frozenset(("add.Tensor", "sub.Tensor", "cat.default", "stack.default"))
_LINEAR_IN_ONE = frozenset(
    ("sum.default", "sum.dim_IntList", "mean.default", "mean.dim", "neg.default", "mul.Tensor", "mul.Scalar", "div.Tensor",
     "div.Scalar", "to.dtype", "_to_copy.default", "clone.default", "contiguous.default", "alias.default")
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisUse:
    """What an op does on one axis: a token per input and output, and of their gradients; ``labels`` it shards."""

    inputs: tuple[Token, ...]
    input_gradients: tuple[Token, ...]
    outputs: tuple[Token, ...]
    output_gradients: tuple[Token, ...]
    labels: frozenset[int]

    @property
    def replicated(self) -> bool:
        return not self.labels and "P" not in self.inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an op does on a mesh: the placements it takes and gives, of its tensors and their gradients. ``labels[a]``
    are the labels of its rule sharded on axis a; ``exchanges`` whether some of them are exchanged inside the kernel."""

    rule: OpRule
    inputs: tuple[Placement, ...]
    input_gradients: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    output_gradients: tuple[Placement, ...]
    labels: tuple[frozenset[int], ...]

    def axes_of(self, label: int) -> tuple[int, ...]:
        """The axes that shard a label."""
        return tuple(axis for axis, labels in enumerate(self.labels) if label in labels)

    def summed_axes(self, output: int = 0) -> tuple[int, ...]:
        """The axes on which an output is a partial sum of the op's own making."""
        token = self.outputs[output]
        return tuple(axis for axis, labels in enumerate(self.labels) if labels and token[axis] == "P")


class UsageReader:
    """Reads usages of ops of one graph at ``micro_batch`` samples on a mesh of ``sizes``."""

    def __init__(self, graph: Graph, micro_batch: int, sizes: Sequence[int]) -> None:
        self.graph, self.micro_batch, self.sizes = graph, micro_batch, tuple(sizes)

    def shape(self, value: int) -> tuple[int, ...]:
        """The global shape of a value."""
        return tuple(self.graph.batch.scale(size, self.micro_batch) for size in self.graph.values[value].shape)

    def read(self, op: Op, inputs: Sequence[Placement], outputs: Sequence[Placement], pure: Sequence[bool]) -> Usage:
        """The usage of ``op`` planned with these placements; ``pure[a]``: on axis a a partial gradient may go through
        it when it is replicated."""
        rule = rule_of(op, self.graph.values)
        call = _Call(rule, op, self)
        uses = [
            call.best(
                axis, [placement[axis] for placement in inputs], [placement[axis] for placement in outputs], pure[axis]
            )
            if size > 1
            else call.replicated(pure[axis])
            for axis, size in enumerate(self.sizes)
        ]
        for axis in reversed(range(len(self.sizes))):
            if self._is_legal(op, uses):
                break
            uses[axis] = call.replicated(pure[axis])
        return Usage(
            rule=rule,
            inputs=_per_tensor(use.inputs for use in uses),
            input_gradients=_per_tensor(use.input_gradients for use in uses),
            outputs=_per_tensor(use.outputs for use in uses),
            output_gradients=_per_tensor(use.output_gradients for use in uses),
            labels=tuple(use.labels for use in uses),
        )

    def _is_legal(self, op: Op, uses: Sequence[AxisUse]) -> bool:
        sides = (
            (op.inputs, _per_tensor(use.inputs for use in uses)),
            (op.outputs, _per_tensor(use.outputs for use in uses)),
        )
        return all(
            is_legal(self.shape(value), placement, self.sizes)
            for values, placements in sides
            for value, placement in zip(values, placements, strict=True)
        )


def _per_tensor(per_axis: Iterable[Sequence[Token]]) -> tuple[Placement, ...]:
    return tuple(zip(*per_axis, strict=True))


class _Call:
    """One op with its rule: makes and compares what it may do on an axis."""

    def __init__(self, rule: OpRule, op: Op, reader: UsageReader) -> None:
        self.rule, self.op, self.reader = rule, op, reader
        values = reader.graph.values
        self.inputs: list[Value] = [values[value] for value in op.inputs]
        self.outputs: list[Value] = [values[value] for value in op.outputs]
        self.label_sizes = self._label_sizes()

    def _label_sizes(self) -> dict[int, int]:
        batch, micro_batch = self.reader.graph.batch, self.reader.micro_batch
        sizes = {label: batch.scale(size, micro_batch) for label, size in self.rule.sizes}
        for values, labels in ((self.op.inputs, self.rule.inputs), (self.op.outputs, self.rule.outputs)):
            for value, dims in zip(values, labels, strict=True):
                sizes.update(
                    (label, size)
                    for label, size in zip(dims, self.reader.shape(value), strict=True)
                    if label != NO_LABEL
                )
        return sizes

    def best(self, axis: int, inputs: Sequence[Token], outputs: Sequence[Token], pure: bool) -> AxisUse:
        candidates = [self.replicated(pure)]
        if "P" in inputs and self._is_linear():
            candidates.append(self._passing())
        sides = zip((*inputs, *outputs), (*self.rule.inputs, *self.rule.outputs), strict=True)
        cuts = dict.fromkeys((token, dims) for token, dims in sides if isinstance(token, Cut))
        for cut, dims in cuts:
            pieces = self._spread(dims, cut, self.reader.sizes[axis])
            if pieces is not None and can_run(self.op, self.rule, pieces):
                candidates.append(self._sharded(pieces))

        def agreeing(use: AxisUse) -> int:
            return sum(
                have == planned for have, planned in zip((*use.inputs, *use.outputs), (*inputs, *outputs), strict=True)
            )

        return max(candidates, key=agreeing)

    def replicated(self, pure: bool) -> AxisUse:
        gradient: Token = "P" if pure else "R"
        return AxisUse(
            inputs=("R",) * len(self.inputs),
            input_gradients=(gradient,) * len(self.inputs),
            outputs=("R",) * len(self.outputs),
            output_gradients=(gradient,) * len(self.outputs),
            labels=frozenset(),
        )

    def _is_linear(self) -> bool:
        name = self.op.target.removeprefix("aten.")
        floating = [value.dtype.startswith(("float", "bfloat", "complex")) for value in (*self.inputs, *self.outputs)]
        if not all(floating):
            return False
        if name in _LINEAR_IN_ALL:
            return len(self.inputs) > 1 or name in ("cat.default", "stack.default")
        return len(self.inputs) == 1 and (
            name in _LINEAR_IN_ONE or (self.rule.passes_partial and bool(self.rule.outputs))
        )

    def _passing(self) -> AxisUse:
        return AxisUse(
            inputs=("P",) * len(self.inputs),
            input_gradients=("R",) * len(self.inputs),
            outputs=("P",) * len(self.outputs),
            output_gradients=("R",) * len(self.outputs),
            labels=frozenset(),
        )

    def _spread(self, dims: Sequence[int], cut: Cut, degree: int) -> dict[int, int] | None:
        """label -> pieces, when the tensor of ``dims`` is cut so; None where the op cannot run like that."""
        label = dims[cut.dim] if cut.dim < len(dims) else NO_LABEL
        if label == NO_LABEL or self._is_whole(label):
            return None
        group = next((group for group in self.rule.groups if any(label in side for side in group)), None)
        if group is None:
            whole = self.label_sizes[label] % cut.pieces == 0
            return {label: cut.pieces} if whole and self.label_sizes[label] >= degree else None
        here = next(side for side in group if label in side)
        start = cut.pieces * prod(self.label_sizes[other] for other in here[: here.index(label)])
        pieces: dict[int, int] = {}
        for side in group:
            found = self._at(side, start, degree)
            if found is None or self._is_whole(found[0]):
                return None
            pieces[found[0]] = found[1]
        # A label that no tensor shows stands for whole outputs of a split, which a cut would give to different ranks.
        shown = {label for dims in (*self.rule.inputs, *self.rule.outputs) for label in dims}
        return pieces if self.rule.compute == "attention" or shown.issuperset(pieces) else None

    def _at(self, side: Sequence[int], start: int, degree: int) -> tuple[int, int] | None:
        """The label of a side, and its pieces, that a cut of the flattened side in ``start`` pieces falls into."""
        before = 1
        for label in side:
            size = self.label_sizes[label]
            if before <= start < before * size:
                pieces, rest = divmod(start, before)
                if rest or size % pieces or (size // pieces) % degree:
                    return None
                return label, pieces
            before *= size
        return None

    def _is_whole(self, label: int) -> bool:
        return label < len(self.rule.kinds) and self.rule.kinds[label] == "whole"

    def _sharded(self, pieces: dict[int, int]) -> AxisUse:
        inside = any(label < len(self.rule.kinds) and self.rule.kinds[label] == "inside" for label in pieces)
        shown = any(label in dims for dims in self.rule.outputs for label in pieces)
        lacking = "R" if inside and not shown else "P"
        inputs = [_cut(dims, pieces) for dims in self.rule.inputs]
        outputs = [_cut(dims, pieces) or lacking for dims in self.rule.outputs]
        return AxisUse(
            inputs=tuple(cut or "R" for cut in inputs),
            input_gradients=tuple(
                cut or ("P" if value.requires_grad else "R") for cut, value in zip(inputs, self.inputs, strict=True)
            ),
            outputs=tuple(outputs),
            output_gradients=tuple("R" if token == "P" else token for token in outputs),
            labels=frozenset(pieces),
        )


def _cut(dims: Sequence[int], pieces: dict[int, int]) -> Cut | None:
    for dim, label in enumerate(dims):
        if label in pieces:
            return Cut(dim, pieces[label])
    return None


def settled(placement: Placement, sizes: Sequence[int]) -> Placement:
    """The placement with what it says of axes of one rank, where all tokens mean the same, written "R"."""
    return tuple("R" if size == 1 else token for token, size in zip(placement, sizes, strict=True))


def gradient_of(placement: Placement) -> Placement:
    """How the gradient of a tensor lies whose readers want nothing else: partial sums have whole gradients."""
    return tuple("R" if token == "P" else token for token in placement)
