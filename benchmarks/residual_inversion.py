"""How much the residual of error feedback protects, and how much of that a history of messages takes back.

    python benchmarks/residual_inversion.py --data cifar10.npz --defence topk:0.01:ef --width 16

Trains a model on one worker for some steps, and attacks single training images as captured there (knowing the
compressor, batch norm in evaluation mode): taking gradient + residual for the gradient; comparing only what is free of
the residual, as the messages of the steps before tell; of sparse methods also all of it, the older the less; and, for
comparison, the same compressor without error feedback at the same weights. Prints SSIM image by image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.attacks.inversion.objectives import target_view
from raytrust.compress import build
from raytrust.config import (
    CaptureConfig,
    Defence,
    DGCConfig,
    InversionConfig,
    ModelConfig,
    RandKConfig,
    Threat,
    ThresholdConfig,
    TopKConfig,
    TrainConfig,
    parse_defence,
)
from raytrust.config.attacks import GEIPING
from raytrust.data import load
from raytrust.leak import LinearView
from raytrust.leak.observation import Capture, seen_messages
from raytrust.metrics.statistics import mean_interval
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel, Tap

SPARSE = (TopKConfig, ThresholdConfig, RandKConfig, DGCConfig)


def gradient(capture: Capture) -> list[Tensor]:
    """Of the private batch alone."""
    seen, model = capture.seen, capture.seen.build_model()
    x = (capture.truth.images - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
    return list(torch.autograd.grad(F.cross_entropy(model(x), capture.truth.labels), list(model.parameters())))


def without_feedback(capture: Capture) -> Capture:
    """The same private batch at the same weights, sent by the same compressor without a residual."""
    seen = capture.seen
    defence = Defence(seen.defence.compressor)
    compressor, tap = (
        build(defence, [w.shape for w in seen.weights.values()], names=list(seen.weights)),
        Tap(LocalChannel(), keep=True),
    )
    compressor.load_public_state(seen.compressor_state)
    compressor.reduce(gradient(capture), tap)
    messages = seen_messages(tap.messages, seen.threat)
    return replace(capture, seen=replace(seen, messages=messages, defence=defence, residual=False, history=()))


def measurements(capture: Capture, attack: InversionConfig) -> tuple[int, float]:
    """(how many numbers the attack compares, their cosine with those of the true gradient)."""
    view = target_view(capture.seen, attack)
    assert isinstance(view, LinearView)
    return sum(o.numel() for o in view.observed), 1 - float(view.distance([g[None] for g in gradient(capture)]))


def report(label: str, captures: Sequence[Capture], attack: InversionConfig) -> None:
    counts, cosines = zip(*(measurements(c, attack) for c in captures), strict=True)
    result = evaluate_inversion(captures, attack)
    interval = mean_interval(result.ssim)
    span = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    print(
        f"{label:<24} SSIM {np.mean(result.ssim):.3f}{span} ({' '.join(f'{s:.3f}' for s in result.ssim)}), "
        f"{np.mean(counts):.0f} measurements of cosine {np.mean(cosines):.3f} to the gradient's, "
        f"{result.seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--defence", default="topk:0.01:ef")
    parser.add_argument("--step", type=int, default=5, help="the training step that is attacked")
    parser.add_argument(
        "--history", type=int, default=1, help="steps before it that the attacker knows the messages of"
    )
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--model", choices=["resnet18", "convnet"], default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32, help="images of a training step")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--tv", type=float, default=1e-2)
    options = parser.parse_args()
    config = TrainConfig(
        defence=parse_defence(options.defence),
        model=ModelConfig(options.model, width=options.width),
        threat=Threat(history=options.history),
        capture=CaptureConfig((options.step,), tuning=1, evaluation=options.images - 1),
        workers=1,
        batch_size=options.batch_size,
        steps=20 * (options.step + 1),  # the schedule is that of a longer run
        learning_rate=options.learning_rate,
    )
    captures: list[Capture] = []
    for record in train(config, load(options.data), LocalChannel()):
        if isinstance(record, Capture):
            captures.append(record)
        if len(captures) == options.images:
            break
    attack = replace(
        GEIPING, objective="aware", tv=options.tv, iterations=options.iterations, capture_step=options.step
    )
    model = f"{options.model} of width {options.width}, learning rate {options.learning_rate:g}"
    print(f"{config.defence.name}, {model}, batches of {options.batch_size}, step {options.step}, {attack.name}")
    print(f"history {options.history}, {options.images} images, {options.iterations} iterations")
    report("residual ignored", captures, attack)
    report("residual avoided", captures, replace(attack, residual="avoid"))
    if isinstance(config.defence.compressor, SPARSE):
        report("residual weighed", captures, replace(attack, residual="weigh"))
    report("without error feedback", [without_feedback(c) for c in captures], attack)


if __name__ == "__main__":
    main()
