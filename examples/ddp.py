"""Your own model under DistributedDataParallel with a compressed all-reduce: handwritten digits, two processes.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py [--steps N] [--checkpoint FOLDER]

With a folder it saves there at the end, and goes on from what it finds there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raytrust import compress
from raytrust.channel import GroupChannel, Tap
from raytrust.config import Defence, PowerSGDConfig

BATCH = 32  # a worker
TEST = 360  # images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div_(16).unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    ddp = DistributedDataParallel(model)
    compressor = compress.build(Defence(PowerSGDConfig(rank=4), error_feedback=True), ddp.module)
    tap = Tap(GroupChannel(), keep=False)  # counts the bytes; ddp_comm_hook(compressor) alone will do
    ddp.register_comm_hook(ddp.module, compress.ddp_comm_hook(compressor, tap))
    optimiser = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)

    start = 0
    if arguments.checkpoint is not None:  # one file a worker: residuals are each worker's own
        file = arguments.checkpoint / f"worker-{rank}.pt"
        if file.exists():
            saved = torch.load(file, weights_only=True)
            start = saved["step"]
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            compressor.load_state_dict(saved["compressor"])

    for step in range(start, start + arguments.steps):
        generator = torch.Generator().manual_seed(step)
        batch = TEST + torch.randperm(len(labels) - TEST, generator=generator)[rank::workers][:BATCH]
        optimiser.zero_grad()
        F.cross_entropy(ddp(images[batch]), labels[batch]).backward()
        optimiser.step()

    if arguments.checkpoint is not None:
        arguments.checkpoint.mkdir(parents=True, exist_ok=True)
        parts = {"model": model, "optimiser": optimiser, "compressor": compressor}
        torch.save({"step": start + arguments.steps} | {name: p.state_dict() for name, p in parts.items()}, file)
    if rank == 0:
        with torch.no_grad():
            correct = int((model(images[:TEST]).argmax(1) == labels[:TEST]).sum())
        dense = sum(4 * p.numel() for p in model.parameters())
        print(
            f"step {start + arguments.steps}: {correct} of {TEST} test images right; "
            f"{tap.sent_bytes // arguments.steps} bytes a step, uncompressed {dense}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
