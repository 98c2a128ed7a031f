"""In the steady state a step allocates nothing of the gradient's size: first-touch page faults cost more than sums."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytrust.compress import build
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
from raytrust.wire.channel import LocalChannel

SHAPES = [torch.Size(s) for s in [(768, 1024), (512, 64, 3, 3), (1024,)]]
HALF = 2 * sum(s.numel() for s in SHAPES)  # half of the gradient's bytes, 2.1 MB

# As the papers have them. A message that is not much smaller than the gradient is itself an allocation of its size
# (Top-K of 25 % and more), and so are the draw of Rand-K above 2 % (a shuffle) and the exact quantile of Threshold.
CONFIGS: list[CompressorConfig] = [
    DenseConfig(),
    HalfConfig(),
    HalfConfig("bfloat16"),
    PowerSGDConfig(),
    PowerSGDConfig(warm_start=False),
    TopKConfig(level=0.01),
    TopKConfig(level=0.01, scope="layer"),
    RandKConfig(),
    ThresholdConfig(),
    DGCConfig(clip=1.0),
    SignSGDConfig(),
    SignSGDConfig(momentum=0.9),
    ScaledSignConfig(),
    QSGDConfig(),
    QSGDConfig(bits=2, norm="max"),
    QSGDConfig(bits=8, bucket=100),
    VqSGDConfig(),
]
DEFENCES = [Defence(config) for config in CONFIGS] + [
    Defence(config, error_feedback=True) for config in CONFIGS if not isinstance(config, (DGCConfig, SignSGDConfig))
]

# A decomposition in float64 of the largest matrix, out of place: the product of its singular vectors is of its size.
EXCEPT = Defence(AtomoConfig())


class Allocations(TorchDispatchMode):
    """The sizes, in bytes, of storages that operations made, each with the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self.made.append((x.untyped_storage().nbytes(), str(func)))
        return result


def allocated(defence: Defence, steps: int = 4) -> list[tuple[int, str]]:
    """What the last two steps allocated, by torch and by numpy, if it is of at least half the gradient's size."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=generator) for s in SHAPES]
    compressor = build(defence, SHAPES)
    for _ in range(steps - 2):
        compressor.reduce(grads, LocalChannel())
    with Allocations() as found:
        compressor.reduce(grads, LocalChannel())
    tracemalloc.start()
    try:
        compressor.reduce(grads, LocalChannel())
        by_numpy = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return [made for made in found.made if made[0] >= HALF] + ([(by_numpy, "numpy")] if by_numpy >= HALF else [])


@pytest.mark.parametrize("defence", DEFENCES, ids=lambda d: d.name)
def test_the_steady_state_allocates_nothing_of_the_gradient_s_size(defence: Defence) -> None:
    assert allocated(defence) == []


def test_what_allocates_is_noticed() -> None:
    assert allocated(Defence(), steps=2) != []
    assert allocated(EXCEPT) != []
    with Allocations() as found:
        x = torch.zeros(1000)
        x.add_(1).view(10, 100)[2:].mul_(2)
    assert [size for size, _ in found.made] == [4000]
