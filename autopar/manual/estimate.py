"""The verb ``estimate``: the price of one manual layout."""

from collections.abc import Sequence

from autopar.cluster.cluster import Cluster
from autopar.core.dtypes import Dtype, ShortDtype
from autopar.core.layout import parse_layout
from autopar.core.pin import parse_pins
from autopar.core.plan import Estimate
from autopar.core.request import Optimizer, check_request, choose_global_batch
from autopar.manual.layout_pricer import plan_layout
from autopar.workload.workload import Workload


def estimate(
    workload: Workload,
    *,
    cluster: Cluster | str = "dgx-h100",
    gpus: int,
    layout: str,
    global_batch: int | None = None,
    dtype: Dtype | ShortDtype | None = None,
    memory_gib: float | None = None,
    optimizer: Optimizer = "adamw",
    pins: Sequence[tuple[str, str]] = (),
) -> Estimate:
    """The price of one manual layout, such as ``"tp=8,pp=4,mbs=2,zero=1"`` (``core.layout`` has the keys).

    ``cluster`` is a name, a table's file or a ``Cluster``; ``global_batch`` counts samples per step, None is the layout's
    ``gbs``, else the workload's own; ``dtype`` None is bf16, or fp16 where the device has no bf16; ``memory_gib``
    replaces the device's usable memory as the budget of a GPU; ``pins`` are (glob of parameter names, placements) for
    what the layout leaves open.

    Raises UsageError for wrong arguments, before anything is traced; LayoutError with all faults of a layout that cannot
    run; ModelError where the model cannot be traced. Memory never makes it fail: see ``Estimate.fits``.

    >>> from torch import empty, nn
    >>> class Model(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x).square().mean()
    >>> workload = Workload(
    ...     build_model=lambda: Model(512, 512), example_inputs=lambda batch_size: {"x": empty(batch_size, 512)}
    ... )
    >>> estimate(workload, cluster="dgx-a100", gpus=2, layout="dp=2,zero=1", global_batch=64).fits
    True
    """
    check_request(
        workload=workload,
        cluster=cluster,
        gpus=gpus,
        layout=layout,
        global_batch=global_batch,
        dtype=dtype,
        memory_gib=memory_gib,
        optimizer=optimizer,
        pins=pins,
    )
    parse_pins(pins)
    choose_global_batch(global_batch, parse_layout(layout).gbs, workload.global_batch, model_file=workload.path)
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
