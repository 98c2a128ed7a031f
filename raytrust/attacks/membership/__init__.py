"""Membership inference: was this image among those that a model was trained on, or among those of one step's batch?

Signals are taken from a model's outputs (`signals`) or from a step's messages (`messages`); they become scores as they
are, by a trained attack model (`scores`) or by a likelihood ratio over shadow models (`likelihood`). Higher always
means member. `properties` infers what a batch holds rather than which image.
"""
