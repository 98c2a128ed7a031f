"""The messages that the attacker's own images would have sent, had they been the private batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from raytrust.compress import build
from raytrust.leak.observation import Observation
from raytrust.persample.matcher import forget_batch_statistics
from raytrust.wire.channel import LocalChannel

CHUNK_ENTRIES = 2**24  # entries of gradients that are held at a time (64 MiB)


def image_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradient of each image's own cross-entropy, for each parameter: (n, *shape), in the model's order.

    x: (n, channels, height, width), as the model sees images. labels: (n,). Batch norms in training mode normalise an
    image by its own statistics, for which the model is changed in place (`forget_batch_statistics`).
    """
    forget_batch_statistics(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, {**parameters, **buffers}, (image[None],)), label[None])

    return list(vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, labels).values())


def auxiliary_messages(seen: Observation, images: Tensor, labels: Tensor, seed: int) -> Iterator[Tensor]:
    """What the messages of each image alone would decode to, at the observed weights: (some, entries), in their order.

    images: (n, channels, height, width) in [0, 1]. labels: (n,). Each image meets a fresh copy of the compressor with
    the public state that the observed message met, and dice of its own where dice are private. No copy has a residual
    or a momentum of earlier steps, and each is the only worker: what others add to PowerSGD's bases is not in it.
    """
    model = seen.build_model()
    mean, std = (s.view(-1, 1, 1) for s in (seen.mean, seen.std))
    shapes, names = [w.shape for w in seen.weights.values()], list(seen.weights)
    entries = sum(s.numel() for s in shapes)
    dice = torch.Generator().manual_seed(seed)
    size = max(1, CHUNK_ENTRIES // entries)
    for some, targets in zip(images.split(size), labels.split(size), strict=True):
        grads = image_gradients(model, (some - mean) / std, targets)
        decoded = torch.empty(len(some), entries)
        for i, row in enumerate(decoded):
            own = int(torch.randint(2**31, (1,), generator=dice))
            compressor = build(seen.defence, shapes, own, names)
            compressor.load_public_state(seen.compressor_state)
            sent = compressor.reduce([g[i] for g in grads], LocalChannel()).decoded_own
            row[:] = torch.cat([part.flatten() for part in sent])
        yield decoded
