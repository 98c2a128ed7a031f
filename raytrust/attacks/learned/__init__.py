"""A learned inverter (Wu et al. 2023): a network from messages to images, trained on the attacker's own images."""

from raytrust.attacks.learned.encoding import CountSketch
from raytrust.attacks.learned.inverter import Auxiliary, LearnedInverter, train_inverter
from raytrust.attacks.learned.messages import auxiliary_messages

__all__ = [
    "Auxiliary",
    "CountSketch",
    "LearnedInverter",
    "auxiliary_messages",
    "train_inverter",
]
