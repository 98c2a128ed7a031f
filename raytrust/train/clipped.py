"""DP-SGD's gradient: of each image by itself, clipped, summed, and noise added (Abadi et al. 2016, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from raytrust.config import ONE_STEP, DPSGDConfig, LocalConfig
from raytrust.defend import private_generator
from raytrust.networks.kernels import sound_kernels
from raytrust.networks.task import CROSS_ENTROPY, Targets, Task, row_of, stacked_alone
from raytrust.persample.engine import PerSampleGradients
from raytrust.train.local import pseudo_gradient


class ClippedGradients:
    """The gradients that DP-SGD hands to the compressor, of a model while it is trained.

    The sum over images of g min(1, clip / ||g||), for the gradient g of the image's own loss over the trained
    parameters, plus Gaussian noise of standard deviation noise x clip in each entry, all divided by the expected number
    of images. One image adds or takes away at most `clip` of the sum, in L2 norm.

    Two passes instead of one for each image: the first gives the norms, by ghost norms where the model allows it
    (Li et al. 2022), the second the gradient of the losses weighted by what was clipped.

    Each of several local steps is made by such a gradient, with noise of its own. Together they guarantee what one with
    the noise divided by the square root of their number does (Dong, Roth & Su 2022, corollary 2), as long as each takes
    the whole batch: of parts, an image more or less would move others from one part to the next.

    Raises ValueError, when it is called, for a model in which images have a part in each other's gradients, that keeps
    statistics of them, or that drops out.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DPSGDConfig,
        seed: int,
        task: Task = CROSS_ENTROPY,
        local: LocalConfig = ONE_STEP,
    ):
        """seed: of the noise, which is private."""
        self._model, self._config, self._seed, self._task, self._local = model, config, seed, task, local
        self._engine = PerSampleGradients(model, task=task)
        self._seen_alone = False

    def __call__(
        self,
        x: Tensor,
        targets: Targets,
        step: int,
        rank: int = 0,
        private: int | None = None,
        expected: int | None = None,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The mean loss (nats), 0 of no images, and the gradient, or the pseudo-gradient of local steps, one tensor a
        trained parameter.

        x: (images, channels, height, width), as the model sees them; there may be none. targets: (images, ...).
        step, rank: of the worker's noise. private: the index of a private batch, whose noise is its own; None for the
        worker's batch of this step. expected: images of a batch on average, by which a Poisson sample's sum is divided;
        by default as many as a step takes.
        """
        self._check()
        steps = count()

        def gradient(rows: Any) -> tuple[Tensor, Sequence[Tensor]]:
            some = x[rows]
            generator = self._generator(step, rank, private, next(steps), x.device)
            return self._noisy_mean(some, row_of(targets, rows), generator, expected or len(some))

        trained = [p for p in self._model.parameters() if p.requires_grad]
        return pseudo_gradient(trained, self._local, len(x), gradient)

    def _noisy_mean(
        self, x: Tensor, targets: Targets, generator: torch.Generator, images: int
    ) -> tuple[Tensor, Sequence[Tensor]]:
        trained = [p for p in self._model.parameters() if p.requires_grad]
        loss, grads = x.new_zeros(()), [torch.zeros_like(p) for p in trained]
        if len(x):
            self._engine.refresh()
            alone = stacked_alone(targets)
            self._expect_images_alone(x, targets)
            lengths = self._engine.squared_norms(x[:, None], alone).sqrt()
            weights = self._config.clip / lengths.clamp_min(self._config.clip)
            with sound_kernels(self._model):
                losses = self._task.losses(self._task.output(self._model, x, targets), alone, (len(x), 1))
                found = torch.autograd.grad((losses * weights).sum(), trained, allow_unused=True)
            loss = losses.detach().mean()
            grads = [zero if g is None else g for g, zero in zip(found, grads, strict=True)]
        deviation = self._config.noise * self._config.clip
        # Not in place: of parameters that are added to each other, autograd gives one and the same tensor.
        return loss, [
            g.add(torch.randn(g.shape, generator=generator, device=g.device), alpha=deviation).to(g).div_(images)
            for g in grads
        ]

    def _generator(
        self, step: int, rank: int, private: int | None, local: int, device: torch.device
    ) -> torch.Generator:
        # With a first number of its own, as the noise must not repeat what a transform draws with the same others.
        batch = 0 if private is None else 1 + private
        return private_generator(0xD9, self._seed, step, rank, batch, local, device=device)

    def _expect_images_alone(self, x: Tensor, targets: Targets) -> None:
        """Raises ValueError where an image has a part in another one's loss, or the losses are drawn: once, on the
        first batch of two."""
        if self._seen_alone or len(x) < 2:
            return
        two, labels = x[:2].detach().requires_grad_(), row_of(targets, slice(2))
        # Not every module that mixes images, or drops out, can be known by its type.
        with torch.random.fork_rng([x.device] if x.is_cuda else []), sound_kernels(self._model), torch.enable_grad():
            one, again = (
                self._task.losses(self._task.output(self._model, two, labels), stacked_alone(labels), (2, 1))[0]
                for _ in range(2)
            )
            own, other = torch.autograd.grad(one, two)[0].float()
        # Zero to the bit, but for kernels that take several images at once.
        if float(other.norm()) > 1e-3 * float(own.norm()):
            raise ValueError("Expected a model for dp-sgd in which no image has a part in the loss of another.")
        first, second = float(one.detach()), float(again.detach())
        if abs(first - second) > torch.finfo(x.dtype).eps ** 0.5 * (1 + abs(first)):
            raise ValueError(
                "Expected a model for dp-sgd that draws nothing, got two losses of one image, as of dropout."
            )
        self._seen_alone = True

    def _check(self) -> None:
        for module in self._model.modules():
            if module.training and isinstance(module, _BatchNorm):
                raise ValueError(
                    "Expected a model without batch norm in training mode for dp-sgd, which clips the gradient of each "
                    "image, as a batch norm mixes them: --norm group."
                )
            if module.training and isinstance(module, _NormBase) and module.track_running_stats:
                raise ValueError(
                    f"Expected a model without running statistics for dp-sgd, which {type(module).__name__} takes of "
                    "the images themselves, without noise."
                )
            if module.training and isinstance(module, _DropoutNd) and module.p > 0:
                raise ValueError("Expected a model without dropout in training mode for dp-sgd.")
