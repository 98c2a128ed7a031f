"""Capture + attack -> metrics. The only reader of `Truth`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from raytrust.attacks.inversion import Candidates, invert
from raytrust.capture import Capture
from raytrust.config import InversionConfig
from raytrust.metrics import psnr, ssim


@dataclass(frozen=True)
class InversionResult:
    """What an inversion attack reached on n private batches, image by image in the order of the captures.

    ssim, psnr (dB): of the restart that the attacker picked by its own objective. oracle_ssim: of the restart that the
    truth would have picked, an upper bound that no attacker has. objective: of the picked restart, one a batch.
    reconstructions, originals: (images, channels, height, width) in [0, 1]. diverged: restarts dropped. seconds: wall.
    """

    attack: InversionConfig
    ssim: list[float]
    psnr: list[float]
    oracle_ssim: list[float]
    objective: list[float]
    diverged: int
    seconds: float
    reconstructions: Tensor
    originals: Tensor


def evaluate_inversion(captures: Sequence[Capture], attack: InversionConfig, device: str = "cpu") -> InversionResult:
    """Run the attack on what was seen, and compare with the truth.

    Images of one batch have no order that an attacker could know: they are matched to the truth by the assignment of
    greatest total SSIM. Raises FloatingPointError if all restarts of a batch diverged.
    """
    (result,) = evaluate_inversions(captures, [attack], device)
    return result


def evaluate_inversions(
    captures: Sequence[Capture], attacks: Sequence[InversionConfig], device: str = "cpu"
) -> list[InversionResult]:
    """`evaluate_inversion` for attacks of equal `iterations`, run as one batch; each bears its share of the time."""
    started = time.perf_counter()
    candidates = invert([(c.seen, attack) for attack in attacks for c in captures], device)
    seconds = time.perf_counter() - started
    n = len(captures)
    parts = [candidates[i * n : (i + 1) * n] for i in range(len(attacks))]
    return [
        _compare(captures, attack, part, seconds / len(attacks)) for attack, part in zip(attacks, parts, strict=True)
    ]


def _compare(
    captures: Sequence[Capture], attack: InversionConfig, candidates: Sequence[Candidates], seconds: float
) -> InversionResult:
    matched, oracle = [], []
    for capture, found in zip(captures, candidates, strict=True):
        finite = found.images[found.objective.isfinite()]
        picked = found.images[found.pick()]
        matched.append(_match(picked, capture.truth.images))
        every = [_match(images, capture.truth.images) for images in finite]
        oracle.append(max(every, key=lambda m: float(np.mean(m[1]))))
    originals = torch.cat([c.truth.images for c in captures])
    reconstructions = torch.cat([images for images, _ in matched])
    return InversionResult(
        attack=attack,
        ssim=[s for _, values in matched for s in values],
        psnr=[psnr(a.numpy(), b.numpy()) for a, b in zip(reconstructions, originals, strict=True)],
        oracle_ssim=[s for _, values in oracle for s in values],
        objective=[float(c.objective.min()) for c in candidates],
        diverged=sum(c.diverged for c in candidates),
        seconds=seconds,
        reconstructions=reconstructions,
        originals=originals,
    )


def _match(images: Tensor, truth: Tensor) -> tuple[Tensor, list[float]]:
    """The images in the truth's order, and their SSIM."""
    table = np.array([[ssim(a.numpy(), b.numpy()) for b in truth] for a in images])
    rows, columns = linear_sum_assignment(table, maximize=True)
    order = rows[np.argsort(columns)]
    return images[torch.from_numpy(order)], [float(table[i, j]) for j, i in enumerate(order)]
