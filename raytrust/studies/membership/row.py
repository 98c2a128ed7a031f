"""A row of the membership audit: one defence, as `results.json` has it; the model is the unit of every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypedDict

from raytrust.metrics.membership import AuditReport
from raytrust.metrics.statistics import Figure
from raytrust.metrics.thresholds import Origin


@dataclass(frozen=True, kw_only=True)
class Rule(Figure):
    """Balanced accuracy of one signal with one threshold or one a class. floor: what a useless score reaches."""

    signal: str
    per_class: bool
    origin: Origin
    floor: float = 0.5

    @property
    def key(self) -> tuple[str, bool, str]:
        return self.signal, self.per_class, self.origin


@dataclass(frozen=True, kw_only=True)
class MessageFigure(Figure):
    """AUC of telling a batch's images from a control's by the messages of one training step."""

    step: int
    control: str
    score: str


class Curves(TypedDict):
    """Mean TPR at each `fpr`: of LiRA on final models, and of the last step's messages where there are any.

    least: the smallest FPR that one model's or one message's others resolve.
    """

    fpr: list[float]
    final: list[float]
    messages: list[float] | None
    least: dict[str, float]


class MatchedFit(TypedDict):
    """Uncompressed SGD stopped where it fits its training points as well as the defence does: at which steps."""

    steps: list[int]
    train_loss: Figure
    loss_auc: Figure
    message_auc: Figure


# Written as a call, since a class can't have the keyword `class` among its fields.
Property = TypedDict(
    "Property", {"aware": Figure, "naive": Figure, "label": int, "class": str, "reason": str}, total=False
)  # AUC by attacker of finding the class of this label, named `class`; or the reason why there is none


class Row(TypedDict, total=False):
    """A defence; one that failed or is not finished has its reason and no figures."""

    name: str
    arm: dict[str, Any]  # its configuration
    run: str
    status: Literal["finished", "failed", "not finished"]
    reason: str
    models: int
    accuracy: Figure
    train_loss: Figure
    bytes_per_step: float
    compression_ratio: float
    final: dict[str, AuditReport]  # by attack on the final models
    grid: list[Rule]
    messages: list[MessageFigure]
    property: Property | None
    curves: Curves
    privacy: dict[str, float]  # epsilon and delta of DP-SGD's own account
    matched: MatchedFit


def finished(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "finished"]


def messages_of(row: Row, control: str = "held-out points", score: str = "gradient difference") -> list[MessageFigure]:
    """What the messages of a finished row give away by one score against one control, step by step."""
    # By default against held-out points, which attacks on the final model are measured with as well: so the two
    # compare.
    return [m for m in row["messages"] if (m.control, m.score) == (control, score)]


def plain(content: Any) -> Any:
    """The same as JSON can hold it: a figure as its value, low and high, and what it is of."""
    if is_dataclass(content):
        content = {f.name: getattr(content, f.name) for f in fields(content) if f.name != "n"}
    if isinstance(content, Mapping):
        return {str(name): plain(value) for name, value in content.items()}
    return [plain(value) for value in content] if isinstance(content, list | tuple) else content
