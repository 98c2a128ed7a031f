"""How long does a step of each compressor take, on the gradient of the full ResNet-18?

    OMP_NUM_THREADS=1 python benchmarks/compressors.py
    python benchmarks/compressors.py --method qsgd --repeats 20 --json compressors.json

A step is: add the residual, encode, one collective of one worker, decode the mean, subtract what was sent. Its time is
given in copies of that gradient (44.7 MB), timed in turns with it in the same run: the median of the ratios of
neighbours. Beside them: torch's own powerSGD_hook, and a plain torch.topk over the whole gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.compress import build
from raytrust.config import (
    AtomoConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    DGCConfig,
    HalfConfig,
    ModelConfig,
    PowerSGDConfig,
    QSGDConfig,
    RandKConfig,
    ScaledSignConfig,
    SignSGDConfig,
    ThresholdConfig,
    TopKConfig,
    VqSGDConfig,
)
from raytrust.networks.build import build_model
from raytrust.wire.channel import LocalChannel, Tap

OWN_MEMORY = (DGCConfig, SignSGDConfig)  # without error feedback
METHODS: tuple[CompressorConfig, ...] = (
    DenseConfig(),
    HalfConfig("float16"),
    HalfConfig("bfloat16"),
    SignSGDConfig(),
    SignSGDConfig(momentum=0.9),
    ScaledSignConfig(),
    PowerSGDConfig(rank=1),
    PowerSGDConfig(rank=4),
    TopKConfig(level=0.01),
    TopKConfig(level=0.01, scope="layer"),
    ThresholdConfig(level=0.01),
    RandKConfig(level=0.01),
    DGCConfig(level=0.001),
    QSGDConfig(bits=4),
    QSGDConfig(bits=8),
    VqSGDConfig(samples=1000),
    AtomoConfig(rank=3),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--method", action="append", help="only these methods, such as topk; repeatable")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each method (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of {method, copies, bytes, ratio}")
    options = parser.parse_args(arguments)
    known = list(dict.fromkeys(config.method for config in METHODS))
    for name, value, good, expected in (
        ("repeats", options.repeats, options.repeats >= 1, "to be at least 1"),
        ("threads", options.threads, options.threads >= 1, "to be at least 1"),
        (
            "device",
            options.device,
            options.device == "cpu" or _cuda(options.device),
            "to be cpu, or cuda where there is one",
        ),
        ("method", options.method, set(options.method or []) <= set(known), "to be among " + ", ".join(known)),
    ):
        if not good:
            print(f"compressors.py: error: Expected {name}={value!r} {expected}.", file=sys.stderr)
            return 2
    torch.set_num_threads(options.threads)
    model = build_model(ModelConfig(), channels=3, classes=10, seed=0).to(options.device)
    grads = gradient(model, options.device)
    rows = []
    print(f"{_name(options.device)}, {options.threads} thread(s); one copy is {4 * _entries(grads) / 1e6:.1f} MB")
    print(f"{'method':32} {'copies':>7} {'bytes':>11} {'ratio':>7}")
    for config in METHODS:
        if options.method is None or config.method in options.method:
            rows.append(_row(config, model, grads, options.repeats))
            _print(rows[-1])
    if options.method is None:
        for row in (_plain_topk(grads, options.repeats), _torch_powersgd(model, grads, options.repeats, rank=4)):
            rows.append(row)
            _print(row)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def gradient(model: nn.Module, device: str, batch: int = 8) -> list[Tensor]:
    """A gradient as training has it: of the untrained network, on noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 10, (batch,), generator=generator).to(device)
    return list(torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters())))


def in_copies(step: Callable[[], object], grads: list[Tensor], repeats: int, warm_up: int = 3) -> float:
    """The median over repeats of (time of a step) / (time of a copy of the gradient just before and after it)."""
    source = torch.cat([g.flatten() for g in grads])
    target = torch.empty_like(source)
    for _ in range(warm_up):
        target.copy_(source)
        step()
    ratios = []
    before = _seconds(lambda: target.copy_(source), source)
    for _ in range(repeats):
        seconds = _seconds(step, source)
        after = _seconds(lambda: target.copy_(source), source)
        ratios.append(2 * seconds / (before + after))
        before = after
    return statistics.median(ratios)


def _seconds(step: Callable[[], object], like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _row(config: CompressorConfig, model: nn.Module, grads: list[Tensor], repeats: int) -> dict[str, Any]:
    defence = Defence(config, error_feedback=not isinstance(config, OWN_MEMORY))
    compressor = build(defence, model)
    tap = Tap(LocalChannel())
    compressor.reduce(grads, tap)
    copies = in_copies(lambda: compressor.reduce(grads, LocalChannel()), grads, repeats)
    return _as_row(defence.name, copies, tap.sent_bytes, grads)


def _plain_topk(grads: list[Tensor], repeats: int) -> dict[str, Any]:
    """The selection alone, by torch.topk over all magnitudes."""
    flat = torch.cat([g.flatten() for g in grads])
    k = len(flat) // 100
    copies = in_copies(lambda: flat.abs().topk(k), grads, min(repeats, 5), warm_up=1)
    return _as_row("torch.topk 1 % (selection)", copies, 8 * k, grads)


def _torch_powersgd(model: nn.Module, grads: list[Tensor], repeats: int, rank: int) -> dict[str, Any]:
    """torch's powerSGD_hook, with error feedback and warm start, in a group of one: from its call to its result."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hooks

    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if grads[0].is_cuda else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        state = hooks.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=2, min_compression_rate=0.5
        )

        def timed(state: Any, bucket: Any) -> Any:
            seconds.append(_seconds(lambda: result.append(hooks.powerSGD_hook(state, bucket).wait()), grads[0]))
            future: Any = torch.futures.Future()
            future.set_result(result.pop())
            return future

        timed.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # DDP looks at it
        result: list[Tensor] = []
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1000)
        wrapped.register_comm_hook(state, timed)
        images = torch.randn(1, *(3, 32, 32), device=grads[0].device)

        def step() -> None:
            wrapped(images).sum().backward()

        source = torch.cat([g.flatten() for g in grads])
        target, ratios = torch.empty_like(source), []
        for i in range(repeats + 4):  # at first it does not compress
            step()
            copies = statistics.median(_seconds(lambda: target.copy_(source), source) for _ in range(3))
            if i >= 4:
                ratios.append(seconds[-1] / copies)
        dist.destroy_process_group()
    sent = sum(
        min(rank, *m) * sum(m) if len(m) == 2 else m[0]
        for m in ((g.shape[0], g[0].numel()) if g.dim() > 1 else (g.numel(),) for g in grads)
    )
    return _as_row(f"torch powerSGD_hook rank {rank}", statistics.median(ratios), 4 * sent, grads)


def _as_row(method: str, copies: float, sent: int, grads: list[Tensor]) -> dict[str, Any]:
    return {"method": method, "copies": round(copies, 2), "bytes": sent, "ratio": round(4 * _entries(grads) / sent, 1)}


def _print(row: dict[str, Any]) -> None:
    print(f"{row['method']:32} {row['copies']:7.2f} {row['bytes']:11,} {row['ratio']:6.1f}x", flush=True)


def _entries(grads: list[Tensor]) -> int:
    return sum(g.numel() for g in grads)


def _cuda(device: str) -> bool:
    return device == "cuda" and torch.cuda.is_available()


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


if __name__ == "__main__":
    sys.exit(main())
