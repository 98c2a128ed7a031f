"""Which models have a closed form, and the image that a vision transformer's gradient gives away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from toys import synthetic

from raytrust.attacks.inversion import closed_form, invert
from raytrust.config import ModelConfig, Threat, TrainConfig, parse_defence, register
from raytrust.config.attacks import ANALYTIC
from raytrust.leak.observation import Capture
from raytrust.metrics.images import ssim_table
from raytrust.train.loop import capture_images

SHAPE = (3, 32, 32)


class Transformer(nn.Module):
    """As it is often written: patches of 8x8 by a view, a linear layer, class tokens, a position embedding, dropout."""

    def __init__(self, channels: int = 3, classes: int = 10, position: str = "tokens", dim: int = 48, **options: Any):
        super().__init__()
        self.position, self.options = position, options
        tokens, size = 17 if position == "class" else 16, channels * 64
        self.conv = nn.Conv2d(channels, dim, 8, stride=8, bias=False) if options.get("conv") else None
        self.embed = None if self.conv else nn.Linear(size, dim)
        if options:
            self.norm = nn.LayerNorm(dim if options.get("after") else size) if not self.conv else None
        if position == "class":
            self.first = nn.Parameter(torch.randn(1, 1, dim))
        shape = {"channels": (1, dim, 4, 4), "class": (1, tokens, dim), "sum": (1, 1, dim)}.get(position, (tokens, dim))
        if position == "table":
            self.table = nn.Embedding(tokens, dim)
        else:
            self.places = nn.Parameter(0.02 * torch.randn(shape))
        self.drop = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.options.get("scaled"):
            x = F.interpolate(2 * x - 1, scale_factor=1.0, mode="bilinear")
        if self.conv is not None:
            x = self.conv(x)
            if self.position == "channels":
                x = x + self.places
            x = x.flatten(2).mT
        else:
            n, c = x.shape[:2]
            x = x.view(n, c, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(n, 16, -1)
            x = self.embed(self.norm(x) if self.options.get("before") else x)
        if self.options.get("after"):
            x = self.norm(x)
        if self.position == "class":
            x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        if self.position == "table":
            x = x + self.table(torch.arange(16))
        elif self.position == "product":
            x = x * self.places
        elif self.position != "channels":
            x = x + self.places
        return self.head(self.encoder(self.drop(x)).mean(1))


def transformer(channels: int, classes: int, **options: Any) -> nn.Module:
    return Transformer(channels, classes, **options)


def vit(channels: int, classes: int, dim: int = 96) -> nn.Module:
    model = VisionTransformer(32, 4, 2, 4, dim, 2 * dim, num_classes=classes)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # type: ignore[arg-type, union-attr]
    return model


@pytest.fixture(autouse=True)
def _networks() -> None:
    register.network("closed_transformer")(transformer)
    register.network("closed_vit")(vit)


def capture(network: str, defence: str = "none", images: int = 1, **options: Any) -> Capture:
    data = synthetic(vivid=True, size=32)
    config = TrainConfig(
        defence=parse_defence(defence),
        model=ModelConfig(network, options=tuple(options.items())),
        workers=1,
        batch_size=1,
        threat=Threat(labels="unknown"),
    )
    (taken,) = capture_images(config, data, data.test_images[:1], data.test_labels[:1])
    return replace(taken, seen=replace(taken.seen, threat=replace(taken.seen.threat, batch_size=images)))


def reached(taken: Capture, objective: str = "naive") -> float:
    (candidates,) = invert([(taken.seen, replace(ANALYTIC, objective=objective))])  # type: ignore[arg-type]
    return float(ssim_table(candidates.images[0].numpy(), taken.truth.images.numpy())[0, 0])


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("closed_vit", {}),
        ("closed_transformer", {}),
        ("closed_transformer", {"position": "class"}),
        ("closed_transformer", {"position": "table"}),
        ("closed_transformer", {"position": "channels", "conv": True}),
        ("closed_transformer", {"scaled": True, "conv": True}),
    ],
    ids=str,
)
def test_a_vision_transformer_gives_its_image_away(network: str, options: dict[str, Any]) -> None:
    """Through a patch embedding of either kind, a position embedding of any shape, and a step that is linear before."""
    assert reached(capture(network, **options)) > 0.999


def test_it_is_not_safe_through_powersgd() -> None:
    """Rank 16 sends enough; of rank 4, who knows the compressor makes more than who takes what it decodes to."""
    assert reached(capture("closed_transformer", "powersgd:16"), "aware") > 0.999
    taken = capture("closed_vit", "powersgd:4")
    assert reached(taken, "aware") > reached(taken) + 0.01


def test_zeros_of_an_untrained_classifier_hide_nothing() -> None:
    """torchvision's own begins with a classifier of zeros: no signal, but only until the first step."""
    model = VisionTransformer(32, 8, 1, 2, 32, 32, num_classes=10)
    assert not model.heads.head.weight.any()  # type: ignore[union-attr]
    before = {name: p.clone() for name, p in model.named_parameters()}
    form = closed_form(model, SHAPE)
    assert form is not None
    assert (form.weight, form.signal) == ("conv_proj.weight", "encoder.pos_embedding")
    assert torch.equal(form.entries, torch.arange(32, 17 * 32).view(16, 32))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "model",
    [
        Transformer(before=True),
        Transformer(after=True),
        Transformer(position="sum"),
        Transformer(position="product"),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, 2)),
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 2)),
        nn.Sequential(nn.Flatten(), nn.LayerNorm(3072), nn.Linear(3072, 8), nn.Linear(8, 2)),
    ],
    ids=["norm before", "norm after", "one place", "product", "convolution", "no bias", "norm"],
)
def test_models_without_a_closed_form(model: nn.Module) -> None:
    assert closed_form(model, SHAPE) is None


def test_what_is_frozen_is_not_sent() -> None:
    model = Transformer()
    assert closed_form(model, SHAPE) is not None
    assert closed_form(model, SHAPE, batch_size=2) is None
    model.places.requires_grad_(False)
    assert closed_form(model, SHAPE) is None


def test_refusals_are_one_line() -> None:
    for taken, objective, message in (
        (capture("closed_transformer", images=2), "naive", r"^Expected batch_size=2 to be 1 for method='analytic', or"),
        (capture("closed_transformer", position="sum"), "naive", r"^Expected a model whose first layer is .*\.$"),
        (capture("closed_transformer", "signsgd"), "aware", r"^Expected a compressor with a linear view for .*\.$"),
    ):
        with pytest.raises(ValueError, match=message):
            reached(taken, objective)


def test_against_a_defence_it_heeds_the_objective_alone() -> None:
    attack = replace(ANALYTIC, objective="aware", tv=0.3, matching="tensors", capture_step=3)
    assert attack.against(parse_defence("powersgd:4")) == replace(ANALYTIC, objective="aware", capture_step=3)
    # Signs are no linear view: what they decode to is all that can be solved for.
    for text in ("none", "signsgd", "qsgd:4"):
        assert attack.against(parse_defence(text)) == replace(ANALYTIC, capture_step=3)
