"""What a worker makes of its batch, before it is compressed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.config import ONE_STEP, DPSGDConfig, LocalConfig, SoteriaConfig, TrainConfig
from raytrust.config.method import TransformConfig
from raytrust.networks.kernels import sound_kernels
from raytrust.networks.task import CROSS_ENTROPY, Task
from raytrust.train.clipped import ClippedGradients
from raytrust.train.local import pseudo_gradient
from raytrust.train.mixing import Images, Mixing
from raytrust.train.soteria import SoteriaGradients


class WorkerGradient:
    """What a worker hands to its compressor: the gradient of its batch, as the training's defence has it made, or the
    pseudo-gradient of its local steps."""

    def __init__(self, model: nn.Module, config: TrainConfig, classes: int):
        self._model, self._config = model, config
        self._mixing = None if config.defence.mixing is None else Mixing(config.defence.mixing, config.seed, classes)
        self._of_images = gradients_of_images(model, config.defence.of_images, config.seed, local=config.local)

    def mixed(
        self, own: Images, step: int, rank: int, private: int | None = None, others: Images | None = None
    ) -> tuple[Tensor, Tensor]:
        """The batch of which the gradient is taken, and its targets: as `Mixing` says, or as they are."""
        return own if self._mixing is None else self._mixing(own, step, rank, private, others)

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, rank: int, private: int | None = None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The mean loss of a batch (nats), and the gradient, one tensor a parameter; images, labels: as `gradient_of`.

        private: the index of a private batch, whose noise is its own; None for the worker's batch of this step.
        """
        if self._of_images is None:
            return update_of(self._model, images, labels, self._config.local)
        if isinstance(self._of_images, SoteriaGradients):
            return self._of_images(images, labels, step, rank, private)
        expected = self._config.batch_size if private is None else None
        return self._of_images(images, labels, step, rank, private, expected)


def gradients_of_images(
    model: nn.Module,
    config: TransformConfig | None,
    seed: int,
    task: Task = CROSS_ENTROPY,
    local: LocalConfig = ONE_STEP,
) -> ClippedGradients | SoteriaGradients | None:
    """What makes the gradients of a model for a transform that needs to know the images; None for any other, or none.

    seed: of what is private in it.
    """
    match config:
        case DPSGDConfig():
            return ClippedGradients(model, config, seed, task, local)
        case SoteriaConfig():
            return SoteriaGradients(model, config, task)
    return None


def update_of(model: nn.Module, images: Tensor, labels: Tensor, local: LocalConfig) -> tuple[Tensor, Sequence[Tensor]]:
    """The gradient of a batch, or the pseudo-gradient of local steps on it.

    images, labels: as in `gradient_of`. Returns the mean loss (nats) along the steps, and one tensor a parameter. The
    model's weights are as they were.
    """
    return pseudo_gradient(
        list(model.parameters()), local, len(images), lambda rows: gradient_of(model, images[rows], labels[rows])
    )


def gradient_of(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The mean cross-entropy of a batch (nats), and its gradient, one tensor a parameter.

    images: (batch, channels, height, width), as the model sees them. labels: (batch,), or probabilities of the classes,
    (batch, classes). The modes of the model's modules are taken as they are.
    """
    with sound_kernels(model):
        loss = F.cross_entropy(model(images), labels)
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))
