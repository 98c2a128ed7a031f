"""Which training images are private, and which ones an attacker has besides; both follow from the seed."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from raytrust.config import TrainConfig
from raytrust.data import Dataset

# For a mixture one or a few of them are drawn, so that more would tell an attacker no less.
PARTNERS = 256


def check_sizes(config: TrainConfig, n_train: int) -> None:
    """Raises ValueError if there are too few training images for one step or for the private batches."""
    step = config.batch_size * config.workers
    if step > n_train:
        raise ValueError(
            f"Expected batch_size={config.batch_size} x workers={config.workers} to be at most the number of training "
            f"images, {n_train}."
        )
    private = (config.capture.tuning + config.capture.evaluation) * config.threat.batch_size
    if private > n_train:
        raise ValueError(f"Expected at least {private} training images for the private batches, got {n_train}.")
    if config.threat.auxiliary > n_train - private:
        raise ValueError(
            f"Expected auxiliary={config.threat.auxiliary} to be at most the number of training images that are not "
            f"private, {n_train - private}."
        )


def private_batches(config: TrainConfig, n_train: int) -> Tensor:
    """Indices of training images, (tuning + evaluation, threat.batch_size): no image twice.

    They depend on the seed and the sizes alone, so every defence is attacked on the same images.
    """
    count = config.capture.tuning + config.capture.evaluation
    return _order(config, n_train)[: count * config.threat.batch_size].view(count, -1)


def auxiliary_images(config: TrainConfig, data: Dataset) -> Tensor | None:
    """The images that the threat grants besides, (n, channels, height, width) in [0, 1]; None where it grants none.

    They are the training images that follow the private ones in the order of the seed, but for copies of these; the
    same for all workers, steps and defences. Training uses them as it does all others. Floors and identification rest
    on test images. Raises ValueError where there are too few.
    """
    count = config.threat.auxiliary
    if not count:
        return None
    indices = private_batches(config, len(data.train_labels)).flatten()
    private = {x.numpy().tobytes() for x in data.train_images[indices]}
    # By what is in them and not by their place alone: some data sets hold an image twice.
    others = (
        i for i in _order(config, len(data.train_labels))[len(indices) :].tolist()
        if data.train_images[i].numpy().tobytes() not in private
    )  # fmt: skip
    chosen = list(islice(others, count))
    if len(chosen) < count:
        raise ValueError(
            f"Expected auxiliary={count} to be at most the number of training images that are not private, "
            f"{len(chosen)}."
        )
    return data.train_images[torch.tensor(chosen)].float() / 255


def partner_images(config: TrainConfig, data: Dataset, private: Tensor, auxiliary: Tensor | None) -> Tensor | None:
    """Indices of training images with which a private batch is mixed that is too small to be mixed within itself; None
    where none is.

    private: (n, channels, height, width), uint8. The last ones in the order of the seed that are neither private nor
    auxiliary, at most `PARTNERS`.
    """
    mixing = config.defence.mixing
    if mixing is None or config.threat.batch_size >= mixing.images:
        return None
    granted = [] if auxiliary is None else [*(auxiliary * 255).round().byte()]
    taken = {x.numpy().tobytes() for x in (*private, *granted)}
    order = reversed(_order(config, len(data.train_labels)).tolist())
    others = (i for i in order if data.train_images[i].numpy().tobytes() not in taken)
    return torch.tensor(list(islice(others, PARTNERS)), dtype=torch.long)


def _order(config: TrainConfig, n_train: int) -> Tensor:
    """The training images in the order in which they become private, and then auxiliary."""
    return torch.randperm(n_train, generator=torch.Generator().manual_seed(config.seed))
