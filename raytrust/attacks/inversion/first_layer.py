"""Which models give a private image away by one linear system: `closed_form`.

The gradient of a linear layer's weight is S^T X: the layer's inputs X, position by position, and the signals S that
come back to its outputs. Where something learned is added to that output at every position, the gradient of it is S
itself: of a layer on the flat image the bias (Phong et al. 2018), of a patch embedding the learned position embedding
(Lu et al. 2022, "APRIL"). Then X, and with it the image, is all that is unknown.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raytrust.networks.build import copy_of
from raytrust.networks.task import CROSS_ENTROPY, Targets, Task, row_of

# Relative to the largest entry: what float32 leaves of equal gradients that are summed in another order.
TOLERANCE = 1e-3
# Rows of a parameter that begin like the signal, which are looked at: a class token or two come before the patches.
MOST_STARTS = 32


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """Where a model's gradient holds its image.

    layer: the name of the linear layer or convolution that takes the image, or what is linear in it. signal: the name
    of the parameter whose gradient holds the signals, and entries: where in it, flat, (positions, outputs).
    """

    layer: str
    signal: str
    entries: Tensor

    @property
    def weight(self) -> str:
        return f"{self.layer}.weight"

    @property
    def flat(self) -> bool:
        """Whether it is a linear layer on the flat image, whose bias has the signal."""
        return self.signal == f"{self.layer}.bias" and len(self.entries) == 1


def closed_form(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    batch_size: int = 1,
    task: Task = CROSS_ENTROPY,
    targets: Targets | None = None,
) -> ClosedForm | None:
    """Find the closed form of a model, for images (channels, height, width) and by two passes; None if it has none. Of
    several images only a linear layer on the flat image gives them away, see `raytrust.attacks.inversion.separation`.

    Decided by what random images do to derivatives, not by names. Parameters that are frozen are not sent, and give no
    signal. targets: of the private batch, for what the model takes besides images. The model stays as it is.
    """
    # What a model raises for noise, or in another precision, is no reason to refuse it the other attacks.
    try:
        form = _closed_form(model, image_shape, task, targets)
    except Exception as error:
        # Said, as a transformer that is not solved for may look private.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"No closed form of the model was looked for: {reason}", stacklevel=2)
        return None
    # Of several images the gradients are sums over all, which a position embedding's does not tell apart.
    return form if form is None or batch_size == 1 or form.flat else None


def _closed_form(
    model: nn.Module, image_shape: tuple[int, int, int], task: Task, targets: Targets | None
) -> ClosedForm | None:
    generator = torch.Generator().manual_seed(0)
    model = copy_of(model).cpu().float().eval()
    with torch.no_grad():
        # Untrained transformers may begin with a classifier of zeros, behind which every signal is zero.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    images = torch.randn((2, *image_shape), generator=generator)
    call = partial(task.output, model, targets=torch.empty(0) if targets is None else row_of(targets, slice(1)))
    # Few layers see the image as it is, and to look at all others takes minutes for a large network.
    near = _affine_layers(model, call, images)
    if not near:
        return None
    first, second = (_Pass(model, call, x[None]) for x in images)
    for name in near:
        form = _form(first, name) if name in first.inputs and f"{name}.weight" in first.gradients else None
        # The second image tells what is always so from a coincidence.
        if form is not None and second.agrees(form):
            return form
    return None


def patches(layer: nn.Module, entered: Tensor) -> Tensor:
    """What a layer's weight is multiplied with: (positions, inputs), for a batch of one."""
    if isinstance(layer, nn.Conv2d):
        sizes = {key: getattr(layer, key) for key in ("kernel_size", "dilation", "padding", "stride")}
        return F.unfold(entered, **sizes)[0].T
    return entered.reshape(-1, entered.shape[-1])


class _Entered(Exception):
    """Carries the input of a layer out of the model that calls it."""


def entered_patches(model: nn.Module, call: Any, name: str, image: Tensor) -> Tensor:
    """The `patches` of the layer of this name, for a batch of one; the model runs no further than that."""
    layer = model.get_submodule(name)

    def leave(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Entered(inputs[0])

    handle = layer.register_forward_pre_hook(leave)
    try:
        call(image)
    except _Entered as entered:
        return patches(layer, entered.args[0])
    finally:
        handle.remove()
    raise ValueError(f"Expected the model to call its layer {name!r}.")


class _Pass:
    """One image through the model and back: what entered which layer, the signal at its output, and all gradients."""

    def __init__(self, model: nn.Module, call: Any, image: Tensor):
        self.inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str) -> None:
            if name not in self.inputs and inputs:
                self.inputs[name], outputs[name] = patches(layer, inputs[0]).detach(), output

        layers = {n: m for n, m in model.named_modules() if _is_linear(m) and m.weight.requires_grad}
        handles = [m.register_forward_hook(partial(note, name=n)) for n, m in layers.items()]
        result = call(image)
        for handle in handles:
            handle.remove()
        generator = torch.Generator().manual_seed(1)
        leaves = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
        # Weighed at random, since the sum of a softmax, or of what was normalised, has no slope.
        loss = sum(((x * torch.randn(x.shape, generator=generator)).sum() for x in leaves), torch.zeros(()))
        sent = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wanted = [*sent.values(), *outputs.values()]
        slopes = torch.autograd.grad(loss, wanted, allow_unused=True) if leaves else [None] * len(wanted)
        given = [torch.zeros_like(x) if s is None else s for x, s in zip(wanted, slopes, strict=True)]
        self.gradients = dict(zip(sent, given, strict=False))
        at_outputs = dict(zip(outputs, given[len(sent) :], strict=True))
        # Of a convolution channels come first, of a linear layer last.
        self.signals = {
            name: s[0].flatten(1).T if isinstance(layers[name], nn.Conv2d) else s.reshape(-1, s.shape[-1])
            for name, s in at_outputs.items()
        }

    def agrees(self, form: ClosedForm) -> bool:
        """Whether the weight's gradient is S^T X, with the S that the form says."""
        signal, x = self.gradients[form.signal].flatten()[form.entries], self.inputs[form.layer]
        return _equal(signal, self.signals[form.layer]) and _equal(signal.T @ x, self.gradients[form.weight].flatten(1))


def _form(seen: _Pass, name: str) -> ClosedForm | None:
    """The first parameter whose gradient holds the signal at this layer's output, position by position."""
    signal = seen.signals[name]
    positions, outputs = signal.shape
    for parameter, gradient in seen.gradients.items():
        if gradient.numel() < signal.numel() or gradient.numel() % outputs:
            continue
        places = torch.arange(gradient.numel())
        layouts = [places.view(-1, outputs)]
        if gradient.numel() == signal.numel():
            layouts.append(places.view(outputs, -1).T)
        for rows in layouts:
            # Class tokens may come before: looked for by the first position's signal alone, as there may be many rows.
            begins = (gradient.flatten()[rows[: len(rows) - positions + 1]] - signal[0]).abs().amax(1)
            near = begins <= TOLERANCE * signal[0].abs().max()
            for start in near.nonzero().flatten().tolist()[:MOST_STARTS]:
                form = ClosedForm(name, parameter, rows[start : start + positions])
                if seen.agrees(form):
                    return form
    return None


@torch.no_grad()
def _affine_layers(model: nn.Module, call: Any, images: Tensor) -> list[str]:
    """The linear layers whose input is affine in the image, and not constant."""
    one, other = images
    ends: list[dict[str, Tensor]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        if inputs:
            ends[-1].setdefault(name, inputs[0])

    layers = {n: m for n, m in model.named_modules() if _is_linear(m) and isinstance(m.weight, nn.Parameter)}
    handles = [m.register_forward_pre_hook(partial(note, name=n)) for n, m in layers.items()]
    for x in (one, other, one + other, torch.zeros_like(one)):
        ends.append({})
        call(x[None])
    for handle in handles:
        handle.remove()

    def is_affine(name: str) -> bool:
        a, b, both, blank = (end[name] for end in ends)
        return _equal(a + b, both + blank) and not _equal(a, blank)

    return [name for name in ends[0] if is_affine(name)]


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _equal(one: Tensor, other: Tensor) -> bool:
    # Two zeros agree, but say nothing: a signal that is zero everywhere is none.
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max()) and bool(other.any())
