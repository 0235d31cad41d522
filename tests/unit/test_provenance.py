"""Tags of prices: the limits of tables, and what an estimate counts."""

import pytest
import torch
from torch import nn

import autopar
from autopar.cluster import load_cluster
from autopar.cluster.cluster import RankGroup
from autopar.cost.compute_time import ShardedOp
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.provenance_tags import attention_tag, collective_tag, matmul_tag, op_tags
from autopar.graph.traced_model import trace_model
from autopar.rules.registry import sharding_rule

A100, V100 = load_cluster("dgx-a100"), load_cluster("p3.16xlarge")
SETTINGS = {"layers": 2, "hidden": 512, "heads": 8, "ffn": 2048, "vocab": 1024, "seq": 1024}


def inside(num_ranks: int) -> RankGroup:
    return RankGroup(num_ranks=num_ranks, ranks_per_node=num_ranks, num_nodes=1, groups_per_node=1)


def test_a_matmul_is_measured_inside_the_table_of_its_device_only() -> None:
    assert matmul_tag(A100.device, 4096, 4096, 4096) == "measured"
    assert matmul_tag(V100.device, 4096, 4096, 4096) == "modelled"  # the curve of an A100, scaled
    assert matmul_tag(A100.device, 4096, 4096, 64) == "extrapolated"
    assert matmul_tag(A100.device, 65536, 4096, 4096) == "measured"  # looked up transposed
    assert matmul_tag(A100.device, 65536, 65536, 4096) == "extrapolated"
    assert matmul_tag(A100.device, 4096, 4096, 4096, batch=8) == "modelled"


def test_flash_attention_is_measured_forward_with_the_heads_of_the_table() -> None:
    assert attention_tag(A100.device, 2048, 64, 128, backward=False) == "measured"
    assert attention_tag(A100.device, 2048, 64, 128, backward=True) == "modelled"
    assert attention_tag(A100.device, 2048, 64, 64, backward=False) == "modelled"
    assert attention_tag(A100.device, 128, 64, 128, backward=False) == "extrapolated"


def test_a_collective_is_measured_among_the_ranks_of_a_curve_inside_a_node() -> None:
    assert collective_tag(A100, "all_reduce", 2**20, inside(8)) == "measured"
    assert collective_tag(A100, "all_reduce", 2**20, inside(3)) == "modelled"
    assert collective_tag(A100, "all_reduce", 2**50, inside(8)) == "extrapolated"
    across = RankGroup(num_ranks=16, ranks_per_node=8, num_nodes=2, groups_per_node=1)
    assert collective_tag(A100, "all_reduce", 2**20, across) == "modelled"


@pytest.mark.parametrize(("layout", "collectives"), [("dp=1", 0), ("tp=2", 2 * 2 * 2)])
def test_prices_of_a_stage_are_counted_once(layout: str, collectives: int) -> None:
    """Two layers with two all-reduces each way; all the rest of tp is in embedding and head."""
    workload = autopar.load_workload("examples/gpt.py", **SETTINGS)
    gpus = 2 if collectives else 1
    found = autopar.estimate(workload, cluster="dgx-a100", gpus=gpus, layout=layout, global_batch=2)
    assert set(found.provenance) == set(found.provenance_s) == {"measured", "modelled", "extrapolated"}
    parts = found.time
    seconds = parts.matmul_s + parts.attention_s + parts.memory_bound_s + parts.optimizer_s
    seconds += sum(parts.communication_s.values())
    # the additions of accumulated gradients are in the parts alone; small compared with the rest
    assert sum(found.provenance_s.values()) == pytest.approx(seconds, rel=0.05)
    listed = sum(one.count for one in found.collectives)
    assert listed >= collectives
    assert sum(found.provenance.values()) > 20 + listed


class AddedProduct(nn.Module):
    """A bias plus a product whose first operand is data."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.batched = batched
        self.weight = nn.Parameter(torch.empty(*((4,) if batched else ()), 4096, 64))
        self.bias = nn.Parameter(torch.empty(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.batched:
            return torch.baddbmm(self.bias, x.expand(4, -1, -1), self.weight).square().mean()
        return torch.addmm(self.bias, x, self.weight).square().mean()


@pytest.mark.parametrize(("batched", "status"), [(False, "measured"), (True, "modelled")])
def test_the_operands_of_a_product_are_not_its_bias(batched: bool, status: str) -> None:
    """At 512 rows the backward is the weight's gradient alone, (64, 512) @ (512, 4096), inside the table. The data's would
    contract 64, which is outside."""
    workload = autopar.Workload(
        build_model=lambda: AddedProduct(batched), example_inputs=lambda rows: {"x": torch.empty(rows, 4096)}
    )
    model = trace_model(workload, dtype="bf16")
    graph = model.graph
    op = next(op for op in graph.ops if op.target.startswith(("aten.addmm", "aten.baddbmm")))
    sharded = ShardedOp(
        graph=graph,
        op=op,
        rule=sharding_rule(op, graph.values),
        profile=model.profile.ops[op.id],
        local_batch=512,
        degrees={},
    )
    execution = ExecutionModel(dtype="bfloat16", optimizer="adamw", fp32_grads=False, accumulates_gradients=False)
    assert op_tags(sharded, A100.device, execution)[1] == status
