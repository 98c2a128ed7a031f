"""No message and no result depends on what a buffer held before it was written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_state import fresh, step
from torch import Tensor
from toys import DEFENCES

from raytrust.compress.interface import Scratch


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN or the largest integer, and so does every buffer that is asked for again."""
    plain = Scratch.__call__

    def call(self: Scratch, name: str, size: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return plain(self, name, size, like, dtype).fill_(torch.nan if dtype.is_floating_point else 1)

    monkeypatch.setattr(Scratch, "__call__", call)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def expected(name: str) -> list[list[Tensor]]:
    compressor = fresh(name)
    return [step(compressor, i) for i in range(3)]


@pytest.mark.parametrize("name", DEFENCES)
def test_what_is_sent_was_written(name: str, expected: list[list[Tensor]], poisoned: None) -> None:
    compressor = fresh(name)
    for i, before in enumerate(expected):
        for found, x in zip(step(compressor, i), before, strict=True):
            assert torch.equal(found, x)


def test_a_buffer_starts_as_zeros() -> None:
    """Not as what the process last held there, which might be private."""
    held = torch.full((2**16,), 3.14)
    del held
    assert not Scratch()("p", 2**16, torch.empty(0)).any()
