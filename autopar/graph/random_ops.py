"""Ops that draw random numbers, and which of these are reproducible under any plan.

The runtime draws the numbers of dropouts and of ``INDEXED_RANDOM_OPS`` by the global index of each element, so they are
the same under every plan. Any other random op would draw from the generator of each rank, and replicas would differ:
tracing rejects it.
"""

import torch

from autopar.core.errors import ModelError
from autopar.graph.ir import Graph, Op
from autopar.graph.op_arguments import resolve_overload

INDEXED_RANDOM_OPS = frozenset(
    ("rand.default", "rand_like.default", "randn.default", "randn_like.default", "bernoulli.default")
)
_DROPOUT_ARGUMENT = {"dropout": 1, "feature_dropout": 1, "scaled_dot_product_attention": 4}  # its position
_RECURRENT_OPS = ("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")


def dropout_probability(op: Op) -> float:
    """The probability with which a dropout, or attention with dropout, drops an element; 0 for other ops."""
    name = op.packet
    if name not in _DROPOUT_ARGUMENT:
        return 0.0
    probability = float(op.argument(_DROPOUT_ARGUMENT[name], "dropout_p", 0.0))
    return probability if name == "scaled_dot_product_attention" or op.args[2] else 0.0


def is_random(op: Op) -> bool:
    """Whether an op draws random numbers, which the runtime draws by global index."""
    return dropout_probability(op) > 0.0 or op.target.removeprefix("aten.") in INDEXED_RANDOM_OPS


def check_random_ops(graph: Graph) -> None:
    """Raises ModelError for the first op whose random numbers would depend on the plan."""
    for op in graph.ops:
        if _draws_per_rank(op):
            place = (
                f" at {op.source_location}" if op.source_location else f" in {op.module_path}" if op.module_path else ""
            )
            raise ModelError(
                f"{op.target}{place} draws random numbers that would differ from rank to rank\n"
                "  use torch.nn.functional.dropout, torch.rand, torch.randn or torch.bernoulli, or draw them outside the "
                "model and pass them as inputs"
            )


def _draws_per_rank(op: Op) -> bool:
    """Whether an op would draw from the generator of its rank."""
    target = op.target.removeprefix("aten.")
    if target.split(".")[0] in _DROPOUT_ARGUMENT or target in INDEXED_RANDOM_OPS:
        return False
    if target in _RECURRENT_OPS:
        return bool(op.args[4] > 1 and op.args[5] and op.args[6])  # dropout between its layers
    try:
        overload = resolve_overload(op.target)
    except AttributeError:
        return False
    return torch.Tag.nondeterministic_seeded in getattr(overload, "tags", ())
