"""A sweep's answer in a few lines: for the end of the terminal's output and for the page's first screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytrust.metrics.verdict import LEAKS, LONG, RESISTS, UNDECIDED, Verdict
from raytrust.reports.frontier_table import Row, control_works, human_bytes, judge_rows, split, two_digits
from raytrust.reports.judged import control_of_rows, control_sentence, only_looks_private, starkest

ALONE = "No defence was audited beside the control."
_NAMED = 3  # defences that a line names before it counts the others


def summary_lines(rows: Sequence[Row], page: Path | str) -> list[str]:
    """Three lines: what leaks, resists and is undecided, at what accuracy and bytes; the control; where the page is.

    Raises:
        ValueError: as in `raytrust.reports.frontier_table.write_rows`.
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
        names = [in_short(row) for row in with_verdict(finished, verdict)]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{LONG[verdict]}: {len(names)} of {len(finished)}, {', '.join(names[:_NAMED])}{more}")
    if failed:
        parts.append(f"failed: {len(failed)}")
    text = "; ".join(parts) or "no defence finished"
    return f"{text[:1].upper()}{text[1:]}."


def headline(judged: Sequence[Row]) -> str:
    """How many leak, resist and are undecided: the shortest answer there is."""
    finished, failed = _defences(judged)
    if not finished and not failed:
        return ALONE
    counts = {v: len(with_verdict(finished, v)) for v in (LEAKS, RESISTS, UNDECIDED)}
    leak, resist = "leaks" if counts[LEAKS] == 1 else "leak", "resists" if counts[RESISTS] == 1 else "resist"
    text = f"Of {len(finished)} defence{'s' * (len(finished) != 1)}, {counts[LEAKS]} {leak}"
    if control_works(judged):
        text += f", {counts[RESISTS]} {resist} the attacks tried"
        text += f", {counts[UNDECIDED]} undecided" if counts[UNDECIDED] else ""
    else:
        text += f"; of the other {counts[UNDECIDED]} nothing can be said" if counts[UNDECIDED] else ""
    return text + (f"; {len(failed)} failed." if failed else ".")


def _defences(judged: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Those that are finished, and that failed; training without compression is no defence, but the control."""
    return split([row for row in judged if row.get("compressor") != "none"])


def with_verdict(judged: Sequence[Row], verdict: Verdict) -> list[Row]:
    """The finished rows of this verdict: without compression first, then those that need the fewest bytes."""
    rows = [row for row in judged if row["status"] == "finished" and row["verdict"] == verdict]
    return sorted(rows, key=lambda row: (row.get("compressor") != "none", row.get("bytes_per_step") or 0))


def in_short(row: Row) -> str:
    """A finished row's name with its accuracy and bytes: PowerSGD rank 1 (92.5 %, 12.3 kB a step)."""
    size = "" if row.get("bytes_per_step") is None else f", {human_bytes(row['bytes_per_step'])} a step"
    return f"{row['name']} ({100 * row['accuracy']:.1f} %{size})"


def seeming(judged: Sequence[Row]) -> str | None:
    """What knowing the compressor is worth on the starkest case, in a sentence; None without one."""
    row = starkest(judged)
    if row is None:
        return None
    naive, aware = two_digits(row["naive_ssim"]), two_digits(row["leakage_ssim"])
    if only_looks_private(row, control_of_rows(judged)):
        return (
            f"{row['name']} looks private to an attacker who ignores the compressor (SSIM {naive}), and leaks to one "
            f"who knows it ({aware}; floor {two_digits(row['floor_ssim'])})."
        )
    return (
        f"{row['name']} shows SSIM {naive} to an attacker who ignores the compressor, and {aware} to one who knows it."
    )


def threat_sentence(threat: Mapping[str, Any]) -> str:
    """A row's ``threat`` in words: what the attacker sees and knows. Other keys than ours follow as they are."""
    rest = dict(threat)
    vantage, size = rest.pop("vantage", "link"), rest.pop("batch_size", 1)
    mode, labels = rest.pop("batch_norm", "eval"), rest.pop("labels", "known")
    statistics, history = rest.pop("batch_statistics", "unknown"), rest.pop("history", 0)
    sees = "what one worker sends" if vantage == "link" else "what the collective returns to every worker"
    images = "one private image" if size == 1 else f"{size} private images"
    parts = [f"The attacker sees {sees} in one training step", f"made from {images}"]
    parts.append("knows the model and its weights")
    parts.append(f"{'knows' if labels == 'known' else 'does not know'} the labels")
    if mode == "eval":
        parts.append("and batch norm is in evaluation mode")
    else:
        knows = "known to the attacker" if statistics == "known" else "unknown to the attacker"
        parts.append(f"and batch norm is in training mode, with statistics {knows}")
    if history:
        parts.append(f"with the messages of {history} steps before at hand")
    return ", ".join(parts) + "." + "".join(f" {name}: {value}." for name, value in rest.items())
