"""What attacks made of the private images of a defence, for figures."""

from __future__ import annotations

from typing import Any

import numpy as np

from raytrust.config import DenseConfig, InversionConfig, SweepConfig, from_dict
from raytrust.reports.reconstructions import Drawn
from raytrust.studies.frontier.rows import Row, best, train_of
from raytrust.studies.frontier.store import Store


def drawn_attacks(store: Store, sweep: SweepConfig, finished: Row) -> tuple[list[Drawn], np.ndarray]:
    """What the best attack that ignores the compressor made of the private images, and the strongest if that is
    another; and the originals, (n, channels, height, width) in [0, 1]."""
    naive = best(store.attacks(train_of(store, sweep, finished), "evaluation"), "naive")
    attacks = [naive["attack"]] if naive is not None and naive["attack"] != finished["attack"] else []
    found = [_drawn(store, sweep, finished, attack) for attack in [*attacks, finished["attack"]]]
    return [drawn for drawn, _ in found], found[0][1]


def _drawn(store: Store, sweep: SweepConfig, finished: Row, attack: dict[str, Any]) -> tuple[Drawn, np.ndarray]:
    train, config = train_of(store, sweep, finished), from_dict(InversionConfig, attack)
    images, originals = store.reconstructions(train, config, "evaluation")
    figures = store.attack(train, config, "evaluation")
    assert figures is not None
    compressed = not isinstance(train.defence.compressor, DenseConfig)  # else there is nothing to know or to ignore
    drawn = Drawn(
        finished["name"], images.numpy(), figures["ssim"], figures["identified_ssim"], attack["objective"] * compressed
    )
    return drawn, originals.numpy()
