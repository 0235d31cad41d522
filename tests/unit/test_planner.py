"""From a model file to a plan, on small and real models."""

import re
import time
from fnmatch import fnmatch
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar.core.errors import AutoparError, InfeasibleError
from autopar.core.invariants import check_plan
from autopar.inter import micro_batch_search as size_search
from autopar.inter import parallel_search as lanes
from autopar.inter.stage_cost_tables import StageCostTables
from autopar.planner import planner, search_progress
from autopar.planner.planner import micro_batch_sizes, plan, submesh_sizes
from autopar.workload import Workload
from tests.conftest import example_workload

TINY = {"layers": 4, "hidden": 256, "heads": 4, "vocab": 512, "seq": 128}


def tiny(**search):
    return plan(example_workload("gpt", **TINY), gpus=8, global_batch=32, **search)


def test_every_invariant_holds_and_the_bound_is_not_above_the_step():
    found = tiny(cluster="p3.16xlarge")
    check_plan(found)
    assert found.estimate.fits
    assert found.search.lower_bound_s <= found.estimate.step_time_s
    assert [block.index for stage in found.stages for block in stage.blocks] == list(range(6))


def test_a_350m_gpt_on_8_h100_is_data_parallel():
    found = plan(example_workload("gpt", size="350M"), cluster="dgx-h100", gpus=8)
    check_plan(found)
    assert [(axis.name, axis.size) for stage in found.stages for axis in stage.axes] == [("dp", 8)]


def test_less_memory_never_makes_the_step_faster_and_ends_in_an_error_that_names_the_need():
    steps, budget, message = [], 4.0, ""
    while not message:
        try:
            found = tiny(memory_gib=budget)
        except InfeasibleError as error:
            message = str(error)
        else:
            assert found.estimate.peak_memory_bytes <= budget * 2**30
            steps.append(found.estimate.step_time_s)
            budget /= 1.5
    assert re.search(r"needs \d+\.\d\d GiB", message)
    assert steps == sorted(steps)
    assert len(steps) > 2


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("gpt", TINY),
        pytest.param("gpt", {**TINY, "vocab": 51200}, marks=pytest.mark.slow),
        pytest.param("moe", {**TINY, "layers": 2, "experts": 8, "group_size": 128}, marks=pytest.mark.slow),
    ],
)
def test_the_budget_that_the_error_names_does_and_less_does_not(model, settings):
    search = {"cluster": "p3.16xlarge", "gpus": 8, "global_batch": 32}
    workload = example_workload(model, **settings)
    with pytest.raises(InfeasibleError) as error:
        plan(workload, memory_gib=0.9, **search)
    needed = float(re.search(r"needs (\d+\.\d\d) GiB", str(error.value)).group(1))
    found = plan(workload, memory_gib=needed, **search)
    check_plan(found)
    assert found.estimate.peak_memory_bytes <= needed * 2**30
    with pytest.raises(InfeasibleError):
        plan(workload, memory_gib=needed - 0.02, **search)


def test_past_the_time_limit_the_incumbent_is_the_plan_and_nothing_is_claimed_of_the_rest(monkeypatch):
    started = time.perf_counter()
    clock = chain([started], repeat(started + 1e6))  # of the planner and its lanes; the search of one size has time
    for module in (planner, search_progress, lanes):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = tiny(cluster="p3.16xlarge", time_limit_s=1e3)
    check_plan(found)
    assert found.search.lower_bound_s == 0.0
    assert found.search.status == "feasible"


def test_no_restriction_of_the_search_is_faster():
    free = tiny().estimate.step_time_s
    for restriction in ({"recompute": "full"}, {"recompute": "none"}, {"micro_batch": 8}, {"schedule": "gpipe"}):
        assert free <= tiny(**restriction).estimate.step_time_s * (1 + 2e-3)  # the outer search's tolerance is 1e-3


@pytest.mark.parametrize(
    ("glob", "placements", "axes"),
    [("*.qkv.weight", "RS(0)", 2), ("*.qkv.weight", "RR", 2), ("layers.*", "S(0)R", 2), ("*", "S(0)", 1)],
)
def test_pins_are_satisfied_and_the_rest_is_searched(glob, placements, axes):
    found = tiny(cluster="p3.16xlarge", pins=((glob, placements),))
    check_plan(found)
    assert found.estimate.step_time_s >= tiny(cluster="p3.16xlarge").estimate.step_time_s * (1 - 1e-3)
    for stage in found.stages:
        assert len(stage.axes) == axes
        for ref in stage.blocks:
            for parameter in found.program(ref.program).parameters:
                if fnmatch(parameter.name, "*.qkv.weight"):
                    assert parameter.parameter.replace("_S(0,3)", "S(0)") == placements


def test_a_pin_may_be_a_strided_shard_of_the_data_axis():
    pins = (("layers.*.mlp.fc1.weight", "_S(0,2)S(0)"),)
    found = tiny(cluster="dgx-a100", pins=pins)
    pinned = {
        parameter.parameter
        for program in found.programs
        for parameter in program.parameters
        if fnmatch(parameter.name, "*.fc1.weight")
    }
    assert pinned == {"_S(0,2)S(0)"}


@pytest.mark.parametrize(
    ("pin", "says"),
    [
        (("nothing.*", "R"), "no parameter matches"),
        (("*", "S(0)S(0)S(0)"), "one or two axes"),
        (("layers.0.*", "R"), "equal blocks share one plan"),
    ],
)
def test_a_pin_that_cannot_be_satisfied_says_why(pin, says):
    with pytest.raises(AutoparError, match=says):
        tiny(pins=(pin,))


def test_stages_and_micro_batches_have_these_sizes():
    assert submesh_sizes(10, 8) == (1, 2, 4, 8, 10)
    assert submesh_sizes(64, 8) == (1, 2, 4, 8, 16, 32, 64)
    assert micro_batch_sizes(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("factor", [1e-3, 1e3, None])
def test_the_guess_of_a_micro_batch_sets_the_order_not_the_plan(monkeypatch, factor):
    def found():
        return plan(example_workload("gpt", **TINY), cluster="p3.16xlarge", gpus=4, global_batch=32)

    own_s, own_guesses = found().estimate.step_time_s, StageCostTables.guess_even_pipelines

    def guesses(tables):
        scale = factor if factor is not None and tables.stage_costs.micro_batch > 4 else 1.0
        return [(seconds * scale, stages) for seconds, stages in own_guesses(tables)] if factor is not None else []

    monkeypatch.setattr(StageCostTables, "guess_even_pipelines", guesses)
    assert found().estimate.step_time_s == pytest.approx(own_s, rel=1e-3)


@pytest.mark.parametrize("search", [{}, {"micro_batch": 4}, {"schedule": "interleaved"}])
def test_the_runner_up_is_another_pipeline_and_no_faster(search):
    found = tiny(cluster="p3.16xlarge", **search)
    name = r"micro-batch \d+ on \d+ stages?(?:, \d+ chunks each)?: (\S+) s, \+(\S+)%"
    step_s, behind = re.fullmatch(name, found.search.runner_up).groups()
    assert float(behind) >= 0.0
    assert float(step_s) >= found.estimate.step_time_s * 0.999  # four digits are printed


def test_a_capped_search_says_less_but_nothing_wrong(monkeypatch):
    search = {"cluster": "p3.16xlarge", "micro_batch": 8}
    whole = tiny(**search)
    monkeypatch.setattr(size_search, "MAX_SMALL_EVALUATIONS", 2)
    monkeypatch.setattr(size_search, "MAX_UNIFORM_EVALUATIONS", 2)
    monkeypatch.setattr(search_progress, "NUM_SIMULATED_GUESSES", 0)
    capped = tiny(**search)
    check_plan(capped)
    assert capped.search.lower_bound_s <= whole.estimate.step_time_s <= capped.estimate.step_time_s * (1 + 1e-3)


def test_a_model_that_the_host_binds_on_one_gpu_has_next_to_no_gap():
    found = plan(example_workload("gpt", **TINY), cluster="dgx-h100", gpus=1, global_batch=8)
    assert {item.kind: item.exposed_s for item in found.estimate.items}["launches"] > found.estimate.step_time_s / 2
    assert found.search.gap < 1e-3


def test_a_model_that_attends_without_samples_or_without_heads_is_planned():
    class Pool(nn.Module):
        """A table that attends to itself scales sequences that attend to themselves."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
            self.table = nn.Parameter(torch.empty(32, 64))

        def forward(self, x):
            x = self.first(x) * F.scaled_dot_product_attention(self.table, self.table, self.table).sum(0)
            return self.last(F.scaled_dot_product_attention(x, x, x, is_causal=True)).sum()

    workload = Workload(build_model=Pool, example_inputs=lambda batch_size: {"x": torch.empty(batch_size, 128, 64)})
    check_plan(plan(workload, gpus=8, global_batch=64))
