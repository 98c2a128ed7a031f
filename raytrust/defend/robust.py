"""Robust aggregation: rules that take the gradients of all workers for one, though some of the workers lie.

Pure functions of `stack`, float (workers, entries), of which at most `malicious` rows are whatever an attacker likes,
and the others honest. Each returns (entries,). How many workers a rule needs says `raytrust.config.poisoning`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Aggregate: TypeAlias = Callable[[Tensor, int], Tensor]


def mean(stack: Tensor, malicious: int) -> Tensor:
    """The mean. No guarantee: a single malicious worker can make it any vector (Blanchard et al. 2017)."""
    return stack.mean(0)


def clipped(stack: Tensor, malicious: int) -> Tensor:
    """The mean of the rows, each scaled down to the median of their norms (the lower of two) if it is longer.

    With a minority malicious the bound is at most the longest honest row's, and so is the result; one worker moves it
    by at most 2 / workers of the bound. Clipping to a norm is from Sun et al. 2019 ("Can You Really Backdoor Federated
    Learning?"); they set the norm by hand.
    """
    norms = torch.linalg.vector_norm(stack, dim=1)
    return (stack * (norms.median() / norms.clamp_min(torch.finfo(stack.dtype).tiny)).clamp_max(1)[:, None]).mean(0)


def median(stack: Tensor, malicious: int) -> Tensor:
    """The median of each entry, the mean of the middle two if their number is even (Yin et al. 2018, Definition 1).

    With a minority malicious, each entry lies between the least and the largest of the honest.
    """
    n = len(stack)
    ordered = stack.sort(0).values
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(stack: Tensor, malicious: int) -> Tensor:
    """The mean of each entry without its `malicious` largest and smallest (Yin et al. 2018, Definition 2).

    With a minority malicious, each entry lies between the least and the largest of the honest.
    """
    return stack.sort(0).values[malicious : len(stack) - malicious].mean(0)


def krum(stack: Tensor, malicious: int) -> Tensor:
    """The row whose squared distances to its workers - malicious - 2 nearest sum to the least (Blanchard et al. 2017).

    For workers >= 2 malicious + 3, and honest rows that are independent draws close enough to their mean, it is in
    expectation at an acute angle to it. Close enough is a deviation of about the mean's
    norm / sqrt(entries): gradients of neural networks spread far more, and then nothing is guaranteed.
    """
    return stack[krum_scores(stack, malicious).argmin()].clone()


def multi_krum(stack: Tensor, malicious: int) -> Tensor:
    """The mean of the workers - malicious - 2 rows of the least scores of `krum` (Blanchard et al. 2017).

    What is guaranteed of Krum, with less variance.
    """
    kept = krum_scores(stack, malicious).argsort(stable=True)[: len(stack) - malicious - 2]
    return stack[kept.sort().values].mean(0)


def vote(stack: Tensor, malicious: int) -> Tensor:
    """The sign of the majority of each entry, 0 where votes tie; a zero votes for plus.

    An entry on which the honest votes differ by more than `malicious` is decided by the honest (Bernstein et al. 2019,
    "signSGD with Majority Vote is Communication Efficient and Fault Tolerant"). Every step has one length.
    """
    return torch.where(stack < 0, -1.0, 1.0).sum(0).sign()


def krum_scores(stack: Tensor, malicious: int) -> Tensor:
    """(workers,): of each row the sum of the squared distances to its workers - malicious - 2 nearest others."""
    n = len(stack)
    squares = stack.new_zeros(n, n)
    # By differences, not by products: those lose what differs, where rows are long and alike.
    for i in range(n):
        for j in range(i):
            squares[i, j] = squares[j, i] = (stack[i] - stack[j]).square().sum()
    others = squares[~torch.eye(n, dtype=torch.bool, device=stack.device)].view(n, n - 1)
    return others.sort(1).values[:, : n - malicious - 2].sum(1)


RULES: dict[str, Aggregate] = {
    "mean": mean,
    "clip": clipped,
    "median": median,
    "trimmed": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
    "vote": vote,
}
