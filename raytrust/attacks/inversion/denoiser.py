"""A denoiser of the attacker's own images, for what an attack arrived at.

Where compression left images to choose from, an attack's answer is a plausible gradient but not a plausible image: Yue
et al. 2023 ("Gradient Obfuscation Gives a False Sense of Security in Federated Learning") put a learned network behind
the optimiser. Ours is the small network of FFDNet (Zhang, Zuo & Zhang 2018), which is told the noise's level.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, LAYERS = 48, 5
STEPS, BATCH, RATE = 800, 64, 2e-3
PATCH = 48  # pixels a side of what it is trained on: noise is local, and whole large images would take an hour
LOUDEST = 0.6  # standard deviation of the noise in training, in [0, 1] pixel units


class Denoiser(nn.Module):
    """Subtracts from an image the noise that convolutions on its 2x2 blocks find in it."""

    def __init__(self, channels: int, generator: torch.Generator):
        super().__init__()
        widths = [4 * channels + 1, *[WIDTH] * (LAYERS - 1), 4 * channels]
        # Weights are drawn from a generator of their own, as the global one is the user's.
        layers = [nn.utils.skip_init(nn.Conv2d, a, b, 3, padding=1) for a, b in pairwise(widths)]
        for layer in layers:
            bound = math.sqrt(6 / layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        # At first there is no noise to be found, so that training starts at the image as it is.
        nn.init.zeros_(layers[-1].weight)
        self.layers = nn.ModuleList(layers)
        self.to(memory_format=torch.channels_last)  # the layout in which CPUs convolve

    def forward(self, x: Tensor, deviation: Tensor) -> Tensor:
        """(n, channels, height, width) and (n,) -> like x, not clamped."""
        height, width = x.shape[2:]
        padded = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        blocks = F.pixel_unshuffle(padded, 2)
        level = deviation.view(-1, 1, 1, 1).expand(-1, 1, *blocks.shape[2:])
        y = torch.cat([blocks, level], 1).contiguous(memory_format=torch.channels_last)
        for layer in self.layers[:-1]:
            y = F.relu(layer(y))
        return x - F.pixel_shuffle(self.layers[-1](y), 2)[..., :height, :width]


def denoised(images: Tensor, auxiliary: Tensor, deviation: float, device: str = "cpu") -> Tensor:
    """Images (n, channels, height, width) in [0, 1] with noise of this standard deviation taken out, in [0, 1].

    auxiliary: (m, channels, height, width) in [0, 1], at least one, which the denoiser is trained on: some tens of
    seconds on a CPU, once for the same images.
    """
    network = _trained(_Images(auxiliary, device))
    with torch.no_grad():
        cleaned = network(images.to(device), torch.full((len(images),), deviation, device=device))
    return cleaned.clamp(0, 1).to(images.device)


@dataclass(frozen=True, eq=False)
class _Images:
    """Images as a key: equal ones are one."""

    images: Tensor
    device: str

    def _key(self) -> tuple[str, str]:
        return hashlib.sha256(self.images.contiguous().view(torch.uint8).numpy().data).hexdigest(), self.device

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Images) and self._key() == other._key()


@lru_cache(maxsize=1)
def _trained(of: _Images) -> Denoiser:
    return train_denoiser(of.images, of.device)


def train_denoiser(images: Tensor, device: str = "cpu", steps: int = STEPS, seed: int = 0) -> Denoiser:
    """Fit a denoiser to noise of all levels up to `LOUDEST` on images (n, channels, height, width) in [0, 1].

    A function of its arguments; the global random number generator stays as it was.
    """
    # Drawn on the CPU, so that a seed means the same on every device.
    dice = torch.Generator().manual_seed(seed)
    network = Denoiser(images.shape[1], dice).to(device)
    optimiser = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x = _patch(images[torch.randint(len(images), (BATCH,), generator=dice)], dice)
        # Faint noise, which is what attacks leave, comes up more often than loud noise.
        deviation = torch.rand(BATCH, generator=dice) ** 1.5 * LOUDEST
        noisy = x + deviation.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=dice)
        x, noisy, deviation = x.to(device), noisy.to(device), deviation.to(device)
        with torch.enable_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
            found = network(noisy, deviation)
        errors = (found.float() - x).square().mean((1, 2, 3))
        # By what can be expected at that level: else loud noise would be all that is learned from.
        loss = (errors / (deviation.square() + 0.01)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def _patch(images: Tensor, dice: torch.Generator) -> Tensor:
    """The same random place of all images, at most `PATCH` pixels high and wide; smaller images as they are."""
    for dim in (2, 3):
        if (room := images.shape[dim] - PATCH) > 0:
            first = int(torch.randint(room + 1, (), generator=dice))
            images = images.narrow(dim, first, PATCH)
    return images
