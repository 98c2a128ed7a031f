"""What a verdict on a claim rests on: the figures of table 1 by image, and what decides between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from raytrust.metrics.statistics import mean_interval
from raytrust.metrics.verdict import Control, control_of, image_evidence
from raytrust.studies.evaluate import DISTRACTORS
from raytrust.studies.paper.row import SimilarityRow, cell_of
from raytrust.studies.paper.selection import AWARE, NAIVE, NOT_FINISHED, WORST
from raytrust.studies.published import TITLES, Cell, title_of

Verdict: TypeAlias = Literal[
    "reproduced", "not reproduced", "overturned", "not decided at this sample size", "not tested"
]
REPRODUCED: Verdict = "reproduced"
OVERTURNED: Verdict = "overturned"
UNDECIDED: Verdict = "not decided at this sample size"
UNTESTED: Verdict = "not tested"
NO_CONTROL = "the attack fails on uncompressed images"


@dataclass(frozen=True)
class Claim:
    """quote: of the paper, in short. rule: how the verdict follows. evidence: the figures."""

    quote: str
    verdict: Verdict
    rule: str
    evidence: str


class Table:
    """SSIM of table 1 by data set, cell and attack, image by image, of what is finished.

    works: the data sets whose attack works at all, by the control of `metrics.verdict`: without compression the
    interval of its SSIM over the floor lies above 0, and at least half of the images are identified. datasets: those of
    them on which both attacks are finished, so that a claim about all defences can be decided. unfinished: the other
    way round, which leave a claim about all data sets open. notes: why data sets are left out.
    """

    def __init__(self, rows: Sequence[SimilarityRow]):
        found = {(r["dataset"], cell_of(r), r["attack"]): r for r in rows}
        self._status: dict[tuple[str, Cell, str], str] = {key: r["status"] for key, r in found.items()}
        self._ssim = {key: np.asarray(r["ssim"]) for key, r in found.items() if r["status"] == "finished"}
        controls = {r["dataset"]: r for r in rows if r["compressor"] == "none" and r["attack"] == NAIVE}
        # No claim of the paper rests on the worst case, so that none has to wait for it.
        missing = {r["dataset"] for r in rows if r["status"] == NOT_FINISHED and r["attack"] != WORST}
        self.unfinished = [name for name in controls if name in missing]
        self._controls = {name: _control(row) for name, row in controls.items()}
        self.works = [name for name, control in self._controls.items() if control.works]
        self.datasets = [name for name in self.works if name not in missing]
        self.notes = [
            f"{TITLES[name]} left out: {NOT_FINISHED if name in missing else self._why_not(row)}"
            for name, row in controls.items()
            if name not in self.datasets
        ]

    def ssim(self, dataset: str, cell: Cell, attack: str) -> NDArray[np.float64] | None:
        return self._ssim.get((dataset, cell, attack))

    def status(self, dataset: str, cell: Cell, attack: str) -> str:
        return self._status.get((dataset, cell, attack), NOT_FINISHED)

    def _why_not(self, control: SimilarityRow) -> str:
        if control["status"] == "failed":
            return f"the uncompressed attack failed ({control['reason']})"
        return f"{NO_CONTROL} ({self._controls[control['dataset']].reason})"

    def pair(
        self, dataset: str, one: tuple[Cell, str], other: tuple[Cell, str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Both by image, None if one is missing."""
        a, b = self.ssim(dataset, *one), self.ssim(dataset, *other)
        return None if a is None or b is None else (a, b)


def _control(row: SimilarityRow) -> Control:
    if row["status"] != "finished" or row["ssim"] is None:
        return control_of(None)
    # The row's floor is the greater of the two already, so that it takes the place of both.
    return control_of(image_evidence(row["ssim"], row["floor"], None, row["identified"], DISTRACTORS + 1))


def still_open(verdict: Verdict) -> Verdict:
    """What can be said of a claim about all data sets as long as one of them is not finished."""
    return UNTESTED if verdict == UNTESTED else UNDECIDED


def above_zero(differences: Sequence[NDArray[np.float64]]) -> Verdict:
    """Of a claim that every one of these mean differences is positive, each given by image.

    Reproduced if all 95 % intervals lie above 0: a false claim passes with 2.5 % at most, however many there are.
    Overturned if one lies below 0 at a confidence that allows for their number (Bonferroni). Student's t.
    """
    if not differences:
        return UNTESTED
    confidence = 1 - 0.05 / len(differences)
    intervals = [mean_interval(d) for d in differences]
    strict = [mean_interval(d, confidence) for d in differences]
    if any(i is not None and i[1] < 0 for i in strict):
        return OVERTURNED
    return REPRODUCED if all(i is not None and i[0] > 0 for i in intervals) else UNDECIDED


def share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> tuple[float, float, float] | None:
    """mean(part) / mean(whole), paired by image, with the 95 % interval of its linearisation (Student's t).

    None without an interval, or where the whole is not positive.
    """
    if len(part) < 2 or whole.mean() <= 0:
        return None
    ratio = float(part.mean() / whole.mean())
    # Part and whole are of the same images, and their errors go together: two intervals taken apart could not tell how
    # far they cancel.
    interval = mean_interval(ratio + (part - ratio * whole) / whole.mean())
    return None if interval is None else (ratio, *interval)


def protection(table: Table, dataset: str, cell: Cell) -> tuple[str, str]:
    """("protects" | "only seems to" | "does not protect" | "not decided" | "failed" | "not finished", what it rests on)
    for one cell.

    By what is left of the uncompressed SSIM: it protects if at worst, with its interval, less than half is left; it
    only seems to if that holds for the naive attack alone, and knowing the compressor is a certain gain (by image) or
    the two shares' intervals are apart; it does not protect if more than half is left to the naive attack already. At
    worst: the greater share of what the aware attack leaves at the paper's setting, and the worst case at its own.
    """
    needed = [*((c, kind) for c in (cell, ("none", None)) for kind in (NAIVE, WORST)), (cell, AWARE)]
    for status in ("failed", NOT_FINISHED):
        if any(table.status(dataset, *key) == status for key in needed):
            return status, title_of(cell)
    if dataset not in table.works:
        return "not decided", f"{title_of(cell)}: {NO_CONTROL}"
    plain = table.ssim(dataset, ("none", None), NAIVE)
    naive, worst = table.ssim(dataset, cell, NAIVE), table.ssim(dataset, cell, WORST)
    aware, top = table.ssim(dataset, cell, AWARE), table.ssim(dataset, ("none", None), WORST)
    assert plain is not None and naive is not None and worst is not None and top is not None and aware is not None  # noqa: PT018
    before, known, apart = share(naive, plain), share(aware, plain), share(worst, top)
    gain = mean_interval(aware - naive)
    if before is None or known is None or apart is None or gain is None:
        return "not decided", f"{title_of(cell)}: no interval"
    # Both shares have to be small. The worst case alone, divided by the higher SSIM of another victim, had made Top-K 1
    # and 2 look protected although the aware attack keeps half (docs/findings.md).
    after, ends = max((known, (aware, plain)), (apart, (worst, top)), key=lambda found: found[0][0])
    text = f"{title_of(cell)}: {_percent(before)} left of the SSIM under the naive attack, {_percent(after)} at worst: "
    text += f"{ends[0].mean():.2f} of {ends[1].mean():.2f}"
    # By the unfavourable end of the interval, so that few images can't look like protection.
    if after[2] < 0.5:
        return "protects", text
    if before[1] > 0.5:
        return "does not protect", text
    # The two shares' intervals can overlap though nearly every image gains, which the paired gain shows.
    if before[2] < 0.5 and (gain[0] > 0 or after[1] > before[2]):
        return "only seems to", text
    return "not decided", text


def _percent(found: tuple[float, float, float]) -> str:
    value, low, high = (100 * x for x in found)
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"
