"""What protects without compressing: transforms of a worker's gradient, in front of any compressor.

`raytrust.compress.build` puts those of a `Defence` before its compressor. What needs the images is in
`raytrust.train`: DP-SGD in `clipped`, Soteria in `soteria`, MixUp in `mixing`.
"""

from __future__ import annotations

from raytrust.defend.draws import private_generator
from raytrust.defend.transforms import Beforehand, Clip, Noise, PerImage, Prune, Transform, laplace

__all__ = ["Beforehand", "Clip", "Noise", "PerImage", "Prune", "Transform", "laplace", "private_generator"]
