"""Gradient inversion: private images from the messages of one step."""

from raytrust.attacks.inversion.engine import Candidates, GradientInversion, invert
from raytrust.attacks.inversion.first_layer import ClosedForm, closed_form
from raytrust.attacks.inversion.labels import recover_labels
from raytrust.attacks.inversion.priors import total_colour, total_variation
from raytrust.persample.matcher import GradientMatcher
from raytrust.persample.plain import per_candidate_gradients

__all__ = [
    "Candidates",
    "ClosedForm",
    "GradientInversion",
    "GradientMatcher",
    "closed_form",
    "invert",
    "per_candidate_gradients",
    "recover_labels",
    "total_colour",
    "total_variation",
]
