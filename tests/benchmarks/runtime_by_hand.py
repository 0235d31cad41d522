"""GPT trained by a program written by hand, as torch's tutorials write it: what the runtime's speed is compared with.

    tp   ``parallelize_module``: column and row parallel linear layers, the vocabulary sharded in the embedding and in the
         head, whose loss is ``loss_parallel``
    dp   ``fully_shard`` block by block (ZeRO-3), or ``DistributedDataParallel`` (ZeRO-0)

The model is ``examples/gpt.py``'s with untied embeddings; its attention reads its number of heads from the projection,
as any module must that ``parallelize_module`` shards.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

Batch = dict[str, Tensor]
Step = Callable[[Batch], Tensor]


class LocalAttention(nn.Module):
    """The example's attention on the heads of one rank."""

    def __init__(self, full: Any) -> None:
        super().__init__()
        self.head_dim, self.qkv, self.proj = full.head_dim, full.qkv, full.proj

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, -1, 3, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(attended.transpose(1, 2).reshape(batch, seq, -1))


def plain_step(model: nn.Module, loss_fn: Any, optimizer: torch.optim.Optimizer) -> Step:
    """One process's training step on the full batch."""

    def step(batch: Batch) -> Tensor:
        loss = loss_fn(model(**batch), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def by_hand_step(model: Any, dp: int, tp: int, zero: int, learning_rate: float) -> Step:
    """This rank's training step of ``model`` on dp x tp ranks, tensor parallelism innermost; takes the full batch."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    for block in model.layers:
        block.attn = LocalAttention(block.attn)
    if tp > 1:
        _shard(model, mesh["tp"])
    trained: nn.Module = model
    if zero == 3:
        for block in model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    elif dp > 1:
        assert tp == 1
        trained = DistributedDataParallel(model, process_group=mesh.get_group("dp"), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate)
    place = mesh.get_local_rank("dp")

    def step(batch: Batch) -> Tensor:
        mine = {name: tensor.chunk(dp)[place] for name, tensor in batch.items()}
        with loss_parallel() if tp > 1 else nullcontext():
            logits = trained(**mine)
            loss = F.cross_entropy(logits.flatten(0, 1), mine["labels"].flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _shard(model: Any, mesh: DeviceMesh) -> None:
    parallelize_module(
        model,
        mesh,
        {
            "tokens": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )
    for block in model.layers:
        parallelize_module(
            block,
            mesh,
            {
                "attn.qkv": ColwiseParallel(),
                "attn.proj": RowwiseParallel(),
                "mlp.fc1": ColwiseParallel(),
                "mlp.fc2": RowwiseParallel(),
            },
        )
