"""The gradients that many candidate batches would have sent, and how to move the candidates so that they fit.

`per_candidate_gradients` is the definition, for any model. `GradientMatcher` computes a distance of these gradients
and its derivative with respect to the candidates, which is all that an attack needs, in four passes through the
network: forward and backward, which give each layer's input and signal; then the distance's derivative with respect
to these, layer by layer; then both passes once more, transposed, which bring that derivative to the images.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from raytrust.persample.ghost import GhostGradient
from raytrust.persample.layers import Affine, Call, Convolution, Recorded, Tape, rebuild, unknown
from raytrust.persample.products import ChannelSums, Product

Distance = Callable[[Sequence[Tensor]], Tensor]


def per_candidate_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradient of the mean cross-entropy over each candidate batch, for each parameter.

    x: (candidates, batch, channels, height, width), as the model sees images. labels: (candidates, batch).
    Returns one tensor a parameter, in the model's order, of shape (candidates, *shape), differentiable in `x`.
    Candidates do not mix, not even in a batch norm that is in training mode, and the model is left as it was.

    One candidate after another: under vmap, torch takes a norm layer's statistics for constants in second derivatives.
    """
    names, weights = zip(*model.named_parameters(), strict=True)
    rows = []
    for images, targets in zip(x, labels, strict=True):
        parameters = [w.detach().requires_grad_() for w in weights]
        state = {name: b.clone() for name, b in model.named_buffers()} | dict(zip(names, parameters, strict=True))
        loss = F.cross_entropy(functional_call(model, state, (images,)), targets)
        found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def forget_batch_statistics(model: nn.Module) -> nn.Module:
    """Let batch norms in training mode use the batch's statistics without updating their running ones, in place.

    They are built from elementary operations, so that the model can also be used under vmap.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            module.forward = partial(_normalise, module)  # type: ignore[method-assign]
    return model


def _normalise(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0, keepdim=True)
    normal = (x - mean) * torch.rsqrt(variance + norm.eps)
    return normal * norm.weight.view(mean.shape) + norm.bias.view(mean.shape) if norm.affine else normal


class GradientMatcher:
    """How far the gradients of candidate batches are from an observation, and how to change the candidates.

    Fast where all parameters belong to Conv2d with zero padding, Linear, BatchNorm (in either mode) or GroupNorm; any
    other model takes the path of `per_candidate_gradients`, with one warning. Both agree to rounding. The model is
    copied, not changed.

    dtype: in which the passes run, by default the model's own; sums over positions and the distance are in float32 at
    least. bfloat16 is for CPUs with AMX or AVX512-BF16 and for GPUs; not for the slow path, which ignores it.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        self._model = copy.deepcopy(model).requires_grad_(False)
        self._shapes = [p.shape for p in self._model.parameters()]
        own = next(self._model.parameters()).dtype
        self.dtype = dtype or own
        self._accumulator = torch.promote_types(self.dtype, torch.float32)
        self._tape = Tape()
        rebuilt = rebuild(copy.deepcopy(self._model), self._tape)
        missing = unknown(rebuilt)
        self.fast = not missing
        if missing:
            warnings.warn(f"Slow path: no rule for {', '.join(missing)}.", stacklevel=2)
            return
        index = {id(p): i for i, p in enumerate(rebuilt.parameters())}
        self._index = {
            layer: [index[id(p)] for p in (layer.weight, layer.bias) if p is not None]
            for layer in rebuilt.modules()
            if isinstance(layer, Recorded)
        }
        self._model = rebuilt.to(self.dtype)
        # Rows of channels suit oneDNN, and tensor cores; cuDNN in float32 prefers planes.
        rows = self.dtype != torch.float32 or next(rebuilt.parameters()).device.type == "cpu"
        self._format = torch.channels_last if rows else torch.contiguous_format
        self._model.to(memory_format=self._format)

    def __call__(self, x: Tensor, labels: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
        """(distance(gradients), d sum(distance) / dx) at x.

        x: (candidates, batch, channels, height, width). labels: (candidates, batch). distance: one tensor a parameter,
        (candidates, *shape) -> (candidates,), each from its own candidate alone. Returns (candidates,) and x's shape.
        """
        x = x.detach().requires_grad_()
        if not self.fast:
            values = distance(per_candidate_gradients(self._model, x, labels))
            (dx,) = torch.autograd.grad(values.sum(), x)
            return values.detach(), dx
        calls = self._record(x, labels)
        ends = [t for call in calls for t in (call.input, call.signal) if t is not None]
        leaves = [t.detach().requires_grad_() for t in ends]
        values = distance(self._gradients(calls, leaves, len(x)))
        slopes = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
        reached = [(end, slope) for end, slope in zip(ends, slopes, strict=True) if slope is not None]
        (dx,) = torch.autograd.grad([end for end, _ in reached], x, [slope for _, slope in reached])
        return values.detach(), dx

    def _record(self, x: Tensor, labels: Tensor) -> list[Call]:
        """One forward and one backward pass."""
        self._tape.calls, self._tape.candidates = [], len(x)
        images = x.flatten(0, 1).to(self.dtype)
        logits = self._model(images.contiguous(memory_format=self._format) if images.ndim == 4 else images)
        losses = F.cross_entropy(logits.to(self._accumulator), labels.flatten(), reduction="sum") / labels.shape[1]
        torch.autograd.grad(losses, x, create_graph=True)
        calls, self._tape.calls = self._tape.calls, []
        if any(call.input._version != call.version for call in calls):
            raise ValueError("Expected the model to leave the inputs of its layers as they are.")
        return [call for call in calls if call.signal is not None]

    def _gradients(self, calls: list[Call], leaves: list[Tensor], n: int) -> list[Tensor]:
        """One tensor a parameter, (n, *shape); leaves: input and signal of each call in turn."""
        parts: list[list[Tensor]] = [[] for _ in self._shapes]
        for call, inputs, signals in zip(calls, leaves[::2], leaves[1::2], strict=True):
            found = self._of_call(call.layer, inputs, signals, n)
            for i, gradient in zip(self._index[call.layer], found, strict=True):
                parts[i].append(gradient)
        zero = leaves[0].new_zeros((), dtype=self._accumulator)
        return [
            p[0] if len(p) == 1 else sum(p[1:], p[0]) if p else zero.expand(n, *shape)
            for p, shape in zip(parts, self._shapes, strict=True)
        ]

    def _of_call(self, layer: Recorded, inputs: Tensor, signals: Tensor, n: int) -> list[Tensor]:
        """The gradients of a layer's weight, and of its bias if it has one."""
        if isinstance(layer, Affine):
            total, product = ChannelSums.apply(inputs, signals, n, self._accumulator)
            return [(product - total * layer.mean) * layer.inverse_std, total]
        geometry = layer.geometry if isinstance(layer, Convolution) else None
        product = Product(inputs, signals, n, layer.weight.shape, geometry, self._accumulator)
        weight = GhostGradient(product) if product.windowed else product.dense
        return [weight] if layer.bias is None else [weight, product.s.sum(1, dtype=self._accumulator)]
