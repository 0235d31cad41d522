"""Manual layouts: priced by the model of the search, and never better than it."""

import pytest

from autopar.core.errors import LayoutError
from autopar.core.invariants import check_plan
from autopar.manual.layout_pricer import plan_layout
from autopar.planner.planner import plan
from autopar.workload import load_workload
from tests.conftest import example_workload

LAYOUTS = [
    "",
    "zero=1",
    "zero=3",
    "tp=2,sp=1",
    "tp=8,sp=1,mbs=4",
    "tp=4,pp=2,mbs=8",
    "pp=4,mbs=2",
    "tp=2,pp=2,recompute=full,zero=1",
    "pp=2,mbs=4,recompute=selective",
]


def small():
    settings = {"layers": 4, "hidden": 1024, "heads": 8, "vocab": 4096, "seq": 512}
    return example_workload("gpt", **settings)


def test_the_plan_is_no_slower_than_any_layout_that_fits():
    found = plan(small(), cluster="p3.16xlarge", gpus=8, global_batch=64)
    for text in LAYOUTS:
        priced = plan_layout(small(), cluster="p3.16xlarge", gpus=8, global_batch=64, layout=text)
        check_plan(priced)
        assert priced.search.status == "fixed"
        if priced.estimate.fits:
            assert found.estimate.step_time_s <= priced.estimate.step_time_s * (1 + 2e-3), text


def test_sequence_parallelism_and_recompute_move_memory_the_way_they_should():
    def saved(text):
        priced = plan_layout(small(), cluster="dgx-a100", gpus=8, global_batch=64, layout=text)
        return max(stage.memory.saved_activations_bytes for stage in priced.stages)

    assert saved("tp=8,sp=1") < saved("tp=8")
    assert saved("tp=8,recompute=full") < saved("tp=8,recompute=selective") <= saved("tp=8")


def test_zero_shards_state_as_published():
    """Rajbhandari et al., 2020: 4 + 12 bytes a parameter on 8 ranks become 2 + 2 (+ fp32 gradients) + 12 / 8."""

    def state(text):
        memory = plan_layout(small(), cluster="dgx-a100", gpus=8, global_batch=64, layout=text).stages[0].memory
        return memory.state_bytes

    parameters = plan_layout(small(), cluster="dgx-a100", gpus=8, global_batch=64, layout="").model.num_parameters
    assert state("") == pytest.approx(18 * parameters, rel=1e-6)
    assert state("zero=1") == pytest.approx((6 + 12 / 8) * parameters, rel=1e-3)
    assert state("zero=3") == pytest.approx(18 / 8 * parameters, rel=1e-3)


def test_all_faults_at_once():
    with pytest.raises(LayoutError) as caught:
        plan_layout(small(), gpus=8, global_batch=64, layout="tp=3,mbs=5")
    assert len(caught.value.faults) >= 2


def test_similarities_of_a_batch_with_itself_grow_twice(tmp_path) -> None:
    """A contrastive loss compares all samples of a micro-batch: twice the samples are four times the bytes."""
    model = tmp_path / "contrastive.py"
    model.write_text(
        "import torch\n"
        "class Pair(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.one, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)\n"
        "    def forward(self, x, y):\n"
        "        scores = (self.one(x) @ self.other(y).T) * 2\n"
        "        return torch.nn.functional.cross_entropy(scores, torch.arange(x.shape[0], device=x.device))\n"
        "def build_model():\n"
        "    return Pair()\n"
        "def example_inputs(batch_size):\n"
        "    return {k: torch.empty(batch_size, 8, device='meta') for k in 'xy'}\n"
    )
    workload = load_workload(str(model))
    saved_bytes = [
        plan_layout(workload, cluster="dgx-h100", gpus=1, layout=f"mbs={b},gbs={b}").estimate.peak_tensor_bytes
        for b in (4096, 8192)
    ]
    assert saved_bytes[0] > 4 * 4096**2 * 2  # the scores in half precision, at least twice
    assert saved_bytes[1] / saved_bytes[0] == pytest.approx(4, rel=0.02)
