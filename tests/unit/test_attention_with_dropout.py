"""Attention with dropout, on a mesh without axes, against torch's own at a dropout so small that nothing is dropped."""

import pytest
import torch
import torch.nn.functional as F

from autopar.graph.ir import InputRef, Op, Value
from autopar.rules.registry import sharding_rule
from autopar.runtime.lower.local_kernels import run_op
from autopar.runtime.lower.local_op import KernelContext, LocalOp
from autopar.runtime.lower.op_sharding import OpSharding
from autopar.runtime.lower.rank_mesh import RankMesh

SHAPE = (2, 3, 4, 8)
NO_DROPOUT = 1e-12


@pytest.mark.parametrize("scale", [None, 0.0, 0.5, -1.0])
def test_the_scale_is_that_of_the_op(scale: float | None) -> None:
    kwargs = () if scale is None else (("scale", scale),)
    args = (*map(InputRef, range(3)), None, NO_DROPOUT, False)
    op = Op(
        id=0,
        name="attention",
        target="aten.scaled_dot_product_attention.default",
        inputs=(0, 1, 2),
        outputs=(3,),
        args=args,
        kwargs=kwargs,
        module_path="",
        source_location="",
    )
    values = tuple(
        Value(id=at, name=f"v{at}", kind="activation", shape=SHAPE, dtype="float64", requires_grad=True)
        for at in range(4)
    )
    none = ((),) * 3
    sharding = OpSharding(
        rule=sharding_rule(op, values),
        inputs=none,
        input_gradients=none,
        outputs=((),),
        output_gradients=((),),
        labels=(),
    )
    mesh = RankMesh(names=(), sizes=(), first_rank=0, coordinate=(), group_names={})
    local = LocalOp(
        op=op,
        sharding=sharding,
        mesh=mesh,
        input_shapes=(SHAPE,) * 3,
        output_shapes=(SHAPE,),
        device=torch.device("cpu"),
    )
    torch.manual_seed(0)
    tensors = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(3)]
    context = KernelContext(full_input=lambda at: tensors[at], random_key=torch.tensor(7))
    expected = F.scaled_dot_product_attention(*tensors, scale=scale)
    torch.testing.assert_close(run_op(local, tensors, context), expected)
