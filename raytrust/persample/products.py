"""Per-candidate gradients of weights as the products that they are: S^T U, of signals S and inputs U.

`Product` computes them and what views ask of them, differentiably in inputs and signals. With few positions the inner
product with a known matrix, the norm, products with thin matrices are far cheaper from S and U than from the gradient
("ghost norms": Goodfellow 2015, Li et al. 2022); `raytrust.persample.ghost` hands them out as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from raytrust.persample.matmul import Bmm, bmm
from raytrust.persample.windows import Convolve, Geometry, Unfold, convolve, transposed

# Measured: what an entry gathered from the factors costs, in entries of a gradient that is formed.
GATHER = 8
# Measured: fewer multiplications are not all that the factors save, but also passes over memory.
LOW_RANK = 2.0


class Product:
    """The gradients (n, *shape) of a weight, for n candidates.

    inputs, signals: (n * batch, ...), as the layer has them. shape: (outputs, inputs, *kernel). geometry: that of a
    convolution, else None. Results are in `dtype`, float32 at least.
    """

    def __init__(self, inputs: Tensor, signals: Tensor, n: int, shape: torch.Size, geometry: Geometry | None):
        self.inputs, self.signals, self.n, self.shape, self.geometry = inputs, signals, n, shape, geometry
        self.dtype = torch.promote_types(inputs.dtype, torch.float32)
        self.positions = signals.numel() // (max(n, 1) * shape[0])  # of all images of a candidate

    @property
    def windowed(self) -> bool:
        """Whether to unfold a convolution's windows: not if they are many, nor for groups, which would mix."""
        if self.geometry is None:
            return True
        return self.geometry.groups == 1 and (self.positions <= self.shape[1:].numel() or self.inputs.is_cuda)

    @property
    def low_rank(self) -> bool:
        """Whether the factors are the cheaper way to an inner product or a norm."""
        rows, columns = self.shape[0], self.shape[1:].numel()
        return self.positions * (rows + columns) < LOW_RANK * rows * columns

    @cached_property
    def u(self) -> Tensor:
        """(n, positions, inputs); the windows of a convolution in the order (*kernel, channels)."""
        if self.geometry is None:
            return self.inputs.reshape(self.n, -1, self.shape[1])
        return Unfold.apply(self.inputs, self.shape[2:], self.geometry).view(self.n, -1, self.shape[1:].numel())

    @cached_property
    def s(self) -> Tensor:
        """(n, positions, outputs)."""
        return (self.signals if self.geometry is None else self.signals.movedim(1, -1)).reshape(
            self.n, -1, self.shape[0]
        )

    @property
    def bias(self) -> Tensor:
        """The gradients of a bias that is added to each position: (n, outputs)."""
        return self.s.sum(1, dtype=self.dtype)

    @cached_property
    def matrix(self) -> Tensor:
        """The gradients as matrices (n, outputs, inputs), with columns in the order of `u`."""
        return Bmm.apply(self.s.mT, self.u).to(self.dtype)

    @cached_property
    def dense(self) -> Tensor:
        """The gradients themselves: (n, *shape)."""
        if self.geometry is None:
            return self.matrix
        if not self.windowed or not (self.inputs.requires_grad or self.inputs.is_cuda):
            return _Correlation.apply(self.inputs, self.signals, self.n, self.shape, self.geometry).to(self.dtype)
        return self.matrix.view(self.n, self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 2).contiguous()

    def as_matrix(self, weights: Tensor) -> Tensor:
        """Weights (k, *shape) as matrices (k, outputs, inputs), with columns in the order of `u`."""
        return weights.flatten(2) if self.geometry is None else weights.movedim(2, -1).flatten(2)

    def inner_each(self, targets: Tensor) -> Tensor:
        """<gradient, target>, (n,), of each candidate with a target of its own: (n, outputs, inputs), as `as_matrix`
        lays them out."""
        if not self.low_rank:
            return (self.matrix * targets).sum((1, 2))
        return (Bmm.apply(self.u, targets.mT) * self.s).sum((1, 2), dtype=self.dtype)

    def entries_each(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(n, k): entries of each candidate's gradient at places of its own, rows and columns (n, k) as in `matrix`."""
        if self.positions * rows.shape[1] * GATHER >= self.shape.numel():
            return self.matrix.flatten(1).gather(1, rows * self.shape[1:].numel() + columns)
        at, across = (i[:, None, :].expand(-1, self.positions, -1) for i in (rows, columns))
        return (self.s.gather(2, at) * self.u.gather(2, across)).sum(1, dtype=self.dtype)

    def inner(self, target: Tensor) -> Tensor:
        """<gradient, target> for each candidate, (n,). target: the entries of one gradient, for all candidates."""
        if not self.low_rank:
            return self.dense.flatten(1) @ target
        weight = _as_weight(target, self.shape, self.inputs.dtype)
        if self.geometry is None:
            image = F.linear(self.inputs, weight)
        else:
            image = Convolve.apply(self.inputs, weight, self.geometry)
        return (image * self.signals).unflatten(0, (self.n, -1)).flatten(1).sum(1, dtype=self.dtype)

    def squared_norm(self) -> Tensor:
        """(n,)."""
        if not self.low_rank:
            return self.dense.flatten(1).square().sum(1)
        return _SquaredNorm.apply(self.u, self.s, self.dtype)

    def times(self, right: Tensor) -> Tensor:
        """The gradients as matrices (outputs, rest), times (rest, r), or (n, rest, r): (n, outputs, r)."""
        right = right.to(self.inputs.dtype)
        if self.geometry is not None:
            right = right.unflatten(-2, (self.shape[1], -1)).transpose(-3, -2).flatten(-3, -2)
        return (self.s.mT @ (self.u @ right)).to(self.dtype)

    def transposed_times(self, right: Tensor) -> Tensor:
        """Their transposes (rest, outputs), times (outputs, r), or (n, outputs, r): (n, rest, r)."""
        left = (self.u.mT @ (self.s @ right.to(self.inputs.dtype))).to(self.dtype)
        if self.geometry is None:
            return left
        return left.unflatten(1, (-1, self.shape[1])).transpose(1, 2).flatten(1, 2)

    def entries(self, positions: Tensor) -> Tensor:
        """(n, k) of the flattened gradients, at positions (k,), from the rows and columns that they lie in."""
        if "dense" in self.__dict__:
            return self.dense.flatten(1).gather(1, positions.expand(self.n, -1))
        *sides, within = _block(positions, self.shape)
        rows, columns = (i.expand(self.n, self.positions, -1) for i in sides)
        block = torch.bmm(self.s.gather(2, rows).mT, self.u.gather(2, columns)).to(self.dtype)
        return block.flatten(1).gather(1, within.expand(self.n, -1))

    def split(self, counts: Sequence[int]) -> list[Product]:
        """For the first counts[0] candidates, the next counts[1], and so on."""
        images = [len(self.inputs) // max(self.n, 1) * c for c in counts]
        parts = zip(self.inputs.split(images), self.signals.split(images), counts, strict=True)
        return [Product(i, s, c, self.shape, self.geometry) for i, s, c in parts]


# Views ask for the same entries, and for products with the same target, in every iteration. The keys are weak, so that
# what was laid out for an observation goes when it goes.
_BLOCKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_WEIGHTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _as_weight(target: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A target (entries,) as a layer's weight, laid out and rounded once for as long as the observation lives."""
    owner = target if target._base is None else target._base
    kept = _WEIGHTS.setdefault(owner, {})
    place = (target.storage_offset(), target.stride(), shape, dtype)
    if place not in kept or kept[place][0] != target._version:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        kept[place] = target._version, target.detach().reshape(shape).to(dtype).clone(memory_format=layout)
    return kept[place][1]


def _block(positions: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """The rows and the columns that hold any of the entries `positions` (k,) of a flattened weight, the columns as in
    `Product.u`, and where in that flattened block these entries are."""
    if positions not in _BLOCKS:
        row, column = positions // shape[1:].numel(), positions % shape[1:].numel()
        kernel = shape[2:].numel()
        rows, row = row.unique(return_inverse=True)
        columns, column = (column % kernel * shape[1] + column // kernel).unique(return_inverse=True)
        _BLOCKS[positions] = rows, columns, row * len(columns) + column
    return _BLOCKS[positions]


class _Correlation(torch.autograd.Function):
    """The gradients (n, *shape) of a convolution's weight, by one convolution a candidate, there and back."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, signals: Tensor, n: int, shape: torch.Size, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(inputs, signals)
        ctx.n, ctx.geometry = n, geometry
        stride, padding, dilation, groups = geometry
        if max(shape[2:]) == 1 and max(padding) == 0:
            # A 1x1 kernel never reads what its stride passes over. Given that too, oneDNN on AVX2 writes past its
            # workspace where there are fewer than 8 channels (uxlfoundation/oneDNN#6035): wrong results, or a crash.
            inputs = inputs[..., :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)
            stride = (1, 1)
        if inputs.dtype == torch.float64:
            # torch's own kernel, as oneDNN has none of double precision, takes one layout alone, and `contiguous` would
            # leave any to images of one pixel.
            inputs, signals = (t.clone(memory_format=torch.contiguous_format) for t in (inputs, signals))
        settings: list[Any] = [None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]]
        if not any(ctx.needs_input_grad):
            # Where no derivative follows, as groups of one convolution: small networks pay for calls.
            settings[6] *= n
            s, x = (t.unflatten(0, (n, -1)).transpose(0, 1).flatten(1, 2).contiguous() for t in (signals, inputs))
            like = inputs.new_empty(n * shape[0], *shape[1:])
            return torch.ops.aten.convolution_backward(s, x, like, *settings)[1].view(n, *shape)
        like = inputs.new_empty(shape)
        if inputs.dtype != torch.float64:
            like = like.contiguous(memory_format=torch.channels_last)
        pairs = zip(signals.unflatten(0, (n, -1)), inputs.unflatten(0, (n, -1)), strict=True)
        return torch.stack([torch.ops.aten.convolution_backward(s, x, like, *settings)[1] for s, x in pairs])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        inputs, signals = (t.unflatten(0, (ctx.n, -1)) for t in ctx.saved_tensors)
        weights = [v.contiguous(memory_format=torch.channels_last) for v in slopes[0]]
        by_signal = [convolve(x, v, ctx.geometry) for x, v in zip(inputs, weights, strict=True)]
        by_input = [transposed(s, x, v, ctx.geometry) for s, x, v in zip(signals, inputs, weights, strict=True)]
        return torch.cat(by_input), torch.cat(by_signal), None, None, None


class _SquaredNorm(torch.autograd.Function):
    """||S^T U||^2 = <U U^T, S S^T> for u (n, positions, inputs) and s (n, positions, outputs): (n,)."""

    # By hand, as Gram matrices are symmetric: one product each way back, where autograd would take two.
    @staticmethod
    def forward(ctx: Any, u: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
        of_u, of_s = bmm(u, u.mT), bmm(s, s.mT)
        ctx.save_for_backward(u, s, of_u, of_s)
        return (of_u.to(dtype) * of_s).sum((1, 2))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        u, s, of_u, of_s = ctx.saved_tensors
        scale = (2 * slopes[0]).to(u.dtype).view(-1, 1, 1)
        return bmm(of_s * scale, u), bmm(of_u * scale, s), None


class ChannelSums(torch.autograd.Function):
    """(sum of s, sum of s x) over positions, for x, s (n * batch, channels, ...): two of (n, channels)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, n: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, s)
        rows = [t.movedim(1, -1).reshape(n, -1, x.shape[1]) for t in (s, s * x)]
        sums = [(t.new_ones(n, 1, t.shape[1]) @ t).squeeze(1) for t in rows]
        return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in sums)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        x, s = ctx.saved_tensors
        n = len(slopes[0])
        shape = (len(x), -1, *[1] * (x.ndim - 2))
        of_sum, of_product = (t.to(x.dtype).repeat_interleave(len(x) // n, 0).view(shape) for t in slopes)
        return s * of_product, torch.addcmul(of_sum, x, of_product), None
