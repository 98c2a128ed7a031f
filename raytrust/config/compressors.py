"""Compression methods, one class each, and `Defence`: a method with or without error feedback."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from raytrust.config.values import expect, expect_choices


@dataclass(frozen=True)
class DenseConfig:
    """No compression: the gradient crosses the wire as it is."""

    method: ClassVar[str] = "none"


@dataclass(frozen=True)
class PowerSGDConfig:
    """PowerSGD of the given rank (Vogels et al. 2019, Algorithm 1), at most min(n, m) for an n x m matrix."""

    method: ClassVar[str] = "powersgd"
    rank: int = 4
    warm_start: bool = True

    def __post_init__(self) -> None:
        expect(self.rank >= 1, "rank", self.rank, "to be at least 1")


@dataclass(frozen=True)
class TopKConfig:
    """Top-K over the whole gradient (Aji & Heafield 2017). Exactly one of the two levels is given.

    level: the fraction of entries that is sent, in (0, 1].
    equal_to_rank: send what PowerSGD of this rank sends, counted in bytes (a value and an index each: half as many
        entries as PowerSGD sends floats) or in values, as `equal_by` says.
    """

    method: ClassVar[str] = "topk"
    level: float | None = None
    equal_to_rank: int | None = None
    equal_by: Literal["bytes", "values"] = "bytes"

    def __post_init__(self) -> None:
        if (self.level is None) == (self.equal_to_rank is None):
            raise ValueError(
                f"Expected exactly one of level={self.level!r} and equal_to_rank={self.equal_to_rank!r} to be given."
            )
        if self.level is not None:
            expect(0 < self.level <= 1, "level", self.level, "in (0, 1], the fraction of entries that is sent")
        if self.equal_to_rank is not None:
            expect(self.equal_to_rank >= 1, "equal_to_rank", self.equal_to_rank, "to be at least 1")
        expect_choices(self)


CompressorConfig: TypeAlias = DenseConfig | PowerSGDConfig | TopKConfig


@dataclass(frozen=True)
class Defence:
    """What stands between the private gradient and the wire: a compressor, with or without error feedback."""

    compressor: CompressorConfig = field(default_factory=DenseConfig)
    error_feedback: bool = False

    @property
    def name(self) -> str:
        """A short name for tables and plots, such as "PowerSGD rank 4 + EF"."""
        match self.compressor:
            case DenseConfig():
                name = "none"
            case PowerSGDConfig(rank=rank, warm_start=warm_start):
                name = f"PowerSGD rank {rank}" + ("" if warm_start else " cold")
            case TopKConfig(level=level) if level is not None:
                name = f"Top-K {100 * level:.3g} %"
            case TopKConfig(equal_to_rank=rank, equal_by=equal_by):
                name = f"Top-K level {rank}" + ("" if equal_by == "bytes" else " (values)")
        return name + (" + EF" if self.error_feedback else "")
