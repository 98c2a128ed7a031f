"""DP-SGD, the reference defence, by Opacus: the optional extra `dp`."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from raytrust.config import DPSGDConfig, TrainConfig
from raytrust.data import Dataset
from raytrust.networks.build import build_model
from raytrust.train.loop import Step, Trained, learning_rate_factor


def available() -> bool:
    """Whether Opacus can be imported."""
    return importlib.util.find_spec("opacus") is not None


def train_privately(
    config: TrainConfig, private: DPSGDConfig, data: Dataset, device: str = "cpu"
) -> Iterator[Step | Trained]:
    """Train with DP-SGD and the model, steps, batch size, learning rate and momentum of `config`, not its defence.

    Yields a `Step` each step and one `Trained` at last. Batches are Poisson samples, of `batch_size` images on average;
    a step on an empty one has a loss of 0. All randomness is from the config's seed, so that runs can be repeated; who
    has private data to protect must not let the noise be predicted. Noise is drawn on the device, so that another kind
    of device has other noise.

    Raises FloatingPointError when the loss stops being finite.
    """
    with warnings.catch_warnings():
        # Opacus warns of noise from a seed, which we want, and of hooks that torch deprecates.
        warnings.simplefilter("ignore")
        from opacus import PrivacyEngine

        model = build_model(config.model, data.channels, data.classes, config.seed).to(device).train()
        mean, std = (s.view(-1, 1, 1) for s in (data.mean, data.std))
        images = (data.train_images.float() / 255 - mean) / std
        optimiser = torch.optim.SGD(
            model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        # Seeds of their own, as the noise must not repeat the draws that choose the images.
        order = torch.Generator().manual_seed(config.seed + 1)
        noise = torch.Generator(device).manual_seed(config.seed + 2)
        loader = DataLoader(TensorDataset(images, data.train_labels), config.batch_size, generator=order)
        wrapped, private_optimiser, batches = PrivacyEngine().make_private(
            module=model,
            optimizer=optimiser,
            data_loader=loader,
            noise_multiplier=private.noise,
            max_grad_norm=private.clip,
            noise_generator=noise,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: learning_rate_factor(t, config.steps))
        step = 0
        while step < config.steps:
            for x, labels in batches:
                if step == config.steps:
                    break
                private_optimiser.zero_grad()
                # A Poisson sample may be empty, and its mean loss would be NaN.
                loss = F.cross_entropy(wrapped(x.to(device)), labels.to(device), reduction="sum") / max(1, len(labels))
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"The training loss became {loss.item()} at step {step}.")
                loss.backward()
                private_optimiser.step()
                schedule.step()
                sent = sum(p.numel() * p.element_size() for p in model.parameters())
                yield Step(step, loss.item(), sent, sent)
                step += 1
    weights = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
    yield Trained(weights, {})


def epsilon(config: TrainConfig, private: DPSGDConfig, points: int, delta: float) -> float:
    """The epsilon that training on `points` images spends, by Opacus's accounting of Renyi divergences.

    An upper bound for add/remove neighbours of the images; an image that comes several times has several times as much.
    """
    with warnings.catch_warnings():
        # Opacus warns where the best order lies at an end of its list; the bound holds all the same.
        warnings.simplefilter("ignore")
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(private.noise, config.batch_size / points, config.steps)]
        return float(accountant.get_epsilon(delta))
