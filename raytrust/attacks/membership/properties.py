"""Property inference (Melis et al. 2019): what a training batch holds besides what the model is trained for.

The attacker knows the model at a step, and has images of its own with and without the property. It computes the
gradients of batches of them, compresses them with the worker's compressor in its public state, and trains a classifier
on what they decode to; the worker's messages are then decoded and classified. The residual of error feedback is
private: the attacker's own batches have none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from raytrust.leak.observation import Observation, decoded
from raytrust.networks.kernels import sound_kernels
from raytrust.wire.channel import LocalChannel, Tap

Array = NDArray[np.float64]


def property_scores(
    seen: Sequence[Observation],
    images: Tensor,
    labels: Tensor,
    holds: Tensor,
    compressed: bool = True,
    device: str = "cpu",
) -> Array:
    """How sure the attacker is that each observed batch has the property, (observations,); higher means yes.

    seen: of one model at one step. images: (k, batch, channels, height, width) in [0, 1], the attacker's batches;
    labels: (k, batch), of the model's task; holds: (k,), which of them have the property. compressed: whether the
    attacker compresses its batches as the worker does, or takes their gradients as they are. device: where gradients
    are taken; the classifier is fitted on the CPU.
    """
    first = seen[0]
    model = first.build_model().to(device)
    mean, std = (s.to(device).view(-1, 1, 1) for s in (first.mean, first.std))
    compressor = first.build_compressor()
    own = []
    for x, y in zip(images, labels, strict=True):
        with sound_kernels(model):
            loss = F.cross_entropy(model((x.to(device) - mean) / std), y.to(device))
            gradient = list(torch.autograd.grad(loss, list(model.parameters())))
        if compressed:
            tap = Tap(LocalChannel(), keep=True)
            # A copy for each batch, as compressing changes the state: the worker's message was made in this one.
            copy.deepcopy(compressor).reduce(gradient, tap)
            (gradient,) = compressor.decode(tap.messages, "link")
        own.append(_vector(gradient))
    features = torch.stack(own).double()
    observed = torch.stack([_vector(decoded(s, device).gradient) for s in seen]).double()
    return _classify(features.numpy(), holds.numpy(), observed.numpy())


def auxiliary_batches(has: Tensor, count: int, size: int, generator: np.random.Generator) -> Tensor:
    """Indices (count, size) of images: no batch holds one twice, and every other batch has one with the property.

    has: (n,), which images have the property. A batch with it holds one such image at least, and each of its others has
    it by the share of the property among all images. Raises ValueError if there are too few images of either kind.
    """
    yes, no = (torch.nonzero(part)[:, 0].numpy() for part in (has, ~has))
    if len(yes) < size or len(no) < size:
        raise ValueError(f"Expected at least {size} images with the property and without, got {len(yes)}, {len(no)}.")
    batches = []
    for i in range(count):
        with_it = 0 if i % 2 else 1 + generator.binomial(size - 1, len(yes) / len(has))
        parts = [generator.choice(a, k, replace=False) for a, k in ((yes, with_it), (no, size - with_it))]
        batches.append(np.concatenate(parts))
    return torch.from_numpy(np.stack(batches))


def _vector(gradient: Sequence[Tensor]) -> Tensor:
    """All entries, on the CPU."""
    return torch.cat([g.detach().reshape(-1) for g in gradient]).cpu()


def _classify(features: Array, holds: NDArray[np.bool_], observed: Array) -> Array:
    """Ridge-penalised logistic regression in the span of the attacker's own, centred features: (observed,).

    Gradients have more entries than there are batches, so it is fitted on the principal components, all of them, which
    is the same fit. One scale serves all.
    """
    centre = features.mean(axis=0)
    u, s, vt = np.linalg.svd(features - centre, full_matrices=False)
    # Centred features of k batches span at most k - 1 directions: what is left is rounding, not evidence.
    keep = s > 1e-6 * s[0]
    scale = s[0] / np.sqrt(len(features))
    classifier = LogisticRegression(C=1.0, max_iter=1000).fit((u * s)[:, keep] / scale, holds)
    return np.asarray(classifier.decision_function((observed - centre) @ vt[keep].T / scale))
