"""Every option of every op of real models, at tiny sizes, against the whole op in fp64 (see ``rule_oracle``)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from autopar.graph.ir import hashable_literal
from autopar.graph.split_into_blocks import split_into_blocks
from autopar.graph.trace import TracedGraph, trace
from autopar.intra.block_space import build_block_space
from autopar.workload import Workload, load_workload
from tests.unit.rule_oracle import WIDE, Case, call, check_option, ranks_to_try

torch.set_num_threads(1)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def of_example(name: str, **settings: Any) -> Callable[[], Workload]:
    return lambda: load_workload(str(EXAMPLES / f"{name}.py"), **settings)


def of_transformers(kind: str, config: Any, *names: str, seq: int = 8) -> Callable[[], Workload]:
    def inputs(batch_size: int) -> dict[str, Tensor]:
        if "pixel_values" in names:
            return {
                "pixel_values": torch.empty(batch_size, 3, 8, 8),
                "labels": torch.empty(batch_size, dtype=torch.long),
            }
        return {name: torch.empty(batch_size, seq, dtype=torch.long) for name in names}

    def build() -> nn.Module:
        config._attn_implementation = "sdpa"
        model: nn.Module = getattr(transformers, kind)(config)
        return model

    return lambda: Workload(build_model=build, example_inputs=inputs)


SMALL = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 24}
MODELS: dict[str, Callable[[], Workload]] = {
    "gpt": of_example("gpt", layers=2, hidden=12, heads=4, vocab=24, seq=8),
    "gpt_untied": of_example("gpt", layers=2, hidden=12, heads=4, vocab=24, seq=8, tied_embeddings=False),
    "llama_gqa": of_example("llama", layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab=24, seq=8),
    "moe": of_example("moe", layers=2, hidden=12, heads=4, vocab=24, seq=8, experts=4, group_size=8),
    "wide_resnet": of_example("wide_resnet", layers=50, base_channels=4, width_factor=2, image_size=8),
    "t5": of_transformers(
        "T5ForConditionalGeneration",
        transformers.T5Config(
            d_model=12, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=24, decoder_start_token_id=0,
            dropout_rate=0.0,
        ),
        "input_ids", "labels",
    ),
    "vit": of_transformers(
        "ViTForImageClassification",
        transformers.ViTConfig(
            hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        ),
        "pixel_values",
    ),
    "bert": of_transformers(
        "BertForMaskedLM", transformers.BertConfig(**SMALL, num_attention_heads=4), "input_ids", "labels"
    ),
    "mixtral": of_transformers(
        "MixtralForCausalLM",
        transformers.MixtralConfig(
            **{**SMALL, "hidden_size": 16}, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        ),
        "input_ids", "labels",
    ),
}  # fmt: skip


def real_values(traced: TracedGraph) -> dict[int, Tensor]:
    """Random weights and inputs, and everything computed from them by the graph, in fp64."""
    graph = traced.graph
    generator = torch.Generator().manual_seed(0)
    known: dict[int, Tensor] = {}
    for value in graph.values:
        if value.kind == "activation":
            continue
        if value.kind == "constant" and value.name in traced.constants:
            tensor = traced.constants[value.name]
            known[value.id] = tensor.to(WIDE) if tensor.is_floating_point() else tensor
        elif value.dtype.startswith(("float", "bfloat")):
            known[value.id] = torch.randn(value.shape, generator=generator, dtype=WIDE) * 0.5 + (value.kind == "buffer")
        elif value.kind == "buffer":
            known[value.id] = torch.arange(value.shape[-1] if value.shape else 1).remainder(2).expand(value.shape or 1)
        else:
            known[value.id] = torch.randint(0, 2, value.shape, generator=generator)
    for op in graph.ops:
        with torch.no_grad():
            for value, result in zip(op.outputs, call(op, [known[i] for i in op.inputs]), strict=True):
                known[value] = result
    return known


def wrong_options(traced: TracedGraph) -> tuple[list[str], set[str], int]:
    """What is wrong with each wrong option, the targets without a rule, and how many options were tried."""
    graph = traced.graph
    known = real_values(traced)
    data = graph.parameter_free()
    faults, seen, unknown, tried, kinds = [], set(), set(), 0, set()
    for block in split_into_blocks(graph):
        if block.kind in kinds:
            continue
        kinds.add(block.kind)
        for node in build_block_space(graph, block, data).ops:
            op = node.op
            if not node.rule.is_known:
                unknown.add(op.target)
            inputs = tuple(graph.values[value] for value in op.inputs)
            types = tuple((value.shape, value.dtype, value.requires_grad) for value in inputs)
            case = Case(
                op=op,
                inputs=inputs,
                outputs=tuple(graph.values[value] for value in op.outputs),
                tensors=tuple(known[value] for value in op.inputs),
            )
            for option in node.options:
                for ranks in ranks_to_try(option, node.rule):
                    key = (op.target, hashable_literal(op.args), hashable_literal(op.kwargs), types, option, ranks)
                    if key in seen:
                        continue
                    seen.add(key)
                    tried += 1
                    if wrong := check_option(case, option, node.rule, ranks):
                        faults.append(f"{op.name} {op.target} {op.args} {types} over {ranks}: {option}: {wrong}")
    return faults, unknown, tried


SLOW = {"gpt_untied", "moe", "wide_resnet", "t5"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_every_option_of_the_model(name: str) -> None:
    faults, unknown, tried = wrong_options(trace(MODELS[name](), dtype="float32"))
    assert tried > 50
    assert not faults, "\n".join(faults[:10])
    assert not unknown
