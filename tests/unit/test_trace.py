"""Tracing: the graph, run op by op on real tensors at another batch size, is the eager model."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.core.errors import ModelError
from autopar.graph.ir import Graph, InputRef, Op
from autopar.graph.trace import TracedGraph, trace
from autopar.workload import Workload
from tests.conftest import EXAMPLES, example_workload

torch.set_num_threads(1)


def tokens(batch_size: int, seq: int, *names: str) -> dict[str, Tensor]:
    return {name: torch.empty(batch_size, seq, dtype=torch.long) for name in names}


def op_of(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def run(traced: TracedGraph, model: nn.Module, inputs: dict[str, Any], batch_size: int) -> Tensor:
    """Interprets the graph on real tensors, checking every result's shape; literals and shapes scaled to the batch."""
    graph = traced.graph
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    tensors: dict[int, Tensor] = {}
    for value in graph.values:
        if value.kind == "activation":
            continue
        source = {"input": inputs, "constant": traced.constants}.get(value.kind, state)
        tensors[value.id] = source[value.name]
        assert all(state[name] is tensors[value.id] for name in value.qualified_names)

    def literal(argument: Any, op: Op) -> Any:
        if isinstance(argument, InputRef):
            return tensors[op.inputs[argument.index]]
        if isinstance(argument, tuple):
            return [literal(element, op) for element in argument]
        if isinstance(argument, str) and isinstance(
            getattr(torch, argument, None), (torch.dtype, torch.layout, torch.memory_format)
        ):
            return getattr(torch, argument)
        return graph.batch.scale(argument, batch_size) if type(argument) is int else argument

    for op in graph.ops:
        kwargs = {key: literal(given, op) for key, given in op.kwargs}
        result = op_of(op.target)(*(literal(argument, op) for argument in op.args), **kwargs)
        results = [result] if isinstance(result, Tensor) else [one for one in result if isinstance(one, Tensor)]
        for value_id, tensor in zip(op.outputs, results, strict=True):
            value = graph.values[value_id]
            assert tensor.shape == tuple(graph.batch.scale(size, batch_size) for size in value.shape), (
                op,
                tensor.shape,
            )
            assert str(tensor.dtype) == f"torch.{value.dtype}", (op, tensor.dtype)
            tensors[value_id] = tensor if value.requires_grad else tensor.detach()
    return tensors[graph.outputs[0]]


def eager(workload: Workload, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    return workload.loss_fn(output, inputs) if workload.loss_fn else output.loss


def real(workload: Workload, batch_size: int, high: int) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    accepted = inspect.signature(workload.build_model).parameters
    model = workload.build_model(**{key: given for key, given in workload.settings.items() if key in accepted})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    inputs = {
        name: torch.randint(high, tensor.shape) if not tensor.is_floating_point() else torch.randn(tensor.shape)
        for name, tensor in workload.inputs(batch_size).items()
    }
    return model.train(), inputs


def hugging_face(
    model: str, config: dict[str, Any], inputs: Callable[[int], dict[str, Tensor]]
) -> Callable[[], Workload]:
    def make() -> Workload:
        transformers = pytest.importorskip("transformers")
        kind = getattr(transformers, model)
        return Workload(build_model=lambda: kind(kind.config_class(**config)), example_inputs=inputs)

    return make


def images(batch_size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.empty(batch_size, 3, 32, 32), "labels": torch.empty(batch_size, dtype=torch.long)}


class ConvNet(nn.Module):
    """In-place ops, a slice assignment, a frozen layer, an unused parameter, a region without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.unused = nn.Parameter(torch.empty(3))
        self.register_buffer("scale", torch.ones(8))
        self.head = nn.Linear(8, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(pixel_values)), inplace=True)
        x = self.frozen(x)
        x += 1
        with torch.no_grad():
            gate = x.mean((2, 3), keepdim=True).sigmoid()
        x = x * gate * self.scale.view(8, 1, 1)
        x[:, :, 0] = 0
        return self.head(x.flatten(2).amax(-1))


class Writer(nn.Module):
    """Writes that other names of the same memory see, and buffers written through a view and by in-place ops."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        first = x[:, 0]
        x.add_(1)
        self.seen[1] = x.detach().mean()
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return (first.sum() + (x * self.seen).sum() + self.mean.sum()) / 7


TINY: dict[str, tuple[Callable[[], Workload], int, int]] = {  # name: (workload, batch, number of tokens or classes)
    "gpt": (lambda: example_workload("gpt", size="125M", layers=2, hidden=32, heads=4, vocab=64, seq=16), 3, 64),
    "gpt untied": (
        lambda: example_workload("gpt", layers=1, hidden=32, heads=4, vocab=64, seq=16, tied_embeddings=False), 1, 64),
    "llama": (
        lambda: example_workload("llama", layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=64, seq=16), 3, 64),
    "moe": (
        lambda: example_workload("moe", layers=2, hidden=32, heads=4, experts=4, vocab=64, seq=16, group_size=32), 4, 64),
    "wide_resnet": (lambda: example_workload("wide_resnet", base_channels=4, image_size=64, classes=10), 4, 10),
    "conv": (
        lambda: Workload(build_model=ConvNet, example_inputs=images,
                         loss_fn=lambda output, inputs: F.cross_entropy(output, inputs["labels"])), 5, 10),
    "writes": (
        lambda: Workload(build_model=Writer, example_inputs=lambda b: {"x": torch.empty(b, 4)},
                         loss_fn=lambda output, inputs: output), 3, 1),
    "gpt2": (hugging_face("GPT2LMHeadModel", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16, "bos_token_id": 0,
        "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }, lambda b: tokens(b, 16, "input_ids", "labels")), 3, 64),
    "bert": (hugging_face("BertForMaskedLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }, lambda b: tokens(b, 16, "input_ids", "attention_mask", "labels")), 3, 2),
    "t5": (hugging_face("T5ForConditionalGeneration", {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }, lambda b: tokens(b, 16, "input_ids", "labels")), 3, 64),
    "vit": (hugging_face("ViTForImageClassification", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8, "num_labels": 10, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }, images), 3, 10),
    "mixtral": (hugging_face("MixtralForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 64, "num_local_experts": 4,
    }, lambda b: tokens(b, 16, "input_ids", "labels")), 3, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_the_graph_is_the_model(name: str) -> None:
    """Loss and gradients of the interpreted graph equal the eager model's, at a batch unrelated to the traced one."""
    make, batch_size, high = TINY[name]
    workload = make()
    traced = trace(workload, dtype="float32")
    model, inputs = real(workload, batch_size, high)
    names = {value.name for value in traced.graph.values if value.kind == "parameter" and value.requires_grad}

    twin = copy.deepcopy(model)
    expected = eager(workload, model, inputs)
    expected.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    loss = run(traced, twin, inputs, batch_size)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert {key for key, gradient in gradients.items() if gradient is not None} == names
    for key, parameter in twin.named_parameters():
        if key in names:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-5)

    for (key, buffer), written in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(written, buffer, msg=key)


def targets(graph: Graph) -> set[str]:
    return {op.target for op in graph.ops}


def test_large_ops_stay_whole() -> None:
    graph = trace(TINY["gpt"][0](), dtype="bfloat16").graph
    for target in ("scaled_dot_product_attention", "linear", "layer_norm", "embedding", "cross_entropy_loss"):
        assert f"aten.{target}.default" in targets(graph)
    assert "aten.einsum.default" in targets(trace(TINY["moe"][0](), dtype="bfloat16").graph)
    graph = trace(TINY["wide_resnet"][0](), dtype="float32").graph
    assert {"aten.conv2d.default", "aten.batch_norm.default", "aten.max_pool2d.default"} <= targets(graph)


def test_ids_kinds_places_and_dtypes() -> None:
    traced = trace(TINY["gpt"][0](), dtype="bfloat16")
    graph = traced.graph
    assert [value.id for value in graph.values] == list(range(len(graph.values)))
    assert [op.id for op in graph.ops] == list(range(len(graph.ops)))
    assert [graph.values[value].name for value in graph.inputs] == ["tokens", "labels"]
    assert {value.dtype for value in graph.values if value.kind == "parameter"} == {"bfloat16"}
    calls = {node.name for node in traced.module.graph.nodes if node.op == "call_function"}
    assert {op.name for op in graph.ops} <= calls
    placeholders = [node.name for node in traced.module.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == sum(value.kind != "activation" for value in graph.values)
    attention = next(op for op in graph.ops if "attention" in op.target)
    assert attention.module_path == "layers.0.attn"
    line = int(attention.source_location.removeprefix("gpt.py:"))
    assert "scaled_dot_product_attention" in (EXAMPLES / "gpt.py").read_text().splitlines()[line - 1]
    unbind = next(op for op in graph.ops if op.target == "aten.unbind.int")
    assert len(unbind.outputs) == 3
    written = [output for op in graph.ops for output in op.outputs]
    assert len(written) == len(set(written))


def test_tied_weights_are_one_value() -> None:
    graph = trace(TINY["gpt"][0](), dtype="bfloat16").graph
    tied = [value for value in graph.values if len(value.qualified_names) > 1]
    assert [value.qualified_names for value in tied] == [("tokens.weight", "head.weight")]
    readers = [op.target for op in graph.ops if tied[0].id in op.inputs]
    assert readers == ["aten.embedding.default", "aten.linear.default"]
    untied = trace(TINY["gpt untied"][0](), dtype="bfloat16").graph
    assert not [value for value in untied.values if len(value.qualified_names) > 1]


def test_one_tensor_under_two_names_is_two_inputs() -> None:
    """Hugging Face code passes ``labels=ids``; the training batch has a tensor for each."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 8)

        def forward(self, ids: Tensor, labels: Tensor, pair: dict[str, Tensor]) -> Tensor:
            logits = (self.embedding(ids) * pair["left"] + pair["right"]) @ self.embedding.weight.T
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def example_inputs(batch_size: int) -> dict[str, Any]:
        ids, scale = torch.empty(batch_size, 6, dtype=torch.long), torch.empty(batch_size, 1, 1)
        return {"ids": ids, "labels": ids, "pair": {"left": scale, "right": scale}}

    traced = trace(Workload(build_model=Net, example_inputs=example_inputs), dtype="float32")
    names = [traced.graph.values[value].name for value in traced.graph.inputs]
    assert names == ["ids", "labels", "pair_left", "pair_right"]
    read = {value for op in traced.graph.ops for value in op.inputs}
    assert read.issuperset(traced.graph.inputs)


def test_frozen_and_unused_parameters_and_no_grad_regions() -> None:
    graph = trace(TINY["conv"][0](), dtype="float32").graph
    grad = {value.name: value.requires_grad for value in graph.values if value.kind in ("parameter", "buffer")}
    assert grad["conv.weight"]
    assert grad["head.weight"]
    assert not grad["frozen.weight"]
    assert not grad["unused"]
    assert not grad["scale"]
    assert not any(value.requires_grad for value in graph.values if value.dtype in ("int64", "bool"))
    sigmoid = next(op for op in graph.ops if op.target == "aten.sigmoid.default")
    assert not graph.values[sigmoid.outputs[0]].requires_grad


def test_causal_masks_of_hugging_face_are_recognised() -> None:
    for name in ("gpt2", "llama", "mixtral"):
        graph = trace(TINY[name][0](), dtype="bfloat16").graph
        for op in graph.ops:
            if "attention" in op.target:
                assert op.args[3] is None, name
                assert op.args[5] is True, name
                assert len(op.inputs) == 3, name


def test_nothing_without_effect_is_left() -> None:
    for name in ("gpt2", "t5"):
        graph = trace(TINY[name][0](), dtype="bfloat16").graph
        read = {value for op in graph.ops for value in op.inputs} | set(graph.outputs)
        assert all(set(op.outputs) & read for op in graph.ops), name
        assert not {"aten.dropout.default", "aten.detach.default", "aten.alias.default"} & targets(graph)


def test_the_fingerprint_knows_structure_not_batch() -> None:
    def small(**settings: Any) -> str:
        sizes = {"layers": 2, "hidden": 32, "heads": 4, "vocab": 64, "seq": 16, **settings}
        return trace(example_workload("gpt", **sizes), dtype="bfloat16").graph.fingerprint

    assert small() == small()
    assert len({small(), small(layers=3), small(heads=8), small(tied_embeddings=False), small(vocab=65)}) == 5
    # A size divisible by the first prime makes the trace use another batch: what does not depend on it stays equal.
    from autopar.graph.trace import _trace_at  # the only way to ask for a batch

    workload = TINY["gpt"][0]()
    one, other = (_trace_at(workload, workload.build(), 8 * prime, prime, "bfloat16").graph for prime in (101, 149))
    assert one.batch != other.batch
    assert one.fingerprint == other.fingerprint


def test_a_prime_is_chosen_that_no_size_contains() -> None:
    graph = trace(
        example_workload("gpt", layers=1, hidden=404, heads=4, vocab=103 * 8, seq=107), dtype="bfloat16"
    ).graph
    assert graph.batch.prime not in (101, 103, 107)


def test_the_users_model_is_left_as_it_was() -> None:
    model = nn.Linear(4, 2).eval()
    before = model.weight
    workload = Workload(
        build_model=lambda: model,
        example_inputs=lambda batch_size: {"input": torch.empty(batch_size, 4)},
        loss_fn=lambda output, inputs: output.sum(),
    )
    trace(workload, dtype="bfloat16")
    assert model.weight is before
    assert not model.training


class Faulty(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.kind == "branch" and x.sum() > 0:
            x = x + 1
        if self.kind == "item":
            x = x * int(x.sum().item() > 0 and 2)
        if self.kind == "nonzero":
            x = x[x > 0]
        if self.kind == "shape":
            x = x.view(7, -1, 3)
        if self.kind == "raise":
            raise RuntimeError("the user's own complaint")
        if self.kind == "slots":  # grows with the batch, but not in proportion
            x = x[: -(-x.shape[0] // 7)]
        if self.kind == "loop":
            for _ in range(x.shape[0]):
                x = x + 1
        if self.kind == "unbind":
            x = torch.stack(list(x.unbind(0)))
        if self.kind == "sizes":
            x = torch.cat(x.split([1] * x.shape[0]))
        if self.kind == "repeated":
            x = torch.cat([x] * x.shape[0])
        if self.kind == "cond":
            x = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
        if self.kind == "parameter":
            self.linear.weight.data.mul_(0.9)
        if self.kind == "norm":
            x = torch.nn.functional.embedding((x > 0).long(), self.linear.weight, max_norm=1.0)
        if self.kind == "random":
            x = x + torch.normal(0.0, x.abs() + 1)
        if self.kind == "alpha":
            x = torch.nn.functional.alpha_dropout(x, 0.1, training=True)
        return x if self.kind == "vector" else x.sum()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("branch", ["depends on the values", "test_trace.py", "x.sum() > 0", "torch.where"]),
        ("item", ["depends on the values", "test_trace.py", ".item()"]),
        ("nonzero", ["depends on the", "test_trace.py"]),
        ("shape", ["shape", "test_trace.py", "x.view(7, -1, 3)"]),
        ("raise", ["the user's own complaint", "test_trace.py"]),
        ("vector", ["no loss", "loss_fn"]),
        ("loop", ["operations at batch 808", "loop over the samples", "test_trace.py"]),
        ("unbind", ["returns 808 tensors at batch 808 and 824 at batch 824", "test_trace.py", "list"]),
        ("sizes", ["808", "824", "test_trace.py", "list"]),
        ("repeated", ["reads 808 tensors at batch 808 and 824 at batch 824", "test_trace.py", "list"]),
        ("cond", ["higher-order operation cond", "test_trace.py"]),
        ("parameter", ["modifies a parameter", "aten.mul_", "test_trace.py"]),
        ("norm", ["modifies a parameter", "test_trace.py", "without max_norm"]),
        ("slots", ["proportion", "test_trace.py"]),
        ("random", ["aten.normal", "test_trace.py", "draws random numbers", "torch.nn.functional.dropout"]),
        ("alpha", ["aten.alpha_dropout", "test_trace.py", "draws random numbers"]),
    ],
)
def test_untraceable_models_give_one_short_error(kind: str, words: list[str]) -> None:
    workload = Workload(
        build_model=lambda: Faulty(kind), example_inputs=lambda batch_size: {"x": torch.empty(batch_size, 4)}
    )
    with pytest.raises(ModelError) as caught:
        trace(workload, dtype="float32")
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) <= 4, text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (lambda batch: [torch.empty(4) for _ in range(batch)], ["8 tensors at batch 8 and 16 at batch 16", "stack"]),
        (lambda batch: {str(at): torch.empty(4) for at in range(batch)}, ["8 tensors at batch 8 and 16 at batch 16"]),
        (lambda batch: torch.empty((batch,) + (4,) * (batch // 8)), ["(8, 4)", "(16, 4, 4)", "number of dims"]),
    ],
)
def test_inputs_whose_number_or_rank_follows_the_batch_give_one_short_error(inputs: Any, words: list[str]) -> None:
    workload = Workload(build_model=lambda: Faulty(""), example_inputs=lambda batch_size: {"x": inputs(batch_size)})
    with pytest.raises(ModelError) as caught:
        trace(workload, dtype="float32")
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) <= 2


def test_models_that_want_another_divisibility_are_traced() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] % 4 == 0:
                raise ValueError("batch must not be a multiple of 4")
            return self.linear(x).sum()

    workload = Workload(build_model=Odd, example_inputs=lambda batch_size: {"x": torch.empty(batch_size, 4)})
    assert trace(workload, dtype="float32").graph.batch.traced_size % 4


REAL: dict[str, tuple[str, dict[str, Any], Callable[[int], dict[str, Tensor]], float]] = {
    "GPT-2 XL": ("GPT2LMHeadModel", {"n_embd": 1600, "n_layer": 48, "n_head": 25},
                 lambda b: tokens(b, 1024, "input_ids", "labels"), 1.5576e9),
    "Mixtral 8x7B": ("MixtralForCausalLM", {}, lambda b: tokens(b, 4096, "input_ids", "labels"), 46.70e9),
    "T5-3B": ("T5ForConditionalGeneration",
              {"vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32,
               "decoder_start_token_id": 0}, lambda b: tokens(b, 512, "input_ids", "labels"), 2.8516e9),
    "ViT-L": ("ViTForImageClassification",
              {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
               "num_labels": 1000}, lambda b: {"pixel_values": torch.empty(b, 3, 224, 224),
                                               "labels": torch.empty(b, dtype=torch.long)}, 304.3e6),
    "BERT-large": ("BertForMaskedLM",
                   {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                    "intermediate_size": 4096}, lambda b: tokens(b, 512, "input_ids", "attention_mask", "labels"),
                   335.2e6),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("ViT-L", "BERT-large") else pytest.mark.slow) for name in REAL]
)
def test_hugging_face_at_real_size(name: str) -> None:
    model, config, inputs, count = REAL[name]
    graph = trace(hugging_face(model, config, inputs)(), dtype="bfloat16").graph
    parameters = sum(torch.Size(value.shape).numel() for value in graph.values if value.kind == "parameter")
    assert parameters == pytest.approx(count, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("gpt", "175B"), ("llama", "405B"), ("moe", "70B"), ("wide_resnet", "13B")])
def test_examples_at_their_largest(name: str, size: str) -> None:
    graph = trace(example_workload(name, size=size), dtype="bfloat16").graph
    assert graph.values[graph.outputs[0]].shape == ()
