"""Random plans that the planner itself writes: random layouts, and searches with random pins and little memory."""

import random

from autopar.core.errors import InfeasibleError, LayoutError, UsageError
from autopar.core.plan import Plan
from autopar.planner.planner import plan
from autopar.workload.workload import Workload
from tests.distributed.once import traced_once
from tests.distributed.plans import layout_plan

BATCH = 8


def searched_plan(workload: Workload, seed: int) -> Plan:
    """A plan of 2 or 4 ranks; what the planner refuses is drawn anew."""
    draw = random.Random(seed)
    while True:
        try:
            with traced_once():
                return _by_layout(draw, workload) if draw.random() < 0.5 else _by_search(draw, workload)
        except (InfeasibleError, LayoutError, UsageError):
            continue


def _by_layout(draw: random.Random, workload: Workload) -> Plan:
    axes = draw.choice(("tp=2", "dp=2", "cp=2", "pp=2", "tp=4", "dp=4", "tp=2,dp=2", "tp=2,cp=2", "dp=2,cp=2",
                        "tp=2,pp=2", "dp=2,pp=2", "cp=2,pp=2"))  # fmt: skip
    options = f"mbs={draw.choice((1, 2))},zero={draw.randint(0, 3)},sp={draw.randint(0, 1)}"
    recompute = draw.choice(("none", "selective", "full"))
    return layout_plan(workload, f"{axes},{options},recompute={recompute}", batch=BATCH)


def _by_search(draw: random.Random, workload: Workload) -> Plan:
    names = [name for name, _ in workload.build().named_parameters()]
    pinned = draw.sample(names, min(len(names), draw.randint(0, 4)))
    tokens = ("S(0)", "S(1)", "R")
    pins = tuple((name, "".join(draw.choice(tokens) for _ in range(draw.randint(1, 2)))) for name in pinned)
    return plan(
        workload,
        cluster="cpu-gloo",
        gpus=draw.choice((2, 4)),
        global_batch=BATCH,
        micro_batch=draw.choice((2, 4, None)),
        dtype="fp32",
        pins=pins,
        recompute=draw.choice(("auto", "none", "full")),
        schedule=draw.choice(("auto", "gpipe")),
    )
