"""Plans for the tests: layouts, and plans put together of several layouts' stages."""

from collections.abc import Sequence
from math import prod

import msgspec

from autopar.cluster.cost_tables import load_cluster
from autopar.core.dtypes import LONG_NAMES
from autopar.core.plan import Plan, StagePlan
from autopar.judge.judge import judge
from autopar.manual.layout_pricer import plan_layout
from autopar.workload.workload import Workload
from tests.distributed.once import known_graph, traced_once


def rejudged(plan: Plan, workload: Workload) -> Plan:
    """The plan with the judge's list of its collectives."""
    cluster = load_cluster(plan.cluster.name)
    model = known_graph(workload, dtype=LONG_NAMES[plan.execution.dtype])
    collectives = judge(plan, model.graph, model.blocks, cluster).collectives
    return msgspec.structs.replace(plan, estimate=msgspec.structs.replace(plan.estimate, collectives=collectives))


def layout_plan(
    workload: Workload, layout: str, *, batch: int = 8, dtype: str = "fp32", cluster: str = "cpu-gloo"
) -> Plan:
    """The plan of one layout; its GPUs follow from its keys."""
    keys = dict(part.split("=") for part in layout.split(","))
    gpus = prod(int(keys.get(axis, 1)) for axis in ("tp", "cp", "dp", "pp"))
    with traced_once():
        return plan_layout(workload, cluster=cluster, gpus=gpus, layout=layout, global_batch=batch, dtype=dtype)


def unequal_plan(workload: Workload, layouts: Sequence[str], *, batch: int = 8, dtype: str = "fp32") -> Plan:
    """A pipeline whose stage k runs as layout k, which must have one stage and the same micro-batch size each."""
    plans = [layout_plan(workload, layout, batch=batch, dtype=dtype) for layout in layouts]
    assert len({plan.micro_batch_size for plan in plans}) == 1, "the stages' micro-batches differ"
    blocks = plans[0].stages[0].blocks
    programs, stages, device = [], [], 0
    for at, plan in enumerate(plans):
        first, end = at * len(blocks) // len(plans), (at + 1) * len(blocks) // len(plans)
        blocks = [
            msgspec.structs.replace(block, program=f"s{at}.{block.program}")
            for block in plan.stages[0].blocks[first:end]
        ]
        used = {block.program for block in blocks}
        programs += [
            msgspec.structs.replace(program, id=f"s{at}.{program.id}")
            for program in plan.programs
            if f"s{at}.{program.id}" in used
        ]
        stages.append(msgspec.structs.replace(plan.stages[0], blocks=tuple(blocks), first_device=device))
        device += plan.stages[0].num_devices
    plan = msgspec.structs.replace(plans[0], programs=tuple(programs), stages=tuple(stages), gpus=device)
    return rejudged(plan, workload)


def interleaved_plan(plan: Plan, num_chunks: int, workload: Workload) -> Plan:
    """The stages of a pipeline dealt out in turn to fewer submeshes."""
    num_submeshes = len(plan.stages) // num_chunks

    def dealt(at: int, stage: StagePlan) -> StagePlan:
        first = plan.stages[at % num_submeshes].first_device
        return msgspec.structs.replace(stage, first_device=first, chunk=at // num_submeshes)

    stages = tuple(dealt(at, stage) for at, stage in enumerate(plan.stages))
    dealt_out = msgspec.structs.replace(
        plan, stages=stages, gpus=plan.gpus // num_chunks, schedule="interleaved", num_chunks=num_chunks
    )
    return rejudged(dealt_out, workload)
