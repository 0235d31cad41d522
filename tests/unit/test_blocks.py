"""Blocks: where models are split, which blocks are equal, and what crosses between them."""

import dataclasses
import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.graph.boundary_values import boundary_values
from autopar.graph.ir import Block, Graph, Op
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.workload import Workload
from tests.conftest import example_workload

torch.set_num_threads(1)
TINY = {"hidden": 32, "heads": 4, "vocab": 64, "seq": 16}


def example(name: str, **settings: object) -> Graph:
    return trace(example_workload(name, **settings), dtype="bfloat16").graph


def of_module(build: type[nn.Module], *shape: int) -> Graph:
    load = Workload(
        build_model=build,
        example_inputs=lambda batch_size: {"x": torch.empty(batch_size, *shape)},
        loss_fn=lambda output, _: output.sum(),
    )
    return trace(load, dtype="float32").graph


def kinds(blocks: tuple[Block, ...]) -> list[int]:
    return [block.kind for block in blocks]


def names(blocks: tuple[Block, ...]) -> list[str]:
    return [block.name for block in blocks]


def check(graph: Graph, blocks: tuple[Block, ...]) -> None:
    """What is true of any split: blocks cover the ops in order, and inputs, outputs and crossings are what is read."""
    assert [block.first_op for block in blocks] == [0, *(block.end_op for block in blocks[:-1])]
    assert blocks[-1].end_op == len(graph.ops)
    assert [op.id for op in graph.ops] == list(range(len(graph.ops)))
    maker = {value: block.index for block in blocks for op in ops(graph, block) for value in op.outputs}
    for block in blocks:
        read = {value for op in ops(graph, block) for value in op.inputs if maker.get(value) != block.index}
        assert {*block.inputs, *block.parameters} == read
        assert all(graph.values[value].kind in ("parameter", "buffer") for value in block.parameters)
        assert not any(graph.values[value].kind in ("parameter", "buffer") for value in block.inputs)
        assert all(maker.get(value, -1) < block.index for value in block.inputs)
        read_later = {value for other in blocks if other.index != block.index for value in other.inputs}
        leaving = (read_later | set(graph.outputs)) & {value for op in ops(graph, block) for value in op.outputs}
        assert set(block.outputs) == leaving
    for boundary, values in enumerate(boundary_values(graph, blocks)):
        after = {value for block in blocks[boundary + 1 :] for value in block.inputs}
        assert set(values) == {value for value in after if maker.get(value, len(blocks)) <= boundary}


def ops(graph: Graph, block: Block) -> tuple[Op, ...]:
    return graph.ops[block.first_op : block.end_op]


@pytest.fixture(scope="module")
def gpt() -> Graph:
    return example("gpt", layers=12, **TINY)


def test_gpt_is_an_embedding_twelve_equal_layers_and_a_head(gpt: Graph) -> None:
    blocks = split_into_blocks(gpt)
    assert names(blocks) == ["embedding", *(f"layers.{i}" for i in range(12)), "head"]
    assert kinds(blocks) == [0, *(1,) * 12, 2]
    assert hoist_light_ops(gpt) is gpt
    check(gpt, blocks)
    assert [len(values) for values in boundary_values(gpt, blocks)] == [1] * 13


def test_values_of_equal_blocks_correspond(gpt: Graph) -> None:
    layers = split_into_blocks(gpt)[1:-1]
    for layer in layers:
        named = [gpt.values[value].name.removeprefix(layer.name) for value in layer.parameters]
        assert named == [gpt.values[value].name.removeprefix("layers.0") for value in layers[0].parameters]
    for earlier, later in itertools.pairwise(layers):
        assert earlier.outputs == later.inputs


def test_kinds_do_not_grow_with_depth_and_time_grows_linearly(gpt: Graph) -> None:
    deep = example("gpt", layers=96, **TINY)
    begin = time.process_time()
    blocks = split_into_blocks(hoist_light_ops(deep))
    assert time.process_time() - begin < 1.0
    assert kinds(blocks) == [0, *(1,) * 96, 2]
    short = split_into_blocks(gpt)
    assert [len(ops(deep, blocks[i])) for i in (0, 1, -1)] == [len(ops(gpt, short[i])) for i in (0, 1, -1)]


def test_untied_and_tied_heads_differ_in_what_the_head_reads() -> None:
    tied = split_into_blocks(example("gpt", layers=2, **TINY, tied_embeddings=True))
    untied = split_into_blocks(example("gpt", layers=2, **TINY, tied_embeddings=False))
    assert set(tied[0].parameters) & set(tied[-1].parameters)
    assert not set(untied[0].parameters) & set(untied[-1].parameters)


def test_llama_layers_are_equal() -> None:
    graph = hoist_light_ops(example("llama", size="8B", layers=4, kv_heads=2, ffn=48, **TINY))
    blocks = split_into_blocks(graph)
    assert names(blocks) == ["embedding", *(f"model.layers.{i}" for i in range(4)), "head"]
    assert kinds(blocks) == [0, 1, 1, 1, 1, 2]
    check(graph, blocks)


def test_moe_every_second_layer_gives_two_kinds_of_layers() -> None:
    graph = example("moe", layers=6, experts=4, group_size=16, **TINY)
    blocks = split_into_blocks(graph)
    assert len(blocks) == 8
    layers = kinds(blocks)[1:-1]
    assert layers == [layers[0], layers[1]] * 3
    assert layers[0] != layers[1]
    check(graph, blocks)


def test_wide_resnet_is_split_at_residual_units_not_at_stages_or_convolutions() -> None:
    graph = example("wide_resnet", layers=50, base_channels=16, width_factor=2, image_size=64)
    blocks = split_into_blocks(graph)
    sizes = {f"stages.{stage}.{unit}" for stage, units in enumerate((3, 4, 6, 3)) for unit in range(units)}
    assert names(blocks)[0] == "embedding"
    assert names(blocks)[-1] == "head"
    assert set(names(blocks)[1:-1]) == sizes
    # In each stage the first unit is its own kind, the others are one kind.
    stage_kinds = [[block.kind for block in blocks if block.name.startswith(f"stages.{i}.")] for i in range(4)]
    assert all(len(set(stage[1:])) == 1 and stage[0] != stage[1] for stage in stage_kinds)
    check(graph, blocks)


def test_t5_has_two_containers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=4, vocab_size=64, decoder_start_token_id=0, use_cache=False
    )
    load = Workload(
        build_model=lambda: transformers.T5ForConditionalGeneration(config),
        example_inputs=lambda batch_size: {
            name: torch.empty(batch_size, 8, dtype=torch.long) for name in ("input_ids", "labels")
        },
    )
    graph = hoist_light_ops(trace(load, dtype="float32").graph)
    blocks = split_into_blocks(graph)
    expected = [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(4)]
    assert [name for name in names(blocks) if "block" in name] == expected
    by_name = {block.name: block.kind for block in blocks}
    assert by_name["encoder.block.1"] == by_name["encoder.block.2"] != by_name["decoder.block.1"]
    assert by_name["decoder.block.1"] == by_name["decoder.block.2"] == by_name["decoder.block.3"]
    assert len(set(kinds(blocks))) <= 7
    check(graph, blocks)


class Layer(nn.Module):
    def __init__(self, slope: float = 0.1, swap: bool = False) -> None:
        super().__init__()
        self.slope, self.swap = slope, swap
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        one, two = F.leaky_relu(self.one(x), self.slope), self.two(x)
        return two - one if self.swap else one - two


def stack(*layers: Layer) -> type[nn.Module]:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(type(layer)(layer.slope, layer.swap) for layer in layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    return Stack


def test_an_attribute_or_an_edge_makes_another_kind() -> None:
    # All six layers run the same ops on the same shapes.
    build = stack(Layer(), Layer(), Layer(slope=0.2), Layer(), Layer(swap=True), Layer())
    by_name = {block.name: block.kind for block in split_into_blocks(of_module(build, 8))}
    assert by_name["layers.1"] == by_name["layers.3"]
    assert by_name["layers.2"] not in (by_name["layers.1"], by_name["layers.4"])
    assert by_name["layers.4"] != by_name["layers.1"]


def test_a_frozen_or_shared_weight_makes_another_kind() -> None:
    graph = of_module(stack(*(Layer() for _ in range(5))), 8)
    before = {block.name: block.kind for block in split_into_blocks(graph)}
    assert before["layers.1"] == before["layers.2"] == before["layers.3"]
    frozen = next(value for value in graph.values if value.name == "layers.2.one.weight")
    values = list(graph.values)
    values[frozen.id] = dataclasses.replace(frozen, requires_grad=False)
    after = {block.name: block.kind for block in split_into_blocks(dataclasses.replace(graph, values=tuple(values)))}
    assert after["layers.1"] == after["layers.3"] != after["layers.2"]
    values[frozen.id] = dataclasses.replace(frozen, qualified_names=("layers.2.one.weight", "other.weight"))
    tied = {block.name: block.kind for block in split_into_blocks(dataclasses.replace(graph, values=tuple(values)))}
    assert tied["layers.1"] == tied["layers.3"] != tied["layers.2"]


class Recalled(nn.Module):
    """One layer called four times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.layers[0](x)
        return x


def test_a_second_call_of_a_layer_begins_a_new_block() -> None:
    graph = of_module(Recalled, 8)
    blocks = split_into_blocks(graph)
    assert [name for name in names(blocks) if name.startswith("layers")] == [
        "layers.0", "layers.0#2", "layers.0#3", "layers.0#4",
    ]  # fmt: skip
    check(graph, blocks)


class Masked(nn.Module):
    """A mask made anew between the layers, by the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in (1, 4):
                x = x * (torch.arange(8) > index)
        return x


def test_light_ops_without_gradient_move_to_the_front() -> None:
    graph = of_module(Masked, 8)
    ordered = hoist_light_ops(graph)
    assert ordered is not graph
    assert sorted(op.name for op in ordered.ops) == sorted(op.name for op in graph.ops)
    made: set[int] = {value.id for value in graph.values if value.kind != "activation"}
    for op in ordered.ops:
        assert made.issuperset(op.inputs)
        made.update(op.outputs)
    blocks = split_into_blocks(ordered)
    assert blocks[0].name == "embedding"
    assert any("arange" in op.target for op in ops(ordered, blocks[0]))
    assert not any("arange" in op.target for block in blocks[1:] for op in ops(ordered, block))
    check(ordered, blocks)


class Flat(nn.Module):
    """Written by hand, no container: a wide point inside every pair of matmuls, a narrow one between."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(20):
            setattr(self, f"up{index}", nn.Parameter(torch.empty(8, 64)))
            setattr(self, f"down{index}", nn.Parameter(torch.empty(64, 8)))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(20):
            x = torch.relu(x @ getattr(self, f"up{index}")) @ getattr(self, f"down{index}")
        return x


def test_a_flat_model_is_split_at_narrow_points_into_balanced_parts() -> None:
    graph = of_module(Flat, 8)
    blocks = split_into_blocks(graph)
    check(graph, blocks)
    assert 8 <= len(blocks) <= 16
    matmuls = [sum("matmul" in op.target for op in ops(graph, block)) for block in blocks]
    assert max(matmuls) <= 6
    assert min(matmuls) >= 1
    narrow = [graph.values[value].shape[-1] for values in boundary_values(graph, blocks) for value in values]
    assert narrow.count(8) == len(narrow)
