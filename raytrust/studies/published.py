"""The figures of the paper under test, as published.

"Trustworthiness of Stochastic Gradient Descent in Distributed Learning": table 1 (SSIM of reconstructions, 10 images a
cell, ResNet-18) and table 2 (success of membership inference). The paper marks Top-K's levels as equal in compression
to PowerSGD's ranks; it leaves open the stem, the mode of batch norm, the state of training, the weight of TV, restarts,
iterations and the optimiser of table 1, and the rules, the points and their number of table 2.
"""

from __future__ import annotations

from typing import NamedTuple

from raytrust.config import Defence, DenseConfig, PowerSGDConfig, TopKConfig

CITATION = "Trustworthiness of Stochastic Gradient Descent in Distributed Learning, tables 1 and 2"
DATASETS = ("cifar10", "cifar100", "mnist")
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "mnist": "MNIST"}
RANKS = (1, 2, 4, 30, 50)
MEMBERSHIP_ATTACKS = ("prediction confidence", "loss", "cross-entropy")

Cell = tuple[str, int | None]  # method, and rank or level
# Top-K stands beside the PowerSGD rank whose bytes it takes: the paper compares the two at equal compression.
CELLS: tuple[Cell, ...] = (("none", None), *((method, r) for r in RANKS for method in ("powersgd", "topk")))


class Similarity(NamedTuple):
    """A cell of table 1: SSIM over its images, and its mean in per cent of that without compression."""

    mean: float
    std: float
    # Copied and not computed, as the claim under test is what the paper prints.
    percent: float


class Membership(NamedTuple):
    """A row of table 2: success of three attacks, per cent."""

    prediction: float
    loss: float
    cross_entropy: float


# A line a cell, with the data sets side by side in the order of `DATASETS`.
_TABLE_1: dict[Cell, tuple[tuple[float, float, float], ...]] = {
    ("none", None): ((0.3451, 0.2230, 100.0), (0.5576, 0.0796, 100.0), (0.8685, 0.1198, 100.0)),
    # In the paper itself PowerSGD 1 and Top-K 1 have the same figures on CIFAR-100: this is no slip of copying.
    ("powersgd", 1): ((0.0040, 0.0028, 1.16), (0.0069, 0.0056, 1.24), (0.0708, 0.0736, 8.15)),
    ("topk", 1): ((0.0071, 0.0051, 2.06), (0.0069, 0.0056, 1.24), (0.0035, 0.0024, 0.4)),
    ("powersgd", 2): ((0.0137, 0.0079, 3.97), (0.0112, 0.0093, 2.01), (0.0946, 0.0659, 10.89)),
    ("topk", 2): ((0.0069, 0.0053, 2.0), (0.0069, 0.0049, 1.24), (0.0072, 0.0050, 0.83)),
    ("powersgd", 4): ((0.0361, 0.0306, 10.46), (0.0231, 0.0182, 4.14), (0.2361, 0.1519, 27.19)),
    ("topk", 4): ((0.0065, 0.0051, 1.88), (0.0085, 0.0059, 1.52), (0.0156, 0.0078, 1.8)),
    ("powersgd", 30): ((0.1101, 0.0758, 31.91), (0.0437, 0.0306, 7.84), (0.4909, 0.2228, 56.53)),
    ("topk", 30): ((0.0178, 0.0151, 5.16), (0.0385, 0.0306, 6.91), (0.1706, 0.1761, 19.64)),
    ("powersgd", 50): ((0.1339, 0.0542, 38.81), (0.0482, 0.0327, 8.65), (0.6132, 0.1155, 70.63)),
    ("topk", 50): ((0.0262, 0.0169, 7.59), (0.0758, 0.0401, 13.59), (0.1715, 0.1183, 19.75)),
}
TABLE_1 = {d: {cell: Similarity(*row[i]) for cell, row in _TABLE_1.items()} for i, d in enumerate(DATASETS)}
_TABLE_2: dict[Cell, tuple[tuple[float, float, float], ...]] = {
    ("none", None): ((54.02, 55.17, 55.93), (66.78, 69.83, 72.57), (51.00, 51.30, 51.48)),
    ("powersgd", 1): ((54.10, 55.15, 56.05), (67.27, 70.23, 71.52), (51.18, 51.57, 51.80)),
    ("topk", 1): ((54.93, 54.87, 53.03), (56.25, 55.73, 51.68), (51.17, 51.60, 51.77)),
    ("powersgd", 2): ((53.98, 54.92, 56.47), (66.70, 70.08, 71.73), (51.22, 51.62, 51.85)),
    ("topk", 2): ((56.20, 56.30, 54.97), (57.35, 56.90, 52.47), (51.22, 51.77, 51.83)),
    ("powersgd", 4): ((54.02, 55.07, 55.88), (66.82, 70.17, 72.50), (51.05, 51.48, 51.80)),
    ("topk", 4): ((56.52, 57.20, 56.53), (63.47, 63.03, 56.18), (51.08, 51.53, 51.73)),
    ("powersgd", 30): ((54.23, 55.08, 56.03), (67.27, 70.17, 72.47), (51.08, 51.48, 51.68)),
    ("topk", 30): ((54.15, 55.08, 56.00), (67.82, 69.85, 69.45), (51.03, 51.38, 52.02)),
    ("powersgd", 50): ((53.83, 54.80, 55.53), (67.35, 70.27, 72.67), (50.98, 51.40, 51.62)),
    ("topk", 50): ((54.13, 55.12, 55.77), (67.20, 69.47, 70.25), (50.97, 51.35, 51.53)),
}
TABLE_2 = {d: {cell: Membership(*row[i]) for cell, row in _TABLE_2.items()} for i, d in enumerate(DATASETS)}


def defence_of(cell: Cell, error_feedback: bool = False) -> Defence:
    """The defence that a cell names. Top-K sends as many bytes as PowerSGD of the rank that is its level."""
    match cell:
        case ("powersgd", int(rank)):
            return Defence(PowerSGDConfig(rank), error_feedback)
        case ("topk", int(level)):
            # The paper gives Top-K no fraction of its own, only the compression of a rank, so that the rank sets its
            # size.
            return Defence(TopKConfig(equal_to_rank=level), error_feedback)
        case _:
            return Defence(DenseConfig())


def title_of(cell: Cell) -> str:
    """ "no compression", "PowerSGD 4", "Top-K 4"."""
    return {"none": "no compression", "powersgd": f"PowerSGD {cell[1]}", "topk": f"Top-K {cell[1]}"}[cell[0]]
