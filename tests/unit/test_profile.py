"""Profiles against what autograd really saves and runs on real tensors, and against published activation formulas."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autopar.graph.ir import Graph, InputRef, Op, OpProfile, TracedBatch, Value
from autopar.graph.op_profiles import profile_graph, profile_ops
from autopar.graph.trace import trace
from autopar.workload import Workload

torch.set_num_threads(1)
BATCH = 808  # what models are traced at


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.silu(x) * torch.tanh(x)


class Attention(nn.Module):
    """``flash``: scaled_dot_product_attention; otherwise scores, mask, softmax and dropout in the open."""

    def __init__(self, hidden: int = 12, heads: int = 2, flash: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.flash, self.dropout = heads, flash, dropout
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, seq, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = torch.softmax((q @ k.transpose(-2, -1)) / 4.0, dim=-1)
            y = F.dropout(scores, self.dropout) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, seq, hidden))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.head(self.second(x).relu().mean((2, 3)))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.tokens(tokens)).flatten(0, 1), tokens.flatten())


def workload(build: Callable[[], nn.Module], **inputs: tuple[tuple[int, ...], torch.dtype]) -> Workload:
    return Workload(
        build_model=build,
        example_inputs=lambda batch_size: {
            name: torch.empty((batch_size, *shape), dtype=dtype) for name, (shape, dtype) in inputs.items()
        },
        loss_fn=lambda output, _: output if output.dim() == 0 else output.float().pow(2).mean(),
    )


def graph_of(build: Callable[[], nn.Module], *, dtype: Any = "float32", **inputs: Any) -> Graph:
    return trace(workload(build, **inputs), dtype=dtype).graph


def planned_saved_bytes(graph: Graph) -> int:
    """Bytes saved for the backward by the profiles, parameters and buffers left out."""
    profile = profile_graph(graph)
    owners = set()
    internal = 0
    for op, saved in zip(graph.ops, profile.ops, strict=True):
        owners |= {profile.storage_owner[op.inputs[position]] for position in saved.saved_inputs}
        owners |= {profile.storage_owner[op.outputs[position]] for position in saved.saved_outputs}
        internal += sum(prod(shape) * itemsize for shape, itemsize in saved.saved_internal_tensors)
    values = [graph.values[owner] for owner in owners]
    return internal + sum(
        prod(value.shape) * value.itemsize for value in values if value.kind not in ("parameter", "buffer")
    )


def real_run(load: Workload, dtype: torch.dtype = torch.float32) -> tuple[int, int, int]:
    """(bytes autograd saves, forward FLOPs, backward FLOPs) of the model on real tensors."""
    model = load.build_model().to(dtype)
    inputs = {
        name: torch.randint(0, 30, tensor.shape)
        if tensor.dtype == torch.long
        else torch.randn(tensor.shape, dtype=dtype)
        for name, tensor in load.inputs(BATCH).items()
    }
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), forward:
        loss = load.loss_fn(model(**inputs), inputs)
    with backward:
        loss.backward()
    size = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)
    return size, forward.get_total_flops(), backward.get_total_flops()


REAL = {
    "mlp": (MLP, {"x": ((6, 12), torch.float32)}),
    "attention": (lambda: Attention(flash=False), {"x": ((6, 12), torch.float32)}),
    "flash": (Attention, {"x": ((6, 12), torch.float32)}),
    "conv": (ConvNet, {"x": ((3, 8, 8), torch.float32)}),
    "tied": (Classifier, {"tokens": ((5,), torch.long)}),
}


@pytest.mark.parametrize("name", REAL)
def test_saved_bytes_and_flops_are_those_of_a_real_run(name: str) -> None:
    build, inputs = REAL[name]
    load = workload(build, **inputs)
    graph = trace(load, dtype="float32").graph
    profiles = profile_ops(graph).values()
    saved, forward, backward = real_run(load)
    attention = 4 * BATCH * 2 * 6 * 6 * 6 if name == "flash" else 0  # torch does not count the cpu's flash attention
    assert planned_saved_bytes(graph) == saved
    assert sum(profile.forward_flops for profile in profiles) == forward + attention
    assert sum(profile.backward_flops for profile in profiles) == backward + attention * 5 // 2


class Layer(nn.Module):
    """A transformer layer as Korthikanti et al. 2022 count it: dropout behind attention, projection and MLP."""

    def __init__(self, hidden: int, heads: int, flash: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn = Attention(hidden, heads, flash, 0.1)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attn(self.norm1(x)), 0.1)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), 0.1)


@pytest.mark.parametrize("flash", [False, True])
def test_saved_bytes_of_a_layer_follow_korthikanti(flash: bool) -> None:
    seq, hidden, heads, layers = 512, 1024, 16, 2
    build = lambda: nn.Sequential(*(Layer(hidden, heads, flash) for _ in range(layers)))  # noqa: E731
    load = Workload(
        build_model=build,
        example_inputs=lambda batch_size: {"input": torch.empty(batch_size, seq, hidden)},
        loss_fn=lambda output, _: output.sum(),
    )
    saved = planned_saved_bytes(trace(load, dtype="float16").graph)
    scores = 0 if flash else 5 * heads * seq / hidden
    assert saved == pytest.approx(layers * seq * BATCH * hidden * (34 + scores), rel=0.01)


def test_views_are_free_and_a_reshape_that_copies_is_not() -> None:
    values = [value(0, (101, 4, 6)), value(1, (101, 6, 4)), value(2, (101, 24)), value(3, (101, 24))]
    ops = [
        op(0, "aten.transpose.int", (0,), (1,), (InputRef(0), 1, 2)),
        op(1, "aten.reshape.default", (1,), (2,), (InputRef(0), (101, 24))),
        op(2, "aten.reshape.default", (0,), (3,), (InputRef(0), (101, 24))),
    ]
    profile = profile_graph(graph(values, ops))
    assert [(p.forward_kernels, p.forward_bytes) for p in profile.ops] == [(0, 0), (1, 2 * 4 * 101 * 24), (0, 0)]
    assert profile.storage_owner == (0, 0, 2, 0)


def test_a_frozen_weight_saves_neither_the_input_nor_half_of_the_backward() -> None:
    full = linear_profile(weight_grad=True)
    frozen = linear_profile(weight_grad=False)
    assert full.backward_flops == 2 * full.forward_flops == 4 * 101 * 8 * 16
    assert frozen.backward_flops == frozen.forward_flops
    assert (full.saved_inputs, frozen.saved_inputs) == ((0, 1), (1,))


def test_no_gradient_no_backward() -> None:
    values = [value(0, (101, 8), grad=False), value(1, (101, 8), grad=False)]
    profile = profile_ops(graph(values, [op(0, "aten.gelu.default", (0,), (1,), (InputRef(0),))]))[0]
    assert (profile.backward_kernels, profile.backward_bytes, profile.saved_inputs) == (0, 0, ())
    assert (profile.forward_kernels, profile.forward_bytes) == (1, 2 * 4 * 101 * 8)


def test_gradients_that_meet_are_added_once_per_extra_reader() -> None:
    values = [value(i, (101, 8)) for i in range(5)]
    ops = [op(i, "aten.neg.default", (0,), (i + 1,), (InputRef(0),)) for i in range(3)]
    ops.append(op(3, "aten.add.Tensor", (1, 2), (4,), (InputRef(0), InputRef(1))))
    profiles = profile_ops(graph(values, ops))
    assert [profiles[i].backward_kernels for i in range(3)] == [2, 2, 1]
    assert profiles[0].backward_bytes - profiles[2].backward_bytes == 3 * 4 * 101 * 8


def test_dropout_keeps_one_byte_an_element() -> None:
    values = [value(0, (101, 8)), value(1, (101, 8))]
    profile = profile_ops(graph(values, [op(0, "aten.dropout.default", (0,), (1,), (InputRef(0), 0.1, True))]))[0]
    assert profile.saved_internal_tensors == (((101, 8), 1),)
    assert (profile.saved_inputs, profile.saved_outputs) == ((), ())
    assert (profile.forward_kernels, profile.backward_kernels) == (1, 1)


def test_layer_norm_launches_one_kernel_forward_and_two_backward_and_keeps_fp32_statistics() -> None:
    values = [value(0, (101, 8), dtype="bfloat16"), value(1, (8,), dtype="bfloat16"), value(2, (8,), dtype="bfloat16")]
    values.append(value(3, (101, 8), dtype="bfloat16"))
    call = op(0, "aten.layer_norm.default", (0, 1, 2), (3,), (InputRef(0), (8,), InputRef(1), InputRef(2)))
    profile = profile_ops(graph(values, [call]))[0]
    assert (profile.forward_kernels, profile.backward_kernels) == (1, 2)
    assert [itemsize for _, itemsize in profile.saved_internal_tensors] == [4, 4]


def test_rms_norm_is_one_fused_kernel() -> None:
    values = [value(0, (101, 8)), value(1, (8,)), value(2, (101, 8))]
    profile = profile_ops(
        graph(values, [op(0, "aten.rms_norm.default", (0, 1), (2,), (InputRef(0), (8,), InputRef(1)))])
    )[0]
    assert profile.saved_internal_tensors == (((101, 1), 4),)
    assert profile.forward_bytes == 2 * 4 * 101 * 8 + 4 * 8 + 4 * 101
    assert (profile.forward_kernels, profile.backward_kernels) == (1, 2)


def test_a_gather_does_not_read_the_whole_table() -> None:
    values = [value(0, (50000, 8)), value(1, (101,), dtype="int64", grad=False), value(2, (101, 8))]
    profile = profile_ops(graph(values, [op(0, "aten.embedding.default", (0, 1), (2,), (InputRef(0), InputRef(1)))]))[0]
    assert profile.forward_bytes == 2 * 4 * 101 * 8 + 8 * 101
    assert profile.forward_flops == 0
    assert profile.backward_bytes > 4 * 50000 * 8  # the gradient is a dense table


def test_an_op_that_cannot_run_is_priced_by_its_tensors_and_named() -> None:
    values = [value(0, (101, 8)), value(1, (101, 8))]
    profile = profile_graph(graph(values, [op(0, "nobody.knows.default", (0,), (1,), (InputRef(0),))]))
    assert profile.ops[0].forward_bytes == 2 * 4 * 101 * 8
    assert profile.ops[0].backward_kernels == 0
    assert [number for number, _ in profile.unprofiled_ops] == [0]
    assert "nobody.knows.default" in profile.unprofiled_ops[0][1]


def value(number: int, shape: tuple[int, ...], *, dtype: str = "float32", grad: bool = True) -> Value:
    return Value(id=number, name=f"v{number}", kind="activation", shape=shape, dtype=dtype, requires_grad=grad)


def op(number: int, target: str, inputs: tuple[int, ...], outputs: tuple[int, ...], args: tuple[Any, ...]) -> Op:
    return Op(
        id=number, name=f"op{number}", target=target, inputs=inputs, outputs=outputs, args=args, kwargs=(), module_path="",
        source_location="",
    )  # fmt: skip


def graph(values: list[Value], ops: list[Op]) -> Graph:
    batch = TracedBatch(traced_size=101, prime=101)
    return Graph(
        values=tuple(values), ops=tuple(ops), inputs=(0,), outputs=(len(values) - 1,), batch=batch, fingerprint=""
    )


def linear_profile(*, weight_grad: bool) -> OpProfile:
    values = [value(0, (101, 8)), value(1, (16, 8), grad=weight_grad), value(2, (101, 16))]
    return profile_ops(graph(values, [op(0, "aten.linear.default", (0, 1), (2,), (InputRef(0), InputRef(1)))]))[0]


def test_a_recurrent_layer_counts_its_matmuls_in_every_dtype():
    """Four gates of an LSTM: 2 * 4 h * (f + h) multiplications and additions per sample and step."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(12, 20, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0].sum()

    load = Workload(build_model=Net, example_inputs=lambda batch_size: {"x": torch.empty(batch_size, 5, 12)})
    for dtype in ("float32", "bfloat16"):
        graph = trace(load, dtype=dtype).graph
        (op,) = [op for op in graph.ops if "lstm" in op.target]
        assert profile_graph(graph).ops[op.id].forward_flops == graph.batch.traced_size * 5 * 2 * 80 * (12 + 20)
