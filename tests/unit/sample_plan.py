"""A hand-made plan: two stages of a 4-layer GPT on 4 + 4 GPUs, numbers round enough to check by eye."""

from typing import Any

from autopar.core.mesh_axis import Axis
from autopar.core.plan import (
    BlockProgram,
    BlockRef,
    ClusterRef,
    Collective,
    Estimate,
    Execution,
    MemoryParts,
    ModelRef,
    OpPlan,
    ParameterPlan,
    Plan,
    SearchOutcome,
    StagePlan,
    TimeItem,
    TimeParts,
)

GIB = 2**30


def sample_plan(**changes: Any) -> Plan:
    """8 GPUs, batch 32 in 8 micro-batches of 4; step 2 s, bound 1.9 s; the fullest device uses 11 of 16 GiB."""
    fields: dict[str, Any] = {
        "format_version": "1.0",
        "model": ModelRef(
            path="examples/gpt.py",
            settings={"layers": 4, "size": "tiny"},
            source_hash="ab" * 32,
            graph_fingerprint="cd" * 32,
            num_parameters=1_300_000_000,
        ),
        "cluster": ClusterRef(name="p3.16xlarge", fingerprint="ef" * 32, overrides={"inter_node_gbits_per_s": 100}),
        "execution": Execution(dtype="fp16", optimizer="adamw"),
        "gpus": 8,
        "global_batch": 32,
        "microbatches": 8,
        "micro_batch_size": 4,
        "schedule": "1f1b",
        "num_chunks": 1,
        "recompute": "selective",
        "programs": (embedding(), layer(), head()),
        "stages": (
            stage(
                (("embedding", "e"), ("layers.0", "l"), ("layers.1", "l")), first_block=0, first_device=0, in_flight=2
            ),
            stage((("layers.2", "l"), ("layers.3", "l"), ("head", "h")), first_block=3, first_device=4, in_flight=1),
        ),
        "estimate": estimate(),
        "search": SearchOutcome(
            seconds=12.5,
            status="feasible",
            lower_bound_s=1.9,
            gap=0.05,
            runner_up="dp 8, 2.10 s: more exposed reduction",
        ),
        "notes": ("aten.weird.default has no rule: replicated, 1.2 ms a micro-batch",),
        "command": "autopar plan examples/gpt.py --gpus 8",
        "versions": {"autopar": "0.1.0", "torch": "2.13.0"},
    }
    return Plan(**(fields | changes))


def estimate(**changes: Any) -> Estimate:
    fields: dict[str, Any] = {
        "step_time_s": 2.0,
        "tokens_per_s": 16384.0,
        "samples_per_s": 16.0,
        "mfu": 0.4321,
        "flops_per_step": 250_000_000_000_000,
        "provenance": {"measured": 40, "modelled": 17, "extrapolated": 0},
        "provenance_s": {"measured": 0.93, "modelled": 0.57, "extrapolated": 0.0},
        "flops_by_kind": {"attention": 25_000_000_000_000, "matmul": 225_000_000_000_000},
        "peak_memory_bytes": 11 * GIB,
        "peak_tensor_bytes": 10 * GIB,
        "budget_bytes": 16 * GIB,
        "fits": True,
        "bubble_fraction": 0.125,
        "exposed_communication_s": 0.25,
        "time": TimeParts(
            matmul_s=0.9,
            attention_s=0.2,
            memory_bound_s=0.1,
            launch_s=0.0,
            communication_s={"all_reduce": 0.3},
            exposed_communication_s=0.25,
            optimizer_s=0.05,
            transfers_s=0.01,
        ),
        "items": (
            TimeItem(kind="matmul", total_s=0.9, exposed_s=0.9),
            TimeItem(kind="attention", total_s=0.2, exposed_s=0.2),
            TimeItem(kind="memory_bound", total_s=0.1, exposed_s=0.1),
            TimeItem(kind="launches", total_s=0.0, exposed_s=0.0),
            TimeItem(kind="all_reduce", axes=("tp",), of="activations", total_s=0.2, exposed_s=0.2),
            TimeItem(kind="reduce_scatter", axes=("dp",), of="gradients", total_s=0.1, exposed_s=0.05),
            TimeItem(kind="transfers", total_s=0.016, exposed_s=0.01),
            TimeItem(kind="optimizer", total_s=0.05, exposed_s=0.05),
            TimeItem(kind="bubble", total_s=0.49, exposed_s=0.49),
        ),
        "collectives": (
            Collective(kind="all_reduce", axes=("tp",), num_bytes=32 * 2**20, count=4, per="microbatch", stage=0),
            Collective(kind="reduce_scatter", axes=("dp",), num_bytes=GIB, count=1, per="step", stage=1),
        ),
    }
    return Estimate(**(fields | changes))


def stage(
    blocks: tuple[tuple[str, str], ...], *, first_block: int, first_device: int, in_flight: int, **changes: Any
) -> StagePlan:
    fields: dict[str, Any] = {
        "blocks": tuple(
            BlockRef(index=first_block + offset, name=name, program=program)
            for offset, (name, program) in enumerate(blocks)
        ),
        "first_device": first_device,
        "num_devices": 4,
        "axes": (Axis(name="dp", size=2), Axis(name="tp", size=2)),
        "chunk": 0,
        "forward_s": 0.06,
        "backward_s": 0.12,
        "step_s": 0.03,
        "transfer_forward_s": 0.001,
        "transfer_backward_s": 0.001,
        "in_flight": in_flight,
        "memory": MemoryParts(
            parameters_bytes=2 * GIB,
            gradients_bytes=2 * GIB,
            optimizer_bytes=3 * GIB,
            saved_activations_bytes=in_flight * GIB,
            workspace_bytes=GIB,
            fixed_bytes=GIB,
        ),
    }
    return StagePlan(**(fields | changes))


def embedding() -> BlockProgram:
    return BlockProgram(
        id="e",
        kind=0,
        recompute="none",
        ops=(OpPlan(name="embedding", inputs=("RS(0)", "S(0)R"), outputs=("S(0)P",)),),
        parameters=(
            ParameterPlan(
                name="wte.weight", compute="RS(0)", parameter="RS(0)", gradient="PS(0)", optimizer="S(1)S(0)"
            ),
        ),
    )


def layer() -> BlockProgram:
    return BlockProgram(
        id="l",
        kind=1,
        recompute="selective",
        ops=(OpPlan(name="linear", inputs=("S(0)R", "R_S(0,3)"), outputs=("S(0)_S(2,3)",)),),
        parameters=(
            ParameterPlan(
                name="layers.0.attn.qkv.weight",
                compute="R_S(0,3)",
                parameter="R_S(0,3)",
                gradient="R_S(0,3)",
                optimizer="S(1)_S(0,3)",
            ),
            ParameterPlan(
                name="layers.0.norm.weight", compute="RR", parameter="S(0)R", gradient="S(0)R", optimizer="S(0)R"
            ),
        ),
    )


def head() -> BlockProgram:
    return BlockProgram(
        id="h",
        kind=2,
        recompute="none",
        ops=(OpPlan(name="cross_entropy", inputs=("S(0)R",), outputs=("PR",)),),
        parameters=(ParameterPlan(name="norm.weight", compute="RR", parameter="RR", gradient="RR", optimizer="RR"),),
    )
