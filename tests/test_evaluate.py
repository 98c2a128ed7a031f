from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import synthetic

from raytrust import evaluate as module
from raytrust.attacks.inversion import Candidates
from raytrust.capture import Capture, Observation
from raytrust.channel import LocalChannel
from raytrust.config import CaptureConfig, InversionConfig, ModelConfig, Threat, TrainConfig
from raytrust.evaluate import _match, evaluate_inversion, evaluate_inversions
from raytrust.metrics import psnr, ssim
from raytrust.train import train

ATTACK = InversionConfig("naive", iterations=3, restarts=2)


def captures(batch_size: int) -> list[Capture]:
    config = TrainConfig(
        model=ModelConfig("convnet", width=4),
        threat=Threat(batch_size=batch_size),
        capture=CaptureConfig(tuning=1, evaluation=2),
        workers=1,
        batch_size=8,
        steps=1,
    )
    return [r for r in train(config, synthetic(size=16, vivid=True), LocalChannel()) if isinstance(r, Capture)]


def claim(monkeypatch: pytest.MonkeyPatch, found: Sequence[Candidates]) -> None:
    """Let the attack return this, whatever it sees; it must be given observations and nothing else."""

    def invert(jobs: Sequence[tuple[Observation, InversionConfig]], device: str) -> list[Candidates]:
        assert all(type(seen) is Observation for seen, _ in jobs)
        return list(found)

    monkeypatch.setattr(module, "invert", invert)


def noise(like: Tensor) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(0))


def restarts(*images: Tensor, objective: list[float]) -> Candidates:
    return Candidates(torch.stack(images), torch.tensor(objective))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_perfect_copy_scores_one(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    private = captures(batch_size)
    claim(monkeypatch, [restarts(c.truth.images, objective=[0.0]) for c in private])
    result = evaluate_inversion(private, ATTACK)
    assert result.ssim == result.oracle_ssim == [1.0] * 3 * batch_size
    assert result.psnr == [float("inf")] * 3 * batch_size
    assert torch.equal(result.reconstructions, result.originals)
    assert result.attack == ATTACK
    assert result.seconds >= 0


def test_images_of_a_batch_have_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    private = captures(4)
    orders = [[2, 0, 3, 1], [1, 2, 3, 0], [0, 3, 2, 1]]
    found = [
        restarts(c.truth.images[order].lerp(noise(c.truth.images), 0.1), objective=[0.0])
        for c, order in zip(private, orders, strict=True)
    ]
    claim(monkeypatch, found)
    result = evaluate_inversion(private, ATTACK)
    expected = torch.cat([f.images[0][np.argsort(o)] for f, o in zip(found, orders, strict=True)])
    assert torch.equal(result.reconstructions, expected)
    assert torch.equal(result.originals, torch.cat([c.truth.images for c in private]))
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(expected, result.originals, strict=True)]
    assert result.ssim == pytest.approx([ssim(a, b) for a, b in pairs])
    assert result.psnr == pytest.approx([psnr(a, b) for a, b in pairs])
    assert min(result.ssim) > 0.5


def test_the_assignment_maximises_the_total() -> None:
    """Two reconstructions that both look most like the first image: each original is matched once."""
    truth = captures(2)[0].truth.images
    blend = truth[0].lerp(truth[1], 0.3)
    images, values = _match(torch.stack([blend, truth[0]]), truth)
    assert torch.equal(images, torch.stack([truth[0], blend]))
    assert values == pytest.approx([1.0, ssim(blend.numpy(), truth[1].numpy())])


def test_shuffled_reconstructions_score_near_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right images for the wrong capture, and noise: what a number is worth if nothing was learned."""
    private = captures(1)
    shuffled = [private[(i + 1) % 3].truth.images for i in range(3)]
    for images in (shuffled, [noise(c.truth.images) for c in private]):
        claim(monkeypatch, [restarts(i, objective=[0.0]) for i in images])
        result = evaluate_inversion(private, ATTACK)
        assert abs(np.mean(result.ssim)) < 0.2
        assert max(result.ssim) < 0.35


def test_the_attacker_picks_by_what_it_can_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The better image has the worse objective: the score is of the pick, the better one is the oracle's."""
    private = captures(1)
    found = [restarts(noise(c.truth.images), c.truth.images, objective=[0.1, 0.2]) for c in private]
    claim(monkeypatch, found)
    result = evaluate_inversion(private, ATTACK)
    assert result.objective == pytest.approx([0.1] * 3)
    assert max(result.ssim) < 0.35
    assert result.oracle_ssim == [1.0] * 3
    assert torch.equal(result.reconstructions, torch.cat([f.images[0] for f in found]))


def test_diverged_restarts_are_no_one_s_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    private = captures(2)
    broken = [torch.full_like(c.truth.images, torch.nan) for c in private]
    found = [
        restarts(b, noise(c.truth.images), objective=[float("inf"), 3.0]) for b, c in zip(broken, private, strict=True)
    ]
    claim(monkeypatch, found)
    result = evaluate_inversion(private, ATTACK)
    assert result.diverged == 3
    assert result.objective == [3.0] * 3
    assert np.isfinite(result.ssim).all()
    assert result.oracle_ssim == result.ssim
    claim(monkeypatch, [*found[:2], restarts(broken[2], broken[2], objective=[float("inf")] * 2)])
    with pytest.raises(FloatingPointError, match=r"^All 2 restarts of the attack diverged\.$"):
        evaluate_inversion(private, ATTACK)


def test_the_oracle_is_an_upper_bound() -> None:
    for batch_size in (1, 3):
        private = captures(batch_size)
        result = evaluate_inversion(private, replace(ATTACK, restarts=4, iterations=10))
        shape = (3, batch_size)  # the best restart of a batch, by its mean
        assert (np.reshape(result.oracle_ssim, shape).mean(1) >= np.reshape(result.ssim, shape).mean(1)).all()
        lengths = {len(x) for x in (result.ssim, result.psnr, result.oracle_ssim, result.reconstructions)}
        assert lengths == {3 * batch_size}
        assert len(result.objective) == 3
        assert 0 <= float(result.reconstructions.min()) <= float(result.reconstructions.max()) <= 1


def test_several_attacks_at_once() -> None:
    private = captures(2)
    attacks = [replace(ATTACK, restarts=1, tv=0.5), replace(ATTACK, restarts=3, seed=4), ATTACK]
    together = evaluate_inversions(private, attacks)
    assert [r.attack for r in together] == attacks
    for result, attack in zip(together, attacks, strict=True):
        alone = evaluate_inversion(private, attack)
        assert result.ssim == pytest.approx(alone.ssim, abs=0.02)  # up to rounding, which the sign magnifies
        assert result.oracle_ssim == pytest.approx(alone.oracle_ssim, abs=0.02)
        assert result.objective == pytest.approx(alone.objective, abs=1e-3)
        assert torch.equal(result.originals, alone.originals)
    assert len({r.seconds for r in together}) == 1
