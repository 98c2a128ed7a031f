"""What a worker makes of its batch, before it is compressed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.networks.kernels import sound_kernels


def gradient_of(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The mean cross-entropy of a batch (nats), and its gradient, one tensor a parameter.

    images: (batch, channels, height, width), as the model sees them. labels: (batch,). The modes of the model's modules
    are taken as they are.
    """
    with sound_kernels(model):
        loss = F.cross_entropy(model(images), labels)
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))
