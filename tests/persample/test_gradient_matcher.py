"""The fast path: distances of gradients, and their derivatives, without a graph through the gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import candidates, network, one_at_a_time
from torch import Tensor, nn
from toys import distance, norm

from raytrust.attacks.inversion import (
    GradientMatcher,
)
from raytrust.compress import build
from raytrust.config import (
    Defence,
    DenseConfig,
    PowerSGDConfig,
    TopKConfig,
)
from raytrust.leak import LinearView, identity_view, view_of
from raytrust.persample import PerSampleGradients
from raytrust.persample.matcher import Distance
from raytrust.wire.channel import LocalChannel, Tap


def matcher_of(model: nn.Module) -> GradientMatcher:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GradientMatcher(model)


def views_of(target: list[Tensor]) -> dict[str, Distance]:
    """Distances of all kinds: of a whole gradient, and of what compressors let through."""
    shapes = [g.shape for g in target]
    found: dict[str, Distance] = {}
    for compressor in (DenseConfig(), TopKConfig(level=0.2), PowerSGDConfig(2)):
        tap = Tap(LocalChannel(), keep=True)
        build(Defence(compressor), shapes).reduce(target, tap)
        view = view_of(build(Defence(compressor), shapes), tap.messages, "link")
        found[compressor.method] = view.distance
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["convnet", "resnet18", "lenet", "mixed", "strange"])
def test_a_matcher_agrees_with_a_plain_loop(name: str, training: bool, batch: int) -> None:
    model = network(name, training)
    x, labels = candidates(batch, size=16 if name != "mixed" else 8)
    before = copy.deepcopy(model.state_dict())
    matcher = matcher_of(model)
    target = [g[0] for g in one_at_a_time(model, x[:1] + 1, labels[:1])]
    for distance_to_target in views_of(target).values():
        leaf = x.clone().requires_grad_()
        expected = distance_to_target(one_at_a_time(model, leaf, labels, create_graph=True))
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        values, dx = matcher(x, labels, distance_to_target)
        assert not values.requires_grad
        assert not dx.requires_grad
        torch.testing.assert_close(values, expected.detach(), rtol=1e-4, atol=1e-5)
        for i in range(4):  # each candidate, as their slopes differ in size
            assert distance([dx[i]], [slope[i]]) < 1e-3
    assert matcher.fast
    assert not x.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["convnet", "resnet18", "resnet20", "lenet", "strange"])
def test_the_fast_path_is_exact(name: str, training: bool) -> None:
    # In float32 one of twenty layers' ReLUs may turn by rounding, in the plain loop, too: ResNet-20 stands here alone.
    model = network(name, training, torch.float64)
    x, labels = candidates(2, dtype=torch.float64)
    target = [g[0] for g in one_at_a_time(model, x[:1] + 1, labels[:1])]
    matcher = matcher_of(model)
    assert matcher.fast
    found: list[Tensor] = []

    def to_target(grads: Sequence[Tensor]) -> Tensor:
        found[:] = [g.detach() for g in grads]
        return identity_view(target).distance(grads)

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(to_target(one_at_a_time(model, leaf, labels, create_graph=True)).sum(), leaf)
    expected = list(found)
    _, dx = matcher(x, labels, to_target)
    assert distance(found, expected) < 1e-10
    assert distance([dx], [slope]) < 1e-9


def test_bfloat16_agrees_as_far_as_it_can() -> None:
    model = network("resnet18", False)
    x, labels = candidates(2)
    target = [g[0] for g in one_at_a_time(model, x[:1] + 1, labels[:1])]
    for to_target in views_of(target).values():
        expected, slope = matcher_of(model)(x, labels, to_target)
        values, dx = GradientMatcher(model, dtype=torch.bfloat16)(x, labels, to_target)
        assert values.dtype == dx.dtype == torch.float32
        torch.testing.assert_close(values, expected, rtol=0, atol=0.02)
        assert F.cosine_similarity(dx.flatten(1), slope.flatten(1)).min() > 0.9


def test_a_matcher_may_be_used_again() -> None:
    model = network("resnet18", False)
    x, labels = candidates(2)
    to_target = identity_view([torch.ones_like(p) for p in model.parameters()]).distance
    matcher = matcher_of(model)
    first = matcher(x, labels, to_target)
    matcher(2 * x, labels.flip(0), to_target)
    assert all(map(torch.equal, matcher(x, labels, to_target), first))
    del x, first
    assert not any(module._forward_hooks for module in matcher._path._model.modules())


def test_the_slow_path_is_announced() -> None:
    x, labels = candidates(2, size=2)
    with pytest.warns(UserWarning, match=r"^Slow path: the fast one's gradients are off by [\d.]+%\.$"):
        PerSampleGradients(Centred()).dense(x, labels)
    for training in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in ("resnet18", "resnet20", "lenet", "convnet"):
                GradientMatcher(network(name, training))


class Centred(nn.Sequential):
    """Its images mix."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h - h.mean(0) / 2


class Normalised(nn.Module):
    """Norms whose second derivative torch gets wrong under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.layer = nn.LayerNorm([4, 6, 6])
        self.group = nn.GroupNorm(2, 4)
        self.out = nn.Linear(144, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(F.silu(self.layer(F.silu(self.instance(self.stem(x))))))
        return self.out(torch.tanh(x).flatten(1))


@pytest.mark.parametrize("fast", [False, True])
def test_both_paths_are_exact_for_norms(fast: bool) -> None:
    torch.manual_seed(0)
    model = Normalised().double()
    matcher = matcher_of(model)
    matcher.fast = fast
    x, labels = candidates(2, size=8, dtype=torch.float64)
    target = [g[0] for g in one_at_a_time(model, x[:1] + 1, labels[:1])]
    check(matcher, model, x, labels, identity_view(target).distance, 1e-9)
    assert matcher.fast == fast


class Twice(nn.Module):
    """One layer used twice, one not at all: gradients are a sum, and zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x.flatten(1)))).unflatten(1, (3, 4)).sum(1)


def test_a_layer_may_be_used_twice_or_not_at_all() -> None:
    torch.manual_seed(0)
    model = Twice().double()
    x, labels = candidates(2, size=2, dtype=torch.float64)
    target = [torch.ones_like(p) for p in model.parameters()]
    check(matcher_of(model), model, x, labels, identity_view(target).distance, 1e-9)


class Overwriting(nn.Module):
    """Overwrites what a layer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.flatten(1) * 1
        out = self.layer(inputs)
        inputs.add_(1)
        return out


def test_a_model_that_overwrites_what_is_recorded_is_refused() -> None:
    x, labels = candidates(1, size=2)
    model = Overwriting()
    to_target = identity_view([torch.ones_like(p) for p in model.parameters()]).distance
    with pytest.raises((ValueError, RuntimeError), match=r"leave the inputs|modified by an inplace operation"):
        matcher_of(model)(x, labels, to_target)


# -------------------------------------------------------------------------------------- random architectures


@st.composite
def architectures(draw: st.DrawFn, smooth: bool) -> nn.Module:
    """Up to four stages of convolution, norm, activation, some of them residual; then pooling or all positions."""
    channels, size, stages = 3, 7, []
    for _ in range(draw(st.integers(1, 4))):
        groups = draw(st.sampled_from([1, 1, channels]))
        residual = draw(st.booleans())
        width = channels if residual else groups * draw(st.sampled_from([1, 2, 4]))
        kernel, dilation = draw(st.sampled_from([(1, 1), (3, 1), (3, 2), ((1, 3), 1)]))
        padding = (
            (dilation if kernel == 3 else (0, 1) if kernel == (1, 3) else 0) if residual else draw(st.integers(0, 2))
        )
        stride = 1 if residual else draw(st.integers(1, 2))
        conv = nn.Conv2d(channels, width, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
        rooms = zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
        fits = all(size + 2 * pad > step * (k - 1) for pad, step, k in rooms)  # type: ignore[operator]
        out = conv(torch.zeros(1, channels, size, size)).shape[2:] if fits else None
        if out is None or min(out) < 2 or out[0] != out[1]:
            continue
        norm = draw(st.sampled_from([nn.Identity(), nn.BatchNorm2d(width), nn.GroupNorm(1, width)]))
        activation = nn.SiLU() if smooth else draw(st.sampled_from([nn.ReLU(inplace=True), nn.Tanh(), nn.LeakyReLU()]))
        stage = nn.Sequential(conv, norm, activation)
        stages.append(Residual(stage) if residual else stage)
        channels, size = width, out[0]
    pool = draw(st.booleans())
    head = [nn.AdaptiveAvgPool2d(1)] if pool else []
    features = channels if pool else channels * size * size
    return nn.Sequential(*stages, *head, nn.Flatten(), nn.Linear(features, 4, bias=draw(st.booleans())))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def textbook(model: nn.Module, x: Tensor, labels: Tensor, to_target: Distance) -> tuple[Tensor, Tensor]:
    """The distances and their slopes, by double backward."""
    leaf = x.clone().requires_grad_()
    expected = to_target(one_at_a_time(model, leaf, labels, create_graph=True))
    return expected, torch.autograd.grad(expected.sum(), leaf)[0]


def check(
    matcher: GradientMatcher, model: nn.Module, x: Tensor, labels: Tensor, to_target: Distance, tolerance: float
) -> None:
    """Values and slopes are those of the textbook loop."""
    expected, slope = textbook(model, x, labels, to_target)
    values, dx = matcher(x, labels, to_target)
    torch.testing.assert_close(values, expected.detach(), rtol=tolerance, atol=tolerance)
    assert norm([dx - slope]) < tolerance * max(norm([slope]), 1e-6)  # zero where all ReLUs are off


def all_that_views_do(target: list[Tensor]) -> list[Distance]:
    """Cosines of whole gradients, of entries, of products with thin matrices; a sum of distances of entries."""

    def cosine(measure: Callable[[Sequence[Tensor]], list[Tensor]]) -> Distance:
        observed = [m[0] for m in measure([t[None] for t in target])]
        return LinearView(observed, measure, adjoint=list).distance

    def entries(grads: Sequence[Tensor]) -> list[Tensor]:
        return [g.flatten(1)[:, torch.arange(0, g[0].numel(), 3)] for g in grads]

    def matrices(grads: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for g in grads:
            matrix = g.reshape(len(g), g.shape[1], -1)
            right = torch.eye(matrix.shape[2], 2, dtype=g.dtype) + 0.1
            left = torch.eye(2, matrix.shape[1], dtype=g.dtype) + 0.1
            found += [matrix @ right, right.T @ matrix.mT, left @ matrix, matrix.mT @ left.T]
        return found

    def apart(grads: Sequence[Tensor]) -> Tensor:
        return sum(F.softplus(g - t).flatten(1).sum(1) for g, t in zip(grads, target, strict=True))

    def split(grads: Sequence[Tensor]) -> Tensor:
        parts = [g.split([1, 0, len(g) - 1]) for g in grads]
        return torch.cat([cosine(list)([p[i] for p in parts]) for i in (0, 2)])

    def named(grads: Sequence[Tensor]) -> Tensor:
        squares = [g.flatten(1).square() for g in grads]
        kept = sum(s.sum(1, True).squeeze(1) + s.sum(dim=1, keepdim=True).squeeze(1) for s in squares)
        return kept + sum(s.sum(dim=1) for s in squares)

    return [cosine(list), cosine(entries), cosine(matrices), apart, split, named]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), training=st.booleans(), batch=st.integers(1, 3), double=st.booleans())
def test_random_architectures_agree_with_plain_autograd(
    data: st.DataObject, training: bool, batch: int, double: bool
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(data.draw(st.integers(0, 1000)))
        model = data.draw(architectures(smooth=not double))  # in single precision a kink may fall on either side
        x, target_x = torch.randn(2, 3, batch, 3, 7, 7).unbind(0)
    dtype = torch.float64 if double else torch.float32
    model, x, target_x = model.to(dtype).train(training), x.to(dtype), target_x.to(dtype)
    labels = torch.arange(3 * batch).view(3, batch) % 4
    matcher = GradientMatcher(model)
    assert matcher.fast
    if not double:  # where single precision isn't good enough for the textbook, it says nothing about the matcher
        twin = copy.deepcopy(model).double()
        exact = textbook(twin, x.double(), labels, sum_of_squares)[1]
        assume(norm([textbook(model, x, labels, sum_of_squares)[1] - exact]) < 1e-5 * norm([exact]))
    target = [g[0] for g in one_at_a_time(model, target_x[:1], labels[:1])]
    for to_target in all_that_views_do(target):
        check(matcher, model, x, labels, to_target, 1e-8 if double else 1e-4)


def test_a_group_norm_of_nearly_constant_channels_keeps_its_digits() -> None:
    """torch's own derivatives of derivatives leave an error of 5e-4 here."""
    with torch.random.fork_rng():
        torch.manual_seed(774)
        stage = nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1), nn.SiLU())
        first = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2), nn.SiLU())
        model = nn.Sequential(first, Residual(stage), nn.Flatten(), nn.Linear(9, 4, bias=False))
        x, target_x = torch.randn(2, 3, 1, 3, 7, 7).unbind(0)
    labels = torch.arange(3).view(3, 1)
    twin = copy.deepcopy(model).double()
    target = [g[0] for g in one_at_a_time(model, target_x[:1], labels[:1])]
    _, exact = textbook(twin, x.double(), labels, identity_view([t.double() for t in target]).distance)
    _, slope = GradientMatcher(model)(x, labels, identity_view(target).distance)
    assert norm([slope - exact]) < 2e-5 * norm([exact])


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    return sum(g.flatten(1).square().sum(1) for g in grads)
