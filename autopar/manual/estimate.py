"""The verb ``estimate``: the price of one manual layout."""

from collections.abc import Sequence

from autopar.cluster.cluster import Cluster
from autopar.core.plan import Estimate
from autopar.manual.layout_pricer import plan_layout
from autopar.workload.workload import Workload


def estimate(
    workload: Workload,
    *,
    cluster: Cluster | str = "dgx-h100",
    gpus: int,
    layout: str,
    global_batch: int | None = None,
    dtype: str | None = None,
    memory_gib: float | None = None,
    optimizer: str = "adamw",
    pins: Sequence[tuple[str, str]] = (),
) -> Estimate:
    """Price one manual layout, such as ``"tp=8,pp=4,mbs=2,zero=1"``.

    ``cluster`` is a name, the file of a cost table or a ``Cluster``; ``global_batch`` None is the layout's ``gbs``, else
    the model file's; ``dtype`` None is bf16, or fp16 where the device has no bf16; ``memory_gib`` replaces the device's
    usable memory as the budget of a GPU; ``pins`` are (glob of parameter names, placements).

    LayoutError with all faults of a layout that cannot run, UsageError for other wrong arguments, ModelError where the
    model cannot be traced. Memory never makes it fail: look at ``fits``.

    >>> estimate(load_workload("examples/gpt.py", layers=12), gpus=8, layout="tp=8").step_time_s  # doctest: +SKIP
    """
    return plan_layout(
        workload,
        cluster=cluster,
        gpus=gpus,
        layout=layout,
        global_batch=global_batch,
        dtype=dtype,
        memory_gib=memory_gib,
        optimizer=optimizer,
        pins=pins,
    ).estimate
