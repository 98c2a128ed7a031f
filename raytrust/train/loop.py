"""Training as a generator: `train(config, data, channel)` yields what happened, and never logs, prints or saves.

Every worker runs this same code with its own end of the channel. Replicas stay equal because they start from one seed
and step by the same mean gradient.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.compress import Compressor, HookCompressor, build, for_private_batch
from raytrust.config import TrainConfig
from raytrust.data import Dataset
from raytrust.defend import private_generator
from raytrust.leak import EarlierStep
from raytrust.leak.history import holds_residual
from raytrust.leak.observation import Capture, Observation, Truth, seen_messages
from raytrust.networks.build import build_model
from raytrust.networks.checkpoint import load_checkpoint
from raytrust.train.agreement import agree_to_go_on, checked
from raytrust.train.feed import Feed
from raytrust.train.gradient import WorkerGradient
from raytrust.train.part import Part
from raytrust.train.private import auxiliary_images, check_sizes, partner_images, private_batches
from raytrust.wire.channel import Channel, LocalChannel, Tap

# Begins the key of Poisson samples, which no other draws share.
_POISSON = 0x50
HONEST = Part()


@dataclass(frozen=True)
class Step:
    """One optimiser step: this worker's mean training loss (nats), the payload bytes that it sent for the gradient, the
    bytes of the gradient itself, and the payload bytes that the collectives returned."""

    step: int
    loss: float
    sent_bytes: int
    gradient_bytes: int
    received_bytes: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Test accuracy of the model after `step` steps: `correct` of `n` images; mean loss in nats."""

    step: int
    correct: int
    n: int
    loss: float


@dataclass(frozen=True)
class Trained:
    """The model after the last step: its weights and buffers by name, on the CPU."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]


Record: TypeAlias = Step | Capture | Trained | Evaluation


def train(
    config: TrainConfig, data: Dataset, channel: Channel, device: str = "cpu", part: Part = HONEST
) -> Iterator[Record]:
    """Train, and yield a `Step` each step, a `Capture` for each private batch of this worker, at last one `Trained` and
    one `Evaluation`.

    Captures at step t are taken before step t is made, so step 0 is the untrained model. The private batches pass
    through the real collective with a copy of the compressor in its current state: what is captured is what would have
    crossed the wire had this batch been the worker's batch of this step; training itself goes on undisturbed.

    part: what this worker does in each step. A run is a function of its arguments. When the training loss or gradient
    of one worker stops being finite, all workers raise FloatingPointError in that step, before the gradient is sent:
    none is left waiting for another.
    """
    if config.workers != channel.world_size:
        raise ValueError(f"Expected workers={config.workers} to equal the channel's world size, {channel.world_size}.")
    check_sizes(config, len(data.train_labels))
    model = build_model(config.model, data.channels, data.classes, config.seed)
    if config.model.checkpoint:
        load_checkpoint(model, config.model.checkpoint)
    model = model.to(device)
    parameters = list(model.parameters())
    compressor = build(config.defence, model, config.seed, private_seed=config.seed)
    optimiser = torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: learning_rate_factor(t, max(1, config.steps)))
    batches = _batches(config, len(data.train_labels), channel)
    gradient = WorkerGradient(model, config, data.classes)
    history: deque[EarlierStep] = deque(maxlen=config.threat.history)
    auxiliary = auxiliary_images(config, data)
    feed = Feed(data.train_images, data.train_labels, data, device)
    for step in range(max(1, config.steps)):
        if step in config.capture.steps:
            # Workers have seen other images, so that their batch-norm statistics differ, but the attacker knows one.
            _average_buffers(model, channel)
            private = data.train_images, data.train_labels, private_batches(config, len(data.train_labels))
            yield from _captures(
                config, step, model, compressor, data, channel, device, private, tuple(history), auxiliary
            )
        if step == config.steps:
            break
        own = part.batch(feed(next(batches)), step)
        images, labels = gradient.mixed(own, step, channel.rank)
        model.train()
        loss, grads = gradient(images, labels, step, channel.rank)
        grads = part.gradient(grads, step, compressor, channel)
        nats = agree_to_go_on(step, loss, grads, compressor, channel)
        # A message of every step would fill the memory: only those that a later capture may hold as its history are
        # kept.
        keep = any(step < captured <= step + config.threat.history for captured in config.capture.steps)
        tap = Tap(channel, keep=keep)
        # Before the reduction, which changes it: a message means what the state says in which it was made.
        state = _public_state(compressor) if keep else {}
        means = part.reduce(compressor, checked(grads, compressor), tap)
        if keep:
            history.append(EarlierStep(seen_messages([m.to("cpu") for m in tap.messages], config.threat), state))
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = mean
        optimiser.step()
        schedule.step()
        if step + 1 in part.looks:
            _average_buffers(model, channel)
            part.look(step + 1, model)
        size = sum(g.numel() * g.element_size() for g in grads)
        yield Step(step, nats, tap.sent_bytes, size, tap.received_bytes)
    _average_buffers(model, channel)
    yield Trained(*_state(model))
    yield _evaluate(config.steps, model, data, device)


def capture_images(
    config: TrainConfig,
    data: Dataset,
    images: Tensor,
    labels: Tensor,
    state: dict[str, Tensor] | None = None,
    step: int = 0,
    hook: HookCompressor | None = None,
    device: str = "cpu",
) -> list[Capture]:
    """Captures as `train` makes them, of chosen images instead of training images, without any training.

    images: uint8 (n, channels, height, width), which in their order fill private batches of `threat.batch_size`,
        normalised as `data`. labels: (n,).
    state: weights and buffers of the model by name, by default of the untrained one; `step` says how long it was
    trained. The compressor is that of the defence in its first state, or `hook` in its present one, which stays as it
    is. device: where gradients are taken; captures are on the CPU. Raises ValueError where the model can't have a
    gradient: a batch norm in training mode of one value a channel; and for a threat with auxiliary images, as the
    caller alone knows what else the chosen ones are compared with.
    """
    if config.threat.auxiliary:
        raise ValueError(f"Expected auxiliary={config.threat.auxiliary} to be 0 for captures of chosen images.")
    model = build_model(config.model, data.channels, data.classes, config.seed)
    if state is not None:
        model.load_state_dict(state)
    model = model.to(device)
    private = images, labels, torch.arange(len(labels)).view(-1, config.threat.batch_size)
    # Repeatable, as all of a study: it measures what noise does, and protects nobody.
    built = build(config.defence, model, config.seed, private_seed=config.seed) if hook is None else hook
    return list(_captures(config, step, model, built, data, LocalChannel(), device, private))


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a linear rise over the first tenth, then a linear fall to zero."""
    rise = max(1, steps // 10)
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


def _batches(config: TrainConfig, n_train: int, channel: Channel) -> Iterator[Tensor]:
    """Endless epochs of shuffled indices, the same order on all workers, of which each takes its share; for DP-SGD
    endless Poisson samples of `batch_size` on average, each worker's own."""
    # Not the seed of the private batches, whose images would then be the very first that the model is trained on.
    generator = torch.Generator().manual_seed(config.seed + 1)
    share = config.batch_size * channel.world_size
    if config.defence.dp_sgd is not None:
        # What its accountant counts with: each worker draws each image by itself, so that batches differ in size.
        own = private_generator(_POISSON, config.seed, channel.rank)
        while True:
            yield (torch.rand(n_train, generator=own) < config.batch_size / n_train).nonzero().flatten()
    while True:
        order = torch.randperm(n_train, generator=generator)
        for start in range(0, n_train - share + 1, share):
            yield order[start + channel.rank : start + share : channel.world_size]


def _captures(
    config: TrainConfig,
    step: int,
    model: nn.Module,
    compressor: Compressor,
    data: Dataset,
    channel: Channel,
    device: str,
    private: tuple[Tensor, Tensor, Tensor],
    history: tuple[EarlierStep, ...] = (),
    auxiliary: Tensor | None = None,
) -> Iterator[Capture]:
    """This worker's share of the private batches, one in each round; all workers take part in all rounds.

    private: images, labels, and a row of indices into them for each batch.
    """
    images, labels, indices = private
    weights, buffers = _state(model)
    state = _public_state(compressor)
    gradient_of = WorkerGradient(model, config, data.classes)
    partners = partner_images(config, data, images[indices.flatten()], auxiliary)
    feed = Feed(images, labels, data, device)
    others = None if partners is None else Feed(data.train_images, data.train_labels, data, device)(partners)
    for first in range(0, len(indices), channel.world_size):
        index = first + channel.rank
        # In a last, short round some workers have no batch left, but must take part in the collective.
        mine = indices[index % len(indices)]
        own = feed(mine)
        x, y = gradient_of.mixed(own, step, channel.rank, index, others)
        tap = Tap(channel, keep=True)
        gradient, after = _private_gradient(model, config, partial(gradient_of, x, y, step, channel.rank, index))
        # A copy, or error feedback would carry what the private batch left into training.
        for_private_batch(compressor, index).reduce(gradient, tap)
        if index >= len(indices):
            continue
        known = config.threat.labels == "known"
        granted = config.threat.batch_statistics == "known" and config.threat.batch_norm == "train"
        seen = Observation(
            step=step,
            weights=weights,
            buffers=buffers,
            messages=seen_messages([m.to("cpu") for m in tap.messages], config.threat),
            compressor_state=state,
            defence=config.defence,
            model=config.model,
            threat=config.threat,
            labels=own.labels.cpu() if known else None,
            mixed=y.cpu() if known and config.defence.mixing is not None else None,
            image_shape=(data.channels, *data.image_size),
            classes=data.classes,
            mean=data.mean,
            std=data.std,
            victim=channel.rank,
            world_size=channel.world_size,
            residual=holds_residual(compressor) and step > 0,
            buffers_after=after if granted else None,
            history=history,
            method=compressor.as_seen() if isinstance(compressor, HookCompressor) else None,
            auxiliary=auxiliary,
            local=config.local,
        )
        yield Capture(index, seen, Truth(images[mine].float() / 255, labels[mine]))


def _private_gradient(
    model: nn.Module, config: TrainConfig, gradient: Callable[[], tuple[Tensor, Sequence[Tensor]]]
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """What a worker would send of the private batch, a gradient or the pseudo-gradient of local steps, in the threat's
    batch-norm mode, and the buffers that it would have afterwards; those of the model stay unchanged.
    """
    # In training mode a pass moves the running statistics, of which training itself must not notice anything.
    before = {name: b.clone() for name, b in model.named_buffers()}
    model.train(config.threat.batch_norm == "train")
    _, grads = gradient()
    after = _state(model)[1]
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return grads, after


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the weights and of the buffers, by name, on the CPU."""
    # Copied once, which `cpu().clone()` would be twice on a GPU.
    weights = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
    return weights, {name: b.detach().to("cpu", copy=True) for name, b in model.named_buffers()}


def _public_state(compressor: Compressor) -> dict[str, Tensor]:
    return {name: s.cpu() for name, s in compressor.public_state().items()}


def _average_buffers(model: nn.Module, channel: Channel) -> None:
    """Batch-norm statistics become the mean over workers. Not part of the gradient traffic, and not counted in it."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if buffers and channel.world_size > 1:
        mean = channel.all_mean(torch.cat([b.flatten() for b in buffers]))
        for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


@torch.no_grad()
def _evaluate(step: int, model: nn.Module, data: Dataset, device: str, batch: int = 256) -> Evaluation:
    model.eval()
    # Sums instead of means of batches, the last of which is smaller than the others.
    feed = Feed(data.test_images, data.test_labels, data, device)
    counts, losses = [], []
    for indices in torch.arange(len(data.test_labels)).split(batch):
        images, labels = feed(indices)
        logits = model(images)
        counts.append((logits.argmax(1) == labels).sum())
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
    # Read at the end: a number that is read at once makes the device wait for the next batch.
    correct, loss = int(torch.stack(counts).sum()), float(sum(torch.stack(losses).tolist()))
    if not math.isfinite(loss):
        raise FloatingPointError(f"The test loss became {loss} after {step} steps.")
    n = len(data.test_labels)
    return Evaluation(step, correct, n, loss / n)
