"""What the gradients of a layer's parameters are made of: one small rule a layer type, and a way to register more.

README.md in this folder says what a rule is and how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.persample.ghost import GhostGradient
from raytrust.persample.products import ChannelSums, Product
from raytrust.persample.windows import Convolve, Geometry

Gradients = Callable[[Any, Tensor, Tensor, int], dict[str, Tensor]]
Forward = Callable[[Any, Tensor, int], tuple[Tensor, Tensor]]


class Rule(NamedTuple):
    gradients: Gradients
    forward: Forward | None


RULES: dict[type[nn.Module], Rule] = {}


def register_rule(*types: type[nn.Module], forward: Forward | None = None) -> Callable[[Gradients], Gradients]:
    """Make the decorated function the rule of these layer types, in which subclasses have no part.

    The function takes (layer, inputs, signals, n): what went into the layer and the derivative of the loss by what came
    out, for the images of n candidates, one candidate after another. It returns the gradients by the parameters' names,
    (n, *shape) each, differentiable in inputs and signals.

    forward: replaces the layer's own in the engine's copy. It takes (layer, x, n) and returns what the rule is to have
    for inputs, and the output.
    """

    def register(gradients: Gradients) -> Gradients:
        RULES.update(dict.fromkeys(types, Rule(gradients, forward)))
        return gradients

    return register


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule that is true of this layer, None if there is none."""
    # A subclass may have another forward. Hooks (weight_norm's among them), a parametrisation (which makes a subclass)
    # and a forward of the object's own change what comes out. So only the exact, untouched type is known.
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    touched = "forward" in vars(layer) or any(getattr(layer, name) for name in hooks)
    return None if touched else RULES.get(type(layer))


def _weight_and_bias(layer: Any, product: Product) -> dict[str, Tensor]:
    # Over many positions the factors are longer than the gradient, which then is formed at once.
    weight = GhostGradient(product) if product.windowed else product.dense
    return {"weight": weight} if layer.bias is None else {"weight": weight, "bias": product.bias}


@register_rule(nn.Linear)
def linear(layer: Any, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    """On (..., features)."""
    return _weight_and_bias(layer, Product(inputs, signals, n, layer.weight.shape, None))


def _geometry(layer: Any) -> Geometry:
    padding = (0, 0) if _is_padded_before(layer) else layer.padding
    return Geometry(layer.stride, padding, layer.dilation, layer.groups)


def _is_padded_before(layer: Any) -> bool:
    return isinstance(layer.padding, str) or layer.padding_mode != "zeros"


def convolve_layer(layer: Any, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    if _is_padded_before(layer):
        mode = layer.padding_mode.replace("zeros", "constant")
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    # Under double backward torch's convolution also computes the derivative by its weight, which nobody asks for.
    y = Convolve.apply(x, layer.weight, _geometry(layer))
    return x, y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


@register_rule(nn.Conv2d, forward=convolve_layer)
def convolution(layer: Any, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    """With any padding, in groups or not."""
    return _weight_and_bias(layer, Product(inputs, signals, n, layer.weight.shape, _geometry(layer)))


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)


def running(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and 1 / standard deviation of a batch norm that normalises by running statistics, which are constants."""
    if isinstance(layer, nn.GroupNorm) or layer.training or layer.running_mean is None:
        return None
    return layer.running_mean, torch.rsqrt(layer.running_var + layer.eps)


def normalise(layer: Any, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    # torch's batch norm makes a dozen passes over memory under double backward, and would mix candidates.
    scale, shift, statistics = layer.weight, layer.bias, running(layer)
    if statistics is not None:
        scale = statistics[1] if scale is None else scale * statistics[1]
        shift = -statistics[0] * scale if shift is None else shift - statistics[0] * scale
    elif isinstance(layer, nn.GroupNorm):
        x = normalise_groups(x, layer.num_groups, layer.eps)
    else:
        # By each candidate's own batch; no running statistics are updated.
        each = x.unflatten(0, (n, -1))
        over = [1, *range(3, each.ndim)]
        centred = each - each.mean(over, keepdim=True)
        x = (centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + layer.eps)).flatten(0, 1)
    return x, x if scale is None else scaled(x, scale, shift)


def normalise_groups(x: Tensor, groups: int, eps: float) -> Tensor:
    # Centred first, which changes nothing but rounding: where the mean is 30 times the deviation, torch's second
    # derivatives lose three digits in float32.
    each = x.unflatten(1, (groups, -1))
    centred = (each - each.mean(list(range(2, each.ndim)), keepdim=True)).flatten(1, 2)
    return F.group_norm(centred, groups, eps=eps)


def scaled(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """By channels."""
    shape = (-1, *[1] * (x.ndim - 2))
    scale = scale.to(x.dtype).view(shape)
    return x * scale if shift is None else torch.addcmul(shift.to(x.dtype).view(shape), x, scale)


@register_rule(*NORMS, forward=normalise)
def norm(layer: Any, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    """Of weight * normal + bias, by any statistics; running ones are still to be applied to the inputs."""
    total, product = ChannelSums.apply(inputs, signals, n)
    if (statistics := running(layer)) is not None:
        product = (product - total * statistics[0]) * statistics[1]
    return {"weight": product, "bias": total}
