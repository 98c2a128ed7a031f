"""Soteria: which columns become zero, what stays as it was, and an attacker who knows it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_victim import DATA, NETWORK, captured, normal_batch
from torch import nn

from raytrust.attacks.inversion import invert
from raytrust.attacks.inversion.labels import recover_labels
from raytrust.attacks.inversion.objectives import target_view
from raytrust.compress import build, ddp_comm_hook
from raytrust.config import (
    CaptureConfig,
    InversionConfig,
    LocalConfig,
    ModelConfig,
    SoteriaConfig,
    Threat,
    TrainConfig,
    parse_defence,
)
from raytrust.leak.observation import Capture
from raytrust.leak.soteria import pruned_by_soteria
from raytrust.networks.build import build_model
from raytrust.networks.task import CROSS_ENTROPY, Task
from raytrust.studies.audit.private import Private
from raytrust.studies.audit.victim import State, Victim, compressor_of
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.gradient import gradient_of
from raytrust.train.loop import Step, capture_images, train
from raytrust.train.soteria import SoteriaGradients
from raytrust.wire.channel import LocalChannel

MODELS = [NETWORK, ModelConfig(width=4), ModelConfig("lenet", width=2)]


def first(name: str, images: int = 1, step: int = 0, labels: str = "known") -> Capture:
    """One batch of the first images, as if from this step."""
    (one,) = captured(name, slice(images), batch_size=images, labels=labels)
    return replace(one, seen=replace(one.seen, residual=step > 0))


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.title)
@pytest.mark.parametrize("fraction", [0.25, 0.8])
def test_a_fraction_of_the_columns_is_zero_and_all_else_as_it_was(config: ModelConfig, fraction: float) -> None:
    model, (x, y) = build_model(config, 3, 4, seed=0).train(), normal_batch(3)
    before = {name: b.clone() for name, b in model.named_buffers()}
    loss, plain = gradient_of(model, x, y)
    moved = {name: b.clone() for name, b in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    pruned_loss, pruned = SoteriaGradients(model, SoteriaConfig(fraction))(x, y)
    assert torch.equal(loss, pruned_loss)
    # One pass alone, or the statistics of a batch norm would have moved twice.
    assert all(torch.equal(b, moved[name]) for name, b in model.named_buffers())
    *others, weight, bias = plain
    assert all(map(torch.equal, pruned, [*others, pruned[-2], bias]))
    zero = (pruned[-2] == 0).all(0)
    assert torch.equal(pruned[-2], weight * ~zero)
    # Those that were zero anyway go first.
    assert int(zero.sum()) == max(round(fraction * weight.shape[1]), int((weight == 0).all(0).sum()))


def test_the_columns_are_those_of_the_greatest_score() -> None:
    model, (x, y) = build_model(NETWORK, 3, 4, seed=0), normal_batch(3)
    x.requires_grad_()
    r = model.features(x)
    scores = torch.zeros(r.shape[1])
    for i in range(r.shape[1]):
        (slope,) = torch.autograd.grad(r[:, i].sum(), x, retain_graph=True)
        scores[i] = sum(slope.flatten(1).norm(dim=1) / (r[:, i].detach().abs() + 0.1))
    grads = SoteriaGradients(model, SoteriaConfig(0.75))(x, y)[1]
    zero = (grads[-2] == 0).all(0)
    assert int(zero.sum()) == 48
    assert float(scores[zero].max()) <= float(scores[~zero].min())


@pytest.mark.parametrize(
    "name",
    ["soteria:0.5", "soteria:0.5+clip:0.1", "soteria:0.5+fp16", "soteria:0.5+powersgd:2", "soteria:0.5+powersgd:1:ef",
     "soteria:0.5+topk:0.3", "soteria:0.5+randk:0.5", "soteria:0.5+prune:0.5", "soteria:0.5+signsgd",
     "soteria:0.5+ef-signsgd", "soteria:0.5+qsgd:8", "soteria:0.5+atomo:2", "soteria:0.5+topk:0.1:ef"],
)  # fmt: skip
@pytest.mark.parametrize("step", [0, 1])
def test_one_who_knows_is_not_misled_by_what_was_pruned(name: str, step: int) -> None:
    """The pruned columns of a candidate have no part in the distance, whatever the compressor; where a residual hides
    which they are, the whole tensor has none."""
    seen = first(name, step=step).seen
    pruned, view = pruned_by_soteria(seen), target_view(seen, InversionConfig("aware"))
    assert pruned is not None
    assert bool(pruned.stayed.any()) is (step == 0)
    model, (x, y) = seen.build_model(), normal_batch(1)
    grads = [g[None] for g in gradient_of(model, x, y)[1]]
    changed = [g + 5 * (1 - pruned.stayed) if k == pruned.parameter else g for k, g in enumerate(grads)]
    assert view.distance(grads).item() == pytest.approx(view.distance(changed).item(), abs=1e-6)


@pytest.mark.parametrize(
    "name", ["soteria:0.5", "soteria:0.5+powersgd:2", "soteria:0.5+topk:0.3", "soteria:0.5+signsgd"]
)
def test_the_true_image_is_at_distance_zero_to_one_who_knows_alone(name: str) -> None:
    one = first(name)
    model = one.seen.build_model()
    x = (one.truth.images - one.seen.mean.view(-1, 1, 1)) / one.seen.std.view(-1, 1, 1)
    grads = [g[None] for g in gradient_of(model, x, one.truth.labels)[1]]
    assert target_view(one.seen, InversionConfig("aware")).distance(grads).item() == pytest.approx(0, abs=1e-5)
    assert target_view(one.seen, InversionConfig("naive")).distance(grads).item() > 0.01


def test_what_was_pruned_is_bounded_by_nothing() -> None:
    one = first("soteria:0.5+topk:0.3")
    view = target_view(one.seen, InversionConfig("aware", bound=1.0))
    x = (one.truth.images - one.seen.mean.view(-1, 1, 1)) / one.seen.std.view(-1, 1, 1)
    grads = [g[None] for g in gradient_of(one.seen.build_model(), x, one.truth.labels)[1]]
    assert view.excess(grads).item() == pytest.approx(0, abs=1e-6)  # type: ignore[attr-defined]


def test_knowing_it_is_no_weaker() -> None:
    base = InversionConfig("naive", iterations=80)
    for name in ("soteria:0.8", "soteria:0.8+powersgd:2"):
        config = TrainConfig(parse_defence(name), NETWORK, workers=1, capture=CaptureConfig((0,), 1, 1))
        taken = capture_images(config, DATA, DATA.test_images[:3], DATA.test_labels[:3])
        naive, aware = (
            sum(evaluate_inversion(taken, replace(base, objective=o)).ssim) / 3  # type: ignore[arg-type]
            for o in ("naive", "aware")
        )
        assert aware > naive


def test_stacked_with_others_each_is_as_it_is_alone() -> None:
    jobs = [(first(n).seen, InversionConfig(iterations=6)) for n in ("soteria:0.8", "soteria:0.5", "none")]
    for job, together in zip(jobs, invert(jobs), strict=True):
        torch.testing.assert_close(together.images, invert([job])[0].images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("images", [1, 4])
def test_labels_are_recovered_as_without_it(images: int) -> None:
    for method in ("counts", "bias_sign", *(["idlg"] if images == 1 else [])):
        plain, pruned = (recover_labels(first(n, images, labels="unknown").seen, method) for n in ("none", "soteria"))
        assert torch.equal(plain, pruned)


def test_labels_are_recovered_without_a_bias() -> None:
    """Although the rows are shorter than those of the whole representation."""
    model = build_model(NETWORK, 3, 10, seed=0)
    model.classifier = nn.Linear(model.classifier.in_features, 10, bias=False)
    nn.init.uniform_(model.classifier.weight, -0.1, 0.1, generator=torch.Generator().manual_seed(0))
    defence, state = parse_defence("soteria:0.8"), State.of(model)
    victim = Victim(model, CROSS_ENTROPY, DATA.mean, DATA.std)
    data = Private(DATA.test_images[:24].float() / 255, DATA.test_labels[:24])
    threat = Threat(batch_size=8, labels="unknown")
    compressor = compressor_of(defence, state, seed=0)
    taken = victim.captures(victim.network, compressor, defence, None, threat, data, 10, state, 0)
    for one in taken:
        found, true = recover_labels(one.seen, "counts").tolist(), one.truth.labels.tolist()
        assert (Counter(found) & Counter(true)).total() >= 6


def test_training_learns_and_is_repeatable() -> None:
    config = TrainConfig(
        parse_defence("soteria:0.5+powersgd:2:ef"), NETWORK, Threat(batch_size=2), CaptureConfig((0, 3), 1, 1),
        workers=1, batch_size=16, steps=30,
    )  # fmt: skip
    records = list(train(config, DATA, LocalChannel()))
    losses = [r.loss for r in records if isinstance(r, Step)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert len([r for r in records if isinstance(r, Capture)]) == 4
    assert losses == [r.loss for r in train(config, DATA, LocalChannel()) if isinstance(r, Step)]


def test_what_can_t_be_is_refused_in_a_line() -> None:
    x, y = normal_batch(3)
    with pytest.raises(ValueError, match=r"^Expected a defence without soteria: DistributedDataParallel hands"):
        ddp_comm_hook(build(parse_defence("soteria"), [torch.Size((4, 3))]))
    with pytest.raises(ValueError, match="to begin with soteria, which is of images"):
        parse_defence("dp-sgd:1+soteria:0.5")
    with pytest.raises(ValueError, match=r"^In defence='soteria:1': Expected fraction=1.0 in \(0, 1\)"):
        parse_defence("soteria:1")
    with pytest.raises(ValueError, match=r"^Expected local_steps=2 to be 1 with soteria"):
        TrainConfig(parse_defence("soteria"), NETWORK, local=LocalConfig(2))
    frozen = build_model(NETWORK, 3, 4, seed=0)
    frozen.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^Expected a classifier whose weight is trained for soteria"):
        SoteriaGradients(frozen, SoteriaConfig())(x, y)
    with pytest.raises(ValueError, match=r"^Expected cross-entropy of images alone for soteria"):
        SoteriaGradients(frozen, SoteriaConfig(), Task(loss=lambda output, _: output.mean()))(x, y)
