"""The models of a membership audit: which points each is trained on, what is kept of it, and the files.

    DIR/membership.json                       the audit's configuration; a directory holds one audit
    DIR/models/<arm>/config.json              <arm> is the hash of what decides a model, and of the data
    DIR/models/<arm>/shadow-003.npz           what is kept of the fourth model: see `Shadow`
    DIR/models/<arm>/property-003.npz         scores of property inference against it
    DIR/failures/<arm>-shadow-003.json        why a model failed, until it is tried again

Every file is written whole or not at all, so that resuming is reading what is there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytrust.attacks.membership.messages import message_scores
from raytrust.config import Arm, Defence, DPSGDConfig, MembershipConfig, TrainConfig, digest, to_dict
from raytrust.data import Dataset
from raytrust.jobs.files import atomic_write, read_json, write_json
from raytrust.leak.observation import Capture
from raytrust.networks.build import build_model
from raytrust.studies.membership.properties import train_property
from raytrust.train.dp_sgd import train_privately
from raytrust.train.loop import Step, Trained, private_batches, train
from raytrust.wire.channel import LocalChannel

Array = NDArray[np.float32]
Kind: TypeAlias = Literal["shadow", "property"]

PLAIN, MISLABELLED, DUPLICATE = range(3)  # kinds of points
MEMBER, HELD_OUT, OTHER = range(3)  # kinds of candidates for a message


@dataclass(frozen=True)
class Pool:
    """The points of an audit. images: uint8 (n, channels, height, width). labels: (n,), wrong of the mislabelled.

    kinds: (n,), PLAIN, MISLABELLED or DUPLICATE. keep: (models, n), which model is trained on which point, by
    independent fair coins. A balanced design, with each point in exactly half of the models, would tell the attacker of
    one model its members by those of the others, whatever the models say.
    """

    images: Tensor
    labels: Tensor
    kinds: NDArray[np.int64]
    keep: NDArray[np.bool_]

    def rows(self, model: int, copies: int) -> NDArray[np.int64]:
        """The points that the model is trained on, duplicates `copies` times, as indices into the pool."""
        kept = np.flatnonzero(self.keep[model])
        return np.repeat(kept, np.where(self.kinds[kept] == DUPLICATE, copies, 1))


def draw_pool(config: MembershipConfig, data: Dataset) -> Pool:
    """The pool, a function of the config and the data alone. Raises ValueError if there are too few images."""
    if len(data.train_labels) < config.points:
        raise ValueError(
            f"Expected points={config.points} to be at most {len(data.train_labels)}, the training images."
        )
    batches = (config.train.capture.tuning + config.train.capture.evaluation) * config.train.threat.batch_size
    least = max(batches, config.train.batch_size)
    if config.points * 2 // 5 < least:  # a model has half of the points, give or take
        raise ValueError(
            f"Expected points={config.points} to be at least {least * 5 // 2}, for {least} images a model."
        )
    generator = np.random.default_rng(config.train.seed)
    chosen = generator.permutation(len(data.train_labels))[: config.points]
    labels = data.train_labels[torch.from_numpy(chosen)].clone()
    kinds = np.full(config.points, PLAIN)
    kinds[: config.mislabelled] = MISLABELLED
    kinds[config.mislabelled : config.mislabelled + config.duplicates] = DUPLICATE
    # A wrong label is one of another class that has images: no network is taught an empty class by a canary alone.
    present = data.train_labels.unique()
    shift = torch.from_numpy(generator.integers(1, len(present), config.mislabelled))
    place = torch.searchsorted(present, labels[: config.mislabelled])
    labels[: config.mislabelled] = present[(place + shift) % len(present)]
    keep = generator.random((config.models, config.points)) < 0.5
    pool = Pool(data.train_images[torch.from_numpy(chosen)], labels, kinds, keep)
    fewest = min(len(pool.rows(model, config.copies)) for model in range(config.models))
    if fewest < least:
        raise ValueError(f"Expected points={config.points} to be more: a model has {fewest} images, and needs {least}.")
    return pool


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


def train_shadow(config: MembershipConfig, arm: Arm, model: int, data: Dataset) -> Shadow:
    """Train one model of one arm on its half of the pool, and keep its outputs and the scores of its messages."""
    started = time.perf_counter()
    pool = draw_pool(config, data)
    rows = torch.from_numpy(pool.rows(model, config.copies))
    part = replace(data, train_images=pool.images[rows], train_labels=pool.labels[rows])
    run = model_config(config, arm, model)
    generator = np.random.default_rng([config.train.seed, model])
    records = train_privately(run, arm, part) if isinstance(arm, DPSGDConfig) else train(run, part, LocalChannel())
    steps: list[Step] = []
    before: dict[int, Array] = {}
    messages = [np.zeros((0, 6))]
    for record in records:
        match record:
            case Step():
                steps.append(record)
            case Capture(index=index, seen=seen):
                if seen.step not in before:
                    logits = outputs(run, seen.weights, seen.buffers, pool.images, part)
                    before[seen.step] = _cross_entropy(logits, pool.labels)
                batch = rows[private_batches(run, len(rows))[index]].unique().numpy()
                messages.append(_message_scores(config, record, pool, model, batch, generator))
            case Trained(weights=weights, buffers=buffers):
                final = outputs(run, weights, buffers, pool.images, part)
                test = outputs(run, weights, buffers, data.test_images, part)
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
    return replace(config.train, defence=defence, seed=config.train.seed + model)


def outputs(
    run: TrainConfig, weights: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, part: Dataset
) -> Array:
    """Logits (n, classes) for uint8 images, in evaluation mode, normalised as the model's own training images."""
    model = build_model(run.model, part.channels, part.classes, seed=0)
    model.load_state_dict({**weights, **buffers})
    mean, std = (s.view(-1, 1, 1) for s in (part.mean, part.std))
    with torch.no_grad():
        model.eval()
        parts = [model((some.float() / 255 - mean) / std) for some in images.split(256)]
    return torch.cat(parts).numpy().astype(np.float32)


def _message_scores(
    config: MembershipConfig,
    capture: Capture,
    pool: Pool,
    model: int,
    batch: NDArray[np.int64],
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Rows of `Shadow.messages` for one batch; canaries are left out, so that all candidates are alike."""
    plain = pool.kinds == PLAIN
    in_batch = np.isin(np.arange(len(plain)), batch)
    choices = [in_batch & plain, ~pool.keep[model] & plain, pool.keep[model] & ~in_batch & plain]
    found = [np.flatnonzero(choice) for choice in choices]
    found[1:] = [generator.permutation(f)[: config.controls] for f in found[1:]]
    index = torch.from_numpy(np.concatenate(found))
    scores = message_scores(capture.seen, pool.images[index].float() / 255, pool.labels[index])
    columns = [
        np.full(len(index), float(capture.seen.step)),
        np.full(len(index), float(capture.index)),
        np.repeat([MEMBER, HELD_OUT, OTHER], [len(f) for f in found]).astype(np.float64),
        *(getattr(scores, f.name).numpy() for f in fields(scores)),
    ]
    return np.stack(columns, axis=1)


def _cross_entropy(logits: Array, labels: Tensor) -> Array:
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), labels, reduction="none")
    return loss.numpy()


@dataclass(frozen=True)
class ShadowStore:
    """The directory of one audit over one data set, whose fingerprint enters the hash of each model."""

    root: Path
    fingerprint: str

    def arm_id(self, config: MembershipConfig, arm: Arm) -> str:
        """The hash of all that decides an arm's models: not of how many are attacked how in the end."""
        return digest(replace(config, name="", defences=(Defence(),), dp_sgd=(), guesses=2), arm, self.fingerprint)

    def path(self, config: MembershipConfig, arm: Arm, model: int, kind: Kind = "shadow") -> Path:
        return self.root / "models" / self.arm_id(config, arm) / f"{kind}-{model:03d}.npz"

    def jobs(self, config: MembershipConfig) -> Iterator[tuple[Kind, Arm, int]]:
        """All models of the audit, those of one arm together."""
        for arm in config.arms:
            yield from (("shadow", arm, model) for model in range(config.models))
            if isinstance(arm, Defence):
                yield from (("property", arm, model) for model in range(config.property_models))

    def run(self, config: MembershipConfig, arm: Arm, model: int, kind: Kind, data: Dataset) -> None:
        """Train one model and keep it, unless it is there."""
        path = self.path(config, arm, model, kind)
        if path.exists():
            return
        if kind == "shadow":
            shadow = train_shadow(config, arm, model, data)
            arrays = {f.name: getattr(shadow, f.name) for f in fields(shadow)}
        else:
            assert isinstance(arm, Defence)
            arrays = train_property(config, model_config(config, arm, model), model, data)
        if not (path.parent / "config.json").exists():
            write_json(path.parent / "config.json", {"arm": to_dict(arm), "audit": to_dict(config)})
        with atomic_write(path) as file:
            np.savez(file, **arrays)
        self._failure(config, arm, model, kind).unlink(missing_ok=True)

    def load(self, config: MembershipConfig, arm: Arm, model: int, kind: Kind = "shadow") -> dict[str, Any] | None:
        """The arrays of a finished model by name, None if it is not finished. ValueError if its file is damaged."""
        path = self.path(config, arm, model, kind)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except Exception as error:  # a damaged file can make zipfile, zlib and numpy raise nearly anything
            raise ValueError(f"Expected {path} to be a model's results, but it can't be read: {error}.") from error

    def shadows(self, config: MembershipConfig, arm: Arm) -> list[Shadow] | None:
        """All models of an arm, None if one is missing."""
        found = [self.load(config, arm, model) for model in range(config.models)]
        return None if any(f is None for f in found) else [Shadow(**f) for f in found if f is not None]

    def fail(self, config: MembershipConfig, arm: Arm, model: int, kind: Kind, reason: str) -> None:
        write_json(self._failure(config, arm, model, kind), {"arm": arm.name, "reason": reason})

    def failure(self, config: MembershipConfig, arm: Arm, kind: Kind = "shadow") -> str | None:
        """Why a model of this arm and kind failed, None if none did."""
        for path in sorted((self.root / "failures").glob(f"{self.arm_id(config, arm)}-{kind}-*.json")):
            return str(read_json(path)["reason"])
        return None

    def failed(self, config: MembershipConfig, arm: Arm, model: int, kind: Kind) -> bool:
        """Whether this model failed, and was not tried again."""
        return self._failure(config, arm, model, kind).exists()

    def clear_failures(self) -> None:
        """Forget failures, so that the models are tried again."""
        for path in (self.root / "failures").glob("*.json"):
            path.unlink()

    def _failure(self, config: MembershipConfig, arm: Arm, model: int, kind: Kind) -> Path:
        return self.root / "failures" / f"{self.arm_id(config, arm)}-{kind}-{model:03d}.json"


def open_shadows(root: Path, config: MembershipConfig, fingerprint: str, options: dict[str, Any]) -> ShadowStore:
    """Begin an audit in `root`, or go on with the same one. Raises ValueError if `root` holds another."""
    path = root / "membership.json"
    identity = {"audit": to_dict(config), "data": fingerprint}
    found = read_json(path)
    if found is None:
        write_json(path, {**identity, "options": options})
    elif {k: found.get(k) for k in identity} != identity:
        raise ValueError(f"Expected output={str(root)!r} to be empty or to hold this audit, but it holds another one.")
    return ShadowStore(root, fingerprint)


def stack(shadows: Sequence[Shadow]) -> tuple[Array, Array]:
    """Logits of all models: on the pool (models, n, classes), on the test images (models, t, classes)."""
    return np.stack([s.logits for s in shadows]), np.stack([s.test_logits for s in shadows])
