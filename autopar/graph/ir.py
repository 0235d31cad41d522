"""The nouns of the graph: values, ops, the forward graph they form, its blocks and the profiles of its ops.

A graph is traced once, at a batch size ``TracedBatch.traced_size`` that is a multiple of a prime which divides no size
of the model. So every size that is proportional to the batch is recognised by that prime and can be scaled to any batch
size (``TracedBatch.scale``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from autopar.core.dtypes import ITEMSIZE

MATRIX_OPS = frozenset(
    (
        "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "_scaled_mm", "_grouped_mm",
        "grouped_mm_fallback", "scaled_dot_product_attention", "conv1d", "conv2d", "conv3d", "convolution",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lstm", "gru", "rnn_tanh",
    )
)  # fmt: skip
ValueKind = Literal["parameter", "buffer", "input", "constant", "activation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedBatch:
    """How sizes scale with the batch: traced at ``traced_size`` samples, a multiple of ``prime``.

    >>> batch = TracedBatch(traced_size=808, prime=101)
    >>> batch.scale(808 * 1024, 2), batch.scale(4096, 2)
    (2048, 4096)
    """

    traced_size: int
    prime: int

    def is_proportional(self, size: int) -> bool:
        """Whether a size (of a dimension, or a literal argument) is proportional to the batch."""
        return size > 0 and size % self.prime == 0

    def scale(self, size: int, batch_size: int) -> int:
        """``size`` as it would be at ``batch_size`` samples; raises ValueError where that is not an integer."""
        if not self.is_proportional(size):
            return size
        scaled, remainder = divmod(size * batch_size, self.traced_size)
        if remainder:
            raise ValueError(f"size {size} traced at batch {self.traced_size} is not an integer at batch {batch_size}")
        return scaled

    def bytes_factor(self, shapes: Iterable[tuple[int, ...]], batch_size: int) -> float:
        """The factor from the bytes of tensors of these traced shapes to those at ``batch_size`` samples: that of the
        shape with the most dims proportional to the batch (two in the similarities of a contrastive loss).

        >>> TracedBatch(traced_size=808, prime=101).bytes_factor([(808, 64), (808, 808)], 404)
        0.25
        """
        power = max((sum(map(self.is_proportional, shape)) for shape in shapes), default=0)
        return float((batch_size / self.traced_size) ** power)


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A tensor of the graph. ``shape`` is at the traced batch. ``qualified_names`` are all fully qualified names of a
    parameter or buffer (several when tied), () for other values. ``requires_grad``: it gets a gradient in the backward
    pass."""

    id: int
    name: str
    kind: ValueKind
    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16", "int64", "bool", ...
    requires_grad: bool
    qualified_names: tuple[str, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class InputRef:
    """Stands for a tensor among an op's literal arguments: ``index`` is its position in the op's ``inputs``."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One aten call. ``inputs`` are the ids of its tensor arguments in order of appearance; ``args`` and ``kwargs`` are
    the call's arguments with every tensor replaced by an ``InputRef``; ``outputs`` are the ids of the tensors that it
    returns (all of them for a multi-output op: ``getitem`` nodes are folded away)."""

    id: int
    name: str  # name of the fx node
    target: str  # "aten.linear.default"
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    module_path: str  # dotted path of the module that ran it, "" at the root
    source_location: str  # "file.py:123" in the user's code, "" when unknown

    @property
    def packet(self) -> str:
        """The name without namespace and overload: "linear" of "aten.linear.default"."""
        _, dot, rest = self.target.partition(".")
        return rest.partition(".")[0] if dot else self.target

    @property
    def is_attention(self) -> bool:
        """Whether the op is one of torch's variants of scaled dot product attention."""
        return "scaled_dot_product" in self.packet

    @property
    def is_matrix_op(self) -> bool:
        """Whether the op is a matmul, a convolution, an attention or a recurrent layer: they have all of a model's
        FLOPs."""
        return self.packet in MATRIX_OPS

    @property
    def is_in_place(self) -> bool:
        """Whether the op writes into its first input, by torch's naming: "add_", but not "__and__"."""
        return self.packet.endswith("_") and not self.packet.endswith("__")

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """A literal argument of the call, by position or else by name."""
        return self.args[position] if position < len(self.args) else dict(self.kwargs).get(name, default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """The forward pass, loss included. ``values[i].id == i`` and ``ops[i].id == i``; ops are in execution order.

    ``inputs`` are the ids of the model's inputs; ``outputs`` is the id of the loss alone."""

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: TracedBatch
    fingerprint: str  # independent of the batch the graph was traced at

    def depending_on_parameters(self) -> frozenset[int]:
        """Ids of the parameters and of all values computed from them: not of masks, positions and targets."""
        dependent = {value.id for value in self.values if value.kind == "parameter"}
        for op in self.ops:
            if not dependent.isdisjoint(op.inputs):
                dependent.update(op.outputs)
        return frozenset(dependent)

    def parameter_free(self) -> frozenset[int]:
        """Ids of the values that depend on no parameter: every rank computes what it needs of them by itself."""
        return frozenset(range(len(self.values))) - self.depending_on_parameters()

    def producers(self) -> dict[int, Op]:
        """Value id -> the op that returns it; parameters, buffers, inputs and constants have none."""
        return {value: op for op in self.ops for value in op.outputs}


def hashable_literal(literal: Any) -> Any:
    """A hashable key of a literal argument. Unlike Python's ``==`` it tells 1, 1.0 and True apart, and takes nan as
    equal to itself.

    >>> hashable_literal((1, 2.0)) == hashable_literal((1, 2))
    False
    >>> hashable_literal((InputRef(0), "a")) == hashable_literal((InputRef(0), "a"))
    True
    """
    if isinstance(literal, (tuple, list)):
        return tuple(map(hashable_literal, literal))
    if isinstance(literal, float):
        return ("float", repr(literal))
    if isinstance(literal, bool):
        return ("bool", literal)
    return literal


@dataclass(frozen=True, slots=True, kw_only=True)
class OpProfile:
    """What running one op costs, forward and backward, unsharded at the traced batch.

    FLOPs count matmul-like work only (matmul, convolution, attention). Bytes are those read plus those written by
    kernels that are not matmul-like, views excluded. ``saved_inputs``/``saved_outputs`` are the positions in
    ``Op.inputs``/``Op.outputs`` of the tensors that autograd saves for the backward; ``saved_internal_tensors`` are
    (shape, itemsize) of further saved tensors (masks, statistics). ``*_workspace_bytes`` are the peak of temporaries:
    what is allocated at once in addition to results, saved tensors and gradients. ``overwritten_inputs`` are positions
    of saved inputs whose storage the backward overwrites with their gradient."""

    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int
    forward_kernels: int
    backward_kernels: int
    saved_inputs: tuple[int, ...]
    saved_outputs: tuple[int, ...]
    saved_internal_tensors: tuple[tuple[tuple[int, ...], int], ...]
    forward_workspace_bytes: int = 0
    backward_workspace_bytes: int = 0
    overwritten_inputs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphProfile:
    """``ops[i]`` is the profile of op i. ``storage_owner[v]`` is the value whose storage value v shares: v itself unless
    it is a view (q, k and v split from one projection share its storage), so the saved bytes are those of distinct
    owners. ``unprofiled_ops`` are (id of an op, what of it could not be profiled)."""

    ops: tuple[OpProfile, ...]
    storage_owner: tuple[int, ...]
    unprofiled_ops: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive ops ``first_op <= id < end_op`` of the graph: the unit that stages are made of.

    ``kind`` is the number of its class of structurally equal blocks (ops, shapes, attributes and edges); blocks of one
    kind list corresponding values at corresponding positions in all three tuples. ``inputs`` are activations of earlier
    blocks and model inputs or constants; ``outputs`` are its activations that other blocks read, and the loss;
    ``parameters`` are its parameters and buffers."""

    index: int
    name: str  # "layers.3", "embedding", "head"
    kind: int
    first_op: int
    end_op: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: tuple[int, ...]
