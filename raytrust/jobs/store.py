"""The results of jobs on disk. Resuming a run is reading this store.

    DIR/<shelf>/<key>.json           figures of a finished job; the key is the hash of the job and of the data
    DIR/<shelf>/<key>.npz            its arrays, if it has any
    DIR/<shelf>/<key>.failed.json    why it has none, until it is tried again
    DIR/<shelf>/<key>/               what else it leaves behind, and the results of the jobs that are its children

Every file is written whole or not at all, so whatever is there is finished. Files can be read by their owner alone
(mode 0600), as captures and reconstructions hold private data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raytrust.config import digest, to_dict
from raytrust.jobs.files import atomic_write, read_json, write_json
from raytrust.jobs.job import Figures, Job, Result

FORMAT = 3  # of the layout above and of what the figures hold; 1 was a layout for each program

J = TypeVar("J", bound=Job)


@dataclass(frozen=True)
class JobStore:
    """The directory of one run over one data set, whose fingerprint enters the key of each job."""

    root: Path
    fingerprint: str = ""

    def key(self, job: Job) -> str:
        return digest(job.kind, job, self.fingerprint)

    def folder(self, job: Job) -> Path:
        """For what a job leaves behind besides its figures and arrays."""
        parent = self.root if job.parent is None else self.folder(job.parent)
        return parent / job.shelf / self.key(job)

    def result(self, job: Job) -> Figures | None:
        """The figures of a finished job, else None."""
        figures: Figures | None = read_json(self._path(job, ".json"))
        return figures

    def arrays(self, job: Job, prefix: str = "") -> dict[str, np.ndarray]:
        """The arrays of a finished job whose names begin like this, by the rest of their names.

        Raises ValueError if it is not finished, or if its file is damaged.
        """
        path = self._path(job, ".npz")
        if not self.finished(job):
            reason = (self.failure(job) or "it is not finished").removesuffix(".")
            raise ValueError(f"Expected this to be done: {job.name}, but {reason}.")
        if not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as archive:
                names = [name for name in archive.files if name.startswith(prefix)]
                return {name.removeprefix(prefix): archive[name] for name in names}
        except Exception as error:
            # A damaged file can make zipfile, zlib and numpy raise nearly anything.
            raise ValueError(f"Expected {path} to be a job's arrays, but it can't be read: {error}.") from error

    def put(self, job: Job, result: Result) -> None:
        """Keep the result of a job, and forget that it failed before."""
        if result.arrays:
            with atomic_write(self._path(job, ".npz")) as file:
                np.savez(file, **dict(result.arrays))  # type: ignore[arg-type]
        # Last: it says that the job is finished.
        write_json(self._path(job, ".json"), {**result.figures, "job": to_dict(job)})
        self._path(job, ".failed.json").unlink(missing_ok=True)

    def finished(self, job: Job) -> bool:
        return self._path(job, ".json").exists()

    def fail(self, job: Job, reason: str) -> None:
        write_json(self._path(job, ".failed.json"), {"job": to_dict(job), "reason": reason})

    def failure(self, job: Job) -> str | None:
        """Why a job has no figures, if it was tried in vain."""
        content = read_json(self._path(job, ".failed.json"))
        return None if content is None else str(content["reason"])

    def knows(self, job: Job) -> bool:
        """Whether a job is finished or has failed."""
        return self.finished(job) or self._path(job, ".failed.json").exists()

    def missing(self, jobs: Iterable[J]) -> list[J]:
        """Those that are neither finished nor failed, each once, in their order."""
        return [job for job in dict.fromkeys(jobs) if not self.knows(job)]

    def results(self, shelf: str, parent: Job | None = None) -> list[Figures]:
        """The figures of all finished jobs of a shelf, or of those with this parent, in the order of their keys."""
        return self._read(shelf, parent, failed=False)

    def failures(self, shelf: str, parent: Job | None = None) -> list[Figures]:
        """The jobs of a shelf that failed, as "job" and "reason", in the order of their keys."""
        return self._read(shelf, parent, failed=True)

    def clear_failures(self) -> None:
        """Forget failures, so that what failed is tried again."""
        # A list first, since a tree should not change while it is walked.
        for path in list(self.root.rglob("*.failed.json")):
            path.unlink()

    def _read(self, shelf: str, parent: Job | None, failed: bool) -> list[Figures]:
        paths = sorted(((self.root if parent is None else self.folder(parent)) / shelf).glob("*.json"))
        contents = (read_json(path) for path in paths if path.name.endswith(".failed.json") == failed)
        return [content for content in contents if content is not None]

    def _path(self, job: Job, suffix: str) -> Path:
        folder = self.folder(job)
        return folder.with_name(folder.name + suffix)


def claim(path: Path, content: dict[str, Any], identity: Callable[[dict[str, Any]], Any], noun: str) -> None:
    """Begin the run that `content` describes in the directory of `path`, or go on with it.

    identity: of a content, what must not change from one time to the next; the rest is replaced. Raises ValueError if
    the directory holds another run, or one in another layout.
    """
    content = {"format": FORMAT, **content}
    kept = read_json(path)
    if kept is not None and kept.get("format") != FORMAT:
        raise ValueError(f"Expected output={str(path.parent)!r} to be empty, but another version of raytrust made it.")
    if kept is not None and identity(kept) != identity(content):
        raise ValueError(
            f"Expected output={str(path.parent)!r} to be empty or to hold this {noun}, but it holds another one."
        )
    if kept != content:
        write_json(path, content)
