"""Seconds of the outer search on large made-up transformers: ``python tests/benchmarks/outer_search.py``.

96 equal layers between an embedding and a head, on GPUs whose speed-up falls with the submesh, with memory that binds,
exposed per-step time and transfers between stages. Prints, asserts nothing.
"""

import itertools
import sys
import time

import numpy as np

from autopar.inter.branch_and_bound import search_pipelines
from autopar.inter.pipeline_problem import PipelineProblem, StageTimeTable
from autopar.inter.stage_span import SubmeshStage
from autopar.pipeline.schedule import Schedule
from autopar.pipeline.simulate import StageTimes, simulate


def run(
    name: str,
    num_devices: int,
    sizes: tuple[int, ...],
    num_microbatches: int,
    *,
    schedule: Schedule = "1f1b",
    transfer: float = 0.02,
    capacity: float = 40.0,
    max_stages: int | None = None,
    unequal: float = 0.0,
    loss: float = 0.15,
    num_blocks: int = 98,
) -> None:
    """One case; ``transfer`` in forward seconds of a layer on one device, ``capacity`` in layers' saved tensors;
    ``loss`` of speed each time a submesh doubles."""
    rng = np.random.default_rng(0)
    work = np.ones(num_blocks) * (1 + unequal * rng.standard_normal(num_blocks))
    work[0], work[-1] = 0.1, 0.7
    total = np.concatenate([[0.0], np.cumsum(work)])
    length = np.maximum(total[None, :] - total[:, None], 0.0)[:, :, None]
    size = np.array(sizes, dtype=np.float64)
    # Classes of one size are logical meshes that are slower and store more.
    nth = np.array([sizes[:k].count(one) for k, one in enumerate(sizes)])
    efficiency = 1 / (1 + loss * np.log2(size)) / (1 + 0.04 * nth)
    forward = np.where(length > 0, length / (size * efficiency), np.inf)
    step = 0.5 * length / size + 0.2

    def stage_times(in_flight: int) -> StageTimeTable:
        fits = length * (1.0 + 0.25 * in_flight) <= capacity * size * (1 + 0.5 * nth)
        return StageTimeTable(
            forward_s=np.where(fits, forward, np.inf), backward_s=np.where(fits, 2 * forward, np.inf), step_s=step
        )

    def evaluate(stages: tuple[SubmeshStage, ...]) -> float:
        times = [
            StageTimes(
                forward_s=float(forward[stage]),
                backward_s=float(2 * forward[stage]),
                step_s=float(step[stage]),
                transfer_forward_s=transfer,
                transfer_backward_s=transfer,
            )
            for stage in stages
        ]
        return simulate(schedule, times, num_microbatches).step_time_s

    problem = PipelineProblem(
        num_blocks=num_blocks,
        num_devices=num_devices,
        num_microbatches=num_microbatches,
        submesh_sizes=sizes,
        stage_times=stage_times,
        schedule=schedule,
        max_stages=max_stages,
        stage_boundary_s=np.full(num_blocks + 1, 2 * transfer),
    )
    begin = time.perf_counter()
    result = search_pipelines(problem, evaluate=evaluate)
    seconds = time.perf_counter() - begin
    stages = len(result.incumbent.stages) if result.incumbent else 0
    step_s = result.incumbent.step_time_s if result.incumbent else float("inf")
    print(
        f"{name:44s} {seconds:6.2f} s  {result.status:10s} gap {result.gap:.1e}  {result.num_evaluated:4d} evaluated  "
        f"{stages:3d} stages  step {step_s:.3f}"
    )


def simulations() -> None:
    for num_stages, num_microbatches in itertools.product((4, 16, 64), (64, 1024, 4096)):
        stages = [
            StageTimes(forward_s=1.0, backward_s=2 + 0.01 * n, transfer_forward_s=0.1, transfer_backward_s=0.1)
            for n in range(num_stages)
        ]
        begin = time.perf_counter()
        for _ in range(5):
            simulate("1f1b", stages, num_microbatches)
        print(
            f"1f1b, {num_stages} stages, {num_microbatches} micro-batches: {(time.perf_counter() - begin) * 200:.2f} ms"
        )


def main() -> None:
    simulations()
    within = (1, 2, 2, 4, 4, 8, 8, 16, 32, 64)
    for B in (32, 128, 1024):
        run(f"64 GPUs, B={B}", 64, within, B, max_stages=16)
    run("64 GPUs, B=128, up to 64 stages", 64, within, 128)
    run("64 GPUs, B=1024, up to 64 stages", 64, within, 1024)
    run("64 GPUs, B=128, good links", 64, within, 128, loss=0.03)
    run("64 GPUs, B=128, tight memory", 64, within, 128, capacity=3.0)
    run("64 GPUs, B=128, infeasible", 64, within, 128, capacity=0.1)
    run("64 GPUs, B=128, slow links", 64, within, 128, transfer=0.5)
    run("64 GPUs, B=128, unequal blocks", 64, within, 128, unequal=0.1)
    run("64 GPUs, B=128, gpipe", 64, within, 128, schedule="gpipe", capacity=400.0, max_stages=16)
    nodes = (8, 8, 8, 16, 16, 32, 64, 128, 256, 512, 1024, 24)
    for B in (128, 1024):
        run(f"1024 GPUs, whole nodes, B={B}", 1024, nodes, B)
    run("1024 GPUs, whole nodes, B=1024, 32 stages", 1024, nodes, 1024, max_stages=32)
    run("1024 GPUs, whole nodes, B=1024, fast links", 1024, nodes, 1024, transfer=1e-3)


if __name__ == "__main__":
    sys.exit(main())
