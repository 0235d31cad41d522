"""`estimate`: the price of a manual layout, as a plan with everything fixed, from the same tables as the search.

What the layout leaves open follows Megatron's program (Shoeybi et al., 2019; Korthikanti et al., 2022): on the tensor axis
every matmul and look-up with weights shards its weights, attention its heads; without sequence parallelism nothing
is sharded by sequence and what crosses blocks is replicated. The choices left (column or row, ...) are the fastest.
"""

import time
from dataclasses import dataclass
from math import inf

from autopar.cluster.cluster import Cluster
from autopar.cluster.load import load_cluster
from autopar.cost.execution import ExecutionModel
from autopar.graph.blocks import cut_blocks, order_for_blocks
from autopar.graph.ir import Block, Graph
from autopar.graph.trace import trace
from autopar.inter.blocks import Blocks, Mesh, Restriction
from autopar.inter.emit import Found, build_plan
from autopar.inter.finish import Finished
from autopar.inter.planner import DTYPES, GIB, cut_bytes_of, finished, held_microbatches, pipeline_times
from autopar.inter.simulate import StageTimes, simulate
from autopar.inter.stages import StageBook
from autopar.intra.space import OpNode
from autopar.intra.tables import Allowed
from autopar.plan.errors import LayoutError, UsageError
from autopar.plan.layout import Layout, parse_layout
from autopar.plan.plan import Plan, Schedule
from autopar.rules.atoms import Atom
from autopar.rules.options import Option
from autopar.workload.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Priced:
    """A resolved layout with its stages (first, end, devices), their times, the simulated step, and whether it fits."""

    layout: Layout
    book: StageBook
    stages: tuple[tuple[int, int, int], ...]
    runs: tuple[Finished, ...]
    schedule: Schedule
    times: tuple[StageTimes, ...]
    step_time_s: float
    fits: bool


class LayoutPricer:
    """Prices layouts of one model, traced once, on one cluster; equal blocks and meshes share their tables."""

    def __init__(
        self,
        workload: Workload,
        *,
        cluster: Cluster | str,
        gpus: int,
        global_batch: int | None,
        dtype: str | None,
        memory_gib: float | None,
        optimizer: str,
    ) -> None:
        self.workload, self.gpus, self.optimizer = workload, gpus, optimizer
        self.cluster = load_cluster(cluster)
        self.global_batch = global_batch
        self.dtype = DTYPES.get(dtype or "", dtype) or self.cluster.device.default_dtype
        self.cluster.device.peak(self.dtype)
        self.graph = order_for_blocks(trace(workload, dtype=self.dtype).graph)  # type: ignore[arg-type]
        self.blocks = cut_blocks(self.graph)
        self.heads, self.kv_heads = head_counts(self.graph)
        self.budget_bytes = memory_gib * GIB if memory_gib is not None else float(self.cluster.device.memory_bytes)
        self._shared: dict[ExecutionModel, Blocks] = {}

    def price(self, layout: Layout) -> Priced:
        """Resolve and price; LayoutError lists all faults."""
        resolved = layout.resolve(self.gpus, self.global_batch, heads=self.heads, kv_heads=self.kv_heads)
        assert resolved.gbs is not None
        assert resolved.dp is not None
        if resolved.cp > 1 or resolved.ep > 1 or resolved.vpp > 1 or resolved.stages:
            raise UsageError(
                "layouts with cp, ep, vpp or stages= cannot be priced yet; use tp, pp, dp, mbs, sp, zero, recompute"
            )
        execution = ExecutionModel(
            dtype=self.dtype,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            attn=resolved.attn,
            overlap=resolved.overlap,
            fp32_grads=resolved.grads == "fp32",
        )
        if execution not in self._shared:
            self._shared[execution] = Blocks(self.graph, self.blocks, self.cluster, execution)
        mesh = Mesh(data=resolved.dp, inner=(resolved.tp,) if resolved.tp > 1 else ())
        restriction = Restriction(
            mesh=mesh,
            allowed=_megatron(self.graph, self.blocks, resolved),
            zero=resolved.zero,
            boundary=("S" if resolved.sp else "R",) * len(mesh.inner),
        )
        stages = even_stages(self.blocks, resolved.pp, self.gpus // resolved.pp)
        size = resolved.micro_batch_size
        book = StageBook(
            self._shared[execution],
            size,
            resolved.num_microbatches,
            inf,
            (resolved.recompute,),
            self.gpus,
            restriction,
        )
        schedule: Schedule = "gpipe" if resolved.schedule == "gpipe" else "1f1b"
        runs = finished(book, stages, schedule) if book.whole(resolved.mbs) else None
        if runs is None:
            raise LayoutError([f"mbs={resolved.mbs} samples per rank cannot be run by the model with these degrees"])
        times = pipeline_times(
            book, stages, runs, cut_bytes_of(self.graph, self.blocks) * size / self.graph.batch.traced
        )
        return Priced(
            layout=resolved,
            book=book,
            stages=stages,
            runs=runs,
            schedule=schedule,
            times=tuple(times),
            step_time_s=simulate(schedule, times, book.num_microbatches).step_time_s,
            fits=max(run.memory_bytes for run in runs) <= self.budget_bytes,
        )

    def plan(self, priced: Priced, seconds: float) -> Plan:
        """The whole plan of a priced layout."""
        return build_plan(
            Found(
                workload=self.workload,
                cluster=self.cluster,
                book=priced.book,
                stages=priced.stages,
                runs=priced.runs,
                held=held_microbatches(priced.book, priced.stages, priced.schedule),
                schedule=priced.schedule,
                gpus=self.gpus,
                global_batch=priced.layout.gbs or 0,
                budget_bytes=int(self.budget_bytes),
                lower_bound_s=priced.step_time_s,
                seconds=seconds,
                runner_up=None,
                times=priced.times,
                fixed=True,
            )
        )


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
    parsed = parse_layout(layout)
    pricer = LayoutPricer(
        workload,
        cluster=cluster,
        gpus=gpus,
        global_batch=global_batch or parsed.gbs or workload.global_batch,
        dtype=dtype,
        memory_gib=memory_gib,
        optimizer=optimizer,
    )
    return pricer.plan(pricer.price(parsed), time.perf_counter() - started)


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
