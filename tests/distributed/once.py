"""What all plans of one model share is made once per process: its workload, its trace, one process's gradients.

The matrices run hundreds of plans of a few models; only what differs from plan to plan is worth its time again.
"""

import pickle
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from autopar.graph.trace import TracedGraph, trace
from autopar.manual.traced_model import TracedModel, trace_model
from autopar.workload.workload import Workload

NUM_KEPT = 24
_kept: dict[Hashable, Any] = {}


def once(key: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` made for ``key`` when it was first asked for; the latest ``NUM_KEPT`` are kept."""
    if key not in _kept:
        made = make()
        while len(_kept) >= NUM_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = made
    return _kept[key]


def workload_of(source: Callable[[], Workload]) -> Workload:
    """The workload of a source, the same object for equal sources."""
    return once((pickle.dumps(source), "workload"), source)


def known_trace(workload: Workload, *, dtype: Any) -> TracedGraph:
    """The trace of a workload; the same object is traced once."""
    return once((id(workload), dtype), lambda: (workload, trace(workload, dtype=dtype)))[1]  # kept alive: its id stays


def known_graph(workload: Workload, *, dtype: str) -> TracedModel:
    """The traced and profiled model of a workload, made once."""
    return once((id(workload), dtype, "profiled"), lambda: (workload, trace_model(workload, dtype=dtype)))[1]


@contextmanager
def traced_once() -> Iterator[None]:
    """Inside, a workload is traced once, whoever plans or runs it."""
    with (
        patch("autopar.runtime.apply.trace", known_trace),
        patch("autopar.manual.layout_pricer.trace_model", known_graph),
    ):
        yield
