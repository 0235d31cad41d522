"""Worker processes that form one gloo world after another, of any size up to the pool's: torch is imported once."""

import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

NO_WORLD = "in init_process_group"


class NoWorldError(RuntimeError):
    """The ranks could not be connected."""


class Pool:
    """Up to ``size`` workers, spawned when first needed; ``run(world, task, *args)`` calls ``task(*args)`` on ranks 0 .. world - 1 of a new world."""

    def __init__(self, size: int) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.size = size
        self.results = self.context.Queue()
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0
        self.tasks: list[Any] = []
        self.workers: list[Any] = []

    def _grow(self, world: int) -> None:
        """Start workers up to ``world``."""
        assert world <= self.size, f"a world of {world} is more than the pool's {self.size}"
        while len(self.workers) < world:
            self.tasks.append(self.context.Queue())
            arguments = (len(self.workers), self.tasks[-1], self.results)
            self.workers.append(self.context.Process(target=_work, args=arguments, daemon=True))
            self.workers[-1].start()

    def run(self, world: int, task: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
        """What every rank returned, by rank; RuntimeError with the first rank's traceback where one failed. A world
        that gloo cannot connect on a busy machine is tried a second time, with new workers: torch counts a world that
        failed on the ranks where it did, so that their next group has another name than the others'."""
        try:
            return self._run(world, task, args, timeout_s)
        except NoWorldError:
            self._end_workers()
            return self._run(world, task, args, timeout_s)

    def _run(self, world: int, task: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        self._grow(world)
        self.count += 1
        store = str(Path(self.folder.name) / f"store{self.count}")
        for rank in range(world):
            self.tasks[rank].put((self.count, world, store, task, args))
        found: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(found) + len(errors) < world:
            try:
                count, rank, result, error = self.results.get(timeout=timeout_s)
            except queue.Empty:
                missing = sorted(set(range(world)) - set(found) - set(errors))
                raise RuntimeError(f"ranks {missing} hang; errors: {errors}") from None
            if count in (0, self.count):  # 0: the task itself could not be read
                (errors if error else found)[rank] = error or result
        if any(NO_WORLD in error for error in errors.values()):
            raise NoWorldError("\n".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())))
        if errors:
            raise RuntimeError("\n".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())))
        return [found[rank] for rank in range(world)]

    def run_survivors(self, world: int, task: Callable[..., Any], *args: Any, dead: int) -> dict[int, Any]:
        """As ``run``, where rank ``dead`` never answers; the pool is of no use afterwards."""
        self._grow(world)
        self.count += 1
        store = str(Path(self.folder.name) / f"store{self.count}")
        for rank in range(world):
            self.tasks[rank].put((self.count, world, store, task, args))
        found: dict[int, Any] = {}
        while len(found) < world - 1:
            _, rank, result, error = self.results.get(timeout=120)
            assert rank != dead
            found[rank] = error or result
        return found

    def _end_workers(self) -> None:
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join()
        self.workers, self.tasks, self.results = [], [], self.context.Queue()

    def close(self) -> None:
        self._end_workers()
        self.folder.cleanup()


def _work(rank: int, tasks: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        count = 0
        try:
            count, world, path, task, args = tasks.get()
            store = dist.FileStore(path, world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
            dist.barrier()  # a rank that ends while another still connects would close that one's connection
            result, error = task(*args), None
        except BaseException:
            result, error = None, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        results.put((count, rank, result, error))
