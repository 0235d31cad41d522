"""Weights of a meta model: the same under every plan, as distributed as the model says, and never zeros unasked."""

import msgspec
import pytest
import torch
from torch import Tensor, nn

from autopar.core.errors import UsageError
from autopar.core.plan import Plan
from autopar.runtime.apply import build_trainer
from autopar.runtime.deferred_initialisation import DeferredInitialisation
from autopar.workload.workload import Workload
from tests.distributed import parity
from tests.distributed.parity_models import MODELS
from tests.distributed.plans import layout_plan
from tests.distributed.pool import Pool


def first_loss(plan_json: bytes, name: str) -> float:
    plan = msgspec.json.decode(plan_json, type=Plan)
    one = MODELS[name]
    workload = one.workload()
    trainer = build_trainer(plan, workload.build(), workload=workload, mode="reference", seed=3)
    return float(trainer.forward_backward(parity.random_batch(workload, plan.global_batch, 0, one.classes)))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["gpt-tied", pytest.param("llama", marks=SLOW), pytest.param("wide-resnet", marks=SLOW)]
)
def test_a_meta_model_starts_alike_under_all_plans(pool: Pool, name: str) -> None:
    found = []
    for layout in ("mbs=4", "tp=2,dp=2,mbs=2,zero=3"):
        plan = layout_plan(MODELS[name].workload(), layout)
        found += pool.run(plan.gpus, first_loss, msgspec.json.encode(plan), name)
    assert max(found) - min(found) < 1e-5 * max(found)


def test_as_the_model_says() -> None:
    """GPT's own init_weights: N(0, 0.02), projections into the residual stream narrower, norms 1, biases 0."""
    workload = MODELS["gpt-untied"].workload()
    made = DeferredInitialisation(workload.build(), workload, 0)
    assert abs(float(made.materialise("head.weight").std()) - 0.02) < 0.002
    assert abs(float(made.materialise("layers.0.mlp.fc2.weight").std()) - 0.02 / 8**0.5) < 0.001
    assert torch.equal(made.materialise("norm.weight"), torch.ones(32))
    assert torch.equal(made.materialise("layers.1.attn.qkv.bias"), torch.zeros(96))
    assert not torch.equal(made.materialise("layers.0.attn.qkv.weight"), made.materialise("layers.1.attn.qkv.weight"))


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.scale).mean()


def test_an_uninitialised_parameter_is_an_error() -> None:
    workload = Workload(build_model=Forgetful, example_inputs=lambda batch_size: {"x": torch.empty(batch_size, 4)})
    made = DeferredInitialisation(workload.build(), workload, 0)
    assert made.materialise("layer.weight").abs().max() <= 0.5
    with pytest.raises(UsageError, match="nothing initialises scale"):
        made.materialise("scale")
