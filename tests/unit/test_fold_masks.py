"""Constant masks of attention: causal and all ones are recognised, at any length; nothing else is.

The oracle makes each mask of a short sequence for real and compares it element by element.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from autopar.graph.ir import Op
from autopar.graph.trace import trace
from autopar.manual.layout_pricer import plan_layout
from autopar.report.json_document import plan_document
from autopar.report.plan_text import plan_text
from autopar.workload import Workload

SHORT, LONG, LONGEST = 48, 16_411, 2**20
LEAST = torch.finfo(torch.float32).min


def rows(s: int) -> Tensor:
    return torch.arange(s)[:, None]


def columns(s: int) -> Tensor:
    return torch.arange(s)[None, :]


def lower(s: int) -> Tensor:
    return columns(s) <= rows(s)


def written(s: int, first: int) -> Tensor:
    """Causal, and the columns from the first on written in place."""
    mask = torch.zeros(s, s).masked_fill_(torch.triu(torch.ones(s, s, dtype=torch.bool), 1), -math.inf)
    mask[:, first:].fill_(0.0)
    return mask


def hugging_face_4(s: int) -> Tensor:
    mask = torch.triu(torch.full((s, s), LEAST), diagonal=1)
    mask *= torch.arange(s) > torch.arange(s).reshape(-1, 1)
    return mask[None, None].expand(1, 1, -1, -1)


def halves(s: int) -> Tensor:
    half = s // 2
    upper = torch.cat((torch.ones(half, half).tril(), torch.zeros(half, s - half)), 1)
    return torch.cat((upper, torch.cat((torch.ones(s - half, half), torch.ones(s - half, s - half).tril()), 1))) > 0


KINDS: dict[str, Callable[[int], Tensor]] = {
    "tril": lambda s: torch.tril(torch.ones(s, s)).bool(),
    "tril == 1": lambda s: torch.tril(torch.ones(s, s)) == 1,
    "tril of bytes": lambda s: torch.ones(s, s, dtype=torch.uint8).tril().bool().view(1, 1, s, s),
    "1 - triu": lambda s: (1 - torch.triu(torch.ones(s, s), 1)).bool(),
    "not triu": lambda s: ~torch.triu(torch.ones(s, s, dtype=torch.bool), diagonal=1),
    "triu of -inf": lambda s: torch.triu(torch.full((s, s), -math.inf), 1),
    "tril transposed": lambda s: torch.tril(torch.full((s, s), -math.inf), -1).T,
    "triu of the least": lambda s: torch.triu(torch.full((s, s), LEAST), 1),
    "log of tril": lambda s: torch.tril(torch.ones(s, s)).log(),
    "times the least": lambda s: (1.0 - torch.tril(torch.ones(s, s))) * LEAST,
    "masked_fill": lambda s: torch.zeros(s, s).masked_fill(torch.tril(torch.ones(s, s)) == 0, -math.inf),
    "where": lambda s: torch.where(lower(s), 0.0, -math.inf),
    "Hugging Face 4": hugging_face_4,
    "arange": lower,
    "arange of 4 dims": lambda s: torch.arange(s).view(1, 1, 1, s) <= torch.arange(s).view(1, 1, s, 1),
    "difference": lambda s: (rows(s) - columns(s)) >= 0,
    "of floats": lambda s: rows(s).float() >= columns(s).float(),
    "meshgrid": lambda s: torch.ge(*torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")),
    "part of a larger one": lambda s: torch.tril(torch.ones(s + 5, s + 5))[:s, :s].bool(),
    "part beside the diagonal": lambda s: torch.tril(torch.ones(s, s + 5), 5)[:, 5:].bool(),
    "for every head": lambda s: torch.ones(s, s).tril().bool().repeat(1, 4, 1, 1),
    "stacked heads": lambda s: torch.stack([torch.ones(s, s).tril().bool()] * 4),
    "joined halves": halves,
    "strictly lower or eye": lambda s: (torch.tril(torch.ones(s, s), -1) + torch.eye(s)) > 0,
    "no row hidden": lambda s: lower(s) | ~lower(s).any(-1, keepdim=True),
    "written nowhere": lambda s: written(s, s),
    "one document": lambda s: lower(s) & ((rows(s) // s) == (columns(s) // s)),
    "blocks of 1024": lambda s: rows(s) // 1024 >= columns(s) // 1024,
    "window of 16384": lambda s: lower(s) & (rows(s) - columns(s) < 16_384),
    "window as long": lambda s: lower(s) & (rows(s) - columns(s) < s),
    "window one shorter": lambda s: lower(s) & (rows(s) - columns(s) < s - 1),
    "window": lambda s: lower(s) & (rows(s) - columns(s) < 7),
    "window of triangles": lambda s: torch.ones(s, s).tril().triu(-7).bool(),
    "both sides": lambda s: (rows(s) - columns(s)).abs() < 7,
    "prefix of one": lambda s: lower(s) | (columns(s) < 1),
    "prefix of two": lambda s: lower(s) | (columns(s) < 2),
    "prefix": lambda s: lower(s) | (columns(s) < s // 4),
    "written prefix": lambda s: written(s, s - s // 4),
    "documents": lambda s: lower(s) & ((rows(s) // 16) == (columns(s) // 16)),
    "blocks": lambda s: rows(s) // 8 >= columns(s) // 8,
    "one hole": lambda s: lower(s) & ~((rows(s) == s // 2) & (columns(s) == s // 3)),
    "one more": lambda s: lower(s) | ((rows(s) == s // 3) & (columns(s) == s // 2)),
    "strictly lower": lambda s: columns(s) < rows(s),
    "upper": lambda s: columns(s) >= rows(s),
    "heads that differ": lambda s: torch.stack([torch.ones(s, s).tril(), torch.ones(s, s)] * 2).bool(),
    "-1e9": lambda s: torch.triu(torch.full((s, s), -1e9), 1),
    "not a number": lambda s: (1.0 - torch.tril(torch.ones(s, s))) * -math.inf,
    "distances": lambda s: torch.where(lower(s), (columns(s) - rows(s)).float(), -math.inf),
    "nothing visible": lambda s: torch.zeros(s, s, dtype=torch.bool),
    "ones": lambda s: torch.ones(s, s, dtype=torch.bool),
    "zeros added": lambda s: torch.zeros(1, 4, s, s),
    "one row of ones": lambda s: torch.ones(1, s, dtype=torch.bool),
    "all near": lambda s: (rows(s) - columns(s)).abs() < s,
    "all but one": lambda s: ~((rows(s) == s // 2) & (columns(s) == s // 3)),
}  # fmt: skip


SHORTER_THAN_LONG = ("blocks of 1024", "window of 16384")


class Masked(nn.Module):
    """One attention after the other, each under the mask of a kind."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x).unflatten(-1, (4, 4)).transpose(1, 2)
        for kind in self.kinds:
            x = x + F.scaled_dot_product_attention(x, x, x, attn_mask=KINDS[kind](x.shape[-2]))
        return x.sum()


def masked(kinds: list[str], length: int) -> Workload:
    return Workload(
        build_model=lambda: Masked(kinds),
        example_inputs=lambda batch_size: {"x": torch.empty(batch_size, length, 16, device="meta")},
        loss_fn=lambda output, inputs: output,
    )


def forms(workload: Workload) -> list[str]:
    """Of every attention of a model: "causal", "all" (no mask) or "mask", in order."""
    ops = [op for op in trace(workload, dtype="float32").graph.ops if "scaled_dot_product" in op.target]
    return [form(op) for op in ops]


def form(op: Op) -> str:
    if len(op.inputs) > 3:
        return "mask"
    return "causal" if op.args[5:] == (True,) or dict(op.kwargs).get("is_causal") else "all"


def computed_form(mask: Tensor) -> str:
    """What a mask is, from all of its elements."""
    visible = mask if mask.dtype == torch.bool else mask == 0
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    if not bool((visible | hidden).all()):
        return "mask"
    squares = visible.expand(*mask.shape[:-2], SHORT, SHORT).reshape(-1, SHORT, SHORT).tolist()
    if all(all(map(all, square)) for square in squares):
        return "all"
    causal = [[column <= row for column in range(SHORT)] for row in range(SHORT)]
    return "causal" if all(square == causal for square in squares) else "mask"


def test_masks_have_the_same_form_short_and_long() -> None:
    kinds = list(KINDS)
    expected = {kind: computed_form(make(SHORT)) for kind, make in KINDS.items()}
    assert set(expected.values()) == {"causal", "all", "mask"}
    assert dict(zip(kinds, forms(masked(kinds, SHORT)), strict=True)) == expected
    longer = {**expected, **dict.fromkeys(SHORTER_THAN_LONG, "mask")}
    assert dict(zip(kinds, forms(masked(kinds, LONG)), strict=True)) == longer


@pytest.mark.parametrize(
    "kinds",
    [
        ["triu of -inf", "arange", "prefix of two", "window", "all near"],
        pytest.param([kind for kind in KINDS if kind not in SHORTER_THAN_LONG], marks=pytest.mark.slow),
    ],
)
def test_and_at_a_million_positions(kinds: list[str]) -> None:
    assert forms(masked(kinds, LONGEST)) == [computed_form(KINDS[kind](SHORT)) for kind in kinds]


class Given(nn.Module):
    """Attention under masks that are no constants: of an input, a buffer, a parameter, a random number."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("triangle", torch.ones(length, length, device="meta").tril().bool())
        self.bias = nn.Parameter(torch.zeros(4, 1, length, device="meta"))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = self.linear(x).unflatten(-1, (4, 4)).transpose(1, 2)
        for mask in (
            visible[:, None, None] > 0,
            self.triangle,
            self.bias,
            lower(x.shape[-2]) & (visible > 0)[:, None, None],
        ):
            x = x + F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return x.sum()


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_masks_of_data_stay_masks(length: int) -> None:
    def inputs(batch_size: int) -> dict[str, Tensor]:
        return {
            "x": torch.empty(batch_size, length, 16, device="meta"),
            "visible": torch.empty(batch_size, length, device="meta", dtype=torch.long),
        }

    workload = Workload(build_model=lambda: Given(length), example_inputs=inputs, loss_fn=lambda output, inputs: output)
    assert forms(workload) == ["mask"] * 4


class OfSamples(nn.Module):
    """Attention under constant masks that are causal for the first sample, and not for all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = self.linear(x).unflatten(-1, (4, 4)).transpose(1, 2)
        later = torch.arange(batch)[:, None, None, None] > 0
        x = x + F.scaled_dot_product_attention(x, x, x, attn_mask=lower(length) | later)
        packed = x.transpose(0, 1).reshape(1, 4, batch * length, 4)
        samples = torch.arange(batch * length) // length
        mask = lower(batch * length) & (samples[:, None] == samples)
        return F.scaled_dot_product_attention(packed, packed, packed, attn_mask=mask).sum() + x.sum()


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_a_mask_is_causal_only_if_it_is_for_every_sample(length: int) -> None:
    workload = Workload(
        build_model=OfSamples,
        example_inputs=lambda batch_size: {"x": torch.empty(batch_size, length, 16, device="meta")},
        loss_fn=lambda output, inputs: output,
    )
    assert forms(workload) == ["mask", "mask"]


SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaForCausalLM", GROUPED, ["causal", "causal"]),
    "mistral without a window": ("MistralForCausalLM", {**GROUPED, "sliding_window": None}, ["causal", "causal"]),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 4096}, ["mask", "mask"]),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL, ["causal", "causal"]),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, ["causal", "causal"]),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, **WINDOWED, "sliding_window": 512}, ["mask", "causal"]),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 0,
                                 "eos_token_id": 0}, ["causal", "causal"]),
    "bert": ("BertForMaskedLM", SMALL, ["all", "all"]),
}  # fmt: skip


def hugging_face(name: str, length: int) -> Workload:
    class_name, config, _ = HUGGING_FACE[name]
    model_class = getattr(transformers, class_name)
    config = {**config, "n_positions" if name == "gpt2" else "max_position_embeddings": length}
    return Workload(
        build_model=lambda: model_class(model_class.config_class(attn_implementation="sdpa", **config)),
        example_inputs=lambda batch_size: {
            key: torch.empty(batch_size, length, dtype=torch.long, device="meta") for key in ("input_ids", "labels")
        },
    )


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("llama", LONG),
        ("llama", LONGEST),
        ("mistral", LONG),
        *(pytest.param(name, length, marks=pytest.mark.slow) for name in HUGGING_FACE for length in (LONG, LONGEST)),
    ],
)
def test_masks_of_hugging_face_at_long_sequences(name: str, length: int) -> None:
    assert forms(hugging_face(name, length)) == HUGGING_FACE[name][2]


def priced(workload: Workload, gpus: int = 2) -> Any:
    return plan_layout(workload, cluster="dgx-h100", gpus=gpus, global_batch=4, layout="tp=2")


def test_a_long_causal_sequence_costs_half_of_one_under_another_mask() -> None:
    seconds = {
        kind: priced(masked([kind] * 4, LONG * 8 - 24)).estimate.time.attention_s for kind in ("arange", "prefix")
    }
    assert seconds["arange"] == pytest.approx(seconds["prefix"] / 2, rel=0.05)


def test_a_mask_that_stays_is_named_once_with_its_place_and_price() -> None:
    plan = priced(masked(["window", "arange", "prefix", "prefix"], LONG))
    (note,) = [note for note in plan.notes if "mask" in note]
    assert note.startswith("attention at test_fold_masks.py:")
    assert "and 2 more like it is priced as full attention" in note
    assert "neither as causal nor as all ones" in note
    assert note in plan_document(plan, None)["notes"]
    assert "priced as full attention" in plan_text(plan, width=1000)


def test_the_note_says_what_a_mask_is_computed_from() -> None:
    config = {**SMALL, "num_hidden_layers": 3, "max_position_embeddings": 32}
    model_class = transformers.BertForMaskedLM
    workload = Workload(
        build_model=lambda: model_class(model_class.config_class(attn_implementation="sdpa", **config)),
        example_inputs=lambda batch_size: {
            key: torch.empty(batch_size, 32, dtype=torch.long, device="meta")
            for key in ("input_ids", "labels", "attention_mask")
        },
    )
    (note,) = [note for note in priced(workload).notes if "mask" in note]
    assert "bert.encoder.layer.0.attention.self at " in note
    assert "and 2 more like it" in note
    assert note.endswith("is computed from the input attention_mask")


def test_causal_attention_has_no_note() -> None:
    assert not [note for note in priced(masked(["arange", "ones"], LONG)).notes if "mask" in note]
