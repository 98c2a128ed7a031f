"""The owner's own training, between whose steps gradients are captured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import nn

from raytrust.compress import Compressor
from raytrust.networks.build import copy_of
from raytrust.networks.kernels import sound_kernels
from raytrust.networks.task import Sample
from raytrust.studies.audit.victim import Victim
from raytrust.wire.channel import LocalChannel


@dataclass(frozen=True, eq=False)
class Training:
    """The owner's own training, for captures at later steps than the first.

    loader: batches (x, labels) or (x, labels, inputs by name) as the model sees them; it begins anew when it ends.
    steps: before which of them is captured, in increasing order. optimiser: makes one of the parameters.
    """

    loader: Iterable[Any]
    steps: tuple[int, ...]
    optimiser: Any
    _batches: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        valid = isinstance(self.steps, tuple) and all(isinstance(s, int) and s >= 0 for s in self.steps)
        if not valid or not self.steps or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"Expected steps={self.steps!r} to be a tuple of steps from 0 on, in increasing order.")

    def networks(self, victim: Victim, compressor: Compressor) -> Iterator[tuple[int, nn.Module]]:
        """The network before each of the steps, trained with the compressor, which keeps what it remembers."""
        network = copy_of(victim.network)
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimiser = self.optimiser(parameters)
        if len(self._batches) < self.steps[-1]:
            # Once for all defences, which are compared on one training: a loader may shuffle anew, or be over.
            self._batches.extend(islice(self._endless(), self.steps[-1]))
        batches, special = iter(self._batches), victim.of_images(network, compressor)
        for step in range(self.steps[-1] + 1):
            if step in self.steps:
                yield step, network
            if step == self.steps[-1]:
                return
            x, labels, *inputs = next(batches)
            targets = Sample(labels, inputs[0]) if inputs else labels
            x, targets = x.to(victim.dtype), victim._in_dtype(targets)
            x, targets = victim.mixed(compressor, x, targets, step)
            with sound_kernels(network), victim.drawing(network, step):
                loss, whole = victim.update(network, x, targets) if special is None else special(x, targets, step)
            if not all(bool(t.isfinite().all()) for t in (loss, *whole)):
                raise FloatingPointError(f"The training loss or gradient is not finite at step {step}.")
            reduced = compressor.reduce([g.float() for g in whole], LocalChannel())
            for p, mean in zip(parameters, reduced.mean, strict=True):
                p.grad = mean.to(p.dtype)
            optimiser.step()

    def _endless(self) -> Iterator[Any]:
        while True:
            count = 0
            for count, batch in enumerate(self.loader, start=1):  # noqa: B007
                yield batch
            # A generator is over after one pass, and would be asked for ever.
            if not count:
                raise ValueError(
                    f"Expected a loader with batches up to step {self.steps[-1]}, but it has come to its end."
                )
