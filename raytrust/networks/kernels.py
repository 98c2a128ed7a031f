"""Kernels of libraries that are known to be wrong, and what is done instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def sound_kernels(network: nn.Module) -> Iterator[None]:
    """Within the block, the gradient of the network is computed without kernels that would corrupt memory.

    On CPUs without AVX-512, oneDNN writes past its workspace for the weights' gradient of a 1x1 convolution with a
    stride and fewer than 8 channels (uxlfoundation/oneDNN#6035): wrong results, or a crash. Networks with such a layer
    do without oneDNN there, and are slower; others notice nothing.
    """
    before = bool(torch.backends.mkldnn.enabled)
    hit = torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT") and any(map(_is_hit, network.modules()))
    try:
        torch.backends.mkldnn.enabled = before and not hit  # type: ignore[assignment]
        yield
    finally:
        torch.backends.mkldnn.enabled = before  # type: ignore[assignment]


def _is_hit(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return False
    return max(layer.kernel_size) == 1 and max(layer.stride) > 1 and min(layer.in_channels, layer.out_channels) < 8
