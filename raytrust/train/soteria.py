"""Soteria's gradient: the representation of the images perturbed in the final layer's weight (Sun et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from raytrust.config import SoteriaConfig
from raytrust.networks.build import copy_of
from raytrust.networks.classifier import final_linear
from raytrust.networks.kernels import sound_kernels
from raytrust.networks.task import CROSS_ENTROPY, Targets, Task

# Rows of a Jacobian in one backward pass.
ROWS = 32
# Of the published program, which keeps a small entry from counting for all images.
OFFSET = 0.1


class SoteriaGradients:
    """The gradients that Soteria hands to the compressor, of a model while it is trained.

    The representation r is what enters the final linear layer, whose weight's gradient is a sum over images of (signal)
    r^T. The paper sets those entries r_i to zero that move the image most, of the greatest |r_i| ||(dr_i/dX)^-1||, and
    its program those of the least ||dr_i/dX|| / (|r_i| + 0.1), summed over the images of the batch, as here. One choice
    serves the batch: so columns of the weight's gradient become zero. Entries that a ReLU leaves at 0 go first, and
    save others. All other gradients, the layer's bias among them, are as they were.

    Costs a backward pass an entry of the representation, `ROWS` of them at once. Raises ValueError, when it is called,
    for a model without such a layer, or whose layer is frozen or called on more than one vector an image.
    """

    def __init__(self, model: nn.Module, config: SoteriaConfig, task: Task = CROSS_ENTROPY):
        self._model, self._config, self._task = model, config, task
        self._layer = ""

    def __call__(
        self, x: Tensor, targets: Targets, step: int = 0, rank: int = 0, private: int | None = None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The mean loss, and the gradient, one tensor a trained parameter.

        x: (images, channels, height, width), as the model sees them. targets: (images, ...). Nothing is drawn, so that
        step, rank and private batch have no effect.
        """
        named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        layer, name = self._final(x, targets, named)
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        x = x.detach().requires_grad_()
        try:
            with sound_kernels(self._model), torch.enable_grad():
                loss = self._task.batch_loss(self._model, x, targets)
                grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
                pruned = self._pruned(inputs, x)
        finally:
            handle.remove()
        pairs = zip(grads, named.items(), strict=True)
        found = {of: torch.zeros_like(p) if g is None else g for g, (of, p) in pairs}
        found[name] = found[name].index_fill(1, pruned, 0)
        return loss.detach(), list(found.values())

    def _final(self, x: Tensor, targets: Targets, trained: Mapping[str, Tensor]) -> tuple[nn.Module, str]:
        """The final linear layer, and the name of its weight."""
        if not self._layer:
            if self._task.loss is not None or self._task.argument is not None or not isinstance(targets, Tensor):
                raise ValueError(
                    "Expected cross-entropy of images alone for soteria, which prunes a classifier's input."
                )
            # Once, and on a copy: a pass more would move the statistics of a batch norm.
            found, _ = final_linear(copy_of(self._model).cpu().float().eval(), (x.shape[1], x.shape[2], x.shape[3]))
            self._layer = found
        if (name := f"{self._layer}.weight".removeprefix(".")) not in trained:
            raise ValueError("Expected a classifier whose weight is trained for soteria: it is frozen or derived.")
        return self._model.get_submodule(self._layer), name

    def _pruned(self, inputs: Sequence[Tensor], x: Tensor) -> Tensor:
        """Which columns become zero."""
        if len(inputs) != 1 or inputs[0].ndim != 2 or len(inputs[0]) != len(x):
            shapes = [tuple(r.shape) for r in inputs]
            raise ValueError(f"Expected one vector an image to enter the final layer for soteria, got {shapes}.")
        (r,) = inputs
        lengths = []
        for rows in torch.eye(r.shape[1], dtype=r.dtype, device=r.device).split(ROWS):
            ones = rows[:, None].expand(-1, len(x), -1)
            (slopes,) = torch.autograd.grad(r, x, ones, retain_graph=True, is_grads_batched=True)
            lengths.append(slopes.flatten(2).norm(dim=2))
        scores = torch.cat(lengths).T / (r.detach().abs() + OFFSET)
        return scores.sum(0).topk(self._config.pruned(r.shape[1]), largest=False).indices
