"""One replica that serves a model: what each of its tensor-parallel ranks runs and holds, read off the layout's
training.

The ops of a rank are those of the priced layout, each with its local sizes. With u the fewest samples at which all
sizes of the model are whole and N the traced sequence, u N tokens pass through an op; per token its rows, bytes and
exchanged bytes are 1 / (u N) of that. The head is the last op that reads a parameter; what follows is the loss and does
not run.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import ceil, gcd, lcm, prod

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.core.dtypes import ITEMSIZE
from autopar.core.layout import Layout
from autopar.core.plan import Plan
from autopar.cost.compute_time import label_sizes
from autopar.cost.fusion import NOTHING, fused_kernels
from autopar.graph.attention import AttentionCall
from autopar.graph.flops import flops_at
from autopar.graph.ir import Graph, Value
from autopar.inter.block_choice import Use, uses_of
from autopar.intra import op_metrics as om
from autopar.judge.block_redistributions import moves
from autopar.judge.judge_mesh import Mesh
from autopar.manual.layout_pricer import LayoutPricer, ModelGraph, Priced
from autopar.serving.decode_step import Attention, Exchange, Product, ServedModel, Stored, product_s, stored_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replica:
    """``unit`` is u and ``head`` the id of the head's op, as the module's docstring has them."""

    pricer: LayoutPricer
    layout: Layout
    unit: int
    head: int
    priced: Priced
    plan: Plan

    @staticmethod
    def of(model: ModelGraph, cluster: Cluster, layout: Layout, memory_gib: float | None) -> "Replica":
        graph = model.graph
        growing = {size for value in graph.values for size in value.shape if graph.batch.grows(size)}
        unit = lcm(*(graph.batch.traced // gcd(size, graph.batch.traced) for size in growing))
        pricer = LayoutPricer(
            model, cluster=cluster, gpus=layout.tp, global_batch=None, memory_gib=memory_gib, optimizer="sgd"
        )
        priced = pricer.price(_training(layout, unit))
        return Replica(
            pricer=pricer,
            layout=layout,
            unit=unit,
            head=max(op.id for op in graph.ops if any(graph.values[v].kind == "parameter" for v in op.inputs)),
            priced=priced,
            plan=pricer.plan(priced, 0.0),
        )

    @property
    def graph(self) -> Graph:
        return self.pricer.graph

    def served(self, calls: tuple[AttentionCall, ...], sequence: int, weights: Stored, kv_cache: Stored) -> ServedModel:
        """What a rank runs and holds."""
        by_op = {call.op: call for call in calls}
        skipped = {op for call in calls for op in call.moving}
        blocks = self.priced.books[0].blocks
        kernel_of = fused_kernels(self.graph, blocks.execution.software.fuses)
        tokens = self.unit * sequence
        products, attentions, traffic = [], [], []
        kernels, workspace = 0, 0.0
        for use in _uses(self.priced):
            moved: dict[int, float] = defaultdict(float)
            for at, node in enumerate(use.points.tables.space.ops):
                op, profile = node.op, self.pricer.profile.ops[node.op.id]
                if op.id > self.head or op.id in skipped or "dropout" in op.target:
                    continue
                degrees = self._degrees(use, at)
                kernels += profile.forward_kernels
                if op.id != self.head:
                    workspace = max(workspace, float(_metrics(use, at)[om.WORKSPACE]))
                if op.id in by_op:
                    attentions.append(self._attention(by_op[op.id], use, at, degrees, kv_cache))
                elif profile.forward_flops:
                    products.append(self._product(use, at, degrees, tokens, weights))
                else:
                    size = max(profile.forward_bytes - blocks.fused.get(op.id, NOTHING).forward_bytes, 0.0)
                    size /= prod(degrees.values()) * self.graph.batch.traced * sequence
                    moved[kernel_of.get(op.id, op.id)] += size
            traffic += [size for size in moved.values() if size]
        return ServedModel(
            products=tuple(products),
            attentions=tuple(attentions),
            traffic=tuple(traffic),
            exchanges=self._exchanges(tokens),
            num_kernels=kernels,
            dtype=self.pricer.dtype,
            weights_bytes=self._weights_bytes(weights),
            workspace_bytes=workspace,
            fixed_bytes=self.priced.books[0].fixed_bytes(),
        )

    def prefill(self, batch: int, sequence: int, served: ServedModel) -> tuple[tuple[tuple[str, float], ...], float]:
        """Seconds by what takes them, and FLOPs, of ``batch`` sequences; the whole square of attention counts."""
        priced = self.priced if batch == self.unit else self.pricer.price(_training(self.layout, batch))
        sums = dict.fromkeys(("matmul", "attention", "other", "exchange", "launches"), 0.0)
        flops = 0.0
        for use in _uses(priced):
            tables = use.points.tables
            busy_s = 0.0
            for at, node in enumerate(tables.space.ops):
                if node.op.id > self.head:
                    continue
                seconds = float(_metrics(use, at)[om.FORWARD] + _metrics(use, at)[om.CORE_FORWARD])
                work = flops_at(self.pricer.profile.ops[node.op.id].forward_flops, self.graph.batch, batch)
                kind = {"matmul": "matmul", "attention": "attention"}.get(node.rule.compute, "other")
                if node.op.id == self.head and work:
                    last = next(product for product in served.products if product.last)
                    seconds, work = (
                        product_s(last, batch, self.pricer.cluster.device, served.dtype)[0],
                        work // sequence,
                    )
                sums[kind] += seconds
                busy_s += seconds
                flops += work
            behind = {2 + at for at, node in enumerate(tables.space.ops) if node.op.id > self.head}
            for source, target, forward, _ in tables.edges:
                if not behind & {source, target}:
                    pair = tuple(int(use.points.choices[node, use.row, use.boundary]) for node in (source, target))
                    sums["exchange"] += float(forward[pair])
                    busy_s += float(forward[pair])
            sums["launches"] += max(tables.host_s[0] - busy_s, 0.0)
        return tuple(sums.items()), flops

    def _degrees(self, use: Use, at: int) -> dict[int, int]:
        """Label of an op -> by what the ranks divide it."""
        found: dict[int, int] = {}
        options = use.points.tables.strategies[at][use.strategy(at)]
        for option, size in zip(options, use.mesh.inner, strict=True):
            for label in option.labels[:1]:
                found[label] = found.get(label, 1) * size
        return found

    def _roles(self, use: Use, at: int, degrees: dict[int, int], *, local: bool) -> dict[str, float]:
        """Sizes of the parts of a matmul or attention at ``unit`` samples, of a rank or whole."""
        node = use.points.tables.space.ops[at]
        options = use.points.tables.strategies[at][use.strategy(at)]
        twins = {label: degrees[o.labels[0]] for o in options for label in o.labels}
        sizes = label_sizes(self.graph, node.op, node.rule, self.unit)
        found: dict[str, float] = {}
        for label, role in node.rule.roles:
            size = ceil(sizes.get(label, 1) / (twins.get(label, 1) if local else 1))
            found[role] = found.get(role, 1.0) * size
        return found

    def _product(self, use: Use, at: int, degrees: dict[int, int], tokens: int, weights: Stored) -> Product:
        """A matmul; one without a rule is a square product of its FLOPs."""
        node = use.points.tables.space.ops[at]
        flops = float(flops_at(self.pricer.profile.ops[node.op.id].forward_flops, self.graph.batch, self.unit))
        weight = next((self.graph.values[node.op.inputs[i]] for i in node.parameters), None)
        if not node.rule.roles:
            size = (flops / 2 / prod(degrees.values())) ** (1 / 3)
            return Product(rows_per_token=size / tokens, n=size, k=size, matrices=1.0, weight_bytes=0.0)
        here, whole = (self._roles(use, at, degrees, local=local) for local in (True, False))
        scale = flops / (2.0 * prod(whole.values()))
        rows = scale * here.get("b", 1.0) * here.get("m", 1.0)
        return Product(
            rows_per_token=rows / tokens,
            n=here.get("n", 1.0),
            k=here.get("k", 1.0),
            matrices=here.get("b", 1.0) if weight is not None else 1.0,
            weight_bytes=0.0 if weight is None else self._stored(weight, weights),
            last=node.op.id == self.head,
        )

    def _attention(
        self, call: AttentionCall, use: Use, at: int, degrees: dict[int, int], kv_cache: Stored
    ) -> Attention:
        """Query and key heads are cut alike."""
        here, whole = (self._roles(use, at, degrees, local=local).get("h", 1.0) for local in (True, False))
        elements = (call.key_elements + call.value_elements) * here / whole
        return Attention(
            heads=call.heads * here / whole,
            head_dim=call.head_dim,
            cache_bytes_per_token=elements * stored_bytes(kv_cache, ITEMSIZE[self.pricer.dtype]),
        )

    def _exchanges(self, tokens: int) -> tuple[Exchange, ...]:
        """The collectives of a forward pass, their bytes per token."""
        graph, stage = self.graph, self.plan.stages[0]
        free = graph.parameter_free()
        mesh = Mesh(self.pricer.cluster, tuple(axis.size for axis in stage.axes), stage.first_device)
        firsts = self.priced.books[0].blocks.kinds
        by_program: dict[str, tuple[Exchange, ...]] = {}
        found: list[Exchange] = []
        for ref in stage.blocks:
            if ref.program not in by_program:
                program = self.plan.program(ref.program)
                moved = moves(graph, firsts[program.kind], program, mesh, self.unit, free)
                by_program[ref.program] = tuple(
                    Exchange(kind=step.kind, bytes_per_token=step.num_bytes / tokens, group=mesh.group(step.axes))
                    for route in moved.forward
                    for step in route.steps
                    if step.kind != "ring" and step.kind != "send"
                )
            found += by_program[ref.program]
        return tuple(found)

    def _weights_bytes(self, weights: Stored) -> float:
        book, total = self.priced.books[0], 0.0
        for use in _uses(self.priced):
            seen = set(book.columns[use.column][1])
            for at, of_op in enumerate(use.points.tables.parameter_uses):
                for value, per_strategy in of_op:
                    if value.id not in seen:
                        seen.add(value.id)
                        total += per_strategy[use.strategy(at)][0] * self._stored(value, weights)
        return total

    def _stored(self, value: Value, weights: Stored) -> float:
        """Bytes an element: matrices that only matmuls other than the head read may be quantised."""
        readers = [op for op in self.graph.ops if value.id in op.inputs]
        plain = len(value.shape) < 2 or any(op.id == self.head or "embedding" in op.target for op in readers)
        return float(value.itemsize) if plain else stored_bytes(weights, value.itemsize)


def _training(layout: Layout, batch: int) -> Layout:
    return Layout(tp=layout.tp, dp=1, mbs=batch, gbs=batch, fusion=layout.fusion, grads="same")


def _uses(priced: Priced) -> list[Use]:
    cut = priced.cuts[0]
    return uses_of(priced.books[0], priced.runs[0].choice, cut.first, cut.end)


def _metrics(use: Use, at: int) -> NDArray[np.float64]:
    """The metrics of a block's op ``at`` under its strategy."""
    return use.points.tables.node_metrics[2 + at][use.strategy(at)]
