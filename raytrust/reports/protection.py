"""At the same accuracy, is a compressor or noise the better protection?"""

from __future__ import annotations

from collections.abc import Sequence

from raytrust.studies.frontier.row import Row, accuracy, is_plain, leakage
from raytrust.studies.frontier.verdicts import control_works


def noise_or_compression(rows: Sequence[Row]) -> list[str]:
    """Of judged rows, a sentence for each defence that adds noise, the most accurate first: which compressor without
    transforms, of an accuracy that is not surely lower, leaks least, and which of the two leaks surely less.

    By 95 % intervals that do not overlap, under the strongest attack on each. Nothing where the control does not work.
    """
    trained = [row for row in rows if row["status"] == "finished" and accuracy(row).value is not None]
    if not control_works(rows):
        return []
    noisy = sorted((row for row in trained if row.get("noisy")), key=lambda row: -row["accuracy"])
    others = [row for row in trained if not row.get("transforms") and not is_plain(row)]
    return [_compared(row, [o for o in others if not accuracy(o).below(accuracy(row))]) for row in noisy]


def _compared(noisy: Row, compressors: Sequence[Row]) -> str:
    if not compressors:
        return f"{_words(noisy)}: no compressor here keeps that accuracy."
    best = min(compressors, key=lambda row: row["leakage_ssim"])
    if leakage(noisy).below(leakage(best)):
        words = "noise protects better"
    elif leakage(best).below(leakage(noisy)):
        words = "the compressor protects better"
    else:
        words = "no difference is shown"
    return f"{_words(noisy)}, against {_words(best)}: {words}."


def _words(row: Row) -> str:
    return f"{row['name']} ({100 * row['accuracy']:.1f} %) SSIM {leakage(row)}"
