"""The verdicts of a sweep: from each row's evidence, and from all rows together, what may be said of each.

Computed from the rows by `raytrust.metrics.verdict` and nowhere else, so that table, figure, page, terminal and MLflow
say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from raytrust.metrics.verdict import LEAKS, RESISTS, UNDECIDED, Control, Judgement, control_of, judge
from raytrust.studies.frontier.row import Row, accuracy, checked, evidence, is_plain, leakage, naive_evidence


def judge_rows(rows: Sequence[Row]) -> list[Row]:
    """Copies of the rows with ``verdict``, ``verdict_reason``, ``control`` and ``pareto``.

    control: whether the attack works without compression; the same in all rows. verdict: "leaks", "resists" or
    "undecided", None in a failed row; verdict_reason: one line with the numbers. pareto: see `mark_pareto`; False for
    all where the control fails. Order is kept, the arguments are left alone, and what the keys held is not read.

    Raises:
        ValueError: as in `raytrust.studies.frontier.row.write_rows`.
    """
    control = control_of_rows(checked(rows))
    judged = []
    for row in rows:
        # A failed row has no verdict: an attack that was not made has not been resisted.
        verdict = _judged(row, control) if row["status"] == "finished" else None
        words = {"verdict": verdict and verdict.verdict, "verdict_reason": verdict and verdict.reason}
        judged.append(cast(Row, row | words | {"control": control.works}))
    return mark_pareto(judged)


def _judged(row: Row, control: Control) -> Judgement:
    """By the strongest attack; but a leak that the best naive attack shows, by identification, say, is a leak too."""
    verdict, naive = judge(evidence(row), control), naive_evidence(row)
    # What nobody tried to understand has not been resisted.
    if verdict.verdict == RESISTS and row.get("understood") is False:
        return Judgement(UNDECIDED, f"{evidence(row)}: no attack here knows the method")
    # The attack of the greatest SSIM is not always the one that identifies most, so that the naive one is heard as
    # well.
    if verdict.verdict == LEAKS or row.get("excess_interval") is None or naive is None or naive.interval is None:
        return verdict
    ignorant = judge(naive, control)
    return Judgement(LEAKS, f"ignoring the compressor: {ignorant.reason}") if ignorant.verdict == LEAKS else verdict


def control_of_rows(rows: Sequence[Row]) -> Control:
    """Whether the attack works on the uncompressed gradient: on the row without a compressor that leaks most."""
    plain = [row for row in rows if is_plain(row)]
    tried = [evidence(row) for row in plain if row["status"] == "finished"]
    # A control that failed can be mended, unlike one that was never asked for: the reader is told which it is.
    if not tried and plain:
        return Control(False, f"no control: without compression it failed: {plain[0].get('reason')}")
    # The question is whether the attack can work at all, so that it is asked where that shows best.
    return control_of(max(tried, key=lambda e: e.value, default=None))


def control_works(judged: Sequence[Row]) -> bool:
    return any(row["control"] for row in judged)


def only_looks_private(row: Row, control: Control) -> bool:
    """Whether a judged row leaks, but an attack that ignores its compressor would not have shown it."""
    naive = naive_evidence(row)
    if row.get("verdict") != LEAKS or naive is None or naive.floor is None or naive.interval is None:
        return False
    # By the rule that judged the row: a rule of its own could make the difference all by itself.
    return judge(naive, control).verdict != LEAKS


def starkest(rows: Sequence[Row]) -> Row | None:
    """Of the judged rows, the one on which knowing the compressor gains most: among those that only look private, or
    if there are none, among those where the gain is certain, with its interval."""
    control = control_of_rows(rows)
    deceptive = [row for row in rows if only_looks_private(row, control)]
    # Of many rows the greatest gain may be the luckiest, unless its interval excludes 0.
    certain = [row for row in rows if row.get("verdict") == LEAKS and (row.get("aware_gain_interval") or [0.0])[0] > 0]
    return max(deceptive or certain, key=lambda row: row["leakage_ssim"] - (row["naive_ssim"] or 0.0), default=None)


def mark_pareto(rows: Sequence[Row]) -> list[Row]:
    """Copies of the judged rows with ``pareto``: which are worth choosing among, as far as the intervals tell.

    A finished row is out only if another is no worse in accuracy and in leakage, and in at least one of them better by
    95 % intervals that do not overlap. Where the control fails, none is in: a ranking by an attack that doesn't work
    would be one of noise.
    """
    finished = [row for row in rows if row["status"] == "finished"]

    def stays(row: Row) -> bool:
        # Without accuracy there is nothing to weigh privacy against. And intervals decide, because points differ by
        # chance: a defence that is out by luck would never be looked at again.
        candidate = row["status"] == "finished" and row["control"] and "accuracy" in row and not row.get("untrained")
        return candidate and not any(_beats(other, row) for other in finished)

    return [row | {"pareto": stays(row)} for row in rows]


def _beats(one: Row, other: Row) -> bool:
    if one["accuracy"] < other["accuracy"] or one["leakage_ssim"] > other["leakage_ssim"]:
        return False
    return accuracy(other).below(accuracy(one)) or leakage(one).below(leakage(other))
