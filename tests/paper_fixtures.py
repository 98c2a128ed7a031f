"""A budget so small that a whole run takes seconds, and rows as a run would give them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from raytrust.data import Dataset, load
from raytrust.jobs.job import Result
from raytrust.jobs.store import JobStore
from raytrust.studies.paper.jobs import Attack
from raytrust.studies.paper.plan import BUDGETS
from raytrust.studies.paper.selection import AWARE, NAIVE, WORST
from raytrust.studies.published import CELLS, Cell

MICRO = replace(
    BUDGETS["tiny"],
    width=1,
    iterations=(1,),
    tuning_iterations=1,
    stems=("cifar",),
    states=(0,),
    training=0,
    theory_steps=(0,),
    theory_width=2,
    theory_iterations=1,
)


def digits() -> Dataset:
    """Handwritten digits under the name of a data set of the paper, cut short."""
    data = load("digits", image_size=8)
    return replace(
        data,
        name="mnist",
        train_images=data.train_images[:150],
        train_labels=data.train_labels[:150],
        test_images=data.test_images[:20],
        test_labels=data.test_labels[:20],
    )


def fill(store: JobStore, attacks: Iterable[Attack], ssim: float) -> None:
    """Keep results of attacks as if they were done, all with the same figures."""
    for attack in attacks:
        n = len(attack.images)
        means = {"ssim": ssim, "mean_image_ssim": 0.1, "other_image_ssim": 0.1, "matching": 0.1, "identified": True}
        figures = {k: [v] * n for k, v in means.items()} | {"bytes": 8, "gradient_bytes": 8}
        images = np.zeros((n, 1, 8, 8))
        store.put(attack, Result(figures, {"originals": images, "reconstructions": images}))


def row(dataset: str, cell: Cell, attack: str, ssim: list[float]) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "compressor": cell[0],
        "rank_or_level": cell[1],
        "attack": attack,
        "status": "finished",
        "ssim": ssim,
        "ours": float(np.mean(ssim)),
        "identified": [True] * len(ssim),
        "floor": [0.1] * len(ssim),
    }


def table(
    naive: float, aware: float, n: int = 10, dataset: str = "cifar10", noise: float = 0.005, plain: float = 0.5
) -> list[dict[str, Any]]:
    """Rows of one data set: every compressed cell at these means, with a little noise by image."""
    generator = np.random.default_rng(0)
    rows = []
    for cell in CELLS:
        means = (plain, plain, plain) if cell[0] == "none" else (naive, aware, aware)
        for attack, mean in zip((NAIVE, AWARE, WORST), means, strict=True):
            rows.append(row(dataset, cell, attack, (mean + noise * generator.standard_normal(n)).tolist()))
    return rows
