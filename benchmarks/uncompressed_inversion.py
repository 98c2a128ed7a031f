"""How well the attack inverts an uncompressed gradient of the untrained full ResNet-18 (CIFAR stem, evaluation mode).

    python benchmarks/uncompressed_inversion.py --data cifar10.npz --images 5

Attacks the first test images, each alone, and prints SSIM image by image with the mean and its 95 % interval.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace

import numpy as np
import torch

from raytrust.compress import HookCompressor
from raytrust.config import Defence, ModelConfig, TrainConfig
from raytrust.config.attacks import GEIPING
from raytrust.data import Dataset, load
from raytrust.leak.observation import Capture
from raytrust.metrics.statistics import mean_interval
from raytrust.persample.memory import keep_freed_memory
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.loop import capture_images


def captures_of_test_images(
    data: Dataset,
    images: int | range,
    config: ModelConfig,
    defence: Defence | None = None,
    hook: HookCompressor | None = None,
) -> list[Capture]:
    """Captures at step 0 of the first test images, or of these, in their order, normalised by their own statistics."""
    chosen = list(range(images) if isinstance(images, int) else images)
    private = Dataset(
        data.name,
        data.test_images[chosen],
        data.test_labels[chosen],
        data.test_images,
        data.test_labels,
        data.classes,
    )
    run = TrainConfig(defence=defence or Defence(), model=config, workers=1)
    return capture_images(run, private, private.train_images, private.train_labels, hook=hook)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tv", type=float, default=1e-2)
    options = parser.parse_args()
    keep_freed_memory()
    attack = replace(GEIPING, tv=options.tv, iterations=options.iterations, restarts=options.restarts)
    captures = captures_of_test_images(load(options.data), options.images, ModelConfig(width=options.width))
    result = evaluate_inversion(captures, attack)
    print(f"{attack.name}, {attack.iterations} iterations, width {options.width}, {platform.machine()} CPU")
    print("SSIM", " ".join(f"{s:.3f}" for s in result.ssim), "PSNR", " ".join(f"{p:.1f}" for p in result.psnr))
    print(f"mean SSIM {np.mean(result.ssim):.3f}, 95 % interval {mean_interval(result.ssim)}, n = {len(result.ssim)}")
    print(f"{result.seconds:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
