"""What torch's own hooks reveal to one who knows them: of PowerSGD what ours does, and more than is decoded."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from raytrust.compress import HookCompressor, Layout
from raytrust.config import InversionConfig, ModelConfig, Threat, TrainConfig, parse_defence
from raytrust.data import load
from raytrust.jobs.captures import save_capture
from raytrust.leak import LinearView, view_of
from raytrust.leak.history import holds_residual
from raytrust.leak.observation import Capture
from raytrust.networks.build import build_model
from raytrust.networks.task import Task
from raytrust.studies.audit.private import private
from raytrust.studies.audit.training import Training
from raytrust.studies.audit.victim import State, Victim
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.loop import capture_images
from raytrust.wire.channel import Channel, LocalChannel, Tap
from raytrust.wire.processes import in_processes

# Two matrices of one size, a convolution, vectors, a row; several buckets.
LAYOUT = Layout([torch.Size(s) for s in [(9, 3, 3, 3), (9,), (12, 10), (12,), (1, 7), (12, 10), (14, 12), (12, 10)]])
CAP = 0.0008


def powersgd(rank: int = 3, **options: Any) -> PowerSGDState:
    return PowerSGDState(None, rank, **{"start_powerSGD_iter": 2, "min_compression_rate": 0.5} | options)


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in LAYOUT.shapes]


def measured(view: Any, grads: list[Tensor]) -> list[Tensor]:
    assert isinstance(view, LinearView)
    return [m[0] for m in view.measure([g[None] for g in grads])]


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3, 20])
@pytest.mark.parametrize("half", [False, True])
def test_what_is_observed_of_powersgd_is_measured_of_the_gradient(
    rank: int, batched: bool, warm: bool, half: bool
) -> None:
    hook = fp16_compress_wrapper(powerSGD_hook) if half else powerSGD_hook
    tolerance = 1e-2 if half else 1e-5
    options = {"batch_tensors_with_same_shape": batched, "warm_start": warm, "use_error_feedback": False}
    compressor = HookCompressor(hook, powersgd(rank, **options), LAYOUT, bucket_cap_mb=CAP)
    compressor.start_compressing()
    for step in range(3):
        fresh = HookCompressor(hook, powersgd(rank, **options), LAYOUT, bucket_cap_mb=CAP)
        fresh.load_public_state(compressor.public_state())
        tap = Tap(LocalChannel(), keep=True)
        mean = compressor.reduce(gradients(step), tap).mean
        for vantage in ("link", "peer"):
            view = view_of(fresh, tap.messages, vantage)
            torch.testing.assert_close(
                measured(view, gradients(step)), list(view.observed), rtol=tolerance, atol=5 * tolerance
            )
            assert float(view.distance([g[None] for g in gradients(step)])) < tolerance
        factors = fresh.factors(tap.messages, "link")
        assert factors is not None
        # From the messages alone, as a receiver decodes them.
        torch.testing.assert_close(factors.decoded(LAYOUT), mean, rtol=tolerance, atol=tolerance)
        assert len(view.observed) == 2 * len(factors.matrices) + len(factors.vectors)
        assert sorted([*factors.matrices, *factors.vectors]) == list(range(len(LAYOUT.shapes)))


def test_with_error_feedback_it_is_of_the_sum_with_the_residual() -> None:
    compressor = HookCompressor(powerSGD_hook, powersgd(), LAYOUT)
    compressor.start_compressing()
    compressor.reduce(gradients(0), LocalChannel())
    before, tap = copy.deepcopy(compressor), Tap(LocalChannel(), keep=True)
    compressor.reduce(gradients(1), tap)
    (residual,) = before.state.error_dict.values()
    parts = residual.split([LAYOUT.sizes[i] for i in reversed(range(len(LAYOUT.sizes)))])
    sums = [g + e.view(g.shape) for g, e in zip(gradients(1), reversed(parts), strict=True)]
    view = view_of(before.as_seen(), tap.messages, "link")
    torch.testing.assert_close(measured(view, sums), list(view.observed), rtol=1e-5, atol=1e-4)
    assert holds_residual(compressor)


@pytest.mark.parametrize(("hook", "tolerance"), [(allreduce_hook, 1e-6), (bf16_compress_hook, 1e-2)])
def test_of_other_hooks_it_is_the_decoded_gradient(hook: Any, tolerance: float) -> None:
    compressor, tap = HookCompressor(hook, None, LAYOUT), Tap(LocalChannel(), keep=True)
    compressor.reduce(gradients(0), tap)
    view = view_of(compressor.as_seen(), tap.messages, "link")
    torch.testing.assert_close(list(view.observed), gradients(0), rtol=tolerance, atol=tolerance)
    assert not holds_residual(compressor)


def of_two(channel: Channel) -> dict[str, Any]:
    compressor = HookCompressor(powerSGD_hook, powersgd(use_error_feedback=False), LAYOUT)
    compressor.start_compressing()
    seen, tap = compressor.as_seen(), Tap(channel, keep=True)
    compressor.reduce(gradients(channel.rank), tap)
    views = {vantage: view_of(seen, tap.messages, vantage) for vantage in ("link", "peer")}
    of = {
        "link": gradients(channel.rank),
        "peer": [(a + b) / 2 for a, b in zip(gradients(0), gradients(1), strict=True)],
    }
    return {vantage: (measured(view, of[vantage]), list(view.observed)) for vantage, view in views.items()}


def test_of_two_workers_the_link_shows_one_and_a_peer_the_mean() -> None:
    for worker in in_processes(of_two, 2):
        for found, observed in worker.values():
            torch.testing.assert_close(found, observed, rtol=1e-5, atol=1e-4)


MODEL = ModelConfig("convnet", width=8)


def captures(defence: str | None = None) -> list[Capture]:
    """Of digits, at an untrained network: through torch's PowerSGD, or one of ours."""
    data = load("digits")
    hook = HookCompressor(powerSGD_hook, powersgd(1), build_model(MODEL, data.channels, data.classes, seed=0))
    hook.start_compressing()
    config = TrainConfig(defence=parse_defence(defence or "none"), model=MODEL, workers=1)
    return capture_images(config, data, data.test_images[:4], data.test_labels[:4], hook=None if defence else hook)


def test_the_aware_attack_sees_in_torchs_powersgd_what_it_sees_in_ours(tmp_path: Any) -> None:
    def ssim(of: list[Capture], objective: Any) -> float:
        attack = InversionConfig(objective=objective, iterations=60, restarts=1)
        return statistics.mean(evaluate_inversion(of, attack).ssim)

    of_torch, ours = captures(), captures("powersgd:1")
    naive, aware, aware_of_ours = ssim(of_torch, "naive"), ssim(of_torch, "aware"), ssim(ours, "aware")
    assert aware > naive + 0.15
    assert aware > aware_of_ours - 0.15
    with pytest.raises(ValueError, match="Expected messages of a defence and a described model, got powerSGD_hook"):
        save_capture(tmp_path, of_torch[0])


def test_of_a_training_every_capture_knows_the_state_of_its_own_step() -> None:
    """The attacks begin when the hook has gone on."""
    data = load("digits")
    images, labels = data.test_images[:3].float() / 255, data.test_labels[:3]
    task = Task(None, None)
    victim = Victim(build_model(MODEL, 1, 10, seed=0), task, torch.zeros(1), torch.ones(1))
    compressor = HookCompressor(powerSGD_hook, powersgd(2, use_error_feedback=False), victim.network)
    compressor.start_compressing()
    training = Training([(images, labels)], (0, 1, 3), lambda p: torch.optim.SGD(p, 0.1))
    none, found = parse_defence("none"), []
    for step, network in training.networks(victim, compressor):
        batch = private(images, labels, None, task)
        captured = victim.captures(network, compressor, none, True, Threat(), batch, 10, State.of(network), step)
        found.append((captured[0].seen, victim.gradient(network, images[:1], labels[:1])[1]))
    for seen, gradient in found:
        view = view_of(seen.build_compressor(), seen.messages, "link")
        torch.testing.assert_close(measured(view, list(gradient)), list(view.observed), rtol=1e-4, atol=1e-5)
        assert isinstance(seen.method, HookCompressor)
        assert not seen.method.state.error_dict
