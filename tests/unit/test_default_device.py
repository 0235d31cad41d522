"""Which device a rank takes, on a pretended machine with GPUs: torch's own functions are replaced, and no GPU is used."""

from dataclasses import dataclass

import pytest
import torch

from autopar.core.errors import UsageError
from autopar.runtime.rank_device import choose_device


@dataclass
class Gpus:
    count: int
    current: int = 0


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    machine = Gpus(4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: setattr(machine, "current", torch.device(device).index)
    )
    return machine


@pytest.mark.parametrize("given", [None, "cuda", torch.device("cuda")])
def test_each_rank_of_a_node_takes_a_gpu_of_its_own(
    given: torch.device | str | None, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(4):
        gpus.current = 0
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_device(given) == torch.device("cuda", rank)
        assert gpus.current == rank  # collectives of objects use the current one


def test_a_gpu_that_the_user_has_set_or_names_is_taken(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    gpus.current = 3
    assert choose_device(None) == torch.device("cuda", 3)
    assert choose_device("cuda:2") == torch.device("cuda", 2)
    assert gpus.current == 2
    assert choose_device("cpu") == torch.device("cpu")
    assert gpus.current == 2


def test_a_launcher_that_shows_each_rank_one_gpu(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.count = 1
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(None) == torch.device("cuda", 0)


def test_no_local_rank_is_the_current_gpu(gpus: Gpus) -> None:
    assert choose_device(None) == torch.device("cuda", 0)


def test_more_ranks_than_gpus_on_a_node(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UsageError, match=r"local rank 4, but this node has 4 GPUs: .*at most 4 ranks"):
        choose_device(None)


@pytest.mark.parametrize("local_rank", ["", "one", "-1"])
def test_a_local_rank_that_is_no_number(local_rank: str, gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(UsageError, match="LOCAL_RANK is "):
        choose_device(None)


def test_no_gpu(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.count = 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(None) == torch.device("cpu")
    with pytest.raises(UsageError, match="cuda"):
        choose_device("cuda")
