"""The learned inverter: what it is trained on, what it learns, and what it refuses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import distance, ssim, synthetic

from raytrust.attacks.learned import Auxiliary, CountSketch, auxiliary_messages, train_inverter
from raytrust.attacks.learned.encoding import Encoder
from raytrust.attacks.learned.network import Dropout, Inverter, fit, inversion_loss, structural_similarity
from raytrust.config import (
    CaptureConfig,
    Defence,
    LearnedInverterConfig,
    ModelConfig,
    Threat,
    TrainConfig,
    digest,
    from_dict,
    parse_defence,
    to_dict,
)
from raytrust.data import Dataset, load
from raytrust.leak.observation import Capture, Observation, decoded
from raytrust.metrics.statistics import paired_difference
from raytrust.networks.build import build_model
from raytrust.persample.engine import PerSampleGradients
from raytrust.studies.evaluate import evaluate_learned
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel, Message

SMALL = LearnedInverterConfig(auxiliary=24, hidden=8, dimension=16, epochs=2, batch_size=8)


def captures(
    defence: Defence | None = None, data: Dataset | None = None, images: int = 2, **settings: Any
) -> list[Capture]:
    """Of the first test images' own training run, so that training images are free to be the attacker's."""
    data = data or synthetic(size=16)
    private = replace(data, train_images=data.test_images, train_labels=data.test_labels)
    config = TrainConfig(
        defence=defence or Defence(),
        capture=CaptureConfig(tuning=1, evaluation=images - 1),
        workers=1,
        batch_size=2,
        steps=1,
        **{"model": ModelConfig("convnet", width=4), **settings},
    )
    return [r for r in train(config, private, LocalChannel()) if isinstance(r, Capture)]


def own(data: Dataset | None = None) -> Auxiliary:
    data = data or synthetic(size=16)
    return Auxiliary(data.train_images.float() / 255, data.train_labels)


# ------------------------------------------------------------------------------------------------------ input


def test_a_sketch_is_linear() -> None:
    x, y = torch.randn(2, 3, 50, dtype=torch.float64).unbind()
    sketch = CountSketch(50, 8, seed=1)
    sketch._signs = sketch._signs.double()
    torch.testing.assert_close(sketch(2 * x - 3 * y), 2 * sketch(x) - 3 * sketch(y))


def test_a_sketch_adds_signed_entries_to_their_bins() -> None:
    sketch = CountSketch(50, 8, seed=1)
    unit = sketch(torch.eye(50))
    assert torch.equal(unit.abs().sum(1), torch.ones(50))
    assert set(unit.flatten().tolist()) == {-1.0, 0.0, 1.0}
    x = torch.randn(3, 50)
    torch.testing.assert_close(sketch(x), x @ unit)


def test_a_sketch_keeps_inner_products_in_expectation() -> None:
    """A z-test over seeds that an unbiased sketch fails once in 10,000, and its variance."""
    x, y = torch.randn(2, 60, generator=torch.Generator().manual_seed(0)).unbind()
    y = y + x / 2
    pairs = [CountSketch(60, 16, seed)(torch.stack([x, y])) for seed in range(4000)]
    products = np.array([float(a @ b) for a, b in pairs])
    error = products.std(ddof=1) / math.sqrt(len(products))
    assert abs(products.mean() - float(x @ y)) < statistics.NormalDist().inv_cdf(1 - 1e-4 / 2) * error
    square, cross = torch.outer(x**2, y**2), torch.outer(x * y, x * y)
    variance = float((square + cross).sum() - (square + cross).diagonal().sum()) / 16
    assert products.var() == pytest.approx(variance, rel=0.1)
    without_signs = np.array([_unsigned(60, 16, seed, x, y) for seed in range(200)])
    assert abs(without_signs.mean() - float(x @ y)) > 5 * error  # what the signs are for


def _unsigned(entries: int, dimension: int, seed: int, x: torch.Tensor, y: torch.Tensor) -> float:
    sketch = CountSketch(entries, dimension, seed)
    sketch._signs = torch.ones(entries)
    a, b = sketch(torch.stack([x.abs(), y.abs()]))
    return float(a @ b) - float(x.abs() @ y.abs()) + float(x @ y)


@pytest.mark.usefixtures("global_rng_untouched")
def test_a_sketch_is_a_function_of_its_seed() -> None:
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(CountSketch(40, 8, 3)(x), CountSketch(40, 8, 3)(x))
    assert not torch.equal(CountSketch(40, 8, 3)(x), CountSketch(40, 8, 4)(x))


@pytest.mark.parametrize(("kind", "length"), [("hashed", 8), ("whole", 40)])
def test_an_encoded_message_is_a_direction_and_a_length(kind: Literal["hashed", "whole"], length: int) -> None:
    encoder = Encoder([30, 10], replace(SMALL, input=kind, dimension=8))
    x = torch.randn(3, 40)
    code, larger = encoder(x), encoder(100 * x)
    assert code.shape == (3, length + 1)
    torch.testing.assert_close(larger[:, :-1], code[:, :-1])
    torch.testing.assert_close(larger[:, -1] - code[:, -1], torch.full((3,), math.log(100)))
    if kind == "whole":
        torch.testing.assert_close(code[:, :-1] * code[:, -1:].exp(), x)
    assert encoder(torch.zeros(1, 40)).isfinite().all()


def test_a_message_may_be_scaled_tensor_by_tensor() -> None:
    """Then no tensor drowns in another, and of signs nothing changes but the lengths."""
    whole, each = (
        Encoder([30, 10], replace(SMALL, input="whole", scale=scale))  # type: ignore[arg-type]
        for scale in ("message", "tensor")
    )
    x = torch.randn(3, 40)
    x[:, 30:] *= 1e-4
    code = each(x)
    assert code.shape == (3, 42)
    torch.testing.assert_close(code[:, :30].norm(dim=1), torch.full((3,), math.sqrt(3 / 4)))
    torch.testing.assert_close(code[:, 30:40].norm(dim=1), torch.full((3,), math.sqrt(1 / 4)))
    torch.testing.assert_close(code[:, 40:], torch.stack([x[:, :30].norm(dim=1), x[:, 30:].norm(dim=1)], 1).log())
    torch.testing.assert_close(each(x.sign())[:, :40], whole(x.sign())[:, :40])
    x[:, 30:] = 0  # a tensor of which nothing was sent
    assert each(x).isfinite().all()
    assert not each(x)[:, 30:40].any()


# --------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["lenet", "resnet20", "resnet18", "convnet"])
def test_image_gradients_are_those_of_a_plain_loop(
    name: Literal["lenet", "resnet20", "resnet18", "convnet"], training: bool
) -> None:
    model = build_model(ModelConfig(name, width=3), 3, 4, seed=0).train(training)
    x, labels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1])
    before = {k: b.clone() for k, b in model.named_buffers()}
    gradients = PerSampleGradients(model)
    found = gradients.dense(x[:, None], labels[:, None])
    assert gradients.fast
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers())
    twin = build_model(ModelConfig(name, width=3), 3, 4, seed=0).train(training)
    for i in range(3):
        loss = F.cross_entropy(twin(x[i : i + 1]), labels[i : i + 1])
        assert distance([g[i] for g in found], torch.autograd.grad(loss, list(twin.parameters()))) < 1e-4


@pytest.mark.parametrize("text", ["none", "fp16", "signsgd", "topk:0.05", "randk:0.1", "powersgd:2", "topk:0.05:ef"])
def test_the_attacker_s_messages_are_the_worker_s(text: str) -> None:
    """Of the private image the attacker's own simulation gives what was really sent."""
    for capture in captures(parse_defence(text)):
        (found,) = auxiliary_messages(capture.seen, capture.truth.images, capture.truth.labels, seed=5)
        sent = torch.cat([g.flatten() for g in decoded(capture.seen).gradient])
        if text == "signsgd":  # a sign may turn where a gradient is zero but for rounding
            assert (found[0] != sent).float().mean() < 1e-3
        else:
            assert distance([found[0]], [sent]) < 1e-4


def test_the_attacker_clips_and_adds_noise_as_dp_sgd_does() -> None:
    (capture, *_) = captures(parse_defence("dp-sgd:1e-9:clip=0.05"))
    (found,) = auxiliary_messages(capture.seen, capture.truth.images, capture.truth.labels, seed=5)
    torch.testing.assert_close(found[0], torch.cat([g.flatten() for g in decoded(capture.seen).gradient]))
    (capture, *_) = captures(parse_defence("dp-sgd:1:clip=0.05"))
    (found,) = auxiliary_messages(capture.seen, capture.truth.images, capture.truth.labels, seed=5)
    sent = torch.cat([g.flatten() for g in decoded(capture.seen).gradient])
    assert float((found[0] - sent).std()) == pytest.approx(0.05 * math.sqrt(2), rel=0.1)


def test_private_dice_are_the_attacker_s_own() -> None:
    capture = captures(parse_defence("qsgd:2"))[0]
    twice = capture.truth.images.repeat(2, 1, 1, 1), capture.truth.labels.repeat(2)
    (found,) = auxiliary_messages(capture.seen, *twice, seed=5)
    sent = torch.cat([g.flatten() for g in decoded(capture.seen).gradient])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], sent)
    assert torch.equal(next(auxiliary_messages(capture.seen, *twice, seed=5)), found)


# ---------------------------------------------------------------------------------------------------- network


def test_structural_similarity_is_the_metric() -> None:
    a, b = torch.rand(2, 4, 3, 12, 10, generator=torch.Generator().manual_seed(0)).unbind()
    b = a.lerp(b, torch.tensor([0.0, 0.1, 0.5, 1.0]).view(-1, 1, 1, 1))
    expected = [ssim(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True)]
    assert structural_similarity(a, b).tolist() == pytest.approx(expected, abs=1e-5)
    squared = float((a - b).square().mean())
    assert float(inversion_loss(a, b, 0.0)) == pytest.approx(squared)
    assert float(inversion_loss(a, b, 0.25)) == pytest.approx(0.75 * squared + 0.25 * (1 - np.mean(expected)), abs=1e-5)


def test_an_inverter_starts_at_the_mean_image() -> None:
    images = 0.1 + 0.8 * torch.rand(20, 1, 8, 8)
    inputs = torch.randn(20, 5)
    inputs[:, 2] = 3.0  # what never varied in training
    network = Inverter(inputs, images.mean(0), SMALL)
    torch.testing.assert_close(network(inputs[:1])[0], images.mean(0))
    torch.nn.init.normal_(network.last.weight)
    other = inputs[:1].clone()
    other[:, 2] = -1e6
    assert torch.equal(network(other), network(inputs[:1]))


def test_dropout_keeps_the_mean() -> None:
    out = Dropout(0.25, torch.Generator().manual_seed(0))(torch.ones(100, 100))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(out.mean()) == pytest.approx(1, abs=0.03)


def test_training_stops_when_held_out_images_gain_no_more() -> None:
    """Inputs without a word about the images: what is learned from them is worth nothing on others."""
    generator = torch.Generator().manual_seed(0)
    inputs, images = torch.randn(40, 30, generator=generator), torch.rand(40, 1, 8, 8, generator=generator)
    config = LearnedInverterConfig(40, hidden=64, epochs=200, patience=3, learning_rate=1e-2, held_out=0.5)
    found = fit(inputs, images, config)
    best = found.losses.index(min(found.losses))
    assert len(found.losses) == best + 1 + 3
    kept = float((found.network(inputs[20:]) - images[20:]).square().mean())
    assert kept == pytest.approx(min(found.losses), rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    inputs = torch.full((8, 3), math.nan)
    with pytest.raises(FloatingPointError, match="The inverter's loss became nan"):
        fit(inputs, torch.rand(8, 1, 8, 8), replace(SMALL, auxiliary=8))


# ------------------------------------------------------------------------------------------------------- attack


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", image_size=8)


@pytest.mark.parametrize("text", ["none", "signsgd", "topk:0.1"])
def test_it_beats_the_mean_image(text: str, digits: Dataset) -> None:
    private = captures(parse_defence(text), digits, images=40, model=ModelConfig("lenet", width=4))
    config = LearnedInverterConfig(1400, dimension=256, hidden=128, epochs=25, learning_rate=2e-3)
    references = digits.test_images[-99:].float() / 255
    result = evaluate_learned(private, config, own(digits), references=references)
    assert result.mean_image_ssim is not None
    assert result.identified_mse is not None
    gain = paired_difference(result.ssim, result.mean_image_ssim)
    assert gain.interval[0] > 0.1
    assert min(result.losses) < 0.8 * result.losses[0]
    assert np.mean(result.identified_mse) > 0.1  # guessing reaches 0.01
    assert result.attack == config
    assert result.objective == pytest.approx([min(result.losses)] * 40)
    assert result.oracle_ssim == result.ssim


def test_what_a_message_says_is_what_counts(digits: Dataset) -> None:
    """Messages of other images than the private ones lead to these other images."""
    private = captures(Defence(), digits, images=20, model=ModelConfig("lenet", width=4))
    config = LearnedInverterConfig(1400, dimension=256, hidden=128, epochs=10, learning_rate=2e-3)
    inverter = train_inverter(private[0].seen, own(digits), config)
    found = inverter.reconstruct([c.seen for c in private])
    error = torch.stack([(found - c.truth.images).square().mean((1, 2, 3)) for c in private], 1)
    assert (error.argmin(1) == torch.arange(20)).float().mean() > 0.5  # guessing reaches 0.05


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_attack_is_a_function_of_its_arguments(dropout: float) -> None:
    private, config = captures(parse_defence("signsgd")), replace(SMALL, dropout=dropout)
    first, again, other = (
        evaluate_learned(private, c, own()).reconstructions for c in (config, config, replace(config, seed=1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_are_used_only_where_they_are_granted() -> None:
    for labels in ("known", "unknown"):
        (seen, *_) = [c.seen for c in captures(threat=Threat(labels=labels))]  # type: ignore[arg-type]
        inverter = train_inverter(seen, own(), SMALL)
        assert inverter._network.hidden[0].in_features == 16 + 1 + (4 if labels == "known" else 0)
        assert inverter.reconstruct([seen]).shape == (1, 3, 16, 16)


def test_the_observed_message_does_not_enter_the_training() -> None:
    first, second = (c.seen for c in captures())
    a, b = (train_inverter(seen, own(), SMALL).reconstruct([first]) for seen in (first, second))
    assert torch.equal(a, b)


def test_private_images_among_the_auxiliary_ones_are_refused() -> None:
    private, images = captures(), own().images.clone()
    images[17] = private[1].truth.images[0]
    index = private[1].index
    with pytest.raises(ValueError, match=f"^Expected auxiliary images without .* got that of capture {index} at 17.$"):
        evaluate_learned(private, SMALL, Auxiliary(images, own().labels))


def test_what_can_t_be_attacked_is_refused() -> None:
    batch = captures(threat=Threat(batch_size=2))
    with pytest.raises(ValueError, match=r"^Expected batch_size=2 to be 1 for a learned inverter\.$"):
        evaluate_learned(batch, SMALL, own())
    seen = captures()[0].seen
    hidden = replace(seen, threat=Threat(vantage="peer"), world_size=2)
    with pytest.raises(ValueError, match=r"^Expected vantage='peer' to be 'link' for a learned inverter: of "):
        train_inverter(hidden, own(), SMALL)
    inverter = train_inverter(seen, own(), SMALL)
    for other in _others(seen):
        with pytest.raises(ValueError, match=r"^Expected observations of the model, step and compressor that"):
            inverter.reconstruct([seen, other])
    broken = Message("all_mean", (torch.full_like(seen.messages[0].sent[0], math.nan),), seen.messages[0].received)
    with pytest.raises(ValueError, match=r"^Expected finite messages, got NaN or infinity in them\.$"):
        inverter.reconstruct([replace(seen, messages=(broken,))])


def _others(seen: Observation) -> Sequence[Observation]:
    name, weight = next(iter(seen.weights.items()))
    return (
        replace(seen, weights=seen.weights | {name: weight + 1}),
        replace(seen, defence=parse_defence("topk:0.5")),
        replace(seen, compressor_state={"step": torch.tensor(1)}),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(23, 3, 16, 16)}, "Expected auxiliary=24 to be at most the number of images, 23."),
        ({"images": torch.rand(24, 3, 8, 8)}, r"Expected auxiliary images of shape \(3, 16, 16\) in \[0, 1\], got "),
        ({"images": torch.full((24, 3, 16, 16), 255.0)}, "Expected auxiliary images of shape"),
        ({"labels": torch.zeros(23, dtype=torch.int64)}, r"Expected 24 auxiliary labels in \[0, 4\), got \(23,\)."),
        ({"labels": torch.full((24,), 4)}, r"Expected 24 auxiliary labels in \[0, 4\), got"),
    ],
)
def test_auxiliary_images_that_don_t_fit_are_refused(change: dict[str, Any], message: str) -> None:
    some = Auxiliary(own().images[:24], own().labels[:24])
    with pytest.raises(ValueError, match=f"^{message}"):
        train_inverter(captures()[0].seen, replace(some, **change), SMALL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auxiliary": 1}, "Expected auxiliary=1 to leave at least one image to train on and one to stop by."),
        ({"auxiliary": 4}, "Expected auxiliary=4 to leave at least one image to train on and one to stop by."),
        ({"input": "projected"}, "Expected input='projected' to be one of 'hashed', 'whole'."),
        ({"scale": "layer"}, "Expected scale='layer' to be one of 'message', 'tensor'."),
        ({"dimension": 0}, "Expected dimension=0 to be at least 1."),
        ({"hidden": 0}, "Expected hidden=0 to be at least 1."),
        ({"layers": 0}, "Expected layers=0 to be at least 1."),
        ({"epochs": 0}, "Expected epochs=0 to be at least 1."),
        ({"patience": 0}, "Expected patience=0 to be at least 1."),
        ({"batch_size": 0}, "Expected batch_size=0 to be at least 1."),
        ({"dropout": 1.0}, "Expected dropout=1.0 in [0, 1)."),
        ({"held_out": 0.0}, "Expected held_out=0.0 in (0, 1), a share of the auxiliary images."),
        ({"learning_rate": 0.0}, "Expected learning_rate=0.0 to be positive and finite."),
        ({"ssim": 1.5}, "Expected ssim=1.5 in [0, 1]."),
        ({"seed": -1}, "Expected seed=-1 in [0, 2**31)."),
        ({"width": 8}, "Expected the keys of LearnedInverterConfig to be among auxiliary, "),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        from_dict(LearnedInverterConfig, values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_settings_are_values() -> None:
    assert from_dict(LearnedInverterConfig, to_dict(SMALL)) == SMALL
    assert digest(SMALL) != digest(replace(SMALL, ssim=0.1))
    assert replace(SMALL, scale="tensor").name == "learned n=24 hashed=16 h=8x2 scale=tensor"
    assert SMALL.name == "learned n=24 hashed=16 h=8x2"
    assert replace(SMALL, input="whole", dropout=0.5).name == "learned n=24 whole h=8x2 dropout=0.5"
