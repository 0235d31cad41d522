"""Which ops have the local form that some of their options need (`OpRule.local_form`): what nobody can run, nobody plans.

The runtime implements them (`autopar.runtime.kernels`); a test holds the two lists together.
"""

from collections.abc import Iterable

from autopar.graph.ir import Op
from autopar.rules.rule import OpRule

WITH_LOCAL_FORM = frozenset(
    {
        "addmm",
        "batch_norm",
        "binary_cross_entropy_with_logits",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "cross_entropy_loss",
        "embedding",
        "l1_loss",
        "linear",
        "mean",
        "mse_loss",
        "scaled_dot_product_attention",
        "smooth_l1_loss",
    }
)


def can_run(op: Op, rule: OpRule, labels: Iterable[int]) -> bool:
    """Whether a rank can run its part of ``op`` when ``labels`` of its rule are sharded."""
    parts = op.target.split(".")
    name = parts[1] if len(parts) > 1 else parts[0]
    return name in WITH_LOCAL_FORM or not set(labels) & set(rule.local_form)
