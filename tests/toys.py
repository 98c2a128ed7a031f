"""Small inputs that several tests share: gradients, defences and a data set. Functions of their arguments alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.config import CompressorConfig, Defence, DenseConfig, PowerSGDConfig, TopKConfig
from raytrust.data import Dataset

# A convolution, a bias, a matrix, one entry, a column, a row, a 1x1 convolution: 245 entries.
SHAPES = [torch.Size(s) for s in [(6, 3, 3, 3), (6,), (4, 10), (1,), (9, 1), (1, 7), (5, 4, 1, 1)]]
ENTRIES = 245

COMPRESSORS: dict[str, CompressorConfig] = {
    "dense": DenseConfig(),
    "powersgd-1": PowerSGDConfig(rank=1),
    "powersgd-3": PowerSGDConfig(rank=3),
    "powersgd-3-cold": PowerSGDConfig(rank=3, warm_start=False),
    "powersgd-full": PowerSGDConfig(rank=1000),
    "topk": TopKConfig(level=0.1),
    "topk-full": TopKConfig(level=1.0),
    "topk-bytes": TopKConfig(equal_to_rank=2),
    "topk-values": TopKConfig(equal_to_rank=2, equal_by="values"),
}
DEFENCES = {name: Defence(config) for name, config in COMPRESSORS.items()} | {
    f"{name}+EF": Defence(config, error_feedback=True) for name, config in COMPRESSORS.items()
}


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def norm(xs: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((x.detach().double() ** 2).sum()) for x in xs))


def distance(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """Relative to `ys`."""
    return norm([x - y for x, y in zip(xs, ys, strict=True)]) / norm(ys)


def synthetic(
    train: int = 64, test: int = 24, channels: int = 3, size: int = 8, classes: int = 4, vivid: bool = False
) -> Dataset:
    """Smooth random images. A class is a brightness, so that it can be learned; vivid images use the full range, so
    that they can be recognised.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(train + test) % classes
    coarse = torch.rand(train + test, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    images = smooth if vivid else (labels.view(-1, 1, 1, 1) + smooth) / classes
    images = (images * 255).round().to(torch.uint8)
    return Dataset("synthetic", images[:train], labels[:train], images[train:], labels[train:], classes)
