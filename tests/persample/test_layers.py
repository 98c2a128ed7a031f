"""Layers and ways to use a weight: by the fast path, with the gradients of plain autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_tasks import seeded
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from raytrust.networks.task import CROSS_ENTROPY, Sample, Targets, Task, row_of
from raytrust.persample import GradientMatcher, PerSampleGradients

N, BATCH, CLASSES, TOKENS, WIDTH = 3, 2, 4, 5, 6


class Lambda(nn.Module):
    """A function of what comes in and of the module's parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.function(self, x, *rest)


def tokens(*layers: nn.Module) -> nn.Sequential:
    """On TOKENS tokens of an image (3, 10, 2)."""
    patches = nn.Conv2d(3, WIDTH, 2, 2)
    return nn.Sequential(patches, nn.Flatten(2), Lambda(lambda _, x: x.mT), *layers, nn.Tanh(), Pool())


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))


def planes(*layers: nn.Module) -> nn.Sequential:
    """Layers that take (WIDTH, 9, 1)."""
    mean = Lambda(lambda _, x: x.flatten(2).mT)
    return nn.Sequential(nn.Conv2d(3, WIDTH, 2), *layers, nn.Tanh(), mean, Pool())


def line(*layers: nn.Module) -> nn.Sequential:
    """Layers that take (WIDTH, 9)."""
    return nn.Sequential(nn.Conv2d(3, WIDTH, 2), nn.Flatten(2), *layers, nn.Tanh(), Lambda(lambda _, x: x.mT), Pool())


def attention(**options: Any) -> nn.Module:
    """Of a token to others, with a mask; the weights of the attention come in, too."""
    mask, padding = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), torch.tensor([False] * 4 + [True])

    def forward(self: Any, x: Tensor) -> Tensor:
        y, shares = self.layer(x, x, x, attn_mask=mask, key_padding_mask=padding.expand(len(x), -1))
        return y + shares @ x

    return Lambda(forward, layer=nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options))


def cross_attention(kdim: int | None) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.layer(self.query.expand(len(x), -1, -1), x, x * 2, need_weights=False)[0].mean(1, keepdim=True)

    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=kdim, vdim=kdim, bias=kdim is None)
    return Lambda(forward, layer=layer, query=torch.randn(1, 2, WIDTH))


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Standardised(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation)


class ScaledStandardised(nn.Conv2d):
    """As timm's ScaledStdConv2d."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * 0.3).view(-1)
        weight = F.batch_norm(weight, None, None, weight=gain, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))


class ChannelsLastNorm(nn.LayerNorm):
    """As torchvision's LayerNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def own_attention(self: Any, x: Tensor) -> Tensor:
    """With a table of relative positions, as Swin's, by torch's kernel."""
    q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    index = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).flatten() + TOKENS - 1
    bias = self.table[index].view(TOKENS, TOKENS, -1).permute(2, 0, 1).contiguous()[None]
    return x + F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def with_class_token(self: Any, x: Tensor) -> Tensor:
    return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions


def position_by_index(self: Any, x: Tensor) -> Tensor:
    return x + self.layer(torch.arange(TOKENS))


def cosine_head(self: Any, x: Tensor) -> Tensor:
    return 4 * F.linear(F.normalize(x, dim=-1), F.normalize(self.layer.weight))


def mixer(self: Any, x: Tensor) -> Tensor:
    return x + self.across @ x + (x @ self.along).tanh()


def scale(*shape: int) -> Tensor:
    return torch.rand(shape, generator=seeded(9)) + 0.5


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: tokens(nn.LayerNorm(WIDTH)),
    "LayerNorm over two dimensions": lambda: tokens(nn.LayerNorm([TOKENS, WIDTH], bias=False)),
    "LayerNorm over channels": lambda: planes(ChannelsLastNorm(WIDTH)),
    "RMSNorm": lambda: tokens(nn.RMSNorm(WIDTH)),
    "GroupNorm": lambda: planes(nn.GroupNorm(2, WIDTH)),
    "InstanceNorm2d": lambda: planes(nn.InstanceNorm2d(WIDTH, affine=True)),
    "InstanceNorm1d, tracked": lambda: line(nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True)),
    "BatchNorm1d": lambda: line(nn.BatchNorm1d(WIDTH)),
    "SyncBatchNorm, frozen": lambda: planes(nn.SyncBatchNorm(WIDTH)),
    "weight_norm of a linear layer": lambda: tokens(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
    "norm and activation": lambda: planes(NormAndActivation(WIDTH)),
    "norm without weights, of a type of its own": lambda: planes(NormAndActivation(WIDTH, affine=False)),
    "Conv1d": lambda: line(nn.Conv1d(WIDTH, WIDTH, 3, 2, 1, 2, groups=2)),
    "Conv1d, same": lambda: line(nn.Conv1d(WIDTH, WIDTH, 4, padding="same", dilation=2, bias=False)),
    "Conv1d, circular": lambda: line(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")),
    "Conv3d": lambda: planes(nn.Unflatten(1, (1, WIDTH)), nn.Conv3d(1, 2, (1, 3, 1), 1, 0), nn.Flatten(1, 2), shrink()),
    "ConvTranspose1d": lambda: line(nn.ConvTranspose1d(WIDTH, WIDTH, 3, 2, 1, 1)),
    "ConvTranspose2d": lambda: planes(nn.ConvTranspose2d(WIDTH, WIDTH, (3, 2), 2, (1, 0), (1, 0), 2, True, (2, 1))),
    "ConvTranspose2d without bias": lambda: planes(nn.ConvTranspose2d(WIDTH, WIDTH, 2, bias=False)),
    "PReLU": lambda: planes(nn.PReLU(WIDTH)),
    "PReLU of one weight": lambda: tokens(nn.PReLU()),
    "Bilinear": lambda: tokens(Lambda(lambda m, x: m.layer(x, x.tanh()), layer=nn.Bilinear(WIDTH, WIDTH, WIDTH))),
    "MultiheadAttention": lambda: tokens(attention()),
    "MultiheadAttention without bias": lambda: tokens(attention(bias=False)),
    "MultiheadAttention from a learned query": lambda: tokens(cross_attention(None)),
    "MultiheadAttention of other widths": lambda: tokens(cross_attention(WIDTH)),
    "TransformerEncoder": lambda: tokens(encoder()),
    "TransformerEncoder, norm first": lambda: tokens(encoder(norm_first=True, activation=F.gelu)),
    "attention by torch's kernel": lambda: tokens(
        Lambda(own_attention, qkv=nn.Linear(WIDTH, 3 * WIDTH), table=scale(2 * TOKENS - 1, 2))
    ),
    "class token and positions": lambda: tokens(
        Lambda(with_class_token, token=scale(1, 1, WIDTH), positions=scale(1, TOKENS + 1, WIDTH))
    ),
    "positions by index": lambda: tokens(Lambda(position_by_index, layer=nn.Embedding(TOKENS, WIDTH))),
    "scale of channels": lambda: planes(Lambda(lambda m, x: m.scale * x, scale=scale(WIDTH, 1, 1))),
    "scale of features, in place": lambda: tokens(Lambda(lambda m, x: (1 * x).mul_(m.scale), scale=scale(WIDTH))),
    "scale of one number": lambda: tokens(Lambda(lambda m, x: x / m.scale - m.scale, scale=scale())),
    "weight standardisation": lambda: planes(Standardised(WIDTH, WIDTH, 3, 1, 1)),
    "scaled weight standardisation": lambda: planes(ScaledStandardised(WIDTH, WIDTH, 3, 1, 1)),
    "cosine head": lambda: tokens(Lambda(cosine_head, layer=nn.Linear(WIDTH, WIDTH))),
    "mixer by products": lambda: tokens(Lambda(mixer, across=scale(TOKENS, TOKENS), along=scale(WIDTH, WIDTH))),
    "einsum": lambda: tokens(Lambda(lambda m, x: torch.einsum("nld,de->nle", x, m.weight), weight=scale(WIDTH, 6))),
    "norm of a token": lambda: tokens(
        Lambda(lambda m, x: x + m.norm(m.token), token=scale(1, 1, WIDTH), norm=nn.LayerNorm(WIDTH))
    ),
    "linear layer of a token": lambda: tokens(
        Lambda(lambda m, x: x + m.layer(m.token).tanh(), token=scale(1, WIDTH), layer=nn.Linear(WIDTH, WIDTH))
    ),
}


def shrink() -> nn.Module:
    return nn.Conv2d(2 * WIDTH, WIDTH, 1)


def of(make: Callable[[], nn.Module], training: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().train(training)
        for p in model.parameters():
            if p.ndim == 1:
                p.data.add_(0.2 * torch.rand_like(p))
        return model.double()


def by_autograd(model: nn.Module, x: Tensor, targets: Targets, task: Task) -> list[Tensor]:
    rows = []
    for i, one in enumerate(x):
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        weights = [state[name].requires_grad_() for name, _ in model.named_parameters()]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = task.batch_loss(lambda *a, s=state, **k: functional_call(model, s, a, k), one, row_of(targets, i))
        rows.append(torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def check(
    model: nn.Module, x: Tensor, targets: Targets, task: Task = CROSS_ENTROPY, slow: bool = False
) -> GradientMatcher:
    """Gradients and their derivatives are those of autograd; the matcher that had them."""
    leaf = x.clone().requires_grad_()
    expected = by_autograd(model, leaf, targets, task)
    directions = [torch.randn(p.shape, dtype=x.dtype, generator=seeded(5)) for p in model.parameters()]

    def distance(gradients: Any) -> Tensor:
        terms = [g.reshape(len(g), -1) for g in gradients]
        inner = [t @ d.flatten() for t, d in zip(terms, directions, strict=True)]
        return torch.stack([*inner, *(t.square().sum(1) for t in terms)]).sum(0)

    values = distance(expected)
    (slope,) = torch.autograd.grad(values.sum(), leaf)
    matcher, gradients = GradientMatcher(model, task=task), PerSampleGradients(model, task=task)
    matcher.fast = gradients.fast = not slow
    for _ in range(2):
        ours, dx = matcher(x, targets, distance)
        torch.testing.assert_close(ours, values.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(dx, slope, rtol=1e-7, atol=1e-11)
        for g, e in zip(gradients.dense(x, targets), expected, strict=True):
            torch.testing.assert_close(g, e.detach(), rtol=1e-9, atol=1e-11)
    assert matcher.fast == gradients.fast
    return matcher


IMAGES = torch.randn(N, BATCH, 3, 10, 2, dtype=torch.float64, generator=seeded(4))
LABELS = torch.randint(CLASSES, (N, BATCH), generator=seeded(0))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_fast_and_right(name: str, training: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(of(LAYERS[name], training and "frozen" not in name), IMAGES, LABELS).fast


@pytest.mark.parametrize("name", ["positions by index", "weight standardisation", "ConvTranspose2d", "PReLU", "einsum"])
def test_gradients_are_in_single_precision_whatever_the_passes_run_in(name: str) -> None:
    """The last digits of a sum over many positions would be gone in bfloat16."""
    model = of(LAYERS[name]).float()
    exact = PerSampleGradients(model).dense(IMAGES.float(), LABELS)
    rough = PerSampleGradients(model, dtype=torch.bfloat16)
    for g, e in zip(rough.dense(IMAGES.float(), LABELS), exact, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() < 0.1 * e.norm() + 0.01
    assert rough.fast


@pytest.mark.parametrize("name", ["attention by torch's kernel", "TransformerEncoder", "MultiheadAttention"])
def test_attention_is_right_by_the_slow_path(name: str) -> None:
    check(of(LAYERS[name]), IMAGES, LABELS, slow=True)


@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
def test_the_hard_sigmoid_has_a_second_derivative(slow: bool) -> None:
    found = []
    for function in (nn.Hardsigmoid(), Lambda(lambda _, x: (x / 6 + 0.5).clamp(0, 1))):
        matcher = GradientMatcher(of(lambda f=function: planes(f)))
        matcher.fast = not slow
        found.append(matcher(IMAGES, LABELS, lambda grads: sum(g.flatten(1).square().sum(1) for g in grads)))
    torch.testing.assert_close(*found)


class Reader(nn.Module):
    """Words that the attacker knows, beside an image."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, WIDTH, padding_idx=0), nn.Embedding(4, WIDTH)
        self.eye, self.norm, self.head = nn.Linear(60, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = self.words(text) + self.positions(torch.arange(text.shape[1]))
        return self.head((self.norm(h) * self.eye(x.flatten(1))[:, None]).tanh().sum(1))


@pytest.mark.parametrize("candidates", [1, 2, 4, 5])
def test_words_are_by_image_and_positions_are_not(candidates: int) -> None:
    """Also where there are as many candidates as positions."""
    x = torch.randn(candidates, 1, 3, 10, 2, dtype=torch.float64, generator=seeded(4))
    text = torch.randint(7, (candidates, 1, 4), generator=seeded(6))
    labels = torch.arange(candidates)[:, None] % CLASSES
    assert check(of(Reader), x, Sample(labels, {"text": text})).fast
