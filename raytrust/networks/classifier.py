"""Where a network's features end and its classifier begins."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def final_linear(
    model: nn.Module, image_shape: tuple[int, int, int], classes: int | None = None
) -> tuple[str, nn.Linear]:
    """The linear layer whose outputs are the model's, else the one of as many outputs that is called last; its name.

    image_shape: (channels, height, width) of what the model takes. classes: of its outputs, by default as many as they
    are. Raises ValueError for a model without such a layer.
    """
    # Not the one that is defined last: a network may have a head that only its training uses.
    called: list[tuple[str, nn.Linear, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, _, output, name=name: called.append((name, m, output)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    # Two, as batch norm in training mode may refuse one.
    logits = model(torch.zeros(2, *image_shape))
    for handle in handles:
        handle.remove()
    classes = classes or logits.shape[1]
    called = [(name, layer, output) for name, layer, output in called if layer.out_features == classes]
    if not called:
        raise ValueError(f"Expected a model that ends in a linear layer of classes={classes} outputs.")
    ends = [(name, layer) for name, layer, output in called if output.shape == logits.shape and output.equal(logits)]
    return ends[-1] if ends else called[-1][:2]
