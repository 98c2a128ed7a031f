"""Section 3 of the paper, tested: what a compressor discards, and what cosine an attacker reaches in spite of it.

With g the gradient and C(g) what the message decodes to:

- eq. (5): the squared error of a matrix truncated to rank r is the sum of its discarded squared singular values, an
  equality for the truncated SVD; PowerSGD's error is at least that, as it finds the subspace by one iteration.
- eq. (6): Top-K's squared error is the sum of the discarded squares, an equality.
- eq. (7): uncompressed, the matching distance at the private image is 0.
- Both compressors are orthogonal projections of g, so that cos(g, C(g)) = ||C(g)|| / ||g||: the paper's limit below 1.

The limit is one of the true image under the naive objective. It bounds neither the cosine that another image reaches
with C(g), nor the aware objective, whose distance at the private image is 0 again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrust.attacks.inversion import per_candidate_gradients
from raytrust.attacks.inversion.objectives import target_view
from raytrust.config import Defence, InversionConfig, PowerSGDConfig, TopKConfig
from raytrust.data import Dataset
from raytrust.leak.observation import Capture, Observation, decoded
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.studies.paper.plan import Victim
from raytrust.train.loop import capture_images


def examine(
    victim: Victim,
    defence: Defence,
    attack: InversionConfig,
    data: Dataset,
    images: Sequence[int],
    state: dict[str, Tensor] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """All figures of one defence at one state, a list over images each; see the module for what they test."""
    chosen = torch.tensor(list(images))
    x, y = data.test_images[chosen], data.test_labels[chosen]
    # Also without compression, since a message does not hold what it discards.
    plain = capture_images(victim.train_config(), data, x, y, state, victim.steps, device=device)
    sent = capture_images(victim.train_config(defence), data, x, y, state, victim.steps, device=device)
    found: dict[str, Any] = {}
    for i, (whole, capture) in enumerate(zip(plain, sent, strict=True)):
        gradient, message = (decoded(c.seen, device).gradient for c in (whole, capture))
        figures = compare(gradient, message, defence)
        figures |= at_the_truth(capture.seen, x[i].float() / 255, attack, device)
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    for objective in ("naive", "aware"):
        config = replace(attack, objective=objective)
        found |= _reached(plain, sent, config, device)
    return found


def compare(gradient: Sequence[Tensor], sent: Sequence[Tensor], defence: Defence) -> dict[str, float]:
    """Of one gradient and what its message decodes to, in float64.

    cosine, attainable: cos(g, C(g)) and ||C(g)|| / ||g||. error: ||g - C(g)||^2 / ||g||^2. from_error: the cosine that
    this error leaves a projection, sqrt(1 - error). discarded: what eq. (5) or (6) say of the error, relative too: the
    least that rank r allows, or the squares of what Top-K did not send. svd: the error of the truncated SVD itself,
    for PowerSGD, else discarded.
    """
    # In float64: float32 sums of millions of squares lose the digits by which an identity is tested.
    g, c = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (gradient, sent))
    square = float(g @ g)
    error = float((g - c).square().sum()) / square
    discarded = svd = 0.0
    match defence.compressor:
        case PowerSGDConfig(rank=rank):
            # PowerSGD sends biases and scales whole: only matrices lose anything.
            pairs = [_truncated(m.flatten(1).double(), rank) for m in gradient if m.ndim > 1]
            discarded, svd = (sum(column) / square for column in zip(*pairs, strict=True))
        case TopKConfig():
            # Counted in the message itself, so that the test does not repeat the rule which chose the number.
            kept = int((c != 0).sum())
            discarded = svd = float(g.abs().sort(descending=True).values[kept:].square().sum()) / square
    return {
        "cosine": float(g @ c) / (square * float(c @ c)) ** 0.5,
        "attainable": (float(c @ c) / square) ** 0.5,
        "error": error,
        # Rounding can leave an error slightly above 1.
        "from_error": max(0.0, 1 - error) ** 0.5,
        "discarded": discarded,
        "svd": svd,
    }


def _truncated(matrix: Tensor, rank: int) -> tuple[float, float]:
    """(sum of the discarded squared singular values, squared error of the truncated SVD): two ways to one number."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ v[:rank]
    return float(s[rank:].square().sum()), float((matrix - kept).square().sum())


def at_the_truth(seen: Observation, image: Tensor, attack: InversionConfig, device: str = "cpu") -> dict[str, float]:
    """The matching distances of both objectives at the private image, (channels, height, width) in [0, 1]."""
    grads = _gradient_at(seen, image, device)
    views = {o: target_view(seen, replace(attack, objective=o), device) for o in ("naive", "aware")}
    return {f"{o}_at_truth": float(view.distance(grads)) for o, view in views.items()}


def _gradient_at(seen: Observation, image: Tensor, device: str) -> list[Tensor]:
    """The gradient that the observed model has at an image, (channels, height, width) in [0, 1], with its label; on the
    device."""
    assert seen.labels is not None
    x = (image - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
    model, label = seen.build_model().to(device), seen.labels[None].to(device)
    return [g.detach() for g in per_candidate_gradients(model, x[None, None].to(device), label)]


def _reached(
    plain: Sequence[Capture], sent: Sequence[Capture], attack: InversionConfig, device: str
) -> dict[str, list[float]]:
    """What an attack reaches: its own cosine (1 - matching distance), that with the whole gradient, and SSIM."""
    result = evaluate_inversion(sent, attack, device)
    assert result.matching is not None
    naive, cosines = replace(attack, objective="naive"), []
    # The paper's limit is on the cosine with the whole gradient, which the attacker never sees.
    for capture, image in zip(plain, result.reconstructions, strict=True):
        view = target_view(capture.seen, naive, device)
        cosines.append(1 - float(view.distance(_gradient_at(capture.seen, image, device))))
    name = attack.objective
    return {
        f"{name}_reached": [float(1 - m) for m in result.matching],
        f"{name}_with_gradient": cosines,
        f"{name}_ssim": np.asarray(result.ssim).tolist(),
    }
