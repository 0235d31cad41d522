"""Half precision with fp32 masters, loss scaling, and dropout that does not depend on the plan."""

from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.core.plan import Plan
from autopar.runtime.apply import build_trainer
from autopar.runtime.count_collectives import CollectiveCounts, collective_differences, counts_of_stages
from autopar.runtime.lower.randomness import apply_dropout
from autopar.runtime.trainer import Trainer
from autopar.workload.workload import Workload
from tests.distributed import parity
from tests.distributed.parity_models import MODELS
from tests.distributed.plans import layout_plan
from tests.distributed.pool import Pool
from tests.distributed.random_plans import random_plan


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 12)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = F.dropout(self.tokens(ids), 0.25, self.training)
        q, k, v = self.qkv(x).view(*ids.shape, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.25)
        return self.out(F.dropout(y.transpose(1, 2).reshape(x.shape), 0.1, self.training))


def dropped_workload() -> Workload:
    def example_inputs(batch_size: int) -> dict[str, Tensor]:
        return {name: torch.empty(batch_size, 4, dtype=torch.long, device="meta") for name in ("ids", "labels")}

    def loss_fn(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), inputs["labels"].flatten())

    return Workload(build_model=Dropped, example_inputs=example_inputs, loss_fn=loss_fn)


def losses(plan_json: bytes, source: object, classes: int, mode: str, lr: float, dtype: str | None) -> list[float]:
    """Losses of four steps, and of the step's scale where there is one."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    workload = source()  # type: ignore[operator]
    trainer = build_trainer(
        plan,
        parity.real_model(workload, 0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        workload=workload,
        mode=mode,
        dtype=dtype,
    )
    found = []
    for step in range(4):
        if trainer.loss_scale is not None and step == 0:
            trainer.loss_scale.factor = 2.0**60  # overflows: the first step is skipped
        loss = float(trainer.step(parity.random_batch(workload, plan.global_batch, 0, classes)))
        if trainer.loss_scale is not None and step == 0:
            assert trainer.loss_scale.overflowed
            assert trainer.loss_scale.factor == 2.0**59
            trainer.loss_scale.factor = 2.0**10
            continue
        found.append(loss)
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_dropout_is_the_plan_s_business_no_more(pool: Pool, seed: int) -> None:
    one = losses_of(pool, layout_plan(dropped_workload(), "mbs=4"), "lowered")
    assert len(set(one)) == 4  # each step drops others
    other = losses_of(pool, random_plan(dropped_workload(), seed), "lowered" if seed % 2 else "reference")
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-9


def losses_of(pool: Pool, plan: Plan, mode: str) -> list[float]:
    source = dropped_workload
    return pool.run(plan.gpus, losses, msgspec.json.encode(plan), source, 12, mode, 1e-3, "float64")[0]


def test_drop_keeps_its_share() -> None:
    """A third is dropped and the rest scaled up: mean 1, and no two rows alike."""
    indices = [torch.arange(200), torch.arange(300)]
    dropped = apply_dropout(torch.ones(200, 300), indices, (200, 300), 1 / 3, torch.tensor(5), 2)
    assert abs(float((dropped == 0).float().mean()) - 1 / 3) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.01
    assert len({tuple(row.tolist()) for row in dropped}) == 200


def test_half_precision_trains_like_fp32(pool: Pool) -> None:
    model = MODELS["gpt-untied"]

    def run(dtype: str) -> list[float]:
        plan = layout_plan(model.workload(), "tp=2,dp=2,mbs=1,zero=1", dtype=dtype, cluster="dgx-h100")
        return pool.run(4, losses, msgspec.json.encode(plan), model.workload, 64, "reference", 3e-3, None)[0]

    exact = run("fp32")
    assert exact[-1] < 0.9 * exact[0]
    for got, wanted in zip(run("bf16"), exact, strict=True):
        assert abs(got - wanted) < 0.05 * wanted


def test_fp16_skips_a_step_that_overflows(pool: Pool) -> None:
    model = MODELS["gpt-untied"]
    plan = layout_plan(model.workload(), "dp=2,mbs=1,zero=2", dtype="fp16", cluster="p3.16xlarge")
    found = pool.run(2, losses, msgspec.json.encode(plan), model.workload, 64, "reference", 3e-3, None)[0]
    assert len(found) == 3
    assert found[-1] < found[0]


def counted(plan_json: bytes) -> CollectiveCounts:
    """The collectives of a step in the plan's own dtype."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    workload = MODELS["gpt-tied"].workload()
    trainer = build_trainer(
        plan, parity.real_model(workload, 0), optimizer=lambda given: torch.optim.AdamW(given), workload=workload
    )
    return trainer.count_collectives(parity.random_batch(workload, plan.global_batch, 0, 64))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "layout",
    [
        "tp=2,dp=2,mbs=1,zero=0",
        "dp=4,mbs=1,zero=1",
        pytest.param("dp=2,tp=2,mbs=1,zero=3", marks=pytest.mark.slow),
        "pp=2,dp=2,mbs=1,zero=2",
    ],
)
def test_half_precision_runs_the_listed_collectives(pool: Pool, layout: str, dtype: str) -> None:
    """fp16 gradients are summed over ranks in fp16, bf16 ones in fp32; those of tied weights go between stages in fp32."""
    plan = layout_plan(
        MODELS["gpt-tied"].workload(), layout, dtype=dtype, cluster="p3.16xlarge" if dtype == "fp16" else "dgx-h100"
    )
    assert plan.execution.dtype == dtype
    ran = counts_of_stages(pool.run(4, counted, msgspec.json.encode(plan)), plan)
    assert collective_differences(ran, plan, plan.estimate.collectives) == ()
    reduced = {kind for _, kind, _ in ran}
    assert reduced & {"all_reduce", "reduce_scatter"}


def save_and_load_scale(plan_json: bytes, folder: str) -> tuple[float, int]:
    """The scale's factor and good steps that a fresh trainer finds in a checkpoint."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    workload = MODELS["gpt-untied"].workload()

    def trainer() -> Trainer:
        model = parity.real_model(workload, 0)
        return build_trainer(
            plan, model, optimizer=lambda given: torch.optim.AdamW(given), workload=workload, mode="reference"
        )

    first, second = trainer(), trainer()
    assert first.loss_scale is not None
    first.loss_scale.factor, first.loss_scale.good_steps = 2.0**9, 7
    first.save(folder, 1)
    second.load(folder)
    assert second.loss_scale is not None
    return second.loss_scale.factor, second.loss_scale.good_steps


def test_the_loss_scale_is_in_the_checkpoint(pool: Pool, tmp_path: Path) -> None:
    plan = layout_plan(MODELS["gpt-untied"].workload(), "dp=2,mbs=1", dtype="fp16", cluster="p3.16xlarge")
    found = pool.run(2, save_and_load_scale, msgspec.json.encode(plan), str(tmp_path))
    assert found == [(2.0**9, 7)] * 2
