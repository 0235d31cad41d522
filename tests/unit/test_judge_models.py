"""Whatever the model, the judge prices a plan from its placements alone as the search did: no difference, no note."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from autopar.cluster.cost_tables import load_cluster
from autopar.core.plan import Plan
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.judge.judge import differences, judge
from autopar.planner.planner import plan
from autopar.workload import Workload
from tests.conftest import example_workload

torch.set_num_threads(1)


class Pair(nn.Module):
    """Two towers with a contrastive loss: the logits have the batch on both sides, so one tower's features are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(256, 128), nn.Linear(512, 128)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(self.left(x), dim=-1), F.normalize(self.right(y), dim=-1)
        logits = self.scale.exp() * a @ b.t()
        target = torch.arange(logits.shape[0])
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)


class Convolutions(nn.Module):
    """A plain net whose loss is no cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.second, self.head = nn.Conv2d(32, 64, 3, padding=1), nn.Linear(64, 100)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        out = F.adaptive_avg_pool2d(F.relu(self.second(out)), 1).flatten(1)
        return (self.head(out).logsumexp(-1) - y.mean((1, 2, 3))).mean()


class Twice(nn.Module):
    """One weight used twice in a block, one op without a rule, and a sort along the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.gelu(self.one(self.one(x)))
        scale = torch.linalg.matrix_exp(self.two.weight * 1e-3)
        return ((hidden @ scale).sort(0)[0] * y).square().mean()


def of_language(kind: str, config: transformers.PretrainedConfig) -> Callable[[], Workload]:
    return lambda: Workload(
        build_model=lambda: getattr(transformers, kind)(config),
        example_inputs=lambda batch_size: {
            name: torch.empty(batch_size, 64, dtype=torch.long) for name in ("input_ids", "labels")
        },
    )


def of_tensors(model: type[nn.Module], x: tuple[int, ...], y: tuple[int, ...]) -> Callable[[], Workload]:
    return lambda: Workload(
        build_model=model,
        example_inputs=lambda batch_size: {"x": torch.empty(batch_size, *x), "y": torch.empty(batch_size, *y)},
    )


MODELS: dict[str, Callable[[], Workload]] = {
    "mixtral": of_language(
        "MixtralForCausalLM",
        transformers.MixtralConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
            num_local_experts=4, vocab_size=512, use_cache=False,
        ),
    ),
    "t5": of_language(
        "T5ForConditionalGeneration",
        transformers.T5Config(
            d_model=128, d_kv=16, d_ff=256, num_layers=2, num_heads=8, vocab_size=512, decoder_start_token_id=0,
        ),
    ),
    "moe_odd": lambda: example_workload("moe", layers=2, hidden=132, heads=4, vocab=1003, seq=128, experts=6, group_size=128,
    ),
    "convolutions": of_tensors(Convolutions, (3, 32, 32), (3, 32, 32)),
    "pair": of_tensors(Pair, (256,), (512,)),
    "twice": of_tensors(Twice, (256,), (256,)),
}  # fmt: skip
SLOW = {"mixtral", "t5"}
BATCH = {"mixtral": 2048, "t5": 2048, "moe_odd": 256}


def planned(workload: Workload, cluster: str, gpus: int, global_batch: int) -> tuple[Plan, list[str]]:
    """A plan, and where the judge differs from it."""
    made = plan(workload, cluster=cluster, gpus=gpus, global_batch=global_batch)
    graph = hoist_light_ops(trace(workload, dtype="bfloat16").graph)
    return made, list(differences(made, judge(made, graph, split_into_blocks(graph), load_cluster(cluster))))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_the_judge_prices_the_plan_as_the_search_did(name):
    made, found = planned(MODELS[name](), "dgx-h100", 8, BATCH.get(name, 65536))
    assert found == []
    assert not [note for note in made.notes if "judged" in note or "differs" in note]


def test_an_op_without_a_rule_is_named_with_its_place():
    made, _ = planned(MODELS["twice"](), "dgx-h100", 2, 4096)
    (note,) = [note for note in made.notes if "matrix_exp" in note]
    assert "test_judge_models.py" in note
