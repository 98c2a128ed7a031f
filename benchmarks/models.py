"""Which networks take the fast path, how exactly, how fast, and what an attack finds? docs/models.md has the answers.

    python benchmarks/models.py                                 # gradients and time, all networks
    python benchmarks/models.py --attack cifar10.npz            # and the SSIM of a short attack on a test image
    python benchmarks/models.py resnet18 timm:resnetv2_50d_gn   # some, or one of timm where that is installed

Gradients and their derivatives by the image are compared with plain autograd's in float64, of two images of noise; a
step is what an attack does in an iteration, for 8 candidates of one image each, in milliseconds of CPU time of one
thread, or by the clock with --device cuda. Networks are untrained, their batch norms have seen noise, and all are in
evaluation mode. SSIM is of one image.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raytrust.attacks.inversion import invert
from raytrust.compress import build
from raytrust.config import Defence, InversionConfig, Threat
from raytrust.data import load
from raytrust.leak import identity_view
from raytrust.metrics.images import ssim_table
from raytrust.networks.device import exact, usable
from raytrust.networks.task import CROSS_ENTROPY, Targets, Task
from raytrust.persample import GradientMatcher
from raytrust.persample.memory import keep_freed_memory
from raytrust.studies.audit.private import private
from raytrust.studies.audit.victim import State, Victim

CLASSES = 10


class StandardisedConv(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def standardised_resnet(width: int = 32) -> nn.Module:
    """ResNet-18 with group norm and standardised weights."""
    norm = partial(nn.GroupNorm, 8)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], CLASSES, norm_layer=norm)
    for module in list(model.modules()):
        for child in module.children():
            if type(child) is nn.Conv2d:
                child.__class__ = StandardisedConv
    return model


class Scaled(nn.Module):
    """As timm's LayerScale."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma)


class Block(nn.Module):
    """A transformer's, with attention written out as timm writes it and scaled branches."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out, self.ls1, self.ls2 = nn.Linear(width, 3 * width), nn.Linear(width, width), *two(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.ls1(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def two(width: int) -> tuple[nn.Module, nn.Module]:
    return Scaled(width), Scaled(width)


class LayerScaleViT(nn.Module):
    def __init__(self, width: int = 128, depth: int = 4):
        super().__init__()
        self.patches, self.cls_token = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.along = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, width: int = 128, depth: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock(64, width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


class HardSigmoid(nn.Hardsigmoid):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


class Entry(NamedTuple):
    make: Callable[[], nn.Module]
    size: int = 32
    segments: bool = False


def classifier(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=CLASSES, **options)


def with_small_head(name: str, features: int) -> Callable[[], nn.Module]:
    """Without the hidden layers of its head, which hold 120 of VGG's 130 million weights for images of 224 pixels."""

    def make() -> nn.Module:
        with torch.device("meta"):
            model = getattr(torchvision.models, name)(num_classes=CLASSES)
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Identity()
        model = model.to_empty(device="cpu")
        for layer in model.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        model.classifier = nn.Linear(features, CLASSES)
        return model

    return make


def segmenter(name: str) -> Callable[[], nn.Module]:
    make = getattr(torchvision.models.segmentation, name)
    return lambda: make(weights=None, weights_backbone=None, num_classes=CLASSES)


NETWORKS: dict[str, Entry] = {
    "alexnet, small head": Entry(with_small_head("alexnet", 256), 64),
    "vgg11, small head": Entry(with_small_head("vgg11", 512)),
    "vgg11_bn, small head": Entry(with_small_head("vgg11_bn", 512)),
    **{
        name: Entry(classifier(name))
        for name in (
            *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "mobilenet_v2"),
            *("mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "shufflenet_v2_x0_5", "mnasnet0_5"),
            *("squeezenet1_1", "regnet_y_400mf", "convnext_tiny", "swin_t", "swin_v2_t"),
        )
    },
    "googlenet": Entry(classifier("googlenet", aux_logits=False, init_weights=False)),
    "inception_v3": Entry(classifier("inception_v3", aux_logits=False, init_weights=False), 80),
    "vit, 4 layers of 128": Entry(
        partial(torchvision.models.VisionTransformer, 32, 4, 4, 4, 128, 256, num_classes=CLASSES)
    ),
    "maxvit, 2 stages": Entry(
        lambda: torchvision.models.MaxVit((32, 32), 32, 4, [32, 64], [1, 1], 16, 0.0, num_classes=CLASSES, mlp_ratio=2)
    ),
    "deeplabv3_mobilenet_v3_large": Entry(segmenter("deeplabv3_mobilenet_v3_large"), 32, True),
    "lraspp_mobilenet_v3_large": Entry(segmenter("lraspp_mobilenet_v3_large"), 32, True),
    "weight-standardised resnet18": Entry(standardised_resnet),
    "layer-scale vit": Entry(LayerScaleViT),
    "mlp-mixer": Entry(Mixer),
}


def entry_of(name: str) -> Entry:
    if name in NETWORKS:
        return NETWORKS[name]
    if name.startswith("timm:"):
        import timm  # type: ignore[import-not-found]

        return Entry(lambda: timm.create_model(name.removeprefix("timm:"), num_classes=CLASSES), 224)
    raise ValueError(f"Expected network={name!r} to be timm:NAME or one of {', '.join(NETWORKS)}.")


def network_of(entry: Entry) -> nn.Module:
    """Untrained; what its batch norms have seen is noise, so that what goes through is of a size."""
    torch.manual_seed(0)
    model = entry.make()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.momentum = 1.0
        with torch.no_grad():
            model.train()(torch.randn(16, 3, entry.size, entry.size))
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
    return model.eval()


def task_of(entry: Entry) -> Task:
    return Task(lambda output, masks: F.cross_entropy(output["out"], masks)) if entry.segments else CROSS_ENTROPY


def targets_of(entry: Entry, count: int) -> Tensor:
    shape = (count, entry.size, entry.size) if entry.segments else (count,)
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(3))


def textbook(
    model: nn.Module, x: Tensor, labels: Tensor, task: Task, directions: Sequence[Tensor]
) -> list[list[Tensor]]:
    """The gradients of each image, and the derivative of their inner products with a direction by the images."""
    weights, rows, slopes = list(model.parameters()), [], []
    for one, label in zip(x, labels, strict=True):
        leaf = one.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            loss = task.batch_loss(model, leaf, label)
        gradient = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        product = torch.stack([(g * d).sum() for g, d in zip(gradient, directions, strict=True)]).sum()
        slopes.append(torch.autograd.grad(product, leaf)[0])
        rows.append([g.detach() for g in gradient])
    return [[torch.stack(column) for column in zip(*rows, strict=True)], [torch.stack(slopes)]]


def ours(matcher: GradientMatcher, x: Tensor, labels: Tensor, directions: Sequence[Tensor]) -> list[list[Tensor]]:
    gradients: list[Tensor] = []

    def along(grads: Sequence[Tensor]) -> Tensor:
        gradients[:] = [(g * 1).detach() for g in grads]
        pairs = zip(grads, directions, strict=True)
        return torch.stack([g.reshape(len(g), -1) @ d.flatten() for g, d in pairs]).sum(0)

    return [gradients, [matcher(x, labels, along)[1]]]


def error(tensors: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest of a tensor, relative to it or to a thousandth of them all."""
    sizes = torch.stack([e.norm() for e in exact])
    apart = torch.stack([(t.double() - e).norm() for t, e in zip(tensors, exact, strict=True)])
    return float((apart / sizes.maximum(1e-3 * sizes.norm())).max())


def milliseconds(step: Callable[[], object], repeats: int, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = clock()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 1e3 * sorted(times[1:])[repeats // 2]


def measure(entry: Entry, slow: bool, device: str) -> list[str]:
    model, task = network_of(entry).to(device), task_of(entry)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 1, 3, entry.size, entry.size, generator=generator).to(device)
    labels = targets_of(entry, 8)[:, None].to(device)
    directions = [torch.randn(p.shape, generator=generator).to(device) for p in model.parameters()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        matcher = GradientMatcher(model, task=task)
        single = ours(matcher, x[:2], labels[:2], directions)
        twin, wide = copy.deepcopy(model).double(), [d.double() for d in directions]
        for module in twin.modules():
            if isinstance(module, nn.Hardsigmoid):  # of which torch has no second derivative
                module.__class__ = HardSigmoid
        exact = textbook(twin, x[:2].double(), labels[:2], task, wide)
        double = ours(GradientMatcher(twin, task=task), x[:2].double(), labels[:2], wide)
    reasons = [str(w.message) for w in said if str(w.message).startswith("Slow path")]
    plain = textbook(twin.float(), x[:2], labels[:2], task, directions)
    errors = [error(a, b) for a, b in zip(double, exact, strict=True)]
    errors += [error(slopes, exact[1]) for slopes in (single[1], plain[1])]
    distance = identity_view(directions).distance
    fast = milliseconds(lambda: matcher(x, labels, distance), 3, device)
    row = [f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}", reasons[0] if reasons else "fast"]
    row += [f"{e:.0e}" for e in errors]
    if not slow:
        return [*row, f"{fast:.0f}", "", ""]
    matcher.fast, matcher._path = False, GradientMatcher(model, task=task)._path
    slowly = milliseconds(lambda: matcher(x, labels, distance), 1, device)
    return [*row, f"{fast:.0f}", f"{slowly:.0f}", f"{slowly / fast:.1f}"]


def attacked(entry: Entry, data: str, iterations: int, device: str) -> str:
    """SSIM of our attack on the whole gradient of a test image."""
    test = load(data)
    image = test.test_images[100:101].float() / 255
    image = F.interpolate(image, size=(entry.size, entry.size), mode="bilinear", antialias=True).clamp(0, 1)
    mean = std = torch.full((3,), 0.5)
    model, task, defence = network_of(entry), task_of(entry), Defence()
    targets: Targets = targets_of(entry, 1)
    victim, state = Victim(model, task, mean, std), State.of(model)
    compressor = build(defence, [p.shape for p in model.parameters()])
    threat = Threat(batch_size=1, labels="known")
    batch = private(image, targets, None, task)
    (capture,) = victim.captures(model, compressor, defence, None, threat, batch, CLASSES, state, 0)
    (candidates,) = invert([(capture.seen, InversionConfig(iterations=iterations))], device)
    best = candidates.images[candidates.objective.argmin()]
    return f"{ssim_table(best, image)[0, 0]:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--attack", metavar="DATA", help="an attack on an image of this data, too")
    parser.add_argument("--iterations", type=int, default=200, help="of the attack (default: %(default)s)")
    parser.add_argument("--no-slow", action="store_true", help="leave out the time of the slow path")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of rows, by column")
    options = parser.parse_args(arguments)
    try:
        usable(options.device)
        entries = {name: entry_of(name) for name in options.networks}
    except (ValueError, ImportError) as failure:
        print(f"models.py: error: {failure}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    keep_freed_memory()
    head = ["network", "pixels", "weights, M", "path", "error: gradient", "by the image", "in float32", "autograd's"]
    head += ["fast, ms", "slow, ms", "x", *(["SSIM"] if options.attack else [])]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    rows = []
    with exact(options.device):
        for name, entry in entries.items():
            row = [name, str(entry.size), *measure(entry, not options.no_slow, options.device)]
            if options.attack:
                row.append(attacked(entry, options.attack, options.iterations, options.device))
            print("| " + " | ".join(row) + " |", flush=True)
            rows.append(dict(zip(head, row, strict=True)))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
