"""Bases of the options of compression methods and of gradient transforms, by which the registries know them."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar


class MethodConfig:
    """Options of something that is chosen by name, `method`: what a frozen dataclass of them is derived from."""

    method: ClassVar[str]

    @property
    def name(self) -> str:
        """A short name for tables and plots: the method, its first option, and others that are not default."""
        options = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        first = [str(value) for _, value, _ in options[:1]]
        changed = [f"{name}={value}" for name, value, default in options[1:] if value != default]
        return " ".join([self.method, *first, *changed])


class CompressorConfig(MethodConfig):
    """Options of a compression method. `raytrust.config.register.compressor` gives them to a class."""

    def name_with(self, fraction: float | None) -> str:
        """`name`, where it is known which fraction of the entries was sent."""
        return self.name

    @property
    def takes_error_feedback(self) -> bool:
        """Whether error feedback may be put around it: not around a method with a memory of its own."""
        return True


class TransformConfig(MethodConfig):
    """Options of what is done to a gradient before it is compressed. `raytrust.config.register.transform` gives them to
    a class."""

    # Done where the images are known, of which gradients that are handed over say too little: it comes first, alone.
    of_images: ClassVar[bool] = False
