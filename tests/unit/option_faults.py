"""Every sharding option of a traced model, checked by the brute force of ``rule_oracle``."""

import torch
from torch import Tensor

from autopar.graph.ir import hashable_literal
from autopar.graph.split_into_blocks import split_into_blocks
from autopar.graph.trace import TracedGraph
from autopar.intra.block_space import build_block_space
from tests.unit.rule_oracle import WIDE, Case, call, check_option, ranks_to_try


def real_values(traced: TracedGraph) -> dict[int, Tensor]:
    """Random weights and inputs, and everything computed from them by the graph, in fp64."""
    graph = traced.graph
    generator = torch.Generator().manual_seed(0)
    known: dict[int, Tensor] = {}
    for value in graph.values:
        if value.kind == "activation":
            continue
        if value.kind == "constant" and value.name in traced.constants:
            tensor = traced.constants[value.name]
            known[value.id] = tensor.to(WIDE) if tensor.is_floating_point() else tensor
        elif value.dtype.startswith(("float", "bfloat")):
            known[value.id] = torch.randn(value.shape, generator=generator, dtype=WIDE) * 0.5 + (value.kind == "buffer")
        elif value.kind == "buffer":
            known[value.id] = torch.arange(value.shape[-1] if value.shape else 1).remainder(2).expand(value.shape or 1)
        else:
            known[value.id] = torch.randint(0, 2, value.shape, generator=generator)
    for op in graph.ops:
        with torch.no_grad():
            for value, result in zip(op.outputs, call(op, [known[i] for i in op.inputs]), strict=True):
                known[value] = result
    return known


def wrong_options(traced: TracedGraph) -> tuple[list[str], set[str], int]:
    """What is wrong with each wrong option, the targets without a rule, and how many options were tried."""
    graph = traced.graph
    known = real_values(traced)
    data = graph.parameter_free()
    faults, seen, unknown, tried, kinds = [], set(), set(), 0, set()
    for block in split_into_blocks(graph):
        if block.kind in kinds:
            continue
        kinds.add(block.kind)
        for node in build_block_space(graph, block, data).ops:
            op = node.op
            if not node.rule.is_known:
                unknown.add(op.target)
            inputs = tuple(graph.values[value] for value in op.inputs)
            types = tuple((value.shape, value.dtype, value.requires_grad) for value in inputs)
            case = Case(
                op=op,
                inputs=inputs,
                outputs=tuple(graph.values[value] for value in op.outputs),
                tensors=tuple(known[value] for value in op.inputs),
            )
            for option in node.options:
                for ranks in ranks_to_try(option, node.rule):
                    key = (op.target, hashable_literal(op.args), hashable_literal(op.kwargs), types, option, ranks)
                    if key in seen:
                        continue
                    seen.add(key)
                    tried += 1
                    if wrong := check_option(case, option, node.rule, ranks):
                        faults.append(f"{op.name} {op.target} {op.args} {types} over {ranks}: {option}: {wrong}")
    return faults, unknown, tried
