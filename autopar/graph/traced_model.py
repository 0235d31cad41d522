"""A workload traced once: what the search, the estimates, the judge and the runtime read of a model."""

from dataclasses import dataclass
from functools import cached_property

from autopar.core.dtypes import Dtype, long_dtype
from autopar.graph.attention import attention_calls
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.graph.op_profiles import profile_graph
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.workload import Workload


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: cached properties need a __dict__
class TracedModel:
    """A traced model. ``graph`` has its light ops before the first layer (``hoist_light_ops``); ``dtype`` is that of its
    weights. Blocks and profile are made when they are first read, once."""

    workload: Workload
    dtype: Dtype
    graph: Graph

    def head_counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The distinct numbers of query heads and of key/value heads of the attention calls, ascending; keys that are
        repeated for several query heads count once."""
        calls = attention_calls(self.graph)
        return tuple(sorted({call.heads for call in calls})), tuple(sorted({call.kv_heads for call in calls}))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the graph, in order."""
        return split_into_blocks(self.graph, lambda: self.profile)

    @cached_property
    def profile(self) -> GraphProfile:
        """The profiles of all ops."""
        return profile_graph(self.graph)


def trace_model(workload: Workload, *, dtype: str) -> TracedModel:
    """Traces a workload with weights in ``dtype``, as on the command line ("bf16") or long ("bfloat16"); raises ModelError
    as ``trace`` does."""
    long = long_dtype(dtype)
    return TracedModel(workload=workload, dtype=long, graph=hoist_light_ops(trace(workload, dtype=long).graph))
