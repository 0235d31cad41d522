"""Rules of ops that multiply: linear, matmul, einsum, grouped matmul, attention, convolution."""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, LabelKind, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, broadcast_labels, replicated_rule


def linear(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[..., k], w[n, k], bias[n] -> [..., n]; a vector w[k] has no n, and the bias may broadcast. Local form along k: the
    bias is added on the first rank only."""
    labels = ShardingRuleBuilder()
    rows = labels.labels_of(inputs[0].shape[:-1])
    n = (labels.new_label(),) if len(inputs[1].shape) > 1 else ()
    k = labels.new_label("sum")
    roles = (*((row, "m") for row in rows if row != NO_LABEL), *((label, "n") for label in n), (k, "k"))
    result = (*rows, *n)
    biases = [broadcast_labels(value.shape, outputs[0].shape, result) for value in inputs[2:]]
    bias_once = (k,) if biases else ()
    sides = [(*rows, k), (*n, k), *biases]
    return labels.build(sides, [result], compute="matmul", roles=roles, local_form_labels=bias_once)


def addmm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """bias, x[m, k], w[k, n] -> [m, n]. Local form along k: the bias is added on the first rank only."""
    labels = ShardingRuleBuilder()
    m, n, k = labels.new_label(), labels.new_label(), labels.new_label("sum")
    bias = broadcast_labels(inputs[0].shape, outputs[0].shape, (m, n))
    roles = ((m, "m"), (n, "n"), (k, "k"))
    return labels.build([bias, (m, k), (k, n)], [(m, n)], compute="matmul", roles=roles, local_form_labels=(k,))


def matmul(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """a[..., m, k], b[..., k, n] -> [..., m, n], leading dims broadcast; a vector has no m or n."""
    first, second = inputs[0].shape, inputs[1].shape
    labels = ShardingRuleBuilder()
    k = labels.new_label("sum")
    m, n = ((labels.new_label(),) if len(shape) > 1 else () for shape in (first, second))
    lead_shape = outputs[0].shape[: len(outputs[0].shape) - len(m) - len(n)]
    lead = labels.labels_of(lead_shape)
    a = broadcast_labels(first[:-2], lead_shape, lead)
    b = broadcast_labels(second[:-2], lead_shape, lead)
    roles = tuple((label, "b" if label in a and label in b else "m") for label in lead if label != NO_LABEL)
    return labels.build(
        [(*a, *m, k), (*b, k, *n)],
        [(*lead, *m, *n)],
        compute="matmul",
        roles=(*roles, *((label, "m") for label in m), *((label, "n") for label in n), (k, "k")),
    )


def baddbmm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """bias, a[b, m, k], b[b, k, n] -> [b, m, n]. Local form along k: the bias is added on the first rank only."""
    labels = ShardingRuleBuilder()
    b, m, n = labels.labels_of(outputs[0].shape)
    k = labels.new_label("sum")
    bias = broadcast_labels(inputs[0].shape, outputs[0].shape, (b, m, n))
    roles = tuple((label, role) for label, role in ((b, "b"), (m, "m"), (n, "n"), (k, "k")) if label != NO_LABEL)
    sides = [bias, (b, m, k), (b, k, n)]
    return labels.build(sides, [(b, m, n)], compute="matmul", roles=roles, local_form_labels=(k,))


def outer(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """a[m], b[n] -> [m, n]."""
    labels = ShardingRuleBuilder()
    m, n = labels.labels_of(outputs[0].shape)
    return labels.build([(m,), (n,)], [(m, n)])


def bilinear(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[..., i], y[..., j], w[o, i, j], bias[o] -> [..., o]. Local form along i and j: the bias is added on the first
    rank only."""
    labels = ShardingRuleBuilder()
    rows = labels.labels_of(outputs[0].shape[:-1])
    o, i, j = labels.new_label(), labels.new_label("sum"), labels.new_label("sum")
    sides = [(*rows, i), (*rows, j), (o, i, j), (o,)]
    return labels.build(sides[: len(inputs)], [(*rows, o)], local_form_labels=(i, j) if len(inputs) > 3 else ())


def einsum(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Each letter is a label; a letter that an operand has twice is a diagonal and cannot be sharded. The dims that
    "..." stands for have letters of their own; without "->" the result has the letters that occur once, in alphabetical
    order."""
    operands, result = _expanded_equation(str(op.args[0]).replace(" ", ""), inputs)
    if len(operands) != len(inputs):
        return replicated_rule(op, inputs, outputs, known=False)
    labels = ShardingRuleBuilder()
    label_of: dict[str, int] = {}
    for letter in dict.fromkeys("".join(operands)):
        sizes = {
            size
            for subscript, value in zip(operands, inputs, strict=True)
            for other, size in zip(subscript, value.shape, strict=True)
            if other == letter
        }
        is_diagonal = any(subscript.count(letter) > 1 for subscript in operands)
        kind: LabelKind = "replicated" if is_diagonal else "parallel" if letter in result else "sum"
        label_of[letter] = labels.new_label(kind) if sizes != {1} else NO_LABEL

    def role(letter: str) -> str:
        if letter not in result:
            return "k"
        return "b" if all(letter in subscript for subscript in operands) else "m" if letter in operands[0] else "n"

    is_matmul = len(operands) == 2 and not any(len(set(subscript)) < len(subscript) for subscript in operands)
    return labels.build(
        [
            tuple(
                label_of[letter] if size != 1 else NO_LABEL for letter, size in zip(subscript, value.shape, strict=True)
            )
            for subscript, value in zip(operands, inputs, strict=True)
        ],
        [tuple(label_of[letter] for letter in result)],
        compute="matmul" if is_matmul else "memory",
        roles=tuple((label, role(letter)) for letter, label in label_of.items() if label != NO_LABEL)
        if is_matmul
        else (),
    )


def _expanded_equation(equation: str, inputs: Sequence[Value]) -> tuple[list[str], str]:
    """The subscripts of the operands and of the result, with a letter for each dim; no operands where the equation does
    not fit the inputs.

    >>> # "...k,kn->...n" of operands with 3 and 2 dims: (["ABk", "kn"], "ABn")
    """
    left, arrow, result = equation.partition("->")
    subscripts = left.split(",")
    if len(subscripts) != len(inputs):
        return [], ""
    num_letters = [len(subscript.replace("...", "")) for subscript in subscripts]
    num_dotted = [len(value.shape) - count for count, value in zip(num_letters, inputs, strict=True)]
    most_dotted = max((n for n, subscript in zip(num_dotted, subscripts, strict=True) if "..." in subscript), default=0)
    spare = list(map(chr, range(0x100, 0x100 + most_dotted)))  # letters that no equation has
    if not arrow:
        single = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        result = ("..." if "..." in left else "") + "".join(single)
    operands = [
        subscript.replace("...", "".join(spare[len(spare) - count :]) if count else "")
        for subscript, count in zip(subscripts, num_dotted, strict=True)
    ]
    if any(len(subscript) != len(value.shape) for subscript, value in zip(operands, inputs, strict=True)):
        return [], ""
    return operands, result.replace("...", "".join(spare))


def grouped_mm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[t, k], w[e, k, n], ends[e] -> [t, n]: rows are sorted by expert, those of expert e end before row ends[e].

    ``ends`` is replicated. Local form: a rank with rows [r, r + len) uses clamp(ends - r, 0, len); one with some of the
    experts computes their rows and has zeros elsewhere, so the result is partial."""
    if len(inputs) != 3 or len(inputs[0].shape) != 2 or len(inputs[1].shape) != 3:
        return replicated_rule(op, inputs, outputs, known=False)
    labels = ShardingRuleBuilder()
    t, n, k, e = labels.new_label(), labels.new_label(), labels.new_label("sum"), labels.new_label("sum")
    return labels.build(
        [(t, k), (e, k, n), (NO_LABEL,)],
        [(t, n)],
        compute="matmul",
        roles=((t, "m"), (n, "n"), (k, "k"), (e, "b")),
        local_form_labels=(t, e),
    )


def attention(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """q[..., h, q, d], k[..., g, s, d], v[..., g, s, d], mask: g key/value heads each serve h / g query heads. Other leading
    dims, heads included, may be missing or broadcast.

    Queries may be sharded by position; keys and values are then replicated, so that their all-gather is priced, as in
    context parallelism. Local form of sharded queries under a causal mask: the mask starts at the position of the rank's first
    query.
    """
    query, key, result = inputs[0].shape, inputs[1].shape, outputs[0].shape
    labels = ShardingRuleBuilder()
    lead = labels.labels_of(result[:-3])
    heads = (labels.new_label(),) if len(result) > 2 else ()
    q = labels.new_label()
    s, d, dv = (labels.new_label("replicated") for _ in range(3))
    kv_heads = heads
    groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    has_groups = bool(heads) and len(query) == len(key) and key[-3] < query[-3]
    if has_groups:
        kv_heads, repeat = (labels.new_label(),), labels.new_label()
        groups = ((heads, (*kv_heads, repeat)),)
        sizes = ((repeat, query[-3] // key[-3]),)

    def leading(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Labels of all dims of a tensor but its last two."""
        if shape[:-2] == result[:-2]:
            return (*lead, *heads)
        if has_groups and shape[-3:-2] == key[-3:-2]:
            return (*broadcast_labels(shape[:-3], result[:-3], lead), *kv_heads)
        return broadcast_labels(shape[:-2], result[:-2], (*lead, *heads))

    sides = [(*leading(query), q, d), (*leading(key), s, d), (*leading(inputs[2].shape), s, dv)]
    scores = (*result[:-1], key[-2])
    sides += [broadcast_labels(mask.shape, scores, (*lead, *heads, q, s)) for mask in inputs[3:]]
    batch_roles = (*((label, "b") for label in lead if label != NO_LABEL), *((label, "h") for label in heads))
    roles = (*batch_roles, (q, "q"), (s, "k"), (d, "d"))
    return labels.build(
        sides,
        [(*lead, *heads, q, dv)],
        compute="attention",
        roles=roles,
        view_groups=groups,
        hidden_label_sizes=sizes,
        local_form_labels=(q,) if op.argument(5, "is_causal", False) else (),
    )


def convolution(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[b, c_in, ...], w[c_out, c_in / groups, ...], bias[c_out] -> [b, c_out, ...], or without b; spatial dims are
    not sharded (they would need halo exchanges).

    Local form: along c_in the bias is added on the first rank only; along the channels of a depthwise convolution of
    samples a rank has as many groups as channels."""
    num_groups = op.argument(6, "groups", 1)
    num_spatial = len(inputs[1].shape) - 2
    local_form: tuple[int, ...]
    labels = ShardingRuleBuilder()
    batch = (labels.new_label(),) if len(inputs[0].shape) > num_spatial + 1 else ()
    channels = inputs[0].shape[-num_spatial - 1]
    space = labels.labels_of(inputs[0].shape[-num_spatial:], "replicated")
    out_space = labels.labels_of(outputs[0].shape[-num_spatial:], "replicated")
    kernel = labels.labels_of(inputs[1].shape[2:], "replicated")
    c_out = labels.new_label()
    if num_groups == 1:
        c_in = labels.new_label("sum")
        sides = [(*batch, c_in, *space), (c_out, c_in, *kernel), (c_out,)]
        local_form = (c_in,) if len(inputs) > 2 else ()
    elif batch and num_groups == channels == outputs[0].shape[1]:
        c_in = NO_LABEL
        sides = [(*batch, c_out, *space), (c_out, NO_LABEL, *kernel), (c_out,)]
        local_form = (c_out,)
    else:
        c_in = labels.new_label("replicated")
        labels.kinds[c_out] = "replicated"
        sides = [(*batch, c_in, *space), (c_out, labels.new_label("replicated"), *kernel), (c_out,)]
        local_form = ()
    ks = tuple((label, "k") for label in (c_in, *kernel) if label != NO_LABEL)
    ms = tuple((label, "m") for label in (*batch, *out_space) if label != NO_LABEL)
    return labels.build(
        sides[: len(inputs)],
        [(*batch, c_out, *out_space)],
        compute="matmul",
        roles=(*ms, (c_out, "n"), *ks),
        local_form_labels=local_form,
    )
