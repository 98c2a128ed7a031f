"""What a gradient that was clipped, made noisy or pruned reveals to one who knows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import synthetic

from raytrust.attacks.inversion.objectives import target_view
from raytrust.compress import build
from raytrust.config import (
    CaptureConfig,
    ClipConfig,
    DPSGDConfig,
    InversionConfig,
    ModelConfig,
    NoiseConfig,
    TrainConfig,
    parse_defence,
)
from raytrust.config.attacks import PRIORS_THROUGH_NOISE, against_each
from raytrust.leak import SparseView, view_of
from raytrust.leak.history import holds_residual
from raytrust.leak.transformed import noise_variance
from raytrust.leak.views import LinearView, TensorwiseView
from raytrust.train.loop import capture_images
from raytrust.wire.channel import LocalChannel, Tap

SHAPES = [torch.Size(s) for s in [(12, 8), (5,), (4, 3, 3, 3)]]


def gradient() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize(
    "name",
    [
        "clip:0.5+none", "clip:1+powersgd:2", "prune:0.8", "prune:0.8:scope=global", "clip:1+topk:0.3",
        "prune:0.8+clip:1", "prune:0.8+none:ef", "prune:0.8+topk:0.5:start_step=2",
        "prune:0.8+topk:0.5", "prune:0.8+randk:0.5", "prune:0.8+clip:1+topk:0.5:scope=layer",
    ],
)  # fmt: skip
def test_the_true_gradient_is_at_distance_zero(name: str) -> None:
    tap = Tap(LocalChannel(), keep=True)
    compressor = build(parse_defence(name), SHAPES)
    state = compressor.public_state()
    compressor.reduce(gradient(), tap)
    twin = build(parse_defence(name), SHAPES)
    twin.load_public_state(state)
    # A peer sees the mean of what several workers pruned, each in its own way.
    for vantage in ("link",) if "prune" in name else ("link", "peer"):
        view = view_of(twin, tap.messages, vantage)  # type: ignore[arg-type]
        candidates = [torch.stack([g, 3 * g, -g]) for g in gradient()]
        near, scaled, opposite = view.distance(candidates).tolist()
        assert near == pytest.approx(0, abs=1e-5)
        assert scaled == pytest.approx(0, abs=1e-5)
        assert opposite > 0.5


def test_a_pruned_gradient_is_compared_where_it_stayed_and_bounded_elsewhere() -> None:
    tap = Tap(LocalChannel(), keep=True)
    compressor = build(parse_defence("prune:0.75"), SHAPES)
    compressor.reduce(gradient(), tap)
    view = view_of(compressor, tap.messages, "link")
    assert isinstance(view, SparseView)
    assert [len(o) for o in view.observed] == [24, 2, 27]
    assert view.excess([g[None] for g in gradient()]).item() == 0
    elsewhere = [g.clone() for g in gradient()]
    elsewhere[0].view(-1)[next(i for i in range(96) if i not in view.positions[0].tolist())] = 100.0
    assert view.excess([g[None] for g in elsewhere]).item() > 1
    assert view.distance([g[None] for g in elsewhere]).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["prune:0.75+clip:1", "prune:0.75+topk:0.9", "prune:0.75:scope=global+fp16"])
def test_what_was_pruned_is_bounded_and_not_taken_for_zero(name: str) -> None:
    tap = Tap(LocalChannel(), keep=True)
    compressor = build(parse_defence(name), SHAPES)
    compressor.reduce(gradient(), tap)
    view = view_of(compressor, tap.messages, "link")
    assert isinstance(view, SparseView)
    assert 0 < sum(len(o) for o in view.observed) <= 53
    assert view.distance([g[None] for g in gradient()]).item() == pytest.approx(0, abs=1e-5)
    assert view.excess([g[None] for g in gradient()]).item() == pytest.approx(0, abs=1e-6)
    grown = [100 * g.flatten() for g in gradient()]
    for g, kept in zip(grown, view.positions, strict=True):
        g[kept] /= 100
    assert view.excess([g.view(1, *s) for g, s in zip(grown, SHAPES, strict=True)]).item() > 1


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_stayed_stands_out_of_little_noise_and_not_of_much(scope: str) -> None:
    for noise, few in ((1e-6, True), (10.0, False)):
        tap = Tap(LocalChannel(), keep=True)
        compressor = build(parse_defence(f"prune:0.75:scope={scope}+noise:{noise}"), SHAPES, private_seed=0)
        compressor.reduce(gradient(), tap)
        view = view_of(compressor, tap.messages, "link")
        assert isinstance(view, SparseView)
        assert (sum(len(o) for o in view.observed) < 60) is few
        if few:
            assert view.distance([g[None] for g in gradient()]).item() == pytest.approx(0, abs=1e-4)


def test_a_pruned_gradient_of_zero_has_a_view() -> None:
    for name in ("prune:0.5", "prune:0.5:scope=global"):
        tap, compressor = Tap(LocalChannel(), keep=True), build(parse_defence(name), SHAPES)
        compressor.reduce([torch.zeros(s) for s in SHAPES], tap)
        view = view_of(compressor, tap.messages, "link")
        assert view.distance([g[None] for g in gradient()]).item() == 1


def test_a_tensor_of_noise_counts_for_little() -> None:
    data = synthetic(vivid=True)
    config = TrainConfig(
        parse_defence("noise:0.01"), ModelConfig("convnet", width=4), workers=1, capture=CaptureConfig((0,), 1, 1)
    )
    (taken,) = capture_images(config, data, data.test_images[:1], data.test_labels[:1])
    view = target_view(taken.seen, InversionConfig("aware"))
    assert isinstance(view, LinearView)
    assert view.noise == pytest.approx(1e-4)
    sizes = torch.tensor([float(o.numel()) for o in view.observed])
    signal = torch.tensor([max(0.0, 1 - len(o.flatten()) * 1e-4 / float(o.square().sum())) for o in view.observed])
    expected = sizes * signal / (sizes * signal).sum()
    torch.testing.assert_close(torch.tensor(TensorwiseView(view).weights), expected)
    # One who ignores the noise weighs by size alone.
    naive = target_view(taken.seen, InversionConfig("naive"))
    assert isinstance(naive, LinearView)
    torch.testing.assert_close(torch.tensor(TensorwiseView(naive).weights), sizes / sizes.sum())


def test_noise_that_is_clipped_is_as_large_as_what_is_seen_of_it() -> None:
    """Else all tensors but one would seem to be noise, and count for nothing."""
    generator = torch.Generator().manual_seed(0)
    seen = [0.1 * torch.randn(4000, generator=generator), torch.full((5000,), 3.0), torch.zeros(3)]
    noise, clip = NoiseConfig(0.5), ClipConfig(2.0)
    assert noise_variance([clip, noise], 1, seen) == 0.25
    assert noise_variance([noise, clip], 1, seen) == pytest.approx(0.01, rel=0.1)
    assert noise_variance([DPSGDConfig(0.5, 2.0), clip], 4, seen) == pytest.approx(0.01, rel=0.1)
    assert noise_variance([NoiseConfig(0.05), clip], 1, seen) == 0.05**2
    assert noise_variance([clip], 1, seen) == 0
    assert noise_variance([noise], 1, seen, workers=2) == 0.125


def test_dp_sgd_s_noise_is_known_for_the_private_batch() -> None:
    data = synthetic(vivid=True)
    config = TrainConfig(parse_defence("dp-sgd:0.5:clip=0.2"), ModelConfig("convnet", width=4), workers=1)
    (taken,) = capture_images(config, data, data.test_images[:1], data.test_labels[:1])
    view = target_view(taken.seen, InversionConfig("aware"))
    assert isinstance(view, LinearView)
    assert view.noise == pytest.approx(0.01)


def test_attacks_through_noise_weigh_the_prior_more() -> None:
    attacks = [InversionConfig(o, tv=0.01) for o in ("naive", "aware")]  # type: ignore[arg-type]
    assert against_each(attacks, parse_defence("none")) == [attacks[0]]
    assert against_each(attacks, parse_defence("clip:1+none")) == [attacks[0]]
    heavier = [0.01 * by for by in PRIORS_THROUGH_NOISE]
    # What is compared with it meets the same.
    control = against_each(attacks, parse_defence("none"), [parse_defence("noise:1")])
    assert [(a.objective, a.tv) for a in control] == [("naive", pytest.approx(tv)) for tv in (0.01, *heavier)]
    # So that knowing the compressor is all that the two objectives differ by.
    compressed = against_each(attacks, parse_defence("powersgd:4"), [parse_defence("noise:1")])
    weights = {o: [a.tv for a in compressed if a.objective == o] for o in ("naive", "aware")}
    assert weights["naive"] == weights["aware"] == pytest.approx([0.01, *heavier])
    through = against_each(attacks, parse_defence("clip:1+noise:0.1+powersgd:4"))
    assert through[:2] == attacks
    assert [a.tv for a in through[2:]] == pytest.approx(heavier)


def test_a_residual_is_seen_through_transforms() -> None:
    assert holds_residual(build(parse_defence("clip:1+topk:0.1:ef"), SHAPES))
    assert not holds_residual(build(parse_defence("clip:1+topk:0.1"), SHAPES))
