"""The labels of a private batch, from the gradient of the classifier that its messages decode to.

All methods rest on one identity: for the mean cross-entropy of B images, the gradient of the bias of class c is

    b_c = mean_n p_nc - count_c / B,

with p_nc the probability that the model gives to class c for image n (along local steps, on average over them); that of
row c of the weights is the same mean
with each image's term multiplied by its features, which are at least 0 after a ReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.config import ClipConfig
from raytrust.leak.observation import Observation, decoded
from raytrust.leak.soteria import pruned_by_soteria
from raytrust.networks.classifier import final_linear

NOISE_IMAGES = 64
# Of B b_c, in labels: a class that is absent and never predicted has a slope of rounding, of either sign.
ROUNDING = 1e-4


def recover_labels(seen: Observation, method: str) -> Tensor:
    """The labels (batch_size,) in increasing order: which image has which is not in the gradient.

    "idlg": the class whose weights have the least gradient sum; one image (Zhao et al. 2020, eq. 6).
    "bias_sign": the classes of negative bias gradient, which are in the batch for sure if the gradient is exact, least
        first, and again from the first if places are left (after Yin et al. 2021, sec. 3.2, for distinct labels).
    "counts": how often each class occurs, by the identity above with the mean probabilities that the model gives to
        noise (in the manner of LLG, Wainakh et al. 2022). If the gradient is exact, no class gets less than it must. Of
        a clipped gradient, or of one whose columns Soteria pruned and that has no bias, the length is estimated first,
        from the classes that are not in the batch.

    Raises ValueError for a model without a final linear layer of one output a class, and for "idlg" on a batch.
    """
    weight, bias = classifier_gradient(seen)
    batch, local = seen.threat.batch_size, seen.local
    if local.parts(batch) and local.steps * (local.batch_size or 0) % batch:
        raise ValueError(
            f"Expected {local.steps} local steps of batch_size={local.batch_size} to take each of {batch} images "
            "equally often, to recover labels."
        )
    if method == "idlg":
        if batch != 1:
            raise ValueError(f"Expected batch_size={batch} to be 1 for label_recovery='idlg'.")
        # Of one image only the true class has a negative factor, p - 1, and features behind a ReLU are never negative.
        return weight.sum(1).argmin()[None]
    probabilities, feature_sum = _on_noise(seen)
    slopes = _bias_gradient(weight, bias, feature_sum)
    if method == "bias_sign":
        order = slopes.argsort(stable=True)
        # Compression may have dropped every negative entry: the least one is the best guess then.
        present = order[: max(1, int((slopes < 0).sum()))]
        return present.repeat(batch)[:batch].sort().values
    # Without a bias slopes come from rows, which lack what Soteria pruned of them.
    clipped = _is_shorter(seen) or (bias is None and pruned_by_soteria(seen) is not None)
    if clipped:
        slopes = slopes / _length(slopes, probabilities)
    expected = batch * (probabilities - slopes)
    if not clipped:
        # As no probability is below 0, count_c >= -B b_c: what a class must have for sure.
        expected = torch.maximum(expected, torch.ceil(-batch * slopes - ROUNDING))
    counts = torch.zeros_like(expected)
    present = slopes.argsort(stable=True)[: int((slopes * batch < -ROUNDING).sum())][:batch]
    # First one of each class whose slope is negative, as a sign survives more of a compressor than a magnitude does.
    counts[present] = 1
    # Each place that is left goes to the class that is furthest below its due: so the counts sum to the batch.
    for _ in range(batch - len(present)):
        counts[(expected - counts).argmax()] += 1
    return torch.repeat_interleave(torch.arange(len(counts)), counts.long())


def classifier_gradient(seen: Observation) -> tuple[Tensor, Tensor | None]:
    """(classes, features) and (classes,), or None without a bias: the decoded gradient of the last linear layer."""
    name, layer = final_linear(seen.build_model(), seen.image_shape, seen.classes)
    if f"{name}.weight" not in seen.weights:
        raise ValueError("Expected a classifier whose weight is sent, to recover labels: it is frozen or derived.")
    by_name = dict(zip(seen.weights, decoded(seen).gradient, strict=True))
    return by_name[f"{name}.weight"].cpu(), None if layer.bias is None else by_name[f"{name}.bias"].cpu()


def _bias_gradient(weight: Tensor, bias: Tensor | None, feature_sum: float) -> Tensor:
    """b_c, (classes,): as it was sent, else from the weights' rows, whose sums are b_c times the sum of features.

    An entry that is exactly 0 was not sent. The sum of features is fitted to the classes where both were sent, and
    taken from noise images where there is none.
    """
    rows = weight.sum(1)
    if bias is None:
        return rows / feature_sum
    both = (bias != 0) & (rows != 0)
    fitted = float((rows * bias)[both].sum() / bias[both].square().sum()) if bool(both.any()) else feature_sum
    return torch.where(bias != 0, bias, rows / fitted)


def _is_shorter(seen: Observation) -> bool:
    """Whether the gradient may have been clipped to another length than it had."""
    received = decoded(seen)
    if not (seen.defence.shows_all and received.images == seen.threat.batch_size):
        return seen.defence.clips
    norms = [transform.norm for transform in seen.defence.transforms if isinstance(transform, ClipConfig)]
    # What is sent whole and shorter than it had to be was left as it was.
    length = float(torch.stack([g.norm() for g in received.gradient]).norm())
    return any(length > 0.999 * norm for norm in norms)


def _length(slopes: Tensor, probabilities: Tensor) -> float:
    """To which share of its length a gradient was clipped: by classes not in the batch, where b_c = mean_n p_nc."""
    absent = slopes > 0
    share = float(slopes[absent].sum() / probabilities[absent].sum()) if bool(absent.any()) else 1.0
    return min(1.0, max(share, torch.finfo(slopes.dtype).tiny))


@torch.no_grad()
def _on_noise(seen: Observation) -> tuple[Tensor, float]:
    """What the model makes of noise images: mean probabilities (classes,), and the sum of the classifier's inputs."""
    # Half of them white and half smooth: an untrained model gives all images much the same probabilities, a trained one
    # takes white noise for very few classes.
    model = seen.build_model()
    features: list[Tensor] = []
    layer = final_linear(model, seen.image_shape, seen.classes)[1]
    layer.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    # A fixed seed, as equal messages must give equal labels, and the global generator is the user's.
    generator = torch.Generator().manual_seed(0)
    channels, *size = seen.image_shape
    white = torch.randn((NOISE_IMAGES // 2, *seen.image_shape), generator=generator)
    coarse = torch.randn((NOISE_IMAGES // 2, channels, 4, 4), generator=generator)
    logits = model(torch.cat([white, F.interpolate(coarse, size, mode="bilinear")]))
    # The sum of features becomes a divisor, and a network may have no active feature on noise.
    return logits.softmax(1).mean(0), max(float(features[0].flatten(1).sum(1).mean()), torch.finfo(torch.float32).tiny)
