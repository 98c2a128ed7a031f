from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import COMPRESSORS, DEFENCES, LOSSLESS, SHAPES, distance, gradients, norm

from raytrust.compress import ErrorFeedback, build
from raytrust.config import Defence, TopKConfig
from raytrust.wire.channel import LocalChannel

FED = [name for name in COMPRESSORS if f"{name}+EF" in DEFENCES]


@pytest.mark.parametrize("name", FED)
def test_nothing_is_lost_for_good(name: str) -> None:
    """Telescoping: all that was sent and what is still owed are all that came in."""
    compressor = build(DEFENCES[f"{name}+EF"], SHAPES)
    assert isinstance(compressor, ErrorFeedback)
    assert compressor.residual is None
    came = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    went = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for step in range(20):
        grads = gradients(step)
        own = compressor.reduce(grads, LocalChannel()).decoded_own
        for total, part in [(came, grads), (went, own)]:
            for t, p in zip(total, part, strict=True):
                t += p
    assert compressor.residual is not None
    assert distance([w + e for w, e in zip(went, compressor.residual, strict=True)], came) < 1e-6
    if name in LOSSLESS:
        assert norm(compressor.residual) < 1e-4 * norm(came)
    else:
        least = 1e-5 if name in ("fp16", "bf16") else 1e-3 if name == "qsgd-8" else 0.01
        assert distance(went, came) > least


@pytest.mark.parametrize("name", [name for name in FED if name in LOSSLESS])
def test_each_worker_owes_what_it_did_not_send_itself(name: str, group: list[dict[str, Any]]) -> None:
    """Subtracting the decoded mean would leave a residual even where nothing is compressed."""
    for worker in group:
        last = worker["reductions"][f"{name}+EF"][-1]
        for shape, x, e in zip(SHAPES, last.inputs, last.residual, strict=True):
            tall = len(shape) > 1 and shape[0] > shape[1:].numel()  # there the mean alone is lossless
            assert (norm([e]) < 1e-5 * norm([x])) == (not tall or name != "powersgd-full")


@pytest.mark.parametrize(("name", "share"), [("topk", 24 / 245), ("topk-layer", 0.1), ("threshold", 24 / 245)])
def test_the_residual_of_a_constant_gradient_stays_bounded(name: str, share: float) -> None:
    """(Stich et al. 2018, Lemma 3.2): ||residual|| <= 2 / share ||gradient||, however long it goes on."""
    compressor = build(DEFENCES[f"{name}+EF"], SHAPES)
    assert isinstance(compressor, ErrorFeedback)
    grads = gradients(0)
    for _ in range(100):
        compressor.reduce(grads, LocalChannel())
        assert compressor.residual is not None
        assert norm(compressor.residual) < 2 / share * norm(grads)


def test_an_entry_that_waits_is_sent_with_what_has_gathered() -> None:
    compressor = build(Defence(TopKConfig(level=0.5), error_feedback=True), [torch.Size((2,))])
    grads = [torch.tensor([4.0, 1.5])]
    sent = [compressor.reduce(grads, LocalChannel()).decoded_own[0].tolist() for _ in range(4)]
    assert sent == [[4, 0], [4, 0], [0, 4.5], [8, 0]]


def test_a_gradient_of_16_bits_is_owed_in_32() -> None:
    """2^-9 is lost beside 1 in bfloat16, but not in the residual."""
    compressor = build(Defence(TopKConfig(level=0.5), error_feedback=True), [torch.Size((2,))])
    assert isinstance(compressor, ErrorFeedback)
    for value in (1.0, 2.0**-9):
        compressor.reduce([torch.tensor([100.0, value], dtype=torch.bfloat16)], LocalChannel())
    assert compressor.residual is not None
    assert compressor.residual[0].tolist() == [0, 1 + 2.0**-9]


def test_it_adds_nothing_to_the_public_state() -> None:
    for name in FED:
        plain, fed = build(DEFENCES[name], SHAPES), build(DEFENCES[f"{name}+EF"], SHAPES)
        fed.reduce(gradients(0), LocalChannel())
        assert fed.public_state().keys() == plain.public_state().keys()
