"""The verdicts of a sweep: from each row's evidence, and from all rows together, what may be said of each.

Computed from the rows by `raytrust.metrics.verdict` and nowhere else, so that table, figure, page, terminal and MLflow
say the same. See `raytrust.reports.frontier_table` for the keys of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytrust.metrics.verdict import LEAKS, Control, Evidence, Judgement, control_of, judge

Row = dict[str, Any]

REMEDY = "give it more (--iterations, --attack-trials, --images)"
NO_CONTROL = "No control"
NEAR_CHANCE = "accuracy near chance"
FAR_BELOW = 0.05  # of accuracy: less than that is not called far below training without compression


def judge_rows(rows: Sequence[Row]) -> list[Row]:
    """Copies of the rows with ``verdict``, ``verdict_reason``, ``control`` and ``pareto``.

    control: whether the attack works without compression; the same in all rows. verdict: "leaks", "resists" or
    "undecided", None in a failed row; verdict_reason: one line with the numbers. pareto: see `mark_pareto`; False for
    all where the control fails. Order is kept, the arguments are left alone, and what the keys held is not read.
    """
    control = control_of_rows(rows)
    judged = []
    for row in rows:
        verdict = _judged(row, control) if row["status"] == "finished" else None
        words = {"verdict": verdict and verdict.verdict, "verdict_reason": verdict and verdict.reason}
        judged.append(row | words | {"control": control.works})
    return mark_pareto(judged)


def _judged(row: Row, control: Control) -> Judgement:
    """By the strongest attack; but a leak that the best naive attack shows, by identification, say, is a leak too."""
    verdict, naive = judge(evidence_of(row), control), naive_evidence(row)
    measured = row.get("excess_interval") is not None and naive is not None and naive.interval is not None
    if verdict.verdict == LEAKS or not measured or naive is None:
        return verdict
    ignorant = judge(naive, control)
    return Judgement(LEAKS, f"ignoring the compressor: {ignorant.reason}") if ignorant.verdict == LEAKS else verdict


def control_of_rows(rows: Sequence[Row]) -> Control:
    """Whether the attack works on the uncompressed gradient: on the row without a compressor that leaks most."""
    plain = [row for row in rows if row.get("compressor") == "none"]
    evidence = [evidence_of(row) for row in plain if row["status"] == "finished"]
    if not evidence and plain:
        return Control(False, f"no control: without compression it failed: {plain[0].get('reason')}")
    return control_of(max(evidence, key=lambda e: e.value, default=None))


def control_sentence(rows: Sequence[Row]) -> str:
    """The first thing to say of judged rows: whether the attack works at all, and what to do where it doesn't."""
    control = control_of_rows(rows)
    if control.works:
        return f"Control: the attack works {control.reason}."
    state, consequence = failure_words(rows)
    if state == NO_CONTROL:
        return f"{state}: add --defence none. Without it, {consequence}."
    return f"{state}: {consequence}; {REMEDY}. {_capital(control.reason)}."


def failure_words(rows: Sequence[Row]) -> tuple[str, str]:
    """(what is wrong, what follows) of judged rows whose control doesn't work. A leak that was shown is shown, and
    that is all that can be said."""
    leaks = sum(row.get("verdict") == LEAKS for row in rows)
    shown = f"{leaks} leak{'s' * (leaks == 1)}"
    plain = [row for row in rows if row.get("compressor") == "none"]
    if any(row.get("verdict") == LEAKS for row in plain):  # identified, but no nearer than the floor, or too seldom
        return "The attack is too weak here", f"nothing can be called private, and {shown}"
    state = "The attack fails here" if plain else NO_CONTROL
    return state, "nothing can be said about any defence" + (f", but that {shown}" if leaks else "")


def evidence_of(row: Row) -> Evidence:
    """What the strongest attack on a finished row reached."""
    return _evidence(row, row["leakage_ssim"], row.get("excess_interval"), row.get("identified"))


def naive_evidence(row: Row) -> Evidence | None:
    """What the strongest attack that ignores the compressor reached; None if there was none."""
    if row.get("naive_ssim") is None:
        return None
    return _evidence(row, row["naive_ssim"], row.get("naive_excess_interval"), row.get("naive_identified"))


def _evidence(row: Row, value: float, interval: Sequence[float] | None, identified: int | None) -> Evidence:
    return Evidence(
        value=value,
        floor=row.get("floor_ssim"),
        interval=None if interval is None else (interval[0], interval[1]),
        n=row.get("n_images") or 0,
        identified=identified,
        candidates=row.get("candidates") or 1,
    )


def only_looks_private(row: Row, control: Control) -> bool:
    """Whether a judged row leaks, but an attack that ignores its compressor would not have shown it."""
    naive = naive_evidence(row)
    if row.get("verdict") != LEAKS or naive is None or naive.floor is None or naive.interval is None:
        return False
    return judge(naive, control).verdict != LEAKS


def starkest(rows: Sequence[Row]) -> Row | None:
    """Of the judged rows, the one on which knowing the compressor gains most: among those that only look private, or
    if there are none, among those where the gain is certain, with its interval."""
    control = control_of_rows(rows)
    deceptive = [row for row in rows if only_looks_private(row, control)]
    certain = [row for row in rows if row.get("verdict") == LEAKS and (row.get("aware_gain_interval") or [0.0])[0] > 0]
    return max(deceptive or certain, key=lambda row: row["leakage_ssim"] - row["naive_ssim"], default=None)


# --- Pareto set ---


def mark_pareto(rows: Sequence[Row]) -> list[Row]:
    """Copies of the judged rows with ``pareto``: which are worth choosing among, as far as the intervals tell.

    A finished row is out only if another is no worse in accuracy and in leakage, and in at least one of them better by
    95 % intervals that do not overlap. Where the control fails, none is in: a ranking by an attack that doesn't work
    would be one of noise.
    """
    finished = [row for row in rows if row["status"] == "finished"]

    def stays(row: Row) -> bool:
        if row["status"] != "finished" or not row["control"]:
            return False
        return not any(_beats(other, row) for other in finished)

    return [{**row, "pareto": stays(row)} for row in rows]


def _beats(one: Row, other: Row) -> bool:
    if one["accuracy"] < other["accuracy"] or one["leakage_ssim"] > other["leakage_ssim"]:
        return False
    return _apart(other.get("accuracy_interval"), one.get("accuracy_interval")) or _apart(
        one.get("leakage_interval"), other.get("leakage_interval")
    )


def _apart(lower: Sequence[float] | None, upper: Sequence[float] | None) -> bool:
    """Whether the first interval [low, high] ends below the second; never without intervals."""
    return lower is not None and upper is not None and lower[1] < upper[0]


# --- remarks ---


def remarks_of(row: Row, rows: Sequence[Row], classes: int | None = None) -> list[str]:
    """What a reader of a finished row must know besides: its own ``remarks``, and an accuracy that is worth little.

    rows: all of the sweep, for the accuracy without compression. classes: of the data set, where it is known.
    """
    remarks, interval = [str(remark) for remark in row.get("remarks") or []], row.get("accuracy_interval")
    if row["status"] != "finished" or interval is None:
        return remarks
    plain = [r for r in rows if r["status"] == "finished" and r.get("compressor") == "none"]
    if classes and interval[0] <= 1 / classes:
        return [*remarks, f"{NEAR_CHANCE} ({100 / classes:.3g} %)"]
    for best in plain[:1]:
        cost = best["accuracy"] - row["accuracy"]
        if cost >= FAR_BELOW and _apart(interval, best.get("accuracy_interval")):
            remarks.append(f"accuracy {100 * cost:.0f} points below training without compression")
    return remarks


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
