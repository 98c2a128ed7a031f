"""What messages reveal of a gradient that was clipped, made noisy or pruned before: to one who knows how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress import Compressor, DenseStart, ErrorFeedback, Transformed, Vantage
from raytrust.compress.dense import Dense, Half
from raytrust.config import (
    ONE_STEP,
    ClipConfig,
    DPSGDConfig,
    LocalConfig,
    NoiseConfig,
    PruneConfig,
    TransformConfig,
)
from raytrust.config.register import TRANSFORM_METHODS
from raytrust.defend import Prune
from raytrust.leak.rules import Messages, decoded_of, view_of
from raytrust.leak.views import SparseView, View


@view_of.register(Transformed)
def transformed_view(compressor: Transformed, messages: Messages, vantage: Vantage, victim: int = 0) -> View:
    """What the compressor inside reveals: clipping changes the length alone, which no view minds.

    Of a gradient that was pruned, and then clipped at most, the entries that stayed, where it is sent whole or in part,
    and that all others of their tensor, or of the gradient, are no larger. Of one that got noise after that and is sent
    whole, those of the tensors in which they stand out.
    """
    view = view_of(compressor.inner, messages, vantage, victim)
    pruned = [i for i, config in enumerate(compressor.configs) if isinstance(config, PruneConfig)]
    after = compressor.configs[pruned[-1] + 1 :] if pruned else ()
    if not pruned or not all(isinstance(config, ClipConfig | NoiseConfig) for config in after):
        return view
    last, noisy = compressor.configs[pruned[-1]], any(isinstance(config, NoiseConfig) for config in after)
    assert isinstance(last, PruneConfig)
    if isinstance(view, SparseView):
        # A zero that was sent is no entry of the gradient, but one that was pruned.
        if all(bool(o.all()) for o in view.observed):
            return view
        bounded, shapes = view.bound is not None, compressor.layout.shapes
        return _stayed(view.observed, view.positions, shapes, last.scope if bounded else None)
    # The mean of several workers' has the zeros that all of them have, and other entries are no one's own.
    alone = vantage == "link" or len(messages[-1].received) > len(messages[-1].sent)
    if not (isinstance(_method(compressor.inner), Dense | Half) and alone):
        return view
    decoded = decoded_of(compressor.inner, messages, vantage, victim)
    if noisy:
        decoded = _standing_out(decoded, last, noise_variance(after, 1, decoded) ** 0.5)
    places = [torch.arange(x.numel(), device=x.device) for x in decoded]
    return _stayed([x.flatten() for x in decoded], places, compressor.layout.shapes, last.scope)


def _standing_out(tensors: Sequence[Tensor], config: PruneConfig, deviation: float) -> list[Tensor]:
    """Zeros but for as many of the largest entries as stayed; all of a tensor in which noise of this deviation might be
    as large."""
    largest = [x.clone() for x in tensors]
    Prune(config)(largest, torch.Generator())
    # The largest twentieth of noise alone has a median of 2.2 deviations.
    clear = [bool((k := x[x != 0].abs()).numel()) and float(k.median()) > 3 * deviation for x in largest]
    return [x if c else whole for x, c, whole in zip(largest, clear, tensors, strict=True)]


def _stayed(
    values: Sequence[Tensor], positions: Sequence[Tensor], shapes: Sequence[torch.Size], scope: str | None
) -> SparseView:
    """Of these entries, those that are not zero. scope: in which they bound all others, None where they don't."""
    kept = [v != 0 for v in values]
    values, positions = ([x[k] for x, k in zip(of, kept, strict=True)] for of in (values, positions))
    # What stayed is not zero, so that a tensor of zeros bounds nothing but itself.
    least = torch.stack([v.abs().min() if len(v) else v.new_zeros(()) for v in values])
    if scope == "global" and bool(least.any()):
        least = least[least > 0].min()
    return SparseView(values, positions, shapes, None if scope is None else least)


def _method(compressor: Compressor) -> Compressor:
    """What makes the messages of this step."""
    compressor = compressor.inner if isinstance(compressor, ErrorFeedback) else compressor
    return compressor.now if isinstance(compressor, DenseStart) else compressor


def noise_variance(
    configs: Sequence[TransformConfig],
    images: int,
    observed: Sequence[Tensor] = (),
    workers: int = 1,
    local: LocalConfig = ONE_STEP,
) -> float:
    """The variance of the noise that these put into each entry of a gradient of so many images, or into the mean of
    several workers'.

    observed: the measurements. After a noise that is clipped it is no larger than their spread: by a factor that nobody
    is told, noise and gradient became shorter. local: the steps by which DP-SGD came to it, with noise in each.
    """
    if local.parts(images):
        images = local.batch_size or images
    transforms = [TRANSFORM_METHODS[config.method](config) for config in configs]
    noisy = [i for i, t in enumerate(transforms) if hasattr(t, "variance")]
    steps = [local.steps if isinstance(config, DPSGDConfig) else 1 for config in configs]
    variance = sum(transforms[i].variance(images) / steps[i] for i in noisy)
    clipped = bool(noisy) and any(isinstance(config, ClipConfig) for config in configs[noisy[0] :])
    # The median minds few large entries less than a mean of squares does; a few entries have no spread of their own.
    spreads = [float(o.abs().median() / 0.6745) ** 2 for o in observed if o.numel() >= 32] if clipped else []
    return min([variance / workers, *spreads])


def are_understood(configs: Sequence[TransformConfig]) -> bool:
    """Whether attacks know what all of these do: ours, and others that say how much noise they add."""
    kinds = [TRANSFORM_METHODS[config.method] for config in configs]
    return all(kind.__module__.startswith("raytrust.defend.") or hasattr(kind, "variance") for kind in kinds)
