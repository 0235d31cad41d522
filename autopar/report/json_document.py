"""The JSON documents of `--json`. Their keys are frozen; later versions only add to them."""

from typing import Any

import msgspec

from autopar.core.comparison import Comparison
from autopar.core.plan import Plan


def plan_document(plan: Plan, path: str | None) -> dict[str, Any]:
    """What `plan`, `estimate` and `show` print with `--json`; ``path`` is the plan's file, None where there is none."""
    estimate: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(plan.estimate))
    estimate.pop("collectives")
    flops_per_step = estimate.pop("flops_per_step")
    return {
        "format_version": plan.format_version,
        "plan": path,
        "model": {
            "path": plan.model.path,
            "settings": plan.model.settings,
            "parameters": plan.model.num_parameters,
            "flops_per_step": flops_per_step,
        },
        "cluster": {"name": plan.cluster.name, "overrides": plan.cluster.overrides, "gpus": plan.gpus},
        "execution": msgspec.to_builtins(plan.execution),
        "estimate": estimate,
        "stages": [
            {
                "blocks": [block.name for block in stage.blocks],
                "first_gpu": stage.first_device,
                "num_gpus": stage.num_devices,
                "axes": {axis.name: axis.size for axis in stage.axes},
                "chunk": stage.chunk,
                "peak_memory_bytes": stage.memory.total,
                "memory": msgspec.to_builtins(stage.memory),
                "in_flight": stage.in_flight,
                "seconds_per_microbatch": stage.forward_s + stage.backward_s,
                "seconds_per_step": stage.step_s,
            }
            for stage in plan.stages
        ],
        "global_batch": plan.global_batch,
        "microbatches": plan.microbatches,
        "micro_batch_size": plan.micro_batch_size,
        "schedule": plan.schedule,
        "num_chunks": plan.num_chunks,
        "recompute": plan.recompute,
        "search": msgspec.to_builtins(plan.search),
        "notes": list(plan.notes),
    }


def comparison_document(comparison: Comparison, path: str | None) -> dict[str, Any]:
    """What `compare --json` prints: both plans as documents; the plan is faster where ``speedup`` is above 1."""
    best = comparison.best
    speedup = None if best is None else best.estimate.step_time_s / comparison.plan.estimate.step_time_s
    return {
        "format_version": comparison.plan.format_version,
        "plan": plan_document(comparison.plan, path),
        "best": None if best is None else plan_document(best, None),
        "layout": comparison.layout,
        "num_layouts": comparison.num_layouts,
        "num_fit": comparison.num_fit,
        "speedup": speedup,
    }
