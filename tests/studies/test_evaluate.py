from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import ssim, synthetic

from raytrust.attacks.inversion import Candidates
from raytrust.config import CaptureConfig, InversionConfig, ModelConfig, Threat, TrainConfig
from raytrust.leak import EarlierStep
from raytrust.leak.observation import Capture, Observation
from raytrust.metrics.images import mse, psnr
from raytrust.networks.build import build_model
from raytrust.studies import comparison
from raytrust.studies import evaluate as module
from raytrust.studies.comparison import features_of, match, perceptual_distance, shift_tolerant_distance
from raytrust.studies.evaluate import (
    InversionFailure,
    InversionResult,
    evaluate_inversion,
    evaluate_inversions,
)
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel

ATTACK = InversionConfig("naive", iterations=3, restarts=2)


def captures(batch_size: int, labels: Literal["known", "unknown"] = "known") -> list[Capture]:
    config = TrainConfig(
        model=ModelConfig("convnet", width=4),
        threat=Threat(batch_size=batch_size, labels=labels),
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
    assert result.ssim == result.oracle_ssim == pytest.approx([1.0] * 3 * batch_size)
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
    images, values = match(torch.stack([blend, truth[0]]), truth)
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
    assert result.oracle_ssim == pytest.approx([1.0] * 3)
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
    assert result.oracle_ssim == pytest.approx(result.ssim)
    claim(monkeypatch, [*found[:2], restarts(broken[2], broken[2], objective=[float("inf")] * 2)])
    with pytest.raises(FloatingPointError, match=r"^All 2 restarts of the attack diverged\.$"):
        evaluate_inversion(private, ATTACK)


def test_the_oracle_is_an_upper_bound() -> None:
    for batch_size in (1, 3):
        private = captures(batch_size)
        result = evaluate_inversion(private, replace(ATTACK, restarts=4, iterations=10))
        assert (np.array(result.oracle_ssim) >= result.ssim).all()
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
        assert isinstance(result, InversionResult)
        alone = evaluate_inversion(private, attack)
        assert result.ssim == pytest.approx(alone.ssim, abs=0.02)  # up to rounding, which the sign magnifies
        assert result.oracle_ssim == pytest.approx(alone.oracle_ssim, abs=0.02)
        assert result.objective == pytest.approx(alone.objective, abs=1e-3)
        assert torch.equal(result.originals, alone.originals)
    shares = [r.seconds / together[0].seconds for r in together if isinstance(r, InversionResult)]
    assert shares == pytest.approx([1, 3, 2])  # by restarts and iterations


def test_the_oracle_is_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two restarts has one image of the batch right: no restart has both, and the oracle has."""
    private = captures(2)
    found = []
    for capture in private:
        a, b = capture.truth.images
        spoilt = noise(a)
        found.append(restarts(torch.stack([a, spoilt]), torch.stack([spoilt, b]), objective=[0.1, 0.2]))
    claim(monkeypatch, found)
    result = evaluate_inversion(private, ATTACK)
    assert result.oracle_ssim == pytest.approx([1.0] * 6)
    assert result.ssim[::2] == pytest.approx([1.0] * 3)
    assert max(result.ssim[1::2]) < 0.4


def test_labels_are_compared_as_multisets(monkeypatch: pytest.MonkeyPatch) -> None:
    private = captures(4, "unknown")
    true = [c.truth.labels for c in private]
    wrong = true[2].clone()
    wrong[:2] = 3 - wrong[:2]  # two of the four classes 0, 1, 2, 3 twice, or as they were
    claimed = [true[0], true[1].flip(0), wrong]
    found = [
        Candidates(c.truth.images[None], torch.tensor([0.0]), x[None]) for c, x in zip(private, claimed, strict=True)
    ]
    claim(monkeypatch, found)
    result = evaluate_inversion(private, ATTACK)
    assert result.label_accuracy is not None
    assert result.label_accuracy[:2] == [1.0, 1.0]
    left = true[2].tolist()
    hits = sum(x in left and left.remove(x) is None for x in wrong.tolist())
    assert result.label_accuracy[2] == hits / 4
    claim(monkeypatch, [replace(f, labels=None) for f in found])  # an attack that needs none
    assert evaluate_inversion(private, ATTACK).label_accuracy is None


def test_labels_that_were_granted_are_no_achievement() -> None:
    assert evaluate_inversion(captures(2), ATTACK).label_accuracy is None
    accuracy = evaluate_inversion(captures(2, "unknown"), ATTACK).label_accuracy
    assert accuracy is not None
    assert len(accuracy) == 3
    assert np.mean(accuracy) > 0.8


REFERENCES = synthetic(size=16, vivid=True).test_images.float() / 255


def test_floors_are_what_no_attack_is_needed_for() -> None:
    private = captures(2)
    result = evaluate_inversion(private, ATTACK, references=REFERENCES)
    mean = REFERENCES.mean(0).numpy()
    assert result.mean_image_ssim == pytest.approx([ssim(mean, x.numpy()) for x in result.originals], abs=1e-6)
    # Of a batch of two, two other images at a time, each pair dealt out as suits them best, as reconstructions are.
    expected = []
    for first, second in zip(result.originals[::2], result.originals[1::2], strict=True):
        pairs = []
        for r, s in zip(REFERENCES[::2], REFERENCES[1::2], strict=False):
            straight = [ssim(r.numpy(), first.numpy()), ssim(s.numpy(), second.numpy())]
            crossed = [ssim(s.numpy(), first.numpy()), ssim(r.numpy(), second.numpy())]
            pairs.append(max(straight, crossed, key=sum))
        expected += np.mean(pairs, axis=0).tolist()
    assert result.other_image_ssim == pytest.approx(expected, abs=1e-6)
    assert result.candidates == len(REFERENCES) + 1
    without = evaluate_inversion(private, ATTACK)
    assert without.mean_image_ssim is without.other_image_ssim is without.identified_mse is None
    assert without.identified_ssim is None
    assert without.candidates == 1
    assert result.ssim == without.ssim


def test_identification_is_by_the_nearest_of_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    private = captures(1)
    truth = [c.truth.images for c in private]
    near = [t.lerp(noise(t), 0.2) for t in truth]
    claim(monkeypatch, [restarts(x, objective=[0.0]) for x in (near[0], REFERENCES[3:4], near[2])])
    result = evaluate_inversion(private, ATTACK, references=REFERENCES)
    assert result.identified_mse == result.identified_ssim == result.identified_features == [True, False, True]
    twin = torch.cat([REFERENCES, truth[0]])  # the very image is among the others: a tie
    assert evaluate_inversion(private, ATTACK, references=twin).identified_mse == [False, False, True]
    many = REFERENCES.repeat(5, 1, 1, 1)
    assert evaluate_inversion(private, ATTACK, references=many).candidates == 100


def test_another_image_is_not_identified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reference in turn is claimed to be the image: none of them is nearer to the truth than to itself."""
    private = captures(1)[:1]
    hits = 0
    for image in REFERENCES:
        claim(monkeypatch, [restarts(image[None], objective=[0.0])])
        result = evaluate_inversion(private, ATTACK, references=REFERENCES)
        hits += sum([*(result.identified_mse or []), *(result.identified_ssim or [])])
    assert hits == 0


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_features_are_those_of_the_attacked_network(
    mode: Literal["eval", "train"], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are identified; what the network can't tell from another image is not, however near its pixels are."""
    private = [replace(c, seen=with_batch_norm(c.seen, mode)) for c in captures(batch_size)]
    claim(monkeypatch, [restarts(c.truth.images, objective=[0.0]) for c in private])
    result = evaluate_inversion(private, ATTACK, references=REFERENCES)
    assert result.identified_features == [True] * 3 * batch_size
    # By the book, of one image after another.
    network = private[0].seen.build_model().eval()
    found: list[Tensor] = []
    network.fc.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0]))
    scale = [s.view(-1, 1, 1) for s in (private[0].seen.mean, private[0].seen.std)]
    for image in REFERENCES:
        network(((image - scale[0]) / scale[1])[None])
    features = features_of(private[0].seen)
    assert features is not None
    assert features(REFERENCES.numpy()) == pytest.approx(torch.stack(found).detach().numpy(), rel=1e-4, abs=1e-6)


def with_batch_norm(seen: Observation, mode: Literal["eval", "train"]) -> Observation:
    model = ModelConfig("resnet18", width=2)
    network = build_model(model, seen.image_shape[0], seen.classes, seed=0)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    threat = replace(seen.threat, batch_norm=mode)
    return replace(seen, model=model, weights=weights, buffers=dict(network.named_buffers()), threat=threat)


def test_without_a_linear_layer_at_its_end_a_network_has_no_features() -> None:
    seen = captures(1)[0].seen
    assert features_of(seen) is not None
    convolutional = nn.Sequential(nn.Conv2d(3, seen.classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert features_of(replace(seen, network=convolutional, weights={}, buffers={})) is None
    # Of a loss that is not of classes, nothing says which layer is the last.
    assert features_of(replace(seen, classes=0)) is None


def test_registered_psnr_is_of_the_pick_and_no_less_than_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    private = captures(1)
    moved = [restarts(c.truth.images.roll((1, -1), (2, 3)), objective=[0.0]) for c in private]
    claim(monkeypatch, moved)
    result = evaluate_inversion(private, ATTACK)
    assert result.registered_psnr is not None
    assert min(result.registered_psnr) > 40
    assert max(result.psnr) < 30
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    claim(monkeypatch, moved)
    assert evaluate_inversion(private, ATTACK).registered_psnr is None


def test_a_result_says_what_history_the_attack_had() -> None:
    private = captures(1)
    assert evaluate_inversion(private, ATTACK).history == 0
    past = EarlierStep(private[0].seen.messages, {})
    longer = [replace(c, seen=replace(c.seen, history=(past,) * n)) for c, n in zip(private, (2, 3, 2), strict=True)]
    assert evaluate_inversion(longer, ATTACK).history == 2


def test_mse_is_of_the_pick() -> None:
    result = evaluate_inversion(captures(2), ATTACK)
    pairs = zip(result.reconstructions.numpy(), result.originals.numpy(), strict=True)
    assert result.mse == pytest.approx([mse(a, b) for a, b in pairs])


def test_an_attack_that_fails_does_so_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    private = captures(2)
    impossible = replace(ATTACK, method="analytic")
    first, failure, third = evaluate_inversions(private, [ATTACK, impossible, replace(ATTACK, seed=3)])
    assert isinstance(failure, InversionFailure)
    assert failure.attack == impossible
    assert str(failure.error).startswith("Expected batch_size=2 to be 1")
    for result, attack in ((first, ATTACK), (third, replace(ATTACK, seed=3))):
        assert isinstance(result, InversionResult)
        assert result.ssim == pytest.approx(evaluate_inversion(private, attack).ssim, abs=0.02)
    with pytest.raises(ValueError, match="Expected batch_size=2 to be 1"):
        evaluate_inversion(private, impossible)
    lost = restarts(private[0].truth.images, objective=[float("inf")])
    fine = [restarts(c.truth.images, objective=[0.0]) for c in private]
    claim(monkeypatch, [*fine, fine[0], lost, fine[2]])
    one, other = evaluate_inversions(private, [ATTACK, replace(ATTACK, seed=3)])
    assert isinstance(one, InversionResult)
    assert isinstance(other, InversionFailure)
    assert isinstance(other.error, FloatingPointError)


def test_an_attack_that_solves_some_batches_is_reported_with_mean_images_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    private, solving = captures(2), replace(ATTACK, method="analytic")
    lost = [restarts(noise(c.truth.images), objective=[float("inf")]) for c in private]
    fine = [restarts(c.truth.images, objective=[0.0]) for c in private]
    claim(monkeypatch, [fine[0], lost[1], fine[2]])
    (some,) = evaluate_inversions(private, [solving])
    assert isinstance(some, InversionResult)
    assert some.objective == [0, 1, 0]
    assert some.ssim[:2] == [1, 1]
    assert max(some.ssim[2:4]) < 0.5
    assert some.diverged == 1
    claim(monkeypatch, lost)
    (none,) = evaluate_inversions(private, [solving])
    assert isinstance(none, InversionFailure)
    assert str(none.error) == "Expected messages that the attack can solve for the images, got none."


def test_st_lpips_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which draws random weights, and takes images of 24 pixels a side."""
    package = ModuleType("stlpips_pytorch.stlpips")
    asked: list[dict[str, Any]] = []

    class Network(nn.Module):
        def forward(self, a: Tensor, b: Tensor, normalize: bool) -> Tensor:
            assert normalize
            assert a.shape[1:] == (3, 24, 24)
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    def build(**options: Any) -> Network:
        asked.append(options)
        torch.rand(1)
        return Network()

    package.LPIPS = build  # type: ignore[attr-defined]
    monkeypatch.setattr(comparison, "import_module", lambda name: package)
    missing = {"torchsummary"}
    monkeypatch.setattr(comparison, "find_spec", lambda name: None if name in missing else package)
    assert shift_tolerant_distance((24, 24)) is None
    missing.clear()
    assert shift_tolerant_distance((23, 30)) is None
    distance = shift_tolerant_distance((24, 24))
    assert distance is not None
    assert asked == [{"verbose": False, "net": "alex", "variant": "shift_tolerant"}]
    assert distance(torch.zeros(1, 1, 24, 24), torch.ones(1, 1, 24, 24)) == [1.0]
    monkeypatch.setattr(module, "shift_tolerant_distance", lambda size: lambda a, b: [0.5] * len(a))
    assert evaluate_inversion(captures(1), ATTACK).st_lpips == [0.5] * 3


@pytest.mark.skipif(find_spec("stlpips_pytorch") is None, reason="needs the extra [lpips]")
def test_st_lpips_of_the_package_itself() -> None:
    distance = shift_tolerant_distance((32, 32))
    assert distance is not None
    images = synthetic(size=32, vivid=True).test_images[:4].float() / 255
    copy, moved, other = (distance(images, x) for x in (images, images.roll(1, 3), images.roll(1, 0)))
    assert copy == pytest.approx([0] * 4, abs=1e-5)
    assert max(moved) < 0.5 * min(other)


def test_lpips_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for the package: it is asked for AlexNet, for images in [0, 1], and only if the weights are there."""
    package = ModuleType("lpips")

    class Network:
        def eval(self) -> Network:
            return self

        def __call__(self, a: Tensor, b: Tensor, normalize: bool) -> Tensor:
            assert normalize
            assert a.shape[1] == 3
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    def build(net: str, **_: Any) -> Network:
        assert net == "alex"
        return Network()

    package.LPIPS = build  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(comparison, "import_module", lambda name: package)
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    assert perceptual_distance() is None
    monkeypatch.setattr(comparison, "find_spec", lambda name: package)
    assert perceptual_distance() is None
    assert evaluate_inversion(captures(1), ATTACK).lpips is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    distance = perceptual_distance()
    assert distance is not None
    assert distance(torch.zeros(2, 1, 8, 8), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)) == [0.0, 1.0]
    assert len(evaluate_inversion(captures(1), ATTACK).lpips or []) == 3
