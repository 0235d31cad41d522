"""From arguments to what the library takes: the plan of a layout, and the workload and cluster that a plan was made for."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.core.errors import LayoutError, PlanFileError

if TYPE_CHECKING:
    from autopar.cluster.cluster import Cluster
    from autopar.core.layout import Layout
    from autopar.core.plan import Plan
    from autopar.workload.workload import Workload

WAY_OUT = "name its file with --cluster (autopar.cluster.save_cluster writes one that was made in Python)"
"""What to do where a plan's cluster is not found."""


def layout_flags(**flags: str) -> dict[str, str]:
    """Flags that are also keys of a layout, those left at "auto" dropped."""
    return {key: value for key, value in flags.items() if value != "auto"}


def plan_of_layout(workload: "Workload", layout: "Layout", *, micro_batch: int | None, **options: Any) -> "Plan":
    """The plan of one layout; ``options`` are the keywords of ``autopar.manual.layout_pricer.plan_layout``. LayoutError
    where ``micro_batch`` (``--micro-batch``) differs from the layout's."""
    from autopar.manual.layout_pricer import plan_layout

    priced = plan_layout(workload, layout=str(layout), **options)
    size = priced.micro_batch_size
    if micro_batch is not None and size != micro_batch:
        raise LayoutError(
            [f"the layout's dp * mbs is {size} samples, --micro-batch is {micro_batch}; give one of them"]
        )
    return priced


def load_plan_workload(plan: "Plan", plan_path: Path, model: str | None) -> "Workload":
    """The workload that a plan was made for, from its own model file or from ``model``; PlanFileError where the file has
    changed or is gone."""
    path = Path(model) if model is not None else _model_path(plan, plan_path)
    if model is None and plan.model.source_hash is not None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != plan.model.source_hash:
            raise PlanFileError(
                f"{path} changed since {plan_path} was made (sha256 {plan.model.source_hash[:12]} then, "
                f"{digest[:12]} now); plan again, or name an unchanged copy with --model"
            )
    from autopar.workload.model_file import load_workload

    settings: dict[str, Any] = dict(plan.model.settings)
    return load_workload(path, **settings)


def _model_path(plan: "Plan", plan_path: Path) -> Path:
    """The plan's model file: at the path in the plan, or else in the folder of the plan's file."""
    if plan.model.path is None:
        raise PlanFileError(f"{plan_path} is for a model built in Python; name a model file with --model")
    for path in (Path(plan.model.path), plan_path.parent / Path(plan.model.path).name):
        if path.is_file():
            return path
    raise PlanFileError(f"{plan_path} is for {plan.model.path}, which is not there; name it with --model")


def load_plan_cluster(plan: "Plan", plan_path: Path, cluster: str | None, way_out: str = WAY_OUT) -> "Cluster":
    """The cluster that a plan was made for, by the plan's own name for it or from ``cluster`` (a name or a file).
    PlanFileError, which ends with the ``way_out``, where it is not there or its tables are not the plan's."""
    from autopar.cluster.cost_tables import cluster_names, load_cluster

    name = plan.cluster.name if cluster is None else cluster
    if cluster is None and name not in cluster_names():
        name = _cluster_path(plan, plan_path, way_out)
    found = load_cluster(name, **plan.cluster.overrides)
    if found.fingerprint != plan.cluster.fingerprint:
        raise PlanFileError(
            f"the tables of cluster {name} are not those that {plan_path} was made with (fingerprint "
            f"{plan.cluster.fingerprint[:12]} then, {found.fingerprint[:12]} now): plan again, or {way_out}"
        )
    return found


def _cluster_path(plan: "Plan", plan_path: Path, way_out: str) -> str:
    """The file of the plan's cluster: at the path in the plan, or else in the folder of the plan's file."""
    for path in (Path(plan.cluster.name), plan_path.parent / Path(plan.cluster.name).name):
        if path.is_file():
            return str(path)
    raise PlanFileError(
        f"{plan_path} is for cluster {plan.cluster.name!r}, which neither ships with autopar nor is a file here: {way_out}"
    )
