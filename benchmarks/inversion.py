"""How fast is an iteration of gradient matching, beside the textbook double-backward loop?

    OMP_NUM_THREADS=1 python benchmarks/inversion.py
    python benchmarks/inversion.py --restarts 16 --dtype bfloat16 --json inversion.json
    python benchmarks/inversion.py --restarts --width 16 --size 16 --images 1 8 32  # as the quick preset
    python benchmarks/inversion.py --device cuda --restarts 1 16 64

An iteration of one restart is the distance of its gradient from the observed one, and the derivative by the image: full
ResNet-18 (CIFAR stem, evaluation mode; --width for a narrower one) on 32x32 images (--size). The textbook loop takes
one restart at a time, in float32, with torch.autograd.grad(create_graph=True). Both are timed in turns in the same run:
the median time, and the median of the ratios of neighbours. On the CPU: process time of one thread; on a GPU:
wall-clock time between synchronisations.

A second table is of whole attacks on several images, each with an observation of its own, as sweeps run them: one
restart, with its prior and its optimiser; an iteration's time is the difference of a long and a short attack.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.attacks.inversion import GradientMatcher, invert
from raytrust.compress import build
from raytrust.config import (
    CompressorConfig,
    Defence,
    DenseConfig,
    InversionConfig,
    ModelConfig,
    PowerSGDConfig,
    TopKConfig,
    TrainConfig,
)
from raytrust.data import Dataset
from raytrust.leak import View, identity_view, view_of
from raytrust.networks.build import build_model
from raytrust.networks.device import exact
from raytrust.persample.memory import keep_freed_memory
from raytrust.train.loop import capture_images
from raytrust.wire.channel import LocalChannel, Tap

AWARE: dict[str, CompressorConfig] = {
    "aware powersgd-4": PowerSGDConfig(rank=4),
    "aware topk-4": TopKConfig(equal_to_rank=4, equal_by="values"),  # as many values as PowerSGD of rank 4
}
OBJECTIVES = ("naive", *AWARE)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def views(model: nn.Module, device: str, size: int) -> dict[str, View]:
    """What one private image's gradient reveals under each objective: all of it, or what a compressor let through."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, size, size, generator=generator).to(device)
    loss = F.cross_entropy(model(image), torch.tensor([3], device=device))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    found: dict[str, View] = {"naive": identity_view(grads)}
    for name, config in AWARE.items():
        tap = Tap(LocalChannel(), keep=True)
        shapes = [g.shape for g in grads]
        build(Defence(config), shapes).reduce([g.cpu() for g in grads], tap)
        found[name] = view_of(build(Defence(config), shapes), [m.to(device) for m in tap.messages], "link")
    return found


def textbook(model: nn.Module, x: Tensor, label: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Distance and derivative for one restart: x (1, channels, height, width), label (1,)."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), label)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    value = view.distance([g[None] for g in grads])
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def seconds(step: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(objective: str, restarts: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The matcher with this many restarts, in turns with one restart of the textbook loop."""
    model = build_model(ModelConfig(width=options.width), 3, 10, seed=0).eval().to(options.device)
    view = views(model, options.device, options.size)[objective]
    matcher = GradientMatcher(model, dtype=DTYPES[dtype])
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(restarts, 1, 3, options.size, options.size, generator=generator).to(options.device)
    labels = torch.full((restarts, 1), 3, device=options.device)

    value, _ = textbook(model, x[0], labels[0], view)  # both warm up
    found, _ = matcher(x, labels, view.distance)
    if abs(float(found[0] - value)) > 0.02:
        raise SystemExit(f"The matcher's distance {float(found[0])} is not the textbook's {float(value)}.")
    times = [
        (
            seconds(lambda: textbook(model, x[0], labels[0], view), options.device),
            seconds(lambda: matcher(x, labels, view.distance), options.device) / restarts,
        )
        for _ in range(options.repeats)
    ]
    return {
        "objective": objective,
        "restarts": restarts,
        "dtype": dtype,
        "device": options.device,
        "ms_per_restart": 1e3 * statistics.median(ours for _, ours in times),
        "ratio_to_textbook": statistics.median(theirs / ours for theirs, ours in times),
    }


def measure_attack(objective: str, images: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Whole attacks on this many images together, in turns with one iteration of the textbook loop."""
    model_config = ModelConfig("resnet18", width=options.width)
    model = build_model(model_config, 3, 10, seed=0).eval().to(options.device)
    view = views(model, options.device, options.size)[objective]
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (images, 3, options.size, options.size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(images) % 10
    config = TrainConfig(defence=Defence(AWARE.get(objective, DenseConfig())), model=model_config, workers=1)
    captures = capture_images(config, Dataset("noise", pixels, labels, pixels, labels, 10), pixels, labels)

    def attack(iterations: int) -> None:
        kind: Any = objective.split()[0]
        settings = InversionConfig(kind, tv=1e-2, iterations=iterations, precision=dtype)  # type: ignore[arg-type]
        invert([(c.seen, settings) for c in captures], options.device)

    x = torch.randn(1, 3, options.size, options.size, generator=generator).to(options.device)
    label = labels[:1].to(options.device)
    textbook(model, x, label, view)
    attack(1)  # both warm up
    times = []
    for _ in range(options.repeats):
        theirs = seconds(lambda: textbook(model, x, label, view), options.device)
        short, long = (seconds(lambda n=n: attack(n), options.device) for n in (1, 5))  # type: ignore[misc]
        times.append((theirs, (long - short) / 4 / images))
    return {
        "objective": objective,
        "images": images,
        "dtype": dtype,
        "device": options.device,
        "ms_per_image": 1e3 * statistics.median(ours for _, ours in times),
        "ratio_to_textbook": statistics.median(theirs / ours for theirs, ours in times),
    }


def checked(options: argparse.Namespace) -> argparse.Namespace:
    for name in ("width", "size", "repeats", "restarts", "images"):
        given = getattr(options, name)
        for value in [given] if isinstance(given, str) else given:
            if not (value.isdecimal() and int(value) > 0):
                raise ValueError(f"Expected {name}={value} to be a whole number of at least 1.")
    options.width, options.size, options.repeats = (int(getattr(options, n)) for n in ("width", "size", "repeats"))
    options.restarts, options.images = ([int(n) for n in counts] for counts in (options.restarts, options.images))
    for name, known in (("objective", OBJECTIVES), ("dtype", tuple(DTYPES)), ("device", ("cpu", "cuda"))):
        chosen = getattr(options, name)
        for value in [chosen] if isinstance(chosen, str) else chosen:
            if value not in known:
                raise ValueError(f"Expected {name}={value} in {known}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected device=cuda to be available here.")
    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"Expected json={options.json} in a directory that exists.")
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", nargs="+", default=OBJECTIVES)
    parser.add_argument("--restarts", nargs="*", default=("1", "4", "16", "64"))
    parser.add_argument("--images", nargs="*", default=("1", "5", "10"))
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", default="64")
    parser.add_argument("--size", default="32")
    parser.add_argument("--repeats", default="3")
    parser.add_argument("--json", type=Path)
    try:
        options = checked(parser.parse_args())
    except ValueError as error:
        sys.exit(str(error))
    torch.set_num_threads(1)
    keep_freed_memory()
    with exact(options.device):
        rows = tables(options)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def tables(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print, and return the rows."""
    print(f"{'objective':<18}{'restarts':>9}{'dtype':>10}{'ms/restart':>12}{'restarts/s':>12}{'x textbook':>12}")
    rows = []
    for objective in options.objective:
        for dtype in options.dtype:
            for restarts in options.restarts:
                row = measure(objective, restarts, dtype, options)
                rows.append(row)
                ms, ratio = row["ms_per_restart"], row["ratio_to_textbook"]
                print(f"{objective:<18}{restarts:>9}{dtype:>10}{ms:>12.1f}{1e3 / ms:>12.1f}{ratio:>12.2f}", flush=True)
    print(f"\n{'whole attack':<18}{'images':>9}{'dtype':>10}{'ms/image':>12}{'images/s':>12}{'x textbook':>12}")
    for objective in options.objective:
        for dtype in options.dtype:
            for images in options.images:
                row = measure_attack(objective, images, dtype, options)
                rows.append(row)
                ms, ratio = row["ms_per_image"], row["ratio_to_textbook"]
                print(f"{objective:<18}{images:>9}{dtype:>10}{ms:>12.1f}{1e3 / ms:>12.1f}{ratio:>12.2f}", flush=True)
    return rows


if __name__ == "__main__":
    main()
