"""Which device a rank's part of a plan runs on."""

import os

import torch
import torch.distributed as dist

from autopar.core.errors import UsageError


def choose_device(given: torch.device | str | None) -> torch.device:
    """The rank's own device: ``given``, else a GPU, else the CPU where there is none. A GPU becomes the current one, on
    which NCCL's collectives of objects run.

    A GPU without an index is the current one where that is not torch's default, GPU 0; else the GPU with the number of
    the rank on its node (``LOCAL_RANK``, which torchrun sets). Where the process sees one GPU it is that; without
    ``LOCAL_RANK`` the current one. UsageError where there is no such GPU."""
    device = torch.device(given if given is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UsageError(f"device is {device}, but torch finds no GPU")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device() or _gpu_of_local_rank())
    torch.cuda.set_device(device)
    return device


def _gpu_of_local_rank() -> int:
    """The number of the GPU of this rank among those that the process sees."""
    count, text = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "0")
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"LOCAL_RANK is {text!r}, not a number: launch by torchrun, or pass device=... to apply()")
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    if count == 1:
        return 0
    if local_rank >= count:
        raise UsageError(
            f"this is local rank {local_rank}, but this node has {count} GPUs: start at most {count} ranks on it, or "
            "pass device=... to apply()"
        )
    return local_rank
