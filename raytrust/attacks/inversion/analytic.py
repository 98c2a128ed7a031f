"""The image solved for, where the gradient of the first layer is linear in it: no optimisation, no labels.

See `raytrust.attacks.inversion.first_layer` for which models these are. What a compressor let through of the weight's
gradient S^T X is linear in the layer's inputs X, and so in the image, which is the solution of a least-squares problem:
exact wherever the messages determine it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from raytrust.attacks.inversion.engine import Candidates
from raytrust.attacks.inversion.first_layer import ClosedForm, closed_form, entered_patches
from raytrust.attacks.inversion.objectives import target_view
from raytrust.attacks.inversion.separation import separate
from raytrust.config import InversionConfig
from raytrust.leak import LinearView
from raytrust.leak.observation import Observation, decoded
from raytrust.leak.views import Product, ProductView
from raytrust.networks.task import row_of

ITERATIONS = 300
# Of the residual, relative to its beginning: what float32 resolves.
TOLERANCE = 1e-7
# Relative to the largest: directions of the signals that are weaker hold rounding alone.
WEAKEST = 1e-6
# Amplitude of the differences between colour channels, relative to their mean's, in natural images.
COLOUR = 0.3


def analytic(seen: Observation, config: InversionConfig, device: str = "cpu") -> Candidates:
    """The one candidate that the first layer's gradient gives; its objective is the residual, infinite without signal;
    of several images, infinite where they can't be told apart.

    Raises ValueError as `solve_first_layer` and `separate_images` do.
    """
    solve = solve_first_layer if seen.threat.batch_size == 1 else separate_images
    images, residual = solve(seen, config, device)
    # NaN stands for a signal that was not sent. Candidates mark what was not found by infinity, which compares.
    return Candidates(images[None], torch.tensor([residual]).nan_to_num(torch.inf))


def separate_images(seen: Observation, config: InversionConfig, device: str = "cpu") -> tuple[Tensor, float]:
    """(images (batch, channels, height, width) in [0, 1], in any order, share of the layer's outputs whose signs they
    don't explain), by `separate`, of what was decoded; mean images and NaN where it finds none.

    PowerSGD of a rank of at least the batch sends the layer's gradient, of that rank, whole. Raises ValueError for a
    model without a linear layer on the flat image, and after local steps.
    """
    size, model = seen.threat.batch_size, seen.build_model()
    form = closed_form(model, seen.image_shape, size, seen.task, seen.targets)
    if form is None or seen.local.steps > 1:
        raise ValueError(
            f"Expected batch_size={size} to be 1 for method='analytic', or one step of a model whose first layer is "
            "linear, with bias, on the flat image."
        )
    names, layer = list(seen.weights), (form.weight, form.signal)
    gradient = decoded(seen, device).gradient
    weight, bias = (gradient[names.index(name)] for name in layer)
    found = separate(tuple(seen.weights[name] for name in layer), (weight, bias), size, config.seed)  # type: ignore[arg-type]
    entered, returned, offset = _first_inputs(seen, model, form, device)
    if found is None:
        pixels, mismatch = torch.zeros(size, *seen.image_shape), float("nan")
    else:
        inputs, mismatch = found
        rights = [returned(x[None] - offset) for x in inputs]
        solved = [conjugate_gradient(lambda v: returned(entered(v)), right)[0] for right in rights]
        pixels = torch.stack(solved).float().cpu().view(size, *seen.image_shape)
    images = pixels * seen.std.view(-1, 1, 1) + seen.mean.view(-1, 1, 1)
    return images.clamp(0, 1), mismatch


def solve_first_layer(seen: Observation, config: InversionConfig, device: str = "cpu") -> tuple[Tensor, float]:
    """(image (1, channels, height, width) in [0, 1], relative residual of the normal equations).

    Of the images that agree with products of the gradient (PowerSGD) it is the likeliest with a natural image's
    spectrum; in entries (Top-K) pixels on which the messages shed no light are those of the mean image. NaN where no
    signal was sent. Raises ValueError for a model without a closed form, and a view that isn't linear.
    """
    model = seen.build_model()
    form = closed_form(model, seen.image_shape, 1, seen.task, seen.targets)
    if form is None:
        raise ValueError(
            "Expected a model whose first layer is linear, with bias, on the flat image, or a patch embedding with a "
            "learned position embedding, for method='analytic'."
        )
    full = target_view(seen, config, device)
    if not isinstance(full, LinearView):
        raise ValueError("Expected a compressor with a linear view for method='analytic'.")
    names = list(seen.weights)
    gradient = decoded(seen, device).gradient[names.index(form.signal)]
    signal = gradient.flatten()[form.entries.to(device)].double()
    matrix = names.index(form.weight)
    entered, returned, offset = _first_inputs(seen, model, form, device)
    if isinstance(full, ProductView):
        view: LinearView = _whitened(full, matrix, signal)
        likely: Callable[[Tensor], Tensor] = partial(_natural, shape=seen.image_shape)
    else:
        # Entries have no common factor to whiten by, without which the prior needs ten times as many iterations.
        view = _on_inputs(full, matrix, signal, [w.shape for w in seen.weights.values()])
        likely = torch.clone

    # By products alone: as a matrix, the map would hold a column of all measurements for each pixel.
    def forward(z: Tensor) -> list[Tensor]:
        return view.measure([entered(likely(z))[None]])

    def backward(measured: list[Tensor]) -> Tensor:
        return likely(returned(view.adjoint(measured)[0][0]))

    constant = view.measure([offset[None]])
    right = backward([o[None] - c for o, c in zip(view.observed, constant, strict=True)])
    z, residual = conjugate_gradient(lambda v: backward(forward(v)), right)
    image = likely(z).float().cpu().view(seen.image_shape) * seen.std.view(-1, 1, 1) + seen.mean.view(-1, 1, 1)
    return image.clamp(0, 1)[None], residual


def _first_inputs(
    seen: Observation, model: torch.nn.Module, form: ClosedForm, device: str
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """How the layer's inputs come of the pixels, (pixels,) -> (positions, inputs): the linear part, its adjoint, and
    the inputs for the mean image."""
    model = model.eval().to(device)
    targets = torch.empty(0) if seen.targets is None else row_of(seen.targets, slice(1))
    call = partial(seen.task.output, model, targets=targets)
    blank = torch.zeros((1, *seen.image_shape), device=device, requires_grad=True)
    start = entered_patches(model, call, form.layer, blank)
    back = torch.zeros_like(start, requires_grad=True)
    # The derivative of the adjoint is the map itself, so that one pass through the model serves all iterations.
    (pulled,) = torch.autograd.grad(start, blank, back, create_graph=True)

    def entered(x: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, back, x.view_as(blank).to(blank), retain_graph=True)[0].to(x)

    def returned(y: Tensor) -> Tensor:
        return torch.autograd.grad(start, blank, y.to(start), retain_graph=True)[0].flatten().to(y)

    return entered, returned, start.detach().double()


def _whitened(view: ProductView, matrix: int, signal: Tensor) -> ProductView:
    """What products of the weight's gradient S^T X say of X, by orthonormal rows in place of each left factor.

    signal: S, (positions, outputs).
    """
    observed, products = [], []
    for seen, (parameter, left, right) in zip(view.observed, view.products, strict=True):
        if parameter != matrix:
            continue
        # Measured without a left factor, a product is transposed.
        product = seen.double().T if left is None and right is not None else seen.double().flatten(1)
        factor = signal.T if left is None else left.double() @ signal.T
        # The signals of neighbouring patches are nearly equal. Left as they are, the system has a condition number of
        # 1e4, whose square the normal equations have: 700 iterations instead of 100.
        u, s, rows = torch.linalg.svd(factor, full_matrices=False)
        keep = s > WEAKEST * s[0]
        observed.append(u[:, keep].T @ product / s[keep, None])
        products.append(Product(0, rows[keep], None if right is None else right.double()))
    inputs = view.adjoint([o[None] for o in view.observed])[matrix][0, 0].numel()
    return ProductView(observed, products, [torch.Size((len(signal), inputs))])


def _on_inputs(view: LinearView, matrix: int, signal: Tensor, shapes: list[torch.Size]) -> LinearView:
    """The view of S^T X as one of X: (1, positions, inputs)."""
    # A view measures whole gradients, of which only this layer's matrix depends on the image: the rest is left blank.
    blank = [torch.zeros(1, *shape, device=signal.device) for shape in shapes]

    def measure(inputs: list[Tensor]) -> list[Tensor]:
        weight = (signal.T @ inputs[0][0]).to(blank[matrix]).view_as(blank[matrix])
        return view.measure([weight if i == matrix else b for i, b in enumerate(blank)])

    def adjoint(measured: list[Tensor]) -> list[Tensor]:
        return [(signal @ view.adjoint(measured)[matrix][0].flatten(1).to(signal))[None]]

    return LinearView(view.observed, measure, adjoint)  # type: ignore[arg-type]


def _natural(z: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """White noise z -> an image as likely, (pixels,): amplitudes that fall as 1 / frequency, and little colour.

    Linear, and its own adjoint.
    """
    # Where the messages leave images to choose from, the least z is then the likeliest image: through PowerSGD of rank
    # 4 0.73 SSIM, against 0.46 for the least X.
    image = z.view(shape)
    sides = [torch.fft.fftfreq(n, 1 / n, device=z.device, dtype=z.dtype) for n in shape[1:]]
    frequency = (sides[0][:, None].square() + sides[1].square()).sqrt().clamp_min(1)
    smooth = torch.fft.ifft2(torch.fft.fft2(image) / frequency).real
    grey = smooth.mean(0, keepdim=True)
    return (grey + COLOUR * (smooth - grey)).flatten()


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
