"""What has to hold on a CUDA device: `pytest -m gpu -n 0 tests/test_on_gpu.py`.

Without one, GPU_TESTS_ON=cpu runs the same tests on the CPU, to see that they are sound.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from toys import synthetic

from raytrust.attacks.inversion import GradientMatcher, invert
from raytrust.attacks.learned import Auxiliary, train_inverter
from raytrust.compress import build, ddp_comm_hook
from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    LearnedInverterConfig,
    MembershipConfig,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
    TrainConfig,
    parse_defence,
)
from raytrust.leak import identity_view
from raytrust.networks.build import build_model
from raytrust.networks.device import exact
from raytrust.persample.memory import free_bytes, is_out_of_memory
from raytrust.studies.membership.shadows import train_shadow
from raytrust.train.loop import Record, Step, Trained, capture_images, train
from raytrust.wire.channel import LocalChannel

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DATA = synthetic(train=240, test=40, size=16, vivid=True)
MODELS = [ModelConfig("convnet", width=8), ModelConfig("resnet18", width=8)]
TRAIN = TrainConfig(
    model=MODELS[0], capture=CaptureConfig((0, 2), tuning=1, evaluation=1), workers=1, batch_size=16, steps=4
)
models = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
defences = pytest.mark.parametrize("defence", ["none", "powersgd:2:ef", "topk:0.1:ef", "signsgd", "mixup:2"])


@pytest.fixture(autouse=True)
def _exactly() -> Iterator[None]:
    with exact(DEVICE):
        yield


def apart(a: Tensor, b: Tensor) -> float:
    """The L2 norm of the difference, relative to b's."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def test_a_convolution_is_not_rounded() -> None:
    """As the product of matrices that it is; TF32 would be off by a thousandth."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((4, 64, 16, 16), (64, 64, 3, 3)))
    product = weight.flatten(1) @ F.unfold(x, 3, padding=1)
    assert apart(F.conv2d(x, weight, padding=1).flatten(2), product) < 1e-5
    assert apart(product, weight.flatten(1).double() @ F.unfold(x.double(), 3, padding=1)) < 1e-5


@models
def test_the_matcher_is_the_textbook_loop(model: ModelConfig) -> None:
    network = build_model(model, 3, 4, seed=0).eval().to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    x, private = (torch.randn(3, 2, 3, 16, 16, generator=generator).to(DEVICE) for _ in range(2))
    labels = torch.tensor([[0, 1], [2, 3], [1, 1]], device=DEVICE)
    parameters = list(network.parameters())
    target = torch.autograd.grad(F.cross_entropy(network(private[0]), labels[0]), parameters)
    view = identity_view([g.detach() for g in target])
    found, slopes = GradientMatcher(network)(x, labels, view.distance)
    for i in range(3):
        some = x[i].clone().requires_grad_()
        loss = F.cross_entropy(network(some), labels[i])
        value = view.distance([g[None] for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        assert float(found[i]) == pytest.approx(float(value.detach()), rel=1e-4)
        assert apart(slopes[i], torch.autograd.grad(value.sum(), some)[0]) < 1e-3


@models
@defences
def test_a_capture_is_that_of_the_cpu(model: ModelConfig, defence: str) -> None:
    config = replace(TRAIN, model=model, defence=parse_defence(defence), threat=Threat(batch_size=2))
    images, labels = DATA.test_images[:4], DATA.test_labels[:4]
    here, there = (capture_images(config, DATA, images, labels, device=d) for d in ("cpu", DEVICE))
    for a, b in zip(here, there, strict=True):
        for one, other in zip(a.seen.messages, b.seen.messages, strict=True):
            for x, y in zip(one.sent, other.sent, strict=True):
                assert y.device.type == "cpu"
                assert x.shape == y.shape
                if x.is_floating_point():
                    assert apart(y, x) < 1e-3


@pytest.mark.parametrize("objective", ["naive", "aware"])
@pytest.mark.parametrize("compressor", [PowerSGDConfig(2), TopKConfig(level=0.1)], ids=lambda c: c.method)
def test_a_search_is_that_of_the_cpu(objective: Any, compressor: Any) -> None:
    config = replace(TRAIN, defence=Defence(compressor), threat=Threat(batch_size=1))
    captures = capture_images(config, DATA, DATA.test_images[:2], DATA.test_labels[:2])
    attack = InversionConfig(objective, iterations=8, restarts=2, signed="none", step_size=0.01)
    here, there = (invert([(c.seen, attack) for c in captures], device) for device in ("cpu", DEVICE))
    for a, b in zip(here, there, strict=True):
        assert b.images.device.type == "cpu"
        torch.testing.assert_close(b.objective, a.objective, rtol=1e-2, atol=1e-4)
        assert float((a.images - b.images).abs().mean()) < 1e-2


def trained(defence: str) -> list[Record]:
    return list(train(replace(TRAIN, defence=parse_defence(defence)), DATA, LocalChannel(), DEVICE))


@defences
def test_training_is_that_of_the_cpu_and_repeats_to_the_bit(defence: str) -> None:
    here = list(train(replace(TRAIN, defence=parse_defence(defence)), DATA, LocalChannel()))
    first, again = trained(defence), trained(defence)
    losses = [[r.loss for r in records if isinstance(r, Step)] for records in (here, first, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1] == losses[2]
    one, other = (next(r for r in records if isinstance(r, Trained)) for records in (first, again))
    assert all(torch.equal(w, other.weights[name]) for name, w in one.weights.items())


@pytest.mark.parametrize("kind", ["hashed", "whole"])
def test_a_learned_inverter_learns_as_on_the_cpu_and_repeats(kind: Any) -> None:
    config = replace(TRAIN, threat=Threat(batch_size=1), defence=Defence(TopKConfig(level=0.2)))
    capture = capture_images(config, DATA, DATA.test_images[:1], DATA.test_labels[:1])[0]
    auxiliary = Auxiliary(DATA.train_images.float() / 255, DATA.train_labels)
    settings = LearnedInverterConfig(auxiliary=240, epochs=3, hidden=32, layers=1, dimension=128, input=kind)
    cpu, first, again = (train_inverter(capture.seen, auxiliary, settings, d) for d in ("cpu", DEVICE, DEVICE))
    assert first.losses == pytest.approx(cpu.losses, rel=2e-2)
    assert first.losses == again.losses
    assert torch.equal(first.reconstruct([capture.seen]), again.reconstruct([capture.seen]))


@pytest.mark.parametrize("defence", ["none", "powersgd:1:ef"])
def test_a_membership_shadow_is_that_of_the_cpu(defence: str) -> None:
    audit = MembershipConfig(
        train=replace(TRAIN, threat=Threat(batch_size=8), batch_size=8), models=4, points=120, mislabelled=5,
        duplicates=5, controls=10, guesses=20,
    )  # fmt: skip
    here, there = (train_shadow(audit, parse_defence(defence), 0, DATA, device) for device in ("cpu", DEVICE))
    np.testing.assert_allclose(there.losses, here.losses, rtol=1e-3)
    np.testing.assert_allclose(there.logits, here.logits, atol=1e-2)
    np.testing.assert_allclose(there.messages[:, 3], here.messages[:, 3], atol=1e-3)  # cosines


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("defence", ["none", "powersgd:2:ef", "topk:0.1:ef"])
def test_the_hook_steps_as_the_loop_does(defence: str) -> None:
    """On the first step, whose mean is the compressor's of the model's own gradient."""
    model = build_model(MODELS[0], 3, 4, seed=0).to(DEVICE)
    images, labels = DATA.train_images[:8].to(DEVICE).float() / 255, DATA.train_labels[:8].to(DEVICE)
    grads = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
    expected = build(parse_defence(defence), model).reduce(list(grads), LocalChannel()).mean
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(ddp.module, ddp_comm_hook(build(parse_defence(defence), model)))
    F.cross_entropy(ddp(images), labels).backward()
    for p, mean in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert p.grad.device.type == torch.device(DEVICE).type
        torch.testing.assert_close(p.grad, mean, rtol=1e-3, atol=1e-6)


def test_memory_that_there_is_not_is_told_from_other_errors() -> None:
    assert free_bytes(DEVICE) > 0
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
    assert is_out_of_memory(failure.value)
