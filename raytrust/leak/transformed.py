"""What messages reveal of a gradient that was clipped, made noisy or pruned before: to one who knows how."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raytrust.compress import ErrorFeedback, Transformed, Vantage
from raytrust.compress.dense import Dense
from raytrust.config import PruneConfig, TransformConfig
from raytrust.config.register import TRANSFORM_METHODS
from raytrust.leak.rules import Messages, decoded_of, view_of
from raytrust.leak.views import SparseView, View


@view_of.register(Transformed)
def transformed_view(compressor: Transformed, messages: Messages, vantage: Vantage, victim: int = 0) -> View:
    """What the compressor inside reveals: clipping changes the length alone, which no view minds.

    Of a pruned gradient that is sent whole, the entries that stayed, and that all others of their tensor, or of the
    gradient, are no larger.
    """
    inner = compressor.inner
    last, method = compressor.configs[-1], inner.inner if isinstance(inner, ErrorFeedback) else inner
    # The mean of several workers' has the zeros that all of them have, and other entries are no one's own.
    alone = vantage == "link" or len(messages[-1].received) > len(messages[-1].sent)
    if not (isinstance(last, PruneConfig) and type(method) is Dense and alone):
        return view_of(inner, messages, vantage, victim)
    decoded = decoded_of(inner, messages, vantage, victim)
    positions = [x.flatten().nonzero().flatten() for x in decoded]
    values = [x.flatten()[p] for x, p in zip(decoded, positions, strict=True)]
    # What stayed is not zero, so that a tensor of zeros bounds nothing but itself.
    least = [v.abs().min() if len(v) else v.new_zeros(()) for v in values]
    bound = torch.stack(least) if last.scope == "layer" else torch.stack([m for m in least if m > 0]).min()
    return SparseView(values, positions, [x.shape for x in decoded], bound)


def noise_variance(configs: Sequence[TransformConfig], images: int) -> float:
    """The variance of the noise that these put into each entry of a gradient of so many images.

    After a noise that is clipped, at most that.
    """
    transforms = [TRANSFORM_METHODS[config.method](config) for config in configs]
    return sum(t.variance(images) for t in transforms if hasattr(t, "variance"))


def are_understood(configs: Sequence[TransformConfig]) -> bool:
    """Whether attacks know what all of these do: ours, and others that say how much noise they add."""
    kinds = [TRANSFORM_METHODS[config.method] for config in configs]
    return all(kind.__module__.startswith("raytrust.defend.") or hasattr(kind, "variance") for kind in kinds)
