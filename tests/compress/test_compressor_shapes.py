"""Every compressor on unusual gradients: empty, odd, tied, huge, tiny, of 16 bits, partly frozen, not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import DEFENCES, LOSSLESS, SHAPES, Echo, bytes_by_formula, gradients

from raytrust.compress import ErrorFeedback, build
from raytrust.config import AtomoConfig, Defence, HalfConfig, PowerSGDConfig, QSGDConfig, SignSGDConfig, VqSGDConfig
from raytrust.wire.channel import LocalChannel, Tap

every_defence = pytest.mark.parametrize("name", DEFENCES)

shapes = st.lists(st.lists(st.integers(0, 5), max_size=4).map(torch.Size), max_size=4)
kinds = st.sampled_from(["random", "zero", "negative", "ties", "one", "sparse"])


def fill(kind: str, shape: torch.Size, scale: float, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    match kind:
        case "zero":
            x = torch.zeros(shape)
        case "negative":
            x = -x.abs() - 1
        case "ties":
            x = x.sign()
        case "one":
            x = torch.zeros(shape)
            x.view(-1)[-1:] = -1
        case "sparse":
            x = x * (x > 0.5)
    return (scale * x).to(dtype)


def peak(*lists: list[Tensor]) -> float:
    return max((float(x.abs().max()) for xs in lists for x in xs if x.numel()), default=0.0)


@every_defence
@settings(max_examples=12, deadline=None)
@given(shapes, kinds, st.sampled_from([1.0, 1e30, 1e-30]), st.sampled_from([torch.float32, torch.bfloat16]))
@example([], "random", 1.0, torch.float32)
@example([torch.Size((0,)), torch.Size((3, 0)), torch.Size(())], "random", 1.0, torch.float32)
@example([torch.Size((1,))], "negative", 1e30, torch.float32)
@example([torch.Size((7, 3)), torch.Size((5,))], "zero", 1.0, torch.bfloat16)
@example([torch.Size((4, 3))], "ties", 1.0, torch.float32)  # of rank 2, then of rank 3
@example([torch.Size((5, 4, 3)), torch.Size((17,))], "random", 1e30, torch.float32)
@example([torch.Size((5, 4, 3)), torch.Size((17,))], "random", 1e-30, torch.float32)
def test_any_gradient(name: str, shapes: list[torch.Size], kind: str, scale: float, dtype: torch.dtype) -> None:
    config = DEFENCES[name].compressor
    compressor, fresh = build(DEFENCES[name], shapes, seed=5), build(DEFENCES[name], shapes, seed=6)
    for step in range(2):
        grads = [fill(kind, shape, scale, dtype, 10 * step + i) for i, shape in enumerate(shapes)]
        before, residual = [g.clone() for g in grads], [torch.zeros(s) for s in shapes]
        if isinstance(compressor, ErrorFeedback) and compressor.residual is not None:
            residual = [e.clone() for e in compressor.residual]
        fresh.load_public_state(compressor.public_state())
        tap = Tap(LocalChannel(), keep=True)
        mean, own = compressor.reduce(grads, tap)
        assert all(map(torch.equal, grads, before))
        assert [(x.shape, x.dtype) for x in mean] == [(x.shape, x.dtype) for x in own]
        assert [(x.shape, x.dtype) for x in mean] == [(s, torch.float32) for s in shapes]
        assert all(x.isfinite().all() for x in (*mean, *own))
        assert tap.sent_bytes == bytes_by_formula(config, shapes, step, tap.messages)
        (decoded,) = fresh.decode(tap.messages, "link")
        inputs = [g.float() + e for g, e in zip(grads, residual, strict=True)]
        close = 1e-5 * peak(inputs, own)
        torch.testing.assert_close(decoded, own, rtol=0, atol=close)
        torch.testing.assert_close(mean, own, rtol=0, atol=close)
        if isinstance(compressor, ErrorFeedback):
            assert compressor.residual is not None
            for x, o, e in zip(inputs, own, compressor.residual, strict=True):
                torch.testing.assert_close(o + e, x, rtol=0, atol=close)
        if name in LOSSLESS:
            torch.testing.assert_close(own, inputs, rtol=0, atol=close)
        if kind == "zero" and scale == 1 and not isinstance(config, SignSGDConfig) and step == 0:
            assert peak(own) == 0


@pytest.mark.parametrize("name", [name for name in DEFENCES if name not in ("fp16", "fp16+EF")])
@pytest.mark.parametrize("exponent", [100, -100])
def test_a_scale_goes_through_to_the_bit(name: str, exponent: int) -> None:
    """By a power of two nothing rounds differently, whatever the method does; but for fp16, whose range is small."""
    factor = 2.0**exponent
    plain, scaled = build(DEFENCES[name], SHAPES), build(DEFENCES[name], SHAPES)
    config = DEFENCES[name].compressor
    # Factorisations and norms rescale by their own rules.
    rescaled = isinstance(config, (PowerSGDConfig, AtomoConfig, VqSGDConfig, QSGDConfig))
    for step in range(3):
        grads = gradients(step)
        expected = plain.reduce(grads, LocalChannel()).decoded_own
        own = scaled.reduce([factor * g for g in grads], LocalChannel()).decoded_own
        if isinstance(config, SignSGDConfig):
            if not DEFENCES[name].error_feedback:
                assert all(map(torch.equal, own, expected))
        elif "clip" not in repr(config) or "clip=None" in repr(config):
            torch.testing.assert_close([o / factor for o in own], expected, rtol=0, atol=1e-4 if rescaled else 0)


class Model(nn.Module):
    """A frozen embedding, a scalar, a parameter without entries and a frozen bias in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4).requires_grad_(False)
        self.linear = nn.Linear(4, 2)
        self.linear.bias.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.norm = nn.LayerNorm(2)


@every_defence
def test_frozen_parameters_take_no_part(name: str) -> None:
    model = Model()
    trained = ["linear.weight", "scale", "empty", "norm.weight", "norm.bias"]
    compressor = build(DEFENCES[name], model)
    assert sorted(compressor.layout.names) == sorted(trained)
    grads = [torch.ones_like(p) for p in model.parameters() if p.requires_grad]
    assert [g.shape for g in grads] == compressor.layout.shapes
    for _ in range(2):
        mean = compressor.reduce(grads, LocalChannel()).mean
        assert [m.shape for m in mean] == [g.shape for g in grads]
    assert set(_parameters(compressor.state_dict())) <= set(trained)
    with pytest.raises(ValueError, match="Expected gradients of shapes"):
        compressor.reduce([torch.ones_like(p) for p in model.parameters()], LocalChannel())


def _parameters(keys: dict[str, Tensor]) -> list[str]:
    return [key.partition(".")[2] for key in keys if "." in key]


@every_defence
@pytest.mark.parametrize(("bad", "before"), [(math.nan, 0), (math.inf, 1)])
def test_what_is_not_finite_is_refused_by_name_and_never_sent(name: str, bad: float, before: int) -> None:
    """Nor does it leave a trace: the steps that follow are those of a run without it."""
    names = [f"layer{i}.weight" for i in range(len(SHAPES))]
    compressor, undisturbed = (build(DEFENCES[name], SHAPES, 5, names) for _ in range(2))
    for step in range(before):
        for c in (compressor, undisturbed):
            c.reduce(gradients(step), LocalChannel())
    grads, tap = gradients(50), Tap(LocalChannel(), keep=True)
    grads[2][3, 7], grads[2][0, 0] = bad, -bad
    grads[4][0] = 3e38  # finite, however large
    with pytest.raises(ValueError) as error:  # noqa: PT011
        compressor.reduce(grads, tap)
    shown = torch.tensor(-bad).item()
    assert str(error.value) == f"Expected the gradient of layer2.weight to be finite, got {shown} in 2 of 40 entries."
    assert tap.messages == []
    for step in range(before, before + 2):
        expected, found = (c.reduce(gradients(step), LocalChannel()) for c in (undisturbed, compressor))
        assert all(map(torch.equal, (*found.mean, *found.decoded_own), (*expected.mean, *expected.decoded_own)))


def test_large_numbers_whose_sum_overflows_are_not_refused() -> None:
    grads = [torch.full((4,), 3e38), torch.full((2,), -3e38)]
    mean = build(Defence(), [g.shape for g in grads]).reduce(grads, LocalChannel()).mean
    assert all(map(torch.equal, mean, grads))


def test_a_number_beyond_float32_is_refused() -> None:
    grads = [torch.ones(2), torch.tensor([1.0, 1e300], dtype=torch.float64)]
    with pytest.raises(ValueError, match="Expected the gradient of 1 to be finite"):
        build(Defence(), [g.shape for g in grads]).reduce(grads, LocalChannel())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 98, 100, 1000])
def test_16_bits_do_not_overflow_in_the_sum_over_workers(dtype: str, workers: int) -> None:
    """Whatever the rounding of each addition, where all workers send the largest that they may."""
    grads = [torch.tensor([3.4e38, -3.4e38, 1.0])]
    config = HalfConfig(dtype)  # type: ignore[arg-type]
    (mean,), (own,) = build(Defence(config), [g.shape for g in grads]).reduce(grads, Echo(workers))
    assert mean.isfinite().all()
    assert own.isfinite().all()
    largest = torch.finfo(getattr(torch, dtype)).max
    if workers <= 3:
        assert float(own[0]) == pytest.approx(largest / workers, rel=0.02)
        assert float(own[0]) == -float(own[1])
    if workers == 1:
        assert float(own[0]) == largest
