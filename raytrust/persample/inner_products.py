"""Of the gradients of many points, what membership needs, without ever holding one a point: inner products and norms.

Both follow layer by layer from a layer's input and the derivative of the loss by its output, so that one forward and
one backward pass over the activations serve for all points. The inner products alone would be one forward-mode product
(`torch.func.jvp`), but that takes three convolutions a layer where this takes at most one beside the norms. Batch norms
are taken in evaluation mode, as a point has no gradient of its own otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


def products_and_norms(
    model: nn.Module, x: Tensor, labels: Tensor, direction: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Each point's cross-entropy (nats), inner product of its gradient with `direction`, and squared gradient norm.

    x: (n, channels, height, width), as the model sees images. labels: (n,). direction: one tensor a parameter, in the
    model's order. Returns three of (n,). The model is left as it was.

    Raises ValueError for a layer with parameters that is none of Conv2d (zero padding, one group), Linear on flat
    inputs, BatchNorm2d in evaluation mode, and for a layer that is used twice.
    """
    along = {id(p): d for p, d in zip(model.parameters(), direction, strict=True)}
    layers = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    for layer in layers:
        if not _known(layer):
            raise ValueError(f"Expected layers that have a rule for norms, got {layer}.")
    calls: list[_Call] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        call = _Call(layer, inputs[0].detach())
        calls.append(call)
        # A hook on the tensor sees the derivative at this point, also where a ReLU then overwrites the output.
        output.register_hook(call.take)

    handles = [layer.register_forward_hook(record) for layer in layers]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)  # the backward pass then makes no gradient of a parameter
        images = x.detach().requires_grad_()
        losses = F.cross_entropy(model(images), labels, reduction="none")
        torch.autograd.grad(losses.sum(), images)
    finally:
        for handle in handles:
            handle.remove()
        for p in trained:
            p.requires_grad_(True)
    if len({id(call.layer) for call in calls}) < len(calls):
        raise ValueError("Expected the model to use each layer once.")
    with torch.no_grad():
        parts = [call.products([along[id(p)] for p in call.layer.parameters()]) for call in calls]
    inner, squared = (torch.stack(terms).sum(0) for terms in zip(*parts, strict=True))
    return losses.detach(), inner, squared


@dataclass
class _Call:
    """One layer's part in a pass: its input, (n, ...), and the derivative of the loss by its output."""

    layer: nn.Module
    input: Tensor
    signal: Tensor | None = None

    def take(self, signal: Tensor) -> None:
        self.signal = signal

    def products(self, direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(<gradient, direction>, |gradient|^2) over the layer's parameters, for each image: (n,), (n,)."""
        layer, signal = self.layer, self.signal
        assert signal is not None
        if isinstance(layer, nn.Linear):
            inner = (F.linear(self.input, direction[0]) * signal).sum(1)
            squared = signal.square().sum(1) * self.input.square().sum(1)
            bias = signal
        elif isinstance(layer, nn.Conv2d):
            inner, squared = _convolution(layer, self.input, signal, direction[0])
            bias = signal.flatten(2).sum(2)
        else:
            assert isinstance(layer, nn.BatchNorm2d)
            normal = F.batch_norm(self.input, layer.running_mean, layer.running_var, eps=layer.eps)
            weight = (signal * normal).flatten(2).sum(2)
            inner, squared = weight @ direction[0], weight.square().sum(1)
            bias = signal.flatten(2).sum(2)
        if layer.bias is None:
            return inner, squared
        return inner + bias @ direction[1], squared + bias.square().sum(1)


def _convolution(layer: nn.Conv2d, x: Tensor, signal: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Of the gradient S C^T of a kernel, where S (a, positions) is the derivative by an image's output and C
    (b, positions) its columns: (<S C^T, direction>, |S C^T|^2), each (n,).

    Where that takes fewer products, the norm is <S^T S, C^T C> ("ghost norms", Li et al. 2022), and the inner product
    is that of S with the output that the direction as a kernel would give; else both are read off the layer's gradient,
    one image at a time (Bu et al. 2022 mix the two alike, by memory).
    """
    assert not isinstance(layer.padding, str)
    a, b, positions = len(direction), direction[0].numel(), signal[0, 0].numel()
    if positions * (a + b) < a * b:
        change = F.conv2d(x, direction, None, layer.stride, layer.padding, layer.dilation)
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        signal, change = signal.flatten(2), change.flatten(2)
        gram = torch.bmm(signal.mT, signal) * torch.bmm(columns.mT, columns)
        return (signal * change).flatten(1).sum(1), gram.flatten(1).sum(1)
    pairs = []
    for one, s in zip(x.split(1), signal.split(1), strict=True):
        g = conv2d_weight(one, direction.shape, s, layer.stride, layer.padding, layer.dilation).flatten()
        pairs.append(torch.stack([g @ direction.flatten(), g @ g]))
    inner, squared = torch.stack(pairs, dim=1)
    return inner, squared


def _known(module: nn.Module) -> bool:
    match module:
        case nn.Conv2d():
            return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        case nn.BatchNorm2d():
            return not module.training and module.running_mean is not None and module.affine
        case _:
            return type(module) is nn.Linear
