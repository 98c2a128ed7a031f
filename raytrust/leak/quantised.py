"""What quantised messages reveal (QSGD, vqSGD): an unbiased estimate of the gradient, compared tensor by tensor."""

from __future__ import annotations

from raytrust.compress import Vantage
from raytrust.compress.qsgd import QSGD
from raytrust.compress.vqsgd import VqSGD
from raytrust.leak.rules import Messages, decoded_of, view_of
from raytrust.leak.views import TensorwiseView, identity_view


# The noise is as large in small entries as in large ones, hence by tensor. Measured: this beats the distances to the
# sets that hold the gradient (intervals, vertices), alone and added.
@view_of.register(QSGD)
@view_of.register(VqSGD)
def quantised_view(compressor: QSGD | VqSGD, messages: Messages, vantage: Vantage, victim: int = 0) -> TensorwiseView:
    return TensorwiseView(identity_view(decoded_of(compressor, messages, vantage, victim)))
