"""The slow path, and the definition: gradients of one candidate after another by plain autograd, for any model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Distance = Callable[[Sequence[Tensor]], Tensor]


def per_candidate_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradient of the mean cross-entropy over each candidate batch, for each parameter.

    x: (candidates, batch, channels, height, width), as the model sees images. labels: (candidates, batch), or the
    probabilities of the classes, (candidates, batch, classes). Returns one tensor a parameter, in the model's order, of
    shape (candidates, *shape), differentiable in `x` and in probabilities; zeros for a frozen parameter, as in
    training. Candidates do not mix, not even in a batch norm that is in training mode, and the model is left as it was.
    """
    rows = [gradient for _, gradient in _one_by_one(model, x, labels, create_graph=True)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _one_by_one(
    model: nn.Module, x: Tensor, labels: Tensor, create_graph: bool = False
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Loss and gradient of each candidate batch."""
    names, weights = zip(*model.named_parameters(), strict=True)
    trained = are_trained(model)
    # Not by vmap: under it, torch takes a norm layer's statistics for constants in second derivatives.
    for images, targets in zip(x.to(weights[0].dtype), labels, strict=True):
        parameters = [w.detach().requires_grad_(t) for w, t in zip(weights, trained, strict=True)]
        state = {name: b.clone() for name, b in model.named_buffers()} | dict(zip(names, parameters, strict=True))
        loss = F.cross_entropy(functional_call(model, state, (images,)), targets)
        leaves = [p for p in parameters if p.requires_grad]
        slopes = iter(torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True))
        gradient = [next(slopes) if t else None for t in trained]
        yield (
            loss.detach(),
            [torch.zeros_like(p) if g is None else g for g, p in zip(gradient, parameters, strict=True)],
        )


def are_trained(model: nn.Module) -> list[bool]:
    """Whether each parameter is trained: those that require gradients, or all of a model that is frozen throughout."""
    trained = [p.requires_grad for p in model.parameters()]
    return trained if any(trained) else [True] * len(trained)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of layers whose weight was computed by a hook, as `weight_norm` does: deepcopy refuses it."""
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


class PlainPath:
    """What the engine asks for, by plain autograd."""

    def __init__(self, model: nn.Module):
        self.model = model

    def gradients(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[tuple[int, Tensor]]]:
        """The losses (n,), and the gradients (n, *shape) by their parameter's place in the model."""
        losses, rows = zip(*_one_by_one(self.model, x, labels), strict=True)
        return torch.stack(losses), enumerate(torch.stack(column) for column in zip(*rows, strict=True))

    def match(
        self, x: Tensor, labels: Tensor, distance: Distance, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The distances (n,), and the derivatives of their sum by the leaves that x and labels come from."""
        values = distance(per_candidate_gradients(self.model, x, labels))
        slopes = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
        return values.detach(), [torch.zeros_like(t) if s is None else s for t, s in zip(leaves, slopes, strict=True)]
