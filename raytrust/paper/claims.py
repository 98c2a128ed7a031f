"""What became of each claim of the paper, decided from the figures by a rule that stands beside the verdict.

"reproduced": our figures say the same, beyond their intervals. "not reproduced": they don't, and don't say the contrary
either although they could have. "overturned": they say the contrary. Else "not decided at this sample size", or "not
tested" where nothing was run that could tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from raytrust.metrics import bootstrap_interval, paired_difference
from raytrust.paper.selection import AWARE, NAIVE, WORST
from raytrust.published import CELLS, RANKS, TABLE_1, TABLE_2, TITLES, Cell, title_of

Row = dict[str, Any]
Verdict: TypeAlias = Literal[
    "reproduced", "not reproduced", "overturned", "not decided at this sample size", "not tested"
]
REPRODUCED: Verdict = "reproduced"
OVERTURNED: Verdict = "overturned"
UNDECIDED: Verdict = "not decided at this sample size"
UNTESTED: Verdict = "not tested"

COMPRESSED = tuple(cell for cell in CELLS if cell[0] != "none")
EXACT = 1e-3  # relative; what rounding in float32 leaves of an identity
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Claim:
    """quote: of the paper, in short. rule: how the verdict follows. evidence: the figures."""

    quote: str
    verdict: Verdict
    rule: str
    evidence: str


class Table:
    """SSIM of table 1 by data set, cell and attack, image by image, of what is finished."""

    def __init__(self, rows: Sequence[Row]):
        self._ssim = {
            (r["dataset"], (r["compressor"], r["rank_or_level"]), r["attack"]): np.asarray(r["ssim"])
            for r in rows
            if r["status"] == "finished"
        }
        self.datasets = list(dict.fromkeys(r["dataset"] for r in rows))

    def ssim(self, dataset: str, cell: Cell, attack: str) -> NDArray[np.float64] | None:
        return self._ssim.get((dataset, cell, attack))

    def pair(
        self, dataset: str, one: tuple[Cell, str], other: tuple[Cell, str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Both by image, None if one is missing."""
        a, b = self.ssim(dataset, *one), self.ssim(dataset, *other)
        return None if a is None or b is None else (a, b)


def decide(low: float, high: float) -> Verdict:
    """Of a claim that a difference is positive, by the interval of the difference."""
    return REPRODUCED if low > 0 else OVERTURNED if high < 0 else UNDECIDED


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim about every case: overturned by one case, reproduced by all."""
    if not verdicts:
        return UNTESTED
    if OVERTURNED in verdicts:
        return OVERTURNED
    return REPRODUCED if all(v == REPRODUCED for v in verdicts) else UNDECIDED


def inversion_claims(rows: Sequence[Row]) -> list[Claim]:
    """Those of section 4 about gradient inversion."""
    table = Table(rows)
    return [
        _resistance(table),
        _remainder(table),
        _trend(table, NAIVE),
        _trend(table, AWARE),
        _top_k(table, NAIVE),
        _top_k(table, AWARE),
        _easiest(table),
    ]


def _resistance(table: Table) -> Claim:
    verdicts, notes = [], []
    for dataset in table.datasets:
        counts = {REPRODUCED: 0, UNDECIDED: 0, OVERTURNED: 0}
        for cell in COMPRESSED:
            pair = table.pair(dataset, (("none", None), NAIVE), (cell, NAIVE))
            if pair is not None and (interval := paired_difference(*pair).interval) is not None:
                verdict = decide(*interval)
                counts[verdict] += 1
                verdicts.append(verdict)
        notes.append(f"{TITLES[dataset]}: lower in {counts[REPRODUCED]} of {sum(counts.values())} cells")
    return Claim(
        "Against the published attack, compressed SGD shows significantly higher resistance than uncompressed SGD.",
        all_of(verdicts),
        "Naive attack: the 95 % interval of the difference to no compression, paired by image, lies above 0 in every "
        "cell; overturned if it lies below 0 in one.",
        "; ".join(notes),
    )


def share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> tuple[float, float, float] | None:
    """mean(part) / mean(whole), paired by image, with its 95 % percentile bootstrap interval; None if it has none."""
    if len(part) < 2 or whole.mean() <= 0:
        return None
    draws = np.random.default_rng(0).integers(0, len(part), (_RESAMPLES, len(part)))
    tops, bottoms = part[draws].mean(1), whole[draws].mean(1)
    low, high = np.quantile(tops / np.maximum(bottoms, 1e-6), [0.025, 0.975])
    return float(part.mean() / whole.mean()), float(low), float(high)


def _remainder(table: Table) -> Claim:
    more, less, equal, notes = 0, 0, 0, []
    for dataset in table.datasets:
        here, shares = 0, []
        for cell in COMPRESSED:
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
    verdict: Verdict = UNTESTED
    if total:
        verdict = (
            OVERTURNED if 2 * more > total else REPRODUCED if 2 * equal > total and more == 0 else "not reproduced"
        )
        if verdict == "not reproduced" and 2 * equal > total:
            verdict = UNDECIDED
    return Claim(
        "Compression significantly lowers the quality of reconstructions (to 0.4-71 % of the original) and so "
        "enhances privacy protection.",
        verdict,
        "Attacker who knows the compressor: overturned if in most cells the 95 % interval of what is left of the "
        "uncompressed SSIM lies above the paper's per cent; reproduced if it holds it in most and lies above in none.",
        "; ".join(notes),
    )


def slope(ssim: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The least-squares slope of each image's SSIM over the place of its rank, per step of the ranks."""
    y = np.stack(ssim)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    return np.asarray(x @ y / (x @ x))


def _per_dataset(
    table: Table, values: Callable[[str], dict[str, NDArray[np.float64] | None]]
) -> tuple[Verdict, list[str]]:
    verdicts, notes = [], []
    for dataset in table.datasets:
        for name, found in values(dataset).items():
            if found is None or (interval := bootstrap_interval(found)) is None:
                continue
            verdicts.append(decide(*interval))
            low, high = interval
            notes.append(f"{TITLES[dataset]}{name}: {found.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    return all_of(verdicts), notes


def _trend(table: Table, attack: str) -> Claim:
    def slopes(dataset: str) -> dict[str, NDArray[np.float64] | None]:
        found: dict[str, NDArray[np.float64] | None] = {}
        for method, name in (("powersgd", "PowerSGD"), ("topk", "Top-K")):
            ssim = [s for r in RANKS if (s := table.ssim(dataset, (method, r), attack)) is not None]
            found[f" {name}"] = slope(ssim) if len(ssim) == len(RANKS) else None
        return found

    verdict, notes = _per_dataset(table, slopes)
    return Claim(
        f"As rank or level increases, SSIM increases: more information leaks ({attack}).",
        verdict,
        "Slope of SSIM over the five ranks, by image: its 95 % interval lies above 0 for both methods on every data "
        "set; overturned if it lies below 0 for one.",
        "SSIM per step of rank: " + "; ".join(notes) if notes else "",
    )


def _top_k(table: Table, attack: str) -> Claim:
    def differences(dataset: str) -> dict[str, NDArray[np.float64] | None]:
        pairs = [table.pair(dataset, (("powersgd", r), attack), (("topk", r), attack)) for r in RANKS]
        known = [a - b for a, b in (p for p in pairs if p is not None)]
        return {"": np.mean(known, axis=0) if known else None}

    verdict, notes = _per_dataset(table, differences)
    return Claim(
        f"Top-K reduces leakage more than PowerSGD at equal compression ({attack}).",
        verdict,
        "PowerSGD's SSIM less Top-K's of equal bytes, mean over ranks, by image: 95 % interval above 0 on every data "
        "set; overturned if it lies below 0 on one.",
        "PowerSGD less Top-K: " + "; ".join(notes) if notes else "",
    )


def _easiest(table: Table) -> Claim:
    quote = "MNIST consistently shows higher SSIM than CIFAR-10 and CIFAR-100, across all algorithms."
    rule = "Naive attack: the 95 % interval of the difference of means (independent images) above 0 in every cell."
    verdicts: list[Verdict] = []
    notes = []
    for other in (d for d in table.datasets if d != "mnist"):
        higher = 0
        for cell in CELLS:
            mnist, ours = table.ssim("mnist", cell, NAIVE), table.ssim(other, cell, NAIVE)
            if mnist is None or ours is None:
                continue
            half = 1.96 * float(np.hypot(*(s.std(ddof=1) / len(s) ** 0.5 for s in (mnist, ours))))
            difference = float(mnist.mean() - ours.mean())
            verdicts.append(decide(difference - half, difference + half))
            higher += verdicts[-1] == REPRODUCED
        notes.append(f"higher than {TITLES[other]} in {higher} of {len(CELLS)} cells")
    evidence = "; ".join(notes) if verdicts else "needs MNIST and another data set"
    return Claim(quote, all_of(verdicts), rule, evidence)


def theory_claims(figures: Sequence[Row]) -> list[Claim]:
    """Those of section 3. figures: one row a data set, step and cell, as `theory.examine` returns them."""
    projections = [f for f in figures if f["cell"][0] != "none"]
    if not projections:
        return []
    flat = {name: _all(projections, name) for name in ("cosine", "attainable", "error", "discarded", "svd")}
    identity = max(np.abs(flat["cosine"] - flat["attainable"]).max(), _gap(projections))
    truths = _all([f for f in figures if f["cell"][0] == "none"], "naive_at_truth")
    power = [f for f in projections if f["cell"][0] == "powersgd"]
    excess = _all(power, "error") / np.maximum(_all(power, "discarded"), 1e-12)
    svd = float(np.abs(_all(power, "svd") - _all(power, "discarded")).max())
    top_k = [f for f in projections if f["cell"][0] == "topk"]
    sparse = float(np.abs(_all(top_k, "error") - _all(top_k, "discarded")).max())
    bounded = flat["attainable"] < 1 - EXACT
    holds = identity < EXACT and truths.max(initial=0) < EXACT and svd < EXACT and sparse < EXACT
    aware = _all(projections, "aware_at_truth")
    beyond = _all(projections, "naive_reached") > _all(projections, "attainable") + EXACT
    bites = bool(bounded.any())
    escaped = bites and float(aware.max()) < EXACT
    evidence = (
        f"cos(g, C(g)) and ||C(g)||/||g|| differ by at most {identity:.1e}. Eq. (6) holds with equality to "
        f"{sparse:.1e}. Eq. (5) is an equality for the truncated SVD ({svd:.1e}), which PowerSGD is not: its squared "
        f"error is {np.median(excess):.2f} times that (median; least {excess.min():.2f}). Eq. (7): uncompressed, the "
        f"distance at the true image is at most {truths.max(initial=0):.1e}. Cosines at the true image: "
        f"{flat['attainable'].min():.2f} to {flat['attainable'].max():.2f}."
    )
    return [
        Claim(
            "Section 3: what is discarded limits the cosine between the true and the decoded gradient to below 1; "
            "eq. (5) to (7).",
            REPRODUCED if holds and bites else "not reproduced",
            f"Identities hold to {EXACT:g} on every gradient tested; the limit is below 1 for some.",
            evidence,
        ),
        Claim(
            "Section 3: the best possible alignment of the attacker is limited by the compression error, which "
            "prevents recovery: the attacks fail to converge.",
            OVERTURNED if escaped else UNDECIDED,
            f"Overturned if, where the limit is below 1, the aware attacker's distance at the true image is below {EXACT:g}: "
            "the limit then does not bind who compares only what was sent.",
            f"The aware distance at the true image is at most {aware.max():.1e} (naive: up to "
            f"{_all(projections, 'naive_at_truth').max():.2f}). In {int(beyond.sum())} of {len(beyond)} attacks even the "
            "naive attacker reached a higher cosine with C(g) than the true image has: the limit is one of the true "
            "image, not of the attack.",
        ),
    ]


def _all(figures: Sequence[Row], name: str) -> NDArray[np.float64]:
    return np.array([value for f in figures for value in f[name]])


def _gap(figures: Sequence[Row]) -> float:
    return float(np.abs(_all(figures, "from_error") - _all(figures, "attainable")).max())


def membership_claims(audits: Mapping[str, Sequence[Row]]) -> list[Claim]:
    """Those about membership inference. audits: the rows of each data set's audit, in the order of the cells."""
    if not audits:
        return []
    return [_insensitive(audits), _unreliable(audits), _high_levels(audits)]


def _insensitive(audits: Mapping[str, Sequence[Row]]) -> Claim:
    verdicts: list[Verdict] = []
    notes = []
    for dataset, rows in audits.items():
        done = [r for r in rows if r["status"] == "finished"]
        if not done or done[0]["name"] != "none":
            continue
        counts = {"alike": 0, "lower": 0, "higher": 0, "too wide": 0}
        for row in done[1:]:
            difference, half = _difference(row["final"]["loss"]["auc"], done[0]["final"]["loss"]["auc"])
            kind = "lower" if difference < -half else "higher" if difference > half else "alike"
            counts["too wide" if kind == "alike" and half > 0.05 else kind] += 1
        total = sum(counts.values())
        verdicts.append(
            OVERTURNED if 2 * counts["lower"] > total else REPRODUCED if 2 * counts["alike"] > total else UNDECIDED
        )
        notes.append(f"{TITLES[dataset]}: " + ", ".join(f"{n} {k}" for k, n in counts.items() if n))
    return Claim(
        "MIA shows low sensitivity to compression: success rates remain close to uncompressed SGD.",
        all_of(verdicts),
        "AUC of the loss on final models against uncompressed SGD, 95 % interval over models: alike (0 inside, half "
        "width up to 0.05) in most defences; overturned if lower in most.",
        "; ".join(notes),
    )


def _unreliable(audits: Mapping[str, Sequence[Row]]) -> Claim:
    above = total = 0
    lows, finals = [], []
    for rows in audits.values():
        for row in (r for r in rows if r["status"] == "finished"):
            wanted = [m for m in row["messages"] if m["control"] == "held-out points"]
            scores = [m for m in wanted if m["score"] == "gradient difference"]
            if not scores or scores[-1]["low"] is None or row["final"]["loss"]["auc"]["high"] is None:
                continue
            total += 1
            above += scores[-1]["low"] > row["final"]["loss"]["auc"]["high"]
            lows.append(scores[-1]["value"])
            finals.append(row["final"]["loss"]["auc"]["value"])
    verdict: Verdict = UNTESTED if not total else OVERTURNED if 2 * above > total else UNDECIDED
    evidence = (
        f"messages tell more in {above} of {total} audits: AUC {np.mean(lows):.2f} against {np.mean(finals):.2f} of the "
        "final model's loss, on average"
        if total
        else ""
    )
    return Claim(
        "MIA may not be a reliable metric for privacy risks.",
        verdict,
        "Overturned if in most audits the AUC of membership from one step's messages lies above that of the final "
        "model's loss, intervals apart: then it is the place of measurement, not the metric, that misses the leak.",
        evidence,
    )


def _high_levels(audits: Mapping[str, Sequence[Row]]) -> Claim:
    table = TABLE_2["cifar100"]
    plain = np.mean(table["none", None])
    drop = {levels: plain - np.mean([table["topk", k] for k in levels]) for levels in ((1, 2, 4), (30, 50))}
    own = (
        f"The paper's own table: levels 30 and 50 fall by {drop[30, 50]:.1f} points on average, levels 1, 2 and 4 by "
        f"{drop[1, 2, 4]:.1f}."
    )
    done = {r["name"]: r for r in audits.get("cifar100", ()) if r["status"] == "finished"}
    rule = (
        "AUC of the loss on CIFAR-100's final models: Top-K 30 and 50 below uncompressed SGD, 95 % interval over "
        "models; overturned if levels 1, 2 and 4 fall by more, and 30 and 50 do not fall."
    )
    quote = "On CIFAR-100, Top-K at levels 30 and 50 leads to a more pronounced decrease of MIA success."
    names = {k: f"Top-K level {k} + EF" for k in (1, 2, 4, 30, 50)}
    if "none" not in done or not set(names.values()) <= set(done):
        return Claim(quote, UNTESTED, rule, own + " CIFAR-100 was not audited here.")
    plain_auc = done["none"]["final"]["loss"]["auc"]
    falls = {k: _difference(done[name]["final"]["loss"]["auc"], plain_auc) for k, name in names.items()}
    high = [d < -half for k, (d, half) in falls.items() if k >= 30]
    low = [d < -half for k, (d, half) in falls.items() if k < 30]
    verdict = REPRODUCED if all(high) else OVERTURNED if any(low) and not any(high) else UNDECIDED
    changes = ", ".join(f"{k}: {d:+.3f} +-{half:.3f}" for k, (d, half) in falls.items())
    return Claim(quote, verdict, rule, f"{own} Ours, change of AUC by level: {changes}.")


def _difference(one: Row, other: Row) -> tuple[float, float]:
    """(difference, half width of its 95 % interval) of two independent figures; infinite without intervals."""
    halves = [np.inf if f["low"] is None else (f["high"] - f["low"]) / 2 for f in (one, other)]
    return float(one["value"] - other["value"]), float(np.hypot(*halves))


def protection(table: Table, dataset: str, cell: Cell) -> tuple[str, str]:
    """("protects" | "only seems to" | "does not protect" | "not decided", what it rests on) for one cell.

    By what is left of the uncompressed SSIM: it protects if under the worst case, with its interval, less than half is
    left; it only seems to if that holds for the naive attack alone, and knowing the compressor is a certain gain (by
    image) or the two shares' intervals are apart; it does not protect if more than half is left under the naive attack already.
    """
    plain = table.ssim(dataset, ("none", None), NAIVE)
    naive, worst = table.ssim(dataset, cell, NAIVE), table.ssim(dataset, cell, WORST)
    aware, top = table.ssim(dataset, cell, AWARE), table.ssim(dataset, ("none", None), WORST)
    if plain is None or naive is None or worst is None or top is None or aware is None:
        return "not decided", f"{title_of(cell)}: not finished"
    before, after = share(naive, plain), share(worst, top)
    gain = paired_difference(aware, naive).interval
    if before is None or after is None or gain is None:
        return "not decided", f"{title_of(cell)}: no interval"
    text = f"{title_of(cell)}: {_percent(before)} left of the SSIM under the naive attack, {_percent(after)} at worst"
    if after[2] < 0.5:
        return "protects", text
    if before[1] > 0.5:
        return "does not protect", text
    if before[2] < 0.5 and (gain[0] > 0 or after[1] > before[2]):
        return "only seems to", text
    return "not decided", text


def _percent(found: tuple[float, float, float]) -> str:
    value, low, high = (100 * x for x in found)
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"
