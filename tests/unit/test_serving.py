"""Inference of traced models: cache and weights by arithmetic, bandwidth as a bound, and what is refused."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.cli.main import run
from autopar.cluster import load_cluster
from autopar.core.errors import LayoutError, UsageError
from autopar.manual.layout_pricer import plan_layout
from autopar.serving.decode_step import DecodeMatmul, largest_batch, matmul_time
from autopar.serving.serve import Mode, ServingEstimate, estimate_serving
from autopar.workload import load_workload
from tests.conftest import EXAMPLES, example_workload

torch.set_num_threads(1)
LAYERS, HIDDEN, HEADS, VOCAB, SEQ = 4, 2048, 16, 51200, 1024
MATRICES = 12 * LAYERS * HIDDEN**2 + HIDDEN * VOCAB


def gpt(layout: str = "", gpus: int = 1, mode: Mode = "decode", **options: Any) -> ServingEstimate:
    settings = {"layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "vocab": VOCAB, "seq": SEQ}
    workload = example_workload("gpt", **settings)
    return estimate_serving(workload, gpus=gpus, layout=layout, mode=mode, **options)


def read_bytes(serving: ServingEstimate) -> float:
    """Of a device in a step, out of the utilisation of its bandwidth."""
    return serving.mbu * serving.time_s * load_cluster(serving.cluster).device.memory_bytes_per_s


def test_gemma_7b_has_the_figures_of_the_course_notes() -> None:
    """28 layers, 16 heads of 256, 2K tokens: about 939 MB of keys and values; with 14 GB of weights 121 sequences fill
    128 GB. A GPT of hidden 4096 = 16 * 256 has such a cache."""
    workload = example_workload("gpt", layers=28, hidden=4096, heads=16, vocab=VOCAB, seq=2048)
    serving = estimate_serving(workload, gpus=1, layout="", mode="decode", batch=1, context=2048)
    assert serving.cache_bytes == 2 * 28 * 16 * 256 * 2048 * 2 == 939_524_096
    assert largest_batch(128e9, 14e9, serving.cache_bytes) == 121


@pytest.mark.parametrize(("tp", "local_heads"), [(1, 8), (2, 4), (8, 1)])
def test_grouped_queries_have_the_small_cache_of_the_trace(tp: int, local_heads: int) -> None:
    """Llama 3 8B repeats 8 key heads for 32 query heads before it attends; the cache is of the 8."""
    workload = example_workload("llama", size="8B", layers=2, seq=1024)
    serving = estimate_serving(workload, gpus=tp, layout=f"tp={tp}", mode="decode", batch=1)
    assert serving.kv_heads == (8,)
    assert serving.cache_bytes_per_token == 2 * 2 * local_heads * 128 * 2


def test_a_step_reads_all_weights_and_the_cache() -> None:
    serving = gpt(batch=4, context=512)
    cache = 4 * 512 * 2 * LAYERS * HIDDEN * 2
    assert serving.cache_bytes == cache
    assert read_bytes(serving) == pytest.approx(2 * MATRICES + cache, rel=1e-6)
    assert serving.weights_bytes == pytest.approx(2 * (MATRICES + SEQ * HIDDEN), rel=0.005)
    bound_s = (2 * MATRICES + cache) / load_cluster("dgx-h100").device.memory_bytes_per_s
    assert bound_s < serving.time_s < 3 * bound_s


def test_quantised_weights_and_cache_take_fewer_bytes() -> None:
    """int8 halves what is read, int4 with a 2-byte scale per 128 weights leaves 0.2578; the tied table, which is looked up and
    is the head, stays as it is."""
    plain, int8, int4 = (gpt(batch=1, context=1, weights=stored) for stored in ("same", "int8", "int4"))
    layers, table = 12 * LAYERS * HIDDEN**2, HIDDEN * VOCAB
    cache = 2 * LAYERS * HIDDEN * 2
    assert read_bytes(int8) == pytest.approx(layers + 2 * table + cache, rel=1e-6)
    assert read_bytes(int4) == pytest.approx(layers * (0.5 + 2 / 128) + 2 * table + cache, rel=1e-6)
    assert int4.time_s < int8.time_s < plain.time_s
    assert int4.weights_bytes < int8.weights_bytes < plain.weights_bytes
    cached = gpt(batch=64, kv_cache="int8")
    assert cached.cache_bytes * 2 == gpt(batch=64).cache_bytes
    assert cached.largest_batch == pytest.approx(2 * gpt(batch=64).largest_batch, rel=0.01)


def test_small_weights_do_not_speed_up_arithmetic() -> None:
    """At 8,192 rows an H100 computes for 30 times as long as it reads."""
    device = load_cluster("dgx-h100").device
    half, quarter = (
        matmul_time(
            DecodeMatmul(rows_per_token=1.0, n=4096, k=4096, num_matrices=1.0, weight_itemsize=size),
            8192,
            device,
            "bfloat16",
        )[0]
        for size in (2.0, 0.5)
    )
    assert half == quarter
    assert half == pytest.approx(float(device.matmul_s(8192, 4096, 4096, dtype="bfloat16")))


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    serving = gpt(memory_gib=8.0)
    assert serving.batch == serving.largest_batch > 1
    assert serving.fits
    assert not gpt(memory_gib=8.0, batch=serving.largest_batch + 1).fits
    assert serving.curve[-1].batch == serving.largest_batch
    rates = [point.tokens_per_s for point in serving.curve]
    assert rates == sorted(rates)
    assert all(0 < point.mbu < 1 for point in serving.curve)
    tight = gpt(memory_gib=1.0)
    assert (tight.largest_batch, tight.batch, tight.fits) == (0, 1, False)


def test_replicas_share_the_sequences() -> None:
    alone, pair, replicas = gpt(batch=8), gpt("tp=2", 2, batch=8), gpt("tp=2", 8, batch=32)
    assert pair.weights_bytes == pytest.approx(alone.weights_bytes / 2, rel=0.01)
    assert pair.cache_bytes * 2 == alone.cache_bytes
    assert dict(pair.parts)["exchange"] > 0 == dict(alone.parts)["exchange"]
    assert (replicas.replicas, replicas.batch, replicas.time_s) == (4, 8, pair.time_s)
    assert replicas.tokens_per_s == pytest.approx(4 * pair.tokens_per_s)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_the_batch_of_a_layout_is_that_of_the_request(mode: Mode) -> None:
    in_layout = gpt("tp=2,gbs=32", 8, mode)
    assert in_layout == gpt("tp=2", 8, mode, batch=32) == gpt("tp=2,gbs=32", 8, mode, batch=32)
    assert in_layout.batch == 8
    with pytest.raises(LayoutError, match="gbs=32 in the layout, but the global batch is 16"):
        gpt("tp=2,gbs=32", 8, mode, batch=16)
    with pytest.raises(LayoutError, match="gbs=30 is no multiple"):
        gpt("tp=2,gbs=30", 8, mode)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("workload", None, "workload must be a Workload"),
        ("cluster", 8, "must be a Cluster, or a name or file of one, not 8"),
        ("gpus", 0, "must be a whole number of at least 1, not 0"),
        ("layout", None, "must be a text such as"),
        ("mode", "train", "must be one of prefill, decode, not 'train'"),
        ("mode", "generate", "must be one of prefill, decode, not 'generate'"),
        ("batch", -4, "must be a whole number of at least 1, not -4"),
        ("batch", 2.5, "must be a whole number of at least 1, not 2.5"),
        ("context", 0, "must be a whole number of at least 1, not 0"),
        ("weights", "int2", "must be one of same, int8, int4, not 'int2'"),
        ("kv_cache", "fp8", "must be one of same, int8, int4, not 'fp8'"),
        ("dtype", "int8", "must be one of bf16, fp16, fp32, not 'int8'"),
        ("memory_gib", 0, "must be a finite number above 0, not 0"),
    ],
)
def test_wrong_arguments_of_python_end_in_a_usage_error(argument: str, value: Any, message: str) -> None:
    """Before anything is traced."""
    untraceable = autopar.Workload(build_model=lambda: nn.Linear(2, 2), example_inputs=lambda batch_size: {})
    right: dict[str, Any] = {"workload": untraceable, "gpus": 1, "layout": "", "mode": "decode"}
    with pytest.raises(UsageError, match=message):
        estimate_serving(**(right | {argument: value}))


def test_a_prefill_takes_no_context() -> None:
    """It reads the model's own sequence."""
    with pytest.raises(UsageError, match="is for the mode decode"):
        gpt(mode="prefill", context=64)


def test_launches_bound_what_is_not_replayed() -> None:
    eager, replayed = gpt("fusion=none", batch=1), gpt(batch=1)
    assert dict(replayed.parts)["launches"] == 0 < dict(eager.parts)["launches"]
    assert eager.time_s > 2 * replayed.time_s


def test_prefill_counts_one_row_of_logits_a_sequence() -> None:
    serving = gpt(mode="prefill", batch=2)
    flops = 2 * 12 * LAYERS * HIDDEN**2 * 2 * SEQ + 4 * LAYERS * SEQ**2 * HIDDEN * 2 + 2 * HIDDEN * VOCAB * 2
    peak = load_cluster("dgx-h100").device.peak("bfloat16")
    assert serving.mfu == pytest.approx(flops / (serving.time_s * peak), rel=1e-6)
    assert 0.1 < serving.mfu < 0.9
    assert serving.tokens_per_s == pytest.approx(2 * SEQ / serving.time_s)
    assert sum(seconds for _, seconds in serving.parts) == pytest.approx(serving.time_s)


def test_ranks_share_no_key_head() -> None:
    """Megatron-LM: the tensor-parallel degree divides the number of query groups; in training as in inference."""
    workload = example_workload("llama", size="8B", layers=2, seq=1024)
    with pytest.raises(LayoutError, match="tp=16 does not divide 8 key/value heads"):
        estimate_serving(workload, gpus=16, layout="tp=16", mode="decode")
    with pytest.raises(LayoutError, match="tp=16 does not divide 8 key/value heads"):
        plan_layout(workload, gpus=16, layout="tp=16", global_batch=16)


@pytest.mark.parametrize(
    ("layout", "gpus", "faults"),
    [
        ("pp=2,zero=1,vpp=2", 8, ["pp=", "zero=", "vpp="]),
        ("tp=3,cp=2", 8, ["cp=", "does not divide 8 GPUs", "tp=3 does not divide 16 attention heads"]),
        ("tp=4,gbs=3", 8, ["gbs=3 is no multiple"]),
        ("stages=2@dp2+2@dp2", 4, ["stages="]),
    ],
)
def test_layouts_that_inference_does_not_take(layout: str, gpus: int, faults: list[str]) -> None:
    with pytest.raises(LayoutError) as caught:
        gpt(layout, gpus)
    for fault in faults:
        assert any(fault in one for one in caught.value.faults), caught.value.faults


def test_models_that_do_not_generate_are_refused() -> None:
    with pytest.raises(UsageError, match="calls no scaled_dot_product_attention"):
        estimate_serving(example_workload("wide_resnet", size="250M"), gpus=1, layout="", mode="decode")

    class Crossing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            query, key = self.linear(x).unsqueeze(1), self.linear(y).unsqueeze(1)
            return torch.nn.functional.scaled_dot_product_attention(query, key, key).mean()

    def inputs(batch_size: int) -> dict[str, Tensor]:
        return {name: torch.empty(batch_size, size, 64, device="meta") for name, size in (("x", 16), ("y", 32))}

    workload = autopar.Workload(build_model=Crossing, example_inputs=inputs)
    with pytest.raises(UsageError, match=r"cross-attention .16 and 32 tokens"):
        estimate_serving(workload, gpus=1, layout="", mode="prefill")


def test_encoders_read_but_do_not_generate() -> None:
    from transformers import BertConfig, BertForMaskedLM

    def inputs(batch_size: int) -> dict[str, Tensor]:
        return {
            name: torch.empty((batch_size, 64), dtype=torch.long, device="meta") for name in ("input_ids", "labels")
        }

    def build() -> nn.Module:
        return BertForMaskedLM(BertConfig(num_hidden_layers=1, vocab_size=512, attn_implementation="sdpa"))

    workload = autopar.Workload(build_model=build, example_inputs=inputs)
    with pytest.raises(UsageError, match="without a causal mask"):
        estimate_serving(workload, gpus=1, layout="", mode="decode")
    assert estimate_serving(workload, gpus=1, layout="", mode="prefill").time_s > 0


def test_encoder_decoders_of_equal_sequences_are_seen() -> None:
    workload = load_workload(str(EXAMPLES.parent / "tests/distributed/models/t5.py"))
    with pytest.raises(UsageError, match="cross-attention"):
        estimate_serving(workload, gpus=1, layout="", mode="decode")


def test_the_command_line_prints_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", str(EXAMPLES / "gpt.py"), "--gpus", "4", "--layout", "tp=2", "-q", "--set", "layers=2"]
    words += ["--set", "hidden=512", "--set", "heads=8", "--mode"]
    assert run([*words, "decode", "--weights", "int8", "--context", "100", "--global-batch", "6", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["mode"] == "decode"
    figures = document["serving"]
    assert (figures["batch"], figures["context"], figures["replicas"], figures["weights"]) == (3, 100, 2, "int8")
    assert {"time_s", "tokens_per_s", "mbu", "mfu", "largest_batch", "fits", "peak_memory_bytes"} <= set(figures)
    assert run([*words, "prefill"]) == 0
    assert "prefill time" in capsys.readouterr().out
    for extra, message in (
        (["decode", "--tokens", "1e9"], "--tokens belong to training"),
        (["prefill", "--context", "10"], "is for the mode decode"),
        (["train", "--kv-cache", "int8", "--global-batch", "4"], "--kv-cache belong to inference"),
    ):
        assert run([*words, *extra]) == 2
        assert message in capsys.readouterr().err
