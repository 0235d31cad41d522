"""Which process groups messages get: of their own wherever tensors of the device go by NCCL, which has no tags."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from autopar.runtime.transfer import make_direction_groups


@pytest.fixture
def made_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The groups that are made, in a world of one rank."""
    made: list[object] = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "new_group", lambda: made.append(object()) or made[-1])
    yield made
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "config", "device", "has_own_groups"),
    [
        ("nccl", "cuda:nccl", "cuda", True),
        ("undefined", "cpu:gloo,cuda:nccl", "cuda:3", True),  # of init_process_group() without a backend
        ("undefined", "cuda:nccl", "cuda", True),
        ("cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl", "cuda", True),
        ("cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl", "cpu", False),
        ("cpu:gloo,cuda:gloo", "cpu:gloo,cuda:gloo", "cuda", False),
        ("gloo", "cpu:gloo,cuda:gloo", "cpu", False),
    ],
)
def test_messages_by_nccl_have_groups_of_their_own(
    name: str,
    config: str,
    device: str,
    has_own_groups: bool,
    made_groups: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group=None: name)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: config)
    groups = make_direction_groups(torch.device(device))
    assert len(made_groups) == (2 if has_own_groups else 0)
    assert [groups.up, groups.down] == (made_groups if has_own_groups else [None, None])
