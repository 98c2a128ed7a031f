"""Local steps, simulated from the candidate images for all candidates at once, and differentiated through.

A worker that makes several steps before it sends leaves the weights that the layers' rules and ghosts are made for:
from the second step on each candidate has weights of its own, which depend on its images. So the steps are written as
a function of one candidate, w <- w - rate * grad loss(w, images of the step), and `torch.func` runs it for all of them.
Geiping et al. 2020, section 6 ("Federated averaging") unroll local steps so, for one candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from raytrust.config import LocalConfig
from raytrust.networks.build import copy_of
from raytrust.networks.kernels import sound_kernels
from raytrust.networks.task import Targets, Task, row_of
from raytrust.persample.plain import (
    DifferentiableTwice,
    Distance,
    are_trained,
    derivatives,
    mean,
    precision_of,
    with_inputs_in,
)


class Elementary(DifferentiableTwice):
    """Within, a batch norm is built from elementary operations, and keeps no statistics of what it is given.

    Under vmap torch refuses one that would keep statistics, and of others it takes the batch's statistics for constants
    in second derivatives: slopes of a ResNet-18 are off by 2 %.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    shape = (1, -1, *(1 for _ in range(x.ndim - 2)))
    if training or running_mean is None or running_var is None:
        variance, centre = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0, keepdim=True)
    else:
        centre, variance = running_mean.view(shape), running_var.view(shape)
    normal = (x - centre) * torch.rsqrt(variance + eps)
    normal = normal if weight is None else normal * weight.view(shape)
    return normal if bias is None else normal + bias.view(shape)


class UnrolledPath:
    """What the engine asks for, of pseudo-gradients, in `dtype`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, task: Task, local: LocalConfig):
        self._task, self._local, self._precision = task, local, precision_of(model)
        trained = [name for (name, _), t in zip(model.named_parameters(), are_trained(model), strict=True) if t]
        self._model = copy_of(model).to(dtype).requires_grad_(False)
        self._dtype = dtype
        self._weights = {name: p for name, p in self._model.named_parameters() if name in trained}
        self._places = {name: i for i, (name, _) in enumerate(self._model.named_parameters())}
        self._shapes = [p.shape for p in self._model.parameters()]

    def gradients(self, x: Tensor, labels: Targets) -> tuple[Tensor, Iterable[tuple[int, Tensor]]]:
        """The mean losses along the steps (n,), and the pseudo-gradients (n, *shape) by their parameter's place."""
        losses, found = self._run(x.detach(), labels)
        return losses.detach(), [(self._places[name], gradient.detach()) for name, gradient in found.items()]

    def match(
        self, x: Tensor, labels: Targets, distance: Distance, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The distances (n,), and the derivatives of their sum by the leaves that x and labels come from."""
        _, found = self._run(x, labels)
        gradients = [x.new_zeros((), dtype=self._dtype).expand(len(x), *shape) for shape in self._shapes]
        for name, gradient in found.items():
            gradients[self._places[name]] = gradient
        values = distance(gradients)
        return values.detach(), derivatives([values], leaves, [torch.ones_like(values)])

    def _run(self, x: Tensor, labels: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        rows, x, labels = self._local.rows(x.shape[1]), x.to(self._dtype), with_inputs_in(labels, self._dtype)
        if len(x) == 1:
            # A candidate by itself needs no vmap, which takes up to twice the time.
            with sound_kernels(self._model), DifferentiableTwice(), torch.enable_grad():
                loss, found = self._steps(rows, x[0], row_of(labels, 0), self._by_autograd)
            return loss[None], {name: g[None] for name, g in found.items()}
        with sound_kernels(self._model), Elementary():
            return vmap(partial(self._steps, rows, step=grad_and_value(self._loss)))(x, labels)

    def _steps(
        self, rows: Sequence[Any], images: Tensor, targets: Targets, step: Callable[..., Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of one candidate: the mean loss and gradient along its local steps.

        step: (weights, images, targets) -> (gradient, loss) of one of them.
        """
        weights, losses, gradients = self._weights, [], []
        for some in rows:
            slopes, loss = step(weights, images[some], row_of(targets, some))
            weights = {name: w - self._local.learning_rate * slopes[name] for name, w in weights.items()}
            losses.append(loss)
            gradients.append(slopes)
        return mean(losses), {name: mean([g[name] for g in gradients]) for name in self._weights}

    def _by_autograd(
        self, weights: dict[str, Tensor], images: Tensor, targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        # Not `torch.func`, whose second derivatives of a batch norm are those of `Elementary`'s docstring.
        weights = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in weights.items()}
        loss = self._loss(weights, images, targets)
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        return dict(zip(weights, slopes, strict=True)), loss

    def _loss(self, weights: dict[str, Tensor], images: Tensor, targets: Targets) -> Tensor:
        # Buffers are cloned, as a layer in training mode writes to them.
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}

        def network(*args: Any, **named: Any) -> Any:
            return functional_call(self._model, {**buffers, **weights}, args, named)

        return self._task.batch_loss(network, images, targets, self._precision)
