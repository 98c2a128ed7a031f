"""What other people's communication hooks reveal: of torch's own what is known of them, of others their result."""

from __future__ import annotations

from raytrust.compress import Vantage
from raytrust.compress.hook import HookCompressor
from raytrust.leak.rules import Messages, decoded_of, view_of
from raytrust.leak.views import Product, ProductView, View, identity_view


@view_of.register(HookCompressor)
def hook_view(compressor: HookCompressor, messages: Messages, vantage: Vantage, victim: int = 0) -> View:
    """Of torch's PowerSGD two linear measurements of every matrix that it compressed, M Q and M^T P^, where error
    feedback is on of the sum with the residual; of its other hooks and of unknown ones, the gradient that was decoded.
    """
    known = compressor.factors(messages, vantage)
    if known is None:
        return identity_view(decoded_of(compressor, messages, vantage, victim))
    products = [
        *(Product(i, right=q) for i, q in zip(known.matrices, known.rights, strict=True)),
        *(Product(i, left=p) for i, p in zip(known.matrices, known.lefts, strict=True)),
        *map(Product, known.vectors),
    ]
    return ProductView([*known.ps, *known.qs, *known.whole], products, compressor.layout.shapes)
