"""Where workers and attacks run: a table of clusters, what is refused before anything waits, and workers on one GPU."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raytrust.cluster import placement
from raytrust.cluster.placement import ATTACK_GPU, Placement, decide, place
from raytrust.cluster.process_group import HostChannel, ProcessState
from raytrust.wire.channel import LocalChannel

LAPTOP = [{"CPU": 2.0, "trial_slot": 2.0}]
WORKSTATION = [{"CPU": 8.0, "GPU": 1.0}]
SERVER = [{"CPU": 32.0, "GPU": 4.0}]
CLOUD = [{"memory": 1.0}, *[{"CPU": 4.0, "GPU": 1.0, "trial_slot": 1.0}] * 3]
HALVES = [{"CPU": 0.5}] * 9
GIB = 2**30
MIXED = [{"CPU": 64.0}, {"CPU": 2.0, "GPU": 2.0}]


@pytest.mark.parametrize(
    ("workers", "nodes", "device", "sees_cuda", "growing", "expected"),
    [
        (2, LAPTOP, "auto", False, False, Placement("cpu", 1)),
        (1, LAPTOP, "cpu", False, False, Placement("cpu", 2)),
        (2, [{"CPU": 1.0}] * 4, "auto", False, False, Placement("cpu", 2)),  # workers of one group on several nodes
        (2, [{"CPU": 0.0}], "auto", False, True, Placement("cpu", 0)),  # nodes will come
        (2, WORKSTATION, "auto", True, False, Placement("cuda", 1, 0.375, ATTACK_GPU)),
        (3, WORKSTATION, "cuda", True, False, Placement("cuda", 1, 0.25, ATTACK_GPU)),
        (7, WORKSTATION, "cuda", True, False, Placement("cuda", 1, 0.1071, ATTACK_GPU)),
        (1, WORKSTATION, "auto", True, False, Placement("cuda", 1, 0.75, ATTACK_GPU)),
        (2, WORKSTATION, "auto", False, False, Placement("cpu", 4)),  # Ray counts a GPU that torch can't use
        (2, WORKSTATION, "cpu", True, False, Placement("cpu", 4)),
        (2, SERVER, "auto", True, False, Placement("cuda", 2, 0.75, ATTACK_GPU)),
        (5, SERVER, "auto", True, False, Placement("cuda", 1, 0.375, ATTACK_GPU)),
        (2, CLOUD, "auto", True, False, Placement("cuda", 1, 0.75, ATTACK_GPU)),
        (2, CLOUD[:2], "auto", True, True, Placement("cuda", 0, 0.75, ATTACK_GPU)),  # a second GPU will come
        (2, MIXED, "auto", True, False, Placement("cuda", 1, 0.75, ATTACK_GPU)),
        (4, MIXED, "auto", True, False, Placement("cpu", 16)),  # too few CPUs beside the GPUs
    ],
)
def test_the_table(workers: int, nodes: Any, device: Any, sees_cuda: bool, growing: bool, expected: Placement) -> None:
    found = place(workers, nodes, device, sees_cuda, growing)
    assert found == expected
    if found.device == "cuda" and not growing:  # workers and an attack fit on a GPU together
        gpus = sum(n.get("GPU", 0) for n in nodes)
        on_one = -(-workers // gpus)
        assert on_one * found.worker_gpu + found.attack_gpu <= 1
        assert found.through_host == (workers > gpus)
    assert found.worker.get("GPU", 0) == found.worker_gpu
    assert found.attack.get("GPU", 0) == found.attack_gpu


@pytest.mark.parametrize(
    ("workers", "nodes", "device", "sees_cuda", "message"),
    [
        (3, LAPTOP, "auto", False, "Expected workers=3 to be at most the number of CPUs in the cluster, 2."),
        (
            2,
            [{"CPU": 0.5}] * 9,
            "auto",
            False,
            "Expected workers=2 to be at most the number of CPUs in the cluster, 0.",
        ),
        (2, LAPTOP, "cuda", False, "Expected a GPU for device='cuda', but no node of the cluster has one."),
        (2, WORKSTATION, "cuda", False, "Expected device='cuda' to be one that torch can use."),
        (4, MIXED, "cuda", True, "Expected workers=4 to be at most the number of CPUs beside GPUs, 2."),
    ],
)
def test_what_has_no_room_is_refused(workers: int, nodes: Any, device: Any, sees_cuda: bool, message: str) -> None:
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        place(workers, nodes, device, sees_cuda)


@pytest.mark.parametrize(
    ("needed", "beside", "alone"),
    [
        (GIB // 100, 0.05, 0.05),  # what torch takes by itself
        (2 * GIB, 0.125, 0.125),
        (GIB + 10**6, 0.0626, 0.0626),  # rounded up, as Ray counts
        (8 * GIB, 0.25, 0.5),  # beside the workers it takes turns
        (99 * GIB, 0.25, 1.0),
        (0, 0.25, 0.25),  # not known
    ],
)
def test_an_attack_takes_what_it_needs(needed: int, beside: float, alone: float) -> None:
    found = Placement("cuda", 1, 0.375, 0.25, 16 * GIB)
    assert found.for_attacks_of(needed) == replace(found, attack_gpu=beside)
    assert found.for_attacks_of(needed, alone=True) == replace(found, attack_gpu=alone)
    for other in (Placement("cpu", 4), replace(found, gpu_bytes=0)):
        assert other.for_attacks_of(needed, alone=True) == other


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """A cluster of two GPUs; the list holds why torch can't use them."""
    refusals: list[str | None] = []
    node = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}
    monkeypatch.setattr("ray.nodes", lambda: [node, {"Alive": False, "Resources": {"CPU": 99.0}}])
    monkeypatch.setattr(placement, "cuda_refusal", lambda: refusals.pop())
    monkeypatch.setattr(placement, "gpu_memory", lambda: 16 * GIB)
    return refusals


def test_torch_is_asked_once_and_its_word_said(two_gpus: list[str | None]) -> None:
    said: list[str] = []
    two_gpus += ["no driver"]
    assert decide(2, "auto", said.append) == Placement("cpu", 4)
    assert said == ["training and attacks run on the CPU: no driver"]
    two_gpus += [None]
    assert decide(2, "auto", said.append) == Placement("cuda", 1, 0.75, ATTACK_GPU, 16 * GIB)
    assert decide(2, "cpu", said.append) == Placement("cpu", 4)  # not asked at all
    assert len(said) == 1
    two_gpus += ["no driver"]
    with pytest.raises(ValueError, match=r"\AExpected device='cuda' to be one that torch can use, but no driver\.\Z"):
        decide(2, "cuda", said.append)


class Far(LocalChannel):
    """A channel that only takes what lies in host memory, from where it hands back twice of it."""

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        assert x.device.type == "cpu"
        assert out is None
        return 2 * x

    def all_gather(self, xs: Any, counts: Any = None) -> list[tuple[Tensor, ...]]:
        assert {x.device.type for x in xs} == {"cpu"}
        return [tuple(xs), tuple(2 * x for x in xs)]


def test_a_host_channel_hands_on_what_it_is_given() -> None:
    channel = HostChannel(Far())
    x = torch.arange(6.0).view(2, 3).T
    assert torch.equal(channel.all_mean(x), 2 * x)
    out = torch.zeros(3, 2)
    assert channel.all_mean(x, out) is out
    assert torch.equal(out, 2 * x)
    gathered = channel.all_gather([x, x[:1]])
    assert [[tuple(t.shape) for t in ts] for ts in gathered] == [[(3, 2), (1, 2)]] * 2
    assert torch.equal(gathered[1][0], 2 * x)


@pytest.mark.gpu
def test_a_host_channel_carries_what_lies_on_a_gpu() -> None:
    channel = HostChannel(Far())
    x = torch.arange(6.0, device="cuda")
    assert torch.equal(channel.all_mean(x), 2 * x)
    assert channel.all_mean(x, torch.zeros_like(x)).device == x.device
    assert all(t.device == x.device for ts in channel.all_gather([x, x[:1]]) for t in ts)


def test_each_job_starts_from_the_same_state_of_the_process() -> None:
    def drawn() -> tuple[Any, ...]:
        return float(torch.rand(())), float(np.random.random()), random.random()  # noqa: NPY002

    threads, state = torch.get_num_threads(), ProcessState()
    before = drawn()
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(threads + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    state.restore()
    assert drawn() == before
    assert not torch.backends.cudnn.benchmark
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
