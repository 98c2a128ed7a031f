"""The messages that the attacker's own images would have sent, had they been the private batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from raytrust.compress import build
from raytrust.config import ClipConfig, NoiseConfig
from raytrust.defend import Clip, Noise, Transform, private_generator
from raytrust.leak.observation import Observation
from raytrust.persample.engine import PerSampleGradients
from raytrust.wire.channel import LocalChannel

CHUNK_ENTRIES = 2**24  # entries of gradients that are held at a time (64 MiB)


def auxiliary_messages(
    seen: Observation, images: Tensor, labels: Tensor, seed: int, device: str = "cpu"
) -> Iterator[Tensor]:
    """What the messages of each image alone would decode to, at the observed weights: (some, entries), in their order.

    images: (n, channels, height, width) in [0, 1]. labels: (n,). Each image meets a fresh copy of the compressor with
    the public state that the observed message met, dice of its own where dice are private, and DP-SGD's clipping and
    noise. No copy has a residual or a momentum of earlier steps, and each is the only worker: what others add to
    PowerSGD's bases is not in it. device: where all of it happens, and the results are.
    """
    gradients = PerSampleGradients(seen.build_model().to(device), local=seen.local)
    mean, std = (s.to(device).view(-1, 1, 1) for s in (seen.mean, seen.std))
    shapes, names = [w.shape for w in seen.weights.values()], list(seen.weights)
    entries = sum(s.numel() for s in shapes)
    dice = torch.Generator().manual_seed(seed)
    size = max(1, CHUNK_ENTRIES // entries)
    private, first = seen.defence.dp_sgd, list[Transform]()
    if private is None and (other := seen.defence.of_images):
        raise ValueError(f"Expected a defence without {other.method} for a learned inverter, which doesn't know of it.")
    if private is not None:
        # Of an image alone the whole gradient is the image's.
        deviation = private.noise * private.clip / seen.local.steps**0.5
        first = [Clip(ClipConfig(private.clip)), Noise(NoiseConfig(deviation))]
    for some, targets in zip(images.split(size), labels.split(size), strict=True):
        grads = gradients.dense(((some.to(device) - mean) / std)[:, None], targets[:, None].to(device))
        decoded = torch.empty(len(some), entries, device=device)
        for i, row in enumerate(decoded):
            own = int(torch.randint(2**31, (1,), generator=dice))
            compressor = build(seen.defence, shapes, own, names, private_seed=own)
            compressor.load_public_state(seen.compressor_state)
            alone = [g[i].clone() for g in grads]
            for transform in first:
                transform(alone, private_generator(own, device=device))
            sent = compressor.reduce(alone, LocalChannel()).decoded_own
            row[:] = torch.cat([part.flatten() for part in sent])
        yield decoded
