"""Attacks on decoded messages, and the products they are made of: against plain autograd, one image at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from toys import synthetic

from raytrust.attacks.membership.messages import message_scores
from raytrust.config import (
    CaptureConfig,
    Defence,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
    TrainConfig,
)
from raytrust.leak.observation import Capture, Observation, decoded
from raytrust.metrics.roc import auc
from raytrust.networks.build import build_model
from raytrust.persample.engine import PerSampleGradients
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel, Message

MODELS = {
    "convnet": ModelConfig("convnet", width=3),
    "resnet18": ModelConfig("resnet18", width=2),
    "resnet18, whose last stages take the Gram matrices": ModelConfig("resnet18", stem="imagenet", width=8),
}


def inputs(config: ModelConfig, n: int = 5) -> tuple[nn.Module, Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    model = build_model(config, 3, 4, seed=0)
    x, labels = torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 4
    if config.name == "resnet18":
        model.train()(x)  # running statistics that differ from 0 and 1
    model.eval()
    return model, x, labels, [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def products_and_norms(
    model: nn.Module, x: Tensor, labels: Tensor, direction: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return PerSampleGradients(model).products_and_norms(x[:, None], labels[:, None], direction)


@pytest.mark.parametrize("name", MODELS)
def test_products_and_norms_are_those_of_autograd(name: str) -> None:
    model, x, labels, direction = inputs(MODELS[name])
    losses, inner, squared = products_and_norms(model, x, labels, direction)
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert losses[i] == pytest.approx(loss.item(), rel=1e-4)
        expected = sum(float((g.double() * d).sum()) for g, d in zip(grads, direction, strict=True))
        norm = sum(float(g.double().square().sum()) for g in grads)
        assert float(inner[i]) == pytest.approx(expected, rel=1e-3, abs=1e-4 * norm**0.5)
        assert float(squared[i]) == pytest.approx(norm, rel=1e-3)


def test_inner_products_are_one_forward_mode_product() -> None:
    model, x, labels, direction = inputs(MODELS["convnet"])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = dict(zip(parameters, direction, strict=True))

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x,)), labels, reduction="none")

    _, expected = jvp(losses, (parameters,), (tangents,))
    torch.testing.assert_close(products_and_norms(model, x, labels, direction)[1], expected)


def test_the_model_is_left_as_it_was() -> None:
    model, x, labels, direction = inputs(MODELS["resnet18"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    products_and_norms(model, x, labels, direction)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


DATA = synthetic(train=160, test=64)
RUN = TrainConfig(
    model=ModelConfig("convnet", width=8),
    threat=Threat(batch_size=4),
    capture=CaptureConfig(steps=(0,), tuning=1, evaluation=3),
    workers=1,
    batch_size=8,
    steps=1,
)


def captured(defence: Defence, **threat: object) -> list[Capture]:
    config = replace(RUN, defence=defence, threat=replace(RUN.threat, **threat))
    return [r for r in train(config, DATA, LocalChannel()) if isinstance(r, Capture)]


def test_scores_are_their_formulas() -> None:
    capture = captured(Defence())[0]
    x, labels = capture.truth.images, capture.truth.labels
    seen = capture.seen
    (message,), images = seen.build_compressor().decode(seen.messages, "link"), 4
    assert decoded(seen)[1] == images
    found = message_scores(seen, x, labels, chunk=3)
    model = seen.build_model()
    normal = (x - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
    for i in range(4):
        loss = F.cross_entropy(model(normal[i : i + 1]), labels[i : i + 1])
        g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()))])
        m = torch.cat([p.flatten() for p in message])
        assert float(found.cosine[i]) == pytest.approx(float(F.cosine_similarity(g, m, dim=0)), rel=1e-3)
        expected = float(2 * images * (g @ m) - g @ g)
        assert float(found.gradient_difference[i]) == pytest.approx(expected, rel=1e-3)
        assert float(found.loss[i]) == pytest.approx(-loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    "defence",
    [Defence(), Defence(PowerSGDConfig(1)), Defence(TopKConfig(level=0.02)), Defence(TopKConfig(level=0.02), True)],
    ids=lambda d: d.name,
)
def test_messages_of_the_untrained_model_tell_members(defence: Defence) -> None:
    """At step 0 the model knows nothing of anybody; what is found comes from the wire."""
    areas: dict[str, list[float]] = {"cosine": [], "gradient_difference": [], "loss": []}
    held_out = DATA.test_images.float() / 255
    for capture in captured(defence):
        scores = message_scores(
            capture.seen,
            torch.cat([capture.truth.images, held_out]),
            torch.cat([capture.truth.labels, DATA.test_labels]),
        )
        member = np.arange(4 + len(held_out)) < 4
        for name, found in areas.items():
            found.append(auc(getattr(scores, name).numpy(), member))
    mean = {name: float(np.mean(found)) for name, found in areas.items()}
    assert mean["gradient_difference"] > 0.6
    assert mean["cosine"] > 0.6
    assert abs(mean["loss"] - 0.5) < 0.2  # 16 members


def test_a_batch_of_one_is_found_exactly() -> None:
    capture = captured(Defence(), batch_size=1)[0]
    x = torch.cat([capture.truth.images, DATA.test_images.float() / 255])
    labels = torch.cat([capture.truth.labels, DATA.test_labels])
    found = message_scores(capture.seen, x, labels)
    assert float(found.cosine[0]) == pytest.approx(1, abs=1e-4)
    assert int(found.cosine.argmax()) == int(found.gradient_difference.argmax()) == 0


def two_workers(vantage: str, op: str) -> Observation:
    """What is seen of two workers' gradients, 1 and 3 in every entry."""
    seen = captured(Defence())[0].seen
    size = sum(w.numel() for w in seen.weights.values())
    one, three = torch.full((size,), 1.0), torch.full((size,), 3.0)
    if op == "all_mean":
        return replace(
            seen,
            messages=(Message("all_mean", (three,), ((one + three) / 2,)),),
            threat=replace(seen.threat, vantage=vantage),
            world_size=2,
            victim=1,
        )
    k = torch.arange(size, dtype=torch.int32)
    return replace(
        seen,
        defence=Defence(TopKConfig(level=1.0)),
        messages=(Message("all_gather", (three, k), (one, k, three, k)),),
        threat=replace(seen.threat, vantage=vantage),
        world_size=2,
        victim=1,
    )


@pytest.mark.parametrize(
    ("vantage", "op", "value", "images"),
    [
        ("link", "all_mean", 3.0, 4),
        ("peer", "all_mean", 2.0, 8),  # a mean over both workers' images
        ("link", "all_gather", 3.0, 4),
        ("peer", "all_gather", 3.0, 4),  # every worker's message can be told apart
    ],
)
def test_the_vantage_decides_whose_message_and_how_many_images(
    vantage: str, op: str, value: float, images: int
) -> None:
    message, count = decoded(two_workers(vantage, op))
    assert (float(message[0].mean()), count) == (value, images)
