"""The ops whose local form (``OpShardingRule.local_form_labels``) the runtime implements: an option that needs one the
runtime lacks is not offered.

The implementations are in ``autopar.runtime.lower.local_kernels``; a test compares the two lists.
"""

from collections.abc import Iterable

from autopar.graph.ir import Op
from autopar.rules.op_sharding_rule import OpShardingRule

OPS_WITH_LOCAL_FORM = frozenset(
    (
        "addmm", "baddbmm", "batch_norm", "bilinear", "binary_cross_entropy", "binary_cross_entropy_with_logits", "conv1d",
        "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "cross_entropy_loss",
        "embedding", "huber_loss", "kl_div", "l1_loss", "linear", "mean", "mse_loss", "nll_loss", "nll_loss_nd",
        "scaled_dot_product_attention", "smooth_l1_loss", "soft_margin_loss",
    )
)  # fmt: skip


def can_run_sharded(op: Op, rule: OpShardingRule, labels: Iterable[int]) -> bool:
    """Whether a rank can run its shard of ``op`` if ``labels`` of its rule are sharded."""
    parts = op.target.split(".")
    name = parts[1] if len(parts) > 1 else parts[0]
    return name in OPS_WITH_LOCAL_FORM or not set(labels) & set(rule.local_form_labels)
