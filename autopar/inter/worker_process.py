"""Calls of an object's methods, in this process or in a worker process.

The worker process receives the pickled object and then its calls, and sends back their pickled results. It is a fresh
interpreter (a fork would copy the locks of torch's threads), and ends at the end of its input.
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
    """Runs the methods of one object. Every ``submit`` is followed by its ``result`` before the next one."""

    def submit(self, method: str, *arguments: Any) -> None:
        """Call the method of that name; does not wait for it."""
        ...

    def result(self) -> Any:
        """Wait for the call and return what it returned."""
        ...

    def close(self) -> None:
        """End whatever was started; no call may follow."""
        ...


class InProcessRunner:
    """Runs the methods of ``target`` in this process, each when its result is asked for."""

    def __init__(self, target: object) -> None:
        self._target = target
        self._call: tuple[str, tuple[Any, ...]] = ("", ())

    def submit(self, method: str, *arguments: Any) -> None:
        """Remember the call."""
        self._call = (method, arguments)

    def result(self) -> Any:
        """Make the call."""
        method, arguments = self._call
        return getattr(self._target, method)(*arguments)

    def close(self) -> None:
        """Nothing was started."""


class WorkerProcess:
    """Runs the methods of a copy of ``target`` in a worker process. If that process dies (out of memory, killed, an
    exception), ``on_lost`` is called with its exit code, all calls are replayed in this process, and an exception is
    raised here with its own traceback."""

    def __init__(self, target: object, on_lost: Callable[[int], None]) -> None:
        self._pickled, self._on_lost = pickle.dumps(target), on_lost
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._local_copy: object | None = None
        self._writer = ThreadPoolExecutor(max_workers=1)  # the pipe is full before the worker reads
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from autopar.inter.worker_process import worker_main; worker_main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path),
                "PYTHONSAFEPATH": "1",  # do not import from the working folder what this process would not
            },
        )
        self._send(self._pickled)

    def submit(self, method: str, *arguments: Any) -> None:
        """Send the call to the worker process."""
        self._calls.append((method, arguments))
        self._send(pickle.dumps((method, arguments)))

    def result(self) -> Any:
        """Wait for the result of the last call; made in this process if the worker process died."""
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
        """Kill the worker process and wait for its end."""
        self._process.kill()
        self._writer.shutdown()
        self._process.communicate()

    def _send(self, message: bytes) -> None:
        """Write to the worker process without waiting for it to read."""
        self._writer.submit(self._write, message)

    def _write(self, message: bytes) -> None:
        """Write and flush."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `result` will notice that the process died
            self._process.stdin.write(message)
            self._process.stdin.flush()


def can_use_worker_process() -> bool:
    """Whether this process may run on a second core, and the interpreter's path is known."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > 1 and bool(sys.executable)


def worker_main() -> None:
    """What the worker process runs: read an object from stdin, then its calls, and write the result of each to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the first process, and with it this one's input
    calls, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the results
    gc.disable()  # as `planner.plan` does
    with suppress(EOFError, BrokenPipeError):
        target = pickle.load(calls)
        while True:
            method, arguments = pickle.load(calls)
            pickle.dump(getattr(target, method)(*arguments), results, protocol=pickle.HIGHEST_PROTOCOL)
            results.flush()
