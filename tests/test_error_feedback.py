from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import COMPRESSORS, SHAPES, distance, gradients, norm

from raytrust.channel import LocalChannel
from raytrust.compress import ErrorFeedback, build
from raytrust.config import Defence

every_compressor = pytest.mark.parametrize("name", COMPRESSORS)


@every_compressor
def test_nothing_is_lost_for_good(name: str) -> None:
    """Telescoping: all that was sent and what is still owed are all that came in."""
    compressor = build(Defence(COMPRESSORS[name], error_feedback=True), SHAPES)
    assert isinstance(compressor, ErrorFeedback)
    assert compressor.residual is None
    came = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    went = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for step in range(20):
        grads = gradients(step)
        own = compressor.reduce(grads, LocalChannel()).own
        for total, part in [(came, grads), (went, own)]:
            for t, p in zip(total, part, strict=True):
                t += p
    assert compressor.residual is not None
    assert distance([w + e for w, e in zip(went, compressor.residual, strict=True)], came) < 1e-6
    if "full" in name or name == "dense":
        assert norm(compressor.residual) < 1e-4 * norm(came)
    else:
        assert distance(went, came) > 0.01


@pytest.mark.parametrize("name", ["dense", "topk-full", "powersgd-full"])
def test_each_worker_owes_what_it_did_not_send_itself(name: str, group: list[dict[str, Any]]) -> None:
    """Subtracting the decoded mean would leave a residual even where nothing is compressed."""
    for worker in group:
        last = worker["reductions"][f"{name}+EF"][-1]
        for shape, x, e in zip(SHAPES, last.inputs, last.residual, strict=True):
            tall = len(shape) > 1 and shape[0] > shape[1:].numel()  # there the mean alone is lossless
            assert (norm([e]) < 1e-5 * norm([x])) == (not tall or name != "powersgd-full")


def test_the_residual_of_a_constant_gradient_stays_bounded() -> None:
    """(Stich et al. 2018, Lemma 3.2): k/N = 0.1, so ||residual|| <= 2 N/k ||gradient||, however long it goes on."""
    compressor = build(Defence(COMPRESSORS["topk"], error_feedback=True), SHAPES)
    assert isinstance(compressor, ErrorFeedback)
    grads = gradients(0)
    for _ in range(100):
        compressor.reduce(grads, LocalChannel())
        assert compressor.residual is not None
        assert norm(compressor.residual) < 20 * norm(grads)


def test_it_adds_nothing_to_the_public_state() -> None:
    for config in COMPRESSORS.values():
        plain, fed = build(Defence(config), SHAPES), build(Defence(config, error_feedback=True), SHAPES)
        fed.reduce(gradients(0), LocalChannel())
        assert fed.public_state().keys() == plain.public_state().keys()
