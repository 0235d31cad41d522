"""Selective recomputation by operation against torch's own: the same policy, run."""

import importlib.util
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from autopar.cluster.cost_tables import load_cluster
from autopar.core.layout import parse_layout
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.op_profiles import profile_graph
from autopar.graph.split_into_blocks import split_into_blocks
from autopar.graph.traced_model import trace_model
from autopar.intra.block_space import build_block_space
from autopar.intra.recompute import Recomputation, SelectiveSaved
from autopar.judge.judge import differences, judge
from autopar.manual.layout_pricer import LayoutPricer
from autopar.workload.model_file import load_workload

HIDDEN, HEADS, KEYS, FFN, SEQ, BATCH = 64, 4, 2, 160, 32, 2
MODEL = f"""
import torch
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = nn.RMSNorm({HIDDEN}), nn.RMSNorm({HIDDEN})
        self.q = nn.Linear({HIDDEN}, {HIDDEN}, bias=False)
        self.k = nn.Linear({HIDDEN}, {HIDDEN // HEADS * KEYS}, bias=False)
        self.v = nn.Linear({HIDDEN}, {HIDDEN // HEADS * KEYS}, bias=False)
        self.o = nn.Linear({HIDDEN}, {HIDDEN}, bias=False)
        self.gate, self.up = nn.Linear({HIDDEN}, {FFN}, bias=False), nn.Linear({HIDDEN}, {FFN}, bias=False)
        self.down = nn.Linear({FFN}, {HIDDEN}, bias=False)

    def forward(self, x):
        batch, seq, _ = x.shape
        y = self.before(x)
        q = self.q(y).view(batch, seq, {HEADS}, -1).transpose(1, 2) * 0.5
        k, v = (
            torch.repeat_interleave(one(y).view(batch, seq, {KEYS}, -1), {HEADS // KEYS}, dim=2).transpose(1, 2)
            for one in (self.k, self.v)
        )
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, num_layers):
        super().__init__()
        self.embedding = nn.Embedding(50, {HIDDEN})
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.head = nn.Linear({HIDDEN}, 50, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build_model(num_layers=2):
    return Model(num_layers)


def example_inputs(batch_size):
    return {{"ids": torch.zeros(batch_size, {SEQ}, dtype=torch.int64, device="meta")}}


def loss_fn(output, inputs):
    return F.cross_entropy(output.flatten(0, 1).float(), inputs["ids"].flatten())
"""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.py"
    path.write_text(MODEL)
    return path


class Seen(TorchDispatchMode):
    """Counts products, and remembers the memory of every result; ``known`` are parameters, of which results may be views."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.products = 0
        self.memories: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.mm.default
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.known:
                    continue
                self.memories[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return found

    @property
    def alive_bytes(self) -> int:
        return sum(size for memory, size in self.memories.values() if not memory.expired())


def contexts() -> Any:
    """torchtitan's policy: every second product, and attention."""
    counts: dict[bool, int] = defaultdict(int)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        product = func == torch.ops.aten.mm.default
        counts[context.is_recompute] += product
        keeps = func == attention or (product and counts[context.is_recompute] % 2 == 1)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def run(module: ModuleType, num_layers: int) -> tuple[int, int]:
    """Bytes that layers save for the backward, and products in the backward."""
    torch.manual_seed(0)
    layers = [module.Block() for _ in range(num_layers)]
    x = torch.randn(BATCH, SEQ, HIDDEN, requires_grad=True)
    with Seen([one for layer in layers for one in layer.parameters()]) as seen:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)
        saved, before = seen.alive_bytes, seen.products
        x.sum().backward()
    return saved, seen.products - before


def pricer(path: Path, num_layers: int) -> LayoutPricer:
    workload = load_workload(str(path), num_layers=num_layers)
    return LayoutPricer(
        trace_model(workload, dtype="fp32"),
        cluster=load_cluster("dgx-h100"),
        gpus=2,
        global_batch=2 * BATCH,
        memory_gib=None,
        optimizer="adamw",
    )


LAYOUT = f"dp=2,mbs={BATCH},zero=3,recompute=selective"


def test_what_a_layer_saves_and_recomputes_is_what_torch_does(model_file: Path) -> None:
    spec = importlib.util.spec_from_file_location("measured", model_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (two_bytes, two_products), (three_bytes, three_products) = run(module, 2), run(module, 3)
    saved = []
    for num_layers in (2, 3):
        prices = pricer(model_file, num_layers)
        plan = prices.plan(prices.price(parse_layout(LAYOUT)), 0.0)
        saved.append(plan.stages[0].memory.saved_activations_bytes)
    tokens = BATCH * SEQ
    # input, q, v (as it is made), attention and its log-sum-exp, gate, down
    by_hand = 4 * tokens * (HIDDEN + HIDDEN + HIDDEN * KEYS // HEADS + HIDDEN + HEADS + FFN + HIDDEN)
    assert three_bytes - two_bytes == by_hand
    assert saved[1] - saved[0] == by_hand

    graph = prices.model.graph
    blocks, profile = split_into_blocks(graph), profile_graph(graph)
    selective_saved = SelectiveSaved.by_operation(
        graph, profile, blocks, ExecutionModel(dtype="float32", selective_policy="products")
    )
    layer = next(block for block in blocks if block.name == "layers.1")
    recomputed = Recomputation.of_block(
        build_block_space(graph, layer, graph.parameter_free()),
        profile,
        whole_block=False,
        saved_ops=selective_saved.saved_ops,
    )
    products = [op for op in graph.ops if op.id in recomputed.ops and op.target.startswith("aten.linear")]
    assert [op.module_path.split(".")[-1] for op in products] == ["k", "o", "up"]
    assert three_products - two_products == 2 * 7 + len(products)


@pytest.mark.parametrize("text", [LAYOUT, LAYOUT + ",attn=math", "tp=2,sp=1,mbs=2,zero=3,recompute=selective"])
def test_the_judge_finds_the_same(model_file: Path, text: str) -> None:
    prices = pricer(model_file, 2)
    plan = prices.plan(prices.price(parse_layout(text)), 0.0)
    assert plan.execution.selective == "products"
    assert not list(
        differences(plan, judge(plan, prices.model.graph, prices.model.blocks, prices.cluster, prices.model.profile))
    )


def test_only_layouts_of_fsdp_select_by_operation(model_file: Path) -> None:
    """Megatron-LM's selective recomputation is that of attention, whatever the kernel."""
    prices = pricer(model_file, 2)

    def saved(text: str) -> int:
        plan = prices.plan(prices.price(parse_layout(text)), 0.0)
        return plan.stages[0].memory.saved_activations_bytes

    by_attention = saved(LAYOUT.replace("zero=3", "zero=1"))
    assert saved(LAYOUT) < by_attention <= saved(LAYOUT.replace("selective", "none"))
