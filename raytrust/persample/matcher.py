"""Gradient matching: the engine as gradient inversion uses it."""

from __future__ import annotations

from torch import Tensor

from raytrust.networks.task import Targets
from raytrust.persample.engine import PerSampleGradients
from raytrust.persample.plain import Distance


class GradientMatcher(PerSampleGradients):
    """How far the gradients of candidate batches are from an observation, and how to change the candidates.

    In four passes through the network: forward and backward, which give each layer's input and signal; then the
    distance's derivative with respect to these, layer by layer; then both passes once more, transposed.
    """

    _twice = True

    def __call__(self, x: Tensor, labels: Targets, distance: Distance) -> tuple[Tensor, Tensor]:
        """(distance(gradients), d sum(distance) / dx) at x.

        x: (candidates, batch, channels, height, width). labels: (candidates, batch), or what else the task
        takes. distance: one tensor a parameter, (candidates, *shape) -> (candidates,), each from its own candidate
        alone. Returns (candidates,) and x's shape.
        """
        x = x.detach().requires_grad_()
        values, (dx,) = self._checked(x, labels).match(x, labels, distance, [x])
        return values, dx

    def jointly(self, x: Tensor, logits: Tensor, distance: Distance) -> tuple[Tensor, Tensor, Tensor]:
        """The same for soft labels, by logits (candidates, batch, classes); also the derivative by these. Raises
        ValueError where the loss is not cross-entropy."""
        if self.task.loss is not None:
            raise ValueError("Expected cross-entropy, for which alone labels can be optimised, got a loss of its own.")
        x, logits = x.detach().requires_grad_(), logits.detach().requires_grad_()
        labels = logits.softmax(-1)
        values, (dx, dlogits) = self._checked(x, labels).match(x, labels, distance, [x, logits])
        return values, dx, dlogits
