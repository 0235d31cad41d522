"""`estimate`: the price of a manual layout, as a plan with everything fixed, from the same tables as the search.

What the layout leaves open follows Megatron's program (Shoeybi et al., 2019; Korthikanti et al., 2022): on the tensor axis
every matmul and look-up with weights shards its weights, attention its heads; without sequence parallelism nothing
is sharded by sequence and what crosses blocks is replicated. The choices left (column or row, ...) are the fastest.
"""

import time
from math import inf

import numpy as np

from autopar.cluster.cluster import Cluster
from autopar.cluster.load import load_cluster
from autopar.cost.execution import ExecutionModel
from autopar.graph.blocks import cut_blocks, order_for_blocks
from autopar.graph.ir import Block, Graph
from autopar.graph.trace import trace
from autopar.inter.emit import Found, build_plan
from autopar.inter.planner import DTYPES, GIB, cut_bytes_of, pipeline_times
from autopar.inter.simulate import simulate
from autopar.inter.stages import Blocks, Mesh, Restriction, StageBook
from autopar.intra.space import OpNode
from autopar.intra.tables import Allowed
from autopar.plan.errors import LayoutError, UsageError
from autopar.plan.layout import Layout, parse_layout
from autopar.plan.plan import Plan
from autopar.rules.atoms import Atom
from autopar.rules.options import Option
from autopar.workload.workload import Workload


def estimate(
    workload: Workload,
    *,
    cluster: Cluster | str = "dgx-h100",
    gpus: int,
    layout: str,
    global_batch: int | None = None,
    dtype: str | None = None,
    memory_gib: float | None = None,
    optimizer: str = "adamw",
) -> Plan:
    """The plan of one layout, priced; memory never makes it fail (``estimate.fits`` says). LayoutError lists all faults."""
    started = time.perf_counter()
    machine = load_cluster(cluster)
    parsed = parse_layout(layout)
    batch = global_batch or parsed.gbs or workload.global_batch
    long = DTYPES.get(dtype or "", dtype) or machine.device.default_dtype
    machine.device.peak(long)
    graph = order_for_blocks(trace(workload, dtype=long).graph)  # type: ignore[arg-type]
    blocks = cut_blocks(graph)
    heads, kv_heads = head_counts(graph)
    resolved = parsed.resolve(gpus, batch, heads=heads, kv_heads=kv_heads)
    assert resolved.gbs is not None
    assert resolved.dp is not None
    if resolved.cp > 1 or resolved.ep > 1 or resolved.vpp > 1 or resolved.stages:
        raise UsageError(
            "layouts with cp, ep, vpp or stages= cannot be priced yet; use tp, pp, dp, mbs, sp, zero, recompute"
        )
    execution = ExecutionModel(
        dtype=long,
        optimizer=optimizer,  # type: ignore[arg-type]
        attn=resolved.attn,
        overlap=resolved.overlap,
        fp32_grads=resolved.grads == "fp32",
    )
    stages = even_stages(blocks, resolved.pp, gpus // resolved.pp)
    mesh = Mesh(data=resolved.dp, inner=(resolved.tp,) if resolved.tp > 1 else ())
    restriction = Restriction(
        mesh=mesh,
        allowed=_megatron(graph, blocks, resolved),
        zero=resolved.zero,
        boundary=("S" if resolved.sp else "R",) * len(mesh.inner),
    )
    book = StageBook(
        Blocks(graph, blocks, machine, execution),
        resolved.micro_batch_size,
        resolved.num_microbatches,
        inf,
        (resolved.recompute,),
        restriction,
    )
    cut_bytes = cut_bytes_of(graph, blocks) * resolved.micro_batch_size / graph.batch.traced
    schedule = "gpipe" if resolved.schedule == "gpipe" else "1f1b"
    if not all(np.isfinite(book.costs(n, 1).forward_s[int(book.type_of[i, j])]) for i, j, n in stages):
        raise LayoutError([f"a block of the model cannot be run as {resolved}; its samples per rank may not divide"])
    times = pipeline_times(book, stages, schedule, cut_bytes)  # type: ignore[arg-type]
    step_s = simulate(schedule, times, book.num_microbatches).step_time_s  # type: ignore[arg-type]
    budget = memory_gib * GIB if memory_gib is not None else float(machine.device.memory_bytes)
    return build_plan(
        Found(
            workload=workload,
            cluster=machine,
            book=book,
            stages=stages,
            schedule=schedule,  # type: ignore[arg-type]
            gpus=gpus,
            global_batch=resolved.gbs,
            budget_bytes=int(budget),
            lower_bound_s=step_s,
            seconds=time.perf_counter() - started,
            runner_up=None,
            times=times,
            fixed=True,
        )
    )


def head_counts(graph: Graph) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query and key/value head counts of the model's attentions."""
    heads, kv_heads = set(), set()
    for op in graph.ops:
        if "scaled_dot_product" in op.target:
            heads.add(graph.values[op.inputs[0]].shape[-3])
            kv_heads.add(graph.values[op.inputs[1]].shape[-3])
    return tuple(sorted(heads)), tuple(sorted(kv_heads))


def even_stages(blocks: tuple[Block, ...], num_stages: int, devices: int) -> tuple[tuple[int, int, int], ...]:
    """(first, end, devices): layers as even as possible, earlier stages take what is left over; the embedding stays
    with the first stage and the head with the last."""
    first = 1 if blocks[0].name == "embedding" else 0
    last = len(blocks) - (1 if blocks[-1].name == "head" else 0)
    if last - first < num_stages:
        raise LayoutError([f"pp={num_stages} is more than the {last - first} layers of the model"])
    share, rest = divmod(last - first, num_stages)
    ends = [first + share * (at + 1) + min(at + 1, rest) for at in range(num_stages)]
    ends[-1] = len(blocks)
    return tuple((begin, end, devices) for begin, end in zip([0, *ends], ends, strict=False))


def _megatron(graph: Graph, blocks: tuple[Block, ...], layout: Layout) -> Allowed:
    shapes = [graph.values[value].shape for block in blocks for value in block.inputs]
    sequences = {shape[1] for shape in shapes if len(shape) == 3}

    def by_sequence(node: OpNode, option: Option) -> bool:
        tensors = zip((*node.op.inputs, *node.op.outputs), (*option.inputs, *option.outputs), strict=True)
        return any(
            isinstance(token, Atom)
            and token.size in sequences
            and graph.values[value].kind == "activation"
            and (token.dim == 1 or token.repeats > 1)
            and len(graph.values[value].shape) < 4
            for value, token in tensors
        )

    def shards_weights(node: OpNode, option: Option) -> bool:
        weights = [i for i in node.parameters if len(graph.values[node.op.inputs[i]].shape) > 1]
        tokens = [option.inputs[i] for i in weights]
        if node.op.target.startswith("aten.embedding"):
            return any(isinstance(token, Atom) and token.dim == 0 for token in tokens)
        return any(isinstance(token, Atom) for token in tokens)

    def allowed(axis: int, node: OpNode, option: Option) -> bool:
        if option.sharded and graph.batch.grows(option.size):
            return False
        if node.rule.compute == "matmul" and node.parameters and any(shards_weights(node, o) for o in node.options):
            return shards_weights(node, option)
        if node.rule.compute == "attention":
            return "h" in {dict(node.rule.roles).get(label) for label in option.labels}
        return layout.sp or not by_sequence(node, option)

    return allowed
