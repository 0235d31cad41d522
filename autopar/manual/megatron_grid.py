"""The best manual Megatron layout: every (tp, pp, vpp, dp, mbs, sp, recompute, zero 0/1) is priced, and the fastest
that fits is the best."""

import itertools
import time

from autopar.cluster.cluster import Cluster
from autopar.core.comparison import Comparison
from autopar.core.errors import LayoutError, PlanFileError
from autopar.core.layout import Layout, parse_layout
from autopar.core.plan import Plan
from autopar.core.units import GIB
from autopar.graph.traced_model import trace_model
from autopar.inter.even_partition import layers
from autopar.inter.interleaved_search import CHUNK_COUNTS
from autopar.manual.layout_pricer import LayoutPricer
from autopar.manual.priced_layout import PricedLayout
from autopar.workload.workload import Workload


def compare_megatron(plan: Plan, workload: Workload, cluster: Cluster, layout_text: str | None = None) -> Comparison:
    """Price one layout, or the whole grid where ``layout_text`` is None, under the plan's model, batch and budget.

    PlanFileError where the model's graph is not the plan's, LayoutError for a layout that cannot run.
    """
    started = time.perf_counter()
    pricer = LayoutPricer(
        trace_model(workload, dtype=plan.execution.dtype),
        cluster=cluster,
        gpus=plan.gpus,
        global_batch=plan.global_batch,
        memory_gib=plan.estimate.budget_bytes / GIB,
        optimizer=plan.execution.optimizer,
    )
    if pricer.model.graph.fingerprint != plan.model.graph_fingerprint:
        raise PlanFileError("the traced graph is not the one that the plan was made for; run `autopar plan` again")
    priced = (
        [pricer.price(parse_layout(layout_text))] if layout_text is not None else _price_grid(pricer, plan.global_batch)
    )
    fitting = [layout for layout in priced if layout.fits]
    pool = fitting or (priced if layout_text is not None else [])
    best = min(pool, key=lambda layout: layout.step_time_s, default=None)
    return Comparison(
        plan=plan,
        best=None if best is None else pricer.plan(best, time.perf_counter() - started),
        num_layouts=len(priced),
        num_fit=len(fitting),
        layout="" if best is None else str(best.layout),
    )


def _price_grid(pricer: LayoutPricer, global_batch: int) -> list[PricedLayout]:
    """Every layout of the grid that can run, priced."""
    priced = []
    num_layers = len(layers(pricer.model.blocks))
    divisors = [n for n in range(1, pricer.gpus + 1) if pricer.gpus % n == 0]
    for tp, pp in itertools.product(divisors, divisors):
        dp = pricer.gpus // (tp * pp)
        if pricer.gpus % (tp * pp) or global_batch % dp:
            continue
        samples = global_batch // dp
        sizes = [mbs for mbs in (1, 2, 4, 8, 16, 32, 64) if samples % mbs == 0]
        chunks = [v for v in CHUNK_COUNTS if pp > 1 and num_layers % (pp * v) == 0]
        for mbs, sp, recompute, zero, vpp in itertools.product(
            sizes,
            (False, True) if tp > 1 else (False,),
            ("none", "selective", "full"),
            (0, 1) if dp > 1 else (0,),
            (1, *chunks),
        ):
            if vpp > 1 and samples // mbs % pp:
                continue
            layout = Layout(
                tp=tp,
                pp=pp,
                dp=dp,
                mbs=mbs,
                gbs=global_batch,
                sp=sp,
                recompute=recompute,  # type: ignore[arg-type]
                zero=zero,  # type: ignore[arg-type]
                vpp=vpp,
                schedule="interleaved" if vpp > 1 else "1f1b",
            )
            try:
                priced.append(pricer.price(layout))
            except LayoutError:
                continue  # no runtime can run it
    return priced
