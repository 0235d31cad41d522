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
from autopar.cost.fusion import NO_SAVINGS, fused_kernel_of
from autopar.graph.attention import AttentionCall
from autopar.graph.flops import flops_at_batch
from autopar.graph.ir import Graph, Value
from autopar.inter.block_choice import BlockChoice, block_choices
from autopar.intra import op_metrics as om
from autopar.judge.block_redistributions import find_redistributions
from autopar.judge.judge_mesh import JudgeMesh
from autopar.manual.layout_pricer import LayoutPricer, PricedLayout, TracedModel
from autopar.serving.decode_step import (
    CachedAttention,
    DecodeCollective,
    DecodeMatmul,
    ServedModel,
    StorageFormat,
    bytes_per_element,
    matmul_time,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replica:
    """``unit`` is u and ``head`` the id of the head's op, as the module's docstring has them."""

    pricer: LayoutPricer
    layout: Layout
    min_batch: int
    head_op: int
    priced: PricedLayout
    plan: Plan

    @staticmethod
    def of(model: TracedModel, cluster: Cluster, layout: Layout, memory_gib: float | None) -> "Replica":
        graph = model.graph
        growing = {size for value in graph.values for size in value.shape if graph.batch.is_proportional(size)}
        unit = lcm(*(graph.batch.traced_size // gcd(size, graph.batch.traced_size) for size in growing))
        pricer = LayoutPricer(
            model, cluster=cluster, gpus=layout.tp, global_batch=None, memory_gib=memory_gib, optimizer="sgd"
        )
        priced = pricer.price(_training_layout(layout, unit))
        return Replica(
            pricer=pricer,
            layout=layout,
            min_batch=unit,
            head_op=max(op.id for op in graph.ops if any(graph.values[v].kind == "parameter" for v in op.inputs)),
            priced=priced,
            plan=pricer.plan(priced, 0.0),
        )

    @property
    def graph(self) -> Graph:
        return self.pricer.graph

    def served_model(
        self,
        calls: tuple[AttentionCall, ...],
        sequence: int,
        weight_storage: StorageFormat,
        kv_cache_storage: StorageFormat,
    ) -> ServedModel:
        """What a rank runs and holds."""
        by_op = {call.op_id: call for call in calls}
        skipped = {op for call in calls for op in call.repeat_ops}
        blocks = self.priced.stage_costs[0].pricer
        kernel_of = fused_kernel_of(self.graph, blocks.execution.software.fuses)
        tokens = self.min_batch * sequence
        products, attentions, traffic = [], [], []
        kernels, workspace = 0, 0.0
        for use in _block_choices(self.priced):
            moved: dict[int, float] = defaultdict(float)
            for at, node in enumerate(use.frontier.tables.space.ops):
                op, profile = node.op, self.pricer.profile.ops[node.op.id]
                if op.id > self.head_op or op.id in skipped or "dropout" in op.target:
                    continue
                degrees = self._shard_degrees(use, at)
                kernels += profile.forward_kernels
                if op.id != self.head_op:
                    workspace = max(workspace, float(_op_metrics(use, at)[om.WORKSPACE]))
                if op.id in by_op:
                    attentions.append(self._attention(by_op[op.id], use, at, degrees, kv_cache_storage))
                elif profile.forward_flops:
                    products.append(self._matmul(use, at, degrees, tokens, weight_storage))
                else:
                    size = max(profile.forward_bytes - blocks.fusion_savings.get(op.id, NO_SAVINGS).forward_bytes, 0.0)
                    size /= prod(degrees.values()) * self.graph.batch.traced_size * sequence
                    moved[kernel_of.get(op.id, op.id)] += size
            traffic += [size for size in moved.values() if size]
        return ServedModel(
            matmuls=tuple(products),
            attentions=tuple(attentions),
            kernel_bytes_per_token=tuple(traffic),
            collectives=self._collectives(tokens),
            num_kernels=kernels,
            dtype=self.pricer.dtype,
            weights_bytes=self._weights_bytes(weight_storage),
            workspace_bytes=workspace,
            fixed_bytes=self.priced.stage_costs[0].pricing.fixed_bytes,
        )

    def prefill(self, batch: int, sequence: int, served: ServedModel) -> tuple[tuple[tuple[str, float], ...], float]:
        """Seconds by what takes them, and FLOPs, of ``batch`` sequences; the whole square of attention counts."""
        priced = self.priced if batch == self.min_batch else self.pricer.price(_training_layout(self.layout, batch))
        sums = dict.fromkeys(("matmul", "attention", "other", "exchange", "launches"), 0.0)
        flops = 0.0
        for use in _block_choices(priced):
            tables = use.frontier.tables
            busy_s = 0.0
            for at, node in enumerate(tables.space.ops):
                if node.op.id > self.head_op:
                    continue
                seconds = float(_op_metrics(use, at)[om.FORWARD] + _op_metrics(use, at)[om.SELECTIVE_FORWARD])
                work = flops_at_batch(self.pricer.profile.ops[node.op.id].forward_flops, self.graph.batch, batch)
                kind = {"matmul": "matmul", "attention": "attention"}.get(node.rule.compute, "other")
                if node.op.id == self.head_op and work:
                    last = next(product for product in served.matmuls if product.last_token_only)
                    seconds, work = (
                        matmul_time(last, batch, self.pricer.cluster.device, served.dtype)[0],
                        work // sequence,
                    )
                sums[kind] += seconds
                busy_s += seconds
                flops += work
            behind = {2 + at for at, node in enumerate(tables.space.ops) if node.op.id > self.head_op}
            for source, target, forward, _ in tables.edges:
                if not behind & {source, target}:
                    pair = tuple(int(use.frontier.choices[node, use.row, use.boundary]) for node in (source, target))
                    sums["exchange"] += float(forward[pair])
                    busy_s += float(forward[pair])
            sums["launches"] += max(tables.launch_s[0] - busy_s, 0.0)
        return tuple(sums.items()), flops

    def _shard_degrees(self, choice: BlockChoice, op_index: int) -> dict[int, int]:
        """Label of an op -> by what the ranks divide it."""
        found: dict[int, int] = {}
        options = choice.frontier.tables.strategies[op_index][choice.strategy(op_index)]
        for option, size in zip(options, choice.mesh.inner_sizes, strict=True):
            for label in option.labels[:1]:
                found[label] = found.get(label, 1) * size
        return found

    def _role_sizes(
        self, choice: BlockChoice, op_index: int, shard_degrees: dict[int, int], *, local: bool
    ) -> dict[str, float]:
        """Sizes of the parts of a matmul or attention at ``unit`` samples, of a rank or whole."""
        node = choice.frontier.tables.space.ops[op_index]
        options = choice.frontier.tables.strategies[op_index][choice.strategy(op_index)]
        twins = {label: shard_degrees[o.labels[0]] for o in options for label in o.labels}
        sizes = label_sizes(self.graph, node.op, node.rule, self.min_batch)
        found: dict[str, float] = {}
        for label, role in node.rule.roles:
            size = ceil(sizes.get(label, 1) / (twins.get(label, 1) if local else 1))
            found[role] = found.get(role, 1.0) * size
        return found

    def _matmul(
        self,
        choice: BlockChoice,
        op_index: int,
        shard_degrees: dict[int, int],
        tokens: int,
        weight_storage: StorageFormat,
    ) -> DecodeMatmul:
        """A matmul; one without a rule is a square product of its FLOPs."""
        node = choice.frontier.tables.space.ops[op_index]
        flops = float(
            flops_at_batch(self.pricer.profile.ops[node.op.id].forward_flops, self.graph.batch, self.min_batch)
        )
        weight = next((self.graph.values[node.op.inputs[i]] for i in node.parameter_inputs), None)
        if not node.rule.roles:
            size = (flops / 2 / prod(shard_degrees.values())) ** (1 / 3)
            return DecodeMatmul(rows_per_token=size / tokens, n=size, k=size, num_matrices=1.0, weight_itemsize=0.0)
        here, whole = (self._role_sizes(choice, op_index, shard_degrees, local=local) for local in (True, False))
        scale = flops / (2.0 * prod(whole.values()))
        rows = scale * here.get("b", 1.0) * here.get("m", 1.0)
        return DecodeMatmul(
            rows_per_token=rows / tokens,
            n=here.get("n", 1.0),
            k=here.get("k", 1.0),
            num_matrices=here.get("b", 1.0) if weight is not None else 1.0,
            weight_itemsize=0.0 if weight is None else self._bytes_per_element(weight, weight_storage),
            last_token_only=node.op.id == self.head_op,
        )

    def _attention(
        self,
        call: AttentionCall,
        choice: BlockChoice,
        op_index: int,
        shard_degrees: dict[int, int],
        kv_cache_storage: StorageFormat,
    ) -> CachedAttention:
        """Query and key heads are cut alike."""
        here, whole = (
            self._role_sizes(choice, op_index, shard_degrees, local=local).get("h", 1.0) for local in (True, False)
        )
        elements = (call.key_elements_per_token + call.value_elements_per_token) * here / whole
        return CachedAttention(
            num_heads=call.heads * here / whole,
            head_dim=call.head_dim,
            cache_bytes_per_token=elements * bytes_per_element(kv_cache_storage, ITEMSIZE[self.pricer.dtype]),
        )

    def _collectives(self, tokens: int) -> tuple[DecodeCollective, ...]:
        """The collectives of a forward pass, their bytes per token."""
        graph, stage = self.graph, self.plan.stages[0]
        free = graph.parameter_free()
        mesh = JudgeMesh(self.pricer.cluster, tuple(axis.size for axis in stage.axes), stage.first_device)
        firsts = self.priced.stage_costs[0].pricer.first_of_kind
        by_program: dict[str, tuple[DecodeCollective, ...]] = {}
        found: list[DecodeCollective] = []
        for ref in stage.blocks:
            if ref.program not in by_program:
                program = self.plan.program(ref.program)
                moved = find_redistributions(graph, firsts[program.kind], program, mesh, self.min_batch, free)
                by_program[ref.program] = tuple(
                    DecodeCollective(
                        kind=step.kind, bytes_per_token=step.num_bytes / tokens, group=mesh.group(step.axes)
                    )
                    for route in moved.forward_paths
                    for step in route.collectives
                    if step.kind != "ring" and step.kind != "send"
                )
            found += by_program[ref.program]
        return tuple(found)

    def _weights_bytes(self, weight_storage: StorageFormat) -> float:
        book, total = self.priced.stage_costs[0], 0.0
        for use in _block_choices(self.priced):
            seen = set(book.variants[use.variant][1])
            for at, of_op in enumerate(use.frontier.tables.parameter_uses):
                for value, per_strategy in of_op:
                    if value.id not in seen:
                        seen.add(value.id)
                        total += per_strategy[use.strategy(at)][0] * self._bytes_per_element(value, weight_storage)
        return total

    def _bytes_per_element(self, value: Value, weight_storage: StorageFormat) -> float:
        """Bytes an element: matrices that only matmuls other than the head read may be quantised."""
        readers = [op for op in self.graph.ops if value.id in op.inputs]
        plain = len(value.shape) < 2 or any(op.id == self.head_op or "embedding" in op.target for op in readers)
        return float(value.itemsize) if plain else bytes_per_element(weight_storage, value.itemsize)


def _training_layout(layout: Layout, batch: int) -> Layout:
    return Layout(tp=layout.tp, dp=1, mbs=batch, gbs=batch, fusion=layout.fusion, grads="same")


def _block_choices(priced: PricedLayout) -> list[BlockChoice]:
    cut = priced.stages[0]
    return block_choices(priced.stage_costs[0].frontiers, priced.prices[0].choice, cut.first_block, cut.end_block)


def _op_metrics(choice: BlockChoice, op_index: int) -> NDArray[np.float64]:
    """The metrics of a block's op ``at`` under its strategy."""
    return choice.frontier.tables.node_metrics[2 + op_index][choice.strategy(op_index)]
