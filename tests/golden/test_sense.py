"""Plans of real models that an expert would nod at."""

import pytest
import torch
import transformers
from torch import Tensor

from autopar.core.placement import Shard, parse_placements
from autopar.core.plan import Plan
from autopar.planner.planner import plan
from autopar.workload import Workload
from tests.conftest import example_workload


def planned(model: str, size: str, **search) -> Plan:
    return plan(example_workload(model, size=size), **search)


def is_sharded(text: str) -> bool:
    return any(isinstance(placement, Shard) for placement in parse_placements(text))


@pytest.mark.slow
def test_llama_8b_on_8_h100_shards_optimizer_state():
    found = planned("llama", "8B", cluster="dgx-h100", gpus=8, global_batch=512)
    large = [p for program in found.programs for p in program.parameters if "proj" in p.name]
    assert large
    assert all(is_sharded(parameter.optimizer) for parameter in large)


@pytest.mark.slow
def test_llama_70b_on_64_h100_never_puts_tensor_parallelism_across_nodes():
    found = planned("llama", "70B", cluster="dgx-h100", gpus=64, global_batch=512)
    names = {axis.name for stage in found.stages for axis in stage.axes if axis.size > 1}
    zero3 = any(
        is_sharded(p.parameter) and not is_sharded(p.compute) for program in found.programs for p in program.parameters
    )
    assert "tp" in names or len(found.stages) > 1 or zero3
    for stage in found.stages:
        assert all(axis.size <= 8 for axis in stage.axes if axis.name == "tp")


@pytest.mark.slow
def test_moe_27b_shards_its_experts():
    found = planned("moe", "27B", cluster="p3.16xlarge", gpus=32)
    experts = [p for program in found.programs for p in program.parameters if ".experts." in p.name]
    assert experts
    assert all(is_sharded(parameter.optimizer) for parameter in experts)
    assert any(parse_placements(parameter.compute)[-1] == Shard(0) for parameter in experts)


def test_attention_that_every_rank_computes_alike_is_in_the_report():
    odd = example_workload("gpt", layers=2, hidden=48, heads=3, vocab=100, seq=33)
    found = plan(odd, cluster="dgx-h100", gpus=8, global_batch=1)
    programs = {program.id: program for program in found.programs}
    replicated = [
        at
        for at, stage in enumerate(found.stages)
        if stage.num_devices > 1
        and any(
            not is_sharded(op.outputs[0])
            for block in stage.blocks
            for op in programs[block.program].ops
            if "scaled_dot_product" in op.name
        )
    ]
    assert replicated, "three heads, 33 positions and one sample cannot be shared out among 2, 4 or 8 ranks"
    for at in replicated:
        assert any(note.startswith(f"stage {at}:") and "attention included" in note for note in found.notes)


def test_an_axis_is_named_after_what_most_of_the_work_does_on_it():
    """GPT-2 of transformers: its linear layers are ``addmm``, whose first input is the bias."""
    config = transformers.GPT2Config(n_embd=768, n_layer=12, n_head=12)

    def inputs(batch_size: int) -> dict[str, Tensor]:
        ids = torch.empty(batch_size, 1024, dtype=torch.long, device="meta")
        return {"input_ids": ids, "labels": ids.clone()}

    workload = Workload(build_model=lambda: transformers.GPT2LMHeadModel(config), example_inputs=inputs)
    found = plan(workload, cluster="dgx-h100", gpus=16, global_batch=128, micro_batch=128)
    linear = [p for program in found.programs for p in program.parameters if "mlp.c_fc.weight" in p.name]
    assert linear
    whole = not any(is_sharded(parameter.compute) for parameter in linear)
    assert whole == all(axis.name != "tp" for stage in found.stages for axis in stage.axes)
