"""What functions do with weights: one rule a function, which calls it and records the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.persample.attention import attention
from raytrust.persample.ghost import GhostGradient
from raytrust.persample.products import Product
from raytrust.persample.rules import convolution, convolve_layer, linear, norm, normalise, normalise_groups, scaled
from raytrust.persample.watch import Watch
from raytrust.persample.windows import Geometry

FUNCTIONS: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: attention}


def _function(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS.update(dict.fromkeys(functions, rule))
        return rule

    return register


@_function(F.linear)
def _linear(watch: Watch, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if watch.weight(weight) is None and weight.requires_grad:
        raise ValueError("no rule for a weight that depends on the image")
    return watch.record(linear, input, F.linear(input, weight, bias), weight=weight, bias=bias)


@_function(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(watch: Watch, a: Tensor, b: Tensor) -> Any:
    with watch:
        if watch.weight(b) is not None and b.ndim == 2:
            return F.linear(a, b.mT)
    return watch.paired(torch.matmul, (a, b), {})


@_function(F.embedding)
def _embedding(
    watch: Watch, input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **named: Any
) -> Tensor:
    site = watch.site(_rows_of_table, weight=weight)
    site.padding = padding_idx
    return watch.tape.recorded(site, input, F.embedding(input, weight, padding_idx, *rest, **named))


def _rows_of_table(site: Any, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    entries, width = site.weight.shape
    rows = inputs.reshape(n, -1)
    if site.padding is not None:
        signals = signals * (inputs != site.padding)[..., None]
    table = signals.new_zeros(n, entries, width)
    return {"weight": table.scatter_add(1, rows[..., None].expand(-1, -1, width), signals.reshape(n, -1, width))}


@_function(F.layer_norm)
def _layer_norm(
    watch: Watch, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    return _affine(watch, F.layer_norm(input, normalized_shape, eps=eps), weight, bias)


@_function(F.rms_norm)
def _rms_norm(watch: Watch, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
    return _affine(watch, F.rms_norm(input, normalized_shape, eps=eps), weight, None)


def _affine(watch: Watch, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight is None:
        with watch:
            return x + bias
    output = x * weight if bias is None else torch.addcmul(bias, x, weight)
    return watch.record(_sums, x, output, weight=weight, bias=bias)


def _sums(site: Any, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    shape, dtype = (n, -1, *site.weight.shape), torch.promote_types(signals.dtype, torch.float32)
    sums = {"weight": signals * inputs, "bias": signals}
    return {name: s.reshape(shape).sum(1, dtype=dtype) for name, s in sums.items()}


@_function(F.group_norm)
def _group_norm(
    watch: Watch, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    return _by_channels(watch, normalise_groups(input, num_groups, eps), weight, bias)


@_function(F.instance_norm)
def _instance_norm(
    watch: Watch,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    normal = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _by_channels(watch, normal, weight, bias)


def _by_channels(watch: Watch, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    site = watch.site(norm, weight=weight, bias=bias)
    site.running_mean, site.training = None, False
    return watch.tape.recorded(site, x, scaled(x, weight, bias))


@_function(F.batch_norm)
def _batch_norm(
    watch: Watch,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    site = watch.site(norm, weight=weight, bias=bias)
    vars(site).update(running_mean=running_mean, running_var=running_var, training=training, eps=eps)
    # No running statistics are updated, and candidates do not mix.
    x, output = normalise(site, input, watch.tape.candidates)
    return watch.tape.recorded(site, x, output) if site._places else output


def _ints(value: Any, count: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * count


@_function(torch.conv2d)
def _conv2d(
    watch: Watch,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if watch.weight(weight) is None and weight.requires_grad:
        raise ValueError("no rule for a weight that depends on the image")
    site, step = watch.site(convolution, weight=weight, bias=bias), _ints(dilation, 2)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(step, weight.shape[2:], strict=True)]
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        input, padding = F.pad(input, sides), 0
    geometry = Geometry(_ints(stride, 2), _ints(padding, 2), step, groups)
    vars(site).update(geometry._asdict(), padding_mode="zeros")
    return watch.tape.recorded(site, *convolve_layer(site, input, watch.tape.candidates))


@_function(torch.conv_transpose2d)
def _transposed2d(
    watch: Watch,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    site = watch.site(_of_transposed, weight=weight, bias=bias)
    site.geometry = Geometry(_ints(stride, 2), _ints(padding, 2), _ints(dilation, 2), groups)
    output = torch.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return watch.tape.recorded(site, input, output)


def _of_transposed(site: Any, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    """That of the convolution which this is the transpose of: of it, signals are what goes in."""
    product = Product(signals, inputs, n, site.weight.shape, site.geometry)
    return {
        "weight": GhostGradient(product) if product.windowed else product.dense,
        "bias": signals.unflatten(0, (n, -1)).sum((1, 3, 4)),
    }


def _as_plane(of_planes: Callable[..., Any]) -> Callable[..., Any]:
    """One dimension as two, of which the first is 1; sizes are by name or in the order of `names`."""

    def rule(watch: Watch, input: Tensor, weight: Tensor, bias: Any = None, *rest: Any, **named: Any) -> Tensor:
        names = list(inspect.signature(of_planes).parameters)[4:]
        named.update(zip(names, rest, strict=False))
        for name, along in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1)):
            if name in named and not isinstance(named[name], str):
                named[name] = (along, *_ints(named[name], 1))
        with watch:
            weight = weight.unsqueeze(2)
        return of_planes(watch, input.unsqueeze(2), weight, bias, **named).squeeze(2)

    return rule


_function(torch.conv1d)(_as_plane(_conv2d))
_function(torch.conv_transpose1d)(_as_plane(_transposed2d))


@_function(torch.prelu)
def _prelu(watch: Watch, input: Tensor, weight: Tensor) -> Tensor:
    with watch:
        below = input * weight.view(-1, *[1] * (input.ndim - 2))
    return torch.where(input > 0, input, below)
