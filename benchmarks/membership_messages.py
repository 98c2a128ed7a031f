"""How much faster than vmap(grad) candidates are scored against a message, without a gradient of each.

    python benchmarks/membership_messages.py

Inner product with a message and norm of the gradient of every candidate, in evaluation mode, on one thread; the median
processor time of several runs of each way, and the ratio. For comparison, the inner products alone by one forward-mode
product, and the gradients themselves, which the learned attack asks for.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from raytrust.config import ModelConfig
from raytrust.networks.build import build_model
from raytrust.persample import PerSampleGradients


def by_vmap(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """One gradient a candidate."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (parameters, buffers), (x[None],)), label[None])

    return list(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, labels).values())


def products_by_vmap(model: nn.Module, x: Tensor, labels: Tensor, direction: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(inner products, squared norms) from one gradient a candidate."""
    grads = by_vmap(model, x, labels)
    inner = sum(torch.einsum("nk,k->n", g.flatten(1), d.flatten()) for g, d in zip(grads, direction, strict=True))
    return torch.as_tensor(inner), torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)


def by_jvp(model: nn.Module, x: Tensor, labels: Tensor, direction: list[Tensor]) -> Tensor:
    """Inner products alone."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    tangents = dict(zip(parameters, direction, strict=True))

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, (parameters, buffers), (x,)), labels, reduction="none")

    with torch.no_grad():
        return jvp(losses, (parameters,), (tangents,))[1]


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.candidates} candidates of 32x32x3, one thread, {platform.machine()}")
    configs = (ModelConfig("convnet", width=16), ModelConfig("resnet18", width=16), ModelConfig("resnet18", width=64))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.candidates, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (options.candidates,), generator=generator)
    for config in configs:
        model = build_model(config, 3, 10, seed=0).eval()
        direction = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        engine = PerSampleGradients(model)
        ways = (
            partial(engine.products_and_norms, x[:, None], labels[:, None], direction),
            partial(products_by_vmap, model, x, labels, direction),
            partial(by_jvp, model, x, labels, direction),
            partial(engine.dense, x[:, None], labels[:, None]),
            partial(by_vmap, model, x, labels),
        )
        ours, theirs, forward_mode, dense, dense_by_vmap = (
            1e3 / options.candidates * seconds(way, options.repeats) for way in ways
        )
        print(
            f"{config.name} width {config.width}: {ours:.2f} ms a candidate, vmap(grad) {theirs:.2f} ms, "
            f"ratio {theirs / ours:.1f}; inner products alone by jvp {forward_mode:.2f} ms; "
            f"gradients {dense:.2f} ms, vmap(grad) {dense_by_vmap:.2f} ms, ratio {dense_by_vmap / dense:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
