"""Strided 1x1 convolutions of few channels, in which oneDNN overruns its memory on AVX2."""

from __future__ import annotations

import pytest
import torch

from raytrust.persample.products import Product
from raytrust.persample.windows import Geometry


@pytest.mark.parametrize("channels", [3, 4, 8])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_weight_s_gradient_is_autograd_s(channels: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, channels, 32, 32, generator=generator)
    weight = torch.randn(64, channels, 1, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.conv2d(x.double(), weight, stride=stride)
    signal = torch.randn(y.shape, generator=generator)
    (expected,) = torch.autograd.grad(y, weight, signal.double())
    rows = (t.contiguous(memory_format=torch.channels_last) for t in (x, signal))
    geometry = Geometry((stride, stride), (0, 0), (1, 1), 1)
    product = Product(*rows, 1, weight.shape, geometry)
    torch.testing.assert_close(product.dense[0].double(), expected, rtol=1e-4, atol=1e-3)
