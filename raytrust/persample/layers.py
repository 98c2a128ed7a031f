"""Layers rebuilt for gradient matching: they record what their gradients are made of, and no pass does needless work.

A parameter's gradient is a sum of products of the layer's input and its signal, the derivative of the loss by its
output: the rebuilt layers record both. Under double backward torch's convolution also computes the derivative by its
weights, which no attack asks for, and its batch norm makes a dozen passes over memory: both are replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.persample.windows import Convolve, Geometry


@dataclass(eq=False)
class Call:
    """One layer's part in a pass over all candidates."""

    layer: Recorded
    input: Tensor  # (candidates * batch, ...)
    version: int  # of the input, which nothing may overwrite
    signal: Tensor | None = None  # like the output

    def take(self, signal: Tensor) -> None:
        self.signal = signal


class Tape:
    """What the layers of one model share: the calls of a pass, and how many candidates it is for."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.candidates = 1


class Recorded(nn.Module):
    """A layer whose calls are recorded on a tape."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tape: Tape):
        super().__init__()
        self.weight, self.bias, self.tape = weight, bias, tape

    def record(self, x: Tensor, output: Tensor) -> Tensor:
        call = Call(self, x, x._version)
        self.tape.calls.append(call)
        # A hook on the tensor sees the derivative at this point, also where a ReLU then overwrites the output.
        output.register_hook(call.take)
        return output


class Convolution(Recorded):
    """nn.Conv2d with zero padding."""

    def __init__(self, module: nn.Conv2d, tape: Tape):
        super().__init__(module.weight, module.bias, tape)
        assert not isinstance(module.padding, str)
        self.geometry = Geometry(module.stride, module.padding, module.dilation, module.groups)

    def forward(self, x: Tensor) -> Tensor:
        y = Convolve.apply(x, self.weight, self.geometry)
        return self.record(x, y if self.bias is None else y + self.bias.view(-1, 1, 1))


class Linear(Recorded):
    """nn.Linear on (n, ..., features)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.record(x, F.linear(x, self.weight, self.bias))


class Affine(Recorded):
    """weight * (x - mean) * inverse_std + bias for each channel: what a norm does once its statistics are fixed."""

    def __init__(self, module: nn.Module, mean: Tensor, inverse_std: Tensor, tape: Tape):
        super().__init__(module.weight, module.bias, tape)  # type: ignore[arg-type]
        self.mean, self.inverse_std = mean, inverse_std
        assert self.bias is not None
        scale = self.weight.detach() * inverse_std
        self.register_buffer("scale", scale)
        self.register_buffer("shift", self.bias.detach() - mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return self.record(x, torch.addcmul(self.shift.view(shape), x, self.scale.view(shape)))  # type: ignore[operator]


class BatchStandardise(nn.Module):
    """Batch norm by the statistics of each candidate's batch, without weight and bias; no running ones are updated."""

    def __init__(self, eps: float, tape: Tape):
        super().__init__()
        self.eps, self.tape = eps, tape

    def forward(self, x: Tensor) -> Tensor:
        each = x.unflatten(0, (self.tape.candidates, -1))
        over = [1, *range(3, each.ndim)]
        centred = each - each.mean(over, keepdim=True)
        return (centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + self.eps)).flatten(0, 1)


def rebuild(module: nn.Module, tape: Tape) -> nn.Module:
    """The module from layers that record on `tape`; shares its parameters, and is changed in place where it has
    children. What it has no rule for stays as it is: `unknown` names it.
    """
    for name, child in module.named_children():
        setattr(module, name, rebuild(child, tape))
    match module:
        case nn.Conv2d() if module.padding_mode == "zeros" and not isinstance(module.padding, str):
            return Convolution(module, tape)
        case nn.Linear() if type(module) is nn.Linear:
            return Linear(module.weight, module.bias, tape)
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            return _rebuild_batch_norm(module, tape)
        case nn.GroupNorm() if module.affine:
            bare = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, affine=False)
            return nn.Sequential(bare, _without_statistics(module, tape))
        case _:
            return module


def _rebuild_batch_norm(module: nn.modules.batchnorm._BatchNorm, tape: Tape) -> nn.Module:
    if module.training or module.running_mean is None:
        standardise = BatchStandardise(module.eps, tape)
        return nn.Sequential(standardise, _without_statistics(module, tape)) if module.affine else standardise
    if not module.affine:
        return module
    assert module.running_var is not None
    return Affine(module, module.running_mean, torch.rsqrt(module.running_var + module.eps), tape)


def _without_statistics(module: nn.Module, tape: Tape) -> Affine:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return Affine(module, torch.zeros_like(weight), torch.ones_like(weight), tape)


def unknown(model: nn.Module) -> list[str]:
    """The types of the modules in a rebuilt model that hold parameters and have no rule."""
    plain = [m for m in model.modules() if not isinstance(m, Recorded)]
    return sorted({type(m).__name__ for m in plain if any(True for _ in m.parameters(recurse=False))})
