"""Programs hand their jobs to the device that was asked for: in this process, and on a cluster."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrust.cli.session import Program
from raytrust.cluster import placement, runtime, searches
from raytrust.cluster.placement import ATTACK_GPU

NODE = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}


class Toy(Program[Any]):
    study = SimpleNamespace(data={})

    def introduce(self) -> None: ...

    def report(self, tracker: Any, outbox: Any) -> Any: ...


@pytest.mark.parametrize(
    ("device", "there", "named"), [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")]
)
def test_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any, there: bool, named: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    with Toy(tmp_path, 1)._runner(False, None, 1, device) as runner:
        assert vars(runner)["_device"] == named


@pytest.mark.parametrize(("device", "named", "parallel"), [("auto", "cuda", 4), ("cuda", "cuda", 4), ("cpu", "cpu", 8)])
def test_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any, named: str, parallel: int) -> None:
    monkeypatch.setattr(runtime, "cluster", lambda address, cpus: nullcontext())
    monkeypatch.setattr("ray.nodes", lambda: [NODE])
    monkeypatch.setattr(placement, "cuda_refusal", lambda: None)
    monkeypatch.setattr(placement, "gpu_memory", lambda: 2**34)
    monkeypatch.setattr(searches, "capacity", lambda resource: int(NODE["Resources"][resource]))  # type: ignore[index]
    program = Toy(tmp_path, 1)
    with program._runner(True, None, 8, device) as runner:
        assert (vars(runner)["_device"], runner.parallel, program.progress.parallel) == (named, parallel, parallel)
        assert vars(runner)["_task"]._num_gpus == (ATTACK_GPU if named == "cuda" else 0)
