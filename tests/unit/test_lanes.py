"""Two workers, in one process and in two: the same plan; what happens when the second process fails or is lost."""

import os
import signal

import pytest
from msgspec.structs import replace

from autopar.core.errors import InfeasibleError
from autopar.core.plan import Plan
from autopar.inter import parallel_search as lanes
from autopar.inter.worker_process import WorkerProcess
from autopar.planner.planner import plan
from tests.conftest import example_workload

SMALL = {"layers": 3, "hidden": 256, "heads": 8, "vocab": 1024, "seq": 128}


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def add_once_then_die(self, number: int, here: int) -> int:
        """Ends any process but ``here``."""
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.add(number)

    def speak(self, number: int) -> int:
        print("a word", flush=True)
        return number

    def speak_and_fail(self) -> None:
        self.speak(0)
        raise ValueError("no such thing")


@pytest.fixture
def codes() -> list[int]:
    return []


@pytest.fixture
def worker(codes):
    runner = WorkerProcess(Counter(), codes.append)
    yield runner
    runner.close()


def call(runner: WorkerProcess, method: str, *arguments: object) -> object:
    runner.submit(method, *arguments)
    return runner.result()


def test_calls_reach_one_object(worker):
    assert [call(worker, "add", number) for number in (3, 4)] == [3, 7]


def test_an_error_is_raised_as_it_is(worker, codes):
    assert call(worker, "add", 5) == 5
    with pytest.raises(ValueError, match="no such thing"):
        call(worker, "speak_and_fail")
    assert codes == [1]
    assert call(worker, "add", 1) == 6


def test_what_is_printed_is_no_result(worker, codes):
    assert call(worker, "speak", 3) == 3
    assert codes == []


def test_the_work_of_a_lost_process_is_repeated(worker, codes):
    assert call(worker, "add", 5) == 5
    assert call(worker, "add_once_then_die", 2, os.getpid()) == 7
    assert codes == [-signal.SIGKILL]
    assert call(worker, "add", 1) == 8


def found(**options: object) -> Plan:
    workload = example_workload("gpt", **SMALL)
    return plan(workload, cluster="p3.16xlarge", gpus=8, global_batch=16, **options)


def without_seconds(one: Plan) -> Plan:
    return replace(one, search=replace(one.search, seconds=0.0))


@pytest.mark.parametrize("memory_gib", [None, 1.16])
def test_one_process_and_two_find_the_same_plan(monkeypatch, memory_gib):
    begun = []
    monkeypatch.setattr(lanes, "MIN_PARALLEL_WORK", 0)
    monkeypatch.setattr(lanes, "can_use_worker_process", lambda: True)
    monkeypatch.setattr(lanes, "WorkerProcess", lambda *arguments: begun.append(WorkerProcess(*arguments)) or begun[-1])
    one, two = (without_seconds(found(processes=count, memory_gib=memory_gib)) for count in (1, 2))
    assert one == two
    assert [runner._process.returncode for runner in begun] == [-signal.SIGKILL]  # it is ended when the search is


def test_no_plan_fits_in_two_processes_either(monkeypatch):
    monkeypatch.setattr(lanes, "MIN_PARALLEL_WORK", 0)
    monkeypatch.setattr(lanes, "can_use_worker_process", lambda: True)
    with pytest.raises(InfeasibleError, match="no plan fits"):
        found(memory_gib=0.9)


def test_the_time_limit_holds_in_two_processes(monkeypatch):
    monkeypatch.setattr(lanes, "MIN_PARALLEL_WORK", 0)
    monkeypatch.setattr(lanes, "can_use_worker_process", lambda: True)
    late = found(time_limit_s=0.01)
    assert late.search.status == "feasible"
    assert late.search.lower_bound_s == 0.0
