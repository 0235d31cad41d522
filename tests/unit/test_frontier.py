"""Lagrangian optima against the frontier points of all memory prices: none is above the priced time and memory of any
point, and for a transformer's layer they are near the lowest."""

import numpy as np
import pytest

from autopar.cluster.cost_tables import load_cluster
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.op_profiles import profile_graph
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.inter.block_pricer import BlockPricer, StageMesh
from autopar.inter.mesh_totals import with_launch_time
from autopar.intra import block_totals as tt
from autopar.intra.priced_objectives import memory_priced_objectives
from tests.conftest import example_workload

MODELS = {
    "gpt": {"layers": 3, "hidden": 1024, "heads": 8, "vocab": 2048, "seq": 512},
    "llama": {"layers": 2, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 2048, "seq": 2048},
    "moe": {"layers": 2, "hidden": 512, "heads": 8, "experts": 8, "vocab": 2048, "seq": 256, "group_size": 256},
    "wide_resnet": {"layers": 50, "base_channels": 64, "width_factor": 2},
}
MODES = ("none", "selective", "full")
MICRO_BATCH, NUM_MICROBATCHES = 8, 16


def blocks_of(name: str) -> BlockPricer:
    workload = example_workload(name, **MODELS[name])
    graph = hoist_light_ops(trace(workload, dtype="float16").graph)
    execution = ExecutionModel(dtype="float16", optimizer="adamw", fp32_grads=True, accumulates_gradients=True)
    return BlockPricer(graph, split_into_blocks(graph), load_cluster("p3.16xlarge"), execution, profile_graph(graph))


def values_and_bounds(
    blocks: BlockPricer, kind: int, mesh: StageMesh, weight: float
) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """Family and mode of each row, what the points of its mode come to at its prices (points, boundaries), its bound."""
    rows = memory_priced_objectives(blocks.stream_s_per_byte, MODES, weight, gathers_can_bind=True)
    points = blocks.frontier(kind, frozenset(), mesh, rows, micro_batch=MICRO_BATCH, num_microbatches=NUM_MICROBATCHES)
    found = []
    for at, row in enumerate(rows):
        same = points.totals[[other for other, one in enumerate(rows) if one.mode == row.mode]]
        time_s = same[..., tt.FORWARD] + same[..., tt.BACKWARD]
        if row.family == "hidden":
            reduced_s = np.maximum(same[..., tt.STEP_OVERLAPPABLE] - same[..., tt.BACKWARD], 0.0)
            hidden_s = blocks.cluster.overlap_contention * np.minimum(
                same[..., tt.STEP_OVERLAPPABLE], same[..., tt.BACKWARD]
            )
            time_s = time_s + (reduced_s + hidden_s + same[..., tt.STEP_EXPOSED]) / NUM_MICROBATCHES
        memory = same[..., tt.STATE] + weight * same[..., tt.SAVED]
        found.append((row.family, row.mode, time_s + row.price_s_per_byte * memory, with_launch_time(points)[at]))
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "mesh",
    [
        StageMesh(data_size=1, inner_sizes=(4,)),
        StageMesh(data_size=4, inner_sizes=(2,)),
        StageMesh(data_size=8, inner_sizes=()),
    ],
    ids=str,
)
def test_no_point_is_below_a_rows_optimum(name, mesh):
    blocks = blocks_of(name)
    for kind in blocks.first_of_kind:
        for weight in (1.0, 16.0):
            for family, mode, values, bounds in values_and_bounds(blocks, kind, mesh, weight):
                for boundary, bound_s in enumerate(bounds):
                    fits = values[:, boundary][np.isfinite(values[:, boundary])]
                    assert not len(fits) or bound_s <= fits.min() * (1 + 1e-9), (kind, family, mode, boundary)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_layers_optimum_is_near_its_best_point(name):
    blocks = blocks_of(name)
    layer = blocks.blocks[1].kind
    for weight in (1.0, 16.0):
        for family, _, values, bounds in values_and_bounds(
            blocks, layer, StageMesh(data_size=1, inner_sizes=(4,)), weight
        ):
            if family == "hidden":
                assert bounds.min() >= 0.9 * values.min()
