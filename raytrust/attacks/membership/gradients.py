"""Of the gradients of many points, what membership needs, without ever holding one a point: inner products and norms.

Both follow layer by layer from a layer's input and the derivative of the loss by its output, so that one forward and
one backward pass over the activations serve for all points. Inner products equal those of one forward-mode product
(`torch.func.jvp`), which takes three convolutions a layer where this takes one more than the norms need anyway. Batch
norms are taken in evaluation mode, as a point has no gradient of its own otherwise.
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
        inner = torch.stack([c.inner_products([along[id(p)] for p in c.layer.parameters()]) for c in calls]).sum(0)
        squared = torch.stack([call.squared_norms() for call in calls]).sum(0)
    return losses.detach(), inner, squared


@dataclass
class _Call:
    """One layer's part in a pass: its input, (n, ...), and the derivative of the loss by its output."""

    layer: nn.Module
    input: Tensor
    signal: Tensor | None = None

    def take(self, signal: Tensor) -> None:
        self.signal = signal

    def inner_products(self, direction: Sequence[Tensor]) -> Tensor:
        """<gradient, direction> over the layer's parameters: what the layer, with the direction for its weights, would
        add to the output, times the derivative by the output. (n,)."""
        layer, signal = self.layer, self.signal
        assert signal is not None
        weight, bias = direction[0], direction[1] if len(direction) > 1 else None
        if isinstance(layer, nn.Linear):
            change = F.linear(self.input, weight, bias)
        elif isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            change = F.conv2d(self.input, weight, bias, layer.stride, layer.padding, layer.dilation)
        else:
            assert isinstance(layer, nn.BatchNorm2d)
            change = F.batch_norm(self.input, layer.running_mean, layer.running_var, weight, bias, eps=layer.eps)
        return (change * signal).flatten(1).sum(1)

    def squared_norms(self) -> Tensor:
        """|gradient|^2 over the layer's parameters, (n,) ("ghost norms", Li et al. 2022)."""
        layer, signal = self.layer, self.signal
        assert signal is not None
        if isinstance(layer, nn.Linear):
            return signal.square().sum(1) * (self.input.square().sum(1) + (layer.bias is not None))
        if isinstance(layer, nn.Conv2d):
            norms = _convolution_norms(layer, self.input, signal)
        else:
            assert isinstance(layer, nn.BatchNorm2d)
            normal = F.batch_norm(self.input, layer.running_mean, layer.running_var, eps=layer.eps)
            norms = (signal * normal).flatten(2).sum(2).square().sum(1)
        return norms if layer.bias is None else norms + signal.flatten(2).sum(2).square().sum(1)


def _convolution_norms(layer: nn.Conv2d, x: Tensor, signal: Tensor) -> Tensor:
    """|S C^T|^2 for the signal S (a, positions) and the columns C (b, positions) of each of n images: (n,).

    As <S^T S, C^T C> where that takes fewer products, else from the layer's gradient, one image at a time (Bu et al.
    2022 mix the two alike, by memory).
    """
    assert not isinstance(layer.padding, str)
    a, b, positions = len(layer.weight), layer.weight[0].numel(), signal[0, 0].numel()
    if positions * (a + b) < a * b:
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        signal = signal.flatten(2)
        return (torch.bmm(signal.mT, signal) * torch.bmm(columns.mT, columns)).flatten(1).sum(1)
    options = (layer.weight.shape, layer.stride, layer.padding, layer.dilation)
    grads = (
        conv2d_weight(one, options[0], s, *options[1:]) for one, s in zip(x.split(1), signal.split(1), strict=True)
    )
    return torch.stack([g.square().sum() for g in grads])


def _known(module: nn.Module) -> bool:
    match module:
        case nn.Conv2d():
            return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        case nn.BatchNorm2d():
            return not module.training and module.running_mean is not None and module.affine
        case _:
            return type(module) is nn.Linear
