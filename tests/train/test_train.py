from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from toys import distance, synthetic
from two_workers import DENSE_TRAINING, PEER_TRAINING

from raytrust.compress import ErrorFeedback, Reduced
from raytrust.config import (
    CaptureConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
    TrainConfig,
)
from raytrust.data import Dataset
from raytrust.leak import view_of
from raytrust.leak.observation import Capture, Observation
from raytrust.networks.build import build_model
from raytrust.train.feed import Feed
from raytrust.train.loop import Evaluation, Record, Step, capture_images, learning_rate_factor, train
from raytrust.train.private import auxiliary_images, check_sizes, private_batches
from raytrust.wire.channel import LocalChannel, Tap

CONVNET = TrainConfig(
    model=ModelConfig("convnet", width=4),
    capture=CaptureConfig(steps=(0, 3), tuning=1, evaluation=2),
    workers=1,
    batch_size=8,
    steps=4,
)
RESNET = replace(CONVNET, model=ModelConfig("resnet18", width=2), learning_rate=0.02)


def run(config: TrainConfig, data: Dataset) -> list[Record]:
    return list(train(config, data, LocalChannel()))


def losses(records: Sequence[Record]) -> list[float]:
    return [r.loss for r in records if isinstance(r, Step)]


def captures(records: Sequence[Record], step: int | None = None) -> list[Capture]:
    return [r for r in records if isinstance(r, Capture) and step in (None, r.seen.step)]


def same_tensors(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_yielded_and_when(data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.isgeneratorfunction(train)
    found = run(CONVNET, data)
    training = ["Capture"] * 3 + ["Step"] * 3 + ["Capture"] * 3 + ["Step"]
    assert [type(r).__name__ for r in found] == [*training, "Trained", "Evaluation"]
    assert [r.step for r in found if isinstance(r, Step)] == [0, 1, 2, 3]
    assert [(c.seen.step, c.index) for c in captures(found)] == [(0, 0), (0, 1), (0, 2), (3, 0), (3, 1), (3, 2)]
    assert capsys.readouterr() == ("", "")


def test_nothing_happens_before_it_is_asked_for(data: Dataset) -> None:
    records = train(replace(CONVNET, steps=10**6), data, LocalChannel())
    assert isinstance(next(records), Capture)
    records.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("config", [CONVNET, RESNET], ids=["convnet", "resnet18"])
def test_a_run_is_a_function_of_its_arguments(config: TrainConfig, data: Dataset) -> None:
    config = replace(config, defence=Defence(PowerSGDConfig(2), error_feedback=True))
    first, again = run(config, data), run(config, data)
    assert losses(first) == losses(again)
    assert first[-1] == again[-1]
    for a, b in zip(captures(first), captures(again), strict=True):
        assert same_tensors(a.seen.weights, b.seen.weights)
        assert torch.equal(a.truth.images, b.truth.images)
        for m, n in zip(a.seen.messages, b.seen.messages, strict=True):
            assert all(map(torch.equal, (*m.sent, *m.received), (*n.sent, *n.received)))
    assert losses(run(replace(config, seed=1), data)) != losses(first)


def test_it_learns(data: Dataset) -> None:
    config = replace(CONVNET, steps=60, learning_rate=0.05, batch_size=16)
    found = run(config, data)
    evaluation = found[-1]
    assert isinstance(evaluation, Evaluation)
    assert (evaluation.step, evaluation.n) == (60, 24)
    assert evaluation.correct > 16 > 24 / data.classes
    assert sum(losses(found)[-5:]) < 0.6 * sum(losses(found)[:5])


@pytest.mark.parametrize("config", [CONVNET, RESNET], ids=["convnet", "resnet18"])
def test_the_first_capture_is_of_the_untrained_model(config: TrainConfig, data: Dataset) -> None:
    untrained = build_model(config.model, data.channels, data.classes, config.seed)
    for capture in captures(run(config, data), step=0):
        assert same_tensors(capture.seen.weights, dict(untrained.named_parameters()))
        assert same_tensors(capture.seen.buffers, dict(untrained.named_buffers()))


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize(
    "compressor",
    [DenseConfig(), PowerSGDConfig(2, warm_start=False), PowerSGDConfig(2), TopKConfig(level=0.1)],
    ids=repr,
)
def test_captures_do_not_disturb_training(
    batch_norm: Literal["eval", "train"], compressor: CompressorConfig, data: Dataset
) -> None:
    config = replace(RESNET, defence=Defence(compressor, True), threat=Threat(batch_norm=batch_norm, batch_size=2))
    often, once = (
        run(replace(config, capture=CaptureConfig(steps=steps, tuning=1, evaluation=1)), data)
        for steps in [(0, 1, 2, 3), (3,)]
    )
    assert losses(often) == losses(once)
    assert often[-1] == once[-1]
    a, b = captures(often, 3)[0].seen, captures(once, 3)[0].seen
    assert same_tensors(a.weights, b.weights)
    assert same_tensors(a.buffers, b.buffers)
    assert same_tensors(a.compressor_state, b.compressor_state)


def gradient(seen: Observation, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """By the book: of the mean cross-entropy over the private batch, with the observed model."""
    model = seen.build_model()
    x = (images - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
    return list(torch.autograd.grad(F.cross_entropy(model(x), labels), list(model.parameters())))


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("error_feedback", [False, True])
def test_what_is_captured_is_the_private_gradient(
    batch_norm: Literal["eval", "train"], error_feedback: bool, data: Dataset
) -> None:
    config = replace(
        RESNET,
        defence=Defence(PowerSGDConfig(2), error_feedback),
        threat=Threat(batch_norm=batch_norm, batch_size=3),
        capture=CaptureConfig(steps=(0, 2), tuning=1, evaluation=1),
    )
    for capture in captures(run(config, data)):
        seen, truth = capture.seen, capture.truth
        assert truth.images.shape == (3, 3, 8, 8)
        assert 0 <= float(truth.images.min()) <= float(truth.images.max()) <= 1
        grads = gradient(seen, truth.images, truth.labels)
        d = float(view_of(seen.build_compressor(), seen.messages, "link").distance([g[None] for g in grads]))
        assert seen.residual == (error_feedback and seen.step > 0)
        assert d < 1e-5 if not seen.residual else d > 1e-3  # the residual hides the gradient


def test_captures_use_the_compressor_s_state_of_that_step(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual and the warm start of all steps before, for each private batch anew."""
    calls: list[tuple[bool, ErrorFeedback]] = []
    reduce = ErrorFeedback.reduce

    def recorded(self: ErrorFeedback, grads: list[torch.Tensor], channel: Tap) -> Reduced:
        calls.append((bool(channel._keep), copy.deepcopy(self)))
        return reduce(self, grads, channel)

    monkeypatch.setattr(ErrorFeedback, "reduce", recorded)
    found = run(replace(CONVNET, defence=Defence(PowerSGDConfig(2), error_feedback=True)), data)
    assert [capture for capture, _ in calls] == [True] * 3 + [False] * 3 + [True] * 3 + [False]
    training = calls[9][1]
    for (_, before), capture in zip(calls[6:9], captures(found, step=3), strict=True):
        assert before.residual is not None
        assert training.residual is not None
        assert all(map(torch.equal, before.residual, training.residual))
        assert same_tensors(before.public_state(), training.public_state())
        assert same_tensors(capture.seen.compressor_state, training.public_state())
    assert not same_tensors(training.public_state(), calls[0][1].public_state())


def test_labels_only_where_the_threat_grants_them(data: Dataset) -> None:
    known, unknown = (
        captures(run(replace(CONVNET, threat=Threat(labels=labels, batch_size=2)), data))[0]
        for labels in ("known", "unknown")
    )
    assert torch.equal(known.seen.labels, known.truth.labels)  # type: ignore[arg-type]
    assert unknown.seen.labels is None
    assert torch.equal(unknown.truth.labels, known.truth.labels)


def test_private_batches_share_no_image(data: Dataset) -> None:
    config = replace(CONVNET, threat=Threat(batch_size=4), capture=CaptureConfig(tuning=3, evaluation=5))
    indices = private_batches(config, 64)
    assert indices.shape == (8, 4)
    assert len(set(indices.flatten().tolist())) == 32
    assert set(indices.flatten().tolist()) <= set(range(64))
    assert private_batches(config, 32).unique().tolist() == list(range(32))


def test_auxiliary_images_are_training_images_and_none_of_them_is_private(data: Dataset) -> None:
    threat = Threat(batch_size=4, batch_norm="train", auxiliary=20)
    config = replace(CONVNET, steps=2, threat=threat, capture=CaptureConfig((0, 1), tuning=3, evaluation=5))
    # Each image twice: a copy of a private one is private.
    twice = replace(
        data,
        train_images=torch.cat([data.train_images, data.train_images]),
        train_labels=torch.cat([data.train_labels, data.train_labels]),
    )
    key = lambda x: (x * 255).round().byte().numpy().tobytes()  # noqa: E731
    for images in (data, twice):
        found = captures(run(config, images))
        granted = found[0].seen.auxiliary
        assert granted is not None
        assert granted.shape == (20, *data.train_images.shape[1:])
        assert all(c.seen.auxiliary is granted for c in found)
        private = {key(x) for c in found for x in c.truth.images}
        training = {x.numpy().tobytes() for x in data.train_images}
        assert {key(x) for x in granted} <= training - private
    assert auxiliary_images(replace(config, threat=replace(threat, auxiliary=0)), data) is None
    other = auxiliary_images(replace(config, seed=1), data)
    again = auxiliary_images(replace(config, defence=Defence(PowerSGDConfig(1))), data)
    assert torch.equal(again, auxiliary_images(config, data))
    assert not torch.equal(again, other)
    with pytest.raises(ValueError, match=r"^Expected auxiliary=97 .* training images that are not private, 68\.$"):
        auxiliary_images(replace(config, threat=replace(threat, auxiliary=97)), twice)
    with pytest.raises(ValueError, match=r"^Expected auxiliary=20 to be 0 for captures of chosen images\.$"):
        capture_images(config, data, data.test_images, data.test_labels)


def test_private_batches_are_the_same_for_every_defence_and_step(data: Dataset) -> None:
    defences = [Defence(), Defence(PowerSGDConfig(1), True), Defence(TopKConfig(level=0.1))]
    truths = []
    for defence in defences:
        found = captures(run(replace(CONVNET, defence=defence), data))
        assert all(torch.equal(a.truth.images, b.truth.images) for a, b in zip(found[:3], found[3:], strict=True))
        truths.append([c.truth for c in found[:3]])
    for others in truths[1:]:
        for a, b in zip(truths[0], others, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
    assert not torch.equal(private_batches(CONVNET, 64), private_batches(replace(CONVNET, seed=1), 64))


@pytest.mark.parametrize("model", ["convnet", "resnet18"])
@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("compressor", [PowerSGDConfig(rank=10**6), TopKConfig(level=1.0)], ids=["powersgd", "topk"])
def test_the_lossless_limit_trains_like_dense(
    model: Literal["convnet", "resnet18"], error_feedback: bool, compressor: CompressorConfig, data: Dataset
) -> None:
    config = replace(CONVNET, model=ModelConfig(model, width=4), capture=CaptureConfig((5,)), steps=6, momentum=0.5)
    config = replace(config, learning_rate=0.2 if model == "convnet" else 0.02, batch_size=16)
    dense = run(config, data)
    limit = run(replace(config, defence=Defence(compressor, error_feedback)), data)
    assert losses(limit) == pytest.approx(losses(dense), rel=1e-3)
    a, b = (list(captures(records)[0].seen.weights.values()) for records in (limit, dense))
    assert distance(a, b) < 1e-4
    start = list(build_model(config.model, data.channels, data.classes, config.seed).parameters())
    assert distance(a, start) > 1e-2


def test_compression_does_change_training(data: Dataset) -> None:
    dense, compressed = (run(replace(CONVNET, defence=d), data) for d in (Defence(), Defence(TopKConfig(level=0.01))))
    assert losses(dense)[0] == losses(compressed)[0]
    assert losses(dense)[1:] != losses(compressed)[1:]


def test_bytes_of_a_step(data: Dataset) -> None:
    entries = sum(p.numel() for p in build_model(CONVNET.model, 3, data.classes, 0).parameters())
    for defence, sent in [(Defence(), 4 * entries), (Defence(TopKConfig(level=0.5), True), 8 * round(entries / 2))]:
        for record in run(replace(CONVNET, defence=defence), data):
            if isinstance(record, Step):  # captures cross the wire too, and are not counted
                assert (record.sent_bytes, record.gradient_bytes) == (sent, 4 * entries)


def test_the_first_steps_by_hand(data: Dataset) -> None:
    """SGD with Nesterov momentum and weight decay on the mean gradient, with the schedule of learning rates."""
    config = replace(CONVNET, steps=3, capture=CaptureConfig((2,)), batch_size=64)  # every batch is the whole set
    model = build_model(config.model, 3, data.classes, config.seed)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    x = (data.train_images.float() / 255 - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)
    expected = []
    for rate in (0.1, 0.1 * 2 / 3):
        loss = F.cross_entropy(model(x), data.train_labels)
        expected.append(loss.item())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g, v in zip(model.parameters(), grads, velocity, strict=True):
                d = g + 5e-4 * p
                v.mul_(0.9).add_(d)
                p.sub_(rate * (d + 0.9 * v))
    found = run(config, data)
    assert losses(found)[:2] == pytest.approx(expected, rel=1e-5)
    assert distance(list(captures(found)[0].seen.weights.values()), list(model.parameters())) < 1e-5


def test_every_epoch_sees_every_image_once(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    class Watched(Feed):
        def __call__(self, indices: torch.Tensor) -> Any:
            if self._images is data.train_images:
                seen.append(indices)
            return super().__call__(indices)

    monkeypatch.setattr("raytrust.train.loop.Feed", Watched)
    config = replace(CONVNET, batch_size=16, steps=8, capture=CaptureConfig((0,), 1, 1))
    run(config, data)
    batches = seen[2:]  # after the private ones
    for epoch in (torch.cat(batches[:4]), torch.cat(batches[4:])):
        assert epoch.sort().values.tolist() == list(range(64))
    assert not torch.equal(torch.cat(batches[:4]), torch.cat(batches[4:]))


def test_evaluation_by_hand(data: Dataset) -> None:
    """One step at a rate so small that the model is the untrained one, in evaluation mode."""
    config = replace(RESNET, steps=1, capture=CaptureConfig(), learning_rate=1e-30, batch_size=64)
    found = run(config, data)[-1]
    model = build_model(config.model, 3, data.classes, config.seed)

    def normalised(images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255 - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)

    model(normalised(data.train_images))  # the running statistics that this step leaves
    logits = model.eval()(normalised(data.test_images))
    assert isinstance(found, Evaluation)
    assert found.correct == int((logits.argmax(1) == data.test_labels).sum())
    assert found.loss == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-5)


def test_evaluation_covers_more_than_one_batch_of_images() -> None:
    few, many = synthetic(test=24), synthetic(test=24)
    repeated = replace(many, test_images=many.test_images.repeat(20, 1, 1, 1), test_labels=many.test_labels.repeat(20))
    a, b = run(CONVNET, few)[-1], run(CONVNET, repeated)[-1]
    assert isinstance(a, Evaluation)
    assert isinstance(b, Evaluation)
    assert (b.n, b.correct) == (480, 20 * a.correct)
    assert b.loss == pytest.approx(a.loss, rel=1e-5)


def test_two_workers_train_like_one_with_the_whole_batch(group: list[dict[str, Any]], data: Dataset) -> None:
    """Equally large shares, no compression, no batch norm: the mean gradient is that of the whole batch."""
    workers = [worker["dense training"] for worker in group]
    alone = run(replace(DENSE_TRAINING, workers=1, batch_size=8), data)
    mean_losses = [sum(pair) / 2 for pair in zip(*map(losses, workers), strict=True)]
    assert mean_losses == pytest.approx(losses(alone), rel=1e-4)
    assert losses(workers[0]) != losses(workers[1])  # each on its own images
    for records in workers:
        weights = list(captures(records, 5)[0].seen.weights.values())
        assert distance(weights, list(captures(alone, 5)[0].seen.weights.values())) < 1e-5
        together, by_itself = records[-1], alone[-1]
        assert isinstance(together, Evaluation)
        assert isinstance(by_itself, Evaluation)
        assert together.correct == by_itself.correct
        assert together.loss == pytest.approx(by_itself.loss, rel=1e-4)


def test_replicas_stay_equal(group: list[dict[str, Any]]) -> None:
    first, second = (worker["peer training"] for worker in group)
    a, b = captures(first, 3)[0].seen, captures(second, 3)[0].seen
    assert same_tensors(a.weights, b.weights)
    assert same_tensors(a.buffers, b.buffers)  # batch-norm statistics too: they were averaged
    assert same_tensors(a.compressor_state, b.compressor_state)
    assert first[-1] == second[-1]


def test_private_batches_are_dealt_to_the_workers(group: list[dict[str, Any]], data: Dataset) -> None:
    for rank, worker in enumerate(group):
        found = captures(worker["peer training"])
        mine = [0, 2] if rank == 0 else [1]
        assert [(c.seen.step, c.index) for c in found] == [(step, index) for step in (0, 3) for index in mine]
        indices = private_batches(PEER_TRAINING, 64)
        for capture in found:
            assert (capture.seen.victim, capture.seen.world_size) == (rank, 2)
            assert torch.equal(capture.truth.images, data.train_images[indices[capture.index]].float() / 255)
            assert torch.equal(capture.truth.labels, data.train_labels[indices[capture.index]])


def test_a_loss_that_is_not_finite_ends_training(data: Dataset) -> None:
    records: Iterator[Record] = train(replace(CONVNET, learning_rate=1e30), data, LocalChannel())
    with pytest.raises(FloatingPointError, match=r"^The training loss became (nan|inf) at step [12]\.$"):
        list(records)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 200, 1234])
def test_learning_rate(steps: int) -> None:
    rise = max(1, steps // 10)
    factors = [learning_rate_factor(t, steps) for t in range(steps + 1)]
    assert max(factors) == factors[rise - 1] == 1
    assert factors[steps] == 0
    assert all(0 < f <= 1 for f in factors[:steps])
    up = [b - a for a, b in zip([0.0, *factors[: rise - 1]], factors[:rise], strict=True)]
    down = [a - b for a, b in zip(factors[rise - 1 : -1], factors[rise:], strict=True)]
    assert up == pytest.approx([1 / rise] * rise)
    assert down == pytest.approx([1 / (steps - rise + 1)] * (steps - rise + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 2}, "Expected workers=2 to equal the channel's world size, 1."),
        (
            {"batch_size": 65},
            "Expected batch_size=65 x workers=1 to be at most the number of training images, 64.",
        ),
        (
            {"capture": CaptureConfig(tuning=9, evaluation=8), "threat": Threat(batch_size=4)},
            "Expected at least 68 training images for the private batches, got 64.",
        ),
        (
            {"capture": CaptureConfig(tuning=3, evaluation=4), "threat": Threat(batch_size=8, auxiliary=9)},
            "Expected auxiliary=9 to be at most the number of training images that are not private, 8.",
        ),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str, data: Dataset) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        next(train(replace(CONVNET, **changes), data, LocalChannel()))
    assert str(error.value) == message


def test_sizes_that_just_fit() -> None:
    check_sizes(replace(CONVNET, workers=4, batch_size=16), 64)
    check_sizes(replace(CONVNET, capture=CaptureConfig(tuning=8, evaluation=8), threat=Threat(batch_size=4)), 64)
