"""The points of a membership audit, and which model is trained on which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytrust.config import MembershipConfig
from raytrust.data import Dataset

PLAIN, MISLABELLED, DUPLICATE = range(3)  # kinds of points


@dataclass(frozen=True)
class Pool:
    """The points of an audit. images: uint8 (n, channels, height, width). labels: (n,), wrong of the mislabelled.

    kinds: (n,), PLAIN, MISLABELLED or DUPLICATE. keep: (models, n), which model is trained on which point, by
    independent fair coins. A balanced design, with each point in exactly half of the models, would tell the attacker of
    one model its members by those of the others, whatever the models say.
    """

    images: Tensor
    labels: Tensor
    kinds: NDArray[np.int64]
    keep: NDArray[np.bool_]

    def rows(self, model: int, copies: int) -> NDArray[np.int64]:
        """The points that the model is trained on, duplicates `copies` times, as indices into the pool."""
        kept = np.flatnonzero(self.keep[model])
        return np.repeat(kept, np.where(self.kinds[kept] == DUPLICATE, copies, 1))


def draw_pool(config: MembershipConfig, data: Dataset) -> Pool:
    """The pool, a function of the config and the data alone. Raises ValueError if there are too few images."""
    if len(data.train_labels) < config.points:
        raise ValueError(
            f"Expected points={config.points} to be at most {len(data.train_labels)}, the training images."
        )
    batches = (config.train.capture.tuning + config.train.capture.evaluation) * config.train.threat.batch_size
    # A model must fill a batch of training, and the private batches, in which no image comes twice.
    least = max(batches, config.train.batch_size)
    # Fair coins give a model half of the points, give or take.
    if config.points * 2 // 5 < least:
        raise ValueError(
            f"Expected points={config.points} to be at least {least * 5 // 2}, for {least} images a model."
        )
    generator = np.random.default_rng(config.train.seed)
    chosen = generator.permutation(len(data.train_labels))[: config.points]
    # Indexing copies, so that the canaries' wrong labels do not reach the data set, which all models share.
    labels = data.train_labels[torch.from_numpy(chosen)]
    kinds = np.full(config.points, PLAIN)
    # The order of the points is random already, so that the first ones are a fair draw of canaries.
    kinds[: config.mislabelled] = MISLABELLED
    kinds[config.mislabelled : config.mislabelled + config.duplicates] = DUPLICATE
    # A wrong label is one of another class that has images: no network is taught an empty class by a canary alone.
    present = data.train_labels.unique()
    shift = torch.from_numpy(generator.integers(1, len(present), config.mislabelled))
    place = torch.searchsorted(present, labels[: config.mislabelled])
    labels[: config.mislabelled] = present[(place + shift) % len(present)]
    # Independent coins: with each point in exactly half of the models, the other models' coins alone would give away
    # whether this one has it, and attacks would find members in pure noise.
    keep = generator.random((config.models, config.points)) < 0.5
    pool = Pool(data.train_images[torch.from_numpy(chosen)], labels, kinds, keep)
    # Forty per cent of the points is an estimate; the coins have the last word.
    fewest = min(len(pool.rows(model, config.copies)) for model in range(config.models))
    if fewest < least:
        raise ValueError(f"Expected points={config.points} to be more: a model has {fewest} images, and needs {least}.")
    return pool
