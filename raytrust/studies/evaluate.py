"""Capture + attack -> metrics. The only reader of `Truth`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from raytrust.attacks.inversion import Candidates, invert
from raytrust.attacks.learned import Auxiliary, train_inverter
from raytrust.config import InversionConfig, LearnedInverterConfig
from raytrust.leak.observation import Capture
from raytrust.metrics.images import mse, psnr, registered_psnr
from raytrust.studies.comparison import (
    Floors,
    features_of,
    label_accuracy,
    match,
    perceptual_distance,
    shift_tolerant_distance,
)

# With the true image that makes a hundred candidates, of which guessing finds one in a hundred.
DISTRACTORS = 99

Request: TypeAlias = tuple[Sequence[Capture], Sequence[InversionConfig]]


@dataclass(frozen=True)
class Reconstructions:
    """What an attack reached on n private images, image by image in the order of the captures.

    ssim, psnr (dB), registered_psnr, mse, lpips: of the restart that the attacker picked by its own objective.
        registered_psnr is the greater of psnr and that of the image shifted onto its original; None without
        scikit-image. lpips (AlexNet, lower is closer) only where the package `lpips` and the weights it needs are
        installed, and st_lpips (its shift-tolerant kin) with the extra [lpips], see `studies.comparison`.
    oracle_ssim: the greatest over all restarts, for each image by itself: an upper bound that no attacker has.
    label_accuracy: one a batch, how many of its labels were recovered, as multisets; None where they were granted or
        the attack needs none.
    identified_mse, identified_ssim, identified_features: whether the reconstruction is nearer to its true image than to
        each of the `candidates` - 1 other images; ties are lost. Guessing reaches 1 / candidates. Features are what
        goes into the last linear layer of the attacked network in evaluation mode, compared by their L2 distance; None
        where it has no such layer.
    mean_image_ssim, other_image_ssim: floors, from other images of the data set: SSIM of their mean to the private
        image, and the mean of their SSIM to it, which is what a random other image can expect.
    history: of how many preceding steps the attacker had the messages, too.
    objective, matching: of the picked restart, one a batch; matching is without priors, None where there is none. Of an
        attack that solves for images, the objective is 1 where it had no solution, and mean images stand for one.
    diverged: restarts that broke off. seconds: wall. cpu_seconds: of the process, meanwhile.
    reconstructions, originals: (images, channels, height, width) in [0, 1].
    """

    ssim: list[float]
    psnr: list[float]
    registered_psnr: list[float] | None
    mse: list[float]
    lpips: list[float] | None
    st_lpips: list[float] | None
    oracle_ssim: list[float]
    label_accuracy: list[float] | None
    identified_mse: list[bool] | None
    identified_ssim: list[bool] | None
    identified_features: list[bool] | None
    candidates: int
    mean_image_ssim: list[float] | None
    other_image_ssim: list[float] | None
    history: int
    objective: list[float]
    matching: list[float] | None
    diverged: int
    seconds: float
    cpu_seconds: float
    reconstructions: Tensor
    originals: Tensor


@dataclass(frozen=True)
class InversionResult(Reconstructions):
    """What an inversion attack reached."""

    attack: InversionConfig


@dataclass(frozen=True)
class LearnedResult(Reconstructions):
    """What a learned inverter reached. objective: its loss on held-out auxiliary images, the same for all images; there
    is no matching distance. losses: that loss epoch by epoch, after that of the mean of the auxiliary images. seconds:
    with the training."""

    attack: LearnedInverterConfig
    losses: list[float]


@dataclass(frozen=True)
class InversionFailure:
    """An attack that has no result: it can't be made on these captures, or all restarts of a batch diverged."""

    attack: InversionConfig
    error: ValueError | FloatingPointError


def evaluate_inversion(
    captures: Sequence[Capture], attack: InversionConfig, device: str = "cpu", references: Tensor | None = None
) -> InversionResult:
    """Run the attack on what was seen, and compare with the truth.

    Images of one batch have no order that an attacker could know: they are matched to the truth by the assignment of
    greatest total SSIM. references: other images of the data set, (n, channels, height, width) in [0, 1], for the
    floors and for identification, for which the first 99 serve; the attack does not get them. Raises FloatingPointError
    if all restarts of a batch diverged, ValueError if the attack can't be made.
    """
    (result,) = evaluate_inversions(captures, [attack], device, references)
    if isinstance(result, InversionFailure):
        raise result.error
    return result


def evaluate_inversions(
    captures: Sequence[Capture],
    attacks: Sequence[InversionConfig],
    device: str = "cpu",
    references: Tensor | None = None,
) -> list[InversionResult | InversionFailure]:
    """`evaluate_inversion` for several attacks, run together; an attack that fails does so alone."""
    (results,) = evaluate_together([(captures, attacks)], device, references)
    return results


def evaluate_together(
    requests: Sequence[Request], device: str = "cpu", references: Tensor | None = None
) -> list[list[InversionResult | InversionFailure]]:
    """`evaluate_inversions` for the captures of several defences, each with attacks of its own, as one batch.

    All captures are of one model at one step, as those of the untrained model are. The results of each request, in
    order.
    """
    watch = _watch()
    reached = _run(requests, device)
    spent = watch()
    # The attacks run as one batch, with one clock: each is charged by the passes that it asked for.
    total = sum(_passes(captures, a) for captures, attacks in requests for a in attacks)
    results = []
    for (captures, attacks), of_request in zip(requests, reached, strict=True):
        floors = _floors(captures, references, device)
        shares = [spent.share(_passes(captures, a) / total) for a in attacks]
        results.append([_result(captures, *one, floors) for one in zip(attacks, of_request, shares, strict=True)])
    return results


def _passes(captures: Sequence[Capture], attack: InversionConfig) -> int:
    return sum(attack.passes(capture.seen.local) for capture in captures)


def _result(
    captures: Sequence[Capture],
    attack: InversionConfig,
    candidates: Sequence[Candidates] | ValueError,
    spent: _Spent,
    floors: Floors | None,
) -> InversionResult | InversionFailure:
    try:
        if isinstance(candidates, ValueError):
            raise candidates
        solves = attack.method == "analytic"
        return InversionResult(attack=attack, **vars(_compare(captures, candidates, floors, spent, solves)))
    # A failure becomes a value, so that an attack which diverges does not take the others of its batch with it.
    except (ValueError, FloatingPointError) as error:
        return InversionFailure(attack, error)


def evaluate_learned(
    captures: Sequence[Capture],
    config: LearnedInverterConfig,
    auxiliary: Auxiliary,
    device: str = "cpu",
    references: Tensor | None = None,
) -> LearnedResult:
    """Train an inverter for the captures, which are of one model at one step, and compare what it makes of their
    messages with the truth, as `evaluate_inversion` does.

    Raises ValueError if a private image is among the auxiliary ones, and as `train_inverter` does.
    """
    # An inverter that was trained on a private image hands back what it remembers, not what the message tells.
    _refuse_private(captures, auxiliary.images)
    watch = _watch()
    inverter = train_inverter(captures[0].seen, auxiliary, config, device)
    images = inverter.reconstruct([c.seen for c in captures])
    spent = watch()
    candidates = [Candidates(image[None, None], torch.tensor([inverter.held_out_loss])) for image in images]
    reached = _compare(captures, candidates, _floors(captures, references, device), spent)
    return LearnedResult(attack=config, losses=inverter.losses, **vars(reached))


def _refuse_private(captures: Sequence[Capture], images: Tensor) -> None:
    """Raises ValueError if a private image is, to 8 bits a pixel, among these."""

    def key(image: Tensor) -> bytes:
        # Bytes can be looked up at once, and do not depend on how a float was rounded.
        return (image * 255).round().byte().numpy().tobytes()

    places = {key(image): i for i, image in enumerate(images)}
    for capture in captures:
        for image in capture.truth.images:
            if key(image) in places:
                raise ValueError(
                    f"Expected auxiliary images without the private ones, got that of capture {capture.index} at "
                    f"{places[key(image)]}."
                )


@dataclass(frozen=True)
class _Spent:
    """Seconds by the clock, and of this process on CPUs."""

    wall: float
    cpu: float

    def share(self, part: float) -> _Spent:
        return _Spent(self.wall * part, self.cpu * part)


def _watch() -> Callable[[], _Spent]:
    """Begin to measure; what it returns tells what has been spent since."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: _Spent(time.perf_counter() - wall, time.process_time() - cpu)


def _run(requests: Sequence[Request], device: str) -> list[list[Sequence[Candidates] | ValueError]]:
    """By request and attack what it arrived at, one a capture, or why it can't be made; together, or else, where one of
    them can't be made, one by one."""
    jobs = [(c.seen, attack) for captures, attacks in requests for attack in attacks for c in captures]
    try:
        candidates = iter(invert(jobs, device))
    except ValueError as error:
        # The error does not say which attack can't be made: each is tried alone, so that the others still run.
        if len(requests) > 1:
            return [_run([request], device)[0] for request in requests]
        ((captures, attacks),) = requests
        return [[error]] if len(attacks) == 1 else [[_run([(captures, [a])], device)[0][0] for a in attacks]]
    return [[[next(candidates) for _ in captures] for _ in attacks] for captures, attacks in requests]


def _floors(captures: Sequence[Capture], references: Tensor | None, device: str) -> Floors | None:
    originals = [c.truth.images.numpy() for c in captures]
    if references is None:
        return None
    return Floors(originals, references[:DISTRACTORS].numpy(), features_of(captures[0].seen, device))


def _compare(
    captures: Sequence[Capture],
    candidates: Sequence[Candidates],
    floors: Floors | None,
    spent: _Spent,
    solves: bool = False,
) -> Reconstructions:
    """solves: whether the attack solves for images, and has none where nothing can be solved."""
    unsolved = [solves and not bool(c.objective.isfinite().any()) for c in candidates]
    if all(unsolved):
        raise FloatingPointError("Expected messages that the attack can solve for the images, got none.")
    # The attacker picks by its own objective: to pick by SSIM to the truth would flatter the attack. Where it solves
    # some batches alone, it hands in mean images for the others: without any result those would not count, either.
    chosen = [0 if lost else c.pick() for c, lost in zip(candidates, unsolved, strict=True)]
    handed_in = [c.images[i] for c, i in zip(candidates, chosen, strict=True)]
    picked = [match(images, c.truth.images) for images, c in zip(handed_in, captures, strict=True)]
    oracle: list[float] = []
    for capture, found, lost in zip(captures, candidates, unsolved, strict=True):
        # A restart that never had a finite objective arrived nowhere, and bounds nothing.
        some = found.images if lost else found.images[found.objective.isfinite()]
        every = [match(images, capture.truth.images)[1] for images in some]
        oracle += np.max(every, axis=0).tolist()
    originals = torch.cat([c.truth.images for c in captures])
    reconstructions = torch.cat([images for images, _ in picked])
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(reconstructions, originals, strict=True)]
    ssim, errors = [s for _, values in picked for s in values], [mse(a, b) for a, b in pairs]
    lpips, tolerant = perceptual_distance(), shift_tolerant_distance((originals.shape[2], originals.shape[3]))
    matching = [None if c.matching is None else c.matching[i] for c, i in zip(candidates, chosen, strict=True)]
    return Reconstructions(
        ssim=ssim,
        psnr=[psnr(a, b) for a, b in pairs],
        # Audits run in environments without it.
        registered_psnr=[registered_psnr(a, b) for a, b in pairs] if find_spec("skimage") else None,
        mse=errors,
        lpips=None if lpips is None else lpips(reconstructions, originals),
        st_lpips=None if tolerant is None else tolerant(reconstructions, originals),
        oracle_ssim=oracle,
        label_accuracy=label_accuracy(captures, candidates),
        identified_mse=None if floors is None else floors.identified_by_mse(reconstructions.numpy(), errors),
        identified_ssim=None if floors is None else floors.identified(reconstructions.numpy(), ssim),
        identified_features=None if floors is None else floors.identified_by_features(reconstructions.numpy()),
        candidates=1 if floors is None else 1 + len(floors.references),
        mean_image_ssim=None if floors is None else floors.mean_image,
        other_image_ssim=None if floors is None else floors.other_image,
        history=min(len(c.seen.history) for c in captures),
        # Of a solution it is a share that is left over: all of it where there is none.
        objective=[1.0 if lost else float(c.objective.min()) for c, lost in zip(candidates, unsolved, strict=True)],
        matching=None if any(m is None for m in matching) else [float(m) for m in matching if m is not None],
        diverged=sum(c.diverged for c in candidates),
        seconds=spent.wall,
        cpu_seconds=spent.cpu,
        reconstructions=reconstructions,
        originals=originals,
    )
