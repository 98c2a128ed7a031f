"""Whatever a network takes besides images and whatever its loss is, gradients are those of plain autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from raytrust.leak import identity_view
from raytrust.networks.task import Sample, Targets, Task, row_of
from raytrust.persample import GradientMatcher, PerSampleGradients

N, BATCH, CLASSES = 3, 2, 4


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = features(), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = features(), nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Pair(Classifier):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.head(h.mean((2, 3))), h.amax((2, 3))


class Named(Pair):
    def forward(self, x: Tensor) -> dict[str, Any]:
        logits, aux = super().forward(x)
        return {"logits": logits, "aux": [aux], "name": "named"}


class WithAge(Classifier):
    """A second input, of which a layer of its own is made: a branch without the image."""

    def __init__(self) -> None:
        super().__init__()
        self.age = nn.Linear(1, 4)

    def forward(self, age: Tensor, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels).mean((2, 3)) * self.age(age).tanh())


class Averaging(Pair):
    """An output that no batch can be taken from."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, aux = super().forward(x)
        return logits, aux.mean()


WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.7])
LABELS = torch.randint(CLASSES, (N, BATCH), generator=seeded(0))
VALUES = torch.rand(N, BATCH, CLASSES, generator=seeded(1))
MASKS = torch.randint(CLASSES, (N, BATCH, 6, 6), generator=seeded(2))
AGES = torch.rand(N, BATCH, 1, generator=seeded(3))


def two_heads(output: Any, target: Any) -> Tensor:
    logits, aux = (output["logits"], output["aux"][0]) if isinstance(output, dict) else output
    return F.cross_entropy(logits, target["label"]) + 0.3 * F.mse_loss(aux, target["values"])


class Case(NamedTuple):
    network: Callable[[], nn.Module]
    task: Task
    targets: Targets
    fast: bool = True


BOTH = Sample({"label": LABELS, "values": VALUES}, {})
CASES = {
    "cross-entropy": Case(Classifier, Task(), LABELS),
    "probabilities": Case(Classifier, Task(), VALUES.softmax(-1)),
    "bce": Case(Classifier, Task(F.binary_cross_entropy_with_logits), VALUES.round()),
    "label smoothing": Case(Classifier, Task(nn.CrossEntropyLoss(label_smoothing=0.1)), LABELS),
    # Its mean is by the weights of the labels in the batch, so no sum over images.
    "class weights": Case(Classifier, Task(nn.CrossEntropyLoss(weight=WEIGHTS)), LABELS),
    "regression": Case(Classifier, Task(F.mse_loss), VALUES),
    "segmentation": Case(Pixels, Task(F.cross_entropy), MASKS),
    "tuple": Case(Pair, Task(two_heads), BOTH),
    "dict": Case(Named, Task(two_heads), BOTH),
    "second input": Case(WithAge, Task(argument="pixels"), Sample(LABELS, {"age": AGES})),
    "no target": Case(Classifier, Task(lambda output, _: output.square().mean()), Sample(None, {})),
    "mean as output": Case(Averaging, Task(lambda out, y: F.cross_entropy(out[0], y) + out[1]), LABELS, False),
}


def build(case: Case, training: bool, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return case.network().train(training).to(dtype)


def by_autograd(model: nn.Module, case: Case, x: Tensor) -> list[Tensor]:
    rows = []
    for i, one in enumerate(x):
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        weights = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}
        targets = row_of(case.targets, i)
        target, inputs = (targets.target, targets.inputs) if isinstance(targets, Sample) else (targets, {})
        inputs = {name: t.to(x.dtype) for name, t in inputs.items()}
        images = {case.task.argument or "x": one}
        loss = (case.task.loss or F.cross_entropy)(functional_call(model, state, (), {**images, **inputs}), target)
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(w) if g is None else g for g, w in zip(slopes, weights.values(), strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def in_double(case: Case) -> Case:
    """Where the loss holds numbers itself, as they would be in a model of this precision."""
    if not isinstance(case.task.loss, nn.Module):
        return case
    loss = nn.CrossEntropyLoss(
        None if case.task.loss.weight is None else WEIGHTS.double(), label_smoothing=case.task.loss.label_smoothing
    )
    return case._replace(task=Task(loss, case.task.argument))


@pytest.mark.filterwarnings("ignore:Slow path")
@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_their_derivatives_are_those_of_autograd(name: str, training: bool, slow: bool) -> None:
    case = in_double(CASES[name])
    model = build(case, training, torch.float64)
    x = torch.randn(N, BATCH, 3, 6, 6, dtype=torch.float64, generator=seeded(4))
    observed = [g[0].detach() for g in by_autograd(model, case, x[:1] + 1)]
    leaf = x.clone().requires_grad_()
    expected = by_autograd(model, case, leaf)
    values = identity_view(observed).distance(expected)
    (slope,) = torch.autograd.grad(values.sum(), leaf)
    matcher = GradientMatcher(model, task=case.task)
    if slow:
        matcher.fast = False
    ours, dx = matcher(x, case.targets, identity_view(observed).distance)
    assert matcher.fast == (case.fast and not slow)
    torch.testing.assert_close(ours, values.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dx, slope, rtol=1e-7, atol=1e-12)
    for g, e in zip(PerSampleGradients(model, task=case.task).dense(x, case.targets), expected, strict=True):
        torch.testing.assert_close(g, e.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fast])
def test_the_true_image_is_at_a_distance_of_zero(name: str, dtype: torch.dtype) -> None:
    """In single precision the loss gets outputs of the precision that its own numbers are in."""
    case = CASES[name]
    model = build(case, False, dtype)
    x = torch.randn(N, BATCH, 3, 6, 6, generator=seeded(4))
    observed = [g[0].detach() for g in by_autograd(model.float(), case, x[:1])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, _ = GradientMatcher(model.to(dtype), task=case.task)(x, case.targets, identity_view(observed).distance)
    assert abs(float(values[0])) < 1e-6
    assert name == "no target" or float(values[1]) > 1e-3


def test_products_with_a_message_are_of_the_same_loss() -> None:
    case = CASES["second input"]
    model = build(case, False, torch.float64)
    x = torch.randn(N, BATCH, 3, 6, 6, dtype=torch.float64, generator=seeded(4))
    direction = [torch.randn(p.shape, dtype=torch.float64, generator=seeded(5)) for p in model.parameters()]
    expected = by_autograd(model, case, x)
    for slow in (False, True):
        gradients = PerSampleGradients(model, task=case.task)
        gradients.fast = not slow
        losses, inner, squared = gradients.products_and_norms(x, case.targets, direction)
        pairs = zip(expected, direction, strict=True)
        torch.testing.assert_close(inner, sum(g.flatten(1) @ d.flatten() for g, d in pairs).detach())
        torch.testing.assert_close(squared, sum(g.flatten(1).square().sum(1) for g in expected).detach())
        single = [case.task.batch_loss(model, x[i], _double(row_of(case.targets, i))) for i in range(N)]
        torch.testing.assert_close(losses, torch.stack(single).detach())


def _double(targets: Sample) -> Sample:
    return Sample(targets.target, {name: t.double() for name, t in targets.inputs.items()})


def test_labels_are_optimised_for_cross_entropy_alone() -> None:
    model = build(CASES["bce"], False, torch.float32)
    with pytest.raises(ValueError, match=r"^Expected cross-entropy, for which alone labels can be optimised"):
        GradientMatcher(model, task=CASES["bce"].task).jointly(
            torch.randn(1, 1, 3, 6, 6), torch.randn(1, 1, CLASSES), lambda grads: grads[0].flatten(1).sum(1)
        )


def test_modes_of_modules_are_taken_as_they_are() -> None:
    """The first norm by its batch, the second by what it has seen."""
    torch.manual_seed(0)
    model = nn.Sequential(features(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, CLASSES))
    model[2].eval()
    model = model.double()
    x = torch.randn(N, BATCH, 3, 6, 6, dtype=torch.float64, generator=seeded(4))
    case = Case(lambda: model, Task(), LABELS)
    rows = [
        torch.autograd.grad(F.cross_entropy(model(one), y), list(model.parameters()))
        for one, y in zip(x, LABELS, strict=True)
    ]
    matcher = PerSampleGradients(model, task=case.task)
    for g, e in zip(matcher.dense(x, LABELS), zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(e))
    assert matcher.fast
