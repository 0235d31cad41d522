"""Bounds of stages against their variants: no random mix of frontier points that fits is below its bound."""

import numpy as np
import pytest

from autopar.cluster.cost_tables import load_cluster
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.op_profiles import profile_graph
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.inter.block_pricer import BlockPricer
from autopar.inter.frontier_cache import PRICED, UNPRICED
from autopar.inter.micro_batch_setting import MicroBatchSetting
from autopar.inter.stage_choice import sum_totals
from autopar.inter.stage_cost_tables import StageCostTables
from autopar.inter.stage_costs import StageCosts
from autopar.intra import block_totals as tt
from tests.conftest import example_workload

SIZES = (1, 2, 4, 8)
MODES = ("none", "selective", "full")


@pytest.fixture(scope="module", params=["p3.16xlarge", "dgx-h100"])
def blocks(request):
    workload = example_workload("gpt", layers=5, hidden=512, heads=8, vocab=2048, seq=256)
    graph = hoist_light_ops(trace(workload, dtype="float16").graph)
    execution = ExecutionModel(dtype="float16", optimizer="adamw", fp32_grads=True, accumulates_gradients=True)
    return BlockPricer(graph, split_into_blocks(graph), load_cluster(request.param), execution, profile_graph(graph))


def stage_costs(blocks, gpus, budget_mib, num_microbatches=16):
    setting = MicroBatchSetting(
        micro_batch=8,
        num_microbatches=num_microbatches,
        num_devices=gpus,
        budget_bytes=budget_mib * 2**20,
        recompute_modes=MODES,
    )
    return StageCosts(blocks, setting)


def ways(book, kind, mesh, in_flight, rng):
    """Random choices for a stage: a boundary placement, and a random point for every block of it."""
    phases = [UNPRICED, PRICED]
    columns = np.flatnonzero(book.num_blocks[kind])
    points = {
        (column, phase): book.frontiers.frontier(int(column), mesh, phase) for column in columns for phase in phases
    }
    for _ in range(60):
        boundary = int(rng.integers(points[columns[0], UNPRICED].totals.shape[1]))
        parts = []
        for column in columns:
            for _ in range(int(book.num_blocks[kind, column])):
                one = points[column, phases[int(rng.integers(2))]]
                parts.append((one.totals[int(rng.integers(len(one.objectives))), boundary], 1.0))
        whole = sum_totals(parts)
        if np.isfinite(whole).all():
            yield whole, float(tt.memory_bytes(whole, in_flight))


@pytest.mark.parametrize("budget_mib", [1100, 1300, 2000, 16000])
@pytest.mark.parametrize("num_microbatches", [2, 16])
def test_no_way_to_run_a_stage_is_below_its_bound(blocks, budget_mib, num_microbatches):
    rng = np.random.default_rng(budget_mib + num_microbatches)
    book = stage_costs(blocks, 16, budget_mib, num_microbatches)
    tables = StageCostTables(book, SIZES)
    compared = 0
    for size in SIZES:
        for in_flight in (1, 2, 3, 5, 7):
            if in_flight > num_microbatches:
                continue
            bounds = tables.bounds(size, in_flight)
            possible = sorted(set(book.stage_kind_of[tables.possible_stages(size, in_flight)].tolist()) - {-1})
            for kind in possible[:: max(1, len(possible) // 4)]:
                for mesh in book.frontiers.meshes(size):
                    for whole, memory in ways(book, kind, mesh, in_flight, rng):
                        if memory > book.pricing.tensor_budget_bytes:
                            continue
                        forward, backward, step = (float(seconds) for seconds in book.pricing.times_s(whole))
                        near = 1 + 1e-9
                        assert bounds.forward_s[kind] <= forward * near
                        assert bounds.forward_backward_s[kind] <= (forward + backward) * near
                        assert bounds.step_s[kind] <= step * near
                        assert bounds.busy_s[kind] <= (num_microbatches * (forward + backward) + step) * near
                        compared += 1
    assert compared > (20 if budget_mib < 1200 else 500)


def test_what_cannot_fit_is_known_before_any_price(blocks):
    in_flight = (4, 3, 2, 1)[::-1]
    lean = [
        StageCostTables(stage_costs(blocks, 8, mib), SIZES).can_any_pipeline_fit(in_flight) for mib in (200, 900, 4000)
    ]
    assert not lean[0]
    assert lean[-1]
    assert lean == sorted(lean)


def test_a_guess_is_above_the_bound_of_work_and_none_where_nothing_fits(blocks):
    roomy = StageCostTables(stage_costs(blocks, 8, 16000), SIZES)
    assert len(roomy.guess_even_pipelines()) > 1
    for seconds, stages in roomy.guess_even_pipelines():
        assert roomy.work_lower_bound_s() <= seconds
        assert sum(devices for _, _, devices in stages) == 8
        assert [end for _, end, _ in stages[:-1]] == [first for first, _, _ in stages[1:]]
    assert min(roomy.guess_even_pipelines())[0] < 10 * roomy.work_lower_bound_s()
    assert StageCostTables(stage_costs(blocks, 8, 200), SIZES).guess_even_pipelines() == []


def test_a_block_with_an_auxiliary_loss_runs_between_any_boundaries():
    """The scalar loss of a GShard layer is replicated; where a boundary wants it partial, that is free."""
    sizes = {"hidden": 256, "heads": 4, "vocab": 512, "seq": 128, "experts": 4, "group_size": 128}
    workload = example_workload("moe", layers=4, **sizes)
    graph = hoist_light_ops(trace(workload, dtype="float16").graph)
    execution = ExecutionModel(dtype="float16", optimizer="adamw", fp32_grads=True, accumulates_gradients=True)
    blocks = BlockPricer(graph, split_into_blocks(graph), load_cluster("p3.16xlarge"), execution, profile_graph(graph))
    book = stage_costs(blocks, 8, 16 * 2**10, 4)
    for mesh in (mesh for mesh in book.frontiers.meshes(8) if mesh.inner_sizes):
        for column in range(len(book.variants)):
            assert np.isfinite(book.frontiers.frontier(column, mesh, UNPRICED).bound_s).all()
