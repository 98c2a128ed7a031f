"""Convolutions as maps: there, transposed, and as products of a matrix with what each output position sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.persample.matmul import mm

# Measured: up to so many output positions an image, oneDNN's convolutions are slower than unfolding and a product.
FEW = 16


class Geometry(NamedTuple):
    """How a convolution moves over its input, as torch names it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    if not (x.device.type == "cpu" and groups == 1 and len(x) > 1 and _positions(x, weight, geometry) <= FEW):
        return torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    windows = unfold(x, weight.shape[2:], geometry)
    # Laid out as the input is: a model may flatten it by `view`.
    rows = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if rows else torch.contiguous_format
    shape = (len(x), len(weight), *windows.shape[1:3])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    # Into the output: a view of the product could not be overwritten by a ReLU in place.
    y.permute(0, 2, 3, 1).copy_(mm(windows.flatten(0, 2).flatten(1), _rows(weight).T).view(*windows.shape[:3], -1))
    return y


def transposed(signal: Tensor, like: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The derivative of <convolve(like, weight), signal> by `like`, of which only the shape counts."""
    stride, padding, dilation, groups = geometry
    if like.device.type == "cpu" and groups == 1 and len(like) > 1 and signal[0, 0].numel() <= FEW:
        # As one matrix: else, of a signal that is not channels-last, matmul copies the weight for each row.
        slopes = mm(signal.permute(0, 2, 3, 1).reshape(-1, len(weight)), _rows(weight))
        slopes = slopes.view(len(signal), *signal.shape[2:], weight.shape[2:].numel(), -1)
        return fold(slopes, like.shape, weight.shape[2:], geometry)
    return torch.ops.aten.convolution_backward(
        signal, like, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )[0]


def unfold(x: Tensor, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """(n, channels, height, width) -> (n, height', width', kernel entries, channels)."""
    above, left = geometry.padding
    padded = x.permute(0, 2, 3, 1)
    if above or left:
        padded = F.pad(padded, (0, 0, left, left, above, above))
    return torch.stack([padded[at] for at in _offsets(padded.shape, kernel, geometry)], 3)


def fold(slopes: Tensor, shape: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """The transposed map of `unfold`, to (n, channels, height, width) = shape."""
    (above, left), (n, channels, height, width) = geometry.padding, shape
    padded = slopes.new_zeros(n, height + 2 * above, width + 2 * left, channels)
    for at, slope in zip(_offsets(padded.shape, kernel, geometry), slopes.unbind(3), strict=True):
        padded[at] += slope
    return padded[:, above : above + height, left : left + width].permute(0, 3, 1, 2)


class Unfold(torch.autograd.Function):
    """`unfold`, differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Sequence[int], geometry: Geometry) -> Tensor:
        ctx.shape, ctx.kernel, ctx.geometry = x.shape, kernel, geometry
        return unfold(x, kernel, geometry)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return fold(slopes[0], ctx.shape, ctx.kernel, ctx.geometry), None, None


class Convolve(torch.autograd.Function):
    """`convolve`, differentiable by its input alone, any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.like, ctx.weight, ctx.geometry = x.detach(), weight, geometry
        return convolve(x, weight, geometry)

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor, None, None]:
        return _Transposed.apply(signals[0], ctx.like, ctx.weight, ctx.geometry), None, None


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, signal: Tensor, like: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.weight, ctx.geometry = weight, geometry
        return transposed(signal, like, weight, geometry)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        return Convolve.apply(slopes[0], ctx.weight, ctx.geometry), None, None, None


def _rows(weight: Tensor) -> Tensor:
    """(outputs, channels, *kernel) -> (outputs, kernel entries * channels), without a copy if it is channels-last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _positions(x: Tensor, weight: Tensor, geometry: Geometry) -> int:
    """How many output positions the convolution of an image has."""
    sizes = zip(x.shape[2:], weight.shape[2:], *geometry[:3], strict=True)
    height, width = ((size + 2 * pad - step * (k - 1) - 1) // stride + 1 for size, k, stride, pad, step in sizes)
    return height * width


def _offsets(padded: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> list[tuple[slice, slice, slice]]:
    """For each entry of the kernel, the positions of the padded (n, height, width, channels) that it meets."""
    along = [
        [slice(k * step, size - (width - 1 - k) * step, stride) for k in range(width)]
        for size, width, step, stride in zip(padded[1:3], kernel, geometry.dilation, geometry.stride, strict=True)
    ]
    return [(slice(None), rows, columns) for rows in along[0] for columns in along[1]]
