"""One replica that serves a model: the tensor-parallel group whose ops and shards are those of a training layout.

With u the fewest samples at which every size of the model is an integer and N the traced sequence, u N tokens pass
through an op; per token its rows, bytes and communicated bytes are 1 / (u N) of that. The head is the last op that reads
a parameter; what follows it is the loss and does not run.
"""

from dataclasses import dataclass
from math import gcd, lcm

from autopar.cluster.cluster import Cluster
from autopar.core.layout import Layout
from autopar.core.plan import Plan
from autopar.core.request import StorageFormat
from autopar.graph.ir import Graph, GraphProfile, Value
from autopar.graph.traced_model import TracedModel
from autopar.manual.layout_pricer import LayoutPricer
from autopar.manual.priced_layout import PricedLayout, PricedStage
from autopar.serving.decode_step import bytes_per_element


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replica:
    """A model on the ranks of ``layout.tp``, priced at ``min_batch`` samples (u of the module's docstring).
    ``head_op`` is the id of the head's op; ``plan`` the judged plan of ``priced``."""

    pricer: LayoutPricer
    layout: Layout
    min_batch: int
    head_op: int
    priced: PricedLayout
    plan: Plan

    @classmethod
    def of(cls, model: TracedModel, cluster: Cluster, layout: Layout, memory_gib: float | None) -> "Replica":
        """The replica of a resolved serving layout; LayoutError where the model cannot run it."""
        graph = model.graph
        proportional = {size for value in graph.values for size in value.shape if graph.batch.is_proportional(size)}
        traced = graph.batch.traced_size
        min_batch = lcm(*(traced // gcd(size, traced) for size in proportional))
        pricer = LayoutPricer(
            model, cluster=cluster, gpus=layout.tp, global_batch=None, memory_gib=memory_gib, optimizer="sgd"
        )
        priced = pricer.price(_training_layout(layout, min_batch))
        return cls(
            pricer=pricer,
            layout=layout,
            min_batch=min_batch,
            head_op=max(op.id for op in graph.ops if any(graph.values[v].kind == "parameter" for v in op.inputs)),
            priced=priced,
            plan=pricer.plan(priced, 0.0),
        )

    @property
    def graph(self) -> Graph:
        """The traced graph."""
        return self.pricer.model.graph

    @property
    def profile(self) -> GraphProfile:
        """The profile of the graph's ops."""
        return self.pricer.model.profile

    @property
    def stage(self) -> PricedStage:
        """The one stage, of all blocks, at ``min_batch`` samples."""
        return self.priced.stages[0]

    def stage_at_batch(self, batch: int) -> PricedStage:
        """The one stage at ``batch`` samples."""
        if batch == self.min_batch:
            return self.stage
        return self.pricer.price(_training_layout(self.layout, batch)).stages[0]

    def weight_bytes_per_element(self, weight: Value, storage: StorageFormat) -> float:
        """Bytes an element of a weight as stored: matrices are quantised, but not those that the head or a look-up
        reads."""
        readers = [op for op in self.graph.ops if weight.id in op.inputs]
        if len(weight.shape) < 2 or any(op.id == self.head_op or "embedding" in op.target for op in readers):
            return float(weight.itemsize)
        return bytes_per_element(storage, weight.itemsize)


def _training_layout(layout: Layout, batch: int) -> Layout:
    """The training layout, of one micro-batch, whose forward a replica runs."""
    return Layout(tp=layout.tp, dp=1, mbs=batch, gbs=batch, fusion=layout.fusion, grads="same")
