"""autopar plans how to train a PyTorch model on many GPUs.

    workload = autopar.load_workload("examples/gpt.py", layers=12)
    plan = autopar.plan(workload, cluster="dgx-h100", gpus=8, global_batch=512)
    autopar.estimate(workload, cluster="dgx-h100", gpus=8, layout="tp=8", global_batch=512).step_time_s

Everything is loaded on first use, so that ``import autopar`` costs nothing: torch comes with the first model, a solver
with the first plan.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.cluster.cluster import Cluster as Cluster
    from autopar.cluster.load import load_cluster as load_cluster
    from autopar.plan.errors import AutoparError as AutoparError
    from autopar.plan.errors import CheckError as CheckError
    from autopar.plan.errors import CheckpointError as CheckpointError
    from autopar.plan.errors import InfeasibleError as InfeasibleError
    from autopar.plan.errors import LayoutError as LayoutError
    from autopar.plan.errors import ModelError as ModelError
    from autopar.plan.errors import PlanFileError as PlanFileError
    from autopar.plan.errors import TimeLimitError as TimeLimitError
    from autopar.plan.errors import UsageError as UsageError
    from autopar.plan.file import load_plan as load_plan
    from autopar.plan.file import save_plan as save_plan
    from autopar.plan.plan import Estimate as Estimate
    from autopar.plan.plan import Plan as Plan
    from autopar.workload.load import load_workload as load_workload
    from autopar.workload.workload import Workload as Workload
else:
    import autopar.plan

_HOMES = {
    "AutoparError": "autopar.plan.errors",
    "CheckError": "autopar.plan.errors",
    "CheckpointError": "autopar.plan.errors",
    "Cluster": "autopar.cluster.cluster",
    "Estimate": "autopar.plan.plan",
    "InfeasibleError": "autopar.plan.errors",
    "LayoutError": "autopar.plan.errors",
    "ModelError": "autopar.plan.errors",
    "Plan": "autopar.plan.plan",
    "PlanFileError": "autopar.plan.errors",
    "TimeLimitError": "autopar.plan.errors",
    "UsageError": "autopar.plan.errors",
    "Workload": "autopar.workload.workload",
    "load_cluster": "autopar.cluster.load",
    "load_plan": "autopar.plan.file",
    "load_workload": "autopar.workload.load",
    "save_plan": "autopar.plan.file",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def estimate(
    workload: "Workload",
    *,
    cluster: "str | Cluster" = "dgx-h100",
    gpus: int,
    layout: str,
    global_batch: int | None = None,
    dtype: str | None = None,
    memory_gib: float | None = None,
    optimizer: str = "adamw",
) -> "Estimate":
    """Price one manual layout; raises LayoutError with all faults of one that cannot run. Memory never makes it fail:
    look at ``fits``. ``dtype`` None is bf16, fp16 where the device has no bf16."""
    from autopar.inter.estimate import estimate as priced

    return priced(
        workload,
        cluster=cluster,
        gpus=gpus,
        layout=layout,
        global_batch=global_batch,
        dtype=dtype,
        memory_gib=memory_gib,
        optimizer=optimizer,
    ).estimate


class _PlanFloor(ModuleType):
    """``autopar.plan`` is the folder of a plan's nouns, and calling it makes a plan.

    A function of that name would be overwritten by the first ``import autopar.plan.errors``."""

    def __call__(self, workload: "Workload", **options: Any) -> "Plan":
        """Search the best plan; the keywords are those of ``autopar.inter.planner.plan``."""
        return import_module("autopar.inter.planner").plan(workload, **options)


if not TYPE_CHECKING:
    autopar.plan.__class__ = _PlanFloor
