"""Trains a byte-level GPT on the English of Python's own documentation, under a plan.

    autopar plan examples/gpt.py --gpus 4 --cluster cpu-gloo --global-batch 32 -o gpt.plan.json \\
        --set size=125M --set layers=2 --set hidden=128 --set heads=4 --set vocab=256 --set seq=64
    torchrun --nproc-per-node 4 examples/train_gpt.py --plan gpt.plan.json --steps 300 --checkpoint ckpt

Started another time with the same --checkpoint, and with the same plan or another plan of the same model, it continues
from the checkpoint. With `torchrun --max-restarts 3` it does so by itself when a rank dies (set
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, else torch 2.13's restarted ranks look for the dead ones;
`autopar run --max-restarts 3` prints the full command line).
"""

import argparse
import pydoc_data.topics

import torch
import torch.distributed as dist
from torch import Tensor

import autopar


def text() -> Tensor:
    """Some 700 kB of English, one byte per element."""
    return torch.frombuffer(bytearray("\n".join(pydoc_data.topics.topics.values()), "utf-8"), dtype=torch.uint8).long()


def batch_of(corpus: Tensor, size: int, seq: int, step: int) -> dict[str, Tensor]:
    """The global batch of a step, the same on every rank and in every run."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(corpus) - seq - 1, (size, 1), generator=generator)
    rows = corpus[starts + torch.arange(seq + 1)]
    return {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def main() -> None:
    """Trains on this rank; torchrun starts one process per rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--checkpoint", help="folder to save to and to continue from")
    parser.add_argument("--save-every", type=int, default=100)
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    else:
        torch.set_num_threads(1)

    plan = autopar.load_plan(arguments.plan)
    workload = autopar.load_workload(plan.model.path, **plan.model.settings)
    torch.manual_seed(0)
    model = workload.build(device="cpu")
    workload.init_weights(model)
    trainer = plan.apply(
        model,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arguments.lr, betas=(0.9, 0.95)),
        clip_norm=1.0,
    )
    start = 0
    if arguments.checkpoint:
        try:
            start = trainer.load(arguments.checkpoint)
        except autopar.PlanFileError as error:
            if dist.get_rank() == 0:
                print(f"{error}: starting from step 0", flush=True)

    corpus, seq = text(), workload.inputs(1)["tokens"].shape[1]
    for step in range(start, arguments.steps):
        loss = trainer.step(batch_of(corpus, plan.global_batch, seq, step))
        if dist.get_rank() == 0 and (step < 20 or step % 20 == 19):
            print(f"step {step + 1}: {float(loss):.4f} nats per byte", flush=True)
        if arguments.checkpoint and (step + 1) % arguments.save_every == 0:
            trainer.save(arguments.checkpoint, step + 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
