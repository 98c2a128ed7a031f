"""A learned inverter for the messages of one model at one step: how it is made, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.attacks.inversion.engine import same_model
from raytrust.attacks.learned.encoding import Encoder
from raytrust.attacks.learned.messages import auxiliary_messages
from raytrust.attacks.learned.network import Fit, fit
from raytrust.config import LearnedInverterConfig
from raytrust.leak.observation import Observation, decoded


@dataclass(frozen=True)
class Auxiliary:
    """The attacker's own images: (n, channels, height, width), float in [0, 1], and their labels (n,)."""

    images: Tensor
    labels: Tensor


class LearnedInverter:
    """f: message -> image, for observations of the model, the step and the compressor that it was trained for."""

    def __init__(self, seen: Observation, encoder: Encoder, trained: Fit):
        self._seen, self._encoder, self._network = seen, encoder, trained.network
        self.losses = trained.losses

    @property
    def held_out_loss(self) -> float:
        """On auxiliary images that it was not trained on, in which the attacker can see how well it does."""
        return min(self.losses)

    def reconstruct(self, seen: Sequence[Observation]) -> Tensor:
        """(n, channels, height, width) in [0, 1], on the CPU: the image behind each message.

        Raises ValueError for a message of another model or compressor, and for one that is not finite.
        """
        if not all(_alike(s, self._seen) for s in seen):
            raise ValueError("Expected observations of the model, step and compressor that the inverter is for.")
        device = next(self._network.parameters()).device
        vectors = torch.stack([torch.cat([g.flatten() for g in decoded(s, str(device)).gradient]) for s in seen])
        if not bool(vectors.isfinite().all()):
            raise ValueError("Expected finite messages, got NaN or infinity in them.")
        labels = None if self._seen.labels is None else torch.cat([s.labels for s in seen if s.labels is not None])
        inputs = _inputs(self._encoder(vectors).cpu(), labels, self._seen.classes)
        with torch.no_grad():
            return self._network(inputs.to(device)).cpu()


def train_inverter(
    seen: Observation, auxiliary: Auxiliary, config: LearnedInverterConfig, device: str = "cpu"
) -> LearnedInverter:
    """Train on what the first `config.auxiliary` images would have sent in place of the private one.

    Of `seen` all is used but the messages: they belong to the private batch. The caller sees to it that no private
    image is among the auxiliary ones. A function of its arguments; the global random number generator stays as it was.

    Raises ValueError for a batch of several images, for auxiliary images that don't fit, and where the vantage shows
    only the mean with other workers' gradients.
    """
    _check(seen, auxiliary, config)
    images, labels = auxiliary.images[: config.auxiliary], auxiliary.labels[: config.auxiliary]
    encoder = Encoder([w.numel() for w in seen.weights.values()], config)
    # The order is drawn, so that what is held out is like what is trained on even if the images came by class.
    # A config's seeds are below 2**31, so that no other config's draws are repeated by adding this much.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed + 2**31))
    images, labels = images[order], labels[order]
    messages = auxiliary_messages(seen, images, labels, config.seed + 2**32, device)
    encoded = torch.cat([encoder(m).cpu() for m in messages])
    inputs = _inputs(encoded, labels if seen.labels is not None else None, seen.classes)
    return LearnedInverter(seen, encoder, fit(inputs, images, config, device))


def _alike(a: Observation, b: Observation) -> bool:
    # The public state, such as PowerSGD's factors, decides what a message means: with another it is another code.
    if not same_model(a, b) or a.defence != b.defence or a.compressor_state.keys() != b.compressor_state.keys():
        return False
    return all(torch.equal(state, b.compressor_state[name]) for name, state in a.compressor_state.items())


def _inputs(encoded: Tensor, labels: Tensor | None, classes: int) -> Tensor:
    """The encoded messages, and the labels one-hot where the threat grants them."""
    return encoded if labels is None else torch.cat([encoded, F.one_hot(labels, classes).to(encoded)], 1)


def _check(seen: Observation, auxiliary: Auxiliary, config: LearnedInverterConfig) -> None:
    images, labels = auxiliary.images, auxiliary.labels
    if seen.threat.batch_size != 1:
        raise ValueError(f"Expected batch_size={seen.threat.batch_size} to be 1 for a learned inverter.")
    # The attacker can't imitate such a mean, as the other workers' gradients are private, too.
    mean_alone = all(message.op == "all_mean" for message in seen.messages)
    if seen.threat.vantage == "peer" and seen.world_size > 1 and mean_alone:
        raise ValueError(
            f"Expected vantage='peer' to be 'link' for a learned inverter: of {seen.defence.name} a peer sees only the "
            "mean over workers."
        )
    if config.auxiliary > len(images):
        raise ValueError(f"Expected auxiliary={config.auxiliary} to be at most the number of images, {len(images)}.")
    if images.shape[1:] != seen.image_shape or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"Expected auxiliary images of shape {seen.image_shape} in [0, 1], got {tuple(images.shape)}.")
    if labels.shape != images.shape[:1] or not bool(((labels >= 0) & (labels < seen.classes)).all()):
        raise ValueError(f"Expected {len(images)} auxiliary labels in [0, {seen.classes}), got {tuple(labels.shape)}.")
