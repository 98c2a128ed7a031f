"""Gradient inversion by optimisation: the loop that moves all candidates of a batch at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from raytrust.attacks.inversion.objectives import matching_distance
from raytrust.attacks.inversion.optimisers import build_optimiser, signs, step_sizes
from raytrust.attacks.inversion.priors import (
    BatchNormPrior,
    Statistics,
    group_spread,
    mean_square,
    total_colour,
    total_variation,
)
from raytrust.attacks.inversion.stacks import stack, stack_key
from raytrust.config import InversionConfig
from raytrust.leak import View
from raytrust.leak.observation import Observation
from raytrust.networks.task import Targets, moved, row_of, stacked
from raytrust.persample.matcher import Distance, GradientMatcher

PRIORS = ("tv", "colour", "l2", "group", "bn")
Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the fields of `engine.Candidates`, in their order


@dataclass(frozen=True)
class Piece:
    """Some restarts of one job. seen: with the weights and local steps of the gradients that candidates are given.
    view: what these are compared with. labels: (batch,), or probabilities of classes, None if they are optimised.
    statistics: for the batch-norm prior. shares: (batch, batch), of the images in those that the network saw; None
    where candidates are what it saw. point: identifies weights that are not the model's but the observation's own, else
    0. start: (batch, channels, height, width) in [0, 1], where the first restart begins; None for noise."""

    job: int
    seen: Observation
    config: InversionConfig
    restarts: range
    view: View
    labels: Targets | None
    statistics: Statistics | None
    point: int = 0
    shares: Tensor | None = None
    start: Tensor | None = None

    @property
    def program(self) -> tuple[object, ...]:
        """What all pieces of a batch have in common."""
        config = self.config
        loop = config.iterations, config.optimiser, config.precision
        # As text where there are no tensors: True would equal the 1 of a tensor's dimensions.
        labels = self.labels.ndim if isinstance(self.labels, Tensor) else repr(self.labels is None)
        return *loop, labels, self.shares is None, self.seen.local, self.point


def search(pieces: Sequence[Piece], device: str) -> list[Found]:
    """Run the restarts of all pieces, which share a program, to their end."""
    batch = _Batch(pieces, device)
    iterations = pieces[0].config.iterations
    eighths = {iterations * k // 8: k for k in range(1, 8)} if iterations >= 8 else {}
    for iteration in range(iterations):
        batch.step(iteration)
        if iteration + 1 in eighths:  # seldom, as it waits for the device
            batch.retire(halve=eighths[iteration + 1] in (1, 2, 4))
            if len(batch.z) == 0:
                break
    else:
        batch.look()
    return batch.found()


class _Batch:
    """Candidates as rows of z: the pixels as the model sees them, then the logits of soft labels if there are any.

    Everything per candidate is in the order of `rows`, its number in the batch; what was found is by that number.
    """

    def __init__(self, pieces: Sequence[Piece], device: str):
        self.pieces = pieces
        self.first = first = pieces[0].seen
        counts = [len(p.restarts) for p in pieces]
        self.owner = torch.arange(len(pieces)).repeat_interleave(torch.tensor(counts))
        self.rows = torch.arange(len(self.owner), device=device)
        self.counts = counts
        model = first.build_model().to(device)
        self.gradients = GradientMatcher(model, getattr(torch, pieces[0].config.precision), first.task, first.local)
        # What is frozen was not sent, and no view knows of it.
        self.sent = [i for i, (name, _) in enumerate(model.named_parameters()) if name in first.weights]
        self.settings = _Settings.of(pieces, self.owner.to(device), device)
        if "bn" in self.settings.weights:
            self.bn_prior = BatchNormPrior(model)
        self.mean, self.std = (s.to(device).view(-1, 1, 1) for s in (first.mean, first.std))
        starts = [_start(p) for p in pieces]
        self.pixels = starts[0].shape[1]
        z = torch.cat(starts)
        if pieces[0].labels is None:
            z = torch.cat([z, torch.cat([_soft_labels(p) for p in pieces])], 1)
        self.low, self.high = self._box(z.shape[1])
        self.z = z.to(device).clamp_(self.low, self.high)
        self.optimiser = build_optimiser(pieces[0].config, self.z)
        self.comparisons = _comparisons(pieces)
        self._deal()
        self.best = torch.full((len(self.z),), torch.inf, device=device)
        self.best_z, self.matching = self.z.clone(), self.best.clone()
        self.broken = torch.zeros(len(self.z), dtype=torch.bool, device=device)

    def step(self, iteration: int) -> None:
        gradient = self.look()
        s = self.settings
        pixels = signs(gradient[:, : self.pixels], s.hard, s.soft, iteration / len(s.rates))
        gradient = torch.cat([pixels, gradient[:, self.pixels :]], 1)
        moved = self.z + s.rates[iteration, :, None] * self.optimiser.direction(self.z, gradient)
        self.z = moved.clamp(self.low, self.high)

    def look(self) -> Tensor:
        """Evaluate the objective, keep what is better than the best so far, and return its derivative (n, d)."""
        x = self.images(self.z[:, : self.pixels]).requires_grad_()
        entered = self._entered(x)
        if self.pieces[0].labels is None:
            value, *slopes = self.gradients.jointly(entered, self._soft(self.z), self._distance)
        else:
            value, *slopes = self.gradients(entered, self.settings.labels, self._distance)
        (slopes[0],) = torch.autograd.grad(entered, x, slopes[0])
        gradient = torch.cat([slope.flatten(1) for slope in slopes], 1)
        prior = self._prior(x)
        (slope,) = torch.autograd.grad(prior.sum(), x)
        gradient[:, : self.pixels] += slope.flatten(1)
        matching, value = value, value + prior.detach()
        best, rows = self.best[self.rows], self.rows
        better = (value < best) & ~self.broken[rows]  # never true for NaN
        self.best[rows] = torch.where(better, value, best)
        self.best_z[rows] = torch.where(better[:, None], self.z, self.best_z[rows])
        self.matching[rows] = torch.where(better, matching, self.matching[rows])
        self.broken[rows] |= ~(value.isfinite() & gradient.isfinite().all(1))
        return gradient

    def retire(self, halve: bool) -> None:
        """Drop the restarts that broke and, where it is asked for, the worse half of what each piece has left."""
        keep = ~self.broken[self.rows].cpu()
        best = self.best[self.rows].cpu()
        for i, piece in enumerate(self.pieces):
            mine = (keep & (self.owner == i)).nonzero().flatten()
            if halve and piece.config.halving:
                order = best[mine].argsort(stable=True)
                keep[mine[order[(len(mine) + 1) // 2 :]]] = False
        if bool(keep.all()):
            return
        self.owner = self.owner[keep]
        self.counts = torch.bincount(self.owner, minlength=len(self.pieces)).tolist()
        rows = keep.to(self.z.device)
        self.z, self.rows = self.z[rows], self.rows[rows]
        self.settings = self.settings.keep(rows)
        self.optimiser.keep(rows)
        self._deal()

    def found(self) -> list[Found]:
        images = (self.images(self.best_z[:, : self.pixels]) * self.std + self.mean).clamp(0, 1)
        counts = [len(p.restarts) for p in self.pieces]
        if self.pieces[0].labels is None:
            labels = self._soft(self.best_z).argmax(-1)
        elif isinstance(self.pieces[0].labels, Tensor):
            labels = torch.stack([p.labels for p in self.pieces for _ in p.restarts if isinstance(p.labels, Tensor)])
        else:
            labels = torch.empty(len(self.best), 0)
        results = (images, self.best, labels, self.broken, self.matching)
        return list(zip(*(r.cpu().split(counts) for r in results), strict=True))

    def images(self, pixels: Tensor) -> Tensor:
        """(n, pixels) -> (n, batch, channels, height, width)."""
        return pixels.unflatten(1, (-1, *self.first.image_shape))

    def _entered(self, x: Tensor) -> Tensor:
        """What the network saw of candidates: themselves, or mixtures of them."""
        shares = self.settings.shares
        return x.view_as(x) if shares is None else torch.einsum("nij,njchw->nichw", shares, x)

    def _soft(self, z: Tensor) -> Tensor:
        return z[:, self.pixels :].unflatten(1, (-1, self.first.classes))

    def _deal(self) -> None:
        """Which candidates belong to which comparison, as long as none is dropped."""
        self._dealt: list[tuple[int, Distance]] = []
        for comparison in self.comparisons:
            of = torch.tensor(comparison.pieces)
            owner = self.owner[(self.owner >= of[0]) & (self.owner <= of[-1])] - of[0]
            if len(owner):
                self._dealt.append((len(owner), comparison.of(owner.to(self.z.device))))

    def _distance(self, grads: Sequence[Tensor]) -> Tensor:
        grads = [grads[i] for i in self.sent]
        counts = [n for n, _ in self._dealt]
        if len(counts) == 1:
            return self._dealt[0][1](grads)
        parts = zip(*(g.split(counts) for g in grads), strict=True)
        return torch.cat([distance(part) for (_, distance), part in zip(self._dealt, parts, strict=True)])

    def _prior(self, x: Tensor) -> Tensor:
        terms: dict[str, Callable[[], Tensor]] = {
            "tv": lambda: total_variation(x),
            "colour": lambda: total_colour(x),
            "l2": lambda: mean_square(x),
            "group": lambda: group_spread(x, self.counts),
            "bn": lambda: self.bn_prior(self._entered(x), self.settings.statistics),
        }
        prior = 0 * x.flatten(1).sum(1)  # depends on x even without a prior
        for name, weight in self.settings.weights.items():
            prior = prior + weight * terms[name]()
        return prior

    def _box(self, d: int) -> tuple[Tensor, Tensor]:
        """The ends of valid pixels, (d,); soft labels have none."""
        ends = []
        for valid, free in ((0, -torch.inf), (1, torch.inf)):
            image = ((valid - self.mean) / self.std).expand(self.first.image_shape).flatten()
            ends.append(image.new_full((d,), free))
            ends[-1][: self.pixels] = image.repeat(self.first.threat.batch_size)
        return ends[0], ends[1]


@dataclass(frozen=True)
class _Comparison:
    """Consecutive pieces that are compared by one call: `of` makes the distance of candidates from whose they are,
    (n,), counted from the first of these pieces."""

    pieces: Sequence[int]
    of: Callable[[Tensor], Distance]


def _comparisons(pieces: Sequence[Piece]) -> list[_Comparison]:
    result = []
    for key, group in groupby(range(len(pieces)), lambda i: stack_key(pieces[i].view, pieces[i].config)):
        members = list(group)
        if key is not None and len(members) > 1:
            result.append(_stacked([pieces[i] for i in members], members))
        else:
            result += [_alone(pieces[i], i) for i in members]
    return result


def _stacked(pieces: Sequence[Piece], members: Sequence[int]) -> _Comparison:
    together = stack([piece.view for piece in pieces], pieces[0].config)
    return _Comparison(members, lambda owner: partial(together.distance, owner=owner))


def _alone(piece: Piece, member: int) -> _Comparison:
    distance = matching_distance(piece.view, piece.config)
    return _Comparison([member], lambda owner: distance)


@dataclass(frozen=True)
class _Settings:
    """What the configs say, for each candidate."""

    weights: dict[str, Tensor]  # of the priors that some candidate uses, (n,)
    hard: Tensor  # (n, 1)
    soft: Tensor  # (n, 1)
    rates: Tensor  # (iterations, n)
    labels: Targets  # (n, batch, ...), empty if they are optimised
    statistics: Statistics  # each (n, channels), empty without a prior on them
    shares: Tensor | None = None  # (n, batch, batch), of images in what the network saw, where it is not these

    @staticmethod
    def of(pieces: Sequence[Piece], owner: Tensor, device: str) -> _Settings:
        configs = [p.config for p in pieces]

        def each(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=device)[owner]

        weights = {name: [getattr(c, name) for c in configs] for name in PRIORS}
        known = [p.statistics for p in pieces if p.statistics is not None]
        layers = [  # a piece without this prior, whose weight is 0, takes any
            [(p.statistics or known[0])[i] for p in pieces] for i in range(len(known[0]) if known else 0)
        ]
        mixed = [p.shares for p in pieces if p.shares is not None]
        labels = stacked([torch.empty(0) if p.labels is None else p.labels for p in pieces])
        return _Settings(
            weights={name: each(values) for name, values in weights.items() if any(values)},
            hard=each([c.signed == "hard" for c in configs])[:, None],
            soft=each([c.signed == "soft" for c in configs])[:, None],
            rates=torch.stack([step_sizes(c) for c in configs], 1).to(device)[:, owner],
            labels=row_of(moved(labels, device), owner),
            statistics=[
                (
                    torch.stack([m for m, _ in layer]).to(device)[owner],
                    torch.stack([v for _, v in layer]).to(device)[owner],
                )
                for layer in layers
            ],
            shares=torch.stack(mixed).to(device)[owner] if mixed else None,
        )

    def keep(self, rows: Tensor) -> _Settings:
        return _Settings(
            weights={name: weight[rows] for name, weight in self.weights.items()},
            hard=self.hard[rows],
            soft=self.soft[rows],
            rates=self.rates[:, rows],
            labels=row_of(self.labels, rows),
            statistics=[(mean[rows], variance[rows]) for mean, variance in self.statistics],
            shares=None if self.shares is None else self.shares[rows],
        )


def _start(piece: Piece) -> Tensor:
    """Normal noise, (restarts, pixels): one draw for each restart of the job, in their order; of the first, the images
    that it is to begin with, if there are any."""
    seen = piece.seen
    starts = _draws(piece, (seen.threat.batch_size, *seen.image_shape), piece.config.seed)
    # The others keep their noise: restarts that began at one place would be hardly more than one.
    if piece.start is not None and piece.restarts.start == 0:
        mean, std = (s.cpu().view(-1, 1, 1) for s in (seen.mean, seen.std))
        starts[0] = ((piece.start - mean) / std).flatten()
    return starts


def _soft_labels(piece: Piece) -> Tensor:
    """Logits from normal noise (Zhu et al. 2019), (restarts, batch * classes), by a seed apart from the images'."""
    return _draws(piece, (piece.seen.threat.batch_size, piece.seen.classes), piece.config.seed + 2**31)


def _draws(piece: Piece, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, generator=generator).flatten() for _ in range(piece.restarts.stop)]
    return torch.stack(draws[piece.restarts.start :])
