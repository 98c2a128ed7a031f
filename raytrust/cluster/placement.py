"""Where training workers and attacks run: on which device, with which share of a GPU, and how many groups at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

import ray

from raytrust.cluster.failures import one_line
from raytrust.networks.device import Device

Resources: TypeAlias = dict[str, float]
ATTACK_GPU = 0.25  # of a GPU: four attacks fit, or one beside the workers
LEAST_GPU = 0.05  # of a GPU: what a process of torch takes by itself, and twenty of them keep a GPU busy
PRECISION = 1e4  # Ray counts in ten thousandths
ANSWER = 90.0  # seconds that torch may take to start on a node and say whether it sees the GPU


@dataclass(frozen=True)
class Placement:
    """What a training worker and an attack ask for. `groups` of workers have room at once, on the nodes there are."""

    device: Literal["cpu", "cuda"]
    groups: int
    worker_gpu: float = 0.0
    attack_gpu: float = 0.0
    gpu_bytes: int = 0  # memory of a GPU, 0 where it is not known

    @property
    def through_host(self) -> bool:
        """Whether workers may share a GPU. NCCL refuses two ranks on one device, so that they meet over gloo."""
        return self.device == "cuda" and self.worker_gpu <= 0.5

    @property
    def worker(self) -> Resources:
        return {"CPU": 1.0} | ({"GPU": self.worker_gpu} if self.worker_gpu else {})

    @property
    def attack(self) -> Resources:
        return {"CPU": 1.0} | ({"GPU": self.attack_gpu} if self.attack_gpu else {})

    def for_attacks_of(self, needed: int, alone: bool = False) -> Placement:
        """The same where an attack needs so many bytes on a GPU, 0 if nobody knows: with a share of it by need.

        alone: whether no training groups are on the GPUs, so that an attack may take more than is kept for it beside
        them. It takes less where it needs less, and more attacks run at once; where it needs more than it may take, it
        goes through its candidates in turns.
        """
        if not (self.attack_gpu and self.gpu_bytes and needed):
            return self
        share = min(1.0 if alone else ATTACK_GPU, max(LEAST_GPU, needed / self.gpu_bytes))
        # Rounded up to what Ray can count.
        return replace(self, attack_gpu=math.ceil(share * PRECISION - 1e-6) / PRECISION)


def place(
    workers: int, nodes: Sequence[Resources], device: Device = "auto", sees_cuda: bool = False, growing: bool = False
) -> Placement:
    """Where groups of `workers` workers of one CPU each, and attacks, have room.

    nodes: resources of each node of the cluster. sees_cuda: whether torch sees the GPUs that Ray counts. growing: the
    cluster may start more nodes like these. Every GPU keeps a share for attacks; where there are fewer GPUs than
    workers, these share them evenly. Raises ValueError if there is no room for one group, and none can come.
    """
    gpu_nodes = [n for n in nodes if n.get("GPU", 0) >= 1]
    if device == "cuda" and not growing:
        if not gpu_nodes:
            raise ValueError(f"Expected a GPU for device={device!r}, but no node of the cluster has one.")
        if not sees_cuda:
            raise ValueError(f"Expected device={device!r} to be one that torch can use.")
    if device == "cuda" or (device == "auto" and gpu_nodes and sees_cuda):
        for sharing in range(1, workers + 1):
            room = sum(int(min(n.get("CPU", 0), int(n["GPU"]) * sharing)) for n in gpu_nodes)
            # A cluster that can start further nodes gets further GPUs with them.
            if room >= workers or growing:
                # Rounded down to what Ray can count, so that all shares still fit on one GPU.
                share = int((1 - ATTACK_GPU) / sharing * PRECISION) / PRECISION
                return Placement("cuda", room // workers, share, ATTACK_GPU)
        if device == "cuda":
            cpus = int(sum(n.get("CPU", 0) for n in gpu_nodes))
            raise ValueError(f"Expected workers={workers} to be at most the number of CPUs beside GPUs, {cpus}.")
    room = sum(int(n.get("CPU", 0)) for n in nodes)
    if room < workers and not growing:
        raise ValueError(f"Expected workers={workers} to be at most the number of CPUs in the cluster, {room}.")
    return Placement("cpu", room // workers)


def decide(workers: int, device: Device, say: Callable[[str], None], growing: bool = False) -> Placement:
    """`place` on the cluster that Ray is connected to; `say` is told where "auto" leaves GPUs unused.

    Raises ValueError where `place` does.
    """
    present = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    refusal = None
    if device != "cpu" and any(n.get("GPU", 0) >= 1 for n in present):
        refusal = cuda_refusal()
        if refusal and device == "cuda":
            raise ValueError(f"Expected device={device!r} to be one that torch can use, but {refusal}.")
    placement = place(workers, present, device, sees_cuda=refusal is None, growing=growing)
    if refusal:
        say(f"training and attacks run on the CPU: {refusal}")
    if placement.device == "cuda" and any(n.get("GPU", 0) >= 1 for n in present):
        return replace(placement, gpu_bytes=gpu_memory())
    return placement


def cuda_refusal() -> str | None:
    """Why torch can't use the GPUs that Ray counts, by the word of a node that has one; None if it can."""
    asked = ray.remote(_refusal).options(num_cpus=0, num_gpus=1 / PRECISION, max_retries=1).remote()
    try:
        return cast("str | None", ray.get(asked, timeout=ANSWER))
    except ray.exceptions.GetTimeoutError:
        ray.cancel(asked, force=True)
        return f"no node with a GPU answered within {ANSWER:.0f} s"
    except ray.exceptions.RayError as error:
        return f"the node with a GPU failed: {one_line(error)}"


def gpu_memory() -> int:
    """The bytes of a GPU of the cluster, 0 where none says. All are taken to be alike."""
    asked = ray.remote(_memory).options(num_cpus=0, num_gpus=1 / PRECISION, max_retries=1).remote()
    try:
        return cast(int, ray.get(asked, timeout=ANSWER))
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
        # Shares by need are for speed: without them the usual ones serve.
        ray.cancel(asked, force=True)
        return 0


def _memory() -> int:
    import torch

    return torch.cuda.mem_get_info("cuda")[1]


def _refusal() -> str | None:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"Ray counts a GPU, but torch {torch.__version__} is built without CUDA"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        # An old driver, no driver or a card that torch was not built for: each raises its own type.
        sentence = next(iter(str(error).strip().splitlines()), "").partition(". ")[0]
        return f"Ray counts a GPU, but torch can't use it: {sentence}"
    return None
