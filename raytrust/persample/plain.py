"""The slow path, and the definition: gradients of one candidate after another by plain autograd, for any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from raytrust.config import ONE_STEP, LocalConfig
from raytrust.networks.kernels import sound_kernels
from raytrust.networks.task import CROSS_ENTROPY, Sample, Targets, Task, in_dtype, row_of

Distance = Callable[[Sequence[Tensor]], Tensor]


def per_candidate_gradients(
    model: nn.Module, x: Tensor, labels: Targets, task: Task = CROSS_ENTROPY, local: LocalConfig = ONE_STEP
) -> list[Tensor]:
    """The gradient of the loss of each candidate batch, for each parameter, or the pseudo-gradient of local steps.

    x: (candidates, batch, channels, height, width), as the model sees images; in the dtype to compute in. labels:
    (candidates, batch), or the probabilities of the classes, (candidates, batch, classes), or what else the task takes.
    Returns one tensor a parameter, in the model's order, of shape (candidates, *shape), differentiable in `x` and in
    probabilities; zeros for a frozen parameter, as in training. Candidates do not mix, not even in a batch norm that is
    in training mode, and the model is left as it was.
    """
    rows = [gradient for _, gradient in _one_by_one(model, x, labels, task, x.dtype, local, create_graph=True)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _one_by_one(
    model: nn.Module,
    x: Tensor,
    labels: Targets,
    task: Task,
    dtype: torch.dtype,
    local: LocalConfig,
    create_graph: bool = False,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Loss and gradient of each candidate batch, the means along its local steps."""
    names, trained = [name for name, _ in model.named_parameters()], are_trained(model)
    precision = precision_of(model)
    # Not by vmap: under it, torch takes a norm layer's statistics for constants in second derivatives.
    for i, images in enumerate(x.to(dtype)):
        targets = with_inputs_in(row_of(labels, i), dtype)
        weights = [p.detach().to(dtype).requires_grad_() for p in model.parameters()]
        # Buffers are cloned, so that what a layer in training mode writes to them is gone with the candidate.
        buffers = model.named_buffers()
        state = {name: b.to(dtype, copy=True) if b.is_floating_point() else b.clone() for name, b in buffers}
        losses, gradients = [], []
        for rows in local.rows(len(images)):
            state.update(zip(names, weights, strict=True))
            network = partial(_called, model, state)
            with DifferentiableTwice() if create_graph else nullcontext():
                loss = task.batch_loss(network, images[rows], row_of(targets, rows), precision)
            slopes = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
            triples = zip(slopes, weights, trained, strict=True)
            losses.append(loss.detach())
            gradients.append([torch.zeros_like(w) if g is None or not t else g for g, w, t in triples])
            pairs = zip(weights, gradients[-1], strict=True)
            # What depends on the images already must stay so; without a graph the weights are leaves again.
            moved = [w - local.learning_rate * g for w, g in pairs]
            weights = moved if create_graph else [w.detach().requires_grad_() for w in moved]
        yield mean(losses), [mean(column) for column in zip(*gradients, strict=True)]


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Of the steps; of one step its own, to the bit."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(0)


class DifferentiableTwice(TorchFunctionMode):
    """Within, what torch has no second derivative of is computed by what it has one of.

    It has none of fused attention and of the hard sigmoid (MobileNetV3).
    """

    def __enter__(self) -> Any:
        self._attention = sdpa_kernel(SDPBackend.MATH)
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return F.relu6(args[0] + 3) / 6 if func is F.hardsigmoid else func(*args, **(kwargs or {}))


def _called(model: nn.Module, state: dict[str, Tensor], *args: Any, **named: Any) -> Any:
    return functional_call(model, state, args, named)


def precision_of(model: nn.Module) -> torch.dtype:
    """That of the model's own weights, but at least float32."""
    return reduce(torch.promote_types, (p.dtype for p in model.parameters()), torch.float32)


def with_inputs_in(targets: Targets, dtype: torch.dtype) -> Targets:
    return Sample(targets.target, in_dtype(targets.inputs, dtype)) if isinstance(targets, Sample) else targets


def are_trained(model: nn.Module) -> list[bool]:
    """Whether each parameter is trained: those that require gradients, or all of a model that is frozen throughout."""
    trained = [p.requires_grad for p in model.parameters()]
    return trained if any(trained) else [True] * len(trained)


class PlainPath:
    """What the engine asks for, by plain autograd in `dtype`."""

    # The model itself and no copy, as what is closed over by its hooks would not be copied with it.
    def __init__(self, model: nn.Module, dtype: torch.dtype, task: Task, local: LocalConfig = ONE_STEP):
        self.model, self._dtype, self._task, self._local = model, dtype, task, local

    def gradients(self, x: Tensor, labels: Targets) -> tuple[Tensor, Iterable[tuple[int, Tensor]]]:
        """The losses (n,), and the gradients (n, *shape) by their parameter's place in the model."""
        with sound_kernels(self.model):
            losses, rows = zip(*self._gradients(x, labels), strict=True)
        return torch.stack(losses), enumerate(torch.stack(column) for column in zip(*rows, strict=True))

    def _gradients(self, x: Tensor, labels: Targets) -> Iterator[tuple[Tensor, list[Tensor]]]:
        return _one_by_one(self.model, x, labels, self._task, self._dtype, self._local)

    def match(
        self, x: Tensor, labels: Targets, distance: Distance, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The distances (n,), and the derivatives of their sum by the leaves that x and labels come from."""
        with sound_kernels(self.model):
            values = distance(per_candidate_gradients(self.model, x.to(self._dtype), labels, self._task, self._local))
            return values.detach(), derivatives([values], leaves, [torch.ones_like(values)])


def derivatives(outputs: Sequence[Tensor], leaves: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Of the weighted sum of the outputs, by each leaf; zeros where it has no part in them."""
    slopes = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return [torch.zeros_like(t) if s is None else s for t, s in zip(leaves, slopes, strict=True)]
