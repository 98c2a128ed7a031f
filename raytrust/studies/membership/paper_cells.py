"""The membership figures of the paper under test, and which of our rules come nearest to them.

The paper gives a "success rate" for three attacks without their rules. A rule is a signal, one threshold or one a
class, and the thresholds' origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytrust.metrics.thresholds import null_floor
from raytrust.studies.membership.row import Row, finished
from raytrust.studies.published import MEMBERSHIP_ATTACKS, TABLE_2, Membership

# The paper names its attacks without formulas, so that a name may stand for several signals.
SIGNALS = {
    "prediction confidence": ("attack model", "max confidence", "confidence"),
    "loss": ("loss",),
    "cross-entropy": ("entropy", "modified entropy"),
}


@dataclass(frozen=True)
class Nearest:
    """The rule nearest to one of the paper's attacks. ours, paper: per cent, by defence.

    shift: the mean difference of all rules, defences and attacks, in percentage points. distance: the mean absolute
    difference that is left of this rule without it.
    """

    attack: str
    signal: str
    per_class: bool
    origin: str
    distance: float
    shift: float
    ours: dict[str, float]
    paper: dict[str, float]

    @property
    def key(self) -> tuple[str, bool, str]:
        return self.signal, self.per_class, self.origin


def nearest_cells(rows: Sequence[Row], dataset: str = "cifar10") -> list[Nearest]:
    """For each of the paper's attacks, the rule nearest to its figures of a data set, over the defences in both.

    Models differ in how far they overfit, which shifts all figures alike, so that rules are compared after the mean
    difference over all defences and attacks is taken out. Empty if no defence is in the paper's table.
    """
    known = {r["name"]: paper for r in finished(rows) if (paper := _paper(r, dataset)) is not None}
    if not known:
        return []
    rules: dict[tuple[str, bool, str], dict[str, float]] = {}
    for row in (r for r in rows if r["name"] in known):
        for rule in row["grid"]:
            assert rule.value is not None
            rules.setdefault(rule.key, {})[row["name"]] = 100 * rule.value
    differences = {
        (attack, key): [ours[name] - known[name][i] for name in known]
        for i, attack in enumerate(MEMBERSHIP_ATTACKS)
        for key, ours in rules.items()
        if key[0] in SIGNALS[attack]
    }
    every = [d for values in differences.values() for d in values]
    shift = sum(every) / len(every)
    nearest = []
    for i, attack in enumerate(MEMBERSHIP_ATTACKS):
        # The shift is common to all, so that it can't favour the rule that happens to fit the level of our models.
        distances = {
            key: sum(abs(d - shift) for d in values) / len(values)
            for (of, key), values in differences.items()
            if of == attack
        }
        best = min(distances, key=distances.__getitem__)
        theirs = {name: figures[i] for name, figures in known.items()}
        nearest.append(Nearest(attack, *best, distances[best], shift, rules[best], theirs))
    return nearest


def floors(points: int = 10_000) -> dict[int, float]:
    """What a useless score reaches in-sample at `points` members and as many others, per cent, by thresholds."""
    # One threshold, or one a class: of ten classes in CIFAR-10 and MNIST, of a hundred in CIFAR-100.
    return {k: 100 * null_floor(points, points, k) for k in (1, 10, 100)}


def _paper(row: Row, dataset: str) -> Membership | None:
    compressor = row["arm"].get("compressor")
    # DP-SGD has no compressor, and the paper has no such row.
    if compressor is None:
        return None
    rank = compressor.get("rank", compressor.get("equal_to_rank"))
    return TABLE_2[dataset].get((compressor["method"], rank))
