"""Transformer arithmetic: the numbers that courses and papers print, out of traced graphs and the price of layouts.

Sources: a university course's notes on training and serving transformers (Llama-2-7B's FLOPs by part, 16 bytes a
parameter, Llama-3 405B's GPU hours, the pipeline formula); Korthikanti et al., "Reducing Activation Recomputation in
Large Transformer Models", 2022 (recomputation's cost); Meta's "The Llama 3 Herd of Models", 2024 (sizes).
"""

from math import prod

import pytest
import torch

from autopar.cluster import load_cluster
from autopar.core.layout import parse_layout
from autopar.core.plan import StagePlan
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.parameter_storage import ParameterStorage, state_bytes
from autopar.graph.flops import model_flops, num_parameters
from autopar.graph.ir import Graph
from autopar.graph.op_profiles import profile_graph
from autopar.graph.trace import trace
from autopar.graph.traced_model import TracedModel, trace_model
from autopar.manual.layout_pricer import LayoutPricer
from autopar.pipeline.simulate import StageTimes, simulate
from autopar.report.training_time import TrainingTime
from tests.conftest import example_workload

torch.set_num_threads(1)
TERA = 1e12


@pytest.fixture(scope="module")
def llama() -> TracedModel:
    return trace_model(example_workload("llama", size="7B"), dtype="bf16")


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_flops_of_a_gpt_follow_the_published_formulas(tied: bool) -> None:
    """12 L D^2 + D V (+ D V untied); forward 2 and forward + backward 6 FLOPs a parameter and token; attention 12 L N D a
    token in both. The norms, biases and N positions that the formulas leave out are below 1 % here."""
    L, D, V, N, batch = 24, 2048, 51200, 1024, 4
    workload = example_workload("gpt", layers=L, hidden=D, heads=16, vocab=V, seq=N, tied_embeddings=tied)
    graph = trace(workload, dtype="bfloat16").graph
    assert num_parameters(graph) == pytest.approx(12 * L * D**2 + D * V * (1 if tied else 2), rel=0.01)
    multiplied = 12 * L * D**2 + D * V  # the look-up multiplies nothing
    flops, tokens = model_flops(graph, batch, profile_graph(graph).ops), batch * N
    by_kind = dict(flops.by_kind)
    assert by_kind["matmul"] == pytest.approx(6 * multiplied * tokens, rel=1e-3)
    assert by_kind["attention"] == 12 * L * N * D * tokens
    assert flops.forward == pytest.approx(2 * multiplied * tokens + 4 * L * N * D * tokens, rel=1e-3)


def test_flops_of_llama_2_7b_are_the_published_ones_by_part(llama: TracedModel) -> None:
    """One sample of 4,096 tokens: 192.17 TFLOP, of which 55.361 % MLP, 41.276 % attention, 1.676 % each embedding and head,
    0.007 % normalisation, 0.003 % residuals. The product counts 188.76: no look-up as a matmul (3.22), no softmax (3 an
    element of the 32 heads' N x N scores), no element-wise op (here 1 an element); forward counts once, backward twice."""
    L, D, V, N, H = 32, 4096, 32000, 4096, 32
    assert round(model_flops(llama.graph, 1, profile_graph(llama.graph).ops).forward / TERA, 2) == 62.92
    assert round(model_flops(llama.graph, 1, profile_graph(llama.graph).ops).total / TERA, 2) == 188.76
    parts = flops_by_module(llama)
    parts["embed_tokens"] += 6 * N * D * V
    parts["self_attn"] += 3 * 3 * L * H * N**2
    whole = sum(parts.values())
    assert whole == pytest.approx(192.17 * TERA, rel=1e-3)
    published = {"mlp": 55.361, "self_attn": 41.276, "embed_tokens": 1.676, "lm_head": 1.676, "norm": 0.007, "": 0.003}
    for part, percent in published.items():
        assert 100 * parts[part] / whole == pytest.approx(percent, abs=0.01), part


def flops_by_module(model: TracedModel) -> dict[str, float]:
    """FLOPs of one sample by the kind of module, matmuls as the product counts them and element-wise ops at one an element
    (rotary embeddings, casts and the loss are no part of the notes' count)."""
    graph: Graph = model.graph
    arithmetic = ("add", "mul", "pow", "mean", "silu")
    parts = dict.fromkeys(("mlp", "self_attn", "embed_tokens", "lm_head", "norm", ""), 0.0)
    for op, profile in zip(graph.ops, profile_graph(graph).ops, strict=True):
        words = [word for word in op.module_path.split(".") if not word.isdigit() and word not in ("model", "layers")]
        part = "norm" if words and "norm" in words[-1] else words[0] if words else ""
        if part not in parts or "embedding" in op.target:
            continue
        flops = profile.forward_flops + profile.backward_flops
        if "attention" in op.target:
            flops = 3 * profile.forward_flops  # without the scores that flash attention recomputes
        elif not flops and op.target.split(".")[1] in arithmetic and part != "self_attn" and op.module_path:
            flops = 3 * prod(graph.values[op.outputs[0]].shape)
        parts[part] += flops / graph.batch.traced_size
    return parts


@pytest.mark.parametrize(("billions", "gigabytes"), [(1, 16), (7, 112), (70, 1120), (405, 6480)])
@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_mixed_precision_with_adam_takes_sixteen_bytes_a_parameter(
    billions: int, gigabytes: int, dtype: str, itemsize: int
) -> None:
    """Weights, gradients and Adam's state: 2 + 2 + 12 in mixed precision, 4 + 4 + 8 in fp32."""
    execution = ExecutionModel(dtype=dtype, fp32_grads=False)
    assert (
        sum(state_bytes(ParameterStorage(stage=0, axes=()), 1, billions * 10**9, itemsize, execution))
        == gigabytes * 1e9
    )


def test_sixteen_bytes_a_parameter_of_a_traced_model(llama: TracedModel) -> None:
    """Sharded over 4 ranks or not; norms, which are replicated, are 0.004 % of the parameters."""
    for text, ranks in (("dp=4,grads=same", 1), ("tp=4,grads=same", 4)):
        pricer = LayoutPricer(
            llama, cluster=load_cluster("dgx-a100"), gpus=4, global_batch=4, memory_gib=None, optimizer="adamw"
        )
        plan = pricer.plan(pricer.price(parse_layout(text)), 0.0)
        assert plan.model.num_parameters == 6_738_415_616
        assert ranks * plan.stages[0].memory.state_bytes == pytest.approx(16 * 6_738_415_616, rel=2e-4)


def test_what_recomputation_costs_and_saves_gpt_3() -> None:
    """Full recomputation 30 to 40 % of a layer's time, that of attention alone 2.7 % (175B, tp 8, sequence parallel,
    attention materialised; Korthikanti et al., 2022, figure 8 and table 4). It saves 70 %, 5 a s / h of 34 + 5 a s / h bytes
    per token and width (section 4.1, of one rank; without dropout's two masks 32 + 80). Four layers are like 96."""
    model = trace_model(example_workload("gpt", size="175B", layers=4), dtype="bf16")

    def middle_stage(gpus: int, layout: str) -> StagePlan:
        pricer = LayoutPricer(
            model, cluster=load_cluster("dgx-a100"), gpus=gpus, global_batch=4, memory_gib=None, optimizer="adamw"
        )
        return pricer.plan(pricer.price(parse_layout(layout)), 0.0).stages[1]

    times, saved = {}, {}
    for mode in ("none", "selective", "full"):
        stage = middle_stage(32, f"tp=8,pp=4,sp=1,attn=math,recompute={mode}")
        times[mode] = stage.forward_s + stage.backward_s
        saved[mode] = stage.memory.saved_activations_bytes
    assert 1.30 < times["full"] / times["none"] < 1.40
    assert times["selective"] / times["none"] == pytest.approx(1.027, abs=0.008)
    assert 1 - saved["selective"] / saved["none"] == pytest.approx(0.70, abs=0.04)


@pytest.mark.parametrize(
    ("layout", "per_token"),
    [
        ("tp=8,sp=1", 32 / 8),
        ("tp=8,sp=0", 8 + 24 / 8),
        ("tp=8,sp=1,recompute=selective", 32 / 8),
        ("tp=8,sp=1,recompute=full", 2 / 8),
        ("tp=1", 32),
    ],
)
def test_activations_of_a_layer_are_korthikanti_s(layout: str, per_token: float) -> None:
    """Bytes a token and unit of width (2022, table 2), attention fused: 34 / t with tensor and sequence parallelism, 10 + 24
    / t without the latter, 2 of the input alone; less two one-byte masks of dropout, which this model has not."""
    model = trace_model(example_workload("gpt", size="175B", layers=4), dtype="bf16")
    gpus = 32 if "tp=8" in layout else 4
    pricer = LayoutPricer(
        model, cluster=load_cluster("dgx-a100"), gpus=gpus, global_batch=4, memory_gib=None, optimizer="adamw"
    )
    stage = pricer.plan(pricer.price(parse_layout(f"pp=4,mbs=1,{layout}")), 0.0).stages[1]
    per_layer_bytes = stage.memory.saved_activations_bytes / stage.in_flight / len(stage.blocks)
    assert per_layer_bytes == pytest.approx(per_token * 2048 * 12288, rel=0.01)


def test_gpu_hours_of_llama_3_405b_are_near_the_published_ones() -> None:
    """15T tokens at 6 FLOPs a parameter and token, 400 TFLOP/s a GPU: 25.3 M GPU hours, 66 days on 16,000 H100."""
    gpus, tokens_per_s = 16_000, 16_000 * 400e12 / (6 * 405e9)
    training = TrainingTime.of(15e12, tokens_per_s, gpus)
    assert round(training.gpu_hours / 1e6, 1) == 25.3
    assert round(training.days) == 66


def test_a_pipeline_s_latency_follows_the_published_formula() -> None:
    """T = sum t_i + (B - 1) max t_j: exactly so for a flow line (forward only) of any stages, and for equal stages that
    also run backward."""
    times, B = (3.0, 1.0, 4.0, 1.5), 7
    line = [StageTimes(forward_s=t, backward_s=0.0) for t in times]
    assert simulate("gpipe", line, B).step_time_s == sum(times) + (B - 1) * max(times)
    equal = [StageTimes(forward_s=1.0, backward_s=2.0)] * 4
    assert simulate("1f1b", equal, B).step_time_s == 4 * 3.0 + (B - 1) * 3.0
