"""What all plans of one model share is computed once per process: its workload, its trace, one process's gradients.

The matrices run hundreds of plans of a few models; only what differs from plan to plan is computed for each.
"""

import pickle
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from autopar.graph.trace import TracedGraph, trace
from autopar.graph.traced_model import TracedModel, trace_model
from autopar.workload.workload import Workload

CACHE_SIZE = 24
_cache: dict[Hashable, Any] = {}


def once(key: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` returned when ``key`` was first asked for; the latest ``CACHE_SIZE`` results are cached."""
    if key not in _cache:
        result = make()
        while len(_cache) >= CACHE_SIZE:
            del _cache[next(iter(_cache))]
        _cache[key] = result
    return _cache[key]


def workload_of(source: Callable[[], Workload]) -> Workload:
    """The workload of a source, the same object for equal sources."""
    return once((pickle.dumps(source), "workload"), source)


def known_trace(workload: Workload, *, dtype: Any) -> TracedGraph:
    """The trace of a workload; the same object is traced once."""
    # The workload is cached too, so that no other object gets its id.
    return once((id(workload), dtype), lambda: (workload, trace(workload, dtype=dtype)))[1]


def known_graph(workload: Workload, *, dtype: str) -> TracedModel:
    """The traced and profiled model of a workload; the same object is profiled once."""
    return once((id(workload), dtype, "profiled"), lambda: (workload, trace_model(workload, dtype=dtype)))[1]


@contextmanager
def traced_once() -> Iterator[None]:
    """Inside, a workload is traced once, whoever plans or runs it."""
    with (
        patch("autopar.runtime.apply.trace", known_trace),
        patch("autopar.manual.layout_pricer.trace_model", known_graph),
    ):
        yield
