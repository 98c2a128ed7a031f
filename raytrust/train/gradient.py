"""What a worker makes of its batch, before it is compressed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.config import TrainConfig
from raytrust.networks.kernels import sound_kernels
from raytrust.train.clipped import ClippedGradients


class WorkerGradient:
    """The gradient that a worker hands to its compressor, as the training's defence has it made."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        self._model, self._config, private = model, config, config.defence.dp_sgd
        self._clipped = None if private is None else ClippedGradients(model, private, config.seed)

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, rank: int, private: int | None = None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The mean loss of a batch (nats), and the gradient, one tensor a parameter; images, labels: as `gradient_of`.

        private: the index of a private batch, whose noise is its own; None for the worker's batch of this step.
        """
        if self._clipped is None:
            return gradient_of(self._model, images, labels)
        expected = self._config.batch_size if private is None else None
        return self._clipped(images, labels, step, rank, private, expected)


def gradient_of(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The mean cross-entropy of a batch (nats), and its gradient, one tensor a parameter.

    images: (batch, channels, height, width), as the model sees them. labels: (batch,). The modes of the model's modules
    are taken as they are.
    """
    with sound_kernels(model):
        loss = F.cross_entropy(model(images), labels)
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))
