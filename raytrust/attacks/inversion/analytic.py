"""The input of a linear first layer, solved for: no optimisation, no labels.

For one image x, the gradients of y = W x + b are dW = d x^T and db = d (Phong et al. 2018, section 3): every row of dW
is a multiple of the image. What a compressor let through of dW is then linear in x, so the image is the solution of a
least-squares problem, exact wherever the messages determine it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raytrust.attacks.inversion.engine import Candidates
from raytrust.attacks.inversion.objectives import target_view
from raytrust.config import InversionConfig
from raytrust.leak import LinearView
from raytrust.leak.observation import Observation, decoded

ITERATIONS = 200
# Of the residual, relative to its beginning: what float32 resolves.
TOLERANCE = 1e-7


def analytic(seen: Observation, config: InversionConfig, device: str = "cpu") -> Candidates:
    """The one candidate that the first layer's gradient gives; its objective is the residual, infinite without bias.

    Raises ValueError as `solve_first_layer` does.
    """
    image, residual = solve_first_layer(seen, config, device)
    # NaN stands for a bias gradient that was not sent. Candidates mark what was not found by infinity, which compares.
    return Candidates(image[None], torch.tensor([residual]).nan_to_num(torch.inf))


def solve_first_layer(seen: Observation, config: InversionConfig, device: str = "cpu") -> tuple[Tensor, float]:
    """(image (1, channels, height, width) in [0, 1], relative residual of the normal equations).

    Pixels on which the messages shed no light are those of the mean image. NaN where no bias gradient was sent.
    Raises ValueError for a batch of several images, a first layer that isn't linear with bias, and a view that isn't
    linear.
    """
    # Of several images the rows of dW are mixtures of all images, and no longer multiples of one.
    if seen.threat.batch_size != 1:
        raise ValueError(f"Expected batch_size={seen.threat.batch_size} to be 1 for method='analytic'.")
    name = _first_layer(seen)
    names = list(seen.weights)
    matrix, signal = names.index(f"{name}.weight"), decoded(seen, device).gradient[names.index(f"{name}.bias")]
    view = target_view(seen, config, device)
    if not isinstance(view, LinearView):
        raise ValueError("Expected a compressor with a linear view for method='analytic'.")
    # A view measures whole gradients, of which only this layer's matrix depends on the image: the rest is left blank.
    blank = [torch.zeros(1, *w.shape, device=device) for w in seen.weights.values()]

    def forward(x: Tensor) -> list[Tensor]:
        return view.measure([torch.outer(signal, x)[None] if i == matrix else b for i, b in enumerate(blank)])

    def backward(measured: list[Tensor]) -> Tensor:
        return view.adjoint(measured)[matrix][0].T @ signal

    # By products alone: as a matrix, the map would hold a column of all measurements for each pixel.
    x, residual = conjugate_gradient(lambda v: backward(forward(v)), backward([o[None] for o in view.observed]))
    image = x.cpu().view(seen.image_shape) * seen.std.view(-1, 1, 1) + seen.mean.view(-1, 1, 1)
    return image.clamp(0, 1)[None], residual


def conjugate_gradient(apply: Callable[[Tensor], Tensor], right: Tensor) -> tuple[Tensor, float]:
    """The least x with apply(x) = right, for a positive semidefinite map, and the relative norm of what is left over.

    Hestenes & Stiefel 1952. NaN if `right` is zero.
    """
    # Starting at zero leaves pixels that nothing was measured of at zero, which is the mean image in normalised pixels.
    x, residual = torch.zeros_like(right), right.clone()
    direction, square = residual.clone(), float(residual @ residual)
    start = square
    for _ in range(ITERATIONS):
        if square <= TOLERANCE**2 * start:
            break
        image = apply(direction)
        step = square / float(direction @ image)
        x += step * direction
        residual -= step * image
        square, last = float(residual @ residual), square
        direction = residual + square / last * direction
    return x, (square / start) ** 0.5 if start > 0 else float("nan")


@torch.no_grad()
def _first_layer(seen: Observation) -> str:
    """The name of the layer that takes the image itself, if it is linear and has a bias."""
    # By what enters layers, not by their names or order: a model may flatten, scale or skip before its first one.
    model = seen.build_model().eval()
    image = torch.randn((1, *seen.image_shape), generator=torch.Generator().manual_seed(0))
    used: list[tuple[str, nn.Module, Tensor]] = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda m, inputs, name=name: used.append((name, m, inputs[0])))
    model(image)
    name, layer, entered = used[0]
    # Compared with the image itself: behind a step that has no parameters, the layer's input would be taken for the
    # image.
    if not isinstance(layer, nn.Linear) or layer.bias is None or not torch.equal(entered.flatten(), image.flatten()):
        raise ValueError("Expected a model whose first layer is linear, with bias, on the flat image.")
    return name
