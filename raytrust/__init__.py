"""raytrust: what gradient compression does to privacy, accuracy and bytes on the wire."""

__version__ = "0.1.0"
