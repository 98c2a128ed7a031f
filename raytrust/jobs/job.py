"""Work as a value: a frozen dataclass says what is to be done, and equal jobs are one job, done once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from raytrust.data import Dataset

if TYPE_CHECKING:
    from raytrust.jobs.store import JobStore

Figures: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a job gives: figures, which JSON can hold (no NaN, no infinity), and arrays by name."""

    figures: Figures
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a job runs. data: the data set that it is about, None where it needs none. device: as torch names it."""

    data: Dataset | None = None
    device: str = "cpu"

    @property
    def images(self) -> Dataset:
        """The data set. Raises ValueError where there is none."""
        if self.data is None:
            raise ValueError("Expected data for this job, got data=None.")
        return self.data


Results: TypeAlias = "JobStore"
"""What a job reads."""


class Job(ABC):
    """A piece of work for one process and one thread. Subclasses are frozen dataclasses of configs and builtins."""

    kind: ClassVar[str]
    """What progress calls it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For people."""

    @property
    def cost(self) -> float:
        """How long it takes, in a unit of its kind's own."""
        return 1.0

    def after(self) -> tuple[Job, ...]:
        """The jobs whose results it reads. It is begun once they are finished or have failed."""
        return ()

    @property
    def shelf(self) -> str:
        """The name of the folder where results like its own lie."""
        return self.kind

    @property
    def parent(self) -> Job | None:
        """The job in whose folder its results lie, so that all results about one thing can be listed."""
        return None

    @abstractmethod
    def run(self, store: Results, place: Place) -> Result:
        """Do it, reading what it needs from `store`. Raises ValueError or FloatingPointError where it can't be done."""

    @classmethod
    def run_together(cls, jobs: Sequence[Job], store: Results, place: Place) -> list[Result | Exception]:
        """Do several jobs of this class; override it where they are faster together than one by one."""
        results: list[Result | Exception] = []
        for job in jobs:
            try:
                results.append(job.run(store, place))
            # What a job says of itself. Any other error is the runner's, who then does the jobs one by one to see whose
            # it is.
            except (ValueError, FloatingPointError) as error:
                results.append(error)
        return results
