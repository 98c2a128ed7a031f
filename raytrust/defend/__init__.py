"""What protects without compressing: transforms of a worker's gradient, in front of any compressor.

`raytrust.compress.build` puts those of a `Defence` before its compressor. DP-SGD, which needs the gradient of each
image, is `raytrust.train.clipped`.
"""

from __future__ import annotations

from raytrust.defend.draws import private_generator
from raytrust.defend.transforms import Clip, Noise, PerImage, Prune, Transform, laplace

__all__ = ["Clip", "Noise", "PerImage", "Prune", "Transform", "laplace", "private_generator"]
