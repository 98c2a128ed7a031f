"""Images that are mixed before the gradient is taken: how, by whose draws, and what one who knows makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from small_victim import DATA, NETWORK, captured, normal_batch
from torch import Tensor

from raytrust.attacks.inversion import engine, invert
from raytrust.attacks.learned import auxiliary_messages
from raytrust.compress import build, ddp_comm_hook
from raytrust.config import (
    CaptureConfig,
    InversionConfig,
    LocalConfig,
    MixupConfig,
    Threat,
    TrainConfig,
    parse_defence,
)
from raytrust.defend import private_generator
from raytrust.jobs.captures import load_captures, save_capture
from raytrust.leak.mixing import known_shares
from raytrust.leak.observation import Capture, decoded
from raytrust.networks.task import CROSS_ENTROPY, Task
from raytrust.studies.audit.private import Private
from raytrust.studies.audit.victim import State, Victim, compressor_of
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.gradient import gradient_of, update_of
from raytrust.train.loop import Step, train
from raytrust.train.mixing import Images, Mixing, mixing_shares
from raytrust.train.private import auxiliary_images, partner_images, private_batches
from raytrust.wire.channel import Channel, LocalChannel
from raytrust.wire.processes import in_processes


def different(n: int) -> Tensor:
    """Indices of test images of n classes."""
    return torch.tensor([int((DATA.test_labels == c).nonzero()[0]) for c in range(n)])


def as_seen(capture: Capture, images: Tensor) -> Tensor:
    return (images - capture.seen.mean.view(-1, 1, 1)) / capture.seen.std.view(-1, 1, 1)


@pytest.mark.parametrize(("k", "largest"), [(2, 0.65), (2, 1.0), (4, 0.65), (6, 0.3)])
def test_mixtures_are_convex_and_no_share_is_too_large(k: int, largest: float) -> None:
    shares = mixing_shares(MixupConfig(k, largest), 40, 50, private_generator(1))
    torch.testing.assert_close(shares.sum(1), torch.ones(40))
    assert bool((shares >= 0).all())
    assert float(shares.max()) <= largest + 1e-6
    assert ((shares > 0).sum(1) == k).all()
    assert bool((shares.diagonal() > 0).all())
    # Every other image can be a partner.
    assert int((mixing_shares(MixupConfig(k, largest), 40, 50, private_generator(2)) > 0).any(0).sum()) > 30


def test_of_two_images_each_share_is_as_likely() -> None:
    """By a test of the whole distribution that would fail once in a thousand times."""
    own = mixing_shares(MixupConfig(2, 0.65), 5000, 5001, private_generator(0)).diagonal().numpy()
    assert stats.kstest(own, "uniform", args=(0.35, 0.3)).pvalue > 1e-3


def test_images_and_targets_are_mixed_alike() -> None:
    own = Images(*normal_batch(8))
    x, targets = Mixing(MixupConfig(3), 0, 4)(own, 0)
    # By least squares: the images are independent, so that only one mixture can be it.
    shares = np.linalg.lstsq(own.x.flatten(1).T.double().numpy(), x.flatten(1).T.double().numpy(), rcond=None)[0].T
    expected = mixing_shares(MixupConfig(3), 8, 8, private_generator(0x4D, 0, 0, 0, 0))
    np.testing.assert_allclose(shares, expected.numpy(), atol=1e-5)
    torch.testing.assert_close(targets, expected @ F.one_hot(own.labels, 4).float())


def test_draws_are_the_seed_s_the_step_s_the_worker_s_and_the_private_batch_s_own() -> None:
    own = Images(*normal_batch(8))
    keys: list[tuple[Any, ...]] = [(0,), (1,), (0, 1), (0, 0, 0), (0, 0, 1)]
    drawn = [Mixing(MixupConfig(), 3, 4)(own, *key)[1] for key in keys] + [Mixing(MixupConfig(), 4, 4)(own, 0)[1]]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(Mixing(MixupConfig(), 3, 4)(own, *keys[3])[1], drawn[3])


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("local", [LocalConfig(), LocalConfig(2, 0.05)])
def test_what_is_sent_is_the_gradient_of_the_mixed_batch(local: LocalConfig) -> None:
    config = TrainConfig(
        parse_defence("mixup:3"), NETWORK, Threat(batch_size=4), CaptureConfig((0,), 1, 1), 1, 8, 2, local=local
    )
    taken = [r for r in train(config, DATA, LocalChannel()) if isinstance(r, Capture)]
    for one in taken:
        own = Images(as_seen(one, one.truth.images), one.truth.labels)
        x, targets = Mixing(MixupConfig(3), config.seed, DATA.classes)(own, 0, private=one.index)
        expected = update_of(one.seen.build_model(), x, targets, local)[1]
        for a, b in zip(decoded(one.seen).gradient, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert one.seen.mixed is not None
        torch.testing.assert_close(one.seen.mixed, targets)


def test_a_batch_too_small_is_mixed_with_images_that_are_neither_private_nor_granted() -> None:
    config = TrainConfig(
        parse_defence("mixup:2"), NETWORK, Threat(auxiliary=5), CaptureConfig((0,), 2, 2), workers=1, batch_size=4
    )
    private = DATA.train_images[private_batches(config, len(DATA.train_labels)).flatten()]
    auxiliary = auxiliary_images(config, DATA)
    assert auxiliary is not None
    partners = partner_images(config, DATA, private, auxiliary)
    assert partners is not None
    assert len(partners) > 20
    taken = {x.numpy().tobytes() for x in (*private, *(auxiliary * 255).round().byte())}
    assert not taken & {DATA.train_images[i].numpy().tobytes() for i in partners}
    one = next(r for r in train(config, DATA, LocalChannel()) if isinstance(r, Capture))
    assert one.seen.mixed is not None
    assert float(one.seen.mixed.sum()) == pytest.approx(1)
    assert partner_images(replace(config, threat=Threat(batch_size=2)), DATA, private, None) is None


@pytest.mark.parametrize("name", ["mixup:2", "mixup:3+powersgd:2", "mixup:2+topk:0.2:ef"])
def test_one_who_knows_has_the_shares_of_different_classes(name: str) -> None:
    (one,) = captured(name, different(4), batch_size=4)
    shares = known_shares(one.seen)
    assert shares is not None
    x = torch.einsum("ij,jchw->ichw", shares, as_seen(one, one.truth.images))
    assert one.seen.mixed is not None
    expected = gradient_of(one.seen.build_model(), x, one.seen.mixed)[1]
    config = replace(MixupConfig(), images=one.seen.defence.mixing.images)  # type: ignore[union-attr]
    own = Images(as_seen(one, one.truth.images), one.truth.labels)
    torch.testing.assert_close(x, Mixing(config, 0, DATA.classes)(own, 0, private=0)[0], rtol=1e-4, atol=1e-5)
    assert len(expected) == len(one.seen.weights)
    # Of two images of a class only the sum is known; and nothing where the labels are not.
    (same,) = captured(name, torch.cat([different(3), different(1)]), batch_size=4)
    assert known_shares(same.seen) is None
    assert known_shares(captured(name, different(4), batch_size=4, labels="unknown")[0].seen) is None


def test_one_who_knows_gets_more() -> None:
    base = InversionConfig("naive", iterations=150)
    for name, rows, size in (
        ("mixup:2", different(4), 4),
        ("mixup:2", different(4), 1),
        ("mixup:2+fp16", different(2), 2),
    ):
        taken = captured(name, rows, batch_size=size)
        naive, aware = (
            float(np.mean(evaluate_inversion(taken, replace(base, objective=o)).ssim))  # type: ignore[arg-type]
            for o in ("naive", "aware")
        )
        assert aware > naive, (name, size)


def test_a_mixture_is_undone_where_its_shares_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.cat([different(3) for _ in range(6)])
    taken = [c for c in captured("mixup:2", rows, batch_size=3) if engine._undone(c.seen) is not None]
    assert 0 < len(taken) < 6
    attack = InversionConfig(iterations=150)
    undone = float(np.mean(evaluate_inversion(taken, attack).ssim))
    monkeypatch.setattr(engine, "MAX_CONDITION", 0.0)
    assert undone > float(np.mean(evaluate_inversion(taken, attack).ssim)) + 0.05


def test_together_with_others_each_is_as_it_is_alone() -> None:
    mixed, plain = (captured(name, different(4), batch_size=4)[0].seen for name in ("mixup:2", "none"))
    jobs = [(seen, InversionConfig(o, iterations=6)) for seen in (mixed, plain) for o in ("naive", "aware")]  # type: ignore[arg-type]
    for job, together in zip(jobs, invert(jobs), strict=True):
        torch.testing.assert_close(together.images, invert([job])[0].images, rtol=1e-3, atol=1e-3)


def test_labels_that_are_not_granted_are_optimised() -> None:
    (one,) = captured("mixup:2", different(2), batch_size=2, labels="unknown")
    assert one.seen.mixed is None
    found = evaluate_inversion([one], InversionConfig("aware", iterations=10))
    assert found.label_accuracy is not None


def test_a_capture_is_kept_with_the_targets(tmp_path: Path) -> None:
    (one,) = captured("mixup:2", different(2), batch_size=2)
    save_capture(tmp_path, one)
    (again,) = load_captures(tmp_path, 0, [0])
    assert torch.equal(again.seen.mixed, one.seen.mixed)  # type: ignore[arg-type]


def test_a_model_in_memory_mixes_with_its_owner_s_other_images() -> None:
    defence = parse_defence("mixup:2")
    victim = Victim(captured("none", different(1))[0].seen.build_model(), CROSS_ENTROPY, DATA.mean, DATA.std)
    data = Private(DATA.test_images[:6].float() / 255, DATA.test_labels[:6])
    assert victim.check(data, 1) == 4
    compressor = compressor_of(defence, State.of(victim.network), seed=0)
    state = State.of(victim.network)
    taken = victim.captures(victim.network, compressor, defence, None, Threat(), data, 4, state, 0)
    for i, one in enumerate(taken):
        rest = data.without(i, 1)
        assert len(rest.images) == 5
        others = Images(victim.seen(rest.images), rest.targets)  # type: ignore[arg-type]
        own = Images(victim.seen(data.images[i : i + 1]), DATA.test_labels[i : i + 1])
        x, targets = Mixing(MixupConfig(), 0, 4)(own, 0, private=i, others=others)
        for a, b in zip(decoded(one.seen).gradient, gradient_of(victim.network, x, targets)[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    own_loss = Victim(victim.network, Task(loss=lambda a, b: F.cross_entropy(a, b)), DATA.mean, DATA.std)
    with pytest.raises(ValueError, match=r"^Expected cross-entropy of images alone for mixup"):
        own_loss.captures(victim.network, compressor, defence, None, Threat(), data, 0, state, 0)


def test_training_learns_and_is_repeatable() -> None:
    config = TrainConfig(
        parse_defence("mixup:2+powersgd:2:ef"), NETWORK, Threat(batch_size=2), CaptureConfig((0, 3), 1, 1),
        workers=1, batch_size=16, steps=30,
    )  # fmt: skip
    losses = [r.loss for r in train(config, DATA, LocalChannel()) if isinstance(r, Step)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert losses == [r.loss for r in train(config, DATA, LocalChannel()) if isinstance(r, Step)]


def in_a_group(channel: Channel) -> dict[str, Any]:
    config = TrainConfig(
        parse_defence("mixup:2"), NETWORK, Threat(batch_size=2), CaptureConfig((0,), 1, 1), batch_size=8, steps=2
    )
    taken = [r for r in train(config, DATA, channel) if isinstance(r, Capture)]
    return {"mixed": [c.seen.mixed for c in taken], "labels": [c.truth.labels for c in taken]}


def test_workers_mix_by_draws_of_their_own() -> None:
    workers = in_processes(in_a_group, 2, 120.0)
    for rank, worker in enumerate(workers):
        own = Images(torch.zeros(2, 3, 8, 8), worker["labels"][0])
        expected = Mixing(MixupConfig(), 0, DATA.classes)(own, 0, rank, private=rank)[1]
        torch.testing.assert_close(worker["mixed"][0], expected)


def test_what_can_t_be_is_refused_in_a_line() -> None:
    for name in ("mixup:2", "soteria:0.5"):
        (one,) = captured(name, different(1))
        with pytest.raises(ValueError, match=r"^Expected a defence without (mixup|soteria) for a learned inverter"):
            next(auxiliary_messages(one.seen, one.truth.images, one.truth.labels, seed=0))
    with pytest.raises(ValueError, match=r"^Expected a defence without mixup: DistributedDataParallel hands"):
        ddp_comm_hook(build(parse_defence("mixup"), [torch.Size((4, 3))]))
    for text in ("dp-sgd:1+mixup", "clip:1+mixup+powersgd:2"):
        with pytest.raises(ValueError, match="to begin with mixup, which is of images"):
            parse_defence(text)
    for text, message in (("mixup:1", "images=1 to be at least 2"), ("mixup:2:largest=0.5", r"largest=0.5 in \(1 / 2")):
        with pytest.raises(ValueError, match=f"^In defence='{text}': Expected {message}"):
            parse_defence(text)
    with pytest.raises(ValueError, match=r"^Expected batch_size=4 to be at least the images of MixUp of 5"):
        TrainConfig(parse_defence("mixup:5"), NETWORK, batch_size=4)
    with pytest.raises(ValueError, match=r"^Expected at least 9 images to mix for mixup:9, got 8"):
        Mixing(MixupConfig(9), 0, 4)(Images(*normal_batch(8)), 0)
