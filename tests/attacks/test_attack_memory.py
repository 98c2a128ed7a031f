"""How many candidates are taken at once: by activations as well as gradients, and by halves where that was too many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_inversion import seen

from raytrust.attacks.inversion import engine, invert
from raytrust.attacks.inversion.search import Found, Piece, search
from raytrust.config import InversionConfig, ModelConfig, Threat
from raytrust.persample import memory
from raytrust.persample.memory import candidate_bytes, free_bytes

ATTACK = InversionConfig("naive", iterations=3, restarts=4)


def test_activations_count_and_not_gradients_alone() -> None:
    """Of a narrow network, whose gradients say nothing of how large its images are."""
    small = replace(seen(model="resnet18")[0], image_shape=(3, 32, 32))
    large = replace(small, image_shape=(3, 224, 224))
    assert candidate_bytes(large) > 40 * candidate_bytes(small)
    batch = replace(small, threat=Threat(batch_size=8))
    assert candidate_bytes(batch) > 7 * candidate_bytes(small)


def test_gradients_count() -> None:
    observation = seen()[0]
    entries = sum(w.numel() for w in observation.weights.values())
    assert candidate_bytes(observation) >= 8 * entries


def test_no_activation_is_computed_to_count_them() -> None:
    """ResNet-18 on an image of 2^28 pixels would take a hundred GiB."""
    observation = replace(seen(model="resnet18")[0], image_shape=(3, 2**14, 2**14))
    assert observation.model == ModelConfig("resnet18", width=2)
    assert candidate_bytes(observation) > 2**36


def test_the_batch_is_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    observations = seen()[:2]
    sizes: list[int] = []

    def counted(batch: list[Piece], device: str) -> list[Found]:
        sizes.append(sum(len(piece.restarts) for piece in batch))
        return search(batch, device)

    monkeypatch.setattr(engine, "search", counted)
    jobs = [(o, ATTACK) for o in observations]
    whole = invert(jobs)
    assert sizes == [8]
    sizes.clear()
    monkeypatch.setattr(engine, "free_bytes", lambda device: 3 * candidate_bytes(observations[0]))
    cut = invert(jobs)
    assert max(sizes) <= 3
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a.images, b.images, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_what_does_not_fit_in_spite_of_that_is_halved(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def limited(batch: list[Piece], device: str) -> list[Found]:
        sizes.append(sum(len(piece.restarts) for piece in batch))
        if sizes[-1] > 2:
            raise error
        return search(batch, device)

    jobs = [(o, ATTACK) for o in seen()[:2]]
    whole = invert(jobs)
    monkeypatch.setattr(engine, "search", limited)
    halved = invert(jobs)
    assert sizes[0] == 8
    assert sizes.count(2) == 4
    for a, b in zip(whole, halved, strict=True):
        assert a.images.shape == b.images.shape
        torch.testing.assert_close(a.images, b.images, atol=1e-3, rtol=0)


def test_what_can_t_be_halved_or_is_no_lack_of_memory_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(batch: list[Piece], device: str) -> list[Found]:
        raise problem

    monkeypatch.setattr(engine, "search", failing)
    for problem in (torch.OutOfMemoryError("out"), RuntimeError("shapes don't fit")):
        with pytest.raises(RuntimeError, match=str(problem)):
            invert([(seen()[0], ATTACK)])


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(memory, "_available", lambda: 2**34)
    monkeypatch.setattr(memory, "_of_container", lambda: None)
    assert free_bytes("cpu") == int(0.8 * 2**33)
    monkeypatch.setattr(memory, "_of_container", lambda: 2**30)
    assert free_bytes("cpu") == int(0.8 * 2**29)
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert free_bytes("cuda:0") == 800
