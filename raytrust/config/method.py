"""What all options of compression methods are derived from; the registry knows them by it."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar


class CompressorConfig:
    """Options of a compression method: what every method's frozen dataclass is derived from.

    method: its name in files and on command lines. `raytrust.config.register.compressor` gives it to a class.
    """

    method: ClassVar[str]

    @property
    def name(self) -> str:
        """A short name for tables and plots: the method, its first option, and others that are not default."""
        options = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        first = [str(value) for _, value, _ in options[:1]]
        changed = [f"{name}={value}" for name, value, default in options[1:] if value != default]
        return " ".join([self.method, *first, *changed])

    def name_with(self, fraction: float | None) -> str:
        """`name`, where it is known which fraction of the entries was sent."""
        return self.name

    @property
    def takes_error_feedback(self) -> bool:
        """Whether error feedback may be put around it: not around a method with a memory of its own."""
        return True
