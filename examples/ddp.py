"""Your own model under DistributedDataParallel with a compressed all-reduce: handwritten digits, two processes.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py [--steps N] [--checkpoint FILE]

With a file it saves there at the end, and goes on from what it finds there, with any number of processes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raytrust import compress
from raytrust.config import Defence, PowerSGDConfig
from raytrust.wire.channel import GroupChannel, Tap

BATCH = 32  # a worker
TEST = 360  # images


def main() -> nn.Module:
    """Train, and return this worker's replica of the model."""
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
    tap = Tap(GroupChannel())  # counts the bytes; ddp_comm_hook(compressor) alone will do
    ddp.register_comm_hook(ddp.module, compress.ddp_comm_hook(compressor, tap))
    optimiser = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)

    start = 0
    if arguments.checkpoint is not None and arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint, weights_only=True)  # one file, that every worker reads
        start = saved["step"]
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        states = saved["compressors"]  # of every worker that saved it: residuals are each worker's own
        compressor.load_state_dict(states[rank] if len(states) == workers else compress.redistribute(states))

    for step in range(start, start + arguments.steps):
        generator = torch.Generator().manual_seed(step)
        batch = TEST + torch.randperm(len(labels) - TEST, generator=generator)[rank::workers][:BATCH]
        optimiser.zero_grad()
        F.cross_entropy(ddp(images[batch]), labels[batch]).backward()
        optimiser.step()

    states = [None] * workers if rank == 0 else None
    dist.gather_object(compressor.state_dict(), states)
    if rank == 0:
        if arguments.checkpoint is not None:
            parts = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "compressors": states}
            save(arguments.checkpoint, {"step": start + arguments.steps} | parts)
        with torch.no_grad():
            correct = int((model(images[:TEST]).argmax(1) == labels[:TEST]).sum())
        dense = sum(4 * p.numel() for p in model.parameters())
        print(
            f"step {start + arguments.steps}: {correct} of {TEST} test images right; "
            f"{tap.sent_bytes // max(1, arguments.steps)} bytes a step, uncompressed {dense}"
        )
    dist.barrier()  # none leaves while another one is at work
    dist.destroy_process_group()
    return model


def save(file: Path, checkpoint: dict[str, Any]) -> None:
    """Write it whole or not at all: a checkpoint of two steps in parts would be one of no training."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    torch.save(checkpoint, part)
    os.replace(part, file)


if __name__ == "__main__":
    main()
