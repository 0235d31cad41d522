"""Every option of every op of real models, at tiny sizes, against the unsharded op in fp64 (see ``rule_oracle``)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from autopar.graph.trace import trace
from autopar.workload import Workload
from tests.conftest import example_workload
from tests.unit.option_faults import wrong_options

torch.set_num_threads(1)


def of_example(name: str, **settings: Any) -> Callable[[], Workload]:
    return lambda: example_workload(name, **settings)


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


SLOW = {"gpt_untied", "moe", "wide_resnet", "t5"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_every_option_of_the_model(name: str) -> None:
    faults, unknown, tried = wrong_options(trace(MODELS[name](), dtype="float32"))
    assert tried > 50
    assert not faults, "\n".join(faults[:10])
    assert not unknown
