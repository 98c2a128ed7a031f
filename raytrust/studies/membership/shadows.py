"""The models of a membership audit: what each is trained on, and what is kept of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raytrust.attacks.membership.messages import message_scores
from raytrust.config import Arm, Defence, DPSGDConfig, MembershipConfig, TrainConfig
from raytrust.data import Dataset
from raytrust.leak.observation import Capture
from raytrust.networks.build import build_model
from raytrust.studies.membership.pool import PLAIN, Pool, draw_pool
from raytrust.train.dp_sgd import train_privately
from raytrust.train.loop import Record, Step, Trained, train
from raytrust.train.private import private_batches
from raytrust.wire.channel import LocalChannel

Array: TypeAlias = NDArray[np.float32]

MEMBER, HELD_OUT, OTHER = range(3)  # kinds of candidates for a message


@dataclass(frozen=True)
class Shadow:
    """What is kept of one trained model, as arrays.

    logits: (n, classes) on the pool; test_logits: (t, classes) on the test images, which no model was trained on.
    losses: (steps,), of training, in nats. steps: the captured ones, and step_losses: (captured, n), each point's loss
    before that step. messages: (candidates, 6): step, batch, kind (MEMBER, ...), cosine, gradient difference, and -loss
    at that step. sent_bytes, dense_bytes: mean a step. seconds: wall.
    """

    logits: Array
    test_logits: Array
    losses: Array
    steps: NDArray[np.int64]
    step_losses: Array
    messages: NDArray[np.float64]
    sent_bytes: float
    dense_bytes: float
    seconds: float


def train_shadow(config: MembershipConfig, arm: Arm, model: int, data: Dataset, device: str = "cpu") -> Shadow:
    """Train one model of one arm on its half of the pool, and keep its outputs and the scores of its messages."""
    started = time.perf_counter()
    pool = draw_pool(config, data)
    rows = torch.from_numpy(pool.rows(model, config.copies))
    part = replace(data, train_images=pool.images[rows], train_labels=pool.labels[rows])
    run = model_config(config, arm, model)
    generator = np.random.default_rng([config.train.seed, model])
    if isinstance(arm, DPSGDConfig):
        records: Iterator[Record] = train_privately(run, arm, part, device)
    else:
        records = train(run, part, LocalChannel(), device)
    steps: list[Step] = []
    before: dict[int, Array] = {}
    # A model without captures, as under DP-SGD, keeps a table without rows.
    messages = [np.zeros((0, 6))]
    for record in records:
        match record:
            case Step():
                steps.append(record)
            case Capture(index=index, seen=seen):
                # All batches of a step meet the same weights: one pass over the pool serves them.
                if seen.step not in before:
                    logits = torch.from_numpy(outputs(run, seen.weights, seen.buffers, pool.images, part, device))
                    before[seen.step] = F.cross_entropy(logits, pool.labels, reduction="none").numpy()
                # A point that comes several times in the batch is one candidate.
                batch = rows[private_batches(run, len(rows))[index]].unique().numpy()
                messages.append(_message_scores(config, record, pool, model, batch, generator, device))
            case Trained(weights=weights, buffers=buffers):
                final = outputs(run, weights, buffers, pool.images, part, device)
                test = outputs(run, weights, buffers, data.test_images, part, device)
    return Shadow(
        logits=final,
        test_logits=test,
        losses=np.array([s.loss for s in steps], dtype=np.float32),
        steps=np.array(list(before), dtype=np.int64),
        step_losses=np.stack(list(before.values())) if before else np.zeros((0, len(pool.labels)), dtype=np.float32),
        messages=np.concatenate(messages),
        sent_bytes=float(np.mean([s.sent_bytes for s in steps])),
        dense_bytes=float(steps[0].gradient_bytes),
        seconds=time.perf_counter() - started,
    )


def model_config(config: MembershipConfig, arm: Arm, model: int) -> TrainConfig:
    """The training config of one model: equal for all arms but for the defence."""
    defence = arm if isinstance(arm, Defence) else Defence()
    # Model i of every arm has the same points and the same start, so that arms can be compared model by model.
    return replace(config.train, defence=defence, seed=config.train.seed + model)


def outputs(
    run: TrainConfig,
    weights: dict[str, Tensor],
    buffers: dict[str, Tensor],
    images: Tensor,
    part: Dataset,
    device: str = "cpu",
) -> Array:
    """Logits (n, classes) for uint8 images, in evaluation mode, normalised as the model's own training images."""
    # Any seed will do, as all weights are replaced.
    model = build_model(run.model, part.channels, part.classes, seed=0)
    model.load_state_dict({**weights, **buffers})
    model = model.to(device)
    # The statistics of the model's own half: others would be inputs that it was not trained on.
    mean, std = (s.to(device).view(-1, 1, 1) for s in (part.mean, part.std))
    with torch.no_grad():
        model.eval()
        # In parts, as the activations of a whole pool would be gigabytes.
        parts = [model((some.to(device).float() / 255 - mean) / std) for some in images.split(256)]
    return torch.cat(parts).cpu().numpy().astype(np.float32)


def _message_scores(
    config: MembershipConfig,
    capture: Capture,
    pool: Pool,
    model: int,
    batch: NDArray[np.int64],
    generator: np.random.Generator,
    device: str,
) -> NDArray[np.float64]:
    """Rows of `Shadow.messages` for one batch; canaries are left out, so that all candidates are alike."""
    plain = pool.kinds == PLAIN
    in_batch = np.isin(np.arange(len(plain)), batch)
    choices = [in_batch & plain, ~pool.keep[model] & plain, pool.keep[model] & ~in_batch & plain]
    found = [np.flatnonzero(choice) for choice in choices]
    # A sample of the controls settles an AUC, while each of them costs a backward pass.
    found[1:] = [generator.permutation(f)[: config.controls] for f in found[1:]]
    index = torch.from_numpy(np.concatenate(found))
    scores = message_scores(capture.seen, pool.images[index].float() / 255, pool.labels[index], device=device)
    columns = [
        np.full(len(index), float(capture.seen.step)),
        np.full(len(index), float(capture.index)),
        np.repeat([MEMBER, HELD_OUT, OTHER], [len(f) for f in found]).astype(np.float64),
        *(getattr(scores, f.name).numpy() for f in fields(scores)),
    ]
    return np.stack(columns, axis=1)


def stack(shadows: Sequence[Shadow]) -> tuple[Array, Array]:
    """Logits of all models: on the pool (models, n, classes), on the test images (models, t, classes)."""
    return np.stack([s.logits for s in shadows]), np.stack([s.test_logits for s in shadows])
