"""A learned inverter (Learning to Invert, Wu et al. 2023) beside the optimiser, on the same messages.

    python benchmarks/learned_inversion.py --data cifar10.npz --output learned --model lenet

Attacks the first test images, each alone, at the untrained network (evaluation-mode batch norm), with an inverter that
was trained on messages of training images, and by optimisation with both objectives. Prints a Markdown table of mean
SSIM with 95 % intervals over images. Finished attacks are kept in the output directory, and not run again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from uncompressed_inversion import captures_of_test_images

from raytrust.attacks.learned import Auxiliary
from raytrust.config import (
    Defence,
    InversionConfig,
    LearnedInverterConfig,
    ModelConfig,
    digest,
    parse_defence,
    to_dict,
)
from raytrust.data import Dataset, load
from raytrust.jobs.files import read_json, write_json
from raytrust.leak.observation import Capture
from raytrust.metrics.statistics import mean_interval, paired_difference
from raytrust.persample.memory import keep_freed_memory
from raytrust.studies.evaluate import InversionResult, LearnedResult, evaluate_inversion, evaluate_learned

DEFENCES = ("none", "signsgd", "topk:0.01")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        defences = [parse_defence(text) for text in options.defence or DEFENCES]
        data, model = load(options.data), ModelConfig(options.model)
        learned = LearnedInverterConfig(
            auxiliary=options.auxiliary,
            input=options.input,
            dimension=options.dimension,
            scale=options.scale,
            hidden=options.hidden,
            dropout=options.dropout,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            ssim=options.ssim,
            seed=options.seed,
        )
        optimiser = InversionConfig(
            tv=options.tv,
            step_size=options.step_size,
            iterations=max(1, options.iterations),
            signed=options.signed,
            schedule=options.schedule,
            seed=options.seed,
        )
        if not 2 <= options.images <= len(data.test_labels) - 100:
            raise ValueError(f"Expected images={options.images} in [2, {len(data.test_labels) - 100}].")
        if options.auxiliary > len(data.train_labels):
            raise ValueError(f"Expected auxiliary={options.auxiliary} to be at most {len(data.train_labels)}.")
        if options.iterations < 0:
            raise ValueError(f"Expected iterations={options.iterations} to be at least 0.")
    except (ValueError, OSError) as error:
        print(f"learned_inversion.py: error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{data.name}, test images 0-{options.images - 1}, {learned.name}")
    print(f"optimiser: {optimiser.name.split(' ', 1)[1]}, {options.iterations} iterations\n")
    columns = "model|defence|learned|naive|aware|learned - best of these|mean image|identified (learned/naive/aware)|n"
    print("| " + columns.replace("|", " | ") + " |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    attacks = [optimiser] if options.iterations else []
    for defence in defences:
        found = _attack(defence, learned, attacks, data, model, options.images, options.output)
        print(_line(options.model, defence, found, options.images), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--data", required=True, help="cifar10, FILE.npz or DIR; its training images are the auxiliary ones")
    add("--output", type=Path, required=True, metavar="DIR", help="where finished attacks are kept")
    add("--model", choices=["lenet", "resnet20", "resnet18", "convnet"], default="lenet", help=default)
    add("--defence", action="append", help=f"repeatable (default: {', '.join(DEFENCES)})")
    add("--auxiliary", type=int, default=5000, metavar="N", help=f"images to train on {default}")
    add("--images", type=int, default=16, metavar="N", help=f"private images {default}")
    add("--iterations", type=int, default=200, metavar="N", help=f"of the optimiser, 0 for none {default}")
    add("--tv", type=float, default=1e-2, help=f"the optimiser's weight of total variation {default}")
    add("--step-size", type=float, default=0.1, help=f"of the optimiser {default}")
    add("--signed", choices=["none", "hard", "soft"], default="soft", help=f"of the optimiser {default}")
    add("--schedule", choices=["steps", "cosine", "constant"], default="cosine", help=f"of its steps {default}")
    add("--input", choices=["hashed", "whole"], default="hashed", help=default)
    add("--dimension", type=int, default=4096, help=f"of the hashed input {default}")
    add("--scale", choices=["message", "tensor"], default="message", help=f"how messages are normalised {default}")
    add("--hidden", type=int, default=1000, help=default)
    add("--dropout", type=float, default=0.0, help=default)
    add("--learning-rate", type=float, default=1e-3, help=f"of the inverter {default}")
    add("--epochs", type=int, default=60, help=default)
    add("--ssim", type=float, default=0.0, help=f"weight of 1 - SSIM in the inverter's loss {default}")
    add("--seed", type=int, default=0, help=default)
    return parser


def _attack(
    defence: Defence,
    learned: LearnedInverterConfig,
    attacks: Sequence[InversionConfig],
    data: Dataset,
    model: ModelConfig,
    images: int,
    output: Path,
) -> dict[str, dict[str, Any]]:
    """What each attack reached: "learned", and "naive" and "aware" where the optimiser is to run."""
    references = data.test_images[-99:].float() / 255
    captures: list[Capture] = []
    found: dict[str, dict[str, Any]] = {}

    def kept(
        config: InversionConfig | LearnedInverterConfig, run: Callable[[], InversionResult | LearnedResult]
    ) -> Any:
        path = output / f"{digest(config, defence, model, images, data.fingerprint())}.json"
        if (figures := read_json(path)) is None:
            if not captures:
                captures.extend(captures_of_test_images(data, images, model, defence))
            figures = {"attack": to_dict(config), "defence": to_dict(defence), "model": to_dict(model)} | _figures(
                run()
            )
            write_json(path, figures)
        return figures

    def invert() -> LearnedResult:
        own = Auxiliary(data.train_images.float() / 255, data.train_labels)
        return evaluate_learned(captures, learned, own, references=references)

    found["learned"] = kept(learned, invert)
    for attack in attacks:
        for objective in ("naive", "aware"):
            run = InversionConfig(**{**to_dict(attack), "objective": objective}).against(defence)
            found[objective] = kept(run, lambda run=run: evaluate_inversion(captures, run, references=references))
    return found


def _figures(result: InversionResult | LearnedResult) -> dict[str, Any]:
    names = ("ssim", "mse", "identified_mse", "identified_ssim", "mean_image_ssim", "other_image_ssim", "seconds")
    figures: dict[str, Any] = {name: getattr(result, name) for name in names}
    figures["psnr"] = [p if math.isfinite(p) else None for p in result.psnr]  # infinite of a copy
    return figures | ({"losses": result.losses} if isinstance(result, LearnedResult) else {})


def _line(model: str, defence: Defence, found: dict[str, dict[str, Any]], images: int) -> str:
    best = max((o for o in found if o != "learned"), key=lambda o: np.mean(found[o]["ssim"]), default=None)
    gain = "-"
    if best is not None:
        pair = paired_difference(found["learned"]["ssim"], found[best]["ssim"])
        gain = f"{pair.difference:+.3f} [{pair.interval[0]:+.3f}, {pair.interval[1]:+.3f}], p = {pair.p_value:.2g}"
    cells = [_mean(found[o]["ssim"]) if o in found else "-" for o in ("learned", "naive", "aware")]
    floor = _mean(found["learned"]["mean_image_ssim"])
    known = "/".join(f"{np.mean(found[o]['identified_ssim']):.2f}" for o in found)
    return f"| {model} | {defence.name} | {' | '.join(cells)} | {gain} | {floor} | {known} | {images} |"


def _mean(values: Sequence[float]) -> str:
    interval = mean_interval(values)
    return f"{np.mean(values):.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


if __name__ == "__main__":
    sys.exit(main())
