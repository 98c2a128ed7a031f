"""What a worker makes of its batch, before it is compressed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.config import LocalConfig
from raytrust.networks.kernels import sound_kernels
from raytrust.train.local import pseudo_gradient


def update_of(model: nn.Module, images: Tensor, labels: Tensor, local: LocalConfig) -> tuple[Tensor, Sequence[Tensor]]:
    """What a worker hands to the compressor: the gradient of its batch, or the pseudo-gradient of its local steps.

    images, labels: as in `gradient_of`. Returns the mean loss (nats) along the steps, and one tensor a parameter. The
    model's weights are as they were.
    """
    return pseudo_gradient(
        list(model.parameters()), local, len(images), lambda rows: gradient_of(model, images[rows], labels[rows])
    )


def gradient_of(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The mean cross-entropy of a batch (nats), and its gradient, one tensor a parameter.

    images: (batch, channels, height, width), as the model sees them. labels: (batch,). The modes of the model's modules
    are taken as they are.
    """
    with sound_kernels(model):
        loss = F.cross_entropy(model(images), labels)
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))
