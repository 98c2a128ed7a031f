"""Robust rules: against oracles that try everything, and what their papers guarantee."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raytrust.defend.robust import RULES, clipped, krum, median, multi_krum, trimmed_mean, vote


@st.composite
def stacks(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Rows of workers, and how many of them may be malicious, so few that every rule is defined."""
    malicious = draw(st.integers(0, 2))
    workers = draw(st.integers(2 * malicious + 3, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows = torch.randn(workers, draw(st.integers(1, 5)), generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        rows = rows.mul(2).round()  # with ties and zeros
    return rows, malicious


def krum_by_subsets(rows: list[list[float]], malicious: int) -> list[float]:
    """Of each row the least sum of squared distances to a set of workers - malicious - 2 others, of all such sets."""
    n = len(rows)
    found = []
    for i in range(n):
        sums = [
            sum(sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for j in chosen)
            for chosen in itertools.combinations([j for j in range(n) if j != i], n - malicious - 2)
        ]
        found.append(min(sums))
    return found


@given(stacks())
def test_rules_are_what_the_oracles_find(drawn: tuple[Tensor, int]) -> None:
    stack, malicious = drawn
    rows, columns = stack.tolist(), stack.T.tolist()
    n = len(rows)
    assert median(stack, malicious).tolist() == pytest.approx([statistics.median(c) for c in columns])
    trimmed = [statistics.mean(sorted(c)[malicious : n - malicious]) for c in columns]
    assert trimmed_mean(stack, malicious).tolist() == pytest.approx(trimmed)
    votes = [[1 if x >= 0 else -1 for x in c] for c in columns]
    assert vote(stack, malicious).tolist() == [(sum(v) > 0) - (sum(v) < 0) for v in votes]
    lengths = [sum(x * x for x in row) ** 0.5 for row in rows]
    bound = statistics.median_low(lengths)
    scaled = [[x * min(1, bound / (length or 1)) for x in row] for row, length in zip(rows, lengths, strict=True)]
    assert clipped(stack, malicious).tolist() == pytest.approx([statistics.mean(c) for c in zip(*scaled, strict=True)])
    scores = krum_by_subsets(rows, malicious)
    # Rows of one score are as good as each other.
    chosen = krum(stack, malicious).tolist()
    assert min(abs(scores[i] - min(scores)) for i in range(n) if rows[i] == chosen) < 1e-9
    kept = n - malicious - 2
    means = [
        [statistics.mean(c) for c in zip(*(rows[i] for i in best), strict=True)]
        for best in itertools.combinations(range(n), kept)
        if sum(scores[i] for i in best) <= sum(sorted(scores)[:kept]) + 1e-9
    ]
    assert any(multi_krum(stack, malicious).tolist() == pytest.approx(m) for m in means)


@given(stacks(), st.sampled_from([-1e6, 0.0, 1e6]), st.integers(0, 10**6))
def test_guarantees_hold_whatever_the_malicious_send(drawn: tuple[Tensor, int], size: float, seed: int) -> None:
    stack, malicious = drawn
    honest = stack[malicious:]
    stack[:malicious] = (
        size * torch.randn(stack[:malicious].shape, generator=torch.Generator().manual_seed(seed)).double()
    )
    for rule in (median, trimmed_mean):
        found = rule(stack, malicious)
        assert (found >= honest.min(0).values - 1e-9).all(), rule
        assert (found <= honest.max(0).values + 1e-9).all(), rule
    assert clipped(stack, malicious).norm() <= honest.norm(dim=1).max() + 1e-9
    margins = torch.where(honest < 0, -1.0, 1.0).sum(0)
    decided = margins.abs() > malicious
    assert torch.equal(vote(stack, malicious)[decided], margins.sign()[decided])


def test_krum_takes_an_honest_row_where_these_are_close() -> None:
    generator = torch.Generator().manual_seed(0)
    honest = 1 + 0.01 * torch.randn(6, 50, generator=generator)
    for lie in (torch.full((1, 50), -1.0), torch.full((1, 50), 100.0), honest.mean(0, keepdim=True) + 0.5):
        stack = torch.cat([honest, lie])
        assert any(torch.equal(krum(stack, 1), row) for row in honest)
        assert (multi_krum(stack, 1) - 1).abs().max() < 0.03
        assert (RULES["mean"](stack, 1) - 1).abs().max() > 0.05, "the mean has no such guarantee"


@pytest.mark.parametrize("name", RULES)
def test_rules_leave_the_gradients_as_they_are(name: str) -> None:
    stack = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    before = stack.clone()
    RULES[name](stack, 1).zero_()
    assert torch.equal(stack, before)
