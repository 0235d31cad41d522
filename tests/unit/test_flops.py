"""Model FLOPs and parameters against published arithmetic."""

import pytest
import torch

from autopar.graph.flops import flops_at_batch, model_flops, num_parameters
from autopar.graph.ir import Graph, TracedBatch
from autopar.graph.op_profiles import profile_graph
from autopar.graph.trace import trace
from tests.conftest import example_workload

torch.set_num_threads(1)


def example(name: str, **settings: object) -> Graph:
    return trace(example_workload(name, **settings), dtype="bfloat16").graph


@pytest.mark.parametrize(("size", "layers", "hidden"), [("125M", 12, 768), ("2.6B", 32, 2560)])
def test_gpt_follows_narayanan(size: str, layers: int, hidden: int) -> None:
    graph = example("gpt", size=size)
    batch, seq, vocab = 1024, 1024, 51200
    published = 72 * batch * seq * layers * hidden**2 * (1 + seq / (6 * hidden) + vocab / (12 * layers * hidden))
    flops = model_flops(graph, batch, profile_graph(graph).ops)
    assert flops.total == pytest.approx(published, rel=0.01)
    assert flops.backward == 2 * flops.forward
    parameters = 12 * layers * hidden**2 + 13 * layers * hidden + (vocab + seq + 2) * hidden
    assert num_parameters(graph) == parameters
    dense = 6 * (num_parameters(graph) - seq * hidden) * batch * seq  # the 6 N D rule, positions are a gather
    assert dict(flops.by_kind)["matmul"] == pytest.approx(dense, rel=0.01)


def test_llama_2_7b_on_one_sample_of_4096_tokens() -> None:
    graph = example("llama", size="7B")
    flops = model_flops(graph, 1, profile_graph(graph).ops)
    assert round(flops.forward / 1e12, 2) == 62.92
    assert round(flops.total / 1e12, 2) == 188.76
    assert dict(flops.by_kind)["attention"] == 12 * 32 * 4096**2 * 4096  # 12 L s^2 h
    assert num_parameters(graph) == 6_738_415_616


def test_flops_follow_the_batch_as_often_as_it_occurs() -> None:
    batch = TracedBatch(traced_size=808, prime=101)
    assert flops_at_batch(2 * 64 * 64 * 64, batch, 2) == 2 * 64 * 64 * 64  # positions only
    assert flops_at_batch(2 * 808 * 64 * 64, batch, 2) == 2 * 2 * 64 * 64
    assert flops_at_batch(2 * 808 * 808 * 64, batch, 2) == 2 * 2 * 2 * 64  # in-batch similarity
    assert flops_at_batch(0, batch, 2) == 0
