"""A small victim that several tests attack: a narrow convnet, 8x8 colour images of 4 classes, and what it captures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from toys import synthetic

from raytrust.config import ModelConfig, Threat, TrainConfig, parse_defence
from raytrust.leak.observation import Capture
from raytrust.train.loop import capture_images

DATA = synthetic(vivid=True)
NETWORK = ModelConfig("convnet", width=4)


def normal_batch(n: int) -> tuple[Tensor, Tensor]:
    """(n, 3, 8, 8) as the network takes images, and (n,) labels; the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((n, 3, 8, 8), generator=generator), torch.randint(4, (n,), generator=generator)


def captured(defence: str, rows: Tensor | slice, **threat: Any) -> list[Capture]:
    """What one worker sends of these test images, batch by batch, untrained and under this defence."""
    config = TrainConfig(parse_defence(defence), NETWORK, Threat(**threat), workers=1)
    return capture_images(config, DATA, DATA.test_images[rows], DATA.test_labels[rows])
