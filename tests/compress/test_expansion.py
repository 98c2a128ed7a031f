"""Compression that makes larger is said to do so: by what crossed the wire, never by a formula."""

from __future__ import annotations

import pytest
import torch
from toys import DEFENCES, SHAPES

from raytrust.compress import build, expansion_remark
from raytrust.config import (
    Defence,
    DenseConfig,
    PowerSGDConfig,
    QSGDConfig,
    ScaledSignConfig,
    TopKConfig,
    VqSGDConfig,
)
from raytrust.wire.channel import LocalChannel, Tap

SMALL = [torch.Size((10, 12)), torch.Size((10,))]  # 130 entries, 520 bytes


def sent(defence: Defence, shapes: list[torch.Size]) -> int:
    tap = Tap(LocalChannel())
    build(defence, shapes).reduce([torch.ones(shape) for shape in shapes], tap)
    return tap.sent_bytes


def remark(defence: Defence, shapes: list[torch.Size]) -> str | None:
    return expansion_remark(defence, sent(defence, shapes), 4 * sum(shape.numel() for shape in shapes))


def test_methods_that_send_more_than_a_small_gradient() -> None:
    """By hand. Rank 6: 6 (10 + 12) + 10 floats of 130; 60 %: 78 values and positions, 624 bytes of 520."""
    assert remark(Defence(PowerSGDConfig(6)), SMALL) == (
        "PowerSGD rank 6 sends 1.09 times the bytes of the gradient itself: "
        "rank x (n + m) numbers exceed the n x m of a small matrix, so take a lower rank."
    )
    assert remark(Defence(TopKConfig(level=0.6), error_feedback=True), SMALL) == (
        "Top-K 60 % + EF sends 1.2 times the bytes of the gradient itself: "
        "a value and its position are 8 bytes, an entry is 4, so send less than half of the entries."
    )
    assert str(remark(Defence(VqSGDConfig(1000)), SMALL)).endswith("so take fewer samples.")
    scalars = [torch.Size(())] * 3  # a scale and a bit each: 12 + 1 bytes of 12
    assert remark(Defence(ScaledSignConfig()), scalars) == (
        "scaled sign sends 1.08 times the bytes of the gradient itself."
    )
    tiny_buckets = Defence(QSGDConfig(bits=8, bucket=1))
    assert remark(tiny_buckets, SMALL) == ("QSGD 8 bits bucket 1 sends 1.25 times the bytes of the gradient itself.")


def test_no_remark_where_nothing_grows() -> None:
    for defence in (
        Defence(),
        Defence(DenseConfig(), error_feedback=True),
        Defence(PowerSGDConfig(5)),  # 110 + 10 floats of 130
        Defence(TopKConfig(level=0.5)),  # 65 x 8 bytes, just as many
    ):
        assert remark(defence, SMALL) is None


@pytest.mark.parametrize("name", DEFENCES)
def test_it_speaks_exactly_if_more_was_sent(name: str) -> None:
    dense = 4 * sum(shape.numel() for shape in SHAPES)
    assert (remark(DEFENCES[name], SHAPES) is not None) == (sent(DEFENCES[name], SHAPES) > dense)


@pytest.mark.parametrize("bad", [0, -1, float("nan")])
def test_bytes_are_positive(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"^Expected sent_bytes={bad} to be positive\.$"):
        expansion_remark(Defence(), bad, 4)
    with pytest.raises(ValueError, match=rf"^Expected dense_bytes={bad} to be positive\.$"):
        expansion_remark(Defence(), 4, bad)
