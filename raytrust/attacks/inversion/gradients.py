"""The gradients that many candidate batches would have sent, and how to move the candidates so that they fit.

`per_candidate_gradients` is the definition, for any model. `GradientMatcher` computes a distance of these gradients
and its derivative with respect to the candidates, which is all that an attack needs: first the gradients g without a
graph, then the distance's derivative V = dD/dg, then the derivative of <g(x), V> with V held constant. For the layers
that it knows, <g(x), V> is one convolution with V, so nothing of a gradient's size enters a second backward pass.
"""

from __future__ import annotations

import copy
import ctypes
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Distance = Callable[[Sequence[Tensor]], Tensor]


def per_candidate_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradient of the mean cross-entropy over each candidate batch, for each parameter.

    x: (candidates, batch, channels, height, width), as the model sees images. labels: (candidates, batch).
    Returns one tensor a parameter, in the model's order, of shape (candidates, *shape), differentiable in `x`.
    Candidates do not mix, not even in a batch norm that is in training mode.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}

    def loss(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (parameters, buffers), (x,)), labels)

    grads = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    return [grads[name] for name in parameters]


def forget_batch_statistics(model: nn.Module) -> nn.Module:
    """Let batch norms in training mode use the batch's statistics without updating their running ones, in place.

    They are built from elementary operations: under vmap, the second derivative of torch's own batch norm takes the
    batch's statistics for constants (wrong by about 0.1 % in torch 2.15; so are layer and instance norm).
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

    Fast where all parameters belong to Conv2d (zero padding, one group), Linear on flat inputs, and BatchNorm2d in
    evaluation mode; any other model takes the path of `per_candidate_gradients`, with one warning. Both agree to
    rounding. The model is copied, not changed.
    """

    def __init__(self, model: nn.Module):
        self._model = forget_batch_statistics(copy.deepcopy(model)).requires_grad_(False)
        self._index = {id(p): i for i, p in enumerate(self._model.parameters())}
        unknown = [
            type(m).__name__ for m in self._model.modules() if any(True for _ in m.parameters(False)) and not _known(m)
        ]
        self.fast = not unknown
        if unknown:
            warnings.warn(f"Slow path: no rule for {', '.join(sorted(set(unknown)))}.", stacklevel=2)
            return
        _replace_batch_norms(self._model)
        self._layers = [m for m in self._model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, _FrozenBatchNorm))]
        keep_freed_memory()

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
        grads: list[Tensor] = [torch.empty(0)] * len(self._index)
        with torch.no_grad():
            for call in calls:
                for parameter, gradient in call.gradients(len(x)):
                    grads[self._index[id(parameter)]] = gradient
        for g in grads:
            g.requires_grad_()
        values = distance(grads)
        weights = torch.autograd.grad(values.sum(), grads)
        inner = torch.stack([call.inner([weights[self._index[id(p)]] for p in call.parameters]) for call in calls])
        (dx,) = torch.autograd.grad(inner.sum(), x)
        return values.detach(), dx

    def _record(self, x: Tensor, labels: Tensor) -> list[_Call]:
        """One forward and one backward pass: each layer's input and the derivative of the loss by its output."""
        calls: list[_Call] = []

        def forward_hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            call = _Call(layer, inputs[0], inputs[0]._version)
            calls.append(call)
            # A hook on the tensor sees the derivative at this point, also where a ReLU then overwrites the output.
            output.register_hook(call.take)

        handles = [layer.register_forward_hook(forward_hook) for layer in self._layers]
        try:
            logits = self._model(x.flatten(0, 1))
        finally:
            for handle in handles:
                handle.remove()
        losses = F.cross_entropy(logits, labels.flatten(), reduction="sum") / labels.shape[1]
        torch.autograd.grad(losses, x, create_graph=True)
        if len({id(c.layer) for c in calls}) < len(calls) or any(c.input._version != c.version for c in calls):
            raise ValueError(
                "Expected the model to use each layer once and to leave the inputs of its layers as they are."
            )
        return [c for c in calls if c.signal is not None]


@dataclass
class _Call:
    """One layer's part in a pass over all candidates: its input, and the derivative of the loss by its output."""

    layer: nn.Module
    input: Tensor  # (candidates * batch, ...)
    version: int
    signal: Tensor | None = None  # like the output

    def take(self, signal: Tensor) -> None:
        self.signal = signal

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.layer.parameters(recurse=False))

    def gradients(self, n: int) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter of the layer with its gradient for each of n candidates, (n, *shape)."""
        layer, signal = self.layer, self.signal
        assert signal is not None
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            columns = F.unfold(self.input, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            weight = torch.bmm(_merge(signal.flatten(2), n), _merge(columns, n).mT).view(n, *layer.weight.shape)
            biases = [_merge(signal.flatten(2), n).sum(2)]
        elif isinstance(layer, nn.Linear):
            signal, inputs = signal.unflatten(0, (n, -1)), self.input.unflatten(0, (n, -1))
            weight, biases = torch.bmm(signal.mT, inputs), [signal.sum(1)]
        else:
            assert isinstance(layer, _FrozenBatchNorm)
            total = _merge(signal.flatten(2), n).sum(2)
            product = _merge((signal * self.input).flatten(2), n).sum(2)
            weight, biases = (product - total * layer.running_mean) * layer.inverse_std, [total]
        return list(zip(self.parameters, [weight, *biases], strict=False))

    def inner(self, weights: list[Tensor]) -> Tensor:
        """The sum over candidates of <gradient of this layer's parameters, weights>, differentiable in the images."""
        layer, signal = self.layer, self.signal
        assert signal is not None
        n = len(weights[0])
        bias = weights[1] if len(weights) > 1 else None  # (n, channels)
        if isinstance(layer, nn.Conv2d):
            inputs = self.input.unflatten(0, (n, -1)).transpose(0, 1).flatten(1, 2)  # (batch, n * channels, h, w)
            kernels = weights[0].flatten(0, 1)
            product = F.conv2d(inputs, kernels, None, layer.stride, layer.padding, layer.dilation, groups=n)
            product = product.unflatten(1, (n, -1)).transpose(0, 1).flatten(0, 1)
            if bias is not None:
                product = product + _spread(bias, len(signal))
        elif isinstance(layer, nn.Linear):
            product = torch.bmm(self.input.unflatten(0, (n, -1)), weights[0].mT)
            product = (product if bias is None else product + bias[:, None]).flatten(0, 1)
        else:
            assert isinstance(layer, _FrozenBatchNorm)
            assert bias is not None
            scale = weights[0] * layer.inverse_std
            shift = bias - scale * layer.running_mean
            product = torch.addcmul(_spread(shift, len(signal)), self.input, _spread(scale, len(signal)))
        return (product * signal).sum()


class _FrozenBatchNorm(nn.Module):
    """Batch norm in evaluation mode as the affine map that it is: its second derivative costs nothing."""

    def __init__(self, module: nn.BatchNorm2d):
        super().__init__()
        self.weight, self.bias = module.weight, module.bias
        assert module.running_mean is not None
        assert module.running_var is not None
        self.running_mean = module.running_mean
        self.inverse_std = torch.rsqrt(module.running_var + module.eps)
        scale = module.weight * self.inverse_std
        self._scale = scale.view(-1, 1, 1)
        self._shift = (module.bias - module.running_mean * scale).view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self._shift, x, self._scale)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back to the system: gradients of many candidates are allocated
    in every iteration, and the page faults of fresh memory cost more than the arithmetic on it. Elsewhere, no effect.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(parameter, value)


def _known(module: nn.Module) -> bool:
    match module:
        case nn.Conv2d():
            return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        case nn.BatchNorm2d():
            return not module.training and module.affine and module.running_mean is not None
        case _:
            return type(module) is nn.Linear


def _replace_batch_norms(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _FrozenBatchNorm(child))


def _merge(x: Tensor, n: int) -> Tensor:
    """(n * batch, channels, positions) -> (n, channels, batch * positions)."""
    return x if len(x) == n else x.unflatten(0, (n, -1)).transpose(1, 2).flatten(2)


def _spread(x: Tensor, length: int) -> Tensor:
    """(n, channels) -> (length, channels, 1, 1), each row for the images of its candidate."""
    return x.repeat_interleave(length // len(x), 0)[:, :, None, None]
