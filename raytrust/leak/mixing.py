"""What is known of images that were mixed before the gradient was taken."""

from __future__ import annotations

from torch import Tensor

from raytrust.compress import Transformed
from raytrust.config import MixupConfig
from raytrust.leak.observation import Observation


def mixing_of(seen: Observation) -> MixupConfig | None:
    """How the victim's images were mixed, if they were."""
    compressor = seen.build_compressor()
    config = compressor.of_images if isinstance(compressor, Transformed) else None
    return config if isinstance(config, MixupConfig) else None


def known_shares(seen: Observation) -> Tensor | None:
    """(batch, batch): the share of each private image in each mixed one, where labels and mixed targets tell it.

    They do in a batch of different classes that is mixed within itself: the target of a mixed image has the share of
    each image at its class. None elsewhere, as of a class that two images have only the sum is known.
    """
    config = mixing_of(seen)
    if config is None or seen.labels is None or seen.mixed is None or len(seen.labels) < config.images:
        return None
    if len(seen.labels.unique()) < len(seen.labels):
        return None
    return seen.mixed[:, seen.labels]
