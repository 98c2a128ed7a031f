"""Whatever a model does, its gradients are those of plain autograd, for every attack, by the fast path or the slow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import raytrust.persample
from raytrust.config import ModelConfig
from raytrust.networks.build import build_model
from raytrust.persample import GradientMatcher, PerSampleGradients, register_rule
from raytrust.persample.fast import FastPath
from raytrust.persample.rules import RULES


def stack(*layers: nn.Module) -> nn.Sequential:
    """Layers from (3, 8, 8) to (4, 6, 6), and a linear one."""
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(144, 4))


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3)


class DoubledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).tanh()


class ShortcutBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x) + x


class GatedGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight.abs()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = conv(), nn.Linear(144, 4)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


class WeightUsedOutside(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return self.linear(h) + h @ self.linear.weight.T.tanh()


class AttributesRead(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        return self.linear(input=h.view(-1, self.linear.in_features)) * self.conv.kernel_size[0]


class BranchWithoutImage(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.constant = nn.Linear(5, 4), nn.Buffer(torch.randn(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate(self.constant).tanh()


class UnderNoGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.features(x)
        return self.linear(h)


class Detached(Net):
    """A second branch that reads the image, after a first that does not hand on a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).detach()) + self.skip(x.flatten(1)).tanh()


class Mixing(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return self.linear(h - h.mean(0) / 2)


class Deep(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.conv, self.a, self.linear = conv(), nn.Linear(144, 144), nn.Linear(144, 4)
        self.b = nn.Linear(144, 144) if tied else self.a
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).flatten(1)
        return self.linear(torch.tanh(self.b(torch.tanh(self.a(h)))))


def changed(change: Callable[[nn.Conv2d], object]) -> nn.Sequential:
    layer = conv()
    change(layer)
    return stack(layer)


def prehook(layer: nn.Module) -> object:
    return layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


def hook(layer: nn.Module) -> object:
    return layer.register_forward_hook(lambda _, inputs, output: 2 * output.tanh())


def own_forward(layer: nn.Module) -> object:
    return setattr(layer, "forward", lambda x: 2 * F.conv2d(x, layer.weight, layer.bias).tanh())


def hooked_activation() -> nn.Sequential:
    model = stack(conv())
    hook(model[1])
    return model


# By name: the model, and whether the fast path serves it.
MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "plain": (lambda: stack(conv()), True),
    "subclass of Conv2d": (lambda: stack(DoubledConv(3, 4, 3)), True),
    "subclass of BatchNorm2d": (lambda: stack(conv(), ShortcutBatchNorm(4)).eval(), True),
    "subclass of BatchNorm2d, training": (lambda: stack(conv(), ShortcutBatchNorm(4)), True),
    "subclass of GroupNorm": (lambda: stack(conv(), GatedGroupNorm(2, 4)), True),
    "batch norm, training": (lambda: stack(conv(), nn.BatchNorm2d(4)), True),
    "batch norm without statistics": (lambda: stack(conv(), nn.BatchNorm2d(4, track_running_stats=False)).eval(), True),
    "batch norm without weights": (lambda: stack(conv(), nn.BatchNorm2d(4, affine=False)).eval(), True),
    "group norm without weights": (lambda: stack(conv(), nn.GroupNorm(2, 4, affine=False)), True),
    "circular padding": (lambda: stack(nn.Conv2d(3, 4, 5, padding=1, padding_mode="circular")), True),
    "same padding": (lambda: stack(nn.Conv2d(3, 4, (2, 3), padding="same"), nn.AvgPool2d(3, 1)), True),
    "weight used outside its layer": (WeightUsedOutside, True),
    "attributes of layers read": (AttributesRead, True),
    "branch without the image": (BranchWithoutImage, True),
    "first layers under no_grad": (UnderNoGrad, True),
    "first layers detached": (Detached, True),
    "first layers frozen": (lambda: changed(lambda layer: layer.requires_grad_(False)), True),
    "a frozen layer without a rule": (lambda: stack(conv(), nn.LayerNorm(6).requires_grad_(False)), True),
    "all frozen": (lambda: stack(conv()).requires_grad_(False), True),
    "tied weights": (lambda: Deep(tied=True), True),
    "a module used twice": (lambda: Deep(tied=False), True),
    "images that mix": (Mixing, False),
    "forward pre-hook": (lambda: changed(prehook), True),
    "forward hook": (lambda: changed(hook), True),
    "hook on an activation": (hooked_activation, True),
    "a forward of its own": (lambda: changed(own_forward), False),
    "weight_norm, by a hook": (lambda: changed(weight_norm), True),
    "spectral_norm, by a hook": (lambda: changed(spectral_norm).eval(), True),
    "spectral_norm, by a hook, training": (lambda: changed(spectral_norm), True),
    "weight_norm, parametrised": (lambda: changed(parametrizations.weight_norm), True),
    "spectral_norm, parametrised": (lambda: changed(parametrizations.spectral_norm).eval(), True),
    "spectral_norm, parametrised, training": (lambda: changed(parametrizations.spectral_norm), True),
    "a parametrisation": (
        lambda: changed(lambda layer: parametrize.register_parametrization(layer, "weight", Squared())),
        True,
    ),
    "no rule": (lambda: stack(conv(), nn.LayerNorm(6)), True),
    "bfloat16": (lambda: stack(conv(), nn.GroupNorm(2, 4)).bfloat16(), True),
    "bfloat16, no rule": (lambda: stack(conv(), nn.LayerNorm(6)).bfloat16(), True),
}


def model_of(name: str) -> nn.Module:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of weight_norm by a hook
        torch.manual_seed(0)
        return MODELS[name][0]()


def images(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, batch, 3, 8, 8, generator=generator), torch.randint(4, (3, batch), generator=generator)


def by_autograd(name: str, x: Tensor, labels: Tensor) -> list[Tensor]:
    """One fresh model for each candidate, in float32 at least; zeros for what is frozen, unless everything is."""
    rows = []
    for one, targets in zip(x, labels, strict=True):
        model = model_of(name).float()
        parameters = list(model.parameters())
        if not any(p.requires_grad for p in parameters):
            model.requires_grad_(True)
        F.cross_entropy(model(one), targets).backward(create_graph=True)
        rows.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    one, other = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (a, b))
    return 1.0 if not one.any() and not other.any() else float(F.cosine_similarity(one, other, dim=0))


def distance(gradients: Sequence[Tensor]) -> Tensor:
    """Inner products and norms, of ghosts or of plain tensors."""
    generator = torch.Generator().manual_seed(2)
    terms = []
    for g in gradients:
        rows = g.reshape(len(g), -1)
        terms += [rows @ torch.randn(rows.shape[1], generator=generator), rows.square().sum(1)]
    return torch.stack(terms).sum(0)


@pytest.fixture
def one_warning_at_most(request: pytest.FixtureRequest) -> object:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught]
    fast = MODELS[request.node.callspec.params["name"]][1]
    assert len(said) == (0 if fast else 1), said
    assert all(text.startswith("Slow path: ") and "\n" not in text for text in said)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.usefixtures("one_warning_at_most")
@pytest.mark.parametrize("name", MODELS)
def test_inversion(name: str) -> None:
    x, labels = images(batch=2)
    leaf = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = distance(by_autograd(name, leaf, labels))
    (slope,) = torch.autograd.grad(expected.sum(), leaf, allow_unused=True)
    matcher = GradientMatcher(model_of(name))
    for _ in range(2):
        values, dx = matcher(x, labels, distance)
        torch.testing.assert_close(values, expected.detach(), rtol=1e-4, atol=1e-4)
        assert cosine([dx], [torch.zeros_like(dx) if slope is None else slope]) > 0.999
    assert matcher.fast == MODELS[name][1]


@pytest.mark.usefixtures("one_warning_at_most")
@pytest.mark.parametrize("name", MODELS)
def test_membership_and_the_learned_attack(name: str) -> None:
    x, labels = images(batch=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = by_autograd(name, x, labels)
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(g[0].shape, generator=generator) for g in expected]
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = PerSampleGradients(model)
    losses, inner, squared = gradients.products_and_norms(x, labels, direction)
    norms = sum(g.flatten(1).square().sum(1) for g in expected).sqrt()
    inner_products = sum(g.flatten(1) @ d.flatten() for g, d in zip(expected, direction, strict=True))
    torch.testing.assert_close(squared.sqrt(), norms, rtol=1e-3, atol=0)
    torch.testing.assert_close(inner / norms, inner_products / norms, rtol=0, atol=1e-3)
    twin = model_of(name).float()
    for i in range(len(x)):
        if "training" not in name:  # where the first loss changes the buffers
            torch.testing.assert_close(losses[i], F.cross_entropy(twin(x[i]), labels[i]).detach(), rtol=1e-4, atol=0)
    dense = gradients.dense(x, labels)
    assert [g.shape for g in dense] == [g.shape for g in expected]
    for i in range(len(x)):
        assert cosine([g[i] for g in dense], [e[i] for e in expected]) > 0.999
    assert gradients.fast == MODELS[name][1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -------------------------------------------------------------------------------------------- the first call


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["lenet", "resnet18", "resnet20", "convnet"])
def test_the_check_does_not_cry_wolf(name: str, training: bool) -> None:
    """In single precision ReLUs turn by rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            matcher = GradientMatcher(build_model(ModelConfig(name, width=3), 3, 4, seed).train(training))  # type: ignore[arg-type]
            matcher.dense(torch.randn(1, 2, 3, 16, 16), torch.tensor([[0, 3]]))
            assert matcher.fast


def test_weights_that_are_not_finite_convict_nobody() -> None:
    model = stack(conv())
    nn.init.constant_(model[0].weight, torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(g.isfinite().any() for g in PerSampleGradients(model).dense(*images(1))[:-1])


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def scale_rule(layer: Scale, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    return {"scale": (inputs * signals).unflatten(0, (n, -1)).sum((1, 3, 4))[..., None, None]}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrust.persample.rules.RULES", dict(RULES))


def agrees(model: nn.Module) -> bool:
    """Whether the fast path serves it; the gradients are right by any path."""
    x, labels = images(2)
    matcher = GradientMatcher(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, dx = matcher(x, labels, distance)
        leaf = x.clone().requires_grad_()
        expected = distance(raytrust.persample.plain.per_candidate_gradients(model, leaf, labels))
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(values, expected.detach(), rtol=1e-4, atol=1e-4)
    assert cosine([dx], [slope]) > 0.999
    return matcher.fast


@pytest.mark.usefixtures("registry")
def test_a_rule_of_one_s_own_is_taken() -> None:
    rule = Mock(side_effect=scale_rule)
    register_rule(Scale)(rule)
    assert agrees(stack(conv(), Scale()))
    assert rule.called


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "fault",
    [
        lambda rule: {"scale": 1.1 * rule["scale"]},
        lambda rule: {"scale": rule["scale"].detach()},
        lambda rule: {"scale": rule["scale"].nan_to_num() * torch.nan},
        lambda rule: {"scale": rule["scale"][:, :, 0]},
        lambda rule: {},
    ],
    ids=["values", "derivative", "not finite", "shape", "missing"],
)
def test_a_wrong_rule_is_found_out(fault: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    register_rule(Scale)(lambda *args: fault(scale_rule(*args)))
    assert not agrees(stack(conv(), Scale()))


@pytest.mark.usefixtures("registry")
def test_the_rule_in_the_readme_holds() -> None:
    assert raytrust.persample.__file__ is not None
    text = (Path(raytrust.persample.__file__).parent / "README.md").read_text(encoding="utf-8")
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert agrees(stack(conv(), nn.LayerNorm([4, 6, 6])))


def test_a_lack_of_memory_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FastPath, "gradients", full)
    with pytest.raises(torch.OutOfMemoryError):
        PerSampleGradients(stack(conv())).dense(*images(1))


# ---------------------------------------------------------------------------------------------- soft labels


@pytest.mark.parametrize("layers", [lambda: (conv(), nn.BatchNorm2d(4)), lambda: (conv(), nn.LayerNorm(6))])
def test_labels_may_be_soft(layers: Callable[[], tuple[nn.Module, ...]]) -> None:
    torch.manual_seed(0)
    model = stack(*layers()).double()
    x, _ = images(2)
    x, logits = x.double().requires_grad_(), torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    rows = []
    for one, soft in zip(x, logits, strict=True):
        twin = copy.deepcopy(model)
        loss = F.cross_entropy(twin(one), soft.softmax(-1))
        rows.append(torch.autograd.grad(loss, list(twin.parameters()), create_graph=True))
    expected = sum_of_squares([torch.stack(column) for column in zip(*rows, strict=True)])
    slopes = torch.autograd.grad(expected.sum(), (x, logits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = GradientMatcher(model).jointly(x, logits, sum_of_squares)
    for ours, theirs in zip(found, (expected, *slopes), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-11)


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in gradients]).sum(0)
