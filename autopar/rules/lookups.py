"""Rules of ops that look up, pick or count by position: embedding, index, gather, scatter, one_hot, flip, histograms.

They hold value by value: an option never permutes rows inside a rank, as a reader elsewhere would see another order.
"""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.labels import Labels, argument, replicated
from autopar.rules.rule import NO_LABEL, OpRule


def embedding(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """weight[v, h], ids[...] -> [..., h]: a shard of the vocabulary looks up what it has, zero otherwise (its local form)."""
    labels = Labels()
    ids = labels.dims(inputs[1].shape)
    v, h = labels.new("sum"), labels.new()
    return labels.rule([(v, h), ids], [(*ids, h)], local_form=(v,))


def index(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """x[v, ...], index[...] -> x[index]: the rows that are asked for are independent, and so are the other dims.

    Local form of cut rows v: as a look-up in a part of a vocabulary, zeros for the rows that others hold."""
    places = op.args[1] if len(op.args) > 1 and isinstance(op.args[1], tuple) else ()
    if len(places) != 1 or len(inputs) != 2 or inputs[1].dtype == "bool":
        return replicated(op, inputs, outputs, known=True)
    labels = Labels()
    asked = labels.dims(inputs[1].shape)
    rest = labels.dims(inputs[0].shape[1:])
    floats = inputs[0].dtype.startswith(("float", "bfloat"))
    rows = labels.new("sum" if floats else "whole") if inputs[0].shape[0] > 1 else NO_LABEL
    return labels.rule([(rows, *rest), asked], [(*asked, *rest)], local_form=(rows,) if rows != NO_LABEL else ())


def histogram(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """histc(x, bins, min, max): counts of parts add up, unless the range is that of x itself (min = max)."""
    labels = Labels()
    fixed = argument(op, 2, "min", 0) != argument(op, 3, "max", 0)
    return labels.rule([labels.dims(inputs[0].shape, "sum" if fixed else "whole")], [(NO_LABEL,)])


def gather(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """gather, scatter, index_select and kin: x[...] picked along ``dim`` by an index of the same rank. A dim of one size in
    all tensors is parallel; ``dim`` is whole, but that each element a gather asks for is independent."""
    tensors = (*inputs, *outputs)
    rank = len(inputs[0].shape)
    dim = argument(op, 1, "dim", 0)
    if not rank or type(dim) is not int or any(len(value.shape) != rank for value in tensors):
        return replicated(op, inputs, outputs, known=True)
    labels = Labels()
    shared = [
        labels.new() if at != dim % rank and len({value.shape[at] for value in tensors}) == 1 else None
        for at in range(rank)
    ]
    picked = labels.new() if op.target.startswith("aten.gather.") else None

    def dims(value: Value, *, asks: bool) -> tuple[int, ...]:
        found = []
        for at, size in enumerate(value.shape):
            label = picked if asks and at == dim % rank else shared[at]
            found.append(NO_LABEL if size == 1 else label if label is not None else labels.new("whole"))
        return tuple(found)

    return labels.rule(
        [dims(value, asks=at == 1) for at, value in enumerate(inputs)], [dims(value, asks=True) for value in outputs]
    )


def one_hot(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """index[...] -> [..., classes]: the classes are whole."""
    labels = Labels()
    dims = labels.dims(inputs[0].shape)
    last = outputs[0].shape[-1]
    return labels.rule([dims], [(*dims, labels.new("whole") if last != 1 else NO_LABEL)])


def mirrored(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """flip, roll, tril, triu, repeat_interleave by a number: the dims acted on are whole, the others parallel."""
    name = op.target.split(".")[1]
    rank = len(inputs[0].shape)
    if name in ("tril", "triu"):
        acted = {rank - 2, rank - 1}
    else:
        given = argument(op, 1 if name == "flip" else 2, "dim" if name == "repeat_interleave" else "dims", None)
        if given is None or given == () or len(outputs[0].shape) != rank:
            return replicated(op, inputs, outputs, known=True)
        acted = {dim % rank for dim in (given if isinstance(given, tuple) else (given,))}
    labels = Labels()
    dims = tuple(
        NO_LABEL if size == 1 else labels.new("whole" if at in acted else "parallel")
        for at, size in enumerate(inputs[0].shape)
    )
    out = tuple(
        (NO_LABEL if size == 1 else labels.new("whole")) if at in acted else dims[at]
        for at, size in enumerate(outputs[0].shape)
    )
    return labels.rule([dims], [out], passes_gradient=True, passes_partial=True)
