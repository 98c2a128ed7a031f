"""A training that begins without compression, and matrices that are not worth compressing."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from toys import SHAPES, batch, gradients

from raytrust.compress import DenseStart, ErrorFeedback, build
from raytrust.compress.contract import check
from raytrust.compress.powersgd import PowerSGD
from raytrust.config import Defence, PowerSGDConfig, digest, parse_defence, to_dict
from raytrust.leak import LinearView, view_of
from raytrust.leak.history import holds_residual, pure_view
from raytrust.leak.rules import EarlierStep
from raytrust.wire.channel import LocalChannel, Tap

WORDS = ["powersgd:2:ef:start_step=2", "topk:0.1:ef:start_step=1", "dgc:0.05:start_step=2", "qsgd:4:start_step=1"]


@pytest.mark.parametrize("words", [*WORDS, "powersgd:2:min_compression_rate=2:ef", "powersgd:1:min_compression_rate=9"])
def test_it_keeps_what_every_compressor_guarantees(words: str) -> None:
    check(parse_defence(words))


@pytest.mark.parametrize("words", WORDS)
def test_first_whole_gradients_then_the_method_as_if_it_began_there(words: str) -> None:
    defence = parse_defence(words)
    late, fresh = build(defence, SHAPES), build(parse_defence(words.partition(":start")[0]), SHAPES)
    for step in range(defence.start_step + 3):
        grads = gradients(step)
        tap, other = Tap(LocalChannel(), keep=True), Tap(LocalChannel(), keep=True)
        before = copy.deepcopy(late)
        mean = late.reduce(grads, tap).mean
        if step < defence.start_step:
            assert tap.sent_bytes == 4 * sum(g.numel() for g in grads)
            expected = grads
        else:
            expected = fresh.reduce(grads, other).mean
            assert tap.sent_bytes == other.sent_bytes
        assert all(map(torch.equal, mean, expected))
        view = view_of(before, tap.messages, "link")
        if step < defence.start_step:
            assert isinstance(view, LinearView)
            assert all(map(torch.equal, view.observed, grads))


def test_the_step_after_a_whole_gradient_has_no_residual() -> None:
    compressor, history = build(parse_defence("powersgd:2:ef:start_step=2"), SHAPES), []
    for step in range(5):
        before, tap = copy.deepcopy(compressor), Tap(LocalChannel(), keep=True)
        compressor.reduce(gradients(step), tap)
        view = pure_view(before, tap.messages, "link", history=history)
        assert isinstance(view, LinearView)
        measured = [m[0] for m in view.measure(batch(gradients(step)))]
        torch.testing.assert_close(measured, list(view.observed), rtol=1e-4, atol=1e-5)
        history.append(EarlierStep(tuple(tap.messages), before.public_state()))


@pytest.mark.parametrize("words", ["powersgd:2:ef", "ef-signsgd", "none:ef:start_step=1"])
def test_who_knows_a_compressor_in_parts_knows_the_compressor(words: str) -> None:
    whole, parts = (build(parse_defence(words), SHAPES, overlap=overlap) for overlap in (False, True))
    assert holds_residual(parts)
    history = []
    for step in range(2):
        before, tap = copy.deepcopy(whole), Tap(LocalChannel(), keep=True)
        whole.reduce(gradients(step), tap)
        twin = copy.deepcopy(parts)
        parts.reduce(gradients(step), LocalChannel())
        for look in (view_of, partial(pure_view, history=history)):
            if look is view_of or words.startswith("powersgd"):
                views = [look(c, tap.messages, "link") for c in (before, twin)]
                assert type(views[0]) is type(views[1])
                distances = [view.distance(batch(gradients(5))) for view in views]
                assert torch.equal(*distances)
        history.append(EarlierStep(tuple(tap.messages), before.public_state()))


def test_its_state_says_how_many_steps_are_left() -> None:
    defence = parse_defence("powersgd:2:ef:start_step=2")
    one = build(defence, SHAPES)
    one.reduce(gradients(0), LocalChannel())
    other = build(defence, SHAPES)
    other.load_state_dict(one.state_dict())
    for step in range(1, 4):
        means = [c.reduce(gradients(step), LocalChannel()).mean for c in (one, other)]
        assert all(map(torch.equal, *means))
    with pytest.raises(ValueError, match=r"^Expected state of start_step=2, got one of start_step=3\.$"):
        other.load_state_dict(build(parse_defence("powersgd:2:ef:start_step=3"), SHAPES).state_dict())
    with pytest.raises(ValueError, match="Expected state to hold 'dense_steps_left'"):
        other.load_state_dict(build(parse_defence("powersgd:2:ef"), SHAPES).state_dict())
    with pytest.raises(ValueError, match="with start_step=None, got one with start_step=2"):
        build(parse_defence("powersgd:2:ef"), SHAPES).load_state_dict(one.state_dict())


def test_options_that_are_not_used_leave_no_trace_in_a_digest() -> None:
    plain = Defence(PowerSGDConfig(4), error_feedback=True)
    assert to_dict(plain) == {
        "compressor": {"method": "powersgd", "rank": 4, "warm_start": True},
        "error_feedback": True,
    }
    late = parse_defence("powersgd:4:ef:start_step=100:min_compression_rate=2")
    assert late == Defence(PowerSGDConfig(4, min_compression_rate=2.0), True, start_step=100)
    assert late.name == "PowerSGD rank 4 at least 2x + EF from step 100"
    assert digest(plain) != digest(late)
    with pytest.raises(ValueError, match="Expected start_step=-1 to be at least 0"):
        parse_defence("topk:0.1:start_step=-1")
    with pytest.raises(ValueError, match="Expected start_step='soon' to be of type int"):
        parse_defence("topk:0.1:start_step=soon")
    with pytest.raises(ValueError, match=r"Expected min_compression_rate=-1\.0 to be at least 0"):
        PowerSGDConfig(min_compression_rate=-1.0)


def test_what_saves_too_little_is_sent_whole() -> None:
    """rank x (n + m) x rate < n x m, as torch's `PowerSGDState` has it."""
    shapes = [torch.Size(s) for s in [(12, 12), (11, 12), (12,), (40, 2, 20)]]
    compressor = build(Defence(PowerSGDConfig(2, min_compression_rate=3.1)), shapes)
    assert isinstance(compressor, PowerSGD)
    assert compressor.matrices == [3]
    assert compressor.vectors == [0, 1, 2]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=generator) for s in shapes]
    before, tap = copy.deepcopy(compressor), Tap(LocalChannel(), keep=True)
    mean = compressor.reduce(grads, tap).mean
    assert all(map(torch.equal, mean[:3], grads[:3]))
    assert not torch.equal(mean[3], grads[3])
    assert tap.sent_bytes == 4 * (12 * 12 + 11 * 12 + 12 + 2 * (40 + 40))
    view = view_of(before, tap.messages, "link")
    assert isinstance(view, LinearView)
    torch.testing.assert_close([m[0] for m in view.measure(batch(grads))], list(view.observed), rtol=1e-4, atol=1e-4)


def test_error_feedback_goes_around_it() -> None:
    compressor = build(parse_defence("powersgd:2:ef:start_step=2"), SHAPES)
    assert isinstance(compressor, ErrorFeedback)
    assert isinstance(compressor.inner, DenseStart)
    compressor.reduce(gradients(0), LocalChannel())
    assert compressor.residual is not None
    assert not any(bool(r.any()) for r in compressor.residual)
