"""A sweep's answer in a few lines: for the end of the terminal's output and for the page's first screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytrust.metrics.statistics import Figure
from raytrust.metrics.verdict import LEAKS, LONG, RESISTS, UNDECIDED, Verdict
from raytrust.reports.text import capital, human_bytes
from raytrust.studies.frontier.row import Row, accuracy, is_plain, split
from raytrust.studies.frontier.verdicts import control_of_rows, control_works, judge_rows, only_looks_private, starkest

ALONE = "No defence was audited beside the control."
REMEDY = "give it more (--iterations, --attack-trials, --images)"
REMEDY_IN_PYTHON = "give it more (attack=InversionConfig(iterations=...), search=..., evaluation=...)"
NO_CONTROL = "No control"
NEAR_CHANCE = "accuracy near chance"
# Of accuracy: a loss that nobody would pay for compression.
FAR_BELOW = 0.05
_NAMED = 3  # defences that a line names before it counts the others


def summary_lines(rows: Sequence[Row], page: Path | str) -> list[str]:
    """Three lines: what leaks, resists and is undecided, at what accuracy and bytes; the control; where the page is.

    Raises:
        ValueError: as in `raytrust.studies.frontier.row.write_rows`.
    """
    rows = judge_rows(rows)
    return [answer(rows), control_sentence(rows), f"The whole answer on one page: {page}"]


def answer(judged: Sequence[Row]) -> str:
    """What leaks, what resists, what is undecided, in one line; failed rows are counted."""
    finished, failed = _defences(judged)
    if not finished and not failed:
        return ALONE if judged else "No defence finished."
    parts = []
    for verdict in (LEAKS, RESISTS, UNDECIDED):
        names = [f"{row['name']} ({cost(row)})" for row in with_verdict(finished, verdict)]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{LONG[verdict]}: {len(names)} of {len(finished)}, {', '.join(names[:_NAMED])}{more}")
    if failed:
        parts.append(f"failed: {len(failed)}")
    return f"{capital('; '.join(parts))}."


def headline(judged: Sequence[Row]) -> str:
    """How many leak, resist and are undecided: the shortest answer there is."""
    finished, failed = _defences(judged)
    if not finished and not failed:
        return ALONE
    leak, resist, open_ = (len(with_verdict(finished, v)) for v in (LEAKS, RESISTS, UNDECIDED))
    text = f"Of {len(finished)} defence{'s' * (len(finished) != 1)}, {leak} leak{'s' * (leak == 1)}"
    if control_works(judged):
        text += f", {resist} resist{'s' * (resist == 1)} the attacks tried" + f", {open_} undecided" * bool(open_)
    else:
        text += f"; of the other {open_} nothing can be said" * bool(open_)
    return text + (f"; {len(failed)} failed." if failed else ".")


def _defences(judged: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Those that are finished, and that failed; training without compression is no defence, but the control."""
    return split([row for row in judged if not is_plain(row)])


def with_verdict(judged: Sequence[Row], verdict: Verdict) -> list[Row]:
    """The finished rows of this verdict: without compression first, then those that need the fewest bytes."""
    rows = [row for row in judged if row["status"] == "finished" and row["verdict"] == verdict]
    return sorted(rows, key=lambda row: (not is_plain(row), row.get("bytes_per_step") or 0))


def cost(row: Row) -> str:
    """What a finished row costs: 92.5 %, 12.3 kB a step; the bytes alone where no accuracy was measured."""
    accurate = [f"{100 * row['accuracy']:.1f} %"] if "accuracy" in row else []
    size = row.get("bytes_per_step")
    return ", ".join([*accurate, *([] if size is None else [f"{human_bytes(size)} a step"])])


def pareto_sentence(judged: Sequence[Row]) -> str:
    """What the star of the tables marks, and what it means if hardly a row is without one."""
    finished, _ = split(judged)
    stars = sum(row["pareto"] for row in finished)
    text = (
        f"*: Pareto set, here {stars} of {len(finished)} rows. A row without a star is beaten: another is no worse in "
        "leakage and in accuracy, and better in one by 95 % intervals that do not overlap."
    )
    # Else a star would look like praise, where it says that so few images tell hardly any two rows apart.
    return text + " Where most rows have one, intervals are too wide to rule more out." * (2 * stars > len(finished))


def seeming(judged: Sequence[Row]) -> str | None:
    """What knowing the compressor is worth on the starkest case, in a sentence; None without one."""
    row = starkest(judged)
    if row is None:
        return None
    naive, aware, floor = (Figure(value) for value in (row["naive_ssim"], row["leakage_ssim"], row.get("floor_ssim")))
    if only_looks_private(row, control_of_rows(judged)):
        return (
            f"{row['name']} looks private to an attacker who ignores the compressor (SSIM {naive}), and leaks to one "
            f"who knows it ({aware}; floor {floor})."
        )
    return (
        f"{row['name']} shows SSIM {naive} to an attacker who ignores the compressor, and {aware} to one who knows it."
    )


def control_sentence(rows: Sequence[Row]) -> str:
    """The first thing to say of judged rows: whether the attack works at all, and what to do where it doesn't."""
    control = control_of_rows(rows)
    if control.works:
        return f"Control: the attack works {control.reason}."
    state, consequence = failure_words(rows)
    if state == NO_CONTROL:
        return f"{state}: add --defence none. Without it, {consequence}."
    # Only an audit from Python has no accuracy.
    remedy = REMEDY if any("accuracy" in row for row in rows) else REMEDY_IN_PYTHON
    return f"{state}: {consequence}; {remedy}. {capital(control.reason)}."


def failure_words(rows: Sequence[Row]) -> tuple[str, str]:
    """(what is wrong, what follows) of judged rows whose control doesn't work. A leak that was shown is shown, and
    that is all that can be said."""
    leaks = sum(row.get("verdict") == LEAKS for row in rows)
    shown = f"{leaks} leak{'s' * (leaks == 1)}"
    plain = [row for row in rows if is_plain(row)]
    # It identifies, but is no nearer than the floor, or too seldom.
    if any(row.get("verdict") == LEAKS for row in plain):
        return "The attack is too weak here", f"nothing can be called private, and {shown}"
    state = "The attack fails here" if plain else NO_CONTROL
    return state, "nothing can be said about any defence" + (f", but that {shown}" if leaks else "")


def remarks_of(row: Row, rows: Sequence[Row], classes: int | None = None) -> list[str]:
    """What a reader of a finished row must know besides: its own ``remarks``, and an accuracy that is worth little.

    rows: all of the sweep, for the accuracy without compression. classes: of the data set, where it is known.
    """
    remarks = [str(remark) for remark in row.get("remarks") or []]
    if row["status"] != "finished" or (low := accuracy(row).low) is None:
        return remarks
    # Who guesses is as good: what it costs against training without compression says nothing then.
    if classes and low <= 1 / classes:
        return [*remarks, f"{NEAR_CHANCE} ({100 / classes:.3g} %)"]
    for best in [r for r in rows if r["status"] == "finished" and is_plain(r)][:1]:
        loss = best["accuracy"] - row["accuracy"]
        if loss >= FAR_BELOW and accuracy(row).below(accuracy(best)):
            remarks.append(f"accuracy {100 * loss:.0f} points below training without compression")
    return remarks


def threat_sentence(threat: Mapping[str, Any]) -> str:
    """A row's ``threat`` in words: what the attacker sees and knows. Other keys than ours follow as they are."""
    # What is left in it at the end are fields that this text doesn't know: they must not be passed over.
    rest = dict(threat)
    vantage, size = rest.pop("vantage", "link"), rest.pop("batch_size", 1)
    mode, labels = rest.pop("batch_norm", "eval"), rest.pop("labels", "known")
    local = rest.pop("local", "")
    statistics, history = rest.pop("batch_statistics", "unknown"), rest.pop("history", 0)
    auxiliary = rest.pop("auxiliary", 0)
    sees = "what one worker sends" if vantage == "link" else "what the collective returns to every worker"
    parts = [
        f"The attacker sees {sees} in one training step{f' of {local}' if local else ''}",
        f"made from {'one private image' if size == 1 else f'{size} private images'}",
        "knows the model and its weights",
        f"{'knows' if labels == 'known' else 'does not know'} the labels",
    ]
    if mode == "eval":
        parts.append("and batch norm is in evaluation mode")
    else:
        knows = "known" if statistics == "known" else "unknown"
        parts.append(f"and batch norm is in training mode, with statistics {knows} to the attacker")
    if auxiliary:
        use = ", from which it estimates the batch's statistics" if statistics == "proxy" else ""
        parts.append(f"with {auxiliary} other images of the kind at hand{use}")
    if history:
        parts.append(f"with the messages of {history} steps before at hand")
    return ", ".join(parts) + "." + "".join(f" {name}: {value}." for name, value in rest.items())
