"""What a measured leakage allows one to say: one rule, for every table, figure, page and log.

The rule was fixed before the figures it judges were seen.

- *Floor.* What is reached without the message: of an image, the SSIM of the data set's mean image or of a random other
  image with it, whichever of the two has the greater mean over the images; of membership, an AUC of 0.5. *Excess*: the
  value less the floor, paired by image, with its 95 % interval (expanded percentile bootstrap over images).
- *Identification.* A reconstruction is identified if it is nearer to its true image than to all other candidates. The
  count is beyond chance if a one-sided binomial test against 1 / candidates has p < 0.025.
- *Control.* The same attack where nothing is compressed. It works if the interval of its excess lies above 0 and, where
  there is identification, at least half of the images are identified and their count is beyond chance.
- *Verdict.* A defence **leaks** if the interval of its excess lies above 0 or identification is beyond chance. That
  stands even where the control fails: evidence of a leak is evidence. It **resists** the attacks tried if the control
  works, the interval ends at or below 0, and identification is not beyond chance. Else it is **undecided**, always so
  with fewer than two images or without a floor.

An attack that fails without compression says nothing about any defence: there all that doesn't leak is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from raytrust.metrics.distributions import binomial_tail
from raytrust.metrics.statistics import Figure, bootstrap_interval

Verdict: TypeAlias = Literal["leaks", "resists", "undecided"]
LEAKS: Verdict = "leaks"
RESISTS: Verdict = "resists"
UNDECIDED: Verdict = "undecided"
VERDICTS = (LEAKS, RESISTS, UNDECIDED)
LONG = {LEAKS: "leaks", RESISTS: "resists the attacks tried", UNDECIDED: "undecided"}

# Of fewer images a bootstrap interval is little more than their range, and luck may look private.
FEWEST = 5
# One-sided, as one end of a 95 % interval.
SIGNIFICANCE = 0.025
CONTROL_SHARE = 0.5  # of its images that a working attack identifies without compression


@dataclass(frozen=True)
class Evidence:
    """What the strongest attack on one defence reached, beside what is reached without any.

    value: mean over n images (or models). floor: as above, None if it wasn't measured. interval: 95 %, of the excess,
    None with fewer than two images. identified: how many of the n among `candidates`, None where the measure knows no
    identification. measure: its name, for the reason.
    """

    value: float
    floor: float | None
    interval: tuple[float, float] | None
    n: int
    identified: int | None = None
    candidates: int = 1
    measure: str = "SSIM"

    @property
    def excess(self) -> float | None:
        return None if self.floor is None else self.value - self.floor

    @property
    def above_floor(self) -> bool:
        """Whether the whole interval of the excess lies above 0."""
        return self.interval is not None and self.interval[0] > 0

    @property
    def beyond_chance(self) -> bool:
        return self.identified is not None and beyond_chance(self.identified, self.n, self.candidates)

    def __str__(self) -> str:
        """The numbers, with their interval and their n."""
        parts = [f"{self.measure} {self.value:.2f} (n = {self.n})"]
        if self.floor is not None:
            parts.append(f"{Figure.of(self.excess, self.interval):+.2f} over the floor {self.floor:.2f}")
        if self.identified is not None:
            parts.append(f"{self.identified} of {self.n} identified among {self.candidates}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Control:
    """Whether the attack works where nothing is compressed, and the numbers that say so."""

    works: bool
    reason: str


@dataclass(frozen=True)
class Judgement:
    """A verdict and, in one line, why."""

    verdict: Verdict
    reason: str


NO_CONTROL = Control(False, "no control: the uncompressed gradient was not attacked")


def image_evidence(
    ssim: Sequence[float],
    mean_image: Sequence[float] | None,
    other_image: Sequence[float] | None,
    identified: Sequence[bool] | None,
    candidates: int,
    batch: int = 1,
) -> Evidence:
    """The evidence of an attack's figures, image by image (n,) each, as `raytrust.studies.evaluate` has them.

    batch: images of one private batch, which follow each other. They are not independent, so that the interval is over
    batches; and as each reconstruction was assigned to the most similar of them, guessing has as many chances.

    Raises:
        ValueError: no image, or lists of different lengths.
    """
    lists = [values for values in (ssim, mean_image, other_image, identified) if values is not None]
    if len(ssim) == 0 or {len(values) for values in lists} != {len(ssim)}:
        raise ValueError(f"Expected figures of at least one image and of equal length, got {[len(v) for v in lists]}.")
    floor = floor_of_images(mean_image, other_image)
    # One number a batch, as its images are not independent.
    excess = None if floor is None else (np.asarray(ssim) - np.asarray(floor)).reshape(-1, batch).mean(1)
    interval = None if excess is None else bootstrap_interval(excess)
    return Evidence(
        value=float(np.mean(ssim)),
        floor=None if floor is None else float(np.mean(floor)),
        interval=interval,
        n=len(ssim),
        identified=None if identified is None else int(sum(identified)),
        # Each reconstruction was assigned to the most similar of a batch, which is as many guesses.
        candidates=max(1, candidates // batch),
    )


def floor_of_images(mean_image: Sequence[float] | None, other_image: Sequence[float] | None) -> Sequence[float] | None:
    """Of the two floors, image by image, the one of the greater mean; None where neither was measured."""
    known = [floor for floor in (mean_image, other_image) if floor is not None]
    return max(known, key=lambda floor: float(np.mean(floor)), default=None)


def beyond_chance(identified: int, n: int, candidates: int) -> bool:
    """Whether so many of n are identified more often than guessing among the candidates would have it (p < 0.025)."""
    return binomial_tail(identified, n, 1 / candidates) < SIGNIFICANCE


def control_of(evidence: Evidence | None) -> Control:
    """Whether the attack works on what is not compressed; None: it was not tried, or has no result."""
    if evidence is None:
        return NO_CONTROL
    if lack := _lack(evidence):
        return Control(False, f"without compression: {evidence}: {lack}")
    identifies = evidence.identified is None or (
        evidence.identified >= CONTROL_SHARE * evidence.n and evidence.beyond_chance
    )
    return Control(evidence.above_floor and identifies, f"without compression: {evidence}")


def judge(evidence: Evidence, control: Control) -> Judgement:
    """The verdict on one defence."""
    if lack := _lack(evidence):
        return Judgement(UNDECIDED, f"{evidence}: {lack}")
    if evidence.above_floor or evidence.beyond_chance:
        return Judgement(LEAKS, str(evidence))
    if not control.works:
        return Judgement(UNDECIDED, f"{evidence}: the attack isn't shown to work without compression")
    if evidence.n < FEWEST:
        return Judgement(UNDECIDED, f"{evidence}: fewer than {FEWEST} are too few to call anything resistant")
    if evidence.interval is not None and evidence.interval[1] <= 0:
        return Judgement(RESISTS, f"{evidence}: no more than without the message")
    return Judgement(UNDECIDED, f"{evidence}: the interval contains 0, more images would tell")


def _lack(evidence: Evidence) -> str:
    """Why nothing can be said at all, empty if something can."""
    if evidence.floor is None:
        return "no floor was measured"
    return "no interval of fewer than two" if evidence.n < 2 or evidence.interval is None else ""
