"""Pages of HTML that need no other file and no network, from the templates beside this file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from raytrust.reports.text import capital

# What is measured names itself: a defence, a reason or a class may hold any character, so that all is escaped. A name
# that a template misspells is an error, not an empty place.
_TEMPLATES = Environment(
    loader=PackageLoader("raytrust.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["capital"] = capital


def render(template: str, **values: Any) -> str:
    """The page that a template makes of the values."""
    return _TEMPLATES.get_template(f"{template}.html.j2").render(**values)


def png_uri(content: bytes) -> str:
    """A picture as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def file_uri(path: Path) -> str:
    """That of a file; empty where there is none."""
    return png_uri(path.read_bytes()) if path.exists() else ""
