"""A batch of images from one linear layer's gradient, before a ReLU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import raytrust
from raytrust.attacks.inversion import separation
from raytrust.attacks.inversion.separation import separate
from raytrust.config import InversionConfig


def network(activation: nn.Module, outputs: int = 256) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, outputs), activation, nn.Linear(outputs, 10))


def images(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.rand((n, 3, 8, 8), generator=generator), torch.randint(10, (n,), generator=generator)


def separated(model: nn.Sequential, x: Tensor, y: Tensor, count: int | None = None, noise: float = 0) -> Tensor | None:
    weight, bias = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())[:2])
    weight = weight + noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.abs().max()
    layer = (model[1].weight.detach(), model[1].bias.detach())
    found = separate(layer, (weight, bias), len(x) if count is None else count)
    return None if found is None else found[0]


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_every_image_of_a_batch_is_found_to_rounding(n: int) -> None:
    """Also of one class: labels tell nothing here."""
    model, (x, y) = network(nn.ReLU()), images(n)
    for labels in (y, torch.zeros_like(y)):
        found = separated(model, x, labels)
        assert found is not None
        distances = torch.cdist(x.flatten(1).double(), found)
        assert sorted(distances.argmin(1).tolist()) == list(range(n))
        assert float(distances.amin(1).max()) < 1e-3 * float(x.flatten(1).norm(dim=1).min())


def test_what_can_t_be_told_apart() -> None:
    relu, (x, y) = network(nn.ReLU()), images(4)
    assert separated(network(nn.Sigmoid()), x, y) is None  # no signal is zero
    assert separated(relu, x, y, noise=1e-3) is None  # of full rank
    assert separated(relu, x, y, count=3) is None
    assert separated(relu, torch.cat([x, x[:1]]), torch.cat([y, y[:1]])) is None  # one image twice has one signal
    assert separated(network(nn.ReLU(), outputs=3), x, y) is None  # more images than outputs


@pytest.mark.parametrize(("activation", "rounds"), [(nn.Sigmoid(), 4), (nn.LeakyReLU(), 16)])
def test_what_fails_has_failed_in_some_seconds(
    activation: nn.Module, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a decomposition of the whole layer, which takes a minute for a large one, and after few rounds."""
    kernels, svd, drawn, larger = separation._kernels, torch.linalg.svd, [], []

    def count(columns: Tensor, generator: torch.Generator) -> Tensor:
        drawn.append(len(columns))
        return kernels(columns, generator)

    def measure(x: Tensor, full_matrices: bool = True) -> Any:
        larger.append(min(x.shape[-2:]))
        return svd(x, full_matrices=full_matrices)

    monkeypatch.setattr(separation, "_kernels", count)
    monkeypatch.setattr(torch.linalg, "svd", measure)
    assert separated(network(activation, outputs=1500), *images(8)) is None
    assert len(drawn) <= rounds
    assert max(drawn) <= 1024
    assert max(larger) <= 16


def test_outputs_that_no_image_reaches_cost_no_draws() -> None:
    """Nine of ten are dead: of rows among all of them hardly any would tell of an image."""
    model, (x, y) = network(nn.ReLU(), outputs=1000), images(6)
    with torch.no_grad():
        model[1].bias[100:] = -100
    found = separated(model, x, y)
    assert found is not None
    assert float(torch.cdist(x.flatten(1).double(), found).amin(1).max()) < 1e-3


def test_powersgd_of_the_rank_of_the_batch_gives_it_away() -> None:
    """Its factors are the layer's gradient, whole; of a lower rank nothing is left of this."""
    x, y = images(24)
    result = raytrust.audit(
        network(nn.ReLU()), x, y, ["none", "powersgd:4", "powersgd:2", "noise:0.01"], batch_size=4, evaluation=2,
        tuning=1, attack=InversionConfig(iterations=2), progress=False,
    )  # fmt: skip
    found = {row["name"]: row for row in result.rows}
    for name in ("none", "PowerSGD rank 4"):
        assert found[name]["leakage_ssim"] > 0.99
        assert found[name]["attack"]["method"] == "analytic"
    for name in ("PowerSGD rank 2", "noise 0.01"):
        assert found[name]["leakage_ssim"] < 0.5
        assert found[name]["attack"]["method"] == "optimise"


def test_batches_that_can_t_be_told_apart_leave_the_others_found() -> None:
    """Of an attack that fails on one batch nothing would be reported, and all would look private."""
    x, y = images(24)
    x, y = x.clone(), y.clone()
    x[8:10], y[8:10] = x[8], y[8]  # in the last batch that is reported one image comes twice
    result = raytrust.audit(
        network(nn.ReLU()), x, y, ["none"], batch_size=4, evaluation=2, tuning=1,
        attack=InversionConfig(iterations=2), progress=False,
    )  # fmt: skip
    (row,) = result.rows
    assert row["attack"]["method"] == "analytic"
    assert row["leakage_ssim"] == pytest.approx(0.5, abs=0.25)
    reached = next(r for r in result.defences[0].reported if r.attack.method == "analytic")
    assert min(reached.ssim[:4]) > 0.99
    assert reached.objective[1] == 1
