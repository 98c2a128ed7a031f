"""Batches that are mixed before a gradient is taken of them: MixUp (Zhang et al. 2018; Huang et al. 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.config import MixupConfig
from raytrust.defend import private_generator

# Begins the key of the draws, which no other draws share.
_MIXING = 0x4D


class Images(NamedTuple):
    """x: (n, channels, height, width), as the model sees them. labels: (n,)."""

    x: Tensor
    labels: Tensor


class Mixing:
    """What a worker does to its batches, in private draws of its seed."""

    def __init__(self, config: MixupConfig, seed: int, classes: int):
        self._config, self._seed, self._classes = config, seed, classes

    def __call__(
        self, own: Images, step: int, rank: int = 0, private: int | None = None, others: Images | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mixed images, like `own`, and their targets (n, classes), probabilities of classes, mixed alike.

        step, rank: of the worker's draws. private: the index of a private batch, whose draws are its own; None for the
        worker's batch of this step. others: further images of the worker, with which a batch of fewer images than are
        to be mixed is mixed, too. Raises ValueError for too few.
        """
        few = len(own.x) < self._config.images
        every = own if others is None or not few else Images(*map(torch.cat, zip(own, others, strict=True)))
        generator = private_generator(_MIXING, self._seed, step, rank, 0 if private is None else 1 + private)
        shares = mixing_shares(self._config, len(own.x), len(every.x), generator).to(own.x)
        mixed = torch.einsum("ij,jchw->ichw", shares, every.x)
        return mixed, shares @ F.one_hot(every.labels, self._classes).to(shares)


def mixing_shares(config: MixupConfig, n: int, candidates: int, generator: torch.Generator) -> Tensor:
    """The share (n, candidates) that each candidate has in each of n images: of `config.images` candidates, the first
    of which is the image itself; they sum to 1, and none exceeds `config.largest`.

    Drawn uniformly from all such shares of two images, and of more from those that an even mixture with every image as
    the largest share spans. Raises ValueError for too few candidates.
    """
    k = config.images
    if candidates < k:
        raise ValueError(f"Expected at least {k} images to mix for {config.method}:{k}, got {candidates}.")
    # Random places of the others, without one twice, behind the image itself.
    order = torch.rand((n, candidates), generator=generator)
    order.fill_diagonal_(2)
    chosen = order.topk(k, dim=1).indices
    # Normalised exponentials are uniform on the simplex, which shrinks towards its middle.
    shares = torch.empty((n, k)).exponential_(generator=generator)
    shares = shares / shares.sum(1, keepdim=True)
    shares = 1 / k + (shares - 1 / k) * (k * config.largest - 1) / (k - 1)
    return torch.zeros((n, candidates)).scatter_(1, chosen, shares)
