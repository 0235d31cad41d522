"""Bounds on transfers against the transfers of random pipelines."""

import random

import pytest

from autopar.cluster.cost_tables import load_cluster
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.op_profiles import profile_graph
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.inter.block_pricer import BlockPricer
from autopar.inter.frontier_cache import UNPRICED
from autopar.inter.micro_batch_setting import MicroBatchSetting
from autopar.inter.stage_choice import StageChoice
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_span import DeviceStage
from autopar.inter.stage_transfers import first_devices
from autopar.planner.planner import submesh_sizes
from tests.conftest import example_workload

SMALL = {"layers": 10, "hidden": 128, "heads": 8, "vocab": 512, "seq": 64}


@pytest.fixture(scope="module")
def blocks():
    graph = hoist_light_ops(trace(example_workload("gpt", **SMALL), dtype="float16").graph)
    return BlockPricer(
        graph,
        split_into_blocks(graph),
        load_cluster("p3.16xlarge"),
        ExecutionModel(dtype="float16", optimizer="adamw", fp32_grads=True, accumulates_gradients=True),
        profile_graph(graph),
    )


@pytest.mark.parametrize("gpus", [6, 10, 12, 16, 20, 24])
def test_no_transfer_is_below_its_bound(blocks, gpus):
    setting = MicroBatchSetting(
        micro_batch=24, num_microbatches=8, num_devices=gpus, budget_bytes=float("inf"), recompute_modes=("none",)
    )
    costs = StageCosts(blocks, setting)
    sizes = tuple(size for size in submesh_sizes(gpus, 8) if costs.frontiers.meshes(size))
    bounds_s = costs.transfers.stage_boundary_bounds_s(sizes)
    rng = random.Random(gpus)
    tight = 0
    for _ in range(60):
        devices = []
        while sum(devices) < gpus:
            devices.append(rng.choice([size for size in sizes if size <= gpus - sum(devices)]))
        if not 1 < len(devices) <= len(blocks.blocks):
            continue
        ends = [*sorted(rng.sample(range(1, len(blocks.blocks)), len(devices) - 1)), len(blocks.blocks)]
        stages = tuple(map(DeviceStage, [0, *ends[:-1]], ends, devices))
        meshes = [rng.choice(costs.frontiers.meshes(size)) for size in devices]
        choices = [
            StageChoice(
                mesh=mesh,
                boundary=rng.randrange(len(costs.frontiers.frontier(0, mesh, UNPRICED).tables.boundary_roles)),
                mixes=(),
            )
            for mesh in meshes
        ]
        forward, backward = costs.transfers.transfer_times_s(stages, first_devices(devices, 8), choices)
        for at in range(len(stages) - 1):
            true_s = forward[at] + backward[at + 1]
            for size in devices[at : at + 2]:
                bound_s = bounds_s[sizes.index(size), stages[at][1], sum(devices[at + 1 :])]
                assert bound_s <= true_s * (1 + 1e-9)
                tight += bound_s > 0.99 * true_s
    assert tight > 10
