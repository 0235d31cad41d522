"""One process against a plan: what the workers of the parity tests run.

The oracle is the user's own model under torch's autograd, micro-batch by micro-batch; it shares nothing with the runtime.
"""

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from autopar.core.plan import Plan
from autopar.runtime.apply import build_trainer
from autopar.runtime.count_collectives import CollectiveCounts
from autopar.runtime.stored_parameters import select_indices, stored_indices
from autopar.verify.single_process import Float64Mode
from autopar.workload.model_file import load_workload
from autopar.workload.workload import Workload, accepted_settings
from tests.distributed import once


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model file with settings small enough for a test."""

    path: str
    settings: tuple[tuple[str, Any], ...]
    classes: int = 64
    batch: int = 8

    def workload(self) -> Workload:
        return load_workload(self.path, **dict(self.settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What one rank found: its loss and one process's (``expected``); per parameter whose norm counts on it, the squared error
    and the squared norm of the gradient; the collectives that ran on it in a step."""

    loss: float
    expected: float
    errors: dict[str, tuple[float, float]]
    ran: CollectiveCounts


def real_model(workload: Workload, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The workload's model on the CPU with random values, no zeros and ones that would hide a bug."""
    model = workload.build_model(
        **{key: value for key, value in workload.settings.items() if key in accepted(workload)}
    )
    generator = torch.Generator().manual_seed(seed)
    residual = [module.norm3.weight for module in model.modules() if hasattr(module, "norm3")]
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() < 2 else 1.5 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.dim() < 2:
                parameter.add_(1.0)
        for parameter in residual:  # a deep sum of branches stays well conditioned
            parameter.mul_(0.2)
    return model.to(dtype).train()


def accepted(workload: Workload) -> frozenset[str]:
    """Settings that the model's builder takes."""
    names = accepted_settings(workload.build_model)
    return frozenset(workload.settings) if names is None else names


def random_batch(workload: Workload, size: int, seed: int, classes: int) -> dict[str, Tensor]:
    """Integers below ``classes``, or the workload's own random inputs."""
    real = workload.real_inputs(size, seed)
    if real is not None:
        return real
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(classes, meta.shape, generator=generator)
        if not meta.is_floating_point()
        else torch.randn(meta.shape, generator=generator)
        for name, meta in workload.inputs(size).items()
    }


def reference_gradients(model: nn.Module, workload: Workload, batch: dict[str, Tensor], count: int) -> Tensor:
    """Loss of one process over ``count`` micro-batches; gradients are left in ``.grad``. A model in fp64 computes all in
    fp64, whatever dtype its code casts to."""
    double = next(model.parameters()).dtype == torch.float64
    from autopar.graph.torch_export import scalar_loss

    parts = {name: tensor.chunk(count) for name, tensor in batch.items()}
    total = torch.zeros((), dtype=torch.float64)
    for at in range(count):
        inputs = {name: part[at] for name, part in parts.items()}
        with Float64Mode() if double else nullcontext():
            loss = scalar_loss(model(**inputs), workload.loss_fn, inputs) / count
        loss.backward()
        total = total + loss.detach()
    return total


def known_gradients(
    source: Callable[[], Workload], size: int, count: int, seed: int, classes: int, double: bool
) -> tuple[float, dict[str, Tensor | None]]:
    """Loss of one process and the gradient of each parameter, computed once for all plans with these micro-batches."""

    def make() -> tuple[float, dict[str, Tensor | None]]:
        workload = once.workload_of(source)
        model = real_model(workload, seed, torch.float64 if double else torch.float32)
        loss = reference_gradients(model, workload, given_batch(workload, size, seed, classes, double), count)
        return float(loss), {name: each.grad for name, each in model.named_parameters(remove_duplicate=False)}

    return once.once((pickle.dumps(source), size, count, seed, classes, double), make)


def given_batch(workload: Workload, size: int, seed: int, classes: int, double: bool) -> dict[str, Tensor]:
    """A random batch, in fp64 where ``double``."""
    batch = random_batch(workload, size, seed, classes)
    if not double:
        return batch
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def check_gradients(
    source: Callable[[], Workload], plan_json: bytes, mode: str, classes: int, seed: int = 0, double: bool = False
) -> Checked:
    """A step of plain SGD: this rank's loss and gradients against one process's, and the collectives that ran."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    workload = once.workload_of(source)
    model = real_model(workload, seed, torch.float64 if double else torch.float32)
    batch = given_batch(workload, plan.global_batch, seed, classes, double)
    dtype = "float64" if double else None
    with once.traced_once():
        trainer = build_trainer(
            plan,
            model,
            workload=workload,
            mode=mode,  # type: ignore[arg-type]
            dtype=dtype,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        )
    expected, wanted = known_gradients(source, plan.global_batch, plan.microbatches, seed, classes, double)
    errors: dict[str, tuple[float, float]] = {}
    with trainer.counting_collectives(fp64_as_fp32=double) as tally:
        loss = trainer.forward_backward(batch)
        for index, stage in trainer.stages.items():
            mesh = stage.parameters.mesh
            for parameter in stage.parameters.trained():
                if parameter.counts_in_norm:
                    full = wanted[parameter.names[0]]
                    shard = select_indices(
                        full, stored_indices(parameter.sharding, mesh, mesh.coordinate, zero_sharded=True)
                    ).double()
                    error = float((parameter.master.grad.double() - shard).square().sum())
                    errors[f"{parameter.names[0]}@{index}"] = (error, float(shard.square().sum()))
            assert stage.num_in_flight == 0
        trainer.update()
    return Checked(loss=float(loss), expected=expected, errors=errors, ran=tally.counts)


def check_training(
    source: Callable[[], Workload], plan_json: bytes, mode: str, classes: int, seed: int, clip_norm: float | None
) -> Checked:
    """Three AdamW steps in fp64: the last loss of both, and per parameter its squared error and norm at the end."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    workload = source()
    model = real_model(workload, seed, torch.float64)
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}  # an eps that does not blow gradients of 1e-16 up
    trainer = build_trainer(
        plan,
        model,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, **options),
        workload=workload,
        mode=mode,
        dtype="float64",
        clip_norm=clip_norm,
    )
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for step in range(3):
        batch = random_batch(workload, plan.global_batch, step, classes)
        batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
        loss = trainer.step(batch)
        expected = reference_gradients(model, workload, batch, plan.microbatches)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    named = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    errors: dict[str, tuple[float, float]] = {}

    def compare(name: str, got: Tensor, wanted: Tensor) -> None:
        error = float((got.double() - wanted.double()).square().sum())
        errors[name] = (error, float(wanted.double().square().sum()))

    for index, stage in trainer.stages.items():
        mesh = stage.parameters.mesh
        for parameter in stage.parameters.trained():
            full = named[parameter.names[0]].detach()
            here = stored_indices(parameter.sharding, mesh, mesh.coordinate, zero_sharded=True)
            compare(f"{parameter.names[0]}@{index}", parameter.master.detach(), select_indices(full, here))
            used = stored_indices(
                parameter.sharding, mesh, mesh.coordinate, zero_sharded=parameter.sharding.zero_stage == 3
            )
            compare(f"{parameter.names[0]}@{index} as used", parameter.weight.detach(), select_indices(full, used))
        for stored in stage.program.buffers:
            name = trainer.graph.values[stored.value].qualified_names[0]
            here = stored_indices(stored, mesh, mesh.coordinate, zero_sharded=False)
            compare(f"{name}@{index}", stage.parameters.buffers[stored.value], select_indices(named[name], here))
    return Checked(loss=float(loss), expected=float(expected), errors=errors, ran={})


def worst(found: list[Checked]) -> tuple[float, str, float]:
    """(error of the loss, the parameter whose gradient is worst, its relative error over all ranks)."""
    loss = max(abs(each.loss - each.expected) / abs(each.expected) for each in found)
    sums: dict[str, tuple[float, float]] = {}
    for each in found:
        for name, (error, norm) in each.errors.items():
            known = sums.get(name, (0.0, 0.0))
            sums[name] = (known[0] + error, known[1] + norm)
    # 1e-6 absolute is as good as 1e-5 relative: counted against the larger of both bounds
    ratios = {name: error**0.5 / max(norm**0.5, 0.1) for name, (error, norm) in sums.items()}
    name = max(ratios, key=lambda each: ratios[each])
    return loss, name, ratios[name]
