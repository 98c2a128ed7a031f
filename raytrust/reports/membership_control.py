"""Whether a membership audit's attacks work at all: the control of `raytrust.metrics.verdict`, without compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytrust.metrics.verdict import Control, Evidence, control_of
from raytrust.reports.membership_figures import message_figure

Row = dict[str, Any]


def control_lines(rows: Sequence[Row]) -> list[str]:
    """A line for the final models and one for the messages: whether the attack beats chance without compression.

    Where it doesn't, with its 95 % interval over models, nothing that it says of a defence may be called protective.
    """
    plain = next((row for row in rows if row["status"] == "finished" and _is_plain(row)), None)
    if plain is None:
        return ["No control: uncompressed training was not audited. Nothing here may be called protective."]
    found = [("final models (LiRA online)", _control(plain, plain["final"]["LiRA online"]["auc"]))]
    if plain["messages"]:
        last = max(m["step"] for m in plain["messages"])
        figure = message_figure(plain, last, "held-out points", "gradient difference")
        found.append((f"messages (gradient difference, step {last})", _control(plain, figure)))
    return [_line(where, control) for where, control in found]


def _is_plain(row: Row) -> bool:
    return "privacy" not in row and (row["arm"].get("compressor") or {}).get("method") == "none"


def _control(row: Row, figure: dict[str, Any]) -> Control:
    """figure: an AUC with its interval, None where it wasn't measured."""
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None:
        return control_of(None)
    interval = None if low is None else (low - 0.5, high - 0.5)
    return control_of(Evidence(value, 0.5, interval, row["models"], measure="AUC"))


def _line(where: str, control: Control) -> str:
    if control.works:
        return f"Control, {where}: the attack works {control.reason}."
    return (
        f"The attack on {where} fails here: nothing that it says of a defence may be called protective; give it more "
        f"models or longer training. {control.reason[:1].upper()}{control.reason[1:]}."
    )
