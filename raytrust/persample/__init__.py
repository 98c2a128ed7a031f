"""The gradients of many samples or candidates at once: one engine for every attack that wants them."""

from raytrust.persample.engine import PerSampleGradients
from raytrust.persample.matcher import GradientMatcher
from raytrust.persample.rules import register_rule

__all__ = ["GradientMatcher", "PerSampleGradients", "register_rule"]
