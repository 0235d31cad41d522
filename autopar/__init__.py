"""autopar plans how to train a PyTorch model on many GPUs.

    workload = autopar.load_workload("examples/gpt.py", layers=12)
    plan = autopar.plan(workload, cluster="dgx-h100", gpus=8, global_batch=512)
    autopar.estimate(workload, cluster="dgx-h100", gpus=8, layout="tp=8", global_batch=512).step_time_s
    trainer = plan.apply(model, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4))

Every name is loaded on first use, so that ``import autopar`` costs nothing: torch is imported with the first model, a
solver with the first plan. Errors are subclasses of ``AutoparError``, each with the exit code of the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autopar.cluster.cluster import Cluster as Cluster
    from autopar.cluster.cost_tables import load_cluster as load_cluster
    from autopar.core.errors import AutoparError as AutoparError
    from autopar.core.errors import CheckError as CheckError
    from autopar.core.errors import CheckpointError as CheckpointError
    from autopar.core.errors import InfeasibleError as InfeasibleError
    from autopar.core.errors import LayoutError as LayoutError
    from autopar.core.errors import ModelError as ModelError
    from autopar.core.errors import PlanFileError as PlanFileError
    from autopar.core.errors import TimeLimitError as TimeLimitError
    from autopar.core.errors import UsageError as UsageError
    from autopar.core.plan import Estimate as Estimate
    from autopar.core.plan import Plan as Plan
    from autopar.core.plan_file import load_plan as load_plan
    from autopar.core.plan_file import save_plan as save_plan
    from autopar.manual.estimate import estimate as estimate
    from autopar.planner.planner import plan as plan
    from autopar.runtime.apply import apply as apply
    from autopar.runtime.trainer import Trainer as Trainer
    from autopar.workload.model_file import load_workload as load_workload
    from autopar.workload.workload import Workload as Workload

_MODULES = {
    "AutoparError": "autopar.core.errors",
    "CheckError": "autopar.core.errors",
    "CheckpointError": "autopar.core.errors",
    "Cluster": "autopar.cluster.cluster",
    "Estimate": "autopar.core.plan",
    "InfeasibleError": "autopar.core.errors",
    "LayoutError": "autopar.core.errors",
    "ModelError": "autopar.core.errors",
    "Plan": "autopar.core.plan",
    "PlanFileError": "autopar.core.errors",
    "TimeLimitError": "autopar.core.errors",
    "Trainer": "autopar.runtime.trainer",
    "UsageError": "autopar.core.errors",
    "Workload": "autopar.workload.workload",
    "apply": "autopar.runtime.apply",
    "estimate": "autopar.manual.estimate",
    "load_cluster": "autopar.cluster.cost_tables",
    "load_plan": "autopar.core.plan_file",
    "load_workload": "autopar.workload.model_file",
    "plan": "autopar.planner.planner",
    "save_plan": "autopar.core.plan_file",
}

__all__ = [
    "AutoparError",
    "CheckError",
    "CheckpointError",
    "Cluster",
    "Estimate",
    "InfeasibleError",
    "LayoutError",
    "ModelError",
    "Plan",
    "PlanFileError",
    "TimeLimitError",
    "Trainer",
    "UsageError",
    "Workload",
    "apply",
    "estimate",
    "load_cluster",
    "load_plan",
    "load_workload",
    "plan",
    "save_plan",
]


def __getattr__(name: str) -> object:
    """Load a public name from the module that defines it, on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted(__all__)
