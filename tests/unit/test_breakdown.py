"""What an estimate is made of: it adds up to the step, and agrees with arithmetic done by hand from the cluster's tables."""

import pytest

from autopar.cluster import load_cluster
from autopar.core.errors import LayoutError
from autopar.core.layout import parse_layout
from autopar.core.plan import Plan, TimeItem
from autopar.graph.traced_model import trace_model
from autopar.manual.layout_pricer import LayoutPricer
from autopar.report.json_document import plan_document
from tests.conftest import example_workload

LAYERS, HIDDEN, SEQ, BATCH = 8, 2048, 1024, 64


@pytest.fixture(scope="module")
def pricer() -> LayoutPricer:
    settings = {"layers": LAYERS, "hidden": HIDDEN, "heads": 16, "vocab": 51200, "seq": SEQ}
    model = trace_model(example_workload("gpt", **settings), dtype="bf16")
    return LayoutPricer(
        model, cluster=load_cluster("dgx-a100"), gpus=16, global_batch=BATCH, memory_gib=None, optimizer="adamw"
    )


def priced(pricer: LayoutPricer, text: str) -> Plan:
    return pricer.plan(pricer.price(parse_layout(text)), 0.0)


def item(plan: Plan, kind: str, of: str = "") -> TimeItem:
    found = [one for one in plan.estimate.items if (one.kind, one.of) == (kind, of) and len(one.axes) < 2]
    assert len(found) == 1, (kind, of, plan.estimate.items)
    return found[0]


@pytest.mark.parametrize(
    "text",
    [
        "mbs=2",
        "zero=3",
        "tp=2,pp=4,vpp=2,recompute=full",
        "pp=4,schedule=gpipe,zero=2",
        "tp=8,sp=1,recompute=selective",
        "attn=math,overlap=0,fusion=none,zero=1",
        "stages=3@dp8+5@dp4*tp2",
        "pp=8,mbs=2,recompute=full",
    ],
)
def test_the_parts_add_up_to_the_step(pricer: LayoutPricer, text: str) -> None:
    plan = priced(pricer, text)
    estimate = plan.estimate
    assert sum(one.exposed_s for one in estimate.items) == pytest.approx(estimate.step_time_s, rel=1e-9)
    for one in estimate.items:
        assert 0 <= one.exposed_s <= one.total_s * (1 + 1e-9)
    assert estimate.time.matmul_s == item(plan, "matmul").total_s
    assert estimate.exposed_communication_s == pytest.approx(sum(one.exposed_s for one in estimate.items if one.of))
    document = plan_document(plan, None)["estimate"]["items"]
    assert [one["kind"] for one in document] == [one.kind for one in estimate.items]


def test_gathers_of_zero_3_are_two_of_every_weight_per_micro_batch(pricer: LayoutPricer) -> None:
    """Two all_gathers and a reduce_scatter of all weights per micro-batch (Rajbhandari et al., 2020, section 7.2.2), at
    the rate of a bucket of 128 MiB; the tied table is gathered where it is used first, as an input. What no backward reads
    (biases) is gathered once, but charged twice."""
    plan, cluster = priced(pricer, "zero=3"), load_cluster("dgx-a100")
    bucket_s = float(cluster.collective_s("all_gather", 2**27, cluster.axis_group(16, (16,), (0,))))
    num_bytes = 2 * plan.model.num_parameters
    wanted_s = (BATCH / 16) * 2 * num_bytes / 2**27 * bucket_s
    assert item(plan, "all_gather", "parameters").total_s == pytest.approx(wanted_s, rel=0.03)
    assert item(plan, "all_gather", "parameters").exposed_s < wanted_s
    assert plan.estimate.exposed_communication_s > 0


def test_recomputation_runs_forward_kernels_twice(pricer: LayoutPricer) -> None:
    once, recomputed, core = (
        item(priced(pricer, f"recompute={mode}"), "attention").total_s for mode in ("none", "full", "selective")
    )
    assert recomputed == core > once
    matmul_once, recomputed_matmul = (
        item(priced(pricer, f"recompute={mode}"), "matmul").total_s for mode in ("none", "full")
    )
    assert 1.25 < recomputed_matmul / matmul_once < 1.4  # 4 / 3: forward is a third of forward and backward


def test_a_pipeline_waits_as_long_as_its_bubble(pricer: LayoutPricer) -> None:
    """1F1B of S equal stages idles (S - 1) / (B + S - 1) of the step (Narayanan et al., 2021, section 2.2)."""
    plan = priced(pricer, "pp=4,mbs=1")
    B, S = plan.microbatches, len(plan.stages)
    idle = item(plan, "bubble").exposed_s + item(plan, "transfers").exposed_s
    assert 0.5 * (S - 1) / (B + S - 1) < idle / plan.estimate.step_time_s < (S - 1) / (B + S - 1)


def test_all_faults_at_once_stages_included(pricer: LayoutPricer) -> None:
    with pytest.raises(LayoutError) as caught:
        pricer.price(parse_layout("tp=3,pp=32,gbs=63"))
    text = "\n".join(caught.value.faults)
    for fault in (
        "does not divide 16 GPUs",
        "gbs=63",
        "tp=3 does not divide 16 attention heads",
        "32 stages are more than",
    ):
        assert fault in text
