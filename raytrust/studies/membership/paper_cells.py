"""The membership figures of the paper under test, and which of our cells come nearest to them.

The paper gives a "success rate" for three attacks without their rules. A cell is a signal, one threshold or one a
class, and the thresholds' origin.
"""

from __future__ import annotations

from typing import Any

from raytrust.metrics import null_floor
from raytrust.studies.published import MEMBERSHIP_ATTACKS, TABLE_2

Row = dict[str, Any]

ATTACKS = MEMBERSHIP_ATTACKS
# Which signals can be meant by each attack's name.
SIGNALS = {
    "prediction confidence": ("attack model", "max confidence", "confidence"),
    "loss": ("loss",),
    "cross-entropy": ("entropy", "modified entropy"),
}


def nearest_cells(rows: list[Row], dataset: str = "cifar10") -> list[Row]:
    """For each of the paper's attacks, the cell nearest to its figures of a data set, over the defences in both.

    Models differ in how far they overfit, which shifts all figures alike, so that cells are compared after the mean
    difference over all defences and attacks is taken out. Keys: attack, signal, per_class, origin, distance (mean
    absolute difference, percentage points), shift (the mean difference taken out), ours and paper (per cent, by
    defence). Empty if no defence is in the paper's table.
    """
    known = {r["name"]: paper for r in rows if r["status"] == "finished" and (paper := _paper(r, dataset)) is not None}
    if not known:
        return []
    cells: dict[tuple[str, bool, str], dict[str, float]] = {}
    for row in rows:
        if row["name"] in known:
            for cell in row["grid"]:
                key = cell["signal"], cell["per_class"], cell["origin"]
                cells.setdefault(key, {})[row["name"]] = 100 * cell["value"]
    candidates = {
        (attack, key): [ours[name] - known[name][i] for name in known]
        for i, attack in enumerate(ATTACKS)
        for key, ours in cells.items()
        if key[0] in SIGNALS[attack]
    }
    all_differences = [d for differences in candidates.values() for d in differences]
    shift = sum(all_differences) / len(all_differences)
    found = []
    for i, attack in enumerate(ATTACKS):
        distances = {
            key: sum(abs(d - shift) for d in differences) / len(differences)
            for (of, key), differences in candidates.items()
            if of == attack
        }
        best = min(distances, key=distances.__getitem__)
        signal, per_class, origin = best
        found.append(
            {
                "attack": attack,
                "signal": signal,
                "per_class": per_class,
                "origin": origin,
                "distance": distances[best],
                "shift": shift,
                "ours": cells[best],
                "paper": {name: figures[i] for name, figures in known.items()},
            }
        )
    return found


def floors(points: int = 10_000) -> dict[int, float]:
    """What a useless score reaches in-sample at `points` members and as many others, per cent, by thresholds."""
    return {k: 100 * null_floor(points, points, k) for k in (1, 10, 100)}


def _paper(row: Row, dataset: str) -> tuple[float, float, float] | None:
    compressor = row["arm"].get("compressor")
    if compressor is None:
        return None
    rank = compressor.get("rank", compressor.get("equal_to_rank"))
    return TABLE_2[dataset].get((compressor["method"], rank))
