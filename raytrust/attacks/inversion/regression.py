"""Images regressed on the features that the classifier's gradient gives away, with images of the attacker's own.

For one image the gradient of the last linear layer is (p - y) h^T and that of its bias p - y: the two give h, what goes
into that layer, exactly. Of rank one, it passes PowerSGD of any rank whole, and as the largest part of the gradient
most of it passes Top-K. From h to the image it is a regression, for which the attacker needs forward passes of other
images alone, and no iterations. Xue et al. 2024 ("Fast Generation-Based Gradient Leakage against Highly Compressed
Gradients") train a generator for it; ours is linear, with a closed form: on untrained networks a small convolutional
generator did no better (docs/findings.md).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from raytrust.attacks.inversion.engine import Candidates, labels_of
from raytrust.config import InversionConfig
from raytrust.config.attacks import REGRESSION
from raytrust.leak.observation import Observation, decoded
from raytrust.networks.classifier import final_linear
from raytrust.networks.task import Sample

CHUNK = 64  # images of a forward pass
FIXED_POINT = 30  # rounds of finding the probabilities, which the features decide, and the features, which they decide
WEAKEST = 1e-6  # relative to the strongest: directions of the classifier's gradient that are weaker hold rounding alone
NOTHING = 1e-6  # relative to the largest: singular values of the standardised features that are rounding
# Weights of the ridge that are tried, relative to the mean square of the standardised features.
RIDGES = tuple(10.0**k for k in range(-6, 3))


@dataclass(frozen=True)
class Regression:
    """A linear map from features to images.

    centre, scale: (features,), by which features are standardised. weight: (features, pixels). mean: (pixels,), in
    [0, 1]. unexplained: the share of the pixels' variance that it leaves on images that it was not fitted to, as
    generalised cross-validation estimates it.
    """

    centre: Tensor
    scale: Tensor
    weight: Tensor
    mean: Tensor
    unexplained: float

    def __call__(self, features: Tensor) -> Tensor:
        """(n, features) -> (n, pixels) in [0, 1]."""
        standardised = (features - self.centre) * self.scale
        return (self.mean + standardised @ self.weight).clamp(0, 1)


def regression(seen: Observation, config: InversionConfig, device: str = "cpu") -> Candidates:
    """The images that the regression makes of the features; its objective is what it leaves unexplained, the same for
    all observations of a model.

    Raises ValueError as `regressed_images` does.
    """
    images, fitted = regressed_images(seen, device)
    return Candidates(images[None], torch.tensor([fitted.unexplained]))


def regressed_images(seen: Observation, device: str = "cpu") -> tuple[Tensor, Regression]:
    """(images (batch, channels, height, width) in [0, 1], the regression that made them).

    Raises ValueError without auxiliary images, for several local steps, for another loss than the cross-entropy, for a
    model that does not end in a linear layer, and for a batch of as many images as there are classes, or more, whose
    features the gradient does not determine.
    """
    least = max(2, seen.threat.batch_size)
    if seen.auxiliary is None or len(seen.auxiliary) < least:
        raise ValueError(f"Expected auxiliary={seen.threat.auxiliary} to be at least {least} images for a regression.")
    if seen.local.steps > 1:
        raise ValueError(f"Expected local_steps={seen.local.steps} to be 1 for a regression on features.")
    inputs = isinstance(seen.targets, Sample) and bool(seen.targets.inputs)
    if seen.task.loss is not None or seen.task.argument is not None or inputs:
        raise ValueError("Expected the loss to be the cross-entropy of images' classes for a regression on features.")
    fitted = _fitted(_Fit(seen, device))
    images = fitted(_features_sent(seen, fitted.centre, device))
    return images.view(-1, *seen.image_shape).cpu(), fitted


def _features_sent(seen: Observation, typical: Tensor, device: str) -> Tensor:
    """What went into the last linear layer, (batch, features), as the decoded gradient G = D^T H of it has it, with
    D = (p - y) / images, of which there are more than the batch has where only the mean over workers is seen.

    typical: (features,), of which the first guess at the probabilities p is made.
    """
    size, classes = seen.threat.batch_size, seen.classes
    # Each row of p - y sums to zero, so that D has a rank of at most one less than there are classes.
    if size >= classes:
        raise ValueError(f"Expected batch_size={size} to be less than classes={classes} for a regression on features.")
    name, layer = final_linear(seen.build_model(), seen.image_shape, classes)
    if f"{name}.weight" not in seen.weights:
        raise ValueError(
            "Expected a classifier whose weight is sent for a regression on features: it is frozen or derived."
        )
    names, (gradient, images) = list(seen.weights), decoded(seen, device)
    weight = gradient[names.index(f"{name}.weight")].float()
    sent_bias = f"{name}.bias" in seen.weights
    if size == 1 and sent_bias:
        # Exact without the probabilities, which the bias's gradient gives as they are.
        slope = gradient[names.index(f"{name}.bias")].float()
        return ((slope @ weight) / slope.square().sum().clamp_min(torch.finfo(slope.dtype).tiny))[None]
    # Of mixed images the targets, where they are granted. An attack that begins here may look for its labels in another
    # way: the regression's are its own.
    labels = labels_of(seen, REGRESSION) if seen.mixed is None else seen.mixed
    if not isinstance(labels, Tensor):
        raise ValueError("Expected labels that are known, or recovered beforehand, for a regression on features.")
    if labels.is_floating_point():  # of mixed images, as probabilities
        wanted = labels.to(weight)
    else:
        wanted = nn.functional.one_hot(labels.to(device), classes).to(weight)
    w, b = layer.weight.detach().to(weight), None if layer.bias is None else layer.bias.detach().to(weight)
    features = typical.to(weight).expand(size, -1)
    # A trained model's features decide their probabilities, and these with the gradient the features: from a typical
    # image's on, the two are found in turns.
    for _ in range(FIXED_POINT):
        errors = (nn.functional.linear(features, w, b).softmax(1) - wanted) / images
        features, last = torch.linalg.pinv(errors.T, rtol=WEAKEST) @ weight, features
        if bool((features - last).norm() <= 1e-6 * features.norm()):
            break
    return features


@dataclass(frozen=True, eq=False)
class _Fit:
    """What a regression is of, as a key: equal models and equal auxiliary images have one."""

    seen: Observation
    device: str

    @cached_property
    def _key(self) -> str:
        seen = self.seen
        # Weights alone don't make a network: nor do they say how images are normalised and which are passed together.
        # A module in memory has no description; while it stands in a key it keeps its identity.
        given = (seen.model, id(seen.network), seen.threat.batch_norm, seen.threat.batch_size, seen.classes)
        shapes = [(name, tuple(x.shape)) for name, x in (*seen.weights.items(), *seen.buffers.items())]
        digest = hashlib.sha256(repr((self.device, seen.image_shape, given, shapes)).encode())
        assert seen.auxiliary is not None
        for tensor in (*seen.weights.values(), *seen.buffers.values(), seen.mean, seen.std, seen.auxiliary):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fit) and self._key == other._key


# The captures of a step share a model, and come in several calls: those that choose attacks and those that report.
@lru_cache(maxsize=2)
def _fitted(fit: _Fit) -> Regression:
    seen = fit.seen
    assert seen.auxiliary is not None
    images, features = seen.auxiliary.flatten(1).to(fit.device), _features(seen, seen.auxiliary, fit.device)
    return fit_regression(features, images)


@torch.no_grad()
def _features(seen: Observation, images: Tensor, device: str) -> Tensor:
    """What goes into the last linear layer, (n, features), of images (n, channels, height, width) in [0, 1]: in batches
    of the private one's size where batch norm mixes them."""
    model = seen.build_model()
    _, layer = final_linear(model, seen.image_shape, seen.classes)
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    model.to(device)
    mean, std = (s.view(-1, 1, 1) for s in (seen.mean, seen.std))
    size = seen.threat.batch_size if seen.threat.batch_norm == "train" else CHUNK
    for batch in images[: len(images) // size * size].split(size) if size != CHUNK else images.split(CHUNK):
        model(((batch - mean) / std).to(device))
    handle.remove()
    features = torch.cat(found)
    if features.ndim != 2:
        shape = tuple(features.shape[1:])
        raise ValueError(f"Expected a classifier of one vector an image, got features of shape {shape} an image.")
    if not bool(features.isfinite().all()):
        raise ValueError("Expected finite features of the auxiliary images for a regression on them.")
    return features


def fit_regression(features: Tensor, images: Tensor) -> Regression:
    """Ridge regression of images (n, pixels) on features (n, features), n at least 2, whose weight has the least error
    by generalised cross-validation (Golub, Heath & Wahba 1979)."""
    images = images[: len(features)]
    centre, mean = features.mean(0), images.mean(0)
    spread = features.std(0)
    # A feature that (nearly) never varied tells nothing, and would be blown up if it once did.
    scale = torch.where(spread > 1e-3 * spread.mean(), 1 / spread, torch.zeros_like(spread))
    a, y = ((features - centre) * scale).double(), (images - mean).double()
    u, s, rows = torch.linalg.svd(a, full_matrices=False)
    mean_square = float(s.square().sum()) / max(1, len(s))
    # Centred features have a direction less than images: what is left of it is rounding.
    told = s > NOTHING * s.max()
    u, s, rows = u[:, told], s[told], rows[told]
    turned, total, n = u.T @ y, float(y.square().sum()), len(a)
    # One decomposition serves all weights. Beyond its directions nothing is explained, one of which is the mean's.
    energy, free = turned.square().sum(1), n - 1 - len(s)
    rest = max(0.0, total - float(energy.sum())) if free else 0.0
    best, least = s * 0, float("inf")
    for ridge in RIDGES:
        # Of 1 - f, as with fewer images than features a weak ridge leaves little of either figure, but not of their
        # quotient.
        lost = ridge * mean_square / (s.square() + ridge * mean_square)
        residual = rest + float((lost.square() * energy).sum())
        freedom = (free + float(lost.sum())) / n
        error = residual / n / freedom**2
        if error < least:
            best, least = 1 - lost, error
    weight = rows.T @ ((best / s)[:, None] * turned)
    return Regression(centre, scale, weight.float(), mean, least * n / total if total > 0 else 1.0)
