"""An object whose methods run in this process, or in a second one beside it.

Between the processes pass pickles: there the object and its calls, back their results. The second process is a fresh
interpreter (a fork would copy the locks of torch's threads), and ends with its input.
"""

import gc
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol


class MethodRunner(Protocol):
    """Where the methods of an object run. Each ``begin`` is followed by its ``end``, which gives the result."""

    def submit(self, method: str, *arguments: Any) -> None: ...

    def result(self) -> Any: ...

    def close(self) -> None: ...


class InProcessRunner:
    """In this process: a method runs when its result is asked for."""

    def __init__(self, target: object) -> None:
        self._target = target
        self._call: tuple[str, tuple[Any, ...]] = ("", ())

    def submit(self, method: str, *arguments: Any) -> None:
        self._call = (method, arguments)

    def result(self) -> Any:
        method, arguments = self._call
        return getattr(self._target, method)(*arguments)

    def close(self) -> None:
        pass


class WorkerProcess:
    """In a second process, on a copy of ``target``. Where that process ends early (out of memory, killed, an error),
    ``lost`` is told its exit code and all is done again here, where an error is raised as it is."""

    def __init__(self, target: object, on_lost: Callable[[int], None]) -> None:
        self._pickled, self._on_lost = pickle.dumps(target), on_lost
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._local_copy: object | None = None
        self._writer = ThreadPoolExecutor(max_workers=1)  # a pipe is full before the second process begins to read
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from autopar.inter.worker_process import worker_main; worker_main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path),
                "PYTHONSAFEPATH": "1",  # nothing is found in the working folder that this process would not find
            },
        )
        self._send(self._pickled)

    def submit(self, method: str, *arguments: Any) -> None:
        self._calls.append((method, arguments))
        self._send(pickle.dumps((method, arguments)))

    def result(self) -> Any:
        if self._local_copy is None:
            assert self._process.stdout is not None
            try:
                return pickle.load(self._process.stdout)
            except (EOFError, pickle.UnpicklingError):
                self._on_lost(self._process.wait())
                self._local_copy = pickle.loads(self._pickled)
                for method, arguments in self._calls[:-1]:
                    getattr(self._local_copy, method)(*arguments)
        method, arguments = self._calls[-1]
        return getattr(self._local_copy, method)(*arguments)

    def close(self) -> None:
        self._process.kill()
        self._writer.shutdown()
        self._process.communicate()

    def _send(self, message: bytes) -> None:
        self._writer.submit(self._write, message)

    def _write(self, message: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `end` finds no answer
            self._process.stdin.write(message)
            self._process.stdin.flush()


def can_use_worker_process() -> bool:
    """Whether this process may use a second core, and there is an interpreter to begin."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > 1 and bool(sys.executable)


def worker_main() -> None:
    """The second process: an object comes in, then its calls; the result of each goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the first process, and with it this one's input
    calls, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no result
    gc.disable()  # as `planner` does
    with suppress(EOFError, BrokenPipeError):
        target = pickle.load(calls)
        while True:
            method, arguments = pickle.load(calls)
            pickle.dump(getattr(target, method)(*arguments), results, protocol=pickle.HIGHEST_PROTOCOL)
            results.flush()
