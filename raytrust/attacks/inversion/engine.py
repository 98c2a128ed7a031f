"""Gradient inversion, from observations to candidates: what is run together, and how.

Images, restarts and settings are one batch: one forward and one backward pass an iteration for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raytrust.attacks.inversion.denoiser import denoised
from raytrust.attacks.inversion.labels import recover_labels
from raytrust.attacks.inversion.objectives import target_view
from raytrust.attacks.inversion.priors import known_statistics
from raytrust.attacks.inversion.rounds import as_one_gradient, at_midpoint, check_applies
from raytrust.attacks.inversion.search import Found, Piece, search
from raytrust.attacks.inversion.stacks import stack_key
from raytrust.config import InversionConfig
from raytrust.config.register import ATTACKS
from raytrust.leak.mixing import known_shares, mixing_of
from raytrust.leak.observation import Observation
from raytrust.networks.task import Targets
from raytrust.persample.memory import candidate_bytes, free_bytes, is_out_of_memory

# Of per-candidate gradients that are held at once on the CPU, 1 GiB, whatever memory is free; beyond it candidates take
# turns. A GPU, which they don't have to pass a cache of, takes what fits.
MAX_GRADIENT_ENTRIES = 2**28
# Of shares of mixed images. To undo the mixture wins 0.09 SSIM on digits up to here, and loses 0.01 beyond, where the
# images that are found differ by little from one mixture to the next.
MAX_CONDITION = 7.0

Job = tuple[Observation, InversionConfig]


@dataclass(frozen=True)
class Candidates:
    """What the restarts of one observation arrived at.

    images: (restarts, batch, channels, height, width) in [0, 1], each restart's best. objective: (restarts,), matching
    distance + weighted priors at these images, inf for a restart that never had a finite one. labels: (restarts,
    batch), with which it was computed, granted or recovered; None for an attack that needs none. broken: (restarts,),
    whether the restart met a value or a slope that isn't finite; what was its best before is kept. matching:
    (restarts,), the distance alone, without priors, which can be compared between settings of one objective.
    """

    images: Tensor
    objective: Tensor
    labels: Tensor | None = None
    broken: Tensor | None = None
    matching: Tensor | None = None

    @property
    def diverged(self) -> int:
        """How many restarts met a value or a slope that isn't finite."""
        lost = ~self.objective.isfinite()
        return int((lost if self.broken is None else lost | self.broken).sum())

    def pick(self) -> int:
        """The restart that the attacker hands in: the least objective, which it can observe.

        Raises FloatingPointError if no restart ever had a finite one.
        """
        if not bool(self.objective.isfinite().any()):
            raise FloatingPointError(f"All {len(self.objective)} restarts of the attack diverged.")
        # By what the attacker sees: picking by similarity to the true image, as some programs do, makes an attack look
        # stronger.
        return int(self.objective.argmin())


class GradientInversion:
    """One attack, as its config says: see `InversionConfig`."""

    def __init__(self, config: InversionConfig, device: str = "cpu"):
        self.config = config
        self.device = device

    def reconstruct(self, seen: Observation) -> Tensor:
        """The private batch as far as it can be had: (batch, channels, height, width) in [0, 1]."""
        (candidates,) = self.candidates([seen])
        return candidates.images[candidates.pick()]

    def candidates(self, seen: Sequence[Observation]) -> list[Candidates]:
        """All restarts for several observations of one model."""
        return invert([(s, self.config) for s in seen], self.device)


def invert(jobs: Sequence[Job], device: str = "cpu") -> list[Candidates]:
    """Attack several observations of one model, each with its own settings, in as few batches as memory allows.

    What a job arrives at does not depend on the others. Raises ValueError, before any search, for observations of
    different models and for a job whose settings don't apply to what was seen.
    """
    for seen, config in jobs:
        if config.denoise > 0 and seen.auxiliary is None:
            raise ValueError(f"Expected denoise={config.denoise} to be 0: the threat grants no auxiliary images.")
    # What differs in its end alone is searched for once.
    alike: dict[tuple[int, InversionConfig], int] = {}
    searched = [(seen, replace(config, denoise=0.0)) for seen, config in jobs]
    places = [alike.setdefault((id(seen), config), len(alike)) for seen, config in searched]
    first = {place: i for i, place in reversed(list(enumerate(places)))}
    found = _invert([searched[first[place]] for place in range(len(alike))], device)
    return [_finished(found[place], *job, device) for place, job in zip(places, jobs, strict=True)]


def _finished(found: Candidates, seen: Observation, config: InversionConfig, device: str) -> Candidates:
    """The candidates, cleaned by what the attacker knows of images, if the config asks for it."""
    if config.denoise == 0:
        return found
    assert seen.auxiliary is not None
    cleaned = denoised(found.images.flatten(0, 1), seen.auxiliary, config.denoise, device)
    return replace(found, images=cleaned.view(found.images.shape))


def _invert(jobs: Sequence[Job], device: str) -> list[Candidates]:
    # All candidates pass through one network together, so they must be of the same weights.
    for seen, _ in jobs[1:]:
        if not same_model(jobs[0][0], seen):
            raise ValueError("Expected all observations to be of one model at one step.")
    # What pieces of a program share is the loop itself; all else is a number a candidate, and runs in one batch.
    found: dict[int, list[Candidates]] = {}
    programs: dict[tuple[object, ...], list[Piece]] = {}
    midway: dict[int, Observation] = {}
    for i, (seen, config) in enumerate(jobs):
        # A method of its own need not know of batches: it is asked for one observation at a time.
        if config.method != "optimise":
            found[i] = [ATTACKS[config.method](seen, config, device)]
        else:
            piece = _prepare(i, seen, config, device, midway)
            programs.setdefault(piece.program, []).append(piece)
    for pieces in programs.values():
        for batch in _batches(_alike_together(pieces), _room(pieces[0].seen, device)):
            for piece, result in _run(batch, device):
                found.setdefault(piece.job, []).append(Candidates(*result))
    return [_join(found[i]) for i in range(len(jobs))]


def _alike_together(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with those next to each other whose views can be stacked; otherwise in their order."""
    # Only neighbours are compared by one call, as a batch is cut into runs of candidates.
    keys = [stack_key(piece.view, piece.config) for piece in pieces]
    # In reverse, as the last value that is written for a key stays: this keeps the first place of each.
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    return [piece for _, piece in sorted(enumerate(pieces), key=lambda at: (first[keys[at[0]]], at[0]))]


def _prepare(
    job: int, seen: Observation, config: InversionConfig, device: str, midway: dict[int, Observation]
) -> Piece:
    """midway: surrogates so far, by their observation."""
    check_applies(seen, config)
    surrogate = config.through == "surrogate" and seen.local.steps > 1
    at = seen if config.through == "steps" else as_one_gradient(seen)
    if surrogate:
        # One for all settings of an observation, so that these still run as one batch.
        at = midway[id(seen)] = midway.get(id(seen)) or at_midpoint(seen, device)
    return Piece(
        job=job,
        seen=at,
        point=id(at) if surrogate else 0,
        config=config,
        restarts=range(config.restarts),
        view=target_view(seen, config, device),
        labels=labels_of(seen, config),
        shares=_undone(seen) if config.objective == "aware" else None,
        # Asked for only where they count, as a network without batch norm, or one that never saw data, is refused
        # there.
        statistics=known_statistics(seen) if config.bn > 0 else None,
        start=None if config.start == "noise" else _first_images(seen, config, device),
    )


def _first_images(seen: Observation, config: InversionConfig, device: str) -> Tensor:
    """What the attack that is to be begun with arrives at, (batch, channels, height, width) in [0, 1]."""
    begun = ATTACKS[config.start](seen, config, device)
    return begun.images[begun.pick()]


def labels_of(seen: Observation, config: InversionConfig) -> Targets | None:
    """(batch,), or what else the task takes: granted, or recovered; None where they are found with the images."""
    if seen.targets is not None:
        return seen.targets
    if config.objective == "aware" and mixing_of(seen) is not None:
        # Not granted, they are optimised: what recovers labels counts whole ones.
        return seen.mixed
    if seen.labels is not None:
        if not bool(((seen.labels >= 0) & (seen.labels < seen.classes)).all()):
            raise ValueError(f"Expected labels={seen.labels.tolist()} in [0, {seen.classes}).")
        return seen.labels
    return None if config.label_recovery == "joint" else recover_labels(seen, config.label_recovery)


def _undone(seen: Observation) -> Tensor | None:
    """The shares of the private images in what the network saw, where candidates can be the former."""
    shares = known_shares(seen)
    return shares if shares is not None and float(torch.linalg.cond(shares)) <= MAX_CONDITION else None


def _room(seen: Observation, device: str) -> int:
    """How many restarts fit into memory at once, at least 1."""
    entries = seen.local.steps * sum(w.numel() for w in seen.weights.values())
    # Two limits, as the gradients that are held may be the smaller part: of large images activations need more memory.
    fit = free_bytes(device) // candidate_bytes(seen, device)
    return max(1, fit if device.startswith("cuda") else min(MAX_GRADIENT_ENTRIES // entries, fit))


def _run(batch: Sequence[Piece], device: str) -> list[tuple[Piece, Found]]:
    """The batch, or its halves one after the other where memory does not suffice in spite of the estimate."""
    # The estimate of memory is of the usual network; to halve costs less than to be careful with all.
    try:
        return list(zip(batch, search(batch, device), strict=True))
    except RuntimeError as error:
        restarts = sum(len(piece.restarts) for piece in batch)
        halves = _batches(batch, (restarts + 1) // 2)
        # A batch that can't be cut would fail in the same way again, for ever.
        if not is_out_of_memory(error) or len(halves) == 1:
            raise
    # Out of the `except` block, because the error's traceback keeps the tensors of the batch that failed alive. What
    # they leave behind in torch's cache has their sizes, and would not fit the smaller ones.
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return [result for half in halves for result in _run(half, device)]


def _batches(pieces: Sequence[Piece], room: int) -> list[list[Piece]]:
    """The pieces in their order, in batches of at most `room` restarts, larger pieces cut by restarts.

    A piece whose restarts know of each other stays whole: with a group prior, or when the worse half is retired.
    """
    batches: list[list[Piece]] = [[]]
    for piece in pieces:
        n = len(piece.restarts)
        # Cut, they would see another mean and another worse half, so that results would depend on the memory at hand.
        size = n if piece.config.group > 0 or piece.config.halving else room
        for part in [replace(piece, restarts=piece.restarts[i : i + size]) for i in range(0, n, size)]:
            if batches[-1] and sum(len(p.restarts) for p in [*batches[-1], part]) > room:
                batches.append([])
            batches[-1].append(part)
    return batches


def _join(parts: Sequence[Candidates]) -> Candidates:
    if len(parts) == 1:
        return parts[0]
    return Candidates(
        images=torch.cat([p.images for p in parts]),
        objective=torch.cat([p.objective for p in parts]),
        labels=torch.cat([p.labels for p in parts if p.labels is not None]),
        broken=torch.cat([p.broken for p in parts if p.broken is not None]),
        matching=torch.cat([p.matching for p in parts if p.matching is not None]),
    )


def same_model(a: Observation, b: Observation) -> bool:
    """Whether both are of one model at one step under one threat: its weights, buffers and normalisation are equal,
    and so are the local steps."""
    names = ("model", "classes", "image_shape", "threat", "local")
    if any(getattr(a, name) != getattr(b, name) for name in names):
        return False
    # A module in memory has no description to compare by.
    if a.network is not b.network or a.task is not b.task:
        return False
    # By identity first: captures of one step share their tensors, and to compare them costs a pass over the model each.
    first, second = ([*s.weights.values(), *s.buffers.values(), s.mean, s.std] for s in (a, b))
    return all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))
