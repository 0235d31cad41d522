"""Where elimination is too wide: bounds below and choices above the optimum, which elimination knows here."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autopar.choice import mini_buckets
from autopar.choice.elimination import Eliminator
from autopar.choice.mini_buckets import MiniBuckets, make_eliminator
from autopar.core.invariants import check_plan
from autopar.manual.layout_pricer import plan_layout
from autopar.planner.planner import plan
from autopar.workload import Workload
from tests.conftest import example_workload

NUM_PRICES = 3


@pytest.fixture(autouse=True)
def _no_cache_of_other_limits():
    yield
    make_eliminator.cache_clear()


def made_up(seed):
    """Choices, edges, costs; some edges forbid pairs, some costs do not depend on the price."""
    rng = np.random.default_rng(seed)
    choices = tuple(int(count) for count in rng.integers(1, 6, rng.integers(4, 14)))
    edges = tuple((a, b) for a in range(len(choices)) for b in range(len(choices)) if a != b and rng.random() < 0.25)

    def table(*shape):
        return rng.random((NUM_PRICES if rng.random() < 0.6 else 1, *shape))

    node_costs = [table(count) for count in choices]
    edge_costs = [table(choices[a], choices[b]) for a, b in edges]
    for costs in edge_costs[:: 1 + seed % 4]:
        costs[:, rng.random(costs.shape[1:]) < 0.1] = np.inf
    return choices, edges, node_costs, edge_costs


def costs_of(choices, edges, node_costs, edge_costs):
    """(P, remaining nodes' choices ...) of solutions (nodes, P, ...)."""
    price = np.indices(choices.shape[1:])[0]

    def at(table, *index):
        return table[(price if table.shape[0] > 1 else np.zeros_like(price), *index)]

    nodes = sum(at(costs, choices[node]) for node, costs in enumerate(node_costs))
    return nodes + sum(at(costs, choices[a], choices[b]) for (a, b), costs in zip(edges, edge_costs, strict=True))


@pytest.mark.parametrize("max_cells", [8, 30, 10**9])
@pytest.mark.parametrize("seed", range(40))
def test_bounds_are_not_above_the_optimum_and_choices_not_below(seed, max_cells):
    choices, edges, node_costs, edge_costs = made_up(seed)
    best = Eliminator(choices, edges, (0, 1)).solve(node_costs, edge_costs).values
    order = [node for node, count in enumerate(choices) if count > 1 and node > 1]
    found = MiniBuckets(choices, edges, (0, 1), order, max_cells=max_cells).solve(node_costs, edge_costs)
    assert np.all(found.values <= best + 1e-9)
    if max_cells > 30:
        assert found.values == pytest.approx(best)
    solutions = found.backtrack_all()
    assert np.all(solutions[0] == np.arange(choices[0])[:, None])
    assert np.all(solutions[1] == np.arange(choices[1]))
    assert np.all(costs_of(solutions, edges, node_costs, edge_costs) >= best - 1e-9)


def test_choices_are_near_the_optimum():
    excess = []
    for seed in range(100, 140):
        choices, edges, node_costs, edge_costs = made_up(seed)
        edge_costs = [np.nan_to_num(costs, posinf=3.0) for costs in edge_costs]
        best = Eliminator(choices, edges).solve(node_costs, edge_costs).values
        order = [node for node, count in enumerate(choices) if count > 1]
        found = MiniBuckets(choices, edges, (), order, max_cells=30).solve(node_costs, edge_costs)
        excess.append(float(np.mean(costs_of(found.backtrack_all(), edges, node_costs, edge_costs) / best)) - 1)
    assert np.mean(excess) < 0.02


def test_only_what_is_too_wide_is_relaxed(monkeypatch):
    clique = tuple((a, b) for a in range(6) for b in range(a))
    assert isinstance(make_eliminator((4,) * 6, clique), Eliminator)
    monkeypatch.setattr(mini_buckets, "MAX_EXACT_CELLS", 4**5)
    make_eliminator.cache_clear()
    assert isinstance(make_eliminator((4,) * 6, clique), MiniBuckets)


def test_a_plan_of_relaxed_blocks_is_sound(monkeypatch):
    workload = example_workload("gpt", layers=2, hidden=256, heads=4, vocab=512, seq=128)
    search = {"cluster": "p3.16xlarge", "gpus": 8, "global_batch": 32}
    exact = plan(workload, **search)
    monkeypatch.setattr(mini_buckets, "MAX_EXACT_CELLS", 100)
    monkeypatch.setattr(mini_buckets, "MAX_GROUP_CELLS", 100)
    make_eliminator.cache_clear()
    relaxed = plan(workload, **search)
    check_plan(relaxed)
    assert relaxed.search.lower_bound_s <= exact.estimate.step_time_s
    assert exact.search.lower_bound_s <= relaxed.estimate.step_time_s * (1 + 1e-9)
    assert relaxed.estimate.step_time_s <= 1.2 * exact.estimate.step_time_s


class DenseBlock(nn.Module):
    """Every layer reads the outputs of all layers before it."""

    def __init__(self, layers: int = 10, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width * (at + 1), width) for at in range(layers))
        self.last = nn.Linear(width * (layers + 1), width)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(torch.relu(layer(torch.cat(found, 1))))
        return self.last(torch.cat(found, 1))


class Dense(nn.Module):
    """Two blocks and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DenseBlock() for _ in range(2))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(x, label)


def test_a_densely_connected_model_is_planned(monkeypatch):
    relaxed, solve = [], MiniBuckets.solve
    monkeypatch.setattr(MiniBuckets, "solve", lambda *args: relaxed.append(args) or solve(*args))

    def inputs(batch_size: int) -> dict[str, Tensor]:
        return {
            "x": torch.empty(batch_size, 64, device="meta"),
            "label": torch.empty(batch_size, dtype=torch.long, device="meta"),
        }

    found = plan(Workload(build_model=Dense, example_inputs=inputs), gpus=4, global_batch=64)
    check_plan(found)
    assert 0 < found.search.lower_bound_s <= found.estimate.step_time_s
    assert relaxed


def test_a_layout_of_experts_and_tensors_is_priced():
    workload = example_workload("moe", layers=2, hidden=256, heads=4, vocab=512, seq=128, experts=8, group_size=128)
    found = plan_layout(workload, cluster="p3.16xlarge", gpus=8, global_batch=32, layout="tp=2,ep=2,mbs=4")
    assert found.estimate.step_time_s > 0
