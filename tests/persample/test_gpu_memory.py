"""How much of a GPU's memory an attack counts with, and takes, without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.cluster import runner
from raytrust.config import Defence, ModelConfig, Threat, TrainConfig
from raytrust.data import Dataset
from raytrust.jobs.store import JobStore
from raytrust.leak.observation import Observation
from raytrust.networks.build import build_model
from raytrust.persample import memory
from raytrust.persample.memory import SHARE, WINDOWS, candidate_bytes, free_bytes, take_share
from raytrust.train.loop import capture_images

GIB = 2**30


@pytest.fixture(autouse=True)
def _whole() -> Iterator[None]:
    yield
    take_share(1.0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 16 GiB, of which others have 4, and this process 3, one of them for tensors that are gone."""
    state = SimpleNamespace(free=9 * GIB, total=16 * GIB, allocated=2 * GIB, reserved=3 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state.free, state.total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state.allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state.reserved)
    return state


def test_what_is_kept_of_tensors_that_are_gone_is_free(card: SimpleNamespace) -> None:
    assert free_bytes("cuda") == int(SHARE * 10 * GIB)


@pytest.mark.parametrize(("share", "room"), [(1.0, 10), (0.75, 10), (0.5, 6), (0.25, 2), (0.1, 0)])
def test_a_share_bounds_what_is_used(card: SimpleNamespace, share: float, room: int) -> None:
    take_share(share)
    assert free_bytes("cuda:0") == int(SHARE * room * GIB)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_no_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"\AExpected share="):
        take_share(share)


def test_a_task_takes_the_share_that_ray_gave_it(
    card: SimpleNamespace, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 1.0, "GPU": 0.25})
    monkeypatch.setattr(runner.ray, "get_runtime_context", lambda: given)
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: None)
    assert runner.do(JobStore(tmp_path, "none"), [], [], "cuda") == []  # type: ignore[arg-type]
    assert free_bytes("cuda") == int(SHARE * 2 * GIB)


def observation(data: Dataset, model: ModelConfig) -> Observation:
    config = TrainConfig(Defence(), model, threat=Threat(batch_size=1), workers=1)
    return capture_images(config, data, data.test_images[:1], data.test_labels[:1])[0].seen


@pytest.mark.parametrize("model", [ModelConfig("convnet", width=4), ModelConfig("resnet18", width=2)])
def test_windows_are_counted_where_convolutions_are_unfolded(data: Dataset, model: ModelConfig) -> None:
    seen, numbers = observation(data, model), [0]
    network = seen.build_model()

    def unfold(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, nn.Conv2d)
        windows = F.unfold(inputs[0], layer.kernel_size, padding=layer.padding, stride=layer.stride)  # type: ignore[arg-type]
        numbers[0] += windows.numel()

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(unfold)
    network(torch.zeros(1, *seen.image_shape))
    for batch in (1, 8):
        some = replace(seen, threat=replace(seen.threat, batch_size=batch))
        assert candidate_bytes(some, "cuda") - candidate_bytes(some) == 4 * WINDOWS * batch * numbers[0]


def test_the_windows_of_resnet_18(data: Dataset) -> None:
    """16.1 MiB an image of 32x32 pixels, summed over its convolutions by hand."""
    seen = replace(observation(data, ModelConfig("resnet18", width=2)), model=ModelConfig(), image_shape=(3, 32, 32))
    model = build_model(ModelConfig(), 3, seen.classes, seed=0)
    seen = replace(seen, weights=dict(model.named_parameters()), buffers=dict(model.named_buffers()))
    assert memory._activations(seen)[1] == 4_221_952
