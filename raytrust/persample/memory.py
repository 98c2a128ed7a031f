"""The memory of an attack: what a candidate takes, how much there is, and an allocator that keeps what was freed."""

from __future__ import annotations

import ctypes
import math
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


# Computed, not measured: the windows that a convolution is unfolded to on a GPU, and their derivative.
WINDOWS = 2
# The share of a GPU's memory that this process was given, where others use it, too.
_given = {"share": 1.0}


def candidate_bytes(seen: Observation, device: str = "cpu") -> int:
    """Estimate how many bytes one restart of an attack on this observation takes, rather too many than too few.

    Activations count as well as gradients: of a small model with large images they are nearly all. Local steps that
    are simulated are held until all are differentiated through. On CUDA each convolution's windows are held, too.
    """
    entries, local, size = sum(w.numel() for w in seen.weights.values()), seen.local, seen.threat.batch_size
    images = local.batch_size or 0 if local.parts(size) else size
    # Measured on ResNet-18 and a ConvNet: what each further step adds is half of what one takes.
    through, windows = _activations(seen)
    held = ACTIVATIONS * through + (WINDOWS * windows if device.startswith("cuda") else 0)
    return 2 * (1 + local.steps) * (GRADIENTS * entries + images * held)


def _activations(seen: Observation) -> tuple[int, int]:
    """Numbers that go into and come out of the layers for one image, by their shapes alone; and those that the windows
    of convolutions hold."""
    # In evaluation mode, as a batch norm refuses to train on one value; on "meta", where nothing is computed, unless it
    # is somebody else's network, which may make tensors on the device that it knows.
    device = "meta" if seen.network is None else "cpu"
    model = seen.build_model().to(device).eval()
    counted = [0, 0]

    def count(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        counted[0] += sum(t.numel() for t in (*inputs, output) if isinstance(t, torch.Tensor))
        if isinstance(layer, nn.Conv2d) and isinstance(output, torch.Tensor):
            counted[1] += output[:, 0].numel() * layer.in_channels * math.prod(layer.kernel_size)

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
            counted = [n // size for n in counted]
    return counted[0], counted[1]


def free_bytes(device: str) -> int:
    """How many bytes an attack may take: of a GPU most of what is free, and no more than the share of this process, see
    `take_share`; of a machine each core's share of what is free."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        # What the allocator has kept from tensors that are gone is not free for others, but for us.
        free += torch.cuda.memory_reserved(device) - used
        return max(0, int(SHARE * min(free, _given["share"] * total - used)))
    available = [n for n in (_available(), _of_container()) if n is not None]
    return int(SHARE * min(available) / (os.cpu_count() or 1)) if available else 2**30


def take_share(share: float) -> None:
    """Tell this process which share of a GPU it was given. Estimates keep to it; an allocation that exceeds it is not
    refused, as one candidate alone may need more."""
    if not 0 < share <= 1:
        raise ValueError(f"Expected share={share} in (0, 1].")
    _given["share"] = share


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
