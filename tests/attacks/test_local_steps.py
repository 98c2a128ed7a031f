"""Attacks on what several local steps send: three ways through them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from test_closed_form import transformer
from test_inversion import VIVID
from toys import distance, synthetic

from raytrust.attacks.inversion import GradientMatcher, engine, invert, recover_labels
from raytrust.attacks.inversion.engine import same_model
from raytrust.attacks.inversion.objectives import target_view
from raytrust.attacks.inversion.rounds import at_midpoint
from raytrust.attacks.learned.messages import auxiliary_messages
from raytrust.config import (
    ONE_STEP,
    InversionConfig,
    LocalConfig,
    ModelConfig,
    Threat,
    TrainConfig,
    parse_defence,
    register,
)
from raytrust.config.attacks import ANALYTIC
from raytrust.leak.observation import Capture, Observation, decoded
from raytrust.persample.memory import candidate_bytes
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.loop import capture_images

PARTS = LocalConfig(4, 0.3, 1)
WHOLE = LocalConfig(4, 0.3)
SHORT = InversionConfig("aware", iterations=6)


@cache
def captures(
    local: LocalConfig = PARTS,
    defence: str = "none",
    batch: int = 2,
    model: str = "convnet",
    threat: tuple[tuple[str, Any], ...] = (),
    seed: int = 0,
) -> tuple[Capture, ...]:
    """Two private batches of 8x8 images."""
    config = TrainConfig(
        defence=parse_defence(defence),
        model=ModelConfig(model, width=16 if model == "convnet" else 2),
        threat=Threat(batch_size=batch, **dict(threat)),
        local=local,
        workers=1,
        seed=seed,
    )
    return tuple(capture_images(config, VIVID, VIVID.test_images[: 2 * batch], VIVID.test_labels[: 2 * batch]))


def seen(*args: Any, **kwargs: Any) -> Observation:
    return captures(*args, **kwargs)[0].seen


def at_truth(capture: Capture, at: Observation, objective: Any = "aware") -> float:
    """The distance that the attacker would find at the private images, with the weights and steps of `at`."""
    s, truth = capture.seen, capture.truth
    x = (truth.images - s.mean.view(-1, 1, 1)) / s.std.view(-1, 1, 1)
    view = target_view(s, InversionConfig(objective))
    return float(GradientMatcher(at.build_model(), local=at.local)(x[None], truth.labels[None], view.distance)[0])


@pytest.mark.parametrize(
    ("defence", "batch_norm"),
    [
        *((d, "eval") for d in ("none", "powersgd:1", "powersgd:2:ef", "topk:0.1", "ef-signsgd", "signsgd")),
        ("powersgd:1", "train"),
    ],
)
def test_who_simulates_the_steps_is_at_zero_at_the_truth(defence: str, batch_norm: str) -> None:
    model, local = ("resnet18", LocalConfig(3, 0.1, 2)) if batch_norm == "train" else ("convnet", PARTS)
    threat = (("batch_norm", batch_norm),)
    for capture in captures(local, defence, 4 if batch_norm == "train" else 2, model, threat):
        exact = at_truth(capture, capture.seen)
        assert exact == pytest.approx(0, abs=1e-3 if "sign" in defence else 1e-5)
        # Whoever takes the update for one gradient misses it.
        assert at_truth(capture, replace(capture.seen, local=ONE_STEP)) > 20 * max(exact, 1e-5)


@pytest.mark.parametrize(("rate", "better"), [(0.05, 3), (0.1, 3)])
def test_the_midpoint_is_nearer_than_the_start(rate: float, better: float) -> None:
    """To first order in the rate the gradient at the middle of the path is the mean along it."""
    for capture in captures(LocalConfig(8, rate)):
        middle = at_truth(capture, at_midpoint(capture.seen))
        assert middle < at_truth(capture, replace(capture.seen, local=ONE_STEP)) / better


def test_the_midpoint_lies_between_the_weights() -> None:
    s = seen()
    middle = at_midpoint(s)
    for (name, w), g in zip(s.weights.items(), decoded(s).gradient, strict=True):
        after = w - PARTS.steps * PARTS.learning_rate * g
        torch.testing.assert_close(middle.weights[name], (w + after) / 2)
    assert middle.local == ONE_STEP


def test_one_gradient_is_the_attack_on_one_step_to_the_bit() -> None:
    s = seen()
    (found,) = invert([(s, replace(SHORT, through="gradient"))])
    (expected,) = invert([(replace(s, local=ONE_STEP), SHORT)])
    assert torch.equal(found.images, expected.images)
    # On one step all ways are one.
    for way in ("surrogate", "gradient"):
        (same,) = invert([(replace(s, local=ONE_STEP), replace(SHORT, through=way))])  # type: ignore[arg-type]
        assert torch.equal(same.images, expected.images)


def test_ways_and_observations_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(SHORT, iterations=3)
    jobs = [
        (capture.seen, replace(few, through=way, tv=tv))  # type: ignore[arg-type]
        for way in ("steps", "surrogate", "gradient")
        for tv in (0.01, 0.1)
        for capture in captures()
    ]
    batches: list[int] = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda batch, device: (batches.append(len(batch)), run(batch, device))[1])
    together = invert(jobs)
    # Surrogates are of weights of their own, each with all its settings.
    assert sorted(batches) == [2, 2, 4, 4]
    for found, job in zip(together, jobs, strict=True):
        (alone,) = invert([job])
        torch.testing.assert_close(found.images, alone.images, rtol=1e-4, atol=1e-4)


def test_what_is_found_has_the_objective_that_it_says() -> None:
    s, attack = seen(defence="powersgd:2"), replace(SHORT, iterations=20, tv=0.0)
    (found,) = invert([(s, attack)])
    capture = replace(captures(defence="powersgd:2")[0])
    again = replace(capture, truth=replace(capture.truth, images=found.images[0]))
    assert at_truth(again, s) == pytest.approx(float(found.objective[0]), abs=1e-5)
    assert found.matching is not None
    assert torch.equal(found.matching, found.objective)


def test_observations_of_other_local_steps_are_of_another_model() -> None:
    s = seen()
    assert same_model(s, replace(s, local=PARTS))
    assert not same_model(s, replace(s, local=replace(PARTS, learning_rate=0.2)))
    with pytest.raises(ValueError, match="one model at one step"):
        invert([(s, SHORT), (replace(s, local=ONE_STEP), SHORT)])


def test_steps_that_are_simulated_need_more_memory() -> None:
    s = seen(WHOLE)
    assert candidate_bytes(s) == 2.5 * candidate_bytes(replace(s, local=ONE_STEP))
    assert candidate_bytes(seen(PARTS)) < candidate_bytes(s)


# ------------------------------------------------------------------------------------------------- what is refused

UNKNOWN = (("labels", "unknown"),)


def test_labels_without_an_order_are_refused_only_where_it_matters() -> None:
    s = seen(PARTS, threat=UNKNOWN)
    message = r"^Expected labels to be known, or label_recovery='joint', for through='steps' of parts of a batch: "
    with pytest.raises(ValueError, match=message):
        invert([(s, SHORT)])
    for attack in (
        replace(SHORT, label_recovery="joint"),
        replace(SHORT, through="surrogate"),
        replace(SHORT, through="gradient"),
    ):
        assert len(invert([(s, attack)])[0].images) == 1
    assert len(invert([(seen(WHOLE, threat=UNKNOWN), SHORT)])[0].images) == 1


def test_labels_are_recovered_where_every_image_counts_alike() -> None:
    for local in (LocalConfig(3, 0.05), LocalConfig(4, 0.05, 1)):
        for capture in captures(local, batch=4, threat=UNKNOWN):
            assert recover_labels(capture.seen, "counts").tolist() == sorted(capture.truth.labels.tolist())
    uneven = seen(LocalConfig(5, 0.05, 1), batch=4, threat=UNKNOWN)
    message = "Expected 5 local steps of batch_size=1 to take each of 4 images equally often, to recover labels."
    with pytest.raises(ValueError) as error:  # noqa: PT011
        recover_labels(uneven, "counts")
    assert str(error.value) == message


def test_mixed_batch_statistics_are_refused() -> None:
    threat = (("batch_norm", "train"), ("batch_statistics", "known"))
    s = seen(LocalConfig(2, 0.05), "none", 4, "resnet18", threat)
    with pytest.raises(ValueError, match=r"^Expected bn=0.1 to be 0 after 2 local steps: "):
        invert([(s, replace(SHORT, bn=0.1))])


# ------------------------------------------------------------------------------------------------- other attacks


def test_a_closed_form_is_exact_through_local_steps() -> None:
    """The first layer meets one image in all steps: a sum of signals times one input is linear in it still."""
    register.network("closed_transformer")(transformer)
    data = synthetic(vivid=True, size=32)
    config = TrainConfig(
        model=ModelConfig("closed_transformer"), threat=Threat(labels="unknown"), local=LocalConfig(4, 0.1), workers=1
    )
    (taken,) = capture_images(config, data, data.test_images[:1], data.test_labels[:1])
    result = evaluate_inversion([taken], ANALYTIC)
    assert result.ssim[0] > 0.99


@pytest.mark.parametrize("defence", ["none", "powersgd:2"])
def test_the_learned_attack_s_messages_are_the_worker_s(defence: str) -> None:
    local = LocalConfig(3, 0.3)
    for capture in captures(local, defence, 1):
        (found,) = auxiliary_messages(capture.seen, capture.truth.images, capture.truth.labels, seed=5)
        sent = torch.cat([g.flatten() for g in decoded(capture.seen).gradient])
        assert distance([found], [sent]) < 1e-4
        plain = replace(capture.seen, local=ONE_STEP)
        (other,) = auxiliary_messages(plain, capture.truth.images, capture.truth.labels, seed=5)
        assert distance([other], [sent]) > 1e-3


def test_to_simulate_the_steps_pays() -> None:
    attack = InversionConfig("naive", iterations=100)
    (capture, _) = captures(LocalConfig(3, 1.0), batch=1)
    simulated, naive = (
        evaluate_inversion([capture], replace(attack, through=way)).ssim[0]  # type: ignore[arg-type]
        for way in ("steps", "gradient")
    )
    assert simulated > naive + 0.1
