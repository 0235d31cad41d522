"""A traced and profiled model: what pricing a layout reads of it, on any cluster."""

from dataclasses import dataclass

from autopar.core.dtypes import Dtype, long_dtype
from autopar.graph.attention import attention_calls
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.graph.op_profiles import profile_graph
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.workload.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TracedModel:
    """The graph of a workload's training step, its blocks in order, and the profile of its ops. ``dtype`` is that of
    the weights."""

    workload: Workload
    dtype: Dtype
    graph: Graph
    blocks: tuple[Block, ...]
    profile: GraphProfile

    def head_counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The distinct numbers of query heads and of key/value heads of the attention calls, ascending; keys that are
        repeated for several query heads count once."""
        calls = attention_calls(self.graph)
        return tuple(sorted({call.heads for call in calls})), tuple(sorted({call.kv_heads for call in calls}))


def trace_model(workload: Workload, *, dtype: str) -> TracedModel:
    """Trace and profile a workload; ``dtype`` as on the command line ("bf16") or in full ("bfloat16"). ModelError where
    the model cannot be traced."""
    dtype = long_dtype(dtype)
    graph = hoist_light_ops(trace(workload, dtype=dtype).graph)
    return TracedModel(
        workload=workload, dtype=dtype, graph=graph, blocks=split_into_blocks(graph), profile=profile_graph(graph)
    )
