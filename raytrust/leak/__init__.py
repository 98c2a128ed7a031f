"""What a message reveals: what the attacker sees and what was true, one view a method, residuals and history."""

# Imported for the rules that they register, wherever anything of the room is imported first.
from raytrust.leak import history, hooks, low_rank, quantised, signs, sparse, transformed
from raytrust.leak.rules import EarlierStep, pure_view_of, view_of
from raytrust.leak.views import LinearView, SparseView, View, identity_view

__all__ = [
    "EarlierStep",
    "LinearView",
    "SparseView",
    "View",
    "history",
    "hooks",
    "identity_view",
    "low_rank",
    "pure_view_of",
    "quantised",
    "signs",
    "sparse",
    "transformed",
    "view_of",
]
