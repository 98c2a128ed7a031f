"""The memory of an attack: what a candidate takes, how much there is, and an allocator that keeps what was freed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from torch import nn

from raytrust.leak.observation import Observation

# Measured: how many times an iteration holds what goes into and comes out of each layer, and what is as long as a
# gradient: targets, as they are laid out, and gradients that are formed.
ACTIVATIONS, GRADIENTS = 3, 3
# Of what is free: the rest is for what can't be foreseen.
SHARE = 0.8


def candidate_bytes(seen: Observation) -> int:
    """Estimate how many bytes one restart of an attack on this observation takes, rather too many than too few.

    Activations count as well as gradients: of a small model with large images they are nearly all. Local steps that
    are simulated are held until all are differentiated through.
    """
    entries, local, size = sum(w.numel() for w in seen.weights.values()), seen.local, seen.threat.batch_size
    images = local.batch_size or 0 if local.parts(size) else size
    # Measured on ResNet-18 and a ConvNet: what each further step adds is half of what one takes.
    return 2 * (1 + local.steps) * (GRADIENTS * entries + ACTIVATIONS * images * _activations(seen))


def _activations(seen: Observation) -> int:
    """Numbers that go into and come out of the layers for one image, by their shapes alone."""
    # In evaluation mode, as a batch norm refuses to train on one value; on "meta", where nothing is computed, unless it
    # is somebody else's network, which may make tensors on the device that it knows.
    device = "meta" if seen.network is None else "cpu"
    model = seen.build_model().to(device).eval()
    counted = [0]

    def count(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        counted[0] += sum(t.numel() for t in (*inputs, output) if isinstance(t, torch.Tensor))

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with torch.no_grad():
        if seen.network is None:
            model(torch.zeros(1, *seen.image_shape, device=device))
        else:
            size = seen.threat.batch_size
            targets = torch.empty(0) if seen.targets is None else seen.targets
            seen.task.output(model, torch.zeros(size, *seen.image_shape), targets)
            counted[0] //= size
    return counted[0]


def free_bytes(device: str) -> int:
    """How many bytes an attack may take: of a GPU most of what is free, of a machine each core's share of that."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(SHARE * free)
    available = [n for n in (_available(), _of_container()) if n is not None]
    return int(SHARE * min(available) / (os.cpu_count() or 1)) if available else 2**30


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _of_container() -> int | None:
    """What the control group leaves, which a container's /proc/meminfo does not know."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is what torch raises where it can't allocate, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def keep_freed_memory() -> None:
    """Tune glibc malloc in worker processes that we start, never in the user's: it keeps what is freed.

    It holds for the whole process. Without glibc it does nothing.
    """
    # An attack allocates the same large tensors in every iteration. Given back to the system and taken anew, each of
    # their pages costs a page fault, and all of them more than the arithmetic on them.
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(parameter, value)
