"""Ranges that a search chooses from: plain values, so that a program is read and refused without loading a library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from raytrust.config.values import expect


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        expect(len(self.values) > 0, "values", self.values, "to hold at least one value")


@dataclass(frozen=True)
class LogUniform:
    """A number between low and high, uniform in its logarithm."""

    low: float
    high: float

    def __post_init__(self) -> None:
        expect(0 < self.low < self.high, "low", self.low, f"to be positive and below high={self.high}")


@dataclass(frozen=True)
class LogInteger:
    """A whole number from low to high, both included, uniform in its logarithm."""

    low: int
    high: int

    def __post_init__(self) -> None:
        expect(1 <= self.low < self.high, "low", self.low, f"to be at least 1 and below high={self.high}")


Space: TypeAlias = dict[str, Choice | LogUniform | LogInteger]
