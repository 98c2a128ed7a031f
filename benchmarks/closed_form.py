"""Is a vision transformer private because the optimiser fails on it? The closed form and the optimiser side by side.

    python benchmarks/closed_form.py --data cifar10.npz

Attacks test images, each alone, at an untrained ViT (patches of 4x4, learned position embedding), naively and knowing
the compressor, and prints a Markdown table of mean SSIM (the least of an image).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raytrust.config import InversionConfig, ModelConfig, TrainConfig, parse_defence, register
from raytrust.config.attacks import ANALYTIC
from raytrust.data import load
from raytrust.studies.evaluate import InversionFailure, InversionResult, evaluate_inversions
from raytrust.train.loop import capture_images


@register.network("vit")
def vit(channels: int, classes: int, side: int = 32, width: int = 192, depth: int = 4) -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(side, 4, depth, 3, width, 4 * width, num_classes=classes)
    # torchvision's is zero, behind which nothing has a gradient.
    nn.init.normal_(model.heads.head.weight, std=0.02)  # type: ignore[arg-type, union-attr]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", required=True, help="cifar10, FILE.npz or DIR; of 3 channels")
    add("--first", type=int, default=0, help="test image to begin with (default: %(default)s)")
    add("--images", type=int, default=8, help="(default: %(default)s)")
    add("--width", type=int, default=192, help="(default: %(default)s)")
    add("--depth", type=int, default=4, help="(default: %(default)s)")
    add("--iterations", type=int, default=400, help="of the optimiser; 0: without it (default: %(default)s)")
    add("--defence", nargs="+", default=["none", "powersgd:16", "powersgd:4", "topk:0.01"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.data)
    part = slice(options.first, options.first + options.images)
    network = (("depth", options.depth), ("side", data.image_size[0]))
    attacks = [ANALYTIC, replace(ANALYTIC, objective="aware")]
    if options.iterations:
        attacks += [InversionConfig(o, iterations=options.iterations) for o in ("naive", "aware")]
    print("| defence | " + " | ".join(f"{a.method}, {a.objective}" for a in attacks) + " |")
    print("|---" * (1 + len(attacks)) + "|")
    for text in options.defence:
        defence = parse_defence(text)
        model = ModelConfig("vit", width=options.width, options=network)
        config = TrainConfig(defence=defence, model=model, workers=1, batch_size=1)
        captures = capture_images(config, data, data.test_images[part], data.test_labels[part])
        once = list(dict.fromkeys(attack.against(defence) for attack in attacks))
        # The fused kernels of attention have no second derivative on a CPU, which the optimiser needs.
        with sdpa_kernel(SDPBackend.MATH):
            results = dict(zip(once, evaluate_inversions(captures, once), strict=True))
        cells = " | ".join(_cell(results[attack.against(defence)]) for attack in attacks)
        print(f"| {defence.name} | {cells} |", flush=True)


def _cell(result: InversionResult | InversionFailure) -> str:
    if isinstance(result, InversionFailure):
        return f"failed: {result.error}"
    return f"{np.mean(result.ssim):.3f} ({min(result.ssim):.3f})"


if __name__ == "__main__":
    main()
