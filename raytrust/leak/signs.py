"""What sign messages reveal (signSGD, Signum, EF-signSGD): the orthant of the gradient, and scales that were sent."""

from __future__ import annotations

from raytrust.compress import Vantage
from raytrust.compress.scaled_sign import ScaledSign
from raytrust.compress.signsgd import SignSGD
from raytrust.leak.rules import Messages, decoded_of, payload_of, view_of
from raytrust.leak.views import SignView


@view_of.register(SignSGD)
def signsgd_view(compressor: SignSGD, messages: Messages, vantage: Vantage, victim: int = 0) -> SignView:
    return SignView(decoded_of(compressor, messages, vantage, victim))


@view_of.register(ScaledSign)
def scaled_sign_view(compressor: ScaledSign, messages: Messages, vantage: Vantage, victim: int = 0) -> SignView:
    scales, _ = payload_of(messages, vantage, victim)
    # A tensor of scale 0 is one of zeros, which are sent as 1.
    signs = [1.0 - 2.0 * (x < 0) for x in decoded_of(compressor, messages, vantage, victim)]
    return SignView(signs, scales)
