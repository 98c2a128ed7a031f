"""What became of each claim of the paper, decided from the figures by a rule that stands beside the verdict.

"reproduced": our figures say the same, beyond their intervals. "not reproduced": they don't, and don't say the contrary
either although they could have. "overturned": they say the contrary. Else "not decided at this sample size", or "not
tested" where nothing was run that could tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from raytrust.metrics.statistics import mean_interval
from raytrust.studies.paper.row import SimilarityRow, TheoryRow, theory_values
from raytrust.studies.paper.selection import AWARE, NAIVE, NOT_FINISHED
from raytrust.studies.paper.verdicts import (
    OVERTURNED,
    REPRODUCED,
    UNDECIDED,
    UNTESTED,
    Claim,
    Table,
    Verdict,
    above_zero,
    share,
    still_open,
)
from raytrust.studies.published import CELLS, RANKS, TABLE_1, TITLES

COMPRESSED = tuple(cell for cell in CELLS if cell[0] != "none")
RULE = (
    "Reproduced if all 95 % intervals (Student's t over images) lie above 0; overturned if one lies below, at a "
    "confidence that allows for their number."
)
# Relative: more than what rounding in float32 leaves of an identity, and less than any loss that matters.
EXACT = 1e-3


def inversion_claims(rows: Sequence[SimilarityRow]) -> list[Claim]:
    """Those of section 4 about gradient inversion: about every data set, so that none is decided before all of them are
    finished."""
    table = Table(rows)
    claims = [
        _resistance(table),
        _remainder(table),
        _trend(table, NAIVE),
        _trend(table, AWARE),
        _top_k(table, NAIVE),
        _top_k(table, AWARE),
        _easiest(table),
    ]
    # The claims are about all data sets: one that is still running could turn any of them over.
    return [replace(c, verdict=still_open(c.verdict)) for c in claims] if table.unfinished else claims


def _resistance(table: Table) -> Claim:
    differences, notes = [], []
    for dataset in table.datasets:
        # With the paper's own attack: the claim is about that one, whatever a better attack shows.
        pairs = [table.pair(dataset, (("none", None), NAIVE), (cell, NAIVE)) for cell in COMPRESSED]
        own = [plain - compressed for plain, compressed in (p for p in pairs if p is not None)]
        lower = sum(above_zero([d]) == REPRODUCED for d in own)
        notes.append(f"{TITLES[dataset]}: lower in {lower} of {len(own)} cells")
        differences += own
    return Claim(
        "Against the attack, compressed SGD shows significantly higher resistance than uncompressed SGD.",
        above_zero(differences),
        f"Naive attack: SSIM without compression less that with it, by image, in every cell. {RULE}",
        "; ".join(notes + table.notes),
    )


def _remainder(table: Table) -> Claim:
    more, less, equal, notes = 0, 0, 0, []
    for dataset in table.datasets:
        here, shares = 0, []
        for cell in COMPRESSED:
            # Without a compressor there is nothing to know, so that the naive attack is the aware one's whole.
            pair = table.pair(dataset, (cell, AWARE), (("none", None), NAIVE))
            if pair is None or (found := share(*pair)) is None:
                continue
            value, low, high = found
            paper = TABLE_1[dataset][cell].percent / 100
            more, less, equal = more + (low > paper), less + (high < paper), equal + (low <= paper <= high)
            here += low > paper
            shares.append((value, paper))
        if shares:
            ours, theirs = np.mean(shares, axis=0)
            notes.append(
                f"{TITLES[dataset]}: on average {100 * ours:.0f} % of the uncompressed SSIM is left, the paper has "
                f"{100 * theirs:.0f} %; ours is above it in {here} of {len(shares)} cells"
            )
    total = more + less + equal
    verdict = UNTESTED
    if total:
        # Wide intervals hold the paper's figure whatever it is: agreement in most cells counts only if none disagrees.
        verdict = OVERTURNED if 2 * more > total else REPRODUCED if 2 * equal > total and not more else UNDECIDED
    if verdict == UNDECIDED and 2 * less > total:
        verdict = "not reproduced"
    return Claim(
        "Compression significantly lowers the quality of reconstructions (to 0.4-71 % of the original) and so "
        "enhances privacy protection.",
        verdict,
        "Attacker who knows the compressor: overturned if in most cells the 95 % interval of what is left of the "
        "uncompressed SSIM lies above the paper's per cent; reproduced if it holds it in most and lies above in none; "
        "not reproduced if it lies below in most.",
        "; ".join(notes + table.notes),
    )


def slope(ssim: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The least-squares slope of each image's SSIM over the place of its rank, per step of the ranks."""
    y = np.stack(ssim)
    # Over the place of a rank: over 1, 2, 4, 30 and 50 themselves the two largest would decide the slope alone.
    x = np.arange(len(y)) - (len(y) - 1) / 2
    return np.asarray(x @ y / (x @ x))


def _per_dataset(
    table: Table, values: Callable[[str], dict[str, NDArray[np.float64] | None]]
) -> tuple[Verdict, list[str]]:
    differences, notes = [], []
    for dataset in table.datasets:
        for name, found in values(dataset).items():
            if found is not None and (interval := mean_interval(found)) is not None:
                differences.append(found)
                low, high = interval
                notes.append(f"{TITLES[dataset]}{name}: {found.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    return above_zero(differences), notes + table.notes


def _trend(table: Table, attack: str) -> Claim:
    def slopes(dataset: str) -> dict[str, NDArray[np.float64] | None]:
        found: dict[str, NDArray[np.float64] | None] = {}
        for method, name in (("powersgd", "PowerSGD"), ("topk", "Top-K")):
            ssim = [s for r in RANKS if (s := table.ssim(dataset, (method, r), attack)) is not None]
            # A slope over fewer ranks is one over another range, and does not belong beside the others.
            found[f" {name}"] = slope(ssim) if len(ssim) == len(RANKS) else None
        return found

    verdict, notes = _per_dataset(table, slopes)
    return Claim(
        f"As rank or level increases, SSIM increases: more information leaks ({attack}).",
        verdict,
        f"Slope of SSIM over the five ranks, by image, for both methods on every data set. {RULE}",
        "SSIM per step of rank: " + "; ".join(notes),
    )


def _top_k(table: Table, attack: str) -> Claim:
    def differences(dataset: str) -> dict[str, NDArray[np.float64] | None]:
        pairs = [table.pair(dataset, (("powersgd", r), attack), (("topk", r), attack)) for r in RANKS]
        known = [a - b for a, b in (p for p in pairs if p is not None)]
        # One number an image, as the ranks of one image are not independent.
        return {"": np.mean(known, axis=0) if known else None}

    verdict, notes = _per_dataset(table, differences)
    return Claim(
        f"Top-K reduces leakage more than PowerSGD at equal compression ({attack}).",
        verdict,
        f"PowerSGD's SSIM less Top-K's of equal bytes, mean over ranks, by image, on every data set. {RULE}",
        "PowerSGD less Top-K: " + "; ".join(notes),
    )


def _easiest(table: Table) -> Claim:
    differences, notes = [], []
    others = [d for d in table.datasets if d != "mnist"] if "mnist" in table.datasets else []
    for other in others:
        own = []
        for cell in CELLS:
            mnist, ours = table.ssim("mnist", cell, NAIVE), table.ssim(other, cell, NAIVE)
            if mnist is not None and ours is not None and len(mnist) == len(ours):
                # The images of two data sets are independent, so that any pairing will do.
                own.append(mnist - ours)
        higher = sum(above_zero([d]) == REPRODUCED for d in own)
        theirs = sum(TABLE_1["mnist"][c].mean > TABLE_1[other][c].mean for c in CELLS)
        notes.append(f"higher than {TITLES[other]} in {higher} of {len(own)} cells (the paper's own table: {theirs})")
        differences += own
    return Claim(
        "MNIST consistently shows higher SSIM than CIFAR-10 and CIFAR-100, across all algorithms.",
        above_zero(differences),
        f"Naive attack: MNIST's SSIM less that of each other data set, in every cell. {RULE}",
        "; ".join((notes if differences else ["needs MNIST and another data set"]) + table.notes),
    )


SECTION_3 = (
    (
        "Section 3: what is discarded limits the cosine between the true and the decoded gradient to below 1; "
        "eq. (5) to (7).",
        f"Identities hold to {EXACT:g} on every gradient tested; the limit is below 1 for some.",
    ),
    (
        "Section 3: the best possible alignment of the attacker is limited by the compression error, which "
        "prevents recovery: the attacks fail to converge.",
        "Overturned if, where the limit is below 1, the aware attacker's distance at the true image is below "
        f"{EXACT:g}: the limit then does not bind who compares only what was sent.",
    ),
)


def theory_claims(figures: Sequence[TheoryRow], left: Mapping[str, Sequence[str]]) -> list[Claim]:
    """Those of section 3, decided on the data sets of which every test is finished.

    figures: one row a data set, step and cell, as `theory.examine` returns them. left: by data set, of each test
    without figures that it is not finished, or why it failed.
    """
    notes = [f"{TITLES[d]} left out: of its tests, {_ends(reasons)}" for d, reasons in left.items() if reasons]
    # A test that is missing might be the one that breaks an identity: its data set decides nothing yet.
    figures = [f for f in figures if not left.get(f["dataset"])]
    if not figures:
        return [Claim(quote, UNTESTED, rule, "; ".join(notes)) for quote, rule in SECTION_3] if notes else []

    def values(name: str, *methods: str) -> NDArray[np.float64]:
        return theory_values([f for f in figures if f["cell"][0] in (methods or ("powersgd", "topk"))], name)

    attainable, aware = values("attainable"), values("aware_at_truth")
    identity = max(np.abs(values(name) - attainable).max() for name in ("cosine", "from_error"))
    truth = values("naive_at_truth", "none").max(initial=0)
    least = values("discarded", "powersgd")
    # Where the rank holds the whole matrix nothing is discarded, and the ratio would be 0 / 0.
    lossy = least > 1e-9
    excess = values("error", "powersgd")[lossy] / least[lossy]
    svd = np.abs(values("svd", "powersgd") - least).max()
    sparse = np.abs(values("error", "topk") - values("discarded", "topk")).max()
    # PowerSGD finds its subspace by one iteration only: its error may exceed the bound, but not fall below it.
    holds = max(identity, truth, svd, sparse) < EXACT and excess.min(initial=1) >= 1 - EXACT
    # A limit of 1 limits nobody: an attacker can only be seen to escape where something was discarded.
    bites = bool((attainable < 1 - EXACT).any())
    escaped = bites and float(aware.max()) < EXACT
    above = {name: (values(f"{name}_reached") > attainable + EXACT).sum() for name in ("aware", "naive")}
    evidence = (
        f"cos(g, C(g)) and ||C(g)||/||g|| differ by at most {identity:.1e}. Eq. (6) holds with equality to "
        f"{sparse:.1e}. Eq. (5) is an equality for the truncated SVD ({svd:.1e}), which PowerSGD is not: its squared "
        f"error is {np.median(excess):.2f} times that (median; least {excess.min(initial=np.inf):.2f}). Eq. (7): "
        f"uncompressed, the distance at the true image is at most {truth:.1e}. Cosines at the true "
        f"image: {attainable.min():.2f} to {attainable.max():.2f}."
    )
    alignment = (
        f"The aware distance at the true image is at most {aware.max():.1e} (naive: up to "
        f"{values('naive_at_truth').max():.2f}). Reached with what was compared, above the limit: the aware attack in "
        f"{above['aware']} of {len(aware)}, the naive one in {above['naive']} of {len(aware)}. The limit is one of the "
        "true image, not of the attack."
    )
    verdicts: list[Verdict] = [
        REPRODUCED if holds and bites else "not reproduced",
        OVERTURNED if escaped else UNDECIDED,
    ]
    return [
        Claim(quote, verdict, rule, " ".join([text, *(f"{n}." for n in notes)]))
        for (quote, rule), verdict, text in zip(SECTION_3, verdicts, (evidence, alignment), strict=True)
    ]


def _ends(reasons: Sequence[str]) -> str:
    """ "3 not finished", and of those that failed, why."""
    failures = [r for r in reasons if r != NOT_FINISHED]
    parts = [f"{len(reasons) - len(failures)} {NOT_FINISHED}"] if len(failures) < len(reasons) else []
    parts += [f"{len(failures)} failed ({'; '.join(sorted(set(failures)))})"] if failures else []
    return ", ".join(parts)
