"""No message and no result depends on what a buffer held before it was written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_state import fresh, step
from torch import Tensor
from toys import DEFENCES, gradients

from raytrust.compress.interface import Scratch
from raytrust.wire.channel import LocalChannel, Tap


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


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(name: str, dtype: torch.dtype, expected: list[list[Tensor]]) -> None:
    """Which is the user's to set: what is held and sent is float32 all the same."""
    torch.set_default_dtype(dtype)
    try:
        compressor = fresh(name)
        for i, before in enumerate(expected):
            found, state = step(compressor, i), compressor.state_dict()
            assert all(map(torch.equal, found, before))
            compressor = fresh(name, seed=6)
            compressor.load_state_dict(state)
        tap = Tap(LocalChannel(), keep=True)
        own = compressor.reduce(gradients(3), tap).decoded_own
        compressor.load_state_dict(state)  # public state and all, as before the messages
        torch.testing.assert_close(compressor.decode(tap.messages, "link")[0], own, rtol=0, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
