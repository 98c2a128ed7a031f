"""Which settings of an inversion attack are strongest? All of them on the same images, as one batch.

    python benchmarks/attack_settings.py --data mnist.npz --size 16 --defence none powersgd:1 powersgd:4 topk:rank4

Attacks test images, each alone, at the untrained ResNet-18 (CIFAR stem, evaluation-mode batch norm), knowing the
compressor, and prints a Markdown table: mean SSIM (the least of an image; images identified among 100). Choose settings
by it on other images, and better other data, than those that are reported.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import numpy as np
import torch

from raytrust.config import Defence, InversionConfig, ModelConfig, TrainConfig, parse_defence
from raytrust.data import Dataset, load
from raytrust.persample.memory import keep_freed_memory
from raytrust.studies.evaluate import DISTRACTORS, InversionFailure, evaluate_inversions
from raytrust.train.loop import capture_images


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", required=True, help="digits, faces, cifar10, FILE.npz or DIR")
    add("--size", type=int, help="resize images to this side")
    add("--width", type=int, default=16, help="(default: %(default)s)")
    add("--first", type=int, default=100, help="test image to begin with (default: %(default)s)")
    add("--images", type=int, default=16, help="(default: %(default)s)")
    add("--iterations", type=int, default=100, help="(default: %(default)s)")
    add("--defence", nargs="+", default=["none", "powersgd:1", "powersgd:4", "topk:rank4"])
    add("--matching", nargs="+", default=["cosine", "tensors"])
    add("--step-size", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    add("--tv", nargs="+", type=float, default=[0.003, 0.01, 0.03])
    options = parser.parse_args(arguments)
    try:
        defences = [parse_defence(text) for text in options.defence]
        data = load(options.data, image_size=options.size)
        last = options.first + options.images
        if options.images < 1 or options.first < 0 or last > len(data.test_labels):
            raise ValueError(
                f"Expected images={options.images} to be at least 1, from first={options.first} on in "
                f"[0, {len(data.test_labels)})."
            )
        attacks = [
            InversionConfig(matching=matching, step_size=step, tv=tv, iterations=options.iterations)
            for matching, step, tv in itertools.product(options.matching, options.step_size, options.tv)
        ]
        model = ModelConfig(width=options.width)
    except (ValueError, OSError) as error:
        print(f"attack_settings.py: error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    keep_freed_memory()
    columns = [reached(defence, attacks, data, model, options.first, last) for defence in defences]
    print(
        f"{data.name}, test images {options.first}-{last - 1}, width {options.width}, {options.iterations} iterations\n"
    )
    print("| matching | step | TV | " + " | ".join(defence.name for defence in defences) + " |")
    print("|---" * (3 + len(defences)) + "|")
    for i, attack in enumerate(attacks):
        cells = " | ".join(column[i] for column in columns)
        print(f"| {attack.matching} | {attack.step_size:g} | {attack.tv:g} | {cells} |", flush=True)
    return 0


def reached(
    defence: Defence, attacks: list[InversionConfig], data: Dataset, model: ModelConfig, first: int, last: int
) -> list[str]:
    """What each attack reaches on these images: "0.71 (0.44; 15)"."""
    config = TrainConfig(defence=defence, model=model, workers=1, batch_size=1)
    captures = capture_images(config, data, data.test_images[first:last], data.test_labels[first:last])
    references = data.train_images[:DISTRACTORS].float() / 255
    applied = [attack.against(defence) for attack in attacks]
    once = list(dict.fromkeys(applied))
    found = dict(zip(once, evaluate_inversions(captures, once, "cpu", references), strict=True))
    return [_cell(found[attack]) for attack in applied]


def _cell(result: object) -> str:
    if isinstance(result, InversionFailure):
        return f"failed: {result.error}"
    return f"{np.mean(result.ssim):.3f} ({min(result.ssim):.2f}; {sum(result.identified_ssim)})"  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
