"""How well images are reconstructed from the update of several local steps (FedAvg), by each way through them.

    python benchmarks/local_steps.py --data cifar10.npz --model convnet --width 8 --batches 8

Private batches are of the first test images, the weights are untrained, nothing is compressed and labels are known. For
each local learning rate it prints how far the true images are from the update, in the eyes of each attacker (1 -
cosine), the mean SSIM, and the differences to the attacker who takes the update for one gradient, with 95 % bootstrap
intervals over batches.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch

from raytrust.attacks.inversion.rounds import as_one_gradient, at_midpoint
from raytrust.config import InversionConfig, LocalConfig, ModelConfig, Threat, TrainConfig
from raytrust.data import load
from raytrust.leak import identity_view
from raytrust.leak.observation import Capture, Observation, decoded
from raytrust.metrics.statistics import bootstrap_interval
from raytrust.persample.matcher import GradientMatcher
from raytrust.persample.memory import keep_freed_memory
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.loop import capture_images

WAYS = {"steps": lambda seen: seen, "surrogate": at_midpoint, "gradient": as_one_gradient}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="convnet")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--images", type=int, default=4, help="of a private batch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--part", type=int, default=1, help="images of one local step; 0: all of them")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--tv", type=float, default=1e-2)
    options = parser.parse_args()
    keep_freed_memory()
    data = load(options.data, image_size=options.image_size)
    count = options.batches * options.images
    images, labels = data.test_images[:count], data.test_labels[:count]
    for rate in options.rates:
        local = LocalConfig(options.steps, rate, options.part or None)
        run = TrainConfig(
            model=ModelConfig(options.model, width=options.width),
            threat=Threat(batch_size=options.images),
            local=local,
            workers=1,
        )
        captures = capture_images(run, data, images, labels)
        attack = InversionConfig("naive", tv=options.tv, iterations=options.iterations)
        reached = {way: evaluate_inversion(captures, replace(attack, through=way)) for way in options.ways}
        by_batch = {way: np.reshape(r.ssim, (options.batches, -1)).mean(1) for way, r in reached.items()}
        print(f"\n{local.title}; {options.batches} batches of {options.images} images, {options.iterations} iterations")
        for way, result in reached.items():
            apart = np.mean([distance_at_truth(capture, WAYS[way](capture.seen)) for capture in captures])
            interval = bootstrap_interval(by_batch[way])
            print(f"  {way:9} at the truth {apart:.1e}   SSIM {np.mean(by_batch[way]):.3f} {shown(interval)}", end="")
            if way != options.ways[-1]:
                gain = by_batch[way] - by_batch[options.ways[-1]]
                print(f"   - {options.ways[-1]} {gain.mean():+.3f} {shown(bootstrap_interval(gain))}", end="")
            print(f"   {result.seconds:.0f} s", flush=True)


def distance_at_truth(capture: Capture, at: Observation) -> float:
    """What this attacker would measure if it had the private images."""
    seen, truth = capture.seen, capture.truth
    x = (truth.images - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
    matcher = GradientMatcher(at.build_model(), local=at.local)
    distance, _ = matcher(x[None], truth.labels[None], identity_view(decoded(seen).gradient).distance)
    return float(distance)


def shown(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
