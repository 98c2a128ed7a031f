"""The network from encoded messages to images, and its training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.config import LearnedInverterConfig
from raytrust.metrics.images import BESSEL, WINDOW, ssim_of_moments


class Inverter(nn.Module):
    """A multi-layer perceptron with ReLUs and a final sigmoid, which starts at the mean image.

    mean_image: (channels, height, width) in [0, 1]. Each input is standardised by its moments in training.
    """

    def __init__(self, inputs: Tensor, mean_image: Tensor, config: LearnedInverterConfig):
        super().__init__()
        self.shape = mean_image.shape
        spread = inputs.std(0)
        self.centre = nn.Buffer(inputs.mean(0))
        # An entry that (nearly) never varied tells nothing, and would be blown up if it once did.
        self.scale = nn.Buffer(torch.where(spread > 1e-3 * spread.mean(), 1 / spread, 0.0))
        widths = [inputs.shape[1], *[config.hidden] * config.layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.last = nn.Linear(config.hidden, mean_image.numel())
        # The mean image is the best answer without a message: training starts there instead of having to find it first.
        nn.init.zeros_(self.last.weight)
        # A pixel that is black in every image would need a logit of minus infinity.
        self.last.bias.data.copy_(mean_image.flatten().clamp(0.01, 0.99).logit())

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        """(n, inputs) -> (n, channels, height, width) in [0, 1]."""
        x = (x - self.centre) * self.scale
        for layer in self.hidden:
            x = F.relu(layer(x))
            x = x if dropout is None else dropout(x)
        return torch.sigmoid(self.last(x)).unflatten(1, self.shape)


class Dropout:
    """With dice of its own, so that the global ones stay as they are. generator: on the device of what it is given."""

    def __init__(self, share: float, generator: torch.Generator):
        self._share, self._generator = share, generator

    def __call__(self, x: Tensor) -> Tensor:
        if not self._share:
            return x
        kept = torch.rand(x.shape, generator=self._generator, device=x.device) >= self._share
        return x * kept / (1 - self._share)


@dataclass(frozen=True)
class Fit:
    """network: of the least loss on held-out images. losses: on these, epoch by epoch, after that of the mean image."""

    network: Inverter
    losses: list[float]


def fit(inputs: Tensor, images: Tensor, config: LearnedInverterConfig, device: str = "cpu") -> Fit:
    """Train on all but the last `config.validation` of the pairs, and stop by these.

    inputs: (n, length). images: (n, channels, height, width) in [0, 1]. A function of its arguments; dropout is drawn
    on the device, each kind of which has dice of its own. The global random number generator stays as it was. Raises
    FloatingPointError if the loss is not finite.
    """
    generator = torch.Generator().manual_seed(config.seed)
    n = len(inputs) - config.validation
    # Layers draw their first weights from the global generator alone, which is the user's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = Inverter(inputs[:n], images[:n].mean(0), config).to(device)
    inputs, images = inputs.to(device), images.to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [max(1, 3 * config.epochs // 4)])
    # Masks that are drawn on the CPU would be copied for each layer of each step.
    of_masks = generator if inputs.device.type == "cpu" else torch.Generator(inputs.device).manual_seed(config.seed)
    dropout = Dropout(config.dropout, of_masks)
    # The mean image competes as well: a network that never beats it on held-out images is not what is kept.
    losses, best = [_held_out(network, inputs[n:], images[n:], config)], copy.deepcopy(network)
    for _ in range(config.epochs):
        order = torch.randperm(n, generator=generator).to(inputs.device)
        for batch in order.split(config.batch_size):
            loss = inversion_loss(network(inputs[batch], dropout), images[batch], config.ssim)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
        losses.append(_held_out(network, inputs[n:], images[n:], config))
        if losses[-1] == min(losses):
            best = copy.deepcopy(network)
        if len(losses) - 1 - losses.index(min(losses)) >= config.patience:
            break
    if not all(torch.tensor(losses).isfinite()):
        raise FloatingPointError(f"The inverter's loss became {losses[-1]} after {len(losses) - 1} epochs.")
    return Fit(best.eval().requires_grad_(False), losses)


@torch.no_grad()
def _held_out(network: Inverter, inputs: Tensor, images: Tensor, config: LearnedInverterConfig) -> float:
    pairs = zip(inputs.split(512), images.split(512), strict=True)
    return sum(float(inversion_loss(network(x), y, config.ssim)) * len(x) for x, y in pairs) / len(inputs)


def inversion_loss(found: Tensor, images: Tensor, weight: float) -> Tensor:
    """(1 - weight) mean squared error + weight (1 - SSIM), the mean over images."""
    squared = (found - images).square().mean()
    if not weight:
        return squared
    return (1 - weight) * squared + weight * (1 - structural_similarity(found, images).mean())


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM as `raytrust.metrics.images.ssim` defines it, differentiable: (n, channels, height, width) twice -> (n,)."""

    def mean(x: Tensor) -> Tensor:
        # The metric's window is uniform, so that a mean over it is a pooling and needs no convolution.
        return F.avg_pool2d(x, WINDOW, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    variances = BESSEL * (mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2)
    return ssim_of_moments(mean_a, mean_b, variances, BESSEL * (mean(a * b) - mean_a * mean_b))
