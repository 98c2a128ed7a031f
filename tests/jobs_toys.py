"""Jobs that take no time. In a module of its own, so that Ray's workers can import them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from raytrust.jobs.job import Job, Place, Result, Results


@dataclass(frozen=True)
class Square(Job):
    """number: squared; negative ones fail, and 13 ends the process the first time that it is met with a `mark`."""

    kind: ClassVar[str] = "squares"
    number: int
    mark: str = ""

    @property
    def name(self) -> str:
        return f"square of {self.number}"

    @property
    def cost(self) -> float:
        return float(abs(self.number))

    def run(self, store: Results, place: Place) -> Result:
        if self.number < 0:
            raise ValueError(f"Expected number={self.number} to be at least 0.")
        if self.number == 13 and (not self.mark or not Path(self.mark).exists()):
            Path(self.mark or os.devnull).touch()
            os._exit(1)
        return Result({"square": self.number**2, "process": os.getpid()}, {"row": np.arange(self.number)})


@dataclass(frozen=True)
class Root(Job):
    """Reads a square, and lies beside it."""

    kind: ClassVar[str] = "roots"
    square: Square

    @property
    def name(self) -> str:
        return f"root of {self.square.number}"

    @property
    def parent(self) -> Square:
        return self.square

    def after(self) -> tuple[Job, ...]:
        return (self.square,)

    def run(self, store: Results, place: Place) -> Result:
        return Result({"root": len(store.arrays(self.square)["row"])})


@dataclass(frozen=True)
class Batch(Square):
    """Squares that are done together; all fail if 99 is among them, in a way that nobody foresaw."""

    kind: ClassVar[str] = "batches"

    @classmethod
    def run_together(cls, jobs: Sequence[Job], store: Results, place: Place) -> list[Result | Exception]:
        if 99 in (numbers := [job.number for job in jobs if isinstance(job, Batch)]):
            raise MemoryError("no room")
        return [Result({"together": numbers}) for _ in jobs]


class Notes:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def started(self, phase: str, key: str, name: str) -> None:
        self.told.append(("started", name))

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        self.told.append(("finished", phase, result))

    def failed(self, phase: str, key: str, reason: str) -> None:
        self.told.append(("failed", phase, reason))

    def tick(self) -> None:
        pass
