from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes that tests start

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import two_workers
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure
from toys import synthetic

from raytrust.config import register
from raytrust.data import Dataset
from raytrust.wire.processes import in_processes

# How long an example takes says more of the machine than of the code.
settings.register_profile("raytrust", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raytrust")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """What a test registers is its own: others compare lists of names."""
    before = {r: dict(r._things) for r in vars(register).values() if isinstance(r, register.Registry)}
    yield
    for registry, things in before.items():
        registry._things = things


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture(scope="session")
def data() -> Dataset:
    """64 + 24 images of 3 channels, 8x8 pixels and 4 classes."""
    return synthetic()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data sets in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def group() -> list[dict[str, Any]]:
    """What each of two gloo processes found, by rank: see `two_workers.everything`. Run once, as it takes seconds."""
    return in_processes(two_workers.everything, 2, 240.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that the test saves, for a look at their artists."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda fig, *args, **kwargs: (saved.append(fig), save(fig, *args, **kwargs)))
    return saved


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def workers(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def steps(workers: int, name: str, request: pytest.FixtureRequest) -> list[list[two_workers.Reduction]]:
    """The reductions of each worker at each step, with the defence that the test's `name` says."""
    if workers == 1:
        return [[step] for step in two_workers.alone(name)]
    group: list[dict[str, Any]] = request.getfixturevalue("group")
    return [list(step) for step in zip(*(worker["reductions"][name] for worker in group), strict=True)]
