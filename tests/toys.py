"""Small inputs that several tests share: gradients, defences and a data set. Functions of their arguments alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from raytrust.compress import build, contract
from raytrust.config import (
    AtomoConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    DGCConfig,
    HalfConfig,
    PowerSGDConfig,
    QSGDConfig,
    RandKConfig,
    ScaledSignConfig,
    SignSGDConfig,
    ThresholdConfig,
    TopKConfig,
    VqSGDConfig,
)
from raytrust.data import Dataset
from raytrust.wire.channel import LocalChannel, Message

SHAPES, gradients = contract.SHAPES, contract.gradients
ENTRIES = 245  # of all shapes

COMPRESSORS: dict[str, CompressorConfig] = {
    "dense": DenseConfig(),
    "fp16": HalfConfig(),
    "bf16": HalfConfig("bfloat16"),
    "powersgd-1": PowerSGDConfig(rank=1),
    "powersgd-3": PowerSGDConfig(rank=3),
    "powersgd-3-cold": PowerSGDConfig(rank=3, warm_start=False),
    "powersgd-full": PowerSGDConfig(rank=1000),
    "topk": TopKConfig(level=0.1),
    "topk-full": TopKConfig(level=1.0),
    "topk-bytes": TopKConfig(equal_to_rank=2),
    "topk-values": TopKConfig(equal_to_rank=2, equal_by="values"),
    "topk-layer": TopKConfig(level=0.2, scope="layer"),
    "topk-layer-full": TopKConfig(level=1.0, scope="layer"),
    "randk": RandKConfig(level=0.2),
    "randk-full": RandKConfig(level=1.0),
    "randk-unbiased": RandKConfig(level=0.2, unbiased=True),
    "threshold": ThresholdConfig(level=0.1, sample=1.0),
    "threshold-full": ThresholdConfig(level=1.0, sample=1.0),
    "threshold-sampled": ThresholdConfig(level=0.1, sample=0.2),
    "dgc": DGCConfig(level=0.05),
    "dgc-warm-up": DGCConfig(level=0.01, momentum=0.5, masking=False, clip=1.0, warmup_steps=4),
    "signsgd": SignSGDConfig(),
    "signum": SignSGDConfig(momentum=0.9),
    "scaledsign": ScaledSignConfig(),
    "qsgd": QSGDConfig(bits=4, bucket=32),
    "qsgd-8": QSGDConfig(bits=8, bucket=100),
    "qsgd-2-max": QSGDConfig(bits=2, bucket=8, norm="max"),
    "vqsgd": VqSGDConfig(samples=1000),
    "atomo": AtomoConfig(rank=3),
}
NO_FEEDBACK = ["randk-unbiased", "dgc", "dgc-warm-up", "signum"]  # refused by `Defence`
DEFENCES = {name: Defence(config) for name, config in COMPRESSORS.items()} | {
    f"{name}+EF": Defence(config, error_feedback=True)
    for name, config in COMPRESSORS.items()
    if name not in NO_FEEDBACK
}
LOSSLESS = [name for name in DEFENCES if "full" in name or "dense" in name]


def rounding(config: CompressorConfig) -> float:
    """Of a mean that is summed in the format of the wire, relative to the largest entries (about 4)."""
    match config:
        case HalfConfig(dtype=dtype):
            return 4 * torch.finfo(getattr(torch, dtype)).eps
        case _:
            return 1e-5


def contract_of(defence: Defence) -> dict[str, Any]:
    """What `raytrust.compress.contract.check` has to know of a defence."""
    majority = isinstance(defence.compressor, SignSGDConfig)
    return {"mean_of_own": not majority, "exact": rounding(defence.compressor)}


def is_gathered(config: CompressorConfig) -> bool:
    """Whether a peer gets every worker's message (all-gather), not the mean alone (all-reduce)."""
    return not isinstance(config, (DenseConfig, HalfConfig, PowerSGDConfig, RandKConfig))


def is_linear(config: CompressorConfig) -> bool:
    """Whether the messages are linear functions of the gradient, given the positions that were sent."""
    return not is_gathered(config) or isinstance(config, (TopKConfig, ThresholdConfig, DGCConfig))


def is_estimate(config: CompressorConfig) -> bool:
    """Whether the messages are taken for an unbiased estimate of the gradient, and tell no more."""
    return isinstance(config, (QSGDConfig, VqSGDConfig, AtomoConfig))


def bytes_by_formula(
    config: CompressorConfig, shapes: Sequence[torch.Size], step: int, messages: Sequence[Message]
) -> int:
    """What a worker sends in a step. `messages` tell how many entries or triples, where that is drawn or depends."""
    entries = sum(s.numel() for s in shapes)
    matrices = [(s[0], s[1:].numel()) for s in shapes if len(s) > 1 and s.numel()]
    vectors = sum(s.numel() for s in shapes if len(s) < 2)

    def floats(rank: int) -> int:
        return sum(min(n, m, rank) * (n + m) for n, m in matrices) + vectors

    def share(level: float) -> int:
        return min(entries, max(1, round(level * entries)))

    match config:
        case DenseConfig():
            return 4 * entries
        case HalfConfig():
            return 2 * entries
        case PowerSGDConfig(rank=rank):
            return 4 * floats(rank)
        case TopKConfig(level=level, equal_to_rank=rank, equal_by=equal_by, scope=scope):
            if level is None:
                assert rank is not None
                k = floats(rank) // 2 if equal_by == "bytes" else floats(rank)
            else:
                k = round(level * entries)
            least = sum(s.numel() > 0 for s in shapes) if scope == "layer" else 1
            return 8 * min(entries, max(least, k))
        case RandKConfig(level=level):
            return 4 * share(level)
        case ThresholdConfig():
            return 4 + 8 * len(messages[1].sent[0])
        case DGCConfig(level=level, warmup_steps=warmup):
            stages = [0.25, 0.0625, 0.015625, 0.00390625]
            return 8 * share(max(level, stages[4 * step // warmup]) if step < warmup else level)
        case SignSGDConfig():
            return -(-entries // 8)
        case ScaledSignConfig():
            return -(-entries // 8) + 4 * len(shapes)
        case QSGDConfig(bits=bits, bucket=bucket):
            return -(-entries * bits // 8) + 4 * -(-entries // bucket)
        case VqSGDConfig(samples=samples):
            width = max(1, math.ceil(math.log2(2 * entries))) if entries else 0
            return 4 + -(-samples * width // 8)
        case AtomoConfig():
            triples = zip(messages[0].sent[0].tolist(), matrices, strict=True)
            return 4 * len(matrices) + 4 * (sum(r * (n + m + 1) for r, (n, m) in triples) + vectors)


class Echo:
    """One of several workers, who all say the same as this one."""

    def __init__(self, world_size: int = 1, rank: int = 0):
        self.world_size, self.rank = world_size, rank

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        total = x.clone() if out is None else out.copy_(x)
        for _ in range(self.world_size - 1):
            total += x
        return total.div_(self.world_size)

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        return [tuple(x.clone() for x in xs) for _ in range(self.world_size)]


def norm(xs: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((x.detach().double() ** 2).sum()) for x in xs))


def distance(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """Relative to `ys`."""
    return norm([x - y for x, y in zip(xs, ys, strict=True)]) / norm(ys)


def mean_over_workers(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(tensors).mean(0) for tensors in zip(*parts, strict=True)]


def batch(*candidates: Sequence[Tensor]) -> list[Tensor]:
    """Gradients as a view takes them: one tensor a parameter, (batch, *shape)."""
    return [torch.stack(parts) for parts in zip(*candidates, strict=True)]


def draws(config: CompressorConfig, grads: Sequence[Tensor], count: int, seed: int = 0) -> Tensor:
    """What the messages of `count` steps decode to, of the same gradients each time: float64 (count, entries)."""
    compressor = build(Defence(config), [g.shape for g in grads], seed)
    own = (compressor.reduce(grads, LocalChannel()).decoded_own for _ in range(count))
    return torch.stack([torch.cat([o.flatten() for o in parts]).double() for parts in own])


def assert_unbiased(samples: Tensor, expected: Tensor) -> None:
    """A z-test of every coordinate at once: with Bonferroni's bound an unbiased method fails one seed in 10,000.

    samples: (count, entries). What does not vary must be as expected to rounding.
    """
    count, entries = samples.shape
    deviation = samples.std(0)
    error = (samples.mean(0) - expected).abs()
    rounding = 1e-5 * expected.abs().max()
    bound = statistics.NormalDist().inv_cdf(1 - 1e-4 / (2 * entries))
    assert deviation.max() > rounding, "nothing was random"
    excess = error - bound * deviation / count**0.5 - rounding
    assert excess.max() <= 0, f"biased in entry {int(excess.argmax())}"


def relative_variance(samples: Tensor, expected: Tensor) -> tuple[float, float]:
    """E||own - x||^2 / ||x||^2 as estimated, and its standard error."""
    errors = (samples - expected).square().sum(1) / expected.square().sum()
    return float(errors.mean()), float(errors.std() / len(errors) ** 0.5)


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


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """scikit-image's, of two images (channels, height, width) in [0, 1]."""
    return float(structural_similarity(np.float64(a), np.float64(b), data_range=1.0, channel_axis=0))
