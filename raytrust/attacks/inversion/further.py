"""Which attacks are to be made besides the usual ones: those for which the threat and the network give an opening."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from raytrust.attacks.inversion.first_layer import closed_form
from raytrust.attacks.inversion.priors import attacks_on_statistics
from raytrust.config import ONE_STEP, InversionConfig, LocalConfig, Threat
from raytrust.config.attacks import ANALYTIC, REGRESSION
from raytrust.networks.build import copy_of
from raytrust.networks.classifier import final_linear
from raytrust.networks.task import CROSS_ENTROPY, Sample, Targets, Task

# Of the noise that is taken out of what an attack arrived at, where it is tried unasked: chosen on the test images 100
# to 103 of CIFAR-10, before those from 0 on were attacked.
DENOISED = 0.06


def further_attacks(
    attacks: Sequence[InversionConfig],
    threat: Threat,
    network: nn.Module,
    image_shape: tuple[int, int, int],
    local: LocalConfig = ONE_STEP,
    task: Task = CROSS_ENTROPY,
    targets: Targets | None = None,
    classes: int | None = None,
) -> tuple[InversionConfig, ...]:
    """What is to be tried besides these attacks, none of them twice.

    With a prior on the batch's statistics, where the threat tells of them; from auxiliary images, where it grants any;
    and those that solve for the image, where the network has a closed form: optimisers fail on many transformers, which
    would then be called private. With the step, iterations and seed of the first attack.

    targets: of a batch, where the network takes more than images. classes: of the network's outputs, by default as many
    as they are.
    """
    # Priors and regressions pass images alone through the network.
    takes_images = task.argument is None and not (isinstance(targets, Sample) and targets.inputs)
    found: list[InversionConfig] = []
    if takes_images:
        found += attacks_on_statistics(attacks, threat, network)
    if takes_images and task.loss is None and _tells_features(threat, network, image_shape, local, classes):
        found += with_auxiliary(attacks)
    solvable = threat.batch_size == 1 or local.steps == 1
    if solvable and closed_form(network, image_shape, threat.batch_size, task, targets) is not None:
        found += [_like(attacks[0], replace(ANALYTIC, objective=o)) for o in ("naive", "aware")]
    return tuple(attack for attack in dict.fromkeys(found) if attack not in attacks)


def with_auxiliary(attacks: Sequence[InversionConfig]) -> list[InversionConfig]:
    """The regression; and of each objective the first attack that optimises, begun where the regression ends, as it is
    and denoised."""
    searching = [a for a in attacks if a.method == "optimise"]
    # In reverse, as the last value that is written for a key stays.
    first = {a.objective: a for a in reversed(searching)}
    begun = [replace(a, start="regression") for a in searching if first[a.objective] is a]
    denoised = [replace(a, denoise=DENOISED) for a in begun]
    return [_like(attacks[0], REGRESSION), *begun, *denoised]


def _tells_features(
    threat: Threat, network: nn.Module, image_shape: tuple[int, int, int], local: LocalConfig, classes: int | None
) -> bool:
    """Whether the classifier's gradient gives its features away, and the threat grants images to learn from."""
    if threat.auxiliary < max(2, threat.batch_size) or local.steps > 1:
        return False
    # In the modes that it has, of which batch norm's would change its statistics and dropout draws random numbers.
    network = copy_of(network).cpu()
    with torch.random.fork_rng(devices=[]):
        try:
            name, layer = final_linear(network, image_shape, classes)
        except ValueError:
            return False
        whole = _enters_as_one(network, layer, image_shape)
    # A weight that is frozen, or made of others, is not among the gradients.
    sent = any(key == f"{name}.weight" and p.requires_grad for key, p in network.named_parameters())
    return sent and threat.batch_size < layer.out_features and whole


@torch.no_grad()
def _enters_as_one(network: nn.Module, layer: nn.Linear, image_shape: tuple[int, int, int]) -> bool:
    """Whether what goes into the layer is one vector an image, and not one of each place in it."""
    entered: list[int] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].ndim))
    network(torch.zeros(2, *image_shape))
    handle.remove()
    return entered == [2]


def _like(attack: InversionConfig, other: InversionConfig) -> InversionConfig:
    return replace(other, capture_step=attack.capture_step, iterations=attack.iterations, seed=attack.seed)
