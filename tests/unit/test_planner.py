"""The whole way from a model file to a plan, on small and real models."""

import re
from pathlib import Path

from autopar.inter.planner import micro_batches, plan, submesh_sizes
from autopar.plan.errors import InfeasibleError
from autopar.plan.invariants import check
from autopar.workload import load_workload

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {"layers": 4, "hidden": 256, "heads": 4, "vocab": 512, "seq": 128}


def tiny(**search):
    return plan(load_workload(str(EXAMPLES / "gpt.py"), **TINY), gpus=8, global_batch=32, **search)


def test_every_invariant_holds_and_the_bound_is_not_above_the_step():
    found = tiny(cluster="p3.16xlarge")
    check(found)
    assert found.estimate.fits
    assert found.search.lower_bound_s <= found.estimate.step_time_s
    assert [block.index for stage in found.stages for block in stage.blocks] == list(range(6))


def test_a_350m_gpt_on_8_h100_is_data_parallel():
    found = plan(load_workload(str(EXAMPLES / "gpt.py"), size="350M"), cluster="dgx-h100", gpus=8)
    check(found)
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


def test_no_restriction_of_the_search_is_faster():
    free = tiny().estimate.step_time_s
    for restriction in ({"recompute": "full"}, {"recompute": "none"}, {"micro_batch": 8}, {"schedule": "gpipe"}):
        assert free <= tiny(**restriction).estimate.step_time_s * (1 + 2e-3)  # the outer search's tolerance is 1e-3


def test_device_counts_of_stages_and_micro_batches():
    assert submesh_sizes(10, 8) == (1, 2, 4, 8, 10)
    assert submesh_sizes(64, 8) == (1, 2, 4, 8, 16, 32, 64)
    assert micro_batches(12) == [1, 2, 3, 4, 6, 12]
